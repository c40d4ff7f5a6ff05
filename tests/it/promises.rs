//! What callers count on: duplicates that race, whole batches, tokens of consistency, scores that add up.

use std::collections::HashSet;
use std::time::Duration;

use aeterna_auth::Role;
use aeterna_proto::memory::v1::batch_add_result::Result as Added;
use aeterna_proto::memory::v1::batch_delete_result::Result as Deleted;
use aeterna_proto::memory::v1::memory_service_client::MemoryServiceClient;
use aeterna_proto::memory::v1::policy_service_client::PolicyServiceClient;
use aeterna_proto::memory::v1::{
    AddOutcome, BatchAddRequest, BatchDeleteRequest, DeleteRequest, Fusion, GetRequest, ListRequest, Policy,
    PolicyRules, PutPolicyRequest, SearchRequest, SearchWeights, WatchRequest,
};
use aeterna_testkit::{NEVER, SECRET, bearing, refusal, token};

use crate::notes::{item, user};
use crate::sandbox::Sandbox;

#[tokio::test(flavor = "multi_thread")]
async fn the_same_said_by_many_at_once_is_one_memory() {
    const CALLERS: usize = 32;
    let sandbox = Sandbox::start(&[]).await;
    for (way, channel) in sandbox.ways() {
        let callers: Vec<_> = (0..CALLERS)
            .map(|_| {
                let (mut client, request) = (
                    MemoryServiceClient::new(channel.clone()),
                    item(way, "the cat is called Max"),
                );
                tokio::spawn(async move { client.add(request).await.unwrap().into_inner() })
            })
            .collect();
        let (mut ids, mut created) = (HashSet::new(), 0);
        for caller in callers {
            let added = caller.await.unwrap();
            created += usize::from(added.outcome() == AddOutcome::Created);
            ids.insert(added.memory.unwrap().id);
        }
        assert_eq!((ids.len(), created), (1, 1), "{way}");
        let list = ListRequest {
            scope: user(way),
            ..Default::default()
        };
        let mut client = MemoryServiceClient::new(channel);
        let listed = client.list(list).await.unwrap().into_inner().memories;
        assert_eq!((listed.len(), listed[0].version), (1, 1), "{way}");
    }
    sandbox.stop().await;
}

#[tokio::test]
async fn a_batch_holds_a_thousand_and_no_more() {
    let sandbox = Sandbox::start(&[]).await;
    let [(_, channel), _] = sandbox.ways();
    let mut client = MemoryServiceClient::new(channel);
    let batch = |count: usize| BatchAddRequest {
        requests: (0..count).map(|n| item("ann", &format!("fact {n}"))).collect(),
        ..Default::default()
    };
    let status = client.batch_add(batch(1001)).await.unwrap_err();
    assert!(
        refusal(&status).0 == "INVALID_FIELD" && format!("{status:?}").contains("1000"),
        "{status:?}"
    );
    let mut whole = batch(1000);
    whole.requests[7].memory.as_mut().unwrap().content.clear();
    let results = client.batch_add(whole).await.unwrap().into_inner().results;
    let ids: Vec<String> = results
        .into_iter()
        .filter_map(|result| match result.result {
            Some(Added::Added(added)) => Some(added.memory.unwrap().id),
            _ => None,
        })
        .collect();
    assert_eq!(ids.len(), 999, "one is refused, and the others are not");

    let delete = |ids: &[String]| BatchDeleteRequest {
        requests: ids
            .iter()
            .map(|id| DeleteRequest {
                id: id.clone(),
                ..Default::default()
            })
            .collect(),
    };
    let mut all = ids.clone();
    all.extend(["01900000-0000-7000-8000-000000000000".to_owned(), ids[0].clone()]);
    let status = client.batch_delete(delete(&all)).await.unwrap_err();
    assert!(
        refusal(&status).0 == "INVALID_FIELD" && format!("{status:?}").contains("1000"),
        "{status:?}"
    );
    let deleted = client.batch_delete(delete(&all[..1000])).await.unwrap().into_inner();
    let refused = deleted
        .results
        .iter()
        .filter(|result| matches!(result.result, Some(Deleted::Error(_))));
    assert_eq!((deleted.results.len(), refused.count()), (1000, 1));
    let list = ListRequest {
        scope: user("ann"),
        ..Default::default()
    };
    assert!(client.list(list).await.unwrap().into_inner().memories.is_empty());
    sandbox.stop().await;
}

#[tokio::test]
async fn a_read_with_the_token_of_a_write_sees_it() {
    let sandbox = Sandbox::start(&[]).await;
    for (way, channel) in sandbox.ways() {
        let mut client = MemoryServiceClient::new(channel);
        let mut last = String::new();
        for n in 0..20 {
            let added = client
                .add(item(way, &format!("boat number{n}")))
                .await
                .unwrap()
                .into_inner();
            last = added.consistency_token;
            let query = SearchRequest {
                scope: user(way),
                query: format!("number{n}"),
                mode: 3,
                consistency_token: last.clone(),
                ..Default::default()
            };
            let found = client.search(query).await.unwrap().into_inner();
            assert!(!found.degraded, "{way}: {:?}", found.degraded_reasons);
            let id = added.memory.unwrap().id;
            assert_eq!(found.results[0].memory.as_ref().unwrap().id, id, "{way}");
            let get = GetRequest {
                id,
                consistency_token: last.clone(),
                ..Default::default()
            };
            client.get(get).await.unwrap();
        }
        // One that has not happened yet is waited for, and then it is said that it was not seen.
        let (store, sequence) = last.split_once('.').unwrap();
        let query = SearchRequest {
            scope: user(way),
            query: "boat".into(),
            consistency_token: format!("{store}.{}", sequence.parse::<i64>().unwrap() + 1000),
            ..Default::default()
        };
        let began = std::time::Instant::now();
        let found = client.search(query.clone()).await.unwrap().into_inner();
        assert!(found.degraded && !found.results.is_empty() && began.elapsed() > Duration::from_secs(1));
        assert!(found.degraded_reasons[0].contains("consistency_token"), "{way}");
        let broken = SearchRequest {
            consistency_token: "yesterday".into(),
            ..query
        };
        let status = client.search(broken).await.unwrap_err();
        assert_eq!(
            refusal(&status),
            ("INVALID_FIELD".into(), vec!["consistency_token".into()])
        );
    }
    sandbox.stop().await;
}

#[tokio::test]
async fn every_part_of_a_score_is_told_and_they_add_up() {
    let sandbox = Sandbox::start(&[]).await;
    for (way, channel) in sandbox.ways() {
        let mut client = MemoryServiceClient::new(channel);
        for (n, importance) in [0.1, 0.9, 0.5, 0.3].into_iter().enumerate() {
            let mut request = item(way, &format!("the ship sails at dawn, take {n}"));
            let memory = request.memory.as_mut().unwrap();
            memory.importance = Some(importance);
            memory.event_at = Some(prost_types::Timestamp {
                seconds: 1_700_000_000 + 86_400 * 30 * n as i64,
                nanos: 0,
            });
            client.add(request).await.unwrap();
        }
        for (fusion, threshold) in [(Fusion::Convex, None), (Fusion::Rrf, None), (Fusion::Convex, Some(0.5))] {
            let query = SearchRequest {
                scope: user(way),
                query: "when does the ship sail?".into(),
                fusion: fusion.into(),
                weights: Some(SearchWeights {
                    recency: Some(0.3),
                    importance: Some(0.4),
                    confidence: Some(0.1),
                    ..Default::default()
                }),
                threshold,
                explain: true,
                ..Default::default()
            };
            let found = client.search(query.clone()).await.unwrap().into_inner().results;
            for result in &found {
                let parts = result.breakdown.as_ref().unwrap();
                let sum = parts.dense_part
                    + parts.lexical_part
                    + parts.neighbour_part
                    + parts.recency_part
                    + parts.importance_part
                    + parts.confidence_part
                    + parts.layer_part;
                assert!((sum - result.score).abs() < 1e-9, "{way}: {parts:?}");
                assert!(parts.importance_part > 0.0 && parts.confidence_part > 0.0, "{parts:?}");
            }
            assert!(found.is_sorted_by(|a, b| a.score >= b.score));
            let Some(threshold) = threshold else {
                assert_eq!(found.len(), 4, "{way}");
                // What happened later is more recent, by half for each 30 days.
                let mut by_time: Vec<_> = found.iter().collect();
                by_time.sort_by_key(|result| result.memory.as_ref().unwrap().event_at.unwrap().seconds);
                let recency: Vec<f64> = by_time
                    .iter()
                    .map(|result| result.breakdown.as_ref().unwrap().recency_part)
                    .collect();
                for pair in recency.windows(2) {
                    assert!(
                        pair[0] > 0.0 && (pair[1] / pair[0] - 2.0).abs() < 1e-3,
                        "{way}: {recency:?}"
                    );
                }
                let best = found[0].memory.as_ref().unwrap();
                assert_eq!(best.importance, Some(0.9), "{way}: {fusion:?}");
                // What is left out makes room for the next best.
                let without = SearchRequest {
                    exclude_ids: vec![best.id.clone()],
                    top_k: 1,
                    ..query
                };
                let next = client.search(without).await.unwrap().into_inner().results;
                let second = found[1].memory.as_ref().map(|memory| &memory.id);
                assert_eq!(next[0].memory.as_ref().map(|memory| &memory.id), second, "{way}");
                continue;
            };
            assert!(!found.is_empty() && found.len() < 4, "{way}: {}", found.len());
            assert!(found.iter().all(|result| result.score >= threshold));
        }
    }
    sandbox.stop().await;
}

#[tokio::test]
async fn policies_are_watched_by_who_asks_for_them() {
    let sandbox = Sandbox::start(&[("auth.hs256_secret", SECRET)]).await;
    let [(_, channel), _] = sandbox.ways();
    let admin = token("acme", Role::Admin, &[], NEVER);
    let mut client = MemoryServiceClient::new(channel.clone());
    let watch = |policies: bool| WatchRequest {
        policies,
        ..Default::default()
    };
    let mut told = client.watch(bearing(watch(true), &admin)).await.unwrap().into_inner();
    let mut others = client.watch(bearing(watch(false), &admin)).await.unwrap().into_inner();
    let request = PutPolicyRequest {
        policy: Some(Policy {
            name: "small".into(),
            rules: Some(PolicyRules {
                max_content_bytes: Some(20),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    };
    let mut policies = PolicyServiceClient::new(channel);
    policies.put_policy(bearing(request, &admin)).await.unwrap();
    client.add(bearing(item("ann", "short"), &admin)).await.unwrap();
    let first = told.message().await.unwrap().unwrap();
    assert_eq!(first.policy.unwrap().name, "small");
    let second = told.message().await.unwrap().unwrap();
    assert_eq!(second.memory.unwrap().content, "short");
    let first = others.message().await.unwrap().unwrap();
    assert_eq!(first.memory.unwrap().content, "short", "others hear of memories only");
    sandbox.stop().await;
}
