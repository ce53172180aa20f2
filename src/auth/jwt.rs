//! JSON Web Tokens: verified and minted. (being built)

use std::time::Duration;

use super::keys::KeySet;

/// The `[auth.jwt]` table.
#[derive(Clone, Debug)]
pub struct Options {
    /// Allowance for clocks that differ.
    pub leeway: Duration,
    /// Accepted `iss` values; none: `iss` is not looked at.
    pub issuers: Vec<String>,
    /// Accepted `aud` values; none: `aud` is not looked at.
    pub audiences: Vec<String>,
    /// Name of the cookie that carries a token.
    pub cookie: String,
    /// Whether connections under a key that a reload removed are closed 4001 `key_removed`.
    pub close_on_key_removal: bool,
    /// Names of the claims that carry rights.
    pub claims: ClaimNames,
    /// The keys.
    pub keys: KeySet,
}

/// `[auth.jwt.claims]`: which claim carries what.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ClaimNames {
    /// A string: the user id.
    pub sub: String,
    /// A string: the one role.
    pub role: String,
    /// An array of strings: the roles.
    pub roles: String,
    /// An array of strings: the permissions.
    pub permissions: String,
    /// An array of ids or globs: the streams.
    pub streams: String,
}

impl Default for ClaimNames {
    fn default() -> ClaimNames {
        ClaimNames {
            sub: "sub".into(),
            role: "role".into(),
            roles: "roles".into(),
            permissions: "permissions".into(),
            streams: "streams".into(),
        }
    }
}

impl Default for Options {
    fn default() -> Options {
        Options {
            leeway: Duration::from_secs(5),
            issuers: Vec::new(),
            audiences: Vec::new(),
            cookie: "restcast_token".into(),
            close_on_key_removal: false,
            claims: ClaimNames::default(),
            keys: KeySet::default(),
        }
    }
}
