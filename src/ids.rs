//! Names of things: stream ids, sequence numbers, epochs, connection ids, core numbers, processes.
//!
//! Source: protocol version 1, sections 1 and 3. Invariants stand in the constructors.

use std::fmt;
use std::num::NonZeroU64;
use std::sync::Arc;

/// Longest stream id, in bytes.
pub const STREAM_ID_BYTES_MAX: usize = 128;

/// Id of a configured stream: 1 to 128 bytes of `[A-Za-z0-9._:~-]`. Cloning shares it.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct StreamId(Arc<str>);

impl StreamId {
    /// The id spelled `text`, or `None` where it is not one.
    pub fn new(text: &str) -> Option<StreamId> {
        let fits = (1..=STREAM_ID_BYTES_MAX).contains(&text.len());
        let is_id = |b: u8| b.is_ascii_alphanumeric() || b"._:~-".contains(&b);
        (fits && text.bytes().all(is_id)).then(|| StreamId(Arc::from(text)))
    }

    /// Its text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Place of an event in one sequence: 1 is the first, 0 stands before it. Not reused within an [`Epoch`].
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Seq(pub u64);

impl Seq {
    /// The place after this one.
    pub const fn next(self) -> Seq {
        Seq(self.0 + 1)
    }
}

impl fmt::Display for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// One life of a sequence. Random, so that no two lives share one; written in base 32, lower case.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Epoch(u64);

const BASE32: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

impl Epoch {
    /// The epoch of these random bits.
    pub const fn from_random(bits: u64) -> Epoch {
        Epoch(bits)
    }

    /// The epoch spelled `text`, or `None` where it is not one.
    pub fn parse(text: &str) -> Option<Epoch> {
        if text.len() != 13 {
            return None;
        }
        let mut bits: u128 = 0;
        for b in text.bytes() {
            let digit = BASE32.iter().position(|&d| d == b)?;
            bits = bits << 5 | digit as u128;
        }
        u64::try_from(bits).ok().map(Epoch)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = [0u8; 13];
        for (i, digit) in text.iter_mut().enumerate() {
            *digit = BASE32[((u128::from(self.0) >> (60 - 5 * i)) & 31) as usize];
        }
        f.write_str(std::str::from_utf8(&text).expect("base 32 digits are ASCII"))
    }
}

/// A place to resume from, `<epoch>-<seq>`: the last event a client has applied.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ResumePoint {
    /// The life of the sequence it was seen in.
    pub epoch: Epoch,
    /// The last event seen.
    pub seq: Seq,
}

impl ResumePoint {
    /// The point spelled `text`; `None` where it is malformed (a client then gets a snapshot, not an error).
    pub fn parse(text: &str) -> Option<ResumePoint> {
        let (epoch, seq) = text.split_once('-')?;
        if seq.is_empty() || seq.len() > 20 || !seq.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        Some(ResumePoint { epoch: Epoch::parse(epoch)?, seq: Seq(seq.parse().ok()?) })
    }
}

impl fmt::Display for ResumePoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.epoch, self.seq)
    }
}

/// Name of an ephemeral session: `s_` and 128 random bits in hex. It opens nothing: its token does.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct EphemeralId(pub u128);

impl EphemeralId {
    /// The id spelled `text`, or `None` where it is not one.
    pub fn parse(text: &str) -> Option<EphemeralId> {
        let hex = text.strip_prefix("s_")?;
        if hex.len() != 32 || !hex.bytes().all(is_lower_hex) {
            return None;
        }
        u128::from_str_radix(hex, 16).ok().map(EphemeralId)
    }
}

impl fmt::Display for EphemeralId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "s_{:032x}", self.0)
    }
}

/// Name of a live connection on the wire: `c_`, 128 random bits and its place, in hex. Whoever knows it was told it; the
/// place leads to the connection, whichever process holds it, without a map of ids.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct ConnectionId {
    /// What makes it unguessable.
    pub random: u128,
    /// The process it lives in.
    pub process: ProcessId,
    /// The core it lives on.
    pub core: CoreId,
    /// Its place in that core's table.
    pub index: u32,
}

impl ConnectionId {
    /// The id spelled `text`, or `None` where it is not one.
    pub fn parse(text: &str) -> Option<ConnectionId> {
        let hex = text.strip_prefix("c_")?;
        if hex.len() != 60 || !hex.bytes().all(is_lower_hex) {
            return None;
        }
        Some(ConnectionId {
            random: u128::from_str_radix(hex.get(..32)?, 16).ok()?,
            process: ProcessId::parse(hex.get(32..48)?)?,
            core: CoreId(u16::from_str_radix(hex.get(48..52)?, 16).ok()?),
            index: u32::from_str_radix(hex.get(52..)?, 16).ok()?,
        })
    }
}

impl fmt::Display for ConnectionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "c_{:032x}{}{:04x}{:08x}", self.random, self.process, self.core.0, self.index)
    }
}

fn is_lower_hex(b: u8) -> bool {
    b.is_ascii_digit() || (b'a'..=b'f').contains(&b)
}

/// One life of a process among those that share a Redis: random, in hex.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ProcessId(pub u64);

impl ProcessId {
    /// The process spelled `text`, or `None` where it is none.
    pub fn parse(text: &str) -> Option<ProcessId> {
        let spelled = text.len() == 16 && text.bytes().all(is_lower_hex);
        spelled.then(|| u64::from_str_radix(text, 16).ok()).flatten().map(ProcessId)
    }
}

impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Number of a core: 0 is the first.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct CoreId(pub u16);

/// Place of a connection in its core's table, and which of the connections that have stood there it is.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct ConnectionKey {
    /// The place.
    pub index: u32,
    /// Grows each time the place is taken again, so that a late event for an earlier holder is told apart.
    pub generation: u32,
}

/// Whom something is counted for, an address or a subject: a hash, so that neither is kept.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Holder(NonZeroU64);

impl Holder {
    /// The holder of that hash.
    pub fn from_hash(hash: u64) -> Holder {
        Holder(NonZeroU64::new(hash).unwrap_or(NonZeroU64::MIN))
    }

    /// The hash.
    pub fn bits(self) -> u64 {
        self.0.get()
    }
}

/// Who has a place for a filled-in stream.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Keeper {
    /// A subject.
    Subject(Holder),
    /// The client's address, where there is no subject.
    Address(Holder),
}

impl Keeper {
    /// Whom it is counted for.
    pub fn holder(self) -> Holder {
        match self {
            Keeper::Subject(holder) | Keeper::Address(holder) => holder,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stream_ids_have_1_to_128_of_their_characters() {
        assert!(StreamId::new("orders:eu-1.a_b~c").is_some());
        assert!(StreamId::new(&"a".repeat(128)).is_some());
        for bad in ["", "a/b", "a b", "é", "a?b", "a%20b"] {
            assert!(StreamId::new(bad).is_none(), "{bad:?}");
        }
        assert!(StreamId::new(&"a".repeat(129)).is_none());
    }

    #[test]
    fn resume_points_read_back_what_they_print() {
        for bits in [0, 1, 0xdead_beef, u64::MAX] {
            let point = ResumePoint { epoch: Epoch::from_random(bits), seq: Seq(41) };
            assert_eq!(ResumePoint::parse(&point.to_string()), Some(point));
        }
        for bad in [
            "",
            "-",
            "k3f9-41",
            "aaaaaaaaaaaaa-",
            "aaaaaaaaaaaaa-+1",
            "aaaaaaaaaaaaa-99999999999999999999999",
            "7777777777777-1",
        ] {
            assert_eq!(ResumePoint::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn connection_ids_read_back_what_they_print() {
        let id = ConnectionId { random: 7, process: ProcessId(u64::MAX - 1), core: CoreId(1), index: 9 };
        let text = id.to_string();
        assert_eq!(text, "c_00000000000000000000000000000007fffffffffffffffe000100000009");
        assert_eq!(ConnectionId::parse(&text), Some(id));
        let bad = [text.to_uppercase(), text.replace("c_", "c_0"), text.replace('7', "g"), text.replace('7', "+")];
        for bad in bad.iter().map(String::as_str).chain(["c_7", ""]) {
            assert_eq!(ConnectionId::parse(bad), None, "{bad}");
        }
        assert_eq!(ProcessId::parse("00000000000000ff"), Some(ProcessId(255)));
        for bad in ["ff", "00000000000000FF", "+0000000000000ff", "000000000000000ff"] {
            assert_eq!(ProcessId::parse(bad), None, "{bad}");
        }
    }
}
