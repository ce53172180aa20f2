//! Key sets and public keys, whatever bytes: none may panic, none may hold a key that shares a secret, is too short or stands
//! there twice; what is read is read the same again; and a key of the set signs nothing that HMAC would.
#![no_main]

use std::collections::HashSet;

use libfuzzer_sys::fuzz_target;
use restcast::auth::jwks;
use restcast::auth::keys::{Algorithm, Key, KeyConfig};
use restcast::auth::public_key::PublicKey;
use restcast::limits::JWKS_KEYS_MAX;
use restcast::secret::Secret;

fuzz_target!(|data: &[u8]| {
    set(data);
    document(data);
});

fn set(data: &[u8]) {
    let Ok(read) = jwks::read("https://idp.example", data) else { return };
    let again = jwks::read("https://idp.example", data).expect("it was read once");
    let of_another = jwks::read("https://other.example", data).expect("whoever it is of");
    assert!(read.used <= JWKS_KEYS_MAX);
    let members = serde_json::from_slice::<serde_json::Value>(data).expect("a set is JSON");
    assert_eq!(members["keys"].as_array().expect("an array").len(), read.used + read.passed_over);
    let mut ids = HashSet::new();
    for key in read.keys.iter() {
        assert!(!key.algorithm().is_symmetric(), "a set shares no secret");
        assert!(key.sign(b"text").is_none() && !key.verifies(b"text", b""));
        assert!(ids.insert(key.id()), "a key stands there twice");
        assert!(again.keys.contains(key.id()) && !of_another.keys.contains(key.id()), "a key is its issuer's");
        assert!(read.keys.candidates(key.kid(), key.algorithm()).is_ok());
    }
}

fn document(data: &[u8]) {
    let Ok(public_key) = PublicKey::read(data) else { return };
    let mut kinds = 0;
    for algorithm in Algorithm::ALL {
        let key = Key::public("", None, algorithm, &public_key);
        assert_eq!(key.is_ok(), algorithm.key_kind() == Some(public_key.kind()));
        if let Ok(key) = key {
            // Whatever it says: under a point of small order anything may verify.
            let _ = key.verifies(b"text", &[0; 64]);
            kinds += 1;
        }
    }
    assert!(kinds > 0, "a key that is read is for something");
    // What is a public key in a form with a mark of its own is no secret; bare bytes, as the 32 of an Ed25519 point, may be
    // anything, and may begin as JSON does.
    let marked = data.len() != 32 && (data.starts_with(b"-----BEGIN") || data.first() == Some(&b'{'));
    let config = KeyConfig { kid: None, algorithm: Algorithm::Hs256, secret: Secret::new(data) };
    assert!(!marked || Key::new(&config).is_err(), "a public key would be taken for a secret");
}
