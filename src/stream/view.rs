//! What of a stream's value one sequence shows: all of it, or what a view leaves of it.
//!
//! Source: protocol version 1, section 3 («Sequences»); RFC 6901 for pointers, RFC 9535 for paths.
//! Memory: the text of the projection, at most `bytes_max`, and its tape. Errors: [`ProjectionError`], a bound that was
//! passed. Not here: who gets which view (`shard::catalog`), when one is made (`stream`).
//!
//! A projection is cut out of the spans of the value's own text, so what it shows is spelled as the upstream spelled it.
//! What is not shown is left out of the text before anything else sees it: the projection is parsed, compared, kept and
//! sent like a value of its own.

use std::ops::Range;
use std::sync::Arc;

use crate::codec::json::{Document, Kind, Node};
use crate::codec::jsonpath::{JsonPath, Over};
use crate::codec::pointer::Pointer;
use crate::limits::{PATH_STEPS_MIN, PATH_STEPS_PER_BYTE};

/// One `[[stream.view]]`.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    /// Who gets it: whoever has any one of these, unless an earlier view names a role of theirs.
    pub roles: Vec<String>,
    /// What of the value they get.
    pub projection: Projection,
}

/// How a projection is made.
#[derive(Clone, Debug, PartialEq)]
pub enum Projection {
    /// The value reduced to these places.
    Pointers(Places),
    /// The matches of a path as an array; of a singular one the match itself, null where there is none.
    Path(JsonPath),
}

/// Why there is no projection of a value.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ProjectionError {
    /// Its text would be too long: a path may match one place several times.
    #[error("what the path of view {view} matches is over {bytes_max} bytes")]
    TooLarge {
        /// The view, 1 is the first.
        view: u16,
        /// The most that is taken.
        bytes_max: u64,
    },
    /// Evaluating its path takes too long.
    #[error("the path of view {view} takes over {steps_max} steps with this value")]
    TooLong {
        /// The view, 1 is the first.
        view: u16,
        /// The most that is taken.
        steps_max: u64,
    },
}

/// What a sequence shows of a value, and what of that makes an event.
#[derive(Clone, Debug)]
pub struct Shown {
    /// The value that is sent.
    pub value: Arc<Document>,
    /// The same without the places that are ignored: while this is as it was, there is no event.
    pub compared: Arc<Document>,
    /// Where in the text of `value` those places begin.
    ignored: Vec<usize>,
}

impl Shown {
    /// All of a value; what is ignored of it is told to whoever compares it.
    pub fn whole(document: &Arc<Document>) -> Shown {
        Shown { value: Arc::clone(document), compared: Arc::clone(document), ignored: Vec::new() }
    }

    /// The spans of `value` that make no event.
    pub fn ignored(&self) -> Vec<Range<u32>> {
        self.ignored.iter().filter_map(|at| self.value.span_at(*at)).collect()
    }

    /// What is compared, where it is not the value itself.
    pub fn compared_apart(&self) -> Option<&Document> {
        (!Arc::ptr_eq(&self.value, &self.compared)).then_some(&self.compared)
    }
}

impl Projection {
    /// What it leaves of `whole`. `ignore`: places of `whole` that make no event. `view`, 1 for the first, and `bytes_max`
    /// are for the bound of its text.
    ///
    /// # Errors
    /// [`ProjectionError`].
    pub fn of(
        &self,
        whole: &Document,
        ignore: &[Pointer],
        view: u16,
        bytes_max: u64,
    ) -> Result<Shown, ProjectionError> {
        let steps_max = PATH_STEPS_MIN.max(whole.text().len() as u64 * PATH_STEPS_PER_BYTE);
        let of_view = |over| match over {
            Over::Steps => ProjectionError::TooLong { view, steps_max },
            Over::Bytes => ProjectionError::TooLarge { view, bytes_max },
        };
        let ignored = Projection::ignored(whole, ignore);
        match self {
            Projection::Pointers(places) => Ok(cut(&ignored, |writer| writer.root(whole.root(), places))),
            Projection::Path(path) => selected(path, whole, &ignored, &mut { steps_max }, bytes_max).map_err(of_view),
        }
    }

    /// The spans of those places of `whole` that make no event.
    pub(super) fn ignored(whole: &Document, ignore: &[Pointer]) -> Vec<Range<u32>> {
        ignore.iter().filter_map(|pointer| whole.at(pointer)).map(Node::span).collect()
    }

    /// How much longer it takes than reading the value once, about.
    pub fn weight(&self) -> usize {
        match self {
            Projection::Pointers(_) => 1,
            Projection::Path(_) => PATH_WEIGHT,
        }
    }
}

/// How much longer evaluating a path takes than reading the value once, about.
pub(super) const PATH_WEIGHT: usize = 4;

/// What `path` leaves of `whole`, of which the spans `ignored` make no event.
pub(super) fn selected(
    path: &JsonPath,
    whole: &Document,
    ignored: &[Range<u32>],
    steps_left: &mut u64,
    bytes_max: u64,
) -> Result<Shown, Over> {
    let found = path.query_within(whole.root(), steps_left, bytes_max)?;
    // Matches stand below the root, so that the array around them makes nothing deeper than it was.
    Ok(cut(ignored, |writer| writer.matches(&found, path.is_singular())))
}

/// What `write` cuts out of a value: with those places that are ignored, and without.
fn cut<'p>(ignored: &'p [Range<u32>], write: impl Fn(&mut Writer<'p>)) -> Shown {
    let written = |leave_out| {
        let mut writer = Writer { out: Vec::new(), ignored, leave_out, begin: Vec::new(), places: Vec::new() };
        write(&mut writer);
        let document = Document::parse(&writer.out).expect("what is cut out of a value is one");
        (Arc::new(document), writer.begin)
    };
    let (value, begin) = written(false);
    let compared = if ignored.is_empty() { Arc::clone(&value) } else { written(true).0 };
    Shown { value, compared, ignored: begin }
}

/// Places of a value, as pointers in which `*` stands for each element or member.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Places {
    /// As written, for whoever reads the configuration.
    pointers: Vec<Pointer>,
    root: Place,
}

/// One step of [`Places`].
#[derive(Clone, Debug, Default, PartialEq)]
struct Place {
    /// All there is from here on.
    all: bool,
    /// What is shown of each element or member.
    each: Option<Box<Place>>,
    /// What is shown of those so called, besides; sorted by name.
    named: Vec<(String, Place)>,
}

impl Places {
    /// The places that any of `pointers` names.
    pub fn new(pointers: Vec<Pointer>) -> Places {
        let mut root = Place::default();
        for pointer in &pointers {
            let mut place = &mut root;
            for token in pointer.tokens() {
                place = match token.as_str() {
                    "*" => place.each.get_or_insert_default(),
                    name => {
                        let at = place.named.binary_search_by(|(other, _)| other.as_str().cmp(name));
                        let at = at.unwrap_or_else(|at| {
                            place.named.insert(at, (name.to_owned(), Place::default()));
                            at
                        });
                        &mut place.named[at].1
                    }
                };
            }
            place.all = true;
        }
        Places { pointers, root }
    }

    /// As written.
    pub fn pointers(&self) -> &[Pointer] {
        &self.pointers
    }
}

impl Place {
    fn named(&self, name: &[u8]) -> Option<&Place> {
        let at = self.named.binary_search_by(|(other, _)| other.as_bytes().cmp(name)).ok()?;
        self.named.get(at).map(|(_, place)| place)
    }
}

/// Writes a projection's text.
struct Writer<'p> {
    out: Vec<u8>,
    /// What makes no event, as spans of the tape.
    ignored: &'p [Range<u32>],
    /// Whether that is left out; otherwise it is noted where it begins.
    leave_out: bool,
    /// Where in `out` what is ignored begins.
    begin: Vec<usize>,
    /// The places that lead to the node being written and to those around it: a stack, so that no node needs memory of its
    /// own. At most one of each pointer leads to one node.
    places: Vec<&'p Place>,
}

impl<'p> Writer<'p> {
    /// The value reduced to `places`; null where nothing of it is left.
    fn root(&mut self, node: Node<'_>, places: &'p Places) {
        self.places.push(&places.root);
        if self.is_left_out(node) || !self.reduced(node, 0) {
            self.append(b"null");
        }
    }

    fn matches(&mut self, found: &[Node<'_>], is_singular: bool) {
        let is_shown = |node: &&Node<'_>| !(self.leave_out && self.is_within_ignored(**node));
        let found: Vec<&Node<'_>> = found.iter().filter(is_shown).collect();
        if is_singular {
            return match found.first() {
                Some(node) => self.whole(**node),
                None => self.append(b"null"),
            };
        }
        self.append(b"[");
        for (index, node) in found.into_iter().enumerate() {
            if index > 0 {
                self.append(b",");
            }
            self.whole(*node);
        }
        self.append(b"]");
    }

    fn append(&mut self, text: &[u8]) {
        self.out.extend_from_slice(text);
    }

    fn is_left_out(&self, node: Node<'_>) -> bool {
        self.leave_out && self.ignored.iter().any(|span| span.start == node.span().start)
    }

    fn is_within_ignored(&self, node: Node<'_>) -> bool {
        self.ignored.iter().any(|span| span.contains(&node.span().start))
    }

    /// All of a node but what is left out.
    fn whole(&mut self, node: Node<'_>) {
        let own = node.span();
        if self.is_within_ignored(node) {
            self.begin.push(self.out.len());
            self.append(node.raw());
        } else if self.ignored.iter().any(|span| own.contains(&span.start)) {
            self.container(node, |writer, child, _| {
                writer.whole(child);
                true
            });
        } else {
            self.append(node.raw());
        }
    }

    /// What the places from `from` on leave of a node; whether anything.
    fn reduced(&mut self, node: Node<'_>, from: usize) -> bool {
        if self.places.iter().skip(from).any(|place| place.all) {
            self.whole(node);
            return true;
        }
        if !matches!(node.kind(), Kind::Object | Kind::Array) {
            // What is shown would stand within it, and nothing does.
            return false;
        }
        let to = self.places.len();
        self.container(node, |writer, child, key| {
            for at in from..to {
                let Some(&place) = writer.places.get(at) else { continue };
                let named = match key {
                    Key::Name(name) => place.named(&name.unescaped()),
                    Key::Index(_) if place.named.is_empty() => None,
                    Key::Index(index) => place.named(index.to_string().as_bytes()),
                };
                writer.places.extend(named);
                writer.places.extend(place.each.as_deref());
            }
            let is_shown = writer.places.len() > to && writer.reduced(child, to);
            writer.places.truncate(to);
            is_shown
        });
        true
    }

    /// An object or array with those of its members or elements that `write` writes.
    fn container<'d>(&mut self, node: Node<'d>, mut write: impl FnMut(&mut Self, Node<'d>, Key<'d>) -> bool) {
        let is_object = node.kind() == Kind::Object;
        self.append(if is_object { b"{" } else { b"[" });
        let members = node.members().map(|member| (Key::Name(member.name), member.value));
        let elements = node.elements().enumerate().map(|(index, element)| (Key::Index(index), element));
        let mut is_first = true;
        for (key, child) in members.chain(elements) {
            if self.is_left_out(child) {
                continue;
            }
            let before = self.out.len();
            if !is_first {
                self.append(b",");
            }
            if let Key::Name(name) = key {
                self.append(name.raw());
                self.append(b":");
            }
            if write(self, child, key) {
                is_first = false;
            } else {
                self.out.truncate(before);
            }
        }
        self.append(if is_object { b"}" } else { b"]" });
    }
}

/// How a child is called.
#[derive(Clone, Copy)]
enum Key<'d> {
    Name(Node<'d>),
    Index(usize),
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    fn pointers(texts: &[&str]) -> Vec<Pointer> {
        texts.iter().map(|text| Pointer::parse(text).expect("a pointer")).collect()
    }

    fn by_pointers(texts: &[&str]) -> Projection {
        Projection::Pointers(Places::new(pointers(texts)))
    }

    fn by_path(text: &str) -> Projection {
        Projection::Path(JsonPath::parse(text).expect("a path"))
    }

    fn shown(projection: &Projection, whole: &str, ignore: &[&str]) -> (String, String) {
        let whole = Document::parse(whole.as_bytes()).expect("JSON");
        let shown = projection.of(&whole, &pointers(ignore), 1, u64::MAX).expect("within its bounds");
        let text = |document: &Document| String::from_utf8(document.text().to_vec()).expect("UTF-8");
        (text(&shown.value), text(&shown.compared))
    }

    fn check(projection: &Projection, whole: &str, value: &str) {
        assert_eq!(shown(projection, whole, &[]), (value.to_owned(), value.to_owned()), "{projection:?} of {whole}");
    }

    #[test]
    fn pointers_reduce_a_value_and_keep_its_structure() {
        let lead = r#"{"name":"Ada","ssn":"1","status":{"code":1.0E2,"note":"x"},"phone":null}"#;
        check(&by_pointers(&["/name", "/status"]), lead, r#"{"name":"Ada","status":{"code":1.0E2,"note":"x"}}"#);
        check(&by_pointers(&["/status/code", "/phone"]), lead, r#"{"status":{"code":1.0E2},"phone":null}"#);
        check(&by_pointers(&["/absent", "/name/first", "/status/absent"]), lead, r#"{"status":{}}"#);
        check(&by_pointers(&[""]), lead, lead);
        check(&by_pointers(&["/a"]), "7", "null");
        let rows = r#"{"rows":[{"id":1,"pay":9},{"id":2},{},3,[4],null],"n":3}"#;
        check(&by_pointers(&["/rows/*/id"]), rows, r#"{"rows":[{"id":1},{"id":2},{},[]]}"#);
        check(&by_pointers(&["/rows/0", "/rows/1/id"]), rows, r#"{"rows":[{"id":1,"pay":9},{"id":2}]}"#);
        check(
            &by_pointers(&["/rows/*/id", "/rows/0/pay", "/n"]),
            rows,
            r#"{"rows":[{"id":1,"pay":9},{"id":2},{},[]],"n":3}"#,
        );
        check(&by_pointers(&["/rows/01", "/rows/-", "/rows/x"]), rows, r#"{"rows":[]}"#);
        check(&by_pointers(&["/*"]), rows, rows);
        check(&by_pointers(&["/*/*/pay"]), rows, r#"{"rows":[{"pay":9},{},{},[]]}"#);
    }

    #[test]
    fn what_is_shown_is_spelled_as_it_came() {
        let value = r#"{"\u0061\/b":[-0.0,1E5,"\ud83d\ude00","é"],"a\/c":9007199254740993}"#;
        check(&by_pointers(&["/a~1b"]), value, r#"{"\u0061\/b":[-0.0,1E5,"\ud83d\ude00","é"]}"#);
        check(&by_path("$['a/b'][0,1,3]"), value, r#"[-0.0,1E5,"é"]"#);
        check(&by_path("$['a/c']"), value, "9007199254740993");
    }

    #[test]
    fn a_path_gives_its_matches_or_of_a_singular_one_the_match_itself() {
        let rows = r#"[{"id":1,"open":true},{"id":2,"open":false},{"id":3,"open":true}]"#;
        check(&by_path("$[?@.open==true].id"), rows, "[1,3]");
        check(&by_path("$[9:]"), rows, "[]");
        check(&by_path("$[0].id"), rows, "1");
        check(&by_path("$[0].absent"), rows, "null");
        check(&by_path("$"), rows, rows);
    }

    #[test]
    fn what_is_ignored_is_shown_and_not_compared() {
        let value = r#"{"at":1,"rows":[{"id":1,"seen":2},{"id":2,"seen":3}]}"#;
        let both = |value: &str, compared: &str| (value.to_owned(), compared.to_owned());
        let ignore = ["/at", "/rows/0/seen", "/absent"];
        let all = by_pointers(&["/at", "/rows"]);
        assert_eq!(shown(&all, value, &ignore), both(value, r#"{"rows":[{"id":1},{"id":2,"seen":3}]}"#));
        let seen = by_path("$.rows[*].seen");
        assert_eq!(shown(&seen, value, &ignore), both("[2,3]", "[3]"));
        assert_eq!(shown(&by_path("$.at"), value, &ignore), both("1", "null"));
        let below = by_path("$.rows[0].id");
        assert_eq!(shown(&below, value, &["/rows/0"]), both("1", "null"));
        assert_eq!(shown(&by_pointers(&[""]), "[1]", &[""]), both("[1]", "null"));
    }

    #[test]
    fn a_path_past_its_bounds_is_an_error_that_names_its_view() {
        let whole = Document::parse(format!("[{}1]", "1,".repeat(5_000)).as_bytes()).expect("JSON");
        let of = |path: &str, bytes_max| by_path(path).of(&whole, &[], 2, bytes_max).map(|_| ());
        let (at_most, below) = (20_002, 10_001);
        assert_eq!(of("$[*,*]", at_most + 2), Ok(()));
        assert_eq!(of("$[*,*]", below), Err(ProjectionError::TooLarge { view: 2, bytes_max: below }));
        let steps_max = PATH_STEPS_PER_BYTE * whole.text().len() as u64;
        assert_eq!(of("$[?count($[*]) == @]", u64::MAX), Err(ProjectionError::TooLong { view: 2, steps_max }));
    }

    /// What pointers leave of a value, over the values of another library.
    pub(in crate::stream) fn model(value: &Value, pointers: &[&[String]]) -> Option<Value> {
        if pointers.iter().any(|tokens| tokens.is_empty()) {
            return Some(value.clone());
        }
        let below = |name: &str| -> Vec<&[String]> {
            let leads = |(first, _): &(&String, &[String])| *first == name || *first == "*";
            pointers.iter().filter_map(|tokens| tokens.split_first()).filter(leads).map(|(_, rest)| rest).collect()
        };
        let child = |name: &str, value: &Value| {
            let inner = below(name);
            if inner.is_empty() { None } else { model(value, &inner) }
        };
        match value {
            Value::Object(members) => {
                let kept = members.iter().filter_map(|(name, value)| Some((name.clone(), child(name, value)?)));
                Some(Value::Object(kept.collect()))
            }
            Value::Array(elements) => {
                let kept = elements.iter().enumerate().filter_map(|(at, value)| child(&at.to_string(), value));
                Some(Value::Array(kept.collect()))
            }
            _ => None,
        }
    }

    pub(in crate::stream) fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![Just(Value::Null), (0i64..4).prop_map(Value::from), Just(Value::from("é\"/"))];
        leaf.prop_recursive(4, 24, 4, |inner| {
            let name = prop::sample::select(vec!["a".to_owned(), "b/~".to_owned(), "0".to_owned(), "*".to_owned()]);
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map(name, inner, 0..4)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    pub(in crate::stream) fn any_pointers() -> impl Strategy<Value = Vec<String>> {
        let token = prop::sample::select(vec!["a", "b~1~0", "0", "1", "*", "c"]);
        let pointer = prop::collection::vec(token, 0..4)
            .prop_map(|tokens| tokens.into_iter().fold(String::new(), |pointer, token| format!("{pointer}/{token}")));
        prop::collection::vec(pointer, 1..5)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn pointers_leave_what_the_model_leaves(value in any_value(), texts in any_pointers()) {
            let pointers: Vec<Pointer> = texts.iter().map(|text| Pointer::parse(text).expect("a pointer")).collect();
            let tokens: Vec<&[String]> = pointers.iter().map(Pointer::tokens).collect();
            let expected = model(&value, &tokens).unwrap_or(Value::Null);
            let projection = Projection::Pointers(Places::new(pointers.clone()));
            let (text, _) = shown(&projection, &value.to_string(), &[]);
            prop_assert_eq!(text.parse::<Value>().expect("JSON"), expected, "{:?} of {}", texts, value);
        }
    }
}
