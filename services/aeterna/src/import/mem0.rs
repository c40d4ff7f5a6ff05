//! Memories as mem0 answers and dumps them.

use std::fs;
use std::path::Path;

use aeterna_proto::common::v1::Scope;
use aeterna_proto::memory::v1::{Memory, Source as Origin};
use serde_json::{Map, Value};

use super::{Item, Source};

pub fn source(path: &Path, scope: Option<&Scope>) -> anyhow::Result<Source> {
    let text = fs::read_to_string(path)?;
    let (all, place) = match serde_json::from_str(&text) {
        Ok(Value::Object(mut answer)) if answer.contains_key("results") => (list(answer.remove("results")), "item"),
        Ok(Value::Object(one)) => (vec![Value::Object(one)], "item"),
        Ok(all) => (list(Some(all)), "item"),
        // One a line; a line that is none is refused by its number.
        Err(_) => {
            let lines = text.lines().filter(|line| !line.trim().is_empty());
            (
                lines
                    .map(|line| serde_json::from_str(line).unwrap_or(Value::Null))
                    .collect(),
                "line",
            )
        }
    };
    let scope = scope.cloned();
    let total = all.len() as u64;
    let items = all.into_iter().enumerate().map(move |(index, value)| {
        Ok(Item {
            place: format!("{place} {}", index + 1),
            weight: 1,
            memory: memory(value, scope.as_ref()),
        })
    });
    Ok(Source {
        total,
        items: Box::new(items),
    })
}

fn list(value: Option<Value>) -> Vec<Value> {
    match value {
        Some(Value::Array(all)) => all,
        _ => Vec::new(),
    }
}

fn memory(value: Value, scope: Option<&Scope>) -> Result<Memory, String> {
    let Value::Object(mut item) = value else {
        return Err("is no JSON object".into());
    };
    let text = |item: &mut Map<String, Value>, key: &str| match item.remove(key) {
        Some(Value::String(text)) => text,
        _ => String::new(),
    };
    let content = text(&mut item, "memory");
    if content.is_empty() {
        return Err("has no `memory`".into());
    }
    let mut place = scope.cloned().unwrap_or_default();
    for (key, own) in [
        ("user_id", &mut place.user),
        ("run_id", &mut place.session),
        ("agent_id", &mut place.agent),
    ] {
        let id = text(&mut item, key);
        if !id.is_empty() {
            *own = id;
        }
    }
    let mut tags = Vec::new();
    for tag in list(item.remove("categories")) {
        tags.extend(tag.as_str().map(str::to_owned));
    }
    let told = text(&mut item, "created_at");
    let event_at = match told.parse::<aeterna_types::Timestamp>() {
        Ok(time) => {
            let (seconds, nanos) = time.parts();
            Some(prost_types::Timestamp { seconds, nanos })
        }
        Err(_) if told.is_empty() => None,
        Err(_) => return Err(format!("`created_at` is no time: {told}")),
    };
    let metadata = match item.remove("metadata") {
        Some(Value::Object(metadata)) if !metadata.is_empty() => {
            let text = Value::Object(metadata).to_string();
            Some(crate::json::from_json("google.protobuf.Struct", &text)?)
        }
        _ => None,
    };
    Ok(Memory {
        scope: Some(place),
        content,
        metadata,
        tags,
        event_at,
        source: Some(Origin {
            reference: text(&mut item, "id"),
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
            "categories": ["food"], "metadata": {"n": 1}, "created_at": "2024-07-01T00:00:00-07:00"}, {"memory": ""}]}"#;
        fs::write(&path, text).unwrap();
        let items: Vec<Item> = source(&path, None).unwrap().items.map(Result::unwrap).collect();
        let first = items[0].memory.as_ref().unwrap();
        let place = first.scope.clone().unwrap();
        assert_eq!((place.user.as_str(), place.session.as_str()), ("ann", "r"));
        assert_eq!(
            (first.tags.as_slice(), first.event_at.unwrap().seconds),
            (&["food".to_owned()][..], 1_719_817_200)
        );
        assert!(items[1].memory.as_ref().unwrap_err().contains("memory"));
        assert_eq!(super::super::guess(&path).unwrap(), super::super::Format::Mem0);
    }
}
