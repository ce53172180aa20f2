//! Points in time as HTTP writes them, and the wait that an upstream asks for.
//!
//! Source: RFC 9110 sections 5.6.7 (all three forms of a date) and 10.2.3 (Retry-After).
//! Memory: none. Errors: `None`; a wait that cannot be read is no wait.

use std::time::Duration;

use crate::limits::RETRY_AFTER_MAX;
use crate::time::WallTime;

/// Longest date: `Wednesday, 06-Nov-94 08:49:37 GMT` and some.
const DATE_BYTES_MAX: usize = 40;

const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// The time to wait that a `Retry-After` asks for, in seconds or until a date; at most `RETRY_AFTER_MAX`, zero for a
/// date that has passed.
pub fn retry_after(value: &[u8], now: WallTime) -> Option<Duration> {
    let wait = match crate::codec::http::parse_content_length(value) {
        Some(seconds) => Duration::from_secs(seconds),
        None => http_date(value, now)?.since(now),
    };
    Some(wait.min(RETRY_AFTER_MAX))
}

/// Reads an HTTP-date in any of its forms; one before 1970 is 1970. `now` tells the century of a two-digit year.
pub fn http_date(value: &[u8], now: WallTime) -> Option<WallTime> {
    if value.len() > DATE_BYTES_MAX {
        return None;
    }
    let parts: Vec<&str> = std::str::from_utf8(value).ok()?.split(' ').collect();
    let (day, month, year, time) = match *parts.as_slice() {
        // IMF-fixdate: Sun, 06 Nov 1994 08:49:37 GMT
        [weekday, day, month, year, time, "GMT"] if is_day(weekday.strip_suffix(',')?, 3) => {
            (number(day, 2)?, month, number(year, 4)?, time)
        }
        // rfc850-date: Sunday, 06-Nov-94 08:49:37 GMT
        [weekday, date, time, "GMT"] if DAYS.contains(&weekday.strip_suffix(',')?) => {
            let mut date = date.split('-');
            let (day, month, year, None) = (date.next()?, date.next()?, date.next()?, date.next()) else {
                return None;
            };
            (number(day, 2)?, month, full_year(number(year, 2)?, now), time)
        }
        // asctime-date: Sun Nov  6 08:49:37 1994, the day padded with a space
        [weekday, month, "", day, time, year] if is_day(weekday, 3) => (number(day, 1)?, month, number(year, 4)?, time),
        [weekday, month, day, time, year] if is_day(weekday, 3) => (number(day, 2)?, month, number(year, 4)?, time),
        _ => return None,
    };
    let month = (1u64..).zip(MONTHS).find(|(_, name)| *name == month)?.0;
    if day == 0 || day > days_in_month(year, month) {
        return None;
    }
    let mut time = time.split(':');
    let (hour, minute, second, None) = (time.next()?, time.next()?, time.next()?, time.next()) else {
        return None;
    };
    let (hour, minute, second) = (number(hour, 2)?, number(minute, 2)?, number(second, 2)?);
    // A second of 60 is a leap second.
    if hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let seconds = hour * 3600 + minute * 60 + second;
    Some(
        days_since_1970(year, month, day)
            .map_or_else(WallTime::default, |days| WallTime::from_secs(days * 86_400 + seconds)),
    )
}

fn is_day(text: &str, letters: usize) -> bool {
    DAYS.iter().any(|day| day.get(..letters) == Some(text))
}

/// The number of exactly so many digits.
fn number(text: &str, digits: usize) -> Option<u64> {
    (text.len() == digits && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().ok()).flatten()
}

/// RFC 9110 5.6.7: a two-digit year that would lie more than 50 years ahead is one of the past.
fn full_year(two_digits: u64, now: WallTime) -> u64 {
    let this_year = 1970 + now.as_secs() / 31_556_952;
    let year = this_year / 100 * 100 + two_digits;
    if year > this_year + 50 {
        year - 100
    } else if year + 50 < this_year {
        year + 100
    } else {
        year
    }
}

const fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

const fn days_in_month(year: u64, month: u64) -> u64 {
    match month {
        2 if is_leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days from 1970-01-01 to a date of the Gregorian calendar; `None` before it.
fn days_since_1970(year: u64, month: u64, day: u64) -> Option<u64> {
    // Leap days of all years before this one.
    let leap_days = |year: u64| (year / 4 + year / 400) - year / 100;
    let before = year.checked_sub(1970)? * 365 + leap_days(year - 1) - leap_days(1969);
    Some(before + (1..month).map(|month| days_in_month(year, month)).sum::<u64>() + day - 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{prop_assert_eq, proptest};

    use super::*;

    const NOW: WallTime = WallTime::from_secs(1_795_350_000); // November 2026

    fn date(text: &str) -> Option<u64> {
        http_date(text.as_bytes(), NOW).map(WallTime::as_secs)
    }

    #[test]
    fn dates_have_three_forms() {
        for text in ["Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"] {
            assert_eq!(date(text), Some(784_111_777), "{text}");
        }
        assert_eq!(date("Thu, 29 Feb 2024 23:59:60 GMT"), Some(1_709_251_200), "a leap day, a leap second");
        assert_eq!(date("Wed Nov 25 00:00:00 2026"), Some(1_795_564_800));
        assert_eq!(date("Thu, 01 Jan 1970 00:00:01 GMT"), Some(1));
        assert_eq!(date("Wed, 31 Dec 1969 23:59:59 GMT"), Some(0));
    }

    #[test]
    fn a_two_digit_year_is_the_nearest() {
        assert_eq!(date("Tuesday, 01-Jan-76 00:00:00 GMT"), Some(3_345_062_400), "50 years ahead: 2076");
        assert_eq!(date("Saturday, 01-Jan-77 00:00:00 GMT"), Some(220_924_800), "more than 50 years ahead: 1977");
    }

    #[test]
    fn what_is_no_date_is_none() {
        for bad in [
            "",
            "0x10",
            "-1",
            "1.5",
            "Sun, 06 Nov 1994 08:49:37",
            "Sun, 06 Nov 1994 08:49:37 UTC",
            "Sun, 6 Nov 1994 08:49:37 GMT",
            "Sun, 00 Nov 1994 08:49:37 GMT",
            "Sun, 31 Nov 1994 08:49:37 GMT",
            "Sun, 29 Feb 2023 08:49:37 GMT",
            "Sun, 06 nov 1994 08:49:37 GMT",
            "Sum, 06 Nov 1994 08:49:37 GMT",
            "Sun, 06 Nov 1994 24:00:00 GMT",
            "Sun, 06 Nov 1994 08:60:00 GMT",
            "Sun, 06 Nov 1994 08:49:61 GMT",
            "Sun, 06 Nov 1994 08:49 GMT",
            "Sun,  06 Nov 1994 08:49:37 GMT",
            "Sunday, 06-Nov-1994 08:49:37 GMT",
            "Sun Nov 6 08:49:37 1994",
            "Sun, 06 Nov +994 08:49:37 GMT",
            "Sun, 06 Nov 1994 08:49:37 GMT and very much more than that",
        ] {
            assert_eq!(date(bad), None, "{bad:?}");
        }
        assert_eq!(http_date(b"\xff", NOW), None);
    }

    #[test]
    fn an_upstream_may_ask_for_a_day_and_no_longer() {
        let wait = |text: &str| retry_after(text.as_bytes(), NOW).map(|wait| wait.as_secs());
        assert_eq!(wait("0"), Some(0));
        assert_eq!(wait("86400"), Some(86_400));
        assert_eq!(wait("86401"), Some(86_400));
        assert_eq!(wait("99999999999999999999999"), Some(86_400));
        assert_eq!(wait("Sun, 06 Nov 1994 08:49:37 GMT"), Some(0));
        assert_eq!(wait("Sun, 06 Nov 9994 08:49:37 GMT"), Some(86_400));
        assert_eq!(
            retry_after(b"Sun, 06 Nov 1994 08:49:37 GMT", WallTime::from_secs(784_111_770)),
            Some(Duration::from_secs(7))
        );
        assert_eq!(wait("soon"), None);
    }

    proptest! {
        #[test]
        fn days_follow_one_another(year in 1970u64..9999, month in 1u64..=12, day in 1u64..=31) {
            let day = day.min(days_in_month(year, month));
            let (next_year, next_month, next_day) = match (month, day == days_in_month(year, month)) {
                (12, true) => (year + 1, 1, 1),
                (_, true) => (year, month + 1, 1),
                _ => (year, month, day + 1),
            };
            prop_assert_eq!(
                days_since_1970(year, month, day).map(|days| days + 1),
                days_since_1970(next_year, next_month, next_day)
            );
        }
    }
}
