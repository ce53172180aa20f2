//! WebSocket framing for the server side: peer bytes -> whole messages, messages -> bytes.
//!
//! Source: RFC 6455 sections 5 and 7; RFC 7692 section 6 for compressed messages, which are RSV1 of their first frame.
//! Memory: one [`Decoder`] of 16 bytes per connection; its box exists only while a frame or message is incomplete, holds
//! at most `Limits::message_bytes_max` of it, grows as bytes arrive and is freed by the call after the message. Compressed
//! bytes are gathered in it as they came, at most 9/8 of that and 64 more, and inflated by the core's [`Inflater`] when the
//! message is whole.
//! Errors: [`FrameError`], always the peer's fault; `close_code()` names the code to send.
//! Not here: sockets, time, the opening handshake (`codec::http`), meaning (`codec::message`).

use std::borrow::Cow;
use std::str;

use super::deflate::{Deflater, InflateError, Inflater, Window};

/// Payload bytes of a control frame at most (RFC 6455 section 5.5).
pub const CONTROL_PAYLOAD_BYTES_MAX: usize = 125;
/// Bytes of a client's frame header at most: 2, a 64-bit length, the mask.
const HEADER_BYTES_MAX: usize = 14;

/// What one message of a peer may cost. Passed to each call, so that a reload reaches live connections.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Limits {
    /// Payload bytes of one message, all its fragments together, after inflating.
    pub message_bytes_max: usize,
    /// Frames of one message, besides an empty one that ends it.
    pub fragments_max: u32,
}

impl Limits {
    /// What the frames of a message may carry: what cannot be compressed gets a little larger when it is all the same.
    const fn payload_bytes_max(self, deflated: bool) -> usize {
        match deflated {
            false => self.message_bytes_max,
            true => self.message_bytes_max.saturating_add(self.message_bytes_max / 8).saturating_add(64),
        }
    }
}

/// What a peer said, whole and checked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Incoming<'a> {
    /// A text message.
    Text(&'a str),
    /// A binary message.
    Binary(&'a [u8]),
    /// A ping, at most 125 bytes: to be answered by a pong of the same bytes.
    Ping(&'a [u8]),
    /// A pong, at most 125 bytes.
    Pong(&'a [u8]),
    /// The peer closes, with a code and reason where it gave them. Nothing after it is read.
    Close(Option<(u16, &'a str)>),
}

/// How a peer broke the framing. The connection is to be closed with [`FrameError::close_code`].
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum FrameError {
    /// An RSV bit is set that no extension has given a meaning there.
    #[error("a reserved bit is set without an extension")]
    ReservedBits,
    /// A compressed message that cannot be inflated.
    #[error("a compressed message is not deflated, or not to its end")]
    InvalidDeflate,
    /// An opcode that RFC 6455 does not define.
    #[error("unknown opcode {opcode:#x}")]
    UnknownOpcode {
        /// The four bits.
        opcode: u8,
    },
    /// A client's frame without a mask.
    #[error("a client frame is not masked")]
    Unmasked,
    /// A ping, pong or close without FIN.
    #[error("a control frame is fragmented")]
    FragmentedControl,
    /// A ping, pong or close over 125 bytes.
    #[error("a control frame is over {CONTROL_PAYLOAD_BYTES_MAX} bytes")]
    ControlTooLong,
    /// A continuation frame, and no message was begun.
    #[error("a continuation frame without a message to continue")]
    NothingToContinue,
    /// A text or binary frame before the message begun earlier was ended.
    #[error("a new message begins within another")]
    MessageWithinMessage,
    /// A length written longer than needed.
    #[error("a length is not written in the fewest bytes")]
    LengthNotMinimal,
    /// A 64-bit length with its top bit set.
    #[error("a length is over 63 bits")]
    LengthOver63Bits,
    /// A message over `Limits::message_bytes_max`, known from a header: its payload was not read; or from inflating it so
    /// far.
    #[error("a message is over {limit} bytes")]
    MessageTooLarge {
        /// What is allowed.
        limit: u32,
    },
    /// A message of more frames than `Limits::fragments_max`.
    #[error("a message has more than {limit} fragments")]
    TooManyFragments {
        /// What is allowed.
        limit: u32,
    },
    /// Text, or the reason of a close, that is not UTF-8.
    #[error("text is not UTF-8")]
    InvalidUtf8,
    /// A close frame whose body is too short for a code.
    #[error("a close frame has one byte")]
    CloseBodyTooShort,
    /// A close code that may not stand on the wire.
    #[error("close code {code} may not be sent")]
    InvalidCloseCode {
        /// The code.
        code: u16,
    },
}

impl FrameError {
    /// The code to close with (RFC 6455 section 7.4.1): 1002 broken framing, 1007 a payload that is not what it says (text
    /// that is no UTF-8, compressed data that is none), 1009 too much.
    pub const fn close_code(self) -> u16 {
        match self {
            FrameError::InvalidUtf8 | FrameError::InvalidDeflate => 1007,
            FrameError::MessageTooLarge { .. } | FrameError::TooManyFragments { .. } => 1009,
            FrameError::ReservedBits
            | FrameError::UnknownOpcode { .. }
            | FrameError::Unmasked
            | FrameError::FragmentedControl
            | FrameError::ControlTooLong
            | FrameError::NothingToContinue
            | FrameError::MessageWithinMessage
            | FrameError::LengthNotMinimal
            | FrameError::LengthOver63Bits
            | FrameError::CloseBodyTooShort
            | FrameError::InvalidCloseCode { .. } => 1002,
        }
    }
}

/// The opcodes of RFC 6455 section 5.2.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Opcode {
    /// A further frame of the message begun.
    Continuation,
    /// The first or only frame of a text message.
    Text,
    /// The first or only frame of a binary message.
    Binary,
    /// The last frame a peer sends.
    Close,
    /// Asks for a pong.
    Ping,
    /// Answers a ping, or says unasked that the peer is there.
    Pong,
}

impl Opcode {
    const fn from_bits(bits: u8) -> Option<Opcode> {
        Some(match bits {
            0x0 => Opcode::Continuation,
            0x1 => Opcode::Text,
            0x2 => Opcode::Binary,
            0x8 => Opcode::Close,
            0x9 => Opcode::Ping,
            0xa => Opcode::Pong,
            _ => return None,
        })
    }

    const fn bits(self) -> u8 {
        match self {
            Opcode::Continuation => 0x0,
            Opcode::Text => 0x1,
            Opcode::Binary => 0x2,
            Opcode::Close => 0x8,
            Opcode::Ping => 0x9,
            Opcode::Pong => 0xa,
        }
    }

    const fn is_control(self) -> bool {
        matches!(self, Opcode::Close | Opcode::Ping | Opcode::Pong)
    }
}

/// Reads one client's frames. Needs no buffer of the caller's to last from one call to the next.
#[derive(Debug, Default)]
pub struct Decoder {
    /// What is incomplete, or was handed out by the last call.
    partial: Option<Box<Partial>>,
    /// Set for good when there is nothing more to read.
    end: Option<End>,
}

#[derive(Clone, Copy, Debug)]
enum End {
    /// RFC 6455 section 5.5.1: nothing follows a close frame; what does is dropped.
    Closed,
    Failed(FrameError),
}

impl Decoder {
    /// A decoder before the peer's first frame.
    pub const fn new() -> Decoder {
        Decoder { partial: None, end: None }
    }

    /// The next message in `input`, whose front is cut off as far as it was read; `None` when all of it was.
    ///
    /// Call it until `None`: that call also frees what a message took. `input` is overwritten while it is unmasked. A
    /// message whose only frame lies in `input` as a whole is handed out as a piece of it, without a copy. After a close
    /// everything is dropped, after an error each call gives the same error.
    ///
    /// `inflater` is given where permessage-deflate was agreed on. Between the calls for one input it is not to be used for
    /// another; between inputs it may be.
    ///
    /// A caller that keeps the decoder beside the state that messages act on can `std::mem::take` it for the loop.
    pub fn next<'a, 'i: 'a>(
        &'a mut self,
        input: &mut &'i mut [u8],
        limits: Limits,
        mut inflater: Option<&'a mut Inflater>,
    ) -> Result<Option<Incoming<'a>>, FrameError> {
        self.free_handed_out();
        if let Some(inflater) = &mut inflater {
            inflater.forget();
        }
        match self.end {
            None => {}
            Some(End::Closed) => {
                *input = &mut [];
                return Ok(None);
            }
            Some(End::Failed(error)) => {
                *input = &mut [];
                return Err(error);
            }
        }
        let error = match self.advance(input, limits, inflater.is_some()) {
            Ok(None) => return Ok(None),
            Ok(Some(Ready::InInput(incoming))) => return Ok(Some(incoming)),
            Ok(Some(Ready::InPartial)) => return self.partial.as_deref().map(Partial::handed_out).transpose(),
            Ok(Some(Ready::Deflated(opcode, payload))) => match inflated(inflater, opcode, &payload, limits) {
                Ok(incoming) => return Ok(Some(incoming)),
                Err(error) => error,
            },
            Err(error) => error,
        };
        self.partial = None;
        self.end = Some(End::Failed(error));
        *input = &mut [];
        Err(error)
    }

    /// Whether nothing is incomplete: the state in which a connection costs 16 bytes here.
    pub const fn is_idle(&self) -> bool {
        self.partial.is_none()
    }

    fn free_handed_out(&mut self) {
        let Some(partial) = &mut self.partial else { return };
        match std::mem::take(&mut partial.handed_out) {
            HandedOut::Nothing => return,
            HandedOut::Message => partial.message = None,
            HandedOut::Control(_) => partial.control = Vec::new(),
        }
        self.free_if_empty();
    }

    fn free_if_empty(&mut self) {
        if self.partial.as_ref().is_some_and(|partial| partial.is_empty()) {
            self.partial = None;
        }
    }

    fn advance<'i>(
        &mut self,
        input: &mut &'i mut [u8],
        limits: Limits,
        deflate: bool,
    ) -> Result<Option<Ready<'i>>, FrameError> {
        while !input.is_empty() {
            if let Some(partial) = &mut self.partial
                && let Some(frame) = &mut partial.frame
            {
                let taken = take_front(input, frame.header.len - frame.read);
                unmask(taken, frame.mask_at_read());
                frame.read += taken.len();
                if partial.receive(taken, limits)? {
                    return Ok(Some(self.hand_out()));
                }
                continue;
            }
            let Some(header) = self.read_header(input, limits, deflate)? else { return Ok(None) };
            let alone = header.opcode.is_control() || (header.fin && header.opcode != Opcode::Continuation);
            if alone && header.len <= input.len() {
                let payload = take_front(input, header.len);
                unmask(payload, header.mask);
                if header.deflated {
                    self.free_if_empty();
                    return Ok(Some(Ready::Deflated(header.opcode, Cow::Borrowed(payload))));
                }
                let incoming = whole(header.opcode, payload)?;
                if header.opcode == Opcode::Close {
                    self.end = Some(End::Closed);
                    self.partial = None;
                }
                self.free_if_empty();
                return Ok(Some(Ready::InInput(incoming)));
            }
            let partial = self.partial.get_or_insert_default();
            partial.begin(header);
            // A fragment without payload is over with its header: no byte of it is left to wait for.
            if header.len == 0 && partial.receive(&[], limits)? {
                return Ok(Some(self.hand_out()));
            }
        }
        Ok(None)
    }

    fn hand_out<'i>(&mut self) -> Ready<'i> {
        if self.partial.as_ref().is_some_and(|partial| partial.handed_out == HandedOut::Control(Opcode::Close)) {
            self.end = Some(End::Closed);
        }
        let message = self.partial.as_mut().filter(|partial| partial.handed_out == HandedOut::Message);
        if let Some(partial) = message
            && let Some(Message { body: Body::Deflated { opcode, bytes }, .. }) = &mut partial.message
        {
            let (opcode, bytes) = (*opcode, std::mem::take(bytes));
            self.free_handed_out();
            return Ready::Deflated(opcode, Cow::Owned(bytes));
        }
        Ready::InPartial
    }

    /// The header at the front of `input`, its first bytes perhaps kept from earlier; `None`: incomplete, kept.
    fn read_header(
        &mut self,
        input: &mut &mut [u8],
        limits: Limits,
        deflate: bool,
    ) -> Result<Option<Header>, FrameError> {
        let begun = self.partial.as_ref().and_then(|partial| partial.message.as_ref()).map(Message::begun);
        let kept = self.partial.as_ref().map_or(0, |partial| partial.head.len());
        if kept == 0 {
            if let Some((header, used)) = parse_header(input, begun, limits, deflate)? {
                take_front(input, used);
                return Ok(Some(header));
            }
            let rest = std::mem::take(input);
            self.partial.get_or_insert_default().head.extend_from_slice(rest);
            return Ok(None);
        }
        let head = &mut self.partial.get_or_insert_default().head;
        head.extend(input.iter().take(HEADER_BYTES_MAX - kept));
        match parse_header(head, begun, limits, deflate)? {
            Some((header, used)) => {
                *head = Vec::new();
                // What was kept was not a whole header, so that `used` is more.
                take_front(input, used.saturating_sub(kept));
                Ok(Some(header))
            }
            None => {
                *input = &mut [];
                Ok(None)
            }
        }
    }
}

/// Where a finished message lies.
enum Ready<'i> {
    InInput(Incoming<'i>),
    InPartial,
    /// Whole, but still to be inflated.
    Deflated(Opcode, Cow<'i, [u8]>),
}

/// What has arrived of a message that is not whole.
#[derive(Debug, Default)]
struct Partial {
    /// The first bytes of a header, while it is incomplete.
    head: Vec<u8>,
    /// The frame whose payload is arriving.
    frame: Option<Frame>,
    /// The data message that is begun.
    message: Option<Message>,
    /// What has arrived of a control frame, which may stand between the fragments of a message.
    control: Vec<u8>,
    /// What the last call handed out, to be freed by this one.
    handed_out: HandedOut,
}

#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
enum HandedOut {
    #[default]
    Nothing,
    Message,
    Control(Opcode),
}

#[derive(Clone, Copy, Debug)]
struct Header {
    fin: bool,
    /// Whether the message is compressed: RSV1 of its first frame.
    deflated: bool,
    opcode: Opcode,
    len: usize,
    mask: [u8; 4],
}

#[derive(Clone, Copy, Debug)]
struct Frame {
    header: Header,
    /// Payload bytes that have arrived.
    read: usize,
}

impl Frame {
    /// The mask as it applies to the next byte (RFC 6455 section 5.3: byte i is masked by mask byte i mod 4).
    fn mask_at_read(&self) -> [u8; 4] {
        let mut mask = self.header.mask;
        mask.rotate_left(self.read % 4);
        mask
    }
}

#[derive(Debug)]
struct Message {
    body: Body,
    fragments: u32,
}

/// A message's payload so far. Text is checked as it arrives, so that a bad byte ends the connection at once.
#[derive(Debug)]
enum Body {
    Text {
        text: String,
        cut: Cut,
    },
    Binary(Vec<u8>),
    /// Of either, as it came.
    Deflated {
        opcode: Opcode,
        bytes: Vec<u8>,
    },
}

/// The first bytes of a character whose last have not arrived: at most 3, or 4 for the moment of completing it.
#[derive(Debug, Default)]
struct Cut {
    bytes: [u8; 4],
    len: usize,
}

/// What a header must be judged by: how much of a message has come before it.
#[derive(Clone, Copy, Debug)]
struct Begun {
    bytes: usize,
    fragments: u32,
    deflated: bool,
}

impl Message {
    fn begun(&self) -> Begun {
        let deflated = matches!(self.body, Body::Deflated { .. });
        Begun { bytes: self.body.len(), fragments: self.fragments, deflated }
    }
}

impl Body {
    fn len(&self) -> usize {
        match self {
            Body::Text { text, cut } => text.len() + cut.len,
            Body::Binary(bytes) | Body::Deflated { bytes, .. } => bytes.len(),
        }
    }

    /// Appends `chunk`; the buffer doubles, but never past `bytes_max`.
    fn push(&mut self, chunk: &[u8], bytes_max: usize) -> Result<(), FrameError> {
        match self {
            Body::Text { text, cut } => {
                text.reserve_exact(growth(text.len(), text.capacity(), cut.len + chunk.len(), bytes_max));
                push_text(text, cut, chunk)
            }
            Body::Binary(bytes) | Body::Deflated { bytes, .. } => {
                bytes.reserve_exact(growth(bytes.len(), bytes.capacity(), chunk.len(), bytes_max));
                bytes.extend_from_slice(chunk);
                Ok(())
            }
        }
    }
}

impl Cut {
    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }

    fn push(&mut self, byte: u8) {
        if let Some(place) = self.bytes.get_mut(self.len) {
            *place = byte;
            self.len += 1;
        }
    }
}

impl Partial {
    fn is_empty(&self) -> bool {
        self.head.is_empty()
            && self.frame.is_none()
            && self.message.is_none()
            && self.control.is_empty()
            && self.handed_out == HandedOut::Nothing
    }

    /// The header of a frame whose payload will be received in pieces.
    fn begin(&mut self, header: Header) {
        self.frame = Some(Frame { header, read: 0 });
        match header.opcode {
            opcode @ (Opcode::Text | Opcode::Binary) if header.deflated => {
                let body = Body::Deflated { opcode, bytes: Vec::new() };
                self.message = Some(Message { body, fragments: 1 });
            }
            Opcode::Text => {
                let body = Body::Text { text: String::new(), cut: Cut::default() };
                self.message = Some(Message { body, fragments: 1 });
            }
            Opcode::Binary => self.message = Some(Message { body: Body::Binary(Vec::new()), fragments: 1 }),
            Opcode::Continuation => {
                if let Some(message) = &mut self.message {
                    message.fragments = message.fragments.saturating_add(1);
                }
            }
            Opcode::Close | Opcode::Ping | Opcode::Pong => {}
        }
    }

    /// Takes unmasked payload of the frame that is arriving. Says whether that made something whole.
    fn receive(&mut self, chunk: &[u8], limits: Limits) -> Result<bool, FrameError> {
        let Some(Frame { header, read }) = self.frame else { return Ok(false) };
        let frame_over = read == header.len;
        if frame_over {
            self.frame = None;
        }
        if header.opcode.is_control() {
            self.control.extend_from_slice(chunk);
            if frame_over {
                // Checks a close; what it yields is read again when it is handed out.
                whole(header.opcode, &self.control)?;
                self.handed_out = HandedOut::Control(header.opcode);
            }
            return Ok(frame_over);
        }
        let Some(message) = &mut self.message else { return Ok(false) };
        let message_over = frame_over && header.fin;
        // The last frame's header has told how long the message is; before it, only the limit is known.
        let left = header.len - read + chunk.len();
        let payload_bytes_max = limits.payload_bytes_max(message.begun().deflated);
        let bytes_max = if header.fin { message.body.len() + left } else { payload_bytes_max };
        message.body.push(chunk, bytes_max)?;
        if message_over {
            if matches!(&message.body, Body::Text { cut, .. } if cut.len > 0) {
                return Err(FrameError::InvalidUtf8);
            }
            self.handed_out = HandedOut::Message;
        }
        Ok(message_over)
    }

    fn handed_out(&self) -> Result<Incoming<'_>, FrameError> {
        if let HandedOut::Control(opcode) = self.handed_out {
            return whole(opcode, &self.control);
        }
        Ok(match self.message.as_ref().map(|message| &message.body) {
            Some(Body::Text { text, .. }) => Incoming::Text(text),
            Some(Body::Binary(bytes)) => Incoming::Binary(bytes),
            Some(Body::Deflated { .. }) | None => Incoming::Binary(&[]),
        })
    }
}

/// A compressed message, whole.
fn inflated<'a>(
    inflater: Option<&'a mut Inflater>,
    opcode: Opcode,
    payload: &[u8],
    limits: Limits,
) -> Result<Incoming<'a>, FrameError> {
    let inflater = inflater.ok_or(FrameError::ReservedBits)?;
    let message = inflater.inflate(payload, limits.message_bytes_max).map_err(|error| match error {
        InflateError::Corrupt => FrameError::InvalidDeflate,
        InflateError::TooLarge => too_large(limits),
    })?;
    whole(opcode, message)
}

fn too_large(limits: Limits) -> FrameError {
    FrameError::MessageTooLarge { limit: u32::try_from(limits.message_bytes_max).unwrap_or(u32::MAX) }
}

/// A frame that is a message by itself.
fn whole(opcode: Opcode, payload: &[u8]) -> Result<Incoming<'_>, FrameError> {
    Ok(match opcode {
        Opcode::Text => Incoming::Text(str::from_utf8(payload).map_err(|_| FrameError::InvalidUtf8)?),
        Opcode::Binary | Opcode::Continuation => Incoming::Binary(payload),
        Opcode::Ping => Incoming::Ping(payload),
        Opcode::Pong => Incoming::Pong(payload),
        Opcode::Close => Incoming::Close(close_body(payload)?),
    })
}

/// RFC 6455 section 5.5.1: empty, or a code and a UTF-8 reason.
fn close_body(payload: &[u8]) -> Result<Option<(u16, &str)>, FrameError> {
    if payload.is_empty() {
        return Ok(None);
    }
    let (code, reason) = payload.split_first_chunk::<2>().ok_or(FrameError::CloseBodyTooShort)?;
    let code = u16::from_be_bytes(*code);
    if !close_code_may_be_sent(code) {
        return Err(FrameError::InvalidCloseCode { code });
    }
    Ok(Some((code, str::from_utf8(reason).map_err(|_| FrameError::InvalidUtf8)?)))
}

/// Whether `code` may stand in a close frame: RFC 6455 section 7.4 and the registry it founded. 1004 is reserved; 1005, 1006
/// and 1015 describe what no frame said; 1012 to 1014 were registered later; 3000 and up belong to others.
pub const fn close_code_may_be_sent(code: u16) -> bool {
    matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999)
}

/// The header at the front of `bytes` and its length; `None` while it is incomplete.
///
/// Each check is made as soon as the bytes it needs are there and in their order, so that the verdict does not depend on how
/// the bytes were cut.
fn parse_header(
    bytes: &[u8],
    begun: Option<Begun>,
    limits: Limits,
    deflate: bool,
) -> Result<Option<(Header, usize)>, FrameError> {
    let Some((&first, rest)) = bytes.split_first() else { return Ok(None) };
    let rsv1 = first & 0x40 != 0;
    if first & 0x30 != 0 || (rsv1 && !deflate) {
        return Err(FrameError::ReservedBits);
    }
    let opcode = Opcode::from_bits(first & 0x0f).ok_or(FrameError::UnknownOpcode { opcode: first & 0x0f })?;
    // RFC 7692 section 6.1: RSV1 means something on the first frame of a data message alone.
    if rsv1 && !matches!(opcode, Opcode::Text | Opcode::Binary) {
        return Err(FrameError::ReservedBits);
    }
    let fin = first & 0x80 != 0;
    match (opcode, begun) {
        (Opcode::Close | Opcode::Ping | Opcode::Pong, _) if !fin => return Err(FrameError::FragmentedControl),
        (Opcode::Continuation, None) => return Err(FrameError::NothingToContinue),
        (Opcode::Text | Opcode::Binary, Some(_)) => return Err(FrameError::MessageWithinMessage),
        _ => {}
    }
    let before = begun.unwrap_or(Begun { bytes: 0, fragments: 0, deflated: rsv1 });
    let Some((&second, rest)) = rest.split_first() else { return Ok(None) };
    // RFC 6455 section 5.1: a server must close on a frame that is not masked.
    if second & 0x80 == 0 {
        return Err(FrameError::Unmasked);
    }
    let short = second & 0x7f;
    // A frame that only says that the message is over is none more.
    let ends_only = fin && short == 0;
    if !opcode.is_control() && before.fragments >= limits.fragments_max && !ends_only {
        return Err(FrameError::TooManyFragments { limit: limits.fragments_max });
    }
    if opcode.is_control() && usize::from(short) > CONTROL_PAYLOAD_BYTES_MAX {
        return Err(FrameError::ControlTooLong);
    }
    // RFC 6455 section 5.2: the fewest bytes must be used, and the top bit of 64 must be 0.
    let (len, rest) = match short {
        126 => {
            let Some((len, rest)) = rest.split_first_chunk::<2>() else { return Ok(None) };
            let len = u64::from(u16::from_be_bytes(*len));
            if len < 126 {
                return Err(FrameError::LengthNotMinimal);
            }
            (len, rest)
        }
        127 => {
            let Some((len, rest)) = rest.split_first_chunk::<8>() else { return Ok(None) };
            let len = u64::from_be_bytes(*len);
            if len >> 63 != 0 {
                return Err(FrameError::LengthOver63Bits);
            }
            if len <= u64::from(u16::MAX) {
                return Err(FrameError::LengthNotMinimal);
            }
            (len, rest)
        }
        short => (u64::from(short), rest),
    };
    let len = usize::try_from(len).map_err(|_| too_large(limits))?;
    if !opcode.is_control() && before.bytes.saturating_add(len) > limits.payload_bytes_max(before.deflated) {
        return Err(too_large(limits));
    }

    let Some((mask, rest)) = rest.split_first_chunk::<4>() else { return Ok(None) };
    Ok(Some((Header { fin, deflated: rsv1, opcode, len, mask: *mask }, bytes.len() - rest.len())))
}

/// Cuts up to `len` bytes off the front of `input`.
fn take_front<'i>(input: &mut &'i mut [u8], len: usize) -> &'i mut [u8] {
    let all = std::mem::take(input);
    let (front, rest) = all.split_at_mut(len.min(all.len()));
    *input = rest;
    front
}

/// Bytes to reserve beyond `len` so that `more` fit: twice the capacity, but not past `bytes_max` unless `more` needs it.
fn growth(len: usize, capacity: usize, more: usize, bytes_max: usize) -> usize {
    let needed = len.saturating_add(more);
    if needed <= capacity {
        return 0;
    }
    needed.max(capacity.saturating_mul(2).min(bytes_max)) - len
}

/// Appends `chunk` to `text`. A character cut off at the end waits in `cut`; a byte that no character can hold is an error.
fn push_text(text: &mut String, cut: &mut Cut, mut chunk: &[u8]) -> Result<(), FrameError> {
    while cut.len > 0
        && let Some((&byte, rest)) = chunk.split_first()
    {
        cut.push(byte);
        chunk = rest;
        match str::from_utf8(cut.bytes()) {
            Ok(character) => {
                text.push_str(character);
                *cut = Cut::default();
            }
            // `error_len` is `None` just where more bytes could still make it a character.
            Err(error) if error.error_len().is_none() => {}
            Err(_) => return Err(FrameError::InvalidUtf8),
        }
    }
    let valid = match str::from_utf8(chunk) {
        Ok(valid) => valid,
        Err(error) if error.error_len().is_none() => {
            let (valid, begun) = chunk.split_at(error.valid_up_to());
            begun.iter().for_each(|&byte| cut.push(byte));
            str::from_utf8(valid).map_err(|_| FrameError::InvalidUtf8)?
        }
        Err(_) => return Err(FrameError::InvalidUtf8),
    };
    text.push_str(valid);
    Ok(())
}

/// Masks or unmasks `payload` in place, eight bytes at a time (RFC 6455 section 5.3: the same operation both ways).
pub fn unmask(payload: &mut [u8], mask: [u8; 4]) {
    let [a, b, c, d] = mask;
    let wide = u64::from_ne_bytes([a, b, c, d, a, b, c, d]);
    let (words, rest) = payload.as_chunks_mut::<8>();
    for word in words {
        *word = (u64::from_ne_bytes(*word) ^ wide).to_ne_bytes();
    }
    for (byte, mask) in rest.iter_mut().zip(mask.into_iter().cycle()) {
        *byte ^= mask;
    }
}

/// Bytes of an unmasked header for `payload_len` bytes of payload: 2, 4 or 10.
pub const fn header_len(payload_len: usize) -> usize {
    match payload_len {
        0..=125 => 2,
        126..=0xffff => 4,
        _ => 10,
    }
}

/// Appends the header of a server's frame that is a message by itself: FIN set, unmasked, the length in the fewest bytes.
pub fn frame_header(out: &mut Vec<u8>, opcode: Opcode, payload_len: usize) {
    header(out, FIN, opcode, payload_len, 0);
}

/// The first bit of a frame's header: the message is over with it.
const FIN: u8 = 0x80;
/// The second: the message is compressed (RFC 7692 section 6).
const RSV1: u8 = 0x40;

fn header(out: &mut Vec<u8>, first_bits: u8, opcode: Opcode, payload_len: usize, mask_bit: u8) {
    out.push(first_bits | opcode.bits());
    match (u8::try_from(payload_len), u16::try_from(payload_len)) {
        (Ok(len @ 0..=125), _) => out.push(mask_bit | len),
        (_, Ok(len)) => {
            out.push(mask_bit | 126);
            out.extend_from_slice(&len.to_be_bytes());
        }
        _ => {
            out.push(mask_bit | 127);
            out.extend_from_slice(&(payload_len as u64).to_be_bytes());
        }
    }
}

fn write(out: &mut Vec<u8>, opcode: Opcode, payload: &[u8]) {
    write_pieces(out, opcode, &[payload]);
}

/// Appends a message of `pieces`: compressed where that makes it smaller, as it is otherwise (RFC 7692 section 6 lets the
/// sender choose for each message). How many bytes it was compressed to, where it was.
pub fn write_deflated(
    out: &mut Vec<u8>,
    opcode: Opcode,
    pieces: &[&[u8]],
    deflater: &mut Deflater,
    window: Window,
) -> Option<usize> {
    if let Some(payload) = deflater.deflate(window, pieces) {
        out.reserve(header_len(payload.len()) + payload.len());
        header(out, FIN | RSV1, opcode, payload.len(), 0);
        out.extend_from_slice(payload);
        return Some(payload.len());
    }
    write_pieces(out, opcode, pieces);
    None
}

/// Appends a message of `pieces`, as it is.
pub fn write_pieces(out: &mut Vec<u8>, opcode: Opcode, pieces: &[&[u8]]) {
    let len = pieces.iter().map(|piece| piece.len()).sum();
    out.reserve(header_len(len) + len);
    frame_header(out, opcode, len);
    pieces.iter().for_each(|piece| out.extend_from_slice(piece));
}

/// Appends a text message. `payload` must be UTF-8, which its maker knows and nothing here checks again.
pub fn write_text(out: &mut Vec<u8>, payload: &[u8]) {
    write(out, Opcode::Text, payload);
}

/// Appends a binary message.
pub fn write_binary(out: &mut Vec<u8>, payload: &[u8]) {
    write(out, Opcode::Binary, payload);
}

/// Appends a ping; at most 125 bytes.
pub fn write_ping(out: &mut Vec<u8>, payload: &[u8]) {
    assert!(payload.len() <= CONTROL_PAYLOAD_BYTES_MAX, "the server's own pings are short");
    write(out, Opcode::Ping, payload);
}

/// Appends a pong; at most 125 bytes, as every [`Incoming::Ping`] has.
pub fn write_pong(out: &mut Vec<u8>, payload: &[u8]) {
    assert!(payload.len() <= CONTROL_PAYLOAD_BYTES_MAX, "a pong repeats a ping, which the decoder bounds");
    write(out, Opcode::Pong, payload);
}

/// Appends a close frame. A reason over 123 bytes is cut at a character's end.
pub fn write_close(out: &mut Vec<u8>, code: u16, reason: &str) {
    debug_assert!(close_code_may_be_sent(code), "{code} may not stand on the wire");
    let reason = reason.get(..reason.floor_char_boundary(CONTROL_PAYLOAD_BYTES_MAX - 2)).unwrap_or_default();
    frame_header(out, Opcode::Close, 2 + reason.len());
    out.extend_from_slice(&code.to_be_bytes());
    out.extend_from_slice(reason.as_bytes());
}

/// Appends a close frame without a code: the answer to a peer's close that had none.
pub fn write_close_without_code(out: &mut Vec<u8>) {
    frame_header(out, Opcode::Close, 0);
}

/// Appends a client's frame, masked: for peers in tests, fuzzers and load generators.
pub fn write_masked(out: &mut Vec<u8>, fin: bool, opcode: Opcode, payload: &[u8], mask: [u8; 4]) {
    write_masked_bits(out, if fin { FIN } else { 0 }, opcode, payload, mask);
}

/// The same for the first frame of a compressed message, or all of it: `payload` is deflated already.
pub fn write_masked_deflated(out: &mut Vec<u8>, fin: bool, opcode: Opcode, payload: &[u8], mask: [u8; 4]) {
    write_masked_bits(out, if fin { FIN | RSV1 } else { RSV1 }, opcode, payload, mask);
}

fn write_masked_bits(out: &mut Vec<u8>, first_bits: u8, opcode: Opcode, payload: &[u8], mask: [u8; 4]) {
    header(out, first_bits, opcode, payload.len(), 0x80);
    out.extend_from_slice(&mask);
    let start = out.len();
    out.extend_from_slice(payload);
    if let Some(payload) = out.get_mut(start..) {
        unmask(payload, mask);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Cursor, Read, Write};

    use proptest::prelude::*;
    use sha1::{Digest, Sha1};
    use tungstenite::protocol::Role;
    use tungstenite::protocol::frame::coding::CloseCode;
    use tungstenite::protocol::{CloseFrame, Message as PeerMessage, WebSocket};

    use super::*;

    const LIMITS: Limits = Limits { message_bytes_max: 1 << 20, fragments_max: 64 };
    const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];

    /// What a peer said, owned.
    #[derive(Clone, Debug, Eq, PartialEq)]
    enum Said {
        Text(String),
        Binary(Vec<u8>),
        Ping(Vec<u8>),
        Pong(Vec<u8>),
        Close(Option<(u16, String)>),
    }

    impl Said {
        fn of(incoming: Incoming<'_>) -> Said {
            match incoming {
                Incoming::Text(text) => Said::Text(text.to_owned()),
                Incoming::Binary(bytes) => Said::Binary(bytes.to_vec()),
                Incoming::Ping(bytes) => Said::Ping(bytes.to_vec()),
                Incoming::Pong(bytes) => Said::Pong(bytes.to_vec()),
                Incoming::Close(body) => Said::Close(body.map(|(code, reason)| (code, reason.to_owned()))),
            }
        }
    }

    /// Everything a peer says, and the error that ends it, if one does.
    fn hear(decoder: &mut Decoder, bytes: &[u8], limits: Limits) -> (Vec<Said>, Option<FrameError>) {
        hear_with(decoder, bytes, limits, None)
    }

    /// The same where compression was agreed on, if there is an inflater.
    fn hear_with(
        decoder: &mut Decoder,
        bytes: &[u8],
        limits: Limits,
        mut inflater: Option<&mut Inflater>,
    ) -> (Vec<Said>, Option<FrameError>) {
        let mut bytes = bytes.to_vec();
        let mut input = bytes.as_mut_slice();
        let mut said = Vec::new();
        loop {
            match decoder.next(&mut input, limits, inflater.as_deref_mut()) {
                Ok(Some(incoming)) => said.push(Said::of(incoming)),
                Ok(None) => {
                    assert!(input.is_empty(), "all of the input is read before None");
                    return (said, None);
                }
                Err(error) => return (said, Some(error)),
            }
        }
    }

    fn hear_all(bytes: &[u8], limits: Limits) -> (Vec<Said>, Option<FrameError>) {
        hear(&mut Decoder::new(), bytes, limits)
    }

    /// The same bytes in pieces of the given sizes, over and over.
    fn hear_in_pieces(bytes: &[u8], sizes: &[usize], limits: Limits) -> (Vec<Said>, Option<FrameError>) {
        hear_in_pieces_with(bytes, sizes, limits, None)
    }

    fn hear_in_pieces_with(
        bytes: &[u8],
        sizes: &[usize],
        limits: Limits,
        mut inflater: Option<&mut Inflater>,
    ) -> (Vec<Said>, Option<FrameError>) {
        let mut decoder = Decoder::new();
        let mut all = Vec::new();
        let mut rest = bytes;
        for &size in sizes.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (piece, after) = rest.split_at(size.clamp(1, rest.len()));
            rest = after;
            let (said, error) = hear_with(&mut decoder, piece, limits, inflater.as_deref_mut());
            all.extend(said);
            if error.is_some() {
                assert!(decoder.is_idle(), "an error frees what was begun");
                return (all, error);
            }
        }
        (all, None)
    }

    /// The same bytes where compression was agreed on: whole and byte by byte, which must make no difference.
    fn hear_deflated(bytes: &[u8], limits: Limits) -> (Vec<Said>, Option<FrameError>) {
        let mut inflater = Inflater::default();
        let whole = hear_with(&mut Decoder::new(), bytes, limits, Some(&mut inflater));
        assert_eq!(hear_in_pieces_with(bytes, &[1], limits, Some(&mut inflater)), whole);
        whole
    }

    /// A message's payload, deflated by another's code.
    fn deflated(message: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(message.len() + 100);
        let mut compressor = flate2::Compress::new(flate2::Compression::best(), false);
        compressor.compress_vec(message, &mut out, flate2::FlushCompress::Sync).expect("there is room");
        out.truncate(out.len() - 4);
        out
    }

    fn deflated_frame(fin: bool, opcode: Opcode, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        write_masked_deflated(&mut out, fin, opcode, payload, MASK);
        out
    }

    fn frame(fin: bool, opcode: Opcode, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        write_masked(&mut out, fin, opcode, payload, MASK);
        out
    }

    fn refused(bytes: &[u8]) -> FrameError {
        let (_, whole) = hear_all(bytes, LIMITS);
        let (_, pieces) = hear_in_pieces(bytes, &[1], LIMITS);
        assert_eq!(whole, pieces, "the verdict does not depend on how the bytes were cut");
        whole.expect("these bytes are refused")
    }

    #[test]
    fn the_example_of_the_rfc_is_heard() {
        // RFC 6455 section 5.7: a single-frame masked text message "Hello".
        let bytes = [0x81, 0x85, 0x37, 0xfa, 0x21, 0x3d, 0x7f, 0x9f, 0x4d, 0x51, 0x58];
        assert_eq!(hear_all(&bytes, LIMITS), (vec![Said::Text("Hello".into())], None));
        let mut out = Vec::new();
        write_text(&mut out, b"Hello");
        assert_eq!(out, [0x81, 0x05, 0x48, 0x65, 0x6c, 0x6c, 0x6f]);
    }

    #[test]
    fn an_idle_decoder_is_16_bytes_and_owns_nothing() {
        assert!(size_of::<Decoder>() <= 16, "{}", size_of::<Decoder>());
        let mut decoder = Decoder::new();
        for piece in frame(true, Opcode::Text, b"in pieces").chunks(3) {
            hear(&mut decoder, piece, LIMITS);
        }
        assert!(decoder.is_idle(), "what was begun is freed when it is over");
        let (first, second) = (frame(false, Opcode::Text, b"a"), frame(true, Opcode::Continuation, b"b"));
        hear(&mut decoder, &first, LIMITS);
        assert!(!decoder.is_idle());
        assert_eq!(hear(&mut decoder, &second, LIMITS), (vec![Said::Text("ab".into())], None));
        assert!(decoder.is_idle());
    }

    #[test]
    fn a_whole_frame_is_handed_out_in_place() {
        let mut bytes = frame(true, Opcode::Binary, &[7; 300]);
        let place = bytes.as_ptr_range();
        let mut input = bytes.as_mut_slice();
        let mut decoder = Decoder::new();
        let Ok(Some(Incoming::Binary(payload))) = decoder.next(&mut input, LIMITS, None) else {
            panic!("a binary message")
        };
        assert!(place.contains(&payload.as_ptr()), "no copy was made");
    }

    #[test]
    fn control_frames_stand_between_fragments() {
        let mut bytes = frame(false, Opcode::Text, "grü".as_bytes());
        bytes.extend(frame(true, Opcode::Ping, b"there?"));
        bytes.extend(frame(false, Opcode::Continuation, b""));
        bytes.extend(frame(true, Opcode::Pong, b""));
        bytes.extend(frame(true, Opcode::Continuation, "ße".as_bytes()));
        bytes.extend(frame(true, Opcode::Close, b"\x03\xe8bye"));
        bytes.extend(frame(true, Opcode::Text, b"after the end"));
        let said = vec![
            Said::Ping(b"there?".to_vec()),
            Said::Pong(Vec::new()),
            Said::Text("grüße".into()),
            Said::Close(Some((1000, "bye".into()))),
        ];
        assert_eq!(hear_all(&bytes, LIMITS), (said.clone(), None));
        for size in 1..bytes.len() {
            assert_eq!(hear_in_pieces(&bytes, &[size], LIMITS), (said.clone(), None), "pieces of {size}");
        }
    }

    #[test]
    fn broken_framing_closes_1002() {
        let cases: [(&[u8], FrameError); 13] = [
            (b"\xc1\x80\0\0\0\0", FrameError::ReservedBits),
            (b"\xa1\x80\0\0\0\0", FrameError::ReservedBits),
            (b"\x91\x80\0\0\0\0", FrameError::ReservedBits),
            (b"\x83\x80\0\0\0\0", FrameError::UnknownOpcode { opcode: 3 }),
            (b"\x8b\x80\0\0\0\0", FrameError::UnknownOpcode { opcode: 11 }),
            (b"\x81\x05Hello", FrameError::Unmasked),
            (b"\x09\x80\0\0\0\0", FrameError::FragmentedControl),
            (b"\x89\xfe\0\x7e\0\0\0\0", FrameError::ControlTooLong),
            (b"\x80\x80\0\0\0\0", FrameError::NothingToContinue),
            (b"\x01\x80\0\0\0\0\x81\x80\0\0\0\0", FrameError::MessageWithinMessage),
            (b"\x82\xfe\0\x7d\0\0\0\0", FrameError::LengthNotMinimal),
            (b"\x82\xff\0\0\0\0\0\0\xff\xff\0\0\0\0", FrameError::LengthNotMinimal),
            (b"\x82\xff\x80\0\0\0\0\0\0\0\0\0\0\0", FrameError::LengthOver63Bits),
        ];
        for (bytes, error) in cases {
            assert_eq!(refused(bytes), error);
            assert_eq!(error.close_code(), 1002, "{error}");
        }
    }

    #[test]
    fn compressed_messages_are_inflated() {
        let text = "grüße ".repeat(500);
        let payload = deflated(text.as_bytes());
        assert!(payload.len() < 100);
        let (first, rest) = payload.split_at(10);
        let (second, third) = rest.split_at(0);
        let bytes = [
            deflated_frame(true, Opcode::Text, &payload),
            deflated_frame(true, Opcode::Binary, &deflated(&[7; 9_999])),
            // In fragments, one of them empty, and with a ping and a pong between.
            deflated_frame(false, Opcode::Text, first),
            frame(true, Opcode::Ping, b"there?"),
            frame(false, Opcode::Continuation, second),
            frame(true, Opcode::Pong, b""),
            frame(true, Opcode::Continuation, third),
            // A sender may choose for each message.
            frame(true, Opcode::Text, b"as it is"),
            deflated_frame(true, Opcode::Text, &[0x00]),
            deflated_frame(true, Opcode::Binary, b""),
            deflated_frame(false, Opcode::Text, b""),
            frame(true, Opcode::Continuation, b""),
        ];
        let said = [
            Said::Text(text.clone()),
            Said::Binary(vec![7; 9_999]),
            Said::Ping(b"there?".to_vec()),
            Said::Pong(Vec::new()),
            Said::Text(text),
            Said::Text("as it is".into()),
            Said::Text(String::new()),
            Said::Binary(Vec::new()),
            Said::Text(String::new()),
        ];
        assert_eq!(hear_deflated(&bytes.concat(), LIMITS), (said.to_vec(), None));
    }

    #[test]
    fn the_reserved_bits_mean_something_where_it_was_agreed_on_alone() {
        let hello = [0xf2, 0x48, 0xcd, 0xc9, 0xc9, 0x07, 0x00];
        let compressed = deflated_frame(true, Opcode::Text, &hello);
        assert_eq!(hear_deflated(&compressed, LIMITS), (vec![Said::Text("Hello".into())], None));
        assert_eq!(refused(&compressed), FrameError::ReservedBits);
        let begun = || deflated_frame(false, Opcode::Text, &hello);
        for bytes in [
            // On a control frame, on a continuation, beside the others, and the others alone.
            deflated_frame(true, Opcode::Ping, b""),
            deflated_frame(true, Opcode::Close, b""),
            [begun(), deflated_frame(true, Opcode::Continuation, b"")].concat(),
            [frame(false, Opcode::Text, b"a"), deflated_frame(true, Opcode::Continuation, &hello)].concat(),
            b"\xe1\x80\0\0\0\0".to_vec(),
            b"\xa1\x80\0\0\0\0".to_vec(),
            b"\x91\x80\0\0\0\0".to_vec(),
        ] {
            assert_eq!(hear_deflated(&bytes, LIMITS), (vec![], Some(FrameError::ReservedBits)), "{bytes:x?}");
        }
    }

    #[test]
    fn a_compressed_payload_that_is_none_closes_1007() {
        let of = |payload: &[u8]| hear_deflated(&deflated_frame(true, Opcode::Text, payload), LIMITS);
        assert_eq!(of(b"not deflated"), (vec![], Some(FrameError::InvalidDeflate)));
        assert_eq!(FrameError::InvalidDeflate.close_code(), 1007);
        let payload = deflated(b"a text that is cut");
        assert_eq!(of(&payload[..payload.len() / 2]), (vec![], Some(FrameError::InvalidDeflate)));
        assert_eq!(of(&deflated(b"not UTF-8: \xff")), (vec![], Some(FrameError::InvalidUtf8)));
        assert_eq!(of(&deflated(b"cut \xe2\x82")), (vec![], Some(FrameError::InvalidUtf8)));
        let binary = deflated_frame(true, Opcode::Binary, &deflated(b"\xff"));
        assert_eq!(hear_deflated(&binary, LIMITS), (vec![Said::Binary(vec![0xff])], None));
    }

    #[test]
    fn a_compressed_message_is_limited_by_what_it_inflates_to() {
        let limits = Limits { message_bytes_max: 1000, fragments_max: 8 };
        let too_large = FrameError::MessageTooLarge { limit: 1000 };
        let of = |message: &[u8]| hear_deflated(&deflated_frame(true, Opcode::Binary, &deflated(message)), limits);
        assert_eq!(of(&[5; 1000]), (vec![Said::Binary(vec![5; 1000])], None));
        assert_eq!(of(&[5; 1001]), (vec![], Some(too_large)));
        assert_eq!(of(&vec![5; 1 << 20]), (vec![], Some(too_large)));
        // One that compressing makes larger is still within the limit.
        let noise: Vec<u8> = (0u32..1000).flat_map(|n| Sha1::digest(n.to_be_bytes())).take(1000).collect();
        assert!(deflated(&noise).len() > 1000);
        assert_eq!(of(&noise), (vec![Said::Binary(noise)], None));
        // What could not be within it is refused by its header.
        let over = deflated_frame(true, Opcode::Binary, &[0; 1190]);
        assert_eq!(hear_deflated(&over[..4], limits), (vec![], Some(too_large)));
        let mut parts = deflated_frame(false, Opcode::Binary, &[0; 600]);
        parts.extend(frame(true, Opcode::Continuation, &[0; 590]));
        assert_eq!(hear_deflated(&parts, limits), (vec![], Some(too_large)));
        // Fragments are counted as ever.
        let mut parts = deflated_frame(false, Opcode::Binary, b"");
        parts.extend(frame(false, Opcode::Continuation, b"").repeat(8));
        assert_eq!(hear_deflated(&parts, limits).1, Some(FrameError::TooManyFragments { limit: 8 }));
    }

    #[test]
    fn two_connections_that_send_by_turns_share_an_inflater() {
        let mut inflater = Inflater::default();
        let messages = ["one ".repeat(300), "two ".repeat(300)];
        let bytes = messages.clone().map(|text| deflated_frame(true, Opcode::Text, &deflated(text.as_bytes())));
        let mut decoders = [Decoder::new(), Decoder::new()];
        let mut said = Vec::new();
        for at in 0..bytes[0].len().max(bytes[1].len()) {
            for (decoder, bytes) in decoders.iter_mut().zip(&bytes) {
                let piece = bytes.get(at..at + 1).unwrap_or_default();
                said.extend(hear_with(decoder, piece, LIMITS, Some(&mut inflater)).0);
            }
        }
        assert_eq!(said, messages.map(Said::Text));
        assert!(decoders.iter().all(Decoder::is_idle));
    }

    #[test]
    fn what_is_written_deflated_is_heard_again() {
        let mut deflater = Deflater::default();
        let text = "grüße ".repeat(50);
        let (first, rest) = text.split_at(20);
        for (pieces, smaller) in [(vec![first.as_bytes(), rest.as_bytes()], true), (vec![&b"short"[..]], false)] {
            let mut out = Vec::new();
            let to = write_deflated(&mut out, Opcode::Text, &pieces, &mut deflater, Window::Bits15);
            let whole = pieces.concat();
            let mut plain = Vec::new();
            write_text(&mut plain, &whole);
            assert_eq!(to.is_some(), smaller);
            if let Some(to) = to {
                assert_eq!((out[0], out.len()), (0xc1, 2 + to));
                let mut inflater = Inflater::default();
                assert_eq!(inflater.inflate(&out[2..], 1_000), Ok(&whole[..]));
            } else {
                assert_eq!(out, plain);
            }
        }
    }

    #[test]
    fn a_refusal_is_final() {
        let mut decoder = Decoder::new();
        let (_, error) = hear(&mut decoder, b"\x81\x05Hello", LIMITS);
        assert_eq!(error, Some(FrameError::Unmasked));
        let (said, again) = hear(&mut decoder, &frame(true, Opcode::Text, b"hello?"), LIMITS);
        assert_eq!((said, again), (vec![], Some(FrameError::Unmasked)));
    }

    #[test]
    fn a_control_frame_has_at_most_125_bytes() {
        let (said, error) = hear_all(&frame(true, Opcode::Ping, &[1; 125]), LIMITS);
        assert_eq!((said, error), (vec![Said::Ping(vec![1; 125])], None));
        assert_eq!(refused(&frame(true, Opcode::Ping, &[1; 126])), FrameError::ControlTooLong);
    }

    #[test]
    fn a_message_over_its_limit_is_refused_by_its_header() {
        let limits = Limits { message_bytes_max: 1000, fragments_max: 8 };
        let (said, error) = hear_all(&frame(true, Opcode::Binary, &[1; 1000]), limits);
        assert_eq!((said.len(), error), (1, None));
        let over = frame(true, Opcode::Binary, &[1; 1001]);
        let (header, _) = over.split_at(4);
        let too_large = FrameError::MessageTooLarge { limit: 1000 };
        assert_eq!(hear_all(header, limits), (vec![], Some(too_large)), "before the mask and the payload");
        assert_eq!(too_large.close_code(), 1009);
        // The largest length that can be declared costs nothing.
        assert_eq!(hear_all(b"\x82\xff\x7f\xff\xff\xff\xff\xff\xff\xff", limits), (vec![], Some(too_large)));
        // So it is with the sum of fragments.
        let mut parts = frame(false, Opcode::Binary, &[1; 600]);
        parts.extend(frame(true, Opcode::Continuation, &[1; 400]));
        assert_eq!(hear_all(&parts, limits), (vec![Said::Binary(vec![1; 1000])], None));
        let mut parts = frame(false, Opcode::Binary, &[1; 600]);
        parts.extend(frame(true, Opcode::Continuation, &[1; 401]));
        assert_eq!(hear_all(&parts, limits), (vec![], Some(too_large)));
    }

    #[test]
    fn a_message_has_at_most_its_number_of_fragments() {
        let limits = Limits { message_bytes_max: 1000, fragments_max: 3 };
        let mut bytes = frame(false, Opcode::Text, b"a");
        bytes.extend(frame(false, Opcode::Continuation, b"b"));
        let mut whole = bytes.clone();
        whole.extend(frame(true, Opcode::Continuation, b"c"));
        assert_eq!(hear_all(&whole, limits), (vec![Said::Text("abc".into())], None));
        bytes.extend(frame(false, Opcode::Continuation, b"c"));
        // Senders that cut a message into equal pieces end it so.
        let mut ended = bytes.clone();
        ended.extend(frame(true, Opcode::Continuation, b""));
        assert_eq!(hear_all(&ended, limits), (vec![Said::Text("abc".into())], None));
        let mut over = bytes.clone();
        over.extend(frame(false, Opcode::Continuation, b""));
        assert_eq!(hear_all(&over, limits), (vec![], Some(FrameError::TooManyFragments { limit: 3 })));
        bytes.extend(frame(true, Opcode::Continuation, b"d"));
        let error = FrameError::TooManyFragments { limit: 3 };
        assert_eq!(hear_all(&bytes, limits), (vec![], Some(error)));
        assert_eq!(error.close_code(), 1009);
    }

    #[test]
    fn a_declared_length_reserves_nothing() {
        let mut decoder = Decoder::new();
        let mut header = frame(true, Opcode::Binary, &[0; 1 << 20]);
        header.truncate(20);
        hear(&mut decoder, &header, LIMITS);
        let message = decoder.partial.as_ref().and_then(|partial| partial.message.as_ref()).expect("it is begun");
        let Body::Binary(bytes) = &message.body else { panic!("it is binary") };
        assert_eq!((bytes.len(), bytes.capacity()), (6, 6));
    }

    #[test]
    fn a_message_never_takes_more_than_its_limit() {
        let limits = Limits { message_bytes_max: 1000, fragments_max: 1000 };
        let mut decoder = Decoder::new();
        hear(&mut decoder, &frame(false, Opcode::Text, b""), limits);
        for _ in 0..100 {
            hear(&mut decoder, &frame(false, Opcode::Continuation, &[b'x'; 10]), limits);
            let message = decoder.partial.as_ref().and_then(|partial| partial.message.as_ref()).expect("it is begun");
            let Body::Text { text, .. } = &message.body else { panic!("it is text") };
            assert!(text.capacity() <= 1000, "{}", text.capacity());
        }
        let (said, error) = hear(&mut decoder, &frame(true, Opcode::Continuation, b""), limits);
        assert_eq!((said, error), (vec![Said::Text("x".repeat(1000))], None));
    }

    #[test]
    fn text_that_is_not_utf8_closes_1007_at_the_first_bad_byte() {
        // (text, how many of its bytes may pass before the refusal)
        let cases: [(&[u8], usize); 9] = [
            (b"ab\xffcd", 2),
            (b"\xce\xba\xe1\xbd\xb9\xcf\x83\xce\xbc\xce\xb5\xf4\x90\x80\x80edited", 12), // over U+10FFFF
            (b"\xed\xa0\x80edited", 1),                                                  // a surrogate
            (b"\xc0\xaf", 0),                                                            // overlong
            (b"\xe0\x80\xaf", 1),
            (b"\xf0\x80\x80\xaf", 1),
            (b"\xf8\x88\x80\x80\x80", 0),
            (b"\x80", 0),
            (b"\xc3(", 1),
        ];
        for (text, passes) in cases {
            assert_eq!(refused(&frame(true, Opcode::Text, text)), FrameError::InvalidUtf8);
            // Within a frame of which much more is to come, byte by byte: refused at once.
            let mut long = text.to_vec();
            long.resize(1000, b'.');
            let bytes = frame(true, Opcode::Text, &long);
            let mut decoder = Decoder::new();
            let (header, payload) = bytes.split_at(8);
            assert_eq!(hear(&mut decoder, header, LIMITS).1, None);
            let heard = payload.iter().position(|byte| hear(&mut decoder, &[*byte], LIMITS).1.is_some());
            assert_eq!(heard, Some(passes), "{text:x?}");
        }
        assert_eq!(FrameError::InvalidUtf8.close_code(), 1007);
        assert_eq!(refused(&frame(true, Opcode::Text, b"cut \xe2\x82")), FrameError::InvalidUtf8);
        let mut parts = frame(false, Opcode::Text, b"cut \xe2\x82");
        parts.extend(frame(true, Opcode::Continuation, b""));
        assert_eq!(refused(&parts), FrameError::InvalidUtf8);
        // What is no text may hold any byte.
        assert_eq!(hear_all(&frame(true, Opcode::Binary, b"\xff"), LIMITS).1, None);
    }

    #[test]
    fn close_frames_say_what_may_be_said() {
        let close = |body: &[u8]| frame(true, Opcode::Close, body);
        assert_eq!(hear_all(&close(b""), LIMITS), (vec![Said::Close(None)], None));
        assert_eq!(refused(&close(b"\x03")), FrameError::CloseBodyTooShort);
        assert_eq!(refused(&close(b"\x03\xe8\xff")), FrameError::InvalidUtf8);
        assert_eq!(FrameError::CloseBodyTooShort.close_code(), 1002);
        for code in [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999] {
            let (said, error) = hear_all(&close(&u16::to_be_bytes(code)), LIMITS);
            assert_eq!((said, error), (vec![Said::Close(Some((code, String::new())))], None));
        }
        for code in [0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535] {
            assert_eq!(refused(&close(&u16::to_be_bytes(code))), FrameError::InvalidCloseCode { code });
        }
        assert_eq!(FrameError::InvalidCloseCode { code: 0 }.close_code(), 1002);
    }

    #[test]
    fn lengths_take_the_fewest_bytes() {
        for (len, bytes) in [(0, 2), (125, 2), (126, 4), (65_535, 4), (65_536, 10)] {
            let mut out = Vec::new();
            frame_header(&mut out, Opcode::Binary, len);
            assert_eq!((out.len(), header_len(len)), (bytes, bytes), "{len}");
            let payload = vec![9; len];
            let (said, error) = hear_all(&frame(true, Opcode::Binary, &payload), LIMITS);
            assert_eq!((said, error), (vec![Said::Binary(payload)], None));
        }
    }

    #[test]
    fn a_long_reason_is_cut_at_a_character() {
        let mut out = Vec::new();
        write_close(&mut out, 1011, &"é".repeat(100));
        assert_eq!(out.len(), 2 + 2 + 122, "61 characters of 2 bytes fit into 123");
        assert!(close_body(out.get(2..).expect("a body")).is_ok());
        out.clear();
        write_close_without_code(&mut out);
        assert_eq!(out, [0x88, 0x00]);
    }

    #[test]
    fn unmasking_is_the_same_at_every_length() {
        for len in 0..40usize {
            let plain: Vec<u8> = (0u8..).take(len).collect();
            let mut masked = plain.clone();
            unmask(&mut masked, MASK);
            let one_by_one: Vec<u8> = plain.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask).collect();
            assert_eq!(masked, one_by_one, "{len}");
        }
    }

    /// A socket of an independent implementation, whose far end is a test.
    struct Pipe {
        incoming: Cursor<Vec<u8>>,
        outgoing: Vec<u8>,
    }

    impl Read for Pipe {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            match self.incoming.read(buffer)? {
                0 => Err(io::ErrorKind::WouldBlock.into()),
                read => Ok(read),
            }
        }
    }

    impl Write for Pipe {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.outgoing.write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn peer(incoming: Vec<u8>) -> WebSocket<Pipe> {
        WebSocket::from_raw_socket(Pipe { incoming: Cursor::new(incoming), outgoing: Vec::new() }, Role::Client, None)
    }

    #[test]
    fn another_implementation_understands_what_is_written() {
        let mut out = Vec::new();
        write_text(&mut out, "grüße".as_bytes());
        write_binary(&mut out, &[5; 70_000]);
        write_ping(&mut out, b"there?");
        write_pong(&mut out, b"");
        write_close(&mut out, 4001, "token_expired");
        let mut peer = peer(out);
        assert_eq!(peer.read().expect("text"), PeerMessage::text("grüße"));
        assert_eq!(peer.read().expect("binary"), PeerMessage::binary(vec![5; 70_000]));
        assert_eq!(peer.read().expect("ping"), PeerMessage::Ping(b"there?".to_vec().into()));
        assert_eq!(peer.read().expect("pong"), PeerMessage::Pong(Vec::new().into()));
        let close = CloseFrame { code: CloseCode::Library(4001), reason: "token_expired".into() };
        assert_eq!(peer.read().expect("close"), PeerMessage::Close(Some(close)));
    }

    fn said() -> impl Strategy<Value = Said> {
        prop_oneof![
            ".{0,200}".prop_map(Said::Text),
            prop::collection::vec(any::<u8>(), 0..300).prop_map(Said::Binary),
            prop::collection::vec(any::<u8>(), 0..=125).prop_map(Said::Ping),
            prop::collection::vec(any::<u8>(), 0..=125).prop_map(Said::Pong),
        ]
    }

    /// The frames of a message, cut at each of `cuts` that lies within it.
    fn frames_of(said: &Said, cuts: &[usize], mask: [u8; 4], out: &mut Vec<u8>) {
        let (opcode, payload): (_, &[u8]) = match said {
            Said::Text(text) => (Opcode::Text, text.as_bytes()),
            Said::Binary(bytes) => (Opcode::Binary, bytes),
            Said::Ping(bytes) => return write_masked(out, true, Opcode::Ping, bytes, mask),
            Said::Pong(bytes) => return write_masked(out, true, Opcode::Pong, bytes, mask),
            Said::Close(_) => return write_masked(out, true, Opcode::Close, b"", mask),
        };
        let mut rest = payload;
        let mut opcode = opcode;
        for &cut in cuts.iter().filter(|&&cut| cut < payload.len()) {
            let (fragment, after) = rest.split_at(cut.min(rest.len()));
            write_masked(out, false, opcode, fragment, mask);
            (opcode, rest) = (Opcode::Continuation, after);
        }
        write_masked(out, true, opcode, rest, mask);
    }

    proptest! {
        #[test]
        fn what_is_said_is_heard_however_it_is_cut(
            messages in prop::collection::vec((said(), prop::collection::vec(0usize..100, 0..4), any::<[u8; 4]>()), 1..6),
            sizes in prop::collection::vec(1usize..64, 1..8),
        ) {
            let mut bytes = Vec::new();
            messages.iter().for_each(|(said, cuts, mask)| frames_of(said, cuts, *mask, &mut bytes));
            let expected: Vec<Said> = messages.into_iter().map(|(said, _, _)| said).collect();
            prop_assert_eq!(hear_all(&bytes, LIMITS), (expected.clone(), None));
            prop_assert_eq!(hear_in_pieces(&bytes, &sizes, LIMITS), (expected, None));
        }

        #[test]
        fn damaged_bytes_get_the_same_verdict_however_they_are_cut(
            messages in prop::collection::vec((said(), prop::collection::vec(0usize..100, 0..4), any::<[u8; 4]>()), 1..6),
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
            sizes in prop::collection::vec(1usize..64, 1..8),
        ) {
            let limits = Limits { message_bytes_max: 150, fragments_max: 3 };
            let mut bytes = Vec::new();
            messages.iter().for_each(|(said, cuts, mask)| frames_of(said, cuts, *mask, &mut bytes));
            for (place, byte) in damage {
                *place.get_mut(&mut bytes) = byte;
            }
            prop_assert_eq!(hear_all(&bytes, limits), hear_in_pieces(&bytes, &sizes, limits));
        }

        #[test]
        fn compressed_or_not_what_is_said_is_heard_however_it_is_cut(
            messages in prop::collection::vec((said(), any::<bool>(), 0usize..300, any::<[u8; 4]>()), 1..6),
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..3),
            sizes in prop::collection::vec(1usize..64, 1..8),
        ) {
            let mut bytes = Vec::new();
            for (said, compressed, cut, mask) in &messages {
                let (opcode, message): (_, &[u8]) = match said {
                    Said::Text(text) if *compressed => (Opcode::Text, text.as_bytes()),
                    Said::Binary(bytes) if *compressed => (Opcode::Binary, bytes),
                    _ => {
                        frames_of(said, &[*cut], *mask, &mut bytes);
                        continue;
                    }
                };
                let payload = deflated(message);
                let (first, second) = payload.split_at((*cut).min(payload.len()));
                write_masked_deflated(&mut bytes, false, opcode, first, *mask);
                write_masked(&mut bytes, true, Opcode::Continuation, second, *mask);
            }
            let mut inflater = Inflater::default();
            let expected: Vec<Said> = messages.into_iter().map(|(said, ..)| said).collect();
            let whole = hear_with(&mut Decoder::new(), &bytes, LIMITS, Some(&mut inflater));
            prop_assert_eq!(whole, (expected.clone(), None));
            let pieces = hear_in_pieces_with(&bytes, &sizes, LIMITS, Some(&mut inflater));
            prop_assert_eq!(pieces, (expected, None));
            // Damaged, they get the same verdict however they are cut.
            for (place, byte) in damage {
                *place.get_mut(&mut bytes) = byte;
            }
            let limits = Limits { message_bytes_max: 150, fragments_max: 3 };
            let whole = hear_with(&mut Decoder::new(), &bytes, limits, Some(&mut inflater));
            prop_assert_eq!(hear_in_pieces_with(&bytes, &sizes, limits, Some(&mut inflater)), whole);
        }

        #[test]
        fn another_implementation_is_heard(messages in prop::collection::vec(said(), 1..6)) {
            let mut peer = peer(Vec::new());
            for said in &messages {
                let message = match said {
                    Said::Text(text) => PeerMessage::text(text.clone()),
                    Said::Binary(bytes) => PeerMessage::binary(bytes.clone()),
                    Said::Ping(bytes) => PeerMessage::Ping(bytes.clone().into()),
                    Said::Pong(bytes) => PeerMessage::Pong(bytes.clone().into()),
                    Said::Close(_) => PeerMessage::Close(None),
                };
                peer.send(message).expect("a pipe takes everything");
            }
            peer.close(Some(CloseFrame { code: CloseCode::Normal, reason: "done".into() })).expect("it is open");
            let mut expected = messages;
            expected.push(Said::Close(Some((1000, "done".into()))));
            prop_assert_eq!(hear_all(&peer.get_ref().outgoing, LIMITS), (expected, None));
        }
    }
}
