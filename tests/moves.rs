//! Who watches a stream that is changed watches what it is now, whatever the limits of streams: by a reload and by the admin
//! API, on one core and two, in many tabs; and the limits hold afterwards as before.
#![cfg(feature = "runtime")]

mod hall;
mod support;

use std::collections::BTreeMap;

use hall::{Conn, Hall, MS, SECOND};
use serde_json::{Value, json};

use support::server::{ADMIN_KEY, Raw, Server, Setup, Ws, bearer, eventually, token_of, watching};
use support::{Reply, Upstream};

/// How often a stream is changed before the limits are looked at.
const CHANGES: usize = 10;

/// A WebSocket, and the epoch of each stream that it has.
struct Tab {
    ws: Ws,
    epochs: BTreeMap<String, String>,
}

impl Tab {
    /// One that was opened on a stream.
    fn single(server: &Server, token: &str, stream: &str) -> Tab {
        let ws = server.ws(&format!("/v1/streams/{stream}"), &[bearer(token)]);
        let mut tab = Tab { ws, epochs: BTreeMap::from([(stream.to_owned(), String::new())]) };
        tab.has_anew();
        tab
    }

    /// One that has all of them.
    fn of_many(server: &Server, token: &str, streams: &[String]) -> Tab {
        let mut tab = Tab { ws: watching(server, token, "/v1/ws"), epochs: BTreeMap::new() };
        for stream in streams {
            assert_eq!(tab.subscribe(stream), None, "{stream}");
        }
        tab
    }

    /// The code of the error, if it is one.
    fn subscribe(&mut self, stream: &str) -> Option<String> {
        self.ws.send(json!({"type": "subscribe", "stream": stream, "id": stream}));
        loop {
            let frame = self.ws.next();
            match frame["type"].as_str() {
                Some("error") if frame["id"] == stream => return Some(frame["code"].to_string().replace('"', "")),
                Some("snapshot") if frame["stream"] == stream => {
                    self.epochs.insert(stream.to_owned(), epoch(&frame));
                    return None;
                }
                Some("error" | "unsubscribed") => panic!("{frame}"),
                _ => {}
            }
        }
    }

    fn unsubscribe(&mut self, stream: &str) {
        self.ws.send(json!({"type": "unsubscribe", "stream": stream}));
        assert_eq!(self.ws.next_of("unsubscribed")["stream"], *stream);
        self.epochs.remove(stream);
    }

    /// Waits until each of its streams has got a snapshot of another epoch. Nothing is refused and nothing ends meanwhile.
    fn has_anew(&mut self) {
        let before = self.epochs.clone();
        while self.epochs.iter().any(|(stream, epoch)| *epoch == before[stream]) {
            let frame = self.ws.next();
            assert!(!["error", "unsubscribed"].contains(&frame["type"].as_str().expect("a type")), "{frame}");
            if frame["type"] == "snapshot" {
                let stream = frame["stream"].as_str().expect("a stream").to_owned();
                assert!(self.epochs.insert(stream, epoch(&frame)).is_some(), "{frame}");
            }
        }
    }
}

fn epoch(frame: &Value) -> String {
    frame["epoch"].as_str().expect("an epoch").to_owned()
}

fn upstream() -> Upstream {
    let upstream = Upstream::start();
    upstream.judge_all(|_| Reply::json("1"));
    upstream
}

fn names(count: usize) -> Vec<String> {
    (0..count).map(|no| format!("q?r={no}")).collect()
}

/// The subject watches as many as it may on each of the tabs: one more is refused, until it has left one; then there is that one.
fn assert_full(server: &Server, token: &str, tabs: &mut [Tab], mut singles: Vec<Tab>, count: usize) {
    let more = [format!("q?r={count}"), format!("q?r={}", count + 1)];
    let (tab, others) = tabs.split_first_mut().expect("a tab");
    for stream in &more {
        assert_eq!(tab.subscribe(stream).as_deref(), Some("TOO_MANY_STREAMS"));
        let answer = server.get(&format!("/v1/streams/{stream}"), &[bearer(token)]);
        assert_eq!((answer.status, answer.code()), (429, "TOO_MANY_STREAMS".to_owned()));
    }
    tab.unsubscribe("q?r=0");
    others.iter_mut().for_each(|other| other.unsubscribe("q?r=0"));
    assert_eq!(tab.subscribe(&more[0]).as_deref(), Some("TOO_MANY_STREAMS"), "a single connection watches it still");
    singles.retain(|single| !single.epochs.contains_key("q?r=0"));
    eventually("a place that was left", || tab.subscribe(&more[0]).is_none().then_some(()));
    for _ in 0..3 {
        assert_eq!(tab.subscribe(&more[1]).as_deref(), Some("TOO_MANY_STREAMS"), "one place was left, and no more");
    }
}

/// Two tabs that have all of them on one connection each, and a connection for each of them besides.
fn tabs(server: &Server, token: &str, streams: &[String]) -> (Vec<Tab>, Vec<Tab>) {
    let tabs = [(); 2].map(|()| Tab::of_many(server, token, streams)).into();
    (tabs, streams.iter().map(|stream| Tab::single(server, token, stream)).collect())
}

#[test]
fn a_reload_that_changes_what_one_subject_watches_on_two_tabs_closes_neither() {
    let upstream = upstream();
    let count = 40;
    for cores in [1, 2] {
        let setup = |interval: &str| {
            let lines = format!("params = [\"r\"]\ninterval = \"{interval}\"\nlinger = \"0s\"");
            let limits = format!("streams_per_subject = {count}\nmessages_per_second = 1000");
            Setup::new().cores(cores).limits(&limits).stream("q", &upstream.url("/q?r={query.r}"), &lines)
        };
        let server = setup("500ms").start();
        let token = token_of("u1");
        let (mut tabs, mut singles) = tabs(&server, &token, &names(count));
        for no in 0..CHANGES {
            server.reload(&setup(["600ms", "500ms"][no % 2]));
            tabs.iter_mut().chain(&mut singles).for_each(Tab::has_anew);
        }
        eventually("what it was before is gone", || {
            (server.metric(&["restcast_streams "]) as usize == count).then_some(())
        });
        assert_full(&server, &token, &mut tabs, singles, count);
    }
}

fn admin(server: &Server, method: &str, path: &str, body: &Value) -> u16 {
    let path = format!("/admin/v1/streams{path}");
    Raw::connect(server.admin).request(method, &path, &[bearer(ADMIN_KEY)], &body.to_string()).status
}

#[test]
fn a_put_of_what_one_subject_watches_on_two_tabs_closes_neither() {
    let upstream = upstream();
    let count = 20;
    // All places of the process are taken too.
    let limits = format!("streams_per_subject = {count}\nstreams = {count}\nmessages_per_second = 1000");
    for cores in [1, 2] {
        let server = Setup::new().cores(cores).limits(&limits).start();
        let body = |interval: &str, path: &str| {
            let url = upstream.url(&format!("{path}?r={{query.r}}"));
            json!({"id": "q", "url": url, "params": ["r"], "interval": interval, "linger": "0s"})
        };
        assert_eq!(admin(&server, "POST", "", &body("500ms", "/q")), 201);
        let token = token_of("u1");
        let (mut tabs, mut singles) = tabs(&server, &token, &names(count));
        for no in 0..CHANGES {
            // The interval, the URL, each in turn.
            let (interval, path) = [("600ms", "/q"), ("600ms", "/other"), ("500ms", "/other"), ("500ms", "/q")][no % 4];
            assert_eq!(admin(&server, "PUT", "/q", &body(interval, path)), 200);
            tabs.iter_mut().chain(&mut singles).for_each(Tab::has_anew);
        }
        eventually("what it was before is gone", || {
            (server.metric(&["restcast_streams "]) as usize == count).then_some(())
        });
        assert_full(&server, &token, &mut tabs, singles, count);
    }
}

#[test]
fn a_reload_of_as_many_streams_as_there_may_be_closes_nobody_who_watches_them() {
    let upstream = upstream();
    let count = 10;
    for cores in [1, 2] {
        let setup = |interval: &str| {
            let lines = format!("interval = \"{interval}\"\nlinger = \"0s\"");
            let setup = Setup::new().cores(cores).limits(&format!("streams = {count}"));
            (0..count + 2).fold(setup, |setup, no| setup.stream(&format!("s{no}"), &upstream.url("/s"), &lines))
        };
        let server = setup("500ms").start();
        let token = token_of("u1");
        let mut tabs: Vec<Tab> =
            (0..count * 3).map(|no| Tab::single(&server, &token, &format!("s{}", no % count))).collect();
        for no in 0..CHANGES {
            server.reload(&setup(["600ms", "500ms"][no % 2]));
            tabs.iter_mut().for_each(Tab::has_anew);
        }
        eventually("what it was before is gone", || {
            (server.metric(&["restcast_streams "]) as usize == count).then_some(())
        });
        let get = |no: usize| {
            let answer = server.get(&format!("/v1/streams/s{no}"), &[bearer(&token)]);
            (answer.status, if answer.status == 200 { String::new() } else { answer.code() })
        };
        let full = (503, "TOO_MANY_STREAMS".to_owned());
        assert_eq!([get(count), get(count + 1)], [full.clone(), full.clone()]);
        tabs.retain(|tab| !tab.epochs.contains_key("s0"));
        let _more = eventually("a place that was left", || {
            (get(count).0 == 200).then(|| Tab::single(&server, &token, &format!("s{count}")))
        });
        for _ in 0..3 {
            assert_eq!(get(count + 1), full, "one place was left, and no more");
        }
    }
}

fn hall_of(cores: u16, limits: &str, streams: &[(&str, &str)]) -> hall::Setup {
    let streams = streams.iter().map(|(id, lines)| ((*id).to_owned(), (*lines).to_owned())).collect();
    hall::Setup { cores, text: format!("[limits]\n{limits}\n"), streams, store: false, ..hall::Setup::new() }
}

fn open(hall: &mut Hall, core: usize, path: &str, token: &str) -> Conn {
    hall.upgrade(core, path, &[("Authorization", &format!("Bearer {token}"))])
}

#[test]
fn whoever_was_there_before_a_change_goes_before_who_comes_first_after_it() {
    let ids = ["a", "b", "c", "d"];
    for order in [[0, 1], [1, 0]] {
        let setup = |interval: &str| {
            let lines = format!("interval = \"{interval}\"\nlinger = \"0s\"");
            hall_of(2, "streams = 4", &ids.map(|id| (id, lines.as_str())))
        };
        let mut hall = Hall::new(&setup("1s"));
        let token = hall.token(json!({}));
        let mut tabs = Vec::new();
        for id in ids {
            for core in 0..2 {
                let tab = open(&mut hall, core, &format!("/v1/streams/{id}"), &token);
                hall.pass(10 * MS);
                assert_eq!(hall.kinds(tab), ["welcome", "snapshot"], "{id}");
                tabs.push(tab);
            }
        }
        let mut askers = Vec::new();
        hall.reload_in_order(&setup("2s"), &order, |hall, core| {
            // They are the first to ask for what the streams are now, and there is no place for them.
            for id in ids {
                let conn = hall.connect(core);
                let head = format!(
                    "GET /v1/streams/{id} HTTP/1.1\r\nHost: live.example\r\nAuthorization: Bearer {token}\r\n\r\n"
                );
                hall.say(conn, head.as_bytes());
                askers.push(conn);
            }
        });
        hall.pass(5 * SECOND);
        for tab in tabs {
            assert_eq!(hall.kinds(tab), ["snapshot"], "{order:?}");
        }
        assert_eq!(hall.ledger.streams(), 4);
    }
}

#[test]
fn what_is_kept_warm_is_so_after_a_change_whichever_core_hears_of_it_first() {
    let ids = ["a", "b", "c", "d", "e", "f"];
    for order in [[0, 1], [1, 0]] {
        let setup = |interval: &str| {
            let lines = format!("interval = \"{interval}\"\nkeep_warm = true");
            hall_of(2, "streams = 6", &ids.map(|id| (id, lines.as_str())))
        };
        let mut hall = Hall::new(&setup("1s"));
        for no in 0..CHANGES {
            hall.reload_in_order(&setup(["2s", "1s"][no % 2]), &order, |hall, _| hall.settle());
            let changed = hall.now().at;
            hall.pass(10 * SECOND);
            for id in ids {
                let polls = hall.polled.iter().filter(|(at, url)| *at > changed && url.ends_with(id)).count();
                assert!(polls >= 3, "{polls} polls of {id} after change {no}, {order:?}");
            }
            assert_eq!(hall.ledger.streams(), 6);
        }
    }
}

#[test]
fn who_finds_no_place_for_another_stream_of_a_new_credential_may_come_again() {
    let lines = "url = \"http://up/{claims.companyId}\"\ninterval = \"1s\"\nlinger = \"0s\"";
    let mut hall = Hall::new(&hall_of(2, "streams_per_subject = 1", &[("own", lines)]));
    let [first, second] = ["a", "b"].map(|company| hall.token(json!({"companyId": company})));
    let [single, other] = [0, 1].map(|core| open(&mut hall, core, "/v1/streams/own", &first));
    let many = open(&mut hall, 0, "/v1/ws", &first);
    hall.message(many, json!({"type": "subscribe", "stream": "own"}));
    hall.pass(10 * MS);
    assert_eq!(hall.kinds(other), ["welcome", "snapshot"]);
    hall.frames(single);
    hall.frames(many);
    // By a credential nobody gets over the limit: what `other` watches still takes the place.
    for conn in [single, many] {
        hall.message(conn, json!({"type": "auth_update", "token": second, "id": 1}));
    }
    let [single, of_many] = [single, many].map(|conn| hall.kinds(conn));
    assert_eq!(single, ["auth_ok", "error", "1013 overloaded"]);
    assert_eq!(of_many, ["auth_ok", "error"], "it may subscribe again");
    hall.lose(other);
    hall.pass(SECOND);
    hall.message(many, json!({"type": "subscribe", "stream": "own"}));
    hall.pass(SECOND);
    assert_eq!(hall.kinds(many)[..2], ["subscribed", "snapshot"]);
}

#[test]
fn a_change_to_a_claim_that_grants_have_not_kept_does_not_send_anybody_away_for_good() {
    let setup = |url: &str| {
        let lines = format!("url = \"http://up/{url}\"\ninterval = \"1s\"");
        hall_of(1, "", &[("own", lines.as_str())])
    };
    let mut hall = Hall::new(&setup("all"));
    let token = hall.token(json!({"sub": "a"}));
    let single = open(&mut hall, 0, "/v1/streams/own", &token);
    let many = open(&mut hall, 0, "/v1/ws", &token);
    hall.message(many, json!({"type": "subscribe", "stream": "own"}));
    hall.pass(10 * MS);
    hall.frames(single);
    hall.frames(many);
    hall.reload(&setup("{claims.sub}"));
    assert_eq!(hall.kinds(single), ["error", "1013 overloaded"]);
    let told = hall.frames(many);
    assert_eq!((told.len(), &told[0]["code"], &told[0]["stream"]), (1, &json!("STREAM_UNAVAILABLE"), &json!("own")));
    let again = open(&mut hall, 0, "/v1/streams/own", &token);
    hall.pass(10 * SECOND);
    assert_eq!(hall.kinds(again)[..2], ["welcome", "snapshot"]);
}

#[test]
fn a_change_ends_no_select_that_was_there_before() {
    let setup = |interval: &str| {
        let lines = format!("interval = \"{interval}\"\nlinger = \"0s\"");
        hall_of(1, "selects_per_stream = 4", &[("leads", lines.as_str())])
    };
    let mut hall = Hall::new(&setup("1s"));
    let [first, second] = ["u1", "u2"].map(|sub| hall.token(json!({"sub": sub})));
    let select = |no: usize| format!("/v1/streams/leads?select=$[{no}]");
    let place = open(&mut hall, 0, "/v1/streams/leads", &first);
    let mut tabs: Vec<Conn> = (1..=3).map(|no| open(&mut hall, 0, &select(no), &first)).collect();
    tabs.push(open(&mut hall, 0, &select(4), &second));
    // It comes first when the subscriptions are looked at, so that this one answers for all four, which is one too many.
    hall.frames(place);
    hall.lose(place);
    tabs.push(open(&mut hall, 0, &select(4), &first));
    hall.pass(10 * MS);
    for &tab in &tabs {
        assert_eq!(hall.kinds(tab), ["welcome", "snapshot"]);
    }
    for interval in ["2s", "1s"] {
        hall.reload(&setup(interval));
        hall.pass(5 * SECOND);
        for &tab in &tabs {
            assert_eq!(hall.kinds(tab), ["snapshot"]);
        }
    }
    let more = open(&mut hall, 0, &select(5), &second);
    assert_eq!(hall.kinds(more), ["welcome", "error", "1013 overloaded"]);
}

#[test]
fn who_is_moved_by_a_new_credential_has_the_place_that_it_leaves_at_once() {
    let lines = "url = \"http://up/{claims.companyId}\"\ninterval = \"1s\"\nlinger = \"10s\"";
    let mut hall = Hall::new(&hall_of(1, "streams_per_subject = 1", &[("own", lines)]));
    let tokens = ["a", "b"].map(|company| hall.token(json!({"companyId": company})));
    let single = open(&mut hall, 0, "/v1/streams/own", &tokens[0]);
    hall.pass(10 * MS);
    assert_eq!(hall.kinds(single), ["welcome", "snapshot"]);
    // What it leaves would be polled for 10 s more, and its place would be taken for one at the least.
    for token in [&tokens[1], &tokens[0]] {
        hall.message(single, json!({"type": "auth_update", "token": token, "id": 1}));
        hall.pass(10 * MS);
        assert_eq!(hall.kinds(single), ["auth_ok", "snapshot"]);
    }
    // Who leaves by its own choice waits for it.
    let other = open(&mut hall, 0, "/v1/ws", &tokens[1]);
    hall.lose(single);
    hall.message(other, json!({"type": "subscribe", "stream": "own"}));
    assert_eq!(hall.kinds(other), ["welcome", "error"]);
}

#[test]
fn what_somebody_was_moved_to_lets_nobody_past_a_limit_who_comes_later() {
    let setup = |interval: &str| {
        let lines = format!("interval = \"{interval}\"\nlinger = \"0s\"");
        hall_of(2, "streams = 1", &["a", "b"].map(|id| (id, lines.as_str())))
    };
    for core in 0..2 {
        let mut hall = Hall::new(&setup("1s"));
        let token = hall.token(json!({}));
        let tab = open(&mut hall, core, "/v1/streams/a", &token);
        hall.pass(10 * MS);
        hall.reload(&setup("2s"));
        hall.pass(3 * SECOND);
        assert_eq!(hall.kinds(tab), ["welcome", "snapshot", "snapshot"]);
        hall.lose(tab);
        hall.pass(10 * MS);
        let other = open(&mut hall, 0, "/v1/streams/b", &token);
        hall.pass(10 * MS);
        assert_eq!(hall.kinds(other), ["welcome", "snapshot"]);
        // The copy that is still there may be shown before the owner has refused it.
        let late = open(&mut hall, core, "/v1/streams/a", &token);
        hall.pass(10 * MS);
        let kinds = hall.kinds(late);
        assert!(kinds.ends_with(&["error".into(), "1013 overloaded".into()]), "{kinds:?}");
        assert_eq!(hall.ledger.streams(), 1);
    }
}

#[test]
fn a_change_ends_nothing_that_was_left_for_a_while() {
    let setup = |interval: &str| {
        let lines = format!("interval = \"{interval}\"\nlinger = \"0s\"");
        hall_of(2, "streams = 2", &[("a", lines.as_str()), ("b", "interval = \"1s\"\nlinger = \"60s\"")])
    };
    let mut hall = Hall::new(&setup("1s"));
    let token = hall.token(json!({}));
    let tabs = [0, 1].map(|core| open(&mut hall, core, "/v1/streams/a", &token));
    let left = open(&mut hall, 0, "/v1/streams/b", &token);
    hall.pass(10 * MS);
    hall.lose(left);
    for no in 0..CHANGES {
        hall.reload(&setup(["2s", "1s"][no % 2]));
        let changed = hall.now().at;
        hall.pass(4 * SECOND);
        let polls = hall.polled.iter().filter(|(at, url)| *at > changed && url.ends_with('b')).count();
        assert!((3..=5).contains(&polls), "{polls} polls after change {no}");
    }
    for tab in tabs {
        let kinds = hall.kinds(tab);
        assert_eq!((kinds.len(), kinds.iter().filter(|kind| *kind == "snapshot").count()), (CHANGES + 2, CHANGES + 1));
    }
}

#[test]
fn callers_of_one_address_have_what_they_had_after_a_change_and_no_more() {
    let setup = |interval: &str| {
        let lines = format!(
            "url = \"http://up/{{query.r}}\"\nparams = [\"r\"]\nallow_anonymous = true\ninterval = \"{interval}\"\nlinger = \"0s\""
        );
        hall_of(2, "streams_per_address = 2", &[("q", lines.as_str())])
    };
    let mut hall = Hall::new(&setup("1s"));
    let enter = |hall: &mut Hall, core: usize, query: &str| {
        let conn = hall.upgrade(core, &format!("/v1/streams/q?{query}"), &[]);
        hall.pass(10 * MS);
        conn
    };
    let mut tabs: Vec<Conn> = (0..4).map(|no| enter(&mut hall, no % 2, &format!("r={}", no / 2))).collect();
    // However it is looked at, it is asked for once.
    tabs.extend(["$.a", "$.b"].map(|select| enter(&mut hall, 0, &format!("r=0&select={select}"))));
    for &tab in &tabs {
        assert_eq!(hall.kinds(tab), ["welcome", "snapshot"]);
    }
    for no in 0..CHANGES {
        hall.reload(&setup(["2s", "1s"][no % 2]));
        hall.pass(5 * SECOND);
        for &tab in &tabs {
            assert_eq!(hall.kinds(tab), ["snapshot"], "change {no}");
        }
        assert_eq!(hall.ledger.kept_streams(), (2, 2), "nothing is kept of what it was");
    }
    let refused = enter(&mut hall, 0, "r=2");
    assert_eq!(hall.kinds(refused), ["welcome", "error", "1013 overloaded"]);
    for tab in [tabs[2], tabs[3]] {
        hall.lose(tab);
    }
    hall.pass(2 * SECOND);
    assert_eq!(hall.ledger.kept_streams(), (1, 1));
    let [more, refused] = ["r=2", "r=3"].map(|query| enter(&mut hall, 1, query));
    assert_eq!(hall.kinds(more), ["welcome", "snapshot"]);
    assert_eq!(hall.kinds(refused), ["welcome", "error", "1013 overloaded"]);
}

#[test]
fn a_reload_that_allows_fewer_subscriptions_takes_none_of_those_that_it_changes() {
    let ids = ["a", "b", "c", "d"];
    let setup = |interval: &str, most: u32| {
        let lines = format!("interval = \"{interval}\"");
        hall_of(2, &format!("subscriptions_per_connection = {most}"), &ids.map(|id| (id, lines.as_str())))
    };
    let mut hall = Hall::new(&setup("1s", 3));
    let token = hall.token(json!({}));
    let many = open(&mut hall, 0, "/v1/ws", &token);
    for id in &ids[..3] {
        hall.message(many, json!({"type": "subscribe", "stream": id}));
    }
    hall.pass(10 * MS);
    hall.frames(many);
    hall.reload(&setup("2s", 1));
    hall.pass(5 * SECOND);
    assert_eq!(hall.kinds(many), ["snapshot"; 3]);
    for (id, told) in [("a", "unsubscribed"), ("d", "error")] {
        let verb = if id == "a" { "unsubscribe" } else { "subscribe" };
        hall.message(many, json!({"type": verb, "stream": id}));
        assert_eq!(hall.kinds(many), [told]);
    }
}
