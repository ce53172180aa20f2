//! Writing frames: deflated where their readers take them so, and counted.
//!
//! Source: the section on compression in ARCHITECTURE.md. Memory: the core's one deflater. Errors: none.
//! Not here: how a frame is spelled (`frame`), where it is kept (`rendition`).

use std::sync::Arc;

use crate::codec::deflate::Deflater;
use crate::codec::ws::Opcode;
use crate::frame::{self, Deflated, Encoding, EventFrame, Transport};
use crate::metrics::CoreMetrics;

/// What writes the frames of a core.
#[derive(Debug)]
pub struct Encoder {
    deflater: Deflater,
    metrics: Arc<CoreMetrics>,
}

impl Encoder {
    /// One that counts in `metrics`.
    pub fn new(metrics: Arc<CoreMetrics>) -> Encoder {
        Encoder { deflater: Deflater::default(), metrics }
    }

    /// Appends an event.
    pub fn event(&mut self, frame: &EventFrame<'_>, transport: Transport, out: &mut Vec<u8>) {
        let deflated = frame.write(transport, &mut self.deflater, out);
        self.count(deflated);
    }

    /// Appends a message of one connection.
    pub fn message(&mut self, opcode: Opcode, payload: &[u8], encoding: Encoding, out: &mut Vec<u8>) {
        let deflated = frame::write_message(out, opcode, &[payload], encoding, &mut self.deflater);
        self.count(deflated);
    }

    fn count(&self, deflated: Option<Deflated>) {
        let Some(Deflated { from, to }) = deflated else { return };
        self.metrics.deflated.count();
        self.metrics.deflated_from_bytes.add(from as u64);
        self.metrics.deflated_to_bytes.add(to as u64);
    }
}
