//! Adding memories.

use std::collections::HashMap;
use std::time::Duration;

use aeterna_error::Error;
use aeterna_rpc::RequestContext;
use aeterna_types::{MemoryId, Scope, TenantId};
use futures::{StreamExt as _, stream};
use tokio::time::Instant;

use super::App;
use crate::domain::{Body, Idempotency, Key, Outcome, Sequence, Writer, Written};
use crate::store::{Addition, Among, Rescoring};

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

/// What became of a memory that was written, and what says nearly the same.
#[derive(Clone, Debug)]
pub struct Kept {
    /// The write.
    pub written: Written,
    /// Other memories of the scope with their cosines, nearest first.
    pub near: Vec<(MemoryId, f64)>,
}

impl From<Written> for Kept {
    /// Nothing nearly the same was looked for.
    fn from(written: Written) -> Self {
        let near = Vec::new();
        Self { written, near }
    }
}

/// Cosine from which on two memories say nearly the same.
const NEAR: f64 = 0.9;
/// Near ones that are told, at most.
const TOLD: usize = 5;
/// Items of a batch up to which near ones are looked for without being asked to: each costs a search.
const SEARCHED: usize = 32;
/// How long a caller waits who does not say so.
const PATIENCE: Duration = Duration::from_secs(10);
/// Items for which they are looked for at once.
const AT_ONCE: usize = 4;

/// When half of the time that a caller waits is over.
pub(super) fn half_time(context: &RequestContext) -> Instant {
    let left = context
        .deadline()
        .map(|deadline| Instant::from_std(deadline) - Instant::now());
    Instant::now() + left.unwrap_or(PATIENCE) / 2
}

impl App {
    /// Adds memories; each has its own result. The vectors are made before the transaction begins. `near`: what says nearly the
    /// same is looked for, however many they are.
    ///
    /// # Errors
    /// When the store fails; then nothing of the batch is kept.
    pub async fn add(
        &self,
        context: &RequestContext,
        items: Vec<Result<NewMemory, Error>>,
        near: bool,
    ) -> Result<Vec<Result<Kept, Error>>, Error> {
        let writer = self.writer(context);
        let law = self.law(&writer.tenant).await?;
        let mut results: Vec<Option<Result<Written, Error>>> = Vec::with_capacity(items.len());
        let mut wanted = Vec::new();
        for item in items {
            let placed = item.and_then(|mut item| {
                item.scope = context.principal().stand_in(&item.scope)?;
                Ok(item)
            });
            let mut item = match placed {
                Ok(item) => item,
                Err(error) => {
                    results.push(Some(Err(error)));
                    continue;
                }
            };
            // A retry needs neither vectors nor the rules of today; its answer is kept.
            let replayed = match &item.idempotency {
                Some(idempotency) => self.store.replay(&writer, idempotency).await,
                None => Ok(None),
            };
            let admitted = match replayed {
                Ok(Some(written)) => Err(Ok(written)),
                Ok(None) => law
                    .admit(context.principal(), &item.scope, &mut item.body, writer.now)
                    .map_err(|error| Err(error.into())),
                Err(error) if error.is_failure() => return Err(error.into()),
                Err(error) => Err(Err(error.into())),
            };
            match admitted {
                Ok(most) => {
                    wanted.push((item, most));
                    results.push(None);
                }
                Err(answer) => results.push(Some(answer)),
            }
        }
        let mut fresh = self.store_all(context, &writer, wanted).await?.into_iter();
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
        let told = near || results.len() <= SEARCHED;
        let until = half_time(context);
        let tell = async |result: Result<Written, Error>| match result {
            Ok(written) if told && written.outcome == Outcome::Created => {
                Ok(self.with_near(&writer.tenant, written, until).await)
            }
            result => result.map(Kept::from),
        };
        let told = stream::iter(results).map(tell).buffered(AT_ONCE);
        Ok(told.collect().await)
    }

    /// A memory that is stored, with what says nearly the same, as far as it is found in time: what fails or takes long now must
    /// not make its writer believe that it is not stored.
    pub(super) async fn with_near(&self, tenant: &TenantId, written: Written, until: Instant) -> Kept {
        let near = tokio::time::timeout_at(until, self.near(tenant, written.memory.id)).await;
        let late = |_| Err(Error::unavailable("they are not found in time"));
        let near = near.unwrap_or_else(late).unwrap_or_else(|error| {
            tracing::warn!(error = %error.chain(), "near duplicates can't be told");
            Vec::new()
        });
        Kept { written, near }
    }

    /// Other memories of the same place that say nearly the same; none as long as the vector is pending.
    async fn near(&self, tenant: &TenantId, id: MemoryId) -> Result<Vec<(MemoryId, f64)>, Error> {
        let serving = self.serving();
        let own = self.store.state(tenant, id, &serving.model.identity).await?;
        let Some((own, code)) = own.and_then(|mut own| own.code.take().map(|code| (own, code))) else {
            return Ok(Vec::new());
        };
        let vector = code.decode();
        let among = Among {
            tenant: tenant.clone(),
            scopes: [own.scope].into_iter().collect(),
            only: None,
            exclude: [own.key].into_iter().collect(),
        };
        let keys = self.candidates(&serving, code, among.into(), 4 * TOLD).await?;
        let rescoring = Rescoring {
            model: serving.model.identity.clone(),
            keys,
            vector,
        };
        let mut near = self.store.cosines(tenant, &rescoring).await?;
        near.retain(|(_, cosine)| f64::from(*cosine) >= NEAR);
        near.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        near.truncate(TOLD);
        let keys: Vec<Key> = near.iter().map(|(key, _)| *key).collect();
        let live = self.store.fetch(tenant, &keys, self.clock.now()).await?;
        let live: HashMap<Key, MemoryId> = live.into_iter().map(|stored| (stored.key, stored.memory.id)).collect();
        let told = near
            .into_iter()
            .filter_map(|(key, cosine)| Some((*live.get(&key)?, f64::from(cosine))));
        Ok(told.collect())
    }

    async fn store_all(
        &self,
        context: &RequestContext,
        writer: &Writer,
        items: Vec<(NewMemory, Option<(i64, String)>)>,
    ) -> Result<Vec<Result<Written, Error>>, Error> {
        if items.is_empty() {
            return Ok(Vec::new());
        }
        // What is there already will be merged, and needs no vector: an import that is repeated costs no model.
        let places: Vec<_> = items
            .iter()
            .map(|(item, _)| (item.scope.clone(), item.body.identity()))
            .collect();
        let known = self.store.known(&writer.tenant, &places).await?;
        let fresh = items.iter().zip(&known).filter(|(_, known)| !**known);
        let texts: Vec<String> = fresh.map(|((item, _), _)| item.body.dense_text()).collect();
        let codes = match texts.is_empty() {
            true => None,
            false => self.codes(context, texts).await,
        };
        let mut codes = codes.into_iter().flatten();
        let additions = items.into_iter().zip(known).map(|((item, most), known)| Addition {
            scope: item.scope,
            body: item.body,
            vector: (!known).then(|| codes.next().flatten()).flatten(),
            most,
            idempotency: item.idempotency,
        });
        let additions = additions.collect();
        let written = self.store.add(writer, additions).await?;
        Ok(written.into_iter().map(|result| result.map_err(Error::from)).collect())
    }
}
