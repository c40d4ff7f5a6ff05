//! How many dimensions of the vectors a search compares, and how long searches take by that.

use std::time::Instant;

use aeterna_types::TenantId;
use aeterna_types::dimension::{Chosen, Purpose, by_table, sizes};

use super::{App, Arms, SearchQuery};
use crate::app::Model;

/// Who chooses how many dimensions are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dimensions {
    /// Nobody: all of them.
    All,
    /// The caller.
    Only(usize),
    /// The specification's table.
    Table,
    /// What was measured: the most that fit the latency budget.
    Fitting,
}

/// Whose searches, by the identity of which model.
type Measured = (TenantId, String);

impl App {
    /// How many dimensions of a model a search compares.
    pub(super) fn dimensions(&self, tenant: &TenantId, model: &Model, query: &SearchQuery) -> Chosen {
        let chosen = |size, rule| Chosen { size, rule };
        let chosen = match query.dimensions {
            Dimensions::All => chosen(model.dimension, "all that there are"),
            Dimensions::Only(size) => chosen(size, "as it was asked for"),
            Dimensions::Table => by_table(&Purpose {
                query_length: Some(query.text.chars().count()),
                results: Some(query.top_k),
                budget_ms: query.budget_ms,
            }),
            Dimensions::Fitting => {
                let (key, sizes) = ((tenant.clone(), model.identity.clone()), sizes(model.dimension));
                match measured(query) {
                    true => self.latencies.choose(&key, &sizes, query.budget_ms, Instant::now()),
                    false => self.latencies.fitting(&key, &sizes, query.budget_ms),
                }
            }
        };
        Chosen {
            size: chosen.size.min(model.dimension),
            ..chosen
        }
    }

    /// Begins to measure a search that compares so many dimensions.
    pub(super) fn measuring(
        &self,
        tenant: &TenantId,
        model: &Model,
        query: &SearchQuery,
        size: usize,
    ) -> Measuring<'_> {
        Measuring {
            app: self,
            key: measured(query).then(|| (tenant.clone(), model.identity.clone())),
            size,
            began: Instant::now(),
        }
    }
}

/// Whether how long a search takes says something of the dimensions: one that looks into the past takes longer for other reasons.
fn measured(query: &SearchQuery) -> bool {
    query.arms != Arms::Lexical && query.as_of.is_none()
}

/// A search that is being measured. Dropped before its end, as when its time has run out, it says that it takes longer.
pub(super) struct Measuring<'a> {
    app: &'a App,
    /// Until it has ended; one that is not measured has none.
    key: Option<Measured>,
    size: usize,
    began: Instant,
}

impl Measuring<'_> {
    /// It is done, and counts or not.
    pub(super) fn end(mut self, counts: bool) {
        if let (Some(key), true) = (self.key.take(), counts) {
            let latencies = &self.app.latencies;
            latencies.note(key, self.size, self.began.elapsed(), Instant::now());
        }
    }
}

impl Drop for Measuring<'_> {
    fn drop(&mut self) {
        if let Some(key) = self.key.take() {
            let latencies = &self.app.latencies;
            latencies.note_unfinished(key, self.size, self.began.elapsed(), Instant::now());
        }
    }
}
