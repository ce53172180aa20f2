//! What the integration tests share: an upstream that misbehaves on demand, the built server, a real Redis and a proxy
//! that breaks the way to it, certificates good and bad, folders, and both drivers.

#![allow(dead_code, unreachable_pub, unused_imports, reason = "each test crate uses its own part of this")]
#![allow(
    clippy::disallowed_methods,
    reason = "the servers in here are no part of the core: they have clocks of their own"
)]

mod certificates;
pub mod client;
mod drivers;
mod folder;
mod proxy;
pub mod redis;
pub mod server;
mod tunnels;
mod upstream;

pub use certificates::{Authority, Identity, self_signed};
pub use drivers::on_each_driver;
pub use folder::Folder;
pub use proxy::Proxy;
pub use redis::{Redis, RedisSetup};
pub use tunnels::Tunnels;
pub use upstream::{Coding, Framing, Gate, Reply, RequestSeen, Step, Upstream};
