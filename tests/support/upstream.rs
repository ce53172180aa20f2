//! A real HTTP/1.1 server on 127.0.0.1 that answers as it is told, faults included.
//!
//! ```no_run
//! let upstream = Upstream::start();
//! upstream.set_json("/leads", r#"[{"id":1}]"#);
//! upstream.once("/leads", Reply::status(503).header("Retry-After", "2"));   // the next request only
//! upstream.once("/leads", Reply::json("[]").delay(Duration::from_millis(200)));
//! // … poll upstream.url("/leads") …
//! assert_eq!(upstream.requests().len(), 3);
//! ```
//!
//! One blocking thread per connection; all of them end, and the port closes, when the [`Upstream`] is dropped.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use flate2::Compression;
use flate2::write::{GzEncoder, ZlibEncoder};
use rustls::{HandshakeKind, ServerConfig, ServerConnection, StreamOwned};
use socket2::SockRef;

use super::certificates::{Authority, Identity};
use super::folder::Folder;

/// A server under the test's control. What it answers can be changed at any time, from any thread.
pub struct Upstream {
    shared: Arc<Shared>,
    address: SocketAddr,
    scheme: &'static str,
    acceptor: Option<JoinHandle<()>>,
}

/// A request as the server received it.
#[derive(Clone, Debug)]
pub struct RequestSeen {
    /// `GET`, `POST`, …
    pub method: String,
    /// The request target: path and query, undecoded.
    pub target: String,
    /// Names in lower case, in order.
    pub headers: Vec<(String, String)>,
    /// The body; empty where the reply came before it was read.
    pub body: Vec<u8>,
    /// Which of the server's connections it came over: 1 is the first.
    pub connection: usize,
    /// The name that the client asked for in its TLS handshake.
    pub server_name: Option<String>,
    /// The certificate that the client showed in it, in DER.
    pub certificate: Option<Vec<u8>>,
    /// When its head had been received.
    pub at: Instant,
}

impl RequestSeen {
    /// The value of the header `name` (in lower case), if it was there once.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut values = self.headers.iter().filter(|(n, _)| n == name).map(|(_, value)| value.as_str());
        values.next().filter(|_| values.next().is_none())
    }
}

/// How a body's end is told.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Framing {
    /// `Content-Length`.
    Length,
    /// `Transfer-Encoding: chunked`, in chunks of so many bytes.
    Chunked(usize),
    /// The end of the connection.
    Close,
}

/// How a body is compressed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Coding {
    /// Not at all.
    Identity,
    /// `Content-Encoding: gzip`.
    Gzip,
    /// `Content-Encoding: deflate`, which is the zlib format.
    Deflate,
}

/// What holds answers back until it is opened, or their server ends.
#[derive(Clone, Debug, Default)]
pub struct Gate(Arc<AtomicBool>);

impl Gate {
    /// Lets through what waits, and what comes.
    pub fn open(&self) {
        self.0.store(true, Ordering::Release);
    }
}

/// One thing that a server does on a connection once a request is there.
#[derive(Clone, Debug)]
pub enum Step {
    /// Sends these bytes.
    Send(Vec<u8>),
    /// Sends these bytes so many at a time, with a pause after each piece.
    Drip(Vec<u8>, usize, Duration),
    /// Sends these bytes again and again until the client has had enough.
    SendForever(Vec<u8>),
    /// Does nothing for a while.
    Pause(Duration),
    /// Does nothing until the gate is opened.
    Wait(Gate),
    /// Does nothing until the client closes the connection or the server ends.
    Stall,
    /// Closes the connection: FIN, under TLS after a close_notify.
    Close,
    /// Closes the connection without a close_notify under TLS.
    Cut,
    /// Resets the connection.
    Reset,
}

/// What is answered to a request.
#[derive(Clone, Debug)]
pub struct Reply {
    body_first: bool,
    /// Whether it only stands for what the route's judge will say.
    judged: bool,
    form: Form,
}

#[derive(Clone, Debug)]
enum Form {
    Proper(Proper),
    Steps(Vec<Step>),
}

#[derive(Clone, Debug)]
struct Proper {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    framing: Framing,
    coding: Coding,
    etag: Option<String>,
    delay: Duration,
    gate: Option<Gate>,
    drip: Option<(usize, Duration)>,
    then: Option<Step>,
}

impl Reply {
    /// 200 with this JSON text.
    pub fn json(text: impl Into<String>) -> Reply {
        Reply::body("application/json", text.into())
    }

    /// 200 with this body.
    pub fn body(content_type: &str, body: impl Into<Vec<u8>>) -> Reply {
        Reply::status(200).header("Content-Type", content_type).with(|proper| proper.body = body.into())
    }

    /// This status and, unless it may have none, an empty body.
    pub fn status(status: u16) -> Reply {
        let proper = Proper {
            status,
            headers: Vec::new(),
            body: Vec::new(),
            framing: Framing::Length,
            coding: Coding::Identity,
            etag: None,
            delay: Duration::ZERO,
            gate: None,
            drip: None,
            then: None,
        };
        Reply { body_first: true, judged: false, form: Form::Proper(proper) }
    }

    /// These bytes in place of a response, after which the connection stays open.
    pub fn raw(bytes: impl Into<Vec<u8>>) -> Reply {
        Reply::steps(vec![Step::Send(bytes.into())])
    }

    /// These steps in place of a response.
    pub fn steps(steps: Vec<Step>) -> Reply {
        Reply { body_first: true, judged: false, form: Form::Steps(steps) }
    }

    /// A response whose header section never ends.
    pub fn endless_headers() -> Reply {
        let line = b"X-More: 0123456789012345678901234567890123456789\r\n".repeat(64);
        Reply::steps(vec![Step::Send(b"HTTP/1.1 200 OK\r\n".to_vec()), Step::SendForever(line)])
    }

    /// A chunked body that never ends.
    pub fn endless_chunks() -> Reply {
        let head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
        let chunk = [b"1000\r\n".as_slice(), &[b' '; 0x1000], b"\r\n"].concat();
        Reply::steps(vec![Step::Send(head), Step::SendForever(chunk)])
    }

    /// A response that announces `bytes` of body, and sends none.
    pub fn promise(bytes: u64) -> Reply {
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {bytes}\r\n\r\n");
        Reply::steps(vec![Step::Send(head.into_bytes()), Step::Stall])
    }

    /// A gzip body of little over a thousandth of `bytes` that inflates to `bytes` spaces.
    pub fn gzip_bomb(bytes: usize) -> Reply {
        // Made once: at each request it would take longer, on a busy machine, than the answer may.
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        let body = encoder.write_all(&vec![b' '; bytes]).and_then(|()| encoder.finish()).expect("memory takes all");
        Reply::body("application/json", body).header("Content-Encoding", "gzip")
    }

    /// A response that ends in a reset after `bytes` of a body of `of` bytes.
    pub fn reset_within(bytes: usize, of: usize) -> Reply {
        let mut sent = format!("HTTP/1.1 200 OK\r\nContent-Length: {of}\r\n\r\n").into_bytes();
        sent.resize(sent.len() + bytes, b' ');
        Reply::steps(vec![Step::Send(sent), Step::Pause(Duration::from_millis(20)), Step::Reset])
    }

    /// Its status; 0 where it is no response.
    pub fn code(&self) -> u16 {
        match &self.form {
            Form::Proper(proper) => proper.status,
            Form::Steps(_) => 0,
        }
    }

    /// The same with another status.
    pub fn with_status(self, status: u16) -> Reply {
        self.with(|proper| proper.status = status)
    }

    /// Adds a header.
    pub fn header(self, name: &str, value: &str) -> Reply {
        self.with(|proper| proper.headers.push((name.to_owned(), value.to_owned())))
    }

    /// Sends `ETag: etag`, and answers 304 where `If-None-Match` lists it.
    pub fn etag(self, etag: &str) -> Reply {
        self.with(|proper| proper.etag = Some(etag.to_owned()))
    }

    /// How the body's end is told; `Length` unless set.
    pub fn framing(self, framing: Framing) -> Reply {
        self.with(|proper| proper.framing = framing)
    }

    /// How the body is compressed; not at all unless set.
    pub fn coding(self, coding: Coding) -> Reply {
        self.with(|proper| proper.coding = coding)
    }

    /// Waits before the first byte.
    pub fn delay(self, delay: Duration) -> Reply {
        self.with(|proper| proper.delay = delay)
    }

    /// Waits until that gate is opened before the first byte.
    pub fn behind(self, gate: &Gate) -> Reply {
        self.with(|proper| proper.gate = Some(gate.clone()))
    }

    /// Sends head and body `bytes` at a time, with a pause after each piece.
    pub fn drip(self, bytes: usize, every: Duration) -> Reply {
        self.with(|proper| proper.drip = Some((bytes, every)))
    }

    /// Does `step` after the response: `Step::Close` without having said so makes the connection stale.
    pub fn then(self, step: Step) -> Reply {
        self.with(|proper| proper.then = Some(step))
    }

    /// Answers as soon as the request's head is there, and leaves its body unread.
    pub fn before_body(mut self) -> Reply {
        self.body_first = false;
        self
    }

    fn with(mut self, change: impl FnOnce(&mut Proper)) -> Reply {
        if let Form::Proper(proper) = &mut self.form {
            change(proper);
        }
        self
    }
}

impl Upstream {
    /// A server that speaks plain HTTP and answers 404 to everything yet.
    pub fn start() -> Upstream {
        Upstream::listen(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), None)
    }

    /// The same at the address of one that was dropped: it is there again.
    pub fn start_at(address: SocketAddr) -> Upstream {
        Upstream::listen(address, None)
    }

    /// The same over TLS, presenting `identity`.
    pub fn start_tls(identity: &Identity) -> Upstream {
        Upstream::start_tls_at(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), identity)
    }

    /// One that a new authority vouches for, the line of a stream that trusts it, and the folder that this needs.
    pub fn start_trusted() -> (Upstream, String, Folder) {
        let (authority, folder) = (Authority::new(), Folder::new("upstream"));
        let upstream = Upstream::start_tls(&authority.identity(&["127.0.0.1"]));
        (upstream, format!("ca = {:?}", authority.write_pem(&folder)), folder)
    }

    /// The same at the address of one that was dropped.
    pub fn start_tls_at(address: SocketAddr, identity: &Identity) -> Upstream {
        Upstream::listen(address, Some(identity.server_config()))
    }

    /// The same over TLS, presenting `identity` and asking each client for a certificate that `authority` has signed.
    pub fn start_mtls(identity: &Identity, authority: &Authority) -> Upstream {
        let tls = authority.server_config_asking(identity);
        Upstream::listen(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), Some(tls))
    }

    /// The same where who has none is served too.
    pub fn start_tls_asking(identity: &Identity, authority: &Authority) -> Upstream {
        let tls = authority.server_config_curious(identity);
        Upstream::listen(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), Some(tls))
    }

    fn listen(address: SocketAddr, tls: Option<Arc<ServerConfig>>) -> Upstream {
        let listener = TcpListener::bind(address).expect("the port is free");
        let address = listener.local_addr().expect("a bound listener has an address");
        let scheme = if tls.is_some() { "https" } else { "http" };
        let shared = Arc::new(Shared::default());
        let acceptor = thread::spawn({
            let shared = Arc::clone(&shared);
            move || accept(&listener, &shared, tls)
        });
        Upstream { shared, address, scheme, acceptor: Some(acceptor) }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The URL of `path` (which starts with a slash) by the server's IP address.
    pub fn url(&self, path: &str) -> String {
        format!("{}://{}{path}", self.scheme, self.address)
    }

    /// The URL of `path` by a host name that the client has to resolve.
    pub fn url_by_name(&self, host: &str, path: &str) -> String {
        format!("{}://{host}:{}{path}", self.scheme, self.address.port())
    }

    /// Answers requests for `path` (without query) so from now on.
    pub fn set(&self, path: &str, reply: Reply) {
        self.shared.state().routes.entry(path.to_owned()).or_default().always = Some(reply);
    }

    /// Answers requests for `path` with this JSON text from now on, with an `ETag` of its own.
    pub fn set_json(&self, path: &str, text: &str) {
        let mut state = self.shared.state();
        state.versions += 1;
        let etag = format!("\"v{}\"", state.versions);
        state.routes.entry(path.to_owned()).or_default().always = Some(Reply::json(text).etag(&etag));
    }

    /// Answers one request for `path` so, before what is [`set`](Upstream::set); several are used up in order.
    pub fn once(&self, path: &str, reply: Reply) {
        self.shared.state().routes.entry(path.to_owned()).or_default().once.push_back(reply);
    }

    /// Answers each request for `path` with what `judge` says of it, once its body is there and unless one is to be answered
    /// otherwise [`once`](Upstream::once).
    pub fn judge(&self, path: &str, judge: impl Fn(&RequestSeen) -> Reply + Send + Sync + 'static) {
        self.shared.state().routes.entry(path.to_owned()).or_default().judge = Some(Arc::new(judge));
    }

    /// The same for each request whose path nothing else is said of.
    pub fn judge_all(&self, judge: impl Fn(&RequestSeen) -> Reply + Send + Sync + 'static) {
        self.judge(ANY_PATH, judge);
    }

    /// Every request so far, in order of arrival.
    pub fn requests(&self) -> Vec<RequestSeen> {
        self.shared.state().requests.clone()
    }

    /// How many requests there have been.
    pub fn request_count(&self) -> usize {
        self.shared.state().requests.len()
    }

    /// How many connections have been accepted, ever.
    pub fn connection_count(&self) -> usize {
        self.shared.state().accepted
    }

    /// How many connections are open now.
    pub fn open_connections(&self) -> usize {
        self.shared.state().open.len()
    }

    /// How many requests have had all of their answer sent.
    pub fn answered_count(&self) -> usize {
        self.shared.state().answered
    }

    /// How many requests were answered 304.
    pub fn not_modified_count(&self) -> usize {
        self.shared.state().not_modified
    }

    /// How many TLS connections resumed an earlier one's session.
    pub fn resumed_count(&self) -> usize {
        self.shared.state().resumed
    }

    /// Waits until there have been `count` requests. Panics after `patience`.
    pub fn wait_for_requests(&self, count: usize, patience: Duration) {
        self.wait(patience, "requests", |state| state.requests.len() >= count);
    }

    /// Waits until `count` connections are open. Panics after `patience`.
    pub fn wait_for_open_connections(&self, count: usize, patience: Duration) {
        self.wait(patience, "open connections", |state| state.open.len() == count);
    }

    /// Closes all connections that are open now, in good order; new ones are accepted.
    pub fn close_connections(&self) {
        for stream in self.shared.state().open.values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn wait(&self, patience: Duration, what: &str, done: impl Fn(&State) -> bool) {
        let deadline = Instant::now() + patience;
        let mut state = self.shared.state();
        while !done(&state) {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "waited {patience:?} for {what}");
            state = self.shared.wait(state, left);
        }
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.shared.state().ended = true;
        self.close_connections();
        self.shared.changed.notify_all();
        let _ = TcpStream::connect(self.address); // Wakes the acceptor, which then sees the end.
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    routes: HashMap<String, Route>,
    versions: u64,
    requests: Vec<RequestSeen>,
    accepted: usize,
    answered: usize,
    not_modified: usize,
    resumed: usize,
    open: HashMap<usize, TcpStream>,
    ended: bool,
}

#[derive(Default)]
struct Route {
    once: VecDeque<Reply>,
    always: Option<Reply>,
    judge: Option<Judge>,
}

/// Stands for each path that nothing is said of.
const ANY_PATH: &str = "*";

/// What answers a request that has been read whole.
type Judge = Arc<dyn Fn(&RequestSeen) -> Reply + Send + Sync>;

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, limit: Duration) -> MutexGuard<'a, State> {
        self.changed.wait_timeout(state, limit).unwrap_or_else(PoisonError::into_inner).0
    }

    /// Sleeps, but not beyond the server's end.
    fn pause(&self, duration: Duration) -> io::Result<()> {
        let deadline = Instant::now() + duration;
        let mut state = self.state();
        loop {
            if state.ended {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            state = self.wait(state, left);
        }
    }

    fn reply_to(&self, path: &str) -> Reply {
        let mut state = self.state();
        let any_is_judged = state.routes.contains_key(ANY_PATH);
        let Some(route) = state.routes.get_mut(path) else {
            return Reply { judged: any_is_judged, ..Reply::status(404) };
        };
        let judged = route.judge.is_some() || (route.always.is_none() && any_is_judged);
        let reply = route.once.pop_front().or_else(|| route.always.clone().filter(|_| !judged));
        reply.unwrap_or_else(|| Reply { judged, ..Reply::status(404) })
    }

    /// What judges requests for `path`.
    fn judge_of(&self, path: &str) -> Option<Judge> {
        let state = self.state();
        let own = state.routes.get(path).and_then(|route| route.judge.clone());
        own.or_else(|| state.routes.get(ANY_PATH).and_then(|route| route.judge.clone()))
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>, tls: Option<Arc<ServerConfig>>) {
    let mut threads = Vec::new();
    while let Ok((stream, _)) = listener.accept() {
        let number = {
            let mut state = shared.state();
            if state.ended {
                break;
            }
            state.accepted += 1;
            let number = state.accepted;
            state.open.insert(number, stream.try_clone().expect("a descriptor is free"));
            number
        };
        shared.changed.notify_all();
        let (shared, tls) = (Arc::clone(shared), tls.clone());
        threads.push(thread::spawn(move || {
            // A connection that ends in an error has ended: which is all the server minds.
            let _ = match tls {
                None => Connection { wire: Wire::Plain(stream), shared: &shared, number }.serve(),
                Some(config) => ServerConnection::new(config).map_err(io::Error::other).and_then(|tls| {
                    let wire = Wire::Tls(Box::new(StreamOwned::new(tls, stream)));
                    Connection { wire, shared: &shared, number }.serve()
                }),
            };
            shared.state().open.remove(&number);
            shared.changed.notify_all();
        }));
        threads.retain(|thread| !thread.is_finished());
    }
    for thread in threads {
        let _ = thread.join();
    }
}

enum Wire {
    Plain(TcpStream),
    Tls(Box<StreamOwned<ServerConnection, TcpStream>>),
}

struct Connection<'a> {
    wire: Wire,
    shared: &'a Shared,
    number: usize,
}

/// Whether the connection is used again.
#[derive(Eq, PartialEq)]
enum After {
    Again,
    Over,
}

impl Connection<'_> {
    fn serve(mut self) -> io::Result<()> {
        self.socket().set_nodelay(true)?;
        let mut received = Vec::new();
        let mut is_first = true;
        loop {
            let Some((mut seen, length)) = self.read_head(&mut received)? else { return Ok(()) };
            let path = seen.target.split('?').next().unwrap_or_default().to_owned();
            let mut reply = self.shared.reply_to(&path);
            if reply.body_first {
                while received.len() < length {
                    if self.read_more(&mut received)? == 0 {
                        return Ok(());
                    }
                }
                seen.body = received.drain(..length).collect();
            }
            if let Some(judge) = self.shared.judge_of(&path).filter(|_| reply.judged) {
                reply = judge(&seen);
            }
            if let Wire::Tls(tls) = &self.wire
                && is_first
                && tls.conn.handshake_kind() == Some(HandshakeKind::Resumed)
            {
                self.shared.state().resumed += 1;
            }
            is_first = false;
            let unread_body = !reply.body_first && length > 0;
            let if_none_match = seen.header("if-none-match").map(str::to_owned);
            let is_head = seen.method == "HEAD";
            self.shared.state().requests.push(seen);
            self.shared.changed.notify_all();
            let steps = match reply.form {
                Form::Steps(steps) => steps,
                Form::Proper(proper) => self.steps_of(proper, if_none_match.as_deref(), is_head),
            };
            for step in steps {
                if self.take(step)? == After::Over {
                    return Ok(());
                }
            }
            self.shared.state().answered += 1;
            if unread_body {
                // Left unread long enough for the client to see that; then out of the way, to notice the client's end.
                self.take(Step::Pause(Duration::from_millis(200)))?;
                self.take(Step::Stall)?;
                return Ok(());
            }
        }
    }

    fn steps_of(&self, proper: Proper, if_none_match: Option<&str>, is_head: bool) -> Vec<Step> {
        let matches = |etag: &String| if_none_match.is_some_and(|list| list.split(", ").any(|tag| tag == etag));
        let status = if proper.etag.as_ref().is_some_and(matches) { 304 } else { proper.status };
        if status == 304 {
            self.shared.state().not_modified += 1;
        }
        let mut head = format!("HTTP/1.1 {status} Whatever\r\n");
        let mut line = |name: &str, value: &str| head.push_str(&format!("{name}: {value}\r\n"));
        proper.headers.iter().for_each(|(name, value)| line(name, value));
        if let Some(etag) = &proper.etag {
            line("ETag", etag);
        }
        let body = match proper.coding {
            _ if status == 304 || status == 204 => Vec::new(),
            Coding::Identity => proper.body,
            Coding::Gzip => {
                line("Content-Encoding", "gzip");
                let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
                encoder.write_all(&proper.body).and_then(|()| encoder.finish()).expect("memory takes all")
            }
            Coding::Deflate => {
                line("Content-Encoding", "deflate");
                let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
                encoder.write_all(&proper.body).and_then(|()| encoder.finish()).expect("memory takes all")
            }
        };
        let mut framed = Vec::new();
        let mut then = proper.then;
        match proper.framing {
            _ if status == 304 || status == 204 => {}
            Framing::Length => {
                line("Content-Length", &body.len().to_string());
                framed = body;
            }
            Framing::Chunked(size) => {
                line("Transfer-Encoding", "chunked");
                for chunk in body.chunks(size.max(1)) {
                    framed.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
                    framed.extend_from_slice(chunk);
                    framed.extend_from_slice(b"\r\n");
                }
                framed.extend_from_slice(b"0\r\n\r\n");
            }
            Framing::Close => {
                framed = body;
                then = then.or(Some(Step::Close));
            }
        }
        head.push_str("\r\n");
        let mut bytes = head.into_bytes();
        if !is_head {
            bytes.extend_from_slice(&framed);
        }
        let says_close = proper
            .headers
            .iter()
            .any(|(name, value)| name.eq_ignore_ascii_case("connection") && value.eq_ignore_ascii_case("close"));
        let send = match proper.drip {
            None => Step::Send(bytes),
            Some((count, every)) => Step::Drip(bytes, count, every),
        };
        let last = then.or(says_close.then_some(Step::Close));
        let held_back = proper.gate.map(Step::Wait);
        [Step::Pause(proper.delay)].into_iter().chain(held_back).chain([send]).chain(last).collect()
    }

    fn take(&mut self, step: Step) -> io::Result<After> {
        match step {
            Step::Send(bytes) => self.write(&bytes)?,
            Step::Drip(bytes, count, every) => {
                for piece in bytes.chunks(count.max(1)) {
                    self.write(piece)?;
                    self.shared.pause(every)?;
                }
            }
            Step::SendForever(bytes) => loop {
                self.write(&bytes)?;
            },
            Step::Pause(duration) => self.shared.pause(duration)?,
            Step::Wait(gate) => {
                while !gate.0.load(Ordering::Acquire) {
                    self.shared.pause(Duration::from_millis(2))?;
                }
            }
            Step::Stall => {
                while self.read_more(&mut Vec::new())? > 0 {}
                return Ok(After::Over);
            }
            Step::Close => {
                if let Wire::Tls(tls) = &mut self.wire {
                    tls.conn.send_close_notify();
                    tls.flush()?;
                }
                self.socket().shutdown(Shutdown::Write)?;
                return Ok(After::Over);
            }
            Step::Cut => {
                self.socket().shutdown(Shutdown::Write)?;
                return Ok(After::Over);
            }
            Step::Reset => {
                // The last descriptor to close sends the reset, so this must be it.
                self.shared.state().open.remove(&self.number);
                SockRef::from(self.socket()).set_linger(Some(Duration::ZERO))?;
                return Ok(After::Over);
            }
        }
        Ok(After::Again)
    }

    /// A request's head and the length of its body; `None` at the end of the connection.
    fn read_head(&mut self, received: &mut Vec<u8>) -> io::Result<Option<(RequestSeen, usize)>> {
        loop {
            let mut headers = [httparse::EMPTY_HEADER; 128];
            let mut request = httparse::Request::new(&mut headers);
            let parsed = request.parse(received).map_err(io::Error::other)?;
            if let httparse::Status::Complete(head_length) = parsed {
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                let seen = RequestSeen {
                    method: request.method.unwrap_or_default().to_owned(),
                    target: request.path.unwrap_or_default().to_owned(),
                    headers: request
                        .headers
                        .iter()
                        .map(|header| (header.name.to_ascii_lowercase(), text(header.value)))
                        .collect(),
                    body: Vec::new(),
                    connection: self.number,
                    server_name: match &self.wire {
                        Wire::Plain(_) => None,
                        Wire::Tls(tls) => tls.conn.server_name().map(str::to_owned),
                    },
                    certificate: match &self.wire {
                        Wire::Plain(_) => None,
                        Wire::Tls(tls) => {
                            tls.conn.peer_certificates().and_then(|all| all.first()).map(|it| it.to_vec())
                        }
                    },
                    at: Instant::now(),
                };
                let length = seen.header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
                received.drain(..head_length);
                return Ok(Some((seen, length)));
            }
            if self.read_more(received)? == 0 {
                return Ok(None);
            }
        }
    }

    fn socket(&self) -> &TcpStream {
        match &self.wire {
            Wire::Plain(stream) => stream,
            Wire::Tls(tls) => &tls.sock,
        }
    }

    fn read_more(&mut self, received: &mut Vec<u8>) -> io::Result<usize> {
        let mut bytes = [0; 16 << 10];
        let count = match &mut self.wire {
            Wire::Plain(stream) => stream.read(&mut bytes)?,
            Wire::Tls(tls) => tls.read(&mut bytes)?,
        };
        received.extend_from_slice(&bytes[..count]);
        Ok(count)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.wire {
            Wire::Plain(stream) => stream.write_all(bytes),
            Wire::Tls(tls) => tls.write_all(bytes).and_then(|()| tls.flush()),
        }
    }
}
