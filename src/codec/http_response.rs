//! The client side of HTTP/1.1: the bytes of an upstream's answer -> status, fields and the decoded body.
//!
//! Source: RFC 9112 (framing), RFC 9110 section 8.4 (content codings), RFC 1950, 1951, 1952.
//! Memory: one head of at most `head_bytes_max`, one body of at most `body_bytes_max` once inflated, and one inflater's
//! window (some 40 KiB) where the body is compressed. What is sent without end (heads, interim answers, chunk extensions,
//! compressed bytes that inflate to nothing) ends in an error.
//! Errors: [`ResponseError`], the upstream's fault each; [`ResponseError::fault`] sorts them as the protocol does.
//! Not here: sockets, time-outs (`runtime::fetch`), what a status means (`stream::poll`). Folded fields are refused.

mod date;
mod inflate;
mod request;

use std::fmt;
use std::ops::Range;

use crate::codec::http::{BodyError, ChunkedDecoder, elements, parse_content_length};
use crate::limits::HEADERS_MAX;

pub use date::{RETRY_AFTER_MAX, http_date, retry_after};
use inflate::{Coding, Content};
pub use request::{Request, RequestError, check_header, write_request};

/// Interim (1xx) answers before the final one.
pub const INTERIM_MAX: u8 = 8;

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
    /// More interim answers than [`INTERIM_MAX`].
    #[error("the upstream sent more than {INTERIM_MAX} interim responses")]
    TooManyInterim,
    /// 101, which nobody asked for.
    #[error("the upstream switched protocols unasked")]
    SwitchingProtocols,
    /// `Content-Length` is not one number, once.
    #[error("the upstream's Content-Length is not one decimal number")]
    ContentLength,
    /// `Content-Length` beside `Transfer-Encoding`.
    #[error("the upstream's Content-Length and Transfer-Encoding stand together")]
    LengthAndCoding,
    /// `Transfer-Encoding` is not `chunked`, or the version is HTTP/1.0, which has none.
    #[error("the upstream's Transfer-Encoding is not chunked alone, in HTTP/1.1")]
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
                100..=199 if self.interim == INTERIM_MAX => return Err(ResponseError::TooManyInterim),
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
        let framing = self.framing(minor_version)?;
        if self.method_is_head || matches!(status, 204 | 304) || matches!(framing, Framing::Counted { left: 0 }) {
            self.state = State::Done;
            return Ok(());
        }
        let coding = self.coding(status)?;
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

    /// How the end of the body is told, by the fields alone.
    fn framing(&self, minor_version: u8) -> Result<Framing, ResponseError> {
        let mut lengths = self.headers("content-length");
        let length = lengths.next();
        if lengths.next().is_some() {
            return Err(ResponseError::ContentLength);
        }
        let coded = self.headers("transfer-encoding").next().is_some();
        match length {
            Some(_) if coded => Err(ResponseError::LengthAndCoding),
            Some(value) => {
                let left = parse_content_length(value).ok_or(ResponseError::ContentLength)?;
                Ok(Framing::Counted { left })
            }
            None if coded => {
                let mut codings = self.tokens("transfer-encoding");
                let chunked = codings.next().is_some_and(|coding| coding.eq_ignore_ascii_case(b"chunked"));
                // RFC 9112 6.1: with HTTP/1.0 a transfer coding means that the framing is faulty.
                if !chunked || codings.next().is_some() || minor_version == 0 {
                    return Err(ResponseError::TransferCoding);
                }
                Ok(Framing::Chunked(ChunkedDecoder::new(0)))
            }
            None => Ok(Framing::UntilClose),
        }
    }

    fn coding(&self, status: u16) -> Result<Coding, ResponseError> {
        let mut codings = self.tokens("content-encoding").filter(|coding| !coding.eq_ignore_ascii_case(b"identity"));
        let Some(coding) = codings.next() else {
            return Ok(Coding::Identity);
        };
        let is = |names: &[&str]| names.iter().any(|name| coding.eq_ignore_ascii_case(name.as_bytes()));
        let single = codings.next().is_none();
        if single && is(&["gzip", "x-gzip"]) {
            Ok(Coding::gzip())
        } else if single && is(&["deflate"]) {
            Ok(Coding::deflate())
        } else if (200..=299).contains(&status) {
            Err(ResponseError::ContentCoding)
        } else {
            // What an error page is coded in matters to nobody: its status is the news.
            Ok(Coding::Dropped)
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
