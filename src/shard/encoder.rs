//! Writing frames: deflated where their readers take them so, and counted.
//!
//! Source: the section on compression in ARCHITECTURE.md. Memory: the core's one deflater, and for each window the last
//! snapshot that was deflated, at most `DEFLATE_BYTES_MAX`. Errors: none.
//! Not here: how a frame is spelled (`frame`), where it is kept (`rendition`).

use std::sync::Arc;

use crate::codec::deflate::{Deflater, Window};
use crate::codec::ws::Opcode;
use crate::frame::{self, Body, Deflated, Encoding, EventFrame, Transport};
use crate::ids::{Epoch, Seq};
use crate::metrics::CoreMetrics;

/// What writes the frames of a core.
#[derive(Debug)]
pub struct Encoder {
    deflater: Deflater,
    /// The last snapshot deflated within each window: one event may go out as the same snapshot in every format, to those
    /// who get it live and to those who come or come back.
    snapshots: [Option<Snapshot>; Window::COUNT],
    metrics: Arc<CoreMetrics>,
}

/// A snapshot as it was written. No two sequences have one epoch, so its place tells it from all others.
#[derive(Debug)]
struct Snapshot {
    epoch: Epoch,
    seq: Seq,
    frame: Vec<u8>,
}

impl Encoder {
    /// One that counts in `metrics`.
    pub fn new(metrics: Arc<CoreMetrics>) -> Encoder {
        Encoder { deflater: Deflater::default(), snapshots: Default::default(), metrics }
    }

    /// Appends an event.
    pub fn event(&mut self, frame: &EventFrame<'_>, transport: Transport, out: &mut Vec<u8>) {
        let (Transport::WebSocket(Encoding::Deflated(window)), Body::Snapshot(_)) = (transport, frame.body) else {
            let deflated = frame.write(transport, &mut self.deflater, out);
            return self.count(deflated);
        };
        let Some(last) = self.snapshots.get_mut(window.index()) else { return };
        if let Some(last) = last.as_ref().filter(|last| (last.epoch, last.seq) == (frame.epoch, frame.seq)) {
            return out.extend_from_slice(&last.frame);
        }
        let start = out.len();
        let deflated = frame.write(transport, &mut self.deflater, out);
        if deflated.is_some() {
            let written = out.get(start..).unwrap_or_default().to_vec();
            *last = Some(Snapshot { epoch: frame.epoch, seq: frame.seq, frame: written });
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::WallTime;

    fn snapshot(epoch: u64, seq: u64, value: &[u8]) -> EventFrame<'_> {
        let (epoch, seq) = (Epoch::from_random(epoch), Seq(seq));
        let (body, ts) = (Body::Snapshot(value), WallTime::from_secs(1));
        EventFrame { name: "leads", epoch, seq, ts, body, hash: None, signed: None }
    }

    #[test]
    fn a_snapshot_is_deflated_once_for_all_formats_and_comers() {
        let mut encoder = Encoder::new(Arc::new(CoreMetrics::default()));
        let (one, two) = (b"[1,1,1,1]".repeat(30), b"[2,2,2,2]".repeat(30));
        let mut write = |frame: &EventFrame<'_>, window| {
            let mut out = b"before".to_vec();
            encoder.event(frame, Transport::WebSocket(Encoding::Deflated(window)), &mut out);
            (out.split_off(6), encoder.metrics.deflated.value())
        };
        let (first, count) = write(&snapshot(1, 1, &one), Window::Bits15);
        assert_eq!(count, 1);
        assert_eq!(write(&snapshot(1, 1, &one), Window::Bits15), (first.clone(), 1));
        // Another window, another event and another sequence are others.
        assert_eq!(write(&snapshot(1, 1, &one), Window::Bits9).1, 2);
        assert_eq!(write(&snapshot(1, 1, &one), Window::Bits15), (first.clone(), 2));
        let (second, count) = write(&snapshot(1, 2, &two), Window::Bits15);
        assert!(second != first && count == 3);
        assert_eq!(write(&snapshot(2, 2, &one), Window::Bits15).1, 4);
        assert_eq!(write(&snapshot(1, 1, &one), Window::Bits15), (first, 5));
    }
}
