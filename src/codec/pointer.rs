//! JSON pointers: the name of one place in a value.
//!
//! Source: RFC 6901. Memory: one string per token.
//! Errors: [`PointerError`], the fault of whoever wrote the pointer.  Not here: looking a place up (`codec::json`).

use std::borrow::Cow;
use std::fmt;

/// Longest pointer, in bytes.
pub const POINTER_BYTES_MAX: usize = 4096;

/// A JSON pointer (RFC 6901), unescaped: `/a~1b/0` is the tokens `a/b` and `0`; the empty pointer is the whole value.
#[derive(Clone, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Pointer {
    tokens: Vec<String>,
}

/// Why a text is no [`Pointer`].
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum PointerError {
    /// It neither is empty nor begins with `/`.
    #[error("a JSON pointer is empty or begins with \"/\" (RFC 6901)")]
    NoSlash,
    /// A `~` that neither `0` nor `1` follows.
    #[error("byte {at}: in a JSON pointer \"~\" stands only in \"~0\" and \"~1\" (RFC 6901)")]
    BadEscape {
        /// Where the `~` is.
        at: usize,
    },
    /// Over [`POINTER_BYTES_MAX`].
    #[error("a JSON pointer has at most {POINTER_BYTES_MAX} bytes")]
    TooLong,
}

impl Pointer {
    /// The pointer spelled `text`.
    pub fn parse(text: &str) -> Result<Pointer, PointerError> {
        if text.len() > POINTER_BYTES_MAX {
            return Err(PointerError::TooLong);
        }
        let mut parts = text.split('/');
        if parts.next() != Some("") {
            return Err(PointerError::NoSlash);
        }
        let mut tokens = Vec::new();
        let mut at = 1;
        for part in parts {
            tokens.push(unescape(part).map_err(|within| PointerError::BadEscape { at: at + within })?);
            at += part.len() + 1;
        }
        Ok(Pointer { tokens })
    }

    /// Its tokens, unescaped, outermost first; none for the whole value.
    pub fn tokens(&self) -> &[String] {
        &self.tokens
    }
}

impl fmt::Display for Pointer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.tokens.iter().try_for_each(|token| write!(f, "/{}", escape_token(token)))
    }
}

/// `token` as it stands in a pointer: `~` as `~0`, `/` as `~1`.
pub fn escape_token(token: &str) -> Cow<'_, str> {
    if token.contains(['~', '/']) {
        // RFC 6901 section 3: `~` first, or the `~` of `~1` would be escaped again.
        Cow::Owned(token.replace('~', "~0").replace('/', "~1"))
    } else {
        Cow::Borrowed(token)
    }
}

/// The place in an array that `token` names: RFC 6901 section 4, digits without a leading zero. `-` names none.
pub fn array_index(token: &str) -> Option<usize> {
    let canonical = token == "0" || (!token.starts_with('0') && token.bytes().all(|b| b.is_ascii_digit()));
    if canonical { token.parse().ok() } else { None }
}

/// `part` with `~1` as `/` and `~0` as `~`, or where in it a `~` means nothing.
fn unescape(part: &str) -> Result<String, usize> {
    let bytes = part.as_bytes();
    for (at, _) in part.match_indices('~') {
        if !matches!(bytes.get(at + 1), Some(b'0' | b'1')) {
            return Err(at);
        }
    }
    // RFC 6901 section 4: `~1` first, so that `~01` becomes `~1`, not `/`.
    Ok(part.replace("~1", "/").replace("~0", "~"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(text: &str) -> Vec<String> {
        Pointer::parse(text).expect("a pointer").tokens().to_vec()
    }

    #[test]
    fn the_examples_of_rfc_6901_section_5() {
        assert_eq!(tokens(""), Vec::<String>::new());
        assert_eq!(tokens("/foo/0"), ["foo", "0"]);
        assert_eq!(tokens("/"), [""]);
        assert_eq!(tokens("/a~1b"), ["a/b"]);
        assert_eq!(tokens("/c%d"), ["c%d"]);
        assert_eq!(tokens("/ "), [" "]);
        assert_eq!(tokens("/m~0n"), ["m~n"]);
        assert_eq!(tokens("/~01"), ["~1"]);
        assert_eq!(tokens("//"), ["", ""]);
    }

    #[test]
    fn a_pointer_prints_as_it_was_written() {
        for text in ["", "/", "/foo/0", "/a~1b/~01/~0~1", "/é/\u{1F600}"] {
            assert_eq!(Pointer::parse(text).expect("a pointer").to_string(), text);
        }
    }

    #[test]
    fn what_is_no_pointer_is_refused() {
        assert_eq!(Pointer::parse("foo"), Err(PointerError::NoSlash));
        assert_eq!(Pointer::parse("#/foo"), Err(PointerError::NoSlash));
        assert_eq!(Pointer::parse("/a/b~"), Err(PointerError::BadEscape { at: 4 }));
        assert_eq!(Pointer::parse("/a~2"), Err(PointerError::BadEscape { at: 2 }));
    }

    #[test]
    fn a_pointer_has_a_longest_length() {
        let longest = format!("/{}", "a".repeat(POINTER_BYTES_MAX - 1));
        assert!(Pointer::parse(&longest).is_ok());
        assert_eq!(Pointer::parse(&format!("{longest}a")), Err(PointerError::TooLong));
    }

    #[test]
    fn an_array_index_has_one_spelling() {
        assert_eq!(array_index("0"), Some(0));
        assert_eq!(array_index("10"), Some(10));
        for none in ["", "-", "01", "+1", "-1", "1a", "99999999999999999999999"] {
            assert_eq!(array_index(none), None, "{none}");
        }
    }
}
