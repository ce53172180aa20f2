//! The tokens of ephemeral sessions, their ids and the places of their records, and the names of the streams that callers
//! describe.
//!
//! Source: protocol version 1, section 1; RFC 2104. A token has 256 random bits. What a session is called follows from it, one
//! way: its id is a hash of the token, and the place of its record where processes share one a hash of the id. So whoever has
//! the token finds the session, whoever made it is told its id, and who reads the places learns neither.
//! A stream's name is a MAC of all that its request is made of: equal requests have equal names, and a name tells nothing of
//! the request. What a maker calls a session is a place of its own, with the token there sealed; both are made under
//! [`DirectKey`]. Memory: the key. Errors: none. Not here: which sessions there are (`shard`), records (`ephemeral_record`).

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::{digest, hmac};

use super::sealed::{self, Purpose, SALT_BYTES};
use crate::ids::EphemeralId;
use crate::limits::EPHEMERAL_NAMED_BYTES_MAX;
use crate::secret::Secret;

/// What every token begins with. A JWT has dots, and this has none.
const PREFIX: &str = "rcs_";
/// Characters behind it: 256 bits.
const RANDOM_CHARS: usize = 43;
/// Characters of a place.
const PLACE_CHARS: usize = 43;
/// What the names of these streams begin with; a `streams` claim lets its bearer name targets where it matches all of them.
pub const STREAM_PREFIX: &str = "direct:";
/// Bytes of a MAC that a name holds.
const NAME_BYTES: usize = 16;
/// Characters of such a name behind [`STREAM_PREFIX`].
const NAME_CHARS: usize = 22;

/// Whether a text that may be a JWT is meant as the token of an ephemeral session.
pub fn is_token(text: &[u8]) -> bool {
    text.starts_with(PREFIX.as_bytes()) && !text.contains(&b'.')
}

fn is_ours(byte: &u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-_".contains(byte)
}

/// Whether a text may be the name of a stream that a caller has described.
pub fn is_stream_name(text: &str) -> bool {
    text.strip_prefix(STREAM_PREFIX).is_some_and(|name| name.len() == NAME_CHARS && name.bytes().all(|b| is_ours(&b)))
}

/// The token of these random bits.
pub fn token_of_random(random: [u8; 32]) -> Secret {
    Secret::new(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(random)))
}

/// The id of the session whose token is spelled `text`; `None` where that is none.
pub fn id_of(text: &[u8]) -> Option<EphemeralId> {
    let random = text.strip_prefix(PREFIX.as_bytes())?;
    if random.len() != RANDOM_CHARS || !random.iter().all(is_ours) {
        return None;
    }
    let hash = hash_of(b"restcast: session of a token, 1", text);
    hash.first_chunk().copied().map(|bits| EphemeralId(u128::from_le_bytes(bits)))
}

fn hash_of(purpose: &[u8], of: &[u8]) -> [u8; 32] {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(purpose);
    context.update(of);
    context.finish().as_ref().try_into().expect("SHA-256 has 32 bytes")
}

/// Where the record of a session stands, and what processes call it among themselves.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Place([u8; 32]);

impl Place {
    /// That of a session.
    pub fn of(id: EphemeralId) -> Place {
        Place(hash_of(b"restcast: place of a session, 1", &id.0.to_le_bytes()))
    }

    /// The place spelled `text`.
    pub fn parse(text: &str) -> Option<Place> {
        URL_SAFE_NO_PAD.decode(text).ok()?.try_into().ok().map(Place)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&URL_SAFE_NO_PAD.encode(self.0))
    }
}

/// What names are made under: of one process, or of all that share a secret.
pub struct DirectKey(hmac::Key);

impl fmt::Debug for DirectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DirectKey(***)")
    }
}

impl DirectKey {
    /// The key of these bits: random, or a secret's.
    pub fn of_bits(bits: [u8; 32]) -> DirectKey {
        DirectKey(hmac::Key::new(hmac::HMAC_SHA256, &bits))
    }

    /// The key of all who know this secret.
    pub fn of_secret(secret: &Secret) -> DirectKey {
        let key = hmac::Key::new(hmac::HMAC_SHA256, secret.expose_secret());
        let tag = hmac::sign(&key, b"restcast: direct mode, 1");
        DirectKey(hmac::Key::new(hmac::HMAC_SHA256, tag.as_ref()))
    }

    /// The name of the stream whose request is made of these parts, in this order.
    pub fn stream_name<'p>(&self, parts: impl IntoIterator<Item = &'p [u8]>) -> String {
        let mac = self.mac("stream", parts);
        let start = mac.as_ref().first_chunk::<NAME_BYTES>().expect("SHA-256 has 32 bytes");
        format!("{STREAM_PREFIX}{}", URL_SAFE_NO_PAD.encode(start))
    }

    /// Where it stands which session somebody has made under a name, by these parts.
    pub fn named_place<'p>(&self, parts: impl IntoIterator<Item = &'p [u8]>) -> String {
        URL_SAFE_NO_PAD.encode(self.mac("named", parts))
    }

    /// What stands there: the session's place, and its token, sealed.
    pub fn seal_named(&self, token: &Secret, id: EphemeralId, salt: [u8; SALT_BYTES]) -> Vec<u8> {
        let mut text = Place::of(id).to_string().into_bytes();
        text.extend(sealed::seal(self.mac("token", []).as_ref(), Purpose::SessionToken, salt, token.expose_secret()));
        text
    }

    /// The token in what stands there, with its session. `None`: it was made under another key, or by nobody.
    pub fn open_named(&self, named: &[u8]) -> Option<(Secret, EphemeralId)> {
        if named.len() > EPHEMERAL_NAMED_BYTES_MAX {
            return None;
        }
        let (place, sealed) = named.split_at_checked(PLACE_CHARS)?;
        let token = sealed::open(self.mac("token", []).as_ref(), Purpose::SessionToken, sealed)?;
        let id = id_of(&token)?;
        (Place::of(id).to_string().as_bytes() == place).then(|| (Secret::new(token), id))
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
    fn a_token_leads_to_its_session_and_nothing_leads_back() {
        let (a, b) = (token_of_random([7; 32]), token_of_random([8; 32]));
        let id = |token: &Secret| id_of(token.expose_secret()).expect("a token");
        assert!(id(&a) == id(&a.clone()) && id(&a) != id(&b));
        assert!(
            is_token(a.expose_secret()) && !is_token(b"eyJ.e30.c2ln") && !is_token(b"rcs_a.b.c") && !is_token(b"rct_a")
        );
        let text = String::from_utf8(a.expose_secret().to_vec()).expect("it is text");
        for bad in ["", "rcs_", &text[1..], &text[..46], &(text.clone() + "A"), &text.replace("rcs_", "rct_")] {
            assert_eq!(id_of(bad.as_bytes()), None, "{bad}");
        }
        let place = Place::of(id(&a));
        assert!(place != Place::of(id(&b)) && Place::parse(&place.to_string()) == Some(place));
        assert!(!place.to_string().contains(&text[4..20]) && place.to_string().len() == PLACE_CHARS);
        assert_eq!([Place::parse(""), Place::parse(&text[4..40]), Place::parse("%")], [None; 3]);
    }

    #[test]
    fn names_are_equal_for_equal_parts_alone() {
        let key = DirectKey::of_bits([7; 32]);
        let name = |parts: &[&str]| key.stream_name(parts.iter().map(|part| part.as_bytes()));
        assert_eq!(name(&["a", "bc"]), name(&["a", "bc"]));
        assert_ne!(name(&["a", "bc"]), name(&["ab", "c"]));
        assert_ne!(name(&["a", ""]), name(&["a"]));
        assert!(crate::ids::StreamId::new(&name(&["a"])).is_some(), "a name is a stream's id");
        assert!(is_stream_name(&name(&["a"])) && !is_stream_name("leads") && !is_stream_name("direct:"));
    }

    #[test]
    fn who_shares_a_secret_shares_names_and_nobody_else_does() {
        let of = |secret: &str| DirectKey::of_secret(&Secret::new(secret));
        let (one, same, other) = (of("s1"), of("s1"), of("s2"));
        let part = || [b"u1".as_slice()];
        assert_eq!(
            (one.stream_name(part()), one.named_place(part())),
            (same.stream_name(part()), same.named_place(part()))
        );
        assert!(
            one.stream_name(part()) != other.stream_name(part())
                && one.named_place(part()) != other.named_place(part())
        );
        let token = token_of_random([7; 32]);
        let id = id_of(token.expose_secret()).expect("a token");
        let named = one.seal_named(&token, id, [9; SALT_BYTES]);
        assert!(named.len() <= EPHEMERAL_NAMED_BYTES_MAX);
        assert!(named.starts_with(Place::of(id).to_string().as_bytes()));
        assert_eq!((same.open_named(&named), other.open_named(&named)), (Some((token.clone(), id)), None));
        let mut elsewhere = named.clone();
        elsewhere[0] ^= 1;
        assert_eq!((one.open_named(&elsewhere), one.open_named(&named[..40]), one.open_named(b"")), (None, None, None));
        assert!(!named.windows(16).any(|part| part == &token.expose_secret()[4..20]));
    }
}
