//! Budgets in the words of an upstream: the first byte says in which fields the rest stands, line by line. Whatever they hold,
//! what is read is bounded, and reading it again gives the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use restcast::codec::rate_limit::quotas;
use restcast::limits::{QUOTAS_MAX, RETRY_AFTER_MAX};
use restcast::time::WallTime;

const NAMES: [[&str; 4]; 3] = [
    ["ratelimit", "ratelimit-policy", "date", "x-ratelimit-reset"],
    ["ratelimit-limit", "ratelimit-remaining", "ratelimit-reset", "ratelimit-policy"],
    ["x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset", "x-ratelimit-reset-after"],
];

fuzz_target!(|data: &[u8]| {
    let Some((way, rest)) = data.split_first() else { return };
    let names = NAMES[usize::from(*way) % NAMES.len()];
    let lines: Vec<&[u8]> = rest.split(|byte| *byte == b'\n').collect();
    let headers = |name: &'static str| {
        let of_it = lines.iter().enumerate().filter(|(place, _)| names[place % names.len()] == name);
        of_it.map(|(_, line)| *line).collect::<Vec<_>>()
    };
    let now = WallTime::from_secs(1_795_350_000);
    let found = quotas(headers, now);
    assert!(found.len() <= QUOTAS_MAX);
    assert!(found.iter().all(|quota| quota.reset <= RETRY_AFTER_MAX));
    assert!(found.iter().all(|quota| quota.window.is_none_or(|window| !window.is_zero())));
    assert_eq!(found, quotas(headers, now));
});
