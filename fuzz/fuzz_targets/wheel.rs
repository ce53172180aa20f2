//! Operations on the timer wheel against a sorted map. Six bytes are one operation.
#![no_main]

use std::collections::BTreeMap;

use restcast::shard::wheel::Wheel;
use restcast::time::Instant;

const TICK_US: u64 = 100_000;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut now_us = 0;
    let mut wheel = Wheel::new(Instant::from_micros(now_us));
    let mut model: BTreeMap<u32, u64> = BTreeMap::new();
    for operation in data.chunks_exact(6) {
        let &[kind, key, scale, a, b, c] = operation else { continue };
        let key = u32::from(key % 32);
        // 0 us to 584,000 years: a number of 24 bits, shifted.
        let span_us = u64::from(u32::from_le_bytes([a, b, c, 0])) << (scale % 41);
        match kind % 4 {
            0 => set(&mut wheel, &mut model, key, now_us.saturating_add(span_us)),
            1 => set(&mut wheel, &mut model, key, now_us.saturating_sub(span_us)),
            2 => assert_eq!(wheel.clear(key), model.remove(&key).is_some()),
            _ => {
                // The clock stays within 6,900 years, those that the wheel's numbers are made for.
                now_us = now_us.saturating_add(span_us).min(1 << 57);
                let budget = u32::from(kind / 4);
                let mut left = budget;
                while let Some(key) = wheel.pop_due(Instant::from_micros(now_us), &mut left) {
                    let at_us = model.remove(&key).expect("a key is due once");
                    assert!(at_us <= now_us, "never early");
                }
                let overdue = model.values().any(|at_us| at_us.div_ceil(TICK_US) <= now_us / TICK_US);
                assert!(!overdue || left == 0, "what is due comes while the budget lasts");
            }
        }
        assert_eq!(wheel.len(), model.len());
        let earliest_us = model.values().min().map(|at_us| at_us.div_ceil(TICK_US).saturating_mul(TICK_US).max(now_us));
        let next_us = wheel.next_timeout().map(Instant::as_micros);
        assert_eq!(next_us.is_some(), earliest_us.is_some());
        assert!(next_us <= earliest_us, "nothing is slept through");
    }
});

fn set(wheel: &mut Wheel, model: &mut BTreeMap<u32, u64>, key: u32, at_us: u64) {
    wheel.set(key, Instant::from_micros(at_us));
    model.insert(key, at_us);
}
