//! As much of DER as keys are written in: one element after the other, each in the one way it may be written.
//!
//! Source: ITU-T X.690 sections 8 and 10. Memory: borrows the bytes. Errors: `None`, for whatever is not DER or not what
//! was asked for. Not here: what the elements mean (`public_key`, `signing`).

/// INTEGER.
pub(super) const INTEGER: u8 = 0x02;
/// BIT STRING.
pub(super) const BIT_STRING: u8 = 0x03;
/// OCTET STRING.
pub(super) const OCTET_STRING: u8 = 0x04;
/// OBJECT IDENTIFIER.
pub(super) const OBJECT_IDENTIFIER: u8 = 0x06;
/// SEQUENCE, constructed.
pub(super) const SEQUENCE: u8 = 0x30;
/// `[n]`, constructed.
pub(super) const fn tagged(n: u8) -> u8 {
    0xa0 | n
}

/// Elements that follow one another.
#[derive(Clone, Copy, Debug)]
pub(super) struct Der<'a>(&'a [u8]);

impl<'a> Der<'a> {
    /// The elements that `bytes` hold.
    pub(super) fn new(bytes: &'a [u8]) -> Der<'a> {
        Der(bytes)
    }

    /// Whether there is none left.
    pub(super) fn is_empty(self) -> bool {
        self.0.is_empty()
    }

    /// Takes the next element, which must have this tag: its contents.
    pub(super) fn take(&mut self, tag: u8) -> Option<&'a [u8]> {
        let (found, contents) = self.any()?;
        (found == tag).then_some(contents)
    }

    /// Takes the next element if it has this tag.
    pub(super) fn take_if(&mut self, tag: u8) -> Option<&'a [u8]> {
        if self.0.first() == Some(&tag) { self.take(tag) } else { None }
    }

    /// Takes the next element, which must have this tag: all of it, tag and length included.
    pub(super) fn whole(&mut self, tag: u8) -> Option<&'a [u8]> {
        let before = self.0;
        self.take(tag)?;
        before.get(..before.len() - self.0.len())
    }

    /// Takes the next element, which must be a sequence: its elements.
    pub(super) fn sequence(&mut self) -> Option<Der<'a>> {
        self.take(SEQUENCE).map(Der)
    }

    /// Takes the next element, which must be a whole number above zero: big-endian, without leading zeros.
    pub(super) fn positive(&mut self) -> Option<&'a [u8]> {
        match self.take(INTEGER)? {
            // A zero stands before a first bit that is set, and nowhere else.
            [0, rest @ ..] if rest.first().is_some_and(|&first| first >= 0x80) => Some(rest),
            number @ [0x01..=0x7f, ..] => Some(number),
            _ => None,
        }
    }

    /// Takes the next element, which must be a bit string of whole bytes: the bytes.
    pub(super) fn bit_string(&mut self) -> Option<&'a [u8]> {
        match self.take(BIT_STRING)? {
            [0, bytes @ ..] => Some(bytes),
            _ => None,
        }
    }

    /// Takes the next element, whatever it is: its tag and its contents.
    pub(super) fn any(&mut self) -> Option<(u8, &'a [u8])> {
        let (&tag, rest) = self.0.split_first()?;
        // A tag of more bytes stands in no key.
        if tag & 0x1f == 0x1f {
            return None;
        }
        let (&first, rest) = rest.split_first()?;
        let (length, rest) = match first {
            0..=0x7f => (usize::from(first), rest),
            0x81..=0x83 => {
                let (digits, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
                let length = digits.iter().fold(0usize, |length, &digit| length << 8 | usize::from(digit));
                // X.690 10.1: in as few bytes as it takes.
                let is_shortest = length > 0x7f && digits.first() != Some(&0);
                (is_shortest.then_some(length)?, rest)
            }
            _ => return None,
        };
        let (contents, rest) = rest.split_at_checked(length)?;
        self.0 = rest;
        Some((tag, contents))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_taken_one_after_the_other() {
        let mut der = Der::new(b"\x30\x05\x02\x01\x07\x05\x00\x03\x02\x00\xff\xa0\x00");
        let mut inner = der.sequence().unwrap();
        assert_eq!(inner.positive(), Some(&b"\x07"[..]));
        assert_eq!(inner.take_if(SEQUENCE), None);
        assert_eq!(inner.any(), Some((5, &b""[..])));
        assert!(inner.is_empty());
        assert_eq!(der.bit_string(), Some(&b"\xff"[..]));
        assert_eq!(der.take_if(tagged(0)), Some(&b""[..]));
        assert!(der.is_empty() && der.any().is_none());
        assert_eq!(Der::new(b"\x05\x01\xff\x05\x00").whole(5), Some(&b"\x05\x01\xff"[..]));
    }

    #[test]
    fn a_length_is_written_in_one_way() {
        let of = |head: &[u8], length: usize| {
            let bytes = [head, &vec![1; length]].concat();
            Der::new(&bytes).any().map(|(_, contents)| contents.len())
        };
        assert_eq!(of(b"\x04\x7f", 0x7f), Some(0x7f));
        assert_eq!(of(b"\x04\x81\x80", 0x80), Some(0x80));
        assert_eq!(of(b"\x04\x82\x01\x00", 0x100), Some(0x100));
        assert_eq!(of(b"\x04\x83\x01\x00\x00", 0x1_0000), Some(0x1_0000));
        let wrong: [&[u8]; 6] =
            [b"\x04\x81\x7f", b"\x04\x82\x00\x80", b"\x04\x80", b"\x04\x84\x01\x00\x00\x00", b"\x04\x85", b"\x1f\x01"];
        for head in wrong {
            assert_eq!(of(head, 0x200), None, "{head:x?}");
        }
        assert_eq!(of(b"\x04\x05", 4), None, "cut short");
        assert_eq!([of(b"", 0), of(b"\x04", 0)], [None, None]);
    }

    #[test]
    fn a_whole_number_is_above_zero_and_written_in_one_way() {
        let number = |bytes: &'static [u8]| Der::new(bytes).positive();
        assert_eq!(number(b"\x02\x02\x00\x80"), Some(&b"\x80"[..]));
        assert_eq!(number(b"\x02\x02\x01\x00"), Some(&b"\x01\x00"[..]));
        let wrong: [&[u8]; 5] =
            [b"\x02\x00", b"\x02\x01\x00", b"\x02\x01\x80", b"\x02\x02\x00\x7f", b"\x02\x03\x00\x00\x80"];
        for bytes in wrong {
            assert_eq!(number(bytes), None, "{bytes:x?}");
        }
        assert_eq!(Der::new(b"\x03\x02\x01\xfe").bit_string(), None, "not of whole bytes");
        assert_eq!(Der::new(b"\x03\x00").bit_string(), None);
    }
}
