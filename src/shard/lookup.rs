//! What is asked of those outside of the cores, who waits for the answer, and what is done with it. Words for
//! `authenticate`, `sessions` and `tickets`.
//!
//! Source: protocol version 1, sections 2 and 6. Memory: none of its own. Errors: none.

use std::net::IpAddr;
use std::time::Duration;

use crate::auth::control::ControlEntry;
use crate::auth::ephemeral::Place;
use crate::auth::grant::{Grant, GrantRecord};
use crate::auth::jwt::LackedKey;
use crate::auth::sealed::SALT_BYTES;
use crate::auth::session::SessionMark;
use crate::auth::ticket::TicketRecord;
use crate::codec::message::ClientId;
use crate::connection::handshake::{Presented, Refusal, SeenAs};
use crate::ids::{ConnectionId, ConnectionKey, CoreId, EphemeralId, ProcessId, StreamId};
use crate::secret::Secret;
use crate::time::{Instant, Now};

use super::ephemeral_table::Ephemeral;
use super::refresh_mark::Refreshed;

/// A question to somebody outside of the cores: Redis, or whoever fetches key sets. Each is answered by
/// [`super::Input::Found`], within [`crate::limits::LOOKUP_TIMEOUT`] of the shell's own.
#[derive(Clone, Debug)]
pub enum Lookup {
    /// The records of these sessions, by their ids.
    Sessions(Vec<Secret>),
    /// The record of a ticket, which is thereby used up; by the hash that it is kept under.
    TakeTicket(String),
    /// To keep a ticket's record under that hash for so long.
    KeepTicket {
        /// The hash of the ticket.
        hash: String,
        /// What it stands for.
        record: Secret,
        /// Its life.
        life: Duration,
    },
    /// To fetch anew the key set of that issuer, by its place in the configuration; where that was done a moment ago, nothing.
    KeySet(usize),
    /// To ask another process to renew the credential of a connection that it holds.
    Renew {
        /// Which process.
        process: ProcessId,
        /// The connection's core there,
        core: CoreId,
        /// and its place in that core's table.
        index: u32,
        /// The question, sealed for that connection (`auth::renewal`).
        sealed: Vec<u8>,
    },
    /// Something about ephemeral sessions, which processes share.
    Ephemeral(EphemeralAsk),
}

/// What is asked about ephemeral sessions.
#[derive(Clone, Debug)]
pub enum EphemeralAsk {
    /// To put one there, unless its maker has one of that name.
    Make(Box<EphemeralMake>),
    /// The record of one.
    Read(Place),
    /// To keep these: this process has connections that live by them.
    Hold {
        /// Which process.
        process: ProcessId,
        /// Which sessions.
        sessions: Vec<EphemeralHeld>,
    },
    /// This process has none any more. Where no other has, it ends when `keep` has passed.
    Leave {
        /// Which process.
        process: ProcessId,
        /// Which session.
        session: EphemeralHeld,
    },
    /// To end it.
    End(EphemeralHeld),
}

/// A session that is to be put where processes share it.
#[derive(Clone, Debug)]
pub struct EphemeralMake {
    /// Where.
    pub place: Place,
    /// What stands there.
    pub record: Secret,
    /// Where it is counted among its maker's.
    pub counted: String,
    /// Its life.
    pub life: Duration,
    /// How many there may be in all,
    pub in_all: u32,
    /// and of that maker; 0: unlimited.
    pub each: u32,
    /// Where its name stands, and what stands there.
    pub named: Option<(String, Secret)>,
    /// Whether a session that stands under that name is good for nothing any more.
    pub anew: bool,
}

/// A session that stands where processes share it.
#[derive(Clone, Debug)]
pub struct EphemeralHeld {
    /// Where.
    pub place: Place,
    /// Where it is counted among its maker's.
    pub counted: String,
    /// What is left of its life,
    pub left: Duration,
    /// and how much of that it lives on if nothing more is said.
    pub keep: Duration,
    /// Its record, where the store may have lost it.
    pub record: Option<Secret>,
}

/// A question of another process: who has asked, and the number by which it knows its question.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PeerAsk {
    /// Which process.
    pub process: ProcessId,
    /// The number.
    pub ask: u64,
}

/// Something that the store is to do without an answer.
#[derive(Clone, Debug)]
pub enum Order {
    /// To extend a session's life. Where the store is away it is left undone.
    Touch {
        /// The session's id.
        sid: Secret,
        /// Its life from now on.
        life: Duration,
    },
    /// To put an event on the control stream, for the other processes and for those that are away. Where the store is away
    /// it waits for its return.
    Publish(ControlEntry),
    /// To answer another process, which does not wait for long. Where the store is away it is left undone.
    Answer {
        /// What was asked.
        to: PeerAsk,
        /// The answer, sealed; `None`: what was asked about is not here.
        sealed: Option<Vec<u8>>,
    },
    /// To tell all other processes that a hook of that stream has come. Where the store is away it is left undone: they poll
    /// by their interval.
    Hook {
        /// Whose hook it is.
        id: StreamId,
        /// Which, sealed.
        sealed: Vec<u8>,
    },
    /// To tell all other processes that an action has changed what this shows. Where the store is away it is left undone, as
    /// above.
    Refresh(Refreshed),
}

/// A session's record, as Redis holds it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SessionRecord {
    /// Its text.
    pub text: Secret,
    /// How long Redis keeps it, from when it was asked for; `None`: it has no end there.
    pub ttl: Option<Duration>,
}

/// The answer to a [`Lookup`].
#[derive(Clone, Debug)]
pub enum Found {
    /// To [`Lookup::Sessions`]: in the same order; `None`: there is no such session.
    Sessions(Vec<Option<SessionRecord>>),
    /// To [`Lookup::TakeTicket`]; `None`: there is no such ticket.
    Ticket(Option<Secret>),
    /// To [`Lookup::KeepTicket`]: it is kept.
    Kept,
    /// To [`Lookup::KeySet`]: what there is now is in force.
    KeySet,
    /// To [`Lookup::Renew`]: what that process has answered, sealed; `None`: it holds no such connection, or there is no such
    /// process.
    Renewed(Option<Vec<u8>>),
    /// To [`Lookup::Ephemeral`].
    Ephemeral(EphemeralFound),
    /// To any: it cannot be said now.
    Unavailable,
}

/// The answer to an [`EphemeralAsk`].
#[derive(Clone, Debug)]
pub enum EphemeralFound {
    /// To `Make`: it is there.
    Made,
    /// Its maker has one of that name: what stands under that, and its record.
    Same {
        /// What stands under the name.
        named: Secret,
        /// The session's record.
        record: Secret,
    },
    /// There are as many as there may be in all.
    TooMany,
    /// The maker has as many as it may.
    TooManyOfOne,
    /// To `Read`; `None`: there is no such session.
    Record(Option<Secret>),
    /// To `Hold`: in the same order.
    Held(Vec<EphemeralStanding>),
    /// To `Leave` and `End`.
    Done,
}

/// How a session stands that was to be kept.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum EphemeralStanding {
    /// It is there.
    There,
    /// The store knows nothing of it.
    Lost,
    /// It has been ended.
    Ended,
}

/// Who waits for a credential to be looked at.
#[derive(Debug)]
pub(super) enum Waiter {
    /// A request, whose head is kept meanwhile.
    Request(ConnectionKey),
    /// A WebSocket that has sent its first message.
    FirstMessage(ConnectionKey),
    /// An open WebSocket that has sent `auth_update`.
    Update {
        /// Which.
        connection: ConnectionKey,
        /// The id that the answer echoes.
        id: Option<ClientId>,
    },
    /// `POST /v1/connections/{connection}/auth` for a connection of this core.
    Renewal {
        /// Which.
        connection: ConnectionId,
        /// Whom a failure is counted for.
        addr: IpAddr,
        /// Who asks.
        asker: Asker,
    },
}

/// Who asks for the renewal of a connection of this core.
#[derive(Clone, Copy, Debug)]
pub(super) enum Asker {
    /// A core of this process, by that number.
    Core(CoreId, u64),
    /// Another process.
    Peer {
        /// Which, and by which number.
        ask: PeerAsk,
        /// The salt of its question, which the answer is bound to.
        salt: [u8; SALT_BYTES],
        /// Until when it is carried out: later it may have been told to have failed.
        until: Instant,
    },
}

/// What is done with the answer to a [`Lookup`].
#[derive(Debug)]
pub(super) enum Asked {
    /// The tokens are looked at again, with the key set as it is then.
    KeySet(Box<KeyQuestion>),
    /// A session's record is given to all who wait for it.
    Session(Box<Question>),
    /// Sessions that live here go on by their records, or end.
    Reread(Reread),
    /// A ticket has been used, if it was one.
    Ticket(Waiter),
    /// A ticket is kept, and handed out.
    Kept(ConnectionKey, Box<Made>),
    /// Another process has been asked to renew a connection of its own.
    Renewal(PeerRenewal),
    /// An ephemeral session is put where processes share it, and handed out.
    Shared(ConnectionKey, Box<Sharing>),
    /// The record of an ephemeral session is given to all who have presented its token.
    TakenUp(Box<TakingUp>),
    /// The maker of an ephemeral session wants to be told of it, or to end it.
    Face(ConnectionKey, Box<FaceAsked>),
    /// It has been ended.
    Ended(ConnectionKey, EphemeralId),
    /// Ephemeral sessions with connections here are kept.
    Held(Held),
    /// One without is not, unless that has changed.
    Left(EphemeralId),
    /// Nobody waits for the answer.
    Told,
}

/// An ephemeral session that the store was asked to take.
#[derive(Debug)]
pub(super) struct Sharing {
    pub(super) session: Ephemeral,
    pub(super) seen_as: SeenAs,
    /// Whether what stood under its name was found to be good for nothing.
    pub(super) anew: bool,
}

/// An ephemeral session that is not known here, and who has presented its token.
#[derive(Debug)]
pub(super) struct TakingUp {
    pub(super) id: EphemeralId,
    pub(super) token: Secret,
    pub(super) waiting: Vec<(u64, Waiter)>,
}

/// What somebody wants of an ephemeral session by its id.
#[derive(Debug)]
pub(super) struct FaceAsked {
    pub(super) id: EphemeralId,
    /// Who.
    pub(super) asker: GrantRecord,
    pub(super) seen_as: SeenAs,
    /// Whether to end it.
    pub(super) end: bool,
}

/// Ephemeral sessions that the store was told of.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) sessions: Vec<EphemeralId>,
    /// Whether with their records.
    pub(super) given_back: bool,
    /// Whether the pass over all goes on after it.
    pub(super) of_pass: bool,
}

/// What became of looking at a credential.
pub(super) enum Authenticated {
    /// It is judged.
    Now(Result<Grant, Refusal>),
    /// Somebody outside was asked; the waiter will be told, by this number.
    Later(u64),
}

/// The same, with the waiter given back who need not wait.
pub(super) enum Looked {
    /// It is judged.
    Now(Waiter, Result<Grant, Refusal>),
    /// Somebody outside was asked; the waiter will be told, by this number.
    Later(u64),
}

/// A question about a key that an issuer's set does not have, and who waits for the answer.
#[derive(Debug)]
pub(super) struct KeyQuestion {
    pub(super) lacked: LackedKey,
    pub(super) waiting: Vec<KeyWaiting>,
}

/// One of them.
#[derive(Debug)]
pub(super) struct KeyWaiting {
    pub(super) no: u64,
    pub(super) waiter: Waiter,
    pub(super) presented: Presented,
}

/// A question about one session's record, and who waits for the answer.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) sid: Secret,
    pub(super) mark: SessionMark,
    pub(super) asked: Now,
    pub(super) waiting: Vec<Waiting>,
    /// Those who came when the question was out already: a record that they were told of may be newer than the answer.
    pub(super) later: Vec<Waiting>,
}

/// One of them.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) no: u64,
    pub(super) waiter: Waiter,
    pub(super) purpose: Purpose,
}

/// What a session is asked about for.
#[derive(Debug)]
pub(super) enum Purpose {
    /// Its cookie was presented.
    Cookie,
    /// A connection of it asks to be renewed.
    Update,
    /// A ticket was, which had been made for this user.
    Ticket(Option<Box<str>>),
    /// The token of an ephemeral session was, which its user had made.
    Ephemeral(Box<Ephemeral>),
}

/// The records of sessions that are looked at again, in the order of the question.
#[derive(Debug)]
pub(super) struct Reread {
    pub(super) asked: Now,
    pub(super) sessions: Vec<(u32, SessionMark)>,
}

/// A request for the renewal of a connection that another process holds.
#[derive(Debug)]
pub(super) struct PeerRenewal {
    /// The request's connection.
    pub(super) waiting: ConnectionKey,
    /// Whom a failure is counted for.
    pub(super) addr: IpAddr,
    /// The random bits of the connection that is to be renewed.
    pub(super) random: u128,
    /// The question's salt.
    pub(super) salt: [u8; SALT_BYTES],
}

/// A ticket that the store was asked to keep.
#[derive(Debug)]
pub(super) struct Made {
    /// What is handed out where the store has kept it.
    pub(super) ticket: Secret,
    /// What it stands for: where the store did not say that it has, a ticket that it never heard of is made for this.
    pub(super) record: TicketRecord,
}

impl Waiter {
    /// The connection whose request waits, where one does.
    pub(super) fn request(&self) -> Option<ConnectionKey> {
        match self {
            Waiter::Request(connection) => Some(*connection),
            _ => None,
        }
    }
}

impl Waiting {
    /// The open connection that is to be renewed by the answer.
    pub(super) fn renews(&self) -> Option<u32> {
        match (&self.purpose, &self.waiter) {
            (Purpose::Update, Waiter::Update { connection, .. }) => Some(connection.index),
            _ => None,
        }
    }
}
