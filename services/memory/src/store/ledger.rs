//! What every write does, whatever the store: replays, merges, versions, history, outbox. A store brings the steps, all within
//! one transaction of its own ([`Ledger`]), and holds what it hands out against other writers until the transaction ends.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use aeterna_error::Error;
use aeterna_types::{MemoryId, Scope, TenantId, Timestamp};
use async_trait::async_trait;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{Addition, Change, ChangeItem, Imported, Imports, Progress, StoredVector};
use crate::domain::{
    Body, Document, DocumentChange, Edit, Idempotency, Key, Kind, Memory, Outcome, Policy, ScopeKey, Sequence, Text,
    Version, Writer, Written,
};
use crate::error::MemoryError;

/// What stands in the outbox beside memories.
#[derive(Clone, Copy, Debug)]
pub enum Resource<'a> {
    /// A document, by its path.
    Document(&'a str),
    /// A policy, by its name.
    Policy(&'a str),
}

impl Resource<'_> {
    /// Its name in the outbox.
    pub fn name(self) -> String {
        match self {
            Self::Document(path) => format!("document:{path}"),
            Self::Policy(name) => format!("policy:{name}"),
        }
    }
}

/// The steps of a write, within one transaction of one writer.
#[async_trait]
pub trait Ledger: Send {
    /// Who writes.
    fn writer(&self) -> &Writer;

    /// The answer that is kept under a request id, with the digest of the call that it was given to.
    async fn answer(&mut self, idempotency: &Idempotency) -> Result<Option<(Vec<u8>, String)>, MemoryError>;

    /// Keeps an answer, as JSON.
    async fn keep(&mut self, idempotency: &Idempotency, answer: String) -> Result<(), MemoryError>;

    /// The number of a scope, which is made when it is new.
    async fn scope(&mut self, scope: &Scope) -> Result<ScopeKey, MemoryError>;

    /// Holds the memories of a batch against other writers at its beginning, all of them in one order, where writers are not one
    /// after the other anyway: who comes late would have to begin again.
    async fn hold(&mut self, _ids: &[MemoryId]) -> Result<(), MemoryError> {
        Ok(())
    }

    /// The same for those that say what is to be added.
    async fn hold_twins(&mut self, _places: &[(&Scope, [u8; 32])]) -> Result<(), MemoryError> {
        Ok(())
    }

    /// The memory of a scope that is not deleted and says the same.
    async fn twin(&mut self, scope: ScopeKey, identity: [u8; 32]) -> Result<Option<(Key, Memory)>, MemoryError>;

    /// How many memories of a scope are not deleted.
    async fn live(&mut self, scope: ScopeKey) -> Result<i64, MemoryError>;

    /// The writer's memory of an id.
    async fn find(&mut self, id: MemoryId) -> Result<Option<(Key, Memory)>, MemoryError>;

    /// Whose memory has an id.
    async fn owner(&mut self, id: MemoryId) -> Result<Owner, MemoryError>;

    /// Writes a new memory, with its vector, and with its terms unless it is deleted.
    async fn insert(
        &mut self,
        scope: ScopeKey,
        memory: &Memory,
        vector: Option<&StoredVector>,
    ) -> Result<Key, MemoryError>;

    /// Writes a memory as it is now; `Duplicate` when another one of the scope says the same.
    async fn update(&mut self, key: Key, memory: &Memory) -> Result<(), MemoryError>;

    /// Replaces all vectors of a memory.
    async fn revector(&mut self, key: Key, vector: Option<&StoredVector>) -> Result<(), MemoryError>;

    /// Removes a memory with its history, its vectors, its terms, and the answers that earlier writes of it were given.
    async fn purge(&mut self, key: Key, memory: &Memory) -> Result<(), MemoryError>;

    /// Adds a version to the history.
    async fn history(&mut self, version: &Version) -> Result<(), MemoryError>;

    /// Adds a change of a memory, which is there still, to the outbox.
    async fn event(&mut self, key: Key, memory: &Memory, kind: Kind) -> Result<Sequence, MemoryError>;

    /// The place of an answer that tells of a memory and changes nothing. A store of one node needs none: every read sees what
    /// there is. One of several adds it to the outbox, so that whoever reads with it sees the memory.
    async fn mention(&mut self, _key: Key, _memory: &Memory) -> Result<Sequence, MemoryError> {
        Ok(Sequence::default())
    }

    /// Adds a change of something else to the outbox.
    async fn resource_event(
        &mut self,
        scope: Option<ScopeKey>,
        resource: Resource<'_>,
        version: i64,
        kind: Kind,
    ) -> Result<Sequence, MemoryError>;

    /// The newest version of a document with the document's number; without its content.
    async fn document(&mut self, scope: ScopeKey, path: &str) -> Result<Option<(i64, Document)>, MemoryError>;

    /// What was said in a version of a document.
    async fn document_text(&mut self, document: i64, version: i64) -> Result<Option<Text>, MemoryError>;

    /// Writes a version, and makes it the newest one; the document's number.
    async fn put_document(
        &mut self,
        existing: Option<i64>,
        scope: ScopeKey,
        document: &Document,
    ) -> Result<i64, MemoryError>;

    /// The writer's policy of a name.
    async fn policy(&mut self, name: &str) -> Result<Option<Policy>, MemoryError>;

    /// Writes a policy in place of what there was.
    async fn put_policy(&mut self, policy: &Policy) -> Result<(), MemoryError>;

    /// Removes a policy.
    async fn drop_policy(&mut self, name: &str) -> Result<(), MemoryError>;

    /// Remembers how far an import has come.
    async fn put_progress(&mut self, id: &str, progress: &Progress) -> Result<(), MemoryError>;
}

/// Whose memory it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// There is none.
    Nobody,
    /// The writer's tenant.
    Writer,
    /// Another one, of whom nothing may be told.
    Another,
}

/// What becomes of one item of a batch: a refusal stays with it, and when the store itself failed nothing of the batch is
/// kept.
fn verdict<T>(result: Result<T, MemoryError>) -> Result<Result<T, MemoryError>, MemoryError> {
    match result {
        Err(error) if error.is_failure() => Err(error),
        result => Ok(result),
    }
}

/// What becomes of each of the items of a batch.
pub type Verdicts = Vec<Result<Written, MemoryError>>;

/// Adds memories.
pub async fn add(ledger: &mut dyn Ledger, items: Vec<Addition>) -> Result<Verdicts, MemoryError> {
    if items.len() > 1 {
        let places = items.iter().map(|item| (&item.scope, item.body.identity()));
        ledger.hold_twins(&places.collect::<Vec<_>>()).await?;
    }
    let (mut results, mut rooms) = (Vec::with_capacity(items.len()), Rooms::default());
    for item in items {
        results.push(verdict(add_one(ledger, &mut rooms, item).await)?);
    }
    Ok(results)
}

async fn add_one(ledger: &mut dyn Ledger, rooms: &mut Rooms, item: Addition) -> Result<Written, MemoryError> {
    if let Some(earlier) = replayed(ledger, item.idempotency.as_ref()).await? {
        return Ok(earlier);
    }
    let scope = ledger.scope(&item.scope).await?;
    let written = match ledger.twin(scope, item.body.identity()).await? {
        Some((key, existing)) => merge(ledger, key, existing, item.body).await?,
        None => {
            if let Some((most, policy)) = &item.most {
                rooms.take(ledger, scope, *most, policy).await?;
            }
            let now = ledger.writer().now;
            let memory = Memory {
                id: MemoryId::new(now),
                scope: item.scope,
                body: item.body,
                created_at: now,
                updated_at: now,
                deleted_at: None,
                version: 1,
                embedding_model: item.vector.as_ref().map(|v| v.model.clone()).unwrap_or_default(),
            };
            let key = ledger.insert(scope, &memory, item.vector.as_ref()).await?;
            let sequence = record(ledger, key, &memory, Kind::Added).await?;
            Written {
                memory,
                outcome: Outcome::Created,
                sequence,
            }
        }
    };
    remember(ledger, item.idempotency.as_ref(), &written).await?;
    Ok(written)
}

/// How many memories scopes hold, counted once a transaction.
#[derive(Debug, Default)]
struct Rooms(HashMap<ScopeKey, i64>);

impl Rooms {
    /// Takes the place of a new memory, which is written next; refuses one more than the scope may hold.
    async fn take(
        &mut self,
        ledger: &mut dyn Ledger,
        scope: ScopeKey,
        most: i64,
        policy: &str,
    ) -> Result<(), MemoryError> {
        let there = match self.0.entry(scope) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => unknown.insert(ledger.live(scope).await?),
        };
        if *there < most {
            *there += 1;
            return Ok(());
        }
        Err(MemoryError::Forbidden {
            policy: policy.to_owned(),
            why: format!("the scope holds {there} memories, and `max_memories` is {most}; delete some first"),
        })
    }
}

async fn merge(ledger: &mut dyn Ledger, key: Key, mut memory: Memory, body: Body) -> Result<Written, MemoryError> {
    let sequence = if memory.absorb(body) {
        memory.version += 1;
        memory.updated_at = ledger.writer().now;
        ledger.update(key, &memory).await?;
        record(ledger, key, &memory, Kind::Updated).await?
    } else {
        ledger.mention(key, &memory).await?
    };
    Ok(Written {
        memory,
        outcome: Outcome::Merged,
        sequence,
    })
}

/// Changes memories.
pub async fn change(ledger: &mut dyn Ledger, items: Vec<ChangeItem>) -> Result<Verdicts, MemoryError> {
    if items.len() > 1 {
        let ids = items.iter().map(|item| item.id);
        ledger.hold(&ids.collect::<Vec<_>>()).await?;
    }
    let mut results = Vec::with_capacity(items.len());
    for item in items {
        results.push(verdict(change_one(ledger, item).await)?);
    }
    Ok(results)
}

async fn change_one(ledger: &mut dyn Ledger, item: ChangeItem) -> Result<Written, MemoryError> {
    if let Some(earlier) = replayed(ledger, item.idempotency.as_ref()).await? {
        return Ok(earlier);
    }
    let found = ledger.find(item.id).await?;
    let (key, mut memory) = found.ok_or_else(|| MemoryError::NotFound(item.id.to_string()))?;
    if item.etag.is_some_and(|etag| etag != memory.etag()) {
        return Err(MemoryError::EtagMismatch);
    }
    if item.made_of.is_some_and(|etag| etag != memory.etag()) {
        return Err(MemoryError::Stale);
    }
    if memory.deleted_at.is_some() && !matches!(item.change, Change::Purge) {
        return Err(MemoryError::Deleted);
    }
    memory.version += 1;
    memory.updated_at = ledger.writer().now;
    let sequence = match item.change {
        Change::Purge => {
            let sequence = ledger.event(key, &memory, Kind::Purged).await?;
            ledger.purge(key, &memory).await?;
            memory = memory.redacted();
            sequence
        }
        Change::Delete => {
            memory.deleted_at = Some(memory.updated_at);
            ledger.update(key, &memory).await?;
            record(ledger, key, &memory, Kind::Deleted).await?
        }
        Change::Replace { body, vector, reindex } => {
            memory.body = *body;
            if reindex {
                memory.embedding_model = vector.as_ref().map(|v| v.model.clone()).unwrap_or_default();
            }
            // First, since it may refuse: then the vector stays as it is.
            ledger.update(key, &memory).await?;
            if reindex {
                ledger.revector(key, vector.as_ref()).await?;
            }
            record(ledger, key, &memory, Kind::Updated).await?
        }
    };
    let written = Written {
        memory,
        outcome: Outcome::Merged,
        sequence,
    };
    remember(ledger, item.idempotency.as_ref(), &written).await?;
    Ok(written)
}

/// Deletes a memory that has expired, as a write of the system's own.
pub async fn expire(ledger: &mut dyn Ledger, key: Key, mut memory: Memory) -> Result<(), MemoryError> {
    let now = ledger.writer().now;
    memory.deleted_at = Some(now);
    memory.updated_at = now;
    memory.version += 1;
    ledger.update(key, &memory).await?;
    record(ledger, key, &memory, Kind::Expired).await.map(|_| ())
}

/// History and outbox; the place in the outbox orders all changes.
async fn record(ledger: &mut dyn Ledger, key: Key, memory: &Memory, kind: Kind) -> Result<Sequence, MemoryError> {
    let version = Version {
        memory: memory.clone(),
        kind,
        changed_at: ledger.writer().now,
        changed_by: ledger.writer().subject.clone(),
    };
    ledger.history(&version).await?;
    ledger.event(key, memory, kind).await
}

/// Takes memories in as they were, and remembers the progress.
pub async fn import(
    ledger: &mut dyn Ledger,
    id: &str,
    items: Vec<(i64, Imported)>,
    progress: &mut Progress,
) -> Result<Imports, MemoryError> {
    let (mut results, mut rooms) = (Vec::with_capacity(items.len()), Rooms::default());
    for (place, item) in items {
        let result = verdict(import_one(ledger, &mut rooms, item).await)?;
        match &result {
            Ok(_) => progress.refused.remove(&place),
            Err(_) => progress.refused.insert(place),
        };
        results.push(result);
    }
    ledger.put_progress(id, progress).await?;
    Ok(results)
}

/// The change that a memory is which comes as it was.
fn arrives_as(memory: &Memory) -> Kind {
    match memory.deleted_at {
        Some(_) => Kind::Deleted,
        None => Kind::Added,
    }
}

/// Makes the past of a memory end with what it says now, whatever was sent of it.
pub fn end_past(memory: &Memory, versions: &mut Vec<Version>, by: &str) {
    match versions.last_mut() {
        Some(last) if last.memory.version >= memory.version => {
            last.memory.body.clone_from(&memory.body);
            last.memory.deleted_at = memory.deleted_at;
        }
        _ => versions.push(Version {
            memory: memory.clone(),
            kind: arrives_as(memory),
            changed_at: memory.updated_at,
            changed_by: by.to_owned(),
        }),
    }
}

async fn import_one(
    ledger: &mut dyn Ledger,
    rooms: &mut Rooms,
    item: Imported,
) -> Result<(Outcome, Sequence), MemoryError> {
    let (mut memory, mut versions) = (item.memory, item.versions);
    let owner = match item.named {
        true => ledger.owner(memory.id).await?,
        false => Owner::Another,
    };
    match owner {
        Owner::Writer => return Ok((Outcome::Merged, Sequence::default())),
        Owner::Another => memory.id = MemoryId::new(ledger.writer().now),
        Owner::Nobody => {}
    }
    let scope = ledger.scope(&memory.scope).await?;
    if memory.deleted_at.is_none() {
        if let Some((key, existing)) = ledger.twin(scope, memory.body.identity()).await? {
            let merged = merge(ledger, key, existing, memory.body).await?;
            return Ok((Outcome::Merged, merged.sequence));
        }
        if let Some((most, policy)) = &item.most {
            rooms.take(ledger, scope, *most, policy).await?;
        }
    }
    let vector = item.vectors.first();
    memory.embedding_model = vector.map(|vector| vector.model.clone()).unwrap_or_default();
    let key = ledger.insert(scope, &memory, vector).await?;
    end_past(&memory, &mut versions, &ledger.writer().subject);
    for mut version in versions {
        version.memory.id = memory.id;
        version.memory.scope = memory.scope.clone();
        ledger.history(&version).await?;
    }
    let sequence = ledger.event(key, &memory, arrives_as(&memory)).await?;
    Ok((Outcome::Created, sequence))
}

/// What a write of a document answered: the version, without its content.
#[derive(Debug, Serialize, Deserialize)]
pub struct DocumentAnswer {
    key: i64,
    document: Document,
    sequence: Sequence,
}

/// Changes a document.
pub async fn change_document(
    ledger: &mut dyn Ledger,
    change: DocumentChange,
) -> Result<(Document, Sequence), MemoryError> {
    if let Some(earlier) = replayed::<DocumentAnswer>(ledger, change.idempotency.as_ref()).await? {
        let mut document = earlier.document;
        document.text = version(ledger, earlier.key, document.version).await?;
        return Ok((document, earlier.sequence));
    }
    let scope = ledger.scope(&change.scope).await?;
    let existing = ledger.document(scope, &change.path).await?;
    let fits = |etag: &String| existing.as_ref().is_some_and(|(_, document)| document.etag() == *etag);
    if change.etag.as_ref().is_some_and(|etag| !fits(etag)) {
        return Err(MemoryError::EtagMismatch);
    }
    let there = || {
        existing
            .as_ref()
            .ok_or_else(|| MemoryError::NoDocument(change.path.clone()))
    };
    let (text, deleted, kind) = match change.edit {
        Edit::Put(text) => {
            let kind = if existing.is_some() { Kind::Updated } else { Kind::Added };
            (*text, false, kind)
        }
        Edit::Restore(number) => (version(ledger, there()?.0, number).await?, false, Kind::Updated),
        Edit::Delete => {
            let (key, document) = there()?;
            if document.deleted_at.is_some() {
                return Err(MemoryError::Deleted);
            }
            (version(ledger, *key, document.version).await?, true, Kind::Deleted)
        }
    };
    let now = ledger.writer().now;
    let document = Document {
        scope: change.scope,
        path: change.path,
        text,
        version: existing.as_ref().map_or(1, |(_, document)| document.version + 1),
        created_at: existing.as_ref().map_or(now, |(_, document)| document.created_at),
        updated_at: now,
        updated_by: ledger.writer().subject.clone(),
        deleted_at: deleted.then_some(now),
    };
    let key = ledger
        .put_document(existing.map(|(key, _)| key), scope, &document)
        .await?;
    let resource = Resource::Document(&document.path);
    let sequence = ledger
        .resource_event(Some(scope), resource, document.version, kind)
        .await?;
    let answer = DocumentAnswer {
        key,
        document,
        sequence,
    };
    remember(ledger, change.idempotency.as_ref(), &answer).await?;
    Ok((answer.document, sequence))
}

/// Takes a document in as it was, with all its versions, oldest first; false when its place is taken.
pub async fn take_document(ledger: &mut dyn Ledger, versions: &[Document]) -> Result<bool, MemoryError> {
    let Some(newest) = versions.last() else {
        return Ok(false);
    };
    let scope = ledger.scope(&newest.scope).await?;
    if ledger.document(scope, &newest.path).await?.is_some() {
        return Ok(false);
    }
    let mut key = None;
    for document in versions {
        key = Some(ledger.put_document(key, scope, document).await?);
    }
    let kind = match newest.deleted_at {
        Some(_) => Kind::Deleted,
        None => Kind::Added,
    };
    let resource = Resource::Document(&newest.path);
    ledger
        .resource_event(Some(scope), resource, newest.version, kind)
        .await?;
    Ok(true)
}

async fn version(ledger: &mut dyn Ledger, document: i64, number: i64) -> Result<Text, MemoryError> {
    let text = ledger.document_text(document, number).await?;
    text.ok_or(MemoryError::NoVersion(number))
}

/// Writes a policy, in the place of the one that was seen.
pub async fn put_policy(
    ledger: &mut dyn Ledger,
    mut policy: Policy,
    (seen, etag): (Option<&str>, Option<&str>),
    idempotency: Option<&Idempotency>,
) -> Result<Policy, MemoryError> {
    if let Some(earlier) = replayed(ledger, idempotency).await? {
        return Ok(earlier);
    }
    let existing = ledger.policy(&policy.name).await?;
    check_etag(existing.as_ref(), etag)?;
    if existing.as_ref().map(Policy::etag).as_deref() != seen {
        return Err(MemoryError::Stale);
    }
    policy.version = existing.as_ref().map_or(1, |existing| existing.version + 1);
    policy.updated_at = ledger.writer().now;
    policy.updated_by.clone_from(&ledger.writer().subject);
    ledger.put_policy(&policy).await?;
    let kind = if existing.is_some() { Kind::Updated } else { Kind::Added };
    let resource = Resource::Policy(&policy.name);
    ledger.resource_event(None, resource, policy.version, kind).await?;
    remember(ledger, idempotency, &policy).await?;
    Ok(policy)
}

/// Takes a policy in as it was; false when there is one of its name.
pub async fn take_policy(ledger: &mut dyn Ledger, policy: &Policy) -> Result<bool, MemoryError> {
    if ledger.policy(&policy.name).await?.is_some() {
        return Ok(false);
    }
    ledger.put_policy(policy).await?;
    let resource = Resource::Policy(&policy.name);
    ledger
        .resource_event(None, resource, policy.version, Kind::Added)
        .await?;
    Ok(true)
}

/// Deletes a policy.
pub async fn delete_policy(ledger: &mut dyn Ledger, name: &str, etag: Option<&str>) -> Result<(), MemoryError> {
    let existing = ledger.policy(name).await?;
    let existing = existing.ok_or_else(|| MemoryError::NoPolicy(name.into()))?;
    check_etag(Some(&existing), etag)?;
    ledger.drop_policy(name).await?;
    let (resource, version) = (Resource::Policy(name), existing.version + 1);
    ledger
        .resource_event(None, resource, version, Kind::Deleted)
        .await
        .map(|_| ())
}

fn check_etag(existing: Option<&Policy>, etag: Option<&str>) -> Result<(), MemoryError> {
    match etag {
        Some(etag) if existing.is_none_or(|policy| policy.etag() != etag) => Err(MemoryError::EtagMismatch),
        _ => Ok(()),
    }
}

async fn replayed<T: DeserializeOwned>(
    ledger: &mut dyn Ledger,
    idempotency: Option<&Idempotency>,
) -> Result<Option<T>, MemoryError> {
    let Some(idempotency) = idempotency else {
        return Ok(None);
    };
    let kept = ledger.answer(idempotency).await?;
    kept.map(|(digest, answer)| answered(idempotency, &digest, &answer))
        .transpose()
}

/// The answer that is kept, when it was given to the same call.
pub fn answered<T: DeserializeOwned>(idempotency: &Idempotency, digest: &[u8], answer: &str) -> Result<T, MemoryError> {
    if digest != idempotency.digest {
        return Err(MemoryError::RequestIdReused);
    }
    parsed(answer, "answer")
}

async fn remember<T: Serialize>(
    ledger: &mut dyn Ledger,
    idempotency: Option<&Idempotency>,
    written: &T,
) -> Result<(), MemoryError> {
    match idempotency {
        Some(idempotency) => ledger.keep(idempotency, encode(written)?).await,
        None => Ok(()),
    }
}

/// A value as stores keep it.
pub fn encode<T: Serialize>(value: &T) -> Result<String, MemoryError> {
    serde_json::to_string(value).map_err(|error| MemoryError::Other(Error::internal(error)))
}

/// A value as stores have kept it.
pub fn parsed<T: DeserializeOwned>(record: &str, what: &str) -> Result<T, MemoryError> {
    serde_json::from_str(record).map_err(|_| damaged(what))
}

/// What is stored does not mean anything.
pub fn damaged(what: &str) -> MemoryError {
    MemoryError::Other(Error::internal(format!("a stored {what} can't be decoded")))
}

/// The subject of what the service writes on its own.
pub const SYSTEM: &str = "system";

/// The service itself, where it writes on its own.
pub fn system(tenant: &str, now: Timestamp) -> Result<Writer, MemoryError> {
    Ok(Writer {
        tenant: tenant.parse().map_err(|_| damaged("tenant"))?,
        subject: SYSTEM.into(),
        now,
    })
}

/// Things of tenants, by tenant; those of one stand together.
pub fn by_tenant<T>(things: Vec<(TenantId, T)>) -> Vec<(TenantId, Vec<T>)> {
    let mut tenants: Vec<(TenantId, Vec<T>)> = Vec::new();
    for (tenant, thing) in things {
        match tenants.last_mut() {
            Some((last, all)) if *last == tenant => all.push(thing),
            _ => tenants.push((tenant, vec![thing])),
        }
    }
    tenants
}

/// Refuses a memory whose versions, in `bytes` of records, would not fit a message.
pub fn versions_fit(id: MemoryId, bytes: i64, limit: usize) -> Result<(), MemoryError> {
    // A record has names that a message does not have.
    if usize::try_from(bytes).is_ok_and(|bytes| bytes / 2 <= limit) {
        return Ok(());
    }
    Err(MemoryError::TooManyVersions {
        id: id.to_string(),
        bytes,
        limit,
    })
}

/// The removal of a memory for good, by the service itself.
pub fn purge(id: MemoryId) -> ChangeItem {
    ChangeItem {
        id,
        etag: None,
        made_of: None,
        change: Change::Purge,
        idempotency: None,
    }
}
