//! The upstream client as tests use it: short time-outs, a clock that stands still, and secrets to look for in errors.

use std::sync::Arc;
use std::time::Duration;

use monoio::task::JoinHandle;
use restcast::ids::StreamId;
use restcast::runtime::fetch::{Fetcher, FetcherOptions};
use restcast::runtime::resolver::Resolver;
use restcast::secret::Secret;
use restcast::stream::Options;
use restcast::stream::action::{self, Call};
use restcast::stream::poll::{FetchRequest, FetchResult, Target, UpstreamCode, Validators};
use restcast::stream::template::UrlTemplate;
use restcast::time::WallTime;

use super::Upstream;

pub const SECOND: Duration = Duration::from_secs(1);
pub const NOW: WallTime = WallTime::from_secs(1_800_000_000);

/// A client whose clock stands still.
pub struct Client {
    pub fetcher: Fetcher,
    _resolver: Resolver,
}

impl Client {
    /// One with the defaults, and the system's resolver.
    pub fn new() -> Client {
        Client::with(FetcherOptions::default(), Resolver::system())
    }

    pub fn with(options: FetcherOptions, resolver: Resolver) -> Client {
        let fetcher = Fetcher::new(options, resolver.handle().expect("descriptors are left"));
        Client { fetcher, _resolver: resolver }
    }

    /// The same, by that proxy.
    pub fn through(self, proxy: &str) -> Client {
        let proxy = restcast::stream::proxy::Proxy::parse(proxy).expect("a proxy");
        let egress = restcast::runtime::fetch::Egress::through(Some(Arc::new(proxy)));
        Client { fetcher: self.fetcher.with_egress(Arc::new(egress)), ..self }
    }

    pub async fn get(&self, url: &str) -> FetchResult {
        self.poll(target(url, |_| {})).await
    }

    pub async fn poll(&self, target: Target) -> FetchResult {
        self.fetcher.fetch(request(target), || NOW).await
    }

    /// Polls in a task of its own.
    pub fn spawn(&self, target: Target) -> JoinHandle<FetchResult> {
        let fetcher = self.fetcher.clone();
        monoio::spawn(async move { fetcher.fetch(request(target), || NOW).await })
    }

    /// Polls, expects an error of this code without a secret in it, and returns its detail.
    pub async fn fails(&self, target: Target, code: UpstreamCode) -> String {
        let error = self.poll(target).await.expect_err("no response");
        assert_eq!(error.code, code, "{error:?}");
        assert!(!error.detail.contains("hunter2"), "a secret stands in {error:?}");
        error.detail
    }
}

pub fn request(target: Target) -> FetchRequest {
    FetchRequest { target: Arc::new(target), validators: Validators::default() }
}

/// A target with short time-outs and a secret in its URL and headers.
pub fn target(url: &str, change: impl FnOnce(&mut Options)) -> Target {
    let blank = UrlTemplate::parse::<&str>("http://upstream.example/", &[]).expect("a URL");
    let mut options = Options {
        headers: vec![("X-Api-Key".into(), Secret::new(*b"hunter2-header"))],
        connect_timeout: 2 * SECOND,
        first_byte_timeout: 5 * SECOND,
        timeout: 10 * SECOND,
        response_bytes_max: 64 << 10,
        ..Options::new(StreamId::new("leads").expect("an id"), blank)
    };
    change(&mut options);
    let mut url: url::Url = url.parse().expect("a URL");
    url.query_pairs_mut().append_pair("key", "hunter2-query");
    Target { options: Arc::new(options), url, body: None, guard: None }
}

/// An action of that method, with short time-outs and a secret in its URL and headers.
pub fn call(method: &str, url: &str, change: impl FnOnce(&mut action::Options)) -> Call {
    let Target { options, url, .. } = target(url, |_| {});
    let mut options = action::Options {
        kind: "update".into(),
        roles: Vec::new(),
        permissions: Vec::new(),
        method: method.into(),
        url: options.url.clone(),
        headers: options.headers.clone(),
        credential: options.credential.clone(),
        body: None,
        schema: None,
        rate: None,
        refresh: Vec::new(),
        reply_body: true,
        error_body: false,
        ca: None,
        connect_timeout: options.connect_timeout,
        first_byte_timeout: options.first_byte_timeout,
        timeout: options.timeout,
        response_bytes_max: options.response_bytes_max,
    };
    change(&mut options);
    Call { options: Arc::new(options), url, body: Some(b"{}".as_slice().into()) }
}

/// Little time for all of it.
pub fn short(options: &mut Options) {
    options.first_byte_timeout = Duration::from_millis(150);
    options.timeout = Duration::from_millis(300);
}

/// Little time for the first byte of an answer, and enough for all else.
pub fn short_to_begin(options: &mut Options) {
    options.connect_timeout = 30 * SECOND;
    options.first_byte_timeout = Duration::from_millis(150);
    options.timeout = 60 * SECOND;
}

/// Little time for the whole, and none less for a part of it. Time enough to connect, on a busy machine.
pub fn short_to_end(options: &mut Options) {
    options.connect_timeout = 30 * SECOND;
    options.first_byte_timeout = 30 * SECOND;
    options.timeout = SECOND;
}

/// Waits, without holding the core, until the upstream sees `count` connections.
pub async fn connections_become(upstream: &Upstream, count: usize) {
    become_true("connections that the upstream sees", || upstream.open_connections() == count).await;
}

/// Waits, without holding the core, until it `is` so.
pub async fn become_true(what: &str, is: impl Fn() -> bool) {
    let until = monoio::time::Instant::now() + 20 * SECOND;
    while !is() {
        assert!(monoio::time::Instant::now() < until, "waited for {what}");
        monoio::time::sleep(Duration::from_millis(5)).await;
    }
}
