//! Everything from one store into another one, as it was: memories with their versions and vectors, documents, policies, of all
//! tenants. What is not moved: answers kept for request ids, and places in the outbox, so that watchers begin anew.

use aeterna_error::{Error, Reason};
use aeterna_types::{Clock as _, Scope, SystemClock, TenantId, chain};
use serde_json::Value;

use crate::domain::{Document, Key, Memory, ScopeKey, View};
use crate::error::MemoryError;
use crate::store::ledger::{SYSTEM, end_past, system};
use crate::store::{DocumentListing, ExportPage, Exported, Imported, Progress, Relational};

/// Memories, or documents, at a time.
const PAGE: usize = 100;
/// Bytes that the versions of one memory may have.
const MOST: usize = 256 << 20;
/// What the new store notes: which store it is being filled from, and whether that is done.
const NOTE: &str = "migrated_from";
/// The import that brings the memories.
const IMPORT: &str = "migrate";

/// What has been moved, or compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Tenants.
    pub tenants: u64,
    /// Memories, deleted ones included.
    pub memories: u64,
    /// Documents.
    pub documents: u64,
    /// Policies.
    pub policies: u64,
    /// BLAKE3, chained over everything.
    pub digest: [u8; 32],
}

impl Moved {
    fn add(&mut self, item: &impl serde::Serialize) -> Result<(), Error> {
        let bytes = serde_json::to_vec(item).map_err(Error::internal)?;
        self.digest = chain(self.digest, &bytes);
        Ok(())
    }
}

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Things are moved.
    Moving,
    /// Both stores are read and compared.
    Comparing,
}

/// Moves everything into a store that is empty, or was begun to be filled by an earlier attempt; then both are read and their
/// digests compared. `tell` hears of progress.
///
/// # Errors
/// INVALID_STATE when the new store has anything of its own or the digests differ, or when a store fails: begin again then.
pub async fn migrate(
    from: &dyn Relational,
    to: &dyn Relational,
    mut tell: impl FnMut(Stage, &Moved),
) -> Result<Moved, Error> {
    let begun = format!("begun {}", from.identity().await?);
    match to.note(NOTE).await? {
        Some(note) if note == begun => {}
        None if to.tenants().await?.is_empty() => to.put_note(NOTE, &begun).await?,
        _ => {
            let message =
                "the new store has memories already; migrate into an empty one, or use `aeterna export` and `import`";
            return Err(Error::new(Reason::InvalidState, message));
        }
    }
    let mut moved = Moved::default();
    for tenant in tenants(from).await? {
        moved.tenants += 1;
        move_tenant(from, to, &tenant, &mut moved, |moved| tell(Stage::Moving, moved)).await?;
    }
    let old = survey(from, |seen| tell(Stage::Comparing, seen)).await?;
    let new = survey(to, |seen| tell(Stage::Comparing, seen)).await?;
    if old != new {
        let message = format!(
            "what arrived is not what was sent: {} memories, {} documents and {} policies instead of {}, {} and {}; nobody may \
             write to either store meanwhile",
            new.memories, new.documents, new.policies, old.memories, old.documents, old.policies
        );
        return Err(Error::new(Reason::InvalidState, message));
    }
    to.put_note(NOTE, &begun.replace("begun", "done")).await?;
    Ok(new)
}

async fn tenants(store: &dyn Relational) -> Result<Vec<TenantId>, MemoryError> {
    let mut tenants = store.tenants().await?;
    tenants.sort_by(|a, b| a.as_str().cmp(b.as_str()));
    Ok(tenants)
}

/// Reads what a tenant has, in an order that is the same in every store.
struct Reader<'a> {
    store: &'a dyn Relational,
    tenant: &'a TenantId,
    scopes: Vec<ScopeKey>,
    /// The document that was read last, and the memory.
    document: Option<(String, i64)>,
    memory: Key,
}

impl<'a> Reader<'a> {
    async fn new(store: &'a dyn Relational, tenant: &'a TenantId) -> Result<Self, MemoryError> {
        let everything = View {
            scope: Scope::default(),
            exact: false,
        };
        Ok(Self {
            store,
            tenant,
            scopes: store.visible(tenant, &everything, &[]).await?,
            document: None,
            memory: Key(0),
        })
    }

    /// The next document with all its versions, oldest first; `None`: that was all.
    async fn document(&mut self) -> Result<Option<Vec<Document>>, MemoryError> {
        let listing = DocumentListing {
            tenant: self.tenant.clone(),
            scopes: self.scopes.clone(),
            prefix: String::new(),
            after: self.document.take(),
            // Each of its versions may have a megabyte.
            limit: 1,
            show_deleted: true,
        };
        let Some((number, newest)) = self.store.documents(&listing).await?.pop() else {
            return Ok(None);
        };
        self.document = Some((newest.path.clone(), number));
        self.versions(&newest).await.map(Some)
    }

    async fn versions(&self, newest: &Document) -> Result<Vec<Document>, MemoryError> {
        let (tenant, scope, path) = (self.tenant, &newest.scope, &newest.path);
        let mut versions = Vec::new();
        let mut before = None;
        loop {
            let page = self.store.document_versions(tenant, scope, path, before, PAGE).await?;
            let Some(last) = page.last() else { break };
            before = Some(last.version);
            for Document { version, .. } in page {
                let whole = self.store.document(tenant, scope, path, Some(version)).await?;
                versions.push(whole.ok_or(MemoryError::NoVersion(version))?);
            }
        }
        versions.reverse();
        Ok(versions)
    }

    /// The next memories, with all that moves; none: that was all.
    async fn memories(&mut self) -> Result<Vec<Exported>, MemoryError> {
        let page = ExportPage {
            tenant: self.tenant.clone(),
            scopes: self.scopes.clone(),
            filter: None,
            after: self.memory,
            limit: PAGE,
            history: true,
            vectors: true,
            most: MOST,
            now: SystemClock.now(),
        };
        let mut found = self.store.export(&page).await?;
        if let Some(last) = found.last() {
            self.memory = last.key;
        }
        for exported in &mut found {
            // Those of models that are on their way in or out are made again.
            let model = &exported.memory.embedding_model;
            exported.vectors.retain(|vector| vector.model == *model);
            if exported.vectors.is_empty() {
                exported.memory.embedding_model.clear();
            }
            end_past(&exported.memory, &mut exported.versions, SYSTEM);
        }
        Ok(found)
    }
}

async fn move_tenant(
    from: &dyn Relational,
    to: &dyn Relational,
    tenant: &TenantId,
    moved: &mut Moved,
    mut tell: impl FnMut(&Moved),
) -> Result<(), Error> {
    let writer = system(tenant.as_str(), SystemClock.now())?;
    for policy in from.policies(tenant).await? {
        to.take_policy(&writer, policy).await?;
        moved.policies += 1;
    }
    let mut reader = Reader::new(from, tenant).await?;
    while let Some(versions) = reader.document().await? {
        moved.documents += 1;
        to.take_document(&writer, versions).await?;
    }
    let id = IMPORT.parse().map_err(Error::internal)?;
    let mut progress = Progress::default();
    loop {
        let page = reader.memories().await?;
        if page.is_empty() {
            return Ok(());
        }
        let place = progress.items;
        progress.items += page.len() as i64;
        moved.memories += page.len() as u64;
        let item = |exported: Exported| Imported {
            memory: exported.memory,
            named: true,
            versions: exported.versions,
            vectors: exported.vectors,
            most: None,
        };
        let items = (place..).zip(page.into_iter().map(item)).collect();
        for result in to.import(&writer, &id, items, &mut progress).await? {
            result?;
        }
        tell(moved);
    }
}

/// A memory with its numbers as callers are told of them: stores write the same number in different ways.
fn as_told(memory: &Memory) -> Result<Value, Error> {
    fn tell(value: &mut Value) {
        match value {
            Value::Number(number) => {
                let told = number.as_f64().map(|number| if number == 0.0 { 0.0 } else { number });
                *value = told.map_or(Value::Null, Value::from);
            }
            Value::Array(items) => items.iter_mut().for_each(tell),
            Value::Object(fields) => fields.values_mut().for_each(tell),
            _ => {}
        }
    }
    let mut told = serde_json::to_value(memory).map_err(Error::internal)?;
    tell(&mut told);
    Ok(told)
}

/// Counts and digests everything that moves.
async fn survey(store: &dyn Relational, mut tell: impl FnMut(&Moved)) -> Result<Moved, Error> {
    let mut seen = Moved::default();
    for tenant in tenants(store).await? {
        seen.tenants += 1;
        seen.add(&tenant.as_str())?;
        for policy in store.policies(&tenant).await? {
            seen.policies += 1;
            seen.add(&policy)?;
        }
        let mut reader = Reader::new(store, &tenant).await?;
        while let Some(versions) = reader.document().await? {
            seen.documents += 1;
            for version in &versions {
                seen.add(&(version, &version.text.content))?;
            }
        }
        loop {
            let page = reader.memories().await?;
            if page.is_empty() {
                break;
            }
            for exported in page {
                seen.memories += 1;
                seen.add(&as_told(&exported.memory)?)?;
                for version in &exported.versions {
                    let (memory, kind) = (as_told(&version.memory)?, format!("{:?}", version.kind));
                    seen.add(&(memory, kind, version.changed_at.micros(), &version.changed_by))?;
                }
                for vector in &exported.vectors {
                    seen.add(&(&vector.model, vector.code.as_bytes()))?;
                }
            }
            tell(&seen);
        }
    }
    Ok(seen)
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;
    use std::time::Duration;

    use aeterna_storage::{PostgresOptions, SqliteOptions};
    use aeterna_testkit::PostgresServer;

    use super::*;
    use crate::domain::{Policy, Rules};
    use crate::store::Policies as _;
    use crate::store::conformance;
    use crate::store::postgres::PostgresStore;
    use crate::store::sqlite::SqliteStore;

    async fn file(directory: &Path, name: &str) -> SqliteStore {
        let options = SqliteOptions {
            path: directory.join(name),
            busy_timeout: Duration::from_secs(5),
            readers: 2,
        };
        SqliteStore::open(&options, 0).await.unwrap()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn everything_moves_to_the_server_and_back_and_an_interruption_costs_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let first = file(directory.path(), "first.db").await;
        // What the suite leaves behind has everything in it.
        conformance::relational(Arc::new(first.clone())).await;
        for number in 0..150 {
            conformance::one_memory(&first, &format!("memory {number}")).await;
        }
        let policy = Policy {
            name: "short".into(),
            scope: Scope::default(),
            layers: Vec::new(),
            rules: Rules {
                time_to_live: Some(1_000_000),
                ..Rules::default()
            },
            description: "for a day".into(),
            version: 0,
            updated_at: SystemClock.now(),
            updated_by: String::new(),
        };
        let writer = system("another", SystemClock.now()).unwrap();
        let mut seen = None;
        for description in ["for a day", "for a night"] {
            let policy = Policy {
                description: description.into(),
                ..policy.clone()
            };
            let put = first.put_policy(&writer, policy, seen, None, None).await;
            seen = Some(put.unwrap().etag());
        }
        // Numbers that stores write in different ways.
        let numbers = serde_json::json!({"large": 1e17, "nothing": -0.0, "small": 1e-9, "whole": 3});
        let mut body = conformance::body("numbers");
        body.metadata = numbers.as_object().unwrap().clone();
        let addition = crate::store::Addition {
            scope: Scope::default(),
            body,
            vector: None,
            most: None,
            idempotency: None,
        };
        let added = first.add(&writer, vec![addition]).await.unwrap().remove(0).unwrap();
        // Deleted before its vector by another model came.
        let code = crate::store::code::Code::encode(&conformance::vector(1, 64)).unwrap();
        let codes = [(added.memory.id, added.memory.version, code)];
        assert_eq!(first.put_codes("before@1", &codes, SystemClock.now()).await.unwrap(), 1);
        let deleted = crate::store::ChangeItem {
            change: crate::store::Change::Delete,
            ..crate::store::ledger::purge(added.memory.id)
        };
        first.change(&writer, vec![deleted]).await.unwrap().remove(0).unwrap();
        first.forget_model("before@1").await.unwrap();
        let there = survey(&first, |_| ()).await.unwrap();
        assert!(
            there.tenants > 1 && there.memories > 200 && there.documents > 0 && there.policies > 0,
            "{there:?}"
        );

        let server = PostgresServer::start(&["fsync=off"]);
        let service = PostgresOptions::parse(&server.uri(), None).unwrap();
        let owner = service.as_user("owner", None);
        let second = PostgresStore::open(&service, Some(&owner)).await.unwrap();
        let (begun, interrupted) = tokio::sync::oneshot::channel();
        let task = tokio::spawn({
            let (first, second, mut begun) = (first.clone(), second.clone(), Some(begun));
            async move {
                let told = |_, _: &Moved| _ = begun.take().map(|begun| begun.send(()));
                migrate(&first, &second, told).await
            }
        });
        interrupted.await.unwrap();
        task.abort();
        let _ = task.await;
        assert_eq!(migrate(&first, &second, |_, _| ()).await.unwrap(), there);

        let third = file(directory.path(), "third.db").await;
        assert_eq!(migrate(&second, &third, |_, _| ()).await.unwrap(), there);
        // What has memories of its own is left alone, and what was filled is not filled again.
        for (from, to) in [
            (&first as &dyn Relational, &third as &dyn Relational),
            (&second, &third),
        ] {
            let refused = migrate(from, to, |_, _| ()).await.unwrap_err();
            assert_eq!(refused.reason(), Reason::InvalidState);
        }
        first.close().await;
        second.close().await;
        third.close().await;
    }
}
