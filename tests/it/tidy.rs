//! What the compiler can't see about the shape of the workspace: which crate may know which, where a technology may be
//! named, and what must not land. Each failure says what to do. The scans go by line and are crude on purpose.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, iter};

use serde_json::Value;

/// A lib depends on libs of a lower rank only. A new lib takes the lowest rank above everything it needs.
const LIB_RANKS: &[(&str, u8)] = &[
    ("aeterna-proto", 0),
    ("aeterna-types", 0),
    ("aeterna-error", 1),
    ("aeterna-config", 2),
    ("aeterna-telemetry", 2),
    ("aeterna-text", 2),
    ("aeterna-vector", 2),
    ("aeterna-auth", 3),
    ("aeterna-llm", 4),
    ("aeterna-rpc", 4),
    ("aeterna-storage", 4),
    (TESTKIT, 5),
];
const TESTKIT: &str = "aeterna-testkit";
const COMPOSITION_ROOT: &str = "aeterna";
/// What every service but the composition root has in its src.
const ROOMS: &str = "lib.rs main.rs grpc.rs convert.rs error.rs metrics.rs store.rs app";
const WIRE: &[&str] = &["tonic::", "prost"];
const WIRE_ROOMS: &[&str] = &["grpc", "convert", "lib", "main"];
const DRIVERS: &[&str] = &["sqlx::", "qdrant_client::", "deadpool_redis::"];
const LONGEST_FILE: usize = 700;
const LONGEST_MAIN: usize = 25;

struct Package {
    name: String,
    /// Relative to the workspace root, like `libs/types`.
    dir: String,
    /// Name and kind (`normal`, `dev`, `build`) of every dependency.
    dependencies: Vec<(String, String)>,
}

impl Package {
    fn is_lib(&self) -> bool {
        self.dir.starts_with("libs/")
    }

    /// The composition root, which knows all services, is none itself.
    fn is_service(&self) -> bool {
        self.dir.starts_with("services/") && self.name != COMPOSITION_ROOT
    }

    fn is_harness(&self) -> bool {
        matches!(self.dir.as_str(), "tests" | "bench" | "lab")
    }
}

/// A file: its path relative to the workspace root, and its text.
type File = (String, String);

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn stdout_of(program: &str, args: &str) -> Vec<u8> {
    let mut command = Command::new(program);
    let output = command.args(args.split(' ')).current_dir(root()).output();
    let output = output.unwrap_or_else(|error| panic!("start `{program}`: {error}"));
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "`{program} {args}` failed: {complaint}");
    output.stdout
}

fn packages() -> Vec<Package> {
    let args = "metadata --format-version 1 --locked --offline --no-deps";
    let metadata = stdout_of(env!("CARGO"), args);
    let metadata: Value = serde_json::from_slice(&metadata).expect("cargo metadata is JSON");
    let list = |value: &Value| value.as_array().expect("the field is a list").clone();
    let text = |value: &Value| value.as_str().expect("the field is a string").to_owned();
    let workspace = text(&metadata["workspace_root"]);
    let dependency = |of: &Value| (text(&of["name"]), of["kind"].as_str().unwrap_or("normal").to_owned());
    let mut found = Vec::new();
    for package in list(&metadata["packages"]) {
        let manifest = text(&package["manifest_path"]);
        let dir = manifest.trim_start_matches(&workspace).trim_end_matches("Cargo.toml");
        found.push(Package {
            name: text(&package["name"]),
            dir: dir.trim_matches('/').to_owned(),
            dependencies: list(&package["dependencies"]).iter().map(dependency).collect(),
        });
    }
    found
}

fn read(path: &str) -> String {
    let bytes = fs::read(root().join(path)).unwrap_or_else(|error| panic!("read `{path}`: {error}"));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Every file that is, or could be, under version control.
fn files() -> Vec<File> {
    let listing = stdout_of("git", "ls-files -z --cached --others --exclude-standard");
    let listing = String::from_utf8(listing).expect("file names are UTF-8");
    let paths = listing.split('\0').filter(|path| root().join(path).is_file());
    paths.map(|path| (path.to_owned(), read(path))).collect()
}

fn rust_files() -> Vec<File> {
    files().into_iter().filter(|(path, _)| path.ends_with(".rs")).collect()
}

/// The sources of the packages that `wanted` names, without tests (from the first `cfg(test)` of a file on) and with
/// comments blanked, so that lines keep their number.
fn production(wanted: impl Fn(&Package) -> bool) -> Vec<File> {
    let mut packages = packages();
    packages.retain(wanted);
    let mut files = rust_files();
    files.retain(|(path, _)| {
        let is_test = ["/tests.rs", "/tests/", "/conformance.rs", "/conformance/"]
            .iter()
            .any(|name| path.contains(name));
        !is_test && packages.iter().any(|p| path.starts_with(&format!("{}/src/", p.dir)))
    });
    for (_, text) in &mut files {
        let code = text.lines().take_while(|line| !line.trim().starts_with("#[cfg(test)]"));
        let code = code.map(|line| if line.trim().starts_with("//") { "" } else { line });
        *text = code.collect::<Vec<_>>().join("\n");
    }
    files
}

/// `grpc` for both `services/x/src/grpc.rs` and `services/x/src/grpc/search.rs`.
fn room(path: &str) -> &str {
    let inside = path.split_once("/src/").map_or(path, |(_, inside)| inside);
    inside.split(['/', '.']).next().unwrap_or(inside)
}

fn holds(line: &str, words: &[&str]) -> bool {
    words.iter().any(|word| line.contains(word))
}

fn refuse(found: impl IntoIterator<Item = String>, what_to_do: &str) {
    let found: BTreeSet<String> = found.into_iter().collect();
    let list = found.iter().map(|item| format!("\n  {item}"));
    assert!(found.is_empty(), "{what_to_do}:{}", list.collect::<String>());
}

fn refuse_lines(files: &[File], bad: impl Fn(&str, &str) -> bool, what_to_do: &str) {
    let mut found = Vec::new();
    for (path, text) in files {
        let lines = iter::zip(1.., text.lines()).filter(|(_, line)| bad(path, line));
        found.extend(lines.map(|(number, line)| format!("{path}:{number}: {}", line.trim())));
    }
    refuse(found, what_to_do);
}

/// Refuses dependencies between packages of the workspace: `bad` gets from, to and the dependency's kind.
fn refuse_arrows(bad: impl Fn(&Package, &Package, &str) -> bool, what_to_do: &str) {
    let packages = packages();
    let mut found = Vec::new();
    for from in &packages {
        for (name, kind) in &from.dependencies {
            if packages.iter().any(|to| to.name == *name && bad(from, to, kind)) {
                found.push(format!("{} -> {name} ({kind})", from.name));
            }
        }
    }
    refuse(found, what_to_do);
}

#[test]
fn packages_are_named_after_their_directory() {
    let expected = |dir: &str| match dir {
        "services/aeterna" => COMPOSITION_ROOT.to_owned(),
        "tests" => "aeterna-it".to_owned(),
        _ => format!("aeterna-{}", dir.rsplit('/').next().unwrap_or(dir)),
    };
    let odd = packages().into_iter().filter(|p| p.name != expected(&p.dir));
    let odd = odd.map(|p| format!("{} in {}, want {}", p.name, p.dir, expected(&p.dir)));
    refuse(odd, "rename the package, so that its name tells its place");
}

#[test]
fn libs_do_not_depend_on_services() {
    let advice = "move what the lib needs down into a lib, or let the caller pass it in";
    refuse_arrows(|from, to, _| from.is_lib() && to.dir.starts_with("services/"), advice);
}

#[test]
fn services_meet_in_the_protocol_only() {
    let advice = "call the other service through its generated client, as a peer (aeterna-rpc)";
    refuse_arrows(|from, to, _| from.is_service() && to.is_service(), advice);
}

#[test]
fn only_tests_and_bench_depend_on_the_composition_root() {
    let advice = "only tests/, bench/ and lab/ start the whole program: take what you need from a lib";
    refuse_arrows(|from, to, _| to.name == COMPOSITION_ROOT && !from.is_harness(), advice);
}

#[test]
fn the_testkit_is_a_dev_dependency() {
    let shipped = |from: &Package, kind: &str| kind != "dev" && !from.is_harness();
    let advice = "put the testkit under [dev-dependencies]";
    refuse_arrows(|from, to, kind| to.name == TESTKIT && shipped(from, kind), advice);
}

#[test]
fn libs_depend_on_lower_libs() {
    let ranks: BTreeMap<&str, u8> = LIB_RANKS.iter().copied().collect();
    let unknown = packages().into_iter().filter(Package::is_lib).map(|p| p.name);
    let unknown = unknown.filter(|name| !ranks.contains_key(name.as_str()));
    refuse(unknown, "give the new lib a rank in LIB_RANKS (tests/it/tidy.rs)");
    let rises = |from: &Package, to: &Package| ranks[from.name.as_str()] <= ranks[to.name.as_str()];
    let advice = "arrows point down: move the shared part into a lower lib (LIB_RANKS in tests/it/tidy.rs)";
    let bad = |from: &Package, to: &Package| from.is_lib() && to.is_lib() && rises(from, to);
    refuse_arrows(|from, to, kind| kind != "dev" && bad(from, to), advice);
}

#[test]
fn every_service_has_the_same_rooms() {
    let mut found = Vec::new();
    for service in packages().into_iter().filter(Package::is_service) {
        let src = format!("{}/src", service.dir);
        let missing = ROOMS.split(' ').filter(|room| !root().join(&src).join(room).exists());
        found.extend(missing.map(|room| format!("{src}/{room} is missing")));
    }
    refuse(found, "lay the service out like the others (ARCHITECTURE.md)");
}

#[test]
fn the_mains_of_services_are_short() {
    let mut mains = production(Package::is_service);
    mains.retain(|(path, text)| path.ends_with("/src/main.rs") && text.lines().count() > LONGEST_MAIN);
    let advice = format!("move what main does into the service's lib.rs (at most {LONGEST_MAIN} lines)");
    refuse(mains.into_iter().map(|(path, _)| path), &advice);
}

#[test]
fn the_wire_stays_at_the_door() {
    let bad = |path: &str, line: &str| holds(line, WIRE) && !WIRE_ROOMS.contains(&room(path));
    let advice = "name tonic and prost in grpc.rs and convert.rs only: the rest speaks domain types";
    refuse_lines(&production(Package::is_service), bad, advice);
}

#[test]
fn drivers_stay_in_the_stores() {
    let bad = |path: &str, line: &str| holds(line, DRIVERS) && room(path) != "store";
    let advice = "name a driver in store.rs and store/ only: the rest speaks to the port";
    refuse_lines(&production(Package::is_service), bad, advice);
}

#[test]
fn errors_know_the_error_crate_only() {
    let bad = |path: &str, line: &str| room(path) == "error" && line.replace("aeterna_error", "").contains("aeterna_");
    let advice = "an error says what a caller can do: of our crates error.rs names aeterna_error only";
    refuse_lines(&production(Package::is_service), bad, advice);
}

#[test]
fn files_stay_readable() {
    let mut long = rust_files();
    long.retain(|(_, text)| text.lines().count() > LONGEST_FILE);
    let advice = format!("split the file by what changes together (at most {LONGEST_FILE} lines)");
    refuse(long.into_iter().map(|(path, _)| path), &advice);
}

#[test]
fn nothing_unfinished_lands() {
    // In pieces, so that this file is scanned like any other.
    let unfinished = "to do!(|unimple mented!(|db g!(|FIX ME|#[ig nore".replace(' ', "");
    let unfinished: Vec<&str> = unfinished.split('|').collect();
    let later = concat!("TO", "DO");
    let has_reason = |rest: &str| rest.starts_with('(') && !rest.starts_with("()") && rest.contains(')');
    let vague = |line: &str| line.split(later).skip(1).any(|rest| !has_reason(rest));
    let advice = format!("finish it, remove it, or say what it waits for as {later}(reason)");
    let bad = |_: &str, line: &str| holds(line, &unfinished) || vague(line);
    refuse_lines(&rust_files(), bad, &advice);
}

#[test]
fn production_code_does_not_unwrap() {
    let shipped = |p: &Package| p.dir.starts_with("services/") || p.is_lib() && p.name != TESTKIT;
    let terse = |call: &str| !call.split('"').next().unwrap_or(call).trim().contains(' ');
    let bad = |_: &str, line: &str| line.contains(".unwrap()") || line.split(".expect(\"").skip(1).any(terse);
    let advice = "return an error, or write expect(\"why this can't fail\")";
    refuse_lines(&production(shipped), bad, advice);
}

#[test]
fn versions_live_in_the_workspace_table() {
    let mut found = Vec::new();
    for manifest in packages().into_iter().map(|p| format!("{}/Cargo.toml", p.dir)) {
        let (mut is_table, mut brackets) = (false, 0);
        for line in read(&manifest).lines().map(|line| line.replace([' ', '\t'], "")) {
            let starts_here = brackets == 0 && !line.starts_with('#');
            if starts_here && line.starts_with('[') {
                is_table = line.ends_with("dependencies]");
                found.extend(line.contains("dependencies.").then(|| format!("{manifest}: {line}")));
                continue;
            }
            let inherits = line.contains("workspace=true") && !line.contains("version=");
            if is_table && starts_here && line.contains('=') && !inherits {
                found.push(format!("{manifest}: {line}"));
            }
            brackets += line.matches('[').count() as i32 - line.matches(']').count() as i32;
        }
    }
    let advice = "put the version into [workspace.dependencies] and write `name.workspace = true` here";
    refuse(found, advice);
}

#[test]
fn no_file_names_a_private_path() {
    let roots = [concat!("/wo", "rk/"), concat!("/fa", "rm/")];
    let is_name = |rest: &str| rest.starts_with(|next: char| next.is_ascii_lowercase() || next == '.');
    let bad = |_: &str, line: &str| roots.iter().any(|root| line.split(root).skip(1).any(is_name));
    let advice = "name a path relative to the repository, or take it from the configuration";
    refuse_lines(&files(), bad, advice);
}

#[test]
fn every_proto_package_has_a_definition() {
    let areas = fs::read_dir(root().join("proto/aeterna")).expect("proto/aeterna holds the definitions");
    let packages = areas.flatten().map(|area| area.path().join("v1"));
    let is_empty = |v1: &PathBuf| {
        let mut entries = fs::read_dir(v1).into_iter().flatten().flatten();
        v1.is_dir() && !entries.any(|entry| entry.path().extension().is_some_and(|ext| ext == "proto"))
    };
    let advice = "define the package, or remove the directory until there is something to define";
    refuse(packages.filter(is_empty).map(|v1| v1.display().to_string()), advice);
}

#[test]
fn every_make_target_has_a_help_text() {
    let is_name = |name: &str| !name.is_empty() && name.chars().all(|c| c.is_ascii_lowercase() || c == '-');
    let is_target = |(name, rest): (&str, &str)| is_name(name) && !rest.starts_with('=');
    let is_rule = |line: &str| line.split_once(':').is_some_and(is_target);
    let makefile = [("Makefile".to_owned(), read("Makefile"))];
    let targets = makefile[0].1.lines().filter(|line| is_rule(line)).count();
    assert!(targets > 0, "no target found: did the layout of the Makefile change?");
    let bad = |_: &str, line: &str| is_rule(line) && !line.contains(" ## ");
    refuse_lines(&makefile, bad, "end the target's line with `## what it does`");
}
