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
    hexadecimal(&fingerprint(parts)[..8])
}

/// Bytes in hexadecimal, two small letters or digits each.
pub fn hexadecimal(bytes: &[u8]) -> String {
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits
        .filter_map(|digit| char::from_digit(u32::from(digit), 16))
        .collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn bytes_read_the_same_in_hexadecimal() {
        assert_eq!(super::hexadecimal(&[0, 9, 10, 0x5f, 255]), "00090a5fff");
    }
}
