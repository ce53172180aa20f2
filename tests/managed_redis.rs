//! Streams that administrators make, shared through Redis: made, changed, stopped and deleted at different processes; Redis
//! away, emptied, or new; against the built server and a real Redis.

mod support;

use std::thread;
use std::time::Duration;

use ring::hmac;
use serde_json::{Value, json};

use support::server::{
    Answer, Server, Setup, away, bearer, eventually, now_s, streams, streams_with, token_of, watching,
};
use support::{Folder, Proxy, Redis, Reply, Upstream};

/// The hash that the streams stand in.
const HASH: &str = "restcast:streams";

fn wanted(id: &str, url: &str) -> Value {
    json!({ "id": id, "url": url, "interval": "20ms" })
}

fn status(server: &Server, id: &str) -> u16 {
    server.get(&format!("/v1/streams/{id}"), &[bearer(&token_of("u1"))]).status
}

fn upstream() -> Upstream {
    let upstream = Upstream::start();
    upstream.set_json("/a", r#"{"of":"a"}"#);
    upstream.set_json("/b", r#"{"of":"b"}"#);
    upstream
}

#[test]
fn what_one_process_makes_changes_stops_and_deletes_holds_at_the_other() {
    let (redis, upstream) = (Redis::start(), upstream());
    let setup = Setup::new().redis(&redis.url(), "").stream("file", &upstream.url("/a"), "");
    let (one, two) = (setup.start(), setup.start());
    let made = streams(&one, "POST", "", &wanted("leads", &upstream.url("/a")));
    assert_eq!(made.status, 201, "{made:?}");
    let tag = made.header("etag").expect("a tag").to_owned();
    eventually("the other has it", || (status(&two, "leads") == 200).then_some(()));
    let shown = |server: &Server| streams(server, "GET", "/leads", &Value::Null).json();
    assert_eq!(shown(&two), shown(&one));
    assert_eq!(streams(&two, "POST", "", &wanted("leads", &upstream.url("/b"))).status, 409);
    let mut watchers = [&one, &two].map(|server| watching(server, &token_of("u1"), "/v1/streams/leads"));

    // Changed at the other, by the tag that this one gave.
    let body = wanted("leads", &upstream.url("/b"));
    let changed = streams_with(&two, "PUT", "/leads", &[("If-Match", tag.clone())], &body);
    assert_eq!(changed.status, 200, "{changed:?}");
    for ws in &mut watchers {
        assert_eq!(ws.next_of("snapshot")["data"], json!({ "of": "b" }));
    }
    let late = streams_with(&one, "PUT", "/leads", &[("If-Match", tag)], &wanted("leads", &upstream.url("/a")));
    assert_eq!(late.status, 412, "{late:?}");

    // Stopped here, started there; the file's stream too.
    for id in ["leads", "file"] {
        assert_eq!(streams(&one, "POST", &format!("/{id}/stop"), &Value::Null).status, 200);
        let state = |server: &Server| streams(server, "GET", &format!("/{id}"), &Value::Null).json()["state"].clone();
        eventually("it is stopped at the other", || (state(&two) == "stopped").then_some(()));
        if id == "leads" {
            for ws in &mut watchers {
                assert_eq!(ws.next_of("stream_status")["code"], "STOPPED");
            }
        }
        assert_eq!(streams(&two, "POST", &format!("/{id}/start"), &Value::Null).status, 200);
        eventually("it runs again at the first", || (state(&one) == "running").then_some(()));
    }

    // One that starts later has it all; deleted at one, it is gone at each.
    let three = setup.start();
    let mut third = watching(&three, &token_of("u1"), "/v1/streams/leads");
    assert_eq!(streams(&three, "DELETE", "/leads", &Value::Null).status, 204);
    for ws in watchers.iter_mut().chain([&mut third]) {
        assert_eq!(ws.closed(), (4004, "stream_ended".to_owned()));
    }
    for server in [&one, &two, &three] {
        assert_eq!(status(server, "leads"), 404);
    }
    assert_eq!(redis.number(&["HEXISTS", HASH, "leads"]), 0);
}

#[test]
fn a_change_at_one_process_closes_nobody_at_either_where_all_places_are_taken() {
    let (redis, upstream) = (Redis::start(), upstream());
    let setup = Setup::new().redis(&redis.url(), "").limits("streams_per_subject = 2\nstreams = 2");
    let (one, two) = (setup.start(), setup.start());
    let body = |interval: &str| {
        let url = upstream.url("/a?r={query.r}");
        json!({ "id": "leads", "url": url, "params": ["r"], "interval": interval, "linger": "0s" })
    };
    upstream.judge_all(|_| Reply::json("1"));
    let made = streams(&one, "POST", "", &body("200ms"));
    assert_eq!(made.status, 201, "{made:?}");
    eventually("the other has it", || (status(&two, "leads?r=0") == 200).then_some(()));
    let token = token_of("u1");
    let mut watchers: Vec<_> = [&one, &two, &one, &two, &one, &two]
        .iter()
        .flat_map(|server| ["leads?r=0", "leads?r=1"].map(|name| (server, name)))
        .map(|(server, name)| watching(server, &token, &format!("/v1/streams/{name}")))
        .collect();
    for no in 0..6 {
        let at = [&one, &two][no % 2];
        assert_eq!(streams(at, "PUT", "/leads", &body(["300ms", "200ms"][no % 2])).status, 200);
        for ws in &mut watchers {
            ws.next_of("snapshot");
        }
    }
    for server in [&one, &two] {
        let answer = server.get("/v1/streams/leads?r=2", &[bearer(&token)]);
        assert_eq!((answer.status, answer.code()), (429, "TOO_MANY_STREAMS".to_owned()));
    }
}

#[test]
fn a_refresh_at_one_process_polls_at_each_once() {
    let (redis, upstream) = (Redis::start(), upstream());
    let setup = Setup::new().redis(&redis.url(), "").stream("slow", &upstream.url("/a"), "interval = \"1h\"");
    let (one, two) = (setup.start(), setup.start());
    let mut watchers = [&one, &two].map(|server| watching(server, &token_of("u1"), "/v1/streams/slow"));
    let before = upstream.request_count();
    upstream.set_json("/a", r#"{"of":"everybody"}"#);
    assert_eq!(streams(&one, "POST", "/slow/refresh", &Value::Null).status, 202);
    for ws in &mut watchers {
        assert_eq!(ws.next_of("snapshot")["data"], json!({ "of": "everybody" }));
        assert!(ws.is_quiet_for(Duration::from_millis(300)));
    }
    assert_eq!(upstream.request_count(), before + 2, "one poll for each process");
}

/// A hook's signature.
fn signature(secret: &str, t: u64, body: &str) -> String {
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
    let tag = hmac::sign(&key, format!("{t}.{body}").as_bytes());
    let hex: String = tag.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("t={t},v1={hex}")
}

fn hook(server: &Server, signature: &str, body: &str) -> u16 {
    let headers = [("X-Restcast-Signature", signature.to_owned())];
    server.request("POST", "/v1/hooks/slow", &headers, body).status
}

#[test]
fn a_hook_that_reaches_one_process_polls_at_each_once() {
    const SECRET: &str = "a secret that the upstream shares with us";
    let (redis, upstream) = (Redis::start(), upstream());
    let setup = Setup::new().redis(&redis.url(), "");
    let with = |secret: &str| {
        setup.clone().stream("slow", &upstream.url("/a"), &format!("interval = \"1h\"\nhook_secret = {secret}"))
    };
    // While secrets rotate, one process has heard of the new one and the other has not.
    let one = with(&format!("[\"the new secret of the hooks\", {SECRET:?}]")).start();
    let two = with(&format!("{SECRET:?}")).start();
    // This one knows another secret: it has no such hook.
    let three = with("\"quite another secret of the hooks\"").start();
    let mut watchers = [&one, &two].map(|server| watching(server, &token_of("u1"), "/v1/streams/slow"));
    let mut apart = watching(&three, &token_of("u1"), "/v1/streams/slow");
    for (n, server) in [&one, &two, &one].into_iter().enumerate() {
        let before = upstream.request_count();
        upstream.set_json("/a", &format!("{{\"of\":{n}}}"));
        let body = n.to_string();
        assert_eq!(hook(server, &signature(SECRET, now_s(), &body), &body), 202);
        for ws in &mut watchers {
            assert_eq!(ws.next_of("snapshot")["data"], json!({ "of": n }));
            assert!(ws.is_quiet_for(Duration::from_millis(300)));
        }
        assert_eq!(upstream.request_count(), before + 2, "one poll for each process that has such a hook");
    }
    assert!(apart.is_quiet_for(Duration::from_millis(100)));

    // What stands in Redis says nothing of the hook, and whoever may publish there cannot make one up.
    let before = upstream.request_count();
    let forged = json!({ "from": "0123456789abcdef", "hook": { "id": "slow", "sealed": "AAAA".repeat(15) } });
    redis.command(&["PUBLISH", "restcast:processes", &forged.to_string()]);
    assert!(watchers[0].is_quiet_for(Duration::from_millis(300)));
    assert_eq!(upstream.request_count(), before);
}

#[test]
fn a_stream_in_redis_that_may_not_be_polled_is_told_of_and_blocked() {
    let (redis, upstream) = (Redis::start(), upstream());
    let setup = Setup::new().redis(&redis.url(), "");
    let one = setup.start();
    // Another process's operator allows more than this one's.
    let two = setup.clone().admin("stream_urls = [\"https://api.example.com/*\"]").start();
    assert_eq!(streams(&one, "POST", "", &wanted("leads", &upstream.url("/a"))).status, 201);
    let said = two.wait_for_log("A stream that the admin API has made is not polled: it is blocked.", 1);
    assert!(said.contains("stream=leads") && said.contains("not_listed"), "{said}");
    assert_eq!(status(&one, "leads"), 200);
    let mut ws = two.ws("/v1/streams/leads", &[bearer(&token_of("u1"))]);
    let status = ws.next_of("stream_status");
    assert_eq!(status["code"], "UPSTREAM_BLOCKED", "{status}");
}

#[test]
fn two_processes_that_change_a_stream_at_the_same_time_do_not_lose_a_change() {
    let (redis, upstream) = (Redis::start(), upstream());
    let setup = Setup::new().redis(&redis.url(), "");
    let servers = [setup.start(), setup.start()];
    let made = streams(&servers[0], "POST", "", &wanted("leads", &upstream.url("/a")));
    eventually("the other has it", || (status(&servers[1], "leads") == 200).then_some(()));
    let mut tag = made.header("etag").expect("a tag").to_owned();
    for round in 0..10 {
        let answers: Vec<Answer> = thread::scope(|scope| {
            let asked: Vec<_> = servers
                .iter()
                .enumerate()
                .map(|(n, server)| {
                    let mut body = wanted("leads", &upstream.url("/a"));
                    body["roles"] = json!([]);
                    body["array_key"] = json!(format!("{round}-{n}"));
                    let known = [("If-Match", tag.clone())];
                    scope.spawn(move || streams_with(server, "PUT", "/leads", &known, &body))
                })
                .collect();
            asked.into_iter().map(|one| one.join().expect("an answer")).collect()
        });
        let statuses: Vec<u16> = answers.iter().map(|answer| answer.status).collect();
        let won = answers.iter().find(|answer| answer.status == 200).unwrap_or_else(|| panic!("{answers:?}"));
        assert_eq!(statuses.iter().filter(|status| **status == 200).count(), 1, "{statuses:?}");
        assert!(statuses.contains(&412), "{statuses:?}");
        tag = won.header("etag").expect("a tag").to_owned();
        for server in &servers {
            eventually("both know who has won", || {
                (streams(server, "GET", "/leads", &Value::Null).header("etag") == Some(tag.as_str())).then_some(())
            });
        }
    }
}

#[test]
fn who_says_nothing_of_what_stands_there_is_not_told_that_it_has_changed() {
    let (redis, upstream) = (Redis::start(), upstream());
    let setup = Setup::new().redis(&redis.url(), "");
    let servers = [setup.start(), setup.start()];
    let body = |of: &str| {
        let mut body = wanted("leads", &upstream.url("/a"));
        body["array_key"] = of.into();
        body
    };
    assert_eq!(streams(&servers[0], "POST", "", &body("first")).status, 201);
    // All at one process, and half of them at each.
    for servers in [[&servers[0], &servers[0]], [&servers[0], &servers[1]]] {
        let answers: Vec<Answer> = thread::scope(|scope| {
            let body = &body;
            let all: Vec<_> = (0..6)
                .map(|n: usize| {
                    let put = move |m| streams(servers[n % 2], "PUT", "/leads", &body(&format!("{n}-{m}")));
                    scope.spawn(move || (0..5).map(put).collect::<Vec<_>>())
                })
                .collect();
            all.into_iter().flat_map(|one| one.join().expect("answers")).collect()
        });
        let statuses: Vec<u16> = answers.iter().map(|answer| answer.status).collect();
        assert_eq!(statuses, [200; 30], "the last writer wins");
        // One of them is what stands there, and both say so.
        let last = streams(servers[1], "GET", "/leads", &Value::Null);
        assert!(answers.iter().any(|answer| answer.header("etag") == last.header("etag")), "{last:?}");
        assert_eq!(streams(servers[0], "GET", "/leads", &Value::Null).header("etag"), last.header("etag"));
    }
    // And one is deleted whoever changes it meanwhile.
    let (deleted, put) = thread::scope(|scope| {
        let body = &body;
        let (one, two) = (&servers[0], &servers[1]);
        let put = scope.spawn(move || {
            (0..20).map(|n| streams(two, "PUT", "/leads", &body(&n.to_string())).status).collect::<Vec<_>>()
        });
        let deleted = streams(one, "DELETE", "/leads", &Value::Null).status;
        (deleted, put.join().expect("statuses"))
    });
    assert_eq!(deleted, 204);
    assert!(put.iter().all(|status| matches!(status, 200 | 404)) && put.last() == Some(&404), "{put:?}");
}

#[test]
fn what_was_just_done_at_one_process_is_known_to_the_one_asked_next() {
    let (redis, upstream) = (Redis::start(), upstream());
    let setup = Setup::new().redis(&redis.url(), "").stream("file", &upstream.url("/a"), "");
    let (one, two) = (setup.start(), setup.start());
    let tag = |answer: &Answer| [("If-Match", answer.header("etag").expect("a tag").to_owned())];
    let nothing = &Value::Null;
    for round in 0..40 {
        let id = format!("s{}", round % 3);
        let (path, body) = (format!("/{id}"), wanted(&id, &upstream.url("/a")));
        let made = streams(&one, "POST", "", &body);
        assert_eq!(made.status, 201, "round {round}: {made:?}");
        let read = streams(&two, "GET", &path, nothing);
        assert_eq!((read.status, read.header("etag")), (200, made.header("etag")), "round {round}: {read:?}");
        let changed = streams_with(&two, "PUT", &path, &tag(&made), &body);
        assert_eq!(changed.status, 200, "round {round}: {changed:?}");
        let again = streams_with(&one, "PUT", &path, &tag(&changed), &body);
        assert_eq!(again.status, 200, "round {round}: {again:?}");
        let old = streams_with(&two, "PUT", &path, &tag(&changed), &body);
        assert_eq!(old.status, 412, "round {round}: {old:?}");
        for id in [id.as_str(), "file"] {
            for (server, what, state) in [
                (&two, "stop", "stopped"),
                (&one, "start", "running"),
                (&two, "stop", "stopped"),
                (&one, "start", "running"),
            ] {
                let answer = streams(server, "POST", &format!("/{id}/{what}"), nothing);
                assert_eq!((answer.status, &answer.json()["state"]), (200, &json!(state)), "round {round}: {answer:?}");
            }
        }
        assert_eq!(streams(&two, "POST", &format!("{path}/refresh"), nothing).status, 202, "round {round}");
        assert_eq!(streams(&two, "DELETE", &path, nothing).status, 204, "round {round}");
        assert_eq!(streams(&one, "GET", &path, nothing).status, 404, "round {round}");
        assert_eq!(streams(&one, "DELETE", &path, nothing).status, 404, "round {round}");
    }
    eventually("all of them are gone", || {
        let gone = |server: &Server| (0..3).all(|n| status(server, &format!("s{n}")) == 404);
        (gone(&one) && gone(&two)).then_some(())
    });
}

#[test]
fn a_redis_that_was_emptied_takes_no_stream_away_from_who_is_asked_for_one() {
    let (redis, upstream) = (Redis::start(), upstream());
    let server = Setup::new().redis(&redis.url(), "").start();
    assert_eq!(streams(&server, "POST", "", &wanted("leads", &upstream.url("/a"))).status, 201);
    redis.command(&["FLUSHALL"]);
    for _ in 0..5 {
        assert_eq!(streams(&server, "GET", "/leads", &Value::Null).status, 200);
    }
    eventually("it is there again", || (redis.number(&["HEXISTS", HASH, "leads"]) == 1).then_some(()));
    assert_eq!((status(&server, "leads"), streams(&server, "DELETE", "/leads", &Value::Null).status), (200, 204));
}

#[test]
fn while_redis_is_away_nothing_is_changed_and_a_start_knows_the_copy() {
    let (redis, upstream, folder) = (Redis::start(), upstream(), Folder::new("streams-away"));
    let proxy = Proxy::to(redis.address());
    let setup = Setup::new()
        .server(&folder.state_line())
        .redis(&format!("redis://{}/", proxy.address()), "timeout = \"500ms\"")
        .stream("file", &upstream.url("/a"), "");
    let server = setup.start();
    assert_eq!(streams(&server, "POST", "", &wanted("leads", &upstream.url("/a"))).status, 201);
    assert_eq!(streams(&server, "POST", "/leads/stop", &Value::Null).status, 200);
    assert_eq!(streams(&server, "POST", "/leads/start", &Value::Null).status, 200);
    proxy.down();
    let known = streams(&server, "GET", "/leads", &Value::Null);
    assert_eq!((known.status, &known.json()["state"]), (200, &json!("running")), "by what is known here");
    away(&server);
    let refused = [
        streams(&server, "POST", "", &wanted("more", &upstream.url("/a"))),
        streams(&server, "PUT", "/leads", &wanted("leads", &upstream.url("/b"))),
        streams(&server, "DELETE", "/leads", &Value::Null),
        streams(&server, "POST", "/file/stop", &Value::Null),
    ];
    for answer in refused {
        assert_eq!((answer.status, answer.code()), (503, "SESSION_STORE_UNAVAILABLE".to_owned()), "{answer:?}");
    }
    assert_eq!((status(&server, "leads"), status(&server, "more")), (200, 404));
    drop(server);
    let server = setup.start();
    assert_eq!((status(&server, "leads"), status(&server, "file")), (200, 200));
}

#[test]
fn streams_from_before_there_was_redis_are_carried_over_and_an_emptied_redis_gets_them_back() {
    let (redis, upstream, folder) = (Redis::start(), upstream(), Folder::new("streams-carried"));
    let alone = Setup::new().server(&folder.state_line());
    let server = alone.start();
    assert_eq!(streams(&server, "POST", "", &wanted("leads", &upstream.url("/a"))).status, 201);
    assert_eq!(streams(&server, "POST", "", &wanted("other", &upstream.url("/a"))).status, 201);
    assert_eq!(streams(&server, "POST", "/other/stop", &Value::Null).status, 200);
    drop(server);

    let with_redis = alone.clone().redis(&redis.url(), "");
    let server = with_redis.start();
    eventually("they are in Redis", || (redis.number(&["HEXISTS", HASH, "leads"]) == 1).then_some(()));
    let second = Setup::new().redis(&redis.url(), "").start();
    eventually("the other has them", || (status(&second, "leads") == 200).then_some(()));
    eventually("and what is stopped", || {
        (streams(&second, "GET", "/other", &Value::Null).json()["state"] == "stopped").then_some(())
    });

    // What is deleted while it does not run does not come back with its copy.
    drop(server);
    assert_eq!(streams(&second, "DELETE", "/other", &Value::Null).status, 204);
    let server = with_redis.start();
    eventually("it knows of the deletion", || (status(&server, "other") == 404).then_some(()));
    assert_eq!(redis.number(&["HEXISTS", HASH, "other"]), 0);

    drop(second);
    drop(server);
    redis.command(&["FLUSHALL"]);
    let server = with_redis.start();
    eventually("it is there again", || (redis.number(&["HEXISTS", HASH, "leads"]) == 1).then_some(()));
    assert_eq!(status(&server, "leads"), 200);
}

#[test]
fn a_stream_that_was_deleted_while_its_maker_was_down_does_not_come_back_with_the_makers_copy() {
    let (redis, upstream, folder) = (Redis::start(), upstream(), Folder::new("streams-deleted"));
    let setup = Setup::new().server(&folder.state_line()).redis(&redis.url(), "");
    let (maker, other) = (setup.start(), Setup::new().redis(&redis.url(), "").start());
    assert_eq!(streams(&maker, "POST", "", &wanted("leads", &upstream.url("/a"))).status, 201);
    maker.signal(rustix::process::Signal::KILL);
    drop(maker);
    eventually("the other has it", || (status(&other, "leads") == 200).then_some(()));
    assert_eq!(streams(&other, "DELETE", "/leads", &Value::Null).status, 204);
    let maker = setup.start();
    eventually("it is gone", || (status(&maker, "leads") == 404).then_some(()));
    assert_eq!((redis.number(&["HEXISTS", HASH, "leads"]), status(&other, "leads")), (0, 404));
}

#[test]
fn a_process_without_the_secret_of_a_stream_in_redis_starts_and_says_so_and_one_that_knew_it_goes_on() {
    let (redis, upstream, folder) = (Redis::start(), upstream(), Folder::new("streams-lacking"));
    let setup = Setup::new().redis(&redis.url(), "");
    let one = setup.clone().env("LEADS_KEY", "secret-of-the-variable").start();
    let with_key = |of: &str| {
        let mut body = wanted("leads", &upstream.url(&format!("/{of}")));
        body["headers"] = json!({ "X-Key": "env:LEADS_KEY" });
        body
    };
    assert_eq!(streams(&one, "POST", "", &with_key("a")).status, 201);
    let two = setup.clone().server(&folder.state_line()).start();
    let mut ws = two.ws("/v1/streams/leads", &[bearer(&token_of("u1"))]);
    let lacking = |ws: &mut support::server::Ws| {
        let status = ws.next_of("stream_status");
        assert_eq!((&status["state"], &status["code"]), (&json!("failing"), &json!("UPSTREAM_AUTH")), "{status}");
    };
    lacking(&mut ws);
    assert_eq!(two.log_count("what it names is not there"), 1, "{}", two.log_text());
    let state = |server: &Server| streams(server, "GET", "/leads", &Value::Null).json()["state"].clone();
    assert_eq!((state(&one), state(&two)), (json!("running"), json!("failing")));
    // Its copy is as good as the record, for a start without Redis.
    drop((ws, two));
    let two = Setup::new().server(&folder.state_line()).start();
    lacking(&mut two.ws("/v1/streams/leads", &[bearer(&token_of("u1"))]));
    drop(two);

    // Changed at the one that has it, to what the other can poll; and back.
    let two = setup.start();
    assert_eq!(streams(&one, "PUT", "/leads", &wanted("leads", &upstream.url("/a"))).status, 200);
    eventually("it is polled", || (status(&two, "leads") == 200).then_some(()));
    let mut ws = watching(&two, &token_of("u1"), "/v1/streams/leads");
    assert_eq!(streams(&one, "PUT", "/leads", &with_key("b")).status, 200);
    let said = two.wait_for_log("A stream in Redis cannot be taken here: it stays what it was before", 1);
    assert!(said.contains("stream=leads"), "{said}");
    upstream.set_json("/a", r#"{"of":"a2"}"#);
    assert_eq!(ws.next()["seq"], json!(2), "it goes on with what it was");
}

#[test]
fn a_record_that_cannot_be_read_is_told_of_and_changes_nothing() {
    let (redis, upstream) = (Redis::start(), upstream());
    let server = Setup::new().redis(&redis.url(), "").start();
    assert_eq!(streams(&server, "POST", "", &wanted("leads", &upstream.url("/a"))).status, 201);
    redis.command(&["HSET", HASH, "bad", "nonsense"]);
    redis.command(&["XADD", "restcast:control", "*", "event", "streams-changed", "data", r#"{"id":"bad"}"#]);
    let said = server.wait_for_log("A stream in Redis cannot be taken here", 1);
    assert!(said.contains("stream=bad"), "{said}");
    redis.command(&["HSET", HASH, "leads", "nonsense"]);
    redis.command(&["XADD", "restcast:control", "*", "event", "streams-changed", "data", r#"{"id":"leads"}"#]);
    server.wait_for_log("A stream in Redis cannot be taken here", 2);
    assert_eq!((status(&server, "leads"), status(&server, "bad")), (200, 404));
}
