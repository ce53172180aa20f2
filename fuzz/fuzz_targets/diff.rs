//! Two texts, divided by the first line break: if both are values, every delta between them, either way and with every
//! option, leads from the one to the other and is smaller than it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use restcast::codec::json::Document;
use restcast::codec::proof::canonical;
use restcast::stream::apply::{apply_merge, apply_patch};
use restcast::stream::diff::{Change, DiffOptions, Pointer, WORK_MAX, diff};

fuzz_target!(|input: &[u8]| {
    let Some(middle) = input.iter().position(|&b| b == b'\n') else { return };
    let (Some(first), Some(second)) = (parse(&input[..middle]), parse(&input[middle + 1..])) else { return };
    // What is hashed of a value tells it from every other, and from no spelling of itself.
    let forms = [&first, &second].map(canonical);
    assert_eq!(forms[0] == forms[1], first == second);
    for (form, value) in forms.iter().zip([&first, &second]) {
        assert!(Document::parse(form).expect("a canonical form is a value") == *value);
    }
    let ignore = [Pointer::parse("/a").expect("a pointer"), Pointer::parse("/0/a").expect("a pointer")];
    for (old, new) in [(&first, &second), (&second, &first)] {
        for array_key in [None, Some("id"), Some("a")] {
            for work_max in [0, 30, WORK_MAX] {
                for ignore in [&[], &ignore[..]] {
                    check(old, new, &DiffOptions { ignore, array_key, work_max });
                }
            }
        }
    }
});

/// A value, of which is also proven what parsing promises.
fn parse(text: &[u8]) -> Option<Document> {
    let document = Document::parse(text).ok()?;
    let again = Document::parse(document.text()).expect("a minified value is a value");
    assert_eq!(again.text(), document.text());
    assert!(again == document && again.root().hash() == document.root().hash());
    // What nests 128 deep is taken by us alone.
    match serde_json::from_slice::<serde_json::Value>(text) {
        Ok(_) => {}
        Err(error) => {
            assert!(error.to_string().contains("recursion") || error.to_string().contains("out of range"), "{error}")
        }
    }
    Some(document)
}

fn check(old: &Document, new: &Document, options: &DiffOptions<'_>) {
    match diff(old, new, options) {
        Change::Unchanged => assert!(old == new || !options.ignore.is_empty()),
        Change::Changed { patch, merge } => {
            assert!(old != new);
            if let Some(patch) = patch {
                assert!(patch.len() < new.text().len());
                leads_to(&apply_patch(old.text(), &patch).expect("a patch applies"), new);
            }
            if let Some(merge) = merge {
                assert!(merge.len() < new.text().len());
                leads_to(&apply_merge(old.text(), &merge).expect("a merge applies"), new);
            }
        }
    }
}

fn leads_to(result: &[u8], new: &Document) {
    assert!(Document::parse(result).expect("a delta makes a value") == *new);
}
