//! What one poll of a changed value costs: parsing the new body and comparing it with the old, beside what serde_json
//! takes to parse it alone, which the two together must stay under (ten rows changed, in 10 KiB and in 1 MiB); and one of a
//! value that has not changed, whose body is hashed and no more.

use std::fmt::Write;
use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use restcast::codec::json::{Document, body_fingerprint};
use restcast::stream::diff::{DiffOptions, diff};

/// A list as REST endpoints give them, of `rows`, with another status in `changed` of them.
fn leads(rows: usize, changed: usize) -> Vec<u8> {
    let mut body = String::from("{\"generated_at\":1763812345,\"items\":[");
    let tenth = rows / 10;
    for n in 0..rows {
        let separator = if n > 0 { "," } else { "" };
        let status = if n % tenth == tenth / 2 && n / tenth < changed { "won" } else { "open" };
        write!(
            body,
            r#"{separator}{{"id":{n},"name":"Lead number {n}","company":"Company {} GmbH","status":"{status}","value":{}.50,"owner":{{"id":{},"email":"owner{}@example.com"}},"tags":["a","b{}"],"active":true,"note":null}}"#,
            n % 97,
            n * 3,
            n % 13,
            n % 13,
            n % 7
        )
        .expect("a string");
    }
    body.push_str("]}");
    body.into_bytes()
}

/// The same rows with the first one at the end.
fn rotated(rows: usize) -> Vec<u8> {
    let body = String::from_utf8(leads(rows, 0)).expect("UTF-8");
    let (head, rows) = body.split_once('[').expect("an array");
    let (first, rest) = rows.split_once("},{\"id\":1,").expect("two rows");
    format!("{head}[{{\"id\":1,{},{first}}}]}}", rest.trim_end_matches("]}")).into_bytes()
}

fn poll(criterion: &mut Criterion) {
    poll_of(criterion, "10 KiB", 10 << 10, 55);
    poll_of(criterion, "1 MiB", 1 << 20, 5_520);
}

fn poll_of(criterion: &mut Criterion, size: &str, bytes: usize, rows: usize) {
    let (old_body, new_body) = (leads(rows, 0), leads(rows, 10));
    let near = bytes - bytes / 16..bytes + bytes / 16;
    assert!(near.contains(&new_body.len()), "{} bytes are not {size}", new_body.len());
    let parse = |body: &[u8]| Document::parse(body).expect("JSON");
    let (old, new, turned) = (parse(&old_body), parse(&new_body), parse(&rotated(rows)));
    let by_place = DiffOptions::default();
    let by_key = DiffOptions { array_key: Some("id"), ..by_place };

    let mut group = criterion.benchmark_group(format!("poll of {size}"));
    group.throughput(Throughput::Bytes(new_body.len() as u64));
    group.bench_function("serde_json value", |b| {
        b.iter(|| serde_json::from_slice::<serde_json::Value>(black_box(&new_body)).expect("JSON"));
    });
    group.bench_function("unchanged: fingerprint", |b| b.iter(|| body_fingerprint(black_box(&new_body))));
    group.bench_function("parse", |b| b.iter(|| parse(black_box(&new_body))));
    group.bench_function("fingerprint, parse and diff", |b| {
        b.iter(|| {
            let fingerprint = body_fingerprint(black_box(&new_body));
            (fingerprint, diff(&old, &parse(black_box(&new_body)), &by_place))
        });
    });
    group.bench_function("diff", |b| b.iter(|| diff(black_box(&old), black_box(&new), &by_place)));
    group.bench_function("diff by key", |b| b.iter(|| diff(black_box(&old), black_box(&new), &by_key)));
    group.bench_function("diff of rotated rows", |b| b.iter(|| diff(black_box(&old), black_box(&turned), &by_place)));
    group.finish();
}

criterion_group!(benches, poll);
criterion_main!(benches);
