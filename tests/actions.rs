//! Actions against the built server: what an upstream is asked, what its answers and failures become, who may act, how
//! often, and that a change is seen by its writer and by everyone who watches.
#![cfg(feature = "runtime")]

mod support;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use support::server::{DRIVERS, Heard, PATIENCE, Server, Setup, Ws, bearer, eventually, mint, now_s};
use support::{Reply, RequestSeen, Step, Upstream};

/// A token of `sub` with these claims besides.
fn token(sub: &str, claims: Value) -> String {
    let mut all = json!({ "sub": sub, "exp": now_s() + 600 });
    for (name, value) in claims.as_object().expect("claims") {
        all[name] = value.clone();
    }
    mint(all)
}

fn agent() -> Value {
    json!({ "role": "agent", "permissions": ["leads.write"], "companyId": "acme" })
}

/// A welcomed WebSocket of `sub`.
fn open(server: &Server, path: &str, sub: &str, claims: Value) -> Ws {
    let mut ws = server.ws(path, &[bearer(&token(sub, claims))]);
    assert_eq!(ws.next()["type"], "welcome");
    ws
}

/// What the message is answered: the next frame with its id.
fn ask(ws: &mut Ws, message: Value) -> Value {
    let id = message["id"].clone();
    ws.send(message);
    loop {
        let frame = ws.next();
        if frame["id"] == id {
            return frame;
        }
    }
}

fn requests_to(upstream: &Upstream, method: &str) -> Vec<RequestSeen> {
    upstream.requests().into_iter().filter(|request| request.method == method).collect()
}

const UPDATE: &str = r#"
method = "PUT"
roles = ["agent"]
permissions = ["leads.write"]
headers = { "X-Api-Key" = "hunter2-header" }
body = '{"by":{claims.sub},"company":{claims.companyId},"property":{message.property}}'
"#;

fn update_setup(upstream: &Upstream) -> Setup {
    Setup::new().action(
        "property_update",
        &upstream.url("/companies/{claims.companyId}/properties/{message.property.id}?note={message.note}&key=hunter2"),
        UPDATE,
    )
}

fn update(property: &str, id: Value) -> Value {
    let property: Value = serde_json::from_str(property).expect("JSON");
    json!({ "type": "property_update", "property": property, "note": "a b", "id": id })
}

#[test]
fn a_message_becomes_a_call_and_its_answer_comes_back_by_id() {
    let upstream = Upstream::start();
    upstream
        .set("/companies/acme/properties/p%2F1", Reply::json("{ \"n\" : 1.50E+2,\n\"ok\": true }").with_status(201));
    for driver in DRIVERS {
        let server =
            update_setup(&upstream).stream("open", &upstream.url("/open"), "roles = []").driver(driver).start();
        upstream.set_json("/open", "[1]");
        for path in ["/v1/ws", "/v1/streams/open"] {
            let mut ws = open(&server, path, "u\"1", agent());
            // As text, so that the number keeps its spelling.
            ws.send_message(tungstenite::Message::text(
                r#"{"type":"property_update","property":{ "id": "p/1", "price": 1E5 },"note":"a b","id":"x"}"#,
            ));
            let told = loop {
                match ws.heard() {
                    Heard::Frame(frame) if frame["type"] == "action_result" => break frame,
                    Heard::Frame(frame) => assert_eq!(frame["type"], "snapshot", "{frame}"),
                    other => assert_eq!(other, Heard::Ping),
                }
            };
            assert_eq!(told, json!({"type":"action_result","id":"x","status":201,"body":{"n":150.0,"ok":true}}));
        }
    }
    let asked = requests_to(&upstream, "PUT");
    assert_eq!(asked.len(), 2 * DRIVERS.len());
    for request in asked {
        assert_eq!(request.target, "/companies/acme/properties/p%2F1?note=a%20b&key=hunter2");
        assert_eq!(
            String::from_utf8(request.body.clone()).expect("UTF-8"),
            r#"{"by":"u\"1","company":"acme","property":{ "id": "p/1", "price": 1E5 }}"#
        );
        assert_eq!(request.header("content-type"), Some("application/json"));
        assert_eq!(request.header("x-api-key"), Some("hunter2-header"));
    }
}

#[test]
fn the_body_of_an_answer_keeps_its_spelling_and_what_is_no_json_is_left_out() {
    let upstream = Upstream::start();
    let server = Setup::new()
        .action("act", &upstream.url("/act"), "")
        .action("quiet", &upstream.url("/act"), "reply_body = false")
        .start();
    let mut raw = server.connect().ws("/v1/ws", &[bearer(&token("u1", json!({})))]);
    assert_eq!(raw.next()["type"], "welcome");
    for (reply, status, body) in [
        (Reply::json("[]"), 200, Some("[]")),
        (Reply::status(204), 204, None),
        (Reply::body("text/plain", "hello"), 200, None),
        (Reply::json("{\"a\":1,\"a\":2}"), 200, None),
        (Reply::json("null"), 200, Some("null")),
        (Reply::json(format!("\"{}\"", "x".repeat(100_000))), 202, None),
        // Looked at by the workers, which must not change what comes of it.
        (Reply::json(format!("\"{}\"", "x".repeat(900_000))), 203, None),
        (Reply::json("[".repeat(900_000)), 200, None),
    ] {
        upstream.set("/act", reply.with_status(status));
        let told = ask(&mut raw, json!({"type": "act", "id": 1}));
        assert_eq!((&told["type"], &told["status"]), (&json!("action_result"), &json!(status)));
        match (status, body) {
            (202, _) => assert_eq!(told["body"].as_str().map(str::len), Some(100_000)),
            (203, _) => assert_eq!(told["body"].as_str().map(str::len), Some(900_000)),
            (_, Some(body)) => assert_eq!(told["body"].to_string(), body),
            _ => assert_eq!(told.get("body"), None, "{told}"),
        }
        let quiet = ask(&mut raw, json!({"type": "quiet", "id": 2}));
        assert_eq!(quiet, json!({"type": "action_result", "id": 2, "status": status}));
    }
}

#[test]
fn the_grant_of_the_moment_decides_between_two_actions() {
    let upstream = Upstream::start();
    upstream.set("/companies/acme/properties/1", Reply::json("1"));
    let server = update_setup(&upstream).start();
    let mut ws = open(&server, "/v1/ws", "u1", json!({ "role": "agent", "companyId": "acme" }));
    let mut expected = json!({"type":"error","code":"INSUFFICIENT_PERMISSIONS","error":"Permission denied","id":1});
    assert_eq!(ask(&mut ws, update(r#"{"id":1}"#, json!(1))), expected);
    let auth = |claims: Value| json!({"type": "auth_update", "token": token("u1", claims), "id": "a"});
    assert_eq!(ask(&mut ws, auth(agent()))["type"], "auth_ok");
    assert_eq!(ask(&mut ws, update(r#"{"id":1}"#, json!(2)))["type"], "action_result");
    // Another role, and the right is gone with the next message.
    assert_eq!(
        ask(&mut ws, auth(json!({"role": "viewer", "permissions": ["leads.write"], "companyId": "acme"})))["type"],
        "auth_ok"
    );
    expected["id"] = json!(3);
    assert_eq!(ask(&mut ws, update(r#"{"id":1}"#, json!(3))), expected);
    // A claim that the template needs is looked for in the grant of the moment too.
    assert_eq!(ask(&mut ws, auth(json!({"role": "agent", "permissions": ["leads.write"]})))["type"], "auth_ok");
    assert_eq!(ask(&mut ws, update(r#"{"id":1}"#, json!(4)))["code"], "CLAIM_MISSING");
    assert_eq!(
        ask(&mut ws, auth(json!({"role": "agent", "permissions": ["leads.write"], "companyId": ".."})))["type"],
        "auth_ok"
    );
    assert_eq!(ask(&mut ws, update(r#"{"id":1}"#, json!(5)))["code"], "CLAIM_INVALID");
    assert_eq!(requests_to(&upstream, "PUT").len(), 1);
    for (result, count) in
        [("ok", 1.0), ("INSUFFICIENT_PERMISSIONS", 2.0), ("CLAIM_MISSING", 1.0), ("CLAIM_INVALID", 1.0)]
    {
        assert_eq!(server.metric(&["restcast_actions_total", &format!("result=\"{result}\"")]), count, "{result}");
    }
}

#[test]
fn callers_without_a_credential_never_act_and_types_that_are_none_are_unknown() {
    let upstream = Upstream::start();
    upstream.set_json("/open", "[1]");
    let server = Setup::new()
        .stream("open", &upstream.url("/open"), "allow_anonymous = true")
        .action("poke", &upstream.url("/poke"), "")
        .start();
    let mut guest = server.ws("/v1/streams/open", &[]);
    assert_eq!(ask(&mut guest, json!({"type": "poke", "id": 1}))["code"], "MISSING_CREDENTIAL");
    let mut ada = open(&server, "/v1/ws", "u1", json!({}));
    assert_eq!(ask(&mut ada, json!({"type": "pok", "id": 1}))["code"], "UNKNOWN_TYPE");
    assert_eq!(ask(&mut ada, json!({"type": "Poke", "id": 2}))["code"], "UNKNOWN_TYPE");
    assert!(requests_to(&upstream, "POST").is_empty());
    // It is raised by its own `auth_update`, and may then.
    upstream.set("/poke", Reply::json("1"));
    assert_eq!(
        ask(&mut guest, json!({"type": "auth_update", "token": token("u1", json!({})), "id": 3}))["type"],
        "auth_ok"
    );
    assert_eq!(ask(&mut guest, json!({"type": "poke", "id": 4}))["type"], "action_result");
}

#[test]
fn a_message_that_does_not_fit_the_schema_or_the_url_asks_nobody() {
    let upstream = Upstream::start();
    upstream.set("/p/7", Reply::json("1"));
    let schema = r#"schema = '{"required":["id","property"],"properties":{"id":{"type":["integer","string"]},"property":{"type":"object","properties":{"price":{"type":"number","minimum":0}},"required":["price"]}},"additionalProperties":false}'"#;
    let lines = format!("method = \"PUT\"\nbody = \"{{message.property}}\"\n{schema}");
    let server = Setup::new().action("update", &upstream.url("/p/{message.id}"), &lines).start();
    let mut ws = open(&server, "/v1/ws", "u1", json!({}));
    let say =
        |ws: &mut Ws, id: Value, property: Value| ask(ws, json!({"type": "update", "id": id, "property": property}));
    for (property, said) in [
        (json!({}), "the message's /property does not fit this action: it must have \"price\""),
        (json!({"price": "hunter2"}), "the message's /property/price does not fit this action: it must be number"),
        (json!({"price": -1}), "the message's /property/price does not fit this action: it must be at least 0"),
        (json!("hunter2"), "the message's /property does not fit this action: it must be object"),
    ] {
        let told = say(&mut ws, json!(7), property);
        assert_eq!(told, json!({"type": "error", "code": "BAD_MESSAGE", "error": said, "id": 7}));
    }
    let unknown = ask(&mut ws, json!({"type": "update", "id": 7, "property": {"price": 1}, "more": 1}));
    assert_eq!(unknown["error"], "the message does not fit this action: it has a member that is not known");
    for id in [json!(".."), json!("."), json!(""), json!("a\u{0}b"), json!("a\r\nHost: x")] {
        let told = say(&mut ws, id.clone(), json!({"price": 1}));
        assert_eq!(told["code"], "BAD_MESSAGE", "{id}");
        assert!(!told["error"].as_str().expect("a text").contains("Host"), "{told}");
    }
    assert_eq!(upstream.request_count(), 0);
    assert_eq!(say(&mut ws, json!(7), json!({"price": 1}))["type"], "action_result");
    assert_eq!(requests_to(&upstream, "PUT")[0].body, br#"{"price":1}"#);
}

#[test]
fn what_climbs_in_a_message_stays_in_its_segment() {
    let upstream = Upstream::start();
    let server =
        Setup::new().action("act", &upstream.url("/a/{message.x}/b?q={message.y}"), "method = \"DELETE\"").start();
    let mut ws = open(&server, "/v1/ws", "u1", json!({}));
    for (value, encoded) in [
        ("../../admin", "..%2F..%2Fadmin"),
        ("x/../../y", "x%2F..%2F..%2Fy"),
        ("%2e%2e", "%252e%252e"),
        ("..\\", "..%5C"),
        ("?a=b&c#d", "%3Fa%3Db%26c%23d"),
        ("ü", "%C3%BC"),
        ("//h", "%2F%2Fh"),
    ] {
        let told = ask(&mut ws, json!({"type": "act", "x": value, "y": value, "id": 1}));
        assert_eq!((&told["code"], &told["status"]), (&json!("ACTION_FAILED"), &json!(404)), "nothing is there");
        let last = upstream.requests().pop().expect("a request");
        assert_eq!((last.method.as_str(), last.target), ("DELETE", format!("/a/{encoded}/b?q={encoded}")));
    }
}

#[test]
fn a_rate_holds_for_all_connections_of_a_subject_on_every_core() {
    let upstream = Upstream::start();
    upstream.set("/act", Reply::json("1"));
    let server = Setup::new()
        .cores(2)
        .action("act", &upstream.url("/act"), "rate = \"3/h\"")
        .action("free", &upstream.url("/act"), "")
        .start();
    let mut told = BTreeMap::new();
    for n in 0..8 {
        let mut ws = open(&server, "/v1/ws", "u1", json!({}));
        let answer = ask(&mut ws, json!({"type": "act", "id": n}));
        if answer["code"] == "RATE_LIMITED" {
            let wait = answer["retry_in_ms"].as_u64().expect("when");
            assert!((1..=20 * 60_000).contains(&wait), "{answer}");
        }
        *told.entry(answer["code"].as_str().unwrap_or("done").to_owned()).or_insert(0) += 1;
        assert_eq!(ask(&mut ws, json!({"type": "free", "id": "f"}))["type"], "action_result");
    }
    assert_eq!(told, BTreeMap::from([("RATE_LIMITED".into(), 5), ("done".into(), 3)]));
    let mut other = open(&server, "/v1/ws", "u2", json!({}));
    assert_eq!(ask(&mut other, json!({"type": "act", "id": 1}))["type"], "action_result");
}

#[test]
fn a_change_is_seen_by_its_writer_and_all_watchers_in_one_polls_time() {
    let upstream = Upstream::start();
    for driver in DRIVERS {
        upstream.set_json("/acme/leads", "[\"old\"]");
        upstream.set_json("/umbrella/leads", "[\"theirs\"]");
        upstream.set("/update", Reply::json("{}"));
        let server = Setup::new()
            .driver(driver)
            .cores(2)
            .stream("leads", &upstream.url("/{claims.companyId}/leads"), "interval = \"1h\"")
            .action("update", &upstream.url("/update"), "refresh = [\"leads\"]")
            .start();
        let polls = || requests_to(&upstream, "GET").len();
        let before = polls();
        let acme = || json!({ "companyId": "acme" });
        // Several, so that some are on each core.
        let mut watchers: Vec<Ws> =
            (0..6).map(|n| open(&server, "/v1/streams/leads", &format!("w{n}"), acme())).collect();
        let mut stranger = open(&server, "/v1/streams/leads", "s", json!({ "companyId": "umbrella" }));
        let mut writer = open(&server, "/v1/ws", "u1", acme());
        writer.send(json!({"type": "subscribe", "stream": "leads"}));
        for ws in watchers.iter_mut().chain([&mut writer]) {
            assert_eq!(ws.next_of("snapshot")["data"], json!(["old"]));
        }
        assert_eq!(stranger.next_of("snapshot")["data"], json!(["theirs"]));
        assert_eq!(polls() - before, 2);

        upstream.set_json("/acme/leads", "[\"new\"]");
        let begun = Instant::now();
        assert_eq!(ask(&mut writer, json!({"type": "update", "id": 1}))["type"], "action_result");
        for ws in watchers.iter_mut().chain([&mut writer]) {
            assert_eq!(ws.next_of("snapshot")["data"], json!(["new"]));
        }
        assert!(begun.elapsed() < PATIENCE, "not an hour later");
        assert_eq!(polls() - before, 3, "one poll, and the other company's stream is left alone");

        // A failure changes nothing, and polls nothing.
        upstream.once("/update", Reply::json("{}").with_status(500));
        upstream.set_json("/acme/leads", "[\"newer\"]");
        assert_eq!(ask(&mut writer, json!({"type": "update", "id": 2}))["code"], "ACTION_FAILED");
        assert!(writer.is_quiet_for(Duration::from_millis(200)));
        assert_eq!(polls() - before, 3);
    }
}

#[test]
fn failures_have_stable_codes_and_show_no_body() {
    let upstream = Upstream::start();
    let server = Setup::new()
        .action(
            "act",
            &upstream.url("/act?key=hunter2-url"),
            "headers = { A = \"hunter2-header\" }\nresponse_bytes_max = 1000",
        )
        .action("telling", &upstream.url("/act"), "error_body = true\nresponse_bytes_max = 1000")
        .action("nobody", "http://127.0.0.1:1/", "connect_timeout = \"2s\"")
        .action("nowhere", "http://host.invalid/", "")
        .start();
    let mut ws = open(&server, "/v1/ws", "u1", json!({}));
    let secret = |status| Reply::json("{\"error\":\"hunter2-body\"}").with_status(status);
    for (reply, reason, status) in [
        (secret(400), "UPSTREAM_STATUS", Some(400)),
        (secret(401), "UPSTREAM_AUTH", Some(401)),
        (secret(302).header("Location", "/hunter2"), "UPSTREAM_REDIRECT", Some(302)),
        (secret(429).header("Retry-After", "7"), "UPSTREAM_RATE_LIMITED", Some(429)),
        (secret(500), "UPSTREAM_STATUS", Some(500)),
        (Reply::json(format!("\"hunter2-body{}\"", "x".repeat(2_000))), "UPSTREAM_TOO_LARGE", None),
        (Reply::raw("hunter2-body is no HTTP\r\n\r\n"), "UPSTREAM_PROTOCOL", None),
        (Reply::steps(vec![Step::Close]), "UPSTREAM_PROTOCOL", None),
    ] {
        upstream.set("/act", reply);
        let told = ask(&mut ws, json!({"type": "act", "id": 1}));
        assert_eq!((&told["code"], &told["reason"]), (&json!("ACTION_FAILED"), &json!(reason)), "{told}");
        assert_eq!(told.get("status").and_then(Value::as_u64), status, "{told}");
        assert_eq!(told.get("retry_in_ms"), (status == Some(429)).then_some(&json!(7000)), "{told}");
        assert!(told.get("body").is_none() && !told.to_string().contains("hunter2"), "{told}");
    }
    upstream.set("/act", secret(422));
    let told = ask(&mut ws, json!({"type": "telling", "id": 2}));
    assert_eq!((&told["status"], &told["body"]), (&json!(422), &json!({"error": "hunter2-body"})));
    upstream.set("/act", Reply::body("text/html", "<p>hunter2-body").with_status(502));
    let told = ask(&mut ws, json!({"type": "telling", "id": 3}));
    assert_eq!((&told["status"], told.get("body")), (&json!(502), None));
    assert_eq!(ask(&mut ws, json!({"type": "nobody", "id": 4}))["reason"], "UPSTREAM_UNREACHABLE");
    assert_eq!(ask(&mut ws, json!({"type": "nowhere", "id": 5}))["reason"], "UPSTREAM_DNS");
    // The log knows why, once for each action, and nothing secret.
    let log = eventually("the log", || Some(server.log_text()).filter(|log| log.contains("nowhere")));
    assert!(!log.contains("hunter2"), "{log}");
    assert_eq!(log.matches("action=nobody").count() + log.matches("action=\"nobody\"").count(), 1, "{log}");
    assert!(!server.metrics().contains("hunter2"));
    assert_eq!(server.metric(&["restcast_actions_in_flight"]), 0.0);
}

#[test]
fn an_upstream_that_hangs_fails_in_time_and_holds_up_nobody() {
    let upstream = Upstream::start();
    upstream.set("/hang", Reply::steps(vec![Step::Stall]));
    upstream.set("/act", Reply::json("1"));
    let server = Setup::new()
        .action("hang", &upstream.url("/hang"), "first_byte_timeout = \"700ms\"")
        .action("act", &upstream.url("/act"), "")
        .start();
    let mut ws = open(&server, "/v1/ws", "u1", json!({}));
    let begun = Instant::now();
    ws.send(json!({"type": "hang", "id": "slow"}));
    assert_eq!(ask(&mut ws, json!({"type": "act", "id": "quick"}))["type"], "action_result");
    let told = loop {
        let frame = ws.next();
        if frame["id"] == "slow" {
            break frame;
        }
    };
    assert_eq!((&told["code"], &told["reason"]), (&json!("ACTION_FAILED"), &json!("UPSTREAM_TIMEOUT")));
    assert!(begun.elapsed() >= Duration::from_millis(700));
    // Never asked twice: it may have been done.
    assert_eq!(requests_to(&upstream, "POST").iter().filter(|request| request.target == "/hang").count(), 1);
    // One who goes meanwhile leaves nothing behind.
    ws.send(json!({"type": "hang", "id": 1}));
    eventually("it is under way", || (server.metric(&["restcast_actions_in_flight"]) == 1.0).then_some(()));
    drop(ws);
    eventually("it has ended", || (server.metric(&["restcast_actions_in_flight"]) == 0.0).then_some(()));
    let mut next = open(&server, "/v1/ws", "u1", json!({}));
    assert!(next.is_quiet_for(Duration::from_millis(200)));
}

#[test]
fn ten_actions_at_once_are_answered_by_their_ids() {
    let upstream = Upstream::start();
    for n in 0..10u64 {
        let reply = Reply::json(format!("{{\"n\":{n}}}")).delay(Duration::from_millis((10 - n) * 30));
        upstream.set(&format!("/act/{n}"), reply);
    }
    for driver in DRIVERS {
        let server = Setup::new().driver(driver).action("act", &upstream.url("/act/{message.n}"), "").start();
        let mut ws = open(&server, "/v1/ws", "u1", json!({}));
        for n in 0..10 {
            ws.send(json!({"type": "act", "n": n, "id": format!("id-{n}")}));
        }
        let mut answered = BTreeMap::new();
        for _ in 0..10 {
            let told = ws.next();
            let id = told["id"].as_str().expect("an id").to_owned();
            assert_eq!(answered.insert(id, told["body"]["n"].clone()), None, "once each");
        }
        let all: BTreeMap<_, _> = (0..10).map(|n| (format!("id-{n}"), json!(n))).collect();
        assert_eq!(answered, all);
        assert!(ws.is_quiet_for(Duration::from_millis(100)));
    }
}

#[test]
fn a_connection_may_have_sixteen_actions_under_way() {
    let upstream = Upstream::start();
    upstream.set("/act", Reply::steps(vec![Step::Stall]));
    let server =
        Setup::new().action("act", &upstream.url("/act"), "timeout = \"30s\"\nfirst_byte_timeout = \"30s\"").start();
    let mut ws = open(&server, "/v1/ws", "u1", json!({}));
    for n in 0..17 {
        ws.send(json!({"type": "act", "id": n}));
    }
    let told = ws.next();
    assert_eq!((&told["code"], &told["id"]), (&json!("RATE_LIMITED"), &json!(16)));
    upstream.wait_for_requests(16, PATIENCE);
    assert_eq!(upstream.request_count(), 16);
}

#[test]
fn a_reload_brings_other_actions_to_live_connections() {
    let upstream = Upstream::start();
    upstream.set("/one", Reply::json("1"));
    upstream.set("/two/acme", Reply::json("2"));
    let setup = Setup::new().action("act", &upstream.url("/one"), "");
    let server = setup.start();
    let mut ws = open(&server, "/v1/ws", "u1", agent());
    assert_eq!(ask(&mut ws, json!({"type": "act", "id": 1}))["body"], 1);
    let changed = Setup::new().action("act", &upstream.url("/one"), "permissions = [\"none\"]").action(
        "other",
        &upstream.url("/one"),
        "",
    );
    server.reload(&changed);
    eventually("the reload", || {
        (ask(&mut ws, json!({"type": "act", "id": 2}))["code"] == "INSUFFICIENT_PERMISSIONS").then_some(())
    });
    assert_eq!(ask(&mut ws, json!({"type": "other", "id": 3}))["body"], 1);
    server.reload(&Setup::new());
    eventually("the reload", || {
        (ask(&mut ws, json!({"type": "other", "id": 4}))["code"] == "UNKNOWN_TYPE").then_some(())
    });
}

#[test]
fn a_server_that_is_told_to_end_lets_actions_end_that_it_has_begun() {
    let upstream = Upstream::start();
    upstream.set("/act", Reply::json("1").delay(Duration::from_millis(600)));
    let mut server = Setup::new().action("act", &upstream.url("/act"), "").start();
    let mut ws = open(&server, "/v1/ws", "u1", json!({}));
    ws.send(json!({"type": "act", "id": 1}));
    upstream.wait_for_requests(1, PATIENCE);
    let begun = Instant::now();
    server.signal(Signal::TERM);
    assert_eq!(ws.closed(), (1012, "draining".to_owned()));
    drop(ws);
    assert!(server.wait().success());
    assert!(begun.elapsed() >= Duration::from_millis(300), "it was not cut off");
}
