//! One upstream resource: polled once, compared, and kept as a log of events.
//!
//! Source: protocol version 1, section 3. Memory: the newest value with its token tape, and the history's bounds.
//! Errors: a poll that brings no value is a [`poll::Failure`]; the last good value stays in place.
//! Not here: who watches (`shard`), sockets (`runtime::fetch`).

pub mod action;
pub mod apply;
pub mod diff;
pub mod log;
pub mod poll;
pub mod schema;
pub mod template;

use std::sync::Arc;
use std::time::Duration;

use crate::codec::json::{self, Document, Fingerprint};
use crate::ids::{Epoch, StreamId};
use crate::limits;
use crate::secret::Secret;
use crate::time::{Instant, Now, WallTime};

use self::diff::{Change, DiffOptions};
use self::log::{Bounds, Event, History};
use self::poll::{
    Failure, FetchRequest, FetchResult, Judged, PollNo, PollOptions, Poller, Status, Target, UpstreamCode,
};

/// One `[[stream]]` of the configuration, parsed and checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// Its id, and the name in frames where it has no `params`.
    pub id: StreamId,
    /// The upstream's URL, with its placeholders.
    pub url: template::UrlTemplate,
    /// Time from the start of one poll to the start of the next; at least 1 ms.
    pub interval: Duration,
    /// `GET`, `POST`, … (a token, RFC 9110 section 5.6.2, upper case).
    pub method: String,
    /// Static request headers; the values may be secrets and are never shown.
    pub headers: Vec<(String, Secret)>,
    /// The request's body, with its placeholders.
    pub body: Option<template::BodyTemplate>,
    /// Names a caller may fill as `{query.NAME}`, sorted, each with the pattern its value must match, if any.
    pub params: Vec<Param>,
    /// Roots to trust instead of the system's.
    pub ca: Option<CaFile>,
    /// For the TCP and TLS handshakes.
    pub connect_timeout: Duration,
    /// From the request's last byte to the response's first.
    pub first_byte_timeout: Duration,
    /// For the whole exchange.
    pub timeout: Duration,
    /// Bytes of a response body, inflated.
    pub response_bytes_max: u64,
    /// Longest wait between polls that fail.
    pub backoff_max: Duration,
    /// How long polling goes on after the last watcher.
    pub linger: Duration,
    /// Whether polling goes on without watchers.
    pub keep_warm: bool,
    /// Events kept for resume.
    pub history: u32,
    /// Bytes of events kept for resume.
    pub history_bytes: u64,
    /// JSON pointers (RFC 6901) left out of the comparison.
    pub ignore: Vec<diff::Pointer>,
    /// Member by which the objects of an array are matched.
    pub array_key: Option<String>,
    /// Whether a caller without a credential may watch.
    pub allow_anonymous: bool,
    /// Any one of these is needed, where there are some.
    pub roles: Vec<String>,
    /// All of these are needed.
    pub permissions: Vec<String>,
}

/// Work that one comparison may take before it settles for a coarser delta.
const DIFF_WORK_MAX: u64 = 1 << 20;

/// What a poll came to.
#[derive(Debug)]
pub enum Step {
    /// Nobody waits for it.
    Unexpected,
    /// The value is as it was.
    Unchanged,
    /// The value has changed: the event, with its value.
    Changed(Event),
    /// No value.
    Failed(Failure),
    /// The body is too large to be compared on a core: let [`Comparison::run`] run elsewhere, and bring back its result.
    Compare(Comparison),
}

/// A comparison, to be carried out anywhere.
#[derive(Debug)]
pub struct Comparison {
    /// Which stream's: its place on its core.
    pub stream: u32,
    poll: PollNo,
    held: Option<Held>,
    body: Vec<u8>,
    received: WallTime,
    options: Arc<Options>,
}

/// The value held, and the mark of the last body that was a value.
#[derive(Clone, Debug)]
struct Held {
    document: Arc<Document>,
    fingerprint: Fingerprint,
}

/// What a comparison came to.
#[derive(Debug)]
pub struct Compared {
    /// Which stream's: its place on its core.
    pub stream: u32,
    poll: PollNo,
    received: WallTime,
    outcome: Result<(Option<NewValue>, Fingerprint), String>,
}

#[derive(Debug)]
struct NewValue {
    document: Arc<Document>,
    patch: Option<Vec<u8>>,
    merge: Option<Vec<u8>>,
}

impl Comparison {
    /// The same as [`Comparison::run`], where a fault of ours is a body that cannot be used, not a stream without an end.
    pub fn run_guarded(self) -> Compared {
        let (stream, poll, received) = (self.stream, self.poll, self.received);
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.run())).unwrap_or_else(|_| Compared {
            stream,
            poll,
            received,
            outcome: Err("a fault of the server ended the comparison".to_owned()),
        })
    }

    /// Parses the body and compares it with the value held. Takes time in proportion to their sizes.
    pub fn run(self) -> Compared {
        let Comparison { stream, poll, held, body, received, options } = self;
        let fingerprint = json::body_fingerprint(&body);
        if held.as_ref().is_some_and(|held| held.fingerprint == fingerprint) {
            // The same bytes are not parsed again.
            return Compared { stream, poll, received, outcome: Ok((None, fingerprint)) };
        }
        let outcome = Document::parse(&body).map_err(|error| error.to_string()).map(|new| {
            let Some(held) = held else {
                return (Some(NewValue { document: Arc::new(new), patch: None, merge: None }), fingerprint);
            };
            let diff_options = DiffOptions {
                ignore: &options.ignore,
                array_key: options.array_key.as_deref(),
                work_max: DIFF_WORK_MAX,
            };
            match diff::diff(&held.document, &new, &diff_options) {
                Change::Unchanged => (None, fingerprint),
                Change::Changed { patch, merge } => {
                    (Some(NewValue { document: Arc::new(new), patch, merge }), fingerprint)
                }
            }
        });
        Compared { stream, poll, received, outcome }
    }
}

/// A stream on the core that polls it.
#[derive(Debug)]
pub struct Stream {
    target: Arc<Target>,
    poller: Poller,
    held: Option<Held>,
    history: History,
}

impl Stream {
    /// A stream that has not been polled. `seed` is for its phase and jitter; its polls are numbered from behind
    /// `polled`, which no other stream at its place may reach.
    pub fn new(target: Arc<Target>, epoch: Epoch, seed: u64, polled: PollNo) -> Stream {
        let options = &target.options;
        let conditional = matches!(options.method.as_str(), "GET" | "HEAD");
        let poll = PollOptions { interval: options.interval, backoff_max: options.backoff_max, conditional, seed };
        let history = History::new(epoch, Bounds::of(options));
        Stream { poller: Poller::new(poll).numbered_from(polled), target, held: None, history }
    }

    /// Its events.
    pub fn history(&self) -> &History {
        &self.history
    }

    /// Bytes of its events and value.
    pub fn bytes(&self) -> u64 {
        self.history.bytes() + self.tape_bytes()
    }

    /// Of the value held; its text is the newest event's, and counted there.
    fn tape_bytes(&self) -> u64 {
        let tape = |held: &Held| held.document.memory_bytes() - held.document.text().len();
        self.held.as_ref().map_or(0, |held| tape(held) as u64)
    }

    /// Lets go of old events until `bytes` of [`Stream::bytes`] are left; the newest stays.
    pub fn trim_to(&mut self, bytes: u64) {
        self.history.trim_to(bytes.saturating_sub(self.tape_bytes()));
    }

    /// What subscribers are told of its upstream.
    pub fn status(&self, now: Instant) -> Status {
        self.poller.status(now)
    }

    /// The status, once after each change of its state.
    pub fn status_change(&mut self, now: Instant) -> Option<Status> {
        self.poller.status_change(now)
    }

    /// Polls from now on, at once where the upstream's wishes allow it.
    pub fn start(&mut self, now: Instant) {
        self.poller.start(now);
    }

    /// Polls at once, whatever the interval and the back-off say, but not before the upstream's `Retry-After`; once more
    /// after a poll that is under way. Whether a poll follows: none does where it is stopped.
    pub fn poll_now(&mut self, now: Instant) -> bool {
        self.poller.poll_now(now)
    }

    /// Polls no more until it is started again.
    pub fn stop(&mut self) {
        self.poller.stop();
    }

    /// Whether it is polled.
    pub fn is_running(&self) -> bool {
        self.poller.is_running()
    }

    /// When [`Stream::begin`] is to be called.
    pub fn next_due(&self) -> Option<Instant> {
        self.poller.next_due()
    }

    /// The poll that is due: what to ask.
    pub fn begin(&mut self, now: Instant) -> Option<(PollNo, FetchRequest)> {
        let (poll, validators) = self.poller.begin(now)?;
        Some((poll, FetchRequest { target: Arc::clone(&self.target), validators }))
    }

    /// Takes in how a poll went.
    pub fn fetched(&mut self, now: Now, stream: u32, poll: PollNo, result: FetchResult) -> Step {
        match self.poller.fetched(now.at, poll, result) {
            Judged::Unexpected => Step::Unexpected,
            Judged::NotModified => Step::Unchanged,
            Judged::Failed(failure) => Step::Failed(failure),
            Judged::Body { bytes, received } => {
                let held = self.held.clone();
                let options = Arc::clone(&self.target.options);
                let large = bytes.len() > limits::INLINE_DIFF_BYTES_MAX;
                let comparison = Comparison { stream, poll, held, body: bytes, received, options };
                if large { Step::Compare(comparison) } else { self.compared(now, comparison.run()) }
            }
        }
    }

    /// Takes in the result of a comparison.
    pub fn compared(&mut self, now: Now, compared: Compared) -> Step {
        let Compared { poll, received, outcome, .. } = compared;
        let (new, fingerprint) = match outcome {
            Ok(found) => found,
            Err(detail) => {
                let refused = self.poller.refuse(now.at, poll, UpstreamCode::Body, detail);
                return refused.map_or(Step::Unexpected, Step::Failed);
            }
        };
        if !self.poller.accept(now.at, poll) {
            return Step::Unexpected;
        }
        if let Some(held) = &mut self.held {
            held.fingerprint = fingerprint;
        }
        // Where only ignored members differ, the value stays as of the last event: they travel with the next one.
        let Some(NewValue { document, patch, merge }) = new else { return Step::Unchanged };
        let value = Arc::clone(document.text());
        self.held = Some(Held { document, fingerprint });
        self.history.publish(received, value, patch.map(Arc::from), merge.map(Arc::from));
        self.history.newest().map_or(Step::Unchanged, |event| Step::Changed(event.clone()))
    }
}

/// One name of `params`.
#[derive(Clone, Debug)]
pub struct Param {
    /// The NAME of `{query.NAME}`.
    pub name: String,
    /// What a value must match, anywhere in it unless anchored.
    pub pattern: Option<regex_lite::Regex>,
}

impl PartialEq for Param {
    fn eq(&self, other: &Param) -> bool {
        let text = |param: &Param| param.pattern.as_ref().map(|pattern| pattern.as_str().to_owned());
        self.name == other.name && text(self) == text(other)
    }
}

/// A file of PEM certificates, read when the configuration was.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct CaFile {
    /// Where it was read from, for messages.
    pub path: String,
    /// Its contents.
    pub pem: Arc<[u8]>,
}
