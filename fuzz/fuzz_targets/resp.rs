//! What Redis answers: the same replies whole and in pieces of the fuzzer's choice, never more than the bounds allow.
#![no_main]

use libfuzzer_sys::fuzz_target;
use restcast::codec::resp::{Bounds, Decoder, Reply, RespError, error_code};

const BOUNDS: Bounds =
    Bounds { line_bytes_max: 64, string_bytes_max: 256, elements_max: 64, depth_max: 4, reply_bytes_max: 1024 };

fuzz_target!(|data: &[u8]| {
    // The first bytes say how the others are split.
    let Some((plan, wire)) = data.split_at_checked(4) else {
        return;
    };
    let whole = outcome(wire, &[usize::MAX]);
    let sizes: Vec<usize> = plan.iter().map(|b| usize::from(b & 0x1f) + 1).collect();
    assert_eq!(outcome(wire, &sizes), whole, "in pieces of {sizes:?}");
    assert_eq!(outcome(wire, &[1]), whole, "byte by byte");
});

/// The replies before the first error, and how it ended: between replies, amid one, or by an error.
fn outcome(wire: &[u8], sizes: &[usize]) -> (Vec<Reply>, Result<bool, RespError>) {
    let mut decoder = Decoder::new(BOUNDS);
    let (mut replies, mut rest) = (Vec::new(), wire);
    for size in sizes.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (mut piece, after) = rest.split_at_checked(*size).unwrap_or((rest, &[]));
        rest = after;
        loop {
            match decoder.decode(&mut piece) {
                Ok(Some(reply)) => {
                    let (mut elements, mut bytes) = (0, 0);
                    measure(&reply, 0, &mut elements, &mut bytes);
                    assert!(elements <= BOUNDS.elements_max && bytes <= BOUNDS.reply_bytes_max);
                    replies.push(reply);
                }
                Ok(None) => break,
                Err(error) => return (replies, Err(error)),
            }
        }
        assert!(piece.is_empty(), "all is taken");
    }
    (replies, Ok(decoder.is_between_replies()))
}

fn measure(reply: &Reply, depth: usize, elements: &mut usize, bytes: &mut usize) {
    match reply {
        Reply::Simple(line) => *bytes += line.len(),
        Reply::Error(line) => {
            assert!(error_code(line).len() <= 16);
            *bytes += line.len();
        }
        Reply::String(string) => {
            assert!(string.len() <= BOUNDS.string_bytes_max);
            *bytes += string.len();
        }
        Reply::TooLong(announced) => {
            let room = BOUNDS.string_bytes_max.min(BOUNDS.reply_bytes_max - *bytes);
            assert!(*announced > room as u64, "what fits is kept");
        }
        Reply::Array(inner) => {
            assert!(depth < BOUNDS.depth_max);
            *elements += inner.len();
            inner.iter().for_each(|element| measure(element, depth + 1, elements, bytes));
        }
        Reply::Integer(_) | Reply::Nil => {}
    }
}
