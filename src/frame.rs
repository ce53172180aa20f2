//! One change, encoded once per rendition: what every subscriber of a sequence in one format and transport receives.
//!
//! Source: protocol version 1, section 3; RFC 6455 section 5; WHATWG HTML section 9.2.
//! Memory: appends to the caller's buffer, the value's bytes copied once. Errors: none.
//! Not here: where frames are kept (`shard::rendition`), control frames' texts (`codec::message`).

use std::fmt::Write as _;

use crate::codec::message::Format;
use crate::codec::{sse, ws};
use crate::ids::{Epoch, Seq};
use crate::time::WallTime;

/// What a frame travels in.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Transport {
    /// One WebSocket text message a frame.
    WebSocket,
    /// One server-sent event a frame.
    Sse,
}

/// How the frames of a sequence are written for some of its subscribers.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct RenditionKind {
    /// What they travel in.
    pub transport: Transport,
    /// What they hold.
    pub format: Format,
}

impl RenditionKind {
    /// How many kinds there are.
    pub const COUNT: usize = 6;

    /// A number below [`RenditionKind::COUNT`], one for each kind.
    pub fn index(self) -> usize {
        let format = match self.format {
            Format::Patch => 0,
            Format::Merge => 1,
            Format::Full => 2,
        };
        match self.transport {
            Transport::WebSocket => format,
            Transport::Sse => 3 + format,
        }
    }

    /// The kind of that number.
    pub fn from_index(index: usize) -> RenditionKind {
        let transport = if index < 3 { Transport::WebSocket } else { Transport::Sse };
        let format = [Format::Patch, Format::Merge, Format::Full][index % 3];
        RenditionKind { transport, format }
    }
}

/// What an event brings.
#[derive(Clone, Copy, Debug)]
pub enum Body<'a> {
    /// The whole value.
    Snapshot(&'a [u8]),
    /// An RFC 6902 patch from the value before.
    Patch(&'a [u8]),
    /// An RFC 7396 merge patch from the value before.
    Merge(&'a [u8]),
}

/// One event of a sequence, to be written.
#[derive(Clone, Copy, Debug)]
pub struct EventFrame<'a> {
    /// The stream's name in frames.
    pub name: &'a str,
    /// The life of the sequence.
    pub epoch: Epoch,
    /// The event's place.
    pub seq: Seq,
    /// When the response that brought it was received.
    pub ts: WallTime,
    /// What it brings.
    pub body: Body<'a>,
}

impl EventFrame<'_> {
    /// Appends the frame, whole, for `transport`.
    pub fn write(&self, transport: Transport, out: &mut Vec<u8>) {
        let (kind, body) = match self.body {
            Body::Snapshot(body) => ("snapshot", body),
            Body::Patch(body) => ("patch", body),
            Body::Merge(body) => ("merge", body),
        };
        let mut head = String::with_capacity(128 + self.name.len());
        // Stream names hold no character that JSON escapes: see `StreamId` and `stream::template::stream_name`.
        let _ = write!(
            head,
            "{{\"type\":\"{kind}\",\"stream\":\"{}\",\"epoch\":\"{}\",\"seq\":{}",
            self.name, self.epoch, self.seq
        );
        if let Body::Patch(_) | Body::Merge(_) = self.body {
            let _ = write!(head, ",\"base\":{}", self.seq.0 - 1);
        }
        let member = if kind == "snapshot" { "data" } else { kind };
        let _ = write!(head, ",\"ts\":{},\"{member}\":", self.ts);
        match transport {
            Transport::WebSocket => {
                ws::frame_header(out, ws::Opcode::Text, head.len() + body.len() + 1);
                out.extend_from_slice(head.as_bytes());
                out.extend_from_slice(body);
                out.push(b'}');
            }
            Transport::Sse => {
                let id = format!("{}-{}", self.epoch, self.seq);
                // The value is minified: it has no line break that would end the field.
                for part in ["event: ", kind, "\nid: ", &id, "\ndata: ", &head] {
                    out.extend_from_slice(part.as_bytes());
                }
                out.extend_from_slice(body);
                out.extend_from_slice(b"}\n\n");
            }
        }
    }
}

/// Appends a control frame: the JSON object `text`, whose `type` is `kind`.
pub fn write_control(transport: Transport, kind: &str, text: &[u8], out: &mut Vec<u8>) {
    match transport {
        Transport::WebSocket => ws::write_text(out, text),
        Transport::Sse => sse::write_event(out, kind, None, text),
    }
}
