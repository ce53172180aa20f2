//! Direct mode against the built server: its three forms, who may, what is blocked, and that one poll serves all who ask
//! the same.
#![cfg(feature = "runtime")]

mod support;

use serde_json::{Value, json};

use support::server::{
    ADMIN_KEY, Answer, PATIENCE, Raw, Server, Setup, bearer, eventually, mint, now_s, streams, token_of,
};
use support::{Reply, Upstream};

const HEADER: &str = "a-header-value-that-is-secret-7f7f";
const QUERY: &str = "a-query-value-that-is-secret-93ab";
const BODY: &str = "a-body-that-is-secret-c0ffee";

fn setup(upstream: &Upstream) -> Setup {
    Setup::new().direct(upstream.address(), "interval_min = \"10ms\"")
}

/// `/v1/direct?url=…`.
fn direct(url: &str, more: &str) -> String {
    let escaped: String = url.bytes().map(|byte| format!("%{byte:02X}")).collect();
    format!("/v1/direct?url={escaped}{more}")
}

fn post(server: &Server, path: &str, token: &str, body: &Value) -> Answer {
    server.request("POST", path, &[bearer(token)], &body.to_string())
}

#[test]
fn a_target_without_secrets_stands_in_the_url_in_all_three_representations() {
    let upstream = Upstream::start();
    upstream.set_json("/a", "{\"n\":1}");
    let server = setup(&upstream).start();
    let token = token_of("u1");
    let path = direct(&upstream.url("/a?x=1"), "&interval_ms=20");
    let answer = server.get(&path, &[bearer(&token)]);
    assert_eq!((answer.status, answer.json()), (200, json!({"n": 1})));
    assert!(answer.header("etag").is_some(), "{answer:?}");
    let mut ws = server.ws(&path, &[bearer(&token)]);
    assert_eq!(ws.next()["type"], "welcome");
    let first = ws.next_of("snapshot");
    assert_eq!(first["data"], json!({"n": 1}));
    let name = first["stream"].as_str().expect("a name").to_owned();
    assert!(name.starts_with("direct:") && !name.contains('/'), "{name}");
    let mut sse = server.sse(&path, &[bearer(&token), ("Accept", "text/event-stream".into())]);
    let snapshot = sse.next_of("snapshot");
    assert_eq!((&snapshot.data["stream"], &snapshot.data["epoch"]), (&json!(name), &first["epoch"]));
    upstream.set_json("/a", "{\"n\":2}");
    assert_eq!(ws.next_of("snapshot")["data"], json!({"n": 2}));
    assert_eq!(sse.next_of("snapshot").data["data"], json!({"n": 2}));
    // It is resumed like any other.
    let again = server
        .ws(&format!("{path}&since={}-1&format=full", first["epoch"].as_str().expect("an epoch")), &[bearer(&token)]);
    let mut again = again;
    assert_eq!(again.next()["type"], "welcome");
    assert_eq!(again.next()["seq"], 2);
    // A name is none that could be asked for.
    assert_eq!(server.get(&format!("/v1/streams/{name}"), &[bearer(&token)]).status, 404);
}

#[test]
fn what_is_secret_is_said_in_the_first_frame_or_the_body() {
    let upstream = Upstream::start();
    let target = format!("/s?key={QUERY}");
    upstream.set_json("/s", "[7]");
    let server = setup(&upstream).start();
    let token = token_of("u1");
    let said = json!({
        "type": "open", "url": upstream.url(&target), "headers": {"X-Key": HEADER}, "method": "POST",
        "body": {"q": BODY}, "interval_ms": 20, "format": "full", "id": 1,
    });
    let mut ws = server.ws("/v1/direct", &[bearer(&token)]);
    assert_eq!(ws.next()["type"], "welcome");
    ws.send(json!({"type": "subscribe", "stream": "x", "id": 5}));
    assert_eq!(ws.next()["code"], "BAD_MESSAGE", "it is no connection for many streams");
    ws.send(json!({"type": "open", "id": 2}));
    let told = ws.next();
    assert_eq!(
        (&told["code"], &told["id"], &told["error"]),
        (&json!("BAD_MESSAGE"), &json!(2), &json!("url is missing"))
    );
    ws.send(said.clone());
    assert_eq!(ws.next_of("snapshot")["data"], json!([7]));
    ws.send(said.clone());
    assert_eq!(ws.next_of("error")["code"], "UNKNOWN_TYPE", "it has been said");
    let mut raw = server.connect();
    let headers = [bearer(&token), ("Accept", "text/event-stream".to_owned())];
    raw.send_request("POST", "/v1/direct", &headers, &said.to_string());
    let head = raw.head();
    assert_eq!((head.status, head.header("content-type")), (200, Some("text/event-stream")));
    let value = post(&server, "/v1/direct", &token, &said);
    assert_eq!((value.status, value.json()), (200, json!([7])));
    let seen = upstream.requests().pop().expect("a request");
    assert_eq!((seen.method.as_str(), seen.target.as_str()), ("POST", target.as_str()));
    assert_eq!(seen.header("x-key"), Some(HEADER));
    assert_eq!(seen.body, format!("{{\"q\":\"{BODY}\"}}").into_bytes());
    // It fails once, so that the log has something to say.
    upstream.set("/s", Reply::status(500));
    assert_eq!(ws.next_of("stream_status")["code"], "UPSTREAM_STATUS");
    // The log tells of it by its name.
    let log = server.wait_for_log("stream=direct:", 1);
    let seen = [log, server.metrics(), server.get("/healthz", &[]).text()].concat();
    for secret in [HEADER, QUERY, BODY] {
        assert!(!seen.contains(secret), "{secret}");
    }
}

#[test]
fn one_poll_serves_those_who_ask_the_same_and_no_others() {
    let upstream = Upstream::start();
    upstream.set_json("/p", "1");
    let server = setup(&upstream).start();
    let said = |more: Value| {
        let mut all = json!({"type": "open", "url": upstream.url("/p"), "interval_ms": 3_600_000});
        all.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        all
    };
    let open = |sub: &str, said: Value| {
        let mut ws = server.ws("/v1/direct", &[bearer(&token_of(sub))]);
        ws.send(said);
        let name = ws.next_of("snapshot")["stream"].as_str().expect("a name").to_owned();
        (ws, name)
    };
    let mut held = Vec::new();
    for n in 0..6 {
        // Names of headers are the same in any case.
        let name = if n % 2 == 0 { "X-Key" } else { "x-key" };
        held.push(open(&format!("u{n}"), said(json!({"headers": {name: "one"}}))));
    }
    assert_eq!(upstream.request_count(), 1, "six callers, one request");
    assert!(held.iter().all(|(_, name)| *name == held[0].1));
    let others = [
        json!({"headers": {"X-Key": "two"}}),
        json!({"headers": {"X-Key": "one", "X-More": "1"}}),
        json!({"headers": {"X-Other": "one"}}),
        json!({}),
        json!({"method": "POST"}),
        json!({"body": "a"}),
        json!({"body": "b"}),
        json!({"interval_ms": 3_500_000}),
    ];
    for (n, other) in others.into_iter().enumerate() {
        let (ws, name) = open("u1", said(other.clone()));
        assert_eq!(upstream.request_count(), n + 2, "{other}");
        assert!(held.iter().all(|(_, other)| *other != name));
        held.push((ws, name));
    }
}

#[test]
fn a_blocked_target_is_told_to_be_blocked_and_nothing_else() {
    let upstream = Upstream::start();
    upstream.set_json("/a", "1");
    let server = setup(&upstream).start();
    let token = token_of("u1");
    let port = upstream.address().port();
    let mut told = Vec::new();
    for url in [
        "http://127.0.0.1:1/".to_owned(),
        "http://127.0.0.2/".into(),
        format!("http://u:p@127.0.0.1:{port}/a"),
        format!("http://localhost:{port}/a"),
        "http://169.254.169.254/latest/meta-data/".into(),
        "http://10.0.0.1/".into(),
        "https://example.com/".into(),
        "file:///etc/passwd".into(),
        "nothing".into(),
    ] {
        let answers = [
            server.get(&direct(&url, ""), &[bearer(&token)]),
            post(&server, "/v1/direct", &token, &json!({"url": url})),
            post(&server, "/v1/sessions", &token, &json!({"url": url})),
            server.try_ws(&direct(&url, ""), &[bearer(&token)]).map(|_| ()).expect_err("it is blocked"),
        ];
        for answer in answers {
            assert_eq!((answer.status, answer.code().as_str()), (403, "TARGET_BLOCKED"), "{url}");
            told.push(answer.text());
        }
        let mut ws = server.ws("/v1/direct", &[bearer(&token)]);
        ws.send(json!({"type": "open", "url": url, "id": "x"}));
        let error = ws.next_of("error");
        assert_eq!((&error["code"], &error["id"]), (&json!("TARGET_BLOCKED"), &json!("x")));
        assert_eq!(ws.closed(), (4003, "forbidden".into()));
    }
    told.dedup();
    assert_eq!(told.len(), 1, "one answer for all of them: {told:?}");
    for (headers, status, code) in [
        (json!({"Host": "a"}), 403, "TARGET_BLOCKED"),
        (json!({"Cookie": "a=b"}), 403, "TARGET_BLOCKED"),
        (json!({"X-Forwarded-For": "a"}), 403, "TARGET_BLOCKED"),
        (json!({"a b": "c"}), 400, "BAD_REQUEST"),
        (json!({"A": "c\r\nd"}), 400, "BAD_REQUEST"),
        (json!({"A": "1", "a": "2"}), 400, "BAD_REQUEST"),
    ] {
        let answer = post(&server, "/v1/direct", &token, &json!({"url": upstream.url("/a"), "headers": headers}));
        assert_eq!((answer.status, answer.code().as_str()), (status, code), "{headers}");
    }
    assert_eq!(upstream.request_count(), 0);
}

#[test]
fn a_name_that_proves_to_lead_inside_is_blocked_then() {
    let upstream = Upstream::start();
    upstream.set_json("/a", "1");
    let port = upstream.address().port();
    // The operator has listed a name; what it resolves to is not the operator's.
    let setup = Setup::new()
        .stream("x", &upstream.url("/x"), "")
        .direct(upstream.address(), "")
        .text()
        .replace("allow = [", &format!("allow = [\"http://localhost:{port}/*\", "));
    let server = Setup::new().direct(upstream.address(), "").start();
    server.reload_text(&setup);
    let token = token_of("u1");
    let path = direct(&format!("http://localhost:{port}/a"), "");
    let mut ws = eventually("the reload", || server.try_ws(&path, &[bearer(&token)]).ok());
    let status = ws.next_of("stream_status");
    assert_eq!((&status["state"], &status["code"]), (&json!("failing"), &json!("UPSTREAM_BLOCKED")));
    let answer = server.get(&path, &[bearer(&token)]);
    assert_eq!((answer.status, answer.code().as_str()), (403, "TARGET_BLOCKED"));
    assert_eq!(upstream.request_count(), 0);
}

#[test]
fn what_administrators_poll_inside_is_no_way_in_for_callers() {
    let upstream = Upstream::start();
    upstream.set_json("/inner", "1");
    upstream.set_json("/secret", "2");
    let inward = |path: &str| upstream.url(path).replace("127.0.0.1", "localhost");
    // The name is listed, and must lead to public addresses all the same.
    let setup = Setup::new().direct(upstream.address(), "interval_min = \"10ms\"");
    let server = Setup::of_file(&setup.text().replace("http://127.0.0.1:", "http://localhost:")).start();
    let is_blocked = |n: u32| {
        let answer =
            server.get(&direct(&inward(&format!("/secret?{n}")), "&interval_ms=10"), &[bearer(&token_of("u1"))]);
        assert_eq!((answer.status, answer.code()), (403, "TARGET_BLOCKED".into()), "{answer:?}");
    };
    is_blocked(0);
    let made = json!({"id": "inner", "url": inward("/inner"), "interval": "20ms", "keep_warm": true});
    let made = streams(&server, "POST", "", &made);
    assert_eq!(made.status, 201, "{made:?}");
    for n in 1..20 {
        // Between two polls its connection idles.
        upstream.wait_for_requests(upstream.request_count() + 2, PATIENCE);
        is_blocked(n);
    }
    assert!(upstream.requests().iter().all(|seen| seen.target == "/inner"));
}

#[test]
fn what_a_reload_lists_no_more_is_asked_no_more_over_connections_that_are_open() {
    let upstream = Upstream::start();
    upstream.set_json("/a", "1");
    upstream.set_json("/b", "2");
    let first = setup(&upstream).text();
    let server = Setup::of_file(&first).start();
    let token = token_of("u1");
    let get = |path: &str| server.get(&direct(&upstream.url(path), "&interval_ms=10"), &[bearer(&token)]);
    let count = |path: &str| upstream.requests().iter().filter(|seen| seen.target == path).count();
    assert_eq!((get("/a").status, get("/b").status), (200, 200));
    upstream.wait_for_requests(6, PATIENCE);
    server.reload_text(&first.replace("/*\"]", "/b*\"]"));
    assert_eq!((get("/a").status, get("/a").code(), get("/b").status), (403, "TARGET_BLOCKED".into(), 200));
    // One may have been on its way.
    let (asked, others) = (count("/a"), count("/b"));
    eventually("the other is polled on", || (count("/b") >= others + 20).then_some(()));
    assert!(count("/a") <= asked + 1, "{} of {asked}", count("/a"));
}

#[test]
fn direct_mode_is_for_those_who_may() {
    let upstream = Upstream::start();
    upstream.set_json("/a", "1");
    let path = direct(&upstream.url("/a"), "");
    let body = json!({"url": upstream.url("/a")}).to_string();
    let developer = mint(json!({"sub": "d", "role": "developer", "exp": now_s() + 600}));
    let limited = mint(json!({"sub": "l", "role": "developer", "streams": ["leads"], "exp": now_s() + 600}));
    let direct_only = mint(json!({"sub": "l", "role": "developer", "streams": ["direct:*"], "exp": now_s() + 600}));
    let server = Setup::new()
        .stream("open", &upstream.url("/open"), "allow_anonymous = true")
        .direct(upstream.address(), "roles = [\"developer\"]")
        .start();
    let all = |token: Option<&str>| {
        let headers: Vec<_> = token.map(bearer).into_iter().collect();
        [
            server.get(&path, &headers),
            server.request("POST", "/v1/direct", &headers, &body),
            server.request("POST", "/v1/sessions", &headers, &body),
            server.try_ws("/v1/direct", &headers).err().unwrap_or_else(|| server.get("/healthz", &[])),
        ]
    };
    for (token, status, code) in [
        (None, 401, "MISSING_CREDENTIAL"),
        (Some("x.y.z"), 401, "INVALID_TOKEN"),
        (Some(&*token_of("u1")), 403, "INSUFFICIENT_PERMISSIONS"),
        (Some(&*limited), 403, "FORBIDDEN"),
    ] {
        for answer in all(token) {
            assert_eq!((answer.status, answer.code().as_str()), (status, code), "{token:?}");
        }
    }
    for token in [&developer, &direct_only] {
        assert_eq!(all(Some(token)).map(|answer| answer.status), [200, 200, 201, 200]);
    }
    // A request that is wrong in itself tells so to those alone who may ask.
    assert_eq!(server.get("/v1/direct", &[]).status, 401);
    assert_eq!(server.get("/v1/direct", &[bearer(&developer)]).status, 400);
    assert_eq!(server.get(&format!("{path}&interval_ms=-1"), &[bearer(&developer)]).status, 400);
    let not_allowed = server.request("PUT", "/v1/direct", &[bearer(&developer)], "");
    assert_eq!((not_allowed.status, not_allowed.header("allow")), (405, Some("GET, HEAD, POST, OPTIONS")));
    let off = Setup::new().start();
    for method in ["GET", "POST"] {
        for path in ["/v1/direct", "/v1/sessions"] {
            assert_eq!(off.request(method, path, &[bearer(&developer)], "").status, 404, "{method} {path}");
        }
    }
}

#[test]
fn a_websocket_that_describes_nothing_is_closed_in_time() {
    let upstream = Upstream::start();
    let server = setup(&upstream).limits("handshake_timeout = \"200ms\"").start();
    let mut ws = server.ws("/v1/direct", &[bearer(&token_of("u1"))]);
    assert_eq!(ws.next()["type"], "welcome");
    assert_eq!(ws.closed(), (4008, "auth_timeout".into()));
}

#[test]
fn a_first_message_may_bring_the_credential_and_the_next_the_target() {
    let upstream = Upstream::start();
    upstream.set_json("/a", "[1]");
    let server = setup(&upstream).auth("first_message = \"10s\"").start();
    let mut ws = server.ws("/v1/direct", &[]);
    ws.send(json!({"type": "auth", "token": token_of("u1")}));
    assert_eq!(ws.next()["type"], "welcome");
    ws.send(json!({"type": "open", "url": upstream.url("/a")}));
    assert_eq!(ws.next_of("snapshot")["data"], json!([1]));
    let mut ws = server.ws(&direct(&upstream.url("/a"), ""), &[]);
    ws.send(json!({"type": "auth", "token": token_of("u1")}));
    assert_eq!(ws.next_of("snapshot")["data"], json!([1]));
    let mut ws = server.ws(&direct("http://10.0.0.1/", ""), &[]);
    ws.send(json!({"type": "auth", "token": token_of("u1")}));
    assert_eq!(ws.closed(), (4003, "forbidden".into()));
}

#[test]
fn a_subject_watches_as_many_targets_as_it_may() {
    let upstream = Upstream::start();
    let server = setup(&upstream).limits("streams_per_subject = 2").start();
    let token = token_of("u1");
    let mut held = Vec::new();
    for path in ["/1", "/2", "/1"] {
        upstream.set_json(path, "1");
        let mut ws = server.ws(&direct(&upstream.url(path), ""), &[bearer(&token)]);
        ws.next_of("snapshot");
        held.push(ws);
    }
    upstream.set_json("/3", "1");
    let answer = server.get(&direct(&upstream.url("/3"), ""), &[bearer(&token)]);
    assert_eq!((answer.status, answer.code().as_str()), (429, "TOO_MANY_STREAMS"));
    assert_eq!(server.get(&direct(&upstream.url("/3"), ""), &[bearer(&token_of("u2"))]).status, 200);
}

#[test]
fn a_reload_moves_or_ends_what_callers_have_described() {
    let upstream = Upstream::start();
    upstream.set_json("/a", "1");
    upstream.set_json("/b", "2");
    let first = Setup::new().direct(upstream.address(), "");
    let server = first.start();
    let open = |path: &str| {
        let mut ws = server.ws(&direct(&upstream.url(path), ""), &[bearer(&token_of("u1"))]);
        let epoch = ws.next_of("snapshot")["epoch"].clone();
        (ws, epoch)
    };
    let ((mut a, epoch), (mut b, _)) = (open("/a"), open("/b"));
    let text = first.text().replace("/*\"]", "/a*\"]");
    server.reload_text(&text);
    let moved = a.next_of("snapshot");
    assert!(moved["data"] == json!(1) && moved["epoch"] != epoch, "{moved}");
    assert_eq!(b.closed(), (4003, "forbidden".into()));
    server.reload(&Setup::new());
    let (frames, end) = a.until_close();
    assert_eq!(end, (4004, "stream_ended".into()), "{frames:?}");
}

#[test]
fn a_right_that_is_lost_ends_what_it_was_for() {
    let upstream = Upstream::start();
    upstream.set_json("/a", "1");
    let server = Setup::new().direct(upstream.address(), "roles = [\"developer\"]").start();
    let token = |role: &str| mint(json!({"sub": "u1", "role": role, "exp": now_s() + 600}));
    let mut ws = server.ws(&direct(&upstream.url("/a"), ""), &[bearer(&token("developer"))]);
    ws.next_of("snapshot");
    ws.send(json!({"type": "auth_update", "token": token("developer"), "id": 1}));
    assert_eq!(ws.next_of("auth_ok")["id"], 1);
    ws.send(json!({"type": "auth_update", "token": token("viewer"), "id": 2}));
    assert_eq!(ws.next_of("auth_ok")["id"], 2);
    assert_eq!(ws.closed(), (4003, "forbidden".into()));
}

#[test]
fn a_body_that_is_compressed_is_refused_and_not_misread() {
    let upstream = Upstream::start();
    upstream.set_json("/a", "1");
    let server = setup(&upstream).start();
    let (token, said) = (token_of("u1"), json!({"url": upstream.url("/a")}).to_string());
    let made = json!({"id": "made", "url": upstream.url("/a")}).to_string();
    let hook = ("X-Restcast-Signature", "t=1,v1=00".to_owned());
    let coded = |coding: &str| ("Content-Encoding", coding.to_owned());
    let places = [
        ("/v1/direct", &said, bearer(&token)),
        ("/v1/sessions", &said, bearer(&token)),
        ("/v1/connections/c_0/auth", &said, bearer(&token)),
        ("/v1/hooks/made", &said, hook),
        ("/admin/v1/streams", &made, bearer(ADMIN_KEY)),
    ];
    for (path, body, credential) in &places {
        let connect = || Raw::connect(if path.starts_with("/admin") { server.admin } else { server.listen });
        for coding in ["gzip", "identity, br", "x-unknown", "GZIP"] {
            let mut raw = connect();
            let answer = raw.request("POST", path, &[credential.clone(), coded(coding)], body);
            assert_eq!((answer.status, answer.code().as_str()), (415, "BAD_REQUEST"), "{path} {coding}: {answer:?}");
            // RFC 9110 section 15.5.16.
            assert_eq!(answer.header("accept-encoding"), Some("identity"), "{path}");
            assert!(answer.json()["detail"].as_str().is_some_and(|detail| detail.contains("Content-Encoding")));
            assert!(raw.ends_in_order(), "what is left of the body is no request");
        }
        let plain = connect().request("POST", path, &[credential.clone(), coded("identity")], body);
        assert_ne!(plain.status, 415, "{path}: {plain:?}");
        // There is nothing to be decoded.
        let nothing = connect().request("POST", path, &[credential.clone(), coded("gzip")], "");
        assert_ne!(nothing.status, 415, "{path}: {nothing:?}");
    }
    let chunked = format!(
        "POST /v1/sessions HTTP/1.1\r\nHost: {}\r\nAuthorization: Bearer {token}\r\nContent-Encoding: gzip\r\n\
         Transfer-Encoding: chunked\r\n\r\n",
        server.listen
    );
    let mut raw = server.connect();
    raw.send(chunked.as_bytes());
    assert_eq!(raw.answer().status, 415, "before any of it has come");
    // Who may not say anything is told that first.
    let stranger = server.request("POST", "/v1/sessions", &[coded("gzip")], &said);
    assert_eq!((stranger.status, stranger.code().as_str()), (401, "MISSING_CREDENTIAL"));
    assert_eq!(upstream.requests().iter().filter(|seen| seen.target != "/a").count(), 0);
}
