//! Instruments of the embedding service.

use opentelemetry::metrics::{Counter, Meter};

/// Counts of texts and tokens.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// Texts embedded by a model.
    pub embedded: Counter<u64>,
    /// Texts answered from the cache.
    pub cached: Counter<u64>,
    /// Texts whose vectors another copy had made.
    pub shared: Counter<u64>,
    /// Tokens read by models.
    pub tokens: Counter<u64>,
    /// What servers charge for them, in millionths of a US dollar.
    pub cost: Counter<f64>,
}

impl Metrics {
    /// Registers the instruments.
    pub fn new(meter: &Meter) -> Self {
        let counter = |name: &'static str, help: &'static str| meter.u64_counter(name).with_description(help).build();
        Self {
            embedded: counter("aeterna_embedding_texts", "Texts embedded by a model."),
            cached: counter("aeterna_embedding_cache_hits", "Texts answered from the cache."),
            shared: counter(
                "aeterna_embedding_shared_cache_hits",
                "Texts answered from the cache that copies share; they count as answered from the cache as well.",
            ),
            tokens: counter("aeterna_embedding_tokens", "Tokens read by models."),
            cost: meter
                .f64_counter("aeterna_embedding_cost_micro_usd")
                .with_description("What servers charge by `embedding.openai.price`, in millionths of a US dollar.")
                .build(),
        }
    }
}
