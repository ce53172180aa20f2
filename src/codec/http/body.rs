//! Message bodies: the chunked coding of both directions, and the small bodies that requests may have.
//!
//! Source: RFC 9112 sections 6 and 7.1.
//! Memory: some 40 bytes a decoder; what it decodes goes straight to the caller. Chunk extensions and trailers are read
//! over, and both are bounded, so that an endless one ends.
//! Errors: [`BodyError`].  Not here: content codings (`codec::http_response`).

use super::{BodyLength, Head, is_token_byte, is_value_byte};
use crate::limits::{CHUNK_EXTENSION_BYTES_MAX, REQUEST_BODY_BYTES_MAX, TRAILER_BYTES_MAX};

/// Digits of a chunk's size.
const SIZE_DIGITS_MAX: u8 = 16;

/// Why a body was refused. All of them are the peer's fault; the connection cannot go on.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum BodyError {
    /// 413: more bytes than allowed.
    #[error("the body has more than {limit} bytes")]
    TooLarge {
        /// The bytes allowed.
        limit: u64,
    },
    /// 400: a chunk does not begin with its size in 1 to 16 hexadecimal digits.
    #[error("a chunk does not begin with its size")]
    ChunkSize,
    /// 400: a control byte in a chunk extension, or a line that does not end in CRLF.
    #[error("a chunk extension is malformed")]
    ChunkExtension,
    /// 400: the extensions of all chunks together have more than 16 KiB.
    #[error("the chunk extensions have more than {CHUNK_EXTENSION_BYTES_MAX} bytes")]
    ExtensionsTooLarge,
    /// 400: a chunk's bytes are not followed by CRLF.
    #[error("a chunk is not followed by CRLF")]
    ChunkEnd,
    /// 400: a trailer is no header field.
    #[error("a trailer field is malformed")]
    Trailer,
    /// 431: trailers of more than 8 KiB.
    #[error("the trailers have more than {TRAILER_BYTES_MAX} bytes")]
    TrailersTooLarge,
    /// 415: the body is compressed, or coded otherwise.
    #[error("Content-Encoding: a body is read as it is, without a content coding")]
    Coded,
}

impl BodyError {
    /// The status that answers it.
    pub const fn status(self) -> u16 {
        match self {
            BodyError::TooLarge { .. } => 413,
            BodyError::TrailersTooLarge => 431,
            BodyError::Coded => 415,
            _ => 400,
        }
    }
}

/// The one number of a `Content-Length`; one too large for a `u64` is `u64::MAX`, which every limit refuses.
pub(crate) fn parse_content_length(value: &[u8]) -> Option<u64> {
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    Some(value.iter().fold(0u64, |n, b| n.saturating_mul(10).saturating_add(u64::from(b - b'0'))))
}

/// Decodes the body of one request, at most `REQUEST_BODY_BYTES_MAX` of it.
#[derive(Clone, Debug)]
pub struct BodyDecoder(Kind);

#[derive(Clone, Debug)]
enum Kind {
    Counted { left: usize },
    Chunked(ChunkedDecoder),
}

impl BodyDecoder {
    /// A decoder for a body so delimited.
    ///
    /// # Errors
    /// [`BodyError::TooLarge`] where its length is told and over the limit: nothing of it need be read.
    pub fn new(length: BodyLength) -> Result<BodyDecoder, BodyError> {
        let limit = REQUEST_BODY_BYTES_MAX as u64;
        let kind = match length {
            BodyLength::None => Kind::Counted { left: 0 },
            BodyLength::Length(length) => match usize::try_from(length) {
                Ok(left) if left <= REQUEST_BODY_BYTES_MAX => Kind::Counted { left },
                _ => return Err(BodyError::TooLarge { limit }),
            },
            BodyLength::Chunked => Kind::Chunked(ChunkedDecoder::new(limit)),
        };
        Ok(BodyDecoder(kind))
    }

    /// A decoder for the body of the request with this head.
    ///
    /// # Errors
    /// As [`BodyDecoder::new`]; [`BodyError::Coded`] where the body is not what its sender means (RFC 9110 section 15.5.16).
    pub fn of(head: &Head<'_>) -> Result<BodyDecoder, BodyError> {
        let has_body = !matches!(head.body, BodyLength::None | BodyLength::Length(0));
        let is_coded = head.list("content-encoding").any(|coding| !coding.eq_ignore_ascii_case("identity"));
        if has_body && is_coded { Err(BodyError::Coded) } else { BodyDecoder::new(head.body) }
    }

    /// Reads on: the body's bytes are appended to `out`. Tells how many bytes of `input` belonged to the body, and
    /// whether it is whole; bytes behind a whole body are left for the next request.
    ///
    /// # Errors
    /// [`BodyError`]; the decoder must not be fed again.
    pub fn feed(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<(usize, bool), BodyError> {
        match &mut self.0 {
            Kind::Counted { left } => {
                let body = input.get(..*left).unwrap_or(input);
                out.extend_from_slice(body);
                *left -= body.len();
                Ok((body.len(), *left == 0))
            }
            Kind::Chunked(chunked) => {
                let mut consumed = 0;
                while let Some(rest) = input.get(consumed..)
                    && !rest.is_empty()
                    && !chunked.is_done()
                {
                    let (step, data) = chunked.step(rest)?;
                    out.extend_from_slice(data);
                    consumed += step;
                }
                Ok((consumed, chunked.is_done()))
            }
        }
    }
}

/// The chunked coding (RFC 9112 section 7.1), read strictly.
#[derive(Clone, Debug)]
pub(crate) struct ChunkedDecoder {
    state: ChunkState,
    /// Bytes of content allowed in all, and those still allowed.
    limit: u64,
    allowed: u64,
    extension_bytes: u32,
    trailer_bytes: u32,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum ChunkState {
    Size {
        digits: u8,
        size: u64,
    },
    /// White space before a `;`: bad, but grammar (BWS).
    Padding {
        size: u64,
    },
    Extension {
        size: u64,
    },
    SizeLineFeed {
        size: u64,
    },
    Data {
        left: u64,
    },
    DataReturn,
    DataLineFeed,
    TrailerStart,
    TrailerName,
    TrailerValue,
    TrailerLineFeed,
    LastLineFeed,
    Done,
}

impl ChunkedDecoder {
    /// A decoder of at most `limit` bytes of content.
    pub(crate) fn new(limit: u64) -> ChunkedDecoder {
        ChunkedDecoder {
            state: ChunkState::Size { digits: 0, size: 0 },
            limit,
            allowed: limit,
            extension_bytes: 0,
            trailer_bytes: 0,
        }
    }

    /// Whether the last chunk and the trailers have been read.
    pub(crate) fn is_done(&self) -> bool {
        self.state == ChunkState::Done
    }

    /// Reads up to the end of `input`, of the body, or of one run of content: the bytes read, and the content among them.
    /// At least one byte is read unless `input` is empty or the body done.
    pub(crate) fn step<'i>(&mut self, input: &'i [u8]) -> Result<(usize, &'i [u8]), BodyError> {
        for (at, &byte) in input.iter().enumerate() {
            match self.state {
                ChunkState::Done => return Ok((at, &[])),
                ChunkState::Data { left } => {
                    let rest = input.get(at..).unwrap_or_default();
                    let data = usize::try_from(left).ok().and_then(|left| rest.get(..left)).unwrap_or(rest);
                    let left = left - data.len() as u64;
                    self.state = if left == 0 { ChunkState::DataReturn } else { ChunkState::Data { left } };
                    return Ok((at + data.len(), data));
                }
                state => self.state = self.frame_byte(state, byte)?,
            }
        }
        Ok((input.len(), &[]))
    }

    /// The state behind one byte that is not content.
    fn frame_byte(&mut self, state: ChunkState, byte: u8) -> Result<ChunkState, BodyError> {
        Ok(match (state, byte) {
            (ChunkState::Size { digits, size }, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => {
                if digits == SIZE_DIGITS_MAX {
                    return Err(BodyError::ChunkSize);
                }
                let digit = char::from(byte).to_digit(16).unwrap_or(0);
                let size = size.checked_mul(16).and_then(|size| size.checked_add(u64::from(digit)));
                // Refused at the digit that makes it too large: nobody waits for bytes that cannot be taken.
                let size =
                    size.filter(|&size| size <= self.allowed).ok_or(BodyError::TooLarge { limit: self.limit })?;
                ChunkState::Size { digits: digits + 1, size }
            }
            (ChunkState::Size { digits: 1.., size }, b'\r') => ChunkState::SizeLineFeed { size },
            (ChunkState::Size { digits: 1.., size } | ChunkState::Padding { size }, b';') => {
                self.count_extension()?;
                ChunkState::Extension { size }
            }
            (ChunkState::Size { digits: 1.., size } | ChunkState::Padding { size }, b' ' | b'\t') => {
                self.count_extension()?;
                ChunkState::Padding { size }
            }
            (ChunkState::Size { .. } | ChunkState::Padding { .. }, _) => return Err(BodyError::ChunkSize),
            (ChunkState::Extension { size }, b'\r') => ChunkState::SizeLineFeed { size },
            (ChunkState::Extension { size }, _) if is_value_byte(byte) => {
                self.count_extension()?;
                ChunkState::Extension { size }
            }
            (ChunkState::Extension { .. }, _) => return Err(BodyError::ChunkExtension),
            (ChunkState::SizeLineFeed { size: 0 }, b'\n') => ChunkState::TrailerStart,
            (ChunkState::SizeLineFeed { size }, b'\n') => {
                self.allowed -= size;
                ChunkState::Data { left: size }
            }
            (ChunkState::SizeLineFeed { .. }, _) => return Err(BodyError::ChunkExtension),
            (ChunkState::DataReturn, b'\r') => ChunkState::DataLineFeed,
            (ChunkState::DataLineFeed, b'\n') => ChunkState::Size { digits: 0, size: 0 },
            (ChunkState::DataReturn | ChunkState::DataLineFeed, _) => return Err(BodyError::ChunkEnd),
            (ChunkState::TrailerStart, b'\r') => ChunkState::LastLineFeed,
            (ChunkState::LastLineFeed, b'\n') => ChunkState::Done,
            _ => self.trailer_byte(state, byte)?,
        })
    }

    fn trailer_byte(&mut self, state: ChunkState, byte: u8) -> Result<ChunkState, BodyError> {
        if self.trailer_bytes == TRAILER_BYTES_MAX {
            return Err(BodyError::TrailersTooLarge);
        }
        self.trailer_bytes += 1;
        match (state, byte) {
            (ChunkState::TrailerStart | ChunkState::TrailerName, _) if is_token_byte(byte) => {
                Ok(ChunkState::TrailerName)
            }
            (ChunkState::TrailerName, b':') => Ok(ChunkState::TrailerValue),
            (ChunkState::TrailerValue, b'\r') => Ok(ChunkState::TrailerLineFeed),
            (ChunkState::TrailerValue, _) if is_value_byte(byte) => Ok(ChunkState::TrailerValue),
            (ChunkState::TrailerLineFeed, b'\n') => Ok(ChunkState::TrailerStart),
            _ => Err(BodyError::Trailer),
        }
    }

    fn count_extension(&mut self) -> Result<(), BodyError> {
        if self.extension_bytes == CHUNK_EXTENSION_BYTES_MAX {
            return Err(BodyError::ExtensionsTooLarge);
        }
        self.extension_bytes += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, prop_assert_eq, proptest};

    use super::*;

    type Outcome = Result<(Vec<u8>, usize, bool), BodyError>;

    /// Feeds `input` in pieces of these sizes, over and over.
    fn fed(length: BodyLength, input: &[u8], pieces: &[usize]) -> Outcome {
        let mut decoder = BodyDecoder::new(length)?;
        let (mut out, mut consumed, mut done) = (Vec::new(), 0, false);
        let mut sizes = pieces.iter().cycle();
        while !done && consumed < input.len() {
            let size = *sizes.next().expect("some pieces");
            let rest = input.get(consumed..).expect("in bounds");
            let (read, whole) = decoder.feed(rest.get(..size).unwrap_or(rest), &mut out)?;
            consumed += read;
            done = whole;
        }
        Ok((out, consumed, done))
    }

    fn chunked(input: &[u8]) -> Outcome {
        let outcome = fed(BodyLength::Chunked, input, &[usize::MAX]);
        assert_eq!(fed(BodyLength::Chunked, input, &[1]), outcome, "byte by byte");
        outcome
    }

    #[test]
    fn chunks_are_joined_and_what_follows_is_left() {
        let input = b"5\r\nhello\r\n00A ;x=\"y\"\r\n, world!!!\r\n0;last\r\nTrailer: x\r\nB:\r\n\r\nGET /";
        assert_eq!(chunked(input), Ok((b"hello, world!!!".to_vec(), input.len() - 5, true)));
        assert_eq!(chunked(b"0\r\n\r\n"), Ok((Vec::new(), 5, true)));
        assert_eq!(chunked(b"2\r\nab\r\n0\r\n\r"), Ok((b"ab".to_vec(), 11, false)));
    }

    #[test]
    fn chunks_are_strict() {
        for (input, error) in [
            (&b"\r\n"[..], BodyError::ChunkSize),
            (b"x\r\n", BodyError::ChunkSize),
            (b"0x5\r\n", BodyError::ChunkSize),
            (b"+5\r\n", BodyError::ChunkSize),
            (b" 5\r\n", BodyError::ChunkSize),
            (b"5 \r\n", BodyError::ChunkSize),
            (b"5\n", BodyError::ChunkSize),
            (b"00000000000000005\r\n", BodyError::ChunkSize),
            (b"5;a\n", BodyError::ChunkExtension),
            (b"5;a\0", BodyError::ChunkExtension),
            (b"5\rx", BodyError::ChunkExtension),
            (b"2\r\nabc", BodyError::ChunkEnd),
            (b"2\r\nab\n", BodyError::ChunkEnd),
            (b"2\r\nab\rx", BodyError::ChunkEnd),
            (b"0\r\n : b\r\n", BodyError::Trailer),
            (b"0\r\nA : b\r\n", BodyError::Trailer),
            (b"0\r\nA: b\nC", BodyError::Trailer),
            (b"0\r\nA\r\n", BodyError::Trailer),
            (b"0\r\n\n", BodyError::Trailer),
            (b"0\r\n\rx", BodyError::Trailer),
        ] {
            assert_eq!(chunked(input), Err(error), "{:?}", String::from_utf8_lossy(input));
        }
        assert_eq!(BodyError::ChunkSize.status(), 400);
    }

    #[test]
    fn a_body_may_have_64_kib_and_not_one_byte_more() {
        let limit = REQUEST_BODY_BYTES_MAX as u64;
        let over = BodyError::TooLarge { limit };
        assert!(BodyDecoder::new(BodyLength::Length(limit)).is_ok());
        for length in [limit + 1, u64::MAX] {
            assert_eq!(BodyDecoder::new(BodyLength::Length(length)).err(), Some(over));
        }
        assert_eq!(over.status(), 413);
        let mut input = b"10000\r\n".to_vec();
        input.resize(input.len() + REQUEST_BODY_BYTES_MAX, b'a');
        input.extend_from_slice(b"\r\n");
        let last = [&input[..], b"0\r\n\r\n"].concat();
        assert!(matches!(chunked(&last), Ok((body, _, true)) if body.len() == REQUEST_BODY_BYTES_MAX));
        let more = [&input[..], b"1"].concat();
        assert_eq!(chunked(&more), Err(over), "refused at the digit, not at the byte");
        assert_eq!(chunked(b"10001"), Err(over));
        assert_eq!(chunked(b"ffffffffffffffff"), Err(over));
    }

    #[test]
    fn extensions_and_trailers_are_bounded() {
        let extension = |bytes: u32| format!("1;{}\r\na\r\n0\r\n\r\n", "x".repeat(bytes as usize - 1));
        assert!(chunked(extension(CHUNK_EXTENSION_BYTES_MAX).as_bytes()).is_ok());
        assert_eq!(chunked(extension(CHUNK_EXTENSION_BYTES_MAX + 1).as_bytes()), Err(BodyError::ExtensionsTooLarge));
        let many = "1;x=y\r\na\r\n".repeat(CHUNK_EXTENSION_BYTES_MAX as usize / 4 + 1);
        assert_eq!(chunked(many.as_bytes()), Err(BodyError::ExtensionsTooLarge), "they are counted over all chunks");
        let trailer = |bytes: u32| format!("0\r\nA:{}\r\n\r\n", "x".repeat(bytes as usize - 4));
        assert!(chunked(trailer(TRAILER_BYTES_MAX).as_bytes()).is_ok());
        assert_eq!(chunked(trailer(TRAILER_BYTES_MAX + 1).as_bytes()), Err(BodyError::TrailersTooLarge));
        assert_eq!(BodyError::TrailersTooLarge.status(), 431);
    }

    #[test]
    fn a_counted_body_ends_where_it_says() {
        for pieces in [&[usize::MAX][..], &[1], &[2, 3]] {
            assert_eq!(fed(BodyLength::Length(5), b"helloGET", pieces), Ok((b"hello".to_vec(), 5, true)));
            assert_eq!(fed(BodyLength::Length(9), b"hello", pieces), Ok((b"hello".to_vec(), 5, false)));
        }
        let mut none = BodyDecoder::new(BodyLength::None).expect("no body");
        assert_eq!(none.feed(b"GET", &mut Vec::new()), Ok((0, true)));
    }

    proptest! {
        #[test]
        fn chunks_read_back_as_written_however_split(
            parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..40), 0..8),
            pieces in proptest::collection::vec(1usize..20, 1..8),
        ) {
            let mut wire = Vec::new();
            for part in &parts {
                crate::codec::http::write_chunk(&mut wire, part);
            }
            wire.extend_from_slice(crate::codec::http::LAST_CHUNK);
            prop_assert_eq!(fed(BodyLength::Chunked, &wire, &pieces), Ok((parts.concat(), wire.len(), true)));
        }

        #[test]
        fn any_split_of_broken_chunks_ends_alike(
            at in 0usize..30, byte in any::<u8>(), pieces in proptest::collection::vec(1usize..6, 1..6),
        ) {
            let mut wire = b"5;a=b\r\nhello\r\n1\r\n!\r\n0\r\nA: b\r\n\r\n".to_vec();
            *wire.get_mut(at).expect("in bounds") = byte;
            prop_assert_eq!(fed(BodyLength::Chunked, &wire, &pieces), fed(BodyLength::Chunked, &wire, &[usize::MAX]));
        }
    }
}
