//! The command line and the programs of single services, as a person or an operator starts them.

use std::path::Path;
use std::process::Output;

use aeterna_auth::Role;
use aeterna_proto::common::v1::Scope;
use aeterna_proto::memory::v1::memory_service_client::MemoryServiceClient;
use aeterna_proto::memory::v1::{AddRequest, Memory, SearchRequest};
use aeterna_testkit::{NEVER, Program, SECRET, bearing, built};

async fn aeterna(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    tokio::process::Command::new(built("aeterna"))
        .args(arguments)
        .envs(environment.iter().copied())
        .output()
        .await
        .unwrap()
}

fn told(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

async fn start(data: &Path, flags: &[&str]) -> (Program, String) {
    let flags = [&["serve", "--log.filter", "warn"][..], flags].concat();
    let program = Program::start(&built("aeterna"), &flags, data).await;
    let url = format!("http://{}", program.address);
    (program, url)
}

#[tokio::test]
async fn an_import_names_bad_lines_keeps_the_others_and_goes_on_when_it_is_repeated() {
    let data = tempfile::tempdir().unwrap();
    let (program, url) = start(data.path(), &[]).await;
    let env = [("AETERNA_URL", url.as_str())];
    let file = data.path().join("a.jsonl");
    let good: String = (0..250)
        .map(|n| format!("{{\"content\": \"fact {n}\", \"tags\": [\"x\"]}}\n"))
        .collect();
    let bad = "{\"content\": \"\"}\n{\"contents\": \"typo\"}\n{\"content\": \"a\", \"importance\": 7}\n";
    std::fs::write(&file, format!("{good}{bad}")).unwrap();
    let file = file.to_str().unwrap();

    let refused = told(&aeterna(&["import", file, "--scope", "planet=earth"], &env).await);
    assert!(refused.contains("there is no layer `planet`"), "{refused}");
    let first = aeterna(&["import", file, "--scope", "user=ann"], &env).await;
    let text = told(&first);
    assert!(
        !first.status.success() && text.contains("250 new, 0 there already, 3 refused"),
        "{text}"
    );
    for word in [
        "line 251: `memory.content` is empty",
        "line 252",
        "contents",
        "line 253: `memory.importance` is 7",
    ] {
        assert!(text.contains(word), "{word}: {text}");
    }
    // Killed in the middle or repeated: nothing twice, nothing lost.
    let again = told(&aeterna(&["import", file, "--scope", "user=ann"], &env).await);
    assert!(again.contains("0 new, 250 there already, 3 refused"), "{again}");

    let id = {
        let listed = aeterna(&["list", "--json", "--limit", "1"], &env).await;
        let listed: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap();
        listed["memories"][0]["id"].as_str().unwrap().to_owned()
    };
    assert!(told(&aeterna(&["get", &id], &env).await).contains("fact"));
    assert!(told(&aeterna(&["delete", &id], &env).await).contains("deleted: "));
    let gone = aeterna(&["get", &id], &env).await;
    assert!(
        !gone.status.success() && told(&gone).contains("there is no memory"),
        "{}",
        told(&gone)
    );
    assert!(told(&aeterna(&["get", &id, "--deleted"], &env).await).contains("deleted"));
    let history = told(&aeterna(&["history", &id], &env).await);
    assert!(history.contains("deleted") && history.contains("added"), "{history}");
    let stats = told(&aeterna(&["stats"], &env).await);
    assert!(
        stats.contains("user") && stats.contains("249") && stats.contains("deleted: 1"),
        "{stats}"
    );
    let mut watch = tokio::process::Command::new(built("aeterna"))
        .args(["watch", "--resume", "1.0"])
        .envs(env)
        .stdout(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let lines = tokio::io::BufReader::new(watch.stdout.take().unwrap());
    let line = tokio::io::AsyncBufReadExt::lines(lines)
        .next_line()
        .await
        .unwrap()
        .unwrap();
    assert!(line.starts_with("added: ") && line.ends_with("fact 0"), "{line}");
    watch.kill().await.unwrap();
    assert!(told(&aeterna(&["delete", "--purge", &id], &env).await).contains("deleted: "));
    assert!(!aeterna(&["get", &id, "--deleted"], &env).await.status.success());
    assert_eq!(program.stop().await, Some(0));
    let away = told(&aeterna(&["list"], &env).await);
    assert!(
        away.contains("can't be reached") && away.contains("aeterna serve"),
        "{away}"
    );
}

#[tokio::test]
async fn an_import_waits_for_a_server_that_is_killed_and_started_again() {
    let data = tempfile::tempdir().unwrap();
    let flags = ["--limits.message_bytes", "8388608"];
    let (program, url) = start(data.path(), &flags).await;
    let file = data.path().join("a.jsonl");
    let lines: String = (0..4000)
        .map(|n| format!("{{\"content\": \"fact {n}\", \"scope\": {{\"team\": \"t\"}}}}\n"))
        .collect();
    std::fs::write(&file, lines).unwrap();
    let path = file.to_str().unwrap().to_owned();
    let import = {
        let url = url.clone();
        tokio::spawn(async move { aeterna(&["import", &path], &[("AETERNA_URL", &url)]).await })
    };
    // Some of it is there, then the server is gone.
    let mut client = MemoryServiceClient::new(program.channel());
    while client
        .list(aeterna_proto::memory::v1::ListRequest::default())
        .await
        .unwrap()
        .into_inner()
        .memories
        .is_empty()
    {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    let address = program.address.to_string();
    program.kill().await;
    let mut again = tokio::process::Command::new(built("aeterna"))
        .args(["serve", "--listen", &address, "--data-dir"])
        .arg(data.path())
        .kill_on_drop(true)
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let import = import.await.unwrap();
    let text = told(&import);
    assert!(import.status.success() && text.contains("0 refused"), "{text}");
    let numbers: Vec<u64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    assert_eq!(numbers[0] + numbers[1], 4000, "{text}");
    again.kill().await.unwrap();
}

/// All memories of a server.
async fn listed(url: &str) -> serde_json::Value {
    let listed = aeterna(&["list", "--json"], &[("AETERNA_URL", url)]).await;
    let mut listed: serde_json::Value = serde_json::from_slice(&listed.stdout).unwrap();
    listed["memories"].take()
}

#[tokio::test]
async fn memories_move_from_server_to_server_and_from_mem0() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (one, url) = start(here.path(), &[]).await;
    let env = [("AETERNA_URL", url.as_str())];
    let dump = here.path().join("mem0.json");
    let memories = r#"{"results": [
        {"id": "1", "memory": "Ann likes tea", "user_id": "ann", "created_at": "2026-01-02T03:04:05Z", "metadata": {"mood": "calm"}},
        {"id": "2", "memory": "Bob likes coffee", "user_id": "bob"},
        {"id": "3", "memory": "", "user_id": "bob"}]}"#;
    std::fs::write(&dump, memories).unwrap();
    let text = told(&aeterna(&["import", dump.to_str().unwrap()], &env).await);
    assert!(
        text.contains("2 new, 0 there already, 1 refused") && text.contains("item 3"),
        "{text}"
    );
    let before = listed(&url).await;
    assert_eq!(before.as_array().unwrap().len(), 2);
    assert!(
        before.to_string().contains("calm") && before.to_string().contains("\"ann\""),
        "{before}"
    );

    let file = here.path().join("all.jsonl");
    let file = file.to_str().unwrap();
    let export = aeterna(&["export", file, "--history", "--embeddings"], &env).await;
    assert!(export.status.success(), "{}", told(&export));
    one.stop().await;
    let (two, url) = start(there.path(), &[]).await;
    let env = [("AETERNA_URL", url.as_str())];
    let text = told(&aeterna(&["import", file], &env).await);
    assert!(text.contains("2 new, 0 there already, 0 refused"), "{text}");
    assert_eq!(listed(&url).await, before, "as they were");
    let text = told(&aeterna(&["search", "who likes tea?"], &env).await);
    assert!(text.contains("Ann likes tea"), "{text}");

    // What was cut off on the way is noticed.
    let whole = std::fs::read_to_string(file).unwrap();
    let cut = there.path().join("cut.jsonl");
    std::fs::write(&cut, whole.replace("Ann likes tea", "Ann likes rum")).unwrap();
    let import = aeterna(&["import", cut.to_str().unwrap()], &env).await;
    assert!(!import.status.success(), "{}", told(&import));
    std::fs::write(&cut, whole.repeat(2)).unwrap();
    let twice = aeterna(&["import", cut.to_str().unwrap()], &env).await;
    assert!(
        !twice.status.success() && told(&twice).contains("several exports"),
        "{}",
        told(&twice)
    );

    // What was removed for good since comes back with the same file; and exports and imports go through pipes.
    for id in before
        .as_array()
        .unwrap()
        .iter()
        .map(|memory| memory["id"].as_str().unwrap())
    {
        assert!(aeterna(&["delete", "--purge", id], &env).await.status.success());
    }
    assert_eq!(listed(&url).await.as_array().map_or(0, Vec::len), 0);
    let text = told(&aeterna(&["import", file], &env).await);
    assert!(text.contains("2 new, 0 there already, 0 refused"), "{text}");
    let (third, other) = (tempfile::tempdir().unwrap(), url.as_str());
    let (three, url) = start(third.path(), &[]).await;
    let script = "\"$0\" export - --history --embeddings --url \"$1\" | \"$0\" import - --url \"$2\"";
    let piped = tokio::process::Command::new("sh")
        .args(["-c", script])
        .args([built("aeterna").as_os_str(), other.as_ref(), url.as_ref()])
        .output()
        .await
        .unwrap();
    assert!(
        told(&piped).contains("2 new, 0 there already, 0 refused"),
        "{}",
        told(&piped)
    );
    assert_eq!(listed(&url).await, before);
    three.stop().await;
    // On a full disk it is not said that all went well.
    let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
    let told = tokio::process::Command::new(built("aeterna"))
        .args(["list", "--json", "--url", other])
        .stdout(full)
        .status();
    assert_eq!(told.await.unwrap().code(), Some(1));
    two.stop().await;
}

#[tokio::test]
async fn services_run_apart_with_one_secret() {
    let (one, two, keys) = (
        tempfile::tempdir().unwrap(),
        tempfile::tempdir().unwrap(),
        tempfile::tempdir().unwrap(),
    );
    let secret = keys.path().join("secret");
    std::fs::write(&secret, format!("{SECRET}\n")).unwrap();
    let secret = secret.to_str().unwrap();
    let auth = ["--auth.hs256_secret_file", secret];
    let (embedding, url) = start(one.path(), &[&["--roles", "embedding"][..], &auth].concat()).await;
    // The thin binary of a service takes the same settings.
    let flags = [&["--memory.embedding", &url, "--log.filter", "warn"][..], &auth].concat();
    let memory = Program::start(&built("aeterna-memory"), &flags, two.path()).await;

    let token = aeterna(
        &[
            "token",
            "--tenant",
            "acme",
            "--within",
            "user=ann",
            "--auth.hs256_secret_file",
            secret,
        ],
        &[],
    )
    .await;
    let token = String::from_utf8(token.stdout).unwrap();
    let mut client = MemoryServiceClient::new(memory.channel());
    let scope = Some(Scope {
        user: "ann".into(),
        ..Default::default()
    });
    let request = AddRequest {
        memory: Some(Memory {
            scope: scope.clone(),
            content: "Ann adopted a grey cat".into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    assert!(client.add(request.clone()).await.is_err(), "no token, no entrance");
    let added = client
        .add(bearing(request.clone(), token.trim()))
        .await
        .unwrap()
        .into_inner()
        .memory
        .unwrap();
    assert_eq!(added.embedding_model, "hash");
    let query = SearchRequest {
        scope: scope.clone(),
        query: "cat".into(),
        ..Default::default()
    };
    let found = client
        .search(bearing(query.clone(), token.trim()))
        .await
        .unwrap()
        .into_inner();
    assert!(!found.degraded && found.results[0].memory.as_ref().unwrap().id == added.id);

    // The embedding service goes away: writes and searches go on with less, and the vector is made up after its return,
    // with a token that the memory service signs itself.
    let address = embedding.address.to_string();
    embedding.kill().await;
    let mut later = request;
    later.memory.as_mut().unwrap().content = "Ann sold her car".into();
    let pending = client
        .add(bearing(later, token.trim()))
        .await
        .unwrap()
        .into_inner()
        .memory
        .unwrap();
    assert_eq!(pending.embedding_model, "");
    let found = client.search(bearing(query, token.trim())).await.unwrap().into_inner();
    assert!(
        found.degraded && found.results[0].memory.as_ref().unwrap().id == added.id,
        "{found:?}"
    );
    let mut again = tokio::process::Command::new(built("aeterna-embedding"))
        .args(["--listen", &address, "--data-dir"])
        .arg(one.path())
        .args(auth)
        .kill_on_drop(true)
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let own = aeterna_testkit::token("acme", Role::Reader, &[], NEVER);
    for attempt in 0.. {
        let query = SearchRequest {
            scope: scope.clone(),
            query: "car".into(),
            mode: 3,
            ..Default::default()
        };
        let found = client.search(bearing(query, &own)).await.unwrap().into_inner();
        let there = found
            .results
            .iter()
            .any(|result| result.memory.as_ref().unwrap().id == pending.id);
        if !found.degraded && there {
            break;
        }
        assert!(attempt < 200, "the vector is not made up: {found:?}\n{}", memory.log());
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    again.kill().await.unwrap();
    assert_eq!(memory.stop().await, Some(0));

    // A memory service that starts while the embedding service is away serves what it can.
    let memory = Program::start(&built("aeterna-memory"), &flags, two.path()).await;
    let mut client = MemoryServiceClient::new(memory.channel());
    let query = SearchRequest {
        scope,
        query: "car".into(),
        ..Default::default()
    };
    let found = client.search(bearing(query, &own)).await.unwrap().into_inner();
    assert!(
        found.degraded && found.results[0].memory.as_ref().unwrap().id == pending.id,
        "{found:?}"
    );
    assert_eq!(memory.stop().await, Some(0));
}

#[tokio::test]
async fn mistakes_in_the_configuration_are_told_together_and_before_anything_starts() {
    let flags = [
        "config",
        "check",
        "--memory.readers",
        "65",
        "--server.drain",
        "soon",
        "--memory.store",
        "oracle:x",
    ];
    let output = aeterna(&flags, &[("AETERNA_LOG_FROMAT", "json")]).await;
    let text = told(&output);
    assert!(
        !output.status.success() && text.contains("AETERNA_LOG_FROMAT"),
        "{text}"
    );
    let output = aeterna(&flags, &[]).await;
    let text = told(&output);
    for key in ["memory.readers", "server.drain", "memory.store"] {
        assert!(text.contains(key), "{key}: {text}");
    }
    let output = aeterna(&["serve", "--listen", "0.0.0.0:0"], &[]).await;
    assert!(
        !output.status.success() && told(&output).contains("no authentication is configured"),
        "{}",
        told(&output)
    );
    let output = aeterna(&["serve", "--roles", "memory"], &[]).await;
    assert!(
        told(&output).contains("the embedding service is not among the roles"),
        "{}",
        told(&output)
    );
    let output = aeterna(&["config", "dump", "--auth.hs256_secret", SECRET], &[]).await;
    let text = told(&output);
    assert!(
        text.contains("hs256_secret = \"***\"  # flag") && !text.contains(SECRET),
        "{text}"
    );
}
