//! Rules per scope that hold where memories and documents are written.

use std::time::{Duration, SystemTime};

use aeterna_auth::Role;
use aeterna_proto::common::v1::{Layer, Scope};
use aeterna_proto::errors::v1::Reason;
use aeterna_proto::memory::v1::knowledge_service_client::KnowledgeServiceClient;
use aeterna_proto::memory::v1::memory_service_client::MemoryServiceClient;
use aeterna_proto::memory::v1::policy_service_client::PolicyServiceClient;
use aeterna_proto::memory::v1::{
    AddRequest, BatchAddRequest, DeletePolicyRequest, DeleteRequest, ExportedMemory, GetEffectivePolicyRequest,
    GetRequest, ImportRequest, ListPoliciesRequest, ListRequest, Memory, Policy, PolicyRules, PutPolicyRequest,
    UpdateRequest, WriterRule, batch_add_result,
};
use aeterna_testkit::{NEVER, SECRET, bearing, refusal, token};

use crate::knowledge::{put, team};
use crate::sandbox::Sandbox;

fn policy(name: &str, scope: Option<Scope>, rules: PolicyRules) -> PutPolicyRequest {
    PutPolicyRequest {
        policy: Some(Policy {
            name: name.into(),
            scope,
            rules: Some(rules),
            ..Default::default()
        }),
        request_id: String::new(),
    }
}

fn add(team_name: &str, content: &str) -> AddRequest {
    AddRequest {
        memory: Some(Memory {
            scope: team(team_name),
            content: content.into(),
            ..Default::default()
        }),
        request_id: String::new(),
    }
}

#[tokio::test]
async fn policies_hold_where_memories_are_written_and_kept() {
    let sandbox = Sandbox::start(&[("auth.hs256_secret", SECRET)]).await;
    for (way, channel) in sandbox.ways() {
        let admin = token(way, Role::Admin, &[], NEVER);
        let writer = token(way, Role::Writer, &[], NEVER);
        let mut policies = PolicyServiceClient::new(channel.clone());
        let mut memories = MemoryServiceClient::new(channel.clone());
        let mut documents = KnowledgeServiceClient::new(channel);
        let rules = PolicyRules {
            max_content_bytes: Some(20),
            max_memories: Some(2),
            time_to_live: Some(prost_types::Duration {
                seconds: 3600,
                nanos: 0,
            }),
            ..Default::default()
        };
        let small = policy("small", team("core"), rules);
        let status = policies.put_policy(bearing(small.clone(), &writer)).await.unwrap_err();
        assert_eq!(refusal(&status).0, "PERMISSION_DENIED", "{way}: rules are an admin's");
        policies.put_policy(bearing(small, &admin)).await.unwrap();

        let status = memories
            .add(bearing(add("core", &"x".repeat(21)), &writer))
            .await
            .unwrap_err();
        assert_eq!(refusal(&status).0, "POLICY_DENIED", "{way}");
        assert!(
            status.message().contains("`small`") && status.message().contains("20"),
            "{status:?}"
        );
        let kept = memories
            .add(bearing(add("core", "a note"), &writer))
            .await
            .unwrap()
            .into_inner();
        let kept = kept.memory.unwrap();
        assert!(kept.expires_at.is_some(), "{way}: it lives an hour");
        memories.add(bearing(add("core", "another"), &writer)).await.unwrap();
        let status = memories
            .add(bearing(add("core", "a third"), &writer))
            .await
            .unwrap_err();
        assert!(status.message().contains("max_memories"), "{way}: {status:?}");
        memories
            .add(bearing(add("ops", &"x".repeat(99)), &writer))
            .await
            .unwrap();

        let closed = PolicyRules {
            writers: WriterRule::Admins.into(),
            ..Default::default()
        };
        policies
            .put_policy(bearing(policy("closed", None, closed), &admin))
            .await
            .unwrap();
        let delete = DeleteRequest {
            id: kept.id.clone(),
            ..Default::default()
        };
        for status in [
            memories.add(bearing(add("ops", "no"), &writer)).await.unwrap_err(),
            memories.delete(bearing(delete.clone(), &writer)).await.unwrap_err(),
            documents
                .put_document(bearing(put("ops", "a.md", "no"), &writer))
                .await
                .unwrap_err(),
        ] {
            assert_eq!(refusal(&status).0, "POLICY_DENIED", "{way}: {status:?}");
        }
        memories.add(bearing(add("ops", "an admin's"), &admin)).await.unwrap();

        let asked = GetEffectivePolicyRequest {
            scope: team("core"),
            layer: 0,
        };
        let rules = policies
            .get_effective_policy(bearing(asked, &writer))
            .await
            .unwrap()
            .into_inner();
        assert_eq!(rules.origins["writers"], "closed", "{way}");
        assert_eq!(rules.origins["max_memories"], "small", "{way}");
        assert_eq!(rules.rules.unwrap().max_memories, Some(2), "{way}");

        // What is deleted is kept as long as the rules say, and then removed for good.
        let brief = PolicyRules {
            deleted_retention: Some(prost_types::Duration {
                seconds: 0,
                nanos: 1_000_000,
            }),
            ..Default::default()
        };
        policies
            .put_policy(bearing(policy("brief", team("core"), brief), &admin))
            .await
            .unwrap();
        memories.delete(bearing(delete, &admin)).await.unwrap();
        let get = GetRequest {
            id: kept.id.clone(),
            show_deleted: true,
            ..Default::default()
        };
        let mut left = 300;
        while memories.get(bearing(get.clone(), &admin)).await.is_ok() {
            left -= 1;
            assert!(left > 0, "{way}: it is kept although its time is over");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let list = ListPoliciesRequest {
            page_size: 2,
            ..Default::default()
        };
        let page = policies
            .list_policies(bearing(list.clone(), &writer))
            .await
            .unwrap()
            .into_inner();
        let rest = ListPoliciesRequest {
            page_token: page.next_page_token,
            ..list
        };
        let rest = policies
            .list_policies(bearing(rest, &writer))
            .await
            .unwrap()
            .into_inner();
        let names: Vec<_> = page
            .policies
            .iter()
            .chain(&rest.policies)
            .map(|one| one.name.as_str())
            .collect();
        assert_eq!(names, ["brief", "closed", "small"], "{way}");
        let gone = DeletePolicyRequest {
            name: "closed".into(),
            ..Default::default()
        };
        policies.delete_policy(bearing(gone, &admin)).await.unwrap();
        memories.add(bearing(add("ops", "open again"), &writer)).await.unwrap();
    }
    sandbox.stop().await;
}

#[tokio::test]
async fn a_policy_of_a_layer_holds_in_that_layer_alone() {
    let sandbox = Sandbox::start(&[]).await;
    for (way, channel) in sandbox.ways() {
        let mut policies = PolicyServiceClient::new(channel.clone());
        let mut memories = MemoryServiceClient::new(channel);
        let scope = |session: &str| {
            Some(Scope {
                user: format!("ann-{}", way.replace(' ', "-")),
                session: session.into(),
                ..Default::default()
            })
        };
        let rules = PolicyRules {
            max_content_bytes: Some(30),
            time_to_live: Some(prost_types::Duration { seconds: 1, nanos: 0 }),
            ..Default::default()
        };
        let mut brief = policy(&format!("brief-{}", way.replace(' ', "-")), scope(""), rules);
        brief.policy.as_mut().unwrap().layers = vec![Layer::Session.into()];
        policies.put_policy(brief).await.unwrap();
        let add = |session: &str, content: &str| AddRequest {
            memory: Some(Memory {
                scope: scope(session),
                content: content.into(),
                ..Default::default()
            }),
            request_id: String::new(),
        };
        let long = "what Ann said at length about her cats";
        let status = memories.add(add("monday", long)).await.unwrap_err();
        assert_eq!(refusal(&status).0, "POLICY_DENIED", "{way}: {status:?}");
        assert!(status.message().contains("max_content_bytes"), "{way}: {status:?}");
        let fleeting = memories.add(add("monday", "a passing thought")).await.unwrap();
        assert!(fleeting.into_inner().memory.unwrap().expires_at.is_some(), "{way}");
        let lasting = memories.add(add("", long)).await.unwrap();
        assert!(lasting.into_inner().memory.unwrap().expires_at.is_none(), "{way}");
        for (layer, limited) in [(Layer::Session, true), (Layer::User, false)] {
            let asked = GetEffectivePolicyRequest {
                scope: scope("monday"),
                layer: layer.into(),
            };
            let effective = policies.get_effective_policy(asked).await.unwrap().into_inner();
            let limit = effective.rules.unwrap_or_default().max_content_bytes;
            assert_eq!(limit, limited.then_some(30), "{way}: {layer:?}");
        }
        tokio::time::sleep(Duration::from_millis(1100)).await;
        let list = ListRequest {
            scope: scope("monday"),
            ..Default::default()
        };
        let left = memories.list(list).await.unwrap().into_inner().memories;
        let left: Vec<&str> = left.iter().map(|memory| memory.content.as_str()).collect();
        assert_eq!(left, [long], "{way}");
    }
    sandbox.stop().await;
}

#[tokio::test]
async fn a_policy_holds_in_every_way_to_write_and_nowhere_but_in_its_layers() {
    let sandbox = Sandbox::start(&[("auth.hs256_secret", SECRET)]).await;
    for (way, channel) in sandbox.ways() {
        let admin = token(way, Role::Admin, &[], NEVER);
        let writer = token(way, Role::Writer, &[], NEVER);
        let mut policies = PolicyServiceClient::new(channel.clone());
        let mut memories = MemoryServiceClient::new(channel);
        let memory = |session: &str, content: &str| {
            Some(Memory {
                scope: Some(Scope {
                    user: "ann".into(),
                    session: session.into(),
                    ..Default::default()
                }),
                content: content.into(),
                ..Default::default()
            })
        };
        let add = |session: &str, content: &str| AddRequest {
            memory: memory(session, content),
            request_id: String::new(),
        };
        let of_sessions = |name: &str, rules: PolicyRules| {
            let mut put = policy(name, None, rules);
            put.policy.as_mut().unwrap().layers = vec![Layer::Session.into()];
            bearing(put, &admin)
        };
        let long = "x".repeat(21);
        let rules = PolicyRules {
            max_content_bytes: Some(20),
            max_memories: Some(3),
            time_to_live: Some(prost_types::Duration {
                seconds: 3600,
                nanos: 0,
            }),
            deleted_retention: Some(prost_types::Duration {
                seconds: 0,
                nanos: 1_000_000,
            }),
            ..Default::default()
        };
        policies.put_policy(of_sessions("brief", rules)).await.unwrap();
        let kept = memories.add(bearing(add("monday", "a note"), &writer)).await.unwrap();
        let kept = kept.into_inner().memory.unwrap();
        let update = UpdateRequest {
            memory: Some(Memory {
                id: kept.id.clone(),
                content: long.clone(),
                ..Default::default()
            }),
            update_mask: Some(prost_types::FieldMask {
                paths: vec!["content".into()],
            }),
            request_id: String::new(),
        };
        let status = memories.update(bearing(update, &writer)).await.unwrap_err();
        assert_eq!(refusal(&status).0, "POLICY_DENIED", "{way}: {status:?}");

        let exported = |content: &str| ExportedMemory {
            memory: memory("monday", content),
            ..Default::default()
        };
        let import = ImportRequest {
            import_id: "i".into(),
            memories: vec![exported(&long), exported("an imported note")],
            summary: None,
        };
        let import = bearing(tokio_stream::iter([import]), &writer);
        let told = memories.import(import).await.unwrap().into_inner();
        assert_eq!((told.created, told.refused), (1, 1), "{way}: {told:?}");
        assert_eq!(told.errors[0].reason(), Reason::PolicyDenied, "{way}");

        let batch = BatchAddRequest {
            requests: vec![add("monday", "a third"), add("monday", "a fourth"), add("", &long)],
            ..Default::default()
        };
        let batch = memories.batch_add(bearing(batch, &writer)).await.unwrap().into_inner();
        let refused = batch.results.into_iter().map(|result| match result.result {
            Some(batch_add_result::Result::Error(error)) => Some(error.reason()),
            _ => None,
        });
        let refused: Vec<Option<Reason>> = refused.collect();
        assert_eq!(refused, [None, Some(Reason::PolicyDenied), None], "{way}");
        let list = ListRequest {
            scope: memory("monday", "").unwrap().scope,
            ..Default::default()
        };
        let there = memories
            .list(bearing(list, &writer))
            .await
            .unwrap()
            .into_inner()
            .memories;
        let lasting: Vec<&str> = there
            .iter()
            .filter(|memory| memory.expires_at.is_none())
            .map(|memory| memory.content.as_str())
            .collect();
        assert_eq!((there.len(), lasting), (4, vec![long.as_str()]), "{way}");

        let closed = PolicyRules {
            writers: WriterRule::Admins.into(),
            ..Default::default()
        };
        policies.put_policy(of_sessions("closed", closed)).await.unwrap();
        let status = memories.add(bearing(add("tuesday", "no"), &writer)).await.unwrap_err();
        assert_eq!(refusal(&status).0, "POLICY_DENIED", "{way}: {status:?}");
        let of_the_user = memories.add(bearing(add("", "yes"), &writer)).await.unwrap();
        let of_the_user = of_the_user.into_inner().memory.unwrap();

        // Of what is deleted, only that of the layer is removed for good.
        for id in [&kept.id, &of_the_user.id] {
            let delete = DeleteRequest {
                id: id.clone(),
                ..Default::default()
            };
            memories.delete(bearing(delete, &admin)).await.unwrap();
        }
        let get = |id: &str| {
            let get = GetRequest {
                id: id.into(),
                show_deleted: true,
                ..Default::default()
            };
            bearing(get, &admin)
        };
        let mut left = 300;
        while memories.get(get(&kept.id)).await.is_ok() {
            left -= 1;
            assert!(left > 0, "{way}: it is kept although its time is over");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        memories.get(get(&of_the_user.id)).await.unwrap();
    }
    sandbox.stop().await;
}

#[tokio::test]
async fn no_memory_outlives_and_no_document_exceeds_what_the_rules_allow() {
    let sandbox = Sandbox::start(&[]).await;
    for (way, channel) in sandbox.ways() {
        let mut policies = PolicyServiceClient::new(channel.clone());
        let mut memories = MemoryServiceClient::new(channel.clone());
        let mut documents = KnowledgeServiceClient::new(channel);
        let seconds = |seconds| Some(prost_types::Duration { seconds, nanos: 0 });
        let rules = PolicyRules {
            max_time_to_live: seconds(3600),
            max_document_bytes: Some(20),
            ..Default::default()
        };
        let brief = policy(&format!("brief-{}", way.replace(' ', "-")), team(way), rules);
        let stored = policies.put_policy(brief.clone()).await.unwrap().into_inner().policy;
        assert_eq!(stored.unwrap().rules, Some(rules), "{way}");

        // A memory without an expiry gets the latest, one with an earlier one keeps it, a later one is refused.
        let now = SystemTime::now();
        let at = |seconds| Some(prost_types::Timestamp::from(now + Duration::from_secs(seconds)));
        let until = |content: &str, expires_at| {
            let mut request = add(way, content);
            request.memory.as_mut().unwrap().expires_at = expires_at;
            request
        };
        let added = memories.add(until("a thought", None)).await.unwrap().into_inner();
        let mut thought = added.memory.unwrap();
        let (created, expires) = (thought.created_at.unwrap(), thought.expires_at.unwrap());
        assert_eq!(expires.seconds - created.seconds, 3600, "{way}");
        let soon = memories.add(until("a glimpse", at(60))).await.unwrap().into_inner();
        assert_eq!(
            soon.memory.unwrap().expires_at.unwrap().seconds,
            at(60).unwrap().seconds,
            "{way}"
        );
        let denied = |status: tonic::Status, rule: &str| {
            assert_eq!(refusal(&status).0, "POLICY_DENIED", "{way}: {status:?}");
            assert!(status.message().contains(rule), "{way}: {status:?}");
        };
        let status = memories.add(until("a monument", at(7200))).await.unwrap_err();
        denied(status, "max_time_to_live");
        let batch = BatchAddRequest {
            requests: vec![until("an obelisk", at(7200)), until("a sand castle", at(60))],
            ..Default::default()
        };
        let results = memories.batch_add(batch).await.unwrap().into_inner().results;
        let [
            Some(batch_add_result::Result::Error(error)),
            Some(batch_add_result::Result::Added(_)),
        ] = [0, 1].map(|n| results[n].result.clone())
        else {
            panic!("{way}: {results:?}");
        };
        assert!(error.message.contains("max_time_to_live"), "{way}: {error:?}");
        // Import counts from now, whatever it says itself; what is deleted may expire when it likes.
        let imported = |content: &str, expires_at, deleted_at| ExportedMemory {
            memory: Some(Memory {
                deleted_at,
                created_at: at(10_000_000),
                ..until(content, expires_at).memory.unwrap()
            }),
            ..Default::default()
        };
        let chunk = ImportRequest {
            import_id: format!("in-{}", way.replace(' ', "-")),
            memories: vec![
                imported("a pyramid", at(7200), None),
                imported("a bubble", None, None),
                imported("a ruin", at(7200), at(0)),
            ],
            summary: None,
        };
        let told = memories.import(tokio_stream::iter([chunk])).await.unwrap().into_inner();
        assert_eq!((told.created, told.refused), (2, 1), "{way}: {told:?}");
        let list = ListRequest {
            scope: team(way),
            ..Default::default()
        };
        let shown = memories.list(list).await.unwrap().into_inner().memories;
        let mut bubble = shown.into_iter().find(|memory| memory.content == "a bubble").unwrap();
        let latest = at(3600).unwrap().seconds;
        assert!(
            (latest..latest + 60).contains(&bubble.expires_at.unwrap().seconds),
            "{way}"
        );
        (bubble.expires_at, bubble.etag) = (at(7200), String::new());
        let request = UpdateRequest {
            memory: Some(bubble),
            update_mask: Some(prost_types::FieldMask {
                paths: vec!["expires_at".into()],
            }),
            ..Default::default()
        };
        denied(memories.update(request).await.unwrap_err(), "max_time_to_live");

        // Nor can it be put off, or left out, later; an earlier one is none of the rule's business.
        let mut put_off = async |expires_at| {
            thought.expires_at = expires_at;
            thought.etag.clear();
            let paths = vec!["expires_at".into()];
            let request = UpdateRequest {
                memory: Some(thought.clone()),
                update_mask: Some(prost_types::FieldMask { paths }),
                ..Default::default()
            };
            memories.update(request).await
        };
        denied(put_off(at(7200)).await.unwrap_err(), "max_time_to_live");
        denied(put_off(None).await.unwrap_err(), "max_time_to_live");
        put_off(at(30)).await.unwrap();

        // What is there already is left alone until its expiry is changed.
        let open = add("elsewhere", "from before there were rules");
        let mut old = memories.add(open).await.unwrap().into_inner().memory.unwrap();
        let mut late = brief.clone();
        late.policy.as_mut().unwrap().name = format!("late-{}", way.replace(' ', "-"));
        late.policy.as_mut().unwrap().scope = team("elsewhere");
        policies.put_policy(late.clone()).await.unwrap();
        old.importance = Some(0.9);
        old.etag.clear();
        let request = UpdateRequest {
            memory: Some(old),
            update_mask: Some(prost_types::FieldMask {
                paths: vec!["importance".into()],
            }),
            ..Default::default()
        };
        let changed = memories.update(request).await.unwrap().into_inner().memory.unwrap();
        assert_eq!((changed.importance, changed.expires_at), (Some(0.9), None), "{way}");
        let name = late.policy.unwrap().name;
        let delete = DeletePolicyRequest {
            name,
            ..Default::default()
        };
        policies.delete_policy(delete).await.unwrap();

        // Documents have a limit of their own.
        let mut write = async |content: &str| documents.put_document(put(way, "notes.md", content)).await;
        write(&"x".repeat(20)).await.unwrap();
        denied(write(&"x".repeat(21)).await.unwrap_err(), "max_document_bytes");

        let mut wrong = brief;
        let rules = wrong.policy.as_mut().unwrap().rules.as_mut().unwrap();
        (rules.max_time_to_live, rules.max_document_bytes) = (seconds(-1), Some(0));
        let status = policies.put_policy(wrong).await.unwrap_err();
        let fields = ["policy.rules.max_document_bytes", "policy.rules.max_time_to_live"];
        assert_eq!(refusal(&status).1, fields, "{way}");
    }
    sandbox.stop().await;
}
