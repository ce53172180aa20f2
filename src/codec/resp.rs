//! The wire of Redis: commands to bytes, bytes to replies.
//!
//! Source: <https://redis.io/docs/latest/develop/reference/protocol-spec/>, version 2 (RESP2), which every server of that
//! family speaks unless asked for another.
//! Memory: a [`Decoder`] holds the one reply that is coming, at most [`Bounds::reply_bytes_max`] and one entry for each of
//! at most [`Bounds::elements_max`] elements; a string over [`Bounds::string_bytes_max`], or for which there is no more room
//! in its reply, is read over, not kept.
//! Errors: [`RespError`], the server's fault: what follows cannot be made sense of, and the connection is of no more use.
//! Not here: sockets, time, what a reply means (`runtime::redis`).

use std::fmt;

/// Longest string that a server of the family sends (`proto-max-bulk-len`); what announces a longer one is no RESP.
const ANNOUNCED_STRING_BYTES_MAX: u64 = 512 << 20;
/// Bytes of a line that announces a number, its end not counted: a sign and the digits of 64 bits.
const NUMBER_BYTES_MAX: usize = 20;

/// What a reply may be.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Bounds {
    /// Bytes of a simple string or an error.
    pub line_bytes_max: usize,
    /// Bytes of a string; a longer one becomes [`Reply::TooLong`].
    pub string_bytes_max: usize,
    /// Elements of all arrays of one reply, however nested.
    pub elements_max: usize,
    /// Arrays within arrays.
    pub depth_max: usize,
    /// Bytes of all strings of one reply together; one that goes beyond becomes [`Reply::TooLong`].
    pub reply_bytes_max: usize,
}

/// What a server answers. `Debug` shows its shape alone, for its strings may be secret.
#[derive(Clone, Eq, PartialEq)]
pub enum Reply {
    /// `+OK`.
    Simple(Vec<u8>),
    /// `-ERR …`: the command was refused. The text may repeat the command's own arguments, so it is never shown: see
    /// [`error_code`].
    Error(Vec<u8>),
    /// `:7`.
    Integer(i64),
    /// `$…`: a string.
    String(Vec<u8>),
    /// A string of so many bytes, over a bound, that was read over.
    TooLong(u64),
    /// `*…`.
    Array(Vec<Reply>),
    /// `$-1` or `*-1`: there is none.
    Nil,
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reply::Simple(line) => write!(f, "Simple({} bytes)", line.len()),
            Reply::Error(line) => write!(f, "Error({})", error_code(line)),
            Reply::Integer(number) => write!(f, "Integer({number})"),
            Reply::String(bytes) => write!(f, "String({} bytes)", bytes.len()),
            Reply::TooLong(bytes) => write!(f, "TooLong({bytes} bytes)"),
            Reply::Array(elements) => f.debug_list().entries(elements).finish(),
            Reply::Nil => f.write_str("Nil"),
        }
    }
}

/// Why bytes are no reply.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum RespError {
    /// A reply that begins with no type of RESP2.
    #[error("a reply begins with byte {found:#04x}, which is no type of RESP2")]
    Type {
        /// The byte.
        found: u8,
    },
    /// A carriage return without its line feed, a line feed alone, or something else behind a string.
    #[error("a line or string of a reply does not end with CR LF")]
    LineEnd,
    /// A number that is none, or no length.
    #[error("a number or length in a reply is none")]
    Number,
    /// A line over the bound.
    #[error("a line of a reply is over {limit} bytes")]
    LineTooLong {
        /// Bytes that are allowed.
        limit: usize,
    },
    /// A string longer than any server sends.
    #[error("a reply announces a string of {announced} bytes")]
    StringTooLong {
        /// What it announces.
        announced: u64,
    },
    /// Too many elements.
    #[error("a reply has over {limit} elements")]
    TooManyElements {
        /// How many are allowed.
        limit: usize,
    },
    /// Arrays too deep within each other.
    #[error("a reply nests deeper than {limit}")]
    TooDeep {
        /// What is allowed.
        limit: usize,
    },
    /// Too much in the lines of one reply.
    #[error("the lines of a reply are over {limit} bytes")]
    TooLarge {
        /// Bytes that are allowed.
        limit: usize,
    },
}

/// The first word of an error's text where it is one of the words servers use there (`WRONGPASS`, `LOADING`), else `ERR`:
/// nothing of a command's arguments.
pub fn error_code(line: &[u8]) -> &str {
    let word = line.split(|&b| b == b' ').next().unwrap_or_default();
    let fits = (2..=16).contains(&word.len()) && word.iter().all(u8::is_ascii_uppercase);
    if fits { std::str::from_utf8(word).unwrap_or("ERR") } else { "ERR" }
}

/// Appends a command to `out`: an array of strings, as every server takes it.
pub fn write_command<'p>(out: &mut Vec<u8>, parts: impl IntoIterator<Item = &'p [u8], IntoIter: ExactSizeIterator>) {
    let parts = parts.into_iter();
    write_length(out, b'*', parts.len());
    for part in parts {
        write_length(out, b'$', part.len());
        out.extend_from_slice(part);
        out.extend_from_slice(b"\r\n");
    }
}

fn write_length(out: &mut Vec<u8>, kind: u8, length: usize) {
    out.push(kind);
    out.extend_from_slice(length.to_string().as_bytes());
    out.extend_from_slice(b"\r\n");
}

/// Takes a server's bytes as they come, in pieces of any size.
#[derive(Debug)]
pub struct Decoder {
    bounds: Bounds,
    /// Arrays that are not yet complete, outermost first.
    open: Vec<Open>,
    token: Token,
    /// Elements and bytes of the reply so far.
    elements: usize,
    bytes: usize,
}

/// An array that is coming.
#[derive(Debug)]
struct Open {
    elements: Vec<Reply>,
    left: usize,
}

/// What is being read.
#[derive(Debug)]
enum Token {
    /// A line, its end not yet seen, from its type on.
    Line(Vec<u8>),
    /// A string with so many bytes to come, and the two of its end.
    String { bytes: Vec<u8>, left: usize },
    /// The same, read over.
    Skipped { announced: u64, left: u64 },
    /// The line end behind a string: how much of it has been seen.
    End { reply: Reply, seen: usize },
}

impl Default for Token {
    fn default() -> Token {
        Token::Line(Vec::new())
    }
}

impl Decoder {
    /// One at the start of a reply.
    pub fn new(bounds: Bounds) -> Decoder {
        Decoder { bounds, open: Vec::new(), token: Token::default(), elements: 0, bytes: 0 }
    }

    /// Takes bytes off the front of `input` until a reply is complete, which is returned; `None`: all of them are taken and
    /// more are needed.
    ///
    /// # Errors
    /// [`RespError`]; the decoder is of no more use.
    pub fn decode(&mut self, input: &mut &[u8]) -> Result<Option<Reply>, RespError> {
        while !input.is_empty() {
            let Some(mut reply) = self.token(input)? else { continue };
            loop {
                let Some(open) = self.open.last_mut() else {
                    (self.elements, self.bytes) = (0, 0);
                    return Ok(Some(reply));
                };
                open.elements.push(reply);
                open.left -= 1;
                if open.left > 0 {
                    break;
                }
                reply = Reply::Array(self.open.pop().map(|open| open.elements).unwrap_or_default());
            }
        }
        Ok(None)
    }

    /// Whether nothing of a next reply has come.
    pub fn is_between_replies(&self) -> bool {
        self.open.is_empty() && matches!(&self.token, Token::Line(line) if line.is_empty())
    }

    /// Goes on with what is being read: a reply that is complete, arrays not yet.
    fn token(&mut self, input: &mut &[u8]) -> Result<Option<Reply>, RespError> {
        match std::mem::take(&mut self.token) {
            Token::Line(line) => self.line(line, input),
            Token::String { mut bytes, left } => {
                let taken = take(input, left);
                bytes.extend_from_slice(taken);
                self.token = match left - taken.len() {
                    0 => Token::End { reply: Reply::String(bytes), seen: 0 },
                    left => Token::String { bytes, left },
                };
                Ok(None)
            }
            Token::Skipped { announced, left } => {
                let taken = take(input, usize::try_from(left).unwrap_or(usize::MAX)).len() as u64;
                self.token = match left - taken {
                    0 => Token::End { reply: Reply::TooLong(announced), seen: 0 },
                    left => Token::Skipped { announced, left },
                };
                Ok(None)
            }
            Token::End { reply, seen } => {
                let wanted = b"\r\n".get(seen..).unwrap_or_default();
                let taken = take(input, wanted.len());
                if !wanted.starts_with(taken) {
                    return Err(RespError::LineEnd);
                }
                if taken.len() == wanted.len() {
                    return Ok(Some(reply));
                }
                self.token = Token::End { reply, seen: seen + taken.len() };
                Ok(None)
            }
        }
    }

    fn line(&mut self, mut line: Vec<u8>, input: &mut &[u8]) -> Result<Option<Reply>, RespError> {
        let limit = match line.first().or(input.first()) {
            Some(b'+' | b'-') => self.bounds.line_bytes_max,
            Some(b':' | b'$' | b'*') => NUMBER_BYTES_MAX,
            Some(&found) => return Err(RespError::Type { found }),
            None => return Ok(None),
        };
        // The type before it and the line end behind it do not count.
        let room = (limit + 3).saturating_sub(line.len());
        let end = memchr::memchr(b'\n', input).map_or(input.len(), |at| at + 1);
        line.extend_from_slice(take(input, end.min(room)));
        // A carriage return is the end of a line and nothing else.
        let stray = memchr::memchr(b'\r', &line).is_some_and(|at| line.get(at + 1).is_some_and(|&next| next != b'\n'));
        if stray {
            return Err(RespError::LineEnd);
        }
        let Some(text) = line.strip_suffix(b"\n") else {
            if end > room {
                return Err(RespError::LineTooLong { limit });
            }
            self.token = Token::Line(line);
            return Ok(None);
        };
        let text = text.strip_suffix(b"\r").ok_or(RespError::LineEnd)?;
        let (kind, text) = text.split_first().ok_or(RespError::LineEnd)?;
        match kind {
            b'+' => self.counted(text.len()).map(|()| Some(Reply::Simple(text.to_vec()))),
            b'-' => self.counted(text.len()).map(|()| Some(Reply::Error(text.to_vec()))),
            b':' => integer(text).map(|number| Some(Reply::Integer(number))),
            b'$' => self.string(length(text)?),
            _ => self.array(length(text)?),
        }
    }

    /// A string of that length begins.
    fn string(&mut self, length: Option<u64>) -> Result<Option<Reply>, RespError> {
        let Some(announced) = length else { return Ok(Some(Reply::Nil)) };
        if announced > ANNOUNCED_STRING_BYTES_MAX {
            return Err(RespError::StringTooLong { announced });
        }
        let room = self.bounds.string_bytes_max.min(self.bounds.reply_bytes_max.saturating_sub(self.bytes));
        let within = usize::try_from(announced).ok().filter(|&length| length <= room);
        self.token = match within {
            Some(0) => Token::End { reply: Reply::String(Vec::new()), seen: 0 },
            Some(left) => {
                self.bytes += left;
                // What is announced is not believed: room is made as bytes come.
                Token::String { bytes: Vec::new(), left }
            }
            None => Token::Skipped { announced, left: announced },
        };
        Ok(None)
    }

    /// An array of that length begins.
    fn array(&mut self, length: Option<u64>) -> Result<Option<Reply>, RespError> {
        let Some(length) = length else { return Ok(Some(Reply::Nil)) };
        if self.open.len() >= self.bounds.depth_max {
            return Err(RespError::TooDeep { limit: self.bounds.depth_max });
        }
        let limit = self.bounds.elements_max;
        let left = usize::try_from(length).ok().filter(|&length| length <= limit.saturating_sub(self.elements));
        let left = left.ok_or(RespError::TooManyElements { limit })?;
        self.elements += left;
        if left == 0 {
            return Ok(Some(Reply::Array(Vec::new())));
        }
        self.open.push(Open { elements: Vec::new(), left });
        Ok(None)
    }

    fn counted(&mut self, bytes: usize) -> Result<(), RespError> {
        let limit = self.bounds.reply_bytes_max;
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes > limit { Err(RespError::TooLarge { limit }) } else { Ok(()) }
    }
}

/// Takes at most `count` bytes off the front of `input`.
fn take<'i>(input: &mut &'i [u8], count: usize) -> &'i [u8] {
    let (taken, rest) = input.split_at_checked(count).unwrap_or((input, &[]));
    *input = rest;
    taken
}

/// A number, with a sign or without.
fn integer(text: &[u8]) -> Result<i64, RespError> {
    std::str::from_utf8(text).ok().and_then(|text| text.parse().ok()).ok_or(RespError::Number)
}

/// A length; `None` for -1, which says that there is nothing.
fn length(text: &[u8]) -> Result<Option<u64>, RespError> {
    match integer(text)? {
        -1 => Ok(None),
        length => u64::try_from(length).map(Some).map_err(|_| RespError::Number),
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::{Strategy, any, prop_assert_eq, prop_oneof, proptest};
    use proptest::strategy::Just;

    use super::*;

    const BOUNDS: Bounds =
        Bounds { line_bytes_max: 32, string_bytes_max: 8, elements_max: 6, depth_max: 3, reply_bytes_max: 40 };

    /// Every reply of `wire`, which comes in pieces of `size` bytes.
    fn replies(wire: &[u8], size: usize) -> Result<Vec<Reply>, RespError> {
        let mut decoder = Decoder::new(BOUNDS);
        let mut replies = Vec::new();
        for mut piece in wire.chunks(size) {
            while let Some(reply) = decoder.decode(&mut piece)? {
                replies.push(reply);
            }
            assert!(piece.is_empty(), "all is taken");
        }
        Ok(replies)
    }

    #[track_caller]
    fn check(wire: &str, expected: &[Reply]) {
        for size in [1, 2, 3, wire.len()] {
            assert_eq!(replies(wire.as_bytes(), size).as_deref(), Ok(expected), "{wire:?} in pieces of {size}");
        }
    }

    #[track_caller]
    fn refused(wire: &str, error: RespError) {
        for size in [1, 2, wire.len()] {
            assert_eq!(replies(wire.as_bytes(), size), Err(error), "{wire:?} in pieces of {size}");
        }
    }

    fn string(text: &str) -> Reply {
        Reply::String(text.into())
    }

    #[test]
    fn every_kind_of_reply_is_read_whole_and_in_pieces() {
        check("+OK\r\n", &[Reply::Simple(b"OK".to_vec())]);
        check("-ERR no\r\n", &[Reply::Error(b"ERR no".to_vec())]);
        check(":-7\r\n:9223372036854775807\r\n", &[Reply::Integer(-7), Reply::Integer(i64::MAX)]);
        check("$5\r\na\r\nb\n\r\n$0\r\n\r\n", &[string("a\r\nb\n"), string("")]);
        check("$-1\r\n*-1\r\n*0\r\n", &[Reply::Nil, Reply::Nil, Reply::Array(vec![])]);
        let inner = Reply::Array(vec![Reply::Integer(1), Reply::Nil]);
        check(
            "*3\r\n$1\r\na\r\n*2\r\n:1\r\n$-1\r\n*0\r\n:2\r\n",
            &[Reply::Array(vec![string("a"), inner, Reply::Array(vec![])]), Reply::Integer(2)],
        );
    }

    #[test]
    fn a_string_over_the_bound_is_read_over_and_what_follows_is_heard() {
        check("$8\r\n12345678\r\n", &[string("12345678")]);
        check("$9\r\n123456789\r\n:1\r\n", &[Reply::TooLong(9), Reply::Integer(1)]);
        check("*2\r\n$9\r\n12345\r\n89\r\n$1\r\na\r\n", &[Reply::Array(vec![Reply::TooLong(9), string("a")])]);
    }

    #[test]
    fn what_is_no_reply_is_refused() {
        refused("HTTP/1.1 400 Bad Request\r\n", RespError::Type { found: b'H' });
        refused("%1\r\n", RespError::Type { found: b'%' });
        refused("\r\n", RespError::Type { found: b'\r' });
        refused("+OK\n", RespError::LineEnd);
        refused("+O\rK\r\n", RespError::LineEnd);
        refused("$1\r\nab\r\n", RespError::LineEnd);
        refused("$0\r\nx", RespError::LineEnd);
        refused(":\r\n", RespError::Number);
        refused(":1x\r\n", RespError::Number);
        refused("$-2\r\n", RespError::Number);
        refused("*9223372036854775808\r\n", RespError::Number);
    }

    #[test]
    fn every_bound_holds_at_its_value_and_refuses_one_past_it() {
        let line = "x".repeat(BOUNDS.line_bytes_max);
        check(&format!("+{line}\r\n"), &[Reply::Simple(line.clone().into())]);
        refused(&format!("+{line}x\r\n"), RespError::LineTooLong { limit: 32 });
        refused(&format!(":{}\r\n", "0".repeat(21)), RespError::LineTooLong { limit: 20 });
        check("*6\r\n:1\r\n:1\r\n:1\r\n:1\r\n:1\r\n:1\r\n", &[Reply::Array(vec![Reply::Integer(1); 6])]);
        refused("*7\r\n", RespError::TooManyElements { limit: 6 });
        refused("*4\r\n*3\r\n", RespError::TooManyElements { limit: 6 });
        let deep = |depth: usize, within: Reply| (0..depth).fold(within, |reply, _| Reply::Array(vec![reply]));
        check("*1\r\n*1\r\n*1\r\n:1\r\n", &[deep(3, Reply::Integer(1))]);
        refused("*1\r\n*1\r\n*1\r\n*1\r\n", RespError::TooDeep { limit: 3 });
        refused("$536870913\r\n", RespError::StringTooLong { announced: (512 << 20) + 1 });
        let eight = "$8\r\n12345678\r\n";
        check(&format!("*5\r\n{}", eight.repeat(5)), &[Reply::Array(vec![string("12345678"); 5])]);
        let mut full = vec![string("12345678"); 5];
        full.push(Reply::TooLong(1));
        check(&format!("*6\r\n{}$1\r\na\r\n", eight.repeat(5)), &[Reply::Array(full)]);
        refused(&format!("*6\r\n{}+a\r\n", eight.repeat(5)), RespError::TooLarge { limit: 40 });
        check(&eight.repeat(9), &vec![string("12345678"); 9]);
    }

    #[test]
    fn a_line_without_an_end_takes_no_more_than_its_bound() {
        let mut decoder = Decoder::new(BOUNDS);
        let mut outcome = Ok(None);
        for at in 0..1000 {
            outcome = decoder.decode(&mut if at == 0 { &b"+"[..] } else { b"x" });
            if outcome.is_err() {
                assert_eq!(at, BOUNDS.line_bytes_max + 3);
                break;
            }
        }
        assert_eq!(outcome, Err(RespError::LineTooLong { limit: 32 }));
    }

    #[test]
    fn commands_are_arrays_of_strings() {
        let mut out = Vec::new();
        write_command(&mut out, [b"SET".as_slice(), b"k\r\n", b""]);
        assert_eq!(out, b"*3\r\n$3\r\nSET\r\n$3\r\nk\r\n\r\n$0\r\n\r\n");
    }

    #[test]
    fn an_errors_code_repeats_no_argument() {
        assert_eq!(error_code(b"WRONGPASS invalid username-password pair"), "WRONGPASS");
        assert_eq!(error_code(b"NOAUTH Authentication required."), "NOAUTH");
        for text in ["", "hunter2", "HUNTER2", "Hunter two", "A", "ABCDEFGHIJKLMNOPQ x", "\u{fc}BEL"] {
            assert_eq!(error_code(text.as_bytes()), "ERR", "{text}");
        }
    }

    #[test]
    fn debug_output_shows_the_shape_alone() {
        let reply = Reply::Array(vec![
            string("hunter2"),
            Reply::Error(b"ERR unknown command 'hunter2'".to_vec()),
            Reply::Simple(b"hunter2".to_vec()),
        ]);
        assert_eq!(format!("{reply:?}"), "[String(7 bytes), Error(ERR), Simple(7 bytes)]");
    }

    fn write(out: &mut Vec<u8>, reply: &Reply) {
        match reply {
            Reply::Simple(line) => out.extend([b"+", line.as_slice(), b"\r\n"].concat()),
            Reply::Error(line) => out.extend([b"-", line.as_slice(), b"\r\n"].concat()),
            Reply::Integer(number) => out.extend(format!(":{number}\r\n").bytes()),
            Reply::String(bytes) => {
                out.extend([format!("${}\r\n", bytes.len()).as_bytes(), bytes, b"\r\n"].concat());
            }
            Reply::TooLong(_) => unreachable!("none is made"),
            Reply::Array(elements) => {
                out.extend(format!("*{}\r\n", elements.len()).bytes());
                elements.iter().for_each(|element| write(out, element));
            }
            Reply::Nil => out.extend(b"$-1\r\n"),
        }
    }

    fn any_reply() -> impl Strategy<Value = Reply> {
        let leaf = prop_oneof![
            "[a-zA-Z ]{0,12}".prop_map(|line| Reply::Simple(line.into())),
            "[a-zA-Z ]{0,12}".prop_map(|line| Reply::Error(line.into())),
            any::<i64>().prop_map(Reply::Integer),
            vec(any::<u8>(), 0..=6).prop_map(Reply::String),
            Just(Reply::Nil),
        ];
        leaf.prop_recursive(2, 6, 2, |inner| vec(inner, 0..=2).prop_map(Reply::Array))
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(expected in vec(any_reply(), 0..4), size in 1usize..9) {
            let mut wire = Vec::new();
            expected.iter().for_each(|reply| write(&mut wire, reply));
            prop_assert_eq!(replies(&wire, size), Ok(expected));
        }

        #[test]
        fn any_bytes_are_judged_alike_whole_and_in_pieces(wire in vec(prop_oneof![
            Just(b'*'), Just(b'$'), Just(b'+'), Just(b':'), Just(b'1'), Just(b'2'), Just(b'\r'), Just(b'\n'), any::<u8>(),
        ], 0..60), size in 1usize..9) {
            prop_assert_eq!(replies(&wire, size), replies(&wire, usize::MAX));
        }
    }
}
