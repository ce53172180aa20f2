//! Dates as ECMA-262 and RFC 3339 write them.
//!
//! Source: ECMA-262, Date Time String Format; RFC 3339 section 5.6. Memory: none. Errors: `None`.
//! Not here: HTTP's own dates (`codec::http_response`).

use super::WallTime;

/// The time that `YYYY-MM-DDTHH:MM:SS`, with a fraction or not, and `Z` or an offset name: what `JSON.stringify` makes of a
/// `Date` (ECMA-262, Date Time String Format, with its expanded years), and RFC 3339. `None`: it is none, or before 1970.
pub fn iso_date(text: &str) -> Option<WallTime> {
    let bytes = text.as_bytes();
    let digits = |from: usize, count: usize| -> Option<i64> {
        let part = bytes.get(from..from + count)?;
        part.iter().all(u8::is_ascii_digit).then(|| part.iter().fold(0, |n, b| n * 10 + i64::from(b - b'0')))
    };
    // A year that four digits have no room for has a sign and six.
    let (year, bytes) = match bytes {
        [b'+', ..] => (digits(1, 6)?, bytes.get(7..)?),
        _ => (digits(0, 4)?, bytes.get(4..)?),
    };
    let digits = |from: usize, count: usize| digits(text.len() - bytes.len() + from, count);
    let at = |place: usize, wanted: &[u8]| bytes.get(place).is_some_and(|byte| wanted.contains(byte));
    if !(at(0, b"-") && at(3, b"-") && at(6, b"Tt ") && at(9, b":") && at(12, b":")) {
        return None;
    }
    let (month, day) = (digits(1, 2)?, digits(4, 2)?);
    let (hour, minute, second) = (digits(7, 2)?, digits(10, 2)?, digits(13, 2)?);
    if !(1..=12).contains(&month) || day < 1 || day > days_of(year, month) || hour > 24 || minute > 59 || second > 60 {
        return None;
    }
    let (mut place, mut micros) = (15, 0);
    if at(place, b".,") {
        let fraction = bytes.get(place + 1..)?.iter().take_while(|byte| byte.is_ascii_digit()).count();
        if fraction == 0 || fraction > 9 {
            return None;
        }
        let shown = fraction.min(6);
        micros = digits(place + 1, shown)? * 10_i64.pow(u32::try_from(6 - shown).ok()?);
        place += 1 + fraction;
    }
    let offset = match bytes.get(place..)? {
        b"Z" | b"z" => 0,
        [sign @ (b'+' | b'-'), _, _, b':', _, _] => {
            let (hours, minutes) = (digits(place + 1, 2)?, digits(place + 4, 2)?);
            let minutes = hours * 60 + minutes;
            if *sign == b'-' { -minutes } else { minutes }
        }
        _ => return None,
    };
    let days = days_since_1970(year, month, day);
    let seconds = ((days * 24 + hour) * 60 + minute - offset) * 60 + second;
    u64::try_from(seconds.checked_mul(1_000_000)? + micros).ok().map(WallTime::from_micros)
}

fn days_of(year: i64, month: i64) -> i64 {
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    match month {
        2 => 28 + i64::from(leap),
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days from 1970-01-01 to a date of the Gregorian calendar. Years are counted from March, so that a leap day is the last of
/// its year, in eras of 400 of them.
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let of_era = year.rem_euclid(400);
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_read_as_json_stringify_writes_them() {
        let us = |text: &str| iso_date(text).map(WallTime::as_micros);
        assert_eq!(us("1970-01-01T00:00:00.000Z"), Some(0));
        assert_eq!(us("2000-02-29T12:00:00Z"), Some(951_825_600_000_000));
        assert_eq!(us("2026-11-22T19:21:27.042Z"), Some(1_795_375_287_042_000));
        assert_eq!(us("2026-11-22T20:21:27.042+01:00"), us("2026-11-22T19:21:27.042Z"));
        assert_eq!(us("2026-11-22T18:51:27.042-00:30"), us("2026-11-22T19:21:27.042Z"));
        assert_eq!(us("2026-11-22T19:21:27.123456789Z"), Some(1_795_375_287_123_456));
        // A year beyond four digits has a sign and six: so does `new Date(8640000000000000)`, the last there is.
        assert_eq!(us("+275760-09-13T00:00:00.000Z"), Some(8_640_000_000_000_000_000));
        assert_eq!(us("+010000-01-01T00:00:00.000Z"), us("9999-12-31T24:00:00Z"));
        assert_eq!(us("+002026-11-22T19:21:27.042Z"), us("2026-11-22T19:21:27.042Z"));
        for bad in [
            "",
            "-000001-01-01T00:00:00Z",
            "-271821-04-20T00:00:00Z",
            "+10000-01-01T00:00:00Z",
            "+0010000-01-01T00:00:00Z",
            "+275760-09-13",
            "+999999-12-31T23:59:59ZZ",
            "2026-11-22",
            "2026-11-22T19:21:27",
            "2026-13-22T19:21:27Z",
            "2026-02-29T19:21:27Z",
            "2026-11-22T19:60:27Z",
            "2026-11-22T19:21:27.Z",
            "2026-11-22T19:21:27Zx",
            "1969-12-31T23:59:59Z",
            "Sun, 22 Nov 2026 19:21:27 GMT",
            "２026-11-22T19:21:27Z",
        ] {
            assert_eq!(us(bad), None, "{bad}");
        }
    }
}
