//! One shard without sockets and clocks, for benches: connections that take whatever they are sent and count it.
//!
//! What happens in it is fixed: its time, its keys and its random numbers are those written here.

#![allow(dead_code, reason = "each bench uses a part of it")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use restcast::auth::jwt;
use restcast::auth::keys::{Algorithm, Key, KeyConfig};
use restcast::config::{Config, FileError, Sources};
use restcast::ids::CoreId;
use restcast::metrics::CoreMetrics;
use restcast::secret::Secret;
use restcast::shard::{Catalog, Input, Ledger, Options, Output, Sent, Shard, Wire};
use restcast::stream::poll::{FetchResponse, PollNo, Validators};
use restcast::time::{Instant, Now, WallTime};

const SECRET: &str = "a secret of the benches, of 32 bytes or more";
/// Credentials end on the wall clock, which starts here.
const WALL_S: u64 = 1_800_000_000;
/// Heartbeats are rare, so that they disturb nothing that is measured.
const CONFIG: &str = r#"
[server]
heartbeat = "30m"
[limits]
connections = 100000
[auth.jwt]
[[auth.jwt.key]]
alg = "HS256"
secret = "a secret of the benches, of 32 bytes or more"
[[stream]]
id = "leads"
url = "http://upstream.example/leads"
interval = "1s"
"#;

/// What its connections were sent.
#[derive(Debug, Default)]
pub struct Counted {
    /// How often.
    pub sends: u64,
    /// How much.
    pub bytes: u64,
}

impl Wire for Counted {
    fn send(&mut self, _connection: u32, bytes: &[u8]) -> Sent {
        self.sends += 1;
        self.bytes += bytes.len() as u64;
        Sent::Bytes(bytes.len())
    }
}

/// The shard and what is around it.
pub struct Hall {
    shard: Shard,
    now: Now,
    key: Key,
    /// The poll that waits for its answer.
    asked: Option<(u32, PollNo)>,
    /// What was sent so far.
    pub sent: Counted,
}

struct NoSources;

impl Sources for NoSources {
    fn env(&self, _name: &str) -> Option<Vec<u8>> {
        None
    }

    fn file(&self, _path: &str, _bytes_max: usize) -> Result<Vec<u8>, FileError> {
        Err(FileError::Missing)
    }
}

/// The key of the one secret.
pub fn key() -> Key {
    Key::new(&KeyConfig { kid: None, algorithm: Algorithm::Hs256, secret: Secret::new(SECRET) }).expect("a long secret")
}

/// What the hall is configured with.
pub fn options() -> Options {
    let (config, _) = Config::parse(CONFIG, &NoSources).expect("a valid configuration");
    Options {
        connection: config.connection.clone(),
        auth: config.auth.clone(),
        limits: config.limits.clone(),
        catalog: Catalog::new(&config.streams, None, 7),
    }
}

/// The time at which everything begins.
pub fn start() -> Now {
    Now { at: Instant::from_micros(1_000_000), wall: WallTime::from_micros(WALL_S * 1_000_000) }
}

/// A token as an identity provider makes them, good for an hour.
pub fn token(key: &Key, no: u64) -> String {
    let (iat, exp) = (WALL_S, WALL_S + 3_600);
    jwt::mint(
        key,
        &format!(
            r#"{{"sub":"user-{no:08}","jti":"{no:032x}","iat":{iat},"exp":{exp},"role":"agent","companyId":"c-4711","permissions":["leads.read","leads.write"]}}"#
        ),
    )
}

/// What Chromium sends to open a WebSocket on `leads`; every browser offers compression.
pub fn upgrade(token: &str) -> Vec<u8> {
    upgrade_with(token, "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n")
}

/// The same from a client that offers none.
pub fn plain_upgrade(token: &str) -> Vec<u8> {
    upgrade_with(token, "")
}

fn upgrade_with(token: &str, extensions: &str) -> Vec<u8> {
    format!(
        "GET /v1/streams/leads?format=patch HTTP/1.1\r\n\
         Host: live.example.com\r\n\
         Connection: Upgrade\r\n\
         Pragma: no-cache\r\n\
         Cache-Control: no-cache\r\n\
         User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/142.0.0.0 Safari/537.36\r\n\
         Upgrade: websocket\r\n\
         Origin: https://live.example.com\r\n\
         Sec-WebSocket-Version: 13\r\n\
         Accept-Encoding: gzip, deflate, br, zstd\r\n\
         Accept-Language: en-GB,en;q=0.9,de;q=0.8\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
         {extensions}\
         Sec-WebSocket-Protocol: restcast.v1, jwt, {token}\r\n\r\n"
    )
    .into_bytes()
}

impl Hall {
    /// A hall whose stream has no value yet.
    pub fn new() -> Hall {
        let (ledger, metrics) = (Arc::new(Ledger::default()), Arc::new(CoreMetrics::default()));
        let shard = Shard::new(CoreId(0), 1, Arc::new(options()), ledger, metrics, [7; 32], start());
        Hall { shard, now: start(), key: key(), asked: None, sent: Counted::default() }
    }

    /// A token that the hall takes.
    pub fn token(&self, no: u64) -> String {
        token(&self.key, no)
    }

    /// Opens a connection by the bytes of its request, which are overwritten; its place.
    pub fn open(&mut self, request: &mut [u8]) -> u32 {
        let peer: SocketAddr = "192.0.2.1:4711".parse().expect("an address");
        let connection = self.shard.accept(self.now, peer).expect("there is room").index;
        self.handle(Input::Received { connection, bytes: request });
        self.transmit();
        connection
    }

    /// The connection's peer is gone.
    pub fn lose(&mut self, connection: u32) {
        self.handle(Input::Lost { connection });
    }

    /// Time goes on until the stream is polled, and the poll brings `body`.
    pub fn poll(&mut self, body: Vec<u8>) {
        let (stream, poll) = loop {
            if let Some(asked) = self.asked.take() {
                break asked;
            }
            self.pass();
        };
        let received = self.now.wall;
        let validators = Validators::default();
        let response = FetchResponse { status: 200, validators, retry_after: None, body, received };
        self.handle(Input::Fetched { stream, poll, result: Ok(response) });
    }

    /// Sends what there is to send, in as many turns as it takes.
    pub fn deliver(&mut self) {
        // Sweeps are a tick apart.
        self.advance(Duration::from_millis(10));
        self.transmit();
    }

    /// How many connections there are.
    pub fn connections(&self) -> usize {
        self.shard.connections()
    }

    fn transmit(&mut self) {
        while self.shard.transmit(self.now, &mut self.sent) {}
        self.outputs();
    }

    /// Goes on to the next thing that is due.
    fn pass(&mut self) {
        let next = self.shard.next_timeout().expect("a stream that is watched is polled");
        self.advance(next.since(self.now.at).max(Duration::from_micros(1)));
        self.handle(Input::Timeout);
        self.transmit();
    }

    fn advance(&mut self, by: Duration) {
        self.now = Now { at: self.now.at + by, wall: self.now.wall + by };
    }

    fn handle(&mut self, input: Input<'_>) {
        self.shard.handle(self.now, input);
        self.outputs();
    }

    fn outputs(&mut self) {
        while let Some(output) = self.shard.poll_output() {
            if let Output::Fetch { stream, poll, .. } = output {
                self.asked = Some((stream, poll));
            }
        }
    }
}
