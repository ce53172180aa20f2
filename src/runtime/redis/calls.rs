//! The link for calls: commands of which a thread of this process waits for the answers. A reply may have megabytes, behind
//! which no login should wait; so it is a link of its own, with one call at a time.
//!
//! Source: <https://redis.io/docs/latest/commands/>. Memory: the calls that wait, bounded by [`limits::STORE_CALLS_MAX`]; the
//! replies of the one under way, each bounded by its lines in `limits`. Errors: [`CallError`].
//! Not here: what is asked and what the answers mean (`runtime::shared_keys`).

use std::collections::VecDeque;
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use rustix::event::PollFlags;

use super::commands::{Said, judged};
use super::link::{Fault, Io, Link, Turn};
use crate::codec::resp::{Bounds, Reply, error_code, write_command};
use crate::limits;
use crate::metrics::RedisLink;
use crate::time::{Instant, Now};

/// What may be answered on this link.
const BOUNDS: Bounds = Bounds {
    line_bytes_max: limits::REDIS_LINE_BYTES_MAX,
    string_bytes_max: limits::API_KEY_RECORD_BYTES_MAX,
    elements_max: limits::REDIS_ELEMENTS_MAX,
    depth_max: 2,
    reply_bytes_max: limits::API_KEYS_REPLY_BYTES_MAX,
};

/// A command, and what stands behind its name.
pub struct Command {
    /// Its name.
    pub name: &'static str,
    /// Its arguments.
    pub arguments: Vec<Vec<u8>>,
}

/// Why a call has no answer.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum CallError {
    /// Nothing was sent: Redis is away, or too much waits for it.
    #[error("Redis is away")]
    Away,
    /// It was sent and not answered: whether it was done is not known.
    #[error("Redis does not answer")]
    Unanswered,
    /// One of the commands was refused, for this reason.
    #[error("Redis: {0}")]
    Refused(String),
}

/// Who waits for the answers.
pub(super) type Replies = SyncSender<Result<Vec<Reply>, CallError>>;

/// A call that waits for its turn.
pub(super) struct Call {
    pub(super) commands: Vec<Command>,
    pub(super) replies: Replies,
    /// When it must have been sent.
    pub(super) due: Instant,
}

/// The call under way.
struct Flight {
    /// The names of the commands still to be answered.
    names: VecDeque<&'static str>,
    answers: Vec<Reply>,
    refused: Option<String>,
    /// `None`: nobody waits, it is a PING.
    replies: Option<Replies>,
}

pub(super) struct Calls {
    pub(super) link: Link,
    timeout: Duration,
    waiting: VecDeque<Call>,
    flight: Option<Flight>,
    /// When the last command was written,
    written: Instant,
    /// when something last came of its answers,
    heard: Instant,
    /// and how much had come by then.
    received: u64,
    pub(super) said: Vec<Said>,
}

impl Calls {
    pub(super) fn new(timeout: Duration, now: Instant) -> Calls {
        Calls {
            link: Link::new(RedisLink::Calls, BOUNDS, now),
            timeout,
            waiting: VecDeque::new(),
            flight: None,
            written: now,
            heard: now,
            received: 0,
            said: Vec::new(),
        }
    }

    /// Takes a call, which is answered in its time.
    pub(super) fn take(&mut self, call: Call) {
        self.waiting.push_back(call);
    }

    /// How many calls wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Its turn; what became of the link.
    pub(super) fn turn(&mut self, now: Now, ready: PollFlags, io: &mut Io<'_>) -> Vec<Turn> {
        let mut turns = Vec::new();
        let Calls { link, flight, said, .. } = self;
        let turn = link.turn(ready, io, &mut |reply| hear(flight, said, reply));
        self.after(turn, &mut turns);
        let received = self.link.received();
        if received != self.received {
            (self.received, self.heard) = (received, now.at);
        }
        if self.flight.is_some() && now.at >= self.stalled() {
            let turn = self.link.close(Fault::Timeout(self.timeout), io);
            self.after(turn, &mut turns);
        }
        while self.waiting.front().is_some_and(|call| now.at >= call.due || !self.link.is_hopeful()) {
            let Some(call) = self.waiting.pop_front() else { break };
            answer(&call.replies, Err(CallError::Away));
        }
        self.write(now.at);
        let turn = self.link.flush(io);
        self.after(turn, &mut turns);
        turns
    }

    /// What follows from the link's turn.
    pub(super) fn after(&mut self, turn: Turn, turns: &mut Vec<Turn>) {
        if let Turn::Closed(_) = &turn
            && let Some(Flight { replies: Some(replies), .. }) = self.flight.take()
        {
            answer(&replies, Err(CallError::Unanswered));
        }
        if !matches!(turn, Turn::Same) {
            turns.push(turn);
        }
    }

    /// When the answers to the call under way are given up: a long one may take its time as long as it goes on coming.
    fn stalled(&self) -> Instant {
        (self.heard + self.timeout).min(self.written + limits::STORE_CALL_TIME.max(self.timeout))
    }

    pub(super) fn next_timeout(&self) -> Option<Instant> {
        let waiting = self.waiting.front().map(|call| call.due);
        let stalled = self.flight.as_ref().map(|_| self.stalled());
        let idle = self.link.is_ready() && self.flight.is_none();
        let ping = idle.then(|| self.written + limits::REDIS_PING_INTERVAL);
        [waiting, stalled, ping, self.link.next_timeout()].into_iter().flatten().min()
    }

    /// Writes the next call, or asks an idle server whether it lives.
    fn write(&mut self, now: Instant) {
        let Some(out) = self.link.out() else { return };
        if self.flight.is_some() {
            return;
        }
        let (commands, replies) = match self.waiting.pop_front() {
            Some(call) => (call.commands, Some(call.replies)),
            None if now >= self.written + limits::REDIS_PING_INTERVAL => {
                (vec![Command { name: "PING", arguments: Vec::new() }], None)
            }
            None => return,
        };
        for Command { name, arguments } in &commands {
            let parts: Vec<&[u8]> =
                std::iter::once(name.as_bytes()).chain(arguments.iter().map(Vec::as_slice)).collect();
            write_command(out, parts);
        }
        let names = commands.iter().map(|command| command.name).collect();
        self.flight = Some(Flight { names, answers: Vec::new(), refused: None, replies });
        (self.written, self.heard) = (now, now);
    }
}

/// Takes one reply.
fn hear(flight: &mut Option<Flight>, said: &mut Vec<Said>, reply: Reply) -> Result<(), Fault> {
    let now = flight.as_mut().ok_or(Fault::OutOfStep)?;
    let name = now.names.pop_front().ok_or(Fault::OutOfStep)?;
    match reply {
        Reply::Error(line) if now.replies.is_none() && error_code(&line) == "NOPERM" => {}
        Reply::Error(line) => {
            let why = judged(name, &line)?;
            said.push((RedisLink::Calls, why.clone()));
            now.refused.get_or_insert(why);
        }
        reply => now.answers.push(reply),
    }
    if now.names.is_empty()
        && let Some(Flight { answers, refused, replies: Some(replies), .. }) = flight.take()
    {
        answer(&replies, refused.map_or(Ok(answers), |why| Err(CallError::Refused(why))));
    }
    Ok(())
}

/// Answers whoever waits; who does not any more is not waited for.
fn answer(replies: &Replies, outcome: Result<Vec<Reply>, CallError>) {
    let _ = replies.try_send(outcome);
}
