//! What was: reads as of a time; and what depends on a memory itself: confidence, variety, near duplicates.

use std::time::{Duration, SystemTime};

use aeterna_proto::memory::v1::batch_add_result::Result as ItemResult;
use aeterna_proto::memory::v1::memory_service_client::MemoryServiceClient;
use aeterna_proto::memory::v1::{
    AddRequest, BatchAddRequest, DeleteRequest, GetRequest, ListRequest, Memory, SearchRequest, SearchWeights,
    UpdateRequest,
};
use aeterna_rpc::AnyChannel;
use aeterna_testkit::refusal;
use prost_types::{FieldMask, Timestamp};
use tonic::Code;

use crate::notes::{item, user};
use crate::sandbox::Sandbox;

type Client = MemoryServiceClient<AnyChannel>;

async fn add(client: &mut Client, name: &str, content: &str) -> Memory {
    let request = item(name, content);
    client.add(request).await.unwrap().into_inner().memory.unwrap()
}

async fn change(client: &mut Client, memory: Memory, field: &str) {
    let request = UpdateRequest {
        memory: Some(memory),
        update_mask: Some(FieldMask {
            paths: vec![field.into()],
        }),
        request_id: String::new(),
    };
    client.update(request).await.unwrap();
}

/// Now, with a little distance to what was before and what comes after.
async fn moment() -> Option<Timestamp> {
    tokio::time::sleep(Duration::from_millis(5)).await;
    let now = SystemTime::now();
    tokio::time::sleep(Duration::from_millis(5)).await;
    Some(now.into())
}

#[tokio::test]
async fn the_past_is_read_as_it_was() {
    let sandbox = Sandbox::start(&[]).await;
    for (way, channel) in sandbox.ways() {
        let mut client = MemoryServiceClient::new(channel);
        let before = moment().await;
        let moved = add(&mut client, way, "Ann lives in Lisbon").await;
        let kept = add(&mut client, way, "Ann likes the sea of Lisbon").await;
        let gone = add(&mut client, way, "Ann rents a flat in Lisbon").await;
        let then = moment().await;
        let memory = Memory {
            id: moved.id.clone(),
            content: "Ann lives in Oslo".into(),
            ..Default::default()
        };
        change(&mut client, memory, "content").await;
        let delete = DeleteRequest {
            id: gone.id.clone(),
            ..Default::default()
        };
        client.delete(delete).await.unwrap();
        add(&mut client, way, "Ann came late to Lisbon").await;

        let get = |id: &str, as_of: Option<Timestamp>| GetRequest {
            id: id.into(),
            as_of,
            ..Default::default()
        };
        let found = client
            .get(get(&moved.id, then))
            .await
            .unwrap()
            .into_inner()
            .memory
            .unwrap();
        assert_eq!(found, moved, "{way}");
        assert!(client.get(get(&gone.id, then)).await.is_ok(), "{way}");
        let status = client.get(get(&moved.id, before)).await.unwrap_err();
        assert_eq!(status.code(), Code::NotFound, "{way}");

        let list = |as_of: Option<Timestamp>, filter: &str| ListRequest {
            scope: user(way),
            as_of,
            filter: filter.into(),
            ..Default::default()
        };
        let contents = async |client: &mut Client, request: ListRequest| {
            let listed = client.list(request).await.unwrap().into_inner().memories;
            listed.into_iter().map(|memory| memory.content).collect::<Vec<_>>()
        };
        assert!(contents(&mut client, list(before, "")).await.is_empty(), "{way}");
        let wanted = [gone.content.clone(), kept.content.clone(), moved.content.clone()];
        assert_eq!(contents(&mut client, list(then, "")).await, wanted, "{way}");
        assert_eq!(
            contents(&mut client, list(then, "content:lives")).await,
            wanted[2..],
            "{way}"
        );

        for mode in [1, 2, 3] {
            let query = |as_of: Option<Timestamp>, filter: &str| SearchRequest {
                scope: user(way),
                query: "where in Lisbon".into(),
                as_of,
                filter: filter.into(),
                mode,
                explain: true,
                ..Default::default()
            };
            let found = client.search(query(then, "")).await.unwrap().into_inner();
            let mut texts: Vec<_> = found
                .results
                .iter()
                .map(|r| r.memory.as_ref().unwrap().content.clone())
                .collect();
            texts.sort();
            let mut wanted = wanted.to_vec();
            wanted.sort();
            assert_eq!(texts, wanted, "{way}: mode {mode}");
            for result in found.results {
                let parts = result.breakdown.unwrap();
                let sum = parts.dense_part + parts.lexical_part + parts.neighbour_part + parts.layer_part;
                assert!(
                    (sum - result.score).abs() < 1e-9 && (0.0..=1.0).contains(&result.score),
                    "{way}: {parts:?}"
                );
            }
            let filtered = client
                .search(query(then, "content:rents"))
                .await
                .unwrap()
                .into_inner()
                .results;
            assert_eq!(filtered.len(), 1, "{way}: mode {mode}");
            let nothing = client.search(query(before, "")).await.unwrap().into_inner().results;
            assert!(nothing.is_empty(), "{way}: mode {mode}");
            let now = client.search(query(None, "")).await.unwrap().into_inner().results;
            assert!(
                now.iter().all(|r| r.memory.as_ref().unwrap().content != moved.content),
                "{way}: mode {mode}"
            );
        }
        let later = Some((SystemTime::now() + Duration::from_secs(60)).into());
        let status = client.list(list(later, "")).await.unwrap_err();
        assert_eq!(refusal(&status).1, ["as_of"], "{way}");
    }
    sandbox.stop().await;
}

#[tokio::test]
async fn what_was_not_true_then_is_not_found_there() {
    let sandbox = Sandbox::start(&[]).await;
    let [(way, channel), _] = sandbox.ways();
    let mut client = MemoryServiceClient::new(channel);
    let at = |seconds: i64| Some(Timestamp { seconds, nanos: 0 });
    let request = AddRequest {
        memory: Some(Memory {
            scope: user(way),
            content: "Ann was the mayor".into(),
            valid_at: at(1_000_000_000),
            invalid_at: at(1_100_000_000),
            ..Default::default()
        }),
        request_id: String::new(),
    };
    client.add(request).await.unwrap();
    let now = moment().await;
    let query = |as_of: Option<Timestamp>| SearchRequest {
        scope: user(way),
        query: "mayor".into(),
        as_of,
        ..Default::default()
    };
    assert_eq!(client.search(query(None)).await.unwrap().into_inner().results.len(), 1);
    assert!(client.search(query(now)).await.unwrap().into_inner().results.is_empty());
    sandbox.stop().await;
}

#[tokio::test]
async fn confidence_variety_and_near_duplicates() {
    let sandbox = Sandbox::start(&[]).await;
    for (way, channel) in sandbox.ways() {
        let mut client = MemoryServiceClient::new(channel);
        let old = add(&mut client, way, "the harbour opens at seven in the morning").await;
        let new = add(&mut client, way, "the harbour opens at eight in the morning").await;
        add(&mut client, way, "the harbour master is called Ben").await;
        let memory = Memory {
            id: old.id.clone(),
            superseded_by: new.id.clone(),
            ..Default::default()
        };
        change(&mut client, memory, "superseded_by").await;
        let query = |weights: SearchWeights, top_k: i32| SearchRequest {
            scope: user(way),
            query: "when does the harbour open in the morning?".into(),
            top_k,
            mode: 3,
            weights: Some(weights),
            explain: true,
            ..Default::default()
        };
        let trusting = SearchWeights {
            confidence: Some(1.0),
            ..Default::default()
        };
        let found = client.search(query(trusting, 3)).await.unwrap().into_inner().results;
        assert_eq!(found[0].memory.as_ref().unwrap().id, new.id, "{way}: {found:?}");
        let parts = |place: usize| found[place].breakdown.as_ref().unwrap().confidence_part;
        assert!(parts(0) > 1.9 * parts(1).min(parts(2)), "{way}");
        // Two of three say the same: with variety, the third one is the second.
        let varied = SearchWeights {
            mmr_lambda: Some(0.3),
            ..Default::default()
        };
        let found = client.search(query(varied, 2)).await.unwrap().into_inner().results;
        assert!(
            found[1].memory.as_ref().unwrap().content.contains("Ben"),
            "{way}: {found:?}"
        );
        let bad = SearchWeights {
            mmr_lambda: Some(1.5),
            ..Default::default()
        };
        let status = client.search(query(bad, 2)).await.unwrap_err();
        assert_eq!(refusal(&status).1, ["weights.mmr_lambda"], "{way}");

        let near = AddRequest {
            memory: Some(Memory {
                scope: user(way),
                content: "The harbour opens at eight in the mornings!".into(),
                ..Default::default()
            }),
            request_id: String::new(),
        };
        let added = client.add(near).await.unwrap().into_inner();
        let told: Vec<_> = added.near_duplicates.iter().map(|near| near.id.as_str()).collect();
        assert!(
            told.first() == Some(&new.id.as_str()),
            "{way}: {:?}",
            added.near_duplicates
        );
        assert!(added.near_duplicates[0].similarity >= 0.9, "{way}");
        // A memory that is changed to say nearly the same has it told, one whose importance is changed has not.
        let far = client.add(item(way, "A ferry leaves for the island")).await.unwrap();
        let far = far.into_inner();
        assert_eq!(far.near_duplicates, [], "{way}");
        let mut changed = far.memory.unwrap();
        changed.etag.clear();
        changed.content = "The harbour opens, at eight, in the mornings".into();
        let mut change = async |fields: &[&str]| {
            let paths = fields.iter().map(ToString::to_string).collect();
            let request = UpdateRequest {
                memory: Some(changed.clone()),
                update_mask: Some(FieldMask { paths }),
                ..Default::default()
            };
            let near = client.update(request).await.unwrap().into_inner().near_duplicates;
            near.into_iter().map(|near| near.id).collect::<Vec<_>>()
        };
        assert_eq!(change(&["importance"]).await, Vec::<String>::new(), "{way}");
        let near = change(&["content"]).await;
        assert!(near.contains(&new.id) && !near.contains(&changed.id), "{way}: {near:?}");
        // So has a large batch that asks for it.
        for asked in [false, true] {
            let mut requests: Vec<_> = (0..32)
                .map(|n| {
                    item(
                        way,
                        &format!("{asked} {n} words of no other memory, number {}", n * 7919),
                    )
                })
                .collect();
            let end = if asked { "?" } else { "..." };
            requests.push(item(way, &format!("The harbour opens at eight in the mornings{end}")));
            let batch = BatchAddRequest {
                requests,
                tell_near_duplicates: asked,
            };
            let results = client.batch_add(batch).await.unwrap().into_inner().results;
            let told = results.iter().any(|result| match &result.result {
                Some(ItemResult::Added(added)) => added.near_duplicates.iter().any(|near| near.id == new.id),
                other => panic!("{way}: {other:?}"),
            });
            assert_eq!(told, asked, "{way}");
        }
        // With fewer dimensions it is the same search, on prefixes.
        let small = SearchRequest {
            dimension: 256,
            ..query(SearchWeights::default(), 3)
        };
        let small = client.search(small).await.unwrap().into_inner();
        assert_eq!((small.dimension, small.results.len()), (256, 3), "{way}");
    }
    sandbox.stop().await;
}
