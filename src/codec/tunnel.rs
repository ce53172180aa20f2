//! `CONNECT`: a tunnel through an HTTP proxy, asked for and answered.
//!
//! Source: RFC 9110 section 9.3.6, RFC 9112 section 3.2.3, RFC 7617 for the login. Memory: written into the caller's buffer;
//! an answer's head is bounded by `PROXY_HEAD_BYTES_MAX`. Errors: [`TunnelError`], which holds nothing that the proxy has said.
//! Not here: which proxy, and what for (`stream::proxy`); what goes through the tunnel.

use super::http::is_authority;
use crate::limits::{PROXY_HEAD_BYTES_MAX, PROXY_HEADERS_MAX};
use crate::secret::Secret;

/// How a proxy has answered.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Answer {
    /// Not all of it is there.
    Partial,
    /// The tunnel is open: what is sent from now on reaches the other end.
    Open,
    /// It is not, by this status.
    Refused(u16),
}

/// Why there is no tunnel.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum TunnelError {
    /// The other end is no `host:port`.
    #[error("the other end of the tunnel is no host:port")]
    Authority,
    /// What came is no head of HTTP/1.
    #[error("the proxy's answer is not HTTP/1.1")]
    Malformed,
    /// The head has no end within its bounds.
    #[error("the proxy's answer has a head of more than {PROXY_HEAD_BYTES_MAX} bytes or {PROXY_HEADERS_MAX} fields")]
    TooLarge,
    /// Bytes follow the head of an open tunnel: nobody has been asked anything yet.
    #[error("something came through the tunnel before anything was sent")]
    Early,
}

/// Appends the request for a tunnel to `authority`, `host:port`, with the value of `Proxy-Authorization` where there is one.
///
/// # Errors
/// [`TunnelError::Authority`]; `out` is then as it was.
pub fn write_connect(out: &mut Vec<u8>, authority: &str, login: Option<&Secret>) -> Result<(), TunnelError> {
    let has_port = authority.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    if !has_port || !is_authority(authority) {
        return Err(TunnelError::Authority);
    }
    for part in ["CONNECT ", authority, " HTTP/1.1\r\nHost: ", authority, "\r\n"] {
        out.extend_from_slice(part.as_bytes());
    }
    if let Some(login) = login {
        out.extend_from_slice(b"Proxy-Authorization: ");
        out.extend_from_slice(login.expose_secret());
        out.extend_from_slice(b"\r\n");
    }
    out.extend_from_slice(b"\r\n");
    Ok(())
}

/// Reads what a proxy has answered so far, all of it. Interim answers are passed over. An open tunnel has no body, whatever its
/// head says (RFC 9110 section 9.3.6); that of a refusal is not read.
///
/// # Errors
/// [`TunnelError`], but for `Authority`.
pub fn read_answer(mut bytes: &[u8]) -> Result<Answer, TunnelError> {
    let all = bytes.len();
    loop {
        let mut fields = [httparse::EMPTY_HEADER; PROXY_HEADERS_MAX];
        let mut head = httparse::Response::new(&mut fields);
        let end = match head.parse(bytes) {
            Ok(httparse::Status::Complete(end)) => end,
            Ok(httparse::Status::Partial) if all >= PROXY_HEAD_BYTES_MAX => return Err(TunnelError::TooLarge),
            Ok(httparse::Status::Partial) => return Ok(Answer::Partial),
            Err(httparse::Error::TooManyHeaders) => return Err(TunnelError::TooLarge),
            Err(_) => return Err(TunnelError::Malformed),
        };
        let rest = bytes.get(end..).unwrap_or_default();
        match head.code {
            Some(100 | 102..=199) => bytes = rest,
            Some(200..=299) if rest.is_empty() => return Ok(Answer::Open),
            Some(200..=299) => return Err(TunnelError::Early),
            Some(status @ 300..=999) => return Ok(Answer::Refused(status)),
            _ => return Err(TunnelError::Malformed),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn written(authority: &str, login: Option<&str>) -> Result<String, TunnelError> {
        let mut out = b"before ".to_vec();
        let login = login.map(Secret::new);
        let outcome = write_connect(&mut out, authority, login.as_ref());
        let text = String::from_utf8(out).expect("ASCII");
        let text = text.strip_prefix("before ").expect("it is appended").to_owned();
        assert!(outcome.is_ok() || text.is_empty(), "nothing is left of what is refused");
        outcome.map(|()| text)
    }

    #[test]
    fn a_tunnel_is_asked_for_by_its_other_end() {
        let plain = "CONNECT api.example.com:443 HTTP/1.1\r\nHost: api.example.com:443\r\n\r\n";
        assert_eq!(written("api.example.com:443", None).as_deref(), Ok(plain));
        let login =
            "CONNECT [2001:db8::1]:80 HTTP/1.1\r\nHost: [2001:db8::1]:80\r\nProxy-Authorization: Basic eA==\r\n\r\n";
        assert_eq!(written("[2001:db8::1]:80", Some("Basic eA==")).as_deref(), Ok(login));
        for authority in
            ["", "host", "host:", "host:x", "host:65536", "a b:1", "user@host:1", "::1", "h:1\r\nX: y", "h:1/"]
        {
            assert_eq!(written(authority, None), Err(TunnelError::Authority), "{authority:?}");
        }
    }

    #[test]
    fn an_answer_opens_the_tunnel_or_does_not() {
        for (text, answer) in [
            ("", Ok(Answer::Partial)),
            ("HTTP/1.1 200 Connection established\r\n", Ok(Answer::Partial)),
            ("HTTP/1.1 200 Connection established\r\n\r\n", Ok(Answer::Open)),
            ("HTTP/1.0 200\r\n\r\n", Ok(Answer::Open)),
            ("HTTP/1.1 204 No\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n", Ok(Answer::Open)),
            ("HTTP/1.1 200 OK\r\n\r\nx", Err(TunnelError::Early)),
            ("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nLink: x\r\n\r\n", Ok(Answer::Partial)),
            ("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", Ok(Answer::Open)),
            ("HTTP/1.1 101 Switching\r\n\r\n", Err(TunnelError::Malformed)),
            ("HTTP/1.1 407 Login\r\nProxy-Authenticate: Basic\r\n\r\n<html>", Ok(Answer::Refused(407))),
            ("HTTP/1.1 302 Found\r\nLocation: http://login/\r\n\r\n", Ok(Answer::Refused(302))),
            ("HTTP/1.1 000 No\r\n\r\n", Err(TunnelError::Malformed)),
            ("SSH-2.0-OpenSSH_9\r\n", Err(TunnelError::Malformed)),
            ("\u{16}\u{3}\u{1}", Err(TunnelError::Malformed)),
        ] {
            assert_eq!(read_answer(text.as_bytes()), answer, "{text:?}");
        }
    }

    #[test]
    fn a_head_without_an_end_is_refused() {
        let long = format!("HTTP/1.1 200 OK\r\nX: {}", "x".repeat(PROXY_HEAD_BYTES_MAX));
        assert_eq!(read_answer(long.as_bytes()), Err(TunnelError::TooLarge));
        let many = format!("HTTP/1.1 200 OK\r\n{}", "X: y\r\n".repeat(PROXY_HEADERS_MAX + 1));
        assert_eq!(read_answer(many.as_bytes()), Err(TunnelError::TooLarge));
        let interim = "HTTP/1.1 102 Wait\r\n\r\n".repeat(PROXY_HEAD_BYTES_MAX / 20);
        assert_eq!(read_answer(interim.as_bytes()), Err(TunnelError::TooLarge));
    }

    proptest! {
        /// Whatever comes is judged; what is judged of its beginning is not taken back later, but that something came early.
        #[test]
        fn an_answer_is_the_same_however_it_is_cut(
            interim in 0..3_usize,
            status in 200..600_u16,
            fields in prop::collection::vec("[A-Za-z-]{1,12}: [ -~]{0,20}\r\n", 0..8),
        ) {
            let head = format!("HTTP/1.1 {status} Reason\r\n{}\r\n", fields.concat());
            let text = "HTTP/1.1 102 Wait\r\n\r\n".repeat(interim) + &head;
            let expected = if status < 300 { Answer::Open } else { Answer::Refused(status) };
            for end in 0..text.len() {
                prop_assert_eq!(read_answer(&text.as_bytes()[..end]), Ok(Answer::Partial), "{}", end);
            }
            prop_assert_eq!(read_answer(text.as_bytes()), Ok(expected));
        }

        #[test]
        fn any_bytes_are_judged(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = read_answer(&bytes);
        }
    }
}
