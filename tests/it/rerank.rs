//! Reranking by a cross-encoder. The model is a tiny one with arbitrary weights, made here: it shows that texts are read with
//! the query and how scores are used, and says nothing about quality.

use std::collections::BTreeMap;
use std::path::Path;

use aeterna_proto::embedding::v1::RerankRequest;
use aeterna_proto::embedding::v1::embedding_service_client::EmbeddingServiceClient;
use aeterna_proto::memory::v1::memory_service_client::MemoryServiceClient;
use aeterna_proto::memory::v1::{SearchRequest, SearchWeights};
use aeterna_testkit::{Program, built, refusal};
use serde_json::{Value, json};

use crate::notes::{item, user};
use crate::sandbox::Sandbox;

const HIDDEN: usize = 16;
const INNER: usize = 32;
const POSITIONS: usize = 64;
const WORDS: [&str; 12] = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "dog", "boat", "sleeps", "sails", "who", "harbour",
];

/// A model directory of the BERT family with one label; without `classifier` it is no cross-encoder.
fn write_model(dir: &Path, classifier: bool) {
    let config = json!({
        "vocab_size": WORDS.len(), "hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": INNER, "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "max_position_embeddings": POSITIONS,
        "type_vocab_size": 2, "initializer_range": 0.02, "layer_norm_eps": 1e-12, "pad_token_id": 0, "model_type": "bert",
    });
    let vocab: BTreeMap<&str, usize> = WORDS.iter().enumerate().map(|(id, word)| (*word, id)).collect();
    let special = |id: usize| json!({"id": WORDS[id], "ids": [id], "tokens": [WORDS[id]]});
    let token = |id: usize, kind: u8| json!({"SpecialToken": {"id": WORDS[id], "type_id": kind}});
    let text = |id: &str, kind: u8| json!({"Sequence": {"id": id, "type_id": kind}});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "decoder": null,
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [token(2, 0), text("A", 0), token(3, 0)],
            "pair": [token(2, 0), text("A", 0), token(3, 0), text("B", 1), token(3, 1)],
            "special_tokens": {"[CLS]": special(2), "[SEP]": special(3)},
        },
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"},
    });
    let mut shapes: Vec<(String, Vec<usize>)> = vec![
        (
            "bert.embeddings.word_embeddings.weight".into(),
            vec![WORDS.len(), HIDDEN],
        ),
        (
            "bert.embeddings.position_embeddings.weight".into(),
            vec![POSITIONS, HIDDEN],
        ),
        ("bert.embeddings.token_type_embeddings.weight".into(), vec![2, HIDDEN]),
    ];
    let mut linear = |name: &str, outputs: usize, inputs: usize| {
        shapes.push((format!("{name}.weight"), vec![outputs, inputs]));
        shapes.push((format!("{name}.bias"), vec![outputs]));
    };
    let layer = "bert.encoder.layer.0";
    for part in ["query", "key", "value"] {
        linear(&format!("{layer}.attention.self.{part}"), HIDDEN, HIDDEN);
    }
    linear(&format!("{layer}.attention.output.dense"), HIDDEN, HIDDEN);
    linear(&format!("{layer}.intermediate.dense"), INNER, HIDDEN);
    linear(&format!("{layer}.output.dense"), HIDDEN, INNER);
    linear("bert.pooler.dense", HIDDEN, HIDDEN);
    if classifier {
        linear("classifier", 1, HIDDEN);
    }
    for norm in [
        "bert.embeddings",
        &format!("{layer}.attention.output"),
        &format!("{layer}.output"),
    ] {
        shapes.push((format!("{norm}.LayerNorm.weight"), vec![HIDDEN]));
        shapes.push((format!("{norm}.LayerNorm.bias"), vec![HIDDEN]));
    }
    let (mut header, mut data, mut state) = (serde_json::Map::new(), Vec::new(), 1u32);
    for (name, shape) in shapes {
        let start = data.len();
        for _ in 0..shape.iter().product::<usize>() {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let value = f32::from((state >> 16) as u16) / 32_768.0 - 1.0;
            data.extend(value.to_le_bytes());
        }
        let entry: Value = json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]});
        header.insert(name, entry);
    }
    let header = Value::Object(header).to_string();
    let mut weights = (header.len() as u64).to_le_bytes().to_vec();
    weights.extend(header.as_bytes());
    weights.extend(data);
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(dir.join("model.safetensors"), weights).unwrap();
}

#[tokio::test]
async fn a_cross_encoder_orders_what_was_found() {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), true);
    let sandbox = Sandbox::start(&[("embedding.reranker_dir", &dir.path().display().to_string())]).await;
    for (way, channel) in sandbox.ways() {
        let mut embedding = EmbeddingServiceClient::new(channel.clone());
        let texts = [
            "the cat sleeps",
            "the dog sleeps",
            "the boat sails",
            "the harbour cat",
            "boat",
        ];
        let request = RerankRequest {
            query: "who sleeps".into(),
            texts: texts.map(str::to_owned).to_vec(),
        };
        let scored = embedding.rerank(request.clone()).await.unwrap().into_inner().scores;
        assert!(
            scored.len() == 5 && scored.iter().all(|score| (0.0..=1.0).contains(score)),
            "{way}: {scored:?}"
        );
        // Each text by itself has the score that it has among the others, and another query gives another one.
        for (text, score) in texts.iter().zip(&scored) {
            let alone = RerankRequest {
                texts: vec![(*text).into()],
                ..request.clone()
            };
            let alone = embedding.rerank(alone).await.unwrap().into_inner().scores;
            assert!((alone[0] - score).abs() < 1e-5, "{way}: {text}");
        }
        // Also where there are more than are read together, long and short ones in any order.
        let many: Vec<String> = (0..21)
            .map(|n| [texts[n % 5]].repeat(1 + 7 * n % 4).join(" and "))
            .collect();
        let request_of = |texts: Vec<String>| RerankRequest {
            texts,
            ..request.clone()
        };
        let scored_many = embedding
            .rerank(request_of(many.clone()))
            .await
            .unwrap()
            .into_inner()
            .scores;
        assert_eq!(scored_many.len(), many.len(), "{way}");
        for (text, score) in many.into_iter().zip(scored_many) {
            let alone = embedding
                .rerank(request_of(vec![text.clone()]))
                .await
                .unwrap()
                .into_inner()
                .scores;
            assert!((alone[0] - score).abs() < 1e-5, "{way}: {text}");
        }
        let other = RerankRequest {
            query: "the boat sails".into(),
            ..request.clone()
        };
        assert_ne!(
            embedding.rerank(other).await.unwrap().into_inner().scores,
            scored,
            "{way}"
        );
        let long = RerankRequest {
            query: "who sleeps".into(),
            texts: vec!["cat ".repeat(5000)],
        };
        assert_eq!(
            embedding.rerank(long).await.unwrap().into_inner().scores.len(),
            1,
            "{way}: it is cut off"
        );
        let empty = RerankRequest::default();
        assert_eq!(
            refusal(&embedding.rerank(empty).await.unwrap_err()).1,
            ["query", "texts"],
            "{way}"
        );

        let mut client = MemoryServiceClient::new(channel);
        for text in texts {
            client.add(item(way, text)).await.unwrap();
        }
        let search = |share: f64| SearchRequest {
            scope: user(way),
            query: "who sleeps".into(),
            rerank: true,
            explain: true,
            weights: Some(SearchWeights {
                rerank: Some(share),
                ..Default::default()
            }),
            ..Default::default()
        };
        let found = client.search(search(1.0)).await.unwrap().into_inner().results;
        let mut wanted: Vec<(f64, &str)> = scored.iter().copied().zip(texts).collect();
        wanted.sort_by(|a, b| b.0.total_cmp(&a.0));
        for (result, (score, text)) in found.iter().zip(&wanted) {
            assert_eq!(result.memory.as_ref().unwrap().content, *text, "{way}");
            assert!((result.score - score).abs() < 1e-5, "{way}: {text}");
        }
        for result in client.search(search(0.4)).await.unwrap().into_inner().results {
            let parts = result.breakdown.unwrap();
            let sum = parts.dense_part + parts.lexical_part + parts.layer_part + parts.rerank_part;
            assert!(
                (sum - result.score).abs() < 1e-9 && result.score <= 1.0,
                "{way}: {parts:?}"
            );
            assert!(
                (parts.rerank_part - 0.4 * parts.rerank.unwrap()).abs() < 1e-9,
                "{way}: {parts:?}"
            );
        }
        let plain = client.search(search(0.0)).await.unwrap().into_inner().results;
        let unasked = SearchRequest {
            rerank: false,
            ..search(0.0)
        };
        let unasked = client.search(unasked).await.unwrap().into_inner().results;
        let ids = |results: &[aeterna_proto::memory::v1::SearchResult]| {
            results
                .iter()
                .map(|result| result.memory.as_ref().unwrap().id.clone())
                .collect::<Vec<_>>()
        };
        assert_eq!(ids(&plain), ids(&unasked), "{way}");
    }
    sandbox.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cross_encoder_that_hangs_or_is_gone_only_degrades() {
    let [model, one, two] = [0; 3].map(|_| tempfile::tempdir().unwrap());
    write_model(model.path(), true);
    let dir = model.path().display().to_string();
    let flags = ["--embedding.model_dirs", "", "--embedding.reranker_dir", &dir];
    let embedding = Program::start(&built("aeterna-embedding"), &flags, one.path()).await;
    let (address, url) = (embedding.address, format!("http://{}", embedding.address));
    let memory = Program::start(&built("aeterna-memory"), &["--memory.embedding", &url], two.path()).await;
    let mut client = MemoryServiceClient::new(memory.channel());
    for text in ["the cat sleeps", "the boat sails"] {
        client.add(item("ann", text)).await.unwrap();
    }
    let mut search = async || {
        let request = SearchRequest {
            scope: user("ann"),
            query: "who sleeps".into(),
            rerank: true,
            explain: true,
            ..Default::default()
        };
        let found = client.search(request).await.unwrap().into_inner();
        assert_eq!(found.results[0].memory.as_ref().unwrap().content, "the cat sleeps");
        let reranked = found.results[0].breakdown.as_ref().unwrap().rerank.is_some();
        let told = found.degraded_reasons.iter().any(|why| why.starts_with("not reranked"));
        assert_eq!(
            (found.degraded, told),
            (!reranked, !reranked),
            "{:?}",
            found.degraded_reasons
        );
        reranked
    };
    assert!(search().await);
    embedding.signal("STOP").await;
    assert!(!search().await);
    embedding.kill().await;
    assert!(!search().await);
    let embedding = Program::start_at(address, &built("aeterna-embedding"), &flags, one.path(), &[]).await;
    for attempt in 0.. {
        if search().await {
            break;
        }
        assert!(attempt < 200, "it is not asked again:\n{}", memory.log());
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    memory.stop().await;
    embedding.stop().await;
}

#[tokio::test]
async fn a_directory_that_is_no_cross_encoder_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path(), false);
    let data = tempfile::tempdir().unwrap();
    let started = tokio::process::Command::new(built("aeterna"))
        .args([
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--embedding.model_dirs",
            "",
            "--embedding.reranker_dir",
        ])
        .arg(dir.path())
        .arg("--data-dir")
        .arg(data.path())
        .kill_on_drop(true)
        .output();
    let ended = tokio::time::timeout(std::time::Duration::from_secs(30), started)
        .await
        .expect("it ends")
        .unwrap();
    let said = String::from_utf8_lossy(&ended.stderr).into_owned() + &String::from_utf8_lossy(&ended.stdout);
    assert!(!ended.status.success(), "{said}");
    assert!(
        said.contains("classifier") && said.contains(&dir.path().display().to_string()),
        "{said}"
    );
}
