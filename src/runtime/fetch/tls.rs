//! TLS to upstreams: whom to trust, the handshake, and what went wrong in words that hold no secret.
//!
//! Source: RFC 8446 and RFC 5246 by way of rustls with ring; RFC 9525 for names; RFC 7301 for ALPN.
//! Memory: a [`TrustSets`] per core keeps up to `limits::TRUST_SETS_MAX` configurations, each with rustls's store of 256
//! resumable sessions; the system's certificates stand once in the process; a `ClientConnection` per open connection.
//! Errors: [`TlsError`], the upstream's fault but for [`TlsError::Ca`] and [`TlsError::NoRoots`].
//! Not here: sockets' time-outs, HTTP.

use std::borrow::Cow;
use std::cell::RefCell;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use monoio::io::{AsyncReadRent, AsyncWriteRentExt};
use monoio::net::TcpStream;
use monoio::time::Instant;
use rustls::client::{ClientConnection, ResolvesClientCert};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, IpAddr, ServerName};
use rustls::sign::SingleCertAndKey;
use rustls::{CertificateError, ClientConfig, RootCertStore};

use crate::commands::certificates;
use crate::limits::{RESOLVER_FAILURE_TTL, TRUST_SETS_MAX};
use crate::runtime::resolver::{Flight, Pilot, ResolverHandle};
use crate::stream::CaFile;
use crate::stream::live::IdentityPem;

/// Bytes of ciphertext read at once: a record of 16 KiB and its overhead (RFC 8446 section 5.2).
const RECORD_BYTES: usize = (16 << 10) + 256 + 5;

/// Why there is no TLS connection.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(in crate::runtime) enum TlsError {
    /// The upstream's: its certificate, its protocol, its refusal.
    #[error("{0}")]
    Refused(Cow<'static, str>),
    /// The upstream's: it closed or reset the connection amid the handshake.
    #[error("the connection was closed during the TLS handshake")]
    Closed,
    /// The operator's: the stream's `ca` holds no certificate that can be used.
    #[error("the ca file holds no usable certificate")]
    Ca,
    /// The operator's: the client certificate or its key cannot be used.
    #[error("the client certificate cannot be used")]
    Identity,
    /// The operator's: the system has no certificates, and the stream names none.
    #[error("the system has no trusted certificates")]
    NoRoots,
    /// This server's: the system's certificates cannot be read just now.
    #[error("the system's certificates cannot be read now")]
    Busy,
}

/// Whom a connection was made trusting; part of what tells connections apart. Not reused.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(super) struct TrustId(u64);

impl TrustId {
    /// The system's certificates, and `http` where nobody needs trusting.
    pub(super) const SYSTEM: TrustId = TrustId(0);
}

/// One core's TLS configurations: one for the system's certificates, one for each `ca` and each client certificate.
pub(super) struct TrustSets {
    state: RefCell<State>,
}

struct State {
    system: Option<Arc<ClientConfig>>,
    named: Vec<Named>,
    next_id: u64,
}

struct Named {
    /// `None`: the system's.
    ca: Option<CaFile>,
    /// What is shown to an upstream that asks for it.
    identity: Option<Arc<IdentityPem>>,
    id: TrustId,
    config: Option<Arc<ClientConfig>>,
    used: Instant,
}

impl TrustSets {
    /// None yet.
    pub(super) fn new() -> TrustSets {
        TrustSets { state: RefCell::new(State { system: None, named: Vec::new(), next_id: 1 }) }
    }

    /// The name of the set that `ca` and `identity` stand for: connections that show another certificate are others.
    pub(super) fn id_of(&self, ca: Option<&CaFile>, identity: Option<&Arc<IdentityPem>>) -> TrustId {
        if ca.is_none() && identity.is_none() {
            return TrustId::SYSTEM;
        }
        let mut state = self.state.borrow_mut();
        // Almost always the same allocations as last time, so that the certificates are not compared.
        let same_ca = |named: &Named| match (&named.ca, ca) {
            (Some(held), Some(ca)) => Arc::ptr_eq(&held.pem, &ca.pem) || held.pem == ca.pem,
            (None, None) => true,
            _ => false,
        };
        let same_identity = |named: &Named| match (&named.identity, identity) {
            (Some(held), Some(identity)) => Arc::ptr_eq(held, identity) || held == identity,
            (None, None) => true,
            _ => false,
        };
        let same = |named: &Named| same_ca(named) && same_identity(named);
        if let Some(named) = state.named.iter_mut().find(|named| same(named)) {
            named.used = Instant::now();
            return named.id;
        }
        if state.named.len() >= TRUST_SETS_MAX
            && let Some(oldest) = (0..state.named.len()).min_by_key(|&i| state.named.get(i).map(|named| named.used))
        {
            state.named.swap_remove(oldest);
        }
        let id = TrustId(state.next_id);
        state.next_id += 1;
        let (ca, identity) = (ca.cloned(), identity.cloned());
        state.named.push(Named { ca, identity, id, config: None, used: Instant::now() });
        id
    }

    /// The configuration that trusts `ca`, or the system where there is none, and shows `identity` when it is asked.
    ///
    /// # Errors
    /// [`TlsError::Ca`], [`TlsError::NoRoots`], [`TlsError::Identity`], [`TlsError::Busy`].
    pub(super) async fn config(
        &self,
        ca: Option<&CaFile>,
        identity: Option<&Arc<IdentityPem>>,
        helpers: &ResolverHandle,
    ) -> Result<Arc<ClientConfig>, TlsError> {
        let id = self.id_of(ca, identity);
        if id == TrustId::SYSTEM {
            return self.system_config(helpers).await;
        }
        let ready = |state: &State| state.named.iter().find(|named| named.id == id)?.config.clone();
        if let Some(config) = ready(&self.state.borrow()) {
            return Ok(config);
        }
        let roots = match ca {
            Some(ca) => roots_of(ca)?,
            None => system_roots(helpers).await?,
        };
        let config = client_config(roots, identity.map(|identity| shown(identity)).transpose()?);
        if let Some(named) = self.state.borrow_mut().named.iter_mut().find(|named| named.id == id) {
            named.config = Some(Arc::clone(&config));
        }
        Ok(config)
    }

    async fn system_config(&self, helpers: &ResolverHandle) -> Result<Arc<ClientConfig>, TlsError> {
        if let Some(config) = self.state.borrow().system.clone() {
            return Ok(config);
        }
        let roots = system_roots(helpers).await?;
        let mut state = self.state.borrow_mut();
        Ok(Arc::clone(state.system.get_or_insert_with(|| client_config(roots, None))))
    }
}

/// What a handshake shows of this identity.
fn shown(identity: &IdentityPem) -> Result<Arc<dyn ResolvesClientCert>, TlsError> {
    let certified = certificates::certified_key(&identity.cert, identity.key.expose_secret());
    Ok(Arc::new(SingleCertAndKey::from(certified.map_err(|_| TlsError::Identity)?)))
}

fn client_config(roots: Arc<RootCertStore>, shown: Option<Arc<dyn ResolvesClientCert>>) -> Arc<ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring's provider has cipher suites for the default versions")
        .with_root_certificates(roots);
    let mut config = match shown {
        Some(shown) => builder.with_client_cert_resolver(shown),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Arc::new(config)
}

/// The roots of a `ca` file.
///
/// # Errors
/// [`TlsError::Ca`].
pub(in crate::runtime) fn roots_of(ca: &CaFile) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&ca.pem) {
        let certificate = certificate.map_err(|_| TlsError::Ca)?;
        roots.add(certificate).map_err(|_| TlsError::Ca)?;
    }
    if roots.is_empty() { Err(TlsError::Ca) } else { Ok(Arc::new(roots)) }
}

pub(in crate::runtime) type Roots = Result<Arc<RootCertStore>, TlsError>;

/// The system's certificates, read once in the life of the process, on a helper thread; tried again after a failure.
async fn system_roots(helpers: &ResolverHandle) -> Roots {
    static SYSTEM: Mutex<Option<Arc<Flight<Roots>>>> = Mutex::new(None);
    let flight = {
        let mut system = SYSTEM.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let usable = |flight: &Arc<Flight<Roots>>| {
            flight.landed(|roots, at| roots.is_ok() || now < at + RESOLVER_FAILURE_TTL).unwrap_or(true)
        };
        match system.as_ref().filter(|flight| usable(flight)) {
            Some(flight) => Arc::clone(flight),
            None => {
                let flight = Flight::departing();
                let pilot = Pilot::of(&flight, Err(TlsError::Busy));
                helpers.run(move || pilot.land(read_system_roots())).map_err(|_| TlsError::Busy)?;
                Arc::clone(system.insert(flight))
            }
        }
    };
    helpers.landing(flight).await
}

/// The system's roots, read anew: not for a core's thread.
///
/// # Errors
/// [`TlsError::NoRoots`].
pub(in crate::runtime) fn read_system_roots() -> Roots {
    let mut roots = RootCertStore::empty();
    // Single certificates that cannot be read or used are the system's business as long as others can.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() { Err(TlsError::NoRoots) } else { Ok(Arc::new(roots)) }
}

/// The name that the upstream's certificate must be valid for.
///
/// # Errors
/// When `host` can be in no certificate: over 253 bytes, empty labels, an underscore at its end and the like.
pub(in crate::runtime) fn server_name(host: &url::Host<&str>) -> Result<ServerName<'static>, TlsError> {
    match host {
        url::Host::Ipv4(ip) => Ok(ServerName::IpAddress(IpAddr::from(std::net::IpAddr::V4(*ip)))),
        url::Host::Ipv6(ip) => Ok(ServerName::IpAddress(IpAddr::from(std::net::IpAddr::V6(*ip)))),
        url::Host::Domain(name) => {
            // RFC 6066 section 3: the name is sent without a trailing dot.
            let name = name.strip_suffix('.').unwrap_or(name);
            ServerName::try_from(name.to_owned())
                .map_err(|_| TlsError::Refused("the host's name can be in no certificate".into()))
        }
    }
}

/// The client's handshake over `stream`, which is dropped when it fails or the future is.
pub(super) async fn handshake(
    stream: &mut TcpStream,
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
) -> Result<ClientConnection, TlsError> {
    let mut tls = ClientConnection::new(config, name).map_err(|e| TlsError::Refused(in_words(&e)))?;
    let mut record = Vec::with_capacity(RECORD_BYTES);
    loop {
        send_pending(stream, &mut tls).await.map_err(|_| TlsError::Closed)?;
        if !tls.is_handshaking() {
            return Ok(tls);
        }
        let (read, buffer) = stream.read(record).await;
        record = buffer;
        match read {
            Ok(0) | Err(_) => return Err(TlsError::Closed),
            Ok(_) => {}
        }
        if let Err(error) = absorb(&mut tls, &record, |_| {}) {
            // The alert that tells the upstream why; whether it arrives changes nothing here.
            let _ = send_pending(stream, &mut tls).await;
            return Err(error);
        }
    }
}

async fn send_pending(stream: &mut TcpStream, tls: &mut ClientConnection) -> io::Result<()> {
    let sealed = take_sealed(tls)?;
    if sealed.is_empty() { Ok(()) } else { stream.write_all(sealed).await.0.map(drop) }
}

/// What `tls` has to send, taken out of it.
pub(in crate::runtime) fn take_sealed(tls: &mut ClientConnection) -> io::Result<Vec<u8>> {
    let mut sealed = Vec::new();
    while tls.wants_write() {
        tls.write_tls(&mut sealed)?;
    }
    Ok(sealed)
}

/// Feeds ciphertext as it came from the socket to `tls`, and what it holds to `plain`.
///
/// # Errors
/// [`TlsError::Refused`]; the connection is of no more use.
pub(in crate::runtime) fn absorb(
    tls: &mut ClientConnection,
    mut sealed: &[u8],
    mut plain: impl FnMut(&[u8]),
) -> Result<(), TlsError> {
    while !sealed.is_empty() {
        let taken = tls.read_tls(&mut sealed).map_err(|_| TlsError::Refused("over-long TLS records".into()))?;
        let state = tls.process_new_packets().map_err(|e| TlsError::Refused(in_words(&e)))?;
        let mut left = state.plaintext_bytes_to_read();
        let mut reader = tls.reader();
        while left > 0 {
            let chunk = io::BufRead::fill_buf(&mut reader).map_err(|_| TlsError::Closed)?;
            let taken = chunk.len();
            if taken == 0 {
                break;
            }
            plain(chunk);
            io::BufRead::consume(&mut reader, taken);
            left = left.saturating_sub(taken);
        }
        if taken == 0 {
            // After a close_notify nothing more is read (RFC 8446 section 6.1).
            break;
        }
    }
    Ok(())
}

/// What went wrong, for the operator. rustls's own words may hold what the upstream sent; these do not.
fn in_words(error: &rustls::Error) -> Cow<'static, str> {
    use rustls::Error as E;
    match error {
        E::InvalidCertificate(why) => certificate_in_words(why).into(),
        E::AlertReceived(alert) => format!("the upstream refused with the TLS alert {alert:?}").into(),
        E::InvalidMessage(_) => "the upstream does not speak TLS as it should".into(),
        E::PeerIncompatible(_) => "no TLS version or cipher suite in common".into(),
        E::NoApplicationProtocol => "the upstream does not offer http/1.1".into(),
        E::NoCertificatesPresented => "the upstream presents no certificate".into(),
        E::PeerMisbehaved(_) | E::InappropriateMessage { .. } | E::InappropriateHandshakeMessage { .. } => {
            "the upstream breaks the TLS protocol".into()
        }
        E::DecryptError | E::PeerSentOversizedRecord => "a TLS record does not decrypt".into(),
        _ => "the TLS handshake failed".into(),
    }
}

fn certificate_in_words(why: &CertificateError) -> &'static str {
    use CertificateError as C;
    match why {
        C::NotValidForName | C::NotValidForNameContext { .. } => "certificate not valid for name",
        C::Expired | C::ExpiredContext { .. } => "certificate expired",
        C::NotValidYet | C::NotValidYetContext { .. } => "certificate not valid yet",
        C::UnknownIssuer => "certificate from an unknown issuer",
        C::Revoked => "certificate revoked",
        C::BadSignature => "certificate with a bad signature",
        C::BadEncoding => "certificate badly encoded",
        C::InvalidPurpose | C::InvalidPurposeContext { .. } => "certificate not for servers",
        _ => "certificate not accepted",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::Secret;

    fn ca(text: &str) -> CaFile {
        CaFile { path: "ca.pem".into(), pem: Arc::from(text.as_bytes()) }
    }

    #[test]
    fn equal_authorities_are_one_trust_set() {
        let sets = TrustSets::new();
        assert_eq!(sets.id_of(None, None), TrustId::SYSTEM);
        let id = sets.id_of(Some(&ca("a")), None);
        assert_ne!(id, TrustId::SYSTEM);
        assert_eq!(sets.id_of(Some(&ca("a")), None), id);
        assert_ne!(sets.id_of(Some(&ca("b")), None), id);
    }

    #[test]
    fn whoever_shows_another_certificate_is_another() {
        let sets = TrustSets::new();
        let identity = |cert: &str, key: &str| Arc::new(IdentityPem { cert: cert.into(), key: Secret::new(key) });
        let id = sets.id_of(None, Some(&identity("a", "k")));
        assert_ne!(id, TrustId::SYSTEM);
        assert_eq!(sets.id_of(None, Some(&identity("a", "k"))), id);
        let others = [
            sets.id_of(None, Some(&identity("b", "k"))),
            sets.id_of(None, Some(&identity("a", "l"))),
            sets.id_of(Some(&ca("a")), Some(&identity("a", "k"))),
            sets.id_of(Some(&ca("a")), None),
        ];
        for (at, other) in others.iter().enumerate() {
            assert!(*other != id && !others[..at].contains(other), "{at}");
        }
    }

    #[test]
    fn trust_sets_are_bounded_and_the_one_used_longest_ago_goes() {
        let sets = TrustSets::new();
        let ids: Vec<TrustId> = (0..TRUST_SETS_MAX).map(|n| sets.id_of(Some(&ca(&n.to_string())), None)).collect();
        assert_eq!(sets.id_of(Some(&ca("0")), None), ids[0], "all fit");
        sets.id_of(Some(&ca("one more")), None);
        assert_eq!(sets.state.borrow().named.len(), TRUST_SETS_MAX);
        assert_eq!(sets.id_of(Some(&ca("0")), None), ids[0], "used just now");
        assert!(!ids.contains(&sets.id_of(Some(&ca("1")), None)), "gone, and its id is not reused");
    }

    #[test]
    fn a_ca_file_must_hold_certificates() {
        let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        for text in ["", "no certificate", broken, "-----BEGIN CERTIFICATE-----\n?\n-----END CERTIFICATE-----\n"] {
            assert_eq!(roots_of(&ca(text)).err(), Some(TlsError::Ca), "{text:?}");
        }
        let good = rcgen::generate_simple_self_signed(vec!["a.test".to_owned()]).expect("a certificate").cert.pem();
        assert_eq!(roots_of(&ca(&good)).expect("it is one").len(), 1);
        assert_eq!(roots_of(&ca(&(good + broken))).err(), Some(TlsError::Ca), "one that is broken is not passed over");
    }

    #[test]
    fn names_are_as_certificates_have_them() {
        let text = |host: &'static str| url::Host::Domain(host);
        assert_eq!(server_name(&text("a.test.")), server_name(&text("a.test")));
        assert!(matches!(server_name(&text("a.test")), Ok(ServerName::DnsName(_))));
        assert!(server_name(&text("")).is_err() && server_name(&text("a..b")).is_err());
        assert!(matches!(server_name(&url::Host::Ipv4([127, 0, 0, 1].into())), Ok(ServerName::IpAddress(_))));
    }
}
