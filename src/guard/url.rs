//! A URL as a stranger wrote it -> the URL as the client sends it, where the two cannot be taken for different ones.
//!
//! Source: the WHATWG URL standard through `url`, the parser that the client itself uses; RFC 3986 where it is stricter.
//! Memory: the parsed URL. Errors: [`UrlFault`]; no part of the URL is ever in one.
//! Not here: which hosts and ports are allowed (`policy`).
//!
//! URL parsers disagree about what is malformed: who a `\`, a second `@`, a tab or a missing slash leads to is another for each.
//! Nothing that would be read so stands in a URL that leaves this file, so that proxies, logs and upstreams see the host that
//! was judged.

use url::{Host, Url};

use super::name;
use crate::limits::DIRECT_URL_BYTES_MAX;

/// Why a URL is none for us, whatever it leads to.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum UrlFault {
    /// Over the bound.
    #[error("the URL is over {DIRECT_URL_BYTES_MAX} bytes")]
    TooLong,
    /// White space, a control or format character, or a backslash.
    #[error("the URL holds white space, a control character, an invisible one or a backslash")]
    Character,
    /// `%` that begins no percent-encoded byte.
    #[error("the URL holds a `%` without two hexadecimal digits after it")]
    Percent,
    /// A control character, percent-encoded where nobody has use for one.
    #[error("the URL holds a percent-encoded control character")]
    EncodedControl,
    /// Not `http` or `https`, or not with `//` and a host behind.
    #[error("the URL does not begin with http:// or https:// and a host")]
    Scheme,
    /// User or password, or what could be taken for them.
    #[error("the URL has a user or password, or an `@` that could be taken for their end")]
    User,
    /// A percent-encoded host.
    #[error("the URL's host is percent-encoded")]
    EncodedHost,
    /// Refused by the URL parser.
    #[error("the URL is not one: {0}")]
    Parse(url::ParseError),
    /// Port 0.
    #[error("nothing listens on port 0")]
    PortZero,
    /// What the parser prints it reads differently.
    #[error("the URL is not read the same twice")]
    Ambiguous,
}

/// Reads `text`. What comes back has no user, no fragment and no dot at the end of its host, and is read by the parser as it
/// is printed.
///
/// # Errors
/// [`UrlFault`].
pub(super) fn read(text: &str) -> Result<Url, UrlFault> {
    check_text(text)?;
    let (scheme, rest) = text.split_once("://").ok_or(UrlFault::Scheme)?;
    let is_http = ["http", "https"].iter().any(|known| scheme.eq_ignore_ascii_case(known));
    // The parser would read over any number of slashes here, and over none.
    if !is_http || rest.is_empty() || rest.starts_with(['/', '?', '#', ':']) {
        return Err(UrlFault::Scheme);
    }
    // Other parsers let a `?` or `#` stand before the `@` that ends the user.
    let until_path = rest.split('/').next().unwrap_or(rest);
    if until_path.contains('@') {
        return Err(UrlFault::User);
    }
    let authority = rest.split(['/', '?', '#']).next().unwrap_or(rest);
    if authority.contains('%') {
        return Err(UrlFault::EncodedHost);
    }
    tidied(Url::parse(text).map_err(UrlFault::Parse)?)
}

/// Reads a `Location`, which may be relative to `base` (RFC 9110 section 10.2.2).
///
/// # Errors
/// [`UrlFault`].
pub(super) fn follow(base: &Url, location: &str) -> Result<Url, UrlFault> {
    check_text(location)?;
    // With a scheme it is read by the rules for a whole URL, and `http:x` is not taken for something relative.
    let before_path = location.split(['/', '?', '#']).next().unwrap_or(location);
    if before_path.contains(':') {
        return read(location);
    }
    // `//host/path`: as with the scheme before it.
    if location.starts_with("//") {
        return read(&format!("{}:{location}", base.scheme()));
    }
    tidied(base.join(location).map_err(UrlFault::Parse)?)
}

fn check_text(text: &str) -> Result<(), UrlFault> {
    if text.len() > DIRECT_URL_BYTES_MAX {
        return Err(UrlFault::TooLong);
    }
    if text.chars().any(|c| c.is_control() || c.is_whitespace() || c == '\\' || is_invisible(c)) {
        return Err(UrlFault::Character);
    }
    let mut in_query = false;
    let mut bytes = text.bytes();
    while let Some(b) = bytes.next() {
        in_query |= b == b'?';
        if b != b'%' {
            continue;
        }
        let digit = |b: Option<u8>| b.and_then(|b| char::from(b).to_digit(16));
        let (Some(high), Some(low)) = (digit(bytes.next()), digit(bytes.next())) else { return Err(UrlFault::Percent) };
        match (high * 16 + low, in_query) {
            // A query may be a text of several lines.
            (0x09 | 0x0a, true) => {}
            (0..=0x1f | 0x7f, _) => return Err(UrlFault::EncodedControl),
            _ => {}
        }
    }
    Ok(())
}

/// Characters that are not seen, or change the order of those that are. IDNA drops most of them from a host.
fn is_invisible(c: char) -> bool {
    matches!(
        c,
        '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}' | '\u{180b}'..='\u{180f}'
            | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{3164}'
            | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}' | '\u{fff0}'..='\u{fffd}' | '\u{e0000}'..='\u{e0fff}'
    )
}

fn tidied(mut url: Url) -> Result<Url, UrlFault> {
    if !matches!(url.scheme(), "http" | "https") || url.host().is_none() {
        return Err(UrlFault::Scheme);
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(UrlFault::User);
    }
    if url.port() == Some(0) {
        return Err(UrlFault::PortZero);
    }
    // Never sent (RFC 9110 section 4.2.5).
    url.set_fragment(None);
    if let Some(Host::Domain(domain)) = url.host()
        && let Some(bare) = domain.strip_suffix('.')
    {
        let bare = bare.to_owned();
        name::check_shape(&bare).map_err(|_| UrlFault::Ambiguous)?;
        url.set_host(Some(&bare)).map_err(UrlFault::Parse)?;
    }
    // RFC 3986 section 6: what is normal stays as it is.
    match Url::parse(url.as_str()) {
        Ok(again) if again == url && url.as_str().len() <= 3 * DIRECT_URL_BYTES_MAX => Ok(url),
        _ => Err(UrlFault::Ambiguous),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(text: &str) -> Result<String, UrlFault> {
        read(text).map(|url| url.as_str().to_owned())
    }

    #[test]
    fn what_is_sent_is_the_normal_form() {
        for (text, normal) in [
            ("HTTP://API.Example.com", "http://api.example.com/"),
            ("https://api.example.com:443/a/../b/./c?d=e#f", "https://api.example.com/b/c?d=e"),
            ("https://api.example.com.:8443/", "https://api.example.com:8443/"),
            ("https://example.com?q=a%0Ab", "https://example.com/?q=a%0Ab"),
            ("https://bücher.example/ä?ö", "https://xn--bcher-kva.example/%C3%A4?%C3%B6"),
            ("http://0x7f.1/", "http://127.0.0.1/"),
            ("http://①②⑦.0.0.1/", "http://127.0.0.1/"),
            ("https://example.com/@user?mail=a@b.c", "https://example.com/@user?mail=a@b.c"),
        ] {
            assert_eq!(printed(text).as_deref(), Ok(normal), "{text}");
        }
    }

    #[test]
    fn each_fault_is_told() {
        let long = |bytes: usize| format!("http://a.bc/{}", "d".repeat(bytes - 12));
        assert!(printed(&long(DIRECT_URL_BYTES_MAX)).is_ok());
        let over = long(DIRECT_URL_BYTES_MAX + 1);
        for (text, fault) in [
            (over.as_str(), UrlFault::TooLong),
            ("http://a.bc/ d", UrlFault::Character),
            (" http://a.bc/", UrlFault::Character),
            ("http://a\t.bc/", UrlFault::Character),
            ("http://a.bc/\\d", UrlFault::Character),
            ("http://a\u{ad}.bc/", UrlFault::Character),
            ("http://a.bc/%", UrlFault::Percent),
            ("http://a.bc/%4", UrlFault::Percent),
            ("http://a.bc/%zz", UrlFault::Percent),
            ("http://a.bc/%0d%0aHost:x", UrlFault::EncodedControl),
            ("http://a.bc/?%00", UrlFault::EncodedControl),
            ("ftp://a.bc/", UrlFault::Scheme),
            ("http:a.bc", UrlFault::Scheme),
            ("http:/a.bc", UrlFault::Scheme),
            ("http:///a.bc", UrlFault::Scheme),
            ("//a.bc/", UrlFault::Scheme),
            ("a.bc", UrlFault::Scheme),
            ("", UrlFault::Scheme),
            ("http://", UrlFault::Scheme),
            ("http://?a", UrlFault::Scheme),
            ("http://u@a.bc/", UrlFault::User),
            ("http://@a.bc/", UrlFault::User),
            ("http://a.bc#@d.ef/", UrlFault::User),
            ("http://a%2ebc/", UrlFault::EncodedHost),
            ("http://[fe80::1%25lo]/", UrlFault::EncodedHost),
            ("http://[::1/", UrlFault::Parse(url::ParseError::InvalidIpv6Address)),
            ("http://1.2.3.4.5/", UrlFault::Parse(url::ParseError::InvalidIpv4Address)),
            ("http://a.bc:65536/", UrlFault::Parse(url::ParseError::InvalidPort)),
            ("http://a.bc:0/", UrlFault::PortZero),
            ("http://a..b../", UrlFault::Ambiguous),
        ] {
            assert_eq!(printed(text), Err(fault), "{text}");
        }
    }

    #[test]
    fn locations_are_relative_to_where_they_came_from() {
        let base = read("https://a.bc:8443/d/e?f").expect("a URL");
        let to = |location: &str| follow(&base, location).map(|url| url.as_str().to_owned());
        for (location, url) in [
            ("/x", "https://a.bc:8443/x"),
            ("x", "https://a.bc:8443/d/x"),
            ("../x#frag", "https://a.bc:8443/x"),
            ("?x", "https://a.bc:8443/d/e?x"),
            ("//x.yz/", "https://x.yz/"),
            ("HTTPS://x.yz", "https://x.yz/"),
        ] {
            assert_eq!(to(location).as_deref(), Ok(url), "{location}");
        }
        for (location, fault) in [
            ("https:x", UrlFault::Scheme),
            ("javascript:1", UrlFault::Scheme),
            ("/\\x.yz/", UrlFault::Character),
            ("//u@x.yz/", UrlFault::User),
            ("///x.yz/", UrlFault::Scheme),
            ("\thttp://x.yz", UrlFault::Character),
        ] {
            assert_eq!(to(location), Err(fault), "{location}");
        }
    }
}
