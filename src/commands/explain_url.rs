//! `restcast explain url`: why direct mode would allow or block a target, told to a person or, line by line, to a program; a
//! person is told besides whether the admin API would take it as a stream's.
//!
//! Source: protocol version 1, section 7. The verdicts come from `guard`, the functions that serve requests.
//! Memory: one line of at most [`LINE_BYTES_MAX`](super::explain::LINE_BYTES_MAX). Errors: those of reading and writing; a bad
//! line is blocked. Not here: the network, which is not touched; reading a configuration, printing (`main`).

use std::io::{self, BufRead, Read, Write};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use serde::Deserialize;

use super::explain::{Explanation, Line, read_line};
use crate::config::{Config, judge_url};
use crate::guard::{Aim, Blocked, Hop, Policy, Redirects};
use crate::limits::DIRECT_URL_BYTES_MAX;

/// What a name resolves to that a line has no answers for: a public address.
const PUBLIC: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2606, 0x4700, 0, 0, 0, 0, 0, 1));
/// Where a chain of redirects comes from that does not say: a place that no rule speaks against.
const START: &str = "http://start.example/";

/// Who judges.
#[derive(Clone, Debug)]
pub struct Policies {
    /// The policy of `[direct]`; `None`: direct mode is off.
    pub direct: Option<Arc<Policy>>,
    /// The policy of `admin.stream_urls`,
    pub streams: Arc<Policy>,
    /// and whether there is anybody who may ask for a stream.
    pub admin: bool,
}

impl Policies {
    /// Those of a configuration. Without one, direct mode allows whatever is public, and an administrator may ask.
    pub fn of(config: Option<&Config>) -> Policies {
        match config {
            None => Policies {
                direct: Some(Arc::new(Policy::public())),
                streams: Arc::new(Policy::of_administrators(Vec::new())),
                admin: true,
            },
            Some(config) => Policies {
                direct: config.direct.as_ref().map(|direct| Arc::clone(&direct.policy)),
                streams: Arc::clone(&config.admin.stream_urls),
                admin: config.admin.key.is_some(),
            },
        }
    }
}

/// Explains the URL that `input` holds, as [`explain`].
///
/// Errors: those of `input`.
pub fn run(input: impl Read, policies: &Policies) -> io::Result<Explanation> {
    let mut url = Vec::new();
    // Twice the limit leaves room for white space, and for a URL that is seen to be too long.
    input.take(2 * DIRECT_URL_BYTES_MAX as u64).read_to_end(&mut url)?;
    Ok(explain(&String::from_utf8_lossy(&url), policies))
}

/// Explains the URL `text`, white space around it aside. Whether it is accepted is what direct mode says.
pub fn explain(text: &str, policies: &Policies) -> Explanation {
    let text = text.trim();
    let Explanation { accepted, text: direct } = explain_direct(text, policies.direct.as_deref());
    Explanation { accepted, text: format!("{direct}{}", explain_stream(text, policies)) }
}

/// What the admin API would say to a stream of that URL.
fn explain_stream(text: &str, policies: &Policies) -> String {
    let Policies { streams, admin, .. } = policies;
    let nobody = if *admin { "" } else { ", but there is no admin.key, and nobody may ask" };
    match judge_url(text, streams) {
        Err(why) => format!("as a stream of the admin API: blocked: {why}\n"),
        Ok(aim) if aim.is_listed() => {
            format!("as a stream of the admin API: allowed: listed in admin.stream_urls{nobody}\n")
        }
        Ok(_) => format!("as a stream of the admin API: allowed: public, or in a network of your own{nobody}\n"),
    }
}

fn explain_direct(text: &str, policy: Option<&Policy>) -> Explanation {
    match judged(policy, |policy| Ok(policy.judge(text)?)) {
        Err(refusal) => {
            Explanation { accepted: false, text: format!("blocked: {} ({})\n", refusal.words(), refusal.reason()) }
        }
        Ok(aim) => {
            let mut shown = aim.url().clone();
            if shown.query().is_some() {
                shown.set_query(Some("***"));
            }
            let mut text = format!("allowed: {}\nrequest: {shown}\n", how(&aim));
            if let Some(name) = aim.name() {
                let rule = "blocked after all where one of its addresses is not public";
                text.push_str(&format!("look-up: {name}, {rule}\n"));
            }
            Explanation { accepted: true, text }
        }
    }
}

/// Answers each line of `input` with one of `output`, flushed, until `input` ends: `allow` or `block`, and the reason.
///
/// Errors: those of `input` and `output`.
pub fn run_lines(mut input: impl BufRead, mut output: impl Write, policy: Option<&Policy>) -> io::Result<()> {
    let mut line = Vec::new();
    loop {
        let verdict = match read_line(&mut input, &mut line)? {
            Line::None => return Ok(()),
            Line::Whole => answer(&line, policy),
            Line::TooLong => Err(Refusal::BadLine),
        };
        match verdict {
            Ok(why) => writeln!(output, "allow {why}")?,
            Err(refusal) => writeln!(output, "block {}: {}", refusal.reason(), refusal.words())?,
        }
        output.flush()?;
    }
}

/// Why something is blocked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Refusal {
    /// By the guard.
    Guard(Blocked),
    /// Direct mode is off.
    Off,
    /// The line is none that is known.
    BadLine,
    /// An answer of a lookup that is no address.
    BadAnswer,
}

impl From<Blocked> for Refusal {
    fn from(blocked: Blocked) -> Refusal {
        Refusal::Guard(blocked)
    }
}

impl Refusal {
    fn reason(self) -> &'static str {
        match self {
            Refusal::Guard(blocked) => blocked.reason(),
            Refusal::Off => "direct_off",
            Refusal::BadLine => "bad_line",
            Refusal::BadAnswer => "bad_answer",
        }
    }

    fn words(self) -> String {
        match self {
            Refusal::Guard(blocked) => blocked.to_string(),
            Refusal::Off => "the configuration has no [direct]".to_owned(),
            Refusal::BadLine => "not one of the JSON objects that are known here".to_owned(),
            Refusal::BadAnswer => "an answer is no IP address".to_owned(),
        }
    }
}

/// One line of `--lines`. Further members are ignored.
#[derive(Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum UrlLine {
    /// A target.
    Url { url: String },
    /// A target, and what its name resolves to, at one lookup after the other.
    Dns {
        url: String,
        #[serde(default)]
        answers: Option<Vec<Vec<String>>>,
    },
    /// What upstreams answer with, one after the other: statuses, each with its `Location`.
    Redirect {
        #[serde(default)]
        url: Option<String>,
        hops: Vec<(u16, Option<String>)>,
    },
    /// A request header.
    Header { name: String, value: String },
}

fn judged<T>(policy: Option<&Policy>, judge: impl FnOnce(&Policy) -> Result<T, Refusal>) -> Result<T, Refusal> {
    judge(policy.ok_or(Refusal::Off)?)
}

fn answer(line: &[u8], policy: Option<&Policy>) -> Result<&'static str, Refusal> {
    let line = serde_json::from_slice::<UrlLine>(line).map_err(|_| Refusal::BadLine)?;
    judged(policy, |policy| match line {
        UrlLine::Url { url } => connection(&policy.judge(&url)?, &[PUBLIC]),
        UrlLine::Dns { url, answers } => dns(&policy.judge(&url)?, &answers.unwrap_or_default()),
        UrlLine::Redirect { url, hops } => redirects(policy, url.as_deref(), &hops),
        UrlLine::Header { name, value } => {
            policy.judge_header(&name, value.as_bytes())?;
            Ok("header")
        }
    })
}

fn how(aim: &Aim) -> &'static str {
    if aim.is_listed() { "listed" } else { "public" }
}

/// One connection: a lookup that answers so, and what is made of it.
fn connection(aim: &Aim, answers: &[IpAddr]) -> Result<&'static str, Refusal> {
    aim.clone().pin(answers)?;
    Ok(how(aim))
}

/// A stream is polled for long: one connection after the other, each with a lookup of its own. The first that is blocked ends it.
fn dns(aim: &Aim, lookups: &[Vec<String>]) -> Result<&'static str, Refusal> {
    if lookups.is_empty() {
        return connection(aim, &[PUBLIC]);
    }
    for lookup in lookups {
        let addresses: Result<Vec<IpAddr>, Refusal> = lookup.iter().map(|text| address(text)).collect();
        connection(aim, &addresses?)?;
    }
    Ok(how(aim))
}

/// An address as resolvers print it, with or without the zone that it is reached through.
fn address(text: &str) -> Result<IpAddr, Refusal> {
    let bare = text.split_once('%').map_or(text, |(address, _)| address);
    bare.parse().map_err(|_| Refusal::BadAnswer)
}

fn redirects(policy: &Policy, start: Option<&str>, hops: &[(u16, Option<String>)]) -> Result<&'static str, Refusal> {
    let mut chain = match start {
        Some(url) => Redirects::new(policy, &policy.judge(url)?),
        None => Redirects::from(policy, START.parse().expect("it is a URL")),
    };
    for (status, location) in hops {
        match chain.hop(*status, location.as_deref())? {
            Hop::Final => break,
            Hop::To { aim, .. } => drop(connection(&aim, &[PUBLIC])?),
        }
    }
    Ok("redirects")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::check::ProcessSources;
    use super::super::explain::LINE_BYTES_MAX;
    use super::*;
    use crate::guard::Pattern;

    fn answers(input: &[u8], policy: Option<&Policy>) -> Vec<String> {
        let mut output = Vec::new();
        run_lines(io::BufReader::with_capacity(7, input), &mut output, policy).unwrap();
        String::from_utf8(output).unwrap().lines().map(str::to_owned).collect()
    }

    fn verdict(line: &serde_json::Value) -> String {
        let answers = answers(line.to_string().as_bytes(), Some(&Policy::public()));
        answers.concat().split(':').next().unwrap_or_default().to_owned()
    }

    #[test]
    fn each_kind_of_line_is_judged() {
        for (line, wanted) in [
            (json!({ "kind": "url", "url": "https://api.example.com/x?key=k" }), "allow public"),
            (json!({ "kind": "url", "url": "http://[::ffff:127.0.0.1]/" }), "block special_address"),
            (json!({ "kind": "url", "url": "http://localhost/", "more": 1 }), "block internal_name"),
            (json!({ "kind": "dns", "url": "http://a.bc/", "name": "a.bc" }), "allow public"),
            (json!({ "kind": "dns", "url": "http://a.bc/", "name": "a.bc", "answers": [] }), "allow public"),
            (json!({ "kind": "dns", "url": "http://a.bc/", "name": "a.bc", "answers": [["8.8.8.8"]] }), "allow public"),
            (
                json!({ "kind": "dns", "url": "http://a.bc/", "answers": [["8.8.8.8", "10.0.0.1"]] }),
                "block resolves_to_special_address",
            ),
            (
                json!({ "kind": "dns", "url": "http://a.bc/", "answers": [["8.8.8.8"], ["::1"]] }),
                "block resolves_to_special_address",
            ),
            (
                json!({ "kind": "dns", "url": "http://a.bc/", "answers": [["fe80::1%eth0"]] }),
                "block resolves_to_special_address",
            ),
            (json!({ "kind": "dns", "url": "http://a.bc/", "answers": [[]] }), "block no_address"),
            (json!({ "kind": "dns", "url": "http://a.bc/", "answers": [["127.1"]] }), "block bad_answer"),
            (json!({ "kind": "dns", "url": "http://8.8.8.8/", "answers": [["10.0.0.1"]] }), "allow public"),
            (
                json!({ "kind": "redirect", "hops": [[301, "https://a.bc/"], [302, "/x"], [200, null]] }),
                "allow redirects",
            ),
            (json!({ "kind": "redirect", "hops": [[302, "http://169.254.169.254/"]] }), "block special_address"),
            (json!({ "kind": "redirect", "url": "https://a.bc/", "hops": [[302, "http://a.bc/"]] }), "block downgrade"),
            (json!({ "kind": "redirect", "hops": [[302, null]] }), "block bad_redirect"),
            (json!({ "kind": "header", "name": "X-Api-Key", "value": "k" }), "allow header"),
            (json!({ "kind": "header", "name": "host", "value": "k" }), "block framing_header"),
            (json!({ "kind": "header", "name": "X", "value": "a\r\nb: c" }), "block bad_header"),
            (json!({ "kind": "header", "name": "X" }), "block bad_line"),
            (json!({ "kind": "other", "url": "http://a.bc/" }), "block bad_line"),
            (json!({ "kind": "dns", "url": "http://a.bc/", "answers": [["8.8.8.8", 7]] }), "block bad_line"),
            (json!({ "kind": "redirect", "hops": [["302", "/"]] }), "block bad_line"),
            (json!({ "url": "http://a.bc/" }), "block bad_line"),
        ] {
            assert_eq!(verdict(&line), wanted, "{line}");
        }
    }

    #[test]
    fn each_line_gets_one_answer_whatever_it_holds() {
        let good = json!({ "kind": "url", "url": "https://a.bc/" }).to_string();
        let past = format!("{good}{}", " ".repeat(LINE_BYTES_MAX + 1 - good.len()));
        let input = format!("{good}\nrubbish\n\n[]\n{past}\n{{\"kind\":\"url\",\"url\":\"http://\\ud800\"}}\n{good}");
        let first: Vec<String> = answers(input.as_bytes(), Some(&Policy::public()))
            .iter()
            .map(|line| line.split(' ').next().unwrap_or_default().to_owned())
            .collect();
        assert_eq!(first, ["allow", "block", "block", "block", "block", "block", "allow"]);
        assert_eq!(answers(good.as_bytes(), None), ["block direct_off: the configuration has no [direct]"]);
        assert!(answers(b"", None).is_empty() && answers(b"\xff\n", None).len() == 1);
    }

    #[test]
    fn a_person_is_told_what_would_be_sent_and_no_query() {
        let policy = Policy { allow: vec![Pattern::parse("http://10.0.0.5/*").unwrap()], ..Policy::public() };
        let by = |direct: Option<&Policy>| Policies { direct: direct.cloned().map(Arc::new), ..Policies::of(None) };
        let explain = |text: &str, direct: Option<&Policy>| explain(text, &by(direct));
        let Explanation { accepted, text } = explain(" https://API.example.com/x?key=hunter2#y\n", Some(&policy));
        assert!(accepted && text.starts_with("allowed: public\nrequest: https://api.example.com/x?***\n"), "{text}");
        assert!(!text.contains("hunter2"));
        assert!(explain("http://10.0.0.5/x", Some(&policy)).text.starts_with("allowed: listed\n"));
        let blocked = explain("http://10.0.0.6/x", Some(&policy));
        let (first, _) = blocked.text.split_once('\n').expect("a line");
        assert_eq!(first, "blocked: 10.0.0.6 is in 10.0.0.0/8, private (RFC 1918) (special_address)");
        assert!(!blocked.accepted && !explain("http://a.bc/", None).accepted);
    }

    #[test]
    fn a_person_is_told_what_the_admin_api_would_say_whatever_direct_mode_says() {
        let listing =
            "[admin]\nkey = \"0123456789abcdef0123456789abcdef\"\nstream_urls = [\"http://10.0.0.5:8080/*\"]\n";
        let said = |config: Option<&str>, url: &str| {
            let config = config.map(|text| Config::parse(text, &ProcessSources).expect("a configuration").0);
            let Explanation { accepted, text } = explain(url, &Policies::of(config.as_ref()));
            let last = text.lines().last().expect("a line").to_owned();
            (accepted, last.strip_prefix("as a stream of the admin API: ").expect("it is told").to_owned())
        };
        let own = "allowed: public, or in a network of your own";
        for (config, url, accepted, wanted) in [
            (None, "https://api.example.com/x?key=hunter2", true, own),
            (None, "http://localhost:8081/{claims.companyId}/leads?r={query.region}", false, own),
            (None, "http://169.254.169.254/", false, "(special_address)"),
            (None, "http://u:hunter2@h.example/", false, "(user_in_url)"),
            (None, "http://{claims.host}/", false, "blocked: "),
            (None, "nonsense", false, "blocked: "),
            (Some(listing), "http://10.0.0.5:8080/x\n", false, "allowed: listed in admin.stream_urls"),
            (Some(listing), "https://api.example.com/", false, "blocked: not listed (not_listed)"),
            (Some("[direct]\nallow_public = true\n"), "https://api.example.com/", true, "nobody may ask"),
        ] {
            let (direct, told) = said(config, url);
            assert_eq!(direct, accepted, "{url}");
            assert!(told.contains(wanted) && !told.contains("hunter2"), "{url}: {told}");
            assert_eq!(told.starts_with("allowed: "), wanted.starts_with("allowed") || wanted == "nobody may ask");
        }
    }
}
