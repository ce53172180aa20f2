//! The work whose instructions are counted.
//!
//! Each work is done a number of times after the same preparation, so that the difference of two runs is the work alone.
//! Nothing in it waits or asks for the time; all random numbers but the keys of hash maps come from one seed.

use std::collections::VecDeque;
use std::fmt::Write;

use crate::hall::{Hall, plain_upgrade, upgrade};

/// Readers of the one frame that is delivered.
const READERS: u64 = 1_000;
/// Handshakes leave so many connections open, as on a server that is used.
const OPEN: usize = 100;

/// Something that is counted.
pub struct Work {
    /// Its name in `figures.toml`.
    pub name: &'static str,
    /// How many times it is done in the shorter run; in the longer one twice as many.
    pub times: u64,
    /// How many of what is counted are done each time.
    pub each: u64,
    /// Prepares, and does it that many times.
    pub run: fn(u64),
}

/// All of them.
pub const WORKS: [Work; 5] = [
    Work { name: "delivery", times: 50, each: READERS, run: delivery },
    Work { name: "deflated_delivery", times: 50, each: READERS, run: deflated_delivery },
    Work { name: "handshake", times: 500, each: 1, run: handshake },
    Work { name: "unchanged_poll", times: 500, each: 1, run: unchanged_poll },
    Work { name: "unchanged_small_poll", times: 500, each: 1, run: unchanged_small_poll },
];

/// One frame of a change to each of `READERS`, its poll, comparison and encoding included. Counted: one reader's part.
fn delivery(times: u64) {
    deliver(times, plain_upgrade);
}

/// The same, deflated once for all of them.
fn deflated_delivery(times: u64) {
    deliver(times, upgrade);
}

fn deliver(times: u64, upgrade: fn(&str) -> Vec<u8>) {
    let mut hall = Hall::new();
    for no in 0..READERS {
        let mut request = upgrade(&hall.token(no));
        hall.open(&mut request);
    }
    hall.poll(leads(40, 0));
    hall.deliver();
    let before = hall.sent.sends;
    for round in 1..=times {
        hall.poll(leads(40, round));
        hall.deliver();
    }
    assert_eq!(hall.sent.sends - before, times * READERS, "each reader gets each frame in one send");
}

/// A browser's upgrade with a token nobody brought before: verified, welcomed, subscribed, its snapshot sent; and its end.
fn handshake(times: u64) {
    let mut hall = Hall::new();
    let mut first = upgrade(&hall.token(0));
    hall.open(&mut first);
    hall.poll(leads(4, 0));
    hall.deliver();
    // In both runs as many tokens, so that signing them stays out of the difference.
    let mut requests: Vec<Vec<u8>> = (1..=TOKENS).map(|no| upgrade(&hall.token(no))).collect();
    assert!(times <= TOKENS, "there are {TOKENS} tokens");
    let before = hall.sent.bytes;
    let mut open = VecDeque::new();
    for request in requests.iter_mut().take(times as usize) {
        open.push_back(hall.open(request));
        if open.len() > OPEN {
            hall.lose(open.pop_front().expect("a connection"));
        }
    }
    assert!(hall.sent.bytes - before > times * 500, "each gets its answer, its welcome and its snapshot");
    assert!(hall.connections() <= OPEN + 1);
}

/// Tokens made for `handshake`.
const TOKENS: u64 = 1_000;

/// A poll that brings the 10 KiB it brought before. Nearly all of it is hashing, without the processor's SHA instructions,
/// which callgrind does not know.
fn unchanged_poll(times: u64) {
    let body = leads(91, 0);
    assert!((10_000..10_500).contains(&body.len()), "{} bytes", body.len());
    poll_unchanged(&body, times);
}

/// A poll that brings the same few bytes: what a poll takes besides hashing.
fn unchanged_small_poll(times: u64) {
    poll_unchanged(b"{}", times);
}

fn poll_unchanged(body: &[u8], times: u64) {
    let mut hall = Hall::new();
    let mut request = upgrade(&hall.token(0));
    hall.open(&mut request);
    hall.poll(body.to_vec());
    hall.deliver();
    let before = hall.sent.sends;
    for _ in 0..times {
        hall.poll(body.to_vec());
    }
    assert_eq!(hall.sent.sends, before, "nothing is sent for a value that has not changed");
}

/// A list of `rows`, of which one has another status in each round.
fn leads(rows: u64, round: u64) -> Vec<u8> {
    let mut body = String::from("{\"items\":[");
    for no in 0..rows {
        let separator = if no > 0 { "," } else { "" };
        let status = if no == 7 % rows { 1_000_000 + round } else { 0 };
        write!(
            body,
            r#"{separator}{{"id":{no},"name":"Lead number {no}","company":"Company {} GmbH","status":{status},"value":{}.50,"active":true,"note":null}}"#,
            no % 97,
            no * 3,
        )
        .expect("a string");
    }
    body.push_str("]}");
    body.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::WORKS;

    #[test]
    fn each_work_does_what_it_is_named_for() {
        for work in WORKS {
            (work.run)(3);
        }
    }
}
