//! Where a request goes next when its answer leads elsewhere: a redirect, or the next page.
//!
//! Source: RFC 9110 section 15.4 (methods), RFC 8288 (`next`); WHATWG URL for references.
//! Memory: one URL. Errors: [`FetchError`]: `UPSTREAM_REDIRECT`, or `UPSTREAM_BLOCKED` where the guard says so; no detail holds
//! a URL. Not here: sending (`journey`), what the guard lets through (`guard`).
//!
//! What the operator has configured (headers, body, user and password) goes to the origin it was meant for and no other, and
//! once a request has left that origin, a way back does not bring them again. A `Location` is a stranger's word: it is read as
//! strictly as a caller's URL. The host and port that the operator has named may be asked again, and over TLS where both are
//! the usual ports; any other place is judged as if a caller had named it, another port of that host too.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::sync::Arc;

use url::Url;

use super::blocked_by_guard;
use crate::guard::{self, Aim, Blocked, Policy, UrlFault};
use crate::stream::poll::{FetchError, Target, UpstreamCode};

/// Where a request goes, and what of the configuration goes with it.
#[derive(Debug)]
pub(super) struct Place {
    /// The URL; where there is an aim, that one's.
    pub(super) url: Url,
    /// What the guard has made of it, where it is not the operator's.
    pub(super) aim: Option<Aim>,
    /// The method.
    pub(super) method: String,
    /// Whether the body goes with it.
    pub(super) with_body: bool,
    /// Whether the configured headers do: it is the origin they are for.
    pub(super) own: bool,
}

impl Place {
    /// Where a poll begins.
    pub(super) fn start(target: &Target) -> Result<Place, FetchError> {
        let aim = target.guard.as_ref().map(|policy| policy.judge(target.url.as_str()));
        let aim = aim.transpose().map_err(|reason| blocked_by_guard(&reason))?;
        let url = aim.as_ref().map_or(&target.url, Aim::url).clone();
        Ok(Place { url, aim, method: target.options.method.clone(), with_body: target.body.is_some(), own: true })
    }

    /// Tells what is asked there from what is asked elsewhere, or otherwise: never 0.
    pub(super) fn mark(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self.url.as_str(), &self.method, self.with_body, self.own).hash(&mut hasher);
        hasher.finish() | 1
    }

    /// Where a redirect with this status leads; `None`: it is none that is followed.
    pub(super) fn redirected(&self, target: &Target, status: u16, location: &str) -> Result<Option<Place>, FetchError> {
        // A 300 is a choice, a 304 none; 305 and 306 are gone.
        if !matches!(status, 301 | 302 | 303 | 307 | 308) {
            return Ok(None);
        }
        let url = guard::follow(&without_user(&self.url), location).map_err(|reason| match reason {
            Blocked::Url(UrlFault::Scheme) => refused("the answer leads to what is not http:// or https:// and a host"),
            Blocked::Url(UrlFault::Parse(_)) => refused("the answer leads to what is no URL"),
            reason => blocked_by_guard(&reason),
        })?;
        if self.url.scheme() == "https" && url.scheme() != "https" {
            return Err(refused("a redirect from https to http"));
        }
        let mut place = self.at(target, url)?;
        // RFC 9110 sections 15.4.2 to 15.4.4.
        if status == 303 || (matches!(status, 301 | 302) && self.method == "POST") {
            (place.method, place.with_body) = ("GET".to_owned(), false);
        }
        if place.with_body && !place.own {
            return Err(refused("a redirect that would take the request's body to another origin"));
        }
        Ok(Some(place))
    }

    /// The place of the next page.
    pub(super) fn next_page(&self, target: &Target, link: &str) -> Result<Place, FetchError> {
        let url = self.url.join(link).map_err(|_| refused("the answer leads to what is no URL"))?;
        if url.origin() != self.url.origin() {
            return Err(refused("the next page is of another origin"));
        }
        let place = self.at(target, without_user(&url))?;
        Ok(Place { method: "GET".to_owned(), with_body: false, ..place })
    }

    /// The place that an answer leads to.
    fn at(&self, target: &Target, mut url: Url) -> Result<Place, FetchError> {
        url.set_fragment(None);
        let own = self.own && url.origin() == self.url.origin();
        if own {
            let named = url.set_username(self.url.username()).and_then(|()| url.set_password(self.url.password()));
            named.map_err(|()| refused("the answer leads to what is no URL"))?;
        }
        let policy = match &target.guard {
            Some(policy) if policy.own && !is_named(&target.url, &url) => Some(Arc::new(policy.elsewhere())),
            Some(policy) => Some(Arc::clone(policy)),
            None if is_named(&target.url, &url) => None,
            None => Some(Arc::new(Policy::public())),
        };
        let aim = policy.map(|policy| policy.judge(url.as_str())).transpose();
        let aim = aim.map_err(|reason| blocked_by_guard(&reason))?;
        let url = aim.as_ref().map_or(url, |aim| aim.url().clone());
        Ok(Place { url, aim, method: self.method.clone(), with_body: self.with_body, own })
    }
}

/// Whether who has named `named` has named the place of `url` too: its host and port, or the same host over TLS, both at
/// their usual ports.
fn is_named(named: &Url, url: &Url) -> bool {
    let to_tls = (named.scheme(), named.port(), url.scheme(), url.port()) == ("http", None, "https", None);
    named.host() == url.host() && (to_tls || named.port_or_known_default() == url.port_or_known_default())
}

fn without_user(url: &Url) -> Url {
    let mut url = url.clone();
    // Every URL that is asked has a host, and so may have a user or none.
    let _ = url.set_username("").and_then(|()| url.set_password(None));
    url
}

pub(super) fn refused(why: &str) -> FetchError {
    FetchError { code: UpstreamCode::Redirect, detail: why.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::StreamId;
    use crate::stream::Options;
    use crate::stream::template::UrlTemplate;

    fn target(method: &str, url: &str, guard: Option<Policy>) -> Target {
        let blank = UrlTemplate::parse::<&str>("http://up.example/", &[]).expect("a URL");
        let options = Options::new(StreamId::new("s").expect("an id"), blank);
        let body = (method == "POST").then(|| Arc::from(*b"{}"));
        let options = Arc::new(Options { method: method.to_owned(), ..options });
        Target { options, url: url.parse().expect("a URL"), body, guard: guard.map(Arc::new) }
    }

    /// Where that leads: the method, the URL, whether the configured headers go with it; or why nowhere.
    fn check(target: &Target, status: u16, location: &str) -> String {
        let start = Place::start(target).expect("it may be polled");
        match start.redirected(target, status, location) {
            Ok(None) => "stays".to_owned(),
            Ok(Some(Place { url, method, with_body, own, aim })) => {
                let parts = [(with_body, " body"), (own, " own"), (aim.is_some(), " judged")];
                parts.into_iter().filter(|(is, _)| *is).fold(format!("{method} {url}"), |text, (_, part)| text + part)
            }
            Err(FetchError { code, detail }) => format!("{}: {detail}", code.as_str()),
        }
    }

    #[test]
    fn a_redirect_leads_where_it_says_with_what_may_go_there() {
        let get = target("GET", "https://user:pw@api.example.com/a/b?c", None);
        for (status, location, leads) in [
            (301, "/n", "GET https://user:pw@api.example.com/n own"),
            (302, "n?x#y", "GET https://user:pw@api.example.com/a/n?x own"),
            (307, "https://api.example.com/n", "GET https://user:pw@api.example.com/n own"),
            (303, "https://api.example.com:8443/n", "GET https://api.example.com:8443/n judged"),
            (302, "https://www.example.org/n", "GET https://www.example.org/n judged"),
            (302, "http://api.example.com/n", "UPSTREAM_REDIRECT: a redirect from https to http"),
            (302, "http://127.0.0.1/n", "UPSTREAM_REDIRECT: a redirect from https to http"),
            (
                302,
                "ftp://api.example.com/n",
                "UPSTREAM_REDIRECT: the answer leads to what is not http:// or https:// and a host",
            ),
            (302, "https://", "UPSTREAM_REDIRECT: the answer leads to what is not http:// or https:// and a host"),
            (300, "/n", "stays"),
            (304, "/n", "stays"),
            (305, "/n", "stays"),
        ] {
            assert_eq!(check(&get, status, location), leads, "{status} {location}");
        }
        for inward in
            ["https://169.254.169.254/latest", "https://127.0.0.1/", "https://localhost/", "https://db.internal/"]
        {
            let leads = check(&get, 302, inward);
            assert!(leads.starts_with("UPSTREAM_BLOCKED"), "{inward}: {leads}");
        }
    }

    #[test]
    fn a_redirect_to_another_port_or_spelling_of_the_operators_host_is_judged() {
        let private = target("GET", "http://127.0.0.1:8000/a", None);
        for (location, leads) in [
            ("http://127.0.0.1:8000/n", "GET http://127.0.0.1:8000/n own"),
            ("http://2130706433:8000/n", "GET http://127.0.0.1:8000/n own"),
            ("https://127.0.0.1:8000/n", "GET https://127.0.0.1:8000/n"),
        ] {
            assert_eq!(check(&private, 302, location), leads, "the place that the operator has named: {location}");
        }
        for inward in [
            "http://127.0.0.1:9080/admin/v1/streams",
            "http://127.0.0.1/",
            "https://127.0.0.1/",
            "https://127.0.0.1:8443/n",
            "http://127.0.0.1:6379/",
            "//127.0.0.1:22/",
            "http://2130706433:9080/",
            "http://0x7f.1:9080/",
            "http://[::ffff:127.0.0.1]:8000/",
            "http://127.0.0.2:8000/n",
        ] {
            let leads = check(&private, 302, inward);
            assert!(leads.starts_with("UPSTREAM_BLOCKED"), "{inward}: {leads}");
        }
        let usual = target("GET", "http://10.0.0.5/a", None);
        assert_eq!(check(&usual, 301, "https://10.0.0.5/a"), "GET https://10.0.0.5/a");
        assert!(check(&usual, 301, "https://10.0.0.5:8443/a").starts_with("UPSTREAM_BLOCKED"));
    }

    #[test]
    fn a_redirect_is_read_as_strictly_as_a_callers_url() {
        let get = target("GET", "http://user:pw@127.0.0.1:8000/a", None);
        for (location, reason) in [
            ("http://other:secret@127.0.0.1:8000/n", "user_in_url"),
            ("http://other@127.0.0.1:8000/n", "user_in_url"),
            ("//other@127.0.0.1:8000/n", "user_in_url"),
            ("http://127.0.0.1:8000\\@www.example.org/", "bad_character"),
            ("/a\\b", "bad_character"),
            ("/a\tb", "bad_character"),
            ("\thttp://127.0.0.1:8000/n", "bad_character"),
            ("/a%0d%0ab", "bad_encoding"),
            ("/a%zz", "bad_encoding"),
            ("http://%31%32%37.0.0.1:8000/", "bad_url"),
            ("http://127.0.0.1:0/", "bad_port"),
        ] {
            let leads = check(&get, 302, location);
            assert!(
                leads.starts_with("UPSTREAM_BLOCKED") && leads.ends_with(&format!("({reason})")),
                "{location}: {leads}"
            );
        }
        for location in ["http:127.0.0.1:8000/n", "http:///127.0.0.1:8000/n", "javascript:1"] {
            assert!(check(&get, 302, location).starts_with("UPSTREAM_REDIRECT"), "{location}");
        }
    }

    #[test]
    fn methods_change_as_the_standard_has_it() {
        let post = target("POST", "https://api.example.com/a", None);
        let query = target("QUERY", "https://api.example.com/a", None);
        for status in [301, 302, 303] {
            assert_eq!(check(&post, status, "/n"), "GET https://api.example.com/n own", "{status}");
        }
        for status in [307, 308] {
            assert_eq!(check(&post, status, "/n"), "POST https://api.example.com/n body own", "{status}");
            let leads = check(&post, status, "https://www.example.org/n");
            assert!(leads.starts_with("UPSTREAM_REDIRECT: a redirect that would take"), "{leads}");
        }
        assert_eq!(check(&query, 302, "/n"), "QUERY https://api.example.com/n own");
        assert_eq!(check(&query, 303, "/n"), "GET https://api.example.com/n own");
    }

    #[test]
    fn a_callers_target_is_judged_at_each_hop() {
        let direct = target("GET", "https://api.example.com/a", Some(Policy::public()));
        assert_eq!(check(&direct, 302, "/n"), "GET https://api.example.com/n own judged");
        assert!(check(&direct, 302, "https://api.example.com:22/n").starts_with("UPSTREAM_BLOCKED"));
    }

    #[test]
    fn an_upstream_of_an_administrators_stream_leads_nobody_into_the_operators_network() {
        let redirected = |allow: &[&str], location: &str| {
            let allow = allow.iter().map(|text| crate::guard::Pattern::parse(text).expect("a pattern")).collect();
            let policy = Policy::of_administrators(allow);
            check(&target("GET", "http://10.0.0.5:8000/a", Some(policy)), 302, location)
        };
        assert_eq!(redirected(&[], "/n"), "GET http://10.0.0.5:8000/n own judged");
        assert_eq!(redirected(&[], "https://www.example.org/n"), "GET https://www.example.org/n judged");
        for inward in [
            "http://10.0.0.5:9000/n",
            "http://10.0.0.6/",
            "http://127.0.0.1/",
            "http://db.internal/",
            "http://169.254.169.254/",
        ] {
            let leads = redirected(&[], inward);
            assert!(leads.starts_with("UPSTREAM_BLOCKED"), "{inward}: {leads}");
        }
        let listed = ["http://10.0.0.5:8000/*", "http://10.0.0.6/*", "http://db.internal/*"];
        assert_eq!(redirected(&listed, "http://10.0.0.6/n"), "GET http://10.0.0.6/n judged");
        assert_eq!(redirected(&listed, "http://db.internal/n"), "GET http://db.internal/n judged");
        for other in ["http://10.0.0.7/", "http://10.0.0.5:9000/", "https://www.example.org/n"] {
            let leads = redirected(&listed, other);
            assert!(leads.ends_with("(not_listed)"), "{other}: {leads}");
        }
    }

    #[test]
    fn what_has_left_its_origin_gets_nothing_on_its_way_back() {
        let get = target("GET", "https://api.example.com/a", None);
        let start = Place::start(&get).expect("it may be polled");
        let away = start.redirected(&get, 302, "https://www.example.org/n").expect("allowed").expect("a redirect");
        let back = away.redirected(&get, 302, "https://api.example.com/a2").expect("allowed").expect("a redirect");
        assert!(!back.own);
        let on = back.redirected(&get, 302, "/a3").expect("allowed").expect("a redirect");
        assert_eq!((on.url.as_str(), on.own), ("https://api.example.com/a3", false), "nor does anything from there on");
    }

    #[test]
    fn the_next_page_is_of_the_same_origin() {
        let get = target("GET", "https://api.example.com/a?page=1", None);
        let start = Place::start(&get).expect("it may be polled");
        let page = start.next_page(&get, "?page=2").expect("the same origin");
        assert_eq!((page.url.as_str(), page.own), ("https://api.example.com/a?page=2", true));
        let named = target("GET", "https://user:pw@api.example.com/a", None);
        let page =
            Place::start(&named).expect("it may be polled").next_page(&named, "https://other:secret@api.example.com/b");
        assert_eq!(
            page.expect("the same origin").url.as_str(),
            "https://user:pw@api.example.com/b",
            "its own, not the answer's"
        );
        for other in ["https://www.example.org/a?page=2", "http://api.example.com/a", "https://api.example.com:8443/a"]
        {
            assert_eq!(start.next_page(&get, other).expect_err(other).code, UpstreamCode::Redirect, "{other}");
        }
    }
}
