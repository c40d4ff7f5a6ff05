//! Logs, traces and metrics.
//!
//! Metrics are OpenTelemetry instruments with a Prometheus exporter and, when `OTEL_EXPORTER_OTLP_ENDPOINT` is set, an
//! OTLP exporter; the same variable turns traces on. Names follow `aeterna_<service>_<noun>_<unit>`, without tenant labels.

pub mod trace;

use opentelemetry::metrics::{Meter, MeterProvider as _};
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::metrics::{PeriodicReader, SdkMeterProvider};
use opentelemetry_sdk::trace::SdkTracerProvider;
use prometheus::{Encoder as _, Registry, TextEncoder};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For a person.
    Pretty,
    /// One JSON object a line.
    Json,
}

impl std::str::FromStr for LogFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "pretty" => Ok(Self::Pretty),
            "json" => Ok(Self::Json),
            _ => Err("write `pretty` or `json`".into()),
        }
    }
}

/// Telemetry that can't be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An exporter can't be built.
    #[error("can't set up telemetry: {0}")]
    Setup(String),
}

/// What a process reports about itself.
#[derive(Clone, Debug)]
pub struct Telemetry {
    registry: Registry,
    meters: SdkMeterProvider,
    tracers: Option<SdkTracerProvider>,
}

impl Telemetry {
    /// Metrics only, without an exporter over the network; several may live in one process.
    pub fn local() -> Result<Self, Error> {
        Self::build(None)
    }

    /// Metrics, and traces and metrics over OTLP when the environment asks for them.
    pub fn from_environment(service: &'static str) -> Result<Self, Error> {
        let wanted = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"];
        let wanted = wanted
            .iter()
            .any(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()));
        Self::build(wanted.then_some(service))
    }

    fn build(otlp: Option<&'static str>) -> Result<Self, Error> {
        let setup = |error: &dyn std::fmt::Display| Error::Setup(error.to_string());
        let registry = Registry::new();
        let exporter = opentelemetry_prometheus::exporter()
            .with_registry(registry.clone())
            .scope_info_enabled(false)
            .without_target_info()
            .build()
            .map_err(|error| setup(&error))?;
        let mut meters = SdkMeterProvider::builder().with_reader(exporter);
        let mut tracers = None;
        if let Some(service) = otlp {
            let resource = Resource::builder().with_service_name(service).build();
            let metrics = opentelemetry_otlp::MetricExporter::builder().with_tonic().build();
            let reader = PeriodicReader::builder(metrics.map_err(|error| setup(&error))?).build();
            meters = meters.with_resource(resource.clone()).with_reader(reader);
            let spans = opentelemetry_otlp::SpanExporter::builder().with_tonic().build();
            let spans = spans.map_err(|error| setup(&error))?;
            tracers = Some(
                SdkTracerProvider::builder()
                    .with_resource(resource)
                    .with_batch_exporter(spans)
                    .build(),
            );
        }
        Ok(Self {
            registry,
            meters: meters.build(),
            tracers,
        })
    }

    /// A meter for one service's instruments.
    pub fn meter(&self, name: &'static str) -> Meter {
        self.meters.meter(name)
    }

    /// The Prometheus text format.
    pub fn prometheus(&self) -> Result<Vec<u8>, Error> {
        let mut text = Vec::new();
        TextEncoder::new()
            .encode(&self.registry.gather(), &mut text)
            .map_err(|error| Error::Setup(error.to_string()))?;
        Ok(text)
    }

    /// Sends log lines to standard error and spans to the exporter. Once per process: a second call is an error.
    pub fn init_logs(&self, filter: &str, format: LogFormat) -> Result<(), Error> {
        let setup = |error: &dyn std::fmt::Display| Error::Setup(error.to_string());
        let filter = EnvFilter::try_new(filter).map_err(|error| setup(&format!("log filter `{filter}`: {error}")))?;
        let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
        let lines = tracing_subscriber::fmt::layer()
            .with_writer(std::io::stderr)
            .with_ansi(colours);
        let lines = match format {
            LogFormat::Pretty => lines.with_target(false).boxed(),
            LogFormat::Json => lines.json().flatten_event(true).boxed(),
        };
        let spans = self.tracers.as_ref().map(|tracers| {
            tracing_opentelemetry::layer()
                .with_tracer(tracers.tracer("aeterna"))
                .with_location(false)
        });
        tracing_subscriber::registry()
            .with(filter)
            .with(spans)
            .with(lines)
            .try_init()
            .map_err(|error| setup(&error))
    }

    /// Sends what is still buffered; blocks for a few seconds at most.
    pub fn shutdown(&self) {
        if let Some(tracers) = &self.tracers
            && let Err(error) = tracers.shutdown()
        {
            tracing::warn!(%error, "spans were lost at shutdown");
        }
        if let Err(error) = self.meters.shutdown() {
            tracing::debug!(%error, "metrics were lost at shutdown");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instruments_come_out_in_the_prometheus_format() {
        let telemetry = Telemetry::local().unwrap();
        telemetry
            .meter("t")
            .u64_counter("aeterna_test_things")
            .build()
            .add(3, &[]);
        let text = String::from_utf8(telemetry.prometheus().unwrap()).unwrap();
        assert!(text.contains("aeterna_test_things_total 3"), "{text}");
    }
}
