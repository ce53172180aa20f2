//! A thousand watchers of one stream whose upstream, over TLS, goes through every fault there is. While it fails they keep
//! what they hold and are told; when it is well again all of them hold its value, to the last digit, and nobody was closed.
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
use support::{Authority, Folder, Framing, Identity, Reply, Step, Upstream, self_signed};
use watcher::canonical;

const WATCHERS: usize = 1_000;
const INTERVAL: Duration = Duration::from_millis(50);
/// Short enough that a stall is over soon, long enough for a handshake in TLS on a busy machine.
const LINES: &str = "interval = \"50ms\"\nbackoff_max = \"200ms\"\nconnect_timeout = \"700ms\"\nfirst_byte_timeout = \"700ms\"\n\
                     timeout = \"1s\"\nresponse_bytes_max = \"64KiB\"\narray_key = \"id\"";

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
}

impl Place {
    fn new() -> Place {
        let held = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        held.set_reuse_address(true).expect("an option");
        held.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a port");
        let address = held.local_addr().ok().and_then(|address| address.as_socket()).expect("an address");
        let mut place = Place { authority: Authority::new(), address, _held: held, upstream: None, requests: 0 };
        place.upstream = Some(place.open());
        place
    }

    fn open(&self) -> Upstream {
        Upstream::start_tls_at(self.address, &self.authority.identity(&["127.0.0.1"]))
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
        self.answer(Reply::json(value(version)));
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
    let descriptors = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: descriptors.maximum, ..descriptors }).expect("raised");
    let mut place = Place::new();
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
        // Dropped where the fault ends.
        let mut others: (Option<Upstream>, Option<(TcpListener, Vec<_>)>) = (None, None);
        let state = if matches!(fault, Fault::Nameless) { "failing" } else { "stale" };
        match fault {
            Fault::Answered(reply) => place.answer(reply),
            Fault::Nameless => server.reload(&nameless),
            elsewhere => {
                place.close();
                match elsewhere {
                    Fault::Unanswered => others.1 = Some(unanswered(place.address)),
                    Fault::Mute => others.1 = Some((TcpListener::bind(place.address).expect("free"), Vec::new())),
                    Fault::Impostor(identity) => others.0 = Some(Upstream::start_tls_at(place.address, &identity)),
                    Fault::Plain => others.0 = Some(Upstream::start_at(place.address)),
                    _ => {}
                }
                if let Some(impostor) = &others.0 {
                    impostor.set("/value", Reply::json("[\"a lie\"]"));
                }
            }
        }
        crowd.until_all_are(state);
        let met = Instant::now();
        while count(&server, code) <= before {
            assert!(met.elapsed() < PATIENCE, "{name} is never {code}");
            crowd.read(Duration::from_millis(20));
        }
        assert_eq!(crowd.value(), held, "{name}: what they hold is what it was");
        version += 1;
        if matches!(others, (None, None)) && state == "failing" {
            place.heal(version);
            server.reload(&well);
        } else {
            if let Some(impostor) = others.0.take() {
                assert_eq!(impostor.request_count(), 0, "{name}: nothing is said to a stranger");
            }
            drop(others);
            place.heal(version);
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
