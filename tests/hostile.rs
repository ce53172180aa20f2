//! Peers that mean harm, against the built server: it neither falls over, leaks, spins nor grows, and others are served on.

mod support;

use std::io::{ErrorKind, Read, Write};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;

use support::Upstream;
use support::server::{
    DRIVERS, PATIENCE, Server, Setup, bearer, client_frame, eventually, mint, now_s, token_of, upgrade_request,
};

/// What a server may hold with a few thousand peers at most, in KiB.
const MEMORY_KIB_MAX: u64 = 128 << 10;
/// Peers that connect and say nothing.
const SILENT_PEERS: usize = 1_000;

fn proc(server: &Server, name: &str) -> String {
    std::fs::read_to_string(format!("/proc/{}/{name}", server.pid())).expect("the process is there")
}

/// Its sockets: rings, event sets and bells are no peer's.
fn descriptors(server: &Server) -> usize {
    descriptor_names(server).iter().filter(|name| name.starts_with("socket:")).count()
}

/// What its descriptors are: for the message of a test that finds too many.
fn descriptor_names(server: &Server) -> Vec<String> {
    let folder = std::fs::read_dir(format!("/proc/{}/fd", server.pid())).expect("the process is there");
    let links = folder.flatten().filter_map(|entry| std::fs::read_link(entry.path()).ok());
    links.map(|link| link.display().to_string()).collect()
}

fn memory_kib_max(server: &Server) -> u64 {
    let status = proc(server, "status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a high-water mark");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// Processor time used so far, in hundredths of a second.
fn processor_time(server: &Server) -> u64 {
    let stat = proc(server, "stat");
    let fields: Vec<&str> = stat.rsplit_once(')').expect("a name").1.split_whitespace().collect();
    fields[11].parse::<u64>().expect("utime") + fields[12].parse::<u64>().expect("stime")
}

fn assert_unharmed(server: &Server) {
    assert_eq!(server.get("/healthz", &[]).status, 200);
    assert_eq!(server.metric(&["restcast_panics_total"]), 0.0);
    let memory = memory_kib_max(server);
    assert!(memory < MEMORY_KIB_MAX, "{memory} KiB at most");
}

/// Numbers without a pattern, the same in each run (xorshift64).
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn bytes(&mut self, most: u64) -> Vec<u8> {
        (0..=self.next() % most).map(|_| u8::try_from(self.next() & 0xff).expect("masked")).collect()
    }
}

#[test]
fn garbage_pipelines_and_churn_leave_no_trace() {
    for driver in DRIVERS {
        let upstream = Upstream::start();
        upstream.set_json("/leads", "[0]");
        let server = Setup::new()
            .driver(driver)
            .limits("auth_failures_per_minute = 0")
            .stream("leads", &upstream.url("/leads"), "")
            .start();
        let authorized = [bearer(&token_of("u1"))];
        // One that watches throughout, and is served throughout.
        let mut watcher = server.ws("/v1/streams/leads", &authorized);
        watcher.next_of("snapshot");
        let before = descriptors(&server);
        let mut noise = Noise(0x2545_f491_4f6c_dd1d);
        let upgrade = |path| upgrade_request(path, server.listen, &authorized);
        for round in 0..300u64 {
            let mut peer = server.connect();
            let mut bytes = match round % 6 {
                0 => Vec::new(),
                1 => b"GET / HTTP/1.1\r\n".to_vec(),
                2 => b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n".repeat(50),
                3 => {
                    b"POST /v1/connections/c_0/auth HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec()
                }
                4 => upgrade("/v1/streams/leads").into_bytes(),
                _ => upgrade("/v1/ws").into_bytes(),
            };
            if round % 6 > 3 {
                for _ in 0..noise.next() % 8 {
                    let opcode = u8::try_from(noise.next() % 16).expect("small");
                    bytes.extend(client_frame(noise.next().is_multiple_of(4), opcode, &noise.bytes(200)));
                    bytes.extend(client_frame(false, 1, br#"{"type":"subscribe","stream":"leads","max_rate_ms":1}"#));
                    bytes.extend(client_frame(false, 1, br#"{"type":"unsubscribe","stream":"leads"}"#));
                }
            }
            bytes.extend(noise.bytes(2_000));
            let _ = peer.try_send(&bytes);
            if round % 2 == 0 {
                // Some wait for an answer, others are gone before there is one.
                peer.hears_within(Duration::from_millis(20));
            }
            if round % 20 == 0 {
                upstream.set_json("/leads", &format!("[{}]", round + 1));
                watcher.next_of("snapshot");
            }
        }
        eventually("every socket is closed", || (descriptors(&server) <= before + 2).then_some(()));
        assert_unharmed(&server);
    }
}

#[test]
fn requests_that_must_wait_are_not_read_without_bound() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", "[1]");
    let server = Setup::new().stream("leads", &upstream.url("/leads"), "").start();
    let token = token_of("u1");
    let etag = server.get("/v1/streams/leads", &[bearer(&token)]).header("etag").expect("an ETag").to_owned();
    let peer = server.connect();
    let one = format!(
        "GET /v1/streams/leads HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\nIf-None-Match: {etag}\r\nPrefer: wait=1\r\n\r\n"
    );
    let many = one.repeat(200);
    peer.socket().set_nonblocking(true).expect("an option");
    let until = Instant::now() + Duration::from_secs(5);
    let (mut sent, mut answers) = (0, 0);
    let mut chunk = [0u8; 4096];
    while Instant::now() < until {
        match peer.socket().write(&many.as_bytes()[sent % one.len()..]) {
            Ok(count) => sent += count,
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        if let Ok(count) = peer.socket().read(&mut chunk) {
            answers += chunk[..count].windows(12).filter(|window| *window == b"HTTP/1.1 304").count();
        }
        thread::sleep(Duration::from_millis(5));
    }
    assert!(answers >= 3, "{answers} of them were answered, one a second");
    // Besides what the sockets hold (a few MiB at most), 256 KiB and one read wait in the server.
    let received = server.metric(&["restcast_received_bytes_total"]);
    assert!(received < f64::from(384 << 10), "{received} bytes were read, {sent} sent");
    assert_unharmed(&server);
}

#[test]
fn silent_and_slow_peers_are_cut_off_and_cost_nothing_meanwhile() {
    for driver in DRIVERS {
        let server = Setup::new().driver(driver).limits("handshake_timeout = \"4s\"").start();
        let before = descriptors(&server);
        let mut peers: Vec<_> = (0..SILENT_PEERS).map(|_| server.connect()).collect();
        eventually("all are accepted", || (descriptors(&server) >= before + SILENT_PEERS).then_some(()));
        for peer in &mut peers[..200] {
            peer.send(b"GET / HTTP/1.1\r\nX: ");
        }
        assert_eq!(server.get("/healthz", &[]).status, 200, "others are served");
        let until = Instant::now() + PATIENCE;
        while descriptors(&server) > before + 2 {
            assert!(
                Instant::now() < until,
                "{} descriptors, {before} before: {:?}\n{}",
                descriptors(&server),
                descriptor_names(&server),
                server.metrics()
            );
            for peer in &mut peers[..200] {
                let _ = peer.try_send(b"a");
            }
            thread::sleep(Duration::from_millis(100));
        }
        assert_unharmed(&server);
    }
}

#[test]
fn a_hundred_idle_connections_use_no_processor_time() {
    // Side by side: what counts is each process's own time.
    thread::scope(|scope| {
        for driver in DRIVERS {
            scope.spawn(move || {
                let server = Setup::new().driver(driver).start();
                let idle: Vec<_> = (0..100).map(|_| server.ws("/v1/ws", &[bearer(&token_of("u1"))])).collect();
                let used = || {
                    let before = processor_time(&server);
                    thread::sleep(Duration::from_secs(5));
                    processor_time(&server) - before
                };
                // The first seconds hold what the handshakes left to do: what counts is how little it can be.
                let least = used().min(used());
                assert!(least <= 10, "{driver}: {least} hundredths of a second in five");
                drop(idle);
            });
        }
    });
}

#[test]
fn a_storm_of_reloads_changes_nothing_and_sigterm_under_load_ends_in_time() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", "0");
    let setup = Setup::new().server("drain = \"3s\"").stream("leads", &upstream.url("/leads"), "");
    let mut server = setup.start();
    let mut watchers: Vec<_> = (0..50).map(|_| server.ws("/v1/streams/leads", &[bearer(&token_of("u1"))])).collect();
    let _silent: Vec<_> = (0..50).map(|_| server.ws("/v1/streams/leads", &[bearer(&token_of("u2"))])).collect();
    for round in 1..=200 {
        server.signal(Signal::HUP);
        if round % 20 == 0 {
            upstream.set_json("/leads", &round.to_string());
        }
        thread::sleep(Duration::from_millis(2));
    }
    for watcher in &mut watchers {
        let last = eventually("the newest value", || Some(watcher.next()).filter(|frame| frame["data"] == json!(200)));
        assert_eq!(last["type"], "snapshot");
    }
    assert_unharmed(&server);
    let told = Instant::now();
    server.signal(Signal::TERM);
    for watcher in &mut watchers {
        let (frames, close) = watcher.until_close();
        assert_eq!(close, (1012, "draining".to_owned()));
        assert!(frames.iter().any(|frame| frame["type"] == "reconnect"), "{frames:?}");
    }
    assert!(server.wait().success());
    assert!(told.elapsed() < Duration::from_secs(8), "{:?}", told.elapsed());
}

#[test]
fn a_reload_raises_the_limit_of_connections() {
    let setup = Setup::new();
    let with = |limit: u32| setup.clone().limits(&format!("connections = {limit}"));
    let server = with(2).start();
    // Each has been answered, so each has been accepted, whichever core it came to.
    let _held = [(); 2].map(|()| {
        let mut peer = server.connect();
        assert_eq!(peer.request("GET", "/healthz", &[], "").status, 200);
        peer
    });
    let refused = server.get("/healthz", &[]);
    assert_eq!(refused.status, 503);
    assert_eq!(refused.code(), "TOO_MANY_CONNECTIONS");
    assert!(refused.header("retry-after").is_some());
    server.reload(&with(10));
    eventually("the limit is another", || (server.get("/healthz", &[]).status == 200).then_some(()));
    assert_eq!(server.metric(&["restcast_connections_max"]), 10.0);
}

#[test]
fn gets_that_wait_count_for_the_streams_of_their_subject() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", "[1]");
    let url = format!("{}?r={{query.region}}", upstream.url("/leads"));
    let server = Setup::new().limits("streams_per_subject = 2").stream("leads", &url, "params = [\"region\"]").start();
    let token = mint(json!({ "sub": "u1", "exp": now_s() + 600 }));
    let etag = |region| {
        let answer = server.get(&format!("/v1/streams/leads?region={region}"), &[bearer(&token)]);
        (answer.status, answer.header("etag").map(str::to_owned))
    };
    let mut waiting = Vec::new();
    for region in ["eu", "us"] {
        let (status, tag) = etag(region);
        assert_eq!(status, 200, "what was answered counts no more");
        let mut peer = server.connect();
        let head = format!(
            "GET /v1/streams/leads?region={region} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\n\
             If-None-Match: {}\r\nPrefer: wait=60\r\n\r\n",
            tag.expect("an ETag")
        );
        peer.send(head.as_bytes());
        waiting.push(peer);
    }
    eventually("both wait", || (server.metric(&["restcast_connections", "json_wait"]) == 2.0).then_some(()));
    let third = server.get("/v1/streams/leads?region=asia", &[bearer(&token)]);
    assert_eq!((third.status, third.code().as_str()), (429, "TOO_MANY_STREAMS"));
    assert!(third.header("retry-after").is_some());
    assert_eq!(server.get("/v1/streams/leads?region=asia", &[bearer(&token_of("u2"))]).status, 200, "another's own");
    waiting.pop();
    eventually("one is gone", || (etag("asia").0 == 200).then_some(()));
}
