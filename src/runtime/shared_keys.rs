//! API keys in Redis: the hash that all processes share, and what is asked of it.
//!
//! ```text
//! restcast:api_keys   <id> -> the key's record, as the state file has it: its salted hash, never the key
//!                     @epoch -> a random word, as long as the hash lives
//!                     @history -> <changes>:<words of the last of them>, newest first
//! ```
//!
//! A key comes and goes by a script, so that nobody else's is overwritten or deleted whoever else is at it, and so that each
//! change has its word in the history: a server that has come back older than it was is known by it. Reading begins
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

use super::kept_keys::{History, Reading, epoch_of, read_record, record};
use super::redis::{CallError, Command, Store};

/// The hash of all keys.
const KEYS: &str = "restcast:api_keys";
/// The field of its epoch, which is no key's id.
const EPOCH: &str = "@epoch";
/// The field of its history, which is none either.
const HISTORY: &str = "@history";
/// A script on records, id and record from the third argument on: `out` has what becomes of each, `done` what was changed.
/// A change, of however many records, is one word in the history, which follows from the last and from what was changed.
/// The first argument is how many keys there may be, the second how much is kept of the words before. The history is the
/// first of the answer.
macro_rules! script {
    ($each:literal) => {
        concat!(
            "local h,out,done=KEYS[1],{},'' local t=redis.call('HGET',h,'@history') or '' \
             local c,w=string.match(t,'^(%d+):(%w+)$') c=tonumber(c) or 0 w=w or '' if #w%8~=0 or c>=1e14 then c,w=0,'' end \
             for i=3,#ARGV,2 do local id,record=ARGV[i],ARGV[i+1] local v=redis.call('HGET',h,id) ",
            $each,
            " end if done~='' then w=string.sub(redis.sha1hex(string.sub(w,1,8)..done),1,8)..string.sub(w,1,tonumber(ARGV[2])) \
             t=string.format('%.0f',c+1)..':'..w redis.call('HSET',h,'@history',t) end \
             table.insert(out,1,t) return out"
        )
    };
}
/// Puts records in, unless there is one of that id or there are too many. The same once more is done already.
const PUT: &str = script!(
    "if v then out[#out+1]=v==record and 1 or 0 \
     elseif redis.call('HLEN',h)>=tonumber(ARGV[1])+(redis.call('HGET',h,'@history') and 2 or 1) then out[#out+1]=-1 \
     else redis.call('HSET',h,id,record) out[#out+1]=1 done=done..'+'..id..record end"
);
/// Takes records out, unless there is another of its id.
const TAKE_OUT: &str = script!(
    "if v==record then redis.call('HDEL',h,id) out[#out+1]=1 done=done..'-'..id..record else out[#out+1]=0 end"
);
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

    /// Puts keys in: what has become of each, in their order, and where the hash is in its history then.
    ///
    /// # Errors
    /// [`CallError`]: some may be in all the same.
    pub fn put(&self, keys: &[Arc<ApiKey>]) -> Result<(Vec<Put>, History), CallError> {
        let (mut outcomes, mut at) = (Vec::with_capacity(keys.len()), History::default());
        for keys in keys.chunks(limits::API_KEYS_PER_CALL) {
            let records = keys.iter().map(|key| (&key.id, Value::Object(record(key)).to_string().into_bytes()));
            let (replies, history) = self.change(PUT, records)?;
            for reply in replies {
                outcomes.push(match reply {
                    1 => Put::Done,
                    0 => Put::Taken,
                    -1 => Put::Full,
                    _ => return Err(nonsense("EVAL")),
                });
            }
            at = history;
        }
        Ok((outcomes, at))
    }

    /// Takes out records that were read. Where another stands in the place of one it stays.
    ///
    /// # Errors
    /// [`CallError`]: some may be out all the same.
    pub fn take_out(&self, records: &[(ApiKeyMark, Vec<u8>)]) -> Result<(), CallError> {
        for records in records.chunks(limits::API_KEYS_PER_CALL) {
            self.change(TAKE_OUT, records.iter().map(|(mark, record)| (&mark.id, record.clone())))?;
        }
        Ok(())
    }

    /// Carries a script out on these records: what it says of each, and the history.
    fn change<'a>(
        &self,
        script: &str,
        records: impl Iterator<Item = (&'a ApiKeyId, Vec<u8>)>,
    ) -> Result<(Vec<i64>, History), CallError> {
        let before = History::TEXT_BYTES_MAX - History::WORD_BYTES;
        let texts = [script, "1", KEYS, &limits::API_KEYS_MAX.to_string(), &before.to_string()];
        let mut arguments: Vec<Vec<u8>> = texts.iter().map(|text| text.as_bytes().to_vec()).collect();
        arguments.extend(records.flat_map(|(id, record)| [id.as_str().as_bytes().to_vec(), record]));
        let asked = (arguments.len() - texts.len()) / 2;
        let replies = self.store.call(vec![Command { name: "EVAL", arguments }])?;
        let Some(Reply::Array(replies)) = replies.into_iter().next() else { return Err(nonsense("EVAL")) };
        let mut replies = replies.into_iter();
        let history = match replies.next() {
            Some(Reply::String(history)) => history_of(&history),
            Some(Reply::TooLong(_)) => History::default(),
            _ => return Err(nonsense("EVAL")),
        };
        let said = |reply| if let Reply::Integer(said) = reply { Some(said) } else { None };
        let said: Option<Vec<i64>> = replies.map(said).collect();
        match said.filter(|said| said.len() == asked) {
            Some(said) => Ok((said, history)),
            None => Err(nonsense("EVAL")),
        }
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
            if self.change(TAKE_OUT, std::iter::once((id, record)))?.0 == [1] {
                return Ok(Some(found));
            }
        }
        Err(CallError::Refused("the key changes all the time".to_owned()))
    }
}

fn command<'a>(name: &'static str, arguments: impl IntoIterator<Item = &'a [u8]>) -> Command {
    Command { name, arguments: arguments.into_iter().map(<[u8]>::to_vec).collect() }
}

fn nonsense(command: &str) -> CallError {
    CallError::Refused(format!("it answers {command} with something else"))
}

/// The place in the history that is kept so. What is none is the beginning: it comes after nothing that was seen.
fn history_of(text: &[u8]) -> History {
    std::str::from_utf8(text).ok().and_then(History::parse).unwrap_or_default()
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
        let bytes = |reply: &Reply| if let Reply::String(text) = reply { text.len() } else { 0 };
        reading.bytes += bytes(&field) + bytes(&value);
        let Reply::String(field) = field else { continue };
        let Ok(field) = String::from_utf8(field) else { continue };
        let record = if let Reply::String(record) = value { Some(record) } else { None };
        if field == EPOCH {
            let epoch = record.as_deref().and_then(|text| std::str::from_utf8(text).ok()).and_then(epoch_of);
            reading.epoch = epoch.ok_or_else(|| CallError::Refused(format!("{KEYS} has an {EPOCH} that is none")))?;
            continue;
        }
        if field == HISTORY {
            reading.history = history_of(&record.unwrap_or_default());
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
