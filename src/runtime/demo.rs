//! What `restcast demo` needs besides the server: a sample upstream to poll, a configuration and a greeting.
//!
//! The upstream is a REST server of its own on a loopback port, polled over HTTP like any other: `GET /prices` is a
//! ticking price board (an array of objects, with `ETag`), `GET /leads` a slowly changing list under `items` beside
//! members that differ in every answer (`generated_at`, `request_id`), as real APIs have them.
//!
//! Source: RFC 9112 for the little HTTP it speaks, over `httparse`.
//! Memory: two rendered bodies, one thread for each of at most `CONNECTIONS_MAX` connections, `HEAD_BYTES_MAX` each.
//! Errors: `start` fails as binding and starting threads do; a client's faults are answered and its connection closed.
//! Not here: the server itself, minting the demo token, reading the clock (an argument).

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::auth::jwt::mint;
use crate::auth::keys::{Algorithm, Key, KeyConfig, KeyError};
use crate::secret::Secret;
use crate::time::WallTime;

use super::clock;

/// Connections served at once; one more is answered 503.
const CONNECTIONS_MAX: usize = 64;
/// Of one request; more is answered 431.
const HEAD_BYTES_MAX: usize = 8 * 1024;
/// Of one request; more is answered 431.
const HEADERS_MAX: usize = 48;
/// A connection without a request for this long is closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// A peer that takes nothing for this long is given up.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// Between two moves of the price board.
const TICK: Duration = Duration::from_millis(300);
/// Moves of the price board to one event among the leads: about one in 2.4 s.
const TICKS_PER_LEAD_EVENT: u64 = 8;
/// After a failed accept (descriptors may be short), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// What a connection's thread needs: its buffers are on the heap.
const THREAD_STACK_BYTES: usize = 128 * 1024;
/// The same board every time: a demo that is shown twice looks the same.
const SEED: u64 = 0x005e_ed0f_7e57_ca57;
/// Leads in the list.
const LEADS: usize = 10;

/// The sample upstream. It serves until the process ends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SampleUpstream {
    /// Where it listens: 127.0.0.1 and a port the kernel chose.
    pub addr: SocketAddr,
}

/// Starts the sample upstream on threads of its own. `clock` fills `generated_at`.
pub fn start(clock: fn() -> WallTime) -> io::Result<SampleUpstream> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let addr = listener.local_addr()?;
    let mut market = Market::seeded(SEED);
    let published = Arc::new(Published::new(market.bodies(), clock));

    let board = Arc::clone(&published);
    thread::Builder::new().name("demo-market".into()).spawn(move || {
        loop {
            clock::hold_thread(TICK);
            market.tick();
            board.publish(market.bodies());
        }
    })?;
    thread::Builder::new().name("demo-upstream".into()).spawn(move || accept_all(&listener, &published))?;
    Ok(SampleUpstream { addr })
}

/// The configuration `restcast demo` runs under, as TOML: two streams over the sample upstream and one HS256 key.
/// `secret` is the key's text, at least 32 bytes, without a prefix that the configuration would resolve (`env:` …).
pub fn demo_config(upstream: SocketAddr, listen: SocketAddr, admin: SocketAddr, secret: &str) -> String {
    // A JSON string is a TOML basic string too.
    let secret = serde_json::Value::from(secret);
    format!(
        r#"[server]
listen = "{listen}"
playground = true

[admin]
listen = "{admin}"

[[auth.jwt.key]]
kid = "demo"
alg = "HS256"
secret = {secret}

[[stream]]
id = "prices"
url = "http://{upstream}/prices"
interval = "250ms"
array_key = "symbol"

[[stream]]
id = "leads"
url = "http://{upstream}/leads"
interval = "1s"
array_key = "id"
ignore = ["/generated_at", "/request_id"]
"#
    )
}

/// A token for the demo's streams, good for an hour.
///
/// # Errors
/// Where `secret` is no key.
pub fn token(secret: &str, now: WallTime) -> Result<String, KeyError> {
    let key =
        KeyConfig { kid: Some("demo".into()), algorithm: Algorithm::Hs256, secret: Secret::new(secret.as_bytes()) };
    let (iat, exp) = (now.as_secs(), now.as_secs() + 3600);
    let claims = format!(r#"{{"sub":"demo","iat":{iat},"exp":{exp}}}"#);
    Ok(mint(&Key::new(&key)?, &claims))
}

/// What a person reads once the demo is ready; it belongs on standard error, since standard output holds the ready line
/// alone. It shows the demo's token and secret, as the ready line does: handing them out is what the demo is for.
pub fn greeting(listen: SocketAddr, upstream: SocketAddr, token: &str, secret: &str) -> String {
    let secret: String = url::form_urlencoded::byte_serialize(secret.as_bytes()).collect();
    format!(
        r#"
  restcast demo: one poller, every watcher.

  Playground   http://{listen}/#stream=prices&token={token}&secret={secret}

  Token        TOKEN={token}
  SSE          curl -N -H 'Accept: text/event-stream' -H "Authorization: Bearer $TOKEN" http://{listen}/v1/streams/prices
  WebSocket    websocat --protocol restcast.v1 -H="Authorization: Bearer $TOKEN" ws://{listen}/v1/streams/leads
  Upstream     curl http://{upstream}/prices

  The streams are `prices` and `leads`. The signing key stands in the playground's link: demo only. Ctrl-C ends it.

"#
    )
}

/// What the two resources answer at present.
struct Published {
    bodies: Mutex<Bodies>,
    requests: AtomicU64,
    connections: AtomicUsize,
    clock: fn() -> WallTime,
}

#[derive(Clone)]
struct Bodies {
    tick: u64,
    prices: Arc<str>,
    lead_items: Arc<str>,
}

impl Published {
    fn new(bodies: Bodies, clock: fn() -> WallTime) -> Published {
        Published { bodies: Mutex::new(bodies), requests: AtomicU64::new(0), connections: AtomicUsize::new(0), clock }
    }

    fn publish(&self, bodies: Bodies) {
        *self.bodies.lock().unwrap_or_else(PoisonError::into_inner) = bodies;
    }

    fn bodies(&self) -> Bodies {
        self.bodies.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// One of the `CONNECTIONS_MAX` places; it is free again when this is dropped.
struct Place(Arc<Published>);

impl Place {
    fn take(published: &Arc<Published>) -> Option<Place> {
        published
            .connections
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |taken| (taken < CONNECTIONS_MAX).then_some(taken + 1))
            .ok()?;
        Some(Place(Arc::clone(published)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.connections.fetch_sub(1, Ordering::AcqRel);
    }
}

fn accept_all(listener: &TcpListener, published: &Arc<Published>) {
    loop {
        let Ok((mut socket, _)) = listener.accept() else {
            clock::hold_thread(ACCEPT_PAUSE);
            continue;
        };
        let Some(place) = Place::take(published) else {
            let _ = socket.set_write_timeout(Some(ACCEPT_PAUSE));
            let _ = socket.write_all(&Answer::closing(503).bytes(false));
            continue;
        };
        // Where no thread can be had the socket is dropped with the closure: the poller sees a reset and backs off.
        let _ = thread::Builder::new()
            .name("demo-connection".into())
            .stack_size(THREAD_STACK_BYTES)
            .spawn(move || serve(socket, &place));
    }
}

/// Answers a connection's requests, in order, until either side is done. Faults of the socket end it silently.
fn serve(mut socket: TcpStream, place: &Place) {
    let timeouts = socket.set_read_timeout(Some(IDLE_TIMEOUT)).and(socket.set_write_timeout(Some(WRITE_TIMEOUT)));
    if timeouts.and(socket.set_nodelay(true)).is_err() {
        return;
    }
    let mut held = Vec::with_capacity(1024);
    let mut piece = [0u8; 2048];
    loop {
        match Request::parse(&held) {
            Ok(Some((request, taken))) => {
                let answer = Answer::to(&request, &place.0);
                let is_sent = socket.write_all(&answer.bytes(request.is_head)).is_ok();
                if !is_sent || answer.closes {
                    return;
                }
                held.drain(..taken);
            }
            Ok(None) => match socket.read(&mut piece) {
                Ok(0) | Err(_) => return,
                Ok(n) => held.extend(piece.iter().take(n)),
            },
            Err(status) => {
                let _ = socket.write_all(&Answer::closing(status).bytes(false));
                return;
            }
        }
    }
}

/// As much of a request as the two resources need.
#[derive(Debug, Eq, PartialEq)]
struct Request {
    path: String,
    is_known_method: bool,
    is_head: bool,
    closes: bool,
    if_none_match: String,
}

impl Request {
    /// The first request in `held` and how long its head is; none while the head is incomplete; or the status that
    /// refuses it, after which the connection cannot go on.
    fn parse(held: &[u8]) -> Result<Option<(Request, usize)>, u16> {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut head = httparse::Request::new(&mut headers);
        let taken = match head.parse(held) {
            Ok(httparse::Status::Complete(taken)) if taken <= HEAD_BYTES_MAX => taken,
            Ok(httparse::Status::Partial) if held.len() <= HEAD_BYTES_MAX => return Ok(None),
            Ok(_) | Err(httparse::Error::TooManyHeaders) => return Err(431),
            Err(_) => return Err(400),
        };
        if head.version != Some(1) {
            return Err(505);
        }
        let mut request = Request {
            path: head.path.unwrap_or_default().split('?').next().unwrap_or_default().to_owned(),
            is_known_method: matches!(head.method, Some("GET" | "HEAD")),
            is_head: head.method == Some("HEAD"),
            closes: false,
            if_none_match: String::new(),
        };
        for header in head.headers.iter() {
            let value = String::from_utf8_lossy(header.value);
            match header.name.to_ascii_lowercase().as_str() {
                "connection" => request.closes |= value.split(',').any(|it| it.trim().eq_ignore_ascii_case("close")),
                "if-none-match" => request.if_none_match = value.into_owned(),
                "content-length" if value.trim() == "0" => {}
                // Neither resource takes a body, and one that is not read could be taken for the next request.
                "content-length" | "transfer-encoding" => return Err(413),
                _ => {}
            }
        }
        Ok(Some((request, taken)))
    }
}

struct Answer {
    status: u16,
    etag: String,
    body: String,
    closes: bool,
}

impl Answer {
    /// An answer after which the connection ends.
    fn closing(status: u16) -> Answer {
        Answer { status, etag: String::new(), body: format!(r#"{{"status":{status}}}"#), closes: true }
    }

    fn to(request: &Request, published: &Published) -> Answer {
        let bodies = published.bodies();
        let mut answer = Answer { status: 200, etag: String::new(), body: String::new(), closes: request.closes };
        match request.path.as_str() {
            _ if !request.is_known_method => answer.status = 405,
            "/prices" => {
                answer.etag = format!("\"t{}\"", bodies.tick);
                // RFC 9110 13.1.2: a list of tags, or any. Its W/ prefix does not matter to the comparison.
                let is_held = request.if_none_match.split(',').map(|tag| tag.trim().trim_start_matches("W/"));
                if is_held.into_iter().any(|tag| tag == "*" || tag == answer.etag) {
                    answer.status = 304;
                } else {
                    answer.body = bodies.prices.to_string();
                }
            }
            "/leads" => {
                let number = published.requests.fetch_add(1, Ordering::Relaxed) + 1;
                answer.body = format!(
                    r#"{{"generated_at":"{}","request_id":"req-{number:06}","items":{}}}"#,
                    Rfc3339((published.clock)()),
                    bodies.lead_items
                );
            }
            _ => answer.status = 404,
        }
        if answer.status >= 400 {
            answer.body = format!(r#"{{"status":{}}}"#, answer.status);
        }
        answer
    }

    fn bytes(&self, is_head: bool) -> Vec<u8> {
        let reason = match self.status {
            200 => "OK",
            304 => "Not Modified",
            400 => "Bad Request",
            404 => "Not Found",
            405 => "Method Not Allowed",
            413 => "Content Too Large",
            431 => "Request Header Fields Too Large",
            503 => "Service Unavailable",
            505 => "HTTP Version Not Supported",
            _ => "",
        };
        let mut out = format!("HTTP/1.1 {} {reason}\r\nCache-Control: no-cache\r\n", self.status);
        if self.status != 304 {
            out.push_str(&format!("Content-Type: application/json\r\nContent-Length: {}\r\n", self.body.len()));
        }
        if !self.etag.is_empty() {
            out.push_str(&format!("ETag: {}\r\n", self.etag));
        }
        out.push_str(match self.status {
            405 => "Allow: GET, HEAD\r\n",
            503 => "Retry-After: 1\r\n",
            _ => "",
        });
        out.push_str(if self.closes { "Connection: close\r\n\r\n" } else { "\r\n" });
        if self.status != 304 && !is_head {
            out.push_str(&self.body);
        }
        out.into_bytes()
    }
}

/// The board and the list, and the chance that moves them.
struct Market {
    chance: Chance,
    tick: u64,
    instruments: Vec<Instrument>,
    leads: Vec<Lead>,
    leads_made: usize,
}

struct Instrument {
    symbol: &'static str,
    name: &'static str,
    opened: Cents,
    price: Cents,
    volume: u64,
}

struct Lead {
    number: usize,
    name: &'static str,
    company: &'static str,
    status: &'static str,
    value: Cents,
    owner: &'static str,
}

/// Symbol, name and opening price in cents.
const INSTRUMENTS: [(&str, &str, i64); 12] = [
    ("AURN", "Auron Energy", 21_410),
    ("BLVD", "Boulevard Retail", 4802),
    ("CRSP", "Crispin Biotech", 9755),
    ("DYNA", "Dynamo Motors", 31_240),
    ("ECHO", "Echo Networks", 7190),
    ("FJRD", "Fjord Shipping", 13_325),
    ("GLCR", "Glacier Foods", 2680),
    ("HLIO", "Helio Solar", 5864),
    ("IRIS", "Iris Optics", 18_430),
    ("JADE", "Jade Mining", 1275),
    ("KITE", "Kite Airlines", 4118),
    ("LUNA", "Luna Media", 6607),
];
const PEOPLE: [&str; 17] = [
    "Ada Byrne",
    "Jonas Weber",
    "Mei Lin",
    "Sofia Rossi",
    "Tom Okafor",
    "Ines Duarte",
    "Karim Haddad",
    "Nora Lund",
    "Pavel Novak",
    "Rosa Jimenez",
    "Yuki Tanaka",
    "Liam Doyle",
    "Amara Diallo",
    "Elif Kaya",
    "Hugo Martin",
    "Zofia Kowal",
    "Omar Farouk",
];
const COMPANIES: [&str; 13] = [
    "Northwind Labs",
    "Blue Harbor",
    "Cobalt Works",
    "Verde Foods",
    "Lattice Systems",
    "Solstice Travel",
    "Granite Build",
    "Paper Lantern",
    "Ostra Marine",
    "Juniper Care",
    "Halcyon Audio",
    "Redwood Legal",
    "Quarry Data",
];
const OWNERS: [&str; 4] = ["kim", "ravi", "lena", "marco"];
/// The way of a lead; from the last it leaves the list.
const STATUSES: [&str; 5] = ["new", "contacted", "qualified", "proposal", "won"];

impl Market {
    fn seeded(seed: u64) -> Market {
        let instruments = INSTRUMENTS.iter().map(|&(symbol, name, cents)| Instrument {
            symbol,
            name,
            opened: Cents(cents),
            price: Cents(cents),
            volume: 10_000,
        });
        let mut market = Market {
            chance: Chance(seed),
            tick: 0,
            instruments: instruments.collect(),
            leads: Vec::with_capacity(LEADS + 1),
            leads_made: 0,
        };
        for place in 0..LEADS {
            let mut lead = market.new_lead();
            lead.status = STATUSES.get(place % (STATUSES.len() - 1)).copied().unwrap_or("new");
            market.leads.push(lead);
        }
        // A board whose every change is 0.00 looks broken: it opens as after some minutes of trade.
        for _ in 0..400 {
            market.trade();
        }
        market
    }

    /// A few hundred milliseconds pass.
    fn tick(&mut self) {
        self.tick += 1;
        self.trade();
        if self.tick.is_multiple_of(TICKS_PER_LEAD_EVENT) {
            self.lead_event();
        }
    }

    /// Two to five instruments move, each by up to half a percent and a little towards where it opened, so that a board
    /// left alone for a week still looks like one.
    fn trade(&mut self) {
        for _ in 0..2 + self.chance.below(4) {
            let place = self.chance.index(self.instruments.len());
            let Some(it) = self.instruments.get_mut(place) else { continue };
            let span = (it.price.0 / 200).max(2);
            let drift = (it.opened.0 - it.price.0) / 40;
            let step = i64::try_from(self.chance.below(span.unsigned_abs() * 2 + 1)).unwrap_or(0) - span;
            it.price = Cents((it.price.0 + step + drift).max(1));
            it.volume = it.volume.saturating_add(10 + self.chance.below(90) * 10);
        }
    }

    /// A new lead takes the place of the oldest, or one moves on, is worth more or less, or changes hands.
    fn lead_event(&mut self) {
        let place = self.chance.index(self.leads.len());
        let kind = self.chance.below(10);
        let owner = OWNERS.get(self.chance.index(OWNERS.len())).copied().unwrap_or("kim");
        let amount = self.amount();
        let Some(lead) = self.leads.get_mut(place) else { return };
        let next = STATUSES.iter().position(|it| *it == lead.status).and_then(|at| STATUSES.get(at + 1));
        match (kind, next) {
            (0, _) | (_, None) => {
                self.leads.remove(if next.is_none() { place } else { 0 });
                let lead = self.new_lead();
                self.leads.push(lead);
            }
            (1..=5, Some(next)) => lead.status = next,
            (6..=7, _) => lead.value = amount,
            _ => lead.owner = owner,
        }
    }

    fn new_lead(&mut self) -> Lead {
        let number = self.leads_made;
        self.leads_made += 1;
        // The lists' lengths have no common divisor: the same pair comes back after all others.
        Lead {
            number: 1001 + number,
            name: PEOPLE.get(number % PEOPLE.len()).copied().unwrap_or_default(),
            company: COMPANIES.get(number % COMPANIES.len()).copied().unwrap_or_default(),
            status: "new",
            value: self.amount(),
            owner: OWNERS.get(self.chance.index(OWNERS.len())).copied().unwrap_or_default(),
        }
    }

    /// What a lead is worth: 1,500 to 21,450, in steps of 50.
    fn amount(&mut self) -> Cents {
        Cents(150_000 + 5_000 * i64::try_from(self.chance.below(400)).unwrap_or(0))
    }

    fn bodies(&self) -> Bodies {
        let prices: Vec<String> = self.instruments.iter().map(Instrument::json).collect();
        let leads: Vec<String> = self.leads.iter().map(Lead::json).collect();
        Bodies {
            tick: self.tick,
            prices: format!("[{}]", prices.join(",")).into(),
            lead_items: format!("[{}]", leads.join(",")).into(),
        }
    }
}

impl Instrument {
    fn json(&self) -> String {
        let change = Cents(self.price.0 - self.opened.0);
        format!(
            r#"{{"symbol":"{}","name":"{}","price":{},"change":{change},"volume":{}}}"#,
            self.symbol, self.name, self.price, self.volume
        )
    }
}

impl Lead {
    fn json(&self) -> String {
        format!(
            r#"{{"id":"L-{}","name":"{}","company":"{}","status":"{}","value":{},"owner":"{}"}}"#,
            self.number, self.name, self.company, self.status, self.value, self.owner
        )
    }
}

/// An amount written with two decimals; whole numbers inside, so that none is ever 0.30000000000000004.
#[derive(Clone, Copy)]
struct Cents(i64);

impl fmt::Display for Cents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = if self.0 < 0 { "-" } else { "" };
        let cents = self.0.unsigned_abs();
        write!(f, "{sign}{}.{:02}", cents / 100, cents % 100)
    }
}

/// A wall time as RFC 3339 in UTC with milliseconds.
struct Rfc3339(WallTime);

impl fmt::Display for Rfc3339 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = self.0.as_micros() / 1_000;
        let (days, of_day) = (ms / 86_400_000, ms % 86_400_000);
        // The Gregorian calendar repeats every 400 years of 146,097 days; counted from a March, the leap day is last.
        let shifted = days + 719_468;
        let (era, of_era) = (shifted / 146_097, shifted % 146_097);
        let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let from_march = (5 * of_year + 2) / 153;
        let day = of_year - (153 * from_march + 2) / 5 + 1;
        let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
        let year = era * 400 + year_of_era + u64::from(month <= 2);
        let (hour, minute) = (of_day / 3_600_000, of_day / 60_000 % 60);
        let (second, ms) = (of_day / 1_000 % 60, of_day % 1_000);
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{ms:03}Z")
    }
}

/// SplitMix64: enough chance for a price board, the same from the same seed.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// From 0 to under `bound`; 0 where the bound is 0. The slight favour for small values does not matter here.
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    /// A place in a list of `len`.
    fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::config::{Config, FileError, Sources};

    fn noon() -> WallTime {
        WallTime::from_micros(1_772_366_400_123_456)
    }

    /// One connection to the sample upstream, reading whole answers.
    struct Client {
        socket: TcpStream,
        held: Vec<u8>,
    }

    struct Reply {
        head: String,
        body: String,
    }

    impl Client {
        fn new(addr: SocketAddr) -> Client {
            let socket = TcpStream::connect(addr).expect("the sample upstream listens");
            socket.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout can be set");
            Client { socket, held: Vec::new() }
        }

        fn send(&mut self, text: &str) -> &mut Client {
            self.socket.write_all(text.as_bytes()).expect("sent");
            self
        }

        fn fill(&mut self) -> bool {
            let mut piece = [0; 4096];
            let n = self.socket.read(&mut piece).unwrap_or(0);
            self.held.extend_from_slice(&piece[..n]);
            n > 0
        }

        fn answer(&mut self) -> Reply {
            let end = loop {
                if let Some(at) = self.held.windows(4).position(|w| w == b"\r\n\r\n") {
                    break at + 4;
                }
                assert!(self.fill(), "the connection ended inside a head: {:?}", String::from_utf8_lossy(&self.held));
            };
            let head = String::from_utf8(self.held.drain(..end).collect()).expect("an ASCII head");
            let length = head
                .lines()
                .find_map(|line| line.strip_prefix("Content-Length: "))
                .map_or(0, |n| n.parse().expect("a length"));
            while self.held.len() < length {
                assert!(self.fill(), "the connection ended inside a body");
            }
            Reply { body: String::from_utf8(self.held.drain(..length).collect()).expect("UTF-8"), head }
        }

        fn get(&mut self, path: &str, extra: &str) -> Reply {
            self.send(&format!("GET {path} HTTP/1.1\r\nHost: x\r\n{extra}\r\n")).answer()
        }

        fn is_closed(&mut self) -> bool {
            !self.fill()
        }
    }

    fn header<'a>(answer: &'a Reply, name: &str) -> &'a str {
        answer.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": ")).unwrap_or("")
    }

    #[test]
    fn prices_tick_on_one_connection_and_keep_two_decimals() {
        let upstream = start(noon).expect("it starts");
        let mut client = Client::new(upstream.addr);
        let first = client.get("/prices", "");
        assert!(first.head.starts_with("HTTP/1.1 200 OK\r\n"), "{}", first.head);
        let rows: Vec<serde_json::Value> = serde_json::from_str(&first.body).expect("an array");
        assert_eq!(rows.len(), INSTRUMENTS.len());
        for key in ["symbol", "name", "price", "change", "volume"] {
            assert!(rows.iter().all(|row| row.get(key).is_some()), "each row has {key}");
        }
        let moved = (0..100).any(|_| {
            clock::hold_thread(Duration::from_millis(50));
            client.get("/prices", "").body != first.body
        });
        assert!(moved, "five seconds are many ticks");
    }

    #[test]
    fn a_held_etag_is_answered_304_until_the_next_tick() {
        let upstream = start(noon).expect("it starts");
        let mut client = Client::new(upstream.addr);
        let is_kept = (0..20).any(|_| {
            let etag = header(&client.get("/prices", ""), "ETag").to_owned();
            let again = client.get("/prices", &format!("If-None-Match: \"other\", W/{etag}\r\n"));
            again.head.starts_with("HTTP/1.1 304 ") && again.body.is_empty() && header(&again, "ETag") == etag
        });
        assert!(is_kept, "twenty pairs of requests do not all straddle a tick");
        let foreign = client.get("/prices", "If-None-Match: \"other\"\r\n");
        assert!(foreign.head.starts_with("HTTP/1.1 200 "), "{}", foreign.head);
    }

    #[test]
    fn leads_stand_among_members_that_differ_in_each_answer() {
        let upstream = start(noon).expect("it starts");
        let mut client = Client::new(upstream.addr);
        let [first, second] = [(); 2].map(|()| -> serde_json::Value {
            serde_json::from_str(&client.get("/leads?page=1", "").body).expect("an object")
        });
        assert_eq!(first["generated_at"], "2026-03-01T12:00:00.123Z");
        assert_ne!(first["request_id"], second["request_id"]);
        assert_eq!(first["items"].as_array().map(Vec::len), Some(LEADS));
    }

    #[test]
    fn what_it_does_not_serve_it_refuses() {
        let upstream = start(noon).expect("it starts");
        let mut client = Client::new(upstream.addr);
        assert!(client.get("/nothing", "").head.starts_with("HTTP/1.1 404 "));
        let posted = client.send("POST /prices HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n").answer();
        assert!(posted.head.starts_with("HTTP/1.1 405 ") && header(&posted, "Allow") == "GET, HEAD");
        client.send("HEAD /prices HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        let mut text = Vec::new();
        client.socket.read_to_end(&mut text).expect("closed when asked to");
        assert!(text.ends_with(b"Connection: close\r\n\r\n"), "HEAD has no body");

        for (refused, status) in [
            ("POST /prices HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", "413"),
            ("POST /prices HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", "413"),
            ("GET /prices HTTP/1.0\r\n\r\n", "505"),
            ("GET /pri\0ces HTTP/1.1\r\n\r\n", "400"),
        ] {
            let mut client = Client::new(upstream.addr);
            let answer = client.send(refused).answer();
            assert!(answer.head.starts_with(&format!("HTTP/1.1 {status} ")), "{refused:?}: {}", answer.head);
            assert!(client.is_closed(), "{refused:?}");
        }
    }

    #[test]
    fn a_head_is_taken_at_its_bound_and_refused_one_past() {
        let head = |bytes: usize| {
            let fixed = "GET /prices HTTP/1.1\r\nX: \r\n\r\n".len();
            format!("GET /prices HTTP/1.1\r\nX: {}\r\n\r\n", "y".repeat(bytes - fixed))
        };
        let taken = |text: String| Request::parse(text.as_bytes()).map(|it| it.map(|(_, taken)| taken));
        assert_eq!(taken(head(HEAD_BYTES_MAX)), Ok(Some(HEAD_BYTES_MAX)));
        assert_eq!(taken(head(HEAD_BYTES_MAX + 1)), Err(431));
        assert_eq!(taken(format!("GET /{}", "y".repeat(HEAD_BYTES_MAX - 5))), Ok(None), "it may still end");
        assert_eq!(taken(format!("GET /{}", "y".repeat(HEAD_BYTES_MAX - 4))), Err(431), "it cannot end in time");

        let headers = |n: usize| format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(n));
        assert!(taken(headers(HEADERS_MAX)).is_ok());
        assert_eq!(taken(headers(HEADERS_MAX + 1)), Err(431));
    }

    #[test]
    fn pipelined_requests_are_answered_in_order() {
        let upstream = start(noon).expect("it starts");
        let mut client = Client::new(upstream.addr);
        client.send("GET /leads HTTP/1.1\r\nHost: x\r\n\r\nGET /nothing HTTP/1.1\r\nHost: x\r\n\r\n");
        assert!(client.answer().head.starts_with("HTTP/1.1 200 "));
        assert!(client.answer().head.starts_with("HTTP/1.1 404 "));
    }

    #[test]
    fn one_connection_past_the_bound_is_turned_away_and_a_freed_place_is_used_again() {
        let upstream = start(noon).expect("it starts");
        let mut clients: Vec<Client> = (0..CONNECTIONS_MAX).map(|_| Client::new(upstream.addr)).collect();
        for client in &mut clients {
            assert!(client.get("/prices", "").head.starts_with("HTTP/1.1 200 "));
        }
        let mut late = Client::new(upstream.addr);
        assert!(late.answer().head.starts_with("HTTP/1.1 503 "));
        assert!(late.is_closed());
        clients.pop();
        let is_served = (0..100).any(|_| {
            clock::hold_thread(Duration::from_millis(20));
            let mut client = Client::new(upstream.addr);
            client.socket.write_all(b"GET /prices HTTP/1.1\r\nHost: x\r\n\r\n").is_ok()
                && client.fill()
                && client.held.starts_with(b"HTTP/1.1 200 ")
        });
        assert!(is_served);
    }

    #[test]
    fn the_same_seed_gives_the_same_market_and_it_stays_one() {
        let (mut market, mut twin) = (Market::seeded(7), Market::seeded(7));
        let start = market.bodies();
        for _ in 0..5_000 {
            market.tick();
            twin.tick();
        }
        assert_eq!(market.bodies().prices, twin.bodies().prices);
        assert_eq!(market.bodies().lead_items, twin.bodies().lead_items);
        assert_ne!(market.bodies().prices, start.prices);
        assert_ne!(market.bodies().lead_items, start.lead_items);
        for it in &market.instruments {
            assert!(it.price.0 > it.opened.0 / 2 && it.price.0 < it.opened.0 * 2, "{} is at {}", it.symbol, it.price);
        }
        let ids: HashSet<usize> = market.leads.iter().map(|lead| lead.number).collect();
        assert_eq!((market.leads.len(), ids.len()), (LEADS, LEADS), "ids tell leads apart");
        serde_json::from_str::<Vec<serde_json::Value>>(&market.bodies().lead_items).expect("JSON");
    }

    #[test]
    fn amounts_and_times_are_written_in_full() {
        let text: Vec<String> = [0, 5, -5, 100, -12_345, 21_410].map(|cents| Cents(cents).to_string()).into();
        assert_eq!(text, ["0.00", "0.05", "-0.05", "1.00", "-123.45", "214.10"]);
        for (s, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (1_709_251_199, "2024-02-29T23:59:59.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(Rfc3339(WallTime::from_secs(s)).to_string(), text);
        }
    }

    /// The demo's configuration refers to nothing outside itself.
    struct Nothing;

    impl Sources for Nothing {
        fn env(&self, name: &str) -> Option<Vec<u8>> {
            panic!("asked for the variable {name}")
        }

        fn file(&self, path: &str, _: usize) -> Result<Vec<u8>, FileError> {
            panic!("asked for the file {path}")
        }
    }

    #[test]
    fn the_configuration_is_accepted_without_a_warning() {
        let [upstream, listen, admin] = [9001, 0, 0].map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
        let text = demo_config(upstream, listen, admin, &"0123456789abcdef".repeat(4));
        let (config, warnings) = Config::parse(&text, &Nothing).expect("accepted");
        assert!(warnings.is_empty(), "{warnings:?}");
        assert_eq!((config.streams.len(), config.jwt_keys.len(), config.connection.playground), (2, 1, true));
    }

    #[test]
    fn the_configuration_names_both_streams_and_the_greeting_all_ways_in() {
        let [upstream, listen, admin] = [9001, 8080, 9080].map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
        let secret = "k\"ey+with=signs-0123456789abcdef";
        let config: toml::Table = demo_config(upstream, listen, admin, secret).parse().expect("TOML");
        assert_eq!(config["server"]["listen"].as_str(), Some("127.0.0.1:8080"));
        assert_eq!(config["admin"]["listen"].as_str(), Some("127.0.0.1:9080"));
        assert_eq!(config["auth"]["jwt"]["key"][0]["secret"].as_str(), Some(secret));
        let streams = config["stream"].as_array().expect("streams");
        let seen: Vec<_> = streams.iter().map(|it| (it["id"].as_str(), it["url"].as_str())).collect();
        assert_eq!(
            seen,
            [
                (Some("prices"), Some("http://127.0.0.1:9001/prices")),
                (Some("leads"), Some("http://127.0.0.1:9001/leads"))
            ]
        );

        let text = greeting(listen, upstream, "h.p.s", secret);
        for part in [
            "http://127.0.0.1:8080/#stream=prices&token=h.p.s&secret=k%22ey%2Bwith%3Dsigns-0123456789abcdef",
            "TOKEN=h.p.s\n",
            "curl -N ",
            // With a blank after -H websocat takes the address for a second header, and then misses it.
            "websocat --protocol restcast.v1 -H=\"Authorization: Bearer $TOKEN\" ws:",
            "ws://127.0.0.1:8080/v1/streams/leads",
        ] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }
}
