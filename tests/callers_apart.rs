//! What callers name is kept apart from what is the operator's: slow names and hanging targets of theirs hold up neither the
//! operator's polls nor a refresh token on its way to the disk.

mod support;

use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use monoio::task::JoinHandle;
use restcast::guard::{Pattern, Policy};
use restcast::ids::Holder;
use restcast::limits::{RESOLVER_CALLERS_QUEUE_MAX, RESOLVER_QUEUE_MAX, RESOLVER_SUBJECT_QUEUE_MAX};
use restcast::metrics::CoreMetrics;
use restcast::runtime::fetch::{Fetcher, FetcherOptions};
use restcast::runtime::oauth::Tokens;
use restcast::runtime::resolver::Resolver;
use restcast::runtime::state::StateFile;
use restcast::secret::Secret;
use restcast::stream::credential::{Credential, Scheme};
use restcast::stream::live::{Live, Rule, Source};
use restcast::stream::oauth::{ClientAuth, Grant, Options};
use restcast::stream::poll::{FetchResult, Target, UpstreamCode};
use support::client::{Client, NOW, SECOND, become_true, request, target};
use support::{Folder, Gate, Reply, Step, Upstream, on_each_driver};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// A subject that has as much under way as it may, and as much waiting.
const OF_A_SUBJECT: usize = RESOLVER_SUBJECT_QUEUE_MAX + 8;

/// Name servers that do not answer for `.slow.test` until they are let.
#[derive(Clone, Default)]
struct NameServers(Arc<(Mutex<bool>, Condvar)>);

impl NameServers {
    fn resolver(&self) -> Resolver {
        let servers = self.clone();
        Resolver::with_lookup(Box::new(move |name| {
            if name.ends_with(".slow.test") {
                let answers = servers.answers();
                drop(servers.0.1.wait_while(answers, |answers| !*answers).unwrap_or_else(PoisonError::into_inner));
            }
            Ok(vec![LOOPBACK])
        }))
    }

    fn answers(&self) -> MutexGuard<'_, bool> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for NameServers {
    fn drop(&mut self) {
        *self.answers() = true;
        self.0.1.notify_all();
    }
}

/// What that subject has described.
fn described(url: &str, policy: &Arc<Policy>, subject: u64) -> Target {
    let described_by = Some(Holder::from_hash(subject));
    Target { guard: Some(Arc::clone(policy)), ..target(url, |options| options.described_by = described_by) }
}

/// Polls of `subjects`, each of as many slow names as it may name, and more.
fn flood(client: &Client, subjects: u64) -> Vec<JoinHandle<FetchResult>> {
    let policy = Arc::new(Policy::public());
    let names = (1..=subjects).flat_map(|subject| (0..OF_A_SUBJECT).map(move |n| (subject, n)));
    names.map(|(of, n)| client.spawn(described(&format!("http://h{of}-{n}.slow.test/"), &policy, of))).collect()
}

/// As many subjects as fill all queues that there are.
const EVERYBODY: u64 = ((RESOLVER_CALLERS_QUEUE_MAX + RESOLVER_QUEUE_MAX) / RESOLVER_SUBJECT_QUEUE_MAX) as u64 + 8;

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    monoio::time::timeout(20 * SECOND, future).await.unwrap_or_else(|_| panic!("{what} is held up"))
}

#[test]
fn slow_names_of_callers_do_not_hold_up_the_operators_names() {
    on_each_driver(async || {
        let (servers, upstream) = (NameServers::default(), Upstream::start());
        upstream.set_json("/leads", "1");
        let client = Client::with(FetcherOptions::default(), servers.resolver());
        let flood = flood(&client, EVERYBODY);
        monoio::time::sleep(Duration::from_millis(20)).await;
        for n in 0..3 {
            let url = format!("http://api{n}.test:{}/leads", upstream.address().port());
            let answer = soon("the operator's poll", client.get(&url)).await.expect("an answer");
            assert_eq!(answer.status, 200);
            // What an administrator has made is the operator's, too.
            let admin = Arc::new(Policy::of_administrators(Vec::new()));
            let made = Target { guard: Some(admin), ..target(&url.replace("api", "made"), |_| {}) };
            assert_eq!(soon("an administrator's stream", client.poll(made)).await.expect("an answer").status, 200);
        }
        drop(flood);
    });
}

#[test]
fn a_caller_whose_names_are_slow_is_told_so_and_others_are_served() {
    on_each_driver(async || {
        let servers = NameServers::default();
        let client = Client::with(FetcherOptions::default(), servers.resolver());
        let public = Arc::new(Policy::public());
        let mut flood = flood(&client, 1);
        // Those that may not even wait.
        let refused = soon("a refusal", flood.pop().expect("there are some")).await.expect_err("it may not wait");
        assert_eq!(refused.code, UpstreamCode::Dns);
        assert!(refused.detail.contains("as many lookups wait already as may"), "{refused:?}");
        // Another one's name is looked up: it leads inside, and is blocked for that.
        let other = soon("another caller", client.poll(described("http://quick.test/", &public, 2))).await;
        assert_eq!(other.expect_err("it leads inside").code, UpstreamCode::Blocked);
        // So is one that the first waits for, in the other's turn: nobody can have a name looked up late by asking for it first.
        let slow = format!("http://h1-{}.slow.test/", RESOLVER_SUBJECT_QUEUE_MAX / 2);
        let same = client.spawn(described(&slow, &public, 2));
        *servers.answers() = true;
        servers.0.1.notify_all();
        assert_eq!(soon("the same name", same).await.expect_err("it leads inside").code, UpstreamCode::Blocked);
        for poll in flood {
            let error = soon("what waited", poll).await.expect_err("none leads outside");
            assert!(matches!(error.code, UpstreamCode::Blocked | UpstreamCode::Dns), "{error:?}");
        }
    });
}

#[test]
fn slow_names_of_callers_do_not_hold_up_a_refresh_token_on_its_way_to_the_disk() {
    let written = |text: &str| Live::new(Source::Written, Rule::Text, Secret::new(text));
    on_each_driver(async || {
        let folder = Folder::new("callers-apart");
        let path = folder.state();
        let (servers, upstream) = (NameServers::default(), Upstream::start());
        upstream.set("/token", Reply::json(r#"{"access_token":"a1","token_type":"Bearer","refresh_token":"r1"}"#));
        // Whether the refresh token was in the file whenever the token that came with it was used.
        let kept = Arc::new(Mutex::new(Vec::new()));
        let (seen, file) = (Arc::clone(&kept), path.clone());
        upstream.judge("/leads", move |request| {
            assert_eq!(request.header("authorization"), Some("Bearer a1"));
            let is_kept = std::fs::read_to_string(&file).is_ok_and(|text| text.contains("\"r1\""));
            seen.lock().unwrap_or_else(PoisonError::into_inner).push(is_kept);
            Reply::json("1")
        });
        let state = Arc::new(StateFile::open(&path, true).expect("a state file"));
        let tokens = Arc::new(Tokens::new(state, [7; 32]).expect("nothing is there yet"));
        let client = Client::with(FetcherOptions::default(), servers.resolver());
        let fetcher: Fetcher = client.fetcher.clone().with_tokens(tokens, Arc::new(CoreMetrics::default()));
        let flood = flood(&client, EVERYBODY);
        monoio::time::sleep(Duration::from_millis(20)).await;
        let options = Options {
            grant: Grant::RefreshToken(written("r0")),
            token_url: upstream.url("/token").parse().expect("a URL"),
            client_id: written("client"),
            client_secret: None,
            client_auth: ClientAuth::Basic,
            scope: None,
            audience: None,
            params: Vec::new(),
            ca: None,
            identity: None,
        };
        let scheme = Some(Scheme::OAuth(Arc::new(options)));
        let credential = Credential { scheme, ..Credential::default() };
        let own = target(&upstream.url("/leads"), |options| options.credential = credential);
        let answer = soon("the operator's poll", fetcher.fetch(request(own), || NOW)).await.expect("an answer");
        assert_eq!(answer.status, 200);
        assert_eq!(*kept.lock().unwrap_or_else(PoisonError::into_inner), [true]);
        drop(flood);
    });
}

#[test]
fn hanging_targets_of_callers_leave_connections_to_the_operator() {
    on_each_driver(async || {
        let options = FetcherOptions {
            connections_max: 6,
            own_connections: 2,
            callers_waiting_max: 3,
            ..FetcherOptions::default()
        };
        let (client, upstream) = (Client::with(options, Resolver::system()), Upstream::start());
        let gate = Gate::default();
        upstream.set("/first", Reply::steps(vec![Step::Wait(gate.clone()), Step::Close]));
        upstream.set("/held", Reply::steps(vec![Step::Stall]));
        upstream.set("/leads", Reply::json("1").delay(Duration::from_millis(30)));
        let pattern = Pattern::parse(&upstream.url("/*")).expect("a pattern");
        let policy = Arc::new(Policy { allow: vec![pattern], ..Policy::default() });
        let hanging = |of: u64| {
            let path = if of == 0 { "/first" } else { "/held" };
            let mut target = described(&upstream.url(path), &policy, of);
            let options = Arc::get_mut(&mut target.options).expect("nobody else has them");
            (options.first_byte_timeout, options.timeout) = (120 * SECOND, 120 * SECOND);
            client.spawn(target)
        };
        let mut held: Vec<_> = (0..8).map(hanging).collect();
        become_true("the callers' connections", || upstream.request_count() == 4).await;
        // Four hang, three wait, one is told that it may not.
        let refused = soon("a refusal", held.pop().expect("eight")).await.expect_err("it may not wait");
        assert!(refused.detail.contains("too many requests wait"), "{refused:?}");
        for _ in 0..3 {
            let both = [(); 2].map(|()| client.spawn(target(&upstream.url("/leads"), |_| {})));
            for poll in both {
                assert_eq!(soon("the operator's poll", poll).await.expect("an answer").status, 200);
            }
            assert_eq!(client.fetcher.counts().open, 6, "callers have four of them, and no more");
        }
        assert_eq!(upstream.connection_count(), 6, "the operator's connections are the operator's");
        // A caller's connection that becomes free goes to a caller that waits, past what idles of the operator's.
        let own = upstream.requests().iter().filter(|seen| seen.target.starts_with("/leads")).count();
        gate.open();
        soon("the first", held.remove(0)).await.expect_err("it was closed");
        become_true("whoever waits longest", || upstream.request_count() >= own + 5).await;
        assert_eq!(client.fetcher.counts().open, 6);
        drop(held);
    });
}

#[test]
fn without_the_operators_polls_callers_have_their_part_alone_and_the_operators_go_first() {
    on_each_driver(async || {
        let options = FetcherOptions { connections_max: 2, own_connections: 1, ..FetcherOptions::default() };
        let (client, upstream) = (Client::with(options, Resolver::system()), Upstream::start());
        let slow = || Reply::json("1").delay(Duration::from_millis(40));
        for path in ["/b", "/c", "/own1", "/own2", "/own3"] {
            upstream.set(path, slow().header("Connection", "close"));
        }
        // The first is not done before all others wait.
        let gate = Gate::default();
        upstream.set("/a", slow().header("Connection", "close").behind(&gate));
        let pattern = Pattern::parse(&upstream.url("/*")).expect("a pattern");
        let policy = Arc::new(Policy { allow: vec![pattern], ..Policy::default() });
        let callers = ["/a", "/b", "/c"].map(|path| client.spawn(described(&upstream.url(path), &policy, 1)));
        become_true("the first caller's request", || upstream.request_count() == 1).await;
        assert_eq!(client.fetcher.counts().open, 1, "one is the operator's, whether it is used or not");
        let own = ["/own1", "/own2", "/own3"].map(|path| client.spawn(target(&upstream.url(path), |_| {})));
        become_true("the operator's request", || upstream.request_count() == 2).await;
        gate.open();
        for poll in own.into_iter().chain(callers) {
            assert_eq!(soon("each", poll).await.expect("an answer").status, 200);
        }
        let order: Vec<String> =
            upstream.requests().iter().map(|seen| seen.target.split('?').next().expect("a path").to_owned()).collect();
        let place = |path: &str| order.iter().position(|seen| seen == path).expect("it was asked for");
        assert!(place("/own3") < place("/c") && place("/b") < place("/c"), "{order:?}");
    });
}
