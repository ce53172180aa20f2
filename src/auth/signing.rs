//! Keys that sign: what `restcast token` mints with. The server itself signs nothing with a private key.
//!
//! Source: RFC 5208 and RFC 5958 (PKCS #8), RFC 8017 appendix A.1.2, RFC 5915 (SEC 1), RFC 8410; RFC 7518 section 3 for
//! signatures. Chance is an argument: PSS and ECDSA need it.
//! Memory: one key. Errors: [`SigningError`]; nothing of the key stands in it. Not here: what is signed (`jwt`).

use std::fmt;

use ring::rand::SecureRandom;
use ring::rsa;
use ring::signature::{self, EcdsaKeyPair, Ed25519KeyPair, RsaEncoding};

use super::der::{Der, INTEGER, OBJECT_IDENTIFIER, OCTET_STRING, tagged};
use super::keys::{Algorithm, Key, KeyConfig, KeyError, KeyKind};
use super::public_key::{EC_PUBLIC_KEY, P_256, P_384, RSA_ENCRYPTION, pem_block};
use crate::limits::{RSA_BITS_MAX, RSA_BITS_MIN};
use crate::secret::Secret;

/// `id-Ed25519`.
const ED_25519: &[u8] = b"\x2b\x65\x70";

/// Why nothing can be signed with a key.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SigningError {
    /// The shared secret.
    #[error("{0}")]
    Secret(#[from] KeyError),
    /// No private key where one is needed.
    #[error("{algorithm} signs with a private key: name a PEM file that begins with -----BEGIN PRIVATE KEY-----")]
    NoPrivateKey {
        /// The algorithm.
        algorithm: Algorithm,
    },
    /// One that is locked.
    #[error("the private key is encrypted: write it without a passphrase (openssl pkey -in FILE -out FILE)")]
    Encrypted,
    /// One of another kind.
    #[error("the private key is not of the kind that {algorithm} signs with, {}", .algorithm.key_kind().map_or("", KeyKind::name))]
    OtherKind {
        /// The algorithm.
        algorithm: Algorithm,
    },
    /// One that does not hold together, or whose length is not accepted.
    #[error(
        "the private key cannot be used: it is broken, or RSA of less than {RSA_BITS_MIN} or over {RSA_BITS_MAX} bits"
    )]
    Rejected,
    /// One without its public half, which ECDSA needs here.
    #[error("the private key does not hold its public half: write it anew with openssl pkey -in FILE -out FILE")]
    NoPublicHalf,
    /// The system gives no random numbers.
    #[error("the system gives no random numbers")]
    NoChance,
}

enum Pair {
    Shared(Key),
    Rsa(rsa::KeyPair, &'static dyn RsaEncoding),
    Ecdsa(EcdsaKeyPair),
    Ed25519(Ed25519KeyPair),
}

/// A key, ready to sign.
pub struct SigningKey {
    kid: Option<Box<str>>,
    algorithm: Algorithm,
    pair: Pair,
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SigningKey").field("kid", &self.kid).field("algorithm", &self.algorithm).finish_non_exhaustive()
    }
}

impl SigningKey {
    /// Prepares a key: `secret` is the shared secret, or for an asymmetric algorithm a private key in PEM (PKCS #8, PKCS #1,
    /// SEC 1) or the DER of PKCS #8.
    ///
    /// # Errors
    /// [`SigningError`].
    pub fn new(
        kid: Option<&str>,
        algorithm: Algorithm,
        secret: &Secret,
        chance: &dyn SecureRandom,
    ) -> Result<SigningKey, SigningError> {
        let pair = match algorithm.key_kind() {
            None => {
                let kid = kid.map(str::to_owned);
                Pair::Shared(Key::new(&KeyConfig { kid, algorithm, secret: secret.clone() })?)
            }
            Some(kind) => private_pair(algorithm, kind, secret.expose_secret(), chance)?,
        };
        Ok(SigningKey { kid: kid.map(Box::from), algorithm, pair })
    }

    /// The name that tokens call it by.
    pub fn kid(&self) -> Option<&str> {
        self.kid.as_deref()
    }

    /// What it signs with.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// Its signature over `signed`.
    ///
    /// # Errors
    /// [`SigningError::NoChance`].
    pub fn sign(&self, signed: &[u8], chance: &dyn SecureRandom) -> Result<Vec<u8>, SigningError> {
        let no_chance = |_| SigningError::NoChance;
        match &self.pair {
            Pair::Shared(key) => key.sign(signed).map(|tag| tag.as_ref().to_vec()).ok_or(SigningError::Rejected),
            Pair::Rsa(pair, encoding) => {
                let mut signature = vec![0; pair.public().modulus_len()];
                pair.sign(*encoding, chance, signed, &mut signature).map_err(no_chance)?;
                Ok(signature)
            }
            Pair::Ecdsa(pair) => pair.sign(chance, signed).map(|tag| tag.as_ref().to_vec()).map_err(no_chance),
            Pair::Ed25519(pair) => Ok(pair.sign(signed).as_ref().to_vec()),
        }
    }
}

fn private_pair(
    algorithm: Algorithm,
    kind: KeyKind,
    bytes: &[u8],
    chance: &dyn SecureRandom,
) -> Result<Pair, SigningError> {
    let none = || SigningError::NoPrivateKey { algorithm };
    let pem = str::from_utf8(bytes).ok().and_then(|text| pem_block(text, |label| label.ends_with("PRIVATE KEY")));
    let (label, der) = match &pem {
        Some(("ENCRYPTED PRIVATE KEY", _)) => return Err(SigningError::Encrypted),
        // RFC 1421 4.6: an encrypted key of the older forms has headers, so that its body is no base64.
        Some((_, None)) if contains(bytes, b"Proc-Type: 4,ENCRYPTED") => return Err(SigningError::Encrypted),
        Some((label, der)) => (*label, der.as_deref().ok_or(SigningError::Rejected)?),
        None => ("PRIVATE KEY", bytes),
    };
    let (found, inner) = match label {
        "PRIVATE KEY" => of_pkcs8(der).ok_or_else(none)?,
        "RSA PRIVATE KEY" => (Some(KeyKind::Rsa), der),
        "EC PRIVATE KEY" => (Some(kind), der),
        _ => return Err(none()),
    };
    if found != Some(kind) {
        return Err(SigningError::OtherKind { algorithm });
    }
    match kind {
        KeyKind::Rsa => {
            let pair = rsa::KeyPair::from_der(inner).map_err(|_| SigningError::Rejected)?;
            Ok(Pair::Rsa(pair, encoding(algorithm).ok_or_else(none)?))
        }
        KeyKind::P256 | KeyKind::P384 => ecdsa_pair(algorithm, kind, inner, chance),
        KeyKind::Ed25519 => {
            let mut key = Der::new(inner);
            let seed = key.take(OCTET_STRING).ok_or(SigningError::Rejected)?;
            Ed25519KeyPair::from_seed_unchecked(seed).map(Pair::Ed25519).map_err(|_| SigningError::Rejected)
        }
    }
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// RFC 5208 5: what the key is of, and the key in its own form; `None`: it is not that.
fn of_pkcs8(der: &[u8]) -> Option<(Option<KeyKind>, &[u8])> {
    let mut info = Der::new(der).sequence()?;
    info.take(INTEGER)?;
    let mut algorithm = info.sequence()?;
    let kind = match (algorithm.take(OBJECT_IDENTIFIER)?, algorithm.take_if(OBJECT_IDENTIFIER)) {
        (RSA_ENCRYPTION, _) => Some(KeyKind::Rsa),
        (EC_PUBLIC_KEY, Some(curve)) => curve_kind(curve),
        (ED_25519, None) => Some(KeyKind::Ed25519),
        _ => None,
    };
    Some((kind, info.take(OCTET_STRING)?))
}

fn curve_kind(curve: &[u8]) -> Option<KeyKind> {
    match curve {
        P_256 => Some(KeyKind::P256),
        P_384 => Some(KeyKind::P384),
        _ => None,
    }
}

/// RFC 5915 3: `SEQUENCE { 1, private key, [0] curve, [1] public key }`.
fn ecdsa_pair(
    algorithm: Algorithm,
    kind: KeyKind,
    der: &[u8],
    chance: &dyn SecureRandom,
) -> Result<Pair, SigningError> {
    let scheme = match kind {
        KeyKind::P384 => &signature::ECDSA_P384_SHA384_FIXED_SIGNING,
        _ => &signature::ECDSA_P256_SHA256_FIXED_SIGNING,
    };
    let parts = || {
        let mut key = Der::new(der).sequence()?;
        key.take(INTEGER)?;
        let private = key.take(OCTET_STRING)?;
        let curve = key.take_if(tagged(0)).and_then(|curve| Der::new(curve).take(OBJECT_IDENTIFIER));
        let public = key.take_if(tagged(1)).and_then(|public| Der::new(public).bit_string());
        Some((private, curve, public))
    };
    let (private, curve, public) = parts().ok_or(SigningError::Rejected)?;
    if curve.is_some_and(|curve| curve_kind(curve) != Some(kind)) {
        return Err(SigningError::OtherKind { algorithm });
    }
    let public = public.ok_or(SigningError::NoPublicHalf)?;
    let pair = EcdsaKeyPair::from_private_key_and_public_key(scheme, private, public, chance);
    pair.map(Pair::Ecdsa).map_err(|_| SigningError::Rejected)
}

fn encoding(algorithm: Algorithm) -> Option<&'static dyn RsaEncoding> {
    Some(match algorithm {
        Algorithm::Rs256 => &signature::RSA_PKCS1_SHA256,
        Algorithm::Rs384 => &signature::RSA_PKCS1_SHA384,
        Algorithm::Rs512 => &signature::RSA_PKCS1_SHA512,
        Algorithm::Ps256 => &signature::RSA_PSS_SHA256,
        Algorithm::Ps384 => &signature::RSA_PSS_SHA384,
        Algorithm::Ps512 => &signature::RSA_PSS_SHA512,
        _ => return None,
    })
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "signatures differ with chance, and what they say does not")]
mod tests {
    use ring::rand::SystemRandom;

    use super::*;
    use crate::auth::public_key::PublicKey;

    macro_rules! key {
        ($name:literal) => {
            include_str!(concat!("../../tests/vectors/keys/", $name))
        };
    }

    fn signing(algorithm: Algorithm, private: &str) -> Result<SigningKey, SigningError> {
        SigningKey::new(Some("k"), algorithm, &Secret::new(private.as_bytes()), &SystemRandom::new())
    }

    #[test]
    fn what_is_signed_verifies_under_the_public_half_whatever_form_the_key_has() {
        for (private, public) in [
            (key!("rsa2048.pem"), key!("rsa2048.pub.pem")),
            (key!("rsa2048.pkcs1.pem"), key!("rsa2048.pub.pem")),
            (key!("p256.pem"), key!("p256.pub.pem")),
            (key!("p256.sec1.pem"), key!("p256.pub.pem")),
            (key!("p384.pem"), key!("p384.pub.pem")),
            (key!("p384.sec1.pem"), key!("p384.pub.pem")),
            (key!("ed25519.pem"), key!("ed25519.pub.pem")),
        ] {
            let public = PublicKey::read(public.as_bytes()).unwrap();
            for algorithm in public.kind().algorithms() {
                let key = signing(algorithm, private).unwrap();
                assert_eq!((key.kid(), key.algorithm()), (Some("k"), algorithm));
                let signature = key.sign(b"text", &SystemRandom::new()).unwrap();
                assert!(public.verifies(algorithm, b"text", &signature), "{algorithm}");
                assert!(!public.verifies(algorithm, b"test", &signature), "{algorithm}");
                for other in Algorithm::ALL.into_iter().filter(|&other| other != algorithm) {
                    assert!(!public.verifies(other, b"text", &signature), "{algorithm} as {other}");
                }
                for cut in [0, 1, signature.len() - 1] {
                    assert!(!public.verifies(algorithm, b"text", &signature[..cut]), "{algorithm}");
                }
                assert!(!public.verifies(algorithm, b"text", &[&*signature, &[0]].concat()), "{algorithm}");
            }
        }
        let der = pem_block(key!("ed25519.pem"), |_| true).unwrap().1.unwrap();
        assert!(SigningKey::new(None, Algorithm::EdDsa, &Secret::new(der), &SystemRandom::new()).is_ok());
        assert!(signing(Algorithm::Hs256, &"k".repeat(32)).is_ok());
    }

    #[test]
    fn what_signs_nothing_is_told_apart() {
        use Algorithm::{EdDsa, Es256, Es384, Hs256, Rs256};
        let refused = |algorithm, private: &str| signing(algorithm, private).unwrap_err();
        assert_eq!(refused(Rs256, key!("rsa2048.pub.pem")), SigningError::NoPrivateKey { algorithm: Rs256 });
        assert_eq!(refused(Rs256, "rubbish"), SigningError::NoPrivateKey { algorithm: Rs256 });
        assert_eq!(refused(Rs256, key!("rsa2048.encrypted.pem")), SigningError::Encrypted);
        assert_eq!(refused(Rs256, key!("rsa2048.encrypted.pkcs1.pem")), SigningError::Encrypted);
        assert_eq!(refused(Rs256, key!("p256.pem")), SigningError::OtherKind { algorithm: Rs256 });
        assert_eq!(refused(Es384, key!("p256.pem")), SigningError::OtherKind { algorithm: Es384 });
        assert_eq!(refused(Es384, key!("p256.sec1.pem")), SigningError::OtherKind { algorithm: Es384 });
        assert_eq!(refused(EdDsa, key!("rsa2048.pem")), SigningError::OtherKind { algorithm: EdDsa });
        assert_eq!(refused(Es256, key!("p256.half.pem")), SigningError::NoPublicHalf);
        let broken = "-----BEGIN RSA PRIVATE KEY-----\nMAA=\n-----END RSA PRIVATE KEY-----\n";
        assert_eq!(refused(Rs256, broken), SigningError::Rejected);
        assert!(matches!(refused(Hs256, "short"), SigningError::Secret(KeyError::TooShort { bytes: 5, .. })));
        assert!(matches!(refused(Hs256, key!("rsa2048.pub.pem")), SigningError::Secret(KeyError::NotASecret { .. })));
        for error in [refused(Rs256, broken), refused(Es256, key!("p256.half.pem"))] {
            assert!(!error.to_string().is_empty());
        }
        let key = signing(EdDsa, key!("ed25519.pem")).unwrap();
        assert_eq!(format!("{key:?}"), r#"SigningKey { kid: Some("k"), algorithm: EdDsa, .. }"#);
    }
}
