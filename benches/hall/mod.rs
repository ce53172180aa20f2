//! One shard without sockets and clocks, for benches: connections that take whatever they are sent and count it.
//!
//! What happens in it is fixed: its time, its keys and its random numbers are those written here.

#![allow(dead_code, reason = "each bench uses a part of it")]

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use restcast::auth::jwt;
use restcast::auth::keys::{Algorithm, Key, KeyConfig};
use restcast::codec::ws::{Opcode, write_masked};
use restcast::config::{Config, FileError, Sources};
use restcast::ids::CoreId;
use restcast::metrics::CoreMetrics;
use restcast::secret::Secret;
use restcast::shard::{Catalog, Input, Ledger, Options, Output, Sent, Shard, Wire};
use restcast::stream::budget::PollLeave;
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
"#;
/// The stream that `upgrade` asks for.
const LEADS: &str = "leads";

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
    /// The polls that wait for their answers, each of another stream.
    asked: VecDeque<(u32, PollNo, PollLeave)>,
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

/// What the hall with one stream is configured with.
pub fn options() -> Options {
    options_of(&[LEADS])
}

fn options_of(streams: &[&str]) -> Options {
    let mut text = CONFIG.to_owned();
    for id in streams {
        text.push_str(&format!(
            "[[stream]]\nid = \"{id}\"\nurl = \"http://upstream.example/{id}\"\ninterval = \"1s\"\n"
        ));
    }
    let (config, _) = Config::parse(&text, &NoSources).expect("a valid configuration");
    let mut connection = config.connection.clone();
    // A bench runs through hours of its own time, and nobody there answers a ping.
    connection.heartbeat = Duration::from_secs(30 * 86_400);
    Options {
        connection,
        auth: config.auth.clone(),
        limits: config.limits.clone(),
        catalog: Catalog::new(&config.streams, None, 7),
    }
}

/// The time at which everything begins.
pub fn start() -> Now {
    Now { at: Instant::from_micros(1_000_000), wall: WallTime::from_micros(WALL_S * 1_000_000) }
}

/// A token as an identity provider makes them, good for a month: longer than any bench runs by its own time.
pub fn token(key: &Key, no: u64) -> String {
    let (iat, exp) = (WALL_S, WALL_S + 30 * 86_400);
    jwt::mint(
        key,
        &format!(
            r#"{{"sub":"user-{no:08}","jti":"{no:032x}","iat":{iat},"exp":{exp},"role":"agent","companyId":"c-4711","permissions":["leads.read","leads.write"]}}"#
        ),
    )
}

/// What Chromium sends to open a WebSocket on `leads`; every browser offers compression.
pub fn upgrade(token: &str) -> Vec<u8> {
    let extensions = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n";
    upgrade_with("/v1/streams/leads?format=patch", token, extensions)
}

/// The same from a client that offers none.
pub fn plain_upgrade(token: &str) -> Vec<u8> {
    upgrade_with("/v1/streams/leads?format=patch", token, "")
}

/// The same for a connection that says itself what it subscribes to: see [`Hall::open_on`].
fn multiplex_upgrade(token: &str) -> Vec<u8> {
    upgrade_with("/v1/ws", token, "")
}

fn upgrade_with(path: &str, token: &str, extensions: &str) -> Vec<u8> {
    format!(
        "GET {path} HTTP/1.1\r\n\
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
    /// A hall whose one stream, `leads`, has no value yet.
    pub fn new() -> Hall {
        Hall::with_streams(&[LEADS])
    }

    /// A hall with streams of these names, which have no values yet.
    pub fn with_streams(streams: &[&str]) -> Hall {
        let (ledger, metrics) = (Arc::new(Ledger::default()), Arc::new(CoreMetrics::default()));
        let shard = Shard::new(CoreId(0), 1, Arc::new(options_of(streams)), ledger, metrics, [7; 32], start());
        Hall { shard, now: start(), key: key(), asked: VecDeque::new(), sent: Counted::default() }
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

    /// Opens a connection that subscribes to patches of all these streams; its place.
    pub fn open_on(&mut self, streams: &[&str], no: u64) -> u32 {
        let connection = self.open(&mut multiplex_upgrade(&self.token(no)));
        for stream in streams {
            let mut frame = Vec::new();
            let text = format!(r#"{{"type":"subscribe","stream":"{stream}","format":"patch"}}"#);
            write_masked(&mut frame, true, Opcode::Text, text.as_bytes(), [0x37, 0xfa, 0x21, 0x3d]);
            self.handle(Input::Received { connection, bytes: &mut frame });
        }
        self.transmit();
        connection
    }

    /// The connection's peer is gone.
    pub fn lose(&mut self, connection: u32) {
        self.handle(Input::Lost { connection });
    }

    /// Time goes on until the stream is polled, and the poll brings `body`.
    pub fn poll(&mut self, body: Vec<u8>) {
        self.poll_each([body]);
    }

    /// Time goes on until so many streams have been polled, and all polls are answered in one moment.
    pub fn poll_each<const N: usize>(&mut self, bodies: [Vec<u8>; N]) {
        while self.asked.len() < N {
            self.pass();
        }
        let received = self.now.wall;
        for body in bodies {
            let (stream, poll, leave) = self.asked.pop_front().expect("as many as there are bodies");
            let validators = Validators::default();
            let response =
                FetchResponse { status: 200, validators, retry_after: None, fresh_for: None, body, received };
            leave.answered(self.now.at, &response);
            self.handle(Input::Fetched { stream, poll, result: Ok(response) });
        }
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
            if let Output::Fetch { stream, poll, leave, .. } = output {
                self.asked.push_back((stream, poll, leave));
            }
        }
    }
}
