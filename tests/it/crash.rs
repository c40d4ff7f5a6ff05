//! Faults of the real process: killed in the middle of writing, its index damaged or gone, its directory taken.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aeterna_proto::common::v1::Scope;
use aeterna_proto::memory::v1::memory_service_client::MemoryServiceClient;
use aeterna_proto::memory::v1::{
    AddRequest, BatchAddRequest, DeleteRequest, GetRequest, ListRequest, Memory, SearchRequest, StatsRequest,
};
use aeterna_rpc::AnyChannel;
use aeterna_testkit::{Program, built};

use crate::notes::together;

/// Times that the process is killed.
const KILLS: u32 = 20;
/// Callers that add at the same time.
const WRITERS: u32 = 4;

async fn start(data: &Path) -> Program {
    Program::start(
        &built("aeterna"),
        &["serve", "--embedding.model_dirs", "", "--log.filter", "info"],
        data,
    )
    .await
}

fn scope() -> Option<Scope> {
    Some(Scope {
        project: "crash".into(),
        ..Default::default()
    })
}

fn request(content: &str) -> AddRequest {
    AddRequest {
        memory: Some(Memory {
            scope: scope(),
            content: content.into(),
            ..Default::default()
        }),
        request_id: content.replace(' ', "-"),
    }
}

async fn list(client: &mut MemoryServiceClient<AnyChannel>) -> Vec<Memory> {
    let (mut all, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = ListRequest {
            scope: scope(),
            page_size: 1000,
            page_token,
            ..Default::default()
        };
        let page = client.list(request).await.unwrap().into_inner();
        all.extend(page.memories);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return all;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_twenty_times_loses_nothing_that_was_acknowledged() {
    let data = tempfile::tempdir().unwrap();
    // What was acknowledged: content to id.
    let acknowledged: Arc<Mutex<BTreeMap<String, String>>> = Arc::default();
    for round in 0..KILLS {
        let program = start(data.path()).await;
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let (mut client, acknowledged) =
                    (MemoryServiceClient::new(program.channel()), Arc::clone(&acknowledged));
                tokio::spawn(async move {
                    // Until the process is gone; the last call of a writer may or may not have been stored.
                    for number in 0.. {
                        let content = format!("word{round}x{writer}x{number} of writer {writer}");
                        let Ok(answer) = client.add(request(&content)).await else {
                            return content;
                        };
                        let id = answer.into_inner().memory.unwrap().id;
                        acknowledged.lock().unwrap().insert(content, id);
                    }
                    unreachable!("a writer goes on until it fails")
                })
            })
            .collect();
        // A different moment of the stream each time; every fifth round is long enough that the index is flushed in it, so
        // that what comes after meets an index with something in it, and ends in the middle of that.
        let flushed = if round % 5 == 2 { 5_300 } else { 0 };
        let moment = flushed + 40 + u64::from(round * 37 % 160);
        // Meanwhile another caller changes and deletes, so that places in the index are taken again.
        let churn = {
            let mut client = MemoryServiceClient::new(program.channel());
            tokio::spawn(async move {
                for number in 0.. {
                    let content = format!("fleeting{round}x{number}");
                    let Ok(answer) = client.add(request(&content)).await else {
                        return;
                    };
                    let id = answer.into_inner().memory.unwrap().id;
                    let delete = DeleteRequest {
                        id,
                        ..Default::default()
                    };
                    if client.delete(delete).await.is_err() {
                        return;
                    }
                }
            })
        };
        tokio::time::sleep(Duration::from_millis(moment)).await;
        program.kill().await;
        churn.await.unwrap();
        let mut unknown = Vec::new();
        for writer in writers {
            unknown.push(writer.await.unwrap());
        }

        let program = start(data.path()).await;
        let mut client = MemoryServiceClient::new(program.channel());
        // A retry with the same request id settles what nobody knows.
        for content in unknown {
            let id = client
                .add(request(&content))
                .await
                .unwrap()
                .into_inner()
                .memory
                .unwrap()
                .id;
            acknowledged.lock().unwrap().insert(content, id);
        }
        program.kill().await;
    }

    let program = start(data.path()).await;
    let mut client = MemoryServiceClient::new(program.channel());
    let acknowledged = acknowledged.lock().unwrap().clone();
    let found: Vec<(String, String)> = list(&mut client)
        .await
        .into_iter()
        .map(|memory| (memory.content, memory.id))
        // What was on its way to be deleted when the process ended may be either.
        .filter(|(content, _)| !content.starts_with("fleeting"))
        .collect();
    let unique: BTreeMap<String, String> = found.iter().cloned().collect();
    assert_eq!(unique.len(), found.len(), "nothing is there twice");
    assert_eq!(
        unique, acknowledged,
        "all that was acknowledged is there, and nothing else"
    );
    assert!(
        acknowledged.len() > KILLS as usize * 4,
        "{} adds are no stream",
        acknowledged.len()
    );
    // Found by both arms: the vector index followed, too.
    for (content, id) in acknowledged.iter().step_by(1 + acknowledged.len() / 50) {
        for mode in [2, 3] {
            let request = SearchRequest {
                scope: scope(),
                query: content.clone(),
                top_k: 3,
                mode,
                ..Default::default()
            };
            let found = client.search(request).await.unwrap().into_inner();
            assert!(!found.degraded);
            let ids: Vec<String> = found.results.into_iter().map(|r| r.memory.unwrap().id).collect();
            assert!(ids.contains(id), "mode {mode}: `{content}` is not found");
        }
    }
    assert_eq!(program.stop().await, Some(0));
}

#[tokio::test]
async fn a_damaged_or_deleted_index_is_rebuilt_and_said() {
    let data = tempfile::tempdir().unwrap();
    let program = start(data.path()).await;
    let mut client = MemoryServiceClient::new(program.channel());
    for number in 0..30 {
        client
            .add(request(&format!("the fact{number} about subject{number}")))
            .await
            .unwrap();
    }
    assert_eq!(program.stop().await, Some(0));
    let vectors = data.path().join("vectors");
    let index = std::fs::read_dir(&vectors).unwrap().next().unwrap().unwrap().path();

    type Damage = fn(&Path);
    let damages: [(&str, Damage, &str); 4] = [
        (
            "a flipped bit",
            |index| {
                let path = index.join("vectors.bin");
                let mut bytes = std::fs::read(&path).unwrap();
                bytes[100] ^= 1;
                std::fs::write(&path, bytes).unwrap();
            },
            "checksum",
        ),
        (
            "a file that is cut off",
            |index| {
                std::fs::File::options()
                    .write(true)
                    .open(index.join("vectors.bin"))
                    .unwrap()
                    .set_len(50)
                    .unwrap();
            },
            "cut off",
        ),
        (
            "a manifest of nonsense",
            |index| std::fs::write(index.join("manifest.json"), "{").unwrap(),
            "damaged",
        ),
        (
            "no index at all",
            |index| std::fs::remove_dir_all(index).unwrap(),
            "there was none",
        ),
    ];
    for (what, damage, word) in damages {
        damage(&index);
        std::fs::write(data.path().join("log.txt"), "").unwrap();
        let program = start(data.path()).await;
        let log = program.log();
        let said = log.lines().find(|line| line.contains("rebuilt the vector index"));
        assert!(
            said.is_some_and(|line| line.contains(word) && line.contains("vectors=30")),
            "{what}:\n{log}"
        );
        let mut client = MemoryServiceClient::new(program.channel());
        let request = SearchRequest {
            scope: scope(),
            query: "subject17".into(),
            mode: 3,
            ..Default::default()
        };
        let found = client.search(request).await.unwrap().into_inner();
        assert!(
            found.results[0].memory.as_ref().unwrap().content.contains("subject17"),
            "{what}"
        );
        assert_eq!(program.stop().await, Some(0), "{what}");
    }
}

/// An index was begun, and nothing says yet that it is complete.
fn is_filling(data: &Path) -> bool {
    let mut directories = vec![data.join("vectors")];
    while let Some(directory) = directories.pop() {
        let entries = std::fs::read_dir(&directory).into_iter().flatten().flatten();
        directories.extend(entries.map(|entry| entry.path()).filter(|path| path.is_dir()));
        if directory.join("vectors.bin").exists() && !directory.join("manifest.json").exists() {
            return true;
        }
    }
    false
}

#[tokio::test]
async fn killed_while_it_rebuilds_its_index_it_rebuilds_it_again() {
    const COUNT: usize = 2_000;
    let data = tempfile::tempdir().unwrap();
    let program = start(data.path()).await;
    let mut client = MemoryServiceClient::new(program.channel());
    for start in (0..COUNT).step_by(500) {
        let requests = (start..start + 500)
            .map(|number| request(&format!("the fact{number} about subject{number}")))
            .collect();
        client.batch_add(together(requests)).await.unwrap();
    }
    program.stop().await;
    let mut in_the_middle = 0;
    for round in 0..6 {
        // Nothing of the index is left, or what the kill before has left of it.
        if round % 2 == 0 {
            std::fs::remove_dir_all(data.path().join("vectors")).unwrap();
        }
        let mut rebuilding = tokio::process::Command::new(built("aeterna"))
            .args([
                "serve",
                "--embedding.model_dirs",
                "",
                "--listen",
                "127.0.0.1:0",
                "--data-dir",
            ])
            .arg(data.path())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let begun = async {
            while !is_filling(data.path()) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), begun).await.unwrap();
        // Sooner or later after it has begun.
        tokio::time::sleep(Duration::from_millis(3 * round)).await;
        rebuilding.kill().await.unwrap();
        in_the_middle += u32::from(is_filling(data.path()));
    }
    assert!(in_the_middle > 0, "no kill came before the index was complete");
    let program = start(data.path()).await;
    let mut client = MemoryServiceClient::new(program.channel());
    for number in [0, 777, COUNT - 1] {
        let request = SearchRequest {
            scope: scope(),
            query: format!("subject{number}"),
            mode: 3,
            ..Default::default()
        };
        let found = client.search(request).await.unwrap().into_inner();
        let first = found.results[0].memory.as_ref().unwrap();
        assert!(
            first.content.contains(&format!("subject{number}")),
            "{number}: {}",
            first.content
        );
    }
    let stats = StatsRequest {
        scope: scope(),
        ..Default::default()
    };
    let stats = client.stats(stats).await.unwrap().into_inner();
    assert_eq!((stats.layers[0].memories, stats.index_lag), (COUNT as i64, 0));
    program.stop().await;
}

#[tokio::test]
async fn a_second_process_on_the_same_directory_is_refused() {
    let data = tempfile::tempdir().unwrap();
    let first = start(data.path()).await;
    let second = tokio::process::Command::new(built("aeterna"))
        .args(["serve", "--listen", "127.0.0.1:0", "--data-dir"])
        .arg(data.path())
        .output()
        .await
        .unwrap();
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(
        !second.status.success() && said.contains("another process uses the data directory"),
        "{said}"
    );
    assert_eq!(first.stop().await, Some(0));
}

#[tokio::test]
async fn calls_under_way_are_answered_while_it_drains() {
    let data = tempfile::tempdir().unwrap();
    let program = start(data.path()).await;
    let calls: Vec<_> = (0..20)
        .map(|number| {
            let mut client = MemoryServiceClient::new(program.channel());
            tokio::spawn(async move { client.add(request(&format!("draining {number}"))).await })
        })
        .collect();
    // Once one is answered, the others are under way.
    let mut client = MemoryServiceClient::new(program.channel());
    client.add(request("first")).await.unwrap();
    assert_eq!(program.stop().await, Some(0));
    let mut acknowledged = Vec::new();
    for call in calls {
        match call.await.unwrap() {
            Ok(answer) => acknowledged.push(answer.into_inner().memory.unwrap().id),
            // It came when the door was closed already: said so, and nothing of it was kept.
            Err(status) => assert_eq!(status.code(), tonic::Code::Unavailable, "{status:?}"),
        }
    }
    assert!(!acknowledged.is_empty());
    let program = start(data.path()).await;
    let mut client = MemoryServiceClient::new(program.channel());
    for id in acknowledged {
        client
            .get(GetRequest {
                id,
                ..Default::default()
            })
            .await
            .unwrap();
    }
    assert_eq!(program.stop().await, Some(0));
}

#[tokio::test]
async fn vectors_that_are_made_up_later_survive_a_kill_in_the_middle() {
    let data = tempfile::tempdir().unwrap();
    // Written while the embedding service is away: all vectors are pending.
    let away = ["serve", "--roles", "embedding", "--embedding.model_dirs", ""];
    let elsewhere = tempfile::tempdir().unwrap();
    let embedding = Program::start(&built("aeterna"), &away, elsewhere.path()).await;
    let url = format!("http://{}", embedding.address);
    let flags = ["--memory.embedding", url.as_str(), "--log.filter", "info"];
    let memory = Program::start(&built("aeterna-memory"), &flags, data.path()).await;
    embedding.kill().await;
    let mut client = MemoryServiceClient::new(memory.channel());
    let requests: Vec<AddRequest> = (0..600)
        .map(|n| request(&format!("the fact{n} about subject{n}")))
        .collect();
    for requests in requests.chunks(200) {
        let batch = BatchAddRequest {
            requests: requests.to_vec(),
            ..Default::default()
        };
        client.batch_add(batch).await.unwrap();
    }
    memory.kill().await;
    // Killed at several moments of making them up.
    for moment in [0, 10, 30, 60, 100] {
        let program = start(data.path()).await;
        tokio::time::sleep(Duration::from_millis(moment)).await;
        program.kill().await;
    }
    let program = start(data.path()).await;
    let mut client = MemoryServiceClient::new(program.channel());
    let missing = async |client: &mut MemoryServiceClient<AnyChannel>| {
        let mut missing = 0;
        for n in (0..600).step_by(7) {
            let query = SearchRequest {
                scope: scope(),
                query: format!("subject{n}"),
                top_k: 1,
                mode: 3,
                ..Default::default()
            };
            let found = client.search(query).await.unwrap().into_inner();
            let content = found
                .results
                .first()
                .map(|result| result.memory.clone().unwrap().content);
            missing += usize::from(content != Some(format!("the fact{n} about subject{n}")));
        }
        missing
    };
    for attempt in 0.. {
        let left = missing(&mut client).await;
        if left == 0 {
            break;
        }
        assert!(attempt < 100, "{left} vectors are missing:\n{}", program.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(program.stop().await, Some(0));
}

#[tokio::test]
async fn a_fault_leaves_its_cause_in_the_log_under_the_request_id() {
    let data = tempfile::tempdir().unwrap();
    let program = start(data.path()).await;
    let mut client = MemoryServiceClient::new(program.channel());
    let id = client
        .add(request("a fact"))
        .await
        .unwrap()
        .into_inner()
        .memory
        .unwrap()
        .id;
    // Behind the program's back, which nobody should do.
    let database = data.path().join("memory.db");
    let spoil = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute(\"UPDATE memories SET record = '{}'\"); c.commit()";
    let spoiled = tokio::process::Command::new("python3")
        .args(["-c", spoil])
        .arg(&database)
        .status()
        .await
        .unwrap();
    assert!(spoiled.success());
    let mut request = tonic::Request::new(GetRequest {
        id,
        ..Default::default()
    });
    request
        .metadata_mut()
        .insert("x-request-id", "the-call-that-failed".parse().unwrap());
    let status = client.get(request).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Internal);
    assert!(
        !status.message().contains("decode"),
        "the cause is not the caller's: {status:?}"
    );
    let log = program.log();
    let line = log.lines().find(|line| line.contains("the-call-that-failed"));
    assert!(
        line.is_some_and(|line| line.contains("a stored memory can't be decoded")),
        "{log}"
    );
    assert_eq!(program.stop().await, Some(0));
}
