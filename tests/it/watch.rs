//! Watching changes: everything that the caller may see, in order, once; also for a watcher that is slow or was away.

use std::time::Duration;

use aeterna_auth::Role;
use aeterna_proto::memory::v1::memory_service_client::MemoryServiceClient;
use aeterna_proto::memory::v1::{
    BatchAddRequest, ChangeKind, DeleteRequest, ExportRequest, ListRequest, Memory, UpdateRequest, WatchRequest,
    WatchResponse,
};
use aeterna_rpc::AnyChannel;
use aeterna_testkit::{NEVER, Program, SECRET, bearing, built, refusal, token};
use tonic::Streaming;

use crate::notes::{item, together, user};
use crate::sandbox::Sandbox;

type Client = MemoryServiceClient<AnyChannel>;

async fn add(client: &mut Client, name: &str, content: &str) -> Memory {
    client
        .add(item(name, content))
        .await
        .unwrap()
        .into_inner()
        .memory
        .unwrap()
}

/// The next event that is no heartbeat.
pub async fn next(stream: &mut Streaming<WatchResponse>) -> WatchResponse {
    loop {
        let event = tokio::time::timeout(Duration::from_secs(60), stream.message()).await;
        let event = event.expect("an event comes").unwrap().expect("the stream goes on");
        if !event.heartbeat {
            return event;
        }
    }
}

#[tokio::test]
async fn a_watcher_is_told_what_it_may_see_and_goes_on_where_it_ended() {
    let sandbox = Sandbox::start(&[]).await;
    for (way, channel) in sandbox.ways() {
        let mut client = MemoryServiceClient::new(channel);
        add(&mut client, way, "before").await;
        let request = WatchRequest {
            scope: user(way),
            ..Default::default()
        };
        let mut stream = client.watch(request.clone()).await.unwrap().into_inner();
        let only = WatchRequest {
            filter: "content:fox".into(),
            ..request.clone()
        };
        let mut foxes = client.watch(only).await.unwrap().into_inner();

        let added = add(&mut client, way, "a fox").await;
        add(&mut client, "somebody-else", "a fox of another").await;
        let update = UpdateRequest {
            memory: Some(Memory {
                id: added.id.clone(),
                content: "a wolf".into(),
                ..Default::default()
            }),
            update_mask: Some(prost_types::FieldMask {
                paths: vec!["content".into()],
            }),
            request_id: String::new(),
        };
        client.update(update).await.unwrap();
        for purge in [false, true] {
            let delete = DeleteRequest {
                id: added.id.clone(),
                purge,
                ..Default::default()
            };
            client.delete(delete).await.unwrap();
        }
        let mut told = Vec::new();
        for _ in 0..4 {
            told.push(next(&mut stream).await);
        }
        let kinds: Vec<ChangeKind> = told.iter().map(WatchResponse::kind).collect();
        let wanted = [
            ChangeKind::Added,
            ChangeKind::Updated,
            ChangeKind::Deleted,
            ChangeKind::Purged,
        ];
        assert_eq!(kinds, wanted, "{way}");
        let memories: Vec<&Memory> = told.iter().map(|event| event.memory.as_ref().unwrap()).collect();
        assert!(memories.iter().all(|memory| memory.id == added.id), "{way}");
        assert_eq!(memories.map_content(), ["a fox", "a wolf", "a wolf", ""], "{way}");
        assert_eq!(next(&mut foxes).await.kind(), ChangeKind::Added, "{way}");
        assert_eq!(
            next(&mut foxes).await.kind(),
            ChangeKind::Purged,
            "{way}: what it was is not known any more"
        );

        // From the second event on, as one that was away for the rest; what was purged since is told as removed, only.
        let mut again = client
            .watch(WatchRequest {
                resume_token: told[1].resume_token.clone(),
                ..request.clone()
            })
            .await
            .unwrap()
            .into_inner();
        assert_eq!(next(&mut again).await, told[3], "{way}");
        add(&mut client, way, "after").await;
        assert_eq!(next(&mut again).await.memory.unwrap().content, "after", "{way}");

        for (bad, field) in [
            (
                WatchRequest {
                    resume_token: "nonsense".into(),
                    ..request.clone()
                },
                "resume_token",
            ),
            (
                WatchRequest {
                    resume_token: "1.999999999".into(),
                    ..request.clone()
                },
                "resume_token",
            ),
            (
                WatchRequest {
                    filter: "colour = red".into(),
                    ..request.clone()
                },
                "filter",
            ),
            (
                WatchRequest {
                    layers: vec![99],
                    ..request.clone()
                },
                "layers[0]",
            ),
        ] {
            let status = client.watch(bad).await.unwrap_err();
            assert_eq!(refusal(&status).1, [field], "{way}");
        }
    }
    sandbox.stop().await;
}

#[tokio::test]
async fn a_watcher_is_told_nothing_once_its_token_has_ended() {
    let sandbox = Sandbox::start(&[("auth.hs256_secret", SECRET)]).await;
    for (way, channel) in sandbox.ways() {
        let mut client = MemoryServiceClient::new(channel);
        // Clocks may differ by half a minute: it is let in for two or three seconds more.
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap();
        let ending = token("acme", Role::Writer, &[], now.as_secs() - 28);
        let request = WatchRequest {
            scope: user(way),
            ..Default::default()
        };
        let mut stream = client.watch(bearing(request, &ending)).await.unwrap().into_inner();
        client.add(bearing(item(way, "a fox"), &ending)).await.unwrap();
        assert_eq!(next(&mut stream).await.memory.unwrap().content, "a fox", "{way}");
        let end = tokio::time::timeout(Duration::from_secs(20), stream.message()).await;
        let status = end.expect("the stream ends").unwrap_err();
        assert_eq!(refusal(&status).0, "TOKEN_INVALID", "{way}: {status}");
        let status = client.add(bearing(item(way, "late"), &ending)).await.unwrap_err();
        assert_eq!(refusal(&status).0, "TOKEN_INVALID", "{way}");
        let list = ListRequest {
            scope: user(way),
            ..Default::default()
        };
        let lasting = token("acme", Role::Reader, &[], NEVER);
        let there = client
            .list(bearing(list, &lasting))
            .await
            .unwrap()
            .into_inner()
            .memories;
        assert_eq!(there.len(), 1, "{way}: what was refused is not stored");
    }
    sandbox.stop().await;
}

/// What the memories say.
trait Contents {
    fn map_content(&self) -> Vec<&str>;
}

impl Contents for Vec<&Memory> {
    fn map_content(&self) -> Vec<&str> {
        self.iter().map(|memory| memory.content.as_str()).collect()
    }
}

#[tokio::test]
async fn a_watcher_that_does_not_read_misses_nothing_and_a_drain_ends_it() {
    let sandbox = Sandbox::start(&[]).await;
    let [_, (_, channel)] = sandbox.ways();
    let mut client = MemoryServiceClient::new(channel);
    let request = WatchRequest {
        scope: user("ann"),
        ..Default::default()
    };
    let mut slow = client.watch(request).await.unwrap().into_inner();
    // More than the ring of changes and all buffers on the way hold.
    for batch in 0..8 {
        let requests = (0..500)
            .map(|n| item("ann", &format!("fact {batch} {n} {}", "x".repeat(200))))
            .collect();
        client.batch_add(together(requests)).await.unwrap();
    }
    for batch in 0..8 {
        for n in 0..500 {
            let content = next(&mut slow).await.memory.unwrap().content;
            assert!(
                content.starts_with(&format!("fact {batch} {n} ")),
                "{batch} {n}: {content}"
            );
        }
    }
    let stopped = tokio::spawn(sandbox.stop());
    let status = loop {
        match slow.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the stream ends with a reason"),
            Err(status) => break status,
        }
    };
    assert_eq!(refusal(&status).0, "DRAINING", "{status:?}");
    stopped.await.unwrap();
}

#[tokio::test]
async fn a_watcher_that_is_very_slow_is_told_to_begin_again_and_misses_nothing() {
    const COUNT: usize = 8_000;
    let sandbox = Sandbox::start(&[]).await;
    let [_, (_, channel)] = sandbox.ways();
    let mut client = MemoryServiceClient::new(channel);
    let mut request = WatchRequest {
        scope: user("ann"),
        ..Default::default()
    };
    let mut slow = client.watch(request.clone()).await.unwrap().into_inner();
    for first in (0..COUNT).step_by(1000) {
        let requests = (first..first + 1000)
            .map(|n| item("ann", &format!("fact {n} {}", "x".repeat(1_000))))
            .collect();
        let added = client.batch_add(together(requests)).await.unwrap().into_inner();
        assert_eq!(added.results.len(), 1000);
    }
    let (mut told, mut ended) = (0, 0);
    while told < COUNT {
        match slow.message().await {
            Ok(Some(event)) if event.heartbeat => {}
            Ok(Some(event)) => {
                let content = event.memory.unwrap().content;
                assert!(content.starts_with(&format!("fact {told} ")), "{told}: {content}");
                told += 1;
                request.resume_token = event.resume_token;
            }
            Ok(None) => panic!("the stream ends with a reason"),
            Err(status) => {
                assert_eq!(refusal(&status).0, "FELL_BEHIND", "{status:?}");
                ended += 1;
                slow = client.watch(request.clone()).await.unwrap().into_inner();
            }
        }
    }
    assert_eq!(ended, 1);
    sandbox.stop().await;
}

#[tokio::test]
async fn a_watcher_with_nothing_to_hear_is_told_so_however_much_others_write() {
    let sandbox = Sandbox::start(&[("auth.hs256_secret", SECRET)]).await;
    let [_, (_, channel)] = sandbox.ways();
    let mut client = MemoryServiceClient::new(channel);
    let (quiet, busy) = (
        token("quiet", Role::Admin, &[], NEVER),
        token("busy", Role::Admin, &[], NEVER),
    );
    // One that is told of changes as they come, and one that begins in the past.
    let mut watching = Vec::new();
    for resume_token in ["", "1.0"] {
        let request = WatchRequest {
            resume_token: resume_token.into(),
            ..Default::default()
        };
        watching.push(client.watch(bearing(request, &quiet)).await.unwrap().into_inner());
    }
    let writing = async {
        for n in 0.. {
            client
                .add(bearing(item("ann", &format!("fact {n}")), &busy))
                .await
                .unwrap();
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    };
    let told = futures::future::join_all(watching.iter_mut().map(async |stream| {
        let event = stream.message().await.unwrap().unwrap();
        assert!(event.heartbeat && event.resume_token != "1.0", "{event:?}");
    }));
    tokio::select! {
        _ = told => {}
        () = writing => {}
        () = tokio::time::sleep(Duration::from_secs(40)) => panic!("nobody is told anything"),
    }
    drop(watching);
    sandbox.stop().await;
}

#[tokio::test]
async fn no_tenant_hears_of_another() {
    let sandbox = Sandbox::start(&[("auth.hs256_secret", SECRET)]).await;
    for (way, channel) in sandbox.ways() {
        let mut client = MemoryServiceClient::new(channel);
        let token = |tenant: &str| token(tenant, Role::Admin, &[], NEVER);
        let (ours, theirs) = (format!("acme-{way}"), format!("evil-{way}"));
        let from_the_start = || WatchRequest {
            resume_token: "1.0".into(),
            ..Default::default()
        };
        let mut live = client
            .watch(bearing(WatchRequest::default(), &token(&theirs)))
            .await
            .unwrap()
            .into_inner();
        client
            .add(bearing(item("ann", "the launch code"), &token(&ours)))
            .await
            .unwrap();
        client
            .add(bearing(item("ann", "their own"), &token(&theirs)))
            .await
            .unwrap();
        assert_eq!(next(&mut live).await.memory.unwrap().content, "their own", "{way}");
        let mut past = client
            .watch(bearing(from_the_start(), &token(&theirs)))
            .await
            .unwrap()
            .into_inner();
        assert_eq!(next(&mut past).await.memory.unwrap().content, "their own", "{way}");
    }
    sandbox.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_watchers_are_told_while_half_of_them_sleep() {
    const CONNECTIONS: usize = 50;
    const EACH: usize = 200;
    const CHANGES: usize = 10;
    const BYTES: usize = 24 << 10;
    /// More than the ring of changes holds, of which those who are awake see none.
    const MISSED: usize = 1_100;
    const WAKING: usize = 3 * EACH;
    /// More than one that reads on may have missed, and those of whom that is tried.
    const FAR: usize = 5_000;
    const FALLEN: usize = 2 * EACH;
    let data = tempfile::tempdir().unwrap();
    let flags = [
        "serve",
        "--embedding.model_dirs",
        "",
        "--limits.concurrent_requests",
        "20000",
    ];
    let program = Program::start(&built("aeterna"), &flags, data.path()).await;
    let content = |n: usize| format!("news {n} {}", "x".repeat(BYTES));
    let (mut clients, mut asleep, mut awake) = (Vec::new(), Vec::new(), Vec::new());
    for connection in 0..CONNECTIONS {
        let client = MemoryServiceClient::new(program.channel());
        // Ann's are seen by all of them, those of an agent of hers by the sleepers.
        let mut scope = user("ann");
        if connection % 2 == 0 {
            scope.as_mut().unwrap().agent = "late".into();
        }
        let watching = (0..EACH).map(async |_| {
            let request = WatchRequest {
                scope: scope.clone(),
                ..Default::default()
            };
            let opened = client.clone().watch(request).await;
            opened
                .unwrap_or_else(|status| panic!("{status:?}\n{}", program.log()))
                .into_inner()
        });
        let watching = futures::future::join_all(watching).await;
        match connection % 2 {
            0 => asleep.extend(watching),
            _ => awake.extend(watching),
        }
        clients.push(client);
    }
    let before = program.peak_memory();
    let listening: Vec<_> = awake
        .into_iter()
        .map(|mut stream| {
            tokio::spawn(async move {
                for n in 0..CHANGES {
                    let told = next(&mut stream).await.memory.unwrap().content;
                    assert!(told.starts_with(&format!("news {n} ")), "{n}: {}", &told[..20]);
                }
            })
        })
        .collect();
    let mut client = MemoryServiceClient::new(program.channel());
    for n in 0..CHANGES {
        add(&mut client, "ann", &content(n)).await;
    }
    for one in listening {
        one.await.unwrap();
    }
    // One that sleeps takes a message or two, whatever there is to tell.
    let taken = program.peak_memory().saturating_sub(before);
    let all = (asleep.len() * CHANGES * BYTES) as u64;
    assert!(taken < all / 3, "{taken} bytes more, and {all} wait");
    let of_the_agent = |n: usize| {
        let mut request = item("ann", &content(n));
        let scope = &mut request.memory.as_mut().unwrap().scope;
        scope.as_mut().unwrap().agent = "late".into();
        request
    };
    for first in (CHANGES..CHANGES + MISSED).step_by(100) {
        let requests = (first..first + 100).map(of_the_agent).collect();
        let added = client.batch_add(together(requests)).await.unwrap().into_inner();
        assert_eq!(added.results.len(), 100);
    }
    // Those of some connections wake up, far behind the ring, and read on: what others on a connection have not read would keep
    // one of them waiting.
    let ring = program.peak_memory();
    let waking = asleep[..WAKING].iter_mut().map(async |stream| {
        for n in 0..2 * CHANGES {
            let told = next(stream).await.memory.unwrap().content;
            assert!(told.starts_with(&format!("news {n} ")), "{n}: {}", &told[..20]);
        }
    });
    futures::future::join_all(waking).await;
    let taken = program.peak_memory().saturating_sub(ring);
    let all = (WAKING * 32 * BYTES) as u64;
    assert!(
        taken < all / 3,
        "{taken} bytes more for those who read on, and a page of each has {all}"
    );
    // Others have slept for so long that they are told to begin again where they stand. They miss nothing.
    for first in (0..FAR).step_by(1000) {
        let few = |n: usize| {
            let mut request = of_the_agent(0);
            request.memory.as_mut().unwrap().content = format!("little {n}");
            request
        };
        let batch = BatchAddRequest {
            requests: (first..first + 1000).map(few).collect(),
            ..Default::default()
        };
        let added = client.batch_add(batch).await;
        added.unwrap_or_else(|status| panic!("{first}: {status:?}\n{}", program.log()));
    }
    let mut agents = user("ann");
    agents.as_mut().unwrap().agent = "late".into();
    let fallen = asleep[WAKING..WAKING + FALLEN].iter_mut().enumerate();
    let fallen = fallen.map(async |(number, stream)| {
        let (mut told, mut request) = (0, WatchRequest::default());
        request.scope.clone_from(&agents);
        let status = loop {
            match stream.message().await {
                Ok(event) => {
                    let event = event.expect("it ends with a reason");
                    request.resume_token = event.resume_token;
                    told += usize::from(event.memory.is_some());
                }
                Err(status) => break status,
            }
        };
        assert_eq!(refusal(&status).0, "FELL_BEHIND", "{number}: {status:?}");
        // On a connection that nobody sleeps on.
        let mut client = clients[(2 * number + 1) % clients.len()].clone();
        let mut again = client.watch(request).await.unwrap().into_inner();
        let next = next(&mut again).await.memory.unwrap().content;
        assert!(
            next.starts_with(&format!("news {told} ")),
            "{number}: {told}: {}",
            &next[..20]
        );
    });
    futures::future::join_all(fallen).await;
    drop((asleep, clients));
    program.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_who_do_not_read_their_streams_keep_the_store_from_nobody() {
    const CALLERS: usize = 16;
    const COUNT: usize = 200;
    const MANY: usize = 2_000;
    let data = tempfile::tempdir().unwrap();
    let program = Program::start(&built("aeterna"), &["serve", "--embedding.model_dirs", ""], data.path()).await;
    let mut client = MemoryServiceClient::new(program.channel());
    // Pages of a watcher and of an export that are smaller than what a connection takes unread, and end within it.
    for (name, count, step, bytes) in [("ann", COUNT, 100, 20_000), ("carl", MANY, 1000, 200)] {
        for first in (0..count).step_by(step) {
            let requests = (first..first + step).map(|n| item(name, &format!("{n} {}", "x".repeat(bytes))));
            let batch = BatchAddRequest {
                requests: requests.collect(),
                ..Default::default()
            };
            client.batch_add(batch).await.unwrap();
        }
    }
    let (mut exports, mut watches) = (Vec::new(), Vec::new());
    for _ in 0..CALLERS {
        let mut client = MemoryServiceClient::new(program.channel());
        let export = ExportRequest {
            scope: user("carl"),
            ..Default::default()
        };
        exports.push(client.export(export).await.unwrap().into_inner());
        let watch = WatchRequest {
            scope: user("ann"),
            resume_token: "1.0".into(),
            ..Default::default()
        };
        watches.push(client.watch(watch).await.unwrap().into_inner());
    }
    for n in 0..20 {
        add(&mut client, "bob", &format!("meanwhile {n}")).await;
        let list = ListRequest {
            scope: user("bob"),
            ..Default::default()
        };
        let there = client.list(list).await.unwrap().into_inner().memories;
        assert_eq!(there.len(), n + 1);
    }
    // They were not forgotten.
    for (export, watch) in exports.iter_mut().zip(&mut watches).take(2) {
        let mut told = 0;
        while let Some(chunk) = export.message().await.unwrap() {
            told += chunk.memories.len();
        }
        assert_eq!(told, MANY);
        for n in 0..COUNT {
            let content = next(watch).await.memory.unwrap().content;
            assert!(content.starts_with(&format!("{n} ")), "{n}: {}", &content[..20]);
        }
    }
    drop((exports, watches));
    program.stop().await;
}
