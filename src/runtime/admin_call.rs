//! A call of the admin API: what it says, and the answers that all of them share.
//!
//! Source: protocol version 1, section 6; RFC 9110, 9457. Memory: one request's. Errors: problem documents.
//! Not here: reading it and who may make it (`admin`), what it orders (`admin_users` and the like).

use std::borrow::Cow;
use std::fmt;
use std::net::SocketAddr;

use serde::de::DeserializeOwned;

use crate::codec::http::Response;
use crate::codec::json::{Document, JsonError};
use crate::codec::message::ErrorCode;

use super::log;

/// The key that every call of the admin API has presented: there is one, and this is what the configuration calls it.
const KEY: &str = "admin.key";
/// Characters of a caller's text that a line of the log shows.
const LOGGED_CHARS_MAX: usize = 256;

/// A call with the admin key.
pub struct Call<'c> {
    /// Its method.
    pub method: &'c str,
    /// The segments of its path behind `/admin/v1/`, decoded.
    pub path: Vec<Cow<'c, str>>,
    /// Its query, not decoded.
    pub query: Option<&'c str>,
    /// Its `If-Match`, where it has one.
    pub if_match: Option<String>,
    /// Its body, whole.
    pub body: &'c [u8],
    /// Who calls: the address and port it came from.
    pub by: SocketAddr,
}

impl Call<'_> {
    /// What its body says.
    ///
    /// # Errors
    /// 400. The answer names a place in the body, never what stands there.
    pub fn body<T: DeserializeOwned>(&self) -> Result<T, Response> {
        // Of a member that stands twice a parser takes one, and the caller may have meant the other.
        if let Err(JsonError { at, fault }) = Document::parse(self.body) {
            let detail = format!("the body is no JSON that this resource takes, at byte {at}: {fault}");
            return Err(problem(ErrorCode::BadRequest, &detail));
        }
        // An array would be read for an object whose members stand in some order.
        if self.body.trim_ascii_start().first() != Some(&b'{') {
            return Err(problem(ErrorCode::BadRequest, "the body is no JSON object"));
        }
        serde_json::from_slice(self.body).map_err(|error| {
            let (line, column) = (error.line(), error.column());
            let detail = format!("the body is not what this resource takes, at line {line}, column {column}");
            problem(ErrorCode::BadRequest, &detail)
        })
    }

    /// Writes who has ordered what, of whom and why, whatever `log.level` is.
    pub fn audit(&self, fields: &[(&str, Option<&str>)], sentence: &str) {
        let words: Vec<(&str, Word<'_>)> =
            fields.iter().filter_map(|(name, text)| Some((*name, Word((*text)?)))).collect();
        let mut all: Vec<(&str, &dyn fmt::Display)> = vec![("audit", &"admin"), ("by", &self.by), ("key", &KEY)];
        all.extend(words.iter().map(|(name, word)| (*name, word as &dyn fmt::Display)));
        log::audit(&all, sentence);
    }
}

/// 405.
pub fn not_allowed(allow: &str) -> Response {
    problem(ErrorCode::MethodNotAllowed, &format!("this resource knows {allow}")).header("Allow", allow)
}

/// A problem document.
pub fn problem(code: ErrorCode, detail: &str) -> Response {
    Response::problem(code.http_status(), code.as_str(), detail)
}

/// A caller's text as one word of a line, so that it cannot pass for another field, nor for another text where it is read.
struct Word<'w>(&'w str);

/// Whether a character is seen as what it is: white space, controls and what only says how others are to be shown (Unicode's
/// category Cf: it turns the order of a line's characters around, or takes no room) are not.
fn is_seen(character: char) -> bool {
    let is_format = matches!(character,
        '\u{ad}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}' | '\u{890}'..='\u{891}' | '\u{8e2}' | '\u{180e}'
        | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
        | '\u{110bd}' | '\u{110cd}' | '\u{13430}'..='\u{1343f}' | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}'
        | '\u{e0001}'..='\u{e007f}');
    !(is_format || character.is_whitespace() || character.is_control())
}

impl fmt::Display for Word<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut characters = self.0.chars();
        for character in characters.by_ref().take(LOGGED_CHARS_MAX) {
            if !is_seen(character) || matches!(character, '=' | '"' | '\\' | '%') {
                let mut bytes = [0u8; 4];
                for byte in character.encode_utf8(&mut bytes).bytes() {
                    write!(f, "%{byte:02X}")?;
                }
            } else {
                write!(f, "{character}")?;
            }
        }
        if characters.next().is_some() { f.write_str("…") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_of_a_line_is_one_word() {
        let shown = |text: &str| Word(text).to_string();
        assert_eq!(shown("u1@example.com"), "u1@example.com");
        assert_eq!(shown("a by=b\n\"%"), "a%20by%3Db%0A%22%25");
        assert_eq!(shown("ü\u{2028}"), "ü%E2%80%A8");
        assert_eq!(
            shown("u\u{202e}1\u{200b}\u{feff}"),
            "u%E2%80%AE1%E2%80%8B%EF%BB%BF",
            "nor does it turn the line around"
        );
        let long = "x".repeat(LOGGED_CHARS_MAX);
        assert_eq!(shown(&long), long);
        assert_eq!(shown(&format!("{long}y")), format!("{long}…"));
    }
}
