//! Secrets, what a server has said, and the search for the one in the other: as it is and in every encoding it might have
//! slipped through in.

#![allow(dead_code, unreachable_pub, reason = "each test crate uses its own part of this")]

use std::collections::{BTreeMap, HashMap};
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use serde_json::json;

use crate::support::Folder;
use crate::support::server::{Answer, Heard, Ws};

/// What must not be seen, by what it is.
#[derive(Default)]
pub struct Secrets(pub BTreeMap<String, String>);

impl Secrets {
    pub fn keep(&mut self, what: &str, secret: impl Into<String>) {
        let secret = secret.into();
        assert!(secret.len() >= 16, "{what}: what is short is found by chance");
        self.0.insert(what.to_owned(), secret);
    }

    /// A token: whole, and its signature alone.
    pub fn keep_token(&mut self, what: &str, token: &str) {
        self.keep(what, token);
        if let Some(signature) = token.rsplit('.').next().filter(|signature| signature.len() >= 16) {
            self.keep(&format!("{what} (signature)"), signature);
        }
    }
}

/// The forms that a secret might be seen in.
pub fn forms(secret: &str) -> Vec<Vec<u8>> {
    let bytes = secret.as_bytes();
    let hex = |upper: bool| -> String {
        bytes.iter().map(|b| if upper { format!("{b:02X}") } else { format!("{b:02x}") }).collect()
    };
    let percent = |all: bool, upper: bool| -> String {
        let plain = |b: u8| !all && (b.is_ascii_alphanumeric() || b"-._~".contains(&b));
        let escape = |b: u8| if upper { format!("%{b:02X}") } else { format!("%{b:02x}") };
        bytes.iter().map(|&b| if plain(b) { char::from(b).to_string() } else { escape(b) }).collect()
    };
    let mut forms = vec![
        secret.to_owned(),
        hex(false),
        hex(true),
        percent(false, false),
        percent(false, true),
        percent(true, false),
        percent(true, true),
        secret.replace(' ', "+"),
        // As `{:?}` shows bytes and texts.
        bytes.iter().map(u8::to_string).collect::<Vec<_>>().join(", "),
        format!("{secret:?}").trim_matches('"').to_owned(),
        json!(secret).to_string().trim_matches('"').to_owned(),
    ];
    // base64 of something longer that it stands in, wherever that begins: the characters that are the secret's alone.
    for engine in [STANDARD_NO_PAD, URL_SAFE_NO_PAD] {
        for before in 0..3usize {
            let mut text = vec![0u8; before];
            text.extend_from_slice(bytes);
            let encoded = engine.encode(&text);
            let from = (before * 8).div_ceil(6);
            let whole = text.len() * 8 / 6;
            forms.push(encoded[from..whole].to_owned());
        }
    }
    forms.sort();
    forms.dedup();
    forms.into_iter().map(String::into_bytes).collect()
}

/// Bytes by which the search finds where a form may begin.
const START: usize = 8;

fn holds(text: &[u8], needle: &[u8]) -> bool {
    memchr::memmem::find(text, needle).is_some()
}

/// Everything that the server has said, by where.
#[derive(Default)]
pub struct Said(pub Vec<(String, Vec<u8>)>);

impl Said {
    pub fn add(&mut self, place: impl Into<String>, text: impl Into<Vec<u8>>) {
        self.0.push((place.into(), text.into()));
    }

    pub fn answer(&mut self, place: impl Into<String>, answer: &Answer) -> u16 {
        let fields: Vec<String> = answer.headers.iter().map(|(name, value)| format!("{name}: {value}\n")).collect();
        let mut text = format!("{}\n{}", answer.status, fields.concat()).into_bytes();
        text.extend_from_slice(&answer.body);
        self.add(place, text);
        answer.status
    }

    /// What comes over a WebSocket until it has been quiet for a moment, or ends.
    pub fn frames(&mut self, place: &str, ws: &mut Ws) {
        for _ in 0..200 {
            match ws.heard_within(Duration::from_millis(150)) {
                Some(Heard::Frame(frame)) => self.add(place, frame.to_string()),
                Some(Heard::Close(code, reason)) => return self.add(place, format!("close {code} {reason}")),
                Some(Heard::Other(message)) => self.add(place, format!("{message:?}")),
                Some(Heard::Ping) => {}
                None | Some(Heard::End) => return,
            }
        }
    }

    /// The secrets that are seen: which, where, and how. One pass over each text: what stands at a place is looked at only
    /// where it begins like one of the forms.
    pub fn leaks(&self, secrets: &Secrets) -> Vec<String> {
        let mut by_start: HashMap<[u8; START], Vec<(&str, Vec<u8>)>> = HashMap::new();
        for (what, secret) in &secrets.0 {
            for form in forms(secret) {
                let start = *form.first_chunk().expect("no secret is that short");
                by_start.entry(start).or_default().push((what, form));
            }
        }
        let mut leaks = Vec::new();
        for (place, text) in &self.0 {
            for (at, start) in text.windows(START).enumerate() {
                let Some(begun) = <&[u8; START]>::try_from(start).ok().and_then(|start| by_start.get(start)) else {
                    continue;
                };
                for (what, form) in begun.iter().filter(|(_, form)| text[at..].starts_with(form)) {
                    let around = String::from_utf8_lossy(&text[at.saturating_sub(200)..text.len().min(at + 200)]);
                    let form = String::from_utf8_lossy(form);
                    leaks.push(format!("{what} is seen as {form:?} in {place}: …{around}…"));
                }
            }
        }
        leaks
    }

    /// Whether something is said at a place whose name begins so.
    pub fn says(&self, place: &str, text: &str) -> bool {
        self.0.iter().any(|(at, said)| at.starts_with(place) && holds(said, text.as_bytes()))
    }
}

/// What a command prints, given this file and this input.
pub fn command(folder: &Folder, said: &mut Said, arguments: &[&str], config: &str, input: &str) {
    let path = folder.put("restcast.toml", config);
    let mut child = Command::new(env!("CARGO_BIN_EXE_restcast"))
        .args(arguments)
        .arg("--config")
        .arg(&path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    // A command that takes no input may have ended before it comes.
    let _ = child.stdin.take().expect("a pipe").write_all(input.as_bytes());
    let output = child.wait_with_output().expect("it ends");
    said.add(format!("{arguments:?} out"), output.stdout);
    said.add(format!("{arguments:?} err"), output.stderr);
}
