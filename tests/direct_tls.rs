//! Direct mode and ephemeral sessions with upstreams over TLS: secrets travel sealed and to nobody else, whoever is not
//! vouched for is told nothing, and one poll over one connection serves all who ask the same.
#![cfg(feature = "runtime")]

mod support;
#[path = "support/watcher.rs"]
mod watcher;

use std::time::Duration;

use serde_json::{Value, json};

use support::server::{DRIVERS, Server, Setup, Ws, bearer, eventually, token_of};
use support::{Authority, Folder, Reply, Upstream, self_signed};
use watcher::{Over, Watcher, polled, requests_for};

const HEADER: &str = "Bearer hunter2-of-the-target";
const QUERY: &str = "hunter2-in-the-query";
const BODY: &str = "hunter2-in-the-body";

/// An authority that the server trusts as it trusts the system's.
struct Trust {
    authority: Authority,
    folder: Folder,
}

impl Trust {
    fn new() -> Trust {
        Trust { authority: Authority::new(), folder: Folder::new("direct-tls") }
    }

    fn upstream(&self) -> Upstream {
        Upstream::start_tls(&self.authority.identity(&["127.0.0.1"]))
    }

    /// A server where callers may name what is at these upstreams, over TLS.
    fn server(&self, driver: &str, upstreams: &[&Upstream]) -> Server {
        let allowed: Vec<String> = upstreams.iter().map(|upstream| format!("{:?}", upstream.url("/*"))).collect();
        let (key, allowed) = (support::server::SECRET, allowed.join(", "));
        let text = format!(
            "[server]\nlisten = \"127.0.0.1:0\"\ncores = 2\ndriver = {driver:?}\n[admin]\nlisten = \"127.0.0.1:0\"\n\
             [[auth.jwt.key]]\nkid = \"k1\"\nalg = \"HS256\"\nsecret = {key:?}\n\
             [direct]\nallow = [{allowed}]\ninterval_min = \"10ms\"\nlinger = \"300ms\"\n"
        );
        let ca = self.folder.put("ca.pem", &self.authority.pem());
        Setup::of_file(&text).env("SSL_CERT_FILE", &ca).start()
    }
}

/// What is said of a target, secrets and all.
fn said(upstream: &Upstream, path: &str) -> Value {
    json!({
        "type": "open", "url": upstream.url(path), "headers": { "Authorization": HEADER }, "method": "POST",
        "body": { "q": BODY }, "interval_ms": 20, "id": 1,
    })
}

fn open(server: &Server, said: &Value) -> Ws {
    let mut ws = server.ws("/v1/direct", &[bearer(&token_of("u1"))]);
    assert_eq!(ws.next()["type"], "welcome");
    ws.send(said.clone());
    ws
}

/// `/v1/direct?url=…`.
fn direct(url: &str) -> String {
    let escaped: String = url.bytes().map(|byte| format!("%{byte:02X}")).collect();
    format!("/v1/direct?url={escaped}&interval_ms=20")
}

/// Makes an ephemeral session: the path of its stream, the stream, the credential for it.
fn session(server: &Server, said: &Value) -> (String, String, (&'static str, String)) {
    let mut said = said.clone();
    said["ttl_s"] = 600.into();
    let made = server.request("POST", "/v1/sessions", &[bearer(&token_of("u1"))], &said.to_string());
    assert_eq!(made.status, 201, "{made:?}");
    assert!(!made.text().contains("hunter2"));
    let made = made.json();
    let text = |name: &str| made[name].as_str().expect("a text").to_owned();
    (format!("/v1/streams/{}", text("stream")), text("stream"), bearer(&text("token")))
}

fn is_silent(server: &Server) {
    let told = [server.log_text(), server.metrics()].concat();
    assert_eq!(told.lines().find(|line| line.contains("hunter2")), None);
    assert_eq!(server.metric(&["restcast_panics_total"]), 0.0);
}

fn value(of: u32) -> String {
    json!({ "value": of, "pad": "x".repeat(200) }).to_string()
}

#[test]
fn what_is_secret_travels_sealed_and_one_poll_serves_all_forms_and_sessions() {
    for driver in DRIVERS {
        let trust = Trust::new();
        let upstream = trust.upstream();
        let path = format!("/a?key={QUERY}");
        upstream.set_json("/a", &value(1));
        let server = trust.server(driver, &[&upstream]);
        let said = said(&upstream, &path);
        let mut ws = open(&server, &said);
        let first = ws.next_of("snapshot");
        assert_eq!(first["data"], value(1).parse::<Value>().expect("JSON"));
        let once = server.request("POST", "/v1/direct", &[bearer(&token_of("u2"))], &said.to_string());
        assert_eq!((once.status, once.text()), (200, value(1)));
        let (path_of_session, stream, own) = session(&server, &said);
        let mut by_ws = Watcher::open(&server, Over::Ws, &path_of_session, std::slice::from_ref(&own));
        let mut by_sse = Watcher::open(&server, Over::Sse, &path_of_session, &[own]);
        for n in 1..=4 {
            upstream.set_json("/a", &value(n));
            for watcher in [&mut by_ws, &mut by_sse] {
                watcher.event_with(&stream, &value(n));
            }
            while n > 1 && ws.next_of("patch")["patch"][0]["value"] != n {}
        }
        // Whether or not sessions share the poll of direct mode, nobody asks over a second connection, or with less.
        let seen = requests_for(&upstream, &path);
        assert!(seen.iter().all(|seen| {
            seen.header("authorization") == Some(HEADER)
                && seen.method == "POST"
                && seen.body == format!("{{\"q\":\"{BODY}\"}}").into_bytes()
        }));
        assert_eq!(seen.len(), upstream.request_count());
        assert!(upstream.connection_count() <= 2, "{} connections", upstream.connection_count());
        is_silent(&server);
        // The last watcher leaves, and so does what was said: nobody polls.
        drop((ws, by_ws, by_sse));
        watcher::polls_end(&upstream, &path, Duration::from_secs(1));
    }
}

#[test]
fn a_target_without_secrets_is_watched_by_its_url_over_tls() {
    let trust = Trust::new();
    let upstream = trust.upstream();
    upstream.set_json("/a", &value(1));
    let server = trust.server("auto", &[&upstream]);
    let (path, who) = (direct(&upstream.url("/a")), [bearer(&token_of("u1"))]);
    let mut watchers = [Over::Ws, Over::Sse].map(|over| Watcher::open(&server, over, &path, &who));
    let stream = watchers.each_mut().map(|watcher| watcher.event().stream())[0].clone();
    upstream.set_json("/a", &value(2));
    for watcher in &mut watchers {
        watcher.event_with(&stream, &value(2));
    }
    assert_eq!(server.get(&path, &who).text(), value(2));
    polled(&upstream, "/a");
    assert_eq!(upstream.connection_count(), 1, "one connection, kept");
    assert!(upstream.not_modified_count() > 0, "conditions are sent back");
    // The list allows it over TLS, and in no other way.
    let plain = upstream.url("/a").replacen("https", "http", 1);
    assert_eq!(server.get(&direct(&plain), &who).code(), "TARGET_BLOCKED");
    // A redirect is not followed, wherever it leads.
    let away = trust.upstream();
    away.set_json("/b", "\"a lie\"");
    upstream.set("/moved", Reply::status(302).header("Location", &away.url("/b")));
    let mut ws = open(&server, &said(&upstream, "/moved"));
    assert_eq!(ws.next_of("stream_status")["code"], "UPSTREAM_REDIRECT");
    assert_eq!(away.request_count(), 0);
    is_silent(&server);
}

#[test]
fn whoever_is_not_vouched_for_is_told_nothing_in_direct_mode_and_sessions() {
    let (trust, stranger) = (Trust::new(), Authority::new());
    let wrong = [
        ("another name", trust.authority.identity(&["example.com"])),
        ("of the past", trust.authority.expired(&["127.0.0.1"])),
        ("of a stranger", stranger.identity(&["127.0.0.1"])),
        ("of itself", self_signed(&["127.0.0.1"])),
    ];
    let upstreams: Vec<(&str, Upstream)> = wrong.iter().map(|(name, it)| (*name, Upstream::start_tls(it))).collect();
    let server = trust.server("auto", &upstreams.iter().map(|(_, upstream)| upstream).collect::<Vec<_>>());
    for (name, upstream) in &upstreams {
        upstream.set_json("/a", "\"a lie\"");
        let said = said(upstream, &format!("/a?key={QUERY}"));
        let mut ws = open(&server, &said);
        let status = ws.next_of("stream_status");
        assert_eq!((&status["state"], &status["code"]), (&json!("failing"), &json!("UPSTREAM_TLS")), "{name}");
        let (path, _, own) = session(&server, &said);
        let mut ws = server.ws(&path, std::slice::from_ref(&own));
        assert_eq!(ws.next_of("stream_status")["code"], "UPSTREAM_TLS", "{name}");
        let answer = server.get(&path, &[own]);
        assert_eq!((answer.status, answer.code()), (503, "STREAM_UNAVAILABLE".to_owned()), "{name}");
        assert_eq!(upstream.request_count(), 0, "{name}: nothing was said");
    }
    is_silent(&server);
}

#[test]
fn a_target_whose_place_a_stranger_takes_keeps_its_watchers_and_gets_them_back() {
    let trust = Trust::new();
    let upstream = trust.upstream();
    let address = upstream.address();
    upstream.set_json("/a", &value(1));
    let server = trust.server("auto", &[&upstream]);
    let said = said(&upstream, "/a");
    let (path, stream, own) = session(&server, &said);
    let mut in_session = Watcher::open(&server, Over::Sse, &path, std::slice::from_ref(&own));
    in_session.event_with(&stream, &value(1));
    let mut ws = open(&server, &said);
    ws.next_of("snapshot");
    drop(upstream);
    let impostor = Upstream::start_tls_at(address, &self_signed(&["127.0.0.1"]));
    impostor.set_json("/a", "\"a lie\"");
    assert_eq!(ws.next_of("stream_status")["state"], "stale");
    assert_eq!(in_session.next_of("stream_status").json()["state"], "stale");
    // A newcomer is told why, and given what is held.
    eventually("the stranger is met", || {
        let mut late = server.ws(&path, std::slice::from_ref(&own));
        let is_tls = late.next_of("stream_status")["code"] == "UPSTREAM_TLS";
        assert_eq!(late.next_of("snapshot")["data"], value(1).parse::<Value>().expect("JSON"));
        is_tls.then_some(())
    });
    assert_eq!(impostor.request_count(), 0);
    drop(impostor);
    let again = Upstream::start_tls_at(address, &trust.authority.identity(&["127.0.0.1"]));
    again.set("/a", Reply::json(value(2)));
    loop {
        let frame = in_session.next();
        if frame.kind() != "stream_status" {
            in_session.follow(&frame);
            break;
        }
    }
    assert_eq!(in_session.value(&stream), watcher::canonical(&value(2)));
    assert_eq!(ws.next_of("patch")["patch"][0]["value"], 2);
    is_silent(&server);
}
