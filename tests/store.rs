//! Sessions and tickets with a real Redis that goes away, is slow and comes back, through the built server.

mod support;

use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::redis::Said;
use support::server::{Heard, Server, Setup, Ws, bearer, eventually, mint, now_s, outcome, token_of};
use support::{Proxy, Redis, Upstream};

const COOKIE_SECRET: &str = "a secret of the session cookies";
/// How late a test may hear of something on a busy machine.
const SLACK: Duration = Duration::from_secs(3);

/// The cookie of a session, made without the server's code.
fn cookie(sid: &str) -> [(&'static str, String); 1] {
    use base64::Engine as _;
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, COOKIE_SECRET.as_bytes());
    let tag = base64::engine::general_purpose::STANDARD_NO_PAD.encode(ring::hmac::sign(&key, sid.as_bytes()));
    let tag = tag.replace('+', "%2B").replace('/', "%2F");
    [("Cookie", format!("connect.sid=s%3A{sid}.{tag}"))]
}

fn put(redis: &Redis, sid: &str, record: Value, life: Duration) {
    let life = life.as_millis().to_string();
    redis.command(&["SET", &format!("sess:{sid}"), &record.to_string(), "PX", &life]);
}

fn setup(url: &str, session: &str) -> (Upstream, Setup) {
    let upstream = Upstream::start();
    upstream.set_json("/leads", "[{\"id\":1}]");
    let session = format!("timeout = \"1s\"\n[auth.session]\nsecrets = [{COOKIE_SECRET:?}]\n{session}\n");
    let setup = Setup::new().redis(url, &session).stream("leads", &upstream.url("/leads"), "");
    (upstream, setup)
}

fn watch(server: &Server, sid: &str) -> Ws {
    let mut ws = server.ws("/v1/streams/leads", &cookie(sid));
    ws.next_of("snapshot");
    ws
}

fn unavailable() -> (u16, String) {
    (503, "SESSION_STORE_UNAVAILABLE".to_owned())
}

#[test]
fn while_redis_is_away_sessions_get_503_tokens_go_on_and_live_sessions_have_their_grace() {
    let mut redis = Redis::start();
    put(&redis, "s1", json!({ "userId": "u1" }), Duration::from_secs(600));
    let (_upstream, setup) = setup(&redis.url(), "grace = \"4s\"\nreread = \"500ms\"");
    let server = setup.start();
    let mut live = watch(&server, "s1");
    redis.kill();
    let away = Instant::now();
    eventually("it is noticed", || {
        let answer = server.get("/v1/streams/leads", &cookie("s1"));
        assert_eq!(outcome(&answer), unavailable());
        assert!(answer.header("retry-after").is_some());
        Some(())
    });
    assert!(away.elapsed() < Duration::from_secs(1) + SLACK, "within the timeout: {:?}", away.elapsed());
    let token = token_of("u1");
    assert_eq!(server.get("/v1/streams/leads", &[bearer(&token)]).status, 200);
    assert_eq!(live.closed(), (4001, "session_expired".to_owned()));
    let lasted = away.elapsed();
    assert!(lasted >= Duration::from_millis(3_900), "the grace was cut short: {lasted:?}");
    assert!(lasted < Duration::from_secs(6) + SLACK, "{lasted:?}");
    // And with it there again all is well.
    redis.restart();
    eventually("sessions are taken again", || {
        server.try_ws("/v1/streams/leads", &cookie("s1")).ok().map(|mut ws| ws.next_of("snapshot"))
    });
}

#[test]
fn what_was_missed_is_read_when_redis_is_there_again() {
    let redis = Redis::start();
    for sid in ["s1", "s2", "s3"] {
        put(&redis, sid, json!({ "userId": "u1", "permissions": ["a"] }), Duration::from_secs(600));
    }
    let proxy = Proxy::to(redis.address());
    // Nothing is read again by itself within this test.
    let (_upstream, setup) = setup(&redis.url_at(proxy.address()), "reread = \"1h\"");
    let server = setup.start();
    let [mut deleted, mut changed, mut same] = ["s1", "s2", "s3"].map(|sid| watch(&server, sid));
    proxy.down();
    redis.command(&["DEL", "sess:s1"]);
    put(&redis, "s2", json!({ "userId": "u1", "permissions": ["b"] }), Duration::from_secs(600));
    assert!(deleted.is_quiet_for(Duration::from_millis(500)), "nobody can know");
    proxy.heal();
    assert_eq!(deleted.closed(), (4001, "session_expired".to_owned()));
    let update = json!({ "type": "permission_update", "permissions": ["b"], "roles": [] });
    assert_eq!(changed.next_of("permission_update"), update);
    assert!(same.is_quiet_for(Duration::from_millis(500)));
}

#[test]
fn a_stalled_redis_is_503_after_its_timeout() {
    let redis = Redis::start();
    put(&redis, "s1", json!({ "userId": "u1" }), Duration::from_secs(600));
    let proxy = Proxy::to(redis.address());
    let (_upstream, setup) = setup(&redis.url_at(proxy.address()), "");
    let server = setup.start();
    let mut live = watch(&server, "s1");
    proxy.stall();
    let begun = Instant::now();
    assert_eq!(outcome(&server.get("/v1/streams/leads", &cookie("s1"))), unavailable());
    assert!(begun.elapsed() < Duration::from_secs(1) + SLACK, "{:?}", begun.elapsed());
    assert_eq!(server.get("/v1/streams/leads", &[bearer(&token_of("u1"))]).status, 200);
    live.send(json!({ "type": "auth_update", "id": 1 }));
    let frame = live.next_of("error");
    assert_eq!(
        (&frame["code"], &frame["reason"]),
        (&json!("AUTH_UPDATE_REJECTED"), &json!("session_store_unavailable"))
    );
    proxy.heal();
    proxy.cut();
    eventually("it answers again", || (server.get("/v1/streams/leads", &cookie("s1")).status == 200).then_some(()));
    live.send(json!({ "type": "auth_update", "id": 2 }));
    assert_eq!(live.next_of("auth_ok")["id"], 2);
}

#[test]
fn a_session_is_closed_in_time_and_an_extended_one_is_not() {
    let redis = Redis::start();
    let life = Duration::from_secs(4);
    let (_upstream, setup) = setup(&redis.url(), "");
    let server = setup.start();
    // It ends between these two.
    let earliest = Instant::now() + life;
    put(&redis, "s1", json!({ "userId": "u1" }), life);
    put(&redis, "s2", json!({ "userId": "u2" }), life);
    let latest = Instant::now() + life;
    let (mut short, mut long) = (watch(&server, "s1"), watch(&server, "s2"));
    assert!(long.heard_within(Duration::from_secs(1)).is_none(), "it has just begun");
    redis.command(&["PEXPIRE", "sess:s2", "60000"]);
    assert_eq!(short.until_close().1, (4001, "session_expired".to_owned()));
    let late = Instant::now();
    assert!(late + Duration::from_millis(50) > earliest, "closed {:?} early", earliest - late);
    assert!(late < latest + Duration::from_millis(250) + SLACK, "closed {:?} late", late - latest);
    while let Some(heard) = long.heard_within(Duration::from_secs(1)) {
        assert!(matches!(&heard, Heard::Frame(frame) if frame["type"] == "reauthenticate"), "{heard:?}");
    }
    long.send(json!({ "type": "auth_update" }));
    assert!(long.next_of("auth_ok")["expires_at"].as_u64().expect("an end") > (now_s() + 40) * 1_000_000);
}

fn ticket(server: &Server, token: &str) -> String {
    let answer = server.request("POST", "/v1/tickets", &[bearer(token)], "");
    assert_eq!(answer.status, 201, "{}", answer.text());
    answer.json()["ticket"].as_str().expect("a ticket").to_owned()
}

#[test]
fn a_ticket_is_used_once_by_however_many_processes_at_once() {
    let redis = Redis::start();
    let (_upstream, setup) = setup(&redis.url(), "");
    let servers = [setup.start(), setup.start()];
    let token = mint(json!({ "sub": "u1", "exp": now_s() + 600 }));
    for round in 0..5 {
        let path = format!("/v1/streams/leads?ticket={}", ticket(&servers[round % 2], &token));
        let opened: usize = thread::scope(|scope| {
            let tries: Vec<_> = (0..16)
                .map(|no| {
                    let (server, path) = (&servers[no % 2], &path);
                    scope.spawn(move || match server.try_ws(path, &[]) {
                        Ok(mut ws) => {
                            assert_eq!(ws.next()["auth"]["type"], "ticket");
                            1
                        }
                        Err(answer) => {
                            assert_eq!(outcome(&answer), (401, "INVALID_TOKEN".to_owned()));
                            0
                        }
                    })
                })
                .collect();
            tries.into_iter().map(|one| one.join().expect("it is tried")).sum()
        });
        assert_eq!(opened, 1, "round {round}");
    }
    match redis.command(&["KEYS", "*ticket*"]) {
        Said::List(keys) => assert!(keys.is_empty(), "they are used up: {keys:?}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn redis_holds_no_ticket_that_could_be_used() {
    let redis = Redis::start();
    let (_upstream, setup) = setup(&redis.url(), "");
    let server = setup.start();
    let made = ticket(&server, &token_of("u1"));
    let Said::List(keys) = redis.command(&["KEYS", "*ticket*"]) else { panic!("keys") };
    let [Said::Text(key)] = keys.as_slice() else { panic!("one: {keys:?}") };
    assert!(!key.contains(&made[4..]), "the key is a hash");
    let life = redis.number(&["PTTL", key]);
    assert!((1..=30_000).contains(&life), "{life}");
    let record = redis.text(&["GET", key]).expect("a record");
    assert!(!record.contains(&made[4..]) && record.contains("u1"), "{record}");
}

#[test]
fn without_redis_a_ticket_is_its_own_processs() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", "[{\"id\":1}]");
    let setup = Setup::new().stream("leads", &upstream.url("/leads"), "");
    let (here, there) = (setup.start(), setup.start());
    let path = format!("/v1/streams/leads?ticket={}", ticket(&here, &token_of("u1")));
    assert_eq!(outcome(&there.get(&path, &[])), (401, "INVALID_TOKEN".to_owned()));
    assert_eq!(here.get(&path, &[]).status, 200);
    assert_eq!(outcome(&here.get(&path, &[])), (401, "INVALID_TOKEN".to_owned()));
}

#[test]
fn tickets_are_made_and_used_while_redis_is_away_and_what_it_has_waits_for_it() {
    let mut redis = Redis::start();
    let (_upstream, setup) = setup(&redis.url(), "");
    let server = setup.start();
    let before = ticket(&server, &token_of("u1"));
    redis.kill();
    let path = format!("/v1/streams/leads?ticket={}", ticket(&server, &token_of("u1")));
    assert_eq!(server.get(&path, &[]).status, 200);
    assert_ne!(server.get(&path, &[]).status, 200);
    let answer = server.get(&format!("/v1/streams/leads?ticket={before}"), &[]);
    assert_eq!(outcome(&answer), unavailable(), "another process may have used it");
}

#[test]
fn a_ticket_that_was_made_while_redis_was_away_is_503_elsewhere_and_no_failure() {
    let redis = Redis::start();
    let proxy = Proxy::to(redis.address());
    let (_upstream, setup_there) = setup(&redis.url(), "");
    let (_upstream_here, setup_here) = setup(&format!("redis://{}", proxy.address()), "");
    let there = setup_there.limits("auth_failures_per_minute = 2").start();
    let here = setup_here.start();
    proxy.down();
    let made = ticket(&here, &token_of("u1"));
    let path = format!("/v1/streams/leads?ticket={made}");
    for _ in 0..5 {
        let answer = there.get(&path, &[]);
        assert_eq!(outcome(&answer), unavailable());
        assert!(answer.header("retry-after").is_some(), "{answer:?}");
    }
    assert_eq!(there.get("/v1/streams/leads", &[bearer(&token_of("u1"))]).status, 200, "nothing has failed");
    assert_eq!(here.get(&path, &[]).status, 200);
    assert_eq!(outcome(&here.get(&path, &[])), (401, "INVALID_TOKEN".to_owned()), "its own process knows");
    // One that says of itself that it is over, or is spelled otherwise, is none.
    for bad in [format!("{}00000001", &made[..63]), made[..63].to_owned()] {
        let answer = there.get(&format!("/v1/streams/leads?ticket={bad}"), &[]);
        assert_eq!(outcome(&answer), (401, "INVALID_TOKEN".to_owned()), "{bad}");
    }
}

#[test]
fn a_ticket_is_used_once_while_redis_is_cut_from_its_maker() {
    let redis = Redis::start();
    let proxy = Proxy::to(redis.address());
    let (_upstream, setup_there) = setup(&redis.url(), "");
    let (_upstream_here, setup_here) = setup(&format!("redis://{}", proxy.address()), "");
    let (here, there) = (setup_here.start(), setup_there.start());
    let path = format!("/v1/streams/leads?ticket={}", ticket(&here, &token_of("u1")));
    proxy.down();
    assert_eq!(outcome(&here.get(&path, &[])), unavailable());
    assert_eq!(there.get(&path, &[]).status, 200);
    assert_eq!(outcome(&there.get(&path, &[])), (401, "INVALID_TOKEN".to_owned()));
    assert_eq!(outcome(&here.get(&path, &[])), unavailable());
    proxy.heal();
    eventually("Redis is reached again, and says that it was used", || {
        let said = outcome(&here.get(&path, &[]));
        (said != unavailable()).then(|| assert_eq!(said, (401, "INVALID_TOKEN".to_owned())))
    });
}
