//! One client connection: from its first byte to its last.

pub mod handshake;
pub mod subscriptions;

use std::time::Duration;

use ipnet::IpNet;

/// What connections need of the `[server]` table.
#[derive(Clone, Debug)]
pub struct Options {
    /// Proxies whose word on the client's address, host and scheme is believed.
    pub trusted_proxies: Vec<IpNet>,
    /// How browsers see this server, where a proxy hides it: scheme, host and port, as `Origin` writes them.
    pub public_origin: Option<String>,
    /// Time between heartbeats.
    pub heartbeat: Duration,
    /// Window over which a drain spreads reconnects.
    pub drain: Duration,
    /// Origins allowed besides same-origin, as `Origin` writes them.
    pub allowed_origins: Vec<String>,
    /// Whether `GET /` answers with the playground.
    pub playground: bool,
    /// Whether `GET /echo` exists.
    pub echo: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            trusted_proxies: Vec::new(),
            public_origin: None,
            heartbeat: Duration::from_secs(25),
            drain: Duration::from_secs(10),
            allowed_origins: Vec::new(),
            playground: true,
            echo: false,
        }
    }
}
