//! Pages of one list -> one JSON array.
//!
//! Source: RFC 8259. Memory: the array so far. Errors: [`NoArray`].
//! Not here: whether what stands in the array is JSON (`codec::json` reads the whole of it later), asking for pages.

/// A page that is not one JSON array.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct NoArray;

/// The array of all that stands in the pages that were taken.
#[derive(Debug)]
pub(super) struct Pages {
    text: Vec<u8>,
}

impl Pages {
    pub(super) fn new() -> Pages {
        Pages { text: vec![b'['] }
    }

    /// Bytes so far.
    pub(super) fn len(&self) -> usize {
        self.text.len()
    }

    /// Takes a page whose ends `scan` has found.
    pub(super) fn take(&mut self, page: &[u8], scan: &Scan) -> Result<(), NoArray> {
        let inner = scan.inner().and_then(|(start, end)| page.get(start..end)).ok_or(NoArray)?;
        if inner.iter().all(|&byte| is_white(byte)) {
            return Ok(());
        }
        if self.text.len() > 1 {
            self.text.push(b',');
        }
        self.text.extend_from_slice(inner);
        Ok(())
    }

    pub(super) fn into_body(mut self) -> Vec<u8> {
        self.text.push(b']');
        self.text
    }
}

/// Looks for the ends of a page's array. No end of a page stands within the array of another: what is open in a page is
/// closed in it, or it is none.
#[derive(Debug, Default)]
pub(super) struct Scan {
    at: usize,
    depth: usize,
    in_string: bool,
    escaped: bool,
    start: Option<usize>,
    end: Option<usize>,
    broken: bool,
}

impl Scan {
    /// Reads on.
    pub(super) fn feed(&mut self, piece: &[u8]) {
        for &byte in piece {
            let at = self.at;
            self.at += 1;
            if self.in_string {
                let ends = byte == b'"' && !self.escaped;
                self.escaped = byte == b'\\' && !self.escaped;
                self.in_string = !ends;
                continue;
            }
            match byte {
                _ if is_white(byte) => {}
                b'[' if self.start.is_none() => (self.start, self.depth) = (Some(at + 1), 1),
                // Before the array or behind it.
                _ if self.depth == 0 => self.broken = true,
                b'"' => self.in_string = true,
                b'[' | b'{' => self.depth += 1,
                b']' | b'}' => {
                    self.depth -= 1;
                    if self.depth == 0 {
                        self.end = Some(at);
                        self.broken |= byte != b']';
                    }
                }
                _ => {}
            }
        }
    }

    /// What stands between the brackets.
    fn inner(&self) -> Option<(usize, usize)> {
        Some((self.start?, self.end?)).filter(|_| !self.broken)
    }
}

fn is_white(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\r' | b'\n')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn gathered(pages: &[&str], piece: usize) -> Result<String, NoArray> {
        let mut all = Pages::new();
        for page in pages {
            let mut scan = Scan::default();
            page.as_bytes().chunks(piece).for_each(|piece| scan.feed(piece));
            all.take(page.as_bytes(), &scan)?;
        }
        Ok(String::from_utf8(all.into_body()).expect("UTF-8"))
    }

    #[test]
    fn pages_become_one_array() {
        for (pages, array) in [
            (&["[]"][..], "[]"),
            (&["[1,2]", "[3]"], "[1,2,3]"),
            (&["[]", " [ ] ", "[3]", "[]"], "[3]"),
            (&["\n[ {\"a\":\"]\\\"[\"} ]\n", "[[]]"], "[ {\"a\":\"]\\\"[\"} ,[]]"),
        ] {
            assert_eq!(gathered(pages, 3).as_deref(), Ok(array));
        }
    }

    #[test]
    fn what_is_no_array_is_no_page() {
        for page in
            ["", " ", "{}", "1", "\"[]\"", "[1],[2]", "[1]]", "[[1]", "[1", "[\"]", "[1] 2", "1 [2]", "[1}", "{]"]
        {
            assert_eq!(gathered(&["[0]", page], 1), Err(NoArray), "{page:?}");
        }
    }

    proptest! {
        /// Two pages of which one is broken never make a value that neither of them holds.
        #[test]
        fn what_is_gathered_is_json_only_if_each_page_is_an_array(
            pages in prop::collection::vec("[\\[\\]{}\", :1a\\\\]{0,8}", 1..4),
        ) {
            let texts: Vec<&str> = pages.iter().map(String::as_str).collect();
            let parsed: Option<Vec<Value>> = texts
                .iter()
                .map(|text| serde_json::from_str::<Value>(text).ok()?.as_array().cloned())
                .collect::<Option<Vec<_>>>()
                .map(|pages| pages.concat());
            let whole = gathered(&texts, 2).ok().and_then(|text| serde_json::from_str::<Value>(&text).ok());
            if let Some(expected) = parsed {
                prop_assert_eq!(whole, Some(Value::Array(expected)));
            } else {
                prop_assert_eq!(whole, None);
            }
        }
    }
}
