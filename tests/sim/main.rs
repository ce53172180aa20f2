//! The seeded simulator: real shards, a virtual clock, model sockets, clients and upstreams, all from one number.
//!
//! Every failure prints its seed; `RESTCAST_SIM_SEED=n cargo test --test sim` replays that world alone, with
//! `RESTCAST_SIM_CLIENT=m` what its client `m` was sent is printed; `RESTCAST_SIM_SEEDS=n` makes more worlds. What is checked
//! at every step stands in `client` (what one client may see) and `world` (bounds, deadlines, leaks).

mod client;
mod dice;
mod scripts;
mod upstream;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use dice::Dice;
use world::World;

/// Worlds that a run of the tests makes, unless `RESTCAST_SIM_SEEDS` says otherwise.
const SEEDS: u64 = 40;

fn run_seed(seed: u64) -> u64 {
    match catch_unwind(AssertUnwindSafe(|| World::new(Dice::seeded(seed)).run())) {
        Ok(trace) => trace,
        Err(panic) => {
            eprintln!("this world failed: RESTCAST_SIM_SEED={seed} cargo test --test sim replays it");
            resume_unwind(panic)
        }
    }
}

#[test]
fn worlds_keep_the_contract() {
    if let Ok(seed) = std::env::var("RESTCAST_SIM_SEED") {
        run_seed(seed.parse().expect("RESTCAST_SIM_SEED is a number"));
        return;
    }
    let asked = std::env::var("RESTCAST_SIM_SEEDS").ok();
    let seeds = asked.map_or(SEEDS, |seeds| seeds.parse().expect("RESTCAST_SIM_SEEDS is a number"));
    std::thread::scope(|scope| {
        let half = |first: u64| {
            move || {
                (first..=seeds).step_by(2).for_each(|seed| {
                    run_seed(seed);
                })
            }
        };
        let other = scope.spawn(half(2));
        half(1)();
        if let Err(panic) = other.join() {
            resume_unwind(panic);
        }
    });
}

#[test]
fn a_seed_makes_the_same_world_twice() {
    assert_eq!(run_seed(7), run_seed(7));
}
