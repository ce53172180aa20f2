//! What an upstream says of its budgets: how many requests it still takes, and until when.
//!
//! Source: draft-ietf-httpapi-ratelimit-headers-10 (`RateLimit`, `RateLimit-Policy`), its versions up to 07 (`RateLimit` as a
//! dictionary; `RateLimit-Limit`, `-Remaining`, `-Reset`), and the customary `X-RateLimit-*`, with GitHub's `-Resource`; RFC 9651
//! for structured fields.
//! Memory: at most `QUOTAS_MAX` quotas. Errors: none, what cannot be read says nothing.
//! Not here: what is done about it (`stream::budget`).

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::time::Duration;

use crate::codec::http_response::http_date;
use crate::codec::iso_date::iso_date;
use crate::limits::{QUOTAS_MAX, RESET_UNKNOWN, RETRY_AFTER_MAX};
use crate::time::WallTime;

/// One budget of an upstream.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Quota {
    /// Requests that it still takes.
    pub remaining: u64,
    /// When there are more again, counted from the response: where that was given in whole seconds, which some round down, a
    /// second later.
    pub reset: Duration,
    /// Requests that it takes from one reset to the next.
    pub limit: Option<u64>,
    /// Time from one reset to the next.
    pub window: Option<Duration>,
    /// Which of its budgets, where it gives them names: what it tells of one says nothing of another.
    pub resource: Option<Resource>,
}

/// The name of a budget, as far as it tells it from the others of its upstream.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Resource(u64);

impl Resource {
    /// The budget `name`, of which an upstream may have several that differ in `partition`.
    fn named(name: &[u8], partition: Option<&[u8]>) -> Resource {
        let mut hasher = DefaultHasher::new();
        (name, partition).hash(&mut hasher);
        Resource(hasher.finish())
    }
}

/// Seconds from which on a number is no span but a time of the Unix epoch: it would be over 30 years.
const EPOCH_SECONDS_MIN: u64 = 1_000_000_000;
/// The same in milliseconds: as seconds of the epoch it would be over 30,000 years away.
const EPOCH_MILLIS_MIN: u64 = 1_000_000_000_000;
const SECOND: Duration = Duration::from_secs(1);

/// The budgets that a response tells of, by the newest of the ways that it uses. `headers` gives the values of a field, by its
/// name in lower case; `received` is for a response without a `Date`.
pub fn quotas<'h>(headers: impl Fn(&'static str) -> Vec<&'h [u8]>, received: WallTime) -> Vec<Quota> {
    let date = headers("date").first().and_then(|value| http_date(value, received)).unwrap_or(received);
    let mut found = named(&headers("ratelimit"), &headers("ratelimit-policy"), date);
    for [limit, remaining, reset, after, resource] in [
        ["ratelimit-limit", "ratelimit-remaining", "ratelimit-reset", "ratelimit-reset-after", "ratelimit-resource"],
        [
            "x-ratelimit-limit",
            "x-ratelimit-remaining",
            "x-ratelimit-reset",
            "x-ratelimit-reset-after",
            "x-ratelimit-resource",
        ],
        [
            "x-rate-limit-limit",
            "x-rate-limit-remaining",
            "x-rate-limit-reset",
            "x-rate-limit-reset-after",
            "x-rate-limit-resource",
        ],
    ] {
        if !found.is_empty() {
            break;
        }
        let first = |name| headers(name).into_iter().next();
        let spelled = Spelled {
            limit: first(limit),
            remaining: first(remaining),
            reset: first(reset),
            after: first(after),
            resource: first(resource),
        };
        found.extend(spelled.quota(&headers("ratelimit-policy"), date));
    }
    found
}

/// `RateLimit` as a list (`"default";r=50;t=30`) or a dictionary (`limit=100, remaining=50, reset=30`).
fn named(fields: &[&[u8]], policies: &[&[u8]], date: WallTime) -> Vec<Quota> {
    let members = members(fields);
    let policies = self::members(policies);
    let in_dictionary = |key: &[u8]| members.iter().find(|member| member.key == Some(key)).map(|member| member.value);
    if let Some(remaining) = in_dictionary(b"remaining").and_then(number) {
        let reset = in_dictionary(b"reset").and_then(|value| span(value, date));
        let limit = in_dictionary(b"limit").and_then(number);
        let window = policies.iter().find(|policy| number(policy.value) == limit).and_then(Member::window);
        let quota = |reset| Quota { remaining, reset, limit, window, resource: None };
        return at_the_latest(remaining, reset, window).map(quota).into_iter().collect();
    }
    let quota = |member: &Member<'_>| {
        let remaining = member.parameter(b"r").and_then(number)?;
        let policy = policies.iter().find(|policy| policy.key.is_none() && policy.value == member.value);
        let window = policy.and_then(Member::window);
        let reset = member.parameter(b"t").and_then(|value| span(value, date));
        let reset = at_the_latest(remaining, reset, window)?;
        let limit = policy.and_then(|policy| policy.parameter(b"q")).and_then(number);
        let resource = Some(Resource::named(member.value, member.parameter(b"pk")));
        Some(Quota { remaining, reset, limit, window, resource })
    };
    members.iter().filter(|member| member.key.is_none()).filter_map(quota).collect()
}

/// When there is more again, where the upstream says so; where it does not, it is at the latest when a whole window has passed,
/// and where nobody knows how long that is, whoever has nothing left asks again after a while.
fn at_the_latest(remaining: u64, reset: Option<Duration>, window: Option<Duration>) -> Option<Duration> {
    reset.or(window.map(bounded)).or((remaining == 0).then_some(RESET_UNKNOWN))
}

/// A budget in fields of its own.
struct Spelled<'h> {
    limit: Option<&'h [u8]>,
    remaining: Option<&'h [u8]>,
    reset: Option<&'h [u8]>,
    after: Option<&'h [u8]>,
    resource: Option<&'h [u8]>,
}

impl Spelled<'_> {
    fn quota(&self, policies: &[&[u8]], date: WallTime) -> Option<Quota> {
        let remaining = self.remaining?.trim_ascii();
        // Some mean by it that there is no limit: only with a reset it is a budget that is overdrawn.
        let is_below = remaining.starts_with(b"-");
        let remaining = number(remaining)?;
        let reset = self.after.and_then(|after| decimal(after.trim_ascii())).map(bounded);
        let reset = reset.or_else(|| span(self.reset?.trim_ascii(), date));
        // `100, 100;w=10`: the limit, then the policies that make it up.
        let limits = members(self.limit.as_slice());
        let limit = limits.first().and_then(|limit| number(limit.value));
        let policies = members(policies);
        let of_this = |member: &&Member<'_>| number(member.value) == limit;
        let window = limits.iter().chain(&policies).filter(of_this).find_map(Member::window);
        let reset = reset.or_else(|| at_the_latest(remaining, None, window).filter(|_| !is_below))?;
        let resource = self.resource.map(|name| Resource::named(name.trim_ascii(), None));
        Some(Quota { remaining, reset, limit, window, resource })
    }
}

/// A member of a list or a dictionary (RFC 9651), as far as budgets need it.
struct Member<'h> {
    key: Option<&'h [u8]>,
    /// A bare item: strings without their quotes, the rest as it stands.
    value: &'h [u8],
    parameters: Vec<(&'h [u8], &'h [u8])>,
}

impl<'h> Member<'h> {
    fn parameter(&self, name: &[u8]) -> Option<&'h [u8]> {
        // RFC 9651 section 4.2.3.2: the last of the same name counts.
        self.parameters.iter().rev().find(|(key, _)| *key == name).map(|(_, value)| *value)
    }

    fn window(&self) -> Option<Duration> {
        self.parameter(b"w").and_then(number).filter(|&window| window > 0).map(Duration::from_secs)
    }
}

/// The members of all `fields`, up to the first fault: RFC 9651 has a field with one ignored, here what stands before is read.
fn members<'h>(fields: &[&'h [u8]]) -> Vec<Member<'h>> {
    let mut found = Vec::new();
    for field in fields {
        let mut reader = Reader { rest: field };
        while found.len() < QUOTAS_MAX
            && let Some(member) = reader.member()
        {
            found.push(member);
        }
    }
    found
}

/// Parameters of one member that are read.
const PARAMETERS_MAX: usize = 16;

struct Reader<'h> {
    rest: &'h [u8],
}

impl<'h> Reader<'h> {
    fn skip_space(&mut self) {
        self.rest = self.rest.trim_ascii_start();
    }

    fn eat(&mut self, byte: u8) -> bool {
        let rest = self.rest.split_first().filter(|(first, _)| **first == byte).map(|(_, rest)| rest);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    fn member(&mut self) -> Option<Member<'h>> {
        self.skip_space();
        let first = self.bare()?;
        let (key, value) = if self.eat(b'=') { (Some(first), self.bare()?) } else { (None, first) };
        let mut parameters = Vec::new();
        loop {
            self.skip_space();
            if !self.eat(b';') {
                break;
            }
            self.skip_space();
            let name = self.bare()?;
            let value = if self.eat(b'=') { self.bare()? } else { b"" };
            if parameters.len() < PARAMETERS_MAX {
                parameters.push((name, value));
            }
        }
        // A comma, or the end.
        if !self.eat(b',') && !self.rest.is_empty() {
            self.rest = b"";
            return None;
        }
        Some(Member { key, value, parameters })
    }

    fn bare(&mut self) -> Option<&'h [u8]> {
        let quoted = [b'"', b':'].into_iter().find(|&quote| self.eat(quote));
        let end = match quoted {
            // No escape stands in the name of a policy; one that has any is like no other.
            Some(quote) => self.rest.iter().position(|&byte| byte == quote)?,
            None => self.rest.iter().position(|byte| b" \t,;=".contains(byte)).unwrap_or(self.rest.len()),
        };
        let (part, rest) = self.rest.split_at_checked(end)?;
        if quoted.is_none() && part.is_empty() {
            return None;
        }
        self.rest = if quoted.is_some() { rest.get(1..)? } else { rest };
        Some(part)
    }
}

/// A whole number: fractions are cut, and less than nothing is nothing.
fn number(text: &[u8]) -> Option<u64> {
    if let Some(below) = text.strip_prefix(b"-") {
        return decimal(below).map(|_| 0);
    }
    decimal(text).map(|value| value.as_secs())
}

/// A number of seconds, with up to nine digits behind a point.
fn decimal(text: &[u8]) -> Option<Duration> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(part) {
        return None;
    }
    // What is more than fits is as good as for ever.
    let whole = whole.parse().unwrap_or(u64::MAX);
    let nanos = format!("{:0<9.9}", part).parse().ok()?;
    Some(Duration::new(whole, nanos))
}

/// A time to wait: seconds, a time of the Unix epoch in seconds or milliseconds, or a date.
fn span(text: &[u8], date: WallTime) -> Option<Duration> {
    let Some(value) = decimal(text) else {
        let iso = || std::str::from_utf8(text).ok().and_then(iso_date);
        return http_date(text, date).or_else(iso).map(|at| bounded(at.since(date).saturating_add(SECOND)));
    };
    let since_date = |at: Duration| at.saturating_sub(Duration::from_micros(date.as_micros()));
    let seconds = value.as_secs();
    let wait = match seconds {
        EPOCH_MILLIS_MIN.. => since_date(Duration::from_millis(seconds)),
        EPOCH_SECONDS_MIN.. => since_date(value),
        _ => value,
    };
    // The upstream's clock, which `Date` tells in seconds, is up to one further.
    let whole = seconds < EPOCH_MILLIS_MIN && value.subsec_nanos() == 0;
    Some(bounded(if whole { wait.saturating_add(SECOND) } else { wait }))
}

fn bounded(wait: Duration) -> Duration {
    wait.min(RETRY_AFTER_MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: WallTime = WallTime::from_secs(1_795_350_000); // November 2026

    fn read(fields: &[(&str, &str)]) -> Vec<Quota> {
        let of = |name: &'static str| {
            fields.iter().filter(|(field, _)| *field == name).map(|(_, value)| value.as_bytes()).collect::<Vec<_>>()
        };
        quotas(of, NOW)
    }

    fn quota(remaining: u64, reset_s: u64, limit: Option<u64>, window_s: Option<u64>) -> Quota {
        let window = window_s.map(Duration::from_secs);
        Quota { remaining, reset: Duration::from_secs(reset_s), limit, window, resource: None }
    }

    fn named(name: &str, quota: Quota) -> Quota {
        Quota { resource: Some(Resource::named(name.as_bytes(), None)), ..quota }
    }

    #[test]
    fn the_drafts_list_has_several_budgets() {
        assert_eq!(read(&[("ratelimit", "\"default\";r=50;t=30")]), [named("default", quota(50, 31, None, None))]);
        assert_eq!(
            read(&[
                ("ratelimit-policy", "\"burst\";q=100;w=60,\"daily\";q=1000;w=86400;pk=:cHNk:"),
                ("ratelimit", "\"burst\";r=7;t=12, \"daily\";t=40000;r=900"),
            ]),
            [
                named("burst", quota(7, 13, Some(100), Some(60))),
                named("daily", quota(900, 40_001, Some(1000), Some(86_400)))
            ]
        );
        assert_eq!(
            read(&[("ratelimit", "\"a\";r=0"), ("ratelimit-policy", "\"a\";q=5;w=10")]),
            [named("a", quota(0, 10, Some(5), Some(10)))],
            "without t it is the window"
        );
        assert_eq!(read(&[("ratelimit", "\"a\";r=1")]), [], "when is not known");
        assert_eq!(read(&[("ratelimit", "default;r=3;t=0")]), [named("default", quota(3, 1, None, None))], "a token");
        let parts = read(&[("ratelimit", "\"a\";r=1;t=1;pk=:eA==:, \"a\";r=2;t=1;pk=:eQ==:, \"a\";r=3;t=1")]);
        let parts: Vec<_> = parts.iter().map(|quota| quota.resource).collect();
        assert!(parts[0] != parts[1] && parts[1] != parts[2] && parts[0] != parts[2], "partitions are apart");
    }

    #[test]
    fn earlier_drafts_are_understood() {
        assert_eq!(
            read(&[("ratelimit", "limit=100, remaining=50, reset=5"), ("ratelimit-policy", "100;w=10")]),
            [quota(50, 6, Some(100), Some(10))]
        );
        assert_eq!(
            read(&[("ratelimit-limit", "100, 100;w=10"), ("ratelimit-remaining", "50"), ("ratelimit-reset", "5"),]),
            [quota(50, 6, Some(100), Some(10))]
        );
    }

    #[test]
    fn what_is_customary_is_seconds_or_a_time() {
        let read = |reset: &str| {
            read(&[("x-ratelimit-limit", "60"), ("x-ratelimit-remaining", "59"), ("x-ratelimit-reset", reset)])
        };
        assert_eq!(read("30"), [quota(59, 31, Some(60), None)]);
        assert_eq!(read("1795350030"), [quota(59, 31, Some(60), None)], "seconds of the epoch");
        assert_eq!(read("1795350030000"), [quota(59, 30, Some(60), None)], "milliseconds of the epoch");
        assert_eq!(read("1795350030.5")[0].reset, Duration::from_millis(30_500));
        assert_eq!(read("0.25")[0].reset, Duration::from_millis(250));
        assert_eq!(read("1795340000"), [quota(59, 1, Some(60), None)], "past");
        assert_eq!(read("999999999")[0].reset, RETRY_AFTER_MAX);
        assert_eq!(read("99999999999999999999999999")[0].reset, RETRY_AFTER_MAX);
        assert_eq!(read("soon"), []);
        assert_eq!(read("-5"), []);
    }

    #[test]
    fn an_epoch_is_counted_by_the_upstreams_own_clock() {
        let fields = [
            ("date", "Sun, 06 Nov 1994 08:49:37 GMT"),
            ("x-rate-limit-remaining", "0"),
            ("x-rate-limit-reset", "784111787"),
        ];
        // Before 2001 a time of the epoch cannot be told from a span; here is one after.
        assert_eq!(read(&fields)[0].reset, RETRY_AFTER_MAX);
        let fields = [
            ("date", "Wed, 25 Nov 2026 00:00:00 GMT"),
            ("x-rate-limit-remaining", "0"),
            ("x-rate-limit-reset", "1795564810"),
        ];
        assert_eq!(read(&fields), [quota(0, 11, None, None)]);
    }

    #[test]
    fn nothing_left_is_nothing_left_though_nobody_says_until_when() {
        let unknown = RESET_UNKNOWN.as_secs();
        let left = |remaining, more: &[(&str, &str)]| read(&[&[("x-ratelimit-remaining", remaining)], more].concat());
        assert_eq!(left("0", &[]), [quota(0, unknown, None, None)]);
        assert_eq!(left("0", &[("x-ratelimit-reset", "tomorrow")]), [quota(0, unknown, None, None)]);
        assert_eq!(left("0", &[("x-ratelimit-limit", "5, 5;w=7")]), [quota(0, 7, Some(5), Some(7))]);
        for none in ["1", "-1", "many"] {
            assert_eq!(left(none, &[]), [], "{none}");
        }
        assert_eq!(read(&[("ratelimit", "\"a\";r=0")]), [named("a", quota(0, unknown, None, None))]);
        assert_eq!(read(&[("ratelimit", "limit=9, remaining=0")]), [quota(0, unknown, Some(9), None)]);
    }

    #[test]
    fn a_reset_may_be_a_date_of_either_kind() {
        for reset in ["2026-11-22T12:20:30Z", "2026-11-22T13:20:30.000+01:00", "Sun, 22 Nov 2026 12:20:30 GMT"] {
            let fields = [
                ("date", "Sun, 22 Nov 2026 12:20:00 GMT"),
                ("x-ratelimit-remaining", "0"),
                ("x-ratelimit-reset", reset),
            ];
            assert_eq!(read(&fields), [quota(0, 31, None, None)], "{reset}");
        }
    }

    #[test]
    fn a_resource_has_a_budget_of_its_own() {
        let of = |resource| {
            let left = [("x-ratelimit-remaining", "0"), ("x-ratelimit-reset", "9"), ("x-ratelimit-resource", resource)];
            read(&left)
        };
        assert_eq!(of("search"), [named("search", quota(0, 10, None, None))]);
        assert_ne!(of("search"), of("core"));
    }

    #[test]
    fn the_newest_way_counts_and_what_cannot_be_read_does_not() {
        let old = [("x-ratelimit-remaining", "1"), ("x-ratelimit-reset", "9")];
        assert_eq!(
            read(&[&[("ratelimit", "\"a\";r=5;t=3")], &old[..]].concat()),
            [named("a", quota(5, 4, None, None))]
        );
        for bad in ["", ";;", "\"a", "\"a\";r=x;t=3", "\"a\" r=5;t=3", "(1 2);r=5;t=3", "\"a\";r;t=3"] {
            assert_eq!(read(&[&[("ratelimit", bad)], &old[..]].concat()), [quota(1, 10, None, None)], "{bad:?}");
        }
        assert_eq!(read(&[("x-ratelimit-remaining", "-3"), ("x-ratelimit-reset", "9")])[0].remaining, 0);
        assert_eq!(read(&[("x-ratelimit-remaining", "4.9"), ("x-ratelimit-reset-after", "1.5")])[0].remaining, 4);
        assert_eq!(read(&[("x-ratelimit-remaining", "5")]), []);
    }

    #[test]
    fn a_budget_that_says_its_window_alone_holds_nobody_longer_than_a_day() {
        for window_s in [86_400, 86_401, u64::MAX] {
            let policy = format!("\"monthly\";q=9;w={window_s}");
            let found = read(&[("ratelimit", "\"monthly\";r=0"), ("ratelimit-policy", &policy)]);
            assert_eq!(found, [named("monthly", quota(0, 86_400, Some(9), Some(window_s)))]);
        }
    }

    #[test]
    fn budgets_have_a_bound() {
        let many = ["\"a\";r=1;t=1"; QUOTAS_MAX + 3].join(",");
        assert_eq!(read(&[("ratelimit", &many)]).len(), QUOTAS_MAX);
    }

    proptest! {
        #[test]
        fn whatever_is_sent_is_read_to_an_end(
            bytes in prop::collection::vec(any::<u8>(), 0..100),
            policy in prop::collection::vec(any::<u8>(), 0..100),
        ) {
            for way in ["ratelimit", "x-ratelimit-reset"] {
                let of = |name: &'static str| match name {
                    _ if name == way => vec![&*bytes],
                    "ratelimit-policy" => vec![&*policy],
                    "x-ratelimit-remaining" => vec![&b"1"[..]],
                    _ => Vec::new(),
                };
                let found = quotas(of, NOW);
                prop_assert!(found.len() <= QUOTAS_MAX && found.iter().all(|quota| quota.reset <= RETRY_AFTER_MAX));
            }
        }

        #[test]
        fn what_is_written_is_read(r in 0..1_000_000_u64, t in 0..80_000_u64, q in any::<u32>(), name in "[a-z]{1,9}") {
            let (field, policy) = (format!("\"{name}\";r={r};t={t}"), format!("\"{name}\";q={q};w=60"));
            let expected = [named(&name, quota(r, t + 1, Some(q.into()), Some(60)))];
            prop_assert_eq!(read(&[("ratelimit", &field), ("ratelimit-policy", &policy)]), expected);
        }
    }
}
