//! Counts and sizes.

use aeterna_error::Error;
use aeterna_rpc::RequestContext;
use aeterna_types::Scope;

use super::App;
use super::get::view;
use crate::domain::Sequence;
use crate::store::Counts;

/// Changes that are counted which the index does not have.
const MISSING: usize = 1_000;

/// What a caller sees, counted.
#[derive(Clone, Debug)]
pub struct Stats {
    /// What the relational store holds of it.
    pub counts: Counts,
    /// Changes of the whole store that the index has not applied.
    pub index_lag: i64,
    /// The model by which searches are answered.
    pub model: String,
    /// The model that memories are embedded anew by, and how many are left.
    pub reembedding: Option<(String, i64)>,
    /// Bytes of the whole index.
    pub index_bytes: u64,
}

impl App {
    /// Counts of what the caller sees, which has everything up to `must_see`.
    ///
    /// # Errors
    /// SCOPE_DENIED, or when the store fails.
    pub async fn stats(
        &self,
        context: &RequestContext,
        scope: Option<&Scope>,
        must_see: Sequence,
    ) -> Result<Stats, Error> {
        let view = view(context, scope)?;
        self.store.reach(must_see).await?;
        let tenant = &context.principal().tenant;
        let scopes = self.store.visible(tenant, &view, &[]).await?;
        let (serving, now) = (self.serving(), self.clock.now());
        let counts = self.store.counts(tenant, &serving.model.identity, &scopes, now).await?;
        let mut reembedding = None;
        let next = &self.wanted;
        if next.identity != serving.model.identity {
            let left = self.store.counts(tenant, &next.identity, &scopes, now).await?.pending;
            reembedding = Some((next.name.clone(), left));
        }
        let indexed = serving.index.watermark().unwrap_or_default();
        let missing = self.store.missing(indexed, MISSING).await?;
        Ok(Stats {
            counts,
            model: serving.model.name.clone(),
            reembedding,
            index_lag: missing as i64,
            index_bytes: serving.index.bytes(),
        })
    }
}
