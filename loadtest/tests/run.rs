//! The load tester against the built server, and against servers that break their word, so that it is seen to notice.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use std::{env, fs, thread};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const LOADTEST: &str = env!("CARGO_BIN_EXE_loadtest");
/// How long a run may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(90);
const SECRET: &str = "a secret of the tests: 32 bytes and some more";

// What the tests start.

/// The server's program: the one that `RESTCAST_BUILT` names, as where `make test` has just built it with the rest of the
/// workspace, or else built where this one was.
fn restcast() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        if let Some(program) = env::var_os("RESTCAST_BUILT") {
            let program = PathBuf::from(program);
            assert!(program.exists(), "{} is missing, which RESTCAST_BUILT names", program.display());
            return program;
        }
        let folder = Path::new(LOADTEST).parent().expect("a folder");
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--package", "restcast", "--bin", "restcast"]).current_dir(workspace);
        build.arg("--target-dir").arg(folder.parent().expect("the target directory"));
        if folder.ends_with("release") {
            build.arg("--release");
        }
        assert!(build.status().expect("cargo runs").success(), "the server cannot be built");
        let program = folder.join("restcast");
        assert!(program.exists(), "{} is missing: cargo built it elsewhere", program.display());
        program
    })
}

/// A child that does not outlive its test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may be over already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    /// Starts `command` and reads its ready line.
    fn start(command: &mut Command) -> (Running, Value) {
        let mut child = Running(command.stdout(Stdio::piped()).spawn().expect("it starts"));
        let mut line = String::new();
        let output = child.0.stdout.take().expect("it is piped");
        let mut output = BufReader::new(output);
        output.read_line(&mut line).expect("it can be read");
        let ready = serde_json::from_str(&line).unwrap_or_else(|error| panic!("no ready line but {line:?}: {error}"));
        child.0.stdout = Some(output.into_inner());
        (child, ready)
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.0)
    }
}

/// A folder of the test's own.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let name = format!("loadtest-{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        fs::create_dir_all(&path).expect("it can be made");
        fs::write(path.join("key"), SECRET).expect("it can be written");
        Folder(path)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().expect("UTF-8").to_owned()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What is left behind lies in the target directory.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A sample upstream, the server before it, and files.
struct House {
    folder: Folder,
    upstream: Running,
    server: Running,
    listen: String,
}

impl House {
    /// Four streams `s0` to `s3` that change five times a second; `tls`: the server and the upstream speak it.
    fn new(tls: bool) -> House {
        let folder = Folder::new();
        let mut command = Command::new(LOADTEST);
        command.args(["upstream", "--streams", "4", "--interval", "200ms", "--bytes", "300", "--etag"]);
        command.args(["--poll-interval", "100ms"]);
        if tls {
            command.args(["--tls", "--write-ca", &folder.path("upstream.pem")]);
        }
        let (upstream, ready) = Running::start(&mut command);
        let url = ready["url"].as_str().expect("its URL");
        let mut config = format!(
            "[server]\nlisten = \"127.0.0.1:0\"\ncores = 1\n[admin]\nlisten = \"127.0.0.1:0\"\n\
             [log]\nlevel = \"warn\"\n[auth.jwt]\nleeway = \"1s\"\n\
             [[auth.jwt.key]]\nkid = \"k1\"\nalg = \"HS256\"\nsecret = \"{SECRET}\"\n"
        );
        let mut ca = String::new();
        if tls {
            let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).expect("a certificate");
            fs::write(folder.0.join("cert.pem"), made.cert.pem()).expect("it can be written");
            fs::write(folder.0.join("key.pem"), made.signing_key.serialize_pem()).expect("it can be written");
            let (cert, key) = (folder.path("cert.pem"), folder.path("key.pem"));
            config.push_str(&format!("[[server.tls]]\ncert = {cert:?}\nkey = {key:?}\n"));
            ca = format!("ca = {:?}\n", folder.path("upstream.pem"));
        }
        for n in 0..4 {
            config.push_str(&format!("[[stream]]\nid = \"s{n}\"\nurl = \"{url}/{n}\"\ninterval = \"100ms\"\n{ca}"));
        }
        fs::write(folder.0.join("restcast.toml"), config).expect("it can be written");
        let mut command = Command::new(restcast());
        command.args(["serve", "--config", &folder.path("restcast.toml")]).current_dir(&folder.0);
        let (server, ready) = Running::start(&mut command);
        let listen = ready["listen"].as_str().expect("its address").to_owned();
        House { folder, upstream, server, listen }
    }

    fn url(&self, scheme: &str, path: &str) -> String {
        format!("{scheme}://{}{path}", self.listen)
    }

    /// A run on `url` with minted tokens and the server's cost; words of `more` are parted by spaces.
    fn run(&self, url: &str, more: &str) -> Report {
        let (key, pid) = (self.folder.path("key"), self.server.0.id().to_string());
        let mut args = vec!["run", url, "--secret-file", &key, "--pid", &pid, "--leeway", "1s"];
        args.extend(more.split_whitespace());
        run(&args)
    }
}

/// What a run said.
struct Report {
    json: Value,
    code: Option<i32>,
    progress: String,
}

impl Report {
    fn number(&self, pointer: &str) -> f64 {
        let found = self.json.pointer(pointer).and_then(Value::as_f64);
        found.unwrap_or_else(|| panic!("no number at {pointer}: {:#}", self.json))
    }

    fn check(&self, pointer: &str, expected: &Value) {
        assert_eq!(self.json.pointer(pointer), Some(expected), "{pointer}: {:#}\n{}", self.json, self.progress);
    }
}

/// `loadtest` with `--json -`, to its end.
fn run(args: &[&str]) -> Report {
    let output = finish(spawn(args));
    report(&output)
}

fn spawn(args: &[&str]) -> Running {
    let mut command = Command::new(LOADTEST);
    command.args(args).args(["--json", "-"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    Running(command.spawn().expect("it starts"))
}

fn finish(mut running: Running) -> Output {
    let (mut stdout, mut stderr) = (running.0.stdout.take(), running.0.stderr.take());
    let read = |pipe: Option<&mut dyn std::io::Read>| {
        let mut bytes = Vec::new();
        if let Some(pipe) = pipe {
            pipe.read_to_end(&mut bytes).expect("it can be read");
        }
        bytes
    };
    thread::scope(|scope| {
        let out = scope.spawn(|| read(stdout.as_mut().map(|pipe| pipe as _)));
        let err = scope.spawn(|| read(stderr.as_mut().map(|pipe| pipe as _)));
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = running.0.try_wait().expect("it can be waited for") {
                break status;
            }
            if Instant::now() > deadline {
                // Its pipes end with it, and the readers with them.
                let _ = running.0.kill();
                panic!("the run does not end");
            }
            thread::sleep(Duration::from_millis(20));
        };
        Output { status, stdout: out.join().expect("read"), stderr: err.join().expect("read") }
    })
}

fn report(output: &Output) -> Report {
    let progress = String::from_utf8_lossy(&output.stderr).into_owned();
    let json = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("no report: {error}\n{progress}"));
    Report { json, code: output.status.code(), progress }
}

// Against the built server.

#[test]
fn websockets_of_two_processes_get_every_event() {
    let house = House::new(false);
    let plot = house.folder.path("plot.svg");
    let url = house.url("ws", "/v1/streams/s{n%4}");
    let report = house.run(&url, &format!("--connections 60 --processes 2 --duration 3s --plot {plot}"));
    assert_eq!(report.code, Some(0), "{:#}\n{}", report.json, report.progress);
    report.check("/connections/opened", &json!(60));
    report.check("/connections/failed", &json!(0));
    report.check("/connections/failures", &json!({}));
    report.check("/events/lost", &json!(0));
    report.check("/events/duplicated", &json!(0));
    report.check("/events/reordered", &json!(0));
    report.check("/closes", &json!({}));
    report.check("/client/processes", &json!(2));
    report.check("/interrupted", &json!(false));
    // Five changes a second; a busy machine polls some of them together.
    let count = report.number("/deliveries/count");
    assert!((60.0 * 3.0..=60.0 * 17.0).contains(&count), "{count}");
    assert!((report.number("/deliveries/per_s") - count / report.number("/duration_s")).abs() < 1.0);
    assert!(report.number("/deliveries/bytes") >= count * 60.0);
    let names = ["p50", "p99", "p999", "max"].map(|name| report.number(&format!("/latency_us/{name}")));
    assert!(names[0] > 0.0 && names.is_sorted(), "{names:?}");
    report.check("/latency_us/samples", &json!(count as u64));
    for name in [
        "/connects_per_s",
        "/handshakes/per_s",
        "/handshakes/server_cpu_us_each",
        "/deliveries/per_server_cpu_s",
        "/deliveries/server_cpu_us_each",
        "/server/pss_bytes",
        "/server/rss_bytes",
        "/server/fds",
        "/server/cpu_share",
        "/latency_us/mean",
    ] {
        assert!(report.number(name) > 0.0, "{name}: {:#}", report.json);
    }
    assert!((0.9..1.2).contains(&report.number("/server/fds_per_connection")), "{:#}", report.json);
    assert!(report.json["client_saturated"].is_boolean() && report.json["client"]["read_lag_us_p99"].is_u64());
    assert!(report.progress.contains("60 of 60 open") && report.progress.contains("60 opened of 60"));
    let picture = fs::read_to_string(plot).expect("it was drawn");
    assert!(picture.contains("Latency") && picture.contains("Server memory"), "{picture}");
    assert!(![&report.progress, &picture, &report.json.to_string()].iter().any(|text| text.contains(SECRET)));
    // What the upstream saw: four streams, each polled once for all.
    kill_process(house.upstream.pid(), Signal::TERM).expect("it lives");
    let House { mut upstream, .. } = house;
    let mut stats = String::new();
    upstream.0.stdout.take().expect("piped").read_to_string(&mut stats).expect("it can be read");
    let stats: Value = serde_json::from_str(&stats).expect("JSON");
    assert_eq!(stats["streams_asked"], 4);
    assert!(stats["requests"].as_u64() > Some(40) && stats["not_modified"].as_u64() > Some(0), "{stats}");
    assert!(stats["late_us"]["p99"].is_u64() && stats["late_in_phase_us"]["count"].as_u64() > Some(0), "{stats}");
}

#[test]
fn many_streams_on_one_connection_are_judged_apart() {
    let house = House::new(false);
    let subscribe = |n| format!(r#"{{"type":"subscribe","stream":"s{n}","id":{n}}}"#);
    let (one, two, none) = (subscribe("{n%2}"), subscribe("3"), subscribe("9"));
    let more = format!(
        "--connections 10 --duration 2s --carrier subprotocol --quiet --subscribe {one} --subscribe {two} --subscribe {none}"
    );
    let report = house.run(&house.url("ws", "/v1/ws"), &more);
    report.check("/events/lost", &json!(0));
    report.check("/errors", &json!({"STREAM_NOT_FOUND": 10}));
    assert!(report.number("/deliveries/count") >= 10.0 * 2.0 * 2.0, "{:#}", report.json);
    assert_eq!((report.code, &*report.progress), (Some(0), ""));
}

#[test]
fn sse_connections_get_every_event_and_renew_their_tokens() {
    let house = House::new(false);
    let url = house.url("http", "/v1/streams/s{n%4}");
    // Without renewals all would be closed after at most four seconds.
    let report =
        house.run(&url, "--connections 20 --duration 7s --expires-in 3s --renew-before 1500ms --carrier query");
    assert_eq!(report.code, Some(0), "{:#}\n{}", report.json, report.progress);
    report.check("/connections/opened", &json!(20));
    report.check("/events/lost", &json!(0));
    report.check("/closes", &json!({}));
    report.check("/renewals/refused", &json!(0));
    assert!(report.number("/renewals/accepted") >= 40.0, "{:#}", report.json);
    assert!(report.number("/deliveries/count") > 20.0 * 7.0, "{:#}", report.json);
}

#[test]
fn websockets_renew_their_tokens_in_band() {
    let house = House::new(false);
    let url = house.url("ws", "/v1/streams/s0");
    let report = house.run(&url, "--connections 20 --duration 7s --expires-in 3s --renew-before 1500ms");
    assert_eq!(report.code, Some(0), "{:#}\n{}", report.json, report.progress);
    report.check("/closes", &json!({}));
    report.check("/renewals/refused", &json!(0));
    assert!(report.number("/renewals/accepted") >= 40.0, "{:#}", report.json);
}

#[test]
fn tokens_that_end_together_are_timed() {
    let house = House::new(false);
    for scheme in ["ws", "http"] {
        let url = house.url(scheme, "/v1/streams/s0");
        let report = house.run(&url, "--connections 40 --duration 9s --expires-in 5s --expire-together");
        report.check("/connections/opened", &json!(40));
        report.check("/connections/dropped", &json!(0));
        report.check("/closes", &json!({"4001 token_expired": 40}));
        report.check("/expiry/count", &json!(40));
        report.check("/expiry/leeway_ms", &json!(1000));
        // The server's bound is 250 ms; on a busy machine what it sent may be read later.
        let [first, median, p99, last] =
            ["first", "median", "p99", "last"].map(|name| report.number(&format!("/expiry/{name}_ms")));
        assert!(first >= 0.0 && first <= median && median <= p99 && p99 <= last && last < 2000.0, "{:#}", report.json);
        report.check("/connections/cut_off", &json!(0));
        let frame = report.number("/expiry/latest_frame_ms");
        assert!((-2000.0..2000.0).contains(&frame), "{:#}", report.json);
        assert_eq!(report.number("/expiry/outlived") > 0.0, last > 1000.0, "{:#}", report.json);
        assert_eq!(report.code, Some(i32::from(last > 1000.0)));
    }
}

#[test]
fn connections_that_come_and_go_are_counted() {
    let house = House::new(false);
    for (scheme, more) in [("ws", ""), ("http", ""), ("ws", "--reset")] {
        let url = house.url(scheme, "/v1/streams/s0");
        let report = house.run(&url, &format!("--churn --connections 5 --duration 2s --rate 200 {more}"));
        assert_eq!(report.code, Some(0), "{:#}\n{}", report.json, report.progress);
        // 200 a second are allowed; a busy machine does fewer.
        let count = report.number("/handshakes/count");
        assert!((20.0..=420.0).contains(&count), "{scheme} {more}: {:#}", report.json);
        assert!(report.number("/handshakes/server_cpu_us_each") > 0.0);
        assert!((report.number("/handshakes/per_s") - count / report.number("/duration_s")).abs() < 1.0);
        assert!(report.number("/connections/opened") >= count);
        report.check("/connections/failed", &json!(0));
    }
}

#[test]
fn tls_compression_and_readers_that_lag() {
    let house = House::new(true);
    let (url, ca) = (house.url("wss", "/v1/streams/s{n%4}"), house.folder.path("cert.pem"));
    let more =
        format!("--ca {ca} --compress --connections 20 --stalled 4 --slow 4 --slow-bytes-per-s 400 --duration 3s");
    let report = house.run(&url, &more);
    assert_eq!(report.code, Some(0), "{:#}\n{}", report.json, report.progress);
    report.check("/connections/opened", &json!(20));
    report.check("/events/lost", &json!(0));
    let tls = report.number("/handshakes/tls/full") + report.number("/handshakes/tls/resumed");
    assert!((tls - 20.0).abs() < 0.5, "{:#}", report.json);
    assert!(report.number("/deliveries/count") >= 12.0 * 3.0, "{:#}", report.json);
    assert!(report.number("/slow/deliveries") > 0.0, "{:#}", report.json);
    let report = house.run(&house.url("https", "/v1/streams/s0"), "--insecure --churn --connections 4 --duration 2s");
    assert_eq!(report.code, Some(0), "{:#}\n{}", report.json, report.progress);
    assert!(report.number("/handshakes/tls/resumed") > 0.0, "{:#}", report.json);
    let report = house.run(&url, &format!("--ca {} --connections 3 --duration 1s", house.folder.path("upstream.pem")));
    assert_eq!(report.code, Some(1));
    let failures = report.json["connections"]["failures"].as_object().expect("causes");
    assert!(failures.keys().all(|cause| cause.starts_with("tls: ")) && !failures.is_empty(), "{failures:?}");
}

#[test]
fn ctrl_c_ends_it_with_the_report_so_far() {
    let house = House::new(false);
    let (url, key) = (house.url("ws", "/v1/streams/s0"), house.folder.path("key"));
    let mut running = spawn(&["run", &url, "--secret-file", &key, "--connections", "10", "--duration", "1h"]);
    let mut stderr = BufReader::new(running.0.stderr.take().expect("piped"));
    let mut seen = 0;
    // Two points of the measurement: something has been delivered by then.
    while seen < 2 {
        let mut line = String::new();
        assert!(stderr.read_line(&mut line).expect("it can be read") > 0, "it goes on");
        seen += u32::from(line.contains("measuring: 10 of 10 open"));
    }
    kill_process(running.pid(), Signal::INT).expect("it lives");
    running.0.stderr = Some(stderr.into_inner());
    let report = report(&finish(running));
    assert_eq!(report.code, Some(0), "{:#}", report.json);
    report.check("/interrupted", &json!(true));
    assert!(report.number("/deliveries/count") > 0.0 && report.number("/duration_s") < 90.0, "{:#}", report.json);
    assert!(report.progress.contains("Ended before its time"));
}

#[test]
fn failures_are_told_by_cause() {
    let house = House::new(false);
    let report =
        run(&["run", &house.url("ws", "/v1/streams/s0"), "--token", "a.b.c", "--connections", "5", "--duration", "1s"]);
    assert_eq!(report.code, Some(1));
    report.check("/connections/failures", &json!({"http_401": 5}));
    assert!(!report.progress.contains("a.b.c"));
    // Nothing listens on a port that was just free.
    let free = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address");
    let report = run(&["run", &format!("ws://{free}/"), "--connections", "3", "--duration", "1s"]);
    assert_eq!(report.code, Some(1));
    report.check("/connections/failures", &json!({"refused": 3}));
    // One that accepts and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}/", silent.local_addr().expect("an address"));
    let report = run(&["run", &url, "--connections", "3", "--duration", "1s", "--timeout", "300ms"]);
    report.check("/connections/failures", &json!({"timeout": 3}));
}

#[test]
fn command_lines_that_are_wrong_exit_with_2() {
    for args in [&["run"][..], &["fly"], &["run", "ws://127.0.0.1:1/", "--nonsense"], &["upstream", "--streams", "0"]] {
        let output = Command::new(LOADTEST).args(args).output().expect("it runs");
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("--help"), "{args:?}");
    }
    for (args, word) in
        [(&["--help"][..], "Examples"), (&["run", "--help"], "--connections"), (&["upstream", "-h"], "--burst")]
    {
        let output = Command::new(LOADTEST).args(args).output().expect("it runs");
        assert!(output.status.success() && String::from_utf8_lossy(&output.stdout).contains(word), "{args:?}");
    }
}

// Against servers that break their word.

fn now_us() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("it is later").as_micros()
}

/// A WebSocket server for one connection: answers the upgrade and leaves the rest to `script`.
fn answered(listener: &TcpListener) -> TcpStream {
    let (socket, _) = listener.accept().expect("a connection");
    let mut reader = BufReader::new(socket.try_clone().expect("a second handle"));
    let mut key = String::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).expect("a head");
        if let Some(value) = line.strip_prefix("Sec-WebSocket-Key: ") {
            key = value.trim().to_owned();
        }
        if line.trim().is_empty() {
            break;
        }
    }
    let seed = format!("{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    let accept = STANDARD.encode(ring::digest::digest(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY, seed.as_bytes()));
    let mut socket = socket;
    let head = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n";
    write!(socket, "{head}Sec-WebSocket-Accept: {accept}\r\n\r\n").expect("it is read");
    socket
}

fn send(socket: &mut TcpStream, text: &str) {
    let length = u8::try_from(text.len()).expect("short");
    let mut frame = vec![0x81];
    frame.extend(if length < 126 { vec![length] } else { vec![126, 0, length] });
    frame.extend_from_slice(text.as_bytes());
    // In two pieces: a frame may come in any.
    let (one, two) = frame.split_at(frame.len() / 2);
    socket.write_all(one).and_then(|()| socket.flush()).expect("it is read");
    socket.write_all(two).expect("it is read");
}

fn wait_for_end(mut socket: TcpStream) {
    // Whatever comes: the tester ends the connection when it is done.
    let mut buffer = [0; 1024];
    while socket.read(&mut buffer).is_ok_and(|length| length > 0) {}
}

#[test]
fn events_that_are_lost_doubled_or_late_are_noticed() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address: SocketAddr = listener.local_addr().expect("an address");
    let server = thread::spawn(move || {
        let patch = |seq: u32| {
            let base = seq - 1;
            format!(
                r#"{{"type":"patch","stream":"s","epoch":"e","seq":{seq},"base":{base},"ts":{},"patch":[]}}"#,
                now_us()
            )
        };
        let snapshot = |seq: u32| {
            format!(r#"{{"type":"snapshot","stream":"s","epoch":"e","seq":{seq},"ts":{},"data":1}}"#, now_us())
        };
        // 3 and 4 never come; 6 comes twice; 8 comes behind 9; a snapshot jumps over 10 and 11; 13 is its due.
        let script = vec![
            r#"{"type":"welcome","connection":"c"}"#.to_owned(),
            snapshot(1),
            patch(2),
            patch(5),
            patch(6),
            patch(6),
            patch(7),
            patch(9),
            patch(8),
            snapshot(12),
            patch(13),
        ];
        let mut first = answered(&listener);
        script.iter().for_each(|text| send(&mut first, text));
        // The second connection never gets the last one.
        let mut second = answered(&listener);
        script[..script.len() - 1].iter().for_each(|text| send(&mut second, text));
        wait_for_end(first);
        wait_for_end(second);
    });
    let report =
        run(&["run", &format!("ws://{address}/"), "--connections", "2", "--duration", "1s", "--processes", "2"]);
    report.check("/connections/opened", &json!(2));
    report.check("/events/lost", &json!(2 + 2 + 1));
    report.check("/events/duplicated", &json!(2));
    report.check("/events/reordered", &json!(2));
    report.check("/events/conflated", &json!(4));
    assert_eq!(report.code, Some(1));
    server.join().expect("the script was followed");
}

/// What a server that may break its word does with a connection.
enum Deed {
    Send(Vec<u8>),
    /// The connection ends without a word.
    End,
}

fn text(text: &str) -> Deed {
    let mut frame = vec![0x81];
    match text.len() {
        length @ 0..126 => frame.push(length as u8),
        length @ 126..=0xffff => {
            frame.push(126);
            frame.extend_from_slice(&(length as u16).to_be_bytes());
        }
        length => {
            frame.push(127);
            frame.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
    frame.extend_from_slice(text.as_bytes());
    Deed::Send(frame)
}

fn close(code: u16, reason: &str) -> Deed {
    let mut frame = vec![0x88, 2 + reason.len() as u8];
    frame.extend_from_slice(&code.to_be_bytes());
    frame.extend_from_slice(reason.as_bytes());
    Deed::Send(frame)
}

fn snapshot(epoch: &str, seq: u32) -> Deed {
    text(&format!(r#"{{"type":"snapshot","stream":"s","epoch":"{epoch}","seq":{seq},"ts":{},"data":1}}"#, now_us()))
}

fn patch(epoch: &str, seq: u32, base: u32) -> Deed {
    let ts = now_us();
    text(&format!(
        r#"{{"type":"patch","stream":"s","epoch":"{epoch}","seq":{seq},"base":{base},"ts":{ts},"patch":[]}}"#
    ))
}

/// As it should be: a snapshot in round 1, then one patch a round.
fn kept(round: u32) -> Deed {
    if round == 1 { snapshot("e", 1) } else { patch("e", round, round - 1) }
}

/// A run of two connections against a server that does in each round, ten a second, what `deed` says for connection 0 or 1,
/// until the tester leaves; words of `more` are parted by spaces.
fn run_against(path: &str, more: &str, deed: fn(connection: usize, round: u32) -> Option<Deed>) -> Report {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("ws://{}{path}", listener.local_addr().expect("an address"));
    let server = thread::spawn(move || {
        let mut connections = Vec::new();
        for _ in 0..2 {
            let mut socket = answered(&listener);
            send(&mut socket, r#"{"type":"welcome","connection":"c"}"#);
            connections.push(Some(socket));
        }
        for round in 1.. {
            for (number, connection) in connections.iter_mut().enumerate() {
                let Some(socket) = connection else { continue };
                let gone = match deed(number, round) {
                    None => false,
                    Some(Deed::Send(bytes)) => socket.write_all(&bytes).is_err(),
                    Some(Deed::End) => true,
                };
                if gone {
                    *connection = None;
                }
            }
            // Nobody is told anything any more: an empty pong shows whether the tester is still there.
            for connection in &mut connections {
                if connection.as_mut().is_some_and(|socket| socket.write_all(b"\x8a\x00").is_err()) {
                    *connection = None;
                }
            }
            if connections.iter().all(Option::is_none) {
                return;
            }
            thread::sleep(Duration::from_millis(100));
        }
    });
    let mut args = vec!["run", &url, "--connections", "2", "--quiet"];
    args.extend(more.split_whitespace());
    let report = run(&args);
    server.join().expect("it ends with its connections");
    report
}

/// All that counts broken promises is 0 but what is named; the exit code follows.
fn check_broken(report: &Report, broken: &[(&str, u32)]) {
    for name in [
        "/connections/failed",
        "/connections/dropped",
        "/connections/cut_off",
        "/events/lost",
        "/events/duplicated",
        "/events/reordered",
        "/events/silent",
        "/events/stuck",
        "/expiry/outlived",
    ] {
        let expected = broken.iter().find(|(known, _)| *known == name).map_or(0, |&(_, count)| count);
        report.check(name, &json!(expected));
    }
    report.check("/problems", &json!([]));
    report.check("/ok", &json!(broken.is_empty()));
    assert_eq!(report.code, Some(i32::from(!broken.is_empty())), "{:#}", report.json);
}

#[test]
fn a_server_that_keeps_its_word_is_good() {
    check_broken(&run_against("/", "--duration 1s", |_, round| Some(kept(round))), &[]);
}

#[test]
fn a_connection_that_never_gets_an_event_is_noticed() {
    let deed = |connection, round| (connection == 0).then(|| kept(round));
    check_broken(&run_against("/", "--duration 1s", deed), &[("/events/silent", 1)]);
    // In another process too, and where the first is the one without.
    let deed = |connection, round| (connection == 1).then(|| kept(round));
    check_broken(&run_against("/", "--duration 1s --processes 2", deed), &[("/events/silent", 1)]);
    // Others who asked for something else say nothing about it.
    check_broken(&run_against("/s{n}", "--duration 1s", deed), &[]);
}

#[test]
fn a_connection_that_is_left_in_an_old_epoch_is_noticed() {
    // It changes in the third second: while it is measured.
    let deed = |connection, round| match round {
        ..25 => Some(kept(round)),
        25 => (connection == 1).then(|| snapshot("f", 1)),
        _ => (connection == 1).then(|| patch("f", round - 24, round - 25)),
    };
    for processes in ["1", "2"] {
        let report = run_against("/", &format!("--duration 3s --processes {processes}"), deed);
        check_broken(&report, &[("/events/stuck", 1)]);
    }
    let both = |_, round| if round < 25 { Some(kept(round)) } else { Some(snapshot("f", round - 24)) };
    check_broken(&run_against("/", "--duration 3s", both), &[]);
}

#[test]
fn a_reader_that_is_closed_for_no_reason_of_its_own_is_noticed() {
    let check = |deed: fn(usize, u32) -> Option<Deed>, name: &str, broken: &[(&str, u32)]| {
        let report = run_against("/", "--duration 1s", deed);
        check_broken(&report, broken);
        report.check("/closes", &json!({ name: 1 }));
        report.check("/slow/closes", &json!({}));
    };
    /// Connection 1 ends in round 15, in the middle of the run.
    fn late(connection: usize, round: u32, end: fn() -> Deed) -> Option<Deed> {
        match round {
            15 if connection == 1 => Some(end()),
            16.. if connection == 1 => None,
            _ => Some(kept(round)),
        }
    }
    check(|c, r| late(c, r, || close(1013, "overloaded")), "1013 overloaded", &[("/connections/cut_off", 1)]);
    check(|c, r| late(c, r, || close(1011, "")), "1011", &[("/connections/cut_off", 1)]);
    check(|c, r| late(c, r, || Deed::End), "eof", &[("/connections/dropped", 1)]);
    check(|c, r| late(c, r, || close(1012, "draining")), "1012 draining", &[]);
    check(|c, r| late(c, r, || close(1000, "")), "1000", &[]);
}

#[test]
fn a_stalled_reader_may_be_ended_in_any_way() {
    // Connection 1 is the stalled one: it has to be ended one day, and it is not the reader's loss.
    let deed = |connection, round| match round {
        10 if connection == 1 => Some(Deed::End),
        _ => Some(kept(round)),
    };
    let report = run_against("/", "--duration 2s --stalled 1", deed);
    check_broken(&report, &[]);
    let closes = report.json["slow"]["closes"].as_object().expect("causes");
    assert_eq!(closes.values().map(|count| count.as_u64().expect("a count")).sum::<u64>(), 1, "{:#}", report.json);
    assert_eq!(report.json["closes"].as_object(), Some(closes));
}

#[test]
fn a_token_that_never_ends_or_ends_too_soon_is_noticed() {
    let folder = Folder::new();
    let key = folder.path("key");
    let more = format!("--secret-file {key} --expires-in 1s --leeway 0s --duration 3s");
    let report = run_against("/", &more, |_, round| Some(kept(round)));
    check_broken(&report, &[("/expiry/outlived", 2)]);
    report.check("/expiry/count", &json!(0));
    // An hour before its time.
    let more = format!("--secret-file {key} --expires-in 1h --duration 1s");
    let report = run_against("/", &more, |connection, round| match (connection, round) {
        (1, 15) => Some(close(4001, "token_expired")),
        (1, 16..) => None,
        _ => Some(kept(round)),
    });
    check_broken(&report, &[("/connections/cut_off", 1)]);
    report.check("/closes", &json!({"4001 token_expired": 1}));
}

#[test]
fn a_run_without_events_is_good_only_where_none_were_expected() {
    let deed = |_, round| (round == 1).then(|| kept(round));
    let report = run_against("/", "--duration 1s", deed);
    assert_eq!(report.code, Some(1), "{:#}", report.json);
    report.check("/deliveries/count", &json!(0));
    report.check("/ok", &json!(false));
    let problems = report.json["problems"].to_string();
    assert!(problems.contains("no event came"), "{problems}");
    check_broken(&run_against("/", "--duration 1s --idle", deed), &[]);
}

#[test]
fn a_delta_without_its_value_is_lost_unless_the_connection_resumes() {
    let deed = |_, round| Some(patch("e", 40 + round, 39 + round));
    check_broken(&run_against("/", "--duration 1s", deed), &[("/events/lost", 2)]);
    check_broken(&run_against("/?since=e-40", "--duration 1s", deed), &[]);
}

#[test]
fn a_delta_that_skips_by_its_base_is_a_loss() {
    // Of round 15 on three events are passed over, and the base says so.
    let deed = |_, round| match round {
        ..15 => Some(kept(round)),
        15 => Some(patch("e", 18, 14)),
        _ => Some(patch("e", round + 3, round + 2)),
    };
    check_broken(&run_against("/", "--duration 1s", deed), &[("/events/lost", 6)]);
}

#[test]
fn what_slow_readers_are_spared_is_counted_apart() {
    let deed = |_, round| match round {
        ..15 => Some(kept(round)),
        _ => Some(snapshot("e", round + 5)),
    };
    let report = run_against("/", "--duration 1s --slow 1 --slow-bytes-per-s 100000", deed);
    check_broken(&report, &[]);
    report.check("/events/conflated", &json!(5));
    report.check("/events/conflated_slow", &json!(5));
}

#[test]
fn memory_that_cannot_be_read_is_a_problem() {
    // What has ended and was not waited for is there, and has no memory.
    let ended = Running(Command::new("true").spawn().expect("it starts"));
    let pid = ended.0.id();
    while !fs::read_to_string(format!("/proc/{pid}/stat")).expect("nobody waited for it").contains(") Z ") {
        thread::sleep(Duration::from_millis(1));
    }
    let report = run_against("/", &format!("--duration 1s --pid {pid}"), |_, round| Some(kept(round)));
    assert_eq!(report.code, Some(1), "{:#}", report.json);
    for name in ["pss_bytes", "rss_bytes", "pss_bytes_per_connection", "pss_bytes_end"] {
        report.check(&format!("/server/{name}"), &Value::Null);
    }
    report.check("/server/connections_baseline", &json!(1));
    report.check("/server/connections", &json!(2));
    let problems = report.json["problems"].as_array().expect("a list");
    assert_eq!(problems.iter().filter(|problem| problem.to_string().contains("PSS")).count(), 1, "{problems:?}");
}

#[test]
fn large_messages_are_read_in_many_pieces() {
    // What follows in the same piece is not lost, and what is large does not stay.
    let deed = |_, round| match kept(round) {
        Deed::Send(mut small) => {
            let (ts, pad) = (now_us(), "x".repeat(1 << 20));
            let large =
                format!(r#"{{"type":"snapshot","stream":"l","epoch":"e","seq":{round},"ts":{ts},"data":"{pad}"}}"#);
            let Deed::Send(large) = text(&large) else { unreachable!("a text is sent") };
            small.splice(0..0, large);
            Some(Deed::Send(small))
        }
        Deed::End => unreachable!("it goes on"),
    };
    let report = run_against("/", "--duration 2s", deed);
    check_broken(&report, &[]);
    assert!(report.number("/deliveries/bytes") > 4e6 && report.number("/deliveries/count") > 4.0, "{:#}", report.json);
}

#[test]
fn large_events_are_read_from_chunks_of_any_size() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}/", listener.local_addr().expect("an address"));
    let server = thread::spawn(move || {
        let (mut socket, _) = listener.accept().expect("a connection");
        let _ = socket.read(&mut [0; 4096]).expect("a head");
        let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
        socket.write_all(head.as_bytes()).expect("it is read");
        for seq in 1.. {
            let (ts, pad) = (now_us(), "x".repeat(300_000));
            let block = format!(
                "event: snapshot\ndata: {{\"type\":\"snapshot\",\"stream\":\"s\",\"epoch\":\"e\",\"seq\":{seq},\
                 \"ts\":{ts},\"data\":\"{pad}\"}}\r\n\r\n"
            );
            for piece in block.as_bytes().chunks(7001) {
                let chunk = [format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat();
                if socket.write_all(&chunk).is_err() {
                    return;
                }
            }
            thread::sleep(Duration::from_millis(100));
        }
    });
    let report = run(&["run", &url, "--connections", "1", "--duration", "2s", "--quiet"]);
    check_broken(&report, &[]);
    report.check("/events/conflated", &json!(0));
    assert!(report.number("/deliveries/count") > 4.0, "{:#}", report.json);
    server.join().expect("it ends with the connection");
}

#[test]
fn what_is_said_to_a_worker_together_with_its_part_is_heard() {
    // Ctrl-C in the first milliseconds: the word to stop is there before the worker has read what it is to do.
    let mut command = Command::new(LOADTEST);
    command.arg("worker").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut worker = Running(command.spawn().expect("it starts"));
    let mut input = worker.0.stdin.take().expect("piped");
    let part = json!({"args": ["run", "ws://127.0.0.1:1/", "--connections", "1"], "first": 0, "count": 1, "rate": 1.0});
    let lines = format!("{part}\n{}\n{}\n", json!({"do": "stop"}), json!({"do": "settle", "heads": []}));
    input.write_all(lines.as_bytes()).expect("it is read");
    let output = finish(worker);
    drop(input);
    let kinds: Vec<Value> = String::from_utf8(output.stdout)
        .expect("UTF-8")
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("JSON")["kind"].clone())
        .collect();
    assert_eq!(kinds, ["warm", "heads", "report"]);
}

#[test]
fn messages_are_stamped_with_the_moment_they_were_due() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("ws://{}/", listener.local_addr().expect("an address"));
    let server = thread::spawn(move || {
        let mut socket = answered(&listener);
        let mut reader = BufReader::new(socket.try_clone().expect("a second handle"));
        let mut stamps = Vec::new();
        loop {
            let mut head = [0; 6];
            if reader.read_exact(&mut head).is_err() || head[0] != 0x81 {
                return stamps;
            }
            let mut payload = vec![0; usize::from(head[1] & 0x7f)];
            reader.read_exact(&mut payload).expect("a whole message");
            payload.iter_mut().zip(head[2..].iter().cycle()).for_each(|(byte, key)| *byte ^= key);
            let message: Value = serde_json::from_slice(&payload).expect("JSON");
            stamps.push(message["ts"].as_u64().expect("a stamp"));
            let Deed::Send(frame) = text(&message.to_string()) else { unreachable!("a text is sent") };
            if socket.write_all(&frame).is_err() {
                return stamps;
            }
        }
    });
    let keys = ["--no-welcome", "--seq-key", "none", "--stream-key", "none", "--epoch-key", "none"];
    let mut args = vec!["run", &url, "--connections", "1", "--duration", "2s", "--quiet"];
    args.extend(keys);
    args.extend(["--message", r#"{"ts":{ts}}"#, "--message-every", "10ms"]);
    let report = run(&args);
    check_broken(&report, &[]);
    let stamps = server.join().expect("it ends with the connection");
    assert!(stamps.len() > 100, "{stamps:?}");
    // However late each was sent, they lie ten milliseconds apart; half a millisecond is for a clock that is being set.
    let first = stamps[0];
    for (n, &stamp) in stamps.iter().enumerate() {
        assert!(stamp.abs_diff(first + n as u64 * 10_000) < 500, "stamp {n} of {stamps:?}");
    }
}

#[test]
fn a_peer_with_its_own_format_is_measured() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address: SocketAddr = listener.local_addr().expect("an address");
    let server = thread::spawn(move || {
        let mut socket = answered(&listener);
        // It passes on what it is told, after half a second, with a number of its own.
        let mut reader = BufReader::new(socket.try_clone().expect("a second handle"));
        for n in 1.. {
            let mut head = [0; 6];
            if reader.read_exact(&mut head).is_err() || head[0] != 0x81 {
                break;
            }
            let mut payload = vec![0; usize::from(head[1] & 0x7f)];
            reader.read_exact(&mut payload).expect("a whole message");
            payload.iter_mut().zip(head[2..].iter().cycle()).for_each(|(byte, key)| *byte ^= key);
            thread::sleep(Duration::from_millis(500));
            let payload = String::from_utf8(payload).expect("UTF-8");
            let event = text(&format!(r#"{{"pub":{{"data":{payload},"offset":{n}}}}}"#));
            let Deed::Send(frame) = event else { unreachable!("a text is sent") };
            // What was told at the very end is answered when nobody is there any more.
            if socket.write_all(&frame).is_err() {
                break;
            }
        }
    });
    let url = format!("ws://{address}/");
    let message = r#"{"sent":{ts},"i":{i}}"#;
    let report = run(&[
        "run",
        &url,
        "--connections",
        "1",
        "--duration",
        "4s",
        "--no-welcome",
        "--ts-key",
        "pub.data.sent",
        "--ts-unit",
        "ms",
        "--seq-key",
        "pub.offset",
        "--stream-key",
        "none",
        "--epoch-key",
        "none",
        "--message",
        message,
        "--message-every",
        "1s",
    ]);
    assert_eq!(report.code, Some(0), "{:#}", report.json);
    report.check("/events/lost", &json!(0));
    assert!(report.number("/published") >= 3.0 && report.number("/deliveries/count") >= 2.0, "{:#}", report.json);
    let p50 = report.number("/latency_us/p50");
    assert!((499_000.0..30_000_000.0).contains(&p50), "{:#}", report.json);
    server.join().expect("it ends with the connection");
}

#[test]
fn what_is_no_websocket_or_breaks_its_rules_is_told() {
    let check = |answer: &'static [u8], cause: &str| {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address: SocketAddr = listener.local_addr().expect("an address");
        let server = thread::spawn(move || {
            if answer.starts_with(b"HTTP") {
                let (mut socket, _) = listener.accept().expect("a connection");
                let _ = socket.read(&mut [0; 4096]).expect("a head");
                socket.write_all(answer).expect("it is read");
                wait_for_end(socket);
            } else {
                let mut socket = answered(&listener);
                socket.write_all(answer).expect("it is read");
                wait_for_end(socket);
            }
        });
        let report = run(&["run", &format!("ws://{address}/"), "--connections", "1", "--duration", "1s"]);
        report.check("/connections/failures", &json!({ cause: 1 }));
        assert_eq!(report.code, Some(1));
        server.join().expect("it ends with the connection");
    };
    check(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n", "http_503");
    check(b"HTTP/1.1 101 Switching Protocols\r\nSec-WebSocket-Accept: x\r\n\r\n", "wrong_sec_websocket_accept");
    check(b"HTTP/1.0 101 x\r\n\r\n", "not_http");
    check(b"\x81\x81\0\0\0\0x", "ws_masked_frame");
    check(b"\xc1\x01x", "ws_reserved_bits");
    check(b"\x81\x01\xff", "not_utf8");
    check(b"\x80\x01x", "ws_bad_fragment");
    check(b"\x88\x0f\x0f\xa1invalid_token", "close 4001 invalid_token");
}
