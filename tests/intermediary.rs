//! Upstreams behind a gateway, a cache or a captive portal, over TLS and counted: what those add to an answer changes nothing,
//! what they say in its place is a failure that is told and gets over.
#![cfg(feature = "runtime")]

mod support;
#[path = "support/watcher.rs"]
mod watcher;

use std::io::Write as _;
use std::time::Duration;

use flate2::Compression;
use flate2::write::{GzEncoder, ZlibEncoder};
use serde_json::json;
use support::server::{PATIENCE, Setup};
use support::{Folder, Reply, Step, Upstream};
use watcher::{Watcher, requests_for};

/// What stands in what nobody is to see.
const MARK: &str = "hunter2";

/// An upstream over TLS, and the lines of a stream that trusts it.
fn secure() -> (Upstream, String, Folder) {
    let (upstream, ca, folder) = Upstream::start_trusted();
    (upstream, format!("{ca}\ninterval = \"20ms\"\nbackoff_max = \"100ms\""), folder)
}

/// A head and the body behind it, whose length is told unless the head says how it is framed.
fn answer(head: &str, body: &[u8]) -> Vec<u8> {
    let framed = head.contains("ength:") || head.to_lowercase().contains("chunked") || head.starts_with("HTTP/1.0");
    let length = if framed { String::new() } else { format!("Content-Length: {}\r\n", body.len()) };
    [head.as_bytes(), length.as_bytes(), b"\r\n", body].concat()
}

fn chunked(pieces: &[(&[u8], &str)], trailers: &str) -> Vec<u8> {
    let mut body = Vec::new();
    for (piece, extension) in pieces {
        body.extend_from_slice(format!("{:x}{extension}\r\n", piece.len()).as_bytes());
        body.extend_from_slice(piece);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(format!("0;last\r\n{trailers}\r\n").as_bytes());
    body
}

fn gzip(text: &[u8]) -> Vec<u8> {
    let mut coder = GzEncoder::new(Vec::new(), Compression::default());
    coder.write_all(text).and_then(|()| coder.finish()).expect("memory")
}

fn deflate(text: &[u8]) -> Vec<u8> {
    let mut coder = ZlibEncoder::new(Vec::new(), Compression::default());
    coder.write_all(text).and_then(|()| coder.finish()).expect("memory")
}

/// Whether the connection is used for the next request.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Then {
    Goes,
    /// The upstream closes it, as it has said.
    Ends,
}

/// Answers with this value, as gateways and caches pass them on.
fn passed_on(n: usize) -> Vec<(&'static str, Vec<u8>, Then)> {
    let text = n.to_string().into_bytes();
    let text = text.as_slice();
    let with = |fields: &str| answer(&format!("HTTP/1.1 200 OK\r\n{fields}"), text);
    let early = [
        &b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"[..],
        b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: </next>; rel=\"next\"\r\nETag: \"early\"\r\n\r\n",
    ];
    let coded = |coding: &str, body: &[u8]| {
        let length = format!("Content-Length: {}\r\n", body.len());
        answer(&format!("HTTP/1.1 200 OK\r\nContent-Encoding: {coding}\r\n{length}"), body)
    };
    let in_chunks = |coding: &str, body: &[u8]| {
        let half = body.len() / 2;
        let pieces = [(&body[..half], ";name=\"a;\\\"b\""), (&body[half..], " ; quick")];
        let pieces: Vec<_> = pieces.into_iter().filter(|(piece, _)| !piece.is_empty()).collect();
        let head = format!("HTTP/1.1 200 OK\r\nTrailer: X-Sum\r\nTransfer-Encoding: {coding}\r\n");
        answer(&head, &chunked(&pieces, "X-Sum: 1\r\nVia: 1.1 hunter2\r\n"))
    };
    let length = format!("Content-Length: {}\r\n", text.len());
    vec![
        ("interim answers", [&early.concat(), with("").as_slice()].concat(), Then::Goes),
        (
            "a cache's fields",
            with(
                "Via: 1.0 hunter2, 1.1 squid (a, \"b)\")\r\nAge: 86400\r\nX-Cache: HIT from hunter2\r\nWarning: 110 - \"stale\"\r\n",
            ),
            Then::Goes,
        ),
        (
            "a gateway's fields",
            with(
                "Proxy-Connection: keep-alive\r\nKeep-Alive: timeout=5\r\nConnection: Keep-Alive, X-Hop\r\nX-Hop: 1\r\nSet-Cookie: hunter2=1\r\n",
            ),
            Then::Goes,
        ),
        ("transformed", answer("HTTP/1.1 203 Non-Authoritative Information\r\n", text), Then::Goes),
        ("chunk extensions and trailers", in_chunks("Chunked", text), Then::Goes),
        ("a transfer that is compressed", in_chunks("gzip, chunked", &gzip(text)), Then::Goes),
        ("the same, by its old name", in_chunks("x-gzip , chunked", &gzip(text)), Then::Goes),
        ("deflated", in_chunks("deflate,chunked", &deflate(text)), Then::Goes),
        ("a content that is compressed", coded("x-gzip", &gzip(text)), Then::Goes),
        ("the same, after nothing", coded("identity, gzip", &gzip(text)), Then::Goes),
        ("the length twice", with(&format!("{length}{length}")), Then::Goes),
        ("the length twice in a line", with(&format!("Content-Length: {0}, {0}\r\n", text.len())), Then::Goes),
        ("no reason", answer("HTTP/1.1 200\r\n", text), Then::Goes),
        ("bare line feeds", format!("HTTP/1.1 200 OK\nContent-Length: {}\n\n{n}", text.len()).into_bytes(), Then::Goes),
        ("the last one", with("Connection: close\r\n"), Then::Ends),
        (
            "an old one that stays",
            answer(&format!("HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n{length}"), text),
            Then::Ends,
        ),
        ("an old one that goes", answer("HTTP/1.0 200 OK\r\n", text), Then::Ends),
    ]
}

#[test]
fn what_intermediaries_add_to_an_answer_changes_nothing() {
    let (upstream, lines, _folder) = secure();
    let rounds = passed_on(0).len();
    for n in 0..rounds {
        let (_, bytes, then) = passed_on(n).swap_remove(n);
        let reply = match then {
            Then::Goes => Reply::raw(bytes),
            Then::Ends => Reply::steps(vec![Step::Send(bytes), Step::Close]),
        };
        upstream.once("/leads", reply);
    }
    upstream.set_json("/leads", "\"over\"");
    let server = Setup::new().stream("leads", &upstream.url("/leads"), &lines).start();
    let mut watcher = Watcher::ws(&server, "/v1/streams/leads");
    for (n, (what, ..)) in passed_on(0).iter().enumerate() {
        // Any status would come before the next event.
        let frame = watcher.next();
        assert_eq!((frame.kind().as_str(), frame.member("data")), ("snapshot", n.to_string()), "{what}: {frame:?}");
        assert_eq!(frame.seq(), n as u64 + 1, "{what}");
    }
    assert_eq!(watcher.event().member("data"), "\"over\"");
    let seen = requests_for(&upstream, "/leads");
    for (n, (what, _, then)) in passed_on(0).iter().enumerate() {
        let goes = seen[n].connection == seen[n + 1].connection;
        assert_eq!(goes, *then == Then::Goes, "{what}");
    }
    // One request for each value, and what an interim answer has told of itself is not taken for the answer's.
    assert!(seen[..=rounds].iter().all(|seen| seen.header("if-none-match").is_none()), "{seen:?}");
    assert!(seen.iter().all(|seen| seen.header("te").is_none() && seen.header("cookie").is_none()));
    assert!(!server.log_text().contains(MARK), "{}", server.log_text());
}

/// What is said in place of an answer, the code that watchers are told, and the status where there is one.
fn failures() -> Vec<(Vec<u8>, &'static str, Option<u16>)> {
    let page = b"<html><form>hunter2, log in</form></html>";
    let said = |head: &str| answer(&format!("HTTP/1.1 {head}\r\nVia: 1.1 hunter2\r\n"), page);
    let of = |head: &str, body: &[u8]| answer(&format!("HTTP/1.1 {head}\r\n"), body);
    vec![
        (said("502 Bad Gateway\r\nContent-Type: text/html"), "UPSTREAM_STATUS", Some(502)),
        (said("503 Service Unavailable"), "UPSTREAM_STATUS", Some(503)),
        (said("504 Gateway Timeout"), "UPSTREAM_STATUS", Some(504)),
        (said("511 Network Authentication Required"), "UPSTREAM_STATUS", Some(511)),
        (
            said("407 Proxy Authentication Required\r\nProxy-Authenticate: Basic realm=\"hunter2\""),
            "UPSTREAM_STATUS",
            Some(407),
        ),
        // Login pages: in place of the value, and behind a redirect.
        (said("200 OK\r\nContent-Type: text/html"), "UPSTREAM_BODY", None),
        (said("302 Found\r\nLocation: https://portal.example/login?from=hunter2"), "UPSTREAM_REDIRECT", None),
        (said("502 Bad Gateway\r\nContent-Encoding: br"), "UPSTREAM_STATUS", Some(502)),
        (of("200 OK\r\nContent-Encoding: br", page), "UPSTREAM_BODY", None),
        // What is cut short, or framed in two ways, is no value.
        (of("206 Partial Content\r\nContent-Range: bytes 0-0/2", b"7"), "UPSTREAM_PROTOCOL", None),
        (of("200 OK\r\nContent-Length: 1\r\nContent-Length: 2", b"77"), "UPSTREAM_PROTOCOL", None),
        (of("200 OK\r\nContent-Length: 1, 2", b"77"), "UPSTREAM_PROTOCOL", None),
        (of("200 OK\r\nContent-Length: 1,", b"7"), "UPSTREAM_PROTOCOL", None),
        (
            of("200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked", b"1\r\n7\r\n0\r\n\r\n"),
            "UPSTREAM_PROTOCOL",
            None,
        ),
        (of("200 OK\r\nTransfer-Encoding: br, chunked", b"1\r\n7\r\n0\r\n\r\n"), "UPSTREAM_PROTOCOL", None),
        (of("200 OK\r\nTransfer-Encoding: chunked, gzip", b"1\r\n7\r\n0\r\n\r\n"), "UPSTREAM_PROTOCOL", None),
        (of("200 OK\r\nTransfer-Encoding: gzip, gzip, chunked", b"1\r\n7\r\n0\r\n\r\n"), "UPSTREAM_PROTOCOL", None),
        (of("200 OK\r\nTransfer-Encoding: gzip, chunked", b"1\r\n7\r\n0\r\n\r\n"), "UPSTREAM_BODY", None),
        (of("101 Switching Protocols\r\nContent-Length: 0", b""), "UPSTREAM_PROTOCOL", None),
        (of("200 OK\r\nTransfer-Encoding: chunked", b"1\r\n7\r\n0\r\nX Y: 1\r\n\r\n"), "UPSTREAM_PROTOCOL", None),
    ]
}

#[test]
fn what_intermediaries_say_in_place_of_an_answer_is_told_and_got_over() {
    let (upstream, lines, _folder) = secure();
    upstream.set("/leads", Reply::json("\"held\""));
    let server = Setup::new().stream("leads", &upstream.url("/leads"), &lines).start();
    let mut watcher = Watcher::ws(&server, "/v1/streams/leads");
    assert_eq!(watcher.event().member("data"), "\"held\"");
    for (bytes, code, status) in failures() {
        let said = String::from_utf8_lossy(&bytes).into_owned();
        upstream
            .once("/leads", Reply::steps(vec![Step::Send(bytes), Step::Pause(Duration::from_millis(5)), Step::Close]));
        let told = watcher.next_of("stream_status").json();
        assert_eq!((&told["state"], &told["code"]), (&json!("stale"), &json!(code)), "{said}: {told}");
        assert_eq!(told.get("status"), status.map(|status| json!(status)).as_ref(), "{said}: {told}");
        assert!(told["retry_in_ms"].as_u64().is_some_and(|ms| ms <= 1_000), "{said}: {told}");
        // The value that is held is still the value, and the next answer ends it.
        let told = watcher.next().json();
        assert_eq!((&told["type"], &told["state"]), (&json!("stream_status"), &json!("live")), "{said}: {told}");
    }
    assert_eq!((watcher.value("leads"), watcher.holding("leads").seq), ("\"held\"".to_owned(), 1));
    assert!(!server.log_text().contains(MARK), "{}", server.log_text());
}

#[test]
fn a_gateway_that_is_down_is_asked_when_it_says_and_its_watchers_stay() {
    let (upstream, lines, _folder) = secure();
    upstream.set_json("/leads", "1");
    let server = Setup::new().stream("leads", &upstream.url("/leads"), &lines).start();
    let mut watchers = [Watcher::ws(&server, "/v1/streams/leads"), Watcher::sse(&server, "/v1/streams/leads")];
    for watcher in &mut watchers {
        assert_eq!(watcher.event().member("data"), "1");
    }
    upstream.set("/leads", Reply::status(503).header("Retry-After", "2").header("Via", "1.1 gateway"));
    for watcher in &mut watchers {
        let told = watcher.next_of("stream_status").json();
        assert_eq!((&told["state"], &told["code"]), (&json!("stale"), &json!("UPSTREAM_RATE_LIMITED")), "{told}");
    }
    let refused = requests_for(&upstream, "/leads").len();
    upstream.set_json("/leads", "2");
    upstream.wait_for_requests(refused + 1, PATIENCE);
    let seen = requests_for(&upstream, "/leads");
    let gap = seen[refused].at - seen[refused - 1].at;
    assert!(gap >= Duration::from_millis(1_950), "{gap:?}");
    for watcher in &mut watchers {
        assert_eq!(watcher.event().member("data"), "2", "on the connection it has had all the while");
    }
}
