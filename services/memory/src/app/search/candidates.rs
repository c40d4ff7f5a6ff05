//! The first half of a search: where to look, what vectors and words bring, fused, with neighbours.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use aeterna_error::Error;
use aeterna_rpc::RequestContext;
use aeterna_types::TenantId;
use aeterna_types::dimension::Chosen;

use super::dimensions::Measuring;
use super::past::Past;
use super::score::fuse;
use super::{App, Arms, Breakdown, SearchQuery, SearchStats, ms};
use crate::app::Serving;
use crate::app::get::view;
use crate::domain::{Key, ScopeKey, Sequence};
use crate::error::MemoryError;
use crate::store::code::Code;
use crate::store::{Among, LexicalSearch, Rescoring, Scoring, Seen, Sight};

/// Candidates asked of an arm, at least.
const CANDIDATES: usize = 200;

/// A search under way: the call, what answers it, and what is to be told of it.
pub(super) struct Run<'s> {
    app: &'s App,
    context: &'s RequestContext,
    query: &'s SearchQuery,
    /// What is looked for, each word once.
    terms: Vec<String>,
    /// The model and the index that answer it.
    pub serving: Arc<Serving>,
    /// Why the results may lack something.
    pub degraded: Vec<String>,
    /// What it did.
    pub stats: SearchStats,
    /// How long it takes, once it is known how many dimensions it compares.
    pub measuring: Option<Measuring<'s>>,
}

/// Where a search looks.
pub(super) struct Bounds {
    scopes: Vec<ScopeKey>,
    among: Arc<Among>,
    /// What there was at the time that is asked for.
    pub past: Option<Past>,
    /// The index lacks no write that must be seen and takes changes, or is not needed.
    followed: bool,
}

/// The candidates of the arms, fused, with their neighbours.
pub(super) struct Fused {
    /// The parts of each candidate's score that the arms bring.
    pub scores: HashMap<Key, Breakdown>,
    /// Dimensions that were compared; `None`: no vectors were.
    pub dimension: Option<usize>,
}

impl<'s> Run<'s> {
    pub(super) fn new(app: &'s App, context: &'s RequestContext, query: &'s SearchQuery) -> Self {
        let stats = SearchStats {
            terms: aeterna_text::analyse(&query.text),
            ..SearchStats::default()
        };
        let mut terms = stats.terms.clone();
        terms.sort();
        terms.dedup();
        Self {
            app,
            context,
            query,
            terms,
            serving: app.serving(),
            degraded: Vec::new(),
            stats,
            measuring: None,
        }
    }

    fn tenant(&self) -> &'s TenantId {
        &self.context.principal().tenant
    }

    /// Candidates asked of an arm.
    fn depth(&self) -> usize {
        CANDIDATES.max(4 * self.query.top_k)
    }

    /// Finds out where to look, once what must be seen is there.
    pub(super) async fn bounds(&mut self) -> Result<Bounds, Error> {
        let (app, query) = (self.app, self.query);
        app.store.reach(query.after).await?;
        let sight = Sight {
            tenant: self.tenant().clone(),
            view: view(self.context, query.scope.as_ref())?,
            layers: query.layers.clone(),
            exclude: query.exclude.clone(),
            filter: query.filter.clone().filter(|_| query.as_of.is_none()),
            // What has expired and is not reaped yet must not take the place of what lives.
            now: query.as_of.is_none().then(|| app.clock.now()),
        };
        let Seen {
            scopes,
            hidden,
            matching,
        } = app.store.seen(&sight).await?;
        let followed = self.wait_for_index().await;
        let past = match query.as_of {
            Some(at) => Some(app.past(self.tenant(), &scopes, query.filter.as_ref(), at).await?),
            None => None,
        };
        if past.as_ref().is_some_and(|past| past.cut) {
            self.lacks("of what has changed since `as_of`, only a part was looked at; narrow the scope");
        }
        if query.arms != Arms::Lexical && self.serving.index.watermark().is_none() {
            self.lacks("the vector index does not have everything yet");
        }
        let matching = matching.map(|matching| matching.into_iter().collect());
        let among = Among {
            tenant: self.tenant().clone(),
            scopes: scopes.iter().copied().collect(),
            only: past.as_ref().map(|past| past.unchanged.clone()).or(matching),
            exclude: hidden.into_iter().collect(),
        };
        Ok(Bounds {
            scopes,
            among: Arc::new(among),
            past,
            followed,
        })
    }

    /// Waits until the index that answers has the write that must be seen, as far as it is needed; false when it does not in
    /// time, or takes no changes.
    async fn wait_for_index(&mut self) -> bool {
        let (app, query) = (self.app, self.query);
        let needed = query.arms != Arms::Lexical || self.serving.index.keeps_texts();
        let followed = !needed || query.after == Sequence::default() || app.reached(query.after).await;
        // Another one may have taken over meanwhile, and the one before is not followed up any more.
        self.serving = app.serving();
        let refuses = needed && self.serving.refuses();
        if query.arms != Arms::Lexical {
            if !followed {
                self.lacks("the vector index has not followed the write of `consistency_token` yet");
            } else if refuses {
                self.lacks("the vector index takes no changes for now; it may lack the last ones");
            }
        }
        followed && !refuses
    }

    /// Asks the index for the nearest vectors and for words at once, so that one that does not answer is waited for once.
    /// Without vectors, words stand in for them.
    pub(super) async fn candidates(&mut self, bounds: &Bounds) -> Scoring {
        let (app, query) = (self.app, self.query);
        let mut stats = std::mem::take(&mut self.stats);
        let Chosen { size, rule } = app.dimensions(self.tenant(), &self.serving.model, query);
        let measuring = app.measuring(self.tenant(), &self.serving.model, query, size);
        let nearest = async {
            match query.arms {
                Arms::Lexical => None,
                _ => Some(self.nearest(bounds, size, &mut stats).await),
            }
        };
        let (nearest, with_words) = tokio::join!(nearest, self.with_words(bounds));
        (self.stats, self.measuring) = (stats, Some(measuring));
        if nearest.as_ref().is_some_and(Result::is_ok) {
            self.stats.rule = rule;
        }
        let nearest = nearest.and_then(|found| found.inspect_err(|error| self.note_no_vectors(error)).ok());
        let also = bounds.past.as_ref().map(|past| past.changed.keys().copied().collect());
        Scoring {
            tenant: self.tenant().clone(),
            lexical: (query.arms != Arms::Dense || nearest.is_none()).then(|| self.words(bounds, with_words)),
            dense: nearest,
            neighbours: (query.weights.neighbour != 0.0).then(|| also.unwrap_or_default()),
        }
    }

    /// Embeds the query and scans the prefixes; what comes out is to be compared in so many dimensions.
    async fn nearest(&self, bounds: &Bounds, size: usize, stats: &mut SearchStats) -> Result<Rescoring, Error> {
        let (app, query, serving) = (self.app, self.query, &*self.serving);
        let began = Instant::now();
        let texts = vec![query.text.clone()];
        let embedded = app.embed_soon(self.context, &serving.model, texts, true).await?;
        let mut vector = embedded.into_iter().next().unwrap_or_default();
        stats.embed_ms = ms(began);
        let began = Instant::now();
        let mut keys = Vec::new();
        if let Some(code) = Code::encode(&vector) {
            stats.scanned = serving.index.len();
            let among = Arc::clone(&bounds.among);
            keys = app.candidates(serving, code, among, self.depth()).await?;
        }
        vector.truncate(size);
        // As long as one: a prefix of a unit vector is shorter.
        let norm = vector.iter().map(|x| x * x).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
        vector.iter_mut().for_each(|x| *x /= norm);
        stats.dense_ms = ms(began);
        Ok(Rescoring {
            model: serving.model.identity.clone(),
            keys,
            vector,
        })
    }

    /// The memories that have the best of the words, by an index that finds them. `None`: the store looks for itself.
    async fn with_words(&self, bounds: &Bounds) -> Option<Vec<Key>> {
        let index = &self.serving.index;
        let asked = self.query.arms != Arms::Dense && bounds.past.is_none() && bounds.followed;
        if !asked || !index.keeps_texts() || index.watermark().is_none() {
            return None;
        }
        let among = Arc::clone(&bounds.among);
        let found = index.lexical(self.terms.clone(), among, self.depth()).await;
        found
            .inspect_err(|error| tracing::debug!(%error, "the store looks for words itself"))
            .ok()
    }

    /// The search for words, among candidates when an index has found them.
    fn words(&self, bounds: &Bounds, candidates: Option<Vec<Key>>) -> LexicalSearch {
        LexicalSearch {
            scopes: bounds.scopes.clone(),
            terms: self.terms.clone(),
            candidates,
            among: Some(Arc::clone(&bounds.among)),
            filter: self.query.filter.clone(),
            as_of: self.query.as_of,
            limit: self.depth() + bounds.among.exclude.len(),
        }
    }

    /// Has the store score the candidates, and fuses them. Vectors that can't be read are done without as well.
    pub(super) async fn fuse(&mut self, bounds: &Bounds, mut scoring: Scoring) -> Result<Fused, Error> {
        let (app, query) = (self.app, self.query);
        let mut scored = app.store.scored(&scoring).await?;
        let found = std::mem::replace(&mut scored.dense, Ok(Vec::new()));
        let mut dense = Vec::new();
        match self.cosines(bounds, scoring.dense.as_ref(), found).await {
            Ok(cosines) => {
                dense = cosines;
                if scoring.dense.is_some() && bounds.past.as_ref().is_some_and(Past::is_partly_embedded) {
                    self.lacks(
                        "of what was reworded since `as_of`, only the nearest by words were compared; narrow the scope",
                    );
                }
            }
            Err(error) => {
                self.note_no_vectors(&error);
                (scoring.dense, self.stats.rule) = (None, "");
                if scoring.lexical.is_none() {
                    scoring.lexical = Some(self.words(bounds, None));
                    scored = app.store.scored(&scoring).await?;
                }
            }
        }
        let mut lexical = scored.lexical;
        if let (Some(past), true) = (&bounds.past, scoring.lexical.is_some()) {
            lexical.extend(app.past_lexical(self.tenant(), past, &self.terms).await?);
            best_first(&mut lexical);
        }
        lexical.retain(|(key, _)| !bounds.among.exclude.contains(key));
        let stats = &mut self.stats;
        (stats.dense_candidates, stats.lexical_candidates) = (dense.len(), lexical.len());
        (stats.lexical_ms, stats.dense_ms) = (scored.lexical_ms, stats.dense_ms + scored.dense_ms);

        let dimension = scoring.dense.as_ref().map(|near| near.vector.len());
        let share = match (dimension, query.arms) {
            (_, Arms::Lexical) | (None, _) => 0.0,
            (_, Arms::Dense) => 1.0,
            (Some(_), Arms::Hybrid) => query.weights.dense,
        };
        let mut scores = fuse(&dense, &lexical, query.fusion, share, query.weights.rrf_k);
        let part = query.weights.neighbour;
        spread(&mut scores, part, scored.neighbours, |key| bounds.admits(key));
        Ok(Fused { scores, dimension })
    }

    /// Cosines of the candidates and, of the past, of what has changed since, best first.
    async fn cosines(
        &self,
        bounds: &Bounds,
        near: Option<&Rescoring>,
        found: Result<Vec<(Key, f32)>, MemoryError>,
    ) -> Result<Vec<(Key, f64)>, Error> {
        let mut cosines: Vec<(Key, f64)> = found?
            .into_iter()
            .filter(|(key, _)| !bounds.among.exclude.contains(key))
            .map(|(key, cosine)| (key, f64::from(cosine)))
            .collect();
        if let (Some(past), Some(near)) = (&bounds.past, near) {
            let model = &self.serving.model;
            let earlier = self
                .app
                .past_cosines(self.context, model, past, (&near.vector, &self.terms))
                .await?;
            cosines.extend(
                earlier
                    .into_iter()
                    .filter(|(key, _)| !bounds.among.exclude.contains(key)),
            );
        }
        best_first(&mut cosines);
        Ok(cosines)
    }

    fn lacks(&mut self, what: &str) {
        self.degraded.push(what.to_owned());
    }

    fn note_no_vectors(&mut self, error: &Error) {
        // Who is away is told by whoever asked; here it would be told for every search.
        tracing::debug!(error = %error.chain(), "a search goes without its dense arm");
        self.degraded.push(format!("no dense arm: {error}"));
    }
}

impl Bounds {
    /// Whether a memory of its scopes may be a candidate.
    fn admits(&self, key: &Key) -> bool {
        let chosen = self.among.only.as_ref().is_none_or(|only| only.contains(key));
        let changed = self.past.as_ref().is_some_and(|past| past.changed.contains_key(key));
        (chosen || changed) && !self.among.exclude.contains(key)
    }
}

/// Gives each turn of a conversation a part of its best neighbour's score; neighbours that are admitted become candidates
/// themselves.
fn spread(scores: &mut HashMap<Key, Breakdown>, part: f64, neighbours: Vec<(Key, Key)>, admits: impl Fn(&Key) -> bool) {
    let fused: HashMap<Key, f64> = scores
        .iter()
        .map(|(key, breakdown)| (*key, breakdown.fused()))
        .collect();
    for (turn, neighbour) in neighbours {
        if let Some(fused) = fused.get(&turn).filter(|_| admits(&neighbour)) {
            let breakdown = scores.entry(neighbour).or_default();
            breakdown.neighbour_part = breakdown.neighbour_part.max(part * fused);
        }
    }
}

fn best_first(scored: &mut [(Key, f64)]) {
    scored.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(b.0.cmp(&a.0)));
}
