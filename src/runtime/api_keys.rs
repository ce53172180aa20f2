//! The API keys in force: the configuration's and those that the admin API has made, which the state file keeps.
//!
//! Every change is on the disk before the cores are told of it, and they are told before whoever asked for it is answered:
//! a key that was handed out is accepted, one whose deletion was confirmed is not. The cores get the whole table anew, in
//! the order of the changes, because the lock is held meanwhile.
//!
//! Source: protocol version 1, section 6. Memory: at most [`limits::API_KEYS_MAX`] keys besides the configuration's, each
//! once. Errors: [`KeysError`]. Not here: what a key is (`auth::api_key`), the admin API's words (`admin_keys`).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Map, Value, json};

use crate::auth::api_key::{ApiKey, ApiKeyId, ApiKeys, KeyHash, Source, is_stream_glob, key_text};
use crate::limits;
use crate::secret::Secret;
use crate::time::WallTime;

use super::state::{StateError, StateFile};

/// The section of the state file that is this part's.
const SECTION: &str = "api_keys";

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
    #[error("there are as many API keys as there may be, {}: delete one first", limits::API_KEYS_MAX)]
    TooMany,
    /// The state file is at fault.
    #[error(transparent)]
    State(#[from] StateError),
}

/// Tells every core of a new table.
pub type Tell = Box<dyn Fn(&Arc<ApiKeys>) + Send + Sync>;

/// The keys of this process.
pub struct KeyStore {
    state: Arc<StateFile>,
    tell: Tell,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    configured: Vec<Arc<ApiKey>>,
    made: BTreeMap<ApiKeyId, Arc<ApiKey>>,
}

impl Inner {
    /// Where both have an id, the configuration's key counts: it was moved there.
    fn table(&self) -> Arc<ApiKeys> {
        Arc::new(ApiKeys::new(self.configured.iter().chain(self.made.values()).map(Arc::clone)))
    }
}

impl KeyStore {
    /// The configuration's keys and those of `state`. Whenever they change, `tell` tells the cores.
    ///
    /// # Errors
    /// What is wrong with the state file's section: a sentence for the operator.
    pub fn new(configured: &[Arc<ApiKey>], state: Arc<StateFile>, tell: Tell) -> Result<KeyStore, StateError> {
        let made = match state.section(SECTION) {
            None => BTreeMap::new(),
            Some(section) => read(&section).map_err(|what| state.corrupt(SECTION, what))?,
        };
        let inner = Inner { configured: configured.to_vec(), made };
        Ok(KeyStore { state, tell, inner: Mutex::new(inner) })
    }

    /// The table in force, for a core that starts.
    pub fn table(&self) -> Arc<ApiKeys> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).table()
    }

    /// The configuration was read again: these are its keys now.
    pub fn configure(&self, configured: &[Arc<ApiKey>]) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.configured = configured.to_vec();
        (self.tell)(&inner.table());
    }

    /// Every key: the configuration's, in its order, then those that were made, by their ids.
    pub fn list(&self) -> Vec<Arc<ApiKey>> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let is_configured = |id: &ApiKeyId| inner.configured.iter().any(|key| key.id == *id);
        let made = inner.made.values().filter(|key| !is_configured(&key.id));
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
        let added = Arc::clone(&key);
        self.change(|inner| {
            let is_taken = inner.made.contains_key(&added.id) || inner.configured.iter().any(|it| it.id == added.id);
            if is_taken {
                return Err(KeysError::Taken);
            }
            if inner.made.len() >= limits::API_KEYS_MAX {
                return Err(KeysError::TooMany);
            }
            inner.made.insert(added.id.clone(), added);
            Ok(())
        })?;
        Ok((key, text))
    }

    /// Deletes a key that was made.
    ///
    /// # Errors
    /// [`KeysError`].
    pub fn delete(&self, id: &ApiKeyId) -> Result<(), KeysError> {
        self.change(|inner| {
            if inner.configured.iter().any(|key| key.id == *id) {
                return Err(KeysError::Configured);
            }
            inner.made.remove(id).map(drop).ok_or(KeysError::Missing)
        })
    }

    /// Changes the keys that were made, keeps that and tells the cores.
    fn change(&self, change: impl FnOnce(&mut Inner) -> Result<(), KeysError>) -> Result<(), KeysError> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let configured = inner.configured.clone();
        let changed = self.state.update(SECTION, |section| {
            // What stands in the file counts: it may have been another process's until now.
            let made = read(&section).map_err(|what| self.state.corrupt(SECTION, what))?;
            let mut changed = Inner { configured, made };
            change(&mut changed)?;
            Ok::<_, KeysError>((Value::Array(changed.made.values().map(|key| written(key)).collect()), changed))
        })?;
        *inner = changed;
        (self.tell)(&inner.table());
        Ok(())
    }
}

/// A key as the state file has it.
fn written(key: &ApiKey) -> Value {
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
    Value::Object(object)
}

/// The keys of the state file's section, which is null where there is none yet.
///
/// Errors: what is wrong, as the end of a sentence.
fn read(section: &Value) -> Result<BTreeMap<ApiKeyId, Arc<ApiKey>>, String> {
    if section.is_null() {
        return Ok(BTreeMap::new());
    }
    let keys = section.as_array().ok_or("is no array")?;
    if keys.len() > limits::API_KEYS_MAX {
        return Err(format!("has over {} keys", limits::API_KEYS_MAX));
    }
    let mut made = BTreeMap::new();
    for (place, key) in keys.iter().enumerate() {
        let key = read_key(key).ok_or_else(|| format!("has no key at place {place}"))?;
        made.insert(key.id.clone(), Arc::new(key));
    }
    Ok(made)
}

fn read_key(value: &Value) -> Option<ApiKey> {
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
pub(super) fn is_word(text: &str) -> bool {
    !text.is_empty() && text.len() <= limits::STREAM_GLOB_BYTES_MAX
}

/// The texts of an array that are few and each of which `fits`; `None` where it is none.
pub(super) fn texts(value: &Value, fits: impl Fn(&str) -> bool) -> Option<Vec<String>> {
    let values = value.as_array().filter(|values| values.len() <= limits::API_KEY_LIST_MAX)?;
    values.iter().map(|value| value.as_str().filter(|text| fits(text)).map(str::to_owned)).collect()
}
