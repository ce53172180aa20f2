//! The client side of HTTP/1.1: the bytes of an upstream's answer -> status, fields and the decoded body.
//!
//! Source: RFC 9112 (framing), RFC 9110 section 8.4 (content codings), RFC 1950, 1951, 1952.
//! Memory: one head of at most `head_bytes_max`, one body of at most `body_bytes_max` once inflated, and one inflater's
//! window (some 40 KiB) where the body is compressed. What is sent without end (heads, interim answers, chunk extensions,
//! compressed bytes that inflate to nothing) ends in an error.
//! Errors: [`ResponseError`], the upstream's fault each; [`ResponseError::fault`] sorts them as the protocol does.
//! Not here: sockets, time-outs (`runtime::fetch`), what a status means (`stream::poll`). Folded fields are refused.

mod cache;
mod date;
mod inflate;
mod request;

use std::fmt;
use std::ops::Range;

use crate::codec::http::{BodyError, ChunkedDecoder, elements, parse_content_length};
use crate::limits::{HEADERS_MAX, INTERIM_RESPONSES_MAX};

pub use cache::fresh_for;
pub use date::{http_date, retry_after};
use inflate::{Coding, Content};
pub use request::{Request, RequestError, check_header, write_request};

/// What one answer may cost.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ResponseLimits {
    /// Bytes of a status line and its fields.
    pub head_bytes_max: usize,
    /// Bytes of a body, inflated. The bytes on the wire may be an eighth and 4 KiB more, for codings that do not gain.
    pub body_bytes_max: u64,
}

/// How far an answer has come.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Progress {
    /// It is not whole.
    NeedMore,
    /// It is whole.
    Done,
}

/// Whom and what an error is about, as the codes of `stream_status` have it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ResponseFault {
    /// `UPSTREAM_PROTOCOL`.
    Protocol,
    /// `UPSTREAM_BODY`.
    Body,
    /// `UPSTREAM_TOO_LARGE`.
    TooLarge,
}

/// Why an answer was refused.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ResponseError {
    /// The connection ended before the first byte: a kept one was closed, the request may be sent again.
    #[error("the upstream closed the connection without an answer")]
    NoResponse,
    /// The connection ended within the answer.
    #[error("the upstream closed the connection within its answer")]
    Truncated,
    /// The status line or a field is malformed.
    #[error("the upstream's status line or a header field is malformed")]
    Head,
    /// The head is over `head_bytes_max`.
    #[error("the upstream's response head has more than {limit} bytes")]
    HeadTooLarge {
        /// The bytes allowed.
        limit: usize,
    },
    /// More fields than `HEADERS_MAX`.
    #[error("the upstream's response has more than {limit} header fields")]
    TooManyFields {
        /// The fields allowed.
        limit: usize,
    },
    /// More interim answers than `INTERIM_RESPONSES_MAX`.
    #[error("the upstream sent more than {INTERIM_RESPONSES_MAX} interim responses")]
    TooManyInterim,
    /// 101, which nobody asked for.
    #[error("the upstream switched protocols unasked")]
    SwitchingProtocols,
    /// `Content-Length` is not one number, or more than one and not the same.
    #[error("the upstream's Content-Length is not one decimal number")]
    ContentLength,
    /// `Content-Length` beside `Transfer-Encoding`.
    #[error("the upstream's Content-Length and Transfer-Encoding stand together")]
    LengthAndCoding,
    /// `Transfer-Encoding` is not `chunked` behind at most one of gzip and deflate, the content is compressed as well, or the
    /// version is HTTP/1.0, which has none.
    #[error("the upstream's Transfer-Encoding is not chunked, nor gzip or deflate and chunked, in HTTP/1.1")]
    TransferCoding,
    /// The chunked coding is malformed, or its extensions or trailers too many.
    #[error("the upstream's chunked body is malformed: {0}")]
    Chunked(BodyError),
    /// `Content-Encoding` is neither gzip nor deflate, or more than one.
    #[error("the upstream's Content-Encoding is neither gzip nor deflate")]
    ContentCoding,
    /// The compressed body does not inflate, or something stands behind it.
    #[error("the upstream's compressed body does not inflate")]
    Corrupt,
    /// The compressed body ends before its end.
    #[error("the upstream's compressed body is cut short")]
    CorruptEnd,
    /// The body is over `body_bytes_max`.
    #[error("the upstream's response body has more than {limit} bytes")]
    TooLarge {
        /// The bytes allowed.
        limit: u64,
    },
}

impl ResponseError {
    /// What it is about.
    pub const fn fault(self) -> ResponseFault {
        match self {
            ResponseError::ContentCoding | ResponseError::Corrupt | ResponseError::CorruptEnd => ResponseFault::Body,
            ResponseError::TooLarge { .. } => ResponseFault::TooLarge,
            _ => ResponseFault::Protocol,
        }
    }
}

/// Decodes one answer, fed as it comes. The outcome does not depend on how the bytes were split.
pub struct ResponseDecoder {
    limits: ResponseLimits,
    method_is_head: bool,
    state: State,
    /// The bytes of the head that is being read, or was: the places in `fields` are in here.
    head: Vec<u8>,
    fields: Vec<FieldPlace>,
    /// Set when the final head is whole.
    status: Option<u16>,
    keep_alive: bool,
    until_close: bool,
    interim: u8,
    /// Whether bytes came behind the answer's end.
    surplus: bool,
    content: Content,
}

enum State {
    Head,
    Body(Framing),
    Done,
    Failed(ResponseError),
}

enum Framing {
    Counted { left: u64 },
    Chunked(ChunkedDecoder),
    UntilClose,
}

struct FieldPlace {
    name: Range<usize>,
    value: Range<usize>,
}

impl ResponseDecoder {
    /// A decoder of the answer to one request; one to HEAD has no body.
    pub fn new(limits: ResponseLimits, method_is_head: bool) -> ResponseDecoder {
        ResponseDecoder {
            limits,
            method_is_head,
            state: State::Head,
            head: Vec::new(),
            fields: Vec::new(),
            status: None,
            keep_alive: false,
            until_close: false,
            interim: 0,
            surplus: false,
            content: Content::new(Coding::Identity, limits.body_bytes_max),
        }
    }

    /// Reads on. All of `input` is taken; what stands behind the answer's end is dropped and noted.
    ///
    /// # Errors
    /// [`ResponseError`], the same one again if fed again. What the head said stays readable after an error in the body,
    /// so that a caller can judge by the status first.
    pub fn feed(&mut self, input: &[u8]) -> Result<Progress, ResponseError> {
        let progress = self.advance(input);
        if let Err(error) = progress {
            self.state = State::Failed(error);
        }
        progress
    }

    /// Tells that the connection ended.
    ///
    /// # Errors
    /// [`ResponseError::NoResponse`], [`ResponseError::Truncated`] or [`ResponseError::CorruptEnd`] where the answer is
    /// not whole; the error of `feed` where there was one.
    pub fn eof(&mut self) -> Result<Progress, ResponseError> {
        let ended = match &self.state {
            State::Head if self.head.is_empty() && self.interim == 0 => Err(ResponseError::NoResponse),
            State::Head | State::Body(Framing::Counted { .. } | Framing::Chunked(_)) => Err(ResponseError::Truncated),
            State::Body(Framing::UntilClose) => self.content.finish(),
            State::Done => Ok(()),
            State::Failed(error) => Err(*error),
        };
        self.state = match ended {
            Ok(()) => State::Done,
            Err(error) => State::Failed(error),
        };
        ended.map(|()| Progress::Done)
    }

    /// The status of the final answer, once its head is whole.
    pub fn status(&self) -> Option<u16> {
        self.status
    }

    /// The first value of a field of the final answer, without the white space around it. Names have no case.
    pub fn header(&self, name: &str) -> Option<&[u8]> {
        self.headers(name).next()
    }

    /// The values of every field of that name, in order.
    pub fn headers(&self, name: &str) -> impl Iterator<Item = &[u8]> {
        let readable = self.status.is_some();
        let same = move |place: &&FieldPlace| {
            readable && self.head.get(place.name.clone()).is_some_and(|this| this.eq_ignore_ascii_case(name.as_bytes()))
        };
        self.fields.iter().filter(same).filter_map(|place| self.head.get(place.value.clone()))
    }

    /// Whether the upstream lets the connection go on after this answer.
    pub fn keep_alive(&self) -> bool {
        self.keep_alive
    }

    /// Whether the connection may carry another request: the answer is whole, says so, and nothing came behind it.
    pub fn is_reusable(&self) -> bool {
        matches!(self.state, State::Done) && self.keep_alive && !self.until_close && !self.surplus
    }

    /// How many bytes of the body have been decoded and not been taken.
    pub fn decoded_bytes(&self) -> u64 {
        self.content.body_bytes()
    }

    /// Takes what has been decoded of the body, codings undone; all of it once the answer is [`Progress::Done`].
    pub fn take_body(&mut self) -> Vec<u8> {
        self.content.take_body()
    }

    fn advance(&mut self, mut input: &[u8]) -> Result<Progress, ResponseError> {
        if matches!(self.state, State::Head) {
            match self.read_heads(input)? {
                Some(rest) => input = rest,
                None => return Ok(Progress::NeedMore),
            }
        }
        let whole = match &mut self.state {
            State::Failed(error) => return Err(*error),
            State::Head => false,
            State::Done => true,
            State::Body(Framing::UntilClose) => {
                self.content.push(input)?;
                input = &[];
                false
            }
            State::Body(Framing::Counted { left }) => {
                let data = usize::try_from(*left).ok().and_then(|left| input.get(..left)).unwrap_or(input);
                self.content.push(data)?;
                *left -= data.len() as u64;
                input = input.get(data.len()..).unwrap_or_default();
                *left == 0
            }
            State::Body(Framing::Chunked(chunked)) => {
                while !input.is_empty() && !chunked.is_done() {
                    let (step, data) = chunked.step(input).map_err(|error| match error {
                        BodyError::TooLarge { .. } => ResponseError::TooLarge { limit: self.limits.body_bytes_max },
                        error => ResponseError::Chunked(error),
                    })?;
                    self.content.push(data)?;
                    input = input.get(step..).unwrap_or_default();
                }
                chunked.is_done()
            }
        };
        if !whole {
            return Ok(Progress::NeedMore);
        }
        if !matches!(self.state, State::Done) {
            self.content.finish()?;
            self.state = State::Done;
        }
        self.surplus |= !input.is_empty();
        Ok(Progress::Done)
    }

    /// Reads heads up to the final one; what stands behind that, once it is whole.
    fn read_heads<'i>(&mut self, mut input: &'i [u8]) -> Result<Option<&'i [u8]>, ResponseError> {
        loop {
            let before = self.head.len();
            let room = self.limits.head_bytes_max.saturating_sub(before);
            self.head.extend_from_slice(input.get(..room).unwrap_or(input));
            let Some(parsed) = parse_head(&self.head, &mut self.fields)? else {
                if self.head.len() >= self.limits.head_bytes_max {
                    return Err(ResponseError::HeadTooLarge { limit: self.limits.head_bytes_max });
                }
                return Ok(None);
            };
            input = input.get(parsed.len.saturating_sub(before)..).unwrap_or_default();
            self.head.truncate(parsed.len);
            match parsed.status {
                101 => return Err(ResponseError::SwitchingProtocols),
                100..=199 if self.interim == INTERIM_RESPONSES_MAX => return Err(ResponseError::TooManyInterim),
                100..=199 => {
                    self.interim += 1;
                    self.head.clear();
                    self.fields.clear();
                    if input.is_empty() {
                        return Ok(None);
                    }
                }
                status => {
                    self.status = Some(status);
                    self.open_body(status, parsed.minor_version)?;
                    return Ok(Some(input));
                }
            }
        }
    }

    /// Decides how the body is framed and coded (RFC 9112 section 6.3).
    fn open_body(&mut self, status: u16, minor_version: u8) -> Result<(), ResponseError> {
        let closes = self.tokens("connection").any(|token| token.eq_ignore_ascii_case(b"close"));
        self.keep_alive = minor_version == 1 && !closes;
        let (framing, transfer) = self.framing(minor_version)?;
        if self.method_is_head || matches!(status, 204 | 304) || matches!(framing, Framing::Counted { left: 0 }) {
            self.state = State::Done;
            return Ok(());
        }
        let coding = match (transfer, self.coding(status)?) {
            (Coding::Identity, content) => content,
            (transfer, Coding::Identity) => transfer,
            (_, Coding::Dropped) => Coding::Dropped,
            _ => return Err(ResponseError::TransferCoding),
        };
        let wire_bytes_max = coding.wire_bytes_max(self.limits.body_bytes_max);
        self.content = Content::new(coding, self.limits.body_bytes_max);
        self.state = State::Body(match framing {
            Framing::Counted { left } if left > wire_bytes_max => {
                return Err(ResponseError::TooLarge { limit: self.limits.body_bytes_max });
            }
            Framing::Chunked(_) => Framing::Chunked(ChunkedDecoder::new(wire_bytes_max)),
            framing => framing,
        });
        self.until_close = matches!(self.state, State::Body(Framing::UntilClose));
        Ok(())
    }

    /// How the end of the body is told, by the fields alone, and how it is compressed for its way.
    fn framing(&self, minor_version: u8) -> Result<(Framing, Coding), ResponseError> {
        let coded = self.headers("transfer-encoding").next().is_some();
        match self.content_length()? {
            Some(_) if coded => Err(ResponseError::LengthAndCoding),
            Some(left) => Ok((Framing::Counted { left }, Coding::Identity)),
            None if coded => {
                let mut codings = self.tokens("transfer-encoding");
                let is_chunked = |coding: &[u8]| coding.eq_ignore_ascii_case(b"chunked");
                let transfer = match (codings.next(), codings.next(), codings.next()) {
                    (Some(chunked), None, None) if is_chunked(chunked) => Some(Coding::Identity),
                    (Some(coding), Some(chunked), None) if is_chunked(chunked) => Coding::named(coding),
                    _ => None,
                };
                // RFC 9112 6.1: with HTTP/1.0 a transfer coding means that the framing is faulty.
                let transfer = transfer.filter(|_| minor_version > 0).ok_or(ResponseError::TransferCoding)?;
                Ok((Framing::Chunked(ChunkedDecoder::new(0)), transfer))
            }
            None => Ok((Framing::UntilClose, Coding::Identity)),
        }
    }

    /// The one number that all `Content-Length` say: an intermediary may have doubled it (RFC 9112 section 6.3, fifth).
    fn content_length(&self) -> Result<Option<u64>, ResponseError> {
        let mut length = None;
        for value in self.headers("content-length").flat_map(|value| value.split(|b| *b == b',')) {
            let this = parse_content_length(value.trim_ascii()).ok_or(ResponseError::ContentLength)?;
            if length.replace(this).is_some_and(|other| other != this) {
                return Err(ResponseError::ContentLength);
            }
        }
        Ok(length)
    }

    fn coding(&self, status: u16) -> Result<Coding, ResponseError> {
        let mut codings = self.tokens("content-encoding").filter(|coding| !coding.eq_ignore_ascii_case(b"identity"));
        let Some(coding) = codings.next() else {
            return Ok(Coding::Identity);
        };
        let known = Coding::named(coding).filter(|_| codings.next().is_none());
        match known {
            Some(coding) => Ok(coding),
            None if (200..=299).contains(&status) => Err(ResponseError::ContentCoding),
            // What an error page is coded in matters to nobody: its status is the news.
            None => Ok(Coding::Dropped),
        }
    }

    fn tokens(&self, name: &str) -> impl Iterator<Item = &[u8]> {
        self.headers(name).flat_map(|value| elements(value, b','))
    }
}

impl fmt::Debug for ResponseDecoder {
    // Fields and body may hold secrets.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseDecoder")
            .field("status", &self.status)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

struct ParsedHead {
    len: usize,
    status: u16,
    minor_version: u8,
}

/// Reads a response head and notes where its fields stand; `None` while it is incomplete.
fn parse_head(head: &[u8], places: &mut Vec<FieldPlace>) -> Result<Option<ParsedHead>, ResponseError> {
    let mut fields = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut fields);
    let len = match response.parse(head) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(ResponseError::TooManyFields { limit: HEADERS_MAX }),
        Err(_) => return Err(ResponseError::Head),
    };
    let (Some(status @ 100..=599), Some(minor_version)) = (response.code, response.version) else {
        return Err(ResponseError::Head);
    };
    let place = |part: &[u8]| {
        let start = (part.as_ptr() as usize).saturating_sub(head.as_ptr() as usize);
        start..start + part.len()
    };
    places.clear();
    places.extend(
        response
            .headers
            .iter()
            .map(|field| FieldPlace { name: place(field.name.as_bytes()), value: place(field.value) }),
    );
    Ok(Some(ParsedHead { len, status, minor_version }))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::{DeflateEncoder, GzEncoder, ZlibEncoder};
    use proptest::prelude::{any, prop_assert_eq, proptest};

    use super::*;

    const LIMITS: ResponseLimits = ResponseLimits { head_bytes_max: 1024, body_bytes_max: 1000 };

    /// What comes of an answer: status, body, and whether the connection may be used again.
    type Outcome = Result<(u16, Vec<u8>, bool), ResponseError>;

    /// Feeds `wire` in pieces of these sizes, over and over, and ends the connection if the answer is not whole by then.
    fn split(limits: ResponseLimits, wire: &[u8], pieces: &[usize]) -> Outcome {
        let mut decoder = ResponseDecoder::new(limits, false);
        let mut sizes = pieces.iter().cycle();
        let mut rest = wire;
        while !rest.is_empty() {
            let size = *sizes.next().expect("some pieces");
            let (piece, after) = rest.split_at_checked(size).unwrap_or((rest, &[]));
            decoder.feed(piece)?;
            rest = after;
        }
        decoder.eof()?;
        Ok((decoder.status().expect("a head"), decoder.take_body(), decoder.is_reusable()))
    }

    fn outcome_within(limits: ResponseLimits, wire: &[u8]) -> Outcome {
        let whole = split(limits, wire, &[usize::MAX]);
        for pieces in [&[1][..], &[2, 1, 3], &[7], &[64, 1]] {
            assert_eq!(split(limits, wire, pieces), whole, "in pieces of {pieces:?}");
        }
        whole
    }

    fn outcome(wire: &[u8]) -> Outcome {
        outcome_within(LIMITS, wire)
    }

    fn text(wire: &str) -> Result<(u16, String, bool), ResponseError> {
        outcome(wire.as_bytes())
            .map(|(status, body, reusable)| (status, String::from_utf8(body).expect("text"), reusable))
    }

    fn with_body(lines: &str, body: &[u8]) -> Vec<u8> {
        let head = format!("HTTP/1.1 200 OK\r\n{lines}Content-Length: {}\r\n\r\n", body.len());
        [head.as_bytes(), body].concat()
    }

    fn gzip(body: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(body).and_then(|()| encoder.finish()).expect("writes to memory")
    }

    fn zlib(body: &[u8]) -> Vec<u8> {
        let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(body).and_then(|()| encoder.finish()).expect("writes to memory")
    }

    fn raw_deflate(body: &[u8]) -> Vec<u8> {
        let mut encoder = DeflateEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(body).and_then(|()| encoder.finish()).expect("writes to memory")
    }

    fn ok(body: &str, reusable: bool) -> Result<(u16, String, bool), ResponseError> {
        Ok((200, body.to_owned(), reusable))
    }

    #[test]
    fn bodies_end_in_three_ways() {
        assert_eq!(text("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"), ok("{}", true));
        assert_eq!(
            text("HTTP/1.1 200 OK\r\nTransfer-Encoding: CHUNKED\r\n\r\n2\r\n{}\r\n0\r\nA: b\r\n\r\n"),
            ok("{}", true)
        );
        assert_eq!(text("HTTP/1.1 200 OK\r\n\r\n{}"), ok("{}", false));
        assert_eq!(text("HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}"), ok("{}", false));
        assert_eq!(text("HTTP/1.1 200\r\nConnection: x, Close\r\nContent-Length: 0\r\n\r\n"), ok("", false));
    }

    #[test]
    fn some_answers_have_no_body() {
        assert_eq!(
            text("HTTP/1.1 304 Not Modified\r\nETag: \"a\"\r\nContent-Length: 9\r\n\r\n"),
            Ok((304, String::new(), true))
        );
        assert_eq!(text("HTTP/1.1 204 No Content\r\n\r\n"), Ok((204, String::new(), true)));
        let mut to_head = ResponseDecoder::new(LIMITS, true);
        assert_eq!(to_head.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"), Ok(Progress::Done));
        assert!(to_head.is_reusable());
    }

    #[test]
    fn surplus_bytes_spoil_the_connection_but_not_the_answer() {
        assert_eq!(text("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\n"), ok("{}", false));
        assert_eq!(text("HTTP/1.1 204 No Content\r\n\r\nx"), Ok((204, String::new(), false)));
    }

    #[test]
    fn interim_answers_are_read_over_8_times() {
        let wire = |count: u8| {
            let interim = "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n".repeat(usize::from(count));
            format!("{interim}HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx")
        };
        assert_eq!(text(&wire(INTERIM_RESPONSES_MAX)), ok("x", true));
        assert_eq!(text(&wire(INTERIM_RESPONSES_MAX + 1)), Err(ResponseError::TooManyInterim));
        assert_eq!(text("HTTP/1.1 101 Switching Protocols\r\n\r\n"), Err(ResponseError::SwitchingProtocols));
    }

    #[test]
    fn fields_are_those_of_the_final_answer() {
        let mut decoder = ResponseDecoder::new(LIMITS, false);
        assert_eq!(decoder.feed(b"HTTP/1.1 100 Continue\r\nETag: \"no\"\r\n\r\n"), Ok(Progress::NeedMore));
        assert_eq!((decoder.status(), decoder.header("etag")), (None, None));
        assert_eq!(
            decoder.feed(b"HTTP/1.1 404 No\r\nETag:  \"a\" \r\nX:\r\nlink: 1\r\nLINK: 2\r\nContent-"),
            Ok(Progress::NeedMore)
        );
        assert_eq!(decoder.feed(b"Length: 3\r\n\r\nabc"), Ok(Progress::Done));
        assert_eq!(decoder.status(), Some(404));
        assert_eq!((decoder.header("ETAG"), decoder.header("x")), (Some(&b"\"a\""[..]), Some(&b""[..])));
        assert_eq!(decoder.headers("Link").collect::<Vec<_>>(), [b"1", b"2"]);
        assert_eq!(decoder.take_body(), b"abc");
    }

    #[test]
    fn framing_that_is_in_doubt_is_refused() {
        for (lines, error) in [
            ("Content-Length: 1\r\nTransfer-Encoding: chunked\r\n", ResponseError::LengthAndCoding),
            (
                "Content-Length: 1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n",
                ResponseError::LengthAndCoding,
            ),
            ("Content-Length: 1\r\nContent-Length: 2\r\n", ResponseError::ContentLength),
            ("Content-Length: 1, 2\r\n", ResponseError::ContentLength),
            ("Content-Length: 1,\r\n", ResponseError::ContentLength),
            ("Content-Length: 1\r\nContent-Length:\r\n", ResponseError::ContentLength),
            ("Content-Length: 1 1\r\n", ResponseError::ContentLength),
            ("Content-Length: x\r\n", ResponseError::ContentLength),
            ("Transfer-Encoding: br, chunked\r\n", ResponseError::TransferCoding),
            ("Transfer-Encoding: identity, chunked\r\n", ResponseError::TransferCoding),
            ("Transfer-Encoding: gzip\r\n", ResponseError::TransferCoding),
            ("Transfer-Encoding: chunked, gzip\r\n", ResponseError::TransferCoding),
            ("Transfer-Encoding: gzip, deflate, chunked\r\n", ResponseError::TransferCoding),
            ("Transfer-Encoding: gzip, chunked\r\nContent-Encoding: gzip\r\n", ResponseError::TransferCoding),
            ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", ResponseError::TransferCoding),
            ("Transfer-Encoding: identity\r\n", ResponseError::TransferCoding),
            ("Transfer-Encoding:\r\n", ResponseError::TransferCoding),
            ("A : b\r\n", ResponseError::Head),
            ("A: b\r\n c\r\n", ResponseError::Head),
            ("A: b\0\r\n", ResponseError::Head),
        ] {
            assert_eq!(text(&format!("HTTP/1.1 200 OK\r\n{lines}\r\nx")), Err(error), "{lines:?}");
            assert_eq!(error.fault(), ResponseFault::Protocol);
        }
        for line in [
            "HTTP/2 200\r\n\r\n",
            "HTTP/1.1 99 No\r\n\r\n",
            "HTTP/1.1 099 No\r\n\r\n",
            "HTTP/1.1 600 No\r\n\r\n",
            "nonsense",
        ] {
            assert_eq!(text(line), Err(ResponseError::Head), "{line:?}");
        }
        let coded_1_0 = "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n";
        assert_eq!(text(coded_1_0), Err(ResponseError::TransferCoding));
        let bad_chunk = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n";
        assert_eq!(text(bad_chunk), Err(ResponseError::Chunked(BodyError::ChunkSize)));
    }

    #[test]
    fn a_length_that_an_intermediary_has_doubled_is_the_length() {
        for lines in
            ["Content-Length: 2\r\nContent-Length: 2\r\n", "Content-Length: 2, 2\r\n", "Content-Length: 2 ,02\r\n"]
        {
            assert_eq!(text(&format!("HTTP/1.1 200 OK\r\n{lines}\r\n{{}}")), ok("{}", true), "{lines:?}");
        }
    }

    #[test]
    fn a_body_that_was_compressed_for_its_way_is_inflated_within_the_same_bounds() {
        let value = "[1,2,3]".repeat(20);
        let sent = |lines: &str, limit: u64| {
            let body = gzip(value.as_bytes());
            let head = format!("HTTP/1.1 200 OK\r\n{lines}\r\n{:x}\r\n", body.len());
            let wire = [head.as_bytes(), &body, b"\r\n0\r\n\r\n"].concat();
            let mut decoder = ResponseDecoder::new(ResponseLimits { body_bytes_max: limit, ..LIMITS }, false);
            decoder.feed(&wire).map(|progress| (progress, decoder.take_body()))
        };
        let whole = value.len() as u64;
        for coding in ["gzip, chunked", "X-GZIP ,chunked", "gzip\r\nTransfer-Encoding: chunked"] {
            let lines = format!("Transfer-Encoding: {coding}\r\n");
            assert_eq!(sent(&lines, whole), Ok((Progress::Done, value.clone().into_bytes())), "{coding}");
            assert_eq!(sent(&lines, whole - 1), Err(ResponseError::TooLarge { limit: whole - 1 }), "{coding}");
        }
        assert_eq!(sent("Transfer-Encoding: deflate, chunked\r\n", whole), Err(ResponseError::Corrupt));
    }

    #[test]
    fn an_end_within_an_answer_is_told_from_one_before_it() {
        assert_eq!(text(""), Err(ResponseError::NoResponse));
        for wire in [
            "HTTP/1.1 2",
            "HTTP/1.1 100 Continue\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{",
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n",
        ] {
            assert_eq!(text(wire), Err(ResponseError::Truncated), "{wire:?}");
        }
    }

    #[test]
    fn an_error_stays() {
        let mut decoder = ResponseDecoder::new(LIMITS, false);
        let error = decoder.feed(b"HTTP/1.1 200 OK\r\nContent-Encoding: br\r\n\r\n").expect_err("unknown coding");
        assert_eq!(decoder.feed(b"x"), Err(error));
        assert_eq!(decoder.eof(), Err(error));
        assert_eq!(decoder.status(), Some(200), "the head stays readable");
        assert!(!decoder.is_reusable());
    }

    #[test]
    fn a_head_may_have_as_many_bytes_and_fields_as_allowed_and_not_one_more() {
        let with = |bytes: usize| {
            let rest = bytes - "HTTP/1.1 204 No\r\nA: \r\n\r\n".len();
            format!("HTTP/1.1 204 No\r\nA: {}\r\n\r\n", "a".repeat(rest))
        };
        assert_eq!(text(&with(1024)), Ok((204, String::new(), true)));
        assert_eq!(text(&with(1025)), Err(ResponseError::HeadTooLarge { limit: 1024 }));
        let fields = |count: usize| format!("HTTP/1.1 204 No\r\n{}\r\n", "A: b\r\n".repeat(count));
        assert_eq!(text(&fields(HEADERS_MAX)), Ok((204, String::new(), true)));
        assert_eq!(text(&fields(HEADERS_MAX + 1)), Err(ResponseError::TooManyFields { limit: HEADERS_MAX }));
    }

    #[test]
    fn a_body_may_have_as_many_bytes_as_allowed_and_not_one_more() {
        let over = Err(ResponseError::TooLarge { limit: 1000 });
        for (bytes, fits) in [(1000, true), (1001, false)] {
            let body = vec![b'a'; bytes];
            let size = format!("{bytes:x}\r\n");
            let chunked = [
                b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".as_slice(),
                size.as_bytes(),
                &body,
                b"\r\n0\r\n\r\n",
            ];
            for wire in [
                with_body("", &body),
                [b"HTTP/1.1 200 OK\r\n\r\n".as_slice(), &body].concat(),
                chunked.concat(),
                with_body("Content-Encoding: gzip\r\n", &gzip(&body)),
                with_body("Content-Encoding: deflate\r\n", &zlib(&body)),
                with_body("Content-Encoding: deflate\r\n", &raw_deflate(&body)),
            ] {
                let wanted = if fits { Ok(body.clone()) } else { over.clone() };
                assert_eq!(outcome(&wire).map(|(_, body, _)| body), wanted, "{bytes} bytes");
            }
        }
        assert_eq!(ResponseError::TooLarge { limit: 1000 }.fault(), ResponseFault::TooLarge);
    }

    #[test]
    fn codings_are_undone() {
        let body = b"{\"items\":[1,2,3,1,2,3,1,2,3]}";
        for (coding, coded) in [
            ("gzip", gzip(body)),
            ("X-GZIP, identity", gzip(body)),
            ("deflate", zlib(body)),
            ("deflate", raw_deflate(body)),
            ("identity", body.to_vec()),
        ] {
            let wire = with_body(&format!("Content-Encoding: {coding}\r\n"), &coded);
            assert_eq!(outcome(&wire), Ok((200, body.to_vec(), true)), "{coding}");
        }
        let members = [gzip(b"one, "), gzip(b""), gzip(b"two")].concat();
        let wire = with_body("Content-Encoding: gzip\r\n", &members);
        assert_eq!(outcome(&wire), Ok((200, b"one, two".to_vec(), true)));
        assert_eq!(outcome(&with_body("Content-Encoding: gzip\r\n", b"")), Ok((200, Vec::new(), true)));
    }

    #[test]
    fn a_compressed_body_that_does_not_inflate_is_a_body_error() {
        let good = gzip(b"hello, hello, hello");
        let mut bad_sum = good.clone();
        *bad_sum.iter_mut().nth_back(5).expect("a trailer") ^= 1;
        let cut = good.get(..good.len() - 1).expect("long enough");
        let garbage = [&good[..], b"x"].concat();
        let zeros = [&good[..], &[0; 20]].concat();
        let after_zlib = [&zlib(b"hello")[..], b"x"].concat();
        for (coding, coded, error) in [
            ("gzip", &bad_sum[..], ResponseError::Corrupt),
            ("gzip", cut, ResponseError::CorruptEnd),
            ("gzip", &garbage, ResponseError::CorruptEnd),
            ("gzip", &zeros, ResponseError::Corrupt),
            ("gzip", b"{}", ResponseError::Corrupt),
            ("deflate", &after_zlib, ResponseError::Corrupt),
            ("deflate", b"\x78", ResponseError::CorruptEnd),
            ("deflate", b"\x78\x9c", ResponseError::CorruptEnd),
            ("deflate", b"{}", ResponseError::CorruptEnd),
            ("deflate", b"\x07\x00", ResponseError::Corrupt),
            ("br", b"x", ResponseError::ContentCoding),
            ("gzip, gzip", b"x", ResponseError::ContentCoding),
        ] {
            let found = outcome(&with_body(&format!("Content-Encoding: {coding}\r\n"), coded)).expect_err("a bad body");
            assert_eq!(found, error, "{coding} {coded:?}");
            assert_eq!(found.fault(), ResponseFault::Body);
        }
    }

    #[test]
    fn the_coding_of_an_error_page_is_no_error() {
        let wire = "HTTP/1.1 503 Busy\r\nContent-Encoding: br\r\nContent-Length: 3\r\n\r\nabc";
        assert_eq!(text(wire), Ok((503, String::new(), true)));
    }

    #[test]
    fn a_bomb_stops_at_the_limit() {
        let bomb = gzip(&vec![0; 1 << 20]);
        assert!(bomb.len() < 1 << 12);
        let limits = ResponseLimits { body_bytes_max: 1 << 14, ..LIMITS };
        let mut decoder = ResponseDecoder::new(limits, false);
        let wire = with_body("Content-Encoding: gzip\r\n", &bomb);
        assert_eq!(decoder.feed(&wire), Err(ResponseError::TooLarge { limit: 1 << 14 }));
        assert!(decoder.take_body().capacity() <= 1 << 15);
    }

    #[test]
    fn compressed_bytes_that_inflate_to_nothing_are_bounded() {
        // Stored blocks of no bytes: five of them say nothing, for ever.
        let nothing = [0u8, 0, 0, 0xff, 0xff].repeat(2000);
        let wire = [b"HTTP/1.1 200 OK\r\nContent-Encoding: deflate\r\n\r\n".as_slice(), &nothing].concat();
        assert_eq!(outcome(&wire), Err(ResponseError::TooLarge { limit: 1000 }));
        let limits = ResponseLimits { body_bytes_max: 1 << 20, ..LIMITS };
        let members = gzip(b"").repeat(1025);
        let wire = with_body("Content-Encoding: gzip\r\n", &members);
        assert_eq!(split(limits, &wire, &[usize::MAX]), Err(ResponseError::Corrupt));
        let members = gzip(b"").repeat(1024);
        let wire = with_body("Content-Encoding: gzip\r\n", &members);
        assert_eq!(split(limits, &wire, &[usize::MAX]), Ok((200, Vec::new(), true)));
    }

    proptest! {
        #[test]
        fn any_body_reads_back_however_sent_and_split(
            body in proptest::collection::vec(any::<u8>(), 0..900), repeat in 1usize..3,
            chunk in 1usize..200, coding in 0u8..4, pieces in proptest::collection::vec(1usize..90, 1..8),
        ) {
            let body = body.repeat(repeat);
            let limits = ResponseLimits { body_bytes_max: 2000, ..LIMITS };
            let (name, coded) = match coding {
                0 => ("identity", body.clone()),
                1 => ("gzip", gzip(&body)),
                2 => ("deflate", zlib(&body)),
                _ => ("deflate", raw_deflate(&body)),
            };
            let mut wire = format!("HTTP/1.1 200 OK\r\nContent-Encoding: {name}\r\nTransfer-Encoding: chunked\r\n\r\n").into_bytes();
            for part in coded.chunks(chunk) {
                crate::codec::http::write_chunk(&mut wire, part);
            }
            wire.extend_from_slice(crate::codec::http::LAST_CHUNK);
            prop_assert_eq!(split(limits, &wire, &pieces), Ok((200, body, true)));
        }

        #[test]
        fn any_split_of_a_broken_answer_ends_alike(
            at in any::<proptest::sample::Index>(), byte in any::<u8>(), limit in 0u64..60,
            pieces in proptest::collection::vec(1usize..30, 1..8),
        ) {
            let coded = gzip(b"hello, hello, hello, and more");
            let mut wire = b"HTTP/1.1 102 Wait\r\n\r\nHTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
            for part in coded.chunks(9) {
                crate::codec::http::write_chunk(&mut wire, part);
            }
            wire.extend_from_slice(b"0\r\nA: b\r\n\r\n");
            let at = at.index(wire.len());
            *wire.get_mut(at).expect("in bounds") = byte;
            let limits = ResponseLimits { head_bytes_max: 100, body_bytes_max: limit };
            prop_assert_eq!(split(limits, &wire, &pieces), split(limits, &wire, &[usize::MAX]));
        }
    }
}
