//! The upstream client against a real server that misbehaves, over both drivers.

#![allow(clippy::disallowed_methods, reason = "tests measure how long things take")]

mod support;

use std::net::{IpAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use restcast::limits;
use restcast::runtime::fetch::{FetcherCounts, FetcherOptions, Followers};
use restcast::runtime::resolver::Resolver;
use restcast::stream::budget::{Ask, Budgets, PollLeave, Slot};
use restcast::stream::follow::{Following, Kind};
use restcast::stream::poll::{FetchRequest, FetchResponse, PollNo, Target, UpstreamCode};
use restcast::stream::{CaFile, Options, action};
use restcast::time::Now;
use support::client::{
    Client, NOW, SECOND, become_true, call, connections_become, request, short, short_to_begin, short_to_end, target,
};
use support::{Authority, Coding, Framing, Gate, Reply, Step, Upstream, on_each_driver, self_signed};

fn body(response: &FetchResponse) -> &str {
    std::str::from_utf8(&response.body).expect("UTF-8")
}

// What an upstream should do.

#[test]
fn a_date_to_come_back_at_is_read_by_the_clock_that_wrote_it() {
    on_each_driver(async || {
        let (client, upstream) = (Client::new(), Upstream::start());
        // Ours says January 2027. Theirs is years behind, or years ahead.
        for (date, back) in [
            ("Sun, 06 Nov 1994 08:49:37 GMT", "Sun, 06 Nov 1994 08:49:44 GMT"),
            ("Sun, 06 Nov 2044 08:49:37 GMT", "Sun, 06 Nov 2044 08:49:44 GMT"),
        ] {
            upstream.set("/leads", Reply::status(429).header("Date", date).header("Retry-After", back));
            let response = client.get(&upstream.url("/leads")).await.expect("a response");
            assert_eq!(response.retry_after, Some(7 * SECOND), "{date}");
        }
        upstream.set(
            "/leads",
            Reply::status(503).header("Date", "yesterday").header("Retry-After", "Fri, 15 Jan 2027 08:00:07 GMT"),
        );
        let response = client.get(&upstream.url("/leads")).await.expect("a response");
        assert_eq!(response.retry_after, Some(7 * SECOND), "without a date that can be read it is by ours");
    });
}

#[test]
fn a_value_comes_through_every_framing_and_coding() {
    on_each_driver(async || {
        let (client, upstream) = (Client::new(), Upstream::start());
        let text = format!("[{}1]", "0,".repeat(9000));
        for framing in [Framing::Length, Framing::Chunked(1), Framing::Chunked(700), Framing::Close] {
            for coding in [Coding::Identity, Coding::Gzip, Coding::Deflate] {
                upstream.set("/leads", Reply::json(text.as_str()).framing(framing).coding(coding));
                let response = client.get(&upstream.url("/leads")).await.expect("a response");
                assert_eq!((response.status, body(&response)), (200, text.as_str()), "{framing:?} {coding:?}");
                assert_eq!(response.received, NOW);
            }
        }
    });
}

#[test]
fn a_large_value_comes_whole() {
    on_each_driver(async || {
        let (client, upstream) = (Client::new(), Upstream::start());
        let text = format!("\"{}\"", "x".repeat(4 << 20));
        upstream.set("/leads", Reply::json(text.as_str()));
        let roomy = target(&upstream.url("/leads"), |options| options.response_bytes_max = 8 << 20);
        assert!(body(&client.poll(roomy).await.expect("a response")) == text);
    });
}

#[test]
fn a_request_says_what_the_target_says() {
    on_each_driver(async || {
        let (client, upstream) = (Client::new(), Upstream::start());
        upstream.set_json("/leads", "1");
        let url = upstream.url("/leads?a=b#part").replace("//", "//user:hunter2@");
        let mut asked = target(&url, |options| options.method = "POST".into());
        asked.body = Some(Arc::from(*b"{\"q\":1}"));
        client.poll(asked).await.expect("a response");
        let seen = upstream.requests().remove(0);
        assert_eq!((seen.method.as_str(), seen.target.as_str()), ("POST", "/leads?a=b&key=hunter2-query"));
        assert_eq!(seen.header("host"), Some(upstream.address().to_string().as_str()));
        assert_eq!(seen.header("x-api-key"), Some("hunter2-header"));
        assert_eq!(seen.header("authorization"), Some("Basic dXNlcjpodW50ZXIy"));
        assert_eq!(seen.body, b"{\"q\":1}");
    });
}

#[test]
fn a_urls_user_and_password_go_out_as_basic_credentials() {
    on_each_driver(async || {
        let (client, upstream) = (Client::new(), Upstream::start());
        upstream.set_json("/leads", "1");
        let url = upstream.url("/leads").replacen("://", "://Aladdin:open%20sesame@", 1);
        client.get(&url).await.expect("a response");
        // RFC 7617 section 2.
        let basic = Some("Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==");
        assert_eq!(upstream.requests().last().and_then(|seen| seen.header("authorization")), basic);
    });
}

#[test]
fn validators_go_out_and_come_back() {
    on_each_driver(async || {
        let (client, upstream) = (Client::new(), Upstream::start());
        upstream.set_json("/leads", "1");
        let url = upstream.url("/leads");
        let first = client.get(&url).await.expect("a response");
        assert_eq!(first.validators.etag.as_deref(), Some(b"\"v1\"".as_slice()));
        let again = FetchRequest { target: Arc::new(target(&url, |_| {})), validators: first.validators.clone() };
        let second = client.fetcher.fetch(again, || NOW).await.expect("a response");
        assert_eq!((second.status, second.body.len()), (304, 0));
        assert_eq!(upstream.not_modified_count(), 1);
        assert_eq!(upstream.connection_count(), 1, "304 leaves the connection usable");
    });
}

#[test]
fn statuses_are_answers_without_a_body() {
    on_each_driver(async || {
        let (client, upstream) = (Client::new(), Upstream::start());
        for status in [204, 301, 401, 404, 429, 500, 503] {
            upstream.set("/leads", Reply::body("text/html", "<h1>no</h1>").header("Retry-After", "7"));
            upstream.once("/leads", Reply::status(status).header("Retry-After", "7"));
            let response = client.get(&upstream.url("/leads")).await.expect("a response");
            assert_eq!((response.status, response.body.len()), (status, 0));
            assert_eq!(response.retry_after, Some(7 * SECOND));
        }
        assert_eq!(upstream.connection_count(), 1, "small error bodies are read out of the way");
    });
}

#[test]
fn head_has_no_body_and_interim_responses_are_passed_over() {
    on_each_driver(async || {
        let (client, upstream) = (Client::new(), Upstream::start());
        upstream.set_json("/leads", "[1,2,3]");
        let head = target(&upstream.url("/leads"), |options| options.method = "HEAD".into());
        assert_eq!(client.poll(head).await.expect("a response").body, b"");
        let early = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n4";
        upstream.once("/leads", Reply::raw(*early));
        assert_eq!(body(&client.get(&upstream.url("/leads")).await.expect("a response")), "4");
        assert_eq!(upstream.connection_count(), 1);
    });
}

// Connections.

#[test]
fn connections_are_used_again() {
    on_each_driver(async || {
        let (client, upstream) = (Client::new(), Upstream::start());
        upstream.set_json("/leads", "1");
        for _ in 0..20 {
            client.get(&upstream.url("/leads")).await.expect("a response");
        }
        assert_eq!((upstream.request_count(), upstream.connection_count()), (20, 1));
        assert_eq!(client.fetcher.counts(), FetcherCounts { open: 1, idle: 1 });
    });
}

#[test]
fn a_connection_that_says_close_is_not_used_again() {
    on_each_driver(async || {
        let (client, upstream) = (Client::new(), Upstream::start());
        upstream.set("/leads", Reply::json("1").header("Connection", "close"));
        for _ in 0..3 {
            client.get(&upstream.url("/leads")).await.expect("a response");
        }
        assert_eq!(upstream.connection_count(), 3);
        assert_eq!(client.fetcher.counts().open, 0);
    });
}

#[test]
fn an_idle_connection_found_closed_is_replaced_unseen() {
    on_each_driver(async || {
        let (client, upstream) = (Client::new(), Upstream::start());
        upstream.set("/leads", Reply::json("1").then(Step::Close));
        for _ in 0..5 {
            client.get(&upstream.url("/leads")).await.expect("a response");
            connections_become(&upstream, 0).await;
        }
        assert_eq!((upstream.request_count(), upstream.connection_count()), (5, 5), "no request was sent in vain");
    });
}

#[test]
fn a_kept_connection_that_dies_under_the_request_is_replaced_once() {
    on_each_driver(async || {
        let (client, upstream) = (Client::new(), Upstream::start());
        let url = upstream.url("/leads");
        for death in [Step::Close, Step::Reset] {
            upstream.set("/leads", Reply::json("1"));
            client.get(&url).await.expect("a response");
            let before = upstream.connection_count();
            // The request is read, and the connection ends without an answer: twice would be an error.
            upstream.once("/leads", Reply::steps(vec![death.clone()]));
            client.get(&url).await.expect("the second attempt's response");
            assert_eq!(upstream.connection_count(), before + 1);
            upstream.once("/leads", Reply::steps(vec![death.clone()]));
            upstream.once("/leads", Reply::steps(vec![death]));
            let error = client.get(&url).await.expect_err("a fresh connection is not replaced");
            assert!(matches!(error.code, UpstreamCode::Protocol | UpstreamCode::Unreachable), "{error:?}");
        }
    });
}

#[test]
fn an_action_is_never_sent_twice() {
    on_each_driver(async || {
        let (client, upstream) = (Client::new(), Upstream::start());
        upstream.set("/leads", Reply::json("1"));
        client.get(&upstream.url("/leads")).await.expect("a response");
        upstream.once("/leads", Reply::steps(vec![Step::Close]));
        let action = call("POST", &upstream.url("/leads"), |_| {});
        client.fetcher.act(action, || NOW).await.expect_err("no response");
        assert_eq!((upstream.request_count(), upstream.connection_count()), (2, 2), "over a connection of its own");
        assert_eq!(upstream.requests()[1].body, b"{}");
    });
}

#[test]
fn an_action_that_does_twice_what_it_does_once_goes_over_a_kept_connection() {
    on_each_driver(async || {
        let (client, upstream) = (Client::new(), Upstream::start());
        upstream.set("/leads", Reply::json("1"));
        client.get(&upstream.url("/leads")).await.expect("a response");
        let put = || call("PUT", &upstream.url("/leads"), |_| {});
        client.fetcher.act(put(), || NOW).await.expect("a response");
        assert_eq!(upstream.connection_count(), 1);
        // And once more over a fresh one, where that has been closed before anything of an answer.
        upstream.once("/leads", Reply::steps(vec![Step::Close]));
        client.fetcher.act(put(), || NOW).await.expect("a response");
        assert_eq!((upstream.request_count(), upstream.connection_count()), (4, 2));
        // Never a second time over that.
        upstream.close_connections();
        connections_become(&upstream, 0).await;
        upstream.once("/leads", Reply::steps(vec![Step::Close]));
        client.fetcher.act(put(), || NOW).await.expect_err("no response");
        assert_eq!(upstream.request_count(), 5);
    });
}

#[test]
fn an_action_has_the_bodies_that_it_wants_and_a_failure_its_status_without_one() {
    on_each_driver(async || {
        let (client, upstream) = (Client::new(), Upstream::start());
        let act = async |reply: Reply, change: fn(&mut action::Options)| {
            upstream.set("/act", reply);
            let answer = client.fetcher.act(call("POST", &upstream.url("/act"), change), || NOW).await;
            answer.map(|answer| (answer.status, body(&answer).to_owned())).map_err(|error| error.code)
        };
        let fits = "1".repeat(64 << 10);
        let large = "1".repeat((64 << 10) + 1);
        assert_eq!(act(Reply::json("[1]"), |_| {}).await, Ok((200, "[1]".into())));
        assert_eq!(act(Reply::json("[1]").with_status(422), |_| {}).await, Ok((422, String::new())));
        let both: fn(&mut action::Options) = |options| options.error_body = true;
        assert_eq!(act(Reply::json("[1]").with_status(422), both).await, Ok((422, "[1]".into())));
        assert_eq!(act(Reply::json(fits.as_str()).with_status(422), both).await, Ok((422, fits.clone())));
        assert_eq!(act(Reply::json(large.as_str()).with_status(422), both).await, Ok((422, String::new())));
        let cut = |status| {
            let head = format!("HTTP/1.1 {status} \r\nContent-Length: 10\r\n\r\n[1,").into_bytes();
            Reply::steps(vec![Step::Send(head), Step::Close])
        };
        assert_eq!(act(cut(422), both).await, Ok((422, String::new())), "its status stands");
        assert_eq!(act(cut(200), both).await, Err(UpstreamCode::Protocol));
        let neither: fn(&mut action::Options) = |options| options.reply_body = false;
        assert_eq!(act(Reply::json(large.as_str()), neither).await, Ok((200, String::new())));
        assert_eq!(act(Reply::json(large.as_str()), |_| {}).await, Err(UpstreamCode::TooLarge));
        // What of an answer is not wanted is not waited for either.
        assert_eq!(act(Reply::endless_chunks(), neither).await, Ok((200, String::new())));
    });
}

#[test]
fn bytes_behind_a_response_end_the_connection() {
    on_each_driver(async || {
        let (client, upstream) = (Client::new(), Upstream::start());
        let smuggled = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n1HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n2";
        upstream.set("/leads", Reply::raw(*smuggled));
        for _ in 0..3 {
            assert_eq!(body(&client.get(&upstream.url("/leads")).await.expect("a response")), "1");
        }
        assert_eq!(upstream.connection_count(), 3);
        // The same, but later, on the connection that idles.
        let later = vec![
            Step::Send(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n3".to_vec()),
            Step::Pause(Duration::from_millis(50)),
            Step::Send(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n4".to_vec()),
        ];
        upstream.set("/leads", Reply::steps(later));
        for _ in 0..3 {
            assert_eq!(body(&client.get(&upstream.url("/leads")).await.expect("a response")), "3");
            become_true("what was not asked for", || upstream.answered_count() == upstream.request_count()).await;
        }
        assert_eq!(upstream.connection_count(), 6);
    });
}

#[test]
fn idle_connections_are_bounded_and_expire() {
    on_each_driver(async || {
        let options = FetcherOptions {
            idle_per_origin_max: 2,
            idle_max: 3,
            idle_timeout: 600 * SECOND,
            ..FetcherOptions::default()
        };
        let client = Client::with(options.clone(), Resolver::system());
        let (one, two) = (Upstream::start(), Upstream::start());
        for upstream in [&one, &two] {
            upstream.set("/leads", Reply::json("1").delay(Duration::from_millis(50)));
            let url = upstream.url("/leads");
            let fetches = (0..3).map(|_| client.spawn(target(&url.clone(), |_| {})));
            for fetch in fetches.collect::<Vec<_>>() {
                fetch.await.expect("a response");
            }
        }
        assert_eq!(client.fetcher.counts(), FetcherCounts { open: 3, idle: 3 });
        connections_become(&one, 1).await;
        connections_become(&two, 2).await;
        let options = FetcherOptions { idle_timeout: Duration::from_millis(300), ..options };
        let hasty = Client::with(options, Resolver::system());
        let three = Upstream::start();
        three.set_json("/leads", "1");
        hasty.get(&three.url("/leads")).await.expect("a response");
        become_true("the end of what idles", || hasty.fetcher.counts() == FetcherCounts { open: 0, idle: 0 }).await;
        connections_become(&three, 0).await;
        assert_eq!(client.fetcher.counts(), FetcherCounts { open: 3, idle: 3 }, "the others may idle for longer");
    });
}

#[test]
fn at_the_cap_fetches_wait_their_turn() {
    on_each_driver(async || {
        let options = FetcherOptions { connections_max: 2, waiting_max: 3, ..FetcherOptions::default() };
        let client = Client::with(options, Resolver::system());
        let upstream = Upstream::start();
        // Each is answered so long after the one before that it is so on a busy machine, too.
        let start = |n: usize| {
            let path = format!("/{n}");
            upstream.set(&path, Reply::json("1").delay(Duration::from_millis(if n == 0 { 400 } else { 800 })));
            client.spawn(target(&upstream.url(&path), |_| {}))
        };
        let fetches: Vec<_> = (0..6).map(start).collect();
        let mut outcomes = Vec::new();
        for fetch in fetches {
            outcomes.push(fetch.await);
        }
        let refused = outcomes.pop().expect("six outcomes").expect_err("the sixth is one too many");
        assert_eq!(refused.code, UpstreamCode::Unreachable);
        assert!(outcomes.iter().all(Result::is_ok), "two at once and three that waited");
        let order: Vec<_> = upstream.requests().iter().map(|seen| seen.target[1..2].to_owned()).collect();
        assert_eq!(order[2..], ["2", "3", "4"], "in the order they came");
        assert!(client.fetcher.counts().open <= 2);

        // One that gives up while it waits passes its turn on; an idle connection elsewhere makes room.
        let other = Upstream::start();
        other.set_json("/leads", "1");
        let gate = Gate::default();
        other.set("/slow", Reply::json("1").behind(&gate));
        let slow: Vec<_> = (0..2).map(|_| client.spawn(target(&other.url("/slow"), |_| {}))).collect();
        become_true("both connections", || other.open_connections() == 2).await;
        let detail = client.fails(target(&other.url("/leads"), short), UpstreamCode::Timeout).await;
        assert!(detail.contains("waiting for a free connection"), "{detail}");
        gate.open();
        client.get(&other.url("/leads")).await.expect("a response");
        for slow in slow {
            slow.await.expect("a response");
        }
        assert!(client.fetcher.counts().open <= 2);
    });
}

#[test]
fn at_the_cap_a_connection_goes_from_hand_to_hand() {
    on_each_driver(async || {
        let options = FetcherOptions { connections_max: 1, ..FetcherOptions::default() };
        let (client, upstream) = (Client::with(options, Resolver::system()), Upstream::start());
        upstream.set("/leads", Reply::json("1").delay(Duration::from_millis(5)));
        let url = upstream.url("/leads");
        let fetches: Vec<_> = (0..20).map(|_| client.spawn(target(&url, |_| {}))).collect();
        for fetch in fetches {
            fetch.await.expect("a response");
        }
        assert_eq!((upstream.request_count(), upstream.connection_count()), (20, 1), "not closed for those who wait");
        // One that is given a connection that dies gets a fresh one in its turn.
        upstream.once("/leads", Reply::json("1").delay(Duration::from_millis(50)));
        upstream.once("/leads", Reply::steps(vec![Step::Close]));
        for fetch in [client.spawn(target(&url, |_| {})), client.spawn(target(&url, |_| {}))] {
            fetch.await.expect("a response");
        }
        assert_eq!(upstream.connection_count(), 2);
        // An action waits for a connection of its own.
        upstream.once("/leads", Reply::json("1").delay(Duration::from_millis(50)));
        let poll = client.spawn(target(&url, |_| {}));
        client.fetcher.act(call("POST", &url, |_| {}), || NOW).await.expect("a response");
        poll.await.expect("a response");
        assert_eq!(upstream.connection_count(), 3);
    });
}

fn answered(status: u16) -> FetchResponse {
    let validators = Default::default();
    FetchResponse { status, validators, retry_after: None, fresh_for: None, body: Vec::new(), received: NOW }
}

fn now() -> Now {
    Now { at: restcast::time::Instant::from_micros(1_000_000), wall: NOW }
}

#[test]
fn polls_that_find_no_connection_are_not_held_against_the_upstream() {
    on_each_driver(async || {
        let options = FetcherOptions { connections_max: 1, waiting_max: 1, ..FetcherOptions::default() };
        let (client, upstream) = (Client::with(options, Resolver::system()), Upstream::start());
        upstream.set("/held", Reply::steps(vec![Step::Stall]));
        upstream.set_json("/leads", "1");
        let held = client.spawn(target(&upstream.url("/held"), |_| {}));
        connections_become(&upstream, 1).await;
        let target = Arc::new(target(&upstream.url("/leads"), |options| options.timeout = Duration::from_millis(50)));
        let budgets = Arc::new(Budgets::default());
        let lane = budgets.lane(&target);
        let leave = || lane.ask(now().at, &mut Slot::default(), 60 * SECOND);
        // Before an origin's first answer one request asks for all.
        let Ask::Go(permit) = leave() else { panic!("nobody has asked yet") };
        PollLeave::Given(permit).answered(now().at, &answered(200));
        let mut waited = Vec::new();
        for _ in 0..2 * limits::BREAKER_FAILURES {
            let Ask::Go(permit) = leave() else { panic!("the origin has done nothing wrong") };
            let request = FetchRequest { target: Arc::clone(&target), validators: Default::default() };
            let fetcher = client.fetcher.clone();
            waited.push(monoio::spawn(async move { fetcher.poll(request, PollLeave::Given(permit), now).await }));
        }
        let mut details = Vec::new();
        for poll in waited {
            details.push(poll.await.expect_err("no connection is free").detail);
        }
        let of = |words: &str| details.iter().filter(|detail| detail.contains(words)).count();
        assert_eq!((of("waiting for a free connection"), of("too many requests wait")), (1, details.len() - 1));
        assert!(matches!(leave(), Ask::Go(_)));
        drop(held);
    });
}

#[test]
fn what_is_followed_takes_no_connection_from_polls_and_has_a_bound_of_its_own() {
    on_each_driver(async || {
        let options = FetcherOptions { connections_max: 1, followed_max: 2, ..FetcherOptions::default() };
        let (client, upstream) = (Client::with(options, Resolver::system()), Upstream::start());
        let head = "HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n\r\n7\n";
        upstream.set("/lines", Reply::steps(vec![Step::Send(head.into()), Step::Stall]));
        upstream.set_json("/leads", "1");
        let follow = Following {
            kind: Kind::Ndjson,
            events: Vec::new(),
            gap: Duration::from_millis(1),
            idle_timeout: 60 * SECOND,
        };
        let followed = Arc::new(target(&upstream.url("/lines"), |options| options.follow = Some(follow)));
        let (budgets, followers) = (Arc::new(Budgets::default()), Followers::default());
        let lane = budgets.lane(&followed);
        let next = |stream| {
            let request = FetchRequest { target: Arc::clone(&followed), validators: Default::default() };
            followers.next((stream, PollNo(1)), (request, Arc::clone(&lane), false), &client.fetcher, now)
        };
        for stream in 0..2 {
            assert_eq!(body(&next(stream).await.expect("a line")), "7");
        }
        client.get(&upstream.url("/leads")).await.expect("a connection is left for it");
        for _ in 0..2 * limits::BREAKER_FAILURES {
            let error = next(2).await.expect_err("there is no place");
            assert_eq!((error.code, error.detail.contains("followed")), (UpstreamCode::Unreachable, true), "{error:?}");
        }
        assert_eq!((client.fetcher.counts().open, upstream.request_count()), (3, 3));
        // The place of one that has ended is another's, and nothing was held against the upstream.
        followers.forget(0, PollNo(1));
        connections_become(&upstream, 2).await;
        assert_eq!(body(&next(2).await.expect("a line")), "7");
        (1..3).for_each(|stream| followers.forget(stream, PollNo(1)));
        connections_become(&upstream, 1).await;
    });
}

#[test]
fn under_load_and_faults_the_bounds_hold_and_all_comes_back() {
    on_each_driver(async || {
        let options = FetcherOptions { connections_max: 8, idle_max: 4, ..FetcherOptions::default() };
        let (client, one, two) = (Client::with(options, Resolver::system()), Upstream::start(), Upstream::start());
        let mut random = 7u64;
        let mut fetches = Vec::new();
        for n in 0..400 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let (path, upstream) = (format!("/{n}"), if random >> 60 & 1 == 0 { &one } else { &two });
            upstream.set(&path, Reply::json("1"));
            match random >> 40 & 15 {
                0 => upstream.once(&path, Reply::steps(vec![Step::Close])),
                1 => upstream.once(&path, Reply::steps(vec![Step::Reset])),
                2 => upstream.once(&path, Reply::raw(*b"garbage\r\n\r\n")),
                3 => upstream.once(&path, Reply::json("1").then(Step::Close)),
                4 => upstream.once(&path, Reply::json("1").header("Connection", "close")),
                5 => upstream.once(&path, Reply::json("1").delay(Duration::from_millis(3))),
                _ => {}
            }
            let (fetcher, asked) = (client.fetcher.clone(), request(target(&upstream.url(&path), |_| {})));
            let patience = random >> 30 & 127;
            // Some give up, wherever they happen to be.
            fetches.push(monoio::spawn(async move {
                let fetch = fetcher.fetch(asked, || NOW);
                if patience < 20 {
                    let _ = monoio::time::timeout(Duration::from_millis(patience), fetch).await;
                } else if let Err(error) = fetch.await {
                    assert!(matches!(error.code, UpstreamCode::Protocol | UpstreamCode::Unreachable), "{error:?}");
                }
            }));
        }
        for fetch in fetches {
            fetch.await;
            assert!(client.fetcher.counts().open <= 8);
            assert!(one.open_connections() + two.open_connections() <= 16, "no more than may, and those being closed");
        }
        // A close in the ring is not at once.
        for _ in 0..200 {
            let FetcherCounts { open, idle } = client.fetcher.counts();
            if open == idle && one.open_connections() + two.open_connections() <= idle {
                break;
            }
            monoio::time::sleep(Duration::from_millis(10)).await;
        }
        let FetcherCounts { open, idle } = client.fetcher.counts();
        assert!(open == idle && idle <= 4, "{open} open, {idle} idle");
        // One that its upstream closed while it idled may be found out by its next use only.
        assert!(one.open_connections() + two.open_connections() <= idle);
    });
}

// Time-outs.

#[test]
fn silence_and_drips_time_out() {
    on_each_driver(async || {
        let (client, upstream) = (Client::new(), Upstream::start());
        let url = upstream.url("/leads");
        upstream.set("/leads", Reply::steps(vec![Step::Stall]));
        let began = Instant::now();
        let detail = client.fails(target(&url, short_to_begin), UpstreamCode::Timeout).await;
        assert!(detail.contains("150ms") && detail.contains("first byte"), "{detail}");
        assert!(began.elapsed() < 30 * SECOND);
        for reply in [
            Reply::json("[1]").drip(1, Duration::from_millis(100)),
            Reply::promise(100),
            Reply::json("[1]").framing(Framing::Chunked(1)).drip(7, Duration::from_millis(200)),
        ] {
            upstream.set("/leads", reply);
            let detail = client.fails(target(&url, short_to_end), UpstreamCode::Timeout).await;
            assert!(detail.contains("1s") && detail.contains("receiving"), "{detail}");
        }
        connections_become(&upstream, 0).await;
        assert_eq!(client.fetcher.counts(), FetcherCounts { open: 0, idle: 0 });
        upstream.set("/leads", Reply::steps(vec![Step::Pause(60 * SECOND)]).before_body());
        let mut large = target(&url, short_to_end);
        large.body = Some(Arc::from(vec![b' '; 32 << 20]));
        let detail = client.fails(large, UpstreamCode::Timeout).await;
        assert!(detail.contains("1s") && detail.contains("sending"), "{detail}");
        upstream.set("/leads", Reply::json("[1]").drip(10, Duration::from_millis(1)));
        assert_eq!(body(&client.get(&url).await.expect("slow is not dead")), "[1]");
    });
}

#[test]
fn a_connect_that_is_not_answered_times_out() {
    on_each_driver(async || {
        // A listener whose queue is full lets a connect hang, as a firewall that drops packets would.
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        socket2::SockRef::from(&listener).listen(0).expect("a shorter queue");
        let _fillers: Vec<_> =
            (0..3).map(|_| TcpStream::connect_timeout(&address, Duration::from_millis(50))).collect();
        let client = Client::new();
        let hasty = target(&format!("http://{address}/"), |options| options.connect_timeout = SECOND / 5);
        let detail = client.fails(hasty, UpstreamCode::Timeout).await;
        assert!(detail.contains("connecting"), "{detail}");
        assert_eq!(client.fetcher.counts().open, 0);
    });
}

#[test]
fn a_tls_handshake_that_is_not_answered_times_out() {
    on_each_driver(async || {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let client = Client::new();
        let hasty = target(&format!("https://{address}/"), |options| options.connect_timeout = SECOND);
        client.fails(hasty, UpstreamCode::Timeout).await;
    });
}

// Faults.

#[test]
fn nothing_there_is_unreachable() {
    on_each_driver(async || {
        let client = Client::new();
        let closed = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a port");
        let detail = client.fails(target(&format!("http://{closed}/"), |_| {}), UpstreamCode::Unreachable).await;
        assert!(detail.contains("refused"), "{detail}");
    });
}

#[test]
fn what_is_not_http_is_a_protocol_error() {
    on_each_driver(async || {
        let (client, upstream) = (Client::new(), Upstream::start());
        let faults: Vec<(&str, Reply)> = vec![
            ("garbage", Reply::raw(*b"\x16\x03\x01 hunter2 garbage\r\n\r\n")),
            ("closed at once", Reply::steps(vec![Step::Close])),
            (
                "cut in the head",
                Reply::steps(vec![Step::Send(b"HTTP/1.1 200 OK\r\nX-A: hunter2".to_vec()), Step::Close]),
            ),
            ("cut in the body", {
                let part = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n[1,2".to_vec();
                Reply::steps(vec![Step::Send(part), Step::Close])
            }),
            ("cut in a chunk", {
                let part = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n[1".to_vec();
                Reply::steps(vec![Step::Send(part), Step::Close])
            }),
            ("reset in the body", Reply::reset_within(100, 1000)),
            ("no chunk size", Reply::raw(*b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nhunter2\r\n")),
            ("two lengths", Reply::raw(*b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n11")),
            ("endless headers", Reply::endless_headers()),
            ("switching", Reply::raw(*b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n")),
        ];
        for (name, reply) in faults {
            upstream.set("/leads", reply);
            let error = client.get(&upstream.url("/leads")).await.expect_err(name);
            assert_eq!(error.code, UpstreamCode::Protocol, "{name}: {error:?}");
            assert!(!error.detail.contains("hunter2"), "{name}: {error:?}");
        }
        connections_become(&upstream, 0).await;
    });
}

#[test]
fn what_does_not_inflate_is_a_body_error() {
    on_each_driver(async || {
        let (client, upstream) = (Client::new(), Upstream::start());
        for reply in [
            Reply::json("not gzip").header("Content-Encoding", "gzip"),
            Reply::json("[1]").header("Content-Encoding", "br"),
        ] {
            upstream.set("/leads", reply);
            client.fails(target(&upstream.url("/leads"), |_| {}), UpstreamCode::Body).await;
        }
    });
}

#[test]
fn a_body_may_have_as_many_bytes_as_allowed_and_no_more() {
    on_each_driver(async || {
        let (client, upstream) = (Client::new(), Upstream::start());
        for framing in [Framing::Length, Framing::Chunked(1000), Framing::Close] {
            for coding in [Coding::Identity, Coding::Gzip] {
                let reply = |size: usize| Reply::json(" ".repeat(size)).framing(framing).coding(coding);
                upstream.set("/leads", reply(64 << 10));
                assert_eq!(client.get(&upstream.url("/leads")).await.expect("it fits").body.len(), 64 << 10);
                upstream.set("/leads", reply((64 << 10) + 1));
                client.fails(target(&upstream.url("/leads"), |_| {}), UpstreamCode::TooLarge).await;
            }
        }
        for reply in [Reply::promise(2 << 30), Reply::gzip_bomb(4 << 20), Reply::endless_chunks()] {
            upstream.set("/leads", reply);
            client.fails(target(&upstream.url("/leads"), |_| {}), UpstreamCode::TooLarge).await;
        }
        connections_become(&upstream, 0).await;
    });
}

#[test]
fn an_error_page_is_drained_only_while_it_is_small_and_quick() {
    on_each_driver(async || {
        let (client, upstream) = (Client::new(), Upstream::start());
        let url = upstream.url("/leads");
        let page = |size: usize| {
            let head = format!("HTTP/1.1 500 Oops\r\nContent-Length: {size}\r\n\r\n").into_bytes();
            Reply::raw([head, vec![b'x'; size]].concat())
        };
        upstream.set("/leads", page(32 << 10));
        assert_eq!(client.get(&url).await.expect("a status").status, 500);
        assert_eq!(client.fetcher.counts().idle, 1, "small: the connection is kept");
        for reply in [
            page(1 << 20),
            Reply::raw(*b"HTTP/1.1 500 Oops\r\nContent-Length: 100\r\n\r\nslow"),
            Reply::raw(*b"HTTP/1.1 500 Oops\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnope"),
            Reply::raw(*b"HTTP/1.1 500 Oops\r\nTransfer-Encoding: chunked\r\n\r\nnope\r\n"),
            Reply::steps(vec![Step::Send(b"HTTP/1.1 500 Oops\r\nContent-Length: 9\r\n\r\n1".to_vec()), Step::Close]),
        ] {
            upstream.set("/leads", reply);
            let began = Instant::now();
            assert_eq!(client.get(&url).await.expect("a status").status, 500);
            assert!(began.elapsed() < limits::UPSTREAM_DRAIN_TIMEOUT + 2 * SECOND, "the status is not held up");
        }
        upstream.set("/leads", Reply::raw(*b"HTTP/1.1 500 Oops\r\nContent-Length: 100\r\n\r\nslow"));
        // Less time than the body may take to be read away; a busy machine may not even send the status in it, each time.
        let mut status = None;
        for _ in 0..20 {
            if status.is_none() {
                status = client.poll(target(&url, short)).await.ok().map(|response| response.status);
            }
        }
        assert_eq!(status, Some(500), "a status, however short the time");
        connections_become(&upstream, 0).await;
    });
}

#[test]
fn an_answer_before_the_request_is_sent_is_taken() {
    on_each_driver(async || {
        let (client, upstream) = (Client::new(), Upstream::start());
        upstream.set("/leads", Reply::json("[1]").before_body());
        let mut large = target(&upstream.url("/leads"), |options| options.method = "POST".into());
        large.body = Some(Arc::from(vec![b' '; 32 << 20]));
        assert_eq!(body(&client.poll(large).await.expect("the early answer")), "[1]");
        assert_eq!(client.fetcher.counts().open, 0, "a half-sent request spoils the connection");
        connections_become(&upstream, 0).await;
    });
}

#[test]
fn only_http_and_https_are_spoken() {
    on_each_driver(async || {
        let client = Client::new();
        for url in ["ftp://127.0.0.1/", "file:///etc/passwd", "unix:/run/x"] {
            let url: url::Url = url.parse().expect("a URL");
            let wrong = Target { url, ..target("http://127.0.0.1/", |_| {}) };
            client.fails(wrong, UpstreamCode::Blocked).await;
        }
    });
}

// TLS.

fn trusting(authority: &Authority) -> impl Fn(&mut Options) {
    let pem = Arc::from(authority.pem().into_bytes());
    move |options| options.ca = Some(CaFile { path: "ca.pem".into(), pem: Arc::clone(&pem) })
}

#[test]
fn tls_serves_values_of_any_size_over_one_connection() {
    on_each_driver(async || {
        let (client, authority) = (Client::new(), Authority::new());
        let upstream = Upstream::start_tls(&authority.identity(&["localhost", "127.0.0.1"]));
        for size in [0, 1, 16 << 10, (16 << 10) + 1, 64 << 10] {
            let text = " ".repeat(size);
            upstream.set("/leads", Reply::json(text.as_str()));
            let asked = target(&upstream.url_by_name("localhost", "/leads"), trusting(&authority));
            assert_eq!(body(&client.poll(asked).await.expect("a response")), text);
        }
        assert_eq!(upstream.connection_count(), 1, "session tickets do not end an idle connection");
        assert_eq!(upstream.resumed_count(), 0);
        upstream.close_connections();
        connections_become(&upstream, 0).await;
        let asked = target(&upstream.url_by_name("localhost", "/leads"), trusting(&authority));
        client.poll(asked).await.expect("a response");
        assert_eq!((upstream.connection_count(), upstream.resumed_count()), (2, 1), "a new connection, an old session");
        let by_address = target(&upstream.url("/leads"), trusting(&authority));
        assert_eq!(client.poll(by_address).await.expect("the certificate names the address").status, 200);
        let mut large = target(&upstream.url("/leads"), trusting(&authority));
        large.body = Some(Arc::from(vec![b' '; 300_000]));
        assert_eq!(client.poll(large).await.expect("a response").status, 200);
        assert_eq!(upstream.requests().last().expect("requests").body.len(), 300_000);
    });
}

#[test]
fn certificates_that_should_not_be_trusted_are_not() {
    on_each_driver(async || {
        let (client, authority) = (Client::new(), Authority::new());
        let trust = trusting(&authority);
        for (identity, words) in [
            (authority.identity(&["other.example"]), "certificate not valid for name"),
            (authority.expired(&["localhost"]), "certificate expired"),
            (self_signed(&["localhost"]), "certificate"),
            (Authority::new().identity(&["localhost"]), "certificate"),
        ] {
            let upstream = Upstream::start_tls(&identity);
            upstream.set_json("/leads", "1");
            let url = upstream.url_by_name("localhost", "/leads");
            let detail = client.fails(target(&url, &trust), UpstreamCode::Tls).await;
            assert!(detail.contains(words), "{detail}");
            assert!(!detail.contains("other.example"), "{detail}");
            assert_eq!(upstream.request_count(), 0, "nothing was asked");
            connections_become(&upstream, 0).await;
        }
        // A private authority is nobody's but the stream's that names it.
        let upstream = Upstream::start_tls(&authority.identity(&["localhost"]));
        upstream.set_json("/leads", "1");
        let url = upstream.url_by_name("localhost", "/leads");
        client.poll(target(&url, &trust)).await.expect("a response");
        client.fails(target(&url, |_| {}), UpstreamCode::Tls).await;
        client.fails(target(&url, trusting(&Authority::new())), UpstreamCode::Tls).await;
        let bad = |options: &mut Options| {
            options.ca = Some(CaFile { path: "ca.pem".into(), pem: Arc::from(*b"no certificate") });
        };
        client.fails(target(&url, bad), UpstreamCode::Tls).await;
    });
}

#[test]
fn https_to_an_http_server_says_so() {
    on_each_driver(async || {
        let (client, upstream) = (Client::new(), Upstream::start());
        let authority = Authority::new();
        let url = upstream.url("/leads").replace("http:", "https:");
        client.fails(target(&url, trusting(&authority)), UpstreamCode::Tls).await;
    });
}

#[test]
fn a_body_that_ends_with_the_connection_must_end_in_good_order_under_tls() {
    on_each_driver(async || {
        let (client, authority) = (Client::new(), Authority::new());
        let upstream = Upstream::start_tls(&authority.identity(&["127.0.0.1"]));
        let url = upstream.url("/leads");
        upstream.set("/leads", Reply::json("[1,2]").framing(Framing::Close));
        assert_eq!(body(&client.poll(target(&url, trusting(&authority))).await.expect("a response")), "[1,2]");
        upstream.set("/leads", Reply::json("[1,2]").framing(Framing::Close).then(Step::Cut));
        client.fails(target(&url, trusting(&authority)), UpstreamCode::Protocol).await;
        upstream.set("/leads", Reply::json("[1,2]").then(Step::Close));
        for _ in 0..3 {
            client.poll(target(&url, trusting(&authority))).await.expect("a closed connection is replaced");
            connections_become(&upstream, 0).await;
        }
    });
}

// Names.

#[test]
fn localhost_resolves_and_other_names_may_not() {
    on_each_driver(async || {
        let resolver = Resolver::with_lookup(Box::new(|name| match name {
            "upstream.test" => Ok(vec!["127.0.0.1".parse().expect("an address")]),
            "empty.test" => Ok(Vec::new()),
            _ => Err(std::io::Error::other("no such host")),
        }));
        let (client, upstream) = (Client::with(FetcherOptions::default(), resolver), Upstream::start());
        upstream.set_json("/leads", "1");
        for name in ["localhost", "LOCALHOST.", "api.localhost", "upstream.test"] {
            client.get(&upstream.url_by_name(name, "/leads")).await.expect(name);
        }
        for name in ["empty.test", "gone.test"] {
            client.fails(target(&upstream.url_by_name(name, "/leads"), |_| {}), UpstreamCode::Dns).await;
        }
    });
}

#[test]
fn a_lookup_is_shared_remembered_and_timed() {
    on_each_driver(async || {
        let lookups = Arc::new(AtomicUsize::new(0));
        let counting = Arc::clone(&lookups);
        let resolver = Resolver::with_lookup(Box::new(move |name| {
            counting.fetch_add(1, Ordering::SeqCst);
            // A thread that hangs for longer than the test runs ends with it.
            std::thread::sleep(if name == "hung.test" { 60 * SECOND } else { Duration::from_millis(50) });
            Ok(vec!["127.0.0.1".parse().expect("an address")])
        }));
        let (client, upstream) = (Client::with(FetcherOptions::default(), resolver), Upstream::start());
        upstream.set("/leads", Reply::json("1").header("Connection", "close"));
        let url = upstream.url_by_name("upstream.test", "/leads");
        let fetches = (0..10).map(|_| client.spawn(target(&url.clone(), |_| {})));
        for fetch in fetches.collect::<Vec<_>>() {
            fetch.await.expect("a response");
        }
        client.get(&url).await.expect("a response");
        assert_eq!(lookups.load(Ordering::SeqCst), 1);
        let hasty = target(&upstream.url_by_name("hung.test", "/"), |options| options.connect_timeout = SECOND / 5);
        let began = Instant::now();
        client.fails(hasty, UpstreamCode::Timeout).await;
        assert!(began.elapsed() < 20 * SECOND, "a hung name server holds nobody up");
        client.get(&url).await.expect("other names go on");
    });
}

#[test]
fn the_first_address_that_answers_wins() {
    on_each_driver(async || {
        // One address refuses, one hangs, one answers; the port is the same for all.
        let upstream = Upstream::start();
        upstream.set_json("/leads", "1");
        let port = upstream.address().port();
        let hanging = TcpListener::bind(("127.0.0.9", port)).expect("the port is free there");
        socket2::SockRef::from(&hanging).listen(0).expect("a shorter queue");
        let hanging_at = hanging.local_addr().expect("an address");
        let _fillers: Vec<_> =
            (0..3).map(|_| TcpStream::connect_timeout(&hanging_at, Duration::from_millis(50))).collect();
        let addresses = |list: &[&str]| list.iter().map(|ip| ip.parse().expect("an address")).collect::<Vec<IpAddr>>();
        for (list, at_least) in [
            (addresses(&["127.0.0.8", "127.0.0.1"]), Duration::ZERO),
            (addresses(&["127.0.0.9", "127.0.0.1"]), limits::CONNECT_STAGGER),
            (addresses(&["127.0.0.9", "::1", "127.0.0.8", "127.0.0.1"]), limits::CONNECT_STAGGER),
        ] {
            let resolver = Resolver::with_lookup(Box::new(move |_| Ok(list.clone())));
            let client = Client::with(FetcherOptions::default(), resolver);
            let began = Instant::now();
            let patient = target(&upstream.url_by_name("upstream.test", "/leads"), |options| {
                (options.connect_timeout, options.timeout) = (60 * SECOND, 90 * SECOND);
            });
            client.poll(patient).await.expect("a response");
            let took = began.elapsed();
            assert!(took >= at_least && took < 20 * SECOND, "{took:?}");
            assert_eq!(client.fetcher.counts().open, 1);
        }
    });
}
