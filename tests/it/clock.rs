//! A clock that goes back, and on again: nothing is lost, hidden or told out of order, and what has expired goes by itself.

use std::path::Path;
use std::sync::Arc;

use aeterna_proto::memory::v1::memory_service_client::MemoryServiceClient;
use aeterna_proto::memory::v1::{
    ChangeKind, GetRequest, HistoryRequest, ListRequest, Memory, SearchRequest, UpdateRequest, WatchRequest,
};
use aeterna_rpc::AnyChannel;
use aeterna_types::{ManualClock, Timestamp};

use crate::notes::{item, user};
use crate::sandbox::Sandbox;
use crate::watch::next;

type Client = MemoryServiceClient<AnyChannel>;

fn day(number: i64) -> Timestamp {
    Timestamp::from_micros(1_760_000_000_000_000 + number * 86_400_000_000).unwrap()
}

fn wire(time: Timestamp) -> Option<prost_types::Timestamp> {
    let (seconds, nanos) = time.parts();
    Some(prost_types::Timestamp { seconds, nanos })
}

async fn start(data: &Path, clock: &ManualClock) -> (Sandbox, Client) {
    let sandbox = Sandbox::start_at(data, &[], Arc::new(clock.clone())).await;
    let [_, (_, channel)] = sandbox.ways();
    (sandbox, MemoryServiceClient::new(channel))
}

async fn add(client: &mut Client, content: &str, expires_at: Option<prost_types::Timestamp>) -> Memory {
    let mut request = item("ann", content);
    request.memory.as_mut().unwrap().expires_at = expires_at;
    client.add(request).await.unwrap().into_inner().memory.unwrap()
}

/// All that List tells, a page of one at a time, in the order of the alphabet.
async fn listed(client: &mut Client) -> Vec<String> {
    let (mut contents, mut page_token) = (Vec::new(), String::new());
    loop {
        let request = ListRequest {
            scope: user("ann"),
            page_size: 1,
            page_token,
            ..Default::default()
        };
        let page = client.list(request).await.unwrap().into_inner();
        contents.extend(page.memories.into_iter().map(|memory| memory.content));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            contents.sort();
            return contents;
        }
    }
}

async fn found(client: &mut Client, query: &str) -> String {
    let request = SearchRequest {
        scope: user("ann"),
        query: query.into(),
        ..Default::default()
    };
    let found = client.search(request).await.unwrap().into_inner();
    assert!(!found.degraded, "{found:?}");
    found.results[0].memory.as_ref().unwrap().content.clone()
}

#[tokio::test]
async fn a_clock_that_goes_back_loses_nothing_and_what_expires_goes_by_the_clock() {
    let data = tempfile::tempdir().unwrap();
    let clock = ManualClock::at(day(10));
    let (sandbox, mut client) = start(data.path(), &clock).await;
    let first = add(&mut client, "an anchor", wire(day(11))).await;
    clock.set(day(9));
    add(&mut client, "a boat", None).await;
    let update = UpdateRequest {
        memory: Some(Memory {
            id: first.id.clone(),
            content: "an anchor of iron".into(),
            ..Default::default()
        }),
        update_mask: Some(prost_types::FieldMask {
            paths: vec!["content".into()],
        }),
        request_id: String::new(),
    };
    client.update(update).await.unwrap();
    assert_eq!(listed(&mut client).await, ["a boat", "an anchor of iron"]);
    assert_eq!(found(&mut client, "iron").await, "an anchor of iron");
    sandbox.stop().await;

    // A process that begins at an earlier time than the one before it ended.
    clock.set(day(8));
    let (sandbox, mut client) = start(data.path(), &clock).await;
    add(&mut client, "a compass", None).await;
    assert_eq!(listed(&mut client).await, ["a boat", "a compass", "an anchor of iron"]);
    assert_eq!(found(&mut client, "compass").await, "a compass");
    let history = HistoryRequest {
        id: first.id.clone(),
        ..Default::default()
    };
    let versions = client.history(history).await.unwrap().into_inner().versions;
    let versions: Vec<i64> = versions.iter().map(|v| v.memory.as_ref().unwrap().version).collect();
    assert_eq!(versions, [2, 1]);

    let watch = WatchRequest {
        scope: user("ann"),
        resume_token: "1.0".into(),
        ..Default::default()
    };
    let mut told = client.watch(watch).await.unwrap().into_inner();
    let mut contents = Vec::new();
    for _ in 0..4 {
        contents.push(next(&mut told).await.memory.unwrap().content);
    }
    assert_eq!(contents, ["an anchor", "a boat", "an anchor of iron", "a compass"]);

    // Its time comes: it is hidden at once, and the service deletes it by itself.
    clock.set(day(12));
    assert_eq!(listed(&mut client).await, ["a boat", "a compass"]);
    let gone = next(&mut told).await;
    assert_eq!(
        (gone.kind(), gone.memory.unwrap().id),
        (ChangeKind::Expired, first.id.clone())
    );
    // Back once more: what was deleted stays so.
    clock.set(day(9));
    assert_eq!(listed(&mut client).await, ["a boat", "a compass"]);
    let get = GetRequest {
        id: first.id,
        ..Default::default()
    };
    assert!(client.get(get).await.is_err());
    sandbox.stop().await;
}
