//! The URLs to load: scheme, address and path.
//!
//! Source: RFC 3986 as far as `ws`, `wss`, `http` and `https` need it. Errors: [`TargetError`], the fault of who typed it.

use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};

use crate::template::Template;

/// How events come.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Over {
    /// `ws` and `wss`.
    WebSocket,
    /// `http` and `https`.
    Sse,
}

/// One URL, understood.
#[derive(Clone, Debug)]
pub struct Target {
    /// How its events come.
    pub over: Over,
    /// Whether TLS is spoken.
    pub tls: bool,
    /// As the `Host` header has it.
    pub authority: String,
    /// Without brackets, for the TLS server name.
    pub host: String,
    /// The first address that the host resolves to.
    pub address: SocketAddr,
    /// Path and query, at least `/`.
    pub path: Template,
    /// Whether the path template has a query already.
    pub has_query: bool,
}

/// Why a URL is none.
#[derive(Debug)]
pub enum TargetError {
    /// Neither of the four schemes.
    Scheme(String),
    /// No host, or a port that is none.
    Authority(String),
    /// The name has no address.
    Unresolved(String),
}

impl fmt::Display for TargetError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TargetError::Scheme(url) => write!(out, "{url}: a URL starts with ws://, wss://, http:// or https://"),
            TargetError::Authority(url) => write!(out, "{url}: host and port cannot be read"),
            TargetError::Unresolved(url) => write!(out, "{url}: the host has no address"),
        }
    }
}

impl Target {
    /// Reads `url` and looks its host up.
    ///
    /// # Errors
    /// Where it is no URL of a WebSocket or HTTP resource, or its host is unknown.
    pub fn parse(url: &str) -> Result<Target, TargetError> {
        let (scheme, rest) = url.split_once("://").ok_or_else(|| TargetError::Scheme(url.into()))?;
        let (over, tls) = match scheme {
            "ws" => (Over::WebSocket, false),
            "wss" => (Over::WebSocket, true),
            "http" => (Over::Sse, false),
            "https" => (Over::Sse, true),
            _ => return Err(TargetError::Scheme(url.into())),
        };
        let rest = rest.split('#').next().unwrap_or_default();
        let path_at = rest.find(['/', '?']).unwrap_or(rest.len());
        let (authority, path) = rest.split_at(path_at);
        let bad = || TargetError::Authority(url.into());
        let (host, port) = match authority.strip_prefix('[') {
            Some(v6) => {
                let (host, after) = v6.split_once(']').ok_or_else(bad)?;
                (host, after.strip_prefix(':'))
            }
            None => match authority.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (authority, None),
            },
        };
        if host.is_empty() || authority.contains('@') || path.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err(bad());
        }
        let port = match port {
            Some(port) => port.parse().map_err(|_| bad())?,
            None => 80 + if tls { 363 } else { 0 },
        };
        let address = (host, port).to_socket_addrs().ok().and_then(|mut found| found.next());
        let address = address.ok_or_else(|| TargetError::Unresolved(url.into()))?;
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
        Ok(Target {
            over,
            tls,
            authority: authority.to_owned(),
            host: host.to_owned(),
            address,
            has_query: path.contains('?'),
            path: Template::new(&path),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::template::Values;

    #[test]
    fn urls_are_read() {
        let target = Target::parse("wss://127.0.0.1:8443/v1/streams/s{n%4}?format=full").expect("a URL");
        assert!(target.tls && target.over == Over::WebSocket && target.has_query);
        assert_eq!(target.authority, "127.0.0.1:8443");
        assert_eq!(target.path.fill(Values { number: 6, ..Values::default() }), "/v1/streams/s2?format=full");
        let target = Target::parse("http://[::1]:80").expect("a URL");
        assert_eq!((target.host.as_str(), target.address.port()), ("::1", 80));
        assert_eq!(target.path.fill(Values::default()), "/");
        assert_eq!(Target::parse("https://127.0.0.1/x").expect("a URL").address.port(), 443);
    }

    #[test]
    fn what_is_no_url_is_refused() {
        for url in ["127.0.0.1:80", "ftp://h/", "ws://", "ws://:80/", "ws://h:x/", "ws://a@h/", "ws://127.0.0.1/a b"] {
            assert!(Target::parse(url).is_err(), "{url}");
        }
    }
}
