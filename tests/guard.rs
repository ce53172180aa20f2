//! The guard against forged requests: what it lets through and what not, that nothing else is connected to than what was
//! judged, and that names which change their mind reach nobody.

mod support;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use proptest::prelude::*;
use restcast::codec::http::parse_head;
use restcast::codec::http_response::{Request, write_request};
use restcast::guard::{Blocked, Hop, Pattern, Policy, Redirects, Target, special};
use restcast::runtime::fetch::FetcherOptions;
use restcast::runtime::resolver::Resolver;
use restcast::secret::Secret;
use restcast::stream::budget::{Ask, Budgets, PollLeave, Slot};
use restcast::stream::poll::{Endpoint, FetchRequest, UpstreamCode, Validators};
use restcast::time::Now;
use support::client::{Client, NOW, target};
use support::{Reply, Tunnels, Upstream, on_each_driver};
use url::Host;

/// What every name resolves to where a test says nothing else.
const PUBLIC: IpAddr = IpAddr::V4(Ipv4Addr::new(93, 184, 215, 14));

fn judged(policy: &Policy, url: &str) -> Result<Target, Blocked> {
    policy.judge(url)?.pin(&[PUBLIC])
}

fn verdict(policy: &Policy, url: &str) -> &'static str {
    judged(policy, url).map_or_else(|blocked| blocked.reason(), |_| "allow")
}

fn listing(patterns: &[&str]) -> Policy {
    let allow = patterns.iter().map(|text| Pattern::parse(text).unwrap_or_else(|e| panic!("{text} {e}"))).collect();
    Policy { allow, ..Policy::default() }
}

// What is public and what is not.

/// What no stranger reaches, and the reason's first word.
#[rustfmt::skip]
const BLOCKED: &[(&str, &[&str])] = &[
    ("special_address", &[
        // This machine, in every spelling that a client would take for it.
        "http://127.0.0.1/", "https://127.0.0.1:8443/", "http://127.0.0.1./", "http://127.1/", "http://127.0.1/", "http://127.255.255.254/",
        "http://2130706433/", "http://0x7f000001/", "http://0X7F000001/", "http://017700000001/", "http://0x7f.0x0.0x0.0x1/",
        "http://0177.0.0.1/", "http://0177.0.0.01/", "http://0000177.0.0.1/", "http://127.0x1/", "http://0x7f.1/", "http://127.0.0.0x1/",
        "http://127.000.000.001/", "http://0x7f.0.0.1/", "http://00000000000000000177.1/", "http://0x000000007f000001/", "http://127.65535/",
        "http://１２７.０.０.１/", "http://127。0。0。1/", "http://127．0．0．1/", "http://127｡0｡0｡1/", "http://①②⑦.⓪.⓪.①/", "http://127.0.0.①/",
        "http://0/", "http://0.0.0.0/", "http://0.0.0.0:8080/", "http://0x0/", "http://00/", "http://0.1.2.3/", "http://0.255.255.255/",
        "http://[::1]/", "http://[::1]:8080/", "http://[0:0:0:0:0:0:0:1]/", "http://[0000:0000::0001]/", "http://[::]/", "http://[0::0]/",
        "http://[::ffff:127.0.0.1]/", "http://[::ffff:7f00:1]/", "http://[::FFFF:7F00:0001]/", "http://[0:0:0:0:0:ffff:127.0.0.1]/",
        "http://[::ffff:0.0.0.0]/", "http://[::127.0.0.1]/", "http://[::7f00:1]/", "http://[::ffff:0:127.0.0.1]/",
        "http://[64:ff9b::127.0.0.1]/", "http://[64:ff9b::7f00:1]/", "http://[64:ff9b:1::127.0.0.1]/", "http://[2002:7f00:1::]/",
        "http://[2002:7f00:0001::1]/", "http://[2001:0:4136:e378:8000:63bf:80ff:fffe]/", "http://[2606:4700::5efe:127.0.0.1]/",
        // Its network.
        "http://10.0.0.1/", "http://10.255.255.255/", "http://0xa000001/", "http://012.0.0.1/", "http://167772161/", "http://10.1/",
        "http://172.16.0.1/", "http://172.31.255.255/", "http://172.16.1/", "http://0xac100001/", "http://192.168.0.1/", "http://192.168.1/",
        "http://192.168.255.255/", "http://3232235521/", "http://0300.0250.0.1/", "http://100.64.0.1/", "http://100.127.255.255/",
        "http://[::ffff:10.0.0.1]/", "http://[::ffff:c0a8:1]/", "http://[64:ff9b::10.0.0.1]/", "http://[64:ff9b::c0a8:101]/",
        "http://[2002:a00:1::]/", "http://[2002:c0a8:101::1]/", "http://[fc00::1]/", "http://[fd12:3456:789a::1]/", "http://[fdff::1]/",
        "http://[fe80::1]/", "http://[febf::1]/", "http://[fec0::1]/", "http://[feff::1]/",
        // Metadata services.
        "http://169.254.169.254/latest/meta-data/", "http://169.254.169.254:80/", "http://2852039166/", "http://0xa9fea9fe/", "http://0xA9.0xFE.0xA9.0xFE/",
        "http://0251.0376.0251.0376/", "http://169.254.43518/", "http://169.16689662/", "http://025177524776/", "http://[::ffff:169.254.169.254]/",
        "http://[::ffff:a9fe:a9fe]/", "http://[64:ff9b::a9fe:a9fe]/", "http://[2002:a9fe:a9fe::]/", "http://[::169.254.169.254]/",
        "http://①⑥⑨.②⑤④.①⑥⑨.②⑤④/", "http://169.254.170.2/v2/credentials", "http://169.254.0.23/", "http://[fd00:ec2::254]/", "http://[fd00:0ec2:0:0::0254]/",
        "http://[fd20:ce::254]/", "http://100.100.100.200/", "http://1684301000/", "http://168.63.129.16/", "http://192.0.0.192/",
        "http://169.254.1.1/", "http://169.254.255.255/",
        // Everything else that is not for hosts on the public network.
        "http://192.0.0.1/", "http://192.0.0.8/", "http://192.0.0.9/", "http://192.0.0.10/", "http://192.0.0.170/", "http://192.0.0.255/",
        "http://192.0.2.1/", "http://192.31.196.1/", "http://192.52.193.1/", "http://192.88.99.1/", "http://192.88.99.2/", "http://192.175.48.1/",
        "http://198.18.0.1/", "http://198.19.255.255/", "http://198.51.100.1/", "http://203.0.113.1/", "http://224.0.0.1/", "http://239.255.255.250/",
        "http://240.0.0.1/", "http://255.255.255.254/", "http://255.255.255.255/", "http://0xffffffff/", "http://4294967295/",
        "http://[100::1]/", "http://[100:0:0:1::1]/", "http://[2001::1]/", "http://[2001:1::1]/", "http://[2001:2::1]/", "http://[2001:3::1]/",
        "http://[2001:4:112::1]/", "http://[2001:10::1]/", "http://[2001:20::1]/", "http://[2001:30::1]/", "http://[2001:1ff::1]/",
        "http://[2001:db8::1]/", "http://[2620:4f:8000::1]/", "http://[3fff::1]/", "http://[3fff:fff::1]/", "http://[5f00::1]/",
        "http://[ff02::1]/", "http://[ff0e::1]/", "http://[4000::1]/", "http://[64:ff9b:2::1]/", "http://[1::1]/",
    ]),
    ("internal_name", &[
        "http://localhost/", "http://LOCALHOST/", "http://localhost./", "https://localhost:8443/", "http://a.localhost/", "http://ｌｏｃａｌｈｏｓｔ/",
        "http://ⓛⓞⓒⓐⓛⓗⓞⓢⓣ/", "http://localhost.localdomain/", "http://ip6-localhost/", "http://backend/", "http://redis/", "http://wpad/",
        "http://metadata/", "http://metadata.google.internal/computeMetadata/v1/", "http://METADATA.GOOGLE.INTERNAL./", "http://metadata.google。internal/",
        "http://metadata.azure.internal/", "http://instance-data.ec2.internal/", "http://host.docker.internal/", "http://gateway.docker.internal/",
        "http://kubernetes/", "http://kubernetes.default/", "http://kubernetes.default.svc/", "http://kubernetes.default.svc.cluster.local/",
        "http://printer.local/", "http://db.corp/", "http://nas.home.arpa/", "http://router.lan/", "http://nas.home/", "http://wiki.intranet/",
        "http://db.internal/", "http://db.private/", "http://1.0.0.127.in-addr.arpa/", "http://ipv4only.arpa/", "http://x.invalid/",
        "http://expyuzz4wqqyqhjn.onion/", "http://x.alt/", "http://consul.service.consul/", "http://fritz.box/", "http://com/",
    ]),
    ("metadata_name", &["http://metadata.goog/", "http://metadata.tencentyun.com/", "http://api.metadata.cloud.ibm.com/", "http://metadata.packet.net./"]),
    ("chosen_name", &[
        "http://127.0.0.1.nip.io/", "http://app.10-0-0-1.sslip.io/", "http://localtest.me/", "http://x.lvh.me/", "http://7f000001.c0a80001.rbndr.us/",
        "http://make-1.1.1.1-rebind-127.0.0.1-rr.1u.ms/",
    ]),
    ("bad_scheme", &[
        "", "http", "http:", "http:/", "http://", "http:///", "http://#", "http://?", "http://:80/", "ftp://example.com/", "file:///etc/passwd",
        "gopher://127.0.0.1:6379/_INFO", "dict://127.0.0.1:11211/", "ldap://example.com/", "ws://example.com/", "wss://example.com/", "javascript:alert(1)",
        "data:text/plain,a", "jar:http://127.0.0.1!/", "unix:///var/run/docker.sock", "http+unix://%2Fvar%2Frun%2Fdocker.sock/", "tftp://example.com/",
        "//127.0.0.1/", "//example.com/", "/relative", "example.com", "http:example.com", "http:/example.com", "http:///example.com", "http:////example.com/",
        "https:127.0.0.1", "blob:http://127.0.0.1/", "view-source:http://127.0.0.1/", "http://:@example.com/", "http://::1/", "about:blank", "netdoc:///etc/passwd", "url:http://127.0.0.1/",
    ]),
    ("user_in_url", &[
        "http://user@example.com/", "http://user:password@example.com/", "http://@example.com/",  "http://example.com@127.0.0.1/",
        "http://127.0.0.1@example.com/", "http://example.com:80@127.0.0.1/", "http://a@b@127.0.0.1/", "http://example.com#@127.0.0.1/",
        "http://example.com?@127.0.0.1/", "http://127.0.0.1#@example.com/", "http://1.1.1.1&@2.2.2.2#@127.0.0.1/", "http://127.1.1.1:80:@@127.2.2.2:80/",
    ]),
    ("bad_character", &[
        "http://example.com\\@127.0.0.1/", "http://127.0.0.1\\@example.com/", "http:\\\\127.0.0.1\\", "http://example.com/\\127.0.0.1", "http://127.0.0.1\t/",
        "http://127.0.\n0.1/", "h\nttp://127.0.0.1/", "ht\ttp://127.0.0.1/", " http://127.0.0.1/", "http://127.0.0.1/ ", "http://127.0.0.1 /", "http:// 127.0.0.1/",
        "\u{0}http://127.0.0.1/", "http://127.0.0.1\u{0}.example.com/", "http://example.com/\r\nHost: 127.0.0.1", "http://example.com/ HTTP/1.1\r\nX: y",
        "http://local\u{ad}host/", "http://127.0.0.1\u{200b}/", "http://\u{feff}127.0.0.1/", "http://example.com\u{2028}/", "http://example.com\u{3000}/",
        "http://\u{202e}moc.elpmaxe/", "http://127.0.0.1\u{85}/", "http://example.com/\u{7f}",
    ]),
    ("bad_encoding", &[
        "http://example.com/%", "http://example.com/%2", "http://example.com/%zz", "http://example.com/%0d%0aHost:%20127.0.0.1", "http://example.com/%00",
        "http://example.com/?a=%0D%0A", "http://example.com/?a=%00", "http://example.com%0d%0a/", "http://127.0.0.1%00.example.com/", "http://example.com/%u0041", "http://[fe80::1%eth0]/",
    ]),
    ("bad_url", &[
        "http://127%2e0%2e0%2e1/", "http://%31%32%37.0.0.1/", "http://loc%61lhost/", "http://%6c%6f%63%61%6c%68%6f%73%74/", "http://[fe80::1%25eth0]/",
         "http://example.com%23.127.0.0.1/", "http://[::1",  "http://[]/", "http://[::1]]/", "http://[127.0.0.1]/",
        "http://[v1.fe80::a]/", "http://[::g]/", "http://[::ffff:256.0.0.1]/", "http://[::ffff:127.1]/", "http://256.0.0.1/", "http://127.0.0.256/", "http://1.2.3.4.5/", "http://0x100000000/", "http://4294967296/",
        "http://127.0.0.08/", "http://127.0.0.1.1/", "http://example.com:65536/", "http://example.com:-1/", "http://example.com:80a/", "http://example.com:0x50/", "http://a|b.com/", "http://a<b>.com/", "http://a^b.com/", "http://xn--a/",
        "http://xn--.com/", "http://a..b../",
    ]),
    ("bad_name", &["http://a..b.com/", "http://.example.com/", "http://a,b.com/", "http://a$b.com/", "http://a!b.com/", "http://a'b.com/", "http://a{b}.com/", "http://*.example.com/", "http://a(b).com/", "http://a~b.com/", "http://a;b.com/"]),
    ("bad_port", &[
        "http://example.com:0/", "http://example.com:1/", "http://example.com:7/", "http://example.com:21/", "http://example.com:22/", "http://example.com:23/", "http://example.com:25/", "http://example.com:53/", "http://example.com:110/", "http://example.com:111/",
        "http://example.com:139/", "http://example.com:389/", "http://example.com:445/", "http://example.com:465/", "http://example.com:587/", "http://example.com:993/", "http://example.com:1023/", "http://example.com:1433/", "http://example.com:2375/",
        "http://example.com:2379/", "http://example.com:3306/", "http://example.com:3389/", "http://example.com:5432/", "http://example.com:5900/", "http://example.com:6000/", "http://example.com:6379/", "http://example.com:9200/", "http://example.com:10250/",
        "http://example.com:11211/", "http://example.com:27017/", "https://8.8.8.8:25/", "http://[2606:4700:4700::1111]:22/", "http://example.com:000022/",
    ]),
];

/// What a stranger may reach where everything public is allowed.
#[rustfmt::skip]
const ALLOWED: &[&str] = &[
    "http://example.com", "http://example.com/", "https://example.com/", "HTTPS://EXAMPLE.COM/", "https://api.example.com/v1/leads?page=2&sort=-id", "https://example.com:443/",
    "http://example.com:80/", "https://example.com:8443/", "http://example.com:8080/", "http://example.com:3000/", "http://example.com:65535/", "http://example.com:/", "https://example.com./x",
    "https://a.b.c.d.e.example.co.uk/", "https://bücher.example/", "https://xn--bcher-kva.example/", "https://例え.jp/パス?q=値", "https://россия.рф/", "https://münchen.de/ä",
    "https://example.com/@user", "https://example.com/a@b?mail=a@b.c", "https://example.com/#section", "https://example.com/a#@127.0.0.1", "https://example.com/?url=http://127.0.0.1/",
    "https://example.com/http://169.254.169.254/", "https://example.com/127.0.0.1", "https://example.com/a/../b", "https://example.com//a//b", "https://example.com/%2e%2e/x", "https://example.com/a%20b",
    "https://example.com/a%2Fb", "https://example.com/?q=a%0Ab%09c", "https://example.com/?q=[1]&r={2}|3", "https://example.com/a;b=c", "https://example.com/~user/$x,y!(z)*'", "https://example.com?q=1",
    "https://localhost.example.com/", "https://127.0.0.1.example.com/", "https://10.example.com/", "https://internal.example.com/", "https://metadata.example.com/", "https://169-254-169-254.example.com/",
    "https://notlocalhost.com/", "https://mylocal.io/", "https://thelan.org/", "https://corp.com/", "https://home.com/", "https://local.com/", "https://internal.io/", "https://onion.com/",
    "https://under_score.example.com/", "https://a--b.example.com/", "https://1and1.com/", "https://0x.org/", "https://a.test/", "https://x1.x2.museum/", "https://nip.io.example.com/",
    "http://1.1.1.1/", "https://8.8.8.8/", "https://8.8.8.8:8443/", "http://134744072/", "http://0x08080808/", "http://9.255.255.255/", "http://11.0.0.1/", "http://100.63.255.255/", "http://100.128.0.1/",
    "http://126.255.255.255/", "http://128.0.0.1/", "http://169.253.255.255/", "http://169.255.0.1/", "http://172.15.255.255/", "http://172.32.0.1/", "http://192.0.1.1/", "http://192.0.3.1/",
    "http://192.167.255.255/", "http://192.169.0.1/", "http://198.17.255.255/", "http://198.20.0.1/", "http://198.51.101.1/", "http://203.0.114.1/", "http://223.255.255.255/", "http://168.63.129.17/",
    "https://[2606:4700:4700::1111]/", "https://[2001:4860:4860::8888]:8443/", "https://[2a00:1450:4001:800::200e]/", "https://[2001:200::1]/", "https://[2001:db9::1]/", "https://[2003::1]/",
    "https://[::ffff:8.8.8.8]/", "https://[64:ff9b::8.8.8.8]/",
];

#[test]
fn what_is_not_public_is_blocked_however_it_is_spelled() {
    let policy = Policy::public();
    let mut wrong = Vec::new();
    let mut count = 0;
    for (reason, urls) in BLOCKED {
        for url in *urls {
            count += 1;
            let found = verdict(&policy, url);
            if found != *reason {
                wrong.push(format!("{url:?}: {found}, not {reason}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(count + ALLOWED.len() >= 250, "{count} and {}", ALLOWED.len());
}

#[test]
fn what_is_public_is_allowed() {
    let wrong: Vec<String> = ALLOWED
        .iter()
        .filter_map(|url| judged(&Policy::public(), url).err().map(|blocked| format!("{url:?}: {blocked}")))
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// What administrators may not have polled either, unless it is listed by its address.
#[rustfmt::skip]
const METADATA: &[&str] = &[
    "http://169.254.169.254/latest/", "http://2852039166/", "http://0xa9fea9fe/", "http://0251.0376.0251.0376/", "http://[::ffff:169.254.169.254]/",
    "http://[64:ff9b::a9fe:a9fe]/", "http://169.254.170.2/v2/credentials", "http://169.254.42.42/", "http://100.100.100.200/", "http://[::ffff:100.100.100.200]/",
    "http://168.63.129.16/", "http://192.0.0.192/", "http://[fd00:ec2::254]/", "http://[fd00:ec2::23]/", "http://[fd00:0ec2:0000::0254]/", "http://[fd00:ec2:0:1::1]/",
    "http://[fd00:c1::a9fe:a9fe]/opc/v2/instance/", "http://[fd00:c1::169.254.169.254]/", "http://[fd00:42::42]/conf", "http://[fd00:a9fe:a9fe::1]/v1/instance",
    "http://[fd00:100::100:200]/latest/", "http://[fd00:100:0:0:0:0:0100:0200]:8080/", "http://[fd20:ce::254]/computeMetadata/v1/", "http://[fd12:3456:789a::a9fe:a9fe]/",
    "http://[fd64:ff9b::100.100.100.200]/", "http://[fe80::a9fe:a9fe]/", "http://[2002:a9fe:a9fe::1]/", "http://[64:ff9b:1::a9fe:a9fe]/",
];

#[test]
fn a_metadata_service_is_nobodys_to_poll_unless_its_address_is_listed() {
    let administrators = Policy::of_administrators(Vec::new());
    for url in METADATA {
        for policy in [&administrators, &administrators.elsewhere(), &Policy::public()] {
            assert_eq!(verdict(policy, url), "special_address", "{url}");
        }
        // A name that leads there is as good.
        let host = url::Url::parse(url).expect("a URL").host().map(|host| host.to_owned());
        let address = match host {
            Some(Host::Ipv4(ip)) => IpAddr::V4(ip),
            Some(Host::Ipv6(ip)) => IpAddr::V6(ip),
            other => panic!("{url}: {other:?}"),
        };
        for policy in [&administrators, &Policy::of_administrators(listing(&["http://db.corp.test/*"]).allow)] {
            let aim = policy.judge("http://db.corp.test/").expect("a name of one's own");
            let pinned = aim.pin(&["10.0.0.1".parse().expect("an address"), address]);
            assert_eq!(pinned.expect_err(url).reason(), "resolves_to_special_address", "{url}");
        }
        let listed = listing(&[&format!("{}*", url::Url::parse(url).expect("a URL"))]);
        assert_eq!(verdict(&Policy::of_administrators(listed.allow), url), "allow", "{url}");
    }
    // What stands beside them is a machine like any other.
    for url in ["http://[fd00:c1::1]/", "http://[fd00:42::43]/", "http://[fd00:100::100:201]/", "http://[fd12::a00:1]/"]
    {
        assert_eq!(verdict(&administrators, url), "allow", "{url}");
        assert_eq!(verdict(&Policy::public(), url), "special_address", "{url}");
    }
}

#[test]
fn without_a_word_of_the_operator_nothing_is_allowed() {
    for url in ALLOWED {
        assert_eq!(judged(&Policy::default(), url).err(), Some(Blocked::NotListed), "{url}");
    }
}

#[test]
fn an_address_that_is_listed_may_be_private_and_a_name_may_not_lead_there() {
    let policy =
        listing(&["http://10.0.0.5:8080/api/*", "https://api.example.com/*", "http://redis:6379/", "http://[::1]:81/"]);
    for url in
        ["http://10.0.0.5:8080/api/x", "http://0xa000005:8080/api/x", "https://api.example.com/", "http://[::1]:81"]
    {
        assert_eq!(verdict(&policy, url), "allow", "{url}");
    }
    for url in ["http://10.0.0.5/api/x", "http://10.0.0.5:8080/", "http://10.0.0.6:8080/api/x", "https://example.com/"]
    {
        assert_eq!(verdict(&policy, url), "not_listed", "{url}");
    }
    // A name that is written out may be any; what it resolves to is judged all the same.
    let redis = policy.judge("http://redis:6379/").expect("it is listed");
    let private = redis.pin(&["10.0.0.7".parse().unwrap()]);
    assert_eq!(private.expect_err("it is private").reason(), "resolves_to_special_address");
    // Below a domain anybody may have a name.
    assert_eq!(verdict(&listing(&["http://*.internal/*"]), "http://metadata.google.internal/"), "internal_name");
    let both = Policy { allow_public: true, ..policy };
    assert_eq!(verdict(&both, "https://example.com/"), "allow");
    assert_eq!(verdict(&both, "http://10.0.0.6:8080/api/x"), "special_address");
}

#[test]
fn one_answer_that_is_not_public_blocks_a_name() {
    let ips = |text: &str| text.split_whitespace().map(|ip| ip.parse().expect("an address")).collect::<Vec<IpAddr>>();
    let pinned = |answers: &str| Policy::public().judge("https://example.com/").expect("public").pin(&ips(answers));
    for answers in ["8.8.8.8", "2606:4700::1 8.8.8.8", "64:ff9b::8.8.8.8"] {
        assert_eq!(pinned(answers).expect("all are public").addresses()[..], ips(answers)[..]);
    }
    assert_eq!(pinned("::ffff:8.8.8.8").expect("public").addresses()[..], ips("8.8.8.8")[..], "as the kernel takes it");
    for answers in
        ["127.0.0.1", "8.8.8.8 10.0.0.1", "10.0.0.1 8.8.8.8", "8.8.8.8 ::1", "::ffff:127.0.0.1", "fe80::1", "0.0.0.0"]
    {
        assert_eq!(pinned(answers).expect_err("one is not").reason(), "resolves_to_special_address", "{answers}");
    }
    assert_eq!(pinned(""), Err(Blocked::NoAddress));
}

#[test]
fn each_redirect_is_judged_and_headers_stay_at_home() {
    let policy = Policy::public();
    let way = |hops: &[(u16, &str)]| {
        let start = policy.judge("https://api.example.com/v1/leads").expect("public");
        let mut redirects = Redirects::new(&policy, &start);
        let mut told = Vec::new();
        for (status, location) in hops {
            match redirects.hop(*status, Some(location)) {
                Ok(Hop::Final) => told.push("final".to_owned()),
                Ok(Hop::To { aim, own_headers }) => {
                    told.push(format!("{} {}", aim.url(), if own_headers { "own" } else { "bare" }));
                }
                Err(blocked) => told.push(blocked.reason().to_owned()),
            }
        }
        told.join(", ")
    };
    for (hops, told) in [
        (&[(200, "http://127.0.0.1/")][..], "final"),
        (&[(304, "http://127.0.0.1/")], "final"),
        (&[(301, "/v2/leads"), (302, "x")], "https://api.example.com/v2/leads own, https://api.example.com/v2/x own"),
        (&[(307, "https://other.example.com/")], "https://other.example.com/ bare"),
        (&[(308, "https://api.example.com:8443/")], "https://api.example.com:8443/ bare"),
        (
            &[(302, "//x.yz/"), (302, "https://api.example.com/"), (302, "/2")],
            "https://x.yz/ bare, https://api.example.com/ bare, https://api.example.com/2 bare",
        ),
        (&[(302, "http://api.example.com/")], "downgrade"),
        (&[(302, "https://127.0.0.1/")], "special_address"),
        (&[(302, "//169.254.169.254/")], "special_address"),
        (&[(301, "https://localhost/")], "internal_name"),
        (&[(303, "https://x.yz:22/")], "bad_port"),
        (&[(302, "file:///etc/passwd")], "bad_scheme"),
        (&[(302, "https://u@x.yz/")], "user_in_url"),
        (&[(302, "/\\127.0.0.1/")], "bad_character"),
        (&[(302, "")], "bad_redirect"),
        (&[(300, "https://x.yz/")], "bad_redirect"),
        (&[(305, "http://10.0.0.1:3128/")], "bad_redirect"),
        (
            &[(302, "/1"), (302, "/2"), (302, "/3"), (302, "/4"), (302, "/5"), (302, "/6")],
            "https://api.example.com/1 own, https://api.example.com/2 own, https://api.example.com/3 own, \
             https://api.example.com/4 own, https://api.example.com/5 own, too_many_redirects",
        ),
    ] {
        assert_eq!(way(hops), told, "{hops:?}");
    }
    let listed = listing(&["https://api.example.com/public/*"]);
    let mut redirects = Redirects::new(&listed, &listed.judge("https://api.example.com/public/x").expect("listed"));
    assert_eq!(redirects.hop(302, Some("/private/x")), Err(Blocked::NotListed));
}

// What is judged is what is connected to.

/// An own reading of what the guard has let through: by RFC 3986 alone, without a URL parser.
fn read_plainly(url: &str) -> (bool, String, u16, String) {
    let (scheme, rest) = url.split_once("://").expect("a scheme");
    let (authority, target) = rest.split_at(rest.find('/').expect("a path"));
    assert!(!authority.contains(['@', '\\', '%', '#', '?', ' ']) && !target.contains(['#', '\\']), "{url}");
    let end = authority.rfind(']').map_or(0, |at| at + 1);
    let (host, port) = match authority[end..].find(':') {
        Some(at) => (&authority[..end + at], authority[end + at + 1..].parse().expect("a port")),
        None => (authority, if scheme == "https" { 443 } else { 80 }),
    };
    (scheme == "https", host.to_owned(), port, target.to_owned())
}

/// Whether std, which knows fewer ranges, would call the address anything but public.
fn is_plainly_special(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(v4) => {
            let private = v4.is_private() || v4.is_loopback() || v4.is_link_local() || v4.is_multicast();
            private || v4.is_unspecified() || v4.is_broadcast() || v4.is_documentation() || v4.octets()[0] >= 224
        }
        IpAddr::V6(v6) => {
            let local = v6.is_loopback() || v6.is_unspecified() || v6.is_unique_local() || v6.is_unicast_link_local();
            local || v6.is_multicast() || v6.segments()[0] == 0x2002 || v6.segments()[..2] == [0x2001, 0xdb8]
        }
    }
}

fn holds_together(text: &str) {
    let policy = Policy::public();
    let Ok(target) = judged(&policy, text) else { return };
    let endpoint = Endpoint::of(target.url()).expect("it can be connected to");
    // The client's reading, and one that shares no code with it.
    let (https, host, port, path) = read_plainly(target.url().as_str());
    assert_eq!((endpoint.https, endpoint.port, endpoint.target), (https, port, path.as_str()), "{text:?}");
    assert_eq!((endpoint.host.to_string(), target.port()), (host.clone(), port), "{text:?}");
    match endpoint.host {
        Host::Domain(name) => {
            assert!(name.contains('.') && !name.ends_with('.') && name.parse::<IpAddr>().is_err(), "{text:?}");
            assert_eq!(target.addresses()[..], [PUBLIC]);
        }
        Host::Ipv4(ip) => assert_eq!(target.addresses()[..], [IpAddr::V4(ip)]),
        Host::Ipv6(ip) => assert_eq!(target.addresses()[..], [IpAddr::V6(ip).to_canonical()]),
    }
    assert!(!target.addresses().iter().any(|ip| is_plainly_special(*ip)), "{text:?} leads to {:?}", target.addresses());
    // The request as it is sent, read as a server reads it.
    let request = Request {
        method: "GET",
        authority: endpoint.authority,
        target: endpoint.target,
        if_none_match: None,
        if_modified_since: None,
        body: None,
    };
    let mut bytes = Vec::new();
    write_request(&mut bytes, &request, []).unwrap_or_else(|error| panic!("{text:?}: {error}"));
    if endpoint.target.len() <= 8 << 10 {
        let (head, length) = parse_head(&bytes, 64 << 10).expect("a head").expect("a whole one");
        assert_eq!(length, bytes.len(), "one request, {text:?}");
        let sent = head.query.map_or(head.path.to_owned(), |query| format!("{}?{query}", head.path));
        assert_eq!((head.host, sent.as_str()), (endpoint.authority, endpoint.target), "{text:?}");
    }
    // What is normal stays as it is.
    assert_eq!(judged(&policy, target.url().as_str()).as_ref(), Ok(&target), "{text:?}");
}

#[test]
fn what_is_allowed_is_read_the_same_by_everybody() {
    ALLOWED.iter().chain(BLOCKED.iter().flat_map(|(_, urls)| *urls)).for_each(|url| holds_together(url));
}

/// What hostile URLs are put together from.
fn hostile() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        4 => prop::sample::select(vec![
            "http://", "https://", "HTTP:", "//", "/", "\\", "@", ":", "::", "#", "?", "[", "]", ".", "..", "%", "%2e", "%40", "%00", ";", "&",
            "127.0.0.1", "0x7f", "017", "1", "2130706433", "::1", "::ffff:", "64:ff9b::", "localhost", "example", ".com", "a.bc", "xn--", "bücher", "。", "①",
            "80", "443", "22", "8080", " ", "\t", "\n", "\u{ad}", "\u{200b}", "é", "{", "|", "'", "\"", "<", "*", "_", "-", "169.254.169.254", "8.8.8.8", "[2606:4700::1111]",
        ]).prop_map(str::to_owned),
        1 => any::<char>().prop_map(String::from),
    ];
    (prop::sample::select(vec!["http://", "https://", ""]), prop::collection::vec(piece, 0..12))
        .prop_map(|(scheme, pieces)| scheme.to_owned() + &pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_connected_to_that_was_not_judged(text in hostile()) {
        holds_together(&text);
    }

    #[test]
    fn a_well_formed_url_that_is_allowed_holds_together_too(
        host in "[a-zé_-]{1,8}(\\.[a-z0-9-]{1,8}){0,2}\\.(com|example|de)\\.?", port in prop::option::of(0..65_536u32),
        path in "(/[ -~é]{0,6}){0,4}", query in prop::option::of("[ -~ü]{0,12}"),
    ) {
        let port = port.map_or(String::new(), |port| format!(":{port}"));
        holds_together(&format!("https://{host}{port}{path}{}", query.map_or(String::new(), |query| format!("?{query}"))));
    }

    #[test]
    fn an_address_of_ipv4_is_judged_the_same_in_every_spelling(bits in any::<u32>()) {
        let ip = Ipv4Addr::from_bits(bits);
        let [a, b, c, d] = ip.octets();
        let wide: String = ip.to_string().chars().map(|c| match c {
            '.' => '。',
            digit => char::from_u32(u32::from(digit) - 0x30 + 0xff10).expect("a digit"),
        }).collect();
        let public = special(IpAddr::V4(ip)).is_none();
        for host in [
            ip.to_string(), format!("{ip}."), bits.to_string(), format!("{bits:#x}"), format!("0{bits:o}"), format!("{a}.{b}.{}", bits & 0xffff),
            format!("{a}.{}", bits & 0xff_ffff), format!("{a:#x}.{b:#o}.{c}.{d:#X}").replace("0o", "0").replace("0X", "0x"), wide,
            format!("[::ffff:{ip}]"), format!("[::ffff:{:x}:{:x}]", bits >> 16, bits & 0xffff), format!("[64:ff9b::{ip}]"),
        ] {
            let target = judged(&Policy::public(), &format!("http://{host}/"));
            prop_assert_eq!(target.is_ok(), public, "{}", host);
        }
        for host in [format!("[::{ip}]"), format!("[64:ff9b:1::{ip}]"), format!("[2002:{:x}:{:x}::]", bits >> 16, bits & 0xffff)] {
            prop_assert!(judged(&Policy::public(), &format!("http://{host}/")).is_err(), "{}", host);
        }
    }

    #[test]
    fn no_address_is_pinned_that_is_not_public(v4 in prop::collection::vec(any::<u32>(), 0..4), v6 in prop::collection::vec(any::<u128>(), 0..4)) {
        let v4 = v4.into_iter().map(|bits| IpAddr::V4(Ipv4Addr::from_bits(bits)));
        // Half of them where addresses are given out.
        let v6 = v6.into_iter().map(|bits| IpAddr::V6(Ipv6Addr::from_bits(if bits & 1 == 0 { bits >> 3 | 1 << 125 } else { bits })));
        let answers: Vec<IpAddr> = v4.chain(v6).collect();
        match Policy::public().judge("https://example.com/").expect("public").pin(&answers) {
            Ok(target) => {
                prop_assert_eq!(target.addresses().len(), answers.len());
                prop_assert!(!target.addresses().iter().any(|ip| is_plainly_special(*ip)));
            }
            Err(Blocked::NoAddress) => prop_assert!(answers.is_empty()),
            Err(_) => prop_assert!(answers.iter().any(|ip| special(*ip).is_some())),
        }
    }

    #[test]
    fn a_header_that_is_allowed_is_one_header(name in "\\PC{0,12}|[A-Za-z-]{1,20}", value in prop::collection::vec(any::<u8>(), 0..40)) {
        if Policy::public().judge_header(&name, &value).is_ok() {
            let request = Request { method: "GET", authority: "a.bc", target: "/", if_none_match: None, if_modified_since: None, body: None };
            let (mut with, mut without) = (Vec::new(), Vec::new());
            write_request(&mut with, &request, [(name.as_str(), value.as_slice())]).expect("it is allowed");
            write_request(&mut without, &request, []).expect("a request");
            let (head, length) = parse_head(&with, 64 << 10).expect("a head").expect("a whole one");
            prop_assert_eq!(length, with.len());
            prop_assert_eq!(head.host, "a.bc");
            let values: Vec<&[u8]> = head.all(&name).collect();
            prop_assert_eq!(values, [value.trim_ascii()]);
        }
    }
}

// The client.

/// A resolver whose lookups answer one after the other, the last one for ever; and how many there were.
fn rebinding(answers: Vec<Vec<IpAddr>>) -> (Resolver, Arc<AtomicUsize>) {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    let resolver = Resolver::with_lookup(Box::new(move |_| {
        let lookup = counted.fetch_add(1, Ordering::SeqCst);
        Ok(answers.get(lookup).or(answers.last()).cloned().unwrap_or_default())
    }));
    (resolver, count)
}

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// Global unicast that is given to nobody.
const NOBODY: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2d00, 0, 0, 0, 0, 0, 0, 1));

fn guarded(url: &str, policy: &Arc<Policy>) -> restcast::stream::poll::Target {
    let mut target = target(url, |options| options.connect_timeout = Duration::from_millis(300));
    target.guard = Some(Arc::clone(policy));
    target
}

#[test]
fn a_name_that_resolves_to_this_machine_is_not_connected_to() {
    on_each_driver(async || {
        for answers in [vec![LOOPBACK], vec![NOBODY, LOOPBACK], vec!["::ffff:127.0.0.1".parse().unwrap()]] {
            let (resolver, lookups) = rebinding(vec![answers]);
            let (client, upstream) = (Client::with(FetcherOptions::default(), resolver), Upstream::start());
            upstream.set_json("/leads", "1");
            let url = format!("http://rebind.test:{}/leads", upstream.address().port());
            let policy = Arc::new(Policy::public());
            let detail = client.fails(guarded(&url, &policy), UpstreamCode::Blocked).await;
            assert!(detail.contains("127.0.0.0/8") && detail.contains("resolves_to_special_address"), "{detail}");
            assert_eq!((lookups.load(Ordering::SeqCst), upstream.connection_count()), (1, 0));
            // The operator's own stream may go there, and what it has opened is no way in.
            assert_eq!(client.get(&url).await.expect("the operator's").status, 200);
            client.fails(guarded(&url, &policy), UpstreamCode::Blocked).await;
            assert_eq!((upstream.request_count(), upstream.connection_count()), (1, 1));
        }
    });
}

#[test]
fn a_name_that_leads_inside_is_not_told_from_one_that_is_none() {
    on_each_driver(async || {
        let resolver = Resolver::with_lookup(Box::new(|name| match name {
            "inside.corp.test" => Ok(vec![IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1))]),
            "empty.corp.test" => Ok(Vec::new()),
            _ => Err(std::io::Error::other("no such name")),
        }));
        let client = Client::with(FetcherOptions::default(), resolver);
        let policies = [Policy::public(), listing(&["http://*.corp.test/*"])].map(Arc::new);
        let mut details = Vec::new();
        for (policy, name) in policies.iter().flat_map(|policy| ["inside", "empty", "none"].map(|name| (policy, name)))
        {
            let url = format!("http://{name}.corp.test/leads");
            details.push(client.fails(guarded(&url, policy), UpstreamCode::Blocked).await);
        }
        // The operator is told what it was.
        for (detail, word) in
            details.iter().zip(["resolves_to_special_address", "no address", "no such name"].iter().cycle())
        {
            assert!(detail.contains(word), "{detail}: {word}");
        }
        // What the operator has named, and the operator's own, is no secret.
        let own = Arc::new(listing(&["http://none.corp.test/*", "http://*.corp.test/*"]));
        client.fails(guarded("http://none.corp.test/leads", &own), UpstreamCode::Dns).await;
        client.fails(target("http://none.corp.test/leads", |_| {}), UpstreamCode::Dns).await;
    });
}

#[test]
fn a_name_that_changes_its_mind_reaches_nobody() {
    on_each_driver(async || {
        let upstream = Upstream::start();
        upstream.set_json("/leads", "1");
        let url = format!("http://rebind.test:{}/leads", upstream.address().port());
        let policy = Arc::new(Policy::public());
        let answers = vec![vec![NOBODY], vec![LOOPBACK]];
        let (resolver, lookups) = rebinding(answers);
        let client = Client::with(FetcherOptions::default(), resolver);
        // What was judged is what is connected to: no second lookup comes between.
        let error = client.poll(guarded(&url, &policy)).await.expect_err("nobody is there");
        assert!(matches!(error.code, UpstreamCode::Unreachable | UpstreamCode::Timeout), "{error:?}");
        assert_eq!((lookups.load(Ordering::SeqCst), upstream.connection_count()), (1, 0));
        // Another process's cache, or this one's when the answer has aged: judged anew.
        let (resolver, _) = rebinding(vec![vec![LOOPBACK]]);
        let later = Client::with(FetcherOptions::default(), resolver);
        later.fails(guarded(&url, &policy), UpstreamCode::Blocked).await;
        assert_eq!(upstream.connection_count(), 0);
    });
}

#[test]
fn a_listed_address_is_polled_and_the_next_port_is_not() {
    on_each_driver(async || {
        let (client, upstream, other) = (Client::new(), Upstream::start(), Upstream::start());
        upstream.set_json("/leads", "1");
        let policy = Arc::new(listing(&[&upstream.url("/leads")]));
        for _ in 0..3 {
            assert_eq!(client.poll(guarded(&upstream.url("/leads"), &policy)).await.expect("listed").status, 200);
        }
        assert_eq!(upstream.connection_count(), 1, "its connections are kept like any other's");
        for url in
            [other.url("/leads"), upstream.url("/others"), upstream.url("/leads").replace("127.0.0.1", "localhost")]
        {
            let detail = client.fails(guarded(&url, &policy), UpstreamCode::Blocked).await;
            assert!(detail.contains("not_listed"), "{detail}");
        }
        let public = Arc::new(Policy::public());
        client.fails(guarded(&upstream.url("/leads"), &public), UpstreamCode::Blocked).await;
        assert_eq!((upstream.connection_count(), other.connection_count()), (1, 0));
    });
}

#[test]
fn an_administrators_name_may_be_of_this_network_and_never_a_metadata_service() {
    on_each_driver(async || {
        let upstream = Upstream::start();
        upstream.set_json("/leads", "1");
        let url = format!("http://rebind.test:{}/leads", upstream.address().port());
        let policy = Arc::new(Policy::of_administrators(Vec::new()));
        let metadata: IpAddr = "169.254.169.254".parse().expect("an address");
        let (resolver, _) = rebinding(vec![vec![LOOPBACK]]);
        let client = Client::with(FetcherOptions::default(), resolver);
        assert_eq!(client.poll(guarded(&url, &policy)).await.expect("it is the operator's own").status, 200);
        let mapped: IpAddr = "::ffff:169.254.169.254".parse().expect("an address");
        for answers in [vec![metadata], vec![LOOPBACK, metadata], vec![mapped], vec!["fe80::1".parse().unwrap()]] {
            let (resolver, lookups) = rebinding(vec![answers]);
            let client = Client::with(FetcherOptions::default(), resolver);
            let detail = client.fails(guarded(&url, &policy), UpstreamCode::Blocked).await;
            assert!(detail.contains("resolves_to_special_address"), "{detail}");
            assert_eq!(lookups.load(Ordering::SeqCst), 1);
        }
        assert_eq!(upstream.request_count(), 1);
        // One that is listed by its name only is judged by what it resolves to as well; by its address, not.
        let listed = Arc::new(Policy { own: true, ..listing(&["http://rebind.test:*/*"]) });
        let (resolver, _) = rebinding(vec![vec![metadata]]);
        let client = Client::with(FetcherOptions::default(), resolver);
        client.fails(guarded(&url, &listed), UpstreamCode::Blocked).await;
        let by_address = Policy { own: true, ..listing(&["http://169.254.169.254/*"]) };
        assert!(by_address.judge("http://169.254.169.254/x").is_ok());
    });
}

// Connections that idle.

/// Who names a URL, and how the addresses of the name in it are judged then: those who are judged alike may lend each other
/// connections, and nobody else.
fn judges(url: &str) -> Vec<(&'static str, &'static str, Option<Policy>)> {
    let listed = listing(&[url]);
    let below = listing(&["http://*.corp.test:*/*"]);
    let administrators = Policy::of_administrators(Vec::new());
    vec![
        ("the operator's file", "not at all", None),
        ("administrators", "own", Some(administrators.clone())),
        ("administrators, of a list", "own", Some(Policy::of_administrators(listed.allow.clone()))),
        ("callers, where all that is public is allowed", "public", Some(Policy::public())),
        ("callers, by a list", "public", Some(listed)),
        ("callers, by a list of a domain", "public", Some(below)),
        ("redirects of the operator's streams", "public", Some(Policy::public())),
        ("redirects of administrators' streams", "public", Some(administrators.elsewhere())),
    ]
}

fn judged_by(url: &str, policy: Option<&Policy>) -> restcast::stream::poll::Target {
    let mut target = target(url, |_| {});
    target.guard = policy.cloned().map(Arc::new);
    target
}

#[test]
fn no_connection_inward_is_lent_to_those_who_may_not_go_there() {
    on_each_driver(async || {
        let upstream = Upstream::start();
        upstream.set_json("/leads", "1");
        let url = format!("http://db.corp.test:{}/leads", upstream.address().port());
        let judges = judges(&url);
        for (lender, alike, opens) in &judges {
            for (borrower, judged, policy) in &judges {
                let (resolver, _) = rebinding(vec![vec![LOOPBACK]]);
                let client = Client::with(FetcherOptions::default(), resolver);
                let (before, pair) = (upstream.request_count(), format!("{lender} -> {borrower}"));
                let may = |judged: &str| judged != "public";
                let opened = client.poll(judged_by(&url, opens.as_ref())).await;
                assert_eq!(opened.is_ok(), may(alike), "{pair}: {opened:?}");
                let found = client.poll(judged_by(&url, policy.as_ref())).await;
                match may(judged) {
                    true => assert_eq!(found.expect(&pair).status, 200),
                    false => assert_eq!(found.expect_err(&pair).code, UpstreamCode::Blocked, "{pair}"),
                }
                let sent = usize::from(may(alike)) + usize::from(may(judged));
                assert_eq!(upstream.request_count() - before, sent, "{pair}");
            }
        }
    });
}

#[test]
fn connections_are_lent_where_the_same_judges_their_address_and_nowhere_else() {
    on_each_driver(async || {
        let api = Upstream::start();
        api.set_json("/leads", "1");
        // Anybody may reach it, and each connection is counted where it goes through.
        for host in ["api.corp.test", "93.184.216.34"] {
            let url = format!("http://{host}/leads");
            let judges = judges(&url);
            let may = |policy: &Policy| policy.judge(&url).is_ok();
            let judges: Vec<_> = judges.iter().filter(|(_, _, policy)| policy.as_ref().is_none_or(may)).collect();
            for (lender, alike, opens) in &judges {
                for (borrower, judged, policy) in &judges {
                    let tunnels = Tunnels::start();
                    tunnels.knows("93.184.216.34:80", api.address());
                    tunnels.knows("api.corp.test:80", api.address());
                    let (resolver, _) = rebinding(vec![vec!["93.184.216.34".parse().expect("an address")]]);
                    let client = Client::with(FetcherOptions::default(), resolver);
                    let client = client.through(&format!("http://{}", tunnels.address()));
                    for policy in [opens, policy] {
                        let answer = client.poll(judged_by(&url, policy.as_ref())).await;
                        assert_eq!(answer.expect(borrower).status, 200);
                    }
                    // An address in the URL was judged with the URL, each time, by whoever has named it.
                    let is_address = host.parse::<IpAddr>().is_ok();
                    let alike = alike == judged || (is_address && opens.is_some() && policy.is_some());
                    // And each has its part of the connections: what callers have opened is not the operator's.
                    let of_caller = |policy: &Option<Policy>| policy.as_ref().is_some_and(|policy| !policy.own);
                    let lent = alike && of_caller(opens) == of_caller(policy);
                    let expected = if lent { 1 } else { 2 };
                    assert_eq!(tunnels.asked().len(), expected, "{host}: {lender} -> {borrower}");
                }
            }
        }
    });
}

#[test]
fn a_redirect_borrows_no_connection_inward() {
    on_each_driver(async || {
        let (inner, partner) = (Upstream::start(), Upstream::start());
        inner.set_json("/ok", "1");
        inner.set_json("/secret", "2");
        let inward = |path: &str| format!("http://db.corp.test:{}{path}", inner.address().port());
        partner.set("/leads", Reply::status(302).header("Location", &inward("/secret")));
        let (resolver, _) = rebinding(vec![vec![LOOPBACK]]);
        let client = Client::with(FetcherOptions::default(), resolver);
        let own = Policy::of_administrators(Vec::new());
        for lender in [None, Some(&own)] {
            for redirected in [None, Some(&own)] {
                let before = inner.request_count();
                client.poll(judged_by(&inward("/ok"), lender)).await.expect("it is the operator's own");
                let mut target = target(&partner.url("/leads"), |options| options.redirects_max = 2);
                target.guard = redirected.cloned().map(Arc::new);
                let target = Arc::new(target);
                let now = || Now { at: restcast::time::Instant::from_micros(1_000_000), wall: NOW };
                let budgets = Arc::new(Budgets::default());
                let asked = budgets.lane(&target).ask(now().at, &mut Slot::default(), NEVER);
                let Ask::Go(permit) = asked else { panic!("the origin has done nothing wrong") };
                let request = FetchRequest { target, validators: Validators::default() };
                let outcome = client.fetcher.poll(request, PollLeave::Given(permit), now).await;
                let error = outcome.expect_err("it leads inside");
                assert_eq!(error.code, UpstreamCode::Blocked, "{lender:?} -> {redirected:?}: {error:?}");
                assert_eq!(inner.request_count() - before, 1, "{lender:?} -> {redirected:?}");
            }
        }
        assert!(inner.requests().iter().all(|seen| seen.target.starts_with("/ok")));
    });
}

#[test]
fn a_connection_that_one_is_signed_in_on_is_not_used_by_another() {
    on_each_driver(async || {
        let upstream = Upstream::start();
        upstream.set_json("/leads", "1");
        for (authorization, lent) in [
            ("Basic YTpi", true),
            ("Bearer negotiate", true),
            ("Negotiate YIIJvwYGKwYBBQUCoIIJszCCCa+", false),
            ("NTLM TlRMTVNTUAABAAAA", false),
            (" \tnEGOTIATE\tx", false),
        ] {
            let client = Client::new();
            let before = upstream.connection_count();
            let signed_in = target(&upstream.url("/leads"), |options| {
                options.headers.push(("AUTHORIZATION".to_owned(), Secret::new(authorization.as_bytes())));
            });
            assert_eq!(client.poll(signed_in).await.expect("an answer").status, 200);
            assert_eq!(client.get(&upstream.url("/leads")).await.expect("an answer").status, 200);
            let opened = upstream.connection_count() - before;
            assert_eq!(opened, if lent { 1 } else { 2 }, "{authorization:?}");
        }
    });
}

const NEVER: Duration = Duration::from_secs(60);
