//! How threads reach a core: a bounded queue and a bell that rings only when the core sleeps.
//!
//! Source: ARCHITECTURE.md. Memory: at most [`limits::MAILBOX_MESSAGES_MAX`] messages. Errors: [`Full`] gives the message
//! back. Not here: what a message means.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use crate::auth::api_key::ApiKeys;
use crate::auth::jwks::KeySets;
use crate::auth::marks::Concerned;
use crate::ids::StreamId;
use crate::limits;
use crate::shard::{ConnectionQuery, Found, Listed, Mail, Options, PeerAsk, Refreshed};
use crate::stream::Compared;
use crate::stream::action::ActResult;

/// What a core can be told.
#[derive(Debug)]
pub enum Message {
    /// By another core.
    Mail(Mail),
    /// By somebody outside of the cores: the answer to a question.
    Found {
        /// The number of the question.
        ask: u64,
        /// The answer.
        found: Found,
    },
    /// By the store: it answers, or does not any more.
    StoreState {
        /// Whether it answers.
        up: bool,
    },
    /// By another process: renew a connection's credential.
    PeerRenewal {
        /// The connection's place.
        connection: u32,
        /// What it asks, sealed for that connection.
        sealed: Vec<u8>,
        /// Who asks.
        ask: PeerAsk,
    },
    /// By another process: it was sent a hook.
    PeerHook {
        /// Of which stream.
        id: StreamId,
        /// Which hook, sealed.
        sealed: Vec<u8>,
    },
    /// By another process: an action there has changed what these show.
    PeerRefresh(Arc<[Refreshed]>),
    /// By the process: all that was said while it was away is known, as far as it can be had: connections are taken.
    Serve,
    /// By the process: requests leave another way.
    Way,
    /// By a worker: a comparison has ended.
    Compared(Box<Compared>),
    /// By a worker: an action's answer has been looked at.
    Acted {
        /// The action's number.
        ask: u64,
        /// How it went.
        result: ActResult,
    },
    /// By the process: marks were set.
    Control(Arc<[Concerned]>),
    /// By the admin listener: tell the connections that this is about, as far as a turn goes.
    List {
        /// Which.
        query: ConnectionQuery,
        /// Where to tell them.
        reply: SyncSender<Listed>,
    },
    /// By the process: end.
    Drain,
    /// By the process: the configuration was read again.
    Reload(Arc<Options>),
    /// By an administrator: other streams hold, these among them.
    Catalog {
        /// What holds from now on.
        options: Arc<Options>,
        /// Which streams are others.
        changed: Arc<[StreamId]>,
    },
    /// By an administrator: a stream is to be polled at once.
    Refresh(StreamId),
    /// By the process: there are other API keys.
    ApiKeys(Arc<ApiKeys>),
    /// By the core that fetches them: these key sets are in force.
    KeySets(Arc<KeySets>),
    /// To the core that fetches key sets: somebody wants one.
    FetchKeySets,
}

impl Message {
    /// Whether somebody is answered that this is in force once every core has it in its mailbox.
    fn is_order(&self) -> bool {
        matches!(self, Message::Reload(_) | Message::Catalog { .. } | Message::ApiKeys(_))
    }
}

/// The mailbox is full: here is the message back.
#[derive(Debug)]
pub struct Full(pub Message);

/// One core's mailbox.
#[derive(Debug)]
pub struct Mailbox {
    messages: Mutex<VecDeque<Message>>,
    sleeping: AtomicBool,
    /// Whether there is a message that somebody may have been told is in force. Changed while the messages are held.
    ordered: AtomicBool,
    /// Whether marks were set that there was no room to tell of: every connection is to be looked at.
    everyone: AtomicBool,
    bell: OwnedFd,
}

impl Mailbox {
    /// An empty one.
    ///
    /// # Errors
    /// Where the process has no descriptor left.
    pub fn new() -> std::io::Result<Mailbox> {
        Ok(Mailbox {
            messages: Mutex::default(),
            sleeping: AtomicBool::new(false),
            ordered: AtomicBool::new(false),
            everyone: AtomicBool::new(false),
            bell: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
        })
    }

    /// Puts a message in.
    ///
    /// # Errors
    /// [`Full`].
    pub fn post(&self, message: Message) -> Result<(), Full> {
        {
            let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
            if messages.len() >= limits::MAILBOX_MESSAGES_MAX {
                return Err(Full(message));
            }
            self.ordered.fetch_or(message.is_order(), Ordering::SeqCst);
            messages.push_back(message);
        }
        self.ring();
        Ok(())
    }

    /// Wakes the core, if it sleeps.
    fn ring(&self) {
        if self.sleeping.swap(false, Ordering::SeqCst) {
            // A bell that is full rings already.
            let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
        }
    }

    /// Tells of marks that were set. There is always room for it, and nobody waits.
    pub fn post_control(&self, concerned: &Arc<[Concerned]>) {
        if self.post(Message::Control(Arc::clone(concerned))).is_err() {
            self.everyone.store(true, Ordering::SeqCst);
            // The core may have emptied it since, and gone to sleep.
            self.ring();
        }
    }

    /// Takes out the news that every connection is to be looked at.
    pub fn take_everyone(&self) -> bool {
        self.everyone.swap(false, Ordering::SeqCst)
    }

    /// Takes out all there is.
    pub fn take(&self) -> VecDeque<Message> {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        self.ordered.store(false, Ordering::SeqCst);
        std::mem::take(&mut *messages)
    }

    /// Whether there is something that is to be taken out before anything is done that was sent after it was put in.
    pub fn is_ordered(&self) -> bool {
        self.ordered.load(Ordering::SeqCst)
    }

    /// Says that the core is about to sleep; whether it may: nothing has come meanwhile.
    pub fn may_sleep(&self) -> bool {
        self.sleeping.store(true, Ordering::SeqCst);
        let empty = self.messages.lock().unwrap_or_else(PoisonError::into_inner).is_empty();
        let empty = empty && !self.everyone.load(Ordering::SeqCst);
        if !empty {
            self.sleeping.store(false, Ordering::SeqCst);
        }
        empty
    }

    /// Says that the core is awake, and silences the bell.
    pub fn awake(&self, rung: bool) {
        self.sleeping.store(false, Ordering::SeqCst);
        if rung {
            let mut count = [0u8; 8];
            let _ = rustix::io::read(&self.bell, &mut count);
        }
    }

    /// What becomes readable when the bell rings.
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rings(mailbox: &Mailbox) -> bool {
        let mut count = [0u8; 8];
        rustix::io::read(&mailbox.bell, &mut count).is_ok()
    }

    #[test]
    fn what_somebody_is_told_is_in_force_is_seen_until_it_is_taken_out() {
        let mailbox = Mailbox::new().expect("a descriptor");
        let post = |message| mailbox.post(message).is_ok();
        assert!(post(Message::FetchKeySets) && !mailbox.is_ordered());
        assert!(post(Message::ApiKeys(Arc::default())) && post(Message::FetchKeySets) && mailbox.is_ordered());
        assert_eq!((mailbox.take().len(), mailbox.is_ordered()), (3, false));
        while post(Message::FetchKeySets) {}
        assert!(!post(Message::ApiKeys(Arc::default())) && !mailbox.is_ordered(), "there was no room for it");
    }

    #[test]
    fn marks_that_found_the_mailbox_full_wake_a_core_that_has_emptied_it() {
        let mailbox = Mailbox::new().expect("a descriptor");
        while mailbox.post(Message::FetchKeySets).is_ok() {}
        assert!(!mailbox.take_everyone());
        mailbox.post_control(&[Concerned::Everyone].into());
        assert_eq!(mailbox.take().len(), limits::MAILBOX_MESSAGES_MAX);
        assert!(!mailbox.may_sleep(), "it was looked for before the mailbox was emptied, and came between");
        assert!(mailbox.take_everyone() && !mailbox.take_everyone());
        // The mailbox is emptied, and the core asleep, before whoever found it full has said so.
        while mailbox.post(Message::FetchKeySets).is_ok() {}
        mailbox.sleeping.store(true, Ordering::SeqCst);
        mailbox.post_control(&[Concerned::Everyone].into());
        assert!(rings(&mailbox) && mailbox.take_everyone());
    }
}
