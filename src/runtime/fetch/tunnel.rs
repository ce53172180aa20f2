//! Which way requests leave, and tunnels through the operator's proxy.
//!
//! Source: RFC 9110 section 9.3.6. Memory: the proxy's configuration; while a tunnel is opened the head of its answer, for each
//! of the addresses that are tried at once.
//! Errors: [`FetchError`]: `Unreachable` where the proxy is not there or opens no tunnel, `Dns` where its name has no address,
//! `Protocol` where it does not speak HTTP. Not here: the head's form (`codec::tunnel`), time-outs (the caller's).

use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use monoio::io::{AsyncReadRent, AsyncWriteRentExt};
use monoio::net::TcpStream;
use url::Host;

use super::{Asked, Fetcher, connect, in_words};
use crate::codec::tunnel::{Answer, TunnelError, read_answer, write_connect};
use crate::limits::PROXY_HEAD_BYTES_MAX;
use crate::runtime::resolver::Asker;
use crate::stream::poll::{FetchError, UpstreamCode};
use crate::stream::proxy::Proxy;

/// Which way the requests of a process leave, for all of its clients.
#[derive(Default)]
pub struct Egress {
    state: Mutex<State>,
    /// Hears of each change.
    hears: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

#[derive(Debug, Default)]
struct State {
    /// Counts the changes.
    no: u64,
    proxy: Option<Arc<Proxy>>,
}

/// One proxy, as it was configured at a time: connections through another one are not used instead.
#[derive(Clone, Debug)]
pub(super) struct Way {
    no: u64,
    proxy: Arc<Proxy>,
}

impl PartialEq for Way {
    fn eq(&self, other: &Way) -> bool {
        self.no == other.no
    }
}

impl Eq for Way {}

impl Hash for Way {
    fn hash<H: Hasher>(&self, hasher: &mut H) {
        self.no.hash(hasher);
    }
}

impl fmt::Debug for Egress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.state().fmt(f)
    }
}

impl Egress {
    /// Requests leave by this proxy.
    pub fn through(proxy: Option<Arc<Proxy>>) -> Egress {
        Egress { state: Mutex::new(State { no: 0, proxy }), hears: OnceLock::new() }
    }

    /// From now on `hears` is called when the way has changed.
    pub fn tell(&self, hears: impl Fn() + Send + Sync + 'static) {
        // There is one process.
        drop(self.hears.set(Box::new(hears)));
    }

    /// The proxy, if there is one.
    pub fn proxy(&self) -> Option<Arc<Proxy>> {
        self.state().proxy.clone()
    }

    /// From now on new connections are opened through that proxy, or directly. Those that are open are used no more.
    pub fn configure(&self, proxy: Option<Arc<Proxy>>) {
        self.change(proxy, |_| true);
    }

    /// The same in place of the proxy `old`, unless that is no longer the one.
    pub fn replace(&self, old: &Arc<Proxy>, new: Arc<Proxy>) {
        self.change(Some(new), |now| now.is_some_and(|now| Arc::ptr_eq(now, old)));
    }

    fn change(&self, proxy: Option<Arc<Proxy>>, is_meant: impl FnOnce(Option<&Arc<Proxy>>) -> bool) {
        let mut state = self.state();
        if !is_meant(state.proxy.as_ref()) || state.proxy == proxy {
            return;
        }
        *state = State { no: state.no + 1, proxy };
        drop(state);
        if let Some(hears) = self.hears.get() {
            hears();
        }
    }

    /// The way to `host`; `None`: directly.
    pub(super) fn way_to(&self, host: &Host<&str>) -> Option<Way> {
        let state = self.state();
        let proxy = state.proxy.as_ref().filter(|proxy| proxy.serves(host))?;
        Some(Way { no: state.no, proxy: Arc::clone(proxy) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Fetcher {
    /// A connection to `host` through the proxy. A guarded target is asked for by the addresses that the guard has pinned,
    /// staggered as they would be directly: what the proxy would make of its name nobody has judged. Any other by its name, which
    /// need not be known here.
    pub(super) async fn tunnel(
        &self,
        asked: &Asked<'_>,
        way: &Way,
        host: &Host<&str>,
        port: u16,
    ) -> Result<TcpStream, FetchError> {
        let ends: Vec<String> = match asked.aim {
            None => vec![format!("{host}:{port}")],
            Some(_) => {
                let addresses = self.addresses(asked, host).await?;
                connect::interleaved(&addresses).iter().map(|&ip| SocketAddr::new(ip, port).to_string()).collect()
            }
        };
        let proxy = &way.proxy;
        let found: Arc<[IpAddr]> = match &proxy.host {
            Host::Ipv4(ip) => Arc::from([IpAddr::V4(*ip)]),
            Host::Ipv6(ip) => Arc::from([IpAddr::V6(*ip)]),
            Host::Domain(name) => self.resolver.resolve(name, Asker::Operator).await.map_err(|error| {
                let detail = format!("the name of `proxy.url`: {error}");
                FetchError { code: UpstreamCode::Dns, detail }
            })?,
        };
        let attempts = ends.iter().map(async |end| {
            let opened = connect::connect(&found, proxy.port).await;
            match opened.map_err(|e| unreachable(format!("no connection to the proxy: {}", in_words(&e)))) {
                Ok(stream) => Ok(Ok(open(stream, proxy, end).await?)),
                // Where there is no proxy another address is no better.
                Err(error) => Ok(Err(error)),
            }
        });
        connect::first_of(attempts, unreachable("the target has no address".to_owned())).await?
    }
}

/// Has the proxy open a tunnel to `end`.
async fn open(mut stream: TcpStream, proxy: &Proxy, end: &str) -> Result<TcpStream, FetchError> {
    let mut request = Vec::new();
    let login = proxy.login.as_ref().map(|login| login.authorization());
    write_connect(&mut request, end, login).map_err(failed)?;
    let lost = |e: &std::io::Error| unreachable(format!("the proxy: {}", in_words(e)));
    let (sent, _) = stream.write_all(request).await;
    sent.map_err(|e| lost(&e))?;
    let mut head = Vec::new();
    loop {
        let space = Vec::with_capacity(PROXY_HEAD_BYTES_MAX - head.len());
        let (read, piece) = stream.read(space).await;
        if read.map_err(|e| lost(&e))? == 0 {
            return Err(unreachable("the proxy has closed the connection instead of an answer to CONNECT".to_owned()));
        }
        head.extend_from_slice(&piece);
        match read_answer(&head).map_err(failed)? {
            Answer::Partial => {}
            Answer::Open => return Ok(stream),
            Answer::Refused(407) => {
                let detail = "the proxy asks for another login than `proxy.url` has: it answered 407 to CONNECT";
                return Err(unreachable(detail.to_owned()));
            }
            Answer::Refused(status) => {
                return Err(unreachable(format!("the proxy opens no tunnel: it answered {status} to CONNECT")));
            }
        }
    }
}

fn unreachable(detail: String) -> FetchError {
    FetchError { code: UpstreamCode::Unreachable, detail }
}

fn failed(error: TunnelError) -> FetchError {
    FetchError { code: UpstreamCode::Protocol, detail: error.to_string() }
}
