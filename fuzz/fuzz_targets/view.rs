//! A path or pointers, what is ignored, and a value, divided by line breaks: what a view leaves of the value is a value
//! within its bound, the same each time, and less without what is ignored.
#![no_main]

use libfuzzer_sys::fuzz_target;
use restcast::codec::json::Document;
use restcast::codec::jsonpath::JsonPath;
use restcast::stream::diff::Pointer;
use restcast::stream::view::{Places, Projection};

fuzz_target!(|input: &str| {
    let mut lines = input.splitn(3, '\n');
    let (Some(shown), Some(ignored), Some(value)) = (lines.next(), lines.next(), lines.next()) else { return };
    let ignore: Vec<Pointer> = ignored.split(' ').filter_map(|text| Pointer::parse(text).ok()).collect();
    let projection = match JsonPath::parse(shown) {
        Ok(path) => Projection::Path(path),
        Err(_) => {
            Projection::Pointers(Places::new(shown.split(' ').filter_map(|text| Pointer::parse(text).ok()).collect()))
        }
    };
    let Ok(value) = Document::parse(value.as_bytes()) else { return };
    let bytes_max = 1 << 20;
    let Ok(shown) = projection.of(&value, &ignore, 1, bytes_max) else { return };
    assert!(shown.value.text().len() as u64 <= bytes_max);
    assert!(shown.compared.text().len() <= shown.value.text().len().max(4), "what is ignored is less, or null");
    if let Projection::Path(path) = &projection {
        let found = path.query(value.root(), 1 << 20, bytes_max).unwrap_or_default();
        for node in found {
            let span = node.span();
            assert!(span.start < span.end && span.end <= value.root().span().end);
        }
    }
    // A view of the same value is the same view.
    let again = projection.of(&value, &ignore, 1, bytes_max).expect("it was made before");
    assert!(again.value.text() == shown.value.text());
});
