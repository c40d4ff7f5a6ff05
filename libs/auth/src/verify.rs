//! Tokens: JWT signed with HS256 or RS256, the keys given directly or as a JWKS file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use aeterna_error::{Error, Reason};
use aeterna_types::{Layer, Scope};
use jsonwebtoken::jwk::JwkSet;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, decode_header, encode};
use serde::{Deserialize, Serialize};

use crate::{Principal, Role};

/// By how much clocks may differ.
const LEEWAY: Duration = Duration::from_secs(30);

/// What a token says. Other claims are ignored.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Claims {
    /// Who calls.
    pub sub: String,
    /// Expiry, seconds since the epoch.
    pub exp: u64,
    /// Not valid before, seconds since the epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nbf: Option<u64>,
    /// Issuer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iss: Option<String>,
    /// Audience.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aud: Option<serde_json::Value>,
    /// The tenant.
    pub tenant: String,
    /// The role.
    pub role: Role,
    /// Layer names with the identifiers that the token can't leave, for instance `{"user": "ann"}`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub within: BTreeMap<String, String>,
}

impl Claims {
    /// When it is refused; `None`: later than there is a time for. The whole second in which it ends still counts.
    fn end(&self) -> Option<SystemTime> {
        let end = Duration::from_secs(self.exp.checked_add(1)?).checked_add(LEEWAY)?;
        SystemTime::UNIX_EPOCH.checked_add(end)
    }

    fn principal(self) -> Result<Principal, String> {
        let mut within = Scope::default();
        for (name, id) in &self.within {
            let layer = Layer::ALL.into_iter().find(|layer| layer.name() == name);
            let layer = layer.ok_or_else(|| format!("the claim `within` names the unknown layer `{name}`"))?;
            within
                .set(layer, id)
                .map_err(|error| format!("the claim `within.{name}` {error}"))?;
        }
        let tenant = self
            .tenant
            .parse()
            .map_err(|error| format!("the claim `tenant` {error}"))?;
        if self.sub.is_empty() || self.sub.chars().count() > 256 {
            return Err("the claim `sub` must have 1 to 256 characters".into());
        }
        let until = self.end();
        Ok(Principal {
            tenant,
            subject: self.sub,
            role: self.role,
            within,
            until,
        })
    }
}

/// Keys that can't be used.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct VerifierError(String);

/// A JWKS file, read again when it changes, so that keys rotate without a restart.
#[derive(Debug)]
pub struct JwksFile {
    path: PathBuf,
    cached: Mutex<Keys>,
}

/// The keys that were read last.
#[derive(Debug)]
struct Keys {
    modified: SystemTime,
    set: JwkSet,
    /// Why they could not be read anew.
    trouble: Option<String>,
}

impl JwksFile {
    /// Reads the file.
    ///
    /// # Errors
    /// When it can't be read or holds no key set.
    pub fn open(path: &Path) -> Result<Self, VerifierError> {
        let path = path.to_owned();
        let (modified, set) = Self::read(&path)?;
        let cached = Mutex::new(Keys {
            modified,
            set,
            trouble: None,
        });
        Ok(Self { path, cached })
    }

    fn read(path: &Path) -> Result<(SystemTime, JwkSet), VerifierError> {
        let shown = path.display();
        let unreadable = |error| VerifierError(format!("can't read `{shown}`: {error}"));
        let modified = Self::modified(path)?;
        let text = std::fs::read_to_string(path).map_err(unreadable)?;
        let set = serde_json::from_str(&text)
            .map_err(|error| VerifierError(format!("`{shown}` holds no key set: {error}")))?;
        Ok((modified, set))
    }

    fn modified(path: &Path) -> Result<SystemTime, VerifierError> {
        let modified = std::fs::metadata(path).and_then(|meta| meta.modified());
        modified.map_err(|error| VerifierError(format!("can't read `{}`: {error}", path.display())))
    }

    /// The keys as they are now. While the file can't be read, as in the middle of being written, those before stay in force.
    fn current(&self) -> JwkSet {
        let mut cached = self.cached.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = match Self::modified(&self.path) {
            Ok(modified) if modified == cached.modified => Ok(None),
            Ok(_) => Self::read(&self.path).map(Some),
            Err(error) => Err(error),
        };
        match changed {
            Ok(None) => cached.trouble = None,
            Ok(Some((modified, set))) => {
                *cached = Keys {
                    modified,
                    set,
                    trouble: None,
                }
            }
            Err(error) => {
                let trouble = error.to_string();
                if cached.trouble.as_ref() != Some(&trouble) {
                    tracing::error!(trouble, "the keys of before go on to be used");
                    cached.trouble = Some(trouble);
                }
            }
        }
        cached.set.clone()
    }

    fn key(&self, kid: Option<&str>, algorithm: Algorithm) -> Result<DecodingKey, String> {
        let keys = self.current();
        let wanted = keys.keys.iter().find(|key| match kid {
            Some(kid) => key.common.key_id.as_deref() == Some(kid),
            None => keys.keys.len() == 1,
        });
        let key = wanted.ok_or("it names no key of the key set")?;
        let stated = key.common.key_algorithm.map(|stated| stated.to_string());
        if stated.is_some_and(|stated| stated != format!("{algorithm:?}")) {
            return Err("its algorithm is not the key's".into());
        }
        DecodingKey::from_jwk(key).map_err(|error| format!("its key can't be used: {error}"))
    }
}

/// Checks tokens.
pub enum Verifier {
    /// No tokens: every caller is [`Principal::local`]. Only for standalone use on loopback.
    Open,
    /// One shared secret, HS256.
    Secret(Box<DecodingKey>, Expected),
    /// One public key, RS256.
    PublicKey(Box<DecodingKey>, Expected),
    /// A set of keys, RS256 (and HS256 where the set holds symmetric keys).
    Jwks(JwksFile, Expected),
}

/// The issuer and audience that tokens must name, when they are configured.
#[derive(Clone, Debug, Default)]
pub struct Expected {
    /// Issuer.
    pub issuer: Option<String>,
    /// Audience.
    pub audience: Option<String>,
}

impl std::fmt::Debug for Verifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Open => "Open",
            Self::Secret(..) => "Secret",
            Self::PublicKey(..) => "PublicKey",
            Self::Jwks(..) => "Jwks",
        })
    }
}

/// Shortest secret that HS256 may use, in bytes (RFC 7518 §3.2).
const MIN_SECRET_BYTES: usize = 32;

impl Verifier {
    /// With a shared secret.
    ///
    /// # Errors
    /// When the secret is shorter than 32 bytes.
    pub fn secret(secret: &str, expected: Expected) -> Result<Self, VerifierError> {
        if secret.len() < MIN_SECRET_BYTES {
            return Err(VerifierError(format!(
                "the secret has {} bytes; HS256 needs {MIN_SECRET_BYTES}",
                secret.len()
            )));
        }
        Ok(Self::Secret(
            Box::new(DecodingKey::from_secret(secret.as_bytes())),
            expected,
        ))
    }

    /// With a public key in PEM.
    ///
    /// # Errors
    /// When the text is no RSA public key.
    pub fn public_key(pem: &str, expected: Expected) -> Result<Self, VerifierError> {
        let key = DecodingKey::from_rsa_pem(pem.as_bytes())
            .map_err(|error| VerifierError(format!("the public key is not RSA in PEM: {error}")))?;
        Ok(Self::PublicKey(Box::new(key), expected))
    }

    /// Who sent the value of an `authorization` header.
    ///
    /// # Errors
    /// TOKEN_MISSING or TOKEN_INVALID.
    pub fn verify(&self, authorization: Option<&str>) -> Result<Principal, Error> {
        let Some(expected) = self.expected() else {
            return Ok(Principal::local());
        };
        let missing = "no token was sent; send `authorization: Bearer <token>`";
        let value = authorization.ok_or_else(|| Error::new(Reason::TokenMissing, missing))?;
        let (scheme, token) = value.split_once(' ').unwrap_or((value, ""));
        if !scheme.eq_ignore_ascii_case("bearer") || token.is_empty() {
            return Err(Error::new(Reason::TokenMissing, missing));
        }
        let invalid = |why: String| Error::new(Reason::TokenInvalid, format!("the token is refused: {why}"));
        let claims = self.claims(token.trim(), expected).map_err(invalid)?;
        claims.principal().map_err(invalid)
    }

    fn expected(&self) -> Option<&Expected> {
        match self {
            Self::Open => None,
            Self::Secret(_, expected) | Self::PublicKey(_, expected) | Self::Jwks(_, expected) => Some(expected),
        }
    }

    fn claims(&self, token: &str, expected: &Expected) -> Result<Claims, String> {
        let header = decode_header(token).map_err(|_| "it is not a JWT".to_string())?;
        let set_key;
        // The algorithm is the key's, never the one that the token would like: no downgrade from RS256 to HS256.
        let (key, algorithm) = match self {
            Self::Open => return Err("tokens are not checked here".into()),
            Self::Secret(key, _) => (key.as_ref(), Algorithm::HS256),
            Self::PublicKey(key, _) => (key.as_ref(), Algorithm::RS256),
            Self::Jwks(file, _) => {
                if !matches!(header.alg, Algorithm::RS256 | Algorithm::HS256) {
                    return Err("its algorithm is neither RS256 nor HS256".into());
                }
                set_key = file.key(header.kid.as_deref(), header.alg)?;
                (&set_key, header.alg)
            }
        };
        let mut validation = Validation::new(algorithm);
        validation.validate_nbf = true;
        validation.leeway = LEEWAY.as_secs();
        validation.validate_aud = expected.audience.is_some();
        if let Some(audience) = &expected.audience {
            validation.set_audience(&[audience]);
            validation.required_spec_claims.insert("aud".into());
        }
        if let Some(issuer) = &expected.issuer {
            validation.set_issuer(&[issuer]);
            validation.required_spec_claims.insert("iss".into());
        }
        decode::<Claims>(token, key, &validation)
            .map(|data| data.claims)
            .map_err(|error| error.to_string())
    }
}

/// Signs claims with a shared secret, HS256.
///
/// # Errors
/// When the claims can't be encoded.
pub fn mint(secret: &str, claims: &Claims) -> Result<String, VerifierError> {
    encode(
        &Header::new(Algorithm::HS256),
        claims,
        &EncodingKey::from_secret(secret.as_bytes()),
    )
    .map_err(|error| VerifierError(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "0123456789abcdef0123456789abcdef";

    fn claims() -> Claims {
        Claims {
            sub: "ann".into(),
            exp: 4_000_000_000,
            nbf: None,
            iss: Some("here".into()),
            aud: None,
            tenant: "acme".into(),
            role: Role::Writer,
            within: BTreeMap::from([("user".into(), "ann".into())]),
        }
    }

    fn verifier() -> Verifier {
        Verifier::secret(
            SECRET,
            Expected {
                issuer: Some("here".into()),
                audience: None,
            },
        )
        .unwrap()
    }

    fn verdict(claims: &Claims) -> Result<Principal, Error> {
        verifier().verify(Some(&format!("Bearer {}", mint(SECRET, claims).unwrap())))
    }

    #[test]
    fn a_good_token_names_tenant_role_and_bound() {
        let principal = verdict(&claims()).unwrap();
        assert_eq!((principal.tenant.as_str(), principal.role), ("acme", Role::Writer));
        assert_eq!(principal.within.get(Layer::User), Some("ann"));
        let end = Duration::from_secs(4_000_000_001) + LEEWAY;
        assert_eq!(principal.until, Some(SystemTime::UNIX_EPOCH + end));
        // One that never ends.
        let mut eternal = claims();
        eternal.exp = u64::MAX;
        assert_eq!(verdict(&eternal).unwrap().until, None);
    }

    #[test]
    fn every_flaw_is_refused() {
        let flawed: [fn(&mut Claims); 7] = [
            |c| c.exp = 1,
            |c| c.nbf = Some(3_900_000_000),
            |c| c.iss = Some("elsewhere".into()),
            |c| c.iss = None,
            |c| c.tenant = String::new(),
            |c| c.sub = String::new(),
            |c| c.within = BTreeMap::from([("galaxy".into(), "m31".into())]),
        ];
        for (index, flaw) in flawed.iter().enumerate() {
            let mut claims = claims();
            flaw(&mut claims);
            assert_eq!(
                verdict(&claims).unwrap_err().reason(),
                Reason::TokenInvalid,
                "flaw {index}"
            );
        }
    }

    #[test]
    fn unsigned_and_foreign_tokens_are_refused() {
        let other = mint("another-secret-of-at-least-32-bytes!", &claims()).unwrap();
        let good = mint(SECRET, &claims()).unwrap();
        // {"alg":"none"} with the good token's claims.
        let body = good.split('.').nth(1).unwrap();
        let none = format!("eyJhbGciOiJub25lIn0.{body}.");
        for token in [
            other,
            none,
            good[..good.len() - 2].to_string(),
            "x".into(),
            "a.b.c".into(),
        ] {
            let error = verifier().verify(Some(&format!("Bearer {token}"))).unwrap_err();
            assert_eq!(error.reason(), Reason::TokenInvalid, "{token}");
        }
        for header in [None, Some(""), Some("Basic YTpi"), Some("Bearer ")] {
            assert_eq!(
                verifier().verify(header).unwrap_err().reason(),
                Reason::TokenMissing,
                "{header:?}"
            );
        }
    }

    fn bearer(key: &EncodingKey, header: &Header) -> String {
        format!("Bearer {}", encode(header, &claims(), key).unwrap())
    }

    #[test]
    fn rs256_takes_a_public_key_or_a_key_set_that_may_change_under_it() {
        use base64::Engine as _;
        use rsa::pkcs1::{EncodeRsaPrivateKey as _, LineEnding};
        use rsa::pkcs8::EncodePublicKey as _;
        use rsa::traits::PublicKeyParts as _;

        let pair = || {
            let private = rsa::RsaPrivateKey::new(&mut rsa::rand_core::OsRng, 2048).unwrap();
            let pem = private.to_pkcs1_pem(LineEnding::LF).unwrap();
            (
                EncodingKey::from_rsa_pem(pem.as_bytes()).unwrap(),
                private.to_public_key(),
            )
        };
        let (ours, public) = pair();
        let (theirs, other) = pair();
        let pem = public.to_public_key_pem(LineEnding::LF).unwrap();
        let verifier = Verifier::public_key(&pem, Expected::default()).unwrap();
        let rs256 = Header::new(Algorithm::RS256);
        assert_eq!(
            verifier.verify(Some(&bearer(&ours, &rs256))).unwrap().tenant.as_str(),
            "acme"
        );
        // Another key, and the old trick: the public key taken as the secret of HS256.
        let confused = bearer(
            &EncodingKey::from_secret(pem.as_bytes()),
            &Header::new(Algorithm::HS256),
        );
        for flawed in [bearer(&theirs, &rs256), confused] {
            assert_eq!(
                verifier.verify(Some(&flawed)).unwrap_err().reason(),
                Reason::TokenInvalid
            );
        }

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys.json");
        let number = |n: Vec<u8>| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(n);
        let put = |kid: &str, key: &rsa::RsaPublicKey, age: u64| {
            let (n, e) = (number(key.n().to_bytes_be()), number(key.e().to_bytes_be()));
            let set =
                serde_json::json!({"keys": [{"kty": "RSA", "kid": kid, "alg": "RS256", "use": "sig", "n": n, "e": e}]});
            std::fs::write(&path, set.to_string()).unwrap();
            let time = SystemTime::UNIX_EPOCH + Duration::from_secs(age);
            std::fs::File::open(&path).unwrap().set_modified(time).unwrap();
        };
        let named = |kid: &str| Header {
            kid: Some(kid.into()),
            ..Header::new(Algorithm::RS256)
        };
        put("a", &public, 1_000_000);
        let verifier = Verifier::Jwks(JwksFile::open(&path).unwrap(), Expected::default());
        assert!(verifier.verify(Some(&bearer(&ours, &named("a")))).is_ok());
        assert!(
            verifier.verify(Some(&bearer(&ours, &rs256))).is_ok(),
            "a set of one key needs no name"
        );
        assert!(verifier.verify(Some(&bearer(&theirs, &named("a")))).is_err());
        assert!(verifier.verify(Some(&bearer(&ours, &named("b")))).is_err());
        put("b", &other, 2_000_000);
        assert!(
            verifier.verify(Some(&bearer(&theirs, &named("b")))).is_ok(),
            "keys rotate without a restart"
        );
        assert!(verifier.verify(Some(&bearer(&ours, &named("a")))).is_err());
        // In the middle of being written, or gone for a moment: the keys of before stay in force.
        for broken in ["", "{\"keys\": [", "nothing"] {
            std::fs::write(&path, broken).unwrap();
            assert!(verifier.verify(Some(&bearer(&theirs, &named("b")))).is_ok(), "{broken}");
        }
        std::fs::remove_file(&path).unwrap();
        assert!(verifier.verify(Some(&bearer(&theirs, &named("b")))).is_ok());
        assert!(JwksFile::open(&dir.path().join("none.json")).is_err());
    }

    #[test]
    fn a_short_secret_is_refused() {
        assert!(Verifier::secret("short", Expected::default()).is_err());
    }
}
