//! Sessions and tickets, through shards with a time of their own and a store that the tests play.

mod hall;

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hall::{COOKIE_SECRET, Conn, Hall, MS, SECOND, Setup, WALL_S, api_keys, cookie, cookie_by, session_options};
use restcast::auth::api_key::{ApiKeyId, KeyHash, key_text};
use restcast::auth::session::CookieSecrets;
use restcast::codec::ws::{Opcode, write_masked};
use restcast::limits::{KEY_LOOKUPS_MAX, KEY_WAITERS_PER_TURN};
use restcast::secret::Secret;
use restcast::shard::{Input, Lookup, Order};
use serde_json::{Value, json};

/// What sweeps are apart, and more.
const TICK: Duration = Duration::from_millis(5);

fn record(user: &str) -> Value {
    json!({
        "cookie": { "originalMaxAge": 3_600_000, "expires": null, "httpOnly": true, "path": "/" },
        "userId": user, "userRole": "agent", "companyId": "c1", "permissions": ["leads.read"],
    })
}

/// A hall whose store holds the session `s1` of `u1`.
fn hall_with(setup: &Setup, ttl: Duration) -> Hall {
    let mut hall = Hall::new(setup);
    hall.put_session("s1", record("u1"), Some(ttl));
    hall
}

fn watch(hall: &mut Hall, sid: &str) -> Conn {
    let cookie = cookie(sid);
    hall.upgrade(0, "/v1/streams/leads", &[("Cookie", &cookie)])
}

fn code(status: u16, code: &str) -> (u16, String) {
    (status, code.to_owned())
}

// The handshake.

#[test]
fn a_cookie_opens_each_representation() {
    let mut hall = hall_with(&Setup::new().stream("own", "url = \"http://up/{claims.companyId}\""), 600 * SECOND);
    let cookie = cookie("s1");
    for path in ["/v1/streams/leads", "/v1/streams/own"] {
        let ws = hall.upgrade(0, path, &[("Cookie", &cookie)]);
        hall.pass(TICK);
        let frames = hall.frames(ws);
        assert_eq!(
            frames[0]["auth"],
            json!({ "type": "session", "sub": "u1", "expires_at": (WALL_S + 600) * 1_000_000 })
        );
        assert_eq!(frames.get(1).map(|frame| &frame["data"]), Some(&json!([{ "id": 1 }])), "{path} {frames:?}");
        let sse = hall.request(0, "GET", path, &[("Cookie", &cookie), ("Accept", "text/event-stream")]);
        let text = String::from_utf8(hall.bytes(sse)).expect("text");
        assert!(text.contains("event: welcome") && text.contains("\"type\":\"session\""), "{text}");
        assert!(text.contains("event: snapshot"), "{text}");
        let get = hall.request(0, "GET", path, &[("Cookie", &cookie)]);
        assert_eq!(hall.answered(get), (200, json!([{ "id": 1 }])));
    }
    let ws = hall.upgrade(0, "/v1/ws", &[("Cookie", &cookie)]);
    assert_eq!(hall.kinds(ws), ["welcome"]);
    hall.message(ws, json!({ "type": "subscribe", "stream": "own" }));
    assert_eq!(hall.kinds(ws), ["subscribed", "snapshot"]);
}

#[test]
fn a_bad_cookie_is_401_and_never_anonymous() {
    let mut hall = hall_with(&Setup::new().stream("open", "allow_anonymous = true"), 600 * SECOND);
    hall.put_session("empty", json!({ "cookie": {} }), Some(600 * SECOND));
    hall.put_session("odd", json!({ "userId": "u1", "permissions": "all" }), Some(600 * SECOND));
    hall.put_session("past", json!({ "userId": "u1", "cookie": { "expires": "2027-01-15T07:59:59.000Z" } }), None);
    assert_eq!(hall.wall().as_secs(), 1_800_000_000, "2027-01-15T08:00:00Z");
    for (cookie, expected) in [
        (cookie_by("another secret", "s1"), "INVALID_TOKEN"),
        ("connect.sid=s1".to_owned(), "INVALID_TOKEN"),
        ("connect.sid=".to_owned(), "INVALID_TOKEN"),
        ("connect.sid=s%3As1.%zz".to_owned(), "INVALID_TOKEN"),
        (cookie("s2"), "SESSION_EXPIRED"),
        (cookie("empty"), "SESSION_EXPIRED"),
        (cookie("odd"), "SESSION_EXPIRED"),
        (cookie("past"), "SESSION_EXPIRED"),
    ] {
        for path in ["/v1/streams/open", "/v1/streams/leads", "/v1/streams/none", "/v1/ws"] {
            let conn = hall.upgrade(0, path, &[("Cookie", &cookie)]);
            assert_eq!(hall.refused(conn), code(401, expected), "{path} {cookie}");
        }
        let conn = hall.request(0, "GET", "/v1/streams/open", &[("Cookie", &cookie)]);
        assert_eq!(hall.refused(conn), code(401, expected), "{cookie}");
    }
    let twice = format!("{}; {}", cookie("s1"), cookie("s1"));
    let conn = hall.request(0, "GET", "/v1/streams/leads", &[("Cookie", &twice)]);
    assert_eq!(hall.refused(conn), code(400, "BAD_REQUEST"));
    let without = hall.upgrade(0, "/v1/streams/open", &[]);
    assert_eq!(hall.frames(without)[0]["auth"]["type"], "anonymous");
}

#[test]
fn a_token_goes_first_and_a_session_stands_in_for_one_that_does_not_verify() {
    let mut hall = hall_with(&Setup::new(), 600 * SECOND);
    let cookie = cookie("s1");
    let token = format!("Bearer {}", hall.token(json!({ "sub": "u2" })));
    let expired = format!("Bearer {}", hall.token(json!({ "exp": WALL_S - 60 })));
    let kind_and_sub = |hall: &mut Hall, headers: &[(&str, &str)]| {
        let ws = hall.upgrade(0, "/v1/streams/leads", headers);
        let welcome = hall.frames(ws).swap_remove(0);
        format!(
            "{} {}",
            welcome["auth"]["type"].as_str().expect("text"),
            welcome["auth"]["sub"].as_str().expect("text")
        )
    };
    assert_eq!(kind_and_sub(&mut hall, &[("Authorization", &token), ("Cookie", &cookie)]), "jwt u2");
    assert_eq!(kind_and_sub(&mut hall, &[("Authorization", &expired), ("Cookie", &cookie)]), "session u1");
    assert_eq!(kind_and_sub(&mut hall, &[("Authorization", "Bearer x"), ("Cookie", &cookie)]), "session u1");
    let both_bad =
        hall.upgrade(0, "/v1/streams/leads", &[("Authorization", &expired), ("Cookie", &cookie_by("x", "s1"))]);
    assert_eq!(hall.refused(both_bad), code(401, "INVALID_TOKEN"));
    let alone = hall.upgrade(0, "/v1/streams/leads", &[("Authorization", &expired)]);
    assert_eq!(hall.refused(alone), code(401, "TOKEN_EXPIRED"));
    // Another kind of credential stands for itself.
    for (path, headers) in [
        ("/v1/streams/leads?ticket=rct_x", vec![("Cookie", cookie.as_str())]),
        ("/v1/streams/leads", vec![("X-Api-Key", "rck_x_y"), ("Cookie", cookie.as_str())]),
    ] {
        let conn = hall.upgrade(0, path, &headers);
        assert_eq!(hall.refused(conn), code(401, "INVALID_TOKEN"), "{path}");
    }
}

#[test]
fn a_page_of_another_origin_cannot_use_the_cookie() {
    let mut hall = hall_with(&Setup::new(), 600 * SECOND);
    let cookie = cookie("s1");
    for headers in [vec![("Origin", "https://evil.example")], vec![("Sec-Fetch-Site", "cross-site")]] {
        let mut headers = headers;
        headers.push(("Cookie", &cookie));
        let conn = hall.upgrade(0, "/v1/streams/leads", &headers);
        assert_eq!(hall.refused(conn), code(403, "ORIGIN_NOT_ALLOWED"));
        let conn = hall.request(0, "POST", "/v1/tickets", &headers);
        assert_eq!(hall.refused(conn), code(403, "ORIGIN_NOT_ALLOWED"));
        // The token counts, and where it does not verify there is nothing else.
        let token = format!("Bearer {}", hall.token(json!({})));
        headers.push(("Authorization", &token));
        let conn = hall.upgrade(0, "/v1/streams/leads", &headers);
        assert_eq!(hall.kinds(conn), ["welcome", "snapshot"]);
        headers.last_mut().expect("some").1 = "Bearer x";
        let conn = hall.upgrade(0, "/v1/streams/leads", &headers);
        assert_eq!(hall.refused(conn), code(401, "INVALID_TOKEN"));
    }
    assert!(hall.asked.is_empty(), "no record was asked for");
}

#[test]
fn a_store_that_is_away_is_503_for_sessions_and_nothing_to_tokens() {
    let mut hall = hall_with(&Setup::new(), 600 * SECOND);
    hall.away = true;
    let cookie = cookie("s1");
    for path in ["/v1/streams/leads", "/v1/ws"] {
        let conn = hall.upgrade(0, path, &[("Cookie", &cookie)]);
        let text = String::from_utf8(hall.bytes(conn)).expect("text");
        assert!(text.starts_with("HTTP/1.1 503") && text.contains("\r\nRetry-After: 2\r\n"), "{text}");
        assert!(text.contains("SESSION_STORE_UNAVAILABLE"), "{text}");
    }
    let token = format!("Bearer {}", hall.token(json!({})));
    let conn = hall.upgrade(0, "/v1/streams/leads", &[("Authorization", &token)]);
    assert_eq!(hall.kinds(conn), ["welcome", "snapshot"]);
}

#[test]
fn who_comes_while_a_record_is_asked_for_shares_the_answer() {
    let mut hall = hall_with(&Setup::new(), 600 * SECOND);
    hall.answers = false;
    let tabs: Vec<Conn> = (0..5).map(|_| watch(&mut hall, "s1")).collect();
    let gone = tabs[2];
    hall.lose(gone);
    assert_eq!(hall.asked, [1], "one question for all");
    hall.answer_all();
    for tab in tabs.iter().filter(|tab| **tab != gone) {
        assert_eq!(hall.kinds(*tab), ["welcome", "snapshot"]);
    }
    assert_eq!(hall.kinds(gone), Vec::<String>::new());
}

#[test]
fn who_signs_in_while_the_record_is_asked_for_is_asked_about_once_more() {
    let mut hall = Hall::new(&Setup::new());
    hall.answers = false;
    let before = watch(&mut hall, "s1");
    let question = hall.questions.pop_front().expect("a question");
    let after = watch(&mut hall, "s1");
    // The store had answered before the second came, and before the session was there.
    hall.answer(question);
    hall.put_session("s1", record("u1"), Some(600 * SECOND));
    hall.settle();
    assert_eq!(hall.refused(before), code(401, "SESSION_EXPIRED"));
    hall.answer_all();
    assert_eq!(hall.kinds(after), ["welcome", "snapshot"]);
}

#[test]
fn a_question_without_an_answer_ends_in_503_and_a_late_answer_changes_nothing() {
    let mut hall = hall_with(&Setup::new(), 600 * SECOND);
    hall.answers = false;
    let conn = hall.request(0, "GET", "/v1/streams/leads", &[("Cookie", &cookie("s1"))]);
    hall.pass(30 * SECOND - MS);
    assert_eq!(hall.bytes(conn), b"");
    hall.pass(MS);
    assert_eq!(hall.refused(conn), code(503, "OVERLOADED"));
    hall.answer_all();
    assert_eq!(hall.bytes(conn), b"");
}

// Keys that are asked for.

/// A setup with an issuer whose keys are fetched, and none is there yet.
fn with_issuer() -> Setup {
    let text = "[limits]\nauth_failures_per_minute = 0\n[[auth.jwt.jwks]]\nissuer = \"https://idp\"\nurl = \"https://idp/keys\"\nalgs = [\"ES256\"]\n";
    Setup { text: text.into(), ..Setup::new() }
}

fn signed_by(kid: &str) -> String {
    let part = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let claims = json!({ "iss": "https://idp", "sub": "u1", "exp": WALL_S + 600 });
    let token = format!("{}.{}", part(json!({ "alg": "ES256", "kid": kid })), part(claims));
    format!("Bearer {token}.{}", URL_SAFE_NO_PAD.encode([7; 64]))
}

#[test]
fn names_of_keys_that_are_made_up_take_no_room_from_sessions() {
    let mut hall = hall_with(&with_issuer(), 600 * SECOND);
    hall.answers = false;
    let strangers: Vec<Conn> = (0..KEY_LOOKUPS_MAX)
        .map(|no| hall.upgrade(0, "/v1/streams/leads", &[("Authorization", &signed_by(&format!("k{no}")))]))
        .collect();
    assert_eq!(hall.questions.len(), KEY_LOOKUPS_MAX);
    let one_more = signed_by("one more");
    let conn = hall.upgrade(0, "/v1/streams/leads", &[("Authorization", &one_more)]);
    assert_eq!(hall.refused(conn), code(503, "OVERLOADED"));
    let known_to_be_asked_for = hall.upgrade(0, "/v1/streams/leads", &[("Authorization", &signed_by("k7"))]);
    assert_eq!((hall.bytes(known_to_be_asked_for), hall.questions.len()), (vec![], KEY_LOOKUPS_MAX));
    let by_session = watch(&mut hall, "s1");
    assert_eq!(hall.questions.len(), KEY_LOOKUPS_MAX + 1, "a session is asked about");
    let mine = cookie("s1");
    let hybrid = hall.upgrade(0, "/v1/streams/leads", &[("Authorization", &one_more), ("Cookie", &mine)]);
    assert_eq!(hall.bytes(hybrid), b"", "and tried where there is no room for the token's key");
    hall.answer_all();
    for conn in [by_session, hybrid] {
        assert_eq!(hall.kinds(conn), ["welcome", "snapshot"]);
    }
    for conn in strangers.into_iter().chain([known_to_be_asked_for]) {
        assert_eq!(hall.refused(conn), code(401, "INVALID_TOKEN"));
    }
    let conn = hall.upgrade(0, "/v1/streams/leads", &[("Authorization", &one_more)]);
    hall.answer_all();
    assert_eq!(hall.refused(conn), code(401, "INVALID_TOKEN"), "there is room again");
}

#[test]
fn a_key_that_many_bring_is_asked_for_once_and_they_are_looked_at_in_turns() {
    let mut hall = hall_with(&with_issuer(), 600 * SECOND);
    hall.answers = false;
    let (token, mine) = (signed_by("new"), cookie("s1"));
    let many = KEY_WAITERS_PER_TURN + 1;
    let mut conns: Vec<Conn> =
        (0..many).map(|_| hall.upgrade(0, "/v1/streams/leads", &[("Authorization", &token)])).collect();
    let hybrid = hall.upgrade(0, "/v1/streams/leads", &[("Authorization", &token), ("Cookie", &mine)]);
    let gone = conns.swap_remove(0);
    hall.lose(gone);
    assert_eq!(hall.questions.len(), 1);
    let question = hall.questions.pop_front().expect("a question");
    hall.answer(question);
    hall.settle();
    let answered = conns.iter().filter(|conn| !hall.bytes(**conn).is_empty()).count();
    assert_eq!((answered, hall.questions.len()), (KEY_WAITERS_PER_TURN - 1, 1), "the others in the next turn");
    hall.answer_all();
    assert_eq!(hall.questions.len(), 1, "the session's");
    hall.answer_all();
    assert_eq!(hall.kinds(hybrid), ["welcome", "snapshot"], "the key is not there, so the session counts");
    assert_eq!((hall.bytes(gone), hall.questions.len()), (vec![], 0));
}

#[test]
fn while_other_keys_are_still_being_judged_nothing_is_sent_under_a_revoked_one() {
    let mut hall = Hall::new(&Setup::new());
    let line = |id: &str, rate: u32| {
        let key = key_text(&ApiKeyId::new(id).expect("an id"), &[7; 32]);
        let hash = KeyHash::new(&key, [1; 16]).to_text();
        let line = format!("[[auth.api_key]]\nid = {id:?}\nhash = {hash:?}\nstreams = [\"leads\"]\nrate = {rate}\n");
        (String::from_utf8(key.expose_secret().to_vec()).expect("text"), line)
    };
    let ((many, before), (few, revoked)) = (line("many", 0), line("few", 0));
    let keys = api_keys(&format!("{before}{revoked}"));
    hall.tell_all(|| Input::ApiKeys(Arc::clone(&keys)));
    let warm = hall.request(0, "GET", "/v1/streams/leads", &[("X-Api-Key", &many)]);
    assert_eq!(hall.answered(warm).0, 200, "there is a value");
    // As many as are judged in one turn, and have nothing to be sent for it.
    for _ in 0..256 {
        let conn = hall.upgrade(0, "/v1/ws", &[("X-Api-Key", &many)]);
        assert_eq!(hall.kinds(conn), ["welcome"]);
    }
    let conns = [0; 3].map(|_| hall.upgrade(0, "/v1/ws", &[("X-Api-Key", &few)]));
    for conn in conns {
        assert_eq!(hall.kinds(conn), ["welcome"]);
        hall.message_at_once(conn, json!({ "type": "subscribe", "stream": "leads" }));
    }
    let keys = api_keys(&line("many", 1).1);
    hall.tell_all(|| Input::ApiKeys(Arc::clone(&keys)));
    for conn in conns {
        assert_eq!(hall.kinds(conn), ["subscribed", "4010 api_key_revoked"], "and no frame of the stream");
    }
}

// Live sessions.

#[test]
fn a_session_ends_with_its_key_or_its_cookie() {
    let mut hall = hall_with(&Setup::new(), 10 * SECOND);
    let mut of_cookie = record("u1");
    of_cookie["cookie"]["expires"] = json!("2027-01-15T08:00:07.500Z");
    hall.put_session("s2", of_cookie, Some(600 * SECOND));
    let (by_key, by_cookie) = (watch(&mut hall, "s1"), watch(&mut hall, "s2"));
    let sse =
        hall.request(0, "GET", "/v1/streams/leads", &[("Cookie", &cookie("s1")), ("Accept", "text/event-stream")]);
    hall.pass(Duration::from_millis(7_499));
    assert_eq!(hall.kinds(by_cookie), ["welcome", "snapshot", "reauthenticate"]);
    hall.pass(MS);
    assert_eq!(hall.kinds(by_cookie), ["4001 session_expired"]);
    hall.pass(Duration::from_millis(2_499));
    assert_eq!(hall.kinds(by_key), ["welcome", "snapshot", "reauthenticate"]);
    hall.pass(MS);
    assert_eq!(hall.kinds(by_key), ["4001 session_expired"], "no leeway: the store has told how long it lives");
    let text = String::from_utf8(hall.bytes(sse)).expect("text");
    assert!(text.ends_with("data: {\"type\":\"close\",\"code\":4001,\"reason\":\"session_expired\"}\n\n"), "{text}");
}

#[test]
fn records_are_read_again_every_30_seconds_together() {
    let mut hall = Hall::new(&Setup::new());
    let mut conns = Vec::new();
    for no in 0..600 {
        let sid = format!("s{no}");
        hall.put_session(&sid, record("u1"), Some(86_400 * SECOND));
        conns.push(watch(&mut hall, &sid));
        conns.push(watch(&mut hall, &sid));
    }
    assert_eq!(hall.asked.iter().sum::<usize>(), 1_200, "each handshake by the record as it is then");
    hall.asked.clear();
    hall.pass(27 * SECOND - MS);
    assert_eq!(hall.asked, [0; 0], "not before nine tenths");
    hall.pass(3 * SECOND + MS);
    assert_eq!(hall.asked.iter().sum::<usize>(), 600, "a session once, however many tabs share it");
    assert!(hall.asked.len() <= 16 && hall.asked.iter().all(|&count| count <= 256), "in batches: {:?}", hall.asked);
    hall.pass(30 * SECOND);
    assert_eq!(hall.asked.iter().sum::<usize>(), 1_200);
    for conn in conns {
        assert_eq!(hall.kinds(conn), ["welcome", "snapshot"]);
    }
}

#[test]
fn a_session_that_is_deleted_or_loses_its_user_is_closed_at_its_next_read() {
    let mut hall = hall_with(&Setup::new(), 600 * SECOND);
    hall.put_session("s2", record("u1"), Some(600 * SECOND));
    hall.put_session("s3", record("u1"), Some(600 * SECOND));
    hall.put_session("s4", record("u1"), Some(600 * SECOND));
    let conns = ["s1", "s2", "s3", "s4"].map(|sid| watch(&mut hall, sid));
    hall.store.remove("s1");
    hall.put_session("s2", json!({ "cookie": {}, "flash": "signed out" }), Some(600 * SECOND));
    hall.put_session("s3", record("u2"), Some(600 * SECOND));
    hall.pass(30 * SECOND);
    for conn in &conns[..3] {
        assert_eq!(hall.kinds(*conn), ["welcome", "snapshot", "4001 session_expired"]);
    }
    assert_eq!(hall.kinds(conns[3]), ["welcome", "snapshot"]);
}

#[test]
fn another_user_in_the_record_takes_the_session_over() {
    let mut hall = hall_with(&Setup::new(), 600 * SECOND);
    let before = watch(&mut hall, "s1");
    hall.put_session("s1", record("u2"), Some(600 * SECOND));
    let after = watch(&mut hall, "s1");
    assert_eq!(hall.kinds(before), ["welcome", "snapshot", "4001 session_expired"]);
    assert_eq!(hall.frames(after)[0]["auth"]["sub"], "u2");
    hall.pass(60 * SECOND);
    assert_eq!(hall.kinds(after), Vec::<String>::new());
    hall.put_session("s1", record("u1"), Some(600 * SECOND));
    hall.pass(30 * SECOND);
    assert_eq!(hall.kinds(after), ["4001 session_expired"]);
}

#[test]
fn an_end_that_was_moved_is_seen_before_it_comes() {
    let mut hall = hall_with(&Setup::new(), 10 * SECOND);
    let conn = watch(&mut hall, "s1");
    hall.pass(8 * SECOND);
    hall.put_session("s1", record("u1"), Some(10 * SECOND));
    hall.pass(9 * SECOND);
    assert_eq!(hall.kinds(conn), ["welcome", "snapshot", "reauthenticate", "reauthenticate"]);
    hall.pass(SECOND);
    assert_eq!(hall.kinds(conn), ["4001 session_expired"]);
}

#[test]
fn touching_keeps_a_session_alive_while_it_is_connected_and_no_longer() {
    let mut setup = Setup::new();
    setup.session = Some(restcast::auth::session::Options { touch: true, ..session_options() });
    let mut hall = Hall::new(&setup);
    let mut touched = record("u1");
    touched["cookie"] = json!({ "originalMaxAge": 20_000, "expires": "2027-01-15T08:00:20.000Z" });
    hall.put_session("s1", touched, Some(20 * SECOND));
    let conn = watch(&mut hall, "s1");
    hall.pass(300 * SECOND);
    let kinds = hall.kinds(conn);
    assert!(kinds.iter().all(|kind| !kind.contains("session_expired")), "{kinds:?}");
    assert!(hall.orders.len() >= 14 && hall.orders.len() <= 60, "{}", hall.orders.len());
    assert!(hall.orders.iter().all(|order| matches!(order, Order::Touch { life, .. } if *life == 20 * SECOND)));
    hall.lose(conn);
    let so_far = hall.orders.len();
    hall.pass(60 * SECOND);
    assert_eq!(hall.orders.len(), so_far, "nobody is there to touch it");
    let late = watch(&mut hall, "s1");
    assert_eq!(hall.refused(late), code(401, "SESSION_EXPIRED"));
}

#[test]
fn a_session_that_is_touched_ends_by_its_cookie_where_its_key_has_no_end() {
    let mut setup = Setup::new();
    setup.session = Some(restcast::auth::session::Options { touch: true, ..session_options() });
    let mut hall = Hall::new(&setup);
    let mut kept = record("u1");
    kept["cookie"] = json!({ "originalMaxAge": 20_000, "expires": "2027-01-15T08:00:20.000Z" });
    hall.put_session("s1", kept.clone(), None);
    kept["cookie"]["expires"] = json!("2027-01-15T07:59:59.999Z");
    hall.put_session("s2", kept, None);
    let past = watch(&mut hall, "s2");
    assert_eq!(hall.refused(past), code(401, "SESSION_EXPIRED"));
    let conn = watch(&mut hall, "s1");
    assert_eq!(hall.frames(conn)[0]["auth"]["expires_at"], (WALL_S + 20) * 1_000_000);
    hall.pass(20 * SECOND - MS);
    assert_eq!(hall.kinds(conn), ["reauthenticate"]);
    hall.pass(MS);
    assert_eq!(hall.kinds(conn), ["4001 session_expired"]);
    assert!(hall.orders.is_empty(), "what has no end is not given one");
}

#[test]
fn rights_that_change_are_told_first_and_then_hold() {
    let setup = Setup::new()
        .stream("staff", "permissions = [\"staff\"]")
        .stream("own", "url = \"http://up/{claims.companyId}\"");
    let mut hall = Hall::new(&setup);
    let with = |permissions: Value, company: &str| {
        let mut record = record("u1");
        record["permissions"] = permissions;
        record["companyId"] = json!(company);
        record
    };
    hall.put_session("s1", with(json!(["staff"]), "c1"), Some(600 * SECOND));
    let cookie = cookie("s1");
    let many = hall.upgrade(0, "/v1/ws", &[("Cookie", &cookie)]);
    for stream in ["leads", "staff", "own"] {
        hall.message(many, json!({ "type": "subscribe", "stream": stream }));
    }
    let single = hall.upgrade(0, "/v1/streams/staff", &[("Cookie", &cookie)]);
    hall.pass(TICK);
    hall.kinds(many);
    hall.kinds(single);
    hall.put_session("s1", with(json!(["other"]), "c1"), Some(600 * SECOND));
    hall.pass(30 * SECOND);
    let frames = hall.frames(many);
    assert_eq!(frames[0], json!({ "type": "permission_update", "permissions": ["other"], "roles": ["agent"] }));
    assert_eq!(frames[1], json!({ "type": "unsubscribed", "stream": "staff", "reason": "forbidden" }));
    assert_eq!(frames.len(), 2);
    assert_eq!(hall.kinds(single), ["permission_update", "4003 forbidden"]);
    hall.message(many, json!({ "type": "subscribe", "stream": "staff", "id": 1 }));
    assert_eq!(hall.frames(many)[0]["code"], "INSUFFICIENT_PERMISSIONS");
    // Another company is another stream, and no news of permissions.
    hall.put_session("s1", with(json!(["other"]), "c2"), Some(600 * SECOND));
    hall.pass(30 * SECOND + TICK);
    let frames = hall.frames(many);
    assert_eq!((frames.len(), &frames[0]["type"], &frames[0]["stream"]), (1, &json!("snapshot"), &json!("own")));
    hall.put_session("s1", with(json!(["staff"]), "c2"), Some(600 * SECOND));
    hall.pass(30 * SECOND);
    assert_eq!(hall.kinds(many), ["permission_update"]);
    hall.message(many, json!({ "type": "subscribe", "stream": "staff" }));
    assert_eq!(hall.kinds(many), ["subscribed", "snapshot"]);
}

#[test]
fn who_waits_for_a_change_is_told_when_its_session_ends_or_changes() {
    let mut hall = hall_with(&Setup::new().stream("staff", "permissions = [\"leads.read\"]"), 600 * SECOND);
    hall.put_session("s2", record("u2"), Some(20 * SECOND));
    hall.put_session("s3", record("u3"), Some(600 * SECOND));
    let wait = |hall: &mut Hall, sid: &str| {
        let cookie = cookie(sid);
        let conn = hall.request(0, "GET", "/v1/streams/staff", &[("Cookie", &cookie)]);
        let text = String::from_utf8(hall.bytes(conn)).expect("text");
        let etag = text.lines().find_map(|line| line.strip_prefix("ETag: ")).expect("an etag").to_owned();
        let headers = [("Cookie", cookie.as_str()), ("If-None-Match", &etag), ("Prefer", "wait=60")];
        hall.request_on(conn, "GET", "/v1/streams/staff", &headers);
        assert_eq!(hall.bytes(conn), b"", "it waits");
        conn
    };
    let [deleted, ends, changed] = ["s1", "s2", "s3"].map(|sid| wait(&mut hall, sid));
    hall.store.remove("s1");
    let mut other = record("u3");
    other["permissions"] = json!([]);
    hall.put_session("s3", other, Some(600 * SECOND));
    hall.pass(20 * SECOND);
    assert_eq!(hall.refused(ends), code(401, "SESSION_EXPIRED"));
    hall.pass(10 * SECOND);
    assert_eq!(hall.refused(deleted), code(401, "SESSION_EXPIRED"));
    assert_eq!(hall.refused(changed), code(403, "INSUFFICIENT_PERMISSIONS"));
}

// The store away.

#[test]
fn live_sessions_outlast_a_store_that_is_away_by_the_grace() {
    let mut hall = hall_with(&Setup::new(), 86_400 * SECOND);
    let conn = watch(&mut hall, "s1");
    let token = format!("Bearer {}", hall.token(json!({})));
    let by_token = hall.upgrade(0, "/v1/streams/leads", &[("Authorization", &token)]);
    hall.pass(5 * SECOND);
    hall.away = true;
    hall.tell_all(|| Input::StoreState { up: false });
    hall.pass(Duration::from_millis(299_999));
    assert_eq!(hall.kinds(conn), ["welcome", "snapshot"]);
    hall.pass(MS);
    assert_eq!(hall.kinds(conn), ["4001 session_expired"]);
    assert_eq!(hall.kinds(by_token), ["welcome", "snapshot"]);
}

#[test]
fn a_store_that_only_fails_to_answer_is_as_good_as_away() {
    let mut setup = Setup::new();
    setup.session = Some(restcast::auth::session::Options { grace: 60 * SECOND, ..session_options() });
    let mut hall = hall_with(&setup, 86_400 * SECOND);
    let conn = watch(&mut hall, "s1");
    hall.away = true;
    // The first read that fails comes within 30 s; the grace runs from there.
    hall.pass(86 * SECOND);
    assert_eq!(hall.kinds(conn), ["welcome", "snapshot"]);
    assert!(hall.asked.len() >= 11 && hall.asked.len() <= 16, "it is tried again: {}", hall.asked.len());
    hall.pass(4 * SECOND);
    assert_eq!(hall.kinds(conn), ["4001 session_expired"]);
}

#[test]
fn the_grace_ends_a_session_while_a_question_about_it_waits_for_its_answer() {
    let mut setup = Setup::new();
    setup.session = Some(restcast::auth::session::Options { grace: 60 * SECOND, ..session_options() });
    let mut hall = hall_with(&setup, 86_400 * SECOND);
    let conn = watch(&mut hall, "s1");
    hall.kinds(conn);
    hall.asked.clear();
    hall.answers = false;
    while hall.asked.is_empty() {
        hall.pass(MS);
    }
    // From here on the store is stalled: each question is answered after two seconds, that there is no answer.
    let stalled = hall.wall();
    hall.away = true;
    while hall.wall().since(stalled) < 60 * SECOND - MS {
        if hall.questions.is_empty() {
            hall.pass(MS);
        } else {
            hall.pass((2 * SECOND).min(60 * SECOND - MS - hall.wall().since(stalled)));
            // The last is out when the grace ends.
            if hall.wall().since(stalled) < 55 * SECOND {
                hall.answer_all();
            }
        }
    }
    assert_eq!((hall.kinds(conn), hall.questions.len()), (vec![], 1));
    hall.pass(MS);
    assert_eq!(hall.kinds(conn), ["4001 session_expired"], "its end waits for no answer");
    let asked = hall.asked.len();
    assert!(asked <= 60 / 4 + 2, "nor is it asked for again and again: {asked}");
    hall.away = false;
    hall.answer_all();
    hall.pass(SECOND);
    assert_eq!((hall.kinds(conn), hall.asked.len()), (vec![], asked), "what is over stays so");
}

#[test]
fn a_store_that_is_there_again_is_asked_for_everything_at_once() {
    let mut hall = Hall::new(&Setup::new());
    let mut conns = Vec::new();
    for no in 0..300 {
        let sid = format!("s{no}");
        hall.put_session(&sid, record("u1"), Some(86_400 * SECOND));
        conns.push(watch(&mut hall, &sid));
    }
    hall.away = true;
    hall.tell_all(|| Input::StoreState { up: false });
    hall.pass(100 * SECOND);
    hall.store.remove("s7");
    hall.asked.clear();
    hall.away = false;
    hall.tell_all(|| Input::StoreState { up: true });
    assert_eq!(hall.asked, [256, 44]);
    for (no, conn) in conns.iter().enumerate() {
        let kinds = hall.kinds(*conn);
        let ended = kinds.last().is_some_and(|kind| kind == "4001 session_expired");
        assert_eq!(ended, no == 7, "{no}: {kinds:?}");
    }
    // The grace begins anew when it is away again.
    hall.pass(250 * SECOND);
    hall.away = true;
    hall.tell_all(|| Input::StoreState { up: false });
    hall.pass(299 * SECOND);
    assert_eq!(hall.kinds(conns[0]), Vec::<String>::new());
    hall.pass(SECOND);
    assert_eq!(hall.kinds(conns[0]), ["4001 session_expired"]);
}

// auth_update.

#[test]
fn auth_update_without_a_token_reads_the_session_again() {
    let mut hall = hall_with(&Setup::new(), 600 * SECOND);
    let conn = watch(&mut hall, "s1");
    hall.kinds(conn);
    hall.pass(SECOND);
    let mut more = record("u1");
    more["permissions"] = json!(["a", "b"]);
    hall.put_session("s1", more, Some(900 * SECOND));
    hall.message(conn, json!({ "type": "auth_update", "id": 7 }));
    let expires_at = (WALL_S + 901) * 1_000_000;
    assert_eq!(
        hall.frames(conn),
        [json!({ "type": "auth_ok", "id": 7, "expires_at": expires_at, "permissions": ["a", "b"] })]
    );
    // Away: it goes on as it was, and that counts for nothing.
    hall.away = true;
    for _ in 0..6 {
        hall.message(conn, json!({ "type": "auth_update", "id": 8 }));
        let frames = hall.frames(conn);
        assert_eq!((frames.len(), &frames[0]["code"]), (1, &json!("AUTH_UPDATE_REJECTED")));
        assert_eq!(frames[0]["reason"], "session_store_unavailable");
        assert_eq!(frames[0]["id"], 8);
    }
    hall.away = false;
    hall.store.remove("s1");
    hall.message(conn, json!({ "type": "auth_update", "id": 9 }));
    let frames = hall.frames(conn);
    assert_eq!((&frames[0]["code"], &frames[0]["reason"]), (&json!("AUTH_UPDATE_REJECTED"), &json!("session_expired")));
    assert_eq!(frames[1], json!({ "close": 4001, "reason": "session_expired" }));
}

#[test]
fn auth_update_without_a_token_is_for_sessions() {
    let mut hall = hall_with(&Setup::new().stream("open", "allow_anonymous = true"), 600 * SECOND);
    let token = format!("Bearer {}", hall.token(json!({})));
    let by_token = hall.upgrade(0, "/v1/streams/leads", &[("Authorization", &token)]);
    let anonymous = hall.upgrade(0, "/v1/streams/open", &[]);
    for conn in [by_token, anonymous] {
        hall.kinds(conn);
        hall.message(conn, json!({ "type": "auth_update", "id": 1 }));
        let frames = hall.frames(conn);
        assert_eq!((&frames[0]["code"], &frames[0]["reason"]), (&json!("AUTH_UPDATE_REJECTED"), &json!("no_session")));
    }
}

#[test]
fn a_session_may_go_on_by_a_token_of_its_user() {
    let mut hall = hall_with(&Setup::new(), 600 * SECOND);
    let conn = watch(&mut hall, "s1");
    hall.kinds(conn);
    let other = hall.token(json!({ "sub": "u2" }));
    hall.message(conn, json!({ "type": "auth_update", "token": other }));
    assert_eq!(hall.frames(conn)[0]["code"], "AUTH_SUBJECT_MISMATCH");
    let own = hall.token(json!({ "exp": WALL_S + 900 }));
    hall.message(conn, json!({ "type": "auth_update", "token": own }));
    assert_eq!(hall.frames(conn)[0]["expires_at"], (WALL_S + 900) * 1_000_000);
    // From now on it lives by the token alone.
    hall.store.clear();
    hall.asked.clear();
    hall.pass(120 * SECOND);
    assert_eq!((hall.kinds(conn), hall.asked.len()), (vec![], 0));
    hall.message(conn, json!({ "type": "auth_update" }));
    assert_eq!(hall.frames(conn)[0]["reason"], "no_session");
    hall.pass(790 * SECOND);
    assert_eq!(hall.kinds(conn).last().map(String::as_str), Some("4001 token_expired"));
}

// Reload.

#[test]
fn after_a_reload_records_are_read_by_the_new_configuration_before_rights_are_judged() {
    let setup = Setup::new();
    let mut hall = hall_with(&setup, 600 * SECOND);
    let mut wide = record("u1");
    wide["region"] = json!("eu");
    hall.put_session("s1", wide, Some(600 * SECOND));
    let conn = hall.upgrade(0, "/v1/streams/leads", &[("Cookie", &cookie("s1"))]);
    hall.kinds(conn);
    let mut other = setup.clone();
    other.streams =
        vec![("leads".into(), "linger = \"1h\"\ninterval = \"1h\"\nurl = \"http://up/{claims.region}\"".into())];
    hall.reload(&other);
    hall.pass(TICK);
    assert_eq!(hall.kinds(conn), ["snapshot"], "it moved; the claim was in the record, not in the grant");
    // A removed secret closes nobody; without sessions there are none.
    let secrets = CookieSecrets::new(&[Secret::new("a newer secret of the cookies")]);
    other.session = Some(restcast::auth::session::Options { secrets, ..session_options() });
    hall.reload(&other);
    assert_eq!(hall.kinds(conn), Vec::<String>::new());
    let late = watch(&mut hall, "s1");
    assert_eq!(hall.refused(late), code(401, "INVALID_TOKEN"), "{COOKIE_SECRET} is no secret any more");
    other.session = None;
    hall.reload(&other);
    assert_eq!(hall.kinds(conn), ["4001 session_expired"]);
}

// Tickets.

fn ticket(hall: &mut Hall, core: usize, headers: &[(&str, &str)]) -> String {
    let conn = hall.request(core, "POST", "/v1/tickets", headers);
    let (status, body) = hall.answered(conn);
    assert_eq!((status, &body["expires_in_s"]), (201, &json!(30)), "{body}");
    body["ticket"].as_str().expect("a ticket").to_owned()
}

fn use_ticket(hall: &mut Hall, core: usize, ticket: &str) -> Conn {
    hall.upgrade(core, &format!("/v1/streams/leads?ticket={ticket}"), &[])
}

#[test]
fn a_ticket_is_good_once_and_for_30_seconds_on_any_core() {
    for store in [false, true] {
        let setup = Setup { cores: 3, store, ..Setup::new() };
        let mut hall = Hall::new(&setup);
        let token = format!("Bearer {}", hall.token(json!({ "sub": "u1", "exp": WALL_S + 900, "iss": "i" })));
        let made = ticket(&mut hall, 0, &[("Authorization", &token)]);
        let first = use_ticket(&mut hall, 2, &made);
        let welcome = hall.frames(first).swap_remove(0);
        let expires_at = (WALL_S + 900) * 1_000_000;
        assert_eq!(welcome["auth"], json!({ "type": "ticket", "sub": "u1", "expires_at": expires_at }));
        for core in 0..3 {
            let again = use_ticket(&mut hall, core, &made);
            assert_eq!(hall.refused(again), code(401, "INVALID_TOKEN"));
        }
        let [just, late] = [0; 2].map(|_| ticket(&mut hall, 1, &[("Authorization", &token)]));
        assert_ne!(just, late);
        hall.pass(Duration::from_millis(29_999));
        let conn = use_ticket(&mut hall, 0, &just);
        assert_eq!(hall.kinds(conn), ["welcome", "snapshot"]);
        hall.pass(MS);
        let conn = use_ticket(&mut hall, 0, &late);
        assert_eq!(hall.refused(conn), code(401, "INVALID_TOKEN"));
    }
}

#[test]
fn a_ticket_used_by_many_at_once_opens_one() {
    let setup = Setup { cores: 4, ..Setup::new() };
    let mut hall = Hall::new(&setup);
    let token = format!("Bearer {}", hall.token(json!({})));
    let made = ticket(&mut hall, 0, &[("Authorization", &token)]);
    hall.answers = false;
    let conns: Vec<Conn> = (0..8).map(|no| use_ticket(&mut hall, no % 4, &made)).collect();
    assert_eq!(hall.questions.len(), 8, "the store decides");
    // Some of them are told that the store is away.
    for _ in 0..3 {
        let question = hall.questions.pop_back().expect("a question");
        hall.away = true;
        hall.answer(question);
        hall.away = false;
    }
    hall.answer_all();
    let opened = conns.iter().filter(|conn| hall.bytes(**conn).starts_with(b"HTTP/1.1 101")).count();
    assert_eq!(opened, 1);
}

#[test]
fn a_ticket_stands_for_what_its_asker_had() {
    let setup = Setup::new().stream("own", "url = \"http://up/{claims.companyId}\"\nroles = [\"agent\"]");
    let mut hall = Hall::new(&setup);
    let claims = json!({ "role": "agent", "companyId": 7, "streams": ["own", "x*"], "permissions": ["p"] });
    let token = format!("Bearer {}", hall.token(claims));
    let made = ticket(&mut hall, 0, &[("Authorization", &token)]);
    let conn = hall.upgrade(0, &format!("/v1/streams/own?ticket={made}"), &[]);
    assert_eq!(hall.kinds(conn), ["welcome", "snapshot"]);
    let made = ticket(&mut hall, 0, &[("Authorization", &token)]);
    let conn = use_ticket(&mut hall, 0, &made);
    assert_eq!(hall.refused(conn), code(403, "FORBIDDEN"), "its streams claim is the token's");
    let made = ticket(&mut hall, 0, &[("Authorization", &token)]);
    let conn = hall.request(0, "GET", &format!("/v1/streams/own?ticket={made}"), &[]);
    assert_eq!(hall.answered(conn).0, 200);
    let made = ticket(&mut hall, 0, &[("Authorization", &token)]);
    let conn = hall.request(0, "GET", &format!("/v1/streams/own?ticket={made}"), &[("Accept", "text/event-stream")]);
    assert!(String::from_utf8(hall.bytes(conn)).expect("text").contains("\"type\":\"ticket\""));
}

#[test]
fn a_ticket_of_a_token_ends_with_the_token() {
    let mut hall = Hall::new(&Setup { text: "[auth.jwt]\nleeway = \"0s\"".into(), ..Setup::new() });
    let token = format!("Bearer {}", hall.token(json!({ "exp": WALL_S + 20 })));
    let [early, late] = [0; 2].map(|_| ticket(&mut hall, 0, &[("Authorization", &token)]));
    let conn = use_ticket(&mut hall, 0, &early);
    hall.pass(20 * SECOND);
    assert_eq!(hall.kinds(conn).last().map(String::as_str), Some("4001 token_expired"));
    let conn = use_ticket(&mut hall, 0, &late);
    assert_eq!(hall.refused(conn), code(401, "TOKEN_EXPIRED"));
}

#[test]
fn a_ticket_of_a_session_lives_by_the_session() {
    let mut hall = hall_with(&Setup { cores: 2, ..Setup::new() }, 600 * SECOND);
    let made = ticket(&mut hall, 0, &[("Cookie", &cookie("s1"))]);
    let conn = use_ticket(&mut hall, 1, &made);
    let expires_at = (WALL_S + 600) * 1_000_000;
    let frames = hall.frames(conn);
    assert_eq!(frames[0]["auth"], json!({ "type": "ticket", "sub": "u1", "expires_at": expires_at }));
    hall.message(conn, json!({ "type": "auth_update" }));
    assert_eq!(hall.kinds(conn), ["auth_ok"]);
    hall.store.clear();
    hall.pass(30 * SECOND);
    assert_eq!(hall.kinds(conn), ["4001 session_expired"]);
    let mut hall = hall_with(&Setup::new(), 600 * SECOND);
    let cookie = cookie("s1");
    let [of_none, of_other] = [0; 2].map(|_| ticket(&mut hall, 0, &[("Cookie", &cookie)]));
    hall.put_session("s1", record("u2"), Some(600 * SECOND));
    let conn = use_ticket(&mut hall, 0, &of_other);
    assert_eq!(hall.refused(conn), code(401, "SESSION_EXPIRED"));
    hall.store.clear();
    let conn = use_ticket(&mut hall, 0, &of_none);
    assert_eq!(hall.refused(conn), code(401, "SESSION_EXPIRED"));
}

#[test]
fn another_process_takes_a_ticket_that_is_kept_in_the_store_and_only_one_does() {
    let mut here = Hall::new(&Setup::new());
    let mut there = Hall::new(&Setup::new());
    let token = format!("Bearer {}", here.token(json!({})));
    let made = ticket(&mut here, 0, &[("Authorization", &token)]);
    std::mem::swap(&mut here.tickets, &mut there.tickets);
    let conn = use_ticket(&mut there, 0, &made);
    assert_eq!(there.kinds(conn), ["welcome", "snapshot"]);
    std::mem::swap(&mut here.tickets, &mut there.tickets);
    let conn = use_ticket(&mut here, 0, &made);
    assert_eq!(here.refused(conn), code(401, "INVALID_TOKEN"), "its maker still had it, but the store says");
}

#[test]
fn a_ticket_is_not_used_twice_while_the_store_is_cut_from_one_process() {
    let mut here = Hall::new(&Setup::new());
    let mut there = Hall::new(&Setup::new());
    let token = format!("Bearer {}", here.token(json!({})));
    let made = ticket(&mut here, 0, &[("Authorization", &token)]);
    std::mem::swap(&mut here.tickets, &mut there.tickets);
    // The store has it, so the store's word is needed, by its maker as by anybody.
    here.away = true;
    let conn = use_ticket(&mut here, 0, &made);
    assert_eq!(here.refused(conn), code(503, "SESSION_STORE_UNAVAILABLE"));
    let conn = use_ticket(&mut there, 0, &made);
    assert_eq!(there.kinds(conn), ["welcome", "snapshot"]);
    let conn = use_ticket(&mut here, 0, &made);
    assert_eq!(here.refused(conn), code(503, "SESSION_STORE_UNAVAILABLE"));
    // One that is made meanwhile is its maker's alone, also when the store is there again: others say that it is not here,
    // not that it is wrong.
    let made = [0; 2].map(|_| ticket(&mut here, 0, &[("Authorization", &token)]));
    let conn = use_ticket(&mut there, 0, &made[0]);
    assert_eq!(there.refused(conn), code(503, "SESSION_STORE_UNAVAILABLE"));
    let conn = use_ticket(&mut here, 0, &made[0]);
    assert_eq!(here.kinds(conn), ["welcome", "snapshot"]);
    here.away = false;
    let conn = use_ticket(&mut here, 0, &made[1]);
    assert_eq!(here.kinds(conn), ["welcome", "snapshot"]);
    for made in made {
        let conn = use_ticket(&mut here, 0, &made);
        assert_eq!(here.refused(conn), code(401, "INVALID_TOKEN"));
    }
}

#[test]
fn a_ticket_that_the_store_may_have_kept_without_saying_so_is_handed_out_to_nobody() {
    let mut hall = Hall::new(&Setup::new());
    let token = format!("Bearer {}", hall.token(json!({})));
    hall.answers = false;
    let asker = hall.request(0, "POST", "/v1/tickets", &[("Authorization", &token)]);
    let question = hall.questions.pop_front().expect("a question");
    let Lookup::KeepTicket { hash, record, .. } = &question.lookup else { panic!("{question:?}") };
    let (in_the_store, record) = (hash.clone(), record.clone());
    hall.tickets.insert(in_the_store.clone(), record);
    hall.away = true;
    hall.answer(question);
    (hall.answers, hall.away) = (true, false);
    hall.settle();
    let (status, body) = hall.answered(asker);
    assert_eq!(status, 201, "{body}");
    let made = body["ticket"].as_str().expect("a ticket");
    let hash = restcast::auth::ticket::TicketHash::of(made.as_bytes()).expect("a ticket");
    assert_ne!(hash.to_string(), in_the_store, "another process could take it as well");
    let conn = use_ticket(&mut hall, 0, made);
    assert_eq!(hall.kinds(conn), ["welcome", "snapshot"]);
    let conn = use_ticket(&mut hall, 0, made);
    assert_eq!(hall.refused(conn), code(401, "INVALID_TOKEN"));
    assert_eq!(hall.tickets.len(), 1, "the other goes with its time");
}

#[test]
fn a_ticket_opens_nothing_while_nobody_can_say_that_its_session_lives() {
    let mut hall = hall_with(&Setup::new(), 600 * SECOND);
    let cookie = cookie("s1");
    let live = watch(&mut hall, "s1");
    let made = ticket(&mut hall, 0, &[("Cookie", &cookie)]);
    // The user signs out, and the store goes away before anything is heard of it.
    hall.store.clear();
    hall.answers = false;
    let conn = use_ticket(&mut hall, 0, &made);
    let of_ticket = hall.questions.pop_front().expect("a question");
    hall.answer(of_ticket);
    hall.settle();
    let of_session = hall.questions.pop_front().expect("another");
    assert!(matches!(of_session.lookup, Lookup::Sessions(_)), "{of_session:?}");
    hall.away = true;
    hall.answer(of_session);
    hall.settle();
    assert_eq!(hall.refused(conn), code(503, "SESSION_STORE_UNAVAILABLE"));
    assert_eq!(hall.kinds(live), ["welcome", "snapshot"], "who is connected has the grace");
}

#[test]
fn who_presents_nothing_or_a_ticket_gets_no_ticket() {
    let mut hall = Hall::new(&Setup::new().stream("open", "allow_anonymous = true"));
    let conn = hall.request(0, "POST", "/v1/tickets", &[]);
    assert_eq!(hall.refused(conn), code(401, "MISSING_CREDENTIAL"));
    let conn = hall.request(0, "POST", "/v1/tickets", &[("Authorization", "Bearer x")]);
    assert_eq!(hall.refused(conn), code(401, "INVALID_TOKEN"));
    let token = format!("Bearer {}", hall.token(json!({})));
    let made = ticket(&mut hall, 0, &[("Authorization", &token)]);
    let conn = hall.request(0, "POST", &format!("/v1/tickets?ticket={made}"), &[]);
    assert_eq!(hall.refused(conn), code(403, "FORBIDDEN"));
    let conn = hall.request(0, "GET", "/v1/tickets", &[("Authorization", &token)]);
    let text = String::from_utf8(hall.bytes(conn)).expect("text");
    assert!(text.starts_with("HTTP/1.1 405") && text.contains("\r\nAllow: POST, OPTIONS\r\n"), "{text}");
    // Browsers send a length with every POST, and the connection goes on.
    let conn = hall.request(0, "POST", "/v1/tickets", &[("Authorization", &token), ("Content-Length", "0")]);
    let text = String::from_utf8(hall.bytes(conn)).expect("text");
    assert!(text.starts_with("HTTP/1.1 201") && text.contains("\r\nCache-Control: no-store\r\n"), "{text}");
    assert!(!text.to_ascii_lowercase().contains("connection: close"), "{text}");
    hall.request_on(conn, "GET", "/v1/streams/leads", &[("Authorization", &token)]);
    assert_eq!(hall.answered(conn).0, 200);
}

#[test]
fn a_subject_has_so_many_tickets_at_once() {
    let mut hall = Hall::new(&Setup::new());
    let of = |hall: &Hall, sub: &str| format!("Bearer {}", hall.token(json!({ "sub": sub })));
    let (own, other) = (of(&hall, "u1"), of(&hall, "u2"));
    for _ in 0..restcast::limits::TICKETS_PER_SUBJECT_MAX {
        ticket(&mut hall, 0, &[("Authorization", &own)]);
    }
    let conn = hall.request(0, "POST", "/v1/tickets", &[("Authorization", &own)]);
    assert_eq!(hall.refused(conn), code(429, "RATE_LIMITED"));
    ticket(&mut hall, 0, &[("Authorization", &other)]);
    hall.pass(30 * SECOND);
    ticket(&mut hall, 0, &[("Authorization", &own)]);
}

#[test]
fn a_ticket_renews_a_live_connection_of_its_asker() {
    let mut hall = Hall::new(&Setup { text: "[auth]\nfirst_message = \"5s\"".into(), ..Setup::new() });
    let token = hall.token(json!({ "exp": WALL_S + 60 }));
    let later = format!("Bearer {}", hall.token(json!({ "exp": WALL_S + 900 })));
    let other = format!("Bearer {}", hall.token(json!({ "sub": "u2" })));
    let conn = hall.upgrade(0, "/v1/streams/leads", &[("Authorization", &format!("Bearer {token}"))]);
    hall.kinds(conn);
    let made = ticket(&mut hall, 0, &[("Authorization", &other)]);
    hall.message(conn, json!({ "type": "auth_update", "token": made }));
    assert_eq!(hall.frames(conn)[0]["code"], "AUTH_SUBJECT_MISMATCH");
    let made = ticket(&mut hall, 0, &[("Authorization", &later)]);
    hall.message(conn, json!({ "type": "auth_update", "token": made, "id": 1 }));
    assert_eq!(hall.frames(conn)[0]["expires_at"], (WALL_S + 900) * 1_000_000);
    hall.message(conn, json!({ "type": "auth_update", "token": made, "id": 2 }));
    let frames = hall.frames(conn);
    assert_eq!((&frames[0]["code"], &frames[0]["reason"]), (&json!("AUTH_UPDATE_REJECTED"), &json!("unknown_ticket")));
    // And opens one that has not said yet who it is.
    let first = hall.upgrade(0, "/v1/streams/leads", &[]);
    let made = ticket(&mut hall, 0, &[("Authorization", &later)]);
    hall.message(first, json!({ "type": "auth", "token": made }));
    assert_eq!(hall.kinds(first), ["welcome", "snapshot"]);
}

#[test]
fn a_message_that_comes_in_parts_while_the_first_is_looked_at_is_read_whole() {
    let mut hall = Hall::new(&Setup { text: "[auth]\nfirst_message = \"5s\"".into(), ..Setup::new() });
    let bearer = format!("Bearer {}", hall.token(json!({})));
    let made = ticket(&mut hall, 0, &[("Authorization", &bearer)]);
    let conn = hall.upgrade(0, "/v1/ws", &[]);
    hall.answers = false;
    hall.message(conn, json!({ "type": "auth", "token": made }));
    let mut frame = Vec::new();
    let subscribe = json!({ "type": "subscribe", "stream": "leads" }).to_string();
    write_masked(&mut frame, true, Opcode::Text, subscribe.as_bytes(), [1, 2, 3, 4]);
    let (begun, rest) = frame.split_at(9);
    hall.say(conn, begun);
    hall.answer_all();
    assert_eq!(hall.kinds(conn), ["welcome"]);
    hall.say(conn, rest);
    assert_eq!(hall.kinds(conn), ["subscribed", "snapshot"]);
}

#[test]
fn a_logout_from_before_an_anonymous_connection_was_raised_does_not_end_it() {
    let mut hall = hall_with(&Setup::new().stream("open", "allow_anonymous = true"), 600 * SECOND);
    let conn = hall.upgrade(0, "/v1/streams/open", &[]);
    hall.pass(SECOND);
    hall.hear("user-logged-out", json!({ "userId": "u1" }));
    hall.pass(SECOND);
    // The user signs in again, and the page raises the connection that it has.
    let made = ticket(&mut hall, 0, &[("Cookie", &cookie("s1"))]);
    hall.message(conn, json!({ "type": "auth_update", "token": made }));
    assert_eq!(hall.kinds(conn), ["welcome", "snapshot", "auth_ok"]);
    // Something else is said of the user, so that the connection is looked at.
    hall.hear("permission-update", json!({ "userId": "u1", "roles": ["agent"] }));
    hall.pass(SECOND);
    assert_eq!(hall.kinds(conn), Vec::<String>::new());
    hall.hear("user-logged-out", json!({ "userId": "u1" }));
    hall.pass(SECOND);
    assert_eq!(hall.kinds(conn), ["4010 logged_out"]);
}

#[test]
fn a_logout_that_is_heard_after_the_clock_was_set_forward_ends_a_session_from_before() {
    let mut hall = hall_with(&Setup::new(), 600 * SECOND);
    let conn = watch(&mut hall, "s1");
    hall.pass(SECOND);
    let logged_out = hall.wall();
    hall.set_clock_forward(10 * SECOND);
    hall.hear_late("user-logged-out", json!({ "userId": "u1" }), logged_out);
    hall.pass(SECOND);
    assert_eq!(hall.kinds(conn), ["welcome", "snapshot", "4010 logged_out"]);
    let again = watch(&mut hall, "s1");
    assert_eq!(hall.kinds(again), ["welcome", "snapshot"], "who signs in afterwards is let in");
}

#[test]
fn a_logout_that_was_dated_between_two_steps_of_the_clock_ends_a_session_from_before() {
    for (back, forward) in [(20, 10), (20, 30)] {
        let mut hall = hall_with(&Setup::new(), 600 * SECOND);
        let conn = watch(&mut hall, "s1");
        hall.pass(SECOND);
        hall.set_clock_back(back * SECOND);
        let logged_out = hall.wall();
        hall.set_clock_forward(forward * SECOND);
        hall.hear_late("user-logged-out", json!({ "userId": "u1" }), logged_out);
        hall.pass(SECOND);
        assert_eq!(hall.kinds(conn), ["welcome", "snapshot", "4010 logged_out"]);
        let again = watch(&mut hall, "s1");
        assert_eq!(hall.kinds(again), ["welcome", "snapshot"], "who signs in afterwards is let in");
    }
}

#[test]
fn an_anonymous_connection_is_raised_once() {
    let mut hall = Hall::new(&Setup::new().stream("open", "allow_anonymous = true"));
    let conn = hall.upgrade(0, "/v1/streams/open", &[]);
    hall.kinds(conn);
    let bearer = format!("Bearer {}", hall.token(json!({})));
    let made = ticket(&mut hall, 0, &[("Authorization", &bearer)]);
    hall.message(conn, json!({ "type": "auth_update", "token": made }));
    assert_eq!(hall.kinds(conn), ["auth_ok"]);
    let other = hall.token(json!({ "sub": "u2" }));
    hall.message(conn, json!({ "type": "auth_update", "token": other }));
    assert_eq!(hall.frames(conn)[0]["code"], "AUTH_SUBJECT_MISMATCH");
}
