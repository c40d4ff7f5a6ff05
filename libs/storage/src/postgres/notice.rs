//! Warnings of the server. The driver hands them to nobody but the log, so they are taken from there, for one future at a time.

use std::cell::Cell;

use tracing::instrument::WithSubscriber as _;
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::Interest;
use tracing::{Dispatch, Event, Level, Metadata, Subscriber};

/// Under which name the driver logs what the server says by the way.
const NOTICE: &str = "sqlx::postgres::notice";

tokio::task_local! {
    static WARNED: Cell<bool>;
}

/// Marks a warning, and knows nothing else.
struct Listener;

impl Subscriber for Listener {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        match self.enabled(metadata) {
            true => Interest::always(),
            false => Interest::never(),
        }
    }

    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == NOTICE && *metadata.level() <= Level::WARN
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {
        let _ = WARNED.try_with(|warned| warned.set(true));
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// What a future brings, and whether the server warned meanwhile. Its words may be of any language, so none is read.
pub async fn warned<F: Future>(future: F) -> (F::Output, bool) {
    // One for all: making one is told to every place that logs.
    static LISTENER: std::sync::LazyLock<Dispatch> = std::sync::LazyLock::new(|| Dispatch::new(Listener));
    let listened = future.with_subscriber(LISTENER.clone());
    WARNED
        .scope(Cell::new(false), async {
            let output = listened.await;
            (output, WARNED.with(Cell::get))
        })
        .await
}
