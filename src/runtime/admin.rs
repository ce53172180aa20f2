//! The admin listener: metrics, readiness, and orders with the admin key.
//!
//! Source: protocol version 1, section 6. Memory: at most `CONNECTIONS_MAX` threads, one a connection, each with one
//! request. Errors: problem documents. Blocking threads of its own, so that a scrape never takes a turn of a core.

use std::cell::Cell;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use crate::codec::http::{self, Authorization, BodyDecoder, BodyError, BodyLength, Head, Response};
use crate::codec::message::ErrorCode;
use crate::config::AdminOptions;
use crate::limits;
use crate::metrics::{self, CoreMetrics};
use crate::secret::Secret;
use crate::shard::Ledger;
use crate::time::{Instant, WallTime};

use super::admin_call::{Call, not_allowed, problem};
use super::admin_streams::{self, Streams};
use super::admin_users::{self, Users};
use super::api_keys::KeyStore;
use super::control::Control;
use super::core::Process;
use super::redis::Store;
use super::streams::StreamStore;
use super::{admin_keys, clock};

/// Connections served at once; further ones wait in the backlog.
const CONNECTIONS_MAX: usize = 16;
/// What the path of each order begins with.
const API: &str = "/admin/v1/";
/// How long one request and its answer may take.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(10);

/// What the admin listener serves from.
pub struct Admin {
    /// Its options, replaced by a reload.
    pub options: RwLock<AdminOptions>,
    /// The address it listens on.
    pub listen: SocketAddr,
    /// The address it was to listen on, port 0 included.
    pub listen_as_configured: SocketAddr,
    /// Every core's counters.
    pub metrics: Vec<Arc<CoreMetrics>>,
    /// What the cores share.
    pub process: Arc<Process>,
    /// What its cores count together.
    pub ledger: Arc<Ledger>,
    /// Its logouts, revocations and changed permissions.
    pub control: Arc<Control>,
    /// When the process started.
    pub started: WallTime,
    /// The same by the monotonic clock.
    pub started_at: Instant,
    /// Connections it takes at most.
    pub connections_max: u64,
    /// The streams.
    pub streams: Arc<StreamStore>,
    /// The API keys.
    pub keys: Arc<KeyStore>,
    /// Begins a drain.
    pub drain: Box<dyn Fn() + Send + Sync>,
}

impl Admin {
    /// The key that orders need.
    pub fn key(&self) -> Option<Secret> {
        self.options.read().unwrap_or_else(PoisonError::into_inner).key.clone()
    }
}

/// Serves until the process ends. `admin` is read for each request, so that a reload can replace its options.
///
/// # Errors
/// Where the system has no thread left.
pub fn start(listener: TcpListener, admin: Arc<Admin>) -> std::io::Result<()> {
    listener.set_nonblocking(false)?;
    let serving = Arc::new(AtomicUsize::new(0));
    std::thread::Builder::new().name("admin".into()).spawn(move || {
        loop {
            if serving.load(Ordering::Acquire) >= CONNECTIONS_MAX {
                clock::hold_thread(Duration::from_millis(10));
                continue;
            }
            let Ok((socket, _)) = listener.accept() else {
                clock::hold_thread(Duration::from_millis(20));
                continue;
            };
            let (admin, count) = (Arc::clone(&admin), Arc::clone(&serving));
            count.fetch_add(1, Ordering::AcqRel);
            let spawned = std::thread::Builder::new().name("admin-request".into()).spawn(move || {
                let _leave = Leave(count);
                serve(socket, &admin);
            });
            if spawned.is_err() {
                serving.fetch_sub(1, Ordering::AcqRel);
            }
        }
    })?;
    Ok(())
}

/// Counts a thread out, however it ends.
struct Leave(Arc<AtomicUsize>);

impl Drop for Leave {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// One connection: requests one after the other, until it idles.
fn serve(socket: TcpStream, admin: &Admin) {
    let Ok(peer) = socket.peer_addr() else { return };
    let mut link = Link { socket, buffer: Vec::new(), deadline: clock::now().at + EXCHANGE_TIMEOUT };
    loop {
        let parsed = http::parse_head(&link.buffer, limits::ADMIN_HEAD_BYTES_MAX);
        let used = match parsed.map(|head| head.map(|(_, used)| used)) {
            Ok(Some(used)) => used,
            Ok(None) if link.fill() => continue,
            Ok(None) => return,
            Err(error) => {
                let code = ErrorCode::BadRequest.as_str();
                link.send(Response::problem(error.status(), code, &error.to_string()), false);
                return link.end();
            }
        };
        let head_bytes: Vec<u8> = link.buffer.drain(..used).collect();
        // It has been read a moment ago.
        let Ok(Some((head, _))) = http::parse_head(&head_bytes, limits::ADMIN_HEAD_BYTES_MAX) else { return };
        let options = admin.options.read().unwrap_or_else(PoisonError::into_inner).clone();
        let drains = Cell::new(false);
        // A body is read for those alone who may have it read.
        let (response, whole) = match admit(&options, admin.listen, &head) {
            Err(refusal) => (refusal, head.body == BodyLength::None),
            Ok(()) => match link.body(&head) {
                Ok(body) => (answer(admin, &head, &body, peer, &drains), true),
                Err(Unread::Refused(error)) => {
                    let too_large = matches!(error, BodyError::TooLarge { .. });
                    let code = if too_large { ErrorCode::TooLarge } else { ErrorCode::BadRequest };
                    let refusal = Response::problem(error.status(), code.as_str(), &error.to_string());
                    let is_coded = error == BodyError::Coded;
                    (if is_coded { refusal.header("Accept-Encoding", "identity") } else { refusal }, false)
                }
                Err(Unread::Gone) => return,
            },
        };
        let keep_alive = head.keep_alive && whole;
        let sent = link.send(response.head_only(head.method == "HEAD"), keep_alive);
        if drains.get() {
            // Behind its answer: a process without connections ends at once.
            (admin.drain)();
        }
        if !sent || !keep_alive {
            return link.end();
        }
        link.deadline = clock::now().at + EXCHANGE_TIMEOUT;
    }
}

/// Why there is no body.
enum Unread {
    /// It is none that is taken.
    Refused(BodyError),
    /// The peer is gone, or took too long.
    Gone,
}

/// A connection, what has come of it, and until when its exchange may take.
struct Link {
    socket: TcpStream,
    /// At most a head or what came with a body's end, and one read.
    buffer: Vec<u8>,
    deadline: Instant,
}

impl Link {
    /// Reads on; whether there was something.
    fn fill(&mut self) -> bool {
        let mut chunk = [0u8; 4096];
        let left = self.deadline.since(clock::now().at);
        if left.is_zero() || self.socket.set_read_timeout(Some(left)).is_err() {
            return false;
        }
        match self.socket.read(&mut chunk) {
            Ok(count @ 1..) => {
                self.buffer.extend_from_slice(chunk.get(..count).unwrap_or_default());
                true
            }
            _ => false,
        }
    }

    /// The whole body of the request with that head.
    fn body(&mut self, head: &Head<'_>) -> Result<Vec<u8>, Unread> {
        let mut body = Vec::new();
        if head.body == BodyLength::None {
            return Ok(body);
        }
        let mut decoder = BodyDecoder::of(head).map_err(Unread::Refused)?;
        if head.expects_continue() && self.buffer.is_empty() {
            self.socket.write_all(http::CONTINUE).map_err(|_| Unread::Gone)?;
        }
        loop {
            let (used, whole) = decoder.feed(&self.buffer, &mut body).map_err(Unread::Refused)?;
            self.buffer.drain(..used);
            if whole {
                return Ok(body);
            }
            if !self.fill() {
                return Err(Unread::Gone);
            }
        }
    }

    /// Sends an answer; whether it has left.
    fn send(&mut self, response: Response, keep_alive: bool) -> bool {
        let mut out = Vec::new();
        response
            .header("Date", &http::http_date(clock::now().wall))
            .header("X-Content-Type-Options", "nosniff")
            .header("Cache-Control", "no-store")
            .close(!keep_alive)
            .write(&mut out);
        self.socket.set_write_timeout(Some(EXCHANGE_TIMEOUT)).and_then(|()| self.socket.write_all(&out)).is_ok()
    }

    /// Ends it: what is still to come is read, so that closing does not reset the answer away.
    fn end(&mut self) {
        let mut chunk = [0u8; 4096];
        let _ = self.socket.shutdown(std::net::Shutdown::Write);
        let _ = self.socket.set_read_timeout(Some(Duration::from_millis(200)));
        while matches!(self.socket.read(&mut chunk), Ok(1..)) && clock::now().at < self.deadline {}
    }
}

/// Whether a request is carried out at all.
fn admit(options: &AdminOptions, listen: SocketAddr, head: &Head<'_>) -> Result<(), Response> {
    // A browser that was led here by a name of its page's choice (DNS rebinding) says that name.
    if !host_allowed(head.host, options, listen) {
        return Err(problem(ErrorCode::Forbidden, "the Host is not this listener's address or one of admin.names"));
    }
    if head.path.starts_with(API) { authorised(options, head) } else { Ok(()) }
}

/// `drains` is set where a drain is to begin when the answer has been sent.
fn answer(admin: &Admin, head: &Head<'_>, body: &[u8], peer: SocketAddr, drains: &Cell<bool>) -> Response {
    match head.path {
        "/metrics" => reading(head, || {
            let key_sets = admin.process.issuers.figures(admin.started_at, clock::now());
            let process = metrics::Process {
                started: admin.started,
                connections_max: admin.connections_max,
                draining: admin.process.draining.load(Ordering::Relaxed),
                store: admin.process.store.as_ref().map(Store::metrics),
                control: admin.control.counts(),
                key_set_keys: key_sets.keys,
                key_set_age: key_sets.age,
                ephemeral_sessions: admin.ledger.ephemeral_sessions() as u64,
            };
            Response::new(200).body(metrics::CONTENT_TYPE, metrics::render(&admin.metrics, &process).into_bytes())
        }),
        "/readyz" => reading(head, || {
            if admin.process.draining.load(Ordering::Relaxed) {
                return Response::new(503)
                    .header("Retry-After", "10")
                    .body("application/json", &b"{\"status\":\"draining\"}\n"[..]);
            }
            if !admin.process.serving.load(Ordering::Relaxed) {
                return Response::new(503)
                    .header("Retry-After", "1")
                    .body("application/json", &b"{\"status\":\"starting\"}\n"[..]);
            }
            let redis = match admin.process.store.as_ref().map(Store::is_up) {
                None => "",
                Some(true) => ",\"redis\":\"up\"",
                Some(false) => ",\"redis\":\"away\"",
            };
            Response::new(200).body("application/json", format!("{{\"status\":\"ready\"{redis}}}\n").into_bytes())
        }),
        path => match path.strip_prefix(API).map(|rest| rest.split('/').map(http::percent_decode).collect()) {
            Some(Some(segments)) => {
                let matched: Vec<_> = head.all("if-match").map(String::from_utf8_lossy).collect();
                let if_match = (!matched.is_empty()).then(|| matched.join(","));
                let call = Call { method: head.method, path: segments, query: head.query, if_match, body, by: peer };
                carry_out(admin, &call, drains)
            }
            Some(None) => problem(ErrorCode::BadRequest, "the path is not percent-encoded UTF-8"),
            None => problem(ErrorCode::NotFound, "there is no such resource"),
        },
    }
}

fn carry_out(admin: &Admin, call: &Call<'_>, drains: &Cell<bool>) -> Response {
    let path: Vec<&str> = call.path.iter().map(|segment| &**segment).collect();
    match path.as_slice() {
        ["drain"] if call.method == "POST" => {
            call.audit(&[], "An administrator has asked for a drain.");
            drains.set(true);
            Response::new(202).body("application/json", &b"{\"status\":\"draining\"}\n"[..])
        }
        ["drain"] => not_allowed("POST"),
        ["streams", rest @ ..] => {
            let streams = Streams { store: &admin.streams, process: &admin.process };
            admin_streams::answer(streams, call, rest)
        }
        ["keys", rest @ ..] => admin_keys::answer(&admin.keys, call, rest),
        path => {
            let key = admin.key();
            let users = Users { control: &admin.control, process: &admin.process, key: key.as_ref() };
            admin_users::answer(users, call, path)
                .unwrap_or_else(|| problem(ErrorCode::NotFound, "there is no such resource"))
        }
    }
}

fn reading(head: &Head<'_>, respond: impl FnOnce() -> Response) -> Response {
    if matches!(head.method, "GET" | "HEAD") { respond() } else { not_allowed("GET, HEAD") }
}

fn authorised(options: &AdminOptions, head: &Head<'_>) -> Result<(), Response> {
    let Some(key) = &options.key else {
        return Err(problem(ErrorCode::Forbidden, "no admin.key is configured: the admin API is off"));
    };
    let presented = match http::bearer(head) {
        Authorization::Bearer(token) => Some(Secret::new(token.as_bytes())),
        _ => None,
    };
    match presented {
        Some(presented) if presented == *key => Ok(()),
        Some(_) => Err(problem(ErrorCode::InvalidToken, "this is not the admin key")
            .header("WWW-Authenticate", "Bearer error=\"invalid_token\"")),
        None => {
            Err(problem(ErrorCode::MissingCredential, "the admin key is needed").header("WWW-Authenticate", "Bearer"))
        }
    }
}

/// Whether a `Host` is the listener's own address, a name for loopback where it listens there, or a configured name.
fn host_allowed(host: &str, options: &AdminOptions, listen: SocketAddr) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    if options.names.iter().any(|allowed| allowed.eq_ignore_ascii_case(name) || allowed.eq_ignore_ascii_case(host)) {
        return true;
    }
    let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    match bare.parse::<IpAddr>() {
        // A page cannot make a browser send an address as Host unless it is the one connected to.
        Ok(address) => address == listen.ip() || listen.ip().is_unspecified(),
        Err(_) => listen.ip().is_loopback() && bare.eq_ignore_ascii_case("localhost"),
    }
}
