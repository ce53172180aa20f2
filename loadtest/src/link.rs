//! One connection: its socket, what is half read and half written, and the heads of its handshake.
//!
//! Source: RFC 6455 section 4, RFC 7692 section 5, RFC 9112. Memory: about 300 bytes when idle, besides TLS.
//! Errors: [`HeadError`], the server's fault. Not here: when things are sent and what messages mean (`worker`).

use std::io::{self, Write as _};
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use rustls::ClientConnection;

use crate::account::Subscription;
use crate::sse::{Chunked, Scan};
use crate::ws::{self, Fragments, Opcode};

/// The longest answer head that is read.
pub const HEAD_BYTES_MAX: usize = 64 << 10;

/// What a connection is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Purpose {
    /// Reads as fast as it can.
    Reader,
    /// Reads nothing once it is open.
    Stalled,
    /// Reads a few bytes at a time.
    Slow,
    /// Was opened first and stays, while others come and go.
    Kept,
    /// Posts a new token for the SSE connection in that slot, of that generation.
    Renewal(u32, u32),
}

/// Where it stands.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum State {
    /// The socket connects.
    Connecting,
    /// The answer's head is awaited.
    Head,
    /// Messages come.
    Messages,
    /// A close was sent or received: only the end is awaited.
    Closing,
}

/// One connection.
pub struct Link {
    /// Its socket.
    pub socket: OwnedFd,
    /// Its number among all of the run.
    pub number: u32,
    /// Which of the URLs.
    pub target: u16,
    /// What it is for.
    pub purpose: Purpose,
    /// Where it stands.
    pub state: State,
    /// Whether its first message came.
    pub open: bool,
    /// Whether it was counted as failed already.
    pub told: bool,
    /// Whether permessage-deflate was agreed.
    pub deflate: bool,
    /// Whether epoll is asked to tell when it can be written.
    pub wants_out: bool,
    /// A renewal was sent and not answered yet; `exp` of its token.
    pub renewing: Option<u64>,
    /// Chunks of an SSE body; `None` where it is not chunked.
    pub chunked: Option<Chunked>,
    /// What was read and is not whole yet; over TLS in plain text.
    pub partial: Vec<u8>,
    /// How far `partial` was searched for the end of an SSE block.
    pub scan: Scan,
    /// What is to be written.
    pub out: Vec<u8>,
    /// TLS, where it is spoken.
    pub tls: Option<Box<ClientConnection>>,
    /// A message that comes in parts.
    pub fragments: Option<Box<Fragments>>,
    /// What it has seen of each stream.
    pub subscriptions: Vec<Subscription>,
    /// When it was begun, on the worker's clock.
    pub begun_us: u64,
    /// When its socket was last read empty, wall time: what is read next came later.
    pub drained_us: u64,
    /// `exp` of its token.
    pub exp: Option<u64>,
    /// When its last event was read, wall time.
    pub last_event_us: u64,
    /// Its id as `welcome` says, where renewals need it.
    pub connection: Option<Box<str>>,
}

impl Link {
    /// A new one that connects.
    pub fn new(socket: OwnedFd, number: u32, target: u16, purpose: Purpose, begun_us: u64) -> Link {
        Link {
            socket,
            number,
            target,
            purpose,
            state: State::Connecting,
            open: false,
            told: false,
            deflate: false,
            wants_out: false,
            renewing: None,
            chunked: None,
            partial: Vec::new(),
            scan: Scan::default(),
            out: Vec::new(),
            tls: None,
            fragments: None,
            subscriptions: Vec::new(),
            begun_us,
            drained_us: 0,
            exp: None,
            last_event_us: 0,
            connection: None,
        }
    }

    /// Whether its events are judged and timed.
    pub fn is_reader(&self) -> bool {
        matches!(self.purpose, Purpose::Reader | Purpose::Kept)
    }

    /// Whether it is to get what all others like it get: it reads, it is open and nobody has closed it.
    pub fn is_healthy(&self) -> bool {
        self.is_reader() && self.open && self.state == State::Messages
    }

    /// Whether an event of that stream came.
    pub fn has_seen(&self, stream: u32) -> bool {
        self.subscriptions.iter().any(|known| known.stream == stream)
    }

    /// Queues plain text to be sent.
    pub fn queue(&mut self, bytes: &[u8]) {
        match &mut self.tls {
            // Nothing limits its buffer, and what is queued here is small.
            Some(tls) => tls.writer().write_all(bytes).expect("the TLS buffer takes every write"),
            None => self.out.extend_from_slice(bytes),
        }
    }

    /// Queues a WebSocket frame.
    pub fn queue_frame(&mut self, opcode: Opcode, payload: &[u8]) {
        let mut frame = Vec::with_capacity(payload.len() + 14);
        // A mask guards proxies against scripts that choose the bytes (RFC 6455 10.3); here nobody chooses, so any will do.
        let mask = (self.number.wrapping_mul(0x9e37_79b9) ^ payload.len() as u32).to_be_bytes();
        ws::write_frame(&mut frame, opcode, payload, mask);
        self.queue(&frame);
    }

    /// Writes what is queued as far as the socket takes it; true when all is written.
    ///
    /// # Errors
    /// The socket's.
    pub fn flush(&mut self) -> Result<bool, Errno> {
        if let Some(tls) = &mut self.tls {
            while tls.wants_write() {
                if tls.write_tls(&mut self.out).is_err() {
                    return Err(Errno::IO);
                }
            }
        }
        let mut sent = 0;
        while sent < self.out.len() {
            match send(&self.socket, &self.out[sent..], SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(length) => sent += length,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.out.drain(..sent);
                    return Ok(false);
                }
                Err(error) => return Err(error),
            }
        }
        self.out = Vec::new();
        Ok(true)
    }
}

/// The name of a socket error in the report.
pub fn cause(error: Errno) -> String {
    match error {
        Errno::CONNREFUSED => "refused".into(),
        Errno::CONNRESET | Errno::PIPE => "reset".into(),
        Errno::TIMEDOUT => "timeout".into(),
        Errno::ADDRNOTAVAIL => "no_free_port".into(),
        Errno::MFILE | Errno::NFILE => "no_descriptors".into(),
        Errno::NETUNREACH | Errno::HOSTUNREACH => "unreachable".into(),
        Errno::NOBUFS | Errno::NOMEM => "no_memory".into(),
        other => io::Error::from(other).to_string(),
    }
}

/// The head of an answer.
#[derive(Debug, Eq, PartialEq)]
pub struct Head<'a> {
    /// Its status.
    pub status: u16,
    lines: &'a str,
    /// Bytes of it, the empty line included.
    pub length: usize,
}

/// The answer is not HTTP/1.1 or its head is over [`HEAD_BYTES_MAX`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct HeadError;

/// The head that `bytes` start with; `None` where it is not there as a whole yet.
///
/// # Errors
/// What is no head.
pub fn head(bytes: &[u8]) -> Result<Option<Head<'_>>, HeadError> {
    let Some(end) = memchr::memmem::find(bytes, b"\r\n\r\n") else {
        return if bytes.len() >= HEAD_BYTES_MAX { Err(HeadError) } else { Ok(None) };
    };
    let text = std::str::from_utf8(&bytes[..end]).map_err(|_| HeadError)?;
    let (status, lines) = text.split_once("\r\n").unwrap_or((text, ""));
    let status = status.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)).ok_or(HeadError)?;
    let status = status.parse().map_err(|_| HeadError)?;
    Ok(Some(Head { status, lines, length: end + 4 }))
}

impl<'a> Head<'a> {
    /// The first field of that name.
    pub fn field(&self, name: &str) -> Option<&'a str> {
        let mut fields = self.lines.split("\r\n").filter_map(|line| line.split_once(':'));
        fields.find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
    }
}

/// Whether the server agreed to permessage-deflate.
///
/// # Errors
/// An answer that the offer (`server_no_context_takeover; client_no_context_takeover`) does not allow.
pub fn deflate_agreed(extensions: Option<&str>, offered: bool) -> Result<bool, HeadError> {
    let Some(extensions) = extensions else { return Ok(false) };
    let mut parts = extensions.split(';').map(str::trim);
    if !offered || parts.next() != Some("permessage-deflate") {
        return Err(HeadError);
    }
    let mut resets = false;
    for part in parts {
        let name = part.split('=').next().unwrap_or_default().trim();
        match name {
            "server_no_context_takeover" => resets = true,
            "client_no_context_takeover" | "server_max_window_bits" => {}
            _ => return Err(HeadError),
        }
    }
    // Without it each connection would need a window of its own.
    if resets { Ok(true) } else { Err(HeadError) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_read_cut_at_any_byte() {
        let wire =
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nSec-WebSocket-Accept:  abc \r\n\r\n\x81\x00";
        let whole = wire.len() - 2;
        for cut in 0..whole {
            assert_eq!(head(&wire[..cut]), Ok(None), "cut at {cut}");
        }
        let read = head(wire).expect("HTTP").expect("whole");
        assert_eq!((read.status, read.length), (101, whole));
        assert_eq!(read.field("sec-websocket-accept"), Some("abc"));
        assert_eq!(read.field("accept"), None);
        assert_eq!(head(b"HTTP/1.1 200\r\n\r\n").expect("HTTP").expect("whole").status, 200);
    }

    #[test]
    fn what_is_no_head_is_an_error() {
        for wire in [&b"HTTP/2 200 OK\r\n\r\n"[..], b"SSH-2.0\r\n\r\n", b"HTTP/1.1 2x0 OK\r\n\r\n", b"\xff\r\n\r\n"] {
            assert_eq!(head(wire), Err(HeadError), "{wire:?}");
        }
        assert_eq!(head(&vec![b'x'; HEAD_BYTES_MAX - 1]), Ok(None));
        assert_eq!(head(&vec![b'x'; HEAD_BYTES_MAX]), Err(HeadError));
    }

    #[test]
    fn deflate_is_agreed_only_as_offered() {
        let check = |answer, expected| assert_eq!(deflate_agreed(answer, true), expected, "{answer:?}");
        check(None, Ok(false));
        check(Some("permessage-deflate; server_no_context_takeover"), Ok(true));
        check(
            Some("permessage-deflate;client_no_context_takeover; server_no_context_takeover;server_max_window_bits=12"),
            Ok(true),
        );
        check(Some("permessage-deflate"), Err(HeadError));
        check(Some("permessage-deflate; server_no_context_takeover; x"), Err(HeadError));
        check(Some("x-webkit-deflate-frame"), Err(HeadError));
        assert_eq!(deflate_agreed(Some("permessage-deflate; server_no_context_takeover"), false), Err(HeadError));
    }
}
