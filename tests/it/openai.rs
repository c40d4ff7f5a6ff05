//! A model behind an OpenAI-compatible server, and what becomes of memories while that server is slow, wrong or gone. The
//! server is scripted: a real one can't be made to fail on demand.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use aeterna_proto::embedding::v1::embedding_service_client::EmbeddingServiceClient;
use aeterna_proto::embedding::v1::size::By;
use aeterna_proto::embedding::v1::{BatchEmbedRequest, EmbedRequest, Size};
use aeterna_proto::memory::v1::memory_service_client::MemoryServiceClient;
use aeterna_proto::memory::v1::{BatchAddRequest, SearchRequest, SearchResponse, StatsRequest};
use aeterna_rpc::AnyChannel;
use aeterna_testkit::lab::{Extent, Lab, Part, Scratch, Setup, secrets};
use aeterna_testkit::{Program, built, get, readyz, refusal};
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::IntoResponse as _;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::notes::{item, together, user};
use crate::sandbox::Sandbox;

const DIMENSION: usize = 64;
/// Bytes of a text that the server takes.
const WINDOW: usize = 10_000;

/// What the server does.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    Sound,
    Slow,
    WrongSize,
    NotANumber,
    /// What JSON has no word for.
    Literal,
    Failing,
    /// Says once that it is asked too often.
    Busy,
    /// Does not answer.
    Hanging,
    /// Takes every text.
    Lenient,
}

struct Script {
    mode: std::sync::Mutex<Mode>,
    calls: AtomicUsize,
}

impl Script {
    fn set(&self, mode: Mode) {
        *self.mode.lock().unwrap() = mode;
    }
}

/// A direction for each word, added up.
fn vector(text: &str, dimensions: usize) -> Vec<f64> {
    let mut sum = vec![0.01; dimensions];
    for word in text.split_whitespace() {
        let place = word
            .bytes()
            .fold(7usize, |hash, byte| hash.wrapping_mul(31) + usize::from(byte));
        sum[place % dimensions] += 1.0;
    }
    sum
}

async fn embeddings(State(script): State<Arc<Script>>, headers: HeaderMap, body: String) -> axum::response::Response {
    script.calls.fetch_add(1, Ordering::SeqCst);
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(headers["authorization"], "Bearer sk-test");
    assert_eq!(
        (&body["model"], body["dimensions"].as_u64()),
        (&json!("scripted"), Some(DIMENSION as u64))
    );
    let texts: Vec<&str> = body["input"]
        .as_array()
        .unwrap()
        .iter()
        .map(|text| text.as_str().unwrap())
        .collect();
    let mode = *script.mode.lock().unwrap();
    let size = if mode == Mode::WrongSize { 32 } else { DIMENSION };
    match mode {
        Mode::Slow => tokio::time::sleep(Duration::from_secs(3)).await,
        Mode::Hanging => tokio::time::sleep(Duration::from_secs(600)).await,
        Mode::Failing => return (StatusCode::INTERNAL_SERVER_ERROR, "out of memory").into_response(),
        Mode::Busy => {
            script.set(Mode::Sound);
            return (StatusCode::TOO_MANY_REQUESTS, [("retry-after", "1")], "slow down").into_response();
        }
        _ => {}
    }
    if texts.iter().any(|text| text.len() > WINDOW) {
        return (StatusCode::BAD_REQUEST, "maximum context length exceeded").into_response();
    }
    if mode != Mode::Lenient && texts.iter().any(|text| text.contains("forbidden")) {
        return (StatusCode::BAD_REQUEST, "this text is not taken").into_response();
    }
    if texts.iter().any(|text| text.contains("indigestible")) {
        return (StatusCode::INTERNAL_SERVER_ERROR, "input is too large to process").into_response();
    }
    let item = |(index, text): (usize, &&str)| {
        let mut embedding = json!(vector(text, size));
        if mode == Mode::NotANumber {
            embedding[3] = Value::Null;
        }
        json!({"index": index, "embedding": embedding})
    };
    // Out of order, as servers may.
    let data: Vec<Value> = texts
        .iter()
        .enumerate()
        .rev()
        .map(|(index, text)| item((index, text)))
        .collect();
    let answer = json!({"data": data, "usage": {"prompt_tokens": texts.len() * 5}});
    let mut answer = answer.to_string();
    if mode == Mode::Literal {
        answer = answer.replace("0.01", "NaN");
    }
    (StatusCode::OK, answer).into_response()
}

/// The scripted server on a free port.
async fn serve() -> (Arc<Script>, String, tokio::task::JoinHandle<()>) {
    let script = Arc::new(Script {
        mode: std::sync::Mutex::new(Mode::Sound),
        calls: AtomicUsize::new(0),
    });
    let (address, served) = serve_at("127.0.0.1:0", &script).await;
    (script, format!("http://{address}/v1"), served)
}

async fn serve_at(address: &str, script: &Arc<Script>) -> (String, tokio::task::JoinHandle<()>) {
    let router = axum::Router::new()
        .route("/v1/embeddings", axum::routing::post(embeddings))
        .with_state(Arc::clone(script));
    let listener = TcpListener::bind(address).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (
        address,
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() }),
    )
}

/// Waits until every memory has a vector.
async fn whole(client: &mut MemoryServiceClient<AnyChannel>, name: &str) {
    pending(client, name, 0).await;
}

/// Waits until no more than so many have none.
async fn pending(client: &mut MemoryServiceClient<AnyChannel>, name: &str, most: i64) {
    let mut left = 300;
    loop {
        let stats = client
            .stats(StatsRequest {
                scope: user(name),
                ..Default::default()
            })
            .await;
        let stats = stats.unwrap().into_inner();
        if stats.pending_embeddings <= most {
            return;
        }
        left -= 1;
        assert!(left > 0, "{stats:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn sandbox(urls: &str) -> Sandbox {
    Sandbox::start(&[
        ("embedding.openai.urls", urls),
        ("embedding.openai.model", "scripted"),
        ("embedding.openai.dimension", "64"),
        ("embedding.openai.api_key", "sk-test"),
        ("embedding.openai.timeout", "300ms"),
        ("embedding.openai.price", "0.02"),
        ("embedding.default_model", "scripted"),
    ])
    .await
}

async fn add(client: &mut MemoryServiceClient<AnyChannel>, name: &str, content: &str) {
    let request = item(name, content);
    client.add(request).await.unwrap();
}

async fn search(client: &mut MemoryServiceClient<AnyChannel>, name: &str, query: &str) -> SearchResponse {
    let request = SearchRequest {
        scope: user(name),
        query: query.into(),
        ..Default::default()
    };
    client.search(request).await.unwrap().into_inner()
}

#[tokio::test]
async fn a_faulty_server_degrades_searches_and_loses_nothing() {
    let (script, url, served) = serve().await;
    // The first server is not there: the second one is asked.
    let sandbox = sandbox(&format!("http://127.0.0.1:9/v1,{url}")).await;
    let [(way, channel), _] = sandbox.ways();
    let mut client = MemoryServiceClient::new(channel.clone());
    add(&mut client, way, "boats leave the harbour").await;
    let found = search(&mut client, way, "harbour boats").await;
    assert_eq!(
        (found.model.as_str(), found.dimension, found.degraded),
        ("scripted", 64, false)
    );

    for (number, (mode, word)) in [
        (Mode::WrongSize, "32 values"),
        (Mode::NotANumber, "no finite number"),
        (Mode::Literal, "no JSON"),
        (Mode::Failing, "status 500"),
        (Mode::Slow, "server is away"),
    ]
    .into_iter()
    .enumerate()
    {
        script.set(mode);
        let content = format!("fault{number} happened to the lighthouse");
        add(&mut client, way, &content).await;
        let found = search(&mut client, way, &format!("fault{number} lighthouse {number}")).await;
        assert!(found.degraded && found.model.is_empty(), "{mode:?}: {found:?}");
        // What the server says is for the operator.
        assert!(!found.degraded_reasons[0].contains("out of memory"), "{found:?}");
        assert!(
            found.degraded_reasons[0].contains(word),
            "{mode:?}: {:?}",
            found.degraded_reasons
        );
        let first = &found.results[0].memory.as_ref().unwrap();
        assert_eq!(
            (first.content.as_str(), first.embedding_model.as_str()),
            (content.as_str(), ""),
            "{mode:?}"
        );
        // Back to normal by itself: the vector is made up, and searches have both arms again.
        script.set(Mode::Sound);
        whole(&mut client, way).await;
        let found = search(&mut client, way, &format!("fault{number} lighthouse again")).await;
        assert!(!found.degraded && found.model == "scripted", "{mode:?}: {found:?}");
    }
    // It is gone, and comes back.
    served.abort();
    let _ = served.await;
    add(&mut client, way, "nobody minds the lighthouse").await;
    let found = search(&mut client, way, "who minds it").await;
    assert!(
        found.degraded && found.degraded_reasons[0].contains("server is away"),
        "{found:?}"
    );
    let address = url.trim_start_matches("http://").trim_end_matches("/v1");
    let (_, served) = serve_at(address, &script).await;
    whole(&mut client, way).await;
    let found = search(&mut client, way, "who minds the lighthouse").await;
    assert!(!found.degraded && found.model == "scripted", "{found:?}");
    sandbox.stop().await;
    served.abort();
}

#[tokio::test]
async fn texts_share_calls_and_a_busy_server_is_waited_for() {
    let (script, url, served) = serve().await;
    let sandbox = sandbox(&url).await;
    let [(_, channel), _] = sandbox.ways();
    let mut client = EmbeddingServiceClient::new(channel);
    let before = script.calls.load(Ordering::SeqCst);
    let batch = BatchEmbedRequest {
        texts: (0..300).map(|n| format!("text number {n}")).collect(),
        ..Default::default()
    };
    let answer = client.batch_embed(batch).await.unwrap().into_inner();
    let calls = script.calls.load(Ordering::SeqCst) - before;
    assert!(calls <= 8, "{calls} calls for 300 texts");
    assert_eq!((answer.vectors.len(), answer.tokens), (300, 1500));
    for (n, vector) in answer.vectors.iter().enumerate() {
        let wanted = self::vector(&format!("text number {n}"), DIMENSION);
        let norm = wanted.iter().map(|x| x * x).sum::<f64>().sqrt();
        let near = vector
            .values
            .iter()
            .zip(&wanted)
            .all(|(a, b)| (f64::from(*a) - b / norm).abs() < 1e-5);
        assert!(near, "text {n} has the vector of another");
    }
    script.set(Mode::Busy);
    let embed = |text: &str| EmbedRequest {
        text: text.into(),
        ..Default::default()
    };
    let began = std::time::Instant::now();
    client.embed(embed("after a pause")).await.unwrap();
    assert!(began.elapsed() >= Duration::from_secs(1), "Retry-After is honoured");
    // One text that the server does not take keeps no other from its vector.
    let (bad, good) = tokio::join!(async { client.clone().embed(embed("a forbidden text")).await }, async {
        client.clone().embed(embed("a good text")).await
    });
    assert_eq!(refusal(&bad.unwrap_err()).0, "INVALID_FIELD");
    assert!(good.is_ok());
    // What is longer than the model's window is cut, and said to be; others beside it are whole.
    let long = "harbour ".repeat(5_000);
    let (cut, whole) = tokio::join!(async { client.clone().embed(embed(&long)).await }, async {
        client.clone().embed(embed("a small text")).await
    });
    let (cut, whole) = (cut.unwrap().into_inner(), whole.unwrap().into_inner());
    assert!(cut.truncated && !whole.truncated && whole.tokens > 0);
    let same = client.embed(embed(&long[..WINDOW])).await.unwrap().into_inner();
    assert_eq!(cut.vector, same.vector);
    // As many dimensions as the model has can be asked for by their number.
    let sized = |number| EmbedRequest {
        size: Some(Size {
            by: Some(By::Dimension(number)),
        }),
        ..embed("a small text")
    };
    assert_eq!(client.embed(sized(64)).await.unwrap().into_inner().vector, whole.vector);
    assert_eq!(
        refusal(&client.embed(sized(65)).await.unwrap_err()),
        ("INVALID_FIELD".into(), vec!["size.dimension".into()])
    );
    let of_another = EmbedRequest {
        model: "hash".into(),
        ..sized(64)
    };
    assert_eq!(
        refusal(&client.embed(of_another).await.unwrap_err()).1,
        ["size.dimension"]
    );
    // Every token is paid for, those of calls that cost less than a millionth of a dollar, too.
    let metrics = get(sandbox.address, "/metrics").await.unwrap();
    let counted = |name: &str| {
        let line = metrics.lines().find(|line| line.starts_with(name));
        let value = line.and_then(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        value.unwrap_or_else(|| panic!("{name}: {metrics}"))
    };
    let (tokens, cost) = (
        counted("aeterna_embedding_tokens_total"),
        counted("aeterna_embedding_cost_micro_usd_total"),
    );
    assert!(tokens >= 1510.0, "{tokens}");
    assert!((cost - 0.02 * tokens).abs() < 1e-6, "{cost} for {tokens} tokens");
    sandbox.stop().await;
    served.abort();
}

#[tokio::test]
async fn a_text_at_which_the_server_fails_keeps_no_other_from_its_vector() {
    let (script, url, served) = serve().await;
    let sandbox = sandbox(&url).await;
    let [(way, channel), _] = sandbox.ways();
    let mut client = MemoryServiceClient::new(channel);
    // Both where vectors are made at once, and where they are made up.
    for (round, mode) in [Mode::Sound, Mode::Hanging].into_iter().enumerate() {
        script.set(mode);
        let content = |n: usize| match n {
            5 => format!("indigestible {round}"),
            n => format!("boat {round} {n} leaves"),
        };
        let batch = BatchAddRequest {
            requests: (0..12).map(|n| item(way, &content(n))).collect(),
            ..Default::default()
        };
        client.batch_add(batch).await.unwrap();
        script.set(Mode::Sound);
        pending(&mut client, way, round as i64 + 1).await;
        let found = search(&mut client, way, &content(11)).await;
        assert!(!found.degraded, "{found:?}");
        let first = found.results[0].memory.as_ref().unwrap();
        assert_eq!(
            (first.content.as_str(), first.embedding_model.as_str()),
            (content(11).as_str(), "scripted")
        );
        // It is found by its words.
        let found = search(&mut client, way, &content(5)).await;
        assert_eq!(found.results[0].memory.as_ref().unwrap().content, content(5));
    }
    sandbox.stop().await;
    served.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_refuses_the_texts_does_not_take_over() {
    let (script, url, served) = serve().await;
    let data = tempfile::tempdir().unwrap();
    let start = async |flags: &[&str]| {
        let common = ["serve", "--embedding.model_dirs", "", "--log.filter", "warn"];
        Program::start(&built("aeterna"), &[&common, flags].concat(), data.path()).await
    };
    let program = start(&[]).await;
    let mut client = MemoryServiceClient::new(program.channel());
    let requests = (0..20)
        .map(|n| item("ann", &format!("forbidden cargo number {n}")))
        .collect();
    client.batch_add(together(requests)).await.unwrap();
    program.stop().await;

    let program = start(&[
        "--embedding.openai.urls",
        &url,
        "--embedding.openai.model",
        "scripted",
        "--embedding.openai.dimension",
        "64",
        "--embedding.openai.api_key",
        "sk-test",
        "--embedding.default_model",
        "scripted",
    ])
    .await;
    let mut client = MemoryServiceClient::new(program.channel());
    let mut left = 200;
    while !program.log().contains("the model before goes on answering") {
        left -= 1;
        assert!(left > 0, "nothing was refused: {}", program.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let found = search(&mut client, "ann", "cargo number 7").await;
    assert!(
        found.model == "hash" && !found.degraded && found.results.len() == 10,
        "{found:?}"
    );
    script.set(Mode::Lenient);
    let mut left = 400;
    while search(&mut client, "ann", "cargo number 7").await.model != "scripted" {
        left -= 1;
        assert!(left > 0, "it does not take over: {}", program.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    program.stop().await;
    served.abort();
}

#[tokio::test]
async fn a_hanging_server_leaves_time_to_answer_without_it() {
    let (script, url, served) = serve().await;
    let sandbox = Sandbox::start(&[
        ("embedding.openai.urls", &url),
        ("embedding.openai.model", "scripted"),
        ("embedding.openai.dimension", "64"),
        ("embedding.openai.api_key", "sk-test"),
        ("embedding.default_model", "scripted"),
    ])
    .await;
    let [(way, channel), _] = sandbox.ways();
    let mut client = MemoryServiceClient::new(channel);
    script.set(Mode::Hanging);
    let mut request = tonic::Request::new(item(way, "the anchor is down"));
    request.set_timeout(Duration::from_secs(3));
    let added = client.add(request).await.unwrap().into_inner().memory.unwrap();
    assert_eq!(added.embedding_model, "");
    let mut request = tonic::Request::new(SearchRequest {
        scope: user(way),
        query: "anchor".into(),
        ..Default::default()
    });
    request.set_timeout(Duration::from_secs(3));
    let found = client.search(request).await.unwrap().into_inner();
    assert!(
        found.degraded_reasons[0].contains("did not answer within"),
        "{:?}",
        found.degraded_reasons
    );
    assert_eq!(found.results[0].memory.as_ref().unwrap().id, added.id);
    sandbox.stop().await;
    served.abort();
}

/// What is ready at an address, by dependency.
async fn ready(sandbox: &Sandbox) -> String {
    readyz(sandbox.address).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_share_what_a_server_was_paid_for_and_do_without_it_when_redis_is_away() {
    let place = Scratch::new();
    let setup = Setup::of(Extent::Redis, BTreeMap::new());
    let lab = Lab::up(place.path(), setup, |_| ()).await.unwrap();
    let (script, url, served) = serve().await;
    let redis = lab.live();
    let flags = [
        ("embedding.openai.urls", url.as_str()),
        ("embedding.openai.model", "scripted"),
        ("embedding.openai.dimension", "64"),
        ("embedding.openai.api_key", "sk-test"),
        ("embedding.default_model", "scripted"),
        ("embedding.shared_cache", &redis),
        ("embedding.shared_cache_password", secrets::REDIS),
        ("embedding.shared_cache_sentinel_password", secrets::SENTINELS),
    ];
    let copies = [Sandbox::start(&flags).await, Sandbox::start(&flags).await];
    let [one, other] = copies.each_ref().map(|copy| {
        let [_, (_, channel)] = copy.ways();
        EmbeddingServiceClient::new(channel)
    });
    let embed = async |client: &EmbeddingServiceClient<AnyChannel>, round: usize| {
        let texts = (0..20).map(|n| format!("text {n} of round {round}")).collect();
        let batch = BatchEmbedRequest {
            texts,
            ..Default::default()
        };
        client.clone().batch_embed(batch).await.unwrap().into_inner()
    };
    // Vectors are shared without being waited for, so the other copy is given some rounds; each by new texts.
    let shared = async |from: usize| {
        for round in from..from + 300 {
            let made = embed(&one, round).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
            let calls = script.calls.load(Ordering::SeqCst);
            let found = embed(&other, round).await;
            if found.cached == 20 {
                assert_eq!((script.calls.load(Ordering::SeqCst), found.tokens), (calls, 0));
                assert_eq!(found.vectors, made.vectors);
                return;
            }
        }
        panic!("nothing was shared: {}", ready(&copies[1]).await);
    };
    shared(0).await;
    let seen = ready(&copies[1]).await;
    assert!(seen.contains("shared_cache") && !seen.contains("degraded"), "{seen}");

    // Away altogether: each copy asks the server, and says why.
    let members = lab.members();
    for member in &members {
        lab.kill(member, Part::All).await.unwrap();
    }
    let calls = script.calls.load(Ordering::SeqCst);
    for round in 1000..1010 {
        assert_eq!(embed(&other, round).await.cached, 0);
    }
    assert!(script.calls.load(Ordering::SeqCst) > calls);
    let seen = ready(&copies[1]).await;
    assert!(
        seen.starts_with("HTTP/1.1 200") && seen.contains("each copy has its vectors made by itself"),
        "{seen}"
    );

    let late = Sandbox::start(&flags).await;
    let seen = ready(&late).await;
    assert!(seen.contains("each copy has its vectors made by itself"), "{seen}");
    late.stop().await;

    // And back by itself.
    for member in &members {
        lab.start(member).unwrap();
    }
    lab.live_whole(Duration::from_secs(60)).await.unwrap();
    shared(2000).await;
    let seen = ready(&copies[1]).await;
    assert!(!seen.contains("degraded"), "{seen}");
    for copy in copies {
        copy.stop().await;
    }
    served.abort();
}
