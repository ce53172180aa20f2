//! Control events, as anybody who may write to Redis could publish them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use restcast::auth::control::{
    API_KEYS_CHANGED, ControlEntry, Event, PERMISSION_UPDATE, TOKEN_REVOKED, USER_LOGGED_OUT,
};
use restcast::auth::marks::{Concerned, Marks};
use restcast::limits::CONTROL_EVENT_BYTES_MAX;
use restcast::time::WallTime;

const NOW: WallTime = WallTime::from_secs(1_800_000_000);

fuzz_target!(|data: &[u8]| {
    let Some((&choice, rest)) = data.split_first() else { return };
    let Some((at, payload)) = rest.split_first_chunk() else { return };
    let event = [USER_LOGGED_OUT, PERMISSION_UPDATE, TOKEN_REVOKED, "another"][usize::from(choice % 4)];
    // As it is heard: what is not UTF-8 is made so.
    let data = String::from_utf8_lossy(payload).into_owned();
    let at_ms = if choice >= 128 { u64::from_le_bytes(*at) } else { NOW.as_micros() / 1_000 };
    let entry = ControlEntry { event: event.to_owned(), data, at_ms };
    let marks = Marks::default();
    match Event::read(&entry, NOW) {
        Ok(events) => {
            assert!((1..=2).contains(&events.len()) && entry.data.len() <= CONTROL_EVENT_BYTES_MAX);
            assert_eq!(Event::read(&entry, NOW), Ok(events.clone()), "an event is read the same twice");
            for event in &events {
                let first = marks.take(event, NOW);
                let held = marks.len();
                assert!(held <= events.len() && first.dropped == 0);
                let again = marks.take(event, NOW);
                assert_eq!(marks.len(), held, "the same event once more leaves nothing more behind");
                assert_eq!(first.concerned.is_some(), again.concerned.is_some());
                let news = matches!(again.concerned, Some(Concerned::User { news: true, .. }));
                assert!(!news, "what was heard before is no news");
            }
        }
        // The error is logged: nothing of the event stands in it.
        Err(error) => assert!(error.to_string().len() < 100),
    }
    // What restcast says to itself of API keys is read from the same stream.
    let of_keys = ControlEntry { event: API_KEYS_CHANGED.to_owned(), ..entry };
    assert!(Event::read(&of_keys, NOW).is_err());
    if let Some(mark) = of_keys.deleted_api_key() {
        let said = ControlEntry::api_keys_changed(Some(&mark), NOW);
        assert_eq!(said.deleted_api_key(), Some(mark), "what is read is what would be said");
    }
});
