//! The key sets of issuers, fetched: at the start, before they are too old, and once for a key that is not known.
//!
//! Source: protocol version 1, section 2; when a set is fetched stands in `auth::refresh`, what it may hold in `auth::jwks`.
//! Memory: an entry an issuer, and the numbers of the questions that wait for its fetch, at most
//! `limits::LOOKUPS_MAX`. Errors: a fetch that fails is told in the log; the last set stays in force.
//! Not here: HTTP and TLS (`fetch`), who waits for a key (`shard::authenticate`).
//!
//! One core fetches, over its own client; every core may ask. The lock is taken for an unknown key, for a fetch, and for a
//! reload: never on a delivery, and not for a token whose key is known.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::clock;
use super::fetch::{Egress, Fetcher};
use super::log;
use crate::auth::jwks::{self, IssuerOptions, KeySets, KeySource};
use crate::auth::keys::Algorithm;
use crate::auth::refresh::{Refresh, Wanted};
use crate::config::{Config, KeySetPlace, LogLevel};
use crate::ids::{CoreId, StreamId};
use crate::limits;
use crate::shard::Rng;
use crate::stream::poll::{FetchRequest, FetchResult, Target, Validators};
use crate::stream::template::UrlTemplate;
use crate::stream::{CaFile, Options};
use crate::time::{Instant, Now};

/// The core that fetches.
pub const FETCHING_CORE: CoreId = CoreId(0);

/// The issuers whose sets are fetched, and the sets.
#[derive(Debug)]
pub struct Issuers {
    state: Mutex<State>,
    /// When there is something to be begun, in microseconds; read without the lock.
    due_us: AtomicU64,
    tried: Condvar,
}

#[derive(Debug)]
struct State {
    issuers: Vec<Issuer>,
    sets: Arc<KeySets>,
    rng: Rng,
    /// Number of the last entry made: what is fetched for one that a reload has replaced is for nobody.
    entries: u64,
}

#[derive(Debug)]
struct Issuer {
    entry: u64,
    /// Its place in the configuration.
    place: usize,
    name: String,
    source: KeySource,
    algorithms: Vec<Algorithm>,
    target: Arc<Target>,
    refresh: Refresh,
    /// Wanted by somebody, and not begun.
    wanted: bool,
    /// Keys of its set that can be used.
    usable: usize,
    waiting: Vec<Question>,
}

/// A question of a core, by its number.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Question {
    /// Who asks.
    pub core: CoreId,
    /// The number.
    pub ask: u64,
}

/// A fetch to be carried out.
#[derive(Clone, Debug)]
pub struct Job {
    entry: u64,
    /// What to ask for.
    pub request: FetchRequest,
}

/// What a fetch has come to.
#[derive(Debug, Default)]
pub struct Finished {
    /// The sets that are in force now, where they have changed.
    pub sets: Option<Arc<KeySets>>,
    /// Who waits for it.
    pub answered: Vec<Question>,
    /// Whether it has brought a set.
    pub brought: bool,
}

/// What became of a question.
#[derive(Clone, Debug)]
pub enum Asked {
    /// There are newer sets than the core goes by, which are still on their way to it.
    Behind(Arc<KeySets>),
    /// It is answered when the fetch has ended.
    Waits {
        /// Whether the core that fetches is to be told.
        tell: bool,
    },
    /// It is answered at once: nothing is fetched now.
    Answered,
}

/// What metrics tell of the sets.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Figures {
    /// Keys in force that were fetched.
    pub keys: u64,
    /// How long ago the oldest set was fetched; of one that never was, how long it has been wanted.
    pub age: Duration,
}

impl Issuers {
    /// Those of `config`, none fetched yet.
    pub fn new(config: &Config, seed: [u8; 32], now: Now) -> Issuers {
        let state = State { issuers: Vec::new(), sets: Arc::default(), rng: Rng::new(seed), entries: 0 };
        let this = Issuers { state: Mutex::new(state), due_us: AtomicU64::new(u64::MAX), tried: Condvar::new() };
        this.reload(config, now);
        this
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the issuers of a configuration that was read again: those that are as before keep their sets and times. Who
    /// waits for one that is gone is to be answered.
    pub fn reload(&self, config: &Config, now: Now) -> Vec<Question> {
        let mut state = self.state();
        let mut before = std::mem::take(&mut state.issuers);
        let options = config.auth.jwt.key_sets.iter().zip(&config.key_sets).enumerate();
        for (place, (issuer, source)) in options {
            let KeySetPlace::Url { url, ca } = &source.place else { continue };
            let target = target(url, ca.as_ref());
            let same = before.iter().position(|held| held.name == issuer.issuer && held.source == issuer.source);
            state.entries += 1;
            let entry = state.entries;
            let new = || Issuer {
                entry,
                place,
                name: issuer.issuer.clone(),
                source: issuer.source.clone(),
                algorithms: Vec::new(),
                target,
                refresh: Refresh::new(now.at),
                wanted: false,
                usable: 0,
                waiting: Vec::new(),
            };
            let kept = same.map_or_else(new, |at| before.swap_remove(at));
            let usable = state
                .sets
                .of(&issuer.issuer, &issuer.source)
                .map_or(0, |set| set.iter().filter(|key| issuer.algorithms.contains(&key.algorithm())).count());
            state.issuers.push(Issuer { place, usable, algorithms: issuer.algorithms.clone(), ..kept });
        }
        let State { issuers, sets, .. } = &mut *state;
        Arc::make_mut(sets).retain(|name| issuers.iter().any(|issuer| issuer.name == name));
        self.note_due(&state);
        before.into_iter().flat_map(|issuer| issuer.waiting).collect()
    }

    /// Whether a fetch is to begin; cheap enough for every turn.
    pub fn is_due(&self, now: Instant) -> bool {
        self.due_us.load(Ordering::Relaxed) <= now.as_micros()
    }

    /// When the next fetch is to begin, if no one asks for it before.
    pub fn next_timeout(&self) -> Option<Instant> {
        match self.due_us.load(Ordering::Relaxed) {
            u64::MAX => None,
            us => Some(Instant::from_micros(us)),
        }
    }

    fn note_due(&self, state: &State) {
        let due =
            |issuer: &Issuer| if issuer.wanted { Some(Instant::default()) } else { issuer.refresh.next_timeout() };
        let due = state.issuers.iter().filter_map(due).min();
        self.due_us.store(due.map_or(u64::MAX, Instant::as_micros), Ordering::Relaxed);
    }

    /// The fetches that are to begin now. Each is to be brought back to [`Issuers::finish`].
    pub fn begin(&self, now: Now) -> Vec<Job> {
        let mut state = self.state();
        let begun = state.issuers.iter_mut().filter_map(|issuer| {
            let begins = std::mem::take(&mut issuer.wanted) || issuer.refresh.begin_if_due(now.at);
            let request = FetchRequest { target: Arc::clone(&issuer.target), validators: Validators::default() };
            begins.then_some(Job { entry: issuer.entry, request })
        });
        let begun = begun.collect();
        self.note_due(&state);
        begun
    }

    /// A core that goes by the sets of `version` has met a key that is not in the set of the issuer at that place.
    pub fn ask(&self, place: usize, question: Question, version: u64, now: Now) -> Asked {
        let mut state = self.state();
        if version < state.sets.version() {
            return Asked::Behind(Arc::clone(&state.sets));
        }
        let Some(issuer) = state.issuers.iter_mut().find(|issuer| issuer.place == place) else {
            return Asked::Answered;
        };
        // Who has gone meanwhile still stands there until the fetch has ended.
        if issuer.waiting.len() >= limits::LOOKUPS_MAX {
            return Asked::Answered;
        }
        let tell = match issuer.refresh.want(now.at) {
            Wanted::Refuse => return Asked::Answered,
            Wanted::Wait => false,
            Wanted::Fetch => true,
        };
        issuer.wanted |= tell;
        issuer.waiting.push(question);
        self.note_due(&state);
        Asked::Waits { tell }
    }

    /// A fetch has ended.
    pub fn finish(&self, job: &Job, result: FetchResult, now: Now) -> Finished {
        let mut state = self.state();
        let State { issuers, sets, rng, .. } = &mut *state;
        // A reload has taken the issuer away meanwhile, and answered those who waited.
        let Some(issuer) = issuers.iter_mut().find(|issuer| issuer.entry == job.entry) else {
            return Finished::default();
        };
        let chance = u32::try_from(rng.below(1001)).unwrap_or(0);
        let mut finished = Finished { answered: std::mem::take(&mut issuer.waiting), ..Finished::default() };
        match read(&issuer.name, result) {
            Ok((set, fresh_for)) => {
                issuer.refresh.succeeded(now.at, fresh_for, chance);
                finished.brought = true;
                let usable = |key: &&_| issuer.algorithms.contains(&crate::auth::keys::Key::algorithm(key));
                issuer.usable = set.keys.iter().filter(usable).count();
                let fields: [(&str, &dyn std::fmt::Display); 3] =
                    [("issuer", &issuer.name), ("keys", &set.used), ("passed_over", &set.passed_over)];
                if issuer.usable == 0 {
                    log::write(
                        LogLevel::Warn,
                        &fields,
                        "The key set has no key that can be used: the issuer's tokens are refused.",
                    );
                } else {
                    log::write(LogLevel::Info, &fields, "The key set was fetched.");
                }
                let mut changed = KeySets::clone(sets);
                changed.put(&issuer.name, &issuer.source, set.keys);
                *sets = Arc::new(changed);
                finished.sets = Some(Arc::clone(sets));
            }
            Err(detail) => {
                issuer.refresh.failed(now.at, chance);
                let failures = issuer.refresh.failures();
                let fields: [(&str, &dyn std::fmt::Display); 3] =
                    [("issuer", &issuer.name), ("failures", &failures), ("detail", &detail)];
                let sentence = match sets.of(&issuer.name, &issuer.source) {
                    Some(_) => "The key set cannot be fetched; the last one stays in force.",
                    None => "The key set cannot be fetched; the issuer's tokens are refused until it can.",
                };
                // One that goes on failing is told of ever more rarely.
                let level = if failures.is_power_of_two() { LogLevel::Warn } else { LogLevel::Debug };
                log::write(level, &fields, sentence);
            }
        }
        self.note_due(&state);
        self.tried.notify_all();
        finished
    }

    /// Holds this thread until every set has been fetched or cannot be, for so long at most.
    pub fn wait_until_tried(&self, limit: Duration) {
        let until = clock::now().at + limit;
        let mut state = self.state();
        while !state.issuers.iter().all(|issuer| issuer.refresh.is_tried()) {
            let left = until.since(clock::now().at);
            if left.is_zero() {
                log::write(LogLevel::Warn, &[], "Not every key set has come in time; serving begins without.");
                return;
            }
            state = self.tried.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// What metrics tell; `started` is when the process was.
    pub fn figures(&self, started: Instant, now: Now) -> Figures {
        let state = self.state();
        let keys = state.issuers.iter().map(|issuer| issuer.usable as u64).sum();
        let fetched = state.issuers.iter().map(|issuer| issuer.refresh.fetched().unwrap_or(started));
        Figures { keys, age: fetched.min().map_or(Duration::ZERO, |oldest| now.at.since(oldest)) }
    }
}

/// What a fetch has brought: the set, and how long it may be used; or what is wrong, in words for the log.
fn read(issuer: &str, result: FetchResult) -> Result<(jwks::Jwks, Option<Duration>), String> {
    let response = result.map_err(|error| format!("{}: {}", error.code.as_str(), error.detail))?;
    if response.status != 200 {
        return Err(format!("the status is {}, not 200", response.status));
    }
    let set = jwks::read(issuer, &response.body).map_err(|error| error.to_string())?;
    Ok((set, response.fresh_for))
}

/// What to ask for a key set.
fn target(url: &url::Url, ca: Option<&CaFile>) -> Arc<Target> {
    let id = StreamId::new("jwks").expect("the characters of an id");
    let blank = UrlTemplate::parse::<&str>("http://localhost/", &[]).expect("a URL without placeholders");
    let options = Options {
        ca: ca.cloned(),
        connect_timeout: limits::JWKS_TIMEOUT,
        first_byte_timeout: limits::JWKS_TIMEOUT,
        timeout: limits::JWKS_TIMEOUT,
        response_bytes_max: limits::JWKS_BYTES_MAX as u64,
        backoff_max: limits::JWKS_RETRY_MAX,
        ..Options::new(id, blank)
    };
    Arc::new(Target { options: Arc::new(options), url: url.clone(), body: None, guard: None })
}

/// The key sets of `config` that are to be fetched, for a command that serves nothing; and a line for each that cannot be had.
///
/// # Errors
/// The system's.
pub fn fetch_once(config: &Config) -> std::io::Result<(Arc<KeySets>, Vec<String>)> {
    let (mut sets, mut lines) = (KeySets::default(), Vec::new());
    let options = config.auth.jwt.key_sets.iter().zip(&config.key_sets);
    let wanted: Vec<(&IssuerOptions, Arc<Target>)> = options
        .filter_map(|(issuer, source)| match &source.place {
            KeySetPlace::Url { url, ca } => Some((issuer, target(url, ca.as_ref()))),
            KeySetPlace::File { .. } => None,
        })
        .collect();
    if wanted.is_empty() {
        return Ok((Arc::new(sets), lines));
    }
    let resolver = super::resolver::Resolver::system();
    let mut runtime = monoio::RuntimeBuilder::<monoio::LegacyDriver>::new().enable_timer().build()?;
    runtime.block_on(async {
        let fetcher = Fetcher::new(super::fetch::FetcherOptions::default(), resolver.handle()?);
        let fetcher = fetcher.with_egress(Arc::new(Egress::through(config.proxy.clone())));
        for (IssuerOptions { issuer, source, .. }, target) in wanted {
            let request = FetchRequest { target, validators: Validators::default() };
            match read(issuer, fetcher.fetch(request, || clock::now().wall).await) {
                Ok((set, _)) => sets.put(issuer, source, set.keys),
                Err(detail) => lines.push(format!("the key set of {issuer:?} cannot be fetched: {detail}")),
            }
        }
        std::io::Result::Ok(())
    })?;
    Ok((Arc::new(sets), lines))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::check::ProcessSources;
    use crate::stream::poll::{FetchError, FetchResponse, UpstreamCode};
    use crate::time::WallTime;

    const SET: &str =
        r#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo","kid":"e"}]}"#;

    fn at(s: u64) -> Now {
        Now { at: Instant::from_micros(s * 1_000_000), wall: WallTime::from_secs(s) }
    }

    /// A configuration of these issuers, each with its URL.
    fn config(issuers: &[(&str, &str)]) -> Config {
        let of = |(issuer, url): &(&str, &str)| {
            format!("[[auth.jwt.jwks]]\nissuer = {issuer:?}\nurl = {url:?}\nalgs = [\"EdDSA\"]\n")
        };
        let text: String = issuers.iter().map(of).collect();
        Config::parse(&text, &ProcessSources).expect("a configuration").0
    }

    fn brought(body: &str) -> FetchResult {
        let received = WallTime::from_secs(1);
        let validators = Validators::default();
        Ok(FetchResponse { status: 200, validators, retry_after: None, fresh_for: None, body: body.into(), received })
    }

    fn source(url: &str) -> KeySource {
        KeySource { url: url.into(), ca: None }
    }

    fn failed() -> FetchResult {
        Err(FetchError { code: UpstreamCode::Dns, detail: "no such host".into() })
    }

    /// Asks as a core that has the newest sets.
    fn ask(issuers: &Issuers, place: usize, number: u64, now: Now) -> String {
        let version = issuers.state().sets.version();
        format!("{:?}", issuers.ask(place, question(number), version, now))
    }

    const WAITS: &str = "Waits { tell: false }";
    const TELLS: &str = "Waits { tell: true }";

    fn question(ask: u64) -> Question {
        Question { core: CoreId(1), ask }
    }

    #[test]
    fn questions_wait_for_the_fetch_under_way_and_are_answered_with_its_set() {
        let issuers = Issuers::new(&config(&[("a", "https://a/"), ("b", "https://b/")]), [7; 32], at(100));
        assert!(issuers.is_due(at(100).at));
        let jobs = issuers.begin(at(100));
        assert_eq!((jobs.len(), issuers.begin(at(100)).len(), issuers.next_timeout()), (2, 0, None));
        assert_eq!(ask(&issuers, 1, 5, at(100)), WAITS);
        let finished = issuers.finish(&jobs[0], brought(SET), at(101));
        assert!(finished.answered.is_empty() && finished.brought);
        let finished = issuers.finish(&jobs[1], failed(), at(101));
        assert_eq!((finished.answered, finished.brought, finished.sets.is_some()), (vec![question(5)], false, false));
        // A core that has not got that set yet gets it, and nothing is fetched for its sake.
        let behind = issuers.ask(0, question(5), 0, at(101));
        assert!(
            matches!(behind, Asked::Behind(sets) if sets.version() == 1 && sets.of("a", &source("https://a/")).is_some())
        );
        let figures = issuers.figures(at(90).at, at(111));
        assert_eq!(figures, Figures { keys: 1, age: Duration::from_secs(21) }, "«b» is wanted since the start");
        // The first who asks from now on begins one; the core that fetches is told once.
        assert_eq!(ask(&issuers, 0, 6, at(102)), TELLS);
        assert_eq!(ask(&issuers, 0, 7, at(102)), WAITS);
        assert_eq!(ask(&issuers, 7, 8, at(102)), "Answered", "there is no such issuer");
        let due = issuers.begin(at(102));
        let job = due.iter().find(|job| job.request.target.url.as_str() == "https://a/").expect("it was asked for");
        let finished = issuers.finish(job, brought(r#"{"keys":[]}"#), at(103));
        assert_eq!(finished.answered, [question(6), question(7)]);
        let sets = finished.sets.expect("it is another");
        let of_a = sets.of("a", &source("https://a/"));
        assert!(of_a.is_some_and(|set| set.is_empty()) && sets.of("b", &source("https://b/")).is_none());
        assert_eq!(ask(&issuers, 0, 9, at(104)), "Answered", "in the cool-down nobody waits");
    }

    #[test]
    fn a_set_is_fetched_again_before_the_life_is_over_that_its_issuer_gives_it() {
        let issuers = Issuers::new(&config(&[("a", "https://a/")]), [7; 32], at(100));
        let jobs = issuers.begin(at(100));
        let life = Duration::from_secs(10_000);
        let result = brought(SET).map(|response| FetchResponse { fresh_for: Some(life), ..response });
        issuers.finish(&jobs[0], result, at(100));
        let next = issuers.next_timeout().expect("it is fetched by itself").since(at(100).at);
        assert!((life * 8 / 10..life * 9 / 10 + Duration::from_secs(1)).contains(&next), "{next:?}");
    }

    #[test]
    fn a_reload_keeps_what_is_as_before_and_answers_whoever_waits_for_what_is_gone() {
        let issuers = Issuers::new(&config(&[("a", "https://a/"), ("b", "https://b/")]), [7; 32], at(100));
        let jobs = issuers.begin(at(100));
        issuers.finish(&jobs[1], brought(SET), at(100));
        assert_eq!(ask(&issuers, 0, 5, at(101)), WAITS);
        // «a» is gone, «b» stands elsewhere and is as it was, «c» is new.
        let gone = issuers.reload(&config(&[("c", "https://c/"), ("b", "https://b/")]), at(101));
        assert_eq!(gone, [question(5)]);
        let late = issuers.finish(&jobs[0], brought(SET), at(102));
        assert!(late.sets.is_none() && late.answered.is_empty(), "what was fetched for one that is gone is for nobody");
        let urls: Vec<String> = issuers.begin(at(102)).iter().map(|job| job.request.target.url.to_string()).collect();
        assert_eq!(urls, ["https://c/"]);
        assert_eq!(ask(&issuers, 1, 6, at(102)), TELLS, "«b», at its new place");
        assert_eq!(issuers.figures(at(90).at, at(102)).keys, 1);
        // Another URL is another source: what was fetched before is not its set, and who has a key of it waits.
        issuers.reload(&config(&[("b", "https://elsewhere/")]), at(103));
        let moved = issuers.begin(at(103));
        assert_eq!((issuers.figures(at(90).at, at(103)).keys, moved.len()), (0, 1));
        assert_eq!(ask(&issuers, 0, 7, at(103)), WAITS);
        let finished = issuers.finish(&moved[0], brought(SET), at(103));
        assert_eq!((finished.answered, issuers.figures(at(90).at, at(103)).keys), (vec![question(7)], 1));
        assert!(issuers.reload(&config(&[]), at(104)).is_empty());
        assert_eq!((issuers.next_timeout(), issuers.figures(at(90).at, at(104))), (None, Figures::default()));
    }
}
