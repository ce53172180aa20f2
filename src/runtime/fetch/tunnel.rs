//! Which way requests leave, and tunnels through the operator's proxy.
//!
//! Source: RFC 9110 section 9.3.6. Memory: the proxy's configuration; while a tunnel is opened the head of its answer.
//! Errors: [`FetchError`]: `Unreachable` where the proxy is not there or opens no tunnel, `Dns` where its name has no address,
//! `Protocol` where it does not speak HTTP. Not here: the head's form (`codec::tunnel`), time-outs (the caller's).

use std::hash::{Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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
#[derive(Debug, Default)]
pub struct Egress {
    state: Mutex<State>,
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

impl Egress {
    /// Requests leave by this proxy.
    pub fn through(proxy: Option<Arc<Proxy>>) -> Egress {
        Egress { state: Mutex::new(State { no: 0, proxy }) }
    }

    /// From now on new connections are opened through that proxy, or directly. Those that are open are used no more.
    pub fn configure(&self, proxy: Option<Arc<Proxy>>) {
        let mut state = self.state();
        if state.proxy != proxy {
            *state = State { no: state.no + 1, proxy };
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
    /// A connection to `host` through the proxy. A guarded target is asked for by the addresses that the guard has pinned, one
    /// after the other: what the proxy would make of its name nobody has judged. Any other by its name, which need not be known
    /// here.
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
                addresses.iter().map(|&ip| SocketAddr::new(ip, port).to_string()).collect()
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
        let mut failure = unreachable("the target has no address".to_owned());
        for end in ends {
            let opened = connect::connect(&found, proxy.port).await;
            let stream = opened.map_err(|e| unreachable(format!("no connection to the proxy: {}", in_words(&e))))?;
            match open(stream, proxy, &end).await {
                Ok(stream) => return Ok(stream),
                Err(error) => failure = error,
            }
        }
        Err(failure)
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
