//! What one change costs a core that has 10,000 readers of it, the kernel left out: polled, compared, encoded once, and
//! handed to each reader's cursor by a real shard whose sockets take everything and count.

mod hall;

use std::fmt::Write;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};

use hall::{Hall, plain_upgrade, upgrade};

const READERS: u64 = 10_000;

/// A value of `rows` rows, of which one differs from round to round.
fn leads(rows: u64, round: u64) -> Vec<u8> {
    let mut body = String::from("{\"items\":[");
    for no in 0..rows {
        let separator = if no > 0 { "," } else { "" };
        let status = if no == 7 % rows { round } else { 0 };
        write!(body, r#"{separator}{{"id":{no},"name":"Lead number {no}","status":{status}}}"#).expect("a string");
    }
    body.push_str("]}");
    body.into_bytes()
}

fn fan_out(c: &mut Criterion) {
    fan_out_to(c, "one frame to 10,000 cursors", plain_upgrade);
    fan_out_to(c, "one frame to 10,000 cursors, deflated", upgrade);
}

fn fan_out_to(c: &mut Criterion, name: &str, upgrade: fn(&str) -> Vec<u8>) {
    let mut hall = Hall::new();
    for no in 0..READERS {
        let mut request = upgrade(&hall.token(no));
        hall.open(&mut request);
    }
    hall.poll(leads(20, 0));
    hall.deliver();
    let mut round = 0;
    let mut group = c.benchmark_group("delivery");
    group.throughput(Throughput::Elements(READERS));
    group.bench_function(name, |b| {
        b.iter_batched(
            || {
                round += 1;
                leads(20, round)
            },
            |body| {
                let before = hall.sent.sends;
                hall.poll(body);
                hall.deliver();
                assert_eq!(hall.sent.sends - before, READERS, "each reader gets it in one send");
            },
            BatchSize::PerIteration,
        );
    });
    group.finish();
}

criterion_group!(benches, fan_out);
criterion_main!(benches);
