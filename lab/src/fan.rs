//! A reader of the live streams, as a gateway is one: it follows them by itself and resumes where it stood; told of a gap, it
//! goes to the store for what came before.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use aeterna_proto::memory::v1::{ChangeKind, Memory, WatchResponse};
use aeterna_storage::live::{Live as _, Page};
use aeterna_storage::{RedisLive, RedisOptions};
use aeterna_testkit::lab::{Lab, secrets};
use anyhow::Context as _;
use prost::Message as _;
use tokio::sync::watch;

use crate::history::{History, Kind, Operation, Outcome};

/// Whose memories the load writes.
const TENANT: &str = "local";
/// How often the stream is read.
const LOOK: Duration = Duration::from_millis(20);
/// Entries read at a time.
const ENTRIES: usize = 500;
/// How long the stream may take to have the last write.
const TELL: Duration = Duration::from_secs(30);

/// The contents of acknowledged memories, by their identifiers.
#[derive(Clone, Debug, Default)]
pub struct Acknowledged(Arc<Mutex<HashMap<String, String>>>);

impl Acknowledged {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// No caller is left who could have anything more acknowledged: only the load and the reader of the streams have this still.
    fn is_final(&self) -> bool {
        Arc::strong_count(&self.0) <= 2
    }

    pub fn add(&self, id: String, content: String) {
        self.lock().insert(id, content);
    }

    /// Names what was read by its content, as writers do.
    pub fn name(&self, operations: &mut [Operation]) {
        let contents = self.lock();
        for read in operations.iter_mut().filter(|read| read.kind == Kind::Fan) {
            if let Some(content) = contents.get(&read.key) {
                read.key.clone_from(content);
            }
        }
    }
}

/// One reader.
pub struct Fan {
    live: RedisLive,
    log: String,
    place: i64,
    /// What the names of the load's users begin with: others may write meanwhile.
    run: String,
}

impl Fan {
    /// Stands at the end of what there is.
    ///
    /// # Errors
    /// When the lab has no log yet.
    pub async fn new(lab: &Lab, run: &str) -> anyhow::Result<Self> {
        let uri = lab.live();
        let (scheme, rest) = uri.split_once(':').context("a URI has a scheme")?;
        let options = RedisOptions::parse(scheme, rest).map_err(anyhow::Error::msg)?;
        let [server, sentinels] = [secrets::REDIS, secrets::SENTINELS].map(|secret| Some(secret.to_owned()));
        let live = RedisLive::new(options.with_passwords(server, sentinels))?;
        let primary = lab.primary().await.context("there is no primary")?;
        let store = lab.sql(&primary, "aeterna", "SELECT value FROM meta WHERE name = 'store'")?;
        let log = format!("memory:{store}");
        let stands = live.stands(&log).await?;
        let place = stands.context("nobody has begun the live streams")?;
        Ok(Self {
            live,
            log,
            place,
            run: run.to_owned(),
        })
    }

    /// Follows until everything that was acknowledged has come.
    pub async fn follow(
        mut self,
        history: Arc<History>,
        acknowledged: Acknowledged,
        stopping: watch::Receiver<bool>,
    ) -> anyhow::Result<()> {
        let (mut seen, mut ended) = (HashSet::new(), None);
        loop {
            let over = *stopping.borrow() && acknowledged.is_final();
            match self.live.read(&self.log, TENANT, self.place, ENTRIES).await {
                Ok(Page::Entries(entries)) => {
                    for (place, payload) in entries {
                        self.place = place;
                        let told = WatchResponse::decode(payload.as_slice())?;
                        let ours = |memory: &Memory| {
                            let scope = memory.scope.as_ref();
                            scope.is_some_and(|scope| scope.user.starts_with(&self.run))
                        };
                        if told.kind() == ChangeKind::Added
                            && let Some(memory) = told.memory.filter(ours)
                        {
                            seen.insert(memory.id.clone());
                            history.add(operation(&history, memory.id, place, Outcome::Done));
                        }
                    }
                }
                Ok(Page::Gap) => {
                    if let Ok(Some(stands)) = self.live.stands(&self.log).await {
                        history.add(operation(&history, String::new(), 0, Outcome::Failed("Gap".into())));
                        seen.extend(acknowledged.lock().keys().cloned());
                        self.place = stands;
                    }
                }
                Err(_) => history.add(operation(
                    &history,
                    String::new(),
                    0,
                    Outcome::Failed("NoStream".into()),
                )),
            }
            if over {
                let since = ended.get_or_insert_with(Instant::now);
                if acknowledged.lock().keys().all(|id| seen.contains(id)) || since.elapsed() > TELL {
                    return Ok(());
                }
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

fn operation(history: &History, key: String, place: i64, outcome: Outcome) -> Operation {
    Operation {
        kind: Kind::Fan,
        key,
        value: place.unsigned_abs(),
        floor: 0,
        at: history.now(),
        took: Duration::ZERO,
        outcome,
    }
}
