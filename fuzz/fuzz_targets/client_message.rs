//! Clients' messages: no panic, nothing accepted that is not JSON to another implementation, ids echoed byte for byte, and
//! every answer is JSON.
#![no_main]

use libfuzzer_sys::fuzz_target;
use restcast::codec::message::{ClientId, ClientMessage, ErrorFrame, Members, write_error, write_subscribed};
use serde_json::Value;

fn echoed(id: Option<&ClientId>, text: &str) {
    let Some(id) = id else { return };
    assert!(text.contains(id.as_json()), "an id keeps its spelling");
    assert_eq!(ClientId::from_json(id.as_json()).as_ref(), Some(id));
}

/// Whether `answer` is JSON. A number past the range of f64 is, though serde_json does not read it.
fn assert_json(answer: &[u8]) {
    if let Err(error) = serde_json::from_slice::<Value>(answer) {
        assert!(error.to_string().starts_with("number out of range"), "{error}");
    }
}

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut answer = Vec::new();
    match ClientMessage::parse(text) {
        Ok(message) => {
            if let Err(error) = serde_json::from_str::<Value>(text) {
                let error = error.to_string();
                // serde_json stops one level earlier than the contract, and at numbers past the range of f64.
                let stricter = error.starts_with("recursion limit") || error.starts_with("number out of range");
                assert!(stricter, "accepted, but {error}");
            }
            match &message {
                ClientMessage::Auth { .. } => {}
                ClientMessage::AuthUpdate { id, .. } => echoed(id.as_ref(), text),
                ClientMessage::Unsubscribe { stream, id } => {
                    write_subscribed(&mut answer, stream, id.as_ref());
                    echoed(id.as_ref(), text);
                }
                ClientMessage::Other { kind, id } => {
                    assert!(kind.len() <= 64 && !ClientMessage::TYPES.contains(&kind.as_str()));
                    echoed(id.as_ref(), text);
                    let members = Members::parse(text).expect("it was one");
                    assert!(members.at("type").is_some_and(|json| text.contains(json)));
                    assert!(members.at("a.b.c").is_none_or(|json| text.contains(json)));
                }
                ClientMessage::Subscribe(subscribe) => {
                    write_subscribed(&mut answer, &subscribe.stream, subscribe.id.as_ref());
                    echoed(subscribe.id.as_ref(), text);
                }
            }
            if !answer.is_empty() {
                assert_json(&answer);
            }
        }
        Err(error) => {
            echoed(error.id(), text);
            write_error(&mut answer, &ErrorFrame::from(&error));
            assert_json(&answer);
        }
    }
});
