//! `Link` fields: whatever bytes come, the next page's place is a part of them; the same field twice leads to the same place.
#![no_main]

use libfuzzer_sys::fuzz_target;
use restcast::codec::link_header::next;

fuzz_target!(|data: &[u8]| {
    let Some(target) = next([data].into_iter()) else { return };
    assert!(!target.contains('>'), "a target ends at the first >");
    let inside = data.windows(target.len() + 2).any(|part| part == format!("<{target}>").as_bytes());
    assert!(inside, "the target stands in the field");
    assert_eq!(next([data, data].into_iter()), Some(target), "the first counts");
    // Behind a link of another relation it is found too.
    let behind = [b"</other>; rel=other, ".as_slice(), data].concat();
    if data.iter().filter(|byte| **byte == b'<').count() < 32 {
        assert_eq!(next([&*behind].into_iter()), Some(target));
    }
});
