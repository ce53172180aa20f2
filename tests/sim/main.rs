//! The seeded simulator: real shards, a virtual clock, model sockets, clients and upstreams, all from one number.
//!
//! Every failure prints its seed; `RESTCAST_SIM_SEED=n cargo test --test sim` replays that world alone, with
//! `RESTCAST_SIM_CLIENT=m` what its client `m` was sent is printed; `RESTCAST_SIM_SEEDS=n` makes more worlds. What is checked
//! at every step stands in `client` (what one client may see) and `world` (bounds, deadlines, leaks).

mod authority;
mod client;
mod deeds;
mod dice;
mod direct;
#[path = "../hall/ephemerals.rs"]
#[allow(dead_code, reason = "halls ask more of it")]
mod ephemerals;
mod law;
mod managed;
mod scripts;
mod scripts_direct;
mod store;
mod upstream;
mod world;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use dice::Dice;
use world::World;

/// Worlds that a run of the tests makes, unless `RESTCAST_SIM_SEEDS` says otherwise.
const SEEDS: u64 = 100;

/// What happens in these worlds, once in ten of them at the least.
const HAPPENS: [&str; 55] = [
    "welcome jwt",
    "welcome api_key",
    "welcome session",
    "welcome ticket",
    "close 4001 api_key_expired",
    "close 4001 token_expired",
    "close 4001 session_expired",
    "close 4003 forbidden",
    "close 4010 logged_out",
    "close 4010 token_revoked",
    "close 4010 api_key_revoked",
    "close 1012 draining",
    "close 1013 write_stall",
    "answer 401 LOGGED_OUT",
    "answer 401 TOKEN_REVOKED",
    "answer 401 TOKEN_EXPIRED",
    "answer 401 SESSION_EXPIRED",
    "answer 401 INVALID_TOKEN",
    "answer 403 INSUFFICIENT_PERMISSIONS",
    "answer 503 SESSION_STORE_UNAVAILABLE",
    "error AUTH_UPDATE_REJECTED",
    "error AUTH_SUBJECT_MISMATCH",
    "error INSUFFICIENT_PERMISSIONS",
    "unsubscribed forbidden",
    "unsubscribed requested",
    "permission_update ",
    "auth_ok ",
    "touch",
    "touch lost",
    "action_result",
    "stream put",
    "stream deleted",
    "stream stopped",
    "stream started",
    "unsubscribed stream_ended",
    "close 4004 stream_ended",
    "answer 404 STREAM_NOT_FOUND",
    "described snapshot",
    "described patch",
    "described resumed",
    "described closed 4001 token_expired",
    "described closed 4003 forbidden",
    "described closed 4010 logged_out",
    "described closed 1012 draining",
    "answer 403 TARGET_BLOCKED",
    "error TARGET_BLOCKED",
    "session 201",
    "session 200",
    "session told 200",
    "session told 204",
    "session lapsed",
    "session token 403 FORBIDDEN",
    "session closed 4004 stream_ended",
    "by session patch",
    "answer 429 TOO_MANY_STREAMS",
];

/// What the clients of that world have seen, in a number and counted.
fn run_seed(seed: u64) -> (u64, BTreeMap<String, u64>) {
    match catch_unwind(AssertUnwindSafe(|| World::new(Dice::seeded(seed)).run())) {
        Ok(seen) => seen,
        Err(panic) => {
            eprintln!("this world failed: RESTCAST_SIM_SEED={seed} cargo test --test sim replays it");
            resume_unwind(panic)
        }
    }
}

#[test]
fn worlds_keep_the_contract() {
    if let Ok(seed) = std::env::var("RESTCAST_SIM_SEED") {
        let (_, tally) = run_seed(seed.parse().expect("RESTCAST_SIM_SEED is a number"));
        eprintln!("{tally:#?}");
        return;
    }
    let seeds = std::env::var("RESTCAST_SIM_SEEDS").map_or(SEEDS, |seeds| seeds.parse().expect("a number of worlds"));
    let half = |first: u64| {
        move || {
            let mut seen: BTreeMap<String, u64> = BTreeMap::new();
            for seed in (first..=seeds).step_by(2) {
                for (what, times) in run_seed(seed).1 {
                    *seen.entry(what).or_default() += times;
                }
            }
            seen
        }
    };
    let mut seen = std::thread::scope(|scope| {
        let other = scope.spawn(half(2));
        let mut seen = half(1)();
        for (what, times) in other.join().unwrap_or_else(|panic| resume_unwind(panic)) {
            *seen.entry(what).or_default() += times;
        }
        seen
    });
    // What never happens is never checked.
    for what in HAPPENS {
        assert!(
            seen.remove(what).is_some_and(|times| times >= seeds / 20),
            "{what} happens too seldom beside {seen:#?}"
        );
    }
}

#[test]
fn a_seed_makes_the_same_world_twice() {
    assert_eq!(run_seed(7), run_seed(7));
}
