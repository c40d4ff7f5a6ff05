//! What every adapter of the ports must do. A new adapter calls these suites; they need an empty store each.

mod filters;
mod limits;
pub(crate) mod past;
pub(crate) mod search;
mod vectors;

use std::sync::Arc;

use aeterna_types::{Layer, MemoryId, Scope, TenantId, Timestamp};

use super::code::Code;
use super::{Addition, Change, ChangeItem, Listing, Relational, StoredVector};
use crate::domain::{Body, Idempotency, Key, Kind, Outcome, ScopeKey, Sequence, Source, Subject, View, Writer};
use crate::error::MemoryError;
use crate::filter::Filter;
use search::{find, neighbours, rescoring, sight};
pub use vectors::{a_cleared_index_is_filled_anew, vector_index};

pub(crate) const MODEL: &str = "m@1";

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_parts(1_700_000_000 + seconds, 0).unwrap()
}

pub(crate) fn writer(tenant: &str, seconds: i64) -> Writer {
    Writer {
        tenant: tenant.parse().unwrap(),
        subject: "ann".into(),
        now: at(seconds),
    }
}

pub(crate) fn scope(layer: Layer, id: &str) -> Scope {
    Scope::default().with(layer, id).unwrap()
}

/// A body that says this.
pub fn body(content: &str) -> Body {
    Body::of(content.into())
}

fn turn(content: &str, sequence: i64) -> Body {
    Body {
        source: Source {
            conversation: "c".into(),
            sequence: Some(sequence),
            ..Source::default()
        },
        ..body(content)
    }
}

/// A unit vector, the same for the same seed.
pub fn vector(seed: u32, dimension: usize) -> Vec<f32> {
    let mut state = seed;
    let mut vector: Vec<f32> = (0..dimension)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        })
        .collect();
    let norm = vector.iter().map(|x| x * x).sum::<f32>().sqrt();
    vector.iter_mut().for_each(|x| *x /= norm);
    vector
}

pub(crate) fn code(seed: u32) -> Code {
    Code::encode(&vector(seed, 128)).unwrap()
}

pub(crate) fn addition(scope: Scope, body: Body, seed: Option<u32>) -> Addition {
    Addition {
        scope,
        body,
        vector: seed.map(|seed| StoredVector {
            model: MODEL.into(),
            code: code(seed),
        }),
        most: None,
        idempotency: None,
    }
}

fn idempotency(id: &str, digest: u8) -> Idempotency {
    Idempotency {
        request_id: id.parse().unwrap(),
        digest: [digest; 32],
    }
}

fn view(scope: Scope) -> View {
    View { scope, exact: true }
}

fn everything() -> View {
    View {
        scope: Scope::default(),
        exact: false,
    }
}

pub(crate) fn listing(tenant: &str, scopes: Vec<ScopeKey>) -> Listing {
    Listing {
        tenant: tenant.parse().unwrap(),
        scopes,
        before: None,
        limit: 100,
        filter: None,
        show_deleted: false,
        now: at(100),
        as_of: None,
    }
}

/// One change; the store's own failures end the test.
pub async fn change(
    store: &dyn Relational,
    writer: &Writer,
    id: MemoryId,
    etag: Option<&str>,
    change: Change,
    idempotency: Option<Idempotency>,
) -> Result<crate::domain::Written, MemoryError> {
    let item = ChangeItem {
        id,
        etag: etag.map(str::to_owned),
        made_of: None,
        change,
        idempotency,
    };
    store.change(writer, vec![item]).await.unwrap().remove(0)
}

pub(crate) async fn add(
    store: &dyn Relational,
    tenant: &str,
    items: Vec<Addition>,
) -> Vec<Result<crate::domain::Written, MemoryError>> {
    store.add(&writer(tenant, 0), items).await.unwrap()
}

/// The relational port.
pub async fn relational(store: Arc<dyn Relational>) {
    let store = store.as_ref();
    writes_are_merged_versioned_and_replayed(store).await;
    limits::tags_that_are_united_have_an_end(store).await;
    limits::a_scope_takes_what_it_has_room_for(store).await;
    tenants_and_scopes_are_walls(store).await;
    words_and_neighbours_are_found(store).await;
    search::the_arms_of_a_search_are_read_together(store).await;
    vectors_of_what_is_deleted_do_not_count(store).await;
    notes_are_kept(store).await;
    the_outbox_tells_the_index_everything(store).await;
    filters::mean_what_the_language_says(store).await;
    what_expires_is_told_and_reaped(store).await;
    what_is_purged_leaves_nothing_behind(store).await;
    no_tenant_counts_in_anothers_scores(store).await;
    past::the_past_is_there_and_the_clock_may_go_back(store).await;
    past::documents_and_policies_are_kept(store).await;
    past::exports_are_imported_as_they_were(store).await;
}

/// Another model makes none of these, and must not wait for them.
async fn vectors_of_what_is_deleted_do_not_count(store: &dyn Relational) {
    let before = store.vectors_by(MODEL).await.unwrap();
    let items = vec![addition(scope(Layer::Team, "counted"), body("counted"), Some(11))];
    let added = add(store, "counted", items).await.remove(0).unwrap().memory;
    assert_eq!(store.vectors_by(MODEL).await.unwrap(), before + 1);
    let gone = change(store, &writer("counted", 1), added.id, None, Change::Delete, None).await;
    gone.unwrap();
    assert_eq!(store.vectors_by(MODEL).await.unwrap(), before);
}

async fn notes_are_kept(store: &dyn Relational) {
    assert_eq!(store.note("models").await.unwrap(), None);
    for value in ["one", "two"] {
        store.put_note("models", value).await.unwrap();
        assert_eq!(store.note("models").await.unwrap().as_deref(), Some(value));
    }
    assert_eq!(
        store.note("store").await.unwrap(),
        None,
        "what the store keeps itself is no note"
    );
}

async fn writes_are_merged_versioned_and_replayed(store: &dyn Relational) {
    let ann = scope(Layer::User, "ann");
    let tagged = Body {
        tags: vec!["b".into()],
        importance: 0.9,
        ..body("one")
    };
    let items = vec![
        addition(ann.clone(), body("one"), Some(1)),
        addition(ann.clone(), tagged, None),
        addition(ann.clone(), body("two"), None),
    ];
    let written: Vec<_> = add(store, "t1", items).await.into_iter().map(Result::unwrap).collect();
    let outcomes: Vec<Outcome> = written.iter().map(|w| w.outcome).collect();
    assert_eq!(outcomes, [Outcome::Created, Outcome::Merged, Outcome::Created]);
    assert_eq!(written[0].memory.id, written[1].memory.id);
    assert_eq!((written[1].memory.version, written[1].memory.body.importance), (2, 0.9));
    assert!(written[0].sequence < written[1].sequence && written[1].sequence < written[2].sequence);
    assert_eq!(written[0].memory.embedding_model, MODEL);
    let tenant: TenantId = "t1".parse().unwrap();
    let places = [
        (ann.clone(), body("one").identity()),
        (ann.clone(), body("nine").identity()),
        (scope(Layer::User, "bob"), body("one").identity()),
    ];
    assert_eq!(store.known(&tenant, &places).await.unwrap(), [true, false, false]);

    // The same request answers the same; with another body it is refused.
    let mut item = addition(ann.clone(), body("three"), None);
    item.idempotency = Some(idempotency("r", 1));
    let first = add(store, "t1", vec![item.clone()]).await.remove(0).unwrap();
    let again = add(store, "t1", vec![item.clone()]).await.remove(0).unwrap();
    assert_eq!(first, again);
    assert_eq!(
        store.replay(&writer("t1", 9), &idempotency("r", 1)).await.unwrap(),
        Some(first)
    );
    item.idempotency = Some(idempotency("r", 2));
    let refused = add(store, "t1", vec![item, addition(ann.clone(), body("four"), None)]).await;
    assert!(matches!(refused[0], Err(MemoryError::RequestIdReused)), "{refused:?}");
    assert!(refused[1].is_ok(), "one refusal does not touch the others");

    // Changes need the current etag, and leave a new one.
    let memory = &written[2].memory;
    let replace = |text: &str| Change::Replace {
        body: Box::new(body(text)),
        vector: None,
        reindex: true,
    };
    let changed = change(
        store,
        &writer("t1", 5),
        memory.id,
        Some(&memory.etag()),
        replace("2"),
        None,
    )
    .await
    .unwrap();
    assert_eq!((changed.memory.version, changed.memory.updated_at), (2, at(5)));
    let stale = change(
        store,
        &writer("t1", 6),
        memory.id,
        Some(&memory.etag()),
        replace("x"),
        None,
    )
    .await;
    assert!(matches!(stale, Err(MemoryError::EtagMismatch)), "{stale:?}");
    // Read where the last change is not known yet: with the caller's etag or without.
    for etag in [None, Some(changed.memory.etag())] {
        let item = ChangeItem {
            id: memory.id,
            etag,
            made_of: Some(memory.etag()),
            change: replace("x"),
            idempotency: None,
        };
        let behind = store.change(&writer("t1", 6), vec![item]).await.unwrap().remove(0);
        assert!(matches!(behind, Err(MemoryError::Stale)), "{behind:?}");
    }
    let twin = change(store, &writer("t1", 6), memory.id, None, replace("one"), None).await;
    assert!(matches!(twin, Err(MemoryError::Duplicate)), "{twin:?}");
    let gone = idempotency("d", 1);
    let deleted = change(
        store,
        &writer("t1", 7),
        memory.id,
        None,
        Change::Delete,
        Some(gone.clone()),
    )
    .await
    .unwrap();
    let repeated = change(store, &writer("t1", 8), memory.id, None, Change::Delete, Some(gone))
        .await
        .unwrap();
    assert_eq!(deleted, repeated);
    let twice = change(store, &writer("t1", 8), memory.id, None, Change::Delete, None).await;
    assert!(matches!(twice, Err(MemoryError::Deleted)), "{twice:?}");
    // What is deleted does not stand in the way of saying it again.
    let reborn = add(store, "t1", vec![addition(ann, body("2"), None)])
        .await
        .remove(0)
        .unwrap();
    assert_eq!(reborn.outcome, Outcome::Created);
    assert_ne!(reborn.memory.id, memory.id);
}

async fn tenants_and_scopes_are_walls(store: &dyn Relational) {
    let tenant: TenantId = "t2".parse().unwrap();
    let company = scope(Layer::Company, "acme");
    let ann = company.clone().with(Layer::User, "ann").unwrap();
    let items = [("for all", &company), ("for ann", &ann)];
    let items = items
        .map(|(text, scope)| addition(scope.clone(), body(text), None))
        .to_vec();
    let written = add(store, "t2", items).await;
    add(
        store,
        "t3",
        vec![addition(company.clone(), body("of another tenant"), None)],
    )
    .await;

    let contents = async |view: View, layers: &[Layer]| {
        let scopes = store.visible(&tenant, &view, layers).await.unwrap();
        let found = store.list(&listing("t2", scopes)).await.unwrap();
        found
            .into_iter()
            .map(|stored| stored.memory.body.content)
            .collect::<Vec<_>>()
    };
    assert_eq!(contents(view(ann.clone()), &[]).await, ["for ann", "for all"]);
    assert_eq!(contents(view(company.clone()), &[]).await, ["for all"]);
    assert_eq!(contents(everything(), &[]).await, ["for ann", "for all"]);
    assert_eq!(contents(view(ann.clone()), &[Layer::Company]).await, ["for all"]);
    assert!(contents(view(scope(Layer::User, "ann")), &[]).await.is_empty());

    let id = written[0].as_ref().unwrap().memory.id;
    assert!(store.get(&tenant, id).await.unwrap().is_some());
    assert!(store.get(&"t3".parse().unwrap(), id).await.unwrap().is_none());
    let foreign = change(store, &writer("t3", 1), id, None, Change::Delete, None).await;
    assert!(matches!(foreign, Err(MemoryError::NotFound(_))), "{foreign:?}");

    // Pages go on where the last one ended, and what has expired is on none.
    let expiring = Body {
        expires_at: Some(at(50)),
        ..body("gone soon")
    };
    add(store, "t2", vec![addition(ann.clone(), expiring, None)]).await;
    let scopes = store.visible(&tenant, &view(ann), &[]).await.unwrap();
    let mut page = listing("t2", scopes);
    page.limit = 1;
    let first = store.list(&page).await.unwrap().remove(0).memory;
    page.before = Some(first.id);
    let second = store.list(&page).await.unwrap().remove(0).memory;
    assert_eq!(
        (first.body.content.as_str(), second.body.content.as_str()),
        ("for ann", "for all")
    );
    page.show_deleted = true;
    page.before = None;
    assert_eq!(store.list(&page).await.unwrap()[0].memory.body.content, "gone soon");
}

async fn words_and_neighbours_are_found(store: &dyn Relational) {
    let tenant: TenantId = "t4".parse().unwrap();
    let place = scope(Layer::Session, "s");
    let texts = ["the cat sat", "on the mat", "cats and more cats", "of dogs"];
    let items = texts
        .iter()
        .zip(0..)
        .map(|(text, n)| addition(place.clone(), turn(text, n), None));
    let written = add(store, "t4", items.collect()).await;
    add(
        store,
        "t5",
        vec![addition(place.clone(), body("a cat elsewhere"), None)],
    )
    .await;
    let scopes = store.visible(&tenant, &view(place), &[]).await.unwrap();

    let find = async |scopes: &[ScopeKey], terms: &[String], filter: Option<&Filter>, limit: usize| {
        find(store, &tenant, scopes, terms, filter, limit).await
    };
    let terms = aeterna_text::analyse("a cat on a sofa");
    let found = find(&scopes, &terms, None, 10).await.unwrap();
    assert_eq!(found.len(), 2, "two memories of this tenant have the word: {found:?}");
    assert!(found[0].1 >= found[1].1 && found[1].1 > 0.0);
    assert_eq!(find(&scopes, &terms, None, 1).await.unwrap().len(), 1);
    assert!(find(&[], &terms, None, 10).await.unwrap().is_empty());
    assert!(find(&scopes, &[], None, 10).await.unwrap().is_empty());
    for hostile in ["\"", "a\" OR \"b", "NEAR(", "*", "scope:", "-", "^a"] {
        find(&scopes, &[hostile.to_owned()], None, 10).await.unwrap();
    }

    let fetched = store
        .fetch(&tenant, &found.iter().map(|(key, _)| *key).collect::<Vec<_>>(), at(0))
        .await
        .unwrap();
    let key = |content: &str| fetched.iter().find(|s| s.memory.body.content == content).unwrap().key;
    let (first, third) = (key("the cat sat"), key("cats and more cats"));
    let mut pairs = neighbours(store, &tenant, &[first, third]).await;
    pairs.sort();
    assert_eq!(
        pairs.len(),
        3,
        "one behind the first, one on each side of the third: {pairs:?}"
    );
    assert_eq!(pairs.iter().filter(|(turn, _)| *turn == third).count(), 2);

    // What is deleted is neither found nor anybody's neighbour.
    let id = written[1].as_ref().unwrap().memory.id;
    change(store, &writer("t4", 1), id, None, Change::Delete, None)
        .await
        .unwrap();
    assert_eq!(neighbours(store, &tenant, &[first]).await, []);
    let gone = aeterna_text::analyse("mat");
    assert!(find(&scopes, &gone, None, 10).await.unwrap().is_empty());
}

async fn the_outbox_tells_the_index_everything(store: &dyn Relational) {
    let before = store.last_sequence().await.unwrap();
    let place = scope(Layer::Team, "core");
    let items = vec![
        addition(place.clone(), body("with a vector"), Some(7)),
        addition(place.clone(), body("without"), None),
    ];
    let written = add(store, "t6", items).await;
    let events = store.events(before, 10).await.unwrap();
    assert_eq!(events.len(), 2);
    assert_eq!(events[1].sequence, store.last_sequence().await.unwrap());
    assert_eq!(store.events(before, 1).await.unwrap().len(), 1);
    for (place, there) in [
        (Sequence::default(), true),
        (events[0].sequence, true),
        (Sequence(events[1].sequence.0 + 1), false),
    ] {
        assert_eq!(store.has(place).await.unwrap(), there, "{place:?}");
    }
    let keys: Vec<Key> = events.iter().map(|event| event.key).collect();
    let states = store.states(MODEL, &keys).await.unwrap();
    let coded = |key: Key| states.iter().find(|state| state.key == key).unwrap().code.clone();
    assert_eq!((coded(keys[0]), coded(keys[1])), (Some(code(7)), None));

    // The pending one is found, made up, and then pending no more.
    let last = Key(keys[0].0.min(keys[1].0) - 1);
    let pending = store.scan(MODEL, last, 10, true).await.unwrap();
    assert_eq!(pending.iter().map(|state| state.key).collect::<Vec<_>>(), [keys[1]]);
    assert_eq!(pending[0].text, "without");
    let before = store.last_sequence().await.unwrap();
    assert_eq!(
        store
            .put_codes(MODEL, &[(pending[0].id, 7, code(9))], at(0))
            .await
            .unwrap(),
        0,
        "of a version that is not current"
    );
    assert_eq!(
        store
            .put_codes(MODEL, &[(pending[0].id, pending[0].version, code(8))], at(0))
            .await
            .unwrap(),
        1
    );
    let told = store.events(before, 10).await.unwrap();
    assert_eq!(
        told.iter().map(|event| event.key).collect::<Vec<_>>(),
        [keys[1]],
        "the index is told of it"
    );
    assert!(store.scan(MODEL, last, 10, true).await.unwrap().is_empty());
    assert_eq!(
        store.vectors(None, MODEL, &[keys[1]]).await.unwrap(),
        [(keys[1], code(8).decode())]
    );
    let near = store
        .cosines(&"t6".parse().unwrap(), &rescoring(&[keys[1]], 8))
        .await
        .unwrap();
    assert!(near.len() == 1 && near[0].1 > 0.999, "{near:?}");
    assert!(store.vectors(None, "another@1", &keys).await.unwrap().is_empty());
    let id = written[1].as_ref().unwrap().memory.id;
    let stored = store.get(&"t6".parse().unwrap(), id).await.unwrap().unwrap();
    assert_eq!(stored.memory.embedding_model, MODEL);

    change(store, &writer("t6", 1), id, None, Change::Delete, None)
        .await
        .unwrap();
    assert_eq!(
        store.states(MODEL, &keys).await.unwrap().len(),
        1,
        "a deleted one has no state"
    );
    assert_eq!(store.events(told[0].sequence, 10).await.unwrap().len(), 1);
}

async fn what_expires_is_told_and_reaped(store: &dyn Relational) {
    let tenant: TenantId = "t8".parse().unwrap();
    let place = scope(Layer::User, "ann");
    let until = |seconds: Option<i64>| Body {
        expires_at: seconds.map(at),
        ..body("parking on level 3")
    };
    let first = add(store, "t8", vec![addition(place.clone(), until(Some(10)), None)])
        .await
        .remove(0)
        .unwrap();
    let hidden = async |now: i64| {
        let mut sight = sight(&tenant);
        sight.now = Some(at(now));
        store.seen(&sight).await.unwrap().hidden.len()
    };
    assert_eq!((hidden(9).await, hidden(10).await), (0, 1));
    // Said again with a later end, or without one, it lives on.
    for (seconds, wanted) in [
        (Some(5), Some(at(10))),
        (Some(20), Some(at(20))),
        (None, None),
        (Some(9), None),
    ] {
        let merged = add(store, "t8", vec![addition(place.clone(), until(seconds), None)])
            .await
            .remove(0)
            .unwrap();
        assert_eq!(
            (merged.memory.id, merged.memory.body.expires_at),
            (first.memory.id, wanted)
        );
    }
    let gone = Body {
        expires_at: Some(at(30)),
        ..body("gone")
    };
    let gone = add(store, "t8", vec![addition(place, gone, Some(3))])
        .await
        .remove(0)
        .unwrap();
    let before = store.last_sequence().await.unwrap();
    assert_eq!(store.reap(at(29), 1000).await.unwrap(), 0);
    assert_eq!(store.reap(at(31), 1000).await.unwrap(), 1);
    assert_eq!(store.reap(at(31), 1000).await.unwrap(), 0);
    let reaped = store.get(&tenant, gone.memory.id).await.unwrap().unwrap().memory;
    assert_eq!((reaped.deleted_at, reaped.version), (Some(at(31)), 2));
    assert!(store.last_sequence().await.unwrap() > before, "the index is told");
}

async fn what_is_purged_leaves_nothing_behind(store: &dyn Relational) {
    let tenant: TenantId = "t11".parse().unwrap();
    let place = scope(Layer::User, "ann");
    let mut item = addition(place.clone(), body("a secret to forget"), Some(4));
    item.idempotency = Some(idempotency("add", 1));
    let added = add(store, "t11", vec![item, addition(place, body("kept"), Some(5))]).await;
    let [secret, kept] = [0, 1].map(|at| added[at].as_ref().unwrap().memory.id);
    let text = Change::Replace {
        body: Box::new(body("a secret to forget, changed")),
        vector: None,
        reindex: false,
    };
    change(store, &writer("t11", 1), secret, None, text, None)
        .await
        .unwrap();
    change(store, &writer("t11", 2), secret, None, Change::Delete, None)
        .await
        .unwrap();
    let versions = store.history(&tenant, secret, None, 10).await.unwrap();
    let told: Vec<_> = versions
        .iter()
        .map(|v| (v.memory.version, v.kind, v.changed_at))
        .collect();
    assert_eq!(
        told,
        [
            (3, Kind::Deleted, at(2)),
            (2, Kind::Updated, at(1)),
            (1, Kind::Added, at(0))
        ]
    );
    assert_eq!(versions[2].memory.body.content, "a secret to forget");
    assert_eq!(
        store.history(&tenant, secret, Some(3), 1).await.unwrap(),
        versions[1..2]
    );
    assert!(
        store
            .history(&"t1".parse().unwrap(), secret, None, 10)
            .await
            .unwrap()
            .is_empty()
    );

    let scopes = store.visible(&tenant, &everything(), &[]).await.unwrap();
    let counts = store.counts(&tenant, MODEL, &scopes, at(3)).await.unwrap();
    assert_eq!(
        (counts.layers.as_slice(), counts.deleted, counts.pending),
        (&[(Layer::User, 1, 4)][..], 1, 0)
    );
    assert!(counts.embedding_bytes > 0);

    let foreign = change(store, &writer("t1", 3), secret, None, Change::Purge, None).await;
    assert!(matches!(foreign, Err(MemoryError::NotFound(_))), "{foreign:?}");
    let before = store.last_sequence().await.unwrap();
    let again = Some(idempotency("purge", 1));
    let purged = change(store, &writer("t11", 3), secret, None, Change::Purge, again.clone())
        .await
        .unwrap();
    assert_eq!((purged.memory.id, purged.memory.body.content.as_str()), (secret, ""));
    assert!(store.get(&tenant, secret).await.unwrap().is_none());
    assert!(store.history(&tenant, secret, None, 10).await.unwrap().is_empty());
    // What the first write answered is forgotten too, and the purge itself can be repeated.
    assert_eq!(
        store.replay(&writer("t11", 4), &idempotency("add", 1)).await.unwrap(),
        None
    );
    assert_eq!(
        change(store, &writer("t11", 4), secret, None, Change::Purge, again)
            .await
            .unwrap(),
        purged
    );
    let told = store.events(before, 10).await.unwrap();
    assert_eq!(told.len(), 1, "the index is told");
    assert!(store.states(MODEL, &[told[0].key]).await.unwrap().is_empty());
    // Watchers are told of the removal, and of what is still there; of the secret's earlier changes nothing is left to tell.
    let changes = store.changes(Some(&tenant), Sequence::default(), 100).await.unwrap();
    let told: Vec<_> = changes
        .iter()
        .map(|change| match &change.subject {
            Subject::Memory(id, memory) => (*id, change.kind, memory.is_some()),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(told, [(kept, Kind::Added, true), (secret, Kind::Purged, false)]);
    assert_eq!(changes[1].scope, scope(Layer::User, "ann"));
    assert_eq!(
        store.changes(Some(&tenant), changes[0].sequence, 1).await.unwrap(),
        changes[1..]
    );
    assert!(store.changes(None, Sequence::default(), 1000).await.unwrap().len() > 2);
    assert!(store.get(&tenant, kept).await.unwrap().is_some());
    assert_eq!(store.counts(&tenant, MODEL, &scopes, at(5)).await.unwrap().deleted, 0);

    // Its number is nobody else's: an index that has not followed yet would show the next memory for it.
    let before = store.last_sequence().await.unwrap();
    let newest = |content: &str| vec![addition(scope(Layer::User, "ann"), body(content), None)];
    let gone = add(store, "t11", newest("the newest")).await;
    let gone = gone[0].as_ref().unwrap().memory.id;
    change(store, &writer("t11", 5), gone, None, Change::Purge, None)
        .await
        .unwrap();
    let next = add(store, "t11", newest("the next")).await;
    assert!(next[0].is_ok());
    let keys: Vec<Key> = store
        .events(before, 10)
        .await
        .unwrap()
        .iter()
        .map(|event| event.key)
        .collect();
    assert!(keys.len() == 3 && keys[0] == keys[1] && keys[2] != keys[0], "{keys:?}");
}

/// Adds one memory for a test of an adapter's own.
pub async fn one_memory(store: &dyn Relational, content: &str) {
    add(
        store,
        "one",
        vec![addition(scope(Layer::User, "ann"), body(content), None)],
    )
    .await;
}

/// How many memories of that kind have a word.
pub async fn words_found(store: &dyn Relational, word: &str) -> usize {
    let tenant: TenantId = "one".parse().unwrap();
    let scopes = store.visible(&tenant, &everything(), &[]).await.unwrap();
    let terms = aeterna_text::analyse(word);
    find(store, &tenant, &scopes, &terms, None, 10).await.unwrap().len()
}

async fn no_tenant_counts_in_anothers_scores(store: &dyn Relational) {
    let scores = async |tenant: &str| {
        let owner: TenantId = tenant.parse().unwrap();
        let scopes = store.visible(&owner, &everything(), &[]).await.unwrap();
        let terms = aeterna_text::analyse("projectx");
        find(store, &owner, &scopes, &terms, None, 10)
            .await
            .unwrap()
            .into_iter()
            .map(|(_, score)| score)
            .collect::<Vec<_>>()
    };
    let place = scope(Layer::User, "ann");
    let items = ["projectx is late", "nothing else"].map(|text| addition(place.clone(), body(text), None));
    add(store, "t9", items.to_vec()).await;
    let before = scores("t9").await;
    let items = (0..20).map(|n| addition(place.clone(), body(&format!("projectx {n}")), None));
    add(store, "t10", items.collect()).await;
    assert_eq!(scores("t9").await, before);
}
