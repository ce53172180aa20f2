//! Requests, answers and WebSocket framing on the public listener, byte for byte, against the built server.

mod support;

use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use support::server::{
    Answer, DRIVERS, Heard, PATIENCE, Raw, Server, Setup, bearer, client_frame, token_of, upgrade_request,
};
use support::{Reply, Upstream};
use tungstenite::Message;

const MS: Duration = Duration::from_millis(1);

fn served(setup: Setup) -> (Upstream, Server) {
    let upstream = Upstream::start();
    upstream.set_json("/leads", r#"[{"id":1}]"#);
    let server = setup.stream("leads", &upstream.url("/leads"), "").start();
    (upstream, server)
}

fn on_each_driver(test: impl Fn(Setup)) {
    for driver in DRIVERS {
        test(Setup::new().driver(driver));
    }
}

fn of(name: &'static str, value: &str) -> (&'static str, String) {
    (name, value.to_owned())
}

/// What a connection answers to these bytes, before it is closed.
fn refused(server: &Server, bytes: &[u8]) -> Answer {
    let mut raw = server.connect();
    raw.send(bytes);
    let answer = raw.answer();
    assert!(raw.is_closed(), "a connection goes on behind {:?}: {answer:?}", String::from_utf8_lossy(bytes));
    answer
}

/// A moment as HTTP writes it, by the system's `date`.
fn imf_fixdate(at: SystemTime) -> String {
    let seconds = at.duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    let mut date = Command::new("date");
    date.env("LC_ALL", "C").args(["-u", "-d", &format!("@{seconds}"), "+%a, %d %b %Y %H:%M:%S GMT"]);
    let written = date.output().expect("date runs").stdout;
    String::from_utf8(written).expect("ASCII").trim().to_owned()
}

// HTTP.

#[test]
fn the_server_says_that_it_serves() {
    on_each_driver(|setup| {
        let (_upstream, server) = served(setup);
        let before = SystemTime::now();
        let answer = server.get("/healthz", &[]);
        assert_eq!((answer.status, answer.json()), (200, json!({ "status": "ok" })));
        // RFC 9110 6.6.1: a server that has a clock says what it shows, in whole seconds.
        let date = answer.header("date").expect("a date");
        let moments = (0..=PATIENCE.as_secs()).map(|later| before + Duration::from_secs(later));
        assert!(moments.map(imf_fixdate).any(|moment| moment == date), "{date}");
        let head = server.request("HEAD", "/healthz", &[], "");
        assert_eq!(head.header("content-length"), answer.header("content-length"));
    });
}

#[test]
fn a_head_that_cannot_be_framed_is_answered_and_ends_the_connection() {
    on_each_driver(|setup| {
        let (_upstream, server) = served(setup);
        let long = "x".repeat(9 << 10);
        let host = "Host: a\r\n";
        for (request, status) in [
            ("GET /healthz HTTP/1.0\r\n\r\n".to_owned(), 505),
            (format!("GET /healthz HTTP/2.0\r\n{host}\r\n"), 505),
            (format!("GET  /healthz HTTP/1.1\r\n{host}\r\n"), 400),
            ("GET /healthz HTTP/1.1\r\n\r\n".to_owned(), 400),
            (format!("GET /healthz HTTP/1.1\n{host}\r\n"), 400),
            (format!("GET /healthz HTTP/1.1\r\n{host}{host}\r\n"), 400),
            (format!("GET /healthz HTTP/1.1\r\n{host} folded: 1\r\n\r\n"), 400),
            (format!("GET /healthz HTTP/1.1\r\n{host}Name : 1\r\n\r\n"), 400),
            (format!("GET /healthz HTTP/1.1\r\n{host}Name: \0\r\n\r\n"), 400),
            (format!("GET /healthz HTTP/1.1\r\n{host}Authorization: Bearer a\r\nAuthorization: Bearer b\r\n\r\n"), 400),
            (format!("GET /healthz HTTP/1.1\r\n{host}Content-Length: 1\r\nContent-Length: 1\r\n\r\nx"), 400),
            (format!("GET /healthz HTTP/1.1\r\n{host}Content-Length: +1\r\n\r\nx"), 400),
            (
                format!(
                    "POST /healthz HTTP/1.1\r\n{host}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
                ),
                400,
            ),
            (format!("POST /healthz HTTP/1.1\r\n{host}Transfer-Encoding: chunked, chunked\r\n\r\n"), 400),
            (format!("POST /healthz HTTP/1.1\r\n{host}Transfer-Encoding: gzip, chunked\r\n\r\n"), 501),
            (format!("CONNECT a:80 HTTP/1.1\r\n{host}\r\n"), 501),
            (format!("GET /{long} HTTP/1.1\r\n{host}\r\n"), 414),
            (format!("GET /healthz HTTP/1.1\r\n{host}Long: {long}{long}\r\n\r\n"), 431),
            (format!("GET /healthz HTTP/1.1\r\n{host}{}\r\n", "A: 1\r\n".repeat(64)), 431),
            ("\u{16}\u{3}\u{1}\u{2}".to_owned(), 400),
        ] {
            let answer = refused(&server, request.as_bytes());
            assert_eq!(answer.status, status, "{:?}", &request[..request.len().min(200)]);
            answer.code();
        }
        // At its bounds a head is served.
        let at_bound = format!("GET /healthz HTTP/1.1\r\n{host}{}\r\n", "A: 1\r\n".repeat(63));
        let mut raw = server.connect();
        raw.send(at_bound.as_bytes());
        assert_eq!(raw.answer().status, 200);
    });
}

#[test]
fn a_head_and_a_target_may_be_as_long_as_their_limits() {
    on_each_driver(|setup| {
        let (_upstream, server) = served(setup.limits("request_head_bytes_max = \"12KiB\""));
        let of_target = |bytes: usize| format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "x".repeat(bytes - 1));
        let mut raw = server.connect();
        raw.send(of_target(8 << 10).as_bytes());
        assert_eq!(raw.answer().status, 404);
        assert_eq!(refused(&server, of_target((8 << 10) + 1).as_bytes()).status, 414);
        let of_head = |bytes: usize| {
            let bare = "GET /healthz HTTP/1.1\r\nHost: a\r\nPad: \r\n\r\n";
            bare.replace("Pad: ", &format!("Pad: {}", "x".repeat(bytes - bare.len())))
        };
        let mut raw = server.connect();
        // What follows a head of the greatest length is not counted for it.
        raw.send(of_head(12 << 10).repeat(2).as_bytes());
        assert_eq!((raw.answer().status, raw.answer().status), (200, 200));
        assert_eq!(refused(&server, of_head((12 << 10) + 1).as_bytes()).status, 431);
        assert_eq!(refused(&server, "x".repeat(12 << 10).as_bytes()).status, 431, "a head without an end");
    });
}

#[test]
fn an_absolute_target_is_understood_and_its_authority_counts() {
    let (_upstream, server) = served(Setup::new());
    let token = token_of("u1");
    let request = |target: &str, host: &str| {
        let mut raw = server.connect();
        let origin = "Origin: http://seen.example\r\n";
        let cookie = format!("Cookie: restcast_token={token}\r\n");
        raw.send(format!("GET {target} HTTP/1.1\r\nHost: {host}\r\n{origin}{cookie}\r\n").as_bytes());
        raw.answer().status
    };
    assert_eq!(request("http://seen.example/v1/streams/leads", "other.example"), 200);
    assert_eq!(request("http://other.example/v1/streams/leads", "seen.example"), 403);
    assert_eq!(request("/v1/streams/leads", "seen.example"), 200);
    assert_eq!(request("http://user@seen.example/v1/streams/leads", "seen.example"), 400);
    assert_eq!(request("ftp://seen.example/v1/streams/leads", "seen.example"), 400);
    assert_eq!(request("/v1/streams/leads#part", "seen.example"), 400);
}

#[test]
fn who_ends_its_side_after_a_request_still_gets_the_answer() {
    on_each_driver(|setup| {
        let upstream = Upstream::start();
        upstream.set("/slow", Reply::json("[1]").delay(200 * MS));
        let server = setup.stream("slow", &upstream.url("/slow"), "").start();
        let mut raw = server.connect();
        let token = token_of("u1");
        raw.send(format!("GET /v1/streams/slow?token={token} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes());
        raw.socket().shutdown(std::net::Shutdown::Write).expect("it is open");
        let answer = raw.answer();
        assert_eq!((answer.status, answer.json()), (200, json!([1])));
        assert!(raw.is_closed());
    });
}

#[test]
fn what_a_resource_does_not_know_is_told_with_what_it_knows() {
    let (_upstream, server) = served(Setup::new());
    let token = [bearer(&token_of("u1"))];
    for (method, path, allow) in [
        ("POST", "/v1/streams/leads", "GET, HEAD, OPTIONS"),
        ("DELETE", "/healthz", "GET, HEAD, OPTIONS"),
        ("PUT", "/", "GET, HEAD, OPTIONS"),
        ("POST", "/v1/ws", "GET, HEAD, OPTIONS"),
        ("GET", "/v1/connections/c_1/auth", "POST, OPTIONS"),
    ] {
        let answer = server.request(method, path, &token, "");
        assert_eq!((answer.status, answer.header("allow")), (405, Some(allow)), "{method} {path}");
        assert_eq!(answer.code(), "METHOD_NOT_ALLOWED");
        let options = server.request("OPTIONS", path, &[], "");
        assert_eq!((options.status, options.header("allow")), (204, Some(allow)), "OPTIONS {path}");
    }
    assert_eq!(server.request("HEAD", "/v1/ws", &token, "").status, 426, "as GET");
    assert_eq!(server.request("OPTIONS", "*", &[], "").status, 204);
    for path in ["/nothing", "/v1", "/v1/", "/v1/streams", "/v1/ws/", "/v1/connections//auth", "/echo", "/healthz/"] {
        let answer = server.get(path, &[]);
        assert_eq!((answer.status, answer.code().as_str()), (404, "NOT_FOUND"), "{path}");
    }
    let answer = server.get("/v1/streams/leads", &[token[0].clone(), of("Accept", "text/html")]);
    assert_eq!((answer.status, answer.code().as_str()), (406, "NOT_ACCEPTABLE"));
    let answer = server.get("/v1/ws", &token);
    assert_eq!((answer.status, answer.header("sec-websocket-version")), (426, Some("13")));
    assert_eq!((answer.header("upgrade"), answer.header("connection")), (Some("websocket"), Some("Upgrade")));
    assert_eq!(answer.code(), "UPGRADE_REQUIRED");
}

#[test]
fn the_representation_follows_accept() {
    let (_upstream, server) = served(Setup::new());
    let token = token_of("u1");
    for (accept, kind) in [
        ("application/json", "application/json"),
        ("*/*", "application/json"),
        ("text/event-stream;q=0.4, application/json", "application/json"),
        ("text/event-stream, application/json;q=0.9", "text/event-stream"),
        ("text/event-stream", "text/event-stream"),
        ("text/event-stream, */*", "text/event-stream"),
    ] {
        let mut raw = server.connect();
        let request = format!(
            "GET /v1/streams/leads HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\nAccept: {accept}\r\n\r\n"
        );
        raw.send(request.as_bytes());
        let head = raw.head();
        assert_eq!((head.status, head.header("content-type")), (200, Some(kind)), "{accept}");
        assert_eq!(head.header("x-content-type-options"), Some("nosniff"));
        let cache = if kind == "application/json" { "private, no-cache" } else { "no-store" };
        assert_eq!(head.header("cache-control"), Some(cache));
        if kind == "text/event-stream" {
            assert_eq!(head.header("x-accel-buffering"), Some("no"));
        } else {
            assert_eq!(head.header("vary"), Some("Accept, Authorization, Cookie, Origin"));
            assert!(head.header("etag").is_some_and(|tag| tag.starts_with('"') && tag.ends_with("-1\"")), "{head:?}");
        }
    }
}

#[test]
fn head_is_get_without_a_body() {
    let (_upstream, server) = served(Setup::new());
    let token = [bearer(&token_of("u1"))];
    let mut raw = server.connect();
    let get = raw.request("GET", "/v1/streams/leads", &token, "");
    assert_eq!((get.status, get.json()), (200, json!([{ "id": 1 }])));
    // Were there a body, the next answer would begin within it.
    let head = raw.request("HEAD", "/v1/streams/leads", &token, "");
    let but_date = |answer: &Answer| {
        answer.headers.iter().filter(|(name, _)| name != "date").cloned().collect::<Vec<(String, String)>>()
    };
    assert_eq!(but_date(&head), but_date(&get));
    let head = raw.request("HEAD", "/v1/streams/none", &token, "");
    assert_eq!((head.status, head.header("content-type")), (404, Some("application/problem+json")));
    assert_eq!(raw.request("GET", "/healthz", &[], "").status, 200);
    let events = [token[0].clone(), of("Accept", "text/event-stream")];
    let head = raw.request("HEAD", "/v1/streams/leads", &events, "");
    assert_eq!((head.status, head.header("content-type")), (200, Some("text/event-stream")));
    assert!(raw.is_closed());
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    on_each_driver(|setup| {
        let upstream = Upstream::start();
        upstream.set("/slow", Reply::json("\"slow\"").delay(200 * MS));
        let server = setup.stream("slow", &upstream.url("/slow"), "").start();
        let token = token_of("u1");
        let request = |method: &str, path: &str| {
            format!("{method} {path} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\n\r\n")
        };
        let mut raw = server.connect();
        let all = [
            request("GET", "/healthz"),
            request("GET", "/v1/streams/slow"),
            request("HEAD", "/healthz"),
            request("GET", "/nothing"),
            "POST /v1/connections/none/auth HTTP/1.1\r\nHost: a\r\nContent-Length: 13\r\n\r\n{\"token\":\"t\"}".into(),
            "POST /v1/connections/none/auth HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n\
             6\r\n{\"toke\r\n7;x=1\r\nn\":\"t\"}\r\n0\r\nTrailer: 1\r\n\r\n"
                .into(),
            request("GET", "/v1/streams/slow"),
            request("GET", "/healthz").replace("\r\n\r\n", "\r\nConnection: close\r\n\r\n"),
            request("GET", "/healthz"),
        ];
        raw.send(all.concat().as_bytes());
        let mut seen = Vec::new();
        for method in ["GET", "GET", "HEAD", "GET", "GET", "GET", "GET", "GET"] {
            seen.push(raw.answer_to(method).status);
        }
        assert_eq!(seen, [200, 200, 200, 404, 404, 404, 200, 200]);
        assert!(raw.is_closed(), "nothing is answered behind Connection: close");
    });
}

#[test]
fn a_request_may_come_in_any_pieces() {
    on_each_driver(|setup| {
        let (_upstream, server) = served(setup);
        let frame = client_frame(false, 1, br#"{"type":"subscribe","stream":"leads","id":"first"}"#);
        let request = upgrade_request("/v1/ws", server.listen, &[bearer(&token_of("u1"))]);
        let bytes = [request.as_bytes(), &frame].concat();
        let is_whole = |raw: &mut Raw| {
            assert_eq!(raw.head().status, 101);
            let frames: Vec<Value> =
                (0..2).map(|_| serde_json::from_slice(&raw.frame().2).expect("a frame is JSON")).collect();
            assert_eq!(frames[0]["type"], "welcome");
            assert_eq!(frames[1], json!({ "type": "subscribed", "stream": "leads", "id": "first" }));
        };
        // All at once: what comes with the handshake is kept.
        let mut raw = server.connect();
        raw.send(&bytes);
        is_whole(&mut raw);
        // Byte by byte.
        let mut raw = server.connect();
        for byte in &bytes {
            raw.send(&[*byte]);
        }
        is_whole(&mut raw);
        // In two pieces, split at each place. The second goes when the first has been read.
        let connections: Vec<Raw> = (1..bytes.len())
            .map(|at| {
                let mut raw = server.connect();
                raw.send(&bytes[..at]);
                raw
            })
            .collect();
        for (at, mut raw) in (1..bytes.len()).zip(connections) {
            raw.send(&bytes[at..]);
            is_whole(&mut raw);
        }
    });
}

#[test]
fn an_idle_connection_ends_and_a_busy_one_does_not() {
    on_each_driver(|setup| {
        let (_upstream, server) = served(setup.limits("keep_alive = \"400ms\""));
        let mut raw = server.connect();
        let mut last = Instant::now();
        for _ in 0..8 {
            last = Instant::now();
            assert_eq!(raw.request("GET", "/healthz", &[], "").status, 200);
            assert!(!raw.hears_within(100 * MS));
        }
        assert!(raw.is_closed());
        assert!(last.elapsed() >= 400 * MS, "it ended early, after {:?}", last.elapsed());
    });
}

#[test]
fn a_slow_request_is_cut_off() {
    on_each_driver(|setup| {
        let (_upstream, server) = served(setup.limits("handshake_timeout = \"500ms\""));
        // Nothing at all.
        let begun = Instant::now();
        assert!(server.connect().is_closed());
        assert!(begun.elapsed() >= 500 * MS);
        // A head that comes byte by byte does not buy itself time.
        let mut raw = server.connect();
        let begun = Instant::now();
        for byte in b"GET /healthz HTTP/1.1\r\nHost: a\r\nX-Slow: ".iter().chain(std::iter::repeat(&b'x')) {
            if raw.try_send(&[*byte]).is_err() || raw.hears_within(20 * MS) {
                break;
            }
            assert!(begun.elapsed() < PATIENCE, "a slow head is never cut off");
        }
        assert!(begun.elapsed() >= 500 * MS);
        assert_eq!(raw.answer().status, 408);
        // A second head, begun in time, has as long as the first.
        let mut raw = server.connect();
        assert_eq!(raw.request("GET", "/healthz", &[], "").status, 200);
        let begun = Instant::now();
        raw.send(b"GET /healthz HT");
        assert_eq!(raw.answer().status, 408);
        assert!(begun.elapsed() >= 500 * MS);
        // A body.
        let mut raw = server.connect();
        let begun = Instant::now();
        raw.send(b"POST /v1/connections/c_1/auth HTTP/1.1\r\nHost: a\r\nContent-Length: 20\r\n\r\n{");
        assert_eq!(raw.answer().status, 408);
        assert!(begun.elapsed() >= 500 * MS && raw.is_closed());
    });
}

#[test]
fn a_body_that_is_too_large_is_413_and_one_that_waits_is_asked_for() {
    let (_upstream, server) = served(Setup::new());
    let mut raw = server.connect();
    raw.send(b"POST /v1/connections/c_1/auth HTTP/1.1\r\nHost: a\r\nContent-Length: 65537\r\n\r\n");
    let answer = raw.answer();
    assert_eq!((answer.status, answer.code().as_str()), (413, "TOO_LARGE"));
    let mut raw = server.connect();
    let head = b"POST /v1/connections/c_1/auth HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    raw.send(head);
    let _ = raw.try_send(format!("12000\r\n{}\r\n", "x".repeat(0x12000)).as_bytes());
    assert_eq!(raw.answer().status, 413);
    let mut raw = server.connect();
    raw.send(
        b"POST /v1/connections/c_1/auth HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 13\r\n\r\n",
    );
    assert_eq!(raw.head().status, 100);
    raw.send(b"{\"token\":\"t\"}");
    assert_eq!(raw.answer().code(), "UNKNOWN_CONNECTION");
    for body in ["{}", "[]", "{\"token\":1}", "x", "{\"token\":\"a\",\"token\":\"b\"}"] {
        let answer = server.request("POST", "/v1/connections/c_1/auth", &[], body);
        assert_eq!((answer.status, answer.code().as_str()), (400, "BAD_REQUEST"), "{body}");
    }
}

#[test]
fn cors_is_for_allowed_origins_alone() {
    let (_upstream, server) = served(Setup::new().server("allowed_origins = [\"https://app.example\"]"));
    let preflight = |origin: &str, path: &str, method: &str| {
        let headers = [of("Origin", origin), of("Access-Control-Request-Method", method)];
        server.request("OPTIONS", path, &headers, "")
    };
    let answer = preflight("https://app.example", "/v1/streams/leads", "GET");
    assert_eq!(answer.status, 204);
    assert_eq!(answer.header("access-control-allow-origin"), Some("https://app.example"));
    assert_eq!(answer.header("access-control-allow-credentials"), Some("true"));
    assert!(answer.header("access-control-allow-methods").is_some_and(|methods| methods.contains("GET")));
    let headers = answer.header("access-control-allow-headers").expect("headers").to_ascii_lowercase();
    for name in ["authorization", "content-type", "if-none-match", "last-event-id", "prefer"] {
        assert!(headers.split(", ").any(|allowed| allowed == name), "{name} is not allowed in {headers}");
    }
    let answer = preflight("https://app.example", "/v1/connections/c_1/auth", "POST");
    assert!(answer.header("access-control-allow-methods").is_some_and(|methods| methods.contains("POST")));
    let own = format!("http://{}", server.listen);
    for origin in ["https://evil.example", "https://app.example.evil.example", "http://app.example", "null", &own] {
        let answer = preflight(origin, "/v1/streams/leads", "GET");
        assert!(!answer.headers.iter().any(|(name, _)| name.starts_with("access-control")), "{origin}: {answer:?}");
    }
    let asked = |path: &str, token: &str| {
        let answer = server.get(path, &[bearer(token), of("Origin", "https://app.example")]);
        assert_eq!(answer.header("access-control-allow-origin"), Some("https://app.example"), "{answer:?}");
        let exposed = answer.header("access-control-expose-headers").expect("exposed").to_ascii_lowercase();
        for name in ["etag", "retry-after", "x-restcast-state"] {
            assert!(exposed.contains(name), "{name} is not exposed in {exposed}");
        }
        answer.status
    };
    assert_eq!(asked("/v1/streams/leads", &token_of("u1")), 200);
    assert_eq!(asked("/v1/streams/leads", "no token"), 401);
    assert_eq!(asked("/v1/streams/none", &token_of("u1")), 404);
}

#[test]
fn the_playground_is_a_page_with_a_strict_policy() {
    let (_upstream, server) = served(Setup::new());
    let answer = server.get("/", &[]);
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("text/html; charset=utf-8")));
    let policy = answer.header("content-security-policy").expect("a policy");
    assert!(policy.contains("default-src 'none'") && policy.contains("frame-ancestors 'none'"), "{policy}");
    assert!(!policy.contains("-inline'") && !policy.contains("-eval'"), "{policy}");
    assert!(answer.text().contains("<html"));
    assert_eq!(answer.header("referrer-policy"), Some("no-referrer"));
    let (_upstream, server) = served(Setup::new().server("playground = false"));
    assert_eq!(server.get("/", &[]).status, 404);
}

#[test]
fn the_client_library_is_served_to_everyone_and_asked_for_again_by_its_tag() {
    let (_upstream, server) =
        served(Setup::new().server("playground = false\nallowed_origins = [\"https://app.example\"]"));
    let answer = server.get("/client.js", &[of("Origin", "https://app.example")]);
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("text/javascript; charset=utf-8")));
    assert!(answer.text().contains("export"), "{}", answer.text());
    assert_eq!(
        answer.header("access-control-allow-origin"),
        Some("https://app.example"),
        "a page elsewhere imports it"
    );
    assert_eq!(
        (answer.header("cache-control"), answer.header("x-content-type-options")),
        (Some("no-cache"), Some("nosniff"))
    );
    let tag = answer.header("etag").expect("a tag").to_owned();
    assert!(tag.len() > 20 && tag.starts_with('"'), "{tag}");
    for (held, status) in [(tag.clone(), 304), (format!("W/{tag}"), 304), ("\"another\"".to_owned(), 200)] {
        let again = server.get("/client.js", &[("If-None-Match", held.clone())]);
        assert_eq!((again.status, again.header("etag")), (status, Some(tag.as_str())), "{held}");
        assert_eq!(again.body.is_empty(), status == 304, "{held}");
    }
    let head = server.request("HEAD", "/client.js", &[], "");
    assert_eq!((head.status, head.body.len()), (200, 0));
    assert_eq!(head.header("content-length"), Some(answer.body.len().to_string().as_str()));
    let answer = server.request("POST", "/client.js", &[], "");
    assert_eq!((answer.status, answer.header("allow")), (405, Some("GET, HEAD, OPTIONS")));
}

#[test]
fn problems_say_what_is_wrong_and_401_how_to_ask() {
    let (_upstream, server) = served(Setup::new());
    let answer = server.get("/v1/streams/leads", &[]);
    assert_eq!((answer.status, answer.code().as_str()), (401, "MISSING_CREDENTIAL"));
    assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
    let problem = answer.json();
    for member in ["type", "title", "status", "code", "detail"] {
        assert!(!problem[member].is_null(), "{member} is missing in {problem}");
    }
    let answer = server.get("/v1/streams/leads", &[bearer("nonsense")]);
    assert_eq!((answer.status, answer.code().as_str()), (401, "INVALID_TOKEN"));
    assert_eq!(answer.header("www-authenticate"), Some("Bearer error=\"invalid_token\""));
}

// The upgrade.

#[test]
fn an_upgrade_follows_rfc_6455() {
    let (_upstream, server) = served(Setup::new());
    let token = token_of("u1");
    let mut raw = server.connect();
    let answer = raw.upgrade("/v1/ws", &[bearer(&token)]);
    assert_eq!(answer.status, 101);
    // What RFC 6455 4.2.2 makes of the key "c2l4dGVlbiBieXRlcy4uLg==".
    let digest = ring::digest::digest(
        &ring::digest::SHA1_FOR_LEGACY_USE_ONLY,
        b"c2l4dGVlbiBieXRlcy4uLg==258EAFA5-E914-47DA-95CA-C5AB0DC85B11",
    );
    let accept = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, digest);
    assert_eq!(answer.header("sec-websocket-accept"), Some(accept.as_str()));
    assert_eq!(answer.header("upgrade").map(str::to_ascii_lowercase).as_deref(), Some("websocket"));
    assert_eq!(answer.header("sec-websocket-protocol"), None, "none was offered");
    assert_eq!(answer.header("sec-websocket-extensions"), None, "none was offered");
    let with = |change: &dyn Fn(&str) -> String| {
        let mut raw = server.connect();
        raw.send(change(&upgrade_request("/v1/ws", server.listen, &[bearer(&token)])).as_bytes());
        raw.answer()
    };
    let key = "Sec-WebSocket-Key: c2l4dGVlbiBieXRlcy4uLg==\r\n";
    assert_eq!(with(&|request| request.replace("Connection: Upgrade", "Connection: keep-alive, upgrade")).status, 101);
    assert_eq!(with(&|request| request.replace("Connection: Upgrade\r\n", "")).status, 400);
    assert_eq!(with(&|request| request.replace(key, "")).status, 400);
    assert_eq!(with(&|request| request.replace(key, "Sec-WebSocket-Key: c2hvcnQ=\r\n")).status, 400);
    assert_eq!(with(&|request| request.replace(key, &key.repeat(2))).status, 400);
    let old = with(&|request| request.replace("Version: 13", "Version: 8"));
    assert_eq!((old.status, old.header("sec-websocket-version")), (426, Some("13")));
    assert_eq!(with(&|request| request.replace("Upgrade: websocket\r\n", "")).status, 426);
    assert_eq!(with(&|request| request.replacen("GET", "POST", 1)).status, 405);
}

#[test]
fn a_connection_may_be_upgraded_after_other_requests() {
    on_each_driver(|setup| {
        let (_upstream, server) = served(setup);
        let mut raw = server.connect();
        assert_eq!(raw.request("GET", "/healthz", &[], "").status, 200);
        assert_eq!(raw.upgrade("/v1/ws", &[]).status, 401);
        assert_eq!(raw.upgrade("/v1/ws", &[bearer(&token_of("u1"))]).status, 101);
        assert!(raw.frame().2.starts_with(b"{\"type\":\"welcome\""));
        // All in one go as well, with a frame behind.
        let mut raw = server.connect();
        let upgrade = upgrade_request("/v1/ws", server.listen, &[bearer(&token_of("u1"))]);
        let all = ["GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n".as_bytes(), upgrade.as_bytes()].concat();
        raw.send(&[all, client_frame(false, 9, b"behind")].concat());
        assert_eq!(raw.answer().status, 200);
        assert_eq!(raw.answer().status, 101);
        assert!(raw.frame().2.starts_with(b"{\"type\":\"welcome\""));
        assert_eq!(raw.frame(), (true, 10, b"behind".to_vec()));
    });
}

#[test]
fn the_subprotocol_is_answered_and_never_the_token() {
    on_each_driver(|setup| {
        let (_upstream, server) = served(setup);
        let token = token_of("u1");
        for (offered, answered) in [
            (format!("restcast.v1, jwt, {token}"), "restcast.v1"),
            (format!("jwt, {token}, restcast.v1"), "restcast.v1"),
            (format!("jwt, {token}"), "jwt"),
            (format!("other, jwt, {token}"), "jwt"),
        ] {
            let ws = server.ws("/v1/ws", &[of("Sec-WebSocket-Protocol", &offered)]);
            assert_eq!(ws.upgrade.header("sec-websocket-protocol"), Some(answered));
            assert!(!format!("{:?}", ws.upgrade).contains(&token));
        }
        let ws = server.ws("/v1/ws", &[bearer(&token), of("Sec-WebSocket-Protocol", "other")]);
        assert_eq!(ws.upgrade.header("sec-websocket-protocol"), None, "an unknown protocol is not agreed to");
    });
}

// Frames.

fn open(server: &Server) -> Raw {
    let mut raw = server.connect();
    assert_eq!(raw.upgrade("/v1/ws", &[bearer(&token_of("u1"))]).status, 101);
    let (last, opcode, payload) = raw.frame();
    assert!(last && opcode == 1 && payload.starts_with(b"{\"type\":\"welcome\""));
    raw
}

#[test]
fn broken_frames_close_with_their_code() {
    on_each_driver(|setup| {
        let (_upstream, server) = served(setup.limits("message_bytes_max = \"1KiB\""));
        let text = |payload: &[u8]| client_frame(false, 1, payload);
        let with_first = |mut frame: Vec<u8>, first: u8| {
            frame[0] = first;
            frame
        };
        let close = |payload: &[u8]| client_frame(false, 8, payload);
        for (what, bytes, code) in [
            ("no mask", b"\x81\x02{}".to_vec(), 1002),
            ("a reserved bit", with_first(text(b"{}"), 0xc1), 1002),
            ("another reserved bit", with_first(text(b"{}"), 0x91), 1002),
            ("an unknown opcode", with_first(text(b"{}"), 0x83), 1002),
            ("an unknown control opcode", with_first(text(b"{}"), 0x8b), 1002),
            ("a fragmented ping", client_frame(true, 9, b""), 1002),
            ("a long ping", client_frame(false, 9, &[0; 126]), 1002),
            ("a continuation of nothing", client_frame(false, 0, b"x"), 1002),
            ("a text within another", [client_frame(true, 1, b"{"), text(b"}")].concat(), 1002),
            ("a length that is longer than it must be", b"\x81\xfe\x00\x02\0\0\0\0{}".to_vec(), 1002),
            ("a length of 64 bits with its first set", b"\x81\xff\x80\0\0\0\0\0\0\x02\0\0\0\0{}".to_vec(), 1002),
            ("binary", client_frame(false, 2, b"{}"), 1003),
            ("no UTF-8", text(b"\xff"), 1007),
            ("half a character", text(b"\xe2\x82"), 1007),
            ("no UTF-8 before the message ends", client_frame(true, 1, b"\xc0\xaf"), 1007),
            ("one byte too many", text(&[b' '; 1025]), 1009),
            (
                "one byte too many in fragments",
                [client_frame(true, 1, &[b' '; 1024]), client_frame(false, 0, b" ")].concat(),
                1009,
            ),
            ("a huge length", b"\x81\xff\x7f\xff\xff\xff\xff\xff\xff\xff\0\0\0\0".to_vec(), 1009),
            ("a close of one byte", close(b"\x03"), 1002),
            ("a close code that is never sent", close(&1005u16.to_be_bytes()), 1002),
            ("a close code that nobody defined", close(&2999u16.to_be_bytes()), 1002),
            ("a close reason outside UTF-8", close(b"\x03\xe8\xff"), 1007),
        ] {
            let mut raw = open(&server);
            raw.send(&bytes);
            assert_eq!(raw.close_frame().0, code, "{what}");
            let _ = raw.try_send(&close(b""));
            assert!(raw.is_closed(), "{what}");
        }
        // At its bound a message is read: it is no JSON object, and the connection stays.
        let mut raw = open(&server);
        raw.send(&text(&[b' '; 1024]));
        let frame: Value = serde_json::from_slice(&raw.frame().2).expect("JSON");
        assert_eq!((&frame["type"], &frame["code"]), (&json!("error"), &json!("BAD_MESSAGE")));
        raw.send(&client_frame(false, 9, b"still"));
        assert_eq!(raw.frame(), (true, 10, b"still".to_vec()));
    });
}

#[test]
fn a_close_is_answered_with_its_code() {
    on_each_driver(|setup| {
        let (_upstream, server) = served(setup);
        for code in [1000u16, 1001, 1011, 3000, 4999] {
            let mut raw = open(&server);
            raw.send(&client_frame(false, 8, &[&code.to_be_bytes()[..], b"bye"].concat()));
            assert_eq!(raw.close_frame().0, code);
            assert!(raw.is_closed());
        }
        let mut raw = open(&server);
        raw.send(&client_frame(false, 8, b""));
        assert_eq!(raw.close_frame(), (1005, String::new()), "no code is answered with none");
        assert!(raw.is_closed());
    });
}

#[test]
fn bad_messages_are_told_and_the_connection_stays() {
    on_each_driver(|setup| {
        let (_upstream, server) = served(setup);
        let mut ws = server.ws("/v1/ws", &[bearer(&token_of("u1"))]);
        assert_eq!(ws.next()["type"], "welcome");
        for (text, code, id) in [
            ("", "BAD_MESSAGE", Value::Null),
            ("x", "BAD_MESSAGE", Value::Null),
            ("[]", "BAD_MESSAGE", Value::Null),
            ("{}", "BAD_MESSAGE", Value::Null),
            ("{\"type\":1}", "BAD_MESSAGE", Value::Null),
            ("{\"type\":\"ping\",\"id\":9}", "UNKNOWN_TYPE", json!(9)),
            ("{\"type\":\"nonsense\",\"id\":\"a\"}", "UNKNOWN_TYPE", json!("a")),
            ("{\"type\":\"subscribe\",\"id\":1}", "BAD_MESSAGE", json!(1)),
            ("{\"type\":\"subscribe\",\"stream\":\"leads\",\"format\":\"xml\",\"id\":2}", "BAD_MESSAGE", json!(2)),
            ("{\"type\":\"unsubscribe\",\"stream\":\"leads\",\"id\":3}", "STREAM_NOT_FOUND", json!(3)),
            ("{\"type\":\"subscribe\",\"stream\":\"none\",\"id\":4}", "STREAM_NOT_FOUND", json!(4)),
            ("{\"type\":\"auth\",\"token\":\"x\"}", "BAD_MESSAGE", Value::Null),
        ] {
            ws.send_message(Message::text(text));
            let frame = ws.next();
            assert_eq!((&frame["type"], &frame["code"]), (&json!("error"), &json!(code)), "{text}: {frame}");
            assert_eq!(frame["id"], id, "{text}: {frame}");
            assert!(frame["error"].as_str().is_some_and(|error| !error.is_empty()), "{frame}");
        }
        ws.send(json!({ "type": "subscribe", "stream": "leads", "id": 5, "unknown": { "member": true } }));
        assert_eq!(ws.next(), json!({ "type": "subscribed", "stream": "leads", "id": 5 }));
        let mut single = server.ws("/v1/streams/leads", &[bearer(&token_of("u1"))]);
        single.next_of("snapshot");
        for kind in ["subscribe", "unsubscribe"] {
            single.send(json!({ "type": kind, "stream": "leads", "id": kind }));
            let frame = single.next();
            assert_eq!((&frame["code"], &frame["id"]), (&json!("BAD_MESSAGE"), &json!(kind)), "{frame}");
        }
    });
}

#[test]
fn too_many_messages_close_1008() {
    on_each_driver(|setup| {
        let (_upstream, server) = served(setup.limits("messages_per_second = 5"));
        let mut raw = open(&server);
        // As many as there may be are answered.
        raw.send(&client_frame(false, 9, b"1").repeat(5));
        for _ in 0..5 {
            assert_eq!(raw.frame(), (true, 10, b"1".to_vec()));
        }
        let mut raw = open(&server);
        raw.send(&client_frame(false, 9, b"1").repeat(50));
        assert_eq!(raw.close_frame(), (1008, "rate_limited".into()));
        assert!(raw.is_closed());
    });
}

#[test]
fn pings_are_answered_within_a_message() {
    let (_upstream, server) = served(Setup::new());
    let mut raw = open(&server);
    raw.send(&client_frame(true, 1, b"{\"type\":\"subsc"));
    raw.send(&client_frame(false, 9, b"between"));
    assert_eq!(raw.frame(), (true, 10, b"between".to_vec()));
    raw.send(&client_frame(false, 10, b"unasked"));
    raw.send(&client_frame(false, 0, b"ribe\",\"stream\":\"leads\"}"));
    let frame: Value = serde_json::from_slice(&raw.frame().2).expect("JSON");
    assert_eq!(frame, json!({ "type": "subscribed", "stream": "leads" }));
}

// /echo.

#[test]
fn echo_returns_each_message_as_it_came() {
    on_each_driver(|setup| {
        let (_upstream, server) = served(setup.server("echo = true"));
        let mut ws = server.ws("/echo", &[]);
        for message in [
            Message::text(""),
            Message::text("Grüße, 世界"),
            Message::binary(vec![]),
            Message::binary(vec![0, 255, 128]),
            Message::text("x".repeat(70_000)),
            Message::binary(vec![7; 126]),
        ] {
            ws.send_message(message.clone());
            let heard = match ws.heard() {
                Heard::Frame(value) => panic!("{value} is no echo"),
                Heard::Other(heard) => heard,
                other => panic!("{other:?}"),
            };
            assert_eq!(heard, message);
        }
        // Fragments come back as one message, control frames between them at once.
        let mut raw = server.connect();
        assert_eq!(raw.upgrade("/echo", &[]).status, 101);
        raw.send(&client_frame(true, 2, b"ab"));
        raw.send(&client_frame(true, 0, b""));
        raw.send(&client_frame(false, 9, &[7; 125]));
        assert_eq!(raw.frame(), (true, 10, vec![7; 125]));
        raw.send(&client_frame(false, 0, b"cd"));
        assert_eq!(raw.frame(), (true, 2, b"abcd".to_vec()));
        // Many in one go, in order, and no rate is too high.
        let many: Vec<u8> = (0..500u32).flat_map(|no| client_frame(false, 1, no.to_string().as_bytes())).collect();
        raw.send(&many);
        for no in 0..500u32 {
            assert_eq!(raw.frame(), (true, 1, no.to_string().into_bytes()));
        }
        raw.send(&client_frame(false, 8, b"\x0f\xa0bye"));
        assert_eq!(raw.close_frame().0, 4000);
        assert!(raw.is_closed());
    });
}

#[test]
fn after_a_bad_close_frame_the_server_ends_its_side_though_no_other_comes() {
    let (_upstream, server) = served(Setup::new().server("echo = true"));
    for (bad, code) in [
        (client_frame(false, 8, b"\x03"), 1002),
        (client_frame(false, 8, b"\x03\xe7"), 1002),
        (client_frame(false, 8, &[b'x'; 126]), 1002),
        (client_frame(false, 8, b"\x03\xe8\xff"), 1007),
        (client_frame(false, 3, b"no close, but as bad"), 1002),
    ] {
        let mut raw = server.connect();
        assert_eq!(raw.upgrade("/echo", &[]).status, 101);
        raw.send(&bad);
        assert_eq!(raw.close_frame().0, code, "{bad:02x?}");
        assert!(raw.ends_in_order(), "{bad:02x?}");
    }
}

#[test]
fn echo_takes_16_mib_and_not_a_byte_more() {
    let (_upstream, server) = served(Setup::new().server("echo = true"));
    let payload: Vec<u8> = (0..16u32 << 20).map(|at| u8::try_from(at % 251).expect("small")).collect();
    let mut ws = server.ws("/echo", &[]);
    ws.send_message(Message::binary(payload.clone()));
    match ws.heard() {
        Heard::Other(Message::Binary(back)) => assert!(back[..] == payload[..], "other bytes came back"),
        other => panic!("{other:?}"),
    }
    let mut raw = server.connect();
    assert_eq!(raw.upgrade("/echo", &[]).status, 101);
    raw.send(&client_frame(true, 2, &payload));
    raw.send(&client_frame(false, 0, b"!"));
    assert_eq!(raw.close_frame().0, 1009);
    // So many fragments are taken.
    let mut raw = server.connect();
    assert_eq!(raw.upgrade("/echo", &[]).status, 101);
    let mut fragments = client_frame(true, 1, b"");
    fragments.extend(client_frame(true, 0, b"").repeat(65_534));
    raw.send(&fragments);
    raw.send(&client_frame(false, 0, b"end"));
    assert_eq!(raw.frame(), (true, 1, b"end".to_vec()));
    raw.send(&fragments);
    raw.send(&client_frame(true, 0, b""));
    raw.send(&client_frame(false, 0, b"end"));
    assert!(matches!(raw.close_frame().0, 1008 | 1009), "one fragment too many");
}

#[test]
fn echo_is_off_unless_it_is_switched_on() {
    let (_upstream, server) = served(Setup::new());
    let refused = server.try_ws("/echo", &[]).map(|_| ()).expect_err("it is off");
    assert_eq!(refused.status, 404);
}
