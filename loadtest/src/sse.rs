//! Server-sent events in place: a response body, chunked or not -> blocks, a block -> event name and data.
//!
//! Source: WHATWG HTML section 9.2, RFC 9112 section 7.1 for chunks.
//! Memory: the state of a chunked body, nine bytes; blocks borrow. Errors: [`ChunkError`]. Not here: what the data means.

use memchr::memchr2;

/// The longest block that is read.
pub const BLOCK_BYTES_MAX: usize = 64 << 20;

/// Where a chunked body stands.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Chunked {
    /// A size line comes.
    #[default]
    Size,
    /// Digits of the size were read, and whether an extension follows that is skipped.
    Digits(u32, bool),
    /// Bytes of the chunk that are still to come.
    Data(u32),
    /// The line end behind a chunk comes.
    DataEnd,
    /// The last chunk was read: trailers and nothing more.
    Ended,
}

/// The body is not chunked as it says.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ChunkError;

impl Chunked {
    /// Takes the chunk framing out of `bytes` in place; returns how many bytes of body now stand at its start.
    ///
    /// # Errors
    /// A size that is none or over [`BLOCK_BYTES_MAX`], a chunk that does not end where it said.
    pub fn strip(&mut self, bytes: &mut [u8]) -> Result<usize, ChunkError> {
        let (mut read, mut kept) = (0, 0);
        while read < bytes.len() {
            match *self {
                Chunked::Data(left) => {
                    let part = (bytes.len() - read).min(left as usize);
                    bytes.copy_within(read..read + part, kept);
                    read += part;
                    kept += part;
                    let left = left - part as u32;
                    *self = if left == 0 { Chunked::DataEnd } else { Chunked::Data(left) };
                    continue;
                }
                Chunked::Size => {
                    let digit = char::from(bytes[read]).to_digit(16).ok_or(ChunkError)?;
                    *self = Chunked::Digits(digit, false);
                }
                Chunked::Digits(size, extension) => match bytes[read] {
                    b'\r' => {}
                    b'\n' if size == 0 => *self = Chunked::Ended,
                    b'\n' => *self = Chunked::Data(size),
                    _ if extension => {}
                    b';' | b' ' | b'\t' => *self = Chunked::Digits(size, true),
                    byte => {
                        let digit = char::from(byte).to_digit(16).ok_or(ChunkError)?;
                        let size = size.checked_mul(16).and_then(|size| size.checked_add(digit));
                        let size = size.filter(|&size| size as usize <= BLOCK_BYTES_MAX).ok_or(ChunkError)?;
                        *self = Chunked::Digits(size, false);
                    }
                },
                Chunked::DataEnd => match bytes[read] {
                    b'\r' => {}
                    b'\n' => *self = Chunked::Size,
                    _ => return Err(ChunkError),
                },
                Chunked::Ended => break,
            }
            read += 1;
        }
        Ok(kept)
    }
}

/// How far a block that is not whole yet was searched for its end: what was seen is not looked at again.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Scan {
    /// Where its last line starts.
    line: usize,
    /// Up to there that line has no end.
    searched: usize,
}

impl Scan {
    /// Length of the block that `bytes` start with, its empty line included; `None` where that has not come yet, and then the
    /// next call goes on with the same bytes and more behind them.
    /// With CR alone as the last byte the line's end is in doubt (an LF may follow), so it waits for one more.
    pub fn block(&mut self, bytes: &[u8]) -> Option<usize> {
        loop {
            let Some(found) = memchr2(b'\r', b'\n', &bytes[self.searched..]) else {
                self.searched = bytes.len();
                return None;
            };
            let end = self.searched + found;
            let Some(next) = line_end(bytes, end) else {
                self.searched = end;
                return None;
            };
            if end == self.line {
                *self = Scan::default();
                return Some(next);
            }
            *self = Scan { line: next, searched: next };
        }
    }
}

/// The place behind the line end at `end`; `None` where that is not whole.
fn line_end(bytes: &[u8], end: usize) -> Option<usize> {
    match (bytes[end], bytes.get(end + 1)) {
        (b'\n', _) => Some(end + 1),
        (_, Some(b'\n')) => Some(end + 2),
        (_, Some(_)) => Some(end + 1),
        (_, None) => None,
    }
}

/// The line at `at` and where the next one starts.
fn line(bytes: &[u8], at: usize) -> Option<(&[u8], usize)> {
    let end = at + memchr2(b'\r', b'\n', &bytes[at..])?;
    Some((&bytes[at..end], line_end(bytes, end)?))
}

/// One event.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Event<'a> {
    /// Its name, `message` where none stands.
    pub name: &'a [u8],
    /// Its data, where it stands in one line.
    pub data: Data<'a>,
}

/// The data of an event.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Data<'a> {
    /// No `data` field: no event is dispatched.
    None,
    /// As received.
    Line(&'a [u8]),
    /// Several lines, joined.
    Joined(Vec<u8>),
}

impl Data<'_> {
    /// The bytes; `None` where there is no event.
    pub fn bytes(&self) -> Option<&[u8]> {
        match self {
            Data::None => None,
            Data::Line(line) => Some(line),
            Data::Joined(bytes) => Some(bytes),
        }
    }
}

/// What stands in `block`, as [`Scan::block`] measured it.
pub fn event(block: &[u8]) -> Event<'_> {
    let mut event = Event { name: b"message", data: Data::None };
    let mut at = 0;
    while let Some((line, next)) = line(block, at) {
        at = next;
        let (field, value) = match memchr::memchr(b':', line) {
            Some(colon) => (&line[..colon], line[colon + 1..].strip_prefix(b" ").unwrap_or(&line[colon + 1..])),
            None => (line, &line[..0]),
        };
        match field {
            b"event" if value.is_empty() => event.name = b"message",
            b"event" => event.name = value,
            b"data" => {
                event.data = match event.data {
                    Data::None => Data::Line(value),
                    Data::Line(first) => Data::Joined([first, b"\n", value].concat()),
                    Data::Joined(mut bytes) => {
                        bytes.push(b'\n');
                        bytes.extend_from_slice(value);
                        Data::Joined(bytes)
                    }
                }
            }
            _ => {}
        }
    }
    event
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Name and data of every event of `body`, which arrives in the pieces that `cuts` make.
    fn read(body: &[u8], cuts: &[usize]) -> Vec<(String, String)> {
        let (mut held, mut found, mut from, mut scan) = (Vec::new(), Vec::new(), 0, Scan::default());
        for &cut in cuts.iter().chain([&body.len()]) {
            held.extend_from_slice(&body[from..cut]);
            from = cut;
            while let Some(length) = scan.block(&held) {
                let event = event(&held[..length]);
                if let Some(data) = event.data.bytes() {
                    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("UTF-8");
                    found.push((text(event.name), text(data)));
                }
                held.drain(..length);
            }
        }
        found
    }

    #[test]
    fn all_line_endings_read_the_same_cut_at_any_byte() {
        for ending in ["\n", "\r\n", "\r"] {
            let body = ": hello\n\nevent: patch\nid: e-1\ndata: {\"a\":1}\n\ndata: one\ndata:two\n\nretry: 5\n\n\
                        event: close\ndata\n\n: end\n\n"
                .replace('\n', ending);
            let expected = [("patch", "{\"a\":1}"), ("message", "one\ntwo"), ("close", "")];
            let expected: Vec<_> = expected.iter().map(|&(name, data)| (name.to_owned(), data.to_owned())).collect();
            for cut in 0..body.len() {
                assert_eq!(read(body.as_bytes(), &[cut]), expected, "{ending:?} cut at {cut}");
            }
            let each: Vec<usize> = (1..body.len()).collect();
            assert_eq!(read(body.as_bytes(), &each), expected, "{ending:?} byte by byte");
        }
    }

    #[test]
    fn what_was_searched_is_not_searched_again() {
        let (mut scan, mut held) = (Scan::default(), b"data: ".to_vec());
        for piece in 0..100 {
            held.extend_from_slice(&[b'x'; 1000]);
            assert_eq!(scan.block(&held), None);
            assert_eq!(scan, Scan { line: 0, searched: held.len() }, "after piece {piece}");
        }
        held.extend_from_slice(b"\r");
        assert_eq!(scan.block(&held), None, "an LF may follow");
        held.extend_from_slice(b"\n\r\nnext");
        assert_eq!(scan.block(&held), Some(held.len() - 4));
        assert_eq!(scan, Scan::default(), "the next block begins anew");
    }

    #[test]
    fn chunks_cut_at_any_byte_leave_the_body() {
        let wire = b"5\r\nhello\r\n1;name=\"v\"\r\n \r\n0006\r\nworld!\r\n0\r\n\r\n";
        for cut in 0..wire.len() {
            let (mut state, mut body) = (Chunked::default(), Vec::new());
            for piece in [&wire[..cut], &wire[cut..]] {
                let mut piece = piece.to_vec();
                let kept = state.strip(&mut piece).expect("well formed");
                body.extend_from_slice(&piece[..kept]);
            }
            assert_eq!(body, b"hello world!", "cut at {cut}");
            assert_eq!(state, Chunked::Ended);
        }
    }

    #[test]
    fn chunks_that_lie_are_errors() {
        for wire in [&b"x\r\n"[..], b"\r\n", b"5\r\nhelloX", b"fffffffff\r\n", b"4000001\r\n", b"5g\r\n"] {
            assert_eq!(Chunked::default().strip(&mut wire.to_vec()), Err(ChunkError), "{wire:?}");
        }
        Chunked::default().strip(&mut b"4000000\r\n".to_vec()).expect("the longest there may be");
    }
}
