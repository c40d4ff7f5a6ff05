//! Making vectors in the background: those that are pending, and all of them by another model. One copy of the service does it
//! at a time.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use aeterna_error::{Error, Reason};
use aeterna_rpc::Dependency;
use aeterna_types::{MemoryId, TenantId};
use futures::future::try_join_all;
use tokio_util::sync::CancellationToken;

use super::turns::Vectors;
use super::{Background, LONGEST, NOTHING, PAUSE, TAKEN_OVER, TOLD};
use crate::app::Model;
use crate::domain::Key;
use crate::store::IndexState;
use crate::store::code::Code;

/// Texts embedded at a time.
const PENDING: usize = 64;

/// What came of looking for pending vectors.
enum Made {
    /// Some were made, and there may be more.
    Some,
    /// There are none.
    Nothing,
    /// Another copy makes them.
    Elsewhere,
}

impl Background {
    /// Embeds memories whose vectors are pending, since the embedding service was away or the model is another one now.
    pub(super) async fn make_up(&self, stop: &CancellationToken) {
        loop {
            let model = self.app.serving().model.clone();
            let outcome = tokio::select! {
                () = stop.cancelled() => break self.leave_making(Vectors::Pending, &model).await,
                outcome = self.make_up_some(&model) => outcome,
            };
            let pause = match outcome {
                Ok(Made::Some) => continue,
                Ok(Made::Elsewhere) => PAUSE,
                Ok(Made::Nothing) => {
                    self.report("embedding", Dependency::Up).await;
                    Duration::MAX
                }
                Err(error) => {
                    tracing::warn!(error = %error.chain(), "pending vectors can't be made; trying again");
                    self.report("embedding", Dependency::Degraded(error.to_string())).await;
                    PAUSE
                }
            };
            self.leave_making(Vectors::Pending, &model).await;
            tokio::select! {
                () = stop.cancelled() => break,
                () = self.pending.some.notified(), if pause == Duration::MAX => {}
                () = tokio::time::sleep(pause), if pause != Duration::MAX => {}
            }
        }
    }

    /// Whether this copy makes vectors by a model, and no other.
    async fn may_make(&self, what: Vectors, model: &Model) -> bool {
        match &self.turns {
            Some(turns) => turns.may_make(what, &model.identity).await,
            None => true,
        }
    }

    async fn leave_making(&self, what: Vectors, model: &Model) {
        if let Some(turns) = &self.turns {
            turns.made(what, &model.identity).await;
        }
    }

    /// Embeds some of them, and leaves it to the outbox to tell the index.
    async fn make_up_some(&self, model: &Model) -> Result<Made, Error> {
        let app = &self.app;
        // What is written from here on lowers the mark again.
        let from = self.pending.from.swap(NOTHING, Ordering::SeqCst);
        if from == NOTHING {
            return Ok(Made::Nothing);
        }
        if app.serving().model.identity != model.identity {
            self.pending.from.fetch_min(from, Ordering::SeqCst);
            return Ok(Made::Some);
        }
        if !self.may_make(Vectors::Pending, model).await {
            self.pending.from.fetch_min(from, Ordering::SeqCst);
            return Ok(Made::Elsewhere);
        }
        let looked = self.embed_after(model, Key(from.saturating_sub(1))).await;
        let next = match &looked {
            Ok(next) => *next,
            Err(_) => from,
        };
        self.pending.from.fetch_min(next, Ordering::SeqCst);
        app.committed.here();
        looked.map(|next| if next == NOTHING { Made::Nothing } else { Made::Some })
    }

    /// Where to go on.
    async fn embed_after(&self, model: &Model, after: Key) -> Result<i64, Error> {
        match self.embed_page(model, after).await? {
            Some((last, stored)) => {
                tracing::debug!(memories = stored, "made up vectors that were pending");
                Ok(last.0 + 1)
            }
            None => Ok(NOTHING),
        }
    }

    /// Embeds the next memories after a number that have no vector by a model: the last of them, and how many there were;
    /// `None` when there is none.
    async fn embed_page(&self, model: &Model, after: Key) -> Result<Option<(Key, usize)>, Error> {
        let app = &self.app;
        let states = app.store.scan(&model.identity, after, PENDING, true).await?;
        let Some(last) = states.last().map(|state| state.key) else {
            return Ok(None);
        };
        let vectors = self.embed_states(model, &states).await?;
        let codes: Vec<(MemoryId, i64, Code)> = states
            .iter()
            .zip(&vectors)
            .filter_map(|(state, vector)| Some((state.id, state.version, Code::encode(vector.as_ref()?)?)))
            .collect();
        let stored = app.store.put_codes(&model.identity, &codes, app.clock.now()).await?;
        Ok(Some((last, stored)))
    }

    /// Embeds all memories anew by the next model, while searches go on by the one before; then answers them by the new one.
    /// What was done when the process ended is not done again.
    pub(super) async fn embed_anew(&self, stop: &CancellationToken) {
        let app = &self.app;
        let next = &app.wanted;
        if next.identity == app.serving().model.identity {
            if let Err(error) = self.tidy(stop).await {
                tracing::warn!(error = %error.chain(), "vectors of models before can't be removed");
            }
            return;
        }
        tracing::info!(
            model = next.name,
            "embedding all memories anew; searches go on by the model before"
        );
        let (mut after, mut done, mut told) = (Key(0), 0, Instant::now());
        let (mut in_this_pass, mut pause) = (0, PAUSE);
        while !stop.is_cancelled() {
            let wait = if self.may_make(Vectors::Anew, next).await {
                let page = tokio::select! {
                    () = stop.cancelled() => break,
                    page = self.embed_page(next, after) => page,
                };
                match page {
                    Ok(Some((last, stored))) => {
                        (after, done, pause) = (last, done + stored, PAUSE);
                        in_this_pass += stored;
                        if told.elapsed() > TOLD {
                            tracing::info!(model = next.name, memories = done, "embedding anew");
                            told = Instant::now();
                        }
                        continue;
                    }
                    // What was changed behind the pass has lost its vector again. The last few are made up once the model
                    // serves: writes that never cease must not put it off for ever.
                    Ok(None) if in_this_pass >= PENDING => {
                        (after, in_this_pass) = (Key(0), 0);
                        continue;
                    }
                    Ok(None) => match self.may_take_over(next).await {
                        Ok(()) => break,
                        Err(error) => {
                            (after, in_this_pass) = (Key(0), 0);
                            tracing::warn!(error = %error.chain(), "the model before goes on answering; trying again");
                            self.report("embedding", Dependency::Degraded(error.to_string())).await;
                            let wait = pause;
                            pause = (2 * pause).min(LONGEST);
                            wait
                        }
                    },
                    Err(error) => {
                        tracing::warn!(error = %error.chain(), "memories can't be embedded anew; trying again");
                        self.report("embedding", Dependency::Degraded(error.to_string())).await;
                        PAUSE
                    }
                }
            } else {
                PAUSE
            };
            self.leave_making(Vectors::Anew, next).await;
            tokio::select! {
                () = stop.cancelled() => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
        self.leave_making(Vectors::Anew, next).await;
        if stop.is_cancelled() {
            return;
        }
        let before = app.serving();
        self.pending.switch.store(true, Ordering::SeqCst);
        app.committed.somewhere();
        // Searches under way go by the model before: its vectors stay until they are answered.
        while app.serving().model.identity != next.identity || Arc::strong_count(&before) > 1 {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(PAUSE / 10) => {}
            }
        }
        if self.is_over(stop).await
            && let Err(error) = app.forget_model(&before.model.identity).await
        {
            tracing::warn!(error = %error.chain(), "vectors of the model before are removed at the next start");
        }
    }

    /// Waits until no other copy answers by a model before any more; false when it is told to stop meanwhile.
    async fn is_over(&self, stop: &CancellationToken) -> bool {
        tokio::select! {
            () = stop.cancelled() => false,
            () = tokio::time::sleep(self.grace) => true,
        }
    }

    /// Refuses to let a model answer that has vectors of far fewer memories than the one before: it is set up wrongly, and
    /// what it refuses would not be found any more.
    async fn may_take_over(&self, next: &Model) -> Result<(), Error> {
        let store = &self.app.store;
        let before = self.app.serving().model.clone();
        let (made, there) = (
            store.vectors_by(&next.identity).await?,
            store.vectors_by(&before.identity).await?,
        );
        if made.saturating_mul(10) >= there.saturating_mul(9) {
            return Ok(());
        }
        let message = format!(
            "the model `{}` has taken {made} memories of the {there} that `{}` has vectors of; look at the server's answers",
            next.name, before.name
        );
        Err(Error::unavailable(message))
    }

    /// Removes what models before have left, once the serving one has as much, unless another model has taken over elsewhere.
    async fn tidy(&self, stop: &CancellationToken) -> Result<(), Error> {
        let app = &self.app;
        let serving = app.serving().model.identity.clone();
        // One that comes later is not one from before.
        let mut others = app.store.models().await?;
        others.retain(|identity| *identity != serving);
        if others.is_empty() || !self.is_over(stop).await {
            return Ok(());
        }
        if app.store.note(TAKEN_OVER).await?.is_some_and(|last| last != serving) {
            return Ok(());
        }
        for identity in &others {
            if app.store.vectors_by(identity).await? <= app.store.vectors_by(&serving).await? {
                app.forget_model(identity).await?;
            }
        }
        Ok(())
    }

    /// The vectors of memories' texts, each made in the name of its tenant; all at once, so that the model can gather them.
    async fn embed_states(&self, model: &Model, states: &[IndexState]) -> Result<Vec<Option<Vec<f32>>>, Error> {
        let mut tenants = HashMap::<&TenantId, Vec<usize>>::new();
        for (place, state) in states.iter().enumerate() {
            tenants.entry(&state.tenant).or_default().push(place);
        }
        let made = tenants.into_iter().map(async |(tenant, places)| {
            let own: Vec<&IndexState> = places.iter().map(|place| &states[*place]).collect();
            self.embed_own(model, tenant, &own).await.map(|made| (places, made))
        });
        let mut vectors = vec![None; states.len()];
        for (places, made) in try_join_all(made).await? {
            for (place, vector) in places.into_iter().zip(made) {
                vectors[place] = vector;
            }
        }
        Ok(vectors)
    }

    /// Those of one tenant; a text that the model refuses has none, and does not keep the others from theirs.
    async fn embed_own(
        &self,
        model: &Model,
        tenant: &TenantId,
        states: &[&IndexState],
    ) -> Result<Vec<Option<Vec<f32>>>, Error> {
        let app = &self.app;
        let context = app.background(tenant.clone());
        let texts = states.iter().map(|state| state.text.clone()).collect();
        match app.embed(&context, model, texts, false).await {
            Ok(vectors) => return Ok(vectors.into_iter().map(Some).collect()),
            Err(error) if error.reason() != Reason::InvalidField => return Err(error),
            Err(_) => {}
        }
        let mut vectors = Vec::with_capacity(states.len());
        for state in states {
            match app.embed(&context, model, vec![state.text.clone()], false).await {
                Ok(mut one) => vectors.push(one.pop()),
                Err(error) if error.reason() != Reason::InvalidField => return Err(error),
                Err(error) => {
                    tracing::warn!(key = state.key.0, error = %error.chain(), "a memory has no vector until the next start");
                    vectors.push(None);
                }
            }
        }
        Ok(vectors)
    }
}
