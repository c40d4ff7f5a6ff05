//! The memory service over its contract.

use aeterna_proto::common::v1::Scope;
use aeterna_proto::memory::v1::memory_service_client::MemoryServiceClient;
use aeterna_proto::memory::v1::{
    AddOutcome, AddRequest, DeleteRequest, GetRequest, ListRequest, Memory, SearchRequest, UpdateRequest,
};
use tonic::Code;

use crate::sandbox::{Sandbox, refusal};

fn user(name: &str) -> Option<Scope> {
    Some(Scope {
        user: name.into(),
        ..Default::default()
    })
}

fn add(user_name: &str, content: &str) -> AddRequest {
    let memory = Memory {
        scope: user(user_name),
        content: content.into(),
        ..Default::default()
    };
    AddRequest {
        memory: Some(memory),
        request_id: String::new(),
    }
}

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
