//! `[redis]`: where Redis is, how to log in there, and which channels are listened to.
//!
//! Source: protocol version 1, section 6; <https://www.iana.org/assignments/uri-schemes/prov/redis> for the URL.
//! Memory: what is returned. Errors: [`RedisUrlError`], the operator's fault; it repeats nothing of the URL.
//! Not here: connecting (`runtime::redis`).

use std::net::IpAddr;
use std::time::Duration;

use url::{Host, Url};

use super::meaning::{Check, is_loopback};
use super::walk::Section;
use super::{CA_FILE_BYTES_MAX, Oddity, Problem, form};
use crate::codec::http::percent_decode;
use crate::secret::Secret;
use crate::stream::CaFile;

/// The port of a URL that names none.
const PORT: u16 = 6379;
/// Greatest number of a database: any server has fewer.
const DATABASE_MAX: u32 = 1_000_000;
/// Bytes of a channel's name.
const CHANNEL_BYTES_MAX: usize = 256;

/// The `[redis]` table.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RedisOptions {
    /// Where it is and who logs in.
    pub server: RedisServer,
    /// The roots to trust instead of the system's.
    pub ca: Option<CaFile>,
    /// How long a connection, a login or an answer may take.
    pub timeout: Duration,
    /// Channel of logouts.
    pub channel_logout: String,
    /// Channel of changed permissions.
    pub channel_permissions: String,
    /// Channel of revoked tokens.
    pub channel_revoked: String,
}

/// What `redis.url` says.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RedisServer {
    /// Its host; a name in lower case.
    pub host: Host<String>,
    /// Its port.
    pub port: u16,
    /// Whether it speaks TLS (`rediss://`).
    pub tls: bool,
    /// The ACL user; `None`: the default user.
    pub user: Option<String>,
    /// The password; `None`: none is asked for.
    pub password: Option<Secret>,
    /// The database's number.
    pub database: u32,
}

/// What is wrong with `redis.url`.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum RedisUrlError {
    /// No URL at all.
    #[error("is not a URL: write it as in \"redis://user:password@127.0.0.1:6379/0\"")]
    NotUrl,
    /// Another scheme.
    #[error("has a scheme other than redis:// and rediss:// (TLS)")]
    Scheme,
    /// No host, or one that is none.
    #[error("has no host name or IP address")]
    Host,
    /// A bad escape in user or password.
    #[error("has a user or password with a % that is no escape: write % as %25")]
    Escape,
    /// A user alone.
    #[error("has a user without a password: write user:password@, or :password@ for the default user")]
    UserWithoutPassword,
    /// A path that is no number.
    #[error("has a path that is no database number: write /0 to /{DATABASE_MAX}")]
    Database,
    /// A query or fragment.
    #[error("has a query or fragment: every setting has its own key in [redis]")]
    Query,
}

impl RedisServer {
    /// Reads a URL.
    ///
    /// # Errors
    /// [`RedisUrlError`].
    pub fn parse(text: &str) -> Result<RedisServer, RedisUrlError> {
        let url = Url::parse(text).map_err(|_| RedisUrlError::NotUrl)?;
        let tls = match url.scheme() {
            "redis" => false,
            "rediss" => true,
            _ => return Err(RedisUrlError::Scheme),
        };
        if url.query().is_some() || url.fragment().is_some() {
            return Err(RedisUrlError::Query);
        }
        let host = match url.host() {
            Some(Host::Ipv4(ip)) => Host::Ipv4(ip),
            Some(Host::Ipv6(ip)) => Host::Ipv6(ip),
            Some(Host::Domain(name)) => host(name)?,
            None => return Err(RedisUrlError::Host),
        };
        let decoded = |text: &str| percent_decode(text).map(|text| text.into_owned()).ok_or(RedisUrlError::Escape);
        let user = Some(decoded(url.username())?).filter(|user| !user.is_empty());
        let password = url.password().map(decoded).transpose()?.filter(|password| !password.is_empty());
        if user.is_some() && password.is_none() {
            return Err(RedisUrlError::UserWithoutPassword);
        }
        let database = match url.path() {
            "" | "/" => 0,
            path => {
                let digits = path.strip_prefix('/').filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()));
                let number = digits.and_then(|digits| digits.parse().ok());
                number.filter(|number| *number <= DATABASE_MAX).ok_or(RedisUrlError::Database)?
            }
        };
        let password = password.map(Secret::new);
        Ok(RedisServer { host, port: url.port().unwrap_or(PORT), tls, user, password, database })
    }

    /// The URL with `***` for the password.
    pub fn masked(&self) -> String {
        let scheme = if self.tls { "rediss" } else { "redis" };
        let user = self.user.as_deref().unwrap_or_default();
        // What is shown is escaped as little as its reader needs: it is not read back.
        let user: String = user.chars().map(|c| if c.is_control() || "@:/".contains(c) { '?' } else { c }).collect();
        let login = if self.password.is_some() { format!("{user}:***@") } else { String::new() };
        format!("{scheme}://{login}{}:{}/{}", self.host, self.port, self.database)
    }

    /// Whether it is on this machine.
    fn is_local(&self) -> bool {
        match &self.host {
            Host::Ipv4(ip) => is_loopback((*ip).into()),
            Host::Ipv6(ip) => is_loopback((*ip).into()),
            Host::Domain(name) => name == "localhost" || name.ends_with(".localhost"),
        }
    }
}

/// The host of a URL whose scheme is not one of the web's: such a URL leaves it as it is written.
fn host(name: &str) -> Result<Host<String>, RedisUrlError> {
    if let Ok(ip) = name.parse::<IpAddr>() {
        return Ok(match ip {
            IpAddr::V4(ip) => Host::Ipv4(ip),
            IpAddr::V6(ip) => Host::Ipv6(ip),
        });
    }
    let fits = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
    let is_name = (1..=253).contains(&name.len()) && name.bytes().all(fits);
    if is_name { Ok(Host::Domain(name.to_ascii_lowercase())) } else { Err(RedisUrlError::Host) }
}

impl Check<'_> {
    /// `[redis]`, where the file has it.
    pub(super) fn redis(&mut self, root: &Section) -> Option<RedisOptions> {
        let line = root.line_of_table("redis")?;
        if !root.is_written("redis.url") {
            self.error(line, Problem::Missing { key: "redis.url" });
        }
        let at = root.line_of("redis.url");
        let server = root.secret("redis.url").and_then(|url| {
            let text = std::str::from_utf8(url.expose_secret()).map_err(|_| RedisUrlError::NotUrl);
            text.and_then(RedisServer::parse).map_err(|e| self.error(at, Problem::RedisUrl(e))).ok()
        });
        let ca = root.text("redis.ca").and_then(|path| {
            let line = root.line_of("redis.ca");
            match self.sources().file(&path, CA_FILE_BYTES_MAX) {
                Ok(pem) if pem.windows(27).any(|window| window == b"-----BEGIN CERTIFICATE-----") => {
                    Some(CaFile { path, pem: pem.into() })
                }
                Ok(_) => {
                    self.error(line, Problem::RedisCa);
                    None
                }
                Err(error) => {
                    let error = form::FormError::File { path: form::quoted(&path), error };
                    self.error(line, Problem::Form { key: "redis.ca".to_owned(), error });
                    None
                }
            }
        });
        let channels = ["redis.channel_logout", "redis.channel_permissions", "redis.channel_revoked"];
        let [logout, permissions, revoked] = channels.map(|key| {
            let name = root.text(key).unwrap_or_else(|| panic!("KEYS gives {key} a default"));
            if name.len() > CHANNEL_BYTES_MAX {
                let error = form::FormError::TooLong { limit: CHANNEL_BYTES_MAX };
                self.error(root.line_of(key), Problem::Form { key: key.to_owned(), error });
            }
            name
        });
        if logout == permissions || permissions == revoked || revoked == logout {
            let line = channels.iter().map(|key| root.line_of(key)).max().unwrap_or(line);
            self.error(line, Problem::RedisChannels);
        }
        let server = server?;
        if !server.tls && server.password.is_some() && !server.is_local() {
            self.warn(at, Oddity::RedisPlain);
        }
        if !server.tls && ca.is_some() {
            self.warn(root.line_of("redis.ca"), Oddity::RedisCaWithoutTls);
        }
        Some(RedisOptions {
            server,
            ca,
            timeout: root.duration("redis.timeout"),
            channel_logout: logout,
            channel_permissions: permissions,
            channel_revoked: revoked,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> RedisServer {
        RedisServer::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn a_url_says_where_and_who() {
        let server = parsed("redis://127.0.0.1");
        assert_eq!(server.host, Host::<String>::Ipv4([127, 0, 0, 1].into()));
        assert_eq!((server.port, server.tls, server.database), (6379, false, 0));
        assert_eq!((server.user, server.password), (None, None));
        let server = parsed("rediss://ada:p%40ss%3Aw%2Ford@Redis.Example:6380/12");
        assert_eq!(server.host, Host::Domain("redis.example".to_owned()));
        assert_eq!((server.port, server.tls, server.database), (6380, true, 12));
        assert_eq!(server.user.as_deref(), Some("ada"));
        assert_eq!(server.password, Some(Secret::new(*b"p@ss:w/ord")));
        assert_eq!(parsed("redis://:secret@[::1]:7000/").password, Some(Secret::new(*b"secret")));
        assert_eq!(parsed("redis://:secret@[::1]:7000/").host, Host::<String>::Ipv6(std::net::Ipv6Addr::LOCALHOST));
        // The ports that the web's schemes leave out.
        assert_eq!((parsed("redis://h:80").port, parsed("rediss://h:443").port), (80, 443));
    }

    #[test]
    fn what_is_no_such_url_is_refused() {
        use RedisUrlError as E;
        for (text, error) in [
            ("", E::NotUrl),
            ("127.0.0.1:6379", E::NotUrl),
            ("http://127.0.0.1", E::Scheme),
            ("redis:///0", E::Host),
            ("redis:6379", E::Host),
            ("redis://a%20b", E::Host),
            ("redis://h/x", E::Database),
            ("redis://h/-1", E::Database),
            ("redis://h/1000001", E::Database),
            ("redis://h/0/1", E::Database),
            ("redis://h?db=1", E::Query),
            ("redis://h#a", E::Query),
            ("redis://:p%zz@h", E::Escape),
            ("redis://:p%ff@h", E::Escape),
            ("redis://ada@h", E::UserWithoutPassword),
            ("redis://ada:@h", E::UserWithoutPassword),
        ] {
            assert_eq!(RedisServer::parse(text), Err(error), "{text}");
        }
        assert_eq!(parsed("redis://h/1000000").database, 1_000_000);
    }

    #[test]
    fn a_url_is_shown_without_its_password() {
        for (text, shown) in [
            ("redis://h", "redis://h:6379/0"),
            ("rediss://ada:hunter2@[::1]:7000/3", "rediss://ada:***@[::1]:7000/3"),
            ("redis://:hunter2@h", "redis://:***@h:6379/0"),
            ("redis://a%40b%0a:hunter2@h", "redis://a?b?:***@h:6379/0"),
        ] {
            assert_eq!(parsed(text).masked(), shown);
            assert!(!format!("{:?}", parsed(text)).contains("hunter2"));
        }
    }
}
