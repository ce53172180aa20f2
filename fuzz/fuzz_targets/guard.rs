//! What a stranger names as a target: URLs, redirects and headers, as text of any kind.
#![no_main]

use std::net::{IpAddr, Ipv4Addr};

use libfuzzer_sys::fuzz_target;
use restcast::codec::http::parse_head;
use restcast::codec::http_response::{Request, write_request};
use restcast::guard::{Hop, Pattern, Policy, Redirects, Target, special};
use restcast::stream::poll::Endpoint;

const PUBLIC: IpAddr = IpAddr::V4(Ipv4Addr::new(93, 184, 215, 14));

fuzz_target!(|data: &[u8]| {
    let Some((&choice, rest)) = data.split_first() else { return };
    let Ok(text) = std::str::from_utf8(rest) else { return };
    let policy = Policy::public();
    match choice % 4 {
        0 => url(&policy, text),
        1 => redirects(&policy, text),
        2 => header(&policy, text),
        _ => pattern(text),
    }
});

fn url(policy: &Policy, text: &str) {
    let Ok(aim) = policy.judge(text) else { return };
    let Ok(target) = aim.pin(&[PUBLIC]) else { panic!("a name that resolves to a public address is pinned: {text:?}") };
    is_what_it_says(policy, &target);
}

/// The URL that is let through, as the client reads it, as a reader without a URL parser does, and as a server is sent it.
fn is_what_it_says(policy: &Policy, target: &Target) {
    let url = target.url().as_str();
    let endpoint = Endpoint::of(target.url()).expect("it can be connected to");
    let (scheme, rest) = url.split_once("://").expect("a scheme");
    let (authority, path) = rest.split_at(rest.find('/').expect("a path"));
    assert_eq!((endpoint.https, endpoint.authority, endpoint.target), (scheme == "https", authority, path), "{url}");
    assert!(!authority.contains(['@', '\\', '%', '#', '?']) && !path.contains(['#', '\\']), "{url}");
    let host = match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => {
            assert_eq!(port.parse(), Ok(endpoint.port), "{url}");
            host
        }
        _ => authority,
    };
    assert_eq!(endpoint.host.to_string(), host, "{url}");
    let literal = host.trim_matches(['[', ']']).parse::<IpAddr>();
    assert_eq!(target.addresses()[..], [literal.map_or(PUBLIC, |ip| ip.to_canonical())], "{url}");
    assert!(target.addresses().iter().all(|ip| special(*ip).is_none() && !ip.is_loopback()), "{url}");
    let request = Request {
        method: "GET",
        authority: endpoint.authority,
        target: endpoint.target,
        if_none_match: None,
        if_modified_since: None,
        body: None,
    };
    let mut bytes = Vec::new();
    write_request(&mut bytes, &request, []).expect("it can be sent");
    if endpoint.target.len() <= 8 << 10 {
        let (head, length) = parse_head(&bytes, 64 << 10).expect("a head").expect("a whole one");
        assert_eq!((head.host, length), (authority, bytes.len()), "{url}");
    }
    let again = policy.judge(url).expect("what is normal stays so").pin(&[PUBLIC]).expect("as before");
    assert_eq!(&again, target);
}

fn redirects(policy: &Policy, text: &str) {
    let start = policy.judge("https://api.example.com:8443/a/b?c").expect("public");
    let origin = start.url().origin();
    let mut chain = Redirects::new(policy, &start);
    for location in text.split('\n') {
        match chain.hop(302, Some(location)) {
            Ok(Hop::To { aim, own_headers }) => {
                assert!(aim.url().scheme() == "https" && (!own_headers || aim.url().origin() == origin));
                is_what_it_says(policy, &aim.pin(&[PUBLIC]).expect("it resolves"));
            }
            Ok(Hop::Final) => panic!("302 is a redirect"),
            Err(_) => return,
        }
    }
}

fn header(policy: &Policy, text: &str) {
    let (name, value) = text.split_once('\n').unwrap_or((text, ""));
    if policy.judge_header(name, value.as_bytes()).is_err() {
        return;
    }
    let request = Request {
        method: "GET",
        authority: "a.bc",
        target: "/",
        if_none_match: None,
        if_modified_since: None,
        body: None,
    };
    let mut bytes = Vec::new();
    write_request(&mut bytes, &request, [(name, value.as_bytes())]).expect("what is allowed can be sent");
    let (head, length) = parse_head(&bytes, 64 << 10).expect("a head").expect("a whole one");
    assert_eq!((head.host, length, head.all(name).count()), ("a.bc", bytes.len(), 1));
}

/// A pattern, and a URL that it is asked about.
fn pattern(text: &str) {
    let (pattern, url) = text.split_once('\n').unwrap_or((text, "https://api.example.com/"));
    let Ok(pattern) = Pattern::parse(pattern) else { return };
    assert_eq!(Pattern::parse(&pattern.to_string()).as_ref(), Ok(&pattern), "printed as it is meant");
    let listed = pattern.address();
    let policy = Policy { allow: vec![pattern], ..Policy::default() };
    let Ok(aim) = policy.judge(url) else { return };
    assert!(aim.is_listed());
    let named = aim.name().is_some();
    let target = aim.pin(&[PUBLIC]).expect("it resolves to a public address, or is one that is listed");
    assert!(named || listed.is_some_and(|ip| target.addresses()[..] == [ip.to_canonical()]));
}
