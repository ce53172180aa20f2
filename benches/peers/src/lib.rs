//! What every Rust peer shares: its command line, the message it broadcasts, the check of a token, the ready line.
//!
//! Source: the flags and the message of `README.md` beside this crate, RFC 7519 for the token.
//! Memory: one message. Errors: [`UsageError`], the fault of who typed the command. Not here: sockets.

use std::fmt;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde::Deserialize;

/// Largest message a peer can be asked for.
pub const MESSAGE_BYTES_MAX: usize = 1 << 20;
/// What is queued for the kernel's `listen`; the kernel lowers it to its `somaxconn`.
pub const BACKLOG: i32 = 4096;
/// First message of a connection where tokens are checked, as long as restcast's own: the load tester knows by it that the
/// connection is open.
const WELCOME: &str = r#"{"type":"welcome","connection":"c_0000000000000000","auth":{"type":"jwt","sub":"u0000000","expires_at":1800000000000000},"heartbeat_ms":25000}"#;

/// What the command line says.
#[derive(Clone, Debug)]
pub struct Options {
    /// `--port`: on 127.0.0.1; 0 lets the kernel choose, and the ready line tells.
    pub port: u16,
    /// `--bytes`: the length of the whole message.
    pub message_bytes: usize,
    /// `--interval`, in milliseconds: from one broadcast to the next; none (0) for a server that only holds connections.
    pub interval: Option<Duration>,
    /// The content of `--secret FILE`, without a newline at its end: the HS256 key that a token must be signed with.
    pub secret: Option<Vec<u8>>,
}

/// Why the command line is refused.
#[derive(Debug)]
pub enum UsageError {
    /// A flag that is not known, or a value that is missing or is none.
    Flag(lexopt::Error),
    /// The secret's file.
    Secret(PathBuf, io::Error),
    /// A size that no message can have.
    Bytes(usize),
    /// `--secret` without `--interval 0`: the value that greets would not be the newest.
    Greets,
}

impl fmt::Display for UsageError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(error) => write!(formatter, "{error}"),
            Self::Secret(path, error) => {
                write!(formatter, "the secret file {} cannot be read: {error}", path.display())
            }
            Self::Bytes(bytes) => {
                write!(formatter, "--bytes {bytes} is not between {} and {MESSAGE_BYTES_MAX}", Message::BYTES_MIN)
            }
            Self::Greets => formatter.write_str("--secret greets and does not broadcast: it goes with --interval 0"),
        }
    }
}

impl std::error::Error for UsageError {}

impl From<lexopt::Error> for UsageError {
    fn from(error: lexopt::Error) -> Self {
        Self::Flag(error)
    }
}

impl Options {
    /// Reads the flags of this process.
    ///
    /// # Errors
    /// An unknown flag, a value that is none, or a secret that cannot be read.
    pub fn from_env() -> Result<Self, UsageError> {
        Self::read(lexopt::Parser::from_env())
    }

    fn read(mut flags: lexopt::Parser) -> Result<Self, UsageError> {
        use lexopt::{Arg, ValueExt};
        let mut options = Self { port: 0, message_bytes: 128, interval: Some(Duration::from_secs(1)), secret: None };
        while let Some(flag) = flags.next()? {
            match flag {
                Arg::Long("port") => options.port = flags.value()?.parse()?,
                Arg::Long("bytes") => options.message_bytes = flags.value()?.parse()?,
                Arg::Long("interval") => {
                    let millis: u32 = flags.value()?.parse()?;
                    options.interval = (millis > 0).then(|| Duration::from_millis(millis.into()));
                }
                Arg::Long("secret") => {
                    let path = PathBuf::from(flags.value()?);
                    let mut secret = std::fs::read(&path).map_err(|error| UsageError::Secret(path, error))?;
                    if secret.last() == Some(&b'\n') {
                        secret.pop();
                    }
                    options.secret = Some(secret);
                }
                other => return Err(other.unexpected().into()),
            }
        }
        if !(Message::BYTES_MIN..=MESSAGE_BYTES_MAX).contains(&options.message_bytes) {
            return Err(UsageError::Bytes(options.message_bytes));
        }
        if options.secret.is_some() && options.interval.is_some() {
            return Err(UsageError::Greets);
        }
        Ok(options)
    }

    /// What a connection whose token was checked gets at once, as from restcast: a welcome, and the value as it stands.
    #[must_use]
    pub fn greeting(&self) -> Option<[String; 2]> {
        self.secret.is_some().then(|| [WELCOME.to_owned(), Message::new(self.message_bytes).stamp()])
    }
}

/// The broadcast message: `{"ts":<microseconds since the Unix epoch>,"seq":<n>,"pad":"…"}`, always of the same length.
#[derive(Debug)]
pub struct Message {
    bytes: usize,
    seq: u64,
}

impl Message {
    /// Room for the members, the longest time and the longest number.
    pub const BYTES_MIN: usize = 64;

    /// Messages of `bytes` bytes each; the first has the number 1.
    #[must_use]
    pub fn new(bytes: usize) -> Self {
        Self { bytes: bytes.max(Self::BYTES_MIN), seq: 0 }
    }

    /// The next message, stamped with the time at which its broadcast begins.
    pub fn stamp(&mut self) -> String {
        self.stamped(unix_micros())
    }

    fn stamped(&mut self, ts: u64) -> String {
        self.seq += 1;
        let mut text = String::with_capacity(self.bytes);
        text.push_str(&format!(r#"{{"ts":{ts},"seq":{},"pad":""#, self.seq));
        let pad = self.bytes.saturating_sub(text.len() + 2);
        text.extend(std::iter::repeat_n('x', pad));
        text.push_str("\"}");
        text
    }
}

fn unix_micros() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// When to broadcast: on a fixed grid; a server that is late skips the places it missed instead of bunching them.
#[derive(Clone, Copy, Debug)]
pub struct Ticks {
    interval: Duration,
    due: Instant,
}

impl Ticks {
    /// The first tick is one interval after `now`.
    #[must_use]
    pub fn new(interval: Duration, now: Instant) -> Self {
        Self { interval: interval.max(Duration::from_millis(1)), due: now + interval }
    }

    /// When the next broadcast is due.
    #[must_use]
    pub fn due(&self) -> Instant {
        self.due
    }

    /// Whether a broadcast is due at `now`; if so the next stands later than `now`.
    pub fn take(&mut self, now: Instant) -> bool {
        if now < self.due {
            return false;
        }
        let missed = now.duration_since(self.due).as_nanos() / self.interval.as_nanos();
        let steps = u32::try_from(missed).unwrap_or(u32::MAX).saturating_add(1);
        self.due += self.interval.saturating_mul(steps);
        true
    }
}

/// Checks HS256 tokens with `jsonwebtoken`: signature and `exp`, which must be there.
pub struct Verifier {
    key: DecodingKey,
    rules: Validation,
}

#[derive(Deserialize)]
struct Claims {
    #[serde(rename = "exp")]
    _exp: u64,
}

impl Verifier {
    /// For tokens signed with `secret`.
    #[must_use]
    pub fn new(secret: &[u8]) -> Self {
        let mut rules = Validation::new(Algorithm::HS256);
        rules.leeway = 5;
        rules.validate_aud = false;
        Self { key: DecodingKey::from_secret(secret), rules }
    }

    /// Whether an `Authorization` header carries a token that holds now.
    #[must_use]
    pub fn accepts(&self, authorization: Option<&[u8]>) -> bool {
        authorization
            .and_then(|header| header.strip_prefix(b"Bearer "))
            .is_some_and(|token| jsonwebtoken::decode::<Claims>(token, &self.key, &self.rules).is_ok())
    }
}

/// Prints the line that says where the server listens; `measure.py` waits for it.
///
/// # Errors
/// Standard output is gone: nobody waits.
pub fn ready(listen: SocketAddr) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, r#"{{"ready":true,"listen":"{listen}","pid":{}}}"#, std::process::id())?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(flags: &[&str]) -> Result<Options, UsageError> {
        Options::read(lexopt::Parser::from_args(flags))
    }

    #[test]
    fn a_message_has_the_length_asked_for_whatever_its_number() {
        for bytes in [Message::BYTES_MIN, 128, 1024] {
            let mut message = Message::new(bytes);
            assert_eq!(message.stamp().len(), bytes);
            message.seq = 999_999_999;
            let text = message.stamped(1_800_000_000_000_000);
            assert_eq!(text.len(), bytes);
            assert!(text.starts_with(r#"{"ts":1800000000000000,"seq":1000000000,"pad":""#), "{text}");
        }
    }

    #[test]
    fn a_late_server_skips_the_ticks_it_missed() {
        let start = Instant::now();
        let mut ticks = Ticks::new(Duration::from_millis(10), start);
        assert!(!ticks.take(start + Duration::from_millis(9)));
        assert!(ticks.take(start + Duration::from_millis(35)));
        assert_eq!(ticks.due(), start + Duration::from_millis(40));
    }

    #[test]
    fn flags_are_read_and_sizes_bounded() {
        let idle = options(&["--interval", "0", "--port", "9000"]).expect("flags that are known");
        assert_eq!((idle.interval, idle.port), (None, 9000));
        assert!(matches!(options(&["--bytes", "63"]), Err(UsageError::Bytes(63))));
        assert!(options(&["--bytes", "64"]).is_ok());
        assert!(matches!(options(&["--burst"]), Err(UsageError::Flag(_))));
        assert!(matches!(options(&["--secret", "/nowhere/at/all"]), Err(UsageError::Secret(..))));
    }

    #[test]
    fn where_tokens_are_checked_a_connection_is_greeted_and_nothing_is_broadcast() {
        let path = std::env::temp_dir().join(format!("restcast-peers-secret-{}", std::process::id()));
        std::fs::write(&path, "0123456789abcdef0123456789abcdef\n").expect("a folder for it");
        let secret = path.to_str().expect("ASCII").to_owned();
        let refused = options(&["--secret", &secret, "--interval", "20"]);
        let options = options(&["--secret", &secret, "--interval", "0", "--bytes", "128"]);
        std::fs::remove_file(&path).expect("it is there");
        assert!(matches!(refused, Err(UsageError::Greets)), "{refused:?}");
        let [welcome, value] = options.expect("flags that go together").greeting().expect("a secret");
        assert!(welcome.starts_with(r#"{"type":"welcome","#), "{welcome}");
        assert!(value.len() == 128 && value.starts_with(r#"{"ts":"#), "{value}");
    }

    #[test]
    fn a_token_is_accepted_for_its_signature_and_its_life_alone() {
        let secret = b"0123456789abcdef0123456789abcdef";
        let mint = |key: &[u8], exp: u64| {
            let claims = std::collections::BTreeMap::from([("exp", exp)]);
            let key = jsonwebtoken::EncodingKey::from_secret(key);
            let header = jsonwebtoken::Header::new(Algorithm::HS256);
            format!("Bearer {}", jsonwebtoken::encode(&header, &claims, &key).expect("claims that serialize"))
        };
        let now = unix_micros() / 1_000_000;
        let verifier = Verifier::new(secret);
        assert!(verifier.accepts(Some(mint(secret, now + 60).as_bytes())));
        assert!(!verifier.accepts(Some(mint(secret, now - 60).as_bytes())));
        assert!(!verifier.accepts(Some(mint(b"another key of thirty-two bytes!", now + 60).as_bytes())));
        assert!(!verifier.accepts(None));
    }
}
