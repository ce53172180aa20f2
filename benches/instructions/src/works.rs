//! The work whose instructions are counted.
//!
//! Each work is done a number of times after the same preparation, so that the difference of two runs is the work alone.
//! Nothing in it waits or asks for the time; all random numbers but the keys of hash maps come from one seed. What a poll
//! brings is made before the rounds begin, as much of it in every run.

use std::collections::VecDeque;
use std::fmt::Write;
use std::iter::Take;
use std::vec::IntoIter;

use crate::hall::{Hall, plain_upgrade, upgrade};

/// Most rounds that a run can have: for each, what it takes is made in advance.
const ROUNDS_MAX: u64 = 400;
/// Handshakes leave so many connections open, as on a server that is used.
const OPEN: usize = 100;
/// What one connection reads where deliveries are joint.
const STREAMS: [&str; 8] = ["s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7"];
/// Rows of the value that changes: a usual list.
const ROWS: u64 = 40;

/// Something that is counted.
pub struct Work {
    /// Its name in `figures.toml`.
    pub name: &'static str,
    /// Rounds of the shorter runs; the longer ones have twice as many.
    pub rounds: u64,
    /// Prepares, and does so many rounds of it.
    pub does: Does,
}

/// What is counted of a work.
pub enum Does {
    /// A round, all of it.
    Rounds(fn(u64)),
    /// One reader's part of a round: what grows with both. What a round takes however many read stays out of it. There are so
    /// many readers in the smaller runs and twice as many in the larger; the function is given rounds and readers.
    Parts(u64, fn(u64, u64)),
}

/// All of them.
pub const WORKS: [Work; 8] = [
    Work { name: "delivery", rounds: 50, does: Does::Parts(1_000, delivery) },
    Work { name: "deflated_delivery", rounds: 50, does: Does::Parts(1_000, deflated_delivery) },
    Work { name: "joint_delivery", rounds: 20, does: Does::Parts(250, joint_delivery) },
    Work { name: "change", rounds: 200, does: Does::Rounds(change) },
    Work { name: "deflated_change", rounds: 200, does: Does::Rounds(deflated_change) },
    Work { name: "handshake", rounds: 200, does: Does::Rounds(handshake) },
    Work { name: "unchanged_poll", rounds: 200, does: Does::Rounds(unchanged_poll) },
    Work { name: "unchanged_small_poll", rounds: 200, does: Does::Rounds(unchanged_small_poll) },
];

/// One frame of a change to each reader, from the encoded frame to the socket. Counted: one reader's part.
fn delivery(rounds: u64, readers: u64) {
    deliver(rounds, readers, plain_upgrade);
}

/// The same to readers who take it deflated.
fn deflated_delivery(rounds: u64, readers: u64) {
    deliver(rounds, readers, upgrade);
}

/// A change polled, compared and encoded, and sent to the one reader there is: what a change takes however many read it.
fn change(rounds: u64) {
    deliver(rounds, 1, plain_upgrade);
}

/// The same, deflated besides.
fn deflated_change(rounds: u64) {
    deliver(rounds, 1, upgrade);
}

fn deliver(rounds: u64, readers: u64, upgrade: fn(&str) -> Vec<u8>) {
    let bodies = prepared(rounds, |round| leads(ROWS, round));
    let mut hall = Hall::new();
    for no in 0..readers {
        let mut request = upgrade(&hall.token(no));
        hall.open(&mut request);
    }
    hall.poll(leads(ROWS, ROUNDS_MAX));
    hall.deliver();
    let before = hall.sent.sends;
    for body in bodies {
        hall.poll(body);
        hall.deliver();
    }
    assert_eq!(hall.sent.sends - before, rounds * readers, "each reader gets each frame in one send");
}

/// Eight streams that change in one moment, to readers of all eight: eight frames in one send. Counted: one such send.
fn joint_delivery(rounds: u64, readers: u64) {
    let bodies = prepared(rounds, |round| STREAMS.map(|_| leads(4, round)));
    let mut hall = Hall::with_streams(&STREAMS);
    for no in 0..readers {
        hall.open_on(&STREAMS, no);
    }
    hall.poll_each(STREAMS.map(|_| leads(4, ROUNDS_MAX)));
    hall.deliver();
    let before = hall.sent.sends;
    for each in bodies {
        hall.poll_each(each);
        hall.deliver();
    }
    assert_eq!(hall.sent.sends - before, rounds * readers, "each reader gets its eight frames in one send");
}

/// A browser's upgrade with a token nobody brought before: verified, welcomed, subscribed, its snapshot sent; and its end.
fn handshake(rounds: u64) {
    let mut hall = Hall::new();
    let mut first = upgrade(&hall.token(0));
    hall.open(&mut first);
    hall.poll(leads(4, 0));
    hall.deliver();
    let requests = prepared(rounds, |round| upgrade(&hall.token(round + 1)));
    let before = hall.sent.bytes;
    let mut open = VecDeque::new();
    for mut request in requests {
        open.push_back(hall.open(&mut request));
        if open.len() > OPEN {
            hall.lose(open.pop_front().expect("a connection"));
        }
    }
    assert!(hall.sent.bytes - before > rounds * 500, "each gets its answer, its welcome and its snapshot");
    assert!(hall.connections() <= OPEN + 1);
}

/// A poll that brings the 10 KiB it brought before. Nearly all of it is hashing, without the processor's SHA instructions,
/// which callgrind does not know.
fn unchanged_poll(rounds: u64) {
    let body = leads(91, 0);
    assert!((10_000..10_500).contains(&body.len()), "{} bytes", body.len());
    poll_unchanged(&body, rounds);
}

/// A poll that brings the same few bytes: what a poll takes besides hashing.
fn unchanged_small_poll(rounds: u64) {
    poll_unchanged(b"{}", rounds);
}

fn poll_unchanged(body: &[u8], rounds: u64) {
    let bodies = prepared(rounds, |_| body.to_vec());
    let mut hall = Hall::new();
    let mut request = upgrade(&hall.token(0));
    hall.open(&mut request);
    hall.poll(body.to_vec());
    hall.deliver();
    let before = hall.sent.sends;
    for body in bodies {
        hall.poll(body);
    }
    assert_eq!(hall.sent.sends, before, "nothing is sent for a value that has not changed");
}

/// What the rounds take: as much is made in every run, so that making it stays out of the difference.
fn prepared<T>(rounds: u64, make: impl FnMut(u64) -> T) -> Take<IntoIter<T>> {
    assert!(rounds <= ROUNDS_MAX, "there are at most {ROUNDS_MAX} rounds");
    let all: Vec<T> = (0..ROUNDS_MAX).map(make).collect();
    all.into_iter().take(rounds as usize)
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
    use super::{Does, WORKS};

    #[test]
    fn each_work_does_what_it_is_named_for() {
        for work in WORKS {
            match work.does {
                Does::Rounds(run) => run(3),
                Does::Parts(_, run) => run(3, 5),
            }
        }
    }
}
