use std::collections::HashSet;

use super::super::conformance;
use super::*;

fn layout(store: &str, model: &str) -> Layout {
    of_size(store, model, 128)
}

fn of_size(store: &str, model: &str, dimension: usize) -> Layout {
    Layout {
        store: store.into(),
        model: model.into(),
        dimension,
        prefix: dimension,
        learned: 0,
    }
}

#[tokio::test]
async fn conforms_and_is_the_same_when_it_is_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let open =
        |store: &str, model: &str, end: i64| FlatIndex::open(dir.path(), layout(store, model), Sequence(end)).unwrap();
    let Opened::Fresh(index, _) = open("s", "m@1", 0) else {
        panic!("an empty directory has no index")
    };
    let index = Arc::new(index);
    conformance::vector_index(&index).await;
    let some: HashSet<Key> = index.some(20, None).into_iter().collect();
    let has = |wanted: fn(&Key) -> bool| some.iter().any(wanted);
    assert!((10..=20).contains(&some.len()) && has(|key| key.0 < 50) && has(|key| key.0 > 250));
    drop(index);
    let Opened::Intact(index) = open("s", "m@1", 7) else {
        panic!("it was flushed")
    };
    assert_eq!((index.len(), index.watermark()), (301, Sequence(7)));
    drop(index);
    for (store, model, end, word) in [
        ("s", "m@1", 6, "ahead"),
        ("other", "m@1", 9, "another store"),
        ("s", "n@1", 9, "m@1"),
    ] {
        // Each opening begins a new index, which is made whole for the next round.
        let Opened::Fresh(index, why) = open(store, model, end) else {
            panic!("{word}: such an index is of no use")
        };
        assert!(index.is_empty() && why.contains(word), "{why}");
        drop(index);
        let Opened::Fresh(index, _) = open("s", "m@1", 0) else {
            panic!("it was not flushed")
        };
        conformance::vector_index(&Arc::new(index)).await;
    }
    let Opened::Intact(index) = open("s", "m@1", 7) else {
        panic!("it was flushed")
    };
    conformance::a_cleared_index_is_filled_anew(&Arc::new(index)).await;
}

#[test]
fn every_flipped_bit_of_the_manifest_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let open = || FlatIndex::open(dir.path(), layout("s", "m@1"), Sequence(1_000_000)).unwrap();
    let Opened::Fresh(index, _) = open() else {
        panic!("it is new")
    };
    index.apply(&[], &[], Sequence(77)).unwrap();
    index.flush().unwrap();
    drop(index);
    let path = dir.path().join("manifest.json");
    let good = std::fs::read(&path).unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1;
        std::fs::write(&path, &bad).unwrap();
        assert!(
            matches!(open(), Opened::Fresh(..)),
            "byte {at}: {}",
            String::from_utf8_lossy(&bad)
        );
    }
    std::fs::write(&path, &good).unwrap();
    assert!(matches!(open(), Opened::Intact(_)));
}

#[test]
fn signs_find_what_the_rows_find() {
    // One block, as the signs of which send more on; blocks that fill no group of words; and more of them than are unrolled.
    for dimension in [64, 320, 576] {
        signs_find(dimension);
    }
}

fn signs_find(dimension: usize) {
    // Enough vectors that the signs are used, in clusters, as texts are.
    let dir = tempfile::tempdir().unwrap();
    let Opened::Fresh(index, _) = FlatIndex::open(dir.path(), of_size("s", "m@1", dimension), Sequence(0)).unwrap()
    else {
        panic!("it is new")
    };
    let near = |centre: u32, seed: u32| {
        let (a, b) = (
            conformance::vector(centre, dimension),
            conformance::vector(seed, dimension),
        );
        let mixed: Vec<f32> = a.iter().zip(&b).map(|(a, b)| 0.7 * a + 0.7 * b).collect();
        Code::encode(&mixed).unwrap()
    };
    let entry = |n: u32| Entry {
        key: Key(i64::from(n)),
        tenant: TenantId::local(),
        scope: ScopeKey(1),
        code: Some(near(n % 400, 1_000_000 + n)),
        text: String::new(),
    };
    let entries: Vec<Entry> = (0..20_000).map(entry).collect();
    index.apply(&entries, &[], Sequence(1)).unwrap();
    let among = Among {
        tenant: TenantId::local(),
        scopes: [ScopeKey(1)].into_iter().collect(),
        only: None,
        exclude: FxHashSet::default(),
    };
    let mut found = 0;
    for n in 0..50u32 {
        let query = near(n, 9_000_000 + n);
        let funnel: Vec<Key> = index
            .search(&query, &among, 10)
            .into_iter()
            .map(|(key, _)| key)
            .collect();
        let inner = index.read();
        let rows = Rows::new(inner.files.rows(), dimension);
        let all: Vec<u32> = (0..20_000).collect();
        let exact = rows.best(&index.shorten(&among.tenant, &query), &all, 10);
        found += exact
            .iter()
            .filter(|(slot, _)| funnel.contains(&inner.keys[*slot as usize]))
            .count();
    }
    assert!(found >= 495, "{found} of 500 in {dimension} dimensions");

    // What a filter chooses is compared whole, however little it is: 10 %, 1 % and 0.1 % of all.
    for share in [10, 100, 1000u32] {
        let chosen: Vec<u32> = (0..20_000).filter(|n| n % share == 7 % share).collect();
        let among = Among {
            only: Some(chosen.iter().map(|n| Key(i64::from(*n))).collect()),
            ..among.clone()
        };
        let query = near(3, 9_000_003);
        let funnel = index.search(&query, &among, 10);
        let inner = index.read();
        let exact = Rows::new(inner.files.rows(), dimension).best(&index.shorten(&among.tenant, &query), &chosen, 10);
        let exact: Vec<(Key, f32)> = exact
            .iter()
            .map(|(slot, score)| (inner.keys[*slot as usize], *score))
            .collect();
        assert_eq!(funnel, exact, "1 in {share}");
    }
}

#[test]
fn numbers_beyond_a_row_are_refused_and_leave_the_index_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let open = || FlatIndex::open(dir.path(), layout("s", "m@1"), Sequence(9)).unwrap();
    let Opened::Fresh(index, _) = open() else {
        panic!("it is new")
    };
    let entry = |key: i64, scope: i64| Entry {
        key: Key(key),
        tenant: TenantId::local(),
        scope: ScopeKey(scope),
        code: Code::encode(&conformance::vector(7, 128)),
        text: String::new(),
    };
    let most = BEYOND - 1;
    index.apply(&[entry(most, most)], &[], Sequence(1)).unwrap();
    for (key, scope) in [(BEYOND, 1), (-1, 1), (1, BEYOND), (1, i64::MIN)] {
        let refused = index.apply(&[entry(2, 2), entry(key, scope)], &[], Sequence(2));
        assert!(refused.unwrap_err().to_string().contains("47 bits"), "{key} {scope}");
    }
    index.flush().unwrap();
    drop(index);
    let Opened::Intact(index) = open() else {
        panic!("it was flushed")
    };
    assert_eq!((index.len(), index.watermark()), (1, Sequence(1)));
    let among = Among {
        tenant: TenantId::local(),
        scopes: [ScopeKey(most)].into_iter().collect(),
        only: None,
        exclude: FxHashSet::default(),
    };
    let query = Code::encode(&conformance::vector(7, 128)).unwrap();
    assert_eq!(index.search(&query, &among, 5)[0].0, Key(most));
}

#[tokio::test]
async fn each_tenant_is_written_searched_and_compared_by_its_own_rotation() {
    // The vectors of one tenant lie in the first dimensions, those of the other in the last ones, and each is cut to half.
    let vector = |tenant: &str, n: u32| {
        let mut vector = conformance::vector(n, 128);
        let (low, high) = vector.split_at_mut(64);
        if tenant == "low" { high } else { low }.fill(0.0);
        Code::encode(&vector).unwrap()
    };
    let tenants = ["low", "high"].map(|name| (name, name.parse::<TenantId>().unwrap()));
    let own: [(TenantId, Vec<Vec<f32>>); 2] = tenants.clone().map(|(name, tenant)| {
        let vectors = (0..2_048).map(|n| vector(name, 10_000 + n).decode());
        (tenant, vectors.collect())
    });
    let sample = crate::store::Sample {
        // Directions of one alone, which would hide the other's vectors.
        all: own[0].1.clone(),
        own: own.to_vec(),
    };
    let (rotations, _) = Rotations::learn(&sample, &|| false).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let cut = Layout {
        prefix: 64,
        learned: 4_096,
        ..layout("s", "m@1")
    };
    let index = FlatIndex::create_learned(dir.path(), &cut, rotations).unwrap();
    let entries: Vec<Entry> = (0..2_000u32)
        .map(|n| {
            let (name, tenant) = &tenants[n as usize % 2];
            Entry {
                key: Key(i64::from(n) + 1),
                tenant: tenant.clone(),
                scope: ScopeKey(i64::from(n) % 2 + 1),
                code: Some(vector(name, n)),
                text: String::new(),
            }
        })
        .collect();
    index.apply(&entries, &[], Sequence(1)).unwrap();
    index.flush().unwrap();
    drop(index);
    let index = Arc::new(FlatIndex::open_learned(dir.path(), &cut, Sequence(1)).unwrap());
    for entry in entries.iter().step_by(37) {
        let among = Arc::new(Among {
            tenant: entry.tenant.clone(),
            scopes: [entry.scope].into_iter().collect(),
            only: None,
            exclude: FxHashSet::default(),
        });
        let found = index.search(entry.code.clone().unwrap(), among, 5).await.unwrap();
        let (best, score) = found[0];
        assert_eq!(best, entry.key);
        assert!(score > 0.3, "it is there as a whole: {score}");
    }
    let mut others = entries.clone();
    others.iter_mut().for_each(|entry| {
        let (_, other) = tenants.iter().find(|(_, tenant)| *tenant != entry.tenant).unwrap();
        entry.tenant = other.clone();
    });
    let whole = index.unlike(entries).await.unwrap();
    assert!(whole.is_empty(), "{} differ", whole.len());
    assert_eq!(index.unlike(others).await.unwrap().len(), 2_000);
}
