//! The relational port on PostgreSQL, one node or several.
//!
//! Every transaction names the tenant whose rows it may see (row-level security, see `schema.sql`). A write that failed before its
//! commit is repeated for a while; one whose commit has an unknown outcome only when its request ids make that safe.

mod documents;
mod filter;
mod lexical;
mod moving;
mod past;
mod policies;
mod read;
mod seal;
mod transfer;
mod upkeep;
mod write;

use std::time::Duration;

use aeterna_error::{Error, Reason};
use aeterna_storage::{Postgres, PostgresOptions, Session, StorageError, postgres};
use aeterna_types::{Layer, MemoryId, RequestId, Scope, TenantId, Timestamp};
use async_trait::async_trait;
use serde::de::DeserializeOwned;
use sqlx::Row as _;
use sqlx::postgres::PgRow;

use super::code::Code;
use super::ledger::{self, answered, damaged, encode, parsed};
use super::{
    Addition, AsOf, ChangeItem, Condition, Counts, ExportPage, Exported, Frequencies, Imported, Imports, IndexEvent,
    IndexState, Listing, Progress, Relational, Rescoring, Scored, Scoring, Seen, Sight, Stored,
};
use crate::domain::{self, Idempotency, Key, Memory, ScopeKey, Sequence, Version, View, Writer, Written};
use crate::error::MemoryError;
use crate::filter::Filter;
use seal::{seal, seal_json, unseal, unseal_json};
use write::{Places, PostgresLedger};

/// The migrations, oldest first. Those that landed never change.
pub const MIGRATIONS: &[(&str, &str)] = &[
    ("memories", include_str!("postgres/schema.sql")),
    ("ranked_of", include_str!("postgres/schema_2.sql")),
];

/// Whose rows the service works on when it works for all tenants; no tenant has this name.
const SYSTEM: &str = "*";
/// Whether a node has the newest schema, and some places of the outbox.
const HAS_ALL: &str = "SELECT has_all($1) AND EXISTS (SELECT 1 FROM _sqlx_migrations WHERE version = 2 AND success)";
/// How long a write may take before its commit, and each of its items more.
const WORK: (Duration, Duration) = (Duration::from_secs(3), Duration::from_millis(20));
/// However many they are: what is told to anybody waits for the oldest write under way.
const WORK_MOST: Duration = Duration::from_secs(60);
/// How long the start waits for a primary.
const START: Duration = Duration::from_secs(60);

/// The store.
#[derive(Clone, Debug)]
pub struct PostgresStore {
    database: Postgres,
    counts: lexical::Cache,
}

/// Reads in a transaction that sees a tenant's rows; where a node is lost meanwhile, another one is asked.
macro_rules! reading {
    ($store:expr, $tenant:expr, $session:ident => $work:expr) => {
        $crate::store::postgres::reading!(by read, $store, $tenant, $session => $work)
    };
    (by $read:ident, $store:expr, $tenant:expr, $session:ident => $work:expr) => {{
        let mut attempts = $store.database.attempts(true);
        loop {
            let attempt = async {
                let mut opened = $store.database.$read(&[("aeterna.tenant", $tenant)]).await?;
                let node = std::sync::Arc::clone(opened.node());
                let $session = &mut opened;
                let worked = tokio::select! {
                    worked = $work => worked,
                    () = node.lost() => {
                        return Err(aeterna_storage::StorageError::Unavailable("the node was lost".into()).into());
                    }
                };
                $crate::store::postgres::settle(opened, worked).await
            };
            match attempt.await {
                Err(MemoryError::Store(error)) => attempts.again(error).await?,
                done => break done,
            }
        }
    }};
}
use reading;

/// Writes for a tenant, in one transaction; `safe` when it may be repeated although it may have been done.
macro_rules! writing {
    ($store:expr, $writer:expr, $safe:expr, $ledger:ident => $work:expr) => {
        $crate::store::postgres::writing!($store, $writer, $safe, 1, $ledger => $work)
    };
    ($store:expr, $writer:expr, $safe:expr, $items:expr, $ledger:ident => $work:expr) => {
        $crate::store::postgres::transaction!($store, $writer.tenant.as_str(), $safe, $items, (session, places) => async {
            let mut $ledger = $crate::store::postgres::write::PostgresLedger::new(session, $writer, places);
            $work.await
        })
    };
}
use writing;

/// Works in a transaction that sees a tenant's rows and has places in the outbox, and commits it.
macro_rules! transaction {
    ($store:expr, $tenant:expr, $safe:expr, $items:expr, ($session:ident, $places:ident) => $work:expr) => {{
        let mut attempts = $store.database.attempts($safe);
        loop {
            let attempt = async {
                let (mut opened, mut taken) = $store.begin($tenant).await?;
                let worked = {
                    let ($session, $places) = (&mut opened, &mut taken);
                    $crate::store::postgres::within($items, $work).await
                };
                match worked {
                    Ok(value) => {
                        $store.database.commit(opened, taken.last()).await?;
                        Ok(value)
                    }
                    refused => $crate::store::postgres::settle(opened, refused).await,
                }
            };
            match attempt.await {
                Err(MemoryError::Store(error)) => attempts.again(error).await?,
                done => break done,
            }
        }
    }};
}
use transaction;

/// Reads what is told as done, `None` when there is nothing. What a node shows may be lost with it: a standby that nobody waits
/// for may be ahead of the one that takes over, and a primary that dies may show what no standby has. So the primary reads it
/// again, in a transaction that writes something of its own: its commit waits for the standby, and so for everything before.
macro_rules! lasting {
    ($store:expr, $tenant:expr, $session:ident => $work:expr) => {{
        match $crate::store::postgres::reading!($store, $tenant, $session => $work) {
            Ok(Some(_)) => {
                $crate::store::postgres::transaction!($store, $tenant, true, 1, ($session, _places) => $work)
            }
            nothing => nothing,
        }
    }};
}

/// Reads for whoever follows the outbox and keeps what he has read: on the primary alone. A standby shows a commit before the
/// primary does, which waits for another one first; it lacks others; and what it has may be lost when it is not the one that
/// takes over. While there is no primary nothing new is acknowledged, so that there is little to follow.
macro_rules! following {
    ($store:expr, $session:ident => $work:expr) => {
        reading!(by read_primary, $store, SYSTEM, $session => $work)
    };
}

/// Ends a transaction that has nothing to commit. After a failure its connection is not used again.
async fn settle<T>(session: Session, worked: Result<T, MemoryError>) -> Result<T, MemoryError> {
    if !worked.as_ref().is_err_and(MemoryError::is_failure) {
        session.finish().await?;
    }
    worked
}

/// A write that takes too long has lost its node; nothing of it is there before it commits.
async fn within<T>(items: usize, work: impl Future<Output = Result<T, MemoryError>>) -> Result<T, MemoryError> {
    let limit = (WORK.0 + WORK.1 * u32::try_from(items).unwrap_or(u32::MAX)).min(WORK_MOST);
    let worked = tokio::time::timeout(limit, work).await;
    worked.unwrap_or_else(|_| Err(StorageError::Unavailable("the primary does not answer".into()).into()))
}

impl PostgresStore {
    /// Connects to the database, whose schema is brought up to date first when its owner is given.
    ///
    /// # Errors
    /// When there is no primary, the schema is of another version, or the role of the service would go round row-level security.
    pub async fn open(options: &PostgresOptions, owner: Option<&PostgresOptions>) -> Result<Self, MemoryError> {
        const { assert!(MIGRATIONS.len() == 2, "`HAS_ALL` names the newest one") };
        if let Some(owner) = owner {
            let mut owner = owner.clone();
            owner.patience = START;
            postgres::migrate(&owner, MIGRATIONS, &grants(options.user())).await?;
        }
        let database = Postgres::open(options, HAS_ALL);
        database.ready(START).await?;
        Self::prepare(&database, options.user()).await?;
        Ok(Self {
            database,
            counts: lexical::Cache::default(),
        })
    }

    async fn prepare(database: &Postgres, user: &str) -> Result<(), MemoryError> {
        let mut session = database.write(&[("aeterna.tenant", SYSTEM)]).await?;
        postgres::check_schema(&mut session, MIGRATIONS.len() as i64, false).await?;
        let query = "SELECT r.rolsuper OR r.rolbypassrls OR EXISTS (SELECT 1 FROM pg_class c \
                     WHERE c.oid = 'memories'::regclass AND pg_has_role(c.relowner, 'MEMBER')) \
                     FROM pg_roles r WHERE r.rolname = current_user";
        let goes_round: bool = sqlx::query_scalar(query)
            .fetch_one(&mut *session)
            .await
            .map_err(storage)?;
        if goes_round {
            let message = format!(
                "the role `{user}` owns the tables of the store, or is a superuser, and would not be held by row-level security; \
                 name another one in `memory.store`, and the owner in `memory.store_owner`"
            );
            return Err(Error::new(Reason::NotConfigured, message).into());
        }
        upkeep::keep_ascending(&mut session).await?;
        let wanted = aeterna_text::VERSION.to_string();
        let analysed = read::meta(&mut session, "analysis").await?.as_ref() == Some(&wanted);
        database.commit(session, 0).await?;
        if analysed {
            return Ok(());
        }
        // A page a transaction, so that writes go on meanwhile.
        let mut after = Some(0);
        while let Some(from) = after {
            let mut session = database.write(&[("aeterna.tenant", SYSTEM)]).await?;
            after = lexical::analyse_some(&mut session, from).await?;
            if after.is_none() {
                read::put_meta(&mut session, "analysis", &wanted).await?;
            }
            database.commit(session, 0).await?;
        }
        Ok(())
    }

    async fn begin(&self, tenant: &str) -> Result<(Session, Places), MemoryError> {
        loop {
            let mut session = self.database.write(&[("aeterna.tenant", tenant)]).await?;
            if let Some(places) = within(1, Places::of(&mut session)).await? {
                return Ok((session, places));
            }
            within(1, write::begin_timeline(&mut session)).await?;
            self.database.commit(session, 0).await?;
        }
    }

    /// Reads from now on see what was answered, an earlier answer that was given again included.
    fn answered_with(&self, places: impl Iterator<Item = Sequence>) {
        if let Some(last) = places.max() {
            self.database.reach(last.0);
        }
    }

    /// What was answered to a request id, and is sure to last.
    async fn replayed<T: DeserializeOwned + Send>(
        &self,
        writer: &Writer,
        idempotency: &Idempotency,
    ) -> Result<Option<T>, MemoryError> {
        let found = lasting!(self, writer.tenant.as_str(), session => write::answer(session, writer, idempotency))?;
        let answer = found.map(|(digest, answer)| answered(idempotency, &digest, &answer));
        answer.transpose()
    }
}

/// What the role of the service may do, and nobody else: some functions look over the wall between tenants.
fn grants(user: &str) -> String {
    let role = format!("\"{}\"", user.replace('"', "\"\""));
    format!(
        "DO $$ DECLARE own record; BEGIN EXECUTE format('GRANT USAGE ON SCHEMA %I TO {role}', current_schema()); \
         EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA %I TO {role}', current_schema()); \
         EXECUTE format('REVOKE INSERT, UPDATE, DELETE ON _sqlx_migrations FROM {role}'); \
         FOR own IN SELECT oid::regprocedure AS name FROM pg_proc p \
             WHERE pronamespace = current_schema()::regnamespace AND proowner = current_user::regrole AND prokind = 'f' \
             AND prosecdef AND NOT EXISTS (SELECT FROM pg_depend WHERE classid = 'pg_proc'::regclass AND objid = p.oid \
             AND deptype = 'e') LOOP \
             EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', own.name); \
             EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO {role}', own.name); \
         END LOOP; END $$"
    )
}

/// The driver's errors on their way out.
fn storage(error: sqlx::Error) -> MemoryError {
    StorageError::from(error).into()
}

/// A JSON column.
fn record<T: DeserializeOwned>(row: &PgRow, column: &str, what: &str) -> Result<T, MemoryError> {
    let text: &str = row.try_get(column).map_err(storage)?;
    parsed(&unseal_json(text), what)
}

/// A memory and its number.
fn keyed(row: &PgRow) -> Result<(Key, Memory), MemoryError> {
    Ok((
        Key(row.try_get("key").map_err(storage)?),
        record(row, "record", "memory")?,
    ))
}

#[async_trait]
impl Relational for PostgresStore {
    async fn add(
        &self,
        writer: &Writer,
        items: Vec<Addition>,
    ) -> Result<Vec<Result<Written, MemoryError>>, MemoryError> {
        let safe = items.iter().all(|item| item.idempotency.is_some());
        let written = transaction!(self, writer.tenant.as_str(), safe, items.len(), (session, places) => async {
            ledger::add(&mut PostgresLedger::new(session, writer, places), items.clone()).await
        })?;
        self.answered_with(written.iter().flatten().map(|written| written.sequence));
        Ok(written)
    }

    async fn change(
        &self,
        writer: &Writer,
        items: Vec<ChangeItem>,
    ) -> Result<Vec<Result<Written, MemoryError>>, MemoryError> {
        let safe = items.iter().all(|item| item.idempotency.is_some());
        let written = transaction!(self, writer.tenant.as_str(), safe, items.len(), (session, places) => async {
            ledger::change(&mut PostgresLedger::new(session, writer, places), items.clone()).await
        })?;
        self.answered_with(written.iter().flatten().map(|written| written.sequence));
        Ok(written)
    }

    async fn history(
        &self,
        tenant: &TenantId,
        id: MemoryId,
        before: Option<i64>,
        limit: usize,
    ) -> Result<Vec<Version>, MemoryError> {
        reading!(self, tenant.as_str(), session => read::history(session, tenant, id, before, limit))
    }

    async fn counts(
        &self,
        tenant: &TenantId,
        model: &str,
        scopes: &[ScopeKey],
        now: Timestamp,
    ) -> Result<Counts, MemoryError> {
        reading!(self, tenant.as_str(), session => read::counts(session, model, scopes, now))
    }

    async fn replay(&self, writer: &Writer, idempotency: &Idempotency) -> Result<Option<Written>, MemoryError> {
        let written: Option<Written> = self.replayed(writer, idempotency).await?;
        self.answered_with(written.iter().map(|written| written.sequence));
        Ok(written)
    }

    async fn known(&self, tenant: &TenantId, places: &[(Scope, [u8; 32])]) -> Result<Vec<bool>, MemoryError> {
        reading!(self, tenant.as_str(), session => read::known(session, tenant, places))
    }

    async fn get(&self, tenant: &TenantId, id: MemoryId) -> Result<Option<Stored>, MemoryError> {
        reading!(self, tenant.as_str(), session => read::memory(session, tenant, id))
    }

    async fn past(&self, tenant: &TenantId, id: MemoryId, at: Timestamp) -> Result<Option<Memory>, MemoryError> {
        reading!(self, tenant.as_str(), session => past::memory(session, tenant, id, at))
    }

    async fn as_of(
        &self,
        tenant: &TenantId,
        scopes: &[ScopeKey],
        filter: Option<&Filter>,
        at: Timestamp,
        limit: usize,
    ) -> Result<AsOf, MemoryError> {
        reading!(self, tenant.as_str(), session => past::as_of(session, scopes, filter, at, limit))
    }

    async fn frequencies(&self, tenant: &TenantId, terms: &[String]) -> Result<Frequencies, MemoryError> {
        reading!(self, tenant.as_str(), session => lexical::frequencies(session, &self.counts, tenant, terms))
    }

    async fn visible(&self, tenant: &TenantId, view: &View, layers: &[Layer]) -> Result<Vec<ScopeKey>, MemoryError> {
        reading!(self, tenant.as_str(), session => read::visible(session, tenant, view, layers))
    }

    async fn list(&self, listing: &Listing) -> Result<Vec<Stored>, MemoryError> {
        reading!(self, listing.tenant.as_str(), session => read::list(session, listing))
    }

    async fn seen(&self, sight: &Sight) -> Result<Seen, MemoryError> {
        reading!(self, sight.tenant.as_str(), session => read::seen(session, sight))
    }

    async fn scored(&self, scoring: &Scoring) -> Result<Scored, MemoryError> {
        reading!(self, scoring.tenant.as_str(), session => read::scored(session, &self.counts, scoring))
    }

    async fn fetch(&self, tenant: &TenantId, keys: &[Key], now: Timestamp) -> Result<Vec<Stored>, MemoryError> {
        reading!(self, tenant.as_str(), session => read::fetch(session, keys, now))
    }

    async fn cosines(&self, tenant: &TenantId, rescoring: &Rescoring) -> Result<Vec<(Key, f32)>, MemoryError> {
        reading!(self, tenant.as_str(), session => read::cosines(session, rescoring))
    }

    async fn vectors(
        &self,
        tenant: Option<&TenantId>,
        model: &str,
        keys: &[Key],
    ) -> Result<Vec<(Key, Vec<f32>)>, MemoryError> {
        reading!(self, tenant.map_or(SYSTEM, TenantId::as_str), session => async {
            let mut vectors = Vec::with_capacity(keys.len());
            read::codes(session, model, keys, |key, code| vectors.push((key, code.decode()))).await?;
            Ok(vectors)
        })
    }

    async fn events(&self, after: Sequence, limit: usize) -> Result<Vec<IndexEvent>, MemoryError> {
        following!(self, session => read::events(session, after, limit))
    }

    async fn missing(&self, after: Sequence, most: usize) -> Result<usize, MemoryError> {
        let events = reading!(self, SYSTEM, session => read::events(session, after, most))?;
        Ok(events.len())
    }

    async fn changes(
        &self,
        tenant: Option<&TenantId>,
        after: Sequence,
        limit: usize,
    ) -> Result<Vec<domain::Change>, MemoryError> {
        let whose = tenant.map_or(SYSTEM, TenantId::as_str);
        // Mostly there is nothing new. What is told can't be taken back: see `lasting`.
        let first = reading!(by read_primary, self, whose, session => read::changes(session, tenant, after, 1))?;
        if first.is_empty() {
            return Ok(first);
        }
        let changes: Vec<domain::Change> = transaction!(self, whose, true, 1, (session, _places) =>
            read::changes(session, tenant, after, limit))?;
        // Whoever was told of a change must not read what was before it.
        if let Some(last) = changes.last() {
            self.database.reach(last.sequence.0);
        }
        Ok(changes)
    }

    async fn last_sequence(&self) -> Result<Sequence, MemoryError> {
        let last = following!(self, session => read::last_sequence(session))?;
        self.database.reach(last.0);
        Ok(last)
    }

    async fn has(&self, place: Sequence) -> Result<bool, MemoryError> {
        if place <= Sequence::default() {
            return Ok(true);
        }
        following!(self, session => read::has(session, place))
    }

    async fn reach(&self, sequence: Sequence) -> Result<(), MemoryError> {
        Ok(self.database.reached(sequence.0).await?)
    }

    async fn states(&self, model: &str, keys: &[Key]) -> Result<Vec<IndexState>, MemoryError> {
        following!(self, session => read::states(session, model, keys))
    }

    async fn state(&self, tenant: &TenantId, id: MemoryId, model: &str) -> Result<Option<IndexState>, MemoryError> {
        reading!(self, tenant.as_str(), session => read::memory_state(session, tenant, id, model))
    }

    async fn scan(&self, model: &str, after: Key, limit: usize, pending: bool) -> Result<Vec<IndexState>, MemoryError> {
        following!(self, session => read::scan(session, model, after, limit, pending))
    }

    async fn put_codes(
        &self,
        model: &str,
        codes: &[(MemoryId, i64, Code)],
        now: Timestamp,
    ) -> Result<usize, MemoryError> {
        transaction!(self, SYSTEM, true, codes.len(), (session, places) =>
            upkeep::put_codes(session, places, model, codes, now))
    }

    async fn export(&self, page: &ExportPage) -> Result<Vec<Exported>, MemoryError> {
        reading!(self, page.tenant.as_str(), session => transfer::export(session, page))
    }

    async fn import(
        &self,
        writer: &Writer,
        id: &RequestId,
        items: Vec<(i64, Imported)>,
        progress: &mut Progress,
    ) -> Result<Imports, MemoryError> {
        // A memory takes as long as it has versions.
        let work: usize = items.iter().map(|(_, item)| 1 + item.versions.len()).sum();
        let (results, done) = transaction!(self, writer.tenant.as_str(), false, work, (session, places) => async {
            let mut done = progress.clone();
            let mut ledger = PostgresLedger::new(session, writer, places);
            let results = ledger::import(&mut ledger, id.as_str(), items.clone(), &mut done).await?;
            Ok((results, done))
        })?;
        *progress = done;
        Ok(results)
    }

    async fn import_progress(&self, writer: &Writer, id: &RequestId) -> Result<Option<Progress>, MemoryError> {
        lasting!(self, writer.tenant.as_str(), session => transfer::progress(session, writer, id))
    }

    async fn end_import(&self, writer: &Writer, id: &RequestId) -> Result<(), MemoryError> {
        transaction!(self, writer.tenant.as_str(), true, 1, (session, _places) => transfer::end(session, writer, id))
    }

    async fn models(&self) -> Result<Vec<String>, MemoryError> {
        reading!(self, SYSTEM, session => read::models(session))
    }

    async fn vectors_by(&self, model: &str) -> Result<i64, MemoryError> {
        reading!(self, SYSTEM, session => read::vectors_by(session, model))
    }

    async fn forget_model(&self, model: &str) -> Result<(), MemoryError> {
        loop {
            let done: Result<bool, MemoryError> = transaction!(self, SYSTEM, true, 1000, (session, _places) =>
                upkeep::forget_some(session, model));
            if done? {
                return Ok(());
            }
        }
    }

    async fn reap(&self, now: Timestamp, limit: usize) -> Result<usize, MemoryError> {
        // Mostly there is nothing, and then no transaction needs a place in the outbox.
        let any: bool = reading!(self, SYSTEM, session => read::any_expired(session, now))?;
        if !any {
            return Ok(0);
        }
        transaction!(self, SYSTEM, true, limit, (session, places) => upkeep::reap(session, places, now, limit))
    }

    async fn identity(&self) -> Result<String, MemoryError> {
        let identity = reading!(self, SYSTEM, session => read::meta(session, "store"))?;
        identity.ok_or_else(|| damaged("identity"))
    }

    async fn note(&self, name: &str) -> Result<Option<String>, MemoryError> {
        let name = format!("note:{name}");
        reading!(self, SYSTEM, session => read::meta(session, &name))
    }

    async fn put_note(&self, name: &str, value: &str) -> Result<(), MemoryError> {
        let name = format!("note:{name}");
        transaction!(self, SYSTEM, true, 1, (session, _places) => read::put_meta(session, &name, value))
    }

    fn condition(&self) -> Condition {
        let nodes = self.database.condition();
        match (nodes.alive, nodes.primary) {
            (0, _) => Condition::Away("no node answers".into()),
            (_, false) => Condition::Weak("no primary: writes wait".into()),
            (alive, true) if alive < nodes.nodes => Condition::Weak(format!("{alive} of {} nodes answer", nodes.nodes)),
            _ => Condition::Well,
        }
    }

    async fn close(&self) {
        self.database.close().await;
    }
}

#[cfg(test)]
mod tests;
