//! One connection to Redis: dialled, secured, logged in, read and written, and dialled again when it is lost.
//!
//! Source: RESP2 (`codec::resp`); <https://redis.io/docs/latest/commands/auth/>, `select`, `client-setname`, `ping`.
//! Memory: the socket, its TLS session, the commands that it has not yet taken (bounded by who writes them) and the reply
//! that is coming (bounded by [`Bounds`]).
//! Errors: [`Fault`], each of which ends the connection; it holds nothing that was sent or received.
//! Not here: what is asked and answered (`commands`, `events`, `follow`), waiting for sockets (`mod`).

use std::borrow::Cow;
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::SendFlags;
use rustls::ClientConfig;
use rustls::client::ClientConnection;
use rustls::pki_types::ServerName;
use socket2::{Domain, Socket, Type};
use url::Host;

use crate::codec::resp::{Bounds, Decoder, Reply, RespError, error_code, write_command};
use crate::config::RedisServer;
use crate::limits;
use crate::metrics::RedisLink;
use crate::runtime::fetch::in_words;
use crate::runtime::fetch::tls::{absorb, take_sealed};
use crate::runtime::resolver::{Answer, ResolveError};
use crate::shard::Rng;
use crate::time::Instant;

/// Bytes of plaintext in one TLS record.
const RECORD_PLAIN_BYTES: usize = 16 << 10;
/// Shortest time that one of several addresses gets to answer.
const ADDRESS_TIME_MIN: Duration = Duration::from_millis(250);
/// What this server calls itself there.
const CLIENT_NAME: &[u8] = b"restcast";

/// Where Redis is and how to log in.
pub(super) struct Target {
    pub(super) server: RedisServer,
    /// For `rediss://`: whom to trust, and the name to be vouched for.
    pub(super) tls: Option<(Arc<ClientConfig>, ServerName<'static>)>,
    /// How long a connection with its login, or an answer, may take.
    pub(super) timeout: Duration,
}

/// Why a connection ended, or was not made.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    #[error("its name does not resolve: {0}")]
    Resolve(ResolveError),
    #[error("it cannot be connected to: {0}")]
    Connect(String),
    #[error("TLS: {0}")]
    Tls(Cow<'static, str>),
    #[error("it refuses {command}: {code}")]
    Refused { command: &'static str, code: String },
    #[error("what it sends is not Redis's protocol: {0}")]
    Garbage(#[from] RespError),
    #[error("it answers what was not asked")]
    OutOfStep,
    #[error("it closed the connection")]
    Closed,
    #[error("the connection broke: {0}")]
    Broken(String),
    #[error("no answer within {0:?}")]
    Timeout(Duration),
}

impl Fault {
    /// The fault of an error that `command` was answered with.
    pub(super) fn refused(command: &'static str, line: &[u8]) -> Fault {
        Fault::Refused { command, code: error_code(line).to_owned() }
    }

    /// Whether Redis is there and says that it is not ready yet.
    pub(super) fn is_loading(&self) -> bool {
        matches!(self, Fault::Refused { code, .. } if code == "LOADING")
    }
}

/// What the links share while they take their turn.
pub(super) struct Io<'i> {
    pub(super) now: Instant,
    pub(super) rng: &'i mut Rng,
    pub(super) scratch: &'i mut [u8],
    pub(super) target: &'i Target,
    /// Has a name looked up for that link's attempt of that number; the answer comes back by [`Link::resolved`].
    pub(super) resolve: &'i dyn Fn(RedisLink, u64, &str) -> Result<(), ResolveError>,
}

/// What became of a link in its turn.
#[derive(Debug)]
pub(super) enum Turn {
    /// It is as it was.
    Same,
    /// It is ready for commands now.
    Opened,
    /// An attempt has failed, or the connection ended: what was under way has no answer. It is made again in a while.
    Closed(Fault),
}

pub(super) struct Link {
    which: RedisLink,
    bounds: Bounds,
    phase: Phase,
    /// Attempts in a row that led to nothing that held.
    failures: u32,
    /// Whether it may be ready in a moment: it was till now, or has not been tried.
    hopeful: bool,
    attempt: u64,
}

enum Phase {
    /// Until it is dialled.
    Waiting {
        until: Instant,
    },
    /// Its name is being looked up; `late`: for longer than an attempt may take.
    Resolving {
        until: Instant,
        late: bool,
    },
    /// The first of the addresses is tried until `next`, where there are others, all of them until `until`.
    Connecting {
        socket: Socket,
        others: VecDeque<SocketAddr>,
        next: Instant,
        until: Instant,
    },
    LoggingIn {
        wire: Wire,
        steps: VecDeque<Step>,
        until: Instant,
    },
    Ready {
        wire: Wire,
        since: Instant,
    },
}

/// What is answered during a login.
#[derive(Clone, Copy, Debug)]
enum Step {
    Auth,
    Select,
    Name,
    Ping,
}

impl Link {
    pub(super) fn new(which: RedisLink, bounds: Bounds, now: Instant) -> Link {
        Link { which, bounds, phase: Phase::Waiting { until: now }, failures: 0, hopeful: true, attempt: 0 }
    }

    /// Whether commands can be written.
    pub(super) fn is_ready(&self) -> bool {
        matches!(self.phase, Phase::Ready { .. })
    }

    /// Whether it is ready, or may be in a moment: what is to be asked waits for that, else it is not asked at all.
    pub(super) fn is_hopeful(&self) -> bool {
        self.hopeful
    }

    /// What it waits for, where it has a socket. `hold`: it is not to be read for now.
    pub(super) fn interest(&self, hold: bool) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let reading = if hold { PollFlags::empty() } else { PollFlags::IN };
        match &self.phase {
            Phase::Waiting { .. } | Phase::Resolving { .. } => None,
            Phase::Connecting { socket, .. } => Some((socket.as_fd(), PollFlags::OUT)),
            Phase::LoggingIn { wire, .. } | Phase::Ready { wire, .. } => {
                let writing = if wire.has_more() { PollFlags::OUT } else { PollFlags::empty() };
                Some((wire.socket.as_fd(), reading | writing))
            }
        }
    }

    /// Bytes that this connection has sent since it was ready, or nothing where it is not.
    pub(super) fn received(&self) -> u64 {
        match &self.phase {
            Phase::Ready { wire, .. } => wire.received,
            _ => 0,
        }
    }

    /// When it wants its turn if nothing happens before.
    pub(super) fn next_timeout(&self) -> Option<Instant> {
        match &self.phase {
            Phase::Waiting { until } | Phase::Resolving { until, late: false } | Phase::LoggingIn { until, .. } => {
                Some(*until)
            }
            Phase::Connecting { next, until, .. } => Some(*next.min(until)),
            Phase::Resolving { .. } | Phase::Ready { .. } => None,
        }
    }

    /// Where commands are written, where it is ready for any; [`Link::flush`] sends them.
    pub(super) fn out(&mut self) -> Option<&mut Vec<u8>> {
        match &mut self.phase {
            Phase::Ready { wire, .. } => Some(&mut wire.out),
            _ => None,
        }
    }

    /// Its turn: what has come is read, each reply given to `hear`, whose error ends the connection.
    pub(super) fn turn(
        &mut self,
        ready: PollFlags,
        io: &mut Io<'_>,
        hear: &mut dyn FnMut(Reply) -> Result<(), Fault>,
    ) -> Turn {
        match self.advance(ready, io, hear) {
            Ok(turn) => turn,
            Err(fault) => self.close(fault, io),
        }
    }

    /// Ends the connection or attempt for that reason; it is made again after a random while.
    pub(super) fn close(&mut self, fault: Fault, io: &mut Io<'_>) -> Turn {
        match &self.phase {
            // A connection that held is made again soon; one that was lost at once is a failure like any other.
            Phase::Ready { since, .. } if io.now.since(*since) >= limits::REDIS_SETTLED => self.failures = 0,
            Phase::Resolving { late: true, .. } => {}
            _ => self.failures = self.failures.saturating_add(1),
        }
        self.hopeful = self.is_ready() && self.failures <= 1;
        let window = limits::REDIS_BACKOFF_MIN * 2u32.saturating_pow(self.failures.min(16));
        let window = window.min(limits::REDIS_BACKOFF_MAX);
        let wait = io.rng.below(u64::try_from(window.as_micros()).unwrap_or(u64::MAX));
        self.phase = Phase::Waiting { until: io.now + Duration::from_micros(wait) };
        Turn::Closed(fault)
    }

    /// The answer to a name that was to be looked up for that attempt.
    pub(super) fn resolved(&mut self, attempt: u64, answer: Answer, io: &mut Io<'_>) -> Turn {
        let Phase::Resolving { until, late } = self.phase else { return Turn::Same };
        if attempt != self.attempt {
            return Turn::Same;
        }
        // Who has waited for long is not to be late from the start.
        let until = if late { io.now + io.target.timeout } else { until };
        let connected = answer.map_err(Fault::Resolve).and_then(|addresses| self.connect(&addresses, until, io));
        connected.map_or_else(|fault| self.close(fault, io), |()| Turn::Same)
    }

    /// Sends what was written, as far as the socket takes it.
    pub(super) fn flush(&mut self, io: &mut Io<'_>) -> Turn {
        let Phase::Ready { wire, .. } = &mut self.phase else { return Turn::Same };
        match wire.flush() {
            Ok(()) => Turn::Same,
            Err(fault) => self.close(fault, io),
        }
    }

    fn advance(
        &mut self,
        ready: PollFlags,
        io: &mut Io<'_>,
        hear: &mut dyn FnMut(Reply) -> Result<(), Fault>,
    ) -> Result<Turn, Fault> {
        let readable = ready.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR);
        match &mut self.phase {
            Phase::Waiting { until } if io.now >= *until => self.dial(io).map(|()| Turn::Same),
            Phase::Waiting { .. } => Ok(Turn::Same),
            Phase::Resolving { until, late } => {
                if *late || io.now < *until {
                    return Ok(Turn::Same);
                }
                // A look-up cannot be called off: it is waited for, and none is begun beside it.
                *late = true;
                self.hopeful = false;
                self.failures = self.failures.saturating_add(1);
                Ok(Turn::Closed(Fault::Timeout(io.target.timeout)))
            }
            Phase::Connecting { socket, others, next, until } => {
                let failed = match ready.is_empty() {
                    true if io.now >= *until => return Err(Fault::Timeout(io.target.timeout)),
                    true if io.now >= *next && !others.is_empty() => Some("it does not answer".to_owned()),
                    true => return Ok(Turn::Same),
                    false => socket.take_error().unwrap_or_else(Some).map(|error| in_words(&error)),
                };
                let (until, others) = (*until, std::mem::take(others));
                match failed {
                    None => self.log_in(until, io).map(|()| Turn::Same),
                    Some(why) if others.is_empty() => Err(Fault::Connect(why)),
                    Some(_) => self.try_next(others, until, io).map(|()| Turn::Same),
                }
            }
            Phase::LoggingIn { wire, steps, until } => {
                wire.flush()?;
                let mut refused = None;
                if readable {
                    wire.receive(io.scratch, &mut |reply| login_reply(steps, &reply, &mut refused))?;
                }
                if let Some(fault) = refused {
                    return Err(fault);
                }
                if !steps.is_empty() {
                    let timeout = Fault::Timeout(io.target.timeout);
                    return if io.now >= *until { Err(timeout) } else { wire.flush().map(|()| Turn::Same) };
                }
                let Phase::LoggingIn { wire, .. } =
                    std::mem::replace(&mut self.phase, Phase::Waiting { until: io.now })
                else {
                    return Ok(Turn::Same);
                };
                self.phase = Phase::Ready { wire, since: io.now };
                self.hopeful = true;
                Ok(Turn::Opened)
            }
            Phase::Ready { wire, .. } => {
                if readable {
                    wire.receive(io.scratch, hear)?;
                }
                Ok(Turn::Same)
            }
        }
    }

    fn dial(&mut self, io: &mut Io<'_>) -> Result<(), Fault> {
        self.attempt += 1;
        let until = io.now + io.target.timeout;
        match &io.target.server.host {
            Host::Ipv4(ip) => self.connect(&[IpAddr::V4(*ip)], until, io),
            Host::Ipv6(ip) => self.connect(&[IpAddr::V6(*ip)], until, io),
            Host::Domain(name) => {
                (io.resolve)(self.which, self.attempt, name).map_err(Fault::Resolve)?;
                self.phase = Phase::Resolving { until, late: false };
                Ok(())
            }
        }
    }

    fn connect(&mut self, addresses: &[IpAddr], until: Instant, io: &mut Io<'_>) -> Result<(), Fault> {
        let port = io.target.server.port;
        self.try_next(addresses.iter().map(|ip| SocketAddr::new(*ip, port)).collect(), until, io)
    }

    /// Begins to connect to the next address that does not fail at once.
    fn try_next(&mut self, mut others: VecDeque<SocketAddr>, until: Instant, io: &mut Io<'_>) -> Result<(), Fault> {
        let mut why = "there is no address".to_owned();
        while let Some(address) = others.pop_front() {
            match begin_to_connect(address) {
                Ok(socket) => {
                    let tries = u32::try_from(others.len() + 1).unwrap_or(u32::MAX);
                    let next = io.now + (until.since(io.now) / tries).max(ADDRESS_TIME_MIN);
                    self.phase = Phase::Connecting { socket, others, next, until };
                    return Ok(());
                }
                Err(error) => why = in_words(&error),
            }
        }
        Err(Fault::Connect(why))
    }

    /// The socket is connected: TLS, where it is wanted, and the login begin.
    fn log_in(&mut self, until: Instant, io: &mut Io<'_>) -> Result<(), Fault> {
        let Phase::Connecting { socket, .. } = std::mem::replace(&mut self.phase, Phase::Waiting { until: io.now })
        else {
            return Ok(());
        };
        let tls = io.target.tls.as_ref().map(|(config, name)| ClientConnection::new(Arc::clone(config), name.clone()));
        let tls = tls.transpose().map_err(|_| Fault::Tls("the session cannot be begun".into()))?;
        let mut wire = Wire::new(socket, tls.map(Box::new), self.bounds);
        let steps = write_login(&mut wire.out, &io.target.server);
        wire.flush()?;
        self.phase = Phase::LoggingIn { wire, steps, until };
        Ok(())
    }
}

/// A socket on its way to `address`.
fn begin_to_connect(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking().cloexec(), None)?;
    socket.set_tcp_nodelay(true)?;
    match socket.connect(&address.into()) {
        Ok(()) => Ok(socket),
        Err(error) if error.raw_os_error() == Some(Errno::INPROGRESS.raw_os_error()) => Ok(socket),
        Err(error) => Err(error),
    }
}

/// The commands of a login, and what is to be answered.
fn write_login(out: &mut Vec<u8>, server: &RedisServer) -> VecDeque<Step> {
    let mut steps = VecDeque::new();
    if let Some(password) = &server.password {
        let user = server.user.as_deref().map(str::as_bytes);
        let parts: Vec<&[u8]> =
            [Some(b"AUTH".as_slice()), user, Some(password.expose_secret())].into_iter().flatten().collect();
        write_command(out, parts);
        steps.push_back(Step::Auth);
    }
    if server.database > 0 {
        write_command(out, [b"SELECT".as_slice(), server.database.to_string().as_bytes()]);
        steps.push_back(Step::Select);
    }
    write_command(out, [b"CLIENT".as_slice(), b"SETNAME", CLIENT_NAME]);
    steps.push_back(Step::Name);
    // A server that is loading its data, or wants a password that is not configured, says so to this one.
    write_command(out, [b"PING".as_slice()]);
    steps.push_back(Step::Ping);
    steps
}

fn login_reply(steps: &mut VecDeque<Step>, reply: &Reply, refused: &mut Option<Fault>) -> Result<(), Fault> {
    let step = steps.pop_front().ok_or(Fault::OutOfStep)?;
    let command = match step {
        Step::Auth => "AUTH",
        Step::Select => "SELECT",
        Step::Name => "CLIENT SETNAME",
        Step::Ping => "PING",
    };
    let fault = match (step, reply) {
        (Step::Auth | Step::Select | Step::Name, Reply::Simple(_)) => return Ok(()),
        (Step::Ping, Reply::Simple(pong)) if pong == b"PONG" => return Ok(()),
        // A user who may not do these may still do what is needed.
        (Step::Name | Step::Ping, Reply::Error(line)) if error_code(line) == "NOPERM" => return Ok(()),
        // A name is a courtesy; why it is refused the next answer will tell.
        (Step::Name, Reply::Error(_)) => return Ok(()),
        (_, Reply::Error(line)) => Fault::refused(command, line),
        _ => Fault::OutOfStep,
    };
    // The first refusal tells why; those behind it follow from it.
    refused.get_or_insert(fault);
    Ok(())
}

/// A connected socket: plaintext on this side, what the peer takes on the other.
struct Wire {
    socket: Socket,
    tls: Option<Box<ClientConnection>>,
    /// Plaintext that waits.
    out: Vec<u8>,
    /// Sealed records, and how much of them the socket has taken.
    sealed: Vec<u8>,
    sealed_sent: usize,
    /// Plaintext that has come and is about to be decoded.
    plain: Vec<u8>,
    decoder: Decoder,
    /// Bytes that have come.
    received: u64,
}

impl Wire {
    fn new(socket: Socket, tls: Option<Box<ClientConnection>>, bounds: Bounds) -> Wire {
        Wire {
            socket,
            tls,
            out: Vec::new(),
            sealed: Vec::new(),
            sealed_sent: 0,
            plain: Vec::new(),
            decoder: Decoder::new(bounds),
            received: 0,
        }
    }

    /// Whether something waits for the socket.
    fn has_more(&self) -> bool {
        match &self.tls {
            None => !self.out.is_empty(),
            // Until the handshake is over plaintext waits for the peer, not for the socket.
            Some(tls) => {
                !self.sealed.is_empty() || tls.wants_write() || (!self.out.is_empty() && !tls.is_handshaking())
            }
        }
    }

    fn flush(&mut self) -> Result<(), Fault> {
        let Some(tls) = &mut self.tls else {
            let sent = send(&self.socket, &self.out)?;
            self.out.drain(..sent);
            return Ok(());
        };
        loop {
            if self.sealed_sent < self.sealed.len() {
                let unsent = self.sealed.get(self.sealed_sent..).unwrap_or_default();
                self.sealed_sent += send(&self.socket, unsent)?;
                if self.sealed_sent < self.sealed.len() {
                    return Ok(());
                }
            }
            (self.sealed, self.sealed_sent) = (Vec::new(), 0);
            if !tls.is_handshaking() && !self.out.is_empty() {
                let record = self.out.len().min(RECORD_PLAIN_BYTES);
                let (plain, _) = self.out.split_at(record);
                let taken = tls.writer().write(plain).map_err(|error| Fault::Broken(in_words(&error)))?;
                self.out.drain(..taken);
            }
            self.sealed = take_sealed(tls).map_err(|error| Fault::Broken(in_words(&error)))?;
            if self.sealed.is_empty() {
                return Ok(());
            }
        }
    }

    /// Reads what has come, a bounded part of it, and gives each reply to `hear`.
    fn receive(&mut self, scratch: &mut [u8], hear: &mut dyn FnMut(Reply) -> Result<(), Fault>) -> Result<(), Fault> {
        for _ in 0..limits::REDIS_READS_PER_TURN {
            let count = match (&self.socket).read(scratch) {
                Ok(0) => return Err(Fault::Closed),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Fault::Broken(in_words(&error))),
            };
            self.received += count as u64;
            let arrived = scratch.get(..count).unwrap_or_default();
            let mut bytes: &[u8] = match &mut self.tls {
                None => arrived,
                Some(tls) => {
                    self.plain.clear();
                    let plain = &mut self.plain;
                    let absorbed = absorb(tls, arrived, |bytes| plain.extend_from_slice(bytes));
                    if let Err(error) = absorbed {
                        // The alert that tells the server why; whether it arrives changes nothing here.
                        let _ = take_sealed(tls).map(|alert| send(&self.socket, &alert));
                        return Err(Fault::Tls(error.to_string().replace("the upstream", "the server").into()));
                    }
                    &self.plain
                }
            };
            while let Some(reply) = self.decoder.decode(&mut bytes)? {
                hear(reply)?;
            }
            if self.tls.is_some() {
                self.flush()?;
            }
            if count < scratch.len() {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// Sends as much as the socket takes now.
fn send(socket: &Socket, bytes: &[u8]) -> Result<usize, Fault> {
    let mut sent = 0;
    while let Some(unsent @ [_, ..]) = bytes.get(sent..) {
        match rustix::net::send(socket, unsent, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(count) => sent += count,
            Err(Errno::AGAIN) => break,
            Err(Errno::INTR) => {}
            Err(error) => return Err(Fault::Broken(in_words(&error.into()))),
        }
    }
    Ok(sent)
}
