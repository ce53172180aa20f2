//! What processes ask each other by way of Pub/Sub: to renew a connection of theirs, and for the list of their connections; and
//! what they tell each other: that a hook has come, and what actions have changed.
//!
//! Each process listens to a channel of its own, which its connections' names lead to, and to one of all. A question has a
//! number, the hash of what is asked; its answer comes on the asker's own channel. How many have heard a question is what
//! PUBLISH answers: none means that nobody holds what is asked about. That somebody has says little, for anybody may listen:
//! who is there is known by what each says of itself every few seconds. What is asked and answered is sealed by those who do
//! (`auth::sealed`), and that there is nothing to answer, or that it ends, a process signs (`auth::identity`): so a channel on
//! which anybody may speak can neither be believed too much nor read.
//!
//! Source: <https://redis.io/docs/latest/develop/interact/pubsub/>; ARCHITECTURE.md. Memory: questions under way, at most
//! [`limits::PEER_ASKS_MAX`], with the answers to lists; other processes, at most [`limits::PEERS_MAX`].
//! Errors: a question that cannot be answered is [`Found::Unavailable`]; a message that makes no sense has no effect.
//! Not here: the connections to Redis (`commands`, `events`), what is sealed (`auth::renewal`, `runtime::connections`).

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD as BASE64;
use serde::Deserialize;
use serde_json::json;

use super::Sink;
use super::commands::{Commands, Question};
use crate::auth::identity::{Identity, Statement, has_said, number_of};
use crate::ids::{CoreId, ProcessId, StreamId};
use crate::limits;
use crate::metrics::{RedisResult, StoreMetrics};
use crate::shard::{Found, Lookup, MARK_BYTES, PeerAsk, RefreshMark, Refreshed};
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
    /// A hook has come.
    hook: Option<Hooked>,
    /// Actions have changed what these show: streams' ids, each with the mark of what was filled in.
    refresh: Option<Vec<(String, String)>>,
    /// The number of the question that is answered,
    answer: Option<u64>,
    /// with this, sealed.
    sealed: Option<String>,
    /// It is about to end.
    #[serde(default)]
    bye: bool,
    /// That it ends, or has nothing to answer, in its own name.
    signed: Option<String>,
}

#[derive(Deserialize)]
struct Renew {
    core: u16,
    index: u32,
    sealed: String,
}

#[derive(Deserialize)]
struct Hooked {
    /// To a stream of that id,
    id: String,
    /// this one.
    sealed: String,
}

/// Who waits for an answer.
enum Who {
    Core {
        core: CoreId,
        ask: u64,
        process: ProcessId,
        /// Whether nothing is known of that process.
        doubted: bool,
    },
    List {
        reply: SyncSender<PeerLists>,
        lists: PeerLists,
        /// Those that are known and have not said anything.
        silent: HashSet<ProcessId>,
        /// From when on nobody else is waited for.
        settled: Option<Instant>,
    },
}

struct Asked {
    who: Who,
    /// When it is looked at again,
    due: Instant,
    /// and when it ends.
    until: Instant,
    /// How many answers are to come in all, once that is known.
    awaited: Option<usize>,
    /// How many have come,
    came: usize,
    /// and their bytes.
    bytes: usize,
}

pub(super) struct Peers {
    identity: Identity,
    process: ProcessId,
    timeout: Duration,
    /// Questions under way, by their numbers,
    asked: HashMap<u64, Asked>,
    /// and by when they are due.
    due: BTreeSet<(Instant, u64)>,
    /// Other processes, and when they last said something.
    known: HashMap<ProcessId, Instant>,
    hello_at: Instant,
    /// What others are to poll, told of together,
    refreshed: BTreeSet<Refreshed>,
    /// and not before then.
    refresh_at: Instant,
    /// Since when what others say is heard; `None`: it is not.
    hears: Option<Instant>,
    /// When it was last said in the log that something made no sense.
    nonsense_said: Option<Instant>,
}

impl Peers {
    pub(super) fn new(identity: Identity, timeout: Duration, now: Instant) -> Peers {
        Peers {
            process: identity.process(),
            identity,
            timeout,
            asked: HashMap::new(),
            due: BTreeSet::new(),
            known: HashMap::new(),
            hello_at: now,
            refreshed: BTreeSet::new(),
            refresh_at: now,
            hears: None,
            nonsense_said: None,
        }
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
        let due = question.due(self.timeout);
        let Question { core, ask, lookup, .. } = question;
        let Lookup::Renew { process, core: its_core, index, sealed } = lookup else { return };
        let no = number_of_renewal(its_core.0, index, &sealed);
        if !self.may_ask(no) {
            metrics.questions.of(RedisResult::Away).count();
            return sink.found(core, ask, Found::Unavailable);
        }
        let renew = json!({ "core": its_core.0, "index": index, "sealed": BASE64.encode(sealed) });
        self.begin(no, Who::Core { core, ask, process, doubted: false }, due);
        let message = json!({ "from": self.process.to_string(), "ask": no, "renew": renew });
        commands.publish(channel_of(process), message.to_string().into_bytes(), Some(no));
    }

    /// Asks all other processes for a list.
    pub(super) fn list(&mut self, sealed: &[u8], reply: SyncSender<PeerLists>, now: Instant, commands: &mut Commands) {
        let lists = PeerLists { unanswered: self.known.keys().copied().collect(), ..PeerLists::default() };
        let no = number_of(&[sealed]);
        if !self.may_ask(no) {
            // Whoever has asked may have gone.
            return drop(reply.try_send(lists));
        }
        let silent = lists.unanswered.iter().copied().collect();
        self.begin(no, Who::List { reply, lists, silent, settled: None }, now + self.timeout);
        let message = json!({ "from": self.process.to_string(), "ask": no, "list": BASE64.encode(sealed) });
        commands.publish(EVERYBODY.to_owned(), message.to_string().into_bytes(), Some(no));
    }

    fn may_ask(&self, no: u64) -> bool {
        self.hears.is_some() && self.asked.len() < limits::PEER_ASKS_MAX && !self.asked.contains_key(&no)
    }

    fn begin(&mut self, no: u64, who: Who, due: Instant) {
        self.due.insert((due, no));
        self.asked.insert(no, Asked { who, due, until: due, awaited: None, came: 0, bytes: 0 });
    }

    /// Has a question looked at again then.
    fn put_off(&mut self, no: u64, due: Instant) {
        if let Some(asked) = self.asked.get_mut(&no) {
            self.due.remove(&(asked.due, no));
            asked.due = due;
            self.due.insert((due, no));
        }
    }

    /// Whether all that are there have had the time to say so.
    fn knows_all(&self, now: Instant) -> bool {
        self.hears.is_some_and(|since| now.since(since) >= limits::PEER_KNOWN_AFTER)
    }

    /// Answers another process.
    pub(super) fn answer(&self, to: PeerAsk, sealed: Option<&[u8]>, commands: &mut Commands) {
        let from = self.process.to_string();
        let message = match sealed {
            Some(sealed) => json!({ "from": from, "answer": to.ask, "sealed": BASE64.encode(sealed) }),
            None => {
                let no = Statement::No { asker: to.process, question: to.ask };
                json!({ "from": from, "answer": to.ask, "signed": BASE64.encode(self.identity.sign(no)) })
            }
        };
        commands.publish(channel_of(to.process), message.to_string().into_bytes(), None);
    }

    /// Tells all other processes that a hook has come.
    pub(super) fn hooked(&self, id: &StreamId, sealed: &[u8], commands: &mut Commands) {
        let hook = json!({ "id": id.as_str(), "sealed": BASE64.encode(sealed) });
        let message = json!({ "from": self.process.to_string(), "hook": hook });
        commands.publish(EVERYBODY.to_owned(), message.to_string().into_bytes(), None);
    }

    /// Actions of this process have changed what these show: the others are told so in its next turn, or, where they were told
    /// of others a moment ago, at most [`limits::REFRESH_INTERVAL`] later: they poll no sooner again.
    pub(super) fn refreshed(&mut self, more: BTreeSet<Refreshed>) {
        let room = limits::REFRESHES_TOLD_MAX.saturating_sub(self.refreshed.len());
        self.refreshed.extend(more.into_iter().take(room));
    }

    fn tell_refreshed(&mut self, now: Instant, commands: &mut Commands) {
        if self.refreshed.is_empty() || now < self.refresh_at {
            return;
        }
        self.refresh_at = now + limits::REFRESH_INTERVAL;
        let told = std::mem::take(&mut self.refreshed);
        let told: Vec<(&str, String)> =
            told.iter().map(|Refreshed { id, mark }| (id.as_str(), BASE64.encode(mark))).collect();
        let message = json!({ "from": self.process.to_string(), "refresh": told });
        commands.publish(EVERYBODY.to_owned(), message.to_string().into_bytes(), None);
    }

    /// A question was heard by so many; `None`: by nobody, for it could not be published.
    pub(super) fn published(
        &mut self,
        now: Instant,
        no: u64,
        heard_by: Option<i64>,
        sink: &mut dyn Sink,
        metrics: &StoreMetrics,
    ) {
        let knows_all = self.knows_all(now);
        let Some(asked) = self.asked.get_mut(&no) else { return };
        match (&mut asked.who, heard_by) {
            (_, None) => self.end(no, RedisResult::Away, Found::Unavailable, sink, metrics),
            (Who::Core { process, .. }, Some(..=0)) => {
                // One that was there a moment ago may be connecting again.
                if self.known.contains_key(process) {
                    self.end(no, RedisResult::Away, Found::Unavailable, sink, metrics);
                } else {
                    self.end(no, RedisResult::Answered, Found::Renewed(None), sink, metrics);
                }
            }
            // Somebody has heard it who may be anybody: a process that is not known is given a moment.
            (Who::Core { process, doubted, .. }, Some(_)) => {
                asked.until = now + limits::PEER_RENEWAL_PATIENCE;
                *doubted = knows_all && !self.known.contains_key(process);
                let due = if *doubted { now + limits::PEER_UNKNOWN_PATIENCE } else { asked.until };
                self.put_off(no, due);
            }
            (Who::List { settled, .. }, Some(count)) => {
                // This process has heard it as well.
                asked.awaited = Some(usize::try_from(count).unwrap_or_default().saturating_sub(1));
                *settled = knows_all.then(|| now + limits::PEER_UNKNOWN_PATIENCE);
                if let Some(settled) = *settled {
                    let due = asked.due.min(settled);
                    self.put_off(no, due);
                }
                self.end_whole(now, no, sink, metrics);
            }
        }
    }

    /// Ends a list that all have answered who are there: as many as have heard it, or, for anybody may hear it, all that are
    /// known, once others have had a moment.
    fn end_whole(&mut self, now: Instant, no: u64, sink: &mut dyn Sink, metrics: &StoreMetrics) {
        let Some(Asked { who: Who::List { silent, settled, .. }, awaited, came, .. }) = self.asked.get(&no) else {
            return;
        };
        let all = awaited.is_some_and(|awaited| *came >= awaited);
        let known = settled.is_some_and(|settled| now >= settled);
        if all || known && silent.is_empty() {
            self.end(no, RedisResult::Answered, Found::Unavailable, sink, metrics);
        }
    }

    fn end(&mut self, no: u64, result: RedisResult, found: Found, sink: &mut dyn Sink, metrics: &StoreMetrics) {
        let Some(asked) = self.asked.remove(&no) else { return };
        self.due.remove(&(asked.due, no));
        metrics.questions.of(result).count();
        match asked.who {
            Who::Core { core, ask, .. } => sink.found(core, ask, found),
            Who::List { reply, mut lists, .. } => {
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
        if hears && self.hears.is_none() {
            // Nobody could be heard meanwhile: they are believed to be there for as long again.
            self.known.values_mut().for_each(|heard| *heard = now);
            self.hello_at = now;
        }
        self.hears = hears.then(|| self.hears.unwrap_or(now));
        while let Some(&(due, no)) = self.due.first()
            && now >= due
        {
            self.is_due(now, no, sink, metrics);
        }
        self.tell_refreshed(now, commands);
        if hears && now >= self.hello_at {
            self.known.retain(|_, heard| now.since(*heard) < limits::PEER_HELLO_LIFE);
            self.hello_at = now + limits::PEER_HELLO_INTERVAL;
            let message = json!({ "from": self.process.to_string() });
            commands.publish(EVERYBODY.to_owned(), message.to_string().into_bytes(), None);
        }
    }

    /// A question's time is over, or the moment that those have whom nobody knows.
    fn is_due(&mut self, now: Instant, no: u64, sink: &mut dyn Sink, metrics: &StoreMetrics) {
        match self.asked.get(&no).map(|asked| &asked.who) {
            Some(Who::Core { process, doubted: true, .. }) if !self.known.contains_key(process) => {
                self.end(no, RedisResult::Answered, Found::Renewed(None), sink, metrics);
            }
            Some(Who::List { .. }) => self.end_whole(now, no, sink, metrics),
            _ => {}
        }
        match self.asked.get(&no).map(|asked| asked.until) {
            Some(until) if until > now => self.put_off(no, until),
            _ => self.end(no, RedisResult::Timeout, Found::Unavailable, sink, metrics),
        }
    }

    /// Tells the others that this process ends.
    pub(super) fn say_bye(&self, commands: &mut Commands) {
        let signed = BASE64.encode(self.identity.sign(Statement::Bye));
        let message = json!({ "from": self.process.to_string(), "bye": true, "signed": signed });
        commands.publish(EVERYBODY.to_owned(), message.to_string().into_bytes(), None);
    }

    pub(super) fn next_timeout(&self) -> Option<Instant> {
        let due = self.due.first().map(|(due, _)| *due);
        let refresh = (!self.refreshed.is_empty()).then_some(self.refresh_at);
        [due, refresh, self.hears.map(|_| self.hello_at)].into_iter().flatten().min()
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
        let Ok(signed) = message.signed.map(|signed| BASE64.decode(signed)).transpose() else { return false };
        let says = |statement: Statement| signed.as_deref().is_some_and(|signed| has_said(from, statement, signed));
        if message.bye {
            let gone = says(Statement::Bye);
            if gone {
                self.known.remove(&from);
            }
            return gone;
        }
        if self.known.len() < limits::PEERS_MAX || self.known.contains_key(&from) {
            self.known.insert(from, now);
        }
        match message {
            Message { answer: Some(no), sealed, .. } => {
                let Ok(sealed) = sealed.map(|sealed| BASE64.decode(sealed)).transpose() else { return false };
                // That there is nothing to answer is not sealed: whoever may publish could say so.
                if sealed.is_none() && !says(Statement::No { asker: self.process, question: no }) {
                    return false;
                }
                self.answered(now, no, from, sealed, sink, metrics);
            }
            Message { ask: Some(ask), renew: Some(Renew { core, index, sealed }), .. } => {
                let Ok(sealed) = BASE64.decode(sealed) else { return false };
                // Else one could have it said that this is not here, of a question that asks for something else.
                if ask != number_of_renewal(core, index, &sealed) {
                    return false;
                }
                let ask = PeerAsk { process: from, ask };
                if !sink.renewal(CoreId(core), index, sealed, ask) {
                    self.answer(ask, None, commands);
                }
            }
            Message { ask: Some(ask), list: Some(sealed), .. } => {
                let Ok(sealed) = BASE64.decode(sealed) else { return false };
                if ask != number_of(&[&sealed]) {
                    return false;
                }
                sink.list(PeerAsk { process: from, ask }, sealed);
            }
            Message { hook: Some(Hooked { id, sealed }), .. } => {
                let (Some(id), Ok(sealed)) = (StreamId::new(&id), BASE64.decode(sealed)) else { return false };
                if sealed.len() > limits::HOOK_TOLD_BYTES_MAX {
                    return false;
                }
                sink.hook(id, sealed);
            }
            Message { refresh: Some(told), .. } => {
                let Some(refreshed) = read_refreshed(&told) else { return false };
                sink.refresh(refreshed);
            }
            // It is there, and says no more that this version knows of.
            _ => {}
        }
        true
    }

    fn answered(
        &mut self,
        now: Instant,
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
            Who::List { lists, .. } if lists.answers.iter().any(|(process, _)| *process == from) => {}
            Who::List { lists, silent, .. } => {
                let first = silent.remove(&from);
                if !first && lists.unanswered.contains(&from) {
                    return;
                }
                asked.came += 1;
                asked.bytes += sealed.as_ref().map_or(0, Vec::len);
                lists.unanswered.retain(|process| *process != from);
                match sealed.filter(|_| asked.bytes <= limits::PEER_LISTS_BYTES_MAX) {
                    Some(sealed) if lists.answers.len() < limits::PEERS_MAX => lists.answers.push((from, sealed)),
                    _ if lists.unanswered.len() < limits::PEERS_MAX => lists.unanswered.push(from),
                    _ => {}
                }
                self.end_whole(now, no, sink, metrics);
            }
        }
    }
}

fn number_of_renewal(core: u16, index: u32, sealed: &[u8]) -> u64 {
    number_of(&[&core.to_be_bytes(), &index.to_be_bytes(), sealed])
}

/// What another process says was changed; `None`: it makes no sense.
fn read_refreshed(told: &[(String, String)]) -> Option<Vec<Refreshed>> {
    if told.len() > limits::REFRESHES_TOLD_MAX {
        return None;
    }
    let read = |(id, mark): &(String, String)| {
        let mark: [u8; MARK_BYTES] = BASE64.decode(mark).ok()?.try_into().ok()?;
        Some(Refreshed { id: StreamId::new(id)?, mark: RefreshMark::from(mark) })
    };
    told.iter().map(read).collect()
}
