//! Secrets that may be others tomorrow: values and certificates known by where they stand.
//!
//! Secrets that stand elsewhere (`env:`, `file:`) may change while streams are watched. Who an upstream takes restcast for is
//! then the same as before, and so are the streams: such a value is known by where it stands, not by what it is
//! ([`Live`]), and what it is now is read for each request. A value written into the configuration itself is known by itself:
//! another one is another stream. What hooks are signed with is such a value, too.
//!
//! Source: RFC 9110 section 5.5 and RFC 7617 section 2 for what may stand where.
//! Memory: each value once, shared by all who hold it. Errors: none; what does not fit is not taken over.
//! Not here: what they are for (`credential`, `oauth`), who reads files (`runtime::secrets`).

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::limits::UPSTREAM_SECRET_BYTES_MAX;
use crate::secret::Secret;

/// Where a value stands.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum Source {
    /// In the configuration itself.
    Written,
    /// In the environment variable of that name.
    Variable(String),
    /// In the file at that path.
    File(String),
}

/// What a value may be.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Rule {
    /// A header's value (RFC 9110 section 5.5).
    Field,
    /// Visible ASCII, as a token is.
    Visible,
    /// Any text without control characters.
    Text,
    /// The same without a colon, which would end it (RFC 7617 section 2).
    User,
    /// Whatever bytes: the key of a signature.
    Bytes,
}

impl Rule {
    /// Whether `bytes` may be such a value; none may be empty.
    pub fn allows(self, bytes: &[u8]) -> bool {
        let blank = |byte: Option<&u8>| matches!(byte, Some(b' ' | b'\t'));
        let fits = match self {
            Rule::Field => {
                let fits = |b: &u8| *b == b'\t' || (*b >= 0x20 && *b != 0x7f);
                bytes.iter().all(fits) && !blank(bytes.first()) && !blank(bytes.last())
            }
            Rule::Visible => bytes.iter().all(u8::is_ascii_graphic),
            Rule::Text => bytes.iter().all(|b| !b.is_ascii_control()),
            Rule::User => bytes.iter().all(|b| !b.is_ascii_control() && *b != b':'),
            Rule::Bytes => true,
        };
        fits && !bytes.is_empty() && bytes.len() <= UPSTREAM_SECRET_BYTES_MAX
    }
}

/// A secret that may be another one tomorrow. Clones share it: who replaces it does so for all.
#[derive(Clone)]
pub struct Live {
    source: Source,
    rule: Rule,
    value: Arc<Mutex<Held>>,
}

struct Held {
    secret: Secret,
    /// How often it has been replaced.
    replaced: u64,
}

impl Live {
    /// The value `secret` that stands at `source`.
    pub fn new(source: Source, rule: Rule, secret: Secret) -> Live {
        Live { source, rule, value: Arc::new(Mutex::new(Held { secret, replaced: 0 })) }
    }

    /// What it is now.
    pub fn value(&self) -> Secret {
        self.held().secret.clone()
    }

    /// Grows whenever it becomes another one.
    pub fn version(&self) -> u64 {
        self.held().replaced
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.value.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces it; whether `secret` is another value, and one that may stand here.
    pub fn replace(&self, secret: &Secret) -> Replaced {
        if !self.rule.allows(secret.expose_secret()) {
            return Replaced::Unfit;
        }
        let mut held = self.held();
        if held.secret == *secret {
            return Replaced::Same;
        }
        *held = Held { secret: secret.clone(), replaced: held.replaced + 1 };
        Replaced::Changed
    }

    /// Where it stands.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// The file that it stands in, if it is one.
    pub fn file(&self) -> Option<&str> {
        match &self.source {
            Source::File(path) => Some(path),
            Source::Written | Source::Variable(_) => None,
        }
    }
}

/// What became of a value that was to replace another.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Replaced {
    /// It is the same.
    Same,
    /// It is in force.
    Changed,
    /// It cannot stand there: the old one stays.
    Unfit,
}

/// Equal where both stand at the same place, whatever is there; of values that are written, the same.
impl PartialEq for Live {
    fn eq(&self, other: &Live) -> bool {
        let same = self.source == other.source && self.rule == other.rule;
        same && (self.source != Source::Written
            || Arc::ptr_eq(&self.value, &other.value)
            || self.value() == other.value())
    }
}

impl Eq for Live {}

impl Hash for Live {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.source.hash(state);
        if self.source == Source::Written {
            self.value().expose_secret().hash(state);
        }
    }
}

impl fmt::Debug for Live {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// A certificate and its key, in PEM.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct IdentityPem {
    /// The certificate, and those that vouch for it.
    pub cert: Vec<u8>,
    /// Its private key.
    pub key: Secret,
}

/// What restcast shows of itself to an upstream that asks for a client certificate: two files, known by their paths.
#[derive(Clone)]
pub struct ClientIdentity {
    /// Path of the certificate.
    pub cert: String,
    /// Path of its key.
    pub key: String,
    pem: Arc<Mutex<HeldPem>>,
}

struct HeldPem {
    pem: Arc<IdentityPem>,
    /// How often it has been replaced.
    replaced: u64,
}

impl ClientIdentity {
    /// The identity of those files, which hold `pem`.
    pub fn new(cert: String, key: String, pem: IdentityPem) -> ClientIdentity {
        ClientIdentity { cert, key, pem: Arc::new(Mutex::new(HeldPem { pem: Arc::new(pem), replaced: 0 })) }
    }

    /// What the files held when they were last read whole.
    pub fn pem(&self) -> Arc<IdentityPem> {
        Arc::clone(&self.held().pem)
    }

    /// Grows whenever they are replaced by others.
    pub fn version(&self) -> u64 {
        self.held().replaced
    }

    fn held(&self) -> MutexGuard<'_, HeldPem> {
        self.pem.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Replaces certificate and key, which must fit each other; whether they are others than before.
    pub fn replace(&self, pem: Arc<IdentityPem>) -> bool {
        let mut held = self.held();
        let changed = *held.pem != *pem;
        if changed {
            *held = HeldPem { pem, replaced: held.replaced + 1 };
        }
        changed
    }
}

impl PartialEq for ClientIdentity {
    fn eq(&self, other: &ClientIdentity) -> bool {
        self.cert == other.cert && self.key == other.key
    }
}

impl Eq for ClientIdentity {}

impl fmt::Debug for ClientIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientIdentity").field("cert", &self.cert).field("key", &self.key).finish_non_exhaustive()
    }
}

/// RFC 7617 section 2: what stands behind `Basic`.
pub fn basic(username: &Secret, password: &Secret) -> Vec<u8> {
    STANDARD.encode([username.expose_secret(), b":", password.expose_secret()].concat()).into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn live(source: Source, text: &str) -> Live {
        Live::new(source, Rule::Field, Secret::new(text.as_bytes()))
    }

    fn written(text: &str) -> Live {
        live(Source::Written, text)
    }

    fn file(text: &str) -> Live {
        live(Source::File("key".into()), text)
    }

    #[test]
    fn a_value_is_known_by_where_it_stands_and_a_written_one_by_itself() {
        assert_eq!(file("a"), file("b"));
        assert_ne!(file("a"), live(Source::File("other".into()), "a"));
        assert_ne!(file("a"), live(Source::Variable("key".into()), "a"));
        assert_ne!(file("a"), written("a"));
        assert_eq!(written("a"), written("a"));
        assert_ne!(written("a"), written("b"));
        let hash = |value: &Live| {
            let mut hasher = std::hash::DefaultHasher::new();
            value.hash(&mut hasher);
            hasher.finish()
        };
        assert_eq!(hash(&file("a")), hash(&file("b")));
        assert_ne!(hash(&written("a")), hash(&written("b")));
    }

    #[test]
    fn clones_share_a_value_and_what_does_not_fit_is_not_taken() {
        let value = file("a");
        let shared = value.clone();
        assert_eq!(value.replace(&Secret::new(*b"a")), Replaced::Same);
        assert_eq!(value.replace(&Secret::new(*b"b")), Replaced::Changed);
        assert_eq!((shared.value(), shared.version()), (Secret::new(*b"b"), 1));
        for unfit in [&b""[..], b"a\nb", b" a", b"a\x7f"] {
            assert_eq!(value.replace(&Secret::new(unfit)), Replaced::Unfit, "{unfit:?}");
        }
        assert_eq!(shared.version(), 1);
        let longest = vec![b'a'; UPSTREAM_SECRET_BYTES_MAX];
        assert_eq!(value.replace(&Secret::new(longest.clone())), Replaced::Changed);
        assert_eq!(value.replace(&Secret::new([&longest[..], b"a"].concat())), Replaced::Unfit);
        assert!(Rule::Visible.allows(b"a.b-c") && !Rule::Visible.allows(b"a b") && !Rule::Visible.allows(b"\xc3\xa9"));
        assert!(Rule::User.allows(b"a b") && !Rule::User.allows(b"a:b") && Rule::Text.allows(b"a:b"));
        assert!(Rule::Text.allows(" pass wörd ".as_bytes()) && !Rule::Text.allows(b"a\tb"));
    }
}
