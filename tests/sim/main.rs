//! The seeded simulator: real shards, a virtual clock, model sockets, clients and upstreams, all from one number.
//!
//! Every failure prints its seed; `RESTCAST_SIM_SEED=n cargo test --test sim` replays that world alone. What is checked
//! at every step stands in `client` (what one client may see) and `world` (bounds, deadlines, leaks).

mod client;
mod scripts;
mod upstream;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use world::World;

/// Worlds that a run of the tests makes.
const SEEDS: u64 = 120;

/// SplitMix64: the only source of chance here.
#[derive(Clone, Debug)]
pub struct Dice(pub u64);

impl Dice {
    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    /// True `of` times in a hundred.
    pub fn percent(&mut self, of: u64) -> bool {
        self.below(100) < of
    }

    /// One of them.
    pub fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        let place = self.below(all.len() as u64) as usize;
        &all[place]
    }
}

fn run_seed(seed: u64) -> u64 {
    match catch_unwind(AssertUnwindSafe(|| World::new(seed).run())) {
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
    std::thread::scope(|scope| {
        let half = |first: u64| move || (first..=SEEDS).step_by(2).for_each(|seed| drop(run_seed(seed)));
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
