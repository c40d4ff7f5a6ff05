//! Counts and sizes.

use aeterna_error::Error;
use aeterna_rpc::RequestContext;
use aeterna_types::Scope;

use super::App;
use super::get::view;
use crate::store::Counts;

/// What a caller sees, counted.
#[derive(Clone, Debug)]
pub struct Stats {
    /// What the relational store holds of it.
    pub counts: Counts,
    /// Changes of the whole store that the index has not applied.
    pub index_lag: i64,
    /// Bytes of the whole index.
    pub index_bytes: u64,
}

impl App {
    /// Counts of what the caller sees.
    ///
    /// # Errors
    /// SCOPE_DENIED, or when the store fails.
    pub async fn stats(&self, context: &RequestContext, scope: Option<&Scope>) -> Result<Stats, Error> {
        let view = view(context, scope)?;
        let scopes = self.store.visible(&context.principal().tenant, &view, &[]).await?;
        let counts = self
            .store
            .counts(&self.model.identity, &scopes, self.clock.now())
            .await?;
        let end = self.store.last_sequence().await?;
        Ok(Stats {
            counts,
            index_lag: (end.0 - self.index.watermark().0).max(0),
            index_bytes: self.index.bytes(),
        })
    }
}
