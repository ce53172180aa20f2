//! When the next poll is: intervals that follow what is seen, windows of the day, and how long an answer is fresh.
//!
//! Source: RFC 9111 section 4.2 for freshness. Memory: [`Pacing`] in the stream's options, one [`Pace`] a stream that has any.
//! Errors: none. Not here: back-off, `Retry-After` (`poll`), budgets that streams share (`budget`).
//!
//! Windows are of wall time at a fixed offset from UTC: no table of zones is consulted, and summer time is not known. A
//! window of a day reaches to the next one where its end is not after its beginning, and belongs to the day it begins on.

use std::time::Duration;

use crate::limits::RETRY_AFTER_MAX;
use crate::time::{Instant, Now, WallTime};

/// What a stream's polls go by beside its `interval`.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Pacing {
    /// `respect_max_age`: no poll while the upstream's answer is fresh by its own word.
    pub respect_max_age: bool,
    /// `interval_min` and `interval_max`: the interval moves between them.
    pub adaptive: Option<Adaptive>,
    /// `windows`: the first that holds counts.
    pub windows: Vec<Window>,
    /// What its clock is ahead of UTC by, in minutes (RFC 3339's offset).
    pub utc_offset_minutes: i32,
}

/// Bounds of an interval that moves: half as long after a change, half as long again after a poll without one.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Adaptive {
    /// The least.
    pub min: Duration,
    /// The greatest.
    pub max: Duration,
}

/// A time of the day, on some days, with an interval of its own.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Window {
    /// Minute of the day it begins with.
    pub from: u16,
    /// Minute of the day before which it ends; 1440 is midnight. Not after `from`: on the next day.
    pub to: u16,
    /// On which days it begins: bit 0 is Monday.
    pub days: u8,
    /// The interval in it; `None`: no poll.
    pub interval: Option<Duration>,
}

/// Days of the week, the first of which is bit 0 of a window's.
pub const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];
/// All days of a week.
pub const EVERY_DAY: u8 = 0x7f;
const DAY_MINUTES: u64 = 1440;
const MINUTE_US: u64 = 60_000_000;
/// A wait for a window is looked at again after this long: the wall clock may have been set.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// What holds at a moment.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Hour {
    /// No window: the stream's own interval.
    Usual,
    /// A window's interval.
    Every(Duration),
    /// No poll.
    Closed,
}

impl Pacing {
    /// Whether polls go by nothing but the interval.
    pub fn is_plain(&self) -> bool {
        !self.respect_max_age && self.adaptive.is_none() && self.windows.is_empty()
    }

    /// The minute of a week that begins on Monday, by the stream's clock.
    fn minute_of_week(&self, wall: WallTime) -> u64 {
        // 1970-01-01 was a Thursday.
        let minutes = (wall.as_micros() / MINUTE_US).saturating_add(3 * DAY_MINUTES);
        minutes.saturating_add_signed(self.utc_offset_minutes.into()) % (7 * DAY_MINUTES)
    }

    fn hour_at(&self, minute_of_week: u64) -> Hour {
        let window = self.windows.iter().find(|window| window.holds_at(minute_of_week));
        match window.map(|window| window.interval) {
            None => Hour::Usual,
            Some(Some(interval)) => Hour::Every(interval),
            Some(None) => Hour::Closed,
        }
    }

    /// How long it is until something else holds than at `wall`; `None`: not within a week.
    fn until_next(&self, wall: WallTime) -> Option<Duration> {
        let minute = self.minute_of_week(wall);
        let now = self.hour_at(minute);
        let within = wall.as_micros() % MINUTE_US;
        // Something begins or ends at the ends of windows alone.
        let ends = self.windows.iter().flat_map(|window| [u64::from(window.from), u64::from(window.to) % DAY_MINUTES]);
        let ahead = ends.flat_map(|end| {
            (0..7).map(move |day| (day * DAY_MINUTES + end + 7 * DAY_MINUTES - minute - 1) % (7 * DAY_MINUTES) + 1)
        });
        let minutes = ahead.filter(|ahead| self.hour_at((minute + ahead) % (7 * DAY_MINUTES)) != now).min()?;
        Some(Duration::from_micros(minutes * MINUTE_US - within))
    }
}

impl Window {
    fn holds_at(&self, minute_of_week: u64) -> bool {
        let (day, minute) = (minute_of_week / DAY_MINUTES, minute_of_week % DAY_MINUTES);
        let begins_on = |day: u64| self.days >> (day % 7) & 1 == 1;
        let (from, to) = (u64::from(self.from), u64::from(self.to));
        if from < to {
            return begins_on(day) && (from..to).contains(&minute);
        }
        (begins_on(day) && minute >= from) || (begins_on(day + 6) && minute < to)
    }
}

/// A minute of the day, `HH:MM`.
pub fn time_text(minute: u16) -> String {
    format!("{:02}:{:02}", minute / 60, minute % 60)
}

/// An offset from UTC, `+HH:MM` or `-HH:MM`.
pub fn offset_text(minutes: i32) -> String {
    let sign = if minutes < 0 { '-' } else { '+' };
    format!("{sign}{:02}:{:02}", minutes.abs() / 60, minutes.abs() % 60)
}

/// The names of a window's days.
pub fn days_of(days: u8) -> impl Iterator<Item = &'static str> {
    DAYS.into_iter().enumerate().filter(move |(place, _)| days >> place & 1 == 1).map(|(_, name)| name)
}

/// The pace of one stream.
#[derive(Clone, Debug)]
pub struct Pace {
    pacing: Pacing,
    /// The stream's own.
    usual: Duration,
    /// What the moving interval is now.
    moving: Duration,
    /// How fresh the last answer is by the upstream's word.
    heard: Option<Fresh>,
    /// The same of the value held.
    fresh: Option<Fresh>,
}

/// How fresh an answer is.
#[derive(Clone, Copy, Debug)]
struct Fresh {
    /// For so long, counted from when it came:
    life: Duration,
    /// until then.
    until: Instant,
}

impl Pace {
    /// The pace of a stream with this interval; `None`: it has none but that.
    pub fn new(pacing: &Pacing, interval: Duration) -> Option<Pace> {
        if pacing.is_plain() {
            return None;
        }
        let moving = pacing.adaptive.map_or(interval, |Adaptive { min, max }| interval.clamp(min, max.max(min)));
        Some(Pace { pacing: pacing.clone(), usual: interval, moving, heard: None, fresh: None })
    }

    /// Whether, and until when, nothing is polled now: what holds then is to be asked again.
    pub fn closed_until(&self, now: Now) -> Option<Instant> {
        let minute = self.pacing.minute_of_week(now.wall);
        if self.pacing.hour_at(minute) != Hour::Closed {
            return None;
        }
        let wait = self.pacing.until_next(now.wall).unwrap_or(LOOK_AGAIN);
        Some(now.at + wait.min(LOOK_AGAIN))
    }

    /// When something else holds than now; `None`: not within a week.
    pub fn opens_at(&self, now: Now) -> Option<Instant> {
        self.pacing.until_next(now.wall).map(|wait| now.at + wait)
    }

    /// There was an answer that is fresh for so long. `confirms`: it is a 304, and what it does not say is as it was
    /// (RFC 9111 sections 3.2 and 4.3.4).
    pub fn heard(&mut self, now: Instant, fresh_for: Option<Duration>, confirms: bool) {
        let held = self.fresh.filter(|_| confirms).map(|fresh| fresh.life);
        let life = fresh_for.or(held).filter(|_| self.pacing.respect_max_age).map(|life| life.min(RETRY_AFTER_MAX));
        self.heard = life.map(|life| Fresh { life, until: now + life });
    }

    /// That answer is, or confirms, the value, which has changed or not.
    pub fn succeeded(&mut self, changed: bool) {
        self.fresh = self.heard;
        if let Some(Adaptive { min, max }) = self.pacing.adaptive {
            self.moving =
                if changed { self.moving / 2 } else { self.moving + self.moving / 2 }.clamp(min, max.max(min));
        }
    }

    /// The value is not held any more: how fresh it was counts for nothing.
    pub fn forget(&mut self) {
        self.fresh = None;
    }

    /// When the value held ceases to be fresh.
    pub fn fresh_until(&self) -> Option<Instant> {
        self.fresh.map(|fresh| fresh.until)
    }

    /// The interval that holds now, and whether it is one that stays: the polls of those keep a phase of their own.
    pub fn interval(&self, now: Now) -> (Duration, bool) {
        match self.pacing.hour_at(self.pacing.minute_of_week(now.wall)) {
            Hour::Every(interval) => (interval, true),
            Hour::Usual | Hour::Closed if self.pacing.adaptive.is_some() => (self.moving, false),
            Hour::Usual | Hour::Closed => (self.usual, true),
        }
    }

    /// When another interval holds than now, where that is before `due`: polls go by that then.
    pub fn change_before(&self, now: Now, due: Instant) -> Option<Instant> {
        if self.pacing.windows.is_empty() {
            return None;
        }
        let next = now.at + self.pacing.until_next(now.wall)?;
        (next < due).then_some(next)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Monday, 2026-11-23 00:00:00 UTC.
    const MONDAY: u64 = 1_795_392_000;

    fn window(from: u16, to: u16, days: u8, interval_s: Option<u64>) -> Window {
        Window { from, to, days, interval: interval_s.map(Duration::from_secs) }
    }

    fn now(day: u64, hour: u64, minute: u64, second: u64) -> Now {
        let wall = WallTime::from_secs(MONDAY + ((day * 24 + hour) * 60 + minute) * 60 + second);
        Now { at: Instant::from_micros(wall.as_micros() - 1_000_000_000_000), wall }
    }

    fn pace(windows: &[Window], utc_offset_minutes: i32) -> Pace {
        let pacing = Pacing { windows: windows.to_vec(), utc_offset_minutes, ..Pacing::default() };
        Pace::new(&pacing, Duration::from_secs(60)).expect("it is not plain")
    }

    #[test]
    fn a_stream_with_nothing_but_an_interval_has_no_pace() {
        assert!(Pace::new(&Pacing::default(), Duration::from_secs(1)).is_none());
    }

    #[test]
    fn windows_have_their_interval_and_beyond_them_it_is_the_usual_one() {
        const WORKDAYS: u8 = 0x1f;
        let pace = pace(&[window(9 * 60, 17 * 60, WORKDAYS, Some(1))], 0);
        let every = |now| pace.interval(now).0.as_secs();
        for day in 0..7 {
            let in_it = if day < 5 { 1 } else { 60 };
            let found = [now(day, 8, 59, 59), now(day, 9, 0, 0), now(day, 16, 59, 59), now(day, 17, 0, 0)].map(every);
            assert_eq!(found, [60, in_it, in_it, 60], "day {day}");
        }
        let due = |now: Now| now.at + Duration::from_secs(7_200);
        let eight = now(0, 8, 30, 15);
        assert_eq!(pace.change_before(eight, due(eight)), Some(eight.at + Duration::from_secs(29 * 60 + 45)));
        assert_eq!(pace.change_before(eight, eight.at + Duration::from_secs(60)), None);
        let friday = now(4, 17, 0, 0);
        assert_eq!(pace.change_before(friday, due(friday)), None, "not before Monday");
    }

    #[test]
    fn a_window_over_midnight_belongs_to_the_day_it_begins_on() {
        // Sunday's, 22:00 to 06:00, without polls.
        let pace = pace(&[window(22 * 60, 6 * 60, 1 << 6, None)], 0);
        let closed = |now: Now| pace.closed_until(now).map(|until| until.since(now.at).as_secs());
        assert_eq!(closed(now(6, 21, 59, 59)), None);
        assert_eq!(closed(now(6, 22, 0, 0)), Some(60), "it is looked at again");
        assert_eq!(closed(now(7, 5, 59, 50)), Some(10));
        assert_eq!(closed(now(7, 6, 0, 0)), None);
        assert_eq!(closed(now(0, 5, 0, 0)), Some(60), "Monday morning is Sunday's night");
        assert_eq!(closed(now(1, 5, 0, 0)), None);
        assert_eq!(closed(now(0, 23, 0, 0)), None);
    }

    #[test]
    fn the_first_window_that_holds_counts_and_a_day_may_be_whole() {
        let pace = pace(&[window(720, 780, EVERY_DAY, None), window(0, 1440, EVERY_DAY, Some(5))], 0);
        assert!(pace.closed_until(now(2, 12, 30, 0)).is_some());
        assert_eq!(pace.interval(now(2, 11, 59, 0)).0.as_secs(), 5);
        let late = now(2, 23, 59, 59);
        assert_eq!(pace.change_before(late, late.at + Duration::from_secs(60)), None, "nothing changes at midnight");
        let same = self::pace(&[window(0, 0, EVERY_DAY, None)], 0);
        assert!(same.closed_until(now(3, 0, 0, 0)).is_some() && same.closed_until(now(3, 23, 59, 59)).is_some());
    }

    #[test]
    fn the_clock_is_at_a_fixed_offset() {
        let ahead = pace(&[window(9 * 60, 10 * 60, 1, Some(1))], 5 * 60 + 30);
        assert_eq!(ahead.interval(now(0, 3, 29, 59)).0.as_secs(), 60);
        assert_eq!(ahead.interval(now(0, 3, 30, 0)).0.as_secs(), 1);
        let behind = pace(&[window(20 * 60, 21 * 60, 1 << 6, Some(1))], -8 * 60);
        assert_eq!(behind.interval(now(0, 4, 0, 0)).0.as_secs(), 1, "Sunday evening there");
    }

    #[test]
    fn a_moving_interval_follows_what_is_seen_within_its_bounds() {
        let s = Duration::from_secs;
        let pacing = Pacing { adaptive: Some(Adaptive { min: s(1), max: s(30) }), ..Pacing::default() };
        let mut pace = Pace::new(&pacing, s(4)).expect("it is not plain");
        let mut step = |changed| {
            pace.succeeded(changed);
            pace.interval(now(0, 0, 0, 0)).0.as_millis()
        };
        assert_eq!([step(true), step(true), step(true)], [2_000, 1_000, 1_000]);
        assert_eq!([step(false), step(false), step(true)], [1_500, 2_250, 1_125]);
        for _ in 0..20 {
            step(false);
        }
        assert_eq!([step(false), step(true)], [30_000, 15_000]);
    }

    #[test]
    fn freshness_counts_where_it_is_asked_for() {
        let s = Duration::from_secs;
        let at = Instant::from_micros(7);
        for respect_max_age in [false, true] {
            let pacing =
                Pacing { respect_max_age, adaptive: Some(Adaptive { min: s(1), max: s(2) }), ..Pacing::default() };
            let mut pace = Pace::new(&pacing, s(1)).expect("it is not plain");
            pace.heard(at, Some(s(30)), false);
            pace.succeeded(true);
            assert_eq!(pace.fresh_until(), respect_max_age.then_some(at + s(30)));
            pace.heard(at, Some(s(1 << 40)), false);
            pace.succeeded(true);
            assert_eq!(pace.fresh_until(), respect_max_age.then_some(at + s(86_400)), "a day at most");
            pace.forget();
            assert_eq!(pace.fresh_until(), None);
        }
    }

    #[test]
    fn an_answer_that_confirms_the_value_and_says_no_more_is_as_fresh_as_that_was() {
        let s = Duration::from_secs;
        let mut pace =
            Pace::new(&Pacing { respect_max_age: true, ..Pacing::default() }, s(1)).expect("it is not plain");
        let mut fresh_until = |at_s: u64, fresh_for: Option<u64>, confirms, is_value| {
            pace.heard(Instant::from_micros(at_s * 1_000_000), fresh_for.map(s), confirms);
            if is_value {
                pace.succeeded(false);
            }
            pace.fresh_until().map(|until| until.as_micros() / 1_000_000)
        };
        assert_eq!(fresh_until(1, None, true, true), None, "nothing was said yet");
        assert_eq!(fresh_until(100, Some(30), false, true), Some(130));
        assert_eq!(fresh_until(200, None, true, true), Some(230));
        assert_eq!(fresh_until(300, None, true, true), Some(330), "however often");
        assert_eq!(fresh_until(310, Some(5), false, false), Some(330), "a failure is no value");
        assert_eq!(fresh_until(400, None, true, true), Some(430));
        assert_eq!(fresh_until(500, Some(7), true, true), Some(507));
        assert_eq!(fresh_until(600, None, true, true), Some(607));
        assert_eq!(fresh_until(700, None, false, true), None, "another value, of which nothing is said");
        assert_eq!(fresh_until(800, None, true, true), None);
    }

    proptest! {
        #[test]
        fn the_next_change_is_the_first(
            windows in prop::collection::vec((0..1440_u16, 0..=1440_u16, 0..=0x7f_u8, prop::option::of(1..3_u64)), 1..5),
            offset in -14 * 60..=14 * 60,
            start_s in 0..(7 * 86_400_u64),
        ) {
            let windows: Vec<Window> =
                windows.into_iter().map(|(from, to, days, interval)| window(from, to, days, interval)).collect();
            let pacing = Pacing { windows, utc_offset_minutes: offset, ..Pacing::default() };
            let wall = WallTime::from_secs(MONDAY + start_s);
            let hour = |wall| pacing.hour_at(pacing.minute_of_week(wall));
            let first = (1..=7 * DAY_MINUTES)
                .map(|ahead| WallTime::from_micros((wall.as_micros() / MINUTE_US + ahead) * MINUTE_US))
                .find(|&then| hour(then) != hour(wall));
            prop_assert_eq!(pacing.until_next(wall), first.map(|then| then.since(wall)));
        }
    }
}
