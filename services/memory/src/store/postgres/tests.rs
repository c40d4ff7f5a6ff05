use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use aeterna_testkit::PostgresServer;

use super::*;
use crate::domain::Outcome;
use crate::store::conformance;

mod nodes;

fn options(server: &PostgresServer) -> (PostgresOptions, PostgresOptions) {
    let service = PostgresOptions::parse(&server.uri(), None).unwrap();
    let owner = service.as_user("owner", None);
    (service, owner)
}

/// The service's way to two nodes.
fn both(one: &PostgresServer, other: &PostgresServer) -> PostgresOptions {
    let hosts = format!("//service@127.0.0.1:{},127.0.0.1:{}/aeterna", one.port, other.port);
    PostgresOptions::parse(&hosts, None).unwrap()
}

async fn store(server: &PostgresServer) -> PostgresStore {
    let (service, owner) = options(server);
    PostgresStore::open(&service, Some(&owner)).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conforms() {
    let server = PostgresServer::start(&["fsync=off"]);
    let store = store(&server).await;
    conformance::relational(Arc::new(store.clone())).await;
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_wall_stands_in_the_database_too() {
    let server = PostgresServer::start(&["fsync=off"]);
    let (service, owner) = options(&server);
    let early = PostgresStore::open(&service, None).await.unwrap_err();
    assert!(
        Error::from(early).to_string().contains("memory.store_owner"),
        "the schema is not there yet"
    );
    let store = store(&server).await;
    conformance::one_memory(&store, "the cat sat").await;
    let counted = |setting: &str| {
        let query = format!("SET ROLE service; {setting}; SELECT count(*) FROM memories");
        server.sql("aeterna", &query)
    };
    assert_eq!(counted("SELECT"), "0", "a session that names no tenant sees nothing");
    assert_eq!(counted("SET aeterna.tenant = 'another'"), "0");
    assert_eq!(counted("SET aeterna.tenant = '*'"), "1");
    // Functions that look over it are the service's alone.
    let others = "SELECT count(*) FROM pg_proc WHERE prosecdef AND has_function_privilege('stranger', oid, 'EXECUTE')";
    server.sql("aeterna", "CREATE ROLE stranger");
    assert_eq!(server.sql("aeterna", others), "0");
    // What else the owner has there is left as it is.
    let own = "SET ROLE owner; CREATE FUNCTION own() RETURNS int LANGUAGE sql AS 'SELECT 1'; \
               CREATE PROCEDURE work() LANGUAGE sql AS 'SELECT 1'";
    server.sql("aeterna", own);
    self::store(&server).await.close().await;
    let left = "SELECT has_function_privilege('stranger', 'own()', 'EXECUTE')";
    assert_eq!(server.sql("aeterna", left), "t");
    let goes_round = PostgresStore::open(&owner, None).await.unwrap_err();
    assert!(Error::from(goes_round).to_string().contains("row-level security"));
    server.sql(
        "aeterna",
        "INSERT INTO _sqlx_migrations SELECT 99, 'x', now(), true, '', 0",
    );
    let newer = PostgresStore::open(&service, None).await.unwrap_err();
    assert_eq!(Error::from(newer).reason(), Reason::SchemaTooNew);
    store.close().await;
}

/// Every table with rows of tenants, and everything that a session of the service's role can try from behind the wall.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_statement_reaches_another_tenants_rows() {
    let server = PostgresServer::start(&["fsync=off"]);
    let store = store(&server).await;
    conformance::relational(Arc::new(store.clone())).await;
    store.close().await;
    // What the suite has removed again.
    server.sql("aeterna", "INSERT INTO policies VALUES ('one', 'a', '{}')");
    let tables =
        "SELECT table_name FROM information_schema.columns WHERE table_schema = 'public' AND column_name = 'tenant'";
    let tables = server.sql("aeterna", tables);
    let tables: Vec<&str> = tables.lines().collect();
    assert!(tables.len() >= 12, "{tables:?}");
    for table in tables {
        let digest = format!("SELECT count(*), md5(string_agg(t::text, ',' ORDER BY t::text)) FROM {table} t");
        let before = server.sql("aeterna", &digest);
        assert!(!before.starts_with("0|"), "{table} has something to protect");
        let row = server.sql("aeterna", &format!("SELECT to_json(t) FROM {table} t LIMIT 1"));
        for setting in ["SELECT", "SET aeterna.tenant = ''", "SET aeterna.tenant = 'nobody'"] {
            let count = |statement: &str| {
                let query =
                    format!("SET ROLE service; {setting}; WITH done AS ({statement}) SELECT count(*) FROM done");
                server.sql("aeterna", &query)
            };
            for statement in [
                format!("SELECT 1 FROM {table}"),
                format!("UPDATE {table} SET tenant = 'nobody' RETURNING 1"),
                format!("DELETE FROM {table} RETURNING 1"),
            ] {
                assert_eq!(count(&statement), "0", "{setting}: {statement}");
            }
            let insert = format!(
                "SET ROLE service; {setting}; DO $do$ BEGIN \
                 INSERT INTO {table} OVERRIDING SYSTEM VALUE SELECT * FROM json_populate_record(NULL::{table}, $row${row}$row$); \
                 RAISE 'it was inserted'; EXCEPTION WHEN insufficient_privilege THEN NULL; END $do$"
            );
            server.sql("aeterna", &insert);
        }
        assert_eq!(server.sql("aeterna", &digest), before, "{table}");
    }
    // What looks over the wall keeps to the tenant by itself, or tells numbers only.
    let all = "(SELECT array_agg(DISTINCT term) FROM all_terms)";
    server.sql(
        "aeterna",
        "CREATE TABLE all_terms AS SELECT unnest(terms) AS term FROM texts; GRANT SELECT ON all_terms TO service",
    );
    let owner = server.sql("aeterna", "SELECT tenant FROM texts LIMIT 1");
    for call in [
        format!("SELECT 1 FROM documents_with({all}) d WHERE d.documents > 0"),
        format!("SELECT 1 FROM ranked({all}, (SELECT array_agg(1) FROM all_terms)::float8[], 1, NULL, 1000)"),
        format!(
            "SELECT 1 FROM ranked_of({all}, (SELECT array_agg(1) FROM all_terms)::float8[], 1, NULL, \
             (SELECT array_agg(n) FROM generate_series(1, 10000) n))"
        ),
    ] {
        let count = |tenant: &str| {
            let query = format!(
                "SET ROLE service; SET aeterna.tenant = '{tenant}'; WITH done AS ({call}) SELECT count(*) FROM done"
            );
            server.sql("aeterna", &query)
        };
        assert_eq!(count("nobody"), "0", "{call}");
        assert_ne!(count(&owner), "0", "{call}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_migration_waits_for_a_table_without_keeping_others_from_it() {
    const FIRST: &[(&str, &str)] = &[("a table", "CREATE TABLE things (name text)")];
    const SECOND: &[(&str, &str)] = &[FIRST[0], ("a column", "ALTER TABLE things ADD COLUMN size bigint")];
    let server = Arc::new(PostgresServer::start(&["fsync=off"]));
    let (_, owner) = options(&server);
    postgres::migrate(&owner, FIRST, "SELECT").await.unwrap();
    let run = async |statements: &'static str| {
        let server = Arc::clone(&server);
        let ran = tokio::task::spawn_blocking(move || (server.sql("aeterna", statements), Instant::now()));
        ran.await.unwrap()
    };
    let long = "BEGIN; SELECT count(*) FROM things; SELECT pg_sleep(5); COMMIT";
    let migrating = async {
        // Once somebody reads for a long time.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let began = Instant::now();
        (began, postgres::migrate(&owner, SECOND, "SELECT").await)
    };
    let writing = async {
        let mut done = Vec::new();
        while done.len() < 100 {
            done.push(run("INSERT INTO things (name) VALUES ('a')").await.1);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        done
    };
    let ((_, read), (began, migrated), written) = tokio::join!(run(long), migrating, writing);
    migrated.unwrap();
    // It has waited for the reader by then, and not all the time.
    let between = began + Duration::from_secs(1)..read;
    assert!(
        written.iter().any(|done| between.contains(done)),
        "{between:?}: {written:?}"
    );
    let columns = "SELECT count(*), count(size) FROM things";
    assert_eq!(server.sql("aeterna", columns), "100|0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_whose_wait_for_the_standby_was_cancelled_is_not_called_done() {
    // No standby of this name ever comes, so that every commit waits.
    let server = PostgresServer::start(&["fsync=off"]);
    let store = store(&server).await;
    server.sql("postgres", "ALTER SYSTEM SET synchronous_standby_names = 'nobody'");
    server.sql("postgres", "SELECT pg_reload_conf()");
    let cancel = "SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
    let cancelled = async {
        while server.sql("postgres", cancel) == "0" {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let (written, ()) = tokio::join!(store.put_note("name", "value"), async {
        // It is safe to repeat, and repeated until the patience ends.
        cancelled.await;
        cancelled_again(&server, cancel).await;
    });
    let told = match written {
        Err(MemoryError::Store(StorageError::Unknown(why))) => why.to_string(),
        other => panic!("{other:?}"),
    };
    assert!(told.contains("warned"), "{told}");

    // A memory that can be read already is neither told to watchers nor answered to whoever repeats the request.
    let (written, ()) = tokio::join!(say(&store, "in doubt"), cancelled_again(&server, cancel));
    assert!(
        matches!(written, Err(MemoryError::Store(StorageError::Unknown(_)))),
        "{written:?}"
    );
    assert_eq!(said(&store).await, ["in doubt"]);
    let (watched, repeated) = tokio::join!(store.changes(None, Sequence::default(), 10), say(&store, "in doubt"));
    for outcome in [watched.map(|_| ()), repeated.map(|_| ())] {
        assert!(
            matches!(outcome, Err(MemoryError::Store(StorageError::Unknown(_)))),
            "{outcome:?}"
        );
    }
    server.sql("postgres", "ALTER SYSTEM RESET synchronous_standby_names");
    server.sql("postgres", "SELECT pg_reload_conf()");
    store.put_note("name", "value").await.unwrap();
    say(&store, "in doubt").await.unwrap();
    assert_eq!(store.changes(None, Sequence::default(), 10).await.unwrap().len(), 1);
    store.close().await;
}

async fn cancelled_again(server: &PostgresServer, cancel: &str) {
    let until = Instant::now() + Duration::from_secs(8);
    while Instant::now() < until {
        server.sql("postgres", cancel);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// A client's write, which is safe to repeat; its place.
async fn say(store: &PostgresStore, text: &str) -> Result<Sequence, MemoryError> {
    let writer = ledger::system("many", Timestamp::default())?;
    let written = store.add(&writer, vec![addition(text)]).await?.pop().unwrap()?;
    Ok(written.sequence)
}

fn addition(text: &str) -> Addition {
    Addition {
        scope: Scope::default().with(Layer::User, "ann").unwrap(),
        body: conformance::body(text),
        vector: None,
        most: None,
        idempotency: Some(Idempotency {
            request_id: text.replace(' ', "-").parse().unwrap(),
            digest: [0; 32],
        }),
    }
}

/// All that was said.
async fn said(store: &PostgresStore) -> Vec<String> {
    let tenant: TenantId = "many".parse().unwrap();
    let view = View {
        scope: Scope::default(),
        exact: false,
    };
    let listing = Listing {
        scopes: store.visible(&tenant, &view, &[]).await.unwrap(),
        tenant,
        before: None,
        limit: 1_000_000,
        filter: None,
        show_deleted: false,
        now: Timestamp::default(),
        as_of: None,
    };
    let listed = store.list(&listing).await.unwrap();
    listed.into_iter().map(|stored| stored.memory.body.content).collect()
}

/// Writers who record what was acknowledged, a primary that is killed, a standby that is promoted: nothing is lost and nothing
/// is there twice; reads go on meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_primary_takes_no_acknowledged_write_with_it() {
    let mut primary = PostgresServer::start(&["fsync=off"]);
    store(&primary).await.close().await;
    let mut standby = primary.standby(&["fsync=off"]);
    primary.sql("postgres", "ALTER SYSTEM SET synchronous_standby_names = '*'");
    primary.sql("postgres", "SELECT pg_reload_conf()");
    let store = PostgresStore::open(&both(&primary, &standby), None).await.unwrap();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let writers: Vec<_> = (0..4)
        .map(|writer| {
            let (store, stop) = (store.clone(), Arc::clone(&stop));
            tokio::spawn(async move {
                let mut acknowledged = Vec::new();
                for number in 0.. {
                    if stop.load(Ordering::SeqCst) {
                        break;
                    }
                    let text = format!("writer {writer} number {number}");
                    // As a client does: the same request until it is answered.
                    while say(&store, &text).await.is_err() {
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                    acknowledged.push(text);
                }
                acknowledged
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(store.condition(), Condition::Well);
    primary.kill();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(store.condition(), Condition::Weak("no primary: writes wait".into()));
    let before = said(&store).await;
    assert!(!before.is_empty(), "the standby serves reads while there is no primary");
    standby.sql("postgres", "ALTER SYSTEM RESET synchronous_standby_names");
    standby.sql("postgres", "SELECT pg_promote()");
    tokio::time::sleep(Duration::from_secs(3)).await;
    stop.store(true, Ordering::SeqCst);
    let mut acknowledged = Vec::new();
    for writer in writers {
        acknowledged.extend(writer.await.unwrap());
    }
    let mut there = said(&store).await;
    there.sort();
    acknowledged.sort();
    assert!(acknowledged.len() > before.len(), "writes went on after the failover");
    assert_eq!(there, acknowledged);
    assert_eq!(store.condition(), Condition::Weak("1 of 2 nodes answer".into()));
    standby.kill();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(store.condition(), Condition::Away("no node answers".into()));
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn places_go_on_ascending_in_a_younger_cluster() {
    let server = PostgresServer::start(&["fsync=off"]);
    let before = store(&server).await;
    say(&before, "one").await.unwrap();
    before.close().await;
    // As after a dump of a cluster that has seen many more transactions.
    server.sql("aeterna", "UPDATE outbox SET sequence = sequence + (1::bigint << 50)");
    let after = store(&server).await;
    say(&after, "two").await.unwrap();
    let events = after.events(Sequence::default(), 10).await.unwrap();
    assert_eq!(events.len(), 2, "{events:?}");
    assert!(
        events[0].key < events[1].key,
        "in the order in which they were written: {events:?}"
    );
    after.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_starts_hides_nothing_that_is_being_written() {
    let server = PostgresServer::start(&["fsync=off"]);
    let first = store(&server).await;
    let (mut session, mut places) = first.begin("many").await.unwrap();
    for number in 0..5 {
        say(&first, &format!("fast {number}")).await.unwrap();
    }
    let second = store(&server).await;
    say(&second, "after the start").await.unwrap();
    assert!(second.events(Sequence::default(), 10).await.unwrap().is_empty());
    let writer = ledger::system("many", Timestamp::default()).unwrap();
    let mut ledger = PostgresLedger::new(&mut session, &writer, &mut places);
    ledger::add(&mut ledger, vec![addition("slow")]).await.unwrap();
    first.database.commit(session, places.last()).await.unwrap();
    assert_eq!(second.events(Sequence::default(), 10).await.unwrap().len(), 7);
    first.close().await;
    second.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_waits_for_is_read_no_further() {
    let server = PostgresServer::start(&["fsync=off"]);
    let store = store(&server).await;
    for primary in [false, true] {
        let mut session = match primary {
            true => store.database.read_primary(&[]).await.unwrap(),
            false => store.database.read(&[]).await.unwrap(),
        };
        let sleeping = async {
            sqlx::query("SELECT pg_sleep(600)")
                .execute(&mut *session)
                .await
                .unwrap();
        };
        let left = tokio::time::timeout(Duration::from_millis(100), sleeping).await;
        assert!(left.is_err());
        drop(session);
        let ended = async {
            let count = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%pg_sleep(600)%' \
                         AND pid <> pg_backend_pid()";
            while server.sql("aeterna", count).trim() != "0" {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), ended).await.unwrap();
    }
    store.close().await;
}
