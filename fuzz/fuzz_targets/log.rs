//! Operations on a history: its bounds hold, and what it says can be resumed from can. The first three bytes are the
//! bounds, then four bytes are one operation.
#![no_main]

use std::sync::Arc;

use restcast::codec::message::Format;
use restcast::ids::{Epoch, ResumePoint, Seq};
use restcast::stream::log::{Bounds, History, Resume};
use restcast::time::WallTime;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((&[events_max, a, b], operations)) = data.split_first_chunk::<3>() else { return };
    let bounds = Bounds { events_max: u32::from(events_max % 32), bytes_max: u64::from(u16::from_le_bytes([a, b])) };
    let epoch = Epoch::from_random(7);
    let mut history = History::new(epoch, bounds);
    let mut published = 0;
    for operation in operations.chunks_exact(4) {
        let &[kind, value, patch, merge] = operation else { continue };
        let text = |bytes: usize| -> Arc<[u8]> { vec![b'1'; bytes].into() };
        if kind % 8 == 0 {
            let (before, bytes_max) = (history.bytes(), u64::from(value) * 64);
            assert_eq!(history.trim_to(bytes_max), before - history.bytes());
            assert!(history.bytes() <= bytes_max || history.len() <= 1);
        } else {
            let patch = (kind & 8 != 0).then(|| text(patch.into()));
            let merge = (kind & 16 != 0).then(|| text(merge.into()));
            published += 1;
            let seq = history.publish(WallTime::from_secs(published), text(usize::from(value) * 16), patch, merge);
            assert_eq!(seq, Seq(published));
        }
        check(&history, epoch, bounds, published);
    }
});

fn check(history: &History, epoch: Epoch, bounds: Bounds, published: u64) {
    assert_eq!(history.head().unwrap_or_default(), Seq(published));
    assert_eq!(history.value().is_some(), published > 0, "the newest value stays");
    assert!(history.len() <= bounds.events_max.max(1) as usize);
    assert!(history.bytes() <= bounds.bytes_max || history.len() <= 1);
    for kind in [Format::Patch, Format::Merge, Format::Full] {
        let mut usable = false;
        for seq in 0..=published + 1 {
            let resume = history.since(ResumePoint { epoch, seq: Seq(seq) }, kind);
            match resume {
                Resume::Events { first, last } => {
                    usable = true;
                    assert_eq!((first, last), (Seq(seq + 1), Seq(published)));
                    let mut next = first;
                    for event in history.events_from(first) {
                        assert_eq!(event.seq(), next, "no gap");
                        assert!(event.content(kind).is_some(), "what is promised can be sent");
                        next = next.next();
                    }
                    assert_eq!(next, last.next());
                }
                Resume::UpToDate => assert_eq!(seq, published),
                // A place further on is no harder to resume from.
                Resume::Snapshot => assert!(!usable || seq > published),
            }
        }
        let foreign = ResumePoint { epoch: Epoch::from_random(8), seq: Seq(published) };
        assert_eq!(history.since(foreign, kind), Resume::Snapshot);
    }
}
