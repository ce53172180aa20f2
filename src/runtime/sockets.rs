//! The clients' sockets of one core, in an epoll set: by the places their connections have in the shard.
//!
//! Source: epoll(7), accept4(2), recv(2), send(2). Memory: 12 bytes a place; one scratch buffer a core for reading.
//! Errors: a socket's failure is its connection's end; accepting pauses where the process has no descriptors or memory.
//!
//! Edge-triggered, both directions at once, registered once: an idle connection costs nothing but its entry, and no
//! call is made to change what is waited for. A socket is closed here, at once and in order, after its readers have left
//! the shard, so a descriptor that is used again cannot get another's frames.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, SocketFlags};

use crate::ids::ConnectionKey;
use crate::shard::{Sent, Wire};

use super::listener;

/// Events taken from the kernel in one turn.
const EVENTS_PER_TURN: usize = 1024;
/// In place of a connection: the listener.
const LISTENER: u64 = u64::MAX;
/// In place of a connection: the mailbox's bell.
const BELL: u64 = u64::MAX - 1;

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
    },
}

/// What a socket gave.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Received {
    /// So many bytes, in the scratch buffer.
    Bytes(usize),
    /// Nothing now.
    Nothing,
    /// The peer has ended its side.
    Finished,
    /// It is gone.
    Lost,
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
}

impl Sockets {
    /// The set, with its listener and the core's bell.
    ///
    /// # Errors
    /// The system's.
    pub fn new(listener: TcpListener, bell: BorrowedFd<'_>) -> io::Result<Sockets> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &listener, EventData::new_u64(LISTENER), EventFlags::IN)?;
        epoll::add(&epoll, bell, EventData::new_u64(BELL), EventFlags::IN)?;
        let events = Vec::with_capacity(EVENTS_PER_TURN);
        Ok(Sockets { epoll, listener: Some(listener), places: Vec::new(), events })
    }

    /// What becomes readable when there is something to tell.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Takes what the kernel has to tell of now, without waiting; whether there may be more.
    pub fn poll(&mut self, ready: &mut Vec<Ready>) -> bool {
        let zero = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        self.events.clear();
        let taken =
            epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut self.events), Some(&zero)).unwrap_or(0);
        for event in &self.events {
            ready.push(match event.data.u64() {
                LISTENER => Ready::Listener,
                BELL => Ready::Bell,
                data => {
                    let readable = EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR;
                    let writable = EventFlags::OUT | EventFlags::HUP | EventFlags::ERR;
                    let flags = event.flags;
                    Ready::Socket {
                        key: key_of(data),
                        readable: flags.intersects(readable),
                        writable: flags.intersects(writable),
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

    /// Puts a connection's socket at its place.
    ///
    /// # Errors
    /// Where the kernel has no memory for it.
    pub fn insert(&mut self, key: ConnectionKey, socket: OwnedFd) -> io::Result<()> {
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(&self.epoll, &socket, EventData::new_u64(data_of(key)), flags)?;
        let index = key.index as usize;
        while self.places.len() <= index {
            self.places.push(Place { generation: 0, socket: None, unread: false });
        }
        self.places[index] = Place { generation: key.generation, socket: Some(socket), unread: false };
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

    /// Reads what a socket has, up to the size of `scratch`.
    pub fn receive(&self, index: u32, scratch: &mut [u8]) -> Received {
        let Some(socket) = self.socket(index) else { return Received::Lost };
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

    /// Ends our side of a socket.
    pub fn finish(&self, index: u32) {
        if let Some(socket) = self.socket(index) {
            let _ = rustix::net::shutdown(socket, Shutdown::Write);
        }
    }

    /// Closes a socket; where `reset`, so that the peer notices at once.
    pub fn close(&mut self, index: u32, reset: bool) {
        let Some(place) = self.places.get_mut(index as usize) else { return };
        place.unread = false;
        if let Some(socket) = place.socket.take() {
            if reset {
                listener::reset_on_close(&socket);
            }
            drop(socket);
        }
    }

    fn socket(&self, index: u32) -> Option<&OwnedFd> {
        self.places.get(index as usize)?.socket.as_ref()
    }
}

impl Wire for Sockets {
    fn send(&mut self, connection: u32, bytes: &[u8]) -> Sent {
        let Some(socket) = self.socket(connection) else { return Sent::Lost };
        loop {
            return match rustix::net::send(socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => Sent::Bytes(count),
                Err(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM) => Sent::Blocked,
                Err(Errno::INTR) => continue,
                Err(_) => Sent::Lost,
            };
        }
    }
}

fn data_of(key: ConnectionKey) -> u64 {
    u64::from(key.generation) << 32 | u64::from(key.index)
}

fn key_of(data: u64) -> ConnectionKey {
    ConnectionKey { index: (data & 0xffff_ffff) as u32, generation: (data >> 32) as u32 }
}
