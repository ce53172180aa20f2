//! Streams that the admin API has made, as Redis keeps them: the hash `restcast:streams`, a record a stream, and the set
//! `restcast:streams:stopped`.
//!
//! Each change of a record says what stood there before, so that two processes cannot overwrite each other's. The hash has
//! an epoch, which is gone with it: a process that finds another knows that Redis was emptied, and not that all streams
//! were deleted.
//!
//! Source: protocol version 1, section 6. Memory: one reply, bounded by its lines in `limits`. Errors: [`CallError`].
//! Blocking: for the admin listener's threads and the one that follows. Not here: what a record says (`streams`).

use std::collections::{BTreeMap, BTreeSet};

use crate::codec::resp::Reply;
use crate::ids::StreamId;
use crate::limits;

use super::redis::{CallError, Command, Store};

/// The hash of all streams.
const STREAMS: &str = "restcast:streams";
/// The set of those that are stopped.
const STOPPED: &str = "restcast:streams:stopped";
/// The field of the hash's epoch, which is no stream's id.
const EPOCH: &str = "@epoch";
/// Puts a record in the place of another (none: the empty text). The same once more is done already.
const PUT: &str = "local v=redis.call('HGET',KEYS[1],ARGV[1]) \
                   if v==ARGV[3] then return 1 end \
                   if (v or '')~=ARGV[2] then return 0 end \
                   if not v and redis.call('HLEN',KEYS[1])>=tonumber(ARGV[4]) then return -1 end \
                   redis.call('HSET',KEYS[1],ARGV[1],ARGV[3]) return 1";
/// Takes that record out, unless there is another of its id.
const TAKE_OUT: &str = "if redis.call('HGET',KEYS[1],ARGV[1])~=ARGV[2] then return 0 end \
                        redis.call('SREM',KEYS[2],ARGV[1]) return redis.call('HDEL',KEYS[1],ARGV[1])";

/// What has become of a record that was to be put in.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Put {
    /// It is there.
    Done,
    /// There stands another than was said.
    Other,
    /// There are too many.
    Full,
}

/// What stands in Redis.
#[derive(Debug, Default)]
pub struct Reading {
    /// The epoch of the hash.
    pub epoch: String,
    /// The records, by their ids.
    pub streams: BTreeMap<StreamId, String>,
    /// Which are stopped.
    pub stopped: BTreeSet<StreamId>,
}

/// What stands in Redis of one stream.
#[derive(Debug)]
pub struct One {
    /// The epoch of the hash; empty: it has none.
    pub epoch: String,
    /// Its record, if it is there.
    pub record: Option<String>,
    /// Whether it is stopped.
    pub stopped: bool,
}

/// The streams in Redis.
pub struct SharedStreams {
    store: Store,
}

impl SharedStreams {
    /// Those of that Redis.
    pub fn new(store: Store) -> SharedStreams {
        SharedStreams { store }
    }

    /// All of them; where the hash has no epoch it gets this one.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn read(&self, epoch: &str) -> Result<Reading, CallError> {
        let begin = command("HSETNX", &[STREAMS, EPOCH, epoch]);
        let fields = match self.store.call(vec![begin, command("HLEN", &[STREAMS])])?.get(1) {
            Some(Reply::Integer(fields)) => usize::try_from(*fields).unwrap_or(usize::MAX),
            _ => return Err(nonsense("HLEN")),
        };
        if fields > limits::MANAGED_FIELDS_MAX {
            let why = format!("{STREAMS} has {fields} fields, at most {} are read", limits::MANAGED_FIELDS_MAX);
            return Err(CallError::Refused(why));
        }
        let commands = vec![
            command("HSETNX", &[STREAMS, EPOCH, epoch]),
            command("HGETALL", &[STREAMS]),
            command("SMEMBERS", &[STOPPED]),
        ];
        let mut replies = self.store.call(commands)?.into_iter().skip(1);
        let (Some(Reply::Array(fields)), Some(Reply::Array(stopped))) = (replies.next(), replies.next()) else {
            return Err(nonsense("HGETALL"));
        };
        let mut reading = Reading::default();
        let mut fields = fields.into_iter();
        while let (Some(field), Some(value)) = (fields.next(), fields.next()) {
            let (Some(field), Some(value)) = (text_of(field), text_of(value)) else { continue };
            if field == EPOCH {
                reading.epoch = value;
            } else if let Some(id) = StreamId::new(&field) {
                reading.streams.insert(id, value);
            }
        }
        reading.stopped = stopped.into_iter().filter_map(text_of).filter_map(|id| StreamId::new(&id)).collect();
        if reading.epoch.is_empty() {
            return Err(CallError::Refused(format!("{STREAMS} has no {EPOCH}")));
        }
        Ok(reading)
    }

    /// One of them.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn read_one(&self, id: &StreamId) -> Result<One, CallError> {
        let commands = vec![
            command("HGET", &[STREAMS, EPOCH]),
            command("HGET", &[STREAMS, id.as_str()]),
            command("SISMEMBER", &[STOPPED, id.as_str()]),
        ];
        let field = |reply: Reply| match reply {
            Reply::Nil => Ok(None),
            reply => text_of(reply).map(Some).ok_or_else(|| nonsense("HGET")),
        };
        let mut replies = self.store.call(commands)?.into_iter();
        match (replies.next(), replies.next(), replies.next()) {
            (Some(epoch), Some(record), Some(Reply::Integer(stopped))) => {
                Ok(One { epoch: field(epoch)?.unwrap_or_default(), record: field(record)?, stopped: stopped == 1 })
            }
            _ => Err(nonsense("HGET")),
        }
    }

    /// Puts a record in the place of `before`.
    ///
    /// # Errors
    /// [`CallError`]: after [`CallError::Unanswered`] it may be there all the same.
    pub fn put(&self, id: &StreamId, before: Option<&str>, record: &str) -> Result<Put, CallError> {
        // The epoch is a field too.
        let most = (limits::MANAGED_STREAMS_MAX + 1).to_string();
        let put = command("EVAL", &[PUT, "1", STREAMS, id.as_str(), before.unwrap_or_default(), record, &most]);
        match self.store.call(vec![put])?.first() {
            Some(Reply::Integer(1)) => Ok(Put::Done),
            Some(Reply::Integer(0)) => Ok(Put::Other),
            Some(Reply::Integer(-1)) => Ok(Put::Full),
            _ => Err(nonsense("EVAL")),
        }
    }

    /// Takes that record out, and with it that it is stopped; whether it stood there.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn take_out(&self, id: &StreamId, record: &str) -> Result<bool, CallError> {
        let take = command("EVAL", &[TAKE_OUT, "2", STREAMS, STOPPED, id.as_str(), record]);
        match self.store.call(vec![take])?.first() {
            Some(Reply::Integer(taken)) => Ok(*taken == 1),
            _ => Err(nonsense("EVAL")),
        }
    }

    /// Says that a stream is stopped, or is not.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn stop(&self, id: &StreamId, stop: bool) -> Result<(), CallError> {
        let name = if stop { "SADD" } else { "SREM" };
        self.store.call(vec![command(name, &[STOPPED, id.as_str()])]).map(drop)
    }
}

fn command(name: &'static str, arguments: &[&str]) -> Command {
    Command { name, arguments: arguments.iter().map(|argument| argument.as_bytes().to_vec()).collect() }
}

fn nonsense(command: &str) -> CallError {
    CallError::Refused(format!("it answers {command} with something else"))
}

fn text_of(reply: Reply) -> Option<String> {
    match reply {
        Reply::String(bytes) => String::from_utf8(bytes).ok(),
        _ => None,
    }
}
