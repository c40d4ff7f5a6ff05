//! Hostile values for every field of a message, made from the contracts themselves: a new field is tried without anybody
//! remembering to.

use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, MapKey, ReflectMessage as _, Value};

/// Longest text tried, in bytes.
const HUGE: usize = 100_000;
/// Items of the longest list tried.
const MANY: usize = 1100;
/// How deep messages within messages are followed; `google.protobuf.Value` has no end.
const DEPTH: usize = 5;

/// A message with one field changed.
#[derive(Clone, Debug)]
pub struct Mutation {
    /// Path of the field, for instance `memory.source.speaker`; items of lists are written `requests[0]`.
    pub field: String,
    /// What was put there, for a person.
    pub what: String,
    /// The changed message.
    pub message: DynamicMessage,
}

/// Every field of `base`, and of the messages that it may hold, with every hostile value for its type.
pub fn mutations(base: &DynamicMessage) -> Vec<Mutation> {
    let mut found = Vec::new();
    walk(base, "", 0, &mut |field, what, message| {
        found.push(Mutation { field, what, message });
    });
    found
}

fn walk(message: &DynamicMessage, prefix: &str, depth: usize, found: &mut dyn FnMut(String, String, DynamicMessage)) {
    for field in message.descriptor().fields() {
        let path = format!("{prefix}{}", field.name());
        for (what, value) in values(&field) {
            let mut changed = message.clone();
            changed.set_field(&field, value);
            found(path.clone(), what, changed);
        }
        if message.has_field(&field) {
            let mut without = message.clone();
            without.clear_field(&field);
            found(path.clone(), "nothing".into(), without);
        }
        let Kind::Message(inner) = field.kind() else { continue };
        if depth >= DEPTH || field.is_map() {
            continue;
        }
        // Down into the message that is there, or an empty one.
        let current = message.get_field(&field);
        let (start, place) = match (&*current, field.is_list()) {
            (Value::List(items), true) => (items.first().cloned(), format!("{path}[0].")),
            (value, _) => (Some(value.clone()), format!("{path}.")),
        };
        let start = match start {
            Some(Value::Message(start)) => start,
            _ => DynamicMessage::new(inner),
        };
        walk(&start, &place, depth + 1, &mut |inner_path, what, changed| {
            let mut outer = message.clone();
            let value = match (&*current, field.is_list()) {
                (Value::List(items), true) => {
                    let rest = items.iter().skip(1).cloned();
                    Value::List(std::iter::once(Value::Message(changed)).chain(rest).collect())
                }
                _ => Value::Message(changed),
            };
            outer.set_field(&field, value);
            found(inner_path, what, outer);
        });
    }
}

/// Values with a name each; what the wire can carry is tried, however little sense it makes.
fn values(field: &FieldDescriptor) -> Vec<(String, Value)> {
    if field.is_map() {
        let deep = Value::Map([(MapKey::String("k".repeat(HUGE)), map_value(field))].into());
        return vec![("a key of 100,000 characters".into(), deep)];
    }
    let singles = scalars(&field.kind());
    if !field.is_list() {
        return singles;
    }
    let mut lists: Vec<(String, Value)> = Vec::new();
    for (what, value) in &singles {
        lists.push((format!("a list of {what}"), Value::List(vec![value.clone()])));
    }
    let item = match field.kind() {
        Kind::Message(inner) => Value::Message(DynamicMessage::new(inner)),
        kind => scalars(&kind).first().map_or(Value::I32(0), |(_, value)| value.clone()),
    };
    lists.push((format!("{MANY} items"), Value::List(vec![item; MANY])));
    lists
}

fn map_value(field: &FieldDescriptor) -> Value {
    let Kind::Message(entry) = field.kind() else {
        return Value::Bool(true);
    };
    match entry.map_entry_value_field().kind() {
        Kind::Message(inner) => Value::Message(DynamicMessage::new(inner)),
        kind => scalars(&kind).first().map_or(Value::I32(0), |(_, value)| value.clone()),
    }
}

fn scalars(kind: &Kind) -> Vec<(String, Value)> {
    let named = |list: &[(&str, Value)]| {
        list.iter()
            .map(|(name, value)| (name.to_string(), value.clone()))
            .collect()
    };
    match kind {
        Kind::String => named(&[
            ("an empty text", Value::String(String::new())),
            ("100,000 characters", Value::String("x".repeat(HUGE))),
            ("a NUL", Value::String("a\0b".into())),
            ("a path", Value::String("../../../etc/passwd".into())),
            ("SQL", Value::String("' OR 1=1; DROP TABLE memories; --".into())),
            (
                "query syntax",
                Value::String("NEAR(\"a\" b*) AND scope : s1 OR {".into()),
            ),
            (
                "reversed text",
                Value::String("\u{202e}\u{feff}\u{0}e\u{301}\u{301}\u{301}".into()),
            ),
            ("an emoji", Value::String("👩‍👩‍👧‍👦".into())),
            ("a UUID", Value::String("ffffffff-ffff-ffff-ffff-ffffffffffff".into())),
            ("base64", Value::String("AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA".into())),
        ]),
        Kind::Bytes => named(&[
            ("no bytes", Value::Bytes(Vec::new().into())),
            ("100,000 bytes", Value::Bytes(vec![0xff; HUGE].into())),
        ]),
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => named(&[
            ("-1", Value::I32(-1)),
            ("the smallest number", Value::I32(i32::MIN)),
            ("the largest number", Value::I32(i32::MAX)),
        ]),
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => named(&[
            ("-1", Value::I64(-1)),
            ("the smallest number", Value::I64(i64::MIN)),
            ("the largest number", Value::I64(i64::MAX)),
        ]),
        Kind::Uint32 | Kind::Fixed32 => named(&[("the largest number", Value::U32(u32::MAX))]),
        Kind::Uint64 | Kind::Fixed64 => named(&[("the largest number", Value::U64(u64::MAX))]),
        Kind::Double => named(&[
            ("NaN", Value::F64(f64::NAN)),
            ("infinity", Value::F64(f64::INFINITY)),
            ("minus infinity", Value::F64(f64::NEG_INFINITY)),
            ("-1e308", Value::F64(-1e308)),
            ("1e308", Value::F64(1e308)),
        ]),
        Kind::Float => named(&[
            ("NaN", Value::F32(f32::NAN)),
            ("infinity", Value::F32(f32::INFINITY)),
            ("-1e38", Value::F32(-1e38)),
        ]),
        Kind::Bool => named(&[("true", Value::Bool(true)), ("false", Value::Bool(false))]),
        Kind::Enum(_) => named(&[
            ("0", Value::EnumNumber(0)),
            ("-1", Value::EnumNumber(-1)),
            ("an unknown number", Value::EnumNumber(999)),
        ]),
        Kind::Message(inner) => vec![(
            "an empty message".into(),
            Value::Message(DynamicMessage::new(inner.clone())),
        )],
    }
}
