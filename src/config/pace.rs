//! When and how often upstreams are asked: `[[stream.windows]]` and their neighbours, `[[upstream]]`.
//!
//! Source: README, «Being a good guest». Memory: what is returned. Errors: each at its own line.
//! Not here: what follows from it (`stream::pace`, `stream::budget`).

use std::time::Duration;

use url::Url;

use super::meaning::Check;
use super::walk::Section;
use super::{Oddity, Problem};
use crate::limits::{UPSTREAMS_MAX, WINDOWS_MAX};
use crate::stream::Options;
use crate::stream::action;
use crate::stream::budget::{Rate, Upstream};
use crate::stream::follow::{Following, Kind};
use crate::stream::pace::{Adaptive, DAYS, EVERY_DAY, Pacing, Window};

/// Furthest offset from UTC.
const OFFSET_MAX_MINUTES: i32 = 14 * 60;
/// An interval under this is warned of.
const SHORT_INTERVAL: Duration = Duration::from_millis(100);

impl Check<'_> {
    /// What a stream's polls go by beside its interval.
    pub(super) fn pacing(&mut self, section: &Section) -> Pacing {
        let offset = section.text("stream.utc_offset").and_then(|text| offset(&text));
        if offset.is_none() {
            self.error(section.line_of("stream.utc_offset"), Problem::UtcOffset);
        }
        if section.number("stream.pages_max") > 1 && section.text("stream.method").as_deref() != Some("GET") {
            self.error(section.line_of("stream.pages_max"), Problem::PagesMethod);
        }
        Pacing {
            respect_max_age: section.boolean("stream.respect_max_age"),
            adaptive: self.adaptive(section),
            windows: self.windows(section),
            utc_offset_minutes: offset.unwrap_or_default(),
        }
    }

    /// What its upstream speaks, where that is a stream.
    pub(super) fn follow(&mut self, section: &Section) -> Option<Following> {
        let kind = match section.text("stream.kind").as_deref() {
            Some("sse") => Kind::Sse,
            Some("ndjson") => Kind::Ndjson,
            _ => {
                for key in ["events", "events_per_second", "idle_timeout"] {
                    self.only(section, key, "sse");
                }
                return None;
            }
        };
        for key in ["respect_max_age", "pages_max", "redirects_max", "interval_min", "interval_max", "utc_offset"] {
            self.only(section, key, "poll");
        }
        if let Some(window) = section.array("stream.windows").first() {
            self.error(window.line, Problem::OtherKind { key: "windows", kind: "poll" });
        }
        if kind == Kind::Ndjson {
            self.only(section, "events", "sse");
        }
        let per_second = section.number_u32("stream.events_per_second").max(1);
        Some(Following {
            kind,
            events: section.texts("stream.events").into_iter().map(|name| name.value).collect(),
            gap: Duration::from_secs(1) / per_second,
            idle_timeout: section.duration("stream.idle_timeout"),
        })
    }

    /// A key of streams of another kind is an error.
    fn only(&mut self, section: &Section, key: &'static str, kind: &'static str) {
        let path = format!("stream.{key}");
        if section.is_written(&path) {
            self.error(section.line_of(&path), Problem::OtherKind { key, kind });
        }
    }

    fn adaptive(&mut self, section: &Section) -> Option<Adaptive> {
        let (min, max) = ("stream.interval_min", "stream.interval_max");
        let interval = section.duration("stream.interval");
        let (least, greatest) = (section.duration_unless_unset(min), section.duration_unless_unset(max));
        if least.is_none() && greatest.is_none() {
            return None;
        }
        let adaptive = Adaptive { min: least.unwrap_or(interval), max: greatest.unwrap_or(interval) };
        if !(adaptive.min..=adaptive.max).contains(&interval) {
            let key = if least.is_some() { min } else { max };
            self.error(section.line_of(key), Problem::IntervalBounds);
        }
        Some(adaptive)
    }

    fn windows(&mut self, stream: &Section) -> Vec<Window> {
        let sections = stream.array("stream.windows");
        if let Some(section) = sections.get(WINDOWS_MAX) {
            self.error(section.line, Problem::TooManyWindows { limit: WINDOWS_MAX });
        }
        sections.iter().take(WINDOWS_MAX).filter_map(|section| self.window(section)).collect()
    }

    fn window(&mut self, section: &Section) -> Option<Window> {
        let mut time = |key: &'static str, last: u16| {
            let text = section.text(key)?;
            let minute = time(&text).filter(|minute| *minute <= last);
            if minute.is_none() {
                self.error(section.line_of(key), Problem::WindowTime);
            }
            minute
        };
        let (from, to) = (time("stream.windows.from", 1439), time("stream.windows.to", 1440));
        let mut days = 0;
        for day in section.texts("stream.windows.days") {
            match DAYS.iter().position(|name| *name == day.value) {
                Some(place) => days |= 1 << place,
                None => self.error(day.line, Problem::WindowDay),
            }
        }
        let days = if days == 0 { EVERY_DAY } else { days };
        let interval = section.duration_unless_unset("stream.windows.interval");
        Some(Window { from: from?, to: to?, days, interval })
    }

    /// The `[[upstream]]` tables.
    pub(super) fn upstreams(&mut self, root: &Section) -> Vec<Upstream> {
        let sections = root.array("upstream");
        if let Some(section) = sections.get(UPSTREAMS_MAX) {
            self.error(section.line, Problem::TooManyUpstreams { limit: UPSTREAMS_MAX });
        }
        let mut upstreams: Vec<Upstream> = Vec::new();
        for section in sections.iter().take(UPSTREAMS_MAX) {
            let Some(upstream) = self.upstream(section) else { continue };
            if upstreams.iter().any(|other| other.origin == upstream.origin) {
                let origin = upstream.origin;
                self.error(section.line_of("upstream.origin"), Problem::UpstreamRepeated { origin });
            } else {
                upstreams.push(upstream);
            }
        }
        upstreams
    }

    fn upstream(&mut self, section: &Section) -> Option<Upstream> {
        let text = section.text("upstream.origin");
        let origin = text.as_deref().and_then(origin);
        if text.is_some() && origin.is_none() {
            self.error(section.line_of("upstream.origin"), Problem::UpstreamOrigin);
        }
        let burst = section.number_u32("upstream.burst");
        let rate = section.text("upstream.rate").and_then(|text| {
            let every = action::Rate::parse(&text);
            if every.is_none() {
                self.error(section.line_of("upstream.rate"), Problem::UpstreamRate);
            }
            Some(Rate { every: every?, burst })
        });
        Some(Upstream { origin: origin?, rate, breaker: section.number_u32("upstream.breaker") })
    }

    /// Warns of what is likely not meant.
    pub(super) fn warn_of_pace(&mut self, section: &Section, stream: &Options) {
        let id = || stream.id.to_string();
        let Pacing { adaptive, windows, .. } = &stream.pacing;
        let intervals = windows.iter().filter_map(|window| window.interval).chain(adaptive.map(|bounds| bounds.min));
        if stream.interval >= SHORT_INTERVAL && intervals.min().is_some_and(|least| least < SHORT_INTERVAL) {
            self.warn(section.line, Oddity::ShortPace { id: id() });
        }
        if windows.is_empty() && section.is_written("stream.utc_offset") {
            self.warn(section.line_of("stream.utc_offset"), Oddity::UnusedOffset { id: id() });
        }
    }
}

/// The minute of the day written `HH:MM`.
fn time(text: &str) -> Option<u16> {
    let two = |digits: &str| {
        let right = digits.len() == 2 && digits.bytes().all(|byte| byte.is_ascii_digit());
        digits.parse::<u16>().ok().filter(|_| right)
    };
    let (hour, minute) = text.split_once(':')?;
    let (hour, minute) = (two(hour)?, two(minute).filter(|minute| *minute < 60)?);
    Some(hour * 60 + minute).filter(|minute| *minute <= 1440)
}

/// The minutes of an offset written `+HH:MM` or `-HH:MM`.
fn offset(text: &str) -> Option<i32> {
    let (sign, rest) = match text.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, text.strip_prefix('+')?),
    };
    time(rest).map(|minutes| sign * i32::from(minutes)).filter(|minutes| minutes.abs() <= OFFSET_MAX_MINUTES)
}

/// The origin that `text` is, as `url` spells it.
fn origin(text: &str) -> Option<String> {
    let url = Url::parse(text).ok().filter(|url| matches!(url.scheme(), "http" | "https"))?;
    let bare = url.path() == "/" && url.query().is_none() && url.fragment().is_none();
    let bare = bare && url.username().is_empty() && url.password().is_none();
    bare.then(|| url.origin().ascii_serialization())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, ConfigError, FileError, Sources};

    struct NoSources;

    impl Sources for NoSources {
        fn env(&self, _: &str) -> Option<Vec<u8>> {
            None
        }

        fn file(&self, _: &str, _: usize) -> Result<Vec<u8>, FileError> {
            Err(FileError::Missing)
        }
    }

    fn read(lines: &str) -> Result<(Config, Vec<String>), Vec<String>> {
        let text = format!("[[stream]]\nid = \"s\"\nurl = \"http://up.example/s\"\nallow_anonymous = true\n{lines}\n");
        let told =
            |errors: Vec<ConfigError>| errors.into_iter().map(|error| error.problem.to_string()).collect::<Vec<_>>();
        let (config, warnings) = Config::parse(&text, &NoSources).map_err(told)?;
        // What `check` prints is a configuration, and the same.
        let shown = config.masked_toml();
        let (again, _) = Config::parse(&shown, &NoSources).unwrap_or_else(|errors| panic!("{errors:?}\n{shown}"));
        assert_eq!((&again.streams, &again.upstreams), (&config.streams, &config.upstreams), "{shown}");
        Ok((config, warnings.iter().map(ToString::to_string).collect()))
    }

    fn pacing(lines: &str) -> Pacing {
        read(lines).unwrap_or_else(|errors| panic!("{errors:?}")).0.streams[0].pacing.clone()
    }

    #[test]
    fn a_stream_has_no_pace_unless_it_is_given_one() {
        let (config, warnings) = read("").expect("it is right");
        let stream = &config.streams[0];
        assert!(stream.pacing.is_plain() && warnings.is_empty());
        assert_eq!((stream.pages_max, stream.redirects_max), (1, 0));
    }

    #[test]
    fn windows_are_read_with_their_days_and_offset() {
        let lines = "utc_offset = \"-03:30\"\nwindows = [\n{ from = \"09:00\", to = \"17:30\", days = [\"mon\", \"fri\"], \
                     interval = \"2s\" },\n{ from = \"22:00\", to = \"06:00\" }, { from = \"00:00\", to = \"24:00\" }]";
        let expected = [
            Window { from: 540, to: 1050, days: 0b1_0001, interval: Some(Duration::from_secs(2)) },
            Window { from: 1320, to: 360, days: EVERY_DAY, interval: None },
            Window { from: 0, to: 1440, days: EVERY_DAY, interval: None },
        ];
        let found = pacing(lines);
        assert_eq!((found.windows.as_slice(), found.utc_offset_minutes), (&expected[..], -210));
    }

    #[test]
    fn a_moving_interval_begins_within_its_bounds() {
        let s = Duration::from_secs;
        assert_eq!(pacing("interval_max = \"30s\"").adaptive, Some(Adaptive { min: s(1), max: s(30) }));
        assert_eq!(
            pacing("interval = \"5s\"\ninterval_min = \"1s\"").adaptive,
            Some(Adaptive { min: s(1), max: s(5) })
        );
        for lines in
            ["interval_min = \"2s\"", "interval_max = \"500ms\"", "interval_min = \"3s\"\ninterval_max = \"2s\""]
        {
            assert_eq!(read(lines).expect_err(lines), [Problem::IntervalBounds.to_string()], "{lines}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        let window = |inner: &str| format!("windows = [{{ {inner} }}]");
        let many = format!("windows = [{}]", "{ from = \"01:00\", to = \"02:00\" },".repeat(WINDOWS_MAX + 1));
        for (lines, problem) in [
            (window("from = \"9:00\", to = \"10:00\""), Problem::WindowTime),
            (window("from = \"24:00\", to = \"10:00\""), Problem::WindowTime),
            (window("from = \"09:00\", to = \"24:01\""), Problem::WindowTime),
            (window("from = \"09:60\", to = \"10:00\""), Problem::WindowTime),
            (window("from = \"09:00\", to = \"10:00\", days = [\"Mon\"]"), Problem::WindowDay),
            (window("from = \"09:00\""), Problem::Missing { key: "stream.windows.to" }),
            (many, Problem::TooManyWindows { limit: WINDOWS_MAX }),
            ("utc_offset = \"05:30\"".into(), Problem::UtcOffset),
            ("utc_offset = \"+14:01\"".into(), Problem::UtcOffset),
            ("pages_max = 2\nmethod = \"POST\"".into(), Problem::PagesMethod),
            ("[[upstream]]\norigin = \"https://up.example/a\"".into(), Problem::UpstreamOrigin),
            ("[[upstream]]\norigin = \"https://me@up.example\"".into(), Problem::UpstreamOrigin),
            ("[[upstream]]\norigin = \"up.example\"".into(), Problem::UpstreamOrigin),
            ("[[upstream]]\norigin = \"http://up.example\"\nrate = \"0/s\"".into(), Problem::UpstreamRate),
            (
                "[[upstream]]\norigin = \"http://up.example\"\n[[upstream]]\norigin = \"http://UP.example:80/\"".into(),
                Problem::UpstreamRepeated { origin: "http://up.example".into() },
            ),
        ] {
            assert_eq!(read(&lines).expect_err(&lines), [problem.to_string()], "{lines}");
        }
        for lines in ["pages_max = 0", "pages_max = 1001", "redirects_max = 6"] {
            assert_eq!(read(lines).expect_err(lines).len(), 1, "{lines}");
        }
    }

    #[test]
    fn upstreams_are_read() {
        let lines = "[[upstream]]\norigin = \"http://UP.example:80\"\nrate = \"10/s\"\nburst = 3\nbreaker = 0";
        let (config, _) = read(lines).expect("it is right");
        let every = action::Rate { count: 10, period: Duration::from_secs(1) };
        let rate = Some(Rate { every, burst: 3 });
        assert_eq!(config.upstreams, [Upstream { origin: "http://up.example".into(), rate, breaker: 0 }]);
    }

    #[test]
    fn streams_of_upstreams_that_speak_streams_have_keys_of_their_own() {
        let lines = "kind = \"sse\"\nevents = [\"update\"]\nevents_per_second = 4\nidle_timeout = \"30s\"";
        let (config, _) = read(lines).expect("it is right");
        let (gap, idle_timeout) = (Duration::from_millis(250), Duration::from_secs(30));
        let expected = Following { kind: Kind::Sse, events: vec!["update".into()], gap, idle_timeout };
        assert_eq!(config.streams[0].follow, Some(expected));
        for (lines, key, kind) in [
            ("events = []", "events", "sse"),
            ("kind = \"ndjson\"\nevents = [\"a\"]", "events", "sse"),
            ("kind = \"poll\"\nidle_timeout = \"5s\"", "idle_timeout", "sse"),
            ("kind = \"sse\"\npages_max = 2", "pages_max", "poll"),
            ("kind = \"ndjson\"\nwindows = [{ from = \"01:00\", to = \"02:00\" }]", "windows", "poll"),
        ] {
            assert_eq!(read(lines).expect_err(lines), [Problem::OtherKind { key, kind }.to_string()], "{lines}");
        }
    }

    #[test]
    fn what_is_odd_is_warned_of() {
        for (lines, part) in [
            ("windows = [{ from = \"01:00\", to = \"02:00\", interval = \"50ms\" }]", "interval of a window"),
            ("interval_min = \"99ms\"", "interval of a window"),
            ("utc_offset = \"+01:00\"", "no effect without `windows`"),
        ] {
            let (_, warnings) = read(lines).expect("it is right");
            assert!(matches!(&warnings[..], [warning] if warning.contains(part)), "{lines}: {warnings:?}");
        }
    }

    #[test]
    fn times_and_offsets_are_printed_as_they_are_read() {
        use crate::stream::pace::{offset_text, time_text};
        for minutes in [0, 1, 59, 60, 540, 1440] {
            assert_eq!(time(&time_text(minutes)), Some(minutes));
        }
        for minutes in [-840, -210, -1, 0, 330, 840] {
            assert_eq!(offset(&offset_text(minutes)), Some(minutes));
        }
    }
}
