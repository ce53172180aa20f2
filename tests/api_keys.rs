//! API keys as programs and operators meet them: made, used, ended, deleted, kept across restarts; and the state file
//! that keeps them.

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ring::digest;
use serde_json::{Value, json};

use support::server::{
    ADMIN_KEY, DRIVERS, PATIENCE, Raw, Server, Setup, bearer, eventually, keys, mint, now_s, now_us, run, token_of,
};
use support::{Folder, Upstream};

/// The contract's: how late the end of a key may be.
const BOUND: Duration = Duration::from_millis(250);

/// Makes a key: its id and its text.
fn make(server: &Server, wanted: &Value) -> (String, String) {
    let answer = keys(server, "POST", "", &wanted.to_string());
    assert_eq!(answer.status, 201, "{answer:?}");
    assert_eq!(answer.header("cache-control"), Some("no-store"));
    let made = answer.json();
    (made["id"].as_str().expect("an id").to_owned(), made["key"].as_str().expect("a key").to_owned())
}

fn with(key: &str) -> [(&'static str, String); 1] {
    [("X-Api-Key", key.to_owned())]
}

fn upstream() -> Upstream {
    let upstream = Upstream::start();
    upstream.set_json("/leads", r#"[{"id":1}]"#);
    upstream.set_json("/orders", r#"[{"id":2}]"#);
    upstream
}

fn setup(upstream: &Upstream) -> Setup {
    Setup::new()
        .stream("leads", &upstream.url("/leads"), "")
        .stream("orders:1", &upstream.url("/orders"), "")
        .stream("agents", &upstream.url("/leads"), "roles = [\"agent\"]")
        .stream("readers", &upstream.url("/leads"), "permissions = [\"leads.read\"]")
        .stream("mine", &format!("{}/{{claims.companyId}}", upstream.url("/companies")), "")
}

/// What an operator may write into the file: the hash of `key`, as `sha256sum` makes it.
fn hash_of(key: &str) -> String {
    let salt = "0123abcd";
    let digest = digest::digest(&digest::SHA256, format!("{salt}{key}").as_bytes());
    let hex: String = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{salt}:{hex}")
}

#[test]
fn a_key_opens_its_streams_in_every_representation_and_no_others() {
    for driver in DRIVERS {
        let upstream = upstream();
        let server = setup(&upstream).driver(driver).start();
        let (id, key) = make(&server, &json!({ "streams": ["leads", "orders:*", "agents", "mine", "gone"] }));
        assert_eq!(key.len(), "rck_".len() + id.len() + 1 + 43, "{key}");

        let mut ws = server.ws("/v1/streams/leads", &with(&key));
        let welcome = ws.next();
        assert_eq!(welcome["auth"], json!({ "type": "api_key", "sub": id, "expires_at": null }));
        assert_eq!(ws.next_of("snapshot")["data"], json!([{ "id": 1 }]));
        let mut sse = server.sse("/v1/streams/orders:1", &with(&key));
        assert_eq!(sse.next_of("welcome").data["auth"]["type"], "api_key");
        assert_eq!(sse.next_of("snapshot").data["data"], json!([{ "id": 2 }]));
        let answer = server.get("/v1/streams/leads", &with(&key));
        assert_eq!((answer.status, answer.json()), (200, json!([{ "id": 1 }])));

        let mut many = server.ws("/v1/ws", &with(&key));
        many.next_of("welcome");
        many.send(json!({ "type": "subscribe", "stream": "orders:1", "id": 1 }));
        many.next_of("subscribed");
        many.send(json!({ "type": "subscribe", "stream": "readers", "id": 2 }));
        assert_eq!(many.next_of("error")["code"], "FORBIDDEN", "it is not among its streams");

        for (stream, status, code) in [
            ("readers", 403, "FORBIDDEN"),
            ("nowhere", 403, "FORBIDDEN"),
            ("gone", 404, "STREAM_NOT_FOUND"),
            ("agents", 403, "INSUFFICIENT_PERMISSIONS"),
            ("mine", 403, "CLAIM_MISSING"),
        ] {
            let answer = server.get(&format!("/v1/streams/{stream}"), &with(&key));
            assert_eq!((answer.status, &answer.json()["code"]), (status, &json!(code)), "{stream}");
        }

        // A change arrives like everybody's.
        upstream.set_json("/leads", r#"[{"id":3}]"#);
        assert_eq!(ws.next_of("snapshot")["seq"], 2);
        assert!(server.metric(&["restcast_api_key_handshakes_total", "result=\"ok\""]) >= 8.0);
    }
}

#[test]
fn a_wrong_key_is_401_however_it_is_wrong_and_nothing_else_is_tried() {
    let upstream = upstream();
    let server = setup(&upstream).stream("open", &upstream.url("/leads"), "allow_anonymous = true").start();
    let (id, key) = make(&server, &json!({ "streams": ["*"] }));
    let (_, other) = make(&server, &json!({ "streams": ["*"] }));
    let secret_of = |key: &str| key[key.len() - 43..].to_owned();
    let mut said = Vec::new();
    for wrong in [
        format!("rck_{id}_{}", secret_of(&other)),
        format!("rck_nobody_{}", secret_of(&key)),
        key[..key.len() - 1].to_owned(),
        "rck_".to_owned(),
        "a-password".to_owned(),
        "k".repeat(8_000),
    ] {
        for stream in ["leads", "open", "nowhere"] {
            let answer = server.get(&format!("/v1/streams/{stream}"), &with(&wrong));
            assert_eq!(answer.status, 401, "{answer:?}");
            assert_eq!(answer.header("www-authenticate"), Some("Bearer error=\"invalid_token\""));
            said.push(answer.text());
        }
    }
    said.dedup();
    assert_eq!(said.len(), 1, "nothing tells what was wrong: {said:?}");
    let twice = [with(&key), with(&key)].concat();
    assert_eq!(server.get("/v1/streams/leads", &twice).status, 400);
    // A JWT is read first, and a bad one is not made good by a key behind it.
    let both = [bearer(&token_of("u1")), with("rck_nonsense")[0].clone()];
    assert_eq!(server.get("/v1/streams/leads", &both).status, 200);
    let both = [bearer("nonsense"), with(&key)[0].clone()];
    assert_eq!(server.get("/v1/streams/leads", &both).status, 401);
    assert!(server.metric(&["restcast_api_key_handshakes_total", "result=\"unknown\""]) >= 18.0);
}

#[test]
fn failures_with_keys_count_for_the_address() {
    let upstream = upstream();
    let server = setup(&upstream).limits("auth_failures_per_minute = 3").start();
    let (_, key) = make(&server, &json!({ "streams": ["*"] }));
    let wrong = key.replace("rck_", "rck_x");
    let statuses: Vec<u16> = (0..8).map(|_| server.get("/v1/streams/leads", &with(&wrong)).status).collect();
    assert_eq!(statuses[..6], [401; 6]);
    assert_eq!(statuses[7], 429, "{statuses:?}");
    assert_eq!(server.get("/v1/streams/leads", &with(&key)).status, 429, "nor is a good one looked at");
}

#[test]
fn a_key_of_the_file_has_its_roles_and_streams() {
    let upstream = upstream();
    let random = "A".repeat(43);
    let key = |id: &str| format!("rck_{id}_{random}");
    let entry =
        |id: &str, lines: &str| format!("[[auth.api_key]]\nid = {id:?}\nhash = {:?}\n{lines}\n", hash_of(&key(id)));
    let setup = setup(&upstream).no_keys();
    let text = |keys: &str| format!("{}{keys}", setup.text());
    let agent = entry("agent", "streams = [\"agents\", \"leads\"]\nroles = [\"agent\"]");
    let reader = entry("reader", "streams = [\"readers\"]\npermissions = [\"leads.read\"]");
    let server = setup.start();
    assert_eq!(server.get("/v1/streams/leads", &with(&key("agent"))).status, 401);
    server.reload_text(&text(&format!("{agent}{reader}")));
    let statuses = |name: &str| {
        ["agents", "readers", "leads"]
            .map(|stream| server.get(&format!("/v1/streams/{stream}"), &with(&key(name))).status)
    };
    eventually("the keys are in force", || (statuses("agent") == [200, 403, 200]).then_some(()));
    assert_eq!(statuses("reader"), [403, 200, 403]);

    // What a reload changes holds for who is connected: other roles, then none of its streams, then no such key.
    let mut stays = server.ws("/v1/streams/readers", &with(&key("reader")));
    stays.next_of("snapshot");
    let mut agents = server.ws("/v1/streams/agents", &with(&key("agent")));
    agents.next_of("snapshot");
    let mut leads = server.ws("/v1/streams/leads", &with(&key("agent")));
    leads.next_of("snapshot");
    let plain = entry("agent", "streams = [\"agents\", \"leads\"]");
    server.reload_text(&text(&format!("{plain}{reader}")));
    assert_eq!(agents.closed(), (4003, "forbidden".to_owned()));
    upstream.set_json("/leads", r#"[{"id":7}]"#);
    leads.next_of("snapshot");
    server.reload_text(&text(&reader));
    assert_eq!(leads.closed(), (4010, "api_key_revoked".to_owned()));
    assert_eq!(server.get("/v1/streams/leads", &with(&key("agent"))).status, 401);
    // Another key under the same id is another key.
    let other = format!("[[auth.api_key]]\nid = \"reader\"\nhash = {:?}\nstreams = [\"*\"]\n", hash_of("another"));
    server.reload_text(&text(&other));
    assert_eq!(stays.closed(), (4010, "api_key_revoked".to_owned()));
}

/// Has a key deleted that many use; how long it takes until the last of them is told.
fn last_is_told_of_a_deletion(server: &Server) -> Duration {
    let (id, key) = make(server, &json!({ "streams": ["*"], "id": "victim" }));
    assert_eq!(id, "victim");
    let mut sockets: Vec<_> = (0..24).map(|_| server.ws("/v1/streams/leads", &with(&key))).collect();
    sockets.iter_mut().for_each(|ws| drop(ws.next_of("snapshot")));
    let mut sse = server.sse("/v1/streams/leads", &with(&key));
    sse.next_of("snapshot");
    let etag = server.get("/v1/streams/leads", &with(&key)).header("etag").expect("a tag").to_owned();
    let mut waiting = server.connect();
    let wait = [with(&key)[0].clone(), ("If-None-Match", etag), ("Prefer", "wait=60".to_owned())];
    waiting.send_request("GET", "/v1/streams/leads", &wait, "");
    eventually("the poll waits", || (server.metric(&["restcast_connections{", "json_wait"]) >= 1.0).then_some(()));

    let answer = keys(server, "DELETE", "/victim", "");
    assert_eq!((answer.status, answer.body.len()), (204, 0));
    let deleted = Instant::now();
    for ws in &mut sockets {
        assert_eq!(ws.closed(), (4010, "api_key_revoked".to_owned()));
    }
    let close = sse.next_of("close");
    assert_eq!((&close.data["code"], &close.data["reason"]), (&json!(4010), &json!("api_key_revoked")));
    let answer = waiting.answer();
    assert_eq!((answer.status, &answer.json()["code"]), (401, &json!("TOKEN_REVOKED")));
    let took = deleted.elapsed();
    assert_eq!(server.get("/v1/streams/leads", &with(&key)).status, 401);
    took
}

#[test]
fn a_deleted_key_closes_its_connections_on_every_core_within_250_ms() {
    for driver in DRIVERS {
        let upstream = upstream();
        let server = setup(&upstream).driver(driver).cores(2).start();
        let (others_id, kept) = make(&server, &json!({ "streams": ["*"], "roles": ["agent"] }));
        let mut others: Vec<_> = (0..4).map(|_| server.ws("/v1/streams/leads", &with(&kept))).collect();
        others.iter_mut().for_each(|ws| drop(ws.next_of("snapshot")));
        let mut jwt = server.ws("/v1/streams/leads", &[bearer(&token_of("victim"))]);
        jwt.next_of("snapshot");
        // The bound is the contract's; the machine may be too busy to keep it at any one time, but not each time.
        let mut took = Vec::new();
        while took.len() < 5 && took.iter().all(|took| *took >= BOUND) {
            took.push(last_is_told_of_a_deletion(&server));
        }
        assert!(took.iter().any(|took| *took < BOUND), "the last was told {took:?} after the deletion");

        // Everybody else goes on, also when a user of that name is logged out or loses every right.
        let order = |method: &str, path: &str, body: &Value| {
            server.order(method, &format!("users/{others_id}/{path}"), body).status
        };
        assert!(order("PUT", "permissions", &json!({ "permissions": [], "roles": [] })) < 300);
        assert!(order("POST", "logout", &json!({})) < 300);
        upstream.set_json("/leads", r#"[{"id":9}]"#);
        others.iter_mut().for_each(|ws| drop(ws.next_of("snapshot")));
        jwt.next_of("snapshot");
        assert_eq!(keys(&server, "DELETE", "/victim", "").status, 404);
        assert!(server.metric(&["restcast_closes_total", "api_key_revoked"]) >= 25.0);
    }
}

#[test]
fn a_key_ends_at_its_time_to_within_250_ms() {
    let upstream = upstream();
    let server = setup(&upstream).auth("reauth_before = \"200ms\"").start();
    // The bound is the contract's; the machine may be too busy to keep it at any one time, but not each time.
    let mut late = Vec::new();
    while late.len() < 5 && late.iter().all(|late| *late >= BOUND) {
        late.push(lateness_of_an_end(&server));
    }
    assert!(late.iter().any(|late| *late < BOUND), "closed {late:?} after its end");
    assert!(server.metric(&["restcast_api_key_handshakes_total", "result=\"expired\""]) >= 1.0);
}

/// Uses a key until it ends; how late that was.
fn lateness_of_an_end(server: &Server) -> Duration {
    let expires = now_us() + 3_000_000;
    let (id, key) = make(server, &json!({ "streams": ["leads"], "expires_at": expires }));
    let mut ws = server.ws("/v1/streams/leads", &with(&key));
    assert_eq!(ws.next()["auth"], json!({ "type": "api_key", "sub": id, "expires_at": expires }));
    let mut sse = server.sse("/v1/streams/leads", &with(&key));
    let etag = server.get("/v1/streams/leads", &with(&key)).header("etag").expect("a tag").to_owned();
    let mut waiting = server.connect();
    let wait = [with(&key)[0].clone(), ("If-None-Match", etag), ("Prefer", "wait=60".to_owned())];
    waiting.send_request("GET", "/v1/streams/leads", &wait, "");
    assert_eq!(ws.next_of("reauthenticate")["expires_at"], expires);
    assert_eq!(ws.closed(), (4001, "api_key_expired".to_owned()));
    let closed = now_us();
    assert!(closed >= expires, "{} us early", expires - closed);
    assert_eq!(sse.next_of("close").data["reason"], "api_key_expired");
    assert_eq!(waiting.answer().json()["code"], "TOKEN_EXPIRED");
    let answer = server.get("/v1/streams/leads", &with(&key));
    assert_eq!((answer.status, &answer.json()["code"]), (401, &json!("TOKEN_EXPIRED")));
    Duration::from_micros(closed - expires)
}

#[test]
fn a_key_has_its_rate_across_cores_and_whoever_does_not_have_it_does_not_use_it_up() {
    let upstream = upstream();
    let server = setup(&upstream).limits("auth_failures_per_minute = 0").start();
    let (id, key) = make(&server, &json!({ "streams": ["*"], "rate": 10 }));
    let wrong = format!("rck_{id}_{}", "A".repeat(43));
    for _ in 0..20 {
        assert_eq!(server.get("/v1/streams/leads", &with(&wrong)).status, 401);
    }
    let begun = Instant::now();
    let mut statuses = Vec::new();
    let refused = loop {
        let answer = server.get("/v1/streams/leads", &with(&key));
        statuses.push(answer.status);
        if answer.status == 429 {
            break answer;
        }
        assert!(begun.elapsed() < PATIENCE, "{statuses:?}");
    };
    // One more for each six seconds that this took.
    let most = 10 + usize::try_from(begun.elapsed().as_secs() / 6).expect("small");
    assert!((10..=most + 1).contains(&(statuses.len() - 1)), "{statuses:?}");
    assert_eq!(refused.json()["code"], "RATE_LIMITED");
    let wait: u64 = refused.header("retry-after").expect("it says when").parse().expect("seconds");
    assert!((1..=6).contains(&wait), "{wait}");
    assert_eq!(server.try_ws("/v1/ws", &with(&key)).err().map(|answer| answer.status), Some(429));
    assert_eq!(server.get("/v1/streams/leads", &[bearer(&token_of(&id))]).status, 200, "a user of that name may");
    assert!(server.metric(&["restcast_api_key_handshakes_total", "result=\"rate_limited\""]) >= 2.0);
}

#[test]
fn nobody_becomes_a_key_by_auth_update_and_no_key_a_user() {
    let upstream = upstream();
    let server = setup(&upstream).start();
    let (id, key) = make(&server, &json!({ "streams": ["leads"] }));
    let token = mint(json!({ "sub": id, "exp": now_s() + 600 }));
    let mut ws = server.ws("/v1/streams/leads", &with(&key));
    ws.next_of("snapshot");
    ws.send(json!({ "type": "auth_update", "token": token, "id": 1 }));
    let error = ws.next_of("error");
    assert_eq!((&error["code"], &error["id"]), (&json!("AUTH_SUBJECT_MISMATCH"), &json!(1)));
    ws.send(json!({ "type": "auth_update", "token": key, "id": 2 }));
    assert_eq!(ws.next_of("error")["code"], "AUTH_UPDATE_REJECTED", "a key is presented at the handshake alone");
    ws.send(json!({ "type": "auth_update", "id": 3 }));
    assert_eq!(ws.next_of("error")["code"], "AUTH_UPDATE_REJECTED");
    upstream.set_json("/leads", r#"[{"id":5}]"#);
    ws.next_of("snapshot");
}

#[test]
fn a_ticket_made_with_a_key_lives_and_dies_with_it() {
    let upstream = upstream();
    let server = setup(&upstream).start();
    let (id, key) = make(&server, &json!({ "streams": ["leads"] }));
    let ticket = || {
        let answer = server.request("POST", "/v1/tickets", &with(&key), "");
        assert_eq!(answer.status, 201, "{answer:?}");
        answer.json()["ticket"].as_str().expect("a ticket").to_owned()
    };
    let path = |stream: &str, ticket: &str| format!("/v1/streams/{stream}?ticket={ticket}");
    let mut ws = server.ws(&path("leads", &ticket()), &[]);
    assert_eq!(ws.next()["auth"], json!({ "type": "ticket", "sub": id, "expires_at": null }));
    ws.next_of("snapshot");
    assert_eq!(server.get(&path("orders:1", &ticket()), &[]).status, 403, "it has the key's streams");
    let mut direct = server.ws("/v1/streams/leads", &with(&key));
    direct.next_of("snapshot");
    direct.send(json!({ "type": "auth_update", "token": ticket(), "id": 1 }));
    direct.next_of("auth_ok");
    let mut user = server.ws("/v1/streams/leads", &[bearer(&token_of(&id))]);
    user.next_of("snapshot");
    user.send(json!({ "type": "auth_update", "token": ticket(), "id": 2 }));
    assert_eq!(user.next_of("error")["code"], "AUTH_SUBJECT_MISMATCH");
    // A user whose id is spelled like the key's logs out: that is not the key.
    let answer = server.order("POST", &format!("users/{id}/logout"), &Value::Null);
    assert!((200..300).contains(&answer.status), "{answer:?}");
    assert_eq!(user.closed(), (4010, "logged_out".to_owned()));
    for socket in [&mut ws, &mut direct] {
        socket.send(json!({ "type": "auth_update", "token": ticket(), "id": 3 }));
        assert_eq!(socket.next_of("auth_ok")["id"], 3);
    }
    let left = ticket();
    assert_eq!(keys(&server, "DELETE", &format!("/{id}"), "").status, 204);
    assert_eq!(ws.closed(), (4010, "api_key_revoked".to_owned()));
    assert_eq!(direct.closed(), (4010, "api_key_revoked".to_owned()));
    let answer = server.get(&path("leads", &left), &[]);
    assert_eq!((answer.status, &answer.json()["code"]), (401, &json!("TOKEN_REVOKED")));
}

/// Asks for more and more over one connection and reads what comes, until it is told to end: a core has long turns then.
fn keep_busy(server: &Server, over: &Arc<AtomicBool>) -> Vec<JoinHandle<()>> {
    let path = "/v1/streams/leads";
    let request =
        format!("GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\n\r\n", token_of("u1")).repeat(100);
    let socket = TcpStream::connect(server.listen).expect("it accepts");
    let mut reads = socket.try_clone().expect("a descriptor");
    let (until, mut writes) = (Arc::clone(over), socket);
    let writer = thread::spawn(move || {
        while !until.load(Ordering::SeqCst) && writes.write_all(request.as_bytes()).is_ok() {}
        let _ = writes.shutdown(Shutdown::Both);
    });
    let reader = thread::spawn(move || while reads.read(&mut [0; 64 << 10]).is_ok_and(|count| count > 0) {});
    vec![writer, reader]
}

#[test]
fn what_was_answered_holds_for_whatever_is_sent_afterwards_however_busy_the_cores_are() {
    let upstream = upstream();
    // More cores than processors: each is made to wait in the middle of its turns.
    let server = setup(&upstream).cores(8).limits("auth_failures_per_minute = 0").start();
    let over = Arc::new(AtomicBool::new(false));
    let busy: Vec<_> = (0..16).flat_map(|_| keep_busy(&server, &over)).collect();
    let mut conns: Vec<Raw> = (0..32).map(|_| server.connect()).collect();
    let mut all_say = |status: u16, stream: &str, credential: (&'static str, String)| {
        let path = format!("/v1/streams/{stream}");
        conns.iter_mut().for_each(|conn| conn.send_request("GET", &path, std::slice::from_ref(&credential), ""));
        let statuses: Vec<u16> = conns.iter_mut().map(|conn| conn.answer().status).collect();
        assert!(statuses.iter().all(|said| *said == status), "{status} is right for {stream}: {statuses:?}");
    };
    for round in 0..12 {
        let (id, key) = make(&server, &json!({ "streams": ["leads"] }));
        all_say(200, "leads", ("X-Api-Key", key.clone()));
        assert_eq!(keys(&server, "DELETE", &format!("/{id}"), "").status, 204);
        all_say(401, "leads", ("X-Api-Key", key));
        let stream = format!("made-{round}");
        let made = json!({ "id": stream, "url": upstream.url("/leads"), "interval": "1h" });
        assert_eq!(server.order("POST", "streams", &made).status, 201);
        all_say(200, &stream, bearer(&token_of("u2")));
        assert_eq!(server.order("DELETE", &format!("streams/{stream}"), &Value::Null).status, 204);
        all_say(404, &stream, bearer(&token_of("u2")));
    }
    over.store(true, Ordering::SeqCst);
    busy.into_iter().for_each(|thread| thread.join().expect("it ends"));
}

#[test]
fn keys_are_listed_without_what_they_are_and_every_change_is_in_the_log() {
    let upstream = upstream();
    let random = "B".repeat(43);
    let hash = hash_of(&format!("rck_in-file_{random}"));
    let entry = format!(
        "[[auth.api_key]]\nid = \"in-file\"\nhash = {hash:?}\nstreams = [\"leads\"]\nexpires = 2127-01-01T00:00:00Z\n"
    );
    let setup = setup(&upstream);
    let server = setup.start();
    server.reload_text(&format!("{}{entry}", setup.text()));
    let before = now_us();
    let wanted = json!({ "streams": ["orders:*"], "id": "made", "rate": 5, "expires_at": before + 60_000_000 });
    let (_, key) = make(&server, &wanted);
    let listed = keys(&server, "GET", "", "");
    assert_eq!(listed.status, 200);
    let list = listed.json()["keys"].as_array().expect("an array").clone();
    assert_eq!(list.len(), 2, "{list:?}");
    assert_eq!(
        list[0],
        json!({
            "id": "in-file", "streams": ["leads"], "roles": [], "permissions": [], "rate": 0, "created_at": null,
            "expires_at": 4_954_435_200_000_000u64, "source": "file",
        })
    );
    let created = list[1]["created_at"].as_u64().expect("microseconds");
    assert!((before..=now_us()).contains(&created));
    assert_eq!(
        list[1],
        json!({
            "id": "made", "streams": ["orders:*"], "roles": [], "permissions": [], "rate": 5, "created_at": created,
            "expires_at": before + 60_000_000, "source": "admin",
        })
    );

    // Each refusal, and none of them changes anything.
    for (method, path, body, status) in [
        ("POST", "", json!({ "streams": ["*"], "id": "made" }).to_string(), 409),
        ("POST", "", json!({ "streams": ["*"], "id": "in-file" }).to_string(), 409),
        ("POST", "", json!({ "streams": [] }).to_string(), 400),
        ("POST", "", "{".to_owned(), 400),
        ("POST", "", " ".repeat((64 << 10) + 1), 413),
        ("PUT", "", String::new(), 405),
        ("DELETE", "", String::new(), 405),
        ("GET", "/made", String::new(), 405),
        ("DELETE", "/in-file", String::new(), 409),
        ("DELETE", "/nobody", String::new(), 404),
        ("DELETE", "/%ff", String::new(), 400),
        ("DELETE", "/a/b", String::new(), 404),
        ("POST", "x", String::new(), 404),
    ] {
        let answer = keys(&server, method, path, &body);
        assert_eq!(answer.status, status, "{method} {path} {body:.80}: {answer:?}");
    }
    for key in [None, Some("wrong")] {
        assert_eq!(server.admin("GET", "/admin/v1/keys", key).status, 401);
        assert_eq!(server.admin("POST", "/admin/v1/keys", key).status, 401);
    }
    assert_eq!(keys(&server, "GET", "", "").json()["keys"].as_array().map(Vec::len), Some(2));
    assert_eq!(keys(&server, "DELETE", "/ma%64e", "").status, 204, "the id is percent-decoded");

    let line = server.wait_for_log("An administrator has made an API key.", 1);
    assert!(line.contains("audit=admin") && line.contains("api_key=made"), "{line}");
    let line = server.wait_for_log("An administrator has deleted an API key.", 1);
    assert!(line.contains("audit=admin") && line.contains("api_key=made"), "{line}");
    let everything = format!("{}{}{}", server.log_text(), server.metrics(), listed.text());
    for secret in [&key, &key[key.len() - 43..], &hash, hash.rsplit(':').next().expect("digits")] {
        assert!(!everything.contains(secret));
    }
    let kept = fs::read_to_string(server.directory().join("restcast.state")).expect("the state file");
    assert!(!kept.contains(&key[key.len() - 43..]), "the key itself is kept nowhere");
}

#[test]
fn what_was_created_is_there_after_a_restart_and_what_was_deleted_is_not() {
    let upstream = upstream();
    let folder = Folder::new("state-restart");
    let setup = setup(&upstream).server(&folder.state_line());
    let server = setup.start();
    let (_, key) = make(&server, &json!({ "streams": ["leads"], "roles": ["agent"], "rate": 100 }));
    let (gone, deleted) = make(&server, &json!({ "streams": ["leads"] }));
    assert_eq!(keys(&server, "DELETE", &format!("/{gone}"), "").status, 204);
    let before = keys(&server, "GET", "", "").json();
    drop(server);
    let server = setup.start();
    assert_eq!(keys(&server, "GET", "", "").json(), before);
    assert_eq!(server.get("/v1/streams/leads", &with(&key)).status, 200);
    assert_eq!(server.get("/v1/streams/leads", &with(&deleted)).status, 401);
}

#[test]
fn a_second_process_that_names_the_state_file_ends_and_one_that_does_not_answers_503() {
    let upstream = upstream();
    let folder = Folder::new("state-two");
    let setup = setup(&upstream).server(&folder.state_line());
    let server = setup.start();
    let (status, out, err) = run(&["serve"], &setup);
    assert_eq!(status.code(), Some(1), "{err}");
    assert!(out.is_empty(), "no ready line: {out}");
    let said = format!(
        "the state file {} is another process's: give each process its own `server.state`",
        folder.state().display()
    );
    assert!(err.contains(&said), "{err}");
    drop(server);
    let server = setup.start();
    assert_eq!(server.get("/healthz", &[]).status, 200, "the lock goes with its process");
    drop(server);

    // Two in one directory, neither of which names a file: the first that writes has it.
    let plain = self::setup(&upstream);
    let first = plain.start();
    let second = plain.start_in(first.directory());
    let (_, key) = make(&first, &json!({ "streams": ["leads"] }));
    let answer = keys(&second, "POST", "", &json!({ "streams": ["leads"] }).to_string());
    assert_eq!(answer.status, 503);
    assert!(answer.text().contains("another process's") && answer.header("retry-after").is_some(), "{answer:?}");
    second.wait_for_log("An API key was not made.", 1);
    assert_eq!(second.get("/v1/streams/leads", &with(&key)).status, 401, "what one has made is its own");
    assert_eq!(first.get("/v1/streams/leads", &with(&key)).status, 200);
}

#[test]
fn a_broken_state_file_stops_the_start_with_what_to_do() {
    let upstream = upstream();
    let folder = Folder::new("state-broken");
    let setup = setup(&upstream).server(&folder.state_line());
    let key = json!({ "id": "k", "hash": "sha256:12345678:00", "streams": ["a"] });
    for (text, said) in [
        ("{".to_owned(), "is broken at line 1"),
        (
            json!({ "version": 1, "sections": { "api_keys": [key] } }).to_string(),
            "has a section api_keys that has no key at place 0",
        ),
        (json!({ "version": 9, "sections": {} }).to_string(), "is of version 9"),
    ] {
        fs::write(folder.state(), &text).expect("written");
        let (status, out, err) = run(&["serve"], &setup);
        assert_eq!((status.code(), out.as_str()), (Some(1), ""), "{err}");
        assert!(err.contains(said) && err.contains(folder.state().to_str().expect("UTF-8")), "{err}");
        assert_eq!(fs::read_to_string(folder.state()).expect("still there"), text, "it is left as it is");
    }
}

/// Makes a key on a connection of its own: the answer's body; `None`: the server is gone.
fn try_make(admin: SocketAddr, body: &str) -> Option<Value> {
    let mut socket = TcpStream::connect(admin).ok()?;
    let request = format!(
        "POST /admin/v1/keys HTTP/1.1\r\nHost: {admin}\r\nAuthorization: Bearer {ADMIN_KEY}\r\nConnection: close\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    socket.write_all(request.as_bytes()).ok()?;
    let mut answer = String::new();
    // What has come of an answer before the reset counts only where it is whole.
    let _ = socket.read_to_string(&mut answer);
    let (head, body) = answer.split_once("\r\n\r\n")?;
    assert!(head.starts_with("HTTP/1.1 201 "), "{answer}");
    serde_json::from_str(body).ok()
}

/// A server whose end is not waited for in order.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_process_killed_while_it_makes_keys_leaves_a_whole_file_with_every_key_it_told_of() {
    let upstream = upstream();
    let folder = Folder::new("state-killed");
    let config = folder.put("restcast.toml", &setup(&upstream).server(&folder.state_line()).text());
    let mut told: Vec<(String, String)> = Vec::new();
    for round in 0..8u64 {
        let mut child = Command::new(env!("CARGO_BIN_EXE_restcast"))
            .args(["serve", "--config"])
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the binary starts");
        let mut line = String::new();
        let out = child.stdout.take().expect("a pipe");
        let killed = Killed(child);
        std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line).expect("a line");
        let ready: Value = serde_json::from_str(&line).expect("the state file was taken");
        let admin = ready["admin"].as_str().expect("admin").parse().expect("an address");
        let pid = killed.0.id();
        // The end comes in the midst of it, each round at another time after the first key.
        let (tell, first) = std::sync::mpsc::channel();
        let killer = std::thread::spawn(move || {
            let _ = first.recv_timeout(PATIENCE);
            std::thread::sleep(Duration::from_millis(17 * round));
            let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw).expect("a process id");
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("it is there");
        });
        let body = json!({ "streams": ["leads"] }).to_string();
        while let Some(made) = try_make(admin, &body) {
            told.push((made["id"].as_str().expect("an id").into(), made["key"].as_str().expect("a key").into()));
            let _ = tell.send(());
        }
        killer.join().expect("it was killed");
        drop(killed);
        let state: Value =
            serde_json::from_slice(&fs::read(folder.state()).unwrap_or(b"{}".to_vec())).expect("it is whole");
        let ids: Vec<&str> = state["sections"]["api_keys"]
            .as_array()
            .map(|keys| keys.iter().filter_map(|key| key["id"].as_str()).collect())
            .unwrap_or_default();
        for (id, _) in &told {
            assert!(ids.contains(&id.as_str()), "round {round}: {id} was told of and is not kept");
        }
    }
    assert!(told.len() >= 8, "one in each round at least: {}", told.len());
    let server = setup(&upstream).server(&folder.state_line()).start();
    for (_, key) in [&told[0], &told[told.len() - 1]] {
        assert_eq!(server.get("/v1/streams/leads", &with(key)).status, 200);
    }
}
