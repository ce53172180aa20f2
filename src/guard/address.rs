//! Which addresses are nobody's business of a stranger: everything that is not global unicast.
//!
//! Source: IANA's IPv4 and IPv6 Special-Purpose Address Registries (RFC 6890), all of their lines, those that are «globally
//! reachable» too: no API lives on an anycast relay. RFC 5771 and RFC 4291 for multicast and what is not assigned; the RFC of
//! each range stands beside it.
//! Memory: two constant tables. Errors: [`Special`] says which range an address is in, and why that is closed.
//! Not here: names, which address the operator has listed (`policy`).

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The range that an address is in which no stranger may have connected to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Special {
    base: IpAddr,
    bits: u8,
    what: &'static str,
    source: &'static str,
    /// Whether it is where an operator's own machines are: closed to strangers, and to nobody who administers them.
    own: bool,
}

impl Special {
    /// The same of an operator's own network.
    const fn own(mut self) -> Special {
        self.own = true;
        self
    }

    /// Whether machines of an operator's own network have such addresses.
    pub(super) fn is_own(&self) -> bool {
        self.own
    }
}

impl fmt::Display for Special {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}, {} ({})", self.base, self.bits, self.what, self.source)
    }
}

const fn v4(base: [u8; 4], bits: u8, what: &'static str, source: &'static str) -> Special {
    Special { base: IpAddr::V4(Ipv4Addr::from_octets(base)), bits, what, source, own: false }
}

const fn v6(base: [u16; 8], bits: u8, what: &'static str, source: &'static str) -> Special {
    Special { base: IpAddr::V6(Ipv6Addr::from_segments(base)), bits, what, source, own: false }
}

const METADATA: &str = "a cloud's metadata service";

/// The first that fits is the one that is named, so that the narrower stand first.
#[rustfmt::skip]
const SPECIAL_V4: &[Special] = &[
    v4([0, 0, 0, 0], 8, "this network", "RFC 791"),
    v4([10, 0, 0, 0], 8, "private", "RFC 1918").own(),
    v4([100, 100, 100, 200], 32, METADATA, "RFC 6598"),
    v4([100, 64, 0, 0], 10, "shared by a carrier", "RFC 6598").own(),
    v4([127, 0, 0, 0], 8, "loopback", "RFC 1122").own(),
    v4([168, 63, 129, 16], 32, METADATA, "Azure WireServer"),
    v4([169, 254, 169, 254], 32, METADATA, "RFC 3927"),
    v4([169, 254, 0, 0], 16, "link-local", "RFC 3927"),
    v4([172, 16, 0, 0], 12, "private", "RFC 1918").own(),
    v4([192, 0, 0, 0], 29, "IPv4 service continuity", "RFC 7335"),
    v4([192, 0, 0, 8], 32, "dummy address", "RFC 7600"),
    v4([192, 0, 0, 9], 32, "Port Control Protocol anycast", "RFC 7723"),
    v4([192, 0, 0, 10], 32, "TURN anycast", "RFC 8155"),
    v4([192, 0, 0, 170], 31, "NAT64 discovery", "RFC 8880"),
    v4([192, 0, 0, 192], 32, METADATA, "RFC 6890"),
    v4([192, 0, 0, 0], 24, "protocol assignments", "RFC 6890"),
    v4([192, 0, 2, 0], 24, "documentation", "RFC 5737").own(),
    v4([192, 31, 196, 0], 24, "AS112", "RFC 7535"),
    v4([192, 52, 193, 0], 24, "multicast tunnels", "RFC 7450"),
    v4([192, 88, 99, 0], 24, "6to4 relays", "RFC 7526"),
    v4([192, 168, 0, 0], 16, "private", "RFC 1918").own(),
    v4([192, 175, 48, 0], 24, "AS112", "RFC 7534"),
    v4([198, 18, 0, 0], 15, "benchmarks", "RFC 2544").own(),
    v4([198, 51, 100, 0], 24, "documentation", "RFC 5737").own(),
    v4([203, 0, 113, 0], 24, "documentation", "RFC 5737").own(),
    v4([224, 0, 0, 0], 4, "multicast", "RFC 5771"),
    v4([255, 255, 255, 255], 32, "broadcast", "RFC 8190"),
    v4([240, 0, 0, 0], 4, "reserved", "RFC 1112"),
];

/// What is left of IPv6 when these are taken out, and is in [`GLOBAL_UNICAST`], is open. `::ffff:0:0/96` and `64:ff9b::/96`
/// stand for IPv4 addresses and are judged as those.
#[rustfmt::skip]
const SPECIAL_V6: &[Special] = &[
    v6([0, 0, 0, 0, 0, 0, 0, 0], 128, "unspecified", "RFC 4291"),
    v6([0, 0, 0, 0, 0, 0, 0, 1], 128, "loopback", "RFC 4291").own(),
    v6([0, 0, 0, 0, 0, 0, 0, 0], 96, "IPv4-compatible", "RFC 4291"),
    v6([0, 0, 0, 0, 0xffff, 0, 0, 0], 96, "IPv4-translated", "RFC 2765"),
    v6([0x64, 0xff9b, 1, 0, 0, 0, 0, 0], 48, "local NAT64", "RFC 8215"),
    v6([0x100, 0, 0, 0, 0, 0, 0, 0], 64, "discarded", "RFC 6666"),
    v6([0x100, 0, 0, 1, 0, 0, 0, 0], 64, "dummy prefix", "RFC 9780"),
    v6([0x2001, 0, 0, 0, 0, 0, 0, 0], 32, "Teredo", "RFC 4380"),
    v6([0x2001, 1, 0, 0, 0, 0, 0, 1], 128, "Port Control Protocol anycast", "RFC 7723"),
    v6([0x2001, 1, 0, 0, 0, 0, 0, 2], 128, "TURN anycast", "RFC 8155"),
    v6([0x2001, 1, 0, 0, 0, 0, 0, 3], 128, "service registration anycast", "RFC 9665"),
    v6([0x2001, 2, 0, 0, 0, 0, 0, 0], 48, "benchmarks", "RFC 5180").own(),
    v6([0x2001, 3, 0, 0, 0, 0, 0, 0], 32, "multicast tunnels", "RFC 7450"),
    v6([0x2001, 4, 0x112, 0, 0, 0, 0, 0], 48, "AS112", "RFC 7535"),
    v6([0x2001, 0x10, 0, 0, 0, 0, 0, 0], 28, "ORCHID", "RFC 4843"),
    v6([0x2001, 0x20, 0, 0, 0, 0, 0, 0], 28, "ORCHIDv2", "RFC 7343"),
    v6([0x2001, 0x30, 0, 0, 0, 0, 0, 0], 28, "drones' remote ids", "RFC 9374"),
    v6([0x2001, 0, 0, 0, 0, 0, 0, 0], 23, "protocol assignments", "RFC 2928"),
    v6([0x2001, 0xdb8, 0, 0, 0, 0, 0, 0], 32, "documentation", "RFC 3849").own(),
    v6([0x2002, 0, 0, 0, 0, 0, 0, 0], 16, "6to4", "RFC 3056"),
    v6([0x2620, 0x4f, 0x8000, 0, 0, 0, 0, 0], 48, "AS112", "RFC 7534"),
    v6([0x3fff, 0, 0, 0, 0, 0, 0, 0], 20, "documentation", "RFC 9637").own(),
    v6([0x5f00, 0, 0, 0, 0, 0, 0, 0], 16, "segment routing", "RFC 9602"),
    v6([0xfd00, 0xec2, 0, 0, 0, 0, 0, 0], 32, METADATA, "AWS"),
    v6([0xfd00, 0xc1, 0, 0, 0, 0, 0xa9fe, 0xa9fe], 128, METADATA, "Oracle"),
    v6([0xfd00, 0x42, 0, 0, 0, 0, 0, 0x42], 128, METADATA, "Scaleway"),
    v6([0xfd00, 0xa9fe, 0xa9fe, 0, 0, 0, 0, 0], 48, METADATA, "Linode"),
    v6([0xfd00, 0x100, 0, 0, 0, 0, 0x100, 0x200], 128, METADATA, "Alibaba"),
    v6([0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254], 128, METADATA, "Google"),
    v6([0xfc00, 0, 0, 0, 0, 0, 0, 0], 7, "unique local", "RFC 4193").own(),
    v6([0xfe80, 0, 0, 0, 0, 0, 0, 0], 10, "link-local", "RFC 4291"),
    v6([0xfec0, 0, 0, 0, 0, 0, 0, 0], 10, "site-local", "RFC 3879"),
    v6([0xff00, 0, 0, 0, 0, 0, 0, 0], 8, "multicast", "RFC 4291"),
];

/// The one range of IPv6 from which addresses are given out.
const GLOBAL_UNICAST: Special = v6([0x2000, 0, 0, 0, 0, 0, 0, 0], 3, "global unicast", "RFC 4291");
/// Everything else.
const UNASSIGNED: Special = v6([0; 8], 0, "not global unicast", "RFC 4291");
/// RFC 6052: what a DNS64 resolver makes of an IPv4 address, so that networks without IPv4 reach it.
const NAT64: Special = v6([0x64, 0xff9b, 0, 0, 0, 0, 0, 0], 96, "NAT64", "RFC 6052");

impl Special {
    fn holds(&self, address: IpAddr) -> bool {
        match (self.base, address) {
            (IpAddr::V4(base), IpAddr::V4(address)) => {
                (base.to_bits() ^ address.to_bits()).leading_zeros() >= u32::from(self.bits)
            }
            (IpAddr::V6(base), IpAddr::V6(address)) => {
                (base.to_bits() ^ address.to_bits()).leading_zeros() >= u32::from(self.bits)
            }
            _ => false,
        }
    }
}

/// `address` as the kernel takes it: one of IPv4 that is written as IPv6 is one of IPv4.
pub(super) fn canonical(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

/// The range that closes `address` to strangers; `None`: it is a public one.
pub fn special(address: IpAddr) -> Option<Special> {
    let find = |table: &[Special], address| table.iter().find(|range| range.holds(address)).copied();
    match canonical(address) {
        IpAddr::V4(_) => find(SPECIAL_V4, canonical(address)),
        IpAddr::V6(v6) if NAT64.holds(address) => special(IpAddr::V4(last_32_bits(v6))),
        IpAddr::V6(v6) => translated_metadata(v6)
            .or_else(|| find(SPECIAL_V6, address))
            .or_else(|| (!GLOBAL_UNICAST.holds(address)).then_some(UNASSIGNED))
            .or_else(|| isatap(v6).and_then(|inner| special(IpAddr::V4(inner)))),
    }
}

/// RFC 6052 section 2.2: a network may translate by a prefix of its own. Where that is unique local, and so its machines' own,
/// what it makes of a metadata service's address is none.
fn translated_metadata(address: Ipv6Addr) -> Option<Special> {
    let inner = special(IpAddr::V4(last_32_bits(address))).filter(|_| address.is_unique_local())?;
    (inner.bits == 32 && !inner.own && inner.what == METADATA).then_some(inner)
}

/// RFC 5214 section 6.1: the IPv4 address of a tunnel's end, in the lower half of an IPv6 address.
fn isatap(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let [_, _, _, _, upper, id, _, _] = address.segments();
    (matches!(upper, 0 | 0x0200) && id == 0x5efe).then(|| last_32_bits(address))
}

fn last_32_bits(address: Ipv6Addr) -> Ipv4Addr {
    let [.., a, b, c, d] = address.octets();
    Ipv4Addr::new(a, b, c, d)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_public(text: &str) -> bool {
        special(text.parse().expect("an address")).is_none()
    }

    /// The first and the last address of a range.
    fn ends(range: &Special) -> (IpAddr, IpAddr) {
        match range.base {
            IpAddr::V4(base) => {
                let host = u32::MAX.checked_shr(range.bits.into()).unwrap_or(0);
                (range.base, IpAddr::V4(Ipv4Addr::from_bits(base.to_bits() | host)))
            }
            IpAddr::V6(base) => {
                let host = u128::MAX.checked_shr(range.bits.into()).unwrap_or(0);
                (range.base, IpAddr::V6(Ipv6Addr::from_bits(base.to_bits() | host)))
            }
        }
    }

    #[test]
    fn each_range_is_closed_from_its_first_address_to_its_last() {
        for range in SPECIAL_V4.iter().chain(SPECIAL_V6) {
            let (first, last) = ends(range);
            assert!(special(first).is_some() && special(last).is_some(), "{range}");
            assert!(range.holds(first) && range.holds(last), "{range}: the base has bits beyond its prefix");
        }
    }

    #[test]
    fn what_stands_just_outside_of_a_range_is_open() {
        for text in [
            "1.0.0.0",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "126.255.255.255",
            "128.0.0.0",
            "168.63.129.15",
            "168.63.129.17",
            "169.253.255.255",
            "169.255.0.0",
            "172.15.255.255",
            "172.32.0.0",
            "191.255.255.255",
            "192.0.1.0",
            "192.0.1.255",
            "192.0.3.0",
            "192.31.195.255",
            "192.31.197.0",
            "192.52.192.255",
            "192.52.194.0",
            "192.88.98.255",
            "192.88.100.0",
            "192.167.255.255",
            "192.169.0.0",
            "192.175.47.255",
            "192.175.49.0",
            "198.17.255.255",
            "198.20.0.0",
            "198.51.99.255",
            "198.51.101.0",
            "203.0.112.255",
            "203.0.114.0",
            "223.255.255.255",
            "8.8.8.8",
            "2000::",
            "2001:200::",
            "2001:db7:ffff::1",
            "2001:db9::",
            "2003::1",
            "2606:4700:4700::1111",
            "2620:4f:7fff::1",
            "2620:4f:8001::",
            "3ffe::1",
            "3fff:1000::",
            "2a00:1450:4001:800::200e",
        ] {
            assert!(is_public(text), "{text}");
        }
    }

    #[test]
    fn an_address_that_stands_for_another_is_judged_as_that() {
        for (inner, public) in
            [("8.8.8.8", true), ("127.0.0.1", false), ("10.1.2.3", false), ("169.254.169.254", false)]
        {
            for outer in ["::ffff:", "64:ff9b::", "2606:4700::5efe:", "2606:4700::200:5efe:"] {
                assert_eq!(is_public(&format!("{outer}{inner}")), public, "{outer}{inner}");
            }
            // Nobody reaches these, whatever they embed.
            for outer in ["::", "::ffff:0:", "64:ff9b:1::", "2001:0:4136:e378:8000:63bf:"] {
                assert!(!is_public(&format!("{outer}{inner}")), "{outer}{inner}");
            }
        }
        assert!(!is_public("2002:7f00:1::") && !is_public("2002:808:808::1"));
        assert_eq!(canonical("::ffff:8.8.8.8".parse().unwrap()), IpAddr::from([8, 8, 8, 8]));
    }

    #[test]
    fn what_is_not_given_out_is_closed() {
        for text in
            ["4000::1", "8000::", "64:ff9b:2::1", "200::1", "100:1::", "1fff:ffff::", "e000::1", "5f01::", "::2"]
        {
            assert!(!is_public(text), "{text}");
        }
    }

    #[test]
    fn an_operators_own_machines_are_in_some_of_the_ranges_and_metadata_services_in_none() {
        let is_own = |text: &str| special(text.parse().expect("an address")).expect("it is special").is_own();
        for text in
            ["127.0.0.1", "10.0.0.1", "100.64.0.1", "172.31.0.1", "192.168.1.1", "::1", "fd12::1", "::ffff:10.0.0.1"]
                .into_iter()
                // Beside the metadata services.
                .chain([
                    "fd00:ec1::254",
                    "fd00:ec3::254",
                    "fd00:c1::1",
                    "fd00:42::43",
                    "fd00:a9fe:a9ff::1",
                    "fd20:ce::253",
                ])
                .chain(["fd00:100::100:201", "fd12::a9fe:a9ff", "fd12::a00:1", "fd12::c000:c1"])
        {
            assert!(is_own(text), "{text}");
        }
        for text in [
            "0.0.0.0",
            "169.254.169.254",
            "169.254.170.2",
            "100.100.100.200",
            "168.63.129.16",
            "192.0.0.192",
            "224.0.0.1",
            "255.255.255.255",
            "240.0.0.1",
            "::",
            "fe80::1",
            "fd00:ec2::254",
            "fd00:ec2::23",
            "fd00:ec2:1::",
            "fd20:ce::254",
            "fd00:c1::a9fe:a9fe",
            "fd00:42::42",
            "fd00:a9fe:a9fe::1",
            "fd00:a9fe:a9fe:1::",
            "fd00:100::100:200",
            "fd12:3456:789a::a9fe:a9fe",
            "fd64:ff9b::6464:64c8",
            "ff02::1",
            "::ffff:169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "64:ff9b:1::a9fe:a9fe",
            "2002:a9fe:a9fe::1",
        ] {
            assert!(!is_own(text), "{text}");
        }
    }

    #[test]
    fn the_operator_is_told_the_range() {
        let told = |text: &str| special(text.parse().expect("an address")).expect("it is closed").to_string();
        assert_eq!(told("::ffff:127.1.2.3"), "127.0.0.0/8, loopback (RFC 1122)");
        assert_eq!(told("fd00:ec2::254"), "fd00:ec2::/32, a cloud's metadata service (AWS)");
        assert_eq!(told("fd64::a9fe:a9fe"), "169.254.169.254/32, a cloud's metadata service (RFC 3927)");
        assert_eq!(told("9000::"), "::/0, not global unicast (RFC 4291)");
    }
}
