//! Public keys: PEM, DER, JWK or a bare point in, something that verifies signatures out.
//!
//! Source: RFC 5280 section 4.1 (SubjectPublicKeyInfo, certificates), RFC 8017 appendix A.1.1, RFC 5480, RFC 8410,
//! RFC 7468 (PEM), RFC 7517 and RFC 7518 section 6 (JWK), RFC 8037 section 2.
//! Memory: a modulus and an exponent, or a point; cloning shares them.
//! Errors: [`PublicKeyError`], the fault of who wrote the key. Not here: which tokens a key is for (`keys`), sets (`jwks`).
//!
//! Nothing of a certificate but its key is looked at: whoever configures one trusts that key.

use std::fmt;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use ring::signature::{self, RsaParameters, RsaPublicKeyComponents, UnparsedPublicKey};
use serde_json::{Map, Value};

use super::algorithm::{Algorithm, KeyKind};
use super::der::{BIT_STRING, Der, INTEGER, OBJECT_IDENTIFIER, SEQUENCE, tagged};
use crate::limits::{RSA_BITS_MAX, RSA_BITS_MIN};

/// `rsaEncryption`.
pub(super) const RSA_ENCRYPTION: &[u8] = b"\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01";
/// `id-ecPublicKey`.
pub(super) const EC_PUBLIC_KEY: &[u8] = b"\x2a\x86\x48\xce\x3d\x02\x01";
/// `secp256r1`.
pub(super) const P_256: &[u8] = b"\x2a\x86\x48\xce\x3d\x03\x01\x07";
/// `secp384r1`.
pub(super) const P_384: &[u8] = b"\x2b\x81\x04\x00\x22";
/// `id-Ed25519`.
const ED_25519: &[u8] = b"\x2b\x65\x70";

/// Bytes of an exponent: `ring` takes those below 2^33.
const EXPONENT_BYTES_MAX: usize = 5;
/// Bytes of a public key of Ed25519.
const ED_25519_BYTES: usize = 32;

/// Why something is no public key that may verify tokens.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum PublicKeyError {
    /// None of the forms.
    #[error("no public key: write PEM (-----BEGIN PUBLIC KEY-----), DER or a JSON Web Key")]
    NoKey,
    /// The secret half.
    #[error("a private key: name the public one, and let nobody see this")]
    Private,
    /// A shared secret.
    #[error("a shared secret, not a public key")]
    Symmetric,
    /// In one of the forms, and wrong.
    #[error("a public key that cannot be read")]
    Broken,
    /// Of another kind or curve.
    #[error("a public key of a kind that is not used here: RSA, P-256, P-384 or Ed25519")]
    Unsupported,
    /// RSA of another length. RFC 7518 section 3.3: 2048 bits or more.
    #[error("an RSA key of {bits} bits, from {RSA_BITS_MIN} to {RSA_BITS_MAX} are accepted (RFC 7518 section 3.3)")]
    RsaBits {
        /// The length of its modulus.
        bits: usize,
    },
}

#[derive(Debug, Eq, Hash, PartialEq)]
enum Material {
    /// Big-endian, without leading zeros.
    Rsa { n: Box<[u8]>, e: Box<[u8]> },
    /// An uncompressed point, or the 32 bytes of Ed25519.
    Point(Box<[u8]>),
}

/// A public key. Cloning shares it.
#[derive(Clone, Eq, Hash, PartialEq)]
pub struct PublicKey {
    kind: KeyKind,
    material: Arc<Material>,
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PublicKey").field("kind", &self.kind).finish_non_exhaustive()
    }
}

impl PublicKey {
    /// Reads a key in whatever form: PEM (`PUBLIC KEY`, `RSA PUBLIC KEY`, `CERTIFICATE`), the DER in any of them, a JWK as
    /// JSON, or the 32 bytes of Ed25519.
    ///
    /// # Errors
    /// [`PublicKeyError`].
    pub fn read(document: &[u8]) -> Result<PublicKey, PublicKeyError> {
        if let Some(text) = str::from_utf8(document).ok().map(|text| text.trim_start_matches('\u{feff}').trim()) {
            if text.starts_with('{') {
                return match serde_json::from_str(text) {
                    // Whoever hands in the secret half by mistake is told so.
                    Ok(Value::Object(jwk)) if jwk.contains_key("d") => Err(PublicKeyError::Private),
                    Ok(Value::Object(jwk)) => PublicKey::of_jwk(&jwk),
                    _ => Err(PublicKeyError::Broken),
                };
            }
            if text.contains("-----BEGIN ") {
                return PublicKey::of_pem(text);
            }
        }
        if document.len() == ED_25519_BYTES {
            return Ok(PublicKey::point(KeyKind::Ed25519, document));
        }
        PublicKey::of_der(document)
    }

    /// The key of a JSON Web Key; what it says of its use is not looked at (`jwks`), nor its private members.
    ///
    /// # Errors
    /// [`PublicKeyError`].
    pub fn of_jwk(jwk: &Map<String, Value>) -> Result<PublicKey, PublicKeyError> {
        let text = |name: &str| jwk.get(name).and_then(Value::as_str).ok_or(PublicKeyError::Broken);
        let bytes = |name: &str| URL_SAFE_NO_PAD.decode(text(name)?).map_err(|_| PublicKeyError::Broken);
        match text("kty")? {
            "RSA" => {
                // RFC 7518 section 2, Base64urlUInt: some write a zero before the first bit all the same.
                let (n, e) = (bytes("n")?, bytes("e")?);
                let without_zeros = |number: &[u8]| number.iter().skip_while(|&&b| b == 0).copied().collect::<Vec<_>>();
                PublicKey::rsa(&without_zeros(&n), &without_zeros(&e))
            }
            "EC" => {
                let (kind, size) = match text("crv")? {
                    "P-256" => (KeyKind::P256, 32),
                    "P-384" => (KeyKind::P384, 48),
                    _ => return Err(PublicKeyError::Unsupported),
                };
                let (x, y) = (bytes("x")?, bytes("y")?);
                // RFC 7518 section 6.2.1.2: the full size, leading zeros included.
                if x.len() != size || y.len() != size {
                    return Err(PublicKeyError::Broken);
                }
                Ok(PublicKey::point(kind, &[&[4], &*x, &*y].concat()))
            }
            "OKP" if text("crv")? == "Ed25519" => {
                let x = bytes("x")?;
                if x.len() == ED_25519_BYTES {
                    Ok(PublicKey::point(KeyKind::Ed25519, &x))
                } else {
                    Err(PublicKeyError::Broken)
                }
            }
            "oct" => Err(PublicKeyError::Symmetric),
            _ => Err(PublicKeyError::Unsupported),
        }
    }

    /// The first key of a PEM text.
    fn of_pem(text: &str) -> Result<PublicKey, PublicKeyError> {
        let (label, der) = pem_block(text, |label| {
            matches!(label, "PUBLIC KEY" | "RSA PUBLIC KEY" | "CERTIFICATE") || label.ends_with("PRIVATE KEY")
        })
        .ok_or(PublicKeyError::NoKey)?;
        let der = der.ok_or(PublicKeyError::Broken)?;
        match label {
            "PUBLIC KEY" => of_spki(Der::new(&der)),
            "RSA PUBLIC KEY" => of_pkcs1(&der).unwrap_or(Err(PublicKeyError::Broken)),
            "CERTIFICATE" => of_certificate(&der).unwrap_or(Err(PublicKeyError::Broken)),
            _ => Err(PublicKeyError::Private),
        }
    }

    /// The key of a DER document: a SubjectPublicKeyInfo, PKCS #1 or a certificate.
    ///
    /// # Errors
    /// [`PublicKeyError`].
    pub(super) fn of_der(der: &[u8]) -> Result<PublicKey, PublicKeyError> {
        let mut whole = Der::new(der);
        let outer = whole.sequence().filter(|_| whole.is_empty()).ok_or(PublicKeyError::NoKey)?;
        // What they begin with tells them apart: the algorithm, the modulus, or what the certificate signs, which begins
        // with its version. A private key begins with its own version, which is 0 or 1.
        let mut inner = outer;
        match inner.any() {
            Some((INTEGER, [0 | 1])) => Err(PublicKeyError::Private),
            Some((INTEGER, _)) => of_pkcs1(der).unwrap_or(Err(PublicKeyError::Broken)),
            Some((SEQUENCE, _)) if matches!(inner.any(), Some((BIT_STRING, _))) => of_spki(Der::new(der)),
            Some((SEQUENCE, _)) => of_certificate(der).unwrap_or(Err(PublicKeyError::Broken)),
            _ => Err(PublicKeyError::NoKey),
        }
    }

    fn rsa(n: &[u8], e: &[u8]) -> Result<PublicKey, PublicKeyError> {
        let Some(&first) = n.first() else { return Err(PublicKeyError::Broken) };
        let bits = n.len().saturating_mul(8).saturating_sub(first.leading_zeros() as usize);
        if !(RSA_BITS_MIN..=RSA_BITS_MAX).contains(&bits) {
            return Err(PublicKeyError::RsaBits { bits });
        }
        let is_odd = |number: &[u8]| number.last().is_some_and(|last| last & 1 == 1);
        let exponent = e.iter().fold(0u64, |value, &byte| value << 8 | u64::from(byte));
        let fits = e.len() <= EXPONENT_BYTES_MAX && (3..1 << 33).contains(&exponent);
        if !(is_odd(n) && is_odd(e) && fits) {
            return Err(PublicKeyError::Broken);
        }
        Ok(PublicKey { kind: KeyKind::Rsa, material: Arc::new(Material::Rsa { n: n.into(), e: e.into() }) })
    }

    fn point(kind: KeyKind, bytes: &[u8]) -> PublicKey {
        PublicKey { kind, material: Arc::new(Material::Point(bytes.into())) }
    }

    /// What it is of.
    pub fn kind(&self) -> KeyKind {
        self.kind
    }

    /// Its numbers, the same for the same key whatever it was read from.
    pub(super) fn parts(&self) -> [&[u8]; 2] {
        match &*self.material {
            Material::Rsa { n, e } => [n, e],
            Material::Point(point) => [point, &[]],
        }
    }

    /// Whether `signature` is by this key over `signed`, as `algorithm` signs. `false` where it is not for this kind of key.
    pub fn verifies(&self, algorithm: Algorithm, signed: &[u8], signature: &[u8]) -> bool {
        match (&*self.material, Verification::of(algorithm)) {
            (Material::Rsa { n, e }, Some(Verification::Rsa(parameters))) => {
                RsaPublicKeyComponents { n, e }.verify(parameters, signed, signature).is_ok()
            }
            (Material::Point(point), Some(Verification::Curve(kind, curve))) if kind == self.kind => {
                UnparsedPublicKey::new(curve, point).verify(signed, signature).is_ok()
            }
            _ => false,
        }
    }
}

/// How `ring` verifies an algorithm.
enum Verification {
    Rsa(&'static RsaParameters),
    Curve(KeyKind, &'static dyn signature::VerificationAlgorithm),
}

impl Verification {
    fn of(algorithm: Algorithm) -> Option<Verification> {
        Some(match algorithm {
            Algorithm::Hs256 | Algorithm::Hs384 | Algorithm::Hs512 => return None,
            Algorithm::Rs256 => Verification::Rsa(&signature::RSA_PKCS1_2048_8192_SHA256),
            Algorithm::Rs384 => Verification::Rsa(&signature::RSA_PKCS1_2048_8192_SHA384),
            Algorithm::Rs512 => Verification::Rsa(&signature::RSA_PKCS1_2048_8192_SHA512),
            // RFC 7518 3.5: the salt is as long as the hash, and MGF1 uses the same hash; `ring` accepts no other.
            Algorithm::Ps256 => Verification::Rsa(&signature::RSA_PSS_2048_8192_SHA256),
            Algorithm::Ps384 => Verification::Rsa(&signature::RSA_PSS_2048_8192_SHA384),
            Algorithm::Ps512 => Verification::Rsa(&signature::RSA_PSS_2048_8192_SHA512),
            // RFC 7518 3.4: the two numbers one after the other, not DER.
            Algorithm::Es256 => Verification::Curve(KeyKind::P256, &signature::ECDSA_P256_SHA256_FIXED),
            Algorithm::Es384 => Verification::Curve(KeyKind::P384, &signature::ECDSA_P384_SHA384_FIXED),
            Algorithm::EdDsa => Verification::Curve(KeyKind::Ed25519, &signature::ED25519),
        })
    }
}

/// The first block of a PEM text whose label is `wanted`: the label, and the bytes where they are base64.
pub(super) fn pem_block(text: &str, wanted: impl Fn(&str) -> bool) -> Option<(&str, Option<Vec<u8>>)> {
    let mut rest = text;
    loop {
        let (_, after) = rest.split_once("-----BEGIN ")?;
        let (label, after) = after.split_once("-----")?;
        if wanted(label) {
            let body = after.split_once(&format!("-----END {label}-----")).map(|(body, _)| body);
            let digits = body.map(|body| body.chars().filter(|c| !c.is_ascii_whitespace()).collect::<String>());
            return Some((label, digits.and_then(|digits| STANDARD.decode(digits).ok())));
        }
        rest = after;
    }
}

/// RFC 5280 4.1: `SEQUENCE { SEQUENCE { algorithm, parameters }, BIT STRING }`.
fn of_spki(mut der: Der<'_>) -> Result<PublicKey, PublicKeyError> {
    let mut parts = || {
        let mut spki = der.sequence()?;
        let mut algorithm = spki.sequence()?;
        let oid = algorithm.take(OBJECT_IDENTIFIER)?;
        let curve = algorithm.take_if(OBJECT_IDENTIFIER);
        let key = spki.bit_string()?;
        (spki.is_empty() && der.is_empty()).then_some((oid, curve, key))
    };
    let (oid, curve, key) = parts().ok_or(PublicKeyError::Broken)?;
    let (kind, size) = match (oid, curve) {
        (RSA_ENCRYPTION, _) => return of_pkcs1(key).unwrap_or(Err(PublicKeyError::Broken)),
        (EC_PUBLIC_KEY, Some(P_256)) => (KeyKind::P256, 65),
        (EC_PUBLIC_KEY, Some(P_384)) => (KeyKind::P384, 97),
        (ED_25519, None) => (KeyKind::Ed25519, ED_25519_BYTES),
        _ => return Err(PublicKeyError::Unsupported),
    };
    // RFC 5480 2.2: 4 stands before an uncompressed point; compressed ones are not used.
    let is_whole = key.len() == size && (kind == KeyKind::Ed25519 || key.first() == Some(&4));
    if is_whole { Ok(PublicKey::point(kind, key)) } else { Err(PublicKeyError::Broken) }
}

/// RFC 8017 A.1.1: `SEQUENCE { modulus, publicExponent }`; `None`: it is not that.
fn of_pkcs1(der: &[u8]) -> Option<Result<PublicKey, PublicKeyError>> {
    let mut whole = Der::new(der);
    let mut key = whole.sequence()?;
    let (n, e) = (key.positive()?, key.positive()?);
    (key.is_empty() && whole.is_empty()).then(|| PublicKey::rsa(n, e))
}

/// RFC 5280 4.1: the key of a certificate; `None`: it is none.
fn of_certificate(der: &[u8]) -> Option<Result<PublicKey, PublicKeyError>> {
    let mut whole = Der::new(der);
    let mut signed = whole.sequence()?.sequence()?;
    signed.take_if(tagged(0)); // version
    signed.take(INTEGER)?; // serial number
    for _ in 0..4 {
        signed.sequence()?; // signature, issuer, validity, subject
    }
    let spki = signed.whole(SEQUENCE)?;
    whole.is_empty().then(|| of_spki(Der::new(spki)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const RSA: &str = include_str!("../../tests/vectors/keys/rsa2048.pub.pem");
    const RSA_PKCS1: &str = include_str!("../../tests/vectors/keys/rsa2048.pub.pkcs1.pem");
    const RSA_CERTIFICATE: &str = include_str!("../../tests/vectors/keys/rsa2048.cert.pem");
    const P256: &str = include_str!("../../tests/vectors/keys/p256.pub.pem");
    const P384: &str = include_str!("../../tests/vectors/keys/p384.pub.pem");
    const ED25519: &str = include_str!("../../tests/vectors/keys/ed25519.pub.pem");

    fn der(pem: &str) -> Vec<u8> {
        pem_block(pem, |_| true).expect("a block").1.expect("base64")
    }

    fn jwk(text: &str) -> Result<PublicKey, PublicKeyError> {
        PublicKey::read(text.as_bytes())
    }

    #[test]
    fn one_key_in_all_its_forms_is_one_key() {
        let key = PublicKey::read(RSA.as_bytes()).unwrap();
        assert_eq!(key.kind(), KeyKind::Rsa);
        let [n, e] = key.parts().map(|part| URL_SAFE_NO_PAD.encode(part));
        let as_jwk = format!(r#"{{"kty":"RSA","n":"{n}","e":"{e}","kid":"k","alg":"RS256","x5c":["…"]}}"#);
        let zeros = URL_SAFE_NO_PAD.encode([&[0, 0], key.parts()[0]].concat());
        let with_zeros = format!(r#"{{"kty":"RSA","n":"{zeros}","e":"{e}"}}"#);
        let commented = format!("\u{feff}The key of the tests:\r\n{}", RSA.replace('\n', "\r\n"));
        for document in [RSA_PKCS1, RSA_CERTIFICATE, &as_jwk, &with_zeros, &commented] {
            assert_eq!(PublicKey::read(document.as_bytes()), Ok(key.clone()), "{document}");
        }
        for pem in [RSA, RSA_PKCS1, RSA_CERTIFICATE] {
            assert_eq!(PublicKey::read(&der(pem)), Ok(key.clone()));
        }
        for (pem, kind, curve) in [(P256, KeyKind::P256, "P-256"), (P384, KeyKind::P384, "P-384")] {
            let key = PublicKey::read(pem.as_bytes()).unwrap();
            assert_eq!((key.kind(), PublicKey::read(&der(pem))), (kind, Ok(key.clone())));
            let [point, _] = key.parts();
            let (x, y) = point[1..].split_at(point.len() / 2);
            let [x, y] = [x, y].map(|part| URL_SAFE_NO_PAD.encode(part));
            assert_eq!(jwk(&format!(r#"{{"kty":"EC","crv":"{curve}","x":"{x}","y":"{y}"}}"#)), Ok(key));
        }
        let key = PublicKey::read(ED25519.as_bytes()).unwrap();
        let [point, _] = key.parts();
        let x = URL_SAFE_NO_PAD.encode(point);
        for same in [
            PublicKey::read(&der(ED25519)),
            PublicKey::read(point),
            jwk(&format!(r#" {{"kty":"OKP","crv":"Ed25519","x":"{x}"}} "#)),
        ] {
            assert_eq!((key.kind(), same), (KeyKind::Ed25519, Ok(key.clone())));
        }
    }

    #[test]
    fn what_may_not_verify_is_told_apart() {
        use PublicKeyError::{Broken, NoKey, Private, RsaBits, Symmetric, Unsupported};
        let refused = |document: &str| PublicKey::read(document.as_bytes()).unwrap_err();
        for (document, why) in [
            (include_str!("../../tests/vectors/keys/rsa1024.pub.pem"), RsaBits { bits: 1024 }),
            (include_str!("../../tests/vectors/keys/secp256k1.pub.pem"), Unsupported),
            (include_str!("../../tests/vectors/keys/ed448.pub.pem"), Unsupported),
            (include_str!("../../tests/vectors/keys/rsapss.pub.pem"), Unsupported),
            (include_str!("../../tests/vectors/keys/p256.pub.compressed.pem"), Broken),
            (include_str!("../../tests/vectors/keys/rsa2048.pem"), Private),
            (include_str!("../../tests/vectors/keys/rsa2048.pkcs1.pem"), Private),
            (include_str!("../../tests/vectors/keys/rsa2048.encrypted.pem"), Private),
            (include_str!("../../tests/vectors/keys/p256.sec1.pem"), Private),
            (include_str!("../../tests/vectors/keys/ed25519.pem"), Private),
            ("-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", NoKey),
            ("-----BEGIN PUBLIC KEY-----\nAAAA\n", Broken),
            ("-----BEGIN PUBLIC KEY-----\n?\n-----END PUBLIC KEY-----\n", Broken),
            ("-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n", Broken),
            ("", NoKey),
            ("a passphrase that is no key at all", NoKey),
            ("{", Broken),
            ("{}", Broken),
            (r#"{"kty":"oct","k":"AAAA"}"#, Symmetric),
            (r#"{"kty":"EC","crv":"secp256k1","x":"","y":""}"#, Unsupported),
            (r#"{"kty":"OKP","crv":"X25519","x":"AAAA"}"#, Unsupported),
            (r#"{"kty":"OKP","crv":"Ed25519","x":"AAAA"}"#, Broken),
            (r#"{"kty":"OKP","crv":"Ed25519","x":"AAAA","d":"AAAA"}"#, Private),
            (r#"{"kty":"EC","crv":"P-256","x":"AAAA","y":"AAAA"}"#, Broken),
            (r#"{"kty":"RSA","n":"AQAB","e":"AQAB"}"#, RsaBits { bits: 17 }),
            (r#"{"kty":"RSA","n":"","e":"AQAB"}"#, Broken),
            (r#"{"kty":"RSA","n":"AQ==","e":"AQAB"}"#, Broken),
            (r#"{"kty":"RSA","n":7,"e":"AQAB"}"#, Broken),
        ] {
            assert_eq!(refused(document), why, "{document}");
        }
        for pem in [
            include_str!("../../tests/vectors/keys/rsa2048.pem"),
            include_str!("../../tests/vectors/keys/rsa2048.pkcs1.pem"),
            include_str!("../../tests/vectors/keys/p256.sec1.pem"),
            include_str!("../../tests/vectors/keys/ed25519.pem"),
        ] {
            assert_eq!(PublicKey::read(&der(pem)), Err(Private), "as DER too");
        }
    }

    #[test]
    fn an_rsa_key_has_2048_to_8192_bits_and_an_odd_exponent_of_at_least_3() {
        let n = |bits: usize| {
            let mut n = vec![0u8; bits.div_ceil(8)];
            n[0] = 1 << ((bits - 1) % 8);
            *n.last_mut().unwrap() |= 1;
            n
        };
        let verdict = |bits, e: &[u8]| PublicKey::rsa(&n(bits), e).map(|_| ());
        let e = [1, 0, 1];
        assert_eq!([verdict(2048, &e), verdict(8192, &e)], [Ok(()), Ok(())]);
        assert_eq!(verdict(2047, &e), Err(PublicKeyError::RsaBits { bits: 2047 }));
        assert_eq!(verdict(8193, &e), Err(PublicKeyError::RsaBits { bits: 8193 }));
        assert_eq!([verdict(2048, &[3]), verdict(2048, &[1, 0xff, 0xff, 0xff, 0xff])], [Ok(()), Ok(())]);
        for e in [&[][..], &[1], &[2], &[4], &[2, 0, 0, 0, 1], &[1, 0, 0, 0, 0, 1]] {
            assert_eq!(verdict(2048, e), Err(PublicKeyError::Broken), "{e:?}");
        }
        assert_eq!(PublicKey::rsa(&[0x80; 256], &[3]).unwrap_err(), PublicKeyError::Broken, "an even modulus");
        let said = PublicKeyError::RsaBits { bits: 1024 }.to_string();
        assert_eq!(said, "an RSA key of 1024 bits, from 2048 to 8192 are accepted (RFC 7518 section 3.3)");
    }

    #[test]
    fn a_key_verifies_with_the_algorithms_of_its_kind_alone() {
        let names = |pem: &str| {
            let key = PublicKey::read(pem.as_bytes()).unwrap();
            key.kind().algorithms().map(Algorithm::name).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(names(RSA), "RS256 RS384 RS512 PS256 PS384 PS512");
        assert_eq!([names(P256), names(P384), names(ED25519)], ["ES256", "ES384", "EdDSA"]);
        for pem in [RSA, P256, P384, ED25519] {
            let key = PublicKey::read(pem.as_bytes()).unwrap();
            for algorithm in Algorithm::ALL {
                assert!(!key.verifies(algorithm, b"text", b"") && !key.verifies(algorithm, b"text", &[0; 64]));
            }
        }
    }

    proptest::proptest! {
        #[test]
        fn no_document_makes_it_panic(document in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
            let _ = PublicKey::read(&document);
        }

        #[test]
        fn a_changed_key_is_read_or_refused(at in proptest::prelude::any::<proptest::sample::Index>(), byte: u8) {
            for pem in [RSA, RSA_PKCS1, RSA_CERTIFICATE, P256, P384, ED25519] {
                let mut changed = der(pem);
                *at.get_mut(&mut changed) = byte;
                let _ = PublicKey::read(&changed);
                let _ = PublicKey::read(changed.get(..at.index(changed.len())).unwrap_or_default());
            }
        }
    }
}
