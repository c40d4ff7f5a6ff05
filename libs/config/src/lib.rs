//! Layered configuration: defaults < file < environment < flags.
//!
//! Each crate declares its settings in a table. One load reports every problem together, refuses unknown keys, and can
//! print what is in force and where each value came from. docs/configuration.md is made from the same tables.

mod reader;
mod secret;
mod uri;

pub use reader::{Reader, parse_duration};
pub use secret::Secret;
pub use uri::StoreUri;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// One setting of a crate.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    /// Dotted key, for instance `server.listen`.
    pub key: &'static str,
    /// Value when nothing else is said; empty: unset.
    pub default: &'static str,
    /// What it does, for a person.
    pub help: &'static str,
    /// A secret prints as stars, and this key reads it from a file.
    file_key: Option<&'static str>,
}

impl Setting {
    /// A setting that everybody may see.
    pub const fn new(key: &'static str, default: &'static str, help: &'static str) -> Self {
        Self {
            key,
            default,
            help,
            file_key: None,
        }
    }

    /// A setting that prints as stars, with the key that reads it from a file: `<key>_file`.
    pub const fn secret(key: &'static str, file_key: &'static str, help: &'static str) -> Self {
        Self {
            key,
            default: "",
            help,
            file_key: Some(file_key),
        }
    }

    /// The key that reads it from a file, for a secret.
    pub fn file_key(&self) -> Option<&'static str> {
        self.file_key
    }

    /// The environment variable that sets it.
    pub fn variable(&self) -> String {
        format!("AETERNA_{}", self.key.replace('.', "_").to_uppercase())
    }
}

/// Everything that is wrong with a configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, thiserror::Error)]
#[error("the configuration has {} problem(s):{}", .0.len(), list(.0))]
pub struct Problems(pub Vec<String>);

fn list(problems: &[String]) -> String {
    problems
        .iter()
        .fold(String::new(), |text, problem| text + "\n  - " + problem)
}

/// Where a configuration is taken from.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// TOML file.
    pub file: Option<PathBuf>,
    /// Environment, `AETERNA_…` only are looked at.
    pub environment: Vec<(String, String)>,
    /// Flags, by key.
    pub flags: Vec<(String, String)>,
}

/// A value and where it came from.
#[derive(Clone, Debug)]
struct Entry {
    setting: Setting,
    value: String,
    origin: String,
}

/// The settings in force.
#[derive(Clone, Debug)]
pub struct Settings(BTreeMap<&'static str, Entry>);

/// Variables with our prefix that are not settings.
const OTHER_VARIABLES: [&str; 5] = [
    "AETERNA_CACHE",
    "AETERNA_CONFIG",
    "AETERNA_TOKEN",
    "AETERNA_TOKEN_FILE",
    "AETERNA_URL",
];

impl Settings {
    /// Layers the sources over the defaults of `tables`.
    pub fn load(tables: &[&[Setting]], sources: &Sources) -> Result<Self, Problems> {
        let mut settings = Self(BTreeMap::new());
        for setting in tables.iter().copied().flatten() {
            let entry = Entry {
                setting: *setting,
                value: setting.default.into(),
                origin: "default".into(),
            };
            settings.0.insert(setting.key, entry);
        }
        let mut problems = Vec::new();
        if let Some(path) = &sources.file {
            settings.read_file(path, &mut problems);
        }
        settings.read_environment(&sources.environment, &mut problems);
        for (key, value) in &sources.flags {
            settings.put(key, value.clone(), "flag", &mut problems);
        }
        if problems.is_empty() {
            Ok(settings)
        } else {
            Err(Problems(problems))
        }
    }

    fn read_file(&mut self, path: &Path, problems: &mut Vec<String>) {
        let shown = path.display();
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) => return problems.push(format!("can't read `{shown}`: {error}")),
        };
        let table = match text.parse::<toml::Table>() {
            Ok(table) => table,
            Err(error) => return problems.push(format!("`{shown}` is not TOML: {}", error.message())),
        };
        let mut flat = Vec::new();
        flatten("", &toml::Value::Table(table), &mut flat);
        for (key, value) in flat {
            match value {
                Ok(value) => self.put(&key, value, &format!("file {shown}"), problems),
                Err(kind) => problems.push(format!("`{key}` in `{shown}` is {kind}; write a plain value")),
            }
        }
    }

    fn read_environment(&mut self, environment: &[(String, String)], problems: &mut Vec<String>) {
        let names: BTreeMap<String, String> = self
            .0
            .values()
            .flat_map(|entry| {
                let (name, key) = (entry.setting.variable(), entry.setting.key.to_string());
                let file = entry.setting.file_key;
                let file = file.map(|key| (format!("{name}_FILE"), key.to_owned()));
                [Some((name, key)), file].into_iter().flatten()
            })
            .collect();
        for (name, value) in environment.iter().filter(|(name, _)| name.starts_with("AETERNA_")) {
            match names.get(name) {
                Some(key) => self.put(key, value.clone(), &format!("environment {name}"), problems),
                None if OTHER_VARIABLES.contains(&name.as_str()) || is_service_link(name) => {}
                None => problems.push(format!("there is no setting for the environment variable `{name}`")),
            }
        }
    }

    fn put(&mut self, key: &str, value: String, origin: &str, problems: &mut Vec<String>) {
        if let Some(entry) = self.0.get_mut(key) {
            entry.value = value;
            entry.origin = origin.into();
            return;
        }
        if let Some(entry) = self.0.values_mut().find(|entry| entry.setting.file_key == Some(key)) {
            match std::fs::read_to_string(&value) {
                Ok(text) if text.trim().is_empty() => problems.push(format!("`{value}`, named by `{key}`, is empty")),
                Ok(text) => entry.value = text.trim_end_matches(['\r', '\n']).into(),
                Err(error) => problems.push(format!("can't read `{value}`, named by `{key}`: {error}")),
            }
            entry.origin = format!("{origin}, file {value}");
            return;
        }
        let near = self
            .0
            .keys()
            .min_by_key(|known| distance(known, key))
            .filter(|known| distance(known, key) <= 3);
        let hint = near
            .map(|known| format!("; did you mean `{known}`?"))
            .unwrap_or_default();
        problems.push(format!("there is no setting `{key}` ({origin}){hint}"));
    }

    /// Reads typed values and collects what is wrong with them.
    pub fn reader(&self) -> Reader<'_> {
        Reader::new(self)
    }

    fn value(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(|entry| entry.value.as_str())
    }

    /// What is in force, as TOML with the origin of each value; secrets print as stars.
    pub fn dump(&self) -> String {
        let mut text = String::new();
        let mut section = "";
        for (key, entry) in &self.0 {
            let (table, name) = key.split_once('.').unwrap_or(("", key));
            if table != section {
                let _ = writeln!(text, "{}[{table}]", if text.is_empty() { "" } else { "\n" });
                section = table;
            }
            let shown = if entry.setting.file_key.is_some() && !entry.value.is_empty() {
                "***".into()
            } else {
                masked(&entry.value)
            };
            let _ = writeln!(text, "{name} = {}  # {}", toml::Value::String(shown), entry.origin);
        }
        text
    }
}

/// A value without the passwords that stand in URIs of it, where none belongs.
fn masked(value: &str) -> String {
    let mut parts = value.split("//");
    let mut shown = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        shown.push_str("//");
        // A password may have a slash in it.
        match part.rsplit_once('@') {
            Some((user, hosts)) => {
                let name = user
                    .split_once(':')
                    .map_or(user.to_owned(), |(name, _)| format!("{name}:***"));
                shown.push_str(&format!("{name}@{hosts}"));
            }
            None => shown.push_str(part),
        }
    }
    shown
}

/// Kubernetes puts variables such as `AETERNA_MEMORY_SERVICE_HOST` into every pod.
fn is_service_link(name: &str) -> bool {
    name.contains("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || name.contains("_PORT_")
        || name.ends_with("_PORT")
}

/// A flattened key with its value as text, or with the name of the kind that can't be one.
type Flat = (String, Result<String, &'static str>);

fn flatten(prefix: &str, value: &toml::Value, out: &mut Vec<Flat>) {
    let text = |value: &toml::Value| match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(_) | toml::Value::Float(_) | toml::Value::Boolean(_) => Some(value.to_string()),
        _ => None,
    };
    match value {
        toml::Value::Table(table) => {
            for (key, value) in table {
                let key = if prefix.is_empty() {
                    key.clone()
                } else {
                    format!("{prefix}.{key}")
                };
                flatten(&key, value, out);
            }
        }
        toml::Value::Array(items) => {
            let items: Option<Vec<String>> = items.iter().map(text).collect();
            out.push((
                prefix.into(),
                items
                    .map(|items| items.join(","))
                    .ok_or("a list of other than plain values"),
            ));
        }
        other => out.push((prefix.into(), text(other).ok_or("a date"))),
    }
}

/// Edits between two short words (Levenshtein, two rows).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(row[j + 1] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[Setting] = &[
        Setting::new("server.listen", "127.0.0.1:7700", "address"),
        Setting::new("limits.top_k", "1000", "results"),
        Setting::secret("auth.secret", "auth.secret_file", "key"),
    ];

    fn sources(file: Option<&Path>, env: &[(&str, &str)], flags: &[(&str, &str)]) -> Sources {
        let own = |pairs: &[(&str, &str)]| pairs.iter().map(|(a, b)| (a.to_string(), b.to_string())).collect();
        Sources {
            file: file.map(Into::into),
            environment: own(env),
            flags: own(flags),
        }
    }

    #[test]
    fn later_layers_win_and_the_dump_says_where_from() {
        let dir = std::env::temp_dir().join(format!("aeterna-config-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let file = dir.join("a.toml");
        std::fs::write(&file, "[limits]\ntop_k = 7\n[server]\nlisten = '0.0.0.0:1'\n").unwrap();
        let sources = sources(
            Some(&file),
            &[
                ("AETERNA_LIMITS_TOP_K", "8"),
                ("AETERNA_AUTH_SECRET", "s3cret"),
                ("AETERNA_X_SERVICE_HOST", "h"),
            ],
            &[("server.listen", "[::1]:2")],
        );
        let settings = Settings::load(&[TABLE], &sources).unwrap();
        std::fs::remove_dir_all(&dir).unwrap();
        let mut reader = settings.reader();
        assert_eq!(reader.get::<u32>("limits.top_k"), Some(8));
        assert_eq!(reader.text("server.listen").as_deref(), Some("[::1]:2"));
        let dump = settings.dump();
        assert!(
            dump.contains("secret = \"***\"  # environment AETERNA_AUTH_SECRET"),
            "{dump}"
        );
        assert!(!dump.contains("s3cret"));
    }

    #[test]
    fn every_problem_is_reported_together() {
        let sources = sources(
            None,
            &[("AETERNA_NOPE", "1")],
            &[("server.lisen", "x"), ("auth.secret_file", "/nope")],
        );
        let Problems(problems) = Settings::load(&[TABLE], &sources).unwrap_err();
        assert_eq!(problems.len(), 3, "{problems:?}");
        assert!(problems[1].contains("did you mean `server.listen`"), "{problems:?}");
    }

    #[test]
    fn neither_an_empty_secret_nor_a_password_in_the_open_is_taken_lightly() {
        let dir = std::env::temp_dir().join(format!("aeterna-config-empty-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let file = dir.join("secret");
        std::fs::write(&file, "\n").unwrap();
        let flags = [("auth.secret_file", file.to_str().unwrap())];
        let problems = Settings::load(&[TABLE], &sources(None, &[], &flags)).unwrap_err();
        std::fs::remove_dir_all(&dir).unwrap();
        assert!(problems.to_string().contains("is empty"), "{problems}");
        let flags = [(
            "server.listen",
            "redis://ann:hunter2@a:1,b:2/x?y,redis://c/d@e,http://:pw@f",
        )];
        let settings = Settings::load(&[TABLE], &sources(None, &[], &flags)).unwrap();
        let mut reader = settings.reader();
        reader.problem("server.listen", "no");
        let problem = reader.finish(None::<()>).unwrap_err().to_string();
        for shown in [settings.dump(), problem] {
            assert!(
                shown.contains("redis://ann:***@a:1,b:2/x?y,redis://c/d@e,http://:***@f"),
                "{shown}"
            );
        }
    }

    #[test]
    fn typed_problems_name_the_key_the_value_and_the_origin() {
        let settings = Settings::load(&[TABLE], &sources(None, &[], &[("limits.top_k", "many")])).unwrap();
        let mut reader = settings.reader();
        let top_k = reader.get::<u32>("limits.top_k");
        let error = reader.finish(top_k).unwrap_err();
        assert!(error.to_string().contains("`limits.top_k` is `many` (flag)"), "{error}");
    }
}
