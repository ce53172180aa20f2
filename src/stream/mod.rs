//! One upstream resource: polled once, compared, and kept as a log of events.
//!
//! Source: protocol version 1, section 3. Memory: the newest value with its token tape; for each of its sequences what that
//! shows of it, and the history's bounds.
//! Errors: a poll that brings no value is a [`poll::Failure`]; the last good value stays in place.
//! Not here: who watches (`shard`), sockets (`runtime::fetch`).

pub mod action;
pub mod apply;
mod breaker;
mod bucket;
pub mod budget;
pub mod credential;
pub mod diff;
pub mod filter;
pub mod follow;
pub mod live;
pub mod log;
pub mod oauth;
pub mod pace;
pub mod poll;
pub mod proxy;
pub mod rest;
pub mod schema;
pub mod select;
pub mod shares;
mod spending;
pub mod succession;
pub mod template;
pub mod view;
mod voice;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::codec::json::{self, Document, Fingerprint};
use crate::codec::proof::{Proof, ValueHash};
use crate::guard::Policy;
use crate::ids::{Epoch, Holder, StreamId};
use crate::limits;
use crate::secret::Secret;
use crate::time::{Instant, Now, WallTime};

use self::diff::{Change, DiffOptions};
use self::filter::{Filter, FilterFault};
use self::log::{Bounds, Event, History};
use self::poll::{
    Failure, FetchRequest, FetchResult, Judged, PollNo, PollOptions, Poller, Status, StreamState, Target, UpstreamCode,
};
use self::select::Facet;
use self::shares::{Claim, Cost, Shares, Tried};
use self::view::{Projection, Shown, View};

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
    /// What lets requests in besides those headers.
    pub credential: credential::Credential,
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
    /// Where polling ended and begins again, polls are so far apart at least, or `interval` where that is less.
    pub restart_min: Duration,
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
    /// What those who may watch get of it, by their roles; none: all of it.
    pub views: Vec<View>,
    /// What its polls go by beside the interval.
    pub pacing: pace::Pacing,
    /// What its upstream speaks, where that is a stream itself.
    pub follow: Option<follow::Following>,
    /// Redirects of one poll that are followed.
    pub redirects_max: u8,
    /// Pages (`Link: rel=next`) that are gathered into one value.
    pub pages_max: u32,
    /// What its hooks may be signed with: any one of these; none: it has no hook.
    pub hook_secrets: Vec<live::Live>,
    /// What its events prove.
    pub proof: Proof,
    /// What makes the value of what the upstream sends.
    pub filter: Option<Filter>,
    /// Who says where it may be polled from, where its URL does not stand in the operator's file.
    pub guard: Option<Arc<Policy>>,
    /// Whoever has described it first, where a caller has.
    pub described_by: Option<Holder>,
}

impl Options {
    /// A stream of which only this much is known; all else is as where the configuration leaves it out, and nobody without a
    /// credential may watch it.
    pub fn new(id: StreamId, url: template::UrlTemplate) -> Options {
        Options {
            id,
            url,
            interval: Duration::from_secs(1),
            method: "GET".to_owned(),
            headers: Vec::new(),
            credential: credential::Credential::default(),
            body: None,
            params: Vec::new(),
            ca: None,
            connect_timeout: Duration::from_secs(3),
            first_byte_timeout: Duration::from_secs(10),
            timeout: Duration::from_secs(15),
            response_bytes_max: 16 << 20,
            backoff_max: Duration::from_secs(60),
            restart_min: poll::RESTART_MIN,
            linger: Duration::from_secs(10),
            keep_warm: false,
            history: 1024,
            history_bytes: 4 << 20,
            ignore: Vec::new(),
            array_key: None,
            allow_anonymous: false,
            roles: Vec::new(),
            permissions: Vec::new(),
            views: Vec::new(),
            pacing: pace::Pacing::default(),
            follow: None,
            redirects_max: 0,
            pages_max: 1,
            hook_secrets: Vec::new(),
            proof: Proof::default(),
            filter: None,
            guard: None,
            described_by: None,
        }
    }

    /// Takes over the secrets of `newer`, which is equal: from now on its requests carry these, and its hooks are signed with
    /// them.
    pub fn take_over(&self, newer: &Options) {
        self.credential.take_over(&newer.credential);
        for (held, new) in self.hook_secrets.iter().zip(&newer.hook_secrets) {
            held.replace(&new.value());
        }
    }
}

/// Work that one comparison may take before it settles for a coarser delta.
const DIFF_WORK_MAX: u64 = 1 << 20;
/// The same of what a caller selects, for each byte of it.
const SELECT_DIFF_WORK_PER_BYTE: u64 = 16;

/// One of a stream's sequences. Not used again in the life of the stream.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct SequenceNo(u32);

/// What a poll came to.
#[derive(Debug)]
pub enum Step {
    /// Nobody waits for it.
    Unexpected,
    /// The value is as it was.
    Unchanged,
    /// The value has changed: the events of those sequences that show it, each with its value. There may be none.
    Changed(Vec<(SequenceNo, Event)>),
    /// No value.
    Failed(Failure),
    /// The body is too large to be compared on a core: let [`Comparison::run`] run elsewhere, and bring back its result.
    Compare(Comparison),
}

/// What brought sequences up to date that were behind.
#[derive(Debug)]
pub enum CaughtUp {
    /// These, each with its event, if that was needed.
    Now(Vec<(SequenceNo, Option<Event>)>),
    /// The value is too large for that to be done on a core: as [`Step::Compare`].
    Compare(Comparison),
}

/// A comparison, to be carried out anywhere.
#[derive(Debug)]
pub struct Comparison {
    /// Which stream's: its place on its core.
    pub stream: u32,
    task: Task,
    base: Option<Base>,
    sequences: Vec<Compares>,
    /// The `select`s that show the value already, beside which others are to be made of it; each with its view.
    selecting: Vec<(Option<u16>, Claim)>,
    options: Arc<Options>,
}

/// What is compared with what sequences show.
#[derive(Debug)]
enum Task {
    /// The body of a poll, its mark where that is known, and what the stream's filter has made of it.
    Poll {
        poll: PollNo,
        body: Vec<u8>,
        fingerprint: Option<Fingerprint>,
        received: WallTime,
        filtered: Option<Result<Vec<u8>, FilterFault>>,
    },
    /// The value that is held, for sequences that are behind.
    CatchUp { number: u64 },
}

/// The newest value, the mark of the last body that was one, and when that came.
#[derive(Clone, Debug)]
struct Base {
    document: Arc<Document>,
    fingerprint: Fingerprint,
    seen: WallTime,
}

/// A sequence, as a comparison needs it.
#[derive(Debug)]
struct Compares {
    no: SequenceNo,
    facet: Facet,
    shown: Option<Arc<Shown>>,
    /// What its `select` claims of the work that those of its view may take together.
    claim: Claim,
    /// What its `select` was last made of.
    ground: Option<Ground>,
}

/// What a `select` is made of: the value, or what a view shows of it. While that stays the same nothing becomes of it that
/// was not there before, so that nobody can tell when what their view hides has changed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Ground {
    value: Fingerprint,
    /// The same without what is ignored.
    compared: Option<Fingerprint>,
    bytes: usize,
}

/// What views leave of one value.
struct Made<'c> {
    document: &'c Arc<Document>,
    options: &'c Options,
    views: Vec<(u16, Result<Shown, Fault>)>,
}

/// What a comparison came to.
#[derive(Debug)]
pub struct Compared {
    /// Which stream's: its place on its core.
    pub stream: u32,
    origin: Origin,
    outcome: Result<Found, (UpstreamCode, String)>,
}

/// What a comparison was made for.
#[derive(Clone, Copy, Debug)]
enum Origin {
    Poll { poll: PollNo, received: WallTime },
    CatchUp { number: u64 },
}

#[derive(Debug)]
struct Found {
    /// The newest value; `None`: it is the one held.
    document: Option<Arc<Document>>,
    fingerprint: Fingerprint,
    /// What the sequences that were compared show now.
    shown: Vec<NowShows>,
}

#[derive(Debug)]
struct NowShows {
    no: SequenceNo,
    /// What it was compared with.
    before: Option<Arc<Shown>>,
    /// `None`: the same.
    new: Result<Option<NewValue>, Fault>,
    /// What its `select` took,
    cost: Cost,
    /// and of what it was made.
    ground: Option<Ground>,
    /// Whether that is what it was made of before, so that nothing was made anew.
    kept: bool,
}

/// Why a sequence cannot be made of a value that others are made of: its own trouble, not the upstream's.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Fault {
    /// What its watchers are told.
    pub code: UpstreamCode,
    /// The same for the log.
    pub detail: String,
}

#[derive(Debug)]
struct NewValue {
    shown: Arc<Shown>,
    patch: Option<Vec<u8>>,
    merge: Option<Vec<u8>>,
    hash: Option<Box<ValueHash>>,
}

impl Compared {
    /// Whether it was made for a poll; otherwise for [`Stream::catch_up`].
    pub fn is_of_poll(&self) -> bool {
        matches!(self.origin, Origin::Poll { .. })
    }
}

impl Comparison {
    /// The same as [`Comparison::run`], where a fault of ours is a body that cannot be used, not a stream without an end.
    pub fn run_guarded(self) -> Compared {
        let (stream, origin) = (self.stream, self.origin());
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.run())).unwrap_or_else(|_| Compared {
            stream,
            origin,
            outcome: Err((UpstreamCode::Body, "a fault of the server ended the comparison".to_owned())),
        })
    }

    /// Lets `run` filter the body, by the stream's filter and to so many bytes at most; nothing where there is no filter, or
    /// where the body is that of the value held.
    pub fn filter(&mut self, run: impl FnOnce(&Filter, &[u8], u64) -> Result<Vec<u8>, FilterFault>) {
        let Comparison { task: Task::Poll { body, fingerprint, filtered, .. }, base, options, .. } = self else {
            return;
        };
        let Some(filter) = &options.filter else { return };
        let mark = *fingerprint.get_or_insert_with(|| json::body_fingerprint(body));
        if base.as_ref().is_none_or(|base| base.fingerprint != mark) {
            *filtered = Some(run(filter, body, options.response_bytes_max));
        }
    }

    /// Whether its body is to be filtered first, which takes a process.
    pub fn is_filtered(&self) -> bool {
        matches!(self.task, Task::Poll { .. }) && self.options.filter.is_some()
    }

    fn origin(&self) -> Origin {
        match self.task {
            Task::Poll { poll, received, .. } => Origin::Poll { poll, received },
            Task::CatchUp { number } => Origin::CatchUp { number },
        }
    }

    /// Parses the body, and compares what it has become for each sequence with what that shows. Takes time in proportion to
    /// their sizes, and paths their own.
    pub fn run(self) -> Compared {
        let (stream, origin) = (self.stream, self.origin());
        Compared { stream, origin, outcome: self.found() }
    }

    /// How many bytes are gone through, about.
    fn work(&self) -> usize {
        let bytes = match &self.task {
            Task::Poll { body, .. } => body.len(),
            Task::CatchUp { .. } => self.base.as_ref().map_or(0, |base| base.document.text().len()),
        };
        let weights = self.sequences.iter().map(|sequence| sequence.facet.weight(&self.options));
        bytes.saturating_mul(1 + weights.sum::<usize>())
    }

    fn found(self) -> Result<Found, (UpstreamCode, String)> {
        let Comparison { task, base, sequences, options, selecting, .. } = self;
        let nothing = |fingerprint| Found { document: None, fingerprint, shown: Vec::new() };
        let (document, fingerprint) = match (&task, &base) {
            (Task::Poll { body, fingerprint, filtered, .. }, _) => {
                let fingerprint = fingerprint.unwrap_or_else(|| json::body_fingerprint(body));
                if base.as_ref().is_some_and(|base| base.fingerprint == fingerprint) {
                    // The same bytes are not parsed again.
                    return Ok(nothing(fingerprint));
                }
                let filtered = match (filtered, &options.filter) {
                    (Some(filtered), _) => filtered.as_deref(),
                    (None, Some(_)) => Err(&FilterFault::Unavailable),
                    (None, None) => Ok(&**body),
                };
                let body = filtered.map_err(|fault| (fault.code(), fault.to_string()))?;
                let parsed = Document::parse(body).map_err(|error| (UpstreamCode::Body, error.to_string()))?;
                (Arc::new(parsed), fingerprint)
            }
            (Task::CatchUp { .. }, Some(base)) => (Arc::clone(&base.document), base.fingerprint),
            (Task::CatchUp { .. }, None) => return Err((UpstreamCode::Body, "there is no value".to_owned())),
        };
        let held = base.as_ref().map(|base| &base.document);
        if matches!(task, Task::Poll { .. })
            && sequences.iter().any(|sequence| !sequence.facet.is_whole())
            && held.is_some_and(|held| diff::is_unchanged(held, &document, &options.ignore))
        {
            return Ok(nothing(fingerprint));
        }
        let is_whole = sequences.iter().any(|sequence| sequence.facet.is_whole());
        let mut shown = Vec::with_capacity(sequences.len());
        let mut made = Made { document: &document, options: &options, views: Vec::new() };
        let (selects, others): (Vec<_>, Vec<_>) =
            sequences.into_iter().partition(|sequence| sequence.facet.select.is_some());
        for sequence in others {
            let (new, _) = sequence.compared_with(&mut made, 0);
            let (no, before, cost) = (sequence.no, sequence.shown, Cost::Unknown);
            shown.push(NowShows { no, before, new, cost, ground: None, kept: false });
        }
        // Those of one view share by what that shows, whatever else there is of the value, and others make of it.
        let mut of_views: BTreeMap<Option<u16>, Vec<Compares>> = BTreeMap::new();
        for sequence in selects {
            of_views.entry(sequence.facet.view).or_default().push(sequence);
        }
        for (view, selects) in of_views {
            let present: Vec<Claim> =
                selecting.iter().filter(|(of, _)| *of == view).map(|(_, claim)| claim.clone()).collect();
            let present = matches!(task, Task::CatchUp { .. }).then_some(present);
            shown.extend(made.selected((view, fingerprint), selects, present));
        }
        // Where only ignored members differ, the value stays as of the last event: they travel with the next one.
        let moved = held.is_none_or(|held| {
            let any = shown.iter().any(|shows| matches!(shows.new, Ok(Some(_))));
            any || (!is_whole && !diff::is_unchanged(held, &document, &options.ignore))
        });
        Ok(Found { document: moved.then_some(document), fingerprint, shown })
    }
}

impl Compares {
    /// What the sequence shows of a value; `None`: what it shows already. And what its `select`, if it has one, took of
    /// `work_max`.
    fn compared_with(&self, made: &mut Made<'_>, work_max: u64) -> (Result<Option<NewValue>, Fault>, Tried) {
        if self.facet.is_whole() {
            return (Ok(self.whole(made)), Tried { work: 0, fits: true });
        }
        let (shown, tried) = made.shown(&self.facet, work_max);
        (shown.map(|shown| self.part(shown, made.options)), tried)
    }

    /// The same where it shows the value itself.
    fn whole(&self, made: &Made<'_>) -> Option<NewValue> {
        let (document, options) = (made.document, made.options);
        let diff_options =
            DiffOptions { ignore: &options.ignore, array_key: options.array_key.as_deref(), work_max: DIFF_WORK_MAX };
        let hash = || options.proof.hash.then(|| Box::new(ValueHash::of(document)));
        let new = |patch, merge| NewValue { shown: Arc::new(Shown::whole(document)), patch, merge, hash: hash() };
        match &self.shown {
            None => Some(new(None, None)),
            Some(held) => match diff::diff(&held.value, document, &diff_options) {
                Change::Unchanged => None,
                Change::Changed { patch, merge } => Some(new(patch, merge)),
            },
        }
    }

    /// The same where it shows a part of it.
    fn part(&self, shown: Shown, options: &Options) -> Option<NewValue> {
        let (mut patch, mut merge) = (None, None);
        if let Some(held) = &self.shown {
            if held.compared == shown.compared {
                return None;
            }
            let work_max = match self.facet.select {
                // Comparing what callers select is bounded by what it is, which they pay for.
                Some(_) => DIFF_WORK_MAX.min(SELECT_DIFF_WORK_PER_BYTE * shown.value.text().len() as u64),
                None => DIFF_WORK_MAX,
            };
            // What is ignored is a place of the whole value, and has been left out of the comparison above.
            let diff_options = DiffOptions { ignore: &[], array_key: options.array_key.as_deref(), work_max };
            match diff::diff(&held.value, &shown.value, &diff_options) {
                // What is ignored stands elsewhere in the whole value than before: that does not show.
                Change::Unchanged => return None,
                Change::Changed { patch: by, merge: or } => (patch, merge) = (by, or),
            }
        }
        let hash = options.proof.hash.then(|| Box::new(ValueHash::of(&shown.value)));
        Some(NewValue { shown: Arc::new(shown), patch, merge, hash })
    }
}

impl Made<'_> {
    /// What those `select`s of a view show, where the value has the mark `body`; `present`: they come to others that are made
    /// of it already.
    fn selected(
        &mut self,
        (view, body): (Option<u16>, Fingerprint),
        selects: Vec<Compares>,
        present: Option<Vec<Claim>>,
    ) -> Vec<NowShows> {
        let ground = self.ground(view, body);
        let (same, selects): (Vec<_>, Vec<_>) =
            selects.into_iter().partition(|sequence| ground.is_some() && sequence.ground == ground);
        let comes = present.is_some() || !same.is_empty();
        let mut present = present.unwrap_or_default();
        present.extend(same.iter().map(|sequence| sequence.claim.clone()));
        let claims: Vec<Claim> = selects.iter().map(|sequence| sequence.claim.clone()).collect();
        let watched = claims.iter().chain(&present).filter(|claim| claim.watched).count();
        let shares = Shares::of(ground.map_or(0, |ground| ground.bytes), watched, self.options.views.len());
        let mut outcomes: Vec<Result<Option<NewValue>, Fault>> = selects.iter().map(|_| Ok(None)).collect();
        let evaluate = |at: usize, work_max| {
            let (new, tried) = selects[at].compared_with(self, work_max);
            outcomes[at] = new;
            tried
        };
        let costs = if comes { shares.admit(&present, &claims, evaluate) } else { shares.among(&claims, evaluate) };
        let unchanged = same.into_iter().map(|Compares { no, shown, claim, .. }| {
            let (before, new, cost) = (shown, Ok(None), claim.cost);
            NowShows { no, before, new, cost, ground, kept: true }
        });
        let made = selects.into_iter().zip(outcomes).zip(costs).map(|((Compares { no, shown, .. }, new), cost)| {
            let before = shown;
            NowShows { no, before, new, cost, ground, kept: false }
        });
        unchanged.chain(made).collect()
    }

    /// What is made of that view, where it is one that can be made.
    fn ground(&mut self, view: Option<u16>, body: Fingerprint) -> Option<Ground> {
        let Some(view) = view else {
            return Some(Ground { value: body, compared: None, bytes: self.document.text().len() });
        };
        let shown = self.shown(&Facet::of_view(view), 0).0.ok()?;
        let compared = shown.compared_apart().map(|compared| json::body_fingerprint(compared.text()));
        Some(Ground { value: json::body_fingerprint(shown.value.text()), compared, bytes: shown.value.text().len() })
    }

    /// What a facet shows; what its view does is worked out once. And what its `select` took of `work_max`.
    fn shown(&mut self, facet: &Facet, work_max: u64) -> (Result<Shown, Fault>, Tried) {
        let fits = Tried { work: 0, fits: true };
        let selected = |select: &select::Select, whole: &Document, ignored: &[std::ops::Range<u32>]| {
            let (shown, work) = select.of(whole, ignored, work_max);
            let fits = shown.is_ok();
            (shown.map_err(|error| Fault::too_large(&error)), Tried { work, fits })
        };
        let (document, options) = (self.document, self.options);
        let select = facet.select.as_ref();
        let Some((view, projection)) = facet.view.zip(facet.projection(options)) else {
            return match select {
                None => (Ok(Shown::whole(document)), fits),
                Some(select) => selected(select, document, &Projection::ignored(document, &options.ignore)),
            };
        };
        let of_view = match self.views.iter().position(|(made, _)| *made == view) {
            Some(at) => at,
            None => {
                let made = projection.of(document, &options.ignore, view.saturating_add(1), options.response_bytes_max);
                self.views.push((view, made.map_err(|error| Fault::too_large(&error))));
                self.views.len() - 1
            }
        };
        match (self.views.get(of_view).map(|(_, made)| made.clone()).expect("it was made or found above"), select) {
            (Ok(shown), Some(select)) => selected(select, &shown.value, &shown.ignored()),
            (made, _) => (made, fits),
        }
    }
}

impl Fault {
    fn too_large(error: &dyn std::fmt::Display) -> Fault {
        Fault { code: UpstreamCode::TooLarge, detail: error.to_string() }
    }
}

/// A stream on the core that polls it: one poll, and of its value as many sequences as are made of it.
#[derive(Debug)]
pub struct Stream {
    target: Arc<Target>,
    poller: Poller,
    base: Option<Base>,
    /// None where nobody has asked for one.
    sequences: Vec<Sequence>,
    sequences_made: u32,
    /// The comparison for sequences that are behind that is awaited.
    catching_up: Option<u64>,
    /// Number of the last of them.
    catch_ups: u64,
    /// Whether a `select` takes less than before, or none, so that others may find room that have found none.
    room_freed: bool,
    /// The work that those of each view have been given once more that had found no room for it before, and with what they are
    /// made of.
    retries: Vec<(Option<u16>, Ground, u64)>,
}

#[derive(Debug)]
struct Sequence {
    no: SequenceNo,
    facet: Facet,
    history: History,
    shown: Option<Arc<Shown>>,
    /// Why it shows nothing of the value that was last looked at; it shows one from before, if any.
    fault: Option<Fault>,
    /// Whether the value has been polled since without looking at this: it was not wanted, or was not there.
    behind: bool,
    /// Whether it is left behind, as nobody wants it.
    resting: bool,
    /// What its `select` claims of the work that those of its view may take together.
    claim: Claim,
    /// What its `select` was last made of.
    ground: Option<Ground>,
}

impl Sequence {
    fn compares(&self) -> Compares {
        let Sequence { no, ref facet, ref shown, ref claim, ground, .. } = *self;
        Compares { no, facet: facet.clone(), shown: shown.clone(), claim: claim.clone(), ground }
    }

    /// Whether it is to be brought up to date.
    fn waits(&self) -> bool {
        self.behind && !self.resting
    }

    /// Whether its `select` takes part of the work while others are made of the value.
    fn is_selecting(&self) -> bool {
        self.facet.select.is_some() && !self.resting && !self.behind
    }

    /// Takes in what a comparison found that began with what is shown now: its event, if it made one.
    fn take(&mut self, new: Result<Option<NewValue>, Fault>, ts: WallTime) -> Option<Event> {
        self.behind = false;
        let (new, fault) = new.map_or_else(|fault| (None, Some(fault)), |new| (new, None));
        self.fault = fault;
        let NewValue { shown, patch, merge, hash } = new?;
        let value = Arc::clone(shown.value.text());
        self.shown = Some(shown);
        self.history.publish_hashed(ts, value, patch.map(Arc::from), merge.map(Arc::from), hash);
        self.history.newest().cloned()
    }

    /// Bytes of what it shows beside its history, which holds the newest text.
    fn shown_bytes(&self) -> usize {
        let Some(shown) = &self.shown else { return 0 };
        let tape = |document: &Document| document.memory_bytes() - document.text().len();
        match shown.compared_apart() {
            // The value is the base's, and counted there.
            _ if self.facet.is_whole() => 0,
            Some(compared) => tape(&shown.value) + compared.memory_bytes(),
            None => tape(&shown.value),
        }
    }
}

impl Stream {
    /// A stream that has not been polled and has no sequence. `seed` is for its phase and jitter; its polls are numbered
    /// from behind `polled`, which no other stream at its place may reach.
    pub fn new(target: Arc<Target>, seed: u64, polled: PollNo) -> Stream {
        let options = &target.options;
        let pace = pace::Pace::new(&options.pacing, options.interval);
        let gap = options.follow.as_ref().map(|following| following.gap);
        Stream {
            poller: Poller::new(PollOptions::of(options, seed)).numbered_from(polled).at_pace(pace).following(gap),
            target,
            base: None,
            sequences: Vec::new(),
            sequences_made: 0,
            catching_up: None,
            catch_ups: polled.0,
            room_freed: false,
            retries: Vec::new(),
        }
    }

    /// Makes a sequence of that facet, which has no other. [`Stream::catch_up`] gives it its value, where there is one.
    pub fn add_sequence(&mut self, facet: Facet, epoch: Epoch) -> SequenceNo {
        self.sequences_made += 1;
        let no = SequenceNo(self.sequences_made);
        let history = History::new(epoch, Bounds::of(&self.target.options));
        let (shown, fault) = (None, None);
        let (behind, resting, claim, ground) = (true, false, Claim::default(), None);
        self.sequences.push(Sequence { no, facet, history, shown, fault, behind, resting, claim, ground });
        no
    }

    /// Forgets a sequence.
    pub fn remove_sequence(&mut self, no: SequenceNo) {
        self.sequences.retain(|sequence| sequence.no != no);
        self.room_freed = true;
    }

    /// Whether somebody watches a sequence, and who answers for the work that its `select` takes.
    pub fn set_claim(&mut self, no: SequenceNo, watched: bool, payers: Vec<Holder>) {
        let Some(at) = self.sequences.iter().position(|sequence| sequence.no == no) else { return };
        let claim = &mut self.sequences[at].claim;
        let had = std::mem::replace(&mut claim.watched, watched);
        self.room_freed |= had && !watched || *claim.payers != *payers;
        claim.payers = Arc::from(payers);
        // What lingered may have been left nothing of a value that there is enough for now.
        if watched
            && !had
            && let Cost::Refused(before) = claim.cost
            && self.room_for(at).is_some_and(|room| room > before)
        {
            self.sequences[at].behind = true;
            self.sequences[at].ground = None;
        }
    }

    /// Whether polls look at a sequence. One that nobody wants is left behind, so that it costs nothing;
    /// [`Stream::catch_up`] brings it up to date when somebody does.
    pub fn set_wanted(&mut self, no: SequenceNo, wanted: bool) {
        if let Some(sequence) = self.sequences.iter_mut().find(|sequence| sequence.no == no) {
            self.room_freed |= sequence.facet.select.is_some() && !wanted && !sequence.resting;
            sequence.resting = !wanted;
        }
    }

    /// Whether a sequence shows the newest value, as far as there is one.
    pub fn is_current(&self, no: SequenceNo) -> bool {
        self.sequences.iter().any(|sequence| sequence.no == no && !sequence.behind)
    }

    /// The events of a sequence.
    pub fn history(&self, no: SequenceNo) -> Option<&History> {
        self.sequences.iter().find(|sequence| sequence.no == no).map(|sequence| &sequence.history)
    }

    /// Bytes of its events and values.
    pub fn bytes(&self) -> u64 {
        self.history_bytes() + self.value_bytes()
    }

    /// What [`Stream::trim_to`] leaves of them in any case.
    pub fn least_bytes(&self) -> u64 {
        self.value_bytes() + self.sequences.iter().map(|sequence| sequence.history.least_bytes()).sum::<u64>()
    }

    fn history_bytes(&self) -> u64 {
        self.sequences.iter().map(|sequence| sequence.history.bytes()).sum()
    }

    /// Of the values held; the text of a sequence's is its newest event's, and counted there.
    fn value_bytes(&self) -> u64 {
        let base = self.base.as_ref().map_or(0, |base| {
            let is_whole = |sequence: &Sequence| sequence.facet.is_whole() && sequence.shown.is_some();
            let text = if self.sequences.iter().any(is_whole) { base.document.text().len() } else { 0 };
            base.document.memory_bytes() - text
        });
        (base + self.sequences.iter().map(Sequence::shown_bytes).sum::<usize>()) as u64
    }

    /// Lets go of old events until `bytes` of [`Stream::bytes`] are left, as far as the newest of each sequence, which stay,
    /// allow it.
    pub fn trim_to(&mut self, bytes: u64) {
        let mut excess = self.bytes().saturating_sub(bytes);
        for sequence in &mut self.sequences {
            excess -= sequence.history.trim_to(sequence.history.bytes().saturating_sub(excess)).min(excess);
        }
    }

    /// What subscribers are told of its upstream.
    pub fn status(&self, now: Instant) -> Status {
        self.poller.status(now)
    }

    /// What subscribers of a sequence are told: of its upstream, or, where that is well, of its own fault.
    pub fn status_of(&self, no: SequenceNo, now: Instant) -> Status {
        let status = self.poller.status(now);
        let sequence = self.sequences.iter().find(|sequence| sequence.no == no);
        let Some((sequence, fault)) = sequence.and_then(|sequence| Some((sequence, sequence.fault.as_ref()?))) else {
            return status;
        };
        let own = if sequence.history.value().is_some() { StreamState::Stale } else { StreamState::Failing };
        match status.state {
            StreamState::Live => {
                let retry_in = self.poller.next_due().map(|due| due.since(now));
                Status { state: own, code: Some(fault.code), status: None, retry_in }
            }
            // The upstream has given a value, and this shows nothing of it.
            StreamState::Stale => Status { state: own, ..status },
            StreamState::Failing | StreamState::Ended => status,
        }
    }

    /// Why a sequence shows nothing of the value that is held, where it does not.
    pub fn fault_of(&self, no: SequenceNo) -> Option<&Fault> {
        self.sequences.iter().find(|sequence| sequence.no == no)?.fault.as_ref()
    }

    /// The status, once after each change of its state.
    pub fn status_change(&mut self, now: Instant) -> Option<Status> {
        self.poller.status_change(now)
    }

    /// How it stands with its upstream, for the stream that takes its place.
    pub fn record(&self) -> poll::Record {
        self.poller.record()
    }

    /// Goes on where the stream before it has left off.
    pub fn take_up(&mut self, now: Instant, left: poll::Record, alone_until: Option<Instant>) {
        self.poller.take_up(now, left, alone_until);
    }

    /// Whether its upstream is to be left alone for a while.
    pub fn is_put_off(&self, now: Instant) -> bool {
        self.poller.is_put_off(now)
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

    /// As [`Stream::poll_now`], at most so often as [`limits::REFRESH_INTERVAL`] allows.
    pub fn poll_soon(&mut self, now: Instant) -> bool {
        self.poller.poll_soon(now)
    }

    /// An administrator has stopped it: it is not polled until it is resumed, whoever watches.
    pub fn pause(&mut self) {
        self.poller.pause();
    }

    /// An administrator has started it again: it is polled at once, where somebody watches.
    pub fn resume(&mut self, now: Instant) {
        self.poller.resume(now);
    }

    /// Whether an administrator has stopped it.
    pub fn is_paused(&self) -> bool {
        self.poller.is_paused()
    }

    /// Polls no more until it is started again.
    pub fn stop(&mut self) {
        self.poller.stop();
    }

    /// When the next poll may begin where polling has ended and begins again; `None`: at once.
    pub fn rests_until(&self) -> Option<Instant> {
        self.poller.rests_until()
    }

    /// When the last poll began; `None`: none has.
    pub fn last_start(&self) -> Option<Instant> {
        self.poller.last_start()
    }

    /// It was forgotten, and is made anew: its last poll began then.
    pub fn started_before(&mut self, at: Instant) {
        self.poller.started_before(at);
    }

    /// Whether it is polled.
    pub fn is_running(&self) -> bool {
        self.poller.is_running()
    }

    /// When [`Stream::begin`] is to be called.
    pub fn next_due(&self) -> Option<Instant> {
        self.poller.next_due()
    }

    /// Until when, where it is now, no poll is to begin for a window of the day that has none.
    pub fn closed_until(&self, now: Now) -> Option<Instant> {
        self.poller.closed_until(now)
    }

    /// The poll that is due may not begin before `until`, for a window of the day that has none: what is to be told, if
    /// anything.
    pub fn hold_closed(&mut self, now: Now, until: Instant) -> Option<Failure> {
        self.poller.hold_closed(now, until)
    }

    /// The poll that is due may perhaps begin at `until`, and is to be asked for again at `look`; with a `failure` that is as if it
    /// had been made.
    pub fn hold(&mut self, look: Instant, until: Instant, failure: Option<&Failure>) {
        self.poller.hold(look, until, failure);
    }

    /// Whether its polls are answered by what its upstream sends, whenever that is.
    pub fn follows(&self) -> bool {
        self.target.options.follow.is_some()
    }

    /// The last poll, if it is answered so and is under way: it is given up.
    pub fn give_up(&mut self) -> Option<PollNo> {
        if self.follows() { self.poller.give_up() } else { None }
    }

    /// Whether a value is held.
    pub fn holds_value(&self) -> bool {
        self.poller.holds_value()
    }

    /// Whether the value held is the newest that is to be had: no poll would be made for whoever comes.
    pub fn holds_newest(&self, now: Now) -> bool {
        self.poller.holds_newest(now)
    }

    /// Whether a value is held, and the last poll that was sent has not failed.
    pub fn works(&self) -> bool {
        self.poller.works()
    }

    /// Whether the last poll was not sent because there was no token for it.
    pub fn lacks_token(&self) -> bool {
        self.poller.lacks_token()
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
            Judged::NotModified => {
                if let Some(base) = &mut self.base {
                    base.seen = now.wall;
                }
                self.poller.paced(now, false);
                Step::Unchanged
            }
            Judged::Failed(failure) => Step::Failed(failure),
            Judged::Body { bytes, received } => {
                // Larger ones are read elsewhere, for this too.
                let small = bytes.len() <= limits::INLINE_DIFF_BYTES_MAX;
                let fingerprint = small.then(|| json::body_fingerprint(&bytes));
                if let (Some(base), Some(fingerprint)) = (&mut self.base, fingerprint)
                    && base.fingerprint == fingerprint
                {
                    base.seen = received;
                    if !self.poller.accept(now.at, poll) {
                        return Step::Unexpected;
                    }
                    self.poller.paced(now, false);
                    return Step::Unchanged;
                }
                let sequences = self.sequences.iter().filter(|sequence| !sequence.resting).map(Sequence::compares);
                let comparison = Comparison {
                    stream,
                    task: Task::Poll { poll, body: bytes, fingerprint, received, filtered: None },
                    base: self.base.clone(),
                    sequences: sequences.collect(),
                    selecting: Vec::new(),
                    options: Arc::clone(&self.target.options),
                };
                let large = comparison.work() > limits::INLINE_DIFF_BYTES_MAX || comparison.is_filtered();
                if large { Step::Compare(comparison) } else { self.compared(now, comparison.run()) }
            }
        }
    }

    /// Takes in the result of a comparison that was made for a poll.
    pub fn compared(&mut self, now: Now, compared: Compared) -> Step {
        let Origin::Poll { poll, received } = compared.origin else { return Step::Unexpected };
        let Found { document, fingerprint, shown } = match compared.outcome {
            Ok(found) => found,
            Err((code, detail)) => {
                let refused = self.poller.refuse(now.at, poll, code, detail);
                return refused.map_or(Step::Unexpected, Step::Failed);
            }
        };
        if !self.poller.accept(now.at, poll) {
            return Step::Unexpected;
        }
        self.poller.paced(now, document.is_some());
        if let Some(base) = &mut self.base {
            base.fingerprint = fingerprint;
            base.seen = received;
        }
        let Some(document) = document else { return Step::Unchanged };
        self.room_freed = true;
        self.base = Some(Base { document, fingerprint, seen: received });
        self.sequences.iter_mut().for_each(|sequence| sequence.behind = true);
        // What is being made of the value before is of no use any more.
        self.catching_up = None;
        Step::Changed(self.take(shown, received).into_iter().filter_map(|(no, event)| Some((no, event?))).collect())
    }

    fn take(&mut self, shown: Vec<NowShows>, ts: WallTime) -> Vec<(SequenceNo, Option<Event>)> {
        let mut taken = Vec::with_capacity(shown.len());
        for NowShows { no, before, new, cost, ground, kept } in shown {
            // It may have been forgotten meanwhile.
            let Some(sequence) = self.sequences.iter_mut().find(|sequence| sequence.no == no) else { continue };
            let same = match (&before, &sequence.shown) {
                (Some(before), Some(now)) => Arc::ptr_eq(before, now),
                (before, now) => before.is_none() && now.is_none(),
            };
            // Where it was brought up to date while the comparison was made, it stays behind and is compared anew.
            if kept {
                if same && sequence.ground == ground {
                    sequence.behind = false;
                    taken.push((no, None));
                }
            } else if same {
                sequence.claim.cost = cost;
                sequence.ground = ground;
                taken.push((no, sequence.take(new, ts)));
            }
        }
        taken
    }

    /// Brings those sequences that are wanted and behind up to date with the value that is held, unless that is being done
    /// elsewhere: then call this again afterwards.
    pub fn catch_up(&mut self, stream: u32) -> CaughtUp {
        let none = CaughtUp::Now(Vec::new());
        if self.catching_up.is_some() {
            return none;
        }
        self.find_room();
        if !self.sequences.iter().any(Sequence::waits) {
            return none;
        }
        let Some(base) = &self.base else { return none };
        self.catch_ups += 1;
        let comparison = Comparison {
            stream,
            task: Task::CatchUp { number: self.catch_ups },
            base: Some(base.clone()),
            sequences: self.sequences.iter().filter(|sequence| sequence.waits()).map(Sequence::compares).collect(),
            selecting: self.selecting().map(|one| (one.facet.view, one.claim.clone())).collect(),
            options: Arc::clone(&self.target.options),
        };
        self.catching_up = Some(self.catch_ups);
        if comparison.work() > limits::INLINE_DIFF_BYTES_MAX {
            return CaughtUp::Compare(comparison);
        }
        CaughtUp::Now(self.caught_up(comparison.run()))
    }

    /// Those `select`s that show the value that is held, or have tried to.
    fn selecting(&self) -> impl Iterator<Item = &Sequence> {
        self.sequences.iter().filter(|sequence| sequence.is_selecting())
    }

    /// How much the `select` of the sequence at that place may take of the value that is held, where it was made of that, or
    /// tried to be.
    fn room_for(&self, at: usize) -> Option<u64> {
        let sequence = self.sequences.get(at)?;
        let of_view = |other: &&Sequence| other.facet.view == sequence.facet.view;
        let watched = self.sequences.iter().filter(of_view).filter(|sequence| sequence.claim.watched).count();
        let shares = Shares::of(sequence.ground?.bytes, watched, self.target.options.views.len());
        let others = self.selecting().filter(of_view).filter(|other| other.no != sequence.no);
        let others: Vec<Claim> = others.map(|other| other.claim.clone()).collect();
        Some(shares.room(&others, &sequence.claim))
    }

    /// Whether so much may be spent on trying the `select` of that sequence once more; then it is taken to be.
    fn may_retry(&mut self, at: usize, work: u64) -> bool {
        let Some((view, ground)) = self.sequences.get(at).and_then(|one| Some((one.facet.view, one.ground?))) else {
            return false;
        };
        let of_view = self.retries.iter().position(|(of, ..)| *of == view).unwrap_or_else(|| {
            self.retries.push((view, ground, 0));
            self.retries.len() - 1
        });
        let Some((_, of, spent)) = self.retries.get_mut(of_view) else { return false };
        if std::mem::replace(of, ground) != ground {
            *spent = 0;
        }
        let may = spent.saturating_add(work) <= Shares::of(ground.bytes, 0, self.target.options.views.len()).total;
        *spent += if may { work } else { 0 };
        may
    }

    /// With a new value, and where somebody has left, those `select`s that found too little room before are tried once more, if
    /// there is more now.
    fn find_room(&mut self) {
        if !std::mem::take(&mut self.room_freed) {
            return;
        }
        let mut refused: Vec<(u64, usize)> = Vec::new();
        for (at, sequence) in self.sequences.iter().enumerate().filter(|(_, sequence)| sequence.is_selecting()) {
            if let Claim { watched: true, cost: Cost::Refused(before), .. } = sequence.claim {
                refused.push((before, at));
            }
        }
        // Those that may be cheap come first.
        refused.sort_unstable();
        for (before, at) in refused {
            let Some(room) = self.room_for(at) else { continue };
            if room > before && self.may_retry(at, room) {
                self.sequences[at].behind = true;
                // It is to be tried with what has made the others.
                self.sequences[at].ground = None;
            }
        }
    }

    /// Takes in the result of a comparison that [`Stream::catch_up`] asked for. Where another was begun meanwhile, nothing.
    pub fn caught_up(&mut self, compared: Compared) -> Vec<(SequenceNo, Option<Event>)> {
        let Origin::CatchUp { number } = compared.origin else { return Vec::new() };
        if self.catching_up != Some(number) {
            return Vec::new();
        }
        self.catching_up = None;
        let Some(base) = &mut self.base else { return Vec::new() };
        // When the value last changed is not told to those who may not have seen that change: to them it is new now.
        let seen = base.seen;
        match compared.outcome {
            Ok(found) => self.take(found.shown, seen),
            Err(_) => {
                // The next poll brings the value again, and says what is wrong with it.
                self.base = None;
                self.poller.forget_validators();
                Vec::new()
            }
        }
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;
    use crate::codec::message::Format;
    use crate::config::{Config, FileError, Sources};
    use crate::stream::poll::{FetchError, FetchResponse, Validators};
    use crate::stream::view::tests::{any_pointers, any_value, model};

    struct NoSources;

    impl Sources for NoSources {
        fn env(&self, _: &str) -> Option<Vec<u8>> {
            None
        }

        fn file(&self, _: &str, _: usize) -> Result<Vec<u8>, FileError> {
            Err(FileError::Missing)
        }
    }

    /// A stream with these keys and a sequence of each view, or of the whole where there are none; and its clock.
    struct Polled {
        stream: Stream,
        at_ms: u64,
        sequences: Vec<SequenceNo>,
    }

    impl Polled {
        fn new(keys: &str) -> Polled {
            let text = format!("[[stream]]\nid = \"s\"\nurl = \"http://up.example/s\"\nallow_anonymous = true\n{keys}");
            let (config, _) = Config::parse(&text, &NoSources).unwrap_or_else(|errors| panic!("{errors:?}"));
            let options = Arc::clone(&config.streams[0]);
            let url = "http://up.example/s".parse().expect("a URL");
            let views = options.views.len();
            let stream = Stream::new(Arc::new(Target { options, url, body: None, guard: None }), 7, PollNo(0));
            let mut polled = Polled { stream, at_ms: 5_000_000, sequences: Vec::new() };
            let facets: Vec<Option<u16>> = if views == 0 { vec![None] } else { (0..views as u16).map(Some).collect() };
            for view in facets {
                polled.add(Facet { view, select: None });
            }
            polled.stream.start(polled.now().at);
            polled
        }

        fn add(&mut self, facet: Facet) -> SequenceNo {
            let no = self.stream.add_sequence(facet, Epoch::from_random(self.sequences.len() as u64));
            self.sequences.push(no);
            no
        }

        fn now(&self) -> Now {
            Now { at: Instant::from_micros(self.at_ms * 1_000), wall: WallTime::from_micros(self.at_ms * 1_000) }
        }

        fn poll_with(&mut self, result: FetchResult) -> Step {
            self.at_ms += 100_000;
            let (poll, _) = self.stream.begin(self.now().at).expect("a poll is due");
            self.stream.fetched(self.now(), 3, poll, result)
        }

        fn answer(&self, body: &str) -> FetchResult {
            let received = WallTime::from_micros((self.at_ms + 99_999) * 1_000);
            let (validators, retry_after, fresh_for) = (Validators::default(), None, None);
            Ok(FetchResponse { status: 200, validators, retry_after, fresh_for, body: body.into(), received })
        }

        /// Polls that value: the events, by the sequence's place.
        fn poll(&mut self, body: &str) -> Vec<(usize, Event)> {
            let answer = self.answer(body);
            let step = match self.poll_with(answer) {
                Step::Compare(comparison) => self.stream.compared(self.now(), comparison.run()),
                step => step,
            };
            match step {
                Step::Changed(events) => self.placed(events),
                Step::Unchanged => Vec::new(),
                other => panic!("{other:?}"),
            }
        }

        fn placed(&self, events: Vec<(SequenceNo, Event)>) -> Vec<(usize, Event)> {
            let place = |no| self.sequences.iter().position(|own| *own == no).expect("a sequence");
            events.into_iter().map(|(no, event)| (place(no), event)).collect()
        }

        /// The same for those that are behind, which are brought up to date at once.
        fn catch_up(&mut self) -> Vec<(usize, Event)> {
            let taken = match self.stream.catch_up(3) {
                CaughtUp::Now(taken) => taken,
                CaughtUp::Compare(comparison) => self.stream.caught_up(comparison.run()),
            };
            self.placed(taken.into_iter().filter_map(|(no, event)| Some((no, event?))).collect())
        }

        fn value(&self, place: usize) -> Option<String> {
            let value = self.stream.history(self.sequences[place])?.value()?;
            Some(String::from_utf8(value.to_vec()).expect("UTF-8"))
        }
    }

    const TWO_VIEWS: &str = "[[stream.view]]\nroles = [\"a\"]\npointers = [\"/name\"]\n\
                             [[stream.view]]\nroles = [\"b\"]\npath = \"$.rows[*].id\"\n";

    fn places(events: &[(usize, Event)]) -> Vec<(usize, u64)> {
        events.iter().map(|(place, event)| (*place, event.seq().0)).collect()
    }

    #[test]
    fn a_change_makes_an_event_where_it_shows_and_nowhere_else() {
        let mut polled = Polled::new(TWO_VIEWS);
        assert_eq!(places(&polled.poll(r#"{"name":"x","pay":1,"rows":[{"id":1,"n":1}]}"#)), [(0, 1), (1, 1)]);
        assert_eq!(places(&polled.poll(r#"{"name":"x","pay":2,"rows":[{"id":1,"n":2}]}"#)), []);
        assert_eq!(places(&polled.poll(r#"{"name":"y","pay":3,"rows":[{"id":1,"n":3}]}"#)), [(0, 2)]);
        assert_eq!(places(&polled.poll(r#"{"name":"y","pay":3,"rows":[{"id":2,"n":3}]}"#)), [(1, 2)]);
        assert_eq!((polled.value(0).as_deref(), polled.value(1).as_deref()), (Some(r#"{"name":"y"}"#), Some("[2]")));
    }

    #[test]
    fn who_comes_later_gets_the_value_without_a_poll_and_not_the_time_of_a_change_they_do_not_see() {
        let mut polled = Polled::new(TWO_VIEWS);
        polled.stream.remove_sequence(polled.sequences[0]);
        polled.poll(r#"{"name":"x","rows":[]}"#);
        polled.poll(r#"{"name":"x","rows":[{"id":7}]}"#);
        let hidden_change = polled.now().wall;
        polled.poll(r#"{"name":"x","rows":[{"id":7}]}"#);
        polled.sequences[0] = polled.stream.add_sequence(Facet::of_view(0), Epoch::from_random(9));
        assert!(!polled.stream.is_current(polled.sequences[0]));
        let events = polled.catch_up();
        assert_eq!(places(&events), [(0, 1)]);
        let ts = events[0].1.delta().ts;
        assert!(ts > hidden_change && ts <= polled.now().wall, "the time of the last poll");
        assert!(polled.stream.is_current(polled.sequences[0]) && polled.catch_up().is_empty());
    }

    #[test]
    fn a_sequence_that_nobody_wants_is_left_behind_and_brought_up_to_date_when_somebody_does() {
        let mut polled = Polled::new(TWO_VIEWS);
        polled.poll(r#"{"name":"x","rows":[]}"#);
        let name = polled.sequences[0];
        polled.stream.set_wanted(name, false);
        assert_eq!(places(&polled.poll(r#"{"name":"y","rows":[]}"#)), []);
        assert_eq!(places(&polled.poll(r#"{"name":"z","rows":[1]}"#)), []);
        assert!(!polled.stream.is_current(name) && polled.catch_up().is_empty(), "nobody wants it");
        polled.stream.set_wanted(name, true);
        let events = polled.catch_up();
        assert_eq!(places(&events), [(0, 2)], "what was missed is one event");
        assert_eq!(polled.value(0).as_deref(), Some(r#"{"name":"z"}"#));
        // Where nothing has changed that shows, there is none.
        polled.stream.set_wanted(name, false);
        polled.poll(r#"{"name":"z","rows":[]}"#);
        polled.stream.set_wanted(name, true);
        assert_eq!(places(&polled.catch_up()), []);
        assert!(polled.stream.is_current(name));
    }

    #[test]
    fn what_is_brought_up_to_date_while_a_poll_is_compared_elsewhere_is_compared_anew() {
        let mut polled = Polled::new(TWO_VIEWS);
        let large = |name: &str| format!("{{\"name\":\"{name}\",\"pad\":\"{}\",\"rows\":[]}}", "x".repeat(300_000));
        let compared = |step| {
            let Step::Compare(comparison) = step else { panic!("it is large: {step:?}") };
            comparison.run_guarded()
        };
        let first = polled.answer(&large("x"));
        let step = polled.poll_with(first);
        let now = polled.now();
        assert!(matches!(polled.stream.compared(now, compared(step)), Step::Changed(events) if events.len() == 2));
        // A view comes while the next poll is being compared, and is brought up to date from the value before.
        polled.stream.remove_sequence(polled.sequences[0]);
        polled.sequences[0] = polled.stream.add_sequence(Facet::of_view(0), Epoch::from_random(9));
        let second = polled.answer(&large("y"));
        let of_poll = compared(polled.poll_with(second));
        let CaughtUp::Compare(comparison) = polled.stream.catch_up(3) else { panic!("it is large") };
        assert!(matches!(polled.stream.catch_up(3), CaughtUp::Now(none) if none.is_empty()), "one at a time");
        assert_eq!(polled.stream.caught_up(comparison.run()).len(), 1);
        assert_eq!(polled.value(0).as_deref(), Some(r#"{"name":"x"}"#));
        let now = polled.now();
        assert!(matches!(polled.stream.compared(now, of_poll), Step::Changed(events) if events.is_empty()));
        let CaughtUp::Compare(comparison) = polled.stream.catch_up(3) else { panic!("it is behind again") };
        let third = polled.answer(&large("z"));
        let of_poll = compared(polled.poll_with(third));
        let now = polled.now();
        assert!(matches!(polled.stream.compared(now, of_poll), Step::Changed(events) if events.len() == 1));
        assert!(polled.stream.caught_up(comparison.run()).is_empty(), "the value that it was made of is no more");
        assert_eq!(polled.value(0).as_deref(), Some(r#"{"name":"z"}"#));
        assert_eq!(polled.stream.history(polled.sequences[0]).and_then(History::head), Some(crate::ids::Seq(2)));
    }

    #[test]
    fn a_view_that_cannot_be_made_is_a_fault_of_its_own_and_others_go_on() {
        let keys = "response_bytes_max = \"16KiB\"\n[[stream.view]]\nroles = [\"a\"]\npath = \"$..[*, *, *]\"\n\
                    [[stream.view]]\nroles = [\"b\"]\npath = \"$[0]\"";
        let mut polled = Polled::new(keys);
        let told = |polled: &Polled, place: usize| {
            let status = polled.stream.status_of(polled.sequences[place], polled.now().at);
            (status.state, status.code, polled.stream.is_current(polled.sequences[place]))
        };
        let body = |first: u32| format!("[{first},{}1]", "1,".repeat(5_000));
        let (live, too_large) = ((StreamState::Live, None, true), Some(UpstreamCode::TooLarge));
        assert_eq!(places(&polled.poll(&body(7))), [(1, 1)], "no value of the one view, one of the other");
        assert_eq!(told(&polled, 0), (StreamState::Failing, too_large, true));
        assert_eq!(told(&polled, 1), live);
        let fault = polled.stream.fault_of(polled.sequences[0]).expect("a fault");
        assert!(fault.detail.contains("view 1") && fault.detail.contains("16384"), "{}", fault.detail);
        assert_eq!(polled.stream.status(polled.now().at).state, StreamState::Live, "the upstream is well");
        assert!(polled.catch_up().is_empty(), "nothing is tried over and over");
        // The same bytes again change nothing, a failing upstream is said as ever, and without a value it is none.
        assert_eq!(places(&polled.poll(&body(7))), []);
        assert_eq!(told(&polled, 0).0, StreamState::Failing);
        let error = FetchError { code: UpstreamCode::Timeout, detail: String::new() };
        assert!(matches!(polled.poll_with(Err(error)), Step::Failed(_)));
        assert_eq!(told(&polled, 0), (StreamState::Failing, Some(UpstreamCode::Timeout), true));
        assert_eq!(told(&polled, 1), (StreamState::Stale, Some(UpstreamCode::Timeout), true));
        // It goes away with the value that was too much, and comes back with the next.
        polled.at_ms += 100_000;
        assert_eq!(places(&polled.poll("[1]")), [(0, 1), (1, 2)]);
        assert_eq!((told(&polled, 0), told(&polled, 1)), (live, live));
        assert_eq!(polled.value(0).as_deref(), Some("[1,1,1]"));
        assert_eq!(places(&polled.poll(&body(8))), [(1, 3)]);
        assert_eq!(told(&polled, 0), (StreamState::Stale, too_large, true));
        assert_eq!(polled.value(0).as_deref(), Some("[1,1,1]"), "the last that could be made");
        // To one who comes then it is said as well; who wants it when it fits has missed nothing.
        polled.stream.remove_sequence(polled.sequences[0]);
        polled.sequences[0] = polled.stream.add_sequence(Facet::of_view(0), Epoch::from_random(9));
        assert!(polled.catch_up().is_empty());
        assert_eq!(told(&polled, 0), (StreamState::Failing, too_large, true));
        assert_eq!(places(&polled.poll("[1]")), [(1, 4), (0, 1)]);
        assert_eq!(told(&polled, 0), live);
    }

    fn select(view: u16, path: &str) -> Facet {
        Facet { view: Some(view), select: Some(select::Select::parse(path).expect("a path")) }
    }

    const AGENTS_AND_ADMINS: &str = "[[stream.view]]\nroles = [\"agent\"]\npointers = [\"/rows\", \"/a\", \"/b\", \"/text\"]\n\
                                     [[stream.view]]\nroles = [\"admin\"]\npointers = [\"\"]\n";

    #[test]
    fn what_a_view_hides_is_no_measure_of_what_may_be_selected_of_the_rest() {
        let mut polled = Polled::new(AGENTS_AND_ADMINS);
        let body = |hidden: usize| {
            let rows: Vec<u32> = (0..130).collect();
            serde_json::json!({"rows": rows, "hidden": "x".repeat(hidden)}).to_string()
        };
        let dear = polled.add(select(0, "$.rows[?count($.rows[*]) == @]"));
        let (agents, place) = (polled.sequences[0], polled.sequences.len() - 1);
        polled.stream.set_claim(dear, true, vec![Holder::from_hash(1)]);
        let of_admins = polled.add(select(1, "$.rows[?count($.rows[*]) == @]"));
        polled.stream.set_claim(of_admins, true, vec![Holder::from_hash(2)]);
        polled.poll(&body(10));
        for hidden in [20, 15_000, 20_000, 30] {
            let events = polled.poll(&body(hidden));
            assert!(events.iter().all(|(at, _)| *at != 0 && *at != place), "{hidden}: {events:?}");
            let told = |no| polled.stream.status_of(no, polled.now().at).state;
            assert_eq!((told(agents), told(dear)), (StreamState::Live, StreamState::Failing), "{hidden}");
            let all = if hidden > 10_000 { StreamState::Live } else { StreamState::Failing };
            assert!(told(of_admins) == all || told(of_admins) == StreamState::Stale, "they see it all");
        }
    }

    #[test]
    fn selects_of_a_view_are_shared_anew_when_that_changes_and_not_when_what_it_hides_does() {
        let mut polled = Polled::new(AGENTS_AND_ADMINS);
        let body = |text: &str, hidden: u32| {
            let numbers = |count| (0..count).collect::<Vec<u32>>();
            let text = text.repeat(16 << 10);
            let value = serde_json::json!({"rows": numbers(170), "a": numbers(170), "b": numbers(160), "text": text, "hidden": hidden});
            value.to_string()
        };
        polled.poll(&body("a", 1));
        for n in 0..4 {
            let no = polled.add(select(0, &format!("$.a[?count($.rows[*]) == {}]", 1_000 + n)));
            polled.stream.set_claim(no, true, vec![Holder::from_hash(n)]);
            assert_eq!(polled.catch_up().len(), 1);
        }
        let refused = |polled: &Polled| {
            let states = polled.sequences.iter().map(|no| polled.stream.status_of(*no, polled.now().at).state);
            states.filter(|state| *state != StreamState::Live).count()
        };
        // One who takes a little less finds room, for which one of them has to leave.
        let newcomer = polled.add(select(0, "$.b[?count($.rows[*]) == 1000]"));
        polled.stream.set_claim(newcomer, true, vec![Holder::from_hash(9)]);
        assert_eq!((places(&polled.catch_up()), refused(&polled)), (vec![(6, 1)], 0));
        for hidden in 2..5 {
            assert_eq!(places(&polled.poll(&body("a", hidden))), [(1, u64::from(hidden))]);
            assert_eq!((places(&polled.catch_up()), refused(&polled)), (vec![], 0), "it is not told when");
        }
        polled.poll(&body("b", 4));
        assert_eq!(refused(&polled), 1);
    }

    #[test]
    fn what_is_ignored_and_moves_where_nobody_sees_it_makes_no_event() {
        let keys = "ignore = [\"/rows/0/seen\"]\n[[stream.view]]\nroles = [\"a\"]\npath = \"$.rows[?@.id == 7].seen\"";
        let mut polled = Polled::new(keys);
        assert_eq!(places(&polled.poll(r#"{"rows":[{"id":7,"seen":5},{"id":8,"seen":1}]}"#)), [(0, 1)]);
        assert_eq!(places(&polled.poll(r#"{"rows":[{"id":8,"seen":1},{"id":7,"seen":5}]}"#)), []);
        assert_eq!(places(&polled.poll(r#"{"rows":[{"id":8,"seen":1},{"id":7,"seen":6}]}"#)), [(0, 2)]);
        assert_eq!(polled.value(0).as_deref(), Some("[6]"));
    }

    #[test]
    fn a_failure_leaves_what_is_shown() {
        let mut polled = Polled::new(TWO_VIEWS);
        polled.poll(r#"{"name":"x","rows":[]}"#);
        let error = FetchError { code: UpstreamCode::Timeout, detail: String::new() };
        assert!(matches!(polled.poll_with(Err(error)), Step::Failed(_)));
        assert_eq!(polled.value(0).as_deref(), Some(r#"{"name":"x"}"#));
    }

    #[test]
    fn bytes_are_counted_once_and_let_go_of() {
        let mut polled = Polled::new(TWO_VIEWS);
        for name in 0..20 {
            polled.poll(&format!("{{\"name\":\"{name}{}\",\"rows\":[{{\"id\":{name}}}]}}", "x".repeat(1_000)));
        }
        let histories = |polled: &Polled| -> Vec<u64> {
            polled.sequences.iter().filter_map(|no| Some(polled.stream.history(*no)?.bytes())).collect()
        };
        let before = polled.stream.bytes();
        assert!(before > histories(&polled).iter().sum());
        polled.stream.trim_to(before - 10_000);
        assert!(polled.stream.bytes() <= before - 10_000);
        polled.stream.trim_to(0);
        let left: u64 = histories(&polled).iter().sum();
        assert!(left < 3_000 && polled.value(0).is_some() && polled.value(1).is_some(), "the newest stay: {left}");
    }

    /// What a client of `format` holds after `event`.
    fn applied(held: Option<&str>, event: &Event, format: Format) -> String {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("UTF-8");
        let base = || held.expect("a delta follows on a value").as_bytes();
        match event.content(format).expect("the newest has its content") {
            log::Content::Patch(patch) => text(&apply::apply_patch(base(), patch).expect("it applies")),
            log::Content::Merge(merge) => text(&apply::apply_merge(base(), merge).expect("it applies")),
            log::Content::Snapshot(value) => text(value),
        }
    }

    fn without(value: &Value, ignored: &[&str]) -> Value {
        let mut value = value.clone();
        for name in ignored {
            if let Some(members) = value.as_object_mut() {
                members.remove(*name);
            }
        }
        value
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        // Whoever applies the events of a view holds what the model leaves of the value, and is told of a change exactly
        // if it shows.
        #[test]
        fn events_of_a_view_lead_to_its_projection(
            values in prop::collection::vec(any_value(), 1..8),
            pointers in any_pointers(),
            ignores in any::<bool>(),
        ) {
            let ignore = if ignores { "ignore = [\"/a\"]\n" } else { "" };
            let keys = format!("{ignore}array_key = \"a\"\n[[stream.view]]\nroles = [\"r\"]\npointers = {pointers:?}\n");
            let ignored: &[&str] = if ignores { &["a"] } else { &[] };
            let mut polled = Polled::new(&keys);
            let pointers: Vec<diff::Pointer> = pointers.iter().map(|text| diff::Pointer::parse(text).expect("one")).collect();
            let tokens: Vec<&[String]> = pointers.iter().map(diff::Pointer::tokens).collect();
            let projected = |value: &Value| model(value, &tokens).unwrap_or(Value::Null);
            let mut held: [Option<String>; 3] = [None, None, None];
            let mut compared = None;
            for value in values {
                let events = polled.poll(&value.to_string());
                let now = projected(&without(&value, ignored));
                // A whole value that is ignored apart from nothing is unchanged for everybody.
                prop_assert_eq!(events.len(), usize::from(compared.as_ref() != Some(&now)), "{}", value);
                for (_, event) in events {
                    for (held, format) in held.iter_mut().zip([Format::Patch, Format::Merge, Format::Full]) {
                        let next = applied(held.as_deref(), &event, format);
                        prop_assert_eq!(next.parse::<Value>().expect("JSON"), projected(&value), "{:?}", format);
                        *held = Some(next);
                    }
                    compared = Some(now.clone());
                }
            }
        }
    }
}
