//! Ephemeral sessions where processes share a store: made there, taken up by whichever process is shown the token, kept there
//! as long as a connection anywhere lives by them, ended for all.
//!
//! Source: protocol version 1, section 6; ARCHITECTURE.md («Ephemeral sessions»). The store's word counts: a process believes
//! what it knows of a session only while connections of its own live by it, and is asked to forget it by the control stream,
//! or by the next pass over those that it keeps. A store that has lost a session that somebody watches is given it back.
//! Memory: an entry for each session that is asked for, with those who wait, and what a pass is still to look at: at most the
//! sessions with connections on this core. Errors: [`Refusal`]; what cannot be said now is 503.
//! Not here: what stands there (`auth::ephemeral_record`), how it gets there (`runtime::redis`), whose a session is
//! (`ephemeral`).

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use ring::digest;

use crate::auth::control::ControlEntry;
use crate::auth::ephemeral::{DirectKey, Place};
use crate::auth::ephemeral_record::{SessionFace, SessionRequest, SharedSession};
use crate::auth::grant::{GrantRecord, TokenMark};
use crate::auth::keys::Key;
use crate::codec::message::ErrorCode;
use crate::connection::handshake::{Refusal, SeenAs};
use crate::connection::{Phase, Reply};
use crate::ids::{ConnectionKey, EphemeralId};
use crate::limits::{EPHEMERAL_PASS, EPHEMERALS_GIVEN_BACK, EPHEMERALS_MAX, EPHEMERALS_PER_LOOKUP};
use crate::limits::{LOOKUP_TIMEOUT, LOOKUP_WAITERS_MAX};
use crate::secret::Secret;

use super::ephemeral::{Told, refused, unknown};
use super::ephemeral_table::{Ephemeral, Over};
use super::lookup::{
    Asked, EphemeralAsk, EphemeralFound, EphemeralHeld, EphemeralMake, EphemeralStanding, FaceAsked, Found, Held,
    Looked, Lookup, Order, Sharing, TakingUp, Waiter,
};
use super::{Output, Shard, Timer};

/// What a core asks about sessions that processes share.
#[derive(Debug, Default)]
pub(super) struct SharedSessions {
    /// The number of the question that is out for a session's record.
    asked: HashMap<EphemeralId, u64>,
    /// Those that the pass is still to look at,
    todo: VecDeque<EphemeralId>,
    /// those that the store has lost,
    lost: VecDeque<EphemeralId>,
    /// and whether a question of the pass is out.
    passing: bool,
    /// Whether the next pass has its timer.
    timed: bool,
}

fn unavailable() -> Refusal {
    let detail = "the store of sessions does not answer";
    Refusal::new(ErrorCode::SessionStoreUnavailable, detail).because("session_store_unavailable").retry_after(2)
}

impl Shard {
    /// What names in direct mode are made under: processes that share a store share it where they share a secret.
    pub(super) fn direct_key(&self) -> DirectKey {
        let secret = self.options.catalog.direct().and_then(|direct| direct.secret.as_ref());
        let shared = match secret {
            Some(secret) => Some(DirectKey::of_secret(secret)),
            None => {
                let keys = &self.options.auth.jwt.keys;
                keys.iter().find_map(|key| Key::derived(key, b"restcast: direct mode, 1")).map(DirectKey::of_bits)
            }
        };
        let own = || DirectKey::of_bits(self.rng.secret("direct mode"));
        shared.filter(|_| self.options.auth.store).unwrap_or_else(own)
    }

    /// Where the sessions of whoever has `maker` are counted: another place after a logout, which has ended those before.
    fn counted_at(&self, maker: &GrantRecord) -> String {
        let out = maker
            .sub
            .as_deref()
            .filter(|_| maker.api_key.is_none())
            .and_then(|sub| self.ledger.marks().logged_out_at(maker.rights.issuer.as_deref(), sub, self.now.wall));
        let key = maker.api_key.as_ref().map(|mark| (mark.id.as_str(), mark.bits));
        let mut context = digest::Context::new(&digest::SHA256);
        let mut add = |part: Option<&[u8]>| {
            context.update(&part.map_or(u64::MAX, |part| part.len() as u64).to_le_bytes());
            context.update(part.unwrap_or_default());
        };
        add(Some(b"restcast: sessions of one maker, 1"));
        add(maker.rights.issuer.as_deref().map(str::as_bytes));
        add(maker.sub.as_deref().map(str::as_bytes));
        add(token_of(maker).map(|token| token.bits().to_le_bytes()).as_ref().map(<[u8; 8]>::as_slice));
        add(key.map(|(id, _)| id.as_bytes()));
        add(key.map(|(_, bits)| bits.to_le_bytes()).as_ref().map(<[u8; 8]>::as_slice));
        add(out.map(|at| at.as_micros().to_le_bytes()).as_ref().map(<[u8; 8]>::as_slice));
        context.finish().as_ref().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
    }

    /// The record of a session; `None`: what its maker may do is too long for one.
    fn record_of(&mut self, session: &Ephemeral, counted: &str) -> Option<Secret> {
        let (maker, target) = (&session.maker, &session.key.target);
        let options = &target.options;
        let shared = SharedSession {
            face: SessionFace {
                sub: maker.sub.as_deref().map(str::to_owned),
                issuer: maker.rights.issuer.as_deref().map(str::to_owned),
                api_key: maker.api_key.as_ref().map(|mark| mark.id.clone()),
                token: token_of(maker),
                stream: session.key.name.to_string(),
                counted: counted.to_owned(),
                made: session.made,
                ends: session.ends_at,
            },
            request: SessionRequest {
                url: target.url.as_str().to_owned(),
                post: options.method == "POST",
                interval_ms: u64::try_from(options.interval.as_millis()).unwrap_or(u64::MAX),
                select: session.key.facet.select.as_ref().map(|select| select.as_str().to_owned()),
                headers: options.headers.clone(),
                body: target.body.as_ref().map(|body| Secret::new(body.to_vec())),
                maker: maker.clone(),
            },
        };
        let salts = [self.rng.u128().to_le_bytes(), self.rng.u128().to_le_bytes()];
        shared.seal(&session.token, session.id, salts)
    }

    /// The session of that record, which is good here.
    fn session_of(&self, id: EphemeralId, token: &Secret, record: &Secret) -> Result<Ephemeral, Refusal> {
        let shared = SharedSession::open(record.expose_secret(), token, id).ok_or_else(unknown)?;
        let (now, face) = (self.now, &shared.face);
        if face.ends <= now.wall {
            return Err(unknown());
        }
        let (maker, counted) = (shared.request.maker.clone(), Some(face.counted.as_str().into()));
        let (made, ends_at) = (face.made, face.ends);
        Ok(Ephemeral {
            id,
            token: token.clone(),
            holder: self.ledger.holder("shared session", id.0),
            maker,
            dedupe_key: None,
            made,
            ends: now.instant_of(ends_at),
            ends_at,
            counted,
            key: self.described_elsewhere(shared)?,
        })
    }

    /// A session as the store is told of it; `None`: it is this process's own.
    fn told_of(&self, session: &Ephemeral, keep: Duration) -> Option<EphemeralHeld> {
        let left = session.ends_at.since(self.now.wall);
        let counted = session.counted.as_deref()?.to_owned();
        Some(EphemeralHeld { place: Place::of(session.id), counted, left, keep: keep.min(left), record: None })
    }

    /// Has the store told, where there is room for that: what is left out the next pass makes good.
    fn tell_store(&mut self, ask: EphemeralAsk, asked: Asked) {
        if self.may_look_up().is_ok() {
            self.look_up_surely(Lookup::Ephemeral(ask), asked);
        }
    }

    /// A request waits for the store.
    fn wait_for_store(&mut self, index: u32, ask: u64, reply: Reply) {
        let deadline = self.now.at + LOOKUP_TIMEOUT;
        if let Some(http) = self.http_mut(index) {
            http.phase = Phase::Asking { ask, reply };
            http.deadline = deadline;
            self.arm(index);
        }
    }

    /// The request that waits for that answer, and how to answer it.
    fn waits_for(&mut self, connection: ConnectionKey, ask: u64) -> Option<(u32, Reply)> {
        let index = self.still(connection)?;
        let waits = |phase: &Phase| matches!(phase, Phase::Asking { ask: asked, .. } if *asked == ask);
        let waits = self.http_mut(index).is_some_and(|http| waits(&http.phase));
        waits.then(|| (index, self.forget_exchange(index)))
    }

    // Made.

    /// Puts a session where processes find it, before it is handed out.
    pub(super) fn share_session(
        &mut self,
        index: u32,
        mut session: Ephemeral,
        seen_as: SeenAs,
        anew: bool,
        reply: Reply,
    ) {
        let Some(connection) = self.key_of(index) else { return };
        if let Err(refusal) = self.may_look_up() {
            return self.refuse(index, &refusal, &reply);
        }
        let counted = self.counted_at(&session.maker);
        let Some(record) = self.record_of(&session, &counted) else {
            return self.make_own_session(index, session, &seen_as, &reply);
        };
        let key = self.ledger.direct_key();
        let salt = self.rng.u128().to_le_bytes();
        let named = session.dedupe_key.as_deref().map(|name| {
            let place = key.named_place([counted.as_bytes(), name.as_bytes()]);
            (place, Secret::new(key.seal_named(&session.token, session.id, salt)))
        });
        let in_all = u32::try_from(EPHEMERALS_MAX).unwrap_or(u32::MAX);
        let make = EphemeralMake {
            place: Place::of(session.id),
            record,
            counted: counted.clone(),
            life: session.ends_at.since(self.now.wall),
            in_all: match self.options.limits.streams {
                0 => in_all,
                streams => streams.min(in_all),
            },
            each: self.options.catalog.direct().map_or(0, |direct| direct.sessions_per_subject),
            named,
            anew,
        };
        session.counted = Some(counted.into());
        let asked = Asked::Shared(connection, Box::new(Sharing { session, seen_as, anew }));
        let ask = self.look_up_surely(Lookup::Ephemeral(EphemeralAsk::Make(Box::new(make))), asked);
        self.wait_for_store(index, ask, reply);
    }

    /// The store has taken a session, or has one of that name, or has not.
    pub(super) fn session_shared(&mut self, connection: ConnectionKey, ask: u64, sharing: Sharing, found: Found) {
        let Some((index, reply)) = self.waits_for(connection, ask) else { return };
        let Sharing { session, seen_as, anew } = sharing;
        let Found::Ephemeral(found) = found else { return self.refuse(index, &unavailable(), &reply) };
        match found {
            EphemeralFound::Made => {
                let told = Told { id: session.id, stream: &session.key.name, ends_at: session.ends_at };
                self.hand_out_session(index, told, &session.token, true, &seen_as, &reply);
            }
            EphemeralFound::Same { named, record } => {
                let opened = self.ledger.direct_key().open_named(named.expose_secret());
                let same = opened.and_then(|(token, id)| {
                    SharedSession::open(record.expose_secret(), &token, id).map(|shared| (token, id, shared))
                });
                if let Some((token, id, SharedSession { face, request })) = same {
                    let good = face.is_of(&session.maker) && face.ends > self.now.wall;
                    if good && self.maker_gone(&request.maker, face.made).is_none() {
                        let told = Told { id, stream: &face.stream, ends_at: face.ends };
                        return self.hand_out_session(index, told, &token, false, &seen_as, &reply);
                    }
                    self.end_record(id, &face);
                }
                if anew {
                    return self.refuse(index, &unavailable(), &reply);
                }
                self.share_session(index, session, seen_as, true, reply);
            }
            EphemeralFound::TooMany => self.refuse(index, &refused(Over::Process), &reply),
            EphemeralFound::TooManyOfOne => self.refuse(index, &refused(Over::Subject), &reply),
            _ => self.refuse(index, &unavailable(), &reply),
        }
    }

    // Opened.

    /// The token of a session that is not known here is presented. Who comes while it is being asked for shares the answer.
    pub(super) fn take_up_session(&mut self, id: EphemeralId, token: &Secret, waiter: Waiter) -> Looked {
        if let Some(ask) = self.shared_sessions.asked.get(&id)
            && let Some(Asked::TakenUp(taking)) = self.looked_up.get_mut(ask)
        {
            if taking.waiting.len() >= LOOKUP_WAITERS_MAX {
                let detail = "too many requests wait for this session";
                return Looked::Now(waiter, Err(Refusal::new(ErrorCode::Overloaded, detail).retry_after(2)));
            }
            self.ask_no += 1;
            taking.waiting.push((self.ask_no, waiter));
            return Looked::Later(self.ask_no);
        }
        if let Err(refusal) = self.may_look_up() {
            return Looked::Now(waiter, Err(refusal));
        }
        self.ask_no += 1;
        let no = self.ask_no;
        let taking = TakingUp { id, token: token.clone(), waiting: vec![(no, waiter)] };
        let lookup = Lookup::Ephemeral(EphemeralAsk::Read(Place::of(id)));
        let ask = self.look_up_surely(lookup, Asked::TakenUp(Box::new(taking)));
        self.shared_sessions.asked.insert(id, ask);
        Looked::Later(no)
    }

    /// The record of a session that was presented: what becomes of each who has presented it.
    pub(super) fn session_taken_up(&mut self, taking: TakingUp, found: Found) -> Vec<(Option<ConnectionKey>, Looked)> {
        let TakingUp { id, token, waiting } = taking;
        self.shared_sessions.asked.remove(&id);
        let session = self.taken_up(id, &token, found);
        let mut outcomes = Vec::with_capacity(waiting.len());
        for (no, waiter) in waiting {
            if !self.is_waited_for(no, &waiter) {
                continue;
            }
            let request = waiter.request();
            let looked = match &session {
                Ok(session) => self.look_at_session(session.clone(), waiter),
                Err(refusal) => Looked::Now(waiter, Err(refusal.clone())),
            };
            outcomes.push((request, looked));
        }
        outcomes
    }

    fn taken_up(&mut self, id: EphemeralId, token: &Secret, found: Found) -> Result<Ephemeral, Refusal> {
        let here = self.ledger.ephemerals().find(id);
        match found {
            Found::Ephemeral(EphemeralFound::Record(Some(record))) => {
                let session = self.session_of(id, token, &record)?;
                let ends = session.ends;
                let (session, new) = self.ledger.ephemerals().take_up(session, self.now.at).map_err(refused)?;
                if new {
                    self.set_timer(ends, Timer::Ephemeral { id });
                    self.set_timer(self.now.at + LOOKUP_TIMEOUT + self.direct_linger(), Timer::Ephemeral { id });
                }
                Ok(session)
            }
            // Somebody has opened it meanwhile: what is missing is given back.
            Found::Ephemeral(_) if self.ledger.ephemerals().is_watched(id) => here.ok_or_else(unknown),
            Found::Ephemeral(_) => {
                // Connections may live by it that do not watch.
                if here.is_some() {
                    self.end_session_here(id);
                }
                Err(unknown())
            }
            // Who lost a connection a moment ago gets it back also while the store is away.
            _ => {
                let lives = !self.ledger.ephemerals().is_over(id, self.now, self.direct_linger());
                here.filter(|_| lives).ok_or_else(unavailable)
            }
        }
    }

    // Told of and ended by its maker.

    /// The maker of a session wants something of it.
    pub(super) fn ask_for_face(&mut self, index: u32, asked: FaceAsked, reply: Reply) {
        let Some(connection) = self.key_of(index) else { return };
        if let Err(refusal) = self.may_look_up() {
            return self.refuse(index, &refusal, &reply);
        }
        let lookup = Lookup::Ephemeral(EphemeralAsk::Read(Place::of(asked.id)));
        let ask = self.look_up_surely(lookup, Asked::Face(connection, Box::new(asked)));
        self.wait_for_store(index, ask, reply);
    }

    /// The record of that session, or none.
    pub(super) fn session_told(&mut self, connection: ConnectionKey, ask: u64, asked: &FaceAsked, found: Found) {
        let Some((index, reply)) = self.waits_for(connection, ask) else { return };
        let FaceAsked { id, asker, seen_as, end } = asked;
        let here = self.ledger.ephemerals().find(*id).filter(|session| session.is_of(asker));
        let face = match found {
            Found::Ephemeral(EphemeralFound::Record(Some(record))) => {
                let face = SessionFace::open(record.expose_secret(), *id);
                face.filter(|face| face.is_of(asker) && face.ends > self.now.wall)
            }
            // One that has been lost there, and goes on here.
            Found::Ephemeral(_) => here.filter(|_| self.ledger.ephemerals().is_watched(*id)).map(|here| face_of(&here)),
            _ => match here.filter(|_| !*end) {
                Some(here) => Some(face_of(&here)),
                None => return self.refuse(index, &unavailable(), &reply),
            },
        };
        let Some(face) = face else { return self.tell_session(index, None, seen_as, &reply) };
        if !*end {
            let told = Told { id: *id, stream: &face.stream, ends_at: face.ends };
            return self.tell_session(index, Some(told), seen_as, &reply);
        }
        if let Err(refusal) = self.may_look_up() {
            return self.refuse(index, &refusal, &reply);
        }
        let lookup = Lookup::Ephemeral(EphemeralAsk::End(self.held_by_face(*id, &face)));
        let ask = self.look_up_surely(lookup, Asked::Ended(connection, *id));
        self.wait_for_store(index, ask, reply);
    }

    fn held_by_face(&self, id: EphemeralId, face: &SessionFace) -> EphemeralHeld {
        let left = face.ends.since(self.now.wall);
        EphemeralHeld { place: Place::of(id), counted: face.counted.clone(), left, keep: left, record: None }
    }

    /// The store has ended a session, or cannot.
    pub(super) fn session_was_ended(&mut self, connection: ConnectionKey, ask: u64, id: EphemeralId, found: &Found) {
        let ended = matches!(found, Found::Ephemeral(_));
        if ended {
            self.publish_end(id);
            self.end_session_here(id);
        }
        let Some((index, reply)) = self.waits_for(connection, ask) else { return };
        match ended {
            true => self.confirm_end(index, &reply),
            false => self.refuse(index, &unavailable(), &reply),
        }
    }

    fn publish_end(&mut self, id: EphemeralId) {
        let entry = ControlEntry::ephemeral_ended(Place::of(id), self.now.wall);
        self.outputs.push_back(Output::Order(Order::Publish(entry)));
    }

    /// Has other processes end a session.
    pub(super) fn end_session_elsewhere(&mut self, session: &Ephemeral) {
        if let Some(held) = self.told_of(session, Duration::MAX) {
            self.tell_store(EphemeralAsk::End(held), Asked::Told);
            self.publish_end(session.id);
        }
    }

    /// The same by what its maker is told of it.
    fn end_record(&mut self, id: EphemeralId, face: &SessionFace) {
        self.tell_store(EphemeralAsk::End(self.held_by_face(id, face)), Asked::Told);
        self.publish_end(id);
        self.end_session_here(id);
    }

    // Kept.

    /// The first connection of this process lives by a session.
    pub(super) fn hold_session(&mut self, id: EphemeralId) {
        self.hold_sessions(vec![id], false, false);
    }

    /// The last one does no more.
    pub(super) fn let_go_of_session(&mut self, id: EphemeralId) {
        // Who is told to connect again is to find it there, wherever that is.
        if self.draining.is_some() {
            return;
        }
        let linger = self.direct_linger();
        let session = self.ledger.ephemerals().find(id);
        if let Some(session) = session.and_then(|session| self.told_of(&session, linger)) {
            let process = self.ledger.process();
            self.tell_store(EphemeralAsk::Leave { process, session }, Asked::Left(id));
        }
    }

    /// The store knows that nobody here watches. What has changed meanwhile may have reached it before that.
    pub(super) fn session_left(&mut self, id: EphemeralId) {
        if self.ledger.ephemerals().is_watched(id) {
            self.hold_session(id);
        }
    }

    /// Whether anything was asked.
    fn hold_sessions(&mut self, ids: Vec<EphemeralId>, given_back: bool, of_pass: bool) -> bool {
        let keep = crate::limits::EPHEMERAL_HOLD + self.direct_linger();
        let (mut sessions, mut held) = (Vec::new(), Vec::new());
        for id in ids {
            let Some(session) = self.ledger.ephemerals().find(id) else {
                self.session_ended(id);
                continue;
            };
            let Some(mut one) = self.told_of(&session, keep) else { continue };
            if given_back {
                one.record = self.record_of(&session, &one.counted);
            }
            sessions.push(id);
            held.push(one);
        }
        if held.is_empty() || self.may_look_up().is_err() {
            return false;
        }
        let ask = EphemeralAsk::Hold { process: self.ledger.process(), sessions: held };
        self.look_up_surely(Lookup::Ephemeral(ask), Asked::Held(Held { sessions, given_back, of_pass }));
        true
    }

    /// The store has been told which sessions have connections here.
    pub(super) fn sessions_held(&mut self, held: &Held, found: &Found) {
        let Found::Ephemeral(EphemeralFound::Held(standings)) = found else {
            if held.of_pass {
                // It will say when it is there again; and there is the next pass.
                self.shared_sessions.passing = false;
                self.shared_sessions.todo.clear();
                self.shared_sessions.lost.clear();
            }
            return;
        };
        for (&id, standing) in held.sessions.iter().zip(standings) {
            match standing {
                EphemeralStanding::There if !self.ledger.ephemerals().is_watched(id) => self.let_go_of_session(id),
                EphemeralStanding::There => {}
                EphemeralStanding::Lost if held.given_back => {}
                // It ended while a connection lived by it here without watching: whoever asks for it now comes too late.
                EphemeralStanding::Lost if !held.of_pass => self.end_session_here(id),
                EphemeralStanding::Lost => self.shared_sessions.lost.push_back(id),
                EphemeralStanding::Ended => self.end_session_here(id),
            }
        }
        if held.of_pass {
            self.shared_sessions.passing = false;
        }
        self.go_on_keeping();
    }

    /// Sees to it that what has connections here is told of, again and again.
    pub(super) fn plan_to_keep_ephemerals(&mut self) {
        if self.options.auth.store && !self.shared_sessions.timed {
            self.shared_sessions.timed = true;
            self.set_timer(self.now.at + EPHEMERAL_PASS, Timer::KeepEphemerals);
        }
    }

    /// It is time to.
    pub(super) fn keep_ephemerals_due(&mut self) {
        self.shared_sessions.timed = false;
        if !self.ephemeral_connections.is_empty() {
            self.plan_to_keep_ephemerals();
            self.keep_ephemerals();
        }
    }

    /// Tells the store of all sessions with connections here.
    pub(super) fn keep_ephemerals(&mut self) {
        let living = self.ephemeral_connections.iter();
        let watched = living.filter(|(_, living)| living.iter().any(|one| one.watches));
        self.shared_sessions.todo = watched.map(|(id, _)| *id).collect();
        self.go_on_keeping();
    }

    fn go_on_keeping(&mut self) {
        while !self.shared_sessions.passing {
            let lost = self.shared_sessions.lost.len().min(EPHEMERALS_GIVEN_BACK);
            let ids: Vec<_> = match lost {
                0 => {
                    let some = self.shared_sessions.todo.len().min(EPHEMERALS_PER_LOOKUP);
                    self.shared_sessions.todo.drain(..some).collect()
                }
                some => self.shared_sessions.lost.drain(..some).collect(),
            };
            if ids.is_empty() {
                return;
            }
            self.shared_sessions.passing = self.hold_sessions(ids, lost > 0, true);
        }
    }
}

/// What tells a caller without a user id from others.
fn token_of(maker: &GrantRecord) -> Option<TokenMark> {
    maker.token.filter(|_| maker.sub.is_none())
}

fn face_of(session: &Ephemeral) -> SessionFace {
    SessionFace {
        sub: session.maker.sub.as_deref().map(str::to_owned),
        issuer: session.maker.rights.issuer.as_deref().map(str::to_owned),
        api_key: session.maker.api_key.as_ref().map(|mark| mark.id.clone()),
        token: token_of(&session.maker),
        stream: session.key.name.to_string(),
        counted: session.counted.as_deref().unwrap_or_default().to_owned(),
        made: session.made,
        ends: session.ends_at,
    }
}
