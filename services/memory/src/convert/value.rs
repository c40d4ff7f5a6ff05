//! Times and free-form values.

use aeterna_error::Violations;
use aeterna_types::Timestamp;
use prost_types::value::Kind;
use serde_json::{Map, Value};

const MAX_METADATA_BYTES: usize = 32 << 10;
const MAX_DEPTH: usize = 8;

/// A time, when there is one and it is sound.
pub fn time(violations: &mut Violations, field: &str, message: Option<prost_types::Timestamp>) -> Option<Timestamp> {
    let message = message?;
    let time = Timestamp::from_parts(message.seconds, message.nanos);
    if time.is_none() {
        violations.add(field, "is no time between the years 1 and 9999");
    }
    time
}

/// A time on the wire.
pub fn timestamp(time: Timestamp) -> prost_types::Timestamp {
    let (seconds, nanos) = time.parts();
    prost_types::Timestamp { seconds, nanos }
}

/// Free-form metadata, checked for depth, size and numbers that JSON has not.
pub fn from_struct(
    violations: &mut Violations,
    field: &str,
    message: prost_types::Struct,
) -> Option<Map<String, Value>> {
    let object = match object(message, 1) {
        Ok(object) => object,
        Err(why) => {
            violations.add(field, why);
            return None;
        }
    };
    let bytes = serde_json::to_string(&object).map_or(usize::MAX, |text| text.len());
    if bytes > MAX_METADATA_BYTES {
        violations.add(field, format!("has {bytes} bytes as JSON; send at most 32 KiB"));
        return None;
    }
    Some(object)
}

fn object(message: prost_types::Struct, depth: usize) -> Result<Map<String, Value>, &'static str> {
    message
        .fields
        .into_iter()
        .map(|(key, value)| Ok((key, json(value, depth)?)))
        .collect()
}

fn json(value: prost_types::Value, depth: usize) -> Result<Value, &'static str> {
    if depth > MAX_DEPTH {
        return Err("is nested deeper than 8 levels");
    }
    Ok(match value.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::BoolValue(value)) => Value::Bool(value),
        Some(Kind::StringValue(value)) => Value::String(value),
        Some(Kind::NumberValue(value)) => serde_json::Number::from_f64(value)
            .map(Value::Number)
            .ok_or("holds a number that is not finite")?,
        Some(Kind::StructValue(value)) => Value::Object(object(value, depth + 1)?),
        Some(Kind::ListValue(list)) => Value::Array(
            list.values
                .into_iter()
                .map(|value| json(value, depth + 1))
                .collect::<Result<_, _>>()?,
        ),
    })
}

/// Metadata on the wire.
pub fn to_struct(object: Map<String, Value>) -> prost_types::Struct {
    prost_types::Struct {
        fields: object.into_iter().map(|(key, value)| (key, wire(value))).collect(),
    }
}

fn wire(value: Value) -> prost_types::Value {
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(value) => Kind::BoolValue(value),
        Value::Number(value) => Kind::NumberValue(value.as_f64().unwrap_or(0.0)),
        Value::String(value) => Kind::StringValue(value),
        Value::Array(values) => Kind::ListValue(prost_types::ListValue {
            values: values.into_iter().map(wire).collect(),
        }),
        Value::Object(object) => Kind::StructValue(to_struct(object)),
    };
    prost_types::Value { kind: Some(kind) }
}
