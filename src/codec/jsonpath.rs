//! JSONPath: a query for places of a value, read once and evaluated over the value's own tokens.
//!
//! Source: RFC 9535; RFC 9485 for the patterns of `match` and `search`, which must be literals, so that they are compiled
//! once, and have no `\p{…}`, whose tables would be larger than all the rest. Memory: the parsed path, at most a few times its text; the places found, 16 bytes each.
//! Errors: [`PathError`], the fault of whoever wrote the path; [`Over`], a bound that was passed with a value.
//! Not here: what becomes of the places (`stream::view`).
//!
//! Cost: a path can ask for more work than any time allows (`$..[?count($..*)>1]`), so that each step is counted and
//! evaluating ends when there have been too many. Recursion is as deep as the value and the path are, which are bounded.
//! Members come in the order of the text, which RFC 9535 leaves open.

use std::borrow::Cow;
use std::fmt;

use regex_lite::{Regex, RegexBuilder};

use crate::codec::json::{Kind, Node};
use crate::limits::{PATH_BYTES_MAX, PATH_NESTING_MAX, PATH_PATTERN_BYTES_MAX};

/// A JSONPath query (RFC 9535).
#[derive(Clone, Debug)]
pub struct JsonPath {
    text: String,
    segments: Vec<Segment>,
}

/// Why a text is no [`JsonPath`], and where in it.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("byte {at}: {fault}")]
pub struct PathError {
    /// Bytes of the text before the fault.
    pub at: usize,
    /// What is wrong there.
    pub fault: PathFault,
}

/// What is wrong with a path.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum PathFault {
    /// Over `limits::PATH_BYTES_MAX`.
    #[error("a JSONPath has at most {PATH_BYTES_MAX} bytes")]
    TooLong,
    /// Over `limits::PATH_NESTING_MAX`.
    #[error("parentheses, filters and functions are nested over {PATH_NESTING_MAX} deep")]
    TooDeep,
    /// Something else than `$` first.
    #[error("a JSONPath begins with \"$\"")]
    NoRoot,
    /// More behind the end.
    #[error("a segment was expected, as in \".name\", \"..name\" or \"[…]\"")]
    Segment,
    /// No selector in brackets.
    #[error("a selector was expected: 'name', *, an index, a slice or ?filter")]
    Selector,
    /// No name after a dot.
    #[error("a name or \"*\" was expected")]
    Name,
    /// A bracket or parenthesis that is not closed, or a comma missing.
    #[error("{expected:?} was expected")]
    Expected {
        /// What should stand there.
        expected: char,
    },
    /// RFC 9535 section 2.1: within the exact integers of a double, without leading zeros.
    #[error("not an integer within ±(2^53 - 1), without leading zeros")]
    Integer,
    /// RFC 8259 section 6.
    #[error("not a number as JSON has it")]
    Number,
    /// A string that does not end, a control character or an unknown escape in it.
    #[error("not a string literal")]
    Text,
    /// Neither a comparison nor a query nor a function.
    #[error("a query (@ or $), a function, a comparison or a literal was expected")]
    Test,
    /// RFC 9535 section 2.3.5.1: what is compared is one value.
    #[error("only a query of names and indexes, which has one result at most, can be compared")]
    NotSingular,
    /// RFC 9535 section 2.4.3: a value is no test and a test no value.
    #[error("this function gives a value and stands in a comparison only")]
    NotATest,
    /// The other way round.
    #[error("this function gives true or false and cannot be compared")]
    NotAValue,
    /// RFC 9535 section 2.4.
    #[error("not one of the functions length, count, match, search and value")]
    Function,
    /// An argument of another kind than the function takes.
    #[error("not what this function takes here")]
    Argument,
    /// A pattern that is computed: it would have to be compiled for each value.
    #[error("the pattern of match and search must be a string literal, as in 'a.*'")]
    ComputedPattern,
    /// `\p{…}` or `\P{…}`, which RFC 9485 has.
    #[error(
        "the patterns of match and search know no \\p{{…}} and \\P{{…}}: write the characters as a class, as in [A-Za-z]"
    )]
    CharacterProperty,
    /// A pattern that is none, or one that is compiled to too much.
    #[error(
        "the pattern of match and search must be a regular expression, compiled to at most {PATH_PATTERN_BYTES_MAX} bytes with \
         the others of the path"
    )]
    Pattern,
}

/// A bound that was passed while a path was evaluated.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Over {
    /// Too much work.
    Steps,
    /// The results are too long together.
    Bytes,
}

impl JsonPath {
    /// The path spelled `text`.
    pub fn parse(text: &str) -> Result<JsonPath, PathError> {
        let mut parser = Parser { text, at: 0, nesting: 0, pattern_bytes_left: PATH_PATTERN_BYTES_MAX };
        if text.len() > PATH_BYTES_MAX {
            return parser.fault(PathFault::TooLong);
        }
        if !parser.eat(b"$") {
            return parser.fault(PathFault::NoRoot);
        }
        let segments = parser.segments()?;
        if parser.at < text.len() {
            return parser.fault(PathFault::Segment);
        }
        Ok(JsonPath { text: text.to_owned(), segments })
    }

    /// As written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether it names one place at most: names and indexes alone (RFC 9535 section 2.3.5.1).
    pub fn is_singular(&self) -> bool {
        is_singular(&self.segments)
    }

    /// The same query in one spelling: names in single quotes and brackets, no white space, no needless parentheses. Two
    /// paths that are spelled alike so name the same places of every value.
    pub fn normal(&self) -> String {
        let mut out = String::from("$");
        write_segments(&mut out, &self.segments);
        out
    }

    /// The places it names in the value `root`, in order, one of them perhaps several times. `bytes_max`: of an array of
    /// them.
    ///
    /// # Errors
    /// [`Over`] where a bound is passed.
    pub fn query<'d>(&self, root: Node<'d>, steps_max: u64, bytes_max: u64) -> Result<Vec<Node<'d>>, Over> {
        self.query_within(root, &mut { steps_max }, bytes_max)
    }

    /// The same, where the steps are taken out of `steps_left`.
    ///
    /// # Errors
    /// [`Over`] where a bound is passed.
    pub fn query_within<'d>(
        &self,
        root: Node<'d>,
        steps_left: &mut u64,
        bytes_max: u64,
    ) -> Result<Vec<Node<'d>>, Over> {
        let mut run = Run { root, steps_left: *steps_left };
        let mut found = Vec::new();
        let mut bytes_left = bytes_max;
        let ended = run.select(root, &self.segments, &mut |node| {
            bytes_left = bytes_left.checked_sub(node.raw().len() as u64 + 1).ok_or(End::Over(Over::Bytes))?;
            found.push(node);
            Ok(())
        });
        *steps_left = run.steps_left;
        match ended {
            Ok(()) | Err(End::Stop) => Ok(found),
            Err(End::Over(over)) => Err(over),
        }
    }
}

impl PartialEq for JsonPath {
    fn eq(&self, other: &JsonPath) -> bool {
        self.text == other.text
    }
}

impl Eq for JsonPath {}

impl fmt::Display for JsonPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[derive(Clone, Debug)]
enum Segment {
    /// Of the node's children.
    Child(Vec<Selector>),
    /// Of the children of the node and of all below it.
    Descendant(Vec<Selector>),
}

#[derive(Clone, Debug)]
enum Selector {
    Name(String),
    Wildcard,
    Index(i64),
    Slice { start: Option<i64>, end: Option<i64>, step: i64 },
    Filter(Test),
}

/// What a filter asks of each child.
#[derive(Clone, Debug)]
enum Test {
    Any(Vec<Test>),
    All(Vec<Test>),
    Not(Box<Test>),
    /// The query has a result.
    Exists(Query),
    Compare(Comparable, Comparison, Comparable),
    /// `match` and `search`.
    Matches(Comparable, Pattern),
}

/// What `match` and `search` look for.
#[derive(Clone, Debug)]
struct Pattern {
    /// As written.
    text: String,
    /// Whether the whole of a text must fit.
    whole: bool,
    regex: Regex,
    /// Steps that looking at one byte of a text takes at most: each of the states it was compiled to may do so.
    steps_per_byte: usize,
}

/// A query within a filter.
#[derive(Clone, Debug)]
struct Query {
    from_root: bool,
    segments: Vec<Segment>,
}

/// What gives one value, or nothing.
#[derive(Clone, Debug)]
enum Comparable {
    Null,
    Boolean(bool),
    Number(Number),
    Text(String),
    /// A singular query, or `value()` of any.
    Value(Query),
    Length(Box<Comparable>),
    Count(Query),
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

/// A number's value. Integers are compared exactly, as ids beyond 2^53 are told apart by nothing else.
#[derive(Clone, Copy, Debug)]
enum Number {
    Integer(i128),
    Real(f64),
}

impl Number {
    /// The value of a JSON number.
    fn parse(text: &str) -> Option<Number> {
        let is_integer = text.bytes().all(|b| b.is_ascii_digit() || b == b'-');
        if let (true, Ok(integer)) = (is_integer, text.parse()) {
            return Some(Number::Integer(integer));
        }
        text.parse().ok().map(Number::Real)
    }

    fn real(self) -> f64 {
        match self {
            Number::Integer(integer) => integer as f64,
            Number::Real(real) => real,
        }
    }

    fn equals(self, other: Number) -> bool {
        match (self, other) {
            (Number::Integer(a), Number::Integer(b)) => a == b,
            _ => self.real() == other.real(),
        }
    }

    fn is_less(self, other: Number) -> bool {
        match (self, other) {
            (Number::Integer(a), Number::Integer(b)) => a < b,
            _ => self.real() < other.real(),
        }
    }
}

fn is_singular(segments: &[Segment]) -> bool {
    segments.iter().all(|segment| match segment {
        Segment::Child(selectors) => matches!(&**selectors, [Selector::Name(_) | Selector::Index(_)]),
        Segment::Descendant(_) => false,
    })
}

// Evaluating.

/// Why evaluating ends before its end.
enum End {
    Over(Over),
    /// Enough has been found.
    Stop,
}

impl From<Over> for End {
    fn from(over: Over) -> End {
        End::Over(over)
    }
}

/// What is done with a place.
type Found<'f, 'd> = &'f mut dyn FnMut(Node<'d>) -> Result<(), End>;

struct Run<'d> {
    root: Node<'d>,
    steps_left: u64,
}

/// What a comparable is with one value.
enum Operand<'d, 'p> {
    Nothing,
    Null,
    Boolean(bool),
    Number(Number),
    Text(Cow<'p, [u8]>),
    Container(Node<'d>),
}

impl<'d> Run<'d> {
    fn spend(&mut self, steps: usize) -> Result<(), Over> {
        self.steps_left = self.steps_left.checked_sub(1 + steps as u64).ok_or(Over::Steps)?;
        Ok(())
    }

    /// The places that `segments` name from `node` on.
    fn select(&mut self, node: Node<'d>, segments: &[Segment], found: Found<'_, 'd>) -> Result<(), End> {
        match segments.split_first() {
            None => {
                self.spend(0)?;
                found(node)
            }
            Some((Segment::Child(selectors), rest)) => {
                selectors.iter().try_for_each(|selector| self.apply(node, selector, rest, found))
            }
            Some((Segment::Descendant(selectors), rest)) => self.descend(node, selectors, rest, found),
        }
    }

    /// RFC 9535 section 2.5.2: the node before those below it, elements in their order.
    fn descend(
        &mut self,
        node: Node<'d>,
        selectors: &[Selector],
        rest: &[Segment],
        found: Found<'_, 'd>,
    ) -> Result<(), End> {
        self.spend(0)?;
        selectors.iter().try_for_each(|selector| self.apply(node, selector, rest, found))?;
        children(node).try_for_each(|child| self.descend(child, selectors, rest, found))
    }

    fn apply(
        &mut self,
        node: Node<'d>,
        selector: &Selector,
        rest: &[Segment],
        found: Found<'_, 'd>,
    ) -> Result<(), End> {
        match selector {
            Selector::Name(name) if node.kind() == Kind::Object => {
                self.spend(node.len())?;
                match node.member(name) {
                    Some(value) => self.select(value, rest, found),
                    None => Ok(()),
                }
            }
            Selector::Wildcard => children(node).try_for_each(|child| {
                self.spend(0)?;
                self.select(child, rest, found)
            }),
            Selector::Index(index) if node.kind() == Kind::Array => {
                let Some(at) = place(*index, node.len()) else { return Ok(()) };
                self.spend(at)?;
                match node.elements().nth(at) {
                    Some(element) => self.select(element, rest, found),
                    None => Ok(()),
                }
            }
            Selector::Slice { start, end, step } if node.kind() == Kind::Array => {
                self.spend(node.len())?;
                let elements: Vec<Node<'d>> = node.elements().collect();
                let mut chosen = slice(*start, *end, *step, elements.len());
                chosen.try_for_each(|at| match elements.get(at) {
                    Some(&element) => self.select(element, rest, found),
                    None => Ok(()),
                })
            }
            Selector::Filter(test) => children(node).try_for_each(|child| {
                self.spend(0)?;
                if self.holds(child, test)? { self.select(child, rest, found) } else { Ok(()) }
            }),
            Selector::Name(_) | Selector::Index(_) | Selector::Slice { .. } => Ok(()),
        }
    }

    /// Whether `test` is true of `node`.
    fn holds(&mut self, node: Node<'d>, test: &Test) -> Result<bool, Over> {
        self.spend(0)?;
        match test {
            Test::Any(tests) => {
                for test in tests {
                    if self.holds(node, test)? {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
            Test::All(tests) => {
                for test in tests {
                    if !self.holds(node, test)? {
                        return Ok(false);
                    }
                }
                Ok(true)
            }
            Test::Not(test) => self.holds(node, test).map(|holds| !holds),
            Test::Exists(query) => self.results(node, query, 1).map(|(count, _)| count > 0),
            Test::Compare(left, comparison, right) => {
                let (left, right) = (self.operand(node, left)?, self.operand(node, right)?);
                Ok(match comparison {
                    Comparison::Equal => self.equal(&left, &right)?,
                    Comparison::NotEqual => !self.equal(&left, &right)?,
                    Comparison::Less => is_less(&left, &right),
                    Comparison::Greater => is_less(&right, &left),
                    Comparison::LessOrEqual => is_less(&left, &right) || self.equal(&left, &right)?,
                    Comparison::GreaterOrEqual => is_less(&right, &left) || self.equal(&left, &right)?,
                })
            }
            Test::Matches(text, pattern) => {
                let Operand::Text(text) = self.operand(node, text)? else { return Ok(false) };
                self.spend(text.len().saturating_mul(pattern.steps_per_byte))?;
                Ok(std::str::from_utf8(&text).is_ok_and(|text| pattern.regex.is_match(text)))
            }
        }
    }

    /// How many results a query has, at most `most`, and the first of them.
    fn results(&mut self, node: Node<'d>, query: &Query, most: u64) -> Result<(u64, Option<Node<'d>>), Over> {
        let from = if query.from_root { self.root } else { node };
        let (mut count, mut first) = (0, None);
        let ended = self.select(from, &query.segments, &mut |node| {
            count += 1;
            first.get_or_insert(node);
            if count < most { Ok(()) } else { Err(End::Stop) }
        });
        match ended {
            Ok(()) | Err(End::Stop) => Ok((count, first)),
            Err(End::Over(over)) => Err(over),
        }
    }

    fn operand<'p>(&mut self, node: Node<'d>, comparable: &'p Comparable) -> Result<Operand<'d, 'p>, Over>
    where
        'd: 'p,
    {
        Ok(match comparable {
            Comparable::Null => Operand::Null,
            Comparable::Boolean(value) => Operand::Boolean(*value),
            Comparable::Number(value) => Operand::Number(*value),
            Comparable::Text(text) => Operand::Text(Cow::Borrowed(text.as_bytes())),
            Comparable::Value(query) => match self.results(node, query, 2)? {
                (1, Some(node)) => {
                    self.spend(if is_container(node) { 0 } else { node.raw().len() / 8 })?;
                    value_of(node)
                }
                _ => Operand::Nothing,
            },
            Comparable::Length(of) => match self.operand(node, of)? {
                Operand::Text(text) => length(std::str::from_utf8(&text).map_or(0, |text| text.chars().count())),
                Operand::Container(node) => length(node.len()),
                _ => Operand::Nothing,
            },
            Comparable::Count(query) => Operand::Number(Number::Integer(self.results(node, query, u64::MAX)?.0.into())),
        })
    }

    /// RFC 9535 section 2.3.5.2.2.
    fn equal(&mut self, a: &Operand<'d, '_>, b: &Operand<'d, '_>) -> Result<bool, Over> {
        Ok(match (a, b) {
            (Operand::Nothing, Operand::Nothing) | (Operand::Null, Operand::Null) => true,
            (Operand::Boolean(a), Operand::Boolean(b)) => a == b,
            (Operand::Number(a), Operand::Number(b)) => a.equals(*b),
            (Operand::Text(a), Operand::Text(b)) => a == b,
            (Operand::Container(a), Operand::Container(b)) => self.same(*a, *b)?,
            _ => false,
        })
    }

    /// The same for what is within arrays and objects.
    fn same(&mut self, a: Node<'d>, b: Node<'d>) -> Result<bool, Over> {
        self.spend(a.raw().len().min(b.raw().len()) / 8)?;
        if a.kind() != b.kind() || a.len() != b.len() {
            return Ok(false);
        }
        match a.kind() {
            Kind::Array => {
                for (a, b) in a.elements().zip(b.elements()) {
                    if !self.same(a, b)? {
                        return Ok(false);
                    }
                }
                Ok(true)
            }
            Kind::Object => {
                for member in a.members() {
                    self.spend(b.len())?;
                    let name = member.name.unescaped();
                    let other = std::str::from_utf8(&name).ok().and_then(|name| b.member(name));
                    let Some(other) = other else { return Ok(false) };
                    if !self.same(member.value, other)? {
                        return Ok(false);
                    }
                }
                Ok(true)
            }
            _ => self.equal(&value_of(a), &value_of(b)),
        }
    }
}

fn is_container(node: Node<'_>) -> bool {
    matches!(node.kind(), Kind::Array | Kind::Object)
}

fn children(node: Node<'_>) -> impl Iterator<Item = Node<'_>> {
    node.members().map(|member| member.value).chain(node.elements())
}

fn value_of<'d, 'p>(node: Node<'d>) -> Operand<'d, 'p>
where
    'd: 'p,
{
    match node.kind() {
        Kind::Null => Operand::Null,
        Kind::Boolean => Operand::Boolean(node.raw() == b"true"),
        Kind::Number => {
            let number = std::str::from_utf8(node.raw()).ok().and_then(Number::parse);
            number.map_or(Operand::Nothing, Operand::Number)
        }
        Kind::String => Operand::Text(node.unescaped()),
        Kind::Array | Kind::Object => Operand::Container(node),
    }
}

fn length<'d, 'p>(length: usize) -> Operand<'d, 'p> {
    Operand::Number(Number::Integer(i128::try_from(length).unwrap_or(i128::MAX)))
}

/// RFC 9535 section 2.3.5.2.2: only numbers and strings have an order, that of strings by their characters' numbers.
fn is_less(a: &Operand<'_, '_>, b: &Operand<'_, '_>) -> bool {
    match (a, b) {
        (Operand::Number(a), Operand::Number(b)) => a.is_less(*b),
        // UTF-8 has the order of the characters.
        (Operand::Text(a), Operand::Text(b)) => a < b,
        _ => false,
    }
}

/// The place in an array of `len` that `index` names, counted from the end where it is negative.
fn place(index: i64, len: usize) -> Option<usize> {
    let len = i64::try_from(len).ok()?;
    let at = if index < 0 { len + index } else { index };
    usize::try_from(at).ok().filter(|_| at < len)
}

/// RFC 9535 section 2.3.4.2.2: the places that a slice chooses, in its order.
fn slice(start: Option<i64>, end: Option<i64>, step: i64, len: usize) -> impl Iterator<Item = usize> {
    let len = i64::try_from(len).unwrap_or(i64::MAX);
    let normal = |index: i64| if index >= 0 { index } else { len + index };
    let (first, last) = if step >= 0 {
        (normal(start.unwrap_or(0)).clamp(0, len), normal(end.unwrap_or(len)).clamp(0, len))
    } else {
        let start = start.map_or(len - 1, normal).clamp(-1, len - 1);
        (start, end.map_or(-1, normal).clamp(-1, len - 1))
    };
    let count = match step {
        0 => 0,
        1.. if first < last => (last - first - 1) / step + 1,
        ..0 if first > last => (first - last - 1) / step.saturating_neg() + 1,
        _ => 0,
    };
    (0..count).filter_map(move |at| usize::try_from(first + at * step).ok())
}

// Reading.

struct Parser<'t> {
    text: &'t str,
    at: usize,
    /// Parentheses, filters and functions that are open.
    nesting: usize,
    /// Bytes that further patterns may be compiled to.
    pattern_bytes_left: usize,
}

/// Bytes of a compiled pattern that stand for about one step: a few of its states.
const PATTERN_BYTES_PER_STEP: usize = 128;
/// A pattern is taken to be compiled to as many bytes, or twice, four times … as many.
const PATTERN_BYTES_MIN: usize = 512;

/// The exact integers of a double (RFC 9535 section 2.1).
const INTEGER_MAX: i64 = (1 << 53) - 1;

/// One side of what may be a comparison.
enum Side {
    Literal(Comparable),
    /// A function that gives a value.
    Value(Comparable),
    /// A query with one result at most.
    Singular(Query),
    /// A query that is no comparable, as it may have several results.
    Nodes(Query),
    /// A function that gives true or false.
    Test(Test),
}

impl<'t> Parser<'t> {
    fn fault<T>(&self, fault: PathFault) -> Result<T, PathError> {
        Err(PathError { at: self.at, fault })
    }

    fn rest(&self) -> &'t [u8] {
        self.text.as_bytes().get(self.at..).unwrap_or_default()
    }

    fn peek(&self) -> Option<u8> {
        self.rest().first().copied()
    }

    fn eat(&mut self, token: &[u8]) -> bool {
        let found = self.rest().starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    fn expect(&mut self, expected: char) -> Result<(), PathError> {
        let mut bytes = [0; 4];
        if self.eat(expected.encode_utf8(&mut bytes).as_bytes()) {
            Ok(())
        } else {
            self.fault(PathFault::Expected { expected })
        }
    }

    fn skip_space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn nested<T>(&mut self, read: impl FnOnce(&mut Self) -> Result<T, PathError>) -> Result<T, PathError> {
        if self.nesting == PATH_NESTING_MAX {
            return self.fault(PathFault::TooDeep);
        }
        self.nesting += 1;
        let read = read(self);
        self.nesting -= 1;
        read
    }

    fn segments(&mut self) -> Result<Vec<Segment>, PathError> {
        let mut segments = Vec::new();
        loop {
            let end = self.at;
            self.skip_space();
            if self.eat(b"..") {
                let selectors = if self.peek() == Some(b'[') { self.bracketed()? } else { vec![self.shorthand()?] };
                segments.push(Segment::Descendant(selectors));
            } else if self.eat(b".") {
                segments.push(Segment::Child(vec![self.shorthand()?]));
            } else if self.peek() == Some(b'[') {
                segments.push(Segment::Child(self.bracketed()?));
            } else {
                // White space behind the last segment is none of the path's.
                self.at = end;
                return Ok(segments);
            }
        }
    }

    /// `*` or a name, behind a dot.
    fn shorthand(&mut self) -> Result<Selector, PathError> {
        if self.eat(b"*") {
            return Ok(Selector::Wildcard);
        }
        let is_first = |b: u8| b.is_ascii_alphabetic() || b == b'_' || b >= 0x80;
        if !self.peek().is_some_and(is_first) {
            return self.fault(PathFault::Name);
        }
        let length = self.rest().iter().take_while(|&&b| is_first(b) || b.is_ascii_digit()).count();
        let name = self.text.get(self.at..self.at + length).unwrap_or_default().to_owned();
        self.at += length;
        Ok(Selector::Name(name))
    }

    fn bracketed(&mut self) -> Result<Vec<Selector>, PathError> {
        self.expect('[')?;
        let mut selectors = Vec::new();
        loop {
            self.skip_space();
            selectors.push(self.selector()?);
            self.skip_space();
            if !self.eat(b",") {
                self.expect(']')?;
                return Ok(selectors);
            }
        }
    }

    fn selector(&mut self) -> Result<Selector, PathError> {
        match self.peek() {
            Some(b'\'' | b'"') => Ok(Selector::Name(self.string()?)),
            Some(b'*') => {
                self.at += 1;
                Ok(Selector::Wildcard)
            }
            Some(b'?') => {
                self.at += 1;
                self.skip_space();
                Ok(Selector::Filter(self.nested(Parser::any)?))
            }
            Some(b'-' | b':' | b'0'..=b'9') => self.index_or_slice(),
            _ => self.fault(PathFault::Selector),
        }
    }

    fn index_or_slice(&mut self) -> Result<Selector, PathError> {
        let start = self.integer()?;
        let end_of_start = self.at;
        self.skip_space();
        if !self.eat(b":") {
            self.at = end_of_start;
            return match start {
                Some(index) => Ok(Selector::Index(index)),
                None => self.fault(PathFault::Selector),
            };
        }
        self.skip_space();
        let end = self.integer()?;
        let end_of_end = self.at;
        self.skip_space();
        if !self.eat(b":") {
            self.at = end_of_end;
            return Ok(Selector::Slice { start, end, step: 1 });
        }
        let behind_colon = self.at;
        self.skip_space();
        let step = self.integer()?;
        if step.is_none() {
            self.at = behind_colon;
        }
        Ok(Selector::Slice { start, end, step: step.unwrap_or(1) })
    }

    /// An integer, where one stands.
    fn integer(&mut self) -> Result<Option<i64>, PathError> {
        let length = self.rest().iter().take_while(|b| b.is_ascii_digit() || **b == b'-').count();
        if length == 0 {
            return Ok(None);
        }
        let text = self.text.get(self.at..self.at + length).unwrap_or_default();
        let digits = text.strip_prefix('-').unwrap_or(text);
        let canonical = text == "0" || (!digits.starts_with('0') && digits.bytes().all(|b| b.is_ascii_digit()));
        match text.parse::<i64>().ok().filter(|value| canonical && value.abs() <= INTEGER_MAX) {
            Some(value) => {
                self.at += length;
                Ok(Some(value))
            }
            None => self.fault(PathFault::Integer),
        }
    }

    /// RFC 9535 section 2.3.1.1.
    fn string(&mut self) -> Result<String, PathError> {
        let from = self.at;
        let bad = PathError { at: from, fault: PathFault::Text };
        let mut chars = self.text.get(from..).unwrap_or_default().char_indices();
        let quote = chars.next().map(|(_, quote)| quote).ok_or(bad)?;
        let mut string = String::new();
        loop {
            let (_, c) = chars.next().ok_or(bad)?;
            match c {
                c if c == quote => break,
                '\\' => {
                    let (_, escape) = chars.next().ok_or(bad)?;
                    string.push(match escape {
                        'b' => '\u{8}',
                        'f' => '\u{c}',
                        'n' => '\n',
                        'r' => '\r',
                        't' => '\t',
                        '/' | '\\' => escape,
                        c if c == quote => c,
                        'u' => {
                            let mut unit = || {
                                let digits =
                                    chars.as_str().get(..4).filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()));
                                let unit = u32::from_str_radix(digits.ok_or(bad)?, 16).map_err(|_| bad)?;
                                chars.nth(3);
                                Ok(unit)
                            };
                            match unit()? {
                                high @ 0xd800..0xdc00 => {
                                    chars = chars.as_str().strip_prefix("\\u").ok_or(bad)?.char_indices();
                                    let mut digits = chars.clone();
                                    let low = digits.by_ref().take(4).map(|(_, c)| c).collect::<String>();
                                    let is_hex = low.len() == 4 && low.bytes().all(|b| b.is_ascii_hexdigit());
                                    let low = u32::from_str_radix(&low, 16).map_err(|_| bad)?;
                                    if !is_hex || !(0xdc00..0xe000).contains(&low) {
                                        return Err(bad);
                                    }
                                    chars = digits;
                                    let code = 0x1_0000 + ((high & 0x3ff) << 10 | low & 0x3ff);
                                    char::from_u32(code).ok_or(bad)?
                                }
                                unit => char::from_u32(unit).ok_or(bad)?,
                            }
                        }
                        _ => return Err(bad),
                    });
                }
                c if c < ' ' => return Err(bad),
                c => string.push(c),
            }
        }
        self.at = self.text.len() - chars.as_str().len();
        Ok(string)
    }

    fn any(&mut self) -> Result<Test, PathError> {
        let mut tests = vec![self.all()?];
        while self.operator(b"||") {
            tests.push(self.all()?);
        }
        Ok(only(tests, Test::Any))
    }

    fn all(&mut self) -> Result<Test, PathError> {
        let mut tests = vec![self.basic()?];
        while self.operator(b"&&") {
            tests.push(self.basic()?);
        }
        Ok(only(tests, Test::All))
    }

    /// An operator and the white space around it, where it stands next.
    fn operator(&mut self, operator: &[u8]) -> bool {
        let end = self.at;
        self.skip_space();
        if self.eat(operator) {
            self.skip_space();
            return true;
        }
        self.at = end;
        false
    }

    fn basic(&mut self) -> Result<Test, PathError> {
        if self.eat(b"!") {
            self.skip_space();
            let test = if self.peek() == Some(b'(') { self.parenthesis()? } else { self.test()? };
            return Ok(Test::Not(Box::new(test)));
        }
        if self.peek() == Some(b'(') {
            return self.parenthesis();
        }
        let from = self.at;
        let left = self.side()?;
        let comparison = [
            (&b"=="[..], Comparison::Equal),
            (b"!=", Comparison::NotEqual),
            (b"<=", Comparison::LessOrEqual),
            (b">=", Comparison::GreaterOrEqual),
            (b"<", Comparison::Less),
            (b">", Comparison::Greater),
        ]
        .into_iter()
        .find(|(operator, _)| self.operator(operator));
        let Some((_, comparison)) = comparison else {
            return self.as_test(left, from);
        };
        let left = self.as_comparable(left, from)?;
        let from = self.at;
        let right = self.side()?;
        Ok(Test::Compare(left, comparison, self.as_comparable(right, from)?))
    }

    fn parenthesis(&mut self) -> Result<Test, PathError> {
        self.expect('(')?;
        self.skip_space();
        let test = self.nested(Parser::any)?;
        self.skip_space();
        self.expect(')')?;
        Ok(test)
    }

    fn test(&mut self) -> Result<Test, PathError> {
        let from = self.at;
        let side = self.side()?;
        self.as_test(side, from)
    }

    fn as_test(&self, side: Side, at: usize) -> Result<Test, PathError> {
        match side {
            Side::Test(test) => Ok(test),
            Side::Singular(query) | Side::Nodes(query) => Ok(Test::Exists(query)),
            Side::Value(_) => Err(PathError { at, fault: PathFault::NotATest }),
            Side::Literal(_) => Err(PathError { at, fault: PathFault::Test }),
        }
    }

    fn as_comparable(&self, side: Side, at: usize) -> Result<Comparable, PathError> {
        match side {
            Side::Literal(comparable) | Side::Value(comparable) => Ok(comparable),
            Side::Singular(query) => Ok(Comparable::Value(query)),
            Side::Nodes(_) => Err(PathError { at, fault: PathFault::NotSingular }),
            Side::Test(_) => Err(PathError { at, fault: PathFault::NotAValue }),
        }
    }

    /// A literal, a query or a function.
    fn side(&mut self) -> Result<Side, PathError> {
        match self.peek() {
            Some(b'@' | b'$') => {
                let query = self.query()?;
                Ok(if is_singular(&query.segments) { Side::Singular(query) } else { Side::Nodes(query) })
            }
            Some(b'\'' | b'"') => Ok(Side::Literal(Comparable::Text(self.string()?))),
            Some(b'-' | b'0'..=b'9') => Ok(Side::Literal(Comparable::Number(self.number()?))),
            Some(b'a'..=b'z') => self.word(),
            _ => self.fault(PathFault::Test),
        }
    }

    fn query(&mut self) -> Result<Query, PathError> {
        let from_root = self.peek() == Some(b'$');
        self.at += 1;
        Ok(Query { from_root, segments: self.segments()? })
    }

    fn number(&mut self) -> Result<Number, PathError> {
        let is_part = |b: &&u8| b.is_ascii_digit() || b"+-.eE".contains(b);
        let length = self.rest().iter().take_while(is_part).count();
        let text = self.text.get(self.at..self.at + length).unwrap_or_default();
        // What JSON takes for a number is one here.
        let number = crate::codec::json::Document::parse(text.as_bytes()).ok().and_then(|_| Number::parse(text));
        match number {
            Some(number) => {
                self.at += length;
                Ok(number)
            }
            None => self.fault(PathFault::Number),
        }
    }

    /// `true`, `false`, `null` or a function.
    fn word(&mut self) -> Result<Side, PathError> {
        let from = self.at;
        let is_part = |b: &&u8| b.is_ascii_lowercase() || b.is_ascii_digit() || **b == b'_';
        let length = self.rest().iter().take_while(is_part).count();
        let name = self.text.get(from..from + length).unwrap_or_default();
        self.at += length;
        if !self.eat(b"(") {
            let literal = match name {
                "null" => Comparable::Null,
                "true" => Comparable::Boolean(true),
                "false" => Comparable::Boolean(false),
                _ => return Err(PathError { at: from, fault: PathFault::Test }),
            };
            return Ok(Side::Literal(literal));
        }
        let side = self.nested(|parser| {
            parser.skip_space();
            Ok(match name {
                "length" => Side::Value(Comparable::Length(Box::new(parser.value_argument()?))),
                "count" => Side::Value(Comparable::Count(parser.nodes_argument()?)),
                "value" => Side::Value(Comparable::Value(parser.nodes_argument()?)),
                "match" | "search" => {
                    let text = parser.value_argument()?;
                    parser.skip_space();
                    parser.expect(',')?;
                    parser.skip_space();
                    Side::Test(Test::Matches(text, parser.pattern(name == "match")?))
                }
                _ => return Err(PathError { at: from, fault: PathFault::Function }),
            })
        })?;
        self.skip_space();
        self.expect(')')?;
        Ok(side)
    }

    fn value_argument(&mut self) -> Result<Comparable, PathError> {
        let from = self.at;
        let side = self.side()?;
        self.as_comparable(side, from).map_err(|_| PathError { at: from, fault: PathFault::Argument })
    }

    fn nodes_argument(&mut self) -> Result<Query, PathError> {
        match self.peek() {
            Some(b'@' | b'$') => self.query(),
            _ => self.fault(PathFault::Argument),
        }
    }

    /// RFC 9485: `match` is of the whole text, and `.` is no end of a line.
    fn pattern(&mut self, whole: bool) -> Result<Pattern, PathError> {
        let bad = PathError { at: self.at, fault: PathFault::Pattern };
        if !matches!(self.peek(), Some(b'\'' | b'"')) {
            return Err(PathError { fault: PathFault::ComputedPattern, ..bad });
        }
        let text = self.string()?;
        if names_property(&text) {
            return Err(PathError { fault: PathFault::CharacterProperty, ..bad });
        }
        let compiled =
            |pattern: &str, bytes: usize| RegexBuilder::new(pattern).crlf(true).size_limit(bytes).build().ok();
        // By itself first: `)(` is none, whatever is put around it.
        compiled(&text, self.pattern_bytes_left).ok_or(bad)?;
        let anchored = whole.then(|| format!("^(?:{text})$"));
        let tried = anchored.as_deref().unwrap_or(&text);
        // A short pattern may be compiled to much, `((a{9}){9}){9}`: what it costs is found by what it does not fit in.
        let mut bytes = PATTERN_BYTES_MIN;
        let regex = loop {
            match compiled(tried, bytes.min(self.pattern_bytes_left)) {
                Some(regex) => break regex,
                None if bytes >= self.pattern_bytes_left => return Err(bad),
                None => bytes *= 2,
            }
        };
        let bytes = bytes.min(self.pattern_bytes_left);
        self.pattern_bytes_left -= bytes;
        Ok(Pattern { text, whole, regex, steps_per_byte: 1 + bytes / PATTERN_BYTES_PER_STEP })
    }
}

/// Whether a pattern has `\p` or `\P`, which a backslash before it does not make plain.
fn names_property(pattern: &str) -> bool {
    let mut bytes = pattern.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'\\' && matches!(bytes.next(), Some(b'p' | b'P')) {
            return true;
        }
    }
    false
}

/// One test as itself, several as `many` of them.
fn only(mut tests: Vec<Test>, many: fn(Vec<Test>) -> Test) -> Test {
    match tests.pop() {
        Some(test) if tests.is_empty() => test,
        last => {
            tests.extend(last);
            many(tests)
        }
    }
}

// Writing.

fn write_segments(out: &mut String, segments: &[Segment]) {
    for segment in segments {
        let selectors = match segment {
            Segment::Child(selectors) => selectors,
            Segment::Descendant(selectors) => {
                out.push_str("..");
                selectors
            }
        };
        out.push('[');
        separated(out, ",", selectors, write_selector);
        out.push(']');
    }
}

fn separated<T>(out: &mut String, between: &str, items: &[T], write: fn(&mut String, &T)) {
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            out.push_str(between);
        }
        write(out, item);
    }
}

fn write_selector(out: &mut String, selector: &Selector) {
    let number = |number: &Option<i64>| number.map_or_else(String::new, |number| number.to_string());
    match selector {
        Selector::Name(name) => write_text(out, name),
        Selector::Wildcard => out.push('*'),
        Selector::Index(index) => out.push_str(&number(&Some(*index))),
        Selector::Slice { start, end, step } => {
            for part in [&number(start), ":", &number(end), ":", &number(&Some(*step))] {
                out.push_str(part);
            }
        }
        Selector::Filter(test) => {
            out.push('?');
            write_test(out, test);
        }
    }
}

/// What binds less than its surroundings stands in parentheses.
fn write_test(out: &mut String, test: &Test) {
    let inner = |out: &mut String, test: &Test| {
        let is_loose = matches!(test, Test::Any(_) | Test::All(_));
        out.push_str(if is_loose { "(" } else { "" });
        write_test(out, test);
        out.push_str(if is_loose { ")" } else { "" });
    };
    match test {
        Test::Any(tests) => separated(out, "||", tests, inner),
        Test::All(tests) => separated(out, "&&", tests, inner),
        Test::Not(test) => {
            // What a comparison and another `!` are negated as, they stand in parentheses.
            let is_bare = matches!(**test, Test::Exists(_) | Test::Matches(..));
            out.push_str(if is_bare { "!" } else { "!(" });
            write_test(out, test);
            out.push_str(if is_bare { "" } else { ")" });
        }
        Test::Exists(query) => write_query(out, query),
        Test::Compare(left, comparison, right) => {
            write_comparable(out, left);
            out.push_str(match comparison {
                Comparison::Equal => "==",
                Comparison::NotEqual => "!=",
                Comparison::Less => "<",
                Comparison::LessOrEqual => "<=",
                Comparison::Greater => ">",
                Comparison::GreaterOrEqual => ">=",
            });
            write_comparable(out, right);
        }
        Test::Matches(text, pattern) => {
            out.push_str(if pattern.whole { "match(" } else { "search(" });
            write_comparable(out, text);
            out.push(',');
            write_text(out, &pattern.text);
            out.push(')');
        }
    }
}

fn write_query(out: &mut String, query: &Query) {
    out.push(if query.from_root { '$' } else { '@' });
    write_segments(out, &query.segments);
}

fn write_comparable(out: &mut String, comparable: &Comparable) {
    let mut call = |name: &str, query: &Query| {
        out.push_str(name);
        write_query(out, query);
        out.push(')');
    };
    match comparable {
        Comparable::Value(query) if is_singular(&query.segments) => write_query(out, query),
        Comparable::Value(query) => call("value(", query),
        Comparable::Count(query) => call("count(", query),
        Comparable::Length(of) => {
            out.push_str("length(");
            write_comparable(out, of);
            out.push(')');
        }
        Comparable::Null => out.push_str("null"),
        Comparable::Boolean(value) => out.push_str(if *value { "true" } else { "false" }),
        Comparable::Number(Number::Integer(integer)) => out.push_str(&integer.to_string()),
        // Beyond the greatest double there is one value on each side.
        Comparable::Number(Number::Real(real)) if real.is_infinite() => {
            out.push_str(if *real > 0.0 { "1e999" } else { "-1e999" });
        }
        Comparable::Number(Number::Real(real)) => out.push_str(&format!("{real:e}")),
        Comparable::Text(text) => write_text(out, text),
    }
}

/// RFC 9535 section 2.7: in single quotes.
fn write_text(out: &mut String, text: &str) {
    out.push('\'');
    for c in text.chars() {
        match c {
            '\'' => out.push_str("\\'"),
            '\\' => out.push_str("\\\\"),
            '\u{8}' => out.push_str("\\b"),
            '\t' => out.push_str("\\t"),
            '\n' => out.push_str("\\n"),
            '\u{c}' => out.push_str("\\f"),
            '\r' => out.push_str("\\r"),
            c if c < ' ' => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('\'');
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;
    use crate::codec::json::Document;

    const STEPS: u64 = 1 << 20;

    /// The bookstore of RFC 9535 section 1.5, with members in the order of their names.
    const STORE: &str = r#"{"store":{"bicycle":{"color":"red","price":399},"book":[
        {"author":"Nigel Rees","category":"reference","price":8.95,"title":"Sayings of the Century"},
        {"author":"Evelyn Waugh","category":"fiction","price":12.99,"title":"Sword of Honour"},
        {"author":"Herman Melville","category":"fiction","isbn":"0-553-21311-3","price":8.99,"title":"Moby Dick"},
        {"author":"J. R. R. Tolkien","category":"fiction","isbn":"0-395-19395-8","price":22.99,"title":"The Lord of the Rings"}
    ]}}"#;

    fn query(path: &str, value: &str) -> Vec<String> {
        let path = JsonPath::parse(path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let document = Document::parse(value.as_bytes()).expect("JSON");
        let found = path.query(document.root(), STEPS, u64::MAX).expect("within its bounds");
        found.into_iter().map(|node| String::from_utf8(node.raw().to_vec()).expect("UTF-8")).collect()
    }

    fn check(path: &str, value: &str, found: &[&str]) {
        assert_eq!(query(path, value), found, "{path} in {value}");
    }

    #[test]
    fn the_examples_of_rfc_9535_section_1_5() {
        let authors = [r#""Nigel Rees""#, r#""Evelyn Waugh""#, r#""Herman Melville""#, r#""J. R. R. Tolkien""#];
        check("$.store.book[*].author", STORE, &authors);
        check("$..author", STORE, &authors);
        check("$.store..price", STORE, &["399", "8.95", "12.99", "8.99", "22.99"]);
        check("$..book[2].author", STORE, &[r#""Herman Melville""#]);
        check("$..book[2].publisher", STORE, &[]);
        let titles = |path: &str| query(&format!("{path}.title"), STORE);
        assert_eq!(titles("$..book[-1]"), [r#""The Lord of the Rings""#]);
        assert_eq!(titles("$..book[0,1]"), [r#""Sayings of the Century""#, r#""Sword of Honour""#]);
        assert_eq!(titles("$..book[:2]"), titles("$..book[0,1]"));
        assert_eq!(titles("$..book[?@.isbn]"), [r#""Moby Dick""#, r#""The Lord of the Rings""#]);
        assert_eq!(titles("$..book[?@.price<10]"), [r#""Sayings of the Century""#, r#""Moby Dick""#]);
        assert_eq!(query("$..*", STORE).len(), 27);
    }

    #[test]
    fn the_comparisons_of_rfc_9535_section_2_3_5_3() {
        let value = r#"{"obj":{"x":"y"},"arr":[2,3]}"#;
        for (test, holds) in [
            ("$.absent1 == $.absent2", true),
            ("$.absent1 <= $.absent2", true),
            ("$.absent == 'g'", false),
            ("$.absent1 != $.absent2", false),
            ("$.absent != 'g'", true),
            ("1 <= 2", true),
            ("1 > 2", false),
            ("13 == '13'", false),
            ("'a' <= 'b'", true),
            ("'a' > 'b'", false),
            ("$.obj == $.arr", false),
            ("$.obj != $.arr", true),
            ("$.obj == $.obj", true),
            ("$.obj != $.obj", false),
            ("$.arr == $.arr", true),
            ("$.obj == 17", false),
            ("$.obj != 17", true),
            ("$.obj <= $.arr", false),
            ("$.obj < $.arr", false),
            ("$.obj <= $.obj", true),
            ("$.arr <= $.arr", true),
            ("1 <= $.arr", false),
            ("1 > $.arr", false),
            ("true <= true", true),
            ("true > true", false),
            // Numbers are compared by value, however they are spelled, and integers exactly.
            ("$.arr[0] == 2.0", true),
            ("9007199254740993 == 9007199254740992", false),
            ("-0 == 0", true),
            ("1e3 == 1000", true),
            ("1e999 > 1", true),
            ("'\\u00e9' == \"é\"", true),
            ("'\\ud83d\\ude00' == '😀'", true),
            ("null == null && !(false == true)", true),
        ] {
            let found = query(&format!("$[?{test}]"), value);
            assert_eq!(found.len(), if holds { 2 } else { 0 }, "{test}");
        }
    }

    #[test]
    fn functions_give_what_rfc_9535_section_2_4_says() {
        let rows = r#"[{"n":"ab","t":["x","y"],"o":{"k":1}},{"n":"abé","t":[],"d":"1974-05-11"},{"n":7}]"#;
        for (test, places) in [
            ("length(@.n) == 2", &[0][..]),
            ("length(@.n) == 3", &[1]),
            ("length(@.t) > 1", &[0]),
            ("length(@.o) == 1", &[0]),
            ("count(@.*) == 1", &[2]),
            ("count(@..*) == 6", &[0]),
            ("match(@.n, 'a.')", &[0]),
            ("search(@.n, 'b')", &[0, 1]),
            ("match(@.d, \"1974-05-..\")", &[1]),
            ("!search(@.n, 'b')", &[2]),
            ("value(@..k) == 1", &[0]),
            ("value(@.t[*]) == 'x'", &[]),
            ("@.t && !@.d || @.n == 7", &[0, 2]),
            ("(@.t || @.n) && (@.d)", &[1]),
        ] {
            let found = query(&format!("$[?{test}]"), rows);
            let document: Vec<Value> = serde_json::from_str(rows).expect("JSON");
            let places: Vec<Value> = places.iter().map(|&place: &usize| document[place].clone()).collect();
            let found: Vec<Value> = found.iter().map(|row| serde_json::from_str(row).expect("JSON")).collect();
            assert_eq!(found, places, "{test}");
        }
    }

    #[test]
    fn slices_choose_as_rfc_9535_section_2_3_4_says() {
        let letters = r#"["a","b","c","d","e","f","g"]"#;
        let chosen = |slice: &str| query(&format!("$[{slice}]"), letters).concat().replace('"', "");
        for (slice, letters) in [
            ("1:3", "bc"),
            ("5:", "fg"),
            ("1:5:2", "bd"),
            ("5:1:-2", "fd"),
            ("::-1", "gfedcba"),
            (":", "abcdefg"),
            ("-2:", "fg"),
            (":-5", "ab"),
            ("::0", ""),
            ("3:3", ""),
            ("9:", ""),
            ("-99:2", "ab"),
            ("99:-99:-3", "gda"),
            ("::9007199254740991", "a"),
            ("::-9007199254740991", "g"),
            ("-1 : -3 : -1", "gf"),
        ] {
            assert_eq!(chosen(slice), letters, "{slice}");
        }
    }

    #[test]
    fn what_is_no_path_is_refused_where_the_fault_is() {
        use PathFault::*;
        for (text, at, fault) in [
            ("", 0, NoRoot),
            (" $", 0, NoRoot),
            ("$ ", 1, Segment),
            ("$.a b", 3, Segment),
            ("$.", 2, Name),
            ("$.1", 2, Name),
            ("$..", 3, Name),
            ("$[]", 2, Selector),
            ("$[a]", 2, Selector),
            ("$[0", 3, Expected { expected: ']' }),
            ("$[01]", 2, Integer),
            ("$[-0]", 2, Integer),
            ("$[9007199254740992]", 2, Integer),
            ("$['a]", 2, Text),
            ("$['\\x']", 2, Text),
            ("$['\\ud800']", 2, Text),
            ("$['\n']", 2, Text),
            ("$[?]", 3, Test),
            ("$[?1]", 3, Test),
            ("$[?@.a == ]", 10, Test),
            ("$[?@.* == 1]", 3, NotSingular),
            ("$[?(@.a == 1]", 12, Expected { expected: ')' }),
            ("$[?count(@.a)]", 3, NotATest),
            ("$[?match(@.a,'b') == true]", 3, NotAValue),
            ("$[?nope(@.a)]", 3, Function),
            ("$[?count(1) == 1]", 9, Argument),
            ("$[?length(@.*) == 1]", 10, Argument),
            ("$[?match(@.a, @.b)]", 14, ComputedPattern),
            ("$[?match(@.a, '\\\\p{L}+')]", 14, CharacterProperty),
            ("$[?search(@.a, \"[^\\\\P{Lu}]\")]", 15, CharacterProperty),
            ("$[?search(@.a, '\\\\\\\\p{L')]", 15, Pattern),
            ("$[?match(@.a, '(')]", 14, Pattern),
            ("$[?match(@.a, ')(')]", 14, Pattern),
            ("$[?@.a == 1.]", 10, Number),
        ] {
            assert_eq!(JsonPath::parse(text).expect_err(text), PathError { at, fault }, "{text}");
        }
    }

    #[test]
    fn a_path_has_a_longest_length_and_a_deepest_nesting() {
        let name = "a".repeat(PATH_BYTES_MAX - 2);
        assert!(JsonPath::parse(&format!("$.{name}")).is_ok());
        assert_eq!(JsonPath::parse(&format!("$.{name}a")).map_err(|e| e.fault), Err(PathFault::TooLong));
        let nested = |deep: usize| format!("$[?{}@{}]", "(".repeat(deep), ")".repeat(deep));
        assert!(JsonPath::parse(&nested(PATH_NESTING_MAX - 1)).is_ok());
        assert_eq!(JsonPath::parse(&nested(PATH_NESTING_MAX)).map_err(|e| e.fault), Err(PathFault::TooDeep));
    }

    #[test]
    fn a_path_that_asks_for_too_much_ends() {
        let rows = format!("[{}]", vec!["[1,1,1,1]"; 2_000].join(","));
        let document = Document::parse(rows.as_bytes()).expect("JSON");
        let query = |path: &str, steps, bytes| {
            JsonPath::parse(path).expect("a path").query(document.root(), steps, bytes).map(|found| found.len())
        };
        assert_eq!(query("$[?count($..*) > 1]", STEPS, u64::MAX), Err(Over::Steps));
        assert_eq!(query("$..[?$[0] == @]", STEPS, u64::MAX), Ok(2_000));
        assert_eq!(query("$..[*]", STEPS, u64::MAX), Ok(10_000));
        assert_eq!(query("$..[*]", 20_000, u64::MAX), Err(Over::Steps));
        // 2,000 arrays of 9 bytes and 8,000 numbers of one, and a comma behind each.
        assert_eq!(query("$..[*]", STEPS, 36_000), Ok(10_000));
        assert_eq!(query("$..[*]", STEPS, 35_999), Err(Over::Bytes));
    }

    #[test]
    fn a_short_pattern_that_is_compiled_to_much_pays_for_it() {
        let text = format!("[\"{}\"]", "a".repeat(4_000));
        let document = Document::parse(text.as_bytes()).expect("JSON");
        let steps = |pattern: &str| {
            let path = JsonPath::parse(&format!("$[?search(@,'{pattern}')]")).expect("a path");
            let mut left = 1 << 30;
            path.query_within(document.root(), &mut left, u64::MAX).expect("within its bounds");
            (1 << 30) - left
        };
        assert!(steps("b") < 40_000);
        assert!(steps("((a{7}){7}){7}b") > 10 * steps("b"), "{}", steps("((a{7}){7}){7}b"));
        // What all patterns of a path are compiled to is bounded together.
        let many = |times: usize| format!("$[?{}]", vec!["search(@,'a{300}')"; times].join("||"));
        assert!(JsonPath::parse(&many(1)).is_ok());
        assert_eq!(JsonPath::parse(&many(20)).map_err(|error| error.fault), Err(PathFault::Pattern));
    }

    #[test]
    fn paths_that_differ_in_their_spelling_alone_have_one_normal_spelling() {
        for (same, normal) in [
            (&["$", "$"][..], "$"),
            (&["$.a.b", "$['a'][\"b\"]", "$ .a [ 'b' ]", "$['\\u0061'].b"], "$['a']['b']"),
            (&["$..*", "$..[*]"], "$..[*]"),
            (&["$[1:3]", "$[ 1 : 3 : 1 ]", "$[1:3:]"], "$[1:3:1]"),
            (&["$[?@.a==1||@.b && !(@.c)]", "$[? @['a'] == 1 || ( @.b&&! @.c ) ]"], "$[?@['a']==1||(@['b']&&!@['c'])]"),
            (&["$[?@.a == 10]", "$[?@.a==value(@.a) && 1==1]"][..1], "$[?@['a']==10]"),
            (&["$[?@>1.50]", "$[?@>15e-1]"], "$[?@>1.5e0]"),
            (&["$['\\'\\n\\\\']", "$[\"'\\n\\\\\"]"], "$['\\'\\n\\\\']"),
            (&["$[?match(@.a,'x') || search(@.a,\"x\")]"], "$[?match(@['a'],'x')||search(@['a'],'x')]"),
            (&["$[?length(@.a)>=count(@..b)]"], "$[?length(@['a'])>=count(@..['b'])]"),
        ] {
            for text in same {
                assert_eq!(JsonPath::parse(text).map(|path| path.normal()).as_deref(), Ok(normal), "{text}");
            }
        }
        let normal = |text: &str| JsonPath::parse(text).expect(text).normal();
        assert_ne!(normal("$[?match(@,'a')]"), normal("$[?search(@,'a')]"));
        assert_ne!(normal("$[?!(@.a==1)]"), normal("$[?!@.a]"));
    }

    /// Paths over the names `a`, `b` and small numbers, most of them well formed.
    fn any_path() -> impl Strategy<Value = String> {
        let selector = prop_oneof![
            Just("['a']".to_owned()),
            Just(".b".to_owned()),
            Just(".*".to_owned()),
            Just("..a".to_owned()),
            Just("..*".to_owned()),
            (-3i64..4).prop_map(|index| format!("[{index}]")),
            (-4i64..4, -4i64..4, -2i64..3).prop_map(|(a, b, step)| format!("[{a}:{b}:{step}]")),
            Just("[0, 'a', ::-1]".to_owned()),
        ];
        let path = prop::collection::vec(selector, 0..3).prop_map(|parts| parts.concat());
        let test = prop_oneof![
            (path.clone(), -2i64..3).prop_map(|(path, number)| format!("@{path}=={number}")),
            Just("@.a<@.b".to_owned()),
            Just("@[0]>='b'".to_owned()),
            Just("length(@)>1".to_owned()),
            path.clone().prop_map(|path| format!("count(@{path})>1")),
            path.clone().prop_map(|path| format!("value($..b)!=value(@{path})")),
            path.clone().prop_map(|path| format!("@{path}")),
            path.clone().prop_map(|path| format!("!$..a&&(@{path}||@.b)")),
        ];
        (path.clone(), prop::option::of(test), path).prop_map(|(before, test, after)| match test {
            Some(test) => format!("${before}[?{test}]{after}"),
            None => format!("${before}{after}"),
        })
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            (-2i64..3).prop_map(Value::from),
            prop::sample::select(vec!["a", "b", ""]).prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            let name = prop::sample::select(vec!["a".to_owned(), "b".to_owned(), "c".to_owned()]);
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(name, inner, 0..4)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    /// The other implementation finds nothing at a negative index where a filter compares it or gives it to a function; RFC
    /// 9535 section 2.3.3.2 counts from the end there as elsewhere.
    fn has_negative_index_in_filter(path: &str) -> bool {
        path.split_once("[?").is_some_and(|(_, rest)| ["[-1]", "[-2]", "[-3]"].iter().any(|index| rest.contains(index)))
    }

    #[test]
    fn a_negative_index_counts_from_the_end_in_a_filter_too() {
        assert_eq!(query("$[?@[-1]==2]", "[[1,2],[2,1],[]]"), ["[1,2]"]);
        assert_eq!(
            query("$[?value($..b)!=value(@[-1])]", "[[null]]"),
            ["[null]"],
            "null is something, and no b is nothing"
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        // Another implementation of the RFC reads the same paths and finds the same places in the same order.
        #[test]
        fn another_implementation_agrees(path in any_path(), value in any_value()) {
            let theirs = serde_json_path::JsonPath::parse(&path);
            let ours = JsonPath::parse(&path);
            prop_assert_eq!(ours.is_ok(), theirs.is_ok(), "{}", path);
            if let (Ok(theirs), false) = (theirs, has_negative_index_in_filter(&path)) {
                let found: Vec<Value> =
                    query(&path, &value.to_string()).iter().map(|text| text.parse().expect("JSON")).collect();
                let expected: Vec<Value> = theirs.query(&value).all().into_iter().cloned().collect();
                prop_assert_eq!(found, expected, "{} in {}", path, value);
            }
        }

        // What is spelled anew is the same query.
        #[test]
        fn the_normal_spelling_names_the_same_places(path in any_path(), value in any_value()) {
            if let Ok(parsed) = JsonPath::parse(&path) {
                let normal = parsed.normal();
                let again = JsonPath::parse(&normal);
                prop_assert_eq!(again.map(|path| path.normal()), Ok(normal.clone()), "{}", path);
                prop_assert_eq!(query(&normal, &value.to_string()), query(&path, &value.to_string()), "{}", path);
            }
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in "[$@.\\[\\]?()'\"a-c0-9*:,!=<>&|\\\\u -]{0,40}") {
            let _ = JsonPath::parse(&format!("${text}"));
            let _ = JsonPath::parse(&text);
        }
    }
}
