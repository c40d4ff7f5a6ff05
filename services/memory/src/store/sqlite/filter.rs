//! Filters as SQL over `memories m` joined with `scopes s`. Each test is made two-valued, as the language wants it.

use aeterna_storage::rusqlite::types::Value;

use crate::filter::{Comparison, Condition, Field, Filter, Literal, NumberField, TextField, TimeField};

/// A value for a question mark.
#[derive(Clone, Debug)]
pub enum Bind {
    Text(String),
    Real(f64),
    Int(i64),
}

/// A condition and the values of its question marks, in order. All names in it are ours, all values are bound.
#[derive(Clone, Debug, Default)]
pub struct Sql {
    /// The condition.
    pub text: String,
    binds: Vec<Bind>,
}

impl Sql {
    /// A filter's condition; true without one.
    pub fn of(filter: Option<&Filter>) -> Self {
        let mut sql = Self::default();
        match filter {
            Some(filter) => sql.filter(filter),
            None => sql.text.push('1'),
        }
        sql
    }

    /// The values, in order.
    pub fn binds(&self) -> impl Iterator<Item = Value> {
        self.binds.iter().map(|bind| match bind {
            Bind::Text(text) => Value::from(text.clone()),
            Bind::Real(number) => Value::from(*number),
            Bind::Int(number) => Value::from(*number),
        })
    }

    fn put(&mut self, text: &str, binds: impl IntoIterator<Item = Bind>) {
        self.text.push_str(text);
        self.binds.extend(binds);
    }

    fn filter(&mut self, filter: &Filter) {
        match filter {
            Filter::All(all) => self.joined(all, " AND ", "1"),
            Filter::Any(any) => self.joined(any, " OR ", "0"),
            Filter::Not(inner) => {
                self.text.push_str("(NOT ");
                self.filter(inner);
                self.text.push(')');
            }
            Filter::Test(field, Condition::Compare(Comparison::NotEqual, literal)) => {
                let equal = Condition::Compare(Comparison::Equal, literal.clone());
                self.filter(&Filter::Not(Box::new(Filter::Test(field.clone(), equal))));
            }
            Filter::Test(field, condition) => {
                self.text.push_str("coalesce(");
                self.test(field, condition);
                self.text.push_str(", 0)");
            }
        }
    }

    fn joined(&mut self, filters: &[Filter], by: &str, empty: &str) {
        if filters.is_empty() {
            return self.text.push_str(empty);
        }
        self.text.push('(');
        for (index, filter) in filters.iter().enumerate() {
            if index > 0 {
                self.text.push_str(by);
            }
            self.filter(filter);
        }
        self.text.push(')');
    }

    fn test(&mut self, field: &Field, condition: &Condition) {
        match (field, condition) {
            (Field::Text(TextField::Id), Condition::Compare(_, Literal::Text(id))) => {
                let bytes = id
                    .parse::<aeterna_types::MemoryId>()
                    .ok()
                    .filter(|parsed| parsed.to_string() == *id);
                match bytes {
                    Some(id) => self.put("hex(m.id) = ?", [Bind::Text(hex(id.as_bytes()))]),
                    None => self.text.push('0'),
                }
            }
            (Field::Text(field), condition) => self.text_test(&text_column(*field), condition),
            (Field::Number(field), condition) => {
                let column = match field {
                    NumberField::Importance => record("body.importance"),
                    NumberField::Version => "m.version".into(),
                    NumberField::Sequence => "m.sequence".into(),
                };
                match condition {
                    // As a number of the same kind: of two kinds, SQLite would not round either.
                    Condition::Compare(comparison, Literal::Number(number)) => {
                        let compared = format!("CAST({column} AS REAL) {} ?", comparison.sign());
                        self.put(&compared, [Bind::Real(*number)]);
                    }
                    Condition::Compare(comparison, Literal::Whole(number)) => {
                        self.put(&format!("{column} {} ?", comparison.sign()), [Bind::Int(*number)]);
                    }
                    _ => self.text.push_str(&format!("{column} IS NOT NULL")),
                }
            }
            (Field::Time(field), condition) => {
                let column = match field {
                    TimeField::Created => record("created_at"),
                    TimeField::Updated => record("updated_at"),
                    TimeField::Event => record("body.event_at"),
                    TimeField::Valid => record("body.valid_at"),
                    TimeField::Invalid => record("body.invalid_at"),
                    TimeField::Expires => "m.expires_at".into(),
                    TimeField::Deleted => "m.deleted_at".into(),
                };
                match condition {
                    Condition::Compare(comparison, Literal::Time(time)) => {
                        self.put(&format!("{column} {} ?", comparison.sign()), [Bind::Int(time.micros())]);
                    }
                    _ => self.text.push_str(&format!("{column} IS NOT NULL")),
                }
            }
            (Field::Layer, Condition::Compare(_, Literal::Layer(layer))) => {
                self.put("s.layer = ?", [Bind::Int(i64::from(layer.number()))]);
            }
            (Field::Layer, _) => self.text.push('1'),
            (Field::Tags, Condition::Has(Literal::Text(tag))) => self.put(
                "EXISTS (SELECT 1 FROM json_each(m.record, '$.body.tags') WHERE value = ?)",
                [Bind::Text(tag.clone())],
            ),
            (Field::Tags, _) => self.text.push_str("json_array_length(m.record, '$.body.tags') > 0"),
            (Field::Metadata(path), condition) => self.metadata(path, condition),
        }
    }

    fn text_test(&mut self, column: &str, condition: &Condition) {
        match condition {
            // An empty text is no text, and nothing equals it.
            Condition::Compare(_, Literal::Text(text)) if text.is_empty() => self.text.push('0'),
            Condition::Compare(_, Literal::Text(text)) => {
                self.put(&format!("{column} = ?"), [Bind::Text(text.clone())]);
            }
            Condition::Has(Literal::Text(part)) => {
                self.put(
                    &format!("({column} <> '' AND instr({column}, ?) > 0)"),
                    [Bind::Text(part.clone())],
                );
            }
            _ => self.text.push_str(&format!("{column} <> ''")),
        }
    }

    fn metadata(&mut self, path: &[String], condition: &Condition) {
        let place = path_of(path);
        let place = || Bind::Text(place.clone());
        match condition {
            Condition::Present if path.is_empty() => {
                self.text.push_str("json_extract(m.record, '$.body.metadata') <> '{}'");
            }
            Condition::Present => self.put("json_type(m.record, ?) <> 'null'", [place()]),
            Condition::Compare(_, Literal::Null) => {
                self.put("coalesce(json_type(m.record, ?), 'null') = 'null'", [place()]);
            }
            Condition::Compare(comparison, literal) => self.value(
                "json_type(m.record, ?)",
                "json_extract(m.record, ?)",
                *comparison,
                literal,
                Some(place()),
            ),
            Condition::Has(literal) => {
                self.put("CASE json_type(m.record, ?) WHEN 'array' THEN EXISTS (SELECT 1 FROM json_each(m.record, ?) j WHERE ", [
                    place(),
                    place(),
                ]);
                self.value("j.type", "j.value", Comparison::Equal, literal, None);
                self.text.push_str(") ");
                if let Literal::Text(text) = literal {
                    self.put(
                        "WHEN 'object' THEN EXISTS (SELECT 1 FROM json_each(m.record, ?) WHERE key = ?) ",
                        [place(), Bind::Text(text.clone())],
                    );
                    self.put(
                        "WHEN 'text' THEN instr(json_extract(m.record, ?), ?) > 0 ",
                        [place(), Bind::Text(text.clone())],
                    );
                }
                self.text.push_str("ELSE ");
                self.value(
                    "json_type(m.record, ?)",
                    "json_extract(m.record, ?)",
                    Comparison::Equal,
                    literal,
                    Some(place()),
                );
                self.text.push_str(" END");
            }
        }
    }

    /// A comparison of a JSON value, given by expressions for its type and itself that may each want a path.
    fn value(&mut self, kind: &str, value: &str, comparison: Comparison, literal: &Literal, place: Option<Bind>) {
        let sign = comparison.sign();
        match literal {
            Literal::Text(text) => {
                self.put(
                    &format!("({kind} = 'text' AND {value} {sign} ?)"),
                    place.clone().into_iter().chain(place),
                );
                self.binds.push(Bind::Text(text.clone()));
            }
            Literal::Number(number) => {
                self.put(
                    &format!("({kind} IN ('integer', 'real') AND {value} {sign} ?)"),
                    place.clone().into_iter().chain(place),
                );
                self.binds.push(Bind::Real(*number));
            }
            Literal::Bool(wanted) => self.put(&format!("({kind} = '{wanted}')"), place),
            Literal::Null | Literal::Whole(_) | Literal::Time(_) | Literal::Layer(_) => self.text.push('0'),
        }
    }
}

fn record(path: &str) -> String {
    format!("json_extract(m.record, '$.{path}')")
}

fn text_column(field: TextField) -> String {
    match field {
        // As text, for parts of it.
        TextField::Id => "json_extract(m.record, '$.id')".into(),
        TextField::Content => record("body.content"),
        TextField::Conversation => record("body.source.conversation"),
        TextField::Speaker => record("body.source.speaker"),
        TextField::Caption => record("body.source.caption"),
        TextField::Reference => record("body.source.reference"),
        TextField::SupersededBy => record("body.superseded_by"),
        TextField::Scope(layer) => format!("s.{}", layer.name()),
    }
}

/// A JSON path. The language's names have no character that would need an escape in quotes.
fn path_of(keys: &[String]) -> String {
    keys.iter()
        .fold("$.body.metadata".to_owned(), |path, key| format!("{path}.\"{key}\""))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02X}")).collect()
}
