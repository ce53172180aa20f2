//! restcast polls a JSON REST endpoint once and pushes every change to all who watch it, over WebSocket or SSE.
//!
//! The house (ARCHITECTURE.md has the floor table): subscribers in `connection`, upstreams in `stream`, and `shard` is
//! the only hall where they meet. Nothing outside `runtime` does IO, reads a clock or knows monoio.
#![forbid(unsafe_op_in_unsafe_fn)]
#![deny(unreachable_pub, reason = "`pub` means: seen from outside the crate")]
#![deny(clippy::disallowed_methods, reason = "time and chance are arguments: clippy.toml says where they come from")]
#![deny(clippy::allow_attributes_without_reason, reason = "an exception says why")]

pub mod auth;
pub mod codec;
#[cfg(feature = "runtime")]
pub mod commands;
pub mod config;
pub mod connection;
pub mod frame;
pub mod guard;
pub mod ids;
pub mod limits;
pub mod metrics;
#[cfg(feature = "runtime")]
pub mod runtime;
pub mod secret;
pub mod shard;
pub mod stream;
pub mod time;
pub mod web;
