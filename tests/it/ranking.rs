//! What the order of results depends on: neighbours in a conversation, layers, weights; and what a filter leaves of them.

use aeterna_proto::common::v1::{Layer, Scope};
use aeterna_proto::embedding::v1::embedding_service_client::EmbeddingServiceClient;
use aeterna_proto::embedding::v1::{BatchEmbedRequest, TextKind};
use aeterna_proto::memory::v1::memory_service_client::MemoryServiceClient;
use aeterna_proto::memory::v1::{
    AddRequest, DeleteRequest, DimensionChoice, Fusion, ListRequest, SearchMode, SearchRequest, SearchResult,
    SearchWeights, Source,
};
use aeterna_testkit::refusal;

use crate::notes::{item, together, user};
use crate::sandbox::Sandbox;

/// A turn of a conversation.
fn turn(who: &str, content: &str, sequence: i64) -> AddRequest {
    let mut request = item(who, content);
    let memory = request.memory.as_mut().unwrap();
    memory.source = Some(Source {
        conversation: "harbour".into(),
        sequence: Some(sequence),
        ..Default::default()
    });
    request
}

fn content(result: &SearchResult) -> &str {
    &result.memory.as_ref().unwrap().content
}

fn contents(results: &[SearchResult]) -> Vec<&str> {
    results.iter().map(content).collect()
}

#[tokio::test]
async fn a_turn_gives_a_part_of_its_score_to_its_neighbours() {
    let sandbox = Sandbox::start(&[]).await;
    for (way, channel) in sandbox.ways() {
        let mut client = MemoryServiceClient::new(channel);
        let turns = [
            "shall we meet there",
            "the lighthouse keeper sails at dawn",
            "fine, see you",
            "nothing of interest",
        ];
        let mut ids = Vec::new();
        for (sequence, content) in turns.iter().enumerate() {
            let mut request = turn(way, content, sequence as i64);
            if sequence == 2 {
                request.memory.as_mut().unwrap().tags = vec!["late".into()];
            }
            let added = client.add(request).await.unwrap().into_inner();
            ids.push(added.memory.unwrap().id);
        }
        let query = SearchRequest {
            scope: user(way),
            query: "lighthouse keeper".into(),
            mode: SearchMode::Lexical.into(),
            explain: true,
            ..Default::default()
        };
        let mut find = async |query: SearchRequest| client.search(query).await.unwrap().into_inner().results;
        let found = find(query.clone()).await;
        let mut sorted = contents(&found);
        assert_eq!(sorted[0], turns[1], "{way}");
        sorted.sort_unstable();
        assert_eq!(
            sorted,
            [turns[2], turns[0], turns[1]],
            "{way}: a neighbour's neighbour is none"
        );
        for result in &found {
            let parts = result.breakdown.as_ref().unwrap();
            let sum = parts.dense_part + parts.lexical_part + parts.neighbour_part + parts.layer_part;
            assert!((sum - result.score).abs() < 1e-9, "{parts:?}");
            assert_eq!(
                parts.neighbour_part > 0.0,
                content(result) != turns[1],
                "{way}: {parts:?}"
            );
        }
        // Without a weight for neighbours there are none.
        let alone = SearchRequest {
            weights: Some(SearchWeights {
                neighbour: Some(0.0),
                ..Default::default()
            }),
            ..query.clone()
        };
        assert_eq!(contents(&find(alone).await), [turns[1]], "{way}");
        // What is left out, filtered away or deleted is no neighbour either.
        let without = SearchRequest {
            exclude_ids: vec![ids[0].clone()],
            ..query.clone()
        };
        assert_eq!(contents(&find(without).await), [turns[1], turns[2]], "{way}");
        let filtered = SearchRequest {
            filter: "NOT tags:late".into(),
            ..query.clone()
        };
        assert_eq!(contents(&find(filtered).await), [turns[1], turns[0]], "{way}");
        let gone = DeleteRequest {
            id: ids[2].clone(),
            ..Default::default()
        };
        client.delete(gone).await.unwrap();
        let found = client.search(query).await.unwrap().into_inner().results;
        assert_eq!(contents(&found), [turns[1], turns[0]], "{way}");
    }
    sandbox.stop().await;
}

fn place(layers: &[(Layer, &str)]) -> Option<Scope> {
    let mut scope = Scope::default();
    for (layer, id) in layers {
        match layer {
            Layer::Team => scope.team = (*id).into(),
            Layer::User => scope.user = (*id).into(),
            _ => panic!("not needed here"),
        }
    }
    Some(scope)
}

#[tokio::test]
async fn a_layer_breaks_near_ties_and_no_others() {
    let sandbox = Sandbox::start(&[]).await;
    for (way, channel) in sandbox.ways() {
        let mut client = MemoryServiceClient::new(channel);
        let (team, own) = (
            place(&[(Layer::Team, way)]),
            place(&[(Layer::Team, way), (Layer::User, "ann")]),
        );
        for scope in [&own, &team] {
            let mut request = item("", "the ship sails at dawn");
            request.memory.as_mut().unwrap().scope.clone_from(scope);
            client.add(request).await.unwrap();
        }
        let mut request = item("", "bring the map of the harbour, and another map");
        request.memory.as_mut().unwrap().scope = team;
        client.add(request).await.unwrap();
        let mut request = item(
            "",
            "bring bread to the harbour and to the other side of it, where there is no map of anything",
        );
        request.memory.as_mut().unwrap().scope.clone_from(&own);
        client.add(request).await.unwrap();

        let mut find = async |query: &str, tie_band: Option<f64>, layers: Vec<i32>| {
            let query = SearchRequest {
                scope: own.clone(),
                query: query.into(),
                explain: true,
                layers,
                weights: Some(SearchWeights {
                    tie_band,
                    ..Default::default()
                }),
                ..Default::default()
            };
            client.search(query).await.unwrap().into_inner().results
        };
        let layer = |result: &SearchResult| result.memory.as_ref().unwrap().layer();
        let found = find("when does the ship sail", None, vec![]).await;
        assert_eq!(
            (layer(&found[0]), layer(&found[1])),
            (Layer::User, Layer::Team),
            "{way}"
        );
        let parts: Vec<f64> = found
            .iter()
            .map(|result| result.breakdown.as_ref().unwrap().layer_part)
            .collect();
        assert!(parts[0] > parts[1] && parts[0] - parts[1] < 0.01, "{way}: {parts:?}");
        let found = find("when does the ship sail", Some(0.0), vec![]).await;
        assert_eq!(found[0].score, found[1].score, "{way}");
        // What is clearly better stays first.
        let found = find("map of the harbour", None, vec![]).await;
        assert_eq!(
            (layer(&found[0]), layer(&found[1])),
            (Layer::Team, Layer::User),
            "{way}"
        );

        // Only some layers, in Search as in List.
        let found = find("map of the harbour", None, vec![Layer::User.into()]).await;
        assert!(
            !found.is_empty() && found.iter().all(|result| layer(result) == Layer::User),
            "{way}"
        );
        for (layers, count) in [
            (vec![Layer::Team], 2),
            (vec![Layer::User, Layer::Team], 4),
            (vec![Layer::Agent], 0),
        ] {
            let list = ListRequest {
                scope: own.clone(),
                layers: layers.iter().map(|layer| (*layer).into()).collect(),
                ..Default::default()
            };
            let listed = client.list(list).await.unwrap().into_inner().memories;
            assert_eq!(listed.len(), count, "{way}: {layers:?}");
            assert!(listed.iter().all(|memory| layers.contains(&memory.layer())), "{way}");
        }
    }
    sandbox.stop().await;
}

/// Memories of the test of filters: so many that a filter after the search would leave nothing of the rare ones.
const MANY: usize = 17_000;

#[tokio::test(flavor = "multi_thread")]
async fn what_a_filter_leaves_is_found_however_little_it_is() {
    let sandbox = Sandbox::start(&[("memory.rotation", "false")]).await;
    let [(way, channel), _] = sandbox.ways();
    let (mut client, mut embedding) = (
        MemoryServiceClient::new(channel.clone()),
        EmbeddingServiceClient::new(channel),
    );
    let text = |number: usize| {
        let word = |part: usize| (number + 1).wrapping_mul(2_654_435_761 * (part + 1)) >> 7;
        let words: Vec<String> = (0..8).map(|part| format!("w{}", word(part) % 400)).collect();
        words.join(" ")
    };
    let tags = |number: usize| {
        let all = [(10, "tenth"), (100, "hundredth"), (1000, "thousandth")];
        let its = all.into_iter().filter(|(share, _)| number % share == 3);
        its.map(|(_, tag)| tag.to_owned()).collect::<Vec<_>>()
    };
    for numbers in (0..MANY).collect::<Vec<_>>().chunks(1000) {
        let request = |number: &usize| {
            let mut request = item(way, &format!("{} n{number}", text(*number)));
            request.memory.as_mut().unwrap().tags = tags(*number);
            request
        };
        let requests = numbers.iter().map(request).collect();
        client.batch_add(together(requests)).await.unwrap();
    }
    // Vectors of what the filter leaves and of the queries, by the model itself.
    let mut vectors = async |texts: Vec<String>, kind: TextKind| {
        let mut all = Vec::new();
        for texts in texts.chunks(200) {
            let request = BatchEmbedRequest {
                texts: texts.to_vec(),
                kind: kind.into(),
                ..Default::default()
            };
            let answer = embedding.batch_embed(request).await.unwrap().into_inner();
            all.extend(answer.vectors.into_iter().map(|vector| vector.values));
        }
        all
    };
    let queries: Vec<String> = (0..20).map(|n| text(n * 811 + 77)).collect();
    let wanted = vectors(queries.clone(), TextKind::Query).await;
    for (tag, least) in [("tenth", 0.99), ("hundredth", 0.99), ("thousandth", 0.99)] {
        let chosen: Vec<usize> = (0..MANY)
            .filter(|number| tags(*number).iter().any(|its| its == tag))
            .collect();
        let texts = chosen.iter().map(|number| format!("{} n{number}", text(*number)));
        let known = vectors(texts.collect(), TextKind::Document).await;
        let (mut found, mut all) = (0, 0);
        for (query, vector) in queries.iter().zip(&wanted) {
            let cosine = |other: &Vec<f32>| vector.iter().zip(other).map(|(a, b)| a * b).sum::<f32>();
            let mut cosines: Vec<f32> = known.iter().map(cosine).collect();
            cosines.sort_by(|a, b| b.total_cmp(a));
            let request = SearchRequest {
                scope: user(way),
                query: query.clone(),
                mode: SearchMode::Dense.into(),
                filter: format!("tags:{tag}"),
                explain: true,
                weights: Some(SearchWeights {
                    neighbour: Some(0.0),
                    ..Default::default()
                }),
                ..Default::default()
            };
            let results = client.search(request).await.unwrap().into_inner().results;
            assert!(
                results
                    .iter()
                    .all(|result| result.memory.as_ref().unwrap().tags.iter().any(|its| its == tag))
            );
            // The tenth, and what is as near as it, whichever of them comes first.
            let tenth = f64::from(cosines[9.min(cosines.len() - 1)]) - 2e-3;
            let cosines = results.iter().map(|result| result.breakdown.as_ref().unwrap().cosine());
            found += cosines.filter(|cosine| *cosine >= tenth).count();
            all += 10;
        }
        let recall = f64::from(found as u32) / f64::from(all);
        assert!(recall >= least, "{tag}: {recall}");
    }
    sandbox.stop().await;
}

#[tokio::test]
async fn weights_of_a_search_are_its_own() {
    let sandbox = Sandbox::start(&[]).await;
    for (way, channel) in sandbox.ways() {
        let mut client = MemoryServiceClient::new(channel);
        let texts = [
            "a storm took the mast of the old ship",
            "the ship, the ship, the ship",
            "old storms are told in the harbour",
            "a mast is made of one tree, and a ship of many",
            "the storm was over when the ship came home",
        ];
        for text in texts {
            client.add(item(way, text)).await.unwrap();
        }
        let mut find = async |mode: SearchMode, fusion: Fusion, dense: Option<f64>, rrf_k: Option<f64>| {
            let query = SearchRequest {
                scope: user(way),
                query: "old ship in a storm".into(),
                explain: true,
                mode: mode.into(),
                fusion: fusion.into(),
                weights: Some(SearchWeights {
                    dense,
                    rrf_k,
                    tie_band: Some(0.0),
                    ..Default::default()
                }),
                ..Default::default()
            };
            client.search(query).await.unwrap().into_inner().results
        };
        let convex = Fusion::Convex;
        for (mode, share) in [(SearchMode::Lexical, 0.0), (SearchMode::Dense, 1.0)] {
            let (alone, weighed) = (
                find(mode, convex, None, None).await,
                find(SearchMode::Hybrid, convex, Some(share), None).await,
            );
            // What the arm does not know has no score.
            let weighed: Vec<&SearchResult> = weighed.iter().filter(|result| result.score > 0.0).collect();
            let alone: Vec<&SearchResult> = alone.iter().filter(|result| result.score > 0.0).collect();
            assert!(alone.len() > 2 && alone.len() == weighed.len(), "{way}");
            for (alone, weighed) in alone.iter().zip(&weighed) {
                assert!(
                    content(alone) == content(weighed) && (alone.score - weighed.score).abs() < 1e-6,
                    "{way}"
                );
            }
        }
        // A first place of both arms makes 1 whatever k is; the second one less, the less the smaller k is.
        let mut second = Vec::new();
        for k in [1.0, 60.0, 1000.0] {
            let found = find(SearchMode::Hybrid, Fusion::Rrf, None, Some(k)).await;
            for result in &found {
                let parts = result.breakdown.as_ref().unwrap();
                let ceiling = 1.3;
                let place = |rank: i32| {
                    if rank == 0 {
                        0.0
                    } else {
                        0.5 * (k + 1.0) / (k + f64::from(rank)) / ceiling
                    }
                };
                assert!(
                    (parts.dense_part - place(parts.dense_rank)).abs() < 1e-9,
                    "{way} {k}: {parts:?}"
                );
                assert!(
                    (parts.lexical_part - place(parts.lexical_rank)).abs() < 1e-9,
                    "{way} {k}: {parts:?}"
                );
            }
            second.push(found[1].score);
        }
        assert!(second.is_sorted() && second[0] < second[2], "{way}: {second:?}");
    }
    sandbox.stop().await;
}

#[tokio::test]
async fn the_dimensions_of_a_search_are_chosen_by_the_caller_the_table_or_the_time_there_is() {
    let sandbox = Sandbox::start(&[]).await;
    for (number, (way, channel)) in sandbox.ways().into_iter().enumerate() {
        let mut client = MemoryServiceClient::new(channel);
        client
            .add(item(way, "the lighthouse keeper sails at dawn"))
            .await
            .unwrap();
        let query = |dimension, choice: DimensionChoice, latency_budget_ms| SearchRequest {
            scope: user(way),
            query: "who keeps the lighthouse".into(),
            dimension,
            dimension_choice: choice.into(),
            latency_budget_ms,
            explain: true,
            ..Default::default()
        };
        let mut find = async |query: SearchRequest| {
            let found = client.search(query).await.unwrap().into_inner();
            assert_eq!(found.results.len(), 1, "{way}");
            (found.dimension, found.stats.unwrap().dimension_rule)
        };
        let (all, table, auto) = (
            DimensionChoice::Unspecified,
            DimensionChoice::Table,
            DimensionChoice::Auto,
        );
        let (dimension, rule) = find(query(0, auto, 1)).await;
        // Both ways lead to one server.
        if number == 0 {
            assert_eq!(
                (dimension, rule.as_str()),
                (1536, "nothing was measured yet: full size")
            );
        }
        assert_eq!(find(query(0, all, 0)).await.0, 1536, "{way}");
        assert_eq!(find(query(384, all, 0)).await.0, 384, "{way}");
        // 24 characters.
        for (budget_ms, dimension) in [(0, 1536), (199, 768), (99, 384), (49, 256)] {
            assert_eq!(find(query(0, table, budget_ms)).await.0, dimension, "{way}");
        }
        let short = SearchRequest {
            query: "the lighthouse".into(),
            ..query(0, table, 0)
        };
        assert_eq!(find(short).await.0, 256, "{way}");
        for choice in [all, auto] {
            let (dimension, rule) = find(query(0, choice, 60_000)).await;
            assert_eq!(dimension, 1536, "{way}: {rule}");
            assert!(rule.contains("measured latency fits"), "{way}: {rule}");
        }
        let words = SearchRequest {
            mode: SearchMode::Lexical.into(),
            ..query(0, auto, 60_000)
        };
        assert_eq!(find(words).await, (0, String::new()), "{way}");
        for (wrong, field) in [
            (query(100, all, 0), "dimension"),
            (query(384, table, 0), "dimension"),
            (query(384, all, 20), "dimension"),
            (query(0, auto, -1), "latency_budget_ms"),
            (query(0, auto, 60_001), "latency_budget_ms"),
        ] {
            let status = client.search(wrong).await.unwrap_err();
            assert_eq!(refusal(&status).1, [field], "{way}: {}", status.message());
        }
        let unknown = SearchRequest {
            dimension_choice: 9,
            ..query(0, all, 0)
        };
        let status = client.search(unknown).await.unwrap_err();
        assert_eq!(refusal(&status).1, ["dimension_choice"], "{way}");
    }
    sandbox.stop().await;
}
