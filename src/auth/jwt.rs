//! JSON Web Tokens: bytes and a time in, a verified set of claims or the reason against it out; and minting them.
//!
//! Source: RFC 7515 (compact form), RFC 7518 section 3.2, RFC 7519, RFC 7797 (`b64`, refused), RFC 8725; protocol version
//! 1, section 2.
//! Memory: nothing is kept. Verifying takes the decoded header and payload, each smaller than the token, which is bounded
//! by `limits::TOKEN_BYTES_MAX`, and what [`Verified`] holds.
//! Errors: [`JwtError`], always the fault of who sent the token. Nothing of the token stands in it.
//! Not here: which header a token came in (`connection::handshake`), revocation, when a connection ends (`connection`).
//!
//! The order is part of the contract: length, form, header, key, signature, and only then is the payload read; but where
//! issuers have key sets of their own, the payload's `iss` chooses whose keys are tried. The algorithm is the key's; `jku`,
//! `x5u`, `x5c` and `jwk` are members like any unknown one and never looked at.

use std::borrow::Cow;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use ring::rand::SecureRandom;

use super::grant::{ClaimValue, Globs, Grant, Rights, RightsTable, TokenFacts, TokenMark};
use super::jwks::{IssuerOptions, KeySets};
use super::keys::{Algorithm, Key, KeyId, KeySet, NoKey};
use super::members::{Members, MembersError, Value, elements};
use super::signing::{SigningError, SigningKey};
use crate::limits::{TEMPLATE_VALUE_BYTES_MAX, TOKEN_BYTES_MAX};
use crate::time::WallTime;

/// The `[auth.jwt]` table.
#[derive(Clone, Debug)]
pub struct Options {
    /// Allowance for clocks that differ.
    pub leeway: Duration,
    /// Accepted `iss` values of tokens that `keys` verify; none: `iss` is not looked at.
    pub issuers: Vec<String>,
    /// Accepted `aud` values of such tokens; none: `aud` is not looked at.
    pub audiences: Vec<String>,
    /// Name of the cookie that carries a token.
    pub cookie: String,
    /// Whether connections under a key that a reload removed are closed 4001 `key_removed`.
    pub close_on_key_removal: bool,
    /// Names of the claims that carry rights.
    pub claims: ClaimNames,
    /// The keys that stand in the configuration. They verify no token of `key_sets`' issuers.
    pub keys: KeySet,
    /// The issuers that have key sets of their own.
    pub key_sets: Vec<IssuerOptions>,
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
            key_sets: Vec::new(),
        }
    }
}

/// Latest NumericDate that is one: the last second of the year 9999.
pub const DATE_SECS_MAX: u64 = 253_402_300_799;

/// One of the three parts of a token.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Part {
    /// The first.
    Header,
    /// The second.
    Payload,
    /// The third.
    Signature,
}

impl Part {
    const fn name(self) -> &'static str {
        match self {
            Part::Header => "header",
            Part::Payload => "payload",
            Part::Signature => "signature",
        }
    }
}

/// Why a token is refused.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum JwtError {
    /// Found before anything is decoded.
    #[error("the token has {bytes} bytes, at most {TOKEN_BYTES_MAX} are read")]
    TooLarge {
        /// Its length.
        bytes: usize,
    },
    /// Not three parts with two dots between them.
    #[error("the token does not have three parts")]
    NotCompact,
    /// RFC 7515 section 2: no padding, white space or other alphabet; bits past the last byte are zero.
    #[error("the {} is not canonical base64url", .0.name())]
    Encoding(Part),
    /// The header is not an object that may stand in a token.
    #[error("the header is refused: {0}")]
    Header(MembersError),
    /// No `alg`, or not a string.
    #[error("the header has no alg that is a string")]
    NoAlgorithm,
    /// `alg` is `none`, in whatever case.
    #[error("an unsigned token (alg none) is never accepted")]
    AlgorithmNone,
    /// `alg` is nothing this server verifies.
    #[error("the alg is not supported")]
    UnsupportedAlgorithm,
    /// RFC 7515 section 4.1.11: what `crit` lists must be understood, and no extension is.
    #[error("the header has crit, and no extension is understood")]
    Critical,
    /// RFC 7797 section 7: a JWT has an encoded payload.
    #[error("the header has b64, which a JWT must not use")]
    UnencodedPayload,
    /// `kid` is not a string.
    #[error("the kid is not a string")]
    KeyNameNotText,
    /// No key is called this.
    #[error("no key has the token's kid")]
    UnknownKey,
    /// The key called this is for another algorithm.
    #[error("the key of the token's kid is for another alg")]
    OtherAlgorithm,
    /// There is no `kid`, and no key of this algorithm.
    #[error("the token names no key, and none is for its alg")]
    NoKeyOfAlgorithm,
    /// Not signed by a key that fits, or changed since.
    #[error("the signature is not by the key")]
    BadSignature,
    /// The payload is not an object that may stand in a token.
    #[error("the payload is refused: {0}")]
    Payload(MembersError),
    /// A token without an end is no token here.
    #[error("the token has no exp")]
    NoExpiry,
    /// Not a number, negative, or past the year 9999.
    #[error("the claim {claim} is not a date from 1970 to 9999 in seconds")]
    BadDate {
        /// `exp`, `nbf` or `iat`.
        claim: &'static str,
    },
    /// The claim that carries this is not of its type.
    #[error("the claim for {claim} is not {wanted}")]
    BadClaim {
        /// What the claim is for; its name in the token may be configured to be another.
        claim: &'static str,
        /// What it must be.
        wanted: &'static str,
    },
    /// `iss` is absent or not one of the configured.
    #[error("the token is by another issuer")]
    OtherIssuer,
    /// `aud` is absent or names none of the configured.
    #[error("the token is for another audience")]
    OtherAudience,
    /// `nbf` is still ahead, by more than the leeway.
    #[error("the token is not valid yet")]
    NotYetValid,
    /// `exp` and the leeway have passed.
    #[error("the token has expired")]
    Expired,
}

/// How a refusal is told on the wire.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum WireCode {
    /// A fresh token of the same kind would do.
    TokenExpired,
    /// Anything else.
    InvalidToken,
}

impl WireCode {
    /// Its spelling in `error` frames and problem documents.
    pub const fn as_str(self) -> &'static str {
        match self {
            WireCode::TokenExpired => "TOKEN_EXPIRED",
            WireCode::InvalidToken => "INVALID_TOKEN",
        }
    }
}

impl JwtError {
    /// A word for programs and metrics, one for each kind of refusal: `expired`, `bad_signature` …
    pub const fn reason(self) -> &'static str {
        match self {
            JwtError::TooLarge { .. } => "too_large",
            JwtError::NotCompact => "not_three_parts",
            JwtError::Encoding(_) => "bad_base64url",
            JwtError::Header(MembersError::Repeated) | JwtError::Payload(MembersError::Repeated) => "duplicate_member",
            JwtError::Header(MembersError::TooDeep) | JwtError::Payload(MembersError::TooDeep) => "too_deep",
            JwtError::Header(_) => "bad_header",
            JwtError::Payload(_) => "bad_payload",
            JwtError::NoAlgorithm => "missing_alg",
            JwtError::AlgorithmNone => "alg_none",
            JwtError::UnsupportedAlgorithm => "unsupported_alg",
            JwtError::Critical => "crit_not_understood",
            JwtError::UnencodedPayload => "b64_not_supported",
            JwtError::KeyNameNotText => "bad_kid",
            JwtError::UnknownKey => "unknown_kid",
            JwtError::OtherAlgorithm => "alg_mismatch",
            JwtError::NoKeyOfAlgorithm => "no_key_for_alg",
            JwtError::BadSignature => "bad_signature",
            JwtError::NoExpiry => "missing_exp",
            JwtError::BadDate { .. } => "bad_date",
            JwtError::BadClaim { .. } => "claim_invalid",
            JwtError::OtherIssuer => "wrong_issuer",
            JwtError::OtherAudience => "wrong_audience",
            JwtError::NotYetValid => "not_yet_valid",
            JwtError::Expired => "expired",
        }
    }

    /// Whether a token that differs only in its dates would be accepted.
    pub const fn is_expired(self) -> bool {
        matches!(self, JwtError::Expired)
    }

    /// How it is told on the wire.
    pub const fn wire_code(self) -> WireCode {
        if self.is_expired() { WireCode::TokenExpired } else { WireCode::InvalidToken }
    }
}

/// A payload under a valid signature, not yet read: JSON Web Signature without what makes it a JWT.
#[derive(Clone, Debug)]
pub struct Signed {
    /// The decoded payload, any bytes.
    pub payload: Vec<u8>,
    /// The key that signed it.
    pub key: KeyId,
}

/// A token whose signature, dates, issuer and audience hold.
#[derive(Clone, Debug)]
pub struct Verified {
    sub: Option<Box<str>>,
    issuer: Option<Box<str>>,
    jti: Option<Box<str>>,
    /// Its mark.
    mark: Option<TokenMark>,
    expires: WallTime,
    issued_at: Option<WallTime>,
    roles: Vec<Box<str>>,
    permissions: Vec<Box<str>>,
    streams: Option<Vec<Box<str>>>,
    /// Every top-level claim, sorted by name.
    claims: Vec<(Box<str>, ClaimValue)>,
    key: KeyId,
}

/// RFC 7519 section 4.1.
pub const REGISTERED_CLAIMS: [&str; 7] = ["iss", "sub", "aud", "exp", "nbf", "iat", "jti"];

/// Claims that no template names, of which a grant keeps so many for templates to come.
const CLAIMS_KEPT_MAX: usize = 32;

fn may_fill(value: &ClaimValue) -> bool {
    match value {
        ClaimValue::Text(text) | ClaimValue::Integer(text) => text.len() <= TEMPLATE_VALUE_BYTES_MAX,
        ClaimValue::Other => false,
    }
}

impl Verified {
    /// The user id. An empty one is one.
    pub fn sub(&self) -> Option<&str> {
        self.sub.as_deref()
    }

    /// `iss`.
    pub fn issuer(&self) -> Option<&str> {
        self.issuer.as_deref()
    }

    /// `jti`.
    pub fn jti(&self) -> Option<&str> {
        self.jti.as_deref()
    }

    /// `exp`, without leeway.
    pub fn expires(&self) -> WallTime {
        self.expires
    }

    /// `iat`.
    pub fn issued_at(&self) -> Option<WallTime> {
        self.issued_at
    }

    /// The roles, in the order of the token.
    pub fn roles(&self) -> &[Box<str>] {
        &self.roles
    }

    /// The permissions, in the order of the token.
    pub fn permissions(&self) -> &[Box<str>] {
        &self.permissions
    }

    /// The ids or globs of the streams claim; `None`: there is no such claim.
    pub fn streams(&self) -> Option<&[Box<str>]> {
        self.streams.as_deref()
    }

    /// The top-level claim called `name`, as templates see it.
    pub fn claim(&self, name: &str) -> Option<&ClaimValue> {
        let place = self.claims.binary_search_by(|claim| claim.0.as_ref().cmp(name)).ok()?;
        self.claims.get(place).map(|claim| &claim.1)
    }

    /// The key that verified it.
    pub fn key(&self) -> KeyId {
        self.key
    }

    /// What is kept of it for the life of a connection: of the claims, those in `template_claims` (in any order).
    pub fn into_grant(self, table: &mut RightsTable, template_claims: &[String]) -> Grant {
        // A reload may name claims that no template names now, and live connections are judged by it: what can fill a
        // template is kept. The registered claims, which are another for each token, would have no two grants share rights.
        let mut left = CLAIMS_KEPT_MAX;
        let is_named = |claim: &(Box<str>, ClaimValue)| {
            let named = template_claims.iter().any(|name| **name == *claim.0);
            named
                || !REGISTERED_CLAIMS.contains(&&*claim.0) && may_fill(&claim.1) && {
                    left = left.saturating_sub(1);
                    left > 0
                }
        };
        let rights = Rights {
            issuer: self.issuer,
            roles: self.roles.into_boxed_slice(),
            permissions: self.permissions.into_boxed_slice(),
            streams: self.streams.map(Globs::new),
            claims: self.claims.into_iter().filter(is_named).collect(),
            api_key: None,
            only: None,
        };
        let facts = TokenFacts {
            sub: self.sub,
            expires: self.expires,
            issued_at: self.issued_at,
            token: self.mark,
            key: self.key,
        };
        Grant::of_token(facts, table.intern(rights))
    }
}

/// Verifies tokens by one configuration and the key sets of one moment. Cloning shares the keys.
#[derive(Clone, Debug)]
pub struct Verifier {
    options: Options,
    sets: Arc<KeySets>,
    /// For each of the options' `key_sets` the set in force, empty where none has been fetched.
    in_force: Vec<KeySet>,
    /// The ids of all keys in force, and of those that may be in a set that is awaited, so that a reload asks quickly about every connection.
    ids: Arc<HashSet<KeyId>>,
}

/// By whose rules a token is judged.
#[derive(Clone, Copy)]
struct Trust<'v> {
    keys: &'v KeySet,
    audiences: &'v [String],
    /// Which of the options' `key_sets` these are; `None`: the keys of the configuration itself.
    issuer: Option<(usize, &'v IssuerOptions)>,
}

/// A key that an issuer's set does not have, or not yet.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct LackedKey {
    /// Which of the options' `key_sets` that is.
    pub issuer: usize,
    /// What the token calls it; `None`: the set has none at all of the token's algorithm.
    pub kid: Option<Box<str>>,
}

impl Trust<'_> {
    /// Why no key may verify a token with this header; `None`: some may.
    fn lacks(self, kid: Option<&str>, algorithm: Algorithm) -> Option<NoKey> {
        // RFC 8725 3.1: what an issuer is not to sign with verifies nothing, whatever its set holds.
        if self.issuer.is_some_and(|(_, issuer)| !issuer.algorithms.contains(&algorithm)) {
            return Some(NoKey::OtherAlgorithm);
        }
        self.keys.candidates(kid, algorithm).err()
    }
}

impl Verifier {
    /// A verifier by `options`. Without keys it refuses every token.
    pub fn new(options: Options) -> Verifier {
        Verifier::with_key_sets(options, Arc::default())
    }

    /// The same with the key sets that were fetched.
    pub fn with_key_sets(options: Options, sets: Arc<KeySets>) -> Verifier {
        let fetched = |issuer: &IssuerOptions| sets.of(&issuer.issuer, &issuer.source).cloned();
        let held = |issuer: &IssuerOptions| issuer.keys.clone().or_else(|| fetched(issuer)).unwrap_or_default();
        let in_force = options.key_sets.iter().map(held).collect();
        let mut this = Verifier { options, sets, in_force, ids: Arc::default() };
        this.ids = Arc::new(this.keys().map(|(key, _)| key.id()).chain(this.awaited()).collect());
        this
    }

    /// The same by other options. The set of an issuer that these do not name, or whose set they have from a file, is let go
    /// of: should it be fetched again, what was fetched for it before is not its set.
    pub fn reconfigured(&self, options: Options) -> Verifier {
        let mut sets = Arc::clone(&self.sets);
        Arc::make_mut(&mut sets)
            .retain(|name| options.key_sets.iter().any(|issuer| issuer.issuer == name && issuer.keys.is_none()));
        Verifier::with_key_sets(options, sets)
    }

    /// The ids of keys that an issuer's set had where it was fetched from before: the set is not there yet from where it is
    /// fetched now. They verify nothing, and may turn out to be in that set too.
    fn awaited(&self) -> impl Iterator<Item = KeyId> {
        let moved = self
            .options
            .key_sets
            .iter()
            .filter(|issuer| issuer.keys.is_none() && self.sets.of(&issuer.issuer, &issuer.source).is_none());
        moved.flat_map(|issuer| {
            let keys = self.sets.last_of(&issuer.issuer).into_iter().flat_map(KeySet::iter);
            keys.filter(|key| issuer.algorithms.contains(&key.algorithm())).map(Key::id)
        })
    }

    /// What it goes by.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The key sets that were fetched.
    pub fn key_sets(&self) -> &Arc<KeySets> {
        &self.sets
    }

    /// The keys in force, each with whose it is where an issuer has a set of its own.
    fn keys(&self) -> impl Iterator<Item = (&Key, Option<&str>)> {
        let own = self.options.keys.iter().map(|key| (key, None));
        let of_issuer = |(issuer, keys)| {
            let IssuerOptions { issuer, algorithms, .. }: &IssuerOptions = issuer;
            let keys: &KeySet = keys;
            let usable = keys.iter().filter(|key| algorithms.contains(&key.algorithm()));
            usable.map(|key| (key, Some(issuer.as_str())))
        };
        own.chain(self.options.key_sets.iter().zip(&self.in_force).flat_map(of_issuer))
    }

    /// The key that verified a credential, and whose it is where an issuer has a set of its own; `None`: it is in force no
    /// more.
    pub fn key(&self, id: KeyId) -> Option<(&Key, Option<&str>)> {
        self.keys().find(|(key, _)| key.id() == id)
    }

    /// Whether it has a key that `other` has not.
    pub fn has_keys_beyond(&self, other: &Verifier) -> bool {
        !self.ids.is_subset(&other.ids)
    }

    /// Whether the key that verified a credential is still in force, or may be: its set is being fetched from another place.
    pub fn has_key(&self, id: KeyId) -> bool {
        self.ids.contains(&id)
    }

    /// Verifies a whole token at `now`.
    ///
    /// Errors: the first rule it breaks, in the order of this module's page; the dates are judged last, so that
    /// [`JwtError::Expired`] means that nothing else is wrong.
    pub fn verify(&self, token: &[u8], now: WallTime) -> Result<Verified, JwtError> {
        let (signed, trust) = self.verify_parts(token)?;
        let members = Members::read(&signed.payload).map_err(JwtError::Payload)?;
        let verified = self.check_claims(members, signed.key, trust, now)?;
        let mark = match (&verified.jti, &verified.sub) {
            (Some(jti), _) => Some(TokenMark::of(jti)),
            (None, None) => Some(TokenMark::of_payload(&signed.payload)),
            (None, Some(_)) => None,
        };
        Ok(Verified { mark, ..verified })
    }

    /// Verifies the signature alone, RFC 7515 section 5.2: of the payload nothing but its `iss` is looked at.
    ///
    /// Errors: as [`Verifier::verify`], up to and including the signature.
    pub fn verify_signature(&self, token: &[u8]) -> Result<Signed, JwtError> {
        self.verify_parts(token).map(|(signed, _)| signed)
    }

    fn verify_parts(&self, token: &[u8]) -> Result<(Signed, Trust<'_>), JwtError> {
        let compact = Compact::split(token)?;
        let header = decode(compact.header, Part::Header)?;
        let header = Members::read(&header).map_err(JwtError::Header)?;
        let (algorithm, kid) = check_header(&header)?;
        let trust = self.trust(&compact);
        if let Some(none) = trust.lacks(kid, algorithm) {
            return Err(match none {
                NoKey::UnknownKid => JwtError::UnknownKey,
                NoKey::OtherAlgorithm => JwtError::OtherAlgorithm,
                NoKey::NoneOfAlgorithm => JwtError::NoKeyOfAlgorithm,
            });
        }
        let signature = decode(compact.signature, Part::Signature)?;
        let mut candidates = trust.keys.candidates(kid, algorithm).into_iter().flatten();
        let key = candidates.find(|key| key.verifies(compact.signed, &signature)).ok_or(JwtError::BadSignature)?.id();
        Ok((Signed { payload: decode(compact.payload, Part::Payload)?, key }, trust))
    }

    /// By whose rules a token is judged: those of the issuer that it claims to be of, where that has a key set, else the
    /// configuration's own. A payload that cannot be read names nobody, and is refused in the end whoever signed it.
    fn trust(&self, compact: &Compact<'_>) -> Trust<'_> {
        let own = Trust { keys: &self.options.keys, audiences: &self.options.audiences, issuer: None };
        if self.options.key_sets.is_empty() {
            return own;
        }
        let Ok(payload) = decode(compact.payload, Part::Payload) else { return own };
        let Ok(members) = Members::read(&payload) else { return own };
        let Some(Value::String(claimed)) = members.find("iss") else { return own };
        let mut issuers = self.options.key_sets.iter().zip(&self.in_force).enumerate();
        let trusted = issuers.find(|(_, (issuer, _))| issuer.issuer == **claimed);
        trusted.map_or(own, |(place, (issuer, keys))| Trust {
            keys,
            audiences: &issuer.audiences,
            issuer: Some((place, issuer)),
        })
    }

    /// Whether a token was refused only because its issuer's set, which is fetched, has no key that it could be by: the key.
    pub fn lacks_key_of(&self, token: &[u8]) -> Option<LackedKey> {
        if self.options.key_sets.is_empty() {
            return None;
        }
        let compact = Compact::split(token).ok()?;
        let header = decode(compact.header, Part::Header).ok()?;
        let header = Members::read(&header).ok()?;
        let (algorithm, kid) = check_header(&header).ok()?;
        let trust = self.trust(&compact);
        let (place, issuer) = trust.issuer.filter(|(_, issuer)| issuer.keys.is_none())?;
        let usable = issuer.algorithms.contains(&algorithm);
        let lacks = matches!(trust.lacks(kid, algorithm), Some(NoKey::UnknownKid | NoKey::NoneOfAlgorithm));
        (usable && lacks).then(|| LackedKey { issuer: place, kid: kid.map(Box::from) })
    }

    fn check_claims(
        &self,
        members: Members<'_>,
        key: KeyId,
        trust: Trust<'_>,
        now: WallTime,
    ) -> Result<Verified, JwtError> {
        let names = &self.options.claims;
        let expires = date(&members, "exp")?.ok_or(JwtError::NoExpiry)?;
        let not_before = date(&members, "nbf")?;
        let issued_at = date(&members, "iat")?;
        let issuer = text(&members, "iss", "iss")?;
        let sub = text(&members, &names.sub, "sub")?;
        let jti = text(&members, "jti", "jti")?;
        let roles = self.roles(&members)?;
        let permissions = list(&members, &names.permissions, "permissions")?.unwrap_or_default();
        let streams = list(&members, &names.streams, "streams")?;
        self.check_issuer(issuer.as_deref(), trust)?;
        check_audience(&members, trust.audiences)?;
        // RFC 7519 4.1.5 and 4.1.4, with the leeway both allow.
        if not_before.is_some_and(|not_before| now + self.options.leeway < not_before) {
            return Err(JwtError::NotYetValid);
        }
        if now >= expires + self.options.leeway {
            return Err(JwtError::Expired);
        }
        let claims = members.into_sorted().into_iter().map(|(name, value)| (boxed(name), claim_value(value))).collect();
        Ok(Verified { sub, issuer, jti, mark: None, expires, issued_at, roles, permissions, streams, claims, key })
    }

    /// `role` and `roles` together; one configured name for both may be either.
    fn roles(&self, members: &Members<'_>) -> Result<Vec<Box<str>>, JwtError> {
        let names = &self.options.claims;
        if names.role == names.roles && matches!(members.find(&names.role), Some(Value::Array(_))) {
            return Ok(list(members, &names.roles, "roles")?.unwrap_or_default());
        }
        let mut roles: Vec<Box<str>> = text(members, &names.role, "role")?.into_iter().collect();
        if names.role != names.roles {
            roles.extend(list(members, &names.roles, "roles")?.unwrap_or_default());
        }
        Ok(roles)
    }

    fn check_issuer(&self, issuer: Option<&str>, trust: Trust<'_>) -> Result<(), JwtError> {
        let wanted = &self.options.issuers;
        let is_wanted = |issuer: &str| match trust.issuer {
            Some((_, options)) => options.issuer == issuer,
            None => wanted.is_empty() || wanted.iter().any(|one| one == issuer),
        };
        let may_be_absent = trust.issuer.is_none() && wanted.is_empty();
        if issuer.map_or(may_be_absent, is_wanted) { Ok(()) } else { Err(JwtError::OtherIssuer) }
    }
}

/// RFC 7519 4.1.3: a string, or an array of strings of which one must be meant for us.
fn check_audience(members: &Members<'_>, wanted: &[String]) -> Result<(), JwtError> {
    if wanted.is_empty() {
        return Ok(());
    }
    let is_wanted = |audience: &str| wanted.iter().any(|one| one == audience);
    let found = match members.find("aud") {
        None => false,
        Some(Value::String(audience)) => is_wanted(audience),
        Some(_) => list(members, "aud", "aud")?.unwrap_or_default().iter().any(|one| is_wanted(one)),
    };
    if found { Ok(()) } else { Err(JwtError::OtherAudience) }
}

/// The `kid` of a token, before anything is verified: for choosing what to say about it, never whom to trust.
///
/// Errors: as [`Verifier::verify_signature`], up to and including the header.
pub fn claimed_kid(token: &[u8]) -> Result<Option<String>, JwtError> {
    let header = decode(Compact::split(token)?.header, Part::Header)?;
    let header = Members::read(&header).map_err(JwtError::Header)?;
    Ok(check_header(&header)?.1.map(str::to_owned))
}

/// The decoded header of a token, before anything is verified: for showing it to a person.
///
/// Errors: not three parts, too long, not canonical base64url, or not an object that may stand in a token.
pub fn claimed_header(token: &[u8]) -> Result<String, JwtError> {
    object_text(Compact::split(token)?.header, Part::Header, JwtError::Header)
}

/// The decoded payload of a token, before anything is verified: for showing it to a person.
///
/// Errors: as [`claimed_header`].
pub fn claimed_payload(token: &[u8]) -> Result<String, JwtError> {
    object_text(Compact::split(token)?.payload, Part::Payload, JwtError::Payload)
}

/// A token of `claims_json` (the text of a JSON object, used as it is), signed by the shared `key` and naming it by its
/// `kid`.
pub fn mint(key: &Key, claims_json: &str) -> String {
    sign(key, mint_header(key.algorithm(), key.kid()).as_bytes(), claims_json.as_bytes())
}

/// The same by a key of any algorithm.
///
/// # Errors
/// [`SigningError::NoChance`].
pub fn mint_by(key: &SigningKey, claims_json: &str, chance: &dyn SecureRandom) -> Result<String, SigningError> {
    let header = mint_header(key.algorithm(), key.kid());
    sign_by(header.as_bytes(), claims_json.as_bytes(), |signed| key.sign(signed, chance))
}

fn mint_header(algorithm: Algorithm, kid: Option<&str>) -> String {
    match kid {
        Some(kid) => format!(r#"{{"alg":"{algorithm}","typ":"JWT","kid":{}}}"#, serde_json::Value::from(kid)),
        None => format!(r#"{{"alg":"{algorithm}","typ":"JWT"}}"#),
    }
}

/// RFC 7515 section 5.1: `header` and `payload`, whatever they hold, in compact form and signed by the shared `key`. By a
/// public one nothing can be signed: the signature is empty then.
pub fn sign(key: &Key, header: &[u8], payload: &[u8]) -> String {
    let mut token = signing_input(header, payload);
    let signature = key.sign(token.as_bytes());
    token.push('.');
    if let Some(signature) = signature {
        URL_SAFE_NO_PAD.encode_string(signature, &mut token);
    }
    token
}

/// The same signed by `sign`.
///
/// # Errors
/// Those of `sign`.
pub fn sign_by<E>(header: &[u8], payload: &[u8], sign: impl FnOnce(&[u8]) -> Result<Vec<u8>, E>) -> Result<String, E> {
    let mut token = signing_input(header, payload);
    let signature = sign(token.as_bytes())?;
    token.push('.');
    URL_SAFE_NO_PAD.encode_string(signature, &mut token);
    Ok(token)
}

fn signing_input(header: &[u8], payload: &[u8]) -> String {
    let mut input = URL_SAFE_NO_PAD.encode(header);
    input.push('.');
    URL_SAFE_NO_PAD.encode_string(payload, &mut input);
    input
}

/// A token in its parts, none decoded.
struct Compact<'a> {
    header: &'a [u8],
    payload: &'a [u8],
    signature: &'a [u8],
    /// Header, dot and payload: what the signature is over.
    signed: &'a [u8],
}

impl<'a> Compact<'a> {
    fn split(token: &'a [u8]) -> Result<Compact<'a>, JwtError> {
        if token.len() > TOKEN_BYTES_MAX {
            return Err(JwtError::TooLarge { bytes: token.len() });
        }
        let mut parts = token.split(|&byte| byte == b'.');
        let (Some(header), Some(payload), Some(signature), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(JwtError::NotCompact);
        };
        let signed = token.get(..header.len() + 1 + payload.len()).ok_or(JwtError::NotCompact)?;
        Ok(Compact { header, payload, signature, signed })
    }
}

fn decode(text: &[u8], part: Part) -> Result<Vec<u8>, JwtError> {
    URL_SAFE_NO_PAD.decode(text).map_err(|_| JwtError::Encoding(part))
}

/// The text of an object, checked to be one.
fn object_text(encoded: &[u8], part: Part, refused: fn(MembersError) -> JwtError) -> Result<String, JwtError> {
    let text = decode(encoded, part)?;
    Members::read(&text).map_err(refused)?;
    String::from_utf8(text).map_err(|_| refused(MembersError::NotJson))
}

/// The algorithm and the key that a header names.
fn check_header<'h>(header: &'h Members<'_>) -> Result<(Algorithm, Option<&'h str>), JwtError> {
    let Some(Value::String(alg)) = header.find("alg") else { return Err(JwtError::NoAlgorithm) };
    // RFC 8725 2.1: filters for "none" have been passed by "nOnE".
    if alg.eq_ignore_ascii_case("none") {
        return Err(JwtError::AlgorithmNone);
    }
    if header.find("crit").is_some() {
        return Err(JwtError::Critical);
    }
    if header.find("b64").is_some() {
        return Err(JwtError::UnencodedPayload);
    }
    let kid = match header.find("kid") {
        None => None,
        Some(Value::String(kid)) => Some(kid.as_ref()),
        Some(_) => return Err(JwtError::KeyNameNotText),
    };
    // RFC 7515 4.1.1: names are case-sensitive.
    let algorithm = alg.parse().map_err(|_| JwtError::UnsupportedAlgorithm)?;
    Ok((algorithm, kid))
}

fn boxed(text: Cow<'_, str>) -> Box<str> {
    match text {
        Cow::Borrowed(text) => Box::from(text),
        Cow::Owned(text) => text.into_boxed_str(),
    }
}

/// The date that the claim `name` holds, where it is present.
fn date(members: &Members<'_>, name: &'static str) -> Result<Option<WallTime>, JwtError> {
    match members.find(name) {
        None => Ok(None),
        Some(Value::Number(number)) => numeric_date(number).map(Some).ok_or(JwtError::BadDate { claim: name }),
        Some(_) => Err(JwtError::BadDate { claim: name }),
    }
}

/// RFC 7519 section 2, NumericDate: seconds, integer or not, here from 0 to [`DATE_SECS_MAX`], kept to the microsecond.
pub(super) fn numeric_date(number: &str) -> Option<WallTime> {
    if number.starts_with('-') {
        return None;
    }
    if let Ok(whole) = number.parse::<u64>() {
        return (whole <= DATE_SECS_MAX).then(|| WallTime::from_secs(whole));
    }
    // A fraction or an exponent. A number too large for f64 becomes infinite here, which is no duration.
    let since_epoch = Duration::try_from_secs_f64(number.parse().ok()?).ok()?;
    let in_range = since_epoch <= Duration::from_secs(DATE_SECS_MAX);
    let micros = u64::try_from(since_epoch.as_micros()).ok()?;
    in_range.then(|| WallTime::from_micros(micros))
}

/// The string that the claim `name` holds, where it is present; `claim` is what it is for.
fn text(members: &Members<'_>, name: &str, claim: &'static str) -> Result<Option<Box<str>>, JwtError> {
    match members.find(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(Box::from(text.as_ref()))),
        Some(_) => Err(JwtError::BadClaim { claim, wanted: "a string" }),
    }
}

/// The strings that the claim `name` lists, where it is present; `claim` is what it is for.
fn list(members: &Members<'_>, name: &str, claim: &'static str) -> Result<Option<Vec<Box<str>>>, JwtError> {
    let bad = JwtError::BadClaim { claim, wanted: "an array of strings" };
    let Some(value) = members.find(name) else { return Ok(None) };
    let Value::Array(array) = value else { return Err(bad) };
    let strings = elements(array).map_err(JwtError::Payload)?.into_iter().map(|element| match element {
        Value::String(text) => Ok(boxed(text)),
        _ => Err(bad),
    });
    strings.collect::<Result<Vec<_>, _>>().map(Some)
}

fn claim_value(value: Value<'_>) -> ClaimValue {
    match value {
        Value::String(text) => ClaimValue::Text(boxed(text)),
        Value::Number(number) if !number.contains(['.', 'e', 'E']) => ClaimValue::Integer(Box::from(number)),
        _ => ClaimValue::Other,
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use proptest::prelude::*;

    use super::*;
    use crate::auth::grant::CredentialKind;
    use crate::auth::keys::KeyConfig;
    use crate::secret::Secret;

    const NOW: WallTime = WallTime::from_secs(1_000_000);
    const CLAIMS: &str = r#"{"sub":"ada","exp":1000060}"#;

    fn config(kid: Option<&str>, algorithm: Algorithm, byte: u8) -> KeyConfig {
        KeyConfig { kid: kid.map(str::to_owned), algorithm, secret: Secret::new([byte; 64]) }
    }

    fn key(kid: Option<&str>, algorithm: Algorithm, byte: u8) -> Key {
        Key::new(&config(kid, algorithm, byte)).unwrap()
    }

    /// Signs with the one key of [`verifier`], and names none.
    fn signed(claims: &str) -> String {
        mint(&key(None, Algorithm::Hs256, 1), claims)
    }

    fn verifier() -> Verifier {
        verifier_of(&[config(None, Algorithm::Hs256, 1)])
    }

    fn verifier_of(keys: &[KeyConfig]) -> Verifier {
        Verifier::new(Options { keys: KeySet::new(keys).unwrap(), ..Options::default() })
    }

    fn verify(claims: &str) -> Result<Verified, JwtError> {
        verifier().verify(signed(claims).as_bytes(), NOW)
    }

    /// Why a token with these further claims is refused, or `accept`.
    fn verdict(claims: &str) -> &'static str {
        verify(&format!(r#"{{"exp":1000060,{claims}}}"#)).map_or_else(JwtError::reason, |_| "accept")
    }

    fn with_header(header: &str) -> Result<Verified, JwtError> {
        let key = key(None, Algorithm::Hs256, 1);
        verifier().verify(sign(&key, header.as_bytes(), CLAIMS.as_bytes()).as_bytes(), NOW)
    }

    fn from_b64u(text: &str) -> Secret {
        Secret::new(URL_SAFE_NO_PAD.decode(text).unwrap())
    }

    #[test]
    fn rfc_7515_a_1_verifies() {
        let token = "eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.\
                     eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.\
                     dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk";
        let secret =
            from_b64u("AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow");
        let verifier = verifier_of(&[KeyConfig { kid: None, algorithm: Algorithm::Hs256, secret }]);
        let verified = verifier.verify(token.as_bytes(), WallTime::from_secs(1_300_819_000)).unwrap();
        assert_eq!((verified.issuer(), verified.sub()), (Some("joe"), None));
        assert_eq!(verified.expires(), WallTime::from_secs(1_300_819_380));
        assert_eq!(verified.claim("http://example.com/is_root"), Some(&ClaimValue::Other));
        let late = verifier.verify(token.as_bytes(), WallTime::from_secs(1_400_000_000));
        assert_eq!(late.unwrap_err(), JwtError::Expired);
    }

    #[test]
    fn rfc_7520_4_4_is_signed_but_no_jwt() {
        let token = "eyJhbGciOiJIUzI1NiIsImtpZCI6IjAxOGMwYWU1LTRkOWItNDcxYi1iZmQ2LWVlZjMxNGJjNzAzNyJ9.\
                     SXTigJlzIGEgZGFuZ2Vyb3VzIGJ1c2luZXNzLCBGcm9kbywgZ29pbmcgb3V0IHlvdXIgZG9vci4gWW91IHN0ZXAgb250byB0aGUg\
                     cm9hZCwgYW5kIGlmIHlvdSBkb24ndCBrZWVwIHlvdXIgZmVldCwgdGhlcmXigJlzIG5vIGtub3dpbmcgd2hlcmUgeW91IG1pZ2h0\
                     IGJlIHN3ZXB0IG9mZiB0by4.s0h6KThzkfBBBkLspW1h84VsJZFTsPPqMDA7g1Md7p0";
        let kid = Some("018c0ae5-4d9b-471b-bfd6-eef314bc7037".to_owned());
        assert_eq!(claimed_kid(token.as_bytes()), Ok(kid.clone()));
        let secret = from_b64u("hJtXIZ2uSN5kbQfbtTNWbpdmhkV8FJG-Onbc6mxCcYg");
        let verifier = verifier_of(&[KeyConfig { kid, algorithm: Algorithm::Hs256, secret }]);
        let signed = verifier.verify_signature(token.as_bytes()).unwrap();
        assert!(signed.payload.starts_with("It\u{2019}s a dangerous business, Frodo".as_bytes()));
        let err = verifier.verify(token.as_bytes(), NOW).unwrap_err();
        assert_eq!((err, err.reason()), (JwtError::Payload(MembersError::NotJson), "bad_payload"));
    }

    #[test]
    fn a_minted_token_verifies_under_each_algorithm_and_kid() {
        for algorithm in Algorithm::ALL.into_iter().filter(|algorithm| algorithm.is_symmetric()) {
            for kid in [None, Some("k"), Some(""), Some("quote \" and \\ é")] {
                let verifier = verifier_of(&[config(Some("other"), algorithm, 9), config(kid, algorithm, 1)]);
                let token = mint(&key(kid, algorithm, 1), CLAIMS);
                let verified = verifier.verify(token.as_bytes(), NOW).unwrap();
                assert_eq!(verified.sub(), Some("ada"));
                assert_eq!(verified.key(), key(kid, algorithm, 1).id());
                assert_eq!(claimed_kid(token.as_bytes()), Ok(kid.map(str::to_owned)));
                assert_eq!(claimed_payload(token.as_bytes()).as_deref(), Ok(CLAIMS));
            }
        }
    }

    #[test]
    fn the_key_decides_not_the_token() {
        use Algorithm::{Hs256, Hs512};
        let verifier = verifier_of(&[
            config(Some("a"), Hs256, 1),
            config(Some("b"), Hs256, 2),
            config(Some("c"), Hs512, 3),
            config(None, Hs256, 4),
        ]);
        let verify = |token: String| verifier.verify(token.as_bytes(), NOW).map(|verified| verified.key());
        // Without a kid every key of the alg is tried; with one, that one alone.
        for (byte, kid) in [(1, Some("a")), (2, Some("b")), (4, None)] {
            assert_eq!(verify(mint(&key(None, Hs256, byte), CLAIMS)), Ok(key(kid, Hs256, byte).id()));
        }
        assert_eq!(verify(mint(&key(Some("a"), Hs256, 2), CLAIMS)), Err(JwtError::BadSignature), "kid confusion");
        assert_eq!(verify(mint(&key(Some("a"), Hs256, 4), CLAIMS)), Err(JwtError::BadSignature));
        assert_eq!(verify(mint(&key(Some("z"), Hs256, 1), CLAIMS)), Err(JwtError::UnknownKey));
        assert_eq!(verify(mint(&key(Some(""), Hs256, 4), CLAIMS)), Err(JwtError::UnknownKey), "an empty kid is a kid");
        assert_eq!(verify(mint(&key(Some("a"), Hs512, 1), CLAIMS)), Err(JwtError::OtherAlgorithm), "alg confusion");
        assert_eq!(verify(mint(&key(None, Hs512, 1), CLAIMS)), Err(JwtError::BadSignature), "secret of another alg");
        assert_eq!(verify(mint(&key(None, Algorithm::Hs384, 1), CLAIMS)), Err(JwtError::NoKeyOfAlgorithm));
        let no_keys = Verifier::new(Options::default());
        assert_eq!(no_keys.verify(signed(CLAIMS).as_bytes(), NOW).unwrap_err(), JwtError::NoKeyOfAlgorithm);
    }

    #[test]
    fn a_secret_under_two_kids_and_two_algs_serves_both() {
        let [hs256, hs512] = [Algorithm::Hs256, Algorithm::Hs512];
        let keys = [config(Some("a"), hs256, 1), config(Some("b"), hs256, 1), config(Some("a"), hs512, 1)];
        let verifier = verifier_of(&keys);
        for key in [key(Some("a"), hs256, 1), key(Some("b"), hs256, 1), key(Some("a"), hs512, 1)] {
            assert_eq!(verifier.verify(mint(&key, CLAIMS).as_bytes(), NOW).unwrap().key(), key.id());
        }
    }

    #[test]
    fn alg_none_is_refused_however_it_is_spelled_or_signed() {
        for none in ["none", "None", "NONE", "nOnE", r"\u006eone"] {
            let header = format!(r#"{{"alg":"{none}"}}"#);
            assert_eq!(with_header(&header).unwrap_err(), JwtError::AlgorithmNone, "{none}");
            let head = URL_SAFE_NO_PAD.encode(&header);
            let unsigned = format!("{head}.{}.", URL_SAFE_NO_PAD.encode(CLAIMS));
            assert_eq!(verifier().verify(unsigned.as_bytes(), NOW).unwrap_err(), JwtError::AlgorithmNone);
        }
    }

    #[test]
    fn headers_are_refused_for_their_reason() {
        let verdict = |header: &str| with_header(header).map_or_else(JwtError::reason, |_| "accept");
        for (header, wanted) in [
            (r#"{"alg":"HS256"}"#, "accept"),
            (r#" { "typ" : "at+jwt" , "alg":"HS256" , "x":{"y":[1]} } "#, "accept"),
            (
                r#"{"alg":"HS256","jku":"https://evil.example/k","x5u":"https://evil.example/c","x5c":["MII"]}"#,
                "accept",
            ),
            (r#"{"alg":"HS256","jwk":{"kty":"oct","k":"AQEB"}}"#, "accept"),
            (r#"{"typ":"JWT"}"#, "missing_alg"),
            (r#"{"alg":null}"#, "missing_alg"),
            (r#"{"alg":["HS256"]}"#, "missing_alg"),
            (r#"{"alg":""}"#, "unsupported_alg"),
            (r#"{"alg":"hs256"}"#, "unsupported_alg"),
            (r#"{"alg":"HS256 "}"#, "unsupported_alg"),
            (r#"{"alg":"RS256"}"#, "no_key_for_alg"),
            (r#"{"alg":"EDDSA"}"#, "unsupported_alg"),
            (r#"{"alg":"ES512"}"#, "unsupported_alg"),
            (r#"{"alg":"ES256K"}"#, "unsupported_alg"),
            (r#"{"alg":"dir","enc":"A256GCM"}"#, "unsupported_alg"),
            (r#"{"alg":"HS512"}"#, "no_key_for_alg"),
            (r#"{"alg":"HS256","crit":["exp"],"exp":1}"#, "crit_not_understood"),
            (r#"{"alg":"HS256","crit":["b64"],"b64":false}"#, "crit_not_understood"),
            (r#"{"alg":"HS256","crit":[]}"#, "crit_not_understood"),
            (r#"{"alg":"HS256","crit":null}"#, "crit_not_understood"),
            (r#"{"alg":"HS256","b64":false}"#, "b64_not_supported"),
            (r#"{"alg":"HS256","b64":true}"#, "b64_not_supported"),
            (r#"{"alg":"HS256","kid":7}"#, "bad_kid"),
            (r#"{"alg":"HS256","kid":null}"#, "bad_kid"),
            (r#"{"alg":"HS256","kid":"x"}"#, "unknown_kid"),
            (r#"{"alg":"HS256","alg":"none"}"#, "duplicate_member"),
            (r#"{"alg":"none","\u0061lg":"HS256"}"#, "duplicate_member"),
            (r#"{"alg":"HS256","x":{"a":1,"a":1}}"#, "duplicate_member"),
            (r#"["alg","HS256"]"#, "bad_header"),
            (r#""HS256""#, "bad_header"),
            ("{alg:HS256}", "bad_header"),
            ("", "bad_header"),
        ] {
            assert_eq!(verdict(header), wanted, "{header}");
        }
        let deep = format!(r#"{{"alg":"HS256","x":{}{}}}"#, "[".repeat(128), "]".repeat(128));
        assert_eq!(verdict(&deep), "too_deep");
        assert_eq!(verdict(&deep.replacen("[]", "", 1)), "accept");
    }

    #[test]
    fn a_token_has_three_parts_of_canonical_base64url() {
        let token = signed(CLAIMS);
        let refused = |token: &str| verifier().verify(token.as_bytes(), NOW).unwrap_err();
        for other in ["", ".", "..", "a.b", "Bearer"] {
            let err = refused(other);
            assert!(matches!(err, JwtError::NotCompact | JwtError::Header(_)), "{other} {err}");
        }
        let (head, signature) = token.rsplit_once('.').unwrap();
        assert_eq!(refused(head), JwtError::NotCompact);
        assert_eq!(refused(&format!("{token}.")), JwtError::NotCompact);
        assert_eq!(refused(&format!("{token}.e30.e30")), JwtError::NotCompact);
        assert_eq!(refused(&format!("{head}.")), JwtError::BadSignature);
        let half = signature.get(..20).unwrap();
        assert_eq!(refused(&format!("{head}.{half}")), JwtError::BadSignature, "a truncated MAC is none");
        // 43 digits hold 258 bits: the two behind the last byte must be zero, or four spellings verify.
        let spellings: Vec<char> = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_".chars().collect();
        let stem = signature.get(..42).unwrap();
        let accepted =
            spellings.iter().filter(|last| verifier().verify(format!("{head}.{stem}{last}").as_bytes(), NOW).is_ok());
        assert_eq!(accepted.count(), 1);
        for bad in [
            format!("{token}="),
            format!("{token} "),
            format!("{token}\n"),
            format!("{token}AA"),
            format!("{head}.+/=="),
        ] {
            assert_eq!(refused(&bad), JwtError::Encoding(Part::Signature), "{bad:?}");
        }
        assert_eq!(refused(&format!(" {token}")), JwtError::Encoding(Part::Header));
        assert_eq!(refused(&token.replacen('.', "=.", 1)), JwtError::Encoding(Part::Header));
        // What is signed may still be no base64url, and is then not read.
        let key = key(None, Algorithm::Hs256, 1);
        let odd = format!("{}.e30=", URL_SAFE_NO_PAD.encode(r#"{"alg":"HS256"}"#));
        let odd = format!("{odd}.{}", URL_SAFE_NO_PAD.encode(key.sign(odd.as_bytes()).unwrap()));
        assert_eq!(refused(&odd), JwtError::Encoding(Part::Payload));
        assert_eq!(verifier().verify(b"\xff.\x00.e30", NOW).unwrap_err(), JwtError::Encoding(Part::Header));
    }

    #[test]
    fn a_token_has_at_most_8_kib() {
        // Each 3 more bytes of payload are 4 more of token; the kid's length moves the rest.
        let of_bytes = |wanted: usize| {
            (0..8).find_map(|kid_bytes| {
                let kid = "k".repeat(kid_bytes);
                let key = key(Some(&kid), Algorithm::Hs256, 1);
                let filled = |fill: usize| mint(&key, &format!(r#"{{"exp":1000060,"x":"{}"}}"#, "x".repeat(fill)));
                let fill = (wanted - filled(0).len()) / 4 * 3;
                let token = (fill.saturating_sub(4)..fill + 4).map(filled).find(|token| token.len() == wanted);
                token.map(|token| (token, config(Some(&kid), Algorithm::Hs256, 1)))
            })
        };
        let (at_limit, key) = of_bytes(TOKEN_BYTES_MAX).unwrap();
        assert!(verifier_of(&[key]).verify(at_limit.as_bytes(), NOW).is_ok());
        let (past_it, key) = of_bytes(TOKEN_BYTES_MAX + 1).unwrap();
        let err = verifier_of(&[key]).verify(past_it.as_bytes(), NOW).unwrap_err();
        assert_eq!((err, err.reason()), (JwtError::TooLarge { bytes: 8193 }, "too_large"));
        assert_eq!(claimed_kid(past_it.as_bytes()), Err(err));
    }

    #[test]
    fn it_lives_from_nbf_less_the_leeway_until_exp_and_the_leeway() {
        let token = signed(r#"{"exp":1000060,"nbf":1000010,"iat":1000000}"#);
        let at = |us: u64| verifier().verify(token.as_bytes(), WallTime::from_micros(us)).map(|_| ());
        assert_eq!(at(1_000_005_000_000 - 1), Err(JwtError::NotYetValid));
        assert_eq!(at(1_000_005_000_000), Ok(()));
        assert_eq!(at(1_000_065_000_000 - 1), Ok(()));
        assert_eq!(at(1_000_065_000_000), Err(JwtError::Expired));
        assert_eq!(at(u64::MAX), Err(JwtError::Expired));
        assert_eq!(at(0), Err(JwtError::NotYetValid));
        let exact = Verifier::new(Options { leeway: Duration::ZERO, ..verifier().options().clone() });
        let at = |us: u64| exact.verify(token.as_bytes(), WallTime::from_micros(us)).map(|_| ());
        assert_eq!(at(1_000_010_000_000 - 1), Err(JwtError::NotYetValid));
        assert_eq!(at(1_000_010_000_000), Ok(()));
        assert_eq!(at(1_000_060_000_000 - 1), Ok(()));
        assert_eq!(at(1_000_060_000_000), Err(JwtError::Expired));
    }

    #[test]
    fn a_date_is_a_number_of_seconds_from_1970_to_9999() {
        let us = |number: &str| numeric_date(number).map(WallTime::as_micros);
        assert_eq!(us("0"), Some(0));
        assert_eq!(us("1300819380"), Some(1_300_819_380_000_000));
        assert_eq!(us("1300819380.25"), Some(1_300_819_380_250_000));
        assert_eq!(us("1.3e9"), Some(1_300_000_000_000_000));
        assert_eq!(us("0.5"), Some(500_000));
        assert_eq!(us("253402300799"), Some(253_402_300_799_000_000));
        assert_eq!(us("253402300799.0"), Some(253_402_300_799_000_000));
        for number in [
            "-1",
            "-0",
            "-0.1",
            "253402300800",
            "253402300799.5",
            "1e12",
            "1e400",
            "-1e400",
            "18446744073709551616",
            "1e99999999999999999999",
        ] {
            assert_eq!(us(number), None, "{number}");
        }
        assert!(verify(r#"{"exp":253402300799}"#).is_ok());
        for claim in ["exp", "nbf", "iat"] {
            for value in ["\"1000060\"", "null", "true", "[1]", "{}", "-5", "253402300800", "1e400"] {
                let claims = if claim == "exp" {
                    format!(r#"{{"exp":{value}}}"#)
                } else {
                    format!(r#"{{"exp":1000060,"{claim}":{value}}}"#)
                };
                assert_eq!(verify(&claims).unwrap_err(), JwtError::BadDate { claim }, "{claims}");
            }
        }
        assert_eq!(verify("{}").unwrap_err(), JwtError::NoExpiry);
        assert_eq!(
            verify(r#"{"exp":1000060,"iat":2000000}"#).unwrap().issued_at(),
            Some(WallTime::from_secs(2_000_000))
        );
    }

    #[test]
    fn iss_and_aud_are_held_against_the_configuration() {
        let one_of = |list: &[&str]| list.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
        let options =
            Options { issuers: one_of(&["a", "b"]), audiences: one_of(&["x", "y"]), ..verifier().options().clone() };
        let strict = Verifier::new(options);
        let verdict = |claims: &str| {
            let token = signed(&format!(r#"{{"exp":1000060,{claims}}}"#));
            strict.verify(token.as_bytes(), NOW).map_or_else(JwtError::reason, |_| "accept")
        };
        for (claims, wanted) in [
            (r#""iss":"b","aud":"x""#, "accept"),
            (r#""iss":"a","aud":["z","y"]"#, "accept"),
            (r#""iss":"c","aud":"x""#, "wrong_issuer"),
            (r#""iss":"A","aud":"x""#, "wrong_issuer"),
            (r#""aud":"x""#, "wrong_issuer"),
            (r#""iss":["a"],"aud":"x""#, "claim_invalid"),
            (r#""iss":"a""#, "wrong_audience"),
            (r#""iss":"a","aud":"z""#, "wrong_audience"),
            (r#""iss":"a","aud":"""#, "wrong_audience"),
            (r#""iss":"a","aud":[]"#, "wrong_audience"),
            (r#""iss":"a","aud":["X"]"#, "wrong_audience"),
            (r#""iss":"a","aud":["x",1]"#, "claim_invalid"),
            (r#""iss":"a","aud":{"x":1}"#, "claim_invalid"),
            (r#""iss":"a","aud":null"#, "claim_invalid"),
        ] {
            assert_eq!(verdict(claims), wanted, "{claims}");
        }
        assert_eq!(self::verdict(r#""iss":"whoever","aud":"whatever""#), "accept", "where none is configured");
    }

    #[test]
    fn claims_have_their_types() {
        for (claims, wanted) in [
            (r#""sub":"""#, "accept"),
            (r#""sub":7"#, "claim_invalid"),
            (r#""sub":null"#, "claim_invalid"),
            (r#""jti":7"#, "claim_invalid"),
            (r#""iss":7"#, "claim_invalid"),
            (r#""role":["agent"]"#, "claim_invalid"),
            (r#""roles":"agent""#, "claim_invalid"),
            (r#""roles":["agent",1]"#, "claim_invalid"),
            (r#""permissions":"read""#, "claim_invalid"),
            (r#""permissions":[null]"#, "claim_invalid"),
            (r#""streams":"leads""#, "claim_invalid"),
            (r#""streams":[["leads"]]"#, "claim_invalid"),
            (r#""streams":{}"#, "claim_invalid"),
            (r#""x":{"deep":[{"a":1,"a":2}]}"#, "duplicate_member"),
            (r#""exp":1000060"#, "duplicate_member"),
            (r#""x":"\ud800""#, "bad_payload"),
        ] {
            assert_eq!(verdict(claims), wanted, "{claims}");
        }
        assert_eq!(verify("[]").unwrap_err(), JwtError::Payload(MembersError::NotAnObject));
        let deep = |arrays: usize| format!(r#""x":{}{}"#, "[".repeat(arrays), "]".repeat(arrays));
        assert_eq!([verdict(&deep(127)), verdict(&deep(128))], ["accept", "too_deep"]);
    }

    #[test]
    fn a_verified_token_becomes_a_grant() {
        let claims = r#"{"exp":1000060.5,"iat":999000,"sub":"ada","iss":"idp","jti":"t1","role":"owner",
            "roles":["agent"],"permissions":["read","list"],"streams":["leads","orders:*"],
            "companyId":12345678901234567890123,"region":"e\u0075","ratio":1.0,"big":1e3,"flag":true,"unused":"x"}"#;
        let verified = verify(claims).unwrap();
        let mut table = RightsTable::default();
        let names = ["region", "companyId", "ratio", "big", "flag", "absent"].map(str::to_owned);
        let grant = verified.clone().into_grant(&mut table, &names);
        assert_eq!((grant.kind(), grant.sub(), grant.issuer()), (CredentialKind::Jwt, Some("ada"), Some("idp")));
        assert_eq!(grant.end(Duration::from_secs(5)), Some(WallTime::from_micros(1_000_065_500_000)));
        assert_eq!((grant.issued_at(), grant.token()), (Some(WallTime::from_secs(999_000)), Some(TokenMark::of("t1"))));
        let token_of =
            |claims: &str| verify(claims).expect("it is good").into_grant(&mut RightsTable::default(), &[]).token();
        assert_eq!(token_of(r#"{"exp":1000060,"sub":"ada"}"#), None);
        // Who has neither a name nor a number is told from others by the token.
        let [a, b] = [r#"{"exp":1000060,"n":1}"#, r#"{"exp":1000060,"n":2}"#];
        assert!(token_of(a).is_some() && token_of(a) == token_of(a) && token_of(a) != token_of(b));
        assert_eq!(token_of(r#"{"exp":1000060,"jti":"t1"}"#), Some(TokenMark::of("t1")));
        assert_eq!(grant.key(), Some(verified.key()));
        assert_eq!(verified.roles().iter().map(|role| &**role).collect::<Vec<_>>(), ["owner", "agent"]);
        assert_eq!(verified.permissions().len(), 2);
        assert_eq!(verified.streams().map(<[_]>::len), Some(2));
        assert_eq!(grant.claim("companyId"), Some(&ClaimValue::Integer("12345678901234567890123".into())));
        assert_eq!(grant.claim("region"), Some(&ClaimValue::Text("eu".into())));
        for odd in ["ratio", "big", "flag"] {
            assert_eq!(grant.claim(odd), Some(&ClaimValue::Other), "{odd}");
        }
        assert_eq!(grant.claim("unused"), Some(&ClaimValue::Text("x".into())), "a reload may name it");
        assert_eq!(
            (grant.claim("absent"), grant.claim("jti")),
            (None, None),
            "what is another for each token is not kept"
        );
        assert_eq!(verified.claim("unused"), Some(&ClaimValue::Text("x".into())));
        assert_eq!(grant.may_watch("orders:1", false, &["owner".to_owned()], &["read".to_owned()]), Ok(()));
        assert!(grant.may_watch("users", false, &[], &[]).is_err());
        // Another subject with the same rights shares them.
        let bob = verify(&claims.replace("ada", "bob")).unwrap().into_grant(&mut table, &names);
        assert!(std::rc::Rc::ptr_eq(grant.rights(), bob.rights()));
        assert!(!grant.same_identity(&bob));
    }

    #[test]
    fn claims_may_have_other_names() {
        let claims = ClaimNames {
            sub: "userId".into(),
            role: "groups".into(),
            roles: "groups".into(),
            permissions: "scp".into(),
            streams: "live".into(),
        };
        let renamed = Verifier::new(Options { claims, ..verifier().options().clone() });
        let verify = |claims: &str| renamed.verify(signed(&format!(r#"{{"exp":1000060,{claims}}}"#)).as_bytes(), NOW);
        let roles = |verified: Verified| verified.roles().iter().map(|role| role.to_string()).collect::<Vec<_>>();
        let verified = verify(r#""sub":7,"roles":7,"userId":"ada","groups":["a","b"],"scp":["p"],"live":[]"#).unwrap();
        assert_eq!((verified.sub(), verified.streams()), (Some("ada"), Some(&[][..])));
        assert_eq!(roles(verified), ["a", "b"]);
        assert_eq!(roles(verify(r#""groups":"a""#).unwrap()), ["a"], "one name for both may be either");
        assert!(roles(verify(r#""role":"a""#).unwrap()).is_empty());
        assert_eq!(verify(r#""groups":7"#).unwrap_err(), JwtError::BadClaim { claim: "role", wanted: "a string" });
    }

    #[test]
    fn only_expiry_is_told_apart_on_the_wire() {
        assert_eq!((JwtError::Expired.wire_code().as_str(), JwtError::Expired.is_expired()), ("TOKEN_EXPIRED", true));
        for other in [JwtError::NotYetValid, JwtError::BadSignature, JwtError::NoExpiry] {
            assert_eq!((other.wire_code().as_str(), other.is_expired()), ("INVALID_TOKEN", false));
        }
        // Expired is said only where all else holds: a fresh token of another audience would not do either.
        let options = Options { audiences: vec!["x".into()], ..verifier().options().clone() };
        let err = Verifier::new(options).verify(signed(r#"{"exp":1,"aud":"z"}"#).as_bytes(), NOW).unwrap_err();
        assert_eq!(err, JwtError::OtherAudience);
    }

    #[test]
    fn errors_say_what_was_found_and_what_was_allowed() {
        let told = [
            JwtError::TooLarge { bytes: 9000 },
            JwtError::Encoding(Part::Payload),
            JwtError::Header(MembersError::Repeated),
            JwtError::Payload(MembersError::TooDeep),
            JwtError::BadDate { claim: "nbf" },
            JwtError::BadClaim { claim: "roles", wanted: "an array of strings" },
        ]
        .map(|err| err.to_string())
        .join("\n");
        expect![[r#"
            the token has 9000 bytes, at most 8192 are read
            the payload is not canonical base64url
            the header is refused: it has a member twice
            the payload is refused: it is nested more than 128 deep
            the claim nbf is not a date from 1970 to 9999 in seconds
            the claim for roles is not an array of strings"#]]
        .assert_eq(&told);
    }

    #[test]
    fn no_secret_is_printed() {
        let secret = Secret::new(*b"correct horse battery staple, and then some");
        let verifier = verifier_of(&[KeyConfig { kid: None, algorithm: Algorithm::Hs256, secret }]);
        assert!(!format!("{verifier:?}").contains("horse"));
    }

    proptest! {
        #[test]
        fn any_flipped_bit_is_refused(at in any::<prop::sample::Index>(), bit in 0u8..8) {
            let mut token = signed(CLAIMS).into_bytes();
            *at.get_mut(&mut token) ^= 1 << bit;
            prop_assert!(verifier().verify(&token, NOW).is_err());
        }

        #[test]
        fn what_is_not_signed_is_refused(token in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(verifier().verify(&token, NOW).is_err());
            prop_assert!(verifier().verify_signature(&token).is_err());
        }

        #[test]
        fn any_signed_payload_is_judged_without_panic(payload in prop::collection::vec(any::<u8>(), 0..200)) {
            let token = sign(&key(None, Algorithm::Hs256, 1), br#"{"alg":"HS256"}"#, &payload);
            prop_assert_eq!(verifier().verify_signature(token.as_bytes()).unwrap().payload, payload);
            let _ = verifier().verify(token.as_bytes(), NOW);
        }

        #[test]
        fn what_is_minted_reads_back(sub in ".{0,40}", exp in 1_000_001u64..DATE_SECS_MAX, kid in ".{0,10}") {
            let claims = serde_json::json!({ "sub": sub, "exp": exp }).to_string();
            let verifier = verifier_of(&[config(Some(&kid), Algorithm::Hs384, 1)]);
            let token = mint(&key(Some(&kid), Algorithm::Hs384, 1), &claims);
            let verified = verifier.verify(token.as_bytes(), NOW).unwrap();
            prop_assert_eq!(verified.sub(), Some(&*sub));
            prop_assert_eq!(verified.expires(), WallTime::from_secs(exp));
        }
    }
}
