//! An upstream value: validated once, its insignificant white space removed, all else byte for byte as it came, and a
//! tape of its tokens by which it is walked and compared.
//!
//! Source: RFC 8259, with the restrictions of protocol section 3 «Equality» (they are those of I-JSON, RFC 7493
//! section 2, save that numbers are not looked into): UTF-8 without a BOM, no duplicate member, no lone surrogate, depth at
//! most 128. Numbers keep their spelling: `1`, `1.0` and `1e0` are three values.
//! Memory: the text, and 16 bytes for each name and scalar, 32 for each array and object: at most 10.7 times the text
//! (`[[],[],…]`), commonly about once. `memory_bytes()` tells.
//! Errors: [`JsonError`], the upstream's fault: a place and a reason, never a piece of the body.  Not here: changes
//! (`stream::diff`), documents of our own (serde_json).
//!
//! Each token has a 64-bit hash such that equal values have equal hashes. It is not keyed, so a hostile upstream can make
//! different values collide; nothing but speed may hang on it. Unequal hashes prove a difference, equal ones are followed
//! by a comparison of the text, and what sorts by hash sorts by text after it.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::codec::pointer::{Pointer, array_index};
use crate::limits::JSON_DEPTH_MAX;

/// Largest text of a [`Document`], in bytes: what `response_bytes_max` allows is far smaller.
/// Places in text and tape, of which there are fewer than bytes, fit 32 bits by it.
pub const DOCUMENT_BYTES_MAX: usize = 1 << 30;

/// A JSON value. Cloning shares it.
#[derive(Clone)]
pub struct Document {
    text: Arc<[u8]>,
    tape: Arc<[Slot]>,
}

/// Why a body is no [`Document`], and where in it.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("byte {at}: {fault}")]
pub struct JsonError {
    /// Bytes of the body before the fault.
    pub at: usize,
    /// What is wrong there.
    pub fault: JsonFault,
}

/// What is wrong with a body.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum JsonFault {
    /// Over [`DOCUMENT_BYTES_MAX`].
    #[error("the value is over {bytes_max} bytes")]
    TooLarge {
        /// The most that is taken.
        bytes_max: usize,
    },
    /// RFC 8259 section 8.1: a BOM must not be sent.
    #[error("a byte order mark")]
    ByteOrderMark,
    /// RFC 8259 section 8.1.
    #[error("not UTF-8")]
    NotUtf8,
    /// The body ends within the value, or is empty.
    #[error("the body ends before the value does")]
    UnexpectedEnd,
    /// A byte that RFC 8259's grammar does not have there.
    #[error("a value, name or separator was expected")]
    UnexpectedByte,
    /// More than white space after the value.
    #[error("more after the end of the value")]
    TrailingBytes,
    /// RFC 8259 section 6.
    #[error("not a number as JSON has it")]
    BadNumber,
    /// RFC 8259 section 7: below U+0020 everything is escaped.
    #[error("an unescaped control character in a string")]
    ControlCharacter,
    /// RFC 8259 section 7.
    #[error("an unknown escape in a string")]
    BadEscape,
    /// RFC 7493 section 2.1.
    #[error("a lone surrogate in a string")]
    LoneSurrogate,
    /// RFC 7493 section 2.3.
    #[error("a member's name for the second time in its object")]
    DuplicateMember,
    /// Nested deeper than `limits::JSON_DEPTH_MAX` arrays and objects.
    #[error("arrays and objects nested over {JSON_DEPTH_MAX} deep")]
    TooDeep,
}

/// A value's kind (RFC 8259 section 3); the two Booleans are one.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// `null`
    Null,
    /// `true` or `false`
    Boolean,
    /// A number, known by its spelling.
    Number,
    /// A string.
    String,
    /// An array.
    Array,
    /// An object.
    Object,
}

/// One value within a [`Document`], or one member's name (a string).
#[derive(Clone, Copy)]
pub struct Node<'d> {
    document: &'d Document,
    slot: u32,
}

/// One member of an object.
#[derive(Clone, Copy, Debug)]
pub struct Member<'d> {
    /// Its name: a string.
    pub name: Node<'d>,
    /// Its value.
    pub value: Node<'d>,
}

/// What tells one body from another without keeping it: the first 128 bits of its SHA-256.
///
/// Two bodies with one fingerprint cannot be made, not even by an upstream that tries (a change would go unseen), so it
/// needs no key. With the processor's SHA instructions it is read about four times as fast as [`Document::parse`] parses.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Fingerprint([u8; 16]);

/// The fingerprint of `body`: equal ones mean that nothing need be parsed.
pub fn body_fingerprint(body: &[u8]) -> Fingerprint {
    let digest = ring::digest::digest(&ring::digest::SHA256, body);
    let half = digest.as_ref().first_chunk().expect("a SHA-256 digest has 32 bytes");
    Fingerprint(*half)
}

impl Document {
    /// The value in `body`, white space around it allowed. O(n log n) for an object of n members, otherwise O(bytes).
    pub fn parse(body: &[u8]) -> Result<Document, JsonError> {
        Document::parse_within(body, DOCUMENT_BYTES_MAX)
    }

    fn parse_within(body: &[u8], bytes_max: usize) -> Result<Document, JsonError> {
        if body.len() > bytes_max {
            return Err(JsonError { at: bytes_max, fault: JsonFault::TooLarge { bytes_max } });
        }
        if body.starts_with(b"\xef\xbb\xbf") {
            return Err(JsonError { at: 0, fault: JsonFault::ByteOrderMark });
        }
        if let Err(error) = std::str::from_utf8(body) {
            return Err(JsonError { at: error.valid_up_to(), fault: JsonFault::NotUtf8 });
        }
        Parser::new(body).document()
    }

    /// Its text: valid UTF-8, no insignificant white space, the spelling and order of all else as the upstream sent it.
    pub fn text(&self) -> &Arc<[u8]> {
        &self.text
    }

    /// The value itself.
    pub fn root(&self) -> Node<'_> {
        Node { document: self, slot: 0 }
    }

    /// The value that `pointer` names, if there is one.
    pub fn at(&self, pointer: &Pointer) -> Option<Node<'_>> {
        pointer.tokens().iter().try_fold(self.root(), |node, token| match node.kind() {
            Kind::Object => node.member(token),
            Kind::Array => array_index(token).and_then(|index| node.elements().nth(index)),
            _ => None,
        })
    }

    /// The place on the tape of the value that begins at byte `at` of the text, and of all it holds.
    pub fn span_at(&self, at: usize) -> Option<Range<u32>> {
        let mut node = self.root();
        while node.start() as usize != at {
            // Of those that begin before it the last one holds it, or nothing does.
            let children = node.members().map(|member| member.value).chain(node.elements());
            node = children.take_while(|child| child.start() as usize <= at).last()?;
        }
        Some(node.span())
    }

    /// Bytes of memory it takes.
    pub fn memory_bytes(&self) -> usize {
        self.text.len() + self.tape.len() * size_of::<Slot>()
    }
}

impl fmt::Debug for Document {
    /// Its size only: a log line must not show an upstream's body.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Document({} bytes)", self.text.len())
    }
}

impl PartialEq for Document {
    fn eq(&self, other: &Document) -> bool {
        Arc::ptr_eq(&self.text, &other.text) || self.root() == other.root()
    }
}

impl Eq for Document {}

impl<'d> Node<'d> {
    fn slot_at(self, at: u32) -> Slot {
        // Slots are only ever reached from the root by links the parser wrote; an empty one stands for the impossible.
        self.document.tape.get(at as usize).copied().unwrap_or_default()
    }

    /// Its text, minified.
    pub fn raw(self) -> &'d [u8] {
        let slot = self.slot_at(self.slot);
        self.document.text.get(slot.start as usize..slot.end as usize).unwrap_or_default()
    }

    /// Where its text begins in the document's.
    fn start(self) -> u32 {
        self.slot_at(self.slot).start
    }

    /// What kind of value it is.
    pub fn kind(self) -> Kind {
        match self.document.text.get(self.start() as usize) {
            Some(b'{') => Kind::Object,
            Some(b'[') => Kind::Array,
            Some(b'"') => Kind::String,
            Some(b't' | b'f') => Kind::Boolean,
            Some(b'n') => Kind::Null,
            _ => Kind::Number,
        }
    }

    /// Its hash: unequal hashes prove unequal values; equal ones prove nothing.
    pub fn hash(self) -> u64 {
        self.slot_at(self.slot).hash
    }

    fn is_container(self) -> bool {
        matches!(self.kind(), Kind::Array | Kind::Object)
    }

    /// Members of the object or elements of the array; 0 for scalars.
    pub fn len(self) -> usize {
        if self.is_container() { self.slot_at(self.slot + 1).end as usize } else { 0 }
    }

    /// Whether it has no members or elements.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Its place on the tape and those of all it holds: of two nodes of one document the span of one is within the other's,
    /// or they have nothing in common.
    pub fn span(self) -> Range<u32> {
        self.slot..self.end_slot()
    }

    /// The slot after it and all it holds.
    fn end_slot(self) -> u32 {
        if self.is_container() { self.slot_at(self.slot + 1).start } else { self.slot + 1 }
    }

    /// The array's elements in order; none for other kinds.
    pub fn elements(self) -> Elements<'d> {
        let left = if self.kind() == Kind::Array { self.len() } else { 0 };
        Elements { document: self.document, slot: self.slot + 2, left }
    }

    /// The object's members in the order of the text; none for other kinds.
    pub fn members(self) -> Members<'d> {
        let left = if self.kind() == Kind::Object { self.len() } else { 0 };
        Members { document: self.document, slot: self.slot + 2, left }
    }

    /// The value of the object's member `name`; none for other kinds. O(members).
    pub fn member(self, name: &str) -> Option<Node<'d>> {
        let hash = hash_text(STRING_SEED, name.as_bytes());
        let found = self.members().find(|m| m.name.hash() == hash && *m.name.unescaped() == *name.as_bytes());
        found.map(|m| m.value)
    }

    /// The string's characters in UTF-8, escapes undone; for other kinds the raw text.
    pub fn unescaped(self) -> Cow<'d, [u8]> {
        match string_content(self.raw()) {
            None => Cow::Borrowed(self.raw()),
            Some(content) if !content.contains(&b'\\') => Cow::Borrowed(content),
            Some(content) => Cow::Owned(Unescaped::new(content).collect()),
        }
    }

    /// Whether the two texts are one scalar or name: by spelling, but strings by their characters.
    fn same_scalar(self, other: Node<'_>) -> bool {
        let (a, b) = (self.raw(), other.raw());
        a == b
            || match (string_content(a), string_content(b)) {
                // Without an escape in either, other bytes are other characters.
                (Some(a), Some(b)) => {
                    (a.contains(&b'\\') || b.contains(&b'\\')) && Unescaped::new(a).eq(Unescaped::new(b))
                }
                _ => false,
            }
    }

    /// A total order on scalars and names that agrees with equality; by hash first, so it means nothing to a reader.
    pub fn scalar_order(self, other: Node<'_>) -> Ordering {
        self.hash().cmp(&other.hash()).then_with(|| {
            let (a, b) = (self.raw(), other.raw());
            match (string_content(a), string_content(b)) {
                (Some(a), Some(b)) => Unescaped::new(a).cmp(Unescaped::new(b)),
                _ => a.cmp(b),
            }
        })
    }
}

/// Protocol section 3 «Equality». O(bytes) where the hashes agree, O(1) where they differ; members in another order are
/// sorted first. Recursion is as deep as the values are, at most 128.
impl PartialEq for Node<'_> {
    fn eq(&self, other: &Self) -> bool {
        if self.hash() != other.hash() {
            return false;
        }
        if self.raw() == other.raw() {
            return true;
        }
        match (self.kind(), other.kind()) {
            (Kind::Array, Kind::Array) => self.len() == other.len() && self.elements().eq(other.elements()),
            (Kind::Object, Kind::Object) => self.len() == other.len() && changed_members(*self, *other).is_empty(),
            (Kind::String, Kind::String) => self.same_scalar(*other),
            _ => false,
        }
    }
}

impl Eq for Node<'_> {}

impl fmt::Debug for Node<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}({} bytes)", self.kind(), self.raw().len())
    }
}

/// The elements of an array.
#[derive(Clone, Debug)]
pub struct Elements<'d> {
    document: &'d Document,
    slot: u32,
    left: usize,
}

impl<'d> Iterator for Elements<'d> {
    type Item = Node<'d>;

    fn next(&mut self) -> Option<Node<'d>> {
        self.left = self.left.checked_sub(1)?;
        let node = Node { document: self.document, slot: self.slot };
        self.slot = node.end_slot();
        Some(node)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Elements<'_> {}

/// The members of an object.
#[derive(Clone, Debug)]
pub struct Members<'d> {
    document: &'d Document,
    slot: u32,
    left: usize,
}

impl<'d> Iterator for Members<'d> {
    type Item = Member<'d>;

    fn next(&mut self) -> Option<Member<'d>> {
        self.left = self.left.checked_sub(1)?;
        let name = Node { document: self.document, slot: self.slot };
        let value = Node { document: self.document, slot: self.slot + 1 };
        self.slot = value.end_slot();
        Some(Member { name, value })
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Members<'_> {}

/// One member that two objects do not have alike.
#[derive(Clone, Copy, Debug)]
pub enum MemberChange<'a, 'b> {
    /// Only the old object has it.
    Removed(Member<'a>),
    /// Only the new object has it.
    Added(Member<'b>),
    /// Both have it, with other values.
    Differs(Member<'a>, Member<'b>),
}

impl MemberChange<'_, '_> {
    /// Removed ones in the old text's order, then the others in the new text's.
    fn text_order(&self) -> (bool, u32) {
        match self {
            MemberChange::Removed(old) => (false, old.name.start()),
            MemberChange::Added(new) | MemberChange::Differs(_, new) => (true, new.name.start()),
        }
    }
}

/// The members that the objects `old` and `new` do not have alike: removed ones in the old order, then the others in the
/// new order. O(n) where both name theirs in one order, otherwise O(n log n).
pub fn changed_members<'a, 'b>(old: Node<'a>, new: Node<'b>) -> Vec<MemberChange<'a, 'b>> {
    let mut changes = Vec::new();
    let (mut olds, mut news) = (old.members(), new.members());
    loop {
        let (rest_old, rest_new) = (olds.clone(), news.clone());
        match (olds.next(), news.next()) {
            (Some(a), Some(b)) if a.name == b.name => {
                if a.value != b.value {
                    changes.push(MemberChange::Differs(a, b));
                }
            }
            (None, None) => return changes,
            _ => {
                changes_by_name(rest_old, rest_new, &mut changes);
                changes.sort_by_cached_key(MemberChange::text_order);
                return changes;
            }
        }
    }
}

/// [`changed_members`] where the order of the names is of no help: both sides are sorted and merged.
fn changes_by_name<'a, 'b>(olds: Members<'a>, news: Members<'b>, changes: &mut Vec<MemberChange<'a, 'b>>) {
    let (mut olds, mut news) = (sorted(olds).into_iter().peekable(), sorted(news).into_iter().peekable());
    loop {
        let order = match (olds.peek(), news.peek()) {
            (Some(a), Some(b)) => name_order(a, b),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => return,
        };
        let a = if order.is_le() { olds.next() } else { None };
        let b = if order.is_ge() { news.next() } else { None };
        match (a, b) {
            (Some((_, a)), Some((_, b))) if a.value != b.value => changes.push(MemberChange::Differs(a, b)),
            (Some((_, a)), None) => changes.push(MemberChange::Removed(a)),
            (None, Some((_, b))) => changes.push(MemberChange::Added(b)),
            _ => {}
        }
    }
}

/// Members in the order of their names ([`Node::scalar_order`]), each with its name's hash at hand, so that sorting
/// many of them seldom looks elsewhere.
fn sorted(members: Members<'_>) -> Vec<(u64, Member<'_>)> {
    let mut sorted: Vec<_> = members.map(|member| (member.name.hash(), member)).collect();
    sorted.sort_unstable_by(name_order);
    sorted
}

fn name_order((a_hash, a): &(u64, Member<'_>), (b_hash, b): &(u64, Member<'_>)) -> Ordering {
    a_hash.cmp(b_hash).then_with(|| a.name.scalar_order(b.name))
}

/// Appends `text` as a JSON string, quotes included: what RFC 8259 section 7 wants escaped is, nothing else.
pub fn write_string(out: &mut Vec<u8>, text: &str) {
    const HEX: [u8; 16] = *b"0123456789abcdef";
    out.push(b'"');
    for &b in text.as_bytes() {
        match b {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            0x08 => out.extend_from_slice(b"\\b"),
            0x09 => out.extend_from_slice(b"\\t"),
            0x0a => out.extend_from_slice(b"\\n"),
            0x0c => out.extend_from_slice(b"\\f"),
            0x0d => out.extend_from_slice(b"\\r"),
            0..0x20 => {
                out.extend_from_slice(b"\\u00");
                out.extend([b >> 4, b & 15].iter().filter_map(|&digit| HEX.get(usize::from(digit))));
            }
            _ => out.push(b),
        }
    }
    out.push(b'"');
}

/// One entry of the tape. A name or scalar: its span and hash. An array or object has two: the same, then in `start` the
/// slot after its last descendant and in `end` the count of its members or elements.
#[derive(Clone, Copy, Default)]
struct Slot {
    start: u32,
    end: u32,
    hash: u64,
}

const _: () = assert!(size_of::<Slot>() == 16);

const STRING_SEED: u64 = 0x9e37_79b9_7f4a_7c15;
const SCALAR_SEED: u64 = 0xd1b5_4a32_d192_ed03;
const ARRAY_SEED: u64 = 0x8cb9_2ba7_2f3d_8dd7;
const OBJECT_SEED: u64 = 0xa076_1d64_78bd_642f;
const SPREAD: u64 = 0xe703_7ed1_a0b4_28db;

/// Both halves of a product: each bit of either factor moves many of the result.
fn fold(a: u64, b: u64) -> u64 {
    let (low, high) = a.carrying_mul(b, 0);
    low ^ high
}

fn hash_text(seed: u64, text: &[u8]) -> u64 {
    let (words, rest) = text.as_chunks::<8>();
    let hash = words.iter().fold(seed ^ text.len() as u64, |hash, word| fold(hash ^ u64::from_le_bytes(*word), SPREAD));
    let rest = rest.iter().fold(0, |word, &b| word << 8 | u64::from(b));
    fold(hash ^ rest, STRING_SEED ^ SPREAD)
}

/// What stands between the quotes of `raw`, if it is a string.
fn string_content(raw: &[u8]) -> Option<&[u8]> {
    raw.strip_prefix(b"\"").and_then(|raw| raw.strip_suffix(b"\""))
}

/// Four hex digits.
fn hex4(digits: &[u8; 4]) -> Option<u32> {
    digits.iter().try_fold(0, |value, &b| char::from(b).to_digit(16).map(|digit| value << 4 | digit))
}

/// The bytes of a string's content, escapes undone. The content has been validated; what could not be is passed over.
#[derive(Clone)]
struct Unescaped<'t> {
    content: std::slice::Iter<'t, u8>,
    /// UTF-8 of a character that was escaped, and the next of its bytes.
    character: [u8; 4],
    next: u8,
    len: u8,
}

impl<'t> Unescaped<'t> {
    fn new(content: &'t [u8]) -> Unescaped<'t> {
        Unescaped { content: content.iter(), character: [0; 4], next: 0, len: 0 }
    }

    fn unit(&mut self) -> Option<u32> {
        let (digits, rest) = self.content.as_slice().split_first_chunk::<4>()?;
        self.content = rest.iter();
        hex4(digits)
    }

    /// The character of a `\u` escape whose `\u` has been read.
    fn unicode(&mut self) -> Option<char> {
        let first = self.unit()?;
        if !(0xd800..0xdc00).contains(&first) {
            return char::from_u32(first);
        }
        // RFC 8259 section 7: beyond the basic plane an escape is a pair of surrogates.
        self.content = self.content.as_slice().strip_prefix(b"\\u")?.iter();
        let second = self.unit()?;
        char::from_u32(0x1_0000 + ((first & 0x3ff) << 10 | second & 0x3ff))
    }
}

impl Iterator for Unescaped<'_> {
    type Item = u8;

    fn next(&mut self) -> Option<u8> {
        if self.next < self.len {
            let byte = self.character.get(usize::from(self.next)).copied();
            self.next += 1;
            return byte;
        }
        match self.content.next()? {
            b'\\' => match self.content.next()? {
                b'b' => Some(0x08),
                b'f' => Some(0x0c),
                b'n' => Some(b'\n'),
                b'r' => Some(b'\r'),
                b't' => Some(b'\t'),
                b'u' => {
                    let character = self.unicode()?;
                    self.len = u8::try_from(character.encode_utf8(&mut self.character).len()).unwrap_or(0);
                    self.next = 1;
                    self.character.first().copied()
                }
                &other => Some(other),
            },
            &other => Some(other),
        }
    }
}

/// An array or object whose end has not been read.
struct Open {
    slot: usize,
    is_object: bool,
    count: u32,
    /// Over the elements in their order, or over the members in any.
    hash: u64,
    /// Of the member whose value comes next.
    name_hash: u64,
    /// Where its names begin in `Parser::names`.
    names_from: usize,
}

/// A name read in an object that is still open.
#[derive(Clone, Copy)]
struct Name {
    hash: u64,
    /// Its content in the body, between the quotes.
    from: u32,
    to: u32,
}

struct Parser<'b> {
    body: &'b [u8],
    at: usize,
    /// Bytes of white space skipped: a place in the text is the place in the body less this.
    skipped: usize,
    /// The text up to `copied` in the body; filled from one stretch of white space to the next.
    text: Vec<u8>,
    copied: usize,
    tape: Vec<Slot>,
    open: Vec<Open>,
    names: Vec<Name>,
    scratch: Vec<u8>,
}

/// Objects of up to this many members are looked through for duplicates pair by pair, larger ones by sorting.
const PAIRWISE_NAMES_MAX: usize = 12;

impl<'b> Parser<'b> {
    fn new(body: &'b [u8]) -> Parser<'b> {
        Parser {
            body,
            at: 0,
            skipped: 0,
            text: Vec::new(),
            copied: 0,
            // A guess at a common density, so that a large value's tape is moved seldom.
            tape: Vec::with_capacity(body.len() / 12 + 2),
            open: Vec::new(),
            names: Vec::new(),
            scratch: Vec::new(),
        }
    }

    fn fault<T>(&self, fault: JsonFault) -> Result<T, JsonError> {
        let ended = self.at >= self.body.len() && fault == JsonFault::UnexpectedByte;
        let fault = if ended { JsonFault::UnexpectedEnd } else { fault };
        Err(JsonError { at: self.at.min(self.body.len()), fault })
    }

    fn peek(&self) -> Option<u8> {
        self.body.get(self.at).copied()
    }

    /// The place in the text of the place `at` in the body.
    fn place(&self, at: usize) -> u32 {
        u32::try_from(at - self.skipped).expect("a text has at most DOCUMENT_BYTES_MAX bytes")
    }

    fn next_slot(&self) -> u32 {
        u32::try_from(self.tape.len()).expect("a tape has at most two slots for three bytes of text")
    }

    #[inline]
    fn skip_space(&mut self) {
        if self.peek().is_some_and(|b| b <= b' ') {
            self.skip_space_found();
        }
    }

    fn skip_space_found(&mut self) {
        let from = self.at;
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
        if self.at > from {
            self.text.extend_from_slice(self.body.get(self.copied..from).unwrap_or_default());
            self.copied = self.at;
            self.skipped += self.at - from;
        }
    }

    fn document(mut self) -> Result<Document, JsonError> {
        self.skip_space();
        while !self.value()? {}
        self.skip_space();
        if self.at < self.body.len() {
            return self.fault(JsonFault::TrailingBytes);
        }
        let text = if self.skipped == 0 {
            Arc::from(self.body)
        } else {
            self.text.extend_from_slice(self.body.get(self.copied..).unwrap_or_default());
            Arc::from(self.text)
        };
        Ok(Document { text, tape: Arc::from(self.tape) })
    }

    /// Reads the beginning of a value, which for a scalar is all of it, and what ends after it, up to the beginning of
    /// the next value. True when that was the end of the outermost.
    fn value(&mut self) -> Result<bool, JsonError> {
        let from = self.at;
        let hash = match self.peek() {
            Some(b'"') => self.string()?.hash,
            Some(b'{') => return self.begin(true),
            Some(b'[') => return self.begin(false),
            Some(b'-' | b'0'..=b'9') => self.number()?,
            Some(b't') => self.literal(b"true")?,
            Some(b'f') => self.literal(b"false")?,
            Some(b'n') => self.literal(b"null")?,
            _ => return self.fault(JsonFault::UnexpectedByte),
        };
        self.tape.push(Slot { start: self.place(from), end: self.place(self.at), hash });
        self.after_value(hash)
    }

    fn begin(&mut self, is_object: bool) -> Result<bool, JsonError> {
        if self.open.len() == JSON_DEPTH_MAX {
            return self.fault(JsonFault::TooDeep);
        }
        let slot = self.tape.len();
        self.tape.push(Slot { start: self.place(self.at), ..Slot::default() });
        self.tape.push(Slot::default());
        let hash = if is_object { OBJECT_SEED } else { ARRAY_SEED };
        self.open.push(Open { slot, is_object, count: 0, hash, name_hash: 0, names_from: self.names.len() });
        self.at += 1;
        self.skip_space();
        match (is_object, self.peek()) {
            (true, Some(b'}')) | (false, Some(b']')) => {
                let hash = self.end()?;
                self.after_value(hash)
            }
            (true, _) => self.name().map(|()| false),
            (false, _) => Ok(false),
        }
    }

    /// Counts a value that has been read to where it belongs and reads on up to the next one.
    fn after_value(&mut self, mut hash: u64) -> Result<bool, JsonError> {
        loop {
            let Some(open) = self.open.last_mut() else { return Ok(true) };
            open.count += 1;
            open.hash = if open.is_object {
                open.hash.wrapping_add(fold(open.name_hash ^ SPREAD, hash ^ OBJECT_SEED))
            } else {
                fold(open.hash ^ hash, SPREAD)
            };
            let is_object = open.is_object;
            self.skip_space();
            match (is_object, self.peek()) {
                (_, Some(b',')) => {
                    self.at += 1;
                    self.skip_space();
                    if is_object {
                        self.name()?;
                    }
                    return Ok(false);
                }
                (true, Some(b'}')) | (false, Some(b']')) => hash = self.end()?,
                _ => return self.fault(JsonFault::UnexpectedByte),
            }
        }
    }

    /// Ends the innermost array or object at its bracket; its hash.
    fn end(&mut self) -> Result<u64, JsonError> {
        let Some(open) = self.open.pop() else { return self.fault(JsonFault::UnexpectedByte) };
        self.at += 1;
        let (end, next) = (self.place(self.at), self.next_slot());
        let hash = fold(open.hash ^ u64::from(open.count), ARRAY_SEED);
        if let Some([head, links]) = self.tape.get_mut(open.slot..open.slot + 2) {
            head.end = end;
            head.hash = hash;
            *links = Slot { start: next, end: open.count, hash: 0 };
        }
        if open.is_object {
            if open.count > 1 {
                self.refuse_duplicates(open.names_from)?;
            }
            self.names.truncate(open.names_from);
        }
        Ok(hash)
    }

    /// Reads a member's name and its colon.
    fn name(&mut self) -> Result<(), JsonError> {
        if self.peek() != Some(b'"') {
            return self.fault(JsonFault::UnexpectedByte);
        }
        let from = self.at;
        let name = self.string()?;
        self.tape.push(Slot { start: self.place(from), end: self.place(self.at), hash: name.hash });
        self.names.push(name);
        if let Some(open) = self.open.last_mut() {
            open.name_hash = name.hash;
        }
        self.skip_space();
        if self.peek() != Some(b':') {
            return self.fault(JsonFault::UnexpectedByte);
        }
        self.at += 1;
        self.skip_space();
        Ok(())
    }

    fn refuse_duplicates(&mut self, names_from: usize) -> Result<(), JsonError> {
        let body = self.body;
        let Some(names) = self.names.get_mut(names_from..) else { return Ok(()) };
        let content = |name: &Name| Unescaped::new(body.get(name.from as usize..name.to as usize).unwrap_or_default());
        let again = if names.len() <= PAIRWISE_NAMES_MAX {
            let mut rest = &*names;
            let mut again = None;
            while let Some((first, others)) = rest.split_first() {
                again = again.or(others.iter().find(|n| n.hash == first.hash && content(n).eq(content(first))));
                rest = others;
            }
            again.map(|name| name.from)
        } else {
            // By the characters after the hash: names made to collide must not cost n * n.
            let order = |a: &Name, b: &Name| a.hash.cmp(&b.hash).then_with(|| content(a).cmp(content(b)));
            names.sort_unstable_by(order);
            let pairs = names.array_windows::<2>();
            pairs.filter(|[a, b]| order(a, b).is_eq()).map(|[a, b]| a.from.max(b.from)).min()
        };
        match again {
            None => Ok(()),
            // The name's opening quote.
            Some(from) => Err(JsonError { at: from as usize - 1, fault: JsonFault::DuplicateMember }),
        }
    }

    fn literal(&mut self, literal: &[u8]) -> Result<u64, JsonError> {
        for &b in literal {
            if self.peek() != Some(b) {
                return self.fault(JsonFault::UnexpectedByte);
            }
            self.at += 1;
        }
        Ok(hash_text(SCALAR_SEED, literal))
    }

    fn digits(&mut self) -> Result<(), JsonError> {
        let from = self.at;
        while matches!(self.peek(), Some(b'0'..=b'9')) {
            self.at += 1;
        }
        if self.at > from {
            return Ok(());
        }
        self.fault(if self.at < self.body.len() { JsonFault::BadNumber } else { JsonFault::UnexpectedEnd })
    }

    /// RFC 8259 section 6: `-`? (`0` | [1-9] digits) (`.` digits)? ([eE] [+-]? digits)?
    fn number(&mut self) -> Result<u64, JsonError> {
        let from = self.at;
        if self.peek() == Some(b'-') {
            self.at += 1;
        }
        if self.peek() == Some(b'0') {
            self.at += 1;
            if matches!(self.peek(), Some(b'0'..=b'9')) {
                return self.fault(JsonFault::BadNumber);
            }
        } else {
            self.digits()?;
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        if matches!(self.peek(), Some(b'e' | b'E')) {
            self.at += 1;
            if matches!(self.peek(), Some(b'+' | b'-')) {
                self.at += 1;
            }
            self.digits()?;
        }
        Ok(hash_text(SCALAR_SEED, self.body.get(from..self.at).unwrap_or_default()))
    }

    /// Reads a string from its opening quote to after its closing one.
    fn string(&mut self) -> Result<Name, JsonError> {
        self.at += 1;
        let from = self.at;
        let mut escaped = false;
        loop {
            self.skip_plain();
            match self.peek() {
                Some(b'"') => break,
                Some(b'\\') => {
                    escaped = true;
                    self.escape()?;
                }
                Some(0..0x20) => return self.fault(JsonFault::ControlCharacter),
                Some(_) => self.at += 1,
                None => return self.fault(JsonFault::UnexpectedEnd),
            }
        }
        let content = self.body.get(from..self.at).unwrap_or_default();
        let hash = if escaped {
            self.scratch.clear();
            self.scratch.extend(Unescaped::new(content));
            hash_text(STRING_SEED, &self.scratch)
        } else {
            hash_text(STRING_SEED, content)
        };
        let bound = |at| u32::try_from(at).expect("a body has at most DOCUMENT_BYTES_MAX bytes");
        let name = Name { hash, from: bound(from), to: bound(self.at) };
        self.at += 1;
        Ok(name)
    }

    /// Skips what needs no look, eight bytes at a time, up to the quote, backslash or control character that does.
    #[inline]
    fn skip_plain(&mut self) {
        const ONES: u64 = 0x0101_0101_0101_0101;
        const HIGHS: u64 = 0x8080_8080_8080_8080;
        // A byte is zero where its high bit is set in this; above the lowest such byte there may be false ones.
        let zeros = |word: u64| word.wrapping_sub(ONES) & !word & HIGHS;
        while let Some(word) = self.body.get(self.at..).and_then(|rest| rest.first_chunk::<8>()) {
            let word = u64::from_le_bytes(*word);
            let control = word.wrapping_sub(ONES * 0x20) & !word & HIGHS;
            let found = zeros(word ^ (ONES * u64::from(b'"'))) | zeros(word ^ (ONES * u64::from(b'\\'))) | control;
            if found != 0 {
                self.at += found.trailing_zeros() as usize / 8;
                return;
            }
            self.at += 8;
        }
    }

    /// Reads one escape, from its backslash; a pair of surrogates is one.
    fn escape(&mut self) -> Result<(), JsonError> {
        match self.body.get(self.at + 1) {
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => {
                self.at += 2;
                Ok(())
            }
            Some(b'u') => match self.unit(self.at)? {
                0xd800..0xdc00 => match self.body.get(self.at + 6..self.at + 8) {
                    Some(b"\\u") if (0xdc00..0xe000).contains(&self.unit(self.at + 6)?) => {
                        self.at += 12;
                        Ok(())
                    }
                    _ => self.fault(JsonFault::LoneSurrogate),
                },
                0xdc00..0xe000 => self.fault(JsonFault::LoneSurrogate),
                _ => {
                    self.at += 6;
                    Ok(())
                }
            },
            Some(_) => self.fault(JsonFault::BadEscape),
            None => {
                self.at += 1;
                self.fault(JsonFault::UnexpectedEnd)
            }
        }
    }

    /// The UTF-16 unit that the escape at `at` spells.
    fn unit(&self, at: usize) -> Result<u32, JsonError> {
        let digits = self.body.get(at + 2..).and_then(|rest| rest.first_chunk::<4>());
        digits.and_then(hex4).ok_or(JsonError { at, fault: JsonFault::BadEscape })
    }
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::cast_possible_truncation, reason = "a test that panics has failed")]
pub(crate) mod tests {
    use super::*;

    fn parse(text: &str) -> Document {
        Document::parse(text.as_bytes()).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    fn check(body: &str, minified: &str) {
        assert_eq!(String::from_utf8_lossy(parse(body).text()), minified);
    }

    fn refuse(body: impl AsRef<[u8]>, at: usize, fault: JsonFault) {
        let body = body.as_ref();
        let found = Document::parse(body).expect_err(&String::from_utf8_lossy(body));
        assert_eq!(found, JsonError { at, fault }, "{}", String::from_utf8_lossy(body));
    }

    #[test]
    fn white_space_goes_and_all_else_stays() {
        check(" \t\r\n[ 1 , 1.0 , 1E5 , -0 , 1e+00 ]\n", "[1,1.0,1E5,-0,1e+00]");
        check("{ \"b\" : [ ] , \"a\" : { } }", r#"{"b":[],"a":{}}"#);
        check(r#""\u0061 \/ \" \\ é  tab\t""#, r#""\u0061 \/ \" \\ é  tab\t""#);
        check(" null ", "null");
        check("[\"  kept  \" ]", "[\"  kept  \"]");
    }

    #[test]
    fn values_that_json_has_are_taken() {
        for body in [
            "null",
            "true",
            "false",
            "0",
            "-0",
            "1",
            "-1",
            "10",
            "1.5",
            "0.10",
            "1e5",
            "1E5",
            "1e+5",
            "1e-5",
            "0e0",
            "-0.0e-0",
            "123456789012345678901234567890",
            "1e99999",
            "4.9E-324",
            r#""""#,
            r#""a""#,
            r#""\u0000""#,
            r#""\"\\\/\b\f\n\r\t""#,
            r#""\uD83D\uDE00""#,
            r#""\ud83d\ude00x""#,
            r#""\uFFFF""#,
            "\"\u{7f}\"",
            "\"\u{2028}\u{feff}\"",
            "\"\u{10FFFF}\"",
            "[]",
            "{}",
            "[[]]",
            "[{}]",
            r#"{"":{"":[]}}"#,
            r#"{"a":1,"b":1}"#,
            r#"{"a":{"a":1}}"#,
            r#"[{"a":1},{"a":1}]"#,
            "[1,2,3]",
            "[null,true,false]",
            "\t[\n1\r]\n ",
            r#"{"é":1,"e\u0301":2}"#,
            "[\"exactly\",\"12345678\",\"1234567\\\"\"]",
        ] {
            let document = parse(body);
            let again = Document::parse(document.text()).expect("what was minified parses");
            assert_eq!(again.text(), document.text());
            assert_eq!(again, document);
        }
    }

    #[test]
    fn what_json_does_not_have_is_refused_with_its_place() {
        use JsonFault::*;
        for (body, at, fault) in [
            ("", 0, UnexpectedEnd),
            ("  ", 2, UnexpectedEnd),
            ("[", 1, UnexpectedEnd),
            ("{", 1, UnexpectedEnd),
            ("[1", 2, UnexpectedEnd),
            ("[1,", 3, UnexpectedEnd),
            (r#"{"a""#, 4, UnexpectedEnd),
            (r#"{"a":"#, 5, UnexpectedEnd),
            (r#"{"a":1"#, 6, UnexpectedEnd),
            (r#"{"a":1,"#, 7, UnexpectedEnd),
            ("\"", 1, UnexpectedEnd),
            ("\"abc", 4, UnexpectedEnd),
            ("\"\\", 2, UnexpectedEnd),
            ("tru", 3, UnexpectedEnd),
            ("-", 1, UnexpectedEnd),
            ("1.", 2, UnexpectedEnd),
            ("1e", 2, UnexpectedEnd),
            ("1e+", 3, UnexpectedEnd),
            ("[1,]", 3, UnexpectedByte),
            ("[,1]", 1, UnexpectedByte),
            ("[1 2]", 3, UnexpectedByte),
            ("[1}", 2, UnexpectedByte),
            (r#"{"a":1]"#, 6, UnexpectedByte),
            (r#"{"a":1,}"#, 7, UnexpectedByte),
            (r#"{"a" 1}"#, 5, UnexpectedByte),
            (r#"{"a",1}"#, 4, UnexpectedByte),
            (r#"{"a":}"#, 5, UnexpectedByte),
            (r#"{"a"::1}"#, 5, UnexpectedByte),
            (r#"{a:1}"#, 1, UnexpectedByte),
            (r#"{1:1}"#, 1, UnexpectedByte),
            (r#"{'a':1}"#, 1, UnexpectedByte),
            (r#"{,}"#, 1, UnexpectedByte),
            (r#"{null:1}"#, 1, UnexpectedByte),
            ("]", 0, UnexpectedByte),
            ("'a'", 0, UnexpectedByte),
            ("nul]", 3, UnexpectedByte),
            ("True", 0, UnexpectedByte),
            ("NaN", 0, UnexpectedByte),
            ("Infinity", 0, UnexpectedByte),
            ("+1", 0, UnexpectedByte),
            (".5", 0, UnexpectedByte),
            ("[// no\n1]", 1, UnexpectedByte),
            ("[\u{a0}1]", 1, UnexpectedByte),
            ("[\u{0c}1]", 1, UnexpectedByte),
            ("[0x10]", 2, UnexpectedByte),
            ("[1_000]", 2, UnexpectedByte),
            ("01", 1, BadNumber),
            ("-01", 2, BadNumber),
            ("00", 1, BadNumber),
            ("-a", 1, BadNumber),
            ("-Infinity", 1, BadNumber),
            ("1.e5", 2, BadNumber),
            ("[1.]", 3, BadNumber),
            ("[1e]", 3, BadNumber),
            ("[1e+]", 4, BadNumber),
            ("[1e5.5]", 4, UnexpectedByte),
            ("1 2", 2, TrailingBytes),
            ("{}}", 2, TrailingBytes),
            ("[]x", 2, TrailingBytes),
            ("null\0", 4, TrailingBytes),
            ("\"a\"\"b\"", 3, TrailingBytes),
            ("\"\n\"", 1, ControlCharacter),
            ("\"\0\"", 1, ControlCharacter),
            ("\"12345678\u{1f}\"", 9, ControlCharacter),
            ("[\"a\tb\"]", 3, ControlCharacter),
            (r#""\x41""#, 1, BadEscape),
            (r#""\'""#, 1, BadEscape),
            (r#""\U0041""#, 1, BadEscape),
            (r#""\u12""#, 1, BadEscape),
            (r#""\u12G4""#, 1, BadEscape),
            (r#""\u+123""#, 1, BadEscape),
            (r#""\ud800""#, 1, LoneSurrogate),
            (r#""\ud800x""#, 1, LoneSurrogate),
            (r#""\ud800\n""#, 1, LoneSurrogate),
            (r#""\udc00""#, 1, LoneSurrogate),
            (r#""\ud800\ud800""#, 1, LoneSurrogate),
            (r#""\ud800\u0041""#, 1, LoneSurrogate),
            (r#""\ude00\ud83d""#, 1, LoneSurrogate),
            (r#"{"\udfff":1}"#, 2, LoneSurrogate),
            (r#"{"a":1,"a":1}"#, 7, DuplicateMember),
            (r#"{"a":1, "\u0061":2}"#, 8, DuplicateMember),
            (r#"{"":1,"":1}"#, 6, DuplicateMember),
            (r#"[{"b":{"a":1,"c":2,"a":3}}]"#, 19, DuplicateMember),
            ("\u{feff}1", 0, ByteOrderMark),
            ("1\u{feff}", 1, TrailingBytes),
        ] {
            refuse(body, at, fault);
        }
        for (body, at) in [
            (&b"\"\xff\""[..], 1),
            (b"\"\xc0\xaf\"", 1),
            (b"\"\xed\xa0\x80\"", 1),
            (b"\"\xf4\x90\x80\x80\"", 1),
            (b"\"\xe2\x82\"", 1),
            (b"[1]\x80", 3),
            (b"\xff\xfe[\0]\0", 0),
        ] {
            refuse(body, at, NotUtf8);
        }
    }

    #[test]
    fn a_duplicate_among_many_members_is_found() {
        for count in [PAIRWISE_NAMES_MAX - 1, PAIRWISE_NAMES_MAX, PAIRWISE_NAMES_MAX + 1, 1000] {
            let members: Vec<String> = (0..count).map(|n| format!("\"m{n}\":{n}")).collect();
            let all = members.join(",");
            assert_eq!(parse(&format!("{{{all}}}")).root().len(), count);
            refuse(format!("{{{all},\"m\\u0033\":0}}"), all.len() + 2, JsonFault::DuplicateMember);
        }
    }

    #[test]
    fn depth_is_bounded_at_its_value() {
        let mixed = "[{\"a\":".repeat(JSON_DEPTH_MAX / 2) + "1" + &"}]".repeat(JSON_DEPTH_MAX / 2);
        assert!(Document::parse(mixed.as_bytes()).is_ok());
        refuse(mixed.replace('1', "[]"), JSON_DEPTH_MAX * 3, JsonFault::TooDeep);
        refuse("[".repeat(JSON_DEPTH_MAX + 1), JSON_DEPTH_MAX, JsonFault::TooDeep);
        refuse("[".repeat(JSON_DEPTH_MAX), JSON_DEPTH_MAX, JsonFault::UnexpectedEnd);
        let wide = format!("[{}]", vec!["[".repeat(JSON_DEPTH_MAX - 1) + &"]".repeat(JSON_DEPTH_MAX - 1); 3].join(","));
        assert_eq!(parse(&wide).root().len(), 3);
    }

    #[test]
    fn size_is_bounded_at_its_value() {
        assert!(Document::parse_within(b"[1,2,3]", 7).is_ok());
        let error = Document::parse_within(b"[1,2,3]", 6).expect_err("one past");
        assert_eq!(error, JsonError { at: 6, fault: JsonFault::TooLarge { bytes_max: 6 } });
    }

    #[test]
    fn equality_looks_at_meaning_but_for_the_spelling_of_numbers() {
        for (a, b, equal) in [
            (r#"{"a":1,"b":[{"c":2,"d":3}]}"#, r#" { "b" : [ {"d":3, "c":2} ], "a":1 }"#, true),
            (r#""\u0061\/\ud83d\ude00""#, "\"a/\u{1F600}\"", true),
            (r#"{"\u0061":1}"#, r#"{"a":1}"#, true),
            (r#"{"a":{"x":[],"y":{}},"b":"\n"}"#, r#"{"b":"\u000A","a":{"y":{},"x":[]}}"#, true),
            ("1", "1.0", false),
            ("1", "1e0", false),
            ("1E5", "1e5", false),
            ("0", "-0", false),
            ("[1,2]", "[2,1]", false),
            ("1", "\"1\"", false),
            ("null", "false", false),
            ("[]", "{}", false),
            ("[]", "[null]", false),
            ("[[],[]]", "[[[]]]", false),
            (r#"{"a":1}"#, r#"{"b":1}"#, false),
            (r#"{"a":1,"b":2}"#, r#"{"a":2,"b":1}"#, false),
            (r#"{"a":{"b":1},"c":{}}"#, r#"{"a":{},"c":{"b":1}}"#, false),
            (r#""é""#, r#""e\u0301""#, false),
            (r#""\\u0061""#, r#""a""#, false),
        ] {
            let (left, right) = (parse(a), parse(b));
            assert_eq!(left == right, equal, "{a} {b}");
            assert_eq!(left.root().hash() == right.root().hash(), equal, "{a} {b}");
        }
    }

    /// Different strings of one hash, as a hostile upstream would compute them: the hash has no key, and a word equal to
    /// the state makes it forget all before.
    pub(crate) fn colliding_strings(count: usize) -> Vec<String> {
        let mut strings = Vec::new();
        for n in 0u64.. {
            let first = format!("{n:08}");
            let word = u64::from_le_bytes(*first.as_bytes().first_chunk().expect("eight digits"));
            let second = fold(STRING_SEED ^ 16 ^ word, SPREAD).to_le_bytes();
            if second.iter().all(|&b| b.is_ascii_alphanumeric() || b"-_.~/ ".contains(&b)) {
                strings.push(first + std::str::from_utf8(&second).expect("ASCII"));
            }
            if strings.len() == count {
                break;
            }
        }
        strings
    }

    #[test]
    fn values_of_one_hash_are_told_apart_by_their_text() {
        let names = colliding_strings(100);
        let (a, b) = (parse(&format!("[{:?}]", names[0])), parse(&format!("[{:?}]", names[1])));
        assert_eq!(a.root().hash(), b.root().hash());
        assert_ne!(a, b);

        let members: Vec<String> = names.iter().map(|name| format!("{name:?}:0")).collect();
        let all = format!("{{{}}}", members.join(","));
        let reversed: Vec<&str> = members.iter().rev().map(String::as_str).collect();
        assert_eq!(parse(&all), parse(&format!("{{{}}}", reversed.join(","))));
        let again = format!("{},{}}}", all.trim_end_matches('}'), members[40]);
        refuse(again, all.len(), JsonFault::DuplicateMember);
    }

    #[test]
    fn a_document_is_walked_by_its_tape() {
        let document = parse(r#"{"a":[1,{"b":null},[]],"c~d/e":"x\ty"}"#);
        let root = document.root();
        assert_eq!((root.kind(), root.len()), (Kind::Object, 2));
        let array = root.member("a").expect("a member");
        let kinds: Vec<Kind> = array.elements().map(Node::kind).collect();
        assert_eq!(kinds, [Kind::Number, Kind::Object, Kind::Array]);
        assert_eq!(root.member("c~d/e").expect("a member").unescaped().as_ref(), b"x\ty");
        assert!(root.member("d").is_none() && array.member("a").is_none());
        assert_eq!(array.members().count() + root.elements().count(), 0);

        let at = |pointer: &str| document.at(&Pointer::parse(pointer).expect("a pointer")).map(|node| node.raw());
        assert_eq!(at(""), Some(&document.text()[..]));
        assert_eq!(at("/a/0"), Some(&b"1"[..]));
        assert_eq!(at("/a/1/b"), Some(&b"null"[..]));
        assert_eq!(at("/c~0d~1e"), Some(&br#""x\ty""#[..]));
        for nowhere in ["/b", "/a/3", "/a/-", "/a/01", "/a/0/0", "/a/x"] {
            assert_eq!(at(nowhere), None, "{nowhere}");
        }
    }

    #[test]
    fn a_document_shows_nothing_of_the_body() {
        let document = parse(r#"{"password":"hunter2"}"#);
        assert_eq!(format!("{document:?} {:?}", document.root()), "Document(22 bytes) Object(22 bytes)");
        assert_eq!(document.memory_bytes(), 22 + 4 * 16);
    }

    #[test]
    fn a_fingerprint_tells_bodies_apart() {
        assert_eq!(body_fingerprint(b"[1]"), body_fingerprint(b"[1]"));
        assert_ne!(body_fingerprint(b"[1]"), body_fingerprint(b"[1 ]"));
    }

    #[test]
    fn strings_are_written_as_serde_json_does() {
        let every: String = (0..0x300).filter_map(char::from_u32).chain(['\u{2028}', '\u{1F600}']).collect();
        let mut written = Vec::new();
        write_string(&mut written, &every);
        assert_eq!(String::from_utf8(written).expect("UTF-8"), serde_json::to_string(&every).expect("a string"));
    }

    proptest::proptest! {
        #[test]
        fn strings_read_back_as_written(text in ".*") {
            let mut written = Vec::new();
            write_string(&mut written, &text);
            let document = Document::parse(&written).expect("a string");
            assert_eq!(document.root().unescaped().as_ref(), text.as_bytes());
        }

        #[test]
        fn any_bytes_are_refused_or_read_as_serde_json_reads_them(
            body in r#"([\[\]{}:, ]|"[ab]"|"\\u00[0-9a-g]{2}"|-?[0-9.eE+]{1,4}|null|true|x|"é\\n"){0,24}"#
        ) {
            let ours = Document::parse(body.as_bytes());
            let theirs = serde_json::from_str::<serde_json::Value>(&body);
            match ours {
                Ok(ours) => {
                    let minified: serde_json::Value = serde_json::from_slice(ours.text()).expect("what we take is JSON");
                    assert_eq!(minified, theirs.expect("what we take is JSON"));
                }
                Err(JsonError { fault: JsonFault::DuplicateMember, .. }) => {}
                // A number that no double holds is an error of theirs alone.
                Err(error) => assert!(theirs.is_err(), "{body}: {error}"),
            }
        }
    }
}
