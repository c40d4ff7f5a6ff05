//! Every field of every served RPC with hostile values: nothing panics, every refusal names the field, and the server
//! goes on.

use std::collections::BTreeMap;

use aeterna_proto::common::v1::Scope;
use aeterna_proto::embedding::v1 as embedding;
use aeterna_proto::errors::v1::FieldViolation;
use aeterna_proto::memory::v1 as memory;
use aeterna_testkit::{Mutation, RawClient, mutations, refusal};
use prost::Message;
use prost_reflect::{DynamicMessage, MethodDescriptor};
use tonic::{Code, Request, Status};

use crate::sandbox::Sandbox;

/// A valid request of each unary RPC that is served, as its contract's message.
pub fn requests(id: &str) -> BTreeMap<&'static str, Vec<u8>> {
    let scope = Some(Scope {
        user: "ann".into(),
        ..Default::default()
    });
    let item = |content: &str| memory::AddRequest {
        memory: Some(memory::Memory {
            scope: scope.clone(),
            content: content.into(),
            ..Default::default()
        }),
        request_id: String::new(),
    };
    let update = memory::UpdateRequest {
        memory: Some(memory::Memory {
            id: id.into(),
            content: "changed".into(),
            tags: vec!["t".into()],
            ..Default::default()
        }),
        update_mask: Some(prost_types::FieldMask {
            paths: vec!["content".into(), "tags".into()],
        }),
        request_id: String::new(),
    };
    let memory_service = [
        ("Add", item("one").encode_to_vec()),
        (
            "BatchAdd",
            memory::BatchAddRequest {
                requests: vec![item("two"), item("three")],
                ..Default::default()
            }
            .encode_to_vec(),
        ),
        (
            "Get",
            memory::GetRequest {
                id: id.into(),
                ..Default::default()
            }
            .encode_to_vec(),
        ),
        ("Update", update.encode_to_vec()),
        (
            "Delete",
            memory::DeleteRequest {
                // Nothing that is there, or the others would find it gone.
                id: "01890000-0000-7000-8000-000000000000".into(),
                ..Default::default()
            }
            .encode_to_vec(),
        ),
        (
            "BatchDelete",
            memory::BatchDeleteRequest {
                requests: vec![
                    memory::DeleteRequest {
                        id: "01890000-0000-7000-8000-000000000000".into(),
                        ..Default::default()
                    };
                    2
                ],
            }
            .encode_to_vec(),
        ),
        (
            "History",
            memory::HistoryRequest {
                id: id.into(),
                ..Default::default()
            }
            .encode_to_vec(),
        ),
        (
            "Stats",
            memory::StatsRequest {
                scope: scope.clone(),
                ..Default::default()
            }
            .encode_to_vec(),
        ),
        (
            "List",
            memory::ListRequest {
                scope: scope.clone(),
                ..Default::default()
            }
            .encode_to_vec(),
        ),
        (
            "Search",
            memory::SearchRequest {
                scope: scope.clone(),
                query: "one".into(),
                ..Default::default()
            }
            .encode_to_vec(),
        ),
    ];
    let (text, place) = ("a text".to_string(), scope);
    let embedding_service = [
        (
            "Embed",
            embedding::EmbedRequest {
                text: text.clone(),
                ..Default::default()
            }
            .encode_to_vec(),
        ),
        (
            "BatchEmbed",
            embedding::BatchEmbedRequest {
                texts: vec![text.clone(), text],
                ..Default::default()
            }
            .encode_to_vec(),
        ),
        (
            "Rerank",
            embedding::RerankRequest {
                query: "a query".into(),
                texts: vec!["a text".into()],
            }
            .encode_to_vec(),
        ),
        ("ListModels", Vec::new()),
        ("SelectDimension", Vec::new()),
    ];
    let all = memory_service.into_iter().chain(embedding_service);
    all.chain(knowledge(&place)).chain(policies(&place)).collect()
}

fn knowledge(scope: &Option<Scope>) -> [(&'static str, Vec<u8>); 7] {
    let (scope, path) = (scope.clone(), String::from("notes/a.md"));
    let put = memory::PutDocumentRequest {
        document: Some(memory::Document {
            scope: scope.clone(),
            path: path.clone(),
            content: "text".into(),
            ..Default::default()
        }),
        request_id: String::new(),
    };
    let get = memory::GetDocumentRequest {
        scope: scope.clone(),
        path: path.clone(),
        ..Default::default()
    };
    let list = memory::ListDocumentsRequest {
        scope: scope.clone(),
        ..Default::default()
    };
    let versions = memory::ListDocumentVersionsRequest {
        scope: scope.clone(),
        path: path.clone(),
        ..Default::default()
    };
    let diff = memory::DiffDocumentRequest {
        scope: scope.clone(),
        path: path.clone(),
        from_version: 1,
        to_version: 0,
        ..Default::default()
    };
    let delete = memory::DeleteDocumentRequest {
        scope: scope.clone(),
        // Nothing that is there, or the others would find it gone.
        path: "notes/none.md".into(),
        ..Default::default()
    };
    let restore = memory::RestoreDocumentRequest {
        scope,
        path,
        version: 1,
        request_id: String::new(),
    };
    [
        ("PutDocument", put.encode_to_vec()),
        ("GetDocument", get.encode_to_vec()),
        ("ListDocuments", list.encode_to_vec()),
        ("ListDocumentVersions", versions.encode_to_vec()),
        ("DiffDocument", diff.encode_to_vec()),
        ("RestoreDocument", restore.encode_to_vec()),
        ("DeleteDocument", delete.encode_to_vec()),
    ]
}

fn policies(scope: &Option<Scope>) -> [(&'static str, Vec<u8>); 5] {
    let name = String::from("a-policy");
    let put = memory::PutPolicyRequest {
        policy: Some(memory::Policy {
            name: name.clone(),
            // Where nothing else is written.
            scope: Some(Scope {
                project: "elsewhere".into(),
                ..Default::default()
            }),
            rules: Some(memory::PolicyRules {
                max_memories: Some(5),
                ..Default::default()
            }),
            ..Default::default()
        }),
        request_id: String::new(),
    };
    let effective = memory::GetEffectivePolicyRequest {
        scope: scope.clone(),
        layer: 0,
    };
    let delete = memory::DeletePolicyRequest {
        name: "none".into(),
        ..Default::default()
    };
    [
        ("PutPolicy", put.encode_to_vec()),
        ("GetPolicy", memory::GetPolicyRequest { name }.encode_to_vec()),
        ("ListPolicies", Vec::new()),
        ("GetEffectivePolicy", effective.encode_to_vec()),
        ("DeletePolicy", delete.encode_to_vec()),
    ]
}

/// The served unary methods, every one of them: path, and the request's message from the contract.
pub fn methods(requests: &BTreeMap<&str, Vec<u8>>) -> Vec<(String, DynamicMessage)> {
    let mut found = Vec::new();
    for service in aeterna::json::POOL.services() {
        if !["aeterna.memory.v1", "aeterna.embedding.v1"].contains(&service.parent_file().package_name()) {
            continue;
        }
        let unary = |method: &MethodDescriptor| !method.is_client_streaming() && !method.is_server_streaming();
        for method in service.methods().filter(unary) {
            let base = requests.get(method.name());
            let base = base.unwrap_or_else(|| panic!("{} is not tried", method.full_name()));
            let message = DynamicMessage::decode(method.input(), base.as_slice()).expect("the request is of its type");
            found.push((format!("/{}/{}", service.full_name(), method.name()), message));
        }
    }
    found
}

/// Which refusals are in order, and that those of a field name it.
fn check(path: &str, mutation: &Mutation, status: &Status) {
    let (reason, fields) = refusal(status);
    let told = format!("{path}: {} = {}: {status:?}", mutation.field, mutation.what);
    assert!(
        !matches!(
            status.code(),
            Code::Internal | Code::Unknown | Code::Unavailable | Code::DataLoss
        ),
        "{told}"
    );
    // In a batch, the item's own field is named within the item.
    let named = |field: &String| field.starts_with(&mutation.field) || mutation.field.starts_with(field.as_str());
    match reason.as_str() {
        // Of two times that contradict each other, the later one is named.
        "INVALID_FIELD" => assert!(
            fields
                .iter()
                .any(|field| named(field) || field.ends_with("invalid_at") && mutation.field.contains("valid_at")),
            "{told}: {fields:?}"
        ),
        "NOT_SERVED" => assert!(
            mutation.field.split('.').any(|name| status.message().contains(name)),
            "{told}"
        ),
        "INVALID_PAGE_TOKEN" => assert_eq!(mutation.field, "page_token", "{told}"),
        "ETAG_MISMATCH" => assert!(mutation.field.ends_with("etag"), "{told}"),
        // There is no cross-encoder here.
        "NOT_CONFIGURED" => assert!(mutation.field == "rerank" || path.ends_with("Rerank"), "{told}"),
        "MODEL_NOT_FOUND" => assert_eq!(mutation.field, "model", "{told}"),
        // What Add has stored with such a content already.
        "INVALID_STATE" => assert_eq!(mutation.field, "memory.content", "{told}"),
        "NOT_FOUND" | "REQUEST_ID_REUSED" | "MESSAGE_TOO_LARGE" => {}
        _ => panic!("{told}"),
    }
}

/// Values that no field of the served contracts may take, but for texts that are kept as they are.
fn is_always_refused(path: &str, mutation: &Mutation) -> bool {
    // Update takes only what the mask names.
    let masked = ["memory.content", "memory.tags"];
    let values = mutation.field.starts_with("memory.");
    if path.ends_with("/Update") && values && !masked.iter().any(|name| mutation.field.starts_with(name)) {
        return false;
    }
    let ignored = ["memory.scope", "memory.layer", "document.content"];
    match mutation.what.as_str() {
        "NaN" | "infinity" | "minus infinity" | "-1e308" | "1e308" => !mutation.field.contains("metadata"),
        // `sequence` is a number of 62 bits; `nanos` and `seconds` are parts of times, and checked together.
        "the largest number" | "the smallest number" => {
            !["query_length", "result_count", "latency_budget_ms", "version"]
                .iter()
                .any(|end| mutation.field.ends_with(end))
                && !is_output_only(&mutation.field)
        }
        "100,000 characters" => {
            !mutation.field.contains("metadata")
                && !is_output_only(&mutation.field)
                && !ignored.iter().any(|name| mutation.field.starts_with(name))
        }
        _ => false,
    }
}

/// Fields that a writer's value does not count for, and enums that are open.
fn is_output_only(field: &str) -> bool {
    let names = [
        "memory.id",
        "memory.layer",
        "created_at",
        "updated_at",
        "deleted_at",
        "memory.version",
        "memory.etag",
        "content_hash",
        "embedding_model",
        "updated_by",
        "document.version",
    ];
    names.iter().any(|name| field.contains(name))
}

#[tokio::test]
async fn every_field_of_every_rpc_withstands_hostile_values() {
    let sandbox = Sandbox::start(&[]).await;
    let [(_, channel), _] = sandbox.ways();
    let mut client = memory::memory_service_client::MemoryServiceClient::new(channel.clone());
    let first = requests("")["Add"].clone();
    let added = client
        .add(memory::AddRequest::decode(first.as_slice()).unwrap())
        .await
        .unwrap()
        .into_inner();
    let requests = requests(&added.memory.unwrap().id);
    let methods = methods(&requests);
    assert_eq!(
        methods.len(),
        requests.len(),
        "every request belongs to a served method"
    );

    let [(_, local), (_, loopback)] = sandbox.ways().map(|(way, channel)| (way, RawClient::new(channel)));
    let (mut tried, mut refused) = (0, 0);
    for (path, base) in methods {
        for mutation in mutations(&base) {
            tried += 1;
            let encoded = mutation.message.encode_to_vec();
            // Every second one over the network: the two must not differ.
            let raw = if tried % 2 == 0 { &local } else { &loopback };
            match raw.call(&path, Request::new(encoded)).await {
                // Item by item; each that is refused says so in its own place.
                Ok(_) if path.ends_with("BatchDelete") => {}
                Ok(answer) if path.ends_with("BatchAdd") => {
                    let answer = memory::BatchAddResponse::decode(answer).unwrap();
                    let errors = answer.results.into_iter().filter_map(|result| match result.result {
                        Some(memory::batch_add_result::Result::Error(error)) => Some(error),
                        _ => None,
                    });
                    for error in errors {
                        refused += 1;
                        let named = |v: &FieldViolation| {
                            v.field.starts_with(&mutation.field) || mutation.field.starts_with(&v.field)
                        };
                        // 1100 empty items are each refused for what they lack.
                        let names = error
                            .violations
                            .iter()
                            .any(|v| named(v) || mutation.field == "requests");
                        let reused = error.reason().as_str_name().ends_with("REQUEST_ID_REUSED");
                        assert!(names || reused, "{}: {}: {error:?}", mutation.field, mutation.what);
                    }
                }
                Ok(_) => assert!(
                    !is_always_refused(&path, &mutation),
                    "{path}: {} = {} was taken",
                    mutation.field,
                    mutation.what
                ),
                Err(status) => {
                    refused += 1;
                    check(&path, &mutation, &status);
                }
            }
        }
    }
    assert!(tried > 1000 && refused > 300, "{tried} tried, {refused} refused");
    // It goes on as if nothing had been.
    let request = memory::SearchRequest::decode(requests["Search"].as_slice()).unwrap();
    assert!(!client.search(request).await.unwrap().into_inner().results.is_empty());
    sandbox.stop().await;
}

#[tokio::test]
async fn metadata_without_end_is_refused_by_name() {
    let sandbox = Sandbox::start(&[]).await;
    let [(_, channel), _] = sandbox.ways();
    let mut client = memory::memory_service_client::MemoryServiceClient::new(channel);
    let nested = |depth: usize| {
        let mut value = prost_types::Value {
            kind: Some(prost_types::value::Kind::NumberValue(1.0)),
        };
        for _ in 0..depth {
            let fields = [("k".to_string(), value)].into();
            value = prost_types::Value {
                kind: Some(prost_types::value::Kind::StructValue(prost_types::Struct { fields })),
            };
        }
        prost_types::Struct {
            fields: [("k".to_string(), value)].into(),
        }
    };
    let wide = prost_types::Struct {
        fields: (0..5000)
            .map(|i| {
                let kind = prost_types::value::Kind::StringValue("xxxxxxxxxx".into());
                (format!("key-{i}"), prost_types::Value { kind: Some(kind) })
            })
            .collect(),
    };
    for (what, metadata) in [("deep", nested(20)), ("wide", wide)] {
        let mut request = memory::AddRequest::decode(requests("")["Add"].as_slice()).unwrap();
        request.memory.as_mut().unwrap().metadata = Some(metadata);
        let status = client.add(request).await.unwrap_err();
        assert_eq!(refusal(&status).1, ["memory.metadata"], "{what}: {status:?}");
    }
    // Deeper than protobuf decodes: still an answer.
    let mut request = memory::AddRequest::decode(requests("")["Add"].as_slice()).unwrap();
    request.memory.as_mut().unwrap().metadata = Some(nested(200));
    let status = client.add(request).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    sandbox.stop().await;
}

#[tokio::test]
async fn bytes_that_are_no_message_are_refused() {
    let sandbox = Sandbox::start(&[]).await;
    for (way, channel) in sandbox.ways() {
        let raw = RawClient::new(channel);
        for garbage in [
            vec![0xff; 64],
            vec![0x0a, 0x7f, 0x01],
            b"{\"query\": \"json\"}".to_vec(),
        ] {
            let status = raw
                .call("/aeterna.memory.v1.MemoryService/Search", Request::new(garbage))
                .await
                .unwrap_err();
            assert_eq!(status.code(), Code::InvalidArgument, "{way}: {status:?}");
        }
    }
    // The generator is what the test above stands on: it must reach nested fields.
    let add = aeterna::json::POOL
        .get_message_by_name("aeterna.memory.v1.AddRequest")
        .unwrap();
    let fields: Vec<String> = mutations(&DynamicMessage::new(add))
        .into_iter()
        .map(|m| m.field)
        .collect();
    for field in [
        "request_id",
        "memory.scope.user",
        "memory.source.sequence",
        "memory.event_at.nanos",
    ] {
        assert!(fields.iter().any(|found| found == field), "{field}");
    }
    sandbox.stop().await;
}
