//! What another tenant, or another scope of the same tenant, must never get: data.

use aeterna_auth::Role;
use aeterna_proto::common::v1::Scope;
use aeterna_proto::memory::v1::batch_delete_result::Result as Deleted;
use aeterna_proto::memory::v1::knowledge_service_client::KnowledgeServiceClient;
use aeterna_proto::memory::v1::memory_service_client::MemoryServiceClient;
use aeterna_proto::memory::v1::{
    AddRequest, BatchAddRequest, BatchDeleteRequest, DeleteRequest, Document, GetDocumentRequest, GetRequest,
    HistoryRequest, ListRequest, Memory, PutDocumentRequest, SearchRequest, StatsRequest, UpdateRequest,
};
use aeterna_rpc::AnyChannel;
use aeterna_testkit::{NEVER, SECRET, bearing, refusal};
use tonic::{Code, Request};

use crate::sandbox::Sandbox;

/// A caller with a token.
struct Caller {
    client: MemoryServiceClient<AnyChannel>,
    token: String,
}

impl Caller {
    fn new(channel: &AnyChannel, tenant: &str, role: Role, within: &[(&str, &str)]) -> Self {
        Self {
            client: MemoryServiceClient::new(channel.clone()),
            token: aeterna_testkit::token(tenant, role, within, NEVER),
        }
    }

    fn bearing<T>(&self, message: T) -> Request<T> {
        bearing(message, &self.token)
    }

    async fn add(&mut self, scope: Scope, content: &str, request_id: &str) -> Result<Memory, tonic::Status> {
        let request = AddRequest {
            memory: Some(Memory {
                scope: Some(scope),
                content: content.into(),
                ..Default::default()
            }),
            request_id: request_id.into(),
        };
        let request = self.bearing(request);
        Ok(self.client.add(request).await?.into_inner().memory.unwrap())
    }

    async fn search(&mut self, scope: Option<Scope>, query: &str, exclude: Vec<String>) -> Vec<Memory> {
        let request = self.bearing(SearchRequest {
            scope,
            query: query.into(),
            exclude_ids: exclude,
            ..Default::default()
        });
        let found = self.client.search(request).await.unwrap().into_inner();
        found.results.into_iter().map(|result| result.memory.unwrap()).collect()
    }
}

fn user(name: &str) -> Scope {
    Scope {
        user: name.into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn another_tenant_gets_nothing_whatever_it_knows() {
    let sandbox = Sandbox::start(&[("auth.hs256_secret", SECRET)]).await;
    for (way, channel) in sandbox.ways() {
        let (ours, theirs) = (format!("acme-{way}"), format!("evil-{way}"));
        let mut acme = Caller::new(&channel, &ours, Role::Writer, &[]);
        let mut evil = Caller::new(&channel, &theirs, Role::Admin, &[]);
        let secret = acme.add(user("ann"), "the launch code is 4711", "r-1").await.unwrap();
        acme.add(user("ann"), "the launch is in May", "r-2").await.unwrap();

        // By id.
        let get = GetRequest {
            id: secret.id.clone(),
            show_deleted: true,
            ..Default::default()
        };
        let status = evil.client.get(evil.bearing(get)).await.unwrap_err();
        assert_eq!(
            (status.code(), refusal(&status).0.as_str()),
            (Code::NotFound, "NOT_FOUND"),
            "{way}"
        );
        // By id and etag, for writing.
        let update = UpdateRequest {
            memory: Some(Memory {
                id: secret.id.clone(),
                etag: secret.etag.clone(),
                content: "owned".into(),
                ..Default::default()
            }),
            update_mask: Some(prost_types::FieldMask {
                paths: vec!["content".into()],
            }),
            request_id: String::new(),
        };
        assert_eq!(
            evil.client.update(evil.bearing(update)).await.unwrap_err().code(),
            Code::NotFound,
            "{way}"
        );
        let batch = BatchDeleteRequest {
            requests: vec![DeleteRequest {
                id: secret.id.clone(),
                ..Default::default()
            }],
        };
        let deleted = evil
            .client
            .batch_delete(evil.bearing(batch))
            .await
            .unwrap()
            .into_inner();
        assert!(
            matches!(deleted.results[0].result, Some(Deleted::Error(_))),
            "{way}: {deleted:?}"
        );
        let get = GetRequest {
            id: secret.id.clone(),
            ..Default::default()
        };
        let kept = acme.client.get(acme.bearing(get)).await.unwrap().into_inner();
        assert_eq!(kept.memory, Some(secret.clone()), "{way}: nothing of it has changed");
        let delete = DeleteRequest {
            id: secret.id.clone(),
            etag: secret.etag.clone(),
            ..Default::default()
        };
        assert_eq!(
            evil.client.delete(evil.bearing(delete)).await.unwrap_err().code(),
            Code::NotFound,
            "{way}"
        );
        let purge = DeleteRequest {
            id: secret.id.clone(),
            purge: true,
            ..Default::default()
        };
        let status = evil.client.delete(evil.bearing(purge.clone())).await.unwrap_err();
        assert_eq!(status.code(), Code::NotFound, "{way}");
        // Removing for good is an admin's, within the own tenant, too.
        let status = acme.client.delete(acme.bearing(purge)).await.unwrap_err();
        assert_eq!(refusal(&status).0, "PERMISSION_DENIED", "{way}");
        let history = HistoryRequest {
            id: secret.id.clone(),
            ..Default::default()
        };
        let status = evil.client.history(evil.bearing(history)).await.unwrap_err();
        assert_eq!(status.code(), Code::NotFound, "{way}");
        let stats = StatsRequest {
            scope: Some(user("ann")),
            ..Default::default()
        };
        let counted = evil.client.stats(evil.bearing(stats)).await.unwrap().into_inner();
        assert!(counted.layers.is_empty(), "{way}: {counted:?}");
        // By scope: the same names are other places.
        assert!(
            evil.search(Some(user("ann")), "launch code", Vec::new())
                .await
                .is_empty(),
            "{way}"
        );
        assert!(
            evil.search(None, "launch code", vec![secret.id.clone()])
                .await
                .is_empty(),
            "{way}"
        );
        let list = ListRequest {
            scope: Some(user("ann")),
            show_deleted: true,
            ..Default::default()
        };
        assert!(
            evil.client
                .list(evil.bearing(list))
                .await
                .unwrap()
                .into_inner()
                .memories
                .is_empty(),
            "{way}"
        );
        // By request id: it names another write, not ours.
        let own = evil.add(user("ann"), "the launch code is 4711", "r-1").await.unwrap();
        assert_ne!(own.id, secret.id, "{way}: duplicates are merged within a tenant only");
        // By page token.
        let first = ListRequest {
            page_size: 1,
            ..Default::default()
        };
        let page = acme
            .client
            .list(acme.bearing(first.clone()))
            .await
            .unwrap()
            .into_inner();
        let stolen = ListRequest {
            page_token: page.next_page_token,
            ..first
        };
        let status = evil.client.list(evil.bearing(stolen)).await.unwrap_err();
        assert_eq!(refusal(&status).0, "INVALID_PAGE_TOKEN", "{way}");
        // And ours is as it was.
        let get = GetRequest {
            id: secret.id.clone(),
            ..Default::default()
        };
        let kept = acme
            .client
            .get(acme.bearing(get))
            .await
            .unwrap()
            .into_inner()
            .memory
            .unwrap();
        assert_eq!(kept, secret, "{way}");
    }
    sandbox.stop().await;
}

#[tokio::test]
async fn a_token_bound_to_a_scope_does_not_leave_it() {
    let sandbox = Sandbox::start(&[("auth.hs256_secret", SECRET)]).await;
    for (way, channel) in sandbox.ways() {
        let tenant = format!("acme-{way}");
        let mut admin = Caller::new(&channel, &tenant, Role::Admin, &[]);
        let mut bob = Caller::new(&channel, &tenant, Role::Writer, &[("user", "bob")]);
        let ann = admin.add(user("ann"), "ann likes tea", "").await.unwrap();
        let team = Scope {
            team: "core".into(),
            ..Default::default()
        };
        admin
            .add(team.clone(), "the core team drinks tea at four", "")
            .await
            .unwrap();
        bob.add(user("bob"), "bob likes coffee and tea", "").await.unwrap();

        let seen = bob.search(None, "tea", Vec::new()).await;
        assert!(seen.iter().all(|memory| memory.id != ann.id), "{way}: {seen:?}");
        assert_eq!(seen.len(), 2, "{way}: his own and the team's");
        let status = bob.add(user("ann"), "bob was here", "").await.unwrap_err();
        assert_eq!(refusal(&status).0, "SCOPE_DENIED", "{way}");
        let status = bob
            .client
            .search(bob.bearing(SearchRequest {
                scope: Some(user("ann")),
                query: "tea".into(),
                ..Default::default()
            }))
            .await
            .unwrap_err();
        assert_eq!(refusal(&status).0, "SCOPE_DENIED", "{way}");
        let get = GetRequest {
            id: ann.id.clone(),
            ..Default::default()
        };
        assert_eq!(
            bob.client.get(bob.bearing(get)).await.unwrap_err().code(),
            Code::NotFound,
            "{way}"
        );
        // What he sees of others he can't change, whatever he knows of it.
        let policy = admin.add(team.clone(), "tea breaks are paid", "").await.unwrap();
        let update = UpdateRequest {
            memory: Some(Memory {
                id: policy.id.clone(),
                content: "tea breaks are not paid".into(),
                ..Default::default()
            }),
            update_mask: Some(prost_types::FieldMask {
                paths: vec!["content".into()],
            }),
            request_id: String::new(),
        };
        let status = bob.client.update(bob.bearing(update)).await.unwrap_err();
        assert_eq!(refusal(&status).0, "SCOPE_DENIED", "{way}");
        let delete = DeleteRequest {
            id: policy.id.clone(),
            ..Default::default()
        };
        let status = bob.client.delete(bob.bearing(delete)).await.unwrap_err();
        assert_eq!(refusal(&status).0, "SCOPE_DENIED", "{way}");
        let get = GetRequest {
            id: policy.id.clone(),
            ..Default::default()
        };
        let kept = bob
            .client
            .get(bob.bearing(get))
            .await
            .unwrap()
            .into_inner()
            .memory
            .unwrap();
        assert_eq!(kept, policy, "{way}");
        // What he writes to the team's layer lands within his own bounds.
        let written = bob.add(team, "bob's note for the team", "").await.unwrap();
        assert_eq!(written.scope.unwrap().user, "bob", "{way}");
        // A document has the place that is named.
        let mut documents = KnowledgeServiceClient::new(channel.clone());
        let document = |scope: Scope| PutDocumentRequest {
            document: Some(Document {
                scope: Some(scope),
                path: "tea.md".into(),
                content: "at four".into(),
                ..Default::default()
            }),
            request_id: String::new(),
        };
        let team = Scope {
            team: "core".into(),
            ..Default::default()
        };
        documents
            .put_document(admin.bearing(document(team.clone())))
            .await
            .unwrap();
        let status = documents
            .put_document(bob.bearing(document(team.clone())))
            .await
            .unwrap_err();
        assert_eq!(refusal(&status).0, "SCOPE_DENIED", "{way}: {status:?}");
        documents
            .put_document(bob.bearing(document(user("bob"))))
            .await
            .unwrap();
        for scope in [team, user("bob")] {
            let get = GetDocumentRequest {
                scope: Some(scope.clone()),
                path: "tea.md".into(),
                ..Default::default()
            };
            let found = documents.get_document(bob.bearing(get)).await.unwrap().into_inner();
            assert_eq!(found.document.unwrap().scope, Some(scope), "{way}");
        }
        // A batch is refused item by item.
        let item = |name: &str| AddRequest {
            memory: Some(Memory {
                scope: Some(user(name)),
                content: format!("a note of {name}"),
                ..Default::default()
            }),
            request_id: String::new(),
        };
        let batch = BatchAddRequest {
            requests: vec![item("ann"), item("bob")],
            ..Default::default()
        };
        let results = bob
            .client
            .batch_add(bob.bearing(batch))
            .await
            .unwrap()
            .into_inner()
            .results;
        use aeterna_proto::memory::v1::batch_add_result::Result as Item;
        assert!(
            matches!(&results[0].result, Some(Item::Error(error)) if error.reason().as_str_name().ends_with("SCOPE_DENIED"))
        );
        assert!(matches!(&results[1].result, Some(Item::Added(_))), "{way}");
        // And a reader writes nothing.
        let mut reader = Caller::new(&channel, &tenant, Role::Reader, &[]);
        let status = reader.add(user("bob"), "no", "").await.unwrap_err();
        assert_eq!(refusal(&status).0, "PERMISSION_DENIED", "{way}");
    }
    sandbox.stop().await;
}
