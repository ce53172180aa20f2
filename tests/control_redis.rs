//! Logouts, revocations and permissions that come by Redis: published, on the control stream, missed and caught up with;
//! against the built server and a real Redis.

mod support;

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use ring::hmac;
use rustix::process::Signal;
use serde_json::{Value, json};
use support::redis::{Said, free_port};
use support::server::{Raw, Server, Setup, Ws, away, bearer, connected, eventually, mint, now_s, refused, watching};
use support::{Proxy, Redis, Upstream};

/// Until when an event acts that has reached the process (protocol section 5).
const BOUND: Duration = Duration::from_millis(250);
const SESSION_SECRET: &str = "a session secret of the tests";

fn setup(url: &str, upstream: &Upstream) -> Setup {
    Setup::new()
        .redis(url, "timeout = \"1s\"\n[auth.session]\nsecrets = [\"a session secret of the tests\"]\n")
        .stream("leads", &upstream.url("/leads"), "")
        .stream("orders", &upstream.url("/orders"), "permissions = [\"orders.read\"]")
}

fn upstream() -> Upstream {
    let upstream = Upstream::start();
    upstream.set_json("/leads", r#"{"n":0}"#);
    upstream.set_json("/orders", r#"{"n":0}"#);
    upstream
}

fn claims(sub: &str) -> Value {
    json!({ "sub": sub, "exp": now_s() + 600, "iat": now_s(), "jti": format!("of {sub}"), "permissions": ["orders.read"] })
}

fn gone(reason: &str) -> (u16, String) {
    (4010, reason.to_owned())
}

/// The cookie of the session `sid`, as express-session makes it.
fn cookie(sid: &str) -> (&'static str, String) {
    let key = hmac::Key::new(hmac::HMAC_SHA256, SESSION_SECRET.as_bytes());
    let signature = STANDARD_NO_PAD.encode(hmac::sign(&key, sid.as_bytes()));
    let value: String = format!("s:{sid}.{signature}")
        .bytes()
        .map(|byte| if byte.is_ascii_alphanumeric() { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect();
    ("Cookie", format!("connect.sid={value}"))
}

fn sign_in(redis: &Redis, sid: &str, user: &str, permissions: &[&str]) {
    let record = json!({ "cookie": { "originalMaxAge": null }, "userId": user, "permissions": permissions });
    redis.command(&["SET", &format!("sess:{sid}"), &record.to_string(), "EX", "600"]);
}

#[test]
fn a_published_logout_closes_each_connection_on_every_core_of_every_process() {
    let (redis, upstream) = (Redis::start(), upstream());
    let servers: Vec<Server> = (0..2).map(|_| setup(&redis.url(), &upstream).start()).collect();
    servers.iter().for_each(connected);
    redis.wait_for_subscribers("user-logged-out", 2);
    let mut took = Vec::new();
    for round in 0..5 {
        let user = format!("u{round}");
        let token = mint(claims(&user));
        let mut theirs: Vec<Ws> =
            servers.iter().flat_map(|server| (0..40).map(|_| watching(server, &token, "/v1/streams/leads"))).collect();
        let mut other = watching(&servers[1], &mint(claims("other")), "/v1/streams/leads");
        let begun = Instant::now();
        // In each of its forms.
        let data = [user.clone(), json!({ "userId": user }).to_string(), json!(user).to_string()];
        redis.publish("user-logged-out", &data[round % 3]);
        theirs.iter_mut().for_each(|ws| assert_eq!(ws.closed(), gone("logged_out")));
        took.push(begun.elapsed());
        for server in &servers {
            assert_eq!(refused(server, &token), (401, "LOGGED_OUT".into()));
        }
        assert!(other.heard_within(Duration::from_millis(10)).is_none());
        if took.last().is_some_and(|took| *took < BOUND) && round >= 2 {
            break;
        }
    }
    assert!(took.iter().any(|took| *took < BOUND), "{took:?}");
}

#[test]
fn published_revocations_and_permissions_act_at_once() {
    let (redis, upstream) = (Redis::start(), upstream());
    let server = setup(&redis.url(), &upstream).start();
    connected(&server);
    redis.wait_for_subscribers("token-revoked", 1);
    let of = |sub: &str| watching(&server, &mint(claims(sub)), "/v1/ws");
    let (mut by_jti, mut by_time, mut changed) = (of("u1"), of("u2"), of("u3"));
    redis.publish("token-revoked", &json!({ "jti": "of u1", "exp": now_s() + 600 }).to_string());
    assert_eq!(by_jti.closed(), gone("token_revoked"));
    redis.publish("token-revoked", &json!({ "userId": "u2", "iat_before": now_s() + 1 }).to_string());
    assert_eq!(by_time.closed(), gone("token_revoked"));
    changed.send(json!({ "type": "subscribe", "stream": "orders", "id": 1 }));
    changed.next_of("snapshot");
    redis.publish("permission-update", &json!({ "userId": "u3", "permissions": [], "roles": ["clerk"] }).to_string());
    assert_eq!(changed.next(), json!({ "type": "permission_update", "permissions": [], "roles": ["clerk"] }));
    assert_eq!(changed.next(), json!({ "type": "unsubscribed", "stream": "orders", "reason": "forbidden" }));
    assert_eq!(changed.closed(), (4003, "forbidden".into()));
    // What is heard is put on the control stream, from which it comes back and does no harm.
    eventually("it is on the stream", || (redis.number(&["XLEN", "restcast:control"]) >= 3).then_some(()));
    // What is no event is counted, said once and not shown.
    for _ in 0..3 {
        redis.publish("token-revoked", r#"{"jti":["hush-hush"]}"#);
        redis.publish("permission-update", "hush-hush");
    }
    eventually("they are counted", || (server.metric(&["restcast_control_events_refused_total"]) >= 6.0).then_some(()));
    server.wait_for_log("was not understood", 1);
    assert_eq!(server.log_count("hush-hush"), 0);
}

#[test]
fn sessions_are_logged_out_by_themselves_or_with_their_user_and_are_then_judged_by_their_record() {
    let (redis, upstream) = (Redis::start(), upstream());
    let server = setup(&redis.url(), &upstream).start();
    connected(&server);
    redis.wait_for_subscribers("user-logged-out", 1);
    for (sid, user) in [("s1", "u1"), ("s2", "u1"), ("s3", "u3")] {
        sign_in(&redis, sid, user, &["orders.read"]);
    }
    let open = |sid: &str| {
        let mut ws = server.ws("/v1/streams/orders", &[cookie(sid)]);
        ws.next_of("snapshot");
        ws
    };
    let mut tabs = [open("s1"), open("s1")];
    let (mut second, mut third) = (open("s2"), open("s3"));
    redis.publish("user-logged-out", &json!({ "sessionId": "s1" }).to_string());
    tabs.iter_mut().for_each(|ws| assert_eq!(ws.closed(), gone("logged_out")));
    // Its record may still be there: it is refused all the same.
    let answer = server.get("/v1/streams/orders", &[cookie("s1")]);
    assert_eq!((answer.status, answer.code()), (401, "LOGGED_OUT".into()));
    assert!(second.heard_within(Duration::from_millis(50)).is_none(), "another session of the user goes on");
    redis.publish("user-logged-out", &json!({ "userId": "u1" }).to_string());
    assert_eq!(second.closed(), gone("logged_out"));
    // Who signs in again, with a record of now, is let in; what the stream says of before ends nobody.
    eventually("the user is let in again", || {
        (server.get("/v1/streams/orders", &[cookie("s2")]).status == 200).then_some(())
    });
    let mut again = open("s2");
    assert!(again.heard_within(Duration::from_millis(200)).is_none());
    // A session is read again when its user's permissions have changed, and its record is what counts.
    sign_in(&redis, "s3", "u3", &["other"]);
    redis.publish("permission-update", &json!({ "userId": "u3", "permissions": ["orders.read", "x"] }).to_string());
    assert_eq!(third.next(), json!({ "type": "permission_update", "permissions": ["other"], "roles": [] }));
    assert_eq!(third.closed(), (4003, "forbidden".into()));
}

#[test]
fn a_logout_that_was_put_on_the_stream_while_the_process_was_away_takes_effect_at_its_start() {
    let (redis, upstream) = (Redis::start(), upstream());
    let old = mint(json!({ "sub": "u1", "exp": now_s() + 600, "iat": now_s() - 30 }));
    let at = (now_s() - 10) * 1000;
    redis.command(&["XADD", "restcast:control", "*", "event", "user-logged-out", "data", "u1", "at", &at.to_string()]);
    let entry = json!({ "jti": "of u2" }).to_string();
    redis.command(&["XADD", "restcast:control", "*", "event", "token-revoked", "data", &entry]);
    let server = setup(&redis.url(), &upstream).start();
    // Ready means that it was read.
    assert_eq!(refused(&server, &old), (401, "LOGGED_OUT".into()));
    assert_eq!(refused(&server, &mint(claims("u2"))), (401, "TOKEN_REVOKED".into()));
    let later = mint(json!({ "sub": "u1", "exp": now_s() + 600, "iat": now_s() - 5 }));
    assert_eq!(refused(&server, &later).0, 200, "it is dated by the entry, not by when it was read");
}

#[test]
fn nobody_is_let_in_before_what_was_said_while_the_process_was_away_has_been_read() {
    let (redis, upstream) = (Redis::start(), upstream());
    redis.command(&["XADD", "restcast:control", "*", "event", "user-logged-out", "data", "u1"]);
    let old = mint(json!({ "sub": "u1", "exp": now_s() + 600, "iat": now_s() - 30 }));
    let proxy = Proxy::to(redis.address());
    proxy.stall();
    let [listen, admin] = [free_port(), free_port()].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
    // As long as it takes to see that nobody is let in.
    let text = setup(&redis.url_at(proxy.address()), &upstream).text().replace("timeout = \"1s\"", "timeout = \"10s\"");
    let text = text.replacen("listen = \"127.0.0.1:0\"", &format!("listen = \"{listen}\""), 1);
    let setup = Setup::of_file(&text.replace("listen = \"127.0.0.1:0\"", &format!("listen = \"{admin}\"")));
    let starting = thread::spawn(move || setup.start());
    eventually("it listens", || TcpStream::connect(listen).ok());
    let mut early = Raw::connect(listen);
    early.send_request("GET", "/v1/streams/leads", &[bearer(&old)], "");
    let until = Instant::now() + Duration::from_millis(300);
    while Instant::now() < until {
        let answered = early.socket().peek(&mut [0]);
        let waits = |error: &std::io::Error| matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut);
        assert!(answered.as_ref().is_err_and(waits), "it is answered: {answered:?} {:?}", early.answer());
    }
    let ready = Raw::connect(admin).request("GET", "/readyz", &[], "");
    assert_eq!((ready.status, ready.json()), (503, json!({ "status": "starting" })));
    proxy.heal();
    let answer = early.answer();
    assert_eq!((answer.status, answer.code()), (401, "LOGGED_OUT".into()));
    let server = starting.join().expect("it starts");
    assert_eq!(server.admin("GET", "/readyz", None).status, 200);
}

#[test]
fn a_logout_that_is_dated_far_ahead_is_of_when_it_was_written_however_often_it_is_read() {
    let (redis, upstream) = (Redis::start(), upstream());
    // In microseconds, with a part of a millisecond, or nothing that is a time.
    let micros = (now_s() * 1_000_000).to_string();
    let parts = format!("{}.25", now_s() * 1000);
    for (user, at) in [("u1", micros.as_str()), ("u2", &parts), ("u3", "yesterday")] {
        redis.command(&["XADD", "restcast:control", "*", "event", "user-logged-out", "data", user, "at", at]);
    }
    let of = |user: &str, iat: u64| mint(json!({ "sub": user, "exp": now_s() + 600, "iat": iat }));
    let written = now_s();
    for _ in 0..2 {
        let server = setup(&redis.url(), &upstream).start();
        for user in ["u1", "u2", "u3"] {
            assert_eq!(refused(&server, &of(user, written - 30)), (401, "LOGGED_OUT".into()), "{user}");
            assert_eq!(refused(&server, &of(user, written + 2)).0, 200, "{user} has signed in since");
        }
    }
}

#[test]
fn a_process_that_hears_late_undoes_nothing_that_has_come_since() {
    let (redis, upstream) = (Redis::start(), upstream());
    let [here, late] = [(), ()].map(|()| setup(&redis.url(), &upstream).start());
    [&here, &late].into_iter().for_each(connected);
    redis.wait_for_subscribers("user-logged-out", 2);
    let of = |user: &str, iat: u64| mint(json!({ "sub": user, "exp": now_s() + 600, "iat": iat }));
    let logout = |user: &str| redis.publish("user-logged-out", &json!({ "userId": user }).to_string());
    let told = |permissions: Value| json!({ "type": "permission_update", "permissions": permissions, "roles": [] });
    let mut changed = watching(&here, &of("u1", now_s() - 5), "/v1/ws");
    late.signal(Signal::STOP);
    for permissions in [json!(["first"]), json!(["second"])] {
        redis.publish("permission-update", &json!({ "userId": "u1", "permissions": permissions }).to_string());
        assert_eq!(changed.next(), told(permissions));
    }
    let old = ["u2", "u3"].map(|user| of(user, now_s() - 5));
    for user in ["u2", "u3"] {
        logout(user);
    }
    for token in &old {
        eventually("it is refused", || (refused(&here, token).0 == 401).then_some(()));
    }
    // They sign in again, in a later second, and then the other process hears of all that.
    let second = now_s();
    eventually("the next second", || (now_s() > second).then_some(()));
    let new = ["u2", "u3"].map(|user| of(user, now_s()));
    let mut again = [0, 1].map(|n| watching(&here, &new[n], "/v1/ws"));
    late.signal(Signal::CONT);
    let read = || here.metric(&["restcast_control_entries_total", "read"]);
    eventually("what it has put on the stream is read", || (read() >= 8.0).then_some(()));
    for ws in again.iter_mut().chain([&mut changed]) {
        assert!(ws.heard_within(Duration::from_millis(100)).is_none());
    }
    assert_eq!(refused(&here, &new[0]).0, 200);
    // Who is logged out once more is, in whichever way, and though it is said in the same words.
    logout("u2");
    assert_eq!(again[0].closed(), gone("logged_out"));
    assert_eq!(late.order("POST", "users/u3/logout", &json!({})).status, 200);
    assert_eq!(again[1].closed(), gone("logged_out"));
}

#[test]
fn what_is_said_in_the_same_words_while_one_process_is_cut_off_is_not_taken_for_what_it_has_heard() {
    let (redis, upstream) = (Redis::start(), upstream());
    let proxy = Proxy::to(redis.address());
    let hears = setup(&redis.url(), &upstream).start();
    let cut_off = setup(&redis.url_at(proxy.address()), &upstream).start();
    [&hears, &cut_off].into_iter().for_each(connected);
    redis.wait_for_subscribers("user-logged-out", 2);
    let old = mint(json!({ "sub": "u1", "exp": now_s() + 600, "iat": now_s() - 5 }));
    redis.publish("user-logged-out", "u1");
    eventually("it is refused", || (refused(&cut_off, &old).0 == 401).then_some(()));
    let second = now_s();
    eventually("the next second", || (now_s() > second).then_some(()));
    let mut again = watching(&cut_off, &mint(json!({ "sub": "u1", "exp": now_s() + 600, "iat": now_s() })), "/v1/ws");
    proxy.down();
    away(&cut_off);
    redis.publish("user-logged-out", "u1");
    assert!(again.heard_within(Duration::from_millis(100)).is_none(), "nobody could tell it");
    proxy.heal();
    assert_eq!(again.closed(), gone("logged_out"));
}

#[test]
fn what_another_process_has_heard_while_this_one_was_cut_off_takes_effect_when_it_returns() {
    let (redis, upstream) = (Redis::start(), upstream());
    let proxy = Proxy::to(redis.address());
    let hears = setup(&redis.url(), &upstream).start();
    let cut_off = setup(&redis.url_at(proxy.address()), &upstream).start();
    [&hears, &cut_off].into_iter().for_each(connected);
    redis.wait_for_subscribers("user-logged-out", 2);
    let token = mint(claims("u1"));
    let mut theirs: Vec<Ws> = [&hears, &cut_off].map(|server| watching(server, &token, "/v1/streams/leads")).into();
    let other = watching(&cut_off, &mint(claims("u9")), "/v1/streams/leads");
    proxy.down();
    away(&cut_off);
    redis.publish("user-logged-out", "u1");
    assert_eq!(theirs[0].closed(), gone("logged_out"));
    assert!(theirs[1].heard_within(Duration::from_millis(100)).is_none(), "nobody could tell it");
    assert_eq!(refused(&cut_off, &token).0, 200);
    proxy.heal();
    assert_eq!(theirs[1].closed(), gone("logged_out"));
    assert_eq!(refused(&cut_off, &token), (401, "LOGGED_OUT".into()));
    drop(other);
}

#[test]
fn an_order_of_the_admin_api_reaches_other_processes_also_where_redis_was_away_when_it_was_given() {
    let upstream = upstream();
    let mut redis = Redis::start();
    let servers: Vec<Server> = (0..2).map(|_| setup(&redis.url(), &upstream).start()).collect();
    servers.iter().for_each(connected);
    let order = |path: &str, method: &str, body: Value| {
        let answer = servers[0].order(method, path, &body);
        assert_eq!(answer.status, 200, "{answer:?}");
    };
    let elsewhere = |sub: &str| watching(&servers[1], &mint(claims(sub)), "/v1/ws");
    let (mut first, mut second) = (elsewhere("u1"), elsewhere("u2"));
    order("users/u1/logout", "POST", json!({}));
    assert_eq!(first.closed(), gone("logged_out"));
    redis.stop();
    servers.iter().for_each(away);
    let mut here = watching(&servers[0], &mint(claims("u2")), "/v1/ws");
    order("users/u2/logout", "POST", json!({}));
    assert_eq!(here.closed(), gone("logged_out"), "here it acts without Redis");
    assert!(second.heard_within(Duration::from_millis(100)).is_none());
    redis.restart();
    assert_eq!(second.closed(), gone("logged_out"));
    // It is kept for those who come later.
    eventually("it is on the stream", || {
        let Said::List(entries) = redis.command(&["XRANGE", "restcast:control", "-", "+"]) else { return None };
        format!("{entries:?}").contains("u2").then_some(())
    });
    let third = setup(&redis.url(), &upstream).start();
    assert_eq!(refused(&third, &mint(json!({ "sub": "u2", "exp": now_s() + 60, "iat": now_s() - 60 }))).0, 401);
}

#[test]
fn a_ticket_made_before_a_logout_opens_nothing_after_it() {
    let (redis, upstream) = (Redis::start(), upstream());
    let server = setup(&redis.url(), &upstream).start();
    connected(&server);
    redis.wait_for_subscribers("user-logged-out", 1);
    sign_in(&redis, "s2", "u2", &[]);
    for (sub, credential) in [("u1", bearer(&mint(claims("u1")))), ("u2", cookie("s2"))] {
        let answer = server.request("POST", "/v1/tickets", &[credential], "");
        assert_eq!(answer.status, 201, "{answer:?}");
        let ticket = answer.json()["ticket"].as_str().expect("a ticket").to_owned();
        let before = server.metric(&["restcast_control_events_total"]);
        redis.publish("user-logged-out", sub);
        eventually("it is heard", || (server.metric(&["restcast_control_events_total"]) > before).then_some(()));
        let opened = server.try_ws(&format!("/v1/ws?ticket={ticket}"), &[]);
        match (sub, opened) {
            ("u1", Err(answer)) => assert_eq!((answer.status, answer.code()), (401, "LOGGED_OUT".into())),
            // A session is judged by its record, which is still there when it is read now.
            ("u2", Ok(mut ws)) => assert_eq!(ws.next()["auth"]["type"], "ticket"),
            (_, opened) => panic!("{sub}: {:?}", opened.map(|ws| ws.upgrade)),
        }
    }
}
