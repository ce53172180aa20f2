//! The shell around the core: sockets, TLS, threads and clocks.
pub mod demo;
pub mod fetch;
pub mod resolver;
pub mod sys;
