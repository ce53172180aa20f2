//! What deadlines cost a core: setting one, and one tick of a wheel that holds as many as a large core has connections.

use std::hint::black_box;

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

criterion_group!(benches, set, tick);
criterion_main!(benches);
