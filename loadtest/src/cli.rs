//! The command line: flags -> options.
//!
//! Errors: [`UsageError`], told on standard error with exit code 2.

use std::ffi::OsString;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use lexopt::{Arg, Parser, ValueExt};

use crate::payload::Keys;

/// Connections of one process unless `--processes` says otherwise.
pub const CONNECTIONS_PER_PROCESS: u32 = 18_000;

/// The page of `loadtest --help`.
pub const HELP: &str = "\
loadtest: opens many thousands of WebSocket or SSE connections, holds them, and says what reached them and what it cost

Usage: loadtest run URL... [OPTIONS]
       loadtest upstream [OPTIONS]

Commands:
  run         puts load on a server and reports
  upstream    a sample REST upstream whose values change as often as you say

Examples:
  1. What does the demo do with 500 connections?
       restcast demo                                     (prints \"token\" and \"pid\" in its ready line)
       loadtest run ws://127.0.0.1:8080/v1/streams/prices --token TOKEN --connections 500 --pid PID

  2. A server of your own, 19,000 connections, each with a token of its own, the result as JSON and as a picture:
       loadtest upstream --listen 127.0.0.1:7000 --interval 200ms --bytes 128
       loadtest run ws://127.0.0.1:8080/v1/streams/leads --secret-file jwt.key --connections 19000 \\
         --pid PID --json report.json --plot report.svg

  3. How many handshakes a second can it verify, 200 at a time, over TLS?
       loadtest run wss://127.0.0.1:8443/v1/streams/leads --ca ca.pem --secret-file jwt.key --churn --connections 200

`loadtest run --help` and `loadtest upstream --help` tell every option. Exit code 0: all went well; 1: connections failed
or were dropped, or events were lost; 2: the command line is wrong.
";

/// The page of `loadtest run --help`.
pub const HELP_RUN: &str = "\
Opens connections, waits until all are open, measures for --duration, reports. Ctrl-C ends it with the report so far.

Usage: loadtest run URL... [OPTIONS]

  URL    ws:// or wss:// is WebSocket, http:// or https:// is SSE; of several, connection n uses the n-th in turn.
         {n} in it is the connection's number, {n%8} its remainder: ws://h/v1/streams/s{n%1000}

Load:
  --connections N          how many [1000]
  --rate R                 connections begun per second, in all [2000; with --churn: as fast as it goes]
  --duration TIME          how long to measure once all are open [30s]
  --processes P            processes to share them; 0: as many as are needed, up to 18,000 each [0]
  --subscribe TEXT         a message sent on each WebSocket when it is open; may be given several times
                           {n} {n%K} connection number, {token}: '{\"type\":\"subscribe\",\"stream\":\"s{n%8}\",\"id\":1}'
  --compress               offer permessage-deflate
  --churn                  close each connection when it is open and open it again: handshakes per second, N at a time
  --reset                  with --churn: leave by a TCP reset instead of Close and FIN
  --warm-up TIME           before measuring, once all are open: a new connection's first messages are acknowledged at
                           once, which costs the server more than later ones do
  --read-every TIME        while measuring read only so often, all there is: no server is then charged for waking the load
                           tester or for its acknowledgements, which on loopback depends on how it happens to run. For
                           servers compared by their CPU; latencies count up to TIME more
  --idle                   hold the connections only; no events are expected
  --stalled N              of the connections, so many read nothing once they are open
  --slow N                 of the connections, so many read slowly
  --slow-bytes-per-s B     how slowly [1000]
  --timeout TIME           for a connection to open [10s]
  --source-addresses K     to a server on 127.0.0.1 connect from the K addresses 127.0.0.1, 127.0.0.2 …, so that ports
                           suffice [200 with --churn or from 500 connections on, else 1]

Credentials:
  --secret-file F          mint a token for each connection with this key (one newline at its end is no part of it)
  --alg ALG                HS256, HS384 or HS512 [HS256]
  --sub TEXT               the `sub` of each [u{n}]
  --claim NAME=VALUE       a further claim, JSON or else a string, {n} filled in; may be given several times
  --expires-in TIME        life of a token. From an hour on, each lives a second longer than the one before it, so that
                           all differ; a shorter one is lengthened by up to a tenth for the same reason [1h]
  --expire-together        one `exp` for all: --expires-in from the start of the run
  --leeway TIME            what the server grants beyond `exp`; the report counts lateness from there [5s]
  --renew-before TIME      renew each token that long before its `exp`, in band (SSE: by POST)
  --token T                this token for all, instead of minting
  --carrier C              header, query or subprotocol [header]
  --header NAME:VALUE      a further request header; may be given several times

TLS:
  --ca F                   trust the certificates of this PEM file
  --insecure               trust whatever is presented

What is measured:
  --pid PID                a process of the server: its memory, CPU and descriptors; may be given several times
  --ts-key PATH            where an event says when it was sent, dotted: data.ts [ts]
  --ts-unit U              us, ms or ns since the Unix epoch [us]
  --seq-key PATH|none      where its number stands; none: not judged [seq]
  --stream-key PATH|none   where its stream's name stands [stream]
  --epoch-key PATH|none    where its epoch stands [epoch]
  --min-bytes B            shorter messages are no events [0]
  --no-welcome             a connection is open at the handshake's answer: the server sends no first frame
  --message TEXT           the first connection sends this every --message-every, for servers that pass on what they get;
                           {ts} the time in --ts-unit, {i} a counter
  --message-every TIME     [1s]

Output:
  --json FILE|-            the report as JSON; with - the text goes to standard error
  --plot FILE.svg          latency, memory and CPU over time
  --quiet                  no progress and no text
";

/// The page of `loadtest upstream --help`.
pub const HELP_UPSTREAM: &str = "\
A sample REST upstream: GET /N answers a JSON object whose counter and ts change every --interval. Prints one line of JSON
when ready, and its statistics as JSON when it ends (SIGINT, SIGTERM) or for GET /stats.

Usage: loadtest upstream [OPTIONS]

  --listen ADDR            [127.0.0.1:0]
  --streams N              resources: /0 to /N-1; any other path is 404 [1]
  --interval TIME          how often each value changes; 0: never [200ms]
  --on-change HOW          spread: the changes of the N lie evenly in the interval; burst: all at the same instant [spread]
  --burst                  the same as --on-change burst
  --bytes B                length of a body, padded [128]
  --etag                   send ETag and answer If-None-Match with 304
  --poll-interval TIME     what the server polls at; how late each request came is told against it [1s]
  --tls                    speak TLS, with --cert F --key F (PEM), or with a certificate made for the occasion
  --write-ca F             write the certificate to trust to F
";

/// How the token travels.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Carrier {
    /// `Authorization: Bearer`.
    Header,
    /// `?token=`.
    Query,
    /// `Sec-WebSocket-Protocol: restcast.v1, jwt, <token>`.
    Subprotocol,
}

/// What the command line asks for.
pub enum Command {
    /// A page of help.
    Help(&'static str),
    /// `run`.
    Run(Box<RunOptions>),
    /// `upstream`.
    Upstream(UpstreamOptions),
    /// What `run` starts: its part comes over standard input.
    Worker,
}

/// Options of `run`.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "each is named for its flag, which the help explains")]
pub struct RunOptions {
    pub urls: Vec<String>,
    pub connections: u32,
    pub rate: Option<f64>,
    pub duration: Duration,
    pub processes: u32,
    pub subscribe: Vec<String>,
    pub compress: bool,
    pub churn: bool,
    pub reset: bool,
    pub idle: bool,
    /// How long it waits, once all are open, before it measures.
    pub warm_up: Duration,
    /// How long it sleeps after it has read all there is; none: not at all.
    pub read_every: Option<Duration>,
    pub stalled: u32,
    pub slow: u32,
    pub slow_bytes_per_s: u32,
    pub timeout: Duration,
    pub source_addresses: Option<u32>,
    pub secret_file: Option<PathBuf>,
    pub alg: String,
    pub sub: String,
    pub claims: Vec<(String, String)>,
    pub expires_in: Duration,
    pub expire_together: bool,
    pub leeway: Duration,
    pub renew_before: Option<Duration>,
    pub token: Option<String>,
    pub carrier: Carrier,
    pub headers: Vec<String>,
    pub ca: Option<PathBuf>,
    pub insecure: bool,
    pub pids: Vec<u32>,
    pub keys: Keys,
    pub no_welcome: bool,
    pub message: Option<String>,
    pub message_every: Duration,
    pub json: Option<PathBuf>,
    pub plot: Option<PathBuf>,
    pub quiet: bool,
}

/// Options of `upstream`.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "each is named for its flag, which the help explains")]
pub struct UpstreamOptions {
    pub listen: SocketAddr,
    pub streams: u32,
    pub interval: Duration,
    pub burst: bool,
    pub bytes: usize,
    pub etag: bool,
    pub poll_interval: Duration,
    pub tls: bool,
    pub cert: Option<PathBuf>,
    pub key: Option<PathBuf>,
    pub write_ca: Option<PathBuf>,
}

/// Why a command line is not understood.
#[derive(Debug)]
pub struct UsageError(pub String);

impl fmt::Display for UsageError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

impl From<lexopt::Error> for UsageError {
    fn from(error: lexopt::Error) -> UsageError {
        UsageError(error.to_string())
    }
}

fn wrong(text: impl Into<String>) -> UsageError {
    UsageError(text.into())
}

/// Reads a command line, without the program's name.
///
/// # Errors
/// What is not understood or cannot be together.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, UsageError> {
    let mut parser = Parser::from_args(args);
    match parser.next()? {
        None | Some(Arg::Short('h') | Arg::Long("help")) => Ok(Command::Help(HELP)),
        Some(Arg::Value(name)) if name == "run" => run(&mut parser),
        Some(Arg::Value(name)) if name == "upstream" => upstream(&mut parser),
        Some(Arg::Value(name)) if name == "worker" => Ok(Command::Worker),
        Some(arg) => Err(arg.unexpected().into()),
    }
}

fn run(parser: &mut Parser) -> Result<Command, UsageError> {
    let mut options = RunOptions {
        urls: Vec::new(),
        connections: 1000,
        rate: None,
        duration: Duration::from_secs(30),
        processes: 0,
        subscribe: Vec::new(),
        compress: false,
        churn: false,
        reset: false,
        idle: false,
        warm_up: Duration::ZERO,
        read_every: None,
        stalled: 0,
        slow: 0,
        slow_bytes_per_s: 1000,
        timeout: Duration::from_secs(10),
        source_addresses: None,
        secret_file: None,
        alg: "HS256".into(),
        sub: "u{n}".into(),
        claims: Vec::new(),
        expires_in: Duration::from_secs(3600),
        expire_together: false,
        leeway: Duration::from_secs(5),
        renew_before: None,
        token: None,
        carrier: Carrier::Header,
        headers: Vec::new(),
        ca: None,
        insecure: false,
        pids: Vec::new(),
        keys: Keys {
            time: "ts".into(),
            unit: (1, 1),
            seq: Some("seq".into()),
            stream: Some("stream".into()),
            epoch: Some("epoch".into()),
            bytes_min: 0,
        },
        no_welcome: false,
        message: None,
        message_every: Duration::from_secs(1),
        json: None,
        plot: None,
        quiet: false,
    };
    while let Some(arg) = parser.next()? {
        match arg {
            Arg::Short('h') | Arg::Long("help") => return Ok(Command::Help(HELP_RUN)),
            Arg::Value(url) => options.urls.push(url.string()?),
            Arg::Long("connections") => options.connections = parser.value()?.parse()?,
            Arg::Long("rate") => {
                let rate: f64 = parser.value()?.parse()?;
                if !(rate.is_finite() && rate > 0.0) {
                    return Err(wrong("--rate is a number above 0"));
                }
                options.rate = Some(rate);
            }
            Arg::Long("duration") => options.duration = time(parser, "--duration")?,
            Arg::Long("processes") => options.processes = parser.value()?.parse()?,
            Arg::Long("subscribe") => options.subscribe.push(parser.value()?.string()?),
            Arg::Long("compress") => options.compress = true,
            Arg::Long("churn") => options.churn = true,
            Arg::Long("reset") => options.reset = true,
            Arg::Long("idle") => options.idle = true,
            Arg::Long("warm-up") => options.warm_up = time(parser, "--warm-up")?,
            Arg::Long("read-every") => options.read_every = Some(time(parser, "--read-every")?),
            Arg::Long("stalled") => options.stalled = parser.value()?.parse()?,
            Arg::Long("slow") => options.slow = parser.value()?.parse()?,
            Arg::Long("slow-bytes-per-s") => options.slow_bytes_per_s = parser.value()?.parse()?,
            Arg::Long("timeout") => options.timeout = time(parser, "--timeout")?,
            Arg::Long("source-addresses") => {
                let addresses: u32 = parser.value()?.parse()?;
                if !(1..=60_000).contains(&addresses) {
                    return Err(wrong("--source-addresses is 1 to 60000"));
                }
                options.source_addresses = Some(addresses);
            }
            Arg::Long("secret-file") => options.secret_file = Some(parser.value()?.into()),
            Arg::Long("alg") => options.alg = parser.value()?.string()?,
            Arg::Long("sub") => options.sub = parser.value()?.string()?,
            Arg::Long("claim") => {
                let claim = parser.value()?.string()?;
                let (name, value) = claim.split_once('=').ok_or_else(|| wrong("--claim is NAME=VALUE"))?;
                options.claims.push((name.into(), value.into()));
            }
            Arg::Long("expires-in") => options.expires_in = time(parser, "--expires-in")?,
            Arg::Long("expire-together") => options.expire_together = true,
            Arg::Long("leeway") => options.leeway = time(parser, "--leeway")?,
            Arg::Long("renew-before") => options.renew_before = Some(time(parser, "--renew-before")?),
            Arg::Long("token") => options.token = Some(parser.value()?.string()?),
            Arg::Long("carrier") => {
                options.carrier = match &*parser.value()?.string()? {
                    "header" => Carrier::Header,
                    "query" => Carrier::Query,
                    "subprotocol" => Carrier::Subprotocol,
                    other => return Err(wrong(format!("--carrier {other}: it is header, query or subprotocol"))),
                }
            }
            Arg::Long("header") => {
                let header = parser.value()?.string()?;
                if !header.contains(':') || header.contains(['\r', '\n']) {
                    return Err(wrong("--header is NAME:VALUE in one line"));
                }
                options.headers.push(header);
            }
            Arg::Long("ca") => options.ca = Some(parser.value()?.into()),
            Arg::Long("insecure") => options.insecure = true,
            Arg::Long("pid") => options.pids.push(parser.value()?.parse()?),
            Arg::Long("ts-key") => options.keys.time = parser.value()?.string()?,
            Arg::Long("ts-unit") => {
                options.keys.unit = match &*parser.value()?.string()? {
                    "us" => (1, 1),
                    "ms" => (1000, 1),
                    "ns" => (1, 1000),
                    other => return Err(wrong(format!("--ts-unit {other}: it is us, ms or ns"))),
                }
            }
            Arg::Long("seq-key") => options.keys.seq = key(parser)?,
            Arg::Long("stream-key") => options.keys.stream = key(parser)?,
            Arg::Long("epoch-key") => options.keys.epoch = key(parser)?,
            Arg::Long("min-bytes") => options.keys.bytes_min = parser.value()?.parse()?,
            Arg::Long("no-welcome") => options.no_welcome = true,
            Arg::Long("message") => options.message = Some(parser.value()?.string()?),
            Arg::Long("message-every") => options.message_every = time(parser, "--message-every")?,
            Arg::Long("json") => options.json = Some(parser.value()?.into()),
            Arg::Long("plot") => options.plot = Some(parser.value()?.into()),
            Arg::Long("quiet") => options.quiet = true,
            arg => return Err(arg.unexpected().into()),
        }
    }
    check(options)
}

/// What cannot be together is refused before anything is opened.
fn check(options: RunOptions) -> Result<Command, UsageError> {
    if options.urls.is_empty() {
        return Err(wrong("a URL is missing"));
    }
    if options.connections == 0 {
        return Err(wrong("--connections is at least 1"));
    }
    if u64::from(options.stalled) + u64::from(options.slow) > u64::from(options.connections) {
        return Err(wrong("--stalled and --slow are more than --connections"));
    }
    if options.churn && (options.stalled > 0 || options.slow > 0 || options.renew_before.is_some()) {
        return Err(wrong("--churn holds no connection: --stalled, --slow and --renew-before have no meaning with it"));
    }
    if options.secret_file.is_some() && options.token.is_some() {
        return Err(wrong("--secret-file and --token: one of them"));
    }
    if options.renew_before.is_some() && options.secret_file.is_none() {
        return Err(wrong("--renew-before mints tokens: it needs --secret-file"));
    }
    if options.expire_together && options.secret_file.is_none() {
        return Err(wrong("--expire-together mints tokens: it needs --secret-file"));
    }
    if options.renew_before.is_some_and(|before| before >= options.expires_in) {
        return Err(wrong("--renew-before is less than --expires-in"));
    }
    if options.slow > 0 && options.slow_bytes_per_s == 0 {
        return Err(wrong("--slow-bytes-per-s is at least 1; for readers that read nothing there is --stalled"));
    }
    if options.message.is_some() && options.message_every.is_zero() {
        return Err(wrong("--message-every is above 0"));
    }
    let sse = options.urls.iter().any(|url| url.starts_with("http"));
    if sse && options.carrier == Carrier::Subprotocol {
        return Err(wrong("--carrier subprotocol is for WebSocket URLs"));
    }
    if sse && (!options.subscribe.is_empty() || options.message.is_some()) {
        return Err(wrong("--subscribe and --message are for WebSocket URLs"));
    }
    Ok(Command::Run(Box::new(options)))
}

fn upstream(parser: &mut Parser) -> Result<Command, UsageError> {
    let mut options = UpstreamOptions {
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        streams: 1,
        interval: Duration::from_millis(200),
        burst: false,
        bytes: 128,
        etag: false,
        poll_interval: Duration::from_secs(1),
        tls: false,
        cert: None,
        key: None,
        write_ca: None,
    };
    while let Some(arg) = parser.next()? {
        match arg {
            Arg::Short('h') | Arg::Long("help") => return Ok(Command::Help(HELP_UPSTREAM)),
            Arg::Long("listen") => options.listen = parser.value()?.parse()?,
            Arg::Long("streams") => options.streams = parser.value()?.parse()?,
            Arg::Long("interval") => options.interval = time(parser, "--interval")?,
            Arg::Long("burst") => options.burst = true,
            Arg::Long("on-change") => {
                options.burst = match &*parser.value()?.string()? {
                    "burst" => true,
                    "spread" => false,
                    other => return Err(wrong(format!("--on-change {other}: it is burst or spread"))),
                }
            }
            Arg::Long("bytes") => options.bytes = parser.value()?.parse()?,
            Arg::Long("etag") => options.etag = true,
            Arg::Long("poll-interval") => options.poll_interval = time(parser, "--poll-interval")?,
            Arg::Long("tls") => options.tls = true,
            Arg::Long("cert") => options.cert = Some(parser.value()?.into()),
            Arg::Long("key") => options.key = Some(parser.value()?.into()),
            Arg::Long("write-ca") => options.write_ca = Some(parser.value()?.into()),
            arg => return Err(arg.unexpected().into()),
        }
    }
    if options.streams == 0 {
        return Err(wrong("--streams is at least 1"));
    }
    if options.bytes > 64 << 20 {
        return Err(wrong("--bytes is at most 67108864"));
    }
    if options.cert.is_some() != options.key.is_some() {
        return Err(wrong("--cert and --key: both or neither"));
    }
    if !options.tls && (options.cert.is_some() || options.write_ca.is_some()) {
        return Err(wrong("--cert, --key and --write-ca need --tls"));
    }
    if options.cert.is_some() && options.write_ca.is_some() {
        return Err(wrong("--write-ca is for the certificate made for the occasion, without --cert"));
    }
    Ok(Command::Upstream(options))
}

fn key(parser: &mut Parser) -> Result<Option<String>, UsageError> {
    let path = parser.value()?.string()?;
    Ok((path != "none").then_some(path))
}

fn time(parser: &mut Parser, flag: &str) -> Result<Duration, UsageError> {
    let text = parser.value()?.string()?;
    duration(&text).ok_or_else(|| wrong(format!("{flag} {text}: a time is a number and ms, s, m or h: 250ms, 30s")))
}

/// `250ms`, `1.5s`, `10m`, `1h`, `2d`; at most a year.
fn duration(text: &str) -> Option<Duration> {
    let split = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: f64 = number.parse().ok().filter(|number: &f64| number.is_finite() && *number >= 0.0)?;
    let seconds = match unit {
        "ms" => number / 1000.0,
        "s" => number,
        "m" => number * 60.0,
        "h" => number * 3600.0,
        "d" => number * 86_400.0,
        "" if number == 0.0 => 0.0,
        _ => return None,
    };
    (seconds <= 366.0 * 86_400.0).then(|| Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<Command, UsageError> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn a_run_is_read() {
        let Ok(Command::Run(options)) =
            read("run ws://h/a wss://h/b --connections 5 --duration 1.5s --seq-key none --ts-unit ms --pid 1 --pid 2")
        else {
            panic!("it is understood");
        };
        assert_eq!((options.urls.len(), options.connections), (2, 5));
        assert_eq!(options.duration, Duration::from_millis(1500));
        assert_eq!((options.keys.seq.as_deref(), options.keys.unit, &*options.pids), (None, (1000, 1), &[1, 2][..]));
    }

    #[test]
    fn times_are_read() {
        let check = |text, ms: Option<u64>| assert_eq!(duration(text), ms.map(Duration::from_millis), "{text}");
        check("250ms", Some(250));
        check("30s", Some(30_000));
        check("1.5m", Some(90_000));
        check("2h", Some(7_200_000));
        check("0", Some(0));
        for wrong in ["", "5", "s", "-1s", "5 s", "5x", "NaNs", "inf", "9999d"] {
            check(wrong, None);
        }
    }

    #[test]
    fn what_is_wrong_is_refused() {
        for line in [
            "fly",
            "run",
            "run ws://h/ --connections 0",
            "run ws://h/ --connections x",
            "run ws://h/ --rate 0",
            "run ws://h/ --source-addresses 0",
            "run ws://h/ --duration 5",
            "run ws://h/ --connections 5 --slow 3 --stalled 3",
            "run ws://h/ --token t --secret-file f",
            "run ws://h/ --renew-before 1s",
            "run ws://h/ --secret-file f --renew-before 1h",
            "run ws://h/ --expire-together",
            "run ws://h/ --carrier pigeon",
            "run http://h/ --carrier subprotocol",
            "run http://h/ --subscribe x",
            "run ws://h/ --churn --slow 1",
            "run ws://h/ --claim x",
            "run ws://h/ --header x",
            "run ws://h/ --ts-unit s",
            "run ws://h/ --nonsense",
            "upstream --streams 0",
            "upstream --cert f",
            "upstream --tls --cert f",
            "upstream extra",
        ] {
            assert!(read(line).is_err(), "{line}");
        }
    }

    #[test]
    fn every_option_stands_in_the_help() {
        let source = include_str!("cli.rs");
        let flags = source.split("Arg::Long(\"").skip(1).filter_map(|rest| rest.split('"').next());
        for flag in flags.filter(|flag| *flag != "help" && flag.chars().all(|c| c.is_ascii_lowercase() || c == '-')) {
            let flag = format!("--{flag} ");
            let lines = [HELP_RUN, HELP_UPSTREAM].concat().replace(['\n', ','], " ");
            assert!(lines.contains(&flag), "{flag}");
        }
    }
}
