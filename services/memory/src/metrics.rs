//! Instruments of the memory service.

use opentelemetry::metrics::{Counter, Gauge, Meter};

/// Counts of what is written and found, and how far the index is behind.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// Memories added or merged.
    pub added: Counter<u64>,
    /// Searches that had to do without an arm.
    pub degraded: Counter<u64>,
    /// For how long the vector index has not had everything, in seconds.
    pub index_lag: Gauge<f64>,
    /// Age of the oldest change that is not in the live streams, in seconds.
    pub live_lag: Gauge<f64>,
}

impl Metrics {
    /// Registers the instruments.
    pub fn new(meter: &Meter) -> Self {
        let counter = |name: &'static str, help: &'static str| meter.u64_counter(name).with_description(help).build();
        Self {
            added: counter("aeterna_memory_adds", "Memories added or merged."),
            degraded: counter(
                "aeterna_memory_degraded_searches",
                "Searches without one of their arms.",
            ),
            index_lag: meter
                .f64_gauge("aeterna_memory_index_lag_seconds")
                .with_description("For how long the vector index has lacked something of the outbox; 0 when it has everything.")
                .build(),
            live_lag: meter
                .f64_gauge("aeterna_memory_live_lag_seconds")
                .with_description(
                    "Age of the oldest change that is not in the live streams, or for how long their server has been away; 0 on a copy \
                     that does not fill them.",
                )
                .build(),
        }
    }
}
