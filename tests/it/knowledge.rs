//! Documents by path with their versions.

use std::time::Duration;

use aeterna_proto::common::v1::Scope;
use aeterna_proto::memory::v1::knowledge_service_client::KnowledgeServiceClient;
use aeterna_proto::memory::v1::memory_service_client::MemoryServiceClient;
use aeterna_proto::memory::v1::{
    ChangeKind, DeleteDocumentRequest, DiffDocumentRequest, Document, GetDocumentRequest, ListDocumentVersionsRequest,
    ListDocumentsRequest, PutDocumentRequest, RestoreDocumentRequest, WatchRequest,
};
use aeterna_testkit::refusal;
use tonic::Code;

use crate::sandbox::Sandbox;

pub fn team(name: &str) -> Option<Scope> {
    Some(Scope {
        team: name.into(),
        ..Default::default()
    })
}

pub fn put(team_name: &str, path: &str, content: &str) -> PutDocumentRequest {
    PutDocumentRequest {
        document: Some(Document {
            scope: team(team_name),
            path: path.into(),
            content: content.into(),
            ..Default::default()
        }),
        request_id: String::new(),
    }
}

#[tokio::test]
async fn a_document_has_versions_that_can_be_compared_and_brought_back() {
    let sandbox = Sandbox::start(&[]).await;
    for (way, channel) in sandbox.ways() {
        let mut client = KnowledgeServiceClient::new(channel.clone());
        let mut memories = MemoryServiceClient::new(channel);
        let watch = WatchRequest {
            documents: true,
            ..Default::default()
        };
        let mut events = memories.watch(watch).await.unwrap().into_inner();
        let path = "runbooks/failover.md";
        let first = client
            .put_document(put(way, path, "one\ntwo\nthree\n"))
            .await
            .unwrap()
            .into_inner();
        let first = first.document.unwrap();
        assert_eq!(
            (first.version, first.media_type.as_str()),
            (1, "text/markdown"),
            "{way}"
        );
        let mut again = put(way, path, "one\n2\nthree\nfour\n");
        again.document.as_mut().unwrap().etag = first.etag.clone();
        again.request_id = format!("edit-{way}");
        let second = client.put_document(again.clone()).await.unwrap().into_inner();
        // The same request answers the same, and an old etag is refused.
        let repeated = client.put_document(again.clone()).await.unwrap().into_inner();
        assert_eq!(repeated, second, "{way}");
        again.request_id.clear();
        let status = client.put_document(again).await.unwrap_err();
        assert_eq!(
            (status.code(), refusal(&status).0.as_str()),
            (Code::Aborted, "ETAG_MISMATCH"),
            "{way}"
        );

        let diff = DiffDocumentRequest {
            scope: team(way),
            path: path.into(),
            from_version: 1,
            to_version: 0,
            ..Default::default()
        };
        let diff = client.diff_document(diff).await.unwrap().into_inner();
        assert_eq!(
            (diff.added_lines, diff.removed_lines),
            (2, 1),
            "{way}: {}",
            diff.unified_diff
        );
        assert!(
            diff.unified_diff.contains("-two\n+2\n three\n+four\n"),
            "{way}: {}",
            diff.unified_diff
        );

        let restore = RestoreDocumentRequest {
            scope: team(way),
            path: path.into(),
            version: 1,
            request_id: String::new(),
        };
        let restored = client
            .restore_document(restore.clone())
            .await
            .unwrap()
            .into_inner()
            .document
            .unwrap();
        assert_eq!(
            (restored.version, restored.content.as_str()),
            (3, "one\ntwo\nthree\n"),
            "{way}"
        );
        let delete = DeleteDocumentRequest {
            scope: team(way),
            path: path.into(),
            ..Default::default()
        };
        client.delete_document(delete).await.unwrap();
        let get = |version: i64| GetDocumentRequest {
            scope: team(way),
            path: path.into(),
            version,
            ..Default::default()
        };
        assert_eq!(
            client.get_document(get(0)).await.unwrap_err().code(),
            Code::NotFound,
            "{way}"
        );
        let old = client
            .get_document(get(2))
            .await
            .unwrap()
            .into_inner()
            .document
            .unwrap();
        assert_eq!(old.content, "one\n2\nthree\nfour\n", "{way}");
        let versions = ListDocumentVersionsRequest {
            scope: team(way),
            path: path.into(),
            page_size: 3,
            page_token: String::new(),
            ..Default::default()
        };
        let page = client
            .list_document_versions(versions.clone())
            .await
            .unwrap()
            .into_inner();
        let rest = ListDocumentVersionsRequest {
            page_token: page.next_page_token,
            ..versions
        };
        let rest = client.list_document_versions(rest).await.unwrap().into_inner();
        let numbers: Vec<i64> = page
            .documents
            .iter()
            .chain(&rest.documents)
            .map(|one| one.version)
            .collect();
        assert_eq!(numbers, [4, 3, 2, 1], "{way}");
        assert!(rest.next_page_token.is_empty(), "{way}");
        let restored = client
            .restore_document(restore)
            .await
            .unwrap()
            .into_inner()
            .document
            .unwrap();
        assert_eq!((restored.version, restored.deleted_at), (5, None), "{way}");

        // Listed by path, below a prefix, over pages.
        for path in ["runbooks/a.md", "runbooks-old/a.md", "notes.md", "runbooks/z/deep.md"] {
            client.put_document(put(way, path, "text")).await.unwrap();
        }
        let mut list = ListDocumentsRequest {
            scope: team(way),
            path_prefix: "runbooks/".into(),
            page_size: 2,
            ..Default::default()
        };
        let mut paths = Vec::new();
        loop {
            let page = client.list_documents(list.clone()).await.unwrap().into_inner();
            paths.extend(page.documents.into_iter().map(|one| (one.path, one.content)));
            list.page_token = page.next_page_token;
            if list.page_token.is_empty() {
                break;
            }
        }
        let wanted = ["runbooks/a.md", "runbooks/failover.md", "runbooks/z/deep.md"];
        assert_eq!(paths, wanted.map(|path| (path.to_owned(), String::new())), "{way}");

        // And whoever watches documents is told, in order.
        let mut told = Vec::new();
        while told.len() < 5 {
            let event = tokio::time::timeout(Duration::from_secs(10), events.message()).await;
            let event = event.expect("an event comes").unwrap().unwrap();
            told.extend(event.document.as_ref().map(|document| (event.kind(), document.version)));
        }
        let wanted = [
            (ChangeKind::Added, 1),
            (ChangeKind::Updated, 2),
            (ChangeKind::Updated, 3),
            (ChangeKind::Deleted, 4),
            (ChangeKind::Updated, 5),
        ];
        assert_eq!(told, wanted, "{way}");
        for path in ["", "/a", "a//b", "../a", "a/"] {
            let status = client.put_document(put(way, path, "x")).await.unwrap_err();
            assert_eq!(refusal(&status).1, ["document.path"], "{way}: {path}");
        }
    }
    sandbox.stop().await;
}
