//! Streams that administrators make while the server runs: made, read, changed, deleted, stopped, started, polled at once,
//! and kept across restarts.

mod support;

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use support::server::{
    ADMIN_KEY, Answer, DRIVERS, PATIENCE, Raw, Server, Setup, bearer, eventually, mint, now_s, streams, streams_with,
    token_of, watching,
};
use support::{Folder, Reply, RequestSeen, Upstream};

/// Makes a stream that is polled every 20 ms; its tag.
fn make(server: &Server, id: &str, url: &str) -> String {
    let answer = streams(server, "POST", "", &json!({ "id": id, "url": url, "interval": "20ms" }));
    assert_eq!(answer.status, 201, "{answer:?}");
    answer.header("etag").expect("a tag").to_owned()
}

fn order(server: &Server, id: &str, what: &str) -> Answer {
    streams(server, "POST", &format!("/{id}/{what}"), &Value::Null)
}

fn value(server: &Server, id: &str) -> (u16, Value) {
    let answer = server.get(&format!("/v1/streams/{id}"), &[bearer(&token_of("u1"))]);
    (answer.status, answer.json())
}

#[test]
fn a_stream_is_made_read_changed_and_deleted_while_it_is_watched() {
    for driver in DRIVERS {
        let upstream = Upstream::start();
        upstream.set_json("/a", r#"{"of":"a"}"#);
        upstream.set_json("/b", r#"{"of":"b"}"#);
        let server = Setup::new().driver(driver).stream("file", &upstream.url("/a"), "").start();
        assert_eq!(value(&server, "leads").0, 404);
        let mut others = watching(&server, &token_of("u1"), "/v1/streams/file");

        let body = json!({ "id": "leads", "url": upstream.url("/a"), "interval": "20ms" });
        let made = streams(&server, "POST", "", &body);
        assert_eq!((made.status, made.header("location")), (201, Some("/admin/v1/streams/leads")), "{made:?}");
        let tag = made.header("etag").expect("a tag").to_owned();
        // Each core has it: each takes some of these connections.
        for _ in 0..8 {
            assert_eq!(value(&server, "leads"), (200, json!({ "of": "a" })));
        }
        let read = streams(&server, "GET", "/leads", &Value::Null);
        assert_eq!((read.status, read.header("etag")), (200, Some(tag.as_str())));
        let shown = read.json();
        for (name, wanted) in body.as_object().expect("an object") {
            assert_eq!(shown[name], *wanted);
        }
        assert_eq!((&shown["source"], &shown["state"]), (&json!("admin"), &json!("running")));

        let mut single = watching(&server, &token_of("u1"), "/v1/streams/leads");
        let mut sse = server.sse("/v1/streams/leads", &[bearer(&token_of("u2"))]);
        let first = sse.next_of("snapshot");
        let mut many = watching(&server, &token_of("u3"), "/v1/ws");
        many.send(json!({ "type": "subscribe", "stream": "leads", "id": 1 }));
        many.next_of("snapshot");

        // Another URL: another epoch, and a snapshot for everybody.
        let wanted = json!({ "id": "leads", "url": upstream.url("/b"), "interval": "20ms" });
        let changed = streams_with(&server, "PUT", "/leads", &[("If-Match", tag.clone())], &wanted);
        assert_eq!(changed.status, 200, "{changed:?}");
        let new_tag = changed.header("etag").expect("a tag").to_owned();
        assert_ne!(new_tag, tag);
        for snapshot in [single.next_of("snapshot"), sse.next_of("snapshot").data, many.next_of("snapshot")] {
            assert_eq!((&snapshot["data"], &snapshot["seq"]), (&json!({ "of": "b" }), &json!(1)));
            assert_ne!(snapshot["epoch"], first.data["epoch"]);
        }
        upstream.set_json("/b", r#"{"of":"b2"}"#);
        single.next_of("snapshot");

        // Whoever knows it as it was before does not change it.
        let late = streams_with(&server, "PUT", "/leads", &[("If-Match", tag.clone())], &body);
        assert_eq!((late.status, late.code()), (412, "PRECONDITION_FAILED".to_owned()));
        let late = streams_with(&server, "DELETE", "/leads", &[("If-Match", tag)], &Value::Null);
        assert_eq!((late.status, late.code()), (412, "PRECONDITION_FAILED".to_owned()));
        assert_eq!(streams(&server, "GET", "/leads", &Value::Null).header("etag"), Some(new_tag.as_str()));

        let gone =
            streams_with(&server, "DELETE", "/leads", &[("If-Match", format!("\"x\", {new_tag}"))], &Value::Null);
        assert_eq!((gone.status, gone.body.len()), (204, 0));
        let (frames, close) = single.until_close();
        assert_eq!(close, (4004, "stream_ended".to_owned()));
        assert_eq!(
            frames.last().map(|frame| (&frame["type"], &frame["state"])),
            Some((&json!("stream_status"), &json!("ended")))
        );
        let close = sse.next_of("close");
        assert_eq!((&close.data["code"], &close.data["reason"]), (&json!(4004), &json!("stream_ended")));
        assert_eq!(many.next_of("stream_status")["state"], "ended");
        assert_eq!(many.next_of("unsubscribed")["reason"], "stream_ended");
        assert_eq!(value(&server, "leads").0, 404);
        assert_eq!(streams(&server, "GET", "/leads", &Value::Null).status, 404);
        assert_eq!(streams(&server, "DELETE", "/leads", &Value::Null).status, 404);
        // Nobody asks the upstream any more, and whoever watched something else has noticed nothing.
        let asked = || upstream.requests().iter().filter(|request| request.target == "/b").count();
        let before = asked();
        upstream.set_json("/a", r#"{"of":"a2"}"#);
        let event = others.next();
        assert_eq!((&event["stream"], &event["seq"]), (&json!("file"), &json!(2)), "{event}");
        eventually("polls of the file's stream", || (upstream.request_count() > before + 20).then_some(()));
        assert!(asked() <= before + 1, "{} polls of a deleted stream", asked() - before);
        many.send(json!({ "type": "subscribe", "stream": "file", "id": 2 }));
        many.next_of("snapshot");
        assert_eq!(server.log_count("An administrator has"), 3, "{}", server.log_text());
    }
}

#[test]
fn what_is_wrong_with_a_stream_is_said_at_once_and_by_key() {
    let upstream = Upstream::start();
    let server = Setup::new().stream("file", &upstream.url("/a"), "").start();
    let refused = |body: Value| {
        let answer = streams(&server, "POST", "", &body);
        assert_eq!((answer.status, answer.code()), (400, "BAD_REQUEST".to_owned()), "{body}: {answer:?}");
        answer.json()["errors"]
            .as_array()
            .map(|errors| errors.iter().map(|error| error.as_str().expect("a sentence").to_owned()).collect::<Vec<_>>())
    };
    let all = refused(json!({
        "id": "a b", "url": "ftp://x/", "intervall": "1s", "timeout": 5, "history": -1, "headers": { "Host": "x" },
        "view": [{ "roles": [] }], "keep_warm": "yes",
    }));
    let all = all.expect("errors").join("\n");
    for said in [
        "`stream.id`",
        "`stream.url`",
        "unknown key `stream.intervall`; the nearest known one is `stream.interval`",
        "`stream.timeout` has the type integer",
        "`stream.history`",
        "`stream.headers.Host`",
        "`stream.view.roles`",
        "`stream.keep_warm` has the type string",
    ] {
        assert!(all.contains(said), "{said} is not in\n{all}");
    }
    assert_eq!(refused(json!({})).expect("errors"), ["`stream.id` is missing here", "`stream.url` is missing here"]);
    let url = upstream.url("/a");
    for (more, said) in [
        (json!({ "interval": 1.5 }), "`stream.interval` has the type float"),
        (json!({ "history": 18_446_744_073_709_551_615_u64 }), "`stream.history` has the type float"),
        (json!({ "roles": [null] }), "null may not stand there"),
        (json!({ "roles": [[[[[[[[[[]]]]]]]]]] }), "the JSON is over 8 levels deep"),
        (json!({ "headers": { "Authorization": "***" } }), "`stream.headers.Authorization` is ***"),
        (json!({ "hook_secret": "env:NO_SUCH_VARIABLE_HERE" }), "`stream.hook_secret`"),
        (json!({ "\"]\n[x]\na = \"": 1 }), "unknown key"),
        (json!({ "url": "http://127.0.0.1/?key=***" }), "`stream.url` has ***"),
    ] {
        let mut body = json!({ "id": "leads", "url": url });
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        let errors = refused(body).expect("errors");
        assert!(errors.iter().any(|error| error.contains(said)), "{said} is not in {errors:?}");
    }
    for body in ["", "[]", "{", "7"] {
        let answer = Raw::connect(server.admin).request("POST", "/admin/v1/streams", &[bearer(ADMIN_KEY)], body);
        assert_eq!((answer.status, answer.code()), (400, "BAD_REQUEST".to_owned()), "{body}");
    }
    assert_eq!(streams(&server, "GET", "", &Value::Null).json()["streams"].as_array().map(Vec::len), Some(1));

    // Null is as if it were not there; a warning does not stop it.
    let odd = json!({ "id": "odd", "url": url, "interval": "1ms", "body": null, "array_key": null });
    let made = streams(&server, "POST", "", &odd);
    assert_eq!(made.status, 201, "{made:?}");
    assert!(made.json()["warnings"][0].as_str().is_some_and(|warning| warning.contains("interval")), "{made:?}");
    assert_eq!(streams(&server, "POST", "", &odd).status, 409);
    assert_eq!(streams(&server, "POST", "", &json!({ "id": "file", "url": url })).status, 409);
    let other = streams(&server, "PUT", "/odd", &json!({ "id": "other", "url": url }));
    assert_eq!((other.status, other.code()), (400, "BAD_REQUEST".to_owned()));
    assert_eq!(streams(&server, "PUT", "/nowhere", &json!({ "url": url })).status, 404);
    assert_eq!(streams(&server, "PATCH", "/odd", &Value::Null).header("allow"), Some("GET, HEAD, PUT, DELETE"));
    assert_eq!(order(&server, "odd", "restart").status, 404);
    assert_eq!(order(&server, "nowhere", "stop").status, 404);
    for path in ["", "/odd", "/odd/stop"] {
        assert_eq!(server.admin("POST", &format!("/admin/v1/streams{path}"), None).status, 401);
    }
}

#[test]
fn secrets_are_sent_to_the_upstream_and_shown_to_nobody() {
    let (upstream, folder) = (Upstream::start(), Folder::new("managed-secrets"));
    upstream.set_json("/a", "1");
    let setup = Setup::new().server(&folder.state_line()).env("CRM_TOKEN", "token-of-the-environment");
    let server = setup.start();
    let url = format!("{}?key=secret-of-the-query&page=2", upstream.url("/a"));
    let body = json!({
        "id": "leads", "url": url, "interval": "20ms", "method": "POST", "body": "{\"q\":\"secret-of-the-body\"}",
        "headers": { "Authorization": "env:CRM_TOKEN", "X-Key": "secret-of-the-header" },
        "hook_secret": ["secret-of-the-hook-1", "secret-of-the-hook-2"],
    });
    let made = streams(&server, "POST", "", &body);
    assert_eq!(made.status, 201, "{made:?}");
    let sent = |count: usize| {
        upstream.wait_for_requests(count, PATIENCE);
        upstream.requests().pop().expect("a request")
    };
    let mut ws = watching(&server, &token_of("u1"), "/v1/streams/leads");
    let is_whole = |request: RequestSeen| {
        assert_eq!(request.target, "/a?key=secret-of-the-query&page=2");
        assert_eq!(request.header("authorization"), Some("token-of-the-environment"));
        assert_eq!(request.header("x-key"), Some("secret-of-the-header"));
        assert_eq!(request.body, br#"{"q":"secret-of-the-body"}"#);
    };
    is_whole(sent(1));

    let read = streams(&server, "GET", "/leads", &Value::Null);
    let list = streams(&server, "GET", "", &Value::Null);
    for answer in [&made, &read, &list] {
        let text = answer.text();
        assert!(!text.contains("secret-of") && !text.contains("CRM_TOKEN") && !text.contains("token-of"), "{text}");
    }
    let shown = read.json();
    assert_eq!(shown["headers"], json!({ "Authorization": "***", "X-Key": "***" }));
    assert_eq!((&shown["hook_secret"], &shown["body"]), (&json!(["***", "***"]), &json!("***")));
    assert!(shown["url"].as_str().is_some_and(|url| url.ends_with("/a?key=***&page=***")), "{shown}");

    // What GET gives may be PUT: the secrets stay.
    let mut put = shown.clone();
    put["interval"] = json!("30ms");
    let changed = streams(&server, "PUT", "/leads", &put);
    assert_eq!(changed.status, 200, "{changed:?}");
    ws.next_of("snapshot");
    is_whole(sent(upstream.request_count() + 3));
    // One of them is another now; what is not there any more is gone.
    put["headers"] = json!({ "X-Key": "another", "Authorization": "***" });
    // Which of two is left nobody can tell.
    put["hook_secret"] = json!(["***"]);
    let unclear = streams(&server, "PUT", "/leads", &put);
    assert!(unclear.status == 400 && unclear.text().contains("`stream.hook_secret` is ***"), "{unclear:?}");
    put["hook_secret"] = Value::Null;
    assert_eq!(streams(&server, "PUT", "/leads", &put).status, 200);
    ws.next_of("snapshot");
    let request = sent(upstream.request_count() + 3);
    assert_eq!(request.header("x-key"), Some("another"));
    assert_eq!(request.header("authorization"), Some("token-of-the-environment"));
    assert!(streams(&server, "GET", "/leads", &Value::Null).json().get("hook_secret").is_none());

    // A variable stays a name, and its value is read anew at the next start.
    let kept = fs::read_to_string(folder.state()).expect("the state file");
    assert!(kept.contains("env:CRM_TOKEN") && !kept.contains("token-of-the-environment"), "{kept}");
    drop(server);
    let server = setup.clone().env("CRM_TOKEN", "another-token").start();
    let _ws = watching(&server, &token_of("u1"), "/v1/streams/leads");
    assert_eq!(sent(upstream.request_count() + 1).header("authorization"), Some("another-token"));
    assert!(!server.log_text().contains("secret-of"));
}

#[test]
fn streams_and_stops_survive_a_restart() {
    let (upstream, folder) = (Upstream::start(), Folder::new("managed-restart"));
    upstream.set_json("/a", r#"{"n":1}"#);
    let setup = Setup::new().server(&folder.state_line()).stream("file", &upstream.url("/a"), "");
    let server = setup.start();
    let tag = make(&server, "leads", &upstream.url("/a"));
    make(&server, "gone", &upstream.url("/a"));
    make(&server, "stopped", &upstream.url("/a"));
    assert_eq!(streams(&server, "DELETE", "/gone", &Value::Null).status, 204);
    assert_eq!((order(&server, "stopped", "stop").status, order(&server, "file", "stop").status), (200, 200));
    let before = streams(&server, "GET", "", &Value::Null).json();
    // However it ends.
    server.signal(rustix::process::Signal::KILL);
    drop(server);

    let server = setup.start();
    assert_eq!(streams(&server, "GET", "", &Value::Null).json(), before);
    assert_eq!(streams(&server, "GET", "/leads", &Value::Null).header("etag"), Some(tag.as_str()));
    assert_eq!(value(&server, "leads"), (200, json!({ "n": 1 })));
    assert_eq!(value(&server, "gone").0, 404);
    let polls = upstream.request_count();
    for id in ["stopped", "file"] {
        assert_eq!(streams(&server, "GET", &format!("/{id}"), &Value::Null).json()["state"], "stopped");
        let mut ws = server.ws(&format!("/v1/streams/{id}"), &[bearer(&token_of("u1"))]);
        let status = ws.next_of("stream_status");
        assert_eq!((&status["state"], &status["code"]), (&json!("failing"), &json!("STOPPED")));
        // There is no value, and none is waited for.
        let asked = Instant::now();
        let answer = server.get(&format!("/v1/streams/{id}"), &[bearer(&token_of("u1"))]);
        assert_eq!((answer.status, answer.code()), (503, "STREAM_UNAVAILABLE".to_owned()));
        assert!(asked.elapsed() < Duration::from_secs(10));
        let others = upstream.requests().iter().skip(polls).filter(|request| request.target != "/a").count();
        assert_eq!(others, 0);
        assert_eq!(order(&server, id, "start").status, 200);
        assert_eq!(ws.next_of("snapshot")["data"], json!({ "n": 1 }));
    }

    // A file that is no configuration any more says so, and which stream it is.
    drop(server);
    let mut kept: Value = serde_json::from_slice(&fs::read(folder.state()).expect("the state file")).expect("JSON");
    kept["sections"]["streams"]["made"]["leads"]["stream"]["interval"] = json!("soon");
    fs::write(folder.state(), kept.to_string()).expect("written");
    let said = fails_to_start(&setup, &folder);
    assert!(said.contains("\"leads\"") && said.contains("`stream.interval`"), "{said}");
    kept["sections"]["streams"] = json!([]);
    fs::write(folder.state(), kept.to_string()).expect("written");
    let said = fails_to_start(&setup, &folder);
    assert!(said.contains("has a section `streams`"), "{said}");
}

#[test]
fn a_stream_whose_secret_is_gone_stays_what_it_was_at_a_reload_and_the_rest_is_taken() {
    let (upstream, folder) = (Upstream::start(), Folder::new("managed-unreadable"));
    upstream.set_json("/a", r#"{"n":1}"#);
    upstream.set_json("/b", r#"{"n":2}"#);
    let file = folder.put("key", "secret-of-the-file");
    let setup = Setup::new().server(&folder.state_line());
    let server = setup.start();
    let headers = json!({ "X-Key": format!("file:{file}") });
    let body = json!({ "id": "leads", "url": upstream.url("/a"), "interval": "20ms", "headers": headers });
    assert_eq!(streams(&server, "POST", "", &body).status, 201);
    let mut ws = watching(&server, &token_of("u1"), "/v1/streams/leads");
    fs::remove_file(&file).expect("removed");
    server.reload(&setup.clone().stream("more", &upstream.url("/b"), ""));
    eventually("the rest is taken", || (value(&server, "more") == (200, json!({ "n": 2 }))).then_some(()));
    let said = server.wait_for_log("cannot be read again, and stays what it was", 1);
    assert!(said.contains("stream=leads") && !said.contains("secret-of-the-file"), "{said}");
    // It is polled as before, and who watches has noticed nothing.
    upstream.set_json("/a", r#"{"n":3}"#);
    assert_eq!(ws.next()["seq"], json!(2));
    let requests = upstream.requests();
    let last = requests.iter().rev().find(|seen| seen.target == "/a").expect("a poll");
    assert_eq!(last.header("x-key"), Some("secret-of-the-file"));
    assert_eq!(streams(&server, "DELETE", "/leads", &Value::Null).status, 204);
}

#[test]
fn a_stream_whose_secret_is_gone_ends_no_start_and_is_polled_when_it_is_there_again() {
    let (upstream, folder) = (Upstream::start(), Folder::new("managed-lacking"));
    upstream.set_json("/good", "1");
    upstream.set_json("/a", "2");
    let file = folder.put("key", "secret-of-the-file");
    let setup = Setup::new().server(&folder.state_line());
    let server = setup.clone().env("LEADS_KEY", "secret-of-the-variable").start();
    make(&server, "good", &upstream.url("/good"));
    let source = format!("file:{file}");
    for (id, more) in [
        ("filed", json!({ "auth": { "kind": "bearer", "token": source }, "roles": ["agent"] })),
        ("spoken", json!({ "headers": { "X-Key": source }, "kind": "ndjson" })),
        ("varied", json!({ "headers": { "X-Key": "env:LEADS_KEY" } })),
        ("hooked", json!({ "hook_secret": "env:LEADS_KEY" })),
    ] {
        let mut body = json!({ "id": id, "url": upstream.url("/a"), "interval": "20ms" });
        body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        let answer = streams(&server, "POST", "", &body);
        assert_eq!(answer.status, 201, "{answer:?}");
    }
    drop(server);
    fs::remove_file(&file).expect("removed");
    let asked = || upstream.requests().iter().filter(|request| request.target == "/a").count();
    let before = asked();

    let server = setup.start();
    assert_eq!(value(&server, "good"), (200, json!(1)));
    let agent = mint(json!({ "sub": "u1", "exp": now_s() + 600, "role": "agent" }));
    let mut watchers = ["filed", "spoken", "varied", "hooked"].map(|id| {
        let mut ws = server.ws(&format!("/v1/streams/{id}"), &[bearer(&agent)]);
        let status = ws.next_of("stream_status");
        assert_eq!((&status["state"], &status["code"]), (&json!("failing"), &json!("UPSTREAM_AUTH")), "{status}");
        ws
    });
    assert_eq!(value(&server, "filed").0, 403, "it is for whom it was for");
    assert_eq!(order(&server, "filed", "refresh").status, 202);
    for (id, named) in [("filed", "`stream.auth.token`"), ("varied", "`stream.headers.X-Key`")] {
        let log = server.log_text();
        let said = log.lines().find(|line| line.contains("what it names is not there") && line.contains(id));
        assert!(said.is_some_and(|said| said.contains(named)), "{log}");
        let shown = streams(&server, "GET", &format!("/{id}"), &Value::Null).json();
        assert_eq!((&shown["state"], &shown["code"]), (&json!("failing"), &json!("UPSTREAM_AUTH")), "{shown}");
        assert!(shown["warnings"][0].as_str().is_some_and(|said| said.contains(named)), "{shown}");
        // One of many, and the others are as they are.
        let list = streams(&server, "GET", "", &Value::Null).json();
        let of = |id: &str| list["streams"].as_array().expect("a list").iter().find(|one| one["id"] == id).cloned();
        assert_eq!((of(id).expect("it is there"), &of("good").expect("it too")["state"]), (shown, &json!("running")));
    }
    // A reload that changes nothing of it, and a stop, leave it at that.
    server.reload(&setup);
    server.wait_for_log("what it names is not there", 8);
    assert_eq!(order(&server, "filed", "stop").status, 200);
    assert_eq!(streams(&server, "GET", "/filed", &Value::Null).json()["state"], "stopped");
    assert_eq!(order(&server, "filed", "start").status, 200);
    assert_eq!(asked(), before, "nothing was asked without what it needs");

    // The file is there again.
    folder.put("key", "another-secret");
    upstream.set("/a", Reply::body("application/x-ndjson", "3\n"));
    assert_eq!(watchers[0].next_of("snapshot")["data"], json!(3));
    assert_eq!(watchers[1].next_of("snapshot")["data"], json!(3));
    let bearer = Some("Bearer another-secret");
    assert!(upstream.requests().iter().any(|request| request.header("authorization") == bearer));
    let shown = streams(&server, "GET", "/filed", &Value::Null).json();
    assert_eq!((&shown["state"], shown.get("code"), shown.get("warnings")), (&json!("running"), None, None));
    // What GET gives may be PUT, but not without the variable; with something else in its place it is polled.
    let mut body = streams(&server, "GET", "/varied", &Value::Null).json();
    let lacking = streams(&server, "PUT", "/varied", &body);
    assert!(lacking.status == 400 && lacking.text().contains("LEADS_KEY"), "{lacking:?}");
    body["headers"] = json!({ "X-Key": "written" });
    assert_eq!(streams(&server, "PUT", "/varied", &body).status, 200);
    assert_eq!(watchers[2].next_of("snapshot")["data"], json!(3));
    assert_eq!(streams(&server, "DELETE", "/hooked", &Value::Null).status, 204);
    assert_eq!(watchers[3].closed(), (4004, "stream_ended".to_owned()));
    assert!(!server.log_text().contains("secret-of") && !server.log_text().contains("another-secret"));
    drop(server);
    assert_eq!(value(&setup.start(), "varied"), (200, json!(3)));
}

#[test]
fn however_many_streams_lack_something_each_is_polled_when_it_is_there() {
    let (upstream, folder) = (Upstream::start(), Folder::new("managed-many-lacking"));
    upstream.set_json("/a", "1");
    let file = folder.put("key", "a secret");
    let setup = Setup::new().server(&folder.state_line());
    let server = setup.start();
    let headers = json!({ "X-Key": format!("file:{file}") });
    let body = json!({ "id": "leads", "url": upstream.url("/a"), "interval": "20ms", "headers": headers });
    assert_eq!(streams(&server, "POST", "", &body).status, 201);
    drop(server);
    fs::remove_file(&file).expect("removed");
    let mut state: Value = serde_json::from_slice(&fs::read(folder.state()).expect("the state")).expect("JSON");
    let made = state["sections"]["streams"]["made"].as_object_mut().expect("an object");
    for n in 0..300 {
        let mut another = made["leads"].clone();
        another["stream"]["id"] = json!(format!("a{n:03}"));
        // These come before it, and what they name never comes.
        another["stream"]["headers"] = json!({ "X-Key": "file:/nowhere/at/all" });
        made.insert(format!("a{n:03}"), another);
    }
    fs::write(folder.state(), state.to_string()).expect("written");
    let server = setup.start();
    assert_eq!(server.log_count("what it names is not there"), 301);
    let mut ws = watching_nothing(&server, "leads");
    assert_eq!(ws.next()["code"], "UPSTREAM_AUTH");
    folder.put("key", "a secret");
    assert_eq!(ws.next_of("snapshot")["data"], json!(1));
    let state = |id: &str| streams(&server, "GET", &format!("/{id}"), &Value::Null).json()["state"].clone();
    assert_eq!((state("leads"), state("a299")), (json!("running"), json!("failing")));
}

#[test]
fn a_secret_that_the_file_names_and_is_gone_ends_the_start_as_ever() {
    let folder = Folder::new("managed-operators");
    let setup = Setup::new().stream("leads", "http://127.0.0.1:1/", "headers = { \"X-Key\" = \"env:LEADS_KEY\" }");
    let said = fails_to_start(&setup, &folder);
    assert!(said.contains("`stream.headers.X-Key`") && said.contains("\"LEADS_KEY\" is not set"), "{said}");
}

/// What a server says that does not start.
fn fails_to_start(setup: &Setup, folder: &Folder) -> String {
    let path = folder.put("restcast.toml", &setup.text());
    let mut child = Command::new(env!("CARGO_BIN_EXE_restcast"))
        .args(["serve", "--config"])
        .arg(&path)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    let until = Instant::now() + PATIENCE;
    while child.try_wait().expect("a child").is_none() {
        if Instant::now() > until {
            let _ = child.kill();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output().expect("its output");
    assert!(!output.status.success());
    String::from_utf8(output.stderr).expect("UTF-8")
}

#[test]
fn a_stopped_stream_gives_the_held_value_and_is_not_polled_until_it_is_started() {
    for driver in DRIVERS {
        let upstream = Upstream::start();
        upstream.set_json("/a", r#"{"n":1}"#);
        let server = Setup::new().driver(driver).stream("file", &upstream.url("/a"), "linger = \"60s\"").start();
        let mut ws = watching(&server, &token_of("u1"), "/v1/streams/file");
        let stopped = order(&server, "file", "stop");
        assert_eq!((stopped.status, &stopped.json()["state"]), (200, &json!("stopped")));
        let status = ws.next_of("stream_status");
        assert_eq!((&status["state"], &status["code"]), (&json!("stale"), &json!("STOPPED")));
        assert!(status.get("retry_in_ms").is_none_or(Value::is_null), "{status}");

        upstream.set_json("/a", r#"{"n":2}"#);
        let polls = upstream.request_count();
        let answer = server.get("/v1/streams/file", &[bearer(&token_of("u1"))]);
        assert_eq!((answer.status, answer.header("x-restcast-state")), (200, Some("stale")));
        assert_eq!(answer.json(), json!({ "n": 1 }));
        let mut late = server.ws("/v1/streams/file", &[bearer(&token_of("u2"))]);
        assert_eq!(late.next()["type"], "welcome");
        assert_eq!(late.next()["code"], "STOPPED");
        assert_eq!(late.next()["data"], json!({ "n": 1 }));
        assert_eq!(order(&server, "file", "refresh").status, 409);
        assert_eq!(order(&server, "file", "stop").status, 200, "twice is once");
        assert!(ws.is_quiet_for(Duration::from_millis(300)), "nothing comes of a stopped stream");
        assert!(upstream.request_count() <= polls + 1, "one may have been on its way");

        assert_eq!(order(&server, "file", "start").json()["state"], "running");
        for ws in [&mut ws, &mut late] {
            // In whichever order: the event of the first poll, and that it is well.
            let frames = [ws.next(), ws.next()];
            assert!(
                frames.iter().any(|frame| frame["data"] == json!({ "n": 2 }) || frame["type"] == "patch"),
                "{frames:?}"
            );
            assert!(frames.iter().any(|frame| frame["state"] == "live"), "{frames:?}");
        }
        assert_eq!(server.log_count("An administrator has stopped a stream."), 1);
    }
}

/// A GET of a stream that has begun to wait for a value.
fn waits(server: &Server, id: &str, more: &[(&str, String)]) -> Raw {
    let waiting = || server.metric(&["restcast_connections{", "json_wait"]);
    let before = waiting();
    let mut raw = server.connect();
    let headers = [&[bearer(&token_of("u1"))], more].concat();
    raw.send_request("GET", &format!("/v1/streams/{id}"), &headers, "");
    eventually("it waits", || (waiting() > before).then_some(()));
    raw
}

#[test]
fn who_waits_for_a_value_of_a_stream_that_is_changed_gets_the_value_of_what_it_is_then() {
    for driver in DRIVERS {
        let upstream = Upstream::start();
        upstream.set_json("/a", "\"a\"");
        upstream.set_json("/b", "\"b\"");
        upstream.set("/slow", Reply::json("\"slow\"").delay(Duration::from_secs(60)));
        let setup = |interval: &str| {
            Setup::new().driver(driver).stream("file", &upstream.url("/a"), &format!("interval = {interval:?}"))
        };
        let server = setup("20ms").start();
        let tag_of = |id: &str| {
            let answer = server.get(&format!("/v1/streams/{id}"), &[bearer(&token_of("u1"))]);
            assert_eq!(answer.status, 200, "{answer:?}");
            answer.header("etag").expect("a tag").to_owned()
        };
        let put = |id: &str, path: &str| {
            let body = json!({ "id": id, "url": upstream.url(path), "interval": "20ms" });
            assert_eq!(streams(&server, "PUT", &format!("/{id}"), &body).status, 200);
        };
        make(&server, "leads", &upstream.url("/a"));
        let known = tag_of("leads");
        let wait = [("If-None-Match", known.clone()), ("Prefer", "wait=50".to_owned())];
        let mut all = [waits(&server, "leads", &wait), waits(&server, "leads", &wait), waits(&server, "leads", &wait)];
        let begun = Instant::now();
        put("leads", "/b");
        for waiting in &mut all {
            let answer = waiting.answer();
            assert_eq!((answer.status, answer.json()), (200, json!("b")), "{answer:?}");
            assert_ne!(answer.header("etag"), Some(known.as_str()));
        }
        assert!(begun.elapsed() < Duration::from_secs(40), "they were answered by the change");

        // One that waits for the first value: changed twice, and the other upstream has one.
        make(&server, "cold", &upstream.url("/slow"));
        let mut cold = waits(&server, "cold", &[]);
        put("cold", "/slow");
        put("cold", "/b");
        let answer = cold.answer();
        assert_eq!((answer.status, answer.json()), (200, json!("b")), "{answer:?}");

        // The file's, by a reload; and one that is deleted meanwhile is gone.
        let wait = |known: String| [("If-None-Match", known), ("Prefer", "wait=50".to_owned())];
        let known = tag_of("file");
        let mut waiting = waits(&server, "file", &wait(known.clone()));
        server.reload(&setup("30ms"));
        let answer = waiting.answer();
        assert_eq!((answer.status, answer.json()), (200, json!("a")), "{answer:?}");
        assert_ne!(answer.header("etag"), Some(known.as_str()), "another epoch");
        let mut waiting = waits(&server, "leads", &wait(tag_of("leads")));
        assert_eq!(streams(&server, "DELETE", "/leads", &Value::Null).status, 204);
        let answer = waiting.answer();
        assert_eq!(answer.code(), "STREAM_ENDED", "{answer:?}");
        // Who may not have what it is now is told so.
        let mut waiting = waits(&server, "cold", &wait(tag_of("cold")));
        let body = json!({ "id": "cold", "url": upstream.url("/b"), "roles": ["nobody"] });
        assert_eq!(streams(&server, "PUT", "/cold", &body).status, 200);
        let answer = waiting.answer();
        assert_eq!((answer.status, answer.code().as_str()), (403, "INSUFFICIENT_PERMISSIONS"), "{answer:?}");
        // Nobody is counted as waiting, or watching, who is not.
        eventually("nobody waits", || (server.metric(&["restcast_connections{", "json_wait"]) == 0.0).then_some(()));
    }
}

#[test]
fn a_stream_that_was_changed_is_not_called_live_before_a_poll_has_shown_it() {
    // The one that fails is another origin: of one that is down others would be left alone as well.
    let (upstream, down) = (Upstream::start(), Upstream::start());
    upstream.set_json("/a", "\"a\"");
    upstream.set_json("/b", "\"b\"");
    down.set("/bad", Reply::status(500));
    upstream.set("/slow", Reply::json("\"slow\"").delay(Duration::from_secs(2)));
    let server = Setup::new().start();
    make(&server, "leads", &upstream.url("/a"));
    let put = |path: &str| {
        let url = if path.starts_with("/bad") { down.url(path) } else { upstream.url(path) };
        let body = json!({ "id": "leads", "url": url, "interval": "20ms", "backoff_max": "50ms" });
        assert_eq!(streams(&server, "PUT", "/leads", &body).status, 200);
    };
    let told = |ws: &mut support::server::Ws| {
        let frame = ws.next_of("stream_status");
        (frame["state"].as_str().expect("a state").to_owned(), frame["code"].as_str().unwrap_or_default().to_owned())
    };
    let status = |state: &str, code: &str| (state.to_owned(), code.to_owned());
    let mut ws = watching(&server, &token_of("u1"), "/v1/streams/leads");

    // Of one that is stopped another is stopped too, and never live.
    assert_eq!(order(&server, "leads", "stop").status, 200);
    assert_eq!(told(&mut ws), status("stale", "STOPPED"));
    put("/b");
    assert_eq!(told(&mut ws), status("failing", "STOPPED"));
    assert_eq!(order(&server, "leads", "start").status, 200);
    assert_eq!(told(&mut ws), status("live", ""));

    // From one that fails to one that fails, and to one that takes its time.
    put("/bad");
    assert_eq!(told(&mut ws), status("failing", "UPSTREAM_STATUS"));
    put("/bad?again");
    assert_eq!(told(&mut ws), status("failing", "UPSTREAM_STATUS"));
    put("/slow");
    let early = ws.heard_within(Duration::from_millis(300));
    assert!(early.is_none(), "nothing is known yet: {early:?}");
    let frames = [ws.next(), ws.next()];
    assert!(frames.iter().any(|frame| frame["data"] == "slow"), "{frames:?}");
    assert!(frames.iter().any(|frame| frame["state"] == "live"), "{frames:?}");
    // Changed twice before anything is known: it is said once, and of the last.
    put("/bad");
    assert_eq!(told(&mut ws), status("failing", "UPSTREAM_STATUS"));
    put("/slow?1");
    put("/slow?2");
    let frames = [ws.next(), ws.next()];
    assert!(frames.iter().any(|frame| frame["data"] == "slow"), "{frames:?}");
    assert!(frames.iter().any(|frame| frame["state"] == "live"), "{frames:?}");
    assert!(ws.is_quiet_for(Duration::from_millis(500)));
    // One that joins, and is held to be live already, is told nothing of it.
    let mut late = server.ws("/v1/streams/leads", &[bearer(&token_of("u2"))]);
    assert_eq!((&late.next()["type"], &late.next()["type"]), (&json!("welcome"), &json!("snapshot")));
    assert!(late.is_quiet_for(Duration::from_millis(300)));
}

#[test]
fn a_member_that_stands_twice_in_an_admin_body_is_refused_by_every_resource() {
    let server = Setup::new().start();
    let ask = |method: &str, path: &str, body: &str| {
        Raw::connect(server.admin).request(method, path, &[bearer(ADMIN_KEY)], body)
    };
    for (method, path, body) in [
        ("POST", "/admin/v1/streams", r#"{"id":"a","url":"http://127.0.0.1:1/a","url":"http://127.0.0.1:1/b"}"#),
        ("POST", "/admin/v1/streams", r#"{"id":"a","url":"http://127.0.0.1:1/","headers":{"X":"1","\u0058":"2"}}"#),
        ("POST", "/admin/v1/keys", r#"{"streams":["a"],"streams":["b"]}"#),
        ("PUT", "/admin/v1/users/u1/permissions", r#"{"permissions":[],"roles":["a"],"roles":["b"]}"#),
        ("POST", "/admin/v1/tokens/revoke", r#"{"jti":"a","jti":"b"}"#),
    ] {
        let answer = ask(method, path, body);
        assert_eq!((answer.status, answer.code().as_str()), (400, "BAD_REQUEST"), "{path} {body}: {answer:?}");
        assert!(answer.text().contains("for the second time"), "{path}: {answer:?}");
    }
    assert_eq!(streams(&server, "GET", "/a", &Value::Null).status, 404, "nothing was made");
}

#[test]
fn streams_of_the_file_are_listed_and_not_changed_and_win_over_those_that_were_made() {
    let upstream = Upstream::start();
    upstream.set_json("/a", "1");
    upstream.set_json("/b", "2");
    let setup =
        Setup::new().stream("file", &format!("{}?key=secret", upstream.url("/a")), "headers = { X-Key = \"secret\" }");
    let server = setup.start();
    make(&server, "made", &upstream.url("/b"));
    let list = streams(&server, "GET", "", &Value::Null).json();
    let seen: Vec<_> = list["streams"].as_array().expect("a list").iter().map(|s| (&s["id"], &s["source"])).collect();
    assert_eq!(seen, [(&json!("file"), &json!("file")), (&json!("made"), &json!("admin"))]);
    let file = streams(&server, "GET", "/file", &Value::Null);
    assert_eq!((file.status, file.header("etag")), (200, None));
    let shown = file.json();
    assert_eq!((&shown["interval"], &shown["headers"]), (&json!("20ms"), &json!({ "X-Key": "***" })));
    assert!(!file.text().contains("secret"), "{shown}");
    for method in ["PUT", "DELETE"] {
        let answer = streams(&server, method, "/file", &json!({ "url": upstream.url("/b") }));
        assert_eq!(answer.status, 409, "{answer:?}");
    }

    // The file may take over what was made, and give it back.
    let mut ws = watching(&server, &token_of("u1"), "/v1/streams/made");
    server.reload(&setup.clone().stream("made", &upstream.url("/a"), ""));
    assert_eq!(ws.next_of("snapshot")["data"], json!(1));
    assert_eq!(server.log_count("stands in the configuration too, which counts"), 1);
    assert_eq!(streams(&server, "DELETE", "/made", &Value::Null).status, 409);
    server.reload(&setup);
    assert_eq!(ws.next_of("snapshot")["data"], json!(2));
    assert_eq!(streams(&server, "DELETE", "/made", &Value::Null).status, 204);
    assert_eq!(ws.closed(), (4004, "stream_ended".to_owned()));
}

#[test]
fn a_template_that_is_made_is_filled_for_those_who_are_verified_from_then_on() {
    let upstream = Upstream::start();
    upstream.set_json("/companies/c1", r#"{"of":"c1"}"#);
    upstream.set_json("/companies/c2", r#"{"of":"c2"}"#);
    let server = Setup::new().stream("file", &upstream.url("/companies/c1"), "").start();
    let token = |company: &str| mint(json!({ "sub": company, "companyId": company, "exp": now_s() + 600 }));
    let tokens = [token("c1"), token("c2")];
    for token in &tokens {
        // The tokens are known before the template names a claim of theirs.
        assert_eq!(server.get("/v1/streams/file", &[bearer(token)]).status, 200);
    }
    make(&server, "mine", &format!("{}/{{claims.companyId}}", upstream.url("/companies")));
    for (token, company) in tokens.iter().zip(["c1", "c2"]) {
        for _ in 0..4 {
            let answer = server.get("/v1/streams/mine", &[bearer(token)]);
            assert_eq!((answer.status, answer.json()), (200, json!({ "of": company })));
        }
    }
    // All of its filled-in URLs are polled at once.
    let body = json!({ "url": format!("{}/{{claims.companyId}}", upstream.url("/companies")), "interval": "1h" });
    assert_eq!(streams(&server, "PUT", "/mine", &body).status, 200);
    let mut sockets: Vec<_> = tokens.iter().map(|token| watching(&server, token, "/v1/streams/mine")).collect();
    for company in ["c1", "c2"] {
        upstream.set_json(&format!("/companies/{company}"), r#"{"of":"everybody"}"#);
    }
    assert_eq!(order(&server, "mine", "refresh").status, 202);
    for ws in &mut sockets {
        assert_eq!(ws.next_of("snapshot")["data"], json!({ "of": "everybody" }));
    }
}

#[test]
fn what_no_administrator_may_have_polled_is_refused_and_nothing_is_left_of_it() {
    let upstream = Upstream::start();
    upstream.set_json("/a", "1");
    let server = Setup::new().start();
    make(&server, "leads", &upstream.url("/a"));
    for (url, reason) in [
        ("http://169.254.169.254/latest/meta-data/", "special_address"),
        ("http://0xa9fea9fe/", "special_address"),
        ("http://[::ffff:a9fe:a9fe]/", "special_address"),
        ("http://[fe80::1]/", "special_address"),
        ("http://metadata.google.internal/", "metadata_name"),
        ("http://user:hunter2@127.0.0.1/", "user_in_url"),
    ] {
        for (method, path) in [("POST", ""), ("PUT", "/leads")] {
            let id = if method == "POST" { "bad" } else { "leads" };
            let answer = streams(&server, method, path, &json!({ "id": id, "url": url }));
            assert_eq!((answer.status, answer.code()), (403, "TARGET_BLOCKED".to_owned()), "{url}: {answer:?}");
            let errors = answer.json()["errors"].clone();
            let said = errors[0].as_str().expect("a sentence").to_owned();
            assert!(said.starts_with("`stream.url`: ") && said.contains(reason), "{url}: {said}");
            assert!(!answer.text().contains("hunter2"), "{answer:?}");
        }
    }
    let headers = json!({ "X-Forwarded-For": "10.0.0.1", "Metadata-Flavor": "Google", "X-Good": "hunter2" });
    let body = json!({ "id": "bad", "url": upstream.url("/a"), "headers": headers });
    let answer = streams(&server, "POST", "", &body);
    assert_eq!((answer.status, answer.code()), (403, "TARGET_BLOCKED".to_owned()), "{answer:?}");
    assert_eq!(answer.json()["errors"].as_array().expect("errors").len(), 2, "{answer:?}");
    assert!(!answer.text().contains("hunter2"), "{answer:?}");
    for url in ["ftp://127.0.0.1/", "file:///etc/passwd", "http://127.0.0.1/\nx"] {
        let answer = streams(&server, "POST", "", &json!({ "id": "bad", "url": url }));
        assert!(matches!(answer.status, 400 | 403), "{url}: {answer:?}");
    }
    assert_eq!(streams(&server, "GET", "/bad", &Value::Null).status, 404);
    assert_eq!(value(&server, "leads"), (200, json!(1)), "it is what it was");
}

#[test]
fn stream_urls_narrow_what_may_be_polled_and_block_what_was_made_before() {
    let (upstream, other) = (Upstream::start(), Upstream::start());
    upstream.set_json("/public/a", "1");
    other.set_json("/a", "2");
    let listing = |urls: &str| Setup::new().admin(&format!("stream_urls = {urls}"));
    let server = Setup::new().start();
    make(&server, "listed", &upstream.url("/public/a"));
    make(&server, "unlisted", &other.url("/a"));
    let mut watchers =
        ["listed", "unlisted"].map(|id| watching(&server, &token_of("u1"), &format!("/v1/streams/{id}")));

    let pattern = format!("[\"http://{}/public/*\"]", upstream.address());
    server.reload(&listing(&pattern));
    let status = watchers[1].next_of("stream_status");
    assert_eq!((&status["state"], &status["code"]), (&json!("failing"), &json!("UPSTREAM_BLOCKED")), "{status}");
    let said = server.wait_for_log("A stream that the admin API has made is not polled: it is blocked.", 1);
    assert!(said.contains("stream=unlisted") && said.contains("not_listed"), "{said}");
    let shown = streams(&server, "GET", "/unlisted", &Value::Null).json();
    assert!(shown["warnings"][0].as_str().is_some_and(|said| said.contains("not_listed")), "{shown}");
    for (id, url) in
        [("more", other.url("/a")), ("more", upstream.url("/private")), ("more", upstream.url("/public/..%2fx"))]
    {
        let answer = streams(&server, "POST", "", &json!({ "id": id, "url": url }));
        assert_eq!((answer.status, answer.code()), (403, "TARGET_BLOCKED".to_owned()), "{url}: {answer:?}");
    }
    make(&server, "more", &upstream.url("/public/{claims.sub}"));
    upstream.set_json("/public/a", "3");
    watchers[0].next_of("snapshot");
    let requests = other.request_count();

    // What is taken back is polled again, and no watcher was closed.
    server.reload(&listing("[]"));
    assert_eq!(watchers[1].next_of("snapshot")["data"], json!(2));
    assert!(other.request_count() > requests);
}

#[test]
fn a_stream_of_the_state_file_that_may_not_be_polled_is_told_of_and_ends_no_start() {
    let folder = Folder::new("managed-blocked");
    let upstream = Upstream::start();
    upstream.set_json("/a", "1");
    let setup = Setup::new().server(&folder.state_line());
    let server = setup.start();
    make(&server, "good", &upstream.url("/a"));
    make(&server, "routed", &upstream.url("/a"));
    make(&server, "inward", &upstream.url("/a"));
    drop(server);
    let before = upstream.request_count();
    // As an older version, or somebody else's hand, has left it.
    let mut state: Value = serde_json::from_slice(&fs::read(folder.state()).expect("the state")).expect("JSON");
    let made = &mut state["sections"]["streams"]["made"];
    assert!(made["inward"]["stream"]["url"].is_string() && made["routed"]["stream"].is_object(), "{made}");
    made["inward"]["stream"]["url"] = json!("http://169.254.169.254/latest/");
    made["routed"]["stream"]["headers"] = json!({ "X-Forwarded-For": "10.0.0.1" });
    fs::write(folder.state(), state.to_string()).expect("written");

    let server = setup.start();
    for (id, reason) in [("inward", "special_address"), ("routed", "impersonating_header")] {
        let mut ws = watching_nothing(&server, id);
        let status = ws.next_of("stream_status");
        assert_eq!((&status["state"], &status["code"]), (&json!("failing"), &json!("UPSTREAM_BLOCKED")), "{status}");
        let log = server.log_text();
        let said = log.lines().find(|line| line.contains("it is blocked") && line.contains(&format!("stream={id}")));
        assert!(said.is_some_and(|said| said.contains(reason)), "{log}");
    }
    assert_eq!(upstream.request_count(), before, "nothing was sent to it");
    assert_eq!(value(&server, "good"), (200, json!(1)));
    // It is put right as it would be made.
    let body = json!({ "url": upstream.url("/a"), "interval": "20ms" });
    assert_eq!(streams(&server, "PUT", "/inward", &body).status, 200);
    assert_eq!(value(&server, "inward"), (200, json!(1)));
    assert_eq!(streams(&server, "DELETE", "/routed", &Value::Null).status, 204);
}

/// A WebSocket on a stream that gives no value.
fn watching_nothing(server: &Server, id: &str) -> support::server::Ws {
    let mut ws = server.ws(&format!("/v1/streams/{id}"), &[bearer(&token_of("u1"))]);
    ws.next_of("welcome");
    ws
}

#[test]
fn the_token_endpoint_of_a_stream_that_is_made_is_judged_too() {
    let (upstream, idp) = (Upstream::start(), Upstream::start());
    upstream.set_json("/a", "1");
    idp.set_json("/token", r#"{"access_token":"t1","token_type":"Bearer","expires_in":3600}"#);
    let body = |id: &str, token_url: &str| {
        let auth = json!({ "kind": "oauth2", "token_url": token_url, "client_id": "c", "client_secret": "s" });
        json!({ "id": id, "url": upstream.url("/a"), "interval": "20ms", "auth": auth })
    };
    let server = Setup::new().start();
    let answer = streams(&server, "POST", "", &body("bad", "https://169.254.169.254/token"));
    assert_eq!((answer.status, answer.code()), (403, "TARGET_BLOCKED".to_owned()), "{answer:?}");
    assert!(answer.text().contains("stream.auth.token_url"), "{answer:?}");
    assert_eq!(streams(&server, "POST", "", &body("good", &idp.url("/token"))).status, 201);
    assert_eq!(value(&server, "good"), (200, json!(1)));
    assert_eq!(idp.request_count(), 1);
    let listing = format!("stream_urls = [\"http://{}/*\"]", upstream.address());
    server.reload(&Setup::new().admin(&listing));
    let mut ws = watching_nothing(&server, "good");
    let status = ws.next_of("stream_status");
    assert_eq!(status["code"], "UPSTREAM_BLOCKED", "{status}");
}

#[test]
fn an_action_polls_a_stream_that_was_made_after_the_file_was_read() {
    let upstream = Upstream::start();
    upstream.set_json("/a", "1");
    upstream.set("/act", Reply::status(204));
    let server = Setup::new().action("change", &upstream.url("/act"), "refresh = [\"made\"]").start();
    assert!(server.log_text().contains("which is no [[stream]] of the file"), "{}", server.log_text());
    let body = json!({ "id": "made", "url": upstream.url("/a"), "interval": "1h" });
    assert_eq!(streams(&server, "POST", "", &body).status, 201);
    let mut ws = watching(&server, &token_of("u1"), "/v1/streams/made");
    upstream.set_json("/a", "2");
    ws.send(json!({ "type": "change", "id": 1 }));
    assert_eq!(ws.next_of("snapshot")["data"], json!(2));
}

#[test]
fn a_refresh_polls_at_once_obeys_retry_after_and_cannot_be_used_to_flood_an_upstream() {
    let upstream = Upstream::start();
    upstream.set_json("/a", "1");
    let server = Setup::new().stream("slow", &upstream.url("/a"), "interval = \"1h\"").start();
    let mut ws = watching(&server, &token_of("u1"), "/v1/streams/slow");
    let begun = Instant::now();
    upstream.set_json("/a", "2");
    assert_eq!(order(&server, "slow", "refresh").status, 202);
    ws.next_of("snapshot");
    let before = upstream.request_count();
    let mut asked = 0;
    while begun.elapsed() < Duration::from_secs(2) {
        assert_eq!(order(&server, "slow", "refresh").status, 202);
        asked += 1;
    }
    let most = usize::try_from(begun.elapsed().as_millis() / 100).expect("small") + 2;
    let polls = upstream.request_count() - before;
    assert!(polls <= most && polls < asked, "{polls} polls, {asked} asked for");

    // What was changed before the last of them is seen.
    upstream.set_json("/a", "3");
    assert_eq!(order(&server, "slow", "refresh").status, 202);
    assert_eq!(ws.next_of("snapshot")["data"], json!(3));

    let refuse = Reply::status(429).header("Retry-After", "3600");
    upstream.set("/a", refuse);
    assert_eq!(order(&server, "slow", "refresh").status, 202);
    assert_eq!(ws.next_of("stream_status")["code"], "UPSTREAM_RATE_LIMITED");
    let before = upstream.request_count();
    for _ in 0..5 {
        assert_eq!(order(&server, "slow", "refresh").status, 202);
    }
    assert!(ws.is_quiet_for(Duration::from_millis(500)));
    assert_eq!(upstream.request_count(), before, "it has asked to be left alone");
}

#[test]
fn thousands_of_streams_are_made_and_a_change_of_one_is_cheap() {
    let (upstream, folder) = (Upstream::start(), Folder::new("managed-thousands"));
    upstream.set_json("/a", "1");
    // As if they had been made one by one.
    let made: serde_json::Map<String, Value> = (0..9_999)
        .map(|n| {
            let stream = json!({ "id": format!("s{n}"), "url": upstream.url("/a"), "interval": "1h" });
            (format!("s{n}"), json!({ "tag": "0", "created_at": 1, "changed_at": 1, "stream": stream }))
        })
        .collect();
    let state = json!({ "version": 1, "sections": { "streams": { "made": made, "stopped": [] } } });
    fs::write(folder.state(), state.to_string()).expect("written");
    let server = Setup::new().server(&folder.state_line()).log("level = \"info\"").start();
    let mut ws = watching(&server, &token_of("u1"), "/v1/streams/s7");
    make(&server, "last", &upstream.url("/a"));
    let full = streams(&server, "POST", "", &json!({ "id": "more", "url": upstream.url("/a") }));
    assert_eq!(full.status, 409, "{full:?}");
    let begun = Instant::now();
    for n in 0..10 {
        let url = format!("{}?n={n}", upstream.url("/a"));
        assert_eq!(streams(&server, "PUT", "/last", &json!({ "url": url, "interval": "1h" })).status, 200);
    }
    // Most of it is the state file, written whole and synced; a debug build on a busy machine.
    assert!(begun.elapsed() < Duration::from_secs(30), "ten changes took {:?}", begun.elapsed());
    assert!(ws.is_quiet_for(Duration::from_millis(50)), "the others notice nothing");
    assert_eq!(streams(&server, "DELETE", "/s7", &Value::Null).status, 204);
    assert_eq!(ws.closed(), (4004, "stream_ended".to_owned()));
}
