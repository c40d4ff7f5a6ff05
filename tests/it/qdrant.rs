//! The service on a Qdrant cluster; only where `QDRANT_BIN` names a server (`make test-qdrant`).

use std::collections::BTreeMap;
use std::time::Duration;

use aeterna_proto::memory::v1::memory_service_client::MemoryServiceClient;
use aeterna_proto::memory::v1::{SearchMode, SearchRequest};
use aeterna_rpc::AnyChannel;
use aeterna_testkit::lab::{Extent, Lab, Part, Scratch, Setup, secrets};
use aeterna_testkit::{PostgresServer, Program, built};

use crate::notes::{item, user};

const PEOPLE: [&str; 4] = ["Ann", "Bob", "Carla", "Dmitri"];
const DID: [&str; 5] = ["painted", "sold", "found", "repaired", "described"];
const THINGS: [&str; 6] = [
    "the red boat",
    "an old piano",
    "a map of Lisbon",
    "two bicycles",
    "the garden gate",
    "a telescope",
];

type Client = MemoryServiceClient<AnyChannel>;

async fn copy(server: &PostgresServer, data: &std::path::Path, index: &str) -> Program {
    let store = format!("postgres:{}", server.uri());
    let environment = [
        ("AETERNA_MEMORY_STORE", store.as_str()),
        ("AETERNA_MEMORY_STORE_OWNER", "owner"),
        ("AETERNA_MEMORY_INDEX", index),
        ("AETERNA_MEMORY_INDEX_KEY", secrets::QDRANT),
    ];
    Program::start_with(&built("aeterna"), &["serve"], data, &environment).await
}

/// What a search finds, with scores, and whether something was away.
async fn found(client: &mut Client, query: &str, mode: SearchMode, token: &str) -> (Vec<(String, f64)>, bool) {
    let request = SearchRequest {
        scope: user("ann"),
        query: query.into(),
        top_k: 8,
        mode: mode.into(),
        consistency_token: token.into(),
        ..Default::default()
    };
    let found = client.search(request).await.unwrap().into_inner();
    let content =
        |memory: Option<aeterna_proto::memory::v1::Memory>| memory.map(|memory| memory.content).unwrap_or_default();
    let results = found
        .results
        .into_iter()
        .map(|result| (content(result.memory), result.score));
    (results.collect(), found.degraded)
}

#[tokio::test(flavor = "multi_thread")]
async fn both_indexes_find_the_same_and_a_cluster_may_go_and_come_back() {
    let Some(program) = std::env::var_os("QDRANT_BIN").filter(|path| !path.is_empty()) else {
        return;
    };
    let setup = Setup::of(Extent::Qdrant, BTreeMap::from([("qdrant".to_owned(), program.into())]));
    let place = Scratch::new();
    let lab = Lab::up(place.path(), setup, |_| ()).await.unwrap();
    let server = PostgresServer::start(&[]);
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let cluster = copy(&server, &path("cluster"), &lab.vectors()).await;
    let flat = copy(&server, &path("flat"), "flat:vectors").await;
    let [mut cluster_client, mut flat_client] = [&cluster, &flat].map(|copy| Client::new(copy.channel()));

    let mut token = String::new();
    for (number, person) in PEOPLE.iter().enumerate() {
        for (at, did) in DID.iter().enumerate() {
            for thing in THINGS.iter().skip((number + at) % 2).step_by(2) {
                let added = cluster_client
                    .add(item("ann", &format!("{person} {did} {thing}")))
                    .await;
                token = added.unwrap().into_inner().consistency_token;
            }
        }
    }
    let queries = [
        "who repaired the piano?",
        "Carla telescope",
        "what did Bob sell?",
        "map of Lisbon",
        "bicycles in the garden",
    ];
    for query in queries {
        for mode in [SearchMode::Hybrid, SearchMode::Lexical, SearchMode::Dense] {
            let (by_cluster, away) = found(&mut cluster_client, query, mode, &token).await;
            let (by_flat, _) = found(&mut flat_client, query, mode, &token).await;
            assert!(!away && !by_flat.is_empty(), "{query} {mode:?}");
            // To within ties: the same scores in the same order, and what has a score of its own is the same memory.
            assert_eq!(by_cluster.len(), by_flat.len(), "{query} {mode:?}");
            for (place, (ours, theirs)) in by_cluster.iter().zip(&by_flat).enumerate() {
                assert!(
                    (ours.1 - theirs.1).abs() < 1e-4,
                    "{query} {mode:?}: {by_cluster:?} {by_flat:?}"
                );
                let near = |other: &(String, f64)| (other.1 - ours.1).abs() < 1e-4;
                let alone = by_flat.iter().filter(|other| near(other)).count() == 1 && place + 1 < by_flat.len();
                assert!(
                    !alone || ours.0 == theirs.0,
                    "{query} {mode:?}: {by_cluster:?} {by_flat:?}"
                );
            }
        }
    }

    // Without the cluster memories are stored and found by their words, and the answer says so.
    let nodes: Vec<String> = lab.members();
    for node in &nodes {
        lab.kill(node, Part::All).await.unwrap();
    }
    cluster_client
        .add(item("ann", "Eve invented the zeppelin"))
        .await
        .unwrap();
    let (words, away) = found(&mut cluster_client, "zeppelin", SearchMode::Hybrid, "").await;
    assert!(away && words[0].0 == "Eve invented the zeppelin", "{words:?}");
    for node in &nodes {
        lab.start(node).unwrap();
    }
    let back = async {
        loop {
            let (dense, away) = found(&mut cluster_client, "Eve invented the zeppelin", SearchMode::Dense, "").await;
            if !away
                && dense
                    .first()
                    .is_some_and(|first| first.0 == "Eve invented the zeppelin")
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), back).await.unwrap();
    lab.vectors_whole(Duration::from_secs(60)).await.unwrap();

    // Nothing is missing, as a comparison of everything says.
    let mut reconcile = tokio::process::Command::new(built("aeterna"));
    let store = format!("postgres:{}", server.uri());
    reconcile.args([
        "reconcile",
        "--dry-run",
        "--memory.store",
        &store,
        "--memory.index",
        &lab.vectors(),
    ]);
    reconcile.env("AETERNA_MEMORY_INDEX_KEY", secrets::QDRANT);
    let said = reconcile.arg("--data-dir").arg(path("other")).output().await.unwrap();
    let output = String::from_utf8_lossy(&said.stdout);
    let wanted = "61 memories: 0 were missing or different in the index, 0 were there and in no store";
    let errors = String::from_utf8_lossy(&said.stderr);
    assert!(said.status.success() && output.starts_with(wanted), "{output}{errors}");
    assert_eq!((cluster.stop().await, flat.stop().await), (Some(0), Some(0)));
}
