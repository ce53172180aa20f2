//! What a caller selects, and a value, divided by a line break: the choice is the same however it is spelled, leaves what the
//! path finds and nothing else, the same each time, and takes no more work than it is given.
#![no_main]

use libfuzzer_sys::fuzz_target;
use restcast::codec::json::Document;
use restcast::codec::jsonpath::JsonPath;
use restcast::stream::select::Select;

fuzz_target!(|input: &str| {
    let Some((path, value)) = input.split_once('\n') else { return };
    let Ok(select) = Select::parse(path) else { return };
    let again = Select::parse(select.as_str()).expect("its one spelling is a path");
    assert!(
        again == select && again.as_str() == select.as_str(),
        "{path:?} is {} and {}",
        select.as_str(),
        again.as_str()
    );
    let Ok(value) = Document::parse(value.as_bytes()) else { return };

    let given = 1 << 20;
    let (selected, used) = select.of(&value, &[], given);
    assert!(used > 0 && used <= given, "work is counted, whatever came of it");
    let Ok(shown) = selected else { return };

    let found =
        JsonPath::parse(path).expect("a path").query(value.root(), given, given).expect("there was work for it");
    let nodes: Vec<&[u8]> = found.iter().map(|node| node.raw()).collect();
    let expected = match (JsonPath::parse(path).expect("a path").is_singular(), &*nodes) {
        (true, [node]) => node.to_vec(),
        (true, []) => b"null".to_vec(),
        (true, _) => panic!("{path:?} finds one node at most"),
        (false, nodes) => [b"[", &*nodes.join(&b","[..]), b"]"].concat(),
    };
    assert_eq!(String::from_utf8_lossy(shown.value.text()), String::from_utf8_lossy(&expected), "{path:?}");
    assert!(Document::parse(shown.value.text()).is_ok());

    // What it took is enough; with less it gives nothing or the same, and never takes more than there is.
    for given in [used, used - 1, used / 2, 0] {
        let (outcome, taken) = again.of(&value, &[], given);
        assert!(taken <= given && (given < used || outcome.is_ok()), "{used} were enough, and {given} are not");
        assert!(outcome.is_ok_and(|same| same.value.text() == shown.value.text()) || given < used);
    }
});
