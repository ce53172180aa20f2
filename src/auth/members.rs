//! The JSON objects inside a token, read strictly: text -> the members of one object, by name.
//!
//! Source: RFC 8259; RFC 7515 section 4 and RFC 7519 section 4 for «a repeated member is refused»; depth as in protocol
//! version 1, section 3. Numbers keep their text: an id of 20 digits stays itself.
//! Memory: borrows the text; one entry for each top-level member, one name for each member of the object being read. The
//! text is bounded by `limits::TOKEN_BYTES_MAX`, the recursion by `limits::JSON_DEPTH_MAX`.
//! Errors: [`MembersError`], always the token's fault. Not here: base64url, what a member means (`jwt`).

use std::borrow::Cow;

use crate::limits::JSON_DEPTH_MAX;

/// Why a text is not an object that may stand in a token.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum MembersError {
    /// Not UTF-8, not JSON, or JSON with something behind it.
    #[error("it is not JSON")]
    NotJson,
    /// Some other JSON value.
    #[error("it is not a JSON object")]
    NotAnObject,
    /// A member name stands twice in one object, at any depth.
    #[error("it has a member twice")]
    Repeated,
    /// Nested too deeply; the outermost object is level 1.
    #[error("it is nested more than {JSON_DEPTH_MAX} deep")]
    TooDeep,
}

/// One JSON value. What is not a scalar was checked in full and is kept as text.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Value<'a> {
    Null,
    Bool,
    /// As spelled.
    Number(&'a str),
    String(Cow<'a, str>),
    /// From `[` to `]`; [`elements`] reads it.
    Array(&'a str),
    /// From `{` to `}`; [`Members::read`] reads it.
    Object(&'a str),
}

/// The members of one object, sorted by name, no name twice.
#[derive(Debug)]
pub(super) struct Members<'a>(Vec<(Cow<'a, str>, Value<'a>)>);

impl<'a> Members<'a> {
    /// Reads `text`, which is one object and white space.
    pub(super) fn read(text: &'a [u8]) -> Result<Members<'a>, MembersError> {
        let text = str::from_utf8(text).map_err(|_| MembersError::NotJson)?;
        let mut reader = Reader { text, at: 0, names: Vec::new() };
        reader.skip_white();
        if reader.peek() != Some(b'{') {
            // Only whether it is JSON at all is of interest then.
            reader.value(0)?;
            reader.end()?;
            return Err(MembersError::NotAnObject);
        }
        let mut members = Vec::with_capacity(8);
        reader.object(1, |_, name, value| members.push((name, value)))?;
        reader.end()?;
        members.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        if members.is_sorted_by(|a, b| a.0 < b.0) { Ok(Members(members)) } else { Err(MembersError::Repeated) }
    }

    /// The member called `name`.
    pub(super) fn find(&self, name: &str) -> Option<&Value<'a>> {
        let place = self.0.binary_search_by(|member| member.0.as_ref().cmp(name)).ok()?;
        self.0.get(place).map(|member| &member.1)
    }

    /// All of them, sorted by name.
    pub(super) fn into_sorted(self) -> Vec<(Cow<'a, str>, Value<'a>)> {
        self.0
    }
}

/// The elements of an array that [`Members::read`] found.
pub(super) fn elements(array: &str) -> Result<Vec<Value<'_>>, MembersError> {
    let mut reader = Reader { text: array, at: 0, names: Vec::new() };
    let mut found = Vec::new();
    reader.array(1, |value| found.push(value))?;
    reader.end()?;
    Ok(found)
}

/// Whether `text` is one JSON value by the rules for a member of a token's object.
pub fn is_value(text: &str) -> bool {
    let mut reader = Reader { text, at: 0, names: Vec::new() };
    reader.skip_white();
    reader.value(1).is_ok() && reader.end().is_ok()
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
    /// Names of the nested objects that are open, the innermost object's last.
    names: Vec<Cow<'a, str>>,
}

impl<'a> Reader<'a> {
    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn skip_white(&mut self) {
        while let Some(b' ' | b'\t' | b'\n' | b'\r') = self.peek() {
            self.at += 1;
        }
    }

    /// Takes `byte` if it is next, with the white space around it.
    fn take(&mut self, byte: u8) -> bool {
        self.skip_white();
        let found = self.peek() == Some(byte);
        if found {
            self.at += 1;
            self.skip_white();
        }
        found
    }

    fn expect(&mut self, byte: u8) -> Result<(), MembersError> {
        if self.take(byte) { Ok(()) } else { Err(MembersError::NotJson) }
    }

    fn end(&mut self) -> Result<(), MembersError> {
        self.skip_white();
        if self.at == self.text.len() { Ok(()) } else { Err(MembersError::NotJson) }
    }

    /// The text from `start` to here. Both are ends of tokens, so never inside a character.
    fn since(&self, start: usize) -> Result<&'a str, MembersError> {
        self.text.get(start..self.at).ok_or(MembersError::NotJson)
    }

    /// Reads one value that stands inside `depth` objects and arrays.
    fn value(&mut self, depth: usize) -> Result<Value<'a>, MembersError> {
        let start = self.at;
        match self.peek() {
            Some(b'"') => Ok(Value::String(self.string()?)),
            Some(b'{') => {
                self.nested_object(depth + 1)?;
                Ok(Value::Object(self.since(start)?))
            }
            Some(b'[') => {
                self.array(depth + 1, |_| ())?;
                Ok(Value::Array(self.since(start)?))
            }
            Some(b'-' | b'0'..=b'9') => {
                self.number()?;
                Ok(Value::Number(self.since(start)?))
            }
            Some(b't') => self.word("true", Value::Bool),
            Some(b'f') => self.word("false", Value::Bool),
            Some(b'n') => self.word("null", Value::Null),
            _ => Err(MembersError::NotJson),
        }
    }

    /// Reads an object of which only the rules matter. Its names are compared once, sorted: n of them cost n log n.
    fn nested_object(&mut self, depth: usize) -> Result<(), MembersError> {
        let mark = self.names.len();
        self.object(depth, |reader, name, _| reader.names.push(name))?;
        let own = self.names.get_mut(mark..).unwrap_or_default();
        own.sort_unstable();
        if !own.is_sorted_by(|a, b| a < b) {
            return Err(MembersError::Repeated);
        }
        self.names.truncate(mark);
        Ok(())
    }

    /// Reads an object at level `depth`; `keep` gets each member, after all that stands inside its value was read.
    fn object(
        &mut self,
        depth: usize,
        mut keep: impl FnMut(&mut Self, Cow<'a, str>, Value<'a>),
    ) -> Result<(), MembersError> {
        self.open(b'{', depth)?;
        if self.close(b'}') {
            return Ok(());
        }
        loop {
            let name = self.string()?;
            self.expect(b':')?;
            let value = self.value(depth)?;
            keep(self, name, value);
            if !self.take(b',') {
                self.skip_white();
                return if self.close(b'}') { Ok(()) } else { Err(MembersError::NotJson) };
            }
        }
    }

    /// Reads an array at level `depth`; `keep` gets each element.
    fn array(&mut self, depth: usize, mut keep: impl FnMut(Value<'a>)) -> Result<(), MembersError> {
        self.open(b'[', depth)?;
        if self.close(b']') {
            return Ok(());
        }
        loop {
            keep(self.value(depth)?);
            if !self.take(b',') {
                self.skip_white();
                return if self.close(b']') { Ok(()) } else { Err(MembersError::NotJson) };
            }
        }
    }

    fn open(&mut self, bracket: u8, depth: usize) -> Result<(), MembersError> {
        if depth > JSON_DEPTH_MAX {
            return Err(MembersError::TooDeep);
        }
        self.expect(bracket)
    }

    /// Takes the closing `bracket` if it is next. White space behind it is left, so that a span ends with it.
    fn close(&mut self, bracket: u8) -> bool {
        let found = self.peek() == Some(bracket);
        if found {
            self.at += 1;
        }
        found
    }

    /// Reads a string. RFC 8259 7: no raw control characters; RFC 8259 8.2: a lone surrogate is no text.
    fn string(&mut self) -> Result<Cow<'a, str>, MembersError> {
        let start = self.at;
        if self.peek() != Some(b'"') {
            return Err(MembersError::NotJson);
        }
        self.at += 1;
        let mut escaped = false;
        loop {
            match self.peek() {
                Some(b'"') => break,
                Some(b'\\') => {
                    escaped = true;
                    // Whatever is escaped is skipped here, a quote above all, and judged below.
                    self.at += 2;
                }
                Some(0x20..) => self.at += 1,
                _ => return Err(MembersError::NotJson),
            }
        }
        self.at += 1;
        let quoted = self.since(start)?;
        if escaped {
            return serde_json::from_str::<String>(quoted).map(Cow::Owned).map_err(|_| MembersError::NotJson);
        }
        quoted.get(1..quoted.len() - 1).map(Cow::Borrowed).ok_or(MembersError::NotJson)
    }

    /// Reads a number by the grammar of RFC 8259 6: no leading zero, no plus, digits on both sides of the point.
    fn number(&mut self) -> Result<(), MembersError> {
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        if self.peek() == Some(b'0') {
            self.at += 1;
        } else {
            self.digits()?;
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        if let Some(b'e' | b'E') = self.peek() {
            self.at += 1;
            if let Some(b'+' | b'-') = self.peek() {
                self.at += 1;
            }
            self.digits()?;
        }
        Ok(())
    }

    fn digits(&mut self) -> Result<(), MembersError> {
        let start = self.at;
        while let Some(b'0'..=b'9') = self.peek() {
            self.at += 1;
        }
        if self.at > start { Ok(()) } else { Err(MembersError::NotJson) }
    }

    fn word(&mut self, word: &str, value: Value<'a>) -> Result<Value<'a>, MembersError> {
        let rest = self.text.get(self.at..).unwrap_or_default();
        if !rest.starts_with(word) {
            return Err(MembersError::NotJson);
        }
        self.at += word.len();
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(text: &str) -> Result<Vec<(String, Value<'_>)>, MembersError> {
        let members = Members::read(text.as_bytes())?;
        Ok(members.into_sorted().into_iter().map(|(name, value)| (name.into_owned(), value)).collect())
    }

    #[test]
    fn members_are_found_by_their_unescaped_name() {
        let text =
            br#" { "b" : [ 1 , "x" ] , "a\u0041" : "caf\u00e9\n" , "n": -0.50E+10,"o":{"b":{}},"t":true,"z":null} "#;
        let members = Members::read(text).unwrap();
        assert_eq!(members.find("aA"), Some(&Value::String("caf\u{e9}\n".into())));
        assert_eq!(members.find("n"), Some(&Value::Number("-0.50E+10")));
        assert_eq!(members.find("o"), Some(&Value::Object(r#"{"b":{}}"#)));
        assert_eq!(members.find("t"), Some(&Value::Bool));
        assert_eq!(members.find("z"), Some(&Value::Null));
        assert_eq!(members.find("x"), None);
        let Some(Value::Array(array)) = members.find("b") else { panic!("an array") };
        assert_eq!(elements(array), Ok(vec![Value::Number("1"), Value::String("x".into())]));
        assert_eq!(elements("[]"), Ok(Vec::new()));
    }

    #[test]
    fn a_repeated_member_is_refused_at_any_depth_and_spelling() {
        for text in [
            r#"{"a":1,"a":1}"#,
            r#"{"a":1,"b":2,"\u0061":3}"#,
            r#"{"o":{"a":1,"a":2}}"#,
            r#"{"o":[[{"a":1,"b":{"a":1},"a":2}]]}"#,
        ] {
            assert_eq!(read(text), Err(MembersError::Repeated), "{text}");
        }
        let same_name_elsewhere = r#"{"a":{"a":{"a":1}},"b":[{"a":1},{"a":1}],"c":{"x":{"a":1},"a":1}}"#;
        assert!(read(same_name_elsewhere).is_ok());
    }

    #[test]
    fn nesting_is_bounded_at_128() {
        let nested = |arrays: usize| format!(r#"{{"a":{}{}}}"#, "[".repeat(arrays), "]".repeat(arrays));
        assert!(read(&nested(JSON_DEPTH_MAX - 1)).is_ok());
        assert_eq!(read(&nested(JSON_DEPTH_MAX)), Err(MembersError::TooDeep));
        assert_eq!(read(&nested(100_000)), Err(MembersError::TooDeep));
        assert_eq!(read(&"{\"a\":".repeat(100_000)), Err(MembersError::TooDeep));
    }

    #[test]
    fn other_values_are_no_object_and_other_text_is_no_json() {
        for text in ["1", "null", "[]", r#""{}""#, " true "] {
            assert_eq!(read(text), Err(MembersError::NotAnObject), "{text}");
        }
        for text in [
            "",
            " ",
            "{",
            "}",
            "{}x",
            "{}{}",
            "{,}",
            "{\"a\"}",
            "{\"a\":}",
            "{\"a\":1,}",
            "{a:1}",
            "{'a':1}",
            "{\"a\":01}",
            "{\"a\":+1}",
            "{\"a\":.5}",
            "{\"a\":1.}",
            "{\"a\":1e}",
            "{\"a\":-}",
            "{\"a\":NaN}",
            "{\"a\":tru}",
            "{\"a\":[1,]}",
            "{\"a\":[1 2]}",
            "{\"a\":\"\n\"}",
            "{\"a\":\"\\x\"}",
            "{\"a\":\"\\ud800\"}",
            "{\"a\":\"",
            "{\"a\":\"\\",
            "\u{feff}{}",
            "{\"a\":1}\0",
            "nul",
            "[}",
            "{]",
        ] {
            assert_eq!(read(text), Err(MembersError::NotJson), "{text}");
        }
        assert_eq!(Members::read(b"{\"a\":\"\xff\"}").err(), Some(MembersError::NotJson));
    }

    proptest! {
        /// The reader takes what serde_json takes, but for what it names as its own rules.
        #[test]
        fn it_agrees_with_serde_json(text in r#"[ \[\]{}:,"\\a\-+.eEu0-1\ntrue]{0,24}"#) {
            let own = Members::read(text.as_bytes());
            match serde_json::from_str::<serde_json::Value>(&text) {
                Ok(serde_json::Value::Object(_)) => {
                    prop_assert!(matches!(own, Ok(_) | Err(MembersError::Repeated)), "{:?} {:?}", text, own);
                }
                Ok(_) => prop_assert!(
                    matches!(own, Err(MembersError::NotAnObject | MembersError::Repeated)), "{:?} {:?}", text, own),
                // serde_json calls a number beyond f64 an error; here a number is its text.
                Err(err) => prop_assert!(own.is_err() || err.to_string().contains("out of range"), "{:?}", text),
            }
        }

        #[test]
        fn any_object_reads_as_serde_json_reads_it(strings in proptest::collection::btree_map(".{0,6}", ".{0,12}", 0..12)) {
            let text = serde_json::to_string(&strings).unwrap();
            let members = Members::read(text.as_bytes()).unwrap();
            for (name, value) in &strings {
                prop_assert_eq!(members.find(name), Some(&Value::String(value.as_str().into())));
            }
            prop_assert_eq!(members.into_sorted().len(), strings.len());
        }
    }
}
