//! Writers, readers and searchers that go through the gateway, and repeat what failed as the errors tell them to.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use aeterna_proto::common::v1::Scope;
use aeterna_proto::memory::v1::memory_service_client::MemoryServiceClient;
use aeterna_proto::memory::v1::{
    AddOutcome, AddRequest, ChangeKind, GetRequest, HistoryRequest, ListRequest, Memory, SearchMode, SearchRequest,
    UpdateRequest, WatchRequest, WatchResponse,
};
use aeterna_rpc::AnyChannel;
use anyhow::{Context as _, bail};
use prost_types::FieldMask;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_types::StatusExt as _;

use crate::check::Stored;
use crate::fan::{Acknowledged, Fan};
use crate::history::{History, Kind, Operation, Outcome};

type Client = MemoryServiceClient<AnyChannel>;

const WRITERS: usize = 8;
const SEARCHERS: usize = 2;
/// The deadline of each attempt.
const ATTEMPT: Duration = Duration::from_secs(4);
/// The pause before what failed is tried again, and between the operations of one caller.
const PAUSE: Duration = Duration::from_millis(20);
/// How long a watcher may take to be told of the last write.
const TELL: Duration = Duration::from_secs(30);
/// How long a caller goes on after the end of the load to have its last write acknowledged.
const GRACE: Duration = Duration::from_secs(60);

/// What a writer has been told last; readers hold it to that.
#[derive(Clone, Debug, Default)]
struct Told {
    counter: Memory,
    count: u64,
    content: String,
    /// The embedding service answered when it was added; else its vector comes later, and its writer knows.
    embedded: bool,
    token: String,
}

/// A load under way.
#[derive(Debug)]
pub struct Load {
    pub history: Arc<History>,
    stop: watch::Sender<bool>,
    callers: JoinSet<anyhow::Result<()>>,
    /// The counters' identifiers, by the names of their writers.
    counters: BTreeMap<String, String>,
    acknowledged: Acknowledged,
    client: Client,
}

impl Load {
    /// Starts one; `run` keeps it apart from others on the same stores.
    pub async fn start(channel: AnyChannel, fan: Fan, run: &str) -> anyhow::Result<Self> {
        let client = Client::new(channel);
        let history = Arc::new(History::new());
        let (stop, stopping) = watch::channel(false);
        let mut load = Self {
            history: Arc::clone(&history),
            stop,
            callers: JoinSet::new(),
            counters: BTreeMap::new(),
            acknowledged: Acknowledged::default(),
            client: client.clone(),
        };
        let reads = fan.follow(Arc::clone(&history), load.acknowledged.clone(), stopping.clone());
        load.callers.spawn(reads);
        let asked = Arc::<Mutex<HashMap<String, Duration>>>::default();
        for number in 0..WRITERS {
            let name = format!("{run}-{number}");
            let mut caller = Caller {
                client: client.clone(),
                history: Arc::clone(&history),
                stopping: stopping.clone(),
                asked: Arc::clone(&asked),
                acknowledged: load.acknowledged.clone(),
                name: name.clone(),
            };
            let counter = caller.counter().await?;
            load.acknowledged
                .add(counter.counter.id.clone(), counter.counter.content.clone());
            load.counters.insert(name, counter.counter.id.clone());
            let (tell, heard) = watch::channel(counter);
            // Before anything is written that it must be told of.
            let stream = caller.open(String::new()).await?;
            load.callers.spawn(caller.clone().hear(stream, heard.clone()));
            load.callers.spawn(caller.clone().write(tell));
            if number < SEARCHERS {
                load.callers.spawn(caller.clone().search(heard.clone()));
            }
            load.callers.spawn(caller.read(heard));
        }
        Ok(load)
    }

    /// Waits until operations of these kinds that were asked for after a moment are done.
    pub async fn resumed(&self, kinds: &[Kind], since: Duration, within: Duration) -> anyhow::Result<()> {
        let began = Instant::now();
        while !self.history.done_since(kinds, since) {
            if began.elapsed() > within {
                bail!("{kinds:?} did not go on within {within:?}");
            }
            tokio::time::sleep(PAUSE).await;
        }
        Ok(())
    }

    /// Lets all callers end what they are at, and looks at what is stored then.
    pub async fn end(mut self) -> anyhow::Result<(Vec<Operation>, Stored)> {
        self.stop.send_replace(true);
        while let Some(ended) = self.callers.join_next().await {
            ended.context("a caller panicked")??;
        }
        let stored = self.stored().await?;
        let mut operations = self.history.all();
        self.acknowledged.name(&mut operations);
        Ok((operations, stored))
    }

    async fn stored(&self) -> anyhow::Result<Stored> {
        let mut stored = Stored::default();
        for (name, counter) in &self.counters {
            let mut page_token = String::new();
            loop {
                let request = ListRequest {
                    scope: user(name),
                    page_size: 1000,
                    page_token,
                    ..Default::default()
                };
                let page = self.client.clone().list(request).await?.into_inner();
                for memory in page.memories.into_iter().filter(|memory| memory.id != *counter) {
                    *stored.contents.entry(memory.content).or_default() += 1;
                }
                page_token = page.next_page_token;
                if page_token.is_empty() {
                    break;
                }
            }
            let mut values = Vec::new();
            let mut page_token = String::new();
            loop {
                let request = HistoryRequest {
                    id: counter.clone(),
                    page_size: 1000,
                    page_token,
                    ..Default::default()
                };
                let page = self.client.clone().history(request).await?.into_inner();
                for version in page.versions {
                    values.push(count(&version.memory.unwrap_or_default())?);
                }
                page_token = page.next_page_token;
                if page_token.is_empty() {
                    break;
                }
            }
            values.reverse();
            // The first one was there before the load.
            stored.counters.insert(name.clone(), values.split_off(1));
        }
        Ok(stored)
    }
}

fn user(name: &str) -> Option<Scope> {
    Some(Scope {
        user: name.into(),
        ..Default::default()
    })
}

/// The value of a counter, which is its content's last word.
fn count(counter: &Memory) -> anyhow::Result<u64> {
    let last = counter.content.rsplit(' ').next().unwrap_or_default();
    last.parse()
        .with_context(|| format!("`{}` is no counter", counter.content))
}

/// Nobody knows what became of it, and it is worth another attempt. A connection that breaks in an answer is UNKNOWN or
/// INTERNAL to tonic; then the status has a source, which none has that a server sent.
fn is_open(status: &Status) -> bool {
    let broken = std::error::Error::source(status).is_some();
    let open = [
        Code::Unavailable,
        Code::DeadlineExceeded,
        Code::Cancelled,
        Code::Aborted,
        Code::ResourceExhausted,
    ];
    broken || open.contains(&status.code())
}

/// One client.
#[derive(Clone)]
struct Caller {
    client: Client,
    history: Arc<History>,
    stopping: watch::Receiver<bool>,
    /// When each memory was first asked for.
    asked: Arc<Mutex<HashMap<String, Duration>>>,
    acknowledged: Acknowledged,
    name: String,
}

/// What an operation is about.
struct Subject<'a> {
    kind: Kind,
    key: &'a str,
    floor: u64,
}

impl Caller {
    /// One attempt, kept in the history; `value` looks into the answer. `Err` is worth another attempt.
    async fn attempt<T>(
        &self,
        subject: &Subject<'_>,
        call: impl Future<Output = Result<Response<T>, Status>>,
        value: impl FnOnce(&T) -> anyhow::Result<(u64, Outcome)>,
    ) -> anyhow::Result<Result<T, Status>> {
        let began = self.history.now();
        let answer = match tokio::time::timeout(ATTEMPT, call).await {
            Ok(answer) => answer.map(Response::into_inner),
            Err(_) => Err(Status::deadline_exceeded("no answer")),
        };
        let (value, outcome) = match &answer {
            Ok(answer) => value(answer)?,
            Err(status) => (subject.floor, Outcome::Failed(format!("{:?}", status.code()))),
        };
        let at = self.history.now();
        self.history.add(Operation {
            kind: subject.kind,
            key: subject.key.into(),
            value,
            floor: subject.floor,
            at,
            took: at - began,
            outcome,
        });
        if let Err(status) = &answer
            && !is_open(status)
        {
            bail!("{:?} of `{}` was refused: {status:?}", subject.kind, subject.key);
        }
        Ok(answer)
    }

    fn is_over(&self) -> bool {
        *self.stopping.borrow()
    }

    /// Waits as long as it is told before it tries once more.
    async fn again(&self, failed: &Status, over: &mut Option<Instant>) -> anyhow::Result<()> {
        if self.is_over() && over.get_or_insert_with(Instant::now).elapsed() > GRACE {
            bail!("a write was not acknowledged within {GRACE:?} after the load");
        }
        let told = failed.get_details_retry_info().and_then(|retry| retry.retry_delay);
        tokio::time::sleep(told.unwrap_or(PAUSE)).await;
        Ok(())
    }

    async fn counter(&mut self) -> anyhow::Result<Told> {
        let memory = Memory {
            scope: user(&self.name),
            content: format!("{} counts 0", self.name),
            ..Default::default()
        };
        let request = AddRequest {
            memory: Some(memory),
            request_id: format!("{}-counter", self.name),
        };
        let added = self.client.add(request).await?.into_inner();
        Ok(Told {
            counter: added.memory.context("an Add answers with the memory")?,
            count: 0,
            content: String::new(),
            embedded: false,
            token: added.consistency_token,
        })
    }

    async fn write(self, tell: watch::Sender<Told>) -> anyhow::Result<()> {
        let mut told = tell.borrow().clone();
        for number in 1.. {
            if self.is_over() {
                break;
            }
            self.add(&mut told, number).await?;
            tell.send_replace(told.clone());
            if number % 2 == 0 {
                self.count(&mut told).await?;
                tell.send_replace(told.clone());
            }
            tokio::time::sleep(PAUSE).await;
        }
        Ok(())
    }

    async fn add(&self, told: &mut Told, number: u64) -> anyhow::Result<()> {
        // A word of its own, so that a search can find it.
        let content = format!("{0} notes fact{number}of{1}", self.name, self.name.replace('-', ""));
        let memory = Memory {
            scope: user(&self.name),
            content: content.clone(),
            ..Default::default()
        };
        let message = AddRequest {
            memory: Some(memory),
            request_id: format!("{}-add-{number}", self.name),
        };
        let subject = Subject {
            kind: Kind::Add,
            key: &content,
            floor: 0,
        };
        let asked = |at| {
            self.asked
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(content.clone(), at)
        };
        asked(self.history.now());
        let mut over = None;
        loop {
            let mut client = self.client.clone();
            let call = client.add(timed(message.clone()));
            let added = self.attempt(&subject, call, |added| {
                let outcome = if added.outcome() == AddOutcome::Created {
                    Outcome::Done
                } else {
                    Outcome::Doubled
                };
                Ok((0, outcome))
            });
            match added.await? {
                Ok(added) => {
                    told.token = added.consistency_token;
                    let memory = added.memory.context("an Add answers with the memory")?;
                    told.embedded = !memory.embedding_model.is_empty();
                    self.acknowledged.add(memory.id, content.clone());
                    told.content = content;
                    return Ok(());
                }
                Err(failed) => self.again(&failed, &mut over).await?,
            }
        }
    }

    async fn count(&self, told: &mut Told) -> anyhow::Result<()> {
        let next = told.count + 1;
        let memory = Memory {
            id: told.counter.id.clone(),
            etag: told.counter.etag.clone(),
            content: format!("{} counts {next}", self.name),
            ..Default::default()
        };
        let message = UpdateRequest {
            memory: Some(memory),
            update_mask: Some(FieldMask {
                paths: vec!["content".into()],
            }),
            request_id: format!("{}-count-{next}", self.name),
        };
        let subject = Subject {
            kind: Kind::Count,
            key: &self.name,
            floor: next,
        };
        let mut over = None;
        loop {
            let mut client = self.client.clone();
            let call = client.update(timed(message.clone()));
            let updated = self.attempt(&subject, call, |_| Ok((next, Outcome::Done)));
            match updated.await? {
                Ok(updated) => {
                    told.counter = updated.memory.context("an Update answers with the memory")?;
                    told.count = next;
                    told.token = updated.consistency_token;
                    return Ok(());
                }
                Err(failed) => self.again(&failed, &mut over).await?,
            }
        }
    }

    async fn read(self, heard: watch::Receiver<Told>) -> anyhow::Result<()> {
        while !self.is_over() {
            let told = heard.borrow().clone();
            let message = GetRequest {
                id: told.counter.id.clone(),
                consistency_token: told.token.clone(),
                ..Default::default()
            };
            let subject = Subject {
                kind: Kind::Read,
                key: &self.name,
                floor: told.count,
            };
            let mut client = self.client.clone();
            let call = client.get(timed(message));
            let read = self.attempt(&subject, call, |read| {
                Ok((count(read.memory.as_ref().unwrap_or(&told.counter))?, Outcome::Done))
            });
            let _ = read.await?;
            tokio::time::sleep(PAUSE).await;
        }
        Ok(())
    }

    async fn open(&self, resume_token: String) -> Result<Streaming<WatchResponse>, Status> {
        let request = WatchRequest {
            scope: user(&self.name),
            resume_token,
            ..Default::default()
        };
        let opened = tokio::time::timeout(ATTEMPT, self.client.clone().watch(request)).await;
        let opened = opened.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer")));
        opened.map(Response::into_inner)
    }

    /// Hears of what a writer adds, and resumes where a stream broke off, until it has heard of the last one.
    async fn hear(self, stream: Streaming<WatchResponse>, writer: watch::Receiver<Told>) -> anyhow::Result<()> {
        let (mut stream, mut resume_token) = (Some(stream), String::new());
        let (mut last, mut ended) = (String::new(), None);
        loop {
            if writer.has_changed().is_err() {
                let since = ended.get_or_insert_with(Instant::now);
                if last == writer.borrow().content || since.elapsed() > TELL {
                    return Ok(());
                }
            }
            let told = match &mut stream {
                // A look at the writer now and then; a message that was begun is not lost by it.
                Some(stream) => match tokio::time::timeout(ATTEMPT / 10, stream.message()).await {
                    Ok(told) => told,
                    Err(_) => continue,
                },
                None => match self.open(resume_token.clone()).await {
                    Ok(next) => {
                        stream = Some(next);
                        continue;
                    }
                    Err(status) => Err(status),
                },
            };
            let now = self.history.now();
            let (key, value, outcome) = match told {
                Ok(Some(event)) => {
                    resume_token = event.resume_token.clone();
                    let added = event.kind() == ChangeKind::Added;
                    let Some(memory) = event.memory.filter(|_| added) else {
                        continue;
                    };
                    let Some(value) = number(&memory) else { continue };
                    last.clone_from(&memory.content);
                    (memory.content, value, Outcome::Done)
                }
                Ok(None) => {
                    stream = None;
                    continue;
                }
                Err(status) => {
                    if !is_open(&status) {
                        bail!("a watcher was refused: {status:?}");
                    }
                    stream = None;
                    tokio::time::sleep(PAUSE).await;
                    (String::new(), 0, Outcome::Failed(format!("{:?}", status.code())))
                }
            };
            let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner).remove(&key);
            self.history.add(Operation {
                kind: Kind::Hear,
                key,
                value,
                floor: 0,
                at: now,
                took: asked.map_or(Duration::ZERO, |asked| now.saturating_sub(asked)),
                outcome,
            });
        }
    }

    async fn search(self, heard: watch::Receiver<Told>) -> anyhow::Result<()> {
        for kind in [Kind::Search, Kind::Near].into_iter().cycle() {
            if self.is_over() {
                break;
            }
            let told = heard.borrow().clone();
            let Some(word) = told.content.rsplit(' ').next().filter(|word| !word.is_empty()) else {
                tokio::time::sleep(PAUSE).await;
                continue;
            };
            let near = kind == Kind::Near;
            let mode = if near { SearchMode::Dense } else { SearchMode::Hybrid };
            let message = SearchRequest {
                scope: told.counter.scope.clone(),
                query: if near { told.content.clone() } else { word.into() },
                mode: mode.into(),
                consistency_token: told.token.clone(),
                ..Default::default()
            };
            let subject = Subject {
                kind,
                key: &told.content,
                floor: u64::from(!near || told.embedded),
            };
            let mut client = self.client.clone();
            let call = client.search(timed(message));
            let found = self.attempt(&subject, call, |found| {
                if near && found.degraded {
                    return Ok((0, Outcome::Failed("Degraded".into())));
                }
                let mut memories = found.results.iter().filter_map(|result| result.memory.as_ref());
                Ok((
                    u64::from(memories.any(|memory| memory.content == told.content)),
                    Outcome::Done,
                ))
            });
            let _ = found.await?;
            tokio::time::sleep(PAUSE).await;
        }
        Ok(())
    }
}

/// The number of a memory that a writer has added.
fn number(memory: &Memory) -> Option<u64> {
    let word = memory.content.rsplit(' ').next()?;
    word.strip_prefix("fact")?.split("of").next()?.parse().ok()
}

/// A request with a deadline.
fn timed<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(ATTEMPT);
    request
}
