//! The link for the control stream: what was put on it while this process was away is read first, then it is followed.
//!
//! Source: <https://redis.io/docs/latest/commands/xread/>; protocol version 1, section 6.
//! Memory: one page of the stream, bounded by its lines in `limits`. Errors: an entry that is none is counted and passed
//! over. Not here: what an event means (`auth::control`), who writes the stream (`commands`).

use std::time::Duration;

use rustix::event::PollFlags;

use super::commands::Said;
use super::echoes::Echoes;
use super::link::{Fault, Io, Link, Turn};
use super::{CONTROL_STREAM, HEARD, Settings};
use crate::auth::control::{self, ControlEntry};
use crate::codec::resp::{Bounds, Reply, RespError, write_command};
use crate::limits;
use crate::metrics::{RedisEntry, RedisLink, StoreMetrics};
use crate::time::{Instant, Now, WallTime};

/// What may be answered on this link.
const BOUNDS: Bounds = Bounds {
    line_bytes_max: limits::REDIS_LINE_BYTES_MAX,
    string_bytes_max: limits::CONTROL_EVENT_BYTES_MAX,
    elements_max: limits::REDIS_ELEMENTS_MAX,
    depth_max: limits::REDIS_DEPTH_MAX,
    reply_bytes_max: limits::CONTROL_PAGE_BYTES_MAX,
};

/// How many times fewer entries are asked for at once after a page that was too slow.
const SLOWER: u32 = 8;

/// The place of an entry in the stream: milliseconds, and a number among those of one.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct EntryId {
    ms: u64,
    number: u64,
}

impl EntryId {
    /// So far before it that what a server that has taken over knows, or what was taken for an echo, is read again.
    fn before(self, now_ms: u64) -> EntryId {
        EntryId { ms: self.ms.min(now_ms).saturating_sub(whole_ms(limits::CONTROL_OVERLAP)), number: 0 }
    }
}

pub(super) struct Follow {
    pub(super) link: Link,
    timeout: Duration,
    /// The last entry seen.
    last: Option<EntryId>,
    /// When the last question was written, and how long its answer may take.
    asked: Option<(Instant, Duration)>,
    /// Whether everything that stood there when the link was opened has been read.
    caught_up: bool,
    /// Entries to be read at once: fewer until all is read, where so many were too much or too slow.
    page: u32,
    /// Whether what came lately is to be read once more.
    again: bool,
}

impl Follow {
    pub(super) fn new(timeout: Duration, now: Instant) -> Follow {
        Follow {
            link: Link::new(RedisLink::Log, BOUNDS, now),
            timeout,
            last: None,
            asked: None,
            caught_up: false,
            page: limits::CONTROL_PAGE_ENTRIES,
            again: false,
        }
    }

    /// What came lately is read once more, as after a connection was lost.
    pub(super) fn read_again(&mut self) {
        self.again = true;
    }

    /// Whether everything that stands there has been read, and what comes will be.
    pub(super) fn follows(&self) -> bool {
        self.link.is_ready() && self.caught_up
    }

    /// Its turn. What is read is put in `told`, but for `echoes`; while those who hear it have no room (`hold`) nothing more is asked for.
    #[expect(clippy::too_many_arguments, reason = "what the links share is lent for the turn")]
    pub(super) fn turn(
        &mut self,
        now: Now,
        ready: PollFlags,
        hold: bool,
        io: &mut Io<'_>,
        settings: &Settings,
        echoes: &Echoes,
        metrics: &StoreMetrics,
        said: &mut Vec<Said>,
        told: &mut Vec<ControlEntry>,
    ) -> Vec<Turn> {
        let mut turns = Vec::new();
        let Follow { link, last, asked, caught_up, page, .. } = self;
        let turn = link.turn(ready, io, &mut |reply| {
            asked.take().ok_or(Fault::OutOfStep)?;
            let entries = match reply {
                Reply::Nil => {
                    (*caught_up, *page) = (true, limits::CONTROL_PAGE_ENTRIES);
                    return Ok(());
                }
                Reply::Error(line) => return Err(Fault::refused("XREAD", &line)),
                reply => page_of(reply).ok_or(Fault::OutOfStep)?,
            };
            for (at, entry) in entries.into_iter().enumerate() {
                let (id, entry) = match entry_of(entry, now.wall) {
                    Some((id, entry)) if at == 0 || entry != Entry::Cut => (id, entry),
                    // The page was full before it: it is the next one's.
                    _ if at > 0 => break,
                    _ => return Err(Fault::OutOfStep),
                };
                *last = (*last).max(Some(id));
                match entry {
                    Entry::Event { entry, heard } => {
                        metrics.entries.of(RedisEntry::Read).count();
                        let is_echo = heard.is_some_and(|channel| echoes.is_one(&entry, &channel, now.at));
                        if !is_echo {
                            told.push(entry);
                        }
                    }
                    Entry::Bad | Entry::Cut => {
                        metrics.entries.of(RedisEntry::Bad).count();
                        said.push((RedisLink::Log, "an entry of the control stream is no control event".to_owned()));
                    }
                }
            }
            Ok(())
        });
        self.after(turn, now, settings, &mut turns);
        if self.asked.is_some_and(|(asked, patience)| now.at >= asked + patience) {
            let turn = self.link.close(Fault::Timeout(self.timeout), io);
            self.after(turn, now, settings, &mut turns);
        }
        if self.asked.is_none() && !hold {
            self.ask(now);
        }
        let turn = self.link.flush(io);
        self.after(turn, now, settings, &mut turns);
        turns
    }

    /// What follows from the link's turn.
    pub(super) fn after(&mut self, turn: Turn, now: Now, settings: &Settings, turns: &mut Vec<Turn>) {
        match &turn {
            Turn::Same => return,
            Turn::Opened => {
                let now_ms = now.wall.as_micros() / 1000;
                let kept = now_ms.saturating_sub(whole_ms(settings.revocation_keep));
                // Before the last one seen there may be what a server that took over has got since: see `CONTROL_OVERLAP`.
                let seen = self.last.map_or(0, |last| last.before(now_ms).ms);
                self.last = Some(EntryId { ms: seen.max(kept), number: 0 });
                (self.asked, self.caught_up, self.again) = (None, false, false);
            }
            Turn::Closed(fault) => {
                (self.asked, self.caught_up) = (None, false);
                match fault {
                    // One page of what somebody put there is too much: it is read entry by entry.
                    Fault::Garbage(RespError::TooManyElements { .. } | RespError::TooLarge { .. }) => self.page = 1,
                    // Or it takes longer than an answer may: the same page would do so again.
                    Fault::Timeout(_) => self.page = (self.page / SLOWER).max(1),
                    _ => {}
                }
            }
        }
        turns.push(turn);
    }

    pub(super) fn next_timeout(&self) -> Option<Instant> {
        let answer = self.asked.map(|(asked, patience)| asked + patience);
        [answer, self.link.next_timeout()].into_iter().flatten().min()
    }

    /// Asks for the next page; once all is read, for what comes.
    fn ask(&mut self, now: Now) {
        if self.link.is_ready() && std::mem::take(&mut self.again) {
            self.last = self.last.map(|last| last.before(now.wall.as_micros() / 1000));
            self.caught_up = false;
        }
        let EntryId { ms, number } = self.last.unwrap_or(EntryId { ms: 0, number: 0 });
        let (count, block) = (self.page.to_string(), limits::REDIS_BLOCK.as_millis().to_string());
        let (from, waits) = (format!("{ms}-{number}"), self.caught_up);
        let Some(out) = self.link.out() else { return };
        let mut parts: Vec<&[u8]> = vec![b"XREAD", b"COUNT", count.as_bytes()];
        if waits {
            parts.extend([b"BLOCK".as_slice(), block.as_bytes()]);
        }
        parts.extend([b"STREAMS".as_slice(), CONTROL_STREAM.as_bytes(), from.as_bytes()]);
        write_command(out, parts);
        let patience = if waits { limits::REDIS_BLOCK + self.timeout } else { self.timeout };
        self.asked = Some((now.at, patience));
    }
}

fn whole_ms(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

/// The entries of the one stream that was asked for.
fn page_of(reply: Reply) -> Option<Vec<Reply>> {
    let Reply::Array(streams) = reply else { return None };
    let Some(Reply::Array(stream)) = streams.into_iter().next() else { return None };
    match stream.into_iter().nth(1) {
        Some(Reply::Array(entries)) => Some(entries),
        _ => None,
    }
}

/// What an entry says.
#[derive(Debug, Eq, PartialEq)]
enum Entry {
    Event {
        entry: ControlEntry,
        /// The channel on which a process has heard it, where it has; it is dated by when that did.
        heard: Option<String>,
    },
    /// No event, or one that is too long.
    Bad,
    /// Something of it was not kept because the page was full.
    Cut,
}

/// An entry's place, and what it says. `None`: not even its place can be told.
fn entry_of(reply: Reply, now: WallTime) -> Option<(EntryId, Entry)> {
    let Reply::Array(parts) = reply else { return None };
    let mut parts = parts.into_iter();
    let Some(Reply::String(id)) = parts.next() else { return None };
    let id = id_of(&id)?;
    let Some(Reply::Array(fields)) = parts.next() else { return Some((id, Entry::Bad)) };
    let fits = |bytes: u64| usize::try_from(bytes).is_ok_and(|bytes| bytes <= BOUNDS.string_bytes_max);
    if fields.iter().any(|field| matches!(field, Reply::TooLong(bytes) if fits(*bytes))) {
        return Some((id, Entry::Cut));
    }
    Some((id, event_of(id, &fields, now).unwrap_or(Entry::Bad)))
}

fn id_of(text: &[u8]) -> Option<EntryId> {
    let (ms, number) = std::str::from_utf8(text).ok()?.split_once('-')?;
    Some(EntryId { ms: ms.parse().ok()?, number: number.parse().ok()? })
}

fn event_of(id: EntryId, fields: &[Reply], now: WallTime) -> Option<Entry> {
    let (pairs, _) = fields.as_chunks::<2>();
    let field = |wanted: &[u8]| {
        pairs.iter().find_map(|[name, value]| match (name, value) {
            (Reply::String(name), Reply::String(value)) if name == wanted => Some(value.as_slice()),
            _ => None,
        })
    };
    let text = |wanted: &[u8]| field(wanted).and_then(|value| std::str::from_utf8(value).ok()).map(str::to_owned);
    let at_ms = control::said_ms(field(b"at"), id.ms, now);
    let entry = ControlEntry { event: text(b"event")?, data: text(b"data")?, at_ms };
    Some(Entry::Event { entry, heard: text(HEARD.as_bytes()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: WallTime = WallTime::from_secs(1_700_000_000);

    fn string(text: &str) -> Reply {
        Reply::String(text.into())
    }

    fn entry(id: &str, fields: &[&str]) -> Reply {
        Reply::Array(vec![string(id), Reply::Array(fields.iter().map(|field| string(field)).collect())])
    }

    #[test]
    fn an_entry_is_an_event_with_its_own_time_or_the_entrys() {
        let of = |reply| entry_of(reply, NOW).expect("its place is told").1;
        let entry_at = |at_ms| ControlEntry { event: "user-logged-out".into(), data: "u1".into(), at_ms };
        let event = |at_ms| Entry::Event { entry: entry_at(at_ms), heard: None };
        let told = ["event", "user-logged-out", "data", "u1", "at", "17"];
        assert_eq!(of(entry("5-0", &told)), event(17));
        assert_eq!(of(entry("5-0", &told[..4])), event(5));
        let heard = [&told[..], &["heard", "out"]].concat();
        assert_eq!(of(entry("5-0", &heard)), Entry::Event { entry: entry_at(17), heard: Some("out".into()) });
        assert_eq!(of(entry("5-0", &["more", "x", "data", "u1", "event", "user-logged-out"])), event(5));
        assert_eq!(of(entry("5-0", &told[..2])), Entry::Bad, "no payload");
        let soon = ["event", "user-logged-out", "data", "u1", "at", "soon"];
        assert_eq!(of(entry("5-0", &soon)), event(5), "a logout without a time is a logout");
        assert_eq!(of(entry("5-0", &["event"])), Entry::Bad);
        assert_eq!(of(entry("5-0", &[])), Entry::Bad);
        assert_eq!(of(Reply::Array(vec![string("5-1"), Reply::Nil])), Entry::Bad);
        let long = |bytes| {
            let fields = vec![string("event"), string("token-revoked"), string("data"), Reply::TooLong(bytes)];
            entry_of(Reply::Array(vec![string("5-1"), Reply::Array(fields)]), NOW)
        };
        let bound = BOUNDS.string_bytes_max as u64;
        assert_eq!(long(bound + 1), Some((EntryId { ms: 5, number: 1 }, Entry::Bad)), "it never fits");
        assert_eq!(long(bound), Some((EntryId { ms: 5, number: 1 }, Entry::Cut)), "it fits on a page of its own");
        for id in ["", "5", "a-0", "5-", "-5-0"] {
            assert_eq!(entry_of(entry(id, &told), NOW), None, "{id}");
        }
        assert_eq!(entry_of(Reply::Array(vec![Reply::TooLong(9), Reply::Nil]), NOW), None);
    }

    #[test]
    fn places_are_ordered_by_time_and_then_by_number() {
        let ids = ["1-9", "1-10", "2-0", "10-0"].map(|text| id_of(text.as_bytes()).expect("an id"));
        assert!(ids.is_sorted());
    }
}
