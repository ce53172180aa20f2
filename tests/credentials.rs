//! Who is let in: carriers, the Origin rule, the order of refusal, tokens good and bad, against the built server.

mod support;

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use support::Upstream;
use support::server::{
    DRIVERS, PATIENCE, SECRET, Server, Setup, bearer, client_frame, eventually, is, mint, mint_by, now_s, outcome, run,
    token_of, upgrade_request,
};
use tungstenite::Message;

const MS: Duration = Duration::from_millis(1);

type Header = (&'static str, String);

fn served(setup: Setup) -> (Upstream, Server) {
    let upstream = Upstream::start();
    upstream.set_json("/leads", r#"[{"id":1}]"#);
    let server = setup.stream("leads", &upstream.url("/leads"), "").start();
    (upstream, server)
}

fn on_each_driver(test: impl Fn(Setup)) {
    for driver in DRIVERS {
        test(Setup::new().driver(driver));
    }
}

fn of(name: &'static str, value: &str) -> Header {
    (name, value.to_owned())
}

/// The outcome of opening a WebSocket; 101 where it opens.
fn upgraded(server: &Server, path: &str, headers: &[Header]) -> (u16, String) {
    match server.try_ws(path, headers) {
        Ok(_) => is(101, ""),
        Err(answer) => outcome(&answer),
    }
}

// Carriers.

#[test]
fn every_carrier_brings_a_token() {
    on_each_driver(|setup| {
        let (_upstream, server) = served(setup);
        let token = token_of("u1");
        let query = format!("?token={token}");
        let cookie = of("Cookie", &format!("a=b; restcast_token={token}; c=d"));
        let protocol = of("Sec-WebSocket-Protocol", &format!("restcast.v1, jwt, {token}"));
        for (path, headers) in [
            (String::new(), vec![bearer(&token)]),
            (String::new(), vec![of("authorization", &format!("bearer {token}"))]),
            (String::new(), vec![protocol.clone()]),
            (query.clone(), vec![]),
            (String::new(), vec![cookie.clone()]),
        ] {
            let is_protocol = headers.first().is_some_and(|(name, _)| name.starts_with("Sec-"));
            for resource in ["/v1/streams/leads", "/v1/ws"] {
                let mut ws = server.ws(&format!("{resource}{path}"), &headers);
                let welcome = ws.next();
                assert_eq!(welcome["auth"]["type"], "jwt", "{headers:?}");
                assert_eq!(welcome["auth"]["sub"], "u1");
            }
            if !is_protocol {
                assert_eq!(server.get(&format!("/v1/streams/leads{path}"), &headers).status, 200, "{headers:?}");
                let mut sse = server.sse(&format!("/v1/streams/leads{path}"), &headers);
                assert_eq!(sse.next().expect("an event").data["auth"]["sub"], "u1");
            }
        }
    });
}

#[test]
fn the_first_carrier_present_counts_and_later_ones_are_not_read() {
    let (_upstream, server) = served(Setup::new());
    let good = token_of("u1");
    let carriers = |tokens: [&str; 4]| {
        let [header, protocol, query, cookie] = tokens;
        let mut headers = Vec::new();
        if !header.is_empty() {
            headers.push(bearer(header));
        }
        if !protocol.is_empty() {
            headers.push(of("Sec-WebSocket-Protocol", &format!("restcast.v1, jwt, {protocol}")));
        }
        if !cookie.is_empty() {
            headers.push(of("Cookie", &format!("restcast_token={cookie}")));
        }
        let path = if query.is_empty() { "/v1/ws".to_owned() } else { format!("/v1/ws?token={query}") };
        upgraded(&server, &path, &headers)
    };
    for first in 0..4 {
        let (mut only_first_good, mut only_first_bad) = (["bad"; 4], [good.as_str(); 4]);
        for earlier in 0..first {
            (only_first_good[earlier], only_first_bad[earlier]) = ("", "");
        }
        (only_first_good[first], only_first_bad[first]) = (&good, "bad");
        assert_eq!(carriers(only_first_good), is(101, ""), "{first}");
        assert_eq!(carriers(only_first_bad), is(401, "INVALID_TOKEN"), "{first}");
    }
}

#[test]
fn two_values_in_one_carrier_are_400() {
    let (_upstream, server) = served(Setup::new());
    let token = token_of("u1");
    let (cookie, two) = (format!("restcast_token={token}"), format!("restcast_token={token}; restcast_token={token}"));
    for resource in ["/v1/streams/leads", "/v1/ws"] {
        for (query, headers) in [
            ("", vec![bearer(&token), bearer(&token)]),
            ("", vec![of("Sec-WebSocket-Protocol", &format!("jwt, {token}, jwt, other"))]),
            ("", vec![of("Sec-WebSocket-Protocol", &format!("jwt, {token}, jwt"))]),
            ("?token=a&token=b", vec![]),
            ("?token=a&%74oken=b", vec![]),
            ("", vec![of("Cookie", &two)]),
            ("", vec![of("Cookie", &cookie), of("Cookie", &cookie)]),
        ] {
            let refused = upgraded(&server, &format!("{resource}{query}"), &headers);
            assert_eq!(refused, is(400, "BAD_REQUEST"), "{resource}{query} {headers:?}");
        }
    }
}

#[test]
fn what_is_presented_and_no_credential_is_401() {
    let anonymous = "allow_anonymous = true";
    let upstream = Upstream::start();
    upstream.set_json("/leads", "[]");
    let server = Setup::new().stream("open", &upstream.url("/leads"), anonymous).start();
    // The stream lets anyone in, but not who presents what is wrong.
    assert_eq!(server.get("/v1/streams/open", &[]).status, 200);
    for (query, headers) in [
        ("", vec![bearer("nonsense")]),
        ("", vec![of("Authorization", "Basic dTpw")]),
        ("", vec![of("Authorization", "Bearer")]),
        ("", vec![of("Authorization", "Bearer a b")]),
        ("?token=", vec![]),
        ("?token=nonsense", vec![]),
        ("?ticket=nonsense", vec![]),
        ("", vec![of("X-Api-Key", "nonsense")]),
        ("", vec![of("Cookie", "restcast_token=nonsense")]),
    ] {
        let path = format!("/v1/streams/open{query}");
        assert_eq!(outcome(&server.get(&path, &headers)), is(401, "INVALID_TOKEN"), "{path} {headers:?}");
        assert_eq!(upgraded(&server, &path, &headers), is(401, "INVALID_TOKEN"), "{path} {headers:?}");
    }
    for protocols in ["jwt", "jwt, nonsense", "restcast.v1, jwt"] {
        let headers = [of("Sec-WebSocket-Protocol", protocols)];
        assert_eq!(upgraded(&server, "/v1/streams/open", &headers), is(401, "INVALID_TOKEN"), "{protocols}");
    }
    let expired = mint(json!({ "sub": "u1", "exp": now_s() - 60 }));
    assert_eq!(outcome(&server.get("/v1/streams/open", &[bearer(&expired)])), is(401, "TOKEN_EXPIRED"));
}

#[test]
fn a_proxys_basic_credentials_do_not_hide_the_token() {
    let (_upstream, server) = served(Setup::new());
    let path = format!("/v1/streams/leads?token={}", token_of("u1"));
    assert_eq!(server.get(&path, &[of("Authorization", "Basic dTpw")]).status, 200);
}

#[test]
fn tokens_in_the_query_can_be_switched_off() {
    let (_upstream, server) = served(Setup::new().auth("query_token = false"));
    let token = token_of("u1");
    let path = format!("/v1/streams/leads?token={token}");
    assert_eq!(outcome(&server.get(&path, &[])), is(401, "INVALID_TOKEN"));
    assert_eq!(upgraded(&server, &path, &[]), is(401, "INVALID_TOKEN"));
    assert_eq!(server.get(&path, &[bearer(&token)]).status, 200, "a later carrier is not read");
}

#[test]
fn the_cookie_may_have_another_name() {
    let (_upstream, server) = served(Setup::new().jwt("cookie = \"live\""));
    let token = token_of("u1");
    assert_eq!(server.get("/v1/streams/leads", &[of("Cookie", &format!("live={token}"))]).status, 200);
    let answer = server.get("/v1/streams/leads", &[of("Cookie", &format!("restcast_token={token}"))]);
    assert_eq!(outcome(&answer), is(401, "MISSING_CREDENTIAL"));
}

// Origin.

#[test]
fn a_cookie_is_for_pages_of_allowed_origins() {
    on_each_driver(|setup| {
        let (_upstream, server) = served(setup.server("allowed_origins = [\"https://app.example\"]"));
        let cookie = of("Cookie", &format!("restcast_token={}", token_of("u1")));
        let own = format!("http://{}", server.listen);
        let other_scheme = format!("https://{}", server.listen);
        for (headers, allowed) in [
            (vec![], true),
            (vec![of("Origin", &own)], true),
            (vec![of("Origin", "https://app.example")], true),
            (vec![of("Origin", "https://evil.example")], false),
            (vec![of("Origin", &other_scheme)], false),
            (vec![of("Origin", "http://127.0.0.1")], false),
            (vec![of("Origin", "null")], false),
            (vec![of("Origin", "")], false),
            (vec![of("Origin", &format!("{own}.evil.example"))], false),
            (vec![of("Sec-Fetch-Site", "same-origin")], true),
            (vec![of("Sec-Fetch-Site", "none")], true),
            (vec![of("Sec-Fetch-Site", "cross-site")], false),
            (vec![of("Sec-Fetch-Site", "same-site")], false),
            (vec![of("Origin", "https://app.example"), of("Sec-Fetch-Site", "cross-site")], true),
            (vec![of("Origin", "https://evil.example"), of("Sec-Fetch-Site", "same-origin")], false),
        ] {
            let with_cookie = [vec![cookie.clone()], headers.clone()].concat();
            let wanted = if allowed { is(101, "") } else { is(403, "ORIGIN_NOT_ALLOWED") };
            assert_eq!(upgraded(&server, "/v1/ws", &with_cookie), wanted, "{headers:?}");
            let status = server.get("/v1/streams/leads", &with_cookie).status;
            assert_eq!(status, if allowed { 200 } else { 403 }, "{headers:?}");
            // A page cannot send a token that it does not have.
            let with_header = [vec![bearer(&token_of("u1"))], headers].concat();
            assert_eq!(server.get("/v1/streams/leads", &with_header).status, 200);
        }
    });
}

#[test]
fn the_public_origin_is_the_servers_own() {
    let (_upstream, server) = served(Setup::new().server("public_origin = \"https://live.example.com\""));
    let cookie = of("Cookie", &format!("restcast_token={}", token_of("u1")));
    let with = |origin: &str| server.get("/v1/streams/leads", &[cookie.clone(), of("Origin", origin)]).status;
    assert_eq!(with("https://live.example.com"), 200);
    assert_eq!(with("http://live.example.com"), 403);
    assert_eq!(with("https://live.example.com:8443"), 403);
}

#[test]
fn behind_a_trusted_proxy_the_origin_is_what_the_client_saw() {
    let cookie = of("Cookie", &format!("restcast_token={}", token_of("u1")));
    let origin = of("Origin", "https://live.example.com");
    let forwarded = [
        vec![of("Forwarded", "for=192.0.2.7;host=live.example.com;proto=https")],
        vec![
            of("X-Forwarded-For", "192.0.2.7"),
            of("X-Forwarded-Host", "live.example.com"),
            of("X-Forwarded-Proto", "https"),
        ],
        vec![of("X-Forwarded-Proto", "https"), of("Host", "live.example.com")],
    ];
    let (_upstream, trusting) = served(Setup::new().server("trusted_proxies = [\"127.0.0.0/8\"]"));
    let (_other, wary) = served(Setup::new());
    for headers in forwarded {
        let all = [vec![cookie.clone(), origin.clone()], headers.clone()].concat();
        assert_eq!(trusting.get("/v1/streams/leads", &all).status, 200, "{headers:?}");
        assert_eq!(outcome(&wary.get("/v1/streams/leads", &all)), is(403, "ORIGIN_NOT_ALLOWED"), "{headers:?}");
        let own = of("Origin", &format!("http://{}", trusting.listen));
        let all = [vec![cookie.clone(), own], headers].concat();
        assert_eq!(trusting.get("/v1/streams/leads", &all).status, 403, "the client did not see this address");
    }
}

#[test]
fn a_proxy_that_tells_the_address_by_proxy_v2_still_tells_scheme_and_host() {
    let (_upstream, server) = served(Setup::new().server("trusted_proxies = [\"127.0.0.0/8\"]"));
    let mut raw = server.connect();
    raw.send(&proxy_v2([192, 0, 2, 1]));
    let headers = [
        of("Cookie", &format!("restcast_token={}", token_of("u1"))),
        of("Origin", "https://live.example.com"),
        of("X-Forwarded-Proto", "https"),
        of("X-Forwarded-Host", "live.example.com"),
    ];
    assert_eq!(raw.request("GET", "/v1/streams/leads", &headers, "").status, 200);
}

#[test]
fn what_cannot_be_read_is_never_taken_for_no_credential() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", "[]");
    let server = Setup::new()
        .stream("open", &upstream.url("/leads"), "allow_anonymous = true")
        .stream("closed", &upstream.url("/leads"), "")
        .start();
    assert_eq!(upgraded(&server, "/v1/ws?%zz&token=nonsense", &[]), is(400, "BAD_REQUEST"));
    assert_eq!(upgraded(&server, "/v1/ws?token=nonsense", &[]), is(401, "INVALID_TOKEN"));
    // A stream that lets anyone in has nothing to ask for first.
    assert_eq!(outcome(&server.get("/v1/streams/open?format=xml", &[])), is(400, "BAD_REQUEST"));
    assert_eq!(outcome(&server.get("/v1/streams/closed?format=xml", &[])), is(401, "MISSING_CREDENTIAL"));
    assert_eq!(outcome(&server.get("/v1/streams/open", &[of("Accept", "text/html")])), is(406, "NOT_ACCEPTABLE"));
    // Nobody learns without a credential which streams there are.
    let mut ws = server.ws("/v1/ws", &[]);
    ws.next_of("welcome");
    for stream in ["closed", "absent"] {
        ws.send(json!({ "type": "subscribe", "stream": stream }));
        assert_eq!(ws.next_of("error")["code"], "MISSING_CREDENTIAL", "{stream}");
    }
}

/// A PROXY v2 header for an IPv4 client.
fn proxy_v2(client: [u8; 4]) -> Vec<u8> {
    let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".to_vec();
    header.extend_from_slice(&client);
    header.extend_from_slice(&[127, 0, 0, 1, 0x30, 0x39, 0x1f, 0x90]);
    header
}

#[test]
fn a_proxy_tells_whose_limits_count() {
    on_each_driver(|setup| {
        let limits = "connections_per_address = 1";
        let setup = setup.limits(limits).server("trusted_proxies = [\"127.0.0.0/8\"]");
        let (_upstream, server) = served(setup);
        let token = token_of("u1");
        let through = |client: [u8; 4], pieces: usize| {
            let mut raw = server.connect();
            let bytes = [proxy_v2(client), upgrade_request("/v1/ws", server.listen, &[bearer(&token)]).into()].concat();
            for piece in bytes.chunks(pieces) {
                raw.send(piece);
            }
            let status = raw.answer().status;
            (raw, status)
        };
        let (_first, status) = through([192, 0, 2, 1], usize::MAX);
        assert_eq!(status, 101);
        let (_second, status) = through([192, 0, 2, 2], 1);
        assert_eq!(status, 101, "another client, though the same proxy");
        assert_eq!(through([192, 0, 2, 1], 1).1, 429, "the first again");
        let forwarded = |client: &str| {
            let answer = server.try_ws("/v1/ws", &[bearer(&token), of("X-Forwarded-For", client)]);
            answer.map_err(|answer| outcome(&answer))
        };
        let third = forwarded("192.0.2.3").map_err(drop).expect("a third client");
        assert_eq!(forwarded("192.0.2.3").map(drop), Err(is(429, "TOO_MANY_CONNECTIONS")));
        // What a client made up stands before what the proxy added.
        assert_eq!(forwarded("198.51.100.1, 192.0.2.3").map(drop), Err(is(429, "TOO_MANY_CONNECTIONS")));
        drop(third);
        eventually("the third client is gone", || forwarded("192.0.2.3").ok());
        // A header that is none ends the connection.
        let mut raw = server.connect();
        raw.send(b"\r\n\r\n\0\r\nQUIT\n\x31\x11\0\x0c000000000000");
        assert_eq!(raw.answer().status, 400);
        assert!(raw.is_closed());
    });
}

#[test]
fn who_is_no_trusted_proxy_is_not_believed() {
    let (_upstream, server) = served(Setup::new().limits("connections_per_address = 1"));
    let token = token_of("u1");
    let _first = server.ws("/v1/ws", &[bearer(&token), of("X-Forwarded-For", "192.0.2.1")]);
    let mut raw = server.connect();
    let _ = raw.try_send(upgrade_request("/v1/ws", server.listen, &[of("X-Forwarded-For", "192.0.2.2")]).as_bytes());
    let answer = raw.answer();
    assert_eq!(outcome(&answer), is(429, "TOO_MANY_CONNECTIONS"));
    assert!(answer.header("retry-after").is_some());
    drop((raw, _first));
    eventually("a place is free", || {
        let mut raw = server.connect();
        raw.try_send(&proxy_v2([192, 0, 2, 9])).ok()?;
        (raw.answer().status == 400).then_some(())
    });
}

// The order of refusal.

#[test]
fn refusals_come_in_their_order() {
    on_each_driver(|setup| {
        let upstream = Upstream::start();
        upstream.set_json("/leads", "[]");
        let server = setup
            .stream("leads", &upstream.url("/leads"), "")
            .stream("agents", &upstream.url("/leads"), "roles = [\"agent\", \"admin\"]")
            .stream("readers", &upstream.url("/leads"), "permissions = [\"leads.read\", \"leads.list\"]")
            .stream("mine", &upstream.url("/c/{claims.companyId}/leads"), "roles = [\"agent\"]")
            .start();
        let of_claims = |claims: Value| {
            let mut all = json!({ "sub": "u1", "exp": now_s() + 600 });
            all.as_object_mut().expect("an object").extend(claims.as_object().expect("an object").clone());
            mint(all)
        };
        let plain = of_claims(json!({}));
        let check = |stream: &str, token: Option<&str>, wanted: (u16, &str)| {
            let headers: Vec<Header> = token.map(bearer).into_iter().collect();
            let path = format!("/v1/streams/{stream}");
            let answer = server.get(&path, &headers);
            assert_eq!(outcome(&answer), is(wanted.0, wanted.1), "GET {path}");
            let events = [headers.clone(), vec![of("Accept", "text/event-stream")]].concat();
            if wanted.0 >= 400 {
                assert_eq!(outcome(&server.get(&path, &events)), is(wanted.0, wanted.1), "SSE {path}");
            }
            let status = if wanted.0 == 200 { 101 } else { wanted.0 };
            assert_eq!(upgraded(&server, &path, &headers), is(status, wanted.1), "WebSocket {path}");
        };
        // A credential is asked for first, whatever the stream, and however the rest is wrong.
        for stream in ["leads", "none", "agents", "leads?format=xml", "leads?max_rate_ms=x", "%ff", "a%20b"] {
            check(stream, None, (401, "MISSING_CREDENTIAL"));
            check(stream, Some("bad"), (401, "INVALID_TOKEN"));
        }
        assert_eq!(upgraded(&server, "/v1/ws", &[]), is(401, "MISSING_CREDENTIAL"));
        // Then the `streams` claim, whether or not the stream exists.
        let one = of_claims(json!({ "streams": ["leads"] }));
        check("leads", Some(&one), (200, ""));
        check("none", Some(&one), (403, "FORBIDDEN"));
        check("agents", Some(&one), (403, "FORBIDDEN"));
        let nothing = of_claims(json!({ "streams": [] }));
        check("leads", Some(&nothing), (403, "FORBIDDEN"));
        check("none", Some(&nothing), (403, "FORBIDDEN"));
        // Then whether there is one.
        check("none", Some(&plain), (404, "STREAM_NOT_FOUND"));
        check("a%20b", Some(&plain), (404, "STREAM_NOT_FOUND"));
        // Then roles, any one, and permissions, all.
        check("agents", Some(&plain), (403, "INSUFFICIENT_PERMISSIONS"));
        check("agents", Some(&of_claims(json!({ "role": "agent" }))), (200, ""));
        check("agents", Some(&of_claims(json!({ "roles": ["x", "admin"] }))), (200, ""));
        check("agents", Some(&of_claims(json!({ "role": "agents" }))), (403, "INSUFFICIENT_PERMISSIONS"));
        let half = of_claims(json!({ "permissions": ["leads.read"] }));
        check("readers", Some(&half), (403, "INSUFFICIENT_PERMISSIONS"));
        let whole = of_claims(json!({ "permissions": ["leads.list", "leads.read"] }));
        check("readers", Some(&whole), (200, ""));
        // A `streams` claim is no role.
        let named = of_claims(json!({ "streams": ["agents"] }));
        check("agents", Some(&named), (403, "INSUFFICIENT_PERMISSIONS"));
        // Then the claims that fill the template.
        check("mine", Some(&plain), (403, "INSUFFICIENT_PERMISSIONS"));
        check("mine", Some(&of_claims(json!({ "role": "agent" }))), (403, "CLAIM_MISSING"));
        for company in [json!(""), json!("."), json!(".."), json!("a\u{7}b")] {
            let token = of_claims(json!({ "role": "agent", "companyId": company }));
            check("mine", Some(&token), (403, "CLAIM_INVALID"));
        }
        // What is wrong in itself is told to those who have a credential.
        check("leads?format=xml", Some(&plain), (400, "BAD_REQUEST"));
        check("leads?format=full&format=full", Some(&plain), (400, "BAD_REQUEST"));
    });
}

#[test]
fn the_streams_claim_holds_globs() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", "[]");
    let mut setup = Setup::new();
    for id in ["leads", "orders:1", "orders:2:items", "order"] {
        setup = setup.stream(id, &upstream.url("/leads"), "");
    }
    let server = setup.start();
    let token = mint(json!({ "sub": "u1", "exp": now_s() + 600, "streams": ["lea*s", "orders:*"] }));
    for (id, status) in [("leads", 200), ("orders:1", 200), ("orders:2:items", 200), ("order", 403)] {
        assert_eq!(server.get(&format!("/v1/streams/{id}"), &[bearer(&token)]).status, status, "{id}");
    }
    let mut ws = server.ws("/v1/ws", &[bearer(&token)]);
    ws.next_of("welcome");
    ws.send(json!({ "type": "subscribe", "stream": "order", "id": 1 }));
    let frame = ws.next();
    assert_eq!((&frame["code"], &frame["id"]), (&json!("FORBIDDEN"), &json!(1)), "{frame}");
    assert_eq!(frame["stream"], "order");
    ws.send(json!({ "type": "subscribe", "stream": "orders:1", "id": 2 }));
    assert_eq!(ws.next()["type"], "subscribed");
    // A claim that is no list of names lets nobody in by chance.
    for claim in [json!("leads"), json!(7), json!([1]), json!({ "leads": true }), Value::Null] {
        let token = mint(json!({ "sub": "u1", "exp": now_s() + 600, "streams": claim }));
        let status = server.get("/v1/streams/leads", &[bearer(&token)]).status;
        assert!(status == 401 || status == 403, "{claim} was let in");
    }
}

// Anonymous.

#[test]
fn an_anonymous_connection_may_be_raised_once() {
    on_each_driver(|setup| {
        let upstream = Upstream::start();
        upstream.set_json("/leads", "[]");
        let server = setup
            .stream("open", &upstream.url("/leads"), "allow_anonymous = true")
            .stream("closed", &upstream.url("/leads"), "")
            .start();
        assert_eq!(outcome(&server.get("/v1/streams/closed", &[])), is(401, "MISSING_CREDENTIAL"));
        assert_eq!(outcome(&server.get("/v1/streams/none", &[])), is(401, "MISSING_CREDENTIAL"));
        let mut sse = server.sse("/v1/streams/open", &[]);
        assert_eq!(sse.next().expect("an event").data["auth"]["type"], "anonymous");
        let mut ws = server.ws("/v1/ws", &[]);
        let welcome = ws.next();
        assert_eq!(welcome["auth"]["type"], "anonymous");
        assert!(welcome["auth"]["expires_at"].is_null(), "{welcome}");
        ws.send(json!({ "type": "subscribe", "stream": "closed", "id": 1 }));
        assert_eq!(ws.next()["code"], "MISSING_CREDENTIAL");
        ws.send(json!({ "type": "subscribe", "stream": "open", "id": 2 }));
        assert_eq!(ws.next()["type"], "subscribed");
        ws.next_of("snapshot");
        ws.send(json!({ "type": "auth_update", "token": "nonsense", "id": 3 }));
        let frame = ws.next();
        assert_eq!((&frame["code"], &frame["id"]), (&json!("AUTH_UPDATE_REJECTED"), &json!(3)));
        ws.send(json!({ "type": "auth_update", "token": token_of("u1"), "id": 4 }));
        let frame = ws.next();
        assert_eq!((&frame["type"], &frame["id"]), (&json!("auth_ok"), &json!(4)));
        ws.send(json!({ "type": "subscribe", "stream": "closed", "id": 5 }));
        assert_eq!(ws.next()["type"], "subscribed");
        ws.next_of("snapshot");
        ws.send(json!({ "type": "auth_update", "token": token_of("u2"), "id": 6 }));
        assert_eq!(ws.next()["code"], "AUTH_SUBJECT_MISMATCH", "it is u1's now");
        // A stream connection too.
        let mut ws = server.ws("/v1/streams/open", &[]);
        assert_eq!(ws.next()["auth"]["type"], "anonymous");
        ws.send(json!({ "type": "auth_update", "token": token_of("u1") }));
        assert_eq!(ws.next_of("auth_ok")["expires_at"].as_u64().map(|at| at / 1_000_000 > now_s()), Some(true));
    });
}

// The first message.

#[test]
fn the_first_message_may_bring_the_token() {
    on_each_driver(|setup| {
        let upstream = Upstream::start();
        upstream.set_json("/leads", "[]");
        let server = setup
            .auth("first_message = \"2s\"")
            .stream("leads", &upstream.url("/leads"), "")
            .stream("agents", &upstream.url("/leads"), "roles = [\"agent\"]")
            .start();
        let auth = |token: &str| json!({ "type": "auth", "token": token });
        let good = token_of("u1");
        let mut ws = server.ws("/v1/streams/leads", &[of("Sec-WebSocket-Protocol", "restcast.v1")]);
        assert_eq!(ws.upgrade.header("sec-websocket-protocol"), Some("restcast.v1"));
        // Nothing else is read before.
        ws.send(json!({ "type": "subscribe", "stream": "leads", "id": 1 }));
        ws.send(auth(&good));
        assert_eq!(ws.next()["auth"]["sub"], "u1", "welcome comes first");
        assert_eq!(ws.next()["type"], "snapshot");
        let mut ws = server.ws("/v1/ws", &[]);
        ws.send(auth(&good));
        ws.send(json!({ "type": "subscribe", "stream": "leads", "id": 2 }));
        assert_eq!(ws.next()["type"], "welcome");
        assert_eq!(ws.next(), json!({ "type": "subscribed", "stream": "leads", "id": 2 }));
        let expired = mint(json!({ "sub": "u1", "exp": now_s() - 60 }));
        let elsewhere = mint(json!({ "sub": "u1", "exp": now_s() + 60, "streams": ["leads"] }));
        for (path, token, code, reason) in [
            ("/v1/streams/leads", "nonsense", 4001, "invalid_token"),
            ("/v1/ws", "nonsense", 4001, "invalid_token"),
            ("/v1/streams/leads", &expired, 4001, "invalid_token"),
            ("/v1/streams/agents", &good, 4003, "forbidden"),
            ("/v1/streams/none", &elsewhere, 4003, "forbidden"),
            ("/v1/streams/none", &good, 4004, "not_found"),
            ("/v1/streams/none", "nonsense", 4001, "invalid_token"),
        ] {
            let mut ws = server.ws(path, &[]);
            ws.send(auth(token));
            assert_eq!(ws.closed(), (code, reason.to_owned()), "{path}");
        }
        for path in ["/v1/streams/leads", "/v1/ws"] {
            let begun = Instant::now();
            let mut ws = server.ws(path, &[]);
            ws.send_message(Message::Ping(vec![1].into()));
            let (frames, close) = ws.until_close();
            assert_eq!((frames, close), (vec![], (4008, "auth_timeout".to_owned())), "{path}");
            assert!(begun.elapsed() >= 2000 * MS, "closed early, after {:?}", begun.elapsed());
        }
        // What is presented in the handshake is judged there; SSE has no first message.
        assert_eq!(upgraded(&server, "/v1/ws", &[bearer("nonsense")]), is(401, "INVALID_TOKEN"));
        let answer = server.get("/v1/streams/leads", &[of("Accept", "text/event-stream")]);
        assert_eq!(outcome(&answer), is(401, "MISSING_CREDENTIAL"));
    });
}

#[test]
fn a_token_that_comes_with_the_handshake_is_read() {
    let (_upstream, server) = served(Setup::new().auth("first_message = \"30s\""));
    let auth = json!({ "type": "auth", "token": token_of("u1") }).to_string();
    let mut raw = server.connect();
    let request = upgrade_request("/v1/streams/leads", server.listen, &[]);
    raw.send(&[request.as_bytes(), &client_frame(false, 1, auth.as_bytes())].concat());
    assert_eq!(raw.head().status, 101);
    let frame: Value = serde_json::from_slice(&raw.frame().2).expect("JSON");
    assert_eq!((&frame["type"], &frame["auth"]["sub"]), (&json!("welcome"), &json!("u1")));
}

#[test]
fn a_stream_that_allows_anonymous_does_not_wait_for_a_first_message() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", "[]");
    let setup = Setup::new().auth("first_message = \"30s\"");
    let server = setup.stream("open", &upstream.url("/leads"), "allow_anonymous = true").start();
    let mut ws = server.ws("/v1/streams/open", &[]);
    assert_eq!(ws.next()["auth"]["type"], "anonymous");
    ws.next_of("snapshot");
    // The first message may still come, and raises it.
    ws.send(json!({ "type": "auth", "token": token_of("u1") }));
    assert_eq!(ws.next()["type"], "auth_ok");
}

// Tokens.

/// A token of these very texts, signed with the tests' secret.
fn sign_text(header: &str, claims: &str) -> String {
    let text = [header, claims].map(|part| URL_SAFE_NO_PAD.encode(part)).join(".");
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, SECRET.as_bytes());
    format!("{text}.{}", URL_SAFE_NO_PAD.encode(ring::hmac::sign(&key, text.as_bytes())))
}

#[test]
fn tokens_are_accepted_and_refused_by_the_rules() {
    on_each_driver(|setup| {
        let other = "another secret of the tests, of 64 bytes and more, for the longer hash";
        let (_upstream, server) = served(setup.key("k2", "HS512", other));
        let claims = || json!({ "sub": "u1", "exp": now_s() + 600 });
        let (good, exp) = (mint(claims()), now_s() + 600);
        let hs = |kid: &str| json!({ "alg": "HS256", "kid": kid });
        let parts: Vec<&str> = good.split('.').collect();
        let header = "{\"alg\":\"HS256\"}";
        let payload = format!("{{\"exp\":{exp}}}");
        let accepted = |what: &str, token: &str| {
            assert_eq!(server.get("/v1/streams/leads", &[bearer(token)]).status, 200, "{what}");
        };
        let refused = |what: &str, token: &str| {
            let answer = server.get("/v1/streams/leads", &[bearer(token)]);
            assert_eq!(outcome(&answer), is(401, "INVALID_TOKEN"), "{what}");
        };
        accepted("as it should be", &good);
        accepted("without kid", &mint_by(json!({ "alg": "HS256" }), SECRET, claims()));
        accepted("with typ", &mint_by(json!({ "alg": "HS256", "typ": "JWT" }), SECRET, claims()));
        accepted("by another key", &mint_by(json!({ "alg": "HS512", "kid": "k2" }), other, claims()));
        accepted("by another key, without kid", &mint_by(json!({ "alg": "HS512" }), other, claims()));
        accepted("without sub", &mint(json!({ "exp": exp })));
        accepted("of this moment", &mint(json!({ "exp": exp, "nbf": now_s(), "iat": now_s() })));
        accepted("not before, within the leeway", &mint(json!({ "exp": exp, "nbf": now_s() + 2 })));
        accepted("with aud and iss that nobody asked for", &mint(json!({ "exp": exp, "iss": "i", "aud": "a" })));
        accepted("the exact texts", &sign_text(header, &payload));
        refused("another secret", &mint_by(hs("k1"), other, claims()));
        refused("an unknown kid", &mint_by(hs("k9"), SECRET, claims()));
        refused("the kid of a key of another alg", &mint_by(hs("k2"), other, claims()));
        refused("alg none", &mint_by(json!({ "alg": "none" }), SECRET, claims()));
        refused("alg none, unsigned", &format!("{}..", parts[0]));
        refused("no signature", &format!("{}.{}.", parts[0], parts[1]));
        refused("two parts", &format!("{}.{}", parts[0], parts[1]));
        refused("four parts", &format!("{good}.{}", parts[2]));
        refused("another payload", &format!("{}.{}.{}", parts[0], URL_SAFE_NO_PAD.encode(&payload), parts[2]));
        refused("padding", &format!("{good}="));
        refused("alg in lower case", &mint_by(json!({ "alg": "hs256" }), SECRET, claims()));
        refused("crit", &mint_by(json!({ "alg": "HS256", "crit": ["x"], "x": 1 }), SECRET, claims()));
        refused("b64", &mint_by(json!({ "alg": "HS256", "crit": ["b64"], "b64": false }), SECRET, claims()));
        refused("no exp", &mint(json!({ "sub": "u1" })));
        refused("exp as text", &mint(json!({ "exp": exp.to_string() })));
        refused("exp null", &mint(json!({ "exp": null })));
        refused("exp out of range", &sign_text(header, "{\"exp\":1e300}"));
        refused("not yet valid", &mint(json!({ "exp": exp, "nbf": now_s() + 60 })));
        refused("nbf as text", &mint(json!({ "exp": exp, "nbf": "1" })));
        refused("sub as a number", &mint(json!({ "exp": exp, "sub": 7 })));
        refused("a member twice", &sign_text(header, &format!("{{\"exp\":{exp},\"exp\":{exp}}}")));
        refused("a header's member twice", &sign_text("{\"alg\":\"HS256\",\"alg\":\"HS256\"}", &payload));
        refused("no object", &sign_text(header, &format!("[{exp}]")));
        // Its last character has bits that mean nothing: only one spelling is canonical.
        let last = parts[2].chars().last().expect("a signature");
        let alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
        let next = alphabet.find(last).and_then(|at| alphabet.chars().nth(at + 1)).expect("43 characters end even");
        refused("another spelling", &format!("{}{next}", &good[..good.len() - 1]));
        let padded = |bytes: usize| mint(json!({ "exp": exp, "pad": "x".repeat(bytes) }));
        let per_byte = padded(6000).len() - padded(3000).len();
        let room = ((8 << 10) - padded(0).len()) * 3000 / per_byte - 4;
        accepted("8 KiB, nearly", &padded(room));
        assert!(padded(room).len() > (8 << 10) - 16 && padded(room + 16).len() > 8 << 10);
        refused("over 8 KiB", &padded(room + 16));
        let expired = |ago: u64| mint(json!({ "sub": "u1", "exp": now_s() - ago }));
        accepted("expired, within the leeway", &expired(1));
        let answer = server.get("/v1/streams/leads", &[bearer(&expired(10))]);
        assert_eq!(outcome(&answer), is(401, "TOKEN_EXPIRED"));
    });
}

#[test]
fn issuer_and_audience_are_required_where_they_are_configured() {
    let setup = Setup::new().jwt("issuer = [\"https://a.example\", \"https://b.example\"]\naudience = \"restcast\"");
    let (_upstream, server) = served(setup);
    let exp = now_s() + 600;
    let status = |claims: Value| server.get("/v1/streams/leads", &[bearer(&mint(claims))]).status;
    assert_eq!(status(json!({ "exp": exp, "iss": "https://a.example", "aud": "restcast" })), 200);
    assert_eq!(status(json!({ "exp": exp, "iss": "https://b.example", "aud": ["x", "restcast"] })), 200);
    for claims in [
        json!({ "exp": exp, "aud": "restcast" }),
        json!({ "exp": exp, "iss": "https://a.example" }),
        json!({ "exp": exp, "iss": "https://a.example/", "aud": "restcast" }),
        json!({ "exp": exp, "iss": "https://a.example", "aud": "restcast2" }),
        json!({ "exp": exp, "iss": "https://a.example", "aud": [] }),
        json!({ "exp": exp, "iss": ["https://a.example"], "aud": "restcast" }),
    ] {
        assert_eq!(status(claims.clone()), 401, "{claims}");
    }
    // Identity is issuer and subject.
    let of = |issuer: &str| mint(json!({ "sub": "u1", "exp": exp, "iss": issuer, "aud": "restcast" }));
    let mut ws = server.ws("/v1/ws", &[bearer(&of("https://a.example"))]);
    ws.next_of("welcome");
    ws.send(json!({ "type": "auth_update", "token": of("https://b.example") }));
    assert_eq!(ws.next()["code"], "AUTH_SUBJECT_MISMATCH");
    ws.send(json!({ "type": "auth_update", "token": of("https://a.example") }));
    assert_eq!(ws.next()["type"], "auth_ok");
}

#[test]
fn a_leeway_of_nothing_is_none() {
    let (_upstream, server) = served(Setup::new().jwt("leeway = \"0s\""));
    let token = |exp: u64| mint(json!({ "sub": "u1", "exp": exp }));
    let answer = server.get("/v1/streams/leads", &[bearer(&token(now_s() - 1))]);
    assert_eq!(outcome(&answer), is(401, "TOKEN_EXPIRED"));
    assert_eq!(server.get("/v1/streams/leads", &[bearer(&token(now_s() + 60))]).status, 200);
}

#[test]
fn a_key_shorter_than_its_hash_is_refused_at_start() {
    let short = "thirty-one bytes are too short.";
    assert_eq!(short.len(), 31);
    let (status, out, err) = run(&["serve"], &Setup::new().key("short", "HS256", short));
    assert!(!status.success() && out.is_empty(), "{out}");
    assert!(err.contains("32") && !err.contains(short), "{err}");
}

// Limits on failures.

#[test]
fn failed_updates_in_band_count_for_the_address_too() {
    let (_upstream, server) = served(Setup::new().limits("auth_failures_per_minute = 2"));
    let good = token_of("u1");
    let mut ws = server.ws("/v1/streams/leads", &[bearer(&good)]);
    ws.next_of("snapshot");
    for failures in 0..4 {
        let begun = Instant::now();
        ws.send(json!({ "type": "auth_update", "token": "bad", "id": failures }));
        let refused = ws.next_of("error");
        assert_eq!((&refused["code"], &refused["id"]), (&json!("AUTH_UPDATE_REJECTED"), &json!(failures)));
        assert_eq!(refused["reason"], "not_three_parts");
        let took = begun.elapsed();
        assert!(failures < 2 || took >= 900 * MS, "after {failures} failures it was told after {took:?}");
    }
    assert_eq!(outcome(&server.get("/v1/streams/leads", &[bearer(&good)])), is(429, "RATE_LIMITED"));
    // The fifth closes, and is not looked at.
    ws.send(json!({ "type": "auth_update", "token": good, "id": 4 }));
    assert_eq!(ws.next_of("error")["reason"], "rate_limited");
    assert_eq!(ws.closed(), (4001, "auth_update_rejected".to_owned()));
}

#[test]
fn while_a_refusal_is_held_back_no_other_credential_of_the_connection_is_looked_at() {
    let (_upstream, server) = served(Setup::new().limits("auth_failures_per_minute = 1"));
    let good = token_of("u1");
    let mut ws = server.ws("/v1/streams/leads", &[bearer(&good)]);
    let told = |ws: &mut support::server::Ws| {
        let frame = ws.next_of("error");
        (frame["id"].clone(), frame["reason"].clone())
    };
    ws.send(json!({ "type": "auth_update", "token": "bad", "id": 1 }));
    assert_eq!(told(&mut ws), (json!(1), json!("not_three_parts")));
    for (token, id) in [("bad", 2), (&*good, 3)] {
        ws.send(json!({ "type": "auth_update", "token": token, "id": id }));
    }
    assert_eq!(told(&mut ws), (json!(3), json!("busy")));
    assert_eq!(told(&mut ws), (json!(2), json!("not_three_parts")));
}

#[test]
fn a_first_message_that_fails_too_often_is_answered_late_and_then_not_looked_at() {
    on_each_driver(|setup| {
        let setup = setup.limits("auth_failures_per_minute = 2").auth("first_message = \"30s\"");
        let (_upstream, server) = served(setup);
        let first = |token: &str| {
            let mut ws = server.ws("/v1/streams/leads", &[]);
            let begun = Instant::now();
            ws.send(json!({ "type": "auth", "token": token }));
            // What comes behind it changes nothing, and is answered as ever.
            ws.send(json!({ "type": "auth", "token": token_of("u1") }));
            ws.send_message(Message::Ping(vec![1].into()));
            (ws.closed(), begun.elapsed())
        };
        for failures in 0..4 {
            let (close, took) = first("bad");
            assert_eq!(close, (4001, "invalid_token".to_owned()));
            assert!(failures < 2 || took >= 900 * MS, "after {failures} failures a close came after {took:?}");
        }
        assert_eq!(first(&token_of("u1")).0, (1008, "rate_limited".to_owned()), "no credential would be looked at");
    });
}

#[test]
fn whoever_ends_their_side_gets_the_late_answer_and_then_the_end() {
    let (_upstream, server) = served(Setup::new().limits("auth_failures_per_minute = 1\nkeep_alive = \"10m\""));
    for late in [false, true] {
        let begun = Instant::now();
        let mut raw = server.connect();
        raw.send_request("GET", "/v1/streams/leads", &[bearer("bad")], "");
        raw.socket().shutdown(std::net::Shutdown::Write).expect("it is open");
        assert_eq!(outcome(&raw.answer()), is(401, "INVALID_TOKEN"));
        assert!(!late || begun.elapsed() >= 900 * MS, "it came after {:?}", begun.elapsed());
        assert!(raw.is_closed(), "nothing more can be asked");
    }
}

#[test]
fn failed_credentials_are_delayed_and_then_refused() {
    on_each_driver(|setup| {
        let setup = setup.limits("auth_failures_per_minute = 3").server("trusted_proxies = [\"127.0.0.0/8\"]");
        let (_upstream, server) = served(setup);
        let from = |client: &str, token: &str| {
            let begun = Instant::now();
            let answer = server.get("/v1/streams/leads", &[bearer(token), of("X-Forwarded-For", client)]);
            (answer, begun.elapsed())
        };
        let (good, bad) = (token_of("u1"), "bad");
        for _ in 0..3 {
            assert_eq!(outcome(&from("192.0.2.1", bad).0), is(401, "INVALID_TOKEN"));
        }
        let (answer, took) = from("192.0.2.1", bad);
        assert_eq!(outcome(&answer), is(401, "INVALID_TOKEN"));
        assert!(took >= 900 * MS, "past the limit an answer is delayed, not {took:?}");
        let (answer, took) = from("192.0.2.1", &good);
        assert_eq!(answer.status, 200);
        assert!(took < PATIENCE, "a good credential is not delayed");
        // Further failures are at last not looked at.
        let refused = (0..10).map(|_| from("192.0.2.1", bad).0).find(|answer| answer.status == 429);
        let refused = refused.expect("429 at last");
        assert_eq!(refused.code(), "RATE_LIMITED");
        assert!(refused.header("retry-after").is_some_and(|seconds| seconds.parse::<u32>().is_ok()));
        assert_eq!(outcome(&from("192.0.2.1", &good).0), is(429, "RATE_LIMITED"), "no cryptography for this address");
        assert_eq!(from("192.0.2.2", &good).0.status, 200, "others are not meant");
        assert_eq!(outcome(&from("192.0.2.2", bad).0), is(401, "INVALID_TOKEN"));
        // Without a credential there is nothing to guess.
        let answer = server.get("/v1/streams/leads", &[of("X-Forwarded-For", "192.0.2.1")]);
        assert_eq!(outcome(&answer), is(401, "MISSING_CREDENTIAL"));
    });
}

#[test]
fn handshakes_per_second_are_limited_by_address() {
    on_each_driver(|setup| {
        let setup = setup.limits("handshakes_per_second_per_address = 5").server("trusted_proxies = [\"127.0.0.0/8\"]");
        let (_upstream, server) = served(setup);
        let mut raw = server.connect();
        let statuses: Vec<u16> = (0..100)
            .map(|_| raw.request("GET", "/healthz", &[of("X-Forwarded-For", "192.0.2.1")], "").status)
            .collect();
        assert_eq!(statuses[..5], [200; 5]);
        let refused = statuses.iter().filter(|&&status| status == 429).count();
        assert!(refused > 0, "100 requests in a row are more than 5 a second");
        let answer = raw.request("GET", "/healthz", &[of("X-Forwarded-For", "192.0.2.2")], "");
        assert_eq!(answer.status, 200, "another address has its own count");
        eventually("the first may come again", || {
            (raw.request("GET", "/healthz", &[of("X-Forwarded-For", "192.0.2.1")], "").status == 200).then_some(())
        });
    });
}
