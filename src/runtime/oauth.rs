//! The tokens of a process: one for each credential, whichever streams and cores use it.
//!
//! Whoever needs a token asks here; who finds that one is to be got gets it (`fetch::token`), over its own core's client, and
//! all who ask meanwhile, on any core, wait for that. The lock is taken for a poll with a token, never on a delivery, and not while
//! anything is waited for.
//!
//! Refresh tokens that an endpoint gives in place of the one that was used are in the state file before anybody uses what came
//! with them. Where that cannot be written what came is used all the same, and writing is tried again until it is done, at the
//! latest when the process ends, which says what is lost with it. A process that dies between the endpoint's answer and the write has lost the new one: it
//! begins again with the old one, which some endpoints still take, and then with the configured one.
//!
//! Source: RFC 6749 section 6; when a token is got stands in `stream::oauth`. Memory: at most
//! `limits::OAUTH_CREDENTIALS_MAX` tokens, and `OAUTH_STORED_MAX` refresh tokens, of each of which there is one use at a time. Errors: [`Why`], told in the log.
//! Not here: who asks the endpoint and waits (`fetch::token`), the file (`state`).

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ring::digest;
use serde_json::{Map, Value, json};

use super::clock;
use super::log;
use super::resolver::{Flight, Pilot};
use super::state::{StateError, StateFile};
use crate::config::LogLevel;
use crate::limits;
use crate::secret::Secret;
use crate::shard::Rng;
use crate::stream::live::{Live, Source};
use crate::stream::oauth::{self, Ask, Granted, Options, Renewal, Token, Why};
use crate::time::Instant;

/// The section of the state file that is this part's.
const SECTION: &str = "oauth";

/// How a token was got, or why not.
pub(super) type Outcome = Result<Token, Why>;

/// The tokens of this process.
pub struct Tokens {
    inner: Mutex<Inner>,
    state: Arc<StateFile>,
}

struct Inner {
    entries: HashMap<Arc<Options>, Entry>,
    rng: Rng,
    /// Refresh tokens that somebody uses just now, by the mark of their credential.
    turns: HashMap<String, InUse>,
    /// The refresh tokens that endpoints have given, by the mark of their credential.
    stored: BTreeMap<String, Stored>,
    /// How often they have changed.
    changes: u64,
    /// The changes that the state file has.
    written: u64,
    /// Writes that were begun, of which the last may be under way, or about to be.
    writes: u64,
    writing: Option<Arc<Flight<()>>>,
    /// Writes that failed in a row.
    write_failures: u32,
    /// Whether somebody sees to it that what could not be written is tried again.
    retrying: bool,
}

impl Inner {
    fn of(stored: BTreeMap<String, Stored>, seed: [u8; 32]) -> Inner {
        Inner {
            entries: HashMap::new(),
            rng: Rng::new(seed),
            turns: HashMap::new(),
            stored,
            changes: 0,
            written: 0,
            writes: 0,
            writing: None,
            write_failures: 0,
            retrying: false,
        }
    }
}

/// A refresh token that somebody uses just now.
struct InUse {
    flight: Arc<Flight<()>>,
    /// Whom it is shown to.
    endpoint: String,
}

#[derive(Default)]
struct Entry {
    renewal: Renewal,
    flight: Option<Arc<Flight<Outcome>>>,
    used: Instant,
}

/// A refresh token that an endpoint has given.
#[derive(Clone, PartialEq)]
struct Stored {
    token: Secret,
    /// The mark of the configured one that it goes back to.
    of: String,
    /// When it was given, in microseconds of wall time.
    at: u64,
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tokens")
    }
}

impl Tokens {
    /// None yet, but for the refresh tokens in `state`.
    ///
    /// # Errors
    /// What is wrong with the state file's section: a sentence for the operator.
    pub fn new(state: Arc<StateFile>, seed: [u8; 32]) -> Result<Tokens, StateError> {
        let stored = match state.section(SECTION) {
            None => BTreeMap::new(),
            Some(section) => {
                read(&section).ok_or_else(|| state.corrupt(SECTION, "is none of restcast's".to_owned()))?
            }
        };
        Ok(Tokens { inner: Mutex::new(Inner::of(stored, seed)), state })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is to be done for somebody who wants a token; `ask` says which.
    pub(super) fn ask(
        this: &Arc<Tokens>,
        options: &Arc<Options>,
        ask: impl FnOnce(&mut Renewal, Instant) -> Ask,
    ) -> Asked {
        let now = clock::now().at;
        let mut inner = this.inner();
        let entry = inner.entry(options, now);
        let (token, begins) = match ask(&mut entry.renewal, now) {
            Ask::Use(token) => return Asked::Answered(Ok(token)),
            Ask::None(why) => return Asked::Answered(Err(why)),
            Ask::UseAndRenew(token) => (Some(token), true),
            Ask::Renew => (None, true),
            Ask::Wait => (None, false),
        };
        if begins {
            entry.flight = Some(Flight::departing());
        }
        let Some(flight) = entry.flight.clone() else { return Asked::Answered(Err(Why::Fault)) };
        let begun = begins.then(|| Underway {
            tokens: Arc::clone(this),
            options: Arc::clone(options),
            pilot: Some(Pilot::of(&flight, Err(Why::Fault))),
        });
        match (token, begun) {
            (Some(token), Some(begun)) => Asked::AnsweredAndBegun(token, begun),
            (_, begun) => Asked::Waits(flight, begun),
        }
    }

    /// A renewal has ended.
    fn end(&self, options: &Options, result: Result<&Granted, (Why, Option<Duration>)>) -> Outcome {
        let now = clock::now().at;
        let mut inner = self.inner();
        let Inner { entries, rng, .. } = &mut *inner;
        let Some(entry) = entries.get_mut(options) else { return Err(Why::Fault) };
        entry.flight = None;
        let chance = u32::try_from(rng.below(1001)).unwrap_or(0);
        let endpoint = options.token_url.origin().ascii_serialization();
        match result {
            Ok(granted) => {
                if entry.renewal.failures() > 0 {
                    log::write(LogLevel::Info, &[("endpoint", &endpoint)], "The token endpoint gives tokens again.");
                }
                Ok(entry.renewal.brought(now, granted, chance))
            }
            Err((why, retry_after)) => {
                entry.renewal.failed(now, why.clone(), retry_after, chance);
                let failures = entry.renewal.failures();
                // One that goes on failing is told of ever more rarely.
                let level = if failures.is_power_of_two() { LogLevel::Warn } else { LogLevel::Debug };
                let fields: [(&str, &dyn fmt::Display); 3] =
                    [("endpoint", &endpoint), ("failures", &failures), ("detail", &why)];
                let sentence = "No token was got for an upstream; one that is still good stays in use.";
                log::write(level, &fields, sentence);
                Err(why)
            }
        }
    }

    /// Secrets have changed: what failed with the old ones may be tried with the new ones at once.
    pub fn hurry(&self) {
        self.inner().entries.values_mut().for_each(|entry| entry.renewal.hurry());
    }

    /// The turn to use a refresh token. An endpoint that gives another one with each answer takes each but once: of credentials
    /// that begin with the same one and yet are not the same (another certificate, another scope) one renewal at a time reads
    /// which it is by now, uses it, and keeps what came.
    pub(super) fn turn(this: &Arc<Tokens>, options: &Options) -> Turn {
        if options.refresh_token().is_none() {
            return Turn::Unneeded;
        }
        let name = name_of(options);
        let mut inner = this.inner();
        if let Some(in_use) = inner.turns.get(&name) {
            return Turn::After(Arc::clone(&in_use.flight));
        }
        // It may have waited for others: its spacing, and the life of what it brings, are from now on.
        if let Some(entry) = inner.entries.get_mut(options) {
            entry.renewal.sent(clock::now().at);
        }
        let flight = Flight::departing();
        let pilot = Some(Pilot::of(&flight, ()));
        let endpoint = options.token_url.origin().ascii_serialization();
        inner.turns.insert(name.clone(), InUse { flight, endpoint });
        Turn::Taken(Taken { tokens: Arc::clone(this), name, pilot, is_over: false })
    }

    /// The refresh tokens to be tried, in their order; none where the grant needs none.
    pub(super) fn refresh_tokens(&self, options: &Options) -> Vec<Option<Secret>> {
        let Some(configured) = options.refresh_token() else { return vec![None] };
        let stored = self.inner().stored.get(&name_of(options)).map(|held| (held.token.clone(), held.of.clone()));
        let mark = mark_of(&configured);
        oauth::candidates(stored, (configured, mark)).into_iter().map(Some).collect()
    }

    /// A refresh token is asked with again, in the turn that was taken: its spacing, and the life of what it brings, are from now
    /// on.
    pub(super) fn asked_again(&self, options: &Options) {
        if let Some(entry) = self.inner().entries.get_mut(options) {
            entry.renewal.sent(clock::now().at);
        }
    }

    /// `token` is the refresh token from now on.
    pub(super) fn keep(&self, options: &Options, token: &Secret) {
        let Some(configured) = options.refresh_token() else { return };
        let name = name_of(options);
        let mut inner = self.inner();
        if *token == configured {
            inner.changes += u64::from(inner.stored.remove(&name).is_some());
            return;
        }
        let of = mark_of(&configured);
        if inner.stored.get(&name).is_some_and(|held| held.token == *token && held.of == of) {
            return;
        }
        if !inner.stored.contains_key(&name) && inner.stored.len() >= limits::OAUTH_STORED_MAX {
            let oldest = inner.stored.iter().min_by_key(|(_, held)| held.at).map(|(name, _)| name.clone());
            oldest.and_then(|oldest| inner.stored.remove(&oldest));
        }
        inner.stored.insert(name, Stored { token: token.clone(), of, at: clock::now().wall.as_micros() });
        inner.changes += 1;
    }

    /// What the state file lacks; `None`: nothing.
    pub(super) fn unwritten(&self) -> Option<Unwritten> {
        let inner = self.inner();
        (inner.written < inner.changes).then_some(Unwritten { changes: inner.changes, after: inner.writes })
    }

    /// What somebody does who does not go on before that was written, or could not be.
    pub(super) fn write(this: &Arc<Tokens>, lacks: Unwritten) -> Write {
        let mut inner = this.inner();
        let ended = inner.writes - u64::from(inner.writing.is_some());
        if inner.written >= lacks.changes || ended > lacks.after {
            return Write::Done;
        }
        // The one under way may have begun before: whoever waits for it asks again.
        if let Some(flight) = &inner.writing {
            return Write::After(Arc::clone(flight));
        }
        let flight = Flight::departing();
        let pilot = Some(Pilot::of(&flight, ()));
        inner.writing = Some(flight);
        inner.writes += 1;
        Write::Begun(Writing { tokens: Arc::clone(this), pilot })
    }

    /// Puts the refresh tokens into the state file. Blocks: for a helper thread.
    fn write_now(&self) {
        let written = self.state.update(SECTION, |_| {
            // Under the file's lock, so that whoever writes last writes the newest.
            let inner = self.inner();
            Ok::<_, StateError>((section(&inner.stored), inner.changes))
        });
        match written {
            Ok(changes) => self.inner().has_written(changes),
            Err(error) => self.inner().has_not_written(&error),
        }
    }

    /// Whether whoever asks is to see to it that what could not be written is tried again, until it is.
    pub(super) fn is_to_retry(&self) -> bool {
        let mut inner = self.inner();
        let fails = inner.written < inner.changes && inner.write_failures > 0;
        fails && !std::mem::replace(&mut inner.retrying, true)
    }

    /// How long to wait before it is tried again; `None`: it is written, and there is nothing left to see to.
    pub(super) fn retries_in(&self) -> Option<Duration> {
        let mut inner = self.inner();
        inner.retrying = inner.written < inner.changes;
        let doublings = inner.write_failures.saturating_sub(1).min(16);
        let wait = limits::OAUTH_WRITE_RETRY_MIN.saturating_mul(1 << doublings);
        inner.retrying.then_some(wait.min(limits::OAUTH_WRITE_RETRY_MAX))
    }

    /// The process ends: what the state file lacks is written now, if that can be done in `limit`.
    pub fn finish(self: &Arc<Tokens>, limit: Duration) {
        // By the second signal, or a core that does not end: those that are in use still.
        self.inner().turns.values().for_each(|in_use| in_use.is_given_up());
        if self.unwritten().is_none() {
            return;
        }
        let (tokens, (done, ended)) = (Arc::clone(self), channel());
        let write = move || {
            tokens.write_now();
            let _ = done.send(());
        };
        // A disk that hangs does not keep the process alive.
        let is_over = match std::thread::Builder::new().name("restcast-files".into()).spawn(write) {
            Ok(_) => ended.recv_timeout(limit).is_ok(),
            Err(_) => {
                self.write_now();
                true
            }
        };
        if !is_over || self.unwritten().is_some() {
            let sentence =
                "The process ends, and a refresh token that was given anew is not in the state file: it is lost.";
            log::write(LogLevel::Error, &[("file", &self.state.shown_path())], sentence);
        }
    }
}

impl Inner {
    #[allow(clippy::mutable_key_type, reason = "the hash is of where values stand, and of those that never change")]
    fn entry(&mut self, options: &Arc<Options>, now: Instant) -> &mut Entry {
        if !self.entries.contains_key(options) && self.entries.len() >= limits::OAUTH_CREDENTIALS_MAX {
            let idle = self.entries.iter().filter(|(_, entry)| entry.renewal.is_idle());
            let oldest = idle.min_by_key(|(_, entry)| entry.used).map(|(options, _)| Arc::clone(options));
            oldest.and_then(|oldest| self.entries.remove(&oldest));
        }
        let entry = self.entries.entry(Arc::clone(options)).or_default();
        entry.used = now;
        entry
    }

    fn has_written(&mut self, changes: u64) {
        self.written = self.written.max(changes);
        if std::mem::take(&mut self.write_failures) > 0 {
            log::write(LogLevel::Info, &[], "The refresh tokens that could not be written are in the state file now.");
        }
    }

    fn has_not_written(&mut self, error: &dyn fmt::Display) {
        self.write_failures = self.write_failures.saturating_add(1);
        // One that goes on failing is told of ever more rarely.
        let level = if self.write_failures.is_power_of_two() { LogLevel::Error } else { LogLevel::Debug };
        let sentence = "A refresh token that was given anew is in memory alone, and is lost if the process ends before it can be written.";
        log::write(level, &[("error", error), ("failures", &self.write_failures)], sentence);
    }
}

/// What the state file lacked at a time.
#[derive(Clone, Copy)]
pub(super) struct Unwritten {
    changes: u64,
    /// The writes that had begun by then, and may not have it.
    after: u64,
}

/// What became of the wish to have something written.
pub(super) enum Write {
    /// It is written, or could not be.
    Done,
    /// When this has landed, ask again.
    After(Arc<Flight<()>>),
    /// This is to be carried out.
    Begun(Writing),
}

/// A write that has begun. Dropped undone, it has failed.
pub(super) struct Writing {
    tokens: Arc<Tokens>,
    pilot: Option<Pilot<()>>,
}

impl Writing {
    /// Carries it out. Blocks: for a helper thread.
    pub(super) fn run(mut self) {
        self.tokens.write_now();
        self.land();
    }

    fn land(&mut self) {
        self.tokens.inner().writing = None;
        // Only now: whoever is woken by it asks again.
        drop(self.pilot.take());
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        if self.pilot.is_some() {
            self.tokens.inner().has_not_written(&"no thread is there to write it");
            self.land();
        }
    }
}

/// What became of a question.
pub(super) enum Asked {
    /// This is the answer.
    Answered(Outcome),
    /// So is this; and a renewal has begun, to be carried out.
    AnsweredAndBegun(Token, Underway),
    /// The outcome of this is; a renewal that has begun for it is to be carried out.
    Waits(Arc<Flight<Outcome>>, Option<Underway>),
}

/// Whose turn it is to use a refresh token.
pub(super) enum Turn {
    /// The grant has none.
    Unneeded,
    /// The asker's, until this is dropped.
    Taken(Taken),
    /// Another's; when that has landed it may be the asker's.
    After(Arc<Flight<()>>),
}

impl InUse {
    /// Whoever uses it does not wait for the answer any more.
    fn is_given_up(&self) {
        let sentence = "A refresh token was in use when its use was given up: if the endpoint has given another one for it, that is lost.";
        log::write(LogLevel::Error, &[("endpoint", &self.endpoint)], sentence);
    }
}

/// A turn that was taken.
pub(super) struct Taken {
    tokens: Arc<Tokens>,
    name: String,
    pilot: Option<Pilot<()>>,
    is_over: bool,
}

impl Taken {
    /// What the endpoint has answered, if it has, is kept.
    pub(super) fn over(mut self) {
        self.is_over = true;
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let in_use = self.tokens.inner().turns.remove(&self.name);
        // Its core ends, or panicked.
        in_use.iter().filter(|_| !self.is_over).for_each(InUse::is_given_up);
        // Only now: whoever is woken by it asks again.
        drop(self.pilot.take());
    }
}

/// A renewal that has begun. Dropped undone (its core ends, or panicked), it has failed.
pub(super) struct Underway {
    tokens: Arc<Tokens>,
    options: Arc<Options>,
    pilot: Option<Pilot<Outcome>>,
}

impl Underway {
    /// The table that waits for it.
    pub(super) fn tokens(&self) -> &Arc<Tokens> {
        &self.tokens
    }

    /// What is asked, of whom.
    pub(super) fn options(&self) -> &Options {
        &self.options
    }

    /// It has ended so: all who wait are told.
    pub(super) fn land(mut self, result: Result<&Granted, (Why, Option<Duration>)>) {
        let outcome = self.tokens.end(&self.options, result);
        if let Some(pilot) = self.pilot.take() {
            pilot.land(outcome);
        }
    }
}

impl Drop for Underway {
    fn drop(&mut self) {
        if self.pilot.is_some() {
            let _ = self.tokens.end(&self.options, Err((Why::Fault, None)));
        }
    }
}

/// What a credential's refresh tokens are kept under: of whose they are, and nothing secret. What else is asked with them does
/// not tell them apart (RFC 6749 section 6: the one that is given in place of another is good for the same).
fn name_of(options: &Options) -> String {
    let mut context = digest::Context::new(&digest::SHA256);
    let mut add = |part: &[u8]| {
        context.update(&(part.len() as u64).to_le_bytes());
        context.update(part);
    };
    add(options.token_url.as_str().as_bytes());
    add(options.client_id.value().expose_secret());
    if let oauth::Grant::RefreshToken(token) = &options.grant {
        add(&place_of(token));
    }
    hex(context.finish().as_ref())
}

/// Where a configured refresh token stands, and what it is where it stands in the configuration itself.
fn place_of(token: &Live) -> Vec<u8> {
    match token.source() {
        Source::File(path) => format!("file:{path}").into_bytes(),
        Source::Variable(name) => format!("env:{name}").into_bytes(),
        Source::Written => mark_of(&token.value()).into_bytes(),
    }
}

/// What a configured refresh token is known by.
fn mark_of(token: &Secret) -> String {
    hex(digest::digest(&digest::SHA256, token.expose_secret()).as_ref())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn section(stored: &BTreeMap<String, Stored>) -> Value {
    let written = |held: &Stored| {
        let token = String::from_utf8_lossy(held.token.expose_secret()).into_owned();
        json!({ "refresh_token": token, "of": held.of, "at": held.at })
    };
    Value::Object(stored.iter().map(|(name, held)| (name.clone(), written(held))).collect::<Map<_, _>>())
}

fn read(section: &Value) -> Option<BTreeMap<String, Stored>> {
    let section = section.as_object().filter(|section| section.len() <= limits::OAUTH_STORED_MAX)?;
    let held = |(name, value): (&String, &Value)| {
        let token = value.get("refresh_token")?.as_str()?;
        let fits = !token.is_empty() && token.len() <= limits::OAUTH_TOKEN_BYTES_MAX;
        let of = value.get("of")?.as_str()?.to_owned();
        fits.then_some(())?;
        Some((name.clone(), Stored { token: Secret::new(token), of, at: value.get("at")?.as_u64()? }))
    };
    section.iter().map(held).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::live::{ClientIdentity, IdentityPem, Rule};
    use crate::stream::oauth::{ClientAuth, Grant};

    fn options(token: Live) -> Options {
        let written = |text: &str| Live::new(Source::Written, Rule::Text, Secret::new(text));
        Options {
            grant: Grant::RefreshToken(token),
            token_url: "https://idp.example/token".parse().expect("a URL"),
            client_id: written("client"),
            client_secret: Some(written("s3cret")),
            client_auth: ClientAuth::Basic,
            scope: None,
            audience: None,
            params: Vec::new(),
            ca: None,
            identity: None,
        }
    }

    fn in_file(path: &str, token: &str) -> Options {
        options(Live::new(Source::File(path.into()), Rule::Text, Secret::new(token)))
    }

    fn texts(tokens: &Tokens, options: &Options) -> Vec<String> {
        let text = |token: &Option<Secret>| {
            String::from_utf8_lossy(token.as_ref().expect("a refresh token").expose_secret()).into_owned()
        };
        tokens.refresh_tokens(options).iter().map(text).collect()
    }

    #[test]
    fn given_refresh_tokens_survive_and_stand_apart() {
        let folder = std::env::temp_dir().join(format!("restcast-oauth-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let path = folder.join("state");
        let open = || {
            let state = Arc::new(StateFile::open(&path, true).expect("it opens"));
            Tokens::new(state, [7; 32]).expect("it is whole")
        };
        let (one, other) = (in_file("one", "c1"), in_file("other", "c2"));
        let tokens = open();
        assert_eq!(texts(&tokens, &one), ["c1"]);
        tokens.keep(&one, &Secret::new(*b"r1"));
        assert!(tokens.unwritten().is_some());
        tokens.write_now();
        tokens.keep(&one, &Secret::new(*b"r1"));
        assert!(tokens.unwritten().is_none(), "the same again is no news");
        assert_eq!((texts(&tokens, &one), texts(&tokens, &other)), (vec!["r1".into(), "c1".into()], vec!["c2".into()]));
        drop(tokens);
        let file = std::fs::read_to_string(&path).expect("a file");
        assert!(!file.contains("s3cret") && !file.contains("\"c1\""), "{file}");
        let tokens = open();
        assert_eq!(texts(&tokens, &one), ["r1", "c1"]);
        let changed = in_file("one", "c9");
        assert_eq!(texts(&tokens, &changed), ["c9", "r1"], "another one was put into the file");
        tokens.keep(&changed, &Secret::new(*b"c9"));
        assert!(tokens.unwritten().is_some(), "the endpoint takes it and gives no other");
        tokens.write_now();
        drop(tokens);
        assert_eq!(texts(&open(), &changed), ["c9"]);
        std::fs::remove_dir_all(&folder).expect("it was made here");
    }

    #[test]
    fn a_refresh_token_is_used_by_one_at_a_time_whatever_else_is_asked_with_it() {
        let state = Arc::new(StateFile::unread(std::path::Path::new("nowhere/at/all")));
        let tokens = Arc::new(Tokens::new(state, [7; 32]).expect("nothing is read"));
        let one = in_file("one", "c1");
        let pem = IdentityPem { cert: b"cert".to_vec(), key: Secret::new(*b"key") };
        let identity = Some(ClientIdentity::new("cert.pem".into(), "key.pem".into(), pem));
        let others = [
            Options { identity, ..one.clone() },
            Options { scope: Some("leads".into()), ..one.clone() },
            Options { client_auth: ClientAuth::Post, client_secret: None, ..one.clone() },
        ];
        let Turn::Taken(taken) = Tokens::turn(&tokens, &one) else { panic!("nobody has it") };
        let waits = |options: &Options| match Tokens::turn(&tokens, options) {
            Turn::After(flight) => flight,
            Turn::Taken(_) | Turn::Unneeded => panic!("it is another's"),
        };
        let flights = others.each_ref().map(waits);
        let Turn::Taken(elsewhere) = Tokens::turn(&tokens, &in_file("other", "c2")) else {
            panic!("a token of its own")
        };
        tokens.keep(&one, &Secret::new(*b"r1"));
        assert!(flights.iter().all(|flight| flight.landed(|(), _| ()).is_none()));
        drop((taken, elsewhere));
        assert!(flights.iter().all(|flight| flight.landed(|(), _| ()).is_some()), "they are woken");
        for other in &others {
            let Turn::Taken(_taken) = Tokens::turn(&tokens, other) else { panic!("it is free again") };
            assert_eq!(texts(&tokens, other), ["r1", "c1"], "the one that has come meanwhile is tried");
        }
        let none = Options { grant: Grant::ClientCredentials, ..one };
        assert!(matches!(Tokens::turn(&tokens, &none), Turn::Unneeded));
        assert!(tokens.inner().turns.is_empty());
    }

    #[test]
    fn a_file_that_hangs_does_not_keep_the_process() {
        let folder = std::env::temp_dir().join(format!("restcast-oauth-hangs-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let state = Arc::new(StateFile::open(&folder.join("state"), true).expect("it opens"));
        let tokens = Arc::new(Tokens::new(Arc::clone(&state), [7; 32]).expect("nothing is read"));
        tokens.keep(&in_file("one", "c1"), &Secret::new(*b"r1"));
        let ((begun, begins), (end, ends)) = (channel(), channel::<()>());
        let hangs = std::thread::spawn(move || {
            let _ = state.update(SECTION, |_| {
                begun.send(()).expect("it is waited for");
                // Longer than anybody would wait here.
                let _ = ends.recv_timeout(Duration::from_secs(60));
                Err::<(Value, ()), StateError>(state.corrupt(SECTION, String::new()))
            });
        });
        begins.recv().expect("it has begun");
        let before = clock::now().at;
        tokens.finish(Duration::from_millis(20));
        let took = clock::now().at.since(before);
        drop(end);
        hangs.join().expect("it ends");
        assert!(took < Duration::from_secs(30), "{took:?}");
        std::fs::remove_dir_all(&folder).expect("it was made here");
    }

    #[test]
    fn stored_refresh_tokens_are_bounded_and_the_oldest_goes() {
        let state = Arc::new(StateFile::unread(std::path::Path::new("nowhere/at/all")));
        let tokens = Tokens::new(state, [7; 32]).expect("nothing is read");
        for n in 0..=limits::OAUTH_STORED_MAX {
            let options = in_file(&n.to_string(), "c");
            tokens.keep(&options, &Secret::new(*b"r"));
            if n == 0 {
                tokens.inner().stored.values_mut().for_each(|held| held.at = 1);
            }
        }
        assert_eq!(tokens.inner().stored.len(), limits::OAUTH_STORED_MAX);
        assert_eq!(texts(&tokens, &in_file("0", "c")), ["c"], "the first is gone");
        assert_eq!(texts(&tokens, &in_file("1", "c")), ["r", "c"]);
    }

    #[test]
    fn a_section_that_is_none_is_refused() {
        for bad in [json!([]), json!({ "a": {} }), json!({ "a": { "refresh_token": "", "of": "", "at": 1 } })] {
            assert!(read(&bad).is_none(), "{bad}");
        }
        let good = json!({ "a": { "refresh_token": "r", "of": "m", "at": 1, "more": true } });
        assert_eq!(read(&good).map(|stored| stored.len()), Some(1));
    }
}
