//! The use cases.

mod add;
mod delete;
mod get;
mod history;
mod index;
mod knowledge;
mod list;
mod policy;
mod relay;
mod search;
mod stats;
mod transfer;
mod update;
mod watch;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use aeterna_error::Error;
use aeterna_proto::embedding::v1 as embedding;
use aeterna_proto::embedding::v1::embedding_service_client::EmbeddingServiceClient;
use aeterna_rpc::{AnyChannel, Breaker, Credentials, RequestContext};
use aeterna_types::dimension::Latencies;
use aeterna_types::{Clock, TenantId};
use async_trait::async_trait;
use tokio::sync::watch::{Receiver, Sender};
use tokio::sync::{Notify, Semaphore, broadcast};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::Instrument as _;

pub use add::{Kept, NewMemory};
pub use delete::Deletion;
pub use get::GetQuery;
pub use history::Versions;
pub use index::{Background, Turns};
pub use knowledge::{Diff, DocumentPage, DocumentQuery, OneDocument};
pub use list::{ListQuery, Page};
pub use policy::NewPolicy;
pub use relay::{LiveWork, log_of};
pub use search::{Arms, Breakdown, Dimensions, Found, Fusion, SearchQuery, SearchStats, Weights};
pub use stats::Stats;
pub use transfer::{ExportQuery, Item, Taken};
pub use update::{FIELDS, Patch};
pub use watch::{News, RING, WatchQuery};

use crate::domain::{Change, Sequence, Writer};
use crate::metrics::Metrics;
use crate::store::code::Code;
use crate::store::{Changes, Relational, Sample, StorageError, StoredVector, VectorIndex};

/// The model that this service keeps vectors of.
#[derive(Clone, Debug)]
pub struct Model {
    /// Name to pass to the embedding service.
    pub name: String,
    /// Name and revision, under which vectors are stored.
    pub identity: String,
    /// Dimensions of its vectors.
    pub dimension: usize,
    /// Dimensions that the first pass scans.
    pub prefix: usize,
}

/// A model with the index of its vectors, by which searches are answered.
pub struct Serving {
    /// The model.
    pub model: Model,
    /// The index.
    pub index: Arc<dyn VectorIndex>,
    /// The index did not take what was last brought to it.
    refuses: AtomicBool,
}

impl Serving {
    /// An index that nothing was brought to yet.
    pub fn new(model: Model, index: Arc<dyn VectorIndex>) -> Self {
        Self {
            model,
            index,
            refuses: AtomicBool::new(false),
        }
    }

    /// Brings changes to the index.
    async fn apply(&self, changes: Changes) -> Result<(), Error> {
        let applied = self.index.apply(changes).await;
        self.refuses.store(applied.is_err(), Ordering::SeqCst);
        applied.map_err(|error| Error::unavailable("the vector index can't be written").caused_by(error))
    }

    /// The index has taken what was last brought to it, by another copy.
    fn applied(&self) {
        self.refuses.store(false, Ordering::SeqCst);
    }

    /// The index did not take what was last brought to it: it answers without that.
    fn refuses(&self) -> bool {
        self.refuses.load(Ordering::SeqCst)
    }
}

/// Opens and removes indexes, each of one model.
#[async_trait]
pub trait Indexes: Send + Sync {
    /// The index of a model, with the reason when it was begun anew and must be filled before it answers anything; `end` is the
    /// last change that the store has.
    ///
    /// # Errors
    /// When the disk can't be used.
    async fn open(&self, model: &Model, end: Sequence) -> Result<(Arc<dyn VectorIndex>, Option<String>), StorageError>;

    /// A rotation of this model's vectors may be learned: it was not trained for being cut short, and that would save something.
    fn learns(&self, _model: &Model) -> bool {
        false
    }

    /// Begins an index that serves better than the one before: its first pass works with a rotation learned from some of the
    /// `count` vectors of a model, or with none where the one before finds less by now. `None`: the one before is as good, or it
    /// was told to stop.
    ///
    /// # Errors
    /// When the disk can't be used.
    async fn learn(
        &self,
        _before: &Serving,
        _sample: Sample,
        _count: usize,
        _stop: &CancellationToken,
    ) -> Result<Option<Arc<dyn VectorIndex>>, StorageError> {
        Ok(None)
    }

    /// Removes the other indexes of a model than the one that serves.
    ///
    /// # Errors
    /// When the disk refuses.
    async fn settle(&self, _serving: &Serving) -> Result<(), StorageError> {
        Ok(())
    }

    /// Removes the index of a model that is of no use any more.
    ///
    /// # Errors
    /// When the index is away or the disk refuses.
    async fn remove(&self, identity: &str) -> Result<(), StorageError>;
}

/// How long a call waits for the index to follow: whatever is away, a search is answered within two seconds.
const INDEX_PATIENCE: Duration = Duration::from_millis(1200);
/// The same while the index is known not to follow.
const AWAY_PATIENCE: Duration = Duration::from_millis(50);
/// How long a call waits for vectors, and for each text more: a model that hangs must not use up the time in which the call
/// can be answered without it.
const MODEL_PATIENCE: (Duration, Duration) = (Duration::from_secs(5), Duration::from_millis(20));
/// What a vector may take in an answer beside its values, with all that the answer has beside vectors.
const VECTOR_BESIDE: usize = 272;
/// How long a call waits for each text that the cross-encoder reads.
const READ_PATIENCE: Duration = Duration::from_millis(200);

/// Wakes those who follow the outbox when there may be something new.
#[derive(Debug)]
pub(crate) struct Committed {
    something: Sender<()>,
    here: Notify,
}

impl Committed {
    pub(crate) fn new() -> Self {
        Self {
            something: Sender::new(()),
            here: Notify::new(),
        }
    }

    /// This copy of the service has committed something.
    fn here(&self) {
        self.somewhere();
        self.here.notify_one();
    }

    /// Some copy has.
    fn somewhere(&self) {
        self.something.send_replace(());
    }

    fn subscribe(&self) -> Receiver<()> {
        self.something.subscribe()
    }

    /// Waits until this copy has committed something; one task may.
    async fn told(&self) {
        self.here.notified().await;
    }
}

/// The service's domain.
pub struct App {
    pub(crate) store: Arc<dyn Relational>,
    pub(crate) indexes: Arc<dyn Indexes>,
    /// What searches are answered by now.
    pub(crate) serving: RwLock<Arc<Serving>>,
    /// The default model: every memory gets a vector of it, and then searches are answered by it.
    pub(crate) wanted: Model,
    pub(crate) embedder: AnyChannel,
    /// In front of the embedding service, for callers who wait.
    pub(crate) breaker: Breaker,
    /// In front of its cross-encoder, which takes longer.
    pub(crate) reader: Breaker,
    pub(crate) credentials: Credentials,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) metrics: Metrics,
    pub(crate) message_bytes: usize,
    /// Wakes those who follow the outbox.
    pub(crate) committed: Committed,
    /// The last change when the service began, before there was any watcher.
    pub(crate) began: Sequence,
    /// What was committed, for watchers.
    pub(crate) changes: broadcast::Sender<Arc<Change>>,
    /// Turns of watchers that read the outbox themselves: thousands who fell behind together leave the store to those who write
    /// and search.
    pub(crate) catching_up: Semaphore,
    /// Cancelled when the process should end: streams end then.
    pub(crate) stop: CancellationToken,
    /// The change up to which the index has everything.
    pub(crate) indexed: Sender<Sequence>,
    /// The index does not follow the store, whichever of the two fails.
    pub(crate) index_away: AtomicBool,
    /// What searches took of late, by tenant and identity of the model.
    pub(crate) latencies: Latencies<(TenantId, String)>,
}

/// Does a read of a stream to its end, or until the stream is dropped. The transport asks a stream no further while its caller
/// does not take what was sent, and a read that nobody goes on with keeps a connection of the store from everybody else.
async fn whole<T: Send + 'static>(read: impl Future<Output = T> + Send + 'static) -> Result<T, Error> {
    let reading = AbortOnDropHandle::new(tokio::spawn(read.in_current_span()));
    reading.await.map_err(Error::internal)
}

impl App {
    fn writer(&self, context: &RequestContext) -> Writer {
        let principal = context.principal();
        Writer {
            tenant: principal.tenant.clone(),
            subject: principal.subject.clone(),
            now: self.clock.now(),
        }
    }

    /// What searches are answered by now. A call takes it once, so that all of it is by one model.
    pub fn serving(&self) -> Arc<Serving> {
        Arc::clone(&self.serving.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn serve(&self, serving: Serving) {
        *self.serving.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(serving);
    }

    /// Vectors of texts, by the embedding service.
    async fn embed(
        &self,
        context: &RequestContext,
        model: &Model,
        texts: Vec<String>,
        query: bool,
    ) -> Result<Vec<Vec<f32>>, Error> {
        let kind = if query {
            embedding::TextKind::Query
        } else {
            embedding::TextKind::Document
        };
        let wanted = texts.len();
        // As many at once as their vectors fit into an answer.
        let most = self.message_bytes / (size_of::<f32>() * model.dimension + VECTOR_BESIDE);
        let mut texts = texts.into_iter().map(|text| clip(text, 65_536));
        let mut vectors = Vec::with_capacity(wanted);
        while texts.len() > 0 {
            let message = embedding::BatchEmbedRequest {
                texts: texts.by_ref().take(most.clamp(1, 1000)).collect(),
                model: model.name.clone(),
                size: Some(embedding::Size { by: None }),
                kind: kind.into(),
            };
            let answer = self.embedding().batch_embed(context.request(message)).await;
            let answer = answer.map_err(|status| aeterna_error::from_status(&status))?;
            vectors.extend(answer.into_inner().vectors.into_iter().map(|vector| vector.values));
        }
        let sound = vectors.len() == wanted
            && vectors
                .iter()
                .all(|v| v.len() == model.dimension && v.iter().all(|x| x.is_finite()));
        if sound {
            Ok(vectors)
        } else {
            Err(Error::unavailable("the embedding service answered unusable vectors"))
        }
    }

    /// The same for a caller who waits: an error in time to answer without vectors.
    async fn embed_soon(
        &self,
        context: &RequestContext,
        model: &Model,
        texts: Vec<String>,
        query: bool,
    ) -> Result<Vec<Vec<f32>>, Error> {
        let (first, each) = MODEL_PATIENCE;
        let patience = first + each * u32::try_from(texts.len()).unwrap_or(u32::MAX);
        let embedded = self.embed(context, model, texts, query);
        soon(&self.breaker, context, patience, embedded).await
    }

    /// How well texts answer a query, 0 to 1 each, by the embedding service's cross-encoder.
    async fn cross_encode(&self, context: &RequestContext, query: &str, texts: Vec<String>) -> Result<Vec<f64>, Error> {
        let wanted = texts.len();
        let room = self.message_bytes / 2 / wanted.max(1);
        let texts = texts.into_iter().map(|text| clip(text, room.min(8192))).collect();
        let message = embedding::RerankRequest {
            query: query.to_owned(),
            texts,
        };
        let patience = MODEL_PATIENCE.0 + READ_PATIENCE * u32::try_from(wanted).unwrap_or(u32::MAX);
        let read = async {
            let answer = self.embedding().rerank(context.request(message)).await;
            answer.map_err(|status| aeterna_error::from_status(&status))
        };
        let scores = soon(&self.reader, context, patience, read).await?.into_inner().scores;
        if scores.len() == wanted && scores.iter().all(|score| (0.0..=1.0).contains(score)) {
            Ok(scores)
        } else {
            Err(Error::unavailable("the embedding service answered unusable scores"))
        }
    }

    fn embedding(&self) -> EmbeddingServiceClient<AnyChannel> {
        EmbeddingServiceClient::new(self.embedder.clone())
            .max_decoding_message_size(self.message_bytes)
            .max_encoding_message_size(self.message_bytes)
    }

    /// Codes of texts; `None` when the embedding service is away: the indexer makes them later.
    async fn codes(&self, context: &RequestContext, texts: Vec<String>) -> Option<Vec<Option<StoredVector>>> {
        let model = self.serving().model.clone();
        let stored = |vector: &Vec<f32>| {
            Code::encode(vector).map(|code| StoredVector {
                model: model.identity.clone(),
                code,
            })
        };
        match self.embed_soon(context, &model, texts, false).await {
            Ok(vectors) => Some(vectors.iter().map(stored).collect()),
            Err(error) => {
                tracing::warn!(%error, "no vectors for now; the indexer makes them up later");
                None
            }
        }
    }

    /// Waits a moment until the index has a change, so that the writer finds what it wrote.
    async fn await_index(&self, sequence: Sequence) {
        self.committed.here();
        if !self.reached(sequence).await {
            tracing::debug!(
                sequence = sequence.0,
                "the index is behind; the outbox will catch it up"
            );
        }
    }

    /// Waits until the index has a change that the store has; false when it does not in time.
    async fn reached(&self, sequence: Sequence) -> bool {
        self.committed.somewhere();
        let mut indexed = self.indexed.subscribe();
        let reached = indexed.wait_for(|watermark| *watermark >= sequence);
        let patience = match self.index_away.load(Ordering::SeqCst) {
            true => AWAY_PATIENCE,
            false => INDEX_PATIENCE,
        };
        tokio::time::timeout(patience, reached).await.is_ok()
    }

    /// Bytes after which a page ends: what a client takes that nobody told a limit, and what a message may have.
    pub fn page_bytes(&self) -> usize {
        (self.message_bytes - self.message_bytes / 8).min(3 << 20)
    }

    /// A context for background work of a tenant.
    fn background(&self, tenant: TenantId) -> RequestContext {
        RequestContext::background(tenant, &self.credentials)
    }
}

/// What the embedding service answers a caller who waits; an error in time to answer without it.
async fn soon<T>(
    breaker: &Breaker,
    context: &RequestContext,
    mut patience: Duration,
    asked: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    if !breaker.admits() {
        let message = "the embedding service did not answer of late, and is left alone for a moment";
        return Err(Error::unavailable(message));
    }
    let half = |deadline: Instant| deadline.saturating_duration_since(Instant::now()) / 2;
    let cut = context
        .deadline()
        .map_or(patience, |deadline| patience.min(half(deadline)));
    // What a hasty caller does not wait for says nothing about the service.
    let hasty = std::mem::replace(&mut patience, cut) > cut;
    let answer = tokio::time::timeout(patience, asked).await;
    if answer.is_ok() || !hasty {
        breaker.tell(answer.is_ok());
    }
    answer.unwrap_or_else(|_| {
        let message = format!(
            "the embedding service did not answer within {} ms",
            patience.as_millis()
        );
        Err(Error::unavailable(message))
    })
}

/// At most `bytes` bytes of a text, cut at a character.
fn clip(mut text: String, bytes: usize) -> String {
    if text.len() > bytes {
        let end = (0..=bytes).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text.truncate(end);
    }
    text
}
