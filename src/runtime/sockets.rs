//! The clients' sockets of one core, in an epoll set: by the places their connections have in the shard.
//!
//! Source: epoll(7), accept4(2), recv(2), send(2). Memory: 12 bytes a place; with TLS a pointer more and a session's box.
//! Errors: a socket's failure is its connection's end; accepting pauses where the process has no descriptors or memory.
//!
//! Edge-triggered, both directions at once, registered once: an idle connection costs nothing but its entry, and no
//! call is made to change what is waited for. A socket is closed here, at once and in order, after its readers have left
//! the shard, so a descriptor that is used again cannot get another's frames. With TLS one may hold sealed bytes that the
//! shard has long sent: it then stays outside its place until they are out, or it has taken nothing for so long as a socket
//! may (`limits.write_stall`).

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, SocketFlags};
use rustls::ServerConfig;

use crate::ids::ConnectionKey;
use crate::limits;
use crate::metrics::CoreMetrics;
use crate::shard::{Sent, Wire};
use crate::time::Instant;

use super::listener;
use super::session::{Flushed, Received, Scratch, Session, Shake};

/// Events taken from the kernel in one turn.
const EVENTS_PER_TURN: usize = 1024;
/// In place of a connection: the listener.
const LISTENER: u64 = u64::MAX;
/// In place of a connection: the mailbox's bell.
const BELL: u64 = u64::MAX - 1;
/// In an index: not a place, but one of those that are left. Descriptors bound places far below it.
const LEFT: u32 = 1 << 31;

/// What the kernel has to tell of.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ready {
    /// Connections wait to be accepted.
    Listener,
    /// The mailbox's bell rings.
    Bell,
    /// A socket has bytes, or its end, or takes more.
    Socket {
        /// Whose.
        key: ConnectionKey,
        /// Bytes, or its end.
        readable: bool,
        /// It takes more.
        writable: bool,
        /// Its end, or urgent data, whether bytes stand before it or not.
        ended: bool,
    },
}

/// Why nothing was accepted.
#[derive(Debug)]
pub enum AcceptError {
    /// Nobody waits.
    Empty,
    /// No descriptors or memory: accepting must pause.
    Exhausted(io::Error),
    /// That connection was gone already, or another failure of it alone.
    Other,
}

#[derive(Debug)]
struct Place {
    generation: u32,
    socket: Option<OwnedFd>,
    /// Whether bytes were left in the socket, of which no further event tells.
    unread: bool,
}

/// The sockets of one core.
pub struct Sockets {
    epoll: OwnedFd,
    listener: Option<TcpListener>,
    places: Vec<Place>,
    events: Vec<Event>,
    /// How long the kernel keeps a connection whose peer takes nothing.
    user_timeout: Duration,
    secure: Option<Secure>,
}

/// What TLS adds.
struct Secure {
    /// By the places of their sockets.
    sessions: Vec<Option<Box<Session>>>,
    scratch: Scratch,
    left: HashMap<u32, Left>,
    /// When to look at those that are left, soonest first; some may be gone, some may have taken something since.
    left_until: VecDeque<(Instant, u32)>,
    /// Those of them that take more.
    left_ready: Vec<u32>,
    left_no: u32,
    /// When all of them are let go of: the process is to end.
    left_end: Option<Instant>,
}

/// A socket without a place, which is to take the end of what was sealed for it.
struct Left {
    socket: OwnedFd,
    session: Box<Session>,
    /// How long it may take nothing.
    stall: Duration,
    /// When that will have been so.
    until: Instant,
}

impl Secure {
    fn session(&mut self, index: u32) -> Option<(&mut Session, &mut Scratch)> {
        let session = self.sessions.get_mut(index as usize)?.as_deref_mut()?;
        Some((session, &mut self.scratch))
    }
}

impl Sockets {
    /// The set, with its listener and the core's bell; with `tls` the listener speaks nothing else, and at most `bytes` are
    /// read at once.
    ///
    /// # Errors
    /// The system's.
    pub fn new(
        listener: TcpListener,
        bell: BorrowedFd<'_>,
        tls: Option<(Arc<ServerConfig>, Arc<CoreMetrics>)>,
        bytes: usize,
    ) -> io::Result<Sockets> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &listener, EventData::new_u64(LISTENER), EventFlags::IN)?;
        epoll::add(&epoll, bell, EventData::new_u64(BELL), EventFlags::IN)?;
        let events = Vec::with_capacity(EVENTS_PER_TURN);
        let secure = tls.map(|(config, metrics)| Secure {
            sessions: Vec::new(),
            scratch: Scratch::new(config, metrics, bytes),
            left: HashMap::new(),
            left_until: VecDeque::new(),
            left_ready: Vec::new(),
            left_no: 0,
            left_end: None,
        });
        let user_timeout = listener::user_timeout(Duration::ZERO);
        Ok(Sockets { epoll, listener: Some(listener), places: Vec::new(), events, user_timeout, secure })
    }

    /// A socket may take nothing for so long (`limits.write_stall`): the kernel is not to end it before.
    pub fn set_write_stall(&mut self, write_stall: Duration) {
        let timeout = listener::user_timeout(write_stall);
        if std::mem::replace(&mut self.user_timeout, timeout) == timeout {
            return;
        }
        for socket in self.places.iter().filter_map(|place| place.socket.as_ref()) {
            listener::set_user_timeout(socket, timeout);
        }
    }

    /// What becomes readable when there is something to tell.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Takes what the kernel has to tell of now, without waiting; whether there may be more.
    pub fn poll(&mut self, ready: &mut VecDeque<Ready>) -> bool {
        let zero = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        self.events.clear();
        let taken =
            epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut self.events), Some(&zero)).unwrap_or(0);
        for event in &self.events {
            let data = event.data.u64();
            if let (Some(secure), false) = (&mut self.secure, data >= BELL)
                && key_of(data).index & LEFT != 0
            {
                secure.left_ready.push(key_of(data).index);
                continue;
            }
            ready.push_back(match data {
                LISTENER => Ready::Listener,
                BELL => Ready::Bell,
                data => {
                    // Urgent data ends a read early (tcp(7)): behind it there may be more.
                    let ended = EventFlags::PRI | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR;
                    let readable = EventFlags::IN | ended;
                    let writable = EventFlags::OUT | EventFlags::HUP | EventFlags::ERR;
                    let flags = event.flags;
                    Ready::Socket {
                        key: key_of(data),
                        readable: flags.intersects(readable),
                        writable: flags.intersects(writable),
                        ended: flags.intersects(ended),
                    }
                }
            });
        }
        taken == EVENTS_PER_TURN
    }

    /// Accepts one connection, which is not in the set yet.
    ///
    /// # Errors
    /// See [`AcceptError`].
    pub fn accept(&self) -> Result<(OwnedFd, SocketAddr), AcceptError> {
        let Some(listener) = &self.listener else { return Err(AcceptError::Empty) };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        match rustix::net::acceptfrom_with(listener, flags) {
            Ok((socket, Some(peer))) => match SocketAddr::try_from(peer) {
                Ok(peer) => Ok((socket, peer)),
                Err(_) => Err(AcceptError::Other),
            },
            Ok((_, None)) => Err(AcceptError::Other),
            Err(Errno::AGAIN) => Err(AcceptError::Empty),
            Err(error @ (Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)) => {
                Err(AcceptError::Exhausted(error.into()))
            }
            Err(_) => Err(AcceptError::Other),
        }
    }

    /// Stops or goes on listening for connections that wait.
    pub fn pause_accepting(&self, pause: bool) {
        let Some(listener) = &self.listener else { return };
        let flags = if pause { EventFlags::empty() } else { EventFlags::IN };
        let _ = epoll::modify(&self.epoll, listener, EventData::new_u64(LISTENER), flags);
    }

    /// Closes the listener.
    pub fn stop_listening(&mut self) {
        self.listener = None;
    }

    /// Whether the listener speaks TLS.
    pub fn is_secure(&self) -> bool {
        self.secure.is_some()
    }

    /// Puts a connection's socket at its place; where `proxied`, a PROXY header may come before its TLS.
    ///
    /// # Errors
    /// Where the kernel has no memory for it.
    pub fn insert(&mut self, key: ConnectionKey, socket: OwnedFd, proxied: bool) -> io::Result<()> {
        let flags = EventFlags::IN | EventFlags::PRI | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(&self.epoll, &socket, EventData::new_u64(data_of(key)), flags)?;
        listener::set_user_timeout(&socket, self.user_timeout);
        let index = key.index as usize;
        while self.places.len() <= index {
            self.places.push(Place { generation: 0, socket: None, unread: false });
        }
        self.places[index] = Place { generation: key.generation, socket: Some(socket), unread: false };
        if let Some(secure) = &mut self.secure {
            if secure.sessions.len() <= index {
                secure.sessions.resize_with(index + 1, || None);
            }
            secure.sessions[index] = Some(Box::new(Session::new(proxied)));
        }
        Ok(())
    }

    /// Whether the socket at that place is still the one of that key.
    pub fn holds(&self, key: ConnectionKey) -> bool {
        self.places
            .get(key.index as usize)
            .is_some_and(|place| place.generation == key.generation && place.socket.is_some())
    }

    /// Notes that a socket has bytes that are not read now; whether it had.
    pub fn set_unread(&mut self, index: u32, unread: bool) -> bool {
        let place = self.places.get_mut(index as usize);
        place.is_some_and(|place| std::mem::replace(&mut place.unread, unread))
    }

    /// Whether what comes next on a socket may be a TLS handshake's, which takes time, and how far that is.
    pub fn shake(&self, index: u32) -> Option<Shake> {
        self.secure.as_ref()?.sessions.get(index as usize)?.as_ref()?.shake()
    }

    /// Notes whether a connection stands in the queue of handshakes; whether it did.
    pub fn set_queued(&mut self, index: u32, queued: bool) -> bool {
        let session = self.secure.as_mut().and_then(|secure| secure.session(index));
        session.is_some_and(|(session, _)| std::mem::replace(&mut session.queued, queued))
    }

    /// How many flights of handshakes have been made so far.
    pub fn flights(&self) -> usize {
        self.secure.as_ref().map_or(0, |secure| secure.scratch.flights)
    }

    /// Reads what a socket has, up to the size of `scratch`. With TLS `admit` is asked once, before a handshake costs
    /// anything, with the client's address where a trusted proxy has told it; who is not admitted gets an alert.
    pub fn receive(
        &mut self,
        index: u32,
        scratch: &mut [u8],
        admit: &mut dyn FnMut(Option<IpAddr>) -> bool,
    ) -> Received {
        let socket = self.places.get(index as usize).and_then(|place| place.socket.as_ref());
        let Some(socket) = socket else { return Received::Lost };
        if let Some(secure) = &mut self.secure {
            let Some((session, shared)) = secure.session(index) else { return Received::Lost };
            return session.receive(socket, shared, scratch, admit);
        }
        loop {
            return match rustix::net::recv(socket, &mut *scratch, RecvFlags::DONTWAIT) {
                Ok((0, _)) => Received::Finished,
                Ok((count, _)) => Received::Bytes(count),
                Err(Errno::AGAIN) => Received::Nothing,
                Err(Errno::INTR) => continue,
                Err(_) => Received::Lost,
            };
        }
    }

    /// A socket takes more: sealed bytes go first. Whether the shard is to be told; an error: the socket is gone.
    ///
    /// # Errors
    /// None but that.
    pub fn flush(&mut self, index: u32) -> Result<bool, Lost> {
        let socket = self.places.get(index as usize).and_then(|place| place.socket.as_ref());
        let session = self.secure.as_mut().and_then(|secure| secure.session(index));
        let (Some(socket), Some((session, shared))) = (socket, session) else { return Ok(true) };
        match session.flush(socket, shared) {
            Flushed::Out => Ok(true),
            Flushed::Blocked => Ok(false),
            Flushed::Lost => Err(Lost),
        }
    }

    /// Ends our side of a socket, behind what is still to be sent of it.
    pub fn finish(&mut self, index: u32) {
        let Some(socket) = self.places.get(index as usize).and_then(|place| place.socket.as_ref()) else { return };
        match self.secure.as_mut().and_then(|secure| secure.session(index)) {
            Some((session, shared)) => session.end(socket, shared),
            None => {
                let _ = rustix::net::shutdown(socket, Shutdown::Write);
            }
        }
    }

    /// Closes a socket; where `reset`, so that the peer notices at once. Otherwise one that has not taken all that was sealed
    /// for it stays until it has, or has taken nothing for `stall`.
    pub fn close(&mut self, index: u32, reset: bool, stall: Duration, now: Instant) {
        let Some(place) = self.places.get_mut(index as usize) else { return };
        place.unread = false;
        let Some(socket) = place.socket.take() else { return };
        if let Some(secure) = &mut self.secure
            && let Some(session) = secure.sessions.get_mut(index as usize).and_then(Option::take)
        {
            session.let_go(&socket, &mut secure.scratch);
            if !reset && session.has_rest() {
                secure.leave(&self.epoll, Left { socket, session, stall, until: now + stall }, now);
                return;
            }
        }
        if reset {
            listener::reset_on_close(&socket);
        }
        drop(socket);
    }

    /// Goes on with those that are left: they get what they take now, and are reset when their time is over.
    pub fn turn_left(&mut self, now: Instant) {
        let Some(secure) = &mut self.secure else { return };
        while let Some(no) = secure.left_ready.pop() {
            secure.flush_left(no, now);
        }
        let over = secure.left_end.is_some_and(|end| end <= now);
        while let Some(&(at, no)) = secure.left_until.front() {
            let until = secure.left.get(&no).map(|left| left.until);
            if until.is_some() && at > now && !over {
                return;
            }
            secure.left_until.pop_front();
            match until {
                // It has taken something meanwhile.
                Some(until) if until > now && !over => secure.left_until.push_back((until, no)),
                _ => secure.reset_one(no),
            }
        }
    }

    /// Whoever is left stays for [`limits::CLOSE_GRACE`] at most: the process is to end.
    pub fn hurry_left(&mut self, now: Instant) {
        if let Some(secure) = &mut self.secure {
            secure.left_end = Some(now + limits::CLOSE_GRACE);
        }
    }

    /// When to call [`Sockets::turn_left`]; `None`: nobody is left.
    pub fn next_timeout(&self) -> Option<Instant> {
        let secure = self.secure.as_ref()?;
        let (at, _) = *secure.left_until.front()?;
        Some(secure.left_end.map_or(at, |end| at.min(end)))
    }
}

/// A socket is gone.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Lost;

impl Secure {
    /// Keeps a socket until its sealed bytes are out.
    fn leave(&mut self, epoll: &OwnedFd, mut left: Left, now: Instant) {
        left.session.end(&left.socket, &mut self.scratch);
        while self.left.len() >= usize::from(limits::LEFT_PER_CORE_MAX)
            && let Some((_, no)) = self.left_until.pop_front()
        {
            self.reset_one(no);
        }
        self.left_no = self.left_no.wrapping_add(1) & !LEFT;
        let no = self.left_no;
        let flags = EventFlags::OUT | EventFlags::ET;
        let data = data_of(ConnectionKey { index: no | LEFT, generation: 0 });
        if epoll::modify(epoll, &left.socket, EventData::new_u64(data), flags).is_err() {
            return;
        }
        self.left_until.push_back((left.until, no | LEFT));
        self.left.insert(no | LEFT, left);
        // The edge that told of room may have come before.
        self.flush_left(no | LEFT, now);
    }

    fn flush_left(&mut self, no: u32, now: Instant) {
        // Out of the table meanwhile: where this panics, it is gone.
        let Some(mut left) = self.left.remove(&no) else { return };
        let before = left.session.rest_bytes();
        if left.session.flush(&left.socket, &mut self.scratch) == Flushed::Blocked {
            if left.session.rest_bytes() != before {
                left.until = now + left.stall;
            }
            self.left.insert(no, left);
            return;
        }
        left.session.discard_unread(&left.socket, &mut self.scratch);
        while self.left_until.front().is_some_and(|(_, no)| !self.left.contains_key(no)) {
            self.left_until.pop_front();
        }
    }

    fn reset_one(&mut self, no: u32) {
        if let Some(left) = self.left.remove(&no) {
            listener::reset_on_close(&left.socket);
        }
    }
}

impl Wire for Sockets {
    fn send(&mut self, connection: u32, bytes: &[u8]) -> Sent {
        let Some(socket) = self.places.get(connection as usize).and_then(|place| place.socket.as_ref()) else {
            return Sent::Lost;
        };
        if let Some(secure) = &mut self.secure {
            let Some((session, shared)) = secure.session(connection) else { return Sent::Lost };
            return session.send(socket, shared, bytes);
        }
        send(socket, bytes, SendFlags::empty())
    }

    fn send_last(&mut self, connection: u32, bytes: &[u8]) -> Sent {
        match self.places.get(connection as usize).and_then(|place| place.socket.as_ref()) {
            // Over TLS the end is more than a packet's flag: `close_notify` goes before it.
            Some(socket) if self.secure.is_none() => send(socket, bytes, SendFlags::MORE),
            _ => self.send(connection, bytes),
        }
    }
}

fn send(socket: &OwnedFd, bytes: &[u8], flags: SendFlags) -> Sent {
    loop {
        return match rustix::net::send(socket, bytes, flags | SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(count) => Sent::Bytes(count),
            Err(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM) => Sent::Blocked,
            Err(Errno::INTR) => continue,
            Err(_) => Sent::Lost,
        };
    }
}

fn data_of(key: ConnectionKey) -> u64 {
    u64::from(key.generation) << 32 | u64::from(key.index)
}

fn key_of(data: u64) -> ConnectionKey {
    ConnectionKey { index: (data & 0xffff_ffff) as u32, generation: (data >> 32) as u32 }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpStream;
    use std::sync::mpsc::{Sender, channel};
    use std::thread::JoinHandle;

    use rustix::event::{EventfdFlags, eventfd};
    use rustls::{ClientConfig, ClientConnection, RootCertStore, Stream};

    use super::*;
    use crate::config::TlsFiles;
    use crate::runtime::tls::Tls;
    use crate::secret::Secret;

    /// A set whose one connection is closed over a sealed rest, for which it may stay for `STALL` from `NOW` on.
    struct Closed {
        sockets: Sockets,
        sent: usize,
        go_on: Sender<()>,
        reader: JoinHandle<io::Result<Vec<u8>>>,
    }

    const NOW: Instant = Instant::from_micros(1_000_000);
    const STALL: Duration = Duration::from_secs(30);

    impl Closed {
        fn over_a_sealed_rest() -> Closed {
            let made = rcgen::generate_simple_self_signed(vec!["a.test".to_owned()]).expect("a certificate");
            let files = TlsFiles {
                cert: "cert.pem".into(),
                key: "key.pem".into(),
                cert_pem: Secret::new(made.cert.pem()),
                key_pem: Secret::new(made.signing_key.serialize_pem()),
            };
            let tls = Tls::new(&[files]).expect("they fit");
            let mut roots = RootCertStore::empty();
            roots.add(made.cert.der().clone()).expect("a root");
            let provider = Arc::new(rustls::crypto::ring::default_provider());
            let client = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
            let client = client.expect("versions").with_root_certificates(roots).with_no_client_auth();
            let listener = listener::listen(SocketAddr::from(([127, 0, 0, 1], 0)), false).expect("a port");
            let address = listener.local_addr().expect("an address");
            let bell = eventfd(0, EventfdFlags::CLOEXEC).expect("a descriptor");
            let mut sockets =
                Sockets::new(listener, bell.as_fd(), Some((tls.config(), Arc::default())), 64 << 10).expect("a set");
            let (go_on, may_read) = channel::<()>();
            let reader = std::thread::spawn(move || {
                let mut socket = TcpStream::connect(address).expect("it accepts");
                let name = "a.test".try_into().expect("a name");
                let mut tls = ClientConnection::new(Arc::new(client), name).expect("a client");
                let mut stream = Stream::new(&mut tls, &mut socket);
                stream.write_all(b"go").expect("sent");
                may_read.recv().expect("told");
                let mut all = Vec::new();
                stream.read_to_end(&mut all).map(|_| all)
            });
            let key = ConnectionKey { index: 0, generation: 1 };
            let mut plain = vec![0; 64 << 10];
            while !sockets.holds(key) {
                if let Ok((socket, _)) = sockets.accept() {
                    sockets.insert(key, socket, false).expect("a place");
                }
            }
            while sockets.receive(0, &mut plain, &mut |_| true) != Received::Bytes(2) {}
            let mut sent = 0;
            while let Sent::Bytes(count) = sockets.send(0, &[7; 40_000]) {
                sent += count;
            }
            // Everything was taken, but the last record stands here.
            sockets.finish(0);
            sockets.close(0, false, STALL, NOW);
            assert!(!sockets.holds(key), "its place is free");
            assert_eq!(sockets.next_timeout(), Some(NOW + STALL));
            Closed { sockets, sent, go_on, reader }
        }
    }

    #[test]
    fn a_socket_closed_over_a_sealed_rest_stays_until_it_is_out() {
        let Closed { mut sockets, sent, go_on, reader } = Closed::over_a_sealed_rest();
        sockets.turn_left(NOW + STALL - Duration::from_millis(1));
        assert_eq!(sockets.next_timeout(), Some(NOW + STALL), "its time is not over");
        go_on.send(()).expect("it waits");
        while sockets.next_timeout().is_some() {
            sockets.poll(&mut VecDeque::new());
            sockets.turn_left(NOW);
        }
        let heard = reader.join().expect("no panic").expect("the end is told by close_notify");
        assert!(heard.len() == sent && heard.iter().all(|&byte| byte == 7), "{} of {sent}", heard.len());
    }

    #[test]
    fn a_socket_that_takes_nothing_of_its_sealed_rest_is_reset() {
        let Closed { mut sockets, go_on, reader, .. } = Closed::over_a_sealed_rest();
        sockets.turn_left(NOW + STALL);
        assert_eq!(sockets.next_timeout(), None, "nobody is left");
        go_on.send(()).expect("it waits");
        reader.join().expect("no panic").expect_err("a reset");
    }

    #[test]
    fn a_process_that_ends_waits_for_no_sealed_rest() {
        let Closed { mut sockets, go_on, reader, .. } = Closed::over_a_sealed_rest();
        sockets.hurry_left(NOW);
        assert_eq!(sockets.next_timeout(), Some(NOW + limits::CLOSE_GRACE));
        sockets.turn_left(NOW + limits::CLOSE_GRACE);
        assert_eq!(sockets.next_timeout(), None, "nobody is left");
        go_on.send(()).expect("it waits");
        reader.join().expect("no panic").expect_err("a reset");
    }

    #[test]
    fn the_kernel_does_not_end_a_reader_that_stops_before_its_stall_is_over() {
        let listener = listener::listen(SocketAddr::from(([127, 0, 0, 1], 0)), false).expect("a port");
        let address = listener.local_addr().expect("an address");
        let bell = eventfd(0, EventfdFlags::CLOEXEC).expect("a descriptor");
        let mut sockets = Sockets::new(listener, bell.as_fd(), None, 64 << 10).expect("a set");
        let kept = |sockets: &Sockets, at: usize| {
            let socket = sockets.places[at].socket.as_ref().expect("it is there");
            socket2::SockRef::from(socket).tcp_user_timeout().expect("an option").expect("it is set")
        };
        let _peers = [(); 2].map(|()| TcpStream::connect(address).expect("it accepts"));
        let accept = |sockets: &mut Sockets, index: u32| {
            let socket = loop {
                if let Ok((socket, _)) = sockets.accept() {
                    break socket;
                }
            };
            sockets.insert(ConnectionKey { index, generation: 1 }, socket, false).expect("a place");
        };
        sockets.set_write_stall(Duration::from_secs(600));
        accept(&mut sockets, 0);
        assert!(kept(&sockets, 0) > Duration::from_secs(600), "{:?}", kept(&sockets, 0));
        // A reload holds for those who are there and for those who come.
        for write_stall in [Duration::from_secs(1), Duration::from_secs(30), Duration::from_secs(30 * 86_400)] {
            sockets.set_write_stall(write_stall);
            let least = (write_stall + Duration::from_secs(1)).max(Duration::from_secs(30));
            assert!(kept(&sockets, 0) >= least, "{:?} for {write_stall:?}", kept(&sockets, 0));
        }
        accept(&mut sockets, 1);
        assert_eq!(kept(&sockets, 1), kept(&sockets, 0));
    }
}
