//! What the integration tests share: an upstream that misbehaves on demand, certificates good and bad, and both drivers.

// Each test crate uses its own part of this.
#![allow(dead_code, unused_imports)]

mod certificates;
pub mod client;
mod drivers;
mod upstream;

pub use certificates::{Authority, Identity, self_signed};
pub use drivers::on_each_driver;
pub use upstream::{Coding, Framing, Reply, RequestSeen, Step, Upstream};
