//! The configuration in force as TOML, for people: every default filled in, nothing secret shown.
//!
//! Source: protocol version 1, section 1 «Secrets». Memory: the text. Errors: none.
//! Not here: what URLs hide (`stream::template`), which prints itself masked.

use std::fmt::{Display, Write};
use std::time::Duration;

use super::{
    Config, Driver, JwtKey, KeyMaterial, KeySetPlace, KeySetSource, LogFormat, LogLevel, RedisOptions, TlsFiles, moment,
};
use crate::auth::api_key::ApiKey;
use crate::auth::jwks::IssuerOptions;
use crate::auth::session;
use crate::guard::DirectOptions;
use crate::secret::Secret;
use crate::stream;
use crate::stream::budget::Upstream;
use crate::stream::credential::{Credential, Scheme};
use crate::stream::follow::{Following, Kind};
use crate::stream::oauth;
use crate::stream::pace::{EVERY_DAY, Window};
use crate::stream::proxy::Proxy;
use crate::stream::view::{Projection, View};

/// What stands for a secret.
const MASK: &str = "\"***\"";

pub(super) fn masked_toml(config: &Config) -> String {
    let mut page = Page(String::new());
    server(&mut page, config);
    config.tls.iter().for_each(|files| tls(&mut page, files));
    admin_and_log(&mut page, config);
    limits(&mut page, config);
    auth(&mut page, config);
    config.auth.session.iter().for_each(|options| session(&mut page, options));
    config.jwt_keys.iter().for_each(|key| jwt_key(&mut page, key));
    let issuers = config.auth.jwt.key_sets.iter().zip(&config.key_sets);
    issuers.for_each(|(issuer, source)| key_set(&mut page, issuer, source));
    config.api_keys.iter().for_each(|key| api_key(&mut page, key));
    config.redis.iter().for_each(|options| redis(&mut page, options));
    config.direct.iter().for_each(|options| direct(&mut page, options));
    config.streams.iter().for_each(|options| stream(&mut page, options));
    config.upstreams.iter().for_each(|options| upstream(&mut page, options));
    config.proxy.iter().for_each(|options| proxy(&mut page, options));
    config.actions.iter().for_each(|options| action(&mut page, options));
    page.0
}

fn server(page: &mut Page, config: &Config) {
    let (server, connection) = (&config.server, &config.connection);
    page.header("[server]");
    page.line("listen", quoted(&server.listen.to_string()));
    page.line("plaintext", server.plaintext);
    page.line("trusted_proxies", list(connection.trusted_proxies.iter().map(ToString::to_string)));
    page.line("share_port", server.share_port);
    page.line("cores", server.cores);
    page.line(
        "driver",
        quoted(match server.driver {
            Driver::Auto => "auto",
            Driver::IoUring => "io_uring",
            Driver::Epoll => "epoll",
        }),
    );
    page.line_unless_unset("public_origin", connection.public_origin.as_deref().map(quoted));
    page.line("heartbeat", quoted_duration(connection.heartbeat));
    page.line("drain", quoted_duration(connection.drain));
    page.line("allowed_origins", list(&connection.allowed_origins));
    page.line("permessage_deflate", connection.permessage_deflate);
    page.line("playground", connection.playground);
    page.line("echo", connection.echo);
    page.line("state", quoted(&server.state));
}

fn tls(page: &mut Page, files: &TlsFiles) {
    page.header("[[server.tls]]");
    page.line("cert", quoted(&files.cert));
    page.line("key", quoted(&files.key));
}

fn admin_and_log(page: &mut Page, config: &Config) {
    page.header("[admin]");
    page.line("listen", quoted(&config.admin.listen.to_string()));
    page.line_unless_unset("key", config.admin.key.as_ref().map(|_| MASK));
    page.line("names", list(&config.admin.names));
    page.line("stream_urls", list(config.admin.stream_urls.allow.iter().map(ToString::to_string)));
    page.header("[log]");
    page.line(
        "level",
        quoted(match config.log.level {
            LogLevel::Error => "error",
            LogLevel::Warn => "warn",
            LogLevel::Info => "info",
            LogLevel::Debug => "debug",
            LogLevel::Trace => "trace",
        }),
    );
    page.line(
        "format",
        quoted(match config.log.format {
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        }),
    );
}

fn limits(page: &mut Page, config: &Config) {
    let limits = &config.limits;
    page.header("[limits]");
    page.line("connections", limits.connections);
    page.line("connections_per_address", limits.connections_per_address);
    page.line("connections_per_subject", limits.connections_per_subject);
    page.line("subscriptions_per_connection", limits.subscriptions_per_connection);
    page.line("streams", limits.streams);
    page.line("streams_per_subject", limits.streams_per_subject);
    page.line("streams_per_address", limits.streams_per_address);
    page.line("selects_per_stream", limits.selects_per_stream);
    page.line("history_bytes_total", budget(limits.history_bytes_total));
    page.line("pinned_bytes", budget(limits.pinned_bytes));
    page.line("handshakes_per_second_per_address", limits.handshakes_per_second_per_address);
    page.line("keep_alive", quoted_duration(limits.keep_alive));
    page.line("handshake_timeout", quoted_duration(limits.handshake_timeout));
    page.line("request_head_bytes_max", size(limits.request_head_bytes_max.into()));
    page.line("message_bytes_max", size(limits.message_bytes_max.into()));
    page.line("messages_per_second", limits.messages_per_second);
    page.line("auth_failures_per_minute", limits.auth_failures_per_minute);
    page.line("write_stall", quoted_duration(limits.write_stall));
}

fn auth(page: &mut Page, config: &Config) {
    let (auth, jwt) = (&config.auth, &config.auth.jwt);
    page.header("[auth]");
    page.line("query_token", auth.query_token);
    page.line("reauth_before", quoted_duration(auth.reauth_before));
    page.line("token_cache", auth.token_cache);
    page.line_unless_unset("first_message", auth.first_message.map(quoted_duration));
    page.line("revocation_keep", quoted_duration(auth.revocation_keep));
    page.header("[auth.jwt]");
    page.line("leeway", quoted_duration(jwt.leeway));
    page.line_unless_unset("issuer", Some(list(&jwt.issuers)).filter(|_| !jwt.issuers.is_empty()));
    page.line_unless_unset("audience", Some(list(&jwt.audiences)).filter(|_| !jwt.audiences.is_empty()));
    page.line("cookie", quoted(&jwt.cookie));
    page.line("close_on_key_removal", jwt.close_on_key_removal);
    page.header("[auth.jwt.claims]");
    page.line("sub", quoted(&jwt.claims.sub));
    page.line("role", quoted(&jwt.claims.role));
    page.line("roles", quoted(&jwt.claims.roles));
    page.line("permissions", quoted(&jwt.claims.permissions));
    page.line("streams", quoted(&jwt.claims.streams));
}

fn session(page: &mut Page, session: &session::Options) {
    page.header("[auth.session]");
    page.line("secrets", format!("[{}]", vec![MASK; session.secrets.len()].join(", ")));
    page.line("cookie", quoted(&session.cookie));
    page.line("prefix", quoted(&session.prefix));
    page.line("user", quoted(session.user.as_str()));
    page.line("role", quoted(session.role.as_str()));
    page.line("company", quoted(session.company.as_str()));
    page.line("permissions", quoted(session.permissions.as_str()));
    page.line("reread", quoted_duration(session.reread));
    page.line("grace", quoted_duration(session.grace));
    page.line("touch", session.touch);
}

fn jwt_key(page: &mut Page, key: &JwtKey) {
    page.header("[[auth.jwt.key]]");
    page.line_unless_unset("kid", key.kid.as_deref().map(quoted));
    page.line("alg", quoted(key.alg.name()));
    match key.material {
        KeyMaterial::Secret(_) => page.line("secret", MASK),
        KeyMaterial::PublicKey(_) => page.line("public_key", MASK),
    }
}

fn key_set(page: &mut Page, issuer: &IssuerOptions, source: &KeySetSource) {
    page.header("[[auth.jwt.jwks]]");
    page.line("issuer", quoted(&issuer.issuer));
    match &source.place {
        KeySetPlace::Url { url, ca } => {
            let mut shown = url.clone();
            if shown.query().is_some() {
                shown.set_query(Some("***"));
            }
            page.line("url", quoted(shown.as_str()));
            page.line_unless_unset("ca", ca.as_ref().map(|ca| quoted(&ca.path)));
        }
        KeySetPlace::File { path } => page.line("file", quoted(path)),
    }
    page.line("algs", list(issuer.algorithms.iter().map(|algorithm| algorithm.name())));
    page.line_unless_unset("audience", Some(list(&issuer.audiences)).filter(|_| !issuer.audiences.is_empty()));
}

fn api_key(page: &mut Page, key: &ApiKey) {
    page.header("[[auth.api_key]]");
    page.line("id", quoted(key.id.as_str()));
    page.line("hash", MASK);
    page.line("streams", list(&key.streams));
    page.line_unless_unset("expires", key.expires.map(moment::text));
    page.line("rate", key.rate);
    page.line("roles", list(&key.roles));
    page.line("permissions", list(&key.permissions));
}

fn redis(page: &mut Page, redis: &RedisOptions) {
    page.header("[redis]");
    page.line("url", quoted(&redis.server.masked()));
    page.line_unless_unset("ca", redis.ca.as_ref().map(|ca| quoted(&ca.path)));
    page.line("timeout", quoted_duration(redis.timeout));
    page.line("channel_logout", quoted(&redis.channel_logout));
    page.line("channel_permissions", quoted(&redis.channel_permissions));
    page.line("channel_revoked", quoted(&redis.channel_revoked));
}

fn direct(page: &mut Page, direct: &DirectOptions) {
    page.header("[direct]");
    page.line("allow", list(direct.policy.allow.iter().map(ToString::to_string)));
    page.line("allow_public", direct.policy.allow_public);
    page.line("cookies", direct.policy.cookies);
    page.line("roles", list(&direct.roles));
    page.line("interval_min", quoted_duration(direct.interval_min));
    page.line("sessions_per_subject", direct.sessions_per_subject);
    page.line("session_ttl_max", quoted_duration(direct.session_ttl_max));
    page.line("linger", quoted_duration(direct.linger));
    page.line("response_bytes_max", size(direct.response_bytes_max));
    page.line("timeout", quoted_duration(direct.timeout));
    page.line_unless_unset("secret", direct.secret.as_ref().map(|_| MASK));
}

fn stream(page: &mut Page, stream: &stream::Options) {
    page.header("[[stream]]");
    page.line("id", quoted(stream.id.as_str()));
    page.line("url", quoted(&stream.url.to_string()));
    page.line("interval", quoted_duration(stream.interval));
    page.line("method", quoted(&stream.method));
    page.line("headers", headers(&stream.headers, &stream.credential));
    page.line_unless_unset("body", stream.body.as_ref().map(|_| MASK));
    page.line("params", list(stream.params.iter().map(|param| param.name.as_str())));
    let patterns = stream.params.iter().filter_map(|param| Some((param, param.pattern.as_ref()?)));
    page.line("params_pattern", table(patterns.map(|(param, it)| (param.name.as_str(), quoted(it.as_str())))));
    page.line_unless_unset("ca", stream.ca.as_ref().map(|ca| quoted(&ca.path)));
    page.line("connect_timeout", quoted_duration(stream.connect_timeout));
    page.line("first_byte_timeout", quoted_duration(stream.first_byte_timeout));
    page.line("timeout", quoted_duration(stream.timeout));
    page.line("response_bytes_max", size(stream.response_bytes_max));
    page.line("backoff_max", quoted_duration(stream.backoff_max));
    page.line("linger", quoted_duration(stream.linger));
    page.line("keep_warm", stream.keep_warm);
    page.line("history", stream.history);
    page.line("history_bytes", size(stream.history_bytes));
    page.line_unless_unset("filter", stream.filter.as_ref().map(|filter| quoted(filter.as_str())));
    page.line("ignore", list(stream.ignore.iter().map(ToString::to_string)));
    page.line_unless_unset("array_key", stream.array_key.as_deref().map(quoted));
    page.line("hash", stream.proof.hash);
    page.line("allow_anonymous", stream.allow_anonymous);
    page.line("roles", list(&stream.roles));
    page.line("permissions", list(&stream.permissions));
    page.line_unless_unset("hook_secret", hook_secrets(stream.hook_secrets.len()));
    match &stream.follow {
        None => {
            page.line("kind", quoted("poll"));
            pace(page, stream);
        }
        Some(following) => follow(page, following),
    }
    credential(page, "stream", &stream.credential);
    if let Some(signer) = &stream.proof.signer {
        page.header("[stream.sign]");
        page.line("key_id", quoted(signer.key_id()));
        page.line("secret", MASK);
    }
    stream.views.iter().for_each(|view| self::view(page, view));
}

fn follow(page: &mut Page, following: &Following) {
    page.line("kind", quoted(if following.kind == Kind::Sse { "sse" } else { "ndjson" }));
    if following.kind == Kind::Sse {
        page.line("events", list(&following.events));
    }
    let per_second = Duration::from_secs(1).as_nanos() / following.gap.as_nanos().max(1);
    page.line("events_per_second", per_second);
    page.line("idle_timeout", quoted_duration(following.idle_timeout));
}

fn pace(page: &mut Page, stream: &stream::Options) {
    page.line("respect_max_age", stream.pacing.respect_max_age);
    page.line("pages_max", stream.pages_max);
    page.line("redirects_max", stream.redirects_max);
    page.line_unless_unset("interval_min", stream.pacing.adaptive.map(|bounds| quoted_duration(bounds.min)));
    page.line_unless_unset("interval_max", stream.pacing.adaptive.map(|bounds| quoted_duration(bounds.max)));
    page.line("utc_offset", quoted(&stream::pace::offset_text(stream.pacing.utc_offset_minutes)));
    stream.pacing.windows.iter().for_each(|window| self::window(page, window));
}

fn window(page: &mut Page, window: &Window) {
    page.header("[[stream.windows]]");
    page.line("from", quoted(&stream::pace::time_text(window.from)));
    page.line("to", quoted(&stream::pace::time_text(window.to)));
    let days = if window.days == EVERY_DAY { 0 } else { window.days };
    page.line("days", list(stream::pace::days_of(days)));
    page.line_unless_unset("interval", window.interval.map(quoted_duration));
}

fn proxy(page: &mut Page, proxy: &Proxy) {
    page.header("[proxy]");
    page.line("url", quoted(&proxy.masked()));
    page.line("except", list(proxy.except.iter().map(ToString::to_string)));
}

fn upstream(page: &mut Page, upstream: &Upstream) {
    page.header("[[upstream]]");
    page.line("origin", quoted(&upstream.origin));
    page.line_unless_unset("rate", upstream.rate.map(|rate| quoted(&rate.every.to_string())));
    page.line("burst", upstream.rate.map_or(1, |rate| rate.burst));
    page.line("breaker", upstream.breaker);
}

/// One secret is shown as one, several as an array.
fn hook_secrets(count: usize) -> Option<String> {
    match count {
        0 => None,
        1 => Some(MASK.to_owned()),
        _ => Some(format!("[{}]", vec![MASK; count].join(", "))),
    }
}

/// One stream as TOML, as [`masked_toml`] shows it.
pub(super) fn stream_toml(stream: &stream::Options) -> String {
    let mut page = Page(String::new());
    self::stream(&mut page, stream);
    page.0
}

fn view(page: &mut Page, view: &View) {
    page.header("[[stream.view]]");
    page.line("roles", list(&view.roles));
    match &view.projection {
        Projection::Pointers(places) => page.line("pointers", list(places.pointers().iter().map(ToString::to_string))),
        Projection::Path(path) => page.line("path", quoted(path.as_str())),
    }
}

fn action(page: &mut Page, action: &stream::action::Options) {
    page.header("[[action]]");
    page.line("type", quoted(&action.kind));
    page.line("roles", list(&action.roles));
    page.line("permissions", list(&action.permissions));
    page.line("method", quoted(&action.method));
    page.line("url", quoted(&action.url.to_string()));
    page.line("headers", headers(&action.headers, &action.credential));
    page.line_unless_unset("body", action.body.as_ref().map(|_| MASK));
    page.line_unless_unset("schema", action.schema.as_ref().map(|schema| quoted(schema.text())));
    page.line_unless_unset("rate", action.rate.map(|rate| quoted(&rate.to_string())));
    page.line("refresh", list(action.refresh.iter().map(|id| id.as_str())));
    page.line("reply_body", action.reply_body);
    page.line("error_body", action.error_body);
    page.line_unless_unset("ca", action.ca.as_ref().map(|ca| quoted(&ca.path)));
    page.line("connect_timeout", quoted_duration(action.connect_timeout));
    page.line("first_byte_timeout", quoted_duration(action.first_byte_timeout));
    page.line("timeout", quoted_duration(action.timeout));
    page.line("response_bytes_max", size(action.response_bytes_max));
    credential(page, "action", &action.credential);
}

fn headers(written: &[(String, Secret)], credential: &Credential) -> String {
    let elsewhere = credential.headers.iter().map(|(name, _)| name);
    let names = written.iter().map(|(name, _)| name).chain(elsewhere);
    table(names.map(|name| (name.as_str(), MASK.to_owned())))
}

/// `client_cert`, `client_key`, and the table `auth` of that one, which ends the keys of its own.
fn credential(page: &mut Page, of: &str, credential: &Credential) {
    if let Some(identity) = &credential.identity {
        page.line("client_cert", quoted(&identity.cert));
        page.line("client_key", quoted(&identity.key));
    }
    let Some(scheme) = &credential.scheme else { return };
    page.header(&format!("[{of}.auth]"));
    let kind = match scheme {
        Scheme::Bearer(_) => "bearer",
        Scheme::Basic { .. } => "basic",
        Scheme::Header { .. } => "header",
        Scheme::Query { .. } => "query",
        Scheme::OAuth(_) => "oauth2",
    };
    page.line("kind", quoted(kind));
    match scheme {
        Scheme::Bearer(_) => page.line("token", MASK),
        Scheme::Basic { .. } => {
            page.line("username", MASK);
            page.line("password", MASK);
        }
        Scheme::Header { name, .. } | Scheme::Query { name, .. } => {
            page.line("name", quoted(name));
            page.line("value", MASK);
        }
        Scheme::OAuth(options) => oauth(page, options),
    }
}

fn oauth(page: &mut Page, options: &oauth::Options) {
    let refreshes = options.refresh_token().is_some();
    page.line("grant", quoted(if refreshes { "refresh_token" } else { "client_credentials" }));
    let mut shown = options.token_url.clone();
    if shown.query().is_some() {
        shown.set_query(Some("***"));
    }
    page.line("token_url", quoted(shown.as_str()));
    page.line("client_id", MASK);
    page.line_unless_unset("client_secret", options.client_secret.as_ref().map(|_| MASK));
    page.line(
        "client_auth",
        quoted(match options.client_auth {
            oauth::ClientAuth::Basic => "basic",
            oauth::ClientAuth::Post => "post",
        }),
    );
    page.line_unless_unset("refresh_token", refreshes.then_some(MASK));
    page.line_unless_unset("scope", options.scope.as_deref().map(quoted));
    page.line_unless_unset("audience", options.audience.as_deref().map(quoted));
    // Whatever an endpoint wants besides may be a secret.
    let masked = options.params.iter().map(|(name, _)| (name.as_str(), MASK.to_owned()));
    page.line("params", table(masked));
    page.line_unless_unset("ca", options.ca.as_ref().map(|ca| quoted(&ca.path)));
}

struct Page(String);

impl Page {
    fn header(&mut self, header: &str) {
        if !self.0.is_empty() {
            self.0.push('\n');
        }
        self.0.push_str(header);
        self.0.push('\n');
    }

    fn line(&mut self, key: &str, value: impl Display) {
        writeln!(self.0, "{key} = {value}").expect("writing to a String does not fail");
    }

    fn line_unless_unset(&mut self, key: &str, value: Option<impl Display>) {
        if let Some(value) = value {
            self.line(key, value);
        }
    }
}

/// `text` as a TOML basic string.
pub(super) fn quoted(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for c in text.chars() {
        match c {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            c if c.is_control() => {
                write!(quoted, "\\u{:04X}", u32::from(c)).expect("writing to a String does not fail");
            }
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

fn list<S: AsRef<str>>(texts: impl IntoIterator<Item = S>) -> String {
    let quoted: Vec<String> = texts.into_iter().map(|text| quoted(text.as_ref())).collect();
    format!("[{}]", quoted.join(", "))
}

/// An inline table; `members` hold values that are TOML already.
fn table<'n>(members: impl Iterator<Item = (&'n str, String)>) -> String {
    let members: Vec<String> = members.map(|(name, value)| format!("{} = {value}", quoted(name))).collect();
    if members.is_empty() { "{}".to_owned() } else { format!("{{ {} }}", members.join(", ")) }
}

/// A duration in the largest unit that says it exactly.
pub(super) fn duration(duration: Duration) -> String {
    let ms = duration.as_millis();
    let units = [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000)];
    match units.into_iter().find(|(_, unit_ms)| ms.is_multiple_of(*unit_ms)) {
        _ if ms == 0 => "0s".to_owned(),
        // As people write it.
        _ if ms == 60_000 => "60s".to_owned(),
        Some((unit, unit_ms)) => format!("{}{unit}", ms / unit_ms),
        None => format!("{ms}ms"),
    }
}

fn quoted_duration(span: Duration) -> String {
    quoted(&duration(span))
}

/// A size in the largest unit that says it exactly, as TOML.
pub(super) fn size(bytes: u64) -> String {
    let units = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    match units.into_iter().find(|(_, unit_bytes)| bytes > 0 && bytes.is_multiple_of(*unit_bytes)) {
        Some((unit, unit_bytes)) => format!("\"{}{unit}\"", bytes / unit_bytes),
        None => bytes.to_string(),
    }
}

/// A size of which the greatest is written 0, «unlimited».
fn budget(bytes: u64) -> String {
    if bytes == u64::MAX { "0".to_owned() } else { size(bytes) }
}
