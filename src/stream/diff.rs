//! What changed between two values. (being built)

use std::fmt;

/// A JSON pointer (RFC 6901).
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Pointer(String);

/// Why a text is no JSON pointer.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("not a JSON pointer")]
pub struct PointerError;

impl Pointer {
    /// Reads `text` (RFC 6901 section 3).
    pub fn parse(text: &str) -> Result<Pointer, PointerError> {
        let escapes_end = text.split('~').skip(1).all(|after| after.starts_with(['0', '1']));
        if (text.is_empty() || text.starts_with('/')) && escapes_end {
            Ok(Pointer(text.to_owned()))
        } else {
            Err(PointerError)
        }
    }
}

impl fmt::Display for Pointer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
