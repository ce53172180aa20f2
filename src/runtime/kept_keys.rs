//! The API keys that the admin API has made, as a process keeps them: in its state file, and, where there is Redis, as what
//! it knows of the keys there.
//!
//! Redis has the truth, a hash that all processes share; this is a copy of it that serves while Redis is away. Three things
//! are kept besides the keys so that the two can be put together again whatever has happened meanwhile:
//!
//! - of each key, whether Redis has had it. One that it has had and has no more was deleted by somebody else. One that it
//!   has not had was made without Redis, and is carried over.
//! - the hash's epoch, a random word in it. Where that is another than before, Redis has lost all it had, or is another
//!   Redis: nothing was deleted, and all is carried over.
//! - the place in the hash's history that was last seen: how many changes, and a word for the last. Where what is read does
//!   not come after it, Redis has come back older than it was (from a file, by a replica that took over), whether or not it
//!   has changed again since: again nothing was deleted, and what it has forgotten is carried over.
//! - what was deleted, by the key's mark, whether or not Redis knows yet. Nothing brings such a key back: not a reading that
//!   is older than the deletion, not a server that takes over and has not heard of it.
//!
//! A turn is counted with each change here, so that a reading that began before it does not undo it.
//!
//! Source: protocol version 1, section 6. Memory: at most [`limits::API_KEYS_MAX`] keys by the admin API of one process, what
//! a reading of Redis may have, and [`limits::API_KEYS_DELETED_MAX`] deletions. Errors: what is wrong with a section of the
//! state file, as the end of a sentence. Not here: Redis's commands (`shared_keys`), the file (`state`), who is told
//! (`api_keys`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::auth::api_key::{ApiKey, ApiKeyId, ApiKeyMark, KeyHash, Source, is_stream_glob};
use crate::limits;
use crate::time::WallTime;

/// Longest epoch that is one: we make 16 digits.
const EPOCH_BYTES_MAX: usize = 64;
/// Digits of the longest count of changes that is one.
const CHANGES_DIGITS_MAX: usize = 15;

/// The keys, and what is remembered to put them together with those in Redis.
#[derive(Clone, Debug, Default)]
pub struct KeptKeys {
    made: BTreeMap<ApiKeyId, Made>,
    deleted: BTreeMap<ApiKeyMark, Deleted>,
    /// The same in the order in which they are forgotten where there are too many.
    forgotten: BTreeMap<(Worth, u64), ApiKeyMark>,
    epoch: Option<Box<str>>,
    /// Where the hash was in its history when it was last seen.
    seen: Option<History>,
    turn: u64,
}

/// A place in the history of the hash: how many changes it has had, and a word for each of the last ones, newest first. A
/// word follows from the one before it and from what was changed, so that another history has other words.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct History {
    changes: u64,
    words: Box<str>,
}

/// How one place in the history stands to an earlier one.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Descent {
    /// It comes after it, or is the same.
    Known,
    /// There have been too many changes to tell, and nothing speaks against it.
    Likely,
    /// It does not: something was lost in between.
    Broken,
}

/// What was known when a reading was asked for.
#[derive(Clone, Debug, Default)]
pub struct Asked {
    turn: u64,
    seen: Option<History>,
}

#[derive(Clone, Debug)]
struct Made {
    key: Arc<ApiKey>,
    /// Redis has had it.
    shared: bool,
    /// The turn it came in.
    turn: u64,
}

#[derive(Clone, Copy, Debug)]
struct Deleted {
    worth: Worth,
    /// The turn it was deleted in; no other was in it.
    turn: u64,
}

/// What remembering a deletion is worth, the least first.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Worth {
    /// Somebody has said so of a key that is not known here. It may have been made and not read yet: the next reading tells.
    Heard,
    /// Redis does not have the key any more.
    Done,
    /// Redis has it, or may have it.
    Pending,
}

/// What stands in Redis.
#[derive(Debug, Default)]
pub struct Reading {
    /// The epoch of what was read.
    pub epoch: Box<str>,
    /// Where it is in its history.
    pub history: History,
    /// Each key, and its record as it stands there.
    pub keys: BTreeMap<ApiKeyId, (Arc<ApiKey>, Vec<u8>)>,
    /// Bytes of all that was read.
    pub bytes: usize,
    /// The ids of records that cannot be read. What is known of them stays as it is.
    pub unreadable: BTreeSet<String>,
}

/// What follows from a reading.
#[derive(Debug, Default)]
pub struct Merged {
    /// Other keys are in force than before.
    pub changed: bool,
    /// What is kept is to be written down.
    pub dirty: bool,
    /// What was deleted here and stands there: its mark, and its record.
    pub delete: Vec<(ApiKeyMark, Vec<u8>)>,
    /// What is not there and should be.
    pub carry: Vec<Arc<ApiKey>>,
    /// What was deleted here and, as is known now, does not stand there any more.
    pub done: Vec<ApiKeyMark>,
    /// What others have deleted.
    pub gone: Vec<ApiKeyId>,
    /// Keys from before there was Redis that end, since it has another of their id.
    pub lost: Vec<ApiKeyId>,
}

impl History {
    /// Bytes of a change's word.
    pub const WORD_BYTES: usize = 8;
    /// Bytes of all words that are kept.
    pub const TEXT_BYTES_MAX: usize = limits::API_KEYS_HISTORY_MAX * History::WORD_BYTES;

    /// The place with this text, `<changes>:<words>`; `None` where it is none.
    pub fn parse(text: &str) -> Option<History> {
        let (changes, words) = text.split_once(':')?;
        let digits = (1..=CHANGES_DIGITS_MAX).contains(&changes.len()) && changes.bytes().all(|b| b.is_ascii_digit());
        let changes: u64 = if digits { changes.parse().ok()? } else { return None };
        let counted = words.len().is_multiple_of(History::WORD_BYTES) && words.is_empty() == (changes == 0);
        let fits =
            counted && words.len() <= History::TEXT_BYTES_MAX && words.bytes().all(|b| b.is_ascii_alphanumeric());
        fits.then(|| History { changes, words: words.into() })
    }

    /// The same with the newest word alone, which is enough to find it again.
    fn place(&self) -> History {
        History { changes: self.changes, words: self.words.get(..History::WORD_BYTES).unwrap_or_default().into() }
    }

    /// How it stands to `before`.
    fn after(&self, before: &History) -> Descent {
        let Some(since) = self.changes.checked_sub(before.changes) else { return Descent::Broken };
        let Ok(since) = usize::try_from(since) else { return Descent::Likely };
        let all = self.words.len() / History::WORD_BYTES;
        let at = since.saturating_mul(History::WORD_BYTES);
        match (before.words.get(..History::WORD_BYTES), self.words.get(at..at.saturating_add(History::WORD_BYTES))) {
            // Before the first change there is no word.
            (None, _) if since <= all => Descent::Known,
            (Some(word), Some(found)) if word == found => Descent::Known,
            (Some(_), Some(_)) => Descent::Broken,
            _ => Descent::Likely,
        }
    }

    fn text(&self) -> String {
        format!("{}:{}", self.changes, self.words)
    }
}

impl KeptKeys {
    /// The keys, by their ids.
    pub fn keys(&self) -> impl Iterator<Item = &Arc<ApiKey>> {
        self.made.values().map(|made| &made.key)
    }

    /// The key of that id.
    pub fn find(&self, id: &ApiKeyId) -> Option<&Arc<ApiKey>> {
        self.made.get(id).map(|made| &made.key)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.made.len()
    }

    /// Bytes of their records, about.
    pub fn bytes(&self) -> usize {
        self.keys().map(|key| record_bytes(key)).sum()
    }

    /// What a reading that is asked for now will know of: all changes so far.
    pub fn asked(&self) -> Asked {
        Asked { turn: self.turn, seen: self.seen.clone() }
    }

    /// The hash was changed from here, and is at `history` now. Where that does not come after what was seen, it is left to
    /// the next reading, which is to find that out too.
    pub fn advance(&mut self, history: &History) {
        if self.seen.as_ref().is_some_and(|seen| history.after(seen) == Descent::Known) {
            self.seen = Some(history.place());
        }
    }

    /// A key was made; `shared`: in Redis. Not where it has been deleted already.
    pub fn insert(&mut self, key: Arc<ApiKey>, shared: bool) {
        if self.deleted.contains_key(&key.mark()) {
            return;
        }
        self.turn += 1;
        self.made.insert(key.id.clone(), Made { key, shared, turn: self.turn });
    }

    /// A key was deleted for good; `done`: Redis has been told, or never had it. Whether it was in force.
    pub fn delete(&mut self, mark: ApiKeyMark, done: bool) -> bool {
        let found = self.made.get(&mark.id).is_some_and(|made| made.key.mark() == mark);
        if found {
            self.made.remove(&mark.id);
        }
        self.remember(mark, if done { Worth::Done } else { Worth::Pending });
        found
    }

    /// Remembers a deletion. Once it is known that Redis has it done, hearing of it again changes nothing.
    fn remember(&mut self, mark: ApiKeyMark, worth: Worth) {
        self.turn += 1;
        match self.deleted.get(&mark).copied() {
            Some(Deleted { worth: Worth::Pending, .. }) if worth == Worth::Done => self.weigh(&mark, worth),
            Some(Deleted { worth: Worth::Done | Worth::Pending, .. }) => {}
            Some(Deleted { worth: Worth::Heard, .. }) => self.weigh(&mark, worth),
            None => {
                self.forgotten.insert((worth, self.turn), mark.clone());
                self.deleted.insert(mark, Deleted { worth, turn: self.turn });
            }
        }
        while self.deleted.len() > limits::API_KEYS_DELETED_MAX {
            let Some((_, mark)) = self.forgotten.pop_first() else { break };
            self.deleted.remove(&mark);
        }
    }

    /// Remembering that deletion is worth so much now.
    fn weigh(&mut self, mark: &ApiKeyMark, worth: Worth) {
        if let Some(deleted) = self.deleted.get_mut(mark)
            && let Some(mark) = self.forgotten.remove(&(deleted.worth, deleted.turn))
        {
            deleted.worth = worth;
            self.forgotten.insert((worth, deleted.turn), mark);
        }
    }

    /// Another process says that a key was deleted for good: whether it was in force. What is known here of whether Redis has
    /// it done stays known.
    pub fn hear(&mut self, mark: ApiKeyMark) -> bool {
        if self.made.get(&mark.id).is_some_and(|made| made.key.mark() == mark) {
            return self.delete(mark, true);
        }
        if !self.deleted.contains_key(&mark) {
            self.remember(mark, Worth::Heard);
        }
        false
    }

    /// Takes a key out that Redis has nothing to do with: nothing more is remembered of it, unless Redis has had it.
    pub fn remove(&mut self, id: &ApiKeyId) -> bool {
        match self.made.get(id) {
            None => false,
            Some(made) if made.shared => self.delete(made.key.mark(), false),
            Some(_) => self.made.remove(id).is_some(),
        }
    }

    /// The key of that id that was deleted and of which Redis does not know yet.
    pub fn being_deleted(&self, id: &ApiKeyId) -> Option<&ApiKeyMark> {
        let of_id = ApiKeyMark { id: id.clone(), bits: 0 }..=ApiKeyMark { id: id.clone(), bits: u64::MAX };
        self.deleted.range(of_id).find(|(_, deleted)| deleted.worth == Worth::Pending).map(|(mark, _)| mark)
    }

    /// A key that was carried over is in Redis now.
    pub fn shared(&mut self, mark: &ApiKeyMark) {
        if let Some(made) = self.made.get_mut(&mark.id)
            && made.key.mark() == *mark
        {
            made.shared = true;
        }
    }

    /// Puts what was read of Redis in force. `asked`: what was known before it was asked for.
    pub fn merge(&mut self, reading: Reading, asked: &Asked) -> Merged {
        let mut merged = Merged::default();
        let new_life = self.epoch.as_deref() != Some(&*reading.epoch);
        let descent = match &asked.seen {
            _ if new_life => Descent::Broken,
            None => Descent::Likely,
            Some(seen) => reading.history.after(seen),
        };
        // What Redis is known to have deleted is remembered like what was deleted here: it may come back older than it is.
        let came_after = descent == Descent::Known;
        let broken = descent == Descent::Broken;
        self.see(&reading.history, asked, &mut merged);
        let asked = asked.turn;
        let before = std::mem::take(&mut self.made);
        let (mut there, mut lost, mut ended) = (BTreeSet::new(), Vec::new(), Vec::new());
        for (id, (key, record)) in reading.keys {
            let mark = key.mark();
            there.insert(mark.clone());
            if let Some(deleted) = self.deleted.get(&mark) {
                if deleted.worth != Worth::Pending && deleted.turn <= asked {
                    self.weigh(&mark, Worth::Pending);
                    merged.dirty = true;
                }
                merged.delete.push((mark, record));
                continue;
            }
            let made = match before.get(&id) {
                Some(known) if known.key.mark() == mark => {
                    merged.changed |= known.key != key;
                    merged.dirty |= !known.shared || known.key != key;
                    Made { key, shared: true, turn: known.turn }
                }
                // It was made after this was read: the next reading has it.
                Some(known) if known.turn > asked => known.clone(),
                known => {
                    match known {
                        Some(made) if !made.shared => lost.push(made.key.mark()),
                        Some(made) if came_after => ended.push(made.key.mark()),
                        _ => {}
                    }
                    (merged.changed, merged.dirty) = (true, true);
                    Made { key, shared: true, turn: asked }
                }
            };
            self.made.insert(id, made);
        }
        for (id, known) in before {
            if self.made.contains_key(&id) {
                continue;
            }
            let made_since = known.turn > asked;
            if made_since || reading.unreadable.contains(id.as_str()) {
                self.made.insert(id, known);
            } else if broken || !known.shared {
                merged.dirty |= known.shared;
                merged.carry.push(Arc::clone(&known.key));
                self.made.insert(id, Made { shared: false, ..known });
            } else {
                (merged.changed, merged.dirty) = (true, true);
                ended.extend(came_after.then(|| known.key.mark()));
                merged.gone.push(id);
            }
        }
        for mark in ended {
            self.delete(mark, true);
        }
        // What could not be carried over would be taken for another's when the file is read again.
        for mark in lost {
            merged.lost.push(mark.id.clone());
            self.delete(mark, true);
        }
        self.settle(asked, &there, &mut merged);
        if new_life {
            self.epoch = Some(reading.epoch);
            merged.dirty = true;
        }
        merged
    }

    /// What a reading that was asked for in that turn tells of the deletions: these keys are still there.
    fn settle(&mut self, asked: u64, there: &BTreeSet<ApiKeyMark>, merged: &mut Merged) {
        let of = |worth: Worth| (worth, 0)..=(worth, asked);
        let heard: Vec<(Worth, u64)> = self.forgotten.range(of(Worth::Heard)).map(|(place, _)| *place).collect();
        for place in heard {
            if let Some(mark) = self.forgotten.remove(&place) {
                self.deleted.remove(&mark);
            }
        }
        let pending = self.forgotten.range(of(Worth::Pending)).map(|(_, mark)| mark);
        let done: Vec<ApiKeyMark> = pending.filter(|mark| !there.contains(mark)).cloned().collect();
        for mark in done {
            self.weigh(&mark, Worth::Done);
            merged.dirty = true;
            merged.done.push(mark);
        }
    }

    /// Remembers where the hash was, unless it has been seen further on since that was asked for.
    fn see(&mut self, history: &History, asked: &Asked, merged: &mut Merged) {
        let seen_since = self.seen.as_ref().filter(|_| self.seen != asked.seen);
        if seen_since.is_some_and(|seen| history.after(seen) != Descent::Known) {
            return;
        }
        let place = Some(history.place());
        if self.seen != place {
            (self.seen, merged.dirty) = (place, true);
        }
    }

    /// Takes over what another process, which had the file before, has made without Redis; whether there was something.
    pub fn adopt(&mut self, stood: &KeptKeys) -> bool {
        let mut adopted = false;
        for (id, made) in &stood.made {
            if !made.shared && !self.made.contains_key(id) && !self.deleted.contains_key(&made.key.mark()) {
                self.insert(Arc::clone(&made.key), false);
                adopted = true;
            }
        }
        adopted
    }

    /// As the state file has it.
    pub fn written(&self) -> Value {
        let keys: Vec<Value> = self
            .made
            .values()
            .map(|made| {
                let mut record = record(&made.key);
                if made.shared {
                    record.insert("shared".to_owned(), true.into());
                }
                Value::Object(record)
            })
            .collect();
        // Without Redis it is as it was before there was any.
        let Some(epoch) = &self.epoch else { return Value::Array(keys) };
        let deleted = self.deleted.iter().filter(|(_, deleted)| deleted.worth != Worth::Heard);
        let mut deleted: Vec<(&ApiKeyMark, &Deleted)> = deleted.collect();
        deleted.sort_by_key(|(_, deleted)| deleted.turn);
        let deleted: Vec<Value> = deleted
            .into_iter()
            .map(|(mark, deleted)| json!({ "id": mark.id.as_str(), "mark": mark.bits_text(), "done": deleted.worth == Worth::Done }))
            .collect();
        let seen = self.seen.as_ref().map(History::text);
        json!({ "keys": keys, "epoch": epoch, "history": seen, "deleted": deleted })
    }

    /// What stands in the state file; null where there is nothing yet.
    ///
    /// # Errors
    /// What is wrong, as the end of a sentence.
    pub fn read(section: &Value) -> Result<KeptKeys, String> {
        let mut kept = KeptKeys::default();
        if section.is_null() {
            return Ok(kept);
        }
        let keys = section.get("keys").unwrap_or(section).as_array().ok_or("is no array")?;
        // There may be a few more where several processes made keys at the same time.
        if keys.len() > limits::API_KEYS_FIELDS_MAX {
            return Err(format!("has over {} keys", limits::API_KEYS_FIELDS_MAX));
        }
        if let Some(deleted) = section.get("deleted") {
            let deleted = deleted.as_array().filter(|deleted| deleted.len() <= limits::API_KEYS_DELETED_MAX);
            for (place, deleted) in deleted.ok_or("has a list of deletions that is none")?.iter().enumerate() {
                let text = |name: &str| deleted.get(name).and_then(Value::as_str);
                let mark = text("id").zip(text("mark")).and_then(|(id, mark)| ApiKeyMark::read(id, mark));
                let done = deleted.get("done").and_then(Value::as_bool);
                let (mark, done) = mark.zip(done).ok_or_else(|| format!("has no deletion at place {place}"))?;
                kept.delete(mark, done);
            }
        }
        for (place, record) in keys.iter().enumerate() {
            let key = read_record(record).ok_or_else(|| format!("has no key at place {place}"))?;
            let shared = record.get("shared").and_then(Value::as_bool) == Some(true);
            kept.insert(Arc::new(key), shared);
        }
        kept.epoch = match section.get("epoch") {
            None => None,
            Some(epoch) => Some(epoch.as_str().and_then(epoch_of).ok_or("has an epoch that is none")?),
        };
        kept.seen = match section.get("history") {
            None | Some(Value::Null) => None,
            Some(seen) => Some(seen.as_str().and_then(History::parse).ok_or("has a history that is none")?),
        };
        Ok(kept)
    }
}

/// The epoch with this text; `None` where it is none.
pub fn epoch_of(text: &str) -> Option<Box<str>> {
    let fits = (1..=EPOCH_BYTES_MAX).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric());
    fits.then(|| text.into())
}

/// A key as it is kept: all but the key itself.
pub fn record(key: &ApiKey) -> Map<String, Value> {
    let mut object = Map::new();
    let mut put = |name: &str, value: Value| drop(object.insert(name.to_owned(), value));
    put("id", key.id.as_str().into());
    put("hash", key.hash.to_text().into());
    put("streams", json!(key.streams));
    put("roles", json!(key.roles));
    put("permissions", json!(key.permissions));
    put("rate", key.rate.into());
    put("created_at", key.created.map(WallTime::as_micros).into());
    put("expires_at", key.expires.map(WallTime::as_micros).into());
    object
}

/// Bytes of a key's record, about: what it lists, and the rest, which is at most so much.
pub fn record_bytes(key: &ApiKey) -> usize {
    let listed = [&key.streams, &key.roles, &key.permissions].into_iter().flatten();
    listed.map(|text| text.len() + 3).sum::<usize>() + 384
}

/// The key of a record.
pub fn read_record(value: &Value) -> Option<ApiKey> {
    let time = |name: &str| match value.get(name)? {
        Value::Null => Some(None),
        value => Some(Some(WallTime::from_micros(value.as_u64()?))),
    };
    Some(ApiKey {
        id: ApiKeyId::new(value.get("id")?.as_str()?)?,
        hash: KeyHash::parse(value.get("hash")?.as_str()?).ok()?,
        streams: texts(value.get("streams")?, is_stream_glob)?,
        roles: texts(value.get("roles")?, is_word)?,
        permissions: texts(value.get("permissions")?, is_word)?,
        rate: u32::try_from(value.get("rate")?.as_u64()?).ok()?,
        created: time("created_at")?,
        expires: time("expires_at")?,
        source: Source::Admin,
    })
}

/// Whether `text` can be a role or a permission.
pub fn is_word(text: &str) -> bool {
    !text.is_empty() && text.len() <= limits::STREAM_GLOB_BYTES_MAX
}

/// The texts of an array that are few and each of which `fits`; `None` where it is none.
pub fn texts(value: &Value, fits: impl Fn(&str) -> bool) -> Option<Vec<String>> {
    let values = value.as_array().filter(|values| values.len() <= limits::API_KEY_LIST_MAX)?;
    values.iter().map(|value| value.as_str().filter(|text| fits(text)).map(str::to_owned)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::api_key::key_text;

    fn id(text: &str) -> ApiKeyId {
        ApiKeyId::new(text).expect("an id")
    }

    /// The key of that id that was made with this chance.
    fn key(name: &str, chance: u8) -> Arc<ApiKey> {
        let id = id(name);
        Arc::new(ApiKey {
            hash: KeyHash::new(&key_text(&id, &[chance; 32]), [chance; 16]),
            id,
            streams: vec!["leads".into(), "orders:*".into()],
            roles: vec!["agent \"007\"".into()],
            permissions: Vec::new(),
            rate: 60,
            created: Some(WallTime::from_secs(1_795_350_000)),
            expires: None,
            source: Source::Admin,
        })
    }

    fn reading(epoch: &str, keys: &[&Arc<ApiKey>]) -> Reading {
        let entry = |key: &&Arc<ApiKey>| {
            (key.id.clone(), (Arc::clone(key), Value::Object(record(key)).to_string().into_bytes()))
        };
        Reading { epoch: epoch.into(), keys: keys.iter().map(entry).collect(), ..Reading::default() }
    }

    /// What is kept of `made`, which Redis has had in the life of `epoch`.
    fn shared(epoch: &str, made: &[&Arc<ApiKey>]) -> KeptKeys {
        let mut kept = KeptKeys::default();
        let merged = kept.merge(reading(epoch, made), &Asked::default());
        assert!(merged.dirty && merged.carry.is_empty() && merged.gone.is_empty());
        kept
    }

    fn names(kept: &KeptKeys) -> Vec<&str> {
        kept.keys().map(|key| key.id.as_str()).collect()
    }

    /// The next reading, which was asked for now.
    fn next(kept: &mut KeptKeys, epoch: &str, keys: &[&Arc<ApiKey>]) -> Merged {
        let asked = kept.asked();
        kept.merge(reading(epoch, keys), &asked)
    }

    fn read_again(kept: &KeptKeys) -> KeptKeys {
        KeptKeys::read(&kept.written()).expect("it was written here")
    }

    #[test]
    fn what_redis_has_is_in_force_and_what_it_has_no_more_is_not() {
        let (a, b) = (key("a", 1), key("b", 2));
        let mut kept = shared("e1", &[&a, &b]);
        assert_eq!(names(&kept), ["a", "b"]);
        let merged = next(&mut kept, "e1", &[&a, &b]);
        assert!(!merged.changed && !merged.dirty, "nothing is new");
        let merged = next(&mut kept, "e1", &[&b]);
        assert_eq!((names(&kept), merged.changed, merged.gone), (vec!["b"], true, vec![id("a")]));
        // Another key of the same id is another key.
        let other = key("b", 3);
        let merged = next(&mut kept, "e1", &[&other]);
        assert!(merged.changed && kept.find(&id("b")).is_some_and(|key| *key == other));
        assert!(merged.lost.is_empty() && merged.gone.is_empty());
    }

    #[test]
    fn what_was_made_without_redis_is_carried_over_once() {
        let (a, b) = (key("a", 1), key("b", 2));
        let mut kept = KeptKeys::default();
        kept.insert(Arc::clone(&a), false);
        let merged = next(&mut kept, "e1", &[&b]);
        assert_eq!(merged.carry, [Arc::clone(&a)]);
        kept.shared(&a.mark());
        // Also after a restart it counts as one that Redis has had: if it is not there, it was deleted.
        let mut again = read_again(&kept);
        assert!(next(&mut again, "e1", &[&a, &b]).carry.is_empty());
        let merged = next(&mut again, "e1", &[&b]);
        assert_eq!((names(&again), merged.gone), (vec!["b"], vec![id("a")]));
    }

    #[test]
    fn of_two_keys_with_one_id_the_one_in_redis_counts_for_good() {
        let (ours, theirs) = (key("a", 1), key("a", 2));
        let mut kept = KeptKeys::default();
        kept.insert(Arc::clone(&ours), false);
        let stood = kept.clone();
        let merged = next(&mut kept, "e1", &[&theirs]);
        assert_eq!((merged.lost, merged.carry.len(), merged.changed), (vec![id("a")], 0, true));
        assert_eq!(kept.find(&id("a")), Some(&theirs));
        // Nor does the file, which may still have ours, bring it back once theirs is deleted.
        assert!(kept.delete(theirs.mark(), true));
        assert!(!kept.adopt(&stood));
        assert_eq!(kept.count(), 0);
    }

    #[test]
    fn a_deleted_key_is_not_brought_back_by_a_reading_nor_by_the_file() {
        let (a, b) = (key("a", 1), key("b", 2));
        let mut kept = shared("e1", &[&a, &b]);
        let asked = kept.asked();
        assert!(kept.delete(a.mark(), false));
        assert_eq!((kept.being_deleted(&id("a")), kept.being_deleted(&id("b"))), (Some(&a.mark()), None));
        // A reading that began before, one that began after, one after a restart: Redis has not heard of it.
        let merged = kept.merge(reading("e1", &[&a, &b]), &asked);
        assert_eq!((names(&kept), merged.changed, merged.delete.len()), (vec!["b"], false, 1));
        let mut kept = read_again(&kept);
        let merged = next(&mut kept, "e1", &[&a, &b]);
        assert_eq!((names(&kept), merged.delete.first().map(|(mark, _)| mark.clone())), (vec!["b"], Some(a.mark())));
        // It is done when it is seen to be.
        let merged = next(&mut kept, "e1", &[&b]);
        assert_eq!((merged.done, merged.gone.len()), (vec![a.mark()], 0));
        assert_eq!(kept.being_deleted(&id("a")), None);
        assert!(next(&mut kept, "e1", &[&b]).done.is_empty(), "that is told once");
        // A server that takes over and has not heard of it is told again; so is one that has lost all and got it back.
        for epoch in ["e1", "e2"] {
            let mut kept = read_again(&kept);
            assert_eq!(next(&mut kept, epoch, &[&a, &b]).delete.len(), 1);
            assert_eq!(names(&kept), ["b"]);
        }
        kept.insert(Arc::clone(&a), true);
        assert_eq!(names(&kept), ["b"]);
        // Another key under the id is welcome.
        kept.insert(key("a", 9), true);
        assert_eq!(names(&kept), ["a", "b"]);
    }

    #[test]
    fn a_deletion_that_others_tell_of_is_not_done_while_redis_has_the_key() {
        let a = key("a", 1);
        let mut here = shared("e1", &[&a]);
        let mut there = here.clone();
        // Redis refuses it: nothing that is heard, least of all one's own words, makes it done.
        here.delete(a.mark(), false);
        assert!(!here.hear(a.mark()));
        assert_eq!(here.being_deleted(&id("a")), Some(&a.mark()));
        assert!(there.hear(a.mark()) && !there.hear(a.mark()));
        assert_eq!((next(&mut there, "e1", &[&a]).delete.len(), there.count()), (1, 0));
        assert_eq!(there.being_deleted(&id("a")), Some(&a.mark()));
        for kept in [&mut here, &mut there] {
            assert_eq!(next(kept, "e1", &[]).done, [a.mark()]);
            assert_eq!(kept.being_deleted(&id("a")), None);
        }
    }

    #[test]
    fn a_deletion_is_done_only_by_a_reading_that_began_after_it() {
        let a = key("a", 1);
        let mut kept = shared("e1", &[]);
        let asked = kept.asked();
        // Made and deleted while a reading is on its way that has neither.
        kept.insert(Arc::clone(&a), true);
        kept.delete(a.mark(), false);
        assert!(kept.merge(reading("e1", &[]), &asked).done.is_empty());
        assert_eq!(kept.being_deleted(&id("a")), Some(&a.mark()));
    }

    #[test]
    fn a_key_made_while_a_reading_is_on_its_way_stays() {
        let (a, b) = (key("a", 1), key("b", 2));
        let mut kept = shared("e1", &[&a]);
        let asked = kept.asked();
        kept.insert(Arc::clone(&b), true);
        let merged = kept.merge(reading("e1", &[&a]), &asked);
        assert!(!merged.changed && merged.carry.is_empty() && merged.gone.is_empty());
        assert_eq!(names(&kept), ["a", "b"]);
        assert_eq!(next(&mut kept, "e1", &[&a]).gone, [id("b")]);
    }

    #[test]
    fn a_redis_that_has_lost_everything_gets_it_back() {
        let (a, b) = (key("a", 1), key("b", 2));
        let mut kept = shared("e1", &[&a, &b]);
        let merged = next(&mut kept, "e2", &[&b]);
        assert_eq!((names(&kept), merged.carry, merged.changed), (vec!["a", "b"], vec![Arc::clone(&a)], false));
        // Also where it is cut off before it could be given back.
        let mut kept = read_again(&kept);
        assert_eq!(next(&mut kept, "e2", &[&b]).carry, [a]);
    }

    /// The history with a change for each of these letters, of which the last `kept` have their words.
    fn history(changes: &str, kept: usize) -> History {
        let word = |letter: char| String::from(letter).repeat(History::WORD_BYTES);
        let words = changes.chars().rev().take(kept).map(word).collect::<String>();
        History::parse(&format!("{}:{words}", changes.len())).expect("a history")
    }

    /// The next reading, where the hash is at that history.
    fn next_at(kept: &mut KeptKeys, changes: &str, keys: &[&Arc<ApiKey>]) -> Merged {
        let asked = kept.asked();
        kept.merge(Reading { history: history(changes, 8), ..reading("e1", keys) }, &asked)
    }

    #[test]
    fn a_history_says_whether_it_comes_after_another() {
        let after = |now: &str, kept: usize, before: &str| history(now, kept).after(&history(before, 8).place());
        for (now, before) in [("", ""), ("a", ""), ("a", "a"), ("abcd", "a"), ("abcd", "ab"), ("abcd", "abcd")] {
            assert_eq!(after(now, 8, before), Descent::Known, "{now} {before}");
        }
        // Fewer changes; as many, but others; more, but others.
        for (now, before) in [("", "a"), ("ab", "abc"), ("abx", "abc"), ("x", "a"), ("abxyz", "abc")] {
            assert_eq!(after(now, 8, before), Descent::Broken, "{now} {before}");
        }
        for (now, before) in [("abcd", "ab"), ("abcd", "ax"), ("abcd", "")] {
            assert_eq!(after(now, 2, before), Descent::Likely, "{now} {before}");
        }
        assert_eq!(after("abcd", 3, "ab"), Descent::Known);
    }

    #[test]
    fn a_redis_that_comes_back_older_deletes_nothing_and_gets_back_what_it_has_forgotten() {
        let (a, b, c) = (key("a", 1), key("b", 2), key("c", 3));
        // It has had fewer changes; as many since, but others; more, but others.
        for (now, there) in [("1", vec![&a]), ("1x", vec![&a, &c]), ("1xyz", vec![&a, &c])] {
            let mut kept = shared("e1", &[]);
            next_at(&mut kept, "12", &[&a, &b]);
            // What was seen is seen also after a restart.
            let mut kept = read_again(&kept);
            let merged = next_at(&mut kept, now, &there);
            assert_eq!((merged.carry, merged.gone.len(), merged.dirty), (vec![Arc::clone(&b)], 0, true), "{now}");
            assert!(kept.find(&id("b")).is_some() && kept.count() == there.len() + 1);
            // It is carried over until it is there, and from then on counts as before.
            let mut kept = read_again(&kept);
            assert_eq!(next_at(&mut kept, now, &there).carry, [Arc::clone(&b)], "{now}");
            kept.shared(&b.mark());
            kept.advance(&history(&format!("{now}b"), 8));
            assert_eq!(next_at(&mut kept, now, &there).carry, [Arc::clone(&b)], "and was forgotten again");
            kept.shared(&b.mark());
            let merged = next_at(&mut kept, &format!("{now}bd"), &there);
            assert_eq!((merged.carry.len(), merged.gone), (0, vec![id("b")]), "{now}");
        }
    }

    #[test]
    fn of_two_processes_the_one_that_saw_less_loses_nothing_to_a_redis_that_comes_back_older() {
        let (a, b, c) = (key("a", 1), key("b", 2), key("c", 3));
        let (mut more, mut less) = (shared("e1", &[]), shared("e1", &[]));
        next_at(&mut more, "123", &[&a, &b, &c]);
        next_at(&mut less, "1", &[&a]);
        assert_eq!(next_at(&mut more, "12", &[&a, &b]).carry, [Arc::clone(&c)]);
        // For the other nothing was lost: what is not there any more was deleted.
        let merged = next_at(&mut less, "12", &[&b]);
        assert_eq!((names(&less), merged.gone, merged.carry.len()), (vec!["b"], vec![id("a")], 0));
    }

    #[test]
    fn what_a_reading_has_shown_to_be_deleted_does_not_come_back_with_an_older_redis() {
        let (a, b, other) = (key("a", 1), key("b", 2), key("b", 3));
        let mut kept = shared("e1", &[]);
        next_at(&mut kept, "12", &[&a, &b]);
        assert_eq!(next_at(&mut kept, "1234", &[&other]).gone, [id("a")]);
        let mut kept = read_again(&kept);
        let merged = next_at(&mut kept, "12", &[&a, &b]);
        let delete: Vec<ApiKeyMark> = merged.delete.into_iter().map(|(mark, _)| mark).collect();
        assert_eq!((delete, merged.carry), (vec![a.mark(), b.mark()], vec![Arc::clone(&other)]));
        assert_eq!(kept.find(&id("b")), Some(&other));
        // Where it cannot be told that nothing was lost it is taken for deleted, but does not end at the others.
        let mut kept = shared("e1", &[]);
        next_at(&mut kept, "1", &[&a]);
        assert_eq!(next_at(&mut kept, "1234567890", &[]).gone, [id("a")]);
        assert_eq!(next_at(&mut kept, "12345678901", &[&a]).delete.len(), 0);
        assert_eq!(names(&kept), ["a"]);
    }

    #[test]
    fn a_change_from_here_is_seen_unless_redis_came_back_older_before_it() {
        let (a, b, c) = (key("a", 1), key("b", 2), key("c", 3));
        let mut kept = shared("e1", &[]);
        next_at(&mut kept, "1", &[&a]);
        // Made here, and forgotten before the next reading.
        kept.insert(Arc::clone(&b), true);
        kept.advance(&history("12", 8));
        assert_eq!(next_at(&mut kept, "1", &[&a]).carry, [Arc::clone(&b)]);
        next_at(&mut kept, "12", &[&a, &b]);
        // Forgotten first, and then one made here: that is not to hide it.
        kept.insert(Arc::clone(&c), true);
        kept.advance(&history("1c", 8));
        assert_eq!(next_at(&mut kept, "1c", &[&a, &c]).carry, [Arc::clone(&b)]);
        // A reading on its way while one is made here does not make that look like a loss.
        kept.shared(&b.mark());
        let asked = kept.asked();
        kept.insert(key("d", 4), true);
        kept.advance(&history("1cd", 8));
        let merged = kept.merge(Reading { history: history("1c", 8), ..reading("e1", &[&a, &b, &c]) }, &asked);
        assert!(merged.carry.is_empty() && merged.gone.is_empty());
        assert_eq!(next_at(&mut kept, "1c", &[&a, &b, &c]).carry, [key("d", 4)], "but its own loss is one");
    }

    #[test]
    fn what_is_known_of_a_record_that_cannot_be_read_stays() {
        let (a, b) = (key("a", 1), key("b", 2));
        let mut kept = shared("e1", &[&a]);
        let mut garbled = reading("e1", &[&b]);
        garbled.unreadable = ["a".to_owned(), "c".to_owned()].into();
        let asked = kept.asked();
        let merged = kept.merge(garbled, &asked);
        assert_eq!((names(&kept), merged.gone.len(), merged.carry.len()), (vec!["a", "b"], 0, 0));
    }

    #[test]
    fn another_process_that_had_the_file_leaves_what_it_made_without_redis() {
        let (a, b, c) = (key("a", 1), key("b", 2), key("c", 3));
        let mut kept = shared("e1", &[&a]);
        let mut stood = KeptKeys::default();
        stood.insert(Arc::clone(&b), false);
        stood.insert(c, true);
        assert!(kept.adopt(&stood));
        assert_eq!(names(&kept), ["a", "b"], "what Redis has had, Redis will tell of");
        assert!(!kept.adopt(&stood));
        assert_eq!(next(&mut kept, "e1", &[&a]).carry, [b]);
    }

    #[test]
    fn a_key_deleted_without_redis_is_remembered_where_redis_has_had_it() {
        let (a, b) = (key("a", 1), key("b", 2));
        let mut kept = read_again(&shared("e1", &[&a]));
        kept.insert(b, false);
        assert!(kept.remove(&id("a")) && kept.remove(&id("b")) && !kept.remove(&id("c")));
        let mut kept = read_again(&kept);
        let merged = next(&mut kept, "e1", &[&a]);
        assert_eq!((kept.count(), merged.delete.len(), merged.carry.len()), (0, 1, 0));
    }

    #[test]
    fn deletions_are_bounded_and_those_go_first_that_redis_knows_of() {
        let mut kept = KeptKeys::default();
        let mark = |bits: usize| ApiKeyMark { id: id("a"), bits: bits as u64 };
        kept.delete(mark(0), false);
        for bits in 1..=limits::API_KEYS_DELETED_MAX {
            kept.delete(mark(bits), true);
        }
        assert_eq!(kept.deleted.len(), limits::API_KEYS_DELETED_MAX);
        assert!(kept.deleted.contains_key(&mark(0)) && !kept.deleted.contains_key(&mark(1)));
        assert!(kept.deleted.contains_key(&mark(2)));
        assert_eq!(kept.forgotten.len(), kept.deleted.len());
    }

    #[test]
    fn made_up_deletions_push_out_no_real_one_and_are_forgotten_with_the_next_reading() {
        let (a, b, c, d) = (key("a", 1), key("b", 2), key("c", 3), key("d", 4));
        let mut kept = shared("e1", &[&a, &b]);
        let asked = kept.asked();
        assert!(kept.delete(a.mark(), false) && kept.hear(b.mark()));
        // One that is on its way to us, and another.
        assert!(!kept.hear(c.mark()));
        for bits in 0..3 * limits::API_KEYS_DELETED_MAX {
            assert!(!kept.hear(ApiKeyMark { id: id("up"), bits: bits as u64 }));
        }
        assert!(!kept.hear(d.mark()));
        assert_eq!(
            (kept.deleted.len(), kept.forgotten.len()),
            (limits::API_KEYS_DELETED_MAX, limits::API_KEYS_DELETED_MAX)
        );
        assert!([&a, &b, &d].iter().all(|key| kept.deleted.contains_key(&key.mark())));
        // A reading from before it was heard does not bring the key into force, and does not end what is remembered of it.
        let merged = kept.merge(reading("e1", &[&b, &d]), &asked);
        assert_eq!((names(&kept).len(), merged.delete.len()), (0, 2));
        assert_eq!(kept.deleted.len(), limits::API_KEYS_DELETED_MAX);
        assert_eq!(read_again(&kept).deleted.len(), 2, "the disk is not filled with them");
        // One from afterwards has it, if the hash came back older, or has shown that nothing is to be remembered.
        let merged = next(&mut kept, "e1", &[&d]);
        assert_eq!((merged.delete.len(), merged.done), (1, vec![a.mark()]));
        let left: Vec<&ApiKeyMark> = kept.deleted.keys().collect();
        assert_eq!((left, kept.forgotten.len()), (vec![&a.mark(), &b.mark(), &d.mark()], 3));
        assert_eq!(next(&mut kept, "e1", &[]).done, [d.mark()]);
    }

    #[test]
    fn the_section_is_as_before_until_there_is_redis_and_nothing_else_is_one() {
        let mut kept = KeptKeys::default();
        kept.insert(key("a", 1), false);
        assert_eq!(kept.written(), json!([record(&key("a", 1))]));
        let mut kept = shared("e1", &[&key("a", 1)]);
        kept.delete(key("b", 2).mark(), false);
        let written = kept.written();
        assert_eq!(read_again(&kept).written(), written);
        let said = |change: &dyn Fn(&mut Value)| {
            let mut value = written.clone();
            change(&mut value);
            KeptKeys::read(&value).map(|kept| kept.count())
        };
        assert_eq!(said(&|_| {}), Ok(1));
        assert_eq!(KeptKeys::read(&Value::Null).map(|kept| kept.count()), Ok(0));
        assert_eq!(said(&|value| *value = json!("x")), Err("is no array".into()));
        assert_eq!(said(&|value| value["keys"][0]["hash"] = json!("x")), Err("has no key at place 0".into()));
        assert_eq!(said(&|value| value["epoch"] = json!("")), Err("has an epoch that is none".into()));
        for none in [
            "",
            ":",
            "1:",
            "0:aaaaaaaa",
            "1:aaaaaaa",
            "x:aaaaaaaa",
            "1:aaaaaaa!",
            "-1:aaaaaaaa",
            "1000000000000000:aaaaaaaa",
        ] {
            assert_eq!(
                said(&|value| value["history"] = json!(none)),
                Err("has a history that is none".into()),
                "{none}"
            );
        }
        let longest = format!("{}:{}", u32::MAX, "a".repeat(History::TEXT_BYTES_MAX));
        assert_eq!(said(&|value| value["history"] = json!(longest)), Ok(1));
        let longer = format!("{longest}aaaaaaaa");
        assert_eq!(said(&|value| value["history"] = json!(longer)), Err("has a history that is none".into()));
        assert_eq!(said(&|value| value["deleted"] = json!({})), Err("has a list of deletions that is none".into()));
        assert_eq!(said(&|value| value["deleted"][0]["mark"] = json!(1)), Err("has no deletion at place 0".into()));
        let many = vec![Value::Null; limits::API_KEYS_FIELDS_MAX + 1];
        let over = format!("has over {} keys", limits::API_KEYS_FIELDS_MAX);
        assert_eq!(said(&|value| value["keys"] = json!(many)), Err(over));
    }

    #[test]
    fn a_record_is_not_longer_than_it_is_reckoned() {
        let mut long = (*key("a", 1)).clone();
        long.id = id(&"i".repeat(limits::API_KEY_ID_BYTES_MAX));
        (long.rate, long.expires) = (u32::MAX, Some(WallTime::from_micros(u64::MAX)));
        long.streams = vec!["s".repeat(limits::STREAM_GLOB_BYTES_MAX); limits::API_KEY_LIST_MAX];
        let text = Value::Object(record(&long)).to_string();
        assert!(text.len() <= record_bytes(&long), "{} of {}", text.len(), record_bytes(&long));
        // The worst that a role may be is all escapes; even then Redis's bound holds.
        long.roles = vec!["\u{1}".repeat(limits::STREAM_GLOB_BYTES_MAX); limits::API_KEY_LIST_MAX];
        long.permissions.clone_from(&long.roles);
        let text = Value::Object(record(&long)).to_string();
        assert!(text.len() <= limits::API_KEY_RECORD_BYTES_MAX, "{}", text.len());
        assert_eq!(read_record(&Value::Object(record(&long))), Some(long));
    }
}
