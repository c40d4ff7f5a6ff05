//! Wire types to domain types and back; refusals name the field.

use aeterna_error::{Error, Reason, Violations};
use aeterna_proto::embedding::v1 as wire;

use crate::app::{Batch, Listed, Selection, SelectionRequest, Wanted};
use crate::store::{SIZES, TextKind};

const MAX_TEXT_BYTES: usize = 65_536;
const MAX_TEXTS: usize = 1000;
const MAX_MODEL_CHARS: usize = 128;

fn text(violations: &mut Violations, field: &str, text: &str) {
    if text.is_empty() {
        violations.add(field, "is empty; send 1 to 65,536 bytes");
    } else if text.len() > MAX_TEXT_BYTES {
        violations.add(field, format!("has {} bytes; send at most 65,536", text.len()));
    }
}

fn use_case(violations: &mut Violations, field: &str, number: i32) -> Option<usize> {
    match wire::UseCase::try_from(number) {
        // `not_auto` has refused the last one.
        Ok(wire::UseCase::Unspecified | wire::UseCase::Auto) => None,
        Ok(wire::UseCase::FastSearch) => Some(256),
        Ok(wire::UseCase::Clustering) => Some(384),
        Ok(wire::UseCase::Ranking) => Some(768),
        Ok(wire::UseCase::PreciseMatching) => Some(1536),
        Err(_) => {
            violations.add(field, format!("is {number}, which is no use case"));
            None
        }
    }
}

/// Options of the contract that this version does not honour are refused, never ignored.
fn not_auto(field: &str, number: i32) -> Result<(), Error> {
    if number == i32::from(wire::UseCase::Auto) {
        let message = format!("`{field}` AUTO is not served by this version; name a use case, or leave it out");
        return Err(Error::new(Reason::NotServed, message).with("field", field));
    }
    Ok(())
}

fn size_not_auto(size: Option<&wire::Size>) -> Result<(), Error> {
    match size.and_then(|size| size.by.as_ref()) {
        Some(wire::size::By::UseCase(number)) => not_auto("size.use_case", *number),
        _ => Ok(()),
    }
}

fn model_name(violations: &mut Violations, model: &str) {
    if model.chars().count() > MAX_MODEL_CHARS {
        violations.add("model", "has more than 128 characters; ListModels has the names");
    }
}

fn wanted(violations: &mut Violations, model: String, size: Option<wire::Size>, kind: i32) -> Wanted {
    model_name(violations, &model);
    let size = match size.and_then(|size| size.by) {
        None => None,
        Some(wire::size::By::UseCase(number)) => use_case(violations, "size.use_case", number),
        Some(wire::size::By::Dimension(number)) => {
            let size = usize::try_from(number).ok().filter(|size| SIZES.contains(size));
            if size.is_none() {
                violations.add("size.dimension", format!("is {number}; send 256, 384, 768 or 1536"));
            }
            size
        }
    };
    let kind = match wire::TextKind::try_from(kind) {
        Ok(wire::TextKind::Query) => TextKind::Query,
        Ok(_) => TextKind::Document,
        Err(_) => {
            violations.add("kind", format!("is {kind}, which is no kind of text"));
            TextKind::Document
        }
    };
    Wanted { model, size, kind }
}

/// The text and what is wanted of it.
pub fn embed_request(request: wire::EmbedRequest) -> Result<(String, Wanted), Error> {
    let mut violations = Violations::default();
    size_not_auto(request.size.as_ref())?;
    text(&mut violations, "text", &request.text);
    let wanted = wanted(&mut violations, request.model, request.size, request.kind);
    violations.into_result()?;
    Ok((request.text, wanted))
}

/// The texts and what is wanted of them.
pub fn batch_request(request: wire::BatchEmbedRequest) -> Result<(Vec<String>, Wanted), Error> {
    let mut violations = Violations::default();
    if request.texts.is_empty() || request.texts.len() > MAX_TEXTS {
        violations.add("texts", format!("has {} texts; send 1 to 1000", request.texts.len()));
    }
    for (index, item) in request.texts.iter().enumerate() {
        text(&mut violations, &format!("texts[{index}]"), item);
    }
    size_not_auto(request.size.as_ref())?;
    let wanted = wanted(&mut violations, request.model, request.size, request.kind);
    violations.into_result()?;
    Ok((request.texts, wanted))
}

fn int(number: usize) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

/// The answer to Embed.
pub fn embed_response(mut batch: Batch) -> wire::EmbedResponse {
    wire::EmbedResponse {
        vector: batch.vectors.pop().map(|values| wire::Vector { values }),
        model: batch.model,
        dimension: int(batch.dimension),
        cached: batch.cached > 0,
        tokens: i32::try_from(batch.tokens).unwrap_or(i32::MAX),
        truncated: batch.truncated > 0,
        untrained_truncation: batch.untrained_truncation,
    }
}

/// The answer to BatchEmbed.
pub fn batch_response(batch: Batch) -> wire::BatchEmbedResponse {
    wire::BatchEmbedResponse {
        vectors: batch
            .vectors
            .into_iter()
            .map(|values| wire::Vector { values })
            .collect(),
        model: batch.model,
        dimension: int(batch.dimension),
        cached: int(batch.cached),
        tokens: i64::try_from(batch.tokens).unwrap_or(i64::MAX),
        truncated: int(batch.truncated),
        untrained_truncation: batch.untrained_truncation,
    }
}

/// One model.
pub fn model(listed: Listed) -> wire::Model {
    let dimensions = listed.info.sizes().into_iter().map(int).collect();
    wire::Model {
        name: listed.info.name,
        provider: listed.info.provider.into(),
        dimension: int(listed.info.dimension),
        dimensions,
        matryoshka: listed.info.matryoshka,
        lexical: listed.info.lexical,
        max_tokens: int(listed.info.max_tokens),
        default: listed.default,
        revision: listed.info.revision,
    }
}

/// What is known about a search.
pub fn select_request(request: wire::SelectDimensionRequest) -> Result<SelectionRequest, Error> {
    let mut violations = Violations::default();
    not_auto("use_case", request.use_case)?;
    model_name(&mut violations, &request.model);
    let size = use_case(&mut violations, "use_case", request.use_case);
    let mut known = |field: &str, number: i32| match usize::try_from(number) {
        Ok(0) => None,
        Ok(number) => Some(number),
        Err(_) => {
            violations.add(field, format!("is {number}; send 0 or more"));
            None
        }
    };
    let query_length = known("query_length", request.query_length);
    let results = known("result_count", request.result_count);
    let budget_ms = known("latency_budget_ms", request.latency_budget_ms).and_then(|ms| u32::try_from(ms).ok());
    violations.into_result()?;
    Ok(SelectionRequest {
        model: request.model,
        size,
        query_length,
        results,
        budget_ms,
    })
}

/// The answer to SelectDimension.
pub fn select_response(selection: Selection) -> wire::SelectDimensionResponse {
    wire::SelectDimensionResponse {
        dimension: int(selection.dimension),
        rule: selection.rule.into(),
        model: selection.model,
        untrained_truncation: selection.untrained_truncation,
    }
}
