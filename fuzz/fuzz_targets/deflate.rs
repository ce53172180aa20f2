//! permessage-deflate: what is agreed on is what was offered, messages survive both ways, and a hostile peer's compressed
//! frames get the same verdict however the bytes are cut, within their limit.
//!
//! Input: one byte for the sizes of the pieces, one for the limits; an extension header up to a line feed; then bytes that
//! are deflated, inflated, and taken for what the peer sends.
#![no_main]

use std::io::Read;

use libfuzzer_sys::fuzz_target;
use restcast::codec::deflate::{Deflater, Inflater, Window, negotiate};
use restcast::codec::http::extension_pieces;
use restcast::codec::ws::{Decoder, FrameError, Incoming, Limits, Opcode, write_masked, write_masked_deflated};

#[derive(Debug, Eq, PartialEq)]
struct Heard {
    messages: Vec<(Opcode, Vec<u8>)>,
    error: Option<FrameError>,
}

fn hear<'p>(pieces: impl Iterator<Item = &'p [u8]>, limits: Limits, inflater: &mut Inflater) -> Heard {
    let mut decoder = Decoder::new();
    let mut heard = Heard { messages: Vec::new(), error: None };
    for piece in pieces {
        let mut piece = piece.to_vec();
        let mut input = piece.as_mut_slice();
        loop {
            match decoder.next(&mut input, limits, Some(&mut *inflater)) {
                Ok(Some(incoming)) => heard.messages.push(match incoming {
                    Incoming::Text(text) => (Opcode::Text, text.as_bytes().to_vec()),
                    Incoming::Binary(bytes) => (Opcode::Binary, bytes.to_vec()),
                    Incoming::Ping(bytes) => (Opcode::Ping, bytes.to_vec()),
                    Incoming::Pong(bytes) => (Opcode::Pong, bytes.to_vec()),
                    Incoming::Close(_) => (Opcode::Close, Vec::new()),
                }),
                Ok(None) => break,
                Err(error) => {
                    assert!(decoder.is_idle(), "an error frees what was begun");
                    heard.error = Some(error);
                    return heard;
                }
            }
        }
        assert!(input.is_empty(), "all of the input is read before None");
    }
    heard
}

fn agree(field: &str) {
    let Some(agreed) = negotiate(field) else { return };
    assert!(extension_pieces(field).next().is_some(), "nothing was offered");
    // The answer is an offer that would be taken just so.
    let answer = agreed.answer();
    assert!(extension_pieces(&answer).all(|piece| piece.is_ok()), "{answer}");
    assert_eq!(negotiate(&answer), Some(agreed), "{answer}");
}

fn there_and_back(message: &[u8], piece: usize, inflater: &mut Inflater) {
    let mut deflater = Deflater::default();
    let pieces: Vec<&[u8]> = message.chunks(piece).collect();
    for window in Window::ALL {
        let Some(deflated) = deflater.deflate(window, &pieces) else { continue };
        assert!(deflated.len() < message.len(), "deflated to more");
        assert!(inflater.inflate(deflated, message.len()) == Ok(message), "another message comes back");
        assert!(inflater.inflate(deflated, message.len() - 1).is_err(), "over its limit");
    }
}

fn inflate(payload: &[u8], bytes_max: usize, inflater: &mut Inflater) {
    let Ok(message) = inflater.inflate(payload, bytes_max) else { return };
    assert!(message.len() <= bytes_max, "a message is over its limit");
    // Another's loop over the first of its streams finds the same bytes.
    let whole = [payload, &[0x00, 0x00, 0xff, 0xff, 0x01, 0x00, 0x00, 0xff, 0xff]].concat();
    let mut first = Vec::new();
    if flate2::read::DeflateDecoder::new(&whole[..]).take(bytes_max as u64).read_to_end(&mut first).is_ok() {
        assert!(message.starts_with(&first), "another message is found");
    }
}

fuzz_target!(|data: &[u8]| {
    let [sizes, limit, rest @ ..] = data else { return };
    let at = rest.iter().position(|&byte| byte == b'\n').unwrap_or(rest.len());
    let (field, bytes) = (&rest[..at], rest.get(at + 1..).unwrap_or_default());
    if let Ok(field) = std::str::from_utf8(field) {
        agree(field);
    }
    let piece = usize::from(*sizes % 32) + 1;
    let limits = Limits { message_bytes_max: usize::from(*limit) * 16, fragments_max: u32::from(*limit % 8) + 1 };
    let mut inflater = Inflater::default();
    there_and_back(bytes, piece, &mut inflater);
    inflate(bytes, limits.message_bytes_max, &mut inflater);

    // As frames of a peer's, and as the payload of one.
    let mut wrapped = Vec::new();
    let (front, back) = bytes.split_at(bytes.len() / 2);
    write_masked_deflated(&mut wrapped, false, Opcode::Binary, front, [*sizes, *limit, 7, 0xff]);
    write_masked(&mut wrapped, true, Opcode::Ping, b"between", [0; 4]);
    write_masked(&mut wrapped, true, Opcode::Continuation, back, [*limit, 3, 0xff, *sizes]);
    for sent in [bytes, &wrapped] {
        let whole = hear(std::iter::once(sent), limits, &mut inflater);
        assert_eq!(
            whole,
            hear(sent.chunks(piece), limits, &mut inflater),
            "the verdict depends on how the bytes were cut"
        );
        for (opcode, payload) in &whole.messages {
            let most = if matches!(opcode, Opcode::Text | Opcode::Binary) { limits.message_bytes_max } else { 125 };
            assert!(payload.len() <= most, "a message is over its limit");
        }
    }
});
