//! `GET /admin/v1/connections`: the live connections of this process, and of all that share its Redis, a page at a time.
//!
//! Pages go by process, core and place. Each process is asked for as much as a page holds from where it begins; what is over
//! comes with the next. Question and answers are sealed under the admin key, which whoever asks has presented: a process that
//! has another one answers nothing, and neither does it to one that has none.
//!
//! Source: protocol version 1, section 6. Memory: a page of each process, at most [`limits::PEER_LISTS_BYTES_MAX`] of others.
//! Errors: problem documents; who has not answered is said in the answer. Not here: how the question gets there (`redis`).

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};

use crate::auth::sealed::{self, Purpose};
use crate::codec::http::{Query, Response};
use crate::codec::message::ErrorCode;
use crate::config::LogLevel;
use crate::ids::{CoreId, ProcessId};
use crate::limits;
use crate::secret::Secret;
use crate::shard::{ConnectionQuery, Listed, ListedConnection, Order, PeerAsk};
use crate::time::{Instant, WallTime};

use super::admin_call::{Call, problem};
use super::core::Process;
use super::mailbox::Message;
use super::redis::PeerLists;
use super::{clock, log};

/// How long the cores of this process may take to tell their connections.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);
/// What an answer may come later than it is due, before it is not waited for any more.
const SLACK: Duration = Duration::from_millis(500);

/// Where a page begins.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
struct Place {
    process: ProcessId,
    core: u16,
    index: u32,
}

/// Which connections are asked for.
#[derive(Clone, Debug, PartialEq)]
struct Wanted {
    sub: Option<String>,
    /// From there on.
    first: Option<Place>,
    limit: usize,
}

/// What one process has.
#[derive(Debug, Default)]
struct Part {
    /// Its connections, in their order.
    connections: Vec<(u16, u32, Value)>,
    /// Where it has more, which did not fit.
    more: Option<(u16, u32)>,
}

/// A core is too busy to answer.
#[derive(Debug)]
struct Busy;

impl Place {
    fn parse(text: &str) -> Option<Place> {
        let mut parts = text.split('-');
        let (process, core, index) = (parts.next()?, parts.next()?, parts.next()?);
        let place = Place { process: ProcessId::parse(process)?, core: core.parse().ok()?, index: index.parse().ok()? };
        parts.next().is_none().then_some(place)
    }

    fn text(self) -> String {
        format!("{}-{}-{}", self.process, self.core, self.index)
    }
}

impl Wanted {
    /// What is asked of others at that time.
    fn text(&self, at: WallTime) -> String {
        let first = self.first.map(Place::text);
        json!({ "sub": self.sub, "first": first, "limit": self.limit, "at": at.as_micros() }).to_string()
    }

    fn read(text: &[u8]) -> Option<(Wanted, WallTime)> {
        let value: Value = serde_json::from_slice(text).ok()?;
        let optional = |name: &str| match value.get(name) {
            None | Some(Value::Null) => Some(None),
            Some(member) => member.as_str().map(Some),
        };
        let first = optional("first")?.map(|first| Place::parse(first).ok_or(())).transpose().ok()?;
        let limit = usize::try_from(value.get("limit")?.as_u64()?).ok()?;
        let allowed = (1..=limits::ADMIN_PAGE_MAX).contains(&limit);
        let at = WallTime::from_micros(value.get("at")?.as_u64()?);
        allowed.then_some((Wanted { sub: optional("sub")?.map(str::to_owned), first, limit }, at))
    }

    /// From which of a process's connections on they are wanted; `None`: it has none that are.
    fn first_of(&self, process: ProcessId) -> Option<(u16, u32)> {
        match self.first {
            Some(first) if first.process > process => None,
            Some(first) if first.process == process => Some((first.core, first.index)),
            _ => Some((0, 0)),
        }
    }
}

impl Part {
    fn text(&self) -> String {
        let connections: Vec<Value> =
            self.connections.iter().map(|(core, index, shown)| json!([core, index, shown])).collect();
        json!({ "connections": connections, "more": self.more }).to_string()
    }

    fn read(text: &[u8]) -> Option<Part> {
        let value: Value = serde_json::from_slice(text).ok()?;
        let number = |value: &Value| value.as_u64();
        let place = |core: &Value, index: &Value| {
            Some((u16::try_from(number(core)?).ok()?, u32::try_from(number(index)?).ok()?))
        };
        let mut part = Part::default();
        for connection in value.get("connections")?.as_array()? {
            let [core, index, shown] = connection.as_array()?.as_slice() else { return None };
            let (core, index) = place(core, index)?;
            part.connections.push((core, index, shown.is_object().then(|| shown.clone())?));
        }
        part.more = match value.get("more")? {
            Value::Null => None,
            more => match more.as_array()?.as_slice() {
                [core, index] => Some(place(core, index)?),
                _ => return None,
            },
        };
        Some(part)
    }
}

/// `GET connections?sub=&limit=&after=`.
///
/// # Errors
/// What is wrong with the call, or 503.
pub fn answer(process: &Process, key: Option<&Secret>, call: &Call<'_>) -> Result<Response, Response> {
    let bad = |detail: &str| problem(ErrorCode::BadRequest, detail);
    let mut wanted = Wanted { sub: None, first: None, limit: limits::ADMIN_PAGE_DEFAULT };
    for pair in Query::new(call.query.unwrap_or_default()) {
        let (name, value) = pair.map_err(|error| bad(&format!("the query: {error}")))?;
        match &*name {
            "sub" => wanted.sub = Some(value.into_owned()),
            "limit" => {
                wanted.limit = value
                    .parse()
                    .ok()
                    .filter(|limit| (1..=limits::ADMIN_PAGE_MAX).contains(limit))
                    .ok_or_else(|| bad(&format!("limit is a number from 1 to {}", limits::ADMIN_PAGE_MAX)))?;
            }
            "after" => {
                let place = Place::parse(&value).ok_or_else(|| bad("after is what an earlier page gave as next"))?;
                wanted.first = Some(place);
            }
            _ => {}
        }
    }
    let others = ask_others(process, key, &wanted);
    let own = list_own(process, &wanted, usize::MAX).map_err(|Busy| {
        let detail = "a core is too busy to answer";
        problem(ErrorCode::Overloaded, detail).header("Retry-After", "2")
    })?;
    let mut parts = vec![(process.id, own)];
    // Who has heard a question under a short key could find it out, and with it everything else that it opens.
    let unasked = others.is_none() && process.store.is_some();
    let (mut unanswered, mut complete) = (Vec::new(), !unasked);
    if let Some(Others { key, salt, lists, patience }) = others {
        let lists = lists.recv_timeout(patience).unwrap_or_default();
        (unanswered, complete) = (lists.unanswered, lists.complete);
        for (other, sealed) in lists.answers {
            let opened = sealed::open(key.expose_secret(), Purpose::ListAnswer(salt), &sealed);
            match opened.and_then(|text| Part::read(&text)) {
                Some(part) => parts.push((other, part)),
                None => {
                    unanswered.push(other);
                    complete = false;
                }
            }
        }
    }
    let (connections, next) = page(parts, wanted.limit);
    let unanswered: Vec<String> = unanswered.iter().map(ProcessId::to_string).collect();
    let mut page = json!({
        "connections": connections,
        "next": next.map(Place::text),
        "process": process.id.to_string(),
        "complete": complete,
        "unanswered": unanswered,
    });
    if unasked {
        let least = limits::PEER_KEY_BYTES_MIN;
        page["detail"] = format!("other processes are not asked: `admin.key` has less than {least} bytes").into();
    }
    Ok(Response::new(200).body("application/json", format!("{page}\n").into_bytes()))
}

/// Other processes that have been asked.
struct Others {
    key: Secret,
    salt: [u8; sealed::SALT_BYTES],
    lists: Receiver<PeerLists>,
    patience: Duration,
}

/// The key, where nobody finds it out by what is sealed under it.
fn strong(key: &Secret) -> Option<&Secret> {
    (key.len() >= limits::PEER_KEY_BYTES_MIN).then_some(key)
}

fn ask_others(process: &Process, key: Option<&Secret>, wanted: &Wanted) -> Option<Others> {
    let (store, key) = (process.store.as_ref()?, strong(key?)?.clone());
    // Without random numbers nothing can be sealed: the others have not answered then.
    let (salt, patience) = (super::salt(), store.timeout() + SLACK);
    let Some(salt) = salt else {
        let (_, lists) = sync_channel(1);
        return Some(Others { key, salt: Default::default(), lists, patience });
    };
    is_first(process, salt);
    let question = sealed::seal(key.expose_secret(), Purpose::List, salt, wanted.text(clock::now().wall).as_bytes());
    Some(Others { key, salt, lists: store.list(question), patience })
}

/// What this process has, as far as a page holds it and one more, which says that another page follows.
fn list_own(process: &Process, wanted: &Wanted, bytes_max: usize) -> Result<Part, Busy> {
    let mut part = Part::default();
    let Some((first_core, mut first)) = wanted.first_of(process.id) else { return Ok(part) };
    let until = clock::now().at + ASK_TIMEOUT;
    let mut bytes = 0;
    for (core, mailbox) in process.mailboxes.iter().enumerate().skip(usize::from(first_core)) {
        let core = CoreId(u16::try_from(core).unwrap_or(u16::MAX));
        let mut next = Some(std::mem::take(&mut first));
        while let Some(from) = next {
            let limit = wanted.limit + 1 - part.connections.len();
            let (reply, listed) = sync_channel(1);
            let query = ConnectionQuery { sub: wanted.sub.clone(), first: from, limit };
            mailbox.post(Message::List { query, reply }).map_err(|_| Busy)?;
            let Listed { connections, next: on } = listed.recv_timeout(left(until)).map_err(|_| Busy)?;
            for connection in &connections {
                let shown = shown(connection);
                bytes += shown.to_string().len();
                if bytes > bytes_max {
                    part.more = Some((core.0, connection.id.index));
                    return Ok(part);
                }
                part.connections.push((core.0, connection.id.index, shown));
            }
            if part.connections.len() > wanted.limit {
                return Ok(part);
            }
            next = on;
        }
    }
    Ok(part)
}

fn left(until: Instant) -> Duration {
    until.since(clock::now().at)
}

/// One page of what all processes have, and where the next begins.
fn page(mut parts: Vec<(ProcessId, Part)>, limit: usize) -> (Vec<Value>, Option<Place>) {
    parts.sort_by_key(|(process, _)| *process);
    let mut connections = Vec::new();
    for (process, part) in parts {
        for (core, index, shown) in part.connections {
            if connections.len() == limit {
                return (connections, Some(Place { process, core, index }));
            }
            connections.push(shown);
        }
        // What it has beyond stands before what those behind it have.
        if let Some((core, index)) = part.more {
            return (connections, Some(Place { process, core, index }));
        }
    }
    (connections, None)
}

fn shown(connection: &ListedConnection) -> Value {
    let mut streams: Vec<&str> = connection.streams.iter().map(|name| &**name).collect();
    let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
    let others = text(&connection.sub) + text(&connection.issuer);
    let mut bytes = others + streams.iter().map(|name| name.len()).sum::<usize>();
    while bytes > limits::PEER_LISTED_BYTES_MAX
        && let Some(last) = streams.pop()
    {
        bytes -= last.len();
    }
    json!({
        "connection": connection.id.to_string(),
        "process": connection.id.process.to_string(),
        "sub": connection.sub,
        "iss": connection.issuer,
        "type": connection.kind,
        "transport": connection.transport,
        "streams": streams,
        "subscriptions": connection.subscriptions,
        "since": connection.since.as_micros(),
        "expires_at": connection.expires_at.map(crate::time::WallTime::as_micros),
    })
}

/// Lists that other processes ask for, on their way to the thread that makes them.
pub struct PeerListings {
    asks: SyncSender<(PeerAsk, Vec<u8>)>,
}

impl PeerListings {
    /// Starts the thread, which ends when this is dropped. `key` tells the admin key, as it is then.
    ///
    /// # Errors
    /// Where the system has no thread left.
    pub fn start(
        process: Arc<Process>,
        key: impl Fn() -> Option<Secret> + Send + 'static,
    ) -> std::io::Result<PeerListings> {
        let (asks, asked) = sync_channel::<(PeerAsk, Vec<u8>)>(limits::PEER_LISTS_MAX);
        std::thread::Builder::new().name("peer-lists".into()).spawn(move || {
            while let Ok((ask, sealed)) = asked.recv() {
                let make = || list_for_other(&process, key(), &sealed);
                let made = std::panic::catch_unwind(std::panic::AssertUnwindSafe(make));
                let answer = match made {
                    Ok(Ok(Answered::Sealed(answer))) => Some(answer),
                    Ok(Ok(Answered::No)) => None,
                    Ok(Ok(Answered::Before)) => continue,
                    // It has not answered, which it says itself.
                    Ok(Err(Busy)) => continue,
                    Err(_) => {
                        let sentence = "A fault of the server has ended a list for another process.";
                        log::write(LogLevel::Error, &[], sentence);
                        continue;
                    }
                };
                if let Some(store) = &process.store {
                    store.order(Order::Answer { to: ask, sealed: answer });
                }
            }
        })?;
        Ok(PeerListings { asks })
    }

    /// Has a list made, unless too many wait for theirs.
    pub fn ask(&self, ask: PeerAsk, sealed: Vec<u8>) {
        drop(self.asks.try_send((ask, sealed)));
    }
}

/// Whether that question was neither asked nor answered by this process.
fn is_first(process: &Process, salt: [u8; sealed::SALT_BYTES]) -> bool {
    let mut heard = process.lists_heard.lock().unwrap_or_else(PoisonError::into_inner);
    heard.is_first(salt, clock::now().at)
}

/// What another process is answered to a list.
enum Answered {
    /// This, sealed.
    Sealed(Vec<u8>),
    /// That it is not told: it does not have this one's admin key, or its clock is wrong.
    No,
    /// Nothing: that question was answered before, so it is somebody's who has listened.
    Before,
}

/// The list that another process asks for.
fn list_for_other(process: &Process, key: Option<Secret>, question: &[u8]) -> Result<Answered, Busy> {
    let Some(key) = key.as_ref().and_then(strong) else { return Ok(Answered::No) };
    let opened = sealed::open(key.expose_secret(), Purpose::List, question);
    let (Some((wanted, at)), Some(asked)) = (opened.and_then(|text| Wanted::read(&text)), sealed::salt(question))
    else {
        return Ok(Answered::No);
    };
    if !sealed::is_of(at, clock::now().wall) {
        return Ok(Answered::No);
    }
    if !is_first(process, asked) {
        return Ok(Answered::Before);
    }
    let part = list_own(process, &wanted, limits::PEER_LIST_BYTES_MAX)?;
    let Some(salt) = super::salt() else { return Err(Busy) };
    let sealed = sealed::seal(key.expose_secret(), Purpose::ListAnswer(asked), salt, part.text().as_bytes());
    Ok(Answered::Sealed(sealed))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(connections: &[(u16, u32)], more: Option<(u16, u32)>) -> Part {
        let connections = connections.iter().map(|&(core, index)| (core, index, json!({ "at": [core, index] })));
        Part { connections: connections.collect(), more }
    }

    fn place(process: u64, core: u16, index: u32) -> Place {
        Place { process: ProcessId(process), core, index }
    }

    #[test]
    fn a_page_goes_on_where_the_last_one_ended() {
        let text = "00000000000000ff-1-512";
        assert_eq!(Place::parse(text), Some(place(255, 1, 512)));
        assert_eq!(place(255, 1, 512).text(), text);
        for bad in
            ["", "1", "1-512", "-", "ff-1-2", "00000000000000ff-1", "00000000000000ff-a-1", "00000000000000ff-1-2-3"]
        {
            assert_eq!(Place::parse(bad), None, "{bad}");
        }
        let wanted = Wanted { sub: None, first: Some(place(7, 1, 3)), limit: 1 };
        let firsts = [6, 7, 8].map(|process| wanted.first_of(ProcessId(process)));
        assert_eq!(firsts, [None, Some((1, 3)), Some((0, 0))]);
    }

    #[test]
    fn a_page_is_of_the_first_processes_and_stops_where_one_of_them_has_more_than_it_could_say() {
        let parts = || vec![(ProcessId(9), part(&[(0, 1)], None)), (ProcessId(2), part(&[(0, 5), (1, 0)], None))];
        let (all, next) = page(parts(), 3);
        assert_eq!((all.len(), next), (3, None));
        assert_eq!(all[2]["at"], json!([0, 1]), "the process of the greater name comes last");
        let (two, next) = page(parts(), 2);
        assert_eq!((two.len(), next), (2, Some(place(9, 0, 1))));
        let (one, next) = page(parts(), 1);
        assert_eq!((one.len(), next), (1, Some(place(2, 1, 0))));
        let mut cut = parts();
        cut[1].1.more = Some((1, 4));
        let (some, next) = page(cut, 3);
        assert_eq!((some.len(), next), (2, Some(place(2, 1, 4))));
    }

    #[test]
    fn what_processes_say_reads_back_and_nonsense_is_none() {
        for wanted in [
            Wanted { sub: Some("u1".into()), first: Some(place(1, 2, 3)), limit: 1000 },
            Wanted { sub: None, first: None, limit: 1 },
        ] {
            let at = WallTime::from_secs(7);
            assert_eq!(Wanted::read(wanted.text(at).as_bytes()), Some((wanted, at)));
        }
        let bad = [
            "",
            "[]",
            "{}",
            r#"{"limit":0,"at":7}"#,
            r#"{"limit":1001,"at":7}"#,
            r#"{"limit":1,"first":"x","at":7}"#,
            r#"{"limit":1,"sub":1,"at":7}"#,
            r#"{"limit":1}"#,
        ];
        for bad in bad {
            assert_eq!(Wanted::read(bad.as_bytes()), None, "{bad}");
        }
        let read = Part::read(part(&[(0, 5), (1, 0)], Some((2, 7))).text().as_bytes()).expect("a part");
        assert_eq!((read.connections.len(), read.more), (2, Some((2, 7))));
        let bad = [
            "",
            "{}",
            r#"{"connections":[]}"#,
            r#"{"connections":[[0,1]],"more":null}"#,
            r#"{"connections":[[0,1,2]],"more":null}"#,
            r#"{"connections":[[70000,1,{}]],"more":null}"#,
            r#"{"connections":[],"more":[1]}"#,
        ];
        for bad in bad {
            assert!(Part::read(bad.as_bytes()).is_none(), "{bad}");
        }
    }

    #[test]
    fn the_streams_of_a_connection_are_left_out_where_they_are_too_long_for_a_message() {
        let long: Arc<str> = "s".repeat(limits::PEER_LISTED_BYTES_MAX / 2).into();
        let connection = ListedConnection {
            id: crate::ids::ConnectionId { random: 1, process: ProcessId(1), core: CoreId(0), index: 0 },
            sub: Some("u1".into()),
            issuer: None,
            kind: "jwt",
            transport: "ws",
            streams: vec!["leads".into(), Arc::clone(&long), long],
            subscriptions: 3,
            since: crate::time::WallTime::from_secs(1),
            expires_at: None,
        };
        let shown = shown(&connection);
        assert_eq!(shown["streams"].as_array().map(Vec::len), Some(2));
        assert_eq!(shown["subscriptions"], 3);
        assert_eq!(shown["process"], "0000000000000001");
    }
}
