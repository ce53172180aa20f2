//! `[proxy]`: the HTTP proxy through which requests leave the operator's network, and what is asked without it.
//!
//! Source: RFC 9110 section 9.3.6 (tunnels), RFC 7617 (the login). Memory: what is configured.
//! Errors: [`ProxyUrlError`] and `None`, the operator's fault; they repeat nothing of the URL.
//! Not here: the tunnel's head (`codec::tunnel`), connecting (`runtime::fetch`).

use std::net::IpAddr;

use ipnet::IpNet;
use url::{Host, Url};

use super::live::{Source, basic};
use crate::codec::http::percent_decode;
use crate::secret::Secret;

/// The proxy, and what is asked directly.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Proxy {
    /// Its host.
    pub host: Host<String>,
    /// Its port.
    pub port: u16,
    /// User and value of `Proxy-Authorization`, where it wants one.
    pub login: Option<Login>,
    /// What is asked directly besides loopback.
    pub except: Vec<Exception>,
    /// Where the URL stands, which has a login and so may be another one tomorrow.
    pub source: Source,
}

/// Who logs in at the proxy.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Login {
    user: String,
    authorization: Secret,
}

impl Login {
    /// The value of `Proxy-Authorization`.
    pub fn authorization(&self) -> &Secret {
        &self.authorization
    }
}

/// Hosts that are asked directly.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Exception {
    /// Addresses that stand in the URL; what a name resolves to is not looked at.
    Network(IpNet),
    /// This name.
    Name(String),
    /// Every name under this one, written `*.NAME`.
    Under(String),
}

/// What is wrong with `proxy.url`.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ProxyUrlError {
    /// No URL at all.
    #[error("is not a URL: write it as in \"http://user:password@proxy.example.com:3128\"")]
    NotUrl,
    /// Another scheme.
    #[error(
        "has a scheme other than http://: the way to the proxy is plain, what goes through it is sealed by the upstream's TLS"
    )]
    Scheme,
    /// A path, query or fragment.
    #[error("has more than user, password, host and port")]
    More,
    /// A bad escape, a colon in the user, or a control character.
    #[error(
        "has a user or password that cannot be sent: write % as %25, and no control characters or colon in the user"
    )]
    Login,
    /// One without the other.
    #[error("has a user or a password alone")]
    HalfLogin,
}

impl Proxy {
    /// Reads a URL that was found at `source`, without exceptions.
    ///
    /// # Errors
    /// [`ProxyUrlError`].
    pub fn read(url: &Secret, source: Source) -> Result<Proxy, ProxyUrlError> {
        let text = std::str::from_utf8(url.expose_secret()).map_err(|_| ProxyUrlError::NotUrl)?;
        Ok(Proxy { source, ..Proxy::parse(text.trim_end())? })
    }

    /// The same of one that is written as it is.
    ///
    /// # Errors
    /// [`ProxyUrlError`].
    pub fn parse(text: &str) -> Result<Proxy, ProxyUrlError> {
        let url = Url::parse(text).map_err(|_| ProxyUrlError::NotUrl)?;
        if url.scheme() != "http" {
            return Err(ProxyUrlError::Scheme);
        }
        let (Some(host), Some(port)) = (url.host(), url.port_or_known_default()) else {
            return Err(ProxyUrlError::NotUrl);
        };
        if url.path() != "/" || url.query().is_some() || url.fragment().is_some() {
            return Err(ProxyUrlError::More);
        }
        let part = |text: &str| {
            let decoded = percent_decode(text).ok_or(ProxyUrlError::Login)?.into_owned();
            if decoded.chars().any(char::is_control) { Err(ProxyUrlError::Login) } else { Ok(decoded) }
        };
        let login = match (part(url.username())?, url.password().map(part).transpose()?.unwrap_or_default()) {
            (user, password) if user.is_empty() && password.is_empty() => None,
            (user, password) if user.is_empty() || password.is_empty() => return Err(ProxyUrlError::HalfLogin),
            // RFC 7617 section 2: the first colon ends the user.
            (user, _) if user.contains(':') => return Err(ProxyUrlError::Login),
            (user, password) => {
                let token = basic(&Secret::new(user.as_bytes()), &Secret::new(password));
                Some(Login { user, authorization: Secret::new([b"Basic ", token.as_slice()].concat()) })
            }
        };
        Ok(Proxy { host: host.to_owned(), port, login, except: Vec::new(), source: Source::Written })
    }

    /// The URL with `***` for the password.
    pub fn masked(&self) -> String {
        let shown = |c: char| if c.is_control() || "@:/".contains(c) { '?' } else { c };
        let login =
            self.login.as_ref().map(|login| format!("{}:***@", login.user.chars().map(shown).collect::<String>()));
        format!("http://{}{}:{}", login.unwrap_or_default(), self.host, self.port)
    }

    /// Whether `host` is asked through it. This machine itself never is.
    pub fn serves(&self, host: &Host<&str>) -> bool {
        let name = match host {
            Host::Ipv4(ip) => return self.serves_address(IpAddr::V4(*ip)),
            Host::Ipv6(ip) => return self.serves_address(ip.to_canonical()),
            Host::Domain(name) => name.strip_suffix('.').unwrap_or(name),
        };
        let is = |own: &str| name.eq_ignore_ascii_case(own);
        let is_under = |own: &str| {
            let split = name.len().checked_sub(own.len()).and_then(|at| name.split_at_checked(at));
            split.is_some_and(|(front, end)| front.len() > 1 && front.ends_with('.') && end.eq_ignore_ascii_case(own))
        };
        let is_excepted = self.except.iter().any(|exception| match exception {
            Exception::Network(_) => false,
            Exception::Name(own) => is(own),
            Exception::Under(own) => is_under(own),
        });
        !is_excepted && !is("localhost") && !is_under("localhost")
    }

    fn serves_address(&self, address: IpAddr) -> bool {
        let holds = |exception: &Exception| matches!(exception, Exception::Network(net) if net.contains(&address));
        !address.is_loopback() && !self.except.iter().any(holds)
    }
}

impl Exception {
    /// Reads an address, a network, a name, or `*.NAME`; `None`: it is none of these.
    pub fn parse(text: &str) -> Option<Exception> {
        if let Ok(net) = text.parse::<IpNet>() {
            return Some(Exception::Network(net.trunc()));
        }
        if let Ok(ip) = text.parse::<IpAddr>() {
            return Some(Exception::Network(ip.into()));
        }
        let (name, under) = text.strip_prefix("*.").map_or((text, false), |name| (name, true));
        // As a URL would spell it, so that both are the same.
        let Ok(Host::Domain(name)) = Host::parse(name.strip_suffix('.').unwrap_or(name)) else { return None };
        if name.contains('*') {
            return None;
        }
        Some(if under { Exception::Under(name) } else { Exception::Name(name) })
    }
}

impl std::fmt::Display for Exception {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Exception::Network(net) => net.fmt(f),
            Exception::Name(name) => f.write_str(name),
            Exception::Under(name) => write!(f, "*.{name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_says_where_and_who() {
        let proxy = Proxy::parse("http://Proxy.Example.com:3128").expect("a proxy");
        assert_eq!((proxy.host, proxy.port, proxy.login), (Host::Domain("proxy.example.com".into()), 3128, None));
        assert_eq!(Proxy::parse("http://10.0.0.1/").expect("a proxy").port, 80);
        let proxy = Proxy::parse("http://ada:p%40ss%3Aw@[2001:db8::1]:8080").expect("a proxy");
        let login = proxy.login.clone().expect("a login");
        assert_eq!(login.authorization().expose_secret(), b"Basic YWRhOnBAc3M6dw==");
        assert_eq!(proxy.masked(), "http://ada:***@[2001:db8::1]:8080");
        assert!(!format!("{proxy:?}").contains("YWRh"), "the login is not printed");
        assert_eq!(Proxy::parse(&proxy.masked()).expect("what is shown is a URL").host, proxy.host);
    }

    #[test]
    fn what_is_no_such_url_is_refused() {
        use ProxyUrlError as E;
        for (text, error) in [
            ("", E::NotUrl),
            ("proxy.example.com:3128", E::Scheme),
            ("proxy", E::NotUrl),
            ("http://", E::NotUrl),
            ("https://proxy", E::Scheme),
            ("socks5://proxy", E::Scheme),
            ("http://proxy/x", E::More),
            ("http://proxy?x", E::More),
            ("http://proxy#x", E::More),
            ("http://ada@proxy", E::HalfLogin),
            ("http://:secret@proxy", E::HalfLogin),
            ("http://a%3Ab:secret@proxy", E::Login),
            ("http://a:%zz@proxy", E::Login),
            ("http://a:x%0d%0ay@proxy", E::Login),
        ] {
            assert_eq!(Proxy::parse(text), Err(error), "{text}");
        }
    }

    #[test]
    fn exceptions_and_this_machine_are_asked_directly() {
        let except =
            ["10.0.0.0/8", "2001:db8::/32", "192.0.2.7", "api.corp.example", "*.Intern.example", "*.bücher.example"];
        let except: Vec<Exception> =
            except.iter().map(|text| Exception::parse(text).unwrap_or_else(|| panic!("{text}"))).collect();
        let shown: Vec<String> = except.iter().map(ToString::to_string).collect();
        assert_eq!(shown[3..], ["api.corp.example", "*.intern.example", "*.xn--bcher-kva.example"]);
        assert!(shown.iter().zip(&except).all(|(text, exception)| Exception::parse(text).as_ref() == Some(exception)));
        let proxy = Proxy { except, ..Proxy::parse("http://proxy:1").expect("a proxy") };
        for (url, served) in [
            ("https://api.example.com", true),
            ("https://api.corp.example", false),
            ("https://API.corp.example.", false),
            ("https://x.api.corp.example", true),
            ("https://intern.example", true),
            ("https://a.intern.example", false),
            ("https://a.b.intern.example", false),
            ("https://xintern.example", true),
            ("https://.intern.example", true),
            ("https://www.bücher.example", false),
            ("https://10.1.2.3", false),
            ("https://11.1.2.3", true),
            ("https://[::ffff:10.1.2.3]", false),
            ("https://[2001:db8::9]", false),
            ("https://192.0.2.7", false),
            ("https://192.0.2.8", true),
            ("http://127.0.0.1", false),
            ("http://[::1]", false),
            ("http://localhost", false),
            ("http://LOCALHOST.", false),
            ("http://a.localhost", false),
            ("http://notlocalhost", true),
        ] {
            let Ok(url) = Url::parse(url) else { continue };
            assert_eq!(proxy.serves(&url.host().expect("a host")), served, "{url}");
        }
        for text in ["", "*", "*.", "a b", "a*.example", "http://x", "x:80", "10.0.0.0/33", "*.10.0.0.1"] {
            assert_eq!(Exception::parse(text), None, "{text:?}");
        }
    }
}
