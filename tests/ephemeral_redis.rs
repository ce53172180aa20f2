//! Ephemeral sessions shared through Redis: made, opened, told of and ended at different processes; kept as long as anybody
//! watches anywhere; Redis away, back, emptied or written to by others; against built servers and a real Redis.

mod support;

use std::thread;
use std::time::{Duration, Instant};

use restcast::auth::ephemeral::{Place, id_of, token_of_random};
use restcast::auth::ephemeral_record::{SessionFace, SessionRequest, SharedSession};
use restcast::auth::grant::{GrantRecord, Rights};
use restcast::time::WallTime;
use rustix::process::Signal;
use serde_json::{Value, json};

use support::redis::{RedisSetup, Said};
use support::server::{ADMIN_KEY, Answer, SECRET, Server, Setup, Ws, bearer, eventually, now_s, token_of};
use support::{Redis, Reply, Upstream};

const HEADER: &str = "a-header-value-that-is-secret-7f7f";
const QUERY: &str = "a-query-value-that-is-secret-93ab";
const BODY: &str = "a-body-that-is-secret-c0ffee";

fn setup(redis: &Redis, upstream: &Upstream, lines: &str) -> Setup {
    Setup::new().redis(&redis.url(), "timeout = \"500ms\"").direct(upstream.address(), lines)
}

fn upstream() -> Upstream {
    let upstream = Upstream::start();
    upstream.set_json("/a", "[7]");
    upstream
}

fn post(server: &Server, sub: &str, body: &Value) -> Answer {
    server.request("POST", "/v1/sessions", &[bearer(&token_of(sub))], &body.to_string())
}

fn make(server: &Server, body: &Value) -> Value {
    let made = post(server, "u1", body);
    assert!(made.status == 201 || made.status == 200, "{made:?}");
    made.json()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text")).to_owned()
}

fn path_of(session: &Value) -> String {
    format!("/v1/streams/{}", text(&session["stream"]))
}

fn own(session: &Value) -> (&'static str, String) {
    bearer(&text(&session["token"]))
}

fn get(server: &Server, session: &Value) -> Answer {
    server.get(&path_of(session), &[own(session)])
}

fn watch(server: &Server, session: &Value) -> Ws {
    let mut ws = server.ws(&path_of(session), &[own(session)]);
    assert_eq!(ws.next_of("snapshot")["data"], json!([7]));
    ws
}

fn told(server: &Server, method: &str, session: &Value) -> Answer {
    server.request(method, &format!("/v1/sessions/{}", text(&session["id"])), &[bearer(&token_of("u1"))], "")
}

fn ended() -> (u16, String) {
    (4004, "stream_ended".to_owned())
}

/// The names of all keys in Redis that begin so.
fn keys(redis: &Redis, prefix: &str) -> Vec<String> {
    match redis.command(&["KEYS", &format!("{prefix}*")]) {
        Said::List(keys) => {
            keys.into_iter().map(|key| if let Said::Text(key) = key { key } else { panic!("{key:?}") }).collect()
        }
        other => panic!("{other:?}"),
    }
}

/// The sessions whose records stand in Redis.
fn records(redis: &Redis) -> Vec<String> {
    let is_record = |key: &String| key.len() == "restcast:ephemeral:".len() + 43;
    let records = keys(redis, "restcast:ephemeral:").into_iter().filter(is_record);
    records.filter(|key| redis.number(&["STRLEN", key]) > 0).collect()
}

/// All that Redis holds, and all that it has ever been told to write.
fn everything_in(redis: &Redis) -> String {
    let mut all = redis.written();
    for key in keys(redis, "") {
        all.push_str(&key);
        all.push_str(&redis.text(&["DUMP", &key]).unwrap_or_default());
        let value = match redis.text(&["TYPE", &key]).as_deref() {
            Some("string") => redis.command(&["GET", &key]),
            Some("zset") => redis.command(&["ZRANGE", &key, "0", "-1"]),
            Some("hash") => redis.command(&["HGETALL", &key]),
            Some("stream") => redis.command(&["XRANGE", &key, "-", "+"]),
            _ => Said::Nil,
        };
        all.push_str(&format!("{value:?}\n"));
    }
    all
}

#[test]
fn a_session_made_at_one_process_works_at_another_in_every_way_and_its_secrets_are_nowhere() {
    let (redis, upstream) = (Redis::start(), upstream());
    let target = upstream.url(&format!("/a?key={QUERY}"));
    let setup = setup(&redis, &upstream, "sessions_per_subject = 3");
    let (one, two) = (setup.start(), setup.start());
    let said = json!({"url": target, "headers": {"X-Key": HEADER}, "body": {"q": BODY}, "interval_ms": 20,
                      "dedupe_key": "k", "ttl_s": 600});
    let session = make(&one, &said);
    let (path, token) = (path_of(&session), text(&session["token"]));
    // Opened in every carrier and representation.
    for (path, headers) in [
        (path.clone(), vec![bearer(&token)]),
        (format!("{path}?token={token}"), vec![]),
        (path.clone(), vec![("Cookie", format!("restcast_token={token}"))]),
    ] {
        let mut ws = two.ws(&path, &headers);
        let welcome = ws.next();
        assert_eq!((&welcome["auth"]["sub"], &welcome["auth"]["expires_at"]), (&json!("u1"), &session["expires_at"]));
        assert_eq!(ws.next_of("snapshot")["data"], json!([7]));
        assert_eq!((two.get(&path, &headers).status, two.get(&path, &headers).json()), (200, json!([7])));
        let mut sse = two.sse(&path, &[headers, vec![("Accept", "text/event-stream".into())]].concat());
        assert_eq!(sse.next_of("snapshot").data["stream"], session["stream"]);
        ws.send(json!({"type": "auth_update", "token": token, "id": 4}));
        assert_eq!(ws.next_of("auth_ok")["id"], 4);
    }
    let mut many = two.ws("/v1/ws", &[bearer(&token)]);
    many.send(json!({"type": "subscribe", "stream": session["stream"], "id": 1}));
    assert_eq!(many.next_of("snapshot")["data"], json!([7]));
    let mut by_protocol = two.ws(&path, &[("Sec-WebSocket-Protocol", format!("restcast.v1, jwt, {token}"))]);
    by_protocol.next_of("snapshot");
    let asked = upstream.requests().last().cloned().expect("it was polled");
    assert_eq!((asked.header("x-key"), asked.method.as_str()), (Some(HEADER), "POST"));
    // Good for that stream alone, there too.
    for (path, code) in [("/v1/streams/other", "FORBIDDEN"), ("/v1/direct?url=http://a.test", "FORBIDDEN")] {
        assert_eq!(two.get(path, &[bearer(&token)]).code(), code, "{path}");
    }
    // Named, told of and counted at either.
    let mut same = session.clone();
    same["created"] = json!(false);
    let at = |server: &Server, session: &Value| {
        let mut session = session.clone();
        for (url, scheme) in [("ws_url", "ws"), ("sse_url", "http")] {
            session[url] = format!("{scheme}://{}{path}", server.listen).into();
        }
        session
    };
    for server in [&two, &one] {
        let again = post(server, "u1", &said);
        assert_eq!((again.status, again.json()), (200, at(server, &same)));
        let shown = told(server, "GET", &session);
        assert_eq!((shown.status, &shown.json()["expires_at"]), (200, &session["expires_at"]));
        assert!(!shown.text().contains(&token));
    }
    let more = [&two, &one, &two, &one].map(|server| post(server, "u1", &json!({"url": upstream.url("/a")})).status);
    assert_eq!(more, [201, 201, 429, 429]);
    assert_eq!(post(&two, "u2", &said).status, 201, "another's name is another session");
    // The live ones are counted where somebody watches.
    assert_eq!(two.metric(&["restcast_ephemeral_sessions "]) as u64, 1);
    let everything = [
        everything_in(&redis),
        redis.log_text(),
        one.log_text(),
        two.log_text(),
        one.metrics(),
        two.metrics(),
        two.admin("GET", "/admin/v1/connections?sub=u1", Some(ADMIN_KEY)).text(),
    ];
    assert!(everything[0].contains("restcast:ephemeral:"), "what is looked through is what there is");
    for secret in [HEADER, QUERY, BODY, &token, &token[4..], SECRET] {
        assert!(everything.iter().all(|text| !text.contains(secret)), "{secret}");
    }
    // Nor is the target, nor who may be told of it.
    for hidden in [&text(&session["id"])[2..], &upstream.address().to_string(), "X-Key", "x-key"] {
        assert!(!everything[0].contains(hidden), "{hidden}");
    }
}

#[test]
fn a_session_that_is_deleted_at_one_process_closes_its_watchers_at_every_other() {
    let (redis, upstream) = (Redis::start(), upstream());
    let setup = setup(&redis, &upstream, "");
    let (one, two, three) = (setup.start(), setup.start(), setup.start());
    let session = make(&one, &json!({"url": upstream.url("/a"), "interval_ms": 20}));
    let mut watchers = [&one, &two].map(|server| watch(server, &session));
    let mut sse = two.sse(&path_of(&session), &[own(&session), ("Accept", "text/event-stream".into())]);
    sse.next_of("snapshot");
    let stranger =
        three.request("DELETE", &format!("/v1/sessions/{}", text(&session["id"])), &[bearer(&token_of("u2"))], "");
    assert_eq!(stranger.status, 404);
    let begun = Instant::now();
    assert_eq!(told(&three, "DELETE", &session).status, 204);
    for ws in &mut watchers {
        let (frames, end) = ws.until_close();
        assert_eq!(end, ended());
        assert_eq!(frames.last().map(|frame| frame["state"].clone()), Some(json!("ended")));
    }
    assert_eq!(sse.next_of("close").data["code"], 4004);
    // What waits for no pass over all sessions.
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    for server in [&one, &two, &three] {
        assert_eq!(get(server, &session).code(), "INVALID_TOKEN");
        assert_eq!(told(server, "GET", &session).status, 404);
        assert_eq!(told(server, "DELETE", &session).status, 404);
    }
    assert_eq!(records(&redis).len(), 0);
    // Who was not told finds it out.
    let session = make(&two, &json!({"url": upstream.url("/a"), "interval_ms": 20}));
    let mut ws = watch(&one, &session);
    one.signal(Signal::STOP);
    redis.command(&["CLIENT", "KILL", "TYPE", "normal"]);
    redis.command(&["CLIENT", "KILL", "TYPE", "pubsub"]);
    eventually("it is deleted", || (told(&two, "DELETE", &session).status == 204).then_some(()));
    redis.command(&["DEL", "restcast:control"]);
    one.signal(Signal::CONT);
    assert_eq!(ws.until_close().1, ended());
    assert_eq!(records(&redis).len(), 0, "nor does it give it back");
}

#[test]
fn all_sessions_of_all_processes_are_bounded() {
    let (redis, upstream) = (Redis::start(), upstream());
    let setup = setup(&redis, &upstream, "").limits("streams = 2");
    let (one, two) = (setup.start(), setup.start());
    let said = json!({"url": upstream.url("/a"), "ttl_s": 600});
    let short = json!({"url": upstream.url("/a"), "ttl_s": 1});
    assert_eq!((post(&one, "u1", &said).status, post(&two, "u2", &short).status), (201, 201));
    let full = post(&one, "u3", &said);
    assert_eq!((full.status, full.code().as_str()), (503, "TOO_MANY_STREAMS"));
    assert!(full.header("retry-after").is_some());
    eventually("one of them has ended", || (post(&one, "u3", &said).status == 201).then_some(()));
    assert_eq!(post(&two, "u3", &said).status, 503);
}

#[test]
fn a_record_that_somebody_made_up_shows_no_others_poll_and_no_target_that_is_not_allowed() {
    let (redis, upstream) = (Redis::start(), upstream());
    upstream.judge("/a", |asked| {
        Reply::json(if asked.header("x-key") == Some(HEADER) { "\"hidden\"" } else { "\"open\"" })
    });
    let server = setup(&redis, &upstream, "").start();
    let said = json!({"url": upstream.url("/a"), "headers": {"X-Key": HEADER}, "interval_ms": 20});
    let session = make(&server, &said);
    let mut ws = server.ws(&path_of(&session), &[own(&session)]);
    assert_eq!(ws.next_of("snapshot")["data"], "hidden");
    // It has the other's name and target, and not its secret.
    let forged = |n: u8, url: &str| {
        let token = token_of_random([n; 32]);
        let id = id_of(token.expose_secret()).expect("a token");
        let maker = GrantRecord {
            sub: Some("u9".into()),
            expires: None,
            issued_at: None,
            key: None,
            token: None,
            rights: Rights::default(),
            session: None,
            api_key: None,
        };
        let ends = WallTime::from_secs(now_s() + 600);
        let face = SessionFace {
            sub: Some("u9".into()),
            issuer: None,
            api_key: None,
            token: None,
            stream: text(&session["stream"]),
            counted: "x".into(),
            made: ends,
            ends,
        };
        let request = SessionRequest {
            url: url.to_owned(),
            post: false,
            interval_ms: 1_000,
            select: None,
            headers: Vec::new(),
            body: None,
            maker,
        };
        let record = SharedSession { face, request }.seal(&token, id, [[1; 16], [2; 16]]).expect("it is small");
        redis.set_bytes(&format!("restcast:ephemeral:{}", Place::of(id)), record.expose_secret());
        json!({"stream": session["stream"], "token": String::from_utf8_lossy(token.expose_secret())})
    };
    assert_eq!(get(&server, &forged(1, &upstream.url("/a"))).json(), json!("open"));
    let blocked = get(&server, &forged(2, "http://169.254.169.254/a"));
    assert_eq!((blocked.status, blocked.code().as_str()), (403, "TARGET_BLOCKED"));
    assert!(ws.is_quiet_for(Duration::from_millis(100)));
}

#[test]
fn a_session_ends_a_while_after_its_last_watcher_anywhere_and_at_its_time() {
    let (redis, upstream) = (Redis::start(), upstream());
    let setup = setup(&redis, &upstream, "linger = \"700ms\"");
    let (one, two) = (setup.start(), setup.start());
    let session = make(&one, &json!({"url": upstream.url("/a"), "interval_ms": 20}));
    let (mut here, there) = (watch(&one, &session), watch(&two, &session));
    drop(there);
    // Longer than the linger: who watches here keeps it.
    assert!(here.is_quiet_for(Duration::from_millis(1_500)));
    drop(watch(&two, &session));
    drop(here);
    let gone = Instant::now();
    eventually("it has ended", || records(&redis).is_empty().then_some(()));
    assert!(gone.elapsed() >= Duration::from_millis(600), "{:?}", gone.elapsed());
    for server in [&one, &two] {
        assert_eq!(get(server, &session).code(), "INVALID_TOKEN");
    }
    // Its time ends it at each process, watched or not.
    let short = make(&one, &json!({"url": upstream.url("/a"), "interval_ms": 20, "ttl_s": 2}));
    let mut watchers = [&one, &two].map(|server| watch(server, &short));
    for ws in &mut watchers {
        assert_eq!(ws.until_close().1, ended());
    }
    assert_eq!(get(&two, &short).status, 401);
    eventually("nothing is left of it", || {
        let left = keys(&redis, "restcast:ephemeral:");
        left.iter().all(|key| key.contains(":of:") || key.ends_with(":all")).then_some(())
    });
}

#[test]
fn one_name_at_two_processes_at_once_is_one_session() {
    let (redis, upstream) = (Redis::start(), upstream());
    let setup = setup(&redis, &upstream, "");
    let servers = [setup.start(), setup.start()];
    let said = json!({"url": upstream.url("/a"), "dedupe_key": "k"});
    let made: Vec<Value> = thread::scope(|scope| {
        let asked: Vec<_> = (0..16)
            .map(|n| {
                let (server, said) = (&servers[n % 2], &said);
                scope.spawn(move || make(server, said))
            })
            .collect();
        asked.into_iter().map(|asked| asked.join().expect("it is answered")).collect()
    });
    assert_eq!(made.iter().filter(|session| session["created"] == true).count(), 1);
    assert!(made.iter().all(|session| session["token"] == made[0]["token"] && session["id"] == made[0]["id"]));
    assert_eq!(records(&redis).len(), 1);
}

#[test]
fn names_are_shared_by_those_who_share_a_secret_and_tokens_by_all() {
    let (redis, upstream) = (Redis::start(), upstream());
    let other = "another key of the tests, which is as long as it must be";
    let with = |secret: &str, lines: &str| {
        setup(&redis, &upstream, lines).no_keys().key("k0", "HS256", secret).key("k1", "HS256", SECRET)
    };
    let said = json!({"url": upstream.url("/a"), "interval_ms": 20, "dedupe_key": "k"});
    let (one, two) = (with(SECRET, "").start(), with(other, "").start());
    let (first, second) = (make(&one, &said), make(&two, &said));
    assert!(first["id"] != second["id"] && first["stream"] != second["stream"]);
    let shared = "direct.secret is one that the tests have, of 32 bytes or more";
    let lines = format!("secret = {shared:?}");
    let (three, four) = (with(SECRET, &lines).start(), with(other, &lines).start());
    let (third, fourth) = (make(&three, &said), make(&four, &said));
    assert_eq!((&third["id"], &third["token"], &third["stream"]), (&fourth["id"], &fourth["token"], &fourth["stream"]));
    assert!(third["id"] != first["id"] && third["id"] != second["id"]);
    assert!(!everything_in(&redis).contains(shared));
    // Each goes by its own name, wherever.
    for server in [&one, &two] {
        for session in [&first, &second] {
            watch(server, session);
        }
    }
}

#[test]
fn a_session_outlives_the_process_that_made_it() {
    let (redis, upstream) = (Redis::start(), upstream());
    let setup = setup(&redis, &upstream, "");
    let (mut one, mut two) = (setup.start(), setup.start());
    let killed = make(&one, &json!({"url": upstream.url("/a"), "interval_ms": 20}));
    let drained = make(&two, &json!({"url": upstream.url("/a"), "interval_ms": 20}));
    let (mut at_one, mut at_two) = (watch(&one, &killed), watch(&two, &drained));
    one.signal(Signal::KILL);
    one.wait();
    two.signal(Signal::TERM);
    assert_eq!(at_two.next_of("reconnect")["type"], "reconnect");
    at_one.heard_within(Duration::from_secs(10));
    two.wait();
    let three = setup.start();
    for session in [&killed, &drained] {
        watch(&three, session);
        assert_eq!(told(&three, "GET", session).status, 200);
    }
}

#[test]
fn while_redis_is_away_what_is_watched_goes_on_and_is_there_for_all_when_it_is_back() {
    let (mut redis, upstream) = (Redis::start(), upstream());
    let setup = setup(&redis, &upstream, "");
    let (one, two) = (setup.start(), setup.start());
    let said = json!({"url": upstream.url("/a"), "interval_ms": 20});
    let (session, unopened) = (make(&one, &said), make(&one, &said));
    let mut ws = watch(&one, &session);
    redis.kill();
    let refused = eventually("it is known to be away", || Some(post(&one, "u1", &said)).filter(|a| a.status == 503));
    assert_eq!(refused.code(), "SESSION_STORE_UNAVAILABLE");
    assert!(refused.header("retry-after").is_some());
    // Whoever is there goes on, and others join them; who would have to ask is told to come again.
    upstream.set_json("/a", "[7,8]");
    assert_eq!(ws.next()["data"], json!([7, 8]), "it goes on");
    assert_eq!(get(&one, &session).json(), json!([7, 8]));
    for (server, session) in [(&one, &unopened), (&two, &unopened), (&two, &session)] {
        let answer = get(server, session);
        assert_eq!((answer.status, answer.code().as_str()), (503, "SESSION_STORE_UNAVAILABLE"));
    }
    assert_eq!(told(&two, "GET", &session).status, 503);
    assert_eq!((told(&one, "GET", &session).status, told(&one, "DELETE", &session).status), (200, 503));
    upstream.set_json("/a", "[7]");
    ws.next();
    redis.restart();
    for session in [&session, &unopened] {
        eventually("it is there again", || (get(&two, session).status == 200).then_some(()));
    }
    // Emptied: who watches gives back what is watched, and it is opened and ended as before.
    redis.command(&["FLUSHALL"]);
    assert_eq!(get(&two, &unopened).status, 401);
    eventually("it is given back", || (get(&two, &session).status == 200).then_some(()));
    let mut other = watch(&two, &session);
    assert_eq!(told(&two, "DELETE", &session).status, 204);
    assert_eq!([ws.until_close().1, other.until_close().1], [ended(), ended()]);
    eventually("nothing gives it back", || (get(&one, &session).status == 401).then_some(()));
    assert_eq!(records(&redis).len(), 0);
    // A server that took over and knew nothing.
    let session = make(&one, &said);
    let mut ws = watch(&one, &session);
    redis.restart_empty();
    eventually("it is given back to the new one", || (get(&two, &session).status == 200).then_some(()));
    assert!(ws.is_quiet_for(Duration::from_millis(100)));
}

#[test]
fn what_others_write_in_redis_opens_nothing_and_harms_nothing() {
    let (redis, upstream) = (Redis::start(), upstream());
    let setup = setup(&redis, &upstream, "");
    let (one, two) = (setup.start(), setup.start());
    let said = json!({"url": upstream.url("/a"), "interval_ms": 20, "dedupe_key": "k"});
    let session = make(&one, &said);
    let record = records(&redis).remove(0);
    let named = keys(&redis, "restcast:ephemeral:named:").remove(0);
    let place = record.rsplit(':').next().expect("a place").to_owned();
    let sealed_for_others = make(&one, &json!({"url": upstream.url("/a")}));
    let foreign = records(&redis).into_iter().find(|key| *key != record).expect("the other");
    redis.command(&["COPY", &foreign, &record, "REPLACE"]);
    assert_eq!(get(&two, &session).code(), "INVALID_TOKEN", "a record of another session");
    assert_eq!(told(&two, "GET", &session).status, 404);
    redis.command(&["SET", &record, "garbage"]);
    assert_eq!(get(&two, &session).code(), "INVALID_TOKEN");
    // Its name leads to nothing good any more: it is a new session's.
    let anew = make(&two, &said);
    assert!(anew["created"] == true && anew["id"] != session["id"]);
    watch(&one, &anew);
    redis.command(&["SET", &named, &format!("{place}garbage")]);
    assert_eq!(make(&one, &said)["created"], true);
    // What is said of sessions and is nothing ends nothing.
    let mut ws = watch(&two, &sealed_for_others);
    for data in ["", "{}", "[]", "{\"place\":7}", "{\"place\":\"nowhere\"}", &format!("{{\"place\":\"{place}\"}}")] {
        redis.command(&["XADD", "restcast:control", "*", "event", "ephemeral-ended", "data", data]);
    }
    // One of another type, where a script looks.
    redis.command(&["DEL", "restcast:ephemeral:all"]);
    redis.command(&["SET", "restcast:ephemeral:all", "x"]);
    let refused = post(&one, "u2", &said);
    assert_eq!((refused.status, refused.code().as_str()), (503, "SESSION_STORE_UNAVAILABLE"));
    redis.command(&["DEL", "restcast:ephemeral:all"]);
    assert_eq!(post(&one, "u2", &said).status, 201);
    assert!(ws.is_quiet_for(Duration::from_millis(200)));
    for server in [&one, &two] {
        assert_eq!(server.metric(&["restcast_panics_total"]) as u64, 0);
        assert!(!server.log_text().contains("garbage"));
    }
}

#[test]
fn a_user_of_redis_without_the_right_makes_no_sessions_and_keeps_everything_else() {
    let rules = "~restcast:control ~restcast:api_keys ~restcast:streams* ~sess:* &* +@all";
    let redis = RedisSetup::new().user("few", "a-password-of-few", rules).start();
    let upstream = upstream();
    let url = redis.url().replace("redis://", "redis://few:a-password-of-few@");
    let server = Setup::new()
        .redis(&url, "timeout = \"500ms\"")
        .stream("leads", &upstream.url("/a"), "")
        .direct(upstream.address(), "")
        .start();
    let refused = post(&server, "u1", &json!({"url": upstream.url("/a")}));
    assert_eq!((refused.status, refused.code().as_str()), (503, "SESSION_STORE_UNAVAILABLE"));
    assert_eq!(server.get("/v1/streams/leads", &[bearer(&token_of("u1"))]).status, 200);
    let direct = server.get(&format!("/v1/direct?url={}", upstream.url("/a")), &[bearer(&token_of("u1"))]);
    assert_eq!(direct.status, 200);
    server.wait_for_log("NOPERM", 1);
}
