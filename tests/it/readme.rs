//! The README's examples: each command is run against a real server, and its answer must come back word for word.
//! What differs from run to run (ids, etags, times) is written as it was once, and compared by its form.

use std::fmt::Write as _;
use std::path::Path;
use std::process::Stdio;

use aeterna_testkit::{Program, built, cache, minilm};

/// A command of a `console` block and the answer under it.
#[derive(Debug, PartialEq)]
struct Example {
    command: String,
    answer: String,
    /// Both, as they stand on the page.
    text: String,
}

fn examples(page: &str) -> Vec<Example> {
    let mut found: Vec<Example> = Vec::new();
    let mut inside = false;
    for line in page.lines() {
        match line {
            "```console" => inside = true,
            "```" => inside = false,
            _ if !inside => {}
            _ => match (line.strip_prefix("$ "), found.last_mut()) {
                (Some(command), _) => found.push(Example {
                    command: command.into(),
                    answer: String::new(),
                    text: format!("{line}\n"),
                }),
                (None, Some(last)) if last.command.ends_with('\\') => {
                    last.command.pop();
                    let _ = write!(last.command, " {}", line.trim());
                    let _ = writeln!(last.text, "{line}");
                }
                (None, Some(last)) => {
                    let _ = writeln!(last.answer, "{line}");
                    let _ = writeln!(last.text, "{line}");
                }
                (None, None) => panic!("an answer without a command: {line}"),
            },
        }
    }
    found
}

/// Hexadecimal digits of ids and etags, and digits of times, become the same sign.
fn masked(answer: &str) -> String {
    let is_token = |word: &str| {
        let hex = |c: char| c.is_ascii_hexdigit() || c == '-';
        let id = word.len() == 36 && word.chars().all(hex);
        let etag = word.len() == 16 && word.chars().all(|c| c.is_ascii_hexdigit());
        let time = word.len() >= 20 && word.ends_with('Z') && word.contains('T') && word.starts_with("20");
        id || etag || time
    };
    let mut out = String::new();
    let mut word = String::new();
    for c in answer.chars().chain(['\n']) {
        if c.is_ascii_alphanumeric() || "-:.".contains(c) {
            word.push(c);
            continue;
        }
        // A time that something happened long ago is no accident; only those of this run differ.
        let old = word.starts_with("2025-") || word.starts_with("2023-");
        out.push_str(if is_token(&word) && !old { "…" } else { &word });
        word.clear();
        out.push(c);
    }
    out.trim_end().to_owned()
}

/// Runs a script beside a server, in a directory: whether it succeeded, and what it said.
async fn run(script: &str, program: &Program, directory: &Path) -> (bool, String) {
    let path = format!(
        "{}:{}:{}",
        cache().join("tools/bin").display(),
        built("aeterna").parent().unwrap().display(),
        std::env::var("PATH").unwrap()
    );
    let output = tokio::process::Command::new("bash")
        .args(["-e", "-c", script])
        .current_dir(directory)
        .env("PATH", path)
        .env("AETERNA_URL", format!("http://{}", program.address))
        .stdin(Stdio::null())
        .output()
        .await
        .unwrap();
    let told = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    (output.status.success(), told.concat())
}

/// The blocks of a page in a language.
fn blocks<'a>(page: &'a str, language: &str) -> Vec<&'a str> {
    let begin = format!("```{language}\n");
    let after = page.split(begin.as_str()).skip(1);
    after.map(|rest| rest.split("```").next().unwrap()).collect()
}

#[tokio::test]
async fn what_the_page_on_memory_says_can_be_done() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/memory.md");
    let page = std::fs::read_to_string(page).unwrap();
    let [data, here] = [0; 2].map(|_| tempfile::tempdir().unwrap());
    let flags = ["serve", "--embedding.model_dirs", ""];
    let program = Program::start(&built("aeterna"), &flags, data.path()).await;
    let dump = r#"{"results": [{"memory": "Ann lives in Turin", "user_id": "ann"}]}"#;
    std::fs::write(here.path().join("mem0.json"), dump).unwrap();
    // What the page says at its beginning.
    let mut shorter = "call() { grpcurl -plaintext \"$@\"; }\n".to_owned();
    for (short, service) in [("M", "Memory"), ("K", "Knowledge"), ("P", "Policy")] {
        let alias = format!("{short}=aeterna.memory.v1.{service}Service");
        assert!(page.contains(&alias), "{alias}");
        shorter += &format!("{alias}\n");
    }
    let scripts = blocks(&page, "sh");
    assert!(scripts.len() >= 3, "{scripts:?}");
    for script in scripts {
        let script = script.replace("127.0.0.1:7700", &program.address.to_string());
        let (done, told) = run(&format!("{shorter}{script}"), &program, here.path()).await;
        assert!(done, "{script}{told}");
    }
    let filters = page.split("| wanted | filter |").nth(1).unwrap();
    let filters = filters.split("\n\n").next().unwrap();
    let filters: Vec<&str> = filters.split('`').skip(1).step_by(2).collect();
    assert!(filters.len() >= 8, "{filters:?}");
    for filter in filters {
        let (done, told) = run(&format!("aeterna list --filter '{filter}'"), &program, here.path()).await;
        assert!(done, "{filter}: {told}");
    }
    assert_eq!(program.stop().await, Some(0));
}

#[tokio::test]
async fn the_readme_tells_what_a_server_answers() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut page = std::fs::read_to_string(root.join("README.md")).unwrap();
    let examples = examples(&page);
    assert!(examples.len() >= 6, "the README has examples: {examples:?}");
    let data = tempfile::tempdir().unwrap();
    let model = minilm();
    let flags = ["serve", "--embedding.model_dirs", model.to_str().unwrap()];
    let binary = built("aeterna");
    let program = Program::start(&binary, &flags, data.path()).await;
    let update = std::env::var_os("UPDATE_DOCS").is_some();
    for Example { command, answer, text } in examples {
        let here = command.replace("127.0.0.1:7700", &program.address.to_string());
        let (_, told) = run(&here, &program, &root).await;
        if update && masked(&told) != masked(&answer) {
            let asked = text.strip_suffix(&answer).unwrap();
            page = page.replacen(&text, &format!("{asked}{told}"), 1);
        } else if !update {
            assert_eq!(masked(&told), masked(&answer), "`{command}` answers:\n{told}");
        }
    }
    if update {
        std::fs::write(root.join("README.md"), page).unwrap();
    }
    assert_eq!(program.stop().await, Some(0));
}

#[test]
fn commands_and_answers_are_told_apart() {
    let page = "text\n```console\n$ a \\\n    b\none\ntwo\n$ c\n```\nmore\n```sh\nmake run\n```\n";
    let wanted = [("a  b", "one\ntwo\n", "$ a \\\n    b\none\ntwo\n"), ("c", "", "$ c\n")];
    let wanted = wanted.map(|(command, answer, text)| Example {
        command: command.into(),
        answer: answer.into(),
        text: text.into(),
    });
    assert_eq!(examples(page), wanted);
    assert_eq!(
        masked("\"id\": \"01a20f6d-ec67-7fb3-8cdf-a7459638ea31\""),
        "\"id\": \"…\""
    );
    assert_eq!(masked("2023-05-08T13:56:00Z 0.5"), "2023-05-08T13:56:00Z 0.5");
}
