//! Operators' filters against the built server: what they make of a value is what is compared and sent, and one that loops,
//! takes all memory or fails is a poll that has failed, and nothing more.
#![cfg(feature = "runtime")]

mod support;
#[path = "support/watcher.rs"]
mod watcher;

use std::time::Duration;

use serde_json::json;

use support::server::{DRIVERS, Server, Setup, bearer, eventually, run, token_of};
use support::{Reply, Upstream};
use watcher::{Watcher, canonical, polled};

const STREAM: &str = "/v1/streams/leads";

fn filtered(filter: &str) -> String {
    format!("filter = '{filter}'\n")
}

fn get(server: &Server, stream: &str) -> support::server::Answer {
    server.get(&format!("/v1/streams/{stream}"), &[bearer(&token_of("u1"))])
}

#[test]
fn what_a_filter_makes_of_the_value_is_compared_and_sent() {
    for driver in DRIVERS {
        let upstream = Upstream::start();
        let items = |seen: u32, name: &str| {
            format!(
                r#"{{"at":{seen},"items":[{{"id":1.0,"name":"{name}","pay":{seen}}},{{"id":2E0,"name":"yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy","pay":1}}]}}"#
            )
        };
        upstream.set_json("/leads", &items(1, "x"));
        let server = Setup::new()
            .driver(driver)
            .stream("leads", &upstream.url("/leads"), &filtered(".items | map({id, name})"))
            .start();
        let mut watcher = Watcher::ws(&server, STREAM);
        assert_eq!(
            watcher.event().member("data"),
            r#"[{"id":1.0,"name":"x"},{"id":2E0,"name":"yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy"}]"#
        );
        for seen in 2..5 {
            upstream.set_json("/leads", &items(seen, "x"));
            polled(&upstream, "/leads");
        }
        upstream.set_json("/leads", &items(5, "z"));
        let next = watcher.event();
        assert_eq!(
            (next.seq(), next.member("patch")),
            (2, r#"[{"op":"replace","path":"/0/name","value":"z"}]"#.to_owned())
        );
        assert_eq!(canonical(&get(&server, "leads").text()), watcher.value("leads"));
    }
}

#[test]
fn a_filter_stands_before_views_selects_and_what_is_ignored() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", r#"{"v":{"rows":[{"id":1,"at":1},{"id":2,"at":1}],"pay":7}}"#);
    let lines = format!(
        "{}ignore = [\"/rows/0/at\"]\n[[stream.view]]\nroles = [\"agent\"]\npointers = [\"/rows\"]\n",
        filtered(".v")
    );
    let server = Setup::new().stream("leads", &upstream.url("/leads"), &lines).start();
    let agent = support::server::mint(json!({"sub":"u1","roles":["agent"],"exp":support::server::now_s() + 600}));
    let path = format!("{STREAM}?select=%24.rows%5B*%5D");
    let mut watcher = Watcher::open(&server, watcher::Over::Ws, &path, &[bearer(&agent)]);
    assert_eq!(watcher.event().member("data"), r#"[{"id":1,"at":1},{"id":2,"at":1}]"#);
    upstream.set_json("/leads", r#"{"v":{"rows":[{"id":1,"at":2},{"id":2,"at":1}],"pay":8}}"#);
    polled(&upstream, "/leads");
    upstream.set_json("/leads", r#"{"v":{"rows":[{"id":1,"at":3},{"id":2,"at":2}],"pay":8}}"#);
    let next = watcher.event();
    assert_eq!(next.seq(), 2, "what is ignored has made no event");
    assert_eq!(watcher.value("leads"), canonical(r#"[{"id":1,"at":3},{"id":2,"at":2}]"#));
}

#[test]
fn a_filter_that_has_no_end_is_a_poll_that_has_failed_and_holds_up_nobody() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", "[1]");
    upstream.set_json("/quick", "1");
    let endless = [
        ("loop", "def f: f; f"),
        ("range", "[range(1e12)] | length"),
        ("text", "\"x\" * 1e9"),
        ("doubled", "reduce range(64) as $i (\"x\"; . + .)"),
        ("repeat", "[limit(1e9; repeat(1))]"),
        ("deep", "def f: 1 + f; f"),
        ("nested", "[limit(1; def g: [g]; g)]"),
    ];
    let mut setup = Setup::new().stream("leads", &upstream.url("/quick"), "");
    for (id, filter) in endless {
        setup = setup.stream(id, &upstream.url("/leads"), &format!("timeout = \"60s\"\n{}", filtered(filter)));
    }
    let server = setup.stream("well", &upstream.url("/leads"), &filtered("map(. + 1)")).start();
    let mut watchers: Vec<(&str, Watcher)> =
        endless.iter().map(|(id, _)| (*id, Watcher::ws(&server, &format!("/v1/streams/{id}")))).collect();
    // Nobody else waits: a stream without a filter is polled, changes and is sent meanwhile.
    let mut quick = Watcher::ws(&server, STREAM);
    quick.event();
    for value in 2..12 {
        upstream.set_json("/quick", &value.to_string());
        quick.event_with("leads", &value.to_string());
    }
    for (id, watcher) in &mut watchers {
        let status = watcher.next_of("stream_status").json();
        assert_eq!((&status["state"], &status["code"]), (&json!("failing"), &json!("UPSTREAM_BODY")), "{id}");
    }
    drop(watchers);
    // When they are given up, what is well is well.
    let mut well = Watcher::ws(&server, "/v1/streams/well");
    assert_eq!(well.event().member("data"), "[2]");
    assert_eq!(server.get("/healthz", &[]).status, 200);
    let log = server.log_text();
    assert!(log.contains("has not come to an end in time") && log.contains("more memory than it may"), "{log}");
}

#[test]
fn what_fails_is_told_without_the_body_and_ends_with_the_next_value_that_it_can_be_made_of() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", r#"{"items":"SECRET"}"#);
    let server = Setup::new().stream("leads", &upstream.url("/leads"), &filtered(".items | map(.id)")).start();
    let mut watcher = Watcher::ws(&server, STREAM);
    let failing = watcher.next_of("stream_status").json();
    assert_eq!((&failing["state"], &failing["code"]), (&json!("failing"), &json!("UPSTREAM_BODY")));
    server.wait_for_log("the filter has failed with this body", 1);
    upstream.set_json("/leads", r#"{"items":[{"id":7}]}"#);
    assert_eq!(watcher.event().member("data"), "[7]");
    assert_eq!(watcher.next_of("stream_status").json()["state"], "live");
    // The upstream's error page is none of its business.
    upstream.set("/leads", Reply::status(500));
    assert_eq!(watcher.next_of("stream_status").json()["code"], "UPSTREAM_STATUS");
    assert!(!server.log_text().contains("SECRET"));
}

#[test]
fn its_process_is_made_anew_when_it_is_gone_and_goes_with_the_server() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", "[1]");
    let mut server = Setup::new().stream("leads", &upstream.url("/leads"), &filtered("map(. + 1)")).start();
    let mut watcher = Watcher::ws(&server, STREAM);
    watcher.event();
    let children = |server: &Server| -> Vec<u32> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", server.pid())).expect("it runs");
        let of = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
        let found: Vec<String> = tasks.flatten().map(of).collect();
        // One that was killed is there until its thread has noticed.
        let lives =
            |pid: &u32| !std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default().contains(") Z ");
        found.join(" ").split_whitespace().filter_map(|pid| pid.parse().ok()).filter(lives).collect()
    };
    let first = children(&server);
    assert!((1..=2).contains(&first.len()), "{first:?}");
    for pid in &first {
        let environment = std::fs::read(format!("/proc/{pid}/environ")).expect("it runs");
        assert!(environment.is_empty(), "it has nothing of our environment");
        let pid = rustix::process::Pid::from_raw(i32::try_from(*pid).expect("a pid")).expect("not 0");
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("it is ours");
    }
    // What was under way may have failed; the next poll has another process.
    upstream.set_json("/leads", "[2]");
    watcher.event_with("leads", "[3]");
    let second = children(&server);
    assert!(!second.is_empty() && second.iter().all(|pid| !first.contains(pid)));
    server.signal(rustix::process::Signal::TERM);
    server.wait();
    eventually("they have gone", || {
        let is_gone = |pid: &u32| {
            let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            state.is_empty() || state.contains(") Z ")
        };
        second.iter().all(is_gone).then_some(())
    });
}

#[test]
fn what_is_no_program_is_told_by_check_with_its_line_however_deep_it_is_nested() {
    let setup = |filter: &str| Setup::new().stream("leads", "http://127.0.0.1:1/", &filtered(filter));
    let check = |filter: &str| run(&["check"], &setup(filter));
    let (status, _, errors) = check(".items | nope(1)");
    assert!(
        !status.success() && errors.contains("`stream.filter`: byte 9: there is no filter `nope/1` here"),
        "{errors}"
    );
    for refused in ["env", "$ENV.PATH", "input", "debug", "@sh", "now", "include \"/etc/passwd\"; .", "halt"] {
        assert!(!check(refused).0.success(), "{refused}");
    }
    let many =
        |open: &str, close: &str| format!("{}.{}", open.repeat(2_000 / open.len()), close.repeat(2_000 / open.len()));
    for deep in [
        many("(", ")"),
        many("[", "]"),
        many("-", ""),
        many("{a:", "}"),
        many(".|", ""),
        many("try ", ""),
        many("def f:", ";f"),
    ] {
        let (status, _, errors) = check(&deep);
        assert_eq!(status.code().map(|code| code < 2), Some(true), "it does not end it: {errors}");
    }
    let longest = format!(".{}", " ".repeat(4095));
    assert!(check(&longest).0.success());
    assert!(check(&format!("{longest} ")).2.contains("at most 4096 bytes"));
}

#[test]
fn a_large_value_is_filtered_within_its_time_and_bound() {
    let upstream = Upstream::start();
    let rows: Vec<String> =
        (0..6_000).map(|id| format!(r#"{{"id":{id},"name":"row","pad":"{}"}}"#, "x".repeat(80))).collect();
    upstream.set_json("/leads", &format!("[{}]", rows.join(",")));
    let server = Setup::new()
        .stream("leads", &upstream.url("/leads"), &filtered("map(select(.id % 1000 == 0) | .id)"))
        .stream("all", &upstream.url("/leads"), &format!("response_bytes_max = \"1MiB\"\n{}", filtered("[., ., .]")))
        .start();
    let value = Watcher::ws(&server, STREAM).event().member("data");
    assert!(value.starts_with("[0,1000,2000,") && value.len() < 200, "{value}");
    let mut over = Watcher::ws(&server, "/v1/streams/all");
    assert_eq!(over.next_of("stream_status").json()["code"], "UPSTREAM_TOO_LARGE");
    assert!(over.is_quiet_for(Duration::from_millis(50)));
}
