//! The highly-available stores, broken under load.

use std::collections::BTreeMap;

use aeterna_lab::Drill;
use aeterna_proto::memory::v1::memory_service_client::MemoryServiceClient;
use aeterna_testkit::lab::{Extent, Lab, Part, Scratch, Setup, secrets};
use aeterna_testkit::{Program, built, cache};

use crate::notes::item;

#[tokio::test(flavor = "multi_thread")]
async fn no_acknowledged_write_is_lost_when_nodes_and_copies_are_killed() {
    let programs = BTreeMap::from([
        ("envoy".to_owned(), cache().join("tools/bin/envoy")),
        ("patroni".to_owned(), cache().join("tools/patroni")),
        ("embedding".to_owned(), built("aeterna-embedding")),
        ("memory".to_owned(), built("aeterna-memory")),
    ]);
    let place = Scratch::new();
    let setup = Setup::of(Extent::All, programs);
    let lab = Lab::up(place.path(), setup, |step| eprintln!("{step}")).await.unwrap();
    // One that knows no node, but HAProxy.
    let (data, directory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (store, gateway) = (lab.proxied_store(), lab.address());
    let environment = [
        ("AETERNA_MEMORY_STORE", store.as_str()),
        ("AETERNA_MEMORY_EMBEDDING", &gateway),
    ];
    let proxied = Program::start_with(&built("aeterna-memory"), &[], data.path(), &environment).await;
    let mut proxied = MemoryServiceClient::new(proxied.channel());
    for drill in [Drill::PrimaryKilled, Drill::RedisMasterKilled, Drill::ServiceKilled] {
        let report = aeterna_lab::run(&lab, drill, |step| eprintln!("{step}")).await.unwrap();
        assert!(report.verdict.is_clean(), "{report:?}");
        let added = proxied.add(item("ann", &format!("after {}", report.drill))).await;
        added.unwrap();
    }
    // The streams still tell all that the store has, and an index can be filled from it while the services run.
    let mut reconcile = tokio::process::Command::new(built("aeterna"));
    reconcile.args(["reconcile", "--memory.store", &store, "--memory.live", &lab.live()]);
    reconcile.env("AETERNA_MEMORY_LIVE_PASSWORD", secrets::REDIS);
    reconcile.env("AETERNA_MEMORY_LIVE_SENTINEL_PASSWORD", secrets::SENTINELS);
    let said = reconcile
        .arg("--data-dir")
        .arg(directory.path())
        .output()
        .await
        .unwrap();
    let (output, errors) = (
        String::from_utf8_lossy(&said.stdout),
        String::from_utf8_lossy(&said.stderr),
    );
    assert!(said.status.success(), "{output}{errors}");
    let count = |line: usize| {
        let word = output.lines().nth(line).and_then(|line| line.split(' ').next());
        word.and_then(|word| word.parse::<u64>().ok()).unwrap_or(0)
    };
    assert!(
        count(0) > 100 && count(1) > 100 && output.contains(": 0 were missing or no changes"),
        "{output}"
    );
    // What it is while all is well, a person sees too.
    let members = lab.status().await;
    let away: Vec<_> = members.iter().filter(|member| !member.well).collect();
    assert!(away.is_empty(), "{away:?}");
    let copy = members.iter().find(|member| member.name == "memory1").unwrap();
    assert!(copy.remark.contains("live 0.0 s behind"), "{copy:?}");
    // Nothing is left of it; a process that has ended and that nobody has asked about has no command line.
    let all = members.iter().flat_map(|member| lab.pids(&member.name, Part::All));
    let all: Vec<u32> = all.collect();
    lab.down().unwrap();
    assert!(!place.path().exists() && all.len() > 20, "{all:?}");
    for pid in all {
        let command = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        assert_eq!(command, "", "{pid} is left");
    }
}
