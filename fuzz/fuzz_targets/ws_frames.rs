//! WebSocket frames from a hostile peer: no panic, bounded memory, the same verdict however the bytes are cut.
//!
//! Input: one byte for the sizes of the pieces, one for the limits, then what the peer sends.
#![no_main]

use libfuzzer_sys::fuzz_target;
use restcast::codec::ws::{Decoder, FrameError, Incoming, Limits, Opcode, write_masked};

#[derive(Debug, Eq, PartialEq)]
struct Heard {
    /// Opcode and payload of each message; a close's code stands before its reason.
    messages: Vec<(Opcode, Vec<u8>)>,
    error: Option<FrameError>,
}

fn hear<'p>(pieces: impl Iterator<Item = &'p [u8]>, limits: Limits) -> Heard {
    let mut decoder = Decoder::new();
    let mut heard = Heard { messages: Vec::new(), error: None };
    for piece in pieces {
        let mut piece = piece.to_vec();
        let mut input = piece.as_mut_slice();
        loop {
            match decoder.next(&mut input, limits, None) {
                Ok(Some(incoming)) => heard.messages.push(match incoming {
                    Incoming::Text(text) => (Opcode::Text, text.as_bytes().to_vec()),
                    Incoming::Binary(bytes) => (Opcode::Binary, bytes.to_vec()),
                    Incoming::Ping(bytes) => (Opcode::Ping, bytes.to_vec()),
                    Incoming::Pong(bytes) => (Opcode::Pong, bytes.to_vec()),
                    Incoming::Close(None) => (Opcode::Close, Vec::new()),
                    Incoming::Close(Some((code, reason))) => {
                        (Opcode::Close, [&code.to_be_bytes(), reason.as_bytes()].concat())
                    }
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

fuzz_target!(|data: &[u8]| {
    let [sizes, limit, bytes @ ..] = data else { return };
    let limits = Limits { message_bytes_max: usize::from(*limit) * 16, fragments_max: u32::from(*limit % 8) + 1 };
    let whole = hear(std::iter::once(bytes), limits);
    let in_pieces = hear(bytes.chunks(usize::from(*sizes % 32) + 1), limits);
    assert_eq!(whole, in_pieces, "the verdict depends on how the bytes were cut");

    for (opcode, payload) in &whole.messages {
        let most = if matches!(opcode, Opcode::Text | Opcode::Binary) { limits.message_bytes_max } else { 125 };
        assert!(payload.len() <= most, "a message is over its limit");
    }
    // What was heard is heard again when it is said again.
    let mut said = Vec::new();
    for (opcode, payload) in &whole.messages {
        write_masked(&mut said, true, *opcode, payload, [*sizes, *limit, 7, 0xff]);
    }
    let again = hear(std::iter::once(said.as_slice()), limits);
    assert_eq!(again, Heard { error: None, ..whole });
});
