//! What is said about users, sessions and tokens from outside: logged out, revoked, other permissions.
//!
//! Source: protocol version 1, section 6 («Control»). Memory: what is returned. Errors: the publisher's fault.
//! Not here: where it is heard (`runtime`), what results from it (`marks`, `shard`).

/// One event as it is published and as the control stream keeps it. It is not judged yet.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ControlEntry {
    /// The default name of the channel: `user-logged-out`, `permission-update` or `token-revoked`.
    pub event: String,
    /// The payload.
    pub data: String,
    /// When it was heard or asked for: milliseconds since the Unix epoch.
    pub at_ms: u64,
}
