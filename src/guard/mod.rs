//! What a caller may have this server connect to: the guard against forged requests (SSRF) of direct mode and ephemeral
//! sessions, and of the streams that administrators make. URL in, [`Target`] or [`Blocked`] out.
//!
//! Source: protocol version 1, sections 1 and 7; OWASP's «Server-Side Request Forgery Prevention» for what to expect; each
//! part names the standards it keeps to.
//! Memory: a policy's patterns; a URL while it is judged; at most the resolver's addresses of a target.
//! Errors: [`Blocked`]: callers are told that a target is blocked, operators why. None holds a path, a query or a header.
//! Not here: looking names up and connecting (`runtime::fetch`), the URLs of the operator's file, which are not judged.
//!
//! A target is judged in two steps, since a name says little. [`Policy::judge`] reads the URL and gives an [`Aim`]: a name or an
//! address that nothing speaks against. [`Aim::pin`] is given *all* that the name resolves to and gives a [`Target`], whose
//! addresses are the only ones that are connected to: there is no second look-up between the check and the use. The next
//! connection is the next look-up, and is judged again.

mod address;
mod allow;
mod headers;
mod name;
mod url;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ::url::{Host, Url};

pub use address::{Special, special};
pub use allow::{Pattern, PatternError};
pub use headers::HeaderFault;
pub use name::NameFault;
pub use url::UrlFault;

use crate::limits::REDIRECTS_MAX;
use crate::secret::Secret;
use allow::Listed;

/// The `[direct]` table: who may use direct mode and ephemeral sessions, for what, and within which bounds.
#[derive(Clone, Debug, PartialEq)]
pub struct DirectOptions {
    /// What they may reach.
    pub policy: Arc<Policy>,
    /// Any one of these is needed, where there are some.
    pub roles: Vec<String>,
    /// A smaller `interval_ms` is raised to this.
    pub interval_min: Duration,
    /// Ephemeral sessions of one subject at once; 0: unlimited.
    pub sessions_per_subject: u32,
    /// A longer `ttl_s` is lowered to this.
    pub session_ttl_max: Duration,
    /// How long polling goes on after the last watcher, and a session too.
    pub linger: Duration,
    /// Bytes of one response, inflated.
    pub response_bytes_max: u64,
    /// For one whole exchange.
    pub timeout: Duration,
    /// What processes that share a store share besides, so that they call the same by the same name.
    pub secret: Option<Secret>,
}

/// What callers may reach.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Policy {
    /// `direct.allow`.
    pub allow: Vec<Pattern>,
    /// `direct.allow_public`: whatever is public, besides.
    pub allow_public: bool,
    /// `direct.cookies`: callers may set `Cookie`.
    pub cookies: bool,
    /// Names and addresses of the operator's own network count as public, and every port is one of HTTP: for those who
    /// administer the server. Metadata services, link-local addresses and what is no machine's stay closed.
    pub own: bool,
}

/// Why a target is not connected to, for the operator. [`reason`](Blocked::reason) is one stable word for programs.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Blocked {
    /// The URL.
    #[error("{0}")]
    Url(UrlFault),
    /// The name in it.
    #[error("{0}")]
    Name(NameFault),
    /// The address in it.
    #[error("{address} is in {range}")]
    Address {
        /// The address.
        address: IpAddr,
        /// What it is in.
        range: Special,
    },
    /// An address that the name resolves to.
    #[error("the name resolves to {address}, which is in {range}")]
    Resolved {
        /// The first such address.
        address: IpAddr,
        /// What it is in.
        range: Special,
    },
    /// The name resolves to nothing.
    #[error("the name resolves to no address")]
    NoAddress,
    /// A port that is for other protocols.
    #[error("port {0} is not one of HTTP")]
    Port(u16),
    /// Not in `direct.allow`, and `direct.allow_public` is not set; or not in `admin.stream_urls`.
    #[error("not listed")]
    NotListed,
    /// A header.
    #[error("{0}")]
    Header(HeaderFault),
    /// A redirect that leads nowhere.
    #[error("a redirect of status {0} without a place that can be followed")]
    Location(u16),
    /// From `https` to `http`.
    #[error("a redirect from https to http")]
    Downgrade,
    /// One redirect too many.
    #[error("more than {REDIRECTS_MAX} redirects")]
    TooManyRedirects,
}

impl Blocked {
    /// The reason in one word.
    pub const fn reason(&self) -> &'static str {
        match self {
            Blocked::Url(UrlFault::TooLong) => "too_long",
            Blocked::Url(UrlFault::Character) => "bad_character",
            Blocked::Url(UrlFault::Percent | UrlFault::EncodedControl) => "bad_encoding",
            Blocked::Url(UrlFault::Scheme) => "bad_scheme",
            Blocked::Url(UrlFault::User) => "user_in_url",
            Blocked::Url(UrlFault::EncodedHost | UrlFault::Parse(_) | UrlFault::Ambiguous) => "bad_url",
            Blocked::Url(UrlFault::PortZero) | Blocked::Port(_) => "bad_port",
            Blocked::Name(NameFault::Shape | NameFault::Character) => "bad_name",
            Blocked::Name(NameFault::SingleLabel | NameFault::Internal(_)) => "internal_name",
            Blocked::Name(NameFault::Metadata(_)) => "metadata_name",
            Blocked::Name(NameFault::Chosen(_)) => "chosen_name",
            Blocked::Address { .. } => "special_address",
            Blocked::Resolved { .. } => "resolves_to_special_address",
            Blocked::NoAddress => "no_address",
            Blocked::NotListed => "not_listed",
            Blocked::Header(HeaderFault::Name | HeaderFault::Value | HeaderFault::Repeated) => "bad_header",
            Blocked::Header(HeaderFault::TooLong | HeaderFault::TooMany) => "header_too_large",
            Blocked::Header(HeaderFault::Framing) => "framing_header",
            Blocked::Header(HeaderFault::Routing) => "routing_header",
            Blocked::Header(HeaderFault::Impersonation) => "impersonating_header",
            Blocked::Header(HeaderFault::Cookie) => "cookie",
            Blocked::Header(HeaderFault::Metadata) => "metadata_header",
            Blocked::Location(_) => "bad_redirect",
            Blocked::Downgrade => "downgrade",
            Blocked::TooManyRedirects => "too_many_redirects",
        }
    }
}

/// Ports from 1024 on that speak something else than HTTP, or the HTTP of a machine's own control plane. Those that browsers
/// refuse (the Fetch standard, section 2.9) and those of databases, queues, caches and orchestrators.
#[rustfmt::skip]
const CLOSED_PORTS: &[u16] = &[
    1080, 1099, 1433, 1434, 1521, 1719, 1720, 1723, 1883, 2049, 2181, 2375, 2376, 2377, 2379, 2380, 3128, 3260, 3306, 3389, 3659,
    4045, 4190, 4369, 5060, 5061, 5432, 5433, 5555, 5671, 5672, 5900, 5901, 5902, 5903, 5984, 5985, 5986, 6000, 6379, 6380, 6443,
    6566, 6665, 6666, 6667, 6668, 6669, 6679, 6697, 7000, 7001, 7199, 8300, 8301, 8302, 8500, 8600, 8883, 9042, 9092, 9160, 9200,
    9300, 10000, 10050, 10051, 10080, 10248, 10249, 10250, 10255, 10256, 11211, 11300, 15672, 26379, 27017, 27018, 27019, 28015,
    28017, 50000, 61613, 61616,
];

/// Whether strangers may have this port connected to: those of HTTP, and from 1024 on what is not [`CLOSED_PORTS`].
fn is_open_port(port: u16) -> bool {
    matches!(port, 80 | 443) || (port >= 1024 && !CLOSED_PORTS.contains(&port))
}

impl Policy {
    /// `allow_public` and nothing else.
    pub fn public() -> Policy {
        Policy { allow_public: true, ..Policy::default() }
    }

    /// For streams that administrators make: what `admin.stream_urls` lists, or where that lists nothing whatever is public or
    /// in the operator's own network.
    pub fn of_administrators(allow: Vec<Pattern>) -> Policy {
        Policy { allow_public: allow.is_empty(), allow, cookies: true, own: true }
    }

    /// For places on other hosts than the one that was named, which an upstream's redirect leads to: the operator's own network
    /// is none of an upstream's business, unless the operator has listed what is in reach.
    pub fn elsewhere(&self) -> Policy {
        Policy { own: self.own && !self.allow_public, ..self.clone() }
    }

    /// Judges a URL that a caller gave.
    ///
    /// # Errors
    /// [`Blocked`].
    pub fn judge(&self, text: &str) -> Result<Aim, Blocked> {
        self.judge_url(url::read(text).map_err(Blocked::Url)?)
    }

    /// Judges a header that a caller gave.
    ///
    /// # Errors
    /// [`Blocked::Header`].
    pub fn judge_header(&self, name: &str, value: &[u8]) -> Result<(), Blocked> {
        headers::check(name, value, self.cookies).map_err(Blocked::Header)
    }

    /// Judges all headers that a caller gave, and their number.
    ///
    /// # Errors
    /// [`Blocked::Header`].
    pub fn judge_headers<'h>(&self, headers: impl IntoIterator<Item = (&'h str, &'h [u8])>) -> Result<(), Blocked> {
        headers::check_all(headers, self.cookies).map_err(Blocked::Header)
    }

    /// `url` has been read by this guard.
    fn judge_url(&self, url: Url) -> Result<Aim, Blocked> {
        let listed = self.allow.iter().filter_map(|pattern| pattern.matches(&url));
        // The most exact counts: a host that is written out is the operator's own choice.
        let listed = listed.min_by_key(|listed| matches!(listed, Listed::Domain));
        if listed.is_none() {
            if !self.allow_public {
                return Err(Blocked::NotListed);
            }
            let port = url.port_or_known_default().unwrap_or_default();
            if !self.own && !is_open_port(port) {
                return Err(Blocked::Port(port));
            }
        }
        let chosen_by_operator = listed == Some(Listed::Host);
        let host = url.host().ok_or(Blocked::Url(UrlFault::Scheme))?;
        let address = match host {
            Host::Domain(domain) => {
                name::check_shape(domain).map_err(Blocked::Name)?;
                if !chosen_by_operator {
                    let check = if self.own { name::check_administered } else { name::check_public };
                    check(domain).map_err(Blocked::Name)?;
                }
                None
            }
            Host::Ipv4(ip) => Some(IpAddr::V4(ip)),
            Host::Ipv6(ip) => Some(IpAddr::V6(ip)),
        };
        match address.map(|address| (address, closed(address, self.own))) {
            Some((address, Some(range))) if !chosen_by_operator => Err(Blocked::Address { address, range }),
            _ => Ok(Aim {
                url,
                address: address.map(address::canonical),
                listed: listed.is_some(),
                chosen: chosen_by_operator || self.own,
                own: self.own,
            }),
        }
    }
}

/// The range that closes `address`; `own`: not to those of the operator's own network.
fn closed(address: IpAddr, own: bool) -> Option<Special> {
    special(address).filter(|range| !(own && range.is_own()))
}

/// How the addresses of a target are judged. It is all that [`Aim::pin`] goes by: a connection that was opened under one is
/// to one of the addresses that any other target of the same host would have been let through to under the same, and under no
/// other.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Judgement {
    /// The URL has the address itself: whoever may name that URL may connect to it.
    Spelled,
    /// All that the name resolves to must be public.
    Public,
    /// It may be of the operator's own network.
    Own,
}

/// A URL that nothing speaks against. Where its host is a name, what that resolves to is still to be judged.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Aim {
    url: Url,
    /// The host, where it is an address.
    address: Option<IpAddr>,
    listed: bool,
    /// Whether its name may be one of the operator's own network.
    own: bool,
    /// See [`Aim::is_chosen`].
    chosen: bool,
}

impl Aim {
    /// The URL as it is sent: normal, without user and fragment.
    pub fn url(&self) -> &Url {
        &self.url
    }

    /// The name to be looked up; `None`: its host is an address.
    pub fn name(&self) -> Option<&str> {
        self.url.domain()
    }

    /// Whether the operator has listed it; else it is public.
    pub fn is_listed(&self) -> bool {
        self.listed
    }

    /// Whether the operator has listed this very host, or the administrator has named it: there is no secret in whether its name is one.
    pub fn is_chosen(&self) -> bool {
        self.chosen
    }

    /// How its addresses are judged.
    pub fn judgement(&self) -> Judgement {
        match (self.address, self.own) {
            (Some(_), _) => Judgement::Spelled,
            (None, true) => Judgement::Own,
            (None, false) => Judgement::Public,
        }
    }

    /// The target, of all that a lookup of [`name`](Aim::name) answered: one address that is closed to strangers closes the
    /// name. Where there is no name, `answers` are not looked at.
    ///
    /// # Errors
    /// [`Blocked::Resolved`], [`Blocked::NoAddress`].
    pub fn pin(self, answers: &[IpAddr]) -> Result<Target, Blocked> {
        let addresses: Arc<[IpAddr]> = match self.address {
            Some(address) => Arc::new([address]),
            None => {
                let closed = answers.iter().find_map(|&address| Some((address, closed(address, self.own)?)));
                if let Some((address, range)) = closed {
                    return Err(Blocked::Resolved { address, range });
                }
                answers.iter().map(|&address| address::canonical(address)).collect()
            }
        };
        if addresses.is_empty() {
            return Err(Blocked::NoAddress);
        }
        Ok(Target { url: self.url, addresses })
    }
}

/// What was judged, and so what is connected to. Nothing but [`Aim::pin`] makes one.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Target {
    url: Url,
    addresses: Arc<[IpAddr]>,
}

impl Target {
    /// The URL as it is sent.
    pub fn url(&self) -> &Url {
        &self.url
    }

    /// The port that is connected to.
    pub fn port(&self) -> u16 {
        self.url.port_or_known_default().expect("http and https have a default")
    }

    /// The addresses that may be connected to, in the order they are tried; one at least.
    pub fn addresses(&self) -> &Arc<[IpAddr]> {
        &self.addresses
    }
}

/// Reads a `Location`, which may be relative to `base`, as strictly as a caller's URL. Where it leads is not judged.
///
/// # Errors
/// [`Blocked::Url`].
pub fn follow(base: &Url, location: &str) -> Result<Url, Blocked> {
    url::follow(base, location).map_err(Blocked::Url)
}

/// The way of a request from one place to the next, each of which is judged as if the caller had named it.
#[derive(Clone, Debug)]
pub struct Redirects<'p> {
    policy: &'p Policy,
    at: Url,
    followed: u8,
    own_headers: bool,
}

/// What is done with a response.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Hop {
    /// It is no redirect.
    Final,
    /// Another request goes there.
    To {
        /// The next place.
        aim: Aim,
        /// Whether the caller's headers and body go with it: to the origin they were meant for, and no other.
        own_headers: bool,
    },
}

impl<'p> Redirects<'p> {
    /// From `start` on, by `policy`.
    pub fn new(policy: &'p Policy, start: &Aim) -> Redirects<'p> {
        Redirects::from(policy, start.url.clone())
    }

    /// From `start` on, which was not judged.
    pub fn from(policy: &'p Policy, start: Url) -> Redirects<'p> {
        Redirects { policy, at: start, followed: 0, own_headers: true }
    }

    /// Takes a response's status and `Location`.
    ///
    /// # Errors
    /// [`Blocked`]: nothing further is asked for.
    pub fn hop(&mut self, status: u16, location: Option<&str>) -> Result<Hop, Blocked> {
        if !(300..=399).contains(&status) || status == 304 {
            return Ok(Hop::Final);
        }
        // RFC 9110 section 15.4: 300 is a choice, 305 and 306 are gone.
        let location =
            location.filter(|location| !location.is_empty() && matches!(status, 301 | 302 | 303 | 307 | 308));
        let Some(location) = location else { return Err(Blocked::Location(status)) };
        if usize::from(self.followed) >= REDIRECTS_MAX {
            return Err(Blocked::TooManyRedirects);
        }
        let aim = self.policy.judge_url(follow(&self.at, location)?)?;
        if self.at.scheme() == "https" && aim.url.scheme() == "http" {
            return Err(Blocked::Downgrade);
        }
        // Once they would have gone elsewhere, a way back does not bring them again.
        self.own_headers &= self.at.origin() == aim.url.origin();
        self.followed += 1;
        self.at = aim.url.clone();
        Ok(Hop::To { aim, own_headers: self.own_headers })
    }
}
