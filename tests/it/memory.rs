//! The memory service over its contract.

use aeterna_proto::memory::v1::batch_delete_result::Result as Deleted;
use aeterna_proto::memory::v1::memory_service_client::MemoryServiceClient;
use aeterna_proto::memory::v1::{
    AddOutcome, BatchDeleteRequest, DeleteRequest, GetRequest, HistoryRequest, ListRequest, Memory, SearchRequest,
    StatsRequest, UpdateRequest,
};
use tonic::Code;

use aeterna_testkit::refusal;

use crate::notes::{item as add, user};
use crate::sandbox::Sandbox;

#[tokio::test]
async fn what_is_added_is_found_changed_and_deleted() {
    let sandbox = Sandbox::start(&[]).await;
    for (way, channel) in sandbox.ways() {
        let mut client = MemoryServiceClient::new(channel);
        let added = client
            .add(add(way, "Ann adopted a grey cat"))
            .await
            .unwrap()
            .into_inner()
            .memory
            .unwrap();
        client.add(add(way, "The budget was approved")).await.unwrap();
        let again = client
            .add(add(way, "Ann adopted a grey cat"))
            .await
            .unwrap()
            .into_inner();
        assert_eq!(
            (again.outcome(), &again.memory.unwrap().id),
            (AddOutcome::Merged, &added.id),
            "{way}"
        );

        let query = SearchRequest {
            scope: user(way),
            query: "who has a cat?".into(),
            explain: true,
            ..Default::default()
        };
        let found = client.search(query.clone()).await.unwrap().into_inner();
        assert_eq!(found.results[0].memory.as_ref().unwrap().id, added.id, "{way}");
        assert!(!found.degraded);
        for result in &found.results {
            let parts = result.breakdown.as_ref().unwrap();
            let sum = parts.dense_part + parts.lexical_part + parts.neighbour_part + parts.layer_part;
            assert!((sum - result.score).abs() < 1e-9, "{way}: {sum} {}", result.score);
        }
        let elsewhere = SearchRequest {
            scope: user("nobody"),
            ..query.clone()
        };
        assert!(client.search(elsewhere).await.unwrap().into_inner().results.is_empty());

        let memory = Memory {
            id: added.id.clone(),
            content: "Ann adopted a black dog".into(),
            etag: added.etag.clone(),
            ..Default::default()
        };
        let mask = prost_types::FieldMask {
            paths: vec!["content".into()],
        };
        let update = UpdateRequest {
            memory: Some(memory),
            update_mask: Some(mask),
            request_id: String::new(),
        };
        let updated = client
            .update(update.clone())
            .await
            .unwrap()
            .into_inner()
            .memory
            .unwrap();
        assert_eq!(
            (updated.version, updated.content.as_str()),
            (2, "Ann adopted a black dog")
        );
        let stale = client.update(update).await.unwrap_err();
        assert_eq!(
            (stale.code(), refusal(&stale).0.as_str()),
            (Code::Aborted, "ETAG_MISMATCH")
        );

        client
            .delete(DeleteRequest {
                id: added.id.clone(),
                ..Default::default()
            })
            .await
            .unwrap();
        let gone = client
            .get(GetRequest {
                id: added.id.clone(),
                ..Default::default()
            })
            .await
            .unwrap_err();
        assert_eq!(gone.code(), Code::NotFound);
        let found = client.search(query).await.unwrap().into_inner();
        assert!(
            found.results.iter().all(|r| r.memory.as_ref().unwrap().id != added.id),
            "{way}"
        );
        let listed = client
            .list(ListRequest {
                scope: user(way),
                ..Default::default()
            })
            .await
            .unwrap()
            .into_inner();
        assert_eq!(listed.memories.len(), 1, "{way}");
    }
    sandbox.stop().await;
}

#[tokio::test]
async fn pages_end_before_a_message_is_too_large_and_go_on_where_they_ended() {
    let sandbox = Sandbox::start(&[("limits.message_bytes", "262144")]).await;
    for (way, channel) in sandbox.ways() {
        let mut client = MemoryServiceClient::new(channel);
        let large = |n: usize| add(way, &format!("{n} {}", "word ".repeat(11_000)));
        for n in 0..9 {
            client.add(large(n)).await.unwrap();
        }
        let (mut seen, mut ids, mut pages, mut page_token) = (Vec::new(), Vec::new(), 0, String::new());
        loop {
            let request = ListRequest {
                scope: user(way),
                page_token,
                ..Default::default()
            };
            let page = client.list(request).await.unwrap().into_inner();
            pages += 1;
            ids.extend(page.memories.iter().map(|memory| memory.id.clone()));
            seen.extend(page.memories.into_iter().map(|memory| memory.content[..1].to_owned()));
            page_token = page.next_page_token;
            if page_token.is_empty() {
                break;
            }
        }
        assert_eq!(seen.join(""), "876543210", "{way}");
        assert!(pages >= 3, "{way}: {pages}");
        let batch = aeterna_proto::memory::v1::BatchAddRequest {
            requests: (10..14)
                .map(|n| add(way, &format!("{n} {}", "word ".repeat(13_050))))
                .collect(),
            ..Default::default()
        };
        let status = client.batch_add(batch.clone()).await.unwrap_err();
        assert_eq!(refusal(&status).0, "MESSAGE_TOO_LARGE", "{way}: {status:?}");
        let query = SearchRequest {
            scope: user(way),
            query: "word".into(),
            ..Default::default()
        };
        let status = client.search(query).await.unwrap_err();
        assert_eq!(refusal(&status).0, "MESSAGE_TOO_LARGE", "{way}: {status:?}");
        assert!(status.message().contains("lower `top_k`"), "{status:?}");
        // What is done is told of each item, whatever it said.
        let delete = |id: &String| DeleteRequest {
            id: id.clone(),
            ..Default::default()
        };
        let batch = BatchDeleteRequest {
            requests: ids.iter().map(delete).collect(),
        };
        let results = client.batch_delete(batch).await.unwrap().into_inner().results;
        for (result, id) in results.iter().zip(&ids) {
            let Some(Deleted::Deleted(deleted)) = &result.result else {
                panic!("{way}: {result:?}");
            };
            let memory = deleted.memory.as_ref().unwrap();
            assert_eq!((&memory.id, memory.content.as_str()), (id, ""), "{way}");
            assert!(
                memory.deleted_at.is_some() && !memory.etag.is_empty(),
                "{way}: {memory:?}"
            );
        }
        assert_eq!(results.len(), 9, "{way}");
    }
    sandbox.stop().await;
}

#[tokio::test]
async fn a_filter_means_the_same_in_list_and_in_every_arm_of_search() {
    let sandbox = Sandbox::start(&[]).await;
    for (way, channel) in sandbox.ways() {
        let mut client = MemoryServiceClient::new(channel);
        for n in 0..20 {
            let mut request = add(way, &format!("note {n} about boats"));
            let memory = request.memory.as_mut().unwrap();
            memory.tags = vec![if n % 4 == 0 { "rare".into() } else { "common".into() }];
            memory.importance = Some(f64::from(n) / 20.0);
            client.add(request).await.unwrap();
        }
        let filter = "tags:rare AND importance >= 0.2";
        let list = ListRequest {
            scope: user(way),
            filter: filter.into(),
            ..Default::default()
        };
        let listed = client.list(list).await.unwrap().into_inner().memories;
        assert_eq!(listed.len(), 4, "{way}");
        for mode in [1, 2, 3] {
            let query = SearchRequest {
                scope: user(way),
                query: "boats".into(),
                top_k: 20,
                filter: filter.into(),
                mode,
                ..Default::default()
            };
            let found = client.search(query).await.unwrap().into_inner().results;
            let mut ids: Vec<_> = found.into_iter().map(|result| result.memory.unwrap().id).collect();
            let mut wanted: Vec<_> = listed.iter().map(|memory| memory.id.clone()).collect();
            ids.sort();
            wanted.sort();
            assert_eq!(ids, wanted, "{way}: mode {mode}");
        }
        let list = ListRequest {
            filter: "colour = red".into(),
            ..Default::default()
        };
        let status = client.list(list).await.unwrap_err();
        assert_eq!(refusal(&status).1, ["filter"], "{way}: {status:?}");
    }
    sandbox.stop().await;
}

#[tokio::test]
async fn what_has_expired_is_hidden_at_once_and_takes_nobodys_place() {
    let sandbox = Sandbox::start(&[]).await;
    for (way, channel) in sandbox.ways() {
        let mut client = MemoryServiceClient::new(channel);
        client
            .add(add(way, "boats boats and more boats, says somebody at length"))
            .await
            .unwrap();
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap();
        for n in 0..5 {
            let mut request = add(way, &format!("boats {n}"));
            request.memory.as_mut().unwrap().expires_at = Some(prost_types::Timestamp {
                seconds: now.as_secs() as i64 - 1,
                nanos: 0,
            });
            client.add(request).await.unwrap();
        }
        let query = SearchRequest {
            scope: user(way),
            query: "boats".into(),
            top_k: 1,
            ..Default::default()
        };
        let found = client.search(query).await.unwrap().into_inner().results;
        assert_eq!(found.len(), 1, "{way}");
        // Said again without an end, it is there again, and the answer does not lie.
        let again = client
            .add(add(way, "boats 3"))
            .await
            .unwrap()
            .into_inner()
            .memory
            .unwrap();
        let got = client
            .get(GetRequest {
                id: again.id.clone(),
                ..Default::default()
            })
            .await;
        assert!(got.is_ok(), "{way}: {got:?}");
    }
    sandbox.stop().await;
}

#[tokio::test]
async fn history_tells_every_version_and_a_purge_ends_it() {
    let sandbox = Sandbox::start(&[]).await;
    for (way, channel) in sandbox.ways() {
        let mut client = MemoryServiceClient::new(channel);
        let added = client
            .add(add(way, "the first words"))
            .await
            .unwrap()
            .into_inner()
            .memory
            .unwrap();
        for n in 0..3 {
            let update = UpdateRequest {
                memory: Some(Memory {
                    id: added.id.clone(),
                    importance: Some(f64::from(n) / 10.0),
                    ..Default::default()
                }),
                update_mask: Some(prost_types::FieldMask {
                    paths: vec!["importance".into()],
                }),
                request_id: String::new(),
            };
            client.update(update).await.unwrap();
        }
        let history = async |client: &mut MemoryServiceClient<_>, page_token: String| {
            let request = HistoryRequest {
                id: added.id.clone(),
                page_size: 3,
                page_token,
                ..Default::default()
            };
            client.history(request).await
        };
        let first = history(&mut client, String::new()).await.unwrap().into_inner();
        let second = history(&mut client, first.next_page_token.clone())
            .await
            .unwrap()
            .into_inner();
        let versions: Vec<_> = [first.versions, second.versions].concat();
        let told: Vec<_> = versions
            .iter()
            .map(|v| (v.memory.as_ref().unwrap().version, v.kind()))
            .collect();
        use aeterna_proto::memory::v1::ChangeKind;
        let wanted = [
            (4, ChangeKind::Updated),
            (3, ChangeKind::Updated),
            (2, ChangeKind::Updated),
            (1, ChangeKind::Added),
        ];
        assert_eq!(told, wanted, "{way}");
        assert!(
            second.next_page_token.is_empty() && versions[0].changed_by == "local",
            "{way}"
        );
        let foreign = history(&mut client, "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA".into())
            .await
            .unwrap_err();
        assert_eq!(refusal(&foreign).0, "INVALID_PAGE_TOKEN", "{way}");

        let stats = StatsRequest {
            scope: user(way),
            ..Default::default()
        };
        let counted = client.stats(stats.clone()).await.unwrap().into_inner();
        assert_eq!(
            (
                counted.layers[0].memories,
                counted.layers[0].content_bytes,
                counted.index_lag
            ),
            (1, 15, 0),
            "{way}"
        );
        assert!(counted.index_bytes > 0, "{way}: {counted:?}");

        let item = |id: &str, purge: bool| DeleteRequest {
            id: id.into(),
            purge,
            ..Default::default()
        };
        let batch = BatchDeleteRequest {
            requests: vec![
                item(&added.id, false),
                item("nonsense", false),
                item(&added.id, true),
                item(&added.id, true),
            ],
        };
        let results = client.batch_delete(batch).await.unwrap().into_inner().results;
        use aeterna_proto::memory::v1::batch_delete_result::Result as Item;
        let verdicts: Vec<_> = results
            .into_iter()
            .map(|result| match result.result.unwrap() {
                Item::Deleted(deleted) => format!("deleted {}", deleted.memory.is_some()),
                Item::Error(error) => error.message,
            })
            .collect();
        assert_eq!(verdicts[0], "deleted true", "{way}: {verdicts:?}");
        assert!(verdicts[1].contains("requests[1].id"), "{way}: {verdicts:?}");
        assert_eq!(verdicts[2], "deleted false", "{way}: {verdicts:?}");
        assert!(verdicts[3].contains("there is no memory"), "{way}: {verdicts:?}");
        let gone = history(&mut client, String::new()).await.unwrap_err();
        assert_eq!(gone.code(), Code::NotFound, "{way}");
        let counted = client.stats(stats).await.unwrap().into_inner();
        assert!(counted.layers.is_empty() && counted.deleted == 0, "{way}: {counted:?}");
    }
    sandbox.stop().await;
}
