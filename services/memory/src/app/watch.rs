//! Watching changes as they are committed.
//!
//! One task reads the outbox and hands each change to all watchers through a ring of bounded size. A watcher that falls behind
//! the ring, or begins in the past, reads the outbox itself, a few changes at a time, until it has caught up: it is told
//! everything, in order, once. One that is very far behind is told to begin again from where it stands.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use aeterna_error::{Error, Reason};
use aeterna_rpc::RequestContext;
use aeterna_types::{Layer, Scope, TenantId, Timestamp};
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::Instrument as _;

use super::App;
use super::get::view;
use crate::domain::{Change, Sequence, Subject, View};
use crate::filter::Filter;

/// Changes that the ring holds.
pub const RING: usize = 1024;
/// Changes read from the outbox at a time, for all watchers.
const PAGE: usize = 256;
/// Changes that a watcher reads from the outbox at a time, at most.
const OWN: usize = 32;
/// What they may take, as far as those before tell: they stay in memory as long as its caller does not read.
const OWN_BYTES: usize = 16 << 10;
/// Changes by which a watcher may have missed the ring and still catch up by itself.
const MISSED: u64 = 4 * RING as u64;
/// How often a watcher without news is told that it is still connected, and where it stands.
const HEARTBEAT: Duration = Duration::from_secs(15);

/// What is watched.
#[derive(Clone, Debug)]
pub struct WatchQuery {
    /// Where the caller stands.
    pub scope: Option<Scope>,
    /// Only these layers; empty: any.
    pub layers: Vec<Layer>,
    /// Only memories that satisfy it; what was removed for good satisfies every filter.
    pub filter: Option<Filter>,
    /// Also tell changes of documents.
    pub documents: bool,
    /// Also tell changes of policies.
    pub policies: bool,
    /// Continue after this change; `None`: from now on.
    pub after: Option<Sequence>,
}

/// What a watcher is told.
#[derive(Clone, Debug)]
pub enum News {
    /// A change.
    Change(Arc<Change>),
    /// Nothing but where it stands, and when.
    Heartbeat(Sequence, Timestamp),
}

/// A watcher.
pub struct Watcher {
    app: Arc<App>,
    tenant: TenantId,
    view: View,
    layers: Vec<Layer>,
    filter: Option<Filter>,
    documents: bool,
    policies: bool,
    position: Sequence,
    backlog: VecDeque<Arc<Change>>,
    /// Changes to read from the outbox next time.
    own: usize,
    /// What is being read from there.
    reading: Option<JoinHandle<Result<Page, Error>>>,
    live: Option<broadcast::Receiver<Arc<Change>>>,
    /// When it is told where it stands if there is nothing else.
    heartbeat: Instant,
    /// Those that wait for their turn to read leave when it is dropped.
    here: CancellationToken,
    _gone: DropGuard,
}

/// Changes, and what follows once they are less than was asked for.
type Page = (Vec<Change>, broadcast::Receiver<Arc<Change>>);

impl App {
    /// Begins to watch what the caller sees.
    ///
    /// # Errors
    /// SCOPE_DENIED, or INVALID_FIELD when the resume token is of another store.
    pub async fn watch(self: &Arc<Self>, context: &RequestContext, query: WatchQuery) -> Result<Watcher, Error> {
        let view = view(context, query.scope.as_ref())?;
        // Before the end is read, so that nothing falls between the two.
        let live = self.changes.subscribe();
        self.store.reach(query.after.unwrap_or_default()).await?;
        let position = match query.after {
            Some(after) => after,
            None => self.store.last_sequence().await?,
        };
        if query.after.is_some() && !self.store.has(position).await? {
            let what = "is of another store, or of a state that was replaced; start without it";
            return Err(Error::field("resume_token", what));
        }
        let here = CancellationToken::new();
        Ok(Watcher {
            app: Arc::clone(self),
            tenant: context.principal().tenant.clone(),
            view,
            layers: query.layers,
            filter: query.filter,
            documents: query.documents,
            policies: query.policies,
            position,
            backlog: VecDeque::new(),
            own: 1,
            reading: None,
            live: query.after.is_none().then_some(live),
            heartbeat: Instant::now() + HEARTBEAT,
            _gone: here.clone().drop_guard(),
            here,
        })
    }

    /// Hands changes from the outbox to the watchers, until it is told to stop.
    pub(super) async fn publish(&self, stop: &CancellationToken) {
        let mut committed = self.committed.subscribe();
        let mut position = self.began;
        loop {
            if let Err(error) = self.publish_from(&mut position).await {
                tracing::warn!(error = %error.chain(), "watchers can't be told; trying again");
            }
            tokio::select! {
                () = stop.cancelled() => return,
                _ = committed.changed() => {}
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
            }
        }
    }

    async fn publish_from(&self, position: &mut Sequence) -> Result<(), Error> {
        if self.changes.receiver_count() == 0 {
            let last = self.store.last_sequence().await?;
            // A watcher that comes from here on reads what was committed before from the outbox itself. One that came meanwhile
            // may have read it when there was less.
            if self.changes.receiver_count() == 0 {
                *position = last;
                return Ok(());
            }
        }
        loop {
            let page = self.store.changes(None, *position, PAGE).await?;
            let Some(last) = page.last() else { return Ok(()) };
            *position = last.sequence;
            for change in page {
                // Nobody may be listening any more, which is no error.
                let _ = self.changes.send(Arc::new(change));
            }
        }
    }
}

fn ends() -> Error {
    let message = "the server is draining; watch again with the last resume token";
    Error::new(Reason::Draining, message)
}

impl Watcher {
    /// The next thing to tell; waits for it.
    ///
    /// # Errors
    /// DRAINING when the process ends, FELL_BEHIND when its caller reads too slowly, and whatever the store fails with.
    pub async fn next(&mut self) -> Result<News, Error> {
        let news = self.find().await?;
        self.heartbeat = Instant::now() + HEARTBEAT;
        Ok(news)
    }

    async fn find(&mut self) -> Result<News, Error> {
        loop {
            // Also when others' changes are all that there is.
            if Instant::now() >= self.heartbeat {
                return Ok(self.stands());
            }
            if let Some(change) = self.backlog.pop_front() {
                if let Some(news) = self.look_at(change) {
                    return Ok(news);
                }
                continue;
            }
            let draining = self.app.stop.cancelled();
            let Some(live) = &mut self.live else {
                let reading = self.reading.take().unwrap_or_else(|| self.read_on());
                let reading = self.reading.insert(reading);
                let page = tokio::select! {
                    () = draining => return Err(ends()),
                    () = tokio::time::sleep_until(self.heartbeat) => continue,
                    page = reading => page,
                };
                self.reading = None;
                self.take(page.map_err(Error::internal)??);
                continue;
            };
            let received = tokio::select! {
                () = draining => return Err(ends()),
                () = tokio::time::sleep_until(self.heartbeat) => continue,
                received = live.recv() => received,
            };
            match received {
                Ok(change) => self.backlog.push_back(change),
                Err(RecvError::Lagged(missed)) if missed > MISSED => {
                    let message = format!(
                        "the caller reads too slowly: {missed} changes went by; watch again with the last resume token"
                    );
                    return Err(Error::new(Reason::FellBehind, message));
                }
                // What the ring has lost is still in the outbox.
                Err(RecvError::Lagged(_)) => self.live = None,
                Err(RecvError::Closed) => return Err(Error::new(Reason::Draining, "the server ends")),
            }
        }
    }

    fn stands(&self) -> News {
        News::Heartbeat(self.position, self.app.clock.now())
    }

    /// Begins to read from the outbox, when it is its turn. It is done to its end, whether or not somebody waits for it.
    fn read_on(&self) -> JoinHandle<Result<Page, Error>> {
        let (app, here) = (Arc::clone(&self.app), self.here.clone());
        let (tenant, position, own) = (self.tenant.clone(), self.position, self.own);
        let read = async move {
            let turn = tokio::select! {
                () = here.cancelled() => return Err(Error::internal("nobody watches any more")),
                turn = app.catching_up.acquire() => turn,
            };
            let _turn = turn.map_err(Error::internal)?;
            let live = app.changes.subscribe();
            let page = app.store.changes(Some(&tenant), position, own).await?;
            Ok((page, live))
        };
        tokio::spawn(read.in_current_span())
    }

    /// Takes what was read; once there is less than a page, the ring has all that follows.
    fn take(&mut self, (page, live): Page) {
        self.live = (page.len() < self.own).then_some(live);
        let bytes: usize = page.iter().map(Change::bytes).sum();
        let of_each = bytes / page.len().max(1);
        self.own = (OWN_BYTES / of_each.max(1)).clamp(1, OWN);
        self.backlog.extend(page.into_iter().map(Arc::new));
    }

    /// Moves on, and says what is to be told of a change.
    fn look_at(&mut self, change: Arc<Change>) -> Option<News> {
        if change.sequence <= self.position {
            return None;
        }
        self.position = change.sequence;
        let layer = change.scope.layer();
        let everywhere = matches!(change.subject, Subject::Policy(..));
        let shown = change.tenant == self.tenant
            && self.view.sees(&change.scope)
            && (everywhere || self.layers.is_empty() || layer.is_some_and(|layer| self.layers.contains(&layer)));
        let wanted = match &change.subject {
            Subject::Memory(_, None) => true,
            Subject::Memory(_, Some(memory)) => self.filter.as_ref().is_none_or(|filter| filter.matches(memory)),
            Subject::Document(_) => self.documents,
            Subject::Policy(..) => self.policies,
        };
        (shown && wanted).then_some(News::Change(change))
    }
}
