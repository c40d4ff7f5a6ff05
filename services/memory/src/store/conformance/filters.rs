//! Filters mean on every store what the language says.

use std::collections::BTreeSet;

use aeterna_types::{Layer, TenantId};

use super::{add, addition, at, body, change, everything, find, listing, scope, writer};
use crate::domain::{Key, ScopeKey};
use crate::store::{Addition, Change, Relational};

/// Memories that differ in everything a filter can ask for.
fn varied(number: usize) -> Addition {
    use serde_json::json;
    let pick = |every: usize| number.is_multiple_of(every);
    let mut body = body(["alpha beta", "say \"hi\"", "100% _like_ \\", "Ärger 猫"][number % 4]);
    body.content.push_str(&format!(" {number}"));
    body.tags = ["a", "b", "c d"]
        .iter()
        .take(number % 4)
        .map(|tag| tag.to_string())
        .collect();
    body.importance = (number % 5) as f64 / 4.0;
    body.source.speaker = ["", "Ann", "Bob"][number % 3].into();
    // The largest are beyond what a double tells apart.
    let far = if pick(4) { 1 << 60 } else { 0 };
    body.source.sequence = pick(2).then_some(far + number as i64);
    body.source.conversation = if pick(2) { "c1".into() } else { String::new() };
    body.event_at = pick(3).then(|| at(number as i64));
    body.valid_at = pick(5).then(|| at(-(number as i64)));
    body.invalid_at = pick(4).then(|| at(number as i64));
    body.source.caption = if pick(3) { "a say".into() } else { String::new() };
    body.source.reference = ["", "x", "ref/1"][number % 3].into();
    body.superseded_by = pick(7).then(|| aeterna_types::MemoryId::new(at(1)));
    let metadata = match number % 6 {
        0 => json!({}),
        1 => json!({"k": "x", "n": 1.0, "o": {"p": "x", "q\"": 1.0}}),
        2 => json!({"k": 1.0, "n": -2.5, "l": ["x", 1.0, true, null]}),
        3 => json!({"k": null, "b": true, "l": []}),
        4 => json!({"k": "x y", "b": false, "o": {}, "l": "x"}),
        _ => json!({"k": ["x"], "n": "1", "b": "true", "o": {"p": {"k": 1.0}}}),
    };
    body.metadata = metadata.as_object().cloned().unwrap_or_default();
    let layer = [Layer::User, Layer::Team, Layer::Agent][number % 3];
    addition(scope(Layer::Company, "filters").with(layer, "x").unwrap(), body, None)
}

/// Tests of every field with every condition that the parser lets through, joined at random.
fn any_filter() -> impl proptest::strategy::Strategy<Value = String> {
    use proptest::prelude::*;
    const TEXTS: &[&str] = &[
        "content",
        "source.speaker",
        "source.conversation",
        "source.caption",
        "source.reference",
        "superseded_by",
        "id",
        "scope.user",
        "scope.company",
        "scope.team",
        "scope.agent",
        "scope.session",
    ];
    const WORDS: &[&str] = &[
        "alpha",
        "\"say \\\"hi\\\"\"",
        "\"100% _\"",
        "Ann",
        "c1",
        "\"\"",
        "\"\\\\\"",
        "猫",
        "x",
        "filters",
        "\"a say\"",
        "\"ref/1\"",
    ];
    const NUMBERS: &[&str] = &[
        "importance",
        "version",
        "source.sequence",
        "metadata.k",
        "metadata.n",
        "metadata.o.p.k",
        "metadata.none",
    ];
    const TIMES: &[&str] = &[
        "created_at",
        "updated_at",
        "event_at",
        "valid_at",
        "invalid_at",
        "expires_at",
        "deleted_at",
    ];
    const PATHS: &[&str] = &[
        "metadata.k",
        "metadata.n",
        "metadata.b",
        "metadata.l",
        "metadata.o",
        "metadata.o.p",
        "metadata.none",
        "metadata",
    ];
    const VALUES: &[&str] = &[
        "x",
        "1",
        "\"1\"",
        "true",
        "\"true\"",
        "false",
        "-2.5",
        "\"x y\"",
        "p",
        "\"q\\\"\"",
        "0.5",
    ];
    const ORDER: &[&str] = &["=", "!=", "<", "<=", ">", ">="];
    let text = (
        prop::sample::select(TEXTS),
        prop::sample::select(&["=", "!=", ":"][..]),
        prop::sample::select(WORDS),
    );
    let number = (
        prop::sample::select(NUMBERS),
        prop::sample::select(ORDER),
        prop::sample::select(
            &[
                "0",
                "1",
                "0.5",
                "-2.5",
                "3",
                "1152921504606846980",
                "1152921504606846980.5",
            ][..],
        ),
    );
    let time = (prop::sample::select(TIMES), prop::sample::select(ORDER), -20i64..20)
        .prop_map(|(field, sign, s)| format!("{field} {sign} \"{}\"", at(s)));
    let path = (
        prop::sample::select(PATHS),
        prop::sample::select(&["=", "!=", ":"][..]),
        prop::sample::select(VALUES),
    )
        .prop_filter("the metadata itself is not compared", |(path, sign, _)| {
            *path != "metadata" || *sign == ":"
        });
    let present =
        prop::sample::select([TEXTS, NUMBERS, TIMES, PATHS, &["tags"]].concat()).prop_map(|field| format!("{field}:*"));
    let leaf = prop_oneof![
        text.prop_map(|(a, b, c)| format!("{a}{b}{c}")),
        number.prop_map(|(a, b, c)| format!("{a}{b}{c}")),
        time,
        path.prop_map(|(a, b, c)| format!("{a} {b} {c}")),
        present,
        prop::sample::select(
            &[
                "tags:a",
                "tags:\"c d\"",
                "tags IN (b, z)",
                "layer = USER",
                "layer IN (team, agent)",
                "layer != user",
                "metadata.k = null",
                "metadata.none = null"
            ][..]
        )
        .prop_map(str::to_owned),
    ];
    leaf.prop_recursive(3, 12, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 1..4).prop_map(|all| format!("({})", all.join(" AND "))),
            prop::collection::vec(inner.clone(), 1..4).prop_map(|any| format!("({})", any.join(" OR "))),
            inner.prop_map(|one| format!("NOT ({one})")),
        ]
    })
}

pub async fn mean_what_the_language_says(store: &dyn Relational) {
    use proptest::strategy::{Strategy as _, ValueTree as _};
    let tenant: TenantId = "t7".parse().unwrap();
    let written = add(store, "t7", (0..42).map(varied).collect()).await;
    let gone = written[11].as_ref().unwrap().memory.id;
    change(store, &writer("t7", 9), gone, None, Change::Delete, None)
        .await
        .unwrap();
    let scopes = store.visible(&tenant, &everything(), &[]).await.unwrap();
    let mut page = listing("t7", scopes.clone());
    page.show_deleted = true;
    let all = store.list(&page).await.unwrap();
    assert_eq!(all.len(), 42);

    let mut runner = proptest::test_runner::TestRunner::default();
    let strategy = any_filter();
    let (mut some, mut none) = (0, 0);
    for _ in 0..1500 {
        let text = strategy.new_tree(&mut runner).unwrap().current();
        let filter = crate::filter::parse(&text)
            .unwrap_or_else(|error| panic!("{text}: {error}"))
            .unwrap();
        let mut wanted: Vec<Key> = all
            .iter()
            .filter(|s| filter.matches(&s.memory))
            .map(|s| s.key)
            .collect();
        page.filter = Some(filter.clone());
        let mut listed: Vec<Key> = store.list(&page).await.unwrap().into_iter().map(|s| s.key).collect();
        wanted.sort();
        listed.sort();
        assert_eq!(listed, wanted, "{text}\n{filter:?}");
        let deleted = all.iter().find(|s| s.memory.id == gone).unwrap().key;
        wanted.retain(|key| *key != deleted);
        let mut sight = super::sight(&tenant);
        sight.filter = Some(filter.clone());
        let mut matching = store.seen(&sight).await.unwrap().matching.unwrap();
        matching.sort();
        assert_eq!(matching, wanted, "{text}");
        if wanted.is_empty() { none += 1 } else { some += 1 }
    }
    assert!(some > 300 && none > 50, "the filters are of both kinds: {some} {none}");
    let find = async |scopes: &[ScopeKey], terms: &[String], filter: Option<&crate::filter::Filter>, limit: usize| {
        find(store, &tenant, scopes, terms, filter, limit).await
    };
    let terms = aeterna_text::analyse("alpha");
    let filter = crate::filter::parse("source.speaker = Ann").unwrap().unwrap();
    let found = find(&scopes, &terms, Some(&filter), 100).await.unwrap();
    let wanted = all
        .iter()
        .filter(|s| s.memory.body.content.contains("alpha") && filter.matches(&s.memory));
    assert!(!found.is_empty());
    assert_eq!(found.len(), wanted.count());

    // Of the past they mean what was then.
    for (number, written) in written.iter().enumerate().filter(|(number, _)| number % 2 == 0) {
        let change_to = Change::Replace {
            body: Box::new(varied(number + 101).body),
            vector: None,
            reindex: true,
        };
        let id = written.as_ref().unwrap().memory.id;
        change(store, &writer("t7", 50), id, None, change_to, None)
            .await
            .unwrap();
    }
    let then = at(20);
    let was: Vec<_> = all.iter().filter(|s| s.memory.deleted_at.is_none()).collect();
    (page.as_of, page.show_deleted) = (Some(then), false);
    let mut some = 0;
    for _ in 0..300 {
        let text = strategy.new_tree(&mut runner).unwrap().current();
        let filter = crate::filter::parse(&text).unwrap().unwrap();
        let wanted: Vec<_> = was.iter().filter(|s| filter.matches(&s.memory)).collect();
        let keys = |found: Vec<Key>| found.into_iter().collect::<BTreeSet<Key>>();
        page.filter = Some(filter.clone());
        let listed = store.list(&page).await.unwrap().into_iter().map(|s| s.key).collect();
        assert_eq!(keys(listed), keys(wanted.iter().map(|s| s.key).collect()), "{text}");
        let found = store.as_of(&tenant, &scopes, Some(&filter), then, 100).await.unwrap();
        let mut told = found.unchanged;
        told.extend(found.changed.into_iter().map(|earlier| earlier.key));
        let wanted = wanted.iter().filter(|s| s.memory.body.is_true(then));
        let wanted = keys(wanted.map(|s| s.key).collect());
        some += usize::from(!wanted.is_empty());
        assert_eq!(keys(told), wanted, "{text}");
    }
    assert!(some > 60, "{some}");
}
