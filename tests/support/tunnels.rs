//! An HTTP proxy of the kind that stands at the edge of a company's network: it opens tunnels for those who log in, and
//! resolves names that nobody else knows.

use std::collections::{HashMap, HashSet};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// A proxy.
pub struct Tunnels {
    address: SocketAddr,
    shared: Arc<Mutex<State>>,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    /// Where each `host:port` is.
    known: HashMap<String, SocketAddr>,
    /// What `Proxy-Authorization` must be.
    login: Option<String>,
    /// What it answers to everybody instead.
    says: Option<Vec<u8>>,
    /// For whom it takes the line and never says a word.
    held: HashSet<String>,
    /// How many bytes come back through a tunnel before it is cut.
    cuts_after: Option<u64>,
    /// Clients and what they are connected to.
    open: Vec<TcpStream>,
    /// Heads that came.
    heads: Vec<String>,
    /// What went through the tunnels on its way out.
    passed: Vec<u8>,
    ended: bool,
}

impl Tunnels {
    /// One that knows nobody yet.
    pub fn start() -> Tunnels {
        Tunnels::start_at(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))
    }

    /// The same at the address of one that was dropped.
    pub fn start_at(address: SocketAddr) -> Tunnels {
        let listener = TcpListener::bind(address).expect("the port is free");
        let address = listener.local_addr().expect("an address");
        let shared = Arc::new(Mutex::new(State::default()));
        let acceptor = thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                for stream in listener.incoming().flatten() {
                    if state(&shared).ended {
                        return;
                    }
                    let shared = Arc::clone(&shared);
                    thread::spawn(move || serve(stream, &shared));
                }
            }
        });
        Tunnels { address, shared, acceptor: Some(acceptor) }
    }

    /// `end`, `host:port`, is found at `address`.
    pub fn knows(&self, end: &str, address: SocketAddr) {
        state(&self.shared).known.insert(end.to_owned(), address);
    }

    /// Only those who send that `Proxy-Authorization` are served.
    pub fn wants(&self, login: &str) {
        state(&self.shared).login = Some(login.to_owned());
    }

    /// It answers that to whoever asks, whatever it asks; `None`: it does its work again.
    pub fn says(&self, answer: Option<&[u8]>) {
        state(&self.shared).says = answer.map(<[u8]>::to_vec);
    }

    /// It takes the line of whoever asks for `end` and says nothing.
    pub fn holds(&self, end: &str) {
        state(&self.shared).held.insert(end.to_owned());
    }

    /// Each tunnel is cut when so many bytes have come back through it, those that are open at once; `None`: none is any more.
    pub fn cuts_after(&self, bytes: Option<u64>) {
        state(&self.shared).cuts_after = bytes;
        if bytes.is_some() {
            self.close_connections();
        }
    }

    /// Cuts all that is open now; new connections are accepted.
    pub fn close_connections(&self) {
        for stream in state(&self.shared).open.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Its `host:port`.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where the tunnels that were asked for were to lead.
    pub fn asked(&self) -> Vec<String> {
        let end = |head: &String| head.split(' ').nth(1).unwrap_or_default().to_owned();
        state(&self.shared).heads.iter().map(end).collect()
    }

    /// Everything that clients have said, to it and through it.
    pub fn heard(&self) -> String {
        let state = state(&self.shared);
        state.heads.concat() + &String::from_utf8_lossy(&state.passed)
    }
}

impl Drop for Tunnels {
    fn drop(&mut self) {
        state(&self.shared).ended = true;
        let _ = TcpStream::connect(self.address);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        self.close_connections();
    }
}

fn state(shared: &Mutex<State>) -> MutexGuard<'_, State> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve(mut client: TcpStream, shared: &Arc<Mutex<State>>) {
    let _ = client.set_read_timeout(Some(Duration::from_secs(60)));
    state(shared).open.extend(client.try_clone());
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        match client.read(&mut byte) {
            Ok(1) => head.push(byte[0]),
            _ => return,
        }
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let end = head.strip_prefix("CONNECT ").and_then(|rest| rest.split(' ').next()).unwrap_or_default().to_owned();
    let answer: Result<SocketAddr, Vec<u8>> = {
        let mut state = state(shared);
        state.heads.push(head.clone());
        let login = state.login.as_ref().map(|login| format!("\r\nProxy-Authorization: {login}\r\n"));
        if let Some(says) = &state.says {
            Err(says.clone())
        } else if state.held.contains(&end) {
            Err(Vec::new())
        } else if login.is_some_and(|login| !head.contains(&login)) {
            Err(b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\nContent-Length: 0\r\n\r\n"
                .to_vec())
        } else {
            let unknown = || b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 4\r\n\r\nnone".to_vec();
            state.known.get(&end).copied().ok_or_else(unknown)
        }
    };
    let opened =
        answer.and_then(|address| TcpStream::connect(address).map_err(|_| b"HTTP/1.1 504 No\r\n\r\n".to_vec()));
    let server = match opened {
        Ok(server) => server,
        Err(answer) => {
            let _ = client.write_all(&answer);
            // What says nothing holds the line.
            let mut rest = [0; 64];
            while answer.is_empty() && client.read(&mut rest).is_ok_and(|count| count > 0) {}
            return;
        }
    };
    let cuts_after = {
        let mut state = state(shared);
        state.open.extend(server.try_clone());
        state.cuts_after.unwrap_or(u64::MAX)
    };
    // In pieces, as networks do.
    let _ = client.set_nodelay(true);
    for piece in [&b"HTTP/1.1 200 Conn"[..], b"ection established\r\nVia: 1.1 edge\r\n", b"\r\n"] {
        if client.write_all(piece).is_err() {
            return;
        }
    }
    let (mut from, mut to) = (client.try_clone().expect("a descriptor"), server.try_clone().expect("a descriptor"));
    let out = thread::spawn({
        let shared = Arc::clone(shared);
        move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = from.read(&mut bytes) {
                state(&shared).passed.extend_from_slice(&bytes[..count]);
                if to.write_all(&bytes[..count]).is_err() {
                    break;
                }
            }
            let _ = to.shutdown(Shutdown::Both);
        }
    });
    let (server, mut client) = (server, client);
    let _ = std::io::copy(&mut (&server).take(cuts_after), &mut client);
    let _ = (client.shutdown(Shutdown::Both), server.shutdown(Shutdown::Both));
    let _ = out.join();
}
