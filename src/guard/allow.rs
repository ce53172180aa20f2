//! `direct.allow`: patterns of what the operator lets callers reach, matched on a parsed URL.
//!
//! Source: protocol version 1, section 1; `restcast.example.toml`. Memory: a pattern's text, in pieces.
//! Errors: [`PatternError`], the operator's fault. Not here: what is allowed besides (`policy`).

use std::fmt;
use std::net::IpAddr;

use url::{Host, Url};

use super::name;
use crate::limits::ALLOW_PATTERN_BYTES_MAX;

/// Why a pattern is none.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum PatternError {
    /// Over the bound.
    #[error("is over {ALLOW_PATTERN_BYTES_MAX} bytes")]
    TooLong,
    /// Without scheme and host.
    #[error("must begin with http:// or https:// and a host, as in \"https://api.example.com/*\"")]
    Scheme,
    /// What is never matched.
    #[error("has a user, a query or a fragment, which are not matched: leave them out")]
    NotMatched,
    /// A host that is none.
    #[error("has no host that could be: write a name, an address, or `*.` and the domain that all names are below")]
    Host,
    /// A port that is none.
    #[error("has no port that could be: write a number from 1 to 65535, or `*` for any")]
    Port,
    /// A path that no URL has.
    #[error("has a path that no URL has once it is normalised: percent-encode it, and leave out `.` and `..`")]
    Path,
}

/// One pattern.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Pattern {
    https: bool,
    host: HostPattern,
    /// `None`: any.
    port: Option<u16>,
    path: Glob,
    /// The same for paths as [`decoded_path`] gives them.
    decoded: Glob,
}

#[derive(Clone, Debug, Eq, PartialEq)]
enum HostPattern {
    Exact(Host<String>),
    /// Every name below this one, which is in lower case.
    Below(String),
}

/// A text with `*` for any run of characters, an empty one too: the pieces between the stars.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Glob(Vec<String>);

/// What a pattern says of the URLs it matches.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Listed {
    /// This very host.
    Host,
    /// A domain that it is below.
    Domain,
}

impl Pattern {
    /// Reads `scheme://host[:port][/path]`: `*.` before a host means every name below it, `*` as port any, and in a path any
    /// run of characters. Without a path every path is meant.
    ///
    /// # Errors
    /// [`PatternError`].
    pub fn parse(text: &str) -> Result<Pattern, PatternError> {
        if text.len() > ALLOW_PATTERN_BYTES_MAX {
            return Err(PatternError::TooLong);
        }
        let (scheme, rest) = text.split_once("://").ok_or(PatternError::Scheme)?;
        let https = match scheme {
            "http" => false,
            "https" => true,
            _ => return Err(PatternError::Scheme),
        };
        let (authority, path) = match rest.find('/') {
            Some(at) => rest.split_at(at),
            None => (rest, "/*"),
        };
        if authority.contains('@') || rest.contains(['?', '#']) {
            return Err(PatternError::NotMatched);
        }
        let (host, port) = split_port(authority)?;
        let port = match port {
            None => Some(if https { 443 } else { 80 }),
            Some("*") => None,
            Some(digits) => Some(parse_port(digits)?),
        };
        let path = normal_path(path)?;
        let (decoded, path) = (Glob::of(&decoded_path(&path)), Glob::of(&path));
        Ok(Pattern { https, host: HostPattern::parse(host)?, port, path, decoded })
    }

    /// Whether `url`, which is normal, is meant, and how exactly.
    pub(super) fn matches(&self, url: &Url) -> Option<Listed> {
        let listed = match (&self.host, url.host()?) {
            (HostPattern::Exact(Host::Domain(own)), Host::Domain(host)) => (own == host).then_some(Listed::Host),
            (HostPattern::Exact(Host::Ipv4(own)), Host::Ipv4(host)) => (*own == host).then_some(Listed::Host),
            (HostPattern::Exact(Host::Ipv6(own)), Host::Ipv6(host)) => (*own == host).then_some(Listed::Host),
            (HostPattern::Below(domain), Host::Domain(host)) => {
                (host != domain && name::is_under(host, domain)).then_some(Listed::Domain)
            }
            _ => None,
        }?;
        let fits = (url.scheme() == "https") == self.https
            && self.port.is_none_or(|port| url.port_or_known_default() == Some(port))
            && self.path.matches(url.path())
            // What a server that decodes once more than it should would make of it.
            && self.decoded.matches(&decoded_path(url.path()));
        fits.then_some(listed)
    }

    /// The address that it lists, where it lists one.
    pub fn address(&self) -> Option<IpAddr> {
        match &self.host {
            HostPattern::Exact(Host::Ipv4(ip)) => Some(IpAddr::V4(*ip)),
            HostPattern::Exact(Host::Ipv6(ip)) => Some(IpAddr::V6(*ip)),
            _ => None,
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.https { "https" } else { "http" };
        match &self.host {
            HostPattern::Exact(host) => write!(f, "{scheme}://{host}")?,
            HostPattern::Below(domain) => write!(f, "{scheme}://*.{domain}")?,
        }
        match self.port {
            Some(443) if self.https => {}
            Some(80) if !self.https => {}
            Some(port) => write!(f, ":{port}")?,
            None => f.write_str(":*")?,
        }
        f.write_str(&self.path.0.join("*"))
    }
}

fn split_port(authority: &str) -> Result<(&str, Option<&str>), PatternError> {
    // An address of IPv6 has colons of its own, within brackets.
    let after = authority.rfind(']').map_or(0, |at| at + 1);
    match authority.get(after..).and_then(|rest| rest.find(':')) {
        None => Ok((authority, None)),
        Some(at) => {
            let (host, port) = authority.split_at(after + at);
            Ok((host, Some(port.strip_prefix(':').ok_or(PatternError::Port)?)))
        }
    }
}

fn parse_port(digits: &str) -> Result<u16, PatternError> {
    let port = digits.parse::<u16>().ok().filter(|port| *port > 0 && digits.bytes().all(|b| b.is_ascii_digit()));
    port.ok_or(PatternError::Port)
}

impl HostPattern {
    fn parse(text: &str) -> Result<HostPattern, PatternError> {
        let (below, text) = match text.strip_prefix("*.") {
            Some(domain) => (true, domain),
            None => (false, text),
        };
        if text.contains(['*', '%', '\\']) || text.chars().any(char::is_whitespace) {
            return Err(PatternError::Host);
        }
        // As the URL parser reads a host, so that it is compared with what that prints.
        let url = Url::parse(&format!("http://{text}/")).map_err(|_| PatternError::Host)?;
        if url.port().is_some() || url.path() != "/" || !url.username().is_empty() {
            return Err(PatternError::Host);
        }
        let host = match url.host().ok_or(PatternError::Host)? {
            Host::Domain(domain) => {
                let domain = domain.strip_suffix('.').unwrap_or(domain);
                name::check_shape(domain).map_err(|_| PatternError::Host)?;
                Host::Domain(domain.to_owned())
            }
            Host::Ipv4(ip) => Host::Ipv4(ip),
            Host::Ipv6(ip) => Host::Ipv6(ip),
        };
        match (below, host) {
            (false, host) => Ok(HostPattern::Exact(host)),
            (true, Host::Domain(domain)) => Ok(HostPattern::Below(domain)),
            (true, _) => Err(PatternError::Host),
        }
    }
}

/// `path` as the URL parser prints it, its stars as they are.
fn normal_path(path: &str) -> Result<String, PatternError> {
    let mut url = Url::parse("http://x/").map_err(|_| PatternError::Path)?;
    url.set_path(path);
    let dots = path.split('/').any(|segment| matches!(segment, "." | ".."));
    if dots || path.contains('\\') || path.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err(PatternError::Path);
    }
    Ok(url.path().to_owned())
}

impl Glob {
    fn of(text: &str) -> Glob {
        Glob(text.split('*').map(str::to_owned).collect())
    }

    fn matches(&self, text: &str) -> bool {
        let [first, middle @ .., last] = self.0.as_slice() else {
            return self.0.first().is_some_and(|only| only == text);
        };
        let Some(mut rest) = text.strip_prefix(first.as_str()) else { return false };
        // The leftmost place for each leaves the most room for the next.
        for piece in middle {
            match rest.find(piece.as_str()) {
                Some(at) => rest = rest.get(at + piece.len()..).unwrap_or_default(),
                None => return false,
            }
        }
        rest.ends_with(last.as_str())
    }
}

/// Rounds of percent-decoding that a careless chain of servers is given credit for.
const DECODINGS: usize = 3;

/// `path` as the most careless server would read it: percent-encoded dots, slashes, backslashes and stars decoded, however often,
/// `;parameters` of segments dropped, empty and dot segments resolved. A path that climbs out of what is listed only so is
/// not what the operator has listed.
fn decoded_path(path: &str) -> String {
    let mut text = path.to_owned();
    for _ in 0..DECODINGS {
        let next = decoded_once(&text);
        if next == text {
            break;
        }
        text = next;
    }
    let mut segments: Vec<&str> = Vec::new();
    let mut parts = text.split(['/', '\\']).skip(1).peekable();
    while let Some(part) = parts.next() {
        let bare = part.split(';').next().unwrap_or(part);
        match bare {
            ".." => drop(segments.pop()),
            "." | "" if parts.peek().is_some() => {}
            "." => segments.push(""),
            _ if bare.len() < part.len() && bare.is_empty() => {}
            _ => segments.push(part),
        }
        if bare == ".." && parts.peek().is_none() {
            segments.push("");
        }
    }
    format!("/{}", segments.join("/"))
}

fn decoded_once(text: &str) -> String {
    let mut decoded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('%') {
        let (before, from) = rest.split_at(at);
        decoded.push_str(before);
        let escape = from.get(..3).unwrap_or(from);
        let c = match escape.to_ascii_lowercase().as_str() {
            "%2e" => Some('.'),
            "%2f" => Some('/'),
            "%5c" => Some('\\'),
            "%25" => Some('%'),
            "%3b" => Some(';'),
            _ => None,
        };
        match c {
            Some(c) => decoded.push(c),
            None => decoded.push_str(escape),
        }
        rest = from.get(escape.len()..).unwrap_or_default();
    }
    decoded.push_str(rest);
    decoded
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, url: &str) -> bool {
        let pattern = Pattern::parse(pattern).unwrap_or_else(|error| panic!("{pattern}: {error}"));
        pattern.matches(&url.parse().expect("a URL")).is_some()
    }

    #[test]
    fn scheme_host_port_and_path_must_fit() {
        let all = "https://api.example.com/*";
        for url in ["https://api.example.com/", "https://API.example.com:443/a/b?c", "https://api.example.com/a%2Fb"] {
            assert!(matches(all, url), "{url}");
        }
        for url in [
            "http://api.example.com/",
            "https://api.example.com:8443/",
            "https://example.com/",
            "https://a.api.example.com/",
            "https://api.example.com.evil.com/",
            "https://evil.com/https://api.example.com/",
        ] {
            assert!(!matches(all, url), "{url}");
        }
        assert!(matches("https://api.example.com", "https://api.example.com/any/path"), "no path: every path");
        assert!(matches("http://a.bc:*/", "http://a.bc:99/") && !matches("http://a.bc:*/", "http://a.bc:99/d"));
        assert!(matches("http://10.0.0.5:8080/*", "http://10.0.0.5:8080/x"));
        assert!(!matches("http://10.0.0.5:8080/*", "http://10.0.0.5/x"));
        assert!(matches("http://[::1]:81/*", "http://[0:0::1]:81/"));
        assert!(matches("https://bücher.example/*", "https://xn--bcher-kva.example/"));
    }

    #[test]
    fn names_below_a_domain_end_with_it() {
        let below = "https://*.example.com/*";
        assert!(matches(below, "https://a.example.com/") && matches(below, "https://a.b.example.com/"));
        assert!(!matches(below, "https://example.com/") && !matches(below, "https://aexample.com/"));
        assert!(!matches(below, "https://example.com.evil.com/"));
    }

    #[test]
    fn a_path_cannot_climb_out_of_what_is_listed() {
        let listed = "https://a.bc/public/*";
        for path in
            ["/public/", "/public/x", "/public/x/../y", "/public/a%2Fb", "/public//x", "/public/a;b=c/d", "/public/..."]
        {
            assert!(matches(listed, &format!("https://a.bc{path}")), "{path}");
        }
        for path in [
            "/",
            "/public",
            "/publicity/x",
            "/Public/x",
            "/public/../x",
            "/public/%2e%2e/x",
            "/public/..%2fx",
            "/public/%2e%2e%2fx",
            "/public/..%5cx",
            "/public/..%252fx",
            "/public/%252e%252e/x",
            "/public/..;/x",
            "/public/..;a=b/x",
            "/public/x/..%2f..%2fy",
            "/public/x%2f..%2f..%2f..%2fy",
            "/x/public/y",
            "/public/..%3b/x",
            "/public/..%2f",
        ] {
            assert!(!matches(listed, &format!("https://a.bc{path}")), "{path}");
        }
        assert!(matches("https://a.bc/p/a%2Fb/*", "https://a.bc/p/a%2Fb/c"), "as the operator has written it");
        assert!(!matches("https://a.bc/p/a%2Fb/*", "https://a.bc/p/a/b/c"));
        assert!(matches("https://a.bc/v*/leads", "https://a.bc/v1/x/leads"));
        assert!(!matches("https://a.bc/v*/leads", "https://a.bc/v1/leads/x"));
        assert!(matches("https://a.bc/*/b/*/c", "https://a.bc/x/b/b/y/c"));
        assert!(!matches("https://a.bc/ab*ba", "https://a.bc/aba"), "pieces do not overlap");
    }

    #[test]
    fn a_pattern_that_matches_nothing_is_an_error() {
        let long = format!("https://a.bc/{}", "d".repeat(ALLOW_PATTERN_BYTES_MAX));
        for (text, error) in [
            (long.as_str(), PatternError::TooLong),
            ("api.example.com", PatternError::Scheme),
            ("ftp://a.bc/", PatternError::Scheme),
            ("*://a.bc/", PatternError::Scheme),
            ("https://a.bc/?d", PatternError::NotMatched),
            ("https://a.bc/#d", PatternError::NotMatched),
            ("https://u@a.bc/", PatternError::NotMatched),
            ("https:///a", PatternError::Host),
            ("https://*/", PatternError::Host),
            ("https://a.*.bc/", PatternError::Host),
            ("https://*.10.0.0.1/", PatternError::Host),
            ("https://[::1/", PatternError::Port),
            ("https://a b/", PatternError::Host),
            ("https://a%2ebc/", PatternError::Host),
            ("https://a.bc:0/", PatternError::Port),
            ("https://a.bc:/", PatternError::Port),
            ("https://a.bc:+1/", PatternError::Port),
            ("https://a.bc:65536/", PatternError::Port),
            ("https://a.bc/a/../b", PatternError::Path),
            ("https://a.bc/a b", PatternError::Path),
            ("https://a.bc/\\b", PatternError::Path),
        ] {
            assert_eq!(Pattern::parse(text), Err(error), "{text}");
        }
    }

    #[test]
    fn a_pattern_is_printed_as_it_is_meant() {
        for text in ["https://api.example.com/*", "http://10.0.0.5:8080/v*/x", "https://*.a.bc:*/", "http://[::1]/*"] {
            let pattern = Pattern::parse(text).expect("a pattern");
            assert_eq!(pattern.to_string(), text);
            assert_eq!(Pattern::parse(&pattern.to_string()), Ok(pattern));
        }
        assert_eq!(Pattern::parse("https://A.bc:443").expect("a pattern").to_string(), "https://a.bc/*");
        assert_eq!(Pattern::parse("http://10.0.0.5/").expect("a pattern").address(), Some([10, 0, 0, 5].into()));
    }
}
