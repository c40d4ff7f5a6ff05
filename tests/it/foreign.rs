//! Every RPC with every kind of token that is not the right one.

use aeterna_auth::{Claims, Role, mint};
use aeterna_proto::memory::v1::batch_delete_result::Result as Deleted;
use aeterna_proto::memory::v1::knowledge_service_client::KnowledgeServiceClient;
use aeterna_proto::memory::v1::memory_service_client::MemoryServiceClient;
use aeterna_proto::memory::v1::policy_service_client::PolicyServiceClient;
use aeterna_proto::memory::v1::{
    BatchDeleteRequest, BatchDeleteResult, DeleteDocumentRequest, DeletePolicyRequest, DeleteRequest, Document,
    ExportRequest, ExportedMemory, GetDocumentRequest, GetRequest, ImportRequest, Memory, Policy, PutDocumentRequest,
    PutPolicyRequest, UpdateRequest, WatchRequest,
};
use aeterna_rpc::AnyChannel;
use aeterna_testkit::{NEVER, RawClient, SECRET, bearing, claims, refusal, token};
use prost::Message as _;
use prost_reflect::DynamicMessage;
use prost_types::FieldMask;
use serde_json::json;
use tonic::{Code, Request, Status};

use crate::hostile::{methods, requests};
use crate::notes::{item, user};
use crate::sandbox::Sandbox;

const MARK: &str = "launch-code-4711";

fn carries(bytes: &[u8]) -> bool {
    bytes.windows(MARK.len()).any(|part| part == MARK.as_bytes())
}

/// Everything that Export tells of Ann's.
async fn export(client: &mut MemoryServiceClient<AnyChannel>, token: &str) -> Result<Vec<u8>, Status> {
    let request = ExportRequest {
        scope: user("ann"),
        include_history: true,
        ..Default::default()
    };
    let mut chunks = client.export(bearing(request, token)).await?.into_inner();
    let mut all = Vec::new();
    while let Some(chunk) = chunks.message().await? {
        all.extend(chunk.encode_to_vec());
    }
    Ok(all)
}

/// A memory of Ann's that is none.
async fn plant(client: &mut MemoryServiceClient<AnyChannel>, token: &str) -> Result<i64, Status> {
    let memory = Memory {
        scope: user("ann"),
        content: "planted".into(),
        ..Default::default()
    };
    let import = ImportRequest {
        import_id: "planting".into(),
        memories: vec![ExportedMemory {
            memory: Some(memory),
            ..Default::default()
        }],
        summary: None,
    };
    let told = client.import(bearing(tokio_stream::iter([import]), token)).await?;
    Ok(told.into_inner().created)
}

/// Watch and Export tell nobody else of Ann's memories, and Import takes none for hers.
async fn streams_tell_nothing(client: &mut MemoryServiceClient<AnyChannel>, who: &str, stranger: &str) {
    let watch = WatchRequest {
        scope: user("ann"),
        resume_token: "1.0".into(),
        documents: true,
        ..Default::default()
    };
    if who.contains("user") {
        let planted = plant(client, stranger).await;
        assert!(planted.is_err() || planted.is_ok_and(|created| created == 0), "{who}");
        let [watched, exported] = [
            client.watch(bearing(watch, stranger)).await.map(drop),
            export(client, stranger).await.map(drop),
        ];
        for status in [watched.unwrap_err(), exported.unwrap_err()] {
            assert_eq!(refusal(&status).0, "SCOPE_DENIED", "{who}: {status:?}");
        }
        return;
    }
    // Another tenant has an Ann of its own.
    plant(client, stranger).await.unwrap();
    assert!(!carries(&export(client, stranger).await.unwrap()), "{who}");
    let mut told = client.watch(bearing(watch, stranger)).await.unwrap().into_inner();
    // All that there is of his own before comes first.
    loop {
        let event = told.message().await.unwrap().unwrap();
        assert!(!carries(&event.encode_to_vec()), "{who}");
        if event.memory.is_some_and(|memory| memory.content == "planted") {
            break;
        }
    }
}

#[tokio::test]
async fn no_rpc_is_answered_to_a_token_that_is_none() {
    let sandbox = Sandbox::start(&[
        ("auth.hs256_secret", SECRET),
        ("auth.issuer", "https://id.example"),
        ("auth.audience", "aeterna"),
    ])
    .await;
    let signed = |secret: &str, change: &dyn Fn(&mut Claims)| {
        let mut claims = claims("acme", Role::Admin, &[], NEVER);
        (claims.iss, claims.aud) = (Some("https://id.example".into()), Some("aeterna".into()));
        change(&mut claims);
        mint(secret, &claims).unwrap()
    };
    let good = signed(SECRET, &|_| ());
    let changed = |change: &dyn Fn(&mut Claims)| format!("Bearer {}", signed(SECRET, change));
    let parts: Vec<&str> = good.split('.').collect();
    let cut = &parts[2][..parts[2].len() - 2];
    // What a thief, a tinkerer and a latecomer would send.
    let tokens = [
        ("nothing", String::new()),
        ("garbage", "Bearer not-a-token".into()),
        ("another scheme", format!("Basic {good}")),
        ("an expired token", changed(&|claims| claims.exp = 1)),
        ("a token of tomorrow", changed(&|claims| claims.nbf = Some(NEVER - 1))),
        (
            "another's key",
            format!("Bearer {}", signed(&SECRET.replace('a', "b"), &|_| ())),
        ),
        (
            "another issuer",
            changed(&|claims| claims.iss = Some("https://id.example.evil".into())),
        ),
        ("no issuer", changed(&|claims| claims.iss = None)),
        (
            "a token for another service",
            changed(&|claims| claims.aud = Some("billing".into())),
        ),
        ("a token for nobody", changed(&|claims| claims.aud = None)),
        ("no tenant", changed(&|claims| claims.tenant = String::new())),
        (
            "a signature that was cut",
            format!("Bearer {}.{}.{cut}", parts[0], parts[1]),
        ),
        ("no signature", format!("Bearer {}.{}.", parts[0], parts[1])),
        // {"alg":"none","typ":"JWT"}
        (
            "the algorithm none",
            format!("Bearer eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.{}.", parts[1]),
        ),
        (
            "another's claims",
            format!("Bearer {}.eyJzdWIiOiJhIiwidGVuYW50IjoiZXZpbCJ9.{}", parts[0], parts[2]),
        ),
    ];
    let mut tried = 0;
    for (way, channel) in sandbox.ways() {
        let raw = RawClient::new(channel);
        let stats = raw.call("/aeterna.memory.v1.MemoryService/Stats", bearing(Vec::new(), &good));
        stats.await.unwrap();
        for service in aeterna::json::POOL.services() {
            if !["aeterna.memory.v1", "aeterna.embedding.v1"].contains(&service.parent_file().package_name()) {
                continue;
            }
            for method in service.methods() {
                let path = format!("/{}/{}", service.full_name(), method.name());
                for (what, token) in &tokens {
                    let mut request = Request::new(Vec::new());
                    if !token.is_empty() {
                        request.metadata_mut().insert("authorization", token.parse().unwrap());
                    }
                    let answered = raw.call(&path, request).await;
                    let status = answered.expect_err(&format!("{way}: {path} was answered to {what}"));
                    assert_eq!(
                        status.code(),
                        Code::Unauthenticated,
                        "{way}: {path}: {what}: {status:?}"
                    );
                    tried += 1;
                }
            }
        }
    }
    assert!(tried > 800, "{tried}");
    sandbox.stop().await;
}

#[tokio::test]
async fn no_rpc_tells_another_tenant_or_scope_anything() {
    let sandbox = Sandbox::start(&[("auth.hs256_secret", SECRET)]).await;
    for (way, channel) in sandbox.ways() {
        let ours = format!("acme-{way}");
        let admin = token(&ours, Role::Admin, &[], NEVER);
        let mut memories = MemoryServiceClient::new(channel.clone());
        let mut documents = KnowledgeServiceClient::new(channel.clone());
        let mut policies = PolicyServiceClient::new(channel.clone());
        let add = item("ann", &format!("one {MARK}"));
        let added = memories
            .add(bearing(add, &admin))
            .await
            .unwrap()
            .into_inner()
            .memory
            .unwrap();
        let put = PutDocumentRequest {
            document: Some(Document {
                scope: user("ann"),
                path: "notes/a.md".into(),
                content: MARK.into(),
                title: MARK.into(),
                ..Default::default()
            }),
            request_id: String::new(),
        };
        documents.put_document(bearing(put, &admin)).await.unwrap();
        let policy = PutPolicyRequest {
            policy: Some(Policy {
                name: "a-policy".into(),
                scope: user("ann"),
                description: MARK.into(),
                ..Default::default()
            }),
            request_id: String::new(),
        };
        policies.put_policy(bearing(policy, &admin)).await.unwrap();

        let raw = RawClient::new(channel);
        let requests = requests(&added.id);
        // The owner does see it: what follows can fail.
        let mut seen = 0;
        for (path, base) in methods(&requests) {
            if path.contains("Put") || path.contains("Update") || path.contains("Delete") || path.contains("Restore") {
                continue;
            }
            let answer = raw.call(&path, bearing(base.encode_to_vec(), &admin)).await;
            seen += usize::from(answer.is_ok_and(|bytes| carries(&bytes)));
        }
        assert!(seen >= 6, "{way}: {seen}");
        let strangers = [
            (
                "another tenant's admin",
                token(&format!("evil-{way}"), Role::Admin, &[], NEVER),
            ),
            (
                "another tenant's writer",
                token(&format!("evil-{way}"), Role::Writer, &[("user", "ann")], NEVER),
            ),
            ("another user", token(&ours, Role::Writer, &[("user", "bob")], NEVER)),
            (
                "another user who reads",
                token(&ours, Role::Reader, &[("user", "bob")], NEVER),
            ),
        ];
        for (who, stranger) in &strangers {
            for (path, base) in methods(&requests) {
                // Rules are read by everybody in the tenant: they say what holds.
                if path.contains("Polic") && who.contains("user") {
                    continue;
                }
                match raw.call(&path, bearing(base.encode_to_vec(), stranger)).await {
                    Ok(bytes) => assert!(!carries(&bytes), "{way}: {path} tells {who}"),
                    Err(status) => {
                        assert!(
                            !status.message().contains(MARK),
                            "{way}: {path} tells {who}: {status:?}"
                        );
                        let codes = [Code::NotFound, Code::PermissionDenied, Code::FailedPrecondition];
                        assert!(codes.contains(&status.code()), "{way}: {path}: {who}: {status:?}");
                    }
                }
            }
            streams_tell_nothing(&mut memories, who, stranger).await;
            // Ann's memory itself is neither changed nor taken away, and that it is there is told to nobody.
            let delete = DeleteRequest {
                id: added.id.clone(),
                purge: true,
                ..Default::default()
            };
            let status = memories.delete(bearing(delete.clone(), stranger)).await.unwrap_err();
            assert!(
                [Code::NotFound, Code::PermissionDenied].contains(&status.code()),
                "{way}: {who}: {status:?}"
            );
            let many = BatchDeleteRequest { requests: vec![delete] };
            if let Ok(answer) = memories.batch_delete(bearing(many, stranger)).await {
                let results = answer.into_inner().results;
                let refused = |result: &BatchDeleteResult| matches!(result.result, Some(Deleted::Error(_)));
                assert!(
                    results.len() == 1 && results.iter().all(refused),
                    "{way}: {who}: {results:?}"
                );
            }
            let update = UpdateRequest::decode(requests["Update"].as_slice()).unwrap();
            let status = memories.update(bearing(update, stranger)).await.unwrap_err();
            assert!(
                [Code::NotFound, Code::PermissionDenied].contains(&status.code()),
                "{way}: {who}: {status:?}"
            );
            let gone = DeleteDocumentRequest {
                scope: user("ann"),
                path: "notes/a.md".into(),
                ..Default::default()
            };
            let status = documents.delete_document(bearing(gone, stranger)).await;
            // Another tenant has a place of the same name, and may have written there above.
            assert!(
                status.is_err() || who.contains("tenant"),
                "{way}: {who} deletes a document"
            );
            let gone = DeletePolicyRequest {
                name: "a-policy".into(),
                ..Default::default()
            };
            let status = policies.delete_policy(bearing(gone, stranger)).await;
            assert!(
                status.is_err() || who.contains("tenant"),
                "{way}: {who} deletes a policy"
            );
        }
        // All is as it was.
        let get = GetRequest {
            id: added.id.clone(),
            ..Default::default()
        };
        let kept = memories.get(bearing(get, &admin)).await.unwrap().into_inner().memory;
        assert_eq!(kept.as_ref(), Some(&added), "{way}");
        let told = export(&mut memories, &admin).await.unwrap();
        assert!(
            carries(&told) && !told.windows(7).any(|part| part == b"planted"),
            "{way}"
        );
        let get = GetDocumentRequest {
            scope: user("ann"),
            path: "notes/a.md".into(),
            ..Default::default()
        };
        let kept = documents
            .get_document(bearing(get, &admin))
            .await
            .unwrap()
            .into_inner()
            .document
            .unwrap();
        assert_eq!((kept.content.as_str(), kept.version), (MARK, 1), "{way}");
        let status = raw.call(
            "/aeterna.memory.v1.PolicyService/GetPolicy",
            bearing(requests["GetPolicy"].clone(), &admin),
        );
        assert!(carries(&status.await.unwrap()), "{way}");
        let bound = token(&ours, Role::Admin, &[("user", "bob")], NEVER);
        let everywhere = PutPolicyRequest {
            policy: Some(Policy {
                name: "mine-for-all".into(),
                ..Default::default()
            }),
            request_id: String::new(),
        };
        let status = policies.put_policy(bearing(everywhere, &bound)).await.unwrap_err();
        assert_eq!(
            refusal(&status).0,
            "SCOPE_DENIED",
            "{way}: a bound admin makes no rules for others"
        );
    }
    sandbox.stop().await;
}

#[tokio::test]
async fn a_page_of_one_tenants_is_no_page_of_anothers() {
    let sandbox = Sandbox::start(&[("auth.hs256_secret", SECRET)]).await;
    for (way, channel) in sandbox.ways() {
        let mut memories = MemoryServiceClient::new(channel.clone());
        let mut documents = KnowledgeServiceClient::new(channel.clone());
        let mut policies = PolicyServiceClient::new(channel.clone());
        let tenant = |name: &str| token(&format!("{name}-{way}"), Role::Admin, &[], NEVER);
        let (ours, theirs) = (tenant("ours"), tenant("theirs"));
        // Both have the same, and more than a page of it.
        let mut id = String::new();
        for who in [&ours, &theirs] {
            for number in 1..=3 {
                let add = item("ann", &format!("note {number}"));
                let added = memories.add(bearing(add, who)).await.unwrap().into_inner();
                let mut memory = added.memory.unwrap();
                (memory.content, memory.etag) = (format!("note {number}, changed"), String::new());
                if who == &ours {
                    id.clone_from(&memory.id);
                }
                let update = UpdateRequest {
                    memory: Some(memory),
                    update_mask: Some(FieldMask {
                        paths: vec!["content".into()],
                    }),
                    ..Default::default()
                };
                memories.update(bearing(update, who)).await.unwrap();
                let put = |path: String, content: String| PutDocumentRequest {
                    document: Some(Document {
                        scope: user("ann"),
                        path,
                        content,
                        ..Default::default()
                    }),
                    ..Default::default()
                };
                for put in [
                    put("same.md".into(), format!("version {number}")),
                    put(format!("{number}.md"), "a document".into()),
                ] {
                    documents.put_document(bearing(put, who)).await.unwrap();
                }
                let put = PutPolicyRequest {
                    policy: Some(Policy {
                        name: format!("policy-{number}"),
                        ..Default::default()
                    }),
                    ..Default::default()
                };
                policies.put_policy(bearing(put, who)).await.unwrap();
            }
        }
        // Each list of ours, one item a page; the fields of all answers and requests have the same names.
        let raw = RawClient::new(channel);
        let ask = async |method: &str, request: &serde_json::Value, who: &str| -> Result<serde_json::Value, Status> {
            let (service, name) = method.split_once('/').unwrap();
            let service = aeterna::json::POOL.get_service_by_name(service).unwrap();
            let method_of = service.methods().find(|method| method.name() == name).unwrap();
            let bytes = DynamicMessage::deserialize(method_of.input(), request)
                .unwrap()
                .encode_to_vec();
            let answer = raw.call(&format!("/{method}"), bearing(bytes, who)).await?;
            let answer = DynamicMessage::decode(method_of.output(), answer).unwrap();
            Ok(serde_json::to_value(answer).unwrap())
        };
        let ann = json!({"user": "ann"});
        for (method, mut request) in [
            ("aeterna.memory.v1.MemoryService/List", json!({"scope": ann})),
            ("aeterna.memory.v1.MemoryService/History", json!({"id": id})),
            (
                "aeterna.memory.v1.KnowledgeService/ListDocuments",
                json!({"scope": ann}),
            ),
            (
                "aeterna.memory.v1.KnowledgeService/ListDocumentVersions",
                json!({"scope": ann, "path": "same.md"}),
            ),
            ("aeterna.memory.v1.PolicyService/ListPolicies", json!({})),
        ] {
            request["pageSize"] = 1.into();
            let first = ask(method, &request, &ours).await.unwrap();
            request["pageToken"] = first["nextPageToken"].clone();
            assert!(request["pageToken"].is_string(), "{way}: {method}: {first}");
            ask(method, &request, &ours).await.unwrap();
            let status = ask(method, &request, &theirs).await.unwrap_err();
            assert_eq!(refusal(&status).0, "INVALID_PAGE_TOKEN", "{way}: {method}: {status:?}");
        }
    }
    sandbox.stop().await;
}
