//! The port of the vector index.

use aeterna_types::TenantId;
use rustc_hash::FxHashSet;

use super::code;
use crate::domain::{Key, ScopeKey, Sequence};
use crate::store::{Among, Changes, Entry, VectorIndex};

/// On an empty index, which takes vectors of 128 dimensions.
pub async fn vector_index(index: &dyn VectorIndex) {
    let tenant = |name: &str| name.parse::<TenantId>().unwrap();
    let entry = |key: i64, scope: i64| Entry {
        key: Key(key),
        tenant: tenant("one"),
        scope: ScopeKey(scope),
        code: Some(code(key as u32)),
        text: format!("number {key} of kind {}", key % 7),
    };
    let apply = async |upserts: Vec<Entry>, removals: &[i64], at: i64| {
        let changes = Changes {
            upserts,
            removals: removals.iter().map(|key| Key(*key)).collect(),
            at: Sequence(at),
        };
        index.apply(changes).await.unwrap();
        index.fill_all(index.filled().map_or(Key(0), |(filled, _)| filled), Sequence(at));
    };
    let counted = async || {
        index.tend().await.unwrap();
        (index.len(), index.watermark())
    };
    apply((1..=300).map(|key| entry(key, key % 3)).collect(), &[], 5).await;
    assert_eq!(counted().await, (300, Some(Sequence(5))));
    let search = async |query: u32, places: &[i64], exclude: &[i64], limit: usize| {
        let among = Among {
            tenant: tenant("one"),
            scopes: places.iter().map(|key| ScopeKey(*key)).collect(),
            only: None,
            exclude: exclude.iter().map(|key| Key(*key)).collect(),
        };
        let found = index.search(code(query), among.into(), limit).await.unwrap();
        assert!(found.is_sorted_by(|a, b| a.1 >= b.1), "best first");
        found.into_iter().map(|(key, _)| key.0).collect::<Vec<_>>()
    };
    assert_eq!(
        search(42, &[0, 1, 2], &[], 1).await,
        [42],
        "a vector is nearest to itself"
    );
    assert!(!search(42, &[1, 2], &[], 300).await.contains(&42), "not in its scope");
    assert_eq!(search(42, &[0], &[], 300).await.len(), 100, "filters are exact");
    assert!(!search(42, &[0], &[42], 300).await.contains(&42), "left out");
    assert!(search(42, &[], &[], 10).await.is_empty() && search(42, &[9], &[], 10).await.is_empty());

    let among = Among {
        tenant: tenant("one"),
        scopes: [0, 1, 2].map(ScopeKey).into_iter().collect(),
        only: Some([Key(7), Key(42), Key(5000)].into_iter().collect()),
        exclude: FxHashSet::default(),
    };
    let found = index.search(code(42), among.into(), 10).await.unwrap();
    let found: Vec<i64> = found.iter().map(|(key, _)| key.0).collect();
    assert_eq!(found, [42, 7], "only the chosen ones");

    // Where texts are kept, they are found by their words, in the same places; one without a vector as well.
    if index.keeps_texts() {
        let find = async |words: &str, places: &[i64], exclude: &[i64]| {
            let among = Among {
                tenant: tenant("one"),
                scopes: places.iter().map(|key| ScopeKey(*key)).collect(),
                only: None,
                exclude: exclude.iter().map(|key| Key(*key)).collect(),
            };
            let terms = aeterna_text::analyse(words);
            let found = index.lexical(terms, among.into(), 100).await.unwrap();
            found.into_iter().map(|key| key.0).collect::<Vec<_>>()
        };
        assert_eq!(find("number 42", &[0, 1, 2], &[]).await[0], 42, "rare words count");
        assert!(!find("42", &[1, 2], &[]).await.contains(&42) && !find("42", &[0], &[42]).await.contains(&42));
        assert!(find("absent", &[0, 1, 2], &[]).await.is_empty() && find("42", &[], &[]).await.is_empty());
        let mut pending = entry(500, 1);
        pending.code = None;
        apply(vec![pending], &[], 5).await;
        assert_eq!((find("500", &[1], &[]).await, counted().await.0), (vec![500], 300));
        apply(Vec::new(), &[500], 5).await;
        assert!(find("500", &[1], &[]).await.is_empty());
    }

    // An upsert replaces, a removal removes, and an older watermark does not turn time back.
    apply(vec![entry(42, 1)], &[41, 999], 6).await;
    index.advance(Sequence(4));
    assert_eq!(counted().await, (299, Some(Sequence(6))));
    assert_eq!(search(42, &[1], &[], 1).await, [42]);
    assert!(!search(41, &[0, 1, 2], &[], 300).await.contains(&41));
    // What was removed may come again, and repeating changes nothing.
    for _ in 0..2 {
        apply(vec![entry(41, 2), entry(301, 0)], &[], 7).await;
    }
    assert_eq!(counted().await, (300 + 1, Some(Sequence(7))));
}

/// On an index that has something: the store was put back to an earlier time, and it is filled anew. It says nothing until it is.
pub async fn a_cleared_index_is_filled_anew(index: &dyn VectorIndex) {
    index.clear().await.unwrap();
    index.tend().await.unwrap();
    assert_eq!((index.len(), index.watermark()), (0, None));
    index.advance(Sequence(8));
    assert_eq!(index.watermark(), None);
    let entry = Entry {
        key: Key(1),
        tenant: "one".parse().unwrap(),
        scope: ScopeKey(0),
        code: Some(code(1)),
        text: String::new(),
    };
    let changes = Changes {
        upserts: vec![entry],
        removals: Vec::new(),
        at: Sequence(9),
    };
    index.apply(changes).await.unwrap();
    index.fill_all(Key(1), Sequence(9));
    index.tend().await.unwrap();
    assert_eq!((index.len(), index.watermark()), (1, Some(Sequence(9))));
}
