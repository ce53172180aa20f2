//! Host names that are not for strangers, whatever they resolve to here: such as resolve inside a network only.
//!
//! Source: RFC 1035 section 2.3.4 for lengths; RFC 6761, 6762, 7686, 8375, 9476 and ICANN's resolutions for names that the
//! public DNS will never have. Memory: constants. Errors: [`NameFault`].
//! Not here: IDNA, which the URL parser has applied; what a name resolves to (`address`).

use crate::limits::{LABEL_BYTES_MAX, NAME_BYTES_MAX};

/// Why a name is not looked up.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum NameFault {
    /// Empty, an empty label, or too long.
    #[error("the name is empty, has an empty label, or one over {LABEL_BYTES_MAX} bytes, or is over {NAME_BYTES_MAX}")]
    Shape,
    /// A character that stands in no host name.
    #[error("the name has a character that stands in no host name")]
    Character,
    /// No dot: a search list would complete it.
    #[error("a name of one label is the local network's to complete")]
    SingleLabel,
    /// Of a network that is not the public one.
    #[error("names under `{0}` are internal")]
    Internal(&'static str),
    /// A metadata service.
    #[error("`{0}` is a cloud's metadata service")]
    Metadata(&'static str),
    /// A name that resolves to whatever it spells.
    #[error("names under `{0}` resolve to whatever address the caller chooses")]
    Chosen(&'static str),
}

/// Domains that the public DNS does not have, or that lead back to this machine or its network.
#[rustfmt::skip]
const INTERNAL: &[&str] = &[
    "localhost",                                  // RFC 6761 section 6.3
    "invalid",                                    // RFC 6761 section 6.4
    "local",                                      // RFC 6762; `cluster.local` with it
    "onion",                                      // RFC 7686
    "arpa",                                       // RFC 3172: reverse names, `home.arpa` (RFC 8375), `ipv4only.arpa` (RFC 8880)
    "alt",                                        // RFC 9476
    "internal",                                   // ICANN, 29 July 2024: for private use
    "home", "corp", "mail",                       // ICANN, 4 February 2018: never to be given out
    "lan", "intranet", "intra", "private", "localdomain", "domain", "workgroup", "router", "gateway", "belkin",
    "fritz.box",                                  // what home routers and offices made up
    "svc", "default", "consul", "docker", "k8s",             // what clusters complete and resolve
    "i2p", "bit",                                 // other networks'
];

/// Metadata services with a name of their own in the public DNS.
const METADATA: &[&str] = &[
    "metadata.goog",
    "metadata.tencentyun.com",
    "metadata.cloud.ibm.com",
    "metadata.packet.net",
    "metadata.platformequinix.com",
];

/// Metadata services by names that resolve within their own networks only.
const METADATA_INTERNAL: &[&str] =
    &["metadata.google.internal", "metadata.azure.internal", "instance-data.ec2.internal", "instance-data", "metadata"];

/// Services whose names resolve to the address they spell, to loopback, or to two addresses by turns. Their answers would be
/// judged like any other; who asks for one is up to something.
const CHOSEN: &[&str] = &[
    "nip.io",
    "sslip.io",
    "xip.io",
    "traefik.me",
    "localtest.me",
    "local.gd",
    "lvh.me",
    "vcap.me",
    "lacolhost.com",
    "localhost.direct",
    "backname.io",
    "rbndr.us",
    "1u.ms",
];

/// Whether `name` can be a host's at all: lower case, without the dot at its end.
///
/// # Errors
/// [`NameFault::Shape`], [`NameFault::Character`].
pub(super) fn check_shape(name: &str) -> Result<(), NameFault> {
    if name.len() > NAME_BYTES_MAX || name.split('.').any(|label| label.is_empty() || label.len() > LABEL_BYTES_MAX) {
        return Err(NameFault::Shape);
    }
    // `_` is in no host name of RFC 952, and in many of the real world's.
    let fits = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._".contains(&b);
    if name.bytes().all(fits) { Ok(()) } else { Err(NameFault::Character) }
}

/// Whether `name`, whose shape is right, is one of the public DNS.
///
/// # Errors
/// The other variants of [`NameFault`].
pub(super) fn check_public(name: &str) -> Result<(), NameFault> {
    let under = |list: &'static [&'static str]| list.iter().find(|domain| is_under(name, domain)).copied();
    if let Some(domain) = under(INTERNAL) {
        return Err(NameFault::Internal(domain));
    }
    if !name.contains('.') {
        return Err(NameFault::SingleLabel);
    }
    if let Some(service) = under(METADATA) {
        return Err(NameFault::Metadata(service));
    }
    under(CHOSEN).map_or(Ok(()), |service| Err(NameFault::Chosen(service)))
}

/// Whether `name`, whose shape is right, is one that an administrator may have polled: one of the operator's own network is.
///
/// # Errors
/// [`NameFault::Metadata`].
pub(super) fn check_administered(name: &str) -> Result<(), NameFault> {
    let is_metadata = |domain: &&&str| is_under(name, domain);
    METADATA.iter().chain(METADATA_INTERNAL).find(is_metadata).map_or(Ok(()), |domain| Err(NameFault::Metadata(domain)))
}

/// Whether `name` is `domain` or below it.
pub(super) fn is_under(name: &str, domain: &str) -> bool {
    name.strip_suffix(domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_the_lengths_of_the_dns() {
        let label = "a".repeat(LABEL_BYTES_MAX);
        let name = |last: usize| format!("{label}.{label}.{label}.{}", "b".repeat(last));
        assert_eq!(name(61).len(), NAME_BYTES_MAX);
        assert_eq!(check_shape(&name(61)), Ok(()));
        assert_eq!(check_shape(&name(62)), Err(NameFault::Shape));
        assert_eq!(check_shape(&format!("{label}.com")), Ok(()));
        for bad in [&format!("{label}a.com"), "", ".", "a..b", ".a", "a."] {
            assert_eq!(check_shape(bad), Err(NameFault::Shape), "{bad}");
        }
        for bad in ["a b.com", "a%2e.com", "a,b.com", "A.com", "a~.com", "bücher.com"] {
            assert_eq!(check_shape(bad), Err(NameFault::Character), "{bad}");
        }
        assert_eq!(check_shape("_a-b.xn--bcher-kva.com"), Ok(()));
    }

    #[test]
    fn names_of_the_operators_network_are_an_administrators_to_use_and_metadata_services_are_nobodys() {
        for name in
            ["localhost", "db.internal", "backend", "api.lan", "10.0.0.1.nip.io", "mymetadata", "metadata.example.com"]
        {
            assert_eq!(check_administered(name), Ok(()), "{name}");
        }
        for name in
            ["metadata.goog", "metadata.google.internal", "a.metadata.google.internal", "metadata", "instance-data"]
        {
            assert!(matches!(check_administered(name), Err(NameFault::Metadata(_))), "{name}");
        }
    }

    #[test]
    fn a_domain_is_itself_and_what_is_below_it() {
        for (name, fault) in [
            ("localhost", NameFault::Internal("localhost")),
            ("a.b.localhost", NameFault::Internal("localhost")),
            ("metadata.google.internal", NameFault::Internal("internal")),
            ("kubernetes.default.svc.cluster.local", NameFault::Internal("local")),
            ("nas.home.arpa", NameFault::Internal("arpa")),
            ("backend", NameFault::SingleLabel),
            ("metadata.goog", NameFault::Metadata("metadata.goog")),
            ("127.0.0.1.nip.io", NameFault::Chosen("nip.io")),
        ] {
            assert_eq!(check_public(name), Err(fault), "{name}");
        }
        for name in ["api.example.com", "notlocalhost.com", "localhost.example.com", "xlocal.io", "anip.io", "a.test"] {
            assert_eq!(check_public(name), Ok(()), "{name}");
        }
    }
}
