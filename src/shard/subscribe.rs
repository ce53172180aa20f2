//! Subscriptions: made, started once the stream is known here, moved when a grant changes, given up.
//!
//! Source: protocol version 1, sections 3 («Order», «Resume») and 4. Memory: `limits.subscriptions_per_connection` a
//! connection. Errors: [`Refusal`]. Not here: delivering (`fanout`).

use std::sync::Arc;
use std::time::Duration;

use crate::auth::grant::Grant;
use crate::codec::message::{self, ClientId, CloseReason, ErrorCode, Format, UnsubscribedReason};
use crate::connection::handshake::Refusal;
use crate::connection::subscriptions::{Counted, Slot};
use crate::frame::{self, RenditionKind};
use crate::ids::{ConnectionKey, Holder, Keeper, ResumePoint, Seq};
use crate::stream::log::{Event, History};
use crate::stream::poll::{Status, StreamState, UpstreamCode};
use crate::stream::select::Select;
use crate::time::WallTime;

use super::rendition::{Rated, Subscriber};
use super::topics::{Pending, Topic};
use super::{Full, Mail, Shard, StreamKey, Timer};

/// How long a copy of a history is kept up to date after its last local watcher, for those who come back.
const TOPIC_LINGER: Duration = Duration::from_secs(5);
/// How long events that were put in front of a log for one who resumes are kept for others.
const BACKLOG_KEPT: Duration = Duration::from_secs(2);
/// Seconds after which a subject may ask again that watches as many streams as it may.
const FULL_S: u64 = 5;

/// Why a connection gets a subscription.
#[derive(Clone, Copy, Debug)]
pub(super) enum Cause<'a> {
    /// It is opened to that stream.
    Opened,
    /// It has asked for it, with this id, which is echoed.
    Asked(Option<&'a ClientId>),
    /// Its credential selects another stream than before.
    Moved,
    /// The stream that it had was changed. It has what it had, so no limit refuses it; what it had before comes free at once,
    /// or when the other connections and cores have left that too.
    Changed,
}

impl Shard {
    /// The topic of `key`, made if there is none, with one more watcher: that connection, of that subject. `moved`: it has
    /// watched what the stream was before it was changed.
    pub(super) fn watch(&mut self, key: &Arc<StreamKey>, connection: u32, subject: Option<Holder>, moved: bool) -> u32 {
        let now = self.now.at;
        let payer = self.payer(key, connection, subject);
        let (index, new) = match self.topic_of.get(key) {
            Some(&index) => (index, false),
            None => {
                let index = self.topics.insert(Topic::new(Arc::clone(key), now));
                self.topic_of.insert(Arc::clone(key), index);
                (index, true)
            }
        };
        let topic = self.topics.at_mut(index).expect("the topic was just found or made");
        topic.watchers += 1;
        topic.moved |= moved;
        if topic.watchers == 1 {
            topic.fresh = false;
            topic.payer = payer;
            let owner = key.owner(self.cores);
            let payer = payer.map(|(_, payer)| payer);
            self.send(owner, Mail::Watch { key: Arc::clone(key), from: self.core, attach: new, payer, moved });
        }
        index
    }

    /// Who answers for the work that `key` takes, where something is selected: the subject, or without one the address.
    fn payer(&self, key: &StreamKey, connection: u32, subject: Option<Holder>) -> Option<(u32, Holder)> {
        key.facet.select.as_ref()?;
        Some((connection, subject.or_else(|| Some(self.connections.at(connection)?.client))?))
    }

    /// One watcher of the topic fewer: that connection, which does not stand among its readers any more.
    pub(super) fn unwatch(&mut self, index: u32, connection: u32) {
        let now = self.now.at;
        let Some(topic) = self.topics.at_mut(index) else { return };
        topic.watchers -= 1;
        if topic.watchers > 0 {
            if topic.payer.is_some_and(|(payer, _)| payer == connection) {
                self.choose_payer(index);
            }
            return;
        }
        topic.idle_since = now;
        topic.moved = false;
        let key = Arc::clone(&topic.key);
        for rendition in &mut topic.renditions {
            *rendition = None;
        }
        let owner = key.owner(self.cores);
        self.send(owner, Mail::Unwatch { key, from: self.core });
        self.time_topic(index);
    }

    /// Whoever answered for the work of a topic has left it: another of those who watch it does.
    fn choose_payer(&mut self, index: u32) {
        let Some(topic) = self.topics.at(index) else { return };
        let Some(next) = topic.watching().next() else { return };
        let key = Arc::clone(&topic.key);
        let subject = self.subject_of(next).or_else(|| self.waiting_subject(next));
        let Some((next, payer)) = self.payer(&key, next, subject) else { return };
        if let Some(topic) = self.topics.at_mut(index) {
            topic.payer = Some((next, payer));
        }
        self.send(key.owner(self.cores), Mail::Charge { key, from: self.core, payer });
    }

    /// Sets the timer that lets go of a topic that was given up, if none is set.
    fn time_topic(&mut self, index: u32) {
        let Some(topic) = self.topics.at_mut(index) else { return };
        if !std::mem::replace(&mut topic.timed, true) {
            let at = topic.idle_since + TOPIC_LINGER;
            self.set_timer(at, Timer::Topic { index });
        }
    }

    /// A topic that was given up may be let go of.
    pub(super) fn topic_due(&mut self, index: u32) {
        let now = self.now.at;
        let Some(topic) = self.topics.at_mut(index) else { return };
        topic.timed = false;
        if topic.watchers > 0 {
            return;
        }
        if topic.idle_since + TOPIC_LINGER > now {
            self.time_topic(index);
            return;
        }
        if let Some(topic) = self.forget_topic(index) {
            let owner = topic.key.owner(self.cores);
            self.send(owner, Mail::Detach { key: topic.key, from: self.core });
        }
    }

    fn forget_topic(&mut self, index: u32) -> Option<Topic> {
        let topic = self.topics.remove(index)?;
        self.topic_of.remove(&topic.key);
        Some(topic)
    }

    /// Whether the connection already holds a subscription of that name.
    fn holds(&self, index: u32, name: &str) -> Option<u16> {
        let open = self.connections.at(index)?.open()?;
        let named = |slot: &Slot| self.topics.at(slot.topic).is_some_and(|topic| *topic.key.name == *name);
        open.subscriptions.iter().find(|(_, slot)| named(slot)).map(|(slot, _)| slot)
    }

    /// Subscribes an open connection to `key`.
    ///
    /// # Errors
    /// `ALREADY_SUBSCRIBED`, `TOO_MANY_SUBSCRIPTIONS`, `TOO_MANY_STREAMS` of the subject; the first alone of what was changed.
    pub(super) fn subscribe(
        &mut self,
        index: u32,
        key: &Arc<StreamKey>,
        format: Format,
        since: Option<ResumePoint>,
        max_rate_ms: u32,
        cause: Cause<'_>,
    ) -> Result<(), Refusal> {
        if self.holds(index, &key.name).is_some() {
            return Err(Refusal::new(ErrorCode::AlreadySubscribed, "the connection holds this stream already"));
        }
        let limit = self.options.limits.subscriptions_per_connection as usize;
        let Some(open) = self.connections.at(index).and_then(|connection| connection.open()) else { return Ok(()) };
        let too_many =
            || Refusal::new(ErrorCode::TooManySubscriptions, "the connection holds as many streams as it may");
        let changed = matches!(cause, Cause::Changed);
        if limit != 0 && open.subscriptions.len() >= limit && !changed {
            return Err(too_many());
        }
        let keeper = self.keeper(index, &open.grant, key);
        let held = self.hold_stream(keeper, key, changed)?;
        let topic = self.watch(key, index, keeper.map(Keeper::holder), changed);
        let Some(connection) = self.connections.at_mut(index) else { return Ok(()) };
        let generation = connection.generation;
        let Some(open) = connection.open_mut() else { return Ok(()) };
        let kind = RenditionKind { transport: open.transport, format };
        let rated = max_rate_ms > 0;
        let counted = match held {
            None => Counted::Nobody,
            Some(Keeper::Subject(_)) => Counted::Subject,
            Some(Keeper::Address(_)) => Counted::Address,
        };
        let slot = Slot { topic, position: 0, kind: kind.number(), rated, pending: true, counted, max_rate_ms };
        let Some(slot) = open.subscriptions.insert(slot) else {
            self.release_stream(held, key);
            self.unwatch(topic, index);
            return Err(too_many());
        };
        self.metrics.subscriptions.rise();
        if let Cause::Asked(id) = cause {
            let name = Arc::clone(&key.name);
            self.tell(index, "subscribed", |out| message::write_subscribed(out, &name, id));
        }
        let pending = Pending { connection: ConnectionKey { index, generation }, slot, since };
        if let Some(topic) = self.topics.at_mut(topic)
            && topic.history.is_none()
        {
            topic.pending.push(pending);
            return Ok(());
        }
        self.start(pending);
        Ok(())
    }

    /// What `select`, as a caller has spelled it, leaves of `key`. `code`: of one that is no path.
    pub(super) fn selected(
        &self,
        key: Arc<StreamKey>,
        select: Option<&str>,
        code: ErrorCode,
    ) -> Result<Arc<StreamKey>, Refusal> {
        let Some(text) = select else { return Ok(key) };
        if key.facet.select.is_some() {
            // It is what whoever has made the session leaves of the value for those who get its token.
            return Err(Refusal::new(code, "the session has a select of its own"));
        }
        if self.options.limits.selects_per_stream == 0 {
            return Err(Refusal::new(code, "callers may not select here"));
        }
        match Select::parse(text) {
            Ok(select) => Ok(key.selecting(select)),
            Err(error) => Err(Refusal::new(code, format!("select: {error}"))),
        }
    }

    /// Whom a watch of the stream is counted for: the subject. Those without one have a bound too where they choose what is
    /// polled: who describe streams themselves count together as their issuer's, who fill in parameters as their address's.
    pub(super) fn keeper(&self, index: u32, grant: &Grant, key: &StreamKey) -> Option<Keeper> {
        if let Some(subject) = self.subject(grant) {
            return Some(Keeper::Subject(subject));
        }
        if key.is_direct() {
            return Some(Keeper::Subject(self.ledger.holder("no subject", grant.issuer())));
        }
        // What claims fill in is as many streams as there are credentials.
        let client = self.connections.at(index)?.client;
        (!key.params.is_empty()).then_some(Keeper::Address(client))
    }

    /// Who has a place for a subscription.
    fn keeper_of(&self, index: u32, key: &StreamKey, counted: Counted) -> Option<Keeper> {
        let connection = self.connections.at(index)?;
        match counted {
            Counted::Nobody => None,
            Counted::Subject => self.keeper(index, &connection.open()?.grant, key),
            Counted::Address => Some(Keeper::Address(connection.client)),
        }
    }

    /// Counts a watch of the stream for whoever it is counted for, where they have a limit; for whom it was. A stream that they
    /// have left may have to make place: it is polled no more, unless others need it. `moved`: they watched what it was before
    /// it was changed, as other connections of theirs still may, and have a place for it in any case.
    pub(super) fn hold_stream(
        &mut self,
        keeper: Option<Keeper>,
        key: &StreamKey,
        moved: bool,
    ) -> Result<Option<Keeper>, Refusal> {
        let limits = &self.options.limits;
        let limit = match keeper {
            Some(Keeper::Address(_)) => limits.streams_per_address,
            _ => limits.streams_per_subject,
        };
        let Some(keeper) = keeper.filter(|_| limit != 0 && key.is_filled()) else { return Ok(None) };
        let limit = if moved { u32::MAX } else { limit };
        let ended = match self.ledger.hold_stream(keeper.holder(), key.wanted_place(keeper), limit, self.now.at) {
            Ok(ended) => ended,
            Err(_) if moved => return Ok(None),
            Err(Full { wait }) => {
                let detail = match (keeper, wait) {
                    (Keeper::Subject(_), Some(_)) => {
                        "the subject has watched as many different streams as it may within this time"
                    }
                    (Keeper::Subject(_), None) => "the subject watches as many different streams as it may",
                    (Keeper::Address(_), Some(_)) => {
                        "callers without a subject have watched as many different streams from this address as they may within this time"
                    }
                    (Keeper::Address(_), None) => {
                        "callers without a subject watch as many different streams from this address as they may"
                    }
                };
                let wait_s =
                    wait.map_or(FULL_S, |wait| u64::try_from(wait.as_millis().div_ceil(1_000)).unwrap_or(FULL_S));
                return Err(Refusal::new(ErrorCode::TooManyStreams, detail)
                    .with_status(429)
                    .retry_after(wait_s.max(1)));
            }
        };
        for polled in ended {
            self.send(super::catalog::owner_of(polled, self.cores), Mail::LetGo { polled });
        }
        Ok(Some(keeper))
    }

    /// Counts it no more; only what was counted. Its place stays taken until it is polled no more.
    pub(super) fn release_stream(&mut self, held: Option<Keeper>, key: &StreamKey) {
        let Some(keeper) = held else { return };
        let holder = keeper.holder();
        let linger = self.options.catalog.is_current(key).then_some(key.target.options.linger);
        if let Some(at) = self.ledger.release_stream(holder, key.place_hash(keeper), linger, self.now.at) {
            self.set_timer(at, Timer::Places { holder });
        }
    }

    /// What was released was so because its holder is moved to something else: that has its place.
    pub(super) fn yield_place(&mut self, held: Option<Keeper>, key: &StreamKey) {
        if let Some(keeper) = held {
            self.ledger.yield_place(keeper.holder(), key.hash_value(), self.now.at);
        }
    }

    /// Streams that a subject has left may be polled no more.
    pub(super) fn places_due(&mut self, holder: Holder) {
        if let Some(at) = self.ledger.pass_places(holder, self.now.at) {
            self.set_timer(at, Timer::Places { holder });
        }
    }

    /// Gives a subscription its place among the readers, and what it is to get first.
    fn start(&mut self, pending: Pending) {
        let Pending { connection: ConnectionKey { index, generation }, slot, since } = pending;
        let now = self.now.at;
        let Some(connection) = self.connections.at_mut(index) else { return };
        if connection.generation != generation {
            return;
        }
        let Some(&entry) = connection.open().and_then(|open| open.subscriptions.at(slot)) else { return };
        if !entry.pending {
            return;
        }
        let kind = RenditionKind::from_index(usize::from(entry.kind));
        let Some(topic) = self.topics.at_mut(entry.topic) else { return };
        let Some(history) = &topic.history else { return };
        let has_value = history.value().is_some();
        let status = topic.status.filter(|status| status.state != StreamState::Live);
        let resumed =
            since.and_then(|since| topic.resume(kind, since, now + BACKLOG_KEPT, &self.meter, &mut self.encoder));
        let snapshot = match resumed {
            None if has_value => topic.snapshot(kind, &self.meter, &mut self.encoder),
            _ => None,
        };
        let end = topic.rendition(kind, &self.meter).end();
        let cursor = resumed.unwrap_or(end);
        let name = Arc::clone(&topic.key.name);
        let rendition = topic.rendition(kind, &self.meter);
        let position = if entry.rated {
            let open_at =
                if snapshot.is_some() { now + Duration::from_millis(u64::from(entry.max_rate_ms)) } else { now };
            let interval_ms = entry.max_rate_ms;
            rendition.rated.push(Rated { connection: index, slot, cursor, interval_ms, open_at, armed: false });
            rendition.rated.len() - 1
        } else {
            rendition.behind += 1;
            if let Some(sweep) = &mut rendition.sweep {
                // The pass under way goes by it as well, or it would end before one that it has not come to.
                sweep.left += 1;
            }
            rendition.subscribers.push(Subscriber { connection: index, slot, behind: true, cursor });
            rendition.subscribers.len() - 1
        };
        let position = u32::try_from(position).expect("there are fewer readers than descriptors");
        if let Some(own) = self.connections.at_mut(index).and_then(|c| c.open_mut()?.subscriptions.at_mut(slot)) {
            own.pending = false;
            own.position = position;
        }
        self.count_watching(index);
        if let Some(status) = status {
            let wall = self.now.wall;
            self.tell(index, "stream_status", |out| write_status(out, &name, &status, wall));
        }
        if let (Some(block), Some(connection)) = (snapshot, self.connections.at_mut(index)) {
            let length = block.bytes().len();
            connection.outbox().push_frame(block, 0..length, slot);
        }
        self.make_ready(index);
    }

    /// Gives up one subscription: of its frames only one that has begun to leave is still sent. Nothing is told.
    pub(super) fn unsubscribe_slot(&mut self, index: u32, slot: u16) {
        let Some(connection) = self.connections.at_mut(index) else { return };
        let told = (ConnectionKey { index, generation: connection.generation }, slot);
        let Some(entry) = connection.open_mut().and_then(|open| open.subscriptions.remove(slot)) else { return };
        if let Some(outbox) = &mut connection.outbox {
            outbox.drop_unsent_frames_of(slot);
        }
        self.metrics.subscriptions.fall();
        let Some(topic) = self.topics.at_mut(entry.topic) else { return };
        let key = Arc::clone(&topic.key);
        topic.untold.remove(&told);
        if entry.pending {
            topic.pending.retain(|pending| !(pending.connection.index == index && pending.slot == slot));
        } else if let Some(rendition) = &mut topic.renditions[usize::from(entry.kind)] {
            let position = entry.position as usize;
            let moved = if entry.rated {
                rendition.rated.swap_remove(position);
                rendition.rated.get(position).map(|moved| (moved.connection, moved.slot))
            } else {
                let removed = rendition.subscribers.swap_remove(position);
                if removed.behind {
                    rendition.behind -= 1;
                }
                rendition.subscribers.get_mut(position).map(|moved| {
                    // The sweep may have passed this place already: who moved here catches up by itself.
                    if !moved.behind {
                        moved.behind = true;
                        rendition.behind += 1;
                    }
                    (moved.connection, moved.slot)
                })
            };
            if let Some((other, other_slot)) = moved {
                if let Some(moved) =
                    self.connections.at_mut(other).and_then(|c| c.open_mut()?.subscriptions.at_mut(other_slot))
                {
                    moved.position = entry.position;
                }
                self.make_ready(other);
            }
        }
        // Limits may have been set or lifted since, and an anonymous caller may have become somebody.
        self.release_stream(self.keeper_of(index, &key, entry.counted), &key);
        self.unwatch(entry.topic, index);
    }

    /// Gives up everything a connection is subscribed to.
    pub(super) fn unsubscribe_all(&mut self, index: u32) {
        let slots = self.connections.at(index).and_then(|c| c.open()).map_or(0, |open| open.subscriptions.slots());
        for slot in (0..slots).rev() {
            self.unsubscribe_slot(index, slot);
        }
    }

    /// `subscribe`, from a `/v1/ws` connection.
    pub(super) fn asked_to_subscribe(&mut self, index: u32, asked: &message::Subscribe) {
        let outcome = self.subscribe_by_name(index, asked);
        if let Err(refusal) = outcome {
            self.tell_error(index, refusal.code, &refusal.detail, asked.id.as_ref(), Some(&asked.stream));
        }
    }

    fn subscribe_by_name(&mut self, index: u32, asked: &message::Subscribe) -> Result<(), Refusal> {
        let Some(open) = self.connections.at(index).and_then(|connection| connection.open()) else { return Ok(()) };
        let (id, params) = crate::stream::template::parse_stream_name(&asked.stream).map_or_else(
            // What is no name is no stream either; the claim is asked about it as it stands.
            |_| (asked.stream.clone(), Vec::new()),
            |(id, params)| (id.to_string(), params),
        );
        let key = self.resolve(&open.grant, &id, &params)?;
        let key = self.selected(key, asked.select.as_deref(), ErrorCode::BadMessage)?;
        let since = asked.since.as_deref().and_then(ResumePoint::parse);
        let rate = asked.max_rate_ms.unwrap_or(0);
        let rate = u32::try_from(rate).ok().filter(|&ms| u64::from(ms) <= crate::limits::MAX_RATE_MS_MAX);
        let rate = rate.ok_or_else(|| {
            let detail = format!("max_rate_ms is at most {}", crate::limits::MAX_RATE_MS_MAX);
            Refusal::new(ErrorCode::BadMessage, detail)
        })?;
        let format = asked.format.unwrap_or(Format::Patch);
        self.subscribe(index, &key, format, since, rate, Cause::Asked(asked.id.as_ref()))
    }

    /// `unsubscribe`, from a `/v1/ws` connection.
    pub(super) fn asked_to_unsubscribe(&mut self, index: u32, stream: &str, id: Option<&ClientId>) {
        let normal = crate::stream::template::parse_stream_name(stream)
            .map_or_else(|_| stream.to_owned(), |(id, params)| crate::stream::template::stream_name(&id, &params));
        let held = self.holds(index, &normal).map(|slot| (slot, normal)).or_else(|| {
            // Parameters that the stream does not have were passed over when it was subscribed to.
            let (id, params) = crate::stream::template::parse_stream_name(stream).ok()?;
            let open = self.connections.at(index)?.open()?;
            let key = self.resolve(&open.grant, id.as_str(), &params).ok()?;
            Some((self.holds(index, &key.name)?, key.name.to_string()))
        });
        match held {
            Some((slot, normal)) => {
                self.unsubscribe_slot(index, slot);
                self.count_watching(index);
                self.tell(index, "unsubscribed", |out| {
                    message::write_unsubscribed(out, &normal, UnsubscribedReason::Requested, id)
                });
            }
            None => {
                let detail = "the connection does not hold this stream";
                self.tell_error(index, ErrorCode::StreamNotFound, detail, id, Some(stream));
            }
        }
    }

    /// Checks every subscription of a connection against its grant and the configuration: those that select another
    /// stream now are moved, those that select none end.
    pub(super) fn rejudge_subscriptions(&mut self, index: u32) {
        let Some(open) = self.connections.at(index).and_then(|connection| connection.open()) else { return };
        let single = open.single;
        let slots: Vec<(u16, Slot)> = open.subscriptions.iter().map(|(no, slot)| (no, *slot)).collect();
        let mut forbidden = false;
        for (slot, entry) in slots {
            let Some(open) = self.connections.at(index).and_then(|connection| connection.open()) else { return };
            let Some(topic) = self.topics.at(entry.topic) else { continue };
            let key = Arc::clone(&topic.key);
            let format = RenditionKind::from_index(usize::from(entry.kind)).format;
            let is_current = self.options.catalog.is_current(&key);
            match self.resolve_again(&open.grant, &key) {
                Ok(same) if *same == *key => {}
                Ok(other) => {
                    let log =
                        topic.renditions[usize::from(entry.kind)].as_ref().filter(|_| !entry.rated && !entry.pending);
                    let reader = log.and_then(|log| Some((log, log.subscribers.get(entry.position as usize)?)));
                    let untold = reader.is_some_and(|(log, reader)| reader.cursor < log.status_end);
                    let holder = self.key_of(index).map(|connection| (connection, slot));
                    let was_live = !untold
                        && topic.status.is_none_or(|status| status.state == StreamState::Live)
                        && !holder.is_some_and(|holder| topic.untold.contains(&holder));
                    self.unsubscribe_slot(index, slot);
                    self.yield_place(self.keeper_of(index, &key, entry.counted), &key);
                    let cause = if is_current { Cause::Moved } else { Cause::Changed };
                    match self.subscribe(index, &other, format, None, entry.max_rate_ms, cause) {
                        Ok(()) if was_live => {}
                        Ok(()) => self.tell_when_known(index, &other),
                        Err(refusal) if refusal.code == ErrorCode::TooManyStreams => {
                            if self.tell_passing(index, &key.name, &refusal) {
                                return;
                            }
                        }
                        Err(refusal) => {
                            forbidden = true;
                            self.tell_unsubscribed(index, &key.name, UnsubscribedReason::Forbidden);
                            let name = Arc::clone(&key.name);
                            self.tell_error(index, refusal.code, &refusal.detail, None, Some(&name));
                        }
                    }
                }
                // The token may have it, of which the grant has kept less: the next one has what templates name now.
                Err(refusal)
                    if refusal.code == ErrorCode::ClaimMissing
                        && !is_current
                        && self.options.catalog.names_registered_claims(&key.target.options.id) =>
                {
                    self.unsubscribe_slot(index, slot);
                    let detail = "the stream was configured anew: ask again";
                    if self.tell_passing(index, &key.name, &Refusal::new(ErrorCode::StreamUnavailable, detail)) {
                        return;
                    }
                }
                Err(_) => {
                    let ended = self.has_ended(&open.grant, &key);
                    forbidden |= !ended;
                    if ended {
                        let wall = self.now.wall;
                        let status = Status { state: StreamState::Ended, code: None, status: None, retry_in: None };
                        self.tell(index, "stream_status", |out| write_status(out, &key.name, &status, wall));
                    }
                    self.unsubscribe_slot(index, slot);
                    if single {
                        let reason = if ended { CloseReason::StreamEnded } else { CloseReason::Forbidden };
                        return self.close(index, reason);
                    }
                    self.tell_unsubscribed(
                        index,
                        &key.name,
                        if ended { UnsubscribedReason::StreamEnded } else { UnsubscribedReason::Forbidden },
                    );
                }
            }
        }
        self.count_watching(index);
        let left = self.connections.at(index).and_then(|c| c.open()).map_or(0, |open| open.subscriptions.len());
        // A stream that has ended is no right lost: the connection may subscribe to others.
        if forbidden && left == 0 {
            self.close(index, CloseReason::Forbidden);
        }
    }

    /// What was told of the stream that a subscription has been moved from may not be true of `key`, to which it was moved: its
    /// state is told when there is one.
    fn tell_when_known(&mut self, index: u32, key: &StreamKey) {
        let (Some(connection), Some(slot)) = (self.key_of(index), self.holds(index, &key.name)) else { return };
        let slots = self.connections.at(index).and_then(|connection| connection.open()).map(|open| &open.subscriptions);
        let Some(topic) = slots.and_then(|slots| slots.at(slot)).map(|slot| slot.topic) else { return };
        if let Some(topic) = self.topics.at_mut(topic) {
            topic.untold.insert((connection, slot));
        }
        self.tell_known(topic);
    }

    /// Tells those who believe otherwise that a stream is live, once a poll has shown it. That it is not is told to all.
    fn tell_known(&mut self, index: u32) {
        let Some(topic) = self.topics.at_mut(index).filter(|topic| !topic.untold.is_empty()) else { return };
        let Some(status) = topic.status.filter(|status| status.state != StreamState::Live || topic.fresh) else {
            return;
        };
        let (name, wall) = (Arc::clone(&topic.key.name), self.now.wall);
        let untold = std::mem::take(&mut topic.untold);
        if status.state != StreamState::Live {
            return;
        }
        for (connection, _) in untold {
            if let Some(connection) = self.still(connection) {
                self.tell(connection, "stream_status", |out| write_status(out, &name, &status, wall));
            }
        }
    }

    /// A subscription was given up for what passes by itself: the client may ask for it again. Whether that was all that the
    /// connection was for, and ends it.
    fn tell_passing(&mut self, index: u32, name: &str, refusal: &Refusal) -> bool {
        self.tell_error(index, refusal.code, &refusal.detail, None, Some(name));
        self.count_watching(index);
        let single = self.connections.at(index).and_then(|c| c.open()).is_some_and(|open| open.single);
        if single {
            self.close(index, CloseReason::Overloaded);
        }
        single
    }

    fn tell_unsubscribed(&mut self, index: u32, name: &str, reason: UnsubscribedReason) {
        self.tell(index, "unsubscribed", |out| message::write_unsubscribed(out, name, reason, None));
    }

    /// The owner has told the state of a stream.
    pub(super) fn attached(&mut self, key: &Arc<StreamKey>, history: History, status: Status, fresh: bool) {
        let Some(&index) = self.topic_of.get(key) else { return };
        let Some(topic) = self.topics.at_mut(index) else { return };
        let other = |old: &History| old.epoch() != history.epoch() || old.head() != history.head();
        let renewed = topic.history.as_ref().is_some_and(other);
        let before = topic.status.replace(status).map(|before| before.state);
        // Whoever read on from the old copy was told its state.
        let untold = before.is_some_and(|before| before != status.state);
        topic.history = Some(history);
        topic.fresh = fresh;
        if renewed {
            let mut dirty = Vec::new();
            for rendition in topic.renditions.iter_mut().flatten() {
                rendition.restart(untold);
                dirty.push(rendition.kind().number());
            }
            for kind in dirty {
                self.mark_dirty(index, kind);
            }
            if untold {
                self.tell_rated(index, &status);
            }
        } else if untold {
            self.tell_status(index, &status);
        }
        let Some(topic) = self.topics.at_mut(index) else { return };
        for pending in std::mem::take(&mut topic.pending) {
            self.start(pending);
        }
        self.tell_known(index);
        self.answer_waiters(index);
    }

    /// The owner cannot take on a stream. `full`: for there are as many as there may be.
    pub(super) fn refused(&mut self, key: &Arc<StreamKey>, full: bool) {
        let Some(&index) = self.topic_of.get(key) else { return };
        let Some(topic) = self.topics.at_mut(index) else { return };
        if full && topic.moved {
            // Whoever was first to ask for it was not moved there, and others who were have come since.
            return self.ask_for_copy(index, key);
        }
        // The copy may have been there already, and those who went on with it would never hear of a change again.
        let readers = topic.renditions.iter().flatten().flat_map(|rendition| {
            let rated = rendition.rated.iter().map(|reader| (reader.connection, reader.slot));
            rendition.subscribers.iter().map(|reader| (reader.connection, reader.slot)).chain(rated)
        });
        let mut held: Vec<(u32, u16)> = readers.collect();
        let pending = std::mem::take(&mut topic.pending);
        let waiters = std::mem::take(&mut topic.waiters);
        let detail = "the server holds as many streams as it may, or as much of them";
        for waiter in waiters {
            // The server's bound, not the caller's: 503, where that of a subject is 429.
            let refusal = Refusal::new(ErrorCode::TooManyStreams, detail).with_status(503).retry_after(10);
            self.refuse_waiter(waiter, refusal);
        }
        held.extend(pending.iter().filter_map(|pending| Some((self.still(pending.connection)?, pending.slot))));
        for (connection, slot) in held {
            let name = Arc::clone(&key.name);
            self.unsubscribe_slot(connection, slot);
            self.tell_passing(connection, &name, &Refusal::new(ErrorCode::TooManyStreams, detail));
        }
        if self.topics.at(index).is_some_and(|topic| topic.watchers == 0) {
            self.forget_topic(index);
        }
    }

    /// The owner has cut the history of a stream.
    pub(super) fn trimmed(&mut self, key: &Arc<StreamKey>, bytes: u64) {
        let Some(&index) = self.topic_of.get(key) else { return };
        if let Some(history) = self.topics.at_mut(index).and_then(|topic| topic.history.as_mut()) {
            history.trim_to(bytes);
        }
    }

    /// The owner has forgotten a stream that is still known here.
    pub(super) fn evicted(&mut self, key: &Arc<StreamKey>) {
        let Some(&index) = self.topic_of.get(key) else { return };
        let Some(topic) = self.topics.at_mut(index) else { return };
        if topic.watchers == 0 {
            self.forget_topic(index);
            return;
        }
        // A watcher came while it was on its way: ask again.
        self.ask_for_copy(index, key);
    }

    /// Asks the owner of a stream that is watched here for its history, and that it be held if it is not.
    fn ask_for_copy(&mut self, index: u32, key: &Arc<StreamKey>) {
        let Some(topic) = self.topics.at(index) else { return };
        let (payer, moved) = (topic.payer.map(|(_, payer)| payer), topic.moved);
        let watch = Mail::Watch { key: Arc::clone(key), from: self.core, attach: true, payer, moved };
        self.send(key.owner(self.cores), watch);
    }

    /// The owner has published an event.
    pub(super) fn published(&mut self, key: &Arc<StreamKey>, event: &Event) {
        let Some(&index) = self.topic_of.get(key) else { return };
        let Some(topic) = self.topics.at_mut(index) else { return };
        let Some(history) = &mut topic.history else { return };
        let next = history.head().unwrap_or(Seq(0)).next();
        if event.seq() != next {
            if event.seq() > next {
                self.copy_anew(index, key);
            }
            return;
        }
        history.adopt(event.clone());
        let mut dirty = Vec::new();
        topic.append(event, &mut self.encoder, &mut |kind| dirty.push(kind));
        for kind in dirty {
            self.mark_dirty(index, kind);
        }
        self.answer_waiters(index);
    }

    /// An event was lost on its way: the copy is fetched anew, and readers get the newest.
    fn copy_anew(&mut self, index: u32, key: &Arc<StreamKey>) {
        if self.topics.at(index).is_some_and(|topic| topic.watchers > 0) {
            return self.ask_for_copy(index, key);
        }
        self.forget_topic(index);
        self.send(key.owner(self.cores), Mail::Detach { key: Arc::clone(key), from: self.core });
    }

    /// The owner has ended a poll. `fresh`: what it has brought was taken in. `head`: where its history ends.
    pub(super) fn polled(
        &mut self,
        key: &Arc<StreamKey>,
        status: Status,
        (changed, fresh): (bool, bool),
        head: Option<ResumePoint>,
    ) {
        let Some(&index) = self.topic_of.get(key) else { return };
        let Some(topic) = self.topics.at_mut(index) else { return };
        topic.status = Some(status);
        // Another event, by which it would be noticed, may not come for long.
        let is_behind = topic.history.as_ref().is_some_and(|copy| copy.point() != head);
        topic.fresh |= fresh && !is_behind;
        if changed {
            self.tell_status(index, &status);
        }
        if is_behind {
            self.copy_anew(index, key);
        }
        self.tell_known(index);
        self.answer_waiters(index);
    }

    /// Tells a status to all readers of a topic.
    fn tell_status(&mut self, index: u32, status: &Status) {
        let wall = self.now.wall;
        let Some(topic) = self.topics.at_mut(index) else { return };
        let mut text = Vec::new();
        write_status(&mut text, &topic.key.name, status, wall);
        let mut dirty = Vec::new();
        topic.append_control(
            &|kind, out| frame::write_control(kind.transport, "stream_status", &text, out),
            &mut |kind| dirty.push(kind),
        );
        self.tell_rated(index, status);
        for kind in dirty {
            self.mark_dirty(index, kind);
        }
    }

    /// Tells a status to the rated readers of a topic: they get events one by one, not what stands between them.
    fn tell_rated(&mut self, topic: u32, status: &Status) {
        let wall = self.now.wall;
        let Some(topic) = self.topics.at(topic) else { return };
        let name = Arc::clone(&topic.key.name);
        let rated: Vec<u32> =
            topic.renditions.iter().flatten().flat_map(|r| r.rated.iter().map(|rated| rated.connection)).collect();
        for connection in rated {
            self.tell(connection, "stream_status", |out| write_status(out, &name, status, wall));
        }
    }
}

/// Appends `stream_status`.
pub(super) fn write_status(out: &mut Vec<u8>, name: &str, status: &Status, ts: WallTime) {
    let retry_in_ms = status.retry_in.map(|wait| u64::try_from(wait.as_millis()).unwrap_or(u64::MAX));
    let code = status.code.map(UpstreamCode::as_str);
    let frame =
        message::StreamStatus { stream: name, state: status.state, code, status: status.status, retry_in_ms, ts };
    message::write_stream_status(out, &frame);
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use crate::shard::actions::tests::Hall;

    #[test]
    fn what_waits_of_one_view_for_a_socket_is_not_sent_once_the_caller_has_moved_to_another() {
        let mut hall = Hall::new(
            r#"
            [[stream]]
            id = "leads"
            url = "http://api/leads"
            interval = "1h"
            [[stream.view]]
            roles = ["agent"]
            pointers = ["/name"]
            [[stream.view]]
            roles = ["admin"]
            pointers = [""]
            "#,
        );
        let (admin, ada) =
            (hall.open("/v1/ws", json!({"role": "admin"})), hall.open("/v1/ws", json!({"role": "admin"})));
        let subscribe = || json!({"type": "subscribe", "stream": "leads"});
        hall.say(admin, subscribe());
        hall.poll_all(r#"{"name":"Ada","ssn":1}"#);
        assert!(hall.frames(admin).iter().any(|frame| frame["data"]["ssn"] == 1), "there is a value");
        hall.stall();
        hall.say(ada, subscribe());
        let token = hall.token(json!({"role": "agent"}));
        hall.say(ada, json!({"type": "auth_update", "token": token}));
        hall.take_again(ada);
        let frames = hall.frames(ada);
        let kinds: Vec<&Value> = frames.iter().map(|frame| &frame["type"]).collect();
        assert_eq!(kinds, ["subscribed", "auth_ok", "snapshot"], "{frames:?}");
        assert_eq!(frames[2]["data"], json!({"name": "Ada"}));
    }
}
