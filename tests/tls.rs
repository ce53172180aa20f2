//! `wss` and `https` on the public listener, against the built server, by rustls as a client.

mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ring::aead;
use rustix::process::{Resource, Signal, getrlimit, setrlimit};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::version::{TLS12, TLS13};
use rustls::{
    AlertDescription, ClientConfig, ClientConnection, ConnectionTrafficSecrets, DigitallySignedStruct, HandshakeKind,
    SignatureScheme, SupportedProtocolVersion,
};
use serde_json::json;
use socket2::SockRef;

use support::server::{
    DRIVERS, Heard, PATIENCE, Raw, Server, Setup, bearer, eventually, mint, now_s, run, token_of, upgrade_request,
};
use support::{Authority, Folder, Upstream, self_signed};

const BOTH: &[&SupportedProtocolVersion] = &[&TLS12, &TLS13];
const LEADS: &str = "/v1/streams/leads";

/// Certificates in files of the test's own.
struct Files {
    folder: Folder,
    authority: Authority,
}

impl Files {
    fn new() -> Files {
        Files { folder: Folder::new("tls"), authority: Authority::new() }
    }

    /// A certificate for `names` in files called `name`; the lines of `[[server.tls]]`.
    fn identity(&self, name: &str, names: &[&str]) -> String {
        let folder = self.folder.join(name);
        std::fs::create_dir_all(&folder).expect("a folder");
        let (cert, key) = self.authority.identity(names).write_pem(&folder);
        format!("[[server.tls]]\ncert = {cert:?}\nkey = {key:?}\n")
    }

    fn client(&self, versions: &[&'static SupportedProtocolVersion]) -> Arc<ClientConfig> {
        Arc::new(self.authority.client_config(versions))
    }
}

/// A server with a certificate for `localhost`, a stream `leads`, and clients for it.
struct House {
    files: Files,
    upstream: Upstream,
    setup: Setup,
    server: Server,
    client: Arc<ClientConfig>,
}

impl House {
    fn new(driver: &str) -> House {
        House::with(driver, |setup| setup)
    }

    fn with(driver: &str, change: impl FnOnce(Setup) -> Setup) -> House {
        let files = Files::new();
        let upstream = Upstream::start();
        upstream.set_json("/leads", &value(1));
        let setup = change(Setup::new().driver(driver).stream("leads", &upstream.url("/leads"), ""));
        let setup = setup.server(&files.identity("localhost", &["localhost"]));
        let (server, client) = (setup.start(), files.client(BOTH));
        House { files, upstream, setup, server, client }
    }

    fn connect(&self) -> Raw {
        self.server.connect().secured(&self.client, "localhost")
    }

    fn handshakes(&self, result: &str) -> f64 {
        self.server.metric(&["restcast_tls_handshakes_total{", &format!("\"{result}\"")])
    }
}

/// A value so long that a change of `a` is told by a patch.
fn value(a: u64) -> String {
    json!({ "a": a, "pad": "-".repeat(200) }).to_string()
}

/// The same, parsed.
fn parsed(a: u64) -> serde_json::Value {
    serde_json::from_str(&value(a)).expect("JSON")
}

/// Reads to the end: the bytes, and whether it was a clean one (close_notify).
fn read_to_end(raw: &mut TcpStream, tls: &mut ClientConnection) -> (Vec<u8>, bool) {
    // The pace of a slow reader: its socket is full most of the time.
    read_slowly(raw, tls, 16 << 10, Duration::from_millis(4))
}

/// The same, so many bytes after each pause.
fn read_slowly(raw: &mut TcpStream, tls: &mut ClientConnection, bytes: usize, pause: Duration) -> (Vec<u8>, bool) {
    let (mut all, until) = (Vec::new(), Instant::now() + PATIENCE);
    let mut stream = rustls::Stream::new(tls, raw);
    loop {
        let mut chunk = vec![0; bytes];
        std::thread::sleep(pause);
        match stream.read(&mut chunk) {
            Ok(0) => return (all, true),
            Ok(count) => all.extend_from_slice(&chunk[..count]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                assert!(Instant::now() < until, "it does not end");
            }
            Err(_) => return (all, false),
        }
    }
}

/// What a socket gives until its end.
fn raw_rest(raw: Raw) -> Vec<u8> {
    let mut raw = raw;
    raw.rest()
}

/// The alert in `bytes`, the last record.
fn alert(bytes: &[u8]) -> Option<AlertDescription> {
    let record = bytes.len().checked_sub(7).map(|at| &bytes[at..])?;
    (record[0] == 21 && record[3..5] == [0, 2]).then(|| AlertDescription::from(record[6]))
}

#[test]
fn every_representation_travels_over_each_version_of_tls() {
    for driver in DRIVERS {
        for version in BOTH {
            let mut house = House::new(driver);
            house.client = house.files.client(&[version]);
            let token = bearer(&token_of("u1"));
            let mut raw = house.connect();
            assert_eq!(raw.tls().protocol_version(), Some(version.version));
            assert_eq!(raw.tls().alpn_protocol(), Some(&b"http/1.1"[..]));
            for _ in 0..2 {
                let answer = raw.request("GET", LEADS, std::slice::from_ref(&token), "");
                assert_eq!((answer.status, answer.json()), (200, parsed(1)), "kept alive");
            }
            let mut ws = house.connect().ws(LEADS, std::slice::from_ref(&token));
            assert_eq!(ws.next()["type"], "welcome");
            assert_eq!(ws.next()["data"], parsed(1));
            let mut sse = house.connect().sse(LEADS, std::slice::from_ref(&token));
            assert_eq!(sse.next_of("snapshot").data["data"], parsed(1));
            for a in 2..20 {
                house.upstream.set_json("/leads", &value(a));
                assert_eq!(ws.next_of("patch")["patch"][0]["value"], a);
                assert_eq!(sse.next_of("patch").data["patch"][0]["value"], a);
            }
            let mut many = house.connect().ws("/v1/ws", std::slice::from_ref(&token));
            many.send(json!({ "type": "subscribe", "stream": "leads", "id": 1 }));
            assert_eq!(many.next_of("snapshot")["data"], parsed(19));
            assert_eq!(house.handshakes("full") + house.handshakes("resumed"), 4.0);
            assert_eq!(house.handshakes("failed"), 0.0);
        }
    }
}

#[test]
fn a_client_without_http_1_1_is_told_so() {
    let house = House::new("auto");
    let mut config = house.files.authority.client_config(BOTH);
    config.alpn_protocols = vec![b"h2".to_vec()];
    let error = house.server.connect().try_secured(&Arc::new(config), "localhost").err().expect("refused");
    assert!(error.to_string().contains("NoApplicationProtocol"), "{error}");
    let mut config = house.files.authority.client_config(BOTH);
    config.alpn_protocols.clear();
    let mut silent = house.server.connect().secured(&Arc::new(config), "localhost");
    assert_eq!(silent.request("GET", "/healthz", &[], "").status, 200, "who offers nothing speaks HTTP/1.1");
    eventually("it is counted", || (house.handshakes("failed") == 1.0).then_some(()));
}

#[test]
fn the_name_chooses_among_certificates() {
    let files = Files::new();
    let all = [
        files.identity("first", &["first.test"]),
        files.identity("second", &["second.test", "*.wild.test"]),
        files.identity("third", &["third.test"]),
    ];
    let server = Setup::new().server(&all.concat()).start();
    let client = files.client(BOTH);
    for name in ["first.test", "second.test", "x.wild.test", "third.test"] {
        let mut raw = server.connect().secured(&client, name);
        assert_eq!(raw.request("GET", "/healthz", &[], "").status, 200, "{name}");
    }
    // Whoever names none of them, or no name at all, gets the first.
    for name in ["elsewhere.test", "127.0.0.1"] {
        let error = server.connect().try_secured(&client, name).err().expect("another's certificate");
        assert!(error.to_string().contains("first.test"), "{error}");
    }
}

#[test]
fn a_ticket_resumes_on_every_core_and_after_a_reload() {
    for version in BOTH {
        let mut house = House::with("auto", |setup| setup.cores(2));
        house.client = house.files.client(&[version]);
        let kind = |house: &House| {
            let mut raw = house.connect();
            // The ticket of TLS 1.3 comes behind the handshake.
            assert_eq!(raw.request("GET", "/healthz", &[], "").status, 200);
            raw.tls().handshake_kind().expect("it is done")
        };
        assert_eq!(kind(&house), HandshakeKind::Full);
        for _ in 0..12 {
            assert_eq!(kind(&house), HandshakeKind::Resumed, "whichever core has accepted");
        }
        house.server.reload(&house.setup);
        assert_eq!(kind(&house), HandshakeKind::Resumed, "after a reload");
        // Another certificate: the ticket is as good as it was.
        house.files.identity("localhost", &["localhost"]);
        house.server.reload(&house.setup);
        assert_eq!(kind(&house), HandshakeKind::Resumed, "after a reload with another certificate");
        assert_eq!((house.handshakes("full"), house.handshakes("resumed")), (1.0, 14.0));
    }
}

#[test]
fn certificates_are_read_again_and_no_connection_notices() {
    for driver in DRIVERS {
        let house = House::new(driver);
        let presented = || {
            let mut raw = house.server.connect().secured(&house.files.client(BOTH), "localhost");
            raw.tls().peer_certificates().expect("one")[0].to_vec()
        };
        let mut ws = house.connect().ws(LEADS, &[bearer(&token_of("u1"))]);
        ws.next_of("snapshot");
        let first = presented();
        house.files.identity("localhost", &["localhost"]);
        assert_eq!(presented(), first, "files are read on SIGHUP alone");
        house.server.reload(&house.setup);
        let second = presented();
        assert_ne!(second, first);
        house.upstream.set_json("/leads", &value(2));
        assert_eq!(ws.next_of("patch")["seq"], 2, "it goes on");
        // A key that is another's, a certificate that is none: said, and the old ones stay.
        let folder = house.files.folder.join("localhost");
        let key = std::fs::read(folder.join("key.pem")).expect("the key");
        self_signed(&["other.test"]).write_pem(&house.files.folder);
        std::fs::copy(house.files.folder.join("key.pem"), folder.join("key.pem")).expect("copied");
        house.server.reload(&house.setup);
        let line = house.server.wait_for_log("The configuration is not taken", 1);
        assert!(line.contains("key.pem") && line.contains("another certificate"), "{line}");
        assert_eq!(presented(), second);
        std::fs::write(folder.join("key.pem"), key).expect("written");
        std::fs::write(folder.join("cert.pem"), "nothing").expect("written");
        house.server.reload(&house.setup);
        let line = house.server.wait_for_log("The configuration is not taken", 2);
        assert!(line.contains("cert.pem"), "{line}");
        assert_eq!(presented(), second);
        house.upstream.set_json("/leads", &value(3));
        assert_eq!(ws.next_of("patch")["seq"], 3, "it goes on");
    }
}

#[test]
fn a_reload_does_not_turn_tls_off() {
    let house = House::new("auto");
    let plain = Setup::new().driver("auto").stream("leads", &house.upstream.url("/leads"), "");
    house.server.reload(&plain);
    house.server.wait_for_log("take effect at the next start", 1);
    let token = token_of("u1");
    let same = ("Origin", format!("https://{}", house.server.listen));
    let headers = [("Cookie", format!("restcast_token={token}")), same];
    assert_eq!(house.connect().request("GET", LEADS, &headers, "").status, 200, "and clients still see https");
}

#[test]
fn check_names_the_file_and_says_what_to_do() {
    let files = Files::new();
    let good = files.identity("good", &["good.test"]);
    let other = files.identity("other", &["other.test"]);
    let (status, out, err) = run(&["check"], &Setup::new().server(&good));
    assert!(status.success() && out.contains("[[server.tls]]\ncert = "), "{out}{err}");
    assert!(!out.contains("PRIVATE KEY") && !err.contains("PRIVATE KEY"));
    let swapped = good.lines().take(2).chain(other.lines().skip(2)).collect::<Vec<_>>().join("\n");
    for (lines, file, what) in [
        (swapped.as_str(), "other/key.pem", "holds the key of another certificate"),
        ("[[server.tls]]\ncert = \"nope.pem\"\nkey = \"nope.pem\"", "nope.pem", "does not exist"),
        ("[[server.tls]]\ncert = \"nope.pem\"", "server.tls.key", "is missing here"),
        (&good.replace("key.pem", "cert.pem"), "good/cert.pem", "holds no private key"),
        (&good.replace("cert.pem", "key.pem"), "good/key.pem", "holds no PEM certificate"),
    ] {
        let (status, out, err) = run(&["check"], &Setup::new().server(lines));
        assert!(!status.success() && out.is_empty(), "{lines}");
        assert!(err.contains(file) && err.contains(what), "{lines}: {err}");
    }
    // Beyond loopback TLS takes the place of `plaintext`.
    let open = Setup::new().server("listen = \"0.0.0.0:0\"");
    let (status, _, err) = run(&["check"], &open);
    assert!(!status.success() && err.contains("[[server.tls]]"), "{err}");
    assert!(run(&["check"], &open.server(&good)).0.success());
    let (status, _, err) = run(&["check"], &Setup::new().server("plaintext = true").server(&good));
    assert!(status.success() && err.contains("`server.plaintext` has no effect"), "{err}");
}

#[test]
fn a_page_of_this_server_is_https() {
    let house = House::new("auto");
    let cookie = ("Cookie", format!("restcast_token={}", token_of("u1")));
    for (origin, status) in [("https", 200), ("http", 403)] {
        let origin = ("Origin", format!("{origin}://{}", house.server.listen));
        let answer = house.connect().request("GET", LEADS, &[cookie.clone(), origin], "");
        assert_eq!(answer.status, status, "{answer:?}");
    }
}

/// A value of about `bytes`, which names itself.
fn large(n: usize, bytes: usize) -> String {
    let rows: Vec<String> =
        (0..bytes / 32).map(|row| format!("\"{n:08}-{row:012}-{:06}\"", row * 7 % 999_983)).collect();
    format!("{{\"n\":{n},\"rows\":[{}]}}", rows.join(","))
}

#[test]
fn a_large_value_reaches_a_slow_reader_byte_by_byte() {
    for driver in DRIVERS {
        for version in BOTH {
            let mut house = House::new(driver);
            house.client = house.files.client(&[version]);
            let value = large(1, 4 << 20);
            house.upstream.set_json("/leads", &value);
            let token = bearer(&token_of("u1"));
            let raw = house.server.connect();
            SockRef::from(raw.socket()).set_recv_buffer_size(128 << 10).expect("an option");
            let mut raw = raw.secured(&house.client, "localhost");
            // The first value was another's; it is asked for until it is the large one.
            let text = eventually("the large value", || {
                let text = raw.request("GET", LEADS, std::slice::from_ref(&token), "").text();
                (text.len() > 1_000).then_some(text)
            });
            assert!(text == value, "{} bytes came of {}", text.len(), value.len());
            let mut ws = house.connect().ws(LEADS, std::slice::from_ref(&token));
            assert_eq!(
                ws.next_of("snapshot")["data"],
                serde_json::from_str::<serde_json::Value>(&value).expect("JSON")
            );
            // In small pieces: the kernel's window is full again and again.
            let raw = house.server.connect();
            SockRef::from(raw.socket()).set_recv_buffer_size(128 << 10).expect("an option");
            let mut raw = raw.secured(&house.client, "localhost");
            raw.send(format!("GET {LEADS} HTTP/1.1\r\nHost: x\r\n{}: {}\r\n\r\n", token.0, token.1).as_bytes());
            let head = raw.head();
            let length: usize = head.header("content-length").expect("a length").parse().expect("a number");
            let mut body = Vec::new();
            while body.len() < length {
                body.extend(raw.take((length - body.len()).min(1_021)));
            }
            assert!(body == value.as_bytes());
        }
    }
}

#[test]
fn a_reader_that_half_closes_gets_its_answer_to_the_last_byte() {
    let house = House::new("auto");
    // Whether the last record meets a full socket depends on the size: with one of these it does.
    for more in 0..10 {
        half_closes_and_reads(&house, &large(more, (600 << 10) + more * 7_000));
    }
}

#[test]
fn the_end_of_an_answer_reaches_a_slow_reader_long_after_the_server_is_done_with_it() {
    let house = House::new("auto");
    let value = large(1, 300 << 10);
    house.upstream.set_json("/leads", &value);
    let token = token_of("u1");
    eventually("the value is held", || {
        let answer = house.connect().request("GET", LEADS, &[bearer(&token)], "");
        (answer.body == value.as_bytes()).then_some(())
    });
    let mut socket = TcpStream::connect(house.server.listen).expect("it accepts");
    SockRef::from(&socket).set_recv_buffer_size(64 << 10).expect("an option");
    socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let name = "localhost".try_into().expect("a name");
    let mut tls = ClientConnection::new(Arc::clone(&house.client), name).expect("a client");
    let mut stream = rustls::Stream::new(&mut tls, &mut socket);
    let request =
        format!("GET {LEADS} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {token}\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("sent");
    let (all, clean) = read_slowly(&mut socket, &mut tls, 8 << 10, Duration::from_millis(150));
    assert!(all.ends_with(value.as_bytes()) && clean, "{} bytes, clean: {clean}", all.len());
}

/// Asks for the value, ends its side, and reads more slowly than the server sends.
fn half_closes_and_reads(house: &House, value: &str) {
    house.upstream.set_json("/leads", value);
    let token = token_of("u1");
    eventually("the value is held", || {
        let answer = house.connect().request("GET", LEADS, &[bearer(&token)], "");
        (answer.body == value.as_bytes()).then_some(())
    });
    let mut socket = TcpStream::connect(house.server.listen).expect("it accepts");
    SockRef::from(&socket).set_recv_buffer_size(64 << 10).expect("an option");
    socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let name = "localhost".try_into().expect("a name");
    let mut tls = ClientConnection::new(Arc::clone(&house.client), name).expect("a client");
    let mut stream = rustls::Stream::new(&mut tls, &mut socket);
    let request = format!("GET {LEADS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n");
    stream.write_all(request.as_bytes()).expect("sent");
    tls.send_close_notify();
    while tls.wants_write() {
        tls.write_tls(&mut socket).expect("sent");
    }
    let (all, clean) = read_to_end(&mut socket, &mut tls);
    assert!(all.ends_with(value.as_bytes()) && clean, "{} bytes, clean: {clean}", all.len());
}

#[test]
fn a_full_socket_that_is_read_in_time_gets_its_close_frame() {
    for driver in DRIVERS {
        let history = "history_bytes = \"512KiB\"\ninterval = \"10ms\"";
        let files = Files::new();
        let upstream = Upstream::start();
        upstream.set_json("/leads", &large(0, 60 << 10));
        let setup =
            Setup::new().driver(driver).jwt("leeway = \"0s\"").stream("leads", &upstream.url("/leads"), history);
        let server = setup.server(&files.identity("localhost", &["localhost"])).start();
        let client = files.client(BOTH);
        // A second is all the time there is after the end: a busy machine may miss it, but not again and again.
        let told = (0..5).any(|_| is_told_of_its_end(&upstream, &server, &client));
        assert!(told, "nothing but resets");
    }
}

/// Stalls over the end of its token, and reads on then: whether everything came in whole records, and the close frame last.
fn is_told_of_its_end(upstream: &Upstream, server: &Server, client: &Arc<ClientConfig>) -> bool {
    let before = server.metric(&["restcast_expiries_total"]);
    let token = mint(json!({ "sub": "u1", "exp": now_s() + 4 }));
    let raw = server.connect();
    SockRef::from(raw.socket()).set_recv_buffer_size(128 << 10).expect("an option");
    let mut raw = raw.secured(client, "localhost");
    assert_eq!(raw.upgrade(LEADS, &[bearer(&token)]).status, 101);
    let mut n = 0;
    while server.metric(&["restcast_expiries_total"]) == before {
        n += 1;
        upstream.set_json("/leads", &large(n, 60 << 10));
    }
    let bytes = raw.rest();
    let mut left = &bytes[..];
    loop {
        let (head, length) = match left {
            [_, 127, ..] if left.len() >= 10 => {
                (10, u64::from_be_bytes(left[2..10].try_into().expect("eight")) as usize)
            }
            [_, 126, ..] if left.len() >= 4 => (4, usize::from(u16::from_be_bytes([left[2], left[3]]))),
            [_, length @ ..=125, ..] => (2, usize::from(*length)),
            _ => return false,
        };
        if left.len() < head + length {
            return false;
        }
        let payload = &left[head..head + length];
        match left[0] & 0x0f {
            8 => {
                assert_eq!(
                    (u16::from_be_bytes([payload[0], payload[1]]), &payload[2..]),
                    (4001, &b"token_expired"[..])
                );
                assert_eq!(left.len(), head + length, "the close frame is the last");
                return true;
            }
            1 => {
                drop(serde_json::from_slice::<serde_json::Value>(payload).expect("a frame that has begun is finished"))
            }
            _ => {}
        }
        left = &left[head + length..];
    }
}

#[test]
fn a_socket_that_takes_nothing_is_closed_over_tls_too() {
    for driver in DRIVERS {
        let house = House::with(driver, |setup| setup.limits("write_stall = \"1s\""));
        let token = bearer(&token_of("u1"));
        let raw = house.server.connect();
        SockRef::from(raw.socket()).set_recv_buffer_size(128 << 10).expect("an option");
        let mut slow = raw.secured(&house.client, "localhost").ws(LEADS, std::slice::from_ref(&token));
        slow.next_of("snapshot");
        let mut healthy = house.connect().ws(LEADS, std::slice::from_ref(&token));
        healthy.next_of("snapshot");
        let (mut n, until) = (0, Instant::now() + PATIENCE);
        while house.server.metric(&["restcast_closes_total", "1013", "write_stall"]) < 1.0 {
            assert!(Instant::now() < until, "it is never closed");
            n += 1;
            house.upstream.set_json("/leads", &large(n, 60 << 10));
            while healthy.next()["ts"].is_null() {}
        }
        house.upstream.set_json("/leads", r#"{"a":"last"}"#);
        let last = |frame: &serde_json::Value| frame.to_string().contains("last");
        while !last(&healthy.next()) {}
    }
}

#[test]
fn a_proxy_tells_the_client_before_tls() {
    for driver in DRIVERS {
        let house = House::with(driver, |setup| {
            setup.server("trusted_proxies = [\"127.0.0.1\"]").limits("connections_per_address = 1")
        });
        let token = token_of("u1");
        let header = |client: [u8; 4]| {
            let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".to_vec();
            header.extend(client.into_iter().chain([10, 0, 0, 1, 4, 0, 1, 187]));
            header
        };
        let begin = |header: &[u8], piece: usize| {
            let mut raw = house.server.connect();
            for piece in header.chunks(piece.max(1)) {
                raw.send(piece);
            }
            raw.try_secured(&house.client, "localhost")
        };
        let open = |header: &[u8], piece: usize| {
            let mut raw = begin(header, piece).expect("a handshake");
            let answer = raw.upgrade(LEADS, &[bearer(&token)]);
            (answer.status, raw)
        };
        let (status, first) = open(&header([192, 0, 2, 1]), 100);
        assert_eq!(status, 101);
        let refused = begin(&header([192, 0, 2, 1]), 100).err().expect("one a client");
        assert!(refused.to_string().contains("InternalError"), "before any cryptography: {refused}");
        assert_eq!(house.handshakes("refused"), 1.0);
        let (status, second) = open(&header([192, 0, 2, 2]), 1);
        assert_eq!(status, 101, "another client, byte by byte");
        // A health check, and one with more than addresses.
        assert_eq!(open(b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0", 100).0, 101);
        drop((first, second));
        eventually("they are gone", || {
            (house.server.metric(&["restcast_connections{", "\"ws\""]) == 0.0).then_some(())
        });
        let mut long = header([192, 0, 2, 3]);
        long[15] = 12 + 5;
        long.extend(*b"\x04\0\x02ab");
        assert_eq!(open(&long, 7).0, 101, "with a TLV");
        // Without a header the client is the peer.
        assert_eq!(open(b"", 100).0, 101);
        // Within TLS it is no header.
        let mut inside = house.connect();
        inside.send(&header([192, 0, 2, 9]));
        assert_eq!(inside.answer().status, 400);
        // A bad one is told so in the clear.
        let mut bad = house.server.connect();
        bad.send(b"\r\n\r\n\0\r\nQUIT\n\x31\x11\0\x0c000000000000");
        assert_eq!(bad.answer().status, 400);
        assert!(bad.is_closed());
    }
}

#[test]
fn a_stranger_has_no_proxy_header() {
    let house = House::with("auto", |setup| setup.server("trusted_proxies = [\"192.0.2.0/24\"]"));
    let mut raw = house.server.connect();
    raw.send(b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\x02\x01\x0a\0\0\x01\x04\0\x01\xbb");
    assert_eq!(alert(&raw_rest(raw)), Some(AlertDescription::DecodeError));
}

#[test]
fn http_in_the_clear_is_told_where_it_is() {
    for driver in DRIVERS {
        let house = House::new(driver);
        let mut raw = house.server.connect();
        let answer = raw.request("GET", "/healthz", &[], "");
        assert_eq!((answer.status, answer.code()), (400, "BAD_REQUEST".to_owned()));
        assert!(answer.text().contains("https://") && answer.header("connection") == Some("close"), "{answer:?}");
        assert!(raw.is_closed());
        // A long one, which comes in pieces: what is not read does not cost the answer.
        let mut raw = house.server.connect();
        raw.send(upgrade_request("/v1/ws", house.server.listen, &[("X-Filler", "x".repeat(100_000))]).as_bytes());
        assert_eq!(raw.answer().status, 400);
        eventually("both are counted", || (house.handshakes("not_tls") == 2.0).then_some(()));
    }
}

#[test]
fn a_handshake_may_come_byte_by_byte() {
    for driver in DRIVERS {
        for version in BOTH {
            let house = House::new(driver);
            let mut socket = TcpStream::connect(house.server.listen).expect("it accepts");
            socket.set_nodelay(true).expect("an option");
            socket.set_read_timeout(Some(Duration::from_millis(20))).expect("a timeout");
            let name = "localhost".try_into().expect("a name");
            let mut tls = ClientConnection::new(house.files.client(&[version]), name).expect("a client");
            let request = format!(
                "GET {LEADS} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {}\r\n\r\n",
                token_of("u1")
            );
            let mut asked = false;
            let until = Instant::now() + PATIENCE;
            let mut body = Vec::new();
            loop {
                assert!(Instant::now() < until, "{body:?}");
                if !tls.is_handshaking() && !asked {
                    tls.writer().write_all(request.as_bytes()).expect("buffered");
                    asked = true;
                }
                let mut out = Vec::new();
                while tls.wants_write() {
                    tls.write_tls(&mut out).expect("to memory");
                }
                for byte in out {
                    socket.write_all(&[byte]).expect("sent");
                }
                match tls.read_tls(&mut socket) {
                    Ok(0) => break,
                    Ok(_) => drop(tls.process_new_packets().expect("TLS")),
                    Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                    Err(error) => panic!("{error}"),
                }
                let _ = tls.reader().read_to_end(&mut body);
            }
            let text = String::from_utf8(body).expect("text");
            assert!(text.starts_with("HTTP/1.1 200") && text.ends_with(&value(1)), "{text}");
        }
    }
}

#[test]
fn what_is_no_handshake_gets_an_alert_and_costs_nobody_else() {
    for driver in DRIVERS {
        let house = House::new(driver);
        let mut ws = house.connect().ws(LEADS, &[bearer(&token_of("u1"))]);
        ws.next_of("snapshot");
        let mut failures = 0;
        for (bytes, wanted) in [
            // A record that is no handshake, one longer than may be, a hello cut short by its own length, another version.
            (b"\x17\x03\x03\0\x05hello".to_vec(), AlertDescription::UnexpectedMessage),
            (b"\x16\x03\x01\xff\xff\x01".to_vec(), AlertDescription::DecodeError),
            (b"\x16\x03\x01\0\x04\x01\0\0\0".to_vec(), AlertDescription::DecodeError),
            (b"\0\0\0\0\0\0\0\0".to_vec(), AlertDescription::DecodeError),
            (b"\xff".repeat(100), AlertDescription::DecodeError),
        ] {
            let mut raw = house.server.connect();
            raw.send(&bytes);
            assert_eq!(alert(&raw_rest(raw)), Some(wanted), "{bytes:?}");
            failures += 1;
        }
        // Noise behind a good beginning.
        let mut seed = 7u64;
        for _ in 0..200 {
            let mut bytes = b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03".to_vec();
            bytes.extend((0..700).map(|_| {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (seed >> 56) as u8
            }));
            let mut raw = house.server.connect();
            raw.send(&bytes);
            assert!(alert(&raw_rest(raw)).is_some());
            failures += 1;
        }
        // A handshake message that goes on for ever, in records that are none too long.
        let mut raw = house.server.connect();
        let mut endless = b"\x16\x03\x01\x10\x00\x01\0\xff\xff".to_vec();
        endless.resize(5 + 4096, 0);
        let _ = raw.try_send(&endless);
        for _ in 0..8 {
            let mut more = b"\x16\x03\x01\x10\0".to_vec();
            more.resize(5 + 4096, 0);
            let _ = raw.try_send(&more);
        }
        let _ = raw_rest(raw);
        failures += 1;
        eventually("each is counted", || (house.handshakes("failed") == f64::from(failures)).then_some(()));
        house.upstream.set_json("/leads", &value(2));
        assert_eq!(ws.next_of("patch")["seq"], 2);
        assert_eq!(house.server.metric(&["restcast_panics_total"]), 0.0);
    }
}

#[test]
fn garbage_behind_the_handshake_ends_the_connection_with_an_alert() {
    for version in BOTH {
        let house = House::new("auto");
        let client = house.files.client(&[version]);
        let ws = house.server.connect().secured(&client, "localhost").ws(LEADS, &[bearer(&token_of("u1"))]);
        let mut socket = ws.socket().try_clone().expect("a socket");
        socket.write_all(b"\x17\x03\x03\0\x20it is not what it says it is !!!").expect("sent");
        let gone = || house.server.metric(&["restcast_closes_total", "1006", "gone"]);
        eventually("it is gone", || (gone() == 1.0).then_some(()));
        let mut ws = ws;
        loop {
            match ws.heard() {
                Heard::End => break,
                Heard::Close(..) => panic!("a close frame for one who cannot be read"),
                _ => {}
            }
        }
        assert_eq!(house.server.metric(&["restcast_panics_total"]), 0.0);
    }
}

#[test]
fn a_handshake_that_does_not_end_is_cut_off() {
    for driver in DRIVERS {
        let house = House::with(driver, |setup| setup.limits("handshake_timeout = \"700ms\""));
        let name = "localhost".try_into().expect("a name");
        let mut tls = ClientConnection::new(Arc::clone(&house.client), name).expect("a client");
        let mut hello = Vec::new();
        tls.write_tls(&mut hello).expect("to memory");
        // Nothing, half a hello, a whole one whose answer is not answered.
        for (bytes, failed) in [(&hello[..0], 0.0), (&hello[..hello.len() / 2], 1.0), (&hello[..], 2.0)] {
            let begun = Instant::now();
            let mut raw = house.server.connect();
            raw.send(bytes);
            drop(raw.rest());
            let took = begun.elapsed();
            assert!(took >= Duration::from_millis(600), "{took:?}");
            eventually("it is counted", || (house.handshakes("failed") == failed).then_some(()));
        }
        // And a handshake that is done, but no request.
        let begun = Instant::now();
        let mut raw = house.connect();
        assert!(raw.is_closed());
        assert!(begun.elapsed() >= Duration::from_millis(600));
    }
}

#[test]
fn a_drain_ends_each_connection_in_order() {
    for driver in DRIVERS {
        let mut house = House::with(driver, |setup| setup.server("drain = \"3s\""));
        let token = bearer(&token_of("u1"));
        let mut ws = house.connect().ws(LEADS, std::slice::from_ref(&token));
        ws.next_of("snapshot");
        let mut sse = house.connect().sse(LEADS, std::slice::from_ref(&token));
        sse.next_of("snapshot");
        let idle = house.connect();
        let unfinished = house.server.connect();
        house.server.signal(Signal::TERM);
        let (frames, close) = ws.until_close();
        assert_eq!((frames.last().expect("a frame")["type"].as_str(), close.0), (Some("reconnect"), 1012));
        assert_eq!(sse.next_of("close").data["code"], 1012);
        assert_eq!(sse.next(), None);
        drop((ws, sse, idle, unfinished));
        assert!(house.server.wait().success());
    }
}

#[test]
fn the_end_of_an_answer_is_told_by_close_notify() {
    for version in BOTH {
        let house = House::new("auto");
        let mut socket = TcpStream::connect(house.server.listen).expect("it accepts");
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let name = "localhost".try_into().expect("a name");
        let mut tls = ClientConnection::new(house.files.client(&[version]), name).expect("a client");
        let mut stream = rustls::Stream::new(&mut tls, &mut socket);
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("sent");
        let (all, clean) = read_to_end(&mut socket, &mut tls);
        assert!(all.starts_with(b"HTTP/1.1 200") && clean);
    }
}

#[test]
fn the_clients_close_notify_ends_its_connection() {
    let house = House::new("auto");
    let mut ws = house.connect().ws(LEADS, &[bearer(&token_of("u1"))]);
    ws.next_of("snapshot");
    ws.tls().send_close_notify();
    let mut socket = ws.socket().try_clone().expect("a socket");
    while ws.tls().wants_write() {
        ws.tls().write_tls(&mut socket).expect("sent");
    }
    eventually("it is gone", || (house.server.metric(&["restcast_connections{", "\"ws\""]) == 0.0).then_some(()));
    assert_eq!(house.server.metric(&["restcast_closes_total", "1006", "gone"]), 1.0);
}

#[test]
fn keys_are_changed_under_way() {
    for driver in DRIVERS {
        let mut house = House::new(driver);
        house.client = house.files.client(&[&TLS13]);
        let mut ws = house.connect().ws("/v1/ws", &[bearer(&token_of("u1"))]);
        ws.next_of("welcome");
        for round in 0..20 {
            ws.tls().refresh_traffic_keys().expect("TLS 1.3 has it");
            ws.send(json!({ "type": "subscribe", "stream": "leads", "id": round }));
            ws.next_of("snapshot");
            ws.send(json!({ "type": "unsubscribe", "stream": "leads", "id": round }));
            ws.next_of("unsubscribed");
        }
        assert_eq!(house.handshakes("full"), 1.0);
    }
}

/// A record of TLS 1.3 that holds `plain` as handshake bytes.
fn handshake_record((seq, secrets): &(u64, ConnectionTrafficSecrets), plain: &[u8]) -> Vec<u8> {
    let (algorithm, key, iv) = match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&aead::AES_128_GCM, key, iv),
        ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&aead::AES_256_GCM, key, iv),
        ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&aead::CHACHA20_POLY1305, key, iv),
        _ => panic!("no suite of TLS 1.3"),
    };
    // RFC 8446 5.3: the sequence number, padded on the left, and the IV.
    let mut nonce: [u8; 12] = iv.as_ref().try_into().expect("12 bytes");
    nonce[4..].iter_mut().zip(seq.to_be_bytes()).for_each(|(byte, of)| *byte ^= of);
    let mut inner = [plain, &[22]].concat();
    let length = u8::try_from(inner.len() + 16).expect("short");
    let header = [23, 3, 3, 0, length];
    let key = aead::LessSafeKey::new(aead::UnboundKey::new(algorithm, key.as_ref()).expect("a key"));
    let nonce = aead::Nonce::assume_unique_for_key(nonce);
    key.seal_in_place_append_tag(nonce, aead::Aad::from(header), &mut inner).expect("sealed");
    [&header[..], &inner].concat()
}

#[test]
fn frames_go_out_while_half_a_key_update_has_come() {
    for driver in DRIVERS {
        let house = House::new(driver);
        let mut config = house.files.authority.client_config(&[&TLS13]);
        config.enable_secret_extraction = true;
        let mut socket = TcpStream::connect(house.server.listen).expect("it accepts");
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let name = "localhost".try_into().expect("a name");
        let mut tls = ClientConnection::new(Arc::new(config), name).expect("a client");
        let mut stream = rustls::Stream::new(&mut tls, &mut socket);
        let request = upgrade_request(LEADS, house.server.listen, &[bearer(&token_of("u1"))]);
        stream.write_all(request.as_bytes()).expect("sent");
        let mut heard = Vec::new();
        while !heard.windows(8).any(|window| window == b"snapshot") {
            let mut chunk = [0; 4096];
            let count = stream.read(&mut chunk).expect("the stream opens");
            heard.extend_from_slice(&chunk[..count]);
        }
        let secrets = tls.dangerous_extract_secrets().expect("they are let out");
        // RFC 8446 4.6.3: type 24, three bytes of length, update_not_requested.
        let update = [24, 0, 0, 1, 0];
        socket.write_all(&handshake_record(&secrets.tx, &update[..3])).expect("sent");
        for a in 2..5 {
            house.upstream.set_json("/leads", &value(a));
            let mut record = [0; 5];
            socket.read_exact(&mut record).expect("a frame");
            assert_eq!(record[0], 23, "application data");
            let mut rest = vec![0; usize::from(u16::from_be_bytes([record[3], record[4]]))];
            socket.read_exact(&mut rest).expect("all of it");
        }
        let second = (secrets.tx.0 + 1, secrets.tx.1);
        socket.write_all(&handshake_record(&second, &update[3..])).expect("sent");
        house.upstream.set_json("/leads", &value(5));
        socket.read_exact(&mut [0; 5]).expect("it goes on");
        assert_eq!(house.server.metric(&["restcast_panics_total"]), 0.0);
        assert_eq!(house.server.metric(&["restcast_subscriptions"]), 1.0);
    }
}

#[test]
fn many_handshakes_at_once_all_get_their_turn() {
    for driver in DRIVERS {
        let house = House::with(driver, |setup| setup.cores(1));
        let mut ws = house.connect().ws(LEADS, &[bearer(&token_of("u1"))]);
        ws.next_of("snapshot");
        let raws: Vec<Raw> = (0..100).map(|_| house.server.connect()).collect();
        let mut clients: Vec<(Raw, ClientConnection)> = raws
            .into_iter()
            .map(|mut raw| {
                let name = "localhost".try_into().expect("a name");
                let mut tls = ClientConnection::new(house.files.client(BOTH), name).expect("a client");
                let mut hello = Vec::new();
                tls.write_tls(&mut hello).expect("to memory");
                raw.send(&hello);
                (raw, tls)
            })
            .collect();
        house.upstream.set_json("/leads", &value(2));
        assert_eq!(ws.next_of("patch")["seq"], 2);
        for (raw, tls) in &mut clients {
            let mut socket = raw.socket().try_clone().expect("a socket");
            let until = Instant::now() + PATIENCE;
            while tls.is_handshaking() {
                assert!(Instant::now() < until, "no handshake");
                let _ = tls.complete_io(&mut socket);
            }
        }
        eventually("all are done", || (house.handshakes("full") == 101.0).then_some(()));
    }
}

/// Believes every certificate: what a client spends on checking one is not what is tested.
#[derive(Debug)]
struct Believing(rustls::crypto::CryptoProvider);

impl ServerCertVerifier for Believing {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[test]
fn a_storm_of_handshakes_that_takes_longer_than_one_may_gets_them_done() {
    const CLIENTS: usize = 3_000;
    let descriptors = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, rustix::process::Rlimit { current: descriptors.maximum, ..descriptors })
        .expect("raised");
    let files = Files::new();
    // A key whose signatures cost the server more than anything costs its clients, who must keep up with it here.
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).expect("a key");
    let made = rcgen::CertificateParams::new(vec!["localhost".to_owned()]).expect("a name").self_signed(&key);
    let (cert_path, key_path) = (files.folder.join("cert.pem"), files.folder.join("key.pem"));
    std::fs::write(&cert_path, made.expect("a certificate").pem()).expect("written");
    std::fs::write(&key_path, key.serialize_pem()).expect("written");
    let identity = format!("[[server.tls]]\ncert = {cert_path:?}\nkey = {key_path:?}\n");
    let server = Setup::new().cores(1).limits("handshake_timeout = \"2s\"").server(&identity).start();
    let mut config = files.authority.client_config(&[&TLS13]);
    let believing = Believing(rustls::crypto::ring::default_provider());
    config.dangerous().set_certificate_verifier(Arc::new(believing));
    // Each comes as a stranger.
    config.resumption = rustls::client::Resumption::disabled();
    let config = Arc::new(config);
    let mut clients: Vec<(TcpStream, ClientConnection)> = (0..CLIENTS)
        .map(|_| {
            let name = "localhost".try_into().expect("a name");
            let mut tls = ClientConnection::new(Arc::clone(&config), name).expect("a client");
            let mut hello = Vec::new();
            tls.write_tls(&mut hello).expect("to memory");
            let mut socket = TcpStream::connect(server.listen).expect("it is let in, or waits");
            socket.write_all(&hello).expect("sent");
            socket.set_nonblocking(true).expect("an option");
            (socket, tls)
        })
        .collect();
    let begun = Instant::now();
    let (mut done, until) = (Vec::new(), begun + 2 * PATIENCE);
    while !clients.is_empty() {
        assert!(Instant::now() < until, "{} of {CLIENTS} neither come in nor are turned away", clients.len());
        for (mut socket, mut tls) in std::mem::take(&mut clients) {
            match tls.complete_io(&mut socket) {
                Ok(_) if !tls.is_handshaking() => done.push(socket),
                Ok(_) => clients.push((socket, tls)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => clients.push((socket, tls)),
                Err(_) => {}
            }
        }
    }
    // A machine that is busy with other things loses some; where handshakes begin and do not end, nearly all are lost.
    let enough = CLIENTS / 2;
    assert!(done.len() >= enough, "{} of {CLIENTS} in {:?}", done.len(), begun.elapsed());
    eventually("the server has heard the end of each", || {
        let full = server.metric(&["restcast_tls_handshakes_total{", "\"full\""]);
        (full >= enough as f64).then_some(())
    });
}

#[test]
fn a_connection_too_many_gets_an_alert() {
    let house = House::with("auto", |setup| setup.limits("connections = 1"));
    let _first = house.connect();
    let error = house.server.connect().try_secured(&house.client, "localhost").err().expect("one too many");
    assert!(error.to_string().contains("InternalError"), "{error}");
}

#[test]
fn an_address_over_its_limit_costs_an_alert_and_no_handshake() {
    let house = House::with("auto", |setup| setup.limits("handshakes_per_second_per_address = 1"));
    let token = bearer(&token_of("u1"));
    let answer = house.connect().request("GET", LEADS, std::slice::from_ref(&token), "");
    assert_eq!(answer.status, 200, "a handshake and its request count once: {answer:?}");
    let again = || house.server.connect().try_secured(&house.client, "localhost").err();
    let error = eventually("one too many", again);
    assert!(error.to_string().contains("InternalError"), "{error}");
    assert_eq!((house.handshakes("refused"), house.handshakes("failed")), (1.0, 0.0));
    // A request on a connection that stays is counted like any other.
    eventually("its time has come", || {
        let mut raw = house.server.connect().try_secured(&house.client, "localhost").ok()?;
        let first = raw.request("GET", LEADS, std::slice::from_ref(&token), "").status;
        let second = raw.request("GET", LEADS, std::slice::from_ref(&token), "").status;
        assert_eq!(first, 200);
        (second == 429).then_some(())
    });
}

#[test]
fn a_handshake_whose_end_comes_with_all_the_rest_is_none_that_failed() {
    let house = House::new("auto");
    let mut socket = TcpStream::connect(house.server.listen).expect("it accepts");
    socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let name = "localhost".try_into().expect("a name");
    let mut tls = ClientConnection::new(house.files.client(&[&TLS13]), name).expect("a client");
    tls.write_tls(&mut socket).expect("sent");
    while tls.is_handshaking() {
        tls.read_tls(&mut socket).expect("the server's flight");
        tls.process_new_packets().expect("TLS");
    }
    // The client's Finished, its request and its end, in one piece.
    tls.writer().write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").expect("buffered");
    tls.send_close_notify();
    let mut all = Vec::new();
    while tls.wants_write() {
        tls.write_tls(&mut all).expect("to memory");
    }
    socket.write_all(&all).expect("sent");
    let (answer, clean) = read_to_end(&mut socket, &mut tls);
    assert!(answer.starts_with(b"HTTP/1.1 200") && clean, "{}", String::from_utf8_lossy(&answer));
    assert_eq!((house.handshakes("full"), house.handshakes("failed")), (1.0, 0.0));
}
