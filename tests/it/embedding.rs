//! The embedding service over its contract.

use aeterna_proto::embedding::v1::embedding_service_client::EmbeddingServiceClient;
use aeterna_proto::embedding::v1::{
    BatchEmbedRequest, EmbedRequest, ListModelsRequest, SelectDimensionRequest, Size, UseCase, size::By,
};
use aeterna_proto::memory::v1::memory_service_client::MemoryServiceClient;
use aeterna_proto::memory::v1::{BatchAddRequest, StatsRequest};
use aeterna_testkit::refusal;
use tonic::Code;

use crate::notes::{item, user};
use crate::sandbox::Sandbox;

fn text(text: &str) -> EmbedRequest {
    EmbedRequest {
        text: text.into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn every_size_is_a_unit_vector_and_a_prefix_of_the_full_one() {
    let sandbox = Sandbox::start(&[]).await;
    for (way, channel) in sandbox.ways() {
        let mut client = EmbeddingServiceClient::new(channel);
        let full = client.embed(text("Ann adopted a grey cat")).await.unwrap().into_inner();
        assert_eq!((full.model.as_str(), full.dimension), ("hash", 1536), "{way}");
        let full = full.vector.unwrap().values;
        for use_case in [
            UseCase::FastSearch,
            UseCase::Clustering,
            UseCase::Ranking,
            UseCase::PreciseMatching,
        ] {
            let size = Some(Size {
                by: Some(By::UseCase(use_case.into())),
            });
            let request = EmbedRequest {
                size,
                ..text("Ann adopted a grey cat")
            };
            let answer = client.embed(request).await.unwrap().into_inner();
            let values = answer.vector.unwrap().values;
            assert_eq!(values.len(), usize::try_from(answer.dimension).unwrap(), "{way}");
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f32>();
            let norm = dot(&full[..values.len()], &full[..values.len()]).sqrt();
            assert!((dot(&values, &values) - 1.0).abs() < 1e-5, "{way}");
            assert!((dot(&values, &full[..values.len()]) / norm - 1.0).abs() < 1e-5, "{way}");
        }
    }
    sandbox.stop().await;
}

#[tokio::test]
async fn a_batch_answers_in_order_and_repeats_come_from_the_cache() {
    let sandbox = Sandbox::start(&[]).await;
    for (way, channel) in sandbox.ways() {
        let mut client = EmbeddingServiceClient::new(channel);
        let texts: Vec<String> = ["one", "two", "one"].map(|t| format!("{t} {way}")).into();
        let batch = BatchEmbedRequest {
            texts: texts.clone(),
            ..Default::default()
        };
        let batch = client.batch_embed(batch).await.unwrap().into_inner();
        assert_eq!((batch.vectors.len(), batch.cached), (3, 1), "{way}");
        assert_eq!(batch.vectors[0], batch.vectors[2]);
        assert_ne!(batch.vectors[0], batch.vectors[1]);
        let again = client.embed(text(&texts[1])).await.unwrap().into_inner();
        assert!(again.cached, "{way}");
        assert_eq!(again.vector.as_ref(), Some(&batch.vectors[1]));
    }
    sandbox.stop().await;
}

#[tokio::test]
async fn models_and_dimensions_can_be_asked_for() {
    let sandbox = Sandbox::start(&[]).await;
    for (way, channel) in sandbox.ways() {
        let mut client = EmbeddingServiceClient::new(channel);
        let models = client
            .list_models(ListModelsRequest {})
            .await
            .unwrap()
            .into_inner()
            .models;
        assert_eq!(models.len(), 1, "{way}");
        assert!(models[0].default && models[0].lexical && models[0].matryoshka);
        assert_eq!(models[0].dimensions, [256, 384, 768, 1536]);
        let request = SelectDimensionRequest {
            query_length: 5,
            result_count: 10,
            ..Default::default()
        };
        let chosen = client.select_dimension(request).await.unwrap().into_inner();
        assert_eq!((chosen.dimension, chosen.model.as_str()), (256, "hash"), "{way}");
        // By what was measured: one text at full size takes far less than a minute, and more than nothing.
        client.embed(text(&format!("measured {way}"))).await.unwrap();
        let auto = |latency_budget_ms: i32| SelectDimensionRequest {
            use_case: UseCase::Auto.into(),
            latency_budget_ms,
            ..Default::default()
        };
        let chosen = client.select_dimension(auto(60_000)).await.unwrap().into_inner();
        assert_eq!(
            (chosen.dimension, chosen.untrained_truncation),
            (1536, false),
            "{way}: {}",
            chosen.rule
        );
        assert!(chosen.rule.contains("measured"), "{way}: {}", chosen.rule);
        let unlimited = client.select_dimension(auto(0)).await.unwrap().into_inner();
        assert_eq!(unlimited.dimension, 1536, "{way}: {}", unlimited.rule);
        let embedded = EmbedRequest {
            size: Some(Size {
                by: Some(By::UseCase(UseCase::Auto.into())),
            }),
            ..text("at full size")
        };
        assert_eq!(
            client.embed(embedded).await.unwrap().into_inner().dimension,
            1536,
            "{way}"
        );
    }
    sandbox.stop().await;
}

#[tokio::test]
async fn bad_input_is_refused_with_every_field_named() {
    let sandbox = Sandbox::start(&[]).await;
    let sized = |by| Some(Size { by: Some(by) });
    let cases: Vec<(EmbedRequest, &[&str])> = vec![
        (text(""), &["text"]),
        (text(&"x".repeat(65_537)), &["text"]),
        (
            EmbedRequest {
                size: sized(By::Dimension(-1)),
                ..text("a")
            },
            &["size.dimension"],
        ),
        (
            EmbedRequest {
                size: sized(By::Dimension(i32::MAX)),
                ..text("a")
            },
            &["size.dimension"],
        ),
        (
            EmbedRequest {
                size: sized(By::UseCase(99)),
                ..text("a")
            },
            &["size.use_case"],
        ),
        (EmbedRequest { kind: -7, ..text("a") }, &["kind"]),
        (
            EmbedRequest {
                model: "m".repeat(100_000),
                ..text("a")
            },
            &["model"],
        ),
        (
            EmbedRequest {
                kind: 9,
                size: sized(By::Dimension(3)),
                ..text("")
            },
            &["text", "size.dimension", "kind"],
        ),
    ];
    for (way, channel) in sandbox.ways() {
        let mut client = EmbeddingServiceClient::new(channel);
        for (request, fields) in &cases {
            let status = client.embed(request.clone()).await.unwrap_err();
            assert_eq!(status.code(), Code::InvalidArgument, "{way} {fields:?}");
            assert_eq!(
                refusal(&status),
                ("INVALID_FIELD".into(), fields.iter().map(|f| f.to_string()).collect())
            );
        }
        let unknown = EmbedRequest {
            model: "ada\0\u{202e}".into(),
            ..text("a")
        };
        let status = client.embed(unknown).await.unwrap_err();
        assert_eq!(
            (status.code(), refusal(&status).0.as_str()),
            (Code::NotFound, "MODEL_NOT_FOUND")
        );
        for texts in [vec![], vec!["a".into(); 1001], vec!["a".into(), String::new()]] {
            let last = texts.len();
            let status = client
                .batch_embed(BatchEmbedRequest {
                    texts,
                    ..Default::default()
                })
                .await
                .unwrap_err();
            let field = if last == 2 { "texts[1]" } else { "texts" };
            assert_eq!(refusal(&status).1, [field], "{way}");
        }
        let negative = SelectDimensionRequest {
            query_length: -1,
            result_count: -1,
            latency_budget_ms: -1,
            ..Default::default()
        };
        let status = client.select_dimension(negative).await.unwrap_err();
        assert_eq!(
            refusal(&status).1,
            ["query_length", "result_count", "latency_budget_ms"],
            "{way}"
        );
        for hostile in [
            "\0",
            "\u{202e}\u{feff}",
            "';DROP TABLE memories;--",
            "\u{1F9E0}".repeat(1000).as_str(),
        ] {
            client.embed(text(hostile)).await.unwrap();
        }
    }
    sandbox.stop().await;
}

#[tokio::test]
async fn a_directory_that_is_no_model_is_refused_by_name() {
    let dir = std::env::temp_dir().join(format!("aeterna-model-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let missing = aeterna_embedding::check_directory(&dir).unwrap_err();
    assert!(missing.contains("`config.json` is missing"), "{missing}");
    std::fs::remove_dir_all(&dir).unwrap();
}

#[tokio::test]
async fn the_local_model_knows_meanings_and_does_not_mind_its_neighbours() {
    let model = aeterna_testkit::minilm();
    let sandbox = Sandbox::start(&[("embedding.model_dirs", model.to_str().unwrap())]).await;
    for (way, channel) in sandbox.ways() {
        let mut client = EmbeddingServiceClient::new(channel);
        let long = "a very long text about boats ".repeat(400);
        let texts = [
            "a cat sleeps on the sofa",
            "the kitten is dozing on the couch",
            "interest rates rose again",
            &long,
        ];
        let batch = BatchEmbedRequest {
            texts: texts.map(str::to_owned).to_vec(),
            ..Default::default()
        };
        let answer = client.batch_embed(batch).await.unwrap().into_inner();
        assert_eq!(
            (answer.model.as_str(), answer.dimension, answer.truncated),
            ("all-MiniLM-L6-v2", 384, 1),
            "{way}"
        );
        let dot = |a: usize, b: usize| {
            let (a, b) = (&answer.vectors[a].values, &answer.vectors[b].values);
            a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>()
        };
        // Known of this model: a paraphrase without a common word is near, another subject is not.
        assert!(dot(0, 1) > 0.5 && dot(0, 2) < 0.2, "{way}: {} {}", dot(0, 1), dot(0, 2));
        // A text alone has the vector that it has beside a long one, padding or not.
        let alone = EmbedRequest {
            text: texts[1].to_owned(),
            kind: 2,
            ..Default::default()
        };
        let alone = client.embed(alone).await.unwrap().into_inner();
        let values = alone.vector.unwrap().values;
        let near = values
            .iter()
            .zip(&answer.vectors[1].values)
            .all(|(a, b)| (a - b).abs() < 1e-5);
        assert!(
            near && (values.iter().map(|x| x * x).sum::<f32>() - 1.0).abs() < 1e-5,
            "{way}"
        );
    }
    sandbox.stop().await;
}

#[tokio::test]
async fn what_does_not_fit_into_an_answer_is_refused_with_what_would() {
    let sandbox = Sandbox::start(&[("limits.message_bytes", "65536")]).await;
    for (way, channel) in sandbox.ways() {
        let mut client = EmbeddingServiceClient::new(channel.clone());
        let mut ask = async |count: usize, dimension: i32| {
            let request = BatchEmbedRequest {
                texts: (0..count).map(|n| format!("text {n}")).collect(),
                size: Some(Size {
                    by: Some(By::Dimension(dimension)),
                }),
                ..Default::default()
            };
            client
                .batch_embed(request)
                .await
                .map(|answer| answer.into_inner().vectors.len())
        };
        let status = ask(11, 1536).await.unwrap_err();
        assert_eq!(refusal(&status).0, "MESSAGE_TOO_LARGE", "{way}: {status:?}");
        assert!(status.message().contains("at most 10 texts"), "{way}: {status:?}");
        assert_eq!(ask(10, 1536).await.unwrap(), 10, "{way}");
        assert_eq!(ask(60, 256).await.unwrap(), 60, "{way}");
        // Who stores more at once has them all, in several answers.
        let mut memories = MemoryServiceClient::new(channel);
        let batch = BatchAddRequest {
            requests: (0..25).map(|n| item(way, &format!("fact {n}"))).collect(),
            ..Default::default()
        };
        memories.batch_add(batch).await.unwrap();
        let stats = StatsRequest {
            scope: user(way),
            ..Default::default()
        };
        let stats = memories.stats(stats).await.unwrap().into_inner();
        assert_eq!((stats.layers[0].memories, stats.pending_embeddings), (25, 0), "{way}");
    }
    sandbox.stop().await;
}
