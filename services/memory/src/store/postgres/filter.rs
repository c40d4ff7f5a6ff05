//! Filters as SQL over `memories m` joined with `scopes s`. Each test is made two-valued, as the language wants it.

use sqlx::{Postgres, QueryBuilder};

use super::seal;
use crate::filter::{Comparison, Condition, Field, Filter, Literal, NumberField, TextField, TimeField};

/// Writes a filter's condition; true without one. All names in it are ours, all values are bound.
pub fn push(query: &mut QueryBuilder<Postgres>, filter: Option<&Filter>) {
    match filter {
        Some(filter) => whole(query, filter),
        None => {
            query.push("true");
        }
    }
}

fn whole(query: &mut QueryBuilder<Postgres>, filter: &Filter) {
    match filter {
        Filter::All(all) => joined(query, all, " AND ", "true"),
        Filter::Any(any) => joined(query, any, " OR ", "false"),
        Filter::Not(inner) => {
            query.push("(NOT ");
            whole(query, inner);
            query.push(")");
        }
        Filter::Test(field, Condition::Compare(Comparison::NotEqual, literal)) => {
            let equal = Condition::Compare(Comparison::Equal, literal.clone());
            whole(query, &Filter::Not(Box::new(Filter::Test(field.clone(), equal))));
        }
        Filter::Test(field, condition) => {
            query.push("coalesce(");
            test(query, field, condition);
            query.push(", false)");
        }
    }
}

fn joined(query: &mut QueryBuilder<Postgres>, filters: &[Filter], by: &str, empty: &str) {
    if filters.is_empty() {
        query.push(empty);
        return;
    }
    query.push("(");
    for (index, filter) in filters.iter().enumerate() {
        if index > 0 {
            query.push(by);
        }
        whole(query, filter);
    }
    query.push(")");
}

fn test(query: &mut QueryBuilder<Postgres>, field: &Field, condition: &Condition) {
    match (field, condition) {
        (Field::Text(TextField::Id), Condition::Compare(_, Literal::Text(text))) => {
            let id = text.parse::<aeterna_types::MemoryId>();
            match id.ok().filter(|id| id.to_string() == *text) {
                Some(id) => query.push("m.id = ").push_bind(id.as_bytes().to_vec()),
                None => query.push("false"),
            };
        }
        (Field::Text(field), condition) => text_test(query, &text_column(*field), condition),
        (Field::Number(field), condition) => {
            let column = match field {
                NumberField::Importance => "(m.record #>> '{body,importance}')::float8",
                NumberField::Version => "m.version",
                NumberField::Sequence => "m.sequence",
            };
            match condition {
                Condition::Compare(comparison, Literal::Number(number)) => query
                    .push(format_args!("{column}::float8 {} ", comparison.sign()))
                    .push_bind(*number),
                Condition::Compare(comparison, Literal::Whole(number)) => query
                    .push(format_args!("{column} {} ", comparison.sign()))
                    .push_bind(*number),
                _ => query.push(format_args!("{column} IS NOT NULL")),
            };
        }
        (Field::Time(field), condition) => {
            let column = match field {
                TimeField::Created => "(m.record ->> 'created_at')::bigint",
                TimeField::Updated => "(m.record ->> 'updated_at')::bigint",
                TimeField::Event => "(m.record #>> '{body,event_at}')::bigint",
                TimeField::Valid => "(m.record #>> '{body,valid_at}')::bigint",
                TimeField::Invalid => "(m.record #>> '{body,invalid_at}')::bigint",
                TimeField::Expires => "m.expires_at",
                TimeField::Deleted => "m.deleted_at",
            };
            match condition {
                Condition::Compare(comparison, Literal::Time(time)) => query
                    .push(format_args!("{column} {} ", comparison.sign()))
                    .push_bind(time.micros()),
                _ => query.push(format_args!("{column} IS NOT NULL")),
            };
        }
        (Field::Layer, Condition::Compare(_, Literal::Layer(layer))) => {
            query.push("s.layer = ").push_bind(layer.number());
        }
        (Field::Layer, _) => {
            query.push("true");
        }
        (Field::Tags, Condition::Has(Literal::Text(tag))) => {
            query
                .push("jsonb_exists(m.record #> '{body,tags}', ")
                .push_bind(seal(tag));
            query.push(")");
        }
        (Field::Tags, _) => {
            query.push("jsonb_array_length(m.record #> '{body,tags}') > 0");
        }
        (Field::Metadata(path), condition) => metadata(query, path, condition),
    }
}

fn text_test(query: &mut QueryBuilder<Postgres>, column: &str, condition: &Condition) {
    match condition {
        // An empty text is no text, and nothing equals it.
        Condition::Compare(_, Literal::Text(text)) if text.is_empty() => query.push("false"),
        Condition::Compare(_, Literal::Text(text)) => query.push(format_args!("{column} = ")).push_bind(seal(text)),
        Condition::Has(Literal::Text(part)) => query
            .push(format_args!("({column} <> '' AND strpos({column}, "))
            .push_bind(seal(part))
            .push(") > 0)"),
        _ => query.push(format_args!("{column} <> ''")),
    };
}

/// Writes a value of the metadata. A key never means a place in a list, as it would in a path.
fn value_at(query: &mut QueryBuilder<Postgres>, path: &[String]) {
    query.push("(m.record #> '{body,metadata}'");
    for key in path {
        query.push(" -> ").push_bind(seal(key));
    }
    query.push(")");
}

fn metadata(query: &mut QueryBuilder<Postgres>, path: &[String], condition: &Condition) {
    let value: &dyn Fn(&mut QueryBuilder<Postgres>) = &|query| value_at(query, path);
    match condition {
        Condition::Present if path.is_empty() => {
            value(query);
            query.push(" <> '{}'::jsonb");
        }
        Condition::Present => {
            kind_of(query, value);
            query.push(" <> 'null'");
        }
        Condition::Compare(_, Literal::Null) => {
            query.push("coalesce(");
            kind_of(query, value);
            query.push(", 'null') = 'null'");
        }
        Condition::Compare(comparison, literal) => compare(query, value, *comparison, literal),
        Condition::Has(literal) => {
            query.push("CASE ");
            kind_of(query, value);
            query.push(" WHEN 'array' THEN EXISTS (SELECT 1 FROM jsonb_array_elements(");
            value(query);
            query.push(") AS j (item) WHERE ");
            let item = |query: &mut QueryBuilder<Postgres>| {
                query.push("j.item");
            };
            compare(query, &item, Comparison::Equal, literal);
            query.push(") ");
            if let Literal::Text(text) = literal {
                query.push("WHEN 'object' THEN jsonb_exists(");
                value(query);
                query.push(", ").push_bind(seal(text));
                query.push(") WHEN 'string' THEN strpos(");
                value(query);
                query.push(" #>> '{}', ").push_bind(seal(text));
                query.push(") > 0 ");
            }
            query.push("ELSE ");
            compare(query, value, Comparison::Equal, literal);
            query.push(" END");
        }
    }
}

fn kind_of(query: &mut QueryBuilder<Postgres>, value: &dyn Fn(&mut QueryBuilder<Postgres>)) {
    query.push("jsonb_typeof(");
    value(query);
    query.push(")");
}

/// Writes a comparison of a JSON value.
fn compare(
    query: &mut QueryBuilder<Postgres>,
    value: &dyn Fn(&mut QueryBuilder<Postgres>),
    comparison: Comparison,
    literal: &Literal,
) {
    let sign = comparison.sign();
    match literal {
        Literal::Text(text) => {
            query.push("(");
            kind_of(query, value);
            query.push(" = 'string' AND (");
            value(query);
            query
                .push(format_args!(" #>> '{{}}') COLLATE \"C\" {sign} "))
                .push_bind(seal(text));
            query.push(")");
        }
        Literal::Number(number) => {
            // In this order: what is no number can't be cast.
            query.push("CASE WHEN ");
            kind_of(query, value);
            query.push(" = 'number' THEN ");
            value(query);
            query.push(format_args!("::float8 {sign} ")).push_bind(*number);
            query.push(" ELSE false END");
        }
        Literal::Bool(wanted) => {
            value(query);
            query.push(format_args!(" = '{wanted}'::jsonb"));
        }
        Literal::Null | Literal::Whole(_) | Literal::Time(_) | Literal::Layer(_) => {
            query.push("false");
        }
    }
}

fn text_column(field: TextField) -> String {
    let path = match field {
        TextField::Id => "id",
        TextField::Content => "body,content",
        TextField::Conversation => "body,source,conversation",
        TextField::Speaker => "body,source,speaker",
        TextField::Caption => "body,source,caption",
        TextField::Reference => "body,source,reference",
        TextField::SupersededBy => "body,superseded_by",
        TextField::Scope(layer) => return format!("s.\"{}\"", layer.name()),
    };
    format!("(m.record #>> '{{{path}}}')")
}
