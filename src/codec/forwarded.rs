//! Who the client is, as trusted proxies tell it: `Forwarded`, `X-Forwarded-*`, and the PROXY protocol.
//!
//! Source: RFC 7239; the PROXY protocol, version 2 (haproxy's proxy-protocol.txt).
//! Memory: at most `FORWARDED_HOPS_MAX` places in the head; the PROXY header is read in place, at most `PROXY_V2_BYTES_MAX` of it.
//! Errors: none for fields, which are believed or not; [`ProxyError`] ends the connection.
//! Not here: who is trusted (`server.trusted_proxies`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;

use crate::codec::http::{Head, elements, is_authority, is_token};
use crate::limits::{FORWARDED_HOPS_MAX, PROXY_V2_BYTES_MAX};

/// The client of a request as the nearest trusted proxies saw it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Client {
    /// Its address; an IPv4 address mapped into IPv6 is the IPv4 address.
    pub addr: IpAddr,
    /// The scheme it used, `http` or `https`, where a trusted proxy says so.
    pub proto: Option<&'static str>,
    /// The host it asked for, where a trusted proxy says so: `host[:port]`, its grammar checked.
    pub host: Option<String>,
}

/// One hop, as the proxy at its near end describes it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct Hop {
    /// The far end; `None` where it is unknown, obfuscated or malformed.
    addr: Option<IpAddr>,
    proto: Option<&'static str>,
    host: Option<String>,
}

/// The client of a request that came from `peer`. A peer that is not `trusted` is the client itself, whatever it claims.
/// Otherwise the hops are followed from the nearest while their far ends are trusted.
///
/// Where `Forwarded` and `X-Forwarded-For` stand together and name different clients, one of them was made by the client
/// and passed on by a proxy that writes only the other; neither is believed, and the client is the peer.
pub fn client(peer: IpAddr, trusted: &[IpNet], head: &Head<'_>) -> Client {
    let peer = peer.to_canonical();
    let unknown = Client { addr: peer, proto: None, host: None };
    if !is_trusted(peer, trusted) {
        return unknown;
    }
    let standard = forwarded_hops(head);
    let legacy = legacy_hops(head);
    match (standard, legacy) {
        (Some(standard), Some(legacy)) => {
            let (standard, legacy) = (follow(peer, trusted, &standard), follow(peer, trusted, &legacy));
            if standard.addr != legacy.addr {
                return unknown;
            }
            Client { addr: standard.addr, proto: standard.proto.or(legacy.proto), host: standard.host.or(legacy.host) }
        }
        (Some(hops), None) | (None, Some(hops)) => follow(peer, trusted, &hops),
        (None, None) => {
            // A proxy that tells the address by other means (PROXY v2) may still tell scheme and host.
            let [proto, host] = ["x-forwarded-proto", "x-forwarded-host"].map(|name| last_element(head, name));
            Client { addr: peer, proto: proto.and_then(scheme), host: host.and_then(host_name) }
        }
    }
}

fn is_trusted(addr: IpAddr, trusted: &[IpNet]) -> bool {
    trusted.iter().any(|net| net.contains(&addr))
}

/// Walks the hops, nearest first. A hop is believed because the proxy at its near end is trusted.
fn follow(peer: IpAddr, trusted: &[IpNet], hops: &[Hop]) -> Client {
    let mut client = Client { addr: peer, proto: None, host: None };
    for hop in hops {
        client.proto = hop.proto.or(client.proto);
        client.host = hop.host.clone().or(client.host);
        match hop.addr {
            Some(addr) => client.addr = addr,
            None => break,
        }
        if !is_trusted(client.addr, trusted) {
            break;
        }
    }
    client
}

/// The hops of `Forwarded`, nearest first, up to one that is malformed: what stands behind that a client may have made up, and
/// it takes nothing from the word of the proxies before it. `None` where there is none.
fn forwarded_hops(head: &Head<'_>) -> Option<Vec<Hop>> {
    let lines: Vec<&[u8]> = head.all("forwarded").collect();
    let nearest_first = lines.iter().rev().flat_map(|line| {
        let of_line: Vec<&[u8]> = elements(line, b',').collect();
        of_line.into_iter().rev()
    });
    let hops: Vec<Hop> = nearest_first.take(FORWARDED_HOPS_MAX).map_while(forwarded_hop).collect();
    (!hops.is_empty()).then_some(hops)
}

/// `forwarded-element` of RFC 7239 section 4.
fn forwarded_hop(element: &[u8]) -> Option<Hop> {
    let mut hop = Hop::default();
    let mut seen: Vec<&[u8]> = Vec::new();
    for pair in elements(element, b';') {
        let at = pair.iter().position(|&b| b == b'=')?;
        let (name, value) = (pair.get(..at)?, parameter_value(pair.get(at + 1..)?)?);
        // RFC 7239 4: each parameter MUST NOT occur more than once in an element.
        if !is_token(name) || seen.iter().any(|other| other.eq_ignore_ascii_case(name)) {
            return None;
        }
        seen.push(name);
        match name.to_ascii_lowercase().as_slice() {
            b"for" => hop.addr = node_address(&value),
            b"proto" => hop.proto = scheme(&value),
            b"host" => hop.host = host_name(&value),
            _ => {}
        }
    }
    Some(hop)
}

/// A token, or a quoted string without its quotes.
fn parameter_value(value: &[u8]) -> Option<String> {
    let Some(quoted) = value.strip_prefix(b"\"") else {
        return is_token(value).then(|| String::from_utf8(value.to_vec()).ok()).flatten();
    };
    let mut out = Vec::with_capacity(quoted.len());
    let mut bytes = quoted.iter().copied();
    loop {
        match bytes.next()? {
            b'"' => break,
            b'\\' => out.push(bytes.next()?),
            byte => out.push(byte),
        }
    }
    if bytes.next().is_some() {
        return None;
    }
    String::from_utf8(out).ok()
}

/// The hops of `X-Forwarded-For`, nearest first, with what `X-Forwarded-Proto` and `-Host` say of them.
fn legacy_hops(head: &Head<'_>) -> Option<Vec<Hop>> {
    let addresses = nearest_first(head, "x-forwarded-for");
    if addresses.is_empty() {
        return None;
    }
    let mut hops: Vec<Hop> = addresses.iter().map(|text| Hop { addr: node_address(text), ..Hop::default() }).collect();
    let protos = nearest_first(head, "x-forwarded-proto");
    let hosts = nearest_first(head, "x-forwarded-host");
    // Lists of the same length were written hop by hop. Otherwise only the nearest proxy's word can be told from what
    // the client may have made up, and it holds for all hops.
    let (by_hop_proto, by_hop_host) = (protos.len() == hops.len(), hosts.len() == hops.len());
    for (at, hop) in hops.iter_mut().enumerate() {
        let element =
            |list: &[&'_ str], by_hop: bool| list.get(if by_hop { at } else { 0 }).map(|text| (*text).to_owned());
        hop.proto = element(&protos, by_hop_proto).as_deref().and_then(scheme);
        hop.host = element(&hosts, by_hop_host).as_deref().and_then(host_name);
    }
    Some(hops)
}

fn nearest_first<'b>(head: &Head<'b>, name: &str) -> Vec<&'b str> {
    let all: Vec<&str> = head.list(name).collect();
    all.into_iter().rev().take(FORWARDED_HOPS_MAX).collect()
}

fn last_element<'b>(head: &Head<'b>, name: &str) -> Option<&'b str> {
    head.list(name).last()
}

fn scheme(text: &str) -> Option<&'static str> {
    ["http", "https"].into_iter().find(|scheme| scheme.eq_ignore_ascii_case(text))
}

fn host_name(text: &str) -> Option<String> {
    is_authority(text).then(|| text.to_owned())
}

/// An address with or without a port: `192.0.2.1`, `192.0.2.1:80`, `2001:db8::1`, `[2001:db8::1]`, `[2001:db8::1]:80`.
fn node_address(text: &str) -> Option<IpAddr> {
    let bracketed = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let addr = match bracketed {
        Some(inner) => IpAddr::V6(inner.parse::<Ipv6Addr>().ok()?),
        None => match text.parse::<IpAddr>() {
            Ok(addr) => addr,
            Err(_) => text.parse::<SocketAddr>().ok()?.ip(),
        },
    };
    Some(addr.to_canonical())
}

/// Why a connection does not begin with a PROXY v2 header.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ProxyError {
    /// Its first twelve bytes are not the signature.
    #[error("the connection does not begin with the PROXY v2 signature")]
    Signature,
    /// Another version than 2.
    #[error("the PROXY protocol's version is not 2")]
    Version,
    /// Neither LOCAL nor PROXY.
    #[error("the PROXY command is neither LOCAL nor PROXY")]
    Command,
    /// An address family or transport that the protocol does not have, or datagrams.
    #[error("the PROXY address is not of a stream transport")]
    Family,
    /// The header is shorter than its addresses.
    #[error("the PROXY header is shorter than its addresses")]
    TooShort,
    /// The header is over `PROXY_V2_BYTES_MAX`.
    #[error("the PROXY header has more than {PROXY_V2_BYTES_MAX} bytes")]
    TooLong,
}

const PROXY_V2_SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";

/// Reads a PROXY v2 header from the beginning of `buf`: the client's address and port, and the bytes it took; `None` while
/// it is incomplete. There is no address with LOCAL (the proxy's own health checks), UNSPEC and UNIX: the client is then
/// the peer. TLVs are read over.
///
/// # Errors
/// [`ProxyError`] at the first byte that no header has at its place.
pub fn proxy_v2(buf: &[u8]) -> Result<Option<(Option<SocketAddr>, usize)>, ProxyError> {
    if buf.iter().zip(&PROXY_V2_SIGNATURE).any(|(found, wanted)| found != wanted) {
        return Err(ProxyError::Signature);
    }
    let mut bytes = buf.iter().copied().skip(PROXY_V2_SIGNATURE.len());
    let Some(version_and_command) = bytes.next() else {
        return Ok(None);
    };
    if version_and_command >> 4 != 2 {
        return Err(ProxyError::Version);
    }
    let is_local = match version_and_command & 0x0f {
        0 => true,
        1 => false,
        _ => return Err(ProxyError::Command),
    };
    let Some(family) = bytes.next() else {
        return Ok(None);
    };
    let address_bytes = match family {
        // Section 2.2: with LOCAL the family is to be ignored.
        _ if is_local => 0,
        0x00 => 0,
        0x11 => 12,
        0x21 => 36,
        0x31 => 216,
        _ => return Err(ProxyError::Family),
    };
    let (Some(high), Some(low)) = (bytes.next(), bytes.next()) else {
        return Ok(None);
    };
    let body_bytes = usize::from(u16::from_be_bytes([high, low]));
    let total = PROXY_V2_SIGNATURE.len() + 4 + body_bytes;
    if total > PROXY_V2_BYTES_MAX {
        return Err(ProxyError::TooLong);
    }
    if body_bytes < address_bytes {
        return Err(ProxyError::TooShort);
    }
    let Some(body) = buf.get(total - body_bytes..total) else {
        return Ok(None);
    };
    let address = match (is_local, family) {
        (false, 0x11) => ipv4_source(body),
        (false, 0x21) => ipv6_source(body),
        _ => None,
    };
    Ok(Some((address, total)))
}

/// Source and destination address, source and destination port: the source's.
fn ipv4_source(body: &[u8]) -> Option<SocketAddr> {
    let (addr, rest) = body.split_first_chunk::<4>()?;
    let port = rest.get(4..)?.first_chunk::<2>()?;
    Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::from(*addr)), u16::from_be_bytes(*port)))
}

fn ipv6_source(body: &[u8]) -> Option<SocketAddr> {
    let (addr, rest) = body.split_first_chunk::<16>()?;
    let port = rest.get(16..)?.first_chunk::<2>()?;
    Some(SocketAddr::new(IpAddr::V6(Ipv6Addr::from(*addr)).to_canonical(), u16::from_be_bytes(*port)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

    use super::*;
    use crate::codec::http::tests::{get, parsed};

    fn addr(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    /// The client of a request from `peer` with these lines, where 10/8 and fd00::/8 are trusted.
    fn seen(peer: &str, lines: &str) -> (String, Option<&'static str>, Option<String>) {
        let trusted = ["10.0.0.0/8", "fd00::/8"].map(|net| net.parse().expect("a net"));
        let client = client(addr(peer), &trusted, &parsed(&get(lines)));
        (client.addr.to_string(), client.proto, client.host)
    }

    fn of(client: &str) -> (String, Option<&'static str>, Option<String>) {
        (client.to_owned(), None, None)
    }

    #[test]
    fn a_peer_that_is_not_trusted_is_the_client() {
        let lines =
            "Forwarded: for=1.1.1.1;proto=https;host=evil\r\nX-Forwarded-For: 1.1.1.1\r\nX-Forwarded-Host: evil\r\n";
        assert_eq!(seen("192.0.2.9", lines), of("192.0.2.9"));
        assert_eq!(seen("::ffff:192.0.2.9", lines), of("192.0.2.9"));
    }

    #[test]
    fn hops_are_followed_from_the_right_past_trusted_proxies() {
        for (lines, client) in [
            ("", "10.0.0.1"),
            ("X-Forwarded-For: 192.0.2.1\r\n", "192.0.2.1"),
            ("X-Forwarded-For: 6.6.6.6, 192.0.2.1\r\n", "192.0.2.1"),
            ("X-Forwarded-For: 6.6.6.6, 192.0.2.1, 10.0.0.2\r\n", "192.0.2.1"),
            ("X-Forwarded-For: 6.6.6.6\r\nX-Forwarded-For: 192.0.2.1, fd00::1\r\n", "192.0.2.1"),
            ("X-Forwarded-For: 10.0.0.3, 10.0.0.2\r\n", "10.0.0.3"),
            ("X-Forwarded-For: 192.0.2.1:5060\r\n", "192.0.2.1"),
            ("X-Forwarded-For: [2001:db8::1]:5060\r\n", "2001:db8::1"),
            ("X-Forwarded-For: 2001:db8::1\r\n", "2001:db8::1"),
            ("X-Forwarded-For: ::ffff:192.0.2.1\r\n", "192.0.2.1"),
            ("X-Forwarded-For: 192.0.2.1, unknown, 10.0.0.2\r\n", "10.0.0.2"),
            ("X-Forwarded-For: rubbish\r\n", "10.0.0.1"),
            ("Forwarded: for=192.0.2.1\r\n", "192.0.2.1"),
            ("Forwarded: For=\"[2001:db8::1]:80\";by=10.0.0.1\r\n", "2001:db8::1"),
            ("Forwarded: for=6.6.6.6, for=192.0.2.1;proto=ftp, for=10.0.0.2\r\n", "192.0.2.1"),
            ("Forwarded: for=6.6.6.6, for=_hidden, for=10.0.0.2\r\n", "10.0.0.2"),
            ("Forwarded: for=\"192.0.2.1\", for=\"\\10.0.0.2\"\r\n", "192.0.2.1"),
        ] {
            assert_eq!(seen("10.0.0.1", lines).0, client, "{lines:?}");
        }
    }

    #[test]
    fn malformed_forwarded_is_not_believed() {
        for value in [
            "for=\"192.0.2.1",
            "for",
            "for=1.1.1.1;for=2.2.2.2",
            "for=192.0.2.1 x",
            "for=\"a\"b",
            "f(r=1.1.1.1",
            "for=",
        ] {
            assert_eq!(seen("10.0.0.1", &format!("Forwarded: {value}\r\n")), of("10.0.0.1"), "{value}");
        }
    }

    #[test]
    fn what_a_client_has_garbled_does_not_hide_it_from_the_proxys_word() {
        for garbled in ["for=\"", "x;;=", "for", "for=1.1.1.1;for=2.2.2.2", "="] {
            for told in ["for=192.0.2.1", "for=192.0.2.1, for=10.0.0.2"] {
                let lines = format!("Forwarded: {garbled}\r\nForwarded: {told}\r\n");
                assert_eq!(seen("10.0.0.1", &lines).0, "192.0.2.1", "{lines:?}");
            }
        }
        // In one line with the proxy's, as long as it leaves that a place of its own.
        assert_eq!(seen("10.0.0.1", "Forwarded: x;;=, for=192.0.2.1\r\n").0, "192.0.2.1");
        assert_eq!(seen("10.0.0.1", "Forwarded: for=\", for=192.0.2.1\r\n").0, "10.0.0.1");
        assert_eq!(seen("10.0.0.1", "Forwarded: for=192.0.2.1, x;;=, for=10.0.0.2\r\n").0, "10.0.0.2");
    }

    #[test]
    fn scheme_and_host_are_as_the_client_saw_them() {
        let both = |client: &str| (client.to_owned(), Some("https"), Some("live.example".to_owned()));
        let lines = "Forwarded: for=192.0.2.1;proto=HTTPS;host=live.example, for=10.0.0.2;proto=http;host=inner\r\n";
        assert_eq!(seen("10.0.0.1", lines), both("192.0.2.1"));
        let lines =
            "X-Forwarded-For: 192.0.2.1, 10.0.0.2\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: live.example\r\n";
        assert_eq!(seen("10.0.0.1", lines), both("192.0.2.1"));
        let lines = "X-Forwarded-For: 192.0.2.1, 10.0.0.2\r\nX-Forwarded-Proto: https, http\r\n\
                     X-Forwarded-Host: live.example, inner\r\n";
        assert_eq!(seen("10.0.0.1", lines), both("192.0.2.1"), "lists of one length are read hop by hop");
        let lines =
            "X-Forwarded-For: 192.0.2.1\r\nX-Forwarded-Host: evil, live.example\r\nX-Forwarded-Proto: https\r\n";
        assert_eq!(seen("10.0.0.1", lines), both("192.0.2.1"), "what a client sent stands left of the proxy's word");
        let lines = "X-Forwarded-Proto: https\r\nX-Forwarded-Host: live.example\r\n";
        assert_eq!(seen("10.0.0.1", lines), both("10.0.0.1"));
        let lines = "X-Forwarded-For: 192.0.2.1\r\nX-Forwarded-Host: a b\r\nX-Forwarded-Proto: wss\r\n";
        assert_eq!(seen("10.0.0.1", lines), of("192.0.2.1"));
    }

    #[test]
    fn two_kinds_of_fields_that_disagree_are_not_believed() {
        let lines = "Forwarded: for=6.6.6.6;host=evil\r\nX-Forwarded-For: 192.0.2.1\r\n";
        assert_eq!(seen("10.0.0.1", lines), of("10.0.0.1"));
        let lines = "Forwarded: for=192.0.2.1\r\nX-Forwarded-For: 192.0.2.1\r\nX-Forwarded-Proto: https\r\n";
        assert_eq!(seen("10.0.0.1", lines), ("192.0.2.1".to_owned(), Some("https"), None));
    }

    #[test]
    fn at_most_32_hops_are_followed() {
        for (hops, client) in [(FORWARDED_HOPS_MAX - 1, "192.0.2.1"), (FORWARDED_HOPS_MAX, "10.0.0.2")] {
            let proxies = vec!["10.0.0.2"; hops].join(", ");
            assert_eq!(seen("10.0.0.1", &format!("X-Forwarded-For: 192.0.2.1, {proxies}\r\n")).0, client);
            let proxies = vec!["for=10.0.0.2"; hops].join(", ");
            assert_eq!(seen("10.0.0.1", &format!("Forwarded: for=192.0.2.1, {proxies}\r\n")).0, client);
        }
    }

    fn proxy(version_and_command: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let len = u16::try_from(body.len()).expect("short").to_be_bytes();
        [&PROXY_V2_SIGNATURE[..], &[version_and_command, family], &len, body].concat()
    }

    /// What is read of a header and what follows it, which must not depend on how it was split.
    fn read(bytes: &[u8]) -> Result<Option<(Option<SocketAddr>, usize)>, ProxyError> {
        let whole = proxy_v2(bytes);
        for len in 0..bytes.len() {
            let early = proxy_v2(bytes.get(..len).expect("a beginning"));
            assert!(early == Ok(None) || early == whole, "after {len} bytes");
        }
        whole
    }

    #[test]
    fn a_proxy_tells_the_address_in_binary() {
        let v4 = [192, 0, 2, 1, 10, 0, 0, 1, 0x30, 0x39, 0x01, 0xbb, 0x04, 0, 1, 0];
        let socket = Some("192.0.2.1:12345".parse().expect("an address"));
        let mut wire = proxy(0x21, 0x11, &v4);
        wire.extend_from_slice(b"GET /");
        assert_eq!(read(&wire), Ok(Some((socket, 32))), "a TLV is read over, what follows left");
        let mapped = "::ffff:192.0.2.1".parse::<Ipv6Addr>().expect("an address").octets();
        let v6 = [&mapped[..], &[0; 16], &[0x30, 0x39, 0, 80]].concat();
        assert_eq!(read(&proxy(0x21, 0x21, &v6)), Ok(Some((socket, 52))));
        for (command, family, len) in
            [(0x20, 0x00, 0), (0x20, 0x11, 12), (0x20, 0xff, 3), (0x21, 0x00, 5), (0x21, 0x31, 216)]
        {
            assert_eq!(
                read(&proxy(command, family, &vec![1; len])),
                Ok(Some((None, 16 + len))),
                "{command:x} {family:x}"
            );
        }
    }

    #[test]
    fn what_is_no_proxy_header_is_refused() {
        for (wire, error) in [
            (b"GET / HTTP/1.1\r\n".to_vec(), ProxyError::Signature),
            (b"\r\n\r\n\0\r\nQUIT\r".to_vec(), ProxyError::Signature),
            (proxy(0x11, 0x11, &[0; 12]), ProxyError::Version),
            (proxy(0x22, 0x11, &[0; 12]), ProxyError::Command),
            (proxy(0x21, 0x12, &[0; 12]), ProxyError::Family),
            (proxy(0x21, 0x41, &[0; 12]), ProxyError::Family),
            (proxy(0x21, 0x11, &[0; 11]), ProxyError::TooShort),
            (proxy(0x21, 0x21, &[0; 35]), ProxyError::TooShort),
            (proxy(0x21, 0x11, &[0; PROXY_V2_BYTES_MAX - 15]), ProxyError::TooLong),
        ] {
            assert_eq!(read(&wire), Err(error));
        }
        let longest = read(&proxy(0x21, 0x11, &[0; PROXY_V2_BYTES_MAX - 16]));
        assert!(matches!(longest, Ok(Some((Some(_), PROXY_V2_BYTES_MAX)))));
    }

    proptest! {
        #[test]
        fn no_claim_is_too_strange(value in "[ -~]{0,60}") {
            let (client, ..) = seen("192.0.2.9", &format!("Forwarded: {value}\r\nX-Forwarded-For: {value}\r\n"));
            prop_assert_eq!(client, "192.0.2.9");
            let (client, ..) = seen("10.0.0.1", &format!("Forwarded: {value}\r\n"));
            prop_assert!(client.parse::<IpAddr>().is_ok());
        }

        #[test]
        fn a_client_cannot_change_what_the_proxy_appended(claim in "[!-+\\--~ ]{0,40}") {
            let (client, ..) = seen("10.0.0.1", &format!("X-Forwarded-For: {claim}\r\nX-Forwarded-For: 192.0.2.1\r\n"));
            prop_assert_eq!(client, "192.0.2.1");
        }

        #[test]
        fn any_bytes_are_a_header_or_not(version in 0x1fu8..0x23, family in any::<u8>(), body in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _ = read(&proxy(version, family, &body));
        }
    }
}
