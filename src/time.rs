//! Time as the core sees it: an argument, never asked for.
//!
//! [`Instant`] is CLOCK_BOOTTIME (it goes on through a suspend) in microseconds; [`WallTime`] is microseconds since the
//! Unix epoch, for credentials and for people only. `runtime::clock` makes a [`Now`] of both; a simulator makes its own.

pub mod iso;

use std::fmt;
use std::ops::{Add, Sub};
use std::time::Duration;

/// A point on the monotonic clock, in microseconds since some fixed start.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Instant(u64);

/// A point on the wall clock: microseconds since the Unix epoch.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct WallTime(u64);

/// Both clocks, read together.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Now {
    /// The monotonic clock: what deadlines are kept in.
    pub at: Instant,
    /// The wall clock: what credentials and `ts` are written in.
    pub wall: WallTime,
}

impl Instant {
    /// The point `us` microseconds after the clock's start.
    pub const fn from_micros(us: u64) -> Instant {
        Instant(us)
    }

    /// Microseconds since the clock's start.
    pub const fn as_micros(self) -> u64 {
        self.0
    }

    /// How long after `earlier` this is; zero where it is not after it.
    pub fn since(self, earlier: Instant) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Instant {
    type Output = Instant;
    fn add(self, by: Duration) -> Instant {
        Instant(self.0.saturating_add(u64::try_from(by.as_micros()).unwrap_or(u64::MAX)))
    }
}

impl Sub<Duration> for Instant {
    type Output = Instant;
    fn sub(self, by: Duration) -> Instant {
        Instant(self.0.saturating_sub(u64::try_from(by.as_micros()).unwrap_or(u64::MAX)))
    }
}

impl WallTime {
    /// The point `us` microseconds after the Unix epoch.
    pub const fn from_micros(us: u64) -> WallTime {
        WallTime(us)
    }

    /// The point `s` seconds after the Unix epoch.
    pub const fn from_secs(s: u64) -> WallTime {
        WallTime(s.saturating_mul(1_000_000))
    }

    /// Microseconds since the Unix epoch: the unit of `ts` and `expires_at` on the wire.
    pub const fn as_micros(self) -> u64 {
        self.0
    }

    /// Whole seconds since the Unix epoch, rounded down: the unit of a JWT's NumericDate.
    pub const fn as_secs(self) -> u64 {
        self.0 / 1_000_000
    }

    /// How long after `earlier` this is; zero where it is not after it.
    pub fn since(self, earlier: WallTime) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for WallTime {
    type Output = WallTime;
    fn add(self, by: Duration) -> WallTime {
        WallTime(self.0.saturating_add(u64::try_from(by.as_micros()).unwrap_or(u64::MAX)))
    }
}

impl Sub<Duration> for WallTime {
    type Output = WallTime;
    fn sub(self, by: Duration) -> WallTime {
        WallTime(self.0.saturating_sub(u64::try_from(by.as_micros()).unwrap_or(u64::MAX)))
    }
}

impl fmt::Display for WallTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl Now {
    /// When the wall clock will say `wall`, if neither clock is stepped meanwhile: now, where it already has.
    pub fn instant_of(&self, wall: WallTime) -> Instant {
        self.at + wall.since(self.wall)
    }

    /// What the wall clock would have said at `instant`, which has been, if it had always been as it is now.
    pub fn wall_of(&self, instant: Instant) -> WallTime {
        self.wall - self.at.since(instant)
    }

    /// The earliest that the wall clock may mean by `then`, which has been: what it said, or would have said as it is now. It
    /// may have been set forward or back since, before or after others have dated what they say by it.
    pub fn earliest_wall_of(&self, then: Now) -> WallTime {
        then.wall.min(self.wall_of(then.at))
    }
}

/// Steps of the wall clock that are told apart; of more the earliest count as one.
const STEPS_MAX: usize = 16;

/// What the wall clock was set to, as far as it is set back by it: others may have dated what they say by each of them.
/// At most [`STEPS_MAX`].
#[derive(Clone, Debug, Default)]
pub struct Steps(Vec<Now>);

impl Steps {
    /// The wall clock was set to what `now` says.
    pub fn was_set(&mut self, now: Now) {
        // Whoever may mean one that was later by comparison may mean this one, too.
        while self.0.last().is_some_and(|last| now.wall_of(last.at) <= last.wall) {
            self.0.pop();
        }
        self.0.push(now);
        if self.0.len() > STEPS_MAX
            && let [first, second, ..] = &mut *self.0
        {
            // So more is taken for early than was, never less.
            *second = Now { at: second.at, wall: first.wall + second.at.since(first.at) };
            self.0.remove(0);
        }
    }

    /// The earliest that the wall clock may mean by `then`, which has been: what it said, or would have said as it is `now`
    /// or has been meanwhile.
    pub fn earliest_wall_of(&self, now: Now, then: Now) -> WallTime {
        let meanwhile = self.0.iter().filter(|step| step.at >= then.at).map(|step| step.wall_of(then.at)).min();
        let earliest = now.earliest_wall_of(then);
        meanwhile.map_or(earliest, |meanwhile| meanwhile.min(earliest))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wall_deadline_is_anchored_to_the_monotonic_clock() {
        let now = Now { at: Instant::from_micros(50), wall: WallTime::from_secs(10) };
        assert_eq!(now.instant_of(WallTime::from_secs(12)), Instant::from_micros(2_000_050));
        assert_eq!(now.instant_of(WallTime::from_secs(9)), now.at, "a deadline that has passed is due now");
        let later = Now { at: Instant::from_micros(2_000_050), wall: WallTime::from_secs(7) };
        assert_eq!(later.wall_of(now.at), WallTime::from_secs(5), "the clock was set back meanwhile");
        assert_eq!(later.earliest_wall_of(now), WallTime::from_secs(5));
        let later = Now { wall: WallTime::from_secs(90), ..later };
        assert_eq!(later.earliest_wall_of(now), now.wall, "the clock was set forward");
    }

    fn now(at_s: u64, wall_s: u64) -> Now {
        Now { at: Instant::from_micros(at_s * 1_000_000), wall: WallTime::from_secs(wall_s) }
    }

    #[test]
    fn a_clock_that_was_set_back_and_forward_again_may_mean_what_it_said_in_between() {
        let (mut steps, then) = (Steps::default(), now(10, 1_010));
        let earliest = |steps: &Steps, then| steps.earliest_wall_of(now(40, 1_035), then).as_secs();
        assert_eq!(earliest(&steps, then), 1_005);
        steps.was_set(now(20, 1_000));
        assert_eq!(earliest(&steps, then), 990);
        steps.was_set(now(30, 1_025));
        assert_eq!((earliest(&steps, then), steps.0.len()), (990, 2));
        assert_eq!(earliest(&steps, now(25, 1_005)), 1_005);
        assert_eq!(earliest(&steps, now(35, 1_030)), 1_030, "that was afterwards");
        steps.was_set(now(36, 900));
        assert_eq!((earliest(&steps, then), steps.0.len()), (874, 1), "what was later by comparison counts no more");
    }

    #[test]
    fn of_more_steps_than_are_told_apart_none_is_taken_for_later_than_it_was() {
        let mut steps = Steps::default();
        // Ever forward, and each by less than time has passed.
        for no in 1..=100 {
            steps.was_set(now(no * 10, 1_000 + no * 11));
        }
        assert_eq!(steps.0.len(), STEPS_MAX);
        for at in (5..1_000).step_by(10) {
            let true_step = at / 10 + 1;
            let meant = steps.earliest_wall_of(now(1_005, 2_105), now(at, 5_000)).as_secs();
            assert!(meant <= 1_000 + true_step * 11 - (true_step * 10 - at), "{at}: {meant}");
        }
    }
}
