//! Requests that their upstream wants left alone for a while: `Retry-After` of a 4xx or 5xx.
//!
//! A 429 is of whoever asks, and its lane keeps it (`budget`); these are of what was asked for: method, URL and body, for all
//! of GraphQL is one URL. A stream that is changed or evicted is another stream, whose polls begin anew: what the upstream has
//! said of the request is kept for it here, and for whatever else asks the same with the same credential. What a caller has
//! described rests for that caller alone: whoever can have a target ask to be left alone would stop the polls of others.
//! Source: RFC 9110 section 10.2.3. Memory: at most [`RESTS_MAX`] hashes of requests a lane, those that are over first to go.
//! Errors: none. Not here: what a poll makes of it (`poll`), who asks (`shard::owner`).

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use url::Position;

use crate::limits::{RESTS_MAX, RETRY_AFTER_MAX};
use crate::time::Instant;

use super::poll::{FetchResponse, FetchResult, Target};

/// The requests of one lane that are left alone.
#[derive(Debug, Default)]
pub struct Rests {
    hasher: RandomState,
    /// Whether there are any: polls look here first.
    any: AtomicBool,
    /// Until when, by their hashes.
    until: Mutex<HashMap<u64, Instant>>,
}

impl Rests {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Instant>> {
        // What stands there is moments, each of which is in order by itself.
        self.until.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of a request without what is not sent of its URL.
    fn hash(&self, Target { options, url, body, .. }: &Target) -> u64 {
        self.hasher.hash_one((&options.method, &url[..Position::AfterQuery], body, options.described_by))
    }

    /// The upstream wants that request left alone for so long from `now` on, a day at most.
    pub fn leave(&self, target: &Target, wait: Duration, now: Instant) {
        let (hash, end) = (self.hash(target), now + wait.min(RETRY_AFTER_MAX));
        let mut until = self.lock();
        if until.len() >= RESTS_MAX && !until.contains_key(&hash) {
            until.retain(|_, until| *until > now);
            let soonest = until.iter().min_by_key(|(_, until)| **until).map(|(hash, _)| *hash);
            if until.len() >= RESTS_MAX
                && let Some(soonest) = soonest
            {
                until.remove(&soonest);
            }
        }
        let known = until.entry(hash).or_insert(end);
        *known = (*known).max(end);
        self.any.store(true, Ordering::Relaxed);
    }

    /// The upstream has given its value after all.
    pub fn is_back(&self, target: &Target) {
        if self.is_any() {
            let mut until = self.lock();
            until.remove(&self.hash(target));
            self.any.store(!until.is_empty(), Ordering::Relaxed);
        }
    }

    /// Until when that request is left alone, where it is.
    pub fn until(&self, target: &Target, now: Instant) -> Option<Instant> {
        if !self.is_any() {
            return None;
        }
        let mut until = self.lock();
        let hash = self.hash(target);
        let end = until.get(&hash).copied()?;
        if end > now {
            return Some(end);
        }
        until.remove(&hash);
        self.any.store(!until.is_empty(), Ordering::Relaxed);
        None
    }

    /// Whether there are any.
    pub fn is_any(&self) -> bool {
        self.any.load(Ordering::Relaxed)
    }
}

/// What an answer says of whether its request is to be left alone.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Rest {
    /// For so long.
    For(Duration),
    /// Not any more.
    Over,
    /// Nothing.
    Unsaid,
}

impl Rest {
    /// What that answer says.
    pub fn of(result: &FetchResult) -> Rest {
        match result {
            // It is of whoever asks, and its lane keeps it.
            Ok(FetchResponse { status: 429, .. }) | Err(_) => Rest::Unsaid,
            Ok(FetchResponse { status: 200..=299 | 304, .. }) => Rest::Over,
            Ok(response) => response.asks_to_be_left_alone().map_or(Rest::Unsaid, Rest::For),
        }
    }

    /// Tells it to all who send that request by the lane of `rests`.
    pub fn tell(self, rests: &Rests, target: &Target, now: Instant) {
        match self {
            Rest::For(wait) => rests.leave(target, wait, now),
            Rest::Over => rests.is_back(target),
            Rest::Unsaid => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::ids::{Holder, StreamId};
    use crate::stream::Options;
    use crate::stream::template::UrlTemplate;

    const NOW: Instant = Instant::from_micros(1_000_000_000);
    const MINUTE: Duration = Duration::from_secs(60);

    /// A request of that method, URL and body, as that caller has described it.
    fn request(method: &str, url: &str, body: Option<&str>, by: Option<u64>) -> Target {
        let template = UrlTemplate::parse::<&str>("https://h.example/", &[]).expect("a URL");
        let mut options = Options::new(StreamId::new("s").expect("an id"), template);
        options.method = method.to_owned();
        options.described_by = by.map(Holder::from_hash);
        let body = body.map(|body| Arc::from(body.as_bytes()));
        Target { options: Arc::new(options), url: url.parse().expect("a URL"), body, guard: None }
    }

    fn url(text: &str) -> Target {
        request("GET", text, None, None)
    }

    #[test]
    fn a_request_that_rests_holds_no_other_request_of_its_url_and_no_other_caller() {
        let of = |method, body, by| request(method, "https://h.example/graphql", body, by);
        let resting = of("POST", Some("{costly}"), Some(1));
        let others = [
            of("POST", Some("{cheap}"), Some(1)),
            of("POST", None, Some(1)),
            of("GET", Some("{costly}"), Some(1)),
            of("POST", Some("{costly}"), Some(2)),
            of("POST", Some("{costly}"), None),
        ];
        let rests = Rests::default();
        rests.leave(&resting, MINUTE, NOW);
        for other in &others {
            assert_eq!(rests.until(other, NOW), None);
            // Nor does its value end the rest.
            rests.is_back(other);
        }
        assert_eq!(rests.until(&of("POST", Some("{costly}"), Some(1)), NOW), Some(NOW + MINUTE));
        rests.is_back(&resting);
        assert_eq!((rests.until(&resting, NOW), rests.is_any()), (None, false));
    }

    #[test]
    fn a_resource_is_left_alone_until_its_end_and_no_other_is() {
        let rests = Rests::default();
        let (a, b) = (url("https://h.example/a?x=1#one"), url("https://h.example/a?x=2"));
        assert!(!rests.is_any());
        rests.leave(&a, MINUTE, NOW);
        assert_eq!(rests.until(&url("https://h.example/a?x=1#two"), NOW), Some(NOW + MINUTE), "it is the same request");
        assert_eq!(rests.until(&b, NOW), None);
        // A shorter word does not shorten it, and none is believed for longer than a day.
        rests.leave(&a, Duration::ZERO, NOW);
        assert_eq!(rests.until(&a, NOW + MINUTE - Duration::from_micros(1)), Some(NOW + MINUTE));
        assert_eq!((rests.until(&a, NOW + MINUTE), rests.is_any()), (None, false), "and it leaves nothing behind");
        rests.leave(&b, Duration::MAX, NOW);
        assert_eq!(rests.until(&b, NOW), Some(NOW + RETRY_AFTER_MAX));
        rests.is_back(&a);
        assert!(rests.until(&b, NOW).is_some());
        rests.is_back(&b);
        assert_eq!((rests.until(&b, NOW), rests.is_any()), (None, false));
    }

    #[test]
    fn no_more_are_kept_than_there_may_be_and_those_that_end_first_go_first() {
        let rests = Rests::default();
        let of = |n: usize| url(&format!("https://h.example/{n}"));
        let wait = |n: usize| Duration::from_secs(n as u64 + 1);
        for n in 0..RESTS_MAX {
            rests.leave(&of(n), wait(n), NOW);
        }
        rests.leave(&of(0), wait(0), NOW);
        let len = || rests.lock().len();
        assert_eq!(len(), RESTS_MAX);
        assert!(rests.until(&of(0), NOW).is_some(), "one that is known takes no room");
        rests.leave(&of(RESTS_MAX), MINUTE, NOW);
        assert_eq!((rests.until(&of(0), NOW), len()), (None, RESTS_MAX));
        assert!(rests.until(&of(1), NOW).is_some() && rests.until(&of(RESTS_MAX), NOW).is_some());
        // What is over makes room, all of it at once.
        let later = NOW + wait(RESTS_MAX / 2);
        rests.leave(&of(RESTS_MAX + 1), MINUTE * 1000, later);
        assert!(len() < RESTS_MAX / 2 + 2, "{}", len());
    }
}
