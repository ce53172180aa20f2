//! `Sec-WebSocket-Extensions`: the extensions a client offers, in its order, each with its parameters.
//!
//! Source: RFC 6455 section 9.1, in the list syntax of RFC 9110 section 5.6.1.
//! Memory: borrowed; only a quoted value with an escape in it is copied. Errors: [`Malformed`].
//! Not here: what an extension means (`codec::deflate`).

use std::borrow::Cow;

use super::is_token_byte;

/// A piece of the field, in its order.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum ExtensionPiece<'b> {
    /// An extension begins.
    Extension(&'b str),
    /// A parameter of the extension last begun, and its value where it has one: unquoted, so perhaps not a token.
    Param(&'b str, Option<Cow<'b, str>>),
}

/// The field does not follow its grammar.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("Sec-WebSocket-Extensions is not a list of extensions")]
pub struct Malformed;

/// The pieces of `field`, whose lines have been joined by commas. After [`Malformed`] nothing more comes.
pub fn extension_pieces(field: &str) -> impl Iterator<Item = Result<ExtensionPiece<'_>, Malformed>> {
    Pieces { rest: field, within: false }
}

struct Pieces<'b> {
    rest: &'b str,
    /// Whether an extension has begun whose parameters may follow.
    within: bool,
}

impl<'b> Iterator for Pieces<'b> {
    type Item = Result<ExtensionPiece<'b>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        let piece = self.piece();
        if piece == Err(Malformed) {
            self.rest = "";
            self.within = false;
        }
        piece.transpose()
    }
}

impl<'b> Pieces<'b> {
    fn piece(&mut self) -> Result<Option<ExtensionPiece<'b>>, Malformed> {
        self.skip_space();
        if self.within {
            if self.skip(';') {
                self.skip_space();
                return self.param().map(Some);
            }
            if !self.rest.is_empty() && !self.skip(',') {
                return Err(Malformed);
            }
            self.within = false;
        }
        // RFC 9110 5.6.1.2: a recipient takes empty elements, and passes them over.
        loop {
            self.skip_space();
            if !self.skip(',') {
                break;
            }
        }
        if self.rest.is_empty() {
            return Ok(None);
        }
        self.within = true;
        self.token().map(|name| Some(ExtensionPiece::Extension(name)))
    }

    fn param(&mut self) -> Result<ExtensionPiece<'b>, Malformed> {
        let name = self.token()?;
        self.skip_space();
        if !self.skip('=') {
            return Ok(ExtensionPiece::Param(name, None));
        }
        self.skip_space();
        let value = if self.skip('"') { self.quoted()? } else { Cow::Borrowed(self.token()?) };
        Ok(ExtensionPiece::Param(name, Some(value)))
    }

    fn token(&mut self) -> Result<&'b str, Malformed> {
        let end = self.rest.bytes().position(|b| !is_token_byte(b)).unwrap_or(self.rest.len());
        let (token, rest) = self.rest.split_at_checked(end).ok_or(Malformed)?;
        self.rest = rest;
        if token.is_empty() { Err(Malformed) } else { Ok(token) }
    }

    /// What follows an opening quote, up to the closing one (RFC 9110 section 5.6.4).
    fn quoted(&mut self) -> Result<Cow<'b, str>, Malformed> {
        let mut value = Cow::Borrowed("");
        loop {
            let end = self.rest.find(['"', '\\']).ok_or(Malformed)?;
            let (plain, rest) = self.rest.split_at_checked(end).ok_or(Malformed)?;
            if value.is_empty() {
                value = Cow::Borrowed(plain);
            } else {
                value.to_mut().push_str(plain);
            }
            self.rest = rest;
            if self.skip('"') {
                return Ok(value);
            }
            self.skip('\\');
            let mut escaped = self.rest.chars();
            value.to_mut().push(escaped.next().ok_or(Malformed)?);
            self.rest = escaped.as_str();
        }
    }

    fn skip_space(&mut self) {
        self.rest = self.rest.trim_start_matches([' ', '\t']);
    }

    fn skip(&mut self, what: char) -> bool {
        self.rest.strip_prefix(what).map(|rest| self.rest = rest).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pieces as text: `name` of an extension, `;name` or `;name=value` of a parameter, `!` for a fault.
    fn read(field: &str) -> String {
        let pieces = extension_pieces(field).map(|piece| match piece {
            Ok(ExtensionPiece::Extension(name)) => name.to_owned(),
            Ok(ExtensionPiece::Param(name, None)) => format!(";{name}"),
            Ok(ExtensionPiece::Param(name, Some(value))) => format!(";{name}={value}"),
            Err(Malformed) => "!".to_owned(),
        });
        pieces.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn extensions_and_their_parameters_come_in_order() {
        for (field, pieces) in [
            ("", ""),
            (" , ,\t", ""),
            ("a", "a"),
            ("a, b", "a b"),
            (",a,,b,", "a b"),
            ("a;b;c=1, d", "a ;b ;c=1 d"),
            (" a ; b = 1 ,\tc", "a ;b=1 c"),
            (r#"a; b="1""#, "a ;b=1"),
            (r#"a; b="x, y; z=\"q\\", c"#, r#"a ;b=x, y; z="q\ c"#),
            (r#"a; b="""#, "a ;b="),
            (r#"a; b="\1\5"; c"#, "a ;b=15 ;c"),
        ] {
            assert_eq!(read(field), pieces, "{field:?}");
        }
    }

    #[test]
    fn what_is_no_list_of_extensions_ends_with_a_fault() {
        for (field, pieces) in [
            (";a", "!"),
            ("=", "!"),
            ("a b", "a !"),
            ("a;", "a !"),
            ("a; ;b", "a !"),
            ("a; b=", "a !"),
            ("a; =1", "a !"),
            ("a; b=1 c", "a ;b=1 !"),
            (r#"a; b="1"#, "a !"),
            (r#"a; b="1\"#, "a !"),
            (r#"a; b="1"2"#, "a ;b=1 !"),
            ("a/b, c", "a !"),
            ("\"a\"", "!"),
        ] {
            assert_eq!(read(field), pieces, "{field:?}");
        }
    }
}
