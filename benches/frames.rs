//! What a WebSocket frame costs: written to a buffer by the server, and read and unmasked from a client.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use restcast::codec::ws::{Decoder, Incoming, Limits, Opcode, unmask, write_masked, write_text};

const SIZES: [usize; 3] = [128, 1 << 10, 64 << 10];
const LIMITS: Limits = Limits { message_bytes_max: 1 << 20, fragments_max: 64 };
const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];

fn encode(c: &mut Criterion) {
    let mut group = c.benchmark_group("frame encode");
    for size in SIZES {
        let payload = vec![b'x'; size];
        let mut out = Vec::with_capacity(size + 16);
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(format!("{size} B"), |b| {
            b.iter(|| {
                out.clear();
                write_text(&mut out, black_box(&payload));
                black_box(out.len())
            });
        });
    }
    group.finish();
}

fn decode(c: &mut Criterion) {
    let mut group = c.benchmark_group("frame unmask");
    for size in SIZES {
        let mut payload = vec![b'x'; size];
        group.throughput(Throughput::Bytes(size as u64));
        group.bench_function(format!("{size} B"), |b| b.iter(|| unmask(black_box(&mut payload), MASK)));
    }
    group.finish();
    let mut group = c.benchmark_group("frame decode");
    for size in SIZES {
        let mut bytes = Vec::new();
        write_masked(&mut bytes, true, Opcode::Text, &vec![b'x'; size], MASK);
        group.throughput(Throughput::Bytes(size as u64));
        // The bytes are overwritten while they are unmasked, so each time gets its own.
        group.bench_function(format!("{size} B of text"), |b| {
            b.iter_batched_ref(
                || bytes.clone(),
                |bytes| {
                    let mut input = &mut bytes[..];
                    match Decoder::new().next(&mut input, LIMITS, None) {
                        Ok(Some(Incoming::Text(text))) => assert_eq!(text.len(), size),
                        other => panic!("a text message was sent: {other:?}"),
                    }
                },
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

criterion_group!(benches, encode, decode);
criterion_main!(benches);
