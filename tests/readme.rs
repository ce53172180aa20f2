//! The README says what the code does: its tables are made from the code, its configurations are accepted, its lines for
//! the shell are typed here.
//!
//! `UPDATE_README=1 cargo test --test readme` writes the tables anew.

mod support;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::{env, fs};

use restcast::codec::message::{CloseReason, ErrorCode};
use restcast::config::{Config, FileError, Sources};
use restcast::{config, metrics};
use serde_json::{Value, json};
use support::server::{ADMIN_KEY, Server, Setup, Ws, bearer, client_frame, mint, now_s, token_of, watching};
use support::{Folder, Redis, Upstream};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn readme() -> String {
    fs::read_to_string(root().join("README.md")).expect("README.md")
}

/// All of the program's text that is not tests, for finding out which codes it ever sends.
fn program() -> String {
    fn gather(folder: &Path, text: &mut String) {
        for entry in fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                gather(&path, text);
            } else if path.extension().is_some_and(|extension| extension == "rs") && !path.ends_with("tests.rs") {
                let file = fs::read_to_string(&path).expect("a file");
                let end = ["#[cfg(test)]\nmod tests", "#[cfg(test)]\npub(crate) mod tests"]
                    .iter()
                    .find_map(|marker| file.find(marker));
                text.push_str(&file[..end.unwrap_or(file.len())]);
            }
        }
    }
    let mut text = String::new();
    gather(&root().join("src"), &mut text);
    text
}

/// Whether the program names this variant, and so can send it.
fn is_sent(program: &str, variant: &str) -> bool {
    program.match_indices(variant).any(|(at, _)| {
        let behind = program.as_bytes().get(at + variant.len());
        !behind.is_some_and(|byte| byte.is_ascii_alphanumeric() || *byte == b'_')
    })
}

fn reserved(sent: bool) -> &'static str {
    if sent { "" } else { " (reserved)" }
}

fn close_table() -> String {
    let program = program();
    let mut table = String::from("| code | reason | the client should |\n|---|---|---|\n");
    for reason in CloseReason::ALL {
        let mark = reserved(is_sent(&program, &format!("CloseReason::{reason:?}")));
        let (code, name, client) = (reason.code(), reason.reason(), reason.client_should());
        writeln!(table, "| {code} | `{name}`{mark} | {client} |").expect("a String takes every write");
    }
    table
}

fn error_table() -> String {
    let program = program();
    let mut table = String::from("| code | HTTP | meaning |\n|---|---|---|\n");
    for code in ErrorCode::ALL {
        let mark = reserved(is_sent(&program, &format!("ErrorCode::{code:?}")));
        let (name, status, meaning) = (code.as_str(), code.http_status(), code.meaning());
        writeln!(table, "| `{name}`{mark} | {status} | {meaning} |").expect("a String takes every write");
    }
    table
}

fn tables() -> [(&'static str, String); 4] {
    [
        ("closes", close_table()),
        ("errors", error_table()),
        ("config", config::keys_table()),
        ("metrics", metrics::table()),
    ]
}

/// The document with this table between its markers.
fn with_table(document: &str, name: &str, table: &str) -> String {
    let open = format!("<!-- table:{name} -->\n");
    let (before, rest) = document.split_once(&open).unwrap_or_else(|| panic!("README.md has no {open}"));
    let (_, after) = rest.split_once("<!-- /table -->").expect("the table ends");
    format!("{before}{open}{table}<!-- /table -->{after}")
}

/// The fenced blocks of this language.
fn blocks(language: &str) -> Vec<String> {
    let readme = readme();
    let mut parts = readme.split("```");
    let mut blocks = Vec::new();
    parts.next();
    while let (Some(block), Some(_)) = (parts.next(), parts.next()) {
        if let Some((head, body)) = block.split_once('\n')
            && head == language
        {
            blocks.push(body.to_owned());
        }
    }
    blocks
}

#[test]
fn the_tables_are_what_the_code_says() {
    let old = readme();
    let new = tables().iter().fold(old.clone(), |document, (name, table)| with_table(&document, name, table));
    if env::var_os("UPDATE_README").is_some() {
        fs::write(root().join("README.md"), new).expect("README.md can be written");
        return;
    }
    for (name, table) in tables() {
        assert!(
            with_table(&old, name, &table) == old,
            "the table `{name}` is out of date: UPDATE_README=1 cargo test --test readme\nit should be\n{table}"
        );
    }
}

#[test]
fn codes_that_are_sent_are_told_from_reserved_ones() {
    let (closes, errors) = (close_table(), error_table());
    assert!(closes.contains("| 4001 | `token_expired` |") && closes.contains("| 4001 | `session_expired` |"));
    assert!(
        errors.contains("| `INVALID_TOKEN` |")
            && errors.contains("`INTERNAL` (reserved)")
            && errors.contains("| `TARGET_BLOCKED` |")
    );
    assert!(!is_sent("ErrorCode::TooLargeBy", "ErrorCode::TooLarge"), "a longer name is another");
}

#[test]
fn faults_of_framing_once_closed_with_reasons_that_stood_in_no_table() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", "[]");
    let server = Setup::new().limits("message_bytes_max = 1000").stream("leads", &upstream.url("/leads"), "").start();
    for (reason, bytes) in [
        (CloseReason::ProtocolError, client_frame(false, 3, b"")),
        (CloseReason::UnsupportedData, client_frame(false, 2, b"bytes")),
        (CloseReason::InvalidPayload, client_frame(false, 1, b"\xff")),
        (CloseReason::MessageTooBig, client_frame(false, 1, &[b' '; 1001])),
    ] {
        for path in ["/v1/ws", "/v1/streams/leads"] {
            let mut raw = server.connect();
            assert_eq!(raw.upgrade(path, &[bearer(&token_of("u1"))]).status, 101);
            raw.send(&bytes);
            assert_eq!(raw.close_frame(), (reason.code(), reason.reason().to_owned()), "{path}");
        }
    }
    for reason in ["protocol_error", "unsupported_data", "invalid_payload", "message_too_big"] {
        assert_eq!(server.metric(&["restcast_closes_total", reason]), 2.0, "{reason}");
    }
}

#[test]
fn every_metric_that_the_text_names_exists() {
    let known: BTreeSet<&str> = metrics::METRICS.iter().map(|metric| metric.name).collect();
    let readme = readme();
    let named = readme.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).filter(|word| {
        word.starts_with("restcast_") && *word != "restcast_token" // the cookie
    });
    for name in named {
        assert!(known.contains(name), "{name} is no metric");
    }
}

#[test]
fn links_within_the_repository_lead_somewhere() {
    for document in ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"] {
        let text = fs::read_to_string(root().join(document)).unwrap_or_else(|error| panic!("{document}: {error}"));
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let is_local = !link.starts_with("http") && !link.starts_with('#') && !link.starts_with("mailto:");
            let path = link.split('#').next().unwrap_or(link);
            assert!(!is_local || root().join(path).exists(), "{document}: {link} is not there");
        }
        for picture in ["src=\"", "srcset=\""].iter().flat_map(|start| text.split(start).skip(1)) {
            let path = picture.split('"').next().unwrap_or(picture);
            assert!(root().join(path).exists(), "{document}: {path} is not there");
        }
        let slugs: BTreeSet<String> = text
            .lines()
            .filter_map(|line| line.strip_prefix("## "))
            .map(|title| title.to_lowercase().replace(' ', "-").replace(['.', ',', ':'], ""))
            .collect();
        for anchor in text.split("](#").skip(1).filter_map(|rest| rest.split(')').next()) {
            assert!(slugs.contains(anchor), "{document}: #{anchor} is no heading");
        }
    }
}

/// Every variable is set and every file is there.
struct Plenty;

impl Sources for Plenty {
    fn env(&self, _: &str) -> Option<Vec<u8>> {
        Some(b"0123456789abcdef0123456789abcdef".to_vec())
    }

    fn file(&self, _: &str, _: usize) -> Result<Vec<u8>, FileError> {
        Ok(b"0123456789abcdef0123456789abcdef".to_vec())
    }
}

#[test]
fn the_configurations_shown_are_accepted_without_a_warning() {
    let blocks = blocks("toml");
    assert!(blocks.len() >= 2, "README.md shows configurations");
    for block in blocks {
        // An excerpt has no key of its own.
        let text = if block.contains("[[auth.jwt.key]]") {
            block.clone()
        } else {
            format!("{block}\n[[auth.jwt.key]]\nalg = \"HS256\"\nsecret = \"0123456789abcdef0123456789abcdef\"\n")
        };
        match Config::parse(&text, &Plenty) {
            Ok((_, warnings)) => assert!(warnings.is_empty(), "{warnings:?}\n{block}"),
            Err(errors) => panic!("{errors:?}\n{block}"),
        }
    }
}

#[test]
fn the_five_minutes_can_be_typed() {
    let folder = Folder::new("readme");
    let configuration =
        blocks("toml").into_iter().find(|block| block.contains("# restcast.toml")).expect("the example");
    folder.put("restcast.toml", &configuration);

    let shell: String = blocks("sh").concat();
    let line = |start: &str| {
        let found = shell.lines().find(|line| line.starts_with(start));
        found.unwrap_or_else(|| panic!("README.md shows no line that starts {start:?}")).to_owned()
    };
    let script = [
        "set -e".to_owned(),
        line("head -c 32 /dev/urandom"),
        line("export LEADS_KEY="),
        line("restcast check"),
        line("TOKEN=$(restcast token"),
        line("echo \"$TOKEN\" | restcast explain token"),
    ]
    .join("\n");
    let binary = Path::new(env!("CARGO_BIN_EXE_restcast")).parent().expect("a folder");
    let path = format!("{}:{}", binary.display(), env::var("PATH").unwrap_or_default());
    let output = Command::new("sh")
        .args(["-c", &script])
        .env("PATH", path)
        .current_dir(&*folder)
        .output()
        .expect("there is a shell");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{script}\n{out}\n{err}");
    assert!(out.contains("accepted: signed with HS256 by the key \"2026-11\""), "{out}\n{err}");
    assert!(out.contains("\"companyId\":42"), "the claim is in the token: {out}");
    assert!(!out.contains("the-upstreams-key") && !err.contains("the-upstreams-key"), "the header's secret is masked");
}

/// A moment to come that README's lines name; the tests put one that stays to come.
const SOME_DAY: &str = "1798761600";
/// The token that README's lines revoke.
const JTI: &str = "t-7f3a";

/// README's `curl` and `redis-cli` lines, run by a shell against a server and a Redis of the test's own.
struct Lines {
    redis: Redis,
    upstream: Upstream,
    left: RefCell<Vec<String>>,
}

impl Lines {
    fn new() -> Lines {
        let upstream = Upstream::start();
        upstream.set_json("/leads", r#"[{"id":1}]"#);
        let shell = blocks("sh").concat();
        let shown = shell.lines().filter(|line| line.contains("curl ") || line.contains("redis-cli "));
        let left = shown.map(str::to_owned).collect();
        Lines { redis: Redis::start(), upstream, left: RefCell::new(left) }
    }

    /// A server that has heard nothing yet, with these lines at its file's end, and its Redis as empty.
    fn server(&self, lines: &str) -> Server {
        self.redis.command(&["FLUSHALL"]);
        let url = self.upstream.url("/leads");
        let setup = Setup::new().redis(&self.redis.url(), "");
        let server = setup.stream("leads", &url, "").stream("prices", &url, lines).start();
        for channel in ["user-logged-out", "token-revoked", "permission-update"] {
            self.redis.wait_for_subscribers(channel, 1);
        }
        server
    }

    /// The line that shows all of this; it is ticked off.
    fn line(&self, shows: &[&str]) -> String {
        let mut left = self.left.borrow_mut();
        let Some(at) = left.iter().position(|line| shows.iter().all(|part| line.contains(part))) else {
            panic!("README.md shows no line with {shows:?} that was not run: {left:#?}");
        };
        left.remove(at)
    }

    /// The line as a shell's command for this server.
    fn shell(&self, server: &Server, line: &str, variables: &[(&str, &str)]) -> Command {
        let line = line
            .replace("127.0.0.1:8080", &server.listen.to_string())
            .replace("127.0.0.1:9080", &server.admin.to_string())
            .replace(SOME_DAY, &(now_s() + 600).to_string())
            .replace("redis-cli ", &format!("redis-cli -e -p {} ", self.redis.address().port()))
            .replace("curl ", "exec curl --silent --show-error --fail-with-body --max-time 30 ");
        assert!(!line.contains(":8080") && !line.contains(":9080"), "{line}");
        let admin = format!("Authorization: Bearer {ADMIN_KEY}");
        let mut command = Command::new("sh");
        command.args(["-c", &line]).env("ADMIN", admin).envs(variables.iter().copied()).stdin(Stdio::null());
        command
    }

    /// Whether the line succeeds, and what it prints.
    fn outcome(&self, server: &Server, line: &str, variables: &[(&str, &str)]) -> (bool, String) {
        let output = self.shell(server, line, variables).output().expect("there is a shell");
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8_lossy(&said).into_owned())
    }

    /// What the line prints, which must succeed.
    fn run(&self, server: &Server, line: &str, variables: &[(&str, &str)]) -> String {
        let (succeeds, said) = self.outcome(server, line, variables);
        assert!(succeeds, "{line}\n{said}");
        said
    }

    /// The same where it is JSON.
    fn json(&self, server: &Server, line: &str, variables: &[(&str, &str)]) -> Value {
        let said = self.run(server, line, variables);
        serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {line}\n{said}"))
    }
}

/// A watcher by the token that README's lines speak of.
fn user(server: &Server) -> Ws {
    let now = now_s();
    let token = mint(json!({ "sub": "u1", "jti": JTI, "iat": now, "exp": now + 600 }));
    watching(server, &token, "/v1/streams/leads")
}

#[test]
fn every_curl_and_redis_cli_line_does_what_is_said_of_it() {
    let lines = Lines::new();
    let server = lines.server("");
    let token = token_of("u1");
    let by_token = [("TOKEN", token.as_str())];

    // A look at it, and a renewal.
    let first = lines.line(&["curl", "Bearer $TOKEN", "/v1/streams/leads"]);
    assert_eq!(lines.json(&server, &first, &by_token), json!([{ "id": 1 }]));
    let stream = lines.line(&["curl -N", "text/event-stream", "/v1/streams/prices"]);
    let mut child = lines.shell(&server, &stream, &by_token).stdout(Stdio::piped()).spawn().expect("there is a shell");
    let mut events = BufReader::new(child.stdout.take().expect("a pipe")).lines().map_while(Result::ok);
    let has_snapshot = events.any(|line| line == "event: snapshot");
    // It would go on.
    let _ = child.kill();
    let _ = child.wait();
    assert!(has_snapshot, "{stream}");
    let mut sse = server.sse("/v1/streams/leads", &[bearer(&token)]);
    let name = sse.next_of("welcome").data["connection"].as_str().expect("a name").to_owned();
    let renewal = lines.line(&["curl", "/v1/connections/$CONNECTION/auth"]);
    let renewed = lines.json(&server, &renewal, &[("TOKEN", token.as_str()), ("CONNECTION", &name)]);
    assert_eq!(renewed["type"], "auth_ok");
    let ticket = lines.json(&server, &lines.line(&["curl", "-X POST", "/v1/tickets"]), &by_token);
    assert!(ticket["ticket"].as_str().is_some_and(|it| it.starts_with("rct_")) && ticket["expires_in_s"] == 30);

    // API keys.
    let made = lines.json(&server, &lines.line(&["curl", "$ADMIN", "-d", "/admin/v1/keys"]), &[]);
    let key = made["key"].as_str().expect("a key").to_owned();
    assert_eq!(made["id"], "dashboard");
    let delete = lines.line(&["curl", "-X DELETE", "/admin/v1/keys/dashboard"]);
    let listed = lines.run(&server, &lines.line(&["curl", "$ADMIN", "/admin/v1/keys"]), &[]);
    assert!(listed.contains("dashboard") && !listed.contains(&key));
    let use_of_key = lines.line(&["curl", "X-Api-Key: $KEY"]);
    assert_eq!(lines.json(&server, &use_of_key, &[("KEY", &key)]), json!([{ "id": 1 }]));
    lines.run(&server, &delete, &[]);
    let (succeeds, said) = lines.outcome(&server, &use_of_key, &[("KEY", &key)]);
    assert!(!succeeds && said.contains("INVALID_TOKEN"), "a key that was deleted: {said}");

    drop(server);

    // Streams without a restart, and hooks.
    let secret = "a secret of the hooks of the tests";
    let server = lines.server(&format!("interval = \"1h\"\nhook_secret = {secret:?}"));
    let streams = format!("http://{}/admin/v1/streams", server.admin);
    let at = [("STREAMS", streams.as_str())];
    let made = lines.line(&["curl", "$ADMIN", "-d", "$STREAMS"]).replace("env:CRM_TOKEN", "a-token");
    assert_eq!(lines.json(&server, &made, &at)["headers"]["Authorization"], "***");
    let read = lines.run(&server, &lines.line(&["curl", "$ADMIN", "-i $STREAMS/orders"]), &at);
    let tag = read.lines().find_map(|line| line.strip_prefix("ETag: ")).expect("a tag").trim().to_owned();
    let put = lines.line(&["curl", "$ADMIN", "-X PUT", "If-Match: $ETAG", "$STREAMS/orders"]);
    let by_tag = [("STREAMS", streams.as_str()), ("ETAG", tag.as_str())];
    assert_eq!(lines.json(&server, &put, &by_tag)["interval"], "5s");
    let (succeeds, said) = lines.outcome(&server, &put, &by_tag);
    assert!(!succeeds && said.contains("PRECONDITION_FAILED"), "{said}");
    let stop = lines.line(&["curl", "$ADMIN", "-X POST", "$STREAMS/orders/stop"]);
    assert_eq!(lines.json(&server, &stop, &at)["state"], "stopped");
    lines.run(&server, &lines.line(&["curl", "$ADMIN", "-X DELETE", "$STREAMS/orders"]), &at);
    let mut prices = watching(&server, &token, "/v1/streams/prices");
    lines.upstream.set_json("/leads", r#"[{"id":2}]"#);
    lines.line(&["curl -X POST", "X-Restcast-Signature", "/v1/hooks/prices"]);
    let block = blocks("sh").into_iter().find(|block| block.contains("X-Restcast-Signature")).expect("it is shown");
    lines.run(&server, &block, &[("HOOK_SECRET", secret)]);
    assert_eq!(prices.next_of("snapshot")["data"], json!([{ "id": 2 }]));
    drop(prices);
    drop(server);

    // Logout and permissions: each on a server of its own, as a logout ends all that was issued before it.
    let permissions = "permission_update";
    for (shows, told) in [
        (&["redis-cli PUBLISH", "user-logged-out"][..], "logged_out"),
        (&["redis-cli PUBLISH", "token-revoked", "jti"], "token_revoked"),
        (&["redis-cli PUBLISH", "token-revoked", "iat_before"], "token_revoked"),
        (&["redis-cli PUBLISH", "permission-update"], permissions),
        (&["redis-cli XADD restcast:control", "user-logged-out"], "logged_out"),
        (&["curl", "$ADMIN", "-X POST", "/admin/v1/users/u1/logout"], "logged_out"),
        (&["curl", "$ADMIN", "-X PUT", "/admin/v1/users/u1/permissions"], permissions),
        (&["curl", "$ADMIN", "-X POST", "/admin/v1/tokens/revoke"], "token_revoked"),
    ] {
        let server = lines.server("");
        let (line, mut ws) = (lines.line(shows), user(&server));
        lines.run(&server, &line, &[]);
        if told == permissions {
            let update = ws.next_of(permissions);
            assert_eq!(
                (&update["permissions"], &update["roles"]),
                (&json!(["leads.read"]), &json!(["agent"])),
                "{line}"
            );
        } else {
            assert_eq!(ws.until_close().1, (4010, told.to_owned()), "{line}");
        }
    }
    // Operating.
    let mut server = lines.server("");
    let mut ws = user(&server);
    let connections = lines.run(&server, &lines.line(&["curl", "$ADMIN", "connections?sub=u1"]), &[]);
    assert!(connections.contains("\"c_"), "{connections}");
    let ready = lines.run(&server, &lines.line(&["curl http", "/readyz"]), &[]);
    assert!(ready.contains("\"redis\""), "{ready}");
    let counted = lines.run(&server, &lines.line(&["curl http", "/metrics"]), &[]);
    assert!(counted.contains("restcast_connections{"), "{counted}");
    let drain = lines.line(&["curl -X POST", "$RESTCAST_ADMIN_KEY", "/admin/v1/drain"]);
    lines.run(&server, &drain, &[("RESTCAST_ADMIN_KEY", ADMIN_KEY)]);
    assert_eq!(ws.until_close().1, (1012, "draining".to_owned()));
    drop(ws);
    assert!(server.wait().success());

    let left = lines.left.borrow();
    assert!(left.is_empty(), "README.md shows lines that this test does not run: {left:#?}");
}

#[test]
fn the_hash_of_a_key_of_the_file_is_made_as_shown() {
    let lines = Lines::new();
    let block = blocks("sh").into_iter().find(|block| block.contains("sha256sum")).expect("it is shown");
    let script = format!("{block}\necho \"$KEY\"");
    let output = Command::new("sh").args(["-c", &script]).output().expect("there is a shell");
    let said = String::from_utf8(output.stdout).expect("text");
    let (hash, key) = said.trim_end().split_once('\n').expect("a hash, then the key");
    let server = lines.server(&format!("[[auth.api_key]]\nid = \"dashboard\"\n{hash}\nstreams = [\"leads\"]"));
    let answer = server.get("/v1/streams/leads", &[("X-Api-Key", key.to_owned())]);
    assert_eq!(answer.status, 200, "{said}");
    let another = key[..key.len() - 1].to_owned() + if key.ends_with('A') { "B" } else { "A" };
    assert_eq!(server.get("/v1/streams/leads", &[("X-Api-Key", another)]).status, 401);
}

#[test]
fn every_restcast_line_is_a_command_with_known_flags() {
    let shell: String = blocks("sh").concat();
    let mut seen = BTreeSet::new();
    let lines = shell.lines().flat_map(|line| line.split("&&").flat_map(|part| part.split("| ")));
    for line in lines {
        let Some(at) = line
            .find("restcast ")
            .map(|at| at + "restcast ".len())
            .or_else(|| line.find("--release -- ").map(|at| at + "--release -- ".len()))
        else {
            continue;
        };
        let line = line[at..].split('#').next().unwrap_or("").trim_end().trim_end_matches(')');
        let Some(command) = line.split_whitespace().next() else { continue };
        let help = Command::new(env!("CARGO_BIN_EXE_restcast")).args(["help", command]).output().expect("it runs");
        assert!(help.status.success(), "`{command}` is no command: {line}");
        let help = String::from_utf8_lossy(&help.stdout).into_owned();
        for flag in line.split_whitespace().filter(|word| word.starts_with("--")) {
            assert!(help.contains(flag), "`{command}` has no {flag}");
        }
        seen.insert(command.to_owned());
    }
    for command in ["demo", "serve", "check", "token", "watch", "explain"] {
        assert!(seen.contains(command), "README.md never shows `{command}`: {seen:?}");
    }
}
