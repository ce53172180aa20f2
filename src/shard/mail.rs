//! What cores of a process tell each other, and what one does when it is told.
//!
//! Memory: each is small; events and values are shared. Errors: none: a mail about something that is gone is dropped.

use std::net::IpAddr;
use std::sync::Arc;

use crate::connection::handshake::Refusal;
use crate::ids::{ConnectionId, CoreId, EphemeralId, Holder, ResumePoint, StreamId};
use crate::secret::Secret;
use crate::stream::log::{Event, History};
use crate::stream::poll::Status;

use super::lookup::Asker;
use super::{Output, Refreshed, Shard, StreamKey};

/// One message from a core to another.
#[derive(Debug)]
pub enum Mail {
    /// To the owner: someone on `from` watches.
    Watch {
        /// The stream.
        key: Arc<StreamKey>,
        /// Who tells.
        from: CoreId,
        /// Whether a copy of the history is wanted; where not, there is one and it has been kept up to date.
        attach: bool,
        /// Who answers for the work of what is selected.
        payer: Option<Holder>,
        /// Whether somebody there watched it before it was changed, and so is refused for no limit of streams.
        moved: bool,
    },
    /// To the owner: the stream that is polled without watchers was polled so before it was changed. One that counts for
    /// `limits.streams` comes along.
    Warm {
        /// The stream.
        key: Arc<StreamKey>,
    },
    /// To the owner: whoever answered on `from` for the work of what is selected does so no more, but somebody else.
    Charge {
        /// The stream.
        key: Arc<StreamKey>,
        /// Who tells.
        from: CoreId,
        /// Who.
        payer: Holder,
    },
    /// To the owner: nobody on `from` watches any more; it still wants to hear of events.
    Unwatch {
        /// The stream.
        key: Arc<StreamKey>,
        /// Who tells.
        from: CoreId,
    },
    /// To the owner: `from` need not hear of it any more.
    Detach {
        /// The stream.
        key: Arc<StreamKey>,
        /// Who tells.
        from: CoreId,
    },
    /// To the owner: what the stream shows may have changed; it is polled at once.
    Refresh {
        /// The stream.
        key: Arc<StreamKey>,
    },
    /// To every core: what any filled-in URL of a stream shows may have changed.
    RefreshAll {
        /// The stream.
        id: StreamId,
    },
    /// To every core: what is polled by this request may show something else, whatever else of its stream has been changed.
    RefreshSame(Refreshed),
    /// To the owner, by the hash of what is polled: of those who have left it nobody needs it polled on.
    LetGo {
        /// The hash.
        polled: u64,
    },
    /// To every core: streams that callers have described hold more than they may together.
    Crowded,
    /// From the owner: the state of the stream.
    Attached {
        /// The stream.
        key: Arc<StreamKey>,
        /// Its history; its events are shared.
        history: Box<History>,
        /// Its status.
        status: Status,
        /// Whether a poll has ended since it was last started, and the history is no older.
        fresh: bool,
    },
    /// From the owner: there are too many streams, or they hold too much.
    Refused {
        /// The stream.
        key: Arc<StreamKey>,
        /// Whether it is not held at all, for there are as many as there may be: whoever was moved there asks again.
        full: bool,
    },
    /// From the owner: the value has changed.
    Published {
        /// The stream.
        key: Arc<StreamKey>,
        /// The event, with its value.
        event: Event,
    },
    /// From the owner: a poll has ended. Carries the status where its state has changed.
    Polled {
        /// The stream.
        key: Arc<StreamKey>,
        /// The status.
        status: Status,
        /// Whether its state is another than before.
        changed: bool,
        /// Whether the history is no older than that poll.
        fresh: bool,
        /// Where the history ends: a copy that ends elsewhere has missed something.
        head: Option<ResumePoint>,
    },
    /// From the owner: its history was cut to make room for others, and so is to be the copy.
    Trimmed {
        /// The stream.
        key: Arc<StreamKey>,
        /// Bytes of events that are left.
        bytes: u64,
    },
    /// From the owner: it has forgotten the stream; who still watches must ask again.
    Evicted {
        /// The stream.
        key: Arc<StreamKey>,
    },
    /// To the core of a connection: renew its credential.
    Renew {
        /// Which.
        connection: ConnectionId,
        /// The new token.
        token: Secret,
        /// Whom a failure is counted for.
        addr: IpAddr,
        /// Who asks.
        from: CoreId,
        /// The number of the question.
        ask: u64,
    },
    /// From that core: what became of it.
    Renewed {
        /// The number of the question.
        ask: u64,
        /// `auth_ok` as JSON, or why not.
        outcome: Result<Vec<u8>, Refusal>,
        /// Whether the answer is held back: the address has failed too often.
        late: bool,
    },
    /// To all: an ephemeral session has ended.
    SessionEnded {
        /// Which.
        id: EphemeralId,
    },
}

// What is in a mail crosses threads.
const _: () = {
    const fn sendable<T: Send>() {}
    sendable::<Mail>();
};

impl Mail {
    /// Whether a core that does not get it finds out and recovers by itself.
    pub fn may_be_lost(&self) -> bool {
        matches!(self, Mail::Published { .. })
    }
}

impl Shard {
    /// Sends `mail` to core `to`, which may be this one.
    pub(super) fn send(&mut self, to: CoreId, mail: Mail) {
        if to == self.core {
            self.inbox.push_back(mail);
        } else {
            self.outputs.push_back(Output::Mail { to, mail });
        }
    }

    pub(super) fn mail(&mut self, mail: Mail) {
        match mail {
            Mail::Watch { key, from, attach, payer, moved } => self.watched(key, from, (attach, moved), payer),
            Mail::Warm { key } => self.warmed(&key),
            Mail::Charge { key, from, payer } => self.charged(&key, from, payer),
            Mail::Unwatch { key, from } => self.unwatched(&key, from),
            Mail::Detach { key, from } => self.detached(&key, from),
            Mail::Refresh { key } => self.refreshed(&key),
            Mail::RefreshAll { id } => self.refresh_stream(&id),
            Mail::RefreshSame(refreshed) => self.peer_has_refreshed(&[refreshed]),
            Mail::LetGo { polled } => self.let_go(polled),
            Mail::Crowded => self.crowded(),
            Mail::Attached { key, history, status, fresh } => self.attached(&key, *history, status, fresh),
            Mail::Refused { key, full } => self.refused(&key, full),
            Mail::Published { key, event } => self.published(&key, &event),
            Mail::Polled { key, status, changed, fresh, head } => self.polled(&key, status, (changed, fresh), head),
            Mail::Trimmed { key, bytes } => self.trimmed(&key, bytes),
            Mail::Evicted { key } => self.evicted(&key),
            Mail::Renew { connection, token, addr, from, ask } => {
                self.renew(connection, &token, addr, Asker::Core(from, ask))
            }
            Mail::Renewed { ask, outcome, late } => self.renewed(ask, outcome, late),
            Mail::SessionEnded { id } => self.session_ended(id),
        }
    }
}
