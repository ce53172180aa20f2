//! The admin listener: metrics, readiness, and orders with the admin key.
//!
//! Source: protocol version 1, section 6. Memory: at most `CONNECTIONS_MAX` threads, one a connection, each with one
//! request. Errors: problem documents. Blocking threads of its own, so that a scrape never takes a turn of a core.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use crate::codec::http::{self, Authorization, BodyDecoder, BodyError, BodyLength, Head, Response};
use crate::codec::message::ErrorCode;
use crate::config::{AdminOptions, LogLevel};
use crate::limits;
use crate::metrics::{self, CoreMetrics};
use crate::secret::Secret;
use crate::time::{Instant, WallTime};

use super::api_keys::KeyStore;
use super::core::Process;
use super::redis::Store;
use super::{admin_keys, clock, log};

/// Connections served at once; further ones wait in the backlog.
const CONNECTIONS_MAX: usize = 16;
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
    /// When the process started.
    pub started: WallTime,
    /// Connections it takes at most.
    pub connections_max: u64,
    /// The API keys.
    pub keys: Arc<KeyStore>,
    /// Begins a drain.
    pub drain: Box<dyn Fn() + Send + Sync>,
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
fn serve(mut socket: TcpStream, admin: &Admin) {
    let mut buffer = Vec::new();
    let mut chunk = [0u8; 4096];
    let mut deadline = clock::now().at + EXCHANGE_TIMEOUT;
    loop {
        let parsed = http::parse_head(&buffer, limits::ADMIN_HEAD_BYTES_MAX);
        let (response, left, keep_alive) = match parsed {
            Ok(Some((head, used))) => {
                let behind = buffer.get(used..).unwrap_or_default();
                // A body is read for those who may send one; of others the connection ends after the answer instead.
                let (response, left) = match gate(admin, &head) {
                    Err(refusal) => (refusal, (head.body == BodyLength::None).then(|| behind.to_vec())),
                    Ok(()) => match read_body(&mut socket, &head, behind, deadline) {
                        Ok((body, left)) => (answer(admin, &head, &body), Some(left)),
                        Err(Some(refusal)) => (refusal, None),
                        Err(None) => return,
                    },
                };
                let keep_alive = head.keep_alive && left.is_some();
                (response.head_only(head.method == "HEAD"), left.unwrap_or_default(), keep_alive)
            }
            Err(error) => {
                let code = ErrorCode::BadRequest.as_str();
                (Response::problem(error.status(), code, &error.to_string()), Vec::new(), false)
            }
            Ok(None) => {
                let left = deadline.since(clock::now().at);
                if left.is_zero() || socket.set_read_timeout(Some(left)).is_err() {
                    return;
                }
                match socket.read(&mut chunk) {
                    Ok(count @ 1..) => buffer.extend_from_slice(chunk.get(..count).unwrap_or_default()),
                    _ => return,
                }
                continue;
            }
        };
        let mut out = Vec::new();
        response
            .header("Date", &http::http_date(super::clock::now().wall))
            .header("X-Content-Type-Options", "nosniff")
            .header("Cache-Control", "no-store")
            .close(!keep_alive)
            .write(&mut out);
        let sent = socket.set_write_timeout(Some(EXCHANGE_TIMEOUT)).and_then(|()| socket.write_all(&out));
        if sent.is_err() || !keep_alive {
            // What is still to come is read, so that closing does not reset the answer away.
            let _ = socket.shutdown(std::net::Shutdown::Write);
            let _ = socket.set_read_timeout(Some(Duration::from_millis(200)));
            while matches!(socket.read(&mut chunk), Ok(1..)) && clock::now().at < deadline {}
            return;
        }
        buffer = left;
        deadline = clock::now().at + EXCHANGE_TIMEOUT;
    }
}

/// Reads a request's body: that, and what has come behind it. `behind`: what has come behind the head.
///
/// # Errors
/// How to answer; `None`: the peer is gone, or too slow.
fn read_body(
    socket: &mut TcpStream,
    head: &Head<'_>,
    behind: &[u8],
    deadline: Instant,
) -> Result<(Vec<u8>, Vec<u8>), Option<Response>> {
    let mut behind = behind.to_vec();
    if head.body == BodyLength::None {
        return Ok((Vec::new(), behind));
    }
    let refused = |error: BodyError| {
        let code = if error.status() == 413 { ErrorCode::TooLarge } else { ErrorCode::BadRequest };
        Some(Response::problem(error.status(), code.as_str(), &error.to_string()))
    };
    let mut decoder = BodyDecoder::new(head.body).map_err(refused)?;
    if head.expects_continue() {
        let told = socket.set_write_timeout(Some(EXCHANGE_TIMEOUT)).and_then(|()| socket.write_all(http::CONTINUE));
        told.map_err(|_| None)?;
    }
    let mut body = Vec::new();
    let mut chunk = [0u8; 4096];
    loop {
        let (used, whole) = decoder.feed(&behind, &mut body).map_err(refused)?;
        behind.drain(..used);
        if whole {
            return Ok((body, behind));
        }
        let left = deadline.since(clock::now().at);
        if left.is_zero() || socket.set_read_timeout(Some(left)).is_err() {
            return Err(None);
        }
        match socket.read(&mut chunk) {
            Ok(count @ 1..) => behind.extend_from_slice(chunk.get(..count).unwrap_or_default()),
            _ => return Err(None),
        }
    }
}

/// Whether a request is one to be carried out: before its body is read.
///
/// # Errors
/// How it is refused.
fn gate(admin: &Admin, head: &Head<'_>) -> Result<(), Response> {
    let options = admin.options.read().unwrap_or_else(PoisonError::into_inner).clone();
    // A browser that was led here by a name of its page's choice (DNS rebinding) says that name.
    if !host_allowed(head.host, &options, admin.listen) {
        return Err(problem(ErrorCode::Forbidden, "the Host is not this listener's address or one of admin.names"));
    }
    if head.path.starts_with("/admin/v1/") { authorised(&options, head) } else { Ok(()) }
}

/// Carries out a request that has passed the gate.
fn answer(admin: &Admin, head: &Head<'_>, body: &[u8]) -> Response {
    match head.path {
        "/metrics" => reading(head, || {
            let process = metrics::Process {
                started: admin.started,
                connections_max: admin.connections_max,
                draining: admin.process.draining.load(Ordering::Relaxed),
                store: admin.process.store.as_ref().map(Store::metrics),
            };
            Response::new(200).body(metrics::CONTENT_TYPE, metrics::render(&admin.metrics, &process).into_bytes())
        }),
        "/readyz" => reading(head, || {
            if admin.process.draining.load(Ordering::Relaxed) {
                return Response::new(503)
                    .header("Retry-After", "10")
                    .body("application/json", &b"{\"status\":\"draining\"}\n"[..]);
            }
            let redis = match admin.process.store.as_ref().map(Store::is_up) {
                None => "",
                Some(true) => ",\"redis\":\"up\"",
                Some(false) => ",\"redis\":\"away\"",
            };
            Response::new(200).body("application/json", format!("{{\"status\":\"ready\"{redis}}}\n").into_bytes())
        }),
        "/admin/v1/drain" if head.method == "POST" => {
            log::write(LogLevel::Info, &[("by", &"admin")], "A drain was asked for.");
            (admin.drain)();
            Response::new(202).body("application/json", &b"{\"status\":\"draining\"}\n"[..])
        }
        "/admin/v1/drain" => not_allowed("POST"),
        path if path.starts_with("/admin/v1/keys") => admin_keys::answer(&admin.keys, head, body)
            .unwrap_or_else(|| problem(ErrorCode::NotFound, "there is no such resource")),
        _ => problem(ErrorCode::NotFound, "there is no such resource"),
    }
}

fn reading(head: &Head<'_>, respond: impl FnOnce() -> Response) -> Response {
    if matches!(head.method, "GET" | "HEAD") { respond() } else { not_allowed("GET, HEAD") }
}

fn not_allowed(allow: &str) -> Response {
    problem(ErrorCode::MethodNotAllowed, &format!("this resource knows {allow}")).header("Allow", allow)
}

fn problem(code: ErrorCode, detail: &str) -> Response {
    Response::problem(code.http_status(), code.as_str(), detail)
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
