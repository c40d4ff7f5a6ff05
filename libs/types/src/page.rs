//! Opaque page tokens that are bound to their request (AIP-158).

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use crate::seal::fingerprint;

/// A page token that was changed or that belongs to another request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("does not belong to this request; send it with the same fields as the page before, or start again without it")]
pub struct PageTokenError;

/// A place in a list, tied to the request that it came from.
///
/// The layout is `check (16 bytes) | cursor`; the check covers the cursor and the request's fields, the tenant among
/// them. It is no secret: a forged cursor shows nothing that the request itself may not see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageToken;

impl PageToken {
    /// A token for `cursor`, bound to `request`.
    pub fn encode(cursor: &[u8], request: &[u8]) -> String {
        let mut bytes = check(cursor, request).to_vec();
        bytes.extend_from_slice(cursor);
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// The cursor of a token that was made for the same request.
    pub fn decode(token: &str, request: &[u8]) -> Result<Vec<u8>, PageTokenError> {
        let bytes = URL_SAFE_NO_PAD.decode(token).map_err(|_| PageTokenError)?;
        let (found, cursor) = bytes.split_at_checked(16).ok_or(PageTokenError)?;
        if found == check(cursor, request) {
            Ok(cursor.to_vec())
        } else {
            Err(PageTokenError)
        }
    }
}

fn check(cursor: &[u8], request: &[u8]) -> [u8; 16] {
    let mut check = [0; 16];
    check.copy_from_slice(&fingerprint([b"page".as_slice(), cursor, request])[..16]);
    check
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_opens_only_its_own_request() {
        let token = PageToken::encode(b"42", b"list a");
        assert_eq!(PageToken::decode(&token, b"list a"), Ok(b"42".to_vec()));
        assert_eq!(PageToken::decode(&token, b"list b"), Err(PageTokenError));
        for bad in ["", "A", "!!", &token[1..], &format!("{token}AA")] {
            assert_eq!(PageToken::decode(bad, b"list a"), Err(PageTokenError), "{bad}");
        }
    }
}
