//! The service on a Qdrant cluster; only where `QDRANT_URL` or `QDRANT_BIN` names one (`make test-qdrant`).

use std::collections::BTreeMap;
use std::time::Duration;

use aeterna_auth::Role;
use aeterna_proto::memory::v1::memory_service_client::MemoryServiceClient;
use aeterna_proto::memory::v1::{SearchMode, SearchRequest};
use aeterna_rpc::AnyChannel;
use aeterna_testkit::lab::{Extent, Lab, Part, Scratch, Setup, secrets};
use aeterna_testkit::{NEVER, PostgresServer, Program, SECRET, bearing, built, token};

use crate::notes::{item, together, user};

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
const PLACES: [&str; 10] = [
    "Turin", "Bergen", "Porto", "Ghent", "Graz", "Cork", "Split", "Vilnius", "Malmö", "Riga",
];
const OURS: &str = "acme";
const THEIRS: &str = "other";

type Client = MemoryServiceClient<AnyChannel>;

/// More memories than an arm brings candidates, so that what the index ranks decides.
fn ours() -> Vec<String> {
    let mut all = Vec::new();
    for place in PLACES {
        for thing in THINGS {
            for did in DID {
                all.extend(PEOPLE.map(|person| format!("{person} {did} {thing} in {place}")));
            }
        }
    }
    all
}

/// Another tenant's, in the same collection: what is rare with us is common there.
fn theirs() -> Vec<String> {
    (0..600)
        .map(|n| format!("Dmitri repaired a telescope in Riga for the {n}th time"))
        .collect()
}

async fn fill(client: &mut Client, tenant: &str, contents: &[String]) -> String {
    let bearer = token(tenant, Role::Admin, &[], NEVER);
    let mut consistent = String::new();
    for (number, part) in contents.chunks(300).enumerate() {
        let tagged = |(place, content): (usize, &String)| {
            let mut request = item("ann", content);
            let tags = [10, 40].map(|of| format!("one-of-{of}-{}", (300 * number + place) % of));
            request.memory.as_mut().unwrap().tags = tags.to_vec();
            request
        };
        let requests = part.iter().enumerate().map(tagged).collect();
        let added = client.batch_add(bearing(together(requests), &bearer)).await;
        consistent = added.unwrap().into_inner().consistency_token;
    }
    consistent
}

async fn copy(server: &PostgresServer, data: &std::path::Path, index: &str, key: &str) -> Program {
    let store = format!("postgres:{}", server.uri());
    let environment = [
        ("AETERNA_MEMORY_STORE", store.as_str()),
        ("AETERNA_MEMORY_STORE_OWNER", "owner"),
        ("AETERNA_MEMORY_INDEX", index),
        ("AETERNA_MEMORY_INDEX_KEY", key),
        ("AETERNA_AUTH_HS256_SECRET", SECRET),
        ("AETERNA_EMBEDDING_MODEL_DIRS", ""),
    ];
    Program::start_with(&built("aeterna"), &["serve"], data, &environment).await
}

/// What a search of ours finds, with scores of its arm or of both, and whether something was away.
async fn found(client: &mut Client, query: &str, mode: SearchMode, consistent: &str) -> (Vec<(String, f64)>, bool) {
    found_among(client, query, (mode, ""), consistent).await
}

/// The same among those that satisfy a filter.
async fn found_among(
    client: &mut Client,
    query: &str,
    (mode, filter): (SearchMode, &str),
    consistent: &str,
) -> (Vec<(String, f64)>, bool) {
    let request = SearchRequest {
        filter: filter.into(),
        scope: user("ann"),
        query: query.into(),
        top_k: 8,
        mode: mode.into(),
        consistency_token: consistent.into(),
        explain: true,
        ..Default::default()
    };
    let bearer = token(OURS, Role::Admin, &[], NEVER);
    let found = client.search(bearing(request, &bearer)).await.unwrap().into_inner();
    let content =
        |memory: Option<aeterna_proto::memory::v1::Memory>| memory.map(|memory| memory.content).unwrap_or_default();
    // What an arm itself says: a score depends on all of its candidates too, and of many with the same value any may be the last.
    let results = found.results.into_iter().map(|result| {
        let parts = result.breakdown.unwrap_or_default();
        let value = match mode {
            SearchMode::Dense => parts.cosine,
            SearchMode::Lexical => parts.bm25,
            _ => Some(result.score),
        };
        (content(result.memory), value.unwrap_or_default())
    });
    (results.collect(), found.degraded)
}

/// The cluster that `QDRANT_URL` names, or one of three nodes by the program `QDRANT_BIN`: its URI and key.
async fn cluster() -> Option<(String, String, Option<(Lab, Scratch)>)> {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    if let Some(uri) = set("QDRANT_URL") {
        return Some((uri, set("QDRANT_KEY").unwrap_or_default(), None));
    }
    let programs = BTreeMap::from([("qdrant".to_owned(), set("QDRANT_BIN")?.into())]);
    let place = Scratch::new();
    let lab = Lab::up(place.path(), Setup::of(Extent::Qdrant, programs), |_| ())
        .await
        .unwrap();
    Some((lab.vectors(), secrets::QDRANT.to_owned(), Some((lab, place))))
}

#[tokio::test(flavor = "multi_thread")]
async fn both_indexes_find_the_same_and_a_cluster_may_go_and_come_back() {
    let Some((uri, key, lab)) = cluster().await else { return };
    let server = PostgresServer::start(&[]);
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let cluster = copy(&server, &path("cluster"), &uri, &key).await;
    let flat = copy(&server, &path("flat"), "flat:vectors", "").await;
    let [mut cluster_client, mut flat_client] = [&cluster, &flat].map(|copy| Client::new(copy.channel()));
    let before = fill(&mut cluster_client, THEIRS, &theirs()).await;
    let consistent = fill(&mut cluster_client, OURS, &ours()).await;
    assert_ne!(before, consistent);
    let queries = [
        "who repaired the piano?",
        "Carla telescope",
        "what did Bob sell in Porto?",
        "map of Lisbon",
        "bicycles in the garden",
        "what did Dmitri repair in Riga?",
        "telescope Vilnius Ann",
    ];
    for query in queries {
        // All of them, one in ten, one in forty, and a few that are near none of the others.
        for filter in [
            "",
            "tags:one-of-10-3",
            "tags:one-of-40-7",
            "tags:one-of-40-7 AND tags:one-of-10-8",
            "tags:none",
        ] {
            for mode in [SearchMode::Lexical, SearchMode::Dense] {
                let asked = (mode, filter);
                let (by_cluster, away) = found_among(&mut cluster_client, query, asked, &consistent).await;
                let (by_flat, _) = found_among(&mut flat_client, query, asked, &consistent).await;
                assert!(!away, "{query} {asked:?}");
                let some = matches!(mode, SearchMode::Dense) && !filter.contains(" AND ") && filter != "tags:none";
                assert!(by_flat.len() == 8 || !some, "{query} {asked:?}: {by_flat:?}");
                // To within ties: the same scores in the same order, and what has a score of its own is the same memory.
                assert_eq!(by_cluster.len(), by_flat.len(), "{query} {asked:?}");
                for (place, (ours, theirs)) in by_cluster.iter().zip(&by_flat).enumerate() {
                    assert!(
                        (ours.1 - theirs.1).abs() < 1e-4,
                        "{query} {asked:?}: {by_cluster:?} {by_flat:?}"
                    );
                    let near = |other: &(String, f64)| (other.1 - ours.1).abs() < 1e-4;
                    let alone = by_flat.iter().filter(|other| near(other)).count() == 1 && place + 1 < by_flat.len();
                    assert!(
                        !alone || ours.0 == theirs.0,
                        "{query} {asked:?}: {by_cluster:?} {by_flat:?}"
                    );
                }
            }
        }
    }
    if let Some((lab, _)) = &lab {
        goes_and_comes_back(lab, &mut cluster_client).await;
    }

    // Nothing is missing, as a comparison of everything says.
    let mut reconcile = tokio::process::Command::new(built("aeterna"));
    let store = format!("postgres:{}", server.uri());
    reconcile.args([
        "reconcile",
        "--dry-run",
        "--memory.store",
        &store,
        "--memory.index",
        &uri,
    ]);
    reconcile.env("AETERNA_MEMORY_INDEX_KEY", &key);
    let said = reconcile.arg("--data-dir").arg(path("other")).output().await.unwrap();
    let output = String::from_utf8_lossy(&said.stdout);
    let wanted = "memories: 0 were missing or different in the index, 0 were there and in no store";
    let errors = String::from_utf8_lossy(&said.stderr);
    assert!(said.status.success() && output.contains(wanted), "{output}{errors}");
    assert_eq!((cluster.stop().await, flat.stop().await), (Some(0), Some(0)));
    if let Some((lab, _)) = &lab {
        let (hosts, _) = uri.split_once("/lab").unwrap();
        let uri = format!("{hosts}/strict?replicas=2&consistency=2");
        let strict = copy(&server, &path("strict"), &uri, &key).await;
        takes_nothing_and_says_so(lab, &mut Client::new(strict.channel())).await;
        assert_eq!(strict.stop().await, Some(0));
    }
}

/// With as many replicas wanted as there are, a node that is away keeps the index from changes; searches say so, and have all
/// of them once it is back.
async fn takes_nothing_and_says_so(lab: &Lab, client: &mut Client) {
    let node = &lab.members()[0];
    lab.kill(node, Part::All).await.unwrap();
    let told: Vec<String> = (0..40).map(|number| format!("Fay counted {number} herons")).collect();
    fill(client, OURS, &told).await;
    // One that the index lacks is not the nearest, and it is said that some may be missing.
    let missing = async {
        loop {
            for query in &told {
                let (dense, away) = found(client, query, SearchMode::Dense, "").await;
                if away && dense.first().is_none_or(|first| first.0 != *query) {
                    return;
                }
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), missing).await.unwrap();
    lab.start(node).unwrap();
    let back = async {
        for query in &told {
            loop {
                let (dense, away) = found(client, query, SearchMode::Dense, "").await;
                if !away && dense.first().is_some_and(|first| first.0 == *query) {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), back).await.unwrap();
}

/// Without the cluster memories are stored and found by their words, and the answer says so.
async fn goes_and_comes_back(lab: &Lab, client: &mut Client) {
    let nodes: Vec<String> = lab.members();
    for node in &nodes {
        lab.kill(node, Part::All).await.unwrap();
    }
    let told = "Eve invented the zeppelin";
    fill(client, OURS, &[told.to_owned()]).await;
    let (words, away) = found(client, "zeppelin", SearchMode::Hybrid, "").await;
    assert!(away && words[0].0 == told, "{words:?}");
    for node in &nodes {
        lab.start(node).unwrap();
    }
    let back = async {
        loop {
            let (dense, away) = found(client, told, SearchMode::Dense, "").await;
            if !away && dense.first().is_some_and(|first| first.0 == told) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), back).await.unwrap();
    lab.vectors_whole(Duration::from_secs(60)).await.unwrap();
}
