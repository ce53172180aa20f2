//! Credentials that end, through a shard with a time of its own: what is random about it, and what comes within a millisecond,
//! can be told from a busy machine there.

mod hall;

use std::time::Duration;

use hall::{Conn, Hall, MS, SECOND, Setup, WALL_S, cookie};
use serde_json::json;

/// Connections that open at once under tokens of one end: few of them fall into the same tenth of the spread by chance.
const MANY: usize = 64;
/// A tick of the wheel.
const TICK_MS: u64 = 100;

fn opened(hall: &mut Hall, exp: u64) -> Vec<Conn> {
    let bearer = format!("Bearer {}", hall.token(json!({ "exp": exp })));
    (0..MANY)
        .map(|_| {
            let conn = hall.upgrade(0, "/v1/ws", &[("Authorization", &bearer)]);
            assert_eq!(hall.kinds(conn), ["welcome"]);
            conn
        })
        .collect()
}

/// What is left until `exp` when each is told to renew: milliseconds, the soonest last.
fn told(hall: &mut Hall, conns: &[Conn]) -> Vec<u64> {
    let mut left: Vec<u64> = conns
        .iter()
        .map(|&conn| {
            let frames = hall.frames(conn);
            let asked: Vec<_> = frames.iter().filter(|frame| frame["type"] == "reauthenticate").collect();
            assert_eq!(asked.len(), 1, "{frames:?}");
            asked[0]["expires_in_ms"].as_u64().expect("milliseconds")
        })
        .collect();
    left.sort_unstable_by(|a, b| b.cmp(a));
    left
}

/// Whether they lie within a tenth before `lead`, all over it.
fn is_spread(left: &[u64], lead_ms: u64) -> bool {
    let (first, last) = (left[0], left[left.len() - 1]);
    let tenth = lead_ms / 10;
    first <= lead_ms + tenth && last + TICK_MS >= lead_ms && first - last > tenth / 2
}

#[test]
fn reauthenticate_is_spread_over_a_tenth_of_its_lead_and_again_after_an_update() {
    let mut hall = Hall::new(&Setup::new());
    let conns = opened(&mut hall, WALL_S + 3_600);
    hall.pass(3_533 * SECOND);
    assert!(conns.iter().all(|&conn| hall.kinds(conn).is_empty()), "66 s before at the earliest");
    hall.pass(8 * SECOND);
    let left = told(&mut hall, &conns);
    assert!(is_spread(&left, 60_000), "{left:?}");
    // Of a token of 40 s half of that is the lead.
    let exp = WALL_S + 3_541 + 40;
    for &conn in &conns {
        let token = hall.token(json!({ "exp": exp }));
        hall.message(conn, json!({ "type": "auth_update", "token": token }));
        assert_eq!(hall.kinds(conn), ["auth_ok"]);
    }
    hall.pass(21 * SECOND);
    let left = told(&mut hall, &conns);
    assert!(is_spread(&left, 20_000), "{left:?}");
}

#[test]
fn a_token_ends_with_its_leeway_and_at_most_a_tick_later() {
    let mut hall = Hall::new(&Setup::new());
    let conns = opened(&mut hall, WALL_S + 40);
    hall.pass(44 * SECOND);
    conns.iter().for_each(|&conn| assert_eq!(hall.kinds(conn), ["reauthenticate"]));
    hall.pass(999 * MS);
    assert!(conns.iter().all(|&conn| hall.kinds(conn).is_empty()));
    hall.pass(101 * MS);
    conns.iter().for_each(|&conn| assert_eq!(hall.kinds(conn), ["4001 token_expired"]));
}

#[test]
fn a_logout_ends_a_session_that_was_opened_before_it_in_its_millisecond() {
    let mut hall = Hall::new(&Setup::new());
    hall.put_session("s1", json!({ "cookie": {}, "userId": "u1", "permissions": [] }), Some(600 * SECOND));
    hall.pass(Duration::from_micros(500));
    let cookie = cookie("s1");
    let conn = hall.upgrade(0, "/v1/ws", &[("Cookie", &cookie)]);
    assert_eq!(hall.kinds(conn), ["welcome"]);
    // It is dated to the millisecond, which began before.
    hall.pass(Duration::from_micros(100));
    hall.hear("user-logged-out", json!({ "userId": "u1" }));
    hall.pass(SECOND);
    assert_eq!(hall.kinds(conn), ["4010 logged_out"]);
    let again = hall.upgrade(0, "/v1/ws", &[("Cookie", &cookie)]);
    assert_eq!(hall.kinds(again), ["welcome"], "its record is there, and says so");
}
