//! A value that must never be seen: it prints `***` and is compared in constant time.
//!
//! Memory: the bytes themselves, shared. Not here: where secrets come from (`config`) and what they are for.

use std::fmt;
use std::sync::Arc;

/// Bytes that no output may show: a key, a header value, a token. Cloning shares them.
#[derive(Clone, Default, Eq)]
pub struct Secret(Arc<[u8]>);

impl Secret {
    /// Takes `bytes` as they are.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Secret {
        Secret(Arc::from(bytes.into()))
    }

    /// What a file holds. Editors and `echo` end a text with a newline that is no part of a secret; the last byte of anything
    /// else is part of it, whichever it is.
    pub fn of_file(mut bytes: Vec<u8>) -> Secret {
        if str::from_utf8(&bytes).is_ok() && bytes.ends_with(b"\n") {
            bytes.pop();
            if bytes.ends_with(b"\r") {
                bytes.pop();
            }
        }
        Secret::new(bytes)
    }

    /// The bytes. The name is long so that each use stands out in review: they go to a peer or a cipher, nowhere else.
    pub fn expose_secret(&self) -> &[u8] {
        &self.0
    }

    /// How many bytes there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Secret) -> bool {
        // The time taken depends on the lengths alone, which are not secret.
        self.0.len() == other.0.len() && self.0.iter().zip(other.0.iter()).fold(0u8, |all, (a, b)| all | (a ^ b)) == 0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl fmt::Display for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_prints_stars() {
        let secret = Secret::new(*b"hunter2");
        assert_eq!(format!("{secret} {secret:?} {:?}", Some(&secret)), "*** *** Some(***)");
    }

    #[test]
    fn a_text_in_a_file_loses_one_newline_and_anything_else_is_whole() {
        let read = |bytes: &[u8]| Secret::of_file(bytes.to_vec()).expose_secret().to_vec();
        for end in ["", "\n", "\r\n"] {
            assert_eq!(read(format!("s3crét{end}").as_bytes()), "s3crét".as_bytes(), "{end:?}");
        }
        assert_eq!(read(b"s\n\n"), b"s\n");
        assert_eq!(read(b"\n"), b"");
        // A key of 32 random bytes, or DER, may well end with that byte.
        for end in [&b"\n"[..], b"\r\n"] {
            let binary = [b"\x30\xff", end].concat();
            assert_eq!(read(&binary), binary);
        }
    }

    #[test]
    fn secrets_compare_by_content() {
        assert_eq!(Secret::new(*b"a"), Secret::new(*b"a"));
        assert_ne!(Secret::new(*b"a"), Secret::new(*b"b"));
        assert_ne!(Secret::new(*b"a"), Secret::new(*b"ab"));
    }
}
