//! Proof that what a consumer holds is what the upstream sent: a signature on each event, and a hash of the value.
//!
//! Source: FIPS 198-1 and RFC 6234 (HMAC-SHA-256); the canonical form is our own, as RFC 8785 would spell numbers anew.
//! Memory: a key; a value's canonical form while it is hashed. Errors: [`SignerError`], the operator's.
//! Not here: where in a frame they stand (`frame`), keys from the file (`config`).
//!
//! **Canonical form.** The value's JSON text without white space, the members of each object in the order of their names'
//! characters (code points), each string in its shortest spelling (`\"`, `\\`, `\b`, `\t`, `\n`, `\f`, `\r`, `\u00xx` in
//! lower case for what else is below U+0020, all else as it is), each number as it was spelled. Two values are equal, as
//! protocol section 3 has it, exactly if their canonical forms are the same bytes.

use std::fmt;

use ring::{digest, hmac};

use super::json::{Document, Kind, Node, write_string};
use crate::limits::SIGNING_KEY_ID_BYTES_MAX;
use crate::secret::Secret;

/// What a stream proves of its events. By default nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Proof {
    /// Whether each event holds the hash of the value as of it.
    pub hash: bool,
    /// Who signs its events.
    pub signer: Option<Signer>,
}

/// A key that signs events, and its name.
#[derive(Clone)]
pub struct Signer {
    key_id: Box<str>,
    secret: Secret,
    key: hmac::Key,
}

/// Which sequence of a stream it is: what tells its events from those of another tenant, view or `select`.
#[derive(Clone, Copy, Debug)]
pub struct Scope<'a> {
    /// The stream's name in frames, its parameters included.
    pub stream: &'a str,
    /// The claims that fill its templates, by name; the values as JSON.
    pub claims: &'a [(Box<str>, Box<str>)],
    /// The place of its view, 0 is the first; `None`: there are none.
    pub view: Option<u16>,
    /// The one spelling of what a caller has selected.
    pub select: Option<&'a str>,
}

impl Scope<'_> {
    /// In canonical form. Nothing else that is signed begins so: frames begin with a brace, answers with a digit.
    fn text(&self) -> Vec<u8> {
        let mut out = b"scope.{\"claims\":{".to_vec();
        for (index, (name, value)) in self.claims.iter().enumerate() {
            if index > 0 {
                out.push(b',');
            }
            write_string(&mut out, name);
            out.push(b':');
            out.extend_from_slice(value.as_bytes());
        }
        out.extend_from_slice(b"},\"select\":");
        match self.select {
            Some(select) => write_string(&mut out, select),
            None => out.extend_from_slice(b"null"),
        }
        out.extend_from_slice(b",\"stream\":");
        write_string(&mut out, self.stream);
        out.extend_from_slice(b",\"view\":");
        match self.view {
            Some(view) => out.extend_from_slice((u32::from(view) + 1).to_string().as_bytes()),
            None => out.extend_from_slice(b"null"),
        }
        out.push(b'}');
        out
    }
}

/// Why a key cannot sign.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SignerError {
    /// An id that is none.
    #[error("has 1 to {SIGNING_KEY_ID_BYTES_MAX} of the characters A-Z a-z 0-9 . _ : ~ -")]
    KeyId,
    /// RFC 2104 section 3: a key shorter than the hash weakens it.
    #[error("has {bytes} bytes, and HMAC-SHA-256 needs at least {SECRET_BYTES_MIN}")]
    ShortSecret {
        /// What it has.
        bytes: usize,
    },
}

/// Bytes of a secret that signs.
pub const SECRET_BYTES_MIN: usize = 32;

impl Signer {
    /// The key `secret`, which consumers know by `key_id`.
    ///
    /// # Errors
    /// [`SignerError`].
    pub fn new(key_id: &str, secret: Secret) -> Result<Signer, SignerError> {
        let may_be = |b: u8| b.is_ascii_alphanumeric() || b"._:~-".contains(&b);
        if !(1..=SIGNING_KEY_ID_BYTES_MAX).contains(&key_id.len()) || !key_id.bytes().all(may_be) {
            return Err(SignerError::KeyId);
        }
        if secret.len() < SECRET_BYTES_MIN {
            return Err(SignerError::ShortSecret { bytes: secret.len() });
        }
        let key = hmac::Key::new(hmac::HMAC_SHA256, secret.expose_secret());
        Ok(Signer { key_id: key_id.into(), secret, key })
    }

    /// What consumers know the key by: it holds nothing that JSON or a header escapes.
    pub fn key_id(&self) -> &str {
        &self.key_id
    }

    /// What a sequence is called in what is signed: nobody without the key can tell whose it is, and it is the same wherever
    /// and whenever the sequence is served.
    pub fn scope(&self, scope: &Scope<'_>) -> String {
        self.sign(&[&scope.text()])
    }

    /// The signature of `pieces`, one behind the other, in lower-case hexadecimal digits.
    pub fn sign(&self, pieces: &[&[u8]]) -> String {
        let mut context = hmac::Context::with_key(&self.key);
        pieces.iter().for_each(|piece| context.update(piece));
        let mut text = String::with_capacity(64);
        write_hex(&mut text, context.sign().as_ref());
        text
    }
}

impl PartialEq for Signer {
    fn eq(&self, other: &Signer) -> bool {
        self.key_id == other.key_id && self.secret == other.secret
    }
}

impl fmt::Debug for Signer {
    /// The key's name only.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signer({})", self.key_id)
    }
}

/// The SHA-256 of a value's canonical form. It prints as `sha256:` and 64 hexadecimal digits.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ValueHash([u8; 32]);

impl ValueHash {
    /// That of `value`.
    pub fn of(value: &Document) -> ValueHash {
        let digest = digest::digest(&digest::SHA256, &canonical(value));
        ValueHash(*digest.as_ref().first_chunk().expect("a SHA-256 digest has 32 bytes"))
    }
}

impl fmt::Display for ValueHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        write_hex(f, &self.0);
        Ok(())
    }
}

fn write_hex(out: &mut impl fmt::Write, bytes: &[u8]) {
    for byte in bytes {
        let _ = write!(out, "{byte:02x}");
    }
}

/// The canonical form of a value. O(n log n) for an object of n members. Recursion is as deep as the value, at most 128.
pub fn canonical(value: &Document) -> Vec<u8> {
    let mut out = Vec::with_capacity(value.text().len());
    write_canonical(&mut out, value.root());
    out
}

fn write_canonical(out: &mut Vec<u8>, node: Node<'_>) {
    match node.kind() {
        Kind::Null | Kind::Boolean | Kind::Number => out.extend_from_slice(node.raw()),
        Kind::String => write_text(out, &node.unescaped()),
        Kind::Array => {
            out.push(b'[');
            for (index, element) in node.elements().enumerate() {
                if index > 0 {
                    out.push(b',');
                }
                write_canonical(out, element);
            }
            out.push(b']');
        }
        Kind::Object => {
            // UTF-8 has the order of the characters.
            let mut members: Vec<_> = node.members().map(|member| (member.name.unescaped(), member.value)).collect();
            members.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
            out.push(b'{');
            for (index, (name, value)) in members.into_iter().enumerate() {
                if index > 0 {
                    out.push(b',');
                }
                write_text(out, &name);
                out.push(b':');
                write_canonical(out, value);
            }
            out.push(b'}');
        }
    }
}

fn write_text(out: &mut Vec<u8>, text: &[u8]) {
    write_string(out, std::str::from_utf8(text).expect("a document's strings are UTF-8"));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn document(text: &str) -> Document {
        Document::parse(text.as_bytes()).expect("JSON")
    }

    fn check(text: &str, form: &str) {
        assert_eq!(String::from_utf8(canonical(&document(text))).as_deref(), Ok(form), "{text}");
    }

    #[test]
    fn values_that_differ_in_their_spelling_alone_have_one_canonical_form_and_numbers_keep_theirs() {
        check(r#" { "b" : [ 1 , 1.0 , 1E5 , -0 ] , "a" : null } "#, r#"{"a":null,"b":[1,1.0,1E5,-0]}"#);
        check(r#""\u0041\/\u00e9\u001f\u000a\ud83d\ude00\"\\\u007f""#, "\"A/é\\u001f\\n😀\\\"\\\\\u{7f}\"");
        // By characters, not by UTF-16 units: U+FFFD stands before U+1F600, whose first unit is lower.
        check(
            "{\"\u{1f600}\":1,\"\u{fffd}\":2,\"\":3,\"B\":4,\"a\":5}",
            "{\"\":3,\"B\":4,\"a\":5,\"\u{fffd}\":2,\"\u{1f600}\":1}",
        );
        assert_eq!(
            ValueHash::of(&document("{}")).to_string(),
            "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
        );
    }

    #[test]
    fn a_signature_is_hmac_sha_256_of_all_pieces_in_a_row() {
        // RFC 4231 section 4.7: a key of 131 bytes.
        let signer = Signer::new("k1", Secret::new([0xaa; 131])).expect("a key");
        let tag = "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54";
        assert_eq!(signer.sign(&[b"Test Using Larger Than Block-Size Key", b" - Hash Key First"]), tag);
        assert_eq!(format!("{signer:?}"), "Signer(k1)");
    }

    #[test]
    fn a_scope_is_its_canonical_form_and_differs_with_each_part_of_it() {
        let text = |value: &str| Box::<str>::from(value);
        let claims = [(text("a\"b"), text("7")), (text("companyId"), text("\"7\""))];
        let scope = Scope { stream: "leads?region=eu", claims: &claims, view: Some(0), select: Some("$['a']") };
        let form = r#"{"claims":{"a\"b":7,"companyId":"7"},"select":"$['a']","stream":"leads?region=eu","view":1}"#;
        assert_eq!(scope.text(), format!("scope.{form}").as_bytes());
        assert_eq!(canonical(&document(form)), form.as_bytes());
        let none = Scope { stream: "leads", claims: &[], view: None, select: None };
        assert_eq!(none.text(), br#"scope.{"claims":{},"select":null,"stream":"leads","view":null}"#);
        let of = |key: u8, scope: Scope<'_>| Signer::new("k", Secret::new([key; 32])).expect("a key").scope(&scope);
        let all = [
            of(1, scope),
            of(2, scope),
            of(1, Scope { stream: "leads", ..scope }),
            of(1, Scope { claims: &claims[1..], ..scope }),
            of(1, Scope { view: Some(1), ..scope }),
            of(1, Scope { view: None, ..scope }),
            of(1, Scope { select: None, ..scope }),
            of(1, Scope { select: Some("$['b']"), ..scope }),
        ];
        for (at, one) in all.iter().enumerate() {
            assert!(one.len() == 64 && !all[..at].contains(one), "{at}");
        }
        assert_eq!(of(1, scope), all[0]);
    }

    #[test]
    fn a_key_has_an_id_that_nothing_escapes_and_a_secret_as_long_as_the_hash() {
        let new = |id: &str, bytes: usize| Signer::new(id, Secret::new(vec![1; bytes])).map(|_| ());
        assert_eq!(new(&"k".repeat(SIGNING_KEY_ID_BYTES_MAX), SECRET_BYTES_MIN), Ok(()));
        assert_eq!(new(&"k".repeat(SIGNING_KEY_ID_BYTES_MAX + 1), 32), Err(SignerError::KeyId));
        assert_eq!((new("", 32), new("a\"b", 32)), (Err(SignerError::KeyId), Err(SignerError::KeyId)));
        assert_eq!(new("k", 31), Err(SignerError::ShortSecret { bytes: 31 }));
    }

    /// Values whose strings, numbers and white space are spelled in many ways; members have different names.
    fn any_text() -> impl Strategy<Value = String> {
        let text = r#""([ab/é]|\\["\\/bfnrt]|\\u00[0-7][0-9a-f]|\\ud83d\\ude0[0-9]){0,4}""#;
        let number = "-?(0|[1-9][0-9]{0,3})(\\.[0-9]{1,3})?([eE][+-]?[0-9]{1,2})?";
        let leaf = prop_oneof![Just("null".to_owned()), Just(" true ".to_owned()), text, number];
        leaf.prop_recursive(3, 16, 4, |inner| {
            let members = prop::collection::btree_map("[a-c\u{fffd}\u{1f600}]{0,2}", inner.clone(), 0..4);
            prop_oneof![
                prop::collection::vec(inner, 0..4).prop_map(|items| format!("[ {} ]", items.join(" ,"))),
                members.prop_map(|members| {
                    let members: Vec<String> =
                        members.into_iter().rev().map(|(name, value)| format!("\"{name}\" :{value}")).collect();
                    format!("{{{}}}", members.join(","))
                }),
            ]
        })
    }

    proptest! {
        // The canonical form is the same value, and its own canonical form.
        #[test]
        fn the_canonical_form_is_the_value(value in any_text()) {
            let value = document(&value);
            let form = canonical(&value);
            let again = Document::parse(&form).expect("JSON");
            prop_assert!(again == value);
            prop_assert_eq!(canonical(&again), form);
        }
    }
}
