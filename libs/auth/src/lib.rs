//! Who calls, and what they may see and do. The tenant comes from the token and from nowhere else.

mod principal;
mod verify;

pub use principal::{Principal, Role, authorize};
pub use verify::{Claims, Expected, JwksFile, Verifier, VerifierError, mint};
