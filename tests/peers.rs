//! Processes that share a Redis: the event streams of one are renewed at another, and each lists the connections of all.
//! Against the built server and a real Redis, with a proxy that breaks the way to it; the bounds against shards alone.

#![allow(clippy::disallowed_methods, reason = "tests measure how long things take")]

mod hall;
mod support;

use std::time::{Duration, Instant};

use restcast::auth::renewal::{RenewalAnswer, RenewalAsk};
use restcast::ids::{ConnectionId, ProcessId};
use restcast::limits::PEER_RENEWAL_PATIENCE;
use restcast::secret::Secret;
use restcast::shard::{Found, Input, Lookup, Order, PeerAsk};
use restcast::time::WallTime;
use rustix::process::Signal;
use serde_json::{Value, json};
use support::redis::{Client, RedisSetup, Said};
use support::server::{
    Answer, Raw, Server, Setup, Sse, Ws, away, bearer, connected, eventually, is, mint, now_s, now_us, outcome,
    token_of, watching,
};
use support::{Proxy, Redis, Upstream};

/// `redis.timeout` of these tests: what is answered well within it was not waited for.
const TIMEOUT: Duration = Duration::from_secs(8);
/// An answer that waits for nobody, on a busy machine: less than [`TIMEOUT`] and [`PEER_RENEWAL_PATIENCE`].
const AT_ONCE: Duration = Duration::from_secs(6);

fn upstream() -> Upstream {
    let upstream = Upstream::start();
    upstream.set_json("/leads", "[1]");
    upstream
}

fn setup(url: &str, upstream: &Upstream) -> Setup {
    Setup::new().redis(url, "timeout = \"8s\"").jwt("leeway = \"0s\"").stream("leads", &upstream.url("/leads"), "")
}

fn started(redis: &Redis, upstream: &Upstream, count: usize) -> Vec<Server> {
    let servers: Vec<Server> = (0..count).map(|_| setup(&redis.url(), upstream).start()).collect();
    servers.iter().for_each(connected);
    servers
}

/// An event stream, and its name.
fn event_stream(server: &Server, token: &str) -> (Sse, String) {
    let mut sse = server.sse("/v1/streams/leads", &[bearer(token)]);
    let welcome = sse.next_of("welcome");
    sse.next_of("snapshot");
    (sse, welcome.data["connection"].as_str().expect("a name").to_owned())
}

fn renew(server: &Server, connection: &str, token: &str) -> Answer {
    let body = json!({ "token": token }).to_string();
    let headers = [("Content-Type", "application/json".to_owned())];
    server.request("POST", &format!("/v1/connections/{connection}/auth"), &headers, &body)
}

/// The name with another digit in that place.
fn another(name: &str, at: usize) -> String {
    let digit = if &name[at..=at] == "0" { "1" } else { "0" };
    format!("{}{digit}{}", &name[..at], &name[at + 1..])
}

fn list(server: &Server, query: &str) -> Value {
    let answer = server.order("GET", &format!("connections{query}"), &Value::Null);
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()
}

fn names(page: &Value) -> Vec<String> {
    let connections = page["connections"].as_array().expect("a list");
    connections.iter().map(|one| one["connection"].as_str().expect("a name").to_owned()).collect()
}

/// Hears everything that is published, until it is asked what it has heard.
struct Eavesdropper(Client);

impl Eavesdropper {
    fn of(redis: &Redis) -> Eavesdropper {
        let mut client = redis.client();
        client.command(&["PSUBSCRIBE", "*"]).expect("an answer");
        Eavesdropper(client)
    }

    /// The text of the next message on that channel.
    fn next_on(&mut self, wanted: &str) -> String {
        loop {
            let (channel, text) = self.next();
            if channel == wanted {
                return text;
            }
        }
    }

    fn next(&mut self) -> (String, String) {
        let Said::List(parts) = self.0.reply().expect("a message") else { panic!("no message") };
        let [_, _, Said::Text(channel), Said::Text(text)] = parts.as_slice() else { panic!("{parts:?}") };
        (channel.clone(), text.clone())
    }

    /// The channel and text of each message so far.
    fn heard(mut self, redis: &Redis) -> Vec<(String, String)> {
        redis.publish("the-end", "");
        let mut heard = Vec::new();
        loop {
            let (channel, text) = self.next();
            if channel == "the-end" {
                return heard;
            }
            heard.push((channel, text));
        }
    }
}

#[test]
fn an_event_stream_is_renewed_at_any_process_as_at_its_own() {
    let (redis, upstream) = (Redis::start(), upstream());
    let servers = started(&redis, &upstream, 3);
    let eavesdropper = Eavesdropper::of(&redis);
    let exp = now_s() + 5;
    let token = mint(json!({ "sub": "u1", "exp": exp }));
    let mut streams: Vec<(Sse, String)> = (0..4).map(|_| event_stream(&servers[0], &token)).collect();
    let later = now_s() + 600;
    let renewed = mint(json!({ "sub": "u1", "exp": later, "permissions": ["p"] }));
    for (_, connection) in &streams {
        for server in &servers[1..] {
            let answer = renew(server, connection, &renewed);
            let ok = json!({ "type": "auth_ok", "expires_at": later * 1_000_000, "permissions": ["p"] });
            assert_eq!((answer.status, answer.json()), (200, ok));
            assert_eq!(answer.header("cache-control"), Some("no-store"));
        }
    }
    // What would have been refused at its own is refused so everywhere.
    let expired = mint(json!({ "sub": "u1", "exp": now_s() - 60 }));
    let elsewhere = token_of("u2");
    let connection = &streams[0].1;
    for server in &servers {
        assert_eq!(outcome(&renew(server, connection, "nonsense")), is(401, "INVALID_TOKEN"));
        assert_eq!(outcome(&renew(server, connection, &elsewhere)), is(403, "AUTH_SUBJECT_MISMATCH"));
        assert_eq!(outcome(&renew(server, connection, &renewed)).0, 200, "the refusals were not five in a row");
        assert_eq!(outcome(&renew(server, connection, &expired)), is(401, "TOKEN_EXPIRED"));
        assert_eq!(outcome(&renew(server, connection, &renewed)).0, 200);
    }
    // They outlive their first token.
    while now_us() < exp * 1_000_000 + 500_000 {
        std::thread::sleep(Duration::from_millis(20));
    }
    upstream.set_json("/leads", "[2]");
    for (sse, _) in &mut streams {
        eventually("what came after the first token's end", || {
            let event = sse.next().expect("it goes on");
            assert_ne!(event.kind, "close");
            (event.data["seq"] == 2).then_some(())
        });
    }
    // Five refusals in a row end it, wherever they were made.
    let (mut sse, connection) = streams.pop().expect("four");
    for server in [1, 2, 1, 2, 1] {
        assert_eq!(renew(&servers[server], &connection, &expired).status, 401);
    }
    let close = sse.next_of("close").data;
    assert_eq!((&close["code"], &close["reason"]), (&json!(4001), &json!("auth_update_rejected")));
    assert_eq!(outcome(&renew(&servers[1], &connection, &renewed)), is(404, "UNKNOWN_CONNECTION"));
    // What went by Redis says neither a token nor a whole name.
    let heard = eavesdropper.heard(&redis);
    assert!(heard.iter().any(|(channel, _)| channel.starts_with("restcast:process:")), "{heard:?}");
    for (channel, text) in heard {
        let all = format!("{channel} {text}");
        for token in [&renewed, &expired, &elsewhere] {
            let signature = token.rsplit('.').next().expect("a signature");
            assert!(!all.contains(signature) && !all.contains(&token[..40]), "{all}");
        }
        for (_, name) in &streams {
            assert!(!all.contains(&name[2..34]), "{all}");
        }
        assert!(!all.contains("auth_ok") && !all.contains("AUTH_SUBJECT_MISMATCH"), "{all}");
    }
}

#[test]
fn a_name_that_no_process_gave_is_unknown_at_once() {
    let (redis, upstream) = (Redis::start(), upstream());
    let servers = started(&redis, &upstream, 2);
    let (_sse, name) = event_stream(&servers[0], &token_of("u1"));
    let _ws = watching(&servers[0], &token_of("u1"), "/v1/ws");
    let listed = eventually("both are listed", || {
        let page = list(&servers[1], "");
        (page["connections"].as_array().expect("a list").len() == 2).then_some(page)
    });
    let of_ws = listed["connections"].as_array().expect("a list").iter().find(|one| one["transport"] == "ws");
    let of_ws = of_ws.expect("one")["connection"].as_str().expect("a name");
    // Another's random bits, place, core, a core and a process that are not there; a WebSocket has frames.
    let unknown = [another(&name, 5), another(&name, 60), another(&name, 53), another(&name, 51), another(&name, 40)];
    for unknown in unknown.iter().map(String::as_str).chain([of_ws, "c_", "nonsense"]) {
        let begun = Instant::now();
        assert_eq!(outcome(&renew(&servers[1], unknown, &token_of("u1"))), is(404, "UNKNOWN_CONNECTION"), "{unknown}");
        assert!(begun.elapsed() < AT_ONCE, "{unknown}: {:?}", begun.elapsed());
    }
    assert_eq!(renew(&servers[1], &name, &token_of("u1")).status, 200);
}

#[test]
fn a_process_that_has_ended_is_known_no_more() {
    let (redis, upstream) = (Redis::start(), upstream());
    let mut servers = started(&redis, &upstream, 2);
    let (_sse, name) = event_stream(&servers[0], &token_of("u1"));
    assert_eq!(renew(&servers[1], &name, &token_of("u1")).status, 200);
    let mut gone = servers.remove(0);
    gone.signal(Signal::TERM);
    gone.wait();
    assert_eq!(outcome(&renew(&servers[0], &name, &token_of("u1"))), is(404, "UNKNOWN_CONNECTION"));
    let page = list(&servers[0], "");
    assert_eq!((&page["complete"], &page["unanswered"]), (&json!(true), &json!([])), "it has said that it goes");
}

/// 503 with `Retry-After`, and not later than `redis.timeout` allows.
fn assert_unanswered(server: &Server, name: &str) {
    assert_unanswered_within(server, name, TIMEOUT);
}

fn assert_unanswered_within(server: &Server, name: &str, patience: Duration) {
    let begun = Instant::now();
    let answer = renew(server, name, &token_of("u1"));
    assert_eq!(outcome(&answer), is(503, "SESSION_STORE_UNAVAILABLE"));
    assert!(answer.header("retry-after").is_some(), "{answer:?}");
    assert!(begun.elapsed() < patience + AT_ONCE, "{:?}", begun.elapsed());
}

fn renewed_in_time(server: &Server, name: &str) {
    eventually("it is renewed again", || (renew(server, name, &token_of("u1")).status == 200).then_some(()));
}

#[test]
fn while_redis_is_away_at_either_end_nobody_is_told_that_a_connection_is_gone() {
    let (redis, upstream) = (Redis::start(), upstream());
    let (proxy_a, proxy_b) = (Proxy::to(redis.address()), Proxy::to(redis.address()));
    let a = setup(&redis.url_at(proxy_a.address()), &upstream).start();
    let b = setup(&redis.url_at(proxy_b.address()), &upstream).start();
    [&a, &b].into_iter().for_each(connected);
    let (_sse, name) = event_stream(&a, &token_of("u1"));
    renewed_in_time(&b, &name);
    // At the one that is asked.
    proxy_b.down();
    away(&b);
    assert_unanswered(&b, &name);
    let page = list(&b, "");
    assert_eq!((&page["complete"], names(&page).len()), (&json!(false), 0));
    proxy_b.heal();
    connected(&b);
    renewed_in_time(&b, &name);
    // At the one that holds it.
    proxy_a.down();
    away(&a);
    assert_unanswered(&b, &name);
    let page = list(&b, "");
    let process = &name[34..50];
    assert_eq!((&page["complete"], &page["unanswered"]), (&json!(false), &json!([process])));
    assert_eq!(renew(&a, &name, &token_of("u1")).status, 200, "at its own it needs no Redis");
    proxy_a.heal();
    renewed_in_time(&b, &name);
    // On a way that neither ends nor goes on.
    proxy_b.stall();
    assert_unanswered(&b, &name);
    proxy_b.heal();
    renewed_in_time(&b, &name);
}

#[test]
fn a_process_that_stands_still_is_waited_for_as_long_as_it_may_take_to_look_a_token_up() {
    let (redis, upstream) = (Redis::start(), upstream());
    let servers = started(&redis, &upstream, 2);
    let (_sse, name) = event_stream(&servers[0], &token_of("u1"));
    renewed_in_time(&servers[1], &name);
    servers[0].signal(Signal::STOP);
    let begun = Instant::now();
    assert_unanswered_within(&servers[1], &name, PEER_RENEWAL_PATIENCE);
    let least = PEER_RENEWAL_PATIENCE - Duration::from_millis(100);
    assert!(begun.elapsed() >= least, "it might have answered: {:?}", begun.elapsed());
    let page = list(&servers[1], "");
    assert_eq!((&page["complete"], &page["unanswered"]), (&json!(false), &json!([&name[34..50]])));
    servers[0].signal(Signal::CONT);
    renewed_in_time(&servers[1], &name);
}

#[test]
fn a_failed_renewal_counts_for_its_address_at_both_processes() {
    let (redis, upstream) = (Redis::start(), upstream());
    let setup = setup(&redis.url(), &upstream).limits("auth_failures_per_minute = 2");
    let servers: Vec<Server> = (0..2).map(|_| setup.start()).collect();
    servers.iter().for_each(connected);
    let (_sse, name) = event_stream(&servers[0], &token_of("u1"));
    let mut took = Vec::new();
    for _ in 0..4 {
        let begun = Instant::now();
        assert_eq!(renew(&servers[1], &name, "nonsense").status, 401);
        took.push(begun.elapsed());
    }
    assert!(took[3] >= Duration::from_millis(900), "answers to one who fails too often are late: {took:?}");
    assert_eq!(renew(&servers[1], &name, &token_of("u1")).status, 429);
    assert_eq!(renew(&servers[0], &name, &token_of("u1")).status, 429);
}

#[test]
fn what_others_say_on_the_channels_has_no_effect() {
    let (redis, upstream) = (Redis::start(), upstream());
    let servers = started(&redis, &upstream, 2);
    let token = token_of("u1");
    let (mut sse, name) = event_stream(&servers[0], &token);
    renewed_in_time(&servers[1], &name);
    let (own, other) = (&name[34..50], list(&servers[1], "")["process"].as_str().expect("a name").to_owned());
    let (channel, forger) = (format!("restcast:process:{own}"), "00000000000000aa");
    let long = "x".repeat(300 << 10);
    let renewal = |core: u32, sealed: &str| {
        json!({ "from": forger, "ask": 1, "renew": { "core": core, "index": 0, "sealed": sealed } }).to_string()
    };
    let messages = [
        String::new(),
        "{".into(),
        "[1]".into(),
        "null".into(),
        long,
        json!({ "from": "x", "ask": 1 }).to_string(),
        json!({ "from": forger }).to_string(),
        json!({ "from": forger, "ask": -1, "list": "" }).to_string(),
        json!({ "from": forger, "ask": 1, "list": "AAAA" }).to_string(),
        json!({ "from": forger, "ask": 1, "list": "not base 64" }).to_string(),
        json!({ "from": other, "answer": 1, "sealed": null }).to_string(),
        json!({ "from": other, "answer": u64::MAX, "sealed": "AAAA" }).to_string(),
        renewal(0, ""),
        renewal(1, "AAAA"),
        renewal(65_535, "AAAA"),
        renewal(70_000, "AAAA"),
    ];
    for message in &messages {
        redis.publish(&channel, message);
        redis.publish("restcast:processes", message);
    }
    // Answers to a question that somebody makes up before the one who knows has answered: an end that has not the name's
    // bits can say at most that there is no such connection, and only under the name of the process that holds it.
    for no in 1..200 {
        let forged = json!({ "from": forger, "answer": no, "sealed": null }).to_string();
        redis.publish(&format!("restcast:process:{other}"), &forged);
    }
    assert_eq!(renew(&servers[1], &name, &token).status, 200);
    let page = list(&servers[1], "?sub=u1");
    assert_eq!(names(&page), std::slice::from_ref(&name));
    upstream.set_json("/leads", "[2]");
    assert_eq!(sse.next_of("snapshot").data["seq"], 2);
    for server in &servers {
        assert_eq!(server.metric(&["restcast_panics_total"]), 0.0);
        assert!(server.log_text().contains("makes no sense"));
    }
}

#[test]
fn somebody_who_only_listens_delays_no_list_and_makes_no_connection_that_never_was_unavailable() {
    let (redis, upstream) = (Redis::start(), upstream());
    let servers = started(&redis, &upstream, 2);
    let (_sse, name) = event_stream(&servers[0], &token_of("u1"));
    let _eavesdropper = Eavesdropper::of(&redis);
    // They take those they have heard of for all that are there once everybody has had the time to say so.
    eventually("a list of all that are known is whole", || {
        let begun = Instant::now();
        let page = list(&servers[1], "");
        (page["complete"] == true && begun.elapsed() < AT_ONCE)
            .then(|| assert_eq!(names(&page), std::slice::from_ref(&name)))
    });
    let begun = Instant::now();
    assert_eq!(outcome(&renew(&servers[1], &another(&name, 40), &token_of("u1"))), is(404, "UNKNOWN_CONNECTION"));
    assert!(begun.elapsed() < AT_ONCE, "{:?}", begun.elapsed());
    assert_eq!(renew(&servers[1], &name, &token_of("u1")).status, 200);
    // One that is known and stands still is still waited for, and named.
    servers[0].signal(Signal::STOP);
    let page = list(&servers[1], "");
    assert_eq!((&page["complete"], &page["unanswered"]), (&json!(false), &json!([&name[34..50]])));
    assert_unanswered_within(&servers[1], &name, PEER_RENEWAL_PATIENCE);
    servers[0].signal(Signal::CONT);
}

#[test]
fn nobody_says_in_the_name_of_a_process_that_a_connection_is_gone() {
    let (redis, upstream) = (Redis::start(), upstream());
    let servers = started(&redis, &upstream, 2);
    let (_sse, name) = event_stream(&servers[0], &token_of("u1"));
    renewed_in_time(&servers[1], &name);
    let (owner, asker) = (&name[34..50], list(&servers[1], "")["process"].as_str().expect("a name").to_owned());
    let (to_owner, to_asker) = (format!("restcast:process:{owner}"), format!("restcast:process:{asker}"));
    // The process that knows says nothing for a while; another end does, which hears and says what it likes.
    let mut eavesdropper = Eavesdropper::of(&redis);
    servers[0].signal(Signal::STOP);
    let answer = std::thread::scope(|scope| {
        let answer = scope.spawn(|| renew(&servers[1], &name, &token_of("u1")));
        let question = eavesdropper.next_on(&to_owner);
        let question: Value = serde_json::from_str(&question).expect("JSON");
        let number = question["ask"].as_u64().expect("a number");
        redis.publish("restcast:processes", &json!({ "from": owner, "bye": true }).to_string());
        for number in (1..100).chain([number]) {
            for signed in [Value::Null, json!(""), json!("AAAA"), json!("A".repeat(128))] {
                let forged = json!({ "from": owner, "answer": number, "sealed": null, "signed": signed }).to_string();
                redis.publish(&to_asker, &forged);
            }
        }
        answer.join().expect("it is answered")
    });
    assert_eq!(outcome(&answer), is(503, "SESSION_STORE_UNAVAILABLE"));
    servers[0].signal(Signal::CONT);
    renewed_in_time(&servers[1], &name);
    // What the process says itself counts.
    assert_eq!(outcome(&renew(&servers[1], &another(&name, 60), &token_of("u1"))), is(404, "UNKNOWN_CONNECTION"));
}

#[test]
fn each_process_lists_the_connections_of_all_page_by_page() {
    let (redis, upstream) = (Redis::start(), upstream());
    let servers = started(&redis, &upstream, 3);
    let mut sockets: Vec<Ws> = Vec::new();
    for (number, server) in servers.iter().enumerate() {
        sockets.extend((0..=number + 2).map(|_| watching(server, &token_of("u1"), "/v1/streams/leads")));
    }
    let (_sse, name) = event_stream(&servers[0], &token_of("u2"));
    eventually("all are there", || (names(&list(&servers[2], "")).len() == 13).then_some(()));
    for server in &servers {
        let page = list(server, "?sub=u2");
        assert_eq!(names(&page), std::slice::from_ref(&name));
        assert_eq!((&page["connections"][0]["process"], &page["complete"]), (&json!(&name[34..50]), &json!(true)));
        let (mut seen, mut after) = (Vec::new(), String::new());
        for _ in 0..10 {
            let page = list(server, &format!("?sub=u1&limit=5{after}"));
            assert_eq!(page["complete"], true, "{page}");
            let (names, next) = (names(&page), page["next"].as_str().map(str::to_owned));
            assert_eq!(names.len(), if next.is_some() { 5 } else { 2 });
            seen.extend(names);
            match next {
                Some(next) => after = format!("&after={next}"),
                None => break,
            }
        }
        assert_eq!(seen.len(), 12);
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), 12, "nobody is told of twice");
    }
    let of: std::collections::HashSet<String> =
        servers.iter().map(|server| list(server, "?limit=1")["process"].to_string()).collect();
    assert_eq!(of.len(), 3);
}

#[test]
fn a_list_goes_on_where_one_process_had_more_to_say_than_a_message_holds() {
    let (redis, upstream) = (Redis::start(), upstream());
    let servers = started(&redis, &upstream, 2);
    // Long users make long lists: 200 of them are more than a message may have.
    let user = format!("u{}", "x".repeat(1_000));
    let sockets: Vec<Ws> = (0..200).map(|_| watching(&servers[0], &token_of(&user), "/v1/ws")).collect();
    let (mut seen, mut after, mut pages) = (Vec::new(), String::new(), 0);
    loop {
        let page = list(&servers[1], &format!("?limit=1000{after}"));
        assert_eq!(page["complete"], true, "{}", page["unanswered"]);
        seen.extend(names(&page));
        pages += 1;
        match page["next"].as_str() {
            Some(next) => after = format!("&after={next}"),
            None => break,
        }
    }
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), sockets.len());
    assert!(pages > 1, "{pages}");
}

#[test]
fn a_process_with_another_admin_key_is_not_listed_and_it_is_said() {
    let (redis, upstream) = (Redis::start(), upstream());
    let a = setup(&redis.url(), &upstream).start();
    let b =
        setup(&redis.url(), &upstream).only_admin("key = \"another-admin-key-of-the-tests-that-is-long\"\n").start();
    [&a, &b].into_iter().for_each(connected);
    let (_sse, name) = event_stream(&b, &token_of("u1"));
    let begun = Instant::now();
    let page = list(&a, "");
    assert_eq!((&page["complete"], names(&page).len()), (&json!(false), 0));
    assert_eq!(page["unanswered"], json!([&name[34..50]]));
    assert!(begun.elapsed() < AT_ONCE, "it has said so at once: {:?}", begun.elapsed());
    assert_eq!(renew(&a, &name, &token_of("u1")).status, 200, "who knows the connection's name needs no such key");
}

#[test]
fn nothing_is_sealed_under_an_admin_key_that_can_be_guessed() {
    let (redis, upstream) = (Redis::start(), upstream());
    for (bytes, asked) in [(31, false), (32, true)] {
        let key = "k".repeat(bytes);
        let setup = setup(&redis.url(), &upstream).only_admin(&format!("key = {key:?}\n"));
        let servers = [setup.start(), setup.start()];
        servers.iter().for_each(connected);
        let (_sse, name) = event_stream(&servers[1], &token_of("u1"));
        let eavesdropper = Eavesdropper::of(&redis);
        let answer = Raw::connect(servers[0].admin).request("GET", "/admin/v1/connections", &[bearer(&key)], "");
        assert_eq!(answer.status, 200, "{answer:?}");
        let page = answer.json();
        let detail = page["detail"].as_str().unwrap_or_default();
        assert_eq!(detail.contains("less than 32 bytes"), !asked, "{page}");
        let expected = if asked { vec![name] } else { vec![] };
        assert_eq!(names(&page), expected, "{page}");
        assert!(asked || page["complete"] == false, "{page}");
        let heard = eavesdropper.heard(&redis);
        let lists = |(_, text): &(String, String)| text.contains("\"list\"") || text.contains("\"sealed\"");
        assert_eq!(heard.iter().any(lists), asked, "{heard:?}");
    }
}

#[test]
fn a_user_of_redis_who_may_not_hear_other_processes_still_hears_of_logouts() {
    let rules = "~* &user-logged-out &permission-update &token-revoked +@all";
    let redis = RedisSetup::new().user("ada", "hunter2", rules).start();
    let upstream = upstream();
    let url = redis.url().replace("redis://", "redis://ada:hunter2@");
    let servers: Vec<Server> = (0..2).map(|_| setup(&url, &upstream).start()).collect();
    servers.iter().for_each(connected);
    servers[1].wait_for_log("restcast:processes", 1);
    let (mut sse, name) = event_stream(&servers[0], &token_of("u1"));
    assert_unanswered(&servers[1], &name);
    let page = list(&servers[1], "");
    assert_eq!(page["complete"], false);
    redis.publish("user-logged-out", "u1");
    assert_eq!(sse.next_of("close").data["code"], 4010);
}

#[test]
fn without_redis_a_connection_of_another_process_is_unknown() {
    let upstream = upstream();
    let servers: Vec<Server> =
        (0..2).map(|_| Setup::new().stream("leads", &upstream.url("/leads"), "").start()).collect();
    let (_sse, name) = event_stream(&servers[0], &token_of("u1"));
    assert_eq!(renew(&servers[0], &name, &token_of("u1")).status, 200);
    assert_eq!(outcome(&renew(&servers[1], &name, &token_of("u1"))), is(404, "UNKNOWN_CONNECTION"));
    let page = list(&servers[1], "");
    assert_eq!((&page["complete"], &page["unanswered"], names(&page).len()), (&json!(true), &json!([]), 0));
}

#[test]
fn a_list_looks_through_a_bounded_number_of_connections_in_a_turn() {
    use restcast::limits::LIST_LOOKS_PER_TURN;
    let mut hall = hall::Hall::new(&hall::Setup::new());
    let count = LIST_LOOKS_PER_TURN + 10;
    let (mine, others) = (hall.token(json!({ "sub": "u1" })), hall.token(json!({ "sub": "u2" })));
    for number in 0..count {
        let conn = hall.connect(0);
        let token = if number + 1 == count { &mine } else { &others };
        let request = format!(
            "GET /v1/streams/leads HTTP/1.1\r\nHost: h\r\nAccept: text/event-stream\r\nAuthorization: Bearer {token}\r\n\r\n"
        );
        hall.say(conn, request.as_bytes());
    }
    // Nobody of that user is among the first, and the turn ends all the same.
    let first = hall.list(0, Some("u1"), 0, 100);
    assert_eq!((first.connections.len(), first.next), (0, Some(LIST_LOOKS_PER_TURN)));
    let second = hall.list(0, Some("u1"), LIST_LOOKS_PER_TURN, 100);
    assert_eq!((second.connections.len(), second.next), (1, None));
    assert_eq!(second.connections[0].id.index, count - 1);
    // A page ends where it is full, and goes on behind its last.
    let page = hall.list(0, Some("u2"), 0, 100);
    assert_eq!((page.connections.len(), page.next), (100, Some(100)));
    assert_eq!(hall.list(0, None, count - 1, 1).next, None);
    assert_eq!(hall.list(0, None, u32::MAX, 1).connections.len(), 0);
}

/// What comes back to a question with that salt about the connection with these bits.
type Reply = fn(&RenewalAnswer, u128, [u8; 16]) -> Found;

/// One event stream of `u1`, in a process of its own; its name.
fn hall_with_stream() -> (hall::Hall, ConnectionId) {
    let mut hall = hall::Hall::new(&hall::Setup::new());
    let token = format!("Bearer {}", hall.token(json!({})));
    let headers = [("Accept", "text/event-stream"), ("Authorization", &*token)];
    hall.request(0, "GET", "/v1/streams/leads", &headers);
    let name = hall.list(0, Some("u1"), 0, 1).connections[0].id;
    hall.orders.clear();
    (hall, name)
}

#[test]
fn a_question_that_was_kept_is_not_answered_and_one_that_was_made_up_finds_no_connection() {
    const ASK: PeerAsk = PeerAsk { process: ProcessId(7), ask: 1 };
    const SALT: [u8; 16] = [1; 16];
    let (mut hall, name) = hall_with_stream();
    let token = Secret::new(hall.token(json!({ "permissions": ["p"] })));
    let mut asked = |place: u32, sealed: Vec<u8>| {
        hall.tell_all(|| Input::PeerRenewal { connection: place, sealed: sealed.clone(), ask: ASK });
        let answers: Vec<Option<Vec<u8>>> = hall
            .orders
            .drain(..)
            .map(|order| match order {
                Order::Answer { to, sealed } => {
                    assert_eq!(to, ASK);
                    sealed
                }
                other => panic!("{other:?}"),
            })
            .collect();
        answers
    };
    let ask = |at_s: u64, token: &Secret| RenewalAsk {
        token: token.clone(),
        addr: [192, 0, 2, 1].into(),
        at: WallTime::from_secs(at_s),
    };
    let good = ask(hall::WALL_S, &token).seal(name.random, SALT);
    let answers = asked(name.index, good.clone());
    let [Some(sealed)] = answers.as_slice() else { panic!("{answers:?}") };
    let answer = RenewalAnswer::open(name.random, SALT, sealed).expect("an answer to that question");
    assert_eq!((answer.status, answer.late), (200, false));
    assert!(answer.text.contains(r#""permissions":["p"]"#), "{}", answer.text);
    let refused = asked(name.index, ask(hall::WALL_S, &Secret::new("x")).seal(name.random, [2; 16]));
    let answer = RenewalAnswer::open(name.random, [2; 16], refused[0].as_deref().expect("an answer")).expect("one");
    assert_eq!((answer.status, answer.code.as_deref()), (401, Some("INVALID_TOKEN")));
    // Who does not know the name, or says the place of nobody.
    let forged = ask(hall::WALL_S, &token).seal(name.random ^ 1, SALT);
    let other_answer = sealed.clone();
    for (place, sealed) in [
        (name.index, forged),
        (name.index, Vec::new()),
        (name.index, vec![0; 15]),
        (name.index, other_answer),
        (name.index + 1, good.clone()),
        (u32::MAX, good),
    ] {
        assert_eq!(asked(place, sealed), [None], "at {place}");
    }
    // An old one may be somebody's who has listened.
    assert_eq!(asked(name.index, ask(hall::WALL_S - 31, &token).seal(name.random, SALT)), [] as [Option<Vec<u8>>; 0]);
}

#[test]
fn a_renewal_that_is_played_again_neither_takes_a_later_one_back_nor_counts_as_a_refusal() {
    let (mut hall, name) = hall_with_stream();
    let ask = |token: String, salt: u8, hall: &hall::Hall| {
        let (token, addr) = (Secret::new(token), [192, 0, 2, 1].into());
        RenewalAsk { token, addr, at: hall.wall() }.seal(name.random, [salt; 16])
    };
    let asked = |hall: &mut hall::Hall, sealed: &[u8]| {
        let to = PeerAsk { process: ProcessId(7), ask: 1 };
        hall.tell_all(|| Input::PeerRenewal { connection: name.index, sealed: sealed.to_vec(), ask: to });
        let answered = hall.orders.drain(..).filter(|order| matches!(order, Order::Answer { .. })).count();
        (answered, hall.list(0, Some("u1"), name.index, 1).connections[0].expires_at)
    };
    let ends = |after_s: u64| Some(WallTime::from_secs(hall::WALL_S + after_s));
    let sooner = ask(hall.token(json!({ "exp": hall::WALL_S + 7_200 })), 1, &hall);
    assert_eq!(asked(&mut hall, &sooner), (1, ends(7_200)));
    let later = ask(hall.token(json!({ "exp": hall::WALL_S + 9_000 })), 2, &hall);
    assert_eq!(asked(&mut hall, &later), (1, ends(9_000)));
    assert_eq!(asked(&mut hall, &sooner), (0, ends(9_000)), "what came between stays");
    // As long as it would be of now, and beyond.
    for _ in 0..4 {
        hall.pass(hall::SECOND * 10);
        assert_eq!(asked(&mut hall, &sooner), (0, ends(9_000)));
    }
    // Five refusals in a row would close the connection; the same one five times is one.
    let refused = ask("nonsense".to_owned(), 3, &hall);
    for time in 0..6 {
        assert_eq!(asked(&mut hall, &refused), (usize::from(time == 0), ends(9_000)), "time {time}");
    }
    let again = ask(hall.token(json!({ "exp": hall::WALL_S + 9_100 })), 4, &hall);
    assert_eq!(asked(&mut hall, &again), (1, ends(9_100)));
}

#[test]
fn a_list_that_is_asked_for_again_by_one_who_listened_is_not_made_again() {
    let (redis, upstream) = (Redis::start(), upstream());
    let servers = started(&redis, &upstream, 2);
    let mut eavesdropper = Eavesdropper::of(&redis);
    eventually("they know each other", || (list(&servers[1], "")["complete"] == true).then_some(()));
    list(&servers[1], "");
    let question = loop {
        let text = eavesdropper.next_on("restcast:processes");
        if text.contains("\"list\"") {
            break text;
        }
    };
    let mut question: Value = serde_json::from_str(&question).expect("JSON");
    let forger = "00000000000000aa";
    question["from"] = json!(forger);
    for _ in 0..20 {
        redis.publish("restcast:processes", &question.to_string());
    }
    // What was published before is answered before this is, by the one thread that makes lists.
    list(&servers[1], "");
    let heard = eavesdropper.heard(&redis);
    let to_forger = format!("restcast:process:{forger}");
    assert!(!heard.iter().any(|(channel, text)| *channel == to_forger && text.contains("sealed")), "{heard:?}");
}

#[test]
fn a_renewal_that_came_to_nothing_in_time_is_not_carried_out_afterwards() {
    use restcast::limits::PEER_RENEWAL_TIME;
    for (waits, carried_out) in [(PEER_RENEWAL_TIME, true), (PEER_RENEWAL_TIME + hall::MS, false)] {
        let (mut hall, name) = hall_with_stream();
        let renewed = hall.token(json!({ "exp": hall::WALL_S + 7_200 }));
        let made = hall.request(0, "POST", "/v1/tickets", &[("Authorization", &format!("Bearer {renewed}"))]);
        let ticket = hall.answered(made).1["ticket"].as_str().expect("a ticket").to_owned();
        // The store keeps the owner waiting for the ticket.
        hall.answers = false;
        let ask = RenewalAsk { token: Secret::new(ticket), addr: [192, 0, 2, 1].into(), at: hall.wall() };
        let sealed = ask.seal(name.random, [1; 16]);
        let to = PeerAsk { process: ProcessId(7), ask: 1 };
        hall.tell_all(|| Input::PeerRenewal { connection: name.index, sealed: sealed.clone(), ask: to });
        hall.pass(waits);
        hall.orders.clear();
        hall.answer_all();
        let [Order::Answer { sealed: Some(sealed), .. }] = hall.orders.as_slice() else { panic!("{:?}", hall.orders) };
        let answer = RenewalAnswer::open(name.random, [1; 16], sealed).expect("an answer");
        let ends = hall.list(0, Some("u1"), name.index, 1).connections[0].expires_at.expect("an end");
        let expected = if carried_out { (200, 7_200) } else { (503, 3_600) };
        assert_eq!((answer.status, ends), (expected.0, WallTime::from_secs(hall::WALL_S + expected.1)));
    }
}

#[test]
fn a_request_that_another_process_is_to_answer_is_answered_whatever_comes_back() {
    let (mut hall, name) = hall_with_stream();
    hall.answers = false;
    let elsewhere = ConnectionId { process: ProcessId(name.process.0 ^ 1), ..name };
    let body = json!({ "token": hall.token(json!({})) }).to_string();
    let post = |hall: &mut hall::Hall| {
        let conn = hall.connect(0);
        let length = body.len();
        let head =
            format!("POST /v1/connections/{elsewhere}/auth HTTP/1.1\r\nHost: h\r\nContent-Length: {length}\r\n\r\n");
        hall.say(conn, format!("{head}{body}").as_bytes());
        let question = hall.questions.pop_front().expect("it is asked");
        let Lookup::Renew { process, core, index, sealed } = &question.lookup else { panic!("{question:?}") };
        assert_eq!((*process, *core, *index), (elsewhere.process, elsewhere.core, elsewhere.index));
        let asked = RenewalAsk::open(elsewhere.random, sealed).expect("whoever gave the name reads it");
        assert!(body.contains(std::str::from_utf8(asked.token.expose_secret()).expect("text")));
        let salt: [u8; 16] = *sealed.first_chunk().expect("a salt");
        (conn, question.ask, salt)
    };
    let ok = RenewalAnswer {
        status: 200,
        code: None,
        text: "{\"type\":\"auth_ok\"}".into(),
        retry_after_s: None,
        late: false,
    };
    let cases: [(&str, Reply, (u16, &str)); 5] = [
        ("good", |ok, random, salt| Found::Renewed(Some(ok.seal(random, salt, [2; 16]))), (200, "")),
        (
            "to another question",
            |ok, random, _| Found::Renewed(Some(ok.seal(random, [0; 16], [2; 16]))),
            (503, "SESSION_STORE_UNAVAILABLE"),
        ),
        ("garbage", |_, _, _| Found::Renewed(Some(vec![1, 2, 3])), (503, "SESSION_STORE_UNAVAILABLE")),
        ("nobody", |_, _, _| Found::Renewed(None), (404, "UNKNOWN_CONNECTION")),
        ("away", |_, _, _| Found::Unavailable, (503, "SESSION_STORE_UNAVAILABLE")),
    ];
    for (what, found, (status, code)) in cases {
        let (conn, ask, salt) = post(&mut hall);
        let found = found(&ok, elsewhere.random, salt);
        hall.tell_all(|| Input::Found { ask, found: found.clone() });
        assert_eq!(hall.refused(conn), (status, code.to_owned()), "{what}");
    }
    // Nobody waits for ever, not even where the store never answers.
    let (conn, ..) = post(&mut hall);
    hall.pass(restcast::limits::LOOKUP_TIMEOUT + hall::SECOND);
    assert_eq!(hall.answered(conn).0, 503);
}
