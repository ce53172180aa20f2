//! A certificate's and a key's PEM text as rustls presents them: for `check`, and for the listener.
//!
//! Source: RFC 7468 for PEM, RFC 5280 for certificates, by way of rustls and ring. Memory: what is returned.
//! Errors: [`IdentityError`], the operator's fault. Not here: reading files (`check`), choosing among several
//! (`runtime::tls`).

use rustls::InconsistentKeys;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::ParsedCertificate;
use rustls::sign::CertifiedKey;

use crate::config::IdentityError;

/// The certificates of the PEM text `cert`, the server's own first, with the first private key of the PEM text `key`.
///
/// # Errors
/// [`IdentityError`].
pub fn certified_key(cert: &[u8], key: &[u8]) -> Result<CertifiedKey, IdentityError> {
    let chain: Vec<CertificateDer<'static>> =
        CertificateDer::pem_slice_iter(cert).collect::<Result<_, _>>().map_err(|_| IdentityError::BadCertificate)?;
    let own = chain.first().ok_or(IdentityError::NoCertificate)?;
    ParsedCertificate::try_from(own).map_err(|_| IdentityError::BadCertificate)?;
    let key = PrivateKeyDer::from_pem_slice(key).map_err(|error| match error {
        rustls::pki_types::pem::Error::NoItemsFound => IdentityError::NoKey,
        _ => IdentityError::BadKey,
    })?;
    let provider = rustls::crypto::ring::default_provider();
    CertifiedKey::from_der(chain, key, &provider).map_err(|error| match error {
        rustls::Error::InconsistentKeys(InconsistentKeys::KeyMismatch) => IdentityError::Mismatch,
        _ => IdentityError::BadKey,
    })
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    fn identity() -> (String, String) {
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec!["a.test".to_owned()]).expect("a name");
        (params.self_signed(&key).expect("a certificate").pem(), key.serialize_pem())
    }

    fn judged(cert: &str, key: &str) -> Result<usize, IdentityError> {
        certified_key(cert.as_bytes(), key.as_bytes()).map(|certified| certified.cert.len())
    }

    #[test]
    fn what_does_not_fit_together_is_told_apart() {
        let ((cert, key), (other_cert, other_key)) = (identity(), identity());
        assert_eq!(judged(&cert, &key), Ok(1));
        assert_eq!(judged(&format!("{cert}{other_cert}"), &key), Ok(2), "a chain, the server's own first");
        assert_eq!(judged(&format!("{key}{cert}"), &format!("{cert}{key}")), Ok(1), "one file may hold both");
        assert_eq!(judged(&cert, &other_key), Err(IdentityError::Mismatch));
        assert_eq!(judged(&format!("{other_cert}{cert}"), &key), Err(IdentityError::Mismatch), "in the wrong order");
        assert_eq!(judged("", &key), Err(IdentityError::NoCertificate));
        assert_eq!(judged(&key, &key), Err(IdentityError::NoCertificate));
        assert_eq!(judged(&cert, &cert), Err(IdentityError::NoKey));
        let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        assert_eq!(judged(broken, &key), Err(IdentityError::BadCertificate));
        let encrypted = "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n";
        assert_eq!(judged(&cert, encrypted), Err(IdentityError::NoKey));
        let cut = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
        assert_eq!(judged(&cert, cut), Err(IdentityError::BadKey));
    }
}
