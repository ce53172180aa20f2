//! The shell around the core: sockets, TLS, threads and clocks. `serve` and `demo` are here; each file is one concern.
//!
//! Source: ARCHITECTURE.md; protocol version 1, section 7. Errors: one sentence that says what to do.

pub mod admin;
pub mod admin_call;
pub mod admin_keys;
pub mod admin_places;
pub mod admin_streams;
pub mod admin_users;
pub mod api_keys;
pub mod clock;
pub mod connections;
pub mod control;
pub mod core;
pub mod demo;
pub mod fetch;
pub mod filters;
mod guarded;
mod helpers;
pub mod jwks;
pub mod kept_keys;
pub mod listener;
pub mod log;
pub mod mailbox;
pub mod oauth;
pub mod redis;
pub mod resolver;
pub mod secrets;
pub mod session;
pub mod shared_keys;
pub mod shared_streams;
pub mod sockets;
pub mod state;
pub mod streams;
pub mod sys;
pub mod tls;
pub mod workers;

use std::collections::BTreeSet;
use std::io::Write as _;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use ring::rand::{SecureRandom, SystemRandom};
use rustix::process::{Resource, getrlimit, setrlimit};

use crate::auth::api_key::ApiKeys;
use crate::auth::control::ControlEntry;
use crate::auth::identity::Identity;
use crate::auth::sealed::SALT_BYTES;
use crate::commands::check::{self, ProcessSources};
use crate::config::{Config, Driver, LogLevel};
use crate::ids::{CoreId, StreamId};
use crate::limits;
use crate::metrics::CoreMetrics;
use crate::shard::{Catalog, Input, Ledger, Mail, Options, Order, Shard};
use crate::stream;

use self::api_keys::KeyStore;
use self::connections::PeerListings;
use self::control::Control;
use self::core::{CoreParts, Process};
use self::fetch::Egress;
use self::jwks::Issuers;
use self::mailbox::{Mailbox, Message};
use self::oauth::Tokens;
use self::redis::{Mailboxes, Settings, Store, StoreParts};
use self::resolver::Resolver;
use self::secrets::Secrets;
use self::state::{StateError, StateFile};
use self::streams::{StreamStore, StreamsError};
use self::sys::Signal;
use self::tls::{Tls, TlsError};
use self::workers::Workers;

/// Entries of a core's submission queue.
const RING_ENTRIES: u32 = 4096;
/// Stack of a core's thread, of which only what is used takes memory: checking a message against a schema recurses.
const CORE_STACK_BYTES: usize = 8 << 20;
/// How long after the drain's window a core may still take before the process ends without it.
const DRAIN_MARGIN: Duration = Duration::from_secs(2);

/// A server that could not be started, or ended by a fault: one sentence for the operator.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ServeError(String);

impl From<std::io::Error> for ServeError {
    fn from(error: std::io::Error) -> ServeError {
        ServeError(error.to_string())
    }
}

impl From<TlsError> for ServeError {
    fn from(error: TlsError) -> ServeError {
        ServeError(error.to_string())
    }
}

impl From<StreamsError> for ServeError {
    fn from(error: StreamsError) -> ServeError {
        ServeError(error.to_string())
    }
}

impl From<StateError> for ServeError {
    fn from(error: StateError) -> ServeError {
        ServeError(error.to_string())
    }
}

/// Serves the streams of the configuration file until the process is told to end.
///
/// # Errors
/// [`ServeError`].
pub fn serve(path: &Path) -> Result<(), ServeError> {
    let (config, warnings) = read_config(path)?;
    let path = path.to_owned();
    run(config, &warnings, Some(Box::new(move || read_config(&path))), |ready| ready, |_| {})
}

/// Serves the sample upstream's streams until the process is told to end.
///
/// # Errors
/// [`ServeError`].
pub fn demo(listen: SocketAddr, admin: SocketAddr) -> Result<(), ServeError> {
    // Signals are masked before the first thread is started.
    sys::mask_signals()?;
    let sample = demo::start(|| clock::now().wall)?;
    let mut random = [0u8; 32];
    fill_random(&mut random)?;
    let secret: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    let text = demo::demo_config(sample.addr, listen, admin, &secret);
    let (config, _) = Config::parse(&text, &ProcessSources)
        .map_err(|errors| ServeError(errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")))?;
    let token = demo::token(&secret, clock::now().wall).map_err(|error| ServeError(error.to_string()))?;
    let (shown, upstream) = ((token.clone(), secret.clone()), sample.addr);
    run(
        config,
        &[],
        None,
        move |mut ready| {
            ready.push(("upstream", format!("http://{upstream}").into()));
            ready.push(("token", shown.0.into()));
            ready.push(("secret", shown.1.into()));
            ready
        },
        move |listen| eprint!("{}", demo::greeting(listen, upstream, &token, &secret)),
    )
}

/// The members of the ready line, in their order.
type Ready = Vec<(&'static str, serde_json::Value)>;
type Reread = Box<dyn Fn() -> Result<(Config, Vec<String>), ServeError> + Send>;

/// Reads and checks a configuration file: what it means, and its warnings.
fn read_config(path: &Path) -> Result<(Config, Vec<String>), ServeError> {
    let (config, warnings) = check::load(path).map_err(|error| ServeError(error.lines(path).join("\n")))?;
    Ok((config, check::warning_lines(path, &warnings)))
}

/// What a configuration means to the cores.
fn options_of(
    config: &Config,
    (streams, stopped): (&[Arc<stream::Options>], &BTreeSet<StreamId>),
    previous: Option<&Catalog>,
    seed: u64,
    connections_max: u32,
) -> Options {
    let mut limits = config.limits.clone();
    limits.connections = connections_max;
    Options {
        connection: config.connection.clone(),
        auth: config.auth.clone(),
        limits,
        catalog: Catalog::new(streams, previous, seed)
            .with_actions(&config.actions)
            .with_all_stopped(stopped)
            .with_direct(config.direct.as_ref(), previous),
    }
}

/// What can happen to a process from outside its cores.
enum Event {
    Signal(Signal),
    DrainAsked,
    CoreEnded(CoreId, Result<(), String>),
    StoreEnded,
    KeysEnded,
    StreamsEnded,
}

fn run(
    config: Config,
    warnings: &[String],
    reread: Option<Reread>,
    decorate: impl FnOnce(Ready) -> Ready,
    greet: impl FnOnce(SocketAddr),
) -> Result<(), ServeError> {
    let started = clock::now();
    sys::mask_signals()?;
    log::start(config.log);
    for warning in warnings {
        log::write(LogLevel::Warn, &[], warning);
    }
    let uring = choose_driver(config.server.driver)?;
    let cores = cores(config.server.cores);
    let allowed = connections_allowed(if config.tls.is_empty() { 0 } else { cores });
    let connections_max = connections_max(config.limits.connections, allowed);

    let (mut seed, mut catalog_seed) = ([0u8; 32], [0u8; 8]);
    fill_random(&mut seed)?;
    fill_random(&mut catalog_seed)?;
    let tls = match config.tls.as_slice() {
        [] => None,
        files => Some(Arc::new(Tls::new(files)?)),
    };
    let state_path = Path::new(&config.server.state);
    let state = match reread {
        Some(_) => StateFile::open(state_path, config.server.state_named)?,
        // The demo creates nothing, and whatever stands where it was started is none of its business.
        None => StateFile::unread(state_path),
    };
    let state = Arc::new(state);
    let tokens = Arc::new(Tokens::new(Arc::clone(&state), another(seed, 0xa5))?);
    let egress = Arc::new(Egress::through(config.proxy.clone()));
    let secrets = Secrets::start(Arc::clone(&tokens), Arc::clone(&egress))?;
    let (listeners, listen) = listen_all(config.server.listen, cores, config.server.share_port)?;
    let admin_listener = listener::listen(config.admin.listen, false)?;
    let admin_listen = admin_listener.local_addr()?;
    let mailboxes = (0..cores).map(|_| Mailbox::new().map(Arc::new)).collect::<Result<Vec<_>, _>>()?;
    let mut identity = [0u8; 32];
    fill_random(&mut identity)?;
    let identity = Identity::of_random(identity);
    let ledger = Arc::new(Ledger::of(identity.process()));
    let process = Arc::new(Process {
        id: ledger.process(),
        lists_heard: Mutex::default(),
        mailboxes,
        serving: AtomicBool::new(false),
        draining: AtomicBool::new(false),
        drained: AtomicU16::new(0),
        workers: Workers::start()?,
        store: config.redis.as_ref().map(|redis| Store::new(redis.timeout)).transpose()?,
        issuers: Issuers::new(&config, another(seed, 0x5a), started),
        tokens,
        egress,
    });
    let cores_told = process.mailboxes.clone();
    process.egress.tell(move || cores_told.iter().for_each(|mailbox| tell(mailbox, || Message::Way)));
    let cores_told = Arc::clone(&process);
    let tell_keys = move |keys: &Arc<ApiKeys>| {
        for mailbox in &cores_told.mailboxes {
            tell(mailbox, || Message::ApiKeys(Arc::clone(keys)));
        }
    };
    let (cores_told, watched) = (Arc::clone(&process), Arc::clone(&secrets));
    let tell_streams = move |options: &Arc<Options>, changed: &Arc<[StreamId]>| {
        watched.watch(&options.catalog);
        for mailbox in &cores_told.mailboxes {
            let changed = || Message::Catalog { options: Arc::clone(options), changed: Arc::clone(changed) };
            tell(mailbox, changed);
        }
    };
    let build = |streams: &[Arc<stream::Options>], stopped: &BTreeSet<StreamId>, previous: Option<&Catalog>| {
        options_of(&config, (streams, stopped), previous, u64::from_ne_bytes(catalog_seed), connections_max)
    };
    let streams =
        Arc::new(StreamStore::new(&config, Arc::clone(&state), process.store.clone(), &build, Box::new(tell_streams))?);
    let options = streams.options();
    let keeper = Arc::clone(&streams);
    secrets.seek_by(move || keeper.look_again());
    secrets.watch(&options.catalog);
    let keys = Arc::new(KeyStore::new(&config.api_keys, state, process.store.clone(), Box::new(tell_keys))?);
    let metrics: Vec<Arc<CoreMetrics>> = (0..cores).map(|_| Arc::default()).collect();
    ledger.marks().configure(&options.auth);
    ledger.budgets().configure(clock::now().at, &config.upstreams);
    ledger.bound(&options.limits);
    let control = Arc::new(Control::new(Arc::clone(&ledger), process.mailboxes.clone()));
    if let Some(store) = process.store.clone() {
        control.publish_by(Box::new(move |entry| store.order(Order::Publish(entry))));
    }
    let resolver = Arc::new(Resolver::system());
    let (events, happened) = channel::<Event>();

    let (up, listening) = channel::<()>();
    // Processes that share a port would all take the first processors: the kernel places their threads.
    let pinned = !config.server.share_port;
    for (number, listener) in listeners.into_iter().enumerate() {
        let core = CoreId(u16::try_from(number).unwrap_or(u16::MAX));
        let mut seed = seed;
        seed[0] ^= u8::try_from(number & 0xff).unwrap_or(0);
        seed[1] ^= u8::try_from(number >> 8).unwrap_or(0);
        let (options, ledger) = (Arc::clone(&options), Arc::clone(&ledger));
        let (process, metrics) = (Arc::clone(&process), Arc::clone(&metrics[number]));
        let keys = keys.table();
        let (resolver, events, up, tls) = (Arc::clone(&resolver), events.clone(), up.clone(), tls.clone());
        std::thread::Builder::new().name(format!("core-{number}")).stack_size(CORE_STACK_BYTES).spawn(move || {
            if pinned {
                pin(number);
            }
            // The shard is made on its own thread: what it shares within itself must not cross.
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let mut shard = Shard::new(core, cores, options, ledger, Arc::clone(&metrics), seed, clock::now());
                shard.handle(clock::now(), Input::ApiKeys(keys));
                let parts = CoreParts { core, process, shard, listener, tls, metrics, uring, up };
                drive(parts, &resolver)
            }));
            let outcome = match outcome {
                Ok(Ok(())) => Ok(()),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err("it panicked".to_owned()),
            };
            let _ = events.send(Event::CoreEnded(core, outcome));
        })?;
    }
    drop(up);
    for _ in 0..cores {
        if listening.recv().is_err() {
            break;
        }
    }

    process.issuers.wait_until_tried(limits::JWKS_START_WAIT);

    let asks = Mutex::new(events.clone());
    let admin = admin::Admin {
        options: RwLock::new(config.admin.clone()),
        listen: admin_listen,
        listen_as_configured: config.admin.listen,
        metrics,
        process: Arc::clone(&process),
        control: Arc::clone(&control),
        ledger: Arc::clone(&ledger),
        started: started.wall,
        started_at: started.at,
        connections_max: AtomicU32::new(connections_max),
        streams: Arc::clone(&streams),
        keys: Arc::clone(&keys),
        failures_per_minute: AtomicU32::new(config.limits.auth_failures_per_minute),
        wrong_key_told: control::Told::default(),
        drain: Box::new(move || {
            let _ = asks.lock().unwrap_or_else(PoisonError::into_inner).send(Event::DrainAsked);
        }),
    };
    let admin = Arc::new(admin);
    admin::start(admin_listener, Arc::clone(&admin))?;
    let (store_failed, keys_failed) = (events.clone(), events.clone());
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || while events.send(Event::Signal(sys::wait_for_signal())).is_ok() {})?;

    if let (Some(store), Some(redis)) = (&process.store, &config.redis) {
        let mut seed = [0u8; 32];
        fill_random(&mut seed)?;
        let (hears, changed, readable) = (Arc::clone(&control), Arc::clone(&keys), Arc::clone(&keys));
        let (streams_changed, streams_readable) = (Arc::clone(&streams), Arc::clone(&streams));
        let (polls, sessions) = (Arc::clone(&process), Arc::clone(&ledger));
        let heard = move |entries: &[ControlEntry]| {
            changed.heard(entries);
            streams_changed.heard(entries);
            admin_streams::heard(&polls, entries);
            for id in entries.iter().filter_map(|entry| sessions.end_ephemeral(entry.ended_ephemeral()?)) {
                for mailbox in &polls.mailboxes {
                    // A core without room for it finds out by its next pass over the sessions that it keeps.
                    drop(mailbox.post(Message::Mail(Mail::SessionEnded { id })));
                }
            }
            hears.heard(entries);
        };
        let keeper = Arc::clone(&admin);
        let listings = PeerListings::start(Arc::clone(&process), move || keeper.key())?;
        let sink = Mailboxes::new(
            process.mailboxes.clone(),
            Box::new(heard),
            Box::new(move |ask, sealed| listings.ask(ask, sealed)),
            Box::new(move || {
                readable.read_soon();
                streams_readable.read_soon();
            }),
        );
        let parts = StoreParts {
            options: redis.clone(),
            identity,
            settings: store_settings(&config),
            sink: Box::new(sink),
            resolver: Arc::clone(&resolver),
            seed,
            failed: Box::new(move || drop(store_failed.send(Event::StoreEnded))),
        };
        store.start(parts).map_err(|error| ServeError(error.to_string()))?;
        let (followed, streams_failed) = (Arc::clone(&streams), keys_failed.clone());
        std::thread::Builder::new().name("streams".into()).spawn(move || {
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| followed.follow(admin_keys::random)));
            drop(ended);
            let _ = streams_failed.send(Event::StreamsEnded);
        })?;
        let followed = Arc::clone(&keys);
        std::thread::Builder::new().name("api-keys".into()).spawn(move || {
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| followed.follow(admin_keys::random)));
            drop(ended);
            let _ = keys_failed.send(Event::KeysEnded);
        })?;
        let by = clock::now().at + redis.timeout * 2;
        let patience = || by.since(clock::now().at);
        if !keys.wait_for_first(patience()) {
            let sentence =
                "The API keys in Redis could not be read yet: those of the state file are in force until they are.";
            log::write(LogLevel::Warn, &[], sentence);
        }
        if !streams.wait_for_first(patience()) {
            let sentence =
                "The streams in Redis could not be read yet: those of the state file are in force until they are.";
            log::write(LogLevel::Warn, &[], sentence);
        }
        if !store.wait_for_replay(patience()) {
            let sentence = "The control stream of Redis could not be read yet: who was logged out or revoked meanwhile is known once it is.";
            log::write(LogLevel::Warn, &[], sentence);
        }
    }
    // Not before: a token that was revoked meanwhile would open until that is read, and a stream that is kept in Redis would
    // be one that there is not.
    process.serving.store(true, Ordering::SeqCst);
    for mailbox in &process.mailboxes {
        tell(mailbox, || Message::Serve);
    }
    let ready: Ready = vec![
        ("ready", true.into()),
        ("listen", listen.to_string().into()),
        ("admin", admin_listen.to_string().into()),
        ("pid", std::process::id().into()),
        ("driver", if uring { "io_uring" } else { "epoll" }.into()),
    ];
    let members: Vec<String> = decorate(ready).iter().map(|(name, value)| format!("\"{name}\":{value}")).collect();
    let line = format!("{{{}}}", members.join(","));
    let mut out = std::io::stdout().lock();
    // Whoever started the process may not want to know: it serves all the same.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    drop(out);
    greet(listen);

    let drain = config.connection.drain;
    let reload = || {
        reload(
            &reread,
            &Serving {
                allowed,
                process: &process,
                admin: &admin,
                ledger: &ledger,
                tls: tls.as_deref(),
                secrets: &secrets,
                config: &config,
            },
        );
    };
    let (ended, by) = match wait(&happened, &process, cores, drain, reload) {
        Ok(by) => (Ok(()), by),
        Err(error) => (Err(error), None),
    };
    if let Some(store) = &process.store {
        store.finish();
    }
    let left = || by?.checked_sub(Duration::from_micros(clock::now().at.as_micros()));
    process.tokens.finish(left().unwrap_or_default().max(limits::OAUTH_WRITE_AT_END));
    log::flush();
    ended
}

/// Waits for the process's end; if it has drained in good order, until when it may go on.
fn wait(
    happened: &Receiver<Event>,
    process: &Process,
    cores: u16,
    drain: Duration,
    reload: impl Fn(),
) -> Result<Option<Duration>, ServeError> {
    let mut until: Option<Duration> = None;
    // A drain asked of the admin listener is no signal: the one that a supervisor sends afterwards is the first.
    let mut signalled = false;
    let mut ended = 0;
    loop {
        let left = until.map_or(Duration::from_secs(3600), |until| {
            (until + DRAIN_MARGIN).saturating_sub(Duration::from_micros(clock::now().at.as_micros()))
        });
        let event = match happened.recv_timeout(left) {
            Ok(event) => event,
            Err(_) if until.is_some() && left.is_zero() => {
                log::write(LogLevel::Warn, &[], "The drain's time is over; the process ends with what is left.");
                return Ok(None);
            }
            Err(_) => continue,
        };
        match event {
            Event::CoreEnded(_, Ok(())) => {
                ended += 1;
                if ended == cores {
                    log::write(LogLevel::Info, &[], "Every connection is gone; the process ends.");
                    return Ok(until);
                }
            }
            Event::CoreEnded(core, Err(error)) => {
                return Err(ServeError(format!("core {} has ended: {error}", core.0)));
            }
            Event::StoreEnded => {
                return Err(ServeError("the thread that speaks with Redis has ended: it panicked".to_owned()));
            }
            Event::KeysEnded => {
                return Err(ServeError(
                    "the thread that follows the API keys in Redis has ended: it panicked".to_owned(),
                ));
            }
            Event::StreamsEnded => {
                let sentence = "the thread that follows the streams in Redis has ended: it panicked";
                return Err(ServeError(sentence.to_owned()));
            }
            Event::Signal(Signal::Hangup) => reload(),
            Event::Signal(Signal::Terminate) if signalled => {
                log::write(LogLevel::Warn, &[], "Told a second time to end; the process ends at once.");
                return Ok(None);
            }
            Event::Signal(Signal::Terminate) if until.is_some() => signalled = true,
            Event::DrainAsked if until.is_some() => {}
            Event::Signal(Signal::Terminate) | Event::DrainAsked => {
                signalled = !matches!(event, Event::DrainAsked);
                log::write(LogLevel::Info, &[("window_ms", &drain.as_millis())], "The process drains.");
                process.draining.store(true, Ordering::SeqCst);
                let now = Duration::from_micros(clock::now().at.as_micros());
                until = Some(now + drain);
                for mailbox in &process.mailboxes {
                    tell(mailbox, || Message::Drain);
                }
            }
        }
    }
}

/// What a reload is held against.
struct Serving<'s> {
    /// Connections that the descriptors allow.
    allowed: u32,
    process: &'s Process,
    admin: &'s admin::Admin,
    ledger: &'s Ledger,
    tls: Option<&'s Tls>,
    secrets: &'s Secrets,
    /// The configuration at start.
    config: &'s Config,
}

/// Reads the configuration again; a bad one is reported, and the old one stays in force.
fn reload(reread: &Option<Reread>, serving: &Serving<'_>) {
    let Serving { allowed, process, admin, ledger, tls, secrets, config: begun } = *serving;
    let Some(reread) = reread else {
        log::write(LogLevel::Info, &[], "The demo has no configuration to read again.");
        return;
    };
    let replaced = |(config, warnings): (Config, Vec<String>)| {
        let streams = admin.streams.reload(&config);
        // The listener goes on speaking what it speaks, and says so below.
        if let (Some(tls), false) = (tls, config.tls.is_empty()) {
            tls.replace(&config.tls)?;
        }
        Ok((config, warnings, streams))
    };
    match reread().and_then(replaced) {
        Ok((mut config, warnings, streams)) => {
            for warning in &warnings {
                log::write(LogLevel::Warn, &[], warning);
            }
            let spoken = config.connection.tls == begun.connection.tls;
            config.connection.tls = begun.connection.tls;
            let kept = config.server == begun.server && config.log == begun.log && spoken;
            let kept = kept && config.redis == begun.redis;
            if let Some(store) = &process.store {
                store.replace(store_settings(&config));
            }
            if !kept || config.admin.listen != admin.listen_as_configured {
                let sentence = "The listeners' addresses, whether they speak TLS, [log], [redis] and server.cores, share_port, driver, plaintext and state take effect at the next start.";
                log::write(LogLevel::Warn, &[], sentence);
            }
            let max = connections_max(config.limits.connections, allowed);
            let build = |streams: &[Arc<stream::Options>], stopped: &BTreeSet<StreamId>, previous: Option<&Catalog>| {
                options_of(&config, (streams, stopped), previous, 0, max)
            };
            *admin.options.write().unwrap_or_else(PoisonError::into_inner) = config.admin.clone();
            admin.connections_max.store(max, Ordering::Relaxed);
            admin.failures_per_minute.store(config.limits.auth_failures_per_minute, Ordering::Relaxed);
            ledger.marks().configure(&config.auth);
            ledger.budgets().configure(clock::now().at, &config.upstreams);
            process.egress.configure(config.proxy.clone());
            let answered = process.issuers.reload(&config, clock::now());
            streams.finish(&config, &build, |options| {
                ledger.bound(&options.limits);
                secrets.watch(&options.catalog);
                process.tokens.hurry();
                for mailbox in &process.mailboxes {
                    tell(mailbox, || Message::Reload(Arc::clone(options)));
                }
            });
            admin.keys.configure(&config.api_keys);
            for question in answered {
                process.answer(question);
            }
            // What is to be fetched now is seen when that core wakes.
            tell(&process.mailboxes[usize::from(jwks::FETCHING_CORE.0)], || Message::FetchKeySets);
            log::write(LogLevel::Info, &[("streams", &config.streams.len())], "The configuration was read again.");
        }
        Err(error) => {
            let sentence = format!("The configuration is not taken, the old one stays in force: {error}");
            log::write(LogLevel::Error, &[], &sentence);
        }
    }
}

/// What the thread that speaks with Redis needs of other tables.
fn store_settings(config: &Config) -> Settings {
    let session = config.auth.session.as_ref();
    Settings {
        session_prefix: session.map_or_else(|| "sess:".to_owned(), |session| session.prefix.clone()),
        revocation_keep: config.auth.revocation_keep,
    }
}

/// Tells a core, however full its mailbox is.
fn tell(mailbox: &Mailbox, message: impl Fn() -> Message) {
    while mailbox.post(message()).is_err() {
        clock::hold_thread(Duration::from_millis(1));
    }
}

/// Runs one core on the driver chosen.
fn drive(parts: CoreParts, resolver: &Resolver) -> std::io::Result<()> {
    if parts.uring {
        let mut builder = io_uring::IoUring::<io_uring::squeue::Entry, io_uring::cqueue::Entry>::builder();
        builder.setup_coop_taskrun();
        let mut runtime = monoio::RuntimeBuilder::<monoio::IoUringDriver>::new()
            .uring_builder(builder)
            .with_entries(RING_ENTRIES)
            .enable_timer()
            .build()?;
        runtime.block_on(core::run(parts, resolver))
    } else {
        let mut runtime = monoio::RuntimeBuilder::<monoio::LegacyDriver>::new().enable_timer().build()?;
        runtime.block_on(core::run(parts, resolver))
    }
}

/// Whether to run on io_uring.
fn choose_driver(driver: Driver) -> Result<bool, ServeError> {
    if driver == Driver::Epoll {
        return Ok(false);
    }
    let tried: std::io::Result<io_uring::IoUring> = io_uring::IoUring::builder().setup_coop_taskrun().build(8);
    match (tried, driver) {
        (Ok(_), _) => Ok(true),
        (Err(error), Driver::IoUring) => Err(ServeError(format!(
            "the kernel refuses io_uring ({error}): allow it (kernel.io_uring_disabled, seccomp) or set server.driver = \"epoll\""
        ))),
        (Err(error), _) => {
            let sentence = "The kernel refuses io_uring; running on epoll.";
            log::write(LogLevel::Warn, &[("error", &error)], sentence);
            Ok(false)
        }
    }
}

fn cores(configured: u16) -> u16 {
    match configured {
        0 => std::thread::available_parallelism().map_or(1, |n| u16::try_from(n.get()).unwrap_or(u16::MAX)),
        cores => cores,
    }
}

/// Keeps this thread on one processor; where that is not allowed it runs as it may.
fn pin(number: usize) {
    if let Ok(allowed) = rustix::thread::sched_getaffinity(None) {
        let processors: Vec<usize> = (0..rustix::thread::CpuSet::MAX_CPU).filter(|&cpu| allowed.is_set(cpu)).collect();
        if let Some(&cpu) = processors.get(number % processors.len().max(1)) {
            let mut set = rustix::thread::CpuSet::new();
            set.set(cpu);
            let _ = rustix::thread::sched_setaffinity(None, &set);
        }
    }
}

/// How many connections the descriptors allow, once the process has raised its limit as far as it may; `secure`: cores that
/// speak TLS, each of which may hold sockets besides its connections'.
fn connections_allowed(secure: u16) -> u32 {
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current < limit.maximum {
        limit.current = limit.maximum;
        let _ = setrlimit(Resource::Nofile, limit);
    }
    let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::from(u32::MAX));
    let reserved = limits::DESCRIPTORS_RESERVED + u64::from(secure) * u64::from(limits::LEFT_PER_CORE_MAX);
    let allowed = descriptors.saturating_sub(reserved.min(descriptors / 2));
    u32::try_from(allowed).unwrap_or(u32::MAX)
}

/// How many of those that are allowed the configuration wants.
fn connections_max(configured: u32, allowed: u32) -> u32 {
    if configured > allowed {
        let fields: [(&str, &dyn std::fmt::Display); 2] = [("configured", &configured), ("allowed", &allowed)];
        log::write(
            LogLevel::Warn,
            &fields,
            "limits.connections is more than the descriptors allow: raise LimitNOFILE.",
        );
    }
    if configured == 0 { allowed } else { configured.min(allowed) }
}

/// One listener a core, all on the same port.
fn listen_all(address: SocketAddr, cores: u16, share: bool) -> Result<(Vec<TcpListener>, SocketAddr), ServeError> {
    if !share {
        // Sharing the port among the cores would also share it with a stranger's process of the same user: a first try
        // without sharing tells whether it is taken.
        drop(listener::listen(address, false)?);
    }
    let first = listener::listen(address, true)?;
    let listen = first.local_addr()?;
    let mut all = vec![first];
    for _ in 1..cores {
        all.push(listener::listen(listen, true)?);
    }
    Ok((all, listen))
}

/// A seed of its own for something that is not a core.
fn another(mut seed: [u8; 32], mark: u8) -> [u8; 32] {
    seed[31] ^= mark;
    seed
}

/// The system's random numbers, for a command that needs some.
#[allow(clippy::disallowed_methods, reason = "a key that signs takes them as an argument")]
pub fn chance() -> SystemRandom {
    SystemRandom::new()
}

#[allow(
    clippy::disallowed_methods,
    reason = "seeds, ids and the demo key come from here; the rest takes them as arguments"
)]
fn fill_random(bytes: &mut [u8]) -> Result<(), ServeError> {
    SystemRandom::new().fill(bytes).map_err(|_| ServeError("the system gives no random numbers".to_owned()))
}

/// A salt; `None` where the system gives no random numbers.
fn salt() -> Option<[u8; SALT_BYTES]> {
    let mut salt = [0; SALT_BYTES];
    fill_random(&mut salt).ok().map(|()| salt)
}
