//! The contracts as Rust types, their descriptor set, and the table of methods. Nothing else.

macro_rules! packages {
    ($($(#[$doc:meta])* $area:ident = $package:literal;)*) => {$(
        $(#[$doc])*
        pub mod $area {
            /// Version 1.
            #[allow(missing_docs, clippy::all, unused_qualifications, rustdoc::all)]
            pub mod v1 {
                include!(concat!(env!("OUT_DIR"), "/", $package, ".rs"));
            }
        }
    )*};
}

packages! {
    /// Scopes, layers and the options that the contracts carry.
    common = "aeterna.common.v1";
    /// The reasons behind errors.
    errors = "aeterna.errors.v1";
    /// Memories, documents and policies.
    memory = "aeterna.memory.v1";
    /// Text to vectors.
    embedding = "aeterna.embedding.v1";
    /// Finding an answer in several steps.
    reasoning = "aeterna.reasoning.v1";
    /// Mixture-of-Agents runs.
    agent = "aeterna.agent.v1";
    /// Rooms, presence and shared text.
    sync = "aeterna.sync.v1";
    /// Backups, restores and drills.
    backup = "aeterna.backup.v1";
}

/// All contracts with their comments, as an encoded `google.protobuf.FileDescriptorSet`.
pub const DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptor_set.bin"));

pub use common::v1::Permission;

/// What the contracts say about one method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Method {
    /// `/package.Service/Method`.
    pub path: &'static str,
    /// What a caller needs.
    pub permission: Permission,
    /// It changes nothing, so that it may be repeated without asking.
    pub read_only: bool,
    /// The caller sends a stream of messages.
    pub client_streaming: bool,
    /// The answer is a stream of messages.
    pub server_streaming: bool,
}

/// Every method of every contract, sorted by path.
pub const METHODS: &[Method] = include!(concat!(env!("OUT_DIR"), "/methods.rs"));

/// Finds a method by its path.
pub fn method(path: &str) -> Option<&'static Method> {
    METHODS
        .binary_search_by(|method| method.path.cmp(path))
        .ok()
        .map(|index| &METHODS[index])
}

const fn permission(number: i32) -> Permission {
    match number {
        1 => Permission::Authenticated,
        2 => Permission::Read,
        3 => Permission::Write,
        _ => Permission::Admin,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_are_found_with_what_their_contract_states() {
        let add = method("/aeterna.memory.v1.MemoryService/Add").unwrap();
        assert_eq!((add.permission, add.read_only), (Permission::Write, false));
        let search = method("/aeterna.memory.v1.MemoryService/Search").unwrap();
        assert_eq!((search.permission, search.read_only), (Permission::Read, true));
        assert_eq!(method("/aeterna.memory.v1.MemoryService/Nothing"), None);
        assert!(METHODS.is_sorted_by(|a, b| a.path < b.path));
    }
}
