//! Ephemeral sessions: what is answered, what their tokens open, when they end; against the built server, and where time
//! matters without sockets and clocks.
#![cfg(feature = "runtime")]

mod hall;
mod support;

use std::sync::Arc;
use std::time::Duration;

use hall::{Conn, Hall, SECOND, api_keys};
use restcast::auth::api_key::{ApiKeyId, KeyHash, key_text};
use restcast::auth::jwt;
use restcast::auth::keys::{Algorithm, Key, KeyConfig};
use restcast::secret::Secret;
use restcast::shard::{Input, Order};
use serde_json::{Value, json};

use support::Upstream;
use support::server::{Answer, Server, Setup, bearer, mint, now_s, now_us, token_of};

const HEADER: &str = "a-header-value-that-is-secret-7f7f";
const QUERY: &str = "a-query-value-that-is-secret-93ab";
const BODY: &str = "a-body-that-is-secret-c0ffee";

fn post(server: &Server, token: &str, body: &Value) -> Answer {
    server.request("POST", "/v1/sessions", &[bearer(token)], &body.to_string())
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text")).to_owned()
}

/// The path of a URL of this server.
fn path_of(url: &Value) -> String {
    let url = text(url);
    let behind = url.split_once("://").expect("it is absolute").1;
    behind[behind.find('/').expect("a path")..].to_owned()
}

#[test]
fn a_session_is_opened_by_its_token_in_every_carrier() {
    let upstream = Upstream::start();
    let target = format!("/s?key={QUERY}");
    upstream.set_json("/s", "[7]");
    let server = Setup::new().direct(upstream.address(), "").start();
    let said = json!({"url": upstream.url(&target), "headers": {"X-Key": HEADER}, "body": {"q": BODY}, "interval_ms": 20,
                      "ttl_s": 60});
    let made = post(&server, &token_of("u1"), &said);
    assert_eq!((made.status, made.header("cache-control")), (201, Some("no-store")));
    let session = made.json();
    assert_eq!(session["created"], true);
    let (id, token, stream) = (text(&session["id"]), text(&session["token"]), text(&session["stream"]));
    let host = server.listen;
    assert_eq!(text(&session["ws_url"]), format!("ws://{host}/v1/streams/{stream}"));
    assert_eq!(text(&session["sse_url"]), format!("http://{host}/v1/streams/{stream}"));
    let life_us = session["expires_at"].as_u64().expect("a time") - now_us();
    assert!((30_000_000..=60_000_000).contains(&life_us), "{life_us}");
    let path = path_of(&session["ws_url"]);
    let carriers = [
        (path.clone(), vec![bearer(&token)]),
        (format!("{path}?token={token}"), vec![]),
        (path.clone(), vec![("Cookie", format!("restcast_token={token}"))]),
    ];
    for (path, headers) in &carriers {
        let mut ws = server.ws(path, headers);
        let welcome = ws.next();
        assert_eq!((&welcome["auth"]["sub"], &welcome["auth"]["expires_at"]), (&json!("u1"), &session["expires_at"]));
        assert_eq!(ws.next_of("snapshot")["data"], json!([7]));
        let answer = server.get(path, headers);
        assert_eq!((answer.status, answer.json()), (200, json!([7])));
        let mut sse = server.sse(path, &[headers.clone(), vec![("Accept", "text/event-stream".into())]].concat());
        assert_eq!(sse.next_of("snapshot").data["stream"], json!(stream));
    }
    let mut ws = server.ws(&path, &[("Sec-WebSocket-Protocol", format!("restcast.v1, jwt, {token}"))]);
    ws.next_of("snapshot");
    let mut many = server.ws("/v1/ws", &[bearer(&token)]);
    many.send(json!({"type": "subscribe", "stream": stream, "id": 1}));
    assert_eq!(many.next_of("snapshot")["data"], json!([7]));
    // Its maker is told of it once more, without the token.
    let told = server.get(&format!("/v1/sessions/{id}"), &[bearer(&token_of("u1"))]);
    assert_eq!((told.status, told.json()["stream"].clone()), (200, json!(stream)));
    let kept = [
        server.log_text(),
        server.metrics(),
        told.text(),
        server.admin("GET", "/admin/v1/connections?sub=u1", Some(support::server::ADMIN_KEY)).text(),
    ]
    .concat();
    for secret in [HEADER, QUERY, BODY, &token] {
        assert!(!kept.contains(secret), "{secret}");
    }
    for secret in [HEADER, QUERY, BODY] {
        assert!(!made.text().contains(secret), "{secret}");
    }
}

#[test]
fn a_session_shows_what_its_select_leaves_and_no_more() {
    let upstream = Upstream::start();
    upstream.set_json("/a", r#"{"open":1,"closed":2}"#);
    let server = Setup::new().direct(upstream.address(), "").start();
    let token = token_of("u1");
    let session = post(&server, &token, &json!({"url": upstream.url("/a"), "select": "$.open"})).json();
    let (path, own) = (path_of(&session["sse_url"]), bearer(&text(&session["token"])));
    assert_eq!(server.get(&path, std::slice::from_ref(&own)).json(), json!(1));
    let more = server.get(&format!("{path}?select=$.closed"), std::slice::from_ref(&own));
    assert_eq!((more.status, more.code().as_str()), (400, "BAD_REQUEST"));
    let mut many = server.ws("/v1/ws", std::slice::from_ref(&own));
    many.send(json!({"type": "subscribe", "stream": session["stream"], "select": "$", "id": 1}));
    assert_eq!(many.next_of("error")["code"], "BAD_MESSAGE");
    many.send(json!({"type": "subscribe", "stream": session["stream"], "id": 2}));
    assert_eq!(many.next_of("snapshot")["data"], json!(1));
    // A configuration with another `[direct]` moves it, and leaves as little of it.
    server.reload(&Setup::new().direct(upstream.address(), "interval_min = \"400ms\""));
    assert_eq!(many.next_of("snapshot")["data"], json!(1));
    assert_eq!(post(&server, &token, &json!({"url": upstream.url("/a"), "select": "$["})).status, 400);
    // In direct mode it is the caller's own.
    let mut ws = server.ws("/v1/direct", &[bearer(&token)]);
    ws.send(json!({"type": "open", "url": upstream.url("/a"), "select": "$.closed"}));
    assert_eq!(ws.next_of("snapshot")["data"], json!(2));
}

#[test]
fn a_sessions_token_is_good_for_its_stream_alone() {
    let upstream = Upstream::start();
    upstream.set_json("/a", "1");
    upstream.set_json("/b", "2");
    let server = Setup::new()
        .stream("leads", &upstream.url("/leads"), "")
        .stream("open", &upstream.url("/leads"), "allow_anonymous = true")
        .action("act", &upstream.url("/act"), "")
        .direct(upstream.address(), "")
        .start();
    let make = |path: &str, sub: &str| post(&server, &token_of(sub), &json!({"url": upstream.url(path)})).json();
    let (a, b) = (make("/a", "u1"), make("/b", "u1"));
    let token = text(&a["token"]);
    let own = bearer(&token);
    for (path, code) in [
        ("/v1/streams/leads".to_owned(), "FORBIDDEN"),
        ("/v1/streams/open".into(), "FORBIDDEN"),
        ("/v1/streams/nothing".into(), "FORBIDDEN"),
        (path_of(&b["sse_url"]), "FORBIDDEN"),
        (format!("/v1/direct?url={}", upstream.url("/a")), "FORBIDDEN"),
        (format!("/v1/sessions/{}", text(&a["id"])), "NOT_FOUND"),
    ] {
        assert_eq!(server.get(&path, std::slice::from_ref(&own)).code(), code, "{path}");
    }
    for path in ["/v1/sessions", "/v1/direct", "/v1/tickets"] {
        let answer =
            server.request("POST", path, std::slice::from_ref(&own), &json!({"url": upstream.url("/a")}).to_string());
        assert_eq!((answer.status, answer.code().as_str()), (403, "FORBIDDEN"), "{path}");
    }
    let mut ws = server.ws(&path_of(&a["ws_url"]), std::slice::from_ref(&own));
    ws.next_of("snapshot");
    ws.send(json!({"type": "act", "id": 1}));
    assert_eq!(ws.next_of("error")["code"], "FORBIDDEN");
    // A connection does not change from what is good for one stream to what is good for more, nor back.
    for (other, id) in [(token_of("u1"), 2), (text(&b["token"]), 3)] {
        ws.send(json!({"type": "auth_update", "token": other, "id": id}));
        assert_eq!(ws.next_of("error")["code"], "AUTH_SUBJECT_MISMATCH");
    }
    ws.send(json!({"type": "auth_update", "token": token, "id": 4}));
    assert_eq!(ws.next_of("auth_ok")["id"], 4);
    // Others do not reach it, by whatever they know of it.
    assert_eq!(server.get(&path_of(&a["sse_url"]), &[bearer(&token_of("u1"))]).status, 404);
    for (method, sub) in [("GET", "u2"), ("DELETE", "u2")] {
        let answer = server.request(method, &format!("/v1/sessions/{}", text(&a["id"])), &[bearer(&token_of(sub))], "");
        assert_eq!(answer.status, 404, "{method}");
    }
    let changed = format!("{}A", &token[..token.len() - 1]);
    if changed != token {
        assert_eq!(server.get(&path_of(&a["sse_url"]), &[bearer(&changed)]).code(), "INVALID_TOKEN");
    }
    let gone = server.request("DELETE", &format!("/v1/sessions/{}", text(&a["id"])), &[bearer(&token_of("u1"))], "");
    assert_eq!((gone.status, gone.body.len()), (204, 0));
    let (frames, end) = ws.until_close();
    assert_eq!(end, (4004, "stream_ended".into()));
    assert_eq!(frames.last().map(|frame| frame["state"].clone()), Some(json!("ended")));
    assert_eq!(server.get(&path_of(&a["sse_url"]), std::slice::from_ref(&own)).code(), "INVALID_TOKEN");
}

#[test]
fn the_same_name_by_the_same_subject_is_the_same_session() {
    let upstream = Upstream::start();
    upstream.set_json("/a", "1");
    let server = Setup::new().direct(upstream.address(), "sessions_per_subject = 2").start();
    let said = json!({"url": upstream.url("/a"), "dedupe_key": "k"});
    let first = post(&server, &token_of("u1"), &said).json();
    for _ in 0..8 {
        // On whichever core.
        let again = post(&server, &token_of("u1"), &said);
        assert_eq!(again.status, 200);
        let mut expected = first.clone();
        expected["created"] = json!(false);
        assert_eq!(again.json(), expected);
    }
    let other = post(&server, &token_of("u2"), &said);
    assert!(other.status == 201 && other.json()["id"] != first["id"] && other.json()["token"] != first["token"]);
    assert_eq!(other.json()["stream"], first["stream"], "one poll for both");
    let issued = mint(json!({"sub": "u1", "iss": "other", "exp": now_s() + 600}));
    assert_eq!(post(&server, &issued, &said).status, 201, "another issuer's u1 is somebody else");
    let nobody = mint(json!({"exp": now_s() + 600}));
    assert_eq!(post(&server, &nobody, &said).code(), "BAD_REQUEST");
    // One more of u1's, and then there are as many as there may be.
    let more =
        |n: u32| post(&server, &token_of("u1"), &json!({"url": upstream.url("/a"), "dedupe_key": format!("k{n}")}));
    assert_eq!(more(1).status, 201);
    let full = more(2);
    assert_eq!((full.status, full.code().as_str()), (429, "TOO_MANY_STREAMS"));
    assert_eq!(post(&server, &token_of("u1"), &said).status, 200);
    let gone =
        server.request("DELETE", &format!("/v1/sessions/{}", text(&first["id"])), &[bearer(&token_of("u1"))], "");
    assert_eq!(gone.status, 204);
    assert_eq!(more(2).status, 201);
}

#[test]
fn all_sessions_of_a_process_are_bounded_and_their_bodies_judged() {
    let upstream = Upstream::start();
    let server = Setup::new().direct(upstream.address(), "").limits("streams = 2").start();
    let said = json!({"url": upstream.url("/a")});
    assert_eq!([1, 2].map(|n| post(&server, &token_of(&format!("u{n}")), &said).status), [201, 201]);
    let full = post(&server, &token_of("u3"), &said);
    assert_eq!((full.status, full.code().as_str()), (503, "TOO_MANY_STREAMS"));
    assert!(full.header("retry-after").is_some());
    for (body, status) in [("", 400), ("[]", 400), ("{}", 400), ("{\"url\":1}", 400)] {
        let answer = server.request("POST", "/v1/sessions", &[bearer(&token_of("u1"))], body);
        assert_eq!(answer.status, status, "{body}");
    }
    let large = json!({"url": upstream.url("/a"), "more": "x".repeat(70_000)}).to_string();
    assert_eq!(server.request("POST", "/v1/sessions", &[bearer(&token_of("u1"))], &large).status, 413);
    let chunked = [bearer(&token_of("u1")), ("Content-Length", "0".to_owned())];
    assert_eq!(server.request("POST", "/v1/sessions", &chunked, "").status, 400);
}

#[test]
fn the_urls_are_as_the_client_sees_this_server() {
    let upstream = Upstream::start();
    let said = json!({"url": upstream.url("/a")}).to_string();
    let make = |server: &Server, headers: &[(&str, String)]| {
        let headers = [&[bearer(&token_of("u1"))], headers].concat();
        text(&server.request("POST", "/v1/sessions", &headers, &said).json()["ws_url"])
    };
    let direct = |setup: Setup| setup.direct(upstream.address(), "").start();
    let plain = direct(Setup::new());
    assert!(make(&plain, &[("Host", "live.example:81".into())]).starts_with("ws://live.example:81/v1/streams/direct:"));
    let proxied = direct(Setup::new().server("trusted_proxies = [\"127.0.0.1/32\"]"));
    let told = [("X-Forwarded-Proto", "https".to_owned()), ("X-Forwarded-Host", "far.example".to_owned())];
    assert!(make(&proxied, &told).starts_with("wss://far.example/v1/streams/direct:"));
    assert!(make(&plain, &told).starts_with("ws://127.0.0.1:"), "nobody else is believed");
    let public = direct(Setup::new().server("public_origin = \"https://own.example\""));
    assert!(make(&public, &told).starts_with("wss://own.example/v1/streams/direct:"));
}

// Without sockets.

fn setup(lines: &str) -> hall::Setup {
    let setup = hall::Setup::new();
    hall::Setup { text: format!("[direct]\nallow_public = true\n{lines}"), cores: 2, ..setup }
}

/// A process by itself, and one that shares a store.
fn alone_and_sharing(lines: &str) -> [hall::Setup; 2] {
    [false, true].map(|store| hall::Setup { store, ..setup(lines) })
}

/// Two processes that share a store.
fn two(lines: &str) -> [Hall; 2] {
    let one = Hall::new(&setup(lines));
    let mut other = Hall::new(&hall::Setup { seed: 90, ..setup(lines) });
    other.ephemerals = std::rc::Rc::clone(&one.ephemerals);
    [one, other]
}

fn pass(halls: &mut [Hall], by: Duration) {
    halls.iter_mut().for_each(|hall| hall.pass(by));
}

fn make(hall: &mut Hall, carrier: (&str, &str), said: Value) -> (Conn, Value) {
    let conn = hall.connect(0);
    let body = said.to_string();
    let text = format!(
        "POST /v1/sessions HTTP/1.1\r\nHost: live.example\r\n{}: {}\r\nContent-Length: {}\r\n\r\n{body}",
        carrier.0,
        carrier.1,
        body.len()
    );
    hall.say(conn, text.as_bytes());
    let (status, answer) = hall.answered(conn);
    assert!(status == 201 || status == 200, "{status} {answer}");
    (conn, answer)
}

fn watch(hall: &mut Hall, core: usize, session: &Value) -> Conn {
    let conn = hall.upgrade(
        core,
        &path_of(&session["ws_url"]),
        &[("Authorization", &format!("Bearer {}", text(&session["token"])))],
    );
    assert_eq!(hall.kinds(conn), ["welcome", "snapshot"]);
    conn
}

fn status(hall: &mut Hall, session: &Value) -> u16 {
    let token = format!("Bearer {}", text(&session["token"]));
    let conn = hall.request(1, "GET", &path_of(&session["sse_url"]), &[("Authorization", &token)]);
    match hall.answered(conn).0 {
        // It was polled a moment ago, and is not polled again at once.
        0 => {
            hall.pass(SECOND);
            hall.answered(conn).0
        }
        answered => answered,
    }
}

const TARGET: &str = "https://api.example.com/a";

#[test]
fn a_session_ends_at_its_time_on_every_core() {
    for setup in alone_and_sharing("session_ttl_max = \"60s\"\n") {
        let mut hall = Hall::new(&setup);
        let token = format!("Bearer {}", hall.token(json!({})));
        let (_, long) = make(&mut hall, ("Authorization", &token), json!({"url": TARGET, "ttl_s": 3600}));
        let (_, short) = make(&mut hall, ("Authorization", &token), json!({"url": TARGET, "ttl_s": 20}));
        let ends = |session: &Value| session["expires_at"].as_u64().expect("a time") / 1_000_000 - hall::WALL_S;
        assert_eq!((ends(&long), ends(&short)), (60, 20), "lowered to what is the most");
        let conns = [0, 1].map(|core| watch(&mut hall, core, &short));
        let other = watch(&mut hall, 0, &long);
        hall.pass(SECOND * 20 - hall::MS);
        assert!(conns.map(|conn| hall.kinds(conn).is_empty()).iter().all(|quiet| *quiet));
        hall.pass(hall::MS * 2);
        for conn in conns {
            assert_eq!(hall.kinds(conn), ["stream_status", "4004 stream_ended"]);
        }
        assert!(hall.kinds(other).is_empty(), "another session with the same stream goes on");
        assert_eq!(status(&mut hall, &short), 401);
        hall.pass(SECOND * 40);
        assert_eq!(hall.kinds(other), ["stream_status", "4004 stream_ended"]);
    }
}

#[test]
fn a_session_ends_a_while_after_its_last_watcher() {
    for setup in alone_and_sharing("linger = \"5s\"\n") {
        let mut hall = Hall::new(&setup);
        let token = format!("Bearer {}", hall.token(json!({})));
        let said = json!({"url": TARGET, "dedupe_key": "k"});
        let (_, session) = make(&mut hall, ("Authorization", &token), said.clone());
        hall.pass(SECOND * 600);
        let (one, other) = (watch(&mut hall, 0, &session), watch(&mut hall, 1, &session));
        hall.lose(one);
        hall.pass(SECOND * 60);
        hall.lose(other);
        hall.pass(SECOND * 4);
        // Whoever returns in time finds it there, and it lingers anew after that.
        let back = watch(&mut hall, 0, &session);
        hall.pass(SECOND * 60);
        hall.lose(back);
        hall.pass(SECOND * 5 - hall::MS);
        assert_eq!(make(&mut hall, ("Authorization", &token), said.clone()).1["created"], false);
        hall.pass(hall::MS * 2);
        assert_eq!(status(&mut hall, &session), 401);
        let (_, new) = make(&mut hall, ("Authorization", &token), said);
        assert!(new["created"] == true && new["token"] != session["token"]);
        // A value that is asked for is a watcher too.
        assert_eq!(status(&mut hall, &new), 200);
        hall.pass(SECOND * 6);
        assert_eq!(status(&mut hall, &new), 401);
    }
}

#[test]
fn a_session_does_not_outlive_its_makers_logout() {
    for setup in alone_and_sharing("") {
        let mut hall = Hall::new(&setup);
        hall.put_session("s1", json!({"userId": "u3", "cookie": {}}), None);
        let token = format!("Bearer {}", hall.token(json!({"jti": "t1"})));
        let other = format!("Bearer {}", hall.token(json!({"sub": "u2", "jti": "t2"})));
        let cookie = hall::cookie("s1");
        let said = json!({"url": TARGET, "dedupe_key": "k"});
        for (carrier, event, data, reason) in [
            (("Authorization", &*token), "user-logged-out", json!({"userId": "u1"}), "4010 logged_out"),
            (
                ("Authorization", &*other),
                "token-revoked",
                json!({"jti": "t2", "exp": hall::WALL_S + 3_600}),
                "4010 token_revoked",
            ),
            (("Cookie", &*cookie), "user-logged-out", json!({"sessionId": "s1"}), "4010 logged_out"),
        ] {
            let (_, session) = make(&mut hall, carrier, said.clone());
            let conn = watch(&mut hall, 1, &session);
            hall.pass(SECOND * 3);
            hall.hear(event, data);
            assert_eq!(hall.kinds(conn), [reason]);
            assert_eq!(status(&mut hall, &session), 401, "{reason}");
        }
        // Signed in again, the same name is another session.
        hall.pass(SECOND);
        let token = format!("Bearer {}", hall.token(json!({"iat": hall::WALL_S + 3_000})));
        hall.pass(SECOND * 3_000);
        let (_, new) = make(&mut hall, ("Authorization", &token), said);
        assert_eq!(new["created"], true);
    }
}

#[test]
fn a_session_hangs_on_what_its_maker_does_but_not_on_the_end_of_a_token() {
    for setup in alone_and_sharing("roles = [\"developer\"]\n") {
        let mut hall = Hall::new(&setup);
        let token = format!("Bearer {}", hall.token(json!({"role": "developer", "exp": hall::WALL_S + 10})));
        let (_, session) = make(&mut hall, ("Authorization", &token), json!({"url": TARGET}));
        let conn = watch(&mut hall, 1, &session);
        hall.pass(SECOND * 100);
        assert!(hall.kinds(conn).is_empty(), "a session has an end of its own");
        // Who may name targets no more has none.
        hall.hear("permission-update", json!({"userId": "u1", "roles": ["viewer"]}));
        assert_eq!(hall.kinds(conn), ["permission_update", "4003 forbidden"]);
        assert_eq!(status(&mut hall, &session), 403);
        hall.hear("permission-update", json!({"userId": "u1", "roles": ["developer"]}));
        assert_eq!(status(&mut hall, &session), 200);
        // The operator's word counts as it is now.
        hall.reload(&hall::Setup {
            text: "[direct]\nallow = [\"https://other.example.com/*\"]\n".into(),
            ..setup.clone()
        });
        assert_eq!(status(&mut hall, &session), 403);
        hall.reload(&hall::Setup { text: String::new(), ..setup.clone() });
        assert_eq!(status(&mut hall, &session), 404);
    }
}

#[test]
fn an_anonymous_connection_that_was_raised_by_a_session_ends_with_it() {
    let leads = ("leads".to_owned(), "allow_anonymous = true\ninterval = \"1h\"".to_owned());
    let mut hall = Hall::new(&hall::Setup { streams: vec![leads], ..setup("") });
    let token = format!("Bearer {}", hall.token(json!({})));
    let (_, session) = make(&mut hall, ("Authorization", &token), json!({"url": TARGET}));
    let conn = hall.upgrade(1, "/v1/ws", &[]);
    hall.message(conn, json!({"type": "auth_update", "token": session["token"]}));
    hall.message(conn, json!({"type": "subscribe", "stream": session["stream"]}));
    hall.message(conn, json!({"type": "subscribe", "stream": "leads"}));
    assert_eq!(hall.kinds(conn), ["welcome", "auth_ok", "subscribed", "snapshot", "error"]);
    let path = format!("/v1/sessions/{}", text(&session["id"]));
    let gone = hall.request(0, "DELETE", &path, &[("Authorization", &token)]);
    assert_eq!(hall.answered(gone).0, 204);
    assert_eq!(hall.kinds(conn), ["stream_status", "4004 stream_ended"]);
}

#[test]
fn a_session_cookie_from_a_foreign_page_makes_no_session() {
    let mut hall = Hall::new(&setup(""));
    hall.put_session("s1", json!({"userId": "u3", "cookie": {}}), None);
    let cookie = hall::cookie("s1");
    for origin in ["https://evil.example", "http://live.example"] {
        let conn = hall.connect(0);
        let body = json!({"url": TARGET}).to_string();
        let head = format!(
            "POST /v1/sessions HTTP/1.1\r\nHost: live.example\r\nCookie: {cookie}\r\nOrigin: {origin}\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        // The body comes in pieces, and the record of the session before it.
        hall.say(conn, head.as_bytes());
        hall.pass(Duration::from_millis(5));
        let (start, end) = body.split_at(7);
        hall.say(conn, start.as_bytes());
        hall.say(conn, end.as_bytes());
        let (status, answer) = hall.answered(conn);
        match origin {
            "https://evil.example" => assert_eq!((status, &answer["code"]), (403, &json!("ORIGIN_NOT_ALLOWED"))),
            _ => assert_eq!((status, &answer["created"]), (201, &json!(true))),
        }
    }
}

/// Whatever may become of a credential while a body is on its way: who presents it, what happens, and the refusal that follows;
/// none where it is good all the same.
type Meanwhile = (&'static str, String, Box<dyn Fn(&mut Hall)>, Option<(u16, &'static str)>);

#[test]
fn what_becomes_of_a_credential_while_a_body_is_on_its_way_counts_when_it_is_whole() {
    let rotating = |close: bool, key: &str| hall::Setup {
        text: format!(
            "[direct]\nallow_public = true\nroles = [\"developer\"]\n[auth.jwt]\nclose_on_key_removal = {close}\n{key}"
        ),
        ..setup("")
    };
    let secret = "the secret of a key that is taken out";
    let old = format!("[[auth.jwt.key]]\nkid = \"old\"\nalg = \"HS256\"\nsecret = {secret:?}\n");
    let config = KeyConfig { kid: Some("old".into()), algorithm: Algorithm::Hs256, secret: Secret::new(secret) };
    let claims = json!({"sub": "u9", "role": "developer", "exp": hall::WALL_S + 600});
    let of_old = format!("Bearer {}", jwt::mint(&Key::new(&config).expect("a key"), &claims.to_string()));
    let api_key = key_text(&ApiKeyId::new("k").expect("an id"), &[7; 32]);
    let hash = KeyHash::new(&api_key, [1; 16]).to_text();
    let api_key = String::from_utf8(api_key.expose_secret().to_vec()).expect("text");
    let line = move |role: &str, more: &str| {
        let line =
            format!("[[auth.api_key]]\nid = \"k\"\nhash = {hash:?}\nstreams = [\"*\"]\nroles = [{role:?}]\n{more}");
        api_keys(&line)
    };
    let record = |role: &str| json!({"userId": "u3", "userRole": role, "cookie": {}});
    let told = |keys: Arc<_>| -> Box<dyn Fn(&mut Hall)> {
        Box::new(move |hall| hall.tell_all(|| Input::ApiKeys(Arc::clone(&keys))))
    };
    let cases = |hall: &Hall| -> Vec<Meanwhile> {
        let token = |sub: &str| format!("Bearer {}", hall.token(json!({"sub": sub, "role": "developer", "jti": sub})));
        let heard = |event: &'static str, data: Value| -> Box<dyn Fn(&mut Hall)> {
            Box::new(move |hall| hall.hear(event, data.clone()))
        };
        vec![
            ("X-Api-Key", api_key.clone(), Box::new(|_| ()), None),
            ("X-Api-Key", api_key.clone(), told(api_keys("")), Some((401, "TOKEN_REVOKED"))),
            ("X-Api-Key", api_key.clone(), told(line("viewer", "")), Some((403, "INSUFFICIENT_PERMISSIONS"))),
            (
                "X-Api-Key",
                api_key.clone(),
                told(line("developer", "expires = 2027-01-15T08:00:00Z\n")),
                Some((401, "TOKEN_EXPIRED")),
            ),
            ("Authorization", token("u1"), Box::new(|_| ()), None),
            ("Authorization", token("u1"), heard("user-logged-out", json!("u1")), Some((401, "LOGGED_OUT"))),
            (
                "Authorization",
                token("u2"),
                heard("token-revoked", json!({"jti": "u2", "exp": hall::WALL_S + 9_999})),
                Some((401, "TOKEN_REVOKED")),
            ),
            (
                "Authorization",
                token("u4"),
                heard("permission-update", json!({"userId": "u4", "roles": ["viewer"]})),
                Some((403, "INSUFFICIENT_PERMISSIONS")),
            ),
            (
                "Authorization",
                of_old.clone(),
                Box::new(move |hall: &mut Hall| hall.reload(&rotating(true, ""))),
                Some((401, "INVALID_TOKEN")),
            ),
            ("Authorization", of_old.clone(), Box::new(move |hall: &mut Hall| hall.reload(&rotating(false, ""))), None),
            (
                "Cookie",
                hall::cookie("s1"),
                Box::new(move |hall: &mut Hall| {
                    hall.put_session("s1", record("viewer"), None);
                    // Its record is read again.
                    hall.tell_all(|| Input::StoreState { up: true });
                }),
                Some((403, "INSUFFICIENT_PERMISSIONS")),
            ),
        ]
    };
    for path in ["/v1/direct", "/v1/sessions"] {
        for accept in ["text/event-stream", "application/json"] {
            let count = cases(&Hall::new(&rotating(true, &old))).len();
            for number in 0..count {
                let mut hall = Hall::new(&rotating(true, &old));
                let keys = line("developer", "");
                hall.tell_all(|| Input::ApiKeys(Arc::clone(&keys)));
                hall.put_session("s1", record("developer"), None);
                let (name, value, happens, wanted) = cases(&hall).swap_remove(number);
                let body = json!({"url": TARGET}).to_string();
                let head = format!(
                    "POST {path} HTTP/1.1\r\nHost: live.example\r\nAccept: {accept}\r\n{name}: {value}\r\nContent-Length: {}\r\n\r\n",
                    body.len()
                );
                let conn = hall.connect(0);
                hall.say(conn, head.as_bytes());
                let (start, end) = body.split_at(7);
                hall.say(conn, start.as_bytes());
                assert_eq!(hall.bytes(conn), b"", "it is waited for");
                happens(&mut hall);
                hall.say(conn, end.as_bytes());
                let answer = String::from_utf8(hall.bytes(conn)).expect("text");
                let context = format!("{path} {accept} case {number}: {answer}");
                match wanted {
                    None => assert!(answer.starts_with("HTTP/1.1 20"), "{context}"),
                    Some((status, code)) => {
                        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{context}");
                        assert!(answer.contains(&format!("\"code\":\"{code}\"")), "{context}");
                    }
                }
            }
        }
    }
}

// Several processes that share a store.

#[test]
fn a_session_is_opened_told_of_and_ended_at_another_process_than_made_it() {
    let [mut one, mut two] = two("");
    let token = format!("Bearer {}", one.token(json!({})));
    let said = json!({"url": TARGET, "headers": {"X-Key": HEADER}, "select": "$.a", "dedupe_key": "k", "ttl_s": 100});
    let (_, session) = make(&mut one, ("Authorization", &token), said.clone());
    let conns = [0, 1].map(|core| watch(&mut two, core, &session));
    let here = watch(&mut one, 0, &session);
    // The same name, and the same request, are the same at the other.
    let (_, same) = make(&mut two, ("Authorization", &token), said);
    let mut expected = session.clone();
    expected["created"] = json!(false);
    assert_eq!(same, expected);
    let (_, other) = make(&mut two, ("Authorization", &token), json!({"url": TARGET, "headers": {"X-Key": HEADER}}));
    assert!(other["stream"] == session["stream"] && other["id"] != session["id"]);
    let path = format!("/v1/sessions/{}", text(&session["id"]));
    let stranger = format!("Bearer {}", one.token(json!({"sub": "u2"})));
    for (method, carrier, status) in
        [("GET", &stranger, 404), ("DELETE", &stranger, 404), ("GET", &token, 200), ("DELETE", &token, 204)]
    {
        let asked = two.request(0, method, &path, &[("Authorization", carrier)]);
        let (answered, told) = two.answered(asked);
        assert_eq!(answered, status, "{method}");
        if answered == 200 {
            assert_eq!((&told["stream"], &told["expires_at"]), (&session["stream"], &session["expires_at"]));
            assert_eq!(told["token"], Value::Null);
        }
    }
    two.heard_at(&mut one);
    let ended = ["stream_status", "4004 stream_ended"];
    assert_eq!(one.kinds(here), ended);
    assert!(conns.iter().all(|conn| two.kinds(*conn) == ended));
    assert_eq!([&mut one, &mut two].map(|hall| status(hall, &session)), [401, 401]);
    let asked = one.request(0, "GET", &path, &[("Authorization", &token)]);
    assert_eq!(one.answered(asked).0, 404);
}

#[test]
fn a_session_lives_as_long_as_anybody_watches_anywhere_and_lingers_then() {
    let mut halls = two("linger = \"5s\"\n");
    let token = format!("Bearer {}", halls[0].token(json!({"exp": hall::WALL_S + 10})));
    let (_, session) = make(&mut halls[0], ("Authorization", &token), json!({"url": TARGET}));
    pass(&mut halls, SECOND * 300);
    let here = watch(&mut halls[0], 0, &session);
    let there = watch(&mut halls[1], 1, &session);
    pass(&mut halls, SECOND * 100);
    halls[0].lose(here);
    pass(&mut halls, SECOND * 300);
    assert!(halls[1].kinds(there).is_empty());
    let back = watch(&mut halls[0], 1, &session);
    halls[0].lose(back);
    halls[1].lose(there);
    pass(&mut halls, SECOND * 5 - hall::MS * 2);
    let late = watch(&mut halls[0], 0, &session);
    pass(&mut halls, SECOND * 100);
    halls[0].lose(late);
    pass(&mut halls, SECOND * 5 - hall::MS * 2);
    let now = halls[0].now();
    assert_eq!(halls[0].ephemerals.borrow_mut().len(now), 1);
    pass(&mut halls, hall::MS * 4);
    assert_eq!(halls.each_mut().map(|hall| status(hall, &session)), [401, 401]);
    assert_eq!(halls.each_ref().map(|hall| hall.ledger.ephemeral_sessions()), [0, 0], "nobody keeps it in mind");
}

#[test]
fn a_session_outlives_the_process_that_made_it_and_is_missed_when_its_watchers_process_was_killed() {
    let mut halls = two("linger = \"5s\"\n");
    let token = format!("Bearer {}", halls[0].token(json!({})));
    let (_, session) = make(&mut halls[0], ("Authorization", &token), json!({"url": TARGET}));
    watch(&mut halls[0], 0, &session);
    // The first is killed: it says nothing more.
    halls[1].pass(SECOND * 50);
    let there = watch(&mut halls[1], 0, &session);
    halls[1].pass(SECOND * 200);
    assert!(halls[1].kinds(there).is_empty());
    halls[1].lose(there);
    halls[1].pass(SECOND * 6);
    assert_eq!(status(&mut halls[1], &session), 401);
    // Of one whose only watchers were killed with it the same is known a while later.
    let (_, session) = make(&mut halls[1], ("Authorization", &token), json!({"url": TARGET}));
    watch(&mut halls[1], 0, &session);
    let kept = std::rc::Rc::clone(&halls[1].ephemerals);
    let mut now = halls[1].now();
    now.at = now.at + SECOND * 64;
    assert_eq!(kept.borrow_mut().len(now), 1);
    now.at = now.at + SECOND * 2;
    assert_eq!(kept.borrow_mut().len(now), 0);
}

#[test]
fn an_end_that_nobody_told_of_is_noticed_by_the_next_pass() {
    let mut halls = two("");
    let token = format!("Bearer {}", halls[0].token(json!({})));
    let (_, session) = make(&mut halls[0], ("Authorization", &token), json!({"url": TARGET}));
    let conn = watch(&mut halls[0], 1, &session);
    let path = format!("/v1/sessions/{}", text(&session["id"]));
    let gone = halls[1].request(0, "DELETE", &path, &[("Authorization", &token)]);
    assert_eq!(halls[1].answered(gone).0, 204);
    pass(&mut halls, SECOND * 11);
    assert_eq!(halls[0].kinds(conn), ["stream_status", "4004 stream_ended"]);
}

#[test]
fn while_the_store_is_away_what_is_watched_goes_on_and_nothing_is_made_or_ended() {
    let mut halls = two("linger = \"5s\"\n");
    let token = format!("Bearer {}", halls[0].token(json!({})));
    let said = json!({"url": TARGET});
    let (_, session) = make(&mut halls[0], ("Authorization", &token), said.clone());
    let (_, unopened) = make(&mut halls[0], ("Authorization", &token), said.clone());
    let conn = watch(&mut halls[0], 0, &session);
    for hall in &mut halls {
        hall.away = true;
        hall.tell_all(|| Input::StoreState { up: false });
    }
    let path = format!("/v1/sessions/{}", text(&session["id"]));
    let gone = halls[0].request(0, "DELETE", &path, &[("Authorization", &token)]);
    assert_eq!(halls[0].answered(gone).0, 503);
    let told = halls[0].request(0, "GET", &path, &[("Authorization", &token)]);
    assert_eq!(halls[0].answered(told).0, 200, "it is known here");
    let body = said.to_string();
    let asked = halls[0].connect(0);
    let head = format!(
        "POST /v1/sessions HTTP/1.1\r\nHost: a\r\nAuthorization: {token}\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    halls[0].say(asked, format!("{head}{body}").as_bytes());
    let (refused, why) = halls[0].answered(asked);
    assert_eq!((refused, &why["code"]), (503, &json!("SESSION_STORE_UNAVAILABLE")));
    assert_eq!(halls.each_mut().map(|hall| status(hall, &unopened)), [503, 503]);
    pass(&mut halls, SECOND * 100);
    assert!(halls[0].kinds(conn).is_empty());
    let second = watch(&mut halls[0], 1, &session);
    halls[0].lose(conn);
    halls[0].lose(second);
    pass(&mut halls, SECOND * 4);
    let back = watch(&mut halls[0], 1, &session);
    // The store comes back, and has forgotten everything: who watches gives it back.
    halls[0].ephemerals.borrow_mut().flush();
    for hall in &mut halls {
        hall.away = false;
        hall.tell_all(|| Input::StoreState { up: true });
    }
    assert_eq!(status(&mut halls[1], &session), 200);
    assert_eq!(status(&mut halls[1], &unopened), 401, "nobody has it any more");
    assert!(halls[0].kinds(back).is_empty());
    halls[0].lose(back);
    pass(&mut halls, SECOND * 6);
    assert_eq!(halls.each_mut().map(|hall| status(hall, &session)), [401, 401]);
}

#[test]
fn what_was_ended_while_a_process_could_not_hear_of_it_is_not_given_back() {
    let mut halls = two("");
    let token = format!("Bearer {}", halls[0].token(json!({})));
    let (_, session) = make(&mut halls[0], ("Authorization", &token), json!({"url": TARGET}));
    let conn = watch(&mut halls[0], 0, &session);
    halls[0].away = true;
    let path = format!("/v1/sessions/{}", text(&session["id"]));
    let gone = halls[1].request(0, "DELETE", &path, &[("Authorization", &token)]);
    assert_eq!(halls[1].answered(gone).0, 204);
    pass(&mut halls, SECOND * 100);
    assert!(halls[0].kinds(conn).is_empty());
    halls[0].away = false;
    halls[0].tell_all(|| Input::StoreState { up: true });
    assert_eq!(halls[0].kinds(conn), ["stream_status", "4004 stream_ended"]);
    assert_eq!(halls.each_mut().map(|hall| status(hall, &session)), [401, 401]);
}

#[test]
fn sessions_are_bounded_over_all_processes_and_a_logout_makes_room() {
    let mut halls = two("sessions_per_subject = 2\nlinger = \"5s\"\n");
    let token = format!("Bearer {}", halls[0].token(json!({})));
    let said = json!({"url": TARGET}).to_string();
    let ask = |hall: &mut Hall, token: &str| {
        let conn = hall.connect(0);
        let head = format!(
            "POST /v1/sessions HTTP/1.1\r\nHost: a\r\nAuthorization: {token}\r\nContent-Length: {}\r\n\r\n",
            said.len()
        );
        hall.say(conn, format!("{head}{said}").as_bytes());
        hall.answered(conn)
    };
    let first = ask(&mut halls[0], &token).1;
    assert_eq!(ask(&mut halls[1], &token).0, 201);
    assert_eq!([0, 1].map(|at| ask(&mut halls[at], &token).0), [429, 429]);
    // One that ends by its linger counts no more.
    let conn = watch(&mut halls[1], 0, &first);
    halls[1].lose(conn);
    pass(&mut halls, SECOND * 6);
    assert_eq!(ask(&mut halls[1], &token).0, 201);
    assert_eq!(ask(&mut halls[0], &token).0, 429);
    for hall in &mut halls {
        hall.hear("user-logged-out", json!({"userId": "u1"}));
        hall.pass(SECOND * 10);
    }
    let anew = format!("Bearer {}", halls[0].token(json!({"iat": hall::WALL_S + 15})));
    assert_eq!([0, 1, 0].map(|at| ask(&mut halls[at], &anew).0), [201, 201, 429]);
    let other = format!("Bearer {}", halls[0].token(json!({"sub": "u2"})));
    assert_eq!(ask(&mut halls[0], &other).0, 201);
}

#[test]
fn a_logout_ends_the_sessions_that_its_user_made_at_whichever_process() {
    let mut halls = two("");
    let token = format!("Bearer {}", halls[0].token(json!({"jti": "t1"})));
    let said = json!({"url": TARGET, "dedupe_key": "k"});
    let token_of_two = format!("Bearer {}", halls[0].token(json!({"sub": "u2", "jti": "t3"})));
    let (_, session) = make(&mut halls[0], ("Authorization", &token), said.clone());
    let conn = watch(&mut halls[1], 0, &session);
    for hall in &mut halls {
        hall.hear("token-revoked", json!({"jti": "t1", "exp": hall::WALL_S + 3_600}));
    }
    assert_eq!(halls[1].kinds(conn), ["4010 token_revoked"]);
    assert_eq!(halls.each_mut().map(|hall| status(hall, &session)), [401, 401]);
    // Also where nobody has found out that what stands under it is good for nothing.
    let of_four = |hall: &Hall, jti: &str| format!("Bearer {}", hall.token(json!({"sub": "u4", "jti": jti})));
    let (revoked, next) = (of_four(&halls[0], "t4"), of_four(&halls[0], "t5"));
    let (_, unopened) = make(&mut halls[0], ("Authorization", &revoked), said.clone());
    halls.iter_mut().for_each(|hall| hall.hear("token-revoked", json!({"jti": "t4", "exp": hall::WALL_S + 3_600})));
    let (_, renewed) = make(&mut halls[1], ("Authorization", &next), said.clone());
    assert!(renewed["created"] == true && renewed["token"] != unopened["token"]);
    assert_eq!(status(&mut halls[0], &unopened), 401);
    // However many find it out, it is said once of each process.
    let said_of_it = |hall: &Hall| {
        let ends = |order: &&Order| matches!(order, Order::Publish(entry) if entry.is_of_ephemerals());
        hall.orders.iter().filter(ends).count()
    };
    let (_, many) = make(&mut halls[0], ("Authorization", &token_of_two), said.clone());
    halls.iter_mut().for_each(|hall| hall.hear("token-revoked", json!({"jti": "t3", "exp": hall::WALL_S + 3_600})));
    let (hall, own) = (&mut halls[1], format!("Bearer {}", text(&many["token"])));
    hall.orders.clear();
    hall.answers = false;
    for _ in 0..100 {
        hall.request(0, "GET", &path_of(&many["sse_url"]), &[("Authorization", &own)]);
    }
    hall.answers = true;
    hall.pass(hall::MS);
    assert_eq!(said_of_it(hall), 1);
    // Its name is free again for who comes with another token.
    let token = format!("Bearer {}", halls[0].token(json!({"jti": "t2"})));
    let (_, new) = make(&mut halls[1], ("Authorization", &token), said.clone());
    assert!(new["created"] == true && new["token"] != session["token"]);
    assert_eq!(make(&mut halls[0], ("Authorization", &token), said).1["token"], new["token"]);
}

#[test]
fn a_thousand_who_come_back_at_once_ask_for_their_session_once() {
    let mut halls = two("");
    let token = format!("Bearer {}", halls[0].token(json!({})));
    let (_, session) = make(&mut halls[0], ("Authorization", &token), json!({"url": TARGET}));
    let own = format!("Bearer {}", text(&session["token"]));
    let hall = &mut halls[1];
    hall.answers = false;
    let conns: Vec<_> =
        (0..1_000).map(|_| hall.upgrade(0, &path_of(&session["ws_url"]), &[("Authorization", &own)])).collect();
    // One of them goes before there is an answer.
    hall.lose(conns[0]);
    hall.answers = true;
    hall.pass(hall::MS);
    assert_eq!(hall.ephemerals.borrow().reads, 1);
    assert!(conns[1..].iter().all(|conn| hall.kinds(*conn) == ["welcome", "snapshot"]));
}

#[test]
fn words_of_two_cores_that_overtake_each_other_end_nothing() {
    let mut halls = two("linger = \"2s\"\n");
    let token = format!("Bearer {}", halls[0].token(json!({})));
    let (_, session) = make(&mut halls[0], ("Authorization", &token), json!({"url": TARGET}));
    let own = format!("Bearer {}", text(&session["token"]));
    let conn = watch(&mut halls[0], 0, &session);
    let hall = &mut halls[0];
    hall.answers = false;
    hall.lose(conn);
    hall.upgrade(1, &path_of(&session["ws_url"]), &[("Authorization", &own)]);
    // Opened on the other core; that nobody watches is said after that somebody does.
    let left = hall.questions.pop_front().expect("it was left");
    let read = hall.questions.pop_front().expect("it is looked up");
    hall.answer(read);
    hall.pass(hall::MS);
    let held = hall.questions.pop_front().expect("it is held");
    hall.answer(held);
    hall.answer(left);
    hall.answers = true;
    pass(&mut halls, SECOND * 8);
    let mut now = halls[0].now();
    now.at = now.at + SECOND * 40;
    assert_eq!(halls[0].ephemerals.borrow_mut().len(now), 1);
    watch(&mut halls[1], 0, &session);
}

#[test]
fn a_draining_process_leaves_its_sessions_for_those_who_connect_again() {
    let mut halls = two("linger = \"1s\"\n");
    let token = format!("Bearer {}", halls[0].token(json!({})));
    let (_, session) = make(&mut halls[0], ("Authorization", &token), json!({"url": TARGET}));
    let conn = watch(&mut halls[0], 0, &session);
    halls[0].tell_all(|| Input::Drain);
    halls[0].lose(conn);
    pass(&mut halls, SECOND * 20);
    watch(&mut halls[1], 0, &session);
}
