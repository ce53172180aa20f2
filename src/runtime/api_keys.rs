//! The API keys in force: the configuration's and those that the admin API has made, which the state file keeps, and Redis
//! where it is configured.
//!
//! **Without Redis** every change is on the disk before the cores are told of it, and they are told before whoever asked for
//! it is answered: a key that was handed out is accepted, one whose deletion was confirmed is not. The cores get the whole
//! table anew, in the order of the changes, because the lock is held meanwhile.
//!
//! **With Redis** the keys are those of all processes that share it. A key is made there first; where Redis does not answer
//! none is made. A deletion is in force here at once, and confirmed when it is in Redis, or, while that is away, on the
//! disk, from where it gets there later. A thread reads what others have changed: when the control stream tells of it, when
//! the connection was made anew, and from time to time. The state file has a copy, for a start without Redis.
//!
//! Source: protocol version 1, section 6. Memory: at most [`limits::API_KEYS_MAX`] keys besides the configuration's, each
//! once. Errors: [`KeysError`]. Not here: what a key is (`auth::api_key`), the admin API's words (`admin_keys`), how two
//! states become one (`kept_keys`), Redis's commands (`shared_keys`).

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::auth::api_key::{ApiKey, ApiKeyId, ApiKeyMark, ApiKeys, KeyHash, Source, key_text};
use crate::auth::control::ControlEntry;
use crate::config::LogLevel;
use crate::limits;
use crate::secret::Secret;
use crate::shard::Order;
use crate::time::{Instant, WallTime};

use super::kept_keys::{KeptKeys, Merged, record_bytes};
use super::redis::{CallError, Store};
use super::shared_keys::{Put, SharedKeys};
use super::state::{StateError, StateFile};
use super::{clock, log};

/// The section of the state file that is this part's.
const SECTION: &str = "api_keys";
/// Ids of keys that one line of the log names.
const LOGGED_IDS_MAX: usize = 16;

/// What a new key is to be.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Its id, where the caller chooses it.
    pub id: Option<ApiKeyId>,
    /// Ids and globs of the streams it is for.
    pub streams: Vec<String>,
    /// Roles of who uses it.
    pub roles: Vec<String>,
    /// Permissions of who uses it.
    pub permissions: Vec<String>,
    /// Requests and handshakes a minute; 0: unlimited.
    pub rate: u32,
    /// When it ends, if it does.
    pub expires: Option<WallTime>,
}

/// Why a key is not made or deleted.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// There is a key of that id.
    #[error("there is an API key with this id")]
    Taken,
    /// There is no such key.
    #[error("there is no such API key")]
    Missing,
    /// It is the configuration's.
    #[error("the API key stands in the configuration: take it out there and have it read again")]
    Configured,
    /// There are as many as there may be.
    #[error(
        "there are as many API keys as there may be, {} or {} MiB of them: delete one first",
        limits::API_KEYS_MAX,
        limits::API_KEYS_BYTES_MAX >> 20
    )]
    TooMany,
    /// The state file is at fault.
    #[error(transparent)]
    State(#[from] StateError),
    /// Redis, which has the keys, is.
    #[error("{0}: API keys are kept there, and nothing was changed")]
    Redis(CallError),
    /// Redis has the key still, and will have it until somebody puts right what it refuses.
    #[error(
        "{0}: the API key is refused here from now on, and by every process that hears of it, but it stays in Redis, where a \
         process that starts will find it; delete it once more when Redis lets this server"
    )]
    Undeleted(CallError),
    /// The key is deleted in this process alone, for as long as it lives.
    #[error("{redis}, and {state}: the API key is refused by this process from now on; delete it once more")]
    Unkept {
        /// Why Redis does not have the deletion.
        redis: CallError,
        /// Why it is not on the disk.
        state: StateError,
    },
}

/// Tells every core of a new table.
pub type Tell = Box<dyn Fn(&Arc<ApiKeys>) + Send + Sync>;

/// The keys of this process.
pub struct KeyStore {
    state: Arc<StateFile>,
    tell: Tell,
    inner: Mutex<Inner>,
    redis: Option<Redis>,
}

/// What there is where the keys are shared.
struct Redis {
    keys: SharedKeys,
    store: Store,
    notices: Mutex<Notices>,
    noticed: Condvar,
    /// What has been said, once, since the keys were last read.
    said: Mutex<Vec<String>>,
}

/// What the thread that reads the keys is told.
#[derive(Default)]
struct Notices {
    /// They may have changed.
    read: bool,
    /// These are deleted.
    deleted: Vec<ApiKeyMark>,
    /// How reading them for the first time has ended: whether they were read.
    first: Option<bool>,
    /// Bytes of the last reading.
    bytes: usize,
}

#[derive(Default)]
struct Inner {
    configured: Vec<Arc<ApiKey>>,
    kept: KeptKeys,
}

impl Inner {
    /// Where both have an id, the configuration's key counts: it was moved there.
    fn table(&self) -> Arc<ApiKeys> {
        Arc::new(ApiKeys::new(self.configured.iter().chain(self.kept.keys()).map(Arc::clone)))
    }

    fn is_configured(&self, id: &ApiKeyId) -> bool {
        self.configured.iter().any(|key| key.id == *id)
    }

    /// Whether there is room for such a key.
    fn admit(&self, key: &ApiKey) -> Result<(), KeysError> {
        if self.kept.find(&key.id).is_some() || self.is_configured(&key.id) {
            return Err(KeysError::Taken);
        }
        let too_many = self.kept.count() >= limits::API_KEYS_MAX;
        if too_many || self.kept.bytes() + record_bytes(key) > limits::API_KEYS_BYTES_MAX {
            return Err(KeysError::TooMany);
        }
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl KeyStore {
    /// The configuration's keys and those of `state`. Whenever they change, `tell` tells the cores. With `store` they are
    /// shared through it, once [`KeyStore::follow`] runs.
    ///
    /// # Errors
    /// What is wrong with the state file's section: a sentence for the operator.
    pub fn new(
        configured: &[Arc<ApiKey>],
        state: Arc<StateFile>,
        store: Option<Store>,
        tell: Tell,
    ) -> Result<KeyStore, StateError> {
        let kept = match state.section(SECTION) {
            None => KeptKeys::default(),
            Some(section) => KeptKeys::read(&section).map_err(|what| state.corrupt(SECTION, what))?,
        };
        let inner = Mutex::new(Inner { configured: configured.to_vec(), kept });
        let redis = store.map(|store| Redis {
            keys: SharedKeys::new(store.clone()),
            store,
            notices: Mutex::new(Notices { read: true, ..Notices::default() }),
            noticed: Condvar::new(),
            said: Mutex::default(),
        });
        Ok(KeyStore { state, tell, inner, redis })
    }

    /// The table in force, for a core that starts.
    pub fn table(&self) -> Arc<ApiKeys> {
        lock(&self.inner).table()
    }

    /// The configuration was read again: these are its keys now.
    pub fn configure(&self, configured: &[Arc<ApiKey>]) {
        let mut inner = lock(&self.inner);
        inner.configured = configured.to_vec();
        (self.tell)(&inner.table());
    }

    /// Every key: the configuration's, in its order, then those that were made, by their ids.
    pub fn list(&self) -> Vec<Arc<ApiKey>> {
        let inner = lock(&self.inner);
        let made = inner.kept.keys().filter(|key| !inner.is_configured(&key.id));
        inner.configured.iter().chain(made).map(Arc::clone).collect()
    }

    /// Makes a key: what is kept of it, and its text, which is kept nowhere. `random` fills bytes with chance.
    ///
    /// # Errors
    /// [`KeysError`].
    pub fn make(
        &self,
        wanted: Wanted,
        now: WallTime,
        random: impl Fn(&mut [u8]) -> Result<(), StateError>,
    ) -> Result<(Arc<ApiKey>, Secret), KeysError> {
        let (mut chance, mut salt, mut name) = ([0; 32], [0; 16], [0; 8]);
        random(&mut chance)?;
        random(&mut salt)?;
        random(&mut name)?;
        let id = wanted.id.unwrap_or_else(|| ApiKeyId::of_random(name));
        let text = key_text(&id, &chance);
        let key = Arc::new(ApiKey {
            hash: KeyHash::new(&text, salt),
            id,
            streams: wanted.streams,
            roles: wanted.roles,
            permissions: wanted.permissions,
            rate: wanted.rate,
            created: Some(now),
            expires: wanted.expires,
            source: Source::Admin,
        });
        match &self.redis {
            Some(redis) => self.make_shared(redis, &key)?,
            None => {
                let added = Arc::clone(&key);
                self.change(|inner| {
                    inner.admit(&added)?;
                    inner.kept.insert(added, false);
                    Ok(())
                })?;
            }
        }
        Ok((key, text))
    }

    /// Deletes a key that was made.
    ///
    /// # Errors
    /// [`KeysError`].
    pub fn delete(&self, id: &ApiKeyId) -> Result<(), KeysError> {
        match &self.redis {
            Some(redis) => self.delete_shared(redis, id),
            None => self.change(|inner| {
                if inner.is_configured(id) {
                    return Err(KeysError::Configured);
                }
                if inner.kept.remove(id) { Ok(()) } else { Err(KeysError::Missing) }
            }),
        }
    }

    /// Changes the keys that were made, keeps that and tells the cores.
    fn change(&self, change: impl FnOnce(&mut Inner) -> Result<(), KeysError>) -> Result<(), KeysError> {
        let mut inner = lock(&self.inner);
        let configured = inner.configured.clone();
        let changed = self.state.update(SECTION, |section| {
            // What stands in the file counts: it may have been another process's until now.
            let kept = KeptKeys::read(&section).map_err(|what| self.state.corrupt(SECTION, what))?;
            let mut changed = Inner { configured, kept };
            change(&mut changed)?;
            Ok::<_, KeysError>((changed.kept.written(), changed))
        })?;
        *inner = changed;
        (self.tell)(&inner.table());
        Ok(())
    }

    fn make_shared(&self, redis: &Redis, key: &Arc<ApiKey>) -> Result<(), KeysError> {
        lock(&self.inner).admit(key)?;
        match redis.keys.put(std::slice::from_ref(key)) {
            Ok((outcome, history)) => match outcome.first() {
                Some(Put::Done) => {
                    let mut inner = lock(&self.inner);
                    inner.kept.insert(Arc::clone(key), true);
                    inner.kept.advance(&history);
                    (self.tell)(&inner.table());
                    self.copy(redis, &mut inner);
                }
                Some(Put::Full) => return Err(KeysError::TooMany),
                Some(Put::Taken) | None => {
                    // Somebody has made it a moment ago.
                    redis.read_soon();
                    return Err(KeysError::Taken);
                }
            },
            Err(error) => {
                if error == CallError::Unanswered {
                    // It may be there, and nobody will ever have it: it is taken out when Redis answers again.
                    let mut inner = lock(&self.inner);
                    inner.kept.delete(key.mark(), false);
                    self.copy(redis, &mut inner);
                }
                return Err(KeysError::Redis(error));
            }
        }
        redis.publish(None);
        Ok(())
    }

    fn delete_shared(&self, redis: &Redis, id: &ApiKeyId) -> Result<(), KeysError> {
        let mark = {
            let mut inner = lock(&self.inner);
            if inner.is_configured(id) {
                return Err(KeysError::Configured);
            }
            let mark = inner.kept.find(id).map(|key| key.mark());
            let pending = inner.kept.being_deleted(id).cloned();
            match (&mark, pending) {
                (Some(mark), _) => {
                    inner.kept.delete(mark.clone(), false);
                    (self.tell)(&inner.table());
                }
                (None, Some(pending)) => {
                    drop(inner);
                    return self.delete_again(redis, id, &pending);
                }
                // This process may not have heard of it yet, or can make nothing of it.
                (None, None) => {}
            }
            mark
        };
        let deleted = redis.keys.delete(id, mark.as_ref());
        match (mark, deleted) {
            (None, Ok(None)) => Err(KeysError::Missing),
            (None, Err(error)) => Err(KeysError::Redis(error)),
            (Some(mark), Ok(_)) | (None, Ok(Some(Some(mark)))) => {
                let mut inner = lock(&self.inner);
                if inner.kept.delete(mark.clone(), true) {
                    (self.tell)(&inner.table());
                }
                self.copy(redis, &mut inner);
                drop(inner);
                redis.publish(Some(&mark));
                Ok(())
            }
            (None, Ok(Some(None))) => {
                redis.publish(None);
                Ok(())
            }
            (Some(mark), Err(error)) => {
                let kept = self.write_copy(&mut lock(&self.inner));
                // Whoever hears of it refuses the key, whether or not it is still in Redis.
                redis.publish(Some(&mark));
                redis.read_soon();
                match (kept, error) {
                    (Err(state), redis) => Err(KeysError::Unkept { redis, state }),
                    (Ok(()), error @ CallError::Refused(_)) => Err(KeysError::Undeleted(error)),
                    (Ok(()), error) => {
                        let sentence =
                            "An API key is deleted here; it will be in Redis, and so everywhere, once Redis answers.";
                        log::write(LogLevel::Warn, &[("api_key", id), ("why", &error)], sentence);
                        Ok(())
                    }
                }
            }
        }
    }

    /// Deletes a key that is deleted here, and of which Redis does not know yet.
    fn delete_again(&self, redis: &Redis, id: &ApiKeyId, mark: &ApiKeyMark) -> Result<(), KeysError> {
        let was_there = match redis.keys.delete(id, Some(mark)) {
            Ok(found) => found.is_some(),
            Err(error @ CallError::Refused(_)) => return Err(KeysError::Undeleted(error)),
            // It is on its way.
            Err(CallError::Away | CallError::Unanswered) => return Err(KeysError::Missing),
        };
        let mut inner = lock(&self.inner);
        inner.kept.delete(mark.clone(), true);
        self.copy(redis, &mut inner);
        drop(inner);
        redis.publish(Some(mark));
        if was_there { Ok(()) } else { Err(KeysError::Missing) }
    }

    /// Writes what is known of the keys in Redis to the state file.
    fn write_copy(&self, inner: &mut Inner) -> Result<(), StateError> {
        self.state.update(SECTION, |section| {
            let stood = KeptKeys::read(&section).map_err(|what| self.state.corrupt(SECTION, what))?;
            if inner.kept.adopt(&stood)
                && let Some(redis) = &self.redis
            {
                (self.tell)(&inner.table());
                redis.read_soon();
            }
            Ok((inner.kept.written(), ()))
        })
    }

    /// The same where nothing hangs on it but the next start.
    fn copy(&self, redis: &Redis, inner: &mut Inner) {
        if let Err(error) = self.write_copy(inner)
            && redis.is_news(&error.to_string())
        {
            let sentence = "The API keys in Redis are not copied to the state file: a start while Redis is away would not know them.";
            log::write(LogLevel::Warn, &[("error", &error)], sentence);
        }
    }

    /// Control events were heard: those that are of API keys are taken note of. Never waits.
    pub fn heard(&self, entries: &[ControlEntry]) {
        let Some(redis) = &self.redis else { return };
        let mut notices = lock(&redis.notices);
        for entry in entries.iter().filter(|entry| entry.is_of_api_keys()) {
            notices.read = true;
            if let Some(mark) = entry.deleted_api_key()
                && notices.deleted.len() < limits::API_KEYS_HEARD_MAX
            {
                notices.deleted.push(mark);
            }
        }
        if notices.read {
            redis.noticed.notify_all();
        }
    }

    /// What stands in Redis may have changed, or can be read now. Never waits.
    pub fn read_soon(&self) {
        if let Some(redis) = &self.redis {
            redis.read_soon();
        }
    }

    /// Waits until the keys in Redis have been read for the first time, at most so long; not where Redis does not answer.
    /// Whether they were read.
    pub fn wait_for_first(&self, patience: Duration) -> bool {
        let Some(redis) = &self.redis else { return true };
        let notices = lock(&redis.notices);
        let waited = redis.noticed.wait_timeout_while(notices, patience, |notices| notices.first.is_none());
        let (notices, _) = waited.unwrap_or_else(PoisonError::into_inner);
        notices.first == Some(true)
    }

    /// Follows what stands in Redis until the process ends, on a thread of its own. `random` is for an epoch.
    pub fn follow(&self, random: impl Fn(&mut [u8]) -> Result<(), StateError>) {
        let Some(redis) = &self.redis else { return };
        let mut last = None;
        loop {
            let (read, deleted) = redis.wait(last);
            if !deleted.is_empty() {
                self.take_deleted(redis, &deleted);
            }
            if !read {
                continue;
            }
            let outcome = self.read_all(redis, &random);
            last = Some(clock::now().at);
            // That Redis is away is said by whoever speaks with it.
            if let Err(error @ CallError::Refused(_)) = &outcome
                && redis.is_news(&error.to_string())
            {
                let sentence = "The API keys in Redis cannot be read; those known here stay in force until they can.";
                log::write(LogLevel::Warn, &[("error", error)], sentence);
            }
            let mut notices = lock(&redis.notices);
            if notices.first.is_none() {
                notices.first = Some(outcome.is_ok());
                redis.noticed.notify_all();
            }
        }
    }

    /// Others have deleted these. There may be many, not all of which are of keys: whoever else wants the keys goes between.
    fn take_deleted(&self, redis: &Redis, marks: &[ApiKeyMark]) {
        let mut gone: Vec<ApiKeyId> = Vec::new();
        for marks in marks.chunks(limits::API_KEYS_HEARD_AT_ONCE) {
            let mut inner = lock(&self.inner);
            let before = gone.len();
            gone.extend(marks.iter().filter(|mark| inner.kept.hear((*mark).clone())).map(|mark| mark.id.clone()));
            if gone.len() > before {
                (self.tell)(&inner.table());
            }
        }
        if !gone.is_empty() {
            self.copy(redis, &mut lock(&self.inner));
            say(&gone, "API keys were deleted by another process.");
        }
    }

    /// Reads the keys in Redis, puts them in force, and puts right what is not as it should be there.
    fn read_all(&self, redis: &Redis, random: &impl Fn(&mut [u8]) -> Result<(), StateError>) -> Result<(), CallError> {
        let mut chance = [0; 8];
        random(&mut chance).map_err(|error| CallError::Refused(error.to_string()))?;
        let epoch = ApiKeyId::of_random(chance);
        for _ in 0..limits::API_KEYS_ROUNDS_MAX {
            let asked = lock(&self.inner).kept.asked();
            let reading = redis.keys.read(epoch.as_str())?;
            if !reading.unreadable.is_empty() && redis.is_news("unreadable") {
                let sentence = "Redis holds records of API keys that cannot be read: they are not in force. Deleting them by their ids removes them.";
                log::write(LogLevel::Error, &[("records", &reading.unreadable.len())], sentence);
            }
            lock(&redis.notices).bytes = reading.bytes;
            let merged = {
                let mut inner = lock(&self.inner);
                let merged = inner.kept.merge(reading, &asked);
                if merged.changed {
                    (self.tell)(&inner.table());
                }
                if merged.dirty {
                    self.copy(redis, &mut inner);
                }
                merged
            };
            merged.done.iter().for_each(|mark| redis.publish(Some(mark)));
            say(&merged.gone, "API keys are no longer in Redis: another process has deleted them.");
            let sentence =
                "API keys from before there was Redis are not carried over and end: it has others of their ids.";
            say(&merged.lost, sentence);
            if self.put_right(redis, merged)? {
                redis.settled();
                return Ok(());
            }
        }
        // Others change them all the time: that is for the next time.
        redis.read_soon();
        Ok(())
    }

    /// Puts in Redis what should be there, and takes out what should not; whether nothing is left to do.
    fn put_right(&self, redis: &Redis, merged: Merged) -> Result<bool, CallError> {
        let Merged { delete, carry, .. } = merged;
        if !delete.is_empty() {
            redis.keys.take_out(&delete)?;
            delete.iter().for_each(|(mark, _)| redis.publish(Some(mark)));
        }
        if carry.is_empty() {
            return Ok(delete.is_empty());
        }
        let (outcomes, history) = redis.keys.put(&carry)?;
        let mut inner = lock(&self.inner);
        inner.kept.advance(&history);
        let mut done = Vec::new();
        for (key, outcome) in carry.iter().zip(&outcomes) {
            if *outcome == Put::Done {
                inner.kept.shared(&key.mark());
                done.push(key.id.clone());
            }
        }
        self.copy(redis, &mut inner);
        drop(inner);
        redis.publish(None);
        say(&done, "API keys that were not in Redis, or not any more, are there now, for every process.");
        let full = outcomes.iter().filter(|outcome| **outcome == Put::Full).count();
        if full > 0 && redis.is_news("full") {
            let sentence = "There are as many API keys in Redis as there may be: some of the state file's are not carried over, and are in force here alone.";
            log::write(LogLevel::Error, &[("api_keys", &full)], sentence);
        }
        // Where there is no room, reading again makes none.
        Ok(full > 0 || delete.is_empty() && done.len() == carry.len())
    }
}

impl Redis {
    fn read_soon(&self) {
        lock(&self.notices).read = true;
        self.noticed.notify_all();
    }

    /// Tells the other processes that something has changed.
    fn publish(&self, deleted: Option<&ApiKeyMark>) {
        self.store.order(Order::Publish(ControlEntry::api_keys_changed(deleted, clock::now().wall)));
    }

    /// Waits until there is something to do: whether to read, and what was deleted. `last`: when the keys were last read.
    fn wait(&self, last: Option<Instant>) -> (bool, Vec<ApiKeyMark>) {
        let mut notices = lock(&self.notices);
        loop {
            let since = last.map(|last| clock::now().at.since(last));
            let apart = if notices.read { spacing(notices.bytes) } else { limits::API_KEYS_REREAD };
            let wait = since.map_or(Duration::ZERO, |since| apart.saturating_sub(since));
            let read = wait.is_zero();
            if read || !notices.deleted.is_empty() {
                if read {
                    notices.read = false;
                }
                return (read, std::mem::take(&mut notices.deleted));
            }
            let waited = self.noticed.wait_timeout(notices, wait);
            notices = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Whether this has not been said since all was well.
    fn is_news(&self, what: &str) -> bool {
        let mut said = lock(&self.said);
        let news = said.len() < limits::REDIS_SAID_MAX && !said.iter().any(|known| known == what);
        if news {
            said.push(what.to_owned());
        }
        news
    }

    /// The keys were read: what kept them from being read is over.
    fn settled(&self) {
        lock(&self.said).retain(|what| what == "unreadable" || what == "full" || what.starts_with("the state file"));
    }
}

/// How long nothing is read after a reading of so many bytes: whoever says all the time that something has changed does not
/// have everything read all the time.
fn spacing(bytes: usize) -> Duration {
    let bytes = bytes.min(limits::API_KEYS_REPLY_BYTES_MAX);
    Duration::from_millis((bytes * 1000 / limits::API_KEYS_READ_BYTES_PER_SEC) as u64)
        .max(limits::API_KEYS_READ_INTERVAL)
}

/// Says what has become of keys, and of which.
fn say(ids: &[ApiKeyId], sentence: &str) {
    if ids.is_empty() {
        return;
    }
    let mut names: Vec<&str> = ids.iter().take(LOGGED_IDS_MAX).map(ApiKeyId::as_str).collect();
    if ids.len() > LOGGED_IDS_MAX {
        names.push("…");
    }
    log::write(LogLevel::Info, &[("api_keys", &ids.len()), ("ids", &names.join(","))], sentence);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_more_there_is_to_read_the_less_often_it_is_read() {
        // What usual keys take, of about 400 bytes: 250 ms are kept, with the time that reading takes.
        assert_eq!([0, 1, 100, 1_000].map(|keys| spacing(keys * 400)), [limits::API_KEYS_READ_INTERVAL; 4]);
        assert!(spacing(3_000 * 400) < Duration::from_millis(150));
        assert_eq!(spacing(8 << 20), Duration::from_secs(1));
        assert_eq!([16 << 20, usize::MAX].map(spacing), [Duration::from_secs(2); 2]);
    }
}
