//! The opening handshake of a WebSocket, the server's half.
//!
//! Source: RFC 6455 section 4.2.
//! Memory: borrowed from the head, but for the list of protocols and extensions that came in several lines.
//! Errors: [`UpgradeError`], 400 or 426.  Not here: which protocol is chosen (`connection`), frames (`codec::ws`).

use std::borrow::Cow;
use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha1::{Digest, Sha1};

use super::answer::push_field;
use super::extensions::extension_pieces;
use super::{BodyLength, Head, is_token};
use crate::limits::SUBPROTOCOLS_MAX;

/// RFC 6455 section 1.3.
const ACCEPT_GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// A valid opening handshake. Its `Debug` does not show the protocols: one of them may be a token.
#[derive(Clone, Eq, PartialEq)]
pub struct Upgrade<'b> {
    /// `Sec-WebSocket-Key` as it was sent: base64 of 16 bytes.
    pub key: &'b str,
    /// The subprotocols offered, in order of preference, each one once.
    pub protocols: Vec<&'b str>,
    /// `Sec-WebSocket-Extensions`, its lines joined by commas; empty where there is none. Well-formed: each of its
    /// [`extension_pieces`] is one.
    pub extensions: Cow<'b, str>,
}

impl fmt::Debug for Upgrade<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upgrade")
            .field("protocols", &self.protocols.len())
            .field("extensions", &self.extensions)
            .finish_non_exhaustive()
    }
}

/// Why an opening handshake was refused. All of them are the client's fault.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum UpgradeError {
    /// 400: `Upgrade: websocket` without `Connection: Upgrade`.
    #[error("Upgrade: websocket stands without Connection: Upgrade")]
    Connection,
    /// 426: another version than 13, or none.
    #[error("Sec-WebSocket-Version is not 13")]
    Version,
    /// 400: the key is not the base64 of 16 bytes, or there is none.
    #[error("Sec-WebSocket-Key is not the base64 of 16 bytes")]
    Key,
    /// 400: a GET with a body.
    #[error("the handshake has a body")]
    Body,
    /// 400: `Sec-WebSocket-Protocol` is no list of tokens.
    #[error("Sec-WebSocket-Protocol is not a list of tokens")]
    Protocol,
    /// 400: a subprotocol is offered twice.
    #[error("Sec-WebSocket-Protocol offers the same protocol twice")]
    ProtocolRepeated,
    /// 400: more than 16 subprotocols.
    #[error("Sec-WebSocket-Protocol offers more than {SUBPROTOCOLS_MAX} protocols")]
    TooManyProtocols,
    /// 400: `Sec-WebSocket-Extensions` is no list of extensions.
    #[error("Sec-WebSocket-Extensions is not a list of extensions")]
    Extensions,
}

impl UpgradeError {
    /// The status that answers it; 426 wants `Sec-WebSocket-Version: 13` beside it.
    pub const fn status(self) -> u16 {
        match self {
            UpgradeError::Version => 426,
            _ => 400,
        }
    }
}

/// Reads a WebSocket handshake. `None` where none is asked for: `websocket` is not among the `Upgrade`s, or the method is
/// not GET (RFC 9110 section 7.8 lets a server ignore the field; the resource then answers as it does to that method).
///
/// # Errors
/// [`UpgradeError`] where one is asked for that RFC 6455 section 4.2.1 does not allow.
pub fn websocket_upgrade<'b>(head: &Head<'b>) -> Result<Option<Upgrade<'b>>, UpgradeError> {
    if head.method != "GET" || !head.has_token("upgrade", "websocket") {
        return Ok(None);
    }
    if !head.has_token("connection", "upgrade") {
        return Err(UpgradeError::Connection);
    }
    // RFC 6455 4.4: a version that is not spoken is told apart, so that the client may try another.
    if head.one("sec-websocket-version").ok().flatten() != Some("13") {
        return Err(UpgradeError::Version);
    }
    let key = head.one("sec-websocket-key").ok().flatten().filter(|key| is_key(key)).ok_or(UpgradeError::Key)?;
    if !matches!(head.body, BodyLength::None | BodyLength::Length(0)) {
        return Err(UpgradeError::Body);
    }
    Ok(Some(Upgrade { key, protocols: offered_protocols(head)?, extensions: offered_extensions(head)? }))
}

fn offered_protocols<'b>(head: &Head<'b>) -> Result<Vec<&'b str>, UpgradeError> {
    let mut protocols = Vec::new();
    for protocol in head.list("sec-websocket-protocol") {
        if !is_token(protocol.as_bytes()) {
            return Err(UpgradeError::Protocol);
        }
        // RFC 6455 4.1: the elements must all be unique.
        if protocols.contains(&protocol) {
            return Err(UpgradeError::ProtocolRepeated);
        }
        if protocols.len() == SUBPROTOCOLS_MAX {
            return Err(UpgradeError::TooManyProtocols);
        }
        protocols.push(protocol);
    }
    if protocols.is_empty() && head.all("sec-websocket-protocol").next().is_some() {
        return Err(UpgradeError::Protocol);
    }
    Ok(protocols)
}

fn offered_extensions<'b>(head: &Head<'b>) -> Result<Cow<'b, str>, UpgradeError> {
    let mut extensions = Cow::Borrowed("");
    for line in head.all("sec-websocket-extensions") {
        let line = std::str::from_utf8(line).ok().filter(|line| line.is_ascii()).ok_or(UpgradeError::Extensions)?;
        if extensions.is_empty() {
            extensions = Cow::Borrowed(line);
        } else {
            let joined = extensions.to_mut();
            joined.push_str(", ");
            joined.push_str(line);
        }
    }
    // RFC 6455 9.1: who receives what does not follow the grammar fails the connection.
    if extension_pieces(&extensions).any(|piece| piece.is_err()) {
        return Err(UpgradeError::Extensions);
    }
    Ok(extensions)
}

/// Whether `key` is the canonical base64 of 16 bytes.
fn is_key(key: &str) -> bool {
    let mut nonce = [0u8; 18];
    key.len() == 24 && STANDARD.decode_slice(key, &mut nonce) == Ok(16)
}

/// `Sec-WebSocket-Accept` for a key (RFC 6455 section 4.2.2): 28 characters of base64.
pub fn accept_key(key: &str) -> [u8; 28] {
    let digest = Sha1::new().chain_update(key).chain_update(ACCEPT_GUID).finalize();
    let mut accept = [b'='; 28];
    let written = STANDARD.encode_slice(digest, &mut accept);
    debug_assert_eq!(written, Ok(28), "20 bytes are 28 characters of base64");
    accept
}

/// Appends the answer that opens a WebSocket. A field of `extra` whose name or value no field may have is left out.
pub fn write_switching_protocols(out: &mut Vec<u8>, accept: &[u8; 28], protocol: Option<&str>, extra: &[(&str, &str)]) {
    out.extend_from_slice(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n");
    out.extend_from_slice(b"Sec-WebSocket-Accept: ");
    out.extend_from_slice(accept);
    out.extend_from_slice(b"\r\n");
    if let Some(protocol) = protocol.filter(|protocol| is_token(protocol.as_bytes())) {
        push_field(out, "Sec-WebSocket-Protocol", protocol.as_bytes());
    }
    for (name, value) in extra {
        push_field(out, name, value.as_bytes());
    }
    out.extend_from_slice(b"\r\n");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::http::tests::{get, parsed};

    const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
    const GOOD: &str = "Connection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\nSec-WebSocket-Version: 13\r\n\
                        Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";

    fn refused(lines: &str) -> UpgradeError {
        websocket_upgrade(&parsed(&get(lines))).expect_err("a bad handshake")
    }

    #[test]
    fn a_handshake_is_answered_as_in_the_rfc() {
        let text = get(GOOD);
        let upgrade = websocket_upgrade(&parsed(&text)).expect("good").expect("asked for");
        assert_eq!(upgrade, Upgrade { key: KEY, protocols: Vec::new(), extensions: "".into() });
        let accept = accept_key(upgrade.key);
        assert_eq!(&accept, b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo=", "RFC 6455 section 1.3");
        let mut out = Vec::new();
        let extra = [("Sec-WebSocket-Extensions", "permessage-deflate"), ("X", "a\r\nY: b"), ("X Y", "a")];
        write_switching_protocols(&mut out, &accept, Some("restcast.v1"), &extra);
        assert_eq!(
            String::from_utf8(out).expect("ASCII"),
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\nSec-WebSocket-Protocol: restcast.v1\r\n\
             Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n"
        );
    }

    #[test]
    fn what_is_no_handshake_is_not_refused() {
        assert_eq!(websocket_upgrade(&parsed(&get(""))), Ok(None));
        assert_eq!(websocket_upgrade(&parsed(&get("Connection: Upgrade\r\nUpgrade: h2c\r\n"))), Ok(None));
        let post = get(GOOD).replacen("GET", "POST", 1);
        assert_eq!(websocket_upgrade(&parsed(&post)), Ok(None));
    }

    #[test]
    fn each_part_of_a_handshake_is_needed() {
        assert_eq!(refused(&GOOD.replace("keep-alive, Upgrade", "keep-alive")), UpgradeError::Connection);
        for version in ["12", "013", "13, 8", ""] {
            let lines = GOOD.replace("Version: 13", &format!("Version: {version}"));
            assert_eq!(refused(&lines), UpgradeError::Version, "{version:?}");
        }
        assert_eq!(refused(&GOOD.replace("Version", "Wersion")), UpgradeError::Version);
        for key in [
            "",
            "dGhlIHNhbXBsZSBub25jZQ",
            "dGhlIHNhbXBsZSBub25jZR==",
            "dGhlIHNhbXBsZSBub25jZQ= ",
            "dGhlIHNhbXBsZSBub25j",
            "dGhlIHNhbXBsZSBub25jZWFi",
            "dGhlIHNhbXBsZSBub25jZ_==",
        ] {
            assert_eq!(refused(&GOOD.replace(KEY, key)), UpgradeError::Key, "{key:?}");
        }
        assert_eq!(refused(&format!("{GOOD}Content-Length: 1\r\n")), UpgradeError::Body);
        assert_eq!(refused(&format!("{GOOD}Transfer-Encoding: chunked\r\n")), UpgradeError::Body);
        assert!(websocket_upgrade(&parsed(&get(&format!("{GOOD}Content-Length: 0\r\n")))).is_ok());
        assert_eq!((UpgradeError::Version.status(), UpgradeError::Key.status()), (426, 400));
    }

    #[test]
    fn protocols_and_extensions_are_gathered_over_lines() {
        let lines = format!(
            "{GOOD}Sec-WebSocket-Protocol: restcast.v1, jwt\r\nSec-WebSocket-Protocol: eyJ.e30.x_-\r\n\
             Sec-WebSocket-Extensions: a; b=1\r\nSec-WebSocket-Extensions: c\r\n"
        );
        let text = get(&lines);
        let upgrade = websocket_upgrade(&parsed(&text)).expect("good").expect("asked for");
        assert_eq!(upgrade.protocols, ["restcast.v1", "jwt", "eyJ.e30.x_-"]);
        assert_eq!(upgrade.extensions, "a; b=1, c");
        assert!(!format!("{upgrade:?}").contains("eyJ"), "a token is not shown");
    }

    #[test]
    fn bad_offers_are_refused() {
        let offer = |value: &str| format!("{GOOD}Sec-WebSocket-Protocol: {value}\r\n");
        assert_eq!(refused(&offer("a b")), UpgradeError::Protocol);
        assert_eq!(refused(&offer("")), UpgradeError::Protocol);
        assert_eq!(refused(&offer("\"a\"")), UpgradeError::Protocol);
        assert_eq!(refused(&offer("a, b, a")), UpgradeError::ProtocolRepeated);
        let many = |count: usize| (0..count).map(|n| format!("p{n}")).collect::<Vec<_>>().join(",");
        assert!(websocket_upgrade(&parsed(&get(&offer(&many(SUBPROTOCOLS_MAX))))).is_ok());
        assert_eq!(refused(&offer(&many(SUBPROTOCOLS_MAX + 1))), UpgradeError::TooManyProtocols);
        assert_eq!(refused(&format!("{GOOD}Sec-WebSocket-Extensions: \u{e9}\r\n")), UpgradeError::Extensions);
        for malformed in ["a;", "a b", "a; b=\"c", ";"] {
            let lines = format!("{GOOD}Sec-WebSocket-Extensions: {malformed}\r\n");
            assert_eq!(refused(&lines), UpgradeError::Extensions, "{malformed:?}");
        }
        assert!(websocket_upgrade(&parsed(&get(&format!("{GOOD}Sec-WebSocket-Extensions: , \r\n")))).is_ok());
    }
}
