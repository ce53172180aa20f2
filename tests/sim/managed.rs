//! What the administrator does to streams while they are watched, and what each core has heard of it: the model's own reading
//! of protocol version 1, section 6.
//!
//! A stream that is changed is another from then on: other epochs, and other values where it has another URL. One that is
//! stopped is not polled. One that is deleted ends.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use restcast::config::{Managed as Parsed, Members};
use restcast::ids::StreamId;
use restcast::shard::{Catalog, Options};
use restcast::stream;
use serde_json::json;

use super::authority::News;
use super::law::LATE_US;
use super::world::{NoSources, World};

/// The streams that there may be.
pub const MANAGED: [&str; 2] = ["made", "also.made"];

/// What one core knows of one stream.
#[derive(Clone, Debug, Default)]
struct Known {
    /// Where it is polled, or that there is no such stream, and since when.
    urls: Vec<(u64, Option<String>)>,
    stopped: bool,
}

/// What is done to one stream.
#[derive(Clone, Debug)]
pub enum Done {
    /// It is made, or changed: where it is polled from now on.
    Put(String),
    Deleted,
    Stopped,
    Started,
}

/// All that was done.
#[derive(Debug, Default)]
pub struct Managed {
    /// What is so now, whoever has heard of it.
    pub streams: BTreeMap<&'static str, Arc<stream::Options>>,
    pub stopped: BTreeSet<&'static str>,
    /// How many there were: no two have the same URL or the same interval.
    made: u64,
    known: BTreeMap<(&'static str, usize), Known>,
}

fn id(name: &str) -> StreamId {
    StreamId::new(name).expect("an id")
}

impl Managed {
    pub fn is_one(name: &str) -> bool {
        MANAGED.contains(&name)
    }

    fn known(&self, name: &str, core: usize) -> Option<&Known> {
        let name = MANAGED.into_iter().find(|own| *own == name)?;
        self.known.get(&(name, core))
    }

    /// Where a core has polled that stream since then.
    pub fn urls(&self, name: &str, core: usize, since_us: u64) -> Vec<String> {
        let Some(Known { urls, .. }) = self.known(name, core) else { return Vec::new() };
        let ended = |at: usize| urls.get(at + 1).is_some_and(|(next_us, _)| *next_us < since_us);
        let held = urls.iter().enumerate().filter(|(at, _)| !ended(*at));
        held.filter_map(|(_, (_, url))| url.clone()).collect()
    }

    /// Whether a core has known of that stream at some time since then; one of the file's it always has.
    pub fn may_be_there(&self, name: &str, core: usize, since_us: u64) -> bool {
        !Managed::is_one(name) || !self.urls(name, core, since_us).is_empty()
    }

    /// Whether a core has known that there is none such, at some time.
    pub fn may_be_missing(&self, name: &str, core: usize) -> bool {
        let first = |known: &Known| known.urls.first().is_none_or(|(since_us, _)| *since_us > 0);
        Managed::is_one(name) && self.known(name, core).is_none_or(first)
    }

    /// Whether a core has heard of that stream's end, at some time.
    pub fn may_have_ended(&self, name: &str, core: usize) -> bool {
        self.known(name, core).is_some_and(|known| known.urls.iter().any(|(_, url)| url.is_none()))
    }

    /// Whether that stream has become another: then a limit may take it from who watches it.
    pub fn may_lose(&self, name: &str) -> bool {
        self.known.iter().any(|((own, _), known)| *own == name && known.urls.len() > 1)
    }

    /// Whether that core knows that it is not to be polled.
    pub fn is_stopped(&self, name: &str, core: usize) -> bool {
        self.known(name, core).is_some_and(|known| known.stopped)
    }

    /// A core has heard of what was done.
    pub fn hear(&mut self, core: usize, at_us: u64, name: &'static str, done: &Done) {
        let known = self.known.entry((name, core)).or_default();
        match done {
            Done::Put(url) => known.urls.push((at_us, Some(url.clone()))),
            Done::Deleted => {
                known.urls.push((at_us, None));
                known.stopped = false;
            }
            Done::Stopped => known.stopped = true,
            Done::Started => known.stopped = false,
        }
    }

    /// The streams beside those of the file, and which are stopped, for a catalog that is made anew.
    pub fn all(&self) -> (Vec<Arc<stream::Options>>, BTreeSet<StreamId>) {
        (self.streams.values().cloned().collect(), self.stopped.iter().map(|name| id(name)).collect())
    }
}

impl World {
    /// The administrator does something, by chance.
    pub fn administer(&mut self) {
        let name = *self.dice.pick(&MANAGED);
        let there = self.book.managed.streams.contains_key(name);
        let is_stopped = self.book.managed.stopped.contains(name);
        match self.dice.below(10) {
            _ if !there => self.put_stream(name, true),
            0..2 => self.delete_stream(name),
            2..5 => self.put_stream(name, false),
            5..7 => self.put_stream(name, true),
            _ if is_stopped => self.start_stream(name),
            _ => self.stop_stream(name),
        }
    }

    /// Makes a stream, or changes it: to poll another URL, or the same otherwise.
    pub fn put_stream(&mut self, name: &'static str, moves: bool) {
        self.book.managed.made += 1;
        let made = self.book.managed.made;
        let url = match self.book.managed.streams.get(name).filter(|_| !moves) {
            Some(options) => options.url.fill(&|_| None, &|_| None).expect("there is nothing to fill in").to_string(),
            None => format!("http://up/{name}/{made}"),
        };
        let text = json!({
            "id": name,
            "url": url,
            "interval": format!("{}ms", self.setup.interval_ms + made),
            "linger": format!("{}ms", self.setup.linger_ms),
            "timeout": "4s",
            "backoff_max": "1s",
            "history": 8,
        });
        let members: Members = serde_json::from_value(text).expect("an object");
        let options = Parsed::parse(&members, &NoSources).expect("a stream").options;
        self.book.managed.streams.insert(name, Arc::clone(&options));
        self.publish_stream(name, Done::Put(url), |catalog| catalog.with_stream(&options));
    }

    pub fn delete_stream(&mut self, name: &'static str) {
        self.book.managed.streams.remove(name);
        self.book.managed.stopped.remove(name);
        self.publish_stream(name, Done::Deleted, |catalog| catalog.without_stream(&id(name)));
    }

    pub fn stop_stream(&mut self, name: &'static str) {
        self.book.managed.stopped.insert(name);
        self.publish_stream(name, Done::Stopped, |catalog| catalog.with_stopped(&id(name), true));
    }

    pub fn start_stream(&mut self, name: &'static str) {
        self.book.managed.stopped.remove(name);
        self.publish_stream(name, Done::Started, |catalog| catalog.with_stopped(&id(name), false));
    }

    fn publish_stream(&mut self, name: &'static str, done: Done, change: impl FnOnce(Catalog) -> Catalog) {
        self.book.count(match done {
            Done::Put(_) => "stream put",
            Done::Deleted => "stream deleted",
            Done::Stopped => "stream stopped",
            Done::Started => "stream started",
        });
        self.has_changed |= matches!(done, Done::Put(_));
        let catalog = change(self.options.catalog.clone());
        self.options = Arc::new(Options { catalog, ..(*self.options).clone() });
        self.tell_cores(&News::Catalog(Arc::clone(&self.options), name, done));
    }

    /// Every stream that was stopped is started.
    pub fn start_all_streams(&mut self) {
        for name in self.book.managed.stopped.clone() {
            self.start_stream(name);
        }
    }

    /// Nobody holds a stream that its core has long known to be gone.
    pub fn check_ended_streams(&self) {
        for client in self.clients.iter().filter(|client| client.is_open() && client.welcomed && !client.ever_stalled) {
            let since_us = self.book.mono_us - LATE_US;
            let gone =
                |name: &String| Managed::is_one(name) && self.book.managed.urls(name, client.core, since_us).is_empty();
            let held = client.held.keys().find(|name| gone(name));
            assert!(held.is_none(), "client {} still holds {held:?} at {}", client.number, self.book.mono_us);
        }
    }
}
