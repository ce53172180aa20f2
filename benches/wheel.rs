//! What deadlines cost a core: setting one, and one tick of a wheel that holds as many as a large core has connections.

use std::hint::black_box;
use std::time::Duration;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use restcast::shard::wheel::Wheel;
use restcast::time::Instant;

const TICK_US: u64 = 100_000;
const HEARTBEAT_US: u64 = 25_000_000;
const YEAR_US: u64 = 365 * 86_400_000_000;

/// A wheel whose `keys` deadlines lie anywhere within `span_us`.
fn wheel_of(keys: u32, span_us: u64) -> Wheel {
    let mut wheel = Wheel::new(Instant::from_micros(0));
    wheel.reserve(keys);
    for key in 0..keys {
        wheel.set(key, scattered(key, span_us));
    }
    wheel
}

/// Fibonacci hashing: neighbours in the table are not neighbours in time.
fn scattered(key: u32, span_us: u64) -> Instant {
    Instant::from_micros(u64::from(key).wrapping_mul(0x9e37_79b9_7f4a_7c15) % span_us)
}

/// All that is due at `now`.
fn turn(wheel: &mut Wheel, now: Instant, mut due: impl FnMut(&mut Wheel, u32)) {
    let mut budget = u32::MAX;
    while let Some(key) = wheel.pop_due(now, &mut budget) {
        due(wheel, key);
    }
}

fn set(c: &mut Criterion) {
    let mut wheel = wheel_of(20_000, HEARTBEAT_US);
    let mut key = 0;
    let mut group = c.benchmark_group("wheel");
    group.throughput(Throughput::Elements(1));
    group.bench_function("set one of 20,000 anew", |b| {
        b.iter(|| {
            key = (key + 7_919) % 20_000;
            wheel.set(black_box(key), scattered(key, HEARTBEAT_US));
        });
    });
    group.bench_function("next time-out of 20,000", |b| b.iter(|| black_box(&wheel).next_timeout()));
    group.finish();
}

fn tick(c: &mut Criterion) {
    let mut group = c.benchmark_group("wheel tick");
    for keys in [20_000, 1_000_000] {
        let mut now_us = 0;
        let mut wheel = wheel_of(keys, HEARTBEAT_US);
        group.bench_function(format!("{keys} heartbeats of 25 s, each set again"), |b| {
            b.iter(|| {
                now_us += TICK_US;
                let now = Instant::from_micros(now_us);
                turn(&mut wheel, now, |wheel, key| wheel.set(key, Instant::from_micros(now_us + HEARTBEAT_US)));
            });
        });
        let mut now_us = 0;
        // Ten years of them, so that hardly one comes due however long this runs: the price of looking at far deadlines.
        let mut wheel = wheel_of(keys, 10 * YEAR_US);
        group.bench_function(format!("{keys} far deadlines"), |b| {
            b.iter(|| {
                now_us += TICK_US;
                turn(&mut wheel, Instant::from_micros(now_us), |_, _| ());
            });
        });
    }
    group.bench_function("19,000 expiries of one second", |b| {
        let expiring = || wheel_of(19_000, 1_000_000);
        let at = Instant::from_micros(1_000_000);
        b.iter_batched_ref(expiring, |wheel| turn(wheel, at, |_, key| _ = black_box(key)), BatchSize::LargeInput);
    });
    group.finish();
}

/// The longest of the ticks, which a mean does not show, on standard error: a minute of 1,000,000 heartbeats, and the
/// turns in which a shard takes 1,000,000 deadlines that all end in the same tick.
fn worst(_: &mut Criterion) {
    const KEYS: u32 = 1_000_000;
    let mut wheel = wheel_of(KEYS, HEARTBEAT_US);
    let ticks = (1..=600).map(|no| {
        let now_us = no * TICK_US;
        timed(|| {
            turn(&mut wheel, Instant::from_micros(now_us), |wheel, key| {
                wheel.set(key, Instant::from_micros(now_us + HEARTBEAT_US));
            });
        })
    });
    tell("a tick of 1,000,000 heartbeats of 25 s", ticks.collect());

    let mut wheel = wheel_of(KEYS, TICK_US);
    let now = Instant::from_micros(TICK_US * 2);
    let mut turns = Vec::new();
    let mut left = KEYS;
    while left > 0 {
        turns.push(timed(|| {
            // As many as a shard looks at in one turn.
            let mut budget = 4096;
            while let Some(key) = wheel.pop_due(now, &mut budget) {
                black_box(key);
                left -= 1;
            }
        }));
    }
    tell("a turn of 1,000,000 deadlines in one tick", turns);
}

fn timed(mut work: impl FnMut()) -> Duration {
    let began = std::time::Instant::now();
    work();
    began.elapsed()
}

fn tell(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |permille: usize| times[(times.len() - 1) * permille / 1_000];
    eprintln!("{what}: median {:?}, p99 {:?}, worst {:?} of {}", at(500), at(990), at(1_000), times.len());
}

criterion_group!(benches, set, tick, worst);
criterion_main!(benches);
