//! Sessions of a real application: Express with express-session and connect-redis from npm makes them, in a real Redis;
//! restcast is given nothing but the cookie that it set.

mod support;

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::server::{Answer, Heard, Raw, Server, Setup, Ws, bearer, eventually, mint, now_s};
use support::{Redis, Upstream};

const OLD: &str = "keyboard cat of last year";
const NEW: &str = "keyboard cat of this year";

/// The application, in a process of its own.
struct Express {
    child: Child,
    address: SocketAddr,
}

impl Express {
    fn start(redis: &Redis, environment: &[(&str, &str)]) -> Express {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/express");
        assert!(folder.join("node_modules/express-session").exists(), "run `.ci/setup`, or `npm ci` in tests/express");
        let mut child = Command::new("node")
            .arg("server.js")
            .current_dir(folder)
            .env("REDIS_URL", redis.url())
            .env("SECRETS", OLD)
            .envs(environment.iter().copied())
            .stdout(Stdio::piped())
            .spawn()
            .expect("node starts");
        let mut line = String::new();
        let out = child.stdout.take().expect("it is piped");
        BufReader::new(out).read_line(&mut line).expect("a line");
        let ready: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"));
        let port = u16::try_from(ready["port"].as_u64().expect("a port")).expect("a port");
        Express { child, address: ([127, 0, 0, 1], port).into() }
    }

    fn ask(&self, method: &str, path: &str, cookie: Option<&str>) -> Answer {
        let headers: Vec<_> = cookie.map(|cookie| ("Cookie", cookie.to_owned())).into_iter().collect();
        Raw::connect(self.address).request(method, path, &headers, "")
    }

    /// Signs in: the cookie as a browser sends it back.
    fn login(&self, query: &str) -> String {
        let answer = self.ask("POST", &format!("/login?{query}"), None);
        assert_eq!(answer.status, 200, "{}", answer.text());
        cookie_of(&answer)
    }

    fn post(&self, path: &str, cookie: &str) {
        let answer = self.ask("POST", path, Some(cookie));
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
    }
}

impl Drop for Express {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn cookie_of(answer: &Answer) -> String {
    let set = answer.header("set-cookie").unwrap_or_else(|| panic!("no cookie: {}", answer.text()));
    set.split(';').next().expect("a pair").to_owned()
}

/// A server whose sessions are those of the application, read again every 300 ms.
fn setup(redis: &Redis, upstream: &Upstream, more: &str) -> Setup {
    let session = format!("[auth.session]\nsecrets = [{OLD:?}]\nreread = \"300ms\"\n{more}\n");
    Setup::new()
        .redis(&redis.url(), &session)
        .stream("leads", &upstream.url("/leads"), "")
        .stream("staff", &upstream.url("/leads"), "permissions = [\"staff\"]")
        .stream("agents", &upstream.url("/leads"), "roles = [\"agent\"]")
        .stream("own", &format!("{}/{{claims.companyId}}", upstream.url("/companies")), "")
}

fn upstream() -> Upstream {
    let upstream = Upstream::start();
    upstream.set_json("/leads", "[{\"id\":1}]");
    upstream.set_json("/companies/c1", "{\"of\":\"c1\"}");
    upstream.set_json("/companies/c2", "{\"of\":\"c2\"}");
    upstream
}

fn with(cookie: &str) -> [(&'static str, String); 1] {
    [("Cookie", cookie.to_owned())]
}

fn watch(server: &Server, cookie: &str) -> Ws {
    let mut ws = server.ws("/v1/streams/leads", &with(cookie));
    assert_eq!(ws.next()["auth"]["type"], "session");
    ws.next_of("snapshot");
    ws
}

#[test]
fn who_has_signed_in_watches_by_the_cookie_that_express_has_set() {
    let (redis, upstream) = (Redis::start(), upstream());
    let express = Express::start(&redis, &[("MAX_AGE_MS", "600000")]);
    let server = setup(&redis, &upstream, "").start();
    let cookie = express.login("user=u1&role=agent&company=c1&permissions=staff,other");
    let mut ws = server.ws("/v1/streams/own", &with(&cookie));
    let auth = ws.next()["auth"].clone();
    assert_eq!((&auth["type"], &auth["sub"]), (&json!("session"), &json!("u1")));
    let ends_s = auth["expires_at"].as_u64().expect("it ends") / 1_000_000;
    assert!((now_s() + 500..=now_s() + 601).contains(&ends_s), "{auth}");
    assert_eq!(ws.next_of("snapshot")["data"], json!({ "of": "c1" }));
    for path in ["/v1/streams/leads", "/v1/streams/staff", "/v1/streams/agents"] {
        assert_eq!(server.get(path, &with(&cookie)).json(), json!([{ "id": 1 }]), "{path}");
        let mut events = server.sse(path, &with(&cookie));
        assert_eq!(events.next_of("snapshot").data["data"], json!([{ "id": 1 }]));
    }
    // An id that is a number is the text of it.
    let cookie = express.login("user=42&role=guest&company=c2");
    let mut ws = server.ws("/v1/streams/own", &with(&cookie));
    assert_eq!(ws.next()["auth"]["sub"], "42");
    assert_eq!(ws.next_of("snapshot")["data"], json!({ "of": "c2" }));
    for path in ["/v1/streams/staff", "/v1/streams/agents"] {
        assert_eq!(server.get(path, &with(&cookie)).code(), "INSUFFICIENT_PERMISSIONS");
    }
    // Another browser's header is the other's session, in whatever place the cookie stands.
    let both = format!("theme=dark; {cookie}; lang=en");
    assert_eq!(server.ws("/v1/ws", &with(&both)).next()["auth"]["sub"], "42");
    assert_eq!(server.metric(&["restcast_session_read_failures_total"]), 0.0);
}

#[test]
fn who_has_not_signed_in_is_nobody_and_never_anonymous() {
    let (redis, upstream) = (Redis::start(), upstream());
    let express = Express::start(&redis, &[("UNINITIALIZED", "true")]);
    let server = setup(&redis, &upstream, "").stream("open", &upstream.url("/leads"), "allow_anonymous = true").start();
    let visitor = cookie_of(&express.ask("GET", "/me", None));
    for path in ["/v1/streams/leads", "/v1/streams/open"] {
        let answer = server.get(path, &with(&visitor));
        assert_eq!((answer.status, answer.code()), (401, "SESSION_EXPIRED".to_owned()));
    }
    let other = Express::start(&redis, &[("SECRETS", "not known to restcast")]);
    let cookie = other.login("user=u1");
    let answer = server.get("/v1/streams/open", &with(&cookie));
    assert_eq!((answer.status, answer.code()), (401, "INVALID_TOKEN".to_owned()));
    assert_eq!(server.get("/v1/streams/open", &[]).status, 200);
}

#[test]
fn permissions_that_express_changes_reach_who_is_connected() {
    let (redis, upstream) = (Redis::start(), upstream());
    let express = Express::start(&redis, &[]);
    let server = setup(&redis, &upstream, "").start();
    let cookie = express.login("user=u1&role=agent&company=c1&permissions=staff");
    let mut many = server.ws("/v1/ws", &with(&cookie));
    many.next_of("welcome");
    for stream in ["leads", "staff"] {
        many.send(json!({ "type": "subscribe", "stream": stream }));
        many.next_of("snapshot");
    }
    let mut single = server.ws("/v1/streams/staff", &with(&cookie));
    single.next_of("snapshot");
    express.post("/permissions?permissions=other", &cookie);
    let update = json!({ "type": "permission_update", "permissions": ["other"], "roles": ["agent"] });
    assert_eq!(many.next_of("permission_update"), update);
    assert_eq!(many.next(), json!({ "type": "unsubscribed", "stream": "staff", "reason": "forbidden" }));
    let (frames, close) = single.until_close();
    assert_eq!((frames.last(), close), (Some(&update), (4003, "forbidden".to_owned())));
    express.post("/permissions?permissions=staff", &cookie);
    many.next_of("permission_update");
    many.send(json!({ "type": "subscribe", "stream": "staff" }));
    assert_eq!(many.next_of("snapshot")["stream"], "staff");
}

#[test]
fn who_signs_out_is_closed_in_each_way_of_signing_out() {
    let (redis, upstream) = (Redis::start(), upstream());
    let express = Express::start(&redis, &[]);
    let server = setup(&redis, &upstream, "").start();
    for way in ["/logout", "/forget"] {
        let cookie = express.login("user=u1");
        let (mut tab, mut other_tab) = (watch(&server, &cookie), watch(&server, &cookie));
        let mut bystander = watch(&server, &express.login("user=u1"));
        express.post(way, &cookie);
        assert_eq!(tab.closed(), (4001, "session_expired".to_owned()), "{way}");
        assert_eq!(other_tab.closed(), (4001, "session_expired".to_owned()), "{way}");
        let answer = server.get("/v1/streams/leads", &with(&cookie));
        assert_eq!((answer.status, answer.code()), (401, "SESSION_EXPIRED".to_owned()), "{way}");
        assert!(bystander.is_quiet_for(Duration::from_millis(700)), "another session of the same user goes on");
    }
    // Whoever signs in anew in the same browser has another session.
    let cookie = express.login("user=u1");
    let mut tab = watch(&server, &cookie);
    let answer = express.ask("POST", "/login?user=u2", Some(&cookie));
    assert_eq!(tab.closed(), (4001, "session_expired".to_owned()));
    assert_eq!(server.ws("/v1/ws", &with(&cookie_of(&answer))).next()["auth"]["sub"], "u2");
}

#[test]
fn a_session_ends_when_express_says_and_goes_on_when_it_is_saved() {
    let (redis, upstream) = (Redis::start(), upstream());
    let express = Express::start(&redis, &[("MAX_AGE_MS", "6000"), ("ROLLING", "true")]);
    let server = setup(&redis, &upstream, "").start();
    let (kept, left) = (express.login("user=u1"), express.login("user=u2"));
    let (mut kept_tab, mut left_tab) = (watch(&server, &kept), watch(&server, &left));
    let begun = Instant::now();
    // Each save moves `cookie.expires` and the key's life.
    for n in 0..9 {
        express.post(&format!("/permissions?permissions=p{n}"), &kept);
        kept_tab.next_of("permission_update");
        while let Some(heard) = kept_tab.heard_within(Duration::from_millis(800)) {
            assert!(matches!(&heard, Heard::Frame(frame) if frame["type"] == "reauthenticate"), "{heard:?}");
        }
    }
    assert!(begun.elapsed() > Duration::from_millis(7_000));
    assert_eq!(left_tab.closed(), (4001, "session_expired".to_owned()));
    assert_eq!(express.ask("GET", "/me", Some(&left)).json(), json!({ "user": null }));
    // From here on it is only used, which touches the key and saves nothing: the sooner of the two ends counts.
    assert_eq!(kept_tab.until_close().1, (4001, "session_expired".to_owned()));
}

#[test]
fn a_session_that_restcast_touches_lives_while_it_is_connected() {
    let (redis, upstream) = (Redis::start(), upstream());
    let express = Express::start(&redis, &[("MAX_AGE_MS", "3000")]);
    let server = setup(&redis, &upstream, "touch = true").start();
    let cookie = express.login("user=u1");
    let mut tab = watch(&server, &cookie);
    let until = Instant::now() + Duration::from_millis(6_500);
    while let Some(heard) = tab.heard_within(until.saturating_duration_since(Instant::now())) {
        assert!(matches!(&heard, Heard::Frame(frame) if frame["type"] == "reauthenticate"), "{heard:?}");
    }
    assert_eq!(express.ask("GET", "/me", Some(&cookie)).json(), json!({ "user": "u1" }), "Express has it still");
    drop(tab);
    eventually("it ends when nobody is there", || match redis.command(&["KEYS", "sess:*"]) {
        support::redis::Said::List(keys) => keys.is_empty().then_some(()),
        other => panic!("{other:?}"),
    });
    assert_eq!(server.get("/v1/streams/leads", &with(&cookie)).code(), "SESSION_EXPIRED");
}

#[test]
fn secrets_are_rotated_without_signing_anybody_out() {
    let (redis, upstream) = (Redis::start(), upstream());
    let secrets = format!("{NEW},{OLD}");
    let before = Express::start(&redis, &[]);
    let server = setup(&redis, &upstream, "").start();
    let old = before.login("user=u1");
    let mut tab = watch(&server, &old);
    // restcast learns the new secret first, then the application signs with it.
    let both = setup(&redis, &upstream, "").text().replace(&format!("[{OLD:?}]"), &format!("[{NEW:?}, {OLD:?}]"));
    server.reload_text(&both);
    drop(before);
    let after = Express::start(&redis, &[("SECRETS", &secrets)]);
    let new = after.login("user=u2");
    for (cookie, user) in [(&old, "u1"), (&new, "u2")] {
        assert_eq!(after.ask("GET", "/me", Some(cookie)).json(), json!({ "user": user }));
        eventually("both are taken", || {
            let ws = server.try_ws("/v1/streams/leads", &with(cookie)).ok();
            ws.map(|mut ws| assert_eq!(ws.next()["auth"]["sub"], user))
        });
    }
    server.reload_text(&both.replace(&format!(", {OLD:?}]"), "]"));
    eventually("the old is not", || {
        (server.get("/v1/streams/leads", &with(&old)).code() == "INVALID_TOKEN").then_some(())
    });
    assert_eq!(server.get("/v1/streams/leads", &with(&new)).status, 200);
    assert!(tab.is_quiet_for(Duration::from_millis(700)), "who is connected stays: the session is good");
}

#[test]
fn a_prefix_of_the_applications_own_is_configured() {
    let (redis, upstream) = (Redis::start(), upstream());
    let express = Express::start(&redis, &[("PREFIX", "shop:s:")]);
    let server = setup(&redis, &upstream, "prefix = \"shop:s:\"").start();
    watch(&server, &express.login("user=u1"));
}

#[test]
fn a_ticket_made_by_the_cookie_ends_with_the_session() {
    let (redis, upstream) = (Redis::start(), upstream());
    let express = Express::start(&redis, &[]);
    let server = setup(&redis, &upstream, "").start();
    let cookie = express.login("user=u1&company=c2");
    let answer = server.request("POST", "/v1/tickets", &with(&cookie), "");
    assert_eq!((answer.status, answer.header("cache-control")), (201, Some("no-store")));
    let made = answer.json();
    assert_eq!(made["expires_in_s"], 30);
    let path = format!("/v1/streams/own?ticket={}", made["ticket"].as_str().expect("a ticket"));
    let mut ws = server.ws(&path, &[]);
    let auth = ws.next()["auth"].clone();
    assert_eq!((&auth["type"], &auth["sub"]), (&json!("ticket"), &json!("u1")));
    assert_eq!(ws.next_of("snapshot")["data"], json!({ "of": "c2" }));
    assert_eq!(server.get(&path, &[]).code(), "INVALID_TOKEN");
    express.post("/logout", &cookie);
    assert_eq!(ws.closed(), (4001, "session_expired".to_owned()));
}

#[test]
fn a_token_goes_before_the_cookie_and_the_cookie_before_nothing() {
    let (redis, upstream) = (Redis::start(), upstream());
    let express = Express::start(&redis, &[]);
    let server = setup(&redis, &upstream, "").start();
    let cookie = express.login("user=u1");
    let auth = |token: &str| {
        let headers = [bearer(token), ("Cookie", cookie.clone())];
        let welcome = server.ws("/v1/streams/leads", &headers).next();
        (welcome["auth"]["type"].clone(), welcome["auth"]["sub"].clone())
    };
    let token = |exp: u64| mint(json!({ "sub": "u2", "exp": exp }));
    assert_eq!(auth(&token(now_s() + 60)), (json!("jwt"), json!("u2")));
    assert_eq!(auth(&token(now_s() - 60)), (json!("session"), json!("u1")));
    express.post("/logout", &cookie);
    let headers = [bearer(&token(now_s() - 60)), ("Cookie", cookie.clone())];
    assert_eq!(server.get("/v1/streams/leads", &headers).code(), "SESSION_EXPIRED");
}

#[test]
fn a_session_that_is_to_last_for_ever_is_one() {
    let (redis, upstream) = (Redis::start(), upstream());
    // Dates after the year 9999 have a sign and six digits in JSON: `+014702-…`.
    let express = Express::start(&redis, &[("MAX_AGE_MS", "400000000000000")]);
    let server = setup(&redis, &upstream, "").start();
    let cookie = express.login("user=u1");
    let mut ws = server.ws("/v1/streams/leads", &with(&cookie));
    let ends_us = ws.next()["auth"]["expires_at"].as_u64().expect("it ends");
    assert!(ends_us > 400_000_000_000_000_000, "{ends_us}");
    ws.next_of("snapshot");
    assert!(ws.is_quiet_for(Duration::from_secs(1)), "it is read again, and lives");
}
