//! Issuers and their key sets: JSON in, the keys that this server can verify with out.
//!
//! Source: RFC 7517 sections 4 and 5, RFC 7518 section 6, RFC 8037 section 2, RFC 8725 sections 3.1 and 3.8; protocol version
//! 1, section 2.
//! Memory: at most `limits::JWKS_KEYS_MAX` keys an issuer, shared by all cores; while a set is read, a few times its text.
//! Errors: [`JwksError`], the issuer's fault. A key that is not known here is passed over. Not here: when a set is fetched
//! (`refresh`), fetching (`runtime::jwks`), single keys (`public_key`).
//!
//! Keys are never pooled: a set belongs to its issuer, and verifies what names that issuer and nothing else.

use std::fmt;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::keys::{Algorithm, Key, KeySet};
use super::public_key::PublicKey;
use crate::limits::{JWKS_BYTES_MAX, JWKS_KEYS_MAX};

/// One `[[auth.jwt.jwks]]`: whose tokens are verified by which key set.
#[derive(Clone, Debug)]
pub struct IssuerOptions {
    /// The `iss` of its tokens.
    pub issuer: String,
    /// What its tokens may be signed with, none of them symmetric.
    pub algorithms: Vec<Algorithm>,
    /// Accepted `aud` values; none: `aud` is not looked at.
    pub audiences: Vec<String>,
    /// The keys of a file; `None`: the set is fetched, and stands in [`KeySets`].
    pub keys: Option<KeySet>,
    /// Where it is fetched from, where it is: what came from elsewhere is not this issuer's set.
    pub source: KeySource,
}

/// Where a key set comes from: the same URL under other roots of trust is another source.
#[derive(Clone, Default, Eq, PartialEq)]
pub struct KeySource {
    /// Its URL, whose query may hold a secret; empty where nothing is fetched.
    pub url: Arc<str>,
    /// The PEM of the certificates that vouch for it; `None`: the system's.
    pub ca: Option<Arc<[u8]>>,
}

impl fmt::Debug for KeySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeySource").finish_non_exhaustive()
    }
}

/// Why a text is no key set.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum JwksError {
    /// Over its bound.
    #[error("it has more than {JWKS_BYTES_MAX} bytes")]
    TooLarge,
    /// Not JSON.
    #[error("it is not JSON")]
    NotJson,
    /// Something else than an object with an array of keys.
    #[error("it has no array called keys")]
    NoKeys,
}

/// A key set that was read.
#[derive(Clone, Debug)]
pub struct Jwks {
    /// The keys that can be used, each once for each algorithm that it may be used with.
    pub keys: KeySet,
    /// How many of the set's keys these are of.
    pub used: usize,
    /// How many are not for verifying, of a kind that is not known here, broken, or one too many.
    pub passed_over: usize,
}

/// Reads the key set of `issuer`.
///
/// # Errors
/// [`JwksError`]. Single keys make none.
pub fn read(issuer: &str, body: &[u8]) -> Result<Jwks, JwksError> {
    if body.len() > JWKS_BYTES_MAX {
        return Err(JwksError::TooLarge);
    }
    let set: Value = serde_json::from_slice(body).map_err(|_| JwksError::NotJson)?;
    let members = set.get("keys").and_then(Value::as_array).ok_or(JwksError::NoKeys)?;
    let (mut keys, mut used) = (Vec::new(), 0);
    for member in members {
        let of_member = member.as_object().map(|jwk| keys_of(issuer, jwk)).unwrap_or_default();
        if !of_member.is_empty() && used < JWKS_KEYS_MAX {
            keys.extend(of_member);
            used += 1;
        }
    }
    Ok(Jwks { keys: KeySet::of_issuer(keys), used, passed_over: members.len() - used })
}

/// One key of a set, for each algorithm that it may be used with; none where it cannot be.
fn keys_of(issuer: &str, jwk: &Map<String, Value>) -> Vec<Key> {
    let kid = match jwk.get("kid") {
        None => None,
        Some(Value::String(kid)) => Some(kid.as_str()),
        Some(_) => return Vec::new(),
    };
    if !is_for_verifying(jwk) {
        return Vec::new();
    }
    let Ok(public_key) = PublicKey::of_jwk(jwk) else { return Vec::new() };
    let fitting = public_key.kind().algorithms();
    let named = |algorithm: &Algorithm| match jwk.get("alg") {
        None => true,
        Some(alg) => alg.as_str() == Some(algorithm.name()),
    };
    fitting.filter(named).filter_map(|algorithm| Key::public(issuer, kid, algorithm, &public_key).ok()).collect()
}

/// RFC 7517 4.2 and 4.3: what a key says of its use.
fn is_for_verifying(jwk: &Map<String, Value>) -> bool {
    let by_use = jwk.get("use").is_none_or(|used_for| used_for.as_str() == Some("sig"));
    let verifies = |operations: &Vec<Value>| operations.iter().any(|operation| operation.as_str() == Some("verify"));
    let by_operation = jwk.get("key_ops").is_none_or(|operations| operations.as_array().is_some_and(verifies));
    by_use && by_operation
}

/// The key sets that were fetched, as of one moment. Replaced whole; every core has the same, if not at once.
#[derive(Clone, Debug, Default)]
pub struct KeySets {
    sets: Vec<HeldSet>,
    version: u64,
}

/// The last set that was fetched for an issuer.
#[derive(Clone, Debug)]
struct HeldSet {
    issuer: Box<str>,
    source: KeySource,
    keys: KeySet,
}

impl KeySets {
    /// The set of `issuer` from `source`, where that has been fetched.
    pub fn of(&self, issuer: &str, source: &KeySource) -> Option<&KeySet> {
        self.held(issuer).filter(|held| held.source == *source).map(|held| &held.keys)
    }

    /// The last set that was fetched for `issuer`, though the configuration may name another source by now: it verifies
    /// nothing then, and tells which keys may still be there when the other is fetched.
    pub fn last_of(&self, issuer: &str) -> Option<&KeySet> {
        self.held(issuer).map(|held| &held.keys)
    }

    fn held(&self, issuer: &str) -> Option<&HeldSet> {
        self.sets.iter().find(|held| *held.issuer == *issuer)
    }

    /// How often a set has been put here: the greater, the newer.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Puts the set of `issuer` that `source` has given in the place of its last one.
    pub fn put(&mut self, issuer: &str, source: &KeySource, keys: KeySet) {
        self.version += 1;
        let new = HeldSet { issuer: issuer.into(), source: source.clone(), keys };
        match self.sets.iter_mut().find(|held| *held.issuer == *issuer) {
            Some(held) => *held = new,
            None => self.sets.push(new),
        }
    }

    /// Drops the sets of all issuers but those that `wanted` names.
    pub fn retain(&mut self, wanted: impl Fn(&str) -> bool) {
        self.sets.retain(|held| wanted(&held.issuer));
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::auth::jwt::{self, Verifier};
    use crate::auth::keys::NoKey;

    fn b64u(bytes: &[u8]) -> String {
        URL_SAFE_NO_PAD.encode(bytes)
    }

    fn rsa(n: u8) -> Value {
        json!({ "kty": "RSA", "n": b64u(&[[0x80, n].as_slice(), &[1; 254]].concat()), "e": "AQAB" })
    }

    fn ed25519(n: u8) -> Value {
        json!({ "kty": "OKP", "crv": "Ed25519", "x": b64u(&[n; 32]) })
    }

    fn with(mut jwk: Value, members: Value) -> Value {
        jwk.as_object_mut().unwrap().extend(members.as_object().unwrap().clone());
        jwk
    }

    fn set(keys: &[Value]) -> Jwks {
        read("idp", json!({ "keys": keys, "further": [] }).to_string().as_bytes()).unwrap()
    }

    /// Kid and algorithm of each key that can be used.
    fn shown(set: &Jwks) -> Vec<String> {
        set.keys.iter().map(|key| format!("{} {}", key.kid().unwrap_or("-"), key.algorithm())).collect()
    }

    #[test]
    fn known_keys_are_used_and_all_others_are_passed_over() {
        let point = b64u(&[7; 32]);
        let held = set(&[
            with(rsa(1), json!({ "kid": "a", "alg": "RS256", "use": "sig" })),
            with(ed25519(1), json!({ "kid": "b", "key_ops": ["verify", "sign"], "d": b64u(&[9; 32]) })),
            json!({ "kty": "EC", "crv": "P-256", "x": point, "y": point, "kid": "c" }),
            with(rsa(2), json!({ "kid": "enc", "use": "enc" })),
            with(rsa(2), json!({ "kid": "odd", "use": 7 })),
            with(rsa(2), json!({ "kid": "wrap", "key_ops": ["wrapKey"] })),
            with(rsa(2), json!({ "kid": "ops", "key_ops": "verify" })),
            with(rsa(2), json!({ "kid": "oaep", "alg": "RSA-OAEP" })),
            with(rsa(2), json!({ "kid": "es", "alg": "ES256" })),
            with(rsa(2), json!({ "kid": "hs", "alg": "HS256" })),
            with(rsa(2), json!({ "kid": "none", "alg": "none" })),
            with(rsa(2), json!({ "kid": "number", "alg": 7 })),
            with(rsa(2), json!({ "kid": 7 })),
            json!({ "kty": "oct", "k": b64u(&[7; 64]), "kid": "shared", "alg": "HS256" }),
            json!({ "kty": "EC", "crv": "secp256k1", "x": point, "y": point, "kid": "k1" }),
            json!({ "kty": "AKP", "alg": "ML-DSA-44", "pub": point, "kid": "pq" }),
            json!({ "kty": "RSA", "n": b64u(&[0xff; 128]), "e": "AQAB", "kid": "1024" }),
            json!({ "kid": "nothing" }),
            json!("a string"),
            json!(null),
        ]);
        assert_eq!(shown(&held), ["a RS256", "b EdDSA", "c ES256"]);
        assert_eq!((held.used, held.passed_over), (3, 17));
    }

    #[test]
    fn a_key_without_alg_is_for_each_algorithm_of_its_kind() {
        let held = set(&[with(rsa(1), json!({ "kid": "a" })), ed25519(1)]);
        assert_eq!(shown(&held), ["a RS256", "a RS384", "a RS512", "a PS256", "a PS384", "a PS512", "- EdDSA"]);
        let ids: std::collections::HashSet<_> = held.keys.iter().map(Key::id).collect();
        assert_eq!(ids.len(), 7);
    }

    #[test]
    fn a_key_twice_is_one_and_two_under_one_kid_are_both_tried() {
        let a = |n| with(ed25519(n), json!({ "kid": "a" }));
        let held = set(&[a(1), a(1), a(2)]);
        assert_eq!(shown(&held), ["a EdDSA", "a EdDSA"]);
        assert_eq!(held.keys.candidates(Some("a"), Algorithm::EdDsa).unwrap().count(), 2);
        assert_eq!(held.keys.candidates(Some("b"), Algorithm::EdDsa).err(), Some(NoKey::UnknownKid));
        assert_eq!(held.keys.candidates(Some("a"), Algorithm::Rs256).err(), Some(NoKey::OtherAlgorithm));
    }

    #[test]
    fn a_key_is_its_issuers_and_stays_itself() {
        let text = json!({ "keys": [with(ed25519(1), json!({ "kid": "a" }))] }).to_string();
        let id = |issuer: &str| read(issuer, text.as_bytes()).unwrap().keys.iter().next().unwrap().id();
        assert_eq!(id("idp"), id("idp"));
        assert_ne!(id("idp"), id("other"), "the same key is not the same issuer's");
    }

    #[test]
    fn a_set_is_bounded_in_keys_and_bytes() {
        let keys: Vec<Value> = (0..=JWKS_KEYS_MAX).map(|n| ed25519(u8::try_from(n).unwrap())).collect();
        let held = set(&keys);
        assert_eq!((held.used, held.passed_over, held.keys.iter().count()), (JWKS_KEYS_MAX, 1, JWKS_KEYS_MAX));
        let padded = |bytes: usize| format!("{}{}", r#"{"keys":[]}"#, " ".repeat(bytes - 11));
        assert_eq!(read("idp", padded(JWKS_BYTES_MAX).as_bytes()).map(|set| set.used), Ok(0));
        assert_eq!(read("idp", padded(JWKS_BYTES_MAX + 1).as_bytes()).err(), Some(JwksError::TooLarge));
    }

    #[test]
    fn what_is_no_set_is_an_error() {
        let refused = |text: &str| read("idp", text.as_bytes()).unwrap_err();
        for text in ["", "{", "<html>", "{\"keys\":[]}x", "\u{feff}{}"] {
            assert_eq!(refused(text), JwksError::NotJson, "{text}");
        }
        for text in ["{}", "[]", "null", r#"{"keys":{}}"#, r#"{"keys":null}"#, r#"{"kty":"RSA"}"#] {
            assert_eq!(refused(text), JwksError::NoKeys, "{text}");
        }
        assert_eq!(refused(&"[".repeat(100_000)), JwksError::NotJson);
        let told = [JwksError::TooLarge, JwksError::NotJson, JwksError::NoKeys].map(|error| error.to_string());
        assert_eq!(told, ["it has more than 262144 bytes", "it is not JSON", "it has no array called keys"]);
    }

    #[test]
    fn sets_stand_by_issuer() {
        let mut sets = KeySets::default();
        let here = KeySource::default();
        sets.put("a", &here, set(&[ed25519(1)]).keys);
        sets.put("b", &here, set(&[ed25519(2)]).keys);
        sets.put("a", &here, KeySet::default());
        assert_eq!(sets.version(), 3);
        let of = |sets: &KeySets, issuer: &str| sets.of(issuer, &here).map(KeySet::is_empty);
        assert_eq!([of(&sets, "a"), of(&sets, "b"), of(&sets, "c")], [Some(true), Some(false), None]);
        sets.retain(|issuer| issuer == "a");
        assert_eq!([of(&sets, "a"), of(&sets, "b")], [Some(true), None]);
    }

    #[test]
    fn an_issuer_that_was_taken_out_and_put_back_begins_without_the_set_it_had() {
        let held = set(&[with(ed25519(1), json!({ "kid": "a" }))]).keys;
        let id = held.iter().next().unwrap().id();
        let mut sets = KeySets::default();
        sets.put("idp", &KeySource::default(), held);
        let options = |issuers: &[&str]| jwt::Options {
            key_sets: issuers
                .iter()
                .map(|issuer| IssuerOptions {
                    issuer: (*issuer).to_owned(),
                    algorithms: vec![Algorithm::EdDsa],
                    audiences: Vec::new(),
                    keys: None,
                    source: KeySource::default(),
                })
                .collect(),
            ..jwt::Options::default()
        };
        let verifier = Verifier::with_key_sets(options(&["idp"]), std::sync::Arc::new(sets));
        assert!(verifier.has_key(id));
        assert!(verifier.reconfigured(options(&["other", "idp"])).has_key(id), "what is named still is as before");
        let without = verifier.reconfigured(options(&["other"]));
        assert!(!without.has_key(id) && !without.reconfigured(options(&["idp"])).has_key(id));
        let mut from_file = options(&["idp"]);
        from_file.key_sets[0].keys = Some(KeySet::default());
        assert!(!verifier.reconfigured(from_file).reconfigured(options(&["idp"])).has_key(id));
        assert_eq!(without.key_sets().version(), 1);
    }

    #[test]
    fn a_set_from_a_source_that_is_configured_no_more_verifies_nothing() {
        let at = |url: &str, ca: Option<&[u8]>| KeySource { url: url.into(), ca: ca.map(Arc::from) };
        let old = at("https://old/", None);
        let held = set(&[with(ed25519(1), json!({ "kid": "a" }))]).keys;
        let id = held.iter().next().unwrap().id();
        let mut sets = KeySets::default();
        sets.put("idp", &old, held.clone());
        let options = |source: &KeySource| jwt::Options {
            key_sets: vec![IssuerOptions {
                issuer: "idp".to_owned(),
                algorithms: vec![Algorithm::EdDsa],
                audiences: Vec::new(),
                keys: None,
                source: source.clone(),
            }],
            ..jwt::Options::default()
        };
        let token =
            format!("{}.{}.{}", b64u(br#"{"alg":"EdDSA","kid":"a"}"#), b64u(br#"{"iss":"idp"}"#), b64u(&[0; 64]));
        let verdict = |verifier: &Verifier| verifier.verify_signature(token.as_bytes()).map(|_| ()).unwrap_err();
        let verifier = Verifier::with_key_sets(options(&old), Arc::new(sets.clone()));
        assert_eq!((verdict(&verifier), verifier.lacks_key_of(token.as_bytes())), (jwt::JwtError::BadSignature, None));
        for new in [at("https://new/", None), at("https://old/", Some(b"another root"))] {
            let moved = verifier.reconfigured(options(&new));
            assert_eq!(verdict(&moved), jwt::JwtError::UnknownKey, "its key is not tried");
            let lacked = moved.lacks_key_of(token.as_bytes()).map(|lacked| lacked.issuer);
            assert_eq!(lacked, Some(0), "and is waited for");
            assert!(moved.key(id).is_none() && moved.has_key(id), "whether it was removed is not known yet");
            sets.put("idp", &new, held.clone());
            assert!(!verifier.has_keys_beyond(&Verifier::with_key_sets(options(&new), Arc::new(sets.clone()))));
            sets.put("idp", &new, KeySet::default());
            let emptied = Verifier::with_key_sets(options(&new), Arc::new(sets.clone()));
            assert!(moved.has_keys_beyond(&emptied) && !emptied.has_key(id));
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in r#"[ \[\]{}:,"a-z0-9]{0,80}"#) {
            let _ = read("idp", text.as_bytes());
        }
    }
}
