//! What changes while something is still awaited, a body or an answer of the store: who has asked is judged by what holds
//! when it is there.
#![cfg(feature = "runtime")]

mod hall;

use std::sync::Arc;

use hall::{Conn, Hall, MS, SECOND, Setup, WALL_S, api_keys, cookie};
use restcast::auth::api_key::{ApiKeyId, KeyHash, key_text};
use restcast::shard::Input;
use serde_json::{Value, json};

fn code(status: u16, code: &str) -> (u16, String) {
    (status, code.to_owned())
}

fn record(user: &str, role: &str) -> Value {
    json!({ "cookie": { "originalMaxAge": 3_600_000, "expires": null }, "userId": user, "userRole": role })
}

/// Developers may describe streams.
fn direct(lines: &str) -> Setup {
    let text = format!("{lines}\n[direct]\nallow_public = true\nroles = [\"developer\"]\n");
    Setup { text, store: false, ..Setup::new() }
}

const BODY: &str = r#"{"url":"https://api.example.com/a"}"#;

/// The head of a request whose body is still to come.
fn begin(hall: &mut Hall, path: &str, accept: &str, (name, value): (&str, &str)) -> Conn {
    let conn = hall.connect(0);
    let (head, length) = (format!("POST {path} HTTP/1.1\r\nHost: live.example\r\nAccept: {accept}"), BODY.len());
    hall.say(conn, format!("{head}\r\n{name}: {value}\r\nContent-Length: {length}\r\n\r\n").as_bytes());
    assert_eq!(hall.bytes(conn), b"", "it is judged, and its body awaited");
    conn
}

/// Each way to bring a description by a body.
const WAYS: [(&str, &str); 3] =
    [("/v1/direct", "text/event-stream"), ("/v1/direct", "application/json"), ("/v1/sessions", "*/*")];

#[test]
fn who_loses_a_right_while_the_body_is_awaited_has_lost_it() {
    let mut hall = Hall::new(&direct(""));
    for (path, accept) in WAYS {
        hall.put_session("s1", record("u1", "developer"), Some(600 * SECOND));
        let begun = begin(&mut hall, path, accept, ("Cookie", &cookie("s1")));
        hall.put_session("s1", record("u1", "viewer"), Some(600 * SECOND));
        hall.hear("permission-update", json!({ "userId": "u1", "roles": ["viewer"] }));
        hall.say(begun, BODY.as_bytes());
        assert_eq!(hall.refused(begun), code(403, "INSUFFICIENT_PERMISSIONS"), "{path} {accept}, by a session");
        let sub = format!("{path} {accept}");
        let token = format!("Bearer {}", hall.token(json!({ "sub": sub, "role": "developer" })));
        let begun = begin(&mut hall, path, accept, ("Authorization", &token));
        hall.hear("permission-update", json!({ "userId": sub, "roles": ["viewer"] }));
        hall.say(begun, BODY.as_bytes());
        assert_eq!(hall.refused(begun), code(403, "INSUFFICIENT_PERMISSIONS"), "{path} {accept}, by a token");
    }
}

#[test]
fn an_api_key_that_is_revoked_while_the_body_is_awaited_opens_nothing() {
    let text = key_text(&ApiKeyId::new("k").expect("an id"), &[7; 32]);
    let hash = KeyHash::new(&text, [1; 16]).to_text();
    let key = String::from_utf8(text.expose_secret().to_vec()).expect("text");
    let line = |role: &str| {
        format!("[[auth.api_key]]\nid = \"k\"\nhash = {hash:?}\nstreams = [\"direct:*\"]\nroles = [{role:?}]\n")
    };
    let mut hall = Hall::new(&direct(""));
    for (path, accept) in WAYS {
        for (then, refused) in
            [(String::new(), code(401, "TOKEN_REVOKED")), (line("viewer"), code(403, "INSUFFICIENT_PERMISSIONS"))]
        {
            let keys = api_keys(&line("developer"));
            hall.tell_all(|| Input::ApiKeys(Arc::clone(&keys)));
            let begun = begin(&mut hall, path, accept, ("X-Api-Key", &key));
            let keys = api_keys(&then);
            hall.tell_all(|| Input::ApiKeys(Arc::clone(&keys)));
            hall.say(begun, BODY.as_bytes());
            assert_eq!(hall.refused(begun), refused, "{path} {accept} {then}");
        }
    }
}

#[test]
fn a_session_that_is_extended_while_the_body_is_awaited_goes_on_to_its_new_end() {
    let mut hall = Hall::new(&direct("[limits]\nhandshake_timeout = \"60s\""));
    hall.put_session("s1", record("u1", "developer"), Some(10 * SECOND));
    let begun = begin(&mut hall, "/v1/direct", "text/event-stream", ("Cookie", &cookie("s1")));
    hall.put_session("s1", record("u1", "developer"), Some(600 * SECOND));
    hall.pass(20 * SECOND);
    hall.say(begun, BODY.as_bytes());
    let text = String::from_utf8(hall.bytes(begun)).expect("text");
    let end = format!("\"expires_at\":{}", (WALL_S + 600) * 1_000_000);
    assert!(text.contains("event: welcome") && text.contains(&end), "{text}");
}

#[test]
fn a_clock_that_is_set_while_a_record_is_asked_for_neither_ends_a_session_nor_lengthens_it() {
    for (forward, name) in [(3_600 * SECOND, "forward"), (std::time::Duration::ZERO, "not at all")] {
        let mut hall = Hall::new(&Setup::new());
        hall.put_session("s1", record("u1", "agent"), Some(600 * SECOND));
        hall.answers = false;
        let conn = hall.upgrade(0, "/v1/streams/leads", &[("Cookie", &cookie("s1"))]);
        let question = hall.questions.pop_front().expect("a question");
        hall.set_clock_forward(forward);
        // The key's life is as long as before: the store's clock is its own.
        hall.put_session("s1", record("u1", "agent"), Some(600 * SECOND));
        hall.answer(question);
        hall.settle();
        let frames = hall.frames(conn);
        let end = hall.wall() + 600 * SECOND;
        assert_eq!(frames[0]["auth"]["expires_at"], end.as_micros(), "{name}");
    }
}

#[test]
fn a_record_that_was_read_before_its_users_rights_changed_is_read_once_more() {
    let mut hall = Hall::new(&Setup::new().stream("staff", "roles = [\"staff\"]"));
    hall.put_session("s1", record("u1", "staff"), Some(600 * SECOND));
    hall.answers = false;
    let conn = hall.upgrade(0, "/v1/streams/staff", &[("Cookie", &cookie("s1"))]);
    let question = hall.questions.pop_front().expect("a question");
    hall.pass(SECOND);
    // The store had answered before the record changed; what was published of it is here first.
    hall.hear("permission-update", json!({ "userId": "u1", "roles": ["viewer"] }));
    hall.answer(question);
    hall.put_session("s1", record("u1", "viewer"), Some(600 * SECOND));
    hall.answers = true;
    // When the millisecond that the news is dated by is over.
    hall.pass(std::time::Duration::from_millis(2));
    let kinds = hall.kinds(conn);
    assert_eq!(kinds.last().map(String::as_str), Some("4003 forbidden"), "{kinds:?}");
    // What was said before the record was asked for is in it already.
    hall.asked.clear();
    hall.pass(SECOND);
    let later = hall.upgrade(0, "/v1/streams/leads", &[("Cookie", &cookie("s1"))]);
    assert_eq!((hall.kinds(later), hall.asked.clone()), (vec!["welcome".into(), "snapshot".into()], vec![1]));
}

#[test]
fn news_that_is_dated_ahead_of_the_clock_has_a_record_read_once_more_and_not_without_end() {
    let mut hall = Hall::new(&Setup::new());
    hall.put_session("s1", record("u1", "viewer"), Some(600 * SECOND));
    let at = hall.wall().as_micros() / 1_000 + 30_000;
    hall.hear_at_once("permission-update", json!({ "userId": "u1", "roles": ["viewer"], "at": at }));
    hall.asked.clear();
    let conn = hall.upgrade(0, "/v1/streams/leads", &[("Cookie", &cookie("s1"))]);
    for _ in 0..100 {
        hall.pass(SECOND / 10);
    }
    assert_eq!(hall.kinds(conn)[..2], ["welcome", "snapshot"]);
    assert_eq!(hall.asked, [1, 1], "in ten seconds: once to come in, once after the news");
}

#[test]
fn what_is_heard_of_a_session_while_its_record_is_on_its_way_has_it_read_once_more() {
    let mut hall = Hall::new(&Setup::new().stream("staff", "roles = [\"staff\"]"));
    hall.put_session("s1", record("u1", "staff"), Some(600 * SECOND));
    let conn = hall.upgrade(0, "/v1/streams/staff", &[("Cookie", &cookie("s1"))]);
    assert_eq!(hall.kinds(conn), ["welcome", "snapshot"]);
    hall.answers = false;
    hall.pass(30 * SECOND);
    let question = hall.questions.pop_front().expect("it is read again");
    hall.hear_at_once("permission-update", json!({ "userId": "u1", "roles": ["viewer"] }));
    hall.answer(question);
    hall.put_session("s1", record("u1", "viewer"), Some(600 * SECOND));
    hall.answers = true;
    hall.settle();
    assert_eq!(hall.kinds(conn), ["permission_update", "4003 forbidden"]);
}

#[test]
fn a_good_answer_from_before_the_store_went_away_does_not_lengthen_the_grace() {
    let mut hall = Hall::new(&Setup::new());
    hall.put_session("s1", record("u1", "agent"), Some(86_400 * SECOND));
    let conn = hall.upgrade(0, "/v1/streams/leads", &[("Cookie", &cookie("s1"))]);
    assert_eq!(hall.kinds(conn), ["welcome", "snapshot"]);
    hall.answers = false;
    hall.pass(30 * SECOND);
    let question = hall.questions.pop_front().expect("it is read again");
    let away = hall.wall();
    hall.tell_all(|| Input::StoreState { up: false });
    hall.answer(question);
    hall.away = true;
    hall.answers = true;
    hall.settle();
    hall.pass((300 * SECOND - MS).saturating_sub(hall.wall().since(away)));
    assert_eq!(hall.kinds(conn), Vec::<String>::new());
    hall.pass(MS);
    assert_eq!(hall.kinds(conn), ["4001 session_expired"], "the grace began when the store went away");
}

#[test]
fn who_signed_in_before_a_logout_and_is_answered_after_it_is_refused() {
    let mut hall = Hall::new(&Setup::new());
    hall.put_session("s1", record("u1", "agent"), Some(600 * SECOND));
    hall.answers = false;
    let before = hall.upgrade(0, "/v1/streams/leads", &[("Cookie", &cookie("s1"))]);
    hall.pass(SECOND);
    hall.hear("user-logged-out", json!({ "userId": "u1" }));
    hall.answer_all();
    assert_eq!(hall.refused(before), code(401, "LOGGED_OUT"), "the record may have been read before it");
    hall.pass(SECOND);
    let after = hall.upgrade(0, "/v1/streams/leads", &[("Cookie", &cookie("s1"))]);
    hall.answer_all();
    assert_eq!(hall.kinds(after), ["welcome", "snapshot"], "from then on its record counts");
}

#[test]
fn an_end_that_is_told_a_little_later_each_time_is_one_end() {
    let mut hall = Hall::new(&Setup::new());
    hall.put_session("s1", record("u1", "agent"), Some(40 * SECOND));
    let conn = hall.upgrade(0, "/v1/streams/leads", &[("Cookie", &cookie("s1"))]);
    hall.pass(25 * SECOND);
    assert_eq!(hall.kinds(conn), ["welcome", "snapshot", "reauthenticate"]);
    // The answer took longer than the one before.
    hall.put_session("s1", record("u1", "agent"), Some(15 * SECOND + 400 * MS));
    hall.pass(15 * SECOND - MS);
    assert_eq!(hall.kinds(conn), Vec::<String>::new(), "nothing is said of it again");
    hall.pass(MS);
    assert_eq!(hall.kinds(conn), ["4001 session_expired"]);
}

#[test]
fn a_session_that_is_found_deleted_after_a_logout_was_heard_ends_as_logged_out() {
    for said in [json!({ "sessionId": "s1" }), json!({ "userId": "u1" })] {
        let mut hall = Hall::new(&Setup::new());
        hall.put_session("s1", record("u1", "agent"), Some(600 * SECOND));
        let conn = hall.upgrade(0, "/v1/streams/leads", &[("Cookie", &cookie("s1"))]);
        assert_eq!(hall.kinds(conn), ["welcome", "snapshot"]);
        // With so many a core looks through them now and then.
        for _ in 0..4_200 {
            hall.connect(0);
        }
        hall.answers = false;
        hall.message(conn, json!({ "type": "auth_update" }));
        let question = hall.questions.pop_front().expect("it is read");
        hall.hear("user-logged-out", json!({ "userId": "another" }));
        hall.hear_at_once("user-logged-out", said.clone());
        assert_eq!(hall.kinds(conn), Vec::<String>::new(), "it has not been looked at yet");
        hall.store.remove("s1");
        hall.answer(question);
        hall.settle();
        assert_eq!(hall.kinds(conn), ["error", "4010 logged_out"], "{said}");
    }
}
