//! The floor: an epoll loop that accepts WebSockets and sends each message to every socket with one `send` after the other.
//!
//! It has nothing else: no authentication, no subscriptions, no resume, no heartbeat, and of what clients send it only looks
//! for their close. What a server with all of that adds to a delivery is its distance from this.
//! Memory: a socket and its place in a table each; the unsent rest of a message where the kernel took only a part of it.
//! Errors: a socket that fails is dropped; only what the listener and epoll say ends the process.

use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::time::Instant;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use restcast_peers::{BACKLOG, Message, Options, Ticks};
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, sockopt};
use sha1::{Digest, Sha1};

const LISTENER: u64 = u64::MAX;
/// Unsent bytes that a connection may have; one that reads slower loses its place.
const UNSENT_BYTES_MAX: usize = 1 << 20;
const HEAD_BYTES_MAX: usize = 16 << 10;
const EVENTS_PER_TURN: usize = 4096;
const ACCEPTS_PER_TURN: usize = 4096;

fn main() -> Result<(), Box<dyn Error>> {
    let options = Options::from_env()?;
    let listener = listen(options.port)?;
    let address = listener.local_addr()?;
    let mut server = Server {
        epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
        listener: listener.into(),
        connections: Vec::new(),
        free: Vec::new(),
        scratch: vec![0; 64 << 10],
    };
    epoll::add(&server.epoll, &server.listener, epoll::EventData::new_u64(LISTENER), epoll::EventFlags::IN)?;
    restcast_peers::ready(address)?;
    server.run(&options)?;
    Ok(())
}

fn listen(port: u16) -> io::Result<TcpListener> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    // Accepted sockets inherit it.
    sockopt::set_tcp_nodelay(&socket, true)?;
    net::bind(&socket, &SocketAddr::from(([127, 0, 0, 1], port)))?;
    net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

struct Connection {
    socket: OwnedFd,
    state: State,
}

enum State {
    /// Bytes of a request head that has not ended.
    Handshaking(Vec<u8>),
    /// Bytes that the socket has not taken, empty as a rule.
    Open(Vec<u8>),
}

struct Server {
    epoll: OwnedFd,
    listener: OwnedFd,
    connections: Vec<Option<Connection>>,
    free: Vec<usize>,
    scratch: Vec<u8>,
}

impl Server {
    fn run(&mut self, options: &Options) -> Result<(), Errno> {
        let mut message = Message::new(options.message_bytes);
        let mut ticks = options.interval.map(|interval| Ticks::new(interval, Instant::now()));
        let mut events = Vec::with_capacity(EVENTS_PER_TURN);
        loop {
            let wait = ticks.map(|ticks| ticks.due().saturating_duration_since(Instant::now()));
            let wait = wait.map(|wait| Timespec::try_from(wait).unwrap_or_default());
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), wait.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
            for event in &events {
                match event.data.u64() {
                    LISTENER => self.accept()?,
                    slot => self.serve(slot as usize, event.flags),
                }
            }
            if ticks.as_mut().is_some_and(|ticks| ticks.take(Instant::now())) {
                self.broadcast(&frame(message.stamp().as_bytes()));
            }
        }
    }

    fn accept(&mut self) -> Result<(), Errno> {
        for _ in 0..ACCEPTS_PER_TURN {
            let socket = match net::accept_with(&self.listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
                Ok(socket) => socket,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::CONNABORTED | Errno::INTR) => continue,
                Err(error) => return Err(error),
            };
            let slot = self.free.pop().unwrap_or_else(|| {
                self.connections.push(None);
                self.connections.len() - 1
            });
            epoll::add(&self.epoll, &socket, epoll::EventData::new_u64(slot as u64), epoll::EventFlags::IN)?;
            self.connections[slot] = Some(Connection { socket, state: State::Handshaking(Vec::new()) });
        }
        Ok(())
    }

    fn serve(&mut self, slot: usize, ready: epoll::EventFlags) {
        let Some(connection) = self.connections.get_mut(slot).and_then(Option::as_mut) else { return };
        let mut live = true;
        if ready.intersects(epoll::EventFlags::IN | epoll::EventFlags::HUP | epoll::EventFlags::ERR) {
            live = connection.receive(&mut self.scratch);
        }
        if live && ready.contains(epoll::EventFlags::OUT) {
            live = connection.catch_up(&self.epoll, slot);
        }
        if !live {
            self.drop_connection(slot);
        }
    }

    fn broadcast(&mut self, frame: &[u8]) {
        for slot in 0..self.connections.len() {
            if let Some(connection) = &mut self.connections[slot]
                && !connection.send(frame, &self.epoll, slot)
            {
                self.drop_connection(slot);
            }
        }
    }

    fn drop_connection(&mut self, slot: usize) {
        // Closing takes the socket out of the epoll set.
        if self.connections[slot].take().is_some() {
            self.free.push(slot);
        }
    }
}

impl Connection {
    /// Whether the connection goes on.
    fn receive(&mut self, scratch: &mut [u8]) -> bool {
        let (bytes, _) = match net::recv(&self.socket, &mut *scratch, RecvFlags::DONTWAIT) {
            Ok((0, _)) => return false,
            Ok(received) => received,
            Err(Errno::AGAIN | Errno::INTR) => return true,
            Err(_) => return false,
        };
        match &mut self.state {
            // A close frame of a client is the only thing this server acts on; no client here sends it behind another frame.
            State::Open(_) => scratch[0] & 0x0f != 8,
            State::Handshaking(head) => {
                head.extend_from_slice(&scratch[..bytes]);
                if memchr::memmem::find(head, b"\r\n\r\n").is_none() {
                    return head.len() < HEAD_BYTES_MAX;
                }
                let Some(key) = key(head) else { return false };
                let answer = answer(key);
                self.state = State::Open(Vec::new());
                // A new socket takes an answer of this size or is dead.
                net::send(&self.socket, &answer, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) == Ok(answer.len())
            }
        }
    }

    fn send(&mut self, frame: &[u8], epoll: &OwnedFd, slot: usize) -> bool {
        let State::Open(unsent) = &mut self.state else { return true };
        let mut taken = 0;
        if unsent.is_empty() {
            match net::send(&self.socket, frame, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(bytes) if bytes == frame.len() => return true,
                Ok(bytes) => taken = bytes,
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(_) => return false,
            }
            let both = epoll::EventFlags::IN | epoll::EventFlags::OUT;
            if epoll::modify(epoll, &self.socket, epoll::EventData::new_u64(slot as u64), both).is_err() {
                return false;
            }
        }
        unsent.extend_from_slice(&frame[taken..]);
        unsent.len() <= UNSENT_BYTES_MAX
    }

    fn catch_up(&mut self, epoll: &OwnedFd, slot: usize) -> bool {
        let State::Open(unsent) = &mut self.state else { return true };
        match net::send(&self.socket, unsent, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(bytes) => drop(unsent.drain(..bytes)),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => return false,
        }
        if !unsent.is_empty() {
            return true;
        }
        *unsent = Vec::new();
        let data = epoll::EventData::new_u64(slot as u64);
        epoll::modify(epoll, &self.socket, data, epoll::EventFlags::IN).is_ok()
    }
}

/// The client's `Sec-WebSocket-Key`.
fn key(head: &[u8]) -> Option<&[u8]> {
    const NAME: &[u8] = b"sec-websocket-key:";
    head.split(|&byte| byte == b'\n').find_map(|line| {
        let (name, value) = line.split_at_checked(NAME.len())?;
        name.eq_ignore_ascii_case(NAME).then(|| value.trim_ascii())
    })
}

fn answer(key: &[u8]) -> Vec<u8> {
    // RFC 6455 4.2.2: the key and this GUID, hashed.
    let hash = Sha1::new().chain_update(key).chain_update(b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").finalize();
    let accept = STANDARD.encode(hash);
    format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {accept}\r\n\r\n"
    )
    .into_bytes()
}

/// One unmasked text message in one frame: RFC 6455 5.2.
fn frame(text: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(text.len() + 10);
    frame.push(0x81);
    match text.len() {
        bytes @ 0..=125 => frame.push(bytes as u8),
        bytes @ 126..=0xffff => {
            frame.push(126);
            frame.extend_from_slice(&(bytes as u16).to_be_bytes());
        }
        bytes => {
            frame.push(127);
            frame.extend_from_slice(&(bytes as u64).to_be_bytes());
        }
    }
    frame.extend_from_slice(text);
    frame
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_accept_key_is_that_of_the_rfc() {
        let head = b"GET /ws HTTP/1.1\r\nHost: x\r\nSEC-websocket-Key:  dGhlIHNhbXBsZSBub25jZQ== \r\n\r\n";
        let answer = answer(key(head).expect("a key"));
        assert!(String::from_utf8_lossy(&answer).contains("Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"));
        assert_eq!(key(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"), None);
    }

    #[test]
    fn each_length_has_its_form() {
        assert_eq!(frame(&[b'x'; 125])[..2], [0x81, 125]);
        assert_eq!(frame(&[b'x'; 126])[..4], [0x81, 126, 0, 126]);
        assert_eq!(frame(&[b'x'; 65_536])[..10], [0x81, 127, 0, 0, 0, 0, 0, 1, 0, 0]);
    }
}
