//! What events prove, against the built server: signatures and hashes in every representation, checked by the references of
//! `docs/verify` in two other languages.
#![cfg(feature = "runtime")]

mod support;
#[path = "support/watcher.rs"]
mod watcher;

use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use support::Upstream;
use support::server::{DRIVERS, Server, Setup, bearer, mint, now_s, token_of};
use watcher::{Frame, Over, Watcher, canonical, on_core};

const STREAM: &str = "/v1/streams/leads";
const OLD: &str = "first-secret-of-thirty-two-bytes!";
const NEW: &str = "second-secret-of-thirty-two-bytes";

/// Values that differ in what other parsers lose: the spelling of numbers, escapes, order, and characters beyond 2^16.
const VALUES: [&str; 4] = [
    r#"{"b":[1.0,1E5,-0,12345678901234567890],"a":"\u00e9\/\ud83d\ude00\u0001\"","😀":1,"�":2,"pad":"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"}"#,
    r#"{"b":[1.0,1E5,-0,12345678901234567891],"a":"\u00e9\/\ud83d\ude00\u0001\"","😀":1,"�":2,"pad":"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"}"#,
    r#"{"b":[1.00,1E5,-0,12345678901234567891],"a":",\"sig\":\"x\"}","😀":1,"�":2,"pad":"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"}"#,
    r#"{"b":[],"a":null,"😀":1,"�":{"":[{}]},"pad":"xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"}"#,
];

fn proving(key_id: &str, secret: &str) -> String {
    format!("hash = true\n[stream.sign]\nkey_id = \"{key_id}\"\nsecret = \"{secret}\"\n")
}

/// What the two references say of `asked`: a list of `["frame", text]`, `["response", header, etag, body]`, both with what is
/// expected behind it or without, and `["hash", text]`.
fn references(asked: &[Value]) -> [Vec<Value>; 2] {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/verify");
    let keys = json!({ "old": OLD, "new": NEW }).to_string();
    let js = format!(
        "import * as v from '{folder}/verify.mjs'; import {{ readFileSync }} from 'node:fs'; const keys = {keys};\
         const say = (a) => a[0] === 'frame' ? v.verifyFrame(a[1], keys, a[2])\
           : a[0] === 'response' ? v.verifyResponse(a[1], 'leads', a[2], Buffer.from(a[3]), keys, a[4]) : v.hashOf(v.parse(a[1]));\
         console.log(JSON.stringify(JSON.parse(readFileSync(0)).map(say)));"
    );
    let py = format!(
        "import json, sys; sys.path.insert(0, '{folder}'); import verify as v\n\
         keys = {{k: s.encode() for k, s in {keys}.items()}}\n\
         say = lambda a: v.verify_frame(a[1], keys, *a[2:]) if a[0] == 'frame' else \\\n\
           v.verify_response(a[1], 'leads', a[2], a[3].encode(), keys, *a[4:]) if a[0] == 'response' else v.hash_of(v.parse(a[1]))\n\
         print(json.dumps([say(a) for a in json.load(sys.stdin)]))"
    );
    let run = |program: &str, arguments: &[&str]| {
        let mut command = Command::new(program);
        command.args(arguments).env("PYTHONDONTWRITEBYTECODE", "1").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{program} is needed: {error}"));
        let input = Value::from(asked.to_vec()).to_string();
        child.stdin.take().expect("a pipe").write_all(input.as_bytes()).expect("it reads");
        let output = child.wait_with_output().expect("it ends");
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{program}: {error}"))
    };
    [run("node", &["--input-type=module", "-e", &js]), run("python3", &["-c", &py])]
}

fn get(server: &Server) -> support::server::Answer {
    server.get(STREAM, &[bearer(&token_of("u1"))])
}

#[test]
fn every_event_is_signed_and_hashed_alike_for_all_and_two_other_languages_say_so() {
    for driver in DRIVERS {
        let upstream = Upstream::start();
        upstream.set_json("/leads", VALUES[0]);
        let server = Setup::new().driver(driver).stream("leads", &upstream.url("/leads"), &proving("old", OLD)).start();
        let mut watchers = Vec::new();
        for format in ["patch", "merge", "full"] {
            for over in [Over::Ws, Over::Sse] {
                let path = format!("{STREAM}?format={format}");
                let open = |server: &Server| Watcher::open(server, over, &path, &[bearer(&token_of("u1"))]);
                // On both cores, as frames are the same on each.
                watchers.push((format, [on_core(&server, 0, open), on_core(&server, 1, open)]));
            }
        }
        let mut frames: Vec<(Frame, String)> = Vec::new();
        let mut answers = Vec::new();
        for (round, value) in VALUES.iter().enumerate() {
            upstream.set_json("/leads", value);
            let mut texts: std::collections::HashMap<&str, String> = std::collections::HashMap::new();
            for (format, pair) in &mut watchers {
                for watcher in pair {
                    let frame = watcher.event();
                    assert_eq!(frame.seq(), round as u64 + 1);
                    assert_eq!(texts.entry(format).or_insert_with(|| frame.text.clone()), &frame.text, "byte for byte");
                    frames.push((frame, watcher.value("leads")));
                }
            }
            answers.push(get(&server));
        }
        assert!(
            frames.iter().any(|(frame, _)| frame.kind() == "patch")
                && frames.iter().any(|(frame, _)| frame.kind() == "merge")
        );
        let mut asked: Vec<Value> = frames.iter().map(|(frame, _)| json!(["frame", frame.text])).collect();
        asked.extend(frames.iter().map(|(_, value)| json!(["hash", value])));
        let header = |answer: &support::server::Answer, name: &str| answer.header(name).unwrap_or_default().to_owned();
        asked.extend(answers.iter().map(|answer| {
            json!(["response", header(answer, "x-restcast-signature"), header(answer, "etag"), answer.text()])
        }));
        let expected: Vec<Value> = frames
            .iter()
            .map(|_| json!(true))
            .chain(frames.iter().map(|(frame, _)| frame.json()["hash"].clone()))
            .chain(answers.iter().map(|_| json!(true)))
            .collect();
        for said in references(&asked) {
            assert_eq!(said, expected);
        }
        for (answer, value) in answers.iter().zip(VALUES) {
            assert_eq!(answer.text(), value);
            let hash = frames
                .iter()
                .find(|(_, held)| *held == canonical(value))
                .map(|(frame, _)| frame.json()["hash"].clone());
            assert_eq!(Some(json!(header(answer, "x-restcast-hash"))), hash);
        }
        // What is not modified has no body to prove.
        let etag = header(&answers[3], "etag");
        let same = server.get(STREAM, &[bearer(&token_of("u1")), ("If-None-Match", etag)]);
        assert_eq!((same.status, same.header("x-restcast-signature")), (304, None));
        assert!(!server.log_text().contains(OLD));
    }
}

#[test]
fn what_was_changed_on_the_way_is_not_what_was_signed() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", VALUES[2]);
    let server = Setup::new().stream("leads", &upstream.url("/leads"), &proving("old", OLD)).start();
    let text = Watcher::ws(&server, STREAM).event().text;
    let answer = get(&server);
    let (signature, etag) = (answer.header("x-restcast-signature").expect("one"), answer.header("etag").expect("one"));
    let forged = [
        text.replace("\"seq\":1", "\"seq\":2"),
        text.replace("1.00", "1.0"),
        text.replace("\"kid\":\"old\"", "\"kid\":\"new\""),
        text.replace("\"kid\":\"old\"", "\"kid\":\"constructor\""),
        text.replace("leads", "deals"),
        format!("{text} "),
        text.replace(",\"sig\":\"", ",\"sig\":\"0"),
        VALUES[2].to_owned(),
    ];
    let mut asked: Vec<Value> = forged.iter().map(|text| json!(["frame", text])).collect();
    asked.push(json!(["response", signature, etag, answer.text().replace("1.00", "1.0")]));
    asked.push(json!(["response", signature.replace("ts=", "ts=1"), etag, answer.text()]));
    asked.push(json!(["response", signature, etag.replace('1', "2"), answer.text()]));
    let scope = signature.split(',').find(|part| part.starts_with("scope=")).expect("one");
    asked.push(json!([
        "response",
        signature.replace(scope, &format!("scope={}", "0".repeat(64))),
        etag,
        answer.text()
    ]));
    asked.push(json!(["response", "", etag, answer.text()]));
    for said in references(&asked) {
        assert_eq!(said, vec![json!(false); asked.len()]);
    }
    assert!(references(&[json!(["frame", text])]).iter().all(|said| *said == [json!(true)]), "the original is");
}

#[test]
fn a_signature_says_whose_value_it_is() {
    let upstream = Upstream::start();
    for tenant in [1, 2] {
        upstream.set_json(&format!("/c/{tenant}"), &json!({"tenant":tenant,"pub":7}).to_string());
    }
    let views = "[[stream.view]]\nroles = [\"m\"]\npointers = [\"\"]\n[[stream.view]]\nroles = [\"a\"]\npointers = [\"/pub\"]\n";
    let url = upstream.url("/c/{claims.companyId}");
    let setup = Setup::new().stream("leads", &url, &format!("{}{views}", proving("old", OLD)));
    let of = |company: Value, role: &str| {
        let claims = json!({"sub":"u1","companyId":company,"roles":[role],"exp":now_s() + 600});
        [bearer(&mint(claims))]
    };
    // A number and a text fill the same URL: one sequence.
    let cases = [
        (of(json!("1"), "m"), "", json!({"stream":"leads","claims":{"companyId":"1"},"view":1})),
        (of(json!(2), "m"), "", json!({"stream":"leads","claims":{"companyId":"2"},"view":1})),
        (of(json!(1), "a"), "", json!({"stream":"leads","claims":{"companyId":"1"},"view":2})),
        (
            of(json!(1), "m"),
            "?select=$.pub",
            json!({"stream":"leads","claims":{"companyId":"1"},"view":1,"select":"$['pub']"}),
        ),
    ];
    let mut scopes: Vec<Vec<String>> = Vec::new();
    let (mut asked, mut expected) = (Vec::new(), Vec::new());
    for driver in DRIVERS {
        // Another server is the same as one that was started anew.
        let server = setup.clone().driver(driver).start();
        let mut of_server = Vec::new();
        for (at, (credential, select, _)) in cases.iter().enumerate() {
            let path = format!("{STREAM}{select}");
            let open = |core, over, format: &str| {
                let mark = if select.is_empty() { "?" } else { "&" };
                let path = format!("{path}{mark}format={format}");
                on_core(&server, core, |server| Watcher::open(server, over, &path, credential)).event()
            };
            let frames = [open(0, Over::Ws, "patch"), open(1, Over::Sse, "full"), open(1, Over::Ws, "merge")];
            let answer = server.get(&path, credential);
            let header = answer.header("x-restcast-signature").expect("it is signed").to_owned();
            let etag = answer.header("etag").expect("it has one").to_owned();
            let scope = frames[0].json()["scope"].as_str().expect("a scope").to_owned();
            assert!(frames.iter().all(|frame| frame.json()["scope"] == scope) && header.contains(&scope));
            for (other, (.., meant)) in cases.iter().enumerate() {
                asked.extend(frames.iter().map(|frame| json!(["frame", frame.text, meant])));
                asked.push(json!(["response", header, etag, answer.text(), meant]));
                expected.extend(vec![json!(at == other); frames.len() + 1]);
            }
            of_server.push(scope);
        }
        scopes.push(of_server);
    }
    for said in references(&asked) {
        assert_eq!(said, expected);
    }
    assert!(scopes.iter().all(|of_server| *of_server == scopes[0]), "{scopes:?}");
}

#[test]
fn a_body_tells_a_number_from_a_text_and_so_does_its_scope() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", "{}");
    let keys = format!("method = \"POST\"\nbody = '{{\"id\":{{claims.companyId}}}}'\n{}", proving("old", OLD));
    let server = Setup::new().stream("leads", &upstream.url("/leads"), &keys).start();
    let mut asked = Vec::new();
    for company in [json!(1), json!("1")] {
        let token = mint(json!({"sub":"u1","companyId":company,"exp":now_s() + 600}));
        let frame = Watcher::open(&server, Over::Ws, STREAM, &[bearer(&token)]).event();
        for meant in [json!(1), json!("1")] {
            asked.push(json!(["frame", frame.text, {"stream":"leads","claims":{"companyId":meant}}]));
        }
    }
    for said in references(&asked) {
        assert_eq!(said, [json!(true), json!(false), json!(false), json!(true)]);
    }
}

#[test]
fn a_reload_with_another_key_signs_with_it_in_a_new_epoch_and_one_without_proves_nothing() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", VALUES[0]);
    let setup = Setup::new();
    let with = |lines: &str| setup.clone().stream("leads", &upstream.url("/leads"), lines);
    let server = with(&proving("old", OLD)).start();
    let mut watcher = Watcher::ws(&server, STREAM);
    let first = watcher.event();
    server.reload(&with(&proving("new", NEW)));
    let second = watcher.event();
    assert_eq!((first.member("kid"), second.member("kid")), ("\"old\"".to_owned(), "\"new\"".to_owned()));
    assert!(second.kind() == "snapshot" && second.epoch() != first.epoch());
    assert_eq!(first.member("hash"), second.member("hash"), "the value is the same");
    for said in references(&[json!(["frame", first.text]), json!(["frame", second.text])]) {
        assert_eq!(said, [json!(true), json!(true)]);
    }
    server.reload(&with(""));
    let bare = watcher.event().json();
    assert!(["sig", "hash", "kid", "scope"].iter().all(|name| bare[name].is_null()));
    let answer = get(&server);
    assert!(answer.header("x-restcast-signature").is_none() && answer.header("x-restcast-hash").is_none());
}
