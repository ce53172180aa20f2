//! No secret is seen: a server that knows many is made to do everything it can, failures above all, at its most talkative;
//! then all it has said (logs, metrics, answers, frames, closes, what commands print) is searched for each of them, as it
//! is and in every encoding it might have slipped through in.
//!
//! What hands a secret out on purpose (a new ticket, a new API key) is searched with that one occurrence taken out.
#![cfg(feature = "runtime")]

#[path = "support/said.rs"]
mod said;
mod support;

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use ring::rand::SystemRandom;
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use ring::{digest, hmac};
use rustix::process::Signal;
use rustls::ClientConfig;
use rustls::version::{TLS12, TLS13};
use serde_json::json;

use said::{Said, Secrets, command, forms};
use support::redis::{Redis, RedisSetup, free_port};
use support::server::{
    ADMIN_KEY, Answer, Heard, Raw, SECRET, Server, Setup, bearer, connected, eventually, mint, mint_by, now_s,
};
use support::{Authority, Folder, Reply, Step, Upstream};

const HEADER: &str = "upstream-header-value+7f/c1=";
const QUERY: &str = "upstream-query-value-93ab02";
const PASSWORD: &str = "upstream-url-password-11fe";
const BODY: &str = "upstream-request-body-c0ffee";
const ANSWER: &str = "upstream-answers-error-body-5150";
const ACTION: &str = "action-header-value-2b2b2b";
const BEARER: &str = "upstream-bearer-token-1b1b1b";
const BASIC: &str = "upstream-basic-password-5e5e";
const API_QUERY: &str = "upstream-query-key-7c7c7c7c";
const CLIENT_SECRET: &str = "oauth-client-secret-a0a0a0a0";
const REFRESH: &str = "oauth-refresh-token-b1b1b1b1";
const ROTATED: &str = "oauth-rotated-token-c2c2c2c2";
const ACCESS: &str = "oauth-access-token-d3d3d3d3";
const ECHOED: &str = "oauth-endpoint-echoes-e4e4e4";
const PARAM: &str = "oauth-parameter-value-f5f5f5";
const SESSION: &str = "session-signing-secret-8d8d8d";
const OLD_SESSION: &str = "former-session-secret-4e4e4e";
const REDIS: &str = "redis-password-6a6a6a6a";
const JWT_512: &str = "another jwt secret, of sixty-four bytes and more, as HS512 wants it, and some";
const SID: &str = "sid-of-a-session-3c3c3c3c3c";
const FOREIGN: &str = "a secret of somebody else's token issuer, long enough";
const WRONG_ADMIN: &str = "not-the-admin-key-9e9e9e9e";
const SET_QUERY: &str = "key-set-query-value-77ad10";
const SET_PASSWORD: &str = "key-set-url-password-cc41";
const SET_ANSWER: &str = "key-sets-error-body-8d01ee";
/// Some of it is percent-encoded in a URL.
const REDIS_USER: &str = "redis-users/password+0b@0b";
const REDIS_USER_ENCODED: &str = "redis-users%2Fpassword%2B0b%400b";
const MISPLACED: &str = "a-secret-in-the-wrong-place-77";

/// The hash of an API key, as an operator makes it.
fn hash_of(key: &str) -> String {
    let salt = "salt-of-the-hash";
    let made = digest::digest(&digest::SHA256, format!("{salt}{key}").as_bytes());
    let hex: String = made.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{salt}:{hex}")
}

/// The cookie of a session, as express-session signs it.
fn cookie(secret: &str, sid: &str) -> String {
    let signature = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes()), sid.as_bytes());
    let value = format!("s:{sid}.{}", STANDARD_NO_PAD.encode(signature));
    let escaped: String = value
        .bytes()
        .map(|b| match b {
            b'-' | b'_' | b'.' | b'~' => char::from(b).to_string(),
            b if b.is_ascii_alphanumeric() => char::from(b).to_string(),
            b => format!("%{b:02X}"),
        })
        .collect();
    format!("connect.sid={escaped}")
}

/// An address that nobody listens at.
fn closed_port() -> SocketAddr {
    ([127, 0, 0, 1], free_port()).into()
}

/// One world with its secrets.
struct World {
    upstream: Upstream,
    redis: Redis,
    setup: Setup,
    secrets: Secrets,
    key: String,
}

impl World {
    fn new(format: &str) -> World {
        let upstream = Upstream::start();
        upstream.set_json("/leads", r#"[{"id":1}]"#);
        let body = format!("<html>{ANSWER}</html>");
        upstream.set("/500", Reply::body("text/html", body.clone()).with_status(500));
        upstream.set("/429", Reply::body("text/html", body.clone()).with_status(429).header("Retry-After", ANSWER));
        let elsewhere = format!("http://{ANSWER}@127.0.0.1/?{ANSWER}");
        upstream.set("/redirect", Reply::status(302).header("Location", &elsewhere));
        upstream.set("/html", Reply::body("text/html", body.clone()));
        upstream.set("/broken", Reply::json(format!("{{\"{ANSWER}\":")));
        upstream.set("/twice", Reply::json(format!("{{\"{ANSWER}\":1,\"{ANSWER}\":2}}")));
        upstream.set("/large", Reply::json(format!("[{}\"{ANSWER}\"]", format!("\"{ANSWER}\",").repeat(200))));
        upstream.set("/head", Reply::raw(format!("HTTP/1.1 200 OK\r\n{ANSWER}\r\n\r\n")));
        upstream.set("/status", Reply::raw(format!("{ANSWER}\r\n\r\n")));
        upstream.set(
            "/cut",
            Reply::steps(vec![
                Step::Send(format!("HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n\"{ANSWER}").into_bytes()),
                Step::Reset,
            ]),
        );
        upstream.set("/act", Reply::json(r#"{"ok":true}"#));
        upstream.set("/act500", Reply::json(format!("{{\"error\":\"{ANSWER}\"}}")).with_status(500));
        let redis = RedisSetup::new().password(REDIS).start();

        let key = format!("rck_in-file_{}", "Fq7".repeat(15).get(..43).expect("43"));
        let mut setup = Setup::new()
            .log(&format!("level = \"trace\"\nformat = {format:?}"))
            .limits("auth_failures_per_minute = 0\nmessages_per_second = 0")
            .auth("first_message = \"5s\"")
            .server("echo = true\nheartbeat = \"500ms\"")
            .key("k2", "HS512", JWT_512)
            .redis(
                &format!("redis://:{REDIS}@{}/0", redis.address()),
                &format!("timeout = \"500ms\"\n[auth.session]\nsecrets = [{SESSION:?}, {OLD_SESSION:?}]\nreread = \"200ms\"\ngrace = \"300ms\""),
            );
        let secret_lines = format!("headers = {{ \"X-Upstream-Key\" = {HEADER:?} }}");
        for path in ["leads", "500", "429", "redirect", "html", "broken", "twice", "head", "status", "cut"] {
            let url =
                upstream.url(&format!("/{path}?key={QUERY}")).replace("http://", &format!("http://ada:{PASSWORD}@"));
            setup = setup.stream(path, &url, &format!("{secret_lines}\nbackoff_max = \"200ms\""));
        }
        let url = |path: &str| upstream.url(&format!("/{path}?key={QUERY}"));
        let nobody = format!("http://ada:{PASSWORD}@{}/?key={QUERY}", closed_port());
        let no_name = format!("http://ada:{PASSWORD}@no-such-host.invalid/?key={QUERY}");
        let post = format!("method = \"POST\"\nbody = '{{\"key\":\"{BODY}\",\"of\":{{claims.companyId}}}}'");
        upstream.set("/401", Reply::body("text/html", body).with_status(401).header("WWW-Authenticate", ANSWER));
        let grant =
            json!({ "access_token": ACCESS, "token_type": "bearer", "expires_in": 3, "refresh_token": ROTATED });
        upstream.set("/token", Reply::json(grant.to_string()));
        upstream.set("/no-token", Reply::json(json!({ "access_token": format!("{ECHOED}\n") }).to_string()));
        let refusal = json!({ "error": "invalid_grant", "error_description": ECHOED, "echo": REFRESH });
        upstream.set("/no-grant", Reply::json(refusal.to_string()).with_status(400));
        let kind =
            |kind: &str, lines: &str| format!("backoff_max = \"200ms\"\n[stream.auth]\nkind = {kind:?}\n{lines}\n");
        let rotated = format!("grant = \"refresh_token\"\nrefresh_token = {REFRESH:?}");
        let oauth = |path: &str, lines: &str| {
            let url = upstream.url(&format!("{path}?key={QUERY}"));
            let client =
                format!("client_id = \"restcast\"\nclient_secret = {CLIENT_SECRET:?}\nparams = {{ x = {PARAM:?} }}");
            kind("oauth2", &format!("token_url = {url:?}\n{client}\n{lines}"))
        };
        let no_name_at_all = format!("http://no-such-host.invalid/?key={QUERY}");
        let hash = hash_of(&key);
        let tail = format!(
            "{secret_lines}\n[[auth.api_key]]\nid = \"in-file\"\nhash = {hash:?}\nstreams = [\"leads\", \"500\"]\nroles = [\"agent\"]\n"
        );
        setup = setup
            .stream("large", &url("large"), "response_bytes_max = 1000")
            .stream("nobody", &nobody, &format!("{secret_lines}\nbackoff_max = \"200ms\""))
            .stream("no-name", &no_name, &secret_lines)
            .stream("no-tls", &url("leads").replace("http://", "https://"), &secret_lines)
            .stream("mine", &upstream.url(&format!("/leads?of={{claims.companyId}}&key={QUERY}")), &post)
            .stream("bearer", &url("500"), &kind("bearer", &format!("token = {BEARER:?}")))
            .stream(
                "basic",
                &upstream.url("/broken"),
                &kind("basic", &format!("username = \"ada\"\npassword = {BASIC:?}")),
            )
            .stream("own", &no_name_at_all, &kind("header", &format!("name = \"X-Own\"\nvalue = {HEADER:?}")))
            .stream("key", &url("redirect"), &kind("query", &format!("name = \"api\"\nvalue = {API_QUERY:?}")))
            .stream("token", &url("500"), &oauth("/token", &rotated))
            .stream("denied", &url("401"), &oauth("/token", ""))
            .stream("no-token", &url("leads"), &oauth("/no-token", ""))
            .stream("no-grant", &url("leads"), &oauth("/no-grant", &rotated))
            .stream("admins", &url("leads"), "roles = [\"admin\"]")
            .stream("open", &url("leads"), &format!("allow_anonymous = true\n{tail}"));

        let mut secrets = Secrets::default();
        for (what, secret) in [
            ("JWT secret", SECRET),
            ("HS512 secret", JWT_512),
            ("admin key", ADMIN_KEY),
            ("wrong admin key", WRONG_ADMIN),
            ("upstream header", HEADER),
            ("upstream query", QUERY),
            ("upstream password", PASSWORD),
            ("upstream request body", BODY),
            ("upstream answer", ANSWER),
            ("action header", ACTION),
            ("upstream bearer token", BEARER),
            ("upstream basic password", BASIC),
            ("upstream query key", API_QUERY),
            ("OAuth client secret", CLIENT_SECRET),
            ("OAuth refresh token", REFRESH),
            ("OAuth rotated refresh token", ROTATED),
            ("OAuth access token", ACCESS),
            ("OAuth endpoint's echo", ECHOED),
            ("OAuth parameter", PARAM),
            ("session secret", SESSION),
            ("former session secret", OLD_SESSION),
            ("redis password", REDIS),
            ("session id", SID),
            ("misplaced secret", MISPLACED),
        ] {
            secrets.keep(what, secret);
        }
        secrets.keep("API key of the file", key.clone());
        secrets.keep("API key of the file (secret part)", &key[key.len() - 43..]);
        secrets.keep("hash of the API key", hash.rsplit(':').next().expect("digits"));
        World { upstream, redis, setup, secrets, key }
    }

    /// The file's text, with what this version knows besides.
    fn text(&self) -> String {
        let action = |name: &str, path: &str| {
            format!(
                "[[action]]\ntype = {name:?}\nmethod = \"POST\"\nurl = {:?}\nheaders = {{ \"X-Action-Key\" = {ACTION:?} }}\nbody = '{{\"key\":\"{BODY}\",\"of\":{{message.of}}}}'\n",
                self.upstream.url(&format!("/{path}?key={QUERY}"))
            )
        };
        format!("{}{}{}", self.setup.text(), action("act", "act"), action("act500", "act500"))
    }

    /// A token of this subject.
    fn token(&mut self, sub: &str) -> String {
        let claims = json!({ "sub": sub, "exp": now_s() + 600, "companyId": "c1", "role": "agent", "jti": format!("jti-{sub}") });
        let token = mint(claims);
        self.secrets.keep_token(&format!("token of {sub}"), &token);
        token
    }

    /// Credentials that are not valid, by the name of what is wrong with them.
    fn bad_tokens(&mut self) -> Vec<(&'static str, String)> {
        let claims = |exp: u64| json!({ "sub": "u1", "exp": exp });
        let none =
            format!("{}.{}.", URL_SAFE_NO_PAD.encode(r#"{"alg":"none"}"#), URL_SAFE_NO_PAD.encode(r#"{"sub":"u1"}"#));
        let bad = vec![
            ("no token at all", "neither-a-token-nor-anything-else".to_owned()),
            ("three parts of nothing", "bm90aGluZw.bm90aGluZ25vdGhpbmc.bm90aGluZ25vdGhpbmc".to_owned()),
            ("a foreign signature", mint_by(json!({ "alg": "HS256", "kid": "k1" }), FOREIGN, claims(now_s() + 600))),
            ("an unknown kid", mint_by(json!({ "alg": "HS256", "kid": "k9" }), SECRET, claims(now_s() + 600))),
            ("an algorithm of no key", mint_by(json!({ "alg": "HS384" }), SECRET, claims(now_s() + 600))),
            ("an end that has come", mint_by(json!({ "alg": "HS512", "kid": "k2" }), JWT_512, claims(now_s() - 60))),
            ("no end", mint(json!({ "sub": "u1" }))),
            ("alg none", none),
            ("too many bytes", "t".repeat(9_000)),
        ];
        for (what, token) in &bad {
            self.secrets.keep_token(&format!("token with {what}"), token);
        }
        bad
    }
}

/// What commands print of a good file, of bad ones, and of tokens.
fn commands(world: &mut World, said: &mut Said) {
    let folder = Folder::new("secrets-commands");
    let text = world.text();
    command(&folder, said, &["check"], &text, "");
    for (good, bad) in [
        (format!("key = {ADMIN_KEY:?}"), format!("key = \"{MISPLACED} with a blank\"")),
        (format!("secret = {SECRET:?}"), format!("secret = \"{MISPLACED}\"")),
        (format!("secret = {SECRET:?}"), format!("secret = \"b64:{MISPLACED}!\"")),
        (format!("secret = {SECRET:?}"), format!("secrte = {SECRET:?}")),
        (format!("\"X-Upstream-Key\" = {HEADER:?}"), format!("\"X-Upstream-Key\" = \"{MISPLACED}\\n\"")),
        (format!("\"X-Upstream-Key\" = {HEADER:?}"), format!("\"Host\" = {MISPLACED:?}")),
        (format!("hash = {:?}", hash_of(&world.key)), format!("hash = {MISPLACED:?}")),
        (format!("token = {BEARER:?}"), format!("token = \"{MISPLACED} two\"")),
        (format!("password = {BASIC:?}"), format!("passwrod = {MISPLACED:?}")),
        (format!("value = {API_QUERY:?}"), format!("value = {API_QUERY:?}\ntoken = {MISPLACED:?}")),
        (format!("client_secret = {CLIENT_SECRET:?}"), format!("client_secret = \"b64:{MISPLACED}!\"")),
        (format!(":{REDIS}@"), format!(":{MISPLACED}@:not a port:")),
        (format!("ada:{PASSWORD}@"), format!("ada:{MISPLACED}@{{claims.host}}.")),
        ("redis://".to_owned(), format!("http://{MISPLACED}@")),
        (format!("[{SESSION:?}, "), format!("[\"hex:{MISPLACED}\", ")),
    ] {
        assert!(text.contains(&good), "{good}");
        command(&folder, said, &["check"], &text.replacen(&good, &bad, 1), "");
    }
    let token = world.token("explained");
    let bad = world.bad_tokens();
    for token in bad.iter().map(|(_, token)| token).chain([&token]) {
        command(&folder, said, &["explain", "token"], &text, &format!("{token}\n"));
    }
}

/// A way to carry a credential: what it is, the query, the header fields.
type Carried = (String, String, Vec<(&'static str, String)>);

/// Every endpoint and representation with every credential, in every carrier, good and bad.
fn handshakes(world: &mut World, server: &Server, said: &mut Said) {
    let good = world.token("carried");
    let session = cookie(SESSION, SID);
    let bad_cookies = [
        cookie("a secret that signs no session", SID),
        cookie(SESSION, "sid-of-no-session-1d1d1d1d"),
        "connect.sid=s%3Agarbage-garbage-garbage.%zz".to_owned(),
    ];
    for (what, cookie) in bad_cookies.iter().chain([&session]).enumerate() {
        world.secrets.keep(&format!("cookie {what}"), cookie.split_once('=').expect("a value").1);
        if let Some(signature) = cookie.rsplit_once('.').map(|(_, signature)| signature).filter(|it| it.len() >= 16) {
            world.secrets.keep(&format!("signature of cookie {what}"), signature);
        }
    }
    let bad_key = world.key.replace("rck_in-file_Fq7", "rck_in-file_Xx8");
    world.secrets.keep("bad API key", bad_key.clone());
    let bad_ticket = format!("rct_{}", "Tt5".repeat(15).get(..43).expect("43"));
    world.secrets.keep("bad ticket", bad_ticket.clone());
    let mut carried: Vec<Carried> = Vec::new();
    let tokens: Vec<(&str, String)> = world.bad_tokens().into_iter().chain([("nothing wrong", good)]).collect();
    for (what, token) in &tokens {
        carried.push((format!("bearer with {what}"), String::new(), vec![bearer(token)]));
        carried.push((format!("query with {what}"), format!("?token={token}"), vec![]));
        carried.push((
            format!("cookie with {what}"),
            String::new(),
            vec![("Cookie", format!("restcast_token={token}"))],
        ));
        carried.push((
            format!("subprotocol with {what}"),
            String::new(),
            vec![("Sec-WebSocket-Protocol", format!("restcast.v1, jwt, {token}"))],
        ));
        carried.push((format!("two of {what}"), format!("?token={token}&token={token}"), vec![]));
        carried.push((format!("a broken query with {what}"), format!("?token={token}%zz"), vec![]));
        carried.push((
            format!("another scheme with {what}"),
            String::new(),
            vec![("Authorization", format!("Basic {token}"))],
        ));
        carried.push((
            format!("a list with {what}"),
            String::new(),
            vec![("Authorization", format!("Bearer {token}, Bearer {token}"))],
        ));
        carried.push((format!("hybrid with {what}"), String::new(), vec![bearer(token), ("Cookie", session.clone())]));
    }
    for (what, cookie) in bad_cookies.iter().chain([&session]).enumerate() {
        carried.push((format!("session {what}"), String::new(), vec![("Cookie", cookie.clone())]));
    }
    for key in [&world.key, &bad_key, &world.key[..20].to_owned()] {
        carried.push(("API key".to_owned(), String::new(), vec![("X-Api-Key", key.clone())]));
        carried.push((
            "API key twice".to_owned(),
            String::new(),
            vec![("X-Api-Key", key.clone()), ("X-Api-Key", key.clone())],
        ));
    }
    carried.push(("ticket".to_owned(), format!("?ticket={bad_ticket}"), vec![]));
    carried.push(("ticket twice".to_owned(), format!("?ticket={bad_ticket}&ticket={bad_ticket}"), vec![]));
    carried.push(("nothing".to_owned(), String::new(), vec![]));

    let mut statuses = BTreeMap::<u16, u32>::new();
    let mut count = |status: u16| *statuses.entry(status).or_default() += 1;
    for (what, query, headers) in &carried {
        let mut from = headers.clone();
        from.push(("Origin", "https://elsewhere.example".to_owned()));
        for stream in ["leads", "nowhere", "admins", "mine"] {
            let path = format!("/v1/streams/{stream}{query}");
            count(said.answer(format!("GET {stream} by {what}"), &server.get(&path, headers)));
            if stream == "leads" {
                count(said.answer(format!("foreign GET by {what}"), &server.get(&path, &from)));
                count(said.answer(format!("PUT by {what}"), &server.request("PUT", &path, headers, "{}")));
            }
        }
        for path in ["/v1/streams/leads", "/v1/ws"] {
            match server.try_ws(&format!("{path}{query}"), headers) {
                Ok(mut ws) => {
                    said.add(format!("{path} by {what}"), format!("{:?}", ws.upgrade));
                    count(101);
                    match ws.heard_within(Duration::from_millis(50)) {
                        Some(Heard::Frame(frame)) => said.add(format!("{path} by {what}"), frame.to_string()),
                        other => said.add(format!("{path} by {what}"), format!("{other:?}")),
                    }
                }
                Err(answer) => count(said.answer(format!("{path} by {what}"), &answer)),
            }
        }
        let mut sse = headers.clone();
        sse.push(("Accept", "text/event-stream".to_owned()));
        let mut raw = server.connect();
        raw.send_request("GET", &format!("/v1/streams/500{query}"), &sse, "");
        count(said.answer(format!("SSE by {what}"), &raw.head()));
        let answer = server.request("POST", &format!("/v1/tickets{query}"), headers, "");
        let mut shown = answer.clone();
        if answer.status == 201 {
            let ticket = answer.json()["ticket"].as_str().expect("a ticket").to_owned();
            shown.body = answer.text().replacen(&ticket, "", 1).into_bytes();
            world.secrets.keep(&format!("ticket by {what}"), &ticket);
            for _ in 0..2 {
                let used = server.get(&format!("/v1/streams/leads?ticket={ticket}"), &[]);
                count(said.answer(format!("ticket by {what}"), &used));
            }
        }
        count(said.answer(format!("POST /v1/tickets by {what}"), &shown));
        for path in ["/", "/healthz", "/echo", "/nowhere", "/client.js"] {
            count(said.answer(format!("{path} by {what}"), &server.get(&format!("{path}{query}"), headers)));
        }
    }
    for status in [101, 200, 400, 401, 403, 404, 405] {
        assert!(statuses.contains_key(&status), "{status} was never answered: {statuses:?}");
    }
    // Heads that are none.
    let (key, token) = (&world.key, tokens.last().expect("a token").1.clone());
    for head in [
        format!("GET /v1/streams/leads HTTP/1.1\r\nHost: a\r\nX-Api-Key {key}\r\n\r\n"),
        format!(
            "GET /v1/streams/leads HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {token}\r\n continued {token}\r\n\r\n"
        ),
        format!("GET /v1/streams/leads?token={token} HTTP/3.0\r\nHost: a\r\n\r\n"),
        format!("GET /v1/streams/leads HTTP/1.1\r\nHost: a\r\nHost: {token}\r\n\r\n"),
        format!("{token} / HTTP/1.1\r\nHost: a\r\n\r\n"),
        format!(
            "GET /v1/streams/leads HTTP/1.1\r\nHost: a\r\nX: {}\r\nAuthorization: Bearer {token}\r\n\r\n",
            "x".repeat(20_000)
        ),
    ] {
        let mut raw = server.connect();
        if raw.try_send(head.as_bytes()).is_ok() {
            said.add("a head that is none", raw.rest());
        }
    }
}

/// Every frame that a client may send, and many that it may not.
fn frames(world: &mut World, server: &Server, said: &mut Said) {
    let first = world.token("framed");
    let fresh = world.token("framed");
    let bad = world.bad_tokens();
    let mut messages = vec![
        json!({ "type": "subscribe", "stream": "leads", "id": 1 }).to_string(),
        json!({ "type": "subscribe", "stream": "500", "id": 2 }).to_string(),
        json!({ "type": "subscribe", "stream": "nowhere", "token": first, "id": 3 }).to_string(),
        json!({ "type": "subscribe", "stream": "admins", "id": 4 }).to_string(),
        json!({ "type": "unsubscribe", "stream": "leads", "id": 5 }).to_string(),
        json!({ "type": "auth", "token": first }).to_string(),
        json!({ "type": "auth_update", "token": fresh, "id": 6 }).to_string(),
        json!({ "type": "auth_update", "id": 7 }).to_string(),
        json!({ "type": "auth_update", "token": [fresh], "id": 8 }).to_string(),
        json!({ "type": "auth_update", "ticket": fresh, "id": 9 }).to_string(),
        json!({ "type": "act", "of": "c1", "id": 10 }).to_string(),
        json!({ "type": "act500", "of": "c1", "id": 11 }).to_string(),
        json!({ "type": "act", "token": fresh, "id": 12 }).to_string(),
        json!({ "type": "nothing", "token": fresh, "id": 13 }).to_string(),
        json!({ "token": fresh }).to_string(),
        format!("{{\"type\":\"auth_update\",\"token\":\"{fresh}"),
        fresh.clone(),
    ];
    let updates = bad.iter().map(|(_, token)| json!({ "type": "auth_update", "token": token, "id": "u" }).to_string());
    messages.extend(updates);
    for message in messages {
        let mut ws = server.ws("/v1/ws", &[bearer(&first)]);
        ws.next_of("welcome");
        ws.send_message(tungstenite::Message::text(message));
        said.frames("frame", &mut ws);
    }
    // Five refusals close; so does another's token never, and what is no text.
    let mut ws = server.ws("/v1/streams/leads", &[bearer(&first)]);
    for _ in 0..5 {
        ws.send(json!({ "type": "auth_update", "token": bad[2].1, "id": 1 }));
    }
    said.frames("five refusals", &mut ws);
    let other = world.token("somebody-else");
    let mut ws = server.ws("/v1/streams/leads", &[bearer(&first)]);
    ws.send(json!({ "type": "auth_update", "token": other, "id": 1 }));
    ws.send_message(tungstenite::Message::binary(first.clone().into_bytes()));
    said.frames("another's token", &mut ws);
    // A first message.
    for (what, token) in bad.iter().map(|(what, token)| (*what, token)).chain([("nothing wrong", &first)]) {
        let mut ws = server.ws("/v1/ws", &[]);
        ws.send(json!({ "type": "auth", "token": token }));
        said.frames(&format!("first message with {what}"), &mut ws);
    }
    // The credential of an event stream is renewed.
    let mut sse = server.sse("/v1/streams/leads", &[bearer(&first)]);
    let id = sse.next_of("welcome").data["connection"].as_str().expect("a name").to_owned();
    for (place, path) in
        [("renewal", format!("/v1/connections/{id}/auth")), ("renewal of nobody", "/v1/connections/c_none/auth".into())]
    {
        for (what, token) in bad
            .iter()
            .map(|(what, token)| (*what, token))
            .chain([("nothing wrong", &fresh), ("another subject", &other)])
        {
            let body = json!({ "token": token }).to_string();
            said.answer(format!("{place} with {what}"), &server.request("POST", &path, &[], &body));
            said.answer(
                format!("{place} with {what}, cut"),
                &server.request("POST", &path, &[], &body[..body.len() - 1]),
            );
        }
    }
}

/// Every way an upstream can fail, told in every representation.
fn upstreams(world: &mut World, server: &Server, said: &mut Said) {
    let token = world.token("watcher");
    let failing = [
        "500", "429", "redirect", "html", "broken", "twice", "large", "head", "status", "cut", "nobody", "no-name",
        "no-tls", "bearer", "basic", "own", "key", "token", "denied", "no-token", "no-grant",
    ];
    // Heard to its end first: who does not answer pings, because it is busy elsewhere, is let go.
    let mut many = server.ws("/v1/ws", &[bearer(&token)]);
    for stream in failing {
        many.send(json!({ "type": "subscribe", "stream": stream }));
    }
    let mut untold: Vec<&str> = failing.to_vec();
    while !untold.is_empty() {
        let status = many.next_of("stream_status");
        untold.retain(|stream| status["stream"] != *stream);
        said.add("failing streams", status.to_string());
    }
    drop(many);
    for stream in failing {
        let mut sse = server.sse(&format!("/v1/streams/{stream}"), &[bearer(&token)]);
        let status = sse.next_of("stream_status");
        said.add(format!("{stream} by SSE"), status.data.to_string());
        said.answer(format!("{stream} as JSON"), &server.get(&format!("/v1/streams/{stream}"), &[bearer(&token)]));
    }
    // A value that turns into a failure.
    let mut ws = server.ws("/v1/streams/leads", &[bearer(&token)]);
    ws.next_of("snapshot");
    world.upstream.set("/leads", Reply::body("text/html", ANSWER).with_status(503));
    said.add("a value gone stale", ws.next_of("stream_status").to_string());
    said.answer("a stale value", &server.get("/v1/streams/leads", &[bearer(&token)]));
    world.upstream.set_json("/leads", r#"[{"id":2}]"#);
    said.add("a value come back", ws.next_of("stream_status").to_string());
}

/// Sessions while the store is there, gone, and back.
fn sessions(world: &mut World, server: &Server, said: &mut Said) {
    let (new, old) = (cookie(SESSION, SID), cookie(OLD_SESSION, SID));
    let with = |cookie: &str| [("Cookie", cookie.to_owned())];
    let mut live = server.ws("/v1/streams/leads", &with(&new));
    said.add("a session", live.next_of("welcome").to_string());
    said.answer("an old signature", &server.get("/v1/streams/leads", &with(&old)));
    live.send(json!({ "type": "auth_update", "id": 1 }));
    said.frames("a session read again", &mut live);
    world.redis.kill();
    let away = eventually("the store is away", || {
        let answer = server.get("/v1/streams/leads", &with(&new));
        (answer.status == 503).then_some(answer)
    });
    said.answer("the store is away", &away);
    said.answer("readiness", &server.admin("GET", "/readyz", None));
    said.frames("a session past its grace", &mut live);
    world.redis.restart();
    world.redis.command(&["AUTH", REDIS]);
    let back = eventually("the store is back", || {
        let answer = server.get("/v1/streams/leads", &with(&new));
        (answer.status == 200).then_some(answer)
    });
    said.answer("the store is back", &back);
    world.redis.command(&["DEL", &format!("sess:{SID}")]);
    let gone = eventually("the session is gone", || {
        let answer = server.get("/v1/streams/leads", &with(&new));
        (answer.status == 401).then_some(answer)
    });
    said.answer("the session is gone", &gone);
}

/// Everything that the admin listener knows.
fn admin(world: &mut World, server: &Server, said: &mut Said) {
    let token = world.token("ordered");
    let mut ws = server.ws("/v1/streams/leads", &[bearer(&token)]);
    ws.next_of("welcome");
    let ask = |method: &str, path: &str, key: Option<&str>, body: &str| {
        let headers: Vec<_> = key.map(bearer).into_iter().collect();
        Raw::connect(server.admin).request(method, path, &headers, body)
    };
    for path in ["/metrics", "/readyz", "/nowhere", "/admin/v1/nowhere"] {
        for key in [None, Some(ADMIN_KEY), Some(WRONG_ADMIN)] {
            for method in ["GET", "POST", "HEAD"] {
                said.answer(format!("admin {method} {path}"), &ask(method, path, key, ""));
            }
        }
    }
    let made =
        ask("POST", "/admin/v1/keys", Some(ADMIN_KEY), &json!({ "streams": ["leads"], "id": "made" }).to_string());
    assert_eq!(made.status, 201, "{made:?}");
    let key = made.json()["key"].as_str().expect("a key").to_owned();
    world.secrets.keep("API key made", &key);
    world.secrets.keep("API key made (secret part)", &key[key.len() - 43..]);
    said.add("admin POST keys", made.text().replacen(&key, "", 1));
    let mut keyed = server.ws("/v1/streams/leads", &[("X-Api-Key", key.clone())]);
    said.add("an API key", keyed.next_of("welcome").to_string());
    let misplaced = json!({ "streams": [MISPLACED, format!("{MISPLACED} {key}")], "id": key.repeat(2) }).to_string();
    for (method, path, body) in [
        ("POST", "keys", misplaced.clone()),
        ("POST", "keys", misplaced[..misplaced.len() - 1].to_owned()),
        ("POST", "keys", json!({ "streams": ["*"], "id": "made" }).to_string()),
        ("POST", "keys", json!({ "streams": ["*"], "rate": key }).to_string()),
        ("GET", "keys", String::new()),
        ("DELETE", "keys/in-file", String::new()),
        ("DELETE", "keys/nobody", String::new()),
        ("PUT", "keys", misplaced.clone()),
        ("GET", "connections?sub=ordered", String::new()),
        ("GET", "connections", String::new()),
        ("PUT", "users/ordered/permissions", json!({ "permissions": ["a"], "roles": ["agent"] }).to_string()),
        ("PUT", "users/ordered/permissions", misplaced.clone()),
        ("POST", "tokens/revoke", json!({ "jti": "jti-watcher", "exp": now_s() + 600 }).to_string()),
        ("POST", "tokens/revoke", json!({ "token": token }).to_string()),
        ("POST", "tokens/revoke", misplaced.clone()),
        ("POST", "users/ordered/logout", String::new()),
        ("GET", "streams", String::new()),
        ("POST", "streams", misplaced),
        ("DELETE", "keys/made", String::new()),
    ] {
        for key in [None, Some(WRONG_ADMIN), Some(ADMIN_KEY)] {
            let answer = ask(method, &format!("/admin/v1/{path}"), key, &body);
            said.answer(format!("admin {method} {path}"), &answer);
            assert_eq!(answer.status == 401, key != Some(ADMIN_KEY), "{method} {path} {answer:?}");
        }
    }
    said.add("a deleted API key", format!("{:?}", keyed.closed()));
    said.answer("a deleted API key", &server.get("/v1/streams/leads", &[("X-Api-Key", key)]));
    said.frames("who was ordered about", &mut ws);
}

/// Two processes that share a Redis: event streams of the one are renewed at the other, and both list all. What they say to
/// each other goes through Redis, where others may hear it: that is searched as well.
fn peers(world: &mut World, server: &Server, said: &mut Said) {
    let other = world.setup.start();
    connected(&other);
    let mut listener = world.redis.client();
    listener.command(&["AUTH", REDIS]).expect("an answer");
    listener.command(&["PSUBSCRIBE", "*"]).expect("an answer");

    let token = world.token("watched-elsewhere");
    let mut sse = server.sse("/v1/streams/leads", &[bearer(&token)]);
    let welcome = sse.next_of("welcome");
    let name = welcome.data["connection"].as_str().expect("a name").to_owned();
    let path = format!("/v1/connections/{name}/auth");
    let json = [("Content-Type", "application/json".to_owned())];
    let claims = json!({ "sub": "watched-elsewhere", "exp": now_s() + 900, "companyId": "c1", "role": "agent" });
    let renewed = mint(claims);
    world.secrets.keep_token("token renewed at another process", &renewed);
    let stranger = world.token("a-stranger");
    let mut tokens = world.bad_tokens();
    tokens.push(("another user", stranger));
    tokens.push(("the same user and a later end", renewed));
    let good = tokens.len() - 1;
    for (no, (what, token)) in tokens.into_iter().enumerate() {
        let place = format!("renewed at another process with {what}");
        let answer = other.request("POST", &path, &json, &json!({ "token": token }).to_string());
        let status = said.answer(place, &answer);
        assert_eq!(status == 200, no == good, "{what}: {answer:?}");
        if no != good && no % 4 == 3 {
            // A fifth refusal would end it.
            let again = world.token("watched-elsewhere");
            let answer = server.request("POST", &path, &json, &json!({ "token": again }).to_string());
            assert_eq!(said.answer("renewed at its own process", &answer), 200, "{answer:?}");
        }
    }
    for (what, server) in [("its own process", server), ("another process", &other)] {
        for query in ["?sub=watched-elsewhere", "", "?sub=nobody"] {
            let answer = server.order("GET", &format!("connections{query}"), &json!(null));
            assert_eq!(said.answer(format!("a list at {what}"), &answer), 200);
        }
    }

    let mut publisher = world.redis.client();
    publisher.command(&["AUTH", REDIS]).expect("an answer");
    publisher.command(&["PUBLISH", "the-end", ""]).expect("an answer");
    for messages in 0.. {
        let heard = format!("{:?}", listener.reply().expect("a message"));
        if heard.contains("the-end") {
            assert!(messages > 0, "they said nothing to each other");
            break;
        }
        said.add("heard through Redis", heard);
    }
    said.add("metrics of another process", other.metrics());
    said.add("log of another process", other.log_text());
}

/// Files that are read again, good and bad, and what ends by time.
fn reloads(world: &mut World, server: &Server, said: &mut Said) {
    let text = world.text();
    let token = {
        let claims = json!({ "sub": "short", "exp": now_s() + 2 });
        let token = mint(claims);
        world.secrets.keep_token("short token", &token);
        token
    };
    let mut ws = server.ws("/v1/streams/leads", &[bearer(&token)]);
    for (good, bad) in [
        (format!("secret = {SECRET:?}"), format!("secret = {MISPLACED:?}")),
        (format!("hash = {:?}", hash_of(&world.key)), format!("hash = \"{MISPLACED}\"")),
        (format!("redis://:{REDIS}@"), format!("redis://:{MISPLACED}@:")),
        ("[server]".to_owned(), format!("[server]\n{MISPLACED} =")),
    ] {
        assert!(text.contains(&good), "{good}");
        server.reload_text(&text.replacen(&good, &bad, 1));
    }
    server.reload_text(&text);
    let (frames, close) = ws.until_close();
    frames.iter().for_each(|frame| said.add("until the end", frame.to_string()));
    assert_eq!(close, (4001, "token_expired".to_owned()));
    said.add("the end", format!("{close:?}"));
}

fn everything(format: &str) -> (Said, Secrets) {
    let mut world = World::new(format);
    let mut said = Said::default();
    world.redis.command(&["AUTH", REDIS]);
    let record = json!({ "cookie": { "originalMaxAge": 600_000 }, "userId": "u7", "userRole": "agent", "companyId": "c1", "permissions": [] });
    world.redis.command(&["SET", &format!("sess:{SID}"), &record.to_string(), "EX", "600"]);
    commands(&mut world, &mut said);

    let mut server = world.setup.start();
    server.reload_text(&world.text());
    handshakes(&mut world, &server, &mut said);
    frames(&mut world, &server, &mut said);
    upstreams(&mut world, &server, &mut said);
    admin(&mut world, &server, &mut said);
    sessions(&mut world, &server, &mut said);
    peers(&mut world, &server, &mut said);
    reloads(&mut world, &server, &mut said);
    said.add("metrics", server.metrics());
    let state = fs::read_to_string(server.directory().join("restcast.state")).expect("keys were made");
    for (what, secret) in world.secrets.0.iter().filter(|(what, _)| what.starts_with("API key made")) {
        assert!(!state.contains(secret), "{what} stands in the state file");
    }

    // A drain, with somebody there to be told.
    let token = world.token("last");
    let mut ws = server.ws("/v1/streams/leads", &[bearer(&token)]);
    ws.next_of("welcome");
    server.signal(Signal::TERM);
    said.frames("the drain", &mut ws);
    drop(ws);
    server.wait();
    said.add("log", server.log_text());
    drop(server);

    // A store that does not let the server in.
    let wrong = world.setup.clone().redis(
        &format!("redis://:{MISPLACED}@{}/0", world.redis.address()),
        &format!("[auth.session]\nsecrets = [{SESSION:?}]"),
    );
    let server = wrong.start();
    let answer = server.get("/v1/streams/leads", &[("Cookie", cookie(SESSION, SID))]);
    assert_eq!(said.answer("a store that refuses", &answer), 503);
    said.add("log of a server that the store refuses", server.log_text());
    said.add("metrics of a server that the store refuses", server.metrics());
    (said, world.secrets)
}

fn nothing_is_seen(format: &str) {
    let (mut said, secrets) = everything(format);
    // The search sees what is there: something of each place, and each secret in each of its forms, were it said.
    for (place, text) in [
        ("log", "An administrator has made an API key."),
        ("log", "api_key"),
        ("log", "The configuration is not taken"),
        ("log", "UPSTREAM_STATUS"),
        ("metrics", "restcast_api_key_handshakes_total"),
        ("[\"check\"] out", "X-Upstream-Key"),
        ("[\"check\"] err", "auth.api_key.hash"),
        ("[\"explain\", \"token\"] out", "explained"),
        ("GET leads by bearer with a foreign signature", "INVALID_TOKEN"),
        ("GET leads by API key", "200"),
        ("frame", "AUTH_UPDATE_REJECTED"),
        ("frame", "auth_ok"),
        ("five refusals", "close 4001 auth_update_rejected"),
        ("500 by SSE", "UPSTREAM_STATUS"),
        ("nobody by SSE", "UPSTREAM_UNREACHABLE"),
        ("the store is away", "SESSION_STORE_UNAVAILABLE"),
        ("a deleted API key", "api_key_revoked"),
        ("renewed at another process with a foreign signature", "INVALID_TOKEN"),
        ("heard through Redis", "restcast:"),
        ("a list at another process", "watched-elsewhere"),
        ("the drain", "reconnect"),
    ] {
        assert!(said.says(place, text), "{place} never says {text:?}");
    }
    let leaks = said.leaks(&secrets);
    assert!(leaks.is_empty(), "{} leaks, the first of which: {}", leaks.len(), leaks[0]);
    assert!(secrets.0.len() > 60, "{}", secrets.0.len());

    let (what, secret) = secrets.0.iter().find(|(what, _)| *what == "JWT secret").expect("it is among them");
    for form in forms(secret) {
        said.0.clear();
        said.add("somewhere", [b"before ", form.as_slice(), b" after"].concat());
        assert!(said.leaks(&secrets).iter().any(|leak| leak.starts_with(what.as_str())), "{form:?}");
    }
}

#[test]
fn no_secret_is_seen_in_text() {
    nothing_is_seen("text");
}

#[test]
fn no_secret_is_seen_in_json() {
    nothing_is_seen("json");
}

/// What is sealed: the listener's TLS, key sets over `https`, Redis over `rediss`, with all that their URLs and files hold.
struct Sealed {
    authority: Authority,
    folder: Folder,
    /// The files of who is trusted, and of a stranger.
    ca: [String; 2],
    upstream: Upstream,
    idp: Upstream,
    issuer: Ed25519KeyPair,
    redis: Redis,
    setup: Setup,
    secrets: Secrets,
}

/// Ways a key set is not to be had: the path that stands in for each.
const NO_KEY_SETS: [&str; 8] = ["500", "redirect", "html", "broken", "large", "cut", "status", "head"];

impl Sealed {
    fn new(format: &str) -> Sealed {
        let (authority, stranger) = (Authority::new(), Authority::new());
        let folder = Folder::new(&format!("secrets-sealed-{format}"));
        let ca = [folder.put("good.pem", &authority.pem()), folder.put("stranger.pem", &stranger.pem())];
        let identity = authority.identity(&["localhost", "127.0.0.1"]);
        let (cert, key) = identity.write_pem(&folder);

        let mut secrets = Secrets::default();
        for (what, secret) in [
            ("JWT secret", SECRET),
            ("admin key", ADMIN_KEY),
            ("session secret", SESSION),
            ("session id", SID),
            ("query of a key set's URL", SET_QUERY),
            ("password in a key set's URL", SET_PASSWORD),
            ("answer in a key set's place", SET_ANSWER),
            ("redis user's password", REDIS_USER),
            ("misplaced secret", MISPLACED),
        ] {
            secrets.keep(what, secret);
        }
        let pem = identity.pem().1;
        let lines: Vec<&str> = pem.lines().filter(|line| line.len() >= 16 && !line.starts_with('-')).collect();
        assert!(lines.len() >= 2, "a private key has several lines");
        for (no, line) in lines.iter().enumerate() {
            secrets.keep(&format!("private key of the listener, line {no}"), *line);
        }

        let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).expect("a key");
        let issuer = Ed25519KeyPair::from_pkcs8(document.as_ref()).expect("a key");
        let idp = Upstream::start_tls(&identity);
        let jwk =
            json!({ "kty": "OKP", "crv": "Ed25519", "kid": "k", "x": URL_SAFE_NO_PAD.encode(issuer.public_key()) });
        idp.set_json("/good", &json!({ "keys": [jwk] }).to_string());
        let page = format!("<html>{SET_ANSWER}</html>");
        idp.set("/500", Reply::body("text/html", page.clone()).with_status(500).header("Retry-After", SET_ANSWER));
        let elsewhere = format!("https://{SET_ANSWER}@127.0.0.1/?{SET_ANSWER}");
        idp.set("/redirect", Reply::status(302).header("Location", &elsewhere));
        idp.set("/html", Reply::body("text/html", page));
        let half = format!("{{\"keys\":[{{\"kty\":\"OKP\",\"kid\":\"{SET_ANSWER}\",");
        idp.set("/broken", Reply::json(half.clone()));
        idp.set("/large", Reply::json(format!("[{}0]", format!("\"{SET_ANSWER}\",").repeat(100_000))));
        let cut = format!("HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n{half}").into_bytes();
        idp.set("/cut", Reply::steps(vec![Step::Send(cut), Step::Reset]));
        idp.set("/status", Reply::raw(format!("{SET_ANSWER}\r\n\r\n")));
        idp.set("/head", Reply::raw(format!("HTTP/1.1 200 OK\r\n{SET_ANSWER}\r\n\r\n")));

        let redis = RedisSetup::new().user("ada", REDIS_USER, "~* &* +@all").tls(&identity).start();
        let record = json!({ "cookie": { "originalMaxAge": 600_000 }, "userId": "u7", "userRole": "agent" });
        redis.command(&["SET", &format!("sess:{SID}"), &record.to_string(), "EX", "600"]);

        let upstream = Upstream::start();
        upstream.set_json("/leads", r#"[{"id":1}]"#);
        let mut setup = Setup::new()
            .log(&format!("level = \"trace\"\nformat = {format:?}"))
            .limits("auth_failures_per_minute = 0\nhandshake_timeout = \"1s\"")
            .stream("leads", &upstream.url("/leads"), "")
            .server(&format!("[[server.tls]]\ncert = {cert:?}\nkey = {key:?}"));
        let set = |url: &str, ca: &str| format!("url = {url:?}\nca = {ca:?}\naudience = \"restcast\"");
        let at = |path: &str| idp.url(&format!("/{path}?key={SET_QUERY}"));
        setup = setup.key_set("https://good", &set(&at("good"), &ca[0]));
        for path in NO_KEY_SETS {
            setup = setup.key_set(&format!("https://{path}"), &set(&at(path), &ca[0]));
        }
        setup = setup
            .key_set("https://stranger", &set(&at("good"), &ca[1]))
            .key_set("https://nobody", &set(&format!("https://{}/?key={SET_QUERY}", closed_port()), &ca[0]))
            .key_set("https://no-name", &set(&format!("https://no-such-host.invalid/?key={SET_QUERY}"), &ca[0]));
        let mut sealed = Sealed { authority, folder, ca, upstream, idp, issuer, redis, setup, secrets };
        sealed.setup = sealed.with_redis(&sealed.rediss(REDIS_USER_ENCODED), 0);
        sealed
    }

    /// The URL of Redis over TLS, by this password.
    fn rediss(&self, password: &str) -> String {
        format!("rediss://ada:{password}@{}/0", self.redis.tls_address())
    }

    /// The setup with Redis at this URL, and this file of who is trusted.
    fn with_redis(&self, url: &str, ca: usize) -> Setup {
        let ca = if url.starts_with("rediss") { format!("ca = {:?}\n", self.ca[ca]) } else { String::new() };
        let lines = format!("{ca}timeout = \"500ms\"\n[auth.session]\nsecrets = [{SESSION:?}]");
        self.setup.clone().redis(url, &lines)
    }

    /// A token of this issuer under this key.
    fn token(&mut self, iss: &str, kid: &str) -> String {
        let claims = json!({ "sub": "u1", "exp": now_s() + 600, "iss": iss, "aud": "restcast" });
        let parts = [json!({ "alg": "EdDSA", "kid": kid }), claims];
        let text = parts.map(|part| URL_SAFE_NO_PAD.encode(part.to_string())).join(".");
        let token = format!("{text}.{}", URL_SAFE_NO_PAD.encode(self.issuer.sign(text.as_bytes())));
        self.secrets.keep_token(&format!("token of {iss} under {kid}"), &token);
        token
    }

    fn client(&self) -> Arc<ClientConfig> {
        Arc::new(self.authority.client_config(&[&TLS12, &TLS13]))
    }

    /// A request over TLS.
    fn get(&self, server: &Server, path: &str, headers: &[(&str, String)]) -> Answer {
        server.connect().secured(&self.client(), "localhost").request("GET", path, headers, "")
    }
}

/// What `check` and `explain` print of the files, and what is said of files that are read again.
fn sealed_files(sealed: &mut Sealed, said: &mut Said, server: &Server) {
    let text = sealed.setup.text();
    let token = sealed.token("https://good", "explained");
    command(&sealed.folder, said, &["check"], &text, "");
    command(&sealed.folder, said, &["explain", "token"], &text, &format!("{token}\n"));
    let place = sealed.idp.address().to_string();
    for (good, bad) in [
        // A key set's URL takes no user and no password; who writes one is told so without it.
        (format!("https://{place}/good"), format!("https://ada:{SET_PASSWORD}@{place}/good")),
        (format!("https://{place}/good"), format!("http://ada:{SET_PASSWORD}@idp.example/good")),
        (format!("https://{place}/good"), format!("https://:{SET_PASSWORD}@:no port:/good")),
        (format!("ada:{REDIS_USER_ENCODED}@"), format!("ada:{REDIS_USER_ENCODED}%zz@")),
        (format!("ada:{REDIS_USER_ENCODED}@"), format!("ada:{REDIS_USER_ENCODED}@:no port:")),
        ("rediss://".to_owned(), "redis://".to_owned()),
        ("rediss://".to_owned(), "https://".to_owned()),
        (format!("ca = {:?}\ntimeout", sealed.ca[0]), "ca = \"/no/such/file\"\ntimeout".to_owned()),
    ] {
        assert!(text.contains(&good), "{good}");
        let text = text.replacen(&good, &bad, 1);
        command(&sealed.folder, said, &["check"], &text, "");
        server.reload_text(&text);
    }
    server.reload_text(&text);
}

/// Credentials over TLS, and in every kind of handshake that is none.
fn sealed_handshakes(sealed: &mut Sealed, said: &mut Said, server: &Server) {
    let (good, bad) = (sealed.token("https://good", "k"), sealed.token("https://good", "another"));
    let own = mint(json!({ "sub": "u1", "exp": now_s() + 600 }));
    sealed.secrets.keep_token("own token", &own);
    let client = sealed.client();
    for (what, token, status) in [("good", &good, 200), ("own", &own, 200), ("bad", &bad, 401)] {
        for (path, headers) in [
            ("/v1/streams/leads".to_owned(), vec![bearer(token)]),
            (format!("/v1/streams/leads?token={token}"), vec![]),
            ("/v1/streams/leads".to_owned(), vec![("Cookie", format!("restcast_token={token}"))]),
        ] {
            assert_eq!(
                said.answer(format!("GET by a {what} token over TLS"), &sealed.get(server, &path, &headers)),
                status
            );
            let mut raw = server.connect().secured(&client, "localhost");
            let upgrade = raw.upgrade(&path, &headers);
            assert_eq!(said.answer(format!("upgrade by a {what} token over TLS"), &upgrade) == 101, status == 200);
            // The same in the clear, to a listener that speaks TLS alone.
            let answer = server.get(&path, &headers);
            assert_eq!(said.answer("HTTP in the clear", &answer), 400);
        }
    }
    let mut hello = Vec::new();
    rustls::ClientConnection::new(Arc::clone(&client), "localhost".try_into().expect("a name"))
        .expect("a client")
        .write_tls(&mut hello)
        .expect("to memory");
    let record = |kind: u8, bytes: &[u8]| {
        let length = u16::try_from(bytes.len()).expect("a record").to_be_bytes();
        [&[kind, 3, 3], &length[..], bytes].concat()
    };
    for bytes in [
        good.clone().into_bytes(),
        record(22, good.as_bytes()),
        record(23, good.as_bytes()),
        record(21, good.as_bytes()),
        [&hello[..hello.len() / 2], good.as_bytes()].concat(),
        [&hello[..], good.as_bytes()].concat(),
        [&hello[..], &record(22, good.as_bytes())].concat(),
        [&hello[..], &record(23, good.as_bytes())].concat(),
        // One that does not end.
        hello[..hello.len() / 2].to_vec(),
    ] {
        let mut raw = server.connect();
        raw.send(&bytes);
        said.add("a handshake that is none", raw.rest());
    }
    // A client that speaks something else, whatever it calls it, and one that does not trust the server.
    let mut other = sealed.authority.client_config(&[&TLS13]);
    other.alpn_protocols = vec![MISPLACED.as_bytes().to_vec()];
    let suspicious = Authority::new().client_config(&[&TLS12, &TLS13]);
    for config in [other, suspicious] {
        assert!(server.connect().try_secured(&Arc::new(config), "localhost").is_err());
    }
    // Behind a handshake, what is no record of it.
    let mut ws = server.connect().secured(&client, "localhost").ws("/v1/streams/leads", &[bearer(&own)]);
    ws.next_of("welcome");
    std::io::Write::write_all(&mut ws.socket(), &record(23, good.as_bytes())).expect("sent");
    said.frames("a record that is none", &mut ws);
}

/// Every way that a key set is not there, told to who brings a token that needs it.
fn sealed_key_sets(sealed: &mut Sealed, said: &mut Said, server: &Server) {
    for issuer in NO_KEY_SETS.into_iter().chain(["stranger", "nobody", "no-name"]) {
        let token = sealed.token(&format!("https://{issuer}"), "k");
        let answer = sealed.get(server, "/v1/streams/leads", &[bearer(&token)]);
        assert_eq!(said.answer(format!("a token of {issuer}"), &answer), 401, "{issuer}");
    }
    let failed = server.metric(&["key_set_fetches_total", "failed"]);
    assert!(failed >= (NO_KEY_SETS.len() + 3) as f64, "{failed}");
    said.answer("readiness", &server.admin("GET", "/readyz", None));
}

/// Redis over TLS while it is there, gone, back; and where the server is not let in.
fn sealed_redis(sealed: &mut Sealed, said: &mut Said, server: &Server) {
    let session = [("Cookie", cookie(SESSION, SID))];
    let status = |sealed: &Sealed, said: &mut Said, wanted: u16| {
        eventually(&format!("a session is answered {wanted}"), || {
            let answer = sealed.get(server, "/v1/streams/leads", &session);
            (said.answer("a session by rediss", &answer) == wanted).then_some(())
        });
    };
    status(sealed, said, 200);
    sealed.redis.kill();
    status(sealed, said, 503);
    said.answer("readiness", &server.admin("GET", "/readyz", None));
    sealed.redis.restart();
    status(sealed, said, 200);

    let (plain, tls) = (sealed.redis.address(), sealed.redis.tls_address());
    for (what, url, ca) in [
        ("a stranger's authority", sealed.rediss(REDIS_USER_ENCODED), 1),
        ("a wrong password", sealed.rediss(MISPLACED), 0),
        ("no TLS where it is asked for", format!("rediss://ada:{REDIS_USER_ENCODED}@{plain}/0"), 0),
        ("TLS where none is asked for", format!("redis://ada:{REDIS_USER_ENCODED}@{tls}/0"), 0),
    ] {
        let server = sealed.with_redis(&url, ca).start();
        let answer = sealed.get(&server, "/v1/streams/leads", &session);
        assert_eq!(said.answer(what, &answer), 503, "{what}");
        said.answer(what, &server.admin("GET", "/readyz", None));
        said.add(format!("log with {what}"), server.log_text());
        said.add(format!("metrics with {what}"), server.metrics());
    }
}

fn nothing_sealed_is_seen(format: &str) {
    let (mut sealed, mut said) = (Sealed::new(format), Said::default());
    let server = sealed.setup.start();
    sealed_handshakes(&mut sealed, &mut said, &server);
    sealed_key_sets(&mut sealed, &mut said, &server);
    sealed_redis(&mut sealed, &mut said, &server);
    sealed_files(&mut sealed, &mut said, &server);
    said.add("metrics", server.metrics());
    for result in ["full", "failed", "not_tls"] {
        assert!(server.metric(&["restcast_tls_handshakes_total{", &format!("\"{result}\"")]) >= 1.0, "{result}");
    }
    assert!(sealed.upstream.request_count() > 0 && sealed.idp.request_count() > 0);
    said.add("log", server.log_text());
    drop(server);

    for (place, text) in [
        ("log", "UPSTREAM_TLS: "),
        ("log", "UPSTREAM_UNREACHABLE: "),
        ("log", "UPSTREAM_DNS: "),
        ("log", "UPSTREAM_PROTOCOL: "),
        ("log", "UPSTREAM_TOO_LARGE: "),
        ("log", "the status is 302, not 200"),
        ("log", "the status is 500, not 200"),
        ("log", "it is not JSON"),
        ("log", "The configuration is not taken"),
        ("log with a wrong password", "WRONGPASS"),
        ("[\"check\"] out", "rediss://ada:***@"),
        ("[\"check\"] err", "has a user, a password or a fragment"),
        ("HTTP in the clear", "https://"),
        ("GET by a bad token over TLS", "INVALID_TOKEN"),
        ("a token of stranger", "INVALID_TOKEN"),
        ("a wrong password", "SESSION_STORE_UNAVAILABLE"),
    ] {
        assert!(said.says(place, text), "{place} never says {text:?}");
    }
    let leaks = said.leaks(&sealed.secrets);
    assert!(leaks.is_empty(), "{} leaks, the first of which: {}", leaks.len(), leaks[0]);
}

#[test]
fn no_secret_of_tls_key_sets_and_rediss_is_seen_in_text() {
    nothing_sealed_is_seen("text");
}

#[test]
fn no_secret_of_tls_key_sets_and_rediss_is_seen_in_json() {
    nothing_sealed_is_seen("json");
}

#[test]
fn what_is_hidden_in_base64_of_something_longer_is_found() {
    let mut secrets = Secrets::default();
    secrets.keep("it", "a secret of some length?>");
    for before in ["", "x", "xy", "xyz"] {
        for after in ["", "!", "!!", "!!!"] {
            let hidden = format!("{before}a secret of some length?>{after}");
            for encoded in [STANDARD.encode(&hidden), URL_SAFE_NO_PAD.encode(&hidden)] {
                let mut said = Said::default();
                said.add("somewhere", format!("field={encoded} more"));
                assert!(!said.leaks(&secrets).is_empty(), "{hidden} as {encoded}");
            }
        }
    }
    let mut said = Said::default();
    said.add("somewhere", "a secret of some lengtj?>");
    assert!(said.leaks(&secrets).is_empty());
}
