//! Templates against the built server: what claims and parameters become, what is refused, and that two callers never
//! share a response that they could not both have asked for.
#![cfg(feature = "runtime")]

mod support;
#[path = "support/watcher.rs"]
mod watcher;

use serde_json::{Value, json};

use support::Upstream;
use support::server::{Answer, DRIVERS, Server, Setup, bearer, eventually, mint, now_s};
use watcher::{Over, Watcher, on_core, polled, requests_for};

/// The header of a token with these claims.
fn with(claims: Value) -> (&'static str, String) {
    let mut all = json!({ "sub": "u1", "exp": now_s() + 600 });
    for (name, value) in claims.as_object().expect("claims") {
        all[name] = value.clone();
    }
    bearer(&mint(all))
}

fn of(company: &str) -> (&'static str, String) {
    with(json!({ "companyId": company }))
}

fn get(server: &Server, path: &str, token: (&'static str, String)) -> Answer {
    server.get(path, &[token])
}

fn setup(upstream: &Upstream) -> Setup {
    Setup::new()
        .stream("company", &upstream.url("/companies/{claims.companyId}"), "")
        .stream("search", &upstream.url("/search?q={claims.companyId}&fixed=1"), "")
        .stream(
            "leads",
            &upstream.url("/companies/{claims.companyId}/leads?r={query.region}"),
            "params = [\"region\"]\nparams_pattern = { region = \"^[a-z]{2}$\" }",
        )
        .stream("free", &upstream.url("/free/{query.name}"), "params = [\"name\"]")
}

#[test]
fn claims_fill_the_path_and_the_query_percent_encoded() {
    let upstream = Upstream::start();
    let server = setup(&upstream).start();
    for (claim, encoded) in [
        (json!("acme"), "acme"),
        (json!(42), "42"),
        (json!(-7), "-7"),
        (json!(9_007_199_254_740_993_u64), "9007199254740993"),
        (json!("a b/ü"), "a%20b%2F%C3%BC"),
        (json!("?#%&+=;:@"), "%3F%23%25%26%2B%3D%3B%3A%40"),
        (json!("../x"), "..%2Fx"),
        (json!("%2e%2e"), "%252e%252e"),
        (json!("a.b_c~d-e"), "a.b_c~d-e"),
        (json!("..."), "..."),
        (json!("{claims.sub}"), "%7Bclaims.sub%7D"),
        (json!("\\..\\"), "%5C..%5C"),
    ] {
        upstream.set_json(&format!("/companies/{encoded}"), &format!("[{claim}]"));
        upstream.set_json("/search", "[1]");
        let token = with(json!({ "companyId": claim }));
        let answer = get(&server, "/v1/streams/company", token.clone());
        assert_eq!((answer.status, answer.json()), (200, json!([claim])), "{claim}");
        assert_eq!(get(&server, "/v1/streams/search", token).status, 200);
        for target in [format!("/companies/{encoded}"), format!("/search?q={encoded}&fixed=1")] {
            assert!(!requests_for(&upstream, &target).is_empty(), "{target} in {:?}", upstream.requests());
        }
    }
}

#[test]
fn a_claim_that_is_missing_or_cannot_stand_in_a_url_is_refused_and_nothing_is_asked() {
    let upstream = Upstream::start();
    let server = setup(&upstream).start();
    for (claims, code) in [
        (json!({}), "CLAIM_MISSING"),
        (json!({ "companyid": "acme" }), "CLAIM_MISSING"),
        (json!({ "companyId": "" }), "CLAIM_INVALID"),
        (json!({ "companyId": "." }), "CLAIM_INVALID"),
        (json!({ "companyId": ".." }), "CLAIM_INVALID"),
        (json!({ "companyId": "a\u{0}b" }), "CLAIM_INVALID"),
        (json!({ "companyId": "a\r\nHost: x" }), "CLAIM_INVALID"),
        (json!({ "companyId": "\u{7f}" }), "CLAIM_INVALID"),
        (json!({ "companyId": "\u{85}" }), "CLAIM_INVALID"),
        (json!({ "companyId": "x".repeat(1025) }), "CLAIM_INVALID"),
    ] {
        for stream in ["company", "search", "leads?region=eu"] {
            let path = format!("/v1/streams/{stream}");
            let answer = get(&server, &path, with(claims.clone()));
            assert_eq!((answer.status, &*answer.code()), (403, code), "{stream} {claims}");
            for over in [Over::Ws, Over::Sse] {
                let refused = Watcher::try_open(&server, over, &path, &[with(claims.clone())]).err().expect("refused");
                assert_eq!((refused.status, &*refused.code()), (403, code), "{stream} {claims}");
            }
            let mut ws = Watcher::open(&server, Over::Ws, "/v1/ws", &[with(claims.clone())]);
            ws.send(&json!({"type":"subscribe","stream":stream,"id":1}).to_string());
            assert_eq!(ws.next_of("error").json()["code"], code, "{stream} {claims}");
        }
    }
    // What is neither a text nor an integer fills nothing.
    for claim in [json!(true), json!(1.5), json!(null), json!(["a"]), json!({"a": 1})] {
        let answer = get(&server, "/v1/streams/company", with(json!({ "companyId": claim })));
        assert_eq!(answer.status, 403, "{claim}");
        assert!(["CLAIM_MISSING", "CLAIM_INVALID"].contains(&&*answer.code()), "{claim}");
    }
    assert_eq!(upstream.request_count(), 0);
}

#[test]
fn parameters_are_the_streams_own_and_match_their_patterns() {
    let upstream = Upstream::start();
    upstream.set_json("/companies/acme/leads", "[1]");
    for name in ["a%2Fb", "%C3%BC", "x"] {
        upstream.set_json(&format!("/free/{name}"), "[2]");
    }
    let server = setup(&upstream).start();
    let path = |query: &str| format!("/v1/streams/{query}");
    for bad in [
        "leads",
        "leads?region=",
        "leads?region=EU",
        "leads?region=euu",
        "leads?region=e%00",
        "leads?region=eu&region=us",
        "leads?Region=eu",
        "free?name=",
        "free?name=..",
        "free?name=.",
        "free?name=%2E%2E",
        "free?name=a%0Ab",
    ] {
        let answer = get(&server, &path(bad), of("acme"));
        assert_eq!((answer.status, &*answer.code()), (400, "BAD_REQUEST"), "{bad}");
        if bad.contains("&region") {
            continue; // In a name that is no name at all.
        }
        let mut ws = Watcher::open(&server, Over::Ws, "/v1/ws", &[of("acme")]);
        ws.send(&json!({"type":"subscribe","stream":bad}).to_string());
        let code = ws.next_of("error").json()["code"].clone();
        assert!(code == "BAD_REQUEST", "{bad}: {code}");
    }
    assert_eq!(upstream.request_count(), 0);
    for (good, target) in [
        ("leads?region=eu", "/companies/acme/leads?r=eu"),
        ("leads?region=%75s&unknown=ignored", "/companies/acme/leads?r=us"),
        ("free?name=a%2Fb", "/free/a%2Fb"),
        ("free?name=%C3%BC", "/free/%C3%BC"),
        ("free?name=x&name2=y", "/free/x"),
    ] {
        assert_eq!(get(&server, &path(good), of("acme")).status, 200, "{good}");
        assert!(!requests_for(&upstream, target).is_empty(), "{target} in {:?}", upstream.requests());
    }
}

#[test]
fn two_tenants_never_share_and_two_callers_with_the_same_claim_do() {
    for driver in DRIVERS {
        let upstream = Upstream::start();
        let value = |tenant: &str, n: u32| format!(r#"{{"of":"{tenant}","n":{n},"pad":"{}"}}"#, "p".repeat(100));
        for tenant in ["acme", "zeta"] {
            upstream.set_json(&format!("/companies/{tenant}"), &value(tenant, 1));
        }
        let server = setup(&upstream).driver(driver).start();
        let path = "/v1/streams/company";
        let open = |core: u16, tenant: &str, over: Over| {
            let token = with(json!({ "companyId": tenant, "sub": format!("{tenant}-{core}") }));
            on_core(&server, core, |server| Watcher::open(server, over, path, std::slice::from_ref(&token)))
        };
        let mut watchers: Vec<(&str, Watcher)> = Vec::new();
        for tenant in ["acme", "zeta"] {
            for core in 0..2 {
                watchers.push((tenant, open(core, tenant, Over::Ws)));
                watchers.push((tenant, open(core, tenant, Over::Sse)));
            }
        }
        for (tenant, watcher) in &mut watchers {
            let frame = watcher.event();
            assert_eq!((frame.stream(), frame.member("data")), ("company".into(), value(tenant, 1)));
            assert!(!watcher.welcome.text.contains("companyId"), "claims are never shown");
        }
        let epochs = |of: &str| -> Vec<String> {
            let of = watchers.iter().filter(|(tenant, _)| *tenant == of);
            of.map(|(_, watcher)| watcher.holding("company").epoch.clone()).collect()
        };
        let (acme, zeta) = (epochs("acme"), epochs("zeta"));
        assert!(acme.iter().all(|epoch| *epoch == acme[0]) && zeta.iter().all(|epoch| *epoch == zeta[0]));
        assert_ne!(acme[0], zeta[0]);
        assert_eq!(server.metric(&["restcast_streams"]), 2.0, "one poller for each tenant");

        // One tenant's change is the other's nothing.
        upstream.set_json("/companies/acme", &value("acme", 2));
        polled(&upstream, "/companies/acme");
        polled(&upstream, "/companies/zeta");
        upstream.set_json("/companies/zeta", &value("zeta", 3));
        for (tenant, watcher) in &mut watchers {
            assert_eq!(watcher.event().seq(), 2);
            let n = if *tenant == "acme" { 2 } else { 3 };
            assert_eq!(watcher.value("company"), watcher::canonical(&value(tenant, n)));
        }
        for (tenant, n) in [("acme", 2), ("zeta", 3)] {
            assert_eq!(get(&server, path, of(tenant)).text(), value(tenant, n));
        }
        // Another tenant's place is none of theirs, and its ETag matches nothing of theirs.
        let since = format!("{path}?since={}-1", zeta[0]);
        let frame = Watcher::open(&server, Over::Ws, &since, &[of("acme")]).event();
        assert_eq!((frame.kind(), frame.epoch()), ("snapshot".into(), acme[0].clone()));
        let answer = server.get(path, &[of("acme"), ("If-None-Match", format!("\"{}-2\"", zeta[0]))]);
        assert_eq!((answer.status, answer.text()), (200, value("acme", 2)));
    }
}

#[test]
fn parameters_make_streams_of_their_own_within_a_tenant() {
    let upstream = Upstream::start();
    upstream.set_json("/companies/acme/leads", "[1]");
    upstream.set_json("/companies/zeta/leads", "[2]");
    let server = setup(&upstream).start();
    let mut ws = Watcher::open(&server, Over::Ws, "/v1/ws", &[of("acme")]);
    for region in ["eu", "us"] {
        ws.send(&json!({"type":"subscribe","stream":format!("leads?region={region}")}).to_string());
        ws.next_of("subscribed");
        assert_eq!(ws.event().stream(), format!("leads?region={region}"));
    }
    let mut other = Watcher::open(&server, Over::Sse, "/v1/streams/leads?region=eu", &[of("zeta")]);
    let frame = other.event();
    assert_eq!((frame.stream(), frame.member("data")), ("leads?region=eu".into(), "[2]".into()));
    assert_eq!(server.metric(&["restcast_streams"]), 3.0);
    assert_ne!(other.holding("leads?region=eu").epoch, ws.holding("leads?region=eu").epoch);
}

#[test]
fn a_body_is_filled_with_json_and_is_part_of_what_is_shared() {
    let upstream = Upstream::start();
    upstream.set_json("/search", r#"[{"id":1}]"#);
    let body = r#"{"company":{claims.companyId},"page":{"max":10},"region":{query.region},"none":null}"#;
    let lines = format!(
        "method = \"POST\"\nparams = [\"region\"]\nheaders = {{ \"Content-Type\" = \"application/json\" }}\nbody = '{body}'"
    );
    let server = Setup::new().stream("search", &upstream.url("/search"), &lines).start();
    for (claim, region, filled) in [
        (json!("acme"), "eu", r#"{"company":"acme","page":{"max":10},"region":"eu","none":null}"#),
        (json!(42), "eu", r#"{"company":42,"page":{"max":10},"region":"eu","none":null}"#),
        (json!("42"), "eu", r#"{"company":"42","page":{"max":10},"region":"eu","none":null}"#),
        (json!("a\",\"admin\":true,\"b\":\"\\"), "..", ""),
    ] {
        let answer = get(&server, &format!("/v1/streams/search?region={region}"), with(json!({ "companyId": claim })));
        assert_eq!(answer.status, 200, "{claim}");
        let bodies: Vec<String> = upstream
            .requests()
            .into_iter()
            .map(|seen| {
                assert_eq!(seen.method, "POST");
                assert_eq!(seen.header("if-none-match"), None, "a POST is not conditional");
                String::from_utf8(seen.body).expect("UTF-8")
            })
            .collect();
        if !filled.is_empty() {
            assert!(bodies.iter().any(|body| body == filled), "{filled} in {bodies:?}");
        }
        let wanted = json!({"company": claim, "page": {"max": 10}, "region": region, "none": null});
        let parsed = bodies.iter().map(|body| serde_json::from_str::<Value>(body).expect("the body is JSON"));
        assert!(parsed.into_iter().any(|body| body == wanted), "no climbing out of a string: {bodies:?}");
    }
    assert_eq!(server.metric(&["restcast_streams"]), 4.0, "42 and \"42\" are not the same question");
    let answer = get(&server, "/v1/streams/search?region=eu", with(json!({})));
    assert_eq!((answer.status, &*answer.code()), (403, "CLAIM_MISSING"));
}

#[test]
fn the_filled_in_urls_of_one_subject_are_limited() {
    let upstream = Upstream::start();
    for name in ["a", "b", "c"] {
        upstream.set_json(&format!("/free/{name}"), "[1]");
    }
    let server = setup(&upstream).limits("streams_per_subject = 2").start();
    let mut ws = Watcher::open(&server, Over::Ws, "/v1/ws", &[of("acme")]);
    for name in ["a", "b"] {
        ws.send(&json!({"type":"subscribe","stream":format!("free?name={name}")}).to_string());
        ws.next_of("subscribed");
        ws.event();
    }
    ws.send(r#"{"type":"subscribe","stream":"free?name=c","id":3}"#);
    let refused = ws.next_of("error").json();
    assert_eq!((&refused["code"], &refused["id"]), (&json!("TOO_MANY_STREAMS"), &json!(3)));
    // What it watches already costs nothing more, what it gives up is free again, and another subject has its own.
    let mut other = Watcher::open(&server, Over::Ws, "/v1/ws", &[of("acme")]);
    other.send(r#"{"type":"subscribe","stream":"free?name=a"}"#);
    other.next_of("subscribed");
    other.event();
    ws.send(r#"{"type":"unsubscribe","stream":"free?name=b"}"#);
    ws.next_of("unsubscribed");
    // A place is given on no sooner than an interval after it was taken.
    eventually("its place is free", || {
        ws.send(r#"{"type":"subscribe","stream":"free?name=c"}"#);
        let answer = ws.next();
        assert!(answer.kind() == "subscribed" || answer.json()["code"] == "TOO_MANY_STREAMS", "{}", answer.text);
        (answer.kind() == "subscribed").then_some(())
    });
    ws.event();
    let token = with(json!({ "sub": "u2", "companyId": "acme" }));
    let mut second = Watcher::open(&server, Over::Ws, "/v1/streams/free?name=b", &[token]);
    assert_eq!(second.event().stream(), "free?name=b");
    eventually("three streams", || (server.metric(&["restcast_streams"]) == 3.0).then_some(()));
}

#[test]
fn a_static_body_is_no_template() {
    let upstream = Upstream::start();
    let lines = "method = \"POST\"\nbody = '{\"all\":true}'";
    let mut setup = Setup::new().limits("streams_per_subject = 1");
    for id in ["a", "b"] {
        upstream.set_json(&format!("/{id}"), "[1]");
        setup = setup.stream(id, &upstream.url(&format!("/{id}")), lines);
    }
    let server = setup.start();
    let mut ws = Watcher::open(&server, Over::Ws, "/v1/ws", &[of("acme")]);
    for id in ["a", "b"] {
        ws.send(&json!({"type":"subscribe","stream":id}).to_string());
        ws.next_of("subscribed");
        assert_eq!(ws.event().stream(), id);
    }
    assert_eq!(upstream.requests()[0].body, br#"{"all":true}"#);
}
