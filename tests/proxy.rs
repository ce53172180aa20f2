//! Upstreams that are reached only through the operator's HTTP proxy, over TLS and plain, against the built server: what the
//! proxy is asked, what it gets to see, and what watchers are told where it fails.
#![cfg(feature = "runtime")]

mod support;
#[path = "support/watcher.rs"]
mod watcher;

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use restcast::guard::{Pattern, Policy};
use restcast::runtime::fetch::FetcherOptions;
use restcast::runtime::resolver::Resolver;
use restcast::stream::poll::UpstreamCode;
use serde_json::{Value, json};
use support::client::{Client, target};
use support::server::{PATIENCE, Setup, eventually, run};
use support::{Authority, Folder, Reply, Tunnels, Upstream, on_each_driver};
use watcher::Watcher;

const NAME: &str = "api.partner.example";
const LOGIN: &str = "Basic YWRhOmh1bnRlcjItcHJveHk=";
const HEADER: &str = "hunter2-of-the-upstream";

/// An API that only the proxy knows by its name.
struct World {
    api: Upstream,
    tunnels: Tunnels,
    ca: String,
    _folder: Folder,
}

impl World {
    fn new() -> World {
        let (authority, folder) = (Authority::new(), Folder::new("proxy"));
        let ca = authority.write_pem(&folder).display().to_string();
        let (api, tunnels) = (Upstream::start_tls(&authority.identity(&[NAME])), Tunnels::start());
        tunnels.knows(&format!("{NAME}:443"), api.address());
        World { api, tunnels, ca, _folder: folder }
    }

    fn proxy(&self, login: &str) -> String {
        format!("[proxy]\nurl = \"http://{login}{}\"\n", self.tunnels.address())
    }

    fn lines(&self) -> String {
        format!(
            "ca = {:?}\ninterval = \"50ms\"\nbackoff_max = \"200ms\"\nlinger = \"1s\"\nheaders = {{ X-Key = {HEADER:?} }}\n",
            self.ca
        )
    }
}

fn url(path: &str) -> String {
    format!("https://{NAME}{path}")
}

/// The next status that `is` so, whatever comes before it.
fn status_that(watcher: &mut Watcher, is: impl Fn(&Value) -> bool) -> Value {
    eventually("a status", || {
        let frame = watcher.next();
        Some(frame.json()).filter(|status| frame.kind() == "stream_status" && is(status))
    })
}

/// The next status with that code.
fn status(watcher: &mut Watcher, code: &str) -> Value {
    status_that(watcher, |status| status["code"] == code)
}

#[test]
fn an_upstream_is_polled_through_one_tunnel_that_sees_nothing_of_it() {
    let world = World::new();
    world.tunnels.wants(LOGIN);
    world.api.set_json("/leads", r#"{"secret":"hunter2-of-the-value"}"#);
    let lines = world.lines() + &world.proxy("ada:hunter2-proxy@");
    let server = Setup::new().no_streams().stream("leads", &url("/leads"), &lines).start();
    let mut watcher = Watcher::ws(&server, "/v1/streams/leads");
    assert_eq!(watcher.event().json()["data"]["secret"], "hunter2-of-the-value");
    world.api.wait_for_requests(6, PATIENCE);
    assert_eq!(world.tunnels.asked(), [format!("{NAME}:443")], "one tunnel for all polls, asked for by name");
    let seen = world.api.requests();
    assert!(seen.iter().all(|seen| seen.header("host") == Some(NAME) && seen.header("x-key") == Some(HEADER)));
    assert!(seen.iter().all(|seen| seen.header("proxy-authorization").is_none()), "the login is the proxy's alone");
    assert_eq!(seen[0].server_name.as_deref(), Some(NAME));
    let heard = world.tunnels.heard();
    assert!(heard.contains(LOGIN) && !heard.contains("hunter2"), "{heard}");
    let told = server.log_text() + &server.metrics();
    assert!(!told.contains("hunter2") && !told.contains("YWRh"), "{told}");
}

#[test]
fn a_proxy_that_fails_is_a_status_and_what_it_answers_is_shown_to_nobody() {
    let world = World::new();
    world.api.set_json("/leads", "1");
    let lines = world.lines() + "connect_timeout = \"2s\"\n" + &world.proxy("");
    let setup = Setup::new().no_streams().stream("leads", &url("/leads"), &lines);
    let server = setup.start();
    let mut watcher = Watcher::ws(&server, "/v1/streams/leads");
    assert_eq!(watcher.event().member("data"), "1");
    for (says, code, logged) in [
        (&b"HTTP/1.1 407 Login\r\nX: hunter2\r\n\r\nhunter2"[..], "UPSTREAM_UNREACHABLE", "407"),
        (b"HTTP/1.1 403 hunter2\r\n\r\n", "UPSTREAM_UNREACHABLE", "403"),
        (b"SSH-2.0-hunter2\r\n", "UPSTREAM_PROTOCOL", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\n\r\nhunter2", "UPSTREAM_PROTOCOL", "before anything was sent"),
        // It takes the connection and says nothing.
        (b"", "UPSTREAM_TIMEOUT", "connecting"),
    ] {
        // An answer that is cut in half by that is a failure of another kind, and hides the one that follows: only a change
        // of the state is told. But not each time.
        let is_told = (0..10).any(|_| {
            world.tunnels.says(Some(says));
            world.api.close_connections();
            let told = status_that(&mut watcher, |status| status["state"] == "stale");
            if told["code"] == code {
                server.wait_for_log(logged, 1);
            }
            world.tunnels.says(None);
            status_that(&mut watcher, |status| status["state"] == "live");
            told["code"] == code
        });
        assert!(is_told, "{code}, {logged}");
    }
    assert!(!server.log_text().contains("hunter2"), "{}", server.log_text());
    // A login that is asked for and that the file gets at a reload.
    world.tunnels.wants(LOGIN);
    world.api.close_connections();
    status_that(&mut watcher, |status| status["state"] == "stale");
    let lines = world.lines() + &world.proxy("ada:hunter2-proxy@");
    server.reload(&Setup::new().no_streams().stream("leads", &url("/leads"), &lines));
    status_that(&mut watcher, |status| status["state"] == "live");
}

#[test]
fn a_reload_changes_the_way_and_what_is_excepted_goes_directly() {
    let (world, other, inside) = (World::new(), Tunnels::start(), Upstream::start());
    world.api.set_json("/leads", "1");
    inside.set_json("/inside", "2");
    other.knows(&format!("{NAME}:443"), world.api.address());
    let streams = |proxy: &str| {
        let lines = world.lines() + proxy;
        Setup::new().no_streams().stream("inside", &inside.url("/inside"), "").stream("leads", &url("/leads"), &lines)
    };
    let server = streams(&world.proxy("")).start();
    let (mut leads, mut here) = (Watcher::ws(&server, "/v1/streams/leads"), Watcher::ws(&server, "/v1/streams/inside"));
    assert_eq!((leads.event().member("data"), here.event().member("data")), ("1".to_owned(), "2".to_owned()));
    assert_eq!(world.tunnels.asked(), [format!("{NAME}:443")], "this machine is asked directly");
    server.reload(&streams(&format!("[proxy]\nurl = \"http://{}\"\n", other.address())));
    eventually("it goes the other way", || (other.asked() == [format!("{NAME}:443")]).then_some(()));
    let excepted = format!("[proxy]\nurl = \"http://{}\"\nexcept = [\"*.partner.example\"]\n", other.address());
    server.reload(&streams(&excepted));
    // Nobody but the proxy knows the name.
    status(&mut leads, "UPSTREAM_DNS");
    assert_eq!((world.tunnels.asked().len(), other.asked().len()), (1, 1));
}

#[test]
fn tokens_key_sets_and_actions_go_the_same_way() {
    let world = World::new();
    world.api.set("/token", Reply::json(r#"{"access_token":"hunter2-at","token_type":"Bearer","expires_in":3600}"#));
    world.api.set_json(
        "/keys",
        r#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo","kid":"e"}]}"#,
    );
    world.api.set_json("/leads", "1");
    world.api.set("/orders", Reply::json("{\"done\":true}"));
    let (ca, token_url) = (&world.ca, url("/token"));
    let auth = format!(
        "[stream.auth]\nkind = \"oauth2\"\ntoken_url = {token_url:?}\nclient_id = \"c\"\nclient_secret = \"hunter2-client\"\nca = {ca:?}\n"
    );
    let setup = Setup::new()
        .no_streams()
        .key_set("https://issuer.example", &format!("url = {:?}\nca = {ca:?}\nalgs = [\"EdDSA\"]\n", url("/keys")))
        .stream("leads", &url("/leads"), &(world.lines() + &auth))
        .action("order", &url("/orders"), &format!("ca = {ca:?}\n{}", world.proxy("")));
    let server = setup.start();
    let mut watcher = Watcher::ws(&server, "/v1/streams/leads");
    watcher.send(r#"{"type":"order","id":1}"#);
    let result = watcher.next_of("action_result").json();
    assert_eq!(result["body"], json!({ "done": true }));
    let asked = |path: &str| world.api.requests().iter().filter(|seen| seen.target == path).count();
    eventually("all were asked", || {
        (asked("/keys") == 1 && asked("/token") == 1 && asked("/leads") >= 1).then_some(())
    });
    assert!(world.tunnels.asked().iter().all(|end| *end == format!("{NAME}:443")));
    assert!(!world.tunnels.heard().contains("hunter2"));
    // The command that judges a token fetches the key set the same way, and prints no login.
    let (_, shown, _) = run(&["check"], &setup);
    assert!(shown.contains(&format!("url = \"http://{}\"", world.tunnels.address())), "{shown}");
}

#[test]
fn what_callers_may_name_is_asked_for_by_the_address_that_was_judged() {
    on_each_driver(async || {
        let (api, tunnels) = (Upstream::start(), Tunnels::start());
        api.set_json("/leads", "1");
        tunnels.knows("93.184.216.34:80", api.address());
        let resolver = Resolver::with_lookup(Box::new(|name| match name {
            "public.example" => {
                Ok(vec![IpAddr::V4(Ipv4Addr::new(93, 184, 216, 35)), IpAddr::V4(Ipv4Addr::new(93, 184, 216, 34))])
            }
            _ => Ok(vec![IpAddr::V4(Ipv4Addr::new(10, 0, 0, 7))]),
        }));
        let client =
            Client::with(FetcherOptions::default(), resolver).through(&format!("http://{}", tunnels.address()));
        let guarded = |url: &str, policy: &Arc<Policy>| {
            let mut target = target(url, |_| {});
            target.guard = Some(Arc::clone(policy));
            target
        };
        let public = Arc::new(Policy::public());
        let response = client.poll(guarded("http://public.example/leads", &public)).await.expect("the second address");
        assert_eq!(response.status, 200);
        assert_eq!(tunnels.asked(), ["93.184.216.35:80", "93.184.216.34:80"]);
        assert_eq!(api.requests()[0].header("host"), Some("public.example"));
        client.fails(guarded("http://inside.example/leads", &public), UpstreamCode::Blocked).await;
        assert_eq!(tunnels.asked().len(), 2, "what is blocked is not asked for at all");
        // What the operator polls does not go over the connection of a caller, nor the other way round.
        tunnels.knows("public.example:80", api.address());
        assert_eq!(client.get("http://public.example/leads").await.expect("the operator's").status, 200);
        assert_eq!(tunnels.asked()[2..], ["public.example:80"]);
        let listed = Pattern::parse("http://10.0.0.7/*").expect("a pattern");
        let listed = Arc::new(Policy { allow: vec![listed], ..Policy::default() });
        let error = client.poll(guarded("http://10.0.0.7/leads", &listed)).await.expect_err("nobody is there");
        assert_eq!(
            (error.code, tunnels.asked()[3..].to_vec()),
            (UpstreamCode::Unreachable, vec!["10.0.0.7:80".to_owned()])
        );
    });
}

#[test]
fn nobody_waits_for_a_proxy_that_is_not_there() {
    let gone = Tunnels::start().address();
    let lines = format!("backoff_max = \"200ms\"\n[proxy]\nurl = \"http://{gone}\"\n");
    let server = Setup::new().no_streams().stream("leads", &url("/leads"), &lines).start();
    let mut watcher = Watcher::ws(&server, "/v1/streams/leads");
    assert_eq!(status(&mut watcher, "UPSTREAM_UNREACHABLE")["state"], "failing");
}
