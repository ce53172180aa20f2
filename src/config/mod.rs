//! The configuration file as written, and as meant.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::secret::Secret;
use crate::{auth, connection, limits, stream};

/// A whole configuration, parsed and checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// What the shell needs of `[server]`.
    pub server: ServerOptions,
    /// What connections need of `[server]`.
    pub connection: connection::Options,
    /// `[admin]`.
    pub admin: AdminOptions,
    /// `[log]`.
    pub log: LogOptions,
    /// `[limits]`.
    pub limits: limits::Limits,
    /// `[auth]`.
    pub auth: auth::Options,
    /// `[[stream]]`, in the order of the file.
    pub streams: Vec<Arc<stream::Options>>,
}

/// What the shell needs of the `[server]` table.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// The public listener.
    pub listen: SocketAddr,
    /// Whether it may listen beyond loopback without TLS.
    pub plaintext: bool,
    /// Threads, one shard each; 0: one per available core.
    pub cores: u16,
    /// Which driver to run on.
    pub driver: Driver,
    /// The state file's path.
    pub state: String,
}

/// `server.driver`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Driver {
    /// io_uring, or epoll where the kernel refuses it.
    Auto,
    /// io_uring or nothing.
    IoUring,
    /// epoll.
    Epoll,
}

/// The `[admin]` table.
#[derive(Clone, Debug)]
pub struct AdminOptions {
    /// The admin listener.
    pub listen: SocketAddr,
    /// The bearer key of `/admin/v1/`; without it those answer 403.
    pub key: Option<Secret>,
    /// Further `Host` names accepted.
    pub names: Vec<String>,
}

/// The `[log]` table.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct LogOptions {
    /// Least important level that is written.
    pub level: LogLevel,
    /// Lines for people, or JSON objects.
    pub format: LogFormat,
}

/// `log.level`.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum LogLevel {
    /// Someone must act.
    Error,
    /// Something went wrong and was recovered.
    Warn,
    /// What an operator wants to know of a healthy server.
    Info,
    /// What a developer wants to know.
    Debug,
    /// Single messages.
    Trace,
}

/// `log.format`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum LogFormat {
    /// One line of text an event.
    Text,
    /// One JSON object an event.
    Json,
}
