//! The attacks of RFC 8725 section 2, each by its name and number, against the verifier that serves requests.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use restcast::auth::jwks::{self, IssuerOptions, KeySets, KeySource};
use restcast::auth::jwt::{self, JwtError, Options, Verified, Verifier};
use restcast::auth::keys::{Algorithm, Key, KeyConfig, KeyError, KeySet};
use restcast::auth::members::MembersError;
use restcast::auth::public_key::{PublicKey, PublicKeyError};
use restcast::auth::signing::SigningKey;
use restcast::secret::Secret;
use restcast::time::WallTime;
use ring::hmac;
use ring::rand::SystemRandom;
use serde_json::{Value, json};

const NOW: WallTime = WallTime::from_secs(1_000_000);
const RSA: &str = include_str!("vectors/keys/rsa2048.pem");
const RSA_PUBLIC: &str = include_str!("vectors/keys/rsa2048.pub.pem");
const P256: &str = include_str!("vectors/keys/p256.pem");
const P256_PUBLIC: &str = include_str!("vectors/keys/p256.pub.pem");
const ED25519: &str = include_str!("vectors/keys/ed25519.pem");
const ED25519_PUBLIC: &str = include_str!("vectors/keys/ed25519.pub.pem");

fn signing(kid: &str, algorithm: Algorithm, private: &str) -> SigningKey {
    SigningKey::new(Some(kid), algorithm, &Secret::new(private.as_bytes()), &SystemRandom::new()).expect("a key")
}

fn mint(key: &SigningKey, claims: &Value) -> String {
    jwt::mint_by(key, &claims.to_string(), &SystemRandom::new()).expect("chance")
}

/// A token of these parts, signed with HMAC by whatever bytes.
fn hmac_signed(header: &Value, claims: &Value, secret: &[u8]) -> String {
    let secret = hmac::Key::new(hmac::HMAC_SHA256, secret);
    let sign = |signed: &[u8]| Ok::<_, ()>(hmac::sign(&secret, signed).as_ref().to_vec());
    jwt::sign_by(header.to_string().as_bytes(), claims.to_string().as_bytes(), sign).expect("a token")
}

fn public(kid: &str, algorithm: Algorithm, pem: &str) -> Key {
    Key::public("", Some(kid), algorithm, &PublicKey::read(pem.as_bytes()).expect("a key")).expect("of its kind")
}

fn verifier_of(keys: Vec<Key>) -> Verifier {
    Verifier::new(Options { keys: KeySet::of(keys).expect("different ones"), ..Options::default() })
}

fn claims() -> Value {
    json!({ "sub": "ada", "exp": 1_000_060 })
}

fn verdict(outcome: Result<Verified, JwtError>) -> &'static str {
    outcome.map_or_else(JwtError::reason, |_| "accept")
}

/// A public key as a JWK with these further members.
fn jwk(pem: &str, members: Value) -> Value {
    let spki = pem.lines().filter(|line| !line.starts_with('-')).collect::<String>();
    let der = base64::engine::general_purpose::STANDARD.decode(spki).expect("base64");
    let mut jwk = match PublicKey::read(pem.as_bytes()).expect("a key").kind().name() {
        "Ed25519" => json!({ "kty": "OKP", "crv": "Ed25519", "x": URL_SAFE_NO_PAD.encode(&der[der.len() - 32..]) }),
        "P-256" => {
            let (x, y) = der[der.len() - 64..].split_at(32);
            json!({ "kty": "EC", "crv": "P-256", "x": URL_SAFE_NO_PAD.encode(x), "y": URL_SAFE_NO_PAD.encode(y) })
        }
        // The modulus stands before the exponent, `02 03 01 00 01`.
        _ => {
            let n = &der[der.len() - 5 - 256..der.len() - 5];
            json!({ "kty": "RSA", "n": URL_SAFE_NO_PAD.encode(n), "e": "AQAB" })
        }
    };
    jwk.as_object_mut().expect("an object").extend(members.as_object().expect("an object").clone());
    jwk
}

/// Two issuers with key sets of their own, and a key that stands in the configuration.
fn two_issuers() -> Verifier {
    let issuer = |issuer: &str, algorithms: &[Algorithm], audience: &str| IssuerOptions {
        issuer: issuer.to_owned(),
        algorithms: algorithms.to_vec(),
        audiences: vec![audience.to_owned()],
        keys: None,
        source: KeySource::default(),
    };
    let mut sets = KeySets::default();
    for (issuer, pem) in [("https://a", P256_PUBLIC), ("https://b", ED25519_PUBLIC)] {
        let set = json!({ "keys": [jwk(pem, json!({ "kid": "k" }))] });
        let keys = jwks::read(issuer, set.to_string().as_bytes()).expect("a set").keys;
        sets.put(issuer, &KeySource::default(), keys);
    }
    let options = Options {
        keys: KeySet::of(vec![public("k", Algorithm::Rs256, RSA_PUBLIC)]).expect("one"),
        key_sets: vec![
            issuer("https://a", &[Algorithm::Es256, Algorithm::EdDsa], "restcast"),
            issuer("https://b", &[Algorithm::EdDsa, Algorithm::Es256], "restcast-b"),
        ],
        ..Options::default()
    };
    Verifier::with_key_sets(options, Arc::new(sets))
}

#[test]
fn section_2_1_weak_signatures_and_insufficient_signature_validation() {
    let verifier = verifier_of(vec![
        public("rsa", Algorithm::Rs256, RSA_PUBLIC),
        public("ec", Algorithm::Es256, P256_PUBLIC),
        public("ed", Algorithm::EdDsa, ED25519_PUBLIC),
    ]);
    let verify = |token: &str| verdict(verifier.verify(token.as_bytes(), NOW));
    assert_eq!(verify(&mint(&signing("rsa", Algorithm::Rs256, RSA), &claims())), "accept");
    // The algorithm changed to «none».
    for alg in ["none", "None", "nOnE", "NONE"] {
        for kid in ["rsa", "ec", "ed"] {
            let part = |part: Value| URL_SAFE_NO_PAD.encode(part.to_string());
            let token = format!("{}.{}.", part(json!({ "alg": alg, "kid": kid })), part(claims()));
            assert_eq!(verify(&token), "alg_none");
        }
    }
    // RS256 changed to HS256, with the public key, in each of its forms, as the secret.
    for (kid, pem) in [("rsa", RSA_PUBLIC), ("ec", P256_PUBLIC), ("ed", ED25519_PUBLIC)] {
        let der = base64::engine::general_purpose::STANDARD
            .decode(pem.lines().filter(|line| !line.starts_with('-')).collect::<String>())
            .expect("base64");
        let as_jwk = jwk(pem, json!({})).to_string();
        let forms: [&[u8]; 6] =
            [pem.as_bytes(), pem.trim_end().as_bytes(), &der, as_jwk.as_bytes(), &der[der.len() - 32..], b""];
        for secret in forms {
            let named = hmac_signed(&json!({ "alg": "HS256", "kid": kid }), &claims(), secret);
            assert_eq!(verify(&named), "alg_mismatch");
            let unnamed = hmac_signed(&json!({ "alg": "HS256" }), &claims(), secret);
            assert_eq!(verify(&unnamed), "no_key_for_alg");
        }
        // And an operator who configures it as one is told at the start.
        for form in forms.iter().take(4) {
            let config = KeyConfig { kid: None, algorithm: Algorithm::Hs256, secret: Secret::new(*form) };
            assert!(matches!(Key::new(&config), Err(KeyError::NotASecret { .. })));
        }
    }
    // One asymmetric algorithm for another of the same key.
    let as_ps = mint(&signing("rsa", Algorithm::Ps256, RSA), &claims());
    assert_eq!(verify(&as_ps), "alg_mismatch");
    let as_rs512 = mint(&signing("rsa", Algorithm::Rs512, RSA), &claims());
    assert_eq!(verify(&as_rs512), "alg_mismatch");
    // The same of a key in an issuer's set that names no algorithm: the operator says what the issuer signs with.
    let of_issuer = |algorithms: &[Algorithm]| {
        let set = json!({ "keys": [jwk(RSA_PUBLIC, json!({ "kid": "rsa" }))] }).to_string();
        let keys = jwks::read("https://a", set.as_bytes()).expect("a set").keys;
        let (issuer, source) = ("https://a".to_owned(), KeySource::default());
        let issuer =
            IssuerOptions { issuer, algorithms: algorithms.to_vec(), audiences: Vec::new(), keys: Some(keys), source };
        Verifier::new(Options { key_sets: vec![issuer], ..Options::default() })
    };
    let of_a = json!({ "sub": "ada", "exp": 1_000_060, "iss": "https://a" });
    let as_ps = mint(&signing("rsa", Algorithm::Ps256, RSA), &of_a);
    assert_eq!(verdict(of_issuer(&[Algorithm::Rs256]).verify(as_ps.as_bytes(), NOW)), "alg_mismatch");
    assert_eq!(verdict(of_issuer(&[Algorithm::Rs256, Algorithm::Ps256]).verify(as_ps.as_bytes(), NOW)), "accept");
    // A key of one kind under the name of another's.
    assert_eq!(verify(&mint(&signing("rsa", Algorithm::Es256, P256), &claims())), "alg_mismatch");
    // An RSA key that is too short to sign with, and one whose exponent makes every signature its own message.
    let short = include_bytes!("vectors/keys/rsa1024.pub.pem");
    assert_eq!(PublicKey::read(short), Err(PublicKeyError::RsaBits { bits: 1024 }));
    let exponent_1 = json!({ "kty": "RSA", "n": jwk(RSA_PUBLIC, json!({}))["n"], "e": "AQ" }).to_string();
    assert_eq!(PublicKey::read(exponent_1.as_bytes()), Err(PublicKeyError::Broken));
}

#[test]
fn section_2_2_weak_symmetric_keys() {
    for (algorithm, least) in [(Algorithm::Hs256, 32), (Algorithm::Hs384, 48), (Algorithm::Hs512, 64)] {
        let key = |bytes: usize| {
            Key::new(&KeyConfig { kid: None, algorithm, secret: Secret::new(vec![b'k'; bytes]) }).map(|_| ())
        };
        assert_eq!(key(least), Ok(()));
        assert_eq!(key(least - 1), Err(KeyError::TooShort { algorithm, bytes: least - 1 }), "a password is guessed");
    }
}

#[test]
fn section_2_3_incorrect_composition_of_encryption_and_signature() {
    // What is encrypted is not decrypted, and never taken for signed: five parts, or a JWE's header over three.
    let verifier = verifier_of(vec![public("rsa", Algorithm::Rs256, RSA_PUBLIC)]);
    let header = URL_SAFE_NO_PAD.encode(r#"{"alg":"RSA-OAEP","enc":"A256GCM","kid":"rsa"}"#);
    let five = format!("{header}.AAAA.AAAA.AAAA.AAAA");
    assert_eq!(verdict(verifier.verify(five.as_bytes(), NOW)), "not_three_parts");
    assert_eq!(verdict(verifier.verify(format!("{header}.AAAA.AAAA").as_bytes(), NOW)), "unsupported_alg");
    // A token within a token is a payload that is no object.
    let key = signing("rsa", Algorithm::Rs256, RSA);
    let inner = mint(&key, &claims());
    let header = json!({ "alg": "RS256", "kid": "rsa", "cty": "JWT" }).to_string();
    let chance = SystemRandom::new();
    let nested = jwt::sign_by(header.as_bytes(), inner.as_bytes(), |signed| key.sign(signed, &chance)).expect("chance");
    assert_eq!(verdict(verifier.verify(nested.as_bytes(), NOW)), "bad_payload");
}

#[test]
fn section_2_4_plaintext_leakage_through_analysis_of_ciphertext_length() {
    // Compression before encryption leaks; nothing is decrypted here, and a compressed payload («zip») is not inflated.
    let verifier = verifier_of(vec![public("rsa", Algorithm::Rs256, RSA_PUBLIC)]);
    let key = signing("rsa", Algorithm::Rs256, RSA);
    let header = json!({ "alg": "RS256", "kid": "rsa", "zip": "DEF" }).to_string();
    let deflated = b"\xab\x56\x2a\x2e\x4d\x52\xb2\x52\x4a\x4c\x49\x54\xaa\x05\x00";
    let sign = |signed: &[u8]| key.sign(signed, &SystemRandom::new());
    let token = jwt::sign_by(header.as_bytes(), deflated, sign).expect("chance");
    assert_eq!(verdict(verifier.verify(token.as_bytes(), NOW)), "bad_payload");
}

#[test]
fn section_2_5_insecure_use_of_elliptic_curve_encryption() {
    // No key is agreed on here, so that no invalid curve gives one away; a point that is not on its curve verifies nothing.
    let verifier = verifier_of(vec![public("ec", Algorithm::Es256, P256_PUBLIC)]);
    let ecdh = json!({ "alg": "ECDH-ES", "enc": "A128GCM", "epk": jwk(P256_PUBLIC, json!({})), "kid": "ec" });
    let token = hmac_signed(&ecdh, &claims(), b"");
    assert_eq!(verdict(verifier.verify(token.as_bytes(), NOW)), "unsupported_alg");
    let signed = mint(&signing("k", Algorithm::Es256, P256), &claims());
    let mut off_the_curve = jwk(P256_PUBLIC, json!({}));
    off_the_curve["y"] = off_the_curve["x"].clone();
    let off_the_curve = PublicKey::read(off_the_curve.to_string().as_bytes()).expect("its form is right");
    let key = Key::public("", Some("k"), Algorithm::Es256, &off_the_curve).expect("of its kind");
    assert_eq!(verdict(verifier_of(vec![key]).verify(signed.as_bytes(), NOW)), "bad_signature");
    // The signature of two zeros, which a careless verifier takes for anyone's.
    let (head, _) = signed.rsplit_once('.').expect("three parts");
    let zeros = format!("{head}.{}", URL_SAFE_NO_PAD.encode([0; 64]));
    let good = verifier_of(vec![public("k", Algorithm::Es256, P256_PUBLIC)]);
    assert_eq!(verdict(good.verify(signed.as_bytes(), NOW)), "accept");
    assert_eq!(verdict(good.verify(zeros.as_bytes(), NOW)), "bad_signature");
}

#[test]
fn section_2_6_multiplicity_of_json_encodings() {
    let verifier = verifier_of(vec![public("ed", Algorithm::EdDsa, ED25519_PUBLIC)]);
    let key = signing("ed", Algorithm::EdDsa, ED25519);
    let sign = |header: &[u8], payload: &[u8]| {
        let chance = SystemRandom::new();
        let token = jwt::sign_by(header, payload, |signed| key.sign(signed, &chance)).expect("chance");
        verdict(verifier.verify(token.as_bytes(), NOW))
    };
    let header = br#"{"alg":"EdDSA","kid":"ed"}"#;
    let text = r#"{"sub":"ada","exp":1000060}"#;
    assert_eq!(sign(header, text.as_bytes()), "accept");
    let utf_16: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let utf_32: Vec<u8> = text.chars().flat_map(|c| u32::from(c).to_be_bytes()).collect();
    let marked = [b"\xef\xbb\xbf", text.as_bytes()].concat();
    for payload in [&utf_16, &utf_32, &marked, &b"{\"sub\":\"\xff\",\"exp\":1000060}".to_vec()] {
        assert_eq!(sign(header, payload), "bad_payload");
    }
    // Two readings of one text: the member that stands twice.
    assert_eq!(sign(header, br#"{"sub":"ada","sub":"eve","exp":1000060}"#), "duplicate_member");
    assert_eq!(sign(br#"{"alg":"EdDSA","kid":"ed","\u0061lg":"none"}"#, text.as_bytes()), "duplicate_member");
    assert_eq!(JwtError::Payload(MembersError::Repeated).reason(), "duplicate_member");
}

#[test]
fn section_2_7_substitution_attacks() {
    let verifier = two_issuers();
    let verify = |token: &str| verdict(verifier.verify(token.as_bytes(), NOW));
    let of = |iss: &str, aud: &str| json!({ "sub": "ada", "exp": 1_000_060, "iss": iss, "aud": aud });
    let (a, b) = (signing("k", Algorithm::Es256, P256), signing("k", Algorithm::EdDsa, ED25519));
    let own = signing("k", Algorithm::Rs256, RSA);
    assert_eq!(verify(&mint(&a, &of("https://a", "restcast"))), "accept");
    assert_eq!(verify(&mint(&b, &of("https://b", "restcast-b"))), "accept");
    assert_eq!(verify(&mint(&own, &of("https://c", "anybody"))), "accept", "where the configuration names none");
    // Each says it is of the other, whose keys are not its: both know the `kid`, and both may use the algorithm.
    for (key, iss, aud) in [
        (&a, "https://b", "restcast-b"),
        (&b, "https://a", "restcast"),
        (&own, "https://a", "restcast"),
        (&own, "https://b", "restcast-b"),
        (&a, "https://c", "anybody"),
        (&b, "https://c", "anybody"),
    ] {
        let refused = verify(&mint(key, &of(iss, aud)));
        assert!(matches!(refused, "alg_mismatch" | "bad_signature"), "{iss}: {refused}");
    }
    // The same without a `kid`, so that every key of the issuer is tried.
    let unnamed = |algorithm, private: &str| {
        SigningKey::new(None, algorithm, &Secret::new(private.as_bytes()), &SystemRandom::new()).expect("a key")
    };
    let (a, b) = (unnamed(Algorithm::Es256, P256), unnamed(Algorithm::EdDsa, ED25519));
    assert_eq!(verify(&mint(&a, &of("https://a", "restcast"))), "accept");
    assert_eq!(verify(&mint(&a, &of("https://b", "restcast-b"))), "no_key_for_alg");
    assert_eq!(verify(&mint(&b, &of("https://a", "restcast"))), "no_key_for_alg");
    assert_eq!(verify(&mint(&b, &of("https://c", "anybody"))), "no_key_for_alg");
    // A token that one issuer made for another's service.
    assert_eq!(verify(&mint(&a, &of("https://a", "restcast-b"))), "wrong_audience");
    assert_eq!(verify(&mint(&b, &of("https://b", "restcast"))), "wrong_audience");
    // Two users of one name are two users.
    let issuer = |token: &str| verifier.verify(token.as_bytes(), NOW).expect("good").issuer().map(str::to_owned);
    let [of_a, of_b] = [mint(&a, &of("https://a", "restcast")), mint(&b, &of("https://b", "restcast-b"))];
    assert_ne!(issuer(&of_a), issuer(&of_b));
}

#[test]
fn section_2_8_cross_jwt_confusion() {
    // One key, several kinds of tokens: the audience tells them apart, and what lacks one is not ours.
    let options = Options {
        issuers: vec!["https://idp".into()],
        audiences: vec!["restcast".into()],
        keys: KeySet::of(vec![public("ed", Algorithm::EdDsa, ED25519_PUBLIC)]).expect("one"),
        leeway: Duration::ZERO,
        ..Options::default()
    };
    let verifier = Verifier::new(options);
    let key = signing("ed", Algorithm::EdDsa, ED25519);
    let verify = |claims: Value| verdict(verifier.verify(mint(&key, &claims).as_bytes(), NOW));
    assert_eq!(verify(json!({ "iss": "https://idp", "aud": "restcast", "exp": 1_000_060 })), "accept");
    // An ID token, made for a client.
    assert_eq!(
        verify(json!({ "iss": "https://idp", "aud": "client-7", "exp": 1_000_060, "nonce": "n" })),
        "wrong_audience"
    );
    // A logout token, which has no end, and a security event, which is for nobody.
    assert_eq!(verify(json!({ "iss": "https://idp", "aud": "restcast", "events": {} })), "missing_exp");
    assert_eq!(verify(json!({ "iss": "https://idp", "exp": 1_000_060, "events": {} })), "wrong_audience");
    assert_eq!(verify(json!({ "aud": "restcast", "exp": 1_000_060 })), "wrong_issuer");
}

#[test]
fn section_2_9_indirect_attacks_on_the_server() {
    // A key of the attacker's own, where the header says it is to be found: none is looked for.
    let verifier = verifier_of(vec![public("ec", Algorithm::Es256, P256_PUBLIC)]);
    let attacker = signing("ed", Algorithm::EdDsa, ED25519);
    let chance = SystemRandom::new();
    for (member, value) in [
        ("jwk", jwk(ED25519_PUBLIC, json!({}))),
        ("jku", json!("http://169.254.169.254/keys")),
        ("x5u", json!("file:///etc/passwd")),
        ("x5c", json!(["MIIB"])),
    ] {
        for alg in ["EdDSA", "ES256"] {
            let header = json!({ "alg": alg, "kid": "ec", member: value }).to_string();
            let claims = claims().to_string();
            let sign = |signed: &[u8]| attacker.sign(signed, &chance);
            let token = jwt::sign_by(header.as_bytes(), claims.as_bytes(), sign).expect("chance");
            let refused = verdict(verifier.verify(token.as_bytes(), NOW));
            assert!(matches!(refused, "alg_mismatch" | "bad_signature"), "{member}: {refused}");
        }
    }
    // A `kid` is a name, compared and nothing else; what it holds of SQL, paths or commands finds no key, nor does an issuer.
    for kid in ["' OR 1=1 --", "../../../../dev/null", "|id", "http://evil.example/k", "ec\0", "EC", "", "*"] {
        let token = mint(&signing(kid, Algorithm::Es256, P256), &claims());
        assert_eq!(verdict(verifier.verify(token.as_bytes(), NOW)), "unknown_kid", "{kid:?}");
    }
    let verifier = two_issuers();
    for iss in ["https://a/", "https://A", "https://a.evil.example", "https://a\0", "", "https://b@a"] {
        let claims = json!({ "sub": "ada", "exp": 1_000_060, "iss": iss, "aud": "restcast" });
        let token = mint(&signing("k", Algorithm::Es256, P256), &claims);
        assert_eq!(verdict(verifier.verify(token.as_bytes(), NOW)), "alg_mismatch", "{iss:?}");
        assert_eq!(verifier.lacks_key_of(token.as_bytes()), None, "nothing is fetched for a stranger");
    }
    // Only an unknown key of an issuer that is known is worth a fetch.
    let of = |kid: &str, algorithm, private: &str, iss: &str| {
        let claims = json!({ "sub": "ada", "exp": 1_000_060, "iss": iss, "aud": "restcast" });
        let lacked = verifier.lacks_key_of(mint(&signing(kid, algorithm, private), &claims).as_bytes());
        lacked.map(|lacked| {
            assert_eq!(lacked.kid.as_deref(), Some(kid));
            lacked.issuer
        })
    };
    assert_eq!(of("new", Algorithm::Es256, P256, "https://a"), Some(0));
    assert_eq!(of("new", Algorithm::EdDsa, ED25519, "https://b"), Some(1));
    assert_eq!(of("k", Algorithm::Es256, P256, "https://a"), None, "known");
    assert_eq!(of("k", Algorithm::EdDsa, ED25519, "https://a"), None, "known, and for another algorithm");
    assert_eq!(of("new", Algorithm::Rs256, RSA, "https://a"), None, "by what the issuer never signs with");
}
