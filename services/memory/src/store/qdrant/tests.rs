use std::collections::{BTreeMap, HashSet};

use qdrant_client::qdrant::{CollectionParams, ReadConsistencyType, VectorParams};
use rustc_hash::FxHashSet;

use aeterna_testkit::lab::{Extent, Lab, Part, Scratch, Setup, secrets};

use super::*;
use crate::domain::ScopeKey;
use crate::store::{Entry, conformance};

const MODEL: &str = "test-model@1";

/// The cluster that `QDRANT_URL` names, or one of three nodes by the program `QDRANT_BIN`; without either there is nothing to
/// test here, and `make test-qdrant` asks for it.
async fn cluster() -> Option<(Arc<Cluster>, Option<(Lab, Scratch)>)> {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    if let Some(uri) = set("QDRANT_URL") {
        return Some((of(&uri, set("QDRANT_KEY")), None));
    }
    let programs = BTreeMap::from([("qdrant".to_owned(), set("QDRANT_BIN")?.into())]);
    let setup = Setup::of(Extent::Qdrant, programs);
    let place = Scratch::new();
    let lab = Lab::up(place.path(), setup, |_| ()).await.unwrap();
    let stranger = of(&lab.vectors(), None).index(MODEL, 128).tend().await;
    assert!(stranger.is_err(), "whoever has no key gets nothing");
    Some((of(&lab.vectors(), Some(secrets::QDRANT.to_owned())), Some((lab, place))))
}

fn of(uri: &str, key: Option<String>) -> Arc<Cluster> {
    let options = QdrantOptions::parse(uri.strip_prefix("qdrant:").unwrap())
        .unwrap()
        .with_key(key);
    let store = Uuid::now_v7().simple().to_string().chars().rev().collect();
    Arc::new(Cluster::new(options, store).unwrap())
}

fn entry(key: i64, tenant: &str, seed: u32) -> Entry {
    Entry {
        key: Key(key),
        tenant: tenant.parse().unwrap(),
        scope: ScopeKey(1),
        code: Code::encode(&conformance::vector(seed, 128)),
        text: format!("memory {key} of {tenant}"),
    }
}

fn changes(upserts: Vec<Entry>, removals: &[i64], at: i64) -> Changes {
    Changes {
        upserts,
        removals: removals.iter().copied().map(Key).collect(),
        at: Sequence(at),
    }
}

fn among(tenant: &str) -> Arc<Among> {
    Arc::new(Among {
        tenant: tenant.parse().unwrap(),
        scopes: [ScopeKey(1)].into_iter().collect(),
        only: None,
        exclude: FxHashSet::default(),
    })
}

async fn keys(index: &QdrantIndex, tenant: &str, seed: u32) -> Vec<i64> {
    let query = Code::encode(&conformance::vector(seed, 128)).unwrap();
    let found = index.search(query, among(tenant), 10).await.unwrap();
    found.into_iter().map(|(key, _)| key.0).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_conforms() {
    let Some((cluster, _lab)) = cluster().await else {
        return;
    };
    let index = cluster.index(MODEL, 128);
    assert_eq!(index.watermark(), None);
    index.tend().await.unwrap();
    assert_eq!(index.watermark(), None, "it is to be filled");
    // Whoever goes on with filling it begins where that was interrupted.
    index.fill_to(Key(0), Key(40), Sequence(3)).await.unwrap();
    let next = cluster.index(MODEL, 128);
    next.tend().await.unwrap();
    let filled = Some((Key(40), Sequence(3)));
    assert_eq!(
        (index.filled(), next.filled(), next.watermark()),
        (filled, filled, None)
    );
    conformance::vector_index(&index).await;
    // It has everything by now, whoever fills it still.
    next.fill_to(Key(40), Key(50), Sequence(3)).await.unwrap();
    // What it remembers is found by whoever comes next.
    let next = cluster.index(MODEL, 128);
    next.tend().await.unwrap();
    assert_eq!((next.len(), next.watermark()), (301, Some(Sequence(7))));
    assert_eq!(next.tend().await.unwrap().differs, None);
    // Settings that differ are told.
    let options = QdrantOptions {
        replicas: 1,
        shards: 2,
        ..cluster.options.clone()
    };
    let other = Arc::new(Cluster::new(options, cluster.store.clone()).unwrap());
    let index_of_other = other.index(MODEL, 128);
    index_of_other.tend().await.unwrap();
    let differs = index_of_other.tend().await.unwrap().differs.unwrap();
    assert!(
        differs.contains("`shards` is") && differs.contains("`replicas` is 2 and not 1"),
        "{differs}"
    );
    let wrong = cluster.index(MODEL, 64).tend().await.unwrap_err();
    assert!(matches!(wrong, StorageError::Broken(_)), "{wrong:?}");

    // Texts that another version of the analysis was made of are put in anew, whoever notices first.
    let mut older = requests::mark(&next.name, next.state().made.as_deref(), Sequence(7));
    older.payload.remove("analysis");
    let nodes = &cluster.nodes;
    let wrote = nodes.call(WRITE, async |node| node.overwrite_payload(older.clone()).await);
    wrote.await.unwrap();
    let (before, again) = (next.state().made.clone(), cluster.index(MODEL, 128));
    again.tend().await.unwrap();
    assert_eq!((again.watermark(), again.filled()), (None, None));
    assert!(before.is_some() && again.state().made != before);
    // What was removed since the place that was remembered is removed once more, and nothing counts as whole before.
    assert!(again.state().missed && again.state().safe == Sequence(7));
    let third = cluster.index(MODEL, 128);
    third.tend().await.unwrap();
    assert_eq!(third.state().made, again.state().made, "once is enough");
    next.tend().await.unwrap();
    assert_eq!(
        (next.watermark(), next.state().made.clone()),
        (None, again.state().made.clone())
    );

    // A collection that is lost is made anew.
    let old = cluster.index(MODEL, 128);
    old.tend().await.unwrap();
    cluster.delete(&cluster.name(MODEL)).await.unwrap();
    // Each node hears of it at its own time.
    let noticed = async {
        while index.apply(changes(vec![entry(1, "one", 1)], &[], 8)).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), noticed).await.unwrap();
    index.advance(Sequence(8));
    assert_eq!(index.watermark(), None);
    index.apply(changes(vec![entry(1, "one", 1)], &[], 8)).await.unwrap();
    assert_eq!(keys(&index, "one", 1).await, [1]);
    // Whoever has not noticed says nothing of the new one.
    old.advance(Sequence(9));
    let made = old.state().made.clone();
    old.remember(Some(Sequence(9)), made, true).await.unwrap();
    let next = cluster.index(MODEL, 128);
    next.tend().await.unwrap();
    assert_eq!((next.watermark(), next.filled()), (None, None));
    // And when it looks, it notices.
    old.tend().await.unwrap();
    assert_eq!(old.watermark(), None);
    assert_eq!(old.state().made, next.state().made);
    // What one has filled, another goes on with; and what was filled of a collection that is gone, nobody.
    next.fill_to(Key(0), Key(7), Sequence(9)).await.unwrap();
    assert!(old.fill_to(Key(3), Key(9), Sequence(9)).await.is_err());
    old.tend().await.unwrap();
    assert_eq!(old.filled(), Some((Key(7), Sequence(9))));
    old.fill_all(Key(3), Sequence(9));
    assert_eq!(old.watermark(), None);
    old.fill_all(Key(7), Sequence(9));
    assert_eq!(old.watermark(), Some(Sequence(9)));
    index.clear().await.unwrap();
    assert_eq!(index.watermark(), None);
    cluster.remove(MODEL).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_newer_stays() {
    let Some((cluster, _lab)) = cluster().await else {
        return;
    };
    let index = cluster.index(MODEL, 128);
    let apply = async |upserts: Vec<Entry>, removals: &[i64], at: i64| {
        index.apply(changes(upserts, removals, at)).await.unwrap();
    };
    // Places in the outbox are large.
    let base = 7 << 45;
    apply(
        vec![entry(1, "one", 10), entry(2, "one", 20), entry(3, "two", 10)],
        &[],
        base + 2,
    )
    .await;
    assert_eq!(keys(&index, "one", 10).await, [1, 2]);
    assert_eq!(
        keys(&index, "two", 10).await,
        [3],
        "no search crosses the wall between tenants"
    );
    // A writer that was held up comes late: with another vector, and with one that is removed since.
    apply(vec![entry(1, "one", 99)], &[], base + 1).await;
    assert_eq!(keys(&index, "one", 10).await, [1, 2]);
    apply(Vec::new(), &[1], base + 4).await;
    apply(vec![entry(1, "one", 10)], &[], base + 3).await;
    assert_eq!(keys(&index, "one", 10).await, [2], "what is removed stays so");
    // It can be compared with what it should be.
    let held = vec![
        entry(2, "one", 20),
        entry(3, "two", 11),
        entry(2, "two", 20),
        entry(9, "one", 1),
    ];
    assert_eq!(index.unlike(held).await.unwrap(), [Key(3), Key(2), Key(9)]);
    assert_eq!(index.present(vec![Key(1), Key(2), Key(9)]).await.unwrap(), [Key(2)]);
    assert_eq!(index.keys(Key(0), 10).await.unwrap(), [Key(2), Key(3)]);
    assert_eq!(index.keys(Key(2), 10).await.unwrap(), [Key(3)]);
    // What is remembered does not go back either.
    index.fill_all(Key(0), Sequence(base + 4));
    index.tend().await.unwrap();
    let late = cluster.index(MODEL, 128);
    late.prepare().await.unwrap();
    late.state().marked = Sequence::default();
    late.state().watermark = Some(Sequence(base));
    late.state().safe = Sequence(base);
    let made = late.state().made.clone();
    late.remember(Some(Sequence(base)), made, true).await.unwrap();
    let next = cluster.index(MODEL, 128);
    next.prepare().await.unwrap();
    assert_eq!(next.watermark(), Some(Sequence(base + 4)));
    cluster.remove(MODEL).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_may_be_away() {
    let Some((cluster, Some((lab, _place)))) = cluster().await else {
        return;
    };
    let index = cluster.index(MODEL, 128);
    let write = async |keys: std::ops::Range<i64>, at: i64| {
        let entries = keys.map(|key| entry(key, "one", key as u32)).collect();
        index.apply(changes(entries, &[], at)).await.unwrap();
        index.fill_all(Key(0), Sequence(at));
    };
    let all_found = async |upto: i64| {
        for key in 1..upto {
            assert_eq!(keys(&index, "one", key as u32).await.first(), Some(&key));
        }
    };
    write(1..100, 1).await;
    let others = (0..2_000).map(|n| entry(10_000 + n, "two", 50_000 + n as u32));
    index.apply(changes(others.collect(), &[], 1)).await.unwrap();
    assert!(matches!(index.tend().await.unwrap().condition, Condition::Well));
    // Of queries that are no memory's text, what is found of the exact ten nearest.
    let recall = async || {
        let mut found = 0;
        for query in 0..40 {
            let vector = conformance::vector(90_000 + query, 128);
            let cosine = |n: i64| {
                let other = conformance::vector(50_000 + n as u32, 128);
                vector.iter().zip(&other).map(|(a, b)| a * b).sum::<f32>()
            };
            let mut exact: Vec<i64> = (0..2_000).collect();
            exact.sort_by(|a, b| cosine(*b).total_cmp(&cosine(*a)));
            let near = index
                .search(Code::encode(&vector).unwrap(), among("two"), 20)
                .await
                .unwrap();
            let near: HashSet<i64> = near.into_iter().map(|(key, _)| key.0 - 10_000).collect();
            found += exact[..10].iter().filter(|key| near.contains(key)).count();
        }
        found as f64 / 400.0
    };
    let whole = recall().await;
    assert!(whole >= 0.99, "{whole}");
    lab.kill("qdrant2", Part::All).await.unwrap();
    let without_one = recall().await;
    assert!(
        without_one >= whole - 0.005,
        "{without_one}, and {whole} with all nodes"
    );
    write(100..200, 2).await;
    all_found(200).await;
    // A copy that starts now, and another model's collection, do without the node.
    cluster.index(MODEL, 128).tend().await.unwrap();
    cluster.index("another-model@1", 64).tend().await.unwrap();
    let care = index.tend().await.unwrap();
    assert!(
        matches!(care.condition, Condition::Weak(_)) && care.again.is_none(),
        "{care:?}"
    );
    lab.start("qdrant2").unwrap();
    lab.vectors_whole(Duration::from_secs(60)).await.unwrap();
    let care = index.tend().await.unwrap();
    assert!(matches!(care.condition, Condition::Well), "{care:?}");
    assert_eq!(
        care.again,
        Some(Sequence(1)),
        "what was written meanwhile is brought once more"
    );
    write(100..200, 2).await;
    index.repaired(Sequence(2));
    assert_eq!(index.tend().await.unwrap().again, None);
    // The one that was away has everything, when another one goes.
    lab.kill("qdrant1", Part::All).await.unwrap();
    all_found(200).await;
    lab.kill_all();
    let query = Code::encode(&conformance::vector(1, 128)).unwrap();
    assert!(index.search(query, among("one"), 10).await.is_err());
    assert!(index.tend().await.is_err());
}

fn offline() -> Arc<Cluster> {
    // Nobody listens on the discard port, and nothing is sent.
    let options = QdrantOptions::parse("//127.0.0.1:9,127.0.0.1:9,127.0.0.1:9/lab?consistency=2").unwrap();
    Arc::new(Cluster::new(options, "0123456789abcdef".into()).unwrap())
}

#[test]
fn a_collection_has_its_own_name_for_each_store_and_model() {
    let cluster = offline();
    let name = cluster.name("hash-en@1 [x]");
    assert!(name.starts_with("lab-0123456789ab-hash-en@1__x_-"), "{name}");
    assert_ne!(name, cluster.name("hash-en@1 (x)"));
    assert!(cluster.name(&"long".repeat(200)).len() < 255);
}

#[test]
fn requests_have_their_shape() {
    let cluster = offline();
    let made = requests::collection("c", 256, &cluster.options);
    assert_eq!(
        (
            made.shard_number,
            made.replication_factor,
            made.write_consistency_factor
        ),
        (Some(6), Some(2), Some(2))
    );
    let text = format!("{made:?}");
    for part in [
        "size: 256",
        "distance: Cosine",
        "\"dense\"",
        "payload_m: Some(16)",
        "m: Some(0)",
        "Scalar(",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    for part in ["\"lexical\"", "modifier: Some(Idf)", "on_disk: Some(true)"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let fields = format!("{:?}", requests::fields("c"));
    assert!(fields.contains("is_tenant: Some(true)"), "{fields}");

    // Points carry what they are chosen by, and an upsert passes over what is newer.
    let upsert = requests::upsert("c", 64, &[entry(5, "ann", 5)], Sequence(77));
    let removal = requests::remove("c", &[Key(6)], Sequence(77), 1_000);
    assert_eq!((upsert.wait, removal.wait), (Some(true), Some(true)));
    assert_eq!(upsert.update_filter, removal.update_filter);
    let filter = format!("{:?}", upsert.update_filter.unwrap());
    assert!(
        filter.contains("\"at\"") && filter.contains("lte: Some(77.0)"),
        "{filter}"
    );
    let ([there], [gone]) = (&upsert.points[..], &removal.points[..]) else {
        panic!("a point each")
    };
    let payload = |point: &qdrant_client::qdrant::PointStruct| {
        let mut fields: Vec<String> = point.payload.keys().cloned().collect();
        fields.sort();
        fields.join(" ")
    };
    assert_eq!(
        (payload(there), payload(gone)),
        ("at scope tenant".into(), "at gone".into())
    );
    let vectors = |point: &qdrant_client::qdrant::PointStruct| format!("{:?}", point.vectors);
    assert!(vectors(there).contains("dense") && !vectors(gone).contains("dense"));

    // Tenant and scopes are always asked for, and what is chosen and left out.
    let query = Code::encode(&conformance::vector(1, 128)).unwrap();
    let mut wanted = Among {
        exclude: [Key(3)].into_iter().collect(),
        ..(*among("ann")).clone()
    };
    let shape = |among: &Among| format!("{:?}", requests::nearest("c", 64, &query, among, 9).unwrap().filter);
    let text = shape(&wanted);
    for part in ["Keyword(\"ann\")", "\"scope\"", "must_not: [Condition"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    // Words by their checksums, each as much as the server says that it tells.
    let terms = ["boat".to_owned(), "boat".to_owned(), "sails".to_owned()];
    let words = requests::lexical("c", &terms, &wanted, 9).unwrap();
    let text = format!("{words:?}");
    for part in [
        "values: [1.0, 1.0]",
        "using: Some(\"lexical\")",
        "Keyword(\"ann\")",
        "limit: Some(9)",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let near = requests::nearest("c", 64, &query, &wanted, 9).unwrap();
    let text = format!("{:?} {:?}", near.params, near.using);
    for part in ["hnsw_ef: Some(256)", "rescore: Some(false)", "\"dense\""] {
        assert!(text.contains(part), "{part}: {text}");
    }
    // One replica is asked, unless it is said otherwise.
    assert_eq!(requests::read(near.clone(), None).read_consistency, None);
    let quorum = requests::read(near, Some(ReadConsistencyType::Quorum)).read_consistency;
    assert!(format!("{quorum:?}").contains("Type(Quorum)"), "{quorum:?}");
    // The mark moves only where it speaks of the same making of the collection.
    let mark = format!("{:?}", requests::mark("c", Some("m1"), Sequence(5)));
    assert!(
        mark.contains("lte: Some(5.0)") && mark.contains("Keyword(\"m1\")"),
        "{mark}"
    );
    let fill = format!("{:?}", requests::fill_to("c", None, Key(7), Sequence(5)));
    assert!(fill.contains("lte: Some(0.0)") && fill.contains("IsEmpty"), "{fill}");
    wanted.only = Some([Key(3), Key(4)].into_iter().collect());
    let text = shape(&wanted);
    assert!(text.contains("Num(4)") && !text.contains("Num(3)"), "{text}");
    wanted.only = Some(FxHashSet::default());
    assert!(
        requests::nearest("c", 64, &query, &wanted, 9).is_none(),
        "nothing is allowed"
    );
}

#[test]
fn a_collection_that_is_not_as_it_should_be_is_told() {
    let index = offline().index(MODEL, 128);
    let compare = |change: fn(&mut CollectionParams)| {
        let made = requests::collection("c", 128, &index.cluster.options);
        let mut params = CollectionParams {
            shard_number: made.shard_number.unwrap(),
            replication_factor: made.replication_factor,
            write_consistency_factor: made.write_consistency_factor,
            vectors_config: made.vectors_config,
            sparse_vectors_config: made.sparse_vectors_config,
            ..CollectionParams::default()
        };
        change(&mut params);
        let config = CollectionConfig {
            params: Some(params),
            ..CollectionConfig::default()
        };
        match index.compare(config) {
            Ok(differs) => differs.join(", "),
            Err(error) => error.to_string(),
        }
    };
    fn dense(params: &mut CollectionParams) -> &mut VectorParams {
        match params.vectors_config.as_mut().unwrap().config.as_mut().unwrap() {
            vectors_config::Config::ParamsMap(named) => named.map.get_mut(requests::DENSE).unwrap(),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(compare(|_| ()), "");
    for (change, part) in [
        (
            (|params| dense(params).size = 64) as fn(&mut CollectionParams),
            "64 dimensions",
        ),
        (
            |params| dense(params).set_distance(Distance::Dot),
            "compares vectors by Dot",
        ),
        (|params| dense(params).quantization_config = None, "not quantized"),
        (|params| dense(params).hnsw_config = None, "`payload_m`"),
        (|params| params.sparse_vectors_config = None, "keeps no texts"),
        (
            |params| {
                let texts = params.sparse_vectors_config.as_mut().unwrap();
                texts.map.get_mut(requests::LEXICAL).unwrap().modifier = None;
            },
            "`idf`",
        ),
        (|params| params.shard_number = 1, "`shards` is 1 and not 6"),
        (
            |params| params.replication_factor = Some(1),
            "`replicas` is 1 and not 2",
        ),
        (
            |params| params.write_consistency_factor = None,
            "`consistency` is 1 and not 2",
        ),
    ] {
        let said = compare(change);
        assert!(said.contains(part), "{part}: {said}");
    }
}

#[tokio::test]
async fn nodes_that_do_not_answer_are_left_alone_for_a_moment() {
    let cluster = offline();
    let index = cluster.index(MODEL, 128);
    let query = Code::encode(&conformance::vector(1, 128)).unwrap();
    let mut said = String::new();
    for _ in 0..4 {
        let error = index.search(query.clone(), among("one"), 3).await.unwrap_err();
        said = format!("{error:?}");
    }
    assert!(said.contains("left alone"), "{said}");
}

#[tokio::test]
async fn another_node_is_asked_when_one_does_not_answer() {
    use qdrant_client::QdrantError;
    use tonic::Status;
    let cluster = offline();
    let calls = Mutex::new(Vec::new());
    let asked = |answer: fn(usize) -> Option<Result<u32, Status>>| {
        let calls = &calls;
        calls.lock().unwrap().clear();
        cluster.nodes.call(SEARCH, move |_| {
            let mut calls = calls.lock().unwrap();
            calls.push(());
            let place = calls.len();
            async move {
                match answer(place) {
                    Some(answer) => answer.map_err(QdrantError::from),
                    None => std::future::pending().await,
                }
            }
        })
    };
    // Away, and hanging: the third one answers.
    let away = asked(|place| match place {
        1 => Some(Err(Status::unavailable("connection refused"))),
        2 => None,
        _ => Some(Ok(7)),
    });
    assert_eq!(away.await.unwrap(), 7);
    assert_eq!(calls.lock().unwrap().len(), 3);
    // It is asked first from now on.
    assert_eq!(asked(|_| Some(Ok(8))).await.unwrap(), 8);
    assert_eq!(calls.lock().unwrap().len(), 1);
    // All of them hang: half the time for each, and no more than all of it.
    let began = Instant::now();
    assert!(matches!(asked(|_| None).await, Err(Failed::Away(_))));
    assert!(
        began.elapsed() <= SEARCH + Duration::from_millis(500),
        "{:?}",
        began.elapsed()
    );
    // What one refuses, all do.
    let refused = asked(|_| Some(Err(Status::invalid_argument("no")))).await;
    assert!(matches!(refused, Err(Failed::Refused(_))));
    assert_eq!(calls.lock().unwrap().len(), 1);
    assert!(matches!(
        asked(|_| Some(Err(Status::not_found("c")))).await,
        Err(Failed::Missing)
    ));
}

#[test]
fn a_loss_is_made_good_from_before_it() {
    let cluster = offline();
    let index = cluster.index(MODEL, 128);
    index.state().ready = true;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let at = |at: i64| {
        index.fill_all(Key(0), Sequence(at));
        index.state().marked = Sequence(1_000);
        index.watermark()
    };
    let tended = |watermark, well| runtime.block_on(index.remember(watermark, None, well)).unwrap();
    assert_eq!(tended(at(10), true), None);
    assert_eq!(tended(at(20), false), None, "not before all of it is back");
    assert_eq!(tended(at(30), true), Some(Sequence(10)));
    assert_eq!(tended(at(40), true), Some(Sequence(10)), "until it is done");
    index.repaired(Sequence(40));
    assert_eq!(tended(at(50), true), None);
    assert_eq!(index.state().safe, Sequence(50));
}

#[test]
fn versions_are_compared_as_numbers() {
    assert!(version("1.18.3").unwrap() > OLDEST && version("1.9.7").unwrap() < OLDEST);
    assert_eq!(version("dev"), None);
}
