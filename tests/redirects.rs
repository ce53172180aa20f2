//! Redirects to another origin that are followed, over TLS and counted: the value comes from there, and nothing that was
//! configured for the first origin goes along.
#![cfg(feature = "runtime")]

mod support;
#[path = "support/watcher.rs"]
mod watcher;

use serde_json::{Value, json};
use support::server::{PATIENCE, Server, Setup, streams};
use support::{Authority, Folder, Identity, Reply, RequestSeen, Upstream};
use watcher::{Watcher, requests_for};

/// What stands in every secret here, so that it can be looked for.
const MARK: &str = "hunter2";

/// An API and another one, both of which would take a certificate, and whoever polls the first.
struct World {
    home: Upstream,
    away: Upstream,
    identity: Identity,
    /// What each stream has: TLS, and a header that is a secret.
    common: Value,
    _folder: Folder,
}

impl World {
    fn new() -> World {
        let (authority, folder) = (Authority::new(), Folder::new("redirects"));
        let (ca, identity) = (authority.write_pem(&folder), authority.identity(&["client"]));
        let (cert, key) = identity.write_pem(&folder);
        let start = || Upstream::start_tls_asking(&authority.identity(&["127.0.0.1"]), &authority);
        let common = json!({
            "ca": ca, "client_cert": cert, "client_key": key, "interval": "20ms", "redirects_max": 3, "history": 10,
            "headers": { "X-Key": "hunter2-header", "Accept-Language": "hunter2-language" },
        });
        World { home: start(), away: start(), identity, common, _folder: folder }
    }

    fn server(&self) -> Server {
        let urls = json!([self.home.url("/*"), self.away.url("/*")]);
        Setup::new().admin(&format!("stream_urls = {urls}")).start()
    }

    /// Makes a stream on `path` of home, and watches it.
    fn watch(&self, server: &Server, id: &str, path: &str, more: Value) -> Watcher {
        let mut stream = self.common.clone();
        let members = stream.as_object_mut().expect("an object");
        members.extend([("id".to_owned(), json!(id)), ("url".to_owned(), json!(self.home.url(path)))]);
        members.extend(more.as_object().expect("an object").clone());
        let made = streams(server, "POST", "", &stream);
        assert_eq!(made.status, 201, "{made:?}");
        Watcher::ws(server, &format!("/v1/streams/{id}"))
    }

    /// Whether the request carries everything that is configured for home, the credential being that.
    fn is_own(&self, seen: &RequestSeen, credential: (&str, &str)) -> bool {
        let shown = match credential {
            ("query", value) => seen.target.ends_with(value),
            (name, value) => seen.header(name) == Some(value),
        };
        shown
            && seen.header("x-key") == Some("hunter2-header")
            && seen.certificate.as_ref() == Some(&self.identity.der())
    }
}

fn to(place: &str, status: u16) -> Reply {
    Reply::status(status).header("Location", place)
}

/// Nothing but what any client would say of itself.
fn is_bare(seen: &RequestSeen) {
    let known = ["host", "user-agent", "accept", "accept-encoding", "if-none-match", "connection"];
    let strange: Vec<_> = seen.headers.iter().filter(|(name, _)| !known.contains(&name.as_str())).collect();
    assert!(strange.is_empty(), "{strange:?}");
    assert!(!format!("{:?} {}", seen.headers, seen.target).contains(MARK), "{seen:?}");
    assert!(seen.certificate.is_none() && seen.body.is_empty() && seen.method == "GET", "{seen:?}");
}

#[test]
fn what_is_configured_stays_at_home_when_a_redirect_to_another_origin_is_followed() {
    let world = World::new();
    let server = world.server();
    let basic = "Basic YWRhOmh1bnRlcjItcHc=";
    for (id, auth, credential) in [
        ("bearer", json!({"kind": "bearer", "token": "hunter2-token"}), ("authorization", "Bearer hunter2-token")),
        ("basic", json!({"kind": "basic", "username": "ada", "password": "hunter2-pw"}), ("authorization", basic)),
        ("header", json!({"kind": "header", "name": "X-Token", "value": "hunter2-x"}), ("x-token", "hunter2-x")),
        ("query", json!({"kind": "query", "name": "key", "value": "hunter2-q"}), ("query", "?key=hunter2-q")),
    ] {
        let (from, land) = (format!("/{id}"), format!("/land-{id}"));
        world.home.set(&from, to(&world.away.url(&land), 302));
        world.away.set_json(&land, "1");
        let mut watcher = world.watch(&server, id, &from, json!({ "auth": auth }));
        assert_eq!(watcher.event().member("data"), "1", "{id}");
        world.away.set_json(&land, "2");
        assert_eq!(watcher.event().member("data"), "2", "{id}");
        world.away.wait_for_requests(world.away.request_count() + 5, PATIENCE);
        // It is polled on meanwhile: what has come there by now had left before what is counted now, and all but one of
        // those that had left earlier has come.
        let left_before = asked(&world.home, &from).len();
        let came = asked(&world.away, &land);
        let left = asked(&world.home, &from);
        assert!(left.iter().all(|seen| world.is_own(seen, credential)), "{id}: {left:?}");
        came.iter().for_each(is_bare);
        // One request there for each that led there, and what is held is asked for conditionally, where it came from.
        let counts = (left_before, came.len(), left.len());
        assert!(came.len() <= left.len() && left_before <= came.len() + 1, "{id}: {counts:?}");
        assert!(left.iter().all(|seen| seen.header("if-none-match").is_none()), "{id}");
        assert!(came.iter().skip(1).all(|seen| seen.header("if-none-match").is_some()), "{id}");
        let homes = came.iter().any(|there| left.iter().any(|here| here.header("host") == there.header("host")));
        assert!(!homes, "{id}");
    }
    assert!(world.away.not_modified_count() >= 4);
    let told = server.log_text() + &server.metrics();
    assert!(!told.contains(MARK), "{told}");
}

fn asked(upstream: &Upstream, path: &str) -> Vec<RequestSeen> {
    let seen = upstream.requests().into_iter();
    seen.filter(|seen| seen.target.split('?').next() == Some(path)).collect()
}

#[test]
fn a_token_is_shown_at_home_and_not_where_a_redirect_leads() {
    let world = World::new();
    let token = json!({"access_token": "hunter2-at", "token_type": "Bearer", "expires_in": 3600}).to_string();
    world.home.set("/token", Reply::json(token));
    world.home.set("/start", to(&world.away.url("/land"), 307));
    world.away.set_json("/land", "1");
    let server = world.server();
    let auth = json!({
        "kind": "oauth2", "token_url": world.home.url("/token"), "client_id": "ada", "client_secret": "hunter2-client",
        "ca": world.common["ca"],
    });
    let mut watcher = world.watch(&server, "s", "/start", json!({ "auth": auth }));
    assert_eq!(watcher.event().member("data"), "1");
    // A place that refuses whoever has no token is none that the token is renewed for.
    world.away.set("/land", Reply::status(401));
    assert_eq!(watcher.next_of("stream_status").json()["code"], "UPSTREAM_AUTH");
    world.away.set_json("/land", "2");
    assert_eq!(watcher.event().member("data"), "2");
    requests_for(&world.away, "/land").iter().for_each(is_bare);
    let left = requests_for(&world.home, "/start");
    assert!(left.iter().all(|seen| world.is_own(seen, ("authorization", "Bearer hunter2-at"))), "{left:?}");
}

#[test]
fn what_has_been_elsewhere_comes_home_without_anything() {
    let world = World::new();
    world.home.set("/start", to(&world.away.url("/bounce"), 302));
    world.away.set("/bounce", to(&world.home.url("/back"), 308));
    world.home.set_json("/back", "1");
    let server = world.server();
    let auth = json!({"kind": "bearer", "token": "hunter2-token"});
    let mut watcher = world.watch(&server, "s", "/start", json!({ "auth": auth }));
    assert_eq!(watcher.event().member("data"), "1");
    world.home.wait_for_requests(world.home.request_count() + 6, PATIENCE);
    let back = requests_for(&world.home, "/back");
    back.iter().for_each(is_bare);
    requests_for(&world.away, "/bounce").iter().for_each(is_bare);
    let left = requests_for(&world.home, "/start");
    assert!(left.iter().all(|seen| world.is_own(seen, ("authorization", "Bearer hunter2-token"))));
    // A connection that has shown the certificate is not used by those who have none to show, of the same host.
    let own: Vec<usize> = left.iter().map(|seen| seen.connection).collect();
    assert!(back.iter().all(|seen| !own.contains(&seen.connection)), "{own:?}");
}

#[test]
fn a_body_goes_nowhere_but_home() {
    let world = World::new();
    let server = world.server();
    let post = |auth: &str| json!({"method": "POST", "body": "{\"q\":\"hunter2-body\"}", "auth": {"kind": "bearer", "token": auth}});
    world.away.set_json("/land", "1");
    // 303, and by custom 301 and 302, ask for the other place with GET.
    for (n, status) in [301, 302, 303].into_iter().enumerate() {
        let (id, path) = (format!("s{status}"), format!("/{status}"));
        world.home.set(&path, to(&world.away.url("/land"), status));
        let mut watcher = world.watch(&server, &id, &path, post("hunter2-token"));
        assert_eq!(watcher.event().member("data"), "1", "{status}");
        assert!(requests_for(&world.away, "/land").len() > n);
        assert!(requests_for(&world.home, &path).iter().all(|seen| seen.body == b"{\"q\":\"hunter2-body\"}"));
    }
    requests_for(&world.away, "/land").iter().for_each(is_bare);
    // 307 and 308 would take it along.
    for status in [307, 308] {
        let (id, path) = (format!("s{status}"), format!("/{status}"));
        world.home.set(&path, to(&world.away.url("/body"), status));
        let mut watcher = world.watch(&server, &id, &path, post("hunter2-token"));
        let told = watcher.next_of("stream_status").json();
        assert_eq!(
            (&told["state"], &told["code"]),
            (&json!("failing"), &json!("UPSTREAM_REDIRECT")),
            "{status}: {told}"
        );
    }
    assert!(requests_for(&world.away, "/body").is_empty());
}

#[test]
fn what_is_not_listed_is_not_followed_to_and_sees_nobody() {
    let world = World::new();
    let stranger = Upstream::start();
    world.home.set("/start", to(&world.away.url("/land"), 302));
    world.away.set("/land", to(&stranger.url("/").replace("http://", "https://"), 302));
    let server = world.server();
    let mut watcher = world.watch(&server, "s", "/start", json!({}));
    let told = watcher.next_of("stream_status").json();
    assert_eq!((&told["state"], &told["code"]), (&json!("failing"), &json!("UPSTREAM_BLOCKED")), "{told}");
    assert_eq!(stranger.connection_count(), 0);
    server.wait_for_log("not_listed", 1);
}
