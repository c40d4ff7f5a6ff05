//! Faults of the place where memories are kept, and requests that are too much.

use std::path::Path;
use std::time::{Duration, Instant};

use aeterna_proto::memory::v1::memory_service_client::MemoryServiceClient;
use aeterna_proto::memory::v1::{
    AddRequest, BatchAddRequest, GetRequest, HistoryRequest, ListRequest, Memory, SearchRequest, UpdateRequest,
    WatchRequest,
};
use aeterna_rpc::AnyChannel;
use aeterna_storage::rusqlite::Connection;
use aeterna_testkit::{Program, built, readyz, refusal};
use tonic::Code;

use crate::notes::user;
use crate::sandbox::Sandbox;

type Client = MemoryServiceClient<AnyChannel>;

fn item(content: String) -> AddRequest {
    crate::notes::item("ann", &content)
}

async fn search(client: &mut Client, query: &str) -> usize {
    let query = SearchRequest {
        scope: user("ann"),
        query: query.into(),
        ..Default::default()
    };
    client.search(query).await.unwrap().into_inner().results.len()
}

/// Arguments that run a shell script in a mount namespace of its own; what follows them are the script's arguments.
fn apart(script: String) -> Vec<String> {
    // Root may mount as it is; others are given a namespace in which they may.
    let root = std::fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0);
    let way = if root { "-m" } else { "-rm" };
    [way, "sh", "-c", &script, "sh"].map(str::to_owned).to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_writes_keeps_what_is_there_and_ends_by_itself() {
    let data = tempfile::tempdir().unwrap();
    let (full, more) = (data.path().join("full"), data.path().join("more"));
    std::fs::create_dir(&full).unwrap();
    let (shown, flag, binary) = (full.display(), more.display(), built("aeterna"));
    let script = format!(
        "mount -t tmpfs -o size=12m none {shown} && \
         (while [ ! -e {flag} ]; do [ -d {0} ] || exit; sleep 0.1; done; mount -o remount,size=200m {shown}) & \
         sleep 0.3; exec {1} serve --embedding.model_dirs '' --log.filter error \
         --memory.store sqlite:full/memory.db --memory.index flat:full/vectors \"$@\"",
        data.path().display(),
        binary.display()
    );
    let arguments = apart(script);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let program = Program::start(Path::new("unshare"), &arguments, data.path()).await;
    let mut client = MemoryServiceClient::new(program.channel());
    let mut acknowledged = Vec::new();
    let status = loop {
        let number = acknowledged.len();
        let content = format!("{number} {}", "harbour ".repeat(1500));
        match client.add(item(content)).await {
            Ok(added) => acknowledged.push(added.into_inner().memory.unwrap().id),
            Err(status) => break status,
        }
        assert!(number < 5000, "the disk is never full");
    };
    assert_eq!(
        (status.code(), refusal(&status).0.as_str()),
        (Code::ResourceExhausted, "STORAGE_FULL"),
        "{status:?}"
    );
    // Reads go on.
    assert_eq!(search(&mut client, "harbour").await, 10);
    std::fs::write(&more, "").unwrap();
    let began = Instant::now();
    while let Err(status) = client.add(item("room again".into())).await {
        assert!(
            began.elapsed() < Duration::from_secs(20),
            "{status:?}\n{}",
            program.log()
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    for id in &acknowledged {
        let get = GetRequest {
            id: id.clone(),
            ..Default::default()
        };
        assert!(client.get(get).await.is_ok(), "{id} was acknowledged and is lost");
    }
    assert!(search(&mut client, "room again").await > 0);
    assert_eq!(program.stop().await, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_its_live_server_a_service_does_everything_and_says_so() {
    let data = tempfile::tempdir().unwrap();
    // Nobody listens on the discard port.
    let flags = [
        "serve",
        "--embedding.model_dirs",
        "",
        "--memory.live",
        "redis://127.0.0.1:9",
    ];
    let program = Program::start(&built("aeterna"), &flags, data.path()).await;
    let mut client = MemoryServiceClient::new(program.channel());
    let request = WatchRequest {
        scope: user("ann"),
        ..Default::default()
    };
    let mut watching = client.watch(request).await.unwrap().into_inner();
    let added = client.add(item("the boat sails".into())).await.unwrap().into_inner();
    let query = SearchRequest {
        scope: user("ann"),
        query: "boat".into(),
        consistency_token: added.consistency_token,
        ..Default::default()
    };
    let found = client.search(query).await.unwrap().into_inner();
    assert!(found.results.len() == 1 && !found.degraded, "{found:?}");
    let told = tokio::time::timeout(Duration::from_secs(10), watching.message()).await;
    assert_eq!(
        told.unwrap().unwrap().unwrap().memory.unwrap().content,
        "the boat sails"
    );
    let ready = async {
        loop {
            let ready = readyz(program.address).await.unwrap();
            if ready.contains("\"live\":\"degraded") {
                return ready;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let ready = tokio::time::timeout(Duration::from_secs(30), ready).await.unwrap();
    assert!(
        ready.starts_with("HTTP/1.1 200") && ready.contains("other copies hear of a change"),
        "{ready}"
    );
    drop(watching);
    assert_eq!(program.stop().await, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_can_not_be_written_is_refused_by_name() {
    let data = tempfile::tempdir().unwrap();
    let shown = data.path().display();
    let script = format!(
        "mount -t tmpfs -o ro none {shown} && exec {} serve --embedding.model_dirs '' --listen 127.0.0.1:0 --data-dir {shown}",
        built("aeterna").display()
    );
    let ended = tokio::process::Command::new("unshare")
        .args(apart(script))
        .kill_on_drop(true)
        .output();
    let ended = tokio::time::timeout(Duration::from_secs(30), ended)
        .await
        .expect("it ends by itself")
        .unwrap();
    let said = String::from_utf8_lossy(&ended.stderr).into_owned() + &String::from_utf8_lossy(&ended.stdout);
    assert!(!ended.status.success(), "{said}");
    assert!(
        said.contains(&shown.to_string()) && said.contains("Read-only"),
        "{said}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_that_somebody_else_holds_is_waited_for_and_then_told() {
    let data = tempfile::tempdir().unwrap();
    let sandbox = Sandbox::start_in(data.path(), &[("memory.busy_timeout", "1500ms")]).await;
    let [(_, channel), _] = sandbox.ways();
    let mut client = MemoryServiceClient::new(channel);
    client.add(item("before the lock".into())).await.unwrap();
    let path = data.path().join("memory.db");
    let lock = |path: &Path| {
        let connection = Connection::open(path).unwrap();
        connection.execute_batch("BEGIN IMMEDIATE").unwrap();
        connection
    };
    // Held for less than the time-out: the write waits, and reads don't.
    let held = lock(&path);
    let began = Instant::now();
    let mut writer = client.clone();
    let waiting = tokio::spawn(async move { writer.add(item("during the lock".into())).await });
    assert_eq!(search(&mut client, "before lock").await, 1);
    tokio::time::sleep(Duration::from_millis(600)).await;
    drop(held);
    waiting.await.unwrap().unwrap();
    assert!(began.elapsed() >= Duration::from_millis(600));
    // Held for longer: a refusal that says to try again, and nothing is kept.
    let held = lock(&path);
    let status = client.add(item("never".into())).await.unwrap_err();
    assert_eq!(
        (status.code(), refusal(&status).0.as_str()),
        (Code::Unavailable, "DEPENDENCY_UNAVAILABLE"),
        "{status:?}"
    );
    drop(held);
    client.add(item("after the lock".into())).await.unwrap();
    let list = ListRequest {
        scope: user("ann"),
        ..Default::default()
    };
    let listed = client.list(list).await.unwrap().into_inner().memories;
    assert_eq!(listed.len(), 3, "{listed:?}");
    sandbox.stop().await;
}

#[tokio::test]
async fn what_is_too_much_is_refused_with_the_limit() {
    let sandbox = Sandbox::start(&[]).await;
    for (way, channel) in sandbox.ways() {
        let mut client = MemoryServiceClient::new(channel);
        let status = client.add(item("x".repeat(5 << 20))).await.unwrap_err();
        assert_eq!(refusal(&status).1, ["memory.content"], "{way}: {status:?}");
        assert!(status.message().contains("65,536"), "{way}: {status:?}");
        let many = SearchRequest {
            scope: user("ann"),
            query: "x".into(),
            top_k: 100_000,
            ..Default::default()
        };
        let status = client.search(many).await.unwrap_err();
        assert!(
            refusal(&status).1 == ["top_k"] && status.message().contains("1000"),
            "{way}: {status:?}"
        );
        let terms = vec!["id:a"; 1000];
        let long = ListRequest {
            scope: user("ann"),
            filter: terms.join(" OR "),
            ..Default::default()
        };
        let status = client.list(long).await.unwrap_err();
        assert!(
            refusal(&status).1 == ["filter"] && status.message().contains("200"),
            "{way}: {status:?}"
        );
        let batch = BatchAddRequest {
            requests: (0..1001).map(|n| item(format!("note {n}"))).collect(),
            ..Default::default()
        };
        let status = client.batch_add(batch).await.unwrap_err();
        assert!(
            refusal(&status).1 == ["requests"] && status.message().contains("1000"),
            "{way}: {status:?}"
        );
    }
    sandbox.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_fifty_clients_one_wins_each_version_and_no_update_is_lost() {
    let sandbox = Sandbox::start(&[]).await;
    for (way, channel) in sandbox.ways() {
        one_wins_each_version(way, MemoryServiceClient::new(channel)).await;
    }
    sandbox.stop().await;
}

async fn one_wins_each_version(way: &str, mut client: Client) {
    const CLIENTS: usize = 50;
    let shared = client
        .add(item(format!("shared, {way}")))
        .await
        .unwrap()
        .into_inner()
        .memory
        .unwrap();
    let tagged = |id: &str, etag: &str, number: usize| UpdateRequest {
        memory: Some(Memory {
            id: id.into(),
            etag: etag.into(),
            importance: Some(number as f64 / 100.0),
            ..Default::default()
        }),
        update_mask: Some(prost_types::FieldMask {
            paths: vec!["importance".into()],
        }),
        request_id: String::new(),
    };
    // All with the same etag: one is told that it has won, and it has.
    let calls: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let (mut client, request) = (client.clone(), tagged(&shared.id, &shared.etag, number));
            tokio::spawn(async move { client.update(request).await })
        })
        .collect();
    let mut won = Vec::new();
    for call in calls {
        match call.await.unwrap() {
            Ok(answer) => won.push(answer.into_inner().memory.unwrap()),
            Err(status) => assert_eq!(refusal(&status).0, "ETAG_MISMATCH"),
        }
    }
    let get = GetRequest {
        id: shared.id.clone(),
        ..Default::default()
    };
    let now = client.get(get.clone()).await.unwrap().into_inner().memory.unwrap();
    assert_eq!(won, [now]);
    // Without one, each is applied to what it finds: as many versions as updates.
    let calls: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let (mut client, request) = (client.clone(), tagged(&shared.id, "", number));
            tokio::spawn(async move { client.update(request).await })
        })
        .collect();
    let mut versions = Vec::new();
    for call in calls {
        versions.push(call.await.unwrap().unwrap().into_inner().memory.unwrap().version);
    }
    versions.sort_unstable();
    assert_eq!(versions, (3..3 + CLIENTS as i64).collect::<Vec<_>>());
    // With one read again after each refusal, every client gets its turn.
    let calls: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let (mut client, get, id) = (client.clone(), get.clone(), shared.id.clone());
            tokio::spawn(async move {
                loop {
                    let etag = client.get(get.clone()).await.unwrap().into_inner().memory.unwrap().etag;
                    match client.update(tagged(&id, &etag, number)).await {
                        Ok(_) => return,
                        Err(status) => assert_eq!(refusal(&status).0, "ETAG_MISMATCH"),
                    }
                }
            })
        })
        .collect();
    for call in calls {
        call.await.unwrap();
    }
    let last = client.get(get).await.unwrap().into_inner().memory.unwrap();
    assert_eq!(last.version, 2 + 2 * CLIENTS as i64);
    // What each has written is there: once by the one who won, and twice by everybody.
    let history = HistoryRequest {
        id: shared.id.clone(),
        page_size: 1000,
        ..Default::default()
    };
    let versions = client.history(history).await.unwrap().into_inner().versions;
    let mut written = vec![0; CLIENTS];
    for version in versions.iter().take(2 * CLIENTS) {
        let importance = version.memory.as_ref().unwrap().importance.unwrap();
        written[(importance * 100.0).round() as usize] += 1;
    }
    assert_eq!(written, [2; CLIENTS], "{way}");
}

#[tokio::test]
async fn without_its_index_a_search_goes_by_words_and_says_why() {
    let data = tempfile::tempdir().unwrap();
    let request = SearchRequest {
        scope: user("ann"),
        query: "who keeps the lighthouse?".into(),
        ..Default::default()
    };
    // Nobody listens on the discard port.
    let away = [("memory.index", "qdrant://127.0.0.1:9/none")];
    let sandbox = Sandbox::start_in(data.path(), &away).await;
    for (way, channel) in sandbox.ways() {
        let mut client = Client::new(channel);
        let added = client.add(item("the lighthouse is kept by Eve".into())).await.unwrap();
        let added = added.into_inner().memory.unwrap();
        let found = client.search(request.clone()).await.unwrap().into_inner();
        assert!(found.degraded && found.model.is_empty(), "{way}: {found:?}");
        let why = &found.degraded_reasons;
        assert!(why.iter().any(|why| why.contains("vector index")), "{way}: {why:?}");
        assert_eq!(found.results[0].memory.as_ref().unwrap().id, added.id, "{way}");
    }
    sandbox.stop().await;
    let sandbox = Sandbox::start_in(data.path(), &[]).await;
    let [(_, channel), _] = sandbox.ways();
    let found = Client::new(channel).search(request).await.unwrap().into_inner();
    assert!(!found.degraded && found.model == "hash", "{found:?}");
    assert_eq!(found.results.len(), 1, "{found:?}");
    sandbox.stop().await;
}
