//! The cookbook: each configuration of `tests/cookbook/` as it is shipped, run by the built server against a local imitation
//! of its API. What differs here is where the API is (the origins of its URLs), who vouches for it (`SSL_CERT_FILE`), and the
//! two ports.
#![cfg(feature = "runtime")]
#![allow(clippy::disallowed_methods, reason = "tests measure how long things take")]

#[path = "imitations/mod.rs"]
mod imitations;
mod support;
#[path = "support/watcher.rs"]
mod watcher;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ring::hmac;
use rustix::process::Signal;
use serde_json::{Value, json};

use imitations::Api;
use imitations::crm::{self, Crm, Provider, Whose};
use imitations::github::{self, GitHub};
use imitations::leads::{self, Leads};
use imitations::market::{self, Market};
use imitations::shop::{self, Shop, product};
use support::server::{Server, Setup, bearer, eventually, mint_by, now_s, now_us, run};
use support::{Authority, Folder, Reply};
use watcher::{Over, Watcher, canonical, requests_for};

const JWT_SECRET: &str = "jwt-hunter2-0123456789-0123456789-0123456789";
const HOOK_SECRET: &str = "hook-hunter2-0123456789-0123456789";
/// Stands in every secret here, so that it can be looked for.
const MARK: &str = "hunter2";
const SECOND: Duration = Duration::from_secs(1);

fn cookbook() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cookbook")
}

/// A recipe, its authority, and what its environment has.
struct Kitchen {
    folder: Folder,
    authority: Authority,
    name: &'static str,
    environment: Vec<(&'static str, &'static str)>,
}

impl Kitchen {
    fn of(name: &'static str, environment: &[(&'static str, &'static str)]) -> Kitchen {
        Kitchen {
            folder: Folder::new("cookbook"),
            authority: Authority::new(),
            name,
            environment: environment.to_vec(),
        }
    }

    fn shipped(&self) -> String {
        fs::read_to_string(cookbook().join(self.name)).expect("a recipe")
    }

    fn with(&self, text: &str) -> Setup {
        self.environment.iter().fold(Setup::of_file(text), |setup, (name, value)| setup.env(name, value))
    }

    /// The file as it is shipped, checked; with these origins in the place of its own.
    fn setup(&self, origins: &[(&str, String)]) -> Setup {
        let shipped = self.shipped();
        let (status, out, err) = run(&["check"], &self.with(&shipped));
        assert!(status.success() && err.is_empty(), "{err}");
        assert!(!out.contains(MARK), "a secret is shown: {out}");
        let swapped = origins.iter().fold(shipped.clone(), |text, (theirs, ours)| {
            assert!(text.contains(&format!("{theirs}/")), "{theirs} is in the file");
            text.replace(theirs, ours)
        });
        let ports = ["listen = \"127.0.0.1:8080\"", "listen = \"127.0.0.1:9080\""];
        let text = ports.iter().fold(swapped, |text, port| {
            assert_eq!(text.matches(port).count(), 1);
            text.replace(port, "listen = \"127.0.0.1:0\"")
        });
        let differs =
            |(ours, theirs): (&str, &str)| ours != theirs && !theirs.contains("https://") && !theirs.contains("listen");
        assert!(!text.lines().zip(shipped.lines()).any(differs), "nothing else is another");
        let ca = self.authority.write_pem(&self.folder);
        self.with(&text).env("SSL_CERT_FILE", ca.to_str().expect("UTF-8"))
    }
}

/// Nothing that the server says holds a secret.
fn is_silent(server: &Server) {
    let told = [server.log_text(), server.metrics()].concat();
    assert_eq!(told.lines().find(|line| line.contains(MARK)), None);
    assert_eq!(server.metric(&["restcast_panics_total"]), 0.0);
}

fn token(claims: Value) -> (&'static str, String) {
    let mut all = json!({ "sub": "ada", "exp": now_s() + 600 });
    all.as_object_mut().expect("an object").extend(claims.as_object().expect("an object").clone());
    bearer(&mint_by(json!({ "alg": "HS256" }), JWT_SECRET, all))
}

/// Who watches one stream.
struct Guest {
    watcher: Watcher,
    stream: String,
    /// Whether the last status said that it is live.
    live: bool,
}

impl Guest {
    fn open(server: &Server, over: Over, stream: &str, headers: &[(&str, String)]) -> Guest {
        let watcher = Watcher::open(server, over, &format!("/v1/streams/{stream}"), headers);
        Guest { watcher, stream: stream.to_owned(), live: true }
    }

    /// Reads one frame; a status is returned.
    fn read(&mut self) -> Option<Value> {
        let frame = self.watcher.next();
        if frame.kind() != "stream_status" {
            self.watcher.follow(&frame);
            return None;
        }
        let status = frame.json();
        self.live = status["state"] == "live";
        Some(status)
    }

    /// Reads on until it holds this value and is told of no failure; the statuses on the way.
    fn until(&mut self, value: &Value) -> Vec<Value> {
        let (wanted, begun, mut told) = (canonical(&value.to_string()), Instant::now(), Vec::new());
        while !(self.live && self.holds().is_some_and(|held| held == wanted)) {
            told.extend(self.read());
            assert!(begun.elapsed() < 60 * SECOND, "{} never is {wanted}, but {:?}", self.stream, self.holds());
        }
        told
    }

    /// The same, with no failure told on the way.
    fn undisturbed_until(&mut self, value: &Value) {
        let told = self.until(value);
        assert_eq!(told, Vec::<Value>::new(), "{}", self.stream);
    }

    /// Reads on until it is told of a failure.
    fn failure(&mut self) -> Value {
        loop {
            if let Some(status) = self.read().filter(|_| !self.live) {
                return status;
            }
        }
    }

    fn holds(&self) -> Option<String> {
        self.watcher.held.contains_key(&self.stream).then(|| self.watcher.value(&self.stream))
    }

    fn seq(&self) -> u64 {
        self.watcher.holding(&self.stream).seq
    }

    fn epoch(&self) -> String {
        self.watcher.holding(&self.stream).epoch.clone()
    }
}

/// From head to head, the waits between the requests for `target`.
fn waits(upstream: &support::Upstream, target: &str) -> Vec<Duration> {
    let times: Vec<Instant> = requests_for(upstream, target).iter().map(|seen| seen.at).collect();
    times.windows(2).map(|pair| pair[1] - pair[0]).collect()
}

/// No more polls of `target` since `begun` than one an interval, and those of its beginning.
fn keeps_its_interval(upstream: &support::Upstream, target: &str, interval: Duration, begun: Instant) {
    let count = requests_for(upstream, target).len();
    let most = begun.elapsed().as_secs_f64() / interval.as_secs_f64() + 2.0;
    assert!(count as f64 <= most, "{count} requests for {target} in {:?}", begun.elapsed());
}

#[test]
fn the_readme_lists_every_recipe_and_each_is_tried_here() {
    let files: BTreeSet<String> = fs::read_dir(cookbook())
        .expect("the cookbook")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    assert_eq!(files.len(), 5, "{files:?}");
    let readme = fs::read_to_string(cookbook().join("../../README.md")).expect("README.md");
    let section = readme.split("\n## Cookbook\n").nth(1).expect("a section").split("\n## ").next().expect("its end");
    let listed: BTreeSet<String> = section
        .lines()
        .filter_map(|line| line.split("](tests/cookbook/").nth(1)?.split(')').next())
        .map(str::to_owned)
        .collect();
    assert_eq!(listed, files);
    let tests = include_str!("cookbook.rs");
    for file in files {
        assert!(tests.contains(&format!("Kitchen::of(\"{file}\"")), "{file} is tried");
    }
}

#[test]
fn github_pays_for_changes_and_not_for_polls() {
    let environment = [("JWT_SECRET", JWT_SECRET), ("GITHUB_TOKEN", github::TOKEN), ("HOOK_SECRET", HOOK_SECRET)];
    let kitchen = Kitchen::of("github.toml", &environment);
    let api = Api::open(&kitchen.authority, GitHub::new());
    let server = kitchen.setup(&[("https://api.github.com", api.upstream.url(""))]).start();
    let (who, begun) = ([token(json!({}))], Instant::now());
    let website = "/repos/acme/website/pulls?state=open&per_page=100";
    let mut ws = Guest::open(&server, Over::Ws, "pulls?repo=website", &who);
    let mut sse = Guest::open(&server, Over::Sse, "pulls?repo=website", &who);
    let mut app = Guest::open(&server, Over::Ws, "pulls?repo=app", &who);
    let shown = |repo: &str| api.rules().shown(repo);
    ws.undisturbed_until(&shown("website"));
    sse.undisturbed_until(&shown("website"));
    app.undisturbed_until(&shown("app"));
    eventually("polls that cost nothing", || (api.rules().answered(304) >= 3).then_some(()));
    let paid = || {
        let rules = api.rules();
        (rules.answered(200), rules.window.used)
    };
    assert_eq!(paid(), (2, 2), "one of each list, and the rest is free");
    assert_eq!(server.get("/v1/streams/pulls?repo=linux", &who).status, 400, "it is not for callers to widen the list");

    // What a page does not show costs one request and makes no event; what it shows is an event for all who watch.
    let (seq, before) = (ws.seq(), paid());
    api.rules().change("website", 3, "body", "another".into());
    eventually("it is fetched", || (paid() > before).then_some(()));
    api.rules().change("website", 3, "draft", false.into());
    ws.undisturbed_until(&shown("website"));
    sse.undisturbed_until(&shown("website"));
    assert_eq!((ws.seq(), sse.seq()), (seq + 1, seq + 1));

    // Pages: a webhook brings a change of the last one at once.
    let mut issues = Guest::open(&server, Over::Sse, "issues?repo=website", &who);
    let all_issues = || api.rules().issues();
    issues.undisturbed_until(&all_issues());
    let pages = || api.upstream.requests().into_iter().filter(|seen| seen.target.contains("/issues?")).count();
    assert_eq!(pages(), 3);
    api.rules().rename(250, "Renamed");
    let body = "{\"action\":\"edited\"}";
    let stamp = format!("{}.{body}", now_s());
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, HOOK_SECRET.as_bytes()), stamp.as_bytes());
    let hex: String = tag.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    let signature = format!("t={},v1={hex}", stamp.split('.').next().expect("a time"));
    let hooked = server.request("POST", "/v1/hooks/issues", &[("X-Restcast-Signature", signature)], body);
    assert_eq!(hooked.status, 202);
    issues.undisturbed_until(&all_issues());
    assert_eq!(pages(), 6, "three pages, twice");

    // Somebody else spends the budget. The 304 that tells of it is free, and the last until the reset.
    api.rules().window.again(5 * SECOND, 5_000);
    let free = api.rules().answered(304);
    eventually("it is told", || (api.rules().answered(304) > free).then_some(()));
    api.rules().change("website", 4, "draft", false.into());
    api.rules().change("app", 4, "draft", false.into());
    ws.undisturbed_until(&shown("website"));
    sse.undisturbed_until(&shown("website"));
    app.undisturbed_until(&shown("app"));

    // Once more, and nobody was told before they asked: by a 403, which is no word on the token.
    api.rules().window.again(5 * SECOND, 5_001);
    eventually("a 403", || (api.rules().answered(403) > 0).then_some(()));
    api.rules().change("website", 6, "draft", false.into());
    api.rules().change("app", 6, "draft", false.into());
    let told = [ws.until(&shown("website")), app.until(&shown("app"))].concat();
    sse.until(&shown("website"));
    let failures: Vec<&Value> = told.iter().filter(|status| status["state"] != "live").collect();
    assert!((1..=2).contains(&failures.len()), "each list asked once at most before it knew: {failures:?}");
    assert!(failures.iter().all(|status| status["code"] == "UPSTREAM_RATE_LIMITED"), "{failures:?}");

    // A limit of the moment, which GitHub tells by a 403 with a time: it is kept to the second.
    let pause = Reply::json("{\"message\":\"You have exceeded a secondary rate limit\"}").with_status(403);
    api.upstream.once("/repos/acme/website/pulls", pause.header("Retry-After", "4"));
    let failure = ws.failure();
    assert_eq!((&failure["state"], &failure["code"]), (&json!("stale"), &json!("UPSTREAM_RATE_LIMITED")));
    ws.until(&shown("website"));
    assert!(waits(&api.upstream, website).iter().any(|wait| *wait >= 3_950 * SECOND / 1_000));

    // A token that is taken back for a while is told, and closes nobody.
    api.upstream.once("/repos/acme/website/pulls", Reply::status(401));
    assert_eq!(ws.failure()["code"], "UPSTREAM_AUTH");
    api.rules().change("website", 5, "draft", false.into());
    ws.until(&shown("website"));
    let codes: Vec<Value> = sse.until(&shown("website")).iter().map(|status| status["code"].clone()).collect();
    assert_eq!(codes, [json!("UPSTREAM_RATE_LIMITED"), Value::Null, json!("UPSTREAM_AUTH"), Value::Null]);
    keeps_its_interval(&api.upstream, website, 2 * SECOND, begun);
    api.is_content();
    is_silent(&server);
}

#[test]
fn a_crm_is_asked_with_tokens_that_are_renewed_rotated_and_kept() {
    let secrets = [("CRM_CLIENT_SECRET", crm::CLIENT_SECRET), ("CRM_REFRESH_TOKEN", crm::REFRESH_TOKEN)];
    let kitchen = Kitchen::of("crm.toml", &[&[("JWT_SECRET", JWT_SECRET)][..], &secrets].concat());
    let book = crm::book();
    let api = Api::open(&kitchen.authority, Crm { book: Arc::clone(&book), breaches: Vec::new() });
    let login = Api::open(&kitchen.authority, Provider { book: Arc::clone(&book), breaches: Vec::new() });
    let book = || book.lock().expect("no panic");
    let setup = kitchen.setup(&[
        ("https://api.crm.example.com", api.upstream.url("")),
        ("https://login.crm.example.com", login.upstream.url("")),
    ]);
    let mut server = setup.start_in(&kitchen.folder);
    let (sales, support) = ([token(json!({ "role": "sales" }))], [token(json!({ "role": "support" }))]);
    let mut contacts = Guest::open(&server, Over::Ws, "contacts", &support);
    let mut companies = Guest::open(&server, Over::Sse, "companies", &sales);
    let mut deals = Guest::open(&server, Over::Ws, "deals", &sales);
    let list = |name: &str| book().list(name);
    contacts.undisturbed_until(&list("contacts"));
    companies.undisturbed_until(&list("companies"));
    deals.undisturbed_until(&list("deals"));
    assert_eq!(server.get("/v1/streams/deals", &support).status, 403, "they are of sales");
    let given = || {
        let book = book();
        (book.given(Whose::Client), book.given(Whose::Person))
    };
    assert_eq!(given(), (1, 1), "one token for two streams");

    // Two renewals, of which nobody hears.
    eventually("renewals", || (given().0.min(given().1) >= 3).then_some(()));
    for name in ["contacts", "companies", "deals"] {
        book().lists.get_mut(name).expect("a list")[0]["name"] = "Ada".into();
    }
    contacts.undisturbed_until(&list("contacts"));
    companies.undisturbed_until(&list("companies"));
    deals.undisturbed_until(&list("deals"));
    assert_eq!(book().unauthorized, 0, "renewed before they end");

    // Taken back: each is replaced within the poll that learns of it.
    let is_old = || {
        let book = book();
        book.age(Whose::Client).min(book.age(Whose::Person)) > 1_200 * SECOND / 1_000
    };
    eventually("they are no newer than a token may be asked for", || is_old().then_some(()));
    {
        let mut book = book();
        book.revoke();
        book.lists.get_mut("contacts").expect("a list")[1]["name"] = "Grace".into();
        book.lists.get_mut("deals").expect("a list")[1]["name"] = "Grace".into();
    }
    contacts.undisturbed_until(&list("contacts"));
    deals.undisturbed_until(&list("deals"));
    let refused = book().unauthorized;
    assert!((2..=3).contains(&refused), "one 401 for each stream at most, not {refused}");

    // The way back, and everyone sees it at once.
    let act = json!({ "type": "deal_stage", "deal": 2, "stage": "won", "id": 1 }).to_string();
    let mut actor = server.ws("/v1/streams/deals", &sales);
    actor.next_of("snapshot");
    actor.send(serde_json::from_str(&act).expect("JSON"));
    let done = eventually("it is done", || Some(actor.next()).filter(|frame| frame["type"] == "action_result"));
    assert_eq!((&done["status"], &done["body"]["stage"]), (&json!(200), &json!("won")));
    deals.undisturbed_until(&list("deals"));
    actor.send(json!({ "type": "deal_stage", "deal": 2, "stage": "stolen", "id": 2 }));
    let refused = eventually("an answer", || Some(actor.next()).filter(|frame| frame["id"] == 2));
    assert_eq!(refused["code"], "BAD_MESSAGE");

    // The provider is away for longer than a token lives.
    book().down = true;
    assert_eq!(deals.failure()["code"], "UPSTREAM_AUTH");
    assert_eq!(contacts.failure()["code"], "UPSTREAM_AUTH");
    book().lists.get_mut("deals").expect("a list")[2]["name"] = "Edsger".into();
    book().down = false;
    deals.until(&list("deals"));
    contacts.until(&list("contacts"));
    is_silent(&server);

    // A process that is killed leaves the last refresh token behind; the first of them is good no more.
    server.signal(Signal::KILL);
    server.wait();
    let before = given().1;
    book().forget();
    let server = setup.start_in(&kitchen.folder);
    book().lists.get_mut("deals").expect("a list")[3]["name"] = "Barbara".into();
    let mut deals = Guest::open(&server, Over::Sse, "deals", &sales);
    deals.undisturbed_until(&list("deals"));
    assert_eq!(given().1, before + 1);
    api.is_content();
    login.is_content();
    is_silent(&server);
}

#[test]
fn a_catalogue_in_pages_is_whole_or_as_it_was() {
    let kitchen = Kitchen::of("catalogue.toml", &[("SHOP_KEY", shop::KEY)]);
    let api = Api::open(&kitchen.authority, Shop::new(120));
    let server = kitchen.setup(&[("https://api.shop.example.com", api.upstream.url(""))]).start();
    let shown = || api.rules().shown();
    let mut ws = Guest::open(&server, Over::Ws, "products", &[]);
    let mut sse = Guest::open(&server, Over::Sse, "products", &[]);
    ws.undisturbed_until(&shown());
    sse.undisturbed_until(&shown());
    let answer = server.get("/v1/streams/products", &[]);
    assert_eq!((answer.status, answer.json()), (200, shown()));
    assert!(!answer.text().contains("cost"));
    assert_eq!((api.rules().polls, api.upstream.request_count()), (1, 3), "three pages for all of them");

    // What is not shown is no event. What is inserted on the first page moves others on to the next: a small patch.
    let (seq, polls) = (ws.seq(), api.rules().polls);
    api.rules().products[7]["cost"] = "3.50".into();
    eventually("two more polls", || (api.rules().polls >= polls + 2).then_some(()));
    api.rules().products.insert(0, product(500));
    let frame = ws.watcher.event();
    assert_eq!((frame.kind().as_str(), frame.seq()), ("patch", seq + 1));
    assert!(frame.text.len() < 400, "{}", frame.text);
    ws.undisturbed_until(&shown());
    sse.undisturbed_until(&shown());

    // A page that fails is no shorter list.
    api.rules().fails_at = Some(2);
    let failure = ws.failure();
    let told = (&failure["state"], &failure["code"], &failure["status"]);
    assert_eq!(told, (&json!("stale"), &json!("UPSTREAM_STATUS"), &json!(500)));
    let answer = server.get("/v1/streams/products", &[]);
    assert_eq!((answer.header("x-restcast-state"), answer.json()), (Some("stale"), shown()));
    api.rules().fails_at = None;
    ws.until(&shown());
    sse.until(&shown());

    // However long the list becomes, no more pages are asked for than were allowed.
    api.rules().products = (0..1_250).map(product).collect();
    let first = Value::from(shown().as_array().expect("a list")[..1_000].to_vec());
    ws.until(&first);
    sse.until(&first);
    let polls = api.rules().polls;
    eventually("one more poll begins", || (api.rules().polls > polls).then_some(()));
    assert_eq!(api.rules().pages_of_last, 20);
    api.is_content();
    is_silent(&server);
}

#[test]
fn market_data_comes_as_fast_as_the_provider_allows_and_no_faster() {
    let kitchen = Kitchen::of("market.toml", &[("JWT_SECRET", JWT_SECRET), ("MARKET_KEY", market::KEY)]);
    let api = Api::open(&kitchen.authority, Market::new());
    let server = kitchen.setup(&[("https://api.market.example.com", api.upstream.url(""))]).start();
    let (who, begun) = ([token(json!({}))], Instant::now());
    let symbols = ["BTC-EUR", "ETH-EUR", "SOL-EUR", "XRP-EUR", "ADA-EUR", "DOT-EUR"];
    let target = |symbol: &str| format!("/v1/ticker?symbol={symbol}&apikey={}", market::KEY);
    let open = |over: Over, symbol: &str| Guest::open(&server, over, &format!("ticker?symbol={symbol}"), &who);
    let mut guests: Vec<Guest> = symbols.iter().map(|symbol| open(Over::Ws, symbol)).collect();
    let mut second = open(Over::Sse, "BTC-EUR");
    guests.iter_mut().for_each(|guest| assert_eq!(guest.read(), None, "a value"));
    assert_eq!(second.read(), None, "a value");
    assert_eq!(server.get("/v1/streams/ticker?symbol=btc", &who).status, 400);

    // Six symbols that change all the time would be asked for 24 times a second.
    api.upstream.wait_for_requests(65, 120 * SECOND);
    let took = begun.elapsed();
    assert!(took >= 10 * SECOND, "65 of 30 in 5 s take more than two windows, not {took:?}");
    assert!(took >= 57 * SECOND / 10, "8 at once and 10 a second");
    let counts = symbols.map(|symbol| requests_for(&api.upstream, &target(symbol)).len());
    assert!(counts.iter().all(|count| *count >= 3), "each gets its part: {counts:?}");

    // A market that stands still is asked ever less often, and the clock in its answers is no event.
    api.rules().moves = false;
    let last = |symbol: &str| waits(&api.upstream, &target(symbol)).last().copied().unwrap_or_default();
    eventually("it is slow", || symbols.iter().all(|symbol| last(symbol) >= 12 * SECOND / 10).then_some(()));
    for (guest, symbol) in guests.iter_mut().zip(symbols) {
        let price = api.rules().price(symbol);
        let price = json!(format!("{}.{:02}", price / 100, price % 100));
        while guest.watcher.held[&guest.stream].value.parse::<Value>().expect("JSON")["price"] != price {
            assert_eq!(guest.read(), None, "nobody is told of a turn that is waited for");
        }
    }
    let seq = guests[0].seq();
    while second.seq() < seq {
        assert_eq!(second.read(), None);
    }
    api.rules().set_price("BTC-EUR", 123_456);
    for guest in [&mut guests[0], &mut second] {
        assert_eq!(guest.read(), None, "a value");
        assert_eq!(guest.seq(), seq + 1, "the first event since the market stood still");
        assert_eq!(guest.watcher.value(&guest.stream).parse::<Value>().expect("JSON")["price"], "1234.56");
    }

    // Told to wait, it waits.
    api.rules().pauses = Some("ETH-EUR");
    let failure = guests[1].failure();
    assert_eq!((&failure["state"], &failure["code"]), (&json!("stale"), &json!("UPSTREAM_RATE_LIMITED")));
    while !guests[1].live {
        guests[1].read();
    }
    let pauses = waits(&api.upstream, &target("ETH-EUR"));
    assert!(pauses.iter().any(|wait| *wait >= 11_950 * SECOND / 1_000), "longer than any interval: {pauses:?}");

    // Of the two that have hours exactly one is polled now, whatever the time is.
    let minute = || SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs() / 60 % 1_440;
    let trading = || (7 * 60..19 * 60).contains(&minute());
    let before = trading();
    let count = |path: &str| requests_for(&api.upstream, &format!("{path}?apikey={}", market::KEY)).len();
    let (polled, quiet) = if before { ("shares", "settlements") } else { ("settlements", "shares") };
    let mut waiting = Guest::open(&server, Over::Ws, quiet, &who);
    let mut open = Guest::open(&server, Over::Ws, polled, &who);
    open.until(&json!({ "of": format!("/v1/{polled}") }));
    let asked = eventually("it is polled", || Some(count(&format!("/v1/{polled}"))).filter(|count| *count >= 2));
    if trading() == before {
        assert_eq!(count(&format!("/v1/{quiet}")), 0, "{polled} was asked for {asked} times");
        let failure = waiting.failure();
        assert_eq!((&failure["state"], &failure["code"]), (&json!("failing"), &json!("STOPPED")));
        assert!(waiting.watcher.is_quiet_for(SECOND / 10));
    }
    api.is_content();
    is_silent(&server);
}

#[test]
fn each_tenant_has_its_own_leads_and_each_role_its_view() {
    let kitchen = Kitchen::of("leads.toml", &[("JWT_SECRET", JWT_SECRET), ("LEADS_KEY", leads::KEY)]);
    let api = Api::open(&kitchen.authority, Leads::new());
    let server = kitchen.setup(&[("https://api.leads.example.com", api.upstream.url(""))]).start();
    let begun = Instant::now();
    let of = |claims: Value| {
        let mut all = json!({ "iss": "https://login.example.com", "aud": "leads" });
        all.as_object_mut().expect("an object").extend(claims.as_object().expect("an object").clone());
        token(all)
    };
    let who = |company: &str, role: &str| [of(json!({ "companyId": company, "role": role }))];
    let mut agent = Guest::open(&server, Over::Ws, "leads?region=eu", &who("42", "agent"));
    let mut by_sse = Guest::open(&server, Over::Sse, "leads?region=eu", &who("42", "agent"));
    let mut manager = Guest::open(&server, Over::Sse, "leads?region=eu", &who("42", "manager"));
    let mut other = Guest::open(&server, Over::Ws, "leads?region=eu", &who("43", "agent"));
    let for_agents = |company: &str| api.rules().for_agents(company);
    agent.undisturbed_until(&for_agents("42"));
    by_sse.undisturbed_until(&for_agents("42"));
    other.undisturbed_until(&for_agents("43"));
    // What is ignored is not compared, and stands in the value.
    let whole = |guest: &mut Guest, company: &str| {
        let wanted = api.rules().whole(company);
        let held = |guest: &Guest| guest.holds().map(|held| held.parse::<Value>().expect("JSON")["leads"].clone());
        while held(guest).is_none_or(|leads| leads != wanted["leads"]) {
            assert_eq!(guest.read(), None, "no failure");
        }
    };
    whole(&mut manager, "42");
    assert_ne!(agent.epoch(), manager.epoch(), "a sequence of its own for each view");

    // What agents do not see is an event for managers alone, and of 42 alone.
    let (seq, others) = (agent.seq(), other.seq());
    api.rules().change("42", 2, "value", 9.into());
    whole(&mut manager, "42");
    api.rules().change("42", 2, "status", "won".into());
    agent.undisturbed_until(&for_agents("42"));
    by_sse.undisturbed_until(&for_agents("42"));
    whole(&mut manager, "42");
    assert_eq!((agent.seq(), by_sse.seq()), (seq + 1, seq + 1));
    api.rules().change("43", 0, "status", "won".into());
    other.undisturbed_until(&for_agents("43"));
    assert_eq!(other.seq(), others + 1);

    // Who may not, does not.
    let refused = |path: &str, token: (&str, String)| {
        let answer = server.get(&format!("/v1/streams/{path}"), &[token]);
        (answer.status, answer.code())
    };
    let refusals = [
        ("leads?region=eu", of(json!({ "role": "agent" })), 403, "CLAIM_MISSING"),
        ("leads?region=eu", of(json!({ "role": "agent", "companyId": ".." })), 403, "CLAIM_INVALID"),
        ("leads?region=eu", of(json!({ "role": "agent", "companyId": "" })), 403, "CLAIM_INVALID"),
        ("leads?region=eu", of(json!({ "role": "guest", "companyId": "42" })), 403, "INSUFFICIENT_PERMISSIONS"),
        (
            "leads?region=eu",
            of(json!({ "role": "agent", "companyId": "42", "iss": "https://evil.example" })),
            401,
            "INVALID_TOKEN",
        ),
        ("leads?region=eu", of(json!({ "role": "agent", "companyId": "42", "aud": "billing" })), 401, "INVALID_TOKEN"),
        (
            "leads?region=eu",
            of(json!({ "role": "agent", "companyId": "42", "exp": now_s() - 60 })),
            401,
            "TOKEN_EXPIRED",
        ),
        ("leads?region=moon", of(json!({ "role": "agent", "companyId": "42" })), 400, "BAD_REQUEST"),
        ("leads", of(json!({ "role": "agent", "companyId": "42" })), 400, "BAD_REQUEST"),
    ];
    for (path, token, status, code) in refusals {
        assert_eq!(refused(path, token.clone()), (status, code.to_owned()), "{path} {}", token.1);
    }

    // A token is renewed in band, for another company too; who does not renew is closed when it ends and its leeway.
    let expires_at = now_s() + 4;
    let short = of(json!({ "companyId": "42", "role": "agent", "exp": expires_at }));
    let mut renewed = server.ws("/v1/streams/leads?region=eu", std::slice::from_ref(&short));
    let mut ending = server.ws("/v1/streams/leads?region=eu", &[short]);
    let before = renewed.next_of("snapshot");
    let (_, next) = of(json!({ "companyId": "43", "role": "agent" }));
    renewed.send(json!({ "type": "auth_update", "token": next.replace("Bearer ", ""), "id": 1 }));
    let moved = renewed.next_of("snapshot");
    assert_eq!(moved["data"], for_agents("43"));
    assert_ne!(moved["epoch"], before["epoch"]);
    assert_eq!(ending.closed(), (4001, "token_expired".into()));
    let late_us = i128::from(now_us()) - i128::from(expires_at) * 1_000_000;
    // 250 ms after that at the latest; and a busy machine may hear of it later.
    assert!((5_000_000..7_250_000).contains(&late_us), "closed {late_us} µs after its end");
    assert!(renewed.is_quiet_for(SECOND / 10), "whoever has renewed goes on");

    // An API that is down for a moment closes nobody.
    api.upstream.once("/companies/42/leads", Reply::status(502));
    let failure = agent.failure();
    assert_eq!((&failure["code"], &failure["status"]), (&json!("UPSTREAM_STATUS"), &json!(502)));
    api.rules().change("42", 0, "status", "lost".into());
    agent.until(&for_agents("42"));
    by_sse.until(&for_agents("42"));
    keeps_its_interval(&api.upstream, "/companies/42/leads?region=eu", SECOND, begun);
    keeps_its_interval(&api.upstream, "/companies/43/leads?region=eu", SECOND, begun);
    api.is_content();
    is_silent(&server);
}
