//! `restcast explain token`: why a token is accepted or refused, told to a person or, line by line, to a program.
//!
//! Source: protocol version 1, section 7. The verdicts come from `auth::jwt`, the functions that serve requests.
//! Memory: one token, or one line of at most [`LINE_BYTES_MAX`]. Errors: those of reading and writing; a bad token or line
//! is an answer. Not here: the clock, reading a configuration, printing (`main`).

use std::io::{self, BufRead, Read, Write};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD_INDIFFERENT;
use serde::Deserialize;

use crate::auth::jwt::{self, JwtError, Options, Verifier};
use crate::auth::keys::{Algorithm, Key, KeyConfig, KeyError, KeySet};
use crate::auth::public_key::{PublicKey, PublicKeyError};
use crate::limits::TOKEN_BYTES_MAX;
use crate::secret::Secret;
use crate::time::WallTime;

/// Most bytes of one line of `--lines`, without its newline.
pub const LINE_BYTES_MAX: usize = 64 << 10;

/// What is said of one token.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Explanation {
    /// Whether the server would accept it.
    pub accepted: bool,
    /// Lines for a person: the verdict, then header and claims. Never the signature.
    pub text: String,
}

/// Explains the token that `input` holds, white space around it aside, by `verifier` at `now`. Without one there is no key,
/// so it is shown and not accepted.
///
/// Errors: those of `input`.
pub fn run(input: impl Read, verifier: Option<&Verifier>, now: WallTime) -> io::Result<Explanation> {
    let mut token = Vec::new();
    // Twice the limit leaves room for white space, and for a token that is seen to be too large.
    input.take(2 * TOKEN_BYTES_MAX as u64).read_to_end(&mut token)?;
    Ok(explain(token.trim_ascii(), verifier, now))
}

/// Explains `token` by `verifier` at `now`, as [`run`].
pub fn explain(token: &[u8], verifier: Option<&Verifier>, now: WallTime) -> Explanation {
    let verdict = verifier.map(|verifier| verifier.verify(token, now));
    let mut text = match &verdict {
        None => "not checked: no configuration was given, so there is no key to check it with\n".to_owned(),
        Some(Err(err)) => format!("refused: {err} ({}, {})\n", err.reason(), err.wire_code().as_str()),
        Some(Ok(verified)) => {
            let left = verified.expires().since(now);
            let key = verifier.and_then(|verifier| verifier.key(verified.key())).map(key_name);
            format!("accepted: {}, it expires in {} s\n", key.unwrap_or_default(), left.as_secs())
        }
    };
    let accepted = matches!(verdict, Some(Ok(_)));
    for (what, part) in [("header", jwt::claimed_header(token)), ("claims", jwt::claimed_payload(token))] {
        if let Ok(json) = part {
            text.push_str(&format!("{what}{}: {}\n", if accepted { "" } else { " (unverified)" }, printable(&json)));
        }
    }
    text.push_str(&format!("now: {}\n", now.as_secs()));
    Explanation { accepted, text }
}

fn key_name((key, issuer): (&Key, Option<&str>)) -> String {
    let quoted = |text: &str| printable(&format!("{text:?}"));
    let name = match key.kid() {
        Some(kid) => format!("signed with {} by the key {}", key.algorithm(), quoted(kid)),
        None => format!("signed with {} by a key without kid", key.algorithm()),
    };
    issuer.map(|issuer| format!("{name} of the issuer {}", quoted(issuer))).unwrap_or(name)
}

/// `json` in one line and without characters that a terminal would obey; they stand escaped, as JSON allows inside strings.
fn printable(json: &str) -> String {
    let mut shown = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            // Between the tokens of valid JSON; inside strings they cannot stand raw.
            '\n' | '\r' | '\t' => shown.push(' '),
            c if c.is_control() || is_direction_mark(c) => shown.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => shown.push(c),
        }
    }
    shown
}

/// Whether `c` changes the direction of the text behind it, and so what a reader believes to see.
fn is_direction_mark(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Answers each line of `input` with one of `output`, flushed, until `input` ends: `accept`, or `reject` and the reason.
///
/// Errors: those of `input` and `output`.
pub fn run_lines(mut input: impl BufRead, mut output: impl Write) -> io::Result<()> {
    let mut line = Vec::new();
    loop {
        let answer = match read_line(&mut input, &mut line)? {
            Line::None => return Ok(()),
            Line::Whole => answer_line(&line),
            Line::TooLong => Verdict::Reject(BAD_LINE),
        };
        match answer {
            Verdict::Accept => writeln!(output, "accept")?,
            Verdict::Reject(reason) => writeln!(output, "reject {reason}")?,
        }
        output.flush()?;
    }
}

const BAD_LINE: &str = "bad_line";

pub(super) enum Line {
    /// The input has ended.
    None,
    /// It stands in the buffer, without its newline.
    Whole,
    /// It was over [`LINE_BYTES_MAX`] and has been skipped.
    TooLong,
}

/// Reads one line into `line`, or past it.
pub(super) fn read_line(input: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<Line> {
    line.clear();
    let (mut any, mut too_long) = (false, false);
    loop {
        let ready = match input.fill_buf() {
            Ok(ready) => ready,
            Err(err) if err.kind() == io::ErrorKind::Interrupted => continue,
            Err(err) => return Err(err),
        };
        if ready.is_empty() {
            return Ok(match (any, too_long) {
                (_, true) => Line::TooLong,
                (true, false) => Line::Whole,
                (false, false) => Line::None,
            });
        }
        any = true;
        let end = memchr::memchr(b'\n', ready);
        let part = ready.get(..end.unwrap_or(ready.len())).unwrap_or_default();
        too_long |= line.len() + part.len() > LINE_BYTES_MAX;
        if !too_long {
            line.extend_from_slice(part);
        }
        let used = end.map_or(ready.len(), |end| end + 1);
        input.consume(used);
        if end.is_some() {
            return Ok(if too_long { Line::TooLong } else { Line::Whole });
        }
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Verdict {
    Accept,
    Reject(&'static str),
}

/// One line of `--lines`. Further members are ignored.
#[derive(Deserialize)]
struct TokenLine {
    token: String,
    /// base64url of the key: the secret's bytes, or a public key as DER, PEM, JWK or the 32 bytes of Ed25519.
    key_b64u: String,
    /// What the key may be used for.
    algs: Vec<String>,
    /// Seconds since the Unix epoch; needed where dates are judged.
    now: Option<f64>,
    level: Option<Level>,
    cfg: Option<LineConfig>,
}

#[derive(Clone, Copy, Deserialize, Eq, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Level {
    /// All rules: what is meant where nothing is said.
    Jwt,
    /// The signature and what stands before it.
    Jws,
}

#[derive(Default, Deserialize)]
struct LineConfig {
    #[serde(default)]
    iss: OneOrMany,
    #[serde(default)]
    aud: OneOrMany,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
    Null(()),
}

impl Default for OneOrMany {
    fn default() -> OneOrMany {
        OneOrMany::Null(())
    }
}

impl From<OneOrMany> for Vec<String> {
    fn from(value: OneOrMany) -> Vec<String> {
        match value {
            OneOrMany::One(one) => vec![one],
            OneOrMany::Many(many) => many,
            OneOrMany::Null(()) => Vec::new(),
        }
    }
}

fn answer_line(line: &[u8]) -> Verdict {
    let Ok(line) = serde_json::from_slice::<TokenLine>(line) else { return Verdict::Reject(BAD_LINE) };
    let level = line.level.unwrap_or(Level::Jwt);
    let now = match line.now.map(Duration::try_from_secs_f64) {
        Some(Ok(since_epoch)) => WallTime::default() + since_epoch,
        Some(Err(_)) => return Verdict::Reject(BAD_LINE),
        None if level == Level::Jws => WallTime::default(),
        None => return Verdict::Reject(BAD_LINE),
    };
    let keys = match line_keys(&line) {
        Ok(keys) => keys,
        Err(reason) => return Verdict::Reject(reason),
    };
    let LineConfig { iss, aud } = line.cfg.unwrap_or_default();
    let verifier = Verifier::new(Options { keys, issuers: iss.into(), audiences: aud.into(), ..Options::default() });
    let token = line.token.as_bytes();
    let verdict: Result<(), JwtError> = match level {
        Level::Jwt => verifier.verify(token, now).map(drop),
        Level::Jws => verifier.verify_signature(token).map(drop),
    };
    verdict.map_or_else(|err| Verdict::Reject(err.reason()), |()| Verdict::Accept)
}

/// The keys of a line: its one key under each of its algorithms that there is and that the key is good for. It stands under
/// whatever `kid` the token names, since the line says which key is meant.
fn line_keys(line: &TokenLine) -> Result<KeySet, &'static str> {
    let bytes = URL_SAFE_NO_PAD_INDIFFERENT.decode(&line.key_b64u).map_err(|_| "bad_key")?;
    let kid = jwt::claimed_kid(line.token.as_bytes()).unwrap_or_default();
    let named = |algorithm: &Algorithm| line.algs.iter().any(|alg| alg == algorithm.name());
    let mut refused = if line.algs.is_empty() { "no_alg" } else { "unsupported_alg" };
    let mut usable = Vec::new();
    for algorithm in Algorithm::ALL.into_iter().filter(named) {
        match line_key(&bytes, kid.as_deref(), algorithm) {
            Ok(key) => usable.push(key),
            // What is public is told first: it is the graver mistake.
            Err(reason) if refused != "not_a_secret" => refused = reason,
            Err(_) => {}
        }
    }
    if usable.is_empty() { Err(refused) } else { KeySet::of(usable).map_err(|_| refused) }
}

fn line_key(bytes: &[u8], kid: Option<&str>, algorithm: Algorithm) -> Result<Key, &'static str> {
    if algorithm.is_symmetric() {
        let config = KeyConfig { kid: kid.map(str::to_owned), algorithm, secret: Secret::new(bytes) };
        return Key::new(&config).map_err(|error| match error {
            KeyError::TooShort { .. } => "weak_key",
            _ => "not_a_secret",
        });
    }
    let public_key = PublicKey::read(bytes).map_err(|error| match error {
        PublicKeyError::RsaBits { .. } => "weak_key",
        PublicKeyError::Unsupported => "unsupported_key",
        _ => "bad_key",
    })?;
    Key::public("", kid, algorithm, &public_key).map_err(|_| "key_mismatch")
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    const NOW: WallTime = WallTime::from_secs(1_000_000);

    fn key(kid: Option<&str>) -> KeyConfig {
        let secret = Secret::new([1; 32]);
        KeyConfig { kid: kid.map(str::to_owned), algorithm: Algorithm::Hs256, secret }
    }

    fn minted(kid: Option<&str>, claims: &str) -> String {
        jwt::mint(&Key::new(&key(kid)).unwrap(), claims)
    }

    fn options() -> Verifier {
        Verifier::new(Options { keys: KeySet::new(&[key(None), key(Some("dev"))]).unwrap(), ..Options::default() })
    }

    fn told(token: &str, verifier: Option<&Verifier>) -> (bool, String) {
        let Explanation { accepted, text } = run(token.as_bytes(), verifier, NOW).unwrap();
        assert!(token.rsplit('.').next().is_none_or(|signature| signature.is_empty() || !text.contains(signature)));
        (accepted, text)
    }

    #[test]
    fn an_accepted_token_is_shown_with_its_key_and_claims() {
        let (accepted, text) =
            told(&format!("\n {}\n", minted(Some("dev"), "{\n \"sub\":\"ada\",\"exp\":1000060}")), Some(&options()));
        assert!(accepted);
        expect![[r#"
            accepted: signed with HS256 by the key "dev", it expires in 60 s
            header: {"alg":"HS256","typ":"JWT","kid":"dev"}
            claims: {  "sub":"ada","exp":1000060}
            now: 1000000
        "#]]
        .assert_eq(&text);
        let (_, text) = told(&minted(None, r#"{"exp":1000060}"#), Some(&options()));
        assert!(text.starts_with("accepted: signed with HS256 by a key without kid, it expires in 60 s\n"));
    }

    #[test]
    fn a_refused_token_is_shown_with_the_reason() {
        let (accepted, text) = told(&minted(None, r#"{"sub":"ada","exp":999995}"#), Some(&options()));
        assert!(!accepted);
        expect![[r#"
            refused: the token has expired (expired, TOKEN_EXPIRED)
            header (unverified): {"alg":"HS256","typ":"JWT"}
            claims (unverified): {"sub":"ada","exp":999995}
            now: 1000000
        "#]]
        .assert_eq(&text);
        let (_, text) = told(&minted(None, "{}"), None);
        assert!(text.starts_with("not checked: no configuration was given"));
        assert_eq!(
            told("rubbish", Some(&options())).1,
            "refused: the token does not have three parts (not_three_parts, INVALID_TOKEN)\nnow: 1000000\n"
        );
        assert!(told(&"a".repeat(1 << 20), Some(&options())).1.contains("too_large"));
        assert!(told("", Some(&options())).1.contains("not_three_parts"));
    }

    #[test]
    fn a_terminal_is_told_nothing_it_would_obey() {
        let claims = "{\"sub\":\"\u{7f}\u{9b}31m\u{202e}\",\"exp\":1000060}";
        let (accepted, text) = told(&minted(None, claims), Some(&options()));
        assert!(accepted && text.contains(r#"{"sub":"\u007f\u009b31m\u202e","exp":1000060}"#), "{text}");
    }

    fn answers(input: &[u8]) -> Vec<String> {
        let mut output = Vec::new();
        // A small buffer, so that lines arrive in pieces.
        run_lines(io::BufReader::with_capacity(7, input), &mut output).unwrap();
        String::from_utf8(output).unwrap().lines().map(str::to_owned).collect()
    }

    const KEY: &str = "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE";

    /// The answer to a line with these members besides the usual ones, of which the last of a name counts.
    fn answer(token: &str, others: serde_json::Value) -> String {
        let mut line = serde_json::json!({ "token": token, "key_b64u": KEY, "algs": ["HS256"], "now": 1_000_000 });
        for (name, value) in others.as_object().unwrap() {
            line[name] = value.clone();
        }
        answers(line.to_string().as_bytes()).join("\n")
    }

    #[test]
    fn each_line_is_judged_by_its_own_key_and_time() {
        use serde_json::json;
        let token = minted(None, r#"{"exp":1000060,"nbf":1000000,"iss":"idp","aud":["a","b"]}"#);
        for (others, wanted) in [
            (json!({}), "accept"),
            (json!({ "further": { "members": [] }, "level": null, "cfg": null }), "accept"),
            (json!({ "now": 1_000_064.999 }), "accept"),
            (json!({ "now": 1_000_065 }), "reject expired"),
            (json!({ "now": 999_995 }), "accept"),
            (json!({ "now": 999_994.5 }), "reject not_yet_valid"),
            (json!({ "now": 2_000_000, "level": "jws" }), "accept"),
            (json!({ "now": null, "level": "jws" }), "accept"),
            (json!({ "cfg": { "iss": "idp", "aud": "b" } }), "accept"),
            (json!({ "cfg": { "iss": ["x", "idp"], "aud": ["c", "a"], "more": 1 } }), "accept"),
            (json!({ "cfg": { "iss": "other" } }), "reject wrong_issuer"),
            (json!({ "cfg": { "aud": ["c"] } }), "reject wrong_audience"),
            (json!({ "cfg": { "iss": "other", "aud": "c" }, "level": "jws" }), "accept"),
            (json!({ "key_b64u": format!("{KEY}=") }), "accept"),
            (json!({ "key_b64u": KEY.replacen('A', "B", 1) }), "reject bad_signature"),
            (json!({ "key_b64u": "AQEB" }), "reject weak_key"),
            (json!({ "key_b64u": "A!" }), "reject bad_key"),
            (json!({ "algs": [] }), "reject no_alg"),
            (json!({ "algs": ["RS1", "ES512", "none"] }), "reject unsupported_alg"),
            (json!({ "algs": ["RS256"] }), "reject key_mismatch"),
            (json!({ "algs": ["EdDSA"] }), "reject no_key_for_alg"),
            (json!({ "algs": ["HS512"] }), "reject weak_key"),
            (json!({ "algs": ["RS256", "HS512", "HS256", "HS256"] }), "accept"),
            (json!({ "now": null }), "reject bad_line"),
            (json!({ "now": -1 }), "reject bad_line"),
            (json!({ "now": 1e300 }), "reject bad_line"),
            (json!({ "now": "1000000" }), "reject bad_line"),
            (json!({ "level": "jwe" }), "reject bad_line"),
            (json!({ "algs": "HS256" }), "reject bad_line"),
            (json!({ "token": 7 }), "reject bad_line"),
            (json!({ "cfg": { "iss": 7 } }), "reject bad_line"),
        ] {
            assert_eq!(answer(&token, others.clone()), wanted, "{others}");
        }
    }

    #[test]
    fn the_key_of_a_line_is_the_one_its_token_names() {
        let token = minted(Some("whatever"), r#"{"exp":1000060}"#);
        assert_eq!(answer(&token, serde_json::json!({})), "accept");
        let text = minted(None, "no object");
        assert_eq!(answer(&text, serde_json::json!({ "level": "jws" })), "accept");
        assert_eq!(answer(&text, serde_json::json!({})), "reject bad_payload");
    }

    #[test]
    fn a_line_may_bring_a_public_key_in_any_form() {
        use serde_json::json;
        let rfc: serde_json::Value = serde_json::from_str(include_str!("../../tests/vectors/rfc.json")).unwrap();
        let example = |section: &str| {
            let all = rfc["verifies"].as_array().unwrap();
            let found = all.iter().find(|example| example["section"] == section).unwrap();
            (found["jws"].as_str().unwrap().to_owned(), found["key"].clone())
        };
        let b64u = |bytes: &[u8]| URL_SAFE_NO_PAD_INDIFFERENT.encode(bytes);
        let (ed, ed_jwk) = example("RFC 8037 A.4");
        let point = ed_jwk["x"].as_str().unwrap();
        let raw = URL_SAFE_NO_PAD_INDIFFERENT.decode(point).unwrap();
        let spki = [b"\x30\x2a\x30\x05\x06\x03\x2b\x65\x70\x03\x21\x00", &*raw].concat();
        let body = base64::engine::general_purpose::STANDARD.encode(&spki);
        let pem = format!("-----BEGIN PUBLIC KEY-----\n{body}\n-----END PUBLIC KEY-----\n");
        for key in [point.to_owned(), b64u(&spki), b64u(pem.as_bytes()), b64u(ed_jwk.to_string().as_bytes())] {
            let line = |algs: &[&str]| answer(&ed, json!({ "key_b64u": key, "algs": algs, "level": "jws" }));
            assert_eq!(line(&["EdDSA"]), "accept");
            assert_eq!(line(&["RS256", "EdDSA", "ES256"]), "accept");
            assert_eq!(line(&["ES256"]), "reject key_mismatch");
        }
        let (rs, rs_jwk) = example("RFC 7515 A.2");
        let rs_key = b64u(rs_jwk.to_string().as_bytes());
        let line = |now: u64, level: &str| {
            answer(&rs, json!({ "key_b64u": rs_key, "algs": ["RS256"], "now": now, "level": level }))
        };
        assert_eq!(line(1_300_819_000, "jwt"), "accept");
        assert_eq!(line(1_400_000_000, "jwt"), "reject expired");
        assert_eq!(answer(&rs, json!({ "key_b64u": rs_key, "algs": ["PS256"] })), "reject no_key_for_alg");
        // The public key as a secret: whichever algorithms the line allows.
        let forged = minted(None, r#"{"exp":1000060}"#);
        assert_eq!(answer(&forged, json!({ "key_b64u": rs_key, "algs": ["RS256", "HS256"] })), "reject no_key_for_alg");
        let short = include_bytes!("../../tests/vectors/keys/rsa1024.pub.pem");
        assert_eq!(answer(&rs, json!({ "key_b64u": b64u(short), "algs": ["RS256"] })), "reject weak_key");
        let other = include_bytes!("../../tests/vectors/keys/ed448.pub.pem");
        assert_eq!(answer(&rs, json!({ "key_b64u": b64u(other), "algs": ["RS256"] })), "reject unsupported_key");
        assert_eq!(answer(&rs, json!({ "key_b64u": b64u(b"rubbish"), "algs": ["RS256"] })), "reject bad_key");
    }

    #[test]
    fn a_public_key_is_no_key_of_a_line() {
        let pem = "-----BEGIN PUBLIC KEY-----\nMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE\n-----END PUBLIC KEY-----\n";
        let key_b64u = URL_SAFE_NO_PAD_INDIFFERENT.encode(pem);
        let token = minted(None, r#"{"exp":1000060}"#);
        let algs = ["RS256", "HS256"];
        assert_eq!(answer(&token, serde_json::json!({ "key_b64u": key_b64u, "algs": algs })), "reject not_a_secret");
    }

    #[test]
    fn each_line_gets_one_answer_whatever_it_holds() {
        let good = serde_json::json!({
            "token": minted(None, r#"{"exp":1000060}"#), "key_b64u": KEY, "algs": ["HS256"], "now": 1_000_000,
        })
        .to_string();
        let padded = |bytes: usize| format!("{good}{}", " ".repeat(bytes - good.len()));
        let (at_limit, past_it) = (padded(LINE_BYTES_MAX), padded(LINE_BYTES_MAX + 1));
        let input = format!("{good}\nrubbish\n\n[]\n{at_limit}\n{past_it}\n{good}\r\n{past_it}{past_it}\n{good}");
        let bad = "reject bad_line";
        assert_eq!(answers(input.as_bytes()), ["accept", bad, bad, bad, "accept", bad, "accept", bad, "accept"]);
        assert_eq!(answers(b"\xff\xfe\n"), [bad]);
        assert_eq!(answers(past_it.as_bytes()), [bad]);
        assert!(answers(b"").is_empty());
    }
}
