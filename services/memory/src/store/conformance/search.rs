//! What a search reads.

use aeterna_types::{Layer, TenantId};

use super::{MODEL, add, addition, everything, scope, turn, vector};
use crate::domain::{Key, ScopeKey};
use crate::error::MemoryError;
use crate::filter::Filter;
use crate::store::{LexicalSearch, Relational, Rescoring, Scoring, Sight};

/// Everything of a tenant.
pub fn sight(tenant: &TenantId) -> Sight {
    Sight {
        tenant: tenant.clone(),
        view: everything(),
        layers: Vec::new(),
        filter: None,
        exclude: Vec::new(),
        now: None,
    }
}

fn lexical(scopes: &[ScopeKey], terms: &[String], filter: Option<&Filter>, limit: usize) -> LexicalSearch {
    LexicalSearch {
        scopes: scopes.to_vec(),
        terms: terms.to_vec(),
        filter: filter.cloned(),
        as_of: None,
        among: None,
        candidates: None,
        limit,
    }
}

/// Memories compared with a vector.
pub fn rescoring(keys: &[Key], seed: u32) -> Rescoring {
    Rescoring {
        model: MODEL.into(),
        keys: keys.to_vec(),
        vector: vector(seed, 128),
    }
}

/// The lexical arm alone.
pub async fn find(
    store: &dyn Relational,
    tenant: &TenantId,
    scopes: &[ScopeKey],
    terms: &[String],
    filter: Option<&Filter>,
    limit: usize,
) -> Result<Vec<(Key, f64)>, MemoryError> {
    let scoring = Scoring {
        lexical: Some(lexical(scopes, terms, filter, limit)),
        ..Scoring::of(tenant)
    };
    store.scored(&scoring).await.map(|scored| scored.lexical)
}

/// The turns beside some.
pub async fn neighbours(store: &dyn Relational, tenant: &TenantId, keys: &[Key]) -> Vec<(Key, Key)> {
    let scoring = Scoring {
        neighbours: Some(keys.to_vec()),
        ..Scoring::of(tenant)
    };
    store.scored(&scoring).await.unwrap().neighbours
}

pub async fn the_arms_of_a_search_are_read_together(store: &dyn Relational) {
    let tenant: TenantId = "arms".parse().unwrap();
    let ann = scope(Layer::User, "ann");
    let items = (1..=4).map(|n| addition(ann.clone(), turn(&format!("gem{n}"), n.into()), (n != 3).then_some(n)));
    let written = add(store, "arms", items.collect()).await;
    let written: Vec<_> = written.into_iter().map(Result::unwrap).collect();
    let foreign = addition(ann.clone(), turn("gem1", 1), Some(1));
    let foreign = add(store, "another", vec![foreign]).await.remove(0).unwrap();

    // What is left out is named by the tenant's own ids; another's tell nothing.
    let mut sight = sight(&tenant);
    sight.exclude = vec![written[3].memory.id, foreign.memory.id];
    let seen = store.seen(&sight).await.unwrap();
    assert_eq!((seen.scopes.len(), seen.hidden.len(), seen.matching), (1, 1, None));
    sight.layers = vec![Layer::Agent];
    assert!(store.seen(&sight).await.unwrap().scopes.is_empty());

    let keys = async |terms: &str| {
        let terms = aeterna_text::analyse(terms);
        let found = find(store, &tenant, &seen.scopes, &terms, None, 10).await.unwrap();
        found.into_iter().map(|(key, _)| key).collect::<Vec<_>>()
    };
    let mut all = keys("gem1 gem2 gem3 gem4").await;
    all.sort();
    // Those that an index has found are worth what they are worth anyway; another tenant's are not among them.
    let terms = aeterna_text::analyse("gem1 gem2 gem3 gem4");
    let ranked = find(store, &tenant, &seen.scopes, &terms, None, 10).await.unwrap();
    let mut candidates = lexical(&seen.scopes, &terms, None, 10);
    candidates.candidates = Some((1..=all[3].0 + 10).map(Key).collect());
    let scoring = Scoring {
        lexical: Some(candidates),
        ..Scoring::of(&tenant)
    };
    assert_eq!(store.scored(&scoring).await.unwrap().lexical, ranked);
    let scoring = Scoring {
        tenant: tenant.clone(),
        lexical: Some(lexical(&seen.scopes, &aeterna_text::analyse("gem1"), None, 10)),
        dense: Some(rescoring(&all, 2)),
        neighbours: Some(Vec::new()),
    };
    let scored = store.scored(&scoring).await.unwrap();
    assert_eq!(scored.lexical.iter().map(|(key, _)| *key).collect::<Vec<_>>(), [all[0]]);
    let dense = scored.dense.unwrap();
    assert_eq!(dense.len(), 3, "the third has no vector: {dense:?}");
    let nearest = dense.iter().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    assert!(nearest.0 == all[1] && nearest.1 > 0.99, "{dense:?}");
    // What the words have found and the index has not is compared as well, where vectors are.
    let few = Scoring {
        dense: Some(rescoring(&all[1..2], 1)),
        ..scoring
    };
    let both = store.scored(&few).await.unwrap().dense.unwrap();
    let nearest = both.iter().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    assert!(both.len() == 2 && nearest.0 == all[0] && nearest.1 > 0.99, "{both:?}");
    let mut pairs = scored.neighbours;
    pairs.sort();
    assert_eq!(
        pairs,
        [(all[0], all[1]), (all[1], all[0]), (all[1], all[2]), (all[3], all[2])],
        "of the candidates of both arms"
    );
}
