//! Sessions of an application that keeps them in Redis as express-session and connect-redis do.
//!
//! Source: protocol version 1, section 2 («Session»). Memory: what is returned. Errors: the caller's fault, or the record's.
//! Not here: Redis (`runtime`), when a record is read (`shard`).

use std::time::Duration;

use crate::secret::Secret;

/// `[auth.session]`.
#[derive(Clone, Debug)]
pub struct Options {
    /// Secrets that cookies may be signed with: all verify.
    pub secrets: Vec<Secret>,
    /// Name of the cookie.
    pub cookie: String,
    /// What stands before the session id in the name of its record.
    pub prefix: String,
    /// JSON pointer to the user id.
    pub user: String,
    /// JSON pointer to the role, a string or an array of them.
    pub role: String,
    /// JSON pointer to the company, which templates know as `companyId`.
    pub company: String,
    /// JSON pointer to the permissions, an array of strings.
    pub permissions: String,
    /// How often the record of a live session is read again.
    pub reread: Duration,
    /// How long live sessions outlast a Redis that does not answer.
    pub grace: Duration,
    /// Whether the life of a session is extended while one of its connections is open.
    pub touch: bool,
}
