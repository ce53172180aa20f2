//! Who a caller is and what they may see: credentials in, a [`grant::Grant`] out.
//!
//! Source: RFC 7515, 7518, 7519, 8725 and protocol version 1, section 2. Not here: which header a credential came in
//! (`connection::handshake`), when a connection ends (`connection`).

#![deny(
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "these bytes are a stranger's: no place is assumed, no number is cut"
)]

pub mod algorithm;
pub mod api_key;
pub mod cache;
pub mod control;
mod der;
pub mod ephemeral;
pub mod ephemeral_record;
pub mod grant;
pub mod hook;
pub mod identity;
pub mod jwks;
pub mod jwt;
pub mod keys;
pub mod marks;
pub mod members;
pub mod public_key;
pub mod refresh;
pub mod renewal;
pub mod sealed;
pub mod session;
pub mod signing;
pub mod ticket;

use std::time::Duration;

/// The `[auth]` table.
#[derive(Clone, Debug)]
pub struct Options {
    /// Whether `?token=` is read; where not, its presence is 401.
    pub query_token: bool,
    /// Longest lead of `reauthenticate` before `exp`.
    pub reauth_before: Duration,
    /// How long a WebSocket may stay open without a credential; `None`: a credential is needed at the handshake.
    pub first_message: Option<Duration>,
    /// How long logouts, revocations and changed permissions are kept in mind.
    pub revocation_keep: Duration,
    /// Verified tokens that each core remembers; 0: none.
    pub token_cache: u32,
    /// The `[auth.jwt]` table.
    pub jwt: jwt::Options,
    /// The `[auth.session]` table; `None`: session cookies are not read.
    pub session: Option<session::Options>,
    /// Whether there is a store outside that processes share, `[redis]`: tickets are kept there too.
    pub store: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            query_token: true,
            reauth_before: Duration::from_secs(60),
            first_message: None,
            revocation_keep: Duration::from_secs(30 * 86_400),
            token_cache: 4096,
            jwt: jwt::Options::default(),
            session: None,
            store: false,
        }
    }
}
