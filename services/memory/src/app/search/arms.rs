//! What the arms of a search bring: vectors and words, each by its index, compared in the store and fused.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use aeterna_error::Error;
use aeterna_rpc::RequestContext;
use aeterna_types::TenantId;

use super::past::Past;
use super::score::fuse;
use super::{App, Arms, Breakdown, SearchQuery, SearchStats, ms};
use crate::app::Serving;
use crate::app::get::view;
use crate::domain::{Key, ScopeKey, Sequence};
use crate::store::code::Code;
use crate::store::{self, Among, LexicalSearch, Rescoring, Scored, Seen, Sight};

/// Candidates that each arm brings, at least.
const CANDIDATES: usize = 200;

/// A search on its way to its candidates.
pub(super) struct Asking<'s> {
    app: &'s App,
    context: &'s RequestContext,
    query: &'s SearchQuery,
    /// By which it is answered.
    pub serving: Arc<Serving>,
    /// What was away.
    pub degraded: Vec<String>,
    /// What it did.
    pub stats: SearchStats,
}

/// Where it looks.
pub(super) struct Ground {
    scopes: Vec<ScopeKey>,
    among: Arc<Among>,
    /// What there was at the time that is asked for.
    pub past: Option<Past>,
    /// The index has the write that must be seen.
    followed: bool,
}

/// What the store is asked to compare.
pub(super) struct Asked {
    arms: store::Arms,
    /// The arm of words, asked for or not: it stands in for the other one.
    words: LexicalSearch,
}

/// What came of it.
pub(super) struct Compared {
    /// The parts of each candidate's score that the arms bring.
    pub scores: HashMap<Key, Breakdown>,
    /// Dimensions that were compared; `None`: no vectors were.
    pub dimension: Option<usize>,
}

/// What the query's vector brings.
struct Nearest {
    rescoring: Rescoring,
    scanned: usize,
    embed_ms: f64,
    dense_ms: f64,
}

impl<'s> Asking<'s> {
    pub(super) fn new(app: &'s App, context: &'s RequestContext, query: &'s SearchQuery) -> Self {
        Self {
            app,
            context,
            query,
            serving: app.serving(),
            degraded: Vec::new(),
            stats: SearchStats {
                terms: aeterna_text::analyse(&query.text),
                ..SearchStats::default()
            },
        }
    }

    fn tenant(&self) -> &'s TenantId {
        &self.context.principal().tenant
    }

    /// Candidates that an arm brings.
    fn depth(&self) -> usize {
        CANDIDATES.max(4 * self.query.top_k)
    }

    /// Finds out where to look, once what must be seen is there.
    pub(super) async fn ground(&mut self) -> Result<Ground, Error> {
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
        let followed = self.follows().await;
        let past = match query.as_of {
            Some(at) => Some(app.past(self.tenant(), &scopes, query.filter.as_ref(), at).await?),
            None => None,
        };
        if past.as_ref().is_some_and(|past| past.cut) {
            let cut = "of what has changed since `as_of`, only a part was looked at; narrow the scope";
            self.degraded.push(cut.to_owned());
        }
        let matching = matching.map(|matching| matching.into_iter().collect());
        let among = Among {
            tenant: self.tenant().clone(),
            scopes: scopes.iter().copied().collect(),
            only: past.as_ref().map(|past| past.unchanged.clone()).or(matching),
            exclude: hidden.into_iter().collect(),
        };
        Ok(Ground {
            scopes,
            among: Arc::new(among),
            past,
            followed,
        })
    }

    /// Waits for the write that must be seen; false when the index does not have it in time.
    async fn follows(&mut self) -> bool {
        let (query, index) = (self.query, &self.serving.index);
        let asked = query.arms != Arms::Lexical || index.keeps_texts();
        let followed = !asked || query.after == Sequence::default() || self.app.reached(query.after).await;
        if query.arms != Arms::Lexical {
            if !followed {
                let behind = "the vector index has not followed the write of `consistency_token` yet";
                self.degraded.push(behind.to_owned());
            }
            if index.watermark().is_none() {
                let lacks = "the vector index does not have everything yet";
                self.degraded.push(lacks.to_owned());
            }
        }
        followed
    }

    /// Asks both indexes at once: one that does not answer is waited for once.
    pub(super) async fn arms(&mut self, ground: &Ground) -> Asked {
        let query = self.query;
        let mut terms = self.stats.terms.clone();
        terms.sort();
        terms.dedup();
        let by_vector = async {
            match query.arms {
                Arms::Lexical => None,
                _ => Some(self.nearest(ground).await),
            }
        };
        let by_words = async {
            match ground.followed && ground.past.is_none() && query.arms != Arms::Dense {
                true => self.with_words(&terms, ground).await,
                false => None,
            }
        };
        let (nearest, candidates) = tokio::join!(by_vector, by_words);
        let nearest = nearest.and_then(|found| found.map_err(|error| self.without_dense(&error)).ok());
        let words = LexicalSearch {
            scopes: ground.scopes.clone(),
            terms,
            candidates,
            filter: query.filter.clone(),
            as_of: query.as_of,
            limit: self.depth() + ground.among.exclude.len(),
        };
        let also = ground.past.as_ref().map(|past| past.changed.keys().copied().collect());
        let arms = store::Arms {
            tenant: self.tenant().clone(),
            lexical: (query.arms != Arms::Dense || nearest.is_none()).then(|| words.clone()),
            neighbours: (query.weights.neighbour != 0.0).then(|| also.unwrap_or_default()),
            dense: nearest.map(|nearest| {
                self.stats.scanned = nearest.scanned;
                self.stats.embed_ms = nearest.embed_ms;
                self.stats.dense_ms = nearest.dense_ms;
                nearest.rescoring
            }),
        };
        Asked { arms, words }
    }

    /// Embeds the query and scans the prefixes; what comes out is to be compared at full size.
    async fn nearest(&self, ground: &Ground) -> Result<Nearest, Error> {
        let (app, query, serving) = (self.app, self.query, &*self.serving);
        let began = Instant::now();
        let texts = vec![query.text.clone()];
        let embedded = app.embed_soon(self.context, &serving.model, texts, true).await?;
        let mut vector = embedded.into_iter().next().unwrap_or_default();
        let (embed_ms, began) = (ms(began), Instant::now());
        let (mut scanned, mut keys) = (0, Vec::new());
        if let Some(code) = Code::encode(&vector) {
            scanned = serving.index.len();
            let among = Arc::clone(&ground.among);
            keys = app.candidates(serving, code, among, self.depth()).await?;
        }
        let full = serving.model.dimension;
        vector.truncate(query.dimension.unwrap_or(full).min(full));
        // As long as one: a prefix of a unit vector is shorter.
        let norm = vector.iter().map(|x| x * x).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
        vector.iter_mut().for_each(|x| *x /= norm);
        Ok(Nearest {
            rescoring: Rescoring {
                model: serving.model.identity.clone(),
                keys,
                vector,
            },
            scanned,
            embed_ms,
            dense_ms: ms(began),
        })
    }

    /// The memories that have the best of some terms, by an index that finds them. `None`: the store looks for itself.
    async fn with_words(&self, terms: &[String], ground: &Ground) -> Option<Vec<Key>> {
        let index = &self.serving.index;
        if !index.keeps_texts() || index.watermark().is_none() {
            return None;
        }
        let among = Arc::clone(&ground.among);
        let found = index.lexical(terms.to_vec(), among, self.depth()).await;
        found
            .inspect_err(|error| tracing::debug!(%error, "the store looks for words itself"))
            .ok()
    }

    /// Has the store compare what the arms have found, and fuses it. Without vectors, words stand in for them.
    pub(super) async fn compare(&mut self, ground: &Ground, asked: Asked) -> Result<Compared, Error> {
        let (app, query) = (self.app, self.query);
        let Asked { mut arms, words } = asked;
        let mut scored = app.store.scored(&arms).await?;
        let dense = match self.cosines(ground, &arms, &mut scored).await {
            Ok(cosines) => cosines,
            Err(error) => {
                self.without_dense(&error);
                arms.dense = None;
                if arms.lexical.is_none() {
                    arms.lexical = Some(words.clone());
                    scored = app.store.scored(&arms).await?;
                }
                Vec::new()
            }
        };
        let mut lexical = scored.lexical;
        if let Some(past) = ground.past.as_ref().filter(|_| arms.lexical.is_some()) {
            lexical.extend(app.past_lexical(self.tenant(), past, &words.terms).await?);
            best_first(&mut lexical);
        }
        lexical.retain(|(key, _)| !ground.among.exclude.contains(key));
        let stats = &mut self.stats;
        (stats.dense_candidates, stats.lexical_candidates) = (dense.len(), lexical.len());
        (stats.lexical_ms, stats.dense_ms) = (scored.lexical_ms, stats.dense_ms + scored.dense_ms);

        let dimension = arms.dense.as_ref().map(|near| near.vector.len());
        let share = match (dimension, query.arms) {
            (_, Arms::Lexical) | (None, _) => 0.0,
            (_, Arms::Dense) => 1.0,
            (Some(_), Arms::Hybrid) => query.weights.dense,
        };
        let mut scores = fuse(&dense, &lexical, query.fusion, share, query.weights.rrf_k);
        let part = query.weights.neighbour;
        spread(&mut scores, part, scored.neighbours, |key| ground.shows(key));
        Ok(Compared { scores, dimension })
    }

    /// What the store has compared, and what was otherwise at the time that is asked for, best first.
    async fn cosines(
        &self,
        ground: &Ground,
        arms: &store::Arms,
        scored: &mut Scored,
    ) -> Result<Vec<(Key, f64)>, Error> {
        let found = std::mem::replace(&mut scored.dense, Ok(Vec::new()))?;
        let mut cosines: Vec<(Key, f64)> = found
            .into_iter()
            .map(|(key, cosine)| (key, f64::from(cosine)))
            .collect();
        if let (Some(past), Some(near)) = (&ground.past, &arms.dense) {
            let model = &self.serving.model;
            let earlier = self.app.past_cosines(self.context, model, past, &near.vector).await?;
            cosines.extend(
                earlier
                    .into_iter()
                    .filter(|(key, _)| !ground.among.exclude.contains(key)),
            );
        }
        best_first(&mut cosines);
        Ok(cosines)
    }

    /// Says that vectors are away.
    fn without_dense(&mut self, error: &Error) {
        // Who is away is told by whoever asked; here it would be told for every search.
        tracing::debug!(error = %error.chain(), "a search goes without its dense arm");
        self.degraded.push(format!("no dense arm: {error}"));
    }
}

impl Ground {
    /// Whether a memory may be found.
    fn shows(&self, key: &Key) -> bool {
        let chosen = self.among.only.as_ref().is_none_or(|only| only.contains(key));
        let changed = self.past.as_ref().is_some_and(|past| past.changed.contains_key(key));
        (chosen || changed) && !self.among.exclude.contains(key)
    }
}

/// Gives each turn of a conversation a part of its best neighbour's score; neighbours that are shown become candidates
/// themselves.
fn spread(scores: &mut HashMap<Key, Breakdown>, part: f64, neighbours: Vec<(Key, Key)>, shown: impl Fn(&Key) -> bool) {
    let fused: HashMap<Key, f64> = scores
        .iter()
        .map(|(key, breakdown)| (*key, breakdown.fused()))
        .collect();
    for (turn, neighbour) in neighbours {
        if let Some(fused) = fused.get(&turn).filter(|_| shown(&neighbour)) {
            let breakdown = scores.entry(neighbour).or_default();
            breakdown.neighbour_part = breakdown.neighbour_part.max(part * fused);
        }
    }
}

fn best_first(scored: &mut [(Key, f64)]) {
    scored.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(b.0.cmp(&a.0)));
}
