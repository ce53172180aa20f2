//! Views against the built server: each role gets its part of a stream, from one poll, and nothing of the rest: neither its
//! values nor its rhythm.
#![cfg(feature = "runtime")]

mod support;
#[path = "support/watcher.rs"]
mod watcher;

use std::time::Duration;

use serde_json::json;

use support::server::{Answer, DRIVERS, Server, Setup, bearer, eventually, mint, now_s};
use support::{Reply, Upstream};
use watcher::{Frame, Over, Watcher, canonical, on_core, polled, requests_for};

const LEADS: &str = "/v1/streams/leads";
/// What only admins may see, and what stands in front of it.
const SECRET: &str = "SSN-";
const VIEWS: &str = r#"
[[stream.view]]
roles = ["agent"]
pointers = ["/name", "/rows/*/id", "/rows/*/name"]
[[stream.view]]
roles = ["auditor"]
path = "$.rows[?@.open == true].id"
[[stream.view]]
roles = ["admin", "agent"]
pointers = [""]
"#;

fn of_roles(roles: &[&str]) -> String {
    mint(json!({ "sub": "u1", "roles": roles, "companyId": "acme", "exp": now_s() + 600 }))
}

fn who(role: &str) -> (&'static str, String) {
    bearer(&of_roles(&[role]))
}

/// The upstream's value: what is hidden is the `hidden`th, what agents see the `name`d.
fn lead(name: &str, hidden: u32) -> String {
    format!(
        r#"{{"name":"{name}","ssn":"{SECRET}{hidden}","rows":[{{"id":1.0,"name":"x","open":true,"pay":"{SECRET}{hidden}"}},
           {{"id":2E0,"name":"y","open":false,"pay":"{SECRET}{hidden}"}}],"note":"{}"}}"#,
        "n".repeat(200)
    )
}

fn agents(name: &str) -> String {
    format!(r#"{{"name":"{name}","rows":[{{"id":1.0,"name":"x"}},{{"id":2E0,"name":"y"}}]}}"#)
}

fn setup(upstream: &Upstream) -> Setup {
    upstream.set_json("/leads", &lead("Ada", 1));
    Setup::new().stream("leads", &upstream.url("/leads"), VIEWS)
}

fn get(server: &Server, role: &str, headers: &[(&str, &str)]) -> Answer {
    let mut all = vec![who(role)];
    all.extend(headers.iter().map(|(name, value)| (*name, (*value).to_owned())));
    server.get(LEADS, &all)
}

fn open(server: &Server, over: Over, role: &str) -> Watcher {
    Watcher::open(server, over, LEADS, &[who(role)])
}

/// Changes what only admins see, a few times.
fn change_hidden(upstream: &Upstream, name: &str, numbers: std::ops::RangeInclusive<u32>) {
    for number in numbers {
        upstream.set_json("/leads", &lead(name, number));
        polled(upstream, "/leads");
    }
}

fn all_gone(server: &Server) {
    eventually("nobody is subscribed", || (server.metric(&["restcast_subscriptions"]) == 0.0).then_some(()));
}

#[test]
fn each_role_gets_its_part_in_every_representation_on_every_core_from_one_poll() {
    for driver in DRIVERS {
        let upstream = Upstream::start();
        let server = setup(&upstream).driver(driver).start();
        let mut agents_there = Vec::new();
        let mut admins = Vec::new();
        for core in 0..2 {
            for over in [Over::Ws, Over::Sse] {
                agents_there.push(on_core(&server, core, |server| open(server, over, "agent")));
                admins.push(on_core(&server, core, |server| open(server, over, "admin")));
            }
        }
        let mut epochs: Vec<String> = Vec::new();
        for watcher in &mut agents_there {
            let first = watcher.event();
            assert_eq!((first.seq(), watcher.value("leads")), (1, canonical(&agents("Ada"))));
            epochs.push(first.epoch());
        }
        for watcher in &mut admins {
            let first = watcher.event();
            assert_eq!((first.seq(), watcher.value("leads")), (1, canonical(&lead("Ada", 1))));
            epochs.push(first.epoch());
        }
        let (of_agents, of_admins) = epochs.split_at(4);
        assert!(of_agents.iter().all(|epoch| *epoch == epochs[0]) && of_admins.iter().all(|epoch| *epoch == epochs[4]));
        assert_ne!(epochs[0], epochs[4], "each view is a sequence of its own");

        let answer = get(&server, "agent", &[]);
        assert_eq!((answer.status, canonical(&answer.text())), (200, canonical(&agents("Ada"))));
        assert_eq!(answer.header("etag"), Some(&*format!("\"{}-1\"", epochs[0])));
        let answer = get(&server, "auditor", &[]);
        assert_eq!((answer.status, answer.text()), (200, "[1.0]".to_owned()));
        assert_eq!(get(&server, "admin", &[]).header("etag"), Some(&*format!("\"{}-1\"", epochs[4])));
        assert_eq!(server.metric(&["restcast_streams"]), 1.0, "one stream is polled for all of them");

        change_hidden(&upstream, "Ada", 2..=4);
        for watcher in &mut admins {
            watcher.events_to(4);
            assert_eq!(watcher.value("leads"), canonical(&lead("Ada", 4)));
        }
        let etag = format!("\"{}-1\"", epochs[0]);
        let same = get(&server, "agent", &[("If-None-Match", &etag)]);
        assert_eq!((same.status, same.header("etag")), (304, Some(&*etag)));
        upstream.set_json("/leads", &lead("Bob", 5));
        for watcher in &mut agents_there {
            // The next frame: nothing was told of what came before.
            assert_eq!(watcher.event().seq(), 2);
            assert_eq!(watcher.value("leads"), canonical(&agents("Bob")));
        }
        for watcher in &mut admins {
            watcher.events_to(5);
        }
    }
}

#[test]
fn what_a_caller_may_not_see_is_in_none_of_the_bytes_they_get() {
    for (over, format) in [(Over::Ws, "patch"), (Over::Ws, "merge"), (Over::Ws, "full"), (Over::Sse, "patch")] {
        let upstream = Upstream::start();
        let server = setup(&upstream).start();
        let mut frames: Vec<Frame> = Vec::new();
        let path = format!("{LEADS}?format={format}");
        let mut watcher = Watcher::open(&server, over, &path, &[who("agent")]);
        frames.push(watcher.event());
        for number in 2..6 {
            upstream.set_json("/leads", &lead(&format!("Ada {number}"), number));
            frames.push(watcher.event_with("leads", &agents(&format!("Ada {number}"))));
        }
        upstream.set("/leads", Reply::status(500));
        frames.push(watcher.next_of("stream_status"));
        let held = watcher.holding("leads").clone();
        drop(watcher);
        // Back again, after what was missed.
        let point = format!("{}-{}", held.epoch, held.seq - 2);
        let mut again = Watcher::open(&server, over, &format!("{path}&since={point}"), &[who("agent")]);
        frames.push(again.next_of("stream_status"));
        frames.extend([again.next(), again.next()]);
        assert_eq!(frames.last().map(Frame::seq), Some(held.seq));
        for frame in &frames {
            assert!(!frame.text.contains(SECRET) && !frame.text.contains("ssn"), "{}", frame.text);
        }
        let answer = get(&server, "agent", &[]);
        assert_eq!(answer.header("x-restcast-state"), Some("stale"));
        assert!(!answer.text().contains(SECRET));
        assert!(!server.log_text().contains(SECRET) && !server.metrics().contains(SECRET));
    }
}

#[test]
fn a_resume_gives_the_events_of_the_own_view_and_a_snapshot_to_who_comes_from_another() {
    let upstream = Upstream::start();
    let server = setup(&upstream).start();
    for over in [Over::Ws, Over::Sse] {
        upstream.set_json("/leads", &lead("Ada", 1));
        let mut agent = open(&server, over, "agent");
        let mut admin = open(&server, over, "admin");
        let of_agent = agent.event_with("leads", &agents("Ada"));
        let of_admin = admin.event_with("leads", &lead("Ada", 1));
        let held = agent.holding("leads").clone();
        drop((agent, admin));
        all_gone(&server);
        change_hidden(&upstream, "Ada", 2..=3);
        change_hidden(&upstream, "Bob", 3..=4);
        let path = |frame: &Frame| format!("{LEADS}?since={}", frame.point());
        for core in 0..2 {
            let mut back =
                on_core(&server, core, |server| Watcher::open(server, over, &path(&of_agent), &[who("agent")]));
            back.resume("leads", &held);
            let missed = back.event();
            assert_eq!((&*missed.kind(), missed.seq()), ("patch", held.seq + 1), "what was hidden made no event");
            assert_eq!(back.value("leads"), canonical(&agents("Bob")));
            let mut foreign =
                on_core(&server, core, |server| Watcher::open(server, over, &path(&of_admin), &[who("agent")]));
            let first = foreign.event();
            assert_eq!((first.kind(), first.point()), ("snapshot".to_owned(), missed.point()));
        }
    }
}

#[test]
fn a_role_that_changes_on_a_live_connection_moves_its_subscription() {
    let upstream = Upstream::start();
    let server = setup(&upstream).stream("other", &upstream.url("/leads"), "").start();
    for core in 0..2 {
        let mut single = on_core(&server, core, |server| open(server, Over::Ws, "agent"));
        let first = single.event();
        single.send(&json!({"type":"auth_update","token":of_roles(&["admin"]),"id":1}).to_string());
        single.next_of("auth_ok");
        let moved = single.next_of("snapshot");
        assert_eq!(
            (moved.stream(), canonical(&moved.member("data"))),
            ("leads".to_owned(), canonical(&lead("Ada", 1)))
        );
        assert_ne!(moved.epoch(), first.epoch());
        // The same view by another token: nothing moves.
        single.send(&json!({"type":"auth_update","token":of_roles(&["x","admin"]),"id":2}).to_string());
        single.next_of("auth_ok");
        // And back, to where it was.
        single.send(&json!({"type":"auth_update","token":of_roles(&["agent"]),"id":3}).to_string());
        single.next_of("auth_ok");
        let back = single.next_of("snapshot");
        assert_eq!((back.point(), back.member("data")), (first.point(), first.member("data")));
        // To no view at all.
        single.send(&json!({"type":"auth_update","token":of_roles(&["visitor"]),"id":4}).to_string());
        single.next_of("auth_ok");
        assert_eq!(single.raw().close_frame(), (4003, "forbidden".to_owned()));

        let mut many = on_core(&server, core, |server| Watcher::open(server, Over::Ws, "/v1/ws", &[who("agent")]));
        for stream in ["leads", "other"] {
            many.send(&json!({"type":"subscribe","stream":stream}).to_string());
            many.next_of("subscribed");
            many.event();
        }
        many.send(&json!({"type":"auth_update","token":of_roles(&["auditor"]),"id":5}).to_string());
        many.next_of("auth_ok");
        let moved = many.next_of("snapshot");
        assert_eq!((moved.stream(), moved.member("data")), ("leads".to_owned(), "[1.0]".to_owned()));
        many.send(&json!({"type":"auth_update","token":of_roles(&[]),"id":6}).to_string());
        many.next_of("auth_ok");
        let lost = many.next_of("unsubscribed").json();
        assert_eq!((&lost["stream"], &lost["reason"]), (&json!("leads"), &json!("forbidden")));
        assert!(many.is_quiet_for(Duration::from_millis(100)), "the other stream is still held, and has not changed");

        let mut events = on_core(&server, core, |server| open(server, Over::Sse, "agent"));
        events.event();
        let id = events.welcome.json()["connection"].as_str().expect("an id").to_owned();
        let body = json!({ "token": of_roles(&["admin"]) }).to_string();
        let renewed = server.request("POST", &format!("/v1/connections/{id}/auth"), &[], &body);
        assert_eq!(renewed.status, 200, "{}", renewed.text());
        let moved = events.next_of("snapshot");
        assert_eq!(canonical(&moved.member("data")), canonical(&lead("Ada", 1)));
    }
}

#[test]
fn the_first_view_that_names_a_role_of_the_caller_is_theirs_and_without_one_they_are_refused() {
    let upstream = Upstream::start();
    let anonymous = format!("allow_anonymous = true\n{VIEWS}");
    let asks = format!("permissions = [\"leads.read\"]\n{VIEWS}");
    let server = setup(&upstream)
        .stream("open", &upstream.url("/leads"), &anonymous)
        .stream("asks", &upstream.url("/leads"), &asks)
        .start();
    for (roles, value) in [
        (&["admin", "agent"][..], agents("Ada")),
        (&["x", "auditor", "admin"], "[1.0]".to_owned()),
        (&["admin", "x"], lead("Ada", 1)),
    ] {
        let answer = server.get(LEADS, &[bearer(&of_roles(roles))]);
        assert_eq!(canonical(&answer.text()), canonical(&value), "{roles:?}");
    }
    for roles in [&[][..], &["visitor"], &["Agent"], &["leads"]] {
        let token = bearer(&of_roles(roles));
        let mut refused = vec![server.get(LEADS, std::slice::from_ref(&token))];
        for over in [Over::Ws, Over::Sse] {
            refused.push(Watcher::try_open(&server, over, LEADS, std::slice::from_ref(&token)).err().expect("refused"));
        }
        for answer in refused {
            assert_eq!((answer.status, &*answer.code()), (403, "INSUFFICIENT_PERMISSIONS"), "{roles:?}");
        }
        let mut many = Watcher::open(&server, Over::Ws, "/v1/ws", &[token]);
        many.send(&json!({"type":"subscribe","stream":"leads","id":1}).to_string());
        assert_eq!(many.next_of("error").json()["code"], "INSUFFICIENT_PERMISSIONS");
    }
    // Nobody in particular has no role, whatever the stream allows.
    let answer = server.get("/v1/streams/open", &[]);
    assert_eq!((answer.status, &*answer.code()), (401, "MISSING_CREDENTIAL"));
    // A view is no way around what the stream asks of all.
    let answer = server.get("/v1/streams/asks", &[who("admin")]);
    assert_eq!((answer.status, &*answer.code()), (403, "INSUFFICIENT_PERMISSIONS"));
}

#[test]
fn the_state_of_the_upstream_is_told_to_all_views_alike() {
    let upstream = Upstream::start();
    let server = setup(&upstream).start();
    let mut watchers: Vec<Watcher> =
        ["agent", "auditor", "admin"].iter().map(|role| open(&server, Over::Ws, role)).collect();
    watchers.iter_mut().for_each(|watcher| drop(watcher.event()));
    upstream.set("/leads", Reply::status(500));
    for watcher in &mut watchers {
        let status = watcher.next_of("stream_status").json();
        assert_eq!((&status["state"], &status["code"]), (&json!("stale"), &json!("UPSTREAM_STATUS")));
    }
    upstream.set_json("/leads", &lead("Ada", 2));
    for (watcher, sees) in watchers.iter_mut().zip([false, false, true]) {
        if sees {
            watcher.event();
        }
        assert_eq!(watcher.next_of("stream_status").json()["state"], "live");
    }
}

#[test]
fn a_view_that_is_watched_later_is_there_at_once_and_one_left_alone_is_brought_up_to_date() {
    let upstream = Upstream::start();
    let lines = format!("linger = \"300ms\"\n{VIEWS}");
    upstream.set_json("/leads", &lead("Ada", 1));
    upstream.set_json("/warm", &lead("Fay", 1));
    let server = Setup::new()
        .stream("leads", &upstream.url("/leads"), &lines)
        .stream("rare", &upstream.url("/rare"), &format!("interval = \"1h\"\n{VIEWS}"))
        .stream("warm", &upstream.url("/warm"), &format!("interval = \"1h\"\nkeep_warm = true\n{VIEWS}"))
        .start();
    upstream.set_json("/rare", &lead("Eve", 1));
    // Polled once in an hour, for the first who asks: whoever comes for another view does not wait for the next poll.
    for (role, value) in [("admin", lead("Eve", 1)), ("agent", agents("Eve")), ("auditor", "[1.0]".to_owned())] {
        let mut watcher = Watcher::open(&server, Over::Ws, "/v1/streams/rare", &[who(role)]);
        assert_eq!(watcher.event().seq(), 1);
        assert_eq!(watcher.value("rare"), canonical(&value), "{role}");
    }
    assert_eq!(requests_for(&upstream, "/rare").len(), 1);
    // Kept warm, all views are.
    for (role, value) in [("auditor", "[1.0]".to_owned()), ("agent", agents("Fay")), ("admin", lead("Fay", 1))] {
        let answer = server.get("/v1/streams/warm", &[who(role)]);
        assert_eq!((answer.status, canonical(&answer.text())), (200, canonical(&value)), "{role}");
    }
    assert_eq!(requests_for(&upstream, "/warm").len(), 1);

    // An agent leaves, and an admin stays: the agents' view is left alone, and is as it should be for who returns.
    let mut admin = open(&server, Over::Ws, "admin");
    admin.event();
    for over in [Over::Ws, Over::Sse] {
        let mut agent = open(&server, over, "agent");
        agent.event();
        let held = agent.holding("leads").clone();
        drop(agent);
        eventually("the agent is gone", || (server.metric(&["restcast_subscriptions"]) == 1.0).then_some(()));
        // Polls tell the time: 25 of them take longer than the stream lingers.
        let before = requests_for(&upstream, "/leads").len();
        eventually("25 polls", || (requests_for(&upstream, "/leads").len() >= before + 25).then_some(()));
        change_hidden(&upstream, "Bob", 2..=2);
        change_hidden(&upstream, &format!("Cyd {over:?}"), 2..=4);
        let value = agents(&format!("Cyd {over:?}"));
        let answer = get(&server, "agent", &[]);
        assert_eq!(canonical(&answer.text()), canonical(&value), "not what was left alone");
        let path = format!("{LEADS}?since={}-{}", held.epoch, held.seq);
        let mut back = Watcher::open(&server, over, &path, &[who("agent")]);
        back.resume("leads", &held);
        let missed = back.event_with("leads", &value);
        assert_eq!(missed.epoch(), held.epoch);
        assert!(missed.seq() <= held.seq + 2, "{}", missed.seq());
    }
}

#[test]
fn large_values_are_projected_off_the_cores_and_are_right() {
    let upstream = Upstream::start();
    let rows = |changed: u32| {
        let rows: Vec<String> = (0..6_000)
            .map(|id| {
                let name = if id == 5_999 { changed } else { 0 };
                format!(r#"{{"id":{id},"name":"row {name}","open":{},"pay":"{SECRET}{changed}"}}"#, id % 1_000 == 0)
            })
            .collect();
        format!(r#"{{"name":"big","rows":[{}]}}"#, rows.join(","))
    };
    upstream.set_json("/leads", &rows(1));
    let server = Setup::new().stream("leads", &upstream.url("/leads"), &format!("array_key = \"id\"\n{VIEWS}")).start();
    let mut agent = open(&server, Over::Ws, "agent");
    let first = agent.event();
    assert!(first.text.len() > 100_000 && !first.text.contains(SECRET));
    let mut auditor = open(&server, Over::Ws, "auditor");
    auditor.event();
    assert_eq!(auditor.value("leads"), "[0,1000,2000,3000,4000,5000]");
    upstream.set_json("/leads", &rows(2));
    let change = agent.event();
    assert_eq!(
        change.member("patch"),
        r#"[{"op":"replace","path":"/rows/5999/name","value":"row 2"}]"#,
        "rows are known again by the key, which the view shows"
    );
    assert!(auditor.is_quiet_for(Duration::from_millis(200)), "nothing has changed in what it shows");
    // One more view while the value is held.
    let mut admin = open(&server, Over::Sse, "admin");
    admin.event();
    assert_eq!(admin.value("leads"), canonical(&rows(2)));
}

#[test]
fn views_of_one_url_count_once_and_follow_a_reload() {
    let upstream = Upstream::start();
    upstream.set_json("/acme", &lead("Ada", 1));
    let url = upstream.url("/{claims.companyId}");
    let setup = Setup::new();
    let server = setup.clone().limits("streams = 1\nstreams_per_subject = 1").stream("leads", &url, VIEWS).start();
    let mut watchers: Vec<Watcher> =
        ["agent", "auditor", "admin"].iter().map(|role| open(&server, Over::Ws, role)).collect();
    let firsts: Vec<Frame> = watchers.iter_mut().map(Watcher::event).collect();
    assert_eq!(server.metric(&["restcast_streams"]), 1.0);
    // Another file: agents see less, auditors nothing any more, and the stream is another for everybody.
    let less = "[[stream.view]]\nroles = [\"agent\", \"admin\"]\npath = \"$.name\"\n";
    server.reload(&setup.clone().limits("streams = 2").stream("leads", &url, less));
    for (watcher, first) in watchers.iter_mut().zip(firsts).step_by(2) {
        let moved = watcher.event();
        assert_eq!((moved.kind(), moved.member("data")), ("snapshot".to_owned(), "\"Ada\"".to_owned()));
        assert_ne!(moved.epoch(), first.epoch());
    }
    assert_eq!(watchers[1].raw().close_frame(), (4003, "forbidden".to_owned()));
}

#[test]
fn a_path_that_is_too_much_for_the_value_is_its_views_trouble_alone() {
    let upstream = Upstream::start();
    let large = |first: u32| format!("[{first},{}1]", "1,".repeat(20_000));
    upstream.set_json("/leads", &large(1));
    let lines = "[[stream.view]]\nroles = [\"agent\"]\npath = \"$[?count($[*]) > @]\"\n\
                 [[stream.view]]\nroles = [\"admin\"]\npath = \"$[0]\"";
    let server = Setup::new().stream("leads", &upstream.url("/leads"), lines).start();
    let mut agent = open(&server, Over::Ws, "agent");
    let status = agent.next_of("stream_status").json();
    assert_eq!((&status["state"], &status["code"]), (&json!("failing"), &json!("UPSTREAM_TOO_LARGE")));
    server.wait_for_log("the path of view 1 takes over", 1);
    let mut admin = open(&server, Over::Sse, "admin");
    assert_eq!(admin.event().member("data"), "1");
    upstream.set_json("/leads", &large(2));
    admin.event();
    assert_eq!((admin.value("leads"), get(&server, "admin", &[]).text()), ("2".to_owned(), "2".to_owned()));
    let answer = get(&server, "agent", &[]);
    assert_eq!((answer.status, answer.code().as_str()), (503, "STREAM_UNAVAILABLE"));
    // It is made again as soon as the value lets it.
    upstream.set_json("/leads", "[1,2]");
    assert_eq!(agent.event().member("data"), "[1]");
    assert_eq!(agent.next_of("stream_status").json()["state"], "live");
    admin.event();
    assert_eq!(admin.value("leads"), "1");
    upstream.set_json("/leads", &large(3));
    let status = agent.next_of("stream_status").json();
    assert_eq!((&status["state"], &status["code"]), (&json!("stale"), &json!("UPSTREAM_TOO_LARGE")));
    let answer = get(&server, "agent", &[]);
    assert_eq!(
        (answer.status, answer.text(), answer.header("x-restcast-state")),
        (200, "[1]".to_owned(), Some("stale"))
    );
    admin.event();
    assert_eq!(admin.value("leads"), "3");
    assert_eq!((server.metric(&["restcast_polls_total", "too_large"]), server.get("/healthz", &[]).status), (0.0, 200));
}
