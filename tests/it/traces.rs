//! Traces and metrics over OTLP: one trace from the caller through both services.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use aeterna_proto::memory::v1::SearchRequest;
use aeterna_proto::memory::v1::memory_service_client::MemoryServiceClient;
use aeterna_testkit::{Program, built};
use axum::body::to_bytes;
use axum::extract::Request;
use axum::response::{IntoResponse as _, Response};
use tokio::net::TcpListener;

/// What arrived: path and body.
type Arrived = Arc<Mutex<Vec<(String, Vec<u8>)>>>;

/// A collector that takes everything and understands nothing.
async fn collector() -> (String, Arrived) {
    let arrived = Arrived::default();
    let sink = Arc::clone(&arrived);
    let take = move |request: Request| {
        let sink = Arc::clone(&sink);
        async move {
            let path = request.uri().path().to_owned();
            let body = to_bytes(request.into_body(), 16 << 20).await.unwrap_or_default();
            sink.lock().unwrap().push((path, body.to_vec()));
            let head = [("content-type", "application/grpc"), ("grpc-status", "0")];
            let answer: Response = (head, vec![0u8; 5]).into_response();
            answer
        }
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, axum::Router::new().fallback(take)).await });
    (url, arrived)
}

#[tokio::test]
async fn one_trace_leads_from_the_caller_through_both_services() {
    let (url, arrived) = collector().await;
    let data = tempfile::tempdir().unwrap();
    let environment = [("OTEL_EXPORTER_OTLP_ENDPOINT", url.as_str())];
    let program = Program::start_with(&built("aeterna"), &["serve"], data.path(), &environment).await;
    let trace = "0af7651916cd43dd8448eb211c80319c";
    let mut request = tonic::Request::new(SearchRequest {
        query: "anything".into(),
        ..Default::default()
    });
    let parent = format!("00-{trace}-b7ad6b7169203331-01");
    request.metadata_mut().insert("traceparent", parent.parse().unwrap());
    MemoryServiceClient::new(program.channel())
        .search(request)
        .await
        .unwrap();
    // What is buffered is sent when the process stops.
    assert_eq!(program.stop().await, Some(0));
    tokio::time::sleep(Duration::from_millis(50)).await;

    let arrived = arrived.lock().unwrap();
    let of = |kind: &str| {
        arrived
            .iter()
            .filter(|(path, _)| path.contains(kind))
            .map(|(_, body)| body)
            .collect::<Vec<_>>()
    };
    let has = |body: &[u8], wanted: &[u8]| body.windows(wanted.len()).filter(|window| *window == wanted).count();
    let id: Vec<u8> = (0..16)
        .map(|i| u8::from_str_radix(&trace[2 * i..2 * i + 2], 16).unwrap())
        .collect();
    let spans = of("TraceService");
    let in_trace: usize = spans.iter().map(|body| has(body, &id)).sum();
    assert!(
        in_trace >= 2,
        "the memory service's span and the embedding service's: {in_trace} in {}",
        spans.len()
    );
    for method in ["MemoryService/Search", "EmbeddingService/BatchEmbed"] {
        assert!(spans.iter().any(|body| has(body, method.as_bytes()) > 0), "{method}");
    }
    assert!(
        of("MetricsService")
            .iter()
            .any(|body| has(body, b"aeterna_rpc_requests") > 0)
    );
}
