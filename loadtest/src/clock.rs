//! The clocks: wall time for what the server stamps, a steady one for pacing, CPU time for what this process costs.

use std::time::{SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

/// Microseconds since the Unix epoch.
pub fn wall_us() -> u64 {
    // Before 1970 nothing works anyway.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}

/// Microseconds of a clock that is never set.
pub fn steady_us() -> u64 {
    micros(clock_gettime(ClockId::Monotonic))
}

/// CPU time of this process in microseconds.
pub fn cpu_us() -> u64 {
    micros(clock_gettime(ClockId::ProcessCPUTime))
}

fn micros(time: rustix::time::Timespec) -> u64 {
    time.tv_sec.unsigned_abs() * 1_000_000 + time.tv_nsec.unsigned_abs() / 1000
}
