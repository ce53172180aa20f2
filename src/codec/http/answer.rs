//! Answers: a status, fields and a body -> the bytes of a response.
//!
//! Source: RFC 9112 section 6, RFC 9110 sections 6.4.1, 8.6 and 15, RFC 9457 (problem documents).
//! Memory: the fields are kept as they will be written; the body is owned or static.
//! Errors: none. A field that would break the framing is left out, so nothing that came from a peer can forge an answer.
//! Not here: the clock that [`http_date`] is given the time of (RFC 9110 section 6.6.1 asks those who have one for `Date`).

use std::borrow::Cow;

use super::{is_token, is_value_byte};
use crate::time::WallTime;

/// Tells a client that waits with its body to send it (RFC 9110 section 10.1.1).
pub const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";
/// What ends a body written by [`write_chunk`].
pub const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

/// How the end of a body is told whose length is not known when it begins.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Framing {
    /// `Transfer-Encoding: chunked`.
    Chunked,
    /// The connection's end; `Connection: close` is sent.
    UntilClose,
}

const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// `at` as `Date` writes it (RFC 9110 section 5.6.7, IMF-fixdate): `Sun, 06 Nov 1994 08:49:37 GMT`.
pub fn http_date(at: WallTime) -> String {
    let (days, second) = (at.as_secs() / 86_400, at.as_secs() % 86_400);
    // Years are counted from March, so that a leap day is a year's last: 1970-01-01 is day 719,468 of year 0.
    let days_from_0 = days + 719_468;
    let (era, day_of_era) = (days_from_0 / 146_097, days_from_0 % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month_from_january = (month_from_march + 2) % 12;
    let year = era * 400 + year_of_era + u64::from(month_from_january < 2);
    let name = |names: &[&'static str], at: u64| usize::try_from(at).ok().and_then(|at| names.get(at).copied());
    let (weekday, month) = (name(&DAYS, days % 7).unwrap_or_default(), name(&MONTHS, month_from_january));
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{weekday}, {day:02} {} {year:04} {hour:02}:{minute:02}:{second:02} GMT", month.unwrap_or_default())
}

enum Body {
    Empty,
    Whole(Cow<'static, [u8]>),
    /// So many bytes, which the caller sends itself.
    Elsewhere(usize),
    Streamed(Framing),
}

/// A response in the making.
pub struct Response {
    status: u16,
    fields: Vec<u8>,
    body: Body,
    /// Whether `Upgrade` is among the fields.
    upgrade: bool,
    close: bool,
    head_only: bool,
}

/// RFC 9457 with the member `code` that the protocol adds.
#[derive(serde::Serialize)]
struct Problem<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    title: &'static str,
    status: u16,
    code: &'a str,
    detail: &'a str,
}

impl Response {
    /// A response of this status, without fields or body. A status that is not of three digits is 500.
    pub fn new(status: u16) -> Response {
        let status = if (100..=999).contains(&status) { status } else { 500 };
        Response { status, fields: Vec::new(), body: Body::Empty, upgrade: false, close: false, head_only: false }
    }

    /// A problem document (RFC 9457): `code` is a stable code of the protocol, `detail` a sentence for people.
    pub fn problem(status: u16, code: &str, detail: &str) -> Response {
        let response = Response::new(status);
        let problem = Problem {
            kind: "about:blank",
            title: reason_phrase(response.status),
            status: response.status,
            code,
            detail,
        };
        let json = serde_json::to_vec(&problem).expect("strings and a number are always JSON");
        response.body("application/problem+json", json)
    }

    /// Adds a field. One whose name is no token, whose value holds a control byte, or that says how the message is framed
    /// (`Content-Length`, `Transfer-Encoding`, `Connection`) is left out: the last are this type's to write.
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Response {
        let is_framing =
            ["content-length", "transfer-encoding", "connection"].iter().any(|own| name.eq_ignore_ascii_case(own));
        if !is_framing {
            push_field(&mut self.fields, name, value.as_bytes());
            self.upgrade |= name.eq_ignore_ascii_case("upgrade");
        }
        self
    }

    /// Sets the body and its `Content-Type`.
    #[must_use]
    pub fn body(self, content_type: &str, bytes: impl Into<Cow<'static, [u8]>>) -> Response {
        let mut response = self.header("Content-Type", content_type);
        response.body = Body::Whole(bytes.into());
        response
    }

    /// A body of `length` bytes that the caller sends behind the head, and keeps to itself for HEAD.
    pub fn body_elsewhere(self, content_type: &str, length: usize) -> Response {
        let mut response = self.header("Content-Type", content_type);
        response.body = Body::Elsewhere(length);
        response
    }

    /// Lets the body follow later, with the given `Content-Type`.
    #[must_use]
    pub fn streamed(self, content_type: &str, framing: Framing) -> Response {
        let mut response = self.header("Content-Type", content_type);
        response.body = Body::Streamed(framing);
        response
    }

    /// Tells the client that the connection ends with this response, where `close` is true.
    #[must_use]
    pub fn close(mut self, close: bool) -> Response {
        self.close = close;
        self
    }

    /// Leaves the body out, where `head` is true, but not what the fields say of it: the request was HEAD.
    #[must_use]
    pub fn head_only(mut self, head: bool) -> Response {
        self.head_only = head;
        self
    }

    /// The status.
    pub fn status(&self) -> u16 {
        self.status
    }

    /// Appends the response to `out`.
    pub fn write(&self, out: &mut Vec<u8>) {
        let [hundreds, tens, ones] = [self.status / 100, self.status / 10 % 10, self.status % 10]
            .map(|digit| b'0' + u8::try_from(digit).unwrap_or(0));
        out.extend_from_slice(b"HTTP/1.1 ");
        out.extend_from_slice(&[hundreds, tens, ones, b' ']);
        out.extend_from_slice(reason_phrase(self.status).as_bytes());
        out.extend_from_slice(b"\r\n");
        out.extend_from_slice(&self.fields);
        // RFC 9110 8.6: no Content-Length with 1xx and 204; with 304 it could only repeat what 200 would have said.
        let bodiless = matches!(self.status, 100..=199 | 204 | 304);
        let until_close = matches!(self.body, Body::Streamed(Framing::UntilClose)) && !bodiless;
        // RFC 9110 7.8: whoever sends Upgrade names it in Connection too.
        match (self.close || until_close, self.upgrade) {
            (false, false) => {}
            (true, false) => out.extend_from_slice(b"Connection: close\r\n"),
            (false, true) => out.extend_from_slice(b"Connection: Upgrade\r\n"),
            (true, true) => out.extend_from_slice(b"Connection: Upgrade, close\r\n"),
        }
        let mut body: &[u8] = &[];
        if !bodiless {
            match &self.body {
                Body::Empty => out.extend_from_slice(b"Content-Length: 0\r\n"),
                Body::Whole(bytes) => {
                    out.extend_from_slice(format!("Content-Length: {}\r\n", bytes.len()).as_bytes());
                    body = bytes;
                }
                Body::Elsewhere(length) => out.extend_from_slice(format!("Content-Length: {length}\r\n").as_bytes()),
                Body::Streamed(Framing::Chunked) => out.extend_from_slice(b"Transfer-Encoding: chunked\r\n"),
                Body::Streamed(Framing::UntilClose) => {}
            }
        }
        out.extend_from_slice(b"\r\n");
        if !self.head_only {
            out.extend_from_slice(body);
        }
    }
}

/// Appends one chunk of a chunked body; nothing where `data` is empty, since an empty chunk would end the body.
pub fn write_chunk(out: &mut Vec<u8>, data: &[u8]) {
    if !data.is_empty() {
        out.extend_from_slice(format!("{:x}\r\n", data.len()).as_bytes());
        out.extend_from_slice(data);
        out.extend_from_slice(b"\r\n");
    }
}

/// Appends `name: value CRLF`, or nothing where the name is no token or the value holds a control byte.
pub(crate) fn push_field(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    if is_token(name.as_bytes()) && value.iter().all(|&b| is_value_byte(b)) {
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(b": ");
        out.extend_from_slice(value);
        out.extend_from_slice(b"\r\n");
    }
}

/// What a status is called (RFC 9110 section 15, RFC 6585, RFC 6455), or a name for its class.
pub const fn reason_phrase(status: u16) -> &'static str {
    match status {
        100 => "Continue",
        101 => "Switching Protocols",
        200 => "OK",
        201 => "Created",
        202 => "Accepted",
        204 => "No Content",
        206 => "Partial Content",
        301 => "Moved Permanently",
        302 => "Found",
        303 => "See Other",
        304 => "Not Modified",
        307 => "Temporary Redirect",
        308 => "Permanent Redirect",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        406 => "Not Acceptable",
        408 => "Request Timeout",
        409 => "Conflict",
        410 => "Gone",
        411 => "Length Required",
        412 => "Precondition Failed",
        413 => "Content Too Large",
        414 => "URI Too Long",
        415 => "Unsupported Media Type",
        417 => "Expectation Failed",
        421 => "Misdirected Request",
        422 => "Unprocessable Content",
        426 => "Upgrade Required",
        428 => "Precondition Required",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        505 => "HTTP Version Not Supported",
        _ => match status / 100 {
            1 => "Informational",
            2 => "Success",
            3 => "Redirection",
            4 => "Client Error",
            _ => "Server Error",
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(response: &Response) -> String {
        let mut out = Vec::new();
        response.write(&mut out);
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn dates_are_written_as_they_are_read() {
        assert_eq!(http_date(WallTime::from_secs(0)), "Thu, 01 Jan 1970 00:00:00 GMT");
        assert_eq!(http_date(WallTime::from_secs(784_111_777)), "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(http_date(WallTime::from_secs(951_782_400)), "Tue, 29 Feb 2000 00:00:00 GMT");
        assert_eq!(http_date(WallTime::from_secs(4_107_542_399)), "Sun, 28 Feb 2100 23:59:59 GMT");
        assert_eq!(http_date(WallTime::from_secs(4_107_542_400)), "Mon, 01 Mar 2100 00:00:00 GMT");
        for day in 0..80_000 {
            let at = WallTime::from_secs(day * 86_400 + day % 86_400);
            let written = http_date(at);
            assert_eq!(crate::codec::http_response::http_date(written.as_bytes(), at), Some(at), "{written}");
        }
    }

    #[test]
    fn a_body_is_counted() {
        let response = Response::new(200).header("ETag", "\"k-1\"").body("application/json", b"{}".as_slice());
        let head = "HTTP/1.1 200 OK\r\nETag: \"k-1\"\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n";
        assert_eq!(written(&response), format!("{head}{{}}"));
        assert_eq!(written(&response.head_only(true)), head, "HEAD has the fields of GET");
    }

    #[test]
    fn statuses_without_a_body_have_none() {
        for status in [100, 204, 304] {
            let text = written(&Response::new(status).body("text/plain", b"x".as_slice()));
            assert!(text.ends_with("\r\n\r\n") && !text.contains("Content-Length"), "{text}");
        }
        assert_eq!(written(&Response::new(200)), "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
        assert_eq!(written(&Response::new(7)), "HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n");
    }

    #[test]
    fn nothing_that_a_peer_sent_can_forge_an_answer() {
        let response = Response::new(204)
            .header("X-A", "a\r\nX-B: b")
            .header("X-C\r\nX-D", "c")
            .header("X-E", "e\0")
            .header("content-length", "5")
            .header("Transfer-Encoding", "chunked")
            .header("Connection", "upgrade")
            .header("X-F", "fine");
        assert_eq!(written(&response), "HTTP/1.1 204 No Content\r\nX-F: fine\r\n\r\n");
    }

    #[test]
    fn a_body_may_follow_later() {
        let chunked = Response::new(200).streamed("text/event-stream", Framing::Chunked);
        assert!(written(&chunked).ends_with("Transfer-Encoding: chunked\r\n\r\n"));
        let until_close = Response::new(200).streamed("text/event-stream", Framing::UntilClose);
        assert!(written(&until_close).ends_with("Connection: close\r\n\r\n"));
        let mut out = Vec::new();
        write_chunk(&mut out, b"");
        write_chunk(&mut out, b"0123456789abcdef");
        assert_eq!(out, b"10\r\n0123456789abcdef\r\n");
    }

    #[test]
    fn a_problem_says_what_is_wrong() {
        let text = written(&Response::problem(401, "INVALID_TOKEN", "the \"token\"\nis bad").close(true));
        let (head, body) = text.split_once("\r\n\r\n").expect("a head");
        assert!(
            head.starts_with(
                "HTTP/1.1 401 Unauthorized\r\nContent-Type: application/problem+json\r\nConnection: close"
            )
        );
        assert_eq!(
            body,
            r#"{"type":"about:blank","title":"Unauthorized","status":401,"code":"INVALID_TOKEN","detail":"the \"token\"\nis bad"}"#
        );
        assert!(head.ends_with(&format!("Content-Length: {}", body.len())));
    }
}
