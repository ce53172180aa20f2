//! What an action has changed is seen at every process that shares the Redis, against the built server and a real Redis.
#![allow(clippy::disallowed_methods, reason = "tests measure how long things take")]

mod support;

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use support::server::{DRIVERS, PATIENCE, Server, Setup, Ws, bearer, eventually, mint, now_s, watching};
use support::{Redis, Reply, Upstream};

/// How soon after the answer to an action a watcher at another process holds what it has changed: one poll's time, on a
/// machine that does other things besides. The streams' own interval is an hour.
const SOON: Duration = Duration::from_secs(20);

fn token(sub: &str, company: &str) -> String {
    mint(json!({ "sub": sub, "exp": now_s() + 600, "companyId": company }))
}

/// Subscribed at `/v1/ws` to nothing yet.
fn writer(server: &Server, company: &str) -> Ws {
    let mut ws = server.ws("/v1/ws", &[bearer(&token("writer", company))]);
    assert_eq!(ws.next()["type"], "welcome");
    ws
}

fn act(ws: &mut Ws, message: Value) {
    ws.send(message.clone());
    loop {
        let frame = ws.next();
        if frame["id"] == message["id"] {
            return assert_eq!(frame["type"], "action_result", "{frame}");
        }
    }
}

fn setup(upstream: &Upstream, redis: &Redis) -> Setup {
    upstream.set("/update", Reply::json("{}"));
    for company in ["acme", "umbrella"] {
        upstream.set_json(&format!("/{company}/leads/eu"), "[\"old\"]");
        upstream.set_json(&format!("/{company}/leads/us"), "[\"old\"]");
    }
    Setup::new()
        .redis(&redis.url(), "")
        .stream(
            "leads",
            &upstream.url("/{claims.companyId}/leads/{query.region}"),
            "interval = \"1h\"\nparams = [\"region\"]",
        )
        .stream("other", &upstream.url("/other"), "interval = \"1h\"")
        .action("update", &upstream.url("/update"), "refresh = [\"leads\"]")
}

fn gets(upstream: &Upstream, target: &str) -> usize {
    upstream.requests().iter().filter(|request| request.method == "GET" && request.target == target).count()
}

#[test]
fn a_change_by_an_action_at_one_process_is_seen_by_watchers_at_the_others_in_one_polls_time() {
    for driver in DRIVERS {
        let (redis, upstream) = (Redis::start(), Upstream::start());
        upstream.set_json("/other", "[]");
        let setup = setup(&upstream, &redis).driver(driver);
        // Each makes its own seed for its own hashes, and they need not have as many cores.
        let (here, there) = (setup.start(), setup.clone().cores(1).start());
        redis.wait_for_subscribers("restcast:processes", 2);
        let path = "/v1/streams/leads?region=eu";
        let mut watchers: Vec<Ws> = [&here, &there, &there]
            .iter()
            .enumerate()
            .map(|(n, server)| watching(server, &token(&format!("w{n}"), "acme"), path))
            .collect();
        let mut bystanders = [
            watching(&there, &token("s", "umbrella"), path),
            watching(&there, &token("w9", "acme"), "/v1/streams/leads?region=us"),
            watching(&there, &token("w9", "acme"), "/v1/streams/other"),
        ];
        let counted = ["/umbrella/leads/eu", "/acme/leads/us", "/other"];
        let before = counted.map(|target| gets(&upstream, target));

        let mut writer = writer(&here, "acme");
        writer.send(json!({"type": "subscribe", "stream": "leads?region=eu", "id": "s"}));
        assert_eq!(writer.next_of("snapshot")["data"], json!(["old"]));
        for n in 0..3 {
            let polls = gets(&upstream, "/acme/leads/eu");
            upstream.set_json("/acme/leads/eu", &format!("[{n}]"));
            act(&mut writer, json!({"type": "update", "id": n}));
            let answered = Instant::now();
            for ws in &mut watchers {
                assert_eq!(ws.next_of("snapshot")["data"], json!([n]));
            }
            assert!(answered.elapsed() < SOON, "{:?}", answered.elapsed());
            assert_eq!(gets(&upstream, "/acme/leads/eu"), polls + 2, "one poll of each process");
        }
        for ws in &mut bystanders {
            assert!(ws.is_quiet_for(Duration::from_millis(200)));
        }
        assert_eq!(counted.map(|target| gets(&upstream, target)), before, "what was not meant is left alone");
    }
}

#[test]
fn an_action_at_a_process_that_polls_nothing_of_it_has_the_others_poll() {
    let (redis, upstream) = (Redis::start(), Upstream::start());
    upstream.set_json("/acme", "1");
    upstream.set("/update", Reply::json("{}"));
    let setup = Setup::new()
        .redis(&redis.url(), "")
        .stream("one", &upstream.url("/{claims.companyId}"), "interval = \"1h\"")
        .action("update", &upstream.url("/update"), "refresh = [\"one\"]");
    let (here, there) = (setup.start(), setup.start());
    redis.wait_for_subscribers("restcast:processes", 2);
    let mut ws = watching(&there, &token("w", "acme"), "/v1/streams/one");
    let mut writer = writer(&here, "acme");
    upstream.set_json("/acme", "2");
    act(&mut writer, json!({"type": "update", "id": 1}));
    assert_eq!(ws.next_of("snapshot")["data"], json!(2));
    assert_eq!(gets(&upstream, "/acme"), 2, "nobody watches it where the action was");

    // What has failed has changed nothing, and nobody is told.
    upstream.once("/update", Reply::json("{}").with_status(500));
    upstream.set_json("/acme", "3");
    writer.send(json!({"type": "update", "id": 2}));
    assert_eq!(writer.next()["code"], "ACTION_FAILED");
    assert!(ws.is_quiet_for(Duration::from_millis(300)));
}

#[test]
fn a_storm_of_actions_is_a_few_polls_a_second_at_the_other_processes_and_ends_with_the_last_change() {
    let (redis, upstream) = (Redis::start(), Upstream::start());
    upstream.set_json("/one", "0");
    upstream.set("/update", Reply::json("{}"));
    let setup = Setup::new()
        .limits("messages_per_second = 0")
        .redis(&redis.url(), "")
        .stream("one", &upstream.url("/one"), "interval = \"1h\"")
        .action("update", &upstream.url("/update"), "refresh = [\"one\"]");
    let (here, there) = (setup.start(), setup.start());
    redis.wait_for_subscribers("restcast:processes", 2);
    let mut ws = watching(&there, &token("w", "acme"), "/v1/streams/one");
    let mut writer = writer(&here, "acme");
    let (before, begun) = (gets(&upstream, "/one"), Instant::now());
    for n in 1..=300 {
        upstream.set_json("/one", &n.to_string());
        act(&mut writer, json!({"type": "update", "id": n}));
    }
    let mut last = Value::Null;
    eventually("the last change is seen", || {
        last = ws.next_of("snapshot")["data"].clone();
        (last == json!(300)).then_some(())
    });
    // Polls are at least 100 ms apart there, and nobody watches here.
    let polls = gets(&upstream, "/one") - before;
    let most = begun.elapsed().as_millis() as usize / 100 + 2;
    assert!((1..=most).contains(&polls), "{polls} polls in {:?}", begun.elapsed());
}

#[test]
fn what_stands_in_redis_says_nothing_of_the_caller() {
    let (redis, upstream) = (Redis::start(), Upstream::start());
    upstream.set_json("/hush-company", "1");
    upstream.set("/update", Reply::json("{}"));
    let setup = Setup::new()
        .redis(&redis.url(), "")
        .stream("one", &upstream.url("/{claims.companyId}?key=hunter2"), "interval = \"1h\"")
        .action("update", &upstream.url("/update"), "refresh = [\"one\"]");
    let server = setup.start();
    redis.wait_for_subscribers("restcast:processes", 1);
    let mut listener = redis.client();
    listener.command(&["SUBSCRIBE", "restcast:processes"]).expect("an answer");
    let mut writer = writer(&server, "hush-company");
    act(&mut writer, json!({"type": "update", "id": 1}));
    let until = Instant::now() + PATIENCE;
    loop {
        let said = format!("{:?}", listener.reply().expect("a message"));
        assert!(!said.contains("hush-company") && !said.contains("hunter2") && !said.contains("writer"), "{said}");
        if said.contains("refresh") {
            break;
        }
        assert!(Instant::now() < until, "nothing was told");
    }
}
