//! What several nodes show, and in which order.

use super::*;
use crate::store::postgres::write::Changed;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_another_copy_acknowledged_is_waited_for_and_what_nobody_did_holds_up_nobody() {
    let primary = PostgresServer::start(&["fsync=off"]);
    let writer = store(&primary).await;
    let standby = primary.standby(&["fsync=off", "recovery_min_apply_delay=300ms"]);
    let mut options = both(&primary, &standby);
    options.spread = true;
    let reader = PostgresStore::open(&options, None).await.unwrap();
    for number in 0..20 {
        let token = say(&writer, &format!("number {number}")).await.unwrap();
        reader.reach(token).await.unwrap();
        assert_eq!(said(&reader).await.len(), number + 1);
    }
    // Tokens of another store, or made up: their callers are answered, and so is everybody else meanwhile.
    let made_up = async {
        for number in 0..8 {
            reader.reach(Sequence(i64::MAX - number)).await.unwrap();
        }
    };
    let read = async {
        for _ in 0..200 {
            assert_eq!(said(&reader).await.len(), 20);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::join!(made_up, read);
    writer.close().await;
    reader.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reads_that_are_spread_see_what_was_acknowledged() {
    let primary = PostgresServer::start(&["fsync=off"]);
    store(&primary).await.close().await;
    // It lags: a read there has to be found out and made elsewhere.
    let standby = primary.standby(&["fsync=off", "recovery_min_apply_delay=300ms"]);
    let mut options = both(&primary, &standby);
    options.spread = true;
    let store = PostgresStore::open(&options, None).await.unwrap();
    for number in 0..20 {
        say(&store, &format!("number {number}")).await.unwrap();
        assert_eq!(said(&store).await.len(), number + 1);
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    for _ in 0..4 {
        assert_eq!(said(&store).await.len(), 20);
    }
    // One connection looks at the node, the other one has read.
    let reads = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'service' AND query = 'ROLLBACK'";
    assert_ne!(standby.sql("postgres", reads), "0");
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_primary_showed_at_its_end_is_not_waited_for_and_nothing_new_hides_before_it() {
    let mut primary = PostgresServer::start(&["fsync=off"]);
    store(&primary).await.close().await;
    let standby = primary.standby(&["fsync=off"]);
    let store = PostgresStore::open(&both(&primary, &standby), None).await.unwrap();
    say(&store, "kept").await.unwrap();
    while standby.sql("aeterna", "SELECT count(*) FROM memories") == "0" {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    standby.leave(&primary).await;
    // Whoever follows the outbox has read it, and it goes with its node.
    for number in 0..3 {
        say(&store, &format!("gone {number}")).await.unwrap();
    }
    let read = store
        .events(Sequence::default(), 10)
        .await
        .unwrap()
        .pop()
        .unwrap()
        .sequence;
    primary.kill();
    standby.sql("postgres", "SELECT pg_promote()");
    let again = async {
        while say(&store, "new").await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), again).await.unwrap();
    assert_eq!(said(&store).await, ["new", "kept"]);
    let events = store.events(read, 10).await.unwrap();
    assert_eq!(
        events.len(),
        1,
        "who has read the lost one is told of the new one: {events:?}"
    );
    store.close().await;
}

/// A standby that nobody waits for may be ahead of the one that takes over. What it shows is lost with the old primary: it is no
/// answer to whoever repeats a request, no progress of an import, and nothing that watchers are told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_only_a_standby_has_that_does_not_take_over_was_never_done() {
    let mut primary = PostgresServer::start(&["fsync=off"]);
    let first = store(&primary).await;
    let [ahead, behind] = [0; 2].map(|_| primary.standby(&["fsync=off"]));
    say(&first, "before").await.unwrap();
    let has = async |server: &PostgresServer, count: &str| {
        while server.sql("aeterna", "SELECT count(*) FROM memories") != count {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    has(&behind, "1").await;
    behind.leave(&primary).await;
    let writer = ledger::system("many", Timestamp::default()).unwrap();
    say(&first, "in doubt").await.unwrap();
    let import: RequestId = "an-import".parse().unwrap();
    let insert = "SET aeterna.tenant = 'many'; INSERT INTO imports SELECT tenant, subject, 'an-import', 7, sha256('x'), 0, '[]' FROM requests LIMIT 1";
    primary.sql("aeterna", insert);
    has(&ahead, "2").await;
    while ahead.sql("aeterna", "SELECT count(*) FROM imports") == "0" {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    first.close().await;
    primary.kill();
    behind.sql("postgres", "SELECT pg_promote()");
    let hosts = [&primary, &ahead, &behind].map(|server| format!("127.0.0.1:{}", server.port));
    let hosts = format!("//service@{}/aeterna", hosts.join(","));
    let mut options = PostgresOptions::parse(&hosts, None).unwrap();
    options.spread = true;
    let store = PostgresStore::open(&options, None).await.unwrap();
    let idempotency = addition("in doubt").idempotency.unwrap();
    // Each node is asked in its turn.
    for _ in 0..6 {
        let answered = store.replay(&writer, &idempotency).await.unwrap();
        assert!(answered.is_none(), "{answered:?}");
        assert!(store.import_progress(&writer, &import).await.unwrap().is_none());
        let told = store.changes(None, Sequence::default(), 10).await.unwrap();
        assert_eq!(told.len(), 1, "{told:?}");
    }
    say(&store, "in doubt").await.unwrap();
    assert_eq!(behind.sql("aeterna", "SELECT count(*) FROM memories"), "2");
    let answered = store.replay(&writer, &idempotency).await.unwrap();
    assert!(answered.is_some());
    assert_eq!(store.changes(None, Sequence::default(), 10).await.unwrap().len(), 2);
    store.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_that_has_not_got_the_schema_yet_is_not_read() {
    let primary = PostgresServer::start(&["fsync=off"]);
    let standby = primary.standby(&["fsync=off", "recovery_min_apply_delay=5s"]);
    let mut options = both(&primary, &standby);
    options.spread = true;
    let owner = options.as_user("owner", None);
    let store = PostgresStore::open(&options, Some(&owner)).await.unwrap();
    for _ in 0..6 {
        assert!(store.note("anything").await.unwrap().is_none());
    }
    store.close().await;
}

/// Commits reach a standby in their order, and not in that of their places: one that has the last of some changes may lack others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_follows_the_outbox_reads_no_node_that_lacks_what_he_was_told() {
    let primary = Arc::new(PostgresServer::start(&["fsync=off"]));
    // What this one acknowledges, the other one does not know of.
    let writing = store(&primary).await;
    let standby = primary.standby(&["fsync=off"]);
    let mut options = both(&primary, &standby);
    options.spread = true;
    let store = PostgresStore::open(&options, None).await.unwrap();
    say(&writing, "first").await.unwrap();
    // The first change of a tenant waits for somebody else who makes it known, with its place taken.
    let held = {
        let primary = Arc::clone(&primary);
        let insert = "BEGIN; INSERT INTO tenants (tenant) VALUES ('slow'); SELECT pg_sleep(3); ROLLBACK";
        tokio::task::spawn_blocking(move || primary.sql("aeterna", insert))
    };
    let waits = async |what: &str| {
        let query = format!("SELECT count(*) FROM pg_stat_activity WHERE wait_event = '{what}'");
        while primary.sql("postgres", &query) == "0" {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    waits("PgSleep").await;
    let slow = {
        let store = writing.clone();
        tokio::spawn(async move {
            let writer = ledger::system("slow", Timestamp::default()).unwrap();
            store
                .add(&writer, vec![addition("slow")])
                .await
                .unwrap()
                .pop()
                .unwrap()
                .unwrap()
        })
    };
    waits("transactionid").await;
    let second = say(&writing, "second").await.unwrap();
    while standby.sql("aeterna", "SELECT count(*) FROM memories") != "2" {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    standby.sql("postgres", "SELECT pg_wal_replay_pause()");
    held.await.unwrap();
    let slow = slow.await.unwrap().sequence;
    assert!(slow < second, "{slow:?} {second:?}");
    // Nodes are asked in turn.
    for _ in 0..6 {
        let events = store.events(Sequence::default(), 10).await.unwrap();
        let keys: Vec<Key> = events.iter().map(|event| event.key).collect();
        assert_eq!(store.states("m@1", &keys).await.unwrap().len(), keys.len());
        if events.last().is_some_and(|last| last.sequence == second) {
            assert_eq!(store.scan("m@1", Key(0), 10, false).await.unwrap().len(), 3);
        }
    }
    store.close().await;
    writing.close().await;
}

/// A commit that waits for one standby is on another one already, and not on the primary. It may be lost with it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_standby_shows_before_the_primary_is_not_followed_yet() {
    let primary = PostgresServer::start(&["fsync=off"]);
    let writing = store(&primary).await;
    let standby = primary.standby(&["fsync=off"]);
    let mut options = both(&primary, &standby);
    options.spread = true;
    let store = PostgresStore::open(&options, None).await.unwrap();
    let first = say(&writing, "first").await.unwrap();
    // Commits wait for one that never comes.
    primary.sql("postgres", "ALTER SYSTEM SET synchronous_standby_names = 'nobody'");
    primary.sql("postgres", "SELECT pg_reload_conf()");
    let waits = tokio::spawn({
        let writing = writing.clone();
        async move { say(&writing, "second").await }
    });
    while standby.sql("aeterna", "SELECT count(*) FROM memories") != "2" {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Nodes would be asked in turn.
    for _ in 0..6 {
        store.note("anything").await.unwrap();
        assert!(store.events(first, 10).await.unwrap().is_empty());
        assert_eq!(store.last_sequence().await.unwrap(), first);
        assert_eq!(store.scan("m@1", Key(0), 10, false).await.unwrap().len(), 1);
    }
    primary.sql("postgres", "ALTER SYSTEM RESET synchronous_standby_names");
    primary.sql("postgres", "SELECT pg_reload_conf()");
    let second = waits.await.unwrap().unwrap();
    let events = store.events(first, 10).await.unwrap();
    assert_eq!(events.last().map(|event| event.sequence), Some(second));
    let keys: Vec<Key> = events.iter().map(|event| event.key).collect();
    assert_eq!(store.states("m@1", &keys).await.unwrap().len(), keys.len());
    store.close().await;
    writing.close().await;
}

/// A transaction has its places from its beginning, and a row may have been changed since by one that has later places: what it
/// does after that would be told before it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_of_a_memory_have_ascending_places() {
    let server = PostgresServer::start(&["fsync=off"]);
    let store = store(&server).await;
    let writer = ledger::system("many", Timestamp::default()).unwrap();
    let added = store.add(&writer, vec![addition("a note")]).await.unwrap();
    let id = added[0].as_ref().unwrap().memory.id;
    let purge = |change| ChangeItem {
        id,
        etag: None,
        made_of: None,
        change,
        idempotency: None,
    };
    let body = |text: &str| crate::store::Change::Replace {
        body: Box::new(conformance::body(text)),
        vector: None,
        reindex: false,
    };
    let (mut session, mut places) = store.begin("many").await.unwrap();
    let quicker = store
        .change(&writer, vec![purge(body("changed by the later one"))])
        .await
        .unwrap();
    let quicker = quicker[0].as_ref().unwrap().sequence;
    let mut slow = PostgresLedger::new(&mut session, &writer, &mut places);
    for refused in [
        ledger::change(&mut slow, vec![purge(crate::store::Change::Delete)]).await,
        ledger::add(&mut slow, vec![addition("changed by the later one")]).await,
    ] {
        assert!(
            matches!(refused, Err(MemoryError::Store(StorageError::Collision(_)))),
            "{refused:?}"
        );
    }
    drop(session);
    let deleted = store
        .change(&writer, vec![purge(crate::store::Change::Delete)])
        .await
        .unwrap();
    assert!(deleted[0].as_ref().unwrap().sequence > quicker);
    let told = store.changes(None, Sequence::default(), 10).await.unwrap();
    let versions = told.iter().map(|change| match &change.subject {
        domain::Subject::Memory(_, Some(memory)) => memory.version,
        other => panic!("{other:?}"),
    });
    assert_eq!(versions.collect::<Vec<_>>(), [1, 2, 3]);
    // What was written very long ago looks as if it had been later: numbers of transactions begin again.
    let (mut session, mut places) = store.begin("many").await.unwrap();
    let mut ledger = PostgresLedger::new(&mut session, &writer, &mut places);
    let asked = ledger.in_turn(Changed::Memory(id)).await;
    assert!(asked.is_ok(), "{asked:?}");
    drop(session);
    // Many at once on one memory: each gets through, and none is told out of turn.
    let hot = store.add(&writer, vec![addition("hot")]).await.unwrap();
    let hot = hot[0].as_ref().unwrap().memory.id;
    let writers = (0..20).map(|number| {
        let (store, writer) = (store.clone(), writer.clone());
        tokio::spawn(async move {
            let item = ChangeItem {
                id: hot,
                etag: None,
                made_of: None,
                change: crate::store::Change::Replace {
                    body: Box::new(conformance::body(&format!("hot {number}"))),
                    vector: None,
                    reindex: false,
                },
                idempotency: None,
            };
            store.change(&writer, vec![item]).await.unwrap()[0]
                .as_ref()
                .unwrap()
                .sequence
        })
    });
    for done in futures::future::join_all(writers).await {
        done.unwrap();
    }
    let told = store.changes(None, Sequence::default(), 100).await.unwrap();
    let versions = told.iter().filter_map(|change| match &change.subject {
        domain::Subject::Memory(id, Some(memory)) if *id == hot => Some(memory.version),
        _ => None,
    });
    assert_eq!(versions.collect::<Vec<_>>(), (1..=21).collect::<Vec<_>>());
    store.close().await;
}

/// What is answered without being written has a place all the same, by which it can be read on any node.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_says_it_again_can_read_it_everywhere() {
    let primary = PostgresServer::start(&["fsync=off"]);
    let first = store(&primary).await;
    let standby = primary.standby(&["fsync=off", "recovery_min_apply_delay=2s"]);
    let mut options = both(&primary, &standby);
    options.spread = true;
    let other = PostgresStore::open(&options, None).await.unwrap();
    let writer = ledger::system("many", Timestamp::default()).unwrap();
    let again = |request: &str| Addition {
        idempotency: Some(Idempotency {
            request_id: request.parse().unwrap(),
            digest: [0; 32],
        }),
        ..addition("said twice")
    };
    for (request, outcome) in [("another", Outcome::Merged), ("said-twice", Outcome::Created)] {
        let place = say(&first, "said twice").await.unwrap();
        let answered = other.add(&writer, vec![again(request)]).await.unwrap();
        let answered = answered[0].as_ref().unwrap();
        assert_eq!(answered.outcome, outcome);
        assert!(answered.sequence >= place, "{answered:?}");
        for _ in 0..4 {
            assert_eq!(said(&other).await.len(), 1);
        }
        assert_eq!(other.changes(None, Sequence::default(), 10).await.unwrap().len(), 1);
    }
    first.close().await;
    other.close().await;
}
