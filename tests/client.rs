//! The browser client, `/client.js` as it is served, against the real server: in Node for what the network and the server
//! do to it, in Chromium for what a browser does (tabs, offline). Its rules by themselves: `tests/client/unit.test.js`.
#![cfg(feature = "runtime")]

#[allow(dead_code, reason = "pictures are the playground's")]
mod browser;
mod support;

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use browser::Browser;
use rustix::process::Signal;
use serde_json::{Value, json};
use support::redis::free_port;
use support::server::{PATIENCE, SECRET, Server, Setup, bearer, client_frame, eventually, token_of};
use support::{Folder, Proxy, Reply, Upstream};

const TRANSPORTS: [&str; 3] = ["websocket", "sse", "polling"];
/// What makes the tests quick: the law is the same, `unit.test.js` holds it to its figures.
const QUICK: (&str, u64) = ("upgradeMs", 400);

/// The client library in a process of its own.
struct Page {
    child: Child,
    stdin: ChildStdin,
    events: Receiver<Value>,
    seen: Vec<Value>,
    _folder: Folder,
}

impl Page {
    /// One that has loaded what `server` serves.
    fn new(server: &Server) -> Page {
        let (folder, answer) = (Folder::new("client"), server.get("/client.js", &[]));
        assert_eq!(answer.status, 200, "{answer:?}");
        let library = folder.put("client.mjs", &answer.text());
        let node = Command::new("node")
            // Node 20 has a WebSocket behind this flag; later ones have it anyway.
            .args(["--experimental-websocket", "--no-warnings", "tests/client/live.js"])
            .arg(&library)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let mut child = node.expect("node starts: `.ci/setup` installs it");
        let (tell, events) = channel();
        let out = child.stdout.take().expect("piped");
        thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                let event = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
                let _ = tell.send(event);
            }
        });
        let stdin = child.stdin.take().expect("piped");
        let mut page = Page { child, stdin, events, seen: Vec::new(), _folder: folder };
        page.until("the library is loaded", |event| (event["ready"] == true).then_some(()));
        page
    }

    /// Watches `path` at `address`, with tokens of u1 that live for `life` seconds.
    fn watch(server: &Server, address: SocketAddr, path: &str, life: u32, options: Value) -> Page {
        let mut page = Page::new(server);
        page.connect(address, path, life, options, json!([]));
        page
    }

    fn connect(&mut self, address: SocketAddr, path: &str, life: u32, mut options: Value, refuses: Value) {
        options[QUICK.0] = QUICK.1.into();
        options["backoffMs"] = 100.into();
        let mint = json!({ "secret": SECRET, "kid": "k1", "life": life, "claims": { "sub": "u1" } });
        let url = format!("http://{address}{path}");
        self.tell(json!({ "connect": { "url": url, "options": options, "mint": mint, "refuses": refuses } }));
    }

    fn tell(&mut self, deed: Value) {
        writeln!(self.stdin, "{deed}").expect("the page lives");
    }

    /// Waits for an event that `look` knows.
    fn until<T>(&mut self, what: &str, mut look: impl FnMut(&Value) -> Option<T>) -> T {
        let until = Instant::now() + PATIENCE;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let Ok(event) = self.events.recv_timeout(left) else {
                let last = &self.seen[self.seen.len().saturating_sub(40)..];
                panic!("waited {PATIENCE:?}: {what}; the page saw {last:#?}");
            };
            let found = look(&event);
            self.seen.push(event);
            if let Some(found) = found {
                return found;
            }
        }
    }

    fn live_over(&mut self, transport: &str) {
        self.until(&format!("live over {transport}"), |event| {
            let status = &event["status"];
            (status["state"] == "live" && status["transport"] == transport).then_some(())
        });
    }

    fn value(&mut self, value: &Value) {
        self.until(&format!("the value becomes {value}"), |event| (event["value"] == *value).then_some(()));
    }

    fn closed(&mut self) -> Value {
        self.until("closed", |event| (event["status"]["state"] == "closed").then(|| event["status"].clone()))
    }

    fn count(&self, look: impl Fn(&Value) -> bool) -> usize {
        self.seen.iter().filter(|event| look(event)).count()
    }

    fn count_state(&self, state: &str) -> usize {
        self.count(|event| event["status"]["state"] == state)
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn only(transport: &str) -> Value {
    json!({ "transports": [transport] })
}

/// A server of the stream `leads` at an address that another can take over.
fn at(address: SocketAddr, upstream: &Upstream, lines: &str, change: impl FnOnce(Setup) -> Setup) -> Server {
    let setup = Setup::new().server(&format!("listen = \"{address}\"\n{lines}")).jwt("leeway = \"0s\"");
    change(setup.stream("leads", &upstream.url("/leads"), "")).start()
}

fn free_address() -> SocketAddr {
    ([127, 0, 0, 1], free_port()).into()
}

fn started() -> (Upstream, Server) {
    let upstream = Upstream::start();
    upstream.set_json("/leads", r#"{"n":1}"#);
    let server = at(free_address(), &upstream, "heartbeat = \"1s\"", |setup| setup);
    (upstream, server)
}

/// An admin call that must succeed.
fn order(server: &Server, method: &str, path: &str, body: &Value) {
    let answer = server.order(method, path, body);
    assert!((200..300).contains(&answer.status), "{answer:?}");
}

// The library by itself.

#[test]
fn the_librarys_own_tests_pass_for_the_source_and_for_what_is_served() {
    for source in ["client.js", "client.min.js"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/web/client").join(source);
        let output = Command::new("node")
            .args(["--test", "tests/client/unit.test.js"])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .env("CLIENT", path)
            .output()
            .expect("node starts: `.ci/setup` installs it");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{source}:\n{said}\n{}", String::from_utf8_lossy(&output.stderr));
        let passed = said.lines().find_map(|line| line.strip_prefix("# pass ")?.parse::<u32>().ok());
        assert!(passed.is_some_and(|count| count > 125), "{source}: {passed:?} tests were run");
    }
}

// What networks and servers do.

#[test]
fn a_killed_server_is_found_again_over_each_transport_and_its_value_is_the_upstreams() {
    let upstream = Upstream::start();
    for transport in TRANSPORTS {
        upstream.set_json("/leads", r#"{"n":1}"#);
        let address = free_address();
        let mut server = at(address, &upstream, "", |setup| setup);
        let mut page = Page::watch(&server, address, "/v1/streams/leads", 600, only(transport));
        page.live_over(transport);
        page.value(&json!({ "n": 1 }));
        server.signal(Signal::KILL);
        server.wait();
        page.until("it waits", |event| (event["status"]["state"] == "waiting").then_some(()));
        upstream.set_json("/leads", r#"{"n":2}"#);
        let _server = at(address, &upstream, "", |setup| setup);
        page.live_over(transport);
        page.value(&json!({ "n": 2 }));
        upstream.set_json("/leads", r#"{"n":3}"#);
        page.value(&json!({ "n": 3 }));
    }
}

#[test]
fn a_connection_that_is_cut_resumes_with_what_was_missed_and_nothing_else() {
    let (upstream, server) = started();
    for transport in ["websocket", "sse"] {
        upstream.set_json("/leads", r#"{"n":1,"filler":"so that a patch is smaller than the whole of it, by far"}"#);
        let proxy = Proxy::to(server.listen);
        let mut page = Page::watch(&server, proxy.address(), "/v1/streams/leads", 600, only(transport));
        page.until("the first value", |event| (event["value"]["n"] == 1).then_some(()));
        proxy.down();
        page.until("it waits", |event| (event["status"]["state"] == "waiting").then_some(()));
        upstream.set_json("/leads", r#"{"n":2,"filler":"so that a patch is smaller than the whole of it, by far"}"#);
        let value = || server.get("/v1/streams/leads", &[bearer(&token_of("u1"))]).json()["n"].as_u64();
        eventually("the server has the change", || (value() == Some(2)).then_some(()));
        proxy.heal();
        page.live_over(transport);
        let kind = page.until("the missed change", |event| {
            (event["value"]["n"] == 2).then(|| event["type"].as_str().unwrap_or_default().to_owned())
        });
        assert_eq!(kind, "patch", "over {transport}");
        assert_eq!(page.count(|event| event["type"] == "snapshot"), 1, "over {transport}");
    }
}

#[test]
fn a_drained_server_is_left_and_the_next_one_is_joined_when_the_first_said_so() {
    let upstream = Upstream::start();
    for transport in TRANSPORTS {
        upstream.set_json("/leads", r#"{"n":1}"#);
        let address = free_address();
        let mut server = at(address, &upstream, "drain = \"2s\"", |setup| setup);
        let mut page = Page::watch(&server, address, "/v1/streams/leads", 600, only(transport));
        page.value(&json!({ "n": 1 }));
        if transport == "polling" {
            let waiting = || server.metric(&["restcast_connections{", "json_wait"]) == 1.0;
            eventually("a poll waits", || waiting().then_some(()));
        }
        server.signal(Signal::TERM);
        let status =
            page.until("it waits", |event| (event["status"]["state"] == "waiting").then(|| event["status"].clone()));
        let wait = status["retryInMs"].as_f64().expect("a time");
        match transport {
            "polling" => assert!(status["code"] == 503 && wait >= 2000.0, "{status}"),
            _ => assert!(status["code"] == 1012 && (0.0..=2000.0).contains(&wait), "{status}"),
        }
        server.wait();
        upstream.set_json("/leads", r#"{"n":2}"#);
        let _server = at(address, &upstream, "", |setup| setup);
        page.live_over(transport);
        page.value(&json!({ "n": 2 }));
    }
}

#[test]
fn short_tokens_are_renewed_in_band_and_the_connection_outlives_three_of_them() {
    let (upstream, server) = started();
    for transport in ["websocket", "sse"] {
        upstream.set_json("/leads", r#"{"n":1}"#);
        let mut page = Page::watch(&server, server.listen, "/v1/streams/leads", 4, only(transport));
        page.value(&json!({ "n": 1 }));
        for _ in 0..3 {
            page.until("asked for the next token", |event| (event["asked"] == "reauthenticate").then_some(()));
            page.until("renewed", |event| event["permissions"].is_array().then_some(()));
        }
        upstream.set_json("/leads", r#"{"n":2}"#);
        page.value(&json!({ "n": 2 }));
        assert_eq!(
            (page.count_state("connecting"), page.count_state("waiting")),
            (1, 0),
            "one connection, {transport}"
        );
        assert_eq!(page.count(|event| !event["error"].is_null()), 0);
    }
    // A poller is asked by nobody: the token's end is answered 401, and a fresh one goes on at once.
    upstream.set_json("/leads", r#"{"n":1}"#);
    let mut page = Page::watch(&server, server.listen, "/v1/streams/leads", 2, only("polling"));
    for _ in 0..2 {
        page.until("asked for the next token", |event| (event["asked"] == "expired").then_some(()));
    }
    upstream.set_json("/leads", r#"{"n":2}"#);
    page.value(&json!({ "n": 2 }));
    assert_eq!((page.count_state("connecting"), page.count_state("waiting")), (1, 0));
}

#[test]
fn a_token_that_is_not_renewed_ends_the_connection_and_a_fresh_one_opens_the_next_at_once() {
    let (upstream, server) = started();
    for transport in ["websocket", "sse"] {
        upstream.set_json("/leads", r#"{"n":1}"#);
        let mut page = Page::new(&server);
        page.connect(server.listen, "/v1/streams/leads", 2, only(transport), json!(["reauthenticate"]));
        page.value(&json!({ "n": 1 }));
        page.until("the failure is told", |event| (event["error"]["code"] == "NO_TOKEN").then_some(()));
        let status =
            page.until("it ends", |event| (event["status"]["state"] == "waiting").then(|| event["status"].clone()));
        assert_eq!(
            (&status["code"], &status["reason"], &status["retryInMs"]),
            (&json!(4001), &json!("token_expired"), &json!(0))
        );
        page.until("asked for a fresh one", |event| (event["asked"] == "expired").then_some(()));
        page.live_over(transport);
        upstream.set_json("/leads", r#"{"n":2}"#);
        page.value(&json!({ "n": 2 }));
    }
}

#[test]
fn another_users_token_is_another_connection_and_nothing_of_the_first_users_is_left() {
    let upstream = Upstream::start();
    upstream.set_json("/u1", r#"{"of":"u1"}"#);
    upstream.set_json("/u2", r#"{"of":"u2"}"#);
    let server = at(free_address(), &upstream, "", |setup| setup.stream("own", &upstream.url("/{claims.sub}"), ""));
    for transport in ["websocket", "sse"] {
        let mut page = Page::watch(&server, server.listen, "/v1/streams/own", 600, only(transport));
        page.value(&json!({ "of": "u1" }));
        page.tell(json!({ "sub": "u2" }));
        page.tell(json!({ "renew": true }));
        page.until("told", |event| (event["error"]["code"] == "AUTH_SUBJECT_MISMATCH").then_some(()));
        page.value(&json!({ "of": "u2" }));
    }
}

#[test]
fn a_logout_is_final_and_the_application_is_told() {
    let (_upstream, server) = started();
    for transport in TRANSPORTS {
        let mut page = Page::watch(&server, server.listen, "/v1/streams/leads", 600, only(transport));
        page.value(&json!({ "n": 1 }));
        order(&server, "POST", "users/u1/logout", &json!({}));
        let status = page.closed();
        assert_eq!((&status["code"], &status["reason"]), (&json!(4010), &json!("logged_out")), "{transport}");
        let before = page.count(|event| !event["asked"].is_null());
        page.tell(json!({ "send": { "type": "anything" } }));
        page.until("it is closed", |event| (event["refused"]["code"] == "DISCONNECTED").then_some(()));
        assert_eq!(page.count(|event| !event["asked"].is_null()), before);
        // Tokens of later seconds are good again, which the next round needs.
        let until = support::server::now_s() + 1;
        eventually("the next second", || (support::server::now_s() > until).then_some(()));
    }
}

#[test]
fn what_is_not_allowed_or_not_there_is_asked_for_once() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", "1");
    let server = at(free_address(), &upstream, "", |setup| {
        setup.stream("secret", &upstream.url("/leads"), "roles = [\"admin\"]")
    });
    for (stream, status, reached) in [("secret", 403, 2), ("nothing", 404, 2)] {
        let mut page = Page::watch(&server, server.listen, &format!("/v1/streams/{stream}"), 600, json!({}));
        assert_eq!(page.closed()["code"], status);
        // A WebSocket whose refusal no script can see, and the request that says why.
        assert_eq!(page.count(|event| event["asked"] == "connect"), reached);
    }
}

#[test]
fn permissions_that_change_are_told() {
    let (_upstream, server) = started();
    for transport in ["websocket", "sse"] {
        let mut page = Page::watch(&server, server.listen, "/v1/streams/leads", 600, only(transport));
        page.value(&json!({ "n": 1 }));
        order(
            &server,
            "PUT",
            "users/u1/permissions",
            &json!({ "permissions": ["see", transport], "roles": ["agent"] }),
        );
        let event = page.until("told", |event| event["roles"].is_array().then(|| event.clone()));
        assert_eq!(event, json!({ "permissions": ["see", transport], "roles": ["agent"] }));
    }
}

#[test]
fn where_websockets_are_blocked_it_falls_back_and_comes_back_up_when_they_are_not() {
    let (upstream, server) = started();
    let proxy = Proxy::to(server.listen);
    proxy.forbid(&["upgrade: websocket"]);
    let mut page = Page::watch(&server, proxy.address(), "/v1/streams/leads", 600, json!({}));
    page.live_over("sse");
    page.value(&json!({ "n": 1 }));
    upstream.set_json("/leads", r#"{"n":2}"#);
    page.value(&json!({ "n": 2 }));

    proxy.forbid(&["upgrade: websocket", "text/event-stream"]);
    proxy.cut();
    page.live_over("polling");
    upstream.set_json("/leads", r#"{"n":3}"#);
    page.value(&json!({ "n": 3 }));

    // Tried beside the lesser one: nobody sees an interruption.
    let (waits, connects) = (page.count_state("waiting"), page.count_state("connecting"));
    proxy.heal();
    page.until("something better", |event| {
        let status = &event["status"];
        (status["state"] == "live" && status["transport"] != "polling").then_some(())
    });
    if page.seen.last().is_some_and(|event| event["status"]["transport"] != "websocket") {
        page.live_over("websocket");
    }
    upstream.set_json("/leads", r#"{"n":4}"#);
    page.value(&json!({ "n": 4 }));
    assert_eq!((page.count_state("waiting"), page.count_state("connecting")), (waits, connects));
    let values: Vec<_> = page.seen.iter().filter_map(|event| event["value"]["n"].as_u64()).collect();
    assert_eq!(values, [1, 2, 3, 4], "each once, over whatever it came");
}

#[test]
fn a_silent_network_is_noticed_over_each_transport_that_can() {
    let (upstream, server) = started();
    let mut rounds: Vec<_> = TRANSPORTS[..2]
        .iter()
        .map(|transport| {
            let proxy = Proxy::to(server.listen);
            let page = Page::watch(&server, proxy.address(), "/v1/streams/leads", 600, only(transport));
            (transport, proxy, page)
        })
        .collect();
    for (_, proxy, page) in &mut rounds {
        page.value(&json!({ "n": 1 }));
        proxy.stall();
    }
    for (transport, proxy, page) in &mut rounds {
        let status = page
            .until("it is noticed", |event| (event["status"]["state"] == "waiting").then(|| event["status"].clone()));
        assert_eq!(status["reason"], "heartbeat_timeout", "{transport}: {status}");
        proxy.heal();
    }
    upstream.set_json("/leads", r#"{"n":2}"#);
    for (transport, _, page) in &mut rounds {
        page.live_over(transport);
        page.value(&json!({ "n": 2 }));
    }
}

#[test]
fn a_gap_is_answered_by_asking_for_the_whole_value() {
    let (upstream, server) = started();
    let proxy = Proxy::to(server.listen);
    let mut page = Page::watch(&server, proxy.address(), "/v1/streams/leads", 600, only("websocket"));
    let epoch = page.until("the first value", |event| Some(event["at"].as_str()?.rsplit_once('-')?.0.to_owned()));
    // A change whose predecessors never came.
    let lost = json!({ "type": "patch", "stream": "leads", "epoch": epoch, "seq": 9, "base": 8, "ts": 1,
        "patch": [{ "op": "replace", "path": "/n", "value": "wrong" }] });
    let mut frame = client_frame(false, 1, lost.to_string().as_bytes());
    // A server's frame has no mask.
    let masked = frame.len() - lost.to_string().len();
    frame.drain(masked - 4..);
    frame[1] &= 0x7f;
    frame.extend_from_slice(lost.to_string().as_bytes());
    proxy.inject(&frame);
    let status =
        page.until("it starts anew", |event| (event["status"]["state"] == "waiting").then(|| event["status"].clone()));
    assert_eq!(status["reason"], "gap");
    let kind =
        page.until("the whole value", |event| (event["value"] == json!({ "n": 1 })).then(|| event["type"].clone()));
    assert_eq!(kind, "snapshot");
    upstream.set_json("/leads", r#"{"n":2}"#);
    page.value(&json!({ "n": 2 }));
    assert_eq!(page.count(|event| event["value"]["n"] == "wrong"), 0);
}

#[test]
fn thousands_of_changes_later_the_value_is_the_upstreams_in_each_format() {
    const CHANGES: usize = 1_500;
    let upstream = Upstream::start();
    let body = |n: usize| {
        // Rows that come, go and change, numbers and texts with what needs escaping in pointers; at one change an array's,
        // which a merge cannot express, at the next two an object's.
        let rows = |n: usize| {
            (0..20).filter(move |row| !(row + n / 4).is_multiple_of(7)).map(move |row| {
                let n = (n + row) / 10;
                (row, json!({ "id": row, "price": (row * 31 + n) % 100, "a/b~c": n % 5, "tags": vec![n % 3; n % 4] }))
            })
        };
        let array: Vec<_> = rows(n / 3).map(|(_, row)| row).collect();
        let object: serde_json::Map<_, _> = rows(n).map(|(id, row)| (format!("é/{id}"), row)).collect();
        json!({ "n": n, "rows": array, "by": object, "deep": { "": { "er": n % 2 } } })
    };
    upstream.set_json("/leads", &body(0).to_string());
    let server = at(free_address(), &upstream, "", |setup| {
        setup.stream("quick", &upstream.url("/leads"), "interval = \"2ms\"\narray_key = \"id\"")
    });
    let mut pages: Vec<_> = [("websocket", "patch"), ("sse", "patch"), ("websocket", "merge"), ("websocket", "full")]
        .into_iter()
        .map(|(transport, format)| {
            let options = json!({ "transports": [transport], "format": format });
            let mut page = Page::watch(&server, server.listen, "/v1/streams/quick", 600, options);
            page.value(&body(0));
            (format, page)
        })
        .collect();
    for n in 1..=CHANGES {
        let seen = upstream.request_count();
        upstream.set_json("/leads", &body(n).to_string());
        upstream.wait_for_requests(seen + 1, PATIENCE);
    }
    for (format, page) in &mut pages {
        page.value(&body(CHANGES));
        let (values, patches) =
            (page.count(|event| !event["value"].is_null()), page.count(|event| !event["patch"].is_null()));
        assert!(values > CHANGES / 2, "{format}: {values} values");
        assert_eq!(patches > CHANGES / 4, *format != "full", "{format}: {patches} changes came as such");
        assert_eq!((page.count_state("connecting"), page.count_state("waiting")), (1, 0), "{format}");
        for event in page.seen.iter().filter(|event| !event["value"].is_null()) {
            let n = event["value"]["n"].as_u64().expect("a number");
            assert_eq!(
                event["value"],
                body(usize::try_from(n).expect("small")),
                "{format}: each value on the way was one"
            );
        }
    }
}

#[test]
fn a_rate_is_kept_and_a_slow_network_loses_no_last_value() {
    let upstream = Upstream::start();
    let filler = "x".repeat(20_000);
    let body = |n: u32| json!({ "n": n, "filler": format!("{n}{filler}") });
    upstream.set_json("/leads", &body(0).to_string());
    let server = at(free_address(), &upstream, "", |setup| setup);
    let proxy = Proxy::to(server.listen);
    proxy.delay(Duration::from_millis(20));
    let mut slow = Page::watch(&server, proxy.address(), "/v1/streams/leads", 600, only("websocket"));
    let mut rated: Vec<_> = TRANSPORTS
        .iter()
        .map(|transport| {
            let options = json!({ "transports": [transport], "maxRateMs": 400 });
            Page::watch(&server, server.listen, "/v1/streams/leads", 600, options)
        })
        .collect();
    for page in rated.iter_mut().chain([&mut slow]) {
        page.until("the first value", |event| (event["value"]["n"] == 0).then_some(()));
    }
    let begun = Instant::now();
    for n in 1..=100 {
        let seen = upstream.request_count();
        upstream.set_json("/leads", &body(n).to_string());
        upstream.wait_for_requests(seen + 1, PATIENCE);
    }
    for page in rated.iter_mut().chain([&mut slow]) {
        page.value(&body(100));
    }
    let most = usize::try_from(begun.elapsed().as_millis() / 400).expect("small") + 3;
    for (page, transport) in rated.iter().zip(TRANSPORTS) {
        let count = page.count(|event| !event["value"].is_null());
        assert!(count <= most && count >= 2, "{transport}: {count} of at most {most}");
    }
    assert_eq!(slow.count_state("waiting"), 0);
}

#[test]
fn a_failing_upstream_is_told_over_each_transport_and_so_is_its_recovery() {
    let (upstream, server) = started();
    let mut pages = TRANSPORTS.map(|transport| {
        let mut page = Page::watch(&server, server.listen, "/v1/streams/leads", 600, only(transport));
        page.value(&json!({ "n": 1 }));
        page
    });
    upstream.set("/leads", support::Reply::status(500));
    for page in &mut pages[..2] {
        page.until("stale", |event| (event["status"]["upstream"]["state"] == "stale").then_some(()));
    }
    upstream.set_json("/leads", r#"{"n":2}"#);
    for page in &mut pages {
        page.value(&json!({ "n": 2 }));
    }
    for page in &mut pages[..2] {
        let is_live =
            |event: &Value| event["status"]["upstream"]["state"] == "live" && event["status"]["state"] == "live";
        if page.seen.iter().rev().find(|event| !event["status"].is_null()).is_none_or(|event| !is_live(event)) {
            page.until("live again", |event| is_live(event).then_some(()));
        }
    }
}

#[test]
fn actions_are_sent_and_answered() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", "1");
    upstream.set_json("/deed/7", r#"{"done":true}"#);
    upstream.set_json("/deed/a-9", r#"{"nine":true}"#);
    let server = at(free_address(), &upstream, "", |setup| {
        setup
            .action("deed", &upstream.url("/deed/{message.which}"), "method = \"POST\"\nroles = []")
            .action("forbidden", &upstream.url("/deed/7"), "method = \"POST\"\nroles = [\"admin\"]")
            .action("write", &upstream.url("/deed/{message.id}"), "method = \"PUT\"\nroles = []")
    });
    let mut page = Page::watch(&server, server.listen, "/v1/streams/leads", 600, only("websocket"));
    page.live_over("websocket");
    page.tell(json!({ "send": { "type": "deed", "which": 7 } }));
    let result = page.until("a result", |event| event["result"].is_object().then(|| event["result"].clone()));
    assert_eq!(result, json!({ "status": 200, "body": { "done": true } }));
    for (kind, code) in [("forbidden", "INSUFFICIENT_PERMISSIONS"), ("unheard_of", "UNKNOWN_TYPE")] {
        page.tell(json!({ "send": { "type": kind } }));
        page.until(code, |event| (event["refused"]["code"] == code).then_some(()));
    }
    // What an action calls itself may be what it writes: the answer to each is its own.
    for (id, body) in [(json!(7), json!({ "done": true })), (json!("a-9"), json!({ "nine": true }))] {
        page.tell(json!({ "send": { "type": "write", "id": id } }));
        let result = page.until("a result", |event| event["result"].is_object().then(|| event["result"].clone()));
        assert_eq!(result, json!({ "status": 200, "body": body }));
    }
    let mut page = Page::watch(&server, server.listen, "/v1/streams/leads", 600, only("sse"));
    page.live_over("sse");
    page.tell(json!({ "send": { "type": "deed", "which": 7 } }));
    page.until("no WebSocket", |event| (event["refused"]["code"] == "NO_WEBSOCKET").then_some(()));
}

#[test]
fn many_streams_share_one_connection_and_resume_together() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", r#"{"n":1}"#);
    upstream.set_json("/other", r#"{"m":1}"#);
    let server = at(free_address(), &upstream, "", |setup| setup.stream("other", &upstream.url("/other"), ""));
    let proxy = Proxy::to(server.listen);
    let mut page = Page::watch(&server, proxy.address(), "/v1/ws", 600, json!({}));
    for stream in ["leads", "other", "nothing"] {
        page.tell(json!({ "subscribe": { "stream": stream } }));
    }
    let mut missing = vec!["leads", "other", "nothing"];
    page.until("two values and a refusal", |event| {
        missing.retain(|&stream| {
            let is_ended = event["upstream"]["state"] == "ended" && event["upstream"]["code"] == "STREAM_NOT_FOUND";
            event["stream"] != stream || event["value"].is_null() && !is_ended
        });
        missing.is_empty().then_some(())
    });
    assert_eq!(proxy.accepted(), 1);
    proxy.cut();
    page.until("it waits", |event| (event["status"]["state"] == "waiting").then_some(()));
    upstream.set_json("/other", r#"{"m":2}"#);
    page.until("the other goes on", |event| (event["value"] == json!({ "m": 2 })).then_some(()));
    page.tell(json!({ "unsubscribe": "other" }));
    upstream.set_json("/other", r#"{"m":3}"#);
    upstream.set_json("/leads", r#"{"n":2}"#);
    page.value(&json!({ "n": 2 }));
    assert_eq!(page.count(|event| event["value"] == json!({ "n": 1 })), 1, "what was held was not sent again");
}

#[test]
fn as_many_streams_as_a_connection_may_have_are_all_watched_however_their_names_are_spelled() {
    let upstream = Upstream::start();
    upstream.judge_all(|_| Reply::json("1"));
    let lines = "params = [\"a\", \"b\"]";
    let server = at(free_address(), &upstream, "", |setup| {
        setup.stream("q", &upstream.url("/q?a={query.a}&b={query.b}"), lines)
    });
    let proxy = Proxy::to(server.listen);
    let mut page = Page::watch(&server, proxy.address(), "/v1/ws", 600, json!({}));
    // More than `limits.messages_per_second`; the server spells them «q?a=1&b=x%20y».
    let mut missing: Vec<String> = (0..64).map(|no| format!("q?b=x y&a={no}")).collect();
    for stream in &missing {
        page.tell(json!({ "subscribe": { "stream": stream } }));
    }
    page.until("a value of each", |event| {
        missing.retain(|stream| event["stream"] != *stream || event["value"].is_null());
        missing.is_empty().then_some(())
    });
    assert_eq!((page.count_state("waiting"), proxy.accepted()), (0, 1));
}

#[test]
fn a_stream_that_the_server_has_no_place_for_is_watched_when_there_is_one() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", r#"{"n":1}"#);
    upstream.set_json("/other", r#"{"m":1}"#);
    let server = at(free_address(), &upstream, "", |setup| {
        setup.limits("streams = 1").stream("other", &upstream.url("/other"), "linger = \"0s\"")
    });
    let mut holder = server.ws("/v1/streams/other", &[bearer(&token_of("u2"))]);
    holder.next_of("snapshot");
    let mut page = Page::watch(&server, server.listen, "/v1/ws", 600, json!({}));
    page.tell(json!({ "subscribe": { "stream": "leads" } }));
    page.until("it is told", |event| (event["upstream"]["code"] == "TOO_MANY_STREAMS").then_some(()));
    drop(holder);
    page.value(&json!({ "n": 1 }));
    let told = page.seen.iter().rev().find(|event| event["upstream"].is_object()).expect("it was told");
    assert_eq!((&told["upstream"], &told["stream"]), (&json!({ "state": "live" }), &json!("leads")));
}

#[test]
fn why_many_streams_do_not_open_is_told_though_no_script_sees_a_refused_upgrade() {
    let (_upstream, server) = started();
    // A token that has ended, and the next one too.
    let mut page = Page::new(&server);
    let mint = json!({ "secret": SECRET, "kid": "k1", "life": 600, "claims": { "sub": "u1", "exp": 1_000_000_000 } });
    let url = format!("http://{}/v1/ws", server.listen);
    page.tell(json!({ "connect": { "url": url, "options": { "backoffMs": 100 }, "mint": mint } }));
    page.until("it is the token", |event| {
        let status = &event["status"];
        (status["code"] == 401 && status["reason"] == "TOKEN_EXPIRED").then_some(())
    });
    page.until("a fresh one is asked for", |event| (event["asked"] == "expired").then_some(()));
    // A proxy that knows no WebSockets, and then does.
    let proxy = Proxy::to(server.listen);
    proxy.forbid(&["upgrade: websocket"]);
    let mut page = Page::watch(&server, proxy.address(), "/v1/ws", 600, json!({}));
    page.tell(json!({ "subscribe": { "stream": "leads" } }));
    page.until("it is the way", |event| {
        let status = &event["status"];
        (status["code"] == 426 && status["reason"] == "UPGRADE_REQUIRED").then_some(())
    });
    proxy.heal();
    page.value(&json!({ "n": 1 }));
}

#[test]
fn no_token_stands_in_an_address_a_log_or_an_error() {
    let (_upstream, server) = started();
    for transport in TRANSPORTS {
        let mut page = Page::watch(&server, server.listen, "/v1/streams/leads", 600, only(transport));
        page.value(&json!({ "n": 1 }));
        page.tell(json!({ "renew": true }));
        page.until("asked", |event| (event["asked"] == "reauthenticate").then_some(()));
        let said = Value::from(page.seen.clone()).to_string();
        assert!(!said.contains("eyJ"), "{said}");
    }
    assert!(!server.log_text().contains("eyJ"));
}

// What browsers do.

/// Runs the library in the page that is open, every call of a callback kept in `seen`.
fn watch_in(browser: &mut Browser, server: &Server, options: &str) {
    let token = token_of("u1");
    browser.evaluate(&format!(
        "import('/client.js').then(({{ connect }}) => {{
            window.seen = []; window.asked = 0;
            window.live = connect('/v1/streams/leads', {{
                getToken: () => {{ asked += 1; return '{token}'; }}, backoffMs: 100,
                onValue: (value, {{ type }}) => seen.push({{ value, type }}), onStatus: status => seen.push({{ status }}),
                onError: error => seen.push({{ error: `${{error.code}} ${{error.message}}` }}), ...{options},
            }});
        }})",
    ));
    let _ = server;
}

/// Opens a page of the server's that has no policy of its own.
fn open_page(browser: &mut Browser, server: &Server) {
    browser.open(&format!("http://{}/healthz", server.listen));
}

#[test]
fn in_chromium_it_watches_over_each_transport_and_notices_the_network_come_back() {
    let (upstream, server) = started();
    let mut browser = Browser::start();
    for transport in TRANSPORTS {
        upstream.set_json("/leads", r#"{"n":1}"#);
        open_page(&mut browser, &server);
        watch_in(&mut browser, &server, &format!("{{ transports: ['{transport}'] }}"));
        browser.wait_for(&format!("live.state === 'live' && live.transport === '{transport}' && live.value?.n === 1"));
        upstream.set_json("/leads", r#"{"n":2}"#);
        browser.wait_for("live.value.n === 2");
    }
    // Offline: tries fail and are further and further apart, until the browser says that it is back.
    open_page(&mut browser, &server);
    watch_in(&mut browser, &server, "{ transports: ['polling'], backoffMs: 600000, backoffMaxMs: 600000 }");
    browser.wait_for("live.value?.n === 2");
    let offline = |is_offline: bool| json!({ "offline": is_offline, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1 });
    browser.call("Network.emulateNetworkConditions", offline(true));
    upstream.set_json("/leads", r#"{"n":3}"#);
    browser.wait_for("live.state === 'waiting' && !navigator.onLine");
    // Without the event it would wait for minutes.
    browser.call("Network.emulateNetworkConditions", offline(false));
    browser.wait_for("live.state === 'live' && live.value.n === 3");
    let errors = browser.evaluate("JSON.stringify(seen.filter(it => it.error))");
    assert_eq!(errors, "[]");
    browser.evaluate("live.close()");
}

#[test]
fn tabs_share_one_connection_and_the_next_one_takes_over() {
    // Large enough for a patch to be smaller.
    let body = |n: u32| json!({ "n": n, "filler": "x".repeat(500) }).to_string();
    let (upstream, server) = started();
    upstream.set_json("/leads", &body(1));
    let mut browser = Browser::start();
    let polled = || server.get("/v1/streams/leads", &[bearer(&token_of("u1"))]).json()["filler"].is_string();
    eventually("the upstream's value is there", || polled().then_some(()));
    let connections = || server.metric(&["restcast_connections{", "transport=\"ws\""]);
    open_page(&mut browser, &server);
    watch_in(&mut browser, &server, "{ shared: 'u1' }");
    browser.wait_for("live.state === 'live' && live.value?.n === 1");
    let first = browser.tab();
    open_page(&mut browser, &server);
    // No token is asked for: this tab needs none as long as it follows.
    watch_in(&mut browser, &server, "{ shared: 'u1' }");
    browser.wait_for("live.state === 'live' && live.transport === 'websocket' && live.value?.n === 1");
    assert_eq!(browser.evaluate("asked"), 0);
    upstream.set_json("/leads", &body(2));
    browser.wait_for("live.value.n === 2");
    assert_eq!(connections(), 1.0);
    let second = browser.turn_to(&first);
    browser.wait_for("live.value.n === 2");

    // An action of a tab that follows goes by way of the one that leads.
    browser.turn_to(&second);
    let refusal = browser.evaluate("live.send({ type: 'unheard_of' }).catch(error => error.code)");
    assert_eq!(refusal, "UNKNOWN_TYPE");
    // Another user's tab does not follow.
    let before = browser.tab();
    open_page(&mut browser, &server);
    watch_in(&mut browser, &server, "{ shared: 'u2' }");
    browser.wait_for("live.state === 'live'");
    assert_eq!(browser.evaluate("asked"), 1);
    assert_eq!(connections(), 2.0);
    browser.evaluate("live.close()");
    browser.turn_to(&before);

    // The leader closes: the other has a connection of its own, and goes on from where it was.
    browser.turn_to(&first);
    browser.evaluate("live.close()");
    browser.turn_to(&second);
    browser.wait_for("asked === 1 && live.state === 'live'");
    upstream.set_json("/leads", &body(3));
    browser.wait_for("live.value.n === 3");
    let whole = browser.evaluate("seen.filter(it => it.type === 'snapshot').length");
    assert_eq!(whole, 1, "the value that was handed over was enough to resume with");
    eventually("one connection is left", || (connections() == 1.0).then_some(()));

    // And a tab that is gone without a word is followed all the same.
    browser.turn_to(&first);
    open_page(&mut browser, &server);
    watch_in(&mut browser, &server, "{ shared: 'u1' }");
    browser.wait_for("live.value?.n === 3");
    assert_eq!(browser.evaluate("asked"), 0);
    browser.close_tab(&second);
    browser.wait_for("asked === 1 && live.state === 'live'");
    upstream.set_json("/leads", &body(4));
    browser.wait_for("live.value.n === 4");

    // What is final for one is final for all.
    let second = browser.tab();
    open_page(&mut browser, &server);
    watch_in(&mut browser, &server, "{ shared: 'u1' }");
    browser.wait_for("live.value?.n === 4");
    order(&server, "POST", "users/u1/logout", &json!({}));
    for tab in [None, Some(&second)] {
        if let Some(tab) = tab {
            browser.turn_to(tab);
        }
        browser.wait_for("live.state === 'closed' && live.status.code === 4010");
    }
}
