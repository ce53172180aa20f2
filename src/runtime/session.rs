//! TLS of one client connection: ciphertext in place, plaintext to the shard and back; the shard knows nothing of it.
//!
//! Source: RFC 8446 and RFC 5246 by way of rustls's unbuffered connections; the PROXY protocol, version 2, section 2.
//! Memory: a box a connection. Buffers are the core's (`Scratch`); a connection holds bytes of its own only while a
//! record is incomplete (at most `KEPT_BYTES_MAX`) or its socket has not taken all of a sealed one (one record; in the
//! handshake, the server's flight).
//! Errors: a peer that does not keep to TLS gets the alert, one that speaks HTTP in the clear an answer; both are then
//! done with. Not here: certificates and tickets (`tls`), epoll (`sockets`).

use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown};
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus, WriteTraffic};
use rustls::{HandshakeKind, ServerConfig};

use crate::codec::forwarded::{self, ProxyError};
use crate::codec::http::Response;
use crate::codec::message::ErrorCode;
use crate::metrics::{CoreMetrics, TlsHandshake};
use crate::shard::Sent;

/// Plaintext in one record (RFC 8446 section 5.1).
const RECORD_PLAIN_BYTES: usize = 16 << 10;
/// Bytes a record may have more than its plaintext (RFC 5246 section 6.2.3, which allows the most), and its header.
const RECORD_EXTRA_BYTES: usize = (2 << 10) + 5;
/// Ciphertext that is kept until the rest of it comes: one record. A handshake message may be spread over several, but
/// must fit in so much.
const KEPT_BYTES_MAX: usize = RECORD_PLAIN_BYTES + RECORD_EXTRA_BYTES;
// Before a record a key update may stand in the scratch (RFC 8446 section 5.2: each has at most 256 bytes more than its
// plaintext).
const _: () = assert!(RECORD_EXTRA_BYTES >= 2 * (5 + 256) + 5);
/// Plaintext that is sealed and sent for one call: a chunk of a log. The rest is for the next.
const SEALED_PER_SEND: usize = crate::limits::CHUNK_BYTES;
/// The fatal alert `internal_error` (RFC 8446 section 6): a client that speaks TLS could read no other answer before its
/// handshake, which is not done for one that is not served.
pub(super) const INTERNAL_ERROR_ALERT: [u8; 7] = [21, 3, 3, 0, 2, 2, 80];
/// Reads that throw away what an ended peer still sends, so that its socket is closed and not reset.
const DISCARDS_MAX: usize = 4;

/// What a socket gave.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Received {
    /// So many bytes, in the scratch buffer.
    Bytes(usize),
    /// Bytes that say nothing yet: part of a record, or of a handshake.
    Held,
    /// Nothing now.
    Nothing,
    /// The peer has ended its side.
    Finished,
    /// It is gone.
    Lost,
}

/// How far a handshake is that is not done.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Shake {
    /// Nothing has been answered yet: the first flight of ours is still to be made.
    Begun,
    /// A flight of ours has been sent: what comes now may end it.
    Answered,
}

/// What the sessions of a core share.
pub(super) struct Scratch {
    /// Ciphertext from a socket.
    came: Vec<u8>,
    came_bytes: usize,
    /// Ciphertext for a socket.
    sealed: Vec<u8>,
    /// What new sessions are begun with.
    config: Arc<ServerConfig>,
    metrics: Arc<CoreMetrics>,
    /// Flights that were made and leave a handshake unfinished: each may have cost a signature.
    pub(super) flights: usize,
}

impl Scratch {
    /// For a core that reads at most `bytes` at once.
    pub(super) fn new(config: Arc<ServerConfig>, metrics: Arc<CoreMetrics>, bytes: usize) -> Scratch {
        // Room for a record and a key update before it.
        let sealed = vec![0; RECORD_PLAIN_BYTES + RECORD_EXTRA_BYTES];
        let came_bytes = bytes.max(2 * KEPT_BYTES_MAX);
        Scratch { came: Vec::new(), came_bytes, sealed, config, metrics, flights: 0 }
    }
}

/// How far a connection is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stage {
    /// Its peer is a trusted proxy, which may say first for whom it speaks.
    Proxied,
    /// Nothing of it is known yet.
    Fresh,
    /// The handshake goes on: nothing has been answered yet.
    Shaking,
    /// The handshake goes on: a flight of ours has been sent.
    Answered,
    /// Plaintext may travel.
    Open,
    /// The peer has said that it sends nothing more.
    PeerEnded,
    /// It has failed, or speaks no TLS: nothing is read or sent any more.
    Over,
}

impl Stage {
    /// Whether a handshake has begun and is not done.
    fn is_in_handshake(self) -> bool {
        matches!(self, Stage::Shaking | Stage::Answered)
    }
}

/// What is left to do for the end of our side.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Ending {
    /// It goes on.
    No,
    /// When the rest is out: close_notify, then the socket's end.
    Notify,
    /// When the rest is out: the socket's end.
    Shut,
}

/// What became of the sealed bytes that waited for a socket.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Flushed {
    /// None waits.
    Out,
    /// The socket takes no more now.
    Blocked,
    /// It is gone.
    Lost,
}

/// One connection's TLS.
pub(super) struct Session {
    stage: Stage,
    ending: Ending,
    /// Whether it stands in the queue of handshakes.
    pub(super) queued: bool,
    tls: Option<UnbufferedServerConnection>,
    /// The beginning of what cannot be read before more of it comes.
    kept: Vec<u8>,
    /// Sealed bytes that the socket has not taken.
    rest: Vec<u8>,
    /// The client's address, as a trusted proxy has told it and the shard does not know it yet.
    client: Option<IpAddr>,
}

impl Session {
    /// Of a connection that was just accepted.
    pub(super) fn new(proxied: bool) -> Session {
        Session {
            stage: if proxied { Stage::Proxied } else { Stage::Fresh },
            ending: Ending::No,
            queued: false,
            tls: None,
            kept: Vec::new(),
            rest: Vec::new(),
            client: None,
        }
    }

    /// Whether its next bytes may be a handshake's, and how far that is.
    pub(super) fn shake(&self) -> Option<Shake> {
        match self.stage {
            Stage::Proxied | Stage::Fresh | Stage::Shaking => Some(Shake::Begun),
            Stage::Answered => Some(Shake::Answered),
            Stage::Open | Stage::PeerEnded | Stage::Over => None,
        }
    }

    /// Whether sealed bytes wait for its socket.
    pub(super) fn has_rest(&self) -> bool {
        !self.rest.is_empty()
    }

    /// How many of them.
    pub(super) fn rest_bytes(&self) -> usize {
        self.rest.len()
    }

    /// Reads what the socket has; its plaintext goes to `plain`, which has room for all that is read at once. Before a
    /// handshake costs anything `admit` is asked, with the client's address where a trusted proxy has told it.
    pub(super) fn receive(
        &mut self,
        socket: &OwnedFd,
        scratch: &mut Scratch,
        plain: &mut [u8],
        admit: &mut dyn FnMut(Option<IpAddr>) -> bool,
    ) -> Received {
        match self.stage {
            Stage::PeerEnded => return Received::Finished,
            Stage::Over => {
                discard(socket, plain);
                return Received::Finished;
            }
            _ => {}
        }
        let mut came = std::mem::take(&mut scratch.came);
        // It is made at the first use, and anew where a panic has lost it.
        came.resize(scratch.came_bytes, 0);
        let before = self.kept.len();
        came[..before].copy_from_slice(&self.kept);
        let room = came.len().min(plain.len());
        let received = match recv(socket, &mut came[before..room]) {
            // A FIN without close_notify is not told from one with it: a request's framing and a WebSocket's close frame
            // say whether something is missing, and nothing here ends by the end of the connection.
            Ok(0) => Received::Finished,
            Ok(count) => {
                self.kept = Vec::new();
                self.take_in(socket, scratch, &mut came[..before + count], plain, admit)
            }
            Err(Errno::AGAIN) => Received::Nothing,
            Err(_) => Received::Lost,
        };
        scratch.came = came;
        received
    }

    fn take_in(
        &mut self,
        socket: &OwnedFd,
        scratch: &mut Scratch,
        mut came: &mut [u8],
        plain: &mut [u8],
        admit: &mut dyn FnMut(Option<IpAddr>) -> bool,
    ) -> Received {
        if self.stage == Stage::Proxied {
            let used = match forwarded::proxy_v2(came) {
                Ok(None) => {
                    self.kept = came.to_vec();
                    return Received::Held;
                }
                Ok(Some((client, used))) => {
                    self.client = client.map(|client| client.ip());
                    used
                }
                Err(ProxyError::Signature) => 0,
                Err(error) => return self.refuse(socket, scratch, &error.to_string()),
            };
            self.stage = Stage::Fresh;
            came = &mut came[used..];
        }
        if self.stage == Stage::Fresh {
            match came.first() {
                None => return Received::Held,
                // No record begins with a letter; every request does.
                Some(first) if first.is_ascii_alphabetic() => {
                    return self.refuse(socket, scratch, "this port speaks HTTPS: use https:// or wss://");
                }
                Some(_) => {}
            }
            if !admit(self.client.take()) {
                return self.turn_away(socket, scratch);
            }
            let Ok(tls) = UnbufferedServerConnection::new(Arc::clone(&scratch.config)) else { return Received::Lost };
            self.tls = Some(tls);
            self.stage = Stage::Shaking;
        }
        self.decrypt(socket, scratch, came, plain)
    }

    /// Makes plaintext of ciphertext, and goes on with the handshake.
    fn decrypt(&mut self, socket: &OwnedFd, scratch: &mut Scratch, came: &mut [u8], plain: &mut [u8]) -> Received {
        let Some(tls) = &mut self.tls else { return Received::Lost };
        let (mut used, mut filled, mut made) = (0, 0, 0);
        let mut failed = false;
        loop {
            let UnbufferedStatus { mut discard, state, .. } = tls.process_tls_records(&mut came[used..]);
            let mut over = false;
            match state {
                Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                    while let Some(record) = traffic.next_record() {
                        match record {
                            Ok(record) if record.payload.len() <= plain.len() - filled => {
                                plain[filled..filled + record.payload.len()].copy_from_slice(record.payload);
                                filled += record.payload.len();
                                discard += record.discard;
                            }
                            _ => failed = true,
                        }
                    }
                }
                Ok(ConnectionState::EncodeTlsData(mut data)) => {
                    match encode(&mut scratch.sealed, made, |sealed| data.encode(sealed)) {
                        Some(count) => made += count,
                        None => failed = true,
                    }
                }
                Ok(ConnectionState::TransmitTlsData(data)) => {
                    data.done();
                    if tls.is_handshaking() {
                        scratch.flights = scratch.flights.wrapping_add(1);
                        self.stage = Stage::Answered;
                    }
                    failed |= !transmit(socket, &mut self.rest, &scratch.sealed[..made]);
                    made = 0;
                }
                Ok(ConnectionState::PeerClosed) => {
                    // The end of the handshake may have come with it in one read.
                    self.stage = opened(self.stage, tls, scratch);
                    if self.stage.is_in_handshake() {
                        scratch.metrics.tls_handshakes.of(TlsHandshake::Failed).count();
                    }
                    self.stage = Stage::PeerEnded;
                }
                Ok(ConnectionState::BlockedHandshake | ConnectionState::WriteTraffic(_) | ConnectionState::Closed) => {
                    over = true;
                }
                // Early data is not offered; whatever else there may come to be was not asked for.
                Ok(_) | Err(_) => failed = true,
            }
            used += discard;
            if failed || over {
                break;
            }
        }
        self.stage = opened(self.stage, tls, scratch);
        // After close_notify nothing more is read (RFC 8446 section 6.1).
        let left = if self.stage == Stage::PeerEnded { &[][..] } else { &came[used..] };
        if left.len() > KEPT_BYTES_MAX {
            failed = true;
        } else if !failed && !left.is_empty() {
            self.kept = left.to_vec();
        }
        if failed {
            self.fail(socket, scratch, &mut came[used..]);
        }
        match self.stage {
            _ if filled > 0 => Received::Bytes(filled),
            Stage::Over | Stage::PeerEnded => Received::Finished,
            _ => Received::Held,
        }
    }

    /// The peer does not keep to TLS: it gets the alert, and the connection is done with.
    fn fail(&mut self, socket: &OwnedFd, scratch: &mut Scratch, left: &mut [u8]) {
        let shaking = self.stage.is_in_handshake();
        if let Some(mut tls) = self.tls.take() {
            let (mut used, mut made) = (0, 0);
            while tls.wants_write() {
                let UnbufferedStatus { discard, state, .. } = tls.process_tls_records(&mut left[used..]);
                let Ok(ConnectionState::EncodeTlsData(mut data)) = state else { break };
                let Some(count) = encode(&mut scratch.sealed, made, |sealed| data.encode(sealed)) else { break };
                made += count;
                used += discard;
            }
            let _ = transmit(socket, &mut self.rest, &scratch.sealed[..made]);
        }
        if shaking {
            scratch.metrics.tls_handshakes.of(TlsHandshake::Failed).count();
        }
        self.give_up(socket);
    }

    /// The peer speaks no TLS: it is told so in the clear, and the connection is done with.
    fn refuse(&mut self, socket: &OwnedFd, scratch: &Scratch, detail: &str) -> Received {
        let mut answer = Vec::new();
        Response::problem(400, ErrorCode::BadRequest.as_str(), detail).close(true).write(&mut answer);
        scratch.metrics.tls_handshakes.of(TlsHandshake::NotTls).count();
        let _ = transmit(socket, &mut self.rest, &answer);
        self.give_up(socket);
        Received::Finished
    }

    /// Its address has as many handshakes or connections as it may: an alert is all it costs.
    fn turn_away(&mut self, socket: &OwnedFd, scratch: &Scratch) -> Received {
        scratch.metrics.tls_handshakes.of(TlsHandshake::Refused).count();
        let _ = transmit(socket, &mut self.rest, &INTERNAL_ERROR_ALERT);
        self.give_up(socket);
        Received::Finished
    }

    /// Nothing is read any more, and nothing sent but the rest.
    fn give_up(&mut self, socket: &OwnedFd) {
        self.stage = Stage::Over;
        self.tls = None;
        self.ending = Ending::Shut;
        if self.rest.is_empty() {
            let _ = rustix::net::shutdown(socket, Shutdown::Write);
        }
    }

    /// Seals and sends as much of `bytes` as the socket takes, and at most one record more: its rest is kept, and is sent
    /// before anything else is sealed.
    pub(super) fn send(&mut self, socket: &OwnedFd, scratch: &mut Scratch, bytes: &[u8]) -> Sent {
        match self.flush(socket, scratch) {
            Flushed::Out => {}
            Flushed::Blocked => return Sent::Blocked,
            Flushed::Lost => return Sent::Lost,
        }
        let mut taken = 0;
        for part in bytes.chunks(RECORD_PLAIN_BYTES) {
            let Some(count) = self.seal(scratch, |traffic, sealed| traffic.encrypt(part, sealed)) else {
                return Sent::Lost;
            };
            if !transmit(socket, &mut self.rest, &scratch.sealed[..count]) {
                return Sent::Lost;
            }
            taken += part.len();
            if self.has_rest() || taken >= SEALED_PER_SEND {
                break;
            }
        }
        Sent::Bytes(taken)
    }

    /// Sends what waits, then ends our side where that was asked for.
    pub(super) fn flush(&mut self, socket: &OwnedFd, scratch: &mut Scratch) -> Flushed {
        if !self.has_rest() {
            return Flushed::Out;
        }
        let rest = std::mem::take(&mut self.rest);
        if !transmit(socket, &mut self.rest, &rest) {
            return Flushed::Lost;
        }
        if !self.has_rest() {
            match self.ending {
                Ending::No => {}
                Ending::Notify => self.end(socket, scratch),
                Ending::Shut => {
                    let _ = rustix::net::shutdown(socket, Shutdown::Write);
                }
            }
        }
        if self.has_rest() { Flushed::Blocked } else { Flushed::Out }
    }

    /// Ends our side: close_notify, then the socket's end, both after what still waits.
    pub(super) fn end(&mut self, socket: &OwnedFd, scratch: &mut Scratch) {
        if self.stage == Stage::Over {
            return;
        }
        if self.has_rest() {
            self.ending = Ending::Notify;
            return;
        }
        self.ending = Ending::Shut;
        if matches!(self.stage, Stage::Open | Stage::PeerEnded)
            && let Some(count) = self.seal(scratch, |traffic, sealed| traffic.queue_close_notify(sealed))
        {
            let _ = transmit(socket, &mut self.rest, &scratch.sealed[..count]);
        }
        if !self.has_rest() {
            let _ = rustix::net::shutdown(socket, Shutdown::Write);
        }
    }

    /// The connection is let go of: what its peer has sent meanwhile is thrown away where it is still to read an answer,
    /// because a socket closed over unread bytes is reset.
    pub(super) fn let_go(&self, socket: &OwnedFd, scratch: &mut Scratch) {
        if matches!(self.stage, Stage::PeerEnded | Stage::Over) {
            discard(socket, &mut scratch.came);
        }
        if self.stage.is_in_handshake() {
            scratch.metrics.tls_handshakes.of(TlsHandshake::Failed).count();
        }
    }

    /// Throws away what its peer has sent and nobody is to read: a socket closed over unread bytes is reset, and what it has
    /// taken is lost with it.
    pub(super) fn discard_unread(&self, socket: &OwnedFd, scratch: &mut Scratch) {
        discard(socket, &mut scratch.came);
    }

    /// Seals what `act` gives; how many bytes stand in the scratch then. `None`: no more can be sealed.
    fn seal(
        &mut self,
        scratch: &mut Scratch,
        act: impl FnOnce(
            &mut WriteTraffic<'_, rustls::server::ServerConnectionData>,
            &mut [u8],
        ) -> Result<usize, EncryptError>,
    ) -> Option<usize> {
        if !matches!(self.stage, Stage::Open | Stage::PeerEnded) {
            return None;
        }
        let tls = self.tls.as_mut()?;
        let mut made = 0;
        loop {
            // With what is kept, for rustls remembers where in it an incomplete message stands. It was read as far as it
            // goes, so nothing comes of it.
            match tls.process_tls_records(&mut self.kept).state {
                Ok(ConnectionState::WriteTraffic(mut traffic)) => {
                    return Some(made + act(&mut traffic, &mut scratch.sealed[made..]).ok()?);
                }
                Ok(ConnectionState::EncodeTlsData(mut data)) => {
                    made += encode(&mut scratch.sealed, made, |sealed| data.encode(sealed))?;
                }
                Ok(ConnectionState::TransmitTlsData(data)) => data.done(),
                _ => return None,
            }
        }
    }
}

/// The stage after this one where the handshake is done, which is counted then.
fn opened(stage: Stage, tls: &UnbufferedServerConnection, scratch: &Scratch) -> Stage {
    if !stage.is_in_handshake() || tls.is_handshaking() {
        return stage;
    }
    let resumed = tls.handshake_kind() == Some(HandshakeKind::Resumed);
    let result = if resumed { TlsHandshake::Resumed } else { TlsHandshake::Full };
    scratch.metrics.tls_handshakes.of(result).count();
    Stage::Open
}

/// Encodes a handshake's record behind the first `made` bytes, in more room where there is not enough: a certificate may
/// be larger than a record.
fn encode(
    sealed: &mut Vec<u8>,
    made: usize,
    mut encode: impl FnMut(&mut [u8]) -> Result<usize, EncodeError>,
) -> Option<usize> {
    match encode(&mut sealed[made..]) {
        Ok(count) => Some(count),
        Err(EncodeError::InsufficientSize(error)) => {
            sealed.resize(made + error.required_size, 0);
            encode(&mut sealed[made..]).ok()
        }
        Err(EncodeError::AlreadyEncoded) => None,
    }
}

/// Sends `bytes` behind what waits in `rest`, which keeps what the socket does not take; false: it is gone.
fn transmit(socket: &OwnedFd, rest: &mut Vec<u8>, bytes: &[u8]) -> bool {
    let mut sent = 0;
    while rest.is_empty() && sent < bytes.len() {
        match rustix::net::send(socket, &bytes[sent..], SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(count) => sent += count,
            Err(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM) => break,
            Err(Errno::INTR) => {}
            Err(_) => return false,
        }
    }
    if sent < bytes.len() {
        rest.reserve_exact(bytes.len() - sent);
        rest.extend_from_slice(&bytes[sent..]);
    }
    true
}

fn recv(socket: &OwnedFd, into: &mut [u8]) -> Result<usize, Errno> {
    loop {
        match rustix::net::recv(socket, &mut *into, RecvFlags::DONTWAIT) {
            Ok((count, _)) => return Ok(count),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}

fn discard(socket: &OwnedFd, into: &mut [u8]) {
    for _ in 0..DISCARDS_MAX {
        if !matches!(recv(socket, into), Ok(1..)) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_is_little_more_than_what_rustls_needs() {
        let (session, rustls) = (size_of::<Session>(), size_of::<UnbufferedServerConnection>());
        assert!(session <= rustls + 96, "a session takes {session} bytes, of which {rustls} are rustls's");
        assert!(session <= 1_400, "a session takes {session} bytes, besides what rustls allocates");
    }
}
