//! Two copies of the service on one PostgreSQL.

use std::collections::BTreeSet;
use std::time::Duration;

use aeterna_proto::memory::v1::memory_service_client::MemoryServiceClient;
use aeterna_proto::memory::v1::policy_service_client::PolicyServiceClient;
use aeterna_proto::memory::v1::{
    AddRequest, DeleteRequest, GetRequest, ListPoliciesRequest, ListRequest, Policy, PutPolicyRequest, SearchMode,
    SearchRequest,
};
use aeterna_testkit::{PostgresServer, Program, built};

use crate::notes::{item, user};

async fn copy(server: &PostgresServer, data: &std::path::Path) -> Program {
    copy_on(&format!("postgres:{}", server.uri()), data).await
}

async fn copy_on(store: &str, data: &std::path::Path) -> Program {
    let environment = [("AETERNA_MEMORY_STORE", store), ("AETERNA_MEMORY_STORE_OWNER", "owner")];
    Program::start_with(&built("aeterna"), &["serve"], data, &environment).await
}

#[tokio::test(flavor = "multi_thread")]
async fn two_copies_are_one_service_and_outlive_connections_and_each_other() {
    let server = PostgresServer::start(&[]);
    let directory = tempfile::tempdir().unwrap();
    // Both bring the schema up to date, one at a time.
    let paths = [directory.path().join("a"), directory.path().join("b")];
    let (a, b) = tokio::join!(copy(&server, &paths[0]), copy(&server, &paths[1]));
    let mut clients = [&a, &b].map(|copy| MemoryServiceClient::new(copy.channel()));

    // What one has acknowledged the other one finds, when it is shown the token.
    let added = clients[0]
        .add(item("ann", "the cat is called Max"))
        .await
        .unwrap()
        .into_inner();
    let id = added.memory.unwrap().id;
    let get = GetRequest {
        id: id.clone(),
        consistency_token: added.consistency_token.clone(),
        ..Default::default()
    };
    assert_eq!(clients[1].get(get).await.unwrap().into_inner().memory.unwrap().id, id);
    let search = SearchRequest {
        query: "what is the cat called?".into(),
        scope: user("ann"),
        consistency_token: added.consistency_token,
        ..Default::default()
    };
    let found = clients[1].search(search).await.unwrap().into_inner();
    assert_eq!((found.results.len(), found.degraded), (1, false), "{found:?}");

    // The same said to both at once is one memory, and a caller who repeats does not double, although all connections are cut
    // again and again.
    let cut = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE usename = 'service'";
    let writers: Vec<_> = (0..40)
        .map(|number| {
            let mut client = clients[number % 2].clone();
            let request = AddRequest {
                request_id: format!("r{}", number / 2),
                ..item("bob", &format!("fact {}", number / 2))
            };
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(20 * number as u64)).await;
                for _ in 0..10 {
                    match client.add(request.clone()).await {
                        Ok(_) => return,
                        Err(status) => assert_eq!(status.code(), tonic::Code::Unavailable, "{status:?}"),
                    }
                }
                panic!("the store does not come back");
            })
        })
        .collect();
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_millis(150)).await;
        server.sql("postgres", cut);
    }
    for writer in writers {
        writer.await.unwrap();
    }
    let list = || ListRequest {
        scope: user("bob"),
        page_size: 100,
        ..Default::default()
    };
    let listed = clients[1].list(list()).await.unwrap().into_inner().memories;
    assert_eq!(listed.len(), 20, "{listed:?}");

    // Nor does it become two when nobody numbers his requests and all come at the same moment.
    let callers: Vec<_> = (0..32)
        .map(|number| {
            let mut client = clients[number % 2].clone();
            tokio::spawn(async move { client.add(item("cleo", "the dog is called Moritz")).await })
        })
        .collect();
    let mut ids = BTreeSet::new();
    for caller in callers {
        ids.insert(caller.await.unwrap().unwrap().into_inner().memory.unwrap().id);
    }
    assert_eq!(ids.len(), 1, "{ids:?}");
    // What one copy was told to forbid, the other one knows and tells.
    let mut policies = [&a, &b].map(|copy| PolicyServiceClient::new(copy.channel()));
    for number in 0..10 {
        let put = PutPolicyRequest {
            policy: Some(Policy {
                name: format!("rule-{number}"),
                scope: user("dan"),
                ..Default::default()
            }),
            ..Default::default()
        };
        policies[0].put_policy(put).await.unwrap();
        let list = ListPoliciesRequest {
            page_size: 100,
            ..Default::default()
        };
        let told = policies[1].list_policies(list).await.unwrap().into_inner().policies;
        assert_eq!(told.len(), number + 1);
    }

    // One that is killed takes nothing with it.
    a.kill().await;
    let listed = clients[1].list(list()).await.unwrap().into_inner().memories;
    assert_eq!(listed.len(), 20);
    clients[1].add(item("bob", "one more")).await.unwrap();
    assert_eq!(b.stop().await, Some(0));
}

/// Without a synchronous standby a primary may take its last changes with it, a deletion for instance.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_deleted_only_on_a_lost_primary_is_found_again() {
    let mut primary = PostgresServer::start(&["fsync=off"]);
    let standby = primary.standby(&["fsync=off"]);
    let directory = tempfile::tempdir().unwrap();
    let hosts = [primary.port, standby.port].map(|port| format!("127.0.0.1:{port}"));
    let store = format!("postgres://service@{}/aeterna", hosts.join(","));
    let program = copy_on(&store, directory.path()).await;
    let mut client = MemoryServiceClient::new(program.channel());
    let id = client.add(item("ann", "the cat is called Max")).await.unwrap();
    let id = id.into_inner().memory.unwrap().id;
    let query = SearchRequest {
        query: "the cat is called Max".into(),
        scope: user("ann"),
        mode: SearchMode::Dense.into(),
        ..Default::default()
    };
    assert_eq!(
        client.search(query.clone()).await.unwrap().into_inner().results.len(),
        1
    );
    while standby.sql("aeterna", "SELECT count(*) FROM memories") == "0" {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    standby.leave(&primary).await;
    let delete = DeleteRequest {
        id,
        ..Default::default()
    };
    client.delete(delete).await.unwrap();
    assert!(
        client
            .search(query.clone())
            .await
            .unwrap()
            .into_inner()
            .results
            .is_empty()
    );
    primary.kill();
    standby.sql("postgres", "SELECT pg_promote()");
    for attempt in 0.. {
        // Something new goes on from there.
        let added = client.add(item("ann", &format!("note {attempt}"))).await;
        let found = client.search(query.clone()).await.unwrap().into_inner().results;
        let first = found.first().and_then(|result| result.memory.as_ref());
        if added.is_ok() && first.is_some_and(|memory| memory.content == query.query) {
            break;
        }
        assert!(attempt < 100, "{found:?}\n{}", program.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(program.stop().await, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_moves_to_the_server_and_is_found_there() {
    let server = PostgresServer::start(&[]);
    let directory = tempfile::tempdir().unwrap();
    let (laptop, cluster) = (directory.path().join("laptop"), directory.path().join("cluster"));
    let program = Program::start(&built("aeterna"), &["serve"], &laptop).await;
    let mut client = MemoryServiceClient::new(program.channel());
    let id = client.add(item("ann", "the cat is called Max")).await.unwrap();
    let id = id.into_inner().memory.unwrap().id;
    let migrate = || {
        let store = format!("postgres:{}", server.uri());
        let mut command = std::process::Command::new(built("aeterna"));
        command.args(["migrate", "--memory.store", &store, "--memory.store_owner", "owner"]);
        let output = command.arg("--data-dir").arg(&laptop).output().unwrap();
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        (output.status.success(), text(&output.stdout), text(&output.stderr))
    };
    let (moved, _, refused) = migrate();
    assert!(
        !moved && refused.contains("another process uses the data directory"),
        "{refused}"
    );
    assert_eq!(program.stop().await, Some(0));
    let (moved, said, errors) = migrate();
    assert!(
        moved && said.starts_with("1 tenants: 1 memories, 0 documents, 0 policies"),
        "{said}{errors}"
    );

    let program = copy(&server, &cluster).await;
    let search = SearchRequest {
        query: "what is the cat called?".into(),
        scope: user("ann"),
        ..Default::default()
    };
    let found = MemoryServiceClient::new(program.channel())
        .search(search)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(found.results[0].memory.as_ref().unwrap().id, id);
}
