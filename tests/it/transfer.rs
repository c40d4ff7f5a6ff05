//! Export and import: everything arrives as it was, once, also after an interruption.

use std::path::Path;

use aeterna_auth::Role;
use aeterna_proto::memory::v1::memory_service_client::MemoryServiceClient;
use aeterna_proto::memory::v1::policy_service_client::PolicyServiceClient;
use aeterna_proto::memory::v1::{
    DeletePolicyRequest, DeleteRequest, EmbeddingCode, ExportRequest, ExportResponse, ExportedMemory, GetRequest,
    HistoryRequest, ImportRequest, ListRequest, Memory, Policy, PolicyRules, PutPolicyRequest, SearchRequest,
    StatsRequest, StreamSummary, UpdateRequest, WriterRule,
};
use aeterna_rpc::AnyChannel;
use aeterna_testkit::{NEVER, Program, SECRET, bearing, built, refusal, token};
use tonic::Request;

use crate::notes::{item, together, user};
use crate::sandbox::Sandbox;

type Client = MemoryServiceClient<AnyChannel>;

/// Fills a store with memories of which one was changed and one deleted.
async fn fill(client: &mut Client, name: &str, count: usize) {
    for start in (0..count).step_by(500) {
        let requests = (start..(start + 500).min(count))
            .map(|n| item(name, &format!("note {n} about the harbour")))
            .collect();
        client.batch_add(together(requests)).await.unwrap();
    }
    let changed = client
        .add(item(name, "the first words"))
        .await
        .unwrap()
        .into_inner()
        .memory
        .unwrap();
    let update = UpdateRequest {
        memory: Some(Memory {
            id: changed.id,
            content: "the last words".into(),
            ..Default::default()
        }),
        update_mask: Some(prost_types::FieldMask {
            paths: vec!["content".into()],
        }),
        request_id: String::new(),
    };
    client.update(update).await.unwrap();
    let gone = client
        .add(item(name, "to be deleted"))
        .await
        .unwrap()
        .into_inner()
        .memory
        .unwrap();
    let delete = DeleteRequest {
        id: gone.id,
        ..Default::default()
    };
    client.delete(delete).await.unwrap();
}

async fn export(client: &mut Client, request: ExportRequest) -> Vec<ExportResponse> {
    let mut chunks = client.export(request).await.unwrap().into_inner();
    let mut all = Vec::new();
    while let Some(chunk) = chunks.message().await.unwrap() {
        all.push(chunk);
    }
    all
}

fn memories(chunks: &[ExportResponse]) -> Vec<ExportedMemory> {
    chunks.iter().flat_map(|chunk| chunk.memories.clone()).collect()
}

fn everything(name: &str) -> ExportRequest {
    ExportRequest {
        scope: user(name),
        include_history: true,
        include_embeddings: true,
        ..Default::default()
    }
}

fn chunks(id: &str, memories: &[ExportedMemory], summary: Option<StreamSummary>) -> Vec<ImportRequest> {
    let mut chunks: Vec<ImportRequest> = memories
        .chunks(200)
        .map(|memories| ImportRequest {
            import_id: id.into(),
            memories: memories.to_vec(),
            summary: None,
        })
        .collect();
    chunks.last_mut().unwrap().summary = summary;
    chunks
}

#[tokio::test]
async fn what_was_exported_is_imported_as_it_was() {
    let (from, to) = (Sandbox::start(&[]).await, Sandbox::start(&[]).await);
    for ((way, channel), (_, other)) in from.ways().into_iter().zip(to.ways()) {
        let (mut source, mut target) = (MemoryServiceClient::new(channel), MemoryServiceClient::new(other));
        fill(&mut source, way, 450).await;
        let sent = export(&mut source, everything(way)).await;
        let summary = sent.last().unwrap().summary.clone().unwrap();
        let all = memories(&sent);
        assert_eq!((summary.count, all.len()), (452, 452), "{way}");
        // From the middle on, the end is the same.
        let middle = ExportRequest {
            resume_token: sent[1].resume_token.clone(),
            ..everything(way)
        };
        let rest = export(&mut source, middle).await;
        assert_eq!(rest.last().unwrap().summary.clone().unwrap(), summary, "{way}");
        let seen: usize = sent[..2].iter().map(|chunk| chunk.memories.len()).sum();
        assert_eq!(memories(&rest), all[seen..], "{way}");
        // Without history, what is deleted stays.
        let plain = ExportRequest {
            scope: user(way),
            ..Default::default()
        };
        let plain = memories(&export(&mut source, plain).await);
        assert!(
            plain.len() == 451
                && plain
                    .iter()
                    .all(|one| one.embeddings.is_empty() && one.versions.is_empty())
        );

        let import = async |client: &mut Client, chunks: Vec<ImportRequest>| {
            client
                .import(tokio_stream::iter(chunks))
                .await
                .map(|answer| answer.into_inner())
        };
        let id = format!("import-{way}");
        // Interrupted, and sent again from the beginning.
        let some = import(&mut target, chunks(&id, &all[..200], None)).await.unwrap();
        assert_eq!((some.created, some.merged), (200, 0), "{way}");
        // Another stream under the same id, also when it is shorter.
        let mut other = all.clone();
        other[7].memory.as_mut().unwrap().content = "another".into();
        let status = import(&mut target, chunks(&id, &other, None)).await.unwrap_err();
        assert_eq!(refusal(&status).0, "INVALID_STATE", "{way}: {status:?}");
        let status = import(&mut target, chunks(&id, &all[..100], None)).await.unwrap_err();
        assert_eq!(refusal(&status).0, "INVALID_STATE", "{way}: {status:?}");
        let done = import(&mut target, chunks(&id, &all, Some(summary.clone())))
            .await
            .unwrap();
        assert_eq!((done.created, done.merged, done.errors.len()), (252, 200, 0), "{way}");
        assert_eq!(done.summary.unwrap(), summary, "{way}");
        // Whoever shows the token sees all of it, by a repeated import that stores nothing as well.
        let again = chunks(&id, &all, Some(summary.clone()));
        let again = import(&mut target, again).await.unwrap();
        for token in [done.consistency_token, again.consistency_token] {
            let seeing = StatsRequest {
                scope: user(way),
                consistency_token: token.clone(),
            };
            let stats = target.stats(seeing).await.unwrap().into_inner();
            assert!(stats.layers[0].memories == 451 && !token.is_empty(), "{way}: {stats:?}");
            let seeing = ExportRequest {
                consistency_token: token,
                ..everything(way)
            };
            assert_eq!(memories(&export(&mut target, seeing).await).len(), 452, "{way}");
        }
        assert_eq!(
            export(&mut target, everything(way))
                .await
                .last()
                .unwrap()
                .summary
                .clone()
                .unwrap(),
            summary,
            "{way}"
        );
        let stats = target
            .stats(StatsRequest {
                scope: user(way),
                ..Default::default()
            })
            .await
            .unwrap()
            .into_inner();
        assert_eq!(
            (stats.pending_embeddings, stats.deleted),
            (0, 1),
            "{way}: the vectors came along"
        );
        let query = SearchRequest {
            scope: user(way),
            query: "last words".into(),
            ..Default::default()
        };
        let found = target.search(query).await.unwrap().into_inner().results;
        assert_eq!(found[0].memory.as_ref().unwrap().content, "the last words", "{way}");
        // Once all of it is stored, what was removed for good since comes again with the same stream.
        let purge = DeleteRequest {
            id: found[0].memory.as_ref().unwrap().id.clone(),
            purge: true,
            ..Default::default()
        };
        target.delete(purge).await.unwrap();
        let again = import(&mut target, chunks(&id, &all, Some(summary.clone())))
            .await
            .unwrap();
        assert_eq!((again.created, again.merged, again.refused), (1, 451, 0), "{way}");
        // The past of a memory ends with what it says now, whether it was sent or not.
        let mut cut = all.iter().find(|one| one.versions.len() > 1).unwrap().clone();
        let now = cut.versions.pop().unwrap();
        cut.memory.as_mut().unwrap().id = String::new();
        cut.memory.as_mut().unwrap().content = "the past was cut".into();
        let told = import(&mut target, chunks(&format!("cut-{way}"), &[cut.clone()], None))
            .await
            .unwrap();
        assert_eq!(told.created, 1, "{way}: {told:?}");
        let list = ListRequest {
            scope: user(way),
            page_size: 1,
            ..Default::default()
        };
        let newest = target.list(list).await.unwrap().into_inner().memories.remove(0);
        assert_eq!(newest.content, "the past was cut", "{way}");
        let history = HistoryRequest {
            id: newest.id,
            ..Default::default()
        };
        let versions = target.history(history).await.unwrap().into_inner().versions;
        let last = versions[0].memory.as_ref().unwrap();
        assert_eq!(
            (last.version, last.content.as_str()),
            (newest.version, "the past was cut"),
            "{way}"
        );
        cut.versions.push(now);
        cut.memory.as_mut().unwrap().content = "the past ends otherwise".into();
        let told = import(&mut target, chunks(&format!("otherwise-{way}"), &[cut], None))
            .await
            .unwrap();
        assert_eq!((told.created, told.errors.len()), (1, 0), "{way}: {told:?}");
        let list = ListRequest {
            scope: user(way),
            page_size: 1,
            ..Default::default()
        };
        let id = target.list(list).await.unwrap().into_inner().memories.remove(0).id;
        let history = HistoryRequest {
            id,
            ..Default::default()
        };
        let versions = target.history(history).await.unwrap().into_inner().versions;
        assert_eq!(
            versions[0].memory.as_ref().unwrap().content,
            "the past ends otherwise",
            "{way}"
        );
        let status = import(&mut target, chunks(&format!("new-{way}"), &all[..100], Some(summary)))
            .await
            .unwrap_err();
        assert_eq!(refusal(&status).0, "INVALID_STATE", "{way}: {status:?}");
        // A bad item is told with its place, and the others are kept.
        let mut bad = vec![all[0].clone(), ExportedMemory::default()];
        bad[0].memory.as_mut().unwrap().id = String::new();
        bad[0].memory.as_mut().unwrap().content = "without an id".into();
        bad[0].versions.clear();
        let told = import(&mut target, chunks(&format!("bad-{way}"), &bad, None))
            .await
            .unwrap();
        assert_eq!(
            (told.created, told.errors.len(), told.errors[0].index),
            (1, 1, 1),
            "{way}: {told:?}"
        );
        let status = import(&mut target, Vec::new()).await.unwrap_err();
        assert_eq!(refusal(&status).1, ["import_id"], "{way}: {status:?}");
    }
    from.stop().await;
    to.stop().await;
}

#[tokio::test]
async fn an_import_neither_forges_nor_reaches_another_tenant() {
    let sandbox = Sandbox::start(&[("auth.hs256_secret", SECRET)]).await;
    let [(_, channel), _] = sandbox.ways();
    let mut client = MemoryServiceClient::new(channel);
    let (admin, writer, evil) = (
        token("acme", Role::Admin, &[], NEVER),
        token("acme", Role::Writer, &[], NEVER),
        token("evil", Role::Admin, &[], NEVER),
    );
    let secret = client
        .add(bearing(item("ann", "the code is 4711"), &admin))
        .await
        .unwrap()
        .into_inner();
    let secret = secret.memory.unwrap();
    let mut chunks = client
        .export(bearing(everything("ann"), &admin))
        .await
        .unwrap()
        .into_inner();
    let exported = chunks.message().await.unwrap().unwrap();
    let stolen = ExportRequest {
        resume_token: exported.resume_token.clone(),
        ..everything("ann")
    };
    let status = client.export(bearing(stolen, &evil)).await.unwrap_err();
    assert_eq!(refusal(&status).1, ["resume_token"], "{status:?}");
    let mut nothing = client
        .export(bearing(everything("ann"), &evil))
        .await
        .unwrap()
        .into_inner();
    let end = nothing.message().await.unwrap().unwrap();
    assert_eq!(end.summary.unwrap().count, 0);

    // The same id in another tenant: another memory, and nothing is told of the first.
    let import = ImportRequest {
        import_id: "i".into(),
        memories: exported.memories.clone(),
        summary: None,
    };
    let carry = |token: &str| {
        let mut request = Request::new(tokio_stream::iter([import.clone()]));
        request
            .metadata_mut()
            .insert("authorization", format!("Bearer {token}").parse().unwrap());
        request
    };
    let told = client.import(carry(&evil)).await.unwrap().into_inner();
    assert_eq!((told.created, told.merged), (1, 0));
    let get = GetRequest {
        id: secret.id.clone(),
        ..Default::default()
    };
    assert!(client.get(bearing(get.clone(), &evil)).await.is_err());
    assert_eq!(
        client
            .get(bearing(get, &admin))
            .await
            .unwrap()
            .into_inner()
            .memory
            .unwrap(),
        secret
    );
    // Who did what is believed of admins only.
    let told = client.import(carry(&writer)).await.unwrap().into_inner();
    assert_eq!((told.created, told.errors.len()), (0, 1), "{told:?}");
    sandbox.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_in_the_middle_of_an_import_nothing_is_lost_or_doubled() {
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let start = async |data: &Path| {
        let flags = ["serve", "--embedding.model_dirs", "", "--log.filter", "error"];
        Program::start(&built("aeterna"), &flags, data).await
    };
    let source = start(first.path()).await;
    let mut client = MemoryServiceClient::new(source.channel());
    fill(&mut client, "ann", 3000).await;
    let sent = export(&mut client, everything("ann")).await;
    let summary = sent.last().unwrap().summary.clone().unwrap();
    let all = memories(&sent);
    // An export that is cut by the end of its server goes on from its last token.
    let mut cut = client.export(everything("ann")).await.unwrap().into_inner();
    let begun = cut.message().await.unwrap().unwrap();
    source.kill().await;
    let mut last = begun.resume_token;
    let ended = loop {
        match cut.message().await {
            Ok(Some(chunk)) => last = chunk.resume_token,
            other => break other,
        }
    };
    assert!(
        ended.is_err() && !last.is_empty(),
        "the export was over before its server was: {ended:?}"
    );
    let source = start(first.path()).await;
    let mut client = MemoryServiceClient::new(source.channel());
    let on = ExportRequest {
        resume_token: last,
        ..everything("ann")
    };
    let rest = export(&mut client, on).await;
    assert_eq!(rest.last().unwrap().summary.clone().unwrap(), summary);
    source.stop().await;

    let mut left = 0;
    for round in 0..4u64 {
        let target = start(second.path()).await;
        let mut client = MemoryServiceClient::new(target.channel());
        let stream = tokio_stream::iter(chunks("i", &all, Some(summary.clone())));
        let import = tokio::spawn(async move { client.import(stream).await });
        tokio::time::sleep(std::time::Duration::from_millis(60 + 90 * round)).await;
        target.kill().await;
        left += u64::from(import.await.unwrap().is_err());
    }
    assert!(left > 0, "no import was interrupted");
    let target = start(second.path()).await;
    let mut client = MemoryServiceClient::new(target.channel());
    let stream = tokio_stream::iter(chunks("i", &all, Some(summary.clone())));
    let done = client.import(stream).await.unwrap().into_inner();
    assert_eq!((done.created + done.merged, done.errors.len()), (3002, 0));
    let arrived = export(&mut client, everything("ann")).await;
    assert_eq!(arrived.last().unwrap().summary.clone().unwrap(), summary);
    let list = ListRequest {
        scope: user("ann"),
        page_size: 1,
        ..Default::default()
    };
    assert_eq!(client.list(list).await.unwrap().into_inner().memories.len(), 1);
    target.stop().await;
}

#[tokio::test]
async fn what_was_refused_is_tried_again_and_damaged_vectors_are_made_anew() {
    let (from, to) = (Sandbox::start(&[]).await, Sandbox::start(&[]).await);
    let ([(way, channel), _], [(_, other), _]) = (from.ways(), to.ways());
    let (mut source, mut target) = (
        MemoryServiceClient::new(channel),
        MemoryServiceClient::new(other.clone()),
    );
    fill(&mut source, way, 3).await;
    let sent = export(&mut source, everything(way)).await;
    let mut all = memories(&sent);
    all.truncate(3);
    // The first one has a scale that is no number; the second one brings another model's vector before its own.
    all[0].embeddings[0].code[3..5].fill(0xff);
    let foreign = EmbeddingCode {
        model: "another@1".into(),
        ..all[1].embeddings[0].clone()
    };
    all[1].embeddings.insert(0, foreign);

    let mut policies = PolicyServiceClient::new(other);
    let closed = Policy {
        name: "closed".into(),
        scope: user(way),
        rules: Some(PolicyRules {
            writers: WriterRule::Nobody.into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let put = PutPolicyRequest {
        policy: Some(closed),
        ..Default::default()
    };
    policies.put_policy(put).await.unwrap();
    let mut import = async || {
        let stream = tokio_stream::iter(chunks("again", &all, None));
        let answer = target.import(stream).await.unwrap().into_inner();
        (answer.created, answer.merged, answer.refused)
    };
    assert_eq!(import().await, (0, 0, 3));
    assert_eq!(import().await, (0, 0, 3), "the policy still forbids it");
    let delete = DeletePolicyRequest {
        name: "closed".into(),
        ..Default::default()
    };
    policies.delete_policy(delete).await.unwrap();
    assert_eq!(import().await, (3, 0, 0));
    assert_eq!(import().await, (0, 3, 0));
    let mut left = 200;
    loop {
        let stats = target
            .stats(StatsRequest {
                scope: user(way),
                ..Default::default()
            })
            .await
            .unwrap()
            .into_inner();
        if stats.pending_embeddings == 0 {
            break;
        }
        left -= 1;
        assert!(left > 0, "the damaged vector is not made anew: {stats:?}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    from.stop().await;
    to.stop().await;
}
