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

/// The keys, and what is remembered to put them together with those in Redis.
#[derive(Clone, Debug, Default)]
pub struct KeptKeys {
    made: BTreeMap<ApiKeyId, Made>,
    deleted: BTreeMap<ApiKeyMark, Deleted>,
    epoch: Option<Box<str>>,
    turn: u64,
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
    /// Redis does not have it any more.
    done: bool,
    /// The turn it was deleted in.
    turn: u64,
}

/// What stands in Redis.
#[derive(Debug, Default)]
pub struct Reading {
    /// The epoch of what was read.
    pub epoch: Box<str>,
    /// Each key, and its record as it stands there.
    pub keys: BTreeMap<ApiKeyId, (Arc<ApiKey>, Vec<u8>)>,
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

    /// Changes so far: what is read from now on knows of all of them.
    pub fn turn(&self) -> u64 {
        self.turn
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
        self.turn += 1;
        let turn = self.turn;
        // Once it is known that Redis has it done, hearing of it again changes nothing.
        self.deleted.entry(mark).and_modify(|deleted| deleted.done |= done).or_insert(Deleted { done, turn });
        while self.deleted.len() > limits::API_KEYS_DELETED_MAX {
            let oldest = self.deleted.iter().min_by_key(|(_, deleted)| (!deleted.done, deleted.turn));
            let Some(mark) = oldest.map(|(mark, _)| mark.clone()) else { break };
            self.deleted.remove(&mark);
        }
        found
    }

    /// Takes a key out that Redis has nothing to do with: nothing more is remembered of it, unless Redis has had it.
    pub fn remove(&mut self, id: &ApiKeyId) -> bool {
        match self.made.get(id) {
            None => false,
            Some(made) if made.shared => self.delete(made.key.mark(), false),
            Some(_) => self.made.remove(id).is_some(),
        }
    }

    /// Whether a key of that id was deleted and Redis does not know yet.
    pub fn is_being_deleted(&self, id: &ApiKeyId) -> bool {
        let of_id = ApiKeyMark { id: id.clone(), bits: 0 }..=ApiKeyMark { id: id.clone(), bits: u64::MAX };
        self.deleted.range(of_id).any(|(_, deleted)| !deleted.done)
    }

    /// A key that was carried over is in Redis now.
    pub fn shared(&mut self, mark: &ApiKeyMark) {
        if let Some(made) = self.made.get_mut(&mark.id)
            && made.key.mark() == *mark
        {
            made.shared = true;
        }
    }

    /// Puts what was read of Redis in force. `asked`: the turn before it was asked for.
    pub fn merge(&mut self, reading: Reading, asked: u64) -> Merged {
        let mut merged = Merged::default();
        let new_life = self.epoch.as_deref() != Some(&*reading.epoch);
        let before = std::mem::take(&mut self.made);
        let (mut there, mut lost) = (BTreeSet::new(), Vec::new());
        for (id, (key, record)) in reading.keys {
            let mark = key.mark();
            there.insert(mark.clone());
            if self.deleted.contains_key(&mark) {
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
                    lost.extend(known.filter(|known| !known.shared).map(|known| known.key.mark()));
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
            } else if new_life || !known.shared {
                merged.dirty |= known.shared;
                merged.carry.push(Arc::clone(&known.key));
                self.made.insert(id, Made { shared: false, ..known });
            } else {
                (merged.changed, merged.dirty) = (true, true);
                merged.gone.push(id);
            }
        }
        // What could not be carried over would be taken for another's when the file is read again.
        for mark in lost {
            merged.lost.push(mark.id.clone());
            self.delete(mark, true);
        }
        for (mark, deleted) in &mut self.deleted {
            if !deleted.done && deleted.turn <= asked && !there.contains(mark) {
                (deleted.done, merged.dirty) = (true, true);
                merged.done.push(mark.clone());
            }
        }
        if new_life {
            self.epoch = Some(reading.epoch);
            merged.dirty = true;
        }
        merged
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
        let mut deleted: Vec<(&ApiKeyMark, &Deleted)> = self.deleted.iter().collect();
        deleted.sort_by_key(|(_, deleted)| deleted.turn);
        let deleted: Vec<Value> = deleted
            .into_iter()
            .map(|(mark, deleted)| json!({ "id": mark.id.as_str(), "mark": mark.bits_text(), "done": deleted.done }))
            .collect();
        json!({ "keys": keys, "epoch": epoch, "deleted": deleted })
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
        Reading { epoch: epoch.into(), keys: keys.iter().map(entry).collect(), unreadable: BTreeSet::new() }
    }

    /// What is kept of `made`, which Redis has had in the life of `epoch`.
    fn shared(epoch: &str, made: &[&Arc<ApiKey>]) -> KeptKeys {
        let mut kept = KeptKeys::default();
        let merged = kept.merge(reading(epoch, made), 0);
        assert!(merged.dirty && merged.carry.is_empty() && merged.gone.is_empty());
        kept
    }

    fn names(kept: &KeptKeys) -> Vec<&str> {
        kept.keys().map(|key| key.id.as_str()).collect()
    }

    /// The next reading, which was asked for now.
    fn next(kept: &mut KeptKeys, epoch: &str, keys: &[&Arc<ApiKey>]) -> Merged {
        let asked = kept.turn();
        kept.merge(reading(epoch, keys), asked)
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
        let asked = kept.turn();
        assert!(kept.delete(a.mark(), false));
        assert!(kept.is_being_deleted(&id("a")) && !kept.is_being_deleted(&id("b")));
        // A reading that began before, one that began after, one after a restart: Redis has not heard of it.
        let merged = kept.merge(reading("e1", &[&a, &b]), asked);
        assert_eq!((names(&kept), merged.changed, merged.delete.len()), (vec!["b"], false, 1));
        let mut kept = read_again(&kept);
        let merged = next(&mut kept, "e1", &[&a, &b]);
        assert_eq!((names(&kept), merged.delete.first().map(|(mark, _)| mark.clone())), (vec!["b"], Some(a.mark())));
        // It is done when it is seen to be.
        let merged = next(&mut kept, "e1", &[&b]);
        assert_eq!((merged.done, merged.gone.len()), (vec![a.mark()], 0));
        assert!(!kept.is_being_deleted(&id("a")));
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
    fn a_deletion_is_done_only_by_a_reading_that_began_after_it() {
        let a = key("a", 1);
        let mut kept = shared("e1", &[]);
        let asked = kept.turn();
        // Made and deleted while a reading is on its way that has neither.
        kept.insert(Arc::clone(&a), true);
        kept.delete(a.mark(), false);
        assert!(kept.merge(reading("e1", &[]), asked).done.is_empty());
        assert!(kept.is_being_deleted(&id("a")));
    }

    #[test]
    fn a_key_made_while_a_reading_is_on_its_way_stays() {
        let (a, b) = (key("a", 1), key("b", 2));
        let mut kept = shared("e1", &[&a]);
        let asked = kept.turn();
        kept.insert(Arc::clone(&b), true);
        let merged = kept.merge(reading("e1", &[&a]), asked);
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

    #[test]
    fn what_is_known_of_a_record_that_cannot_be_read_stays() {
        let (a, b) = (key("a", 1), key("b", 2));
        let mut kept = shared("e1", &[&a]);
        let mut garbled = reading("e1", &[&b]);
        garbled.unreadable = ["a".to_owned(), "c".to_owned()].into();
        let asked = kept.turn();
        let merged = kept.merge(garbled, asked);
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
