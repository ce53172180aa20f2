//! What opening a WebSocket costs: its request parsed, its token verified, and the whole of it through a shard.

mod hall;

use std::collections::VecDeque;
use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use restcast::auth::cache::TokenCache;
use restcast::auth::control::{ControlEntry, Event};
use restcast::auth::grant::RightsTable;
use restcast::auth::jwt::Verifier;
use restcast::auth::marks::Marks;
use restcast::codec::http::parse_head;
use restcast::connection::handshake::{demand, presented};

use hall::{Hall, key, options, start, token, upgrade};

/// Connections that stay open while others come and go.
const OPEN: usize = 1_000;

fn parse(c: &mut Criterion) {
    let options = options();
    let bytes = upgrade(&token(&key(), 1));
    let mut group = c.benchmark_group("handshake");
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function("head", |b| {
        b.iter(|| parse_head(black_box(&bytes), 16 << 10).expect("a head").expect("the whole of it"));
    });
    group.bench_function("head, demand and credential", |b| {
        b.iter(|| {
            let (head, _) = parse_head(black_box(&bytes), 16 << 10).expect("a head").expect("the whole of it");
            let demand = demand(&head, &options.connection).expect("a WebSocket is demanded");
            let presented = presented(&head, &options.auth).expect("a credential");
            black_box((demand, presented));
        });
    });
    group.finish();
}

fn verify(c: &mut Criterion) {
    let verifier = Verifier::new(options().auth.jwt);
    let token = token(&key(), 1);
    let mut group = c.benchmark_group("jwt");
    group.throughput(Throughput::Elements(1));
    group.bench_function("HS256, typical claims", |b| {
        b.iter(|| verifier.verify(black_box(token.as_bytes()), start().wall).expect("a valid token"));
    });
    let mut forged = token.clone().into_bytes();
    *forged.last_mut().expect("a signature") ^= 4;
    group.bench_function("HS256, forged", |b| {
        b.iter(|| verifier.verify(black_box(&forged), start().wall).expect_err("another signature"));
    });
    let grant = verifier.verify(token.as_bytes(), start().wall).expect("a valid token");
    let mut rights = RightsTable::default();
    let grant = grant.into_grant(&mut rights, &[]);
    let leeway = verifier.options().leeway;
    let mut cache = TokenCache::new(4096, [7; 32]);
    cache.keep(token.as_bytes(), &grant, start().wall, &mut rights);
    group.bench_function("remembered", |b| {
        b.iter(|| cache.find(black_box(token.as_bytes()), start().wall, leeway).expect("it was kept"));
    });
    // What is asked besides where somebody has logged out.
    let marks = Marks::default();
    let entry = ControlEntry::user_logged_out("somebody", None, start().wall);
    for event in Event::read(&entry, start().wall).expect("an event") {
        marks.take(&event, start().wall);
    }
    group.bench_function("judged by marks", |b| {
        b.iter(|| (marks.judge(black_box(&grant), start().wall), marks.rights_of(&grant, start().wall)));
    });
    group.finish();
}

/// Bytes of the request to answer, welcome and snapshot, each with a token of its own; and the end of another connection.
fn whole(c: &mut Criterion) {
    let mut hall = Hall::new();
    let mut open = VecDeque::new();
    for no in 0..OPEN as u64 {
        open.push_back(hall.open(&mut upgrade(&hall.token(no))));
    }
    hall.poll(br#"{"items":[{"id":1,"status":"open"},{"id":2,"status":"won"}]}"#.to_vec());
    hall.deliver();
    let mut no = OPEN as u64;
    let mut group = c.benchmark_group("handshake");
    group.throughput(Throughput::Elements(1));
    group.bench_function("whole, with its teardown", |b| {
        b.iter_batched_ref(
            || {
                no += 1;
                upgrade(&token(&key(), no))
            },
            |request| {
                let oldest = open.pop_front().expect("a connection");
                hall.lose(oldest);
                open.push_back(hall.open(request));
            },
            BatchSize::SmallInput,
        );
    });
    assert_eq!(hall.connections(), OPEN);
    group.finish();
}

criterion_group!(benches, parse, verify, whole);
criterion_main!(benches);
