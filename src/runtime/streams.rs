//! The streams in force: the configuration's, and those that the admin API has made, which the state file keeps; and which of
//! both an administrator has stopped.
//!
//! Every change is on the disk before the cores are told of it, and they are told before whoever asked for it is answered:
//! a stream that was made can be watched, one whose deletion was confirmed cannot. The cores get a catalog that shares all
//! that stays the same, and the ids of what does not, in the order of the changes, because the lock is held meanwhile.
//!
//! **With Redis** the streams that were made are those of all processes that share it, and so is which are stopped: who is
//! asked for one, or to change it, looks there first, for another may have changed it just now. A change says what it is a
//! change of, is tried anew where that has been changed meanwhile, and is made nowhere while Redis is away. A thread reads
//! what others have changed: what the control stream names, and all of it when the connection was made anew and from time to time. The state
//! file has a copy, for a start without Redis, which is carried over once to a Redis that has another epoch.
//!
//! A stream is kept as the JSON it was made of, secrets included (`env:` and `file:` stay what they are, and are read anew at
//! each start and reload). One whose variable or file is not there at a start is not polled, and is when it is there again; a
//! reload leaves it what it was. What is kept and is no configuration any more for another reason ends the start, by name.
//!
//! Where the configuration and the admin API have a stream of the same id, the configuration's counts.
//!
//! Source: protocol version 1, section 6. Memory: at most [`limits::MANAGED_STREAMS_MAX`] streams besides the
//! configuration's, [`limits::MANAGED_BYTES_MAX`] of their JSON. Errors: [`StreamsError`]. Not here: what a stream's JSON
//! means (`config::managed`), the admin API's words (`admin_streams`), what cores do about a change (`shard::managed`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::auth::control::ControlEntry;
use crate::commands::check::ProcessSources;
use crate::config::{Config, LogLevel, Managed, ManagedError, Members, Sources, judge, masked, members_of, unmasked};
use crate::guard::Policy;
use crate::ids::StreamId;
use crate::limits;
use crate::shard::{Catalog, Options, Order};
use crate::stream;
use crate::stream::poll::UpstreamCode;
use crate::time::{Instant, WallTime};

use super::redis::{CallError, Store};
use super::shared_streams::{One, Put, Reading, SharedStreams};
use super::state::{StateError, StateFile};
use super::{clock, log};

/// The section of the state file that is this part's.
const SECTION: &str = "streams";
/// Its member with the streams, by their ids,
const MADE: &str = "made";
/// and the one with the ids of those that are stopped.
const STOPPED: &str = "stopped";
/// The member with the epoch of the Redis that it is a copy of, where it is one.
const EPOCH: &str = "epoch";

/// Why a stream is not made, changed or deleted.
#[derive(Debug, thiserror::Error)]
pub enum StreamsError {
    /// There is a stream of that id.
    #[error("there is a stream with this id")]
    Taken,
    /// There is no such stream.
    #[error("there is no such stream")]
    Missing,
    /// It is the configuration's.
    #[error("the stream stands in the configuration: change it there and have it read again")]
    Configured,
    /// It is another than the caller knows.
    #[error("the stream has been changed since: read it again")]
    Changed,
    /// The body names another stream than the path.
    #[error("`stream.id` is another than the path's: a stream keeps its id")]
    OtherId,
    /// There are as many as there may be.
    #[error(
        "there are as many streams as there may be, {} or {} MiB of them: delete one first",
        limits::MANAGED_STREAMS_MAX,
        limits::MANAGED_BYTES_MAX >> 20
    )]
    TooMany,
    /// Others change it all the time.
    #[error("the stream is being changed elsewhere all the time, and was not changed here: try again")]
    Contended,
    /// It is stopped, and not polled.
    #[error("the stream is stopped: start it first")]
    Stopped,
    /// It is none.
    #[error(transparent)]
    Invalid(#[from] ManagedError),
    /// It may not be polled from where it says, or not with those headers.
    #[error("the stream may not be polled: {}", .0.join("; "))]
    Blocked(Vec<String>),
    /// What is kept is no stream any more.
    #[error(
        "the stream \"{id}\", which the admin API has made, cannot be taken from {place}: {error}. Put right what it names, or \
         take the stream out of the section `{SECTION}` there"
    )]
    Kept {
        /// Its id.
        id: String,
        /// Where it is kept.
        place: String,
        /// What is wrong with it.
        error: String,
    },
    /// Where they are kept stands something else.
    #[error(
        "{place} has a section `{SECTION}` that is not restcast's: restore it from a copy, or take the section out"
    )]
    Section {
        /// Where.
        place: String,
    },
    /// The state file is at fault.
    #[error(transparent)]
    State(#[from] StateError),
    /// Redis, which has the streams, is.
    #[error("{0}: streams are kept there, and nothing was changed")]
    Redis(#[from] CallError),
}

/// Tells every core of a catalog, and of which streams are others in it.
pub type Tell = Box<dyn Fn(&Arc<Options>, &Arc<[StreamId]>) + Send + Sync>;
/// Makes options with these streams, of which these are stopped.
pub type Build<'b> = &'b dyn Fn(&[Arc<stream::Options>], &BTreeSet<StreamId>, Option<&Catalog>) -> Options;

/// A stream that the admin API has made.
#[derive(Clone, Debug)]
struct Made {
    /// What it was made of.
    members: Members,
    /// The same as it is kept.
    record: Value,
    options: Arc<stream::Options>,
    /// Another after each change.
    tag: String,
    created: WallTime,
    changed: WallTime,
    /// Why it is not polled, where what is kept is not what may be.
    blocked: Vec<String>,
}

/// A stream, as an administrator sees it.
#[derive(Clone, Debug)]
pub struct Listed {
    /// Its id.
    pub id: StreamId,
    /// Its keys, secrets masked.
    pub members: Members,
    /// What tells it from what it was before, where it can be changed.
    pub tag: Option<String>,
    /// Whether it is stopped.
    pub stopped: bool,
    /// When it was made, and when last changed.
    pub times: Option<(WallTime, WallTime)>,
    /// What is odd about it, where it was just made or changed; why it is not polled, where it is not.
    pub warnings: Vec<String>,
    /// What its watchers are told of why it is not polled, where that is known without asking anybody.
    pub failing: Option<UpstreamCode>,
}

/// What a caller knows of the stream to be changed: `If-Match`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Known {
    /// Nothing is said: it is changed whatever it is.
    Nothing,
    /// One of these.
    Tags(Vec<String>),
}

impl Known {
    fn allows(&self, tag: &str) -> bool {
        match self {
            Known::Nothing => true,
            Known::Tags(tags) => tags.iter().any(|known| known == tag),
        }
    }
}

/// The streams of this process.
pub struct StreamStore {
    state: Arc<StateFile>,
    tell: Tell,
    inner: Mutex<Inner>,
    redis: Option<Redis>,
}

/// What there is where the streams are shared.
struct Redis {
    shared: SharedStreams,
    store: Store,
    notices: Mutex<Notices>,
    noticed: Condvar,
    /// What has been said, once, since the streams were last read.
    said: Mutex<BTreeSet<String>>,
}

/// What the thread that reads the streams is told.
#[derive(Default)]
struct Notices {
    /// All of them may have changed.
    all: bool,
    /// These may have.
    ids: BTreeSet<StreamId>,
    /// How reading them for the first time has ended: whether they were read.
    first: Option<bool>,
}

struct Inner {
    options: Arc<Options>,
    file: BTreeMap<StreamId, Arc<stream::Options>>,
    made: BTreeMap<StreamId, Arc<Made>>,
    stopped: BTreeSet<StreamId>,
    /// `admin.stream_urls`.
    policy: Arc<Policy>,
    /// The epoch of the Redis that has them; empty: they have been in none.
    epoch: String,
    /// Changes of this process to what Redis has: what was read before one of them is not believed after it.
    turn: u64,
    /// Which reading of the state file this is of.
    read: u64,
    /// The last stream that was looked at for what it names.
    looked: Option<StreamId>,
}

impl Inner {
    fn bytes(&self) -> usize {
        self.made.values().map(|made| made.bytes()).sum()
    }

    fn listed(&self, id: &StreamId) -> Option<Listed> {
        self.listed_as(id, self.made.get(id).map(|made| &**made), self.stopped.contains(id))
    }

    /// The stream of that id, where it was made so and is stopped or not.
    fn listed_as(&self, id: &StreamId, made: Option<&Made>, stopped: bool) -> Option<Listed> {
        let id = id.clone();
        if let Some(options) = self.file.get(&id) {
            let (members, warnings) = (members_of(options), Vec::new());
            return Some(Listed { id, members, tag: None, stopped, times: None, warnings, failing: None });
        }
        let made = made?;
        let (members, tag, times) = (masked(&made.members), Some(made.tag.clone()), Some((made.created, made.changed)));
        let warnings = made.lacks().into_iter().map(str::to_owned).chain(made.blocked.clone()).collect();
        Some(Listed { id, members, tag, stopped, times, warnings, failing: made.failing() })
    }
}

/// A stream as it is kept, which is to be changed. What it means is not asked: it may be no stream any more.
struct Standing {
    /// What it was made of.
    members: Members,
    tag: String,
    created: WallTime,
    /// The same as Redis has it.
    record: String,
}

impl Standing {
    fn read(record: String) -> Result<Standing, String> {
        let value: Value = serde_json::from_str(&record).map_err(|_| "it is no JSON".to_owned())?;
        let (members, tag, [created, _]) = parts_of(&value)?;
        Ok(Standing { members: members.clone(), tag: tag.to_owned(), created, record })
    }
}

/// What a record says: the stream's keys, its tag, when it was made and when it was changed.
fn parts_of(record: &Value) -> Result<(&Members, &str, [WallTime; 2]), String> {
    let member = |name: &str| record.get(name).ok_or_else(|| format!("it has no {name}"));
    let time = |name: &str| {
        let time = member(name)?.as_u64().ok_or_else(|| format!("its {name} is no time"))?;
        Ok::<_, String>(WallTime::from_micros(time))
    };
    let members = member("stream")?.as_object().ok_or("it is no object")?;
    let tag = member("tag")?.as_str().ok_or("its tag is no string")?;
    Ok((members, tag, [time("created_at")?, time("changed_at")?]))
}

impl Made {
    /// The stream that is kept as `record`, all of whose secrets are there.
    fn read(id: &StreamId, record: &Value) -> Result<Made, String> {
        Made::read_by(id, record, Managed::parse)
    }

    /// The stream that is kept as `record`. Where only its secrets are not there, that is told, and nothing is asked for it.
    fn read_kept(id: &StreamId, record: &Value) -> Result<Made, String> {
        let made = Made::read_by(id, record, Managed::parse_kept)?;
        if let Some(lacks) = made.lacks() {
            let sentence = "A stream that the admin API has made is not polled: what it names is not there. Files are looked for every few seconds, and all of it at each reload; or change or delete the stream.";
            log::write(LogLevel::Error, &[("stream", id), ("error", &lacks)], sentence);
        }
        Ok(made)
    }

    fn read_by(
        id: &StreamId,
        record: &Value,
        parse: impl Fn(&Members, &dyn Sources) -> Result<Managed, ManagedError>,
    ) -> Result<Made, String> {
        let (members, tag, [created, changed]) = parts_of(record)?;
        let options = parse(members, &ProcessSources).map_err(|error| error.to_string())?.options;
        if options.id != *id {
            return Err("it has another id".to_owned());
        }
        let (members, record) = (members.clone(), record.clone());
        Ok(Made { members, record, options, tag: tag.to_owned(), created, changed, blocked: Vec::new() })
    }

    /// What it names and is not there, where nothing is asked for it until it is.
    fn lacks(&self) -> Option<&str> {
        self.options.credential.lacks.as_deref()
    }

    fn failing(&self) -> Option<UpstreamCode> {
        match (self.lacks(), &*self.blocked) {
            (Some(_), _) => Some(UpstreamCode::Auth),
            (None, [_, ..]) => Some(UpstreamCode::Blocked),
            (None, []) => None,
        }
    }

    /// The same, polled from where `policy` lets it be: each poll is judged. What was kept before it was judged so, or by another
    /// process, stays what it is, and its watchers are told that it is blocked.
    fn guarded(mut self, policy: &Arc<Policy>) -> Made {
        self.blocked = judge(&self.members, &self.options, policy);
        if !self.blocked.is_empty() {
            let fields: [(&str, &dyn std::fmt::Display); 2] =
                [("stream", &self.options.id), ("error", &self.blocked.join("; "))];
            let sentence = "A stream that the admin API has made is not polled: it is blocked. Change or delete it, or list what it names in admin.stream_urls.";
            log::write(LogLevel::Error, &fields, sentence);
        }
        // A URL is blocked by what it is, with each poll; what a header says would be sent.
        let policy = if self.blocked.is_empty() { Arc::clone(policy) } else { Arc::default() };
        self.options = Arc::new(stream::Options { guard: Some(policy), ..(*self.options).clone() });
        self
    }

    fn new(members: Members, options: Arc<stream::Options>, tag: String, created: WallTime, changed: WallTime) -> Made {
        let record = json!({
            "tag": tag,
            "created_at": created.as_micros(),
            "changed_at": changed.as_micros(),
            "stream": members,
        });
        Made { members, record, options, tag, created, changed, blocked: Vec::new() }
    }

    /// The same where `policy` lets it be polled.
    fn admitted(self, policy: &Arc<Policy>) -> Result<Made, StreamsError> {
        let said = judge(&self.members, &self.options, policy);
        if said.is_empty() { Ok(self.guarded(policy)) } else { Err(StreamsError::Blocked(said)) }
    }

    fn bytes(&self) -> usize {
        self.options.id.as_str().len() + bytes_of(&self.record)
    }
}

/// About how long a value is as text.
fn bytes_of(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len() + 3,
        Value::Array(elements) => 2 + elements.iter().map(bytes_of).sum::<usize>(),
        Value::Object(members) => {
            2 + members.iter().map(|(name, value)| name.len() + 4 + bytes_of(value)).sum::<usize>()
        }
        _ => 8,
    }
}

/// What a section says.
type Kept = (BTreeMap<StreamId, Arc<Made>>, BTreeSet<StreamId>);

/// What `section` says, polled from where `policy` lets it be. What of it is as `known` is not made again.
fn read(
    section: Option<&Value>,
    known: &BTreeMap<StreamId, Arc<Made>>,
    policy: &Arc<Policy>,
    place: &str,
) -> Result<Kept, StreamsError> {
    let wrong = |id: &str, error: String| StreamsError::Kept { id: id.to_owned(), place: place.to_owned(), error };
    let (mut made, mut stopped) = (BTreeMap::new(), BTreeSet::new());
    let Some(section) = section else { return Ok((made, stopped)) };
    let (Some(all), Some(ids)) =
        (section.get(MADE).and_then(Value::as_object), section.get(STOPPED).and_then(Value::as_array))
    else {
        return Err(StreamsError::Section { place: place.to_owned() });
    };
    for (text, record) in all {
        let id = StreamId::new(text).ok_or_else(|| wrong(&printable(text), "its id is none".to_owned()))?;
        let same = known.get(&id).filter(|known| known.record == *record);
        let stream = match same {
            Some(known) => Arc::clone(known),
            None => Arc::new(Made::read_kept(&id, record).map_err(|error| wrong(text, error))?.guarded(policy)),
        };
        made.insert(id, stream);
    }
    stopped.extend(ids.iter().filter_map(Value::as_str).filter_map(StreamId::new));
    Ok((made, stopped))
}

fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(64).collect()
}

impl StreamStore {
    /// The configuration's streams and those of `state`. Whenever they change, `tell` tells the cores. With `store` they are
    /// shared through it, once [`StreamStore::follow`] runs.
    ///
    /// # Errors
    /// What is wrong with the state file's section: a sentence for the operator.
    pub fn new(
        config: &Config,
        state: Arc<StateFile>,
        store: Option<Store>,
        build: Build<'_>,
        tell: Tell,
    ) -> Result<StreamStore, StreamsError> {
        let (place, section) = (state.shown_path(), state.section(SECTION));
        let policy = Arc::clone(&config.admin.stream_urls);
        let (made, stopped) = read(section.as_ref(), &BTreeMap::new(), &policy, &place)?;
        let epoch = section.as_ref().and_then(|section| section.get(EPOCH)?.as_str()).unwrap_or_default().to_owned();
        let read = state.readings();
        let file = by_id(config);
        warn_of_shadowed(&file, &made);
        let options = Arc::new(build(&in_force(config, &made), &stopped, None));
        let inner = Mutex::new(Inner { options, file, made, stopped, policy, epoch, turn: 0, read, looked: None });
        let redis = store.map(|store| Redis {
            shared: SharedStreams::new(store.clone()),
            store,
            notices: Mutex::new(Notices { all: true, ..Notices::default() }),
            noticed: Condvar::new(),
            said: Mutex::default(),
        });
        Ok(StreamStore { state, tell, inner, redis })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    /// What holds now, for a core that starts.
    pub fn options(&self) -> Arc<Options> {
        Arc::clone(&self.lock().options)
    }

    /// The configuration is to be read again: nothing is changed by others until that is done or given up. A stream that was
    /// made and is none by what its secrets' places hold now stays what it was, and that is said.
    pub fn reload(&self, config: &Config) -> Reloading<'_> {
        let (inner, policy) = (self.lock(), &config.admin.stream_urls);
        let anew = inner.made.iter().map(|(id, known)| {
            let read = if known.lacks().is_some() { Made::read_kept } else { Made::read };
            let made = read(id, &known.record).unwrap_or_else(|error| {
                let sentence = "A stream that the admin API has made cannot be read again, and stays what it was. Put right what is named: after a start it would not be polled.";
                log::write(LogLevel::Error, &[("stream", id), ("error", &error)], sentence);
                (**known).clone()
            });
            (id.clone(), Arc::new(made.guarded(policy)))
        });
        let made = anew.collect();
        Reloading { inner, made }
    }

    /// Streams that were not polled because what they name was not there, and now is, are. Of many some are looked at, the next
    /// ones when this is called again.
    pub fn look_again(&self) {
        let mut inner = self.lock();
        let mut ids: Vec<StreamId> =
            inner.made.iter().filter(|(_, made)| made.lacks().is_some()).map(|(id, _)| id.clone()).collect();
        let from = ids.partition_point(|id| inner.looked.as_ref().is_some_and(|looked| id <= looked));
        ids.rotate_left(from);
        ids.truncate(limits::MANAGED_LOOKS_MAX);
        inner.looked = ids.last().cloned();
        let (mut made, policy) = (inner.made.clone(), Arc::clone(&inner.policy));
        let mut found = false;
        for id in &ids {
            let Some(known) = inner.made.get(id) else { continue };
            let Ok(whole) = Made::read(id, &known.record) else { continue };
            log::write(LogLevel::Info, &[("stream", id)], "What the stream names is there again: it is polled.");
            made.insert(id.clone(), Arc::new(whole.guarded(&policy)));
            found = true;
        }
        if found {
            let stopped = inner.stopped.clone();
            self.adopt(&mut inner, made, stopped);
        }
    }

    /// Every stream: the configuration's and those that were made, by their ids.
    pub fn list(&self) -> Vec<Listed> {
        let inner = self.lock();
        let ids: BTreeSet<&StreamId> = inner.file.keys().chain(inner.made.keys()).collect();
        ids.into_iter().filter_map(|id| inner.listed(id)).collect()
    }

    /// One of them: as Redis has it, where that is there.
    pub fn find(&self, id: &StreamId) -> Option<Listed> {
        let seen = self.redis.as_ref().and_then(|redis| Some((redis, self.look_at(redis, id).ok()?)));
        let inner = self.lock();
        let Some((redis, (record, stopped))) = seen else { return inner.listed(id) };
        let made = record.and_then(|record| redis.made_of(id, &record, inner.made.get(id), &inner.policy));
        inner.listed_as(id, made.as_deref(), stopped)
    }

    /// Makes a stream. `tag`: what is to tell it from what it may become.
    ///
    /// # Errors
    /// [`StreamsError`].
    pub fn make(&self, members: &Members, tag: String, now: WallTime) -> Result<Listed, StreamsError> {
        let members = unmasked(members, None)?;
        let Managed { options, warnings } = Managed::parse(&members, &ProcessSources)?;
        let policy = {
            let mut inner = self.lock();
            self.settle(&mut inner)?;
            if inner.file.contains_key(&options.id) {
                return Err(StreamsError::Taken);
            }
            Arc::clone(&inner.policy)
        };
        let made = Made::new(members, options, tag, now, now).admitted(&policy)?;
        let listed = self.put(made, None)?.ok_or(StreamsError::Taken)?;
        Ok(Listed { warnings, ..listed })
    }

    /// Changes a stream.
    ///
    /// # Errors
    /// [`StreamsError`].
    pub fn change(
        &self,
        id: &StreamId,
        members: &Members,
        known: &Known,
        tag: String,
        now: WallTime,
    ) -> Result<Listed, StreamsError> {
        for _ in 0..limits::MANAGED_CHANGES_MAX {
            let before = self.changeable(id, known)?;
            let mut members = unmasked(members, Some(&before.members))?;
            members.entry("id").or_insert_with(|| id.as_str().into());
            let Managed { options, warnings } = Managed::parse(&members, &ProcessSources)?;
            if options.id != *id {
                return Err(StreamsError::OtherId);
            }
            let policy = Arc::clone(&self.lock().policy);
            let made = Made::new(members, options, tag.clone(), before.created, now).admitted(&policy)?;
            if let Some(listed) = self.put(made, Some(&before))? {
                return Ok(Listed { warnings, ..listed });
            }
        }
        Err(StreamsError::Contended)
    }

    /// Deletes a stream.
    ///
    /// # Errors
    /// [`StreamsError`].
    pub fn delete(&self, id: &StreamId, known: &Known) -> Result<(), StreamsError> {
        for _ in 0..limits::MANAGED_CHANGES_MAX {
            let before = self.changeable(id, known)?;
            if self.take_out(id, &before)? {
                return Ok(());
            }
        }
        Err(StreamsError::Contended)
    }

    /// The one to be changed, as it stands where the streams are kept.
    fn changeable(&self, id: &StreamId, known: &Known) -> Result<Standing, StreamsError> {
        let record = {
            let mut inner = self.lock();
            self.settle(&mut inner)?;
            if inner.file.contains_key(id) {
                return Err(StreamsError::Configured);
            }
            inner.made.get(id).map(|made| made.record.to_string())
        };
        let (record, place) = match &self.redis {
            Some(redis) => (self.look_at(redis, id)?.0, "Redis".to_owned()),
            None => (record, self.state.shown_path()),
        };
        let wrong = |error| StreamsError::Kept { id: id.as_str().to_owned(), place, error };
        let standing = Standing::read(record.ok_or(StreamsError::Missing)?).map_err(wrong)?;
        if known.allows(&standing.tag) { Ok(standing) } else { Err(StreamsError::Changed) }
    }

    /// Deletes that stream; whether it was still that one.
    fn take_out(&self, id: &StreamId, before: &Standing) -> Result<bool, StreamsError> {
        let mut inner = self.lock();
        if let Some(redis) = &self.redis {
            drop(inner);
            let taken = redis.ask(id, || redis.shared.take_out(id, &before.record))?;
            inner = self.lock();
            if !taken {
                return Ok(false);
            }
            redis.changed(&mut inner, id);
        } else if inner.made.get(id).is_none_or(|made| made.tag != before.tag) {
            return Ok(false);
        }
        let mut stopped = inner.stopped.clone();
        stopped.remove(id);
        self.keep(id, None, &stopped, &inner.epoch)?;
        inner.made.remove(id);
        inner.stopped = stopped;
        // Where the configuration has got one of this id meanwhile, that stays.
        if !inner.file.contains_key(id) {
            self.apply(&mut inner, id, |catalog| catalog.without_stream(id));
        }
        Ok(true)
    }

    /// Whether there is that stream, and whether it is stopped: as Redis has it, where there is one.
    fn standing(&self, id: &StreamId) -> Result<(bool, bool), StreamsError> {
        let seen = self.redis.as_ref().map(|redis| self.look_at(redis, id)).transpose()?;
        let mut inner = self.lock();
        self.settle(&mut inner)?;
        Ok(match seen {
            Some((record, stopped)) => (record.is_some() || inner.file.contains_key(id), stopped),
            None => (inner.options.catalog.contains(id), inner.stopped.contains(id)),
        })
    }

    /// Stops or starts a stream, the configuration's too; whether that is news.
    ///
    /// # Errors
    /// [`StreamsError`].
    pub fn stop(&self, id: &StreamId, stop: bool) -> Result<bool, StreamsError> {
        match self.standing(id)? {
            (false, _) => return Err(StreamsError::Missing),
            (true, stopped) if stopped == stop => return Ok(false),
            (true, _) => {}
        }
        if let Some(redis) = &self.redis {
            redis.ask(id, || redis.shared.stop(id, stop))?;
        }
        let mut inner = self.lock();
        if let Some(redis) = &self.redis {
            redis.changed(&mut inner, id);
        }
        // What is of no stream any more is not kept.
        let mut stopped: BTreeSet<StreamId> =
            inner.stopped.iter().filter(|id| inner.options.catalog.contains(id)).cloned().collect();
        if stop {
            stopped.insert(id.clone());
        } else {
            stopped.remove(id);
        }
        self.keep(id, inner.made.get(id).map(|made| &**made), &stopped, &inner.epoch)?;
        inner.stopped = stopped;
        self.apply(&mut inner, id, |catalog| catalog.with_stopped(id, stop));
        Ok(true)
    }

    /// Whether that stream can be polled at once.
    ///
    /// # Errors
    /// [`StreamsError`].
    pub fn may_refresh(&self, id: &StreamId) -> Result<(), StreamsError> {
        match self.standing(id)? {
            (false, _) => Err(StreamsError::Missing),
            (true, true) => Err(StreamsError::Stopped),
            (true, false) => Ok(()),
        }
    }

    /// Keeps a stream in the place of `before` and tells the cores of it; `None`: something else stands there.
    fn put(&self, made: Made, before: Option<&Standing>) -> Result<Option<Listed>, StreamsError> {
        let id = made.options.id.clone();
        let mut inner = self.lock();
        let mine = inner.made.get(&id);
        let more = mine.is_none() && inner.made.len() >= limits::MANAGED_STREAMS_MAX;
        let bytes = inner.bytes() - mine.map_or(0, |mine| mine.bytes()) + made.bytes();
        if self.redis.is_none() && mine.map(|mine| &mine.tag) != before.map(|before| &before.tag) {
            return Ok(None);
        }
        if more || bytes > limits::MANAGED_BYTES_MAX {
            return Err(StreamsError::TooMany);
        }
        if let Some(redis) = &self.redis {
            drop(inner);
            let (before, record) = (before.map(|before| &*before.record), made.record.to_string());
            let put = redis.ask(&id, || redis.shared.put(&id, before, &record))?;
            inner = self.lock();
            match put {
                Put::Done => redis.changed(&mut inner, &id),
                Put::Other => {
                    redis.look_soon(&id);
                    return Ok(None);
                }
                Put::Full => return Err(StreamsError::TooMany),
            }
        }
        self.keep(&id, Some(&made), &inner.stopped, &inner.epoch)?;
        let options = Arc::clone(&made.options);
        inner.made.insert(id.clone(), Arc::new(made));
        if !inner.file.contains_key(&id) {
            self.apply(&mut inner, &id, |catalog| catalog.with_stream(&options));
        }
        Ok(inner.listed(&id))
    }

    /// Writes what is kept of one stream to the state file. Where Redis has it that is a copy, on which nothing hangs but a
    /// start without it.
    fn keep(
        &self,
        id: &StreamId,
        made: Option<&Made>,
        stopped: &BTreeSet<StreamId>,
        epoch: &str,
    ) -> Result<(), StreamsError> {
        match (self.write(id, made, stopped, epoch), &self.redis) {
            (Err(error), Some(redis)) => {
                redis.say_uncopied(&error);
                Ok(())
            }
            (written, _) => written,
        }
    }

    /// What another process has written to the state file before it was this one's is taken in, once.
    fn settle(&self, inner: &mut Inner) -> Result<(), StreamsError> {
        if self.redis.is_some() {
            return Ok(());
        }
        let readings = self.state.claim()?;
        if inner.read == readings {
            return Ok(());
        }
        let place = self.state.shown_path();
        let (made, stopped) = read(self.state.section(SECTION).as_ref(), &inner.made, &inner.policy, &place)?;
        inner.read = readings;
        self.adopt(inner, made, stopped);
        Ok(())
    }

    /// Other streams hold, and others are stopped.
    fn adopt(&self, inner: &mut Inner, made: BTreeMap<StreamId, Arc<Made>>, stopped: BTreeSet<StreamId>) {
        let ids: BTreeSet<&StreamId> =
            inner.made.keys().chain(made.keys()).chain(&inner.stopped).chain(&stopped).collect();
        let is_other = |id: &StreamId| {
            let same = match (inner.made.get(id), made.get(id)) {
                (Some(known), Some(made)) => known.record == made.record && known.lacks() == made.lacks(),
                (known, made) => known.is_none() && made.is_none(),
            };
            !same || inner.stopped.contains(id) != stopped.contains(id)
        };
        let changed: Vec<StreamId> = ids.into_iter().filter(|id| is_other(id)).cloned().collect();
        if changed.is_empty() {
            return;
        }
        let mut options = (*inner.options).clone();
        for id in &changed {
            let catalog = std::mem::take(&mut options.catalog);
            let catalog = match (inner.file.get(id), made.get(id)) {
                (Some(_), _) => catalog,
                (None, Some(made)) => catalog.with_stream(&made.options),
                (None, None) => catalog.without_stream(id),
            };
            options.catalog = catalog.with_stopped(id, stopped.contains(id));
        }
        (inner.made, inner.stopped) = (made, stopped);
        inner.options = Arc::new(options);
        (self.tell)(&inner.options, &changed.into());
    }

    /// Writes what is kept of one stream, and which are stopped.
    fn write(
        &self,
        id: &StreamId,
        made: Option<&Made>,
        stopped: &BTreeSet<StreamId>,
        epoch: &str,
    ) -> Result<(), StreamsError> {
        self.state.update(SECTION, |section| {
            let mut section = match section {
                Value::Object(section) => section,
                _ => Map::new(),
            };
            let all = section.entry(MADE).or_insert_with(|| json!({}));
            if let Some(all) = all.as_object_mut() {
                match made {
                    Some(made) => drop(all.insert(id.as_str().to_owned(), made.record.clone())),
                    None => drop(all.remove(id.as_str())),
                }
            }
            section.insert(STOPPED.to_owned(), ids_of(stopped));
            if !epoch.is_empty() {
                section.insert(EPOCH.to_owned(), epoch.into());
            }
            Ok::<_, StreamsError>((Value::Object(section), ()))
        })
    }

    /// Tells the cores that one stream is another.
    fn apply(&self, inner: &mut Inner, id: &StreamId, change: impl FnOnce(Catalog) -> Catalog) {
        let mut options = (*inner.options).clone();
        options.catalog = change(std::mem::take(&mut options.catalog));
        inner.options = Arc::new(options);
        (self.tell)(&inner.options, &[id.clone()].into());
    }

    /// Control events were heard: those that are of streams are taken note of. Never waits.
    pub fn heard(&self, entries: &[ControlEntry]) {
        let Some(redis) = &self.redis else { return };
        let mut notices = lock(&redis.notices);
        for entry in entries.iter().filter(|entry| entry.is_of_streams()) {
            match entry.changed_stream() {
                Some(id) if notices.ids.len() < limits::MANAGED_HEARD_MAX => drop(notices.ids.insert(id)),
                _ => notices.all = true,
            }
        }
        redis.noticed.notify_all();
    }

    /// What stands in Redis may have changed, or can be read now. Never waits.
    pub fn read_soon(&self) {
        if let Some(redis) = &self.redis {
            redis.read_soon();
        }
    }

    /// Waits until the streams in Redis have been read for the first time, at most so long; not where Redis does not answer.
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
            let (all, ids) = redis.wait(last);
            let outcome = if all { self.read_all(redis, &random) } else { self.read_some(redis, &ids) };
            if all {
                last = Some(clock::now().at);
            } else if outcome.is_err() {
                // They are read with all the others when that can be done.
                redis.read_soon();
            }
            // That Redis is away is said by whoever speaks with it.
            if let Err(error @ CallError::Refused(_)) = &outcome
                && redis.is_news(&error.to_string())
            {
                let sentence = "The streams in Redis cannot be read; those known here stay in force until they can.";
                log::write(LogLevel::Warn, &[("error", error)], sentence);
            }
            let mut notices = lock(&redis.notices);
            if notices.first.is_none() && all {
                notices.first = Some(outcome.is_ok());
                redis.noticed.notify_all();
            }
        }
    }

    /// Reads all streams in Redis and puts them in force. To a Redis of another epoch those known here are carried over.
    fn read_all(&self, redis: &Redis, random: &impl Fn(&mut [u8]) -> Result<(), StateError>) -> Result<(), CallError> {
        let mut chance = [0; 8];
        random(&mut chance).map_err(|error| CallError::Refused(error.to_string()))?;
        let epoch = format!("{:016x}", u64::from_be_bytes(chance));
        for _ in 0..limits::MANAGED_ROUNDS_MAX {
            let turn = self.lock().turn;
            let reading = redis.shared.read(&epoch)?;
            let mut inner = self.lock();
            if inner.turn != turn {
                continue;
            }
            if inner.epoch != reading.epoch {
                let carried: Vec<(StreamId, String)> = inner
                    .made
                    .iter()
                    .filter(|(id, _)| !reading.streams.contains_key(id))
                    .map(|(id, made)| (id.clone(), made.record.to_string()))
                    .collect();
                let stopped: Vec<StreamId> = inner
                    .stopped
                    .iter()
                    .filter(|id| !reading.streams.contains_key(id) && !reading.stopped.contains(id))
                    .cloned()
                    .collect();
                drop(inner);
                self.carry(redis, &carried, &stopped)?;
                self.lock().epoch = reading.epoch;
                continue;
            }
            self.take_reading(redis, &mut inner, reading);
            self.copy(redis, &inner);
            lock(&redis.said).retain(|said| said.starts_with("record ") || said.starts_with("the state file"));
            return Ok(());
        }
        // Others change them all the time: that is for the next time.
        redis.read_soon();
        Ok(())
    }

    /// Writes what Redis has to the state file, where that does not say so already.
    fn copy(&self, redis: &Redis, inner: &Inner) {
        let (copy, stands) = (section_of(inner), self.state.section(SECTION));
        if stands.as_ref() == Some(&copy) || (stands.is_none() && inner.made.is_empty() && inner.stopped.is_empty()) {
            return;
        }
        if let Err(error) = self.state.update(SECTION, |_| Ok::<_, StreamsError>((copy, ()))) {
            redis.say_uncopied(&error);
        }
    }

    /// Puts in Redis what it does not have.
    fn carry(&self, redis: &Redis, made: &[(StreamId, String)], stopped: &[StreamId]) -> Result<(), CallError> {
        for (id, record) in made {
            if redis.shared.put(id, None, record)? != Put::Done {
                let sentence = "A stream of the state file is not carried over to Redis, which has another of its id or as many as it may.";
                log::write(LogLevel::Warn, &[("stream", id)], sentence);
            }
            redis.publish(id);
        }
        for id in stopped {
            redis.shared.stop(id, true)?;
        }
        if !made.is_empty() {
            let sentence = "The streams of the state file are now in Redis, for every process.";
            log::write(LogLevel::Info, &[("streams", &made.len())], sentence);
        }
        Ok(())
    }

    /// Reads these streams in Redis and puts them in force.
    fn read_some(&self, redis: &Redis, ids: &BTreeSet<StreamId>) -> Result<(), CallError> {
        ids.iter().try_for_each(|id| self.look_at(redis, id).map(drop))
    }

    /// Reads one stream in Redis and puts it in force, unless this process has changed streams meanwhile: then it is looked at
    /// again soon. What stands there, and whether it is stopped; what is known here where all of them are to be read first.
    fn look_at(&self, redis: &Redis, id: &StreamId) -> Result<(Option<String>, bool), CallError> {
        let turn = self.lock().turn;
        let One { epoch, record, stopped } = redis.shared.read_one(id)?;
        let mut inner = self.lock();
        if epoch != inner.epoch {
            // It was emptied, or has never been read: nothing follows from what is not there.
            redis.read_soon();
            return Ok((inner.made.get(id).map(|made| made.record.to_string()), inner.stopped.contains(id)));
        }
        if inner.turn != turn {
            redis.look_soon(id);
            return Ok((record, stopped));
        }
        let stands = record.as_deref().and_then(|record| redis.made_of(id, record, inner.made.get(id), &inner.policy));
        let same = match (&stands, inner.made.get(id)) {
            (Some(stands), Some(known)) => Arc::ptr_eq(stands, known),
            (stands, known) => stands.is_none() && known.is_none(),
        };
        if same && inner.stopped.contains(id) == stopped {
            return Ok((record, stopped));
        }
        let (mut made, mut all) = (inner.made.clone(), inner.stopped.clone());
        match stands {
            Some(stream) => drop(made.insert(id.clone(), stream)),
            None => drop(made.remove(id)),
        }
        if stopped {
            all.insert(id.clone());
        } else {
            all.remove(id);
        }
        self.adopt(&mut inner, made, all);
        // Its error has been said.
        let _ = self.keep(id, inner.made.get(id).map(|made| &**made), &inner.stopped, &inner.epoch);
        Ok((record, stopped))
    }

    fn take_reading(&self, redis: &Redis, inner: &mut Inner, reading: Reading) {
        let made = reading.streams.iter().filter_map(|(id, record)| {
            Some((id.clone(), redis.made_of(id, record, inner.made.get(id), &inner.policy)?))
        });
        let made = made.collect();
        self.adopt(inner, made, reading.stopped);
    }
}

impl Redis {
    fn read_soon(&self) {
        lock(&self.notices).all = true;
        self.noticed.notify_all();
    }

    fn look_soon(&self, id: &StreamId) {
        lock(&self.notices).ids.insert(id.clone());
        self.noticed.notify_all();
    }

    /// Has Redis change a stream. Where it does not answer, what has become of it is looked at when it does.
    fn ask<T>(&self, id: &StreamId, change: impl Fn() -> Result<T, CallError>) -> Result<T, CallError> {
        change().inspect_err(|error| {
            if *error == CallError::Unanswered {
                self.look_soon(id);
            }
        })
    }

    /// This process has changed a stream, or found it changed: it is looked at again, and others are told.
    fn changed(&self, inner: &mut Inner, id: &StreamId) {
        inner.turn += 1;
        self.look_soon(id);
        self.publish(id);
    }

    fn publish(&self, id: &StreamId) {
        self.store.order(Order::Publish(ControlEntry::stream_changed(id, clock::now().wall)));
    }

    /// The stream of a record. One that cannot be read is told of, once, and stays what it was.
    fn made_of(
        &self,
        id: &StreamId,
        record: &str,
        known: Option<&Arc<Made>>,
        policy: &Arc<Policy>,
    ) -> Option<Arc<Made>> {
        let read = serde_json::from_str::<Value>(record).map_err(|_| "it is no JSON".to_owned());
        let guarded = |made: Made| Arc::new(made.guarded(policy));
        let made = read.and_then(|record| match known {
            Some(known) if known.record == record && known.lacks().is_none() => Ok(Arc::clone(known)),
            Some(known) if known.record == record => {
                Ok(Made::read(id, &record).map_or_else(|_| Arc::clone(known), guarded))
            }
            Some(known) if known.lacks().is_none() => Made::read(id, &record).map(guarded),
            _ => Made::read_kept(id, &record).map(guarded),
        });
        match made {
            Ok(made) => Some(made),
            Err(error) => {
                if self.is_news(&format!("record {id}")) {
                    let sentence = "A stream in Redis cannot be taken here: it stays what it was before. Put right what is named, or delete it.";
                    log::write(LogLevel::Error, &[("stream", id), ("error", &error)], sentence);
                }
                known.map(Arc::clone)
            }
        }
    }

    /// Waits until there is something to do: whether to read all, or else which. `last`: when all were last read.
    fn wait(&self, last: Option<Instant>) -> (bool, BTreeSet<StreamId>) {
        let mut notices = lock(&self.notices);
        loop {
            let since = last.map(|last| clock::now().at.since(last));
            let apart = if notices.all { limits::MANAGED_READ_INTERVAL } else { limits::MANAGED_REREAD };
            let wait = since.map_or(Duration::ZERO, |since| apart.saturating_sub(since));
            if wait.is_zero() {
                notices.all = false;
                notices.ids.clear();
                return (true, BTreeSet::new());
            }
            if !notices.ids.is_empty() {
                return (false, std::mem::take(&mut notices.ids));
            }
            notices = self.noticed.wait_timeout(notices, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Whether this has not been said since all was well.
    fn is_news(&self, what: &str) -> bool {
        let mut said = lock(&self.said);
        said.len() < limits::REDIS_SAID_MAX && said.insert(what.to_owned())
    }

    fn say_uncopied(&self, error: &StreamsError) {
        if self.is_news(&error.to_string()) {
            let sentence = "The streams in Redis are not copied to the state file: a start while Redis is away would not know them.";
            log::write(LogLevel::Warn, &[("error", error)], sentence);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The configuration is being read again.
pub struct Reloading<'s> {
    inner: MutexGuard<'s, Inner>,
    made: BTreeMap<StreamId, Arc<Made>>,
}

impl Reloading<'_> {
    /// This is the configuration now; what holds from now on, of which `tell` is to tell the cores before others change it.
    pub fn finish(mut self, config: &Config, build: Build<'_>, tell: impl FnOnce(&Arc<Options>)) {
        let file = by_id(config);
        warn_of_shadowed(&file, &self.made);
        let streams = in_force(config, &self.made);
        let options = build(&streams, &self.inner.stopped, Some(&self.inner.options.catalog));
        self.inner.file = file;
        self.inner.policy = Arc::clone(&config.admin.stream_urls);
        self.inner.made = std::mem::take(&mut self.made);
        self.inner.options = Arc::new(options);
        tell(&self.inner.options);
    }
}

fn by_id(config: &Config) -> BTreeMap<StreamId, Arc<stream::Options>> {
    config.streams.iter().map(|stream| (stream.id.clone(), Arc::clone(stream))).collect()
}

/// The configuration's streams, and those that were made of other ids.
fn in_force(config: &Config, made: &BTreeMap<StreamId, Arc<Made>>) -> Vec<Arc<stream::Options>> {
    let file: BTreeSet<&StreamId> = config.streams.iter().map(|stream| &stream.id).collect();
    let others = made.iter().filter(|(id, _)| !file.contains(id)).map(|(_, made)| &made.options);
    config.streams.iter().chain(others).map(Arc::clone).collect()
}

fn warn_of_shadowed(file: &BTreeMap<StreamId, Arc<stream::Options>>, made: &BTreeMap<StreamId, Arc<Made>>) {
    for id in made.keys().filter(|id| file.contains_key(id)) {
        let sentence =
            "A stream that the admin API has made stands in the configuration too, which counts; the other is kept.";
        log::write(LogLevel::Warn, &[("stream", id)], sentence);
    }
}

fn ids_of(ids: &BTreeSet<StreamId>) -> Value {
    ids.iter().map(StreamId::as_str).collect()
}

/// What the state file's section is for these.
fn section_of(inner: &Inner) -> Value {
    let made: Map<String, Value> =
        inner.made.iter().map(|(id, made)| (id.as_str().to_owned(), made.record.clone())).collect();
    let mut section = json!({ MADE: made, STOPPED: ids_of(&inner.stopped) });
    if !inner.epoch.is_empty() {
        section[EPOCH] = inner.epoch.as_str().into();
    }
    section
}
