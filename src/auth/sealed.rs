//! What processes tell each other by way of Redis, sealed under a secret that both ends know already: who reads along learns
//! nothing, and who makes something up is not heard.
//!
//! Source: RFC 8439 (ChaCha20-Poly1305), RFC 2104 (HMAC). Each text is sealed under a key of its own, made of the secret, what
//! the text is for, and a salt that stands before it; so no nonce is ever used twice, and none needs to be kept.
//! Memory: none but [`Heard`]'s. Errors: what does not open is nothing. Not here: what is said (`renewal`), the secrets' strength.

use std::collections::{HashSet, VecDeque};

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use ring::hmac;

use crate::limits::{PEER_ASK_AGE_MAX, PEER_HEARD_MAX};
use crate::time::{Instant, WallTime};

/// Bytes of the salt before a sealed text.
pub const SALT_BYTES: usize = 16;

/// What a text is for: one that was made for another purpose does not open.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Purpose {
    /// Asks for the renewal of a connection's credential.
    Renewal,
    /// The answer to the question with that salt.
    RenewalAnswer([u8; SALT_BYTES]),
    /// Asks for a list of connections.
    List,
    /// The answer to the question with that salt.
    ListAnswer([u8; SALT_BYTES]),
    /// Says that a hook has come.
    Hook,
    /// What an ephemeral session is, for whoever has its token.
    Session,
    /// What its maker is told of it, for whoever knows its id.
    SessionFace,
    /// Its token, for those who share a key.
    SessionToken,
}

fn key(secret: &[u8], purpose: Purpose, salt: [u8; SALT_BYTES]) -> LessSafeKey {
    let (word, about) = match purpose {
        Purpose::Renewal => (1u8, [0; SALT_BYTES]),
        Purpose::RenewalAnswer(salt) => (2, salt),
        Purpose::List => (3, [0; SALT_BYTES]),
        Purpose::ListAnswer(salt) => (4, salt),
        Purpose::Hook => (5, [0; SALT_BYTES]),
        Purpose::Session => (6, [0; SALT_BYTES]),
        Purpose::SessionFace => (7, [0; SALT_BYTES]),
        Purpose::SessionToken => (8, [0; SALT_BYTES]),
    };
    let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, secret));
    context.update(b"restcast: between processes, 1");
    context.update(&[word]);
    context.update(&about);
    context.update(&salt);
    let key = UnboundKey::new(&CHACHA20_POLY1305, context.sign().as_ref());
    LessSafeKey::new(key.expect("SHA-256 has the 32 bytes of a key"))
}

/// Each key seals one text.
fn nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; 12])
}

/// Seals `text`. `salt` is random, another for each text.
pub fn seal(secret: &[u8], purpose: Purpose, salt: [u8; SALT_BYTES], text: &[u8]) -> Vec<u8> {
    let mut sealed = text.to_vec();
    let tag = key(secret, purpose, salt).seal_in_place_append_tag(nonce(), Aad::empty(), &mut sealed);
    tag.expect("no text is so long that it cannot be sealed");
    let mut all = salt.to_vec();
    all.append(&mut sealed);
    all
}

/// The salt of what was sealed.
pub fn salt(sealed: &[u8]) -> Option<[u8; SALT_BYTES]> {
    sealed.first_chunk().copied()
}

/// The text of what was sealed under that secret for that purpose. `None`: it was not.
pub fn open(secret: &[u8], purpose: Purpose, sealed: &[u8]) -> Option<Vec<u8>> {
    let (salt, rest) = sealed.split_first_chunk()?;
    let mut text = rest.to_vec();
    let length = key(secret, purpose, *salt).open_in_place(nonce(), Aad::empty(), &mut text).ok()?.len();
    text.truncate(length);
    Some(text)
}

/// Whether a question with that time is one of about `now`: either clock may be ahead.
pub fn is_of(at: WallTime, now: WallTime) -> bool {
    now.since(at).max(at.since(now)) <= PEER_ASK_AGE_MAX
}

/// The questions that were opened lately, by their salts: one that comes again is somebody's who has listened.
#[derive(Debug, Default)]
pub struct Heard {
    salts: HashSet<[u8; SALT_BYTES]>,
    /// The same, the earliest first.
    at: VecDeque<(Instant, [u8; SALT_BYTES])>,
}

impl Heard {
    /// Whether the question with that salt, which was opened and [`is_of`] now, comes for the first time. Past
    /// [`PEER_HEARD_MAX`] the oldest is forgotten.
    pub fn is_first(&mut self, salt: [u8; SALT_BYTES], now: Instant) -> bool {
        // From the farthest ahead that its clock may be to the oldest that it may get.
        let life = PEER_ASK_AGE_MAX * 2;
        while let Some(&(at, oldest)) = self.at.front()
            && (now.since(at) > life || self.at.len() >= PEER_HEARD_MAX)
        {
            self.at.pop_front();
            self.salts.remove(&oldest);
        }
        let first = self.salts.insert(salt);
        if first {
            self.at.push_back((now, salt));
        }
        first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_heard_is_remembered_for_as_long_as_it_is_good_and_within_its_bound() {
        let begin = Instant::from_micros(1_000_000_000);
        let salt = |number: usize| (number as u128).to_le_bytes();
        let mut heard = Heard::default();
        assert!(heard.is_first(salt(1), begin));
        assert!(!heard.is_first(salt(1), begin + PEER_ASK_AGE_MAX * 2), "a clock may be so far ahead");
        assert!(heard.is_first(salt(2), begin));
        let after = begin + PEER_ASK_AGE_MAX * 2 + std::time::Duration::from_micros(1);
        assert!(heard.is_first(salt(3), after));
        assert_eq!((heard.salts.len(), heard.at.len()), (1, 1), "what is too old takes no room");
        for number in 4..=PEER_HEARD_MAX + 2 {
            assert!(heard.is_first(salt(number), after));
        }
        assert!(!heard.is_first(salt(4), after));
        assert!(heard.is_first(salt(0), after));
        assert_eq!((heard.salts.len(), heard.at.len()), (PEER_HEARD_MAX, PEER_HEARD_MAX));
    }

    #[test]
    fn only_the_same_secret_and_purpose_open_what_was_sealed() {
        let salt_a = [7; SALT_BYTES];
        let sealed = seal(b"secret", Purpose::Renewal, salt_a, b"a token");
        assert_eq!(salt(&sealed), Some(salt_a));
        assert_eq!(open(b"secret", Purpose::Renewal, &sealed).as_deref(), Some(&b"a token"[..]));
        assert!(!sealed.windows(7).any(|bytes| bytes == b"a token"));
        assert_eq!(open(b"Secret", Purpose::Renewal, &sealed), None);
        let answers = [Purpose::RenewalAnswer([0; SALT_BYTES]), Purpose::ListAnswer(salt_a)];
        let others = answers.into_iter().chain([Purpose::List, Purpose::Hook]);
        for other in others {
            assert_eq!(open(b"secret", other, &sealed), None, "{other:?}");
        }
        let answer = seal(b"secret", Purpose::RenewalAnswer(salt_a), [8; SALT_BYTES], b"");
        assert_eq!(open(b"secret", Purpose::RenewalAnswer(salt_a), &answer).as_deref(), Some(&b""[..]));
        assert_eq!(open(b"secret", Purpose::RenewalAnswer([9; SALT_BYTES]), &answer), None, "to another question");
    }

    #[test]
    fn what_was_changed_or_cut_does_not_open() {
        let sealed = seal(b"secret", Purpose::List, [1; SALT_BYTES], b"{}");
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            if let Some(byte) = changed.get_mut(at) {
                *byte ^= 1;
            }
            assert_eq!(open(b"secret", Purpose::List, &changed), None, "byte {at}");
            assert_eq!(open(b"secret", Purpose::List, sealed.get(..at).unwrap_or_default()), None, "{at} bytes");
        }
    }
}
