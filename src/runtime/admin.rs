//! The admin listener: metrics, readiness, and orders with the admin key.
//!
//! Source: protocol version 1, section 6. Memory: at most `CONNECTIONS_MAX` threads, one a connection, each with one
//! request. Errors: problem documents. Blocking threads of its own, so that a scrape never takes a turn of a core.
//! A wrong key counts for its address as a wrong credential does on the public listener (`limits.auth_failures_per_minute`),
//! but the right one is always taken.

use std::cell::Cell;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use crate::codec::http::{self, Authorization, BodyDecoder, BodyError, BodyLength, Head, Response};
use crate::codec::message::ErrorCode;
use crate::config::{AdminOptions, LogLevel};
use crate::limits;
use crate::metrics::{self, CoreMetrics};
use crate::secret::Secret;
use crate::shard::{FAILURE_DELAY, Ledger, Standing};
use crate::time::{Instant, WallTime};

use super::admin_call::{Call, not_allowed, problem};
use super::admin_places::{Place, Places};
use super::admin_streams::{self, Streams};
use super::admin_users::{self, Users};
use super::api_keys::KeyStore;
use super::control::{Control, Told};
use super::core::Process;
use super::redis::Store;
use super::streams::StreamStore;
use super::{admin_keys, clock, log};

/// Connections served at once.
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
    /// Connections it takes at most, replaced by a reload.
    pub connections_max: AtomicU32,
    /// The streams.
    pub streams: Arc<StreamStore>,
    /// The API keys.
    pub keys: Arc<KeyStore>,
    /// `limits.auth_failures_per_minute`, replaced by a reload.
    pub failures_per_minute: AtomicU32,
    /// When a wrong key was last said in the log.
    pub wrong_key_told: Told,
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
    let places = Arc::new(Places::default());
    std::thread::Builder::new().name("admin".into()).spawn(move || {
        loop {
            let Ok((socket, _)) = listener.accept() else {
                clock::hold_thread(Duration::from_millis(20));
                continue;
            };
            let place = Places::take(&places, socket, CONNECTIONS_MAX, || clock::now().at);
            let admin = Arc::clone(&admin);
            // Where there is no thread the connection ends.
            let spawned = std::thread::Builder::new().name("admin-request".into());
            let _ = spawned.spawn(move || serve(&place, &admin));
        }
    })?;
    Ok(())
}

/// One connection: requests one after the other, until it idles.
fn serve(place: &Place, admin: &Admin) {
    let socket = place.socket();
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
        let (response, whole) = match admit(admin, &options, &head, peer.ip()) {
            Err(Refused { response, late }) => {
                if late {
                    clock::hold_thread(FAILURE_DELAY);
                }
                (response, head.body == BodyLength::None)
            }
            Ok(Admitted::ToRead) => (answer(admin, &head, &[], peer, &drains), head.body == BodyLength::None),
            Ok(Admitted::ToOrder) => match link.body_in(place, &head) {
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
        let now = clock::now().at;
        place.idles(Some(now));
        link.deadline = now + EXCHANGE_TIMEOUT;
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
struct Link<'s> {
    socket: &'s TcpStream,
    /// At most a head or what came with a body's end, and one read.
    buffer: Vec<u8>,
    deadline: Instant,
}

impl Link<'_> {
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

    /// The whole body of the request with that head, which has shown the key: it keeps its place.
    fn body_in(&mut self, place: &Place, head: &Head<'_>) -> Result<Vec<u8>, Unread> {
        place.idles(None);
        self.body(head)
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

/// What a request may do.
enum Admitted {
    /// Read what anybody may.
    ToRead,
    /// Order, or read what is for administrators.
    ToOrder,
}

/// Why a request is not carried out.
struct Refused {
    response: Response,
    /// Whether that is held back: the peer's address has failed too often.
    late: bool,
}

impl From<Response> for Refused {
    fn from(response: Response) -> Refused {
        Refused { response, late: false }
    }
}

/// Whether a request is carried out at all.
fn admit(admin: &Admin, options: &AdminOptions, head: &Head<'_>, peer: IpAddr) -> Result<Admitted, Refused> {
    // A browser that was led here by a name of its page's choice (DNS rebinding) says that name.
    if !host_allowed(head.host, options, admin.listen) {
        let detail = "the Host is not this listener's address or one of admin.names";
        return Err(problem(ErrorCode::Forbidden, detail).into());
    }
    if !head.path.starts_with(API) {
        return Ok(Admitted::ToRead);
    }
    authorised(admin, options, head, peer).map(|()| Admitted::ToOrder)
}

/// `drains` is set where a drain is to begin when the answer has been sent.
fn answer(admin: &Admin, head: &Head<'_>, body: &[u8], peer: SocketAddr, drains: &Cell<bool>) -> Response {
    match head.path {
        "/metrics" => reading(head, || {
            let key_sets = admin.process.issuers.figures(admin.started_at, clock::now());
            let process = metrics::Process {
                started: admin.started,
                connections_max: u64::from(admin.connections_max.load(Ordering::Relaxed)),
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

fn authorised(admin: &Admin, options: &AdminOptions, head: &Head<'_>, peer: IpAddr) -> Result<(), Refused> {
    let Some(key) = &options.key else {
        return Err(problem(ErrorCode::Forbidden, "no admin.key is configured: the admin API is off").into());
    };
    let presented = match http::bearer(head) {
        Authorization::Bearer(token) => Secret::new(token.as_bytes()),
        _ => {
            let refusal = problem(ErrorCode::MissingCredential, "the admin key is needed");
            return Err(refusal.header("WWW-Authenticate", "Bearer").into());
        }
    };
    // Whatever others try from its address, an administrator can log somebody out.
    if presented == *key {
        return Ok(());
    }
    if admin.wrong_key_told.again(clock::now().wall) {
        log::write(LogLevel::Warn, &[("by", &peer)], "Somebody calls the admin API with a wrong key.");
    }
    // What is tried here opens nothing on the public listener, nor the other way round: each counts for itself.
    let (holder, per_minute) = (admin.ledger.admin_address(peer), admin.failures_per_minute.load(Ordering::Relaxed));
    let now = clock::now();
    let standing = admin.ledger.standing(holder, per_minute, now.at);
    let late = standing != Standing::Good;
    if standing == Standing::Refused {
        let refusal = problem(ErrorCode::RateLimited, "too many wrong keys from this address");
        return Err(Refused { response: refusal.header("Retry-After", "60"), late });
    }
    admin.ledger.failure(holder, per_minute, now.at);
    let refusal = problem(ErrorCode::InvalidToken, "this is not the admin key");
    let response = refusal.header("WWW-Authenticate", "Bearer error=\"invalid_token\"");
    Err(Refused { response, late })
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
