//! W3C trace context across calls, in process and over the network.

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::Context;
use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator as _};
use opentelemetry::trace::TraceContextExt as _;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(|value| value.to_str().ok())
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}

struct HeadersMut<'a>(&'a mut HeaderMap);

impl Injector for HeadersMut<'_> {
    fn set(&mut self, key: &str, value: String) {
        if let (Ok(name), Ok(value)) = (key.parse::<HeaderName>(), HeaderValue::from_str(&value)) {
            self.0.insert(name, value);
        }
    }
}

/// Makes `span` a child of the trace that the headers name, if they do.
pub fn continue_trace(span: &Span, headers: &HeaderMap) {
    let parent = TraceContextPropagator::new().extract(&Headers(headers));
    if parent.span().span_context().is_valid() {
        // Without an OpenTelemetry layer there is no trace to join, and that is fine.
        let _ = span.set_parent(parent);
    }
}

/// Writes the trace of `span` into the headers; without an exporter the caller's own `traceparent` in `incoming` is
/// handed on unchanged, so that a trace is not cut where nobody records.
pub fn propagate(span: &Span, incoming: Option<&HeaderMap>, headers: &mut HeaderMap) {
    let context: Context = span.context();
    if context.span().span_context().is_valid() {
        TraceContextPropagator::new().inject_context(&context, &mut HeadersMut(headers));
    } else if let Some(incoming) = incoming {
        for name in ["traceparent", "tracestate"] {
            if let Some(value) = incoming.get(name) {
                headers.insert(HeaderName::from_static(name), value.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_passes_through_where_nobody_records() {
        let mut incoming = HeaderMap::new();
        let parent = HeaderValue::from_static("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
        incoming.insert("traceparent", parent.clone());
        let mut outgoing = HeaderMap::new();
        propagate(&Span::none(), Some(&incoming), &mut outgoing);
        assert_eq!(outgoing.get("traceparent"), Some(&parent));
    }
}
