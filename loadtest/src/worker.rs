//! One process of the load: its share of the connections, on one thread and one epoll set.
//!
//! A readable socket costs one `recv` into a buffer that all share; frames are read where they stand, and only what is not
//! whole yet is kept with its connection. A broadcast is the same bytes for all, so its meaning is looked up, not read again.
//!
//! Latency is free of coordinated omission: each event carries the server's own stamp, and every event of every connection
//! that reads is measured against it, whenever it is read. Nothing here waits for an answer before the next question, so a
//! stall delays no stamp; what is read late is recorded as late, and what never comes is counted as lost.
//!
//! Source: protocol version 1 for restcast's frames. Memory: about 600 bytes a connection, 10 KiB with TLS.
//! Errors: those of a connection are counted; those of the process end it, told to the parent by its end.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::io::{self, BufRead as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use flate2::{Decompress, FlushDecompress};
use ring::rand::{SecureRandom, SystemRandom};
use rustix::buffer::spare_capacity;
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, connect, recv, socket_with, sockopt};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, HandshakeKind};
use serde_json::{Value, json};

use crate::account::{Verdict, judge};
use crate::cli::{Carrier, Command, RunOptions, parse};
use crate::clock::{cpu_us, steady_us, wall_us};
use crate::histogram::Distribution;
use crate::link::{self, Link, Purpose, State, cause};
use crate::payload::{Meaning, Reader, member, unquoted};
use crate::sse::{self, BLOCK_BYTES_MAX, Chunked};
use crate::tally::Tally;
use crate::target::{Over, Target};
use crate::template::{Template, Values};
use crate::tls;
use crate::token::{Minter, exp_of};
use crate::ws::{self, Fragments, Opcode};

/// Bytes read at once.
const READ_BYTES: usize = 256 << 10;
/// Events taken from epoll at once: a bound on how long one may wait for those before it.
const EVENTS: usize = 512;
/// Connections begun in one turn.
const CONNECTS_PER_TURN: usize = 64;
/// Connections that may be opening at once, so that a slow server is not buried.
const OPENING_MAX: usize = 1024;
/// Source addresses on loopback. Of each there are about 28,000 ports, which rest a minute in TIME_WAIT behind a connection
/// that ended here, and finding a free one is slow when half are taken: so runs that follow each other need many addresses.
const SOURCE_ADDRESSES: u32 = 200;
/// Fewer connections come from 127.0.0.1 alone.
const SPREAD_FROM: u32 = 500;
/// How long a closing connection waits for the peer's end.
const CLOSING_US: u64 = 2_000_000;
/// After a failure with `--churn`.
const REOPEN_US: u64 = 100_000;
/// How often a slow reader reads.
const SLOW_US: u64 = 100_000;
/// How long events that were under way when the measurement ended may take.
const SETTLE_US: u64 = 3_000_000;
/// From here on lifetimes are told apart by whole seconds.
const LONG_LIFE: Duration = Duration::from_secs(3600);
/// What stands for standard input among the events.
const STDIN: u64 = u64::MAX;
/// The window of bytes that one inflated message may grow to.
const INFLATED_BYTES_MAX: usize = ws::MESSAGE_BYTES_MAX;

/// Reads its part from standard input and runs it; returns what is wrong with it.
///
/// # Errors
/// Text for standard error.
pub fn run() -> Result<(), String> {
    // The terminal's Ctrl-C reaches the whole group; the parent says when to stop.
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::default()).map_err(|error| error.to_string())?;
    }
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line).map_err(|error| error.to_string())?;
    let part: Value = serde_json::from_str(&line).map_err(|error| format!("a worker is started by `run`: {error}"))?;
    let args = part["args"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let Ok(Command::Run(options)) = parse(args.map(Into::into)) else { return Err("its part is no run".into()) };
    let number = |name: &str| part[name].as_u64().unwrap_or_default();
    let share = Share {
        first: number("first") as u32,
        count: number("count") as u32,
        rate: part["rate"].as_f64().unwrap_or(f64::MAX),
        exp: part["exp"].as_u64(),
        warm: part["warm"].as_bool().unwrap_or_default(),
    };
    Worker::new(*options, share)?.run()
}

/// What of the run is this process's.
struct Share {
    first: u32,
    count: u32,
    /// Connections per second.
    rate: f64,
    /// `exp` of all tokens, with `--expire-together`.
    exp: Option<u64>,
    /// Whether it opens the first connection of each URL before the others.
    warm: bool,
}

/// What the process is at.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Phase {
    Warming,
    Waiting,
    Opening,
    Open,
    Measuring,
    /// Heads were sent to the parent.
    Stopped,
    /// Until then events under way may come.
    Settling(u64),
}

/// How a connection ended.
enum End {
    /// As it should: what had to be told was told.
    Done,
    /// The peer ended it and did not say why.
    Eof,
    /// The socket.
    Io(Errno),
    /// The answer's status.
    Status(u16),
    /// What the peer must not send.
    Protocol(&'static str),
    /// TLS failed.
    Tls(String),
    /// It took too long.
    Timeout,
}

impl End {
    fn cause(&self) -> String {
        match self {
            End::Done => "done".into(),
            End::Eof => "eof".into(),
            End::Io(error) => cause(*error),
            End::Status(status) => format!("http_{status}"),
            End::Protocol(what) => (*what).into(),
            End::Tls(what) => format!("tls: {what}"),
            End::Timeout => "timeout".into(),
        }
    }
}

/// What comes due.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Due {
    /// The connection must be open by now.
    Opened,
    /// The peer's end must have come by now.
    Closed,
    /// A token is to be renewed.
    Renew,
    /// A slow reader reads.
    Slow,
    /// The connection of that number is opened again.
    Reopen,
    /// The first connection sends its message.
    Message,
}

#[derive(Default)]
struct Slot {
    generation: u32,
    link: Option<Box<Link>>,
}

/// What happened since the last line of progress.
struct Second {
    latency: Distribution,
    deliveries: u64,
    due_us: u64,
}

struct Worker {
    options: RunOptions,
    share: Share,
    targets: Vec<Target>,
    subscribe: Vec<Template>,
    message: Option<Template>,
    minter: Option<Minter>,
    tls: Option<Arc<ClientConfig>>,
    /// `Sec-WebSocket-Key` of all its connections, and the answer to it.
    nonce: String,
    accept: String,
    source_addresses: u32,
    first_address: u32,
    epoll: OwnedFd,
    slots: Vec<Slot>,
    free: Vec<u32>,
    timers: BinaryHeap<Reverse<(u64, Due, u32, u32)>>,
    phase: Phase,
    /// Numbers that wait to be opened (again).
    queue: VecDeque<u32>,
    opening: usize,
    /// Connections allowed by the rate since `paced_us`, and begun since then.
    paced_us: u64,
    begun: u64,
    reader: Reader,
    scratch: Vec<u8>,
    cipher: Vec<u8>,
    inflater: Decompress,
    inflated: Vec<u8>,
    tally: Tally,
    second: Second,
    /// Steady time and CPU time when the measurement began.
    measured_from: (u64, u64),
    /// Connections that were open and are over.
    ended_open: u64,
    /// How far each sequence was when the measurement ended, as the farthest process saw it.
    heads: HashMap<u32, u64>,
    commands: Vec<u8>,
}

impl Worker {
    fn new(options: RunOptions, share: Share) -> Result<Worker, String> {
        let targets = options.urls.iter().map(|url| Target::parse(url)).collect::<Result<Vec<_>, _>>();
        let targets = targets.map_err(|error| error.to_string())?;
        let random = || {
            let mut bytes = [0; 16];
            SystemRandom::new().fill(&mut bytes).map(|()| STANDARD.encode(bytes)).map_err(|_| "no randomness")
        };
        let nonce = random()?;
        let digest = ring::digest::digest(
            &ring::digest::SHA1_FOR_LEGACY_USE_ONLY,
            format!("{nonce}258EAFA5-E914-47DA-95CA-C5AB0DC85B11").as_bytes(),
        );
        let accept = STANDARD.encode(digest);
        let minter = options.secret_file.as_deref().map(|file| {
            let secret = std::fs::read(file).map_err(|error| format!("{}: {error}", file.display()))?;
            let secret = secret.strip_suffix(b"\n").map_or(&*secret, |line| line.strip_suffix(b"\r").unwrap_or(line));
            Minter::new(secret, &options.alg, &options.sub, &options.claims, random()?)
        });
        let minter = minter.transpose()?;
        let tls = targets.iter().any(|target| target.tls);
        let tls = tls.then(|| tls::client(options.ca.as_deref(), options.insecure)).transpose()?;
        let spread = options.churn || options.connections >= SPREAD_FROM;
        let source_addresses = options.source_addresses.unwrap_or(if spread { SOURCE_ADDRESSES } else { 1 });
        // Processes and runs start at different ones.
        let first_address = u32::from(accept.as_bytes()[0]) * 7;
        let queue = (share.first..share.first + share.count).collect();
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|error| error.to_string())?;
        rustix::io::ioctl_fionbio(io::stdin(), true).map_err(|error| error.to_string())?;
        epoll::add(&epoll, io::stdin(), EventData::new_u64(STDIN), EventFlags::IN)
            .map_err(|error| error.to_string())?;
        Ok(Worker {
            subscribe: options.subscribe.iter().map(|text| Template::new(text)).collect(),
            message: options.message.as_deref().map(Template::new),
            reader: Reader::new(options.keys.clone()),
            phase: if share.warm { Phase::Warming } else { Phase::Waiting },
            options,
            share,
            targets,
            minter,
            tls,
            nonce,
            accept,
            source_addresses,
            first_address,
            epoll,
            slots: Vec::new(),
            free: Vec::new(),
            timers: BinaryHeap::new(),
            queue,
            opening: 0,
            paced_us: 0,
            begun: 0,
            scratch: vec![0; READ_BYTES],
            cipher: vec![0; READ_BYTES / 4],
            inflater: Decompress::new(false),
            inflated: Vec::new(),
            tally: Tally::default(),
            second: Second { latency: Distribution::new(2), deliveries: 0, due_us: steady_us() + 1_000_000 },
            measured_from: (0, 0),
            ended_open: 0,
            heads: HashMap::new(),
            commands: Vec::new(),
        })
    }

    /// Turns until the report is sent or the parent is gone.
    fn run(mut self) -> Result<(), String> {
        if self.share.warm {
            for _ in 0..self.targets.len().min(self.queue.len()) {
                let number = self.queue.pop_front().expect("there are as many");
                self.begin(number, Purpose::Kept);
                if self.options.churn {
                    // It stays besides those that come and go.
                    self.queue.push_back(number);
                }
            }
        } else {
            tell(&json!({"kind": "warm"}))?;
        }
        let mut events: Vec<epoll::Event> = Vec::with_capacity(EVENTS);
        loop {
            let mut timeout = self.patience();
            if let Some(pause) = self.options.read_every.filter(|_| self.phase == Phase::Measuring) {
                // Asleep elsewhere than in epoll it is not woken by what comes.
                if events.len() < EVENTS {
                    std::thread::sleep(pause);
                }
                timeout = Timespec { tv_sec: 0, tv_nsec: 0 };
            }
            events.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), Some(&timeout)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.to_string()),
            }
            let told_us = wall_us();
            for event in &events {
                // The record is packed: its fields are copied, not borrowed.
                let (data, flags) = (event.data, event.flags);
                if data.u64() != STDIN {
                    self.happened(data.u64() as u32, (data.u64() >> 32) as u32, flags, told_us);
                } else if !self.commanded()? {
                    return Ok(());
                }
            }
            let now = steady_us();
            self.due(now);
            self.begin_more(now);
            self.go_on(now)?;
            if matches!(self.phase, Phase::Settling(until) if until <= now || self.caught_up()) {
                self.count_what_never_came();
                let mut report = self.tally.to_json();
                report["kind"] = "report".into();
                return tell(&report);
            }
        }
    }

    /// How long nothing has to be done.
    fn patience(&self) -> Timespec {
        let now = steady_us();
        let mut until = self.second.due_us;
        if let Some(Reverse((due, ..))) = self.timers.peek() {
            until = until.min(*due);
        }
        if self.may_begin() {
            until = until.min(now + 1000);
        }
        if matches!(self.phase, Phase::Settling(_)) {
            until = until.min(now + 20_000);
        }
        let wait = until.saturating_sub(now);
        Timespec { tv_sec: (wait / 1_000_000) as i64, tv_nsec: (wait % 1_000_000 * 1000) as i64 }
    }

    // What the parent says and is told.

    /// Reads what the parent says; false when it is gone.
    fn commanded(&mut self) -> Result<bool, String> {
        let mut buffer = [0; 65_536];
        match rustix::io::read(io::stdin(), &mut buffer[..]) {
            Ok(0) => return Ok(false),
            Ok(length) => self.commands.extend_from_slice(&buffer[..length]),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => return Err(error.to_string()),
        }
        while let Some(end) = memchr::memchr(b'\n', &self.commands) {
            let line: Vec<u8> = self.commands.drain(..=end).collect();
            let command: Value = serde_json::from_slice(&line).map_err(|error| error.to_string())?;
            let now = steady_us();
            match command["do"].as_str() {
                Some("connect") => {
                    self.phase = Phase::Opening;
                    (self.paced_us, self.begun) = (now, 0);
                }
                Some("measure") => self.measure(now),
                Some("stop") => self.stop(now)?,
                Some("settle") => {
                    self.learn_heads(&command["heads"]);
                    self.phase = Phase::Settling(now + SETTLE_US);
                }
                _ => return Err("the parent says what is not known".into()),
            }
        }
        Ok(true)
    }

    fn measure(&mut self, now: u64) {
        self.phase = Phase::Measuring;
        self.tally.counters.deliveries = 0;
        self.tally.counters.bytes = 0;
        self.tally.counters.slow_deliveries = 0;
        self.tally.latency.clear();
        self.tally.read_lag.clear();
        self.measured_from = (now, cpu_us());
        (self.paced_us, self.begun) = (now, 0);
        if self.options.churn {
            self.tally.handshake.clear();
        }
        if self.message.is_some() && self.share.warm {
            self.timers.push(Reverse((now, Due::Message, 0, 0)));
        }
    }

    /// Ends the measurement and tells how far each sequence is.
    fn stop(&mut self, now: u64) -> Result<(), String> {
        let (from, cpu) = self.measured_from;
        if from != 0 {
            self.tally.cpu_share_max = (cpu_us() - cpu) as f64 / (now - from).max(1) as f64;
        }
        self.phase = Phase::Stopped;
        let mut heads: HashMap<u32, u64> = HashMap::new();
        for link in self.slots.iter().filter_map(|slot| slot.link.as_deref()).filter(|link| link.is_reader()) {
            for known in &link.subscriptions {
                let head = heads.entry(known.sequence).or_default();
                *head = known.seq.max(*head);
            }
        }
        let heads: Vec<Value> =
            heads.into_iter().map(|(number, seq)| json!([hex(self.reader.sequence_name(number)), seq])).collect();
        tell(&json!({"kind": "heads", "heads": heads}))
    }

    /// Takes over how far each sequence is, as the farthest process saw it.
    fn learn_heads(&mut self, heads: &Value) {
        let mut known: HashMap<u32, u64> = HashMap::new();
        for head in heads.as_array().into_iter().flatten() {
            let name = head[0].as_str().map(unhex).unwrap_or_default();
            if let (Some(number), Some(seq)) = (self.reader.sequence(&name), head[1].as_u64()) {
                known.insert(number, seq);
            }
        }
        self.heads = known;
    }

    /// Connections that read and are open, with what they still miss of the heads.
    fn behind(&self) -> impl Iterator<Item = u64> {
        let links = self.slots.iter().filter_map(|slot| slot.link.as_deref());
        let healthy = links.filter(|link| link.is_reader() && link.open && link.state == State::Messages);
        healthy.flat_map(|link| &link.subscriptions).filter_map(|known| {
            let head = self.heads.get(&known.sequence)?;
            head.checked_sub(known.seq).filter(|&missing| missing > 0)
        })
    }

    fn caught_up(&self) -> bool {
        self.behind().next().is_none()
    }

    fn count_what_never_came(&mut self) {
        let missing: u64 = self.behind().sum();
        self.tally.counters.lost += missing;
    }

    /// Goes to the next phase when this one is over, and tells once a second how it goes.
    fn go_on(&mut self, now: u64) -> Result<(), String> {
        match self.phase {
            Phase::Warming if self.opening == 0 => {
                self.phase = Phase::Waiting;
                tell(&json!({"kind": "warm"}))?;
            }
            Phase::Opening if self.queue.is_empty() && self.opening == 0 => {
                self.phase = Phase::Open;
                tell(&json!({"kind": "open"}))?;
            }
            _ => {}
        }
        if now < self.second.due_us {
            return Ok(());
        }
        let counters = &self.tally.counters;
        let open = counters.opened - self.ended_open;
        tell(&json!({
            "kind": "tick",
            "opened": counters.opened,
            "open": open,
            "failed": counters.failed,
            "lost": counters.lost,
            "handshakes": counters.handshakes,
            "deliveries": self.second.deliveries,
            "latency": self.second.latency.to_json(),
        }))?;
        self.second.latency.clear();
        self.second.deliveries = 0;
        self.second.due_us = (self.second.due_us + 1_000_000).max(now + 500_000);
        Ok(())
    }

    // Beginning connections.

    fn may_begin(&self) -> bool {
        let phase = match self.phase {
            Phase::Opening => true,
            Phase::Measuring => self.options.churn,
            _ => false,
        };
        phase && !self.queue.is_empty() && self.opening < OPENING_MAX
    }

    fn begin_more(&mut self, now: u64) {
        let allowed = (now - self.paced_us) as f64 / 1_000_000.0 * self.share.rate;
        let mut room = CONNECTS_PER_TURN;
        while room > 0 && self.may_begin() && (self.begun as f64) < allowed + 1.0 {
            let number = self.queue.pop_front().expect("there is one to begin");
            self.begun += 1;
            room -= 1;
            self.begin(number, self.purpose(number));
        }
    }

    /// Stalled and slow readers lie evenly among the numbers.
    fn purpose(&self, number: u32) -> Purpose {
        let (all, stalled, slow) =
            (u64::from(self.options.connections), u64::from(self.options.stalled), u64::from(self.options.slow));
        let special = stalled + slow;
        let before = |number: u64| number * special / all;
        let place = before(u64::from(number));
        if before(u64::from(number) + 1) == place {
            return Purpose::Reader;
        }
        if (place + 1) * stalled / special > place * stalled / special { Purpose::Stalled } else { Purpose::Slow }
    }

    fn begin(&mut self, number: u32, purpose: Purpose) {
        let target = number as usize % self.targets.len();
        self.tally.counters.started += 1;
        let now = steady_us();
        match self.socket(self.targets[target].address) {
            Ok(socket) => {
                let link = Link::new(socket, number, target as u16, purpose, now);
                self.opening += 1;
                self.place(link, now);
            }
            Err(error) => {
                self.tally.counters.failed += 1;
                self.tally.failures.count(&cause(error));
                if self.options.churn {
                    self.timers.push(Reverse((now + REOPEN_US, Due::Reopen, number, 0)));
                }
            }
        }
    }

    /// A socket that connects.
    fn socket(&self, to: SocketAddr) -> Result<OwnedFd, Errno> {
        let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(family, SocketType::STREAM, flags, None)?;
        sockopt::set_tcp_nodelay(&socket, true)?;
        if self.source_addresses > 1 && to.ip() == IpAddr::V4(Ipv4Addr::LOCALHOST) {
            let turn = self.tally.counters.started + u64::from(self.first_address);
            let [high, low] = ((turn % u64::from(self.source_addresses)) as u16 + 1).to_be_bytes();
            sockopt::set_socket_reuseaddr(&socket, true)?;
            bind(&socket, &SocketAddr::from(([127, 0, high, low], 0)))?;
        }
        match connect(&socket, &to) {
            Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
            Err(error) => Err(error),
        }
    }

    /// Gives a new connection its slot.
    fn place(&mut self, link: Link, now: u64) {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() as u32 - 1
        });
        let slot = &mut self.slots[index as usize];
        let data = EventData::new_u64(u64::from(slot.generation) << 32 | u64::from(index));
        let added = epoll::add(&self.epoll, &link.socket, data, EventFlags::OUT);
        let generation = slot.generation;
        slot.link = Some(Box::new(link));
        let timeout = self.options.timeout.as_micros() as u64;
        self.timers.push(Reverse((now + timeout, Due::Opened, index, generation)));
        if let Err(error) = added
            && let Some(link) = self.slots[index as usize].link.take()
        {
            self.ended(*link, index, &End::Io(error));
        }
    }

    fn watch(&self, link: &Link, index: u32, flags: EventFlags) -> Result<(), End> {
        let generation = self.slots[index as usize].generation;
        let data = EventData::new_u64(u64::from(generation) << 32 | u64::from(index));
        epoll::modify(&self.epoll, &link.socket, data, flags).map_err(End::Io)
    }

    /// What epoll is asked of a connection by its purpose and state.
    fn interest(link: &Link) -> EventFlags {
        let held_back = link.open && link.state == State::Messages;
        let reads = match link.purpose {
            Purpose::Stalled if held_back => EventFlags::RDHUP,
            Purpose::Slow if held_back => EventFlags::empty(),
            _ => EventFlags::IN,
        };
        if link.wants_out { reads | EventFlags::OUT } else { reads }
    }

    /// Writes what is queued and asks epoll about the rest.
    fn flush(&self, link: &mut Link, index: u32) -> Result<(), End> {
        let done = link.flush().map_err(End::Io)?;
        if link.wants_out == done {
            link.wants_out = !done;
            self.watch(link, index, Worker::interest(link))?;
        }
        Ok(())
    }

    // What happens to a connection.

    fn happened(&mut self, index: u32, generation: u32, flags: EventFlags, told_us: u64) {
        let Some(slot) = self.slots.get_mut(index as usize) else { return };
        if slot.generation != generation {
            return;
        }
        let Some(mut link) = slot.link.take() else { return };
        match self.drive(&mut link, index, flags, told_us) {
            Ok(()) => self.slots[index as usize].link = Some(link),
            Err(end) => self.ended(*link, index, &end),
        }
    }

    fn drive(&mut self, link: &mut Link, index: u32, flags: EventFlags, told_us: u64) -> Result<(), End> {
        if link.state == State::Connecting {
            match sockopt::socket_error(&link.socket) {
                Ok(Ok(())) => {}
                Ok(Err(error)) | Err(error) => return Err(End::Io(error)),
            }
            return self.connected(link, index);
        }
        if flags.contains(EventFlags::OUT) {
            self.flush(link, index)?;
        }
        if flags.intersects(EventFlags::IN | EventFlags::HUP | EventFlags::ERR | EventFlags::RDHUP) {
            self.read(link, index, usize::MAX, told_us)?;
        }
        Ok(())
    }

    /// Sends the request.
    fn connected(&mut self, link: &mut Link, index: u32) -> Result<(), End> {
        let target = &self.targets[usize::from(link.target)];
        if target.tls {
            let config = self.tls.clone().expect("there is TLS where a URL wants it");
            let name = ServerName::try_from(target.host.clone()).map_err(|error| End::Tls(error.to_string()))?;
            let tls = ClientConnection::new(config, name).map_err(|error| End::Tls(error.to_string()))?;
            link.tls = Some(Box::new(tls));
        }
        let request = match link.purpose {
            Purpose::Renewal(for_index, generation) => self.renewal_request(link, for_index, generation)?,
            _ => self.request(link),
        };
        link.queue(request.as_bytes());
        link.state = State::Head;
        link.wants_out = false;
        self.watch(link, index, EventFlags::IN)?;
        self.flush(link, index)
    }

    /// A token for connection `number`, and its `exp`; empty without credentials.
    fn credential(&mut self, number: u32, renewal: bool) -> (String, Option<u64>) {
        let Some(minter) = &mut self.minter else {
            return match &self.options.token {
                Some(token) => (token.clone(), exp_of(token)),
                None => (String::new(), None),
            };
        };
        let iat = wall_us() / 1_000_000;
        let life = self.options.expires_in.as_secs();
        let exp = match self.share.exp {
            Some(exp) if !renewal => exp,
            Some(_) => iat + life,
            None if self.options.expires_in >= LONG_LIFE => iat + life + u64::from(number),
            None => iat + life + u64::from(number) % (life / 10 + 1),
        };
        let minted = minter.mint(u64::from(number), iat, exp);
        (minted.token, Some(minted.exp))
    }

    fn request(&mut self, link: &mut Link) -> String {
        let (token, exp) = self.credential(link.number, false);
        link.exp = exp;
        let target = &self.targets[usize::from(link.target)];
        let values = Values { number: u64::from(link.number), token: &token, ..Values::default() };
        let mut path = target.path.fill(values);
        if !token.is_empty() && self.options.carrier == Carrier::Query {
            path.push(if target.has_query { '&' } else { '?' });
            path.push_str("token=");
            path.push_str(&token);
        }
        let mut request = format!("GET {path} HTTP/1.1\r\nHost: {}\r\n", target.authority);
        match target.over {
            Over::WebSocket => {
                request.push_str("Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n");
                request.push_str(&format!("Sec-WebSocket-Key: {}\r\n", self.nonce));
                if self.options.compress {
                    request.push_str(
                        "Sec-WebSocket-Extensions: permessage-deflate; server_no_context_takeover; \
                         client_no_context_takeover\r\n",
                    );
                }
            }
            Over::Sse => request.push_str("Accept: text/event-stream\r\nCache-Control: no-cache\r\n"),
        }
        match self.options.carrier {
            _ if token.is_empty() => {}
            Carrier::Header => request.push_str(&format!("Authorization: Bearer {token}\r\n")),
            Carrier::Subprotocol => request.push_str(&format!("Sec-WebSocket-Protocol: restcast.v1, jwt, {token}\r\n")),
            Carrier::Query => {}
        }
        for header in &self.options.headers {
            request.push_str(header);
            request.push_str("\r\n");
        }
        request.push_str("\r\n");
        request
    }

    /// Reads what has come, at most `limit` bytes, and acts on what is whole.
    fn read(&mut self, link: &mut Link, index: u32, limit: usize, told_us: u64) -> Result<(), End> {
        let mut scratch = std::mem::take(&mut self.scratch);
        let result = self.read_into(&mut scratch, link, index, limit, told_us);
        self.scratch = scratch;
        result
    }

    fn read_into(
        &mut self,
        scratch: &mut Vec<u8>,
        link: &mut Link,
        index: u32,
        limit: usize,
        told_us: u64,
    ) -> Result<(), End> {
        let carried = link.partial.len();
        if scratch.len() < carried + READ_BYTES / 2 {
            scratch.resize(carried + READ_BYTES, 0);
        }
        scratch[..carried].copy_from_slice(&link.partial);
        let mut total = carried;
        let now_us;
        if link.tls.is_some() {
            let room = self.cipher.len().min(limit);
            let received = match recv(&link.socket, &mut self.cipher[..room], RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(End::Eof),
                Ok((received, _)) => received,
                Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
                Err(error) => return Err(End::Io(error)),
            };
            now_us = self.received(link, received, told_us);
            total = self.decrypt(link, received, scratch, carried)?;
            self.flush(link, index)?;
        } else {
            let room = scratch.len().min(carried.saturating_add(limit));
            match recv(&link.socket, &mut scratch[carried..room], RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(End::Eof),
                Ok((received, _)) => {
                    total += received;
                    now_us = self.received(link, received, told_us);
                }
                Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
                Err(error) => return Err(End::Io(error)),
            }
        }
        let left = self.take(link, index, &mut scratch[..total], carried, now_us)?;
        link.partial = if left.is_empty() { Vec::new() } else { scratch[left].to_vec() };
        Ok(())
    }

    /// Notes bytes that were read; returns the moment.
    fn received(&mut self, link: &Link, bytes: usize, told_us: u64) -> u64 {
        let now_us = wall_us();
        if self.phase == Phase::Measuring {
            self.tally.counters.bytes += bytes as u64;
            if link.purpose != Purpose::Slow {
                self.tally.read_lag.record(now_us.saturating_sub(told_us));
            }
        }
        now_us
    }

    /// Decrypts what was received to `plain`, behind `at`; returns where the plain text ends.
    fn decrypt(&mut self, link: &mut Link, received: usize, plain: &mut Vec<u8>, at: usize) -> Result<usize, End> {
        let tls = link.tls.as_mut().expect("it is asked of TLS connections");
        let was_handshaking = tls.is_handshaking();
        let (mut input, mut end) = (&self.cipher[..received], at);
        while !input.is_empty() {
            tls.read_tls(&mut input).map_err(|error| End::Tls(error.to_string()))?;
            let state = tls.process_new_packets().map_err(|error| End::Tls(error.to_string()))?;
            let ready = state.plaintext_bytes_to_read();
            if plain.len() < end + ready {
                plain.resize(end + ready, 0);
            }
            let mut reader = tls.reader();
            io::Read::read_exact(&mut reader, &mut plain[end..end + ready]).map_err(|_| End::Eof)?;
            end += ready;
        }
        if was_handshaking && !tls.is_handshaking() {
            self.tally.counters.tls_handshakes += 1;
            self.tally.counters.tls_resumed += u64::from(tls.handshake_kind() == Some(HandshakeKind::Resumed));
        }
        Ok(end)
    }

    /// Acts on what is whole in `bytes`, of which the first `carried` were there before; returns what is left.
    fn take(
        &mut self,
        link: &mut Link,
        index: u32,
        bytes: &mut [u8],
        carried: usize,
        now_us: u64,
    ) -> Result<std::ops::Range<usize>, End> {
        let (mut start, mut fresh) = (0, carried);
        if link.state == State::Head {
            let Some(head) = link::head(bytes).map_err(|_| End::Protocol("not_http"))? else {
                return Ok(0..bytes.len());
            };
            start = head.length;
            fresh = start;
            self.answered(link, index, &head)?;
        }
        if link.state == State::Closing {
            return Ok(0..0);
        }
        match self.targets[usize::from(link.target)].over {
            Over::WebSocket => self.take_frames(link, index, bytes, start, now_us),
            Over::Sse => {
                let mut end = bytes.len();
                if let Some(chunked) = &mut link.chunked {
                    let stripped = chunked.strip(&mut bytes[fresh..]).map_err(|_| End::Protocol("bad_chunk"))?;
                    end = fresh + stripped;
                }
                let ended = link.chunked == Some(Chunked::Ended);
                while let Some(length) = sse::block(&bytes[start..end]) {
                    let event = sse::event(&bytes[start..start + length]);
                    start += length;
                    if let Some(data) = event.data.bytes() {
                        self.message(link, index, data, false, now_us)?;
                    }
                    if link.state == State::Closing {
                        return Ok(0..0);
                    }
                }
                if ended {
                    return Err(End::Eof);
                }
                if end - start > BLOCK_BYTES_MAX {
                    return Err(End::Protocol("sse_event_too_large"));
                }
                Ok(start..end)
            }
        }
    }

    /// Reads the answer to the request.
    fn answered(&mut self, link: &mut Link, index: u32, head: &link::Head<'_>) -> Result<(), End> {
        if let Purpose::Renewal(for_index, generation) = link.purpose {
            self.renewed(for_index, generation, head.status == 200);
            return Err(End::Done);
        }
        match self.targets[usize::from(link.target)].over {
            Over::WebSocket => {
                if head.status != 101 {
                    return Err(End::Status(head.status));
                }
                if head.field("sec-websocket-accept") != Some(&self.accept) {
                    return Err(End::Protocol("wrong_sec_websocket_accept"));
                }
                let extensions = head.field("sec-websocket-extensions");
                link.deflate = link::deflate_agreed(extensions, self.options.compress)
                    .map_err(|_| End::Protocol("unusable_extension"))?;
            }
            Over::Sse => {
                if head.status != 200 {
                    return Err(End::Status(head.status));
                }
                let kind = head.field("content-type").unwrap_or_default();
                if !kind.starts_with("text/event-stream") {
                    return Err(End::Protocol("not_an_event_stream"));
                }
                let coding = head.field("transfer-encoding").unwrap_or_default();
                link.chunked = coding.eq_ignore_ascii_case("chunked").then(Chunked::default);
            }
        }
        link.state = State::Messages;
        if !self.subscribe.is_empty() {
            // The token in a message is another than the handshake's: each stands for itself.
            let token = self.credential(link.number, false).0;
            let values = Values { number: u64::from(link.number), token: &token, ..Values::default() };
            for text in &self.subscribe {
                link.queue_frame(Opcode::Text, text.fill(values).as_bytes());
            }
            self.flush(link, index)?;
        }
        if self.options.no_welcome {
            self.opened(link, index)?;
        }
        Ok(())
    }

    fn take_frames(
        &mut self,
        link: &mut Link,
        index: u32,
        bytes: &[u8],
        mut start: usize,
        now_us: u64,
    ) -> Result<std::ops::Range<usize>, End> {
        let bad = |error: ws::WsError| End::Protocol(error.name());
        while let Some(frame) = ws::frame(&bytes[start..]).map_err(bad)? {
            start += frame.length;
            if frame.compressed && !link.deflate {
                return Err(bad(ws::WsError::Reserved));
            }
            match frame.opcode {
                Opcode::Text | Opcode::Binary if link.fragments.is_some() => return Err(bad(ws::WsError::Fragment)),
                Opcode::Text | Opcode::Binary if frame.fin => {
                    self.message(link, index, frame.payload, frame.compressed, now_us)?;
                }
                Opcode::Text | Opcode::Binary => {
                    let bytes = frame.payload.to_vec();
                    link.fragments = Some(Box::new(Fragments { bytes, compressed: frame.compressed }));
                }
                Opcode::Continuation => {
                    let mut message = link.fragments.take().ok_or(bad(ws::WsError::Fragment))?;
                    message.push(frame.payload).map_err(bad)?;
                    if frame.fin {
                        self.message(link, index, &message.bytes, message.compressed, now_us)?;
                    } else {
                        link.fragments = Some(message);
                    }
                }
                Opcode::Ping => {
                    link.queue_frame(Opcode::Pong, frame.payload);
                    self.flush(link, index)?;
                }
                Opcode::Pong => {}
                Opcode::Close => {
                    let (code, reason) = ws::close_reason(frame.payload);
                    let mut echo = Vec::new();
                    if code != 1005 {
                        echo.extend_from_slice(&code.to_be_bytes());
                    }
                    link.queue_frame(Opcode::Close, &echo);
                    // The peer may be gone already; what it said counts.
                    let _ = self.flush(link, index);
                    self.closed(link, index, code, reason, now_us)?;
                }
            }
            if link.state == State::Closing {
                return Ok(0..0);
            }
        }
        Ok(start..bytes.len())
    }

    /// Acts on one message.
    fn message(&mut self, link: &mut Link, index: u32, bytes: &[u8], compressed: bool, now_us: u64) -> Result<(), End> {
        let known = self.reader.recall(bytes, compressed);
        let meaning = match known {
            Some(meaning) => meaning,
            None if compressed => {
                let mut inflated = std::mem::take(&mut self.inflated);
                let result = inflate(&mut self.inflater, bytes, &mut inflated)
                    .and_then(|()| self.understand(link, index, bytes, true, &inflated, now_us));
                inflated.clear();
                inflated.shrink_to(1 << 20);
                self.inflated = inflated;
                result?
            }
            None => self.understand(link, index, bytes, false, bytes, now_us)?,
        };
        if !link.open {
            self.opened(link, index)?;
        }
        if let Meaning::Event(event) = meaning {
            self.delivered(link, &event, now_us);
        }
        Ok(())
    }

    /// Reads a message that is not remembered, and acts on it where it is no event.
    fn understand(
        &mut self,
        link: &mut Link,
        index: u32,
        bytes: &[u8],
        compressed: bool,
        text: &[u8],
        now_us: u64,
    ) -> Result<Meaning, End> {
        if std::str::from_utf8(text).is_err() {
            return Err(End::Protocol("not_utf8"));
        }
        let meaning = self.reader.read(bytes, compressed, text);
        let word = |name: &str| member(text, name).map(|value| String::from_utf8_lossy(unquoted(value)).into_owned());
        match meaning {
            Meaning::Welcome if self.options.renew_before.is_some() => {
                link.connection = word("connection").map(String::into_boxed_str);
            }
            Meaning::AuthOk => self.renewal_accepted(link, index),
            Meaning::Error => {
                let code = word("code").unwrap_or_else(|| "without_code".into());
                if link.renewing.is_some() && code.starts_with("AUTH_") {
                    link.renewing = None;
                    self.tally.counters.renewals_refused += 1;
                }
                self.tally.errors.count(&code);
            }
            Meaning::Close => {
                let code = word("code").and_then(|code| code.parse().ok()).unwrap_or(1005);
                let reason = word("reason").unwrap_or_default();
                self.closed(link, index, code, &reason, now_us)?;
            }
            _ => {}
        }
        Ok(meaning)
    }

    /// Judges and times an event.
    fn delivered(&mut self, link: &mut Link, event: &crate::payload::Event, now_us: u64) {
        link.last_event_us = now_us;
        let counters = &mut self.tally.counters;
        let verdict = judge(&mut link.subscriptions, event);
        match verdict {
            Verdict::Conflated(skipped) => counters.conflated += skipped,
            Verdict::Lost(missing) => counters.lost += missing,
            Verdict::Duplicated => counters.duplicated += 1,
            Verdict::Reordered(was_missing) => {
                counters.reordered += 1;
                counters.lost = counters.lost.saturating_sub(u64::from(was_missing));
            }
            Verdict::First | Verdict::Next | Verdict::Unjudged => {}
        }
        if !link.is_reader() {
            counters.slow_deliveries += u64::from(self.phase == Phase::Measuring);
            return;
        }
        self.second.deliveries += 1;
        let measuring = self.phase == Phase::Measuring;
        counters.deliveries += u64::from(measuring);
        // The first event of a stream is the value as it stands: its stamp is older than the subscription.
        if let Some(ts_us) = event.ts_us.filter(|_| verdict != Verdict::First) {
            let latency = now_us.saturating_sub(ts_us);
            self.second.latency.record(latency);
            if measuring {
                self.tally.latency.record(latency);
            }
        }
    }

    /// Notes that a connection is open and does what its purpose wants of it.
    fn opened(&mut self, link: &mut Link, index: u32) -> Result<(), End> {
        let now = steady_us();
        link.open = true;
        self.opening -= 1;
        self.tally.counters.opened += 1;
        self.tally.handshake.record(now - link.begun_us);
        if self.options.churn && link.purpose != Purpose::Kept {
            self.tally.counters.handshakes += u64::from(self.phase == Phase::Measuring);
            return self.leave(link, index, now);
        }
        match link.purpose {
            Purpose::Stalled | Purpose::Slow => {
                self.watch(link, index, Worker::interest(link))?;
                if link.purpose == Purpose::Slow {
                    self.after(now + SLOW_US, Due::Slow, index);
                }
            }
            _ => {}
        }
        self.plan_renewal(link, index);
        Ok(())
    }

    /// Closes a connection that has served its purpose.
    fn leave(&mut self, link: &mut Link, index: u32, now: u64) -> Result<(), End> {
        if self.options.reset {
            sockopt::set_socket_linger(&link.socket, Some(Duration::ZERO)).map_err(End::Io)?;
            return Err(End::Done);
        }
        if self.targets[usize::from(link.target)].over == Over::Sse {
            return Err(End::Done);
        }
        link.queue_frame(Opcode::Close, &1000u16.to_be_bytes());
        link.state = State::Closing;
        self.after(now + CLOSING_US, Due::Closed, index);
        self.flush(link, index)
    }

    fn after(&mut self, at: u64, due: Due, index: u32) {
        let generation = self.slots[index as usize].generation;
        self.timers.push(Reverse((at, due, index, generation)));
    }

    /// Notes the server's close.
    fn closed(&mut self, link: &mut Link, index: u32, code: u16, reason: &str, now_us: u64) -> Result<(), End> {
        let name = if reason.is_empty() { code.to_string() } else { format!("{code} {reason}") };
        if !link.open {
            self.opening -= 1;
            link.told = true;
            self.tally.counters.failed += 1;
            self.tally.failures.count(&format!("close {name}"));
        } else {
            self.tally.closes.count(&name);
        }
        if code == 4001
            && reason == "token_expired"
            && let Some(exp) = link.exp
        {
            let limit_us = (exp * 1_000_000 + self.options.leeway.as_micros() as u64) as i64;
            let late_ms = |at_us: u64| (at_us as i64 - limit_us).div_euclid(1000);
            *self.tally.expiry_late_ms.entry(late_ms(now_us)).or_default() += 1;
            if link.last_event_us > 0 {
                let frame_ms = Some(late_ms(link.last_event_us));
                self.tally.expiry_latest_frame_ms = self.tally.expiry_latest_frame_ms.max(frame_ms);
            }
        }
        link.state = State::Closing;
        self.after(steady_us() + CLOSING_US, Due::Closed, index);
        self.watch(link, index, EventFlags::IN)
    }

    /// A connection is over: its slot is free, and what is to be counted is.
    fn ended(&mut self, link: Link, index: u32, end: &End) {
        let slot = &mut self.slots[index as usize];
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(index);
        let renewal = matches!(link.purpose, Purpose::Renewal(..));
        if renewal {
            if !matches!(end, End::Done) {
                self.tally.counters.renewals_refused += 1;
                self.tally.errors.count(&format!("renewal: {}", end.cause()));
            }
            return;
        }
        let failed = !link.open;
        if failed && !link.told {
            self.opening -= 1;
            self.tally.counters.failed += 1;
            self.tally.failures.count(&end.cause());
        } else if link.open {
            self.ended_open += 1;
            if link.state != State::Closing && !matches!(end, End::Done) {
                self.tally.counters.dropped += 1;
                self.tally.closes.count(&end.cause());
            }
        }
        if self.options.churn && link.purpose != Purpose::Kept {
            if failed {
                self.timers.push(Reverse((steady_us() + REOPEN_US, Due::Reopen, link.number, 0)));
            } else {
                self.queue.push_back(link.number);
            }
        }
    }
}

// What comes due.

impl Worker {
    fn due(&mut self, now: u64) {
        while let Some(&Reverse((at, due, index, generation))) = self.timers.peek() {
            if at > now {
                return;
            }
            self.timers.pop();
            match due {
                Due::Reopen => self.queue.push_back(index),
                Due::Message => self.publish(now),
                _ => self.due_of(due, index, generation, now),
            }
        }
    }

    fn due_of(&mut self, due: Due, index: u32, generation: u32, now: u64) {
        let Some(slot) = self.slots.get_mut(index as usize).filter(|slot| slot.generation == generation) else {
            return;
        };
        let Some(mut link) = slot.link.take() else { return };
        let outcome = match due {
            Due::Opened if !link.open && link.state != State::Closing => Err(End::Timeout),
            Due::Closed => Err(End::Done),
            Due::Renew => self.renew(&mut link, index, now),
            Due::Slow if link.state == State::Messages => self.read_slowly(&mut link, index, now),
            _ => Ok(()),
        };
        match outcome {
            Ok(()) => self.slots[index as usize].link = Some(link),
            Err(end) => self.ended(*link, index, &end),
        }
    }

    fn read_slowly(&mut self, link: &mut Link, index: u32, now: u64) -> Result<(), End> {
        self.after(now + SLOW_US, Due::Slow, index);
        let part = u64::from(self.options.slow_bytes_per_s) * SLOW_US / 1_000_000;
        self.read(link, index, part.max(1) as usize, wall_us())
    }

    /// Sends `--message` on the first connection that is open.
    fn publish(&mut self, now: u64) {
        if self.phase != Phase::Measuring {
            return;
        }
        let every = self.options.message_every.as_micros() as u64;
        self.timers.push(Reverse((now + every, Due::Message, 0, 0)));
        let ready = |slot: &Slot| slot.link.as_ref().is_some_and(|link| link.open && link.state == State::Messages);
        let (Some(message), Some(index)) = (&self.message, self.slots.iter().position(ready)) else { return };
        let Some(mut link) = self.slots[index].link.take() else { return };
        let (numerator, denominator) = self.options.keys.unit;
        let time = wall_us() * denominator / numerator;
        let count = self.tally.counters.published;
        let text = message.fill(Values { number: u64::from(link.number), time, count, ..Values::default() });
        self.tally.counters.published += 1;
        link.queue_frame(Opcode::Text, text.as_bytes());
        match self.flush(&mut link, index as u32) {
            Ok(()) => self.slots[index].link = Some(link),
            Err(end) => self.ended(*link, index as u32, &end),
        }
    }

    // Renewals.

    fn plan_renewal(&mut self, link: &Link, index: u32) {
        let (Some(before), Some(exp)) = (self.options.renew_before, link.exp) else { return };
        let at = (exp * 1_000_000).saturating_sub(before.as_micros() as u64);
        let wait = at.saturating_sub(wall_us());
        self.after(steady_us() + wait, Due::Renew, index);
    }

    /// Presents a new token: in band, or for SSE by a request of its own.
    fn renew(&mut self, link: &mut Link, index: u32, now: u64) -> Result<(), End> {
        if link.state != State::Messages {
            return Ok(());
        }
        let target = usize::from(link.target);
        if self.targets[target].over == Over::WebSocket {
            let (token, exp) = self.credential(link.number, true);
            link.renewing = exp;
            self.tally.counters.renewals_sent += 1;
            let frame = json!({"type": "auth_update", "token": token, "id": self.tally.counters.renewals_sent});
            link.queue_frame(Opcode::Text, frame.to_string().as_bytes());
            return self.flush(link, index);
        }
        self.tally.counters.renewals_sent += 1;
        let generation = self.slots[index as usize].generation;
        match self.socket(self.targets[target].address) {
            Ok(socket) => {
                let mut post = Link::new(socket, link.number, link.target, Purpose::Renewal(index, generation), now);
                post.connection = link.connection.clone();
                self.place(post, now);
            }
            Err(error) => {
                self.tally.counters.renewals_refused += 1;
                self.tally.errors.count(&format!("renewal: {}", cause(error)));
            }
        }
        Ok(())
    }

    /// The request that renews the token of an SSE connection.
    fn renewal_request(&mut self, post: &mut Link, index: u32, generation: u32) -> Result<String, End> {
        let connection = post.connection.take().ok_or(End::Protocol("no_connection_id"))?;
        let (token, exp) = self.credential(post.number, true);
        let renewed = self.slots.get_mut(index as usize).filter(|slot| slot.generation == generation);
        if let Some(link) = renewed.and_then(|slot| slot.link.as_mut()) {
            link.renewing = exp;
        }
        let body = json!({"token": token}).to_string();
        let authority = &self.targets[usize::from(post.target)].authority;
        Ok(format!(
            "POST /v1/connections/{connection}/auth HTTP/1.1\r\nHost: {authority}\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        ))
    }

    /// The answer to a renewal by POST.
    fn renewed(&mut self, index: u32, generation: u32, accepted: bool) {
        if !accepted {
            self.tally.counters.renewals_refused += 1;
        }
        let Some(slot) = self.slots.get_mut(index as usize).filter(|slot| slot.generation == generation) else {
            return;
        };
        let Some(mut link) = slot.link.take() else { return };
        if accepted {
            self.renewal_accepted(&mut link, index);
        } else {
            link.renewing = None;
        }
        self.slots[index as usize].link = Some(link);
    }

    fn renewal_accepted(&mut self, link: &mut Link, index: u32) {
        let Some(exp) = link.renewing.take() else { return };
        link.exp = Some(exp);
        self.tally.counters.renewals_accepted += 1;
        self.plan_renewal(link, index);
    }
}

/// Inflates one message, which carries nothing over from the one before it (RFC 7692 7.2.2).
fn inflate(inflater: &mut Decompress, bytes: &[u8], inflated: &mut Vec<u8>) -> Result<(), End> {
    inflater.reset(false);
    inflated.clear();
    // RFC 7692 7.2.1: the sender took these four off.
    for piece in [bytes, b"\x00\x00\xff\xff"] {
        let mut rest = piece;
        loop {
            if inflated.len() >= INFLATED_BYTES_MAX {
                return Err(End::Protocol("ws_message_too_large"));
            }
            inflated.reserve((rest.len() * 4).clamp(1024, INFLATED_BYTES_MAX - inflated.len() + 1));
            let (read, written) = (inflater.total_in(), inflated.len());
            let bad = |_| End::Protocol("bad_deflate");
            inflater.decompress_vec(rest, inflated, FlushDecompress::Sync).map_err(bad)?;
            let taken = (inflater.total_in() - read) as usize;
            rest = &rest[taken..];
            // Room left over means that nothing more comes of what was given.
            if rest.is_empty() && inflated.len() < inflated.capacity() {
                break;
            }
            if taken == 0 && inflated.len() == written {
                return Err(End::Protocol("bad_deflate"));
            }
        }
    }
    Ok(())
}

/// One line to the parent.
fn tell(line: &Value) -> Result<(), String> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).map_err(|error| error.to_string())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    let digits = text.as_bytes().chunks_exact(2);
    digits.filter_map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use flate2::{Compress, Compression, FlushCompress};

    use super::*;

    fn deflated(text: &[u8]) -> Vec<u8> {
        let mut deflater = Compress::new(Compression::default(), false);
        let mut out = Vec::with_capacity(text.len() + 1024);
        deflater.compress_vec(text, &mut out, FlushCompress::Sync).expect("it deflates");
        assert!(out.ends_with(b"\x00\x00\xff\xff"));
        out.truncate(out.len() - 4);
        out
    }

    #[test]
    fn messages_inflate_each_for_itself() {
        let (mut inflater, mut inflated) = (Decompress::new(false), Vec::new());
        let long: Vec<u8> = (0..300_000u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        for text in [&b"hello hello hello"[..], b"", &long, b"x", &vec![0; 1_000_000]] {
            inflate(&mut inflater, &deflated(text), &mut inflated).unwrap_or_else(|end| panic!("{}", end.cause()));
            assert!(inflated == text, "{} bytes", text.len());
        }
    }

    #[test]
    fn what_does_not_inflate_is_an_error_and_the_next_does() {
        let (mut inflater, mut inflated) = (Decompress::new(false), Vec::new());
        assert!(inflate(&mut inflater, b"\xff\xff\xff", &mut inflated).is_err());
        let bomb = deflated(&vec![0; INFLATED_BYTES_MAX + 10]);
        assert!(inflate(&mut inflater, &bomb, &mut inflated).is_err(), "it grows too long");
        assert!(inflate(&mut inflater, &deflated(b"fine"), &mut inflated).is_ok());
        assert_eq!(inflated, b"fine");
    }

    #[test]
    fn names_travel_as_hexadecimal() {
        assert_eq!(unhex(&hex(b"leads\0e\xff")), b"leads\0e\xff");
    }
}
