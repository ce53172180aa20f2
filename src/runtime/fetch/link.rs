//! One upstream connection, plain or TLS, between requests and during one.
//!
//! Source: RFC 9112 section 9 for its life, RFC 8446 section 6.1 for its end under TLS.
//! Memory: the socket, the TLS session if any; while a request is under way two buffers of 16 KiB.
//! Errors: [`Fault`].  Not here: HTTP, time-outs. A future dropped while a request is under way takes the connection with it.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::io::{self, Write};
use std::pin::pin;
use std::task::Poll;

use monoio::io::{AsyncReadRent, AsyncWriteRentExt, OwnedReadHalf, OwnedWriteHalf, Splitable};
use monoio::net::TcpStream;
use rustls::client::ClientConnection;

use super::tls::{TlsError, absorb, take_sealed};

/// Bytes read, and sealed, at once: a TLS record and its overhead (RFC 8446 section 5.2).
const BUFFER_BYTES: usize = (16 << 10) + 256 + 5;
/// Bytes of plaintext in one TLS record.
const RECORD_PLAIN_BYTES: usize = 16 << 10;
/// Reads that may find nothing but TLS's own messages before an idle connection is given up.
const IDLE_READS_MAX: usize = 4;

/// A connection between requests.
pub(super) struct Link {
    stream: TcpStream,
    tls: Tls,
}

type Tls = Option<Box<RefCell<ClientConnection>>>;

/// Why nothing more can be read.
#[derive(Debug)]
pub(super) enum Fault {
    /// The socket's own error.
    Io(io::Error),
    /// What came is no TLS record of this connection.
    Tls(TlsError),
    /// The upstream closed the socket without TLS's close_notify: what came before may be cut short.
    Cut,
}

impl Link {
    pub(super) fn plain(stream: TcpStream) -> Link {
        Link { stream, tls: None }
    }

    pub(super) fn sealed(stream: TcpStream, tls: ClientConnection) -> Link {
        Link { stream, tls: Some(Box::new(RefCell::new(tls))) }
    }

    /// Whether the upstream has neither closed this idle connection nor said something out of turn. Waits for nothing but
    /// one turn of the ring.
    pub(super) async fn is_open(&mut self) -> bool {
        for _ in 0..IDLE_READS_MAX {
            if !has_arrivals(&self.stream).await {
                return true;
            }
            let Some(tls) = &mut self.tls else { return false };
            // TLS may have messages of its own, such as a session ticket (RFC 8446 section 4.6.1).
            let (read, sealed) = self.stream.read(Vec::with_capacity(BUFFER_BYTES)).await;
            let mut unasked = false;
            let tls = tls.get_mut();
            match read {
                Ok(0) | Err(_) => return false,
                Ok(_) if absorb(tls, &sealed, |_| unasked = true).is_err() || unasked => return false,
                Ok(_) if has_closed(tls) => return false,
                Ok(_) => {}
            }
        }
        false
    }

    /// For the time of one request, into a half to read from and one to write to, which can be used at the same time.
    pub(super) fn split(self) -> (Inbound, Outbound, Seal) {
        let (read, write) = self.stream.into_split();
        let inbound = Inbound { half: read, sealed: Vec::with_capacity(BUFFER_BYTES), plain: Vec::new() };
        (inbound, Outbound { half: write }, Seal(self.tls))
    }

    /// Back together again. `None`, and closed, when the halves are not of one connection.
    pub(super) fn join(inbound: Inbound, outbound: Outbound, seal: Seal) -> Option<Link> {
        let stream = inbound.half.reunite(outbound.half).ok()?;
        Some(Link { stream, tls: seal.0 })
    }
}

/// The TLS session that both halves go through, if any.
pub(super) struct Seal(Tls);

/// The half that is read.
pub(super) struct Inbound {
    half: OwnedReadHalf<TcpStream>,
    sealed: Vec<u8>,
    plain: Vec<u8>,
}

impl Inbound {
    /// The next bytes, at least one; none at all once the upstream has closed in good order.
    ///
    /// # Errors
    /// See [`Fault`].
    pub(super) async fn next(&mut self, seal: &Seal) -> Result<&[u8], Fault> {
        self.plain.clear();
        loop {
            let (read, buffer) = self.half.read(std::mem::take(&mut self.sealed)).await;
            self.sealed = buffer;
            let count = read.map_err(Fault::Io)?;
            let Some(tls) = &seal.0 else { return Ok(self.sealed.get(..count).unwrap_or_default()) };
            let mut tls = tls.borrow_mut();
            if count == 0 {
                return if has_closed(&mut tls) { Ok(&[]) } else { Err(Fault::Cut) };
            }
            absorb(&mut tls, &self.sealed, |bytes| self.plain.extend_from_slice(bytes)).map_err(Fault::Tls)?;
            if !self.plain.is_empty() {
                return Ok(&self.plain);
            }
            if has_closed(&mut tls) {
                return Ok(&[]);
            }
        }
    }
}

/// The half that is written.
pub(super) struct Outbound {
    half: OwnedWriteHalf<TcpStream>,
}

impl Outbound {
    /// Sends all of `bytes`.
    ///
    /// # Errors
    /// The socket's.
    pub(super) async fn send(&mut self, seal: &Seal, bytes: Vec<u8>) -> io::Result<()> {
        let Some(tls) = &seal.0 else { return self.half.write_all(bytes).await.0.map(drop) };
        for record in bytes.chunks(RECORD_PLAIN_BYTES) {
            let sealed = {
                let mut tls = tls.borrow_mut();
                tls.writer().write_all(record)?;
                take_sealed(&mut tls)?
            };
            self.half.write_all(sealed).await.0?;
        }
        Ok(())
    }
}

/// Whether the upstream has said that it will send no more.
fn has_closed(tls: &mut ClientConnection) -> bool {
    tls.process_new_packets().is_ok_and(|state| state.peer_has_closed())
}

/// Whether there is something to read, or an end to notice, now. Both polls go to the kernel together, and a socket that
/// idles can always be written to: when that is answered, so is the other.
async fn has_arrivals(stream: &TcpStream) -> bool {
    let mut readable = pin!(stream.readable(false));
    let mut writable = pin!(stream.writable(false));
    poll_fn(|cx| {
        if readable.as_mut().poll(cx).is_ready() {
            return Poll::Ready(true);
        }
        writable.as_mut().poll(cx).map(|outcome| outcome.is_err())
    })
    .await
}
