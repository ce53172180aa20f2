//! What processes ask each other by way of Pub/Sub: to renew a connection of theirs, and for the list of their connections.
//!
//! Each process listens to a channel of its own, which its connections' names lead to, and to one of all. A question has a
//! number; its answer comes on the asker's own channel. How many have heard a question is what PUBLISH answers: who asks knows
//! when nobody holds what it asks about, and when all have answered. What is said is sealed by those who ask and answer, so
//! that a channel on which anybody may speak can neither be believed too much nor read (`auth::sealed`).
//!
//! Source: <https://redis.io/docs/latest/develop/interact/pubsub/>; ARCHITECTURE.md. Memory: questions under way, at most
//! [`limits::PEER_ASKS_MAX`], with the answers to lists; other processes, at most [`limits::PEERS_MAX`].
//! Errors: a question that cannot be answered is [`Found::Unavailable`]; a message that makes no sense has no effect.
//! Not here: the connections to Redis (`commands`, `events`), what is sealed (`auth::renewal`, `runtime::connections`).

use std::collections::{BTreeMap, HashMap};
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD as BASE64;
use serde::Deserialize;
use serde_json::json;

use super::Sink;
use super::commands::{Commands, Question};
use crate::ids::{CoreId, ProcessId};
use crate::limits;
use crate::metrics::{RedisResult, StoreMetrics};
use crate::shard::{Found, Lookup, PeerAsk};
use crate::time::Instant;

/// The channel that all processes listen to.
pub(super) const EVERYBODY: &str = "restcast:processes";

/// The channel that a process alone listens to.
pub(super) fn channel_of(process: ProcessId) -> String {
    format!("restcast:process:{process}")
}

/// What other processes have answered to a list.
#[derive(Debug, Default)]
pub struct PeerLists {
    /// The answers, sealed, each with its process.
    pub answers: Vec<(ProcessId, Vec<u8>)>,
    /// Those that are known to be there and have not answered, or would not.
    pub unanswered: Vec<ProcessId>,
    /// Whether all that are there have answered.
    pub complete: bool,
}

/// A message on one of the channels.
#[derive(Deserialize)]
struct Message {
    from: String,
    /// The number of a question,
    ask: Option<u64>,
    /// which is this one,
    renew: Option<Renew>,
    /// or this one, sealed.
    list: Option<String>,
    /// The number of the question that is answered,
    answer: Option<u64>,
    /// with this, sealed.
    sealed: Option<String>,
    /// It is about to end.
    #[serde(default)]
    bye: bool,
}

#[derive(Deserialize)]
struct Renew {
    core: u16,
    index: u32,
    sealed: String,
}

/// Who waits for an answer.
enum Who {
    Core { core: CoreId, ask: u64, process: ProcessId },
    List(SyncSender<PeerLists>, PeerLists),
}

struct Asked {
    who: Who,
    due: Instant,
    /// How many answers are to come in all, once that is known.
    awaited: Option<usize>,
    /// How many have come,
    came: usize,
    /// and their bytes.
    bytes: usize,
}

pub(super) struct Peers {
    process: ProcessId,
    timeout: Duration,
    /// The number of the last question.
    no: u64,
    /// Questions under way, the earliest first.
    asked: BTreeMap<u64, Asked>,
    /// Other processes, and when they last said something.
    known: HashMap<ProcessId, Instant>,
    hello_at: Instant,
    /// Whether what others say is heard.
    hears: bool,
    /// When it was last said in the log that something made no sense.
    nonsense_said: Option<Instant>,
}

impl Peers {
    pub(super) fn new(process: ProcessId, timeout: Duration, now: Instant) -> Peers {
        let (asked, known) = (BTreeMap::new(), HashMap::new());
        Peers { process, timeout, no: 0, asked, known, hello_at: now, hears: false, nonsense_said: None }
    }

    /// How many questions of cores are under way.
    pub(super) fn questions(&self) -> usize {
        self.asked.len()
    }

    /// Asks another process to renew a connection of its own.
    pub(super) fn renew(
        &mut self,
        question: Question,
        commands: &mut Commands,
        sink: &mut dyn Sink,
        metrics: &StoreMetrics,
    ) {
        let Question { core, ask, lookup, due } = question;
        let Lookup::Renew { process, core: its_core, index, sealed } = lookup else { return };
        if !self.hears || self.asked.len() >= limits::PEER_ASKS_MAX {
            metrics.questions.of(RedisResult::Away).count();
            return sink.found(core, ask, Found::Unavailable);
        }
        let renew = json!({ "core": its_core.0, "index": index, "sealed": BASE64.encode(sealed) });
        let no = self.begin(Who::Core { core, ask, process }, due);
        let message = json!({ "from": self.process.to_string(), "ask": no, "renew": renew });
        commands.publish(channel_of(process), message.to_string().into_bytes(), Some(no));
    }

    /// Asks all other processes for a list.
    pub(super) fn list(&mut self, sealed: &[u8], reply: SyncSender<PeerLists>, now: Instant, commands: &mut Commands) {
        let lists = PeerLists { unanswered: self.known.keys().copied().collect(), ..PeerLists::default() };
        if !self.hears || self.asked.len() >= limits::PEER_ASKS_MAX {
            // Whoever has asked may have gone.
            return drop(reply.try_send(lists));
        }
        let no = self.begin(Who::List(reply, lists), now + self.timeout);
        let message = json!({ "from": self.process.to_string(), "ask": no, "list": BASE64.encode(sealed) });
        commands.publish(EVERYBODY.to_owned(), message.to_string().into_bytes(), Some(no));
    }

    fn begin(&mut self, who: Who, due: Instant) -> u64 {
        self.no += 1;
        self.asked.insert(self.no, Asked { who, due, awaited: None, came: 0, bytes: 0 });
        self.no
    }

    /// Answers another process.
    pub(super) fn answer(&self, to: PeerAsk, sealed: Option<&[u8]>, commands: &mut Commands) {
        let sealed = sealed.map(|sealed| BASE64.encode(sealed));
        let message = json!({ "from": self.process.to_string(), "answer": to.ask, "sealed": sealed });
        commands.publish(channel_of(to.process), message.to_string().into_bytes(), None);
    }

    /// A question was heard by so many; `None`: by nobody, for it could not be published.
    pub(super) fn published(&mut self, no: u64, heard_by: Option<i64>, sink: &mut dyn Sink, metrics: &StoreMetrics) {
        let Some(asked) = self.asked.get_mut(&no) else { return };
        match (&asked.who, heard_by) {
            (_, None) => self.end(no, RedisResult::Away, Found::Unavailable, sink, metrics),
            (Who::Core { process, .. }, Some(..=0)) => {
                // One that was there a moment ago may be connecting again.
                if self.known.contains_key(process) {
                    self.end(no, RedisResult::Away, Found::Unavailable, sink, metrics);
                } else {
                    self.end(no, RedisResult::Answered, Found::Renewed(None), sink, metrics);
                }
            }
            (Who::Core { .. }, Some(_)) => {}
            (Who::List(..), Some(count)) => {
                // This process has heard it as well.
                asked.awaited = Some(usize::try_from(count).unwrap_or_default().saturating_sub(1));
                self.end_whole(no, sink, metrics);
            }
        }
    }

    /// Ends a list that all have answered.
    fn end_whole(&mut self, no: u64, sink: &mut dyn Sink, metrics: &StoreMetrics) {
        if self.asked.get(&no).is_some_and(|asked| asked.awaited.is_some_and(|awaited| asked.came >= awaited)) {
            self.end(no, RedisResult::Answered, Found::Unavailable, sink, metrics);
        }
    }

    fn end(&mut self, no: u64, result: RedisResult, found: Found, sink: &mut dyn Sink, metrics: &StoreMetrics) {
        let Some(asked) = self.asked.remove(&no) else { return };
        metrics.questions.of(result).count();
        match asked.who {
            Who::Core { core, ask, .. } => sink.found(core, ask, found),
            Who::List(reply, mut lists) => {
                lists.complete = result == RedisResult::Answered && lists.unanswered.is_empty();
                // Whoever has asked may have gone.
                drop(reply.try_send(lists));
            }
        }
    }

    /// What is due now: questions whose time is over, and to tell the others that this process is there. `hears`: whether
    /// what they say is heard.
    pub(super) fn turn(
        &mut self,
        now: Instant,
        hears: bool,
        commands: &mut Commands,
        sink: &mut dyn Sink,
        metrics: &StoreMetrics,
    ) {
        if hears && !self.hears {
            // Nobody could be heard meanwhile: they are believed to be there for as long again.
            self.known.values_mut().for_each(|heard| *heard = now);
            self.hello_at = now;
        }
        self.hears = hears;
        while let Some((&no, asked)) = self.asked.first_key_value()
            && now >= asked.due
        {
            self.end(no, RedisResult::Timeout, Found::Unavailable, sink, metrics);
        }
        if hears && now >= self.hello_at {
            self.known.retain(|_, heard| now.since(*heard) < limits::PEER_HELLO_LIFE);
            self.hello_at = now + limits::PEER_HELLO_INTERVAL;
            let message = json!({ "from": self.process.to_string() });
            commands.publish(EVERYBODY.to_owned(), message.to_string().into_bytes(), None);
        }
    }

    /// Tells the others that this process ends.
    pub(super) fn say_bye(&self, commands: &mut Commands) {
        let message = json!({ "from": self.process.to_string(), "bye": true });
        commands.publish(EVERYBODY.to_owned(), message.to_string().into_bytes(), None);
    }

    pub(super) fn next_timeout(&self) -> Option<Instant> {
        let due = self.asked.first_key_value().map(|(_, asked)| asked.due);
        [due, self.hears.then_some(self.hello_at)].into_iter().flatten().min()
    }

    /// A message made no sense; whether the log is to say so.
    pub(super) fn nonsense(&mut self, now: Instant) -> bool {
        let news = self.nonsense_said.is_none_or(|said| now.since(said) >= limits::PEER_NOTICE_INTERVAL);
        if news {
            self.nonsense_said = Some(now);
        }
        news
    }

    /// A message came, on the channel of all or on this process's own; whether it made sense.
    pub(super) fn heard(
        &mut self,
        now: Instant,
        text: &[u8],
        commands: &mut Commands,
        sink: &mut dyn Sink,
        metrics: &StoreMetrics,
    ) -> bool {
        let Ok(message) = serde_json::from_slice::<Message>(text) else { return false };
        let Some(from) = ProcessId::parse(&message.from) else { return false };
        if from == self.process {
            return true;
        }
        if message.bye {
            self.known.remove(&from);
            return true;
        }
        if self.known.len() < limits::PEERS_MAX || self.known.contains_key(&from) {
            self.known.insert(from, now);
        }
        match message {
            Message { answer: Some(no), sealed, .. } => match sealed.map(|sealed| BASE64.decode(sealed)).transpose() {
                Ok(sealed) => self.answered(no, from, sealed, sink, metrics),
                Err(_) => return false,
            },
            Message { ask: Some(ask), renew: Some(Renew { core, index, sealed }), .. } => {
                let Ok(sealed) = BASE64.decode(sealed) else { return false };
                let ask = PeerAsk { process: from, ask };
                if !sink.renewal(CoreId(core), index, sealed, ask) {
                    self.answer(ask, None, commands);
                }
            }
            Message { ask: Some(ask), list: Some(sealed), .. } => {
                let Ok(sealed) = BASE64.decode(sealed) else { return false };
                sink.list(PeerAsk { process: from, ask }, sealed);
            }
            // It is there, and says no more that this version knows of.
            _ => {}
        }
        true
    }

    fn answered(
        &mut self,
        no: u64,
        from: ProcessId,
        sealed: Option<Vec<u8>>,
        sink: &mut dyn Sink,
        metrics: &StoreMetrics,
    ) {
        let Some(asked) = self.asked.get_mut(&no) else { return };
        match &mut asked.who {
            Who::Core { process, .. } if *process == from => {
                self.end(no, RedisResult::Answered, Found::Renewed(sealed), sink, metrics);
            }
            Who::Core { .. } => {}
            Who::List(_, lists) if lists.answers.iter().any(|(process, _)| *process == from) => {}
            Who::List(_, lists) => {
                asked.came += 1;
                asked.bytes += sealed.as_ref().map_or(0, Vec::len);
                lists.unanswered.retain(|process| *process != from);
                match sealed.filter(|_| asked.bytes <= limits::PEER_LISTS_BYTES_MAX) {
                    Some(sealed) if lists.answers.len() < limits::PEERS_MAX => lists.answers.push((from, sealed)),
                    _ if lists.unanswered.len() < limits::PEERS_MAX => lists.unanswered.push(from),
                    _ => {}
                }
                self.end_whole(no, sink, metrics);
            }
        }
    }
}
