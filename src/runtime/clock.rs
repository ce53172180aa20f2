//! The clocks: the only place where they are read, and where a helper thread waits for them.
//!
//! Source: clock_gettime(2), nanosleep(2). Memory: none. Errors: none: these clocks exist on every Linux.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::time::{Instant, Now, WallTime};

/// By how much the clocks must part before credentials' deadlines are anchored anew.
const STEP: Duration = Duration::from_millis(100);

/// Both clocks, now. CLOCK_BOOTTIME goes on through a suspend.
pub fn now() -> Now {
    let micros = |clock| {
        let time = clock_gettime(clock);
        let whole = u64::try_from(time.tv_sec).unwrap_or(0).saturating_mul(1_000_000);
        whole.saturating_add(u64::try_from(time.tv_nsec / 1_000).unwrap_or(0))
    };
    Now { at: Instant::from_micros(micros(ClockId::Boottime)), wall: WallTime::from_micros(micros(ClockId::Realtime)) }
}

/// Holds this thread for `duration`. For helper threads alone: a core waits for its deadlines with its sockets.
#[allow(clippy::disallowed_methods, reason = "the one place, so that each who waits says which thread it holds")]
pub fn hold_thread(duration: Duration) {
    std::thread::sleep(duration);
}

/// Notices when the wall clock is stepped.
#[derive(Debug)]
pub struct StepWatch {
    anchor: Now,
}

impl StepWatch {
    /// Watches from `now` on.
    pub fn new(now: Now) -> StepWatch {
        StepWatch { anchor: now }
    }

    /// Whether the wall clock has been stepped since this was last true, by more than 100 ms against the other.
    pub fn stepped(&mut self, now: Now) -> bool {
        let expected = self.anchor.wall + now.at.since(self.anchor.at);
        let apart = if expected > now.wall { expected.since(now.wall) } else { now.wall.since(expected) };
        if apart <= STEP {
            return false;
        }
        self.anchor = now;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_of_over_100_ms_are_noticed_once_in_either_direction() {
        let at = |mono_ms: u64, wall_ms: u64| Now {
            at: Instant::from_micros(mono_ms * 1_000),
            wall: WallTime::from_micros(wall_ms * 1_000),
        };
        let mut watch = StepWatch::new(at(0, 50_000));
        assert!(!watch.stepped(at(1_000, 51_100)), "100 ms may be slewing");
        assert!(watch.stepped(at(2_000, 52_101)));
        assert!(!watch.stepped(at(3_000, 53_101)));
        assert!(watch.stepped(at(4_000, 44_101)), "a step back");
    }

    #[test]
    fn the_clocks_go_forward() {
        let first = now();
        let second = now();
        assert!(second.at >= first.at && first.wall > WallTime::from_secs(1_700_000_000));
    }
}
