//! One change, encoded once per rendition: what every subscriber of a sequence in one format and transport receives.
//!
//! Source: protocol version 1, section 3; RFC 6455 section 5; RFC 7692; WHATWG HTML section 9.2.
//! Memory: appends to the caller's buffer, the value's bytes copied once. Errors: none.
//! Not here: where frames are kept (`shard::rendition`), control frames' texts (`codec::message`).

use std::fmt::Write as _;

use crate::codec::deflate::{Deflater, Window};
use crate::codec::message::Format;
use crate::codec::proof::{Signer, ValueHash};
use crate::codec::{sse, ws};
use crate::ids::{Epoch, Seq};
use crate::time::WallTime;

/// What a frame travels in.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Transport {
    /// One WebSocket text message a frame.
    WebSocket(Encoding),
    /// One server-sent event a frame.
    Sse,
}

/// How WebSocket messages are encoded. A client that takes deflated ones takes plain ones too, and gets them where
/// deflating gains nothing.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Encoding {
    /// As they are.
    Plain,
    /// By permessage-deflate, within this window.
    Deflated(Window),
}

/// How the frames of a sequence are written for some of its subscribers.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct RenditionKind {
    /// What they travel in.
    pub transport: Transport,
    /// What they hold.
    pub format: Format,
}

/// The transports, in the order of their renditions' numbers.
const TRANSPORTS: [Transport; 2 + Window::COUNT] = [
    Transport::WebSocket(Encoding::Plain),
    Transport::Sse,
    Transport::WebSocket(Encoding::Deflated(Window::Bits9)),
    Transport::WebSocket(Encoding::Deflated(Window::Bits12)),
    Transport::WebSocket(Encoding::Deflated(Window::Bits15)),
];
/// The formats, in that order.
const FORMATS: [Format; 3] = [Format::Patch, Format::Merge, Format::Full];

impl RenditionKind {
    /// How many kinds there are.
    pub const COUNT: usize = TRANSPORTS.len() * FORMATS.len();

    /// A number below [`RenditionKind::COUNT`], one for each kind.
    pub fn index(self) -> usize {
        let transport = match self.transport {
            Transport::WebSocket(Encoding::Plain) => 0,
            Transport::Sse => 1,
            Transport::WebSocket(Encoding::Deflated(window)) => 2 + window.index(),
        };
        let format = match self.format {
            Format::Patch => 0,
            Format::Merge => 1,
            Format::Full => 2,
        };
        transport * FORMATS.len() + format
    }

    /// The same number, as it is kept.
    pub fn number(self) -> u8 {
        const { assert!(RenditionKind::COUNT <= 256, "a kind's number is kept in a byte") };
        u8::try_from(self.index()).expect("a kind's number fits a byte")
    }

    /// The kind of that number.
    pub fn from_index(index: usize) -> RenditionKind {
        let transport = TRANSPORTS[index / FORMATS.len()];
        RenditionKind { transport, format: FORMATS[index % FORMATS.len()] }
    }
}

/// What deflating a frame has come to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Deflated {
    /// Bytes of its text.
    pub from: usize,
    /// Bytes of its payload.
    pub to: usize,
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
    /// The hash of the value as of it, where it is told.
    pub hash: Option<&'a ValueHash>,
    /// Who signs it, and as which sequence's.
    pub signed: Option<Signed<'a>>,
}

/// What signs an event.
#[derive(Clone, Copy, Debug)]
pub struct Signed<'a> {
    /// The key.
    pub signer: &'a Signer,
    /// [`Signer::scope`] of the sequence.
    pub scope: &'a str,
}

impl EventFrame<'_> {
    /// Appends the frame, whole, for `transport`. What deflating it has come to, where it was deflated.
    pub fn write(&self, transport: Transport, deflater: &mut Deflater, out: &mut Vec<u8>) -> Option<Deflated> {
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
        let proved = (self.hash.is_some() || self.signed.is_some()).then(|| self.proof(&head, body));
        let end = proved.as_ref().map_or(&b"}"[..], |proved| proved.as_bytes());
        match transport {
            Transport::WebSocket(encoding) => {
                return write_message(out, ws::Opcode::Text, &[head.as_bytes(), body, end], encoding, deflater);
            }
            Transport::Sse => {
                let id = format!("{}-{}", self.epoch, self.seq);
                // The value is minified: it has no line break that would end the field.
                for part in ["event: ", kind, "\nid: ", &id, "\ndata: ", &head] {
                    out.extend_from_slice(part.as_bytes());
                }
                out.extend_from_slice(body);
                out.extend_from_slice(end);
                out.extend_from_slice(b"\n\n");
            }
        }
        None
    }

    /// What stands behind the body of a frame that proves something: the value's hash, whose it is, the key's name, and, as the
    /// last member, the signature of all the text before it.
    fn proof(&self, head: &str, body: &[u8]) -> String {
        let mut end = String::with_capacity(320);
        if let Some(hash) = self.hash {
            let _ = write!(end, ",\"hash\":\"{hash}\"");
        }
        if let Some(Signed { signer, scope }) = self.signed {
            let _ = write!(end, ",\"scope\":\"{scope}\",\"kid\":\"{}\"", signer.key_id());
            let signature = signer.sign(&[head.as_bytes(), body, end.as_bytes()]);
            let _ = write!(end, ",\"sig\":\"{signature}\"");
        }
        end.push('}');
        end
    }
}

/// Appends a WebSocket message of `pieces`. What deflating it has come to, where it was deflated.
pub fn write_message(
    out: &mut Vec<u8>,
    opcode: ws::Opcode,
    pieces: &[&[u8]],
    encoding: Encoding,
    deflater: &mut Deflater,
) -> Option<Deflated> {
    match encoding {
        Encoding::Plain => {
            ws::write_pieces(out, opcode, pieces);
            None
        }
        Encoding::Deflated(window) => {
            let to = ws::write_deflated(out, opcode, pieces, deflater, window)?;
            Some(Deflated { from: pieces.iter().map(|piece| piece.len()).sum(), to })
        }
    }
}

/// Appends a control frame: the JSON object `text`, whose `type` is `kind`. It is small, and never deflated.
pub fn write_control(transport: Transport, kind: &str, text: &[u8], out: &mut Vec<u8>) {
    match transport {
        Transport::WebSocket(_) => ws::write_text(out, text),
        Transport::Sse => sse::write_event(out, kind, None, text),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use ring::hmac;

    use super::*;
    use crate::codec::json::Document;
    use crate::secret::Secret;

    const SECRET: &[u8] = b"a secret that signs, of thirty-two bytes or more";

    /// Whether a frame's `sig` signs all the text before it, as a consumer finds out who has the text and the secret alone.
    fn verifies(text: &[u8]) -> bool {
        let mark = b",\"sig\":\"";
        let Some(at) = text.windows(mark.len()).rposition(|part| part == mark) else { return false };
        let (before, rest) = text.split_at(at);
        let Some(hex) = rest[mark.len()..].strip_suffix(b"\"}") else { return false };
        let pairs = hex.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok());
        let Some(tag) = pairs.collect::<Option<Vec<u8>>>() else { return false };
        hmac::verify(&hmac::Key::new(hmac::HMAC_SHA256, SECRET), before, &tag).is_ok()
    }

    proptest! {
        // In each transport the same text is signed, and one byte of it more or another is no longer what was signed.
        #[test]
        fn what_is_signed_verifies_and_what_is_changed_does_not(
            value in "[a-z0-9 ,:{}\\[\\]é😀]{0,40}",
            sig_in_it in any::<bool>(),
            kind in 0usize..3,
            hashed in any::<bool>(),
            seq in 1u64..1_000_000,
            place in any::<prop::sample::Index>(),
            bit in 0u8..7,
        ) {
            let sig = if sig_in_it { ",\"sig\":\"" } else { "" };
            let text = serde_json::json!([format!("{value}{sig}"), 1.0, { "sig": "x" }]).to_string();
            let hash = hashed.then(|| ValueHash::of(&Document::parse(text.as_bytes()).expect("JSON")));
            let signer = Signer::new("k1", Secret::new(SECRET)).expect("a key");
            let body = [Body::Snapshot(text.as_bytes()), Body::Patch(text.as_bytes()), Body::Merge(text.as_bytes())][kind];
            let (name, epoch, ts) = ("leads?region=eu", Epoch::from_random(seq), WallTime::from_secs(1_800_000_000));
            let (hash, signed) = (hash.as_ref(), Some(Signed { signer: &signer, scope: "5c09e" }));
            let frame = EventFrame { name, epoch, seq: Seq(seq), ts, body, hash, signed };
            let (mut event, mut message) = (Vec::new(), Vec::new());
            frame.write(Transport::Sse, &mut Deflater::default(), &mut event);
            frame.write(Transport::WebSocket(Encoding::Plain), &mut Deflater::default(), &mut message);
            let mark = b"\ndata: ";
            let at = event.windows(mark.len()).position(|part| part == mark).expect("data") + mark.len();
            let text = event[at..].strip_suffix(b"\n\n").expect("its end");
            prop_assert!(message.ends_with(text), "the same text over both");
            prop_assert!(verifies(text), "{}", String::from_utf8_lossy(text));
            let mut changed = text.to_vec();
            let place = place.index(changed.len());
            changed[place] ^= 1 << bit;
            // A digit of the signature may be written in capitals.
            let same = changed.eq_ignore_ascii_case(text) && place + 64 + "\"}".len() >= text.len();
            prop_assert!(same || !verifies(&changed), "{}", String::from_utf8_lossy(&changed));
        }
    }

    #[test]
    fn every_kind_has_its_number() {
        for index in 0..RenditionKind::COUNT {
            assert_eq!(RenditionKind::from_index(index).index(), index);
            assert_eq!(usize::from(RenditionKind::from_index(index).number()), index);
        }
    }
}
