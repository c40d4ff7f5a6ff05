//! Wire types to domain types and back; refusals name the field.

use aeterna_error::{Error, Reason, Violations};
use aeterna_proto::embedding::v1 as wire;
use aeterna_types::dimension::Purpose;

use crate::app::{Batch, Choice, Listed, Reranked, Selection, SelectionRequest, Wanted};
use crate::store::TextKind;

const MAX_TEXT_BYTES: usize = 65_536;
const MAX_TEXTS: usize = 1000;
const MAX_QUERY_BYTES: usize = 8192;
const MAX_MODEL_CHARS: usize = 128;

fn text(violations: &mut Violations, field: &str, text: &str) {
    if text.is_empty() {
        violations.add(field, "is empty; send 1 to 65,536 bytes");
    } else if text.len() > MAX_TEXT_BYTES {
        violations.add(field, format!("has {} bytes; send at most 65,536", text.len()));
    }
}

fn use_case(violations: &mut Violations, field: &str, number: i32) -> Choice {
    match wire::UseCase::try_from(number) {
        Ok(wire::UseCase::Unspecified) => Choice::Rule,
        Ok(wire::UseCase::Auto) => Choice::Measured,
        Ok(wire::UseCase::FastSearch) => Choice::Size(256),
        Ok(wire::UseCase::Clustering) => Choice::Size(384),
        Ok(wire::UseCase::Ranking) => Choice::Size(768),
        Ok(wire::UseCase::PreciseMatching) => Choice::Size(1536),
        Err(_) => {
            violations.add(field, format!("is {number}, which is no use case"));
            Choice::Rule
        }
    }
}

fn model_name(violations: &mut Violations, model: &str) {
    if model.chars().count() > MAX_MODEL_CHARS {
        violations.add("model", "has more than 128 characters; ListModels has the names");
    }
}

fn wanted(
    violations: &mut Violations,
    sizes: impl Fn(&str) -> Vec<usize>,
    model: String,
    size: Option<wire::Size>,
    kind: i32,
) -> Wanted {
    model_name(violations, &model);
    let size = match size.and_then(|size| size.by) {
        None => None,
        // Without a budget, the best quality is the full size.
        Some(wire::size::By::UseCase(number)) => match use_case(violations, "size.use_case", number) {
            Choice::Size(size) => Some(size),
            Choice::Rule | Choice::Measured => None,
        },
        Some(wire::size::By::Dimension(number)) => {
            let sizes = sizes(&model);
            let size = usize::try_from(number).ok().filter(|size| sizes.contains(size));
            if size.is_none() {
                let sizes: Vec<String> = sizes.iter().map(usize::to_string).collect();
                let description = format!("is {number}; send one of {}", sizes.join(", "));
                violations.add("size.dimension", description);
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

/// The text and what is wanted of it; `sizes` can be asked of a model.
pub fn embed_request(
    request: wire::EmbedRequest,
    sizes: impl Fn(&str) -> Vec<usize>,
) -> Result<(String, Wanted), Error> {
    let mut violations = Violations::default();
    text(&mut violations, "text", &request.text);
    let wanted = wanted(&mut violations, sizes, request.model, request.size, request.kind);
    violations.into_result()?;
    Ok((request.text, wanted))
}

fn texts(violations: &mut Violations, texts: &[String]) {
    if texts.is_empty() || texts.len() > MAX_TEXTS {
        violations.add("texts", format!("has {} texts; send 1 to 1000", texts.len()));
    }
    for (index, item) in texts.iter().enumerate() {
        text(violations, &format!("texts[{index}]"), item);
    }
}

/// The query and the texts.
pub fn rerank_request(request: wire::RerankRequest) -> Result<(String, Vec<String>), Error> {
    let mut violations = Violations::default();
    let bytes = request.query.len();
    if bytes == 0 || bytes > MAX_QUERY_BYTES {
        violations.add("query", format!("has {bytes} bytes; send 1 to 8192"));
    }
    texts(&mut violations, &request.texts);
    violations.into_result()?;
    Ok((request.query, request.texts))
}

/// The answer to Rerank.
pub fn rerank_response(reranked: Reranked) -> wire::RerankResponse {
    wire::RerankResponse {
        scores: reranked.scores,
        model: reranked.model,
    }
}

/// The texts and what is wanted of them; `sizes` can be asked of a model.
pub fn batch_request(
    request: wire::BatchEmbedRequest,
    sizes: impl Fn(&str) -> Vec<usize>,
) -> Result<(Vec<String>, Wanted), Error> {
    let mut violations = Violations::default();
    texts(&mut violations, &request.texts);
    let wanted = wanted(&mut violations, sizes, request.model, request.size, request.kind);
    violations.into_result()?;
    Ok((request.texts, wanted))
}

/// Refuses texts whose vectors would not fit into one answer.
pub fn check_room(texts: usize, dimension: usize, message_bytes: usize) -> Result<(), Error> {
    /// What a message has beside the values of its vectors, and each vector beside its own.
    const BESIDE: (usize, usize) = (256, 16);
    let each = size_of::<f32>() * dimension + BESIDE.1;
    let most = message_bytes.saturating_sub(BESIDE.0) / each;
    if texts <= most {
        return Ok(());
    }
    let message = format!(
        "the answer would have {texts} vectors of {dimension} dimensions, more than {message_bytes} bytes; \
         send at most {most} texts at once, or ask for fewer dimensions"
    );
    Err(Error::new(Reason::MessageTooLarge, message).with("limit", message_bytes))
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
    model_name(&mut violations, &request.model);
    let choice = use_case(&mut violations, "use_case", request.use_case);
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
        choice,
        purpose: Purpose {
            query_length,
            results,
            budget_ms,
        },
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
