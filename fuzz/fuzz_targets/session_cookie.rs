//! Session cookies. As they come, whatever bytes: none names a session, for none is signed. And rightly signed ids: each is
//! read back, however long the list of secrets, and no byte of the cookie may be changed.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use restcast::auth::session::{CookieSecrets, SessionMark};
use restcast::limits::SESSION_ID_BYTES_MAX;
use restcast::secret::Secret;

/// What no fuzzer finds a signature for.
static NEW: LazyLock<CookieSecrets> = LazyLock::new(|| CookieSecrets::new(&[Secret::new(*b"a secret of the cookies")]));
static BOTH: LazyLock<CookieSecrets> = LazyLock::new(|| {
    CookieSecrets::new(&[Secret::new(*b"a newer secret of the cookies"), Secret::new(*b"a secret of the cookies")])
});

fuzz_target!(|data: &[u8]| {
    assert!(NEW.session_id(data).is_err(), "taken without a signature");
    let Ok(id) = std::str::from_utf8(data) else { return };
    let cookie = NEW.cookie(id).expect("there is a secret");
    let named = BOTH.session_id(cookie.as_bytes());
    assert_eq!(named, NEW.session_id(cookie.as_bytes()));
    if !(1..=SESSION_ID_BYTES_MAX).contains(&id.len()) {
        assert!(named.is_err(), "an id of {} bytes", id.len());
        return;
    }
    assert_eq!(named, Ok(Secret::new(id)));
    assert_eq!(SessionMark::of(id.as_bytes()), SessionMark::of(named.expect("it was read").expose_secret()));
    let mut changed = cookie.into_bytes();
    let place = data.iter().fold(0usize, |sum, byte| sum.wrapping_mul(31) + usize::from(*byte)) % changed.len();
    changed[place] ^= 1;
    assert!(BOTH.session_id(&changed).is_err(), "byte {place} is not signed");
});
