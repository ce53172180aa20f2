//! The tokens of ephemeral sessions, and the names of the streams that callers describe: both made under a key that only
//! this process knows.
//!
//! Source: protocol version 1, section 1; RFC 2104. A token is a MAC of its session's id, so that whoever made the session is
//! given the same one again, and it need not be kept; it is found by its hash. A stream's name is a MAC of all that its
//! request is made of: equal requests have equal names, and a name tells nothing of the request.
//! Memory: the key. Errors: none. Not here: which sessions there are (`shard`).

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::{digest, hmac};

use crate::ids::EphemeralId;
use crate::secret::Secret;

/// What every token begins with. A JWT has dots, and this has none.
const PREFIX: &str = "rcs_";
/// Characters behind it: 256 bits.
const MAC_CHARS: usize = 43;
/// What the names of these streams begin with; a `streams` claim lets its bearer name targets where it matches all of them.
pub const STREAM_PREFIX: &str = "direct:";
/// Bytes of a MAC that a name holds.
const NAME_BYTES: usize = 16;

/// Whether a text that may be a JWT is meant as the token of an ephemeral session.
pub fn is_token(text: &[u8]) -> bool {
    text.starts_with(PREFIX.as_bytes()) && !text.contains(&b'.')
}

/// A token, hashed: what its session is found by.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct TokenHash([u8; 32]);

impl TokenHash {
    /// The hash of the token spelled `text`; `None` where that is none.
    pub fn of(text: &[u8]) -> Option<TokenHash> {
        let mac = text.strip_prefix(PREFIX.as_bytes())?;
        let is_ours = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_".contains(byte);
        if mac.len() != MAC_CHARS || !mac.iter().all(is_ours) {
            return None;
        }
        digest::digest(&digest::SHA256, text).as_ref().first_chunk().copied().map(TokenHash)
    }
}

/// What tokens and names are made under.
pub struct DirectKey(hmac::Key);

impl fmt::Debug for DirectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DirectKey(***)")
    }
}

impl DirectKey {
    /// The key of these random bits.
    pub fn of_random(random: [u8; 32]) -> DirectKey {
        DirectKey(hmac::Key::new(hmac::HMAC_SHA256, &random))
    }

    /// The token of a session.
    pub fn token(&self, id: EphemeralId) -> Secret {
        let mac = self.mac("token", [&id.0.to_le_bytes()[..]]);
        Secret::new(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(mac)))
    }

    /// The name of the stream whose request is made of these parts, in this order.
    pub fn stream_name<'p>(&self, parts: impl IntoIterator<Item = &'p [u8]>) -> String {
        let mac = self.mac("stream", parts);
        let start = mac.as_ref().first_chunk::<NAME_BYTES>().expect("SHA-256 has 32 bytes");
        format!("{STREAM_PREFIX}{}", URL_SAFE_NO_PAD.encode(start))
    }

    fn mac<'p>(&self, purpose: &str, parts: impl IntoIterator<Item = &'p [u8]>) -> hmac::Tag {
        let mut context = hmac::Context::with_key(&self.0);
        let mut add = |part: &[u8]| {
            // With its length, so that no part goes over into the next.
            context.update(&(part.len() as u64).to_le_bytes());
            context.update(part);
        };
        add(purpose.as_bytes());
        parts.into_iter().for_each(add);
        context.sign()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_has_one_token_and_each_its_own() {
        let (key, other) = (DirectKey::of_random([7; 32]), DirectKey::of_random([8; 32]));
        let (a, b) = (key.token(EphemeralId(1)), key.token(EphemeralId(2)));
        assert_eq!(a, key.token(EphemeralId(1)));
        assert!(a != b && a != other.token(EphemeralId(1)));
        let hash = |token: &Secret| TokenHash::of(token.expose_secret()).expect("a token");
        assert!(hash(&a) == hash(&a) && hash(&a) != hash(&b));
        assert!(
            is_token(a.expose_secret()) && !is_token(b"eyJ.e30.c2ln") && !is_token(b"rcs_a.b.c") && !is_token(b"rct_a")
        );
        let text = String::from_utf8(a.expose_secret().to_vec()).expect("it is text");
        for bad in ["", "rcs_", &text[1..], &text[..46], &(text.clone() + "A"), &text.replace("rcs_", "rct_")] {
            assert_eq!(TokenHash::of(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn names_are_equal_for_equal_parts_alone() {
        let key = DirectKey::of_random([7; 32]);
        let name = |parts: &[&str]| key.stream_name(parts.iter().map(|part| part.as_bytes()));
        assert_eq!(name(&["a", "bc"]), name(&["a", "bc"]));
        assert_ne!(name(&["a", "bc"]), name(&["ab", "c"]));
        assert_ne!(name(&["a", ""]), name(&["a"]));
        assert!(crate::ids::StreamId::new(&name(&["a"])).is_some(), "a name is a stream's id");
    }
}
