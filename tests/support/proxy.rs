//! A TCP proxy that does what networks do: it stalls, cuts, refuses, delays, corrupts and forbids, until it is healed.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use super::redis::free_port;
use super::server::eventually;

/// A proxy in front of one server.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    target: SocketAddr,
}

#[derive(Default)]
struct State {
    /// Nothing is passed on, in either direction; what comes waits.
    stalled: bool,
    /// Nobody listens.
    refusing: bool,
    /// Whether the listener is there.
    listening: bool,
    /// Time that each piece waits on its way back.
    delay: Duration,
    /// Connections that say one of these, in lower case, are ended before it is passed on.
    forbidden: Vec<String>,
    /// Pieces on their way back whose bits are turned.
    corrupt: u32,
    /// Connections so far.
    accepted: usize,
    /// Both ends of those that are open, each with its number.
    open: Vec<(usize, TcpStream, TcpStream)>,
    ended: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Proxy {
    /// One in front of `target`.
    pub fn to(target: SocketAddr) -> Proxy {
        let address: SocketAddr = (Ipv4Addr::LOCALHOST, free_port()).into();
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new(), target });
        thread::spawn({
            let shared = Arc::clone(&shared);
            move || listen(address, &shared)
        });
        let proxy = Proxy { address, shared };
        proxy.listens(true);
        proxy
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many connections it has taken.
    pub fn accepted(&self) -> usize {
        self.shared.state().accepted
    }

    /// How many are open.
    pub fn open(&self) -> usize {
        self.shared.state().open.len()
    }

    fn listens(&self, listening: bool) {
        eventually("the proxy's listener changes", || (self.shared.state().listening == listening).then_some(()));
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.shared.state());
        self.shared.changed.notify_all();
    }

    /// Passes nothing on any more, in either direction, the connections open: to those behind it the other side is silent.
    pub fn stall(&self) {
        self.change(|state| state.stalled = true);
    }

    /// Ends every connection; new ones are taken.
    pub fn cut(&self) {
        self.change(|state| {
            for (_, client, server) in state.open.drain(..) {
                let _ = client.shutdown(Shutdown::Both);
                let _ = server.shutdown(Shutdown::Both);
            }
        });
    }

    /// Takes no new connections: they are refused.
    pub fn refuse(&self) {
        self.change(|state| state.refusing = true);
        self.listens(false);
    }

    /// Ends every connection and takes no new ones.
    pub fn down(&self) {
        self.refuse();
        self.cut();
    }

    /// Has every piece on its way back wait so long.
    pub fn delay(&self, delay: Duration) {
        self.change(|state| state.delay = delay);
    }

    /// Turns the bits of the next `pieces` on their way back.
    pub fn corrupt(&self, pieces: u32) {
        self.change(|state| state.corrupt = pieces);
    }

    /// Ends whatever says one of these words (written in lower case), as proxies do that know HTTP and not what is asked
    /// for.
    pub fn forbid(&self, words: &[&str]) {
        self.change(|state| state.forbidden = words.iter().map(|&word| word.to_owned()).collect());
    }

    /// Says `bytes` to every client, as if the server had.
    pub fn inject(&self, bytes: &[u8]) {
        for (_, client, _) in &self.shared.state().open {
            let mut client: &TcpStream = client;
            let _ = client.write_all(bytes);
        }
    }

    /// Is a good proxy again.
    pub fn heal(&self) {
        self.change(|state| {
            state.stalled = false;
            state.refusing = false;
            state.delay = Duration::ZERO;
            state.forbidden.clear();
            state.corrupt = 0;
        });
        self.listens(true);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.change(|state| {
            state.ended = true;
            state.stalled = false;
        });
        self.cut();
    }
}

/// Takes connections until the proxy ends.
fn listen(address: SocketAddr, shared: &Arc<Shared>) {
    let mut listener: Option<TcpListener> = None;
    loop {
        let (ended, refusing) = {
            let state = shared.state();
            (state.ended, state.refusing)
        };
        if ended {
            return;
        }
        if refusing {
            listener = None;
        } else if listener.is_none() {
            listener = TcpListener::bind(address).ok();
            if let Some(listener) = &listener {
                listener.set_nonblocking(true).expect("a socket can be told not to block");
            }
        }
        shared.state().listening = listener.is_some();
        match listener.as_ref().map(TcpListener::accept) {
            Some(Ok((client, _))) => serve(client, shared),
            Some(Err(error)) if error.kind() != ErrorKind::WouldBlock => {}
            _ => thread::sleep(Duration::from_millis(1)),
        }
    }
}

fn serve(client: TcpStream, shared: &Arc<Shared>) {
    let _ = client.set_nonblocking(false);
    // Where the server is not there the client is closed at once.
    let Ok(server) = TcpStream::connect(shared.target) else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let copy = |socket: &TcpStream| socket.try_clone().expect("a descriptor");
    let number = {
        let mut state = shared.state();
        state.accepted += 1;
        let number = state.accepted;
        state.open.push((number, copy(&client), copy(&server)));
        number
    };
    for (from, to, back) in [(copy(&client), copy(&server), false), (server, client, true)] {
        let shared = Arc::clone(shared);
        thread::spawn(move || {
            pump(from, to, back, &shared);
            let mut state = shared.state();
            if let Some(at) = state.open.iter().position(|(open, ..)| *open == number) {
                let (_, client, server) = state.open.swap_remove(at);
                let _ = (client.shutdown(Shutdown::Both), server.shutdown(Shutdown::Both));
            }
        });
    }
}

/// Passes on what one side says, in pieces, until either side has ended.
fn pump(mut from: TcpStream, mut to: TcpStream, back: bool, shared: &Shared) {
    let mut piece = vec![0; 16 << 10];
    while let Ok(count @ 1..) = from.read(&mut piece) {
        let (delay, corrupt) = {
            let mut state = shared.state();
            while state.stalled {
                state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if !back && !state.forbidden.is_empty() {
                let said = String::from_utf8_lossy(&piece[..count]).to_ascii_lowercase();
                if state.forbidden.iter().any(|word| said.contains(word)) {
                    return;
                }
            }
            let corrupt = back && state.corrupt > 0;
            if corrupt {
                state.corrupt -= 1;
            }
            (if back { state.delay } else { Duration::ZERO }, corrupt)
        };
        if !delay.is_zero() {
            thread::sleep(delay);
        }
        let piece = &mut piece[..count];
        if corrupt {
            piece.iter_mut().for_each(|byte| *byte ^= 0xff);
        }
        if to.write_all(piece).is_err() {
            return;
        }
    }
}
