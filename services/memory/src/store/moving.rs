//! What only a move to another store asks of one.

use aeterna_types::TenantId;
use async_trait::async_trait;

use crate::domain::{Document, Policy, Writer};
use crate::error::MemoryError;

/// Gives up, and takes in, what memories bring with them.
#[async_trait]
pub trait Moving: Send + Sync {
    /// All tenants that have anything.
    async fn tenants(&self) -> Result<Vec<TenantId>, MemoryError>;

    /// Takes a document in as it was, with all its versions, oldest first; false when its place is taken.
    async fn take_document(&self, writer: &Writer, versions: Vec<Document>) -> Result<bool, MemoryError>;

    /// Takes a policy in as it was; false when there is one of its name.
    async fn take_policy(&self, writer: &Writer, policy: Policy) -> Result<bool, MemoryError>;
}
