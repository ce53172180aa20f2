//! A real `redis-server` as a test's own process, and a client for it that shares no code with the server under test.
//!
//! ```no_run
//! let mut redis = Redis::start();
//! redis.command(&["SET", "sess:a", "{}"]);
//! assert_eq!(redis.publish("user-logged-out", "u1"), 0);
//! redis.kill();
//! redis.restart();
//! assert_eq!(redis.text(&["GET", "sess:a"]).as_deref(), Some("{}"));
//! ```
//!
//! It listens on loopback alone, keeps what it is told on disk (so that a restart finds it), and is killed when dropped.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{process, thread};

use rustix::process::{Pid, Signal, kill_process};

use super::server::{PATIENCE, eventually};
use super::{Folder, Identity};

/// What a `redis-server` is told at its start.
#[derive(Clone, Debug, Default)]
pub struct RedisSetup {
    lines: Vec<String>,
    password: Option<String>,
    tls: Option<(String, String)>,
    database: u32,
}

impl RedisSetup {
    /// No password, no TLS.
    pub fn new() -> RedisSetup {
        RedisSetup::default()
    }

    /// `requirepass`: the default user's password.
    pub fn password(mut self, password: &str) -> RedisSetup {
        self.lines.push(format!("requirepass {password:?}"));
        self.password = Some(password.to_owned());
        self
    }

    /// An ACL user: its name, password and rules, such as `~* &* +@all`.
    pub fn user(mut self, name: &str, password: &str, rules: &str) -> RedisSetup {
        self.lines.push(format!("user {name:?} on {:?} {rules}", format!(">{password}")));
        self
    }

    /// A listener for TLS besides the plain one, which presents `identity`.
    pub fn tls(mut self, identity: &Identity) -> RedisSetup {
        self.tls = Some(identity.pem());
        self
    }

    /// The database that [`Redis::command`] and [`Redis::url`] speak of.
    pub fn database(mut self, database: u32) -> RedisSetup {
        self.database = database;
        self
    }

    /// A further line of its configuration.
    pub fn line(mut self, line: &str) -> RedisSetup {
        self.lines.push(line.to_owned());
        self
    }

    /// Starts it and waits until it answers.
    pub fn start(self) -> Redis {
        Redis::with(self)
    }
}

/// A reply.
#[derive(Clone, Debug, PartialEq)]
pub enum Said {
    Text(String),
    Integer(i64),
    Error(String),
    List(Vec<Said>),
    Nil,
}

/// A `redis-server` at work.
pub struct Redis {
    setup: RedisSetup,
    child: Option<Child>,
    directory: Folder,
    port: u16,
    tls_port: u16,
}

impl Redis {
    /// One with the defaults.
    pub fn start() -> Redis {
        Redis::with(RedisSetup::new())
    }

    fn with(setup: RedisSetup) -> Redis {
        let mut redis = Redis { setup, child: None, directory: Folder::new("redis"), port: 0, tls_port: 0 };
        for _ in 0..20 {
            redis.port = free_port();
            redis.tls_port = if redis.setup.tls.is_some() { free_port() } else { 0 };
            if redis.try_launch() {
                return redis;
            }
        }
        panic!("redis-server does not start:\n{}", redis.log_text());
    }

    /// Starts the process; whether it came up. Another process may have taken the port since it was found free.
    fn try_launch(&mut self) -> bool {
        let mut lines = vec![
            "bind 127.0.0.1".to_owned(),
            format!("port {}", self.port),
            format!("dir {:?}", self.directory.display().to_string()),
            "save \"\"".to_owned(),
            "appendonly yes".to_owned(),
            "appendfsync always".to_owned(),
            "daemonize no".to_owned(),
        ];
        if let Some((cert, key)) = &self.setup.tls {
            lines.push(format!("tls-port {}", self.tls_port));
            lines.push(format!("tls-cert-file {:?}", self.directory.put("cert.pem", cert)));
            lines.push(format!("tls-key-file {:?}", self.directory.put("key.pem", key)));
            lines.push("tls-auth-clients no".to_owned());
        }
        lines.extend(self.setup.lines.iter().cloned());
        let path = self.directory.put("redis.conf", &(lines.join("\n") + "\n"));
        let log = File::create(self.directory.join("log")).expect("a log");
        let child = Command::new("redis-server")
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a descriptor"))
            .stderr(log)
            .spawn()
            .expect("redis-server is installed: .ci/setup does it");
        self.child = Some(child);
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            let ended = self.child.as_mut().and_then(|child| child.try_wait().expect("it is a child"));
            if ended.is_some() {
                self.child = None;
                return false;
            }
            if self.is_ready() {
                return true;
            }
            thread::sleep(Duration::from_millis(5));
        }
        panic!("redis-server does not answer:\n{}", self.log_text());
    }

    fn is_ready(&self) -> bool {
        let Ok(mut client) = Client::connect(self.address()) else { return false };
        match client.command(&["PING"]) {
            Ok(Said::Error(text)) => text.starts_with("NOAUTH"),
            Ok(_) => true,
            Err(_) => false,
        }
    }

    /// What it has logged.
    pub fn log_text(&self) -> String {
        fs::read_to_string(self.directory.join("log")).unwrap_or_default()
    }

    /// All that it has written to its disk: every change that it was told to make.
    pub fn written(&self) -> String {
        let files = fs::read_dir(self.directory.join("appendonlydir")).into_iter().flatten().flatten();
        files
            .filter_map(|file| fs::read(file.path()).ok())
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .collect()
    }

    /// Where it listens in the clear.
    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// Where it listens for TLS.
    pub fn tls_address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.tls_port).into()
    }

    /// `redis://127.0.0.1:…/0`, without a credential.
    pub fn url(&self) -> String {
        self.url_at(self.address())
    }

    /// The same by way of a proxy at `address`.
    pub fn url_at(&self, address: SocketAddr) -> String {
        format!("redis://{address}/{}", self.setup.database)
    }

    /// One command, on a connection of its own, in the setup's database.
    pub fn command(&self, parts: &[&str]) -> Said {
        let mut client = self.client();
        client.command(parts).expect("Redis answers")
    }

    /// `SET` with a value that is no text.
    pub fn set_bytes(&self, key: &str, value: &[u8]) {
        let mut client = self.client();
        let head = format!("*3\r\n$3\r\nSET\r\n${}\r\n{key}\r\n${}\r\n", key.len(), value.len());
        let command = [head.as_bytes(), value, b"\r\n"].concat();
        client.socket.get_mut().write_all(&command).expect("Redis takes it");
        assert_eq!(client.reply().expect("an answer"), Said::Text("OK".into()));
    }

    /// The same where the reply is a text or nothing.
    pub fn text(&self, parts: &[&str]) -> Option<String> {
        match self.command(parts) {
            Said::Text(text) => Some(text),
            Said::Nil => None,
            other => panic!("{parts:?}: {other:?}"),
        }
    }

    /// The same where the reply is a number.
    pub fn number(&self, parts: &[&str]) -> i64 {
        match self.command(parts) {
            Said::Integer(number) => number,
            other => panic!("{parts:?}: {other:?}"),
        }
    }

    /// Publishes; how many heard it.
    pub fn publish(&self, channel: &str, payload: &str) -> i64 {
        self.number(&["PUBLISH", channel, payload])
    }

    /// Waits until `count` clients have subscribed to `channel`.
    pub fn wait_for_subscribers(&self, channel: &str, count: i64) {
        eventually("they subscribe", || match self.command(&["PUBSUB", "NUMSUB", channel]) {
            Said::List(list) => (list.get(1) == Some(&Said::Integer(count))).then_some(()),
            other => panic!("{other:?}"),
        });
    }

    /// A client that has logged in and chosen the setup's database.
    pub fn client(&self) -> Client {
        let mut client = Client::connect(self.address()).expect("Redis listens");
        if let Some(password) = &self.setup.password {
            assert_eq!(client.command(&["AUTH", password]).expect("an answer"), Said::Text("OK".into()));
        }
        if self.setup.database > 0 {
            client.command(&["SELECT", &self.setup.database.to_string()]).expect("an answer");
        }
        client
    }

    fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().expect("it runs");
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).expect("a process id");
        kill_process(pid, signal).expect("the process is there");
    }

    /// Has it end in order.
    pub fn stop(&mut self) {
        self.signal(Signal::TERM);
        self.child.take().expect("it runs").wait().expect("it is a child");
    }

    /// Ends it at once.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Stops it from doing anything, its sockets open.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// Starts it again on the same ports, with its data.
    pub fn restart(&mut self) {
        self.kill();
        eventually("Redis gets its port back", || self.try_launch().then_some(()));
    }

    /// The same without its data, which is what a replica that knew nothing yet is after a failover.
    pub fn restart_empty(&mut self) {
        self.kill();
        let _ = fs::remove_dir_all(self.directory.join("appendonlydir"));
        self.restart();
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.kill();
        if thread::panicking() {
            eprintln!("redis-server:\n{}", self.log_text());
        }
    }
}

/// A port that nobody listens on, out of those that the kernel does not give to others' outgoing connections. No other test
/// process gets it while this one runs.
pub fn free_port() -> u16 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    static TAKEN: Mutex<Vec<File>> = Mutex::new(Vec::new());
    let folder = std::env::temp_dir().join(format!("restcast-tests-ports-{}", rustix::process::getuid().as_raw()));
    fs::create_dir_all(&folder).expect("a folder");
    for _ in 0..12_000 {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        let seed = u64::from(process::id()).wrapping_mul(7919).wrapping_add(step * 31);
        let port = u16::try_from(20_000 + seed % 12_000).expect("it is small");
        let file = File::create(folder.join(port.to_string())).expect("a file");
        if file.try_lock().is_ok() && TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            TAKEN.lock().unwrap_or_else(PoisonError::into_inner).push(file);
            return port;
        }
    }
    panic!("no port is free");
}

/// A client that asks and waits.
pub struct Client {
    socket: BufReader<TcpStream>,
}

impl Client {
    fn connect(address: SocketAddr) -> io::Result<Client> {
        let socket = TcpStream::connect_timeout(&address, PATIENCE)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_nodelay(true)?;
        Ok(Client { socket: BufReader::new(socket) })
    }

    /// One command and its reply.
    ///
    /// # Errors
    /// The socket's.
    pub fn command(&mut self, parts: &[&str]) -> io::Result<Said> {
        let mut text = format!("*{}\r\n", parts.len());
        for part in parts {
            text.push_str(&format!("${}\r\n{part}\r\n", part.len()));
        }
        self.socket.get_mut().write_all(text.as_bytes())?;
        self.reply()
    }

    /// The next reply.
    ///
    /// # Errors
    /// The socket's.
    pub fn reply(&mut self) -> io::Result<Said> {
        let mut line = String::new();
        if self.socket.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let (kind, text) = line.trim_end().split_at(1);
        let number = || text.parse::<i64>().map_err(|_| io::Error::from(io::ErrorKind::InvalidData));
        match kind {
            "+" => Ok(Said::Text(text.to_owned())),
            "-" => Ok(Said::Error(text.to_owned())),
            ":" => Ok(Said::Integer(number()?)),
            "$" => match usize::try_from(number()?) {
                Err(_) => Ok(Said::Nil),
                Ok(length) => {
                    let mut bytes = vec![0; length + 2];
                    self.socket.read_exact(&mut bytes)?;
                    bytes.truncate(length);
                    Ok(Said::Text(String::from_utf8_lossy(&bytes).into_owned()))
                }
            },
            "*" => match usize::try_from(number()?) {
                Err(_) => Ok(Said::Nil),
                Ok(length) => (0..length).map(|_| self.reply()).collect::<io::Result<_>>().map(Said::List),
            },
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}
