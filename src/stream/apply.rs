//! What a client does with a change: a value and a patch or merge in, the next value out.
//!
//! Source: RFC 6902 (all six operations), RFC 7396. Numbers and strings keep their spelling.
//! Memory: the value as a tree, its result at most [`APPLY_BYTES_MAX`] with what `copy` added.
//! Errors: [`ApplyError`], the fault of the patch or of whoever applies it to another value than it was made for.
//! Not here: making changes (`stream::diff`). Members and elements are found by looking: this is for the `watch` command,
//! the simulator and tests, which prove with it that deltas lead where they should, not for the hot path.

use crate::codec::json::{Document, JsonError, Kind, Node};
use crate::codec::pointer::{Pointer, PointerError, array_index};
use crate::limits::JSON_DEPTH_MAX;

/// Most bytes that the `copy` operations of one patch may add.
pub const APPLY_BYTES_MAX: usize = 64 << 20;

/// Why a patch or merge does not apply.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ApplyError {
    /// The value is no JSON.
    #[error("the value: {0}")]
    Value(JsonError),
    /// The patch or merge is no JSON.
    #[error("the patch: {0}")]
    Patch(JsonError),
    /// The patch is not an array of RFC 6902 operations.
    #[error("operation {0} is none of RFC 6902")]
    Operation(usize),
    /// A pointer in it is none.
    #[error("operation {at}: {error}")]
    Pointer {
        /// Place of the operation in the patch.
        at: usize,
        /// What is wrong with the pointer.
        error: PointerError,
    },
    /// A place that must be there is not.
    #[error("operation {0} names a place that is not there")]
    NoSuchPlace(usize),
    /// A `test` that does not hold.
    #[error("the test of operation {0} does not hold")]
    TestFailed(usize),
    /// The result would be over [`APPLY_BYTES_MAX`] or deeper than `limits::JSON_DEPTH_MAX`.
    #[error("operation {0} makes the value too large or too deep")]
    TooLarge(usize),
}

/// The value that the RFC 6902 text `patch` makes of the text `value`, minified.
pub fn apply_patch(value: &[u8], patch: &[u8]) -> Result<Vec<u8>, ApplyError> {
    let value = Document::parse(value).map_err(ApplyError::Value)?;
    let patch = Document::parse(patch).map_err(ApplyError::Patch)?;
    if patch.root().kind() != Kind::Array {
        return Err(ApplyError::Operation(0));
    }
    let mut tree = Tree::of(value.root());
    let mut copied = 0;
    for (at, operation) in patch.root().elements().enumerate() {
        tree.operate(at, operation, &mut copied)?;
    }
    Ok(tree.into_text())
}

/// The value that the RFC 7396 text `merge` makes of the text `value`, minified.
pub fn apply_merge(value: &[u8], merge: &[u8]) -> Result<Vec<u8>, ApplyError> {
    let value = Document::parse(value).map_err(ApplyError::Value)?;
    let merge = Document::parse(merge).map_err(ApplyError::Patch)?;
    let mut tree = Tree::of(value.root());
    tree.merge(merge.root());
    Ok(tree.into_text())
}

/// A value that can be changed. Scalars are their text.
#[derive(Clone, Debug)]
enum Tree {
    Scalar(Vec<u8>),
    Array(Vec<Tree>),
    Object(Vec<Entry>),
}

#[derive(Clone, Debug)]
struct Entry {
    /// As it is spelled, quotes included.
    raw_name: Vec<u8>,
    /// Unescaped.
    name: Vec<u8>,
    value: Tree,
}

impl Tree {
    fn of(node: Node<'_>) -> Tree {
        match node.kind() {
            Kind::Array => Tree::Array(node.elements().map(Tree::of).collect()),
            Kind::Object => Tree::Object(
                node.members()
                    .map(|member| Entry {
                        raw_name: member.name.raw().to_vec(),
                        name: member.name.unescaped().into_owned(),
                        value: Tree::of(member.value),
                    })
                    .collect(),
            ),
            _ => Tree::Scalar(node.raw().to_vec()),
        }
    }

    fn into_text(self) -> Vec<u8> {
        let mut text = Vec::new();
        self.write(&mut text);
        text
    }

    fn write(&self, out: &mut Vec<u8>) {
        match self {
            Tree::Scalar(raw) => out.extend_from_slice(raw),
            Tree::Array(elements) => {
                out.push(b'[');
                for (place, element) in elements.iter().enumerate() {
                    if place > 0 {
                        out.push(b',');
                    }
                    element.write(out);
                }
                out.push(b']');
            }
            Tree::Object(entries) => {
                out.push(b'{');
                for (place, entry) in entries.iter().enumerate() {
                    if place > 0 {
                        out.push(b',');
                    }
                    out.extend_from_slice(&entry.raw_name);
                    out.push(b':');
                    entry.value.write(out);
                }
                out.push(b'}');
            }
        }
    }

    /// Arrays and objects nested in it, itself included.
    fn depth(&self) -> usize {
        match self {
            Tree::Scalar(_) => 0,
            Tree::Array(elements) => 1 + elements.iter().map(Tree::depth).max().unwrap_or(0),
            Tree::Object(entries) => 1 + entries.iter().map(|entry| entry.value.depth()).max().unwrap_or(0),
        }
    }

    /// RFC 7396 section 2.
    fn merge(&mut self, merge: Node<'_>) {
        if merge.kind() != Kind::Object {
            *self = Tree::of(merge);
            return;
        }
        if !matches!(self, Tree::Object(_)) {
            *self = Tree::Object(Vec::new());
        }
        let Tree::Object(entries) = self else { return };
        for member in merge.members() {
            let name = member.name.unescaped();
            let place = entries.iter().position(|entry| entry.name == *name);
            match (place, member.value.kind()) {
                (Some(place), Kind::Null) => drop(entries.remove(place)),
                (None, Kind::Null) => {}
                (Some(place), _) => entries[place].value.merge(member.value),
                (None, _) => {
                    let mut value = Tree::Scalar(Vec::new());
                    value.merge(member.value);
                    entries.push(Entry { raw_name: member.name.raw().to_vec(), name: name.into_owned(), value });
                }
            }
        }
    }

    /// One operation, RFC 6902 section 4.
    fn operate(&mut self, at: usize, operation: Node<'_>, copied: &mut usize) -> Result<(), ApplyError> {
        let pointer = |name| -> Result<Pointer, ApplyError> {
            let text = operation.member(name).filter(|node| node.kind() == Kind::String);
            let text = text.ok_or(ApplyError::Operation(at))?.unescaped();
            let text = std::str::from_utf8(&text).map_err(|_| ApplyError::Operation(at))?;
            Pointer::parse(text).map_err(|error| ApplyError::Pointer { at, error })
        };
        let value = || operation.member("value").ok_or(ApplyError::Operation(at));
        let gone = ApplyError::NoSuchPlace(at);

        let kind = operation.member("op").ok_or(ApplyError::Operation(at))?;
        let path = pointer("path")?;
        match kind.unescaped().as_ref() {
            b"add" => self.add(at, path.tokens(), Tree::of(value()?)),
            b"remove" => self.remove(path.tokens()).map(drop).ok_or(gone),
            b"replace" => {
                let value = Tree::of(value()?);
                fits(at, path.tokens(), &value)?;
                *self.find(path.tokens()).ok_or(gone)? = value;
                Ok(())
            }
            b"move" => {
                let from = pointer("from")?;
                // RFC 6902 section 4.4: nothing is moved into itself.
                let into_itself = path.tokens().len() > from.tokens().len() && path.tokens().starts_with(from.tokens());
                if into_itself {
                    return Err(gone);
                }
                let value = self.remove(from.tokens()).ok_or(gone)?;
                self.add(at, path.tokens(), value)
            }
            b"copy" => {
                let from = pointer("from")?;
                let value = self.find(from.tokens()).ok_or(gone)?.clone();
                *copied += value.clone().into_text().len();
                if *copied > APPLY_BYTES_MAX {
                    return Err(ApplyError::TooLarge(at));
                }
                self.add(at, path.tokens(), value)
            }
            b"test" => {
                let found = self.find(path.tokens()).ok_or(gone)?.clone().into_text();
                let found = Document::parse(&found).map_err(ApplyError::Value)?;
                if found.root() == value()? { Ok(()) } else { Err(ApplyError::TestFailed(at)) }
            }
            _ => Err(ApplyError::Operation(at)),
        }
    }

    /// What `tokens` name.
    fn find(&mut self, tokens: &[String]) -> Option<&mut Tree> {
        tokens.iter().try_fold(self, |tree, token| match tree {
            Tree::Scalar(_) => None,
            Tree::Array(elements) => elements.get_mut(array_index(token)?),
            Tree::Object(entries) => {
                entries.iter_mut().find(|entry| entry.name == token.as_bytes()).map(|entry| &mut entry.value)
            }
        })
    }

    fn remove(&mut self, tokens: &[String]) -> Option<Tree> {
        let Some((last, parent)) = tokens.split_last() else {
            // Of the whole value nothing would be left; RFC 6902 has no word for that.
            return Some(std::mem::replace(self, Tree::Scalar(b"null".to_vec())));
        };
        match self.find(parent)? {
            Tree::Scalar(_) => None,
            Tree::Array(elements) => {
                let index = array_index(last).filter(|&index| index < elements.len())?;
                Some(elements.remove(index))
            }
            Tree::Object(entries) => {
                let place = entries.iter().position(|entry| entry.name == last.as_bytes())?;
                Some(entries.remove(place).value)
            }
        }
    }

    fn add(&mut self, at: usize, tokens: &[String], value: Tree) -> Result<(), ApplyError> {
        fits(at, tokens, &value)?;
        let Some((last, parent)) = tokens.split_last() else {
            *self = value;
            return Ok(());
        };
        match self.find(parent).ok_or(ApplyError::NoSuchPlace(at))? {
            Tree::Scalar(_) => return Err(ApplyError::NoSuchPlace(at)),
            Tree::Array(elements) => {
                // RFC 6902 section 4.1: `-` is the end.
                let index = if last == "-" { Some(elements.len()) } else { array_index(last) };
                let index = index.filter(|&index| index <= elements.len()).ok_or(ApplyError::NoSuchPlace(at))?;
                elements.insert(index, value);
            }
            Tree::Object(entries) => match entries.iter_mut().find(|entry| entry.name == last.as_bytes()) {
                Some(entry) => entry.value = value,
                None => {
                    let mut raw_name = Vec::new();
                    crate::codec::json::write_string(&mut raw_name, last);
                    entries.push(Entry { raw_name, name: last.clone().into_bytes(), value });
                }
            },
        }
        Ok(())
    }
}

/// What stands at a place d deep may itself be nested so deep that the whole keeps to the bound, which recursion rests on.
fn fits(at: usize, tokens: &[String], value: &Tree) -> Result<(), ApplyError> {
    if tokens.len() + value.depth() > JSON_DEPTH_MAX { Err(ApplyError::TooLarge(at)) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patched(value: &str, patch: &str) -> Result<String, ApplyError> {
        apply_patch(value.as_bytes(), patch.as_bytes()).map(|text| String::from_utf8(text).expect("UTF-8"))
    }

    fn check(value: &str, patch: &str, result: &str) {
        assert_eq!(patched(value, patch).as_deref(), Ok(result), "{value} + {patch}");
    }

    #[test]
    fn the_examples_of_rfc_6902_appendix_a() {
        check(r#"{"foo":"bar"}"#, r#"[{"op":"add","path":"/baz","value":"qux"}]"#, r#"{"foo":"bar","baz":"qux"}"#);
        check(
            r#"{"foo":["bar","baz"]}"#,
            r#"[{"op":"add","path":"/foo/1","value":"qux"}]"#,
            r#"{"foo":["bar","qux","baz"]}"#,
        );
        check(r#"{"baz":"qux","foo":"bar"}"#, r#"[{"op":"remove","path":"/baz"}]"#, r#"{"foo":"bar"}"#);
        check(r#"{"foo":["bar","qux","baz"]}"#, r#"[{"op":"remove","path":"/foo/1"}]"#, r#"{"foo":["bar","baz"]}"#);
        check(r#"{"baz":"qux"}"#, r#"[{"op":"replace","path":"/baz","value":"boo"}]"#, r#"{"baz":"boo"}"#);
        check(
            r#"{"foo":{"bar":"baz","waldo":"fred"},"qux":{"corge":"grault"}}"#,
            r#"[{"op":"move","from":"/foo/waldo","path":"/qux/thud"}]"#,
            r#"{"foo":{"bar":"baz"},"qux":{"corge":"grault","thud":"fred"}}"#,
        );
        check(
            r#"{"foo":["all","grass","cows","eat"]}"#,
            r#"[{"op":"move","from":"/foo/1","path":"/foo/3"}]"#,
            r#"{"foo":["all","cows","eat","grass"]}"#,
        );
        check(
            r#"{"foo":"bar"}"#,
            r#"[{"op":"add","path":"/child","value":{"grandchild":{}}}]"#,
            r#"{"foo":"bar","child":{"grandchild":{}}}"#,
        );
        check(
            r#"{"foo":"bar"}"#,
            r#"[{"op":"add","path":"/baz","value":"qux","xyz":123}]"#,
            r#"{"foo":"bar","baz":"qux"}"#,
        );
        check(
            r#"{"foo":["bar"]}"#,
            r#"[{"op":"add","path":"/foo/-","value":["abc","def"]}]"#,
            r#"{"foo":["bar",["abc","def"]]}"#,
        );
        check(r#"{"/":9,"~1":10}"#, r#"[{"op":"test","path":"/~01","value":10}]"#, r#"{"/":9,"~1":10}"#);
        check(r#"{"a":[1]}"#, r#"[{"op":"copy","from":"/a","path":"/a/0"}]"#, r#"{"a":[[1],1]}"#);
        check("1", r#"[{"op":"add","path":"","value":1.0}]"#, "1.0");
        check("[1]", "[]", "[1]");
    }

    #[test]
    fn a_patch_that_does_not_apply_says_why() {
        let refuse = |value, patch, error| assert_eq!(patched(value, patch), Err(error), "{value} + {patch}");
        refuse(r#"{"baz":"qux"}"#, r#"[{"op":"test","path":"/baz","value":"bar"}]"#, ApplyError::TestFailed(0));
        refuse(r#"{"a":1}"#, r#"[{"op":"test","path":"/a","value":"1"}]"#, ApplyError::TestFailed(0));
        for missing in [
            r#"[{"op":"add","path":"/baz/bat","value":"qux"}]"#,
            r#"[{"op":"add","path":"/foo/bat","value":"qux"}]"#,
            r#"[{"op":"add","path":"/list/2","value":0}]"#,
            r#"[{"op":"add","path":"/list/01","value":0}]"#,
            r#"[{"op":"remove","path":"/list/1"}]"#,
            r#"[{"op":"remove","path":"/list/-"}]"#,
            r#"[{"op":"remove","path":"/baz"}]"#,
            r#"[{"op":"replace","path":"/baz","value":0}]"#,
            r#"[{"op":"test","path":"/baz","value":0}]"#,
            r#"[{"op":"copy","from":"/baz","path":"/foo"}]"#,
            r#"[{"op":"move","from":"/baz","path":"/foo"}]"#,
            r#"[{"op":"move","from":"/list","path":"/list/0"}]"#,
        ] {
            refuse(r#"{"foo":"bar","list":[0]}"#, missing, ApplyError::NoSuchPlace(0));
        }
        for none in [
            "{}",
            "[1]",
            r#"[{"path":"/a"}]"#,
            r#"[{"op":"add","path":"/a"}]"#,
            r#"[{"op":"add","value":1}]"#,
            r#"[{"op":"add","path":1,"value":1}]"#,
            r#"[{"op":"move","path":"/a"}]"#,
            r#"[{"op":"set","path":"/a","value":1}]"#,
        ] {
            refuse("{}", none, ApplyError::Operation(0));
        }
        let error = PointerError::NoSlash;
        refuse(
            "{}",
            r#"[{"op":"add","path":"","value":{}},{"op":"remove","path":"a"}]"#,
            ApplyError::Pointer { at: 1, error },
        );
        assert!(matches!(patched("", "[]"), Err(ApplyError::Value(_))));
        assert!(matches!(patched("[]", "["), Err(ApplyError::Patch(_))));
    }

    #[test]
    fn a_patch_cannot_grow_a_value_without_bound() {
        let nested = |depth| "[".repeat(depth) + &"]".repeat(depth);
        let add = |path: &str, value: &str| format!(r#"[{{"op":"add","path":"{path}/0","value":{value}}}]"#);
        let half = nested(JSON_DEPTH_MAX / 2);
        let path = "/0".repeat(JSON_DEPTH_MAX / 2 - 1);
        assert!(patched(&half, &add(&path, &half)).is_ok());
        assert_eq!(patched(&half, &add(&path, &nested(JSON_DEPTH_MAX / 2 + 1))), Err(ApplyError::TooLarge(0)));

        let value = format!("[\"{}\"]", "-".repeat((1 << 20) - 2));
        let copies = vec![r#"{"op":"copy","from":"/0","path":"/-"}"#; (APPLY_BYTES_MAX >> 20) + 1];
        let exact = copies.len() - 1;
        assert!(patched(&value, &format!("[{}]", copies[..exact].join(","))).is_ok());
        assert_eq!(patched(&value, &format!("[{}]", copies.join(","))), Err(ApplyError::TooLarge(exact)));
    }

    #[test]
    fn the_examples_of_rfc_7396_appendix_a() {
        for (value, merge, result) in [
            (r#"{"a":"b"}"#, r#"{"a":"c"}"#, r#"{"a":"c"}"#),
            (r#"{"a":"b"}"#, r#"{"b":"c"}"#, r#"{"a":"b","b":"c"}"#),
            (r#"{"a":"b"}"#, r#"{"a":null}"#, r#"{}"#),
            (r#"{"a":"b","b":"c"}"#, r#"{"a":null}"#, r#"{"b":"c"}"#),
            (r#"{"a":["b"]}"#, r#"{"a":"c"}"#, r#"{"a":"c"}"#),
            (r#"{"a":"c"}"#, r#"{"a":["b"]}"#, r#"{"a":["b"]}"#),
            (r#"{"a":{"b":"c"}}"#, r#"{"a":{"b":"d","c":null}}"#, r#"{"a":{"b":"d"}}"#),
            (r#"{"a":[{"b":"c"}]}"#, r#"{"a":[1]}"#, r#"{"a":[1]}"#),
            (r#"["a","b"]"#, r#"["c","d"]"#, r#"["c","d"]"#),
            (r#"{"a":"b"}"#, r#"["c"]"#, r#"["c"]"#),
            (r#"{"a":"foo"}"#, "null", "null"),
            (r#"{"a":"foo"}"#, "\"bar\"", "\"bar\""),
            (r#"{"e":null}"#, r#"{"a":1}"#, r#"{"e":null,"a":1}"#),
            ("[1,2]", r#"{"a":"b","c":null}"#, r#"{"a":"b"}"#),
            ("{}", r#"{"a":{"bb":{"ccc":null}}}"#, r#"{"a":{"bb":{}}}"#),
        ] {
            let found = apply_merge(value.as_bytes(), merge.as_bytes()).expect("a merge that applies");
            assert_eq!(std::str::from_utf8(&found), Ok(result), "{value} + {merge}");
        }
    }
}
