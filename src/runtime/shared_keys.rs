//! API keys in Redis: the hash that all processes share, and what is asked of it.
//!
//! ```text
//! restcast:api_keys   <id> -> the key's record, as the state file has it: its salted hash, never the key
//!                     @epoch -> a random word, as long as the hash lives
//! ```
//!
//! A key comes and goes by a script, so that nobody else's is overwritten or deleted whoever else is at it. Reading begins
//! with a write (the epoch, where there is none): a server that takes no writes may be a replica that knows too little, and
//! what it does not know would be taken for deleted.
//!
//! Source: <https://redis.io/docs/latest/commands/> (EVAL, HGET, HGETALL, HLEN, HSETNX). Memory: one reading, at most
//! [`limits::API_KEYS_REPLY_BYTES_MAX`]. Errors: [`CallError`]. All of it waits: not for a core's thread, nor for the one
//! that speaks with Redis. Not here: what follows from a reading (`kept_keys`), who is told (`api_keys`).

use std::collections::BTreeSet;
use std::sync::Arc;

use serde_json::Value;

use crate::auth::api_key::{ApiKey, ApiKeyId, ApiKeyMark};
use crate::codec::resp::Reply;
use crate::limits;

use super::kept_keys::{Reading, epoch_of, read_record, record};
use super::redis::{CallError, Command, Store};

/// The hash of all keys.
const KEYS: &str = "restcast:api_keys";
/// The field of its epoch, which is no key's id.
const EPOCH: &str = "@epoch";
/// Puts a record in, unless there is one of that id or there are too many. The same once more is done already.
const PUT: &str = "local v=redis.call('HGET',KEYS[1],ARGV[1]) \
                   if v then return v==ARGV[2] and 1 or 0 end \
                   if redis.call('HLEN',KEYS[1])>=tonumber(ARGV[3]) then return -1 end \
                   redis.call('HSET',KEYS[1],ARGV[1],ARGV[2]) return 1";
/// Takes that record out, unless there is another of its id.
const TAKE_OUT: &str = "if redis.call('HGET',KEYS[1],ARGV[1])==ARGV[2] then return redis.call('HDEL',KEYS[1],ARGV[1]) end \
                        return 0";
/// How often taking a record out is tried where it changes in between.
const TAKE_OUT_TRIES: usize = 3;

/// What has become of a key that was to be put in.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Put {
    /// It is there.
    Done,
    /// There is another of its id.
    Taken,
    /// There are too many.
    Full,
}

/// The keys in Redis.
pub struct SharedKeys {
    store: Store,
}

impl SharedKeys {
    /// Those of that Redis.
    pub fn new(store: Store) -> SharedKeys {
        SharedKeys { store }
    }

    /// All of them; where the hash has no epoch it gets this one.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn read(&self, epoch: &str) -> Result<Reading, CallError> {
        // Each call begins so: the second may go to another server than the first.
        let begin = || command("HSETNX", [KEYS.as_bytes(), EPOCH.as_bytes(), epoch.as_bytes()]);
        let fields = match self.store.call(vec![begin(), command("HLEN", [KEYS.as_bytes()])])?.get(1) {
            Some(Reply::Integer(fields)) => usize::try_from(*fields).unwrap_or(usize::MAX),
            _ => return Err(nonsense("HLEN")),
        };
        if fields > limits::API_KEYS_FIELDS_MAX {
            let why = format!("{KEYS} has {fields} fields, at most {} are read", limits::API_KEYS_FIELDS_MAX);
            return Err(CallError::Refused(why));
        }
        match self.store.call(vec![begin(), command("HGETALL", [KEYS.as_bytes()])])?.into_iter().nth(1) {
            Some(Reply::Array(fields)) => reading_of(fields),
            _ => Err(nonsense("HGETALL")),
        }
    }

    /// Puts keys in: what has become of each, in their order.
    ///
    /// # Errors
    /// [`CallError`]: some may be in all the same.
    pub fn put(&self, keys: &[Arc<ApiKey>]) -> Result<Vec<Put>, CallError> {
        // The epoch is a field too.
        let most = (limits::API_KEYS_MAX + 1).to_string();
        let mut outcomes = Vec::with_capacity(keys.len());
        for keys in keys.chunks(limits::API_KEYS_PER_CALL) {
            let put = |key: &Arc<ApiKey>| {
                let text = Value::Object(record(key)).to_string();
                script(PUT, [key.id.as_str().as_bytes(), text.as_bytes(), most.as_bytes()])
            };
            for reply in self.store.call(keys.iter().map(put).collect())? {
                outcomes.push(match reply {
                    Reply::Integer(1) => Put::Done,
                    Reply::Integer(0) => Put::Taken,
                    Reply::Integer(-1) => Put::Full,
                    _ => return Err(nonsense("EVAL")),
                });
            }
        }
        Ok(outcomes)
    }

    /// Takes out records that were read. Where another stands in the place of one it stays.
    ///
    /// # Errors
    /// [`CallError`]: some may be out all the same.
    pub fn take_out(&self, records: &[(ApiKeyMark, Vec<u8>)]) -> Result<(), CallError> {
        for records in records.chunks(limits::API_KEYS_PER_CALL) {
            let take = |(mark, record): &(ApiKeyMark, Vec<u8>)| {
                script(TAKE_OUT, [mark.id.as_str().as_bytes(), record.as_slice()])
            };
            self.store.call(records.iter().map(take).collect())?;
        }
        Ok(())
    }

    /// Takes the key of that id out, where it is the one of this mark; without a mark, whatever stands there. What was taken
    /// out: nothing, something that is no key, or a key.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn delete(&self, id: &ApiKeyId, mark: Option<&ApiKeyMark>) -> Result<Option<Option<ApiKeyMark>>, CallError> {
        for _ in 0..TAKE_OUT_TRIES {
            let get = command("HGET", [KEYS.as_bytes(), id.as_str().as_bytes()]);
            let record = match self.store.call(vec![get])?.into_iter().next() {
                Some(Reply::String(record)) => record,
                Some(Reply::Nil) => return Ok(None),
                // It is no record of ours; there is no comparing with it.
                Some(Reply::TooLong(_)) if mark.is_none() => {
                    let delete = command("HDEL", [KEYS.as_bytes(), id.as_str().as_bytes()]);
                    let replies = self.store.call(vec![delete])?;
                    return Ok(matches!(replies.first(), Some(Reply::Integer(1))).then_some(None));
                }
                Some(Reply::TooLong(_)) => return Ok(None),
                _ => return Err(nonsense("HGET")),
            };
            let found = key_of(id.as_str(), &record).map(|key| key.mark());
            if mark.is_some_and(|mark| found.as_ref() != Some(mark)) {
                return Ok(None);
            }
            let take = script(TAKE_OUT, [id.as_str().as_bytes(), record.as_slice()]);
            match self.store.call(vec![take])?.first() {
                Some(Reply::Integer(1)) => return Ok(Some(found)),
                Some(Reply::Integer(0)) => {}
                _ => return Err(nonsense("EVAL")),
            }
        }
        Err(CallError::Refused("the key changes all the time".to_owned()))
    }
}

fn command<'a>(name: &'static str, arguments: impl IntoIterator<Item = &'a [u8]>) -> Command {
    Command { name, arguments: arguments.into_iter().map(<[u8]>::to_vec).collect() }
}

/// A script on the hash.
fn script<'a>(text: &'static str, arguments: impl IntoIterator<Item = &'a [u8]>) -> Command {
    let before = [text.as_bytes(), b"1".as_slice(), KEYS.as_bytes()];
    command("EVAL", before.into_iter().chain(arguments))
}

fn nonsense(command: &str) -> CallError {
    CallError::Refused(format!("it answers {command} with something else"))
}

/// The key that is kept as `record` under that id.
fn key_of(id: &str, record: &[u8]) -> Option<ApiKey> {
    let value: Value = serde_json::from_slice(record).ok()?;
    read_record(&value).filter(|key| key.id.as_str() == id)
}

/// What stands in the fields and values of the hash.
fn reading_of(fields: Vec<Reply>) -> Result<Reading, CallError> {
    let mut reading = Reading::default();
    let mut unreadable = BTreeSet::new();
    let mut fields = fields.into_iter();
    while let (Some(field), Some(value)) = (fields.next(), fields.next()) {
        // What is no id is nobody's key, and nothing is known of it here.
        let Reply::String(field) = field else { continue };
        let Ok(field) = String::from_utf8(field) else { continue };
        let record = if let Reply::String(record) = value { Some(record) } else { None };
        if field == EPOCH {
            let epoch = record.as_deref().and_then(|text| std::str::from_utf8(text).ok()).and_then(epoch_of);
            reading.epoch = epoch.ok_or_else(|| CallError::Refused(format!("{KEYS} has an {EPOCH} that is none")))?;
            continue;
        }
        match record.and_then(|record| Some((key_of(&field, &record)?, record))) {
            Some((key, record)) => drop(reading.keys.insert(key.id.clone(), (Arc::new(key), record))),
            None => drop(unreadable.insert(field)),
        }
    }
    if reading.epoch.is_empty() {
        return Err(CallError::Refused(format!("{KEYS} has no {EPOCH}")));
    }
    reading.unreadable = unreadable;
    Ok(reading)
}
