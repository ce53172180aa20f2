//! The built server as a test's own process, and clients for it that share no code with it.
//!
//! ```no_run
//! let upstream = Upstream::start();
//! upstream.set_json("/leads", r#"[{"id":1}]"#);
//! let server = Setup::new().server("heartbeat = \"1s\"").stream("leads", &upstream.url("/leads"), "").start();
//! let token = mint(json!({ "sub": "u1", "exp": now_s() + 60 }));
//! let mut ws = server.ws("/v1/streams/leads", &[bearer(&token)]);
//! assert_eq!(ws.next()["type"], "welcome");
//! assert_eq!(ws.next_of("snapshot")["data"], json!([{ "id": 1 }]));
//! ```
//!
//! Dropped, a server is killed and its directory removed. Whatever is waited for has [`PATIENCE`].

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use ring::hmac;
use rustix::process::{Pid, Signal, kill_process};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use serde_json::{Value, json};
use tungstenite::protocol::{Role, WebSocketConfig};
use tungstenite::{Message, WebSocket};

use super::Folder;

/// How long anything that is waited for may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// The secret of the key `k1`, which every [`Setup`] has unless told otherwise.
pub const SECRET: &str = "a secret of the tests: 32 bytes and some more";
/// The admin key of every [`Setup`].
pub const ADMIN_KEY: &str = "an-admin-key-of-the-tests-that-is-long";
/// The drivers that the most important tests run on.
pub const DRIVERS: [&str; 2] = ["io_uring", "epoll"];

// What the server is told.

/// A configuration in the making. Each method takes TOML lines of the table that it is named for.
#[derive(Clone, Debug)]
pub struct Setup {
    driver: String,
    cores: u16,
    server: String,
    admin: String,
    log: String,
    limits: String,
    auth: String,
    jwt: String,
    keys: String,
    redis: String,
    streams: String,
    file: Option<String>,
    environment: Vec<(String, String)>,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup::new()
    }
}

impl Setup {
    /// Two cores, ports chosen by the kernel, the key `k1`, an admin key, no stream.
    pub fn new() -> Setup {
        Setup {
            driver: "auto".into(),
            cores: 2,
            server: String::new(),
            admin: format!("key = {ADMIN_KEY:?}\n"),
            log: "level = \"trace\"\n".into(),
            limits: String::new(),
            auth: String::new(),
            jwt: String::new(),
            keys: key("k1", "HS256", SECRET),
            redis: String::new(),
            streams: String::new(),
            file: None,
            environment: Vec::new(),
        }
    }

    /// This text and nothing else; only [`env`](Setup::env) adds to it.
    pub fn of_file(text: &str) -> Setup {
        Setup { file: Some(text.to_owned()), ..Setup::new() }
    }

    /// `server.driver`: `io_uring`, `epoll` or `auto`.
    pub fn driver(mut self, driver: &str) -> Setup {
        self.driver = driver.into();
        self
    }

    /// `server.cores`.
    pub fn cores(mut self, cores: u16) -> Setup {
        self.cores = cores;
        self
    }

    /// Lines of `[server]`.
    pub fn server(mut self, lines: &str) -> Setup {
        push(&mut self.server, lines);
        self
    }

    /// Lines of `[admin]`, besides the key.
    pub fn admin(mut self, lines: &str) -> Setup {
        push(&mut self.admin, lines);
        self
    }

    /// All of `[admin]` but `listen`.
    pub fn only_admin(mut self, lines: &str) -> Setup {
        self.admin.clear();
        self.admin(lines)
    }

    /// All of `[log]`; `level = "trace"` unless set.
    pub fn log(mut self, lines: &str) -> Setup {
        self.log.clear();
        push(&mut self.log, lines);
        self
    }

    /// Lines of `[limits]`.
    pub fn limits(mut self, lines: &str) -> Setup {
        push(&mut self.limits, lines);
        self
    }

    /// Lines of `[auth]`.
    pub fn auth(mut self, lines: &str) -> Setup {
        push(&mut self.auth, lines);
        self
    }

    /// Lines of `[auth.jwt]`.
    pub fn jwt(mut self, lines: &str) -> Setup {
        push(&mut self.jwt, lines);
        self
    }

    /// One more `[[auth.jwt.key]]`.
    pub fn key(mut self, kid: &str, alg: &str, secret: &str) -> Setup {
        self.keys.push_str(&key(kid, alg, secret));
        self
    }

    /// One more `[[auth.jwt.jwks]]`, with these lines.
    pub fn key_set(mut self, issuer: &str, lines: &str) -> Setup {
        push(&mut self.keys, &format!("[[auth.jwt.jwks]]\nissuer = {issuer:?}\n{lines}"));
        self
    }

    /// One more `[[auth.jwt.key]]` with a public key: a file's path.
    pub fn public_key(mut self, kid: &str, alg: &str, path: &Path) -> Setup {
        let path = format!("file:{}", path.display());
        push(&mut self.keys, &format!("[[auth.jwt.key]]\nkid = {kid:?}\nalg = {alg:?}\npublic_key = {path:?}"));
        self
    }

    /// No key, until some are added.
    pub fn no_keys(mut self) -> Setup {
        self.keys.clear();
        self
    }

    /// `[redis]`: its URL, and further lines.
    pub fn redis(mut self, url: &str, lines: &str) -> Setup {
        self.redis = format!("[redis]\nurl = {url:?}\n");
        push(&mut self.redis, lines);
        self
    }

    /// One more `[[stream]]`; polled every 20 ms unless `lines` sets `interval`.
    pub fn stream(mut self, id: &str, url: &str, lines: &str) -> Setup {
        push(&mut self.streams, &format!("[[stream]]\nid = {id:?}\nurl = {url:?}"));
        if !lines.contains("interval =") {
            push(&mut self.streams, "interval = \"20ms\"");
        }
        push(&mut self.streams, lines);
        self
    }

    /// One more `[[action]]`.
    pub fn action(mut self, kind: &str, url: &str, lines: &str) -> Setup {
        push(&mut self.streams, &format!("[[action]]\ntype = {kind:?}\nurl = {url:?}\n{lines}"));
        self
    }

    /// `[direct]`, which lets callers name what is at this address, with further lines.
    pub fn direct(mut self, reached: SocketAddr, lines: &str) -> Setup {
        push(&mut self.streams, &format!("[direct]\nallow = [\"http://{reached}/*\"]\n{lines}"));
        self
    }

    /// No stream, until some are added.
    pub fn no_streams(mut self) -> Setup {
        self.streams.clear();
        self
    }

    /// A variable of the server's environment.
    pub fn env(mut self, name: &str, value: &str) -> Setup {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// The file's text.
    pub fn text(&self) -> String {
        if let Some(text) = &self.file {
            return text.clone();
        }
        let Setup { driver, cores, server, admin, log, limits, auth, jwt, keys, redis, streams, .. } = self;
        let listen = if server.contains("listen =") { "" } else { "listen = \"127.0.0.1:0\"\n" };
        format!(
            "[server]\n{listen}driver = {driver:?}\ncores = {cores}\n{server}[admin]\nlisten = \"127.0.0.1:0\"\n{admin}\
             [log]\n{log}[limits]\n{limits}[auth]\n{auth}[auth.jwt]\n{jwt}{keys}{redis}{streams}"
        )
    }

    /// Starts the server and waits until it is ready.
    pub fn start(&self) -> Server {
        Server::start(self, None)
    }

    /// The same, its working directory being another server's.
    pub fn start_in(&self, working_directory: &Path) -> Server {
        Server::start(self, Some(working_directory))
    }
}

fn push(table: &mut String, lines: &str) {
    table.push_str(lines);
    if !lines.ends_with('\n') {
        table.push('\n');
    }
}

fn key(kid: &str, alg: &str, secret: &str) -> String {
    format!("[[auth.jwt.key]]\nkid = {kid:?}\nalg = {alg:?}\nsecret = {secret:?}\n")
}

// Tokens, made without the server's code.

/// The seconds since the Unix epoch.
pub fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is right").as_secs()
}

/// The microseconds since the Unix epoch.
pub fn now_us() -> u64 {
    u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is right").as_micros()).expect("small")
}

/// A token of the key `k1` with these claims.
pub fn mint(claims: Value) -> String {
    mint_by(json!({ "alg": "HS256", "kid": "k1" }), SECRET, claims)
}

/// A token of subject `sub` that lasts ten minutes.
pub fn token_of(sub: &str) -> String {
    mint(json!({ "sub": sub, "exp": now_s() + 600 }))
}

/// A token with this header, signed by what its `alg` (`HS256` unless it says another) makes of `secret`.
pub fn mint_by(header: Value, secret: &str, claims: Value) -> String {
    let algorithm = match header["alg"].as_str() {
        Some("HS384") => hmac::HMAC_SHA384,
        Some("HS512") => hmac::HMAC_SHA512,
        _ => hmac::HMAC_SHA256,
    };
    let text = [header, claims].map(|part| URL_SAFE_NO_PAD.encode(part.to_string())).join(".");
    let signature = hmac::sign(&hmac::Key::new(algorithm, secret.as_bytes()), text.as_bytes());
    format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature))
}

/// The header that carries `token`.
pub fn bearer(token: &str) -> (&'static str, String) {
    ("Authorization", format!("Bearer {token}"))
}

// The process.

/// A server at work.
pub struct Server {
    child: Child,
    directory: Folder,
    log: Arc<Log>,
    /// Where it listens.
    pub listen: SocketAddr,
    /// Where its admin listener is.
    pub admin: SocketAddr,
    /// The ready line.
    pub ready: Value,
}

#[derive(Default)]
struct Log {
    lines: Mutex<Vec<String>>,
    grown: Condvar,
}

impl Log {
    fn lines(&self) -> MutexGuard<'_, Vec<String>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs `restcast` with `arguments` and the configuration `setup` to its end: its status, output and errors.
pub fn run(arguments: &[&str], setup: &Setup) -> (ExitStatus, String, String) {
    let directory = Folder::new("server");
    let path = directory.put("restcast.toml", &setup.text());
    let output = Command::new(env!("CARGO_BIN_EXE_restcast"))
        .args(arguments)
        .arg("--config")
        .arg(&path)
        .envs(setup.environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .output()
        .expect("the binary runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    (output.status, text(output.stdout), text(output.stderr))
}

/// Runs `restcast` with `arguments` and this input to its end: its exit code, output and errors.
pub fn restcast(arguments: &[&str], input: &str) -> (i32, String, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_restcast"))
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .env_remove("RESTCAST_TOKEN")
        .spawn()
        .expect("the binary starts");
    // A command that takes no input may have ended before it comes.
    let _ = child.stdin.take().expect("a pipe").write_all(input.as_bytes());
    told(child.wait_with_output().expect("it ends"))
}

/// What a command that has ended tells: its exit code, output and errors.
pub fn told(output: Output) -> (i32, String, String) {
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    (output.status.code().expect("it exits"), text(output.stdout), text(output.stderr))
}

impl Server {
    fn start(setup: &Setup, working_directory: Option<&Path>) -> Server {
        let directory = Folder::new("server");
        let path = directory.put("restcast.toml", &setup.text());
        let mut child = Command::new(env!("CARGO_BIN_EXE_restcast"))
            .args(["serve", "--config"])
            .arg(&path)
            .current_dir(working_directory.unwrap_or(&directory))
            .envs(setup.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let log = Arc::new(Log::default());
        let (out, err) = (child.stdout.take().expect("a pipe"), child.stderr.take().expect("a pipe"));
        thread::spawn({
            let log = Arc::clone(&log);
            move || {
                for line in BufReader::new(err).lines().map_while(Result::ok) {
                    log.lines().push(line);
                    log.grown.notify_all();
                }
            }
        });
        let (tell, told) = channel();
        thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                let _ = tell.send(line);
            }
        });
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        // From here on a failure ends the process with it.
        let mut server = Server { child, directory, log, listen: nowhere, admin: nowhere, ready: Value::Null };
        let line = told.recv_timeout(2 * PATIENCE).unwrap_or_else(|_| {
            panic!("no ready line; the log:\n{}\n{}", server.log_text(), setup.text());
        });
        server.ready = serde_json::from_str(&line).expect("the ready line is JSON");
        assert_eq!(server.ready["ready"], true, "{line}");
        server.listen = server.ready["listen"].as_str().expect("listen").parse().expect("an address");
        server.admin = server.ready["admin"].as_str().expect("admin").parse().expect("an address");
        server
    }

    /// Its own directory, where its configuration is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).expect("a process id");
        kill_process(pid, signal).expect("the process is there");
    }

    /// Whether it has ended, and how.
    pub fn exit_status(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("it is a child")
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        eventually("the process ends", || self.exit_status())
    }

    /// What it has written to standard error so far.
    pub fn log_text(&self) -> String {
        self.log.lines().join("\n")
    }

    /// How many lines of the log hold `text`.
    pub fn log_count(&self, text: &str) -> usize {
        self.log.lines().iter().filter(|line| line.contains(text)).count()
    }

    /// Waits until `count` lines of the log hold `text`; the last of them.
    pub fn wait_for_log(&self, text: &str, count: usize) -> String {
        let until = Instant::now() + PATIENCE;
        let mut lines = self.log.lines();
        loop {
            if let Some(line) = lines.iter().filter(|line| line.contains(text)).nth(count - 1) {
                return line.clone();
            }
            let left = until.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "the log never says {text:?}:\n{}", lines.join("\n"));
            lines = self.log.grown.wait_timeout(lines, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Puts `text` in the configuration's place and has it read again; waits until it has been taken or refused.
    pub fn reload_text(&self, text: &str) {
        let said = ["The configuration was read again.", "The configuration is not taken"];
        let count = |server: &Server| said.iter().map(|line| server.log_count(line)).sum::<usize>();
        let before = count(self);
        self.directory.put("restcast.toml", text);
        self.signal(Signal::HUP);
        eventually("the configuration is read again", || (count(self) > before).then_some(()));
    }

    /// The same with a setup.
    pub fn reload(&self, setup: &Setup) {
        self.reload_text(&setup.text());
    }

    /// A connection to the public listener.
    pub fn connect(&self) -> Raw {
        Raw::connect(self.listen)
    }

    /// One request of the public listener, on a connection of its own.
    pub fn request(&self, method: &str, path: &str, headers: &[(&str, String)], body: &str) -> Answer {
        self.connect().request(method, path, headers, body)
    }

    /// One GET of the public listener.
    pub fn get(&self, path: &str, headers: &[(&str, String)]) -> Answer {
        self.request("GET", path, headers, "")
    }

    /// One request of the admin listener; `key` is presented where there is one.
    pub fn admin(&self, method: &str, path: &str, key: Option<&str>) -> Answer {
        let headers: Vec<_> = key.map(bearer).into_iter().collect();
        Raw::connect(self.admin).request(method, path, &headers, "")
    }

    /// An order of the administrator's, at a path below `/admin/v1/`; no body where it is null.
    pub fn order(&self, method: &str, path: &str, body: &Value) -> Answer {
        self.order_with(method, path, &[], body)
    }

    /// The same with further header fields.
    pub fn order_with(&self, method: &str, path: &str, more: &[(&'static str, String)], body: &Value) -> Answer {
        let headers = [&[bearer(ADMIN_KEY)], more].concat();
        let body = if body.is_null() { String::new() } else { body.to_string() };
        Raw::connect(self.admin).request(method, &format!("/admin/v1/{path}"), &headers, &body)
    }

    /// `/metrics`.
    pub fn metrics(&self) -> String {
        let answer = self.admin("GET", "/metrics", None);
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.text()
    }

    /// The sum of the metric's samples whose name and labels hold all of `parts`; 0 where there is none.
    pub fn metric(&self, parts: &[&str]) -> f64 {
        let page = self.metrics();
        let lines = page.lines().filter(|line| !line.starts_with('#'));
        let matching = lines.filter(|line| parts.iter().all(|part| line.contains(part)));
        matching.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    /// A WebSocket, which must open.
    pub fn ws(&self, path: &str, headers: &[(&str, String)]) -> Ws {
        self.try_ws(path, headers).unwrap_or_else(|answer| panic!("{path} did not open: {answer:?}"))
    }

    /// A WebSocket, or why not.
    ///
    /// # Errors
    /// The answer, where it is not 101.
    pub fn try_ws(&self, path: &str, headers: &[(&str, String)]) -> Result<Ws, Answer> {
        let mut raw = self.connect();
        let upgrade = raw.upgrade(path, headers);
        if upgrade.status != 101 {
            return Err(upgrade);
        }
        Ok(Ws::over(raw, upgrade))
    }

    /// An event stream, which must open.
    pub fn sse(&self, path: &str, headers: &[(&str, String)]) -> Sse {
        self.connect().sse(path, headers)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("the server's log:\n{}", self.log_text());
        }
    }
}

/// Asks again and again until there is an answer.
pub fn eventually<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < until, "waited {PATIENCE:?}: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

// HTTP.

/// A connection, byte by byte.
pub struct Raw {
    stream: Link,
    peer: SocketAddr,
    buffer: Vec<u8>,
}

/// What bytes travel in.
pub enum Link {
    /// The socket.
    Plain(TcpStream),
    /// TLS over it.
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl Link {
    fn socket(&self) -> &TcpStream {
        match self {
            Link::Plain(socket) => socket,
            Link::Tls(stream) => &stream.sock,
        }
    }
}

impl Read for Link {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Link::Plain(socket) => socket.read(into),
            Link::Tls(stream) => stream.read(into),
        }
    }
}

impl Write for Link {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match self {
            Link::Plain(socket) => socket.write(bytes),
            Link::Tls(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        match self {
            Link::Plain(socket) => socket.flush(),
            Link::Tls(stream) => stream.flush(),
        }
    }
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Names in lower case, in order.
    pub headers: Vec<(String, String)>,
    /// Its body.
    pub body: Vec<u8>,
}

impl Answer {
    /// The value of a field (its name in lower case) that is there once.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut values = self.headers.iter().filter(|(n, _)| n == name).map(|(_, value)| value.as_str());
        values.next().filter(|_| values.next().is_none())
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).expect("UTF-8")
    }

    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The `code` of a problem document, whose form is checked.
    pub fn code(&self) -> String {
        assert_eq!(self.header("content-type"), Some("application/problem+json"), "{self:?}");
        let problem = self.json();
        assert_eq!(problem["status"], self.status, "{self:?}");
        problem["code"].as_str().expect("a code").to_owned()
    }
}

fn head(method: &str, path: &str, host: SocketAddr, headers: &[(&str, String)], body: &str) -> String {
    let mut text = format!("{method} {path} HTTP/1.1\r\n");
    if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
        text.push_str(&format!("Host: {host}\r\n"));
    }
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    if !body.is_empty() {
        text.push_str(&format!("Content-Length: {}\r\n", body.len()));
    }
    text.push_str("\r\n");
    text.push_str(body);
    text
}

/// The text of a WebSocket's request for `path`.
pub fn upgrade_request(path: &str, host: SocketAddr, headers: &[(&str, String)]) -> String {
    let mut all: Vec<(&str, String)> = vec![
        ("Upgrade", "websocket".into()),
        ("Connection", "Upgrade".into()),
        ("Sec-WebSocket-Key", STANDARD.encode(b"sixteen bytes...")),
        ("Sec-WebSocket-Version", "13".into()),
    ];
    all.extend(headers.iter().cloned());
    head("GET", path, host, &all, "")
}

impl Raw {
    /// A connection to that address.
    pub fn connect(peer: SocketAddr) -> Raw {
        let stream = TcpStream::connect(peer).expect("it accepts");
        stream.set_nodelay(true).expect("an option");
        stream.set_read_timeout(Some(Duration::from_millis(50))).expect("a timeout");
        stream.set_write_timeout(Some(PATIENCE)).expect("a timeout");
        Raw { stream: Link::Plain(stream), peer, buffer: Vec::new() }
    }

    /// The socket.
    pub fn socket(&self) -> &TcpStream {
        self.stream.socket()
    }

    /// The same over TLS, whose handshake is done with `name` and must succeed.
    pub fn secured(self, config: &Arc<ClientConfig>, name: &str) -> Raw {
        self.try_secured(config, name).unwrap_or_else(|error| panic!("no TLS: {error}"))
    }

    /// The same over TLS, or why not.
    ///
    /// # Errors
    /// The handshake's.
    pub fn try_secured(self, config: &Arc<ClientConfig>, name: &str) -> std::io::Result<Raw> {
        let Link::Plain(socket) = self.stream else { panic!("it is over TLS already") };
        let name = ServerName::try_from(name.to_owned()).expect("a name");
        let tls = ClientConnection::new(Arc::clone(config), name).expect("a client");
        let mut stream = Box::new(StreamOwned::new(tls, socket));
        let until = Instant::now() + PATIENCE;
        while stream.conn.is_handshaking() {
            let StreamOwned { conn, sock, .. } = &mut *stream;
            match conn.complete_io(sock) {
                Ok(_) => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    assert!(Instant::now() < until, "the handshake takes for ever");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Raw { stream: Link::Tls(stream), peer: self.peer, buffer: self.buffer })
    }

    /// The TLS it travels in.
    pub fn tls(&mut self) -> &mut ClientConnection {
        match &mut self.stream {
            Link::Tls(stream) => &mut stream.conn,
            Link::Plain(_) => panic!("it is in the clear"),
        }
    }

    /// A WebSocket over it, which must open.
    pub fn ws(mut self, path: &str, headers: &[(&str, String)]) -> Ws {
        let upgrade = self.upgrade(path, headers);
        assert_eq!(upgrade.status, 101, "{path} did not open: {upgrade:?}");
        Ws::over(self, upgrade)
    }

    /// An event stream over it, which must open.
    pub fn sse(mut self, path: &str, headers: &[(&str, String)]) -> Sse {
        let mut all = vec![("Accept", "text/event-stream".to_owned())];
        all.extend(headers.iter().cloned());
        let request = head("GET", path, self.peer, &all, "");
        self.send(request.as_bytes());
        let head = self.head();
        assert_eq!(head.status, 200, "{head:?}");
        assert_eq!(head.header("content-type"), Some("text/event-stream"));
        Sse { raw: self, head, comments: 0, retry: None }
    }

    /// Sends these bytes.
    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("the peer reads");
    }

    /// Sends these bytes, or fails because the peer has closed.
    ///
    /// # Errors
    /// The system's.
    pub fn try_send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Sends a request; its answer is read later.
    pub fn send_request(&mut self, method: &str, path: &str, headers: &[(&str, String)], body: &str) {
        self.send(head(method, path, self.peer, headers, body).as_bytes());
    }

    /// Sends a request and reads its answer.
    pub fn request(&mut self, method: &str, path: &str, headers: &[(&str, String)], body: &str) -> Answer {
        self.send(head(method, path, self.peer, headers, body).as_bytes());
        self.answer_to(method)
    }

    /// Asks for a WebSocket; the answer, whose body is read unless it is 101.
    pub fn upgrade(&mut self, path: &str, headers: &[(&str, String)]) -> Answer {
        self.send(upgrade_request(path, self.peer, headers).as_bytes());
        self.answer_to("GET")
    }

    /// Reads an answer to GET.
    pub fn answer(&mut self) -> Answer {
        self.answer_to("GET")
    }

    /// Reads an answer to a request of that method. Interim answers are passed over.
    pub fn answer_to(&mut self, method: &str) -> Answer {
        let mut answer = self.head();
        while answer.status == 100 {
            answer = self.head();
        }
        if method == "HEAD" || matches!(answer.status, 101 | 204 | 304) {
            return answer;
        }
        match answer.header("content-length") {
            Some(length) => {
                let length: usize = length.parse().expect("a length");
                while self.buffer.len() < length {
                    assert!(self.more(PATIENCE), "the body ended early: {answer:?}");
                }
                answer.body = self.buffer.drain(..length).collect();
            }
            None => answer.body = self.rest(),
        }
        answer
    }

    /// Reads a head.
    pub fn head(&mut self) -> Answer {
        let end = loop {
            if let Some(end) = self.buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break end;
            }
            assert!(self.more(PATIENCE), "no answer, but {:?}", String::from_utf8_lossy(&self.buffer));
        };
        let text: Vec<u8> = self.buffer.drain(..end + 4).collect();
        let text = String::from_utf8(text).expect("a head is text");
        let mut lines = text.trim_end().split("\r\n");
        let status = lines.next().and_then(|line| line.strip_prefix("HTTP/1.1 ")).expect("a status line");
        let headers = lines.map(|line| {
            let (name, value) = line.split_once(':').unwrap_or_else(|| panic!("{line:?} is no field"));
            (name.to_ascii_lowercase(), value.trim().to_owned())
        });
        let headers = headers.collect();
        Answer { status: status[..3].parse().expect("a status"), headers, body: Vec::new() }
    }

    /// Everything up to the peer's end of the connection.
    pub fn rest(&mut self) -> Vec<u8> {
        while self.more(PATIENCE) {}
        std::mem::take(&mut self.buffer)
    }

    /// Whether the peer ends the connection, without having sent anything more.
    pub fn is_closed(&mut self) -> bool {
        self.rest().is_empty()
    }

    /// Whether the peer ends its side of the connection, without a further byte; false where it resets it.
    pub fn ends_in_order(&mut self) -> bool {
        let until = Instant::now() + PATIENCE;
        loop {
            match self.stream.read(&mut [0]) {
                Ok(count) => return count == 0 && self.buffer.is_empty(),
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) =>
                {
                    assert!(Instant::now() < until, "waited {PATIENCE:?} for the peer");
                }
                Err(_) => return false,
            }
        }
    }

    /// Reads so many bytes.
    pub fn take(&mut self, count: usize) -> Vec<u8> {
        while self.buffer.len() < count {
            assert!(self.more(PATIENCE), "{count} bytes were awaited, {} came", self.buffer.len());
        }
        self.buffer.drain(..count).collect()
    }

    /// Whether anything comes within `patience`.
    pub fn hears_within(&mut self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        while self.buffer.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() || !self.more_until(until) {
                return !self.buffer.is_empty();
            }
        }
        true
    }

    /// One WebSocket frame of the server's: whether it is the last of its message, its opcode, its payload.
    pub fn frame(&mut self) -> (bool, u8, Vec<u8>) {
        let (first, payload) = self.frame_with_bits();
        assert_eq!(first & 0x70, 0, "reserved bits");
        (first & 0x80 != 0, first & 0x0f, payload)
    }

    /// One WebSocket frame of the server's: its first byte, with whatever bits are set, and its payload.
    pub fn frame_with_bits(&mut self) -> (u8, Vec<u8>) {
        let start = self.take(2);
        assert_eq!(start[1] & 0x80, 0, "a server does not mask");
        let length = match start[1] {
            126 => u64::from(u16::from_be_bytes(self.take(2).try_into().expect("two"))),
            127 => u64::from_be_bytes(self.take(8).try_into().expect("eight")),
            length => u64::from(length),
        };
        (start[0], self.take(usize::try_from(length).expect("it fits")))
    }

    /// The close frame that comes next, behind any other frames: its code and reason.
    pub fn close_frame(&mut self) -> (u16, String) {
        loop {
            let (first, payload) = self.frame_with_bits();
            if first & 0x0f == 8 {
                if payload.is_empty() {
                    return (1005, String::new());
                }
                let code = u16::from_be_bytes([payload[0], payload[1]]);
                return (code, String::from_utf8(payload[2..].to_vec()).expect("UTF-8"));
            }
        }
    }

    /// Reads more; false at the end of the connection.
    fn more(&mut self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        let before = self.buffer.len();
        let open = self.more_until(until);
        assert!(!open || self.buffer.len() > before, "waited {patience:?} for the peer");
        open
    }

    fn more_until(&mut self, until: Instant) -> bool {
        let mut chunk = [0u8; 16 << 10];
        loop {
            match self.stream.read(&mut chunk) {
                Ok(0) => return false,
                Ok(count) => {
                    self.buffer.extend_from_slice(&chunk[..count]);
                    return true;
                }
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    if Instant::now() >= until {
                        return true;
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
        }
    }
}

/// A frame of a client's: masked, whole unless `more` follows.
pub fn client_frame(more: bool, opcode: u8, payload: &[u8]) -> Vec<u8> {
    let mask = [0x12, 0x34, 0x56, 0x78];
    let mut out = vec![if more { opcode } else { 0x80 | opcode }];
    match payload.len() {
        length @ 0..=125 => out.push(0x80 | u8::try_from(length).expect("small")),
        length @ 126..=0xffff => {
            out.push(0x80 | 126);
            out.extend_from_slice(&u16::try_from(length).expect("small").to_be_bytes());
        }
        length => {
            out.push(0x80 | 127);
            out.extend_from_slice(&u64::try_from(length).expect("small").to_be_bytes());
        }
    }
    out.extend_from_slice(&mask);
    out.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    out
}

// WebSocket.

/// A WebSocket, spoken by `tungstenite`.
pub struct Ws {
    socket: WebSocket<Link>,
    /// The answer that opened it.
    pub upgrade: Answer,
}

/// What comes over a WebSocket.
#[derive(Clone, Debug, PartialEq)]
pub enum Heard {
    /// A frame of the protocol.
    Frame(Value),
    /// A ping.
    Ping,
    /// Another message.
    Other(Message),
    /// The server's close: code and reason.
    Close(u16, String),
    /// The end of the connection.
    End,
}

impl Ws {
    fn over(raw: Raw, upgrade: Answer) -> Ws {
        let config = WebSocketConfig::default().max_message_size(None).max_frame_size(None);
        let socket = WebSocket::from_partially_read(raw.stream, raw.buffer, Role::Client, Some(config));
        Ws { socket, upgrade }
    }

    /// The socket.
    pub fn socket(&self) -> &TcpStream {
        self.socket.get_ref().socket()
    }

    /// The TLS it travels in.
    pub fn tls(&mut self) -> &mut ClientConnection {
        match self.socket.get_mut() {
            Link::Tls(stream) => &mut stream.conn,
            Link::Plain(_) => panic!("it is in the clear"),
        }
    }

    /// Sends a frame of the protocol.
    pub fn send(&mut self, frame: Value) {
        self.send_message(Message::text(frame.to_string()));
    }

    /// Sends any message.
    pub fn send_message(&mut self, message: Message) {
        self.socket.send(message).expect("the server reads");
    }

    /// What comes next within `patience`; `None`: nothing.
    pub fn heard_within(&mut self, patience: Duration) -> Option<Heard> {
        let until = Instant::now() + patience;
        loop {
            match self.socket.read() {
                Ok(Message::Text(text)) => {
                    return Some(match serde_json::from_str(&text) {
                        Ok(frame) => Heard::Frame(frame),
                        Err(_) => Heard::Other(Message::Text(text)),
                    });
                }
                Ok(Message::Ping(_)) => {
                    let _ = self.socket.flush();
                    return Some(Heard::Ping);
                }
                Ok(Message::Close(frame)) => {
                    let _ = self.socket.flush();
                    return Some(match frame {
                        Some(frame) => Heard::Close(frame.code.into(), frame.reason.to_string()),
                        None => Heard::Close(1005, String::new()),
                    });
                }
                Ok(message) => return Some(Heard::Other(message)),
                Err(tungstenite::Error::Io(error))
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) =>
                {
                    if Instant::now() >= until {
                        return None;
                    }
                }
                Err(_) => return Some(Heard::End),
            }
        }
    }

    /// What comes next.
    pub fn heard(&mut self) -> Heard {
        self.heard_within(PATIENCE).expect("nothing came")
    }

    /// The next frame of the protocol; pings are passed over.
    pub fn next(&mut self) -> Value {
        let until = Instant::now() + PATIENCE;
        loop {
            match self.heard() {
                Heard::Frame(frame) => return frame,
                Heard::Ping => assert!(Instant::now() < until, "nothing came but pings"),
                other => panic!("a frame was awaited, not {other:?}"),
            }
        }
    }

    /// The next frame of that type; others are passed over.
    pub fn next_of(&mut self, kind: &str) -> Value {
        let until = Instant::now() + PATIENCE;
        loop {
            let frame = self.next();
            if frame["type"] == kind {
                return frame;
            }
            assert!(Instant::now() < until, "no {kind}, but {frame}");
        }
    }

    /// The server's close, code and reason; frames before it are passed over.
    pub fn closed(&mut self) -> (u16, String) {
        self.until_close().1
    }

    /// The frames up to the server's close, and that.
    pub fn until_close(&mut self) -> (Vec<Value>, (u16, String)) {
        let mut frames = Vec::new();
        let until = Instant::now() + 2 * PATIENCE;
        loop {
            match self.heard() {
                Heard::Frame(frame) => frames.push(frame),
                Heard::Close(code, reason) => return (frames, (code, reason)),
                Heard::End => panic!("it ended without a close frame, after {frames:?}"),
                _ => {}
            }
            assert!(Instant::now() < until, "no close");
        }
    }

    /// Whether nothing of the protocol comes for `time`; pings may.
    pub fn is_quiet_for(&mut self, time: Duration) -> bool {
        let until = Instant::now() + time;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            match self.heard_within(left) {
                None | Some(Heard::Ping) => {}
                Some(_) => return false,
            }
        }
    }
}

// Server-sent events.

/// An event stream.
pub struct Sse {
    raw: Raw,
    /// The answer's head.
    pub head: Answer,
    /// Comments so far.
    pub comments: usize,
    /// The last `retry:`.
    pub retry: Option<u64>,
}

/// One event.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// `event:`.
    pub kind: String,
    /// `id:`, where it has one.
    pub id: Option<String>,
    /// `data:`, parsed.
    pub data: Value,
}

impl Sse {
    /// The next event; `None` at the end of the body.
    pub fn next(&mut self) -> Option<Event> {
        let (mut kind, mut id, mut data) = (String::new(), None, String::new());
        loop {
            let line = self.line()?;
            if line.is_empty() {
                if data.is_empty() {
                    (kind, id) = (String::new(), None);
                    continue;
                }
                let data = serde_json::from_str(&data).unwrap_or_else(|error| panic!("{error}: {data}"));
                return Some(Event { kind, id, data });
            }
            match line.split_once(':').map(|(name, value)| (name, value.strip_prefix(' ').unwrap_or(value))) {
                Some(("", _)) => self.comments += 1,
                Some(("event", value)) => kind = value.to_owned(),
                Some(("id", value)) => id = Some(value.to_owned()),
                Some(("data", value)) => {
                    if !data.is_empty() {
                        data.push('\n');
                    }
                    data.push_str(value);
                }
                Some(("retry", value)) => self.retry = Some(value.parse().expect("milliseconds")),
                _ => panic!("{line:?} is no line of an event stream"),
            }
        }
    }

    /// The next event of that kind; others are passed over.
    pub fn next_of(&mut self, kind: &str) -> Event {
        let until = Instant::now() + PATIENCE;
        loop {
            let event = self.next().unwrap_or_else(|| panic!("the stream ended before {kind}"));
            if event.kind == kind {
                return event;
            }
            assert!(Instant::now() < until, "no {kind}, but {event:?}");
        }
    }

    /// Waits for one more comment.
    pub fn comment(&mut self) {
        let before = self.comments;
        while self.comments == before {
            let line = self.line().expect("the stream goes on");
            self.comments += usize::from(line.starts_with(':'));
        }
    }

    fn line(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.raw.buffer.iter().position(|&byte| byte == b'\n') {
                let mut line: Vec<u8> = self.raw.buffer.drain(..=end).collect();
                line.pop();
                return Some(String::from_utf8(line).expect("UTF-8"));
            }
            if !self.raw.more(PATIENCE) {
                assert!(self.raw.buffer.is_empty(), "the stream ends within a line");
                return None;
            }
        }
    }
}

/// A watcher that has its first value, or on `/v1/ws` its welcome.
pub fn watching(server: &Server, token: &str, path: &str) -> Ws {
    let mut ws = server.ws(path, &[bearer(token)]);
    ws.next_of(if path == "/v1/ws" { "welcome" } else { "snapshot" });
    ws
}

/// How a token is answered for the stream `leads`: the status, and the code of a refusal.
pub fn refused(server: &Server, token: &str) -> (u16, String) {
    outcome(&server.get("/v1/streams/leads", &[bearer(token)]))
}

/// The status of an answer, and its code where it is a problem.
pub fn outcome(answer: &Answer) -> (u16, String) {
    (answer.status, if answer.status >= 400 { answer.code() } else { String::new() })
}

/// What [`outcome`] says of an answer with this status and code.
pub fn is(status: u16, code: &str) -> (u16, String) {
    (status, code.to_owned())
}

/// An order about the streams that administrators make, at a path below theirs.
pub fn streams(server: &Server, method: &str, path: &str, body: &Value) -> Answer {
    streams_with(server, method, path, &[], body)
}

/// The same with further header fields.
pub fn streams_with(
    server: &Server,
    method: &str,
    path: &str,
    more: &[(&'static str, String)],
    body: &Value,
) -> Answer {
    server.order_with(method, &format!("streams{path}"), more, body)
}

/// An order about API keys, at a path below theirs, with whatever body.
pub fn keys(server: &Server, method: &str, path: &str, body: &str) -> Answer {
    let headers = [bearer(ADMIN_KEY), ("Content-Type", "application/json".to_owned())];
    Raw::connect(server.admin).request(method, &format!("/admin/v1/keys{path}"), &headers, body)
}

/// Waits until the server speaks to its Redis.
pub fn connected(server: &Server) {
    eventually("Redis is spoken to", || (server.admin("GET", "/readyz", None).json()["redis"] == "up").then_some(()));
}

/// Waits until the server says that its Redis is away.
pub fn away(server: &Server) {
    eventually("Redis is away", || (server.admin("GET", "/readyz", None).json()["redis"] == "away").then_some(()));
}
