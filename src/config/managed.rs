//! `[[stream]]` as JSON: what the admin API is given, and what it shows.
//!
//! A stream's JSON is written as TOML and takes the very way of the file (`walk`, `meaning`): the same keys, values and
//! errors, all at once. What is shown has `***` where a secret stands; where `***` comes back, the secret that is kept
//! stays.
//!
//! Source: protocol version 1, section 6; TOML 1.0; `keys::KEYS` for what is secret. Memory: one stream's text a few
//! times. Errors: [`ManagedError`], the caller's fault; no secret stands in it. Not here: where they are kept (`runtime`).

use std::fmt::Write as _;
use std::sync::Arc;

use serde_json::{Map, Value, json};
use toml::de::DeValue;

use super::form::Sourced;
use super::keys::{self, Form};
use super::meaning::Check;
use super::walk::{Lined, Section, walk};
use super::{ConfigError, ERRORS_MAX, Oddity, Problem, Sources, WARNINGS_MAX, form, show};
use crate::guard::{Aim, Blocked, Policy};
use crate::limits::{HOOK_SECRETS_MAX, MANAGED_DEPTH_MAX};
use crate::stream::Options;
use crate::stream::credential::Credential;
use crate::stream::live::{Live, Rule};
use crate::stream::template::UrlTemplate;

/// The keys of one `[[stream]]` by their names, as JSON.
pub type Members = Map<String, Value>;

/// What stands in the place of a secret.
const MASK: &str = "***";
/// A hook's secret shorter than this is warned of.
const HOOK_SECRET_BYTES: usize = 16;
/// Keys that may name what stands elsewhere, in a variable or a file, and without which a stream can be read.
const ELSEWHERE: [&str; 7] = ["headers", "auth", "client_cert", "client_key", "ca", "hook_secret", "sign"];
/// The array of tables that a stream is an element of.
const STREAM: &str = "stream";

/// A stream that was read from JSON.
#[derive(Clone, Debug)]
pub struct Managed {
    /// What it means.
    pub options: Arc<Options>,
    /// What is odd about it and works.
    pub warnings: Vec<String>,
}

/// What is wrong with a stream's JSON: each a sentence that names its key.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error("{}", .0.join("; "))]
pub struct ManagedError(pub Vec<String>);

impl Managed {
    /// Reads a stream's JSON.
    ///
    /// # Errors
    /// [`ManagedError`].
    pub fn parse(members: &Members, sources: &dyn Sources) -> Result<Managed, ManagedError> {
        let text = as_toml(members).map_err(|error| ManagedError(vec![error]))?;
        let mut errors = Vec::new();
        let Some(root) = walk(&text, sources, &mut errors) else { return Err(told(errors)) };
        let mut check = Check { errors: &mut errors, warnings: Vec::new(), sources };
        // API keys that open it may be made at any time.
        let mut streams = check.streams(&root, true);
        let warnings = check.warnings.iter().take(WARNINGS_MAX).map(|warning| warning.oddity.to_string()).collect();
        match streams.pop() {
            Some(options) if errors.is_empty() => Ok(Managed { options, warnings }),
            _ => Err(told(errors)),
        }
    }

    /// Reads the JSON of a stream that was right when it was made. Where it is but for what it names elsewhere, a variable
    /// that is not set or a file that is gone, it is the stream that nothing is asked for until that is there
    /// ([`Credential::lacks`]).
    ///
    /// # Errors
    /// [`ManagedError`]: all that is wrong with it.
    pub fn parse_kept(members: &Members, sources: &dyn Sources) -> Result<Managed, ManagedError> {
        let wrong = match Managed::parse(members, sources) {
            Err(wrong) => wrong,
            whole => return whole,
        };
        let mut rest = members.clone();
        rest.retain(|name, _| !ELSEWHERE.contains(&name.as_str()));
        let Ok(Managed { options, warnings }) = Managed::parse(&rest, sources) else { return Err(wrong) };
        let credential = Credential { lacks: Some(wrong.to_string().into()), ..options.credential.clone() };
        Ok(Managed { options: Arc::new(Options { credential, ..(*options).clone() }), warnings })
    }
}

/// What speaks against a stream that an administrator describes, by what they may have polled; nothing: it may be. Each is a
/// sentence that names its key.
pub fn judge(members: &Members, options: &Options, policy: &Policy) -> Vec<String> {
    let mut said = Vec::new();
    let mut refuse = |key: &str, blocked: &Blocked| said.push(format!("`{key}`: {blocked} ({})", blocked.reason()));
    // As it was written, for a parser tidies up; what stands in a placeholder's place is judged with each poll.
    let url = members.get("url").and_then(Value::as_str).map(filled).unwrap_or_default();
    if let Err(blocked) = policy.judge(&url) {
        refuse("stream.url", &blocked);
    }
    if let Some(oauth) = options.credential.oauth()
        && let Err(blocked) = policy.judge(oauth.token_url.as_str())
    {
        refuse("stream.auth.token_url", &blocked);
    }
    let presented = options.credential.presented(None);
    let headers = || options.headers.iter().chain(&presented.headers);
    for (name, value) in headers() {
        if let Err(blocked) = policy.judge_header(name, value.expose_secret()) {
            refuse(&format!("stream.headers.{name}"), &blocked);
        }
    }
    if said.is_empty()
        && let Err(blocked) = policy.judge_headers(headers().map(|(name, value)| (&**name, value.expose_secret())))
    {
        said.push(format!("`stream.headers`: {blocked} ({})", blocked.reason()));
    }
    said
}

/// Where a stream of that URL, which an administrator describes, would be polled from by `policy`.
///
/// # Errors
/// Why it would not be: a sentence, and where it is the guard's, its reason in one word behind it.
pub fn judge_url(text: &str, policy: &Policy) -> Result<Aim, String> {
    let aim = policy.judge(&filled(text)).map_err(|blocked| format!("{blocked} ({})", blocked.reason()))?;
    UrlTemplate::parse(text, &query_names(text)).map_err(|error| error.to_string())?;
    Ok(aim)
}

/// A URL with something in the place of each placeholder.
fn filled(template: &str) -> String {
    let mut url = String::with_capacity(template.len());
    let mut rest = template;
    while let Some((before, from)) = rest.split_once('{') {
        url.push_str(before);
        url.push('x');
        rest = from.split_once('}').map_or("", |(_, behind)| behind);
    }
    url.push_str(rest);
    url
}

fn told(errors: Vec<ConfigError>) -> ManagedError {
    // There is one line: each error names its key.
    ManagedError(errors.iter().take(ERRORS_MAX).map(|error| error.problem.to_string()).collect())
}

impl Check<'_> {
    pub(super) fn hook_secrets(&mut self, section: &Section) -> Vec<Live> {
        let key = "stream.hook_secret";
        let secrets = section.secrets(key).unwrap_or_default();
        if secrets.len() > HOOK_SECRETS_MAX {
            let error = form::FormError::TooMany { limit: HOOK_SECRETS_MAX };
            self.error(section.line_of(key), Problem::Form { key: key.to_owned(), error });
        }
        for Lined { line, value } in secrets.iter().filter(|secret| secret.value.secret.len() < HOOK_SECRET_BYTES) {
            self.warn(*line, Oddity::ShortHookSecret { bytes: value.secret.len() });
        }
        let live = |Sourced { secret, source }| Live::new(source, Rule::Bytes, secret);
        secrets.into_iter().map(|secret| live(secret.value)).collect()
    }
}

/// What is shown of a stream's JSON: secrets, bodies and the values of a URL's query as `***`.
pub fn masked(members: &Members) -> Members {
    members.iter().map(|(name, value)| (name.clone(), masked_at(&format!("{STREAM}.{name}"), value))).collect()
}

fn masked_at(path: &str, value: &Value) -> Value {
    match (kind_of(path), value) {
        (Kind::Secret, value) => masked_all(value),
        (Kind::Url, Value::String(text)) => masked_url(text).into(),
        (Kind::Url, value) => masked_all(value),
        // The names of a free table are the operator's.
        (Kind::Plain, Value::Object(_)) if keys::find(path).is_some() => value.clone(),
        (Kind::Plain, Value::Object(members)) => {
            let masked =
                members.iter().map(|(name, value)| (name.clone(), masked_at(&format!("{path}.{name}"), value)));
            Value::Object(masked.collect())
        }
        (Kind::Plain, Value::Array(elements)) => elements.iter().map(|element| masked_at(path, element)).collect(),
        (Kind::Plain, value) => value.clone(),
    }
}

fn masked_all(value: &Value) -> Value {
    match value {
        Value::Array(elements) => elements.iter().map(masked_all).collect(),
        Value::Object(members) => {
            Value::Object(members.iter().map(|(name, value)| (name.clone(), masked_all(value))).collect())
        }
        Value::Null => Value::Null,
        _ => MASK.into(),
    }
}

/// What of a key's value may be shown.
enum Kind {
    Plain,
    Secret,
    Url,
}

fn kind_of(path: &str) -> Kind {
    match keys::find(path).map(|key| key.form) {
        Some(Form::Secret | Form::SecretList | Form::SecretOrList | Form::SecretTable) => Kind::Secret,
        // What is sent to an upstream is shown nowhere.
        _ if path == "stream.body" => Kind::Secret,
        Some(Form::Text) if path == "stream.url" || path.ends_with("_url") => Kind::Url,
        // What is no key is kept nowhere, and shown to nobody.
        None if keys::find_table(path).is_none() => Kind::Secret,
        _ => Kind::Plain,
    }
}

/// A URL without its password and query values.
fn masked_url(text: &str) -> String {
    UrlTemplate::parse(text, &query_names(text)).map_or_else(|_| MASK.to_owned(), |url| url.to_string())
}

/// The parameters that a URL's template names.
fn query_names(text: &str) -> Vec<&str> {
    text.split("{query.").skip(1).filter_map(|rest| rest.split_once('}')).map(|(name, _)| name).collect()
}

/// A stream's JSON with the secrets of `kept` wherever it has `***` in the place of one. A member that is null is not there.
///
/// # Errors
/// [`ManagedError`]: there is no such secret.
pub fn unmasked(members: &Members, kept: Option<&Members>) -> Result<Members, ManagedError> {
    let mut errors = Vec::new();
    let unmasked = members.iter().filter(|(_, value)| !value.is_null()).map(|(name, value)| {
        let kept = kept.and_then(|kept| kept.get(name));
        (name.clone(), unmasked_at(&format!("{STREAM}.{name}"), value, kept, &mut errors))
    });
    let unmasked = unmasked.collect();
    if errors.is_empty() { Ok(unmasked) } else { Err(ManagedError(errors)) }
}

fn unmasked_at(path: &str, value: &Value, kept: Option<&Value>, errors: &mut Vec<String>) -> Value {
    match (kind_of(path), value) {
        (Kind::Url, Value::String(text)) if text.contains(MASK) => match kept {
            Some(kept) if masked_at(path, kept) == *value => kept.clone(),
            _ => {
                errors.push(format!("`{path}` has {MASK} in the place of something, and is not the URL that is kept"));
                Value::Null
            }
        },
        (Kind::Secret, Value::String(text)) if text == MASK => match kept {
            Some(Value::String(secret)) => secret.clone().into(),
            _ => {
                let path = form::quoted(path);
                errors.push(format!("`{}` is {MASK}, and there is none that is kept", path.trim_matches('"')));
                Value::Null
            }
        },
        (_, Value::Object(members)) => {
            let unmasked = members.iter().filter(|(_, value)| !value.is_null()).map(|(name, value)| {
                let kept = kept.and_then(|kept| kept.get(name));
                (name.clone(), unmasked_below(path, name, value, kept, errors))
            });
            Value::Object(unmasked.collect())
        }
        (_, Value::Array(elements)) => {
            // Elements go by their places: of an array of another length nobody knows which of them stay.
            let kept = kept.and_then(Value::as_array).filter(|kept| kept.len() == elements.len());
            let unmasked = elements.iter().enumerate();
            unmasked.map(|(at, value)| unmasked_at(path, value, kept.and_then(|kept| kept.get(at)), errors)).collect()
        }
        _ => value.clone(),
    }
}

/// A member of a table: of a table of secrets each is one.
fn unmasked_below(path: &str, name: &str, value: &Value, kept: Option<&Value>, errors: &mut Vec<String>) -> Value {
    let below = format!("{path}.{name}");
    match kind_of(path) {
        Kind::Secret if keys::find(&below).is_none() => match (value, kept) {
            (Value::String(text), Some(Value::String(secret))) if text == MASK => secret.clone().into(),
            (Value::String(text), _) if text == MASK => {
                let below = form::quoted(&below);
                errors.push(format!("`{}` is {MASK}, and there is none that is kept", below.trim_matches('"')));
                Value::Null
            }
            _ => value.clone(),
        },
        _ => unmasked_at(&below, value, kept, errors),
    }
}

/// What is shown of a stream of the file: every key in force, secrets as `***`.
pub fn members_of(options: &Options) -> Members {
    let text = show::stream_toml(options);
    let root = toml::de::DeTable::parse(&text).expect("what is shown of a configuration is TOML");
    let streams = root.get_ref().get(STREAM).map(|streams| as_json(streams.get_ref()));
    match streams.and_then(|streams| streams.get(0).cloned()) {
        Some(Value::Object(members)) => members,
        _ => Members::new(),
    }
}

fn as_json(value: &DeValue<'_>) -> Value {
    match value {
        DeValue::String(text) => text.as_ref().into(),
        DeValue::Integer(integer) => {
            u64::from_str_radix(integer.as_str(), integer.radix()).map_or(Value::Null, Value::from)
        }
        DeValue::Float(float) => float.as_str().parse::<f64>().map_or(Value::Null, |float| json!(float)),
        DeValue::Boolean(boolean) => (*boolean).into(),
        DeValue::Datetime(datetime) => datetime.to_string().into(),
        DeValue::Array(elements) => elements.iter().map(|element| as_json(element.get_ref())).collect(),
        DeValue::Table(table) => Value::Object(
            table.iter().map(|(name, value)| (name.get_ref().to_string(), as_json(value.get_ref()))).collect(),
        ),
    }
}

/// A file with this stream alone, in one line.
fn as_toml(members: &Members) -> Result<String, String> {
    let mut text = format!("{STREAM} = [");
    write_table(&mut text, members, MANAGED_DEPTH_MAX)?;
    text.push(']');
    Ok(text)
}

fn write_table(out: &mut String, members: &Members, depth: usize) -> Result<(), String> {
    let depth = depth.checked_sub(1).ok_or_else(|| format!("the JSON is over {MANAGED_DEPTH_MAX} levels deep"))?;
    out.push('{');
    for (at, (name, value)) in members.iter().enumerate() {
        if at > 0 {
            out.push(',');
        }
        out.push_str(&show::quoted(name));
        out.push('=');
        write_value(out, value, depth)?;
    }
    out.push('}');
    Ok(())
}

fn write_value(out: &mut String, value: &Value, depth: usize) -> Result<(), String> {
    match value {
        Value::Null => return Err("null may not stand there".to_owned()),
        Value::Bool(boolean) => write!(out, "{boolean}").expect("writing to a String does not fail"),
        Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(integer), _) => write!(out, "{integer}").expect("writing to a String does not fail"),
            // TOML has no greater integers; no key takes one.
            (None, float) => write!(out, "{:e}", float.unwrap_or_default()).expect("writing to a String does not fail"),
        },
        Value::String(text) => out.push_str(&show::quoted(text)),
        Value::Array(elements) => {
            let depth =
                depth.checked_sub(1).ok_or_else(|| format!("the JSON is over {MANAGED_DEPTH_MAX} levels deep"))?;
            out.push('[');
            for (at, element) in elements.iter().enumerate() {
                if at > 0 {
                    out.push(',');
                }
                write_value(out, element, depth)?;
            }
            out.push(']');
        }
        Value::Object(members) => write_table(out, members, depth)?,
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};
    use proptest::prelude::{ProptestConfig, prop_assert, prop_assert_eq, proptest};

    use super::*;
    use crate::config::tests::{World, check, parse};

    fn members(json: Value) -> Members {
        match json {
            Value::Object(members) => members,
            other => panic!("{other} is no object"),
        }
    }

    fn whole() -> Members {
        members(json!({
            "id": "leads", "url": "https://u:secret@h/{claims.c}?key=secret&r={query.r}", "params": ["r"], "method": "POST",
            "headers": { "Authorization": "env:SECRET", "X": "secret" }, "body": "{\"secret\":1}",
            "hook_secret": ["a secret of sixteen bytes", "file:secret"], "interval": "250ms", "history": 7,
            "params_pattern": { "r": "^[a-z]+$" }, "keep_warm": false,
            "view": [{ "roles": ["agent"], "pointers": ["", "/a\u{7}\"\\\u{7f}"] }, { "roles": ["b"], "path": "$.a" }],
        }))
    }

    #[test]
    fn json_means_what_the_file_means() {
        let file = r#"
            [[stream]]
            id = "leads"
            url = "https://u:secret@h/{claims.c}?key=secret&r={query.r}"
            params = ["r"]
            method = "POST"
            headers = { Authorization = "env:SECRET", X = "secret" }
            body = "{\"secret\":1}"
            hook_secret = ["a secret of sixteen bytes", "file:secret"]
            interval = "250ms"
            history = 7
            params_pattern = { r = "^[a-z]+$" }
            [[stream.view]]
            roles = ["agent"]
            pointers = ["", "/a\u0007\"\\\u007f"]
            [[stream.view]]
            roles = ["b"]
            path = "$.a"
        "#;
        let (config, _) = parse(file).expect("a configuration");
        let read = Managed::parse(&whole(), &World).expect("a stream");
        assert_eq!(*read.options, *config.streams[0]);
        assert_eq!(read.warnings, [""; 0]);
    }

    #[test]
    fn what_is_shown_holds_no_secret_and_means_the_same_when_it_comes_back() {
        let shown = masked(&whole());
        let text = |shown: &Members| Value::Object(shown.clone()).to_string().replace("hook_secret", "");
        let text_shown = text(&shown);
        for secret in ["secret", "SECRET", "sixteen"] {
            assert!(!text_shown.contains(secret), "{text_shown}");
        }
        assert_eq!(shown["url"], "https://***@h/{claims.c}?key=***&r={query.r}");
        assert_eq!(unmasked(&shown, Some(&whole())), Ok(whole()));
        // As if it stood in the file.
        let options = Managed::parse(&whole(), &World).expect("a stream").options;
        let of_file = members_of(&options);
        for key in ["url", "headers", "hook_secret", "body", "interval", "view", "params", "params_pattern"] {
            assert_eq!(of_file[key], shown[key], "{key}");
        }
        assert!(!text(&of_file).contains("secret"), "{of_file:?}");
    }

    #[test]
    fn a_kept_stream_without_what_it_names_is_the_same_stream_that_asks_nothing() {
        let gone = || {
            [
                json!({ "headers": { "X": "env:GONE" } }),
                json!({ "auth": { "kind": "bearer", "token": "file:gone" } }),
                json!({ "auth": { "kind": "oauth2", "token_url": "https://idp/token", "client_id": "c", "client_secret": "s", "ca": "gone.pem" } }),
                json!({ "client_cert": "gone.pem", "client_key": "key.pem" }),
                json!({ "ca": "gone.pem" }),
                json!({ "hook_secret": ["a secret of sixteen bytes", "env:GONE"] }),
                json!({ "sign": { "key_id": "k", "secret": "env:GONE" } }),
            ]
        };
        let with = |more: Value| {
            let mut all = whole();
            all.remove("headers");
            all.remove("hook_secret");
            let plain = all.clone();
            all.extend(members(more));
            (all, plain)
        };
        for more in gone() {
            let (all, plain) = with(more.clone());
            let said = Managed::parse(&all, &World).expect_err("it is not there").to_string();
            let kept = Managed::parse_kept(&all, &World).expect("a stream").options;
            assert_eq!(kept.credential.lacks.as_deref(), Some(said.as_str()), "{more}");
            let whole = Managed::parse(&plain, &World).expect("a stream").options;
            let without = Options { credential: Credential::default(), ..(*kept).clone() };
            assert_eq!(without, *whole, "nothing else is another: {more}");
            // What is wrong besides is no matter of what is there.
            let (mut wrong, _) = with(more);
            wrong.insert("interval".into(), "soon".into());
            let said = Managed::parse_kept(&wrong, &World).expect_err("it is no stream").to_string();
            assert!(said.contains("`stream.interval`"), "{said}");
        }
        let there = Managed::parse_kept(&whole(), &World).expect("a stream").options;
        assert_eq!(there.credential.lacks, None);
        assert_eq!(there, Managed::parse(&whole(), &World).expect("a stream").options);
    }

    #[test]
    fn parameters_of_a_request_for_a_token_are_shown_to_nobody() {
        let auth = json!({
            "kind": "oauth2", "token_url": "https://idp/token", "client_id": "hidden-c", "client_secret": "hidden-s",
            "params": { "assertion": "hidden-p", "tenant": "hidden-t" },
        });
        let kept = members(json!({ "id": "a", "url": "https://h/", "auth": auth }));
        let shown = masked(&kept);
        assert_eq!(shown["auth"]["params"], json!({ "assertion": "***", "tenant": "***" }));
        assert!(!Value::Object(shown.clone()).to_string().contains("hidden"), "{shown:?}");
        assert_eq!(unmasked(&shown, Some(&kept)).expect("they are kept"), kept);
        let of_file = members_of(&Managed::parse(&kept, &World).expect("a stream").options);
        assert!(!Value::Object(of_file).to_string().contains("hidden"));
    }

    #[test]
    fn what_an_administrator_may_not_have_polled_is_named_with_its_key() {
        let judged = |json: Value, allow: &[&str]| {
            let members = members(json);
            let options = Managed::parse(&members, &World).expect("a stream").options;
            let allow = allow.iter().map(|text| crate::guard::Pattern::parse(text).expect("a pattern")).collect();
            judge(&members, &options, &Policy::of_administrators(allow)).join("\n")
        };
        let of = |url: &str| json!({ "id": "a", "url": url });
        for open in [
            "http://127.0.0.1:6379/x",
            "http://10.0.0.5:50000/{claims.c}?a={claims.d}",
            "http://[::1]:81/",
            "http://backend/",
            "https://db.internal/",
            "https://api.example.com/",
            "http://192.0.2.1/",
        ] {
            assert_eq!(judged(of(open), &[]), "", "{open}");
        }
        for (url, reason) in [
            ("http://169.254.169.254/latest/{claims.c}", "special_address"),
            ("http://2852039166/", "special_address"),
            ("http://[::ffff:169.254.169.254]/", "special_address"),
            ("http://0.0.0.0/", "special_address"),
            ("http://169.254.1.1/", "special_address"),
            ("http://metadata.google.internal/computeMetadata/v1/", "metadata_name"),
            ("https://u:p@api.example.com/", "user_in_url"),
            ("http://127.0.0.1/a%0d%0ab", "bad_encoding"),
        ] {
            let said = judged(of(url), &[]);
            assert!(said.starts_with("`stream.url`: ") && said.ends_with(&format!("({reason})")), "{url}: {said}");
        }
        let listed = ["https://api.example.com/v1/*", "http://169.254.169.254/x"];
        for (url, reason) in [
            ("https://api.example.com/v1/{claims.c}/leads", ""),
            ("http://169.254.169.254/x", ""),
            ("https://api.example.com/v2/", "`stream.url`: not listed (not_listed)"),
            ("http://127.0.0.1/", "`stream.url`: not listed (not_listed)"),
        ] {
            assert_eq!(judged(of(url), &listed), reason, "{url}");
        }
        let mut bad = of("http://127.0.0.1/");
        bad["headers"] =
            json!({ "X-Forwarded-For": "10.0.0.1", "Metadata-Flavor": "Google", "Cookie": "a=b", "X-Key": "k" });
        bad["auth"] = json!({
            "kind": "oauth2", "token_url": "https://169.254.169.254/token", "client_id": "a", "client_secret": "b",
        });
        let said = judged(bad, &[]);
        let keys: Vec<&str> = said.lines().filter_map(|line| line.split('`').nth(1)).collect();
        assert_eq!(keys.len(), 3, "{said}");
        for key in ["stream.auth.token_url", "stream.headers.X-Forwarded-For", "stream.headers.Metadata-Flavor"] {
            assert!(keys.contains(&key), "{said}");
        }
        let many: Members = (0..3).map(|n| (format!("X-{n}"), "v".repeat(7_000).into())).collect();
        let mut over = of("http://127.0.0.1/");
        over["headers"] = Value::Object(many);
        assert!(judged(over, &[]).ends_with("(header_too_large)"));
    }

    #[test]
    fn what_administrators_may_have_polled_is_read_as_what_callers_may_name_is() {
        let lines = "[admin]\nstream_urls = [\"http://10.0.0.5:8080/*\", \"https://*.example.com\"]\n";
        let policy = parse(lines).expect("a configuration").0.admin.stream_urls;
        assert_eq!(
            policy.allow.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["http://10.0.0.5:8080/*", "https://*.example.com/*"]
        );
        assert!(policy.own && !policy.allow_public);
        let open = parse("").expect("a configuration").0.admin.stream_urls;
        assert!(open.own && open.allow_public && open.allow.is_empty());
        check(
            "[admin]\nstream_urls = [\"10.0.0.5\"]\n",
            expect![[r#"
                line 2: `admin.stream_urls`: "10.0.0.5" must begin with http:// or https:// and a host, as in "https://api.example.com/*"
            "#]],
        );
    }

    fn lacks(json: Value, kept: Option<&Members>, expected: Expect) {
        let said = unmasked(&members(json), kept).expect_err("something is missing");
        expected.assert_eq(&said.0.join("\n"));
    }

    #[test]
    fn what_stands_for_a_secret_that_is_not_there_is_refused() {
        lacks(
            json!({ "hook_secret": "***", "headers": { "X": "***", "Y": "y" }, "body": "***" }),
            None,
            expect![[r#"
                `stream.body` is ***, and there is none that is kept
                `stream.headers.X` is ***, and there is none that is kept
                `stream.hook_secret` is ***, and there is none that is kept"#]],
        );
        lacks(
            json!({ "hook_secret": ["***", "***", "***"], "headers": { "x": "***" }, "url": "https://***@h/?key=***" }),
            Some(&whole()),
            expect![[r#"
                `stream.headers.x` is ***, and there is none that is kept
                `stream.hook_secret` is ***, and there is none that is kept
                `stream.hook_secret` is ***, and there is none that is kept
                `stream.hook_secret` is ***, and there is none that is kept
                `stream.url` has *** in the place of something, and is not the URL that is kept"#]],
        );
        let new = members(json!({ "id": "a", "hook_secret": ["***", "new"], "array_key": "***", "body": null }));
        let kept =
            members(json!({ "id": "a", "hook_secret": ["a secret of sixteen bytes", "new"], "array_key": "***" }));
        assert_eq!(unmasked(&new, Some(&whole())), Ok(kept));
    }

    #[test]
    fn what_is_no_key_is_shown_to_nobody() {
        let shown = masked(&members(json!({ "pasword": "secret", "headers": 7, "view": [{ "role": "secret" }] })));
        assert_eq!(shown, members(json!({ "pasword": "***", "headers": "***", "view": [{ "role": "***" }] })));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        /// Whatever texts an administrator sends, they are read as they are, or refused: never as something else.
        #[test]
        fn any_text_is_that_text(id in ".*", key in ".*", name in ".*", text in ".*") {
            let mut json = members(json!({ "id": id, "url": "http://h/", "array_key": text, "headers": { &name: &text } }));
            json.insert(key.clone(), text.clone().into());
            match Managed::parse(&json, &World) {
                Ok(read) => {
                    prop_assert_eq!(read.options.id.as_str(), json["id"].as_str().expect("a string"));
                    prop_assert_eq!(read.options.array_key.as_deref(), json["array_key"].as_str());
                }
                Err(error) => prop_assert!(!error.0.is_empty() && !error.to_string().contains("not TOML"), "{}", error),
            }
        }
    }
}
