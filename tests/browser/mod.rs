//! A headless Chromium, driven over the DevTools protocol: navigate, evaluate, wait, take a picture, list what went wrong.
//!
//! Source: <https://chromedevtools.github.io/devtools-protocol/>. A browser that is missing is a failure, never a skip.

use std::collections::VecDeque;
use std::io::ErrorKind;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, process, thread};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use tungstenite::{Message, WebSocket};

/// How long anything that is waited for may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(30);
const NAMES: [&str; 5] = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"];

/// One page of several.
#[derive(Clone, Debug)]
pub struct Tab {
    target: String,
    session: String,
}

/// A browser with one page, or several of which one is looked at. Dropped, it ends and its profile is removed.
pub struct Browser {
    child: Child,
    profile: PathBuf,
    socket: WebSocket<TcpStream>,
    session: String,
    target: String,
    next_id: u64,
    events: VecDeque<Value>,
}

impl Browser {
    /// Starts the browser named by `CHROMIUM`, or the first that is on the path.
    pub fn start() -> Browser {
        let program = env::var("CHROMIUM").map(PathBuf::from).ok().or_else(|| NAMES.iter().find_map(|it| on_path(it)));
        let program = program.unwrap_or_else(|| panic!("no Chromium: install one of {NAMES:?}, or set CHROMIUM"));
        let stamp = Instant::now();
        let profile = Path::new(env!("CARGO_TARGET_TMPDIR")).join(
            format!("chromium-{}-{stamp:?}", process::id())
                .replace(|c: char| !c.is_ascii_alphanumeric() && c != '-', ""),
        );
        fs::create_dir_all(&profile).expect("a directory for the profile");
        let child = Command::new(program)
            .args(["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"])
            .args(["--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-port=0"])
            .arg(format!("--user-data-dir={}", profile.display()))
            .arg("about:blank")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("Chromium starts");
        // Held by a `Starting` so that a failure below leaves no process behind.
        let starting = Starting { child: Some(child), profile };
        let (port, path) = starting.endpoint();
        let stream = TcpStream::connect(("127.0.0.1", port)).expect("the DevTools port accepts");
        stream.set_read_timeout(Some(Duration::from_millis(50))).expect("a timeout");
        let socket = handshake(stream, &format!("ws://127.0.0.1:{port}{path}"));
        let (child, profile) = starting.done();
        let mut browser = Browser {
            child,
            profile,
            socket,
            session: String::new(),
            target: String::new(),
            next_id: 0,
            events: VecDeque::new(),
        };
        browser.tab();
        browser
    }

    /// Opens one more page, which is looked at from now on, and returns the one that was.
    pub fn tab(&mut self) -> Tab {
        let before = Tab { target: std::mem::take(&mut self.target), session: std::mem::take(&mut self.session) };
        let target = self.call("Target.createTarget", json!({ "url": "about:blank" }));
        let attached = self.call("Target.attachToTarget", json!({ "targetId": target["targetId"], "flatten": true }));
        self.target = target["targetId"].as_str().expect("a target").to_owned();
        self.session = attached["sessionId"].as_str().expect("a session").to_owned();
        for domain in ["Page.enable", "Runtime.enable", "Log.enable", "Network.enable"] {
            self.call(domain, json!({}));
        }
        before
    }

    /// Looks at another page, and returns the one that was looked at.
    pub fn turn_to(&mut self, tab: &Tab) -> Tab {
        Tab {
            target: std::mem::replace(&mut self.target, tab.target.clone()),
            session: std::mem::replace(&mut self.session, tab.session.clone()),
        }
    }

    /// Closes a page that is not looked at, without asking it.
    pub fn close_tab(&mut self, tab: &Tab) {
        let session = std::mem::take(&mut self.session);
        self.call("Target.closeTarget", json!({ "targetId": tab.target }));
        self.session = session;
    }

    /// One DevTools command and its result.
    pub fn call(&mut self, method: &str, params: Value) -> Value {
        self.next_id += 1;
        let id = self.next_id;
        let mut command = json!({ "id": id, "method": method, "params": params });
        if !self.session.is_empty() {
            command["sessionId"] = self.session.clone().into();
        }
        self.socket.send(Message::text(command.to_string())).expect("the browser listens");
        let until = Instant::now() + PATIENCE;
        loop {
            assert!(Instant::now() < until, "{method} was not answered");
            let Some(mut message) = self.read() else { continue };
            if message["id"] == id {
                assert!(message["error"].is_null(), "{method}: {}", message["error"]);
                return message["result"].take();
            }
            if message["id"].is_null() {
                self.events.push_back(message);
            }
        }
    }

    /// The value of a JavaScript expression; a promise is waited for.
    pub fn evaluate(&mut self, expression: &str) -> Value {
        let params = json!({ "expression": expression, "awaitPromise": true, "returnByValue": true });
        let mut result = self.call("Runtime.evaluate", params);
        assert!(result["exceptionDetails"].is_null(), "{expression}\n{}", result["exceptionDetails"]);
        result["result"]["value"].take()
    }

    /// Waits until the expression is true; says what the page looked like if it never is.
    pub fn wait_for(&mut self, expression: &str) {
        let until = Instant::now() + PATIENCE;
        while self.evaluate(&format!("Boolean({expression})")) != true {
            if Instant::now() > until {
                let seen = self.evaluate("document.body ? document.body.innerText : ''");
                let wrong = self.complaints();
                panic!("never true: {expression}\n{wrong:#?}\n{}", seen.as_str().unwrap_or(""));
            }
            thread::sleep(Duration::from_millis(40));
        }
    }

    /// Goes to `url` by way of an empty page, so that a changed fragment alone is a new document too.
    pub fn open(&mut self, url: &str) {
        self.call("Page.navigate", json!({ "url": "about:blank" }));
        self.wait_for("location.href === 'about:blank' && document.readyState === 'complete'");
        self.call("Page.navigate", json!({ "url": url }));
        self.wait_for("location.protocol.startsWith('http') && document.readyState === 'complete'");
    }

    /// Runs `script` before the scripts of every document that is opened from now on.
    pub fn before_documents(&mut self, script: &str) {
        self.call("Page.addScriptToEvaluateOnNewDocument", json!({ "source": script }));
    }

    /// The size of the window in CSS pixels, and whether the system prefers dark.
    pub fn look(&mut self, width: u32, height: u32, scale: u32, is_dark: bool) {
        let metrics = json!({ "width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600 });
        self.call("Emulation.setDeviceMetricsOverride", metrics);
        let scheme = if is_dark { "dark" } else { "light" };
        let features = json!([{ "name": "prefers-color-scheme", "value": scheme }]);
        self.call("Emulation.setEmulatedMedia", json!({ "features": features }));
    }

    /// Writes a picture of the window.
    pub fn picture(&mut self, path: &Path) {
        let result = self.call("Page.captureScreenshot", json!({ "format": "png" }));
        let png = STANDARD.decode(result["data"].as_str().unwrap_or("")).expect("base64");
        fs::write(path, png).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }

    /// What the page complained of since the last call: exceptions, console errors and warnings, violations of policies.
    pub fn complaints(&mut self) -> Vec<String> {
        self.evaluate("0");
        let all = self.events.drain(..).filter_map(|event| {
            let about = &event["params"];
            match event["method"].as_str()? {
                "Runtime.exceptionThrown" => Some(about["exceptionDetails"].to_string()),
                "Runtime.consoleAPICalled"
                    if matches!(about["type"].as_str(), Some("error" | "warning" | "assert")) =>
                {
                    Some(about["args"].to_string())
                }
                "Log.entryAdded" if matches!(about["entry"]["level"].as_str(), Some("error" | "warning")) => {
                    Some(format!("{} {}", about["entry"]["text"], about["entry"]["url"]))
                }
                _ => None,
            }
        });
        all.collect()
    }

    fn read(&mut self) -> Option<Value> {
        match self.socket.read() {
            Ok(Message::Text(text)) => Some(serde_json::from_str(&text).expect("DevTools speaks JSON")),
            Ok(_) => None,
            Err(tungstenite::Error::Io(error))
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) =>
            {
                None
            }
            Err(error) => panic!("the browser went away: {error}"),
        }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.socket.send(Message::text(r#"{"id":0,"method":"Browser.close"}"#));
        end(&mut self.child, &self.profile);
    }
}

struct Starting {
    child: Option<Child>,
    profile: PathBuf,
}

impl Starting {
    /// Port and path of the browser's own DevTools socket, once it has written them down.
    fn endpoint(&self) -> (u16, String) {
        let until = Instant::now() + PATIENCE;
        loop {
            let text = fs::read_to_string(self.profile.join("DevToolsActivePort")).unwrap_or_default();
            if let Some((port, path)) = text.split_once('\n').filter(|(_, path)| path.starts_with("/devtools/")) {
                return (port.parse().expect("a port"), path.trim().to_owned());
            }
            assert!(Instant::now() < until, "Chromium named no DevTools port within {PATIENCE:?}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn done(mut self) -> (Child, PathBuf) {
        (self.child.take().expect("taken once"), self.profile.clone())
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            end(&mut child, &self.profile);
        }
    }
}

/// Waits for the browser to end by itself, then ends it; its profile goes with it.
fn end(child: &mut Child, profile: &Path) {
    for _ in 0..100 {
        if !matches!(child.try_wait(), Ok(None)) {
            break;
        }
        thread::sleep(Duration::from_millis(20));
    }
    let _ = child.kill();
    let _ = child.wait();
    // Its last writers may still be at it.
    for _ in 0..20 {
        if fs::remove_dir_all(profile).is_ok() {
            break;
        }
        thread::sleep(Duration::from_millis(50));
    }
}

fn handshake(stream: TcpStream, url: &str) -> WebSocket<TcpStream> {
    let mut attempt = tungstenite::client(url, stream);
    loop {
        match attempt {
            Ok((socket, _)) => return socket,
            Err(tungstenite::HandshakeError::Interrupted(unfinished)) => attempt = unfinished.handshake(),
            Err(error) => panic!("the DevTools handshake failed: {error}"),
        }
    }
}

fn on_path(name: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?).map(|folder| folder.join(name)).find(|it| it.is_file())
}
