//! permessage-deflate: what is agreed with a client, messages made smaller, and messages made whole again.
//!
//! Source: RFC 7692; RFC 1951 by `flate2`. No context is ever taken over, in either direction: each message is deflated by
//! itself, so that one [`Deflater`] and one [`Inflater`] serve all connections of a core, and a frame for many is deflated
//! once. It also means that no message can be guessed from the size of another.
//! Memory: none for a connection. A deflater has up to [`Window::COUNT`] compressors of about 300 KiB, made when first
//! needed; an inflater has 48 KiB; each keeps a buffer of at most `DEFLATE_SCRATCH_BYTES_MAX` between messages.
//! Errors: [`InflateError`], the peer's fault.
//! Not here: the header's grammar (`codec::http`), RSV1 and fragments (`codec::ws`), which frames are shared (`frame`).

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::http::{ExtensionPiece, extension_pieces};
use crate::limits::{DEFLATE_BYTES_MAX, DEFLATE_BYTES_MIN, DEFLATE_SCRATCH_BYTES_MAX, INFLATE_STREAMS_MAX};

/// The extension's name (RFC 7692 section 7).
const NAME: &str = "permessage-deflate";
/// Of zlib's levels the one with the best return on JSON: 1 leaves four tenths more bytes at half the time, 6 one seventh
/// fewer at three times (8 KiB to 1 MiB of rows).
const LEVEL: u32 = 2;
/// What a flush ends with, and a message leaves out (RFC 7692 section 7.2.1).
const FLUSH_TAIL: [u8; 4] = [0x00, 0x00, 0xff, 0xff];
/// What is put behind a message to inflate it: the tail it left out (RFC 7692 section 7.2.2), and an empty final block, which
/// only a message that ends where a block does can be followed by.
const END: [u8; 9] = [0x00, 0x00, 0xff, 0xff, 0x01, 0x00, 0x00, 0xff, 0xff];
/// Bytes inflated at a time.
const STEP_BYTES: usize = 16 << 10;

/// How far back a deflated message may refer. A client may ask for any size from 2^9 to 2^15 bytes; it gets the largest of
/// these that is not over it, so that what is shared stays shared.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Window {
    /// 512 bytes.
    Bits9,
    /// 4 KiB.
    Bits12,
    /// 32 KiB: what nearly all clients take.
    Bits15,
}

impl Window {
    /// How many there are.
    pub const COUNT: usize = 3;
    /// Each of them, in the order of their numbers.
    pub const ALL: [Window; Window::COUNT] = [Window::Bits9, Window::Bits12, Window::Bits15];

    /// Its size, as a power of two.
    pub const fn bits(self) -> u8 {
        match self {
            Window::Bits9 => 9,
            Window::Bits12 => 12,
            Window::Bits15 => 15,
        }
    }

    /// The largest of at most `bits`; `None` under 9.
    fn within(bits: u8) -> Option<Window> {
        Window::ALL.into_iter().rev().find(|window| window.bits() <= bits)
    }

    /// Bytes of the largest message that is deflated within it.
    const fn bytes_max(self) -> usize {
        match self {
            // Where so little is looked back on, so little is found that it takes three times as long.
            Window::Bits9 => DEFLATE_BYTES_MAX / 4,
            Window::Bits12 | Window::Bits15 => DEFLATE_BYTES_MAX,
        }
    }

    /// Its number, below [`Window::COUNT`].
    pub const fn index(self) -> usize {
        self as usize
    }
}

/// What client and server have agreed on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Agreement {
    /// What our messages are deflated with.
    pub window: Window,
    /// What the client asked for, to be repeated to it.
    server_max_window_bits: Option<u8>,
}

impl Agreement {
    /// The value of our `Sec-WebSocket-Extensions`.
    ///
    /// RFC 7692 sections 7.1.1.1 and 7.1.1.2 let a server say of both sides that they take nothing over, whether or not the
    /// client has spoken of it. Of the client's window nothing is said: any is read.
    pub fn answer(self) -> String {
        let mut answer = format!("{NAME}; server_no_context_takeover; client_no_context_takeover");
        if let Some(bits) = self.server_max_window_bits {
            answer.push_str(&format!("; server_max_window_bits={bits}"));
        }
        answer
    }
}

/// The first acceptable offer of a well-formed `Sec-WebSocket-Extensions`, if there is one. An offer with an unknown or
/// repeated parameter or a bad value is declined (RFC 7692 section 7.1), and the next is looked at.
pub fn negotiate(extensions: &str) -> Option<Agreement> {
    let mut offer = None;
    for piece in extension_pieces(extensions) {
        match piece.ok()? {
            ExtensionPiece::Extension(name) => {
                if let Some(offer) = offer {
                    return Some(Offer::accept(offer));
                }
                offer = (name == NAME).then(Offer::default);
            }
            ExtensionPiece::Param(name, value) => {
                offer = offer.and_then(|offer: Offer| offer.with(name, value.as_deref()));
            }
        }
    }
    offer.map(Offer::accept)
}

/// The parameters of an offer that has not been declined.
#[derive(Clone, Copy, Debug, Default)]
struct Offer {
    server_no_context_takeover: bool,
    client_no_context_takeover: bool,
    server_max_window_bits: Option<u8>,
    client_max_window_bits: bool,
}

impl Offer {
    /// The offer with one more parameter; `None`: declined.
    fn with(mut self, name: &str, value: Option<&str>) -> Option<Offer> {
        let once = |seen: &mut bool| !std::mem::replace(seen, true);
        let fine = match (name, value) {
            ("server_no_context_takeover", None) => once(&mut self.server_no_context_takeover),
            ("client_no_context_takeover", None) => once(&mut self.client_no_context_takeover),
            // RFC 7692 7.1.2.2: a hint, with or without a value. Whatever window the client uses is read.
            ("client_max_window_bits", None) => once(&mut self.client_max_window_bits),
            ("client_max_window_bits", Some(value)) => {
                window_bits(value).is_some() && once(&mut self.client_max_window_bits)
            }
            // RFC 7692 7.1.2.1 knows 8, too; zlib makes no raw stream that keeps to 256 bytes.
            ("server_max_window_bits", Some(value)) => {
                let bits = window_bits(value).filter(|&bits| Window::within(bits).is_some());
                bits.is_some() && self.server_max_window_bits.replace(bits?).is_none()
            }
            _ => false,
        };
        fine.then_some(self)
    }

    fn accept(self) -> Agreement {
        let asked = self.server_max_window_bits;
        let window = asked.and_then(Window::within).unwrap_or(Window::Bits15);
        Agreement { window, server_max_window_bits: asked }
    }
}

/// RFC 7692 7.1.2.1: a decimal number from 8 to 15 without leading zeros.
fn window_bits(value: &str) -> Option<u8> {
    match value {
        "8" => Some(8),
        "9" => Some(9),
        "10" => Some(10),
        "11" => Some(11),
        "12" => Some(12),
        "13" => Some(13),
        "14" => Some(14),
        "15" => Some(15),
        _ => None,
    }
}

/// Makes messages smaller: one for a core.
#[derive(Debug, Default)]
pub struct Deflater {
    compressors: [Option<Box<Compress>>; Window::COUNT],
    out: Vec<u8>,
}

impl Deflater {
    /// The payload of a deflated message of `pieces`, or `None` where they are better sent as they are: too small to gain,
    /// too large to be deflated between sends, or not made smaller. The same pieces always give the same bytes.
    pub fn deflate(&mut self, window: Window, pieces: &[&[u8]]) -> Option<&[u8]> {
        self.out.clear();
        self.out.shrink_to(DEFLATE_SCRATCH_BYTES_MAX);
        let total = pieces.iter().map(|piece| piece.len()).sum::<usize>();
        if !(DEFLATE_BYTES_MIN..=window.bytes_max()).contains(&total) {
            return None;
        }
        let compressor = self.compressors.get_mut(window.index())?.get_or_insert_with(|| {
            Box::new(Compress::new_with_window_bits(Compression::new(LEVEL), false, window.bits()))
        });
        compressor.reset();
        // What would not fit is not smaller. One byte stays free, or the flush is not over.
        self.out.reserve(total + FLUSH_TAIL.len());
        for (at, piece) in pieces.iter().enumerate() {
            let flush = if at + 1 == pieces.len() { FlushCompress::Sync } else { FlushCompress::None };
            let before = compressor.total_in();
            compressor.compress_vec(piece, &mut self.out, flush).ok()?;
            if compressor.total_in() - before != piece.len() as u64 || self.out.len() == self.out.capacity() {
                return None;
            }
        }
        self.out.strip_suffix(&FLUSH_TAIL).filter(|deflated| deflated.len() < total)
    }
}

/// Why a message could not be inflated.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum InflateError {
    /// It is not deflated, or not to its end.
    Corrupt,
    /// It is larger than it may be: inflating it has stopped there.
    TooLarge,
}

/// Makes messages whole: one for a core. It is given whole messages only, whose compressed bytes each connection gathers
/// for itself: a message that comes in pieces, between others', needs no inflater of its own, and what a connection holds
/// meanwhile is no more than it has sent.
#[derive(Debug, Default)]
pub struct Inflater {
    stream: Option<Box<Decompress>>,
    out: Vec<u8>,
}

/// Where a piece of deflated data has left the inflater.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Fed {
    /// More may follow.
    Open,
    /// At the end of a stream, with nothing behind it.
    Ended,
}

impl Inflater {
    /// The message whose payload is `deflated`, of at most `bytes_max` bytes.
    ///
    /// # Errors
    /// [`InflateError`]; the bytes over the limit are not inflated.
    pub fn inflate(&mut self, deflated: &[u8], bytes_max: usize) -> Result<&[u8], InflateError> {
        self.forget();
        // Some senders leave out even the one byte that RFC 7692 7.2.3.6 has for an empty message.
        if deflated.is_empty() {
            return Ok(&[]);
        }
        match &mut self.stream {
            Some(stream) => stream.reset(false),
            stream => *stream = Some(Box::new(Decompress::new(false))),
        }
        let mut streams = 1;
        // RFC 7692 7.2.3.4: a sender may end its blocks by a final one; then nothing need be put behind them.
        if self.feed(deflated, bytes_max, &mut streams)? == Fed::Open
            && self.feed(&END, bytes_max, &mut streams)? == Fed::Open
        {
            return Err(InflateError::Corrupt);
        }
        Ok(&self.out)
    }

    /// Lets go of the last message.
    pub fn forget(&mut self) {
        self.out.clear();
        self.out.shrink_to(DEFLATE_SCRATCH_BYTES_MAX);
    }

    fn feed(&mut self, mut data: &[u8], bytes_max: usize, streams: &mut usize) -> Result<Fed, InflateError> {
        let Some(stream) = &mut self.stream else { return Err(InflateError::Corrupt) };
        loop {
            // One byte more than allowed is asked for, which tells a message of just the limit from a larger one.
            let len = self.out.len();
            let room = (bytes_max - len).saturating_add(1).min(STEP_BYTES);
            self.out.resize(len + room, 0);
            let (read_before, written_before) = (stream.total_in(), stream.total_out());
            let space = self.out.get_mut(len..).unwrap_or_default();
            let status = stream.decompress(data, space, FlushDecompress::None);
            let advanced = |now: u64, before: u64| usize::try_from(now - before).unwrap_or(0);
            let read = advanced(stream.total_in(), read_before);
            let written = advanced(stream.total_out(), written_before);
            self.out.truncate(len + written);
            data = data.get(read..).unwrap_or_default();
            if self.out.len() > bytes_max {
                return Err(InflateError::TooLarge);
            }
            match status {
                Ok(Status::StreamEnd) if data.is_empty() => return Ok(Fed::Ended),
                Ok(Status::StreamEnd) => {
                    if *streams == INFLATE_STREAMS_MAX {
                        return Err(InflateError::Corrupt);
                    }
                    *streams += 1;
                    stream.reset(false);
                }
                Ok(Status::Ok | Status::BufError) if data.is_empty() && written < room => return Ok(Fed::Open),
                Ok(Status::Ok | Status::BufError) if read > 0 || written > 0 => {}
                Ok(Status::Ok | Status::BufError) | Err(_) => return Err(InflateError::Corrupt),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMIT: usize = 4 << 20;

    /// What is agreed on, as it is answered; `-` for nothing.
    fn answer(offers: &str) -> String {
        negotiate(offers).map_or("-".into(), |agreed| agreed.answer())
    }

    /// The same, less what every answer has.
    fn agreed(offers: &str) -> String {
        let answer = answer(offers);
        let always = "permessage-deflate; server_no_context_takeover; client_no_context_takeover";
        answer.strip_prefix(always).map(str::to_owned).unwrap_or(answer)
    }

    #[test]
    fn nothing_is_taken_over_whether_or_not_it_was_asked_for() {
        let always = "permessage-deflate; server_no_context_takeover; client_no_context_takeover";
        for offer in [
            "permessage-deflate",
            "permessage-deflate; client_max_window_bits",
            "permessage-deflate; client_max_window_bits=8",
            "permessage-deflate; client_max_window_bits=\"15\"",
            "permessage-deflate; server_no_context_takeover",
            "permessage-deflate; client_no_context_takeover; server_no_context_takeover",
            " permessage-deflate ;\tclient_max_window_bits = 10 , other",
            "x-webkit-deflate-frame, permessage-deflate",
        ] {
            assert_eq!(answer(offer), always, "{offer}");
        }
    }

    #[test]
    fn the_window_asked_for_is_kept_to_and_repeated() {
        for (bits, window) in [
            (9, Window::Bits9),
            (10, Window::Bits9),
            (11, Window::Bits9),
            (12, Window::Bits12),
            (13, Window::Bits12),
            (14, Window::Bits12),
            (15, Window::Bits15),
        ] {
            for offer in [
                format!("permessage-deflate; server_max_window_bits={bits}"),
                format!("permessage-deflate; client_max_window_bits; server_max_window_bits=\"{bits}\""),
            ] {
                assert_eq!(agreed(&offer), format!("; server_max_window_bits={bits}"), "{offer}");
                assert_eq!(negotiate(&offer).map(|agreed| agreed.window), Some(window));
            }
        }
        assert_eq!(negotiate("permessage-deflate").map(|agreed| agreed.window), Some(Window::Bits15));
    }

    #[test]
    fn an_offer_that_is_not_understood_is_declined() {
        for params in [
            "server_max_window_bits",
            "server_max_window_bits=8",
            "server_max_window_bits=7",
            "server_max_window_bits=16",
            "server_max_window_bits=09",
            "server_max_window_bits=010",
            "server_max_window_bits=+9",
            "server_max_window_bits=ten",
            "server_max_window_bits=\"\"",
            "server_max_window_bits=\" 10\"",
            "server_max_window_bits=10; server_max_window_bits=10",
            "server_max_window_bits=10; server_max_window_bits=11",
            "client_max_window_bits=7",
            "client_max_window_bits=16",
            "client_max_window_bits=08",
            "client_max_window_bits=\"\"",
            "client_max_window_bits; client_max_window_bits",
            "client_max_window_bits=10; client_max_window_bits",
            "server_no_context_takeover=1",
            "server_no_context_takeover=\"\"",
            "server_no_context_takeover; server_no_context_takeover",
            "client_no_context_takeover=true",
            "client_no_context_takeover; client_no_context_takeover",
            "unknown",
            "unknown=1",
            "Server_max_window_bits=10",
        ] {
            let offer = format!("permessage-deflate; {params}");
            assert_eq!(answer(&offer), "-", "{offer}");
            // The next one is looked at, and a good parameter elsewhere in the offer changes nothing.
            assert_eq!(agreed(&format!("{offer}, permessage-deflate")), "", "{offer}");
            let offer = format!("permessage-deflate; server_no_context_takeover; {params}");
            let next = format!("{offer}, permessage-deflate; server_max_window_bits=11");
            assert_eq!(agreed(&next), "; server_max_window_bits=11", "{next}");
        }
        for other in ["", "x-webkit-deflate-frame", "permessage-bzip2", "Permessage-Deflate", "permessage-deflate2"] {
            assert_eq!(answer(other), "-", "{other}");
        }
    }

    #[test]
    fn the_first_acceptable_offer_is_taken() {
        let offers = "permessage-deflate; server_max_window_bits=8, permessage-deflate; server_max_window_bits=13, \
                      permessage-deflate; server_max_window_bits=10, permessage-deflate";
        assert_eq!(agreed(offers), "; server_max_window_bits=13");
        assert_eq!(agreed("permessage-deflate, permessage-deflate; server_max_window_bits=10"), "");
        // The parameters of another extension are none of ours.
        assert_eq!(agreed("other; server_max_window_bits=10; unknown, permessage-deflate, other; a=1"), "");
        assert_eq!(agreed("permessage-deflate, other; server_max_window_bits=10; unknown"), "");
    }

    /// An inflater written from RFC 1951 alone, slow and short: what a message's payload is, and how far back it refers.
    struct Plodding<'d> {
        data: &'d [u8],
        bit: usize,
        out: Vec<u8>,
        furthest: usize,
    }

    impl Plodding<'_> {
        fn inflate(payload: &[u8]) -> (Vec<u8>, usize) {
            let data = [payload, &FLUSH_TAIL].concat();
            let mut this = Plodding { data: &data, bit: 0, out: Vec::new(), furthest: 0 };
            while this.bit < data.len() * 8 {
                assert_eq!(this.bits(1), 0, "no block is final");
                match this.bits(2) {
                    0 => this.stored(),
                    1 => {
                        let length = |symbol: u16| match symbol {
                            0..144 | 280.. => 8,
                            144..256 => 9,
                            256..280 => 7,
                        };
                        this.symbols(&(0..288).map(length).collect::<Vec<u8>>(), &[5; 30]);
                    }
                    2 => this.dynamic(),
                    _ => panic!("there is no such block"),
                }
            }
            (this.out, this.furthest)
        }

        fn bits(&mut self, count: usize) -> usize {
            let mut value = 0;
            for at in 0..count {
                value |= usize::from(self.data[self.bit / 8] >> (self.bit % 8) & 1) << at;
                self.bit += 1;
            }
            value
        }

        fn stored(&mut self) {
            self.bit = self.bit.next_multiple_of(8);
            let (len, complement) = (self.bits(16), self.bits(16));
            assert_eq!(len ^ complement, 0xffff);
            for _ in 0..len {
                let byte = self.bits(8);
                self.out.push(u8::try_from(byte).expect("8 bits"));
            }
        }

        fn dynamic(&mut self) {
            let (literals, distances, codes) = (self.bits(5) + 257, self.bits(5) + 1, self.bits(4) + 4);
            let mut code_lengths = [0; 19];
            for at in [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15].into_iter().take(codes) {
                code_lengths[at] = u8::try_from(self.bits(3)).expect("3 bits");
            }
            let mut lengths: Vec<u8> = Vec::new();
            while lengths.len() < literals + distances {
                let (length, times) = match self.symbol(&code_lengths) {
                    16 => (*lengths.last().expect("one came before"), 3 + self.bits(2)),
                    17 => (0, 3 + self.bits(3)),
                    18 => (0, 11 + self.bits(7)),
                    length => (u8::try_from(length).expect("at most 15"), 1),
                };
                lengths.extend(vec![length; times]);
            }
            let (literals, distances) = lengths.split_at(literals);
            self.symbols(literals, distances);
        }

        fn symbols(&mut self, literals: &[u8], distances: &[u8]) {
            loop {
                let symbol = self.symbol(literals);
                let length = match symbol {
                    0..256 => {
                        self.out.push(u8::try_from(symbol).expect("a literal"));
                        continue;
                    }
                    256 => return,
                    257..265 => symbol - 254,
                    265..285 => {
                        let extra = (symbol - 261) / 4;
                        let base = (4 + (symbol - 265) % 4) << extra;
                        base + self.bits(extra) + 3
                    }
                    _ => 258,
                };
                let code = self.symbol(distances);
                let extra = (code / 2).saturating_sub(1);
                let base = if code < 2 { code } else { (2 + code % 2) << extra };
                let distance = base + self.bits(extra) + 1;
                self.furthest = self.furthest.max(distance);
                for _ in 0..length {
                    self.out.push(self.out[self.out.len() - distance]);
                }
            }
        }

        /// The next symbol of the canonical code with these lengths.
        fn symbol(&mut self, lengths: &[u8]) -> usize {
            let (mut code, mut first) = (0, 0);
            for length in 1..16 {
                code |= self.bits(1);
                let of_length =
                    || lengths.iter().enumerate().filter(|(_, of)| **of == length).map(|(symbol, _)| symbol);
                let count = of_length().count();
                if code - first < count {
                    return of_length().nth(code - first).expect("it was counted");
                }
                first = (first + count) << 1;
                code <<= 1;
            }
            panic!("no symbol has this code")
        }
    }

    /// Text that repeats itself near and far.
    fn rows(count: usize) -> Vec<u8> {
        let row = |n: usize| {
            let (price, symbol) = (n * 7919 % 1000, ["ACME", "INIT", "HOOL"][n % 3]);
            format!(
                "{{\"id\":{n},\"symbol\":\"{symbol}\",\"price\":{price}.{:02},\"open\":{}}},",
                n % 97,
                n.is_multiple_of(2)
            )
        };
        (0..count).map(row).collect::<String>().into_bytes()
    }

    /// Bytes that nothing makes smaller.
    fn noise(len: usize) -> Vec<u8> {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        };
        (0..len).map(|_| next()).collect()
    }

    #[test]
    fn a_message_gets_smaller_and_whole_again_within_its_window() {
        let (mut deflater, mut inflater) = (Deflater::default(), Inflater::default());
        for count in [2, 20, 200, 1_500] {
            let text = rows(count);
            for window in Window::ALL {
                let deflated = deflater.deflate(window, &[&text]).expect("rows get smaller").to_vec();
                assert!(deflated.len() < text.len() * 9 / 10, "{} of {}", deflated.len(), text.len());
                let (inflated, furthest) = Plodding::inflate(&deflated);
                assert!(inflated == text, "{count} rows, {window:?}");
                assert!(furthest <= 1 << window.bits(), "{furthest} is beyond {window:?}");
                assert!(inflater.inflate(&deflated, LIMIT) == Ok(&text[..]));
            }
        }
        // The check above can fail: what repeats far away is found in the larger window alone.
        let far = noise(2_000).repeat(2);
        let deflated = deflater.deflate(Window::Bits15, &[&far]).expect("the second half is the first");
        let (inflated, furthest) = Plodding::inflate(deflated);
        assert!(inflated == far && furthest == 2_000, "{furthest}");
        assert_eq!(deflater.deflate(Window::Bits9, &[&far]), None, "within 512 bytes nothing repeats");
    }

    #[test]
    fn what_would_not_gain_stays_as_it_is() {
        let mut deflater = Deflater::default();
        assert_eq!(deflater.deflate(Window::Bits15, &[]), None);
        assert_eq!(deflater.deflate(Window::Bits15, &[&[b'a'; DEFLATE_BYTES_MIN - 1]]), None);
        assert!(deflater.deflate(Window::Bits15, &[&[b'a'; DEFLATE_BYTES_MIN]]).is_some());
        for len in [64, 100, 1_000, 70_000, 300_000] {
            assert_eq!(deflater.deflate(Window::Bits15, &[&noise(len)]), None, "{len}");
        }
        for window in Window::ALL {
            let large = vec![b'a'; window.bytes_max()];
            assert!(deflater.deflate(window, &[&large]).is_some());
            assert_eq!(deflater.deflate(window, &[&large, b"a"]), None);
        }
    }

    #[test]
    fn what_was_large_is_not_kept() {
        let (mut deflater, mut inflater) = (Deflater::default(), Inflater::default());
        let large = [rows(3_000), noise(400_000)].concat();
        let deflated = deflater.deflate(Window::Bits15, &[&large]).expect("a part gets smaller").to_vec();
        assert!(deflater.out.capacity() > DEFLATE_SCRATCH_BYTES_MAX);
        deflater.deflate(Window::Bits15, &[b"a"]);
        assert!(deflater.out.capacity() <= DEFLATE_SCRATCH_BYTES_MAX);
        assert!(inflater.inflate(&deflated, LIMIT).is_ok());
        inflater.forget();
        assert!(inflater.out.capacity() <= DEFLATE_SCRATCH_BYTES_MAX);
    }

    #[test]
    fn the_examples_of_the_rfc_are_read() {
        let mut inflater = Inflater::default();
        let hello: &[u8] = b"Hello";
        for (what, deflated) in [
            ("7.2.3.1 one block", &[0xf2, 0x48, 0xcd, 0xc9, 0xc9, 0x07, 0x00][..]),
            ("7.2.3.3 no compression", &[0x00, 0x05, 0x00, 0xfa, 0xff, 0x48, 0x65, 0x6c, 0x6c, 0x6f, 0x00]),
            ("7.2.3.4 a final block", &[0xf3, 0x48, 0xcd, 0xc9, 0xc9, 0x07, 0x00, 0x00]),
            ("a final block alone", &[0xf3, 0x48, 0xcd, 0xc9, 0xc9, 0x07, 0x00]),
            ("7.2.3.5 two blocks", &[0xf2, 0x48, 0x05, 0x00, 0x00, 0x00, 0xff, 0xff, 0xca, 0xc9, 0xc9, 0x07, 0x00]),
        ] {
            assert_eq!(inflater.inflate(deflated, 5), Ok(hello), "{what}");
            assert_eq!(inflater.inflate(deflated, 4), Err(InflateError::TooLarge), "{what}");
        }
        assert_eq!(inflater.inflate(&[0x00], 0), Ok(&[][..]), "7.2.3.6 an empty message");
        assert_eq!(inflater.inflate(&[], 0), Ok(&[][..]));
        // 7.2.3.2: a context taken over refers to a message that is gone.
        assert_eq!(inflater.inflate(&[0xf2, 0x00, 0x11, 0x00, 0x00], 5), Err(InflateError::Corrupt));
    }

    #[test]
    fn a_message_that_is_cut_or_damaged_is_none() {
        let (mut deflater, mut inflater) = (Deflater::default(), Inflater::default());
        let text = rows(30);
        let deflated = deflater.deflate(Window::Bits15, &[&text]).expect("rows get smaller").to_vec();
        for cut in 1..deflated.len() {
            // A cut never yields a part as if it were the whole, but for the empty block of the flush itself.
            let part = inflater.inflate(&deflated[..cut], LIMIT);
            assert!(part == Err(InflateError::Corrupt) || part == Ok(&text[..]), "cut at {cut}: {part:?}");
        }
        for bad in [&[0xff; 20][..], b"not deflated at all", &[0x06], &[0x00, 0x01, 0x00, 0x00, 0x00, 0x41]] {
            assert_eq!(inflater.inflate(bad, LIMIT), Err(InflateError::Corrupt), "{bad:x?}");
        }
        assert_eq!(inflater.inflate(&deflated, LIMIT), Ok(&text[..]), "one bad message spoils no other");
    }

    #[test]
    fn a_bomb_is_inflated_to_its_limit_and_no_further() {
        let mut compressor = Compress::new(Compression::best(), false);
        let mut bomb = Vec::with_capacity(64 << 10);
        compressor.compress_vec(&vec![0; 32 << 20], &mut bomb, FlushCompress::Sync).expect("zeros");
        assert!(bomb.len() < 40_000, "{}", bomb.len());
        let mut inflater = Inflater::default();
        assert_eq!(inflater.inflate(&bomb, 64 << 10), Err(InflateError::TooLarge));
        assert!(inflater.out.capacity() <= 256 << 10, "{}", inflater.out.capacity());
        let read = inflater.stream.as_ref().expect("it was made").total_out();
        assert_eq!(read, (64 << 10) + 1, "one byte over the limit is inflated, to know that there is one");
    }

    #[test]
    fn a_message_is_of_a_bounded_number_of_streams() {
        let mut inflater = Inflater::default();
        // Two bytes are an empty stream; behind the last one, the empty block that a message ends with.
        let of = |streams: usize| [[0x03, 0x00].repeat(streams), vec![0x00]].concat();
        assert_eq!(inflater.inflate(&of(INFLATE_STREAMS_MAX - 1), 10), Ok(&[][..]));
        assert_eq!(inflater.inflate(&of(INFLATE_STREAMS_MAX), 10), Err(InflateError::Corrupt));
    }

    proptest! {
        #[test]
        fn whatever_is_deflated_is_inflated(
            parts in prop::collection::vec((prop::collection::vec(any::<u8>(), 1..40), 1usize..60), 1..12),
            window in prop::sample::select(Window::ALL.to_vec()),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..4),
        ) {
            let message: Vec<u8> = parts.iter().flat_map(|(part, times)| part.repeat(*times)).collect();
            let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(message.len())).collect();
            cuts.extend([0, message.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|cut| &message[cut[0]..cut[1]]).collect();
            let mut deflater = Deflater::default();
            let deflated = deflater.deflate(window, &pieces).map(<[u8]>::to_vec);
            // One that has deflated something else before gives the same bytes: frames do not depend on their core.
            let mut used = Deflater::default();
            used.deflate(window, &[&rows(50)]);
            prop_assert_eq!(used.deflate(window, &pieces).map(<[u8]>::to_vec), deflated.clone());
            if let Some(deflated) = deflated {
                prop_assert!(deflated.len() < message.len());
                let (inflated, furthest) = Plodding::inflate(&deflated);
                prop_assert_eq!(&inflated, &message);
                prop_assert!(furthest <= 1 << window.bits());
                let mut inflater = Inflater::default();
                prop_assert_eq!(inflater.inflate(&deflated, message.len()), Ok(&message[..]));
                prop_assert_eq!(inflater.inflate(&deflated, message.len() - 1), Err(InflateError::TooLarge));
            }
        }

        #[test]
        fn any_bytes_are_inflated_to_their_limit_or_refused(
            bytes in prop::collection::vec(any::<u8>(), 0..300),
            bytes_max in 0usize..200,
        ) {
            let mut inflater = Inflater::default();
            let first = inflater.inflate(&bytes, bytes_max).map(<[u8]>::to_vec);
            if let Ok(message) = &first {
                prop_assert!(message.len() <= bytes_max);
            }
            prop_assert_eq!(inflater.inflate(&bytes, bytes_max).map(<[u8]>::to_vec), first, "nothing is left of the first");
        }
    }
}
