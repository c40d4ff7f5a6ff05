//! Another embedding model: memories are embedded anew in the background, searches are answered all the while, and what was
//! done is not done again after a kill.

use std::path::Path;
use std::time::Duration;

use aeterna_proto::memory::v1::memory_service_client::MemoryServiceClient;
use aeterna_proto::memory::v1::{BatchAddRequest, SearchRequest, SearchResponse, StatsRequest, StatsResponse};
use aeterna_rpc::AnyChannel;
use aeterna_testkit::{PostgresServer, Program, built, minilm};

use crate::notes::{item, together, user};

const COUNT: usize = 300;

type Client = MemoryServiceClient<AnyChannel>;

async fn start(data: &Path, models: &Path) -> Program {
    let dirs = models.display().to_string();
    let flags = ["serve", "--embedding.model_dirs", &dirs, "--log.filter", "info"];
    Program::start(&built("aeterna"), &flags, data).await
}

async fn stats(client: &mut Client) -> StatsResponse {
    client
        .stats(StatsRequest {
            scope: user("ann"),
            ..Default::default()
        })
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
    client.batch_add(together(requests)).await.unwrap();
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

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_is_not_there_yet_goes_on_by_the_model_before() {
    let (server, models) = (PostgresServer::start(&[]), minilm());
    let (directory, dirs) = (tempfile::tempdir().unwrap(), models.display().to_string());
    let store = format!("postgres:{}", server.uri());
    let environment = [
        ("AETERNA_MEMORY_STORE", store.as_str()),
        ("AETERNA_MEMORY_STORE_OWNER", "owner"),
    ];
    let copy = async |name: &str, models: &str, flags: &[&str]| {
        let common = ["serve", "--embedding.model_dirs", models];
        let data = directory.path().join(name);
        Program::start_with(&built("aeterna"), &[&common, flags].concat(), &data, &environment).await
    };
    let (first, second) = tokio::join!(copy("a", "", &[]), copy("b", "", &[]));
    let requests = (0..20).map(|n| item("ann", &format!("note {n} about ship number {n}")));
    let requests = BatchAddRequest {
        requests: requests.collect(),
        ..Default::default()
    };
    let added = MemoryServiceClient::new(first.channel()).batch_add(requests).await;
    let token = added.unwrap().into_inner().consistency_token;
    first.stop().await;

    // One copy is started with another model, and goes over to it.
    let by = async |program: &Program, model: &str| {
        let mut client = MemoryServiceClient::new(program.channel());
        let mut left = 600;
        while search(&mut client, "ship number 7").await.model != model {
            left -= 1;
            assert!(left > 0, "{model} does not answer: {}", program.log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let first = copy("a", &dirs, &[]).await;
    by(&first, "all-MiniLM-L6-v2").await;
    let mut behind = MemoryServiceClient::new(second.channel());
    for n in 0..20 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let query = SearchRequest {
            scope: user("ann"),
            query: format!("ship number {n}"),
            mode: 3,
            consistency_token: token.clone(),
            ..Default::default()
        };
        let found = behind.search(query).await.unwrap().into_inner();
        assert!(
            found.model == "hash" && found.results.len() == 10 && !found.degraded,
            "{n}: {found:?}, {}",
            second.log()
        );
    }
    let models = || {
        server.sql(
            "aeterna",
            "SELECT string_agg(identity, ' ' ORDER BY identity) FROM models",
        )
    };
    assert_eq!(models().split(' ').count(), 2, "{}", models());
    // One that is started with the model before once more takes nothing from the one that has taken over.
    second.stop().await;
    let second = copy("b", "", &["--memory.model_grace", "0s"]).await;
    by(&second, "hash").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(models().split(' ').count(), 2, "{}", models());
    // When it is over, what the model before has left goes.
    first.stop().await;
    let first = copy("a", &dirs, &["--memory.model_grace", "0s"]).await;
    let mut left = 600;
    while models().contains("hash@") {
        left -= 1;
        assert!(left > 0, "nothing was removed: {}", first.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!((first.stop().await, second.stop().await), (Some(0), Some(0)));
}
