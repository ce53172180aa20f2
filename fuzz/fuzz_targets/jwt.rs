//! Tokens. As they come, whatever bytes: none may panic, none may be accepted. And rightly signed, with whatever header and
//! payload: none may panic, the payload must come back, what is accepted must stand by the rules it was accepted by, and no
//! bit of the token may be flipped. Nor may a token of an issuer with a key set be accepted by any other key than its own.
#![no_main]

use std::sync::LazyLock;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use restcast::auth::grant::RightsTable;
use restcast::auth::jwks::{self, IssuerOptions, KeySource};
use restcast::auth::jwt::{DATE_SECS_MAX, Options, Verifier, claimed_header, claimed_kid, claimed_payload, sign};
use restcast::auth::keys::{Algorithm, Key, KeyConfig, KeySet};
use restcast::limits::TOKEN_BYTES_MAX;
use restcast::secret::Secret;
use restcast::time::WallTime;

const NOW: WallTime = WallTime::from_secs(1_000_000);

static KEY: LazyLock<Key> = LazyLock::new(|| Key::new(&config()).expect("the key is long enough"));
static VERIFIER: LazyLock<Verifier> = LazyLock::new(|| {
    let keys = KeySet::new(&[config()]).expect("the key is long enough");
    Verifier::new(Options { keys, leeway: Duration::from_secs(5), ..Options::default() })
});

fn config() -> KeyConfig {
    // What no fuzzer finds a signature for.
    KeyConfig { kid: None, algorithm: Algorithm::Hs256, secret: Secret::new(*b"0123456789abcdef0123456789abcdef") }
}

/// The issuer with a key set: the key of RFC 8037 appendix A, which signs nothing here.
const ISSUER: &str = "i";
const SET: &[u8] = br#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#;

static WITH_ISSUER: LazyLock<Verifier> = LazyLock::new(|| {
    let issuer = IssuerOptions {
        issuer: ISSUER.to_owned(),
        algorithms: Algorithm::ALL.into_iter().filter(|algorithm| !algorithm.is_symmetric()).collect(),
        audiences: Vec::new(),
        keys: Some(jwks::read(ISSUER, SET).expect("a set").keys),
        source: KeySource::default(),
    };
    Verifier::new(Options { key_sets: vec![issuer], ..VERIFIER.options().clone() })
});

fuzz_target!(|data: &[u8]| {
    raw(data);
    signed(br#"{"alg":"HS256"}"#, data);
    if let Some(at) = newline(data) {
        signed(&data[..at], &data[at + 1..]);
    }
});

fn newline(data: &[u8]) -> Option<usize> {
    data.iter().position(|&byte| byte == b'\n')
}

fn raw(token: &[u8]) {
    assert!(VERIFIER.verify(token, NOW).is_err(), "accepted without a signature");
    assert!(VERIFIER.verify_signature(token).is_err(), "verified without a signature");
    assert!(WITH_ISSUER.verify(token, NOW).is_err(), "accepted without an issuer's signature");
    let _ = (claimed_header(token), claimed_kid(token), claimed_payload(token));
}

fn signed(header: &[u8], payload: &[u8]) {
    let token = sign(&KEY, header, payload);
    let signature = VERIFIER.verify_signature(token.as_bytes());
    let verified = VERIFIER.verify(token.as_bytes(), NOW);
    if token.len() > TOKEN_BYTES_MAX {
        assert_eq!(signature.unwrap_err().reason(), "too_large");
        return;
    }
    // By an issuer's set everything else is as it was, and what claims to be the issuer's is refused.
    match (&verified, WITH_ISSUER.verify(token.as_bytes(), NOW)) {
        (Ok(verified), Ok(_)) => assert_ne!(verified.issuer(), Some(ISSUER), "accepted by another's key"),
        (Ok(verified), Err(_)) => assert_eq!(verified.issuer(), Some(ISSUER)),
        (Err(_), other) => assert!(other.is_err()),
    }
    match &signature {
        Ok(signed) => assert_eq!(signed.payload, payload),
        Err(_) => assert!(verified.is_err(), "the claims of a token without a valid signature were read"),
    }
    if let Ok(verified) = verified {
        // serde_json reads neither 128 levels nor numbers beyond f64; what it reads must agree.
        let Ok(claims) = serde_json::from_slice::<serde_json::Value>(payload) else { return };
        let exp = claims["exp"].as_f64().expect("accepted claims have exp");
        assert!(exp > 999_995.0 - 1e-3 && exp <= DATE_SECS_MAX as f64, "accepted past its time: {exp}");
        assert_eq!(claims["sub"].as_str(), verified.sub());
        assert_eq!(claims["iss"].as_str(), verified.issuer());
        let grant = verified.into_grant(&mut RightsTable::default(), &["sub".to_owned()]);
        let _ = grant.may_watch("leads", false, &["a".to_owned()], &["b".to_owned()]);

        let mut changed = token.into_bytes();
        let at = payload.iter().map(|&byte| usize::from(byte)).sum::<usize>() % changed.len();
        changed[at] ^= 1 << (at % 8);
        assert!(VERIFIER.verify(&changed, NOW).is_err(), "accepted with a flipped bit");
    }
}
