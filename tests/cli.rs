//! The command line as a user types it: what each command prints where, and what it exits with.

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

use support::server::{DRIVERS, PATIENCE, SECRET, Setup, mint, now_s, restcast, run, token_of, told};
use support::{Folder, Upstream};

#[test]
fn a_command_line_that_is_wrong_is_exit_code_2_and_says_what_is_meant() {
    for (arguments, said) in [
        (&[][..], "a command is missing"),
        (&["serv"], "unknown command `serv`; did you mean `serve`?"),
        (&["serve"], "`--config` is missing"),
        (&["check", "--confg", "F"], "unknown option `--confg`; did you mean `--config`?"),
        (&["token", "--sub", "u1", "--sub", "u2"], "`--sub` is given twice"),
        (&["watch"], "`URL` is missing"),
        (&["check", "--config", "F", "G"], "unexpected argument `G`"),
    ] {
        let (code, out, err) = restcast(arguments, "");
        assert_eq!((code, out.as_str()), (2, ""), "{arguments:?}: {err}");
        assert!(err.contains(said), "{arguments:?}: {err}");
    }
    for flag in ["--help", "--version"] {
        let (code, out, err) = restcast(&[flag], "");
        assert_eq!((code, err.as_str()), (0, ""));
        assert!(out.contains("restcast"), "{out}");
    }
}

#[test]
fn check_names_every_error_with_its_line_and_the_nearest_key() {
    let folder = Folder::new("cli");
    let bad = folder.put(
        "bad.toml",
        "[server]\nlisen = \"127.0.0.1:0\"\n[[stream]]\nid = \"a b\"\nurl = \"https://{claims.host}/\"\nintervall = \"1s\"\n\
         [limits]\nconnections = -1\n[[auth.jwt.key]]\nalg = \"HS256\"\nsecret = \"hunter2-short\"\n",
    );
    let (code, out, err) = restcast(&["check", "--config", &bad], "");
    assert_eq!((code, out.as_str()), (1, ""), "{err}");
    for said in [
        "bad.toml:2: unknown key `server.lisen`; the nearest known one is `server.listen`",
        "bad.toml:4: `stream.id`",
        "bad.toml:5: `stream.url`",
        "bad.toml:6: unknown key `stream.intervall`; the nearest known one is `stream.interval`",
        "bad.toml:8: `limits.connections`",
        "bad.toml:11: ",
    ] {
        assert!(err.contains(said), "{said}:\n{err}");
    }
    assert!(!err.contains("hunter2"), "{err}");
    // The same words when it is to be served.
    let (code, out, served) = restcast(&["serve", "--config", &bad], "");
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(err.lines().all(|line| served.contains(line)), "{served}");
}

#[test]
fn check_shows_what_is_in_force_with_secrets_masked_and_that_is_a_configuration_again() {
    let folder = Folder::new("cli");
    let lines = format!(
        "method = \"POST\"\nbody = '{{\"key\":\"hunter2-body\"}}'\n\
         headers = {{ \"X-Plain\" = \"hunter2-plain\", \"X-File\" = \"file:{}\", \"X-Env\" = \"env:CLI_SECRET\" }}",
        folder.put("header-secret", "hunter2-file\n")
    );
    let setup = Setup::new()
        .env("CLI_SECRET", "hunter2-env")
        .only_admin("key = \"hunter2-admin-key-of-more-bytes\"")
        .key("k2", "HS512", &"hunter2".repeat(10))
        .stream("leads", "https://user:hunter2-password@api.example.com/leads?key=hunter2-query", &lines);
    let (status, out, err) = run(&["check"], &setup);
    assert!(status.success(), "{err}");
    assert!(!out.contains("hunter2") && !err.contains("hunter2") && !out.contains(SECRET), "{out}{err}");
    assert!(out.contains("interval = \"20ms\"") && out.contains("kid = \"k2\"") && out.contains("X-Env"), "{out}");
    assert!(err.contains("warning") && err.contains("interval"), "under 100 ms is worth a warning: {err}");
    // A default that nobody wrote is shown too.
    assert!(out.contains("write_stall = \"30s\""), "{out}");
}

#[test]
fn a_file_without_streams_is_valid_and_one_that_is_missing_is_not() {
    let folder = Folder::new("cli");
    assert_eq!(restcast(&["check", "--config", &folder.put("empty.toml", "")], "").0, 0);
    let (code, _, err) = restcast(&["check", "--config", "/nowhere/restcast.toml"], "");
    assert_eq!(code, 1);
    assert!(err.contains("does not exist"), "{err}");
}

#[test]
fn a_minted_token_is_explained_and_opens_a_stream() {
    let upstream = Upstream::start();
    upstream.set_json("/leads", "[1]");
    let setup = Setup::new().stream("leads", &upstream.url("/leads"), "roles = [\"agent\"]");
    let folder = Folder::new("cli");
    let config = folder.put("explain.toml", &setup.text());
    let secret = folder.put("signing-secret", &format!("{SECRET}\n"));
    let mint = ["token", "--sub", "u1", "--expires-in", "15m", "--claim", "role=agent", "--kid", "k1", "--secret-file"];
    let (code, out, err) = restcast(&[&mint[..], &[&secret]].concat(), "");
    assert_eq!((code, err.as_str()), (0, ""));
    let token = out.strip_suffix('\n').expect("one line");
    let signature = token.rsplit('.').next().expect("three parts");

    let explain = ["explain", "token", "--config", &config];
    let (code, told, _) = restcast(&explain, &format!("{token}\n"));
    assert_eq!(code, 0, "{told}");
    assert!(told.starts_with("accepted") && told.contains("\"role\":\"agent\""), "{told}");
    assert!(!told.contains(signature) && !told.contains(SECRET), "{told}");
    let (code, told, _) = restcast(&explain, &token[..token.len() - 4]);
    assert_eq!(code, 1);
    assert!(told.starts_with("refused"), "{told}");

    let server = setup.start();
    let url = format!("ws://{}/v1/streams/leads", server.listen);
    for (scheme, sse) in [("ws", false), ("http", true)] {
        let url = url.replace("ws:", &format!("{scheme}:"));
        let mut arguments = vec!["watch", url.as_str(), "--token", token];
        if sse {
            arguments.push("--sse");
        }
        let mut child = Command::new(env!("CARGO_BIN_EXE_restcast"))
            .args(&arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let (tell, heard) = channel();
        let out = child.stdout.take().expect("a pipe");
        thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                let _ = tell.send(line);
            }
        });
        let mut lines = String::new();
        while !lines.contains("snapshot") {
            lines.push_str(&heard.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("no snapshot, but {lines}")));
        }
        assert!(lines.contains("[1]") && !lines.contains(signature), "{lines}");
        child.kill().and_then(|()| child.wait()).expect("it is ours");
    }
    let (code, _, err) = restcast(&["watch", &url, "--token", "nonsense"], "");
    assert_eq!(code, 1);
    assert!(err.contains("401") || err.contains("INVALID_TOKEN"), "{err}");
}

#[test]
fn explain_answers_each_line_at_once() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_restcast"))
        .args(["explain", "token", "--lines"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    let (mut input, output) = (child.stdin.take().expect("a pipe"), child.stdout.take().expect("a pipe"));
    let (tell, heard) = channel();
    thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            let _ = tell.send(line);
        }
    });
    let key = URL_SAFE_NO_PAD.encode(SECRET);
    let now = now_s();
    let line = |token: &str, more: Value| {
        let mut line = json!({ "token": token, "key_b64u": key, "algs": ["HS256"], "now": now });
        line.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        line.to_string()
    };
    let good = token_of("u1");
    let timeless = mint(json!({ "sub": "u1" }));
    let (signed, signature) = good.rsplit_once('.').expect("three parts");
    let tampered = format!("{signed}.{}{}", if signature.starts_with('A') { 'B' } else { 'A' }, &signature[1..]);
    for (asked, verdict) in [
        (line(&good, json!({})), "accept"),
        (line(&good, json!({ "now": now + 700 })), "reject"),
        (line(&timeless, json!({})), "reject"),
        (line(&timeless, json!({ "level": "jws" })), "accept"),
        (line(&tampered, json!({})), "reject"),
        (line(&good, json!({ "algs": ["HS512"] })), "reject"),
        (line(&good, json!({ "cfg": { "iss": "https://idp.example" } })), "reject"),
        ("not JSON".to_owned(), "reject"),
        (String::new(), "reject"),
    ] {
        // The next line is asked only when this one has been answered: it was flushed.
        writeln!(input, "{asked}").expect("it reads");
        let answer = heard.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("no answer to {asked}"));
        assert_eq!(answer.split(' ').next(), Some(verdict), "{asked}: {answer}");
        assert_eq!(verdict == "accept", !answer.contains(' '), "a refusal has its reason: {answer}");
    }
    drop(input);
    assert!(child.wait().expect("it ends").success());
    assert!(heard.recv_timeout(Duration::from_secs(1)).is_err(), "one line for each");
}

#[test]
fn explain_url_answers_each_line_without_the_network() {
    let policy =
        "[direct]\nallow = [\"https://api.example.com/public/*\", \"http://10.0.0.5:8080/*\"]\ncookies = true\n";
    let folder = Folder::new("cli");
    let (listing, off) = (folder.put("direct.toml", policy), folder.put("direct-off.toml", ""));
    let url = |url: &str| json!({ "kind": "url", "url": url });
    // The line, and the verdict without a configuration, with one that lists, and with one that has no direct mode.
    let lines = [
        (url("https://api.example.com/public/x"), ["allow", "allow", "block"]),
        (url("https://api.example.com/private/x"), ["allow", "block", "block"]),
        (url("https://api.example.com/public/..%2fprivate"), ["allow", "block", "block"]),
        (url("http://10.0.0.5:8080/"), ["block", "allow", "block"]),
        (url("http://0xa000005:8080/"), ["block", "allow", "block"]),
        (url("http://10.0.0.6:8080/"), ["block", "block", "block"]),
        (url("http://no-such-name.example/"), ["allow", "block", "block"]),
        (url("http://[::ffff:169.254.169.254]/"), ["block", "block", "block"]),
        (
            json!({ "kind": "dns", "url": "https://api.example.com/public/", "name": "api.example.com",
                "answers": [["93.184.215.14"], ["127.0.0.1"]] }),
            ["block", "block", "block"],
        ),
        (
            json!({ "kind": "dns", "url": "https://api.example.com/public/", "name": "api.example.com",
                "answers": [["93.184.215.14", "2606:4700::1"], ["93.184.215.14"]] }),
            ["allow", "allow", "block"],
        ),
        (
            json!({ "kind": "redirect", "hops": [[302, "https://x.yz/"], [301, "//10.0.0.6:8080/"]] }),
            ["block", "block", "block"],
        ),
        (
            json!({ "kind": "redirect", "hops": [[302, "http://10.0.0.5:8080/"], [200, null]] }),
            ["block", "allow", "block"],
        ),
        (json!({ "kind": "header", "name": "Cookie", "value": "a=b" }), ["block", "allow", "block"]),
        (json!({ "kind": "header", "name": "Transfer-Encoding", "value": "chunked" }), ["block", "block", "block"]),
        (json!({ "kind": "header", "name": "Authorization", "value": "Bearer t" }), ["allow", "allow", "block"]),
        (json!("rubbish"), ["block", "block", "block"]),
        (json!({ "kind": "url" }), ["block", "block", "block"]),
    ];
    let input: String = lines.iter().map(|(line, _)| format!("{line}\n")).collect();
    for (at, config) in [None, Some(&listing), Some(&off)].into_iter().enumerate() {
        let mut arguments = vec!["explain", "url", "--lines"];
        if let Some(config) = config {
            arguments.extend(["--config", config]);
        }
        let (code, out, err) = restcast(&arguments, &input);
        assert_eq!((code, err.as_str(), out.lines().count()), (0, "", lines.len()));
        for ((line, verdicts), answer) in lines.iter().zip(out.lines()) {
            let (verdict, reason) = answer.split_once(' ').expect("a reason");
            assert_eq!(verdict, verdicts[at], "{line}: {answer}");
            assert!(!reason.is_empty());
        }
    }
    let (code, out, _) = restcast(&["explain", "url"], "https://api.example.com/x?key=hunter2\n");
    assert!(code == 0 && out.starts_with("allowed: public") && !out.contains("hunter2"), "{out}");
    let (code, out, _) = restcast(&["explain", "url", "--config", &off], "https://api.example.com/\n");
    assert!(code == 1 && out.starts_with("blocked: the configuration has no [direct]"), "{out}");
    // What the admin API would take is told besides, and is no part of the verdict.
    let lists =
        folder.put("stream-urls.toml", "[admin]\nkey = \"0123456789abcdef\"\nstream_urls = [\"http://10.0.0.5/*\"]\n");
    for (url, said) in [
        ("http://10.0.0.5/{claims.companyId}", "allowed: listed in admin.stream_urls\n"),
        ("https://api.example.com/", "blocked: not listed (not_listed)\n"),
    ] {
        let (code, out, _) = restcast(&["explain", "url", "--config", &lists], url);
        assert!(code == 1 && out.ends_with(&format!("\nas a stream of the admin API: {said}")), "{out}");
    }
}

#[test]
fn explain_url_answers_before_it_is_asked_again() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_restcast"))
        .args(["explain", "url", "--lines"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    let (mut input, output) = (child.stdin.take().expect("a pipe"), child.stdout.take().expect("a pipe"));
    let (tell, heard) = channel();
    thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            let _ = tell.send(line);
        }
    });
    for (url, told) in [
        ("https://example.com/", "allow public"),
        ("http://127.1/", "block special_address: 127.0.0.1 is in 127.0.0.0/8, loopback (RFC 1122)"),
    ] {
        writeln!(input, "{}", json!({ "kind": "url", "url": url })).expect("it reads");
        assert_eq!(heard.recv_timeout(PATIENCE).as_deref(), Ok(told));
    }
    drop(input);
    assert!(child.wait().expect("it ends").success());
}

/// Starts a command that serves; its first line of output, and what else it has said when it was told to end.
fn ready_line(arguments: &[&str]) -> (Value, String, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_restcast"))
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    let mut output = BufReader::new(child.stdout.take().expect("a pipe"));
    let mut first = String::new();
    output.read_line(&mut first).expect("a line");
    let pid = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw).expect("a process id");
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("the process is there");
    let mut rest = String::new();
    output.read_to_string(&mut rest).expect("text");
    let (code, _, err) = told(child.wait_with_output().expect("it ends"));
    assert_eq!(code, 0, "drained: {err}");
    let ready: Value = serde_json::from_str(&first).unwrap_or_else(|error| panic!("{error}: {first:?}, {err}"));
    assert_eq!(ready["pid"], pid.as_raw_nonzero().get());
    (ready, rest, err)
}

fn members(object: &Value) -> Vec<&str> {
    let mut names: Vec<&str> = object.as_object().expect("an object").keys().map(String::as_str).collect();
    names.sort_unstable();
    names
}

#[test]
fn the_ready_line_is_all_of_standard_output_and_has_its_members() {
    let folder = Folder::new("cli");
    for driver in DRIVERS {
        let config = folder.put(&format!("ready-{driver}.toml"), &Setup::new().driver(driver).text());
        let (ready, rest, err) = ready_line(&["serve", "--config", &config]);
        assert_eq!(members(&ready), ["admin", "driver", "listen", "pid", "ready"]);
        assert_eq!((&ready["ready"], &ready["driver"], rest.as_str()), (&json!(true), &json!(driver), ""));
        for address in ["listen", "admin"] {
            let address: std::net::SocketAddr = ready[address].as_str().expect("text").parse().expect("an address");
            assert!(address.ip().is_loopback() && address.port() != 0);
        }
        assert!(!err.contains("refuses io_uring"), "it was not asked to fall back: {err}");
    }
    let (ready, rest, err) = ready_line(&["demo", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"]);
    let all = ["admin", "driver", "listen", "pid", "ready", "secret", "token", "upstream"];
    assert_eq!((members(&ready).as_slice(), rest.as_str()), (&all[..], ""));
    assert!(ready["upstream"].as_str().is_some_and(|url| url.starts_with("http://127.0.0.1:")), "{ready}");
    // For a person: the page, a token, one line each of curl and websocat.
    for said in ["http://", "curl ", "websocat ", ready["token"].as_str().expect("a token")] {
        assert!(err.contains(said), "{said}: {err}");
    }
}

#[test]
fn a_port_that_is_taken_ends_the_start_with_a_sentence() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    let (status, out, err) = run(&["serve"], &Setup::new().server(&format!("listen = {address:?}")));
    assert_eq!((status.code(), out.as_str()), (Some(1), ""));
    assert!(err.contains(&address), "{err}");
}

#[test]
fn beyond_loopback_without_tls_the_listener_needs_leave() {
    let setup = Setup::new().server("listen = \"0.0.0.0:0\"");
    let (status, _, err) = run(&["check"], &setup);
    assert_eq!(status.code(), Some(1));
    assert!(err.contains("plaintext"), "{err}");
    assert!(run(&["check"], &setup.server("plaintext = true")).0.success());
    let (status, _, err) =
        run(&["check"], &Setup::new().server("listen = \"0.0.0.0:0\"\nplaintext = true\necho = true"));
    assert_eq!(status.code(), Some(1));
    assert!(err.contains("echo"), "{err}");
}
