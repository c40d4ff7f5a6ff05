//! The words everything else speaks: ids, scopes, layers, time, page tokens, Matryoshka sizes. No I/O.

mod clock;
pub mod dimension;
mod id;
mod page;
mod scope;
mod seal;

pub use clock::{Clock, ManualClock, SystemClock, TimeError, Timestamp};
pub use id::{IdError, MemoryId, RequestId, TenantId};
pub use page::{PageToken, PageTokenError};
pub use scope::{Layer, MAX_SCOPE_ID_CHARS, Scope, ScopeError};
pub use seal::{chain, fingerprint, hexadecimal, mark};
