//! The keys that verify tokens, and which of them may verify a given one.
//!
//! Source: RFC 7515 section 4.1.4 (`kid`), RFC 7518 section 3 (algorithms, length of keys), RFC 8037 (EdDSA), RFC 8725
//! sections 2.1, 3.1 and 3.5; protocol version 1, section 2. The algorithm belongs to the configured key; a token can only
//! name a key.
//! Memory: a prepared HMAC state or a public key each; a [`KeySet`] is shared, so each core's copy is one pointer.
//! Errors: [`KeyError`], the operator's fault, at start or reload. Not here: tokens (`jwt`), the forms of public keys
//! (`public_key`), key sets of issuers (`jwks`), where secrets come from (`config`).

use std::fmt;
use std::num::NonZeroU64;
use std::sync::Arc;

use base64::Engine;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use ring::hmac;
use serde_json::Value;

pub use super::algorithm::{Algorithm, KeyKind, UnknownAlgorithm};
use super::public_key::{PublicKey, PublicKeyError};
use crate::secret::Secret;

/// A shared secret and what it is for: one `[[auth.jwt.key]]` with `secret`.
#[derive(Clone, Debug)]
pub struct KeyConfig {
    /// The name tokens call it by; without one it is tried for tokens that name none.
    pub kid: Option<String>,
    /// The one algorithm it may be used with.
    pub algorithm: Algorithm,
    /// The shared secret.
    pub secret: Secret,
}

/// Why a key, or a set of them, is refused: the operator's mistake. Holds no part of a secret.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum KeyError {
    /// Shorter than the hash it is used with.
    #[error("the secret has {bytes} bytes, {algorithm} needs at least {} (RFC 7518 section 3.2)", .algorithm.key_bytes_min())]
    TooShort {
        /// The key's algorithm.
        algorithm: Algorithm,
        /// What it has.
        bytes: usize,
    },
    /// Something public, or a document about a key, where a secret should be.
    #[error("the secret looks like {looks}, which must not be used as a secret of {algorithm} (RFC 8725 section 2.1)")]
    NotASecret {
        /// The key's algorithm.
        algorithm: Algorithm,
        /// What it looks like.
        looks: &'static str,
    },
    /// A shared secret where a public key is needed.
    #[error("{algorithm} verifies with a public key, not with a shared secret")]
    NotShared {
        /// The key's algorithm.
        algorithm: Algorithm,
    },
    /// A public key for another algorithm.
    #[error("the public key is {}, {algorithm} needs {}", .found.name(), .algorithm.key_kind().map_or("a shared secret", KeyKind::name))]
    OtherKind {
        /// The key's algorithm.
        algorithm: Algorithm,
        /// What it is of.
        found: KeyKind,
    },
    /// Two keys that a token could not tell apart.
    #[error("the keys number {first} and {second} have the same kid and alg")]
    Repeated {
        /// Place of the one, counted from 1.
        first: usize,
        /// Place of the other, counted from 1.
        second: usize,
    },
}

/// Which key verified a credential, for as long as that matters: the same after a reload while issuer, `kid`, algorithm and
/// key are. A keyed hash, so it tells nothing of a secret.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct KeyId(NonZeroU64);

impl KeyId {
    /// The id of these bits; `None`: none has them.
    pub fn of_bits(bits: u64) -> Option<KeyId> {
        NonZeroU64::new(bits).map(KeyId)
    }

    /// Its bits, the same in every process with that key.
    pub fn bits(self) -> u64 {
        self.0.get()
    }
}

#[derive(Clone)]
enum Material {
    Shared(hmac::Key),
    Public(PublicKey),
}

/// One key, ready to verify; a shared one, also to sign.
#[derive(Clone)]
pub struct Key {
    kid: Option<Box<str>>,
    algorithm: Algorithm,
    material: Material,
    id: KeyId,
}

impl Key {
    /// Checks and prepares a shared secret.
    ///
    /// Errors: too short for its algorithm, which has none; a PEM, DER, OpenSSH or JWK document, however it is encoded.
    pub fn new(config: &KeyConfig) -> Result<Key, KeyError> {
        let KeyConfig { kid, algorithm, secret } = config;
        let (algorithm, bytes) = (*algorithm, secret.expose_secret());
        let hmac = hmac_of(algorithm).ok_or(KeyError::NotShared { algorithm })?;
        if let Some(looks) = document_kind(bytes) {
            return Err(KeyError::NotASecret { algorithm, looks });
        }
        if bytes.len() < algorithm.key_bytes_min() {
            return Err(KeyError::TooShort { algorithm, bytes: bytes.len() });
        }
        let id = key_id("", kid.as_deref(), algorithm, bytes);
        let material = Material::Shared(hmac::Key::new(hmac, bytes));
        Ok(Key { kid: kid.as_deref().map(Box::from), algorithm, material, id })
    }

    /// A public key of `issuer` (empty: configured as a key by itself).
    ///
    /// Errors: it is for another algorithm.
    pub fn public(
        issuer: &str,
        kid: Option<&str>,
        algorithm: Algorithm,
        public_key: &PublicKey,
    ) -> Result<Key, KeyError> {
        let found = public_key.kind();
        if algorithm.key_kind() != Some(found) {
            return Err(KeyError::OtherKind { algorithm, found });
        }
        let [first, second] = public_key.parts();
        let length = first.len().to_be_bytes();
        let id = key_id(issuer, kid, algorithm, &[&length, first, second].concat());
        Ok(Key { kid: kid.map(Box::from), algorithm, material: Material::Public(public_key.clone()), id })
    }

    /// The name tokens call it by.
    pub fn kid(&self) -> Option<&str> {
        self.kid.as_deref()
    }

    /// The one algorithm it is used with.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Its identity across reloads.
    pub fn id(&self) -> KeyId {
        self.id
    }

    /// Bits that follow from a shared secret and from what they are for, and lead back to neither. What they are for is no
    /// text that a token's signature is over. `None`: it is a public key.
    pub fn derived(&self, purpose: &[u8]) -> Option<[u8; 32]> {
        match &self.material {
            Material::Shared(key) => hmac::sign(key, purpose).as_ref().first_chunk().copied(),
            Material::Public(_) => None,
        }
    }

    /// Whether `signature` is this key's over `signed`; takes the same time wherever they differ.
    pub fn verifies(&self, signed: &[u8], signature: &[u8]) -> bool {
        match &self.material {
            Material::Shared(key) => hmac::verify(key, signed, signature).is_ok(),
            Material::Public(key) => key.verifies(self.algorithm, signed, signature),
        }
    }

    /// A shared key's signature over `signed`; `None`: it is public, and whoever may sign has the other half.
    pub fn sign(&self, signed: &[u8]) -> Option<impl AsRef<[u8]> + use<>> {
        match &self.material {
            Material::Shared(key) => Some(hmac::sign(key, signed)),
            Material::Public(_) => None,
        }
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key").field("kid", &self.kid).field("algorithm", &self.algorithm).finish_non_exhaustive()
    }
}

/// The keys in force, in the order of the file. Cloning shares them.
#[derive(Clone, Debug, Default)]
pub struct KeySet(Arc<[Key]>);

/// Why no key may verify a token with this `kid` and `alg`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum NoKey {
    /// No key has this `kid`.
    UnknownKid,
    /// The key of this `kid` is for another algorithm.
    OtherAlgorithm,
    /// The token names no key, and none has this algorithm.
    NoneOfAlgorithm,
}

impl KeySet {
    /// Checks and prepares `keys`. The same secret may stand under several kids and algorithms.
    ///
    /// Errors: the first key that [`Key::new`] refuses; two of the same `kid` (or both without) and algorithm, unless
    /// neither has a `kid` and the secrets differ, since such keys are tried in turn.
    pub fn new(keys: &[KeyConfig]) -> Result<KeySet, KeyError> {
        KeySet::of(keys.iter().map(Key::new).collect::<Result<Vec<Key>, KeyError>>()?)
    }

    /// The same of keys that are prepared.
    ///
    /// Errors: as for [`KeySet::new`], but for single keys.
    pub fn of(keys: Vec<Key>) -> Result<KeySet, KeyError> {
        for (second, key) in keys.iter().enumerate() {
            let same = |other: &Key| match key.kid {
                Some(_) => other.kid == key.kid && other.algorithm == key.algorithm,
                None => other.id == key.id,
            };
            if let Some(first) = keys.iter().take(second).position(same) {
                return Err(KeyError::Repeated { first: first + 1, second: second + 1 });
            }
        }
        Ok(KeySet(Arc::from(keys)))
    }

    /// The keys of an issuer's set, none twice. Two may have the same `kid`: both are tried.
    pub(super) fn of_issuer(keys: Vec<Key>) -> KeySet {
        let mut distinct: Vec<Key> = Vec::with_capacity(keys.len());
        for key in keys {
            if distinct.iter().all(|other| other.id != key.id) {
                distinct.push(key);
            }
        }
        KeySet(Arc::from(distinct))
    }

    /// The keys that a token with this header may be tried against, at least one.
    pub fn candidates<'k>(
        &'k self,
        kid: Option<&'k str>,
        algorithm: Algorithm,
    ) -> Result<impl Iterator<Item = &'k Key>, NoKey> {
        let named = move |key: &&Key| kid.is_none() || key.kid() == kid;
        let fits = move |key: &&Key| named(key) && key.algorithm == algorithm;
        if !self.0.iter().any(|key| fits(&key)) {
            return Err(match kid {
                None => NoKey::NoneOfAlgorithm,
                Some(_) if self.0.iter().any(|key| named(&key)) => NoKey::OtherAlgorithm,
                Some(_) => NoKey::UnknownKid,
            });
        }
        Ok(self.0.iter().filter(fits))
    }

    /// Whether the key that verified a credential is still in force.
    pub fn contains(&self, id: KeyId) -> bool {
        self.0.iter().any(|key| key.id == id)
    }

    /// The keys, in the order of the file.
    pub fn iter(&self) -> impl Iterator<Item = &Key> {
        self.0.iter()
    }

    /// Whether there is none, so that every token is refused.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn hmac_of(algorithm: Algorithm) -> Option<hmac::Algorithm> {
    match algorithm {
        Algorithm::Hs256 => Some(hmac::HMAC_SHA256),
        Algorithm::Hs384 => Some(hmac::HMAC_SHA384),
        Algorithm::Hs512 => Some(hmac::HMAC_SHA512),
        _ => None,
    }
}

/// Hashed under the secret itself: whoever does not know the secret learns nothing, whoever does needs nothing.
fn key_id(issuer: &str, kid: Option<&str>, algorithm: Algorithm, material: &[u8]) -> KeyId {
    let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, material));
    context.update(b"restcast key id");
    context.update(algorithm.name().as_bytes());
    if !issuer.is_empty() {
        context.update(b"@");
        context.update(&issuer.len().to_be_bytes());
        context.update(issuer.as_bytes());
    }
    if let Some(kid) = kid {
        // The algorithm's name has a fixed length, so what follows is the kid, and an empty one is told from none.
        context.update(b":");
        context.update(kid.as_bytes());
    }
    let tag = context.sign();
    let bits = tag.as_ref().first_chunk().map_or(0, |first| u64::from_be_bytes(*first));
    KeyId(NonZeroU64::new(bits).unwrap_or(NonZeroU64::MIN))
}

/// What kind of document stands where a secret should, if it looks like one: as it is, or in base64 or hexadecimal, in
/// characters of one byte or two, in JSON or between other lines. RFC 8725 2.1: a public key used as an HMAC secret lets
/// everyone sign.
fn document_kind(bytes: &[u8]) -> Option<&'static str> {
    der_kind(bytes).or_else(|| {
        let marked = [&b"\xff\xfe"[..], b"\xfe\xff"];
        let unmarked = marked.into_iter().find_map(|mark| bytes.strip_prefix(mark)).unwrap_or(bytes);
        // Of what documents are made of, the other byte of two is zero.
        let text: String = str::from_utf8(unmarked).ok()?.chars().filter(|&c| c != '\0').collect();
        text_kind(&text)
    })
}

fn text_kind(text: &str) -> Option<&'static str> {
    let text = text.trim_start_matches(|c: char| c.is_whitespace() || c == '\u{feff}');
    if text.contains("-----BEGIN ") || text.contains("---- BEGIN ") {
        return Some("a PEM document");
    }
    if ["ssh-", "ecdsa-sha2-", "sk-ssh-", "sk-ecdsa-"].iter().any(|prefix| text.starts_with(prefix))
        && text.contains(' ')
    {
        return Some("an OpenSSH public key");
    }
    // What stands behind a first value does not make it a secret.
    if text.starts_with(['{', '[', '"'])
        && let Some(Ok(value)) = serde_json::Deserializer::from_str(text).into_iter::<Value>().next()
    {
        return json_kind(&value);
    }
    let digits: String = text.chars().filter(|c| !c.is_ascii_whitespace()).collect();
    let config = GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true);
    let base64 = |alphabet| GeneralPurpose::new(alphabet, config).decode(&digits).ok();
    let decoded = [base64(&alphabet::STANDARD), base64(&alphabet::URL_SAFE), hex(&digits)];
    // Shorter than what it was decoded from, so that this ends.
    decoded.into_iter().flatten().filter(|bytes| !bytes.is_empty()).find_map(|bytes| document_kind(&bytes))
}

/// The same of a JSON value: a JSON Web Key or a set of them, wherever in it, or a string that is a document.
fn json_kind(value: &Value) -> Option<&'static str> {
    match value {
        Value::Object(members) if members.contains_key("kty") || members.contains_key("keys") => Some("a JSON Web Key"),
        Value::Object(members) => members.values().find_map(json_kind),
        Value::Array(values) => values.iter().find_map(json_kind),
        Value::String(text) => text_kind(text),
        Value::Null | Value::Bool(_) | Value::Number(_) => None,
    }
}

fn hex(digits: &str) -> Option<Vec<u8>> {
    let digits: Vec<u32> = digits.chars().map(|c| c.to_digit(16)).collect::<Option<_>>()?;
    let byte = |pair: &[u32]| match pair {
        [high, low] => u8::try_from(high << 4 | low).ok(),
        _ => None,
    };
    digits.chunks(2).map(byte).collect()
}

/// The same of a binary form, whatever stands behind it where it is told by its beginning.
fn der_kind(bytes: &[u8]) -> Option<&'static str> {
    if is_public_key_der(bytes) {
        return Some("a DER public key");
    }
    if is_certificate_der(bytes) {
        return Some("a DER certificate");
    }
    if is_openssh(bytes) {
        return Some("an OpenSSH public key");
    }
    // What would verify tokens as a public key, or would be refused as one for what it is.
    match PublicKey::of_der(bytes) {
        Ok(_) | Err(PublicKeyError::RsaBits { .. } | PublicKeyError::Unsupported) => {
            Some("a DER public key or certificate")
        }
        Err(PublicKeyError::Private) => Some("a DER private key"),
        Err(PublicKeyError::NoKey | PublicKeyError::Symmetric | PublicKeyError::Broken) => None,
    }
}

/// RFC 4253 6.6: the length of the key's type, then that.
fn is_openssh(bytes: &[u8]) -> bool {
    let Some(([0, 0, 0, length], rest)) = bytes.split_first_chunk() else { return false };
    let name = rest.get(..usize::from(*length)).unwrap_or_default();
    ["ssh-", "ecdsa-sha2-", "sk-"].iter().any(|prefix| name.starts_with(prefix.as_bytes()))
}

/// Whether `bytes` begin like a certificate of version 3 (RFC 5280 4.1): a sequence in a sequence, then the version.
fn is_certificate_der(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x30\x82")
        && bytes.get(4..6) == Some(b"\x30\x82")
        && bytes.get(8..13) == Some(b"\xa0\x03\x02\x01\x02")
}

/// Whether `bytes` begin like a SubjectPublicKeyInfo (RFC 5280 4.1) of RSA, EC or EdDSA, or a PKCS #1 RSAPublicKey.
fn is_public_key_der(bytes: &[u8]) -> bool {
    const RSA_ENCRYPTION: &[u8] = b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01";
    const EC_PUBLIC_KEY: &[u8] = b"\x06\x07\x2a\x86\x48\xce\x3d\x02\x01";
    const ED_25519: &[u8] = b"\x06\x03\x2b\x65\x70";
    const ED_448: &[u8] = b"\x06\x03\x2b\x65\x71";
    let Some((&0x30, rest)) = bytes.split_first() else { return false };
    // A length of one byte, or of up to four behind their count; then the algorithm or, in PKCS #1, the modulus.
    let inside = match rest.first() {
        Some(0..=0x7f) => rest.get(1..),
        Some(&count @ 0x81..=0x84) => rest.get(1 + usize::from(count - 0x80)..),
        _ => None,
    };
    let Some(inside) = inside else { return false };
    let modulus_of_2048_bits_or_more = inside.starts_with(b"\x02\x82") && bytes.ends_with(b"\x02\x03\x01\x00\x01");
    let algorithm = inside.get(2..).unwrap_or_default();
    let is_named = [RSA_ENCRYPTION, EC_PUBLIC_KEY, ED_25519, ED_448].iter().any(|oid| algorithm.starts_with(oid));
    modulus_of_2048_bits_or_more || inside.first() == Some(&0x30) && is_named
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(kid: Option<&str>, algorithm: Algorithm, secret: &[u8]) -> KeyConfig {
        KeyConfig { kid: kid.map(str::to_owned), algorithm, secret: Secret::new(secret) }
    }

    const A: &[u8] = &[b'a'; 64];
    const B: &[u8] = &[b'b'; 64];

    #[test]
    fn a_secret_is_at_least_as_long_as_the_hash() {
        let symmetric = Algorithm::ALL.into_iter().filter(|algorithm| algorithm.is_symmetric());
        for (algorithm, bytes_min) in symmetric.zip([32, 48, 64]) {
            assert!(KeySet::new(&[key(None, algorithm, &vec![7; bytes_min])]).is_ok());
            let err = KeySet::new(&[key(None, algorithm, &vec![7; bytes_min - 1])]).unwrap_err();
            assert_eq!(err, KeyError::TooShort { algorithm, bytes: bytes_min - 1 });
            let said = format!(
                "the secret has {} bytes, {algorithm} needs at least {bytes_min} (RFC 7518 section 3.2)",
                bytes_min - 1
            );
            assert_eq!(err.to_string(), said);
        }
        assert!(KeySet::new(&[key(None, Algorithm::Hs256, b"")]).is_err());
    }

    #[test]
    fn public_keys_and_key_documents_are_no_secrets() {
        let spki = |inside: &[u8]| [&b"\x30\x81\x90"[..], inside, &[7; 120]].concat();
        let cases: [(&[u8], &str); 10] = [
            (b"-----BEGIN PUBLIC KEY-----\nMIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8A\n", "a PEM document"),
            (b"\n -----BEGIN CERTIFICATE-----\nMIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8A\n", "a PEM document"),
            (b"---- BEGIN SSH2 PUBLIC KEY ----\nAAAAB3NzaC1yc2EAAAADAQABAAAB\n", "a PEM document"),
            (b"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ9 me@example", "an OpenSSH public key"),
            (br#"{"kty":"RSA","n":"0vx7agoebGcQSuuPiLJXZptN9","e":"AQAB"}"#, "a JSON Web Key"),
            (br#"{"keys":[{"kty":"oct","k":"0vx7agoebGcQSuuPiLJXZptN9"}]}"#, "a JSON Web Key"),
            (&spki(b"\x30\x0d\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01\x05\x00"), "a DER public key"),
            (&spki(b"\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01"), "a DER public key"),
            (b"\x30\x2a\x30\x05\x06\x03\x2b\x65\x70\x03\x21\x00abcdefghijklmnopqrstuvwxyz012345", "a DER public key"),
            (
                &[b"\x30\x82\x01\x0a\x02\x82\x01\x01", &[7u8; 257][..], b"\x02\x03\x01\x00\x01"].concat(),
                "a DER public key",
            ),
        ];
        for (secret, looks) in cases {
            let err = KeySet::new(&[key(None, Algorithm::Hs256, secret)]).unwrap_err();
            assert_eq!(err, KeyError::NotASecret { algorithm: Algorithm::Hs256, looks });
        }
        // However it is encoded: `b64:` and `hex:` are for secrets, and so are bare digits.
        for (secret, looks) in [
            (include_str!("../../tests/vectors/keys/rsa2048.pub.pem"), "a DER public key"),
            (include_str!("../../tests/vectors/keys/rsa2048.pub.pkcs1.pem"), "a DER public key"),
            (include_str!("../../tests/vectors/keys/rsa2048.cert.pem"), "a DER certificate"),
            (include_str!("../../tests/vectors/keys/p256.pub.pem"), "a DER public key"),
            (include_str!("../../tests/vectors/keys/ed25519.pub.pem"), "a DER public key"),
        ] {
            let der = crate::auth::public_key::pem_block(secret, |_| true).unwrap().1.unwrap();
            let lines: String =
                secret.lines().filter(|line| !line.starts_with('-')).map(|line| format!("{line}\n")).collect();
            let hex: String = der.iter().map(|byte| format!("{byte:02X}")).collect();
            let url = lines.replace('+', "-").replace('/', "_").replace(['\n', '='], "");
            for form in [&der[..], lines.as_bytes(), url.as_bytes(), hex.as_bytes()] {
                let err = KeySet::new(&[key(None, Algorithm::Hs256, form)]).unwrap_err();
                assert_eq!(err, KeyError::NotASecret { algorithm: Algorithm::Hs256, looks });
            }
            let pem_in_hex: String = secret.bytes().map(|byte| format!("{byte:02x}")).collect();
            let err = KeySet::new(&[key(None, Algorithm::Hs256, pem_in_hex.as_bytes())]).unwrap_err();
            assert_eq!(err, KeyError::NotASecret { algorithm: Algorithm::Hs256, looks: "a PEM document" });
        }
        // And whatever stands around it: what `openssl x509 -text` prints, quotes, JSON, characters of two bytes.
        let pem = include_str!("../../tests/vectors/keys/rsa2048.pub.pem");
        let jwk = r#"{"kty":"RSA","n":"0vx7agoebGcQSuuPiLJXZptN9","e":"AQAB"}"#;
        let wide = |text: &str, to: fn(u16) -> [u8; 2]| text.encode_utf16().flat_map(to).collect::<Vec<u8>>();
        let base64 = |bytes: &[u8]| base64::engine::general_purpose::STANDARD.encode(bytes);
        let digits: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
        for (form, looks) in [
            (format!("Certificate:\n    Data:\n{pem}").into_bytes(), "a PEM document"),
            (format!("JWT_KEY=\"{}\"", pem.replace('\n', "\\n")).into_bytes(), "a PEM document"),
            (serde_json::json!({ "kid-1": pem }).to_string().into_bytes(), "a PEM document"),
            (wide(pem, u16::to_le_bytes), "a PEM document"),
            (wide(&format!("\u{feff}{pem}"), u16::to_le_bytes), "a PEM document"),
            (wide(&format!("\u{feff}{pem}"), u16::to_be_bytes), "a PEM document"),
            (format!("\u{feff}{digits}").into_bytes(), "a DER public key"),
            (base64(digits.as_bytes()).into_bytes(), "a DER public key"),
            (format!(" [{jwk}]").into_bytes(), "a JSON Web Key"),
            (serde_json::json!({ "issuer": { "jwk": { "kty": "RSA" } } }).to_string().into_bytes(), "a JSON Web Key"),
            (serde_json::json!(jwk).to_string().into_bytes(), "a JSON Web Key"),
            (format!("{jwk},\n").into_bytes(), "a JSON Web Key"),
            (wide(jwk, u16::to_be_bytes), "a JSON Web Key"),
            (base64(b"\x00\x00\x00\x0bssh-ed25519\x00\x00\x00\x20 and 32 bytes").into_bytes(), "an OpenSSH public key"),
        ] {
            let err = KeySet::new(&[key(None, Algorithm::Hs256, &form)]).unwrap_err();
            let shown = String::from_utf8_lossy(&form);
            assert_eq!(err, KeyError::NotASecret { algorithm: Algorithm::Hs256, looks }, "{shown}");
        }
        let der = |pem: &str| crate::auth::public_key::pem_block(pem, |_| true).unwrap().1.unwrap();
        let exponent_3 = [b"\x30\x82\x01\x08\x02\x82\x01\x01\x00", &[0xc1; 256][..], b"\x02\x01\x03"].concat();
        for (form, looks) in [
            (der(include_str!("../../tests/vectors/keys/rsa2048.cert.v1.pem")), "a DER public key or certificate"),
            (der(include_str!("../../tests/vectors/keys/ed25519.cert.pem")), "a DER public key or certificate"),
            (der(include_str!("../../tests/vectors/keys/rsapss.pub.pem")), "a DER public key or certificate"),
            (exponent_3, "a DER public key or certificate"),
            (der(include_str!("../../tests/vectors/keys/ed25519.pem")), "a DER private key"),
        ] {
            for form in [&form[..], base64(&form).as_bytes()] {
                let err = KeySet::new(&[key(None, Algorithm::Hs256, form)]).unwrap_err();
                assert_eq!(err, KeyError::NotASecret { algorithm: Algorithm::Hs256, looks }, "{form:02x?}");
            }
        }
        let passphrase_in_braces = br#"{"a passphrase": "in braces, long enough"}"#;
        let first_byte_as_der = [b"\x30\x2a\x30\x05", &[9u8; 40][..]].concat();
        for secret in [&passphrase_in_braces[..], &first_byte_as_der, b"\x30\x84short but long enough for a secret"] {
            assert!(KeySet::new(&[key(None, Algorithm::Hs256, secret)]).is_ok());
        }
    }

    #[test]
    fn two_keys_of_one_kid_and_alg_are_refused_one_secret_under_several_is_not() {
        use Algorithm::{Hs256, Hs512};
        let refused = |keys: &[KeyConfig]| KeySet::new(keys).unwrap_err();
        let repeated = KeyError::Repeated { first: 1, second: 3 };
        assert_eq!(refused(&[key(Some("k"), Hs256, A), key(None, Hs256, A), key(Some("k"), Hs256, B)]), repeated);
        assert_eq!(refused(&[key(None, Hs256, A), key(None, Hs512, A), key(None, Hs256, A)]), repeated);
        assert_eq!(repeated.to_string(), "the keys number 1 and 3 have the same kid and alg");
        let shared =
            [key(Some("k"), Hs256, A), key(Some("k"), Hs512, A), key(Some("l"), Hs256, A), key(None, Hs256, A)];
        assert!(KeySet::new(&shared).is_ok());
        let tried_in_turn = [key(None, Hs256, A), key(None, Hs256, B)];
        assert!(KeySet::new(&tried_in_turn).is_ok());
    }

    #[test]
    fn a_kid_picks_its_keys_and_no_kid_means_all_of_the_algorithm() {
        use Algorithm::{Hs256, Hs384, Hs512};
        let keys = KeySet::new(&[key(Some("k"), Hs256, A), key(Some("l"), Hs512, B), key(None, Hs256, B)]).unwrap();
        let count = |kid, algorithm| keys.candidates(kid, algorithm).map(Iterator::count);
        assert_eq!(count(Some("k"), Hs256), Ok(1));
        assert_eq!(count(None, Hs256), Ok(2));
        assert_eq!(count(None, Hs512), Ok(1));
        assert_eq!(count(Some("k"), Hs512), Err(NoKey::OtherAlgorithm));
        assert_eq!(count(Some("m"), Hs256), Err(NoKey::UnknownKid));
        assert_eq!(count(Some(""), Hs256), Err(NoKey::UnknownKid));
        assert_eq!(count(None, Hs384), Err(NoKey::NoneOfAlgorithm));
        assert!(KeySet::default().is_empty());
    }

    #[test]
    fn a_key_keeps_its_id_over_a_reload_and_shares_it_with_none() {
        use Algorithm::{Hs256, Hs512};
        let before = [key(Some("k"), Hs256, A), key(None, Hs256, A), key(Some(""), Hs256, A), key(Some("k"), Hs512, A)];
        let before = KeySet::new(&before).unwrap();
        let after = KeySet::new(&[key(None, Hs256, B), key(Some("k"), Hs256, A)]).unwrap();
        let kept: Vec<bool> = before.iter().map(|key| after.contains(key.id())).collect();
        assert_eq!(kept, [true, false, false, false]);
        let ids: std::collections::HashSet<KeyId> = before.iter().map(Key::id).collect();
        assert_eq!(ids.len(), 4);
    }

    #[test]
    fn a_public_key_is_for_the_algorithms_of_its_kind() {
        use Algorithm::{EdDsa, Es256, Hs256, Rs256};
        let read = |pem: &str| PublicKey::read(pem.as_bytes()).unwrap();
        let p256 = read(include_str!("../../tests/vectors/keys/p256.pub.pem"));
        let made = |algorithm| Key::public("", Some("k"), algorithm, &p256);
        assert_eq!(made(Es256).unwrap().id(), made(Es256).unwrap().id(), "it stays itself over a reload");
        assert!(made(Es256).unwrap().sign(b"text").is_none(), "nobody signs with a public key");
        for algorithm in [Rs256, EdDsa, Hs256] {
            assert_eq!(made(algorithm).unwrap_err(), KeyError::OtherKind { algorithm, found: KeyKind::P256 });
        }
        assert_eq!(made(Rs256).unwrap_err().to_string(), "the public key is P-256, RS256 needs RSA");
        assert_eq!(made(Hs256).unwrap_err().to_string(), "the public key is P-256, HS256 needs a shared secret");
        let shared = KeySet::new(&[key(None, Rs256, A)]).unwrap_err();
        assert_eq!(shared.to_string(), "RS256 verifies with a public key, not with a shared secret");
    }

    #[test]
    fn no_secret_is_printed() {
        let secret = b"correct horse battery staple, and then some";
        let config = key(Some("k"), Algorithm::Hs256, secret);
        let keys = KeySet::new(std::slice::from_ref(&config)).unwrap();
        assert_eq!(format!("{keys:?}"), r#"KeySet([Key { kid: Some("k"), algorithm: Hs256, .. }])"#);
        assert!(!format!("{config:?}").contains("horse"));
    }
}
