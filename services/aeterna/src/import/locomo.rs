//! Conversations in the form of the LoCoMo data set (Maharana et al. 2024): sessions of turns, each session with the time
//! at which it took place, and questions with the turns that answer them.

use std::path::Path;

use aeterna_proto::common::v1::Scope;
use aeterna_proto::memory::v1::{Memory, Source as Origin};
use anyhow::{Context as _, bail};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{Item, Source, unmarked};

/// One conversation.
#[derive(Clone, Debug)]
pub struct Conversation {
    /// Its name.
    pub id: String,
    /// Its turns in order, as memories without a scope.
    pub turns: Vec<Memory>,
    /// The questions about it.
    pub questions: Vec<Question>,
}

/// A question about a conversation.
#[derive(Clone, Debug, Deserialize)]
pub struct Question {
    /// The question.
    pub question: String,
    /// The turns that answer it, by their `dia_id`.
    #[serde(default)]
    pub evidence: Vec<String>,
    /// 1 multi-hop, 2 temporal, 3 open-domain, 4 single-hop, 5 adversarial.
    pub category: u8,
}

#[derive(Deserialize)]
struct Sample {
    sample_id: String,
    conversation: Map<String, Value>,
    #[serde(default)]
    qa: Vec<Question>,
}

#[derive(Deserialize)]
struct Turn {
    #[serde(default)]
    speaker: String,
    #[serde(default)]
    dia_id: String,
    #[serde(default)]
    text: String,
    #[serde(default)]
    blip_caption: Option<String>,
}

/// The conversations of a file.
///
/// # Errors
/// When the file is not of the form; the message says where.
pub fn conversations(text: &str) -> anyhow::Result<Vec<Conversation>> {
    let samples: Vec<Sample> = serde_json::from_str(text).context("parse a list of conversations")?;
    samples.into_iter().map(conversation).collect()
}

fn conversation(sample: Sample) -> anyhow::Result<Conversation> {
    let id = sample.sample_id;
    let mut sessions: Vec<(u32, Vec<Turn>, Option<prost_types::Timestamp>)> = Vec::new();
    for (key, value) in &sample.conversation {
        let Some(number) = key.strip_prefix("session_").and_then(|rest| rest.parse().ok()) else {
            continue;
        };
        let turns = Vec::<Turn>::deserialize(value).with_context(|| format!("read `{key}` of `{id}`"))?;
        let time = match sample.conversation.get(&format!("{key}_date_time")) {
            Some(Value::String(time)) => {
                Some(parse_time(time).with_context(|| format!("read `{key}_date_time` of `{id}`"))?)
            }
            _ => None,
        };
        sessions.push((number, turns, time));
    }
    sessions.sort_by_key(|(number, ..)| *number);
    if sessions.is_empty() {
        bail!("`{id}` has no `session_1`");
    }
    let turns = sessions
        .into_iter()
        .flat_map(|(_, turns, time)| turns.into_iter().map(move |turn| (turn, time)))
        .zip(0i64..)
        .map(|((turn, time), sequence)| memory(&id, turn, time, sequence))
        .collect();
    Ok(Conversation {
        id,
        turns,
        questions: sample.qa,
    })
}

fn memory(conversation: &str, turn: Turn, time: Option<prost_types::Timestamp>, sequence: i64) -> Memory {
    // A turn that is only a picture says what its caption says.
    let (mut content, mut caption) = (turn.text, turn.blip_caption.unwrap_or_default());
    if content.is_empty() {
        content = std::mem::take(&mut caption);
    }
    let source = Origin {
        conversation: conversation.into(),
        sequence: Some(sequence),
        speaker: turn.speaker,
        caption,
        reference: turn.dia_id,
    };
    Memory {
        content,
        source: Some(source),
        event_at: time,
        ..Default::default()
    }
}

/// `1:56 pm on 8 May, 2023`, taken as UTC: the data names no zone.
fn parse_time(text: &str) -> anyhow::Result<prost_types::Timestamp> {
    let time = jiff::civil::DateTime::strptime("%I:%M %p on %d %B, %Y", text.trim());
    let time = time.with_context(|| format!("`{text}` is no time such as `1:56 pm on 8 May, 2023`"))?;
    let time = time.to_zoned(jiff::tz::TimeZone::UTC)?.timestamp();
    Ok(prost_types::Timestamp {
        seconds: time.as_second(),
        nanos: 0,
    })
}

/// Each conversation becomes a session of its own name, within `scope`.
pub fn source(path: &Path, scope: Option<&Scope>) -> anyhow::Result<Source> {
    let conversations = conversations(unmarked(&std::fs::read_to_string(path)?))?;
    let mut items = Vec::new();
    for conversation in conversations {
        let mut place = scope.cloned().unwrap_or_default();
        if place.session.is_empty() {
            place.session.clone_from(&conversation.id);
        }
        for mut memory in conversation.turns {
            memory.scope = Some(place.clone());
            let reference = memory.source.as_ref().map(|source| source.reference.as_str());
            items.push(Item {
                place: format!("{} {}", conversation.id, reference.unwrap_or_default()),
                weight: 1,
                memory: Ok(memory),
            });
        }
    }
    Ok(Source {
        total: items.len() as u64,
        items: Box::new(items.into_iter().map(Ok)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_follow_each_other_by_number_and_carry_their_time() {
        let text = r#"[{"sample_id": "c", "conversation": {
            "session_10": [{"speaker": "B", "dia_id": "D10:1", "text": "later"}],
            "session_10_date_time": "12:05 am on 1 June, 2023",
            "session_2": [{"speaker": "A", "dia_id": "D2:1", "text": "", "blip_caption": "a cat"}]},
            "qa": [{"question": "q", "answer": 1, "evidence": ["D2:1"], "category": 4}]}]"#;
        let conversations = conversations(text).unwrap();
        let [earlier, later] = &conversations[0].turns[..] else {
            panic!("two turns")
        };
        assert_eq!(earlier.content, "a cat");
        assert_eq!(later.source.as_ref().unwrap().sequence, Some(1));
        assert_eq!(later.event_at.unwrap().seconds, 1_685_577_900);
        assert_eq!(conversations[0].questions[0].evidence, ["D2:1"]);
    }

    #[test]
    fn a_file_of_another_form_is_refused_with_the_place() {
        for (text, word) in [
            ("{}", "list"),
            (r#"[{"sample_id": "c", "conversation": {}}]"#, "session_1"),
            (r#"[{"sample_id": "c", "conversation": {"session_1": 5}}]"#, "session_1"),
            (
                r#"[{"sample_id": "c", "conversation": {"session_1": [], "session_1_date_time": "soon"}}]"#,
                "soon",
            ),
        ] {
            let error = format!("{:#}", conversations(text).unwrap_err());
            assert!(error.contains(word), "{error}");
        }
    }
}
