//! Another embedding model: memories are embedded anew in the background, searches are answered all the while, and what was
//! done is not done again after a kill.

use std::path::Path;
use std::time::Duration;

use aeterna_proto::memory::v1::memory_service_client::MemoryServiceClient;
use aeterna_proto::memory::v1::{BatchAddRequest, SearchRequest, SearchResponse, StatsRequest, StatsResponse};
use aeterna_rpc::AnyChannel;
use aeterna_testkit::{Program, built, minilm};

use crate::notes::{item, user};

const COUNT: usize = 300;

type Client = MemoryServiceClient<AnyChannel>;

async fn start(data: &Path, models: &Path) -> Program {
    let dirs = models.display().to_string();
    let flags = ["serve", "--embedding.model_dirs", &dirs, "--log.filter", "info"];
    Program::start(&built("aeterna"), &flags, data).await
}

async fn stats(client: &mut Client) -> StatsResponse {
    client
        .stats(StatsRequest { scope: user("ann") })
        .await
        .unwrap()
        .into_inner()
}

async fn search(client: &mut Client, query: &str) -> SearchResponse {
    let query = SearchRequest {
        scope: user("ann"),
        query: query.into(),
        mode: 3,
        ..Default::default()
    };
    client.search(query).await.unwrap().into_inner()
}

#[tokio::test(flavor = "multi_thread")]
async fn another_model_takes_over_without_a_gap_and_after_a_kill() {
    let (data, models) = (tempfile::tempdir().unwrap(), minilm());
    let program = start(data.path(), Path::new("")).await;
    let mut client = MemoryServiceClient::new(program.channel());
    let requests = (0..COUNT)
        .map(|n| item("ann", &format!("note {n} about ship number {n} in the harbour")))
        .collect();
    client.batch_add(BatchAddRequest { requests }).await.unwrap();
    assert_eq!(search(&mut client, "ship number 7").await.model, "hash");
    program.stop().await;

    let program = start(data.path(), &models).await;
    let mut client = MemoryServiceClient::new(program.channel());
    let found = search(&mut client, "ship number 7").await;
    assert!(
        found.model == "hash" && found.results.len() == 10 && !found.degraded,
        "{}",
        found.model
    );
    let begun = stats(&mut client).await;
    assert_eq!((begun.embedding_model.as_str(), begun.pending_embeddings), ("hash", 0));
    assert_eq!(begun.reembedding_model, "all-MiniLM-L6-v2");
    // Some are done, and not all.
    let mut left = begun.reembedding_left;
    while left > COUNT as i64 - 64 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        left = stats(&mut client).await.reembedding_left;
    }
    program.kill().await;
    assert!(left > 0, "it was done before it could be killed");

    let program = start(data.path(), &models).await;
    let mut client = MemoryServiceClient::new(program.channel());
    let again = stats(&mut client).await;
    assert!(
        again.reembedding_left <= left,
        "{} are left, and {left} were",
        again.reembedding_left
    );
    // What is written meanwhile is found, and so is everything else, by the one model or the other.
    client
        .add(item("ann", "the lighthouse keeper owns a parrot"))
        .await
        .unwrap();
    let mut tries = 0;
    loop {
        let found = search(&mut client, "lighthouse parrot").await;
        assert!(!found.degraded && found.results.len() == 10, "{found:?}");
        assert!(
            found.results[0].memory.as_ref().unwrap().content.contains("parrot"),
            "{}",
            found.model
        );
        if found.model == "all-MiniLM-L6-v2" {
            break;
        }
        tries += 1;
        assert!(tries < 1200, "the new model does not take over: {}", program.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let done = loop {
        let now = stats(&mut client).await;
        if now.pending_embeddings == 0 && now.index_lag == 0 {
            break now;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert_eq!((done.reembedding_model.as_str(), done.reembedding_left), ("", 0));
    let names = || {
        let names = std::fs::read_dir(data.path().join("vectors")).unwrap();
        names
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect::<Vec<_>>()
    };
    // What the model before has left goes once no search needs it any more.
    for _ in 0..600 {
        if names().len() == 1 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    program.stop().await;
    let names = names();
    assert!(names.len() == 1 && names[0].starts_with("all-MiniLM"), "{names:?}");
}
