//! What a stream leaves to the one that comes after it at the same request: that its poll is still under way, and how it was
//! with the upstream.
//!
//! A stream that is changed is another stream, perhaps on another core, and one that was evicted begins anew when somebody
//! asks for it: to the upstream all of them are one. So there is one [`Course`] for each request of a stream, however many
//! streams follow each other in it: one poll at a time ([`UnderWay`]), and what the last one knew ([`Record`]).
//! Memory: an entry for each stream that is polled, and at most `SUCCESSIONS_MAX` of those that are not and hold something
//! back; twice that before they are looked through.
//! Errors: none. Not here: what a poll makes of it (`poll`), a request's `Retry-After` (`rest`), budgets (`budget`).

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::limits::SUCCESSIONS_MAX;
use crate::time::Instant;

use super::budget::Lane;
use super::poll::{FetchResult, RESTART_MIN, Record, Target};
use super::rest::Rest;

/// Entries before they are looked through for the first time.
const FEW: usize = 1024;

/// The requests of all streams of a process.
#[derive(Debug, Default)]
pub struct Successions {
    hasher: RandomState,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    courses: HashMap<u64, Arc<Course>>,
    /// With so many entries those are let go of that nobody needs.
    look_at: usize,
}

/// The streams that follow each other in one request.
#[derive(Debug, Default)]
pub struct Course {
    under_way: AtomicBool,
    left: Mutex<Left>,
}

/// What the last of them knew.
#[derive(Debug, Default)]
struct Left {
    /// Whom it asked, and with which credential.
    lane: Weak<Lane>,
    /// Which configuration of the stream it was.
    revision: u64,
    record: Record,
}

/// A poll of a [`Course`]: while there is this, no other begins.
#[derive(Debug)]
pub struct UnderWay {
    course: Arc<Course>,
    lane: Arc<Lane>,
    target: Arc<Target>,
}

impl UnderWay {
    /// It has ended, so: what the upstream has said of when to come back is known, whatever has become of its stream.
    pub fn end(self, now: Instant, result: &FetchResult) {
        Rest::of(result).tell(&self.lane.rests, &self.target, now);
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.course.under_way.store(false, Ordering::Release);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each value that stands there is in order by itself.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Successions {
    /// The course of a stream's request, which `request` tells from all others.
    pub fn course(&self, now: Instant, request: impl Hash) -> Arc<Course> {
        let hash = self.hasher.hash_one(request);
        let mut table = lock(&self.table);
        if let Some(course) = table.courses.get(&hash) {
            return Arc::clone(course);
        }
        if table.courses.len() >= table.look_at.max(FEW) {
            table.let_go(now);
        }
        Arc::clone(table.courses.entry(hash).or_default())
    }
}

impl Table {
    fn let_go(&mut self, now: Instant) {
        self.courses.retain(|_, course| course.is_used() || course.held_until() > now);
        let held = self.courses.iter().filter(|(_, course)| !course.is_used());
        let mut held: Vec<(Instant, u64)> = held.map(|(&hash, course)| (course.held_until(), hash)).collect();
        held.sort_unstable();
        let excess = held.len().saturating_sub(SUCCESSIONS_MAX);
        for (_, hash) in held.iter().take(excess) {
            self.courses.remove(hash);
        }
        self.look_at = (2 * self.courses.len()).min(self.courses.len() + SUCCESSIONS_MAX);
    }
}

impl Course {
    /// A poll of `target` begins, unless another is under way.
    pub fn begin(self: &Arc<Course>, lane: &Arc<Lane>, target: &Arc<Target>) -> Option<UnderWay> {
        let taken = self.under_way.swap(true, Ordering::Acquire);
        let begun = || UnderWay { course: Arc::clone(self), lane: Arc::clone(lane), target: Arc::clone(target) };
        (!taken).then(begun)
    }

    /// The stream of that lane and revision knows this now.
    pub fn leave(&self, lane: &Arc<Lane>, revision: u64, record: Record) {
        let mut left = lock(&self.left);
        // Whoever was there before and goes only now knows nothing that the next one has not learnt better.
        if record.last_start < left.record.last_start {
            return;
        }
        if !std::ptr::eq(left.lane.as_ptr(), Arc::as_ptr(lane)) {
            left.lane = Arc::downgrade(lane);
        }
        (left.revision, left.record) = (revision, record);
    }

    /// What the last one knew of that lane; of a failure nothing where the stream has been configured anew since and that may
    /// have mended it.
    pub fn left_to(&self, lane: &Arc<Lane>, revision: u64) -> Option<Record> {
        let left = lock(&self.left);
        let is_same = std::ptr::eq(left.lane.as_ptr(), Arc::as_ptr(lane)) && left.record.last_start.is_some();
        let record = is_same.then_some(left.record)?;
        Some(if left.revision == revision { record } else { record.after_a_change() })
    }

    /// Whether a stream has it, or a poll.
    fn is_used(self: &Arc<Course>) -> bool {
        Arc::strong_count(self) > 1
    }

    fn held_until(&self) -> Instant {
        let record = lock(&self.left).record;
        let spaced = record.last_start.map(|last| last + RESTART_MIN);
        spaced.max(record.backoff_until).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use url::Url;

    use super::*;
    use crate::stream::budget::Budgets;
    use crate::stream::poll::UpstreamCode;
    use crate::stream::template::UrlTemplate;
    use crate::{ids, stream};

    const NOW: Instant = Instant::from_micros(1_000_000_000);
    const MINUTE: Duration = Duration::from_secs(60);

    fn asked() -> [(Arc<Lane>, Arc<Target>); 2] {
        let budgets = Arc::<Budgets>::default();
        ["one", "two"].map(|key| {
            let template = UrlTemplate::parse::<&str>("http://up.example/a", &[]).expect("a URL");
            let mut options = stream::Options::new(ids::StreamId::new("a").expect("an id"), template);
            options.headers = vec![("X-Key".to_owned(), crate::secret::Secret::new(key.as_bytes().to_vec()))];
            let url: Url = "http://up.example/a".parse().expect("a URL");
            let target = Arc::new(Target { options: Arc::new(options), url, body: None, guard: None });
            (budgets.lane(&target), target)
        })
    }

    fn lanes() -> [Arc<Lane>; 2] {
        asked().map(|(lane, _)| lane)
    }

    fn failed(code: UpstreamCode, backoff: Duration) -> Record {
        let (last_start, backoff_until) = (Some(NOW), Some(NOW + backoff));
        let failure = Some((code, None));
        Record { last_start, backoff_until, failures: 3, failure }
    }

    #[test]
    fn one_poll_of_a_request_is_under_way_at_a_time_whoever_begins_it() {
        let successions = Successions::default();
        let [(lane, target), _] = asked();
        let begin = |course: &Arc<Course>| course.begin(&lane, &target);
        let (first, second) = (successions.course(NOW, "a"), successions.course(NOW, "a"));
        let poll = begin(&first).expect("the first");
        assert!(begin(&first).is_none() && begin(&second).is_none());
        assert!(begin(&successions.course(NOW, "b")).is_some(), "another request is another matter");
        drop(first);
        assert!(begin(&second).is_none(), "that its stream has gone ends no poll");
        drop(poll);
        assert!(begin(&second).is_some());
    }

    #[test]
    fn what_a_stream_knew_is_known_to_the_next_one_with_its_credential() {
        let [lane, other] = lanes();
        let course = Course::default();
        assert_eq!(course.left_to(&lane, 1), None);
        let record = failed(UpstreamCode::Status, MINUTE);
        course.leave(&lane, 1, record);
        assert_eq!(course.left_to(&lane, 1), Some(record));
        assert_eq!(course.left_to(&lane, 2), Some(record), "no change of the stream mends its upstream");
        assert_eq!(course.left_to(&other, 1), None, "with another key it may be well");
        let earlier = Record { last_start: Some(Instant::from_micros(1)), ..Record::default() };
        course.leave(&other, 3, earlier);
        assert_eq!(course.left_to(&lane, 1), Some(record), "what came before does not come after");
        course.leave(&lane, 1, failed(UpstreamCode::Tls, MINUTE));
        assert_eq!(course.left_to(&lane, 1), Some(failed(UpstreamCode::Tls, MINUTE)));
        let changed = Record { last_start: Some(NOW), ..Record::default() };
        assert_eq!(course.left_to(&lane, 2), Some(changed), "another certificate was the change, perhaps");
    }

    #[test]
    fn no_more_is_kept_than_there_may_be_and_what_is_over_first_goes_first() {
        let [lane, _] = lanes();
        let successions = Successions::default();
        let used = successions.course(NOW, "used");
        let left = |n: usize| Duration::from_secs(n as u64 + 2);
        for n in 0..3 * SUCCESSIONS_MAX {
            successions.course(NOW, n).leave(&lane, 1, failed(UpstreamCode::Status, left(n)));
        }
        let of = |what: &str, n: usize| successions.course(NOW, n).left_to(&lane, 1).map(|_| what.to_owned());
        let count = lock(&successions.table).courses.len();
        assert!((SUCCESSIONS_MAX..=2 * SUCCESSIONS_MAX + 2).contains(&count), "{count}");
        assert_eq!((of("first", 0), of("last", 3 * SUCCESSIONS_MAX - 1)), (None, Some("last".to_owned())));
        assert!(Arc::ptr_eq(&used, &successions.course(NOW, "used")), "a stream has it");
        lock(&successions.table).let_go(NOW + left(3 * SUCCESSIONS_MAX));
        assert_eq!(lock(&successions.table).courses.len(), 1);
    }
}
