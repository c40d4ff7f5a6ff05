//! A model that was not trained for being cut short: a rotation is learned from its vectors, and searches scan by it from then
//! on, without a gap, and after a kill. The server is scripted: vectors that lie in few directions, and are many, would take a
//! real model minutes.

use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use aeterna_auth::Role;
use aeterna_proto::memory::v1::memory_service_client::MemoryServiceClient;
use aeterna_proto::memory::v1::{DeleteRequest, SearchRequest};
use aeterna_rpc::AnyChannel;
use aeterna_testkit::{NEVER, Program, SECRET, bearing, built};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::notes::{item, together, user};

const DIMENSION: usize = 256;
/// Directions in which the vectors lie.
const TRUE: usize = 40;
static DIRECTIONS: OnceLock<Vec<Vec<f64>>> = OnceLock::new();
/// More than are learned from at first.
const COUNT: usize = 2_400;

/// Numbers between -1 and 1, the same for the same seed.
fn numbers(seed: u64, count: usize) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f64 / (1 << 23) as f64 - 1.0
    };
    (0..16).for_each(|_| {
        next();
    });
    (0..count).map(|_| next()).collect()
}

/// A place of its own for each text, in a few directions that have all dimensions.
fn vector(text: &str) -> Vec<f64> {
    let seed = text.bytes().fold(7u64, |hash, byte| {
        hash.wrapping_mul(1_099_511_628_211) ^ u64::from(byte)
    });
    // One tenant of the second test has directions of its own.
    let directions = DIRECTIONS.get_or_init(|| (1..=2 * TRUE as u64).map(|seed| numbers(seed, DIMENSION)).collect());
    let (most, own) = directions.split_at(TRUE);
    let directions = if text.starts_with("high") { own } else { most };
    let mut sum = vec![0.0; DIMENSION];
    for (direction, weight) in directions.iter().zip(numbers(seed, TRUE)) {
        for (value, part) in sum.iter_mut().zip(direction) {
            *value += weight * part;
        }
    }
    sum
}

async fn embeddings(body: String) -> String {
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(body["dimensions"], Value::Null, "the model was not trained for it");
    let texts = body["input"].as_array().unwrap().iter().zip(0..);
    let data: Vec<Value> = texts
        .map(|(text, index)| json!({"index": index, "embedding": vector(text.as_str().unwrap())}))
        .collect();
    json!({"data": data, "usage": {"prompt_tokens": 1}}).to_string()
}

async fn start(data: &Path, url: &str, rotation: &str) -> Program {
    start_with(data, url, &["--memory.rotation", rotation]).await
}

async fn start_with(data: &Path, url: &str, more: &[&str]) -> Program {
    let dimension = DIMENSION.to_string();
    let flags = [
        "serve",
        "--embedding.openai.urls",
        url,
        "--embedding.openai.model",
        "scripted",
        "--embedding.openai.dimension",
        &dimension,
        "--embedding.openai.matryoshka",
        "false",
        "--embedding.default_model",
        "scripted",
        "--embedding.model_dirs",
        "",
        "--log.filter",
        "info",
    ];
    Program::start(&built("aeterna"), &[&flags, more].concat(), data).await
}

/// The contents found by the dense arm alone.
async fn search(client: &mut MemoryServiceClient<AnyChannel>, query: &str) -> Vec<String> {
    let request = SearchRequest {
        scope: user("ann"),
        query: query.into(),
        mode: 3,
        ..Default::default()
    };
    let found = client.search(request).await.unwrap().into_inner();
    assert!(!found.degraded, "{:?}", found.degraded_reasons);
    let contents = found.results.into_iter().map(|hit| hit.memory.unwrap().content);
    contents.collect()
}

/// The directories below the index's, and what lies beside them.
fn files(data: &Path) -> (Vec<String>, bool) {
    let mut learned = Vec::new();
    let mut plain = false;
    for model in std::fs::read_dir(data.join("vectors")).unwrap() {
        for file in std::fs::read_dir(model.unwrap().path()).unwrap() {
            let file = file.unwrap().file_name().into_string().unwrap();
            plain |= file == "vectors.bin";
            learned.extend(file.starts_with("learned-").then_some(file));
        }
    }
    (learned, plain)
}

/// Waits for what the files say.
async fn until(program: &Program, data: &tempfile::TempDir, wanted: impl Fn(&(Vec<String>, bool)) -> bool) {
    for _ in 0..6_000 {
        if wanted(&files(data.path())) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("it does not happen: {:?}\n{}", files(data.path()), program.log());
}

/// The server of vectors.
async fn serve() -> (String, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    let router = axum::Router::new().route("/v1/embeddings", axum::routing::post(embeddings));
    let served = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    (url, served)
}

#[tokio::test(flavor = "multi_thread")]
async fn tenants_with_many_vectors_have_rotations_of_their_own() {
    /// More than 25 a dimension.
    const MANY: usize = 6_500;
    let (url, served) = serve().await;
    let data = tempfile::tempdir().unwrap();
    let flags = |rotation| ["--auth.hs256_secret", SECRET, "--memory.rotation", rotation];
    let program = start_with(data.path(), &url, &flags("false")).await;
    let mut client = MemoryServiceClient::new(program.channel());
    let tenants = [("low", MANY), ("high", MANY), ("few", 100)];
    let token = |name: &str| aeterna_testkit::token(name, Role::Admin, &[], NEVER);
    let text = |tenant: &str, n: usize| format!("{tenant} {n}");
    for (tenant, count) in tenants {
        for first in (0..count).step_by(500) {
            let some = first..(first + 500).min(count);
            let requests = some.map(|n| item("ann", &text(tenant, n))).collect();
            client
                .batch_add(bearing(together(requests), &token(tenant)))
                .await
                .unwrap();
        }
    }
    program.stop().await;
    let asked = async |program: &Program| {
        let mut client = MemoryServiceClient::new(program.channel());
        for (tenant, count) in tenants {
            for n in [0, count / 2, count - 1] {
                let request = SearchRequest {
                    scope: user("ann"),
                    query: text(tenant, n),
                    mode: 3,
                    ..Default::default()
                };
                let found = client.search(bearing(request, &token(tenant))).await.unwrap();
                let best = found.into_inner().results.swap_remove(0).memory.unwrap();
                assert_eq!(best.content, text(tenant, n));
            }
        }
    };
    let program = start_with(data.path(), &url, &flags("true")).await;
    until(&program, &data, |(learned, plain)| learned.len() == 1 && !plain).await;
    assert!(program.log().contains("tenants=2"), "{}", program.log());
    asked(&program).await;
    program.kill().await;
    let program = start_with(data.path(), &url, &flags("true")).await;
    asked(&program).await;
    assert!(!program.log().contains("rebuilt the vector index"), "{}", program.log());
    program.stop().await;
    served.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotation_is_learned_and_searches_go_on() {
    let (url, served) = serve().await;
    let data = tempfile::tempdir().unwrap();
    let program = start(data.path(), &url, "true").await;
    let mut client = MemoryServiceClient::new(program.channel());
    let text = |n: usize| format!("note {n}");
    for first in (0..COUNT).step_by(400) {
        let requests = (first..first + 400).map(|n| item("ann", &text(n))).collect();
        client.batch_add(together(requests)).await.unwrap();
    }

    // Every search finds what it looks for, before and while and after.
    let mut number = 0;
    let mut tries = 0;
    while !matches!(files(data.path()), (learned, false) if learned.len() == 1) {
        number = (number + 7) % COUNT;
        assert_eq!(search(&mut client, &text(number)).await[0], text(number));
        tries += 1;
        assert!(
            tries < 4_000,
            "no rotation is learned: {:?} {}",
            files(data.path()),
            program.log()
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let before = search(&mut client, "something else").await;
    let added = client.add(item("ann", "a late note")).await.unwrap().into_inner();
    assert_eq!(search(&mut client, "a late note").await[0], "a late note");
    program.kill().await;

    let program = start(data.path(), &url, "true").await;
    let mut client = MemoryServiceClient::new(program.channel());
    assert_eq!(search(&mut client, "a late note").await[0], "a late note");
    let name = added.memory.unwrap().id;
    let request = DeleteRequest {
        id: name,
        ..Default::default()
    };
    client.delete(request).await.unwrap();
    assert_eq!(search(&mut client, "something else").await, before);
    assert_eq!(
        program.log().matches("learned a rotation").count(),
        1,
        "it is kept: {}",
        program.log()
    );
    assert!(!program.log().contains("rebuilt the vector index"), "{}", program.log());
    program.stop().await;

    // Without it all dimensions are scanned again.
    let program = start(data.path(), &url, "false").await;
    let mut client = MemoryServiceClient::new(program.channel());
    assert_eq!(search(&mut client, "something else").await, before);
    assert_eq!(files(data.path()), (Vec::new(), true));
    program.stop().await;

    // Killed while an index is filled: the start does not take it for a whole one, and learns again.
    let program = start(data.path(), &url, "true").await;
    until(&program, &data, |(learned, _)| !learned.is_empty()).await;
    program.kill().await;
    let program = start(data.path(), &url, "true").await;
    let mut client = MemoryServiceClient::new(program.channel());
    assert_eq!(search(&mut client, "something else").await, before);
    client.add(item("ann", "a last note")).await.unwrap();
    until(&program, &data, |(learned, plain)| learned.len() == 1 && !plain).await;
    assert_eq!(search(&mut client, "something else").await, before);
    assert_eq!(search(&mut client, "a last note").await[0], "a last note");

    // With eight times as many it is learned again, and what was learned before makes room.
    let learned = |data: &Path| -> Option<usize> {
        let (learned, _) = files(data);
        let [only] = learned.as_slice() else { return None };
        only.strip_prefix("learned-")?.parse().ok()
    };
    let first = learned(data.path()).unwrap();
    for from in (COUNT..8 * first).step_by(1000) {
        let requests = (from..from + 1000).map(|n| item("bob", &text(n))).collect();
        client.batch_add(together(requests)).await.unwrap();
        assert_eq!(search(&mut client, "a last note").await[0], "a last note");
    }
    let again =
        |files: &(Vec<String>, bool)| files.0.len() == 1 && learned(data.path()).is_some_and(|n| n >= 8 * first);
    until(&program, &data, again).await;
    assert_eq!(search(&mut client, "something else").await, before);
    assert_eq!(search(&mut client, "a last note").await[0], "a last note");
    program.stop().await;
    served.abort();
}
