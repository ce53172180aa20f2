//! WebSocket framing for the client side: server bytes -> frames in place, texts -> masked frames.
//!
//! Source: RFC 6455 section 5, RFC 7692 section 6 for the compressed bit.
//! Memory: none; a frame borrows the bytes it was read from. [`Fragments`] holds one fragmented message.
//! Errors: [`WsError`], the server's fault. Not here: sockets, inflating, what a message means.

/// The longest message that is read.
pub const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// What a frame is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Opcode {
    /// Goes on with the message begun before.
    Continuation,
    /// A text message.
    Text,
    /// A binary message.
    Binary,
    /// The peer closes.
    Close,
    /// Wants a pong.
    Ping,
    /// Answers a ping.
    Pong,
}

/// One frame; its payload stands where it was received.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Frame<'a> {
    /// What it is.
    pub opcode: Opcode,
    /// Whether it ends its message.
    pub fin: bool,
    /// RSV1: the message is deflated.
    pub compressed: bool,
    /// Its payload.
    pub payload: &'a [u8],
    /// Bytes of the whole frame.
    pub length: usize,
}

/// What a server must not send.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum WsError {
    /// A masked frame: only clients mask.
    Masked,
    /// RSV2 or RSV3, or RSV1 on a control frame or a continuation.
    Reserved,
    /// An opcode that is none.
    Opcode,
    /// A control frame in parts or over 125 bytes.
    Control,
    /// A length that is not the shortest form.
    Length,
    /// Over [`MESSAGE_BYTES_MAX`].
    TooLarge,
    /// A continuation of nothing, or a new message within another.
    Fragment,
}

impl WsError {
    /// Its name in the report.
    pub fn name(self) -> &'static str {
        match self {
            WsError::Masked => "ws_masked_frame",
            WsError::Reserved => "ws_reserved_bits",
            WsError::Opcode => "ws_unknown_opcode",
            WsError::Control => "ws_bad_control_frame",
            WsError::Length => "ws_bad_length",
            WsError::TooLarge => "ws_message_too_large",
            WsError::Fragment => "ws_bad_fragment",
        }
    }
}

/// The frame that `bytes` start with; `None` where it is not there as a whole yet.
///
/// # Errors
/// What the RFC forbids a server to send.
pub fn frame(bytes: &[u8]) -> Result<Option<Frame<'_>>, WsError> {
    let [first, second, rest @ ..] = bytes else { return Ok(None) };
    let opcode = match first & 0x0f {
        0 => Opcode::Continuation,
        1 => Opcode::Text,
        2 => Opcode::Binary,
        8 => Opcode::Close,
        9 => Opcode::Ping,
        10 => Opcode::Pong,
        _ => return Err(WsError::Opcode),
    };
    let (fin, compressed) = (first & 0x80 != 0, first & 0x40 != 0);
    if second & 0x80 != 0 {
        return Err(WsError::Masked);
    }
    if first & 0x30 != 0 || compressed && !matches!(opcode, Opcode::Text | Opcode::Binary) {
        return Err(WsError::Reserved);
    }
    let control = matches!(opcode, Opcode::Close | Opcode::Ping | Opcode::Pong);
    if control && (!fin || *second > 125) {
        return Err(WsError::Control);
    }
    let (length, head) = match second {
        126 => {
            let Some(field) = rest.first_chunk::<2>() else { return Ok(None) };
            let length = usize::from(u16::from_be_bytes(*field));
            if length < 126 {
                return Err(WsError::Length);
            }
            (length, 4)
        }
        127 => {
            let Some(field) = rest.first_chunk::<8>() else { return Ok(None) };
            let length = u64::from_be_bytes(*field);
            if length <= u64::from(u16::MAX) || length >> 63 != 0 {
                return Err(WsError::Length);
            }
            let length = usize::try_from(length).ok().filter(|&length| length <= MESSAGE_BYTES_MAX);
            (length.ok_or(WsError::TooLarge)?, 10)
        }
        short => (usize::from(*short), 2),
    };
    let Some(payload) = bytes.get(head..head + length) else { return Ok(None) };
    Ok(Some(Frame { opcode, fin, compressed, payload, length: head + length }))
}

/// A message that comes in parts. Kept only while one is under way.
#[derive(Debug, Default)]
pub struct Fragments {
    /// Its bytes so far.
    pub bytes: Vec<u8>,
    /// Whether its first frame said that it is deflated.
    pub compressed: bool,
}

impl Fragments {
    /// Adds the payload of one frame.
    ///
    /// # Errors
    /// A message that grows too long.
    pub fn push(&mut self, payload: &[u8]) -> Result<(), WsError> {
        if self.bytes.len() + payload.len() > MESSAGE_BYTES_MAX {
            return Err(WsError::TooLarge);
        }
        self.bytes.extend_from_slice(payload);
        Ok(())
    }
}

/// Appends a final frame from client to server, masked with `mask`.
pub fn write_frame(out: &mut Vec<u8>, opcode: Opcode, payload: &[u8], mask: [u8; 4]) {
    let code = match opcode {
        Opcode::Continuation => 0,
        Opcode::Text => 1,
        Opcode::Binary => 2,
        Opcode::Close => 8,
        Opcode::Ping => 9,
        Opcode::Pong => 10,
    };
    out.push(0x80 | code);
    match payload.len() {
        length @ 0..=125 => out.push(0x80 | length as u8),
        length @ 126..=0xffff => {
            out.push(0x80 | 126);
            out.extend_from_slice(&(length as u16).to_be_bytes());
        }
        length => {
            out.push(0x80 | 127);
            out.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
    out.extend_from_slice(&mask);
    out.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, key)| byte ^ key));
}

/// Code and reason of a Close frame's payload; 1005 where there is none.
pub fn close_reason(payload: &[u8]) -> (u16, &str) {
    match payload {
        [high, low, reason @ ..] => {
            (u16::from_be_bytes([*high, *low]), std::str::from_utf8(reason).unwrap_or("(not UTF-8)"))
        }
        _ => (1005, ""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A frame as servers send it.
    fn server_frame(first: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![first];
        match payload.len() {
            length @ 0..=125 => bytes.push(length as u8),
            length @ 126..=0xffff => {
                bytes.push(126);
                bytes.extend_from_slice(&(length as u16).to_be_bytes());
            }
            length => {
                bytes.push(127);
                bytes.extend_from_slice(&(length as u64).to_be_bytes());
            }
        }
        bytes.extend_from_slice(payload);
        bytes
    }

    #[test]
    fn a_frame_cut_at_any_byte_waits_for_the_rest() {
        for length in [0, 1, 125, 126, 127, 300, 65_535, 65_536] {
            let payload = vec![b'x'; length];
            let bytes = server_frame(0x81, &payload);
            // Every cut of the short ones; of the long ones those around the head and the end.
            let cuts = (0..bytes.len()).filter(|&cut| bytes.len() < 400 || cut < 12 || cut + 4 > bytes.len());
            for cut in cuts {
                assert_eq!(frame(&bytes[..cut]), Ok(None), "{length} cut at {cut}");
            }
            let mut longer = bytes.clone();
            longer.extend_from_slice(b"\x89\x00");
            let read = frame(&longer).expect("well formed").expect("whole");
            assert_eq!((read.opcode, read.fin, read.compressed), (Opcode::Text, true, false));
            assert_eq!((read.payload, read.length), (&*payload, bytes.len()));
        }
    }

    #[test]
    fn what_a_server_must_not_send_is_an_error() {
        let check = |bytes: &[u8], error| assert_eq!(frame(bytes), Err(error), "{bytes:?}");
        check(b"\x81\x80\0\0\0\0", WsError::Masked);
        check(b"\xa1\x00", WsError::Reserved);
        check(b"\x91\x00", WsError::Reserved);
        check(b"\xc9\x00", WsError::Reserved);
        check(b"\xc0\x00", WsError::Reserved);
        check(b"\x83\x00", WsError::Opcode);
        check(b"\x8b\x00", WsError::Opcode);
        check(b"\x09\x00", WsError::Control);
        check(b"\x89\x7e\x00\x80", WsError::Control);
        check(b"\x81\x7e\x00\x7d", WsError::Length);
        check(b"\x81\x7f\0\0\0\0\0\0\xff\xff", WsError::Length);
        check(b"\x81\x7f\x80\0\0\0\0\0\0\0", WsError::Length);
        check(b"\x81\x7f\0\0\0\0\x04\0\0\x01", WsError::TooLarge);
        assert_eq!(frame(b"\x81\x7f\0\0\0\0\x04\0\0\0"), Ok(None), "the longest there may be");
    }

    #[test]
    fn the_compressed_bit_is_told() {
        let bytes = server_frame(0xc1, b"abc");
        assert!(frame(&bytes).expect("well formed").expect("whole").compressed);
    }

    #[test]
    fn fragments_add_up_to_their_limit() {
        let mut message = Fragments::default();
        message.push(b"he").expect("short");
        message.push(b"llo").expect("short");
        assert_eq!(message.bytes, b"hello");
        message.bytes.resize(MESSAGE_BYTES_MAX - 1, 0);
        message.push(b"x").expect("the longest there may be");
        assert_eq!(message.push(b"x"), Err(WsError::TooLarge));
    }

    #[test]
    fn what_is_written_unmasks_to_what_was_meant() {
        for length in [0, 5, 125, 126, 65_535, 65_536] {
            let payload: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
            let mut bytes = Vec::new();
            write_frame(&mut bytes, Opcode::Text, &payload, [1, 2, 3, 4]);
            assert_eq!(bytes[0], 0x81);
            assert_eq!(bytes[1] & 0x80, 0x80, "a client masks");
            let body = bytes.len() - payload.len();
            assert_eq!(bytes[body - 4..body], [1, 2, 3, 4]);
            let unmasked: Vec<u8> = bytes[body..].iter().enumerate().map(|(at, b)| b ^ [1, 2, 3, 4][at % 4]).collect();
            assert_eq!(unmasked, payload);
            let head = match length {
                0..=125 => 2,
                126..=0xffff => 4,
                _ => 10,
            };
            assert_eq!(body, head + 4, "the shortest form of the length");
        }
    }

    #[test]
    fn close_frames_say_why() {
        assert_eq!(close_reason(b"\x0f\xa1token_expired"), (4001, "token_expired"));
        assert_eq!(close_reason(b"\x03\xe8"), (1000, ""));
        assert_eq!(close_reason(b""), (1005, ""));
        assert_eq!(close_reason(b"\x03\xe8\xff"), (1000, "(not UTF-8)"));
    }
}
