//! Policies on the wire.

use aeterna_error::{Error, Violations};
use aeterna_proto::memory::v1 as wire;
use aeterna_types::{PageToken, Scope, TenantId, Timestamp};
use prost::Message as _;

use super::{chars, cursor_text, idempotency, layers, page_limit, scope, scope_message, value};
use crate::app::NewPolicy;
use crate::domain::{Effective, Policy, Rules, Writers};

const MAX_NAME: usize = 64;
/// 100 years.
const LONGEST: i64 = 100 * 366 * 86_400;

fn check_name(violations: &mut Violations, field: &str, name: &str) {
    let sound = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(sound) {
        violations.add(field, "must have 1 to 64 lower-case letters, digits and dashes");
    }
}

/// A duration in microseconds.
fn duration(violations: &mut Violations, field: &str, message: Option<prost_types::Duration>) -> Option<i64> {
    let message = message?;
    let sound = (0..=LONGEST).contains(&message.seconds) && (0..1_000_000_000).contains(&message.nanos);
    let micros = message.seconds.saturating_mul(1_000_000) + i64::from(message.nanos) / 1000;
    if !sound || micros == 0 {
        violations.add(field, "must be more than 0 seconds and at most 100 years");
        return None;
    }
    Some(micros)
}

fn rules(violations: &mut Violations, message: wire::PolicyRules) -> Rules {
    let at = |field: &str| format!("policy.rules.{field}");
    let writers = match wire::WriterRule::try_from(message.writers) {
        Ok(wire::WriterRule::Unspecified) => None,
        Ok(wire::WriterRule::Writers) => Some(Writers::Writers),
        Ok(wire::WriterRule::Admins) => Some(Writers::Admins),
        Ok(wire::WriterRule::Nobody) => Some(Writers::Nobody),
        Err(_) => {
            violations.add(&at("writers"), format!("is {}, which is no rule", message.writers));
            None
        }
    };
    let limits = [
        ("max_content_bytes", message.max_content_bytes, 65_536),
        ("max_memories", message.max_memories, 1_000_000_000),
        ("max_document_bytes", message.max_document_bytes, 1_048_576),
    ];
    for (field, limit, most) in limits {
        if limit.is_some_and(|limit| !(1..=most).contains(&limit)) {
            violations.add(&at(field), format!("must be 1 to {most}"));
        }
    }
    Rules {
        time_to_live: duration(violations, &at("time_to_live"), message.time_to_live),
        deleted_retention: duration(violations, &at("deleted_retention"), message.deleted_retention),
        writers,
        max_content_bytes: message.max_content_bytes,
        max_memories: message.max_memories,
        max_time_to_live: duration(violations, &at("max_time_to_live"), message.max_time_to_live),
        max_document_bytes: message.max_document_bytes,
    }
}

/// What PutPolicy asks for.
pub fn put_policy_request(mut request: wire::PutPolicyRequest) -> Result<NewPolicy, Error> {
    let mut violations = Violations::default();
    let request_id = std::mem::take(&mut request.request_id);
    let idempotency = idempotency(&mut violations, "PutPolicy", &request_id, &request.encode_to_vec());
    let Some(policy) = request.policy else {
        violations.add("policy", "is missing; send at least its name and rules");
        return violations.finish(None);
    };
    check_name(&mut violations, "policy.name", &policy.name);
    let scope = scope(&mut violations, "policy.scope", policy.scope).unwrap_or_default();
    let layers = layers(&mut violations, "policy.layers", &policy.layers);
    let rules = rules(&mut violations, policy.rules.unwrap_or_default());
    chars(&mut violations, "policy.description", &policy.description, 1024);
    violations.finish(Some(NewPolicy {
        policy: Policy {
            name: policy.name,
            scope,
            layers,
            rules,
            description: policy.description,
            version: 0,
            updated_at: Timestamp::default(),
            updated_by: String::new(),
        },
        etag: Some(policy.etag).filter(|etag| !etag.is_empty()),
        idempotency,
    }))
}

/// A policy's name.
pub fn policy_name(name: &str) -> Result<(), Error> {
    let mut violations = Violations::default();
    check_name(&mut violations, "name", name);
    violations.into_result()
}

fn rules_message(rules: Rules) -> wire::PolicyRules {
    let duration = |micros: i64| prost_types::Duration {
        seconds: micros / 1_000_000,
        nanos: i32::try_from(micros % 1_000_000 * 1000).unwrap_or(0),
    };
    let writers = match rules.writers {
        None => wire::WriterRule::Unspecified,
        Some(Writers::Writers) => wire::WriterRule::Writers,
        Some(Writers::Admins) => wire::WriterRule::Admins,
        Some(Writers::Nobody) => wire::WriterRule::Nobody,
    };
    wire::PolicyRules {
        time_to_live: rules.time_to_live.map(duration),
        deleted_retention: rules.deleted_retention.map(duration),
        writers: writers.into(),
        max_content_bytes: rules.max_content_bytes,
        max_memories: rules.max_memories,
        max_time_to_live: rules.max_time_to_live.map(duration),
        max_document_bytes: rules.max_document_bytes,
    }
}

/// One policy.
pub fn policy(policy: Policy) -> wire::Policy {
    wire::Policy {
        etag: policy.etag(),
        scope: (!policy.scope.is_empty()).then(|| scope_message(&policy.scope)),
        layers: policy.layers.into_iter().map(|layer| layer.number()).collect(),
        rules: Some(rules_message(policy.rules)),
        name: policy.name,
        description: policy.description,
        updated_at: Some(value::timestamp(policy.updated_at)),
        updated_by: policy.updated_by,
    }
}

/// What ListPolicies asks for: after which name, how many, and what page tokens are bound to.
pub fn list_policies_request(
    request: wire::ListPoliciesRequest,
    tenant: &TenantId,
) -> Result<(String, usize, Vec<u8>), Error> {
    let mut violations = Violations::default();
    let limit = page_limit(&mut violations, request.page_size);
    violations.into_result()?;
    let binding = [b"policies", tenant.as_str().as_bytes()].concat();
    let after = cursor_text(&request.page_token, &binding)?.unwrap_or_default();
    Ok((after, limit, binding))
}

/// The answer to ListPolicies.
pub fn list_policies_response(policies: Vec<Policy>, more: bool, binding: &[u8]) -> wire::ListPoliciesResponse {
    let last = policies.last().filter(|_| more);
    let next_page_token = last
        .map(|last| PageToken::encode(last.name.as_bytes(), binding))
        .unwrap_or_default();
    wire::ListPoliciesResponse {
        policies: policies.into_iter().map(policy).collect(),
        next_page_token,
    }
}

/// What GetEffectivePolicy asks for.
pub fn effective_request(
    request: wire::GetEffectivePolicyRequest,
) -> Result<(Scope, Option<aeterna_types::Layer>), Error> {
    let mut violations = Violations::default();
    let scope = scope(&mut violations, "scope", request.scope).unwrap_or_default();
    let layer = match request.layer {
        0 => None,
        number => aeterna_types::Layer::from_number(number).or_else(|| {
            violations.add("layer", format!("is {number}, which is no layer"));
            None
        }),
    };
    violations.into_result()?;
    Ok((scope, layer))
}

/// The answer to GetEffectivePolicy.
pub fn effective_response(effective: Effective) -> wire::GetEffectivePolicyResponse {
    let origins = effective
        .origins
        .into_iter()
        .map(|(field, name)| (field.to_owned(), name));
    wire::GetEffectivePolicyResponse {
        rules: Some(rules_message(effective.rules)),
        origins: origins.collect(),
    }
}
