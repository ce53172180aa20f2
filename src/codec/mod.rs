//! Bytes to values and back: pure functions and small state machines over borrowed bytes. No sockets, no time, no meaning.

#![deny(
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "these bytes are a stranger's: no place is assumed, no number is cut"
)]

pub mod deflate;
pub mod direct;
pub mod forwarded;
pub mod http;
pub mod http_response;
pub mod json;
pub mod jsonpath;
pub mod link_header;
pub mod message;
pub mod pointer;
pub mod proof;
pub mod rate_limit;
pub mod resp;
pub mod sse;
pub mod tunnel;
pub mod ws;
