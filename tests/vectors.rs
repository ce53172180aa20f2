//! The verifier against what others say must verify, and what must not: RFC 7515, 7520 and 8037, Project Wycheproof.
//! `tests/vectors/README.md` says where each file is from.

use std::fs;
use std::path::Path;

use restcast::auth::jwks;
use restcast::auth::jwt::{JwtError, Options, Verifier};
use restcast::auth::keys::{Algorithm, Key, KeyConfig, KeySet};
use restcast::auth::public_key::PublicKey;
use restcast::secret::Secret;
use serde_json::Value;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

fn read(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors").join(name);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).expect("JSON")
}

fn text<'v>(value: &'v Value, name: &str) -> &'v str {
    value[name].as_str().unwrap_or_else(|| panic!("{name} of {value}"))
}

fn list<'v>(value: &'v Value, name: &str) -> &'v [Value] {
    value[name].as_array().unwrap_or_else(|| panic!("{name}"))
}

fn hex(digits: &str) -> Vec<u8> {
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).expect("digits")).collect()
}

/// A verifier with the one key that `jwk` is, under the `kid` it has, for `algorithm`.
fn verifier(jwk: &Value, algorithm: Algorithm) -> Verifier {
    let kid = jwk["kid"].as_str();
    let key = if algorithm.is_symmetric() {
        let secret = Secret::new(URL_SAFE_NO_PAD.decode(text(jwk, "k")).expect("base64url"));
        Key::new(&KeyConfig { kid: kid.map(str::to_owned), algorithm, secret })
    } else {
        Key::public("", kid, algorithm, &PublicKey::read(jwk.to_string().as_bytes()).expect("a key"))
    };
    Verifier::new(Options { keys: KeySet::of(vec![key.expect("a key")]).expect("one"), ..Options::default() })
}

/// A verifier with that key as a key set has it; `None`: it is not for verifying, or of a kind that is not known here.
fn verifier_for(jwk: &Value, algorithm: Algorithm) -> Option<Verifier> {
    if algorithm.is_symmetric() {
        return Some(verifier(jwk, algorithm));
    }
    let set = jwks::read("", serde_json::json!({ "keys": [jwk] }).to_string().as_bytes()).expect("a key set");
    (set.used == 1).then(|| Verifier::new(Options { keys: set.keys, ..Options::default() }))
}

#[test]
fn the_examples_of_the_rfcs_verify() {
    let examples = read("rfc.json");
    let mut sections = Vec::new();
    for example in list(&examples, "verifies") {
        let (section, jws) = (text(example, "section"), text(example, "jws"));
        let algorithm: Algorithm = text(example, "alg").parse().expect("an algorithm of ours");
        let verifier = verifier(&example["key"], algorithm);
        let signed = verifier.verify_signature(jws.as_bytes()).unwrap_or_else(|error| panic!("{section}: {error}"));
        assert!(!signed.payload.is_empty(), "{section}");
        // What is changed in any place does not.
        for at in 0..jws.len() {
            let mut changed = jws.as_bytes().to_vec();
            changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
            assert!(verifier.verify_signature(&changed).is_err(), "{section} changed at {at}");
        }
        sections.push(section.to_owned());
    }
    let wanted = ["RFC 7515 A.1", "RFC 7515 A.2", "RFC 7515 A.3", "RFC 7520 4.1", "RFC 7520 4.2", "RFC 7520 4.4"];
    assert_eq!(sections[..6], wanted);
    assert_eq!(sections[6..], ["RFC 8037 A.4"]);
}

#[test]
fn the_examples_of_the_rfcs_that_are_not_for_us_are_refused() {
    let examples = read("rfc.json");
    let refused = list(&examples, "refused");
    assert_eq!(refused.len(), 8);
    for example in refused {
        let (section, jws) = (text(example, "section"), text(example, "jws").as_bytes());
        let verdict = match text(example, "alg") {
            // P-521 and «none» have no key here: each key there is, is asked.
            "none" | "ES512" => every_key().verify_signature(jws),
            alg => verifier(&example["key"], alg.parse().expect("an algorithm")).verify_signature(jws),
        };
        let error = verdict.expect_err(section);
        match text(example, "alg") {
            "none" => assert_eq!(error, JwtError::AlgorithmNone, "{section}"),
            "ES512" => assert_eq!(error, JwtError::UnsupportedAlgorithm, "{section}"),
            _ if section.ends_with("detached") => assert_eq!(error, JwtError::BadSignature, "{section}"),
            _ => assert_ne!(error, JwtError::BadSignature, "{section}: its form alone is no compact one"),
        }
    }
}

/// Every key of the RFCs' examples, each without its `kid`, so that it is tried.
fn every_key() -> Verifier {
    let examples = read("rfc.json");
    let keys = list(&examples, "verifies").iter().map(|example| {
        let mut jwk = example["key"].clone();
        jwk.as_object_mut().expect("an object").remove("kid");
        let of_one = verifier(&jwk, text(example, "alg").parse().expect("an algorithm"));
        of_one.options().keys.iter().next().expect("one").clone()
    });
    Verifier::new(Options { keys: KeySet::of(keys.collect()).expect("different ones"), ..Options::default() })
}

/// Tests of Wycheproof's that are judged otherwise here, and why that is right.
fn judged_otherwise(id: u64) -> Option<&'static str> {
    match id {
        346 | 350 => Some("the key's alg is PS256 and the signature PS384: the algorithm is the key's (RFC 8725 3.1)"),
        347 | 351 => Some("P-521 is not supported (protocol section 2)"),
        372 | 373 => Some("a character that is none of base64url is refused, not passed over (RFC 7515 2)"),
        367 | 370 => Some("byte for byte what test 357 has as valid: in this file the padding is lost"),
        _ => None,
    }
}

#[test]
fn wycheproof_web_signatures_are_judged_as_wycheproof_judges_them() {
    let vectors = read("wycheproof/json_web_signature_test.json");
    let (mut run, mut valid, mut otherwise) = (0, 0, 0);
    for group in list(&vectors, "testGroups") {
        let key = &group["key"];
        let verifier = match key["alg"].as_str().map(str::parse) {
            Some(Ok(algorithm)) => verifier_for(key, algorithm),
            Some(Err(_)) => None,
            // A key that names none is one of a pair, and so a set knows it by its kind.
            None => verifier_for(key, Algorithm::Rs256),
        };
        for test in list(group, "tests") {
            let jws = text(test, "jws").as_bytes();
            let verdict = verifier.as_ref().map(|verifier| verifier.verify_signature(jws));
            let (id, comment) = (test["tcId"].as_u64().expect("a number"), text(test, "comment"));
            let accepted = matches!(verdict, Some(Ok(_)));
            let wanted = text(test, "result") == "valid";
            match judged_otherwise(id) {
                Some(why) => assert_ne!(accepted, wanted, "{id} {comment}: {why}"),
                None => assert_eq!(accepted, wanted, "{id} {comment}: {verdict:?}"),
            }
            run += 1;
            valid += usize::from(accepted);
            otherwise += usize::from(judged_otherwise(id).is_some());
        }
    }
    assert_eq!((run, valid, otherwise), (401, 46 - 6 + 2, 8));
}

#[test]
fn a_wycheproof_signature_verifies_where_its_key_is_for_what_it_is_signed_with() {
    let vectors = read("wycheproof/json_web_signature_test.json");
    for group in list(&vectors, "testGroups").iter().filter(|group| group["key"]["alg"] == "PS256") {
        for test in list(group, "tests").iter().filter(|test| [346, 350].map(Value::from).contains(&test["tcId"])) {
            let mut key = group["key"].clone();
            key["alg"] = "PS384".into();
            let verifier = verifier_for(&key, Algorithm::Ps384).expect("a key");
            verifier.verify_signature(text(test, "jws").as_bytes()).expect("what RFC 7520 figure 20 says");
        }
    }
}

/// Runs a file of signatures: under `algorithm` everything «valid» verifies, and nothing else does; `never`: the file is about
/// another scheme, and nothing that is valid by that does.
fn signatures(name: &str, algorithm: Algorithm, never: bool) {
    let vectors = read(&format!("wycheproof/{name}_test.json"));
    let (mut run, mut accepted) = (0, 0);
    for group in list(&vectors, "testGroups") {
        let document = match group["publicKeyAsn"].as_str() {
            Some(pkcs1) => hex(pkcs1),
            None => text(group, "publicKeyPem").into(),
        };
        let public_key = PublicKey::read(&document).unwrap_or_else(|error| panic!("{name}: {error}"));
        for form in ["publicKeyJwk", "keyJwk", "publicKeyPem"] {
            let document = match &group[form] {
                Value::String(text) => text.clone(),
                Value::Object(_) => group[form].to_string(),
                _ => continue,
            };
            assert_eq!(PublicKey::read(document.as_bytes()), Ok(public_key.clone()), "{name}: {form}");
        }
        let key = Key::public("", None, algorithm, &public_key).expect("of its kind");
        for test in list(group, "tests") {
            let verifies = key.verifies(&hex(text(test, "msg")), &hex(text(test, "sig")));
            let (id, comment) = (&test["tcId"], text(test, "comment"));
            let is_valid = text(test, "result") == "valid";
            assert!(if never { !(verifies && is_valid) } else { verifies == is_valid }, "{name} {id} {comment}");
            run += 1;
            accepted += usize::from(verifies && is_valid);
        }
    }
    assert_eq!(run, vectors["numberOfTests"].as_u64().expect("a number") as usize);
    assert_eq!(accepted == 0, never, "{name}");
}

#[test]
fn wycheproof_ecdsa_signatures_are_judged_as_wycheproof_judges_them() {
    signatures("ecdsa_secp256r1_sha256_p1363", Algorithm::Es256, false);
    signatures("ecdsa_secp384r1_sha384_p1363", Algorithm::Es384, false);
}

#[test]
fn wycheproof_ed25519_signatures_are_judged_as_wycheproof_judges_them() {
    signatures("ed25519", Algorithm::EdDsa, false);
}

#[test]
fn wycheproof_rsa_pkcs_1_signatures_are_judged_as_wycheproof_judges_them() {
    signatures("rsa_signature_2048_sha256", Algorithm::Rs256, false);
    signatures("rsa_signature_2048_sha384", Algorithm::Rs384, false);
    signatures("rsa_signature_2048_sha512", Algorithm::Rs512, false);
}

#[test]
fn wycheproof_rsa_pss_signatures_are_judged_as_wycheproof_judges_them() {
    signatures("rsa_pss_2048_sha256_mgf1_32", Algorithm::Ps256, false);
    signatures("rsa_pss_2048_sha384_mgf1_48", Algorithm::Ps384, false);
    signatures("rsa_pss_4096_sha512_mgf1_64", Algorithm::Ps512, false);
    // RFC 7518 3.5: a salt as long as the hash, and its hash for the mask; what is signed otherwise is no PS256.
    signatures("rsa_pss_2048_sha256_mgf1_0", Algorithm::Ps256, true);
    signatures("rsa_pss_2048_sha256_mgf1sha1_20", Algorithm::Ps256, true);
}

#[test]
fn wycheproof_macs_are_judged_as_wycheproof_judges_them() {
    let vectors = read("wycheproof/hmac_sha256_test.json");
    let mut run = 0;
    for group in list(&vectors, "testGroups") {
        let whole = group["tagSize"] == 256;
        for test in list(group, "tests") {
            let config =
                KeyConfig { kid: None, algorithm: Algorithm::Hs256, secret: Secret::new(hex(text(test, "key"))) };
            // RFC 7518 3.2: shorter keys are none.
            let Ok(key) = Key::new(&config) else {
                assert!(config.secret.len() < 32);
                continue;
            };
            let verifies = key.verifies(&hex(text(test, "msg")), &hex(text(test, "tag")));
            assert_eq!(verifies, whole && text(test, "result") == "valid", "{} {}", test["tcId"], test["comment"]);
            run += 1;
        }
    }
    assert!(run > 100, "{run}");
}
