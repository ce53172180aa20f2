//! A thousand watchers of one stream whose upstream, over TLS, goes through every fault there is: one that is polled, one that
//! is followed, and the operator's proxy before either. While it fails they keep what they hold and are told; when it is well
//! again all of them hold its value, to the last digit, and nobody was closed.
#![cfg(feature = "runtime")]
#![allow(clippy::disallowed_methods, reason = "tests measure how long things take")]

#[path = "support/crowd.rs"]
mod crowd;
mod support;
#[path = "support/watcher.rs"]
mod watcher;

use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;
use socket2::{Domain, SockRef, Socket, Type};

use crowd::Crowd;
use support::server::{PATIENCE, Server, Setup};
use support::{Authority, Folder, Framing, Identity, Reply, Step, Tunnels, Upstream, self_signed};
use watcher::canonical;

const WATCHERS: usize = 1_000;
const INTERVAL: Duration = Duration::from_millis(50);
/// Short enough that a stall is over soon, long enough for a handshake in TLS on a busy machine.
const LINES: &str = "interval = \"50ms\"\nbackoff_max = \"200ms\"\nconnect_timeout = \"700ms\"\nfirst_byte_timeout = \"700ms\"\n\
                     timeout = \"1s\"\nresponse_bytes_max = \"64KiB\"\narray_key = \"id\"";

/// Besides, for an upstream that is followed: its pulse is faster.
const IDLE: &str = "idle_timeout = \"800ms\"";
const PULSE: Duration = Duration::from_millis(100);
/// Whom the proxy alone knows.
const NAME: &str = "api.partner.example";

/// What the upstream speaks.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Spoken {
    /// A value to each request.
    Json,
    /// Each value as it comes to be.
    Events,
    /// The same.
    Lines,
}

impl Spoken {
    fn lines(self) -> String {
        match self {
            Spoken::Json => String::new(),
            Spoken::Events => format!("kind = \"sse\"\n{IDLE}"),
            Spoken::Lines => format!("kind = \"ndjson\"\n{IDLE}"),
        }
    }

    fn head(self) -> Step {
        let kind = match self {
            Spoken::Json => "application/json",
            Spoken::Events => "text/event-stream",
            Spoken::Lines => "application/x-ndjson",
        };
        let head = format!("HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n");
        Step::Send(head.into_bytes())
    }

    /// A value on its way.
    fn event(self, text: &str) -> String {
        match self {
            Spoken::Json => text.to_owned(),
            Spoken::Events => format!("id: 7\ndata: {text}\n\n"),
            Spoken::Lines => format!("{text}\n"),
        }
    }

    /// An upstream that is well, and has this value.
    fn says(self, text: &str) -> Reply {
        if self == Spoken::Json {
            return Reply::json(text);
        }
        // An empty line now and then is no event, and says that it is there.
        let pulse = chunk("\n").repeat(3_000);
        let size = pulse.len() / 3_000;
        Reply::steps(vec![self.head(), Step::Send(chunk(&self.event(text))), Step::Drip(pulse, size, PULSE)])
    }
}

fn chunk(text: &str) -> Vec<u8> {
    format!("{:x}\r\n{text}\r\n", text.len()).into_bytes()
}

/// What goes wrong, and where.
enum Fault {
    /// A request is answered so.
    Answered(Reply),
    /// Nobody listens.
    Refused,
    /// Connections are never answered.
    Unanswered,
    /// They are, and then nothing is said.
    Mute,
    /// Somebody else answers.
    Impostor(Identity),
    /// The port speaks no TLS.
    Plain,
    /// The name leads nowhere.
    Nameless,
}

/// A fault, what it is called, and what its polls are counted as.
fn faults(authority: &Authority) -> Vec<(&'static str, Fault, &'static str)> {
    let send = |text: &str| Step::Send(text.as_bytes().to_vec());
    let steps = |steps: Vec<Step>| Fault::Answered(Reply::steps(steps));
    let json = |text: String| Fault::Answered(Reply::json(text));
    let status = |status| Fault::Answered(Reply::status(status));
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n";
    let begun = format!("{head}Content-Length: 5000\r\n\r\n{{\"version\":");
    let chunked = format!("{head}Transfer-Encoding: chunked\r\n\r\n");
    let short = format!("{head}Content-Length: 10\r\n\r\n{}", value(999));
    let two = format!("{head}Content-Length: 2\r\nContent-Length: 3\r\n\r\n[1]");
    vec![
        ("nobody listens", Fault::Refused, "UPSTREAM_UNREACHABLE"),
        ("a connect that is never answered", Fault::Unanswered, "UPSTREAM_TIMEOUT"),
        ("a TLS handshake that is never answered", Fault::Mute, "UPSTREAM_TIMEOUT"),
        ("a certificate for another name", Fault::Impostor(authority.identity(&["example.com"])), "UPSTREAM_TLS"),
        ("a certificate of the past", Fault::Impostor(authority.expired(&["127.0.0.1"])), "UPSTREAM_TLS"),
        ("a certificate nobody vouches for", Fault::Impostor(self_signed(&["127.0.0.1"])), "UPSTREAM_TLS"),
        ("no TLS at all", Fault::Plain, "UPSTREAM_TLS"),
        ("a name that leads nowhere", Fault::Nameless, "UPSTREAM_DNS"),
        ("silence after the request", steps(vec![Step::Stall]), "UPSTREAM_TIMEOUT"),
        ("headers that stall", steps(vec![send("HTTP/1.1 200 OK\r\nContent-Le"), Step::Stall]), "UPSTREAM_TIMEOUT"),
        ("headers without an end", Fault::Answered(Reply::endless_headers()), "UPSTREAM_PROTOCOL"),
        ("a body that stalls", steps(vec![send(&begun), Step::Stall]), "UPSTREAM_TIMEOUT"),
        ("a body that drips", Fault::Answered(Reply::json(value(999)).drip(20, INTERVAL)), "UPSTREAM_TIMEOUT"),
        ("a body that is cut", steps(vec![send(&begun), Step::Cut]), "UPSTREAM_PROTOCOL"),
        ("a body that is closed too early", steps(vec![send(&begun), Step::Close]), "UPSTREAM_PROTOCOL"),
        ("a reset within the body", Fault::Answered(Reply::reset_within(10, 100)), "UPSTREAM_PROTOCOL"),
        ("a reset at once", steps(vec![Step::Reset]), "UPSTREAM_UNREACHABLE"),
        ("garbage", steps(vec![send("\u{16}\u{3}\u{1} garbage\r\n\r\n"), Step::Close]), "UPSTREAM_PROTOCOL"),
        ("two lengths", steps(vec![send(&two), Step::Close]), "UPSTREAM_PROTOCOL"),
        ("a length that is too small", steps(vec![send(&short), Step::Close]), "UPSTREAM_BODY"),
        (
            "chunks that are none",
            steps(vec![send(&chunked), send("5;x\r\n[1,2]\r\nzz\r\n"), Step::Close]),
            "UPSTREAM_PROTOCOL",
        ),
        ("chunks without an end", Fault::Answered(Reply::endless_chunks()), "UPSTREAM_TOO_LARGE"),
        ("a body that is too large", json(format!("[\"{}\"]", "x".repeat(70_000))), "UPSTREAM_TOO_LARGE"),
        ("a bomb", Fault::Answered(Reply::gzip_bomb(1 << 20)), "UPSTREAM_TOO_LARGE"),
        ("HTML", Fault::Answered(Reply::body("text/html", "<!doctype html><p>It works!")), "UPSTREAM_BODY"),
        ("half a value", Fault::Answered(Reply::json("[1,2").framing(Framing::Close)), "UPSTREAM_BODY"),
        ("no value", json(String::new()), "UPSTREAM_BODY"),
        ("a 304 to no condition", status(304), "UPSTREAM_PROTOCOL"),
        (
            "a redirect to nowhere",
            Fault::Answered(Reply::status(302).header("Location", "https://x.invalid/")),
            "UPSTREAM_REDIRECT",
        ),
        ("401", status(401), "UPSTREAM_AUTH"),
        ("404, with JSON", Fault::Answered(Reply::json("[\"a lie\"]").with_status(404)), "UPSTREAM_STATUS"),
        ("429", status(429), "UPSTREAM_RATE_LIMITED"),
        ("500, with JSON", Fault::Answered(Reply::json("[\"a lie\"]").with_status(500)), "UPSTREAM_STATUS"),
        ("503 for a second", Fault::Answered(Reply::status(503).header("Retry-After", "1")), "UPSTREAM_RATE_LIMITED"),
    ]
}

/// The same for an upstream that is followed. Connections that were open when it began are cut.
fn faults_of_events(spoken: Spoken) -> Vec<(&'static str, Fault, &'static str)> {
    let status = |status| Fault::Answered(Reply::status(status));
    let begun = |then: Vec<Step>| Fault::Answered(Reply::steps([vec![spoken.head()], then].concat()));
    let sends = |text: &str| Step::Send(chunk(&spoken.event(text)));
    let whole = chunk(&spoken.event(&value(999)));
    let half = || Step::Send(whole[..whole.len() / 2].to_vec());
    let pause = || Step::Pause(Duration::from_millis(20));
    let html = Reply::body("text/html", "<!doctype html>\n<p>It works!\n");
    vec![
        ("nobody listens", Fault::Refused, "UPSTREAM_UNREACHABLE"),
        ("a connect that is never answered", Fault::Unanswered, "UPSTREAM_TIMEOUT"),
        ("a certificate nobody vouches for", Fault::Impostor(self_signed(&["127.0.0.1"])), "UPSTREAM_TLS"),
        ("silence after the request", Fault::Answered(Reply::steps(vec![Step::Stall])), "UPSTREAM_TIMEOUT"),
        ("silence after the head", begun(vec![Step::Stall]), "UPSTREAM_TIMEOUT"),
        ("silence within an event", begun(vec![half(), Step::Stall]), "UPSTREAM_TIMEOUT"),
        ("an event that is cut", begun(vec![half(), Step::Cut]), "UPSTREAM_PROTOCOL"),
        ("an event that is closed too early", begun(vec![half(), Step::Close]), "UPSTREAM_PROTOCOL"),
        ("a reset within an event", begun(vec![half(), pause(), Step::Reset]), "UPSTREAM_PROTOCOL"),
        ("an end in good order", begun(vec![Step::Send(b"0\r\n\r\n".to_vec())]), "UPSTREAM_UNREACHABLE"),
        ("half a value", begun(vec![sends("[1,2"), Step::Stall]), "UPSTREAM_BODY"),
        ("an event that is too large", begun(vec![sends(&"1".repeat(70_000)), Step::Stall]), "UPSTREAM_TOO_LARGE"),
        ("chunks that are none", begun(vec![Step::Send(b"zz\r\n".to_vec()), Step::Stall]), "UPSTREAM_PROTOCOL"),
        ("HTML", Fault::Answered(html), "UPSTREAM_BODY"),
        ("no such place", status(404), "UPSTREAM_STATUS"),
        ("500", status(500), "UPSTREAM_STATUS"),
        ("503 for a second", Fault::Answered(Reply::status(503).header("Retry-After", "1")), "UPSTREAM_RATE_LIMITED"),
    ]
}

/// What a proxy does instead of its work.
enum Broken {
    /// It answers so.
    Says(&'static [u8]),
    /// It cuts each tunnel after so many bytes.
    Cuts(u64),
    /// It is not there.
    Gone,
}

fn faults_of_proxies() -> Vec<(&'static str, Broken, &'static str)> {
    let login = b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n";
    vec![
        ("another login is asked for", Broken::Says(login), "UPSTREAM_UNREACHABLE"),
        ("502", Broken::Says(b"HTTP/1.1 502 Bad Gateway\r\n\r\n"), "UPSTREAM_UNREACHABLE"),
        ("a proxy that says nothing", Broken::Says(b""), "UPSTREAM_TIMEOUT"),
        ("a proxy that speaks no HTTP", Broken::Says(b"SSH-2.0-proxy\r\n"), "UPSTREAM_PROTOCOL"),
        ("no proxy", Broken::Gone, "UPSTREAM_UNREACHABLE"),
        ("a tunnel that is cut in the handshake", Broken::Cuts(100), "UPSTREAM_TLS"),
        ("a tunnel that is cut in the answer", Broken::Cuts(20_000), "UPSTREAM_PROTOCOL"),
    ]
}

/// The upstream's value: some members change from one version to the next, some come and go, and one number is spelled as no
/// float is.
fn value(version: u64) -> String {
    let rows: Vec<_> = (0..24)
        .filter(|row| !(row + version).is_multiple_of(7))
        .map(|row| json!({ "id": row, "name": format!("row {row}"), "changed": if row % 3 == version % 3 { version } else { 0 } }))
        .collect();
    let rows = serde_json::Value::from(rows);
    format!(
        r#"{{"version":{version},"exact":{version}.1000000000000000000001,"rows":{rows},"note":"{}"}}"#,
        "n".repeat(200)
    )
}

/// The place where the upstream is, whoever answers there.
struct Place {
    authority: Authority,
    address: SocketAddr,
    /// Bound and never listening, so that nobody else gets the port while nobody listens.
    _held: Socket,
    upstream: Option<Upstream>,
    requests: usize,
    spoken: Spoken,
}

/// Those who are where it was; they go when this is dropped.
#[derive(Default)]
struct Others {
    impostor: Option<Upstream>,
    _silent: Option<(TcpListener, Vec<std::io::Result<TcpStream>>)>,
}

impl Place {
    fn new(spoken: Spoken) -> Place {
        let held = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        held.set_reuse_address(true).expect("an option");
        held.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a port");
        let address = held.local_addr().ok().and_then(|address| address.as_socket()).expect("an address");
        let authority = Authority::new();
        let mut place = Place { authority, address, _held: held, upstream: None, requests: 0, spoken };
        place.upstream = Some(place.open());
        place
    }

    fn open(&self) -> Upstream {
        Upstream::start_tls_at(self.address, &self.authority.identity(&["127.0.0.1", NAME]))
    }

    /// Lets that go wrong until what is returned is dropped and it is healed.
    fn suffers(&mut self, fault: Fault) -> Others {
        let mut others = Others::default();
        if let Fault::Answered(reply) = fault {
            self.answer(reply);
            return others;
        }
        self.close();
        match fault {
            Fault::Unanswered => others._silent = Some(unanswered(self.address)),
            Fault::Mute => others._silent = Some((TcpListener::bind(self.address).expect("free"), Vec::new())),
            Fault::Impostor(identity) => others.impostor = Some(Upstream::start_tls_at(self.address, &identity)),
            Fault::Plain => others.impostor = Some(Upstream::start_at(self.address)),
            Fault::Answered(_) | Fault::Refused | Fault::Nameless => {}
        }
        if let Some(impostor) = &others.impostor {
            impostor.set("/value", Reply::json("[\"a lie\"]"));
        }
        others
    }

    fn answer(&self, reply: Reply) {
        self.upstream.as_ref().expect("it is there").set("/value", reply);
    }

    fn close(&mut self) {
        self.requests += self.upstream.take().map_or(0, |upstream| upstream.request_count());
    }

    /// Lets all be well, with this value.
    fn heal(&mut self, version: u64) {
        if self.upstream.is_none() {
            self.upstream = Some(self.open());
        }
        self.answer(self.spoken.says(&value(version)));
    }
}

/// A listener whose queue is full: whoever connects waits, as behind a firewall that drops what it does not like.
fn unanswered(address: SocketAddr) -> (TcpListener, Vec<std::io::Result<TcpStream>>) {
    let silent = TcpListener::bind(address).expect("the port is free");
    SockRef::from(&silent).listen(0).expect("a shorter queue");
    let fillers = (0..3).map(|_| TcpStream::connect_timeout(&address, Duration::from_millis(50))).collect();
    (silent, fillers)
}

fn count(server: &Server, code: &str) -> f64 {
    server.metric(&["restcast_polls_total", &format!("\"{code}\"")])
}

#[test]
fn whatever_the_upstream_does_a_thousand_watchers_hold_its_value_afterwards_and_none_is_closed() {
    raise_descriptors();
    let mut place = Place::new(Spoken::Json);
    let folder = Folder::new("chaos");
    let lines = format!("{LINES}\nca = {:?}", place.authority.write_pem(&folder));
    let setup = |host: &str| {
        let url = format!("https://{host}:{}/value", place.address.port());
        Setup::new().log("level = \"info\"").server("heartbeat = \"5s\"").stream("s", &url, &lines)
    };
    let (well, nameless) = (setup("127.0.0.1"), setup("nobody.invalid"));
    let mut version = 1;
    place.heal(version);
    let begun = Instant::now();
    let server = well.start();
    let mut crowd = Crowd::open(&server, "s", WATCHERS);
    crowd.until_all_hold(&value(version));
    let faults = faults(&place.authority);
    let names: BTreeSet<&str> = faults.iter().map(|(name, ..)| *name).collect();
    assert_eq!(names.len(), faults.len());
    for (name, fault, code) in faults {
        crowd.during = name.to_owned();
        let before = count(&server, code);
        let held = crowd.value();
        assert_eq!(held, canonical(&value(version)));
        let state = if matches!(fault, Fault::Nameless) { "failing" } else { "stale" };
        let others = if matches!(fault, Fault::Nameless) {
            server.reload(&nameless);
            None
        } else {
            Some(place.suffers(fault))
        };
        crowd.until_all_are(state);
        let met = Instant::now();
        while count(&server, code) <= before {
            assert!(met.elapsed() < PATIENCE, "{name} is never {code}");
            crowd.read(Duration::from_millis(20));
        }
        assert_eq!(crowd.value(), held, "{name}: what they hold is what it was");
        version += 1;
        match others {
            None => {
                place.heal(version);
                server.reload(&well);
            }
            Some(others) => {
                let heard = others.impostor.as_ref().map_or(0, Upstream::request_count);
                assert_eq!(heard, 0, "{name}: nothing is said to a stranger");
                drop(others);
                place.heal(version);
            }
        }
        crowd.until_all_hold(&value(version));
    }
    // Nobody was closed, or the crowd had said so. They cost the upstream no more than one would.
    place.close();
    let most = begun.elapsed().as_secs_f64() / INTERVAL.as_secs_f64() + 10.0;
    assert!(place.requests as f64 <= most, "{} requests in {:?}", place.requests, begun.elapsed());
    assert_eq!(server.metric(&["restcast_subscriptions"]), WATCHERS as f64);
    assert_eq!(server.metric(&["restcast_panics_total"]), 0.0);
}

/// A thousand watchers of what is at a place.
struct Trial {
    place: Place,
    server: Server,
    crowd: Crowd,
    version: u64,
    _folder: Folder,
}

impl Trial {
    /// One that has begun well: the place is at `host`, and `besides` is in the file.
    fn new(mut place: Place, host: &str, besides: &str) -> Trial {
        raise_descriptors();
        let folder = Folder::new("chaos");
        let ca = place.authority.write_pem(&folder);
        let lines = format!("{LINES}\nca = {ca:?}\n{}\n{besides}", place.spoken.lines());
        let url = format!("https://{host}:{}/value", place.address.port());
        place.heal(1);
        let setup = Setup::new().log("level = \"info\"").server("heartbeat = \"5s\"").stream("s", &url, &lines);
        let server = setup.start();
        let mut crowd = Crowd::open(&server, "s", WATCHERS);
        crowd.until_all_hold(&value(1));
        Trial { place, server, crowd, version: 1, _folder: folder }
    }

    /// A fault begins, lasts until all have been told and it has been met more than once, and ends with a new version.
    fn survives<F>(
        &mut self,
        (name, code): (&str, &str),
        begin: impl FnOnce(&mut Place) -> F,
        end: impl FnOnce(&mut Place, F, u64),
    ) {
        let Trial { place, server, crowd, version, .. } = self;
        crowd.during = format!("{:?}: {name}", place.spoken);
        let held = crowd.value();
        assert_eq!(held, canonical(&value(*version)));
        crowd.forget_failures();
        let before = count(server, code);
        let fault = begin(place);
        // One that is reached now and then is live for a moment.
        crowd.until_all_are_told();
        let met = Instant::now();
        while count(server, code) <= before + 1.0 {
            assert!(met.elapsed() < PATIENCE, "{} is never {code}", crowd.during);
            crowd.read(Duration::from_millis(20));
        }
        assert_eq!(crowd.value(), held, "{}: what they hold is what it was", crowd.during);
        *version += 1;
        end(place, fault, *version);
        crowd.until_all_hold(&value(*version));
    }

    /// Nobody was closed, or the crowd had said so.
    fn ends(self) {
        assert_eq!(self.server.metric(&["restcast_subscriptions"]), WATCHERS as f64);
        assert_eq!(self.server.metric(&["restcast_panics_total"]), 0.0);
    }
}

fn raise_descriptors() {
    let descriptors = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: descriptors.maximum, ..descriptors }).expect("raised");
}

#[test]
fn whatever_an_upstream_does_that_is_followed_a_thousand_watchers_hold_its_value_afterwards_and_none_is_closed() {
    for spoken in [Spoken::Events, Spoken::Lines] {
        let mut trial = Trial::new(Place::new(spoken), "127.0.0.1", "");
        for (name, fault, code) in faults_of_events(spoken) {
            let begin = |place: &mut Place| {
                let others = place.suffers(fault);
                if let Some(upstream) = &place.upstream {
                    upstream.close_connections();
                }
                others
            };
            trial.survives((name, code), begin, |place, others, version| {
                drop(others);
                place.heal(version);
            });
        }
        trial.ends();
    }
}

#[test]
fn whatever_the_proxy_does_a_thousand_watchers_hold_the_value_afterwards_and_none_is_closed() {
    for spoken in [Spoken::Json, Spoken::Events] {
        let (place, tunnels) = (Place::new(spoken), Tunnels::start());
        let (address, end) = (tunnels.address(), format!("{NAME}:{}", place.address.port()));
        tunnels.knows(&end, place.address);
        let mut trial = Trial::new(place, NAME, &format!("[proxy]\nurl = \"http://{address}\""));
        let mut tunnels = Some(tunnels);
        for (name, broken, code) in faults_of_proxies() {
            let begin = |place: &mut Place| {
                match broken {
                    Broken::Gone => tunnels = None,
                    Broken::Says(answer) => tunnels.iter().for_each(|proxy| proxy.says(Some(answer))),
                    Broken::Cuts(bytes) => tunnels.iter().for_each(|proxy| proxy.cuts_after(Some(bytes))),
                }
                // Longer than what comes through a tunnel that is cut.
                place.answer(place.spoken.says(&format!("[\"{}\"]", "a lie".repeat(10_000))));
                tunnels.iter().for_each(Tunnels::close_connections);
                tunnels
            };
            let mut mended = None;
            trial.survives((name, code), begin, |place, proxy: Option<Tunnels>, version| {
                place.heal(version);
                let proxy = proxy.unwrap_or_else(|| Tunnels::start_at(address));
                proxy.knows(&end, place.address);
                proxy.says(None);
                proxy.cuts_after(None);
                mended = Some(proxy);
            });
            tunnels = mended;
        }
        trial.ends();
    }
}
