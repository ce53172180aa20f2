//! No secret of callers', administrators' and hooks' is seen: what direct mode and ephemeral sessions are told, what signs
//! hooks and events, what streams of the admin API hold, and what upstreams answer to filters, redirects, pages and streams
//! of their own. All of it fails as well, at the most talkative level, and what was said is searched as in `secrets`.
#![cfg(feature = "runtime")]

#[path = "support/said.rs"]
mod said;
mod support;

use std::process::{Command, Stdio};
use std::time::Duration;

use ring::hmac;
use rustix::process::Signal;
use serde_json::{Value, json};

use said::{Said, Secrets, command};
use support::redis::{Redis, RedisSetup};
use support::server::{
    ADMIN_KEY, Heard, Raw, SECRET, Server, Setup, bearer, connected, eventually, mint, now_s, streams,
};
use support::{Folder, Reply, Step, Upstream};

const HEADER: &str = "callers-header-value+7f/c1=";
const QUERY: &str = "callers-query-value-93ab02";
const PASSWORD: &str = "callers-url-password-11fe";
const BODY: &str = "callers-request-body-c0ffee";
const ANSWER: &str = "upstream-answers-error-body-5150";
const DIRECT: &str = "direct-secret-of-thirty-two-bytes-and-more";
const HOOK: &str = "a-secret-that-signs-hooks-4d4d";
const HOOK_BODY: &str = "the-body-of-a-hook-is-upstreams-2a2a";
const SIGN: &str = "a-secret-that-signs-events-of-32-bytes-6b6b";
const MADE_HEADER: &str = "made-streams-header-1c1c1c";
const MADE_QUERY: &str = "made-streams-query-2d2d2d2d";
const MADE_BODY: &str = "made-streams-body-3e3e3e3e";
const MADE_TOKEN: &str = "made-streams-token-4f4f4f4f";
const MADE_HOOK: &str = "made-streams-hook-5a5a5a5a";
const MISPLACED: &str = "a-secret-in-the-wrong-place-77";
const REDIS: &str = "redis-password-6a6a6a6a";

/// Paths of the upstream that fail, each in its way.
const FAILING: [&str; 8] = ["500", "429", "401", "redirect", "html", "broken", "large", "cut"];

struct World {
    upstream: Upstream,
    redis: Redis,
    setup: Setup,
    secrets: Secrets,
}

impl World {
    fn new(format: &str) -> World {
        let upstream = Upstream::start();
        upstream.set_json("/ok", r#"[{"id":1}]"#);
        let page = format!("<html>{ANSWER}</html>");
        let status = |status: u16| Reply::body("text/html", page.clone()).with_status(status);
        upstream.set("/500", status(500));
        upstream.set("/429", status(429).header("Retry-After", ANSWER).header("RateLimit", ANSWER));
        upstream.set("/401", status(401).header("WWW-Authenticate", ANSWER));
        let elsewhere = format!("http://{ANSWER}@127.0.0.1:1/{ANSWER}?{ANSWER}#{ANSWER}");
        upstream.set("/redirect", Reply::status(302).header("Location", &elsewhere));
        let moved = upstream.url(&format!("/ok?{ANSWER}"));
        upstream.set("/moved", Reply::status(301).header("Location", &moved));
        upstream.set("/html", status(200));
        upstream.set("/broken", Reply::json(format!("{{\"{ANSWER}\":")));
        upstream.set("/large", Reply::json(format!("[{}\"{ANSWER}\"]", format!("\"{ANSWER}\",").repeat(200))));
        let cut = format!("HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n\"{ANSWER}").into_bytes();
        upstream.set("/cut", Reply::steps(vec![Step::Send(cut), Step::Reset]));
        let next = format!("<{}>; rel=\"next\"", upstream.url(&format!("/500?{ANSWER}")));
        upstream.set("/pages", Reply::json("[1]").header("Link", &next));
        let other = format!("<http://{ANSWER}.invalid/{ANSWER}>; rel=\"next\"");
        upstream.set("/strange-pages", Reply::json("[1]").header("Link", &other));
        upstream.set("/told", Reply::json(json!({ "why": ANSWER }).to_string()));
        let events = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\nid: {ANSWER}\nevent: {ANSWER}\ndata: {ANSWER}\n\n"
        );
        upstream.set("/events", Reply::steps(vec![Step::Send(events.into_bytes()), Step::Stall]));

        let redis = RedisSetup::new().password(REDIS).start();
        let lines = "backoff_max = \"200ms\"\n";
        let url = |path: &str| upstream.url(&format!("/{path}?key={QUERY}"));
        let setup = Setup::new()
            .log(&format!("level = \"trace\"\nformat = {format:?}"))
            .limits("auth_failures_per_minute = 0\nmessages_per_second = 0\nstreams_per_subject = 0")
            .redis(&format!("redis://:{REDIS}@{}/0", redis.address()), "timeout = \"500ms\"")
            .stream("hooked", &url("ok"), &format!("{lines}interval = \"1h\"\nhook_secret = [{HOOK:?}]"))
            .stream("filtered", &url("told"), &format!("{lines}filter = \".why | error\""))
            .stream("indexed", &url("told"), &format!("{lines}filter = \".why.[0]\""))
            .stream("moved", &url("moved"), &format!("{lines}redirects_max = 3"))
            .stream("led-away", &url("redirect"), &format!("{lines}redirects_max = 3"))
            .stream("paged", &url("pages"), &format!("{lines}pages_max = 3"))
            .stream("strange-pages", &url("strange-pages"), &format!("{lines}pages_max = 3"))
            .stream("followed", &url("events"), &format!("{lines}kind = \"sse\""))
            .stream(
                "signed",
                &url("ok"),
                &format!("{lines}hash = true\n[stream.sign]\nkey_id = \"s1\"\nsecret = {SIGN:?}"),
            )
            .direct(
                upstream.address(),
                &format!(
                    "interval_min = \"10ms\"\nresponse_bytes_max = 1000\nsecret = {DIRECT:?}\nsessions_per_subject = 0"
                ),
            );

        let mut secrets = Secrets::default();
        for (what, secret) in [
            ("JWT secret", SECRET),
            ("admin key", ADMIN_KEY),
            ("caller's header", HEADER),
            ("caller's query", QUERY),
            ("caller's password", PASSWORD),
            ("caller's body", BODY),
            ("upstream's answer", ANSWER),
            ("secret of direct mode", DIRECT),
            ("secret of hooks", HOOK),
            ("body of a hook", HOOK_BODY),
            ("secret that signs events", SIGN),
            ("header of a stream made", MADE_HEADER),
            ("query of a stream made", MADE_QUERY),
            ("body of a stream made", MADE_BODY),
            ("token of a stream made", MADE_TOKEN),
            ("hooks' secret of a stream made", MADE_HOOK),
            ("misplaced secret", MISPLACED),
            ("redis password", REDIS),
        ] {
            secrets.keep(what, secret);
        }
        World { upstream, redis, setup, secrets }
    }

    fn token(&mut self, sub: &str) -> String {
        let token = mint(json!({ "sub": sub, "exp": now_s() + 600, "role": "agent" }));
        self.secrets.keep_token(&format!("token of {sub}"), &token);
        token
    }

    /// Targets, good and bad, as callers describe them.
    fn descriptions(&self) -> Vec<(String, Value)> {
        let of = |url: &str| {
            json!({
                "url": url, "method": "POST", "headers": { "X-Key": HEADER }, "body": { "q": BODY }, "interval_ms": 20,
                "ttl_s": 600,
            })
        };
        let at = |path: &str| self.upstream.url(&format!("/{path}?key={QUERY}"));
        let mut all: Vec<(String, Value)> =
            FAILING.iter().chain(&["ok"]).map(|path| ((*path).to_owned(), of(&at(path)))).collect();
        for (what, url) in [
            ("a user", at("ok").replace("http://", &format!("http://ada:{PASSWORD}@"))),
            ("a stranger", format!("http://{MISPLACED}.example/?key={QUERY}")),
            ("a metadata service", format!("http://169.254.169.254/{QUERY}")),
            ("no URL", format!("http://:{PASSWORD}@:no port:/{QUERY}")),
            ("another scheme", format!("file:///{QUERY}")),
            ("too much", format!("{}{}", at("ok"), QUERY.repeat(300))),
        ] {
            all.push((what.to_owned(), of(&url)));
        }
        let with = |member: &str, value: Value| {
            let mut said = of(&at("ok"));
            said[member] = value;
            said
        };
        for (what, said) in [
            ("a header that routes", with("headers", json!({ "Host": HEADER }))),
            ("a header that frames", with("headers", json!({ "Content-Length": HEADER }))),
            ("a header that is none", with("headers", json!({ "X-Key": format!("{HEADER}\n") }))),
            ("a name that is none", with("headers", json!({ format!("{MISPLACED} x"): HEADER }))),
            ("headers twice", with("headers", json!({ "X-Key": HEADER, "x-key": HEADER }))),
            ("headers of another type", with("headers", json!([HEADER]))),
            ("a method that is none", with("method", json!(MISPLACED))),
            ("an interval that is none", with("interval_ms", json!(MISPLACED))),
            ("a path that is none", with("select", json!(format!("$.{MISPLACED}[")))),
            ("a format that is none", with("format", json!(MISPLACED))),
            ("a life that is none", with("ttl_s", json!(MISPLACED))),
            ("a long name", with("dedupe_key", json!(MISPLACED.repeat(20)))),
            ("a body too large", with("body", json!(BODY.repeat(2_000)))),
        ] {
            all.push((what.to_owned(), said));
        }
        all
    }
}

/// `/v1/direct` in its three forms, with every target.
fn direct(world: &mut World, server: &Server, said: &mut Said) {
    let token = world.token("caller");
    for (what, described) in world.descriptions() {
        let text = described.to_string();
        for body in [text.clone(), text[..text.len() - 1].to_owned(), format!("[{text}]"), format!("{text}{text}")] {
            let answer = server.request("POST", "/v1/direct", &[bearer(&token)], &body);
            said.answer(format!("POST direct of {what}"), &answer);
        }
        let mut raw = server.connect();
        raw.send_request("POST", "/v1/direct", &[bearer(&token), ("Accept", "text/event-stream".into())], &text);
        said.answer(format!("events of {what}"), &raw.head());
        let mut ws = server.ws("/v1/direct", &[bearer(&token)]);
        ws.next_of("welcome");
        let mut open = described.clone();
        open["type"] = json!("open");
        ws.send(open);
        match ws.heard_within(Duration::from_secs(5)) {
            // A value is what the caller asks for.
            Some(Heard::Frame(frame)) if frame["type"] == "snapshot" => {}
            heard => said.add(format!("WebSocket of {what}"), format!("{heard:?}")),
        }
    }
    let escaped = |url: &str| url.bytes().map(|byte| format!("%{byte:02X}")).collect::<String>();
    for path in FAILING {
        let path =
            format!("/v1/direct?url={}&interval_ms=20", escaped(&world.upstream.url(&format!("/{path}?key={QUERY}"))));
        said.answer("GET direct", &server.get(&path, &[bearer(&token)]));
    }
}

/// Ephemeral sessions: made, failed to be made, and their tokens in every carrier, where they are good and where not.
fn sessions(world: &mut World, server: &Server, other: &Server, said: &mut Said) {
    let (token, stranger) = (world.token("maker"), world.token("a-stranger"));
    for (what, described) in world.descriptions() {
        let made = server.request("POST", "/v1/sessions", &[bearer(&token)], &described.to_string());
        if made.status != 201 {
            said.answer(format!("session of {what}"), &made);
            continue;
        }
        let session = made.json();
        let of_session = session["token"].as_str().expect("a token").to_owned();
        world.secrets.keep(&format!("session's token of {what}"), &of_session);
        said.add(format!("session of {what}"), made.text().replacen(&of_session, "", 1));
        let path = format!("/v1/streams/{}", session["stream"].as_str().expect("a stream"));
        let id = session["id"].as_str().expect("an id").to_owned();
        let carried = [
            (path.clone(), vec![bearer(&of_session)]),
            (format!("{path}?token={of_session}"), vec![]),
            (format!("{path}?ticket={of_session}"), vec![]),
            (path.clone(), vec![("Cookie", format!("restcast_token={of_session}"))]),
            (path.clone(), vec![("X-Api-Key", of_session.clone())]),
            (path.clone(), vec![("Sec-WebSocket-Protocol", format!("restcast.v1, jwt, {of_session}"))]),
            ("/v1/streams/signed".to_owned(), vec![bearer(&of_session)]),
        ];
        for (path, headers) in &carried {
            for server in [server, other] {
                let answer = server.get(path, headers);
                if answer.status != 200 || what == "ok" {
                    said.answer(format!("GET by a session's token of {what}"), &answer);
                }
                if let Err(answer) = server.try_ws(path, headers) {
                    said.answer(format!("WebSocket by a session's token of {what}"), &answer);
                }
            }
        }
        for (method, path) in [("POST", "/v1/tickets"), ("POST", "/v1/sessions"), ("POST", "/v1/direct")] {
            let answer = server.request(method, path, &[bearer(&of_session)], &described.to_string());
            assert!(answer.status >= 400, "{method} {path}: {answer:?}");
            said.answer(format!("{path} by a session's token"), &answer);
        }
        let mut ws = server.ws("/v1/ws", &[bearer(&token)]);
        ws.next_of("welcome");
        for message in [
            json!({ "type": "auth_update", "token": of_session, "id": 1 }),
            json!({ "type": "subscribe", "stream": of_session, "id": 2 }),
        ] {
            ws.send(message);
        }
        // What is asked for by that name is told by it.
        let mut told = Said::default();
        told.frames("told", &mut ws);
        for (_, text) in told.0 {
            let text = String::from_utf8(text).expect("JSON");
            said.add("a session's token where none belongs", text.replace(&format!("\"stream\":\"{of_session}\""), ""));
        }
        for (whose, by) in [("its maker", &token), ("a stranger", &stranger)] {
            for method in ["GET", "DELETE"] {
                let answer = other.request(method, &format!("/v1/sessions/{id}"), &[bearer(by)], "");
                said.answer(format!("{method} of a session by {whose}"), &answer);
            }
        }
        let after = server.get(&path, &[bearer(&of_session)]);
        said.answer("a session that was ended", &after);
    }
}

fn signature(secret: &str, t: u64, body: &str) -> String {
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
    let tag = hmac::sign(&key, format!("{t}.{body}").as_bytes());
    tag.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Hooks, good ones and all that are none.
fn hooks(world: &mut World, server: &Server, said: &mut Said) {
    let now = now_s();
    for (what, id, t, secret, status) in [
        ("good", "hooked", now, HOOK, 202),
        ("replayed", "hooked", now, HOOK, 202),
        ("of another secret", "hooked", now, MISPLACED, 401),
        ("of another time", "hooked", now - 4_000, HOOK, 401),
        ("of no stream", "nowhere", now, HOOK, 401),
        ("of a stream without", "signed", now, HOOK, 401),
    ] {
        let made = signature(secret, t, HOOK_BODY);
        world.secrets.keep(&format!("signature of a hook {what}"), &made);
        for header in [format!("t={t},v1={made}"), format!("v1={made},t={t},{MISPLACED}"), made.clone()] {
            let fields = [("X-Restcast-Signature", header.clone())];
            let answer = server.request("POST", &format!("/v1/hooks/{id}"), &fields, HOOK_BODY);
            assert!(answer.status == status || header == made || header.contains(MISPLACED), "{what}: {answer:?}");
            said.answer(format!("a hook {what}"), &answer);
        }
    }
}

/// Streams of the admin API: made, changed, refused, failing.
fn made(world: &mut World, server: &Server, said: &mut Said) {
    let token = world.token("watcher-of-what-is-made");
    let of = |path: &str| {
        json!({
            "url": world.upstream.url(&format!("/{path}?key={MADE_QUERY}")), "interval": "20ms", "backoff_max": "200ms", "response_bytes_max": 1000,
            "method": "POST", "body": format!("{{\"q\":\"{MADE_BODY}\"}}"), "headers": { "X-Key": MADE_HEADER },
            "hook_secret": MADE_HOOK, "auth": { "kind": "bearer", "token": MADE_TOKEN },
        })
    };
    for path in FAILING {
        let mut stream = of(path);
        stream["id"] = json!(format!("made-{path}"));
        let answer = streams(server, "POST", "", &stream);
        assert_eq!(said.answer("a stream made", &answer), 201, "{answer:?}");
        let mut ws = server.ws(&format!("/v1/streams/made-{path}"), &[bearer(&token)]);
        said.add("a stream made that fails", ws.next_of("stream_status").to_string());
    }
    let change = |member: &str, value: Value| {
        let mut stream = of("ok");
        stream[member] = value;
        stream
    };
    for (what, stream) in [
        ("a URL that is none", change("url", json!(format!("http://ada:{MISPLACED}@:x:/{MADE_QUERY}")))),
        ("a URL with a user", change("url", json!(format!("http://ada:{MISPLACED}@127.0.0.1/?{MADE_QUERY}")))),
        ("a URL that is blocked", change("url", json!(format!("http://169.254.169.254/{MADE_QUERY}?{MADE_QUERY}")))),
        ("a secret that is not there", change("headers", json!({ "X-Key": "file:/no/such/file", "X": MADE_HEADER }))),
        ("a secret that cannot be read", change("headers", json!({ "X-Key": format!("b64:{MISPLACED}!") }))),
        ("a header that is none", change("headers", json!({ "X-Key": format!("{MISPLACED}\n") }))),
        ("a header that routes", change("headers", json!({ "Host": MISPLACED }))),
        ("a header of another type", change("headers", json!({ "X-Key": [MISPLACED] }))),
        ("an unknown key", change("secrte", json!(MISPLACED))),
        ("a key of another type", change("interval", json!([MISPLACED]))),
        ("a body that is no template", change("body", json!(format!("{{\"q\":\"{MISPLACED}\",{{claims.x")))),
        ("a token of two words", change("auth", json!({ "kind": "bearer", "token": format!("{MISPLACED} two") }))),
        ("an unknown kind", change("auth", json!({ "kind": "digest", "token": MADE_TOKEN }))),
        ("a filter that is none", change("filter", json!(format!(".[ {MADE_HEADER:?}")))),
        ("stars of nothing", change("hook_secret", json!(["***", MADE_HOOK]))),
    ] {
        let mut new = stream.clone();
        new["id"] = json!("made-wrong");
        said.answer(format!("POST of {what}"), &streams(server, "POST", "", &new));
        said.answer(format!("PUT of {what}"), &streams(server, "PUT", "/made-500", &stream));
        let text = stream.to_string();
        let cut = Raw::connect(server.admin).request(
            "PUT",
            "/admin/v1/streams/made-500",
            &[bearer(ADMIN_KEY)],
            &text[..text.len() - 1],
        );
        assert_eq!(said.answer(format!("PUT of {what}, cut"), &cut), 400);
    }
    for (method, path) in [
        ("GET", ""),
        ("GET", "/made-500"),
        ("POST", "/made-500/stop"),
        ("POST", "/made-500/start"),
        ("POST", "/made-500/refresh"),
        ("DELETE", "/made-429"),
    ] {
        said.answer(format!("{method} streams{path}"), &streams(server, method, path, &Value::Null));
    }
    let connections = server.order("GET", "connections", &Value::Null);
    said.answer("connections", &connections);
}

/// What the file's streams tell of what their upstreams answer.
fn upstreams(world: &mut World, server: &Server, said: &mut Said) {
    let token = world.token("watcher-of-the-file");
    for stream in ["filtered", "indexed", "led-away", "paged", "strange-pages", "followed", "moved"] {
        let mut ws = server.ws(&format!("/v1/streams/{stream}"), &[bearer(&token)]);
        ws.next_of("welcome");
        match ws.heard() {
            // A value may hold what the upstream publishes.
            Heard::Frame(frame) if frame["type"] == "snapshot" => {}
            Heard::Frame(frame) => said.add(format!("frame of {stream}"), frame.to_string()),
            heard => panic!("{heard:?}"),
        }
    }
    let answer = server.get("/v1/streams/signed", &[bearer(&token)]);
    assert!(answer.header("x-restcast-signature").is_some(), "{answer:?}");
    said.answer("a signed value", &answer);
}

/// What commands print of the file and of targets.
fn commands(world: &World, said: &mut Said) {
    let folder = Folder::new("secrets-callers");
    let text = world.setup.text();
    command(&folder, said, &["check"], &text, "");
    for (good, bad) in [
        (format!("secret = {DIRECT:?}"), format!("secret = {:?}", &MISPLACED[..28])),
        (format!("hook_secret = [{HOOK:?}]"), format!("hook_secret = [\"hex:{MISPLACED}\"]")),
        (format!("hook_secret = [{HOOK:?}]"), format!("hook_secret = {{ a = {MISPLACED:?} }}")),
        (format!("secret = {SIGN:?}"), format!("secret = {MISPLACED:?}")),
        ("[direct]".to_owned(), format!("[direct]\n{MISPLACED:?} = 1")),
        ("[direct]".to_owned(), format!("[proxy]\nurl = \"http://ada:{MISPLACED}@:x:\"\n[direct]")),
        ("[direct]".to_owned(), format!("[proxy]\nurl = \"http://ada:{MISPLACED}@127.0.0.1:1\"\n[direct]")),
    ] {
        assert!(text.contains(&good), "{good}");
        let text = text.replacen(&good, &bad, 1);
        // The name of an unknown key is told; it is the one place where a text of the file is.
        let mut told = Said::default();
        command(&folder, &mut told, &["check"], &text, "");
        let is_name = bad.contains("= 1");
        said.0.extend(told.0.into_iter().filter(|_| !is_name));
    }
    for (_, described) in world.descriptions() {
        let url = described["url"].as_str().expect("a URL");
        if !url.contains(MISPLACED) {
            command(&folder, said, &["explain", "url"], &text, url);
        }
    }
    // A secret that is none.
    let file = folder.put("secret", MISPLACED);
    let output = Command::new(env!("CARGO_BIN_EXE_restcast"))
        .args(["token", "--sub", "u1", "--expires-in", "15m", "--alg", "ES256", "--secret-file", &file])
        .stdin(Stdio::null())
        .output()
        .expect("it runs");
    assert!(!output.status.success(), "{output:?}");
    said.add("token err", output.stderr);
    said.add("token out", output.stdout);
}

fn nothing_is_seen(format: &str) {
    let mut world = World::new(format);
    let mut said = Said::default();
    commands(&world, &mut said);
    let mut server = world.setup.start();
    let other = world.setup.start();
    connected(&server);
    connected(&other);
    direct(&mut world, &server, &mut said);
    sessions(&mut world, &server, &other, &mut said);
    hooks(&mut world, &server, &mut said);
    made(&mut world, &server, &mut said);
    upstreams(&mut world, &server, &mut said);
    let text = world.setup.text();
    for bad in [format!("hook_secret = \"b64:{MISPLACED}!\""), format!("hook_secret = \"{MISPLACED}")] {
        server.reload_text(&text.replacen(&format!("hook_secret = [{HOOK:?}]"), &bad, 1));
    }
    server.reload_text(&text);
    for (what, server) in [("the first", &server), ("the other", &other)] {
        said.add(format!("metrics of {what}"), server.metrics());
        said.answer(format!("readiness of {what}"), &server.admin("GET", "/readyz", None));
    }
    world.redis.kill();
    let token = world.token("last");
    let described = world.descriptions().remove(0).1.to_string();
    let away = eventually("the store is away", || {
        let answer = server.request("POST", "/v1/sessions", &[bearer(&token)], &described);
        (answer.status == 503).then_some(answer)
    });
    said.answer("a session while the store is away", &away);
    server.signal(Signal::TERM);
    server.wait();
    said.add("log of the first", server.log_text());
    said.add("log of the other", other.log_text());

    for (place, text) in [
        ("log of the first", "UPSTREAM_STATUS"),
        ("log of the first", "stream=direct:"),
        ("log of the first", "UPSTREAM_REDIRECT"),
        ("log of the first", "The configuration is not taken"),
        ("log of the first", "An administrator has made a stream."),
        ("POST direct of a metadata service", "TARGET_BLOCKED"),
        ("WebSocket of a header that is none", "BAD_MESSAGE"),
        ("WebSocket of 500", "UPSTREAM_STATUS"),
        ("session of ok", "direct:"),
        ("a hook of another secret", "INVALID_TOKEN"),
        ("a stream made that fails", "UPSTREAM_"),
        ("frame of filtered", "UPSTREAM_BODY"),
        ("[\"explain\", \"url\"] out", "block"),
        ("[\"check\"] out", "hook_secret"),
    ] {
        let text =
            if format == "json" { text.replacen("stream=direct:", "\"stream\":\"direct:", 1) } else { text.to_owned() };
        assert!(said.says(place, &text), "{place} never says {text:?}");
    }
    let leaks = said.leaks(&world.secrets);
    assert!(leaks.is_empty(), "{} leaks:\n{}", leaks.len(), leaks.join("\n"));
}

#[test]
fn no_secret_of_callers_hooks_and_made_streams_is_seen_in_text() {
    nothing_is_seen("text");
}

#[test]
fn no_secret_of_callers_hooks_and_made_streams_is_seen_in_json() {
    nothing_is_seen("json");
}
