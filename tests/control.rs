//! Logouts, revocations and permissions that change while connected, ordered over the admin API, against the built server.

mod support;

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::Upstream;
use support::server::{
    ADMIN_KEY, DRIVERS, Heard, PATIENCE, Raw, Server, Setup, Ws, bearer, eventually, mint, now_s, refused, token_of,
    watching,
};

/// Until when a logout acts (protocol section 5).
const BOUND: Duration = Duration::from_millis(250);

fn served(setup: Setup) -> (Upstream, Server) {
    let upstream = Upstream::start();
    upstream.set_json("/leads", r#"{"n":0}"#);
    upstream.set_json("/orders", r#"{"n":0}"#);
    let server = setup
        .stream("leads", &upstream.url("/leads"), "roles = [\"agent\"]")
        .stream("orders", &upstream.url("/orders"), "permissions = [\"orders.read\"]")
        .start();
    (upstream, server)
}

/// Claims of a token that may watch both streams, issued now.
fn claims(sub: &str) -> Value {
    json!({ "sub": sub, "exp": now_s() + 600, "iat": now_s(), "role": "agent", "permissions": ["orders.read"] })
}

fn with(mut claims: Value, more: Value) -> Value {
    let (Value::Object(claims), Value::Object(more)) = (&mut claims, more) else { panic!("objects") };
    claims.extend(more);
    claims.clone().into()
}

fn carried_out(server: &Server, method: &str, path: &str, body: Value) {
    let answer = server.order(method, path, &body);
    assert_eq!((answer.status, answer.json()), (200, json!({ "status": "ok" })), "{answer:?}");
}

fn gone(reason: &str) -> (u16, String) {
    (4010, reason.to_owned())
}

#[test]
fn a_logout_closes_each_connection_of_the_user_on_every_core_and_no_other() {
    for driver in DRIVERS {
        let (_upstream, server) = served(Setup::new().driver(driver).cores(3));
        // The bound is the contract's; the machine may be too busy to keep it at any one time, but not each time.
        let mut took = Vec::new();
        for round in 0..5 {
            let (user, other) = (format!("u{round}"), format!("other{round}"));
            let old = mint(claims(&user));
            let mut theirs: Vec<Ws> = (0..150).map(|_| watching(&server, &old, "/v1/streams/leads")).collect();
            theirs.extend((0..50).map(|_| watching(&server, &old, "/v1/ws")));
            let mut events: Vec<_> = (0..20).map(|_| server.sse("/v1/streams/orders", &[bearer(&old)])).collect();
            events.iter_mut().for_each(|sse| drop(sse.next_of("snapshot")));
            let mut others: Vec<Ws> =
                (0..20).map(|_| watching(&server, &mint(claims(&other)), "/v1/streams/leads")).collect();
            let begun = Instant::now();
            carried_out(&server, "POST", &format!("users/{user}/logout"), json!({ "reason": "lost laptop" }));
            for ws in &mut theirs {
                assert_eq!(ws.closed(), gone("logged_out"));
            }
            for sse in &mut events {
                assert_eq!(sse.next_of("close").data, json!({ "type": "close", "code": 4010, "reason": "logged_out" }));
                assert!(sse.next().is_none(), "the body ends");
            }
            took.push(begun.elapsed());
            others.iter_mut().for_each(|ws| assert!(ws.heard_within(Duration::ZERO).is_none(), "they go on"));
            // A token from before cannot come back; one from after it can.
            assert_eq!(refused(&server, &old), (401, "LOGGED_OUT".into()));
            let later = mint(with(claims(&user), json!({ "iat": now_s() + 2 })));
            assert_eq!(refused(&server, &later), (200, String::new()));
            if took.last().is_some_and(|took| *took < BOUND) {
                break;
            }
        }
        assert!(took.iter().any(|took| *took < BOUND), "{driver}: {took:?}");
        assert!(server.metric(&["restcast_closes_total", "logged_out"]) >= 220.0);
    }
}

#[test]
fn a_logout_that_names_an_issuer_leaves_the_same_name_of_another_alone() {
    let (_upstream, server) = served(Setup::new());
    // Made before the logout: one of a later second would be good.
    let [of_a, of_b] = ["https://a", "https://b"].map(|issuer| mint(with(claims("u1"), json!({ "iss": issuer }))));
    let mut a = watching(&server, &of_a, "/v1/streams/leads");
    let mut b = watching(&server, &of_b, "/v1/streams/leads");
    carried_out(&server, "POST", "users/u1/logout", json!({ "iss": "https://a" }));
    assert_eq!(a.closed(), gone("logged_out"));
    assert_eq!(refused(&server, &of_a), (401, "LOGGED_OUT".into()));
    assert_eq!(refused(&server, &of_b).0, 200);
    assert!(b.heard_within(Duration::from_millis(100)).is_none());
}

#[test]
fn a_user_id_is_read_from_the_path_decoded() {
    let (_upstream, server) = served(Setup::new());
    let mut ws = watching(&server, &mint(claims("a/ü@b c")), "/v1/streams/leads");
    carried_out(&server, "POST", "users/a%2F%C3%BC%40b%20c/logout", Value::Null);
    assert_eq!(ws.closed(), gone("logged_out"));
    assert_eq!(server.order("POST", "users/%FF/logout", &Value::Null).status, 400);
}

#[test]
fn a_revoked_token_ends_and_cannot_come_back_while_others_of_the_user_stay() {
    for driver in DRIVERS {
        let (_upstream, server) = served(Setup::new().driver(driver));
        let [one, two] = ["t1", "t2"].map(|jti| mint(with(claims("u1"), json!({ "jti": jti }))));
        let mut first: Vec<Ws> = (0..10).map(|_| watching(&server, &one, "/v1/streams/leads")).collect();
        let mut second = watching(&server, &two, "/v1/streams/leads");
        carried_out(&server, "POST", "tokens/revoke", json!({ "jti": "t1", "exp": now_s() + 600 }));
        first.iter_mut().for_each(|ws| assert_eq!(ws.closed(), gone("token_revoked")));
        assert_eq!(refused(&server, &one), (401, "TOKEN_REVOKED".into()));
        assert_eq!(refused(&server, &two).0, 200);
        assert!(second.heard_within(Duration::from_millis(100)).is_none());
    }
}

#[test]
fn what_was_issued_before_a_time_is_revoked_and_what_came_later_is_not() {
    let (_upstream, server) = served(Setup::new());
    let at = |ago: u64| mint(with(claims("u1"), json!({ "iat": now_s() - ago })));
    let (old, new) = (at(100), at(10));
    let mut of_old = watching(&server, &old, "/v1/ws");
    let mut of_new = watching(&server, &new, "/v1/ws");
    carried_out(&server, "POST", "tokens/revoke", json!({ "sub": "u1", "iat_before": now_s() - 50 }));
    assert_eq!(of_old.closed(), gone("token_revoked"));
    assert_eq!(refused(&server, &old), (401, "TOKEN_REVOKED".into()));
    assert_eq!(refused(&server, &new).0, 200);
    assert_eq!(refused(&server, &mint(json!({ "sub": "u1", "exp": now_s() + 60 }))).1, "TOKEN_REVOKED", "no iat");
    // A time within a second is the end of that second: nothing less is revoked than was asked for.
    let at = now_s() - 20;
    let [within, after] = [at, at + 1].map(|iat| mint(with(claims("u2"), json!({ "iat": iat }))));
    let middle: f64 = format!("{at}.5").parse().expect("a number");
    carried_out(&server, "POST", "tokens/revoke", json!({ "sub": "u2", "iat_before": middle }));
    assert_eq!(refused(&server, &within), (401, "TOKEN_REVOKED".into()));
    assert_eq!(refused(&server, &after).0, 200);
    assert!(of_new.heard_within(Duration::from_millis(100)).is_none());
    // Of a second that has begun nothing is left out: what was issued in it may have come before.
    let issued = now_s() - 10;
    let iat_before = Value::from(issued as f64 + 0.5);
    let token = mint(with(claims("u1"), json!({ "iat": issued })));
    carried_out(&server, "POST", "tokens/revoke", json!({ "sub": "u1", "iat_before": iat_before }));
    assert_eq!(refused(&server, &token), (401, "TOKEN_REVOKED".into()));
}

#[test]
fn one_who_waits_for_a_value_is_answered_that_the_user_has_logged_out() {
    let (_upstream, server) = served(Setup::new().cores(2));
    for (order_path, body, code) in [
        ("users/u1/logout", Value::Null, "LOGGED_OUT"),
        ("tokens/revoke", json!({ "jti": "of u2" }), "TOKEN_REVOKED"),
        ("users/u3/permissions", json!({ "roles": [] }), "INSUFFICIENT_PERMISSIONS"),
    ] {
        let sub = if code == "TOKEN_REVOKED" { "u2" } else { order_path.split('/').nth(1).expect("a user") };
        let token = mint(with(claims(sub), json!({ "jti": format!("of {sub}") })));
        let etag = server.get("/v1/streams/leads", &[bearer(&token)]).header("etag").expect("an ETag").to_owned();
        let mut polls: Vec<Raw> = (0..8).map(|_| server.connect()).collect();
        let request = format!(
            "GET /v1/streams/leads HTTP/1.1\r\nHost: {}\r\nAuthorization: Bearer {token}\r\nIf-None-Match: {etag}\r\n\
             Prefer: wait=30\r\n\r\n",
            server.listen
        );
        polls.iter_mut().for_each(|poll| poll.send(request.as_bytes()));
        eventually("they wait", || (server.metric(&["restcast_connections{", "json_wait"]) == 8.0).then_some(()));
        let begun = Instant::now();
        let method = if order_path.ends_with("permissions") { "PUT" } else { "POST" };
        carried_out(&server, method, order_path, body);
        for poll in &mut polls {
            let answer = poll.answer();
            assert_eq!((answer.status, answer.code()), (if code.starts_with('I') { 403 } else { 401 }, code.into()));
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "not at the end of the wait");
    }
}

#[test]
fn a_token_that_was_logged_out_opens_nothing_by_its_first_message_and_renews_nothing() {
    let (_upstream, server) = served(Setup::new().auth("first_message = \"10s\""));
    let old = mint(with(claims("u1"), json!({ "iat": now_s() - 20 })));
    let new = mint(with(claims("u1"), json!({ "iat": now_s() + 3, "jti": "new" })));
    let mut open = watching(&server, &new, "/v1/ws");
    let mut waiting = server.ws("/v1/ws", &[]);
    carried_out(&server, "POST", "users/u1/logout", Value::Null);
    waiting.send(json!({ "type": "auth", "token": old }));
    assert_eq!(waiting.closed(), gone("logged_out"));
    open.send(json!({ "type": "auth_update", "token": old, "id": 1 }));
    let refused = open.next_of("error");
    assert_eq!((&refused["code"], &refused["reason"]), (&json!("AUTH_UPDATE_REJECTED"), &json!("logged_out")));
    carried_out(&server, "POST", "tokens/revoke", json!({ "jti": "other" }));
    let other = mint(with(claims("u1"), json!({ "iat": now_s() + 3, "jti": "other" })));
    open.send(json!({ "type": "auth_update", "token": other, "id": 2 }));
    assert_eq!(open.next_of("error")["reason"], "token_revoked");
    open.send(json!({ "type": "subscribe", "stream": "leads", "id": 3 }));
    assert_eq!(open.next_of("snapshot")["stream"], "leads", "it goes on under the token it has");
}

#[test]
fn changed_permissions_are_told_first_then_take_what_they_no_longer_allow() {
    for driver in DRIVERS {
        let (_upstream, server) = served(Setup::new().driver(driver).cores(3));
        let token = mint(claims("u1"));
        let mut many: Vec<Ws> = (0..12)
            .map(|_| {
                let mut ws = watching(&server, &token, "/v1/ws");
                for (id, stream) in ["leads", "orders"].into_iter().enumerate() {
                    ws.send(json!({ "type": "subscribe", "stream": stream, "id": id }));
                    ws.next_of("snapshot");
                }
                ws
            })
            .collect();
        let mut single = watching(&server, &token, "/v1/streams/orders");
        carried_out(&server, "PUT", "users/u1/permissions", json!({ "permissions": ["other"] }));
        let told = json!({ "type": "permission_update", "permissions": ["other"], "roles": ["agent"] });
        for ws in &mut many {
            assert_eq!(ws.next(), told);
            assert_eq!(ws.next(), json!({ "type": "unsubscribed", "stream": "orders", "reason": "forbidden" }));
            ws.send(json!({ "type": "subscribe", "stream": "orders", "id": 9 }));
            let refused = ws.next();
            assert_eq!((&refused["code"], &refused["id"]), (&json!("INSUFFICIENT_PERMISSIONS"), &json!(9)));
        }
        assert_eq!(single.next(), told);
        assert_eq!(single.closed(), (4003, "forbidden".into()));
        // Whoever comes with a token from before has the new rights; a later token has its own.
        let answer = server.get("/v1/streams/orders", &[bearer(&token)]);
        assert_eq!((answer.status, answer.code()), (403, "INSUFFICIENT_PERMISSIONS".into()));
        let later = mint(with(claims("u1"), json!({ "iat": now_s() + 2 })));
        assert_eq!(server.get("/v1/streams/orders", &[bearer(&later)]).status, 200);
        // The last right lost closes; with `/v1/ws` too.
        carried_out(&server, "PUT", "users/u1/permissions", json!({ "roles": [] }));
        for ws in &mut many {
            assert_eq!(ws.next()["roles"], json!([]), "the permissions stay");
            assert_eq!(ws.next()["reason"], "forbidden");
            assert_eq!(ws.closed(), (4003, "forbidden".into()));
        }
        // What was taken is given back the same way.
        carried_out(
            &server,
            "PUT",
            "users/u1/permissions",
            json!({ "permissions": ["orders.read"], "roles": ["agent"], "reason": "hired again" }),
        );
        assert_eq!(server.get("/v1/streams/orders", &[bearer(&token)]).status, 200);
    }
}

#[test]
fn the_same_permissions_once_more_are_told_to_nobody() {
    let (_upstream, server) = served(Setup::new());
    let mut ws = watching(&server, &mint(claims("u1")), "/v1/ws");
    let rights = json!({ "permissions": ["orders.read"], "roles": ["agent"] });
    carried_out(&server, "PUT", "users/u1/permissions", rights.clone());
    assert_eq!(ws.next()["type"], "permission_update", "an event is told even where it changes nothing");
    carried_out(&server, "PUT", "users/u1/permissions", rights);
    carried_out(&server, "PUT", "users/u1/permissions", json!({ "roles": ["agent", "admin"] }));
    let told = ws.next();
    assert_eq!((&told["type"], &told["roles"]), (&json!("permission_update"), &json!(["agent", "admin"])));
}

#[test]
fn an_order_is_answered_as_it_deserves() {
    let (_upstream, server) = served(Setup::new());
    let outcome = |method: &str, path: &str, body: &str| {
        let path = format!("/admin/v1/{path}");
        let answer = Raw::connect(server.admin).request(method, &path, &[bearer(ADMIN_KEY)], body);
        let allow = answer.header("allow").unwrap_or_default().to_owned();
        (answer.status, if answer.status >= 400 { answer.code() } else { String::new() }, allow)
    };
    let is = |status, code: &str, allow: &str| (status, code.to_owned(), allow.to_owned());
    for (method, path, allow) in [
        ("GET", "users/u1/logout", "POST"),
        ("POST", "users/u1/permissions", "PUT"),
        ("DELETE", "tokens/revoke", "POST"),
        ("POST", "connections", "GET, HEAD"),
    ] {
        assert_eq!(outcome(method, path, ""), is(405, "METHOD_NOT_ALLOWED", allow), "{path}");
    }
    for (method, path, body) in [
        ("POST", "users/u1/logout", "nonsense"),
        ("POST", "users/u1/logout", r#"{"iss":1}"#),
        ("POST", "users/u1/logout", "[]"),
        ("POST", "users/u1/logout", r#" ["an issuer", "a reason"]"#),
        ("POST", "tokens/revoke", r#"["t", 5, null, null, null, null]"#),
        ("PUT", "users/u1/permissions", ""),
        ("PUT", "users/u1/permissions", "{}"),
        ("PUT", "users/u1/permissions", r#"{"roles":"agent"}"#),
        ("POST", "tokens/revoke", "{}"),
        ("POST", "tokens/revoke", r#"{"sub":"u1"}"#),
        ("POST", "tokens/revoke", r#"{"jti":"t","sub":"u1","iat_before":1}"#),
        ("POST", "tokens/revoke", r#"{"jti":"t","exp":-1}"#),
        ("POST", "tokens/revoke", r#"{"sub":"u1","iat_before":1e300}"#),
        ("GET", "connections?limit=0", ""),
        ("GET", "connections?limit=1001", ""),
        ("GET", "connections?after=x", ""),
    ] {
        assert_eq!(outcome(method, path, body), is(400, "BAD_REQUEST", ""), "{path} {body}");
    }
    let long = json!({ "permissions": vec!["p".repeat(1000); 17] }).to_string();
    assert_eq!(outcome("PUT", "users/u1/permissions", &long), is(400, "BAD_REQUEST", ""), "more than an event holds");
    let too_long = json!({ "reason": "r".repeat(70_000) }).to_string();
    assert_eq!(outcome("POST", "users/u1/logout", &too_long), is(413, "TOO_LARGE", ""));
    assert_eq!(outcome("POST", "users/u1", ""), is(404, "NOT_FOUND", ""));
    assert_eq!(outcome("POST", "users//logout/x", ""), is(404, "NOT_FOUND", ""));

    // Without the key nothing is done, whatever the body.
    let mut ws = watching(&server, &mint(claims("u1")), "/v1/ws");
    let answer = Raw::connect(server.admin).request("POST", "/admin/v1/users/u1/logout", &[], "{}");
    assert_eq!((answer.status, answer.code()), (401, "MISSING_CREDENTIAL".into()));
    let answer = Raw::connect(server.admin).request("POST", "/admin/v1/users/u1/logout", &[bearer("wrong")], "{}");
    assert_eq!((answer.status, answer.code()), (401, "INVALID_TOKEN".into()));
    assert!(ws.heard_within(Duration::from_millis(100)).is_none());
    assert_eq!(server.log_count("audit="), 0);
}

#[test]
fn a_body_may_come_in_pieces_and_behind_it_the_next_request() {
    let (_upstream, server) = served(Setup::new());
    let mut raw = Raw::connect(server.admin);
    let head = |length: &str| {
        format!(
            "POST /admin/v1/users/u1/logout HTTP/1.1\r\nHost: {}\r\nAuthorization: Bearer {ADMIN_KEY}\r\n{length}\r\n\r\n",
            server.admin
        )
    };
    raw.send(head("Transfer-Encoding: chunked\r\nExpect: 100-continue").as_bytes());
    assert_eq!(raw.head().status, 100);
    for piece in ["2\r\n{\"", "\r\n7\r\nreason\"\r\n", "5\r\n:\"x\"}\r\n0\r\n\r\n"] {
        raw.send(piece.as_bytes());
    }
    assert_eq!(raw.answer().status, 200);
    // Two at once.
    let two = format!("{}{{}}{}{{}}", head("Content-Length: 2"), head("Content-Length: 2"));
    raw.send(two.as_bytes());
    assert_eq!([raw.answer().status, raw.answer().status], [200, 200]);
}

#[test]
fn each_order_leaves_a_line_that_says_who_whom_and_why() {
    let (_upstream, server) = served(Setup::new());
    let token = mint(with(claims("u1"), json!({ "jti": "t1" })));
    let _ws = watching(&server, &token, "/v1/ws");
    carried_out(&server, "POST", "users/u1%20by%3Dnobody/logout", json!({ "iss": "a", "reason": "lost\nlaptop" }));
    let line = server.wait_for_log("has logged a user out", 1);
    let said = "key=admin.key sub=u1%20by%3Dnobody iss=a why=lost%0Alaptop";
    assert!(line.contains(said) && line.contains(" audit audit=admin by=127.0.0.1:"), "{line}");
    carried_out(&server, "PUT", "users/u1/permissions", json!({ "permissions": ["a", "b"], "roles": [] }));
    let line = server.wait_for_log("has changed a user's permissions", 1);
    assert!(line.contains("sub=u1 permissions=a,b roles="), "{line}");
    carried_out(&server, "POST", "tokens/revoke", json!({ "jti": "t1", "reason": "leaked" }));
    assert!(server.wait_for_log("has revoked tokens", 1).contains("jti=t1 why=leaked"));
    for secret in [ADMIN_KEY, token.rsplit('.').next().expect("a signature")] {
        assert_eq!(server.log_count(secret), 0);
    }
}

#[test]
fn what_was_ordered_is_in_the_log_though_the_log_tells_of_errors_alone() {
    for (format, said) in [("text", " audit audit=admin "), ("json", r#""level":"audit""#)] {
        let (_upstream, server) = served(Setup::new().log(&format!("level = \"error\"\nformat = \"{format}\"")));
        carried_out(&server, "POST", "users/u1/logout", json!({ "reason": "left" }));
        carried_out(&server, "PUT", "users/u1/permissions", json!({ "permissions": [] }));
        carried_out(&server, "POST", "tokens/revoke", json!({ "jti": "t1" }));
        let key = server.order("POST", "keys", &json!({ "streams": ["a"] }));
        assert_eq!(key.status, 201);
        let drain = server.order("POST", "drain", &Value::Null);
        assert_eq!(drain.status, 202);
        for sentence in [
            "has logged a user out",
            "has changed a user's permissions",
            "has revoked tokens",
            "has made an API key",
            "has asked for a drain",
        ] {
            let line = server.wait_for_log(sentence, 1);
            assert!(line.contains(said) && line.contains("admin.key") && line.contains("127.0.0.1:"), "{line}");
        }
        assert_eq!(server.log_count(ADMIN_KEY), 0);
    }
}

#[test]
fn connections_are_listed_by_user_and_in_pages() {
    let (_upstream, server) = served(Setup::new().cores(3));
    let expires = now_s() + 600;
    let token = mint(with(claims("u1"), json!({ "exp": expires, "iss": "https://a" })));
    let mut sockets: Vec<Ws> = (0..9).map(|_| watching(&server, &token, "/v1/streams/leads")).collect();
    let _sse = server.sse("/v1/streams/orders", &[bearer(&token)]);
    let _other = watching(&server, &mint(claims("u2")), "/v1/ws");
    let list = |query: &str| {
        let answer = server.order("GET", &format!("connections{query}"), &Value::Null);
        assert_eq!(answer.status, 200, "{answer:?}");
        let page = answer.json();
        let connections = page["connections"].as_array().expect("a list").clone();
        (connections, page["next"].as_str().map(str::to_owned))
    };
    let (theirs, next) = eventually("all have opened", || Some(list("?sub=u1")).filter(|(all, _)| all.len() == 10));
    assert_eq!(next, None);
    for connection in &theirs {
        let sse = connection["transport"] == "sse";
        assert_eq!(connection["sub"], "u1");
        assert_eq!(connection["iss"], "https://a");
        assert_eq!(connection["type"], "jwt");
        assert_eq!(connection["streams"], if sse { json!(["orders"]) } else { json!(["leads"]) });
        assert_eq!(connection["subscriptions"], 1);
        assert_eq!(connection["expires_at"], expires * 1_000_000);
        let since_s = connection["since"].as_u64().expect("a time") / 1_000_000;
        assert!((expires - 660..=now_s()).contains(&since_s), "{connection}");
        assert!(connection["connection"].as_str().expect("a name").starts_with("c_"));
    }
    assert_eq!(theirs.iter().filter(|connection| connection["transport"] == "sse").count(), 1);
    assert_eq!((list("?sub=u2").0.len(), list("?sub=nobody").0.len(), list("").0.len()), (1, 0, 11));
    // Page by page, nobody is told of twice.
    let (mut seen, mut after) = (Vec::new(), String::new());
    loop {
        let (page, next) = list(&format!("?limit=4{after}"));
        assert!(page.len() <= 4);
        seen.extend(page.iter().map(|connection| connection["connection"].as_str().expect("a name").to_owned()));
        match next {
            Some(next) => after = format!("&after={next}"),
            None => break,
        }
    }
    assert_eq!(seen.len(), 11);
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 11);
    // Who has gone is listed no more.
    sockets.clear();
    eventually("they are gone", || (list("?sub=u1").0.len() == 1).then_some(()));
}

#[test]
fn a_token_that_comes_back_is_not_verified_again_until_its_key_is_gone() {
    let setup = Setup::new().cores(1).key("k2", "HS256", "another secret of the tests, of 32 bytes and more");
    let (upstream, server) = served(setup);
    let token = mint(claims("u1"));
    let verified = || server.metric(&["restcast_token_verifications_total"]);
    let remembered = || server.metric(&["restcast_token_cache_hits_total"]);
    for n in 0..5 {
        assert_eq!(refused(&server, &token).0, 200);
        assert_eq!((verified(), remembered()), (1.0, f64::from(n)));
    }
    let forged = format!("{}A", &token[..token.len() - 1]);
    if forged != token {
        assert_eq!(refused(&server, &forged).0, 401, "another signature is another token");
    }
    assert_eq!(refused(&server, &mint(claims("u2"))).0, 200);
    // A reload without its key.
    let without = Setup::new()
        .cores(1)
        .no_keys()
        .key("k2", "HS256", "another secret of the tests, of 32 bytes and more")
        .stream("leads", &upstream.url("/leads"), "roles = [\"agent\"]");
    server.reload(&without);
    eventually("the key is gone", || (refused(&server, &token) == (401, "INVALID_TOKEN".into())).then_some(()));
    assert_eq!(server.metric(&["restcast_token_cache_hits_total"]), 4.0);
}

#[test]
fn nothing_is_remembered_where_that_is_switched_off() {
    let (_upstream, server) = served(Setup::new().cores(1).auth("token_cache = 0"));
    let token = mint(claims("u1"));
    for _ in 0..3 {
        assert_eq!(refused(&server, &token).0, 200);
    }
    assert_eq!(server.metric(&["restcast_token_verifications_total"]), 3.0);
    assert_eq!(server.metric(&["restcast_token_cache_hits_total"]), 0.0);
}

#[test]
fn a_token_that_outlives_what_is_kept_in_mind_is_warned_of() {
    let (_upstream, server) = served(Setup::new().cores(1).auth("revocation_keep = \"1h\""));
    assert_eq!(refused(&server, &token_of("short")).0, 403, "it has no role");
    assert_eq!(server.log_count("lives longer than auth.revocation_keep"), 0);
    for n in 0..3 {
        let long = mint(with(claims("u1"), json!({ "exp": now_s() + 7200, "jti": n.to_string() })));
        assert_eq!(refused(&server, &long).0, 200);
    }
    server.wait_for_log("lives longer than auth.revocation_keep", 1);
    assert_eq!(server.log_count("lives longer than auth.revocation_keep"), 1, "once a minute at most");
}

#[test]
fn a_storm_of_logouts_is_carried_out_while_the_others_are_served() {
    let (upstream, server) = served(Setup::new());
    let mut users: Vec<Ws> =
        (0..100).map(|n| watching(&server, &mint(claims(&format!("u{n}"))), "/v1/streams/leads")).collect();
    let mut other = watching(&server, &mint(claims("other")), "/v1/streams/leads");
    let mut raw = Raw::connect(server.admin);
    for n in 0..100 {
        let path = format!("/admin/v1/users/u{n}/logout");
        assert_eq!(raw.request("POST", &path, &[bearer(ADMIN_KEY)], "").status, 200);
        if n == 50 {
            upstream.set_json("/leads", r#"{"n":1}"#);
        }
    }
    for ws in &mut users {
        assert_eq!(ws.closed(), gone("logged_out"));
    }
    let until = Instant::now() + PATIENCE;
    loop {
        match other.heard() {
            Heard::Frame(frame) if frame["type"] == "patch" || frame["data"] == json!({ "n": 1 }) => break,
            Heard::Close(code, reason) => panic!("{code} {reason}"),
            _ => assert!(Instant::now() < until),
        }
    }
    assert_eq!(server.metric(&["restcast_control_events_total"]), 100.0);
    assert_eq!(server.metric(&["restcast_marks"]), 100.0);
}

#[test]
fn a_renewal_that_fails_too_often_is_answered_late_like_a_handshake() {
    let (_upstream, server) = served(Setup::new().limits("auth_failures_per_minute = 2"));
    let mut sse = server.sse("/v1/streams/leads", &[bearer(&mint(claims("u1")))]);
    let welcome = sse.next().expect("a welcome").data;
    let path = format!("/v1/connections/{}/auth", welcome["connection"].as_str().expect("a name"));
    let old = mint(with(claims("u1"), json!({ "iat": now_s() - 50, "jti": "old" })));
    carried_out(&server, "POST", "tokens/revoke", json!({ "jti": "old" }));
    let body = json!({ "token": old }).to_string();
    for failures in 0..4 {
        let begun = Instant::now();
        let answer = server.request("POST", &path, &[], &body);
        assert_eq!((answer.status, answer.code()), (401, "TOKEN_REVOKED".into()));
        assert!(failures < 2 || begun.elapsed() >= Duration::from_millis(900), "after {failures} failures");
    }
    let answer = server.request("POST", &path, &[], &body);
    assert_eq!((answer.status, answer.code()), (429, "RATE_LIMITED".into()), "then nothing is looked at");
}

#[test]
fn whoever_has_failed_too_often_is_not_looked_at_with_a_revoked_token_either() {
    let (_upstream, server) = served(Setup::new().limits("auth_failures_per_minute = 2"));
    let revoked = mint(with(claims("u1"), json!({ "jti": "t1" })));
    carried_out(&server, "POST", "tokens/revoke", json!({ "jti": "t1" }));
    for _ in 0..4 {
        assert_eq!(refused(&server, &revoked), (401, "TOKEN_REVOKED".into()));
    }
    let hits = server.metric(&["restcast_token_cache_hits_total"]);
    assert_eq!(refused(&server, &revoked), (429, "RATE_LIMITED".into()));
    assert_eq!(server.metric(&["restcast_token_cache_hits_total"]), hits, "limits come before any cryptography");
}

#[test]
fn silent_peers_keep_nobody_from_the_admin_listener_and_end_no_call_with_the_key() {
    let (_upstream, server) = served(Setup::new());
    let mut call = Raw::connect(server.admin);
    let head = format!(
        "POST /admin/v1/users/u1/logout HTTP/1.1\r\nHost: {}\r\nAuthorization: Bearer {ADMIN_KEY}\r\n\
         Content-Length: 2\r\nExpect: 100-continue\r\n\r\n",
        server.admin
    );
    call.send(head.as_bytes());
    assert_eq!(call.head().status, 100, "it has a place, and its body is awaited");
    let begun = Instant::now();
    let silent: Vec<Raw> =
        ["", "GET /readyz HTTP/1.1\r\n", "POST /readyz HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n"]
            .into_iter()
            .cycle()
            .take(60)
            .map(|said| {
                let mut raw = Raw::connect(server.admin);
                let _ = raw.try_send(said.as_bytes());
                raw
            })
            .collect();
    assert_eq!(server.admin("GET", "/readyz", None).status, 200);
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(8), "it waited for those who say nothing: {took:?}");
    call.send(b"{}");
    assert_eq!(call.answer().status, 200);
    drop(silent);
}

#[test]
fn a_wrong_admin_key_counts_for_its_address_and_is_told() {
    let (_upstream, server) = served(Setup::new().limits("auth_failures_per_minute = 2"));
    let call = |key: &str| {
        let begun = Instant::now();
        let answer = server.admin("GET", "/admin/v1/keys", Some(key));
        (answer, begun.elapsed())
    };
    for failures in 0..4 {
        let (answer, took) = call("a-wrong-key");
        assert_eq!((answer.status, answer.code()), (401, "INVALID_TOKEN".into()));
        assert!(failures < 2 || took >= Duration::from_millis(900), "after {failures} failures it took {took:?}");
        if failures == 2 {
            assert_eq!(call(ADMIN_KEY).0.status, 200, "the right one is not held back");
        }
    }
    let (answer, took) = call("a-wrong-key");
    assert_eq!((answer.status, answer.code()), (429, "RATE_LIMITED".into()));
    assert!(answer.header("retry-after").is_some() && took >= Duration::from_millis(900), "it took {took:?}");
    assert_eq!(call(ADMIN_KEY).0.status, 200, "whoever tries keys keeps no administrator from logging somebody out");
    assert_eq!(server.admin("GET", "/readyz", None).status, 200, "what needs no key is answered on");
    assert_eq!(server.get("/v1/streams/leads", &[bearer(&mint(claims("u1")))]).status, 200, "and so are clients");
    let line = server.wait_for_log("with a wrong key", 1);
    assert!(line.contains("by=127.0.0.1 "), "{line}");
    assert_eq!((server.log_count("with a wrong key"), server.log_count("a-wrong-key")), (1, 0));
    server.reload(&Setup::new().limits("auth_failures_per_minute = 0"));
    eventually("the limit is off", || (call("a-wrong-key").0.status == 401).then_some(()));
}
