//! Imitations of the APIs that `tests/cookbook/` has configurations for, over TLS. Each counts what it is asked, knows its
//! own rules, and notes whoever breaks one: a request more than it allows, one without what it wants to see, one for what
//! nobody should ask for.

pub mod crm;
pub mod github;
pub mod leads;
pub mod market;
pub mod shop;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use url::Url;

use crate::support::{Authority, Reply, RequestSeen, Upstream};

/// How long what was told may be on its way to who was told: requests that were sent before are no breach.
pub const ON_ITS_WAY: Duration = Duration::from_secs(1);

/// What an API is, besides the server that it is at.
pub trait Rules: Send + 'static {
    /// The answer to a request.
    fn answer(&mut self, seen: &RequestSeen, url: &Url) -> Reply;

    /// The breaches so far.
    fn breaches(&mut self) -> &mut Vec<String>;

    /// Notes a breach unless `kept`.
    fn wants(&mut self, kept: bool, what: &str, seen: &RequestSeen) {
        if !kept {
            self.breaches().push(format!("{what}: {} {} {:?}", seen.method, seen.target, seen.headers));
        }
    }
}

/// An API at work.
pub struct Api<R> {
    /// Where it is.
    pub upstream: Upstream,
    rules: Arc<Mutex<R>>,
}

impl<R: Rules> Api<R> {
    /// One that presents a certificate of `authority`'s.
    pub fn open(authority: &Authority, rules: R) -> Api<R> {
        let upstream = Upstream::start_tls(&authority.identity(&["127.0.0.1"]));
        let (rules, origin) = (Arc::new(Mutex::new(rules)), upstream.url(""));
        let judging = Arc::clone(&rules);
        upstream.judge_all(move |seen| {
            let url = Url::parse(&format!("{origin}{}", seen.target)).expect("a URL");
            judging.lock().unwrap_or_else(PoisonError::into_inner).answer(seen, &url)
        });
        Api { upstream, rules }
    }

    /// What it knows.
    pub fn rules(&self) -> MutexGuard<'_, R> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Panics where one of its rules was broken.
    pub fn is_content(&self) {
        assert_eq!(self.rules().breaches(), &Vec::<String>::new());
    }
}

/// The value of a parameter that is there once.
pub fn param(url: &Url, name: &str) -> Option<String> {
    let mut values = url.query_pairs().filter(|(n, _)| n == name).map(|(_, value)| value.into_owned());
    values.next().filter(|_| values.next().is_none())
}

/// The path's segments.
pub fn segments(url: &Url) -> Vec<&str> {
    url.path_segments().into_iter().flatten().collect()
}

/// A limiter with a window that begins with its first request.
pub struct Window {
    pub limit: u64,
    pub length: Duration,
    pub begun: Instant,
    pub used: u64,
    /// Since when the one who asks knows that nothing is left.
    spent: Option<Instant>,
}

impl Window {
    pub fn new(limit: u64, length: Duration) -> Window {
        Window { limit, length, begun: Instant::now(), used: 0, spent: None }
    }

    /// A window of that length that begins now, and in which so much is used.
    pub fn again(&mut self, length: Duration, used: u64) {
        (self.length, self.begun, self.used, self.spent) = (length, Instant::now(), used, None);
    }

    /// A request comes: whether whoever sent it could know that it may not.
    pub fn begin(&mut self) -> bool {
        if self.begun.elapsed() >= self.length {
            self.again(self.length, 0);
        }
        self.spent.is_none_or(|since| since.elapsed() <= ON_ITS_WAY)
    }

    /// It counts: whether it is within the limit.
    pub fn take(&mut self) -> bool {
        self.used += 1;
        self.used <= self.limit
    }

    /// What is left is told.
    pub fn told(&mut self) -> (u64, Duration) {
        let left = self.limit.saturating_sub(self.used);
        self.spent = (left == 0).then(|| self.spent.unwrap_or_else(Instant::now));
        (left, self.length.saturating_sub(self.begun.elapsed()))
    }
}
