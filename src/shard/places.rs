//! The places that one subject, or one address, has among the filled-in streams: what it watches, and what it has left and is
//! polled still.
//!
//! Whoever has a stream polled keeps its place until that ends, so that going through many streams asks upstreams no more
//! often than watching as many as there are places: a place that was left is given to another stream no sooner than a poll
//! of the one before could have been followed by a second ([`Wanted::spacing`]).
//! Memory: at most `limits.streams_per_subject` entries a subject, `limits.streams_per_address` an address. Errors: [`Full`]. Not here: who counts whom (`ledger`).

use std::collections::HashMap;
use std::time::Duration;

use crate::time::Instant;

/// What a place is wanted for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Wanted {
    /// The hash of what is shown.
    pub shown: u64,
    /// That of what is polled, where it is polled for those who fill it in: its place outlasts its watchers.
    pub polled: Option<u64>,
    /// The place is not given to another stream before so long after it was taken.
    pub spacing: Duration,
}

/// There is no place.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Full {
    /// After so long there will be one, if nothing is watched besides; `None`: all streams that have one are watched.
    pub wait: Option<Duration>,
}

/// What has changed of what a subject has polled.
#[derive(Debug, Default, Eq, PartialEq)]
pub(super) struct Change {
    /// This from now on.
    pub(super) begun: Option<u64>,
    /// These no more: their places were taken by others.
    pub(super) ended: Vec<u64>,
}

#[derive(Debug)]
struct Watched {
    watches: u32,
    polled: Option<u64>,
    taken: Instant,
    spacing: Duration,
}

#[derive(Debug)]
struct Left {
    taken: Instant,
    spacing: Duration,
    since: Instant,
    /// When it is polled no more.
    until: Instant,
}

impl Left {
    fn free_from(&self) -> Instant {
        self.taken + self.spacing
    }
}

/// The places of one subject.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// By what is shown.
    watched: HashMap<u64, Watched>,
    /// By what is polled; never what is watched as well.
    left: HashMap<u64, Left>,
    /// Whether somebody will call [`Places::pass`].
    timed: bool,
}

impl Places {
    /// Whether nothing is watched, and nothing polled still.
    pub(super) fn is_empty(&self) -> bool {
        self.watched.is_empty() && self.left.is_empty()
    }

    /// One more watch, if there are at most `limit` places taken then. What was left longest ago makes place.
    pub(super) fn hold(&mut self, wanted: Wanted, limit: u32, now: Instant) -> Result<Change, Full> {
        let Wanted { shown, polled, spacing } = wanted;
        if let Some(watched) = self.watched.get_mut(&shown) {
            watched.watches += 1;
            return Ok(Change::default());
        }
        let returned = polled.and_then(|polled| self.left.get(&polled)).map(|left| left.taken);
        let mut ended = Vec::new();
        if returned.is_none() {
            ended = self.places_for_one(limit as usize, now)?;
        }
        for polled in ended.iter().chain(&polled) {
            self.left.remove(polled);
        }
        let taken = returned.or_else(|| polled.and_then(|polled| self.beside(polled)));
        let begun = polled.filter(|_| taken.is_none());
        self.watched.insert(shown, Watched { watches: 1, polled, taken: taken.unwrap_or(now), spacing });
        Ok(Change { begun, ended })
    }

    /// What is to be let go of for one more to have a place.
    fn places_for_one(&self, limit: usize, now: Instant) -> Result<Vec<u64>, Full> {
        let over = (self.watched.len() + self.left.len() + 1).saturating_sub(limit);
        if over > self.left.len() {
            return Err(Full { wait: None });
        }
        let free = self.left.iter().filter(|(_, left)| left.free_from() <= now);
        let mut free: Vec<(Instant, u64)> = free.map(|(&polled, left)| (left.since, polled)).collect();
        if free.len() < over {
            let mut times: Vec<Instant> = self.left.values().map(Left::free_from).collect();
            times.sort_unstable();
            return Err(Full { wait: times.get(over - 1).map(|at| at.since(now)) });
        }
        free.sort_unstable();
        Ok(free.into_iter().take(over).map(|(_, polled)| polled).collect())
    }

    /// Since when something else of what is polled so has been watched.
    fn beside(&self, polled: u64) -> Option<Instant> {
        self.watched.values().filter(|watched| watched.polled == Some(polled)).map(|watched| watched.taken).min()
    }

    /// One watch fewer. With the last of what is polled its place stays taken while that is polled on, for `linger`, and
    /// for the spacing; without `linger` it is polled no more. What the subject has polled no more, and when
    /// [`Places::pass`] is to be called, where nobody will yet.
    pub(super) fn release(
        &mut self,
        shown: u64,
        linger: Option<Duration>,
        now: Instant,
    ) -> (Option<u64>, Option<Instant>) {
        let Some(watched) = self.watched.get_mut(&shown) else { return (None, None) };
        watched.watches -= 1;
        if watched.watches > 0 {
            return (None, None);
        }
        let Some(Watched { polled, taken, spacing, .. }) = self.watched.remove(&shown) else { return (None, None) };
        let Some(polled) = polled.filter(|&polled| self.beside(polled).is_none()) else { return (None, None) };
        let Some(linger) = linger else { return (Some(polled), None) };
        let until = (now + linger).max(taken + spacing);
        self.left.insert(polled, Left { taken, spacing, since: now, until });
        (None, (!std::mem::replace(&mut self.timed, true)).then_some(until))
    }

    /// What was left may make place at once: its subject was moved to another stream by no doing of its own.
    pub(super) fn yield_place(&mut self, polled: u64) {
        if let Some(left) = self.left.get_mut(&polled) {
            left.spacing = Duration::ZERO;
        }
    }

    /// Time has passed: what is polled no more, and when to look again, if something is left.
    pub(super) fn pass(&mut self, now: Instant) -> (Vec<u64>, Option<Instant>) {
        let over = self.left.iter().filter(|(_, left)| left.until <= now);
        let over: Vec<u64> = over.map(|(&polled, _)| polled).collect();
        for polled in &over {
            self.left.remove(polled);
        }
        let next = self.left.values().map(|left| left.until).min();
        self.timed = next.is_some();
        (over, next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINGER: Duration = Duration::from_secs(10);

    fn at(ms: u64) -> Instant {
        Instant::from_micros(1_000_000_000 + ms * 1_000)
    }

    fn place(no: u64) -> Wanted {
        Wanted { shown: no, polled: Some(no), spacing: Duration::from_secs(1) }
    }

    /// Watches for a moment.
    fn look(places: &mut Places, no: u64, limit: u32, ms: u64) -> Result<Change, Full> {
        let change = places.hold(place(no), limit, at(ms));
        if change.is_ok() {
            places.release(no, Some(LINGER), at(ms));
        }
        change
    }

    #[test]
    fn what_was_left_keeps_its_place_until_it_is_polled_no_more() {
        let mut places = Places::default();
        assert_eq!(look(&mut places, 1, 2, 0), Ok(Change { begun: Some(1), ended: vec![] }));
        assert_eq!(look(&mut places, 1, 2, 500), Ok(Change::default()), "it is polled already");
        assert_eq!(look(&mut places, 2, 2, 600), Ok(Change { begun: Some(2), ended: vec![] }));
        assert_eq!(look(&mut places, 3, 2, 700), Err(Full { wait: Some(Duration::from_millis(300)) }));
        assert_eq!(places.pass(at(10_499)), (vec![], Some(at(10_500))), "it lingers from when it was left");
        assert_eq!(places.pass(at(10_500)), (vec![1], Some(at(10_600))));
        assert_eq!(look(&mut places, 3, 2, 10_500), Ok(Change { begun: Some(3), ended: vec![] }));
        assert_eq!(places.pass(at(10_600)), (vec![2], Some(at(20_500))));
        assert_eq!(places.pass(at(20_500)), (vec![3], None));
        assert!(places.is_empty());
    }

    #[test]
    fn what_was_left_longest_ago_makes_place_and_not_before_its_time() {
        let mut places = Places::default();
        for (no, ms) in [(1, 0), (2, 100), (1, 200)] {
            assert!(look(&mut places, no, 2, ms).is_ok());
        }
        assert_eq!(look(&mut places, 3, 2, 999), Err(Full { wait: Some(Duration::from_millis(1)) }));
        assert_eq!(look(&mut places, 3, 2, 1_000), Ok(Change { begun: Some(3), ended: vec![1] }), "1 alone is free");
        assert_eq!(look(&mut places, 4, 2, 1_999), Ok(Change { begun: Some(4), ended: vec![2] }));
        let held = places.hold(place(3), 2, at(2_000));
        assert_eq!(held, Ok(Change::default()));
        assert_eq!(look(&mut places, 5, 2, 2_998), Err(Full { wait: Some(Duration::from_millis(1)) }));
        assert!(places.hold(place(4), 2, at(2_999)).is_ok());
        assert_eq!(look(&mut places, 5, 2, 9_000), Err(Full { wait: None }), "both are watched");
    }

    #[test]
    fn a_place_is_given_on_once_in_its_spacing_however_often_it_is_asked_for() {
        let mut places = Places::default();
        let limit = 8;
        let begun = (0..20_000).filter(|ms| look(&mut places, 100 + ms, limit, *ms).is_ok()).count();
        assert_eq!(begun, 20 * limit as usize, "as many as there are places, each second");
    }

    #[test]
    fn parts_of_one_stream_share_what_is_polled_and_each_takes_a_place_while_it_is_watched() {
        let mut places = Places::default();
        let part = |shown| Wanted { shown, polled: Some(7), spacing: Duration::from_secs(1) };
        assert_eq!(places.hold(part(1), 2, at(0)), Ok(Change { begun: Some(7), ended: vec![] }));
        assert_eq!(places.hold(part(2), 2, at(1)), Ok(Change::default()));
        assert_eq!(places.hold(part(3), 2, at(2)), Err(Full { wait: None }));
        assert_eq!(places.release(1, Some(LINGER), at(3)), (None, None));
        assert_eq!(places.hold(part(3), 2, at(4)), Ok(Change::default()));
        assert_eq!(places.release(2, Some(LINGER), at(5)), (None, None));
        assert_eq!(places.release(3, Some(LINGER), at(6)), (None, Some(at(10_006))));
        // One that is polled whoever asks leaves nothing.
        let other = Wanted { polled: None, ..part(9) };
        assert_eq!(places.hold(other, 2, at(7)), Ok(Change::default()));
        assert_eq!(places.release(9, Some(LINGER), at(8)), (None, None));
        assert_eq!(places.left.len(), 1);
    }

    #[test]
    fn a_stream_that_is_gone_leaves_its_place_at_once_and_one_that_was_moved_yields_it() {
        let mut places = Places::default();
        assert!(places.hold(place(1), 1, at(0)).is_ok());
        assert_eq!(places.release(1, None, at(1)), (Some(1), None));
        assert!(places.is_empty());
        assert!(look(&mut places, 2, 1, 2).is_ok());
        assert!(places.hold(place(3), 1, at(3)).is_err());
        places.yield_place(2);
        assert_eq!(places.hold(place(3), 1, at(3)), Ok(Change { begun: Some(3), ended: vec![2] }));
    }

    #[test]
    fn a_linger_of_nothing_keeps_the_place_for_the_spacing() {
        let mut places = Places::default();
        assert!(places.hold(place(1), 1, at(0)).is_ok());
        assert_eq!(places.release(1, Some(Duration::ZERO), at(5)), (None, Some(at(1_000))));
        assert_eq!(places.hold(place(2), 1, at(999)), Err(Full { wait: Some(Duration::from_millis(1)) }));
        assert_eq!(places.pass(at(1_000)), (vec![1], None));
        assert!(places.hold(place(2), 1, at(1_000)).is_ok());
    }

    #[test]
    fn a_limit_that_was_lowered_takes_as_many_places_as_it_must() {
        let mut places = Places::default();
        for no in 0..4 {
            assert!(look(&mut places, no, 4, no).is_ok());
        }
        assert_eq!(
            places.hold(place(9), 2, at(1_001)),
            Err(Full { wait: Some(Duration::from_millis(1)) }),
            "two are free, three are needed"
        );
        let change = places.hold(place(9), 2, at(1_002)).expect("a place");
        assert_eq!(change.ended, [0, 1, 2]);
    }
}
