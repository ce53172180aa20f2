//! What the wall clock was between its steps: others may have dated what they say by any of it.
//!
//! Source: protocol version 1, section 5 («a step back revives nothing»). Memory: at most [`limits::CLOCK_STEPS_MAX`] readings
//! of both clocks. Errors: none.

use std::collections::VecDeque;

use super::{Now, WallTime};
use crate::limits;

/// The steps of the wall clock that were noticed, oldest first: what both clocks said just after each.
#[derive(Clone, Debug, Default)]
pub struct Steps(VecDeque<Now>);

impl Steps {
    /// The wall clock has been stepped, and says `now` since. Past the limit the two oldest become one, of the earlier wall
    /// time: who comes between them may be taken for older than they are, never for younger.
    pub fn take(&mut self, now: Now) {
        self.0.push_back(now);
        if self.0.len() > limits::CLOCK_STEPS_MAX
            && let (Some(oldest), Some(next)) = (self.0.pop_front(), self.0.front_mut())
        {
            next.wall = next.wall.min(oldest.wall_of_later(next.at));
        }
    }

    /// The earliest that the wall clock may mean by `then`, which has been: what it said, or would have said as it is `now`
    /// or was at any time between.
    pub fn earliest_wall_of(&self, then: Now, now: Now) -> WallTime {
        let between = self.0.iter().filter(|step| step.at >= then.at).map(|step| step.wall_of(then.at));
        between.fold(then.wall.min(now.wall_of(then.at)), WallTime::min)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::Instant;

    fn at(mono_s: u64, wall_s: u64) -> Now {
        Now { at: Instant::from_micros(mono_s * 1_000_000), wall: WallTime::from_secs(wall_s) }
    }

    #[test]
    fn without_a_step_it_is_what_the_clock_said() {
        let then = at(10, 100);
        assert_eq!(Steps::default().earliest_wall_of(then, at(50, 140)), then.wall);
    }

    #[test]
    fn a_step_back_counts_though_one_forward_has_followed() {
        let mut steps = Steps::default();
        let then = at(10, 100);
        steps.take(at(20, 90));
        steps.take(at(30, 120));
        assert_eq!(steps.earliest_wall_of(then, at(40, 130)), WallTime::from_secs(80), "as it was from 20 to 30");
        let later = at(25, 95);
        assert_eq!(steps.earliest_wall_of(later, at(40, 130)), later.wall, "what was stepped before does not count");
    }

    #[test]
    fn steps_past_the_limit_make_nobody_younger() {
        let mut steps = Steps::default();
        let then = at(0, 10_000);
        steps.take(at(1, 5_000));
        for second in 2..=limits::CLOCK_STEPS_MAX as u64 * 3 {
            steps.take(at(second, 10_000 + second));
            assert!(steps.0.len() <= limits::CLOCK_STEPS_MAX);
            let now = at(second + 1, 10_001 + second);
            assert_eq!(steps.earliest_wall_of(then, now), WallTime::from_secs(4_999));
        }
    }
}
