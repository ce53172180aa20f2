//! Upstream answers: the same outcome whole and in pieces of the fuzzer's choice, never more than the limits allow.
#![no_main]

use libfuzzer_sys::fuzz_target;
use restcast::codec::http_response::{ResponseDecoder, ResponseError, ResponseLimits, http_date, retry_after};
use restcast::codec::tunnel::{Answer, TunnelError, read_answer};
use restcast::time::WallTime;

const LIMITS: ResponseLimits = ResponseLimits { head_bytes_max: 512, body_bytes_max: 4096 };

fuzz_target!(|data: &[u8]| {
    // The first bytes say how the others are split, and whether the request was HEAD.
    let Some((plan, wire)) = data.split_at_checked(4) else {
        return;
    };
    let to_head = plan[0] & 0x80 != 0;
    let whole = outcome(wire, to_head, &[usize::MAX]);
    let sizes: Vec<usize> = plan.iter().map(|b| usize::from(b & 0x1f) + 1).collect();
    assert_eq!(outcome(wire, to_head, &sizes), whole, "in pieces of {sizes:?}");
    assert_eq!(outcome(wire, to_head, &[1]), whole, "byte by byte");
    let now = WallTime::from_secs(1_795_350_000);
    let _ = (retry_after(wire, now), http_date(wire, now));
    // A proxy's answer to CONNECT: what is judged by its beginning is so whatever follows, but that something does.
    let judged = read_answer(wire);
    for end in (0..wire.len()).rev().take(64) {
        match read_answer(&wire[..end]) {
            Ok(Answer::Partial) => {}
            Ok(Answer::Open) => assert_eq!(judged, Err(TunnelError::Early)),
            sooner => assert_eq!(sooner, judged),
        }
    }
});

type Outcome = Result<(u16, Vec<u8>, bool, Vec<Vec<u8>>), ResponseError>;

fn outcome(wire: &[u8], to_head: bool, sizes: &[usize]) -> Outcome {
    let mut decoder = ResponseDecoder::new(LIMITS, to_head);
    let mut rest = wire;
    for size in sizes.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (piece, after) = rest.split_at_checked(*size).unwrap_or((rest, &[]));
        decoder.feed(piece)?;
        rest = after;
    }
    decoder.eof()?;
    let values = decoder.headers("a").map(<[u8]>::to_vec).collect();
    let reusable = decoder.is_reusable();
    let body = decoder.take_body();
    assert!(body.len() as u64 <= LIMITS.body_bytes_max);
    Ok((decoder.status().expect("a whole answer has a head"), body, reusable, values))
}
