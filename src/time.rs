//! Time as the core sees it: an argument, never asked for.
//!
//! [`Instant`] is CLOCK_BOOTTIME (it goes on through a suspend) in microseconds; [`WallTime`] is microseconds since the
//! Unix epoch, for credentials and for people only. `runtime::clock` makes a [`Now`] of both; a simulator makes its own.

pub mod iso;
pub mod steps;

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

    /// What the wall clock will say at `instant`, which is not before this, if it is not stepped meanwhile.
    pub fn wall_of_later(&self, instant: Instant) -> WallTime {
        self.wall + instant.since(self.at)
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
        assert_eq!(now.wall_of_later(later.at), WallTime::from_secs(12));
    }
}
