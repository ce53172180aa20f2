//! The configuration as meant: checks that take more than one value, and each part's `Options`.
//!
//! Source: protocol version 1, sections 1, 2 and 7; RFC 7518 section 3.2 for key lengths.
//! Memory: what is returned. Errors: every one that is found; the configuration returned beside errors is not for use.
//! Not here: TOML, single values and defaults (`walk`, `form`, `keys`).

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Duration;

use super::form::{self, FormError, Sourced};
use super::walk::{Lined, Section};
use super::{
    AdminOptions, CA_FILE_BYTES_MAX, Config, ConfigError, Driver, JwtKey, KeySetSource, LogFormat, LogLevel,
    LogOptions, Oddity, Problem, ServerOptions, Sources, TLS_FILE_BYTES_MAX, TlsFiles, Warning,
};
use crate::auth::jwks::IssuerOptions;
use crate::auth::jwt::ClaimNames;
use crate::auth::keys::KeySet;
use crate::guard::Policy;
use crate::ids::StreamId;
use crate::limits::{
    CLAIM_NAME_BYTES_MAX, HEADERS_MAX, Limits, PARAMS_MAX, PEER_KEY_BYTES_MIN, TLS_CERTIFICATES_MAX,
    UPSTREAM_FOLLOWED_MAX, UPSTREAM_SECRET_BYTES_MAX,
};
use crate::secret::Secret;
use crate::stream::diff::Pointer;
use crate::stream::live::Live;
use crate::stream::poll::RESTART_MIN;
use crate::stream::template::{BodyTemplate, UrlTemplate};
use crate::stream::{CaFile, Options, Param};
use crate::{auth, connection};

/// An interval under this is warned of.
const SHORT_INTERVAL: Duration = Duration::from_millis(100);
/// An admin key shorter than this is warned of.
const ADMIN_KEY_BYTES: usize = 16;
/// Headers one stream may have, which leaves room for those the client sets.
const STREAM_HEADERS_MAX: usize = HEADERS_MAX / 2;
/// Bytes of one header's value.
const HEADER_VALUE_BYTES_MAX: usize = UPSTREAM_SECRET_BYTES_MAX;
/// Bytes of one pattern of `params_pattern`.
const PATTERN_BYTES_MAX: usize = 1 << 10;

/// Headers that frame the request, choose its connection or decide what an answer means: the client sets them, or they
/// have no place in a poll. In lower case.
pub(super) const RESERVED_HEADERS: [&str; 17] = [
    "accept-encoding",
    "connection",
    "content-length",
    "expect",
    "host",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "keep-alive",
    "proxy-connection",
    "range",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// The stream parameters of protocol section 1, and the carriers of credentials.
const RESERVED_PARAMS: [&str; 6] = ["format", "max_rate_ms", "select", "since", "ticket", "token"];

/// Builds the configuration and appends what is wrong to `errors`; where that stays empty, the configuration is whole.
pub(super) fn config(root: &Section, sources: &dyn Sources, errors: &mut Vec<ConfigError>) -> (Config, Vec<Warning>) {
    let mut check = Check { errors, warnings: Vec::new(), sources };
    let tls = check.tls(root);
    let connection = check.connection(root);
    let server = check.server(root, &connection);
    let admin = check.admin(root, &server);
    let keys = check.jwt_keys(root);
    let auth = check.auth(root, &keys);
    let log = log(root);
    let limits = limits(root);
    let redis = check.redis(root);
    let api_keys = check.api_keys(root);
    let has_keys = ["auth.jwt.key", "auth.jwt.jwks", "auth.api_key"].iter().any(|keys| !root.array(keys).is_empty());
    let direct = check.direct(root);
    let streams = check.streams(root, has_keys || auth.session.is_some());
    check.warn_of_followed(root, server.cores);
    let actions = check.actions(root, &streams);
    let upstreams = check.upstreams(root);
    let proxy = check.proxy(root);
    let Keys { written: jwt_keys, key_sets, .. } = keys;
    let config = Config {
        server,
        connection,
        tls,
        admin,
        log,
        limits,
        auth,
        jwt_keys,
        key_sets,
        api_keys,
        redis,
        direct,
        streams,
        actions,
        upstreams,
        proxy,
    };
    (config, check.warnings)
}

fn log(root: &Section) -> LogOptions {
    LogOptions {
        level: match root.text("log.level").as_deref() {
            Some("error") => LogLevel::Error,
            Some("warn") => LogLevel::Warn,
            Some("debug") => LogLevel::Debug,
            Some("trace") => LogLevel::Trace,
            _ => LogLevel::Info,
        },
        format: match root.text("log.format").as_deref() {
            Some("json") => LogFormat::Json,
            _ => LogFormat::Text,
        },
    }
}

fn limits(root: &Section) -> Limits {
    Limits {
        connections: root.number_u32("limits.connections"),
        connections_per_address: root.number_u32("limits.connections_per_address"),
        connections_per_subject: root.number_u32("limits.connections_per_subject"),
        subscriptions_per_connection: root.number_u32("limits.subscriptions_per_connection"),
        streams: root.number_u32("limits.streams"),
        streams_per_subject: root.number_u32("limits.streams_per_subject"),
        streams_per_address: root.number_u32("limits.streams_per_address"),
        selects_per_stream: root.number_u32("limits.selects_per_stream"),
        history_bytes_total: unlimited_if_zero(root.number("limits.history_bytes_total")),
        pinned_bytes: unlimited_if_zero(root.number("limits.pinned_bytes")),
        handshakes_per_second_per_address: root.number_u32("limits.handshakes_per_second_per_address"),
        keep_alive: root.duration("limits.keep_alive"),
        handshake_timeout: root.duration("limits.handshake_timeout"),
        request_head_bytes_max: root.number_u32("limits.request_head_bytes_max"),
        message_bytes_max: root.number_u32("limits.message_bytes_max"),
        messages_per_second: root.number_u32("limits.messages_per_second"),
        auth_failures_per_minute: root.number_u32("limits.auth_failures_per_minute"),
        write_stall: root.duration("limits.write_stall"),
    }
}

/// A budget of 0 bytes would evict everything: in the file it means «unlimited», in the options that is the greatest.
const fn unlimited_if_zero(bytes: u64) -> u64 {
    if bytes == 0 { u64::MAX } else { bytes }
}

pub(super) fn is_loopback(ip: IpAddr) -> bool {
    ip.to_canonical().is_loopback()
}

/// All keys of a configuration.
#[derive(Default)]
pub(super) struct Keys {
    pub(super) written: Vec<JwtKey>,
    pub(super) prepared: KeySet,
    pub(super) issuers: Vec<IssuerOptions>,
    pub(super) key_sets: Vec<KeySetSource>,
}

/// Request headers: those that are written in the configuration, and those whose values stand elsewhere.
pub(super) type Headers = (Vec<(String, Secret)>, Vec<(String, Live)>);

pub(super) struct Check<'c> {
    pub(super) errors: &'c mut Vec<ConfigError>,
    pub(super) warnings: Vec<Warning>,
    pub(super) sources: &'c dyn Sources,
}

impl Check<'_> {
    pub(super) fn error(&mut self, line: u32, problem: Problem) {
        self.errors.push(ConfigError { line, problem });
    }

    pub(super) fn warn(&mut self, line: u32, oddity: Oddity) {
        self.warnings.push(Warning { line, oddity });
    }

    /// Where files are read.
    pub(super) fn sources(&self) -> &dyn Sources {
        self.sources
    }

    /// The values that `read` accepts; the others become errors at their own lines.
    fn each<T>(&mut self, key: &str, texts: Vec<Lined<String>>, read: impl Fn(&str) -> Result<T, FormError>) -> Vec<T> {
        let mut accepted = Vec::with_capacity(texts.len());
        for text in texts {
            match read(&text.value) {
                Ok(value) => accepted.push(value),
                Err(error) => self.error(text.line, Problem::Form { key: key.to_owned(), error }),
            }
        }
        accepted
    }

    fn connection(&mut self, root: &Section) -> connection::Options {
        let public_origin = root.text("server.public_origin").and_then(|text| {
            let key = "server.public_origin";
            let error =
                |error| ConfigError { line: root.line_of(key), problem: Problem::Form { key: key.to_owned(), error } };
            form::origin(&text).map_err(|e| self.errors.push(error(e))).ok()
        });
        connection::Options {
            trusted_proxies: self.each("server.trusted_proxies", root.texts("server.trusted_proxies"), form::network),
            public_origin,
            heartbeat: root.duration("server.heartbeat"),
            drain: root.duration("server.drain"),
            allowed_origins: self.each("server.allowed_origins", root.texts("server.allowed_origins"), form::origin),
            playground: root.boolean("server.playground"),
            echo: root.boolean("server.echo"),
            tls: !root.array("server.tls").is_empty(),
            permessage_deflate: root.boolean("server.permessage_deflate"),
            direct: root.line_of_table("direct").is_some(),
        }
    }

    /// `[[server.tls]]`; those with an error are left out.
    fn tls(&mut self, root: &Section) -> Vec<TlsFiles> {
        let sections = root.array("server.tls");
        if let Some(section) = sections.get(TLS_CERTIFICATES_MAX) {
            self.error(section.line, Problem::TooManyCertificates { limit: TLS_CERTIFICATES_MAX });
        }
        sections.iter().take(TLS_CERTIFICATES_MAX).filter_map(|section| self.tls_files(section)).collect()
    }

    fn tls_files(&mut self, section: &Section) -> Option<TlsFiles> {
        let (cert, key) = (section.text("server.tls.cert"), section.text("server.tls.key"));
        let cert_pem = cert.as_deref().and_then(|path| self.tls_file(section, "server.tls.cert", path));
        let key_pem = key.as_deref().and_then(|path| self.tls_file(section, "server.tls.key", path));
        let (cert, key, cert_pem, key_pem) = (cert?, key?, cert_pem?, Secret::new(key_pem?));
        match self.sources.identity(&cert_pem, key_pem.expose_secret()) {
            Ok(()) => Some(TlsFiles { cert, key, cert_pem: Secret::new(cert_pem), key_pem }),
            Err(error) => {
                let (at, path) = match error.is_of_certificate() {
                    true => ("server.tls.cert", &cert),
                    false => ("server.tls.key", &key),
                };
                self.error(section.line_of(at), Problem::Identity { key: at, path: form::quoted(path), error });
                None
            }
        }
    }

    fn tls_file(&mut self, section: &Section, at: &'static str, path: &str) -> Option<Vec<u8>> {
        let error = match self.sources.file(path, TLS_FILE_BYTES_MAX) {
            Ok(bytes) if bytes.is_empty() => FormError::Empty,
            Ok(bytes) => return Some(bytes),
            Err(error) => FormError::File { path: form::quoted(path), error },
        };
        self.error(section.line_of(at), Problem::Form { key: at.to_owned(), error });
        None
    }

    fn server(&mut self, root: &Section, connection: &connection::Options) -> ServerOptions {
        let listen = root.address("server.listen");
        let plaintext = root.boolean("server.plaintext");
        if plaintext && connection.tls {
            self.warn(root.line_of("server.plaintext"), Oddity::PlaintextWithTls);
        }
        if !is_loopback(listen.ip()) {
            if !plaintext && !connection.tls {
                self.error(root.line_of("server.listen"), Problem::PlaintextNeeded { listen });
            }
            if connection.echo {
                self.error(root.line_of("server.echo"), Problem::EchoExposed);
            }
        }
        ServerOptions {
            listen,
            plaintext,
            share_port: root.boolean("server.share_port"),
            cores: u16::try_from(root.number("server.cores")).expect("KEYS bounds server.cores by 1024"),
            driver: match root.text("server.driver").as_deref() {
                Some("io_uring") => Driver::IoUring,
                Some("epoll") => Driver::Epoll,
                _ => Driver::Auto,
            },
            state: root.text("server.state").expect("KEYS gives server.state a default"),
            state_named: root.is_written("server.state"),
        }
    }

    fn admin(&mut self, root: &Section, server: &ServerOptions) -> AdminOptions {
        let line = root.line_of("admin.listen");
        let listen = root.address("admin.listen");
        if listen == server.listen && listen.port() != 0 {
            self.error(line, Problem::SameListener);
        }
        if !is_loopback(listen.ip()) {
            self.warn(line, Oddity::AdminExposed);
        }
        let key = root.secret("admin.key");
        // RFC 9110 11.2, `token68`: whoever presents any other is refused for ever.
        let is_sendable = |key: &Secret| {
            let text = key.expose_secret();
            let end = text.iter().rposition(|&b| b != b'=').map_or(0, |last| last + 1);
            end > 0 && text.iter().take(end).all(|b| b.is_ascii_alphanumeric() || b"-._~+/".contains(b))
        };
        if key.as_ref().is_some_and(|key| !is_sendable(key)) {
            self.error(root.line_of("admin.key"), Problem::AdminKey);
        }
        if let Some(bytes) = key.as_ref().map(Secret::len).filter(|bytes| *bytes < ADMIN_KEY_BYTES) {
            self.warn(root.line_of("admin.key"), Oddity::ShortAdminKey { bytes });
        }
        let short = key.as_ref().map(Secret::len).filter(|bytes| *bytes < PEER_KEY_BYTES_MIN);
        if let Some(bytes) = short.filter(|_| root.is_written("redis.url")) {
            self.warn(root.line_of("admin.key"), Oddity::ShortSharedAdminKey { bytes });
        }
        let mut names = Vec::new();
        for name in root.texts("admin.names") {
            let is_name = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
            if name.value.len() <= 253 && name.value.bytes().all(is_name) {
                names.push(name.value);
            } else {
                self.error(name.line, Problem::HostName);
            }
        }
        let stream_urls = Arc::new(Policy::of_administrators(self.patterns(root, "admin.stream_urls")));
        AdminOptions { listen, key, names, stream_urls }
    }

    fn auth(&mut self, root: &Section, keys: &Keys) -> auth::Options {
        let values = |path| root.texts(path).into_iter().map(|text| text.value).collect();
        let claim = |path| root.text(path).unwrap_or_else(|| panic!("KEYS gives {path} a default"));
        let cookie = claim("auth.jwt.cookie");
        // RFC 6265 section 4.1.1: a cookie's name is a token.
        if !form::is_token(&cookie) {
            self.error(root.line_of("auth.jwt.cookie"), Problem::CookieName);
        }
        auth::Options {
            query_token: root.boolean("auth.query_token"),
            reauth_before: root.duration("auth.reauth_before"),
            token_cache: root.number_u32("auth.token_cache"),
            first_message: root.duration_unless_unset("auth.first_message"),
            revocation_keep: root.duration("auth.revocation_keep"),
            jwt: auth::jwt::Options {
                leeway: root.duration("auth.jwt.leeway"),
                issuers: values("auth.jwt.issuer"),
                audiences: values("auth.jwt.audience"),
                cookie,
                close_on_key_removal: root.boolean("auth.jwt.close_on_key_removal"),
                claims: ClaimNames {
                    sub: claim("auth.jwt.claims.sub"),
                    role: claim("auth.jwt.claims.role"),
                    roles: claim("auth.jwt.claims.roles"),
                    permissions: claim("auth.jwt.claims.permissions"),
                    streams: claim("auth.jwt.claims.streams"),
                },
                keys: keys.prepared.clone(),
                key_sets: keys.issuers.clone(),
            },
            session: self.session(root),
            store: root.line_of_table("redis").is_some(),
        }
    }

    pub(super) fn streams(&mut self, root: &Section, has_keys: bool) -> Vec<Arc<Options>> {
        let mut streams = Vec::new();
        let mut seen: BTreeMap<StreamId, u32> = BTreeMap::new();
        for section in root.array("stream") {
            let Some(stream) = self.stream(section) else { continue };
            if let Some(first_line) = seen.get(&stream.id) {
                let id = stream.id.to_string();
                self.error(section.line_of("stream.id"), Problem::DuplicateStream { id, first_line: *first_line });
            } else {
                seen.insert(stream.id.clone(), section.line_of("stream.id"));
            }
            self.warn_of_stream(section, &stream, has_keys);
            streams.push(Arc::new(stream));
        }
        streams
    }

    /// Warns where the file has more upstreams' streams than the cores follow, at the first that is one too many. `cores` as
    /// configured: 0 is one for each that there is, if anybody knows.
    fn warn_of_followed(&mut self, root: &Section, cores: u16) {
        let Some(cores) = NonZeroU16::new(cores).or_else(|| self.sources.cores()) else { return };
        let most = usize::from(cores.get()) * UPSTREAM_FOLLOWED_MAX;
        let followed = || {
            let sections = root.array("stream").iter();
            sections.filter(|section| matches!(section.text("stream.kind").as_deref(), Some("sse" | "ndjson")))
        };
        if let Some(section) = followed().nth(most) {
            let line = section.line_of("stream.kind");
            self.warn(line, Oddity::TooManyFollowed { count: followed().count(), cores: cores.get() });
        }
    }

    fn stream(&mut self, section: &Section) -> Option<Options> {
        let id = self.stream_id(section);
        let params = self.params(section);
        let url = self.url(section, &params);
        let body = self.body(section, &params);
        let method = self.method(section);
        let (headers, elsewhere) = self.headers(section, "stream.headers");
        let credential = self.stream_credential(section, elsewhere, &headers);
        let ca = self.ca(section, "stream.ca");
        let ignore = self.ignore(section);
        let keep_warm = section.boolean("stream.keep_warm");
        if let (true, Some(placeholder)) = (keep_warm, first_placeholder(url.as_ref(), body.as_ref())) {
            self.error(section.line_of("stream.keep_warm"), Problem::KeepWarmUnfilled { placeholder });
        }
        // All that is wrong is found before the first of it ends this.
        let (views, hook_secrets) = (self.views(section), self.hook_secrets(section));
        let (proof, filter) = (self.proof(section), self.filter(section));
        let values = |path| section.texts(path).into_iter().map(|text| text.value).collect();
        Some(Options {
            id: id?,
            url: url?,
            interval: section.duration("stream.interval"),
            method,
            headers,
            credential,
            body,
            params,
            ca,
            connect_timeout: section.duration("stream.connect_timeout"),
            first_byte_timeout: section.duration("stream.first_byte_timeout"),
            timeout: section.duration("stream.timeout"),
            response_bytes_max: section.number("stream.response_bytes_max"),
            backoff_max: section.duration("stream.backoff_max"),
            restart_min: RESTART_MIN,
            linger: section.duration("stream.linger"),
            keep_warm,
            history: section.number_u32("stream.history"),
            history_bytes: section.number("stream.history_bytes"),
            ignore,
            array_key: section.text("stream.array_key"),
            allow_anonymous: section.boolean("stream.allow_anonymous"),
            roles: values("stream.roles"),
            permissions: values("stream.permissions"),
            pacing: self.pacing(section),
            follow: self.follow(section),
            redirects_max: u8::try_from(section.number("stream.redirects_max")).unwrap_or(u8::MAX),
            pages_max: section.number_u32("stream.pages_max"),
            views,
            hook_secrets,
            proof,
            filter,
            guard: None,
            described_by: None,
        })
    }

    fn stream_id(&mut self, section: &Section) -> Option<StreamId> {
        let text = section.text("stream.id")?;
        let id = StreamId::new(&text);
        if id.is_none() {
            self.error(section.line_of("stream.id"), Problem::StreamId);
        }
        id
    }

    /// `params`, sorted by name, with their patterns.
    fn params(&mut self, section: &Section) -> Vec<Param> {
        let texts = section.texts("stream.params");
        if texts.len() > PARAMS_MAX {
            let error = FormError::TooMany { limit: PARAMS_MAX };
            self.error(section.line_of("stream.params"), Problem::Form { key: "stream.params".to_owned(), error });
        }
        let mut params: Vec<Param> = Vec::new();
        for Lined { line, value: name } in texts.into_iter().take(PARAMS_MAX) {
            // The characters that stand for themselves in `leads?region=eu`, and end no placeholder.
            let is_name = |b: u8| b.is_ascii_alphanumeric() || b"._~-".contains(&b);
            if name.len() > CLAIM_NAME_BYTES_MAX || !name.bytes().all(is_name) {
                self.error(line, Problem::ParamName { name: form::quoted(&name) });
            } else if RESERVED_PARAMS.contains(&name.as_str()) {
                self.error(line, Problem::ParamReserved { name });
            } else if params.iter().any(|param| param.name == name) {
                self.error(line, Problem::ParamRepeated { name });
            } else {
                params.push(Param { name, pattern: None });
            }
        }
        params.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        for Lined { line, value: (name, text) } in section.text_table("stream.params_pattern") {
            let Some(param) = params.iter_mut().find(|param| param.name == name) else {
                self.error(line, Problem::PatternWithoutParam { name: form::quoted(&name) });
                continue;
            };
            if text.len() > PATTERN_BYTES_MAX {
                let error = FormError::TooLong { limit: PATTERN_BYTES_MAX };
                self.error(line, Problem::Form { key: format!("stream.params_pattern.{name}"), error });
                continue;
            }
            match regex_lite::Regex::new(&text) {
                Ok(pattern) => param.pattern = Some(pattern),
                Err(error) => self.error(line, Problem::Pattern { name, error: error.to_string() }),
            }
        }
        params
    }

    fn url(&mut self, section: &Section, params: &[Param]) -> Option<UrlTemplate> {
        let text = section.text("stream.url")?;
        let names: Vec<&str> = params.iter().map(|param| param.name.as_str()).collect();
        let error = |error| Problem::Template { key: "stream.url", error };
        UrlTemplate::parse(&text, &names).map_err(|e| self.error(section.line_of("stream.url"), error(e))).ok()
    }

    fn body(&mut self, section: &Section, params: &[Param]) -> Option<BodyTemplate> {
        let text = section.text("stream.body")?;
        let names: Vec<&str> = params.iter().map(|param| param.name.as_str()).collect();
        let error = |error| Problem::Template { key: "stream.body", error };
        BodyTemplate::parse(&text, &names).map_err(|e| self.error(section.line_of("stream.body"), error(e))).ok()
    }

    fn method(&mut self, section: &Section) -> String {
        let method = section.text("stream.method").expect("KEYS gives stream.method a default");
        // What is sent again and again may change nothing: any other method would, or has no body to watch.
        if !matches!(method.as_str(), "GET" | "POST") {
            self.error(section.line_of("stream.method"), Problem::Method);
        }
        method
    }

    /// The request headers at `key`: those that are written there, and those whose values stand elsewhere.
    pub(super) fn headers(&mut self, section: &Section, key: &'static str) -> Headers {
        let members = section.secret_table(key);
        if members.len() > STREAM_HEADERS_MAX {
            let error = FormError::TooMany { limit: STREAM_HEADERS_MAX };
            self.error(section.line_of(key), Problem::Form { key: key.to_owned(), error });
        }
        let mut headers: Vec<(String, Sourced)> = Vec::new();
        for Lined { line, value: (name, value) } in members {
            let bytes = value.secret.expose_secret();
            let has = |needle: &[u8]| bytes.windows(needle.len()).any(|window| window == needle);
            let problem = if !form::is_token(&name) || name.len() > 128 {
                Problem::HeaderName { key }
            } else if RESERVED_HEADERS.contains(&name.to_ascii_lowercase().as_str()) {
                Problem::HeaderReserved { key, name }
            } else if headers.iter().any(|(other, _)| other.eq_ignore_ascii_case(&name)) {
                Problem::HeaderRepeated { key, name }
            } else if has(b"{claims.") || has(b"{query.") || has(b"{message.") {
                Problem::HeaderPlaceholder { key, name }
            } else if !form::is_field_value(bytes) {
                Problem::HeaderValue { key, name }
            } else if bytes.len() > HEADER_VALUE_BYTES_MAX {
                let error = FormError::TooLong { limit: HEADER_VALUE_BYTES_MAX };
                Problem::Form { key: format!("{key}.{name}"), error }
            } else {
                headers.push((name, value));
                continue;
            };
            self.error(line, problem);
        }
        Self::split_headers(headers)
    }

    /// The file of roots that `key` names.
    pub(super) fn ca(&mut self, section: &Section, key: &'static str) -> Option<CaFile> {
        let path = section.text(key)?;
        let line = section.line_of(key);
        match self.sources.file(&path, CA_FILE_BYTES_MAX) {
            Ok(pem) if pem.windows(27).any(|window| window == b"-----BEGIN CERTIFICATE-----") => {
                Some(CaFile { path, pem: pem.into() })
            }
            Ok(_) => {
                self.error(line, Problem::CaWithoutCertificate { key });
                None
            }
            Err(error) => {
                let error = FormError::File { path: form::quoted(&path), error };
                self.error(line, Problem::Form { key: key.to_owned(), error });
                None
            }
        }
    }

    fn ignore(&mut self, section: &Section) -> Vec<Pointer> {
        let mut pointers = Vec::new();
        for text in section.texts("stream.ignore") {
            match Pointer::parse(&text.value) {
                Ok(pointer) => pointers.push(pointer),
                Err(_) => self.error(text.line, Problem::Pointer),
            }
        }
        pointers
    }

    fn warn_of_stream(&mut self, section: &Section, stream: &Options, has_keys: bool) {
        let id = stream.id.to_string();
        if stream.interval < SHORT_INTERVAL {
            self.warn(section.line_of("stream.interval"), Oddity::ShortInterval { id: id.clone() });
        }
        let in_body = stream.body.iter().flat_map(BodyTemplate::query_used);
        let used: Vec<&str> = stream.url.query_used().into_iter().chain(in_body).collect();
        for param in stream.params.iter().filter(|param| !used.contains(&param.name.as_str())) {
            let oddity = Oddity::UnusedParam { id: id.clone(), name: param.name.clone() };
            self.warn(section.line_of("stream.params"), oddity);
        }
        // RFC 9110 section 9.3.1: content in a GET has no defined meaning.
        if stream.body.is_some() && stream.method == "GET" {
            let oddity = Oddity::BodyWithGet { id: id.clone(), method: stream.method.clone() };
            self.warn(section.line_of("stream.body"), oddity);
        }
        let parts = [
            ("stream.connect_timeout", stream.connect_timeout),
            ("stream.first_byte_timeout", stream.first_byte_timeout),
        ];
        for (path, part) in parts {
            if part > stream.timeout {
                let key = path.strip_prefix("stream.").unwrap_or(path);
                self.warn(section.line_of(path), Oddity::TimeoutUnreachable { id: id.clone(), key });
            }
        }
        if stream.ca.is_some() && stream.url.to_string().starts_with("http://") {
            self.warn(section.line_of("stream.ca"), Oddity::CaWithoutTls { id: id.clone() });
        }
        self.warn_of_pace(section, stream);
        self.warn_of_stream_credential(section, &stream.credential);
        self.warn_of_views(section, &stream.views, stream.id.as_str());
        let claim = stream.url.claims_used().into_iter().chain(stream.body.iter().flat_map(BodyTemplate::claims_used));
        let lacking = match claim.into_iter().next() {
            _ if !stream.roles.is_empty() || !stream.views.is_empty() => Some("role".to_owned()),
            _ if !stream.permissions.is_empty() => Some("permission".to_owned()),
            claim => claim.map(|name| format!("claim \"{name}\"")),
        };
        if let (true, Some(what)) = (stream.allow_anonymous, lacking) {
            self.warn(section.line_of("stream.allow_anonymous"), Oddity::AnonymousCannotWatch { id, what });
        } else if !stream.allow_anonymous && !has_keys {
            self.warn(section.line, Oddity::NobodyCanWatch { id });
        }
    }
}

fn first_placeholder(url: Option<&UrlTemplate>, body: Option<&BodyTemplate>) -> Option<String> {
    let claims =
        url.into_iter().flat_map(UrlTemplate::claims_used).chain(body.into_iter().flat_map(BodyTemplate::claims_used));
    let query =
        url.into_iter().flat_map(UrlTemplate::query_used).chain(body.into_iter().flat_map(BodyTemplate::query_used));
    let claims = claims.map(|name| format!("{{claims.{name}}}"));
    claims.chain(query.map(|name| format!("{{query.{name}}}"))).next()
}
