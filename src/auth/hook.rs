//! Hooks: an upstream says that something has changed, and proves that it is the upstream.
//!
//! `X-Restcast-Signature: t=<unix seconds>,v1=<hex HMAC-SHA256 of "t.body">`; several `v1` while a secret is being replaced.
//!
//! Source: protocol version 1, section 6; RFC 2104. Memory: what is returned. Errors: [`HookError`], the sender's fault;
//! nothing of the request stands in it. Not here: which secrets a stream has, and what a good hook does (`shard::hooks`).
//!
//! To other processes a hook is told of by its mark and the time, sealed under the secret that it was signed with: who does
//! not know that secret could not have sent the hook, and cannot say that there was one.

use ring::hmac;

use super::sealed::{self, Purpose, SALT_BYTES};
use crate::limits::{HOOK_HEADER_BYTES_MAX, HOOK_SIGNATURES_MAX, HOOK_WINDOW};
use crate::secret::Secret;
use crate::time::WallTime;

/// Bytes of an HMAC-SHA256.
const TAG_BYTES: usize = 32;

/// Tells a hook from another: equal for two exactly if both say and sign the same.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct HookMark([u8; 16]);

impl From<[u8; 16]> for HookMark {
    fn from(bytes: [u8; 16]) -> HookMark {
        HookMark(bytes)
    }
}

/// A hook that is believed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Hook<'s> {
    /// Which.
    pub mark: HookMark,
    secret: &'s Secret,
}

impl Hook<'_> {
    /// What other processes are told of it.
    pub fn seal(&self, at: WallTime, salt: [u8; SALT_BYTES]) -> Vec<u8> {
        let HookMark(mark) = self.mark;
        let text = [&at.as_micros().to_be_bytes()[..], &mark].concat();
        sealed::seal(self.secret.expose_secret(), Purpose::Hook, salt, &text)
    }
}

/// The hook that another process was sent just now, by what it says of it. `None`: whoever says so has none of `secrets`, or
/// has kept what was said once.
pub fn open(sealed: &[u8], secrets: &[Secret], now: WallTime) -> Option<HookMark> {
    let text = secrets.iter().find_map(|secret| sealed::open(secret.expose_secret(), Purpose::Hook, sealed))?;
    let (at, mark) = text.split_first_chunk()?;
    let at = WallTime::from_micros(u64::from_be_bytes(*at));
    sealed::is_of(at, now).then(|| mark.try_into().ok().map(HookMark)).flatten()
}

/// Why a hook is not believed.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum HookError {
    /// The header is not what it must be.
    #[error("X-Restcast-Signature is not t=<unix seconds>,v1=<hex HMAC-SHA256 of \"t.body\">")]
    Malformed,
    /// Its time is too far from ours.
    #[error("the hook's time is over {} seconds from now", HOOK_WINDOW.as_secs())]
    OutOfTime,
    /// None of its signatures was made with one of the secrets.
    #[error("the hook's signature does not verify")]
    Unsigned,
}

/// A signature's header, read.
struct Signatures<'h> {
    /// The seconds as they were written: that text is signed.
    seconds: &'h str,
    at: u64,
    tags: Vec<[u8; TAG_BYTES]>,
}

impl<'h> Signatures<'h> {
    fn read(header: &'h str) -> Option<Signatures<'h>> {
        if header.len() > HOOK_HEADER_BYTES_MAX {
            return None;
        }
        let (mut time, mut tags) = (None, Vec::new());
        for part in header.split(',') {
            match part.trim_matches([' ', '\t']).split_once('=')? {
                ("t", _) if time.is_some() => return None,
                ("t", seconds) => {
                    let digits = seconds.len() <= 12 && seconds.bytes().all(|byte| byte.is_ascii_digit());
                    time = Some((seconds, seconds.parse().ok().filter(|_| digits)?));
                }
                ("v1", _) if tags.len() >= HOOK_SIGNATURES_MAX => return None,
                ("v1", hex) => tags.push(tag_of(hex)?),
                // What a later version may sign by besides.
                _ => {}
            }
        }
        let (seconds, at) = time?;
        (!tags.is_empty()).then_some(Signatures { seconds, at, tags })
    }
}

fn tag_of(hex: &str) -> Option<[u8; TAG_BYTES]> {
    let mut tag = [0; TAG_BYTES];
    if hex.len() != 2 * TAG_BYTES {
        return None;
    }
    for (byte, pair) in tag.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
        let mut value = 0;
        for &digit in pair {
            value = value << 4 | char::from(digit).to_digit(16)?;
        }
        *byte = u8::try_from(value).ok()?;
    }
    Some(tag)
}

/// Whether a hook with this header and body comes from who has one of `secrets`. Takes as long for a signature that is
/// nearly right as for any other, and where there are no secrets as long as for one.
///
/// # Errors
/// [`HookError`].
pub fn verify<'s>(header: &str, body: &[u8], secrets: &'s [Secret], now: WallTime) -> Result<Hook<'s>, HookError> {
    let signatures = Signatures::read(header).ok_or(HookError::Malformed)?;
    let now_s = now.as_micros() / 1_000_000;
    if now_s.abs_diff(signatures.at) > HOOK_WINDOW.as_secs() {
        return Err(HookError::OutOfTime);
    }
    if secrets.is_empty() {
        std::hint::black_box(signed(&Secret::default(), &signatures, body));
        return Err(HookError::Unsigned);
    }
    for secret in secrets {
        let tag = signed(secret, &signatures, body);
        for presented in &signatures.tags {
            if same(tag.as_ref(), presented) {
                let mut mark = [0; 16];
                mark.iter_mut().zip(tag.as_ref()).for_each(|(to, from)| *to = *from);
                return Ok(Hook { mark: HookMark(mark), secret });
            }
        }
    }
    Err(HookError::Unsigned)
}

/// What whoever has `secret` makes of that time and body.
fn signed(secret: &Secret, signatures: &Signatures<'_>, body: &[u8]) -> hmac::Tag {
    let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, secret.expose_secret()));
    context.update(signatures.seconds.as_bytes());
    context.update(b".");
    context.update(body);
    context.sign()
}

/// Whether two tags are the same, in a time that does not depend on where they differ.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0u8, |all, (a, b)| all | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: WallTime = WallTime::from_secs(1_800_000_000);

    fn sign(secret: &str, t: &str, body: &str) -> String {
        let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
        let tag = hmac::sign(&key, format!("{t}.{body}").as_bytes());
        tag.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn secrets(texts: &[&str]) -> Vec<Secret> {
        texts.iter().map(|text| Secret::new(text.as_bytes())).collect()
    }

    #[test]
    fn a_known_signature_verifies() {
        // printf '1800000000.{"a":1}' | openssl dgst -sha256 -hmac secret
        let body = br#"{"a":1}"#;
        let tag = sign("secret", "1800000000", r#"{"a":1}"#);
        let header = format!("t=1800000000,v1={tag}");
        assert!(verify(&header, body, &secrets(&["secret"]), NOW).is_ok());
        assert!(
            verify(&header.to_uppercase().replace("T=", "t=").replace("V1=", "v1="), body, &secrets(&["secret"]), NOW)
                .is_ok()
        );
        assert_eq!(verify(&header, b"{\"a\":2}", &secrets(&["secret"]), NOW), Err(HookError::Unsigned));
        assert_eq!(verify(&header, body, &secrets(&["other"]), NOW), Err(HookError::Unsigned));
        assert_eq!(verify(&header, body, &[], NOW), Err(HookError::Unsigned));
    }

    #[test]
    fn while_secrets_rotate_any_signature_by_any_secret_will_do() {
        let (old, new) = (sign("old", "1800000000", ""), sign("new", "1800000000", ""));
        let both = format!("t=1800000000, v1={old} ,v0=00,v1={new}");
        let by_nobody = format!("t=1800000000,v1={}", sign("", "1800000000", ""));
        assert_eq!(verify(&by_nobody, b"", &[], NOW), Err(HookError::Unsigned), "no secret is not the empty one");
        for known in [&["old"][..], &["new"], &["newest", "new"]] {
            assert!(verify(&both, b"", &secrets(known), NOW).is_ok(), "{known:?}");
        }
        let mark = |header: &str| verify(header, b"", &secrets(&["new", "old"]), NOW).expect("it is signed").mark;
        assert_eq!(mark(&both), mark(&format!("v1={new},t=1800000000")), "it is the same hook");
        assert_ne!(mark(&both), mark(&format!("t=1800000001,v1={}", sign("new", "1800000001", ""))));
    }

    #[test]
    fn another_process_hears_of_a_hook_from_who_knows_the_secret_that_it_was_signed_with() {
        let header = format!("t=1800000000,v1={}", sign("old", "1800000000", "x"));
        let known = secrets(&["new", "old"]);
        let hook = verify(&header, b"x", &known, NOW).expect("it is signed");
        let sealed = hook.seal(NOW, [7; SALT_BYTES]);
        // One that has not been given the new secret yet, or has dropped the new one again.
        for theirs in [&["old"][..], &["new", "old"], &["other", "old", "new"]] {
            assert_eq!(open(&sealed, &secrets(theirs), NOW), Some(hook.mark), "{theirs:?}");
        }
        for theirs in [&[][..], &["new"], &["other"]] {
            assert_eq!(open(&sealed, &secrets(theirs), NOW), None, "{theirs:?}");
        }
        let age = crate::limits::PEER_ASK_AGE_MAX;
        let late = age + std::time::Duration::from_micros(1);
        assert_eq!(open(&sealed, &known, NOW + age), Some(hook.mark));
        assert_eq!((open(&sealed, &known, NOW + late), open(&sealed, &known, NOW - late)), (None, None));
        for cut in 0..sealed.len() {
            assert_eq!(open(sealed.get(..cut).unwrap_or_default(), &known, NOW), None, "{cut} bytes");
        }
        let short = sealed::seal(b"old", Purpose::Hook, [8; SALT_BYTES], &NOW.as_micros().to_be_bytes());
        assert_eq!(open(&short, &known, NOW), None);
    }

    #[test]
    fn the_window_is_five_minutes_either_way() {
        for (t, outcome) in [
            (1_799_999_700_u64, Ok(())),
            (1_799_999_699, Err(HookError::OutOfTime)),
            (1_800_000_300, Ok(())),
            (1_800_000_301, Err(HookError::OutOfTime)),
            (0, Err(HookError::OutOfTime)),
            (999_999_999_999, Err(HookError::OutOfTime)),
        ] {
            let header = format!("t={t},v1={}", sign("secret", &t.to_string(), "x"));
            assert_eq!(verify(&header, b"x", &secrets(&["secret"]), NOW).map(drop), outcome, "{t}");
        }
    }

    #[test]
    fn what_is_no_signature_is_none() {
        let tag = sign("secret", "1800000000", "");
        let many = format!("t=1800000000{}", format!(",v1={tag}").repeat(HOOK_SIGNATURES_MAX + 1));
        for header in [
            "",
            "t",
            "t=1800000000",
            &format!("v1={tag}"),
            &format!("t=,v1={tag}"),
            &format!("t=+1800000000,v1={tag}"),
            &format!("t=1800000000000,v1={tag}"),
            &format!("t=1800000000,t=1800000000,v1={tag}"),
            &format!("t=1800000000,v1={}", &tag[1..]),
            &format!("t=1800000000,v1={}g", &tag[1..]),
            &format!("t=1800000000,v1={tag}00"),
            &format!("t=1800000000,v1={tag},{}", "x=".repeat(HOOK_HEADER_BYTES_MAX)),
            &many,
        ] {
            assert_eq!(verify(header, b"", &secrets(&["secret"]), NOW), Err(HookError::Malformed), "{header}");
        }
    }

    #[test]
    fn each_digit_of_a_signature_counts() {
        let (tag, known) = (sign("secret", "1800000000", "x"), secrets(&["secret"]));
        for place in 0..tag.len() {
            let other = if tag.as_bytes()[place] == b'0' { "1" } else { "0" };
            let changed = [&tag[..place], other, &tag[place + 1..]].concat();
            let outcome = verify(&format!("t=1800000000,v1={changed}"), b"x", &known, NOW);
            assert_eq!(outcome, Err(HookError::Unsigned), "digit {place}");
        }
    }

    proptest! {
        #[test]
        fn what_is_signed_is_believed_and_what_is_changed_is_not(
            body in prop::collection::vec(any::<u8>(), 1..40),
            away_s in -300_i64..=300,
            secret in "[a-z]{1,80}",
            place in any::<prop::sample::Index>(),
            bit in 0u8..8,
        ) {
            let at = 1_800_000_000_i64 + away_s;
            let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
            let tag = hmac::sign(&key, &[at.to_string().as_bytes(), b".", &body].concat());
            let tag: String = tag.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
            let known = secrets(&[&secret]);
            let header = format!("t={at},v1={tag}");
            prop_assert!(verify(&header, &body, &known, NOW).is_ok());
            let later = format!("t={},v1={tag}", at + 1);
            let outcome = verify(&later, &body, &known, NOW);
            prop_assert!(outcome.is_err(), "another time is signed by nobody");
            let mut changed = body.clone();
            changed[place.index(body.len())] ^= 1 << bit;
            prop_assert_eq!(verify(&header, &changed, &known, NOW), Err(HookError::Unsigned));
        }
    }
}
