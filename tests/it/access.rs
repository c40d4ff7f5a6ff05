//! Tokens, limits, deadlines, health, reflection and plain HTTP: what stands in front of every service.

use std::time::Duration;

use aeterna_auth::Role;
use aeterna_proto::embedding::v1::embedding_service_client::EmbeddingServiceClient;
use aeterna_proto::embedding::v1::{BatchEmbedRequest, EmbedRequest, ListModelsRequest};
use aeterna_proto::memory::v1::memory_service_client::MemoryServiceClient;
use aeterna_proto::memory::v1::{ImportRequest, StatsRequest, WatchRequest};
use aeterna_testkit::{NEVER, SECRET, bearing, get, http, refusal};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tonic::{Code, Request};

use crate::sandbox::Sandbox;

fn token(exp: u64) -> String {
    aeterna_testkit::token("acme", Role::Reader, &[], exp)
}

#[tokio::test]
async fn a_token_is_wanted_in_process_and_over_the_network() {
    let sandbox = Sandbox::start(&[("auth.hs256_secret", SECRET)]).await;
    for (way, channel) in sandbox.ways() {
        let mut client = EmbeddingServiceClient::new(channel);
        let status = client.list_models(ListModelsRequest {}).await.unwrap_err();
        assert_eq!(
            (status.code(), refusal(&status).0.as_str()),
            (Code::Unauthenticated, "TOKEN_MISSING"),
            "{way}"
        );
        let status = client
            .list_models(bearing(ListModelsRequest {}, &token(1)))
            .await
            .unwrap_err();
        assert_eq!(
            (status.code(), refusal(&status).0.as_str()),
            (Code::Unauthenticated, "TOKEN_INVALID"),
            "{way}"
        );
        client
            .list_models(bearing(ListModelsRequest {}, &token(4_000_000_000)))
            .await
            .unwrap();
    }
    sandbox.stop().await;
}

#[tokio::test]
async fn an_address_that_others_reach_is_refused_without_authentication() {
    let sources = |flags: &[(&str, &str)]| aeterna_config::Sources {
        flags: flags.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect(),
        ..Default::default()
    };
    let verifier = |flags: &[(&str, &str)]| {
        let settings = aeterna_rpc::load(&[], &sources(flags)).unwrap();
        let mut reader = settings.reader();
        let config = aeterna_rpc::HostConfig::read(&mut reader);
        reader.finish(config).unwrap().verifier()
    };
    let open = verifier(&[("server.listen", "0.0.0.0:7700")]).unwrap_err();
    assert!(open.message().contains("auth.hs256_secret_file"), "{open}");
    assert!(verifier(&[("server.listen", "0.0.0.0:7700"), ("auth.mode", "none")]).is_err());
    assert!(verifier(&[("server.listen", "0.0.0.0:7700"), ("auth.hs256_secret", SECRET)]).is_ok());
    assert!(verifier(&[("auth.hs256_secret", "short")]).is_err());
    assert!(verifier(&[]).is_ok());
}

#[tokio::test]
async fn a_deadline_that_passed_is_deadline_exceeded_both_ways() {
    let sandbox = Sandbox::start(&[]).await;
    let [(_, channel), _] = sandbox.ways();
    let mut client = EmbeddingServiceClient::new(channel);
    let texts = (0..100).map(|i| format!("{i} {}", "word ".repeat(200))).collect();
    let mut request = Request::new(BatchEmbedRequest {
        texts,
        ..Default::default()
    });
    request.metadata_mut().insert("grpc-timeout", "1n".parse().unwrap());
    let status = client.batch_embed(request).await.unwrap_err();
    assert_eq!(
        (status.code(), refusal(&status).0.as_str()),
        (Code::DeadlineExceeded, "DEADLINE_EXCEEDED")
    );
    // Over the network by hand: tonic's client would give up first, and call it CANCELLED.
    let answer = http(
        sandbox.address,
        &grpc_web("ListModels", "grpc-timeout: 1n\r\n", "\0\0\0\0\0"),
    )
    .await
    .unwrap();
    assert!(answer.contains("grpc-status: 4"), "{answer}");
    for (way, channel) in sandbox.ways() {
        let mut request = Request::new(ListModelsRequest {});
        request.metadata_mut().insert("grpc-timeout", "soon".parse().unwrap());
        let status = EmbeddingServiceClient::new(channel)
            .list_models(request)
            .await
            .unwrap_err();
        assert_eq!(refusal(&status).1, ["grpc-timeout"], "{way}");
    }
    sandbox.stop().await;
}

#[tokio::test]
async fn limits_refuse_with_the_limit_and_a_delay() {
    let sandbox = Sandbox::start(&[("limits.requests_per_second", "1"), ("limits.message_bytes", "65536")]).await;
    let [_, (_, channel)] = sandbox.ways();
    let mut client = EmbeddingServiceClient::new(channel);
    let status = client
        .embed(EmbedRequest {
            text: "x".repeat(70_000),
            ..Default::default()
        })
        .await
        .unwrap_err();
    assert_eq!(
        (status.code(), refusal(&status).0.as_str()),
        (Code::ResourceExhausted, "MESSAGE_TOO_LARGE")
    );
    assert!(status.message().contains("65536"), "{}", status.message());
    let status = client.list_models(ListModelsRequest {}).await.unwrap_err();
    assert_eq!(
        (status.code(), refusal(&status).0.as_str()),
        (Code::ResourceExhausted, "RATE_LIMITED")
    );
    use tonic_types::StatusExt as _;
    let delay = status
        .get_details_retry_info()
        .and_then(|retry| retry.retry_delay)
        .unwrap();
    assert!(delay <= Duration::from_secs(1), "{delay:?}");
    sandbox.stop().await;
}

/// A gRPC-Web call over HTTP/1.1.
fn grpc_web(method: &str, headers: &str, body: &str) -> String {
    format!(
        "POST /aeterna.embedding.v1.EmbeddingService/{method} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
         content-type: application/grpc-web+proto\r\n{headers}content-length: {}\r\n\r\n{body}",
        body.len()
    )
}

#[tokio::test]
async fn plain_http_answers_health_readiness_and_metrics() {
    let sandbox = Sandbox::start(&[]).await;
    let [_, (_, channel)] = sandbox.ways();
    EmbeddingServiceClient::new(channel)
        .list_models(ListModelsRequest {})
        .await
        .unwrap();
    let get = async |path: &str| get(sandbox.address, path).await.unwrap();
    assert!(get("/healthz").await.contains("200 OK"));
    let ready = get("/readyz").await;
    assert!(ready.contains("200 OK") && ready.contains(r#""ready":true"#), "{ready}");
    let metrics = get("/metrics").await;
    // The memory service asked once when it started, in process; the test once, over the network.
    let counted =
        r#"aeterna_rpc_requests_total{code="Ok",method="/aeterna.embedding.v1.EmbeddingService/ListModels"} 2"#;
    assert!(metrics.contains(counted), "{metrics}");
    let unknown = get("/aeterna.nothing.v1.Nothing/Call").await;
    assert!(unknown.contains("grpc-status: 12"), "{unknown}");
    sandbox.stop().await;
}

#[tokio::test]
async fn grpc_web_is_answered_on_the_same_port() {
    let sandbox = Sandbox::start(&[]).await;
    let head = grpc_web("ListModels", "", "\0\0\0\0\0");
    let answer = http(sandbox.address, &head).await.unwrap();
    assert!(
        answer.contains("200 OK") && answer.contains("grpc-status:0") && answer.contains("hash"),
        "{answer}"
    );
    sandbox.stop().await;
}

#[tokio::test]
async fn a_page_whose_name_was_rebound_to_loopback_is_refused() {
    let sandbox = Sandbox::start(&[]).await;
    let good = grpc_web("ListModels", "", "\0\0\0\0\0");
    let bad = good.replace("host: localhost", "host: evil.example:7700");
    let answer = http(sandbox.address, &bad).await.unwrap();
    assert!(
        answer.contains("grpc-status: 7") || answer.contains("grpc-status:7"),
        "{answer}"
    );
    sandbox.stop().await;
}

#[tokio::test]
async fn a_call_counts_once_however_many_services_it_passes() {
    let sandbox = Sandbox::start(&[("limits.requests_per_second", "1"), ("limits.concurrent_requests", "1")]).await;
    let [(_, channel), _] = sandbox.ways();
    let mut client = MemoryServiceClient::new(channel);
    let request = aeterna_proto::memory::v1::SearchRequest {
        query: "anything".into(),
        ..Default::default()
    };
    let found = client.search(request).await.unwrap().into_inner();
    assert!(!found.degraded, "{found:?}");
    sandbox.stop().await;
}

#[tokio::test]
async fn a_tenant_that_holds_all_it_may_leaves_room_for_others() {
    let sandbox = Sandbox::start(&[("auth.hs256_secret", SECRET), ("limits.concurrent_requests", "8")]).await;
    let [_, (_, channel)] = sandbox.ways();
    let tenant = |name: &str| aeterna_testkit::token(name, Role::Admin, &[], NEVER);
    let (greedy, other) = (tenant("greedy"), tenant("other"));
    // Calls that say nothing and do not end.
    let mut held = Vec::new();
    for _ in 0..6 {
        let (mut client, greedy) = (MemoryServiceClient::new(channel.clone()), greedy.clone());
        held.push(tokio::spawn(async move {
            loop {
                let endless = futures::stream::pending::<ImportRequest>();
                // Refused while one of the questions below is the sixth.
                let _ = client.import(bearing(endless, &greedy)).await.unwrap_err();
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }));
    }
    let mut client = MemoryServiceClient::new(channel);
    let mut ask = async |who: &str| client.stats(bearing(StatsRequest::default(), who)).await;
    let refused = async {
        loop {
            match ask(&greedy).await {
                Ok(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                Err(status) => return status,
            }
        }
    };
    let status = tokio::time::timeout(Duration::from_secs(30), refused).await.unwrap();
    assert_eq!(refusal(&status).0, "RATE_LIMITED", "{status:?}");
    assert!(status.message().contains("6 requests of this tenant"), "{status:?}");
    ask(&other).await.unwrap();
    held.into_iter().for_each(|call| call.abort());
    let free = async {
        while ask(&greedy).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), free).await.unwrap();
    sandbox.stop().await;
}

#[tokio::test]
async fn streams_count_until_they_end_and_a_tenant_has_three_quarters_of_them() {
    let sandbox = Sandbox::start(&[("auth.hs256_secret", SECRET), ("limits.streams", "4")]).await;
    let [_, (_, channel)] = sandbox.ways();
    let tenant = |name: &str| aeterna_testkit::token(name, Role::Admin, &[], NEVER);
    let (greedy, other, third) = (tenant("greedy"), tenant("other"), tenant("third"));
    let mut client = MemoryServiceClient::new(channel);
    let mut watch = async |who: &str| client.watch(bearing(WatchRequest::default(), who)).await;
    let mut open = Vec::new();
    for _ in 0..3 {
        open.push(watch(&greedy).await.unwrap());
    }
    let status = watch(&greedy).await.unwrap_err();
    assert_eq!(refusal(&status).0, "RATE_LIMITED", "{status:?}");
    assert!(status.message().contains("3 streams of this tenant"), "{status:?}");
    open.push(watch(&other).await.unwrap());
    let status = watch(&third).await.unwrap_err();
    assert_eq!(refusal(&status).0, "RATE_LIMITED", "{status:?}");
    assert!(status.message().contains("4 streams are open"), "{status:?}");
    // One that was refused is not counted, and one that ends is not any more.
    open.remove(0);
    let free = async {
        while watch(&greedy).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), free).await.unwrap();
    sandbox.stop().await;
}

#[tokio::test]
async fn garbage_on_the_wire_is_refused_and_harms_nobody() {
    let sandbox = Sandbox::start(&[]).await;
    let head = grpc_web("Embed", "", "\0\0\0\0\x03\x0a\x7f\x7f");
    let answer = http(sandbox.address, &head).await.unwrap();
    assert!(
        answer.contains("grpc-status:3") || answer.contains("grpc-status: 3"),
        "{answer}"
    );
    let [_, (_, channel)] = sandbox.ways();
    EmbeddingServiceClient::new(channel)
        .list_models(ListModelsRequest {})
        .await
        .unwrap();
    sandbox.stop().await;
}

#[tokio::test]
async fn a_connection_that_does_not_say_what_it_speaks_is_closed() {
    let sandbox = Sandbox::start(&[]).await;
    // The second one is the beginning of what HTTP/2 begins with.
    let closed = ["", "PRI * HTTP/2"].map(async |beginning| {
        let mut stream = TcpStream::connect(sandbox.address).await.unwrap();
        stream.write_all(beginning.as_bytes()).await.unwrap();
        let mut told = Vec::new();
        // An end or a reset, as systems differ.
        let ended = tokio::time::timeout(Duration::from_secs(30), stream.read_to_end(&mut told)).await;
        assert!(ended.is_ok() && told.is_empty(), "{beginning:?}: {told:?}");
    });
    futures::future::join_all(closed).await;
    // One that says it in pieces is answered.
    let mut stream = TcpStream::connect(sandbox.address).await.unwrap();
    for piece in ["P", "UT /healthz HTTP/1.1\r\nhost: x\r\n", "connection: close\r\n\r\n"] {
        stream.write_all(piece.as_bytes()).await.unwrap();
        stream.flush().await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let mut told = String::new();
    stream.read_to_string(&mut told).await.unwrap();
    assert!(told.starts_with("HTTP/1.1 405"), "{told}");
    sandbox.stop().await;
}
