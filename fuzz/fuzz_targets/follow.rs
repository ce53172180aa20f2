//! An upstream that speaks a stream, as events or as lines: however its bytes are cut, the last value is the same, is the one
//! that a plain reader finds, and never more than the bound.
#![no_main]

use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use restcast::stream::follow::{Events, Following, Kind, Newest};

const BYTES_MAX: usize = 64;

fuzz_target!(|data: &[u8]| {
    let Some((plan, wire)) = data.split_at_checked(3) else { return };
    let kind = if plan[0] & 1 == 0 { Kind::Sse } else { Kind::Ndjson };
    let wanted = if plan[0] & 2 == 0 { vec![] } else { vec!["update".to_owned(), "message".to_owned()] };
    let following = Following { kind, events: wanted, gap: Duration::ZERO, idle_timeout: Duration::from_secs(1) };
    let bytes_max = if plan[0] & 4 == 0 { BYTES_MAX } else { usize::MAX };
    let whole = heard(&following, bytes_max, wire, &[usize::MAX]);
    let sizes = [usize::from(plan[1] % 32) + 1, usize::from(plan[2] % 32) + 1];
    for sizes in [&sizes[..], &[1]] {
        let cut = heard(&following, bytes_max, wire, sizes);
        // Of what came together with what is refused nothing is taken.
        assert_eq!(cut.is_some(), whole.is_some(), "in pieces of {sizes:?}");
        assert!(whole.is_none() || cut == whole, "in pieces of {sizes:?}: {cut:?}, {whole:?} else");
    }
    if let (Some(heard), true) = (&whole, bytes_max == usize::MAX) {
        let plain = match kind {
            Kind::Sse => events(wire, &following.events),
            Kind::Ndjson => lines(wire),
        };
        assert_eq!((&heard.0, &heard.1), (&plain.0, &plain.1), "a plain reader finds another");
    }
});

/// The last value, the id to go on from, and how long the upstream wants to be left alone.
type Heard = (Option<Vec<u8>>, String, Option<Duration>);

/// What is known in the end; `None`: it was refused.
fn heard(following: &Following, bytes_max: usize, wire: &[u8], sizes: &[usize]) -> Option<Heard> {
    let mut events = Events::new(following, bytes_max as u64);
    let (mut rest, mut newest) = (wire, None);
    for size in sizes.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (piece, after) = rest.split_at_checked(*size).unwrap_or((rest, &[]));
        let came = events.feed(piece).ok()?;
        if let Some(Newest { data, id }) = came {
            assert!(!data.is_empty() && data.len() <= bytes_max);
            assert_eq!(id.as_deref().unwrap_or_default(), events.last_id());
            newest = Some(data);
        }
        rest = after;
    }
    Some((newest, events.last_id().to_owned(), events.retry()))
}

/// WHATWG HTML section 9.2.6, read at once: lines, then fields.
fn events(wire: &[u8], wanted: &[String]) -> (Option<Vec<u8>>, String) {
    let wire = wire.strip_prefix(b"\xef\xbb\xbf").unwrap_or(wire);
    let text = String::from_utf8_lossy(wire).replace("\r\n", "\n").replace('\r', "\n");
    let (mut name, mut data, mut newest) = (String::new(), Vec::new(), None);
    // An id is taken with the end of its event, with data or without.
    let (mut arriving, mut last_id) = (String::new(), String::new());
    let mut lines: Vec<&str> = text.split('\n').collect();
    // What has no end yet is no line.
    lines.pop();
    for line in lines {
        if line.is_empty() {
            let kind = if name.is_empty() { "message" } else { &name };
            let joined = data.join("\n");
            if !joined.is_empty() && (wanted.is_empty() || wanted.iter().any(|wanted| wanted == kind)) {
                newest = Some(joined.into_bytes());
            }
            last_id.clone_from(&arriving);
            data.clear();
            name.clear();
            continue;
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => name = value.to_owned(),
            "data" => data.push(value),
            "id" if !value.contains('\0') => arriving = value.to_owned(),
            _ => {}
        }
    }
    (newest, last_id)
}

fn lines(wire: &[u8]) -> (Option<Vec<u8>>, String) {
    let mut lines: Vec<&[u8]> = wire.split(|byte| *byte == b'\n').collect();
    lines.pop();
    let last = lines.into_iter().rev().find(|line| !line.trim_ascii().is_empty());
    (last.map(<[u8]>::to_vec), String::new())
}
