//! What a process presents to its peers in its own background work, when no caller's token is at hand.

use std::collections::BTreeMap;

use aeterna_auth::{Claims, Expected, Role, mint};
use aeterna_config::Secret;
use aeterna_types::{Clock as _, SystemClock, TenantId};

/// Seconds that a token signed by the process itself is good for: background calls are short.
const LIFETIME_SECONDS: u64 = 300;

/// Where the token of background work comes from.
#[derive(Clone, Debug, Default)]
pub enum Credentials {
    /// There is none: peers are in the same process, or ask for none.
    #[default]
    None,
    /// One that an operator made.
    Token(Secret),
    /// Signed here, per tenant.
    Signed {
        /// The secret that all processes share.
        secret: Secret,
        /// What tokens must name.
        expected: Expected,
    },
}

impl Credentials {
    /// A token for work on behalf of a tenant.
    pub(crate) fn token(&self, tenant: &TenantId) -> Option<String> {
        match self {
            Self::None => None,
            Self::Token(token) => Some(token.expose().to_owned()),
            Self::Signed { secret, expected } => {
                let now = u64::try_from(SystemClock.now().parts().0).unwrap_or(0);
                let claims = Claims {
                    sub: "service".into(),
                    exp: now + LIFETIME_SECONDS,
                    nbf: None,
                    iss: expected.issuer.clone(),
                    aud: expected.audience.clone().map(Into::into),
                    tenant: tenant.to_string(),
                    role: Role::Writer,
                    within: BTreeMap::new(),
                };
                mint(secret.expose(), &claims).ok()
            }
        }
    }
}
