//! API keys shared through Redis: made, used, ended and deleted at different processes; Redis away, slow, emptied or behind;
//! against the built server and a real Redis.

mod support;

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};
use support::redis::{RedisSetup, Said};
use support::server::{
    Answer, PATIENCE, Server, Setup, Ws, away, bearer, connected, eventually, keys, now_us, refused, token_of,
};
use support::{Folder, Proxy, Redis, Upstream};

/// Until when an event acts that has reached the process (protocol section 5).
const BOUND: Duration = Duration::from_millis(250);
/// The hash that the keys stand in.
const HASH: &str = "restcast:api_keys";
/// How often a bound is tried: a busy machine may be late now and then, not always.
const TRIES: usize = 5;

fn upstream() -> Upstream {
    let upstream = Upstream::start();
    upstream.set_json("/leads", r#"[{"id":1}]"#);
    upstream
}

fn alone(upstream: &Upstream) -> Setup {
    Setup::new().stream("leads", &upstream.url("/leads"), "")
}

/// With a Redis that may be slow, as the machine may be: what is away is noticed all the same.
fn setup(url: &str, upstream: &Upstream) -> Setup {
    alone(upstream).redis(url, "timeout = \"5s\"")
}

/// Makes a key of that id: its text.
fn make(server: &Server, id: &str) -> String {
    let answer = keys(server, "POST", "", &json!({ "id": id, "streams": ["leads"] }).to_string());
    assert_eq!(answer.status, 201, "{answer:?}");
    answer.json()["key"].as_str().expect("a key").to_owned()
}

fn delete(server: &Server, id: &str) -> u16 {
    keys(server, "DELETE", &format!("/{id}"), "").status
}

fn list(server: &Server) -> Value {
    keys(server, "GET", "", "").json()
}

fn with(key: &str) -> [(&'static str, String); 1] {
    [("X-Api-Key", key.to_owned())]
}

fn status(server: &Server, key: &str) -> u16 {
    server.get("/v1/streams/leads", &with(key)).status
}

fn watch(server: &Server, key: &str) -> Ws {
    let mut ws = server.ws("/v1/streams/leads", &with(key));
    ws.next_of("snapshot");
    ws
}

fn revoked() -> (u16, String) {
    (4010, "api_key_revoked".to_owned())
}

fn becomes(server: &Server, key: &str, wanted: u16) {
    eventually(&format!("the key is {wanted}"), || (status(server, key) == wanted).then_some(()));
}

/// Tells all processes that the keys have changed, as one of them would.
fn notice(redis: &Redis) {
    redis.command(&["XADD", "restcast:control", "*", "event", "api-keys-changed", "data", "{}"]);
}

#[test]
fn a_key_made_at_one_process_is_good_at_every_other_within_250_ms() {
    let (redis, upstream) = (Redis::start(), upstream());
    let servers: Vec<Server> = (0..3).map(|_| setup(&redis.url(), &upstream).cores(2).start()).collect();
    servers.iter().for_each(connected);
    let mut took = Vec::new();
    for round in 0..TRIES {
        let id = format!("k{round}");
        let key = make(&servers[0], &id);
        let made = Instant::now();
        for server in &servers[1..] {
            becomes(server, &key, 200);
        }
        took.push(made.elapsed());
        for server in &servers[1..] {
            watch(server, &key);
            assert_eq!(list(server), list(&servers[0]));
        }
        // Each process makes keys.
        let there = make(&servers[2], &format!("there{round}"));
        becomes(&servers[0], &there, 200);
    }
    assert!(took.iter().any(|took| *took < BOUND), "{took:?}");
    // What stands in Redis is no key.
    let key = make(&servers[0], "last");
    let kept = redis.text(&["HGET", HASH, "last"]).expect("a record");
    assert!(kept.contains("sha256:") && !kept.contains(&key[key.len() - 43..]), "{kept}");
    let stream = format!("{:?}", redis.command(&["XRANGE", "restcast:control", "-", "+"]));
    assert!(!stream.contains(&key[key.len() - 43..]) && !stream.contains("sha256:"));
    for server in &servers {
        assert!(!server.log_text().contains("sha256:") && !server.metrics().contains("sha256:"));
    }
}

#[test]
fn a_key_deleted_at_one_process_closes_its_connections_at_every_other_within_250_ms() {
    let (redis, upstream) = (Redis::start(), upstream());
    let servers: Vec<Server> = (0..2).map(|_| setup(&redis.url(), &upstream).cores(2).start()).collect();
    servers.iter().for_each(connected);
    let stays = make(&servers[0], "stays");
    becomes(&servers[1], &stays, 200);
    let mut others: Vec<Ws> = servers.iter().map(|server| watch(server, &stays)).collect();
    let mut user = servers[1].ws("/v1/streams/leads", &[bearer(&token_of("victim"))]);
    user.next_of("snapshot");
    let mut took = Vec::new();
    for round in 0..TRIES {
        // The same id again and again: each time it is another key.
        let key = make(&servers[round % 2], "victim");
        servers.iter().for_each(|server| becomes(server, &key, 200));
        let mut theirs: Vec<Ws> = servers.iter().flat_map(|server| (0..12).map(|_| watch(server, &key))).collect();
        let mut sse = servers[1].sse("/v1/streams/leads", &with(&key));
        sse.next_of("snapshot");
        let begun = Instant::now();
        assert_eq!(delete(&servers[0], "victim"), 204);
        theirs.iter_mut().for_each(|ws| assert_eq!(ws.closed(), revoked()));
        assert_eq!(sse.next_of("close").data["reason"], "api_key_revoked");
        took.push(begun.elapsed());
        for server in &servers {
            assert_eq!((status(server, &key), delete(server, "victim")), (401, 404));
        }
    }
    assert!(took.iter().any(|took| *took < BOUND), "{took:?}");
    upstream.set_json("/leads", r#"[{"id":2}]"#);
    others.iter_mut().for_each(|ws| drop(ws.next_of("snapshot")));
    user.next_of("snapshot");
    assert_eq!(list(&servers[0])["keys"].as_array().map(Vec::len), Some(1));
    assert_eq!(redis.number(&["HLEN", HASH]), 3, "the key that stays, the epoch and the history");
}

#[test]
fn a_process_that_starts_has_the_keys_before_it_is_ready() {
    let (redis, upstream) = (Redis::start(), upstream());
    let first = setup(&redis.url(), &upstream).start();
    let (key, gone) = (make(&first, "a"), make(&first, "b"));
    let folder = Folder::new("shared-starts");
    let second = setup(&redis.url(), &upstream).server(&folder.state_line()).start();
    assert_eq!((status(&second, &key), status(&second, &gone)), (200, 200));
    assert_eq!(list(&second), list(&first));
    drop(second);
    // What was deleted while it was not there is deleted, whatever its file says.
    assert!(fs::read_to_string(folder.state()).is_ok_and(|text| text.contains("\"b\"")));
    assert_eq!(delete(&first, "b"), 204);
    let second = setup(&redis.url(), &upstream).server(&folder.state_line()).start();
    assert_eq!((status(&second, &key), status(&second, &gone)), (200, 401));
    assert_eq!(list(&second), list(&first));
}

#[test]
fn a_key_ends_at_its_time_at_every_process() {
    let (redis, upstream) = (Redis::start(), upstream());
    let servers: Vec<Server> = (0..2).map(|_| setup(&redis.url(), &upstream).start()).collect();
    servers.iter().for_each(connected);
    let expires = now_us() + 2_500_000;
    let wanted = json!({ "id": "soon", "streams": ["leads"], "expires_at": expires });
    let answer = keys(&servers[0], "POST", "", &wanted.to_string());
    let key = answer.json()["key"].as_str().expect("a key").to_owned();
    becomes(&servers[1], &key, 200);
    let mut theirs: Vec<Ws> = servers.iter().map(|server| watch(server, &key)).collect();
    for ws in &mut theirs {
        assert_eq!(ws.closed(), (4001, "api_key_expired".to_owned()));
    }
    assert!(now_us() >= expires);
    for server in &servers {
        assert_eq!(server.get("/v1/streams/leads", &with(&key)).code(), "TOKEN_EXPIRED");
    }
}

#[test]
fn of_two_processes_that_make_the_same_id_at_once_one_has_it() {
    let (redis, upstream) = (Redis::start(), upstream());
    let servers: Vec<Server> = (0..2).map(|_| setup(&redis.url(), &upstream).start()).collect();
    servers.iter().for_each(connected);
    for round in 0..8 {
        let body = json!({ "id": format!("same{round}"), "streams": ["leads"] }).to_string();
        let answers: Vec<Answer> = thread::scope(|scope| {
            let asked: Vec<_> = servers.iter().map(|server| scope.spawn(|| keys(server, "POST", "", &body))).collect();
            asked.into_iter().map(|asked| asked.join().expect("an answer")).collect()
        });
        let mut statuses: Vec<u16> = answers.iter().map(|answer| answer.status).collect();
        statuses.sort_unstable();
        assert_eq!(statuses, [201, 409], "{answers:?}");
        let made = answers.iter().find(|answer| answer.status == 201).expect("one");
        let key = made.json()["key"].as_str().expect("a key").to_owned();
        servers.iter().for_each(|server| becomes(server, &key, 200));
    }
    eventually("they know the same", || (list(&servers[0]) == list(&servers[1])).then_some(()));
}

#[test]
fn while_redis_is_away_keys_are_good_none_is_made_and_a_deletion_holds_and_arrives() {
    let (mut redis, upstream) = (Redis::start(), upstream());
    let folders = [Folder::new("shared-away-a"), Folder::new("shared-away-b")];
    let setups = folders.each_ref().map(|folder| setup(&redis.url(), &upstream).server(&folder.state_line()));
    let mut first = setups[0].start();
    let second = setups[1].start();
    let (key, gone) = (make(&first, "stays"), make(&first, "gone"));
    becomes(&second, &gone, 200);
    let mut there = watch(&second, &gone);
    let mut stays = watch(&second, &key);
    redis.kill();
    away(&first);
    let answer = keys(&first, "POST", "", &json!({ "streams": ["leads"] }).to_string());
    assert_eq!((answer.status, answer.code()), (503, "SESSION_STORE_UNAVAILABLE".into()), "{answer:?}");
    assert!(answer.header("retry-after").is_some());
    let unknown = keys(&first, "DELETE", "/unheard-of", "");
    assert_eq!(unknown.code(), "SESSION_STORE_UNAVAILABLE", "whether there is such a key cannot be known");
    // What is deleted is deleted, here at once.
    let mut here = watch(&first, &gone);
    assert_eq!(delete(&first, "gone"), 204);
    assert_eq!(here.closed(), revoked());
    assert_eq!((status(&first, &gone), delete(&first, "gone")), (401, 404));
    first.wait_for_log("it will be in Redis, and so everywhere, once Redis answers", 1);
    // The process may die before Redis is there again, and start without it.
    first.signal(Signal::KILL);
    first.wait();
    let first = setups[0].start();
    first.wait_for_log("The API keys in Redis could not be read yet", 1);
    assert_eq!((status(&first, &gone), status(&first, &key)), (401, 200));
    assert_eq!(status(&second, &gone), 200, "nobody could tell it");
    redis.restart();
    assert_eq!(there.closed(), revoked());
    for server in [&first, &second] {
        becomes(server, &gone, 401);
        assert_eq!(status(server, &key), 200);
    }
    eventually("Redis has it", || (redis.number(&["HEXISTS", HASH, "gone"]) == 0).then_some(()));
    eventually("they know the same", || (list(&first) == list(&second)).then_some(()));
    upstream.set_json("/leads", r#"[{"id":2}]"#);
    stays.next_of("snapshot");
    eventually("keys are made again", || {
        (keys(&first, "POST", "", &json!({ "id": "new", "streams": ["leads"] }).to_string()).status == 201)
            .then_some(())
    });
}

#[test]
fn a_process_that_was_cut_off_alone_hears_afterwards_of_what_was_made_and_deleted() {
    let (redis, upstream) = (Redis::start(), upstream());
    let proxy = Proxy::to(redis.address());
    let (first, second) =
        (setup(&redis.url(), &upstream).start(), setup(&redis.url_at(proxy.address()), &upstream).start());
    connected(&second);
    let key = make(&first, "a");
    becomes(&second, &key, 200);
    let mut there = watch(&second, &key);
    proxy.down();
    away(&second);
    assert_eq!(delete(&first, "a"), 204);
    // Another under its id, so that the id alone tells nothing.
    let (other, more) = (make(&first, "a"), make(&first, "b"));
    assert_eq!((status(&second, &key), status(&second, &other)), (200, 401));
    // It deletes the key that it knows: that is not the one that has its id now.
    assert_eq!(delete(&second, "a"), 204);
    assert_eq!(there.closed(), revoked());
    proxy.heal();
    becomes(&second, &more, 200);
    becomes(&second, &other, 200);
    assert_eq!((status(&second, &key), status(&first, &other)), (401, 200));
    eventually("they know the same", || (list(&first) == list(&second)).then_some(()));
}

#[test]
fn a_key_whose_making_was_not_answered_is_nobodys() {
    let (redis, upstream) = (Redis::start(), upstream());
    let server = alone(&upstream).redis(&redis.url(), "timeout = \"3s\"").start();
    connected(&server);
    make(&server, "known");
    redis.pause();
    let answer = keys(&server, "POST", "", &json!({ "id": "orphan", "streams": ["leads"] }).to_string());
    assert_eq!((answer.status, answer.code()), (503, "SESSION_STORE_UNAVAILABLE".into()), "{answer:?}");
    assert!(!answer.text().contains("rck_"));
    redis.resume();
    connected(&server);
    // Redis carries out what it was sent, and has it taken back.
    eventually("it is gone", || (redis.number(&["HEXISTS", HASH, "orphan"]) == 0).then_some(()));
    eventually("the id is free", || {
        (keys(&server, "POST", "", &json!({ "id": "orphan", "streams": ["leads"] }).to_string()).status == 201)
            .then_some(())
    });
    let listed = list(&server);
    assert_eq!(listed["keys"].as_array().map(Vec::len), Some(2), "{listed}");
}

#[test]
fn a_redis_that_has_lost_everything_gets_the_keys_back_but_none_that_was_deleted() {
    let (mut redis, upstream) = (Redis::start(), upstream());
    let servers: Vec<Server> = (0..2).map(|_| setup(&redis.url(), &upstream).start()).collect();
    servers.iter().for_each(connected);
    let (key, gone) = (make(&servers[0], "stays"), make(&servers[0], "gone"));
    becomes(&servers[1], &gone, 200);
    let record = redis.text(&["HGET", HASH, "gone"]).expect("a record");
    let mut watching: Vec<Ws> = servers.iter().map(|server| watch(server, &key)).collect();
    assert_eq!(delete(&servers[0], "gone"), 204);
    becomes(&servers[1], &gone, 401);
    redis.restart_empty();
    eventually("it is given back", || (redis.number(&["HEXISTS", HASH, "stays"]) == 1).then_some(()));
    servers.iter().for_each(connected);
    assert_eq!(redis.number(&["HLEN", HASH]), 3);
    // A server that takes over and has not heard of a deletion is told of it again; nobody believes it meanwhile.
    redis.command(&["HSET", HASH, "gone", &record]);
    notice(&redis);
    eventually("it is deleted again", || {
        assert!(servers.iter().all(|server| status(server, &gone) == 401));
        (redis.number(&["HEXISTS", HASH, "gone"]) == 0).then_some(())
    });
    upstream.set_json("/leads", r#"[{"id":2}]"#);
    for (server, ws) in servers.iter().zip(&mut watching) {
        ws.next_of("snapshot");
        assert_eq!((status(server, &key), status(server, &gone)), (200, 401));
        assert_eq!(list(server), list(&servers[0]));
    }
}

/// One that keeps its data only when told to, so that it can be started again older than it was.
fn saved_when_told() -> Redis {
    RedisSetup::new().line("appendonly no").start()
}

#[test]
fn a_redis_that_comes_back_older_deletes_no_key_and_brings_none_back() {
    let (mut redis, upstream) = (saved_when_told(), upstream());
    let servers: Vec<Server> = (0..2).map(|_| setup(&redis.url(), &upstream).start()).collect();
    servers.iter().for_each(connected);
    let (old, gone) = (make(&servers[0], "old"), make(&servers[1], "gone"));
    servers.iter().for_each(|server| becomes(server, &gone, 200));
    redis.command(&["SAVE"]);
    // Since then one was deleted, and one made at each, of which the other has heard.
    assert_eq!(delete(&servers[0], "gone"), 204);
    let made: Vec<String> = (0..2).map(|n| make(&servers[n], &format!("new{n}"))).collect();
    for server in &servers {
        becomes(server, &gone, 401);
        made.iter().for_each(|key| becomes(server, key, 200));
    }
    let mut watching: Vec<Ws> = servers.iter().flat_map(|server| made.iter().map(|key| watch(server, key))).collect();
    // That "gone" is no longer there each may have heard by reading Redis again: that it may say, once, and no more.
    let said_gone: Vec<usize> = servers.iter().map(|server| server.log_count("are no longer in Redis")).collect();
    for _ in 0..2 {
        redis.restart();
        eventually("it gets back what it has forgotten", || {
            let fields = ["new0", "new1", "old", "gone"].map(|id| redis.number(&["HEXISTS", HASH, id]));
            (fields == [1, 1, 1, 0]).then_some(())
        });
        for (server, said) in servers.iter().zip(&said_gone) {
            connected(server);
            assert_eq!((status(server, &old), status(server, &gone)), (200, 401));
            assert!(made.iter().all(|key| status(server, key) == 200));
            assert_eq!(server.log_count("are no longer in Redis"), *said);
        }
    }
    upstream.set_json("/leads", r#"[{"id":2}]"#);
    watching.iter_mut().for_each(|ws| drop(ws.next_of("snapshot")));
    // Deleting is deleting, as before.
    assert_eq!(delete(&servers[0], "new1"), 204);
    becomes(&servers[1], &made[1], 401);
}

#[test]
fn a_key_made_just_before_redis_comes_back_older_is_carried_over_though_as_much_has_happened_since() {
    let (mut redis, upstream) = (saved_when_told(), upstream());
    let first = setup(&redis.url(), &upstream).start();
    connected(&first);
    make(&first, "old");
    redis.command(&["SAVE"]);
    let key = make(&first, "new");
    // It hears nothing of the restart until somebody else has made as many changes as were lost.
    first.signal(Signal::STOP);
    redis.restart();
    let second = setup(&redis.url(), &upstream).start();
    let other = make(&second, "other");
    first.signal(Signal::CONT);
    becomes(&second, &key, 200);
    becomes(&first, &other, 200);
    assert_eq!(status(&first, &key), 200);
    eventually("they know the same", || (list(&first) == list(&second)).then_some(()));
    assert_eq!(first.log_count("are no longer in Redis"), 0);
}

#[test]
fn keys_of_the_state_file_are_carried_over_once_and_redis_counts_where_both_have_an_id() {
    let (redis, upstream) = (Redis::start(), upstream());
    let folders = [Folder::new("shared-carried-a"), Folder::new("shared-carried-b")];
    let mut made = Vec::new();
    for folder in &folders {
        let server = alone(&upstream).server(&folder.state_line()).start();
        let own = make(&server, &format!("own{}", made.len()));
        made.push((own, make(&server, "both")));
    }
    let setups = folders.each_ref().map(|folder| setup(&redis.url(), &upstream).server(&folder.state_line()));
    let first = setups[0].start();
    assert_eq!((status(&first, &made[0].0), status(&first, &made[0].1)), (200, 200));
    eventually("they are in Redis", || (redis.number(&["HLEN", HASH]) == 4).then_some(()));
    let second = setups[1].start();
    for server in [&first, &second] {
        becomes(server, &made[0].0, 200);
        becomes(server, &made[1].0, 200);
        becomes(server, &made[0].1, 200);
        becomes(server, &made[1].1, 401);
    }
    second.wait_for_log("are not carried over and end", 1);
    // One that was carried over and is deleted elsewhere is not carried over again.
    drop(first);
    assert_eq!(delete(&second, "own0"), 204);
    let first = setups[0].start();
    assert_eq!((status(&first, &made[0].0), status(&first, &made[1].0)), (401, 200));
    assert_eq!(redis.number(&["HEXISTS", HASH, "own0"]), 0);
    assert_eq!(list(&first), list(&second));
    // Without Redis again it has what it knew; what is made and deleted then is put together afterwards.
    drop(first);
    let lone = alone(&upstream).server(&folders[0].state_line()).start();
    assert_eq!((status(&lone, &made[1].0), delete(&lone, "own1")), (200, 204));
    let alone_made = make(&lone, "alone");
    drop(lone);
    let first = setups[0].start();
    becomes(&second, &alone_made, 200);
    becomes(&second, &made[1].0, 401);
    eventually("they know the same", || (list(&first) == list(&second)).then_some(()));
}

#[test]
fn what_is_no_key_in_redis_harms_nobody_and_can_be_deleted() {
    let (redis, upstream) = (Redis::start(), upstream());
    let server = setup(&redis.url(), &upstream).start();
    let key = make(&server, "good");
    let mut ws = watch(&server, &key);
    let record = redis.text(&["HGET", HASH, "good"]).expect("a record");
    redis.command(&[
        "HSET",
        HASH,
        "junk",
        "hush-hush",
        "not an id!",
        "{}",
        "alias",
        &record,
        "long",
        &"x".repeat(200_000),
    ]);
    for data in ["", "{", "[1]", r#"{"deleted":{"id":"good","mark":"hush-hush"}}"#, r#"{"deleted":"good"}"#] {
        redis.command(&["XADD", "restcast:control", "*", "event", "api-keys-changed", "data", data]);
    }
    server.wait_for_log("records of API keys that cannot be read", 1);
    let listed = list(&server);
    assert_eq!(listed["keys"].as_array().map(Vec::len), Some(1), "{listed}");
    assert_eq!(status(&server, &key), 200);
    for id in ["junk", "alias", "long"] {
        let taken = keys(&server, "POST", "", &json!({ "id": id, "streams": ["leads"] }).to_string());
        assert_eq!(taken.status, 409, "{taken:?}");
        assert_eq!((delete(&server, id), delete(&server, id)), (204, 404), "{id}");
    }
    // The record of a known key that cannot be read leaves the key as it was.
    redis.command(&["HSET", HASH, "good", "hush-hush"]);
    notice(&redis);
    let more = make(&server, "more");
    becomes(&server, &more, 200);
    assert_eq!(status(&server, &key), 200);
    assert!(ws.heard_within(Duration::from_millis(50)).is_none());
    assert_eq!(server.log_count("hush-hush"), 0);
}

#[test]
fn there_are_not_more_keys_in_redis_than_there_may_be_and_what_is_beyond_is_not_read() {
    let (redis, upstream) = (Redis::start(), upstream());
    let server = setup(&redis.url(), &upstream).start();
    let key = make(&server, "good");
    let fill = |from: usize, to: usize| {
        let fields: Vec<String> = (from..to).map(|n| format!("x{n}")).collect();
        let parts = fields.iter().flat_map(|field| [field.as_str(), "x"]);
        redis.command(&["HSET", HASH].into_iter().chain(parts).collect::<Vec<_>>());
    };
    // The epoch, one key, and as many as leave room for one more.
    fill(0, 9_998);
    make(&server, "last");
    let answer = keys(&server, "POST", "", &json!({ "streams": ["leads"] }).to_string());
    assert_eq!(answer.status, 409, "{answer:?}");
    fill(10_000, 30_000);
    notice(&redis);
    let line = server.wait_for_log("The API keys in Redis cannot be read", 1);
    assert!(line.contains("at most 20000 are read"), "{line}");
    assert_eq!(status(&server, &key), 200);
    // Deleting is possible all the same.
    let mut ws = watch(&server, &key);
    assert_eq!(delete(&server, "good"), 204);
    assert_eq!(ws.closed(), revoked());
}

#[test]
fn a_user_of_redis_who_may_not_keep_keys_there_is_told_what_is_refused() {
    let rules = "~sess:* ~restcast:* &user-logged-out &permission-update &token-revoked +get +pttl +xadd +xread +subscribe \
                 +ping +client|setname";
    let redis = RedisSetup::new().user("ada", "sesame", rules).start();
    let upstream = upstream();
    let url = redis.url().replace("redis://", "redis://ada:sesame@");
    let server = setup(&url, &upstream).start();
    connected(&server);
    let line = server.wait_for_log("The API keys in Redis cannot be read", 1);
    assert!(line.contains("it refuses HSETNX: NOPERM"), "{line}");
    let answer = keys(&server, "POST", "", &json!({ "streams": ["leads"] }).to_string());
    assert_eq!(answer.status, 503, "{answer:?}");
    assert!(answer.text().contains("it refuses EVAL: NOPERM"), "{answer:?}");
    // Everything else goes on; and with the rights it needs, so do these, without a restart.
    let control = server.metric(&["restcast_control_events_total"]);
    redis.publish("user-logged-out", "u1");
    eventually("it is heard", || (server.metric(&["restcast_control_events_total"]) > control).then_some(()));
    redis.command(&["ACL", "SETUSER", "ada", "+eval", "+hget", "+hset", "+hsetnx", "+hlen", "+hgetall", "+hdel"]);
    let key = make(&server, "now");
    assert_eq!(status(&server, &key), 200);
}

#[test]
fn a_deletion_that_redis_refuses_is_not_confirmed_and_holds_at_every_process() {
    let rules = "~sess:* ~restcast:* &* +@all";
    let redis = RedisSetup::new().user("ada", "sesame", rules).start();
    let upstream = upstream();
    let url = redis.url().replace("redis://", "redis://ada:sesame@");
    let servers: Vec<Server> = (0..2).map(|_| setup(&url, &upstream).start()).collect();
    servers.iter().for_each(connected);
    let (key, stays) = (make(&servers[0], "gone"), make(&servers[0], "stays"));
    servers.iter().for_each(|server| becomes(server, &stays, 200));
    let mut theirs: Vec<Ws> = servers.iter().map(|server| watch(server, &key)).collect();
    redis.command(&["ACL", "SETUSER", "ada", "-eval"]);
    // The first time, and whoever tries again is told the same.
    for _ in 0..2 {
        let answer = keys(&servers[0], "DELETE", "/gone", "");
        assert_eq!((answer.status, answer.code()), (503, "SESSION_STORE_UNAVAILABLE".into()), "{answer:?}");
        assert!(answer.header("retry-after").is_some());
        let said = answer.text();
        assert!(said.contains("it refuses EVAL: NOPERM") && said.contains("it stays in Redis"), "{said}");
    }
    for (server, ws) in servers.iter().zip(&mut theirs) {
        assert_eq!(ws.closed(), revoked());
        assert_eq!((status(server, &key), status(server, &stays)), (401, 200));
    }
    assert_eq!(redis.number(&["HEXISTS", HASH, "gone"]), 1);
    redis.command(&["ACL", "SETUSER", "ada", "+eval"]);
    assert!([204, 404].contains(&delete(&servers[0], "gone")), "another process may have been first");
    eventually("Redis has it", || (redis.number(&["HEXISTS", HASH, "gone"]) == 0).then_some(()));
    servers.iter().for_each(|server| assert_eq!((status(server, &key), status(server, &stays)), (401, 200)));
}

#[test]
fn deletions_that_somebody_has_made_up_hold_nobody_up_and_push_out_no_real_one() {
    let (redis, upstream) = (Redis::start(), upstream());
    let server = setup(&redis.url(), &upstream).start();
    connected(&server);
    let (key, gone) = (make(&server, "stays"), make(&server, "gone"));
    let record = redis.text(&["HGET", HASH, "gone"]).expect("a record");
    assert_eq!(delete(&server, "gone"), 204);
    let flood = "for i=1,30000 do redis.call('XADD','restcast:control','*','event','api-keys-changed','data',\
                 string.format('{\"deleted\":{\"id\":\"x%d\",\"mark\":\"%016x\"}}',i,i)) end return 1";
    assert_eq!(redis.number(&["EVAL", flood, "0"]), 1);
    // As long as it takes to hear all of them, and longer.
    let until = Instant::now() + Duration::from_secs(3);
    let mut longest = Duration::ZERO;
    while Instant::now() < until {
        let asked = Instant::now();
        assert_eq!(list(&server)["keys"].as_array().map(Vec::len), Some(1));
        longest = longest.max(asked.elapsed());
    }
    assert!(longest < Duration::from_secs(2), "{longest:?}");
    redis.command(&["HSET", HASH, "gone", &record]);
    notice(&redis);
    eventually("it is deleted again", || (redis.number(&["HEXISTS", HASH, "gone"]) == 0).then_some(()));
    assert_eq!((status(&server, &key), status(&server, &gone)), (200, 401));
}

#[test]
fn a_ticket_of_a_key_that_another_process_has_deleted_is_refused() {
    let (redis, upstream) = (Redis::start(), upstream());
    let servers: Vec<Server> = (0..2).map(|_| setup(&redis.url(), &upstream).start()).collect();
    servers.iter().for_each(connected);
    let key = make(&servers[0], "k");
    becomes(&servers[1], &key, 200);
    let answer = servers[1].request("POST", "/v1/tickets", &with(&key), "");
    let ticket = answer.json()["ticket"].as_str().expect("a ticket").to_owned();
    assert_eq!(delete(&servers[0], "k"), 204);
    becomes(&servers[1], &key, 401);
    let answer = servers[1].get(&format!("/v1/streams/leads?ticket={ticket}"), &[]);
    assert_eq!((answer.status, answer.code()), (401, "TOKEN_REVOKED".into()));
}

#[test]
fn two_processes_in_one_directory_share_keys_though_one_has_the_state_file() {
    let (redis, upstream) = (Redis::start(), upstream());
    let setup = setup(&redis.url(), &upstream);
    let first = setup.start();
    let second = setup.start_in(first.directory());
    connected(&second);
    let key = make(&first, "a");
    becomes(&second, &key, 200);
    let there = make(&second, "b");
    becomes(&first, &there, 200);
    second.wait_for_log("are not copied to the state file", 1);
    assert_eq!(delete(&second, "a"), 204);
    becomes(&first, &key, 401);
    assert_eq!(second.log_count("are not copied to the state file"), 1, "that is said once");
}

#[test]
fn a_reload_changes_nothing_about_keys_that_were_made() {
    let (redis, upstream) = (Redis::start(), upstream());
    let setup = setup(&redis.url(), &upstream);
    let server = setup.start();
    let key = make(&server, "a");
    let mut ws = watch(&server, &key);
    server.reload(&setup);
    server.wait_for_log("The configuration was read again.", 1);
    upstream.set_json("/leads", r#"[{"id":2}]"#);
    ws.next_of("snapshot");
    assert_eq!(status(&server, &key), 200);
    assert_eq!(refused(&server, "nonsense").0, 401);
    let fields = match redis.command(&["HKEYS", HASH]) {
        Said::List(fields) => fields.len(),
        other => panic!("{other:?}"),
    };
    assert_eq!(fields, 3);
    let begun = Instant::now();
    drop(server);
    assert!(begun.elapsed() < PATIENCE);
}
