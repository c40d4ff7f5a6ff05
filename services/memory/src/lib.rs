//! Remember and find.

mod app;
mod convert;
pub mod domain;
pub mod error;
pub mod filter;
mod grpc;
mod indexes;
mod metrics;
mod migrate;
mod models;
mod reconcile;
pub mod store;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use aeterna_config::{Reader, Secret, Setting, StoreUri};
use aeterna_error::{Error, Reason};
use aeterna_proto::memory::v1::knowledge_service_server::KnowledgeServiceServer;
use aeterna_proto::memory::v1::memory_service_server::MemoryServiceServer;
use aeterna_proto::memory::v1::policy_service_server::PolicyServiceServer;
use aeterna_rpc::{AnyChannel, Breaker, Credentials, Dependency, Health};
use aeterna_storage::live::Live;
use aeterna_storage::{DirectoryLock, PostgresOptions, RedisLive, RedisOptions, SqliteOptions};
use aeterna_types::Clock;
use aeterna_types::dimension::Latencies;
use opentelemetry::metrics::Meter;
use tokio::sync::{Semaphore, broadcast, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use app::{App, Background, Indexes, LiveWork, Serving, Turns};
use indexes::{FlatIndexes, QdrantIndexes};
pub use migrate::{Moved, Stage};
pub use reconcile::{Reconciled, Step};
use store::postgres::PostgresStore;
use store::qdrant::QdrantOptions;
use store::sqlite::SqliteStore;
use store::{Relational, StorageError};

/// The service's name in its contract.
pub const SERVICE: &str = "aeterna.memory.v1.MemoryService";

/// All contracts that it serves.
pub const SERVICES: &[&str] = &[
    SERVICE,
    "aeterna.memory.v1.KnowledgeService",
    "aeterna.memory.v1.PolicyService",
];

/// The settings of this service.
pub const SETTINGS: &[Setting] = &[
    Setting::new(
        "memory.store",
        "sqlite:memory.db",
        "The relational store: `sqlite:FILE`, relative to the data directory, or `postgres://role@host1:5432,host2,host3/database`; \
         with `?patroni=8008`, the port of Patroni's REST API (or one for each host), its word on who is the primary counts.",
    ),
    Setting::secret(
        "memory.store_password",
        "memory.store_password_file",
        "The password of the role in `memory.store`.",
    ),
    Setting::new(
        "memory.store_owner",
        "",
        "The role that owns the PostgreSQL schema, and brings it up to date at the start; empty: that is done elsewhere. It must not \
         be the one in `memory.store`, which is held by row-level security.",
    ),
    Setting::secret(
        "memory.store_owner_password",
        "memory.store_owner_password_file",
        "The password of the owner.",
    ),
    Setting::new(
        "memory.connections",
        "16",
        "Connections to each PostgreSQL node for reading, and as many to the primary for writing, 1 to 500.",
    ),
    Setting::new(
        "memory.store_patience",
        "5s",
        "How long a call waits for a PostgreSQL primary, and repeats what failed.",
    ),
    Setting::new(
        "memory.read_from",
        "primary",
        "Which PostgreSQL node a read asks first: `primary`, or `any`, each in turn. Either way it sees all that this copy of the \
         service has acknowledged and what its consistency token stands for; with `any`, a caller without tokens may see what others \
         write come and go again.",
    ),
    Setting::new(
        "memory.statement_timeout",
        "30s",
        "How long a PostgreSQL statement that only reads may take.",
    ),
    Setting::new(
        "memory.index",
        "flat:vectors",
        "The vector index: `flat:DIRECTORY`, relative to the data directory, or `qdrant://host1:6334,host2,host3/PREFIX`, where the \
         names of its collections begin with the prefix (`aeterna`). With `?shards=6&replicas=2&consistency=1`, how collections are \
         made: how many replicas have each shard, and how many of them must have a change before it counts; with `&read=quorum` \
         (`one`, `majority`, `all`), of how many replicas a search takes only what all or most of them have; with `&tls=true`, TLS.",
    ),
    Setting::secret(
        "memory.index_key",
        "memory.index_key_file",
        "The API key of the nodes in `memory.index`.",
    ),
    Setting::new(
        "memory.embedding",
        "local",
        "Where the embedding service is: `local` (this process) or `http://host:port`.",
    ),
    Setting::new(
        "memory.live",
        "",
        "What tells the copies of the service of one another's changes at once, keeps streams of the latest ones, and lets copies \
         take turns at what one of them can do for all: `redis://host:6379` or \
         `redis+sentinel://host1:26379,host2,host3/master`; empty: nothing, and another copy notices a change within a second.",
    ),
    Setting::secret(
        "memory.live_password",
        "memory.live_password_file",
        "The password of the servers in `memory.live`.",
    ),
    Setting::secret(
        "memory.live_sentinel_password",
        "memory.live_sentinel_password_file",
        "The password of the Sentinels in `memory.live`.",
    ),
    Setting::new(
        "memory.busy_timeout",
        "5s",
        "How long a statement waits for a lock that another program holds.",
    ),
    Setting::new(
        "memory.readers",
        "0",
        "Connections for reading, 1 to 64, half of them for searches; 0: two for each processor.",
    ),
    Setting::new(
        "memory.cache_bytes",
        "536870912",
        "On SQLite: memory for what searches read most, words and vectors, in bytes, about; it is taken as it is needed. 100,000 \
         memories with vectors of 1536 dimensions need 256 MiB; what does not fit is read from disk. 0 keeps nothing.",
    ),
    Setting::new(
        "memory.model_grace",
        "10m",
        "On PostgreSQL: how long the vectors of a model before stay once another one answers, for copies of the service that have \
         still to be started with it.",
    ),
    Setting::new(
        "memory.rotation",
        "true",
        "Learn from the stored vectors, of a model not trained for being cut short, which half of them, or less, a first pass needs.",
    ),
];

/// How the service is set up.
#[derive(Clone, Debug)]
pub struct Config {
    store: Store,
    index: Index,
    /// `local` or a URL.
    pub embedding: String,
    busy_timeout: Duration,
    readers: u32,
    cache_bytes: u64,
    rotation: bool,
    grace: Duration,
    live: Option<RedisOptions>,
}

/// Where memories are kept.
#[derive(Clone, Debug)]
enum Store {
    /// A file, relative to the data directory.
    Sqlite(PathBuf),
    /// A database, with how its owner reaches it.
    Postgres(Box<PostgresOptions>, Option<Box<PostgresOptions>>),
}

impl Store {
    /// Watchers that may read at once: a quarter of the connections for reading.
    fn watchers(&self, readers: u32) -> usize {
        let connections = match self {
            Self::Sqlite(_) => readers,
            Self::Postgres(options, _) => options.connections,
        };
        (connections / 4).max(1) as usize
    }

    fn read(reader: &mut Reader<'_>) -> Option<Self> {
        let password = reader.secret("memory.store_password");
        let owner = reader.optional::<String>("memory.store_owner").flatten();
        let owner_password = reader.secret("memory.store_owner_password");
        let connections = reader.within("memory.connections", 1..=500);
        let patience = reader.duration("memory.store_patience");
        let statement = reader.duration("memory.statement_timeout");
        let read_from = reader.text("memory.read_from")?;
        let spread = match read_from.as_str() {
            "any" => Some(true),
            "primary" => Some(false),
            _ => {
                reader.problem("memory.read_from", "write `primary` or `any`");
                None
            }
        };
        let uri: StoreUri = reader.get("memory.store")?;
        match uri.scheme.as_str() {
            "sqlite" if !uri.rest.is_empty() => Some(Self::Sqlite(uri.rest.into())),
            "postgres" => {
                let parsed = PostgresOptions::parse(&uri.rest, password.flatten().as_ref().map(Secret::expose));
                let mut options = match parsed {
                    Ok(options) => options,
                    Err(why) => {
                        reader.problem("memory.store", why);
                        return None;
                    }
                };
                options.connections = connections?;
                options.patience = patience?;
                options.statement = statement?;
                options.spread = spread?;
                let owner_password = owner_password.flatten();
                let as_owner = |owner: String| options.as_user(&owner, owner_password.as_ref().map(Secret::expose));
                let owner = owner.map(|owner| Box::new(as_owner(owner)));
                Some(Self::Postgres(Box::new(options), owner))
            }
            _ => {
                reader.problem(
                    "memory.store",
                    "this version knows `sqlite:PATH` and `postgres://role@host1,host2/database`",
                );
                None
            }
        }
    }
}

impl Store {
    async fn open(&self, config: &Config, data_dir: &Path) -> Result<Arc<dyn Relational>, Error> {
        Ok(match self {
            Self::Sqlite(path) => {
                let options = SqliteOptions {
                    path: data_dir.join(path),
                    busy_timeout: config.busy_timeout,
                    readers: config.readers,
                };
                Arc::new(SqliteStore::open(&options, config.cache_bytes).await?)
            }
            Self::Postgres(options, owner) => Arc::new(PostgresStore::open(options, owner.as_deref()).await?),
        })
    }
}

impl Config {
    /// Reads the settings; `None` after noting problems.
    pub fn read(reader: &mut Reader<'_>) -> Option<Self> {
        let store = Store::read(reader);
        let index = Index::read(reader);
        let embedding = reader.text("memory.embedding");
        let busy_timeout = reader.duration("memory.busy_timeout");
        let readers = reader.within("memory.readers", 0..=64);
        let cache_bytes = reader.get("memory.cache_bytes");
        let rotation = reader.get("memory.rotation");
        let grace = reader.duration("memory.model_grace");
        let live = RedisOptions::read(reader, "memory.live");
        Some(Self {
            store: store?,
            index: index?,
            embedding: embedding?,
            busy_timeout: busy_timeout?,
            readers: match readers? {
                0 => std::thread::available_parallelism().map_or(4, |cores| (2 * cores.get()).clamp(4, 64) as u32),
                readers => readers,
            },
            cache_bytes: cache_bytes?,
            rotation: rotation?,
            grace: grace?,
            live: live?,
        })
    }
}

/// Where vectors are searched.
#[derive(Clone, Debug)]
enum Index {
    /// Files in a directory, relative to the data directory.
    Flat(PathBuf),
    /// A cluster.
    Qdrant(QdrantOptions),
}

impl Index {
    fn read(reader: &mut Reader<'_>) -> Option<Self> {
        const KEY: &str = "memory.index";
        let key = reader.secret("memory.index_key").flatten();
        let uri: StoreUri = reader.get(KEY)?;
        let parsed = match uri.scheme.as_str() {
            "flat" if !uri.rest.is_empty() => Ok(Self::Flat(uri.rest.into())),
            "qdrant" => QdrantOptions::parse(&uri.rest)
                .map(|options| Self::Qdrant(options.with_key(key.map(|key| key.expose().to_owned())))),
            _ => Err("this version knows `flat:PATH` and `qdrant://host1,host2,host3/PREFIX`".into()),
        };
        parsed.map_err(|why| reader.problem(KEY, why)).ok()
    }

    /// The indexes of what the relational store with this identity holds.
    fn open(self, config: &Config, data_dir: &Path, store: &str) -> Result<Arc<dyn Indexes>, Error> {
        let store = store.to_owned();
        Ok(match self {
            Self::Flat(directory) => {
                let directory = data_dir.join(directory);
                Arc::new(FlatIndexes::new(directory, store, config.rotation))
            }
            Self::Qdrant(options) => Arc::new(QdrantIndexes::new(options, store)?),
        })
    }
}

impl fmt::Display for Index {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flat(directory) => write!(f, "{}", directory.display()),
            Self::Qdrant(options) => write!(f, "{options:?}"),
        }
    }
}

/// What the service needs from the process it runs in.
#[derive(Clone, Debug)]
pub struct Deps {
    /// For its instruments.
    pub meter: Meter,
    /// For its health.
    pub health: Health,
    /// Largest message, in bytes.
    pub message_bytes: usize,
    /// Where it keeps things.
    pub data_dir: PathBuf,
    /// The embedding service.
    pub embedder: AnyChannel,
    /// What its background work presents to the embedding service.
    pub credentials: Credentials,
    /// Where its time comes from.
    pub clock: Arc<dyn Clock>,
    /// Ends its streams, so that the process can drain.
    pub stop: CancellationToken,
    /// Ends its background work, once no call is under way any more.
    pub drained: CancellationToken,
}

impl Deps {
    /// Taken from the process, with the embedding service's channel.
    pub fn of(host: &aeterna_rpc::Host, embedder: AnyChannel) -> Self {
        Self {
            meter: host.telemetry.meter("aeterna_memory"),
            health: host.health.clone(),
            message_bytes: host.stack.limits().message_bytes,
            data_dir: host.config.data_dir.clone(),
            embedder,
            credentials: host.credentials(),
            clock: Arc::clone(&host.clock),
            stop: host.stop.clone(),
            drained: host.drained.clone(),
        }
    }
}

/// The running service.
pub struct Service {
    /// Its routes.
    pub routes: Routes,
    /// Its background work, which ends after `drained` and then lets go of the data directory.
    pub background: JoinHandle<()>,
}

/// Opens the stores, brings the index in step and makes the service's routes.
///
/// # Errors
/// When the data directory is taken or a store can't be opened.
pub async fn build(config: Config, deps: Deps) -> Result<Service, Error> {
    for service in SERVICES {
        deps.health
            .report(service, "store", Dependency::Down("opening".into()))
            .await;
    }
    let lock = lock(&deps.data_dir)?;
    let store = config.store.open(&config, &deps.data_dir).await?;
    for service in SERVICES {
        deps.health.report(service, "store", Dependency::Up).await;
    }

    let (wanted, first) = models::choose(deps.embedder.clone(), &deps.credentials, store.as_ref()).await?;
    let identity = store.identity().await?;
    let indexes = config.index.clone().open(&config, &deps.data_dir, &identity)?;
    let unusable = |error: StorageError| {
        let message = format!("the vector index `{}` can't be used: {error}", config.index);
        Error::new(Reason::NotConfigured, message)
    };
    let began = store.last_sequence().await?;
    let (index, fresh) = indexes.open(&first, began).await.map_err(unusable)?;
    let app = Arc::new(App {
        indexed: watch::Sender::new(index.watermark().unwrap_or_default()),
        index_away: AtomicBool::new(false),
        latencies: Latencies::default(),
        store,
        indexes,
        serving: RwLock::new(Arc::new(Serving::new(first, index))),
        wanted,
        embedder: deps.embedder,
        breaker: Breaker::default(),
        reader: Breaker::default(),
        credentials: deps.credentials,
        clock: deps.clock,
        metrics: metrics::Metrics::new(&deps.meter),
        message_bytes: deps.message_bytes,
        committed: app::Committed::new(),
        began,
        changes: broadcast::Sender::new(app::RING),
        catching_up: Semaphore::new(config.store.watchers(config.readers)),
        stop: deps.stop,
    });
    // A file has one process.
    let grace = match config.store {
        Store::Sqlite(_) => Duration::ZERO,
        Store::Postgres(..) => config.grace,
    };
    let log = app::log_of(&identity);
    let live: Option<Arc<dyn Live>> = match config.live {
        Some(options) => Some(Arc::new(RedisLive::new(options)?)),
        None => None,
    };
    let turns = live.clone().map(|live| Turns::new(live, log.clone()));
    let work = Background::new(Arc::clone(&app), deps.health.clone(), SERVICE, grace, turns);
    if let Some(why) = fresh {
        let count = work.rebuild(&app.serving()).await?;
        // A new installation has nothing to rebuild, and nobody to tell.
        if count > 0 {
            tracing::info!(
                vectors = count,
                why,
                "rebuilt the vector index from the relational store"
            );
        }
    }
    deps.health.report(SERVICE, "index", Dependency::Up).await;
    let live = live.map(|live| {
        let app = Arc::clone(&app);
        LiveWork::new(app, live, log, convert::told, deps.health.clone(), SERVICE)
    });
    let (drained, store) = (deps.drained, Arc::clone(&app.store));
    let background = tokio::spawn(async move {
        let live = async {
            if let Some(live) = live {
                live.run(drained.clone()).await;
            }
        };
        tokio::join!(work.run(drained.clone()), live);
        store.close().await;
        drop(lock);
    });
    let most = deps.message_bytes;
    let memories = MemoryServiceServer::new(grpc::Memories(Arc::clone(&app)))
        .max_decoding_message_size(most)
        .max_encoding_message_size(most);
    let knowledge = KnowledgeServiceServer::new(grpc::Knowledge(Arc::clone(&app)))
        .max_decoding_message_size(most)
        .max_encoding_message_size(most);
    let policies = PolicyServiceServer::new(grpc::Policies(app))
        .max_decoding_message_size(most)
        .max_encoding_message_size(most);
    Ok(Service {
        routes: Routes::new(memories).add_service(knowledge).add_service(policies),
        background,
    })
}

/// Moves everything from a SQLite file, relative to the data directory, into the store of the settings; no service may run on
/// that directory meanwhile. `tell` hears of progress.
///
/// # Errors
/// NOT_CONFIGURED when there is no such file or it is the store of the settings itself; INVALID_STATE when that store has anything
/// of its own or what arrived is not what was sent; or when a store fails, and then the same call goes on.
pub async fn migrate_from(
    config: &Config,
    data_dir: &Path,
    file: &Path,
    tell: impl FnMut(Stage, &Moved),
) -> Result<Moved, Error> {
    let shown = data_dir.join(file);
    let same = matches!(&config.store, Store::Sqlite(path) if data_dir.join(path) == shown);
    if same || !shown.is_file() {
        let what = if same {
            "is the store to migrate to: set `memory.store`"
        } else {
            "is not there"
        };
        return Err(Error::new(
            Reason::NotConfigured,
            format!("`{}` {what}", shown.display()),
        ));
    }
    let _lock = lock(data_dir)?;
    let from = Store::Sqlite(file.into()).open(config, data_dir).await?;
    let to = config.store.open(config, data_dir).await?;
    let moved = migrate::migrate(from.as_ref(), to.as_ref(), tell).await;
    from.close().await;
    to.close().await;
    moved
}

/// Compares the vector index and the live streams with the relational store, and mends them unless it is `dry`; services may run
/// meanwhile, but not on the data directory of an embedded store. `tell` hears of progress.
///
/// # Errors
/// NOT_CONFIGURED when no service has ever run on the store; DEPENDENCY_UNAVAILABLE when one of them is away or not well.
pub async fn reconcile(
    config: &Config,
    data_dir: &Path,
    dry: bool,
    tell: impl FnMut(Step, &Reconciled),
) -> Result<Reconciled, Error> {
    let embedded = matches!(config.store, Store::Sqlite(_)) || matches!(config.index, Index::Flat(_));
    let _lock = if embedded { Some(lock(data_dir)?) } else { None };
    let store = config.store.open(config, data_dir).await?;
    let reconciled = async {
        let model = models::remembered_first(store.as_ref()).await?;
        let identity = store.identity().await?;
        let indexes = config.index.clone().open(config, data_dir, &identity)?;
        let (index, _) = indexes.open(&model, store.last_sequence().await?).await?;
        let live = match config.live.clone() {
            Some(options) => Some(RedisLive::new(options)?),
            None => None,
        };
        let parts = reconcile::Parts {
            store: store.as_ref(),
            index: index.as_ref(),
            model: &model,
            live: live.as_ref().map(|live| live as &dyn Live),
            log: &app::log_of(&identity),
            dry,
        };
        parts.reconcile(tell).await
    };
    let reconciled = reconciled.await;
    store.close().await;
    reconciled
}

fn lock(directory: &Path) -> Result<DirectoryLock, Error> {
    DirectoryLock::take(directory).map_err(|error| {
        let shown = directory.display();
        let message = match error.kind() {
            std::io::ErrorKind::WouldBlock => format!(
                "another process uses the data directory `{shown}`; stop it, or set `server.data_dir` to another one"
            ),
            _ => format!("the data directory `{shown}` (`server.data_dir`) can't be used: {error}"),
        };
        Error::new(Reason::NotConfigured, message)
    })
}
