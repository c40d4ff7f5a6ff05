//! What is in memory is what the database says, whatever is written meanwhile and by whom.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use aeterna_storage::SqliteOptions;
use aeterna_types::{Layer, MemoryId, Scope, TenantId, Timestamp};

use super::super::SqliteStore;
use super::{Lexicon, Words, reading};
use crate::domain::{Key, ScopeKey, Sequence};
use crate::store::conformance::past::{replaced, visible};
use crate::store::conformance::search::{find, rescoring};
use crate::store::conformance::{MODEL, add, addition, body, change, code, listing, scope, writer};
use crate::store::{Change, Relational as _};

async fn open(dir: &tempfile::TempDir, cache: u64) -> SqliteStore {
    let options = SqliteOptions {
        path: dir.path().join("memory.db"),
        busy_timeout: Duration::from_secs(5),
        readers: 4,
    };
    SqliteStore::open(&options, cache).await.unwrap()
}

/// Waits until words are in memory.
async fn warm(store: &SqliteStore) {
    Arc::clone(&store.resident).follow_all(store).await;
    for _ in 0..500 {
        if matches!(reading(&store.resident.inner).words, Lexicon::Whole(_)) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("words are not in memory: {:?}", reading(&store.resident.inner).words);
}

impl super::Resident {
    async fn follow_all(self: Arc<Self>, store: &SqliteStore) {
        if self.begins() {
            super::Resident::fill(store.clone()).await;
        }
        let follow = move |connection: &aeterna_storage::rusqlite::Connection| {
            while !self.follow(connection) {}
            Ok(())
        };
        store.read(follow).await.unwrap();
    }
}

/// Numbers that look random and are the same in each run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33) as usize % sides
    }

    fn text(&mut self) -> String {
        let count = 1 + self.roll(12);
        let words: Vec<String> = (0..count)
            // Some words are in many texts, most in few.
            .map(|_| format!("word{}", self.roll(6) * self.roll(6) * self.roll(6)))
            .collect();
        words.join(" ")
    }
}

const TENANTS: [&str; 2] = ["one", "two"];

/// What BM25 says of each of a tenant's memories, by the texts that the store lists.
async fn by_hand(store: &SqliteStore, tenant: &str, terms: &[String]) -> HashMap<Key, f64> {
    let mut all = listing(tenant, (1..=8).map(ScopeKey).collect());
    all.limit = 10_000;
    let listed = store.list(&all).await.unwrap();
    let texts: Vec<(Key, Vec<String>)> = listed
        .iter()
        .filter(|stored| stored.memory.scope.get(Layer::Company) == Some(tenant))
        .map(|stored| (stored.key, aeterna_text::analyse(&stored.memory.body.lexical_text())))
        .collect();
    // The mark of its scope is a word, too.
    let length = |text: &Vec<String>| text.len() as f64 + 1.0;
    let average = texts.iter().map(|(_, text)| length(text)).sum::<f64>() / texts.len() as f64;
    let times = |text: &Vec<String>, term: &String| text.iter().filter(|word| *word == term).count() as f64;
    let mut scores = HashMap::new();
    for term in terms {
        let with = texts.iter().filter(|(_, text)| text.contains(term)).count() as f64;
        let rarity = ((texts.len() as f64 - with + 0.5) / (with + 0.5)).ln().max(1e-6);
        for (key, text) in texts.iter().filter(|(_, text)| text.contains(term)) {
            let norm = 1.2 * (0.25 + 0.75 * length(text) / average);
            *scores.entry(*key).or_default() += rarity * times(text, term) * 2.2 / (times(text, term) + norm);
        }
    }
    scores
}

fn person(tenant: &str, name: &str) -> Scope {
    scope(Layer::Company, tenant).with(Layer::User, name).unwrap()
}

#[tokio::test]
async fn words_rank_by_what_is_there_and_as_the_tables_do() {
    let dir = tempfile::tempdir().unwrap();
    let (store, tables) = (open(&dir, 1 << 24).await, open(&dir, 0).await);
    let mut dice = Dice(7);
    let mut there: Vec<(&str, MemoryId)> = Vec::new();
    let mut compared = 0;
    for round in 0..12 {
        for _ in 0..40 {
            let tenant = TENANTS[dice.roll(2)];
            // At first there are only additions: the tables go on counting what was deleted or changed.
            match if round < 4 { 0 } else { dice.roll(4) } {
                0 | 1 => {
                    let name = ["ann", "bob"][dice.roll(2)];
                    let item = addition(person(tenant, name), body(&dice.text()), None);
                    // The same text once more is merged with the first.
                    let added = add(&store, tenant, vec![item]).await.remove(0).unwrap();
                    there.push((tenant, added.memory.id));
                }
                2 => {
                    let (tenant, id) = there[dice.roll(there.len())];
                    let to = replaced(&dice.text());
                    // What another memory says already is refused.
                    let _ = change(&store, &writer(tenant, 1), id, None, to, None).await;
                }
                _ => {
                    let (tenant, id) = there.swap_remove(dice.roll(there.len()));
                    let how = if dice.roll(2) == 0 {
                        Change::Delete
                    } else {
                        Change::Purge
                    };
                    // Merged ones are there only once.
                    let _ = change(&store, &writer(tenant, 1), id, None, how, None).await;
                }
            }
        }
        if round == 2 {
            warm(&store).await;
        }
        for _ in 0..10 {
            let tenant = TENANTS[dice.roll(2)];
            let mut scopes = visible(&store, tenant, &person(tenant, "ann")).await;
            if dice.roll(2) == 0 {
                scopes.extend(visible(&store, tenant, &person(tenant, "bob")).await);
            }
            let mut terms = aeterna_text::analyse(&dice.text());
            terms.sort();
            terms.dedup();
            let (name, limit): (TenantId, usize) = (tenant.parse().unwrap(), 1 + dice.roll(50));
            let here = find(&store, &name, &scopes, &terms, None, limit).await.unwrap();
            let wanted = find(&tables, &name, &scopes, &terms, None, 1000).await.unwrap();
            assert_eq!(here.len(), wanted.len().min(limit));
            if round < 4 {
                for ((_, score), (_, wanted)) in here.iter().zip(&wanted) {
                    assert!(
                        (score - wanted).abs() < 1e-9,
                        "round {round} {terms:?} {here:?} {wanted:?}"
                    );
                }
            }
            if round > 2 {
                let scores = by_hand(&store, tenant, &terms).await;
                let mut best: Vec<f64> = wanted.iter().map(|(key, _)| scores[key]).collect();
                best.sort_by(|a, b| b.total_cmp(a));
                for (place, (key, score)) in here.iter().enumerate() {
                    // Of sums that differ in the last digit, either order is right.
                    assert!(
                        (score - scores[key]).abs() < 1e-9 && (score - best[place]).abs() < 1e-9,
                        "{round}"
                    );
                }
                compared += usize::from(!here.is_empty());
            }
        }
    }
    assert!(compared > 50, "{compared}");
    store.close().await;
    tables.close().await;
}

#[tokio::test]
async fn an_acknowledged_write_is_found_at_once_whoever_searches_meanwhile() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, 1 << 24).await;
    let ann = scope(Layer::User, "ann");
    let first = add(&store, "busy", vec![addition(ann.clone(), body("gem0"), Some(0))]).await;
    let id = first.into_iter().next().unwrap().unwrap().memory.id;
    let scopes = visible(&store, "busy", &ann).await;
    let tenant: TenantId = "busy".parse().unwrap();
    let ended = Arc::new(AtomicBool::new(false));
    let searchers: Vec<_> = (0..4)
        .map(|_| {
            let (store, ended, scopes, tenant) = (store.clone(), Arc::clone(&ended), scopes.clone(), tenant.clone());
            tokio::spawn(async move {
                let mut count = 0;
                while !ended.load(Ordering::SeqCst) {
                    find(&store, &tenant, &scopes, &["gem1".into()], None, 10)
                        .await
                        .unwrap();
                    store.cosines(&tenant, &rescoring(&[Key(1)], 1)).await.unwrap();
                    count += 1;
                }
                count
            })
        })
        .collect();
    for round in 1..200u32 {
        let to = Change::Replace {
            body: Box::new(body(&format!("gem{round}"))),
            vector: addition(ann.clone(), body("x"), Some(round)).vector,
            reindex: true,
        };
        change(&store, &writer("busy", 1), id, None, to, None).await.unwrap();
        let found = async |round: u32| {
            let found = find(&store, &tenant, &scopes, &[format!("gem{round}")], None, 10).await;
            found.unwrap().len()
        };
        assert_eq!((found(round).await, found(round - 1).await), (1, 0), "round {round}");
        let near = store.cosines(&tenant, &rescoring(&[Key(1)], round)).await.unwrap();
        assert!(near.len() == 1 && near[0].1 > 0.99, "round {round}: {near:?}");
    }
    ended.store(true, Ordering::SeqCst);
    for searcher in searchers {
        assert!(searcher.await.unwrap() > 0);
    }
    assert!(matches!(reading(&store.resident.inner).words, Lexicon::Whole(_)));
    store.close().await;
}

#[tokio::test]
async fn what_a_reader_of_the_past_has_read_is_not_kept() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, 1 << 24).await;
    let ann = scope(Layer::User, "ann");
    let first = add(&store, "past", vec![addition(ann, body("gem"), Some(1))]).await;
    let id = first.into_iter().next().unwrap().unwrap().memory.id;
    let (begun, begins) = tokio::sync::oneshot::channel();
    let (go, goes) = std::sync::mpsc::channel();
    let (slow, resident) = (store.clone(), Arc::clone(&store.resident));
    let slow = tokio::spawn(async move {
        let read = move |connection: &aeterna_storage::rusqlite::Connection| {
            assert!(resident.follow(connection));
            begun.send(()).unwrap();
            goes.recv().unwrap();
            resident.cosines(connection, &rescoring(&[Key(1)], 1), true)
        };
        slow.read(read).await.unwrap()
    });
    begins.await.unwrap();
    let code = code(2);
    let put = store.put_codes(MODEL, &[(id, 1, code)], Timestamp::default()).await;
    assert_eq!(put.unwrap(), 1);
    store.events(Sequence::default(), 10).await.unwrap();
    go.send(()).unwrap();
    let near = slow.await.unwrap();
    assert!(near[0].1 > 0.99, "it sees its own state: {near:?}");
    let near = store
        .cosines(&"past".parse().unwrap(), &rescoring(&[Key(1)], 2))
        .await
        .unwrap();
    assert!(near[0].1 > 0.99, "{near:?}");
    store.close().await;
}

#[tokio::test]
async fn vectors_are_kept_as_far_as_there_is_room_and_no_longer_than_they_are_true() {
    let dir = tempfile::tempdir().unwrap();
    let limit = 20_000;
    let store = open(&dir, limit).await;
    let items = (1..=200).map(|n| addition(scope(Layer::User, "ann"), body(&format!("gem{n}")), Some(n)));
    let written = add(&store, "room", items.collect()).await;
    let tenant: TenantId = "room".parse().unwrap();
    let all: Vec<Key> = (1..=200).map(Key).collect();
    for round in 0..3 {
        let near = store.cosines(&tenant, &rescoring(&all, 77)).await.unwrap();
        let best = near.iter().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
        assert!(near.len() == 200 && best.0 == Key(77) && best.1 > 0.99, "round {round}");
        let held = store.cached_bytes() as u64;
        assert!(held > limit / 2 && held <= limit, "{held}");
    }
    // Another vector of the same text, which the background makes.
    let id = written[76].as_ref().unwrap().memory.id;
    assert_eq!(
        store
            .put_codes(MODEL, &[(id, 1, code(500))], Timestamp::default())
            .await
            .unwrap(),
        1
    );
    let near = store.cosines(&tenant, &rescoring(&[Key(77)], 500)).await.unwrap();
    assert!(near[0].1 > 0.99, "{near:?}");
    store.forget_model(MODEL).await.unwrap();
    assert_eq!(store.cached_bytes(), 0);
    assert!(store.cosines(&tenant, &rescoring(&all, 77)).await.unwrap().is_empty());
    store.close().await;
}

#[tokio::test]
async fn words_that_take_too_much_are_read_from_disk() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir, 10_000).await;
    let ann = scope(Layer::User, "ann");
    let items = (1..=300).map(|n| addition(ann.clone(), body(&format!("gem{n} stone")), Some(n)));
    add(&store, "much", items.collect()).await;
    // Vectors that were there before make room for words, as far as those may go.
    let all: Vec<Key> = (1..=300).map(Key).collect();
    let tenant: TenantId = "much".parse().unwrap();
    store.cosines(&tenant, &rescoring(&all, 1)).await.unwrap();
    assert!(store.cached_bytes() > 5_000);
    assert!(store.resident.begins() && !store.resident.begins());
    super::Resident::fill(store.clone()).await;
    assert!(matches!(reading(&store.resident.inner).words, Lexicon::Off));
    assert!(store.cached_bytes() <= 10_000);
    let scopes = visible(&store, "much", &ann).await;
    let found = find(&store, &tenant, &scopes, &["stone".into()], None, 500)
        .await
        .unwrap();
    assert_eq!(found.len(), 300);
    store.close().await;
}

#[test]
fn what_has_changed_often_takes_no_more_room() {
    let said = |number: usize| vec!["stone".to_owned(), format!("gem{number}")];
    let (mut words, mut fresh) = (Words::default(), Words::default());
    for round in 0..40 {
        for key in 0..100 {
            words.put(Key(key), ScopeKey(1), said(round * 100 + key as usize));
        }
    }
    (0..100).for_each(|key| fresh.put(Key(key), ScopeKey(1), said(3_900 + key as usize)));
    for terms in [["stone", "gem3907"], ["gem3899", "gem4000"]] {
        let terms = terms.map(str::to_owned);
        let ranked = words.search(&terms, &[ScopeKey(1)], None, 100).unwrap();
        assert_eq!(Some(&ranked), fresh.search(&terms, &[ScopeKey(1)], None, 100).as_ref());
        assert_eq!(ranked.len(), if terms[0] == "stone" { 100 } else { 0 });
    }
    // What is gone is cleared away once it is a quarter of all, and there are a thousand of it.
    assert!(
        words.bytes() < 15 * fresh.bytes(),
        "{} {}",
        words.bytes(),
        fresh.bytes()
    );
    let only = [Key(3), Key(500)].into_iter().collect();
    let ranked = words.search(&["stone".into()], &[ScopeKey(1), ScopeKey(2)], Some(&only), 10);
    assert_eq!(ranked.unwrap().len(), 1);
    assert!(
        words
            .search(&["stone".into()], &[ScopeKey(2)], None, 10)
            .unwrap()
            .is_empty()
    );
}

#[test]
fn the_rarest_words_decide_among_many_and_what_is_too_much_is_left_to_the_tables() {
    let mut words = Words::default();
    for key in 0..140_000 {
        let rare = format!("rare{}", key % 70_000);
        words.put(Key(key), ScopeKey(key % 2), vec!["stone".into(), rare]);
    }
    let both = [ScopeKey(0), ScopeKey(1)];
    let found = words
        .search(&["rare7".into(), "stone".into()], &both, None, 10)
        .unwrap();
    let keys: Vec<i64> = found.iter().map(|(key, _)| key.0).collect();
    assert_eq!(
        keys,
        [70_007, 7],
        "where many are looked at, what is everywhere does not count"
    );
    assert!(words.search(&["stone".into()], &both, None, 10).is_none());
}
