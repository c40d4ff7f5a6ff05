//! What a filter means. Stores are tested against this.

use serde_json::Value;

use super::{Comparison, Condition, Field, Filter, Literal, NumberField, TextField, TimeField};
use crate::domain::Memory;

impl Comparison {
    /// Whether an ordering satisfies it.
    pub fn holds(self, ordering: std::cmp::Ordering) -> bool {
        match self {
            Self::Equal => ordering.is_eq(),
            Self::NotEqual => ordering.is_ne(),
            Self::Less => ordering.is_lt(),
            Self::LessOrEqual => ordering.is_le(),
            Self::Greater => ordering.is_gt(),
            Self::GreaterOrEqual => ordering.is_ge(),
        }
    }
}

impl Filter {
    /// Whether a memory satisfies it.
    pub fn matches(&self, memory: &Memory) -> bool {
        match self {
            Self::All(all) => all.iter().all(|filter| filter.matches(memory)),
            Self::Any(any) => any.iter().any(|filter| filter.matches(memory)),
            Self::Not(inner) => !inner.matches(memory),
            Self::Test(field, condition) => test(memory, field, condition),
        }
    }
}

fn test(memory: &Memory, field: &Field, condition: &Condition) -> bool {
    // `a != b` is NOT a = b, also when there is no a.
    if let Condition::Compare(Comparison::NotEqual, literal) = condition {
        return !test(memory, field, &Condition::Compare(Comparison::Equal, literal.clone()));
    }
    match field {
        Field::Text(field) => text(memory, *field).is_some_and(|value| match condition {
            Condition::Compare(_, Literal::Text(wanted)) => value == *wanted,
            Condition::Has(Literal::Text(part)) => value.contains(part.as_str()),
            _ => matches!(condition, Condition::Present),
        }),
        Field::Number(field) => match condition {
            Condition::Compare(comparison, Literal::Whole(wanted)) => {
                whole(memory, *field).is_some_and(|value| comparison.holds(value.cmp(wanted)))
            }
            Condition::Compare(comparison, Literal::Number(wanted)) => number(memory, *field)
                .and_then(|value| value.partial_cmp(wanted))
                .is_some_and(|ordering| comparison.holds(ordering)),
            _ => matches!(condition, Condition::Present) && number(memory, *field).is_some(),
        },
        Field::Time(field) => time(memory, *field).is_some_and(|value| match condition {
            Condition::Compare(comparison, Literal::Time(wanted)) => comparison.holds(value.cmp(wanted)),
            _ => matches!(condition, Condition::Present),
        }),
        Field::Layer => memory.layer().is_some_and(|value| match condition {
            Condition::Compare(_, Literal::Layer(wanted)) => value == *wanted,
            _ => matches!(condition, Condition::Present),
        }),
        Field::Tags => match condition {
            Condition::Has(Literal::Text(tag)) => memory.body.tags.contains(tag),
            _ => matches!(condition, Condition::Present) && !memory.body.tags.is_empty(),
        },
        Field::Metadata(path) => metadata(memory, path, condition),
    }
}

fn text(memory: &Memory, field: TextField) -> Option<String> {
    let source = &memory.body.source;
    let value = match field {
        TextField::Id => memory.id.to_string(),
        TextField::Content => memory.body.content.clone(),
        TextField::Conversation => source.conversation.clone(),
        TextField::Speaker => source.speaker.clone(),
        TextField::Caption => source.caption.clone(),
        TextField::Reference => source.reference.clone(),
        TextField::SupersededBy => memory.body.superseded_by?.to_string(),
        TextField::Scope(layer) => memory.scope.get(layer)?.to_owned(),
    };
    // An empty text is no text: the wire does not tell them apart.
    (!value.is_empty()).then_some(value)
}

fn number(memory: &Memory, field: NumberField) -> Option<f64> {
    match field {
        NumberField::Importance => Some(memory.body.importance),
        field => whole(memory, field).map(|value| value as f64),
    }
}

fn whole(memory: &Memory, field: NumberField) -> Option<i64> {
    match field {
        NumberField::Importance => None,
        NumberField::Version => Some(memory.version),
        NumberField::Sequence => memory.body.source.sequence,
    }
}

fn time(memory: &Memory, field: TimeField) -> Option<aeterna_types::Timestamp> {
    let body = &memory.body;
    match field {
        TimeField::Created => Some(memory.created_at),
        TimeField::Updated => Some(memory.updated_at),
        TimeField::Event => body.event_at,
        TimeField::Valid => body.valid_at,
        TimeField::Invalid => body.invalid_at,
        TimeField::Expires => body.expires_at,
        TimeField::Deleted => memory.deleted_at,
    }
}

fn metadata(memory: &Memory, path: &[String], condition: &Condition) -> bool {
    let root = Value::Object(memory.body.metadata.clone());
    let found = path.iter().try_fold(&root, |value, key| value.as_object()?.get(key));
    let found = found.filter(|value| !value.is_null());
    match condition {
        Condition::Present => match found {
            // The metadata itself is there when it holds something.
            Some(Value::Object(object)) if path.is_empty() => !object.is_empty(),
            found => found.is_some(),
        },
        Condition::Compare(_, Literal::Null) => found.is_none(),
        Condition::Compare(comparison, literal) => found.is_some_and(|value| compare(value, *comparison, literal)),
        Condition::Has(literal) => found.is_some_and(|value| match (value, literal) {
            (Value::Array(items), literal) => items.iter().any(|item| compare(item, Comparison::Equal, literal)),
            (Value::Object(object), Literal::Text(key)) => object.contains_key(key),
            (Value::String(text), Literal::Text(part)) => text.contains(part.as_str()),
            (value, literal) => compare(value, Comparison::Equal, literal),
        }),
    }
}

fn compare(value: &Value, comparison: Comparison, literal: &Literal) -> bool {
    match (value, literal) {
        (Value::String(value), Literal::Text(wanted)) => comparison.holds(value.cmp(wanted)),
        (Value::Bool(value), Literal::Bool(wanted)) => comparison.holds(value.cmp(wanted)),
        (Value::Number(value), Literal::Number(wanted)) => {
            let ordering = value.as_f64().and_then(|value| value.partial_cmp(wanted));
            ordering.is_some_and(|ordering| comparison.holds(ordering))
        }
        _ => false,
    }
}
