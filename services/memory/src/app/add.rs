//! Adding memories.

use aeterna_error::Error;
use aeterna_rpc::RequestContext;
use aeterna_types::Scope;

use super::App;
use crate::domain::{Body, Idempotency, Sequence, Written};
use crate::error::MemoryError;
use crate::store::Addition;

/// One memory as its writer sends it.
#[derive(Clone, Debug)]
pub struct NewMemory {
    /// Where it should live.
    pub scope: Scope,
    /// What it says.
    pub body: Body,
    /// Makes a retry safe.
    pub idempotency: Option<Idempotency>,
}

impl App {
    /// Adds memories; each has its own result. The vectors are made before the transaction begins.
    ///
    /// # Errors
    /// When the store fails; then nothing of the batch is kept.
    pub async fn add(
        &self,
        context: &RequestContext,
        items: Vec<Result<NewMemory, Error>>,
    ) -> Result<Vec<Result<Written, Error>>, Error> {
        let writer = self.writer(context);
        let mut results: Vec<Option<Result<Written, Error>>> = Vec::with_capacity(items.len());
        let mut wanted = Vec::new();
        for item in items {
            let placed = item.and_then(|mut item| {
                item.scope = context.principal().stand_in(&item.scope)?;
                Ok(item)
            });
            match placed {
                Err(error) => results.push(Some(Err(error))),
                Ok(item) => {
                    // A retry needs no vectors; its answer is kept.
                    let replayed = match &item.idempotency {
                        Some(idempotency) => self.store.replay(&writer, idempotency).await,
                        None => Ok(None),
                    };
                    match replayed {
                        Ok(None) => {
                            wanted.push(item);
                            results.push(None);
                        }
                        Ok(Some(written)) => results.push(Some(Ok(written))),
                        Err(error @ MemoryError::Other(_)) => return Err(error.into()),
                        Err(error) => results.push(Some(Err(error.into()))),
                    }
                }
            }
        }
        let mut fresh = self.store_all(context, wanted).await?.into_iter();
        let results: Vec<_> = results
            .into_iter()
            .filter_map(|done| done.or_else(|| fresh.next()))
            .collect();
        let last = results
            .iter()
            .flatten()
            .map(|written| written.sequence)
            .max()
            .unwrap_or_default();
        self.metrics.added.add(results.iter().flatten().count() as u64, &[]);
        if last > Sequence::default() {
            self.await_index(last).await;
        }
        Ok(results)
    }

    async fn store_all(
        &self,
        context: &RequestContext,
        items: Vec<NewMemory>,
    ) -> Result<Vec<Result<Written, Error>>, Error> {
        if items.is_empty() {
            return Ok(Vec::new());
        }
        let writer = self.writer(context);
        // What is there already will be merged, and needs no vector: an import that is repeated costs no model.
        let places: Vec<_> = items
            .iter()
            .map(|item| (item.scope.clone(), item.body.identity()))
            .collect();
        let known = self.store.known(&writer.tenant, &places).await?;
        let fresh = items.iter().zip(&known).filter(|(_, known)| !**known);
        let texts: Vec<String> = fresh.map(|(item, _)| item.body.dense_text()).collect();
        let codes = match texts.is_empty() {
            true => None,
            false => self.codes(context, texts).await,
        };
        let mut codes = codes.into_iter().flatten();
        let additions = items.into_iter().zip(known).map(|(item, known)| Addition {
            scope: item.scope,
            body: item.body,
            vector: (!known)
                .then(|| codes.next().flatten())
                .flatten()
                .map(|code| self.stored_vector(code)),
            idempotency: item.idempotency,
        });
        let additions = additions.collect();
        let written = self.store.add(&writer, additions).await?;
        Ok(written.into_iter().map(|result| result.map_err(Error::from)).collect())
    }
}
