//! Points in time as the configuration writes them: TOML's offset date-times, which are RFC 3339's.
//!
//! Source: TOML 1.0 «Offset Date-Time», RFC 3339 section 5.6. Memory: none. Errors: [`FormError::Moment`].

use toml::value::{Datetime, Offset};

use super::form::FormError;
use crate::time::WallTime;

const DAY_S: i64 = 86_400;
const SECOND_US: u64 = 1_000_000;

/// The moment that `written` is. One without a time or an offset would mean another in each place, and is refused; so is
/// one before 1970.
pub(super) fn read(written: &Datetime) -> Result<WallTime, FormError> {
    let not_one = || FormError::Moment { found: written.to_string() };
    let (Some(date), Some(time), Some(offset)) = (written.date, written.time, written.offset) else {
        return Err(not_one());
    };
    let days = days_from_1970(date.year.into(), date.month.into(), date.day.into());
    let second = i64::from(time.hour) * 3600 + i64::from(time.minute) * 60 + i64::from(time.second.unwrap_or(0));
    let minutes_ahead = match offset {
        Offset::Z => 0,
        Offset::Custom { minutes } => i64::from(minutes),
    };
    let seconds = days * DAY_S + second - minutes_ahead * 60;
    let us = u64::try_from(seconds).map_err(|_| not_one())? * SECOND_US;
    Ok(WallTime::from_micros(us + u64::from(time.nanosecond.unwrap_or(0)) / 1000))
}

/// `at` as it may be written in the file: UTC, with as much of a second as it has.
pub(super) fn text(at: WallTime) -> String {
    let seconds = i64::try_from(at.as_secs()).unwrap_or(i64::MAX);
    let (days, second) = (seconds / DAY_S, seconds % DAY_S);
    let (year, month, day) = date_of(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let fraction = match at.as_micros() % SECOND_US {
        0 => String::new(),
        us => format!(".{us:06}"),
    };
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}{fraction}Z")
}

/// Days from 1970-01-01 to a date of the Gregorian calendar. Years are counted from March, so that a leap day is a year's
/// last; 1970-01-01 is day 719,468 of year 0, and 400 years have 146,097 days.
fn days_from_1970(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

/// The date that is so many days after 1970-01-01.
fn date_of(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    (era * 400 + year_of_era + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn micros(text: &str) -> Result<u64, FormError> {
        read(&text.parse().expect("TOML")).map(WallTime::as_micros)
    }

    #[test]
    fn moments_are_what_date_says_they_are() {
        // date -u -d … +%s
        for (text, seconds) in [
            ("1970-01-01T00:00:00Z", 0),
            ("2000-02-29T12:00:00Z", 951_825_600),
            ("2027-01-01T00:00:00Z", 1_798_761_600),
            ("2027-01-01T00:00:00+01:00", 1_798_758_000),
            ("2026-12-31T16:30:00-07:30", 1_798_761_600),
            ("2100-03-01 00:00:00z", 4_107_542_400),
            ("9999-12-31T23:59:59Z", 253_402_300_799),
        ] {
            assert_eq!(micros(text), Ok(seconds * 1_000_000), "{text}");
        }
        assert_eq!(micros("1970-01-01T00:00:01.000250999Z"), Ok(1_000_250));
    }

    #[test]
    fn what_is_no_moment_is_refused() {
        for text in
            ["2027-01-01T00:00:00", "2027-01-01", "00:00:00", "1969-12-31T23:59:59Z", "1970-01-01T00:00:00+01:00"]
        {
            assert!(matches!(micros(text), Err(FormError::Moment { .. })), "{text}");
        }
    }

    #[test]
    fn what_is_written_is_read_again() {
        for day in 0..60_000 {
            let at = WallTime::from_micros((day * 86_400 + day) * 1_000_000 + day % 3 * 125_000);
            assert_eq!(micros(&text(at)), Ok(at.as_micros()), "{}", text(at));
        }
        assert_eq!(text(WallTime::from_secs(1_798_761_600)), "2027-01-01T00:00:00Z");
        assert_eq!(text(WallTime::from_micros(1_000_250)), "1970-01-01T00:00:01.000250Z");
    }
}
