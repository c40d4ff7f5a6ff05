//! Fingerprints of values.

/// BLAKE3 over the parts, each preceded by its length, so that no two lists of parts read the same.
pub fn fingerprint<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    *hasher.finalize().as_bytes()
}

/// The digest of a stream after one more item: BLAKE3 over the digest before it, 32 zero bytes at first, and the item's bytes.
pub fn chain(digest: [u8; 32], item: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    *hasher.update(&digest).update(item).finalize().as_bytes()
}

/// The first bytes of a fingerprint in hexadecimal: an opaque mark of a version.
pub fn mark<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    fingerprint(parts)[..8]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
