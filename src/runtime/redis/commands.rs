//! The link for commands: questions of the cores, pipelined, with their answers in order; orders; what goes on the control
//! stream; what is published to other processes.
//!
//! Source: <https://redis.io/docs/latest/commands/> (GET, PTTL, GETDEL, SET, EVAL, PEXPIRE, XADD, PUBLISH, PING); connect-redis for the
//! names of sessions. Memory: questions and orders that wait, each bounded by its line in `limits`; of each question under
//! way what has been answered so far. Errors: a question that cannot be answered is [`Found::Unavailable`].
//! Not here: the connection (`link`), what a record means (`auth`).

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::PollFlags;

use super::ephemerals::{self, Gathering};
use super::link::{Fault, Io, Link, Turn};
use super::{CONTROL_STREAM, HEARD, Settings, Sink};
use crate::auth::control::ControlEntry;
use crate::codec::resp::{Bounds, Reply, error_code, write_command};
use crate::ids::CoreId;
use crate::limits;
use crate::metrics::{RedisEntry, RedisLink, RedisResult, StoreMetrics};
use crate::secret::Secret;
use crate::shard::{EphemeralFound, Found, Lookup, SessionRecord};
use crate::time::{Instant, Now};

/// Before the hash of a ticket in the name of its record.
const TICKET_PREFIX: &str = "restcast:ticket:";
/// What may be answered on this link.
const BOUNDS: Bounds = Bounds {
    line_bytes_max: limits::REDIS_LINE_BYTES_MAX,
    string_bytes_max: limits::STORE_RECORD_BYTES_MAX,
    elements_max: 16,
    depth_max: 2,
    reply_bytes_max: limits::STORE_RECORD_BYTES_MAX,
};

/// A question that a core asks.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) core: CoreId,
    pub(super) ask: u64,
    pub(super) lookup: Lookup,
    /// When it was asked.
    pub(super) asked: Instant,
}

impl Question {
    /// Whether it is about many sessions: nobody waits for those but they for the next look, and they take their time.
    fn is_batch(&self) -> bool {
        matches!(&self.lookup, Lookup::Sessions(sids) if sids.len() > 1)
    }

    /// When it must have been answered.
    pub(super) fn due(&self, timeout: Duration) -> Instant {
        self.asked + if self.is_batch() { timeout.max(limits::STORE_BATCH_TIME) } else { timeout }
    }
}

/// Something about Redis that the operator should hear of, once.
pub(super) type Said = (RedisLink, String);

pub(super) struct Commands {
    pub(super) link: Link,
    timeout: Duration,
    waiting: VecDeque<Question>,
    /// Those about many sessions, which come after all others.
    batches: VecDeque<Question>,
    touches: VecDeque<(Secret, Duration)>,
    /// The server knows no condition of PEXPIRE: it is older than Redis 7.
    touches_plainly: bool,
    appends: Appends,
    publishes: VecDeque<Publish>,
    publish_bytes: usize,
    /// Questions to other processes that were published, and how many have heard each; `None`: it could not be.
    pub(super) published: Vec<(u64, Option<i64>)>,
    flight: VecDeque<Flight>,
    /// When the last command was written,
    written: Instant,
    /// when something last came,
    heard: Instant,
    /// and how much had come by then.
    received: u64,
    metrics: Arc<StoreMetrics>,
    pub(super) said: Vec<Said>,
}

/// Events for the control stream, oldest first. Those under way stay until they are acknowledged.
#[derive(Default)]
struct Appends {
    entries: VecDeque<Append>,
    bytes: usize,
    /// How many of the first are under way.
    sent: usize,
    /// Nothing is sent until then: the server would not take it.
    paused: Option<Instant>,
}

struct Append {
    entry: ControlEntry,
    /// The channel on which it was heard, where it was: others may have heard it there as well.
    heard: Option<Box<str>>,
}

/// A message to other processes.
struct Publish {
    channel: String,
    message: Vec<u8>,
    /// The number of the question, where it is one.
    ask: Option<u64>,
}

/// Commands that are sent together and answered one by one.
struct Flight {
    what: What,
    written: Instant,
    /// Answers to come.
    left: usize,
}

enum What {
    Question {
        core: CoreId,
        ask: u64,
        due: Instant,
        /// About many sessions.
        batch: bool,
        answer: Answer,
        /// It was answered already, as one that cannot be: too late, or refused.
        told: bool,
    },
    Touch,
    Append,
    Publish(Option<u64>),
    Ping,
}

/// An answer as far as it has come.
enum Answer {
    /// `GET` and `PTTL` in turns; the text whose life is to come.
    Sessions {
        records: Vec<Option<SessionRecord>>,
        text: Option<Option<Secret>>,
        /// How long the question had waited when it was written: so much longer than Redis says they live from its asking.
        waited: Duration,
    },
    Taken(Option<Secret>),
    Kept,
    /// What has come, and the answer that it makes.
    Ephemeral(Gathering, Option<EphemeralFound>),
}

impl Commands {
    pub(super) fn new(metrics: Arc<StoreMetrics>, timeout: Duration, now: Instant) -> Commands {
        Commands {
            link: Link::new(RedisLink::Commands, BOUNDS, now),
            timeout,
            waiting: VecDeque::new(),
            batches: VecDeque::new(),
            touches: VecDeque::new(),
            touches_plainly: false,
            appends: Appends::default(),
            publishes: VecDeque::new(),
            publish_bytes: 0,
            published: Vec::new(),
            flight: VecDeque::new(),
            written: now,
            heard: now,
            received: 0,
            metrics,
            said: Vec::new(),
        }
    }

    /// Takes a question, which is answered in its time.
    pub(super) fn ask(&mut self, question: Question) {
        let queue = if question.is_batch() { &mut self.batches } else { &mut self.waiting };
        queue.push_back(question);
    }

    /// A session is to live on.
    pub(super) fn touch(&mut self, sid: Secret, life: Duration) {
        if self.link.is_ready() && self.touches.len() < limits::STORE_TOUCHES_MAX {
            self.touches.push_back((sid, life));
        }
    }

    /// An event is to go on the control stream. `heard`: on that channel, where others may have heard it as well.
    pub(super) fn append(&mut self, entry: ControlEntry, heard: Option<&str>) {
        let append = Append { entry, heard: heard.map(Box::from) };
        self.appends.bytes += size(&append);
        self.appends.entries.push_back(append);
        let mut dropped = 0u64;
        let over = |appends: &Appends| {
            appends.entries.len() > limits::STORE_ENTRIES_MAX || appends.bytes > limits::STORE_ENTRY_BYTES_MAX
        };
        // Those under way are Redis's already.
        while over(&self.appends) && self.appends.entries.len() > self.appends.sent {
            let Some(oldest) = self.appends.entries.remove(self.appends.sent) else { break };
            self.appends.bytes -= size(&oldest);
            dropped += 1;
        }
        if dropped > 0 {
            self.metrics.entries.of(RedisEntry::Dropped).add(dropped);
            self.say(
                "more control events wait for Redis than there is room for: the oldest are lost to other processes",
            );
        }
    }

    /// A message is to go to other processes, at once or not at all.
    pub(super) fn publish(&mut self, channel: String, message: Vec<u8>, ask: Option<u64>) {
        let fits = self.publish_bytes + message.len() <= limits::PEER_QUEUE_BYTES_MAX
            && self.publishes.len() < limits::PEER_MESSAGES_MAX + limits::PEER_ASKS_MAX;
        if self.link.is_ready() && fits {
            self.publish_bytes += message.len();
            self.publishes.push_back(Publish { channel, message, ask });
        } else {
            self.published.extend(ask.map(|ask| (ask, None)));
        }
    }

    /// How many questions wait or are under way.
    pub(super) fn questions(&self) -> usize {
        let under_way = |flight: &&Flight| matches!(flight.what, What::Question { told: false, .. });
        self.waiting.len() + self.batches.len() + self.flight.iter().filter(under_way).count()
    }

    /// How many events wait to be put on the control stream, those under way included.
    pub(super) fn entries(&self) -> usize {
        self.appends.entries.len()
    }

    /// Its turn; `Some`: the link was opened, or closed for that reason.
    pub(super) fn turn(
        &mut self,
        now: Now,
        ready: PollFlags,
        io: &mut Io<'_>,
        settings: &Settings,
        sink: &mut dyn Sink,
    ) -> Vec<Turn> {
        let mut turns = Vec::new();
        let Commands { link, flight, appends, published, metrics, said, touches_plainly, .. } = self;
        let turn = link.turn(ready, io, &mut |reply| {
            let flight = &mut *flight;
            let mut answers = Answers { flight, appends, published, metrics, said, touches_plainly, sink, now: now.at };
            answers.hear(reply)
        });
        self.after(turn, sink, &mut turns);
        let received = self.link.received();
        if received != self.received {
            (self.received, self.heard) = (received, now.at);
        }
        self.expire(now.at, sink);
        if self.stalled().is_some_and(|at| now.at >= at) {
            let turn = self.link.close(Fault::Timeout(self.timeout), io);
            self.after(turn, sink, &mut turns);
        }
        if !self.link.is_hopeful() {
            self.refuse_waiting(sink);
        }
        self.write(now, settings, sink);
        let turn = self.link.flush(io);
        self.after(turn, sink, &mut turns);
        turns
    }

    /// What follows from the link's turn.
    pub(super) fn after(&mut self, turn: Turn, sink: &mut dyn Sink, turns: &mut Vec<Turn>) {
        if let Turn::Closed(fault) = &turn {
            let result = match fault {
                Fault::Timeout(_) => RedisResult::Timeout,
                _ => RedisResult::Refused,
            };
            for flight in self.flight.drain(..) {
                match flight.what {
                    What::Question { core, ask, told: false, .. } => {
                        self.metrics.questions.of(result).count();
                        sink.found(core, ask, Found::Unavailable);
                    }
                    What::Publish(Some(ask)) => self.published.push((ask, None)),
                    _ => {}
                }
            }
            self.published.extend(self.publishes.drain(..).filter_map(|publish| Some((publish.ask?, None))));
            self.publish_bytes = 0;
            // What was under way may have arrived or not: it is sent again, for twice does no harm.
            (self.appends.sent, self.appends.paused) = (0, None);
            self.touches.clear();
            // The next one may be another server's.
            self.touches_plainly = false;
        }
        if !matches!(turn, Turn::Same) {
            turns.push(turn);
        }
    }

    /// When the connection is given up unless something comes: what goes on coming may take its time.
    fn stalled(&self) -> Option<Instant> {
        let written = self.flight.front()?.written;
        let longest = limits::STORE_BATCH_TIME.max(self.timeout);
        Some((written.max(self.heard) + self.timeout).min(written + longest))
    }

    fn refuse_waiting(&mut self, sink: &mut dyn Sink) {
        for question in self.waiting.drain(..).chain(self.batches.drain(..)) {
            self.metrics.questions.of(RedisResult::Away).count();
            sink.found(question.core, question.ask, Found::Unavailable);
        }
    }

    /// Tells those whose time is over.
    fn expire(&mut self, now: Instant, sink: &mut dyn Sink) {
        for queue in [&mut self.waiting, &mut self.batches] {
            while let Some(question) = queue.front()
                && now >= question.due(self.timeout)
            {
                self.metrics.questions.of(RedisResult::Timeout).count();
                sink.found(question.core, question.ask, Found::Unavailable);
                queue.pop_front();
            }
        }
        for flight in &mut self.flight {
            if let What::Question { core, ask, due, told: told @ false, .. } = &mut flight.what
                && now >= *due
            {
                *told = true;
                self.metrics.questions.of(RedisResult::Timeout).count();
                sink.found(*core, *ask, Found::Unavailable);
            }
        }
    }

    pub(super) fn next_timeout(&self) -> Option<Instant> {
        let of_first = |queue: &VecDeque<Question>| queue.front().map(|question| question.due(self.timeout));
        let (waiting, batch) = (of_first(&self.waiting), of_first(&self.batches));
        let stalled = self.stalled();
        let due = self.flight.iter().filter_map(|flight| match flight.what {
            What::Question { due, told: false, .. } => Some(due),
            _ => None,
        });
        let ready = self.link.is_ready();
        let ping = (ready && self.flight.is_empty()).then(|| self.written + limits::REDIS_PING_INTERVAL);
        let paused = self.appends.paused.filter(|_| ready);
        [waiting, batch, stalled, due.min(), ping, paused, self.link.next_timeout()].into_iter().flatten().min()
    }

    /// Writes what may be written now.
    fn write(&mut self, now: Now, settings: &Settings, sink: &mut dyn Sink) {
        let Commands { link, flight, .. } = self;
        let Some(out) = link.out() else { return };
        let has_room = |out: &Vec<u8>, flight: &VecDeque<Flight>| {
            out.len() < limits::STORE_OUT_BYTES_MAX && flight.len() < limits::STORE_FLIGHT_MAX
        };
        let begun = flight.len();
        let fly = |what, left| Flight { what, written: now.at, left };
        let of_batch = |flight: &&Flight| matches!(&flight.what, What::Question { batch: true, .. });
        let mut batches = flight.iter().filter(of_batch).count();
        while has_room(out, flight)
            && let Some(question) = self.waiting.pop_front().or_else(|| {
                let next = if batches < limits::STORE_BATCHES_MAX { self.batches.pop_front() } else { None };
                batches += usize::from(next.is_some());
                next
            })
        {
            let (due, batch) = (question.due(self.timeout), question.is_batch());
            let Question { core, ask, lookup, asked } = question;
            if matches!(&lookup, Lookup::Sessions(sids) if sids.is_empty()) {
                sink.found(core, ask, Found::Sessions(Vec::new()));
                continue;
            }
            if let Some((answer, left)) = write_question(out, lookup, settings, now.at.since(asked)) {
                flight.push_back(fly(What::Question { core, ask, due, batch, answer, told: false }, left));
            }
        }
        while has_room(out, flight)
            && let Some(Publish { channel, message, ask }) = self.publishes.pop_front()
        {
            self.publish_bytes -= message.len();
            write_command(out, [b"PUBLISH".as_slice(), channel.as_bytes(), &message]);
            flight.push_back(fly(What::Publish(ask), 1));
        }
        if self.appends.paused.is_some_and(|until| now.at >= until) {
            self.appends.paused = None;
        }
        while self.appends.paused.is_none()
            && self.appends.sent < limits::STORE_APPENDS_MAX
            && has_room(out, flight)
            && let Some(append) = self.appends.entries.get(self.appends.sent)
        {
            write_append(out, append, now, settings.revocation_keep);
            flight.push_back(fly(What::Append, 1));
            self.appends.sent += 1;
        }
        while has_room(out, flight)
            && let Some((sid, life)) = self.touches.pop_front()
        {
            let key = [settings.session_prefix.as_bytes(), sid.expose_secret()].concat();
            let life = millis(life);
            let mut parts: Vec<&[u8]> = vec![b"PEXPIRE", &key, life.as_bytes()];
            // The application may have given it a longer life since it was read, or one without an end.
            if !self.touches_plainly {
                parts.push(b"GT");
            }
            write_command(out, parts);
            flight.push_back(fly(What::Touch, 1));
        }
        if flight.is_empty() && now.at >= self.written + limits::REDIS_PING_INTERVAL {
            write_command(out, [b"PING".as_slice()]);
            flight.push_back(fly(What::Ping, 1));
        }
        if flight.len() > begun {
            self.written = now.at;
        }
    }

    fn say(&mut self, what: &str) {
        self.said.push((RedisLink::Commands, what.to_owned()));
    }
}

/// Writes a question's commands: what is to be gathered, and how many answers there will be. `None`: it is not for Redis.
fn write_question(out: &mut Vec<u8>, lookup: Lookup, settings: &Settings, waited: Duration) -> Option<(Answer, usize)> {
    match lookup {
        Lookup::Sessions(sids) => {
            for sid in &sids {
                let key = [settings.session_prefix.as_bytes(), sid.expose_secret()].concat();
                write_command(out, [b"GET".as_slice(), &key]);
                write_command(out, [b"PTTL".as_slice(), &key]);
            }
            let records = Vec::with_capacity(sids.len());
            Some((Answer::Sessions { records, text: None, waited }, sids.len() * 2))
        }
        Lookup::TakeTicket(hash) => {
            write_command(out, [b"GETDEL".as_slice(), format!("{TICKET_PREFIX}{hash}").as_bytes()]);
            Some((Answer::Taken(None), 1))
        }
        Lookup::KeepTicket { hash, record, life } => {
            let (key, life) = (format!("{TICKET_PREFIX}{hash}"), millis(life));
            write_command(out, [b"SET".as_slice(), key.as_bytes(), record.expose_secret(), b"PX", life.as_bytes()]);
            Some((Answer::Kept, 1))
        }
        Lookup::Ephemeral(ask) => {
            let (gathering, replies) = ephemerals::write(out, ask);
            Some((Answer::Ephemeral(gathering, None), replies))
        }
        Lookup::KeySet(_) | Lookup::Renew { .. } => None,
    }
}

fn write_append(out: &mut Vec<u8>, Append { entry, heard }: &Append, now: Now, keep: Duration) {
    let from = ((now.wall - keep).as_micros() / 1000).to_string();
    let at = entry.at_ms.to_string();
    let mut parts: Vec<&[u8]> = vec![b"XADD", CONTROL_STREAM.as_bytes(), b"MINID", b"~", from.as_bytes(), b"*"];
    parts.extend([b"event".as_slice(), entry.event.as_bytes(), b"data", entry.data.as_bytes(), b"at", at.as_bytes()]);
    if let Some(channel) = heard {
        parts.extend([HEARD.as_bytes(), channel.as_bytes()]);
    }
    write_command(out, parts);
}

/// A life in milliseconds, at least one: none at all would be an error there.
fn millis(life: Duration) -> String {
    life.as_millis().max(1).to_string()
}

fn size(Append { entry, .. }: &Append) -> usize {
    entry.event.len() + entry.data.len()
}

/// Takes in the answers.
struct Answers<'a> {
    flight: &'a mut VecDeque<Flight>,
    appends: &'a mut Appends,
    published: &'a mut Vec<(u64, Option<i64>)>,
    metrics: &'a StoreMetrics,
    said: &'a mut Vec<Said>,
    touches_plainly: &'a mut bool,
    sink: &'a mut dyn Sink,
    now: Instant,
}

impl Answers<'_> {
    fn hear(&mut self, reply: Reply) -> Result<(), Fault> {
        let first = self.flight.front_mut().ok_or(Fault::OutOfStep)?;
        first.left -= 1;
        let done = first.left == 0;
        match &mut first.what {
            What::Question { core, ask, answer, told, .. } => {
                match gather(answer, reply, done) {
                    Ok(()) => {}
                    Err(NoAnswer::Fault(fault)) => return Err(fault),
                    Err(NoAnswer::Refused(why)) => {
                        if !std::mem::replace(told, true) {
                            self.metrics.questions.of(RedisResult::Refused).count();
                            self.sink.found(*core, *ask, Found::Unavailable);
                        }
                        self.said.push((RedisLink::Commands, why));
                    }
                }
                if done && !*told {
                    self.metrics.questions.of(RedisResult::Answered).count();
                    let found = match answer {
                        Answer::Sessions { records, .. } => Found::Sessions(std::mem::take(records)),
                        Answer::Taken(record) => Found::Ticket(record.take()),
                        Answer::Kept => Found::Kept,
                        Answer::Ephemeral(_, found) => found.take().map_or(Found::Unavailable, Found::Ephemeral),
                    };
                    self.sink.found(*core, *ask, found);
                }
            }
            What::Touch => match reply {
                Reply::Integer(_) => {}
                // Redis 6 counts the arguments. What was not touched will be when it is read next.
                Reply::Error(line) if line.starts_with(b"ERR wrong number of arguments") => {
                    *self.touches_plainly = true;
                }
                Reply::Error(line) => {
                    let why = judged("PEXPIRE", &line)?;
                    self.said.push((RedisLink::Commands, why));
                }
                _ => return Err(Fault::OutOfStep),
            },
            What::Append => match reply {
                Reply::String(_) => {
                    // While one is refused those behind it may be taken: each stands for one, in order of their going.
                    self.appends.sent = self.appends.sent.saturating_sub(1);
                    if let Some(entry) = self.appends.entries.pop_front() {
                        self.appends.bytes -= size(&entry);
                    }
                    self.metrics.entries.of(RedisEntry::Appended).count();
                }
                Reply::Error(line) => {
                    let why = judged("XADD", &line)?;
                    self.said.push((RedisLink::Commands, why));
                    // It is sent again after all others, in a while.
                    self.appends.sent = self.appends.sent.saturating_sub(1);
                    if let Some(entry) = self.appends.entries.pop_front() {
                        self.appends.entries.push_back(entry);
                    }
                    self.appends.paused = Some(self.now + limits::STORE_APPEND_PAUSE);
                }
                _ => return Err(Fault::OutOfStep),
            },
            What::Publish(ask) => {
                let heard_by = match reply {
                    Reply::Integer(count) => Some(count),
                    Reply::Error(line) => {
                        let why = judged("PUBLISH", &line)?;
                        if ask.is_some() {
                            self.said.push((RedisLink::Commands, why));
                        }
                        None
                    }
                    _ => return Err(Fault::OutOfStep),
                };
                self.published.extend(ask.map(|ask| (ask, heard_by)));
            }
            What::Ping => match reply {
                Reply::Simple(_) => {}
                Reply::Error(line) if error_code(&line) == "NOPERM" => {}
                Reply::Error(line) => return Err(Fault::refused("PING", &line)),
                _ => return Err(Fault::OutOfStep),
            },
        }
        if done {
            self.flight.pop_front();
        }
        Ok(())
    }
}

/// Why a question has no answer.
enum NoAnswer {
    /// The connection is of no more use.
    Fault(Fault),
    /// This question alone is refused, for this reason.
    Refused(String),
}

/// Takes one reply into an answer; `last`: no more are to come.
fn gather(answer: &mut Answer, reply: Reply, last: bool) -> Result<(), NoAnswer> {
    let command = match answer {
        Answer::Sessions { text: None, .. } => "GET",
        Answer::Sessions { .. } => "PTTL",
        Answer::Taken(_) => "GETDEL",
        Answer::Kept => "SET",
        Answer::Ephemeral(gathering, _) => ephemerals::command_of(gathering),
    };
    let refused = |line: &[u8]| match judged(command, line) {
        Ok(why) => NoAnswer::Refused(why),
        Err(fault) => NoAnswer::Fault(fault),
    };
    match (answer, reply) {
        (Answer::Sessions { text: text @ None, .. }, reply) => {
            let refusal = match &reply {
                // Something else is kept under that name: no session is.
                Reply::Error(line) if error_code(line) == "WRONGTYPE" => None,
                Reply::Error(line) => Some(refused(line)),
                Reply::String(_) | Reply::TooLong(_) | Reply::Nil => None,
                _ => return Err(NoAnswer::Fault(Fault::OutOfStep)),
            };
            *text = Some(match reply {
                Reply::String(bytes) => Some(Secret::new(bytes)),
                _ => None,
            });
            refusal.map_or(Ok(()), Err)
        }
        (Answer::Sessions { records, text, waited }, reply) => {
            let record = text.take().flatten();
            let (life, refusal) = match &reply {
                Reply::Integer(-1) => (Some(None), None),
                // It has ended between the two answers.
                Reply::Integer(ms) => {
                    (u64::try_from(*ms).ok().map(|ms| Some(Duration::from_millis(ms) + *waited)), None)
                }
                Reply::Error(line) => (None, Some(refused(line))),
                _ => return Err(NoAnswer::Fault(Fault::OutOfStep)),
            };
            records.push(record.zip(life).map(|(text, ttl)| SessionRecord { text, ttl }));
            refusal.map_or(Ok(()), Err)
        }
        (_, Reply::Error(line)) => Err(refused(&line)),
        (Answer::Ephemeral(gathering, found), reply) => {
            *found = ephemerals::gather(gathering, reply, last).map_err(|()| NoAnswer::Fault(Fault::OutOfStep))?;
            Ok(())
        }
        (Answer::Taken(record), Reply::String(bytes)) => {
            *record = Some(Secret::new(bytes));
            Ok(())
        }
        (Answer::Taken(_), Reply::Nil | Reply::TooLong(_)) | (Answer::Kept, Reply::Simple(_)) => Ok(()),
        _ => Err(NoAnswer::Fault(Fault::OutOfStep)),
    }
}

/// Whether an error is of this command alone, in words for the operator, or of the server as it is now: one that is
/// loading, has become a replica, wants another login, has handed the place over.
pub(super) fn judged(command: &'static str, line: &[u8]) -> Result<String, Fault> {
    match error_code(line) {
        "NOAUTH" | "WRONGPASS" | "DENIED" | "LOADING" | "READONLY" | "MASTERDOWN" | "MOVED" | "ASK" | "CLUSTERDOWN"
        | "TRYAGAIN" => Err(Fault::refused(command, line)),
        code => Ok(format!("it refuses {command}: {code}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::PeerAsk;

    /// Who hears nothing.
    struct Deaf;

    impl Sink for Deaf {
        fn found(&mut self, _core: CoreId, _ask: u64, _found: Found) {}
        fn heard(&mut self, _entries: Vec<ControlEntry>) {}
        fn renewal(&mut self, _core: CoreId, _index: u32, _sealed: Vec<u8>, _ask: PeerAsk) -> bool {
            false
        }
        fn list(&mut self, _ask: PeerAsk, _sealed: Vec<u8>) {}
        fn state(&mut self, _up: bool) {}
        fn settle(&mut self) -> bool {
            true
        }
    }

    /// What the replies to as many touches lead to: whether further ones are plain, and what is said.
    fn touched(replies: &[Reply]) -> (bool, Vec<String>) {
        let now = Instant::default();
        let mut commands = Commands::new(Arc::default(), Duration::from_secs(2), now);
        commands.flight.extend(replies.iter().map(|_| Flight { what: What::Touch, written: now, left: 1 }));
        let Commands { flight, appends, published, metrics, said, touches_plainly, .. } = &mut commands;
        let mut answers = Answers { flight, appends, published, metrics, said, touches_plainly, sink: &mut Deaf, now };
        for reply in replies {
            assert!(answers.hear(reply.clone()).is_ok(), "the connection is as good as before: {reply:?}");
        }
        (commands.touches_plainly, commands.said.into_iter().map(|(_, what)| what).collect())
    }

    #[test]
    fn a_server_that_knows_no_condition_of_pexpire_is_told_none() {
        let error = |line: &str| Reply::Error(line.into());
        // Redis 6.2's words.
        let old = error("ERR wrong number of arguments for 'pexpire' command");
        assert_eq!(touched(&[Reply::Integer(0), old]), (true, vec![]));
        let refused = vec!["it refuses PEXPIRE: NOPERM".to_owned()];
        assert_eq!(touched(&[Reply::Integer(1), error("NOPERM this user has no permissions")]), (false, refused));
    }
}
