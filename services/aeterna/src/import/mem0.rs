//! Memories as mem0 answers and dumps them.

use std::fs;
use std::path::Path;

use aeterna_proto::common::v1::Scope;
use aeterna_proto::memory::v1::{Memory, Source as Origin};
use anyhow::bail;
use serde_json::{Map, Value};

use super::{Item, Source, unmarked};

pub fn source(path: &Path, scope: Option<&Scope>) -> anyhow::Result<Source> {
    let text = fs::read_to_string(path)?;
    let text = unmarked(&text);
    let items = |all: Vec<Value>| {
        all.into_iter()
            .zip(1..)
            .map(|(one, number)| (format!("item {number}"), one))
            .collect()
    };
    let all: Vec<(String, Value)> = match serde_json::from_str(text) {
        Ok(Value::Object(mut answer)) if answer.contains_key("results") => match answer.remove("results") {
            Some(Value::Array(all)) => items(all),
            _ => bail!("`results` is no list"),
        },
        Ok(Value::Object(one)) => items(vec![Value::Object(one)]),
        Ok(Value::Array(all)) => items(all),
        Ok(_) => bail!("it is no list of memories"),
        Err(error) => lines(text).ok_or(error)?,
    };
    let scope = scope.cloned();
    let total = all.len() as u64;
    let items = all.into_iter().map(move |(place, value)| {
        Ok(Item {
            place,
            weight: 1,
            memory: memory(value, scope.as_ref()),
        })
    });
    Ok(Source {
        total,
        items: Box::new(items),
    })
}

/// One a line, each with its number; a line that is none is refused by it. `None` when already the first is none.
fn lines(text: &str) -> Option<Vec<(String, Value)>> {
    let lines = text.lines().zip(1..).filter(|(line, _)| !line.trim().is_empty());
    let parsed: Vec<(String, Value)> = lines
        .map(|(line, number)| {
            (
                format!("line {number}"),
                serde_json::from_str(line).unwrap_or(Value::Null),
            )
        })
        .collect();
    parsed
        .first()
        .is_some_and(|(_, first)| first.is_object())
        .then_some(parsed)
}

/// Takes a text out of an item; what is there and is none is refused.
fn text(item: &mut Map<String, Value>, key: &str) -> Result<String, String> {
    match item.remove(key) {
        Some(Value::String(text)) => Ok(text),
        None | Some(Value::Null) => Ok(String::new()),
        Some(_) => Err(format!("has a `{key}` that is no text")),
    }
}

fn time(item: &mut Map<String, Value>, key: &str) -> Result<Option<prost_types::Timestamp>, String> {
    let told = text(item, key)?;
    if told.is_empty() {
        return Ok(None);
    }
    let time = told.parse::<aeterna_types::Timestamp>();
    let (seconds, nanos) = time.map_err(|_| format!("`{key}` is no time: {told}"))?.parts();
    Ok(Some(prost_types::Timestamp { seconds, nanos }))
}

fn memory(value: Value, scope: Option<&Scope>) -> Result<Memory, String> {
    let Value::Object(mut item) = value else {
        return Err("is no JSON object".into());
    };
    let content = text(&mut item, "memory")?;
    if content.is_empty() {
        return Err("has no `memory`".into());
    }
    let mut place = scope.cloned().unwrap_or_default();
    for (key, own) in [
        ("user_id", &mut place.user),
        ("run_id", &mut place.session),
        ("agent_id", &mut place.agent),
    ] {
        let id = text(&mut item, key)?;
        if !id.is_empty() {
            *own = id;
        }
    }
    let tags = match item.remove("categories") {
        None | Some(Value::Null) => Vec::new(),
        Some(tags) => serde_json::from_value(tags).map_err(|_| "has `categories` that are no list of texts")?,
    };
    let mut metadata = match item.remove("metadata") {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(metadata)) => metadata,
        Some(_) => return Err("has a `metadata` that is no object".into()),
    };
    // What has no place of its own is kept beside.
    let app = text(&mut item, "app_id")?;
    if !app.is_empty() {
        metadata.entry("app_id").or_insert(Value::String(app));
    }
    let metadata = match metadata.is_empty() {
        true => None,
        false => Some(crate::json::from_json(
            "google.protobuf.Struct",
            &Value::Object(metadata).to_string(),
        )?),
    };
    Ok(Memory {
        scope: Some(place),
        content,
        metadata,
        tags,
        event_at: time(&mut item, "created_at")?,
        expires_at: time(&mut item, "expiration_date")?,
        source: Some(Origin {
            reference: text(&mut item, "id")?,
            ..Default::default()
        }),
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_mem0_knows_has_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mem0.json");
        let text = r#"{"results": [{"id": "m-1", "memory": "Likes tea", "user_id": "ann", "run_id": "r", "hash": "x",
            "categories": ["food"], "metadata": {"n": 1}, "created_at": "2024-07-01T00:00:00-07:00",
            "expiration_date": "2030-01-01", "app_id": "a"}, {"memory": ""}, {"memory": "m", "user_id": 5}]}"#;
        fs::write(&path, text).unwrap();
        let items: Vec<Item> = source(&path, None).unwrap().items.map(Result::unwrap).collect();
        let first = items[0].memory.as_ref().unwrap();
        let place = first.scope.clone().unwrap();
        assert_eq!((place.user.as_str(), place.session.as_str()), ("ann", "r"));
        assert_eq!(
            (first.tags.as_slice(), first.event_at.unwrap().seconds),
            (&["food".to_owned()][..], 1_719_817_200)
        );
        assert_eq!(first.expires_at.unwrap().seconds, 1_893_456_000);
        assert_eq!(first.metadata.as_ref().unwrap().fields.len(), 2);
        assert!(items[1].memory.as_ref().unwrap_err().contains("memory"));
        assert!(items[2].memory.as_ref().unwrap_err().contains("user_id"));
        assert_eq!(super::super::guess(&path).unwrap(), super::super::Format::Mem0);
    }

    #[test]
    fn lines_have_their_numbers_and_a_damaged_file_says_where() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mem0.json");
        let read = |text: &str| {
            fs::write(&path, text).unwrap();
            source(&path, None).map(|source| source.items.map(Result::unwrap).collect::<Vec<Item>>())
        };
        let items = read("{\"memory\": \"a\"}\n\nnonsense\n{\"memory\": \"b\"}\n").unwrap();
        let places: Vec<(&str, bool)> = items
            .iter()
            .map(|item| (item.place.as_str(), item.memory.is_ok()))
            .collect();
        assert_eq!(places, [("line 1", true), ("line 3", false), ("line 4", true)]);
        for (text, word) in [
            ("{\n\"results\": [\n{\"memory\": }]}", "line 3"),
            ("{\"results\": {}}", "results"),
            ("5", "list"),
        ] {
            let error = read(text).err().unwrap().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
