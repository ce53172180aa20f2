//! What a request to an upstream carries so that it is let in: a token, a password, a key, a client certificate.
//!
//! Secrets that stand elsewhere (`env:`, `file:`) may change while streams are watched. Who an upstream takes restcast for is
//! then the same as before, and so are the streams: such a value is known by where it stands, not by what it is
//! ([`Live`]), and what it is now is read for each request. A value written into the configuration itself is known by itself:
//! another one is another stream.
//!
//! Source: RFC 7617 (Basic), RFC 6750 section 2.1 (Bearer), RFC 3986 section 2 (keys in a query).
//! Memory: each value once, shared by all who hold it. Errors: none; what does not fit is not taken over.
//! Not here: tokens that expire (`oauth`), who reads files (`runtime::secrets`).

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::oauth;
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
        };
        fits && !bytes.is_empty() && bytes.len() <= UPSTREAM_SECRET_BYTES_MAX
    }
}

/// A secret that may be another one tomorrow. Clones share it: who replaces it does so for all.
#[derive(Clone)]
pub struct Live {
    source: Source,
    rule: Rule,
    value: Arc<Mutex<Secret>>,
}

impl Live {
    /// The value `secret` that stands at `source`.
    pub fn new(source: Source, rule: Rule, secret: Secret) -> Live {
        Live { source, rule, value: Arc::new(Mutex::new(secret)) }
    }

    /// What it is now.
    pub fn value(&self) -> Secret {
        self.value.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces it; whether `secret` is another value, and one that may stand here.
    pub fn replace(&self, secret: &Secret) -> Replaced {
        if !self.rule.allows(secret.expose_secret()) {
            return Replaced::Unfit;
        }
        let mut value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        if *value == *secret {
            return Replaced::Same;
        }
        *value = secret.clone();
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
    pem: Arc<Mutex<Arc<IdentityPem>>>,
}

impl ClientIdentity {
    /// The identity of those files, which hold `pem`.
    pub fn new(cert: String, key: String, pem: IdentityPem) -> ClientIdentity {
        ClientIdentity { cert, key, pem: Arc::new(Mutex::new(Arc::new(pem))) }
    }

    /// What the files held when they were last read whole.
    pub fn pem(&self) -> Arc<IdentityPem> {
        Arc::clone(&self.pem.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Replaces certificate and key, which must fit each other; whether they are others than before.
    pub fn replace(&self, pem: Arc<IdentityPem>) -> bool {
        let mut held = self.pem.lock().unwrap_or_else(PoisonError::into_inner);
        let changed = **held != *pem;
        if changed {
            *held = pem;
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

/// `[stream.auth]` and `[action.auth]`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Scheme {
    /// `Authorization: Bearer`, of a token that somebody else looks after.
    Bearer(Live),
    /// `Authorization: Basic`.
    Basic {
        /// The user, without a colon.
        username: Live,
        /// The password.
        password: Live,
    },
    /// A header of the upstream's own.
    Header {
        /// Its name.
        name: String,
        /// Its value.
        value: Live,
    },
    /// A parameter of the URL's query. It is put there when the request is sent, and stands in no URL before.
    Query {
        /// Its name.
        name: String,
        /// Its value.
        value: Live,
    },
    /// `Authorization: Bearer`, of a token that is got from a token endpoint.
    OAuth(Arc<oauth::Options>),
}

impl Scheme {
    /// The secrets that it is made of.
    fn values(&self) -> Vec<&Live> {
        match self {
            Scheme::Bearer(value) | Scheme::Header { value, .. } | Scheme::Query { value, .. } => vec![value],
            Scheme::Basic { username, password } => vec![username, password],
            Scheme::OAuth(options) => options.values(),
        }
    }
}

/// Everything that a request carries so that it is let in. Equal for two streams where they are the same to the upstream.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Credential {
    /// `[stream.auth]`.
    pub scheme: Option<Scheme>,
    /// Headers of the configuration whose values stand elsewhere.
    pub headers: Vec<(String, Live)>,
    /// `client_cert` and `client_key`.
    pub identity: Option<ClientIdentity>,
}

/// What one request carries. Nothing of it is shown anywhere.
#[derive(Clone, Default)]
pub struct Presented {
    /// Headers, besides those of the stream's options.
    pub headers: Vec<(String, Secret)>,
    /// A parameter of the query, `name=value`, percent-encoded.
    pub query: Option<Secret>,
    /// What TLS shows.
    pub identity: Option<Arc<IdentityPem>>,
}

impl Credential {
    /// What a request carries now. `token` is the one that was got, where the scheme is OAuth.
    pub fn presented(&self, token: Option<&Secret>) -> Presented {
        let mut headers: Vec<(String, Secret)> =
            self.headers.iter().map(|(name, value)| (name.clone(), value.value())).collect();
        let mut query = None;
        let mut authorization = |scheme: &str, rest: &[u8]| {
            headers.push(("Authorization".to_owned(), Secret::new([scheme.as_bytes(), b" ", rest].concat())));
        };
        match &self.scheme {
            None => {}
            Some(Scheme::Bearer(value)) => authorization("Bearer", value.value().expose_secret()),
            Some(Scheme::Basic { username, password }) => {
                authorization("Basic", &basic(&username.value(), &password.value()));
            }
            Some(Scheme::OAuth(_)) => {
                if let Some(token) = token {
                    authorization("Bearer", token.expose_secret());
                }
            }
            Some(Scheme::Header { name, value }) => headers.push((name.clone(), value.value())),
            Some(Scheme::Query { name, value }) => {
                let mut pair = Vec::new();
                percent_encode(name.as_bytes(), &mut pair);
                pair.push(b'=');
                percent_encode(value.value().expose_secret(), &mut pair);
                query = Some(Secret::new(pair));
            }
        }
        Presented { headers, query, identity: self.identity.as_ref().map(ClientIdentity::pem) }
    }

    /// Where tokens come from, if this is OAuth.
    pub fn oauth(&self) -> Option<&Arc<oauth::Options>> {
        match &self.scheme {
            Some(Scheme::OAuth(options)) => Some(options),
            _ => None,
        }
    }

    /// The secrets that it is made of.
    pub fn values(&self) -> impl Iterator<Item = &Live> {
        self.headers.iter().map(|(_, value)| value).chain(self.scheme.iter().flat_map(Scheme::values))
    }

    /// The certificates that are shown: to the upstream, and to its token endpoint.
    pub fn identities(&self) -> impl Iterator<Item = &ClientIdentity> {
        self.identity.iter()
    }

    /// Takes over the values of `newer`, which is equal: from now on requests carry these.
    pub fn take_over(&self, newer: &Credential) {
        for (held, new) in self.values().zip(newer.values()) {
            held.replace(&new.value());
        }
        for (held, new) in self.identities().zip(newer.identities()) {
            held.replace(new.pem());
        }
    }
}

/// RFC 7617 section 2: what stands behind `Basic`.
pub fn basic(username: &Secret, password: &Secret) -> Vec<u8> {
    STANDARD.encode([username.expose_secret(), b":", password.expose_secret()].concat()).into_bytes()
}

/// RFC 3986 section 2.3: all but the unreserved characters as `%XX`.
fn percent_encode(bytes: &[u8], out: &mut Vec<u8>) {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    let digit = |nibble: u8| DIGITS.get(usize::from(nibble)).copied().unwrap_or(b'0');
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(byte);
        } else {
            out.extend([b'%', digit(byte >> 4), digit(byte & 15)]);
        }
    }
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

    fn shown(scheme: Scheme) -> (Vec<(String, String)>, Option<String>) {
        let text = |secret: &Secret| String::from_utf8(secret.expose_secret().to_vec()).expect("text");
        let credential = Credential { scheme: Some(scheme), ..Credential::default() };
        let presented = credential.presented(Some(&Secret::new(*b"t0ken")));
        let headers = presented.headers.iter().map(|(name, value)| (name.clone(), text(value))).collect();
        (headers, presented.query.as_ref().map(text))
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
        assert_eq!(shared.value(), Secret::new(*b"b"));
        for unfit in [&b""[..], b"a\nb", b" a", b"a\x7f"] {
            assert_eq!(value.replace(&Secret::new(unfit)), Replaced::Unfit, "{unfit:?}");
        }
        let longest = vec![b'a'; UPSTREAM_SECRET_BYTES_MAX];
        assert_eq!(value.replace(&Secret::new(longest.clone())), Replaced::Changed);
        assert_eq!(value.replace(&Secret::new([&longest[..], b"a"].concat())), Replaced::Unfit);
        assert!(Rule::Visible.allows(b"a.b-c") && !Rule::Visible.allows(b"a b") && !Rule::Visible.allows(b"\xc3\xa9"));
        assert!(Rule::User.allows(b"a b") && !Rule::User.allows(b"a:b") && Rule::Text.allows(b"a:b"));
        assert!(Rule::Text.allows(" pass wörd ".as_bytes()) && !Rule::Text.allows(b"a\tb"));
    }

    #[test]
    fn each_scheme_puts_its_secret_where_it_belongs() {
        let header = |name: &str, value: &str| (vec![(name.to_owned(), value.to_owned())], None);
        assert_eq!(shown(Scheme::Bearer(written("abc"))), header("Authorization", "Bearer abc"));
        let basic = Scheme::Basic { username: written("Aladdin"), password: written("open sesame") };
        assert_eq!(shown(basic), header("Authorization", "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="));
        let own = Scheme::Header { name: "X-Api-Key".into(), value: written("k") };
        assert_eq!(shown(own), header("X-Api-Key", "k"));
        let query = Scheme::Query { name: "api key".into(), value: written("a&b=c d+é/~") };
        assert_eq!(shown(query), (Vec::new(), Some("api%20key=a%26b%3Dc%20d%2B%C3%A9%2F~".to_owned())));
    }

    #[test]
    fn a_credential_takes_over_the_values_of_its_equal() {
        let of = |text: &str| Credential {
            scheme: Some(Scheme::Bearer(file(text))),
            headers: vec![("X-Key".into(), live(Source::Variable("KEY".into()), text))],
            identity: Some(ClientIdentity::new(
                "cert.pem".into(),
                "key.pem".into(),
                IdentityPem { cert: text.into(), key: Secret::new(text) },
            )),
        };
        let (held, newer) = (of("old"), of("new"));
        assert_eq!(held, newer);
        held.take_over(&newer);
        let presented = held.presented(None);
        let values: Vec<&[u8]> = presented.headers.iter().map(|(_, value)| value.expose_secret()).collect();
        assert_eq!(values, [&b"new"[..], b"Bearer new"]);
        assert_eq!(presented.identity.expect("there is one").cert, b"new");
        assert!(!format!("{held:?}").contains("new"));
        assert_ne!(of("x"), Credential { identity: None, ..of("x") });
    }
}
