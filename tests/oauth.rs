//! Upstreams that want to know who asks: OAuth tokens got, shared, renewed, refused and rotated; client certificates; secrets
//! that change while streams are watched. Against the built server, over TLS.

mod support;

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustix::process::Signal;
use serde_json::{Value, json};
use support::server::{Server, Setup, Ws, bearer, eventually, run, token_of};
use support::{Authority, Folder, Reply, RequestSeen, Step, Upstream};

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
/// What stands in every secret here, so that it can be looked for.
const MARK: &str = "hunter";
const CLIENT: &str = "client:one";
const SECRET: &str = "hunter s3cret/+%";

/// A value that is long enough for a change of it to be told by a patch.
fn value(of: u32) -> Value {
    json!({ "value": of, "pad": "x".repeat(200) })
}

/// What the identity provider and the API know of each other.
#[derive(Default)]
struct Book {
    /// Access tokens, and when each ends for the API.
    good: HashMap<String, Option<Instant>>,
    /// Refresh tokens that may be used, each once.
    refresh: BTreeSet<String>,
    /// Tokens given so far.
    given: u32,
    life_s: Option<u64>,
    /// What the API answers to everybody, whatever they show.
    denies: Option<u16>,
    /// What the token endpoint answers to everybody.
    down: Option<u16>,
    /// How long it takes to answer what it has done at once.
    takes: Duration,
    /// Refresh tokens that it has refused.
    refused: usize,
    /// When tokens were asked for.
    asked: Vec<Instant>,
    /// Answers of the API by their status.
    answers: HashMap<u16, usize>,
    value: u32,
}

/// An API behind OAuth, and its identity provider.
struct World {
    api: Upstream,
    idp: Upstream,
    ca: String,
    book: Arc<Mutex<Book>>,
    folder: Folder,
}

fn form(seen: &RequestSeen) -> HashMap<String, String> {
    url::form_urlencoded::parse(&seen.body).into_owned().collect()
}

/// Whether the client has shown who it is, as RFC 6749 section 2.3.1 has it.
fn is_client(seen: &RequestSeen) -> bool {
    let encoded = |text: &str| url::form_urlencoded::byte_serialize(text.as_bytes()).collect::<String>();
    let wanted = STANDARD.encode(format!("{}:{}", encoded(CLIENT), encoded(SECRET)));
    let posted = || {
        let form = form(seen);
        form.get("client_id").is_some_and(|id| id == CLIENT) && form.get("client_secret").is_some_and(|it| it == SECRET)
    };
    seen.header("authorization") == Some(&format!("Basic {wanted}")) || posted()
}

impl World {
    fn new() -> World {
        let (folder, authority) = (Folder::new("oauth"), Authority::new());
        let ca = authority.write_pem(&folder).display().to_string();
        let identity = authority.identity(&["127.0.0.1"]);
        let book = Arc::new(Mutex::new(Book { life_s: Some(3600), ..Book::default() }));
        let world =
            World { api: Upstream::start_tls(&identity), idp: Upstream::start_tls(&identity), ca, book, folder };
        world.endpoint("/token");
        world
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A token endpoint at `path`.
    fn endpoint(&self, path: &str) {
        let book = Arc::clone(&self.book);
        self.idp.judge(path, move |seen| {
            let mut book = book.lock().unwrap_or_else(PoisonError::into_inner);
            book.asked.push(Instant::now());
            if let Some(status) = book.down {
                return Reply::body("application/json", json!({ "error": MARK }).to_string()).with_status(status);
            }
            let refuse = |error: &str| Reply::json(json!({ "error": error }).to_string()).with_status(400);
            let form = form(seen);
            if seen.header("content-type") != Some("application/x-www-form-urlencoded") || !is_client(seen) {
                return refuse("invalid_client");
            }
            book.given += 1;
            let mut answer = json!({ "access_token": format!("{MARK}-at-{}", book.given), "token_type": "Bearer" });
            match form.get("grant_type").map(String::as_str) {
                Some("client_credentials") => {}
                Some("refresh_token") => {
                    if !book.refresh.remove(&form["refresh_token"]) {
                        book.refused += 1;
                        return refuse("invalid_grant");
                    }
                    let next = format!("{MARK}-rt-{}", book.given);
                    answer["refresh_token"] = json!(next);
                    book.refresh.insert(next);
                }
                _ => return refuse("unsupported_grant_type"),
            }
            // The API is a little more patient than it says.
            let end = book.life_s.map(|s| Instant::now() + Duration::from_secs(s) + SECOND);
            if let Some(life) = book.life_s {
                answer["expires_in"] = json!(life);
            }
            let token = answer["access_token"].as_str().expect("a string").to_owned();
            book.good.insert(token, end);
            Reply::json(answer.to_string()).delay(book.takes)
        });
    }

    /// A resource of the API, for those who show a good token.
    fn resource(&self, path: &str) -> String {
        let book = Arc::clone(&self.book);
        self.api.judge(path, move |seen| {
            let mut book = book.lock().unwrap_or_else(PoisonError::into_inner);
            let shown = seen.header("authorization").and_then(|value| value.strip_prefix("Bearer "));
            let is_good = shown
                .and_then(|token| book.good.get(token))
                .is_some_and(|end| end.is_none_or(|end| Instant::now() < end));
            let status = book.denies.unwrap_or(if is_good { 200 } else { 401 });
            *book.answers.entry(status).or_default() += 1;
            let body = if status == 200 { value(book.value) } else { json!({ "refused": shown }) };
            Reply::json(body.to_string()).with_status(status)
        });
        self.api.url(path)
    }

    /// The lines of a stream of the API.
    fn lines(&self, more: &str) -> String {
        self.lines_at("/token", more)
    }

    fn lines_at(&self, endpoint: &str, more: &str) -> String {
        let (url, ca) = (self.idp.url(endpoint), &self.ca);
        format!(
            "ca = {ca:?}\ninterval = \"100ms\"\nbackoff_max = \"200ms\"\n{}[stream.auth]\nkind = \"oauth2\"\n\
             token_url = {url:?}\nclient_id = {CLIENT:?}\nclient_secret = {SECRET:?}\nca = {ca:?}\n",
            more
        )
    }

    fn answers(&self, status: u16) -> usize {
        self.book().answers.get(&status).copied().unwrap_or(0)
    }

    /// Waits until the last token was asked for long enough ago that the next may be.
    fn token_is_old(&self) {
        let is_old = || self.book().asked.last().is_some_and(|at| at.elapsed() >= 1_200 * MS).then_some(());
        eventually("a second passes", is_old);
    }

    fn asked(&self) -> usize {
        self.book().asked.len()
    }

    /// Waits until the API has given `more` further answers of this status.
    fn answers_more(&self, status: u16, more: usize) {
        let before = self.answers(status);
        eventually("the API answers", || (self.answers(status) >= before + more).then_some(()));
    }
}

/// Nothing that the server says holds a secret.
fn is_silent(server: &Server, setup: &Setup) {
    let (status, out, err) = run(&["check"], setup);
    assert!(status.success(), "{err}");
    for (place, text) in [("log", server.log_text()), ("metrics", server.metrics()), ("check", out), ("check", err)] {
        let line = text.lines().find(|line| line.contains(MARK));
        assert_eq!(line, None, "a secret stands in {place}");
    }
}

/// A watcher that has heard nothing yet.
fn open(server: &Server, token: &str, path: &str) -> Ws {
    server.ws(path, &[bearer(token)])
}

/// The next status of the stream that is this one.
fn status(ws: &mut Ws, state: &str) -> Value {
    loop {
        let status = ws.next_of("stream_status");
        if status["state"] == state {
            return status;
        }
    }
}

#[test]
fn one_token_serves_fifty_streams_on_two_cores() {
    let world = World::new();
    world.idp.once("/token", Reply::status(500).delay(300 * MS));
    let mut setup = Setup::new().cores(2);
    for n in 0..50 {
        let url = world.resource(&format!("/r/{n}"));
        setup = setup.stream(&format!("s{n}"), &url, &world.lines("keep_warm = true\n"));
    }
    let server = setup.start();
    let polled = || {
        let polled: BTreeSet<String> = world.api.requests().into_iter().map(|request| request.target).collect();
        (polled.len() == 50).then_some(())
    };
    eventually("all are polled", polled);
    world.answers_more(200, 100);
    // The first answer is a failure, told to all who waited for it; the next asks once more.
    assert_eq!((world.idp.request_count(), world.asked()), (2, 1), "asked once for all of them");
    assert_eq!(world.answers(401), 0, "nobody polls without a token");
    for n in [0, 49] {
        let answer = server.get(&format!("/v1/streams/s{n}"), &[bearer(&token_of("u1"))]);
        assert_eq!((answer.status, answer.json()["value"].clone()), (200, json!(0)));
    }
    let count = |result: &str| server.metric(&["restcast_oauth_token_requests_total", result]);
    assert_eq!((count("\"ok\""), count("\"failed\""), count("\"refused\"")), (1.0, 1.0, 0.0));
    is_silent(&server, &setup);
}

#[test]
fn a_token_is_renewed_before_it_ends_and_nobody_notices() {
    let world = World::new();
    world.book().life_s = Some(4);
    let url = world.resource("/r");
    let setup = Setup::new().stream("s", &url, &world.lines(""));
    let server = setup.start();
    let mut ws = open(&server, &token_of("u1"), "/v1/streams/s");
    eventually("two renewals", || (world.asked() >= 3).then_some(()));
    world.book().value = 1;
    assert_eq!(ws.next_of("patch")["patch"][0]["value"], 1);
    let refused = world.answers(401);
    let asked = world.book().asked.clone();
    let gaps: Vec<Duration> = asked.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(gaps.iter().all(|gap| *gap >= 2_500 * MS), "after seven tenths of its life at the earliest: {gaps:?}");
    assert_eq!(refused, 0, "{gaps:?}");
    is_silent(&server, &setup);
}

#[test]
fn while_401s_last_a_token_is_asked_for_once_a_second_at_most() {
    let world = World::new();
    let mut setup = Setup::new();
    for n in 0..10 {
        let url = world.resource(&format!("/r/{n}"));
        setup = setup.stream(&format!("s{n}"), &url, &world.lines("keep_warm = true\n"));
    }
    let server = setup.start();
    let mut ws = open(&server, &token_of("u1"), "/v1/streams/s0");
    ws.next_of("snapshot");
    world.book().denies = Some(401);
    let failing = status(&mut ws, "stale");
    assert_eq!(failing["code"], "UPSTREAM_AUTH");
    let before = world.asked();
    eventually("five more are asked for", || (world.asked() >= before + 5).then_some(()));
    let gaps: Vec<Duration> = world.book().asked.windows(2).map(|pair| pair[1] - pair[0]).collect();
    // They began a second apart, and may have come a little closer.
    assert!(gaps.iter().all(|gap| *gap >= 700 * MS), "{gaps:?}");
    world.book().denies = None;
    status(&mut ws, "live");
    world.book().value = 7;
    assert_eq!(ws.next_of("patch")["patch"][0]["value"], 7);
    is_silent(&server, &setup);
}

#[test]
fn a_token_that_was_revoked_is_replaced_within_the_poll() {
    let world = World::new();
    let url = world.resource("/r");
    let setup = Setup::new().stream("s", &url, &world.lines(""));
    let server = setup.start();
    let mut ws = open(&server, &token_of("u1"), "/v1/streams/s");
    ws.next_of("snapshot");
    world.token_is_old();
    {
        let mut book = world.book();
        book.good.clear();
        book.value = 1;
    }
    // The poll that is refused asks once more: no status tells of it.
    let next = ws.next();
    assert_eq!((next["type"].clone(), next["patch"][0]["value"].clone()), (json!("patch"), json!(1)));
    assert_eq!((world.answers(401), world.asked()), (1, 2));
    is_silent(&server, &setup);
}

#[test]
fn a_403_is_no_reason_for_another_token() {
    let world = World::new();
    let url = world.resource("/r");
    world.book().denies = Some(403);
    let server = Setup::new().stream("s", &url, &world.lines("")).start();
    let mut ws = open(&server, &token_of("u1"), "/v1/streams/s");
    assert_eq!(status(&mut ws, "failing")["code"], "UPSTREAM_AUTH");
    world.token_is_old();
    world.answers_more(403, 5);
    assert_eq!(world.asked(), 1);
    world.book().denies = None;
    ws.next_of("snapshot");
    assert_eq!(world.asked(), 1);
}

#[test]
fn a_token_that_is_good_is_kept_while_none_is_given() {
    let world = World::new();
    world.book().life_s = Some(6);
    let url = world.resource("/r");
    let setup = Setup::new().stream("s", &url, &world.lines(""));
    let server = setup.start();
    let mut ws = open(&server, &token_of("u1"), "/v1/streams/s");
    ws.next_of("snapshot");
    {
        let mut book = world.book();
        book.life_s = Some(3600);
        book.down = Some(500);
    }
    eventually("a renewal fails", || (world.asked() >= 2).then_some(()));
    world.book().value = 1;
    let next = ws.next();
    assert_eq!(next["type"], "patch", "polls go on with the old one: {next}");
    let stale = status(&mut ws, "stale");
    assert_eq!(stale["code"], "UPSTREAM_AUTH", "until it ends");
    let (begun, ended) = (world.book().asked[0], Instant::now());
    assert!(ended - begun >= 5_500 * MS, "{:?}", ended - begun);
    world.book().down = None;
    status(&mut ws, "live");
    world.book().value = 2;
    assert_eq!(ws.next_of("patch")["patch"][0]["value"], 2);
    assert_eq!(world.answers(401), 0, "a token that has ended is not shown");
    server.wait_for_log("The token endpoint gives tokens again.", 1);
    is_silent(&server, &setup);
}

#[test]
fn whatever_a_token_endpoint_does_the_stream_stays_and_recovers() {
    let world = World::new();
    let url = world.resource("/r");
    let json = |text: &str| Reply::json(text.to_owned());
    let half = b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{\"access_token\":\"hunter".to_vec();
    let faults = [
        ("500", Reply::body("text/html", "<p>hunter").with_status(500)),
        ("429", Reply::status(429).header("Retry-After", "4")),
        ("503", Reply::status(503).header("Retry-After", "4")),
        ("client", json("{\"error\":\"invalid_client\"}").with_status(401)),
        ("grant", json("{\"error\":\"invalid_grant\",\"error_description\":\"hunter\"}").with_status(400)),
        ("garbage", Reply::body("text/html", "<html>hunter</html>")),
        ("mac", json("{\"access_token\":\"hunter\",\"token_type\":\"mac\"}")),
        ("twice", json("{\"access_token\":\"hunter\",\"access_token\":\"x\",\"token_type\":\"bearer\"}")),
        ("lines", json("{\"access_token\":\"hunter\\r\\nX-A: b\",\"token_type\":\"bearer\"}")),
        ("large", json(&format!("{{\"access_token\":\"hunter{}\"}}", "x".repeat(100_000)))),
        ("redirect", Reply::status(302).header("Location", "/token")),
        ("half", Reply::steps(vec![Step::Send(half.clone()), Step::Reset])),
        ("open", Reply::steps(vec![Step::Send(half), Step::Stall])),
        ("silent", Reply::steps(vec![Step::Stall])),
    ];
    let mut setup = Setup::new();
    for (name, fault) in &faults {
        let endpoint = format!("/token/{name}");
        world.endpoint(&endpoint);
        world.idp.once(&endpoint, fault.clone());
        setup = setup.stream(name, &url, &world.lines_at(&endpoint, ""));
    }
    let server = setup.start();
    let token = token_of("u1");
    let mut all: Vec<(&str, Ws)> =
        faults.iter().map(|(name, _)| (*name, open(&server, &token, &format!("/v1/streams/{name}")))).collect();
    for (name, ws) in &mut all {
        let failing = ws.next_of("stream_status");
        assert_eq!((&failing["state"], &failing["code"]), (&json!("failing"), &json!("UPSTREAM_AUTH")), "{name}");
        assert_eq!(ws.next_of("snapshot")["data"], value(0), "{name}");
    }
    let requests = world.idp.requests();
    for (name, _) in &faults {
        let target = format!("/token/{name}");
        let at: Vec<Instant> = requests.iter().filter(|seen| seen.target == target).map(|seen| seen.at).collect();
        assert_eq!(at.len(), 2, "{name}: once more, and no oftener");
        let least = if matches!(*name, "429" | "503") { 4_000 * MS } else { 450 * MS };
        assert!(at[1] - at[0] >= least, "{name}: {:?}", at[1] - at[0]);
    }
    assert_eq!(world.answers(401), 0);
    let count = |result: &str| server.metric(&["restcast_oauth_token_requests_total", result]);
    assert_eq!((count("\"ok\""), count("\"refused\"")), (14.0, 2.0));
    is_silent(&server, &setup);
}

#[test]
fn a_rotated_refresh_token_survives_the_process() {
    let world = World::new();
    let url = world.resource("/r");
    world.book().refresh.insert(format!("{MARK}-rt-of-file"));
    let configured = world.folder.put("refresh", &format!("{MARK}-rt-of-file\n"));
    let grant = format!("{}grant = \"refresh_token\"\nrefresh_token = \"file:{configured}\"\n", world.lines(""));
    let state = world.folder.state();
    let setup = Setup::new().server(&world.folder.state_line()).stream("s", &url, &grant);
    let polled = |server: &Server| server.get("/v1/streams/s", &[bearer(&token_of("u1"))]).status;
    let given = |world: &World| world.book().given;
    for round in 1..=3 {
        let mut server = setup.start();
        assert_eq!((polled(&server), given(&world)), (200, round), "the one of the round before is taken");
        let kept = fs::read_to_string(&state).expect("the state file");
        assert!(kept.contains(&format!("{MARK}-rt-{round}")), "on the disk before it is used");
        assert_eq!(fs::metadata(&state).expect("it is there").permissions().mode() & 0o777, 0o600);
        is_silent(&server, &setup);
        server.signal(Signal::KILL);
        server.wait();
    }
    // Whoever runs the provider takes the chain back: the one in the file is good again, the kept one is not.
    {
        let mut book = world.book();
        book.refresh.clear();
        book.refresh.insert(format!("{MARK}-rt-of-file"));
    }
    let server = setup.start();
    assert_eq!(polled(&server), 200);
    server.wait_for_log("The token endpoint refuses a refresh token; the other one is tried.", 1);
    drop(server);
    // The operator puts in another one: it is used at once, although the kept one is good.
    {
        let mut book = world.book();
        book.refresh.insert(format!("{MARK}-rt-second"));
    }
    world.folder.put("refresh", &format!("{MARK}-rt-second\n"));
    let server = setup.start();
    assert_eq!(polled(&server), 200);
    assert!(!world.book().refresh.contains(&format!("{MARK}-rt-second")), "it was used");
    is_silent(&server, &setup);
}

/// A stream whose credential begins with a refresh token; where it stands, and the state file.
fn rotating(world: &World) -> (Setup, PathBuf) {
    let url = world.resource("/r");
    world.book().refresh.insert(format!("{MARK}-rt-of-file"));
    let configured = world.folder.put("refresh", &format!("{MARK}-rt-of-file\n"));
    let grant = format!("{}grant = \"refresh_token\"\nrefresh_token = \"file:{configured}\"\n", world.lines(""));
    (Setup::new().server(&world.folder.state_line()).stream("s", &url, &grant), world.folder.state())
}

fn polled(server: &Server) -> u16 {
    server.get("/v1/streams/s", &[bearer(&token_of("u1"))]).status
}

/// Whether the state file has that refresh token.
fn is_kept(state: &Path, no: u32) -> bool {
    fs::read_to_string(state).is_ok_and(|text| text.contains(&format!("\"{MARK}-rt-{no}\"")))
}

const UNWRITTEN: &str = "A refresh token that was given anew is in memory alone";

#[test]
fn the_configured_refresh_token_is_asked_with_a_second_after_the_kept_one_was_refused() {
    let world = World::new();
    let (setup, state) = rotating(&world);
    let server = setup.start();
    assert_eq!(polled(&server), 200);
    assert!(is_kept(&state, 1));
    drop(server);
    {
        let mut book = world.book();
        book.refresh = BTreeSet::from([format!("{MARK}-rt-of-file")]);
        book.asked.clear();
        // What comes is refused as well: whoever is refused would have another one at once.
        book.denies = Some(401);
    }
    let server = setup.start();
    assert_ne!(polled(&server), 200);
    eventually("four tokens were asked for", || (world.book().asked.len() >= 4).then_some(()));
    let book = world.book();
    assert_eq!(book.refused, 1, "the kept one");
    let gaps: Vec<Duration> = book.asked.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(gaps[0] >= SECOND, "{gaps:?}");
    // The others began a second apart, and may have come a little closer.
    assert!(gaps.iter().all(|gap| *gap >= 700 * MS), "{gaps:?}");
    drop(book);
    is_silent(&server, &setup);
}

#[test]
fn a_refresh_token_that_cannot_be_written_is_said_and_tried_again_until_it_is() {
    let world = World::new();
    let (setup, state) = rotating(&world);
    // What stands where the file is written before it is put in its place.
    let obstacle = state.with_extension("state.new");
    fs::create_dir(&obstacle).expect("a folder");
    let server = setup.start();
    assert_eq!(polled(&server), 200, "what came with it is used all the same");
    let line = server.wait_for_log(UNWRITTEN, 2);
    assert!(line.contains(" error "), "{line}");
    assert!(!is_kept(&state, 1));
    fs::remove_dir(&obstacle).expect("it is empty");
    eventually("it is written", || is_kept(&state, 1).then_some(()));
    server.wait_for_log("are in the state file now", 1);
    assert_eq!((polled(&server), world.book().given), (200, 1), "nothing was asked for meanwhile");
    is_silent(&server, &setup);
}

#[test]
fn what_could_not_be_written_is_written_when_the_process_ends() {
    let world = World::new();
    let (setup, state) = rotating(&world);
    let obstacle = state.with_extension("state.new");
    fs::create_dir(&obstacle).expect("a folder");
    let mut server = setup.start();
    assert_eq!(polled(&server), 200);
    // The next try is four seconds away.
    server.wait_for_log(UNWRITTEN, 3);
    fs::remove_dir(&obstacle).expect("it is empty");
    server.signal(Signal::TERM);
    assert!(server.wait().success());
    assert!(is_kept(&state, 1));
    // And where that cannot be done it is said.
    let server = setup.start();
    assert_eq!((polled(&server), world.book().refused), (200, 0), "the one that was kept is good");
    drop(server);
    fs::create_dir(&obstacle).expect("a folder");
    let mut server = setup.start();
    assert_eq!(polled(&server), 200);
    server.wait_for_log(UNWRITTEN, 1);
    server.signal(Signal::TERM);
    assert!(server.wait().success());
    server.wait_for_log("it is lost", 1);
    assert!(!server.log_text().contains(MARK));
}

#[test]
fn an_answer_that_is_under_way_when_the_process_is_told_to_end_is_kept() {
    let world = World::new();
    let (setup, state) = rotating(&world);
    world.book().takes = 1500 * MS;
    let mut server = setup.start();
    std::thread::scope(|scope| {
        scope.spawn(|| polled(&server));
        eventually("a token is asked for", || (world.book().given == 1).then_some(()));
        server.signal(Signal::TERM);
    });
    assert!(server.wait().success());
    assert!(is_kept(&state, 1), "the endpoint has taken the old one back");
}

#[test]
fn a_refresh_token_is_used_once_by_streams_that_share_it_and_differ_in_the_rest() {
    let world = World::new();
    {
        let mut book = world.book();
        (book.life_s, book.takes) = (Some(3), 300 * MS);
        book.refresh.insert(format!("{MARK}-rt-of-file"));
    }
    let url = world.resource("/r");
    let configured = world.folder.put("refresh", &format!("{MARK}-rt-of-file\n"));
    let grant = format!("grant = \"refresh_token\"\nrefresh_token = \"file:{configured}\"\n");
    let (cert, key) = Authority::new().identity(&["a"]).pem();
    let (cert, key) = (world.folder.put("a.pem", &cert), world.folder.put("a.key", &key));
    let shown = format!("keep_warm = true\nclient_cert = {cert:?}\nclient_key = {key:?}\n");
    let plain = world.lines("keep_warm = true\n");
    let setup = Setup::new()
        .cores(2)
        .stream("plain", &url, &format!("{plain}{grant}"))
        .stream("scoped", &url, &format!("{plain}{grant}scope = \"leads\"\n"))
        .stream("shows", &url, &format!("{}{grant}", world.lines(&shown)));
    let server = setup.start();
    // Three tokens, each got three times; of the refresh tokens each is good for one.
    eventually("all are renewed twice", || (world.book().given >= 9).then_some(()));
    let refused = world.book().refused;
    assert_eq!((refused, world.answers(401)), (0, 0));
    for stream in ["plain", "scoped", "shows"] {
        let answer = server.get(&format!("/v1/streams/{stream}"), &[bearer(&token_of("u1"))]);
        assert_eq!((answer.status, answer.header("x-restcast-state")), (200, None), "{stream}");
    }
    is_silent(&server, &setup);
}

#[test]
fn an_upstream_that_asks_for_a_certificate_is_shown_the_right_one() {
    let (folder, authority, stranger) = (Folder::new("oauth"), Authority::new(), Authority::new());
    let ca = authority.write_pem(&folder).display().to_string();
    let upstream = Upstream::start_mtls(&authority.identity(&["127.0.0.1"]), &authority);
    for path in ["/a", "/b", "/none", "/strange"] {
        upstream.set_json(path, &value(1).to_string());
    }
    let identities = [authority.identity(&["a"]), authority.identity(&["b"]), stranger.identity(&["s"])];
    let put = |name: &str, identity: &support::Identity| {
        let (cert, key) = identity.pem();
        // The key first, so that for a moment they do not fit each other.
        let key = folder.put(&format!("{name}.key"), &key);
        format!("client_cert = {:?}\nclient_key = {key:?}\n", folder.put(&format!("{name}.pem"), &cert))
    };
    let common = format!("ca = {ca:?}\ninterval = \"100ms\"\nbackoff_max = \"200ms\"\n");
    let lines = |name: &str, identity| format!("{common}{}", put(name, identity));
    let setup = Setup::new()
        .stream("a", &upstream.url("/a"), &lines("a", &identities[0]))
        .stream("b", &upstream.url("/b"), &lines("b", &identities[1]))
        .stream("strange", &upstream.url("/strange"), &lines("s", &identities[2]))
        .stream("none", &upstream.url("/none"), &common);
    let server = setup.cores(1).start();
    let token = token_of("u1");
    let mut a = open(&server, &token, "/v1/streams/a");
    let snapshot = a.next_of("snapshot");
    open(&server, &token, "/v1/streams/b").next_of("snapshot");
    for refused in ["strange", "none"] {
        let mut ws = open(&server, &token, &format!("/v1/streams/{refused}"));
        assert_eq!(status(&mut ws, "failing")["code"], "UPSTREAM_TLS", "{refused}");
    }
    let of = |target: &str| upstream.requests().into_iter().filter(|seen| seen.target == target).collect::<Vec<_>>();
    let connections = |requests: &[RequestSeen]| requests.iter().map(|seen| seen.connection).collect::<BTreeSet<_>>();
    let (for_a, for_b) = (of("/a"), of("/b"));
    assert!(for_a.iter().all(|seen| seen.certificate.as_ref() == Some(&identities[0].der())));
    assert!(for_b.iter().all(|seen| seen.certificate.as_ref() == Some(&identities[1].der())));
    assert!(connections(&for_a).is_disjoint(&connections(&for_b)), "no connection is shared");
    assert!(of("/none").is_empty() && of("/strange").is_empty());
    // A new certificate in the same files.
    let renewed = authority.identity(&["a"]);
    put("a", &renewed);
    eventually("it is shown", || {
        of("/a").iter().any(|seen| seen.certificate.as_ref() == Some(&renewed.der())).then_some(())
    });
    upstream.set_json("/a", &value(2).to_string());
    let next = a.next();
    let place = (&next["epoch"], &next["seq"]);
    assert_eq!(place, (&snapshot["epoch"], &json!(2)), "the watcher notices nothing but the value: {next}");
    assert!(!server.log_text().contains("PRIVATE KEY"));
}

#[test]
fn secrets_in_files_are_read_again_when_they_change_and_nobody_notices() {
    let (folder, upstream) = (Folder::new("oauth"), Upstream::start());
    let (token_file, header_file) = (folder.put("token", "hunter-1\n"), folder.put("header", "hunter-a\n"));
    let wanted = Arc::new(Mutex::new(("hunter-1", "hunter-a", 1)));
    let says = Arc::clone(&wanted);
    upstream.judge("/r", move |seen| {
        let (token, key, of) = *says.lock().expect("whole");
        let bearer = format!("Bearer {token}");
        let good = seen.header("authorization") == Some(&bearer) && seen.header("x-key") == Some(key);
        if good { Reply::json(value(of).to_string()) } else { Reply::status(401) }
    });
    let lines = format!(
        "interval = \"100ms\"\nbackoff_max = \"200ms\"\nheaders = {{ X-Key = \"file:{header_file}\" }}\n\
         [stream.auth]\nkind = \"bearer\"\ntoken = \"file:{token_file}\"\n"
    );
    let setup = Setup::new().stream("s", &upstream.url("/r"), &lines);
    let server = setup.start();
    let mut ws = open(&server, &token_of("u1"), "/v1/streams/s");
    let snapshot = ws.next_of("snapshot");
    *wanted.lock().expect("whole") = ("hunter-2", "hunter-b", 2);
    assert_eq!(status(&mut ws, "stale")["code"], "UPSTREAM_AUTH");
    folder.put("header", "hunter-b\n");
    folder.put("token", "hunter-2\n");
    let patch = ws.next_of("patch");
    assert_eq!((&patch["epoch"], &patch["seq"]), (&snapshot["epoch"], &json!(2)), "the same sequence");
    server.wait_for_log("The secret of an upstream was read again.", 2);
    // One that cannot be a token is not taken.
    folder.put("token", "two words\n");
    server.wait_for_log("The secret of an upstream cannot be used; the old one stays in force.", 1);
    wanted.lock().expect("whole").2 = 3;
    assert_eq!(ws.next_of("patch")["patch"][0]["value"], 3);
    // SIGHUP, too, changes nothing but the value.
    folder.put("token", "hunter-3\n");
    wanted.lock().expect("whole").0 = "hunter-3";
    server.reload(&setup);
    wanted.lock().expect("whole").2 = 4;
    let patch = ws.next_of("patch");
    assert_eq!((&patch["epoch"], &patch["seq"]), (&snapshot["epoch"], &json!(4)));
    is_silent(&server, &setup);
}

#[test]
fn each_kind_of_credential_arrives_as_it_should() {
    let upstream = Upstream::start();
    for path in ["/bearer", "/basic", "/header", "/query"] {
        upstream.set_json(path, "1");
    }
    upstream.set("/act", Reply::json("{}"));
    let mut setup = Setup::new().env("KEY", "hunter key&1");
    for (kind, auth) in [
        ("bearer", "token = \"hunter-token\""),
        ("basic", "username = \"ada\"\npassword = \"hunter:pw\""),
        ("header", "name = \"X-Api-Key\"\nvalue = \"env:KEY\""),
        ("query", "name = \"key\"\nvalue = \"env:KEY\""),
    ] {
        let lines = format!("interval = \"100ms\"\n[stream.auth]\nkind = {kind:?}\n{auth}\n");
        setup = setup.stream(kind, &upstream.url(&format!("/{kind}?a=1")), &lines);
    }
    let lines = "[action.auth]\nkind = \"query\"\nname = \"key\"\nvalue = \"env:KEY\"\n";
    let setup = setup.action("act", &upstream.url("/act"), lines);
    let server = setup.start();
    let token = token_of("u1");
    for kind in ["bearer", "basic", "header", "query"] {
        let answer = server.get(&format!("/v1/streams/{kind}"), &[bearer(&token)]);
        assert_eq!((answer.status, answer.json()), (200, json!(1)), "{kind}");
    }
    let mut ws = open(&server, &token, "/v1/streams/bearer");
    ws.send(json!({ "type": "act", "id": 1 }));
    assert_eq!(ws.next_of("action_result")["status"], 200);
    let seen = |path: &str| {
        let requests = upstream.requests();
        requests.into_iter().find(|seen| seen.target.starts_with(path)).expect("it was asked for")
    };
    assert_eq!(seen("/bearer").header("authorization"), Some("Bearer hunter-token"));
    let basic = format!("Basic {}", STANDARD.encode("ada:hunter:pw"));
    assert_eq!(seen("/basic").header("authorization"), Some(basic.as_str()));
    assert_eq!(seen("/header").header("x-api-key"), Some("hunter key&1"));
    assert_eq!(seen("/query").target, "/query?a=1&key=hunter%20key%261");
    assert_eq!(seen("/act").target, "/act?key=hunter%20key%261");
    is_silent(&server, &setup);
}
