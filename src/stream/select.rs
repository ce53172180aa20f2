//! What of a stream's value a sequence shows: what a view leaves of it, and of that what a caller chooses by `select`.
//!
//! Source: protocol version 1, sections 1 («Stream parameters») and 3 («Sequences»); RFC 9535.
//! Memory: the path, and what it leaves of the value. Errors: [`PathError`] of who wrote the path; [`SelectError`], a bound
//! that was passed with a value.
//! Not here: the path itself (`codec::jsonpath`), what is shown before (`stream::view`), how many there are
//! (`shard::owner`).
//!
//! A caller's path is evaluated with each change of the value, so the work of one is bounded, and that of all `select`s of a
//! stream together (`stream::shares`): one that there is too little work for shows nothing of that value, which its own
//! callers are told. What is written counts as work, as it is read and compared afterwards.

use std::hash::{Hash, Hasher};
use std::ops::Range;
use std::sync::Arc;

use super::view::{self, Projection, Shown};
use crate::codec::json::Document;
use crate::codec::jsonpath::{JsonPath, PathError};

/// What of a stream's value a sequence shows. Two sequences of one filled-in URL differ by it.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
pub struct Facet {
    /// The place of its view among the stream's; `None`: the whole value.
    pub view: Option<u16>,
    /// What a caller has chosen of what the view shows; `None`: all of it.
    pub select: Option<Select>,
}

impl Facet {
    /// What the upstream sent.
    pub const WHOLE: Facet = Facet { view: None, select: None };

    /// All of what a view shows.
    pub const fn of_view(view: u16) -> Facet {
        Facet { view: Some(view), select: None }
    }

    /// What its view leaves of the value; `None`: all of it.
    pub fn projection<'o>(&self, options: &'o super::Options) -> Option<&'o Projection> {
        Some(&options.views.get(usize::from(self.view?))?.projection)
    }

    /// Whether it is the value itself.
    pub fn is_whole(&self) -> bool {
        self.view.is_none() && self.select.is_none()
    }

    /// How much longer it takes than reading the value once, about.
    pub fn weight(&self, options: &super::Options) -> usize {
        self.projection(options).map_or(0, Projection::weight) + self.select.as_ref().map_or(0, |_| view::PATH_WEIGHT)
    }
}

/// A path by which a caller has chosen what to be shown: RFC 9535, evaluated over what their view shows. Two that differ in
/// their spelling alone are one.
#[derive(Clone, Debug)]
pub struct Select {
    path: Arc<JsonPath>,
    normal: Arc<str>,
}

impl Select {
    /// The choice that the path spelled `text` makes.
    ///
    /// # Errors
    /// What is wrong with the path, and where.
    pub fn parse(text: &str) -> Result<Select, PathError> {
        let path = JsonPath::parse(text)?;
        Ok(Select { normal: Arc::from(path.normal()), path: Arc::new(path) })
    }

    /// Its one spelling.
    pub fn as_str(&self) -> &str {
        &self.normal
    }

    /// What it leaves of `whole`, of which the spans `ignored` make no event; and what that took of `work_max`, the steps that it
    /// may take and bytes that it may write together. Where it comes to nothing that is all of it.
    pub fn of(&self, whole: &Document, ignored: &[Range<u32>], work_max: u64) -> (Result<Shown, SelectError>, u64) {
        let mut left = work_max;
        let selected = view::selected(&self.path, whole, ignored, &mut left, work_max);
        // What is written is read and compared afterwards.
        let written = selected.as_ref().map_or(0, |selected| selected.value.text().len() as u64);
        match selected {
            Ok(shown) if written <= left => (Ok(shown), work_max - left + written),
            _ => (Err(SelectError { work_max }), work_max),
        }
    }
}

impl PartialEq for Select {
    fn eq(&self, other: &Select) -> bool {
        self.normal == other.normal
    }
}

impl Eq for Select {}

impl Hash for Select {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.normal.hash(state);
    }
}

/// Why there is nothing of a value that a caller has selected: it takes more than there may be, or than others have left.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("what is selected takes over {work_max} steps and bytes of this value, which is all that is left for it")]
pub struct SelectError {
    /// The most that it might take.
    pub work_max: u64,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::codec::pointer::Pointer;

    fn document(text: &str) -> Document {
        Document::parse(text.as_bytes()).expect("JSON")
    }

    fn text(document: &Document) -> String {
        String::from_utf8(document.text().to_vec()).expect("UTF-8")
    }

    fn select(path: &str) -> Select {
        Select::parse(path).expect("a path")
    }

    #[test]
    fn two_spellings_of_one_path_are_one_choice() {
        assert_eq!(select("$.a[0]"), select("$ ['a'] [0]"));
        assert_ne!(select("$.a[0]"), select("$.a[1]"));
        assert!(Select::parse("$.a[").is_err_and(|error| error.at == 4));
    }

    #[test]
    fn what_is_ignored_is_found_again_behind_a_view() {
        let whole = document(r#"{"at":1,"rows":[{"id":1,"seen":2,"pay":3},{"id":2,"seen":4,"pay":5}]}"#);
        let ignore: Vec<Pointer> =
            ["/at", "/rows/1/seen"].iter().map(|text| Pointer::parse(text).expect("a pointer")).collect();
        let view = Projection::Path(JsonPath::parse("$['rows','at']").expect("a path"));
        let shown = view.of(&whole, &ignore, 1, u64::MAX).expect("within its bounds");
        assert_eq!(text(&shown.value), r#"[[{"id":1,"seen":2,"pay":3},{"id":2,"seen":4,"pay":5}],1]"#);
        let of = |path: &str| {
            let shown = select(path).of(&shown.value, &shown.ignored(), u64::MAX).0.expect("within its bounds");
            (text(&shown.value), text(&shown.compared))
        };
        assert_eq!(of("$[0][*].seen"), ("[2,4]".into(), "[2]".into()));
        assert_eq!(of("$[0][?@.seen > 3].id"), ("[2]".into(), "[2]".into()));
        assert_eq!(of("$[1]"), ("1".into(), "null".into()));
        assert_eq!(of("$[0][1]"), (r#"{"id":2,"seen":4,"pay":5}"#.into(), r#"{"id":2,"pay":5}"#.into()));
    }

    #[test]
    fn what_it_takes_is_told_and_all_of_it_where_it_comes_to_nothing() {
        let whole = document(&format!("[{}1]", "1,".repeat(5_000)));
        let of = |path: &str, work_max| {
            let (shown, taken) = select(path).of(&whole, &[], work_max);
            (shown.map(|shown| shown.value.text().len()), taken)
        };
        let (shown, taken) = of("$[*]", 100_000);
        assert_eq!(shown, Ok(10_003));
        assert!((20_000..25_000).contains(&taken), "a step for each element, and a byte: {taken}");
        assert_eq!(of("$[*]", taken), (Ok(10_003), taken));
        assert_eq!(
            of("$[*]", taken - 1),
            (Err(SelectError { work_max: taken - 1 }), taken - 1),
            "what was tried is paid for"
        );
        assert_eq!(of("$[?count($[*]) == @]", 40_000), (Err(SelectError { work_max: 40_000 }), 40_000));
        assert_eq!(of("$[*,*,*,*]", 40_000), (Err(SelectError { work_max: 40_000 }), 40_000));
        assert_eq!(of("$[0]", 0).1, 0);
    }

    proptest! {
        // Whatever a path matches, another implementation matches it too, in what a view shows as in the whole.
        #[test]
        fn another_implementation_selects_the_same(value in crate::stream::view::tests::any_value(), path in any_path()) {
            let whole = document(&value.to_string());
            let theirs = serde_json_path::JsonPath::parse(&path).expect("a path");
            let expected = theirs.query(&value).all();
            let is_singular = JsonPath::parse(&path).expect("a path").is_singular();
            let expected = match expected.first() {
                _ if !is_singular => serde_json::to_value(&expected).expect("JSON"),
                Some(first) => (*first).clone(),
                None => serde_json::Value::Null,
            };
            let (shown, _) = select(&path).of(&whole, &[], u64::MAX);
            prop_assert_eq!(text(&shown.expect("it is small").value).parse::<serde_json::Value>().expect("JSON"), expected);
        }
    }

    fn any_path() -> impl Strategy<Value = String> {
        let segment = prop::sample::select(vec![
            ".a",
            "['b/~']",
            "[*]",
            "..a",
            "..*",
            "[0]",
            "[-1]",
            "[?@.a]",
            "[?@.a==1]",
            "[0,0]",
            "[::-1]",
            "[?count(@.*)>1]",
        ]);
        prop::collection::vec(segment, 0..4).prop_map(|segments| format!("${}", segments.concat()))
    }
}
