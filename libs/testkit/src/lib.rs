//! What tests and benchmarks share: real processes that leave nothing behind, raw calls, hostile input, tokens.
//!
//! A helper here panics where a test would: it is used by tests and benchmarks only.

mod hostile;
mod http;
pub mod lab;
mod postgres;
mod program;
mod raw;

use std::collections::BTreeMap;

use aeterna_auth::{Claims, Role, mint};

pub use hostile::{Mutation, mutations};
pub use http::{get, http, readyz};
pub use postgres::PostgresServer;
pub use program::{Program, built, cache, minilm};
pub use raw::RawClient;

/// A shared secret for HS256.
pub const SECRET: &str = "a-secret-for-tests-of-32-bytes-or-more";

/// A token signed with [`SECRET`]; `within` names layers and identifiers that it can't leave.
pub fn token(tenant: &str, role: Role, within: &[(&str, &str)], exp: u64) -> String {
    mint(SECRET, &claims(tenant, role, within, exp)).expect("claims can be encoded")
}

/// What [`token`] says, to be changed before it is signed.
pub fn claims(tenant: &str, role: Role, within: &[(&str, &str)], exp: u64) -> Claims {
    Claims {
        sub: "ann".into(),
        exp,
        nbf: None,
        iss: None,
        aud: None,
        tenant: tenant.into(),
        role,
        within: BTreeMap::from_iter(within.iter().map(|(layer, id)| (layer.to_string(), id.to_string()))),
    }
}

/// Seconds since the epoch that no test reaches.
pub const NEVER: u64 = 4_000_000_000;

/// A request that carries a token.
pub fn bearing<T>(message: T, token: &str) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    let value = format!("Bearer {token}").parse().expect("a token is plain text");
    request.metadata_mut().insert("authorization", value);
    request
}

/// The reason of a refusal, without its prefix, and the fields that it names.
pub fn refusal(status: &tonic::Status) -> (String, Vec<String>) {
    let error = aeterna_error::from_status(status);
    let fields = error
        .violations()
        .iter()
        .map(|violation| violation.field.clone())
        .collect();
    (aeterna_error::info(error.reason()).name.to_owned(), fields)
}
