//! Content codings: the bytes of a body as sent -> as meant, never more than allowed.
//!
//! Source: RFC 9110 section 8.4.1; RFC 1952 (gzip, several members too), RFC 1950 (zlib), RFC 1951 (raw deflate, which some
//! servers send for `deflate`).
//! Memory: the body, one inflater, and 8 KiB of stack. A bomb stops at the first byte over the limit.
//! Errors: [`ResponseError`].  Not here: framing.

use flate2::{Decompress, FlushDecompress, Status};

use super::ResponseError;
use crate::limits::GZIP_MEMBERS_MAX;

/// Bytes inflated at a time.
const STEP_BYTES: usize = 8 << 10;
/// Largest window of deflate, as a power of two.
const WINDOW_BITS: u8 = 15;

/// How a body is coded.
pub(super) enum Coding {
    Identity,
    /// In a way not known, and of no interest.
    Dropped,
    Gzip(Inflater),
    /// `deflate`, whose first bytes tell which of the two it is.
    DeflateUnseen {
        first: Option<u8>,
    },
    Deflate(Inflater),
}

pub(super) struct Inflater {
    stream: Box<Decompress>,
    ended: bool,
    members: u16,
}

impl Coding {
    /// The coding of that name, where it is one that is undone.
    pub(super) fn named(name: &[u8]) -> Option<Coding> {
        let is = |names: &[&str]| names.iter().any(|own| name.eq_ignore_ascii_case(own.as_bytes()));
        if is(&["gzip", "x-gzip"]) {
            Some(Coding::Gzip(Inflater::new(Decompress::new_gzip(WINDOW_BITS))))
        } else if is(&["deflate"]) {
            Some(Coding::DeflateUnseen { first: None })
        } else {
            None
        }
    }

    /// How many bytes may come for a body of at most `body_bytes_max`.
    pub(super) fn wire_bytes_max(&self, body_bytes_max: u64) -> u64 {
        match self {
            Coding::Identity => body_bytes_max,
            _ => body_bytes_max.saturating_add(body_bytes_max / 8).saturating_add(4096),
        }
    }
}

/// A body while it is decoded.
pub(super) struct Content {
    coding: Coding,
    body: Vec<u8>,
    body_bytes_max: u64,
    wire_bytes_left: u64,
    /// Whether any byte has come: a body without one is whole in every coding.
    begun: bool,
}

impl Content {
    pub(super) fn new(coding: Coding, body_bytes_max: u64) -> Content {
        let wire_bytes_left = coding.wire_bytes_max(body_bytes_max);
        Content { coding, body: Vec::new(), body_bytes_max, wire_bytes_left, begun: false }
    }

    pub(super) fn body_bytes(&self) -> u64 {
        self.body.len() as u64
    }

    pub(super) fn take_body(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.body)
    }

    /// Decodes what came.
    pub(super) fn push(&mut self, data: &[u8]) -> Result<(), ResponseError> {
        let over = ResponseError::TooLarge { limit: self.body_bytes_max };
        let (data, is_over) = match usize::try_from(self.wire_bytes_left).ok().and_then(|left| data.get(..left)) {
            Some(allowed) => (allowed, allowed.len() < data.len()),
            None => (data, false),
        };
        self.wire_bytes_left -= data.len() as u64;
        self.begun |= !data.is_empty();
        self.decode(data)?;
        if is_over { Err(over) } else { Ok(()) }
    }

    fn decode(&mut self, mut data: &[u8]) -> Result<(), ResponseError> {
        if let Coding::DeflateUnseen { first } = &mut self.coding {
            let (head, second) = match (*first, data) {
                (_, []) => return Ok(()),
                (None, [only]) => {
                    *first = Some(*only);
                    return Ok(());
                }
                (None, [head, second, ..]) => (*head, *second),
                (Some(head), [second, ..]) => (head, *second),
            };
            // RFC 1950 2.2: method 8, and a check that makes the two bytes a multiple of 31.
            let is_zlib = head & 0x0f == 8 && (u16::from(head) << 8 | u16::from(second)).is_multiple_of(31);
            let held = first.take();
            self.coding = Coding::Deflate(Inflater::new(Decompress::new(is_zlib)));
            if let Some(held) = held {
                self.decode(&[held])?;
            }
        }
        match &mut self.coding {
            Coding::Identity => self.body.extend_from_slice(data),
            Coding::Dropped | Coding::DeflateUnseen { .. } => {}
            Coding::Gzip(inflater) => {
                while !data.is_empty() {
                    if inflater.ended {
                        inflater.next_member()?;
                    }
                    data = inflater.inflate(data, &mut self.body, self.body_bytes_max)?;
                }
            }
            Coding::Deflate(inflater) => {
                let rest = inflater.inflate(data, &mut self.body, self.body_bytes_max)?;
                if !rest.is_empty() {
                    return Err(ResponseError::Corrupt);
                }
            }
        }
        Ok(())
    }

    /// Tells that nothing more comes.
    pub(super) fn finish(&self) -> Result<(), ResponseError> {
        match &self.coding {
            Coding::Gzip(inflater) | Coding::Deflate(inflater) if !inflater.ended && self.begun => {
                Err(ResponseError::CorruptEnd)
            }
            Coding::DeflateUnseen { first: Some(_) } => Err(ResponseError::CorruptEnd),
            _ => Ok(()),
        }
    }
}

impl Inflater {
    fn new(stream: Decompress) -> Inflater {
        Inflater { stream: Box::new(stream), ended: false, members: 1 }
    }

    /// RFC 1952 2.2: a gzip file is a series of members. Whatever else follows one is taken for a broken one.
    fn next_member(&mut self) -> Result<(), ResponseError> {
        if self.members == GZIP_MEMBERS_MAX {
            return Err(ResponseError::Corrupt);
        }
        self.members += 1;
        self.ended = false;
        *self.stream = Decompress::new_gzip(WINDOW_BITS);
        Ok(())
    }

    /// Appends what `data` inflates to; what stands behind the stream's end.
    fn inflate<'d>(
        &mut self,
        mut data: &'d [u8],
        body: &mut Vec<u8>,
        body_bytes_max: u64,
    ) -> Result<&'d [u8], ResponseError> {
        let mut step = [0u8; STEP_BYTES];
        while !self.ended {
            // One byte more than allowed is asked for, so that a body of just the limit is told from a larger one, and an
            // error behind the limit is never what is reported, however the bytes were split.
            let room = body_bytes_max.saturating_sub(body.len() as u64).saturating_add(1);
            let room = usize::try_from(room).unwrap_or(STEP_BYTES).min(STEP_BYTES);
            let Some(space) = step.get_mut(..room) else {
                break;
            };
            let before = (self.stream.total_in(), self.stream.total_out());
            let status = self.stream.decompress(data, space, FlushDecompress::None);
            let advanced = |now: u64, before: u64| usize::try_from(now - before).unwrap_or(0);
            let (read, written) =
                (advanced(self.stream.total_in(), before.0), advanced(self.stream.total_out(), before.1));
            body.extend_from_slice(space.get(..written).unwrap_or_default());
            data = data.get(read..).unwrap_or_default();
            if body.len() as u64 > body_bytes_max {
                return Err(ResponseError::TooLarge { limit: body_bytes_max });
            }
            match status {
                Ok(Status::StreamEnd) => self.ended = true,
                Ok(Status::Ok | Status::BufError) if data.is_empty() && written < room => break,
                Ok(Status::Ok | Status::BufError) if read > 0 || written > 0 => {}
                Ok(Status::Ok | Status::BufError) | Err(_) => return Err(ResponseError::Corrupt),
            }
        }
        Ok(data)
    }
}
