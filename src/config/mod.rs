//! The configuration: the file as written becomes each part's `Options`, or a list of everything that is wrong with it.
//!
//! Source: protocol version 1, section 7, and `restcast.example.toml`. One list, [`KEYS`], says which keys there are,
//! what their values look like and what their defaults are; the parser, its suggestions, the defaults and the README's
//! table read it.
//! Memory: a file has at most [`FILE_BYTES_MAX`] bytes; the result holds what the parts need of it.
//! Errors: [`ConfigError`], all at once and each with its line. No error, warning or `Debug` output holds a secret.
//! Not here: the environment and the file system, which are asked through [`Sources`].

mod action;
mod api_key;
mod direct;
mod form;
mod jwt;
mod keys;
mod managed;
mod meaning;
mod moment;
mod pace;
mod proof;
mod proxy;
mod redis;
mod session;
mod shape;
mod show;
mod upstream_auth;
mod views;
mod walk;

use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

pub use form::FormError;
pub use jwt::{JwtKey, KeyMaterial, KeySetPlace, KeySetSource};
pub use keys::{ARRAYS, Form, KEYS, KeyDoc, Preset, keys_table, nearest_name};
pub use managed::{Managed, ManagedError, Members, judge, judge_url, masked, members_of, unmasked};
pub use redis::{RedisOptions, RedisServer, RedisUrlError};
pub use upstream_auth::UpstreamAuthError;

use crate::auth::api_key::{ApiKey, HashError};
use crate::auth::jwks::JwksError;
use crate::auth::keys::KeyError;
use crate::auth::public_key::PublicKeyError;
use crate::codec::jsonpath::PathError;
use crate::codec::proof::SignerError;
use crate::guard::{DirectOptions, PatternError, Policy};
use crate::secret::Secret;
use crate::stream::filter::FilterError;
use crate::stream::schema::SchemaError;
use crate::stream::template::TemplateError;
use crate::{auth, connection, limits, stream};

/// Bytes of a configuration file.
pub const FILE_BYTES_MAX: usize = 4 << 20;
/// Bytes of a file of certificates.
pub const CA_FILE_BYTES_MAX: usize = 1 << 20;
/// Bytes of a file of `[[server.tls]]`: a certificate with those that vouch for it, or its key.
pub const TLS_FILE_BYTES_MAX: usize = 64 << 10;
/// Errors that are reported at once; a file with more gets the number of the rest.
pub const ERRORS_MAX: usize = 100;
/// Warnings that are reported at once.
pub const WARNINGS_MAX: usize = 100;

/// A whole configuration, parsed and checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// What the shell needs of `[server]`.
    pub server: ServerOptions,
    /// What connections need of `[server]`.
    pub connection: connection::Options,
    /// `[[server.tls]]`, in the order of the file; without any the listener does not speak TLS.
    pub tls: Vec<TlsFiles>,
    /// `[admin]`.
    pub admin: AdminOptions,
    /// `[log]`.
    pub log: LogOptions,
    /// `[limits]`.
    pub limits: limits::Limits,
    /// `[auth]`.
    pub auth: auth::Options,
    /// `[[auth.jwt.key]]`, in the order of the file, none shorter than RFC 7518 section 3.2 asks.
    pub jwt_keys: Vec<JwtKey>,
    /// `[[auth.api_key]]`, in the order of the file.
    pub api_keys: Vec<Arc<ApiKey>>,
    /// `[redis]`; `None`: there is none.
    pub redis: Option<RedisOptions>,
    /// `[[auth.jwt.jwks]]`, in the order of the file and of `auth.jwt.key_sets`: where each set comes from.
    pub key_sets: Vec<KeySetSource>,
    /// `[direct]`; `None`: there is none, and direct mode is off.
    pub direct: Option<DirectOptions>,
    /// `[[stream]]`, in the order of the file.
    pub streams: Vec<Arc<stream::Options>>,
    /// `[[action]]`, in the order of the file.
    pub actions: Vec<Arc<stream::action::Options>>,
    /// `[[upstream]]`: how often they may be asked.
    pub upstreams: Vec<crate::stream::budget::Upstream>,
    /// `[proxy]`; `None`: upstreams are asked directly.
    pub proxy: Option<Arc<stream::proxy::Proxy>>,
}

impl Config {
    /// Reads a configuration file's text. Relative paths in it are relative to the working directory.
    ///
    /// All errors come at once, in the order of their lines, at most [`ERRORS_MAX`] of them; what is odd but works is a
    /// warning.
    pub fn parse(text: &str, sources: &dyn Sources) -> Result<(Config, Vec<Warning>), Vec<ConfigError>> {
        if text.len() > FILE_BYTES_MAX {
            return Err(vec![ConfigError { line: 1, problem: Problem::FileTooLarge { limit: FILE_BYTES_MAX } }]);
        }
        let mut errors = Vec::new();
        let meant = walk::walk(text, sources, &mut errors).map(|root| meaning::config(&root, sources, &mut errors));
        match meant {
            Some((config, mut warnings)) if errors.is_empty() => {
                warnings.sort_by_key(|warning| warning.line);
                warnings.truncate(WARNINGS_MAX);
                Ok((config, warnings))
            }
            _ => {
                errors.sort_by_key(|error| error.line);
                let further = errors.len().saturating_sub(ERRORS_MAX);
                errors.truncate(ERRORS_MAX);
                if further > 0 {
                    let line = errors.last().map_or(1, |error| error.line);
                    errors.push(ConfigError { line, problem: Problem::Further { count: further } });
                }
                Err(errors)
            }
        }
    }

    /// The configuration in force as TOML: every default filled in; secrets, passwords and query values in URLs, header
    /// values and bodies as `***`.
    pub fn masked_toml(&self) -> String {
        show::masked_toml(self)
    }
}

/// Reads a duration as the configuration writes it, `"250ms"`, `"5s"`, `"10m"`, `"1h"`, `"30d"`; flags read theirs so too.
pub fn parse_duration(text: &str) -> Result<std::time::Duration, FormError> {
    form::duration(text)
}

/// Reads the secret that stands at `source` again.
///
/// # Errors
/// [`FormError`]: it cannot be had. One that is written in the configuration cannot be read again.
pub fn read_secret(source: &stream::live::Source, sources: &dyn Sources) -> Result<Secret, FormError> {
    use stream::live::Source;
    match source {
        Source::Written => Err(FormError::Empty),
        Source::Variable(name) => form::secret(&format!("env:{name}"), sources),
        Source::File(path) => form::secret(&format!("file:{path}"), sources),
    }
}

/// The world outside the file: where `env:` and `file:` are looked up.
pub trait Sources {
    /// Value of the environment variable `name`; `None` where it is not set.
    fn env(&self, name: &str) -> Option<Vec<u8>>;

    /// Contents of the file at `path`, of at most `bytes_max` bytes.
    fn file(&self, path: &str, bytes_max: usize) -> Result<Vec<u8>, FileError>;

    /// How many cores `server.cores = 0` means; `None`: nobody here knows.
    fn cores(&self) -> Option<NonZeroU16> {
        None
    }

    /// Whether a server can present the certificate of the PEM text `cert` with the key of the PEM text `key`. Who has no
    /// TLS at hand takes them as they are.
    fn identity(&self, cert: &[u8], key: &[u8]) -> Result<(), IdentityError> {
        let _ = (cert, key);
        Ok(())
    }

    /// Whether `text` is a program that filters. Reading one may take much stack (`limits::FILTER_STACK_BYTES`): who has no
    /// thread for that takes it as it is.
    fn filter(&self, text: &str) -> Result<(), FilterError> {
        let _ = text;
        Ok(())
    }
}

/// Why a certificate and a key cannot be presented together.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum IdentityError {
    /// No certificate in the file.
    #[error("holds no PEM certificate: name the file that begins with -----BEGIN CERTIFICATE-----")]
    NoCertificate,
    /// A certificate that cannot be read, or none of version 3.
    #[error("holds a certificate that cannot be used: it must be X.509 version 3")]
    BadCertificate,
    /// No key in the file that could be read.
    #[error("holds no private key in the clear: name the file that begins with -----BEGIN PRIVATE KEY-----")]
    NoKey,
    /// A key of a kind that is not known, or broken.
    #[error("holds a key that cannot be used: it must be RSA of at least 2048 bits, ECDSA P-256 or P-384, or Ed25519")]
    BadKey,
    /// The key of another certificate.
    #[error("holds the key of another certificate: name the one that the certificate was requested with")]
    Mismatch,
}

impl IdentityError {
    /// Whether it is the certificate's file that is at fault, not the key's.
    pub const fn is_of_certificate(self) -> bool {
        matches!(self, IdentityError::NoCertificate | IdentityError::BadCertificate)
    }
}

/// Why a file that the configuration names cannot be had.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum FileError {
    /// There is none.
    #[error("does not exist")]
    Missing,
    /// It may not be read.
    #[error("may not be read by this user")]
    Denied,
    /// It is over the bound.
    #[error("is over {limit} bytes")]
    TooLarge {
        /// Bytes that are allowed.
        limit: usize,
    },
    /// Anything else, such as a directory.
    #[error("cannot be read")]
    Unreadable,
}

/// Something wrong with a configuration file: the operator's fault.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ConfigError {
    /// Line of the file, 1 is the first.
    pub line: u32,
    /// What is wrong there.
    pub problem: Problem,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.problem)
    }
}

impl std::error::Error for ConfigError {}

/// What is wrong with a configuration file, and what to do about it.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Problem {
    /// The file is over its bound.
    #[error("the file is over {limit} bytes")]
    FileTooLarge {
        /// Bytes that are allowed.
        limit: usize,
    },
    /// Not TOML.
    #[error("not TOML: {0}")]
    Syntax(String),
    /// A key that is not known.
    #[error("unknown key `{key}`; the nearest known one is `{nearest}`")]
    UnknownKey {
        /// Its path.
        key: String,
        /// Path of the known key or table that is spelled most alike.
        nearest: String,
    },
    /// A value of another TOML type.
    #[error("`{key}` has the type {found}: write {wanted}")]
    WrongType {
        /// Its path.
        key: String,
        /// What to write.
        wanted: String,
        /// What is written.
        found: &'static str,
    },
    /// `[stream]` where it may stand several times.
    #[error("`{path}` may stand several times: write [[{path}]]")]
    SingleTable {
        /// Its path.
        path: &'static str,
    },
    /// A key that must be there is not.
    #[error("`{key}` is missing here")]
    Missing {
        /// Its path.
        key: &'static str,
    },
    /// A value that is not of its key's form.
    #[error("`{key}`: {error}")]
    Form {
        /// Its path.
        key: String,
        /// What is wrong.
        error: FormError,
    },
    /// A verification key that cannot be one.
    #[error("`auth.jwt.key`: {0}")]
    Key(KeyError),
    /// A filter that is no program.
    #[error("`stream.filter`: {0}")]
    Filter(FilterError),
    /// A key that cannot sign events.
    #[error("`{key}` {error}")]
    Signer {
        /// Its path.
        key: &'static str,
        /// What is wrong.
        error: SignerError,
    },
    /// A template that is none.
    #[error("`{key}`: {error}")]
    Template {
        /// Its path.
        key: &'static str,
        /// What is wrong.
        error: TemplateError,
    },
    /// `server.listen` beyond loopback in the clear.
    #[error(
        "`server.listen` {listen} is reachable from other machines without TLS: add [[server.tls]] with `cert` and `key`, listen on 127.0.0.1, or set `server.plaintext = true` if a proxy in front ends TLS"
    )]
    PlaintextNeeded {
        /// The address.
        listen: SocketAddr,
    },
    /// More `[[server.tls]]` than there may be.
    #[error("[[server.tls]] stands there more than {limit} times: put more names into each certificate")]
    TooManyCertificates {
        /// How many there may be.
        limit: usize,
    },
    /// A certificate or key that cannot be presented.
    #[error("`{key}`: the file {path} {error}")]
    Identity {
        /// Its path.
        key: &'static str,
        /// The file's.
        path: String,
        /// What is wrong.
        error: IdentityError,
    },
    /// `server.echo` beyond loopback.
    #[error("`server.echo` needs no credential and is refused beyond loopback: set it to false or listen on 127.0.0.1")]
    EchoExposed,
    /// Both listeners on one address.
    #[error("`admin.listen` is the same address as `server.listen`: give it another port")]
    SameListener,
    /// An admin key that no request can carry.
    #[error("`admin.key` cannot be sent as a bearer token: use letters, digits and `-._~+/`, `=` at the end only")]
    AdminKey,
    /// A secret that can be guessed by what is made under it.
    #[error("`direct.secret` has {bytes} bytes: at least 32 are needed, random ones")]
    DirectSecret {
        /// What it has.
        bytes: usize,
    },
    /// A cookie name that is none.
    #[error("`auth.jwt.cookie` is not a cookie name: use letters, digits, `-` and `_`")]
    CookieName,
    /// `[auth.session]` without a secret.
    #[error(
        "`auth.session.secrets` is missing: the cookies of a session are signed, and nothing verifies them without it"
    )]
    SessionSecrets,
    /// `[auth.session]` without `[redis]`.
    #[error("[auth.session] needs [redis], where the sessions are")]
    SessionWithoutRedis,
    /// A session cookie's name that is none, or the token's.
    #[error("`auth.session.cookie` must be a cookie name, and another than `auth.jwt.cookie`")]
    SessionCookie,
    /// Where something stands in a record that is no pointer.
    #[error("`{key}` is no JSON pointer into the record (RFC 6901): write it as in \"/userId\"")]
    SessionPointer {
        /// Its path.
        key: &'static str,
    },
    /// An entry of `admin.names` that is none.
    #[error("`admin.names` has an entry that is no host name: write it as in \"restcast.internal\", without a port")]
    HostName,
    /// A key shorter than the hash's output.
    #[error("`auth.jwt.key.secret` has {bytes} bytes, and {alg} needs at least {bytes_min} (RFC 7518 section 3.2)")]
    WeakKey {
        /// The algorithm.
        alg: String,
        /// What it has.
        bytes: usize,
        /// What it needs.
        bytes_min: usize,
    },
    /// A shared secret for an algorithm that has none.
    #[error("{alg} verifies with a public key: write `auth.jwt.key.public_key` in the place of `secret`")]
    SecretWithPublicAlg {
        /// The algorithm.
        alg: String,
    },
    /// A public key for an algorithm that shares a secret.
    #[error(
        "{alg} verifies with a shared secret: a public key there would let everyone sign (RFC 8725 section 2.1); write another `alg`"
    )]
    PublicKeyWithSecretAlg {
        /// The algorithm.
        alg: String,
    },
    /// A public key that cannot be used.
    #[error("`auth.jwt.key.public_key` is {0}")]
    PublicKey(PublicKeyError),
    /// Two sets for one issuer.
    #[error("the key set of line {first_line} is of the same `issuer`: keep one")]
    DuplicateIssuer {
        /// Where the first stands.
        first_line: u32,
    },
    /// More `[[auth.jwt.jwks]]` than there may be.
    #[error("[[auth.jwt.jwks]] stands there more than {limit} times")]
    TooManyIssuers {
        /// How many there may be.
        limit: usize,
    },
    /// Neither `url` nor `file`, or both.
    #[error("[[auth.jwt.jwks]] needs one of `url` and `file`, not {found}")]
    KeySetPlace {
        /// What there is.
        found: &'static str,
    },
    /// A `url` that no key set is fetched from.
    #[error("`auth.jwt.jwks.url` {why}")]
    KeySetUrl {
        /// What is wrong, and what to write.
        why: &'static str,
    },
    /// An algorithm that no key set is used with.
    #[error(
        "`auth.jwt.jwks.algs` has {found}: write some of RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384 and EdDSA"
    )]
    KeySetAlg {
        /// What stands there, shortened.
        found: String,
    },
    /// A file that holds no key set.
    #[error("`auth.jwt.jwks.file`: the file {path} is no key set: {error}")]
    KeySetFile {
        /// Its path.
        path: String,
        /// What is wrong.
        error: JwksError,
    },
    /// A key set that verifies nothing.
    #[error("`auth.jwt.jwks.file`: the file {path} holds no key that can be used with `algs`")]
    KeySetUseless {
        /// Its path.
        path: String,
    },
    /// Two keys with one `kid` and `alg`.
    #[error("the key of line {first_line} has the same `kid` and `alg`: give each key its own `kid`")]
    DuplicateKey {
        /// Where the first stands.
        first_line: u32,
    },
    /// An API key's id that is none.
    #[error("`auth.api_key.id` must have 1 to 64 of the characters A-Z a-z 0-9 . _ : ~ -")]
    ApiKeyId,
    /// An API key's hash that is none.
    #[error("`auth.api_key.hash` {0}")]
    ApiKeyHash(HashError),
    /// An API key's stream that is none.
    #[error("`auth.api_key.streams` has an entry that is no stream: write an id, or a glob such as \"orders:*\"")]
    ApiKeyStream,
    /// Two API keys with one id.
    #[error("`auth.api_key.id` \"{id}\" is taken by the key of line {first_line}: give each key its own")]
    DuplicateApiKey {
        /// The id.
        id: String,
        /// Where the first stands.
        first_line: u32,
    },
    /// A proxy's URL that is none.
    #[error("`proxy.url` {0}")]
    ProxyUrl(crate::stream::proxy::ProxyUrlError),
    /// What is no host.
    #[error("`proxy.except`: {found} is no address, network, name or `*.NAME`")]
    ProxyException {
        /// What was found.
        found: String,
    },
    /// A URL of Redis that is none.
    #[error("`redis.url` {0}")]
    RedisUrl(RedisUrlError),
    /// A file of certificates without one.
    #[error("`redis.ca` names a file without a PEM certificate")]
    RedisCa,
    /// Two channels of one name.
    #[error(
        "`redis.channel_logout`, `channel_permissions` and `channel_revoked` must be three names: each means its own"
    )]
    RedisChannels,
    /// An entry of `direct.allow` or `admin.stream_urls` that is no pattern.
    #[error("`{key}`: {found} {error}")]
    UrlPattern {
        /// Its path.
        key: &'static str,
        /// The entry, shortened.
        found: String,
        /// What is wrong.
        error: PatternError,
    },
    /// A stream id that is none.
    #[error("`stream.id` must have 1 to 128 of the characters A-Z a-z 0-9 . _ : ~ -")]
    StreamId,
    /// Two streams with one id.
    #[error("`stream.id` \"{id}\" is taken by the stream of line {first_line}")]
    DuplicateStream {
        /// The id.
        id: String,
        /// Where the first stands.
        first_line: u32,
    },
    /// A method that does not poll.
    #[error("`stream.method` must be GET or POST")]
    Method,
    /// A header name that is none.
    #[error("`{key}` has a name that is no header name: use letters, digits and `-`")]
    HeaderName {
        /// The table.
        key: &'static str,
    },
    /// A header that restcast sets itself.
    #[error("`{key}.{name}` is set by restcast itself and cannot be configured")]
    HeaderReserved {
        /// The table.
        key: &'static str,
        /// Its name.
        name: String,
    },
    /// A header twice, whatever the case of its letters.
    #[error("`{key}.{name}` stands there twice: header names do not differ by case")]
    HeaderRepeated {
        /// The table.
        key: &'static str,
        /// Its name.
        name: String,
    },
    /// A header value that would end or bend the header.
    #[error("`{key}.{name}` has a control character in its value, or a blank at its beginning or end")]
    HeaderValue {
        /// The table.
        key: &'static str,
        /// Its name.
        name: String,
    },
    /// A placeholder in a header.
    #[error("`{key}.{name}` has a placeholder: they may stand in `url` and `body` only")]
    HeaderPlaceholder {
        /// The table.
        key: &'static str,
        /// Its name.
        name: String,
    },
    /// A credential for an upstream that cannot be one.
    #[error("`{key}` {error}")]
    UpstreamAuth {
        /// Its path.
        key: &'static str,
        /// What is wrong.
        error: UpstreamAuthError,
    },
    /// A parameter's name that is none.
    #[error("`stream.params` has the name {name}: use 1 to 128 of the characters A-Z a-z 0-9 . _ ~ -")]
    ParamName {
        /// The name, shortened.
        name: String,
    },
    /// A parameter's name that means something else in the query.
    #[error("`stream.params` has the name \"{name}\", which means something else in a stream's query: use another")]
    ParamReserved {
        /// The name.
        name: String,
    },
    /// A parameter's name twice.
    #[error("`stream.params` has \"{name}\" twice")]
    ParamRepeated {
        /// The name.
        name: String,
    },
    /// A pattern for what is no parameter.
    #[error("`stream.params_pattern` has {name}, which is not in `params`")]
    PatternWithoutParam {
        /// The name, shortened.
        name: String,
    },
    /// A pattern that is no regular expression.
    #[error("`stream.params_pattern.{name}` is not a regular expression: {error}")]
    Pattern {
        /// The parameter's name.
        name: String,
        /// What the expression's parser says.
        error: String,
    },
    /// A file of certificates without one.
    #[error("`{key}` names a file without a PEM certificate")]
    CaWithoutCertificate {
        /// Its path.
        key: &'static str,
    },
    /// An entry of `ignore` that is no pointer.
    #[error("`stream.ignore` has an entry that is no JSON pointer (RFC 6901): write it as in \"/generated_at\"")]
    Pointer,
    /// More `[[stream.view]]` than a stream may have.
    #[error("a stream has at most {limit} [[stream.view]]")]
    TooManyViews {
        /// How many it may have.
        limit: usize,
    },
    /// A view for nobody.
    #[error("`stream.view.roles` is empty: name the roles that get this view")]
    ViewWithoutRoles,
    /// A view that shows nothing, or is described twice.
    #[error("[[stream.view]] needs either `pointers` or `path`")]
    ViewShape,
    /// An entry of `pointers` that is no pointer.
    #[error("`stream.view.pointers` has an entry that is no JSON pointer (RFC 6901): write it as in \"/rows/*/name\"")]
    ViewPointer,
    /// A path that is none.
    #[error("`stream.view.path`: {0}")]
    ViewPath(PathError),
    /// A stream to be polled for nobody, with somebody's values.
    #[error("`stream.keep_warm` polls without watchers, but {placeholder} can only be filled for one: set it to false")]
    KeepWarmUnfilled {
        /// The first placeholder.
        placeholder: String,
    },
    /// More `[[action]]` than there may be.
    #[error("[[action]] stands there more than {limit} times")]
    TooManyActions {
        /// How many there may be.
        limit: usize,
    },
    /// An action's type that is none.
    #[error("`action.type` must have 1 to {} of the characters A-Z a-z 0-9 . _ : ~ / -", limits::ACTION_TYPE_BYTES_MAX)]
    ActionType,
    /// An action's type that means something else.
    #[error("`action.type` \"{kind}\" is a message of the protocol itself: use another")]
    ActionTypeTaken {
        /// The type.
        kind: String,
    },
    /// Two actions with one type.
    #[error("`action.type` \"{kind}\" is taken by the action of line {first_line}")]
    DuplicateAction {
        /// The type.
        kind: String,
        /// Where the first stands.
        first_line: u32,
    },
    /// A method that is none, or that cannot act.
    #[error("`action.method` must be a method whose answer has a body, in upper case, such as PUT or POST")]
    ActionMethod,
    /// An action's schema that is none.
    #[error("`action.schema` {0}")]
    Schema(SchemaError),
    /// A file with an action's schema that is no text.
    #[error("`action.schema` names a file that is not UTF-8")]
    SchemaNotText,
    /// A rate that is none.
    #[error("`action.rate` must be a count for each second, minute or hour, such as \"5/s\", \"100/m\" or \"1000/h\"")]
    ActionRate,
    /// A stream to be polled that there is not.
    #[error(
        "`action.refresh` names {id}, which is no [[stream]], nor one that the admin API could make: that takes an id, and `admin.key`"
    )]
    ActionRefresh {
        /// The name, shortened.
        id: String,
    },
    /// A time of the day that is none.
    #[error("`stream.windows` has times of the day as \"09:30\", up to \"24:00\" as an end")]
    WindowTime,
    /// A day of the week that is none.
    #[error("`stream.windows.days` has the days \"mon\", \"tue\", \"wed\", \"thu\", \"fri\", \"sat\" and \"sun\"")]
    WindowDay,
    /// More windows than a stream may have.
    #[error("a stream has at most {limit} windows")]
    TooManyWindows {
        /// What is allowed.
        limit: usize,
    },
    /// An offset from UTC that is none.
    #[error("`stream.utc_offset` is an offset as \"+05:30\" or \"-08:00\", at most 14 hours")]
    UtcOffset,
    /// Bounds of a moving interval that do not hold its beginning.
    #[error("`stream.interval` is not between `interval_min` and `interval_max`")]
    IntervalBounds,
    /// Pages of a request that is no GET.
    #[error("`stream.pages_max` is for GET: the next page is asked for so")]
    PagesMethod,
    /// A key that the stream's kind has no use for.
    #[error("`stream.{key}` is for streams of kind = \"{kind}\"")]
    OtherKind {
        /// The key.
        key: &'static str,
        /// The kind.
        kind: &'static str,
    },
    /// An origin that is none.
    #[error("`upstream.origin` is scheme, host and port and nothing else, such as \"https://api.example.com\"")]
    UpstreamOrigin,
    /// The same origin twice.
    #[error("`upstream.origin` {origin} is that of another [[upstream]]")]
    UpstreamRepeated {
        /// Which.
        origin: String,
    },
    /// A rate that is none.
    #[error(
        "`upstream.rate` must be a count for each second, minute or hour, such as \"5/s\", \"100/m\" or \"1000/h\""
    )]
    UpstreamRate,
    /// More upstreams than are listed.
    #[error("at most {limit} [[upstream]] are listed")]
    TooManyUpstreams {
        /// What is allowed.
        limit: usize,
    },
    /// More errors than are reported.
    #[error("{count} further errors are not shown")]
    Further {
        /// How many.
        count: usize,
    },
}

/// Something that works and is likely not meant.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Warning {
    /// Line of the file, 1 is the first.
    pub line: u32,
    /// What is odd there.
    pub oddity: Oddity,
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.oddity)
    }
}

/// What works and is likely not meant.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Oddity {
    /// `server.plaintext` beside TLS.
    #[error("`server.plaintext` has no effect with [[server.tls]]: the listener speaks TLS only")]
    PlaintextWithTls,
    /// `/metrics` for everybody, the admin key in the clear.
    #[error(
        "`admin.listen` is reachable from other machines: /metrics is open to them, and the key travels in the clear"
    )]
    AdminExposed,
    /// A stream to be polled that the file does not have.
    #[error(
        "`action.refresh` names {id}, which is no [[stream]] of the file: it is polled while the admin API has made one"
    )]
    ActionRefreshUnknown {
        /// The name, shortened.
        id: String,
    },
    /// More streams of upstreams that speak one than the cores follow.
    #[error(
        "{count} streams have `kind = \"sse\"` or \"ndjson\", and a core follows at most {max}: with {cores} \
         `server.cores` some that are watched will be UPSTREAM_UNREACHABLE",
        max = limits::UPSTREAM_FOLLOWED_MAX
    )]
    TooManyFollowed {
        /// How many there are.
        count: usize,
        /// How many cores.
        cores: u16,
    },
    /// A secret of session cookies that could be guessed.
    #[error("`auth.session.secrets` has one of {bytes} bytes: use at least 16 random ones")]
    ShortSessionSecret {
        /// What it has.
        bytes: usize,
    },
    /// An admin key under which other processes are not asked.
    #[error(
        "`admin.key` has {bytes} bytes: with `[redis]`, connections of other processes are listed under 32 or more"
    )]
    ShortSharedAdminKey {
        /// What it has.
        bytes: usize,
    },
    /// A short admin key.
    #[error("`admin.key` has {bytes} bytes: use at least 16 random ones")]
    ShortAdminKey {
        /// What it has.
        bytes: usize,
    },
    /// A password in the clear.
    #[error("`redis.url` sends its password in the clear to another machine: use rediss://")]
    RedisPlain,
    /// Roots for a connection without TLS.
    #[error("`redis.ca` has no effect with a redis:// URL: use rediss://")]
    RedisCaWithoutTls,
    /// Tokens of an issuer that may be for anybody.
    #[error(
        "the key set of \"{issuer}\" has no `audience`: tokens that this issuer made for other services are accepted (RFC 8725 section 3.9)"
    )]
    KeySetWithoutAudience {
        /// The issuer.
        issuer: String,
    },
    /// An accepted issuer whose tokens no configured key verifies.
    #[error("`auth.jwt.issuer` names \"{issuer}\", whose tokens [[auth.jwt.jwks]] alone verifies: it has no effect")]
    IssuerHasKeySet {
        /// The issuer.
        issuer: String,
    },
    /// Roots for a key set without TLS.
    #[error("the key set of \"{issuer}\": `ca` has no effect without an https:// URL")]
    KeySetCaWithoutTls {
        /// The issuer.
        issuer: String,
    },
    /// Roots for a token endpoint without TLS.
    #[error("`{key}` has no effect without an https:// `token_url`")]
    TokenCaWithoutTls {
        /// Its path.
        key: &'static str,
    },
    /// A client certificate for a connection without TLS.
    #[error("`{key}` has no effect with an http:// URL")]
    IdentityWithoutTls {
        /// Its path.
        key: &'static str,
    },
    /// A credential in the clear.
    #[error("`{key}`: the credential travels in the clear to another machine: use https://")]
    CredentialInTheClear {
        /// Its path.
        key: &'static str,
    },
    /// A direct mode in which every target is blocked.
    #[error("[direct] reaches nothing: list targets in `allow`, or set `allow_public`")]
    DirectReachesNothing,
    /// A hook's secret that could be guessed.
    #[error("`stream.hook_secret` has one of {bytes} bytes: use at least 16 random ones")]
    ShortHookSecret {
        /// What it has.
        bytes: usize,
    },
    /// A very short interval.
    #[error("stream \"{id}\": `interval` is under 100ms: the upstream gets over ten requests a second")]
    ShortInterval {
        /// The stream.
        id: String,
    },
    /// A parameter that changes nothing.
    #[error("stream \"{id}\": the parameter \"{name}\" stands in no {{query.{name}}}: it changes nothing")]
    UnusedParam {
        /// The stream.
        id: String,
        /// The parameter.
        name: String,
    },
    /// A body where none is expected.
    #[error("stream \"{id}\": a `body` with {method} is ignored or refused by many servers")]
    BodyWithGet {
        /// The stream.
        id: String,
        /// The method.
        method: String,
    },
    /// A part of an exchange that may take longer than all of it.
    #[error("stream \"{id}\": `{key}` is over `timeout`, which ends the exchange before")]
    TimeoutUnreachable {
        /// The stream.
        id: String,
        /// The key.
        key: &'static str,
    },
    /// A stream for nobody.
    #[error(
        "stream \"{id}\": nobody can watch it: no credential is configured, such as [[auth.jwt.key]], and `allow_anonymous` is false"
    )]
    NobodyCanWatch {
        /// The stream.
        id: String,
    },
    /// A stream that anonymous callers may watch and cannot.
    #[error("stream \"{id}\": `allow_anonymous` has no effect, for an anonymous caller has no {what}")]
    AnonymousCannotWatch {
        /// The stream.
        id: String,
        /// What it lacks.
        what: String,
    },
    /// A view that nobody gets.
    #[error("stream \"{id}\": nobody gets this view, as views before it are for all of its roles")]
    ViewUnreachable {
        /// The stream.
        id: String,
    },
    /// A window in which polls are very frequent.
    #[error(
        "stream \"{id}\": an interval of a window, or `interval_min`, is under 100ms: the upstream gets over ten requests a second"
    )]
    ShortPace {
        /// The stream.
        id: String,
    },
    /// An offset that nothing goes by.
    #[error("stream \"{id}\": `utc_offset` has no effect without `windows`")]
    UnusedOffset {
        /// The stream.
        id: String,
    },
    /// Roots for a connection without TLS.
    #[error("stream \"{id}\": `ca` has no effect with an http:// URL")]
    CaWithoutTls {
        /// The stream.
        id: String,
    },
    /// A body where none is expected.
    #[error("action \"{kind}\": a `body` with GET is ignored or refused by many servers")]
    ActionBodyWithGet {
        /// The action.
        kind: String,
    },
    /// A part of an exchange that may take longer than all of it.
    #[error("action \"{kind}\": `{key}` is over `timeout`, which ends the exchange before")]
    ActionTimeoutUnreachable {
        /// The action.
        kind: String,
        /// The key.
        key: &'static str,
    },
    /// Roots for a connection without TLS.
    #[error("action \"{kind}\": `ca` has no effect with an http:// URL")]
    ActionCaWithoutTls {
        /// The action.
        kind: String,
    },
}

/// What the shell needs of the `[server]` table.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ServerOptions {
    /// The public listener.
    pub listen: SocketAddr,
    /// Whether it may listen beyond loopback without TLS.
    pub plaintext: bool,
    /// Threads, one shard each; 0: one per available core.
    pub cores: u16,
    /// Whether other processes may listen on the same address.
    pub share_port: bool,
    /// Which driver to run on.
    pub driver: Driver,
    /// The state file's path.
    pub state: String,
    /// Whether the file names it: then it is this process's from the start.
    pub state_named: bool,
}

/// One `[[server.tls]]`: a certificate and its key, which fit together.
#[derive(Clone, Debug)]
pub struct TlsFiles {
    /// Path of the certificate's file.
    pub cert: String,
    /// Path of the key's file.
    pub key: String,
    /// What the certificate's file holds: PEM. A secret, for the key may stand in it too.
    pub cert_pem: Secret,
    /// What the key's file holds: PEM.
    pub key_pem: Secret,
}

/// `server.driver`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Driver {
    /// io_uring, or epoll where the kernel refuses it.
    Auto,
    /// io_uring or nothing.
    IoUring,
    /// epoll.
    Epoll,
}

/// The `[admin]` table.
#[derive(Clone, Debug)]
pub struct AdminOptions {
    /// The admin listener.
    pub listen: SocketAddr,
    /// The bearer key of `/admin/v1/`; without it those answer 403.
    pub key: Option<Secret>,
    /// Further `Host` names accepted.
    pub names: Vec<String>,
    /// What streams that the admin API makes may be polled from.
    pub stream_urls: Arc<Policy>,
}

/// The `[log]` table.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct LogOptions {
    /// Least important level that is written.
    pub level: LogLevel,
    /// Lines for people, or JSON objects.
    pub format: LogFormat,
}

/// `log.level`.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum LogLevel {
    /// Someone must act.
    Error,
    /// Something went wrong and was recovered.
    Warn,
    /// What an operator wants to know of a healthy server.
    Info,
    /// What a developer wants to know.
    Debug,
    /// Single messages.
    Trace,
}

/// `log.format`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum LogFormat {
    /// One line of text an event.
    Text,
    /// One JSON object an event.
    Json,
}

#[cfg(test)]
mod tests;
