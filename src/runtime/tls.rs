//! What the public listener's TLS is made of: certificates chosen by name, tickets, versions.
//!
//! Source: RFC 8446 and RFC 5246 by way of rustls with ring, RFC 6066 for SNI, RFC 7301 for ALPN, RFC 9525 for names.
//! Memory: the certificates, once in the process; no session is kept: what resumes one travels in the client's ticket.
//! Errors: [`TlsError`]; most of them `check` has found before. Not here: connections (`session`), files (`config`).

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use rustls::client::verify_server_name;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::{ClientHello, NoServerSessionStorage, ParsedCertificate, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ServerConfig, SignatureScheme};

use crate::commands::certificates;
use crate::config::{IdentityError, TlsFiles};

/// Tickets a client gets after a handshake over TLS 1.3. Its one connection comes back once, and is then given the next;
/// a second one would cost every handshake a sealing and 250 bytes for nothing.
const TICKETS: usize = 1;

/// Why the listener cannot speak TLS with what it was given.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum TlsError {
    /// A certificate or key that cannot be presented.
    #[error("the file {path:?} {error}")]
    Identity {
        /// The file's path.
        path: String,
        /// What is wrong with it.
        error: IdentityError,
    },
    /// No keys for tickets.
    #[error("keys for session tickets cannot be made: {0}")]
    Tickets(rustls::Error),
}

/// The TLS of a process's public listener. Its tickets are good on every core, and after a reload.
#[derive(Debug)]
pub struct Tls {
    config: Arc<ServerConfig>,
    certificates: Arc<Certificates>,
}

impl Tls {
    /// TLS with these certificates, of which there is at least one.
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn new(files: &[TlsFiles]) -> Result<Tls, TlsError> {
        let certificates = Arc::new(Certificates { all: RwLock::new(read(files)?) });
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("ring's provider has cipher suites for the default versions")
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(&certificates) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.ticketer = rustls::crypto::ring::Ticketer::new().map_err(TlsError::Tickets)?;
        config.send_tls13_tickets = TICKETS;
        // Early data could be replayed, and a request here opens a stream with a credential.
        config.max_early_data_size = 0;
        Ok(Tls { config: Arc::new(config), certificates })
    }

    /// What a new connection is begun with.
    pub fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.config)
    }

    /// Puts other certificates in place of these, for handshakes from now on.
    ///
    /// # Errors
    /// [`TlsError`]; the old ones stay.
    pub fn replace(&self, files: &[TlsFiles]) -> Result<(), TlsError> {
        let all = read(files)?;
        *self.certificates.all.write().unwrap_or_else(PoisonError::into_inner) = all;
        Ok(())
    }
}

/// The certificates of `files`, in their order.
fn read(files: &[TlsFiles]) -> Result<Vec<Arc<CertifiedKey>>, TlsError> {
    let one = |files: &TlsFiles| {
        let certified = certificates::certified_key(files.cert_pem.expose_secret(), files.key_pem.expose_secret());
        certified.map(Arc::new).map_err(|error| {
            let path = if error.is_of_certificate() { &files.cert } else { &files.key };
            TlsError::Identity { path: path.clone(), error }
        })
    };
    files.iter().map(one).collect()
}

/// The listener's certificates, in the order of the configuration. Locked for a look at each handshake that is not
/// resumed, never on a delivery.
struct Certificates {
    all: RwLock<Vec<Arc<CertifiedKey>>>,
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Certificates")
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let all = self.all.read().unwrap_or_else(PoisonError::into_inner);
        choose(&all, hello.server_name(), hello.signature_schemes())
    }
}

/// The first certificate for `name` whose key signs as the client can verify; the first for `name` where none does; the
/// first of all where none is for `name`, or the client named none.
fn choose(all: &[Arc<CertifiedKey>], name: Option<&str>, schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
    let name = name.and_then(|name| ServerName::try_from(name).ok());
    let fits = |certified: &&Arc<CertifiedKey>| {
        let Some(name) = &name else { return true };
        certified.cert.first().is_some_and(|own| is_for(own, name))
    };
    let signs = |certified: &&Arc<CertifiedKey>| certified.key.choose_scheme(schemes).is_some();
    let fitting = || all.iter().filter(fits);
    fitting().find(signs).or_else(|| fitting().next()).or_else(|| all.first()).map(Arc::clone)
}

fn is_for(certificate: &CertificateDer<'_>, name: &ServerName<'_>) -> bool {
    ParsedCertificate::try_from(certificate).is_ok_and(|parsed| verify_server_name(&parsed, name).is_ok())
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ED25519};

    use super::*;

    fn certified(names: &[&str], algorithm: &'static rcgen::SignatureAlgorithm) -> Arc<CertifiedKey> {
        let key = KeyPair::generate_for(algorithm).expect("a key");
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let certificate = CertificateParams::new(names).expect("names").self_signed(&key).expect("a certificate");
        let certified = certificates::certified_key(certificate.pem().as_bytes(), key.serialize_pem().as_bytes());
        Arc::new(certified.expect("they fit"))
    }

    #[test]
    fn the_first_certificate_for_the_name_is_chosen() {
        let ecdsa: &[SignatureScheme] = &[SignatureScheme::ECDSA_NISTP256_SHA256];
        let both: &[SignatureScheme] = &[SignatureScheme::ECDSA_NISTP256_SHA256, SignatureScheme::ED25519];
        let all = [
            certified(&["a.test", "www.a.test"], &PKCS_ECDSA_P256_SHA256),
            certified(&["*.b.test"], &PKCS_ED25519),
            certified(&["*.b.test", "c.test"], &PKCS_ECDSA_P256_SHA256),
        ];
        for (name, schemes, wanted) in [
            (None, both, 0),
            (Some("a.test"), both, 0),
            (Some("WWW.A.TEST"), both, 0),
            (Some("x.b.test"), both, 1),
            (Some("x.b.test"), ecdsa, 2),
            (Some("x.y.b.test"), both, 0),
            (Some("c.test"), both, 2),
            (Some("c.test"), &[], 2),
            (Some("elsewhere.test"), both, 0),
            (Some("not a name"), both, 0),
        ] {
            let chosen = choose(&all, name, schemes).expect("there is always one");
            assert!(Arc::ptr_eq(&chosen, &all[wanted]), "{name:?} {schemes:?}");
        }
        assert!(choose(&[], None, both).is_none());
    }
}
