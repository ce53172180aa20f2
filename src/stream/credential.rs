//! What a request to an upstream carries so that it is let in: a token, a password, a key, a client certificate.
//!
//! Source: RFC 7617 (Basic), RFC 6750 section 2.1 (Bearer), RFC 3986 section 2 (keys in a query).
//! Memory: a few words, and secrets once, shared. Errors: none.
//! Not here: what a secret is that changes (`live`), tokens that expire (`oauth`).

use std::sync::Arc;

use super::live::{ClientIdentity, IdentityPem, Live, basic};
use super::oauth;
use crate::secret::Secret;

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
    /// What of it is not there, a sentence without a secret: until it is, nothing is asked. `None`: all of it is.
    pub lacks: Option<Arc<str>>,
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

    /// Grows whenever one of its secrets is replaced: whom an upstream takes restcast for may be somebody else since.
    pub fn version(&self) -> u64 {
        self.values().map(Live::version).chain(self.identities().map(ClientIdentity::version)).sum()
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
    use crate::stream::live::{Rule, Source};

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
            lacks: None,
        };
        let (held, newer) = (of("old"), of("new"));
        assert_eq!(held, newer);
        assert_eq!(held.version(), 0);
        held.take_over(&newer);
        assert_eq!(held.version(), 3, "each of its secrets");
        held.take_over(&newer);
        assert_eq!(held.version(), 3);
        let presented = held.presented(None);
        let values: Vec<&[u8]> = presented.headers.iter().map(|(_, value)| value.expose_secret()).collect();
        assert_eq!(values, [&b"new"[..], b"Bearer new"]);
        assert_eq!(presented.identity.expect("there is one").cert, b"new");
        assert!(!format!("{held:?}").contains("new"));
        assert_ne!(of("x"), Credential { identity: None, ..of("x") });
    }
}
