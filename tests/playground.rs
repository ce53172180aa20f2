//! The playground in a real browser, against the real `restcast demo`: every transport, every format, renewal in band,
//! the end of a token, and what a person sees of each. Pictures go to `target/playground-*.png`.
#![cfg(feature = "runtime")]

#[allow(dead_code, reason = "the playground is one page")]
mod browser;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use browser::{Browser, PATIENCE};

const LIVE: &str = "document.getElementById('status').dataset.state === 'live'";

#[test]
fn a_watcher_sees_changes_over_websocket_sse_and_polling_and_renews_in_band() {
    let mut stage = Stage::set();
    stage.enter("prices");
    stage.expect_live("ws");
    assert_eq!(stage.text("location.hash"), "", "the fragment leaves the address bar");
    assert_eq!(stage.number("document.querySelectorAll('#value tbody tr').length"), 12);

    for transport in ["ws", "sse", "polling"] {
        stage.choose("transport", transport);
        stage.expect_live(transport);
        stage.expect_changes();
        stage.expect_the_servers_value();
        stage.expect_renewal_in_band();
    }
    for format in ["merge", "full", "patch"] {
        stage.choose("transport", "ws");
        stage.choose("format", format);
        stage.expect_live("ws");
        stage.expect_changes();
        stage.expect_the_servers_value();
        // A merge of an array is the array again, and the server sends what is smaller.
        let kind = if format == "patch" { "patch" } else { "snapshot" };
        stage.browser.wait_for(&format!("document.querySelector('#frame-list li[data-kind=\"{kind}\"]')"));
    }
    assert!(stage.frames_deflated() > 0, "the browser and the server agree on compression");
    stage.expect_no_token_in_sight();
    stage.expect_no_complaint();
}

#[test]
fn a_connection_ends_with_its_token_and_the_page_says_so() {
    let mut stage = Stage::set();
    stage.enter("leads");
    stage.expect_live("ws");
    stage.browser.wait_for("document.querySelectorAll('#value tbody tr').length === 10");
    stage.browser.wait_for("document.getElementById('members').innerText.includes('generated_at')");
    stage.click("auto-renew");
    stage.renew_for(3);
    stage.browser.wait_for("document.getElementById('status').dataset.state === 'ended'");
    assert_eq!(stage.text("document.getElementById('notice-code').textContent"), "4001 token_expired");
    stage.browser.wait_for("document.querySelector('#code-list tr.met')?.dataset.code === '4001'");
    // What is not live looks like it, from the next frame that the browser draws.
    stage.browser.wait_for("document.getElementById('value').classList.contains('held')");

    // A fresh token, and the stream goes on where it was.
    stage.pick_life(900);
    stage.click("renew");
    stage.expect_live("ws");
    assert_eq!(stage.number("document.getElementById('n-connections').textContent"), 2);
    stage.expect_no_complaint();

    // With the box ticked a short token is renewed when the server asks, and the connection outlives it.
    stage.click("auto-renew");
    stage.renew_for(4);
    stage.browser.wait_for("document.querySelector('#frame-list li[data-kind=\"reauthenticate\"]')");
    let ended = "document.getElementById('frame-list').innerText.split('auth_ok').length > 3";
    stage.browser.wait_for(ended);
    assert_eq!(stage.number("document.getElementById('n-connections').textContent"), 2);
    stage.expect_no_complaint();
}

#[test]
fn where_websockets_do_not_get_through_the_page_falls_back_step_by_step() {
    let mut stage = Stage::set();
    // A proxy that drops every upgrade, as the page sees one.
    stage.browser.before_documents(
        "window.WebSocket = class { static OPEN = 1; readyState = 3; close() {} send() {}
           constructor() { setTimeout(() => this.onclose?.({ code: 1006, reason: '' }), 5); } };",
    );
    stage.enter("prices");
    stage.expect_live("sse");
    stage.expect_changes();
    // And one that answers event streams with a page of its own.
    stage.browser.before_documents(
        "const plain = window.fetch; window.fetch = (url, options) => options?.headers?.Accept === 'text/event-stream'
           ? Promise.resolve(new Response('<p>no</p>', { headers: { 'Content-Type': 'text/html' } })) : plain(url, options);",
    );
    stage.enter("prices");
    stage.expect_live("polling");
    stage.expect_changes();
    stage.expect_no_complaint();
}

#[test]
fn a_refusal_is_shown_in_the_servers_words() {
    let mut stage = Stage::set();
    let listen = stage.demo.word("listen");
    stage.browser.open(&format!("http://{listen}/#stream=prices&token=e30.e30.AAAA"));
    stage.browser.wait_for("document.getElementById('status').dataset.state === 'ended'");
    assert_eq!(stage.text("document.getElementById('notice-code').textContent"), "INVALID_TOKEN");
    assert!(stage.text("document.getElementById('notice-text').textContent").len() > 10);
    stage.browser.open(&format!("http://{listen}/#stream=nowhere&token={}", stage.demo.word("token")));
    stage.browser.wait_for("document.getElementById('notice-code').textContent === 'STREAM_NOT_FOUND'");
    stage.browser.open(&format!("http://{listen}/#stream=prices&token=not%20a%20token"));
    stage.browser.wait_for("document.getElementById('notice-title').textContent === 'That is not a token.'");
    assert!(stage.is("document.getElementById('demo').hidden"), "without a secret there is nothing to sign with");
}

#[test]
fn the_raw_frames_are_bounded_and_the_pane_can_be_stopped() {
    let mut stage = Stage::scripted();
    let shown = "document.querySelectorAll('#frame-list li').length";
    let say_many = |from: u32, to: u32| {
        format!(
            "for (let seq = {from}; seq < {to}; seq++)
                sockets.at(-1).say({{ type: 'snapshot', stream: 's', epoch: 'e', seq, ts: 1, data: [{{ n: seq }}] }})"
        )
    };
    stage.browser.evaluate(&say_many(1, 21));
    stage.browser.wait_for(&format!("{shown} > 20"));
    let before = stage.number(shown);
    stage.click("pause");
    stage.browser.evaluate(&say_many(21, 30));
    stage.browser.wait_for("document.getElementById('frames-note').textContent === 'paused, 9 new'");
    assert_eq!(stage.number(shown), before, "while paused the pane stands still");
    assert_eq!(stage.text("document.querySelector('#value td').textContent"), "29", "and the value does not");
    stage.click("pause");
    stage.browser.wait_for(&format!("{shown} === {before} + 9"));

    stage.browser.evaluate(&say_many(30, 230));
    stage.browser.wait_for(&format!("{shown} === 200"));
    assert!(stage.text("document.querySelector('#frame-list li').textContent").contains("\"seq\":229"));
    assert!(stage.text("document.querySelector('#frame-list li:last-child').textContent").contains("\"seq\":30,"));
    stage.browser.evaluate(&say_many(230, 231));
    stage.browser.wait_for("document.querySelector('#frame-list li').textContent.includes('\"seq\":230')");
    assert_eq!(stage.number(shown), 200, "one more, and one less");
    stage.click("clear");
    stage.browser.wait_for(&format!("{shown} === 0"));
    stage.expect_no_complaint();
}

#[test]
fn values_are_shown_as_they_were_spelled_and_never_as_markup() {
    let mut stage = Stage::scripted();
    let row = r#"{"id":"<img src=x onerror=alert(1)>","price":1.10,"big":12345678901234567890,"far":1E5,"nested":{"a":[0.0]}}"#;
    let frame = format!(r#"{{"type":"snapshot","stream":"s","epoch":"e","seq":1,"ts":1,"data":[{row}]}}"#);
    stage.browser.evaluate(&format!("sockets.at(-1).say({})", Value::from(frame)));
    stage.browser.wait_for("document.querySelectorAll('#value tbody td').length === 5");
    let cells = "[...document.querySelectorAll('#value tbody td')].map(it => it.textContent).join(' ')";
    let wanted = "<img src=x onerror=alert(1)> 1.10 12345678901234567890 1E5 {a: [0.0]}";
    assert_eq!(stage.text(cells), wanted);
    assert!(!stage.is("document.querySelector('#value img, #frames img')"));
    let frame = r#"{"type":"patch","stream":"s","epoch":"e","seq":2,"base":1,"ts":1,"patch":[{"op":"replace","path":"/0/price","value":1.20}]}"#;
    stage.browser.evaluate(&format!("sockets.at(-1).say({})", Value::from(frame)));
    stage.browser.wait_for("document.querySelector('td.changed.up')?.textContent === '1.20'");
    stage.expect_no_complaint();
}

#[test]
fn an_event_stream_may_be_cut_anywhere_and_end_its_lines_as_it_likes() {
    let mut stage = Stage::set();
    // The answer arrives a byte at a time.
    stage.browser.before_documents(
        "window.events = new TextEncoder().encode([
            ': hello', '', 'event: welcome',
            'data: {\"type\":\"welcome\",\"connection\":\"c_1\",\"auth\":{\"type\":\"jwt\"},\"heartbeat_ms\":25000}', '',
            'id: e-1', 'data:{\"type\":\"snapshot\",\"stream\":\"s\",\"epoch\":\"e\",\"seq\":1,',
            'data: \"ts\":1,\"data\":[{\"name\":\"caf\u{e9} \u{2603} \u{1f680}\"}]}', 'retry: 10', '', ': beat', '', ''].join(window.lineEnd ?? '\\n'));
         const plain = window.fetch;
         window.fetch = (url, options) => options?.headers?.Accept !== 'text/event-stream' ? plain(url, options)
            : Promise.resolve(new Response(new ReadableStream({ start(it) { for (const byte of window.events) it.enqueue(new Uint8Array([byte])); } }),
                { headers: { 'Content-Type': 'text/event-stream; charset=utf-8' } }));",
    );
    for end in ["\\n", "\\r\\n", "\\r"] {
        // Each document runs all scripts in the order they were added: the last line ending wins.
        stage.browser.before_documents(&format!(
            "window.events = new TextEncoder().encode(new TextDecoder().decode(window.events).replaceAll(/\\r\\n|\\n|\\r/g, '{end}'));"
        ));
        let [listen, token] = ["listen", "token"].map(|name| stage.demo.word(name));
        stage.browser.open(&format!("http://{listen}/#stream=prices&transport=sse&token={token}"));
        stage.browser.wait_for("document.querySelector('#value td')?.textContent === 'caf\u{e9} \u{2603} \u{1f680}'");
        assert_eq!(stage.text("document.getElementById('n-frames').textContent"), "2");
        assert!(stage.is(LIVE));
    }
    stage.expect_no_complaint();
}

#[test]
fn a_server_that_drains_is_waited_for() {
    let mut stage = Stage::set();
    stage.enter("prices");
    stage.expect_live("ws");
    let term = Command::new("kill").arg(stage.demo.child.id().to_string()).status();
    assert!(term.expect("kill runs").success());
    stage.browser.wait_for("document.querySelector('#frame-list li[data-kind=\"reconnect\"]')");
    stage.browser.wait_for("document.getElementById('frame-list').innerText.includes('Closed: 1012 draining')");
    stage.browser.wait_for("document.querySelector('#code-list tr.met').dataset.code === '1012'");
    assert!(stage.is("['waiting', 'connecting'].includes(document.getElementById('status').dataset.state)"));
    assert!(
        stage.is("document.querySelectorAll('#value.held tbody tr').length === 12"),
        "what was held stays in sight"
    );
    assert!(stage.demo.child.wait().expect("it ends").success(), "a drained server ends well");
}

#[test]
fn it_fits_a_desk_and_a_phone_in_light_and_dark() {
    let mut stage = Stage::set();
    for (name, width, height, scale, is_dark) in [
        ("light", 1320, 900, 1, false),
        ("dark", 1320, 900, 1, true),
        ("phone", 375, 812, 2, false),
        ("phone-dark", 375, 812, 2, true),
    ] {
        stage.browser.look(width, height, scale, is_dark);
        stage.enter(if name == "dark" { "leads" } else { "prices" });
        stage.expect_live("ws");
        stage.browser.wait_for("Number(document.getElementById('n-events').textContent) >= 4");
        let overflow = stage.number("document.documentElement.scrollWidth") - i64::from(width);
        assert!(overflow <= 0, "{name}: {overflow} px stand out to the right");
        let unnamed = "[...document.querySelectorAll('button, input, select, textarea')]
            .filter(it => !(it.innerText || it.ariaLabel || it.labels?.length)).map(it => it.outerHTML).join()";
        assert_eq!(stage.text(unnamed), "", "{name}: every control has a name");
        let path = target().join(format!("playground-{name}.png"));
        stage.browser.picture(&path);
        assert!(path.metadata().is_ok_and(|it| it.len() > 20_000), "{} holds a picture", path.display());
    }
    // The toggle overrides the system's choice, and stays.
    stage.click("theme");
    assert_eq!(stage.text("document.documentElement.dataset.theme"), "light");
    assert_eq!(stage.text("getComputedStyle(document.documentElement).colorScheme"), "light");
    stage.expect_no_complaint();
}

/// Stands in for the server's side of a WebSocket: a test says each frame itself.
const SCRIPTED_WEBSOCKET: &str = "
    window.sockets = [];
    window.WebSocket = class {
        static OPEN = 1;
        readyState = 1;
        sent = [];
        constructor(url, protocols) {
            this.url = String(url);
            this.protocols = protocols;
            sockets.push(this);
            const auth = { type: 'jwt', sub: 'u1', expires_at: null };
            setTimeout(() => { this.onopen(); this.say({ type: 'welcome', connection: 'c_1', auth, heartbeat_ms: 25000 }); }, 1);
        }
        say(frame) { this.onmessage({ data: typeof frame === 'string' ? frame : JSON.stringify(frame) }); }
        send(text) { this.sent.push(text); }
        close() { this.readyState = 3; }
        end(code, reason) { this.readyState = 3; this.onclose({ code, reason }); }
    };";

#[test]
fn patches_and_merges_apply_as_their_rfcs_say() {
    let mut stage = Stage::scripted();
    // RFC 7396, appendix A, with each value as a member so that the page shows it beside the rows.
    for (value, merge) in [
        (r#"{"a":"b"}"#, r#"{"a":"c"}"#),
        (r#"{"a":"b"}"#, r#"{"b":"c"}"#),
        (r#"{"a":"b"}"#, r#"{"a":null}"#),
        (r#"{"a":"b","b":"c"}"#, r#"{"a":null}"#),
        (r#"{"a":["b"]}"#, r#"{"a":"c"}"#),
        (r#"{"a":"c"}"#, r#"{"a":["b"]}"#),
        (r#"{"a":{"b":"c"}}"#, r#"{"a":{"b":"d","c":null}}"#),
        (r#"{"a":[{"b":"c"}]}"#, r#"{"a":[1]}"#),
        (r#"["a","b"]"#, r#"["c","d"]"#),
        (r#"{"a":"b"}"#, r#"["c"]"#),
        (r#"{"a":"foo"}"#, r#""bar""#),
        (r#"{"e":null}"#, r#"{"a":1}"#),
        (r#"[1,2]"#, r#"{"a":"b","c":null}"#),
        (r#"{}"#, r#"{"a":{"bb":{"ccc":null}}}"#),
        (r#"{"__proto__":{"a":1}}"#, r#"{"__proto__":{"b":2}}"#),
    ] {
        let (before, merge): (Value, Value) = (parse(value), parse(merge));
        let mut after = before.clone();
        json_patch::merge(&mut after, &merge);
        stage.expect_delta("merge", json!({ "v": before }), json!({ "v": merge }), json!({ "v": after }));
    }
    // RFC 6902, appendix A, and the corners of RFC 6901.
    for (value, patch) in [
        (r#"{"foo":"bar"}"#, r#"[{"op":"add","path":"/baz","value":"qux"}]"#),
        (r#"{"foo":["bar","baz"]}"#, r#"[{"op":"add","path":"/foo/1","value":"qux"}]"#),
        (r#"{"baz":"qux","foo":"bar"}"#, r#"[{"op":"remove","path":"/baz"}]"#),
        (r#"{"foo":["bar","qux","baz"]}"#, r#"[{"op":"remove","path":"/foo/1"}]"#),
        (r#"{"baz":"qux","foo":"bar"}"#, r#"[{"op":"replace","path":"/baz","value":"boo"}]"#),
        (
            r#"{"foo":{"bar":"baz","waldo":"fred"},"qux":{"corge":"grault"}}"#,
            r#"[{"op":"move","from":"/foo/waldo","path":"/qux/thud"}]"#,
        ),
        (r#"{"foo":["all","grass","cows","eat"]}"#, r#"[{"op":"move","from":"/foo/1","path":"/foo/3"}]"#),
        (
            r#"{"baz":"qux","foo":["a",2,"c"]}"#,
            r#"[{"op":"test","path":"/baz","value":"qux"},{"op":"test","path":"/foo/1","value":2}]"#,
        ),
        (r#"{"foo":"bar"}"#, r#"[{"op":"add","path":"/child","value":{"grandchild":{}}}]"#),
        (r#"{"foo":["bar"]}"#, r#"[{"op":"add","path":"/foo/-","value":["abc","def"]}]"#),
        (r#"{"/":9,"~1":10}"#, r#"[{"op":"test","path":"/~01","value":10},{"op":"replace","path":"/~1","value":8}]"#),
        (r#"{"a":{"b":[1]}}"#, r#"[{"op":"copy","from":"/a","path":"/c"},{"op":"add","path":"/c/b/0","value":0}]"#),
        (r#"{"":{"":1}}"#, r#"[{"op":"replace","path":"//","value":2}]"#),
        (r#"{"a":1}"#, r#"[{"op":"replace","path":"","value":[1,2]}]"#),
        (r#"{"a":1}"#, r#"[{"op":"add","path":"/__proto__","value":{"b":1}}]"#),
    ] {
        let (before, patch): (Value, Value) = (parse(value), parse(patch));
        let mut after = before.clone();
        let operations: json_patch::Patch = serde_json::from_value(patch.clone()).expect("a patch");
        json_patch::patch(&mut after, &operations).expect("it applies");
        let mut inside = patch;
        for operation in inside.as_array_mut().expect("operations") {
            for pointer in ["path", "from"] {
                if let Some(text) = operation[pointer].as_str() {
                    operation[pointer] = format!("/v{text}").into();
                }
            }
        }
        stage.expect_delta("patch", json!({ "v": before }), inside, json!({ "v": after }));
    }
    stage.expect_no_complaint();
}

#[test]
fn a_gap_or_a_patch_that_does_not_apply_asks_for_the_whole_value_again() {
    let mut stage = Stage::scripted();
    for delta in [
        json!({ "base": 8, "patch": [] }),
        json!({ "base": 7, "patch": [{ "op": "remove", "path": "/none" }] }),
        json!({ "base": 7, "patch": [{ "op": "test", "path": "/rows/0/a", "value": 2 }] }),
        json!({ "base": 7, "patch": [{ "op": "add", "path": "/rows/2", "value": {} }] }),
        json!({ "base": 7, "patch": [{ "op": "replace", "path": "/rows/-1", "value": {} }] }),
        json!({ "base": 7, "patch": [{ "op": "invented", "path": "/rows" }] }),
        json!({ "base": 7, "epoch": "other", "patch": [] }),
        json!({ "base": 7, "patch": null }),
    ] {
        let sockets = stage.number("sockets.length");
        stage.say(json!({ "type": "snapshot", "stream": "s", "epoch": "e", "seq": 7, "ts": 1, "data": { "rows": [{ "a": 1 }] } }));
        let mut frame = json!({ "type": "patch", "stream": "s", "epoch": "e", "seq": 9, "ts": 1 });
        frame.as_object_mut().expect("an object").extend(delta.as_object().expect("an object").clone());
        stage.say(frame);
        stage.browser.wait_for(&format!("sockets.length === {sockets} + 1 && {LIVE}"));
        assert!(!stage.text("sockets.at(-1).url").contains("since="), "{delta}");
        // A fresh start: the backoff between failures in a row is not what is tested here.
        stage.click("connect");
        stage.click("connect");
        stage.browser.wait_for(&format!("sockets.length === {sockets} + 2 && {LIVE}"));
    }
    stage.expect_no_complaint();
}

#[test]
fn each_close_code_is_followed_by_what_the_contract_asks_of_a_client() {
    let mut stage = Stage::scripted();
    assert_eq!(stage.text("sockets[0].protocols.slice(0, 2).join()"), "restcast.v1,jwt");
    assert_eq!(stage.text("sockets[0].protocols[2]"), stage.demo.word("token"));
    stage.say(
        json!({ "type": "snapshot", "stream": "s", "epoch": "k3-f", "seq": 41, "ts": 1, "data": [{ "price": 1 }] }),
    );

    // Reconnect, and go on from what is held.
    for (before, code, reason) in [
        (json!({ "type": "reconnect", "after_ms": 20 }), 1012, "draining"),
        (json!({ "type": "unheard_of" }), 1006, ""),
        (json!({ "type": "unheard_of" }), 1001, "heartbeat_timeout"),
    ] {
        let sockets = stage.number("sockets.length");
        stage.say(before);
        stage.browser.evaluate(&format!("sockets.at(-1).end({code}, '{reason}')"));
        stage.browser.wait_for(&format!("sockets.length === {sockets} + 1 && {LIVE}"));
        assert!(stage.text("sockets.at(-1).url").contains("since=k3-f-41"), "{code}");
    }
    // Do not reconnect.
    for (code, reason) in [(4003, "forbidden"), (4004, "stream_ended"), (4010, "logged_out"), (4010, "token_revoked")] {
        let sockets = stage.number("sockets.length");
        stage.browser.evaluate(&format!("sockets.at(-1).end({code}, '{reason}')"));
        stage.browser.wait_for("document.getElementById('status').dataset.state === 'ended'");
        assert_eq!(stage.text("document.getElementById('notice-code').textContent"), format!("{code} {reason}"));
        thread::sleep(Duration::from_millis(1200));
        assert_eq!(stage.number("sockets.length"), sockets, "{code} {reason}: longer than the first backoff can be");
        stage.click("connect");
        stage.browser.wait_for(LIVE);
    }
    // A refused renewal leaves the connection as it is.
    stage.click("renew");
    stage.browser.wait_for("sockets.at(-1).sent.length === 1");
    assert_eq!(stage.text("Object.keys(JSON.parse(sockets.at(-1).sent[0])).join()"), "type,token,id");
    stage.browser.evaluate(
        "sockets.at(-1).say({ type: 'error', code: 'AUTH_UPDATE_REJECTED', error: 'Refused', reason: 'expired', id: JSON.parse(sockets.at(-1).sent[0]).id })",
    );
    stage.browser.wait_for("document.getElementById('notice-code').textContent === 'AUTH_UPDATE_REJECTED'");
    assert!(stage.is(LIVE));
    stage.expect_no_complaint();
}

#[test]
fn without_a_signing_key_a_person_pastes_the_fresh_token() {
    let mut stage = Stage::set();
    stage.browser.before_documents(SCRIPTED_WEBSOCKET);
    let [listen, token] = ["listen", "token"].map(|name| stage.demo.word(name));
    stage.browser.open(&format!("http://{listen}/#stream=prices&token={token}"));
    stage.browser.wait_for(LIVE);
    assert!(stage.is("document.getElementById('demo').hidden && document.getElementById('fresh').hidden"));
    stage.say(json!({ "type": "reauthenticate", "expires_at": 1, "expires_in_ms": 60_000 }));
    stage.browser.wait_for("document.getElementById('notice-code').textContent === 'reauthenticate'");
    assert_eq!(stage.number("sockets.at(-1).sent.length"), 0, "there is nothing to sign with");

    stage.click("renew");
    assert_eq!(stage.text("document.activeElement.id"), "fresh-token", "where to paste is where one types");
    let paste = |text: &str| {
        format!(
            "document.getElementById('fresh-token').value = ' {text}\\n';
             document.querySelector('#fresh button[type=submit]').click()"
        )
    };
    stage.browser.evaluate(&paste("two.parts"));
    assert_eq!(stage.text("document.getElementById('notice-title').textContent"), "That is not a token.");
    stage.click("renew");
    stage.browser.evaluate(&paste("a.fresh.token"));
    stage.browser.wait_for("sockets.at(-1).sent.length === 1");
    assert_eq!(stage.text("JSON.parse(sockets.at(-1).sent[0]).token"), "a.fresh.token");
    stage.browser.evaluate(
        "sockets.at(-1).say({ type: 'auth_ok', id: JSON.parse(sockets.at(-1).sent[0]).id, expires_at: (Date.now() + 600000) * 1000 })",
    );
    stage.browser.wait_for("document.getElementById('notice-title').textContent === 'Renewed in band.'");
    stage.browser.wait_for("/^(10:00|9:5)/.test(document.getElementById('left').textContent)");
    assert_eq!(stage.number("sockets.length"), 1);
    assert!(stage.is("document.getElementById('fresh').hidden && !document.getElementById('fresh-token').value"));
    stage.expect_no_complaint();
}

#[test]
fn rows_come_and_go_and_whoever_wants_no_motion_sees_marks_that_stand_still() {
    let mut stage = Stage::scripted();
    stage.browser.call(
        "Emulation.setEmulatedMedia",
        json!({ "features": [{ "name": "prefers-reduced-motion", "value": "reduce" }] }),
    );
    let ids = "[...document.querySelectorAll('#value tbody tr:not(.removed) td:first-child')].map(it => it.textContent).join()";
    let data = json!([{ "id": "a", "n": 1.10 }, { "id": "b", "n": 2 }, { "id": "c", "n": 3 }]);
    stage.say(json!({ "type": "snapshot", "stream": "s", "epoch": "e", "seq": 1, "ts": 1, "data": data }));
    stage.browser.wait_for(&format!("{ids} === 'a,b,c'"));
    assert!(!stage.is("document.querySelector('.added, .changed')"), "a first value is no change");
    stage.say(json!({ "type": "patch", "stream": "s", "epoch": "e", "seq": 2, "base": 1, "ts": 1, "patch": [
        { "op": "remove", "path": "/1" },
        { "op": "add", "path": "/0", "value": { "id": "d", "n": 4 } },
        { "op": "move", "from": "/2", "path": "/0" },
        { "op": "replace", "path": "/2/n", "value": 0.5 },
    ] }));
    stage.browser.wait_for(&format!("{ids} === 'c,d,a'"));
    assert_eq!(stage.text("document.querySelector('tr.removed td').textContent"), "b");
    assert_eq!(stage.text("document.querySelector('tr.added td').textContent"), "d");
    assert_eq!(stage.text("document.querySelector('td.changed.down').textContent"), "0.5");
    assert_eq!(stage.text("getComputedStyle(document.querySelector('td.changed.down')).animationName"), "none");
    assert_ne!(
        stage.text("getComputedStyle(document.querySelector('td.changed.down')).backgroundColor"),
        "rgba(0, 0, 0, 0)"
    );
    stage.browser.wait_for("!document.querySelector('.removed, .added, .changed')");

    // More rows than are shown, and a tree of more members than are shown.
    let many: Vec<Value> = (0..501).map(|n| json!({ "id": n })).collect();
    stage.say(json!({ "type": "snapshot", "stream": "s", "epoch": "e", "seq": 3, "ts": 1, "data": many }));
    stage.browser.wait_for("document.querySelectorAll('#value tbody tr:not(.removed)').length === 500");
    assert_eq!(stage.text("document.querySelector('#value .more').textContent"), "1 more row is not shown");
    stage.choose("shape", "tree");
    stage.browser.wait_for("document.querySelector('#value .tree li.count')");
    assert_eq!(stage.text("document.querySelector('#value .tree li.count').textContent"), "… 301 more");
    stage.expect_no_complaint();
}

/// A demo and a browser that looks at it; one at a time, for each takes a core.
struct Stage {
    browser: Browser,
    demo: Demo,
    _turn: MutexGuard<'static, ()>,
}

impl Stage {
    fn set() -> Stage {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let demo = Demo::start();
        Stage { browser: Browser::start(), demo, _turn: turn }
    }

    /// How many frames the demo's server has deflated.
    fn frames_deflated(&self) -> u64 {
        let admin = self.demo.word("admin");
        let mut socket = TcpStream::connect(&admin).expect("the demo has an admin listener");
        let request = format!("GET /metrics HTTP/1.1\r\nHost: {admin}\r\nConnection: close\r\n\r\n");
        socket.write_all(request.as_bytes()).expect("it reads");
        let mut page = String::new();
        socket.read_to_string(&mut page).expect("it answers");
        let count = page.lines().find_map(|line| line.strip_prefix("restcast_deflated_frames_total "));
        count.and_then(|count| count.parse().ok()).unwrap_or_else(|| panic!("no such metric in {page}"))
    }

    /// A page whose server's side is the test.
    fn scripted() -> Stage {
        let mut stage = Stage::set();
        stage.browser.before_documents(SCRIPTED_WEBSOCKET);
        stage.enter("prices");
        stage.browser.wait_for(LIVE);
        stage
    }

    fn say(&mut self, frame: Value) {
        // As text: an object literal would take __proto__ for something else than a member.
        self.browser.evaluate(&format!("sockets.at(-1).say({})", Value::from(frame.to_string())));
    }

    /// After `before` and the delta the page shows what it shows after a snapshot of `after`.
    fn expect_delta(&mut self, kind: &str, before: Value, delta: Value, after: Value) {
        let with_rows = |mut value: Value| {
            value["rows"] = json!([{ "a": 1 }]);
            value
        };
        // Members in any order are the same value.
        let shown = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() =>
            done(document.getElementById('members').innerText.replaceAll('}', '').split(/, |{/).sort().join()))))";
        let snapshot = |epoch: &str, data: Value| json!({ "type": "snapshot", "stream": "s", "epoch": epoch, "seq": 1, "ts": 1, "data": data });
        self.say(snapshot("b", with_rows(after.clone())));
        let wanted = self.browser.evaluate(shown);
        self.say(snapshot("a", with_rows(before)));
        assert_ne!(self.browser.evaluate(shown), "");
        let mut frame = json!({ "type": kind, "stream": "s", "epoch": "a", "seq": 2, "base": 1, "ts": 1 });
        frame[kind] = delta.clone();
        self.say(frame);
        assert_eq!(self.browser.evaluate(shown), wanted, "{kind} {delta} to {after}");
        assert_eq!(self.text("document.getElementById('place').textContent"), "a-2", "it was applied, not refused");
    }

    fn enter(&mut self, stream: &str) {
        let [listen, token, secret] = ["listen", "token", "secret"].map(|name| self.demo.word(name));
        self.browser.open(&format!("http://{listen}/#stream={stream}&token={token}&secret={secret}"));
    }

    fn text(&mut self, expression: &str) -> String {
        self.browser.evaluate(&format!("String({expression})")).as_str().unwrap_or_default().to_owned()
    }

    fn number(&mut self, expression: &str) -> i64 {
        self.browser.evaluate(&format!("Math.round(Number({expression}))")).as_i64().expect("a number")
    }

    fn is(&mut self, expression: &str) -> bool {
        self.browser.evaluate(&format!("Boolean({expression})")) == true
    }

    fn click(&mut self, id: &str) {
        self.browser.evaluate(&format!("document.getElementById('{id}').click()"));
    }

    fn choose(&mut self, name: &str, value: &str) {
        self.browser.evaluate(&format!("document.querySelector('input[name=\"{name}\"][value=\"{value}\"]').click()"));
    }

    fn expect_live(&mut self, transport: &str) {
        self.browser
            .wait_for(&format!("{LIVE} && document.getElementById('status').dataset.transport === '{transport}'"));
        self.browser.wait_for("document.querySelector('#value table')");
    }

    /// Values move, the moved ones are marked, and the raw frames say why.
    fn expect_changes(&mut self) {
        let before = self.text("document.querySelector('#value tbody').innerText");
        let events = self.number("document.getElementById('n-events').textContent.replaceAll(',', '')");
        let before = Value::from(before);
        self.browser.wait_for(&format!("document.querySelector('#value tbody').innerText !== {before}"));
        self.browser.wait_for("document.querySelector('#value td.changed')");
        let now = "Number(document.getElementById('n-events').textContent.replaceAll(',', ''))";
        self.browser.wait_for(&format!("{now} >= {events} + 2"));
        self.browser.wait_for("document.querySelector('#frame-list li[data-way=\"in\"]')");
    }

    /// What the page made of the frames is what the server holds, spelling of numbers included.
    fn expect_the_servers_value(&mut self) {
        let token = self.text("document.getElementById('token').value");
        let compare = format!(
            "(async () => {{
                const answer = await fetch('/v1/streams/prices', {{ headers: {{ Authorization: 'Bearer {token}' }} }});
                const text = await answer.text();
                await new Promise(requestAnimationFrame);
                await new Promise(requestAnimationFrame);
                if (answer.headers.get('ETag') !== `\"${{document.getElementById('place').textContent}}\"`) return 'passed by';
                const held = [...text.matchAll(/\"price\":([-0-9.]+)/g)].map(it => it[1]).join();
                const shown = [...document.querySelectorAll('#value tbody tr:not(.removed) td:nth-child(3)')].map(it => it.textContent).join();
                return held === shown ? 'same' : `held ${{held}}, shown ${{shown}}`;
            }})()"
        );
        let seen = (0..100).map(|_| self.browser.evaluate(&compare)).find(|seen| seen != "passed by");
        assert_eq!(seen.expect("one of a hundred looks meets no change"), "same");
    }

    fn pick_life(&mut self, seconds: u32) {
        self.browser.evaluate(&format!(
            "{{ const lifetime = document.getElementById('lifetime');
                if (![...lifetime.options].some(it => it.value === '{seconds}')) lifetime.add(new Option('{seconds} s', '{seconds}'));
                lifetime.value = '{seconds}'; }}"
        ));
    }

    fn renew_for(&mut self, seconds: u32) {
        self.pick_life(seconds);
        self.browser.wait_for("!document.getElementById('renew').disabled");
        self.click("renew");
        // Half is slack for a busy machine, and still tells a renewed token from the one before.
        let (most, least) = (seconds * 1000, if seconds < 60 { 0 } else { seconds * 500 });
        let left = "Number(document.getElementById('left').dataset.ms)";
        self.browser.wait_for(&format!("{left} <= {most} && {left} >= {least}"));
    }

    /// The countdown falls with a short token and grows with a long one, on one and the same connection.
    fn expect_renewal_in_band(&mut self) {
        let connections = self.number("document.getElementById('n-connections').textContent");
        self.renew_for(120);
        self.renew_for(900);
        self.browser.wait_for("document.getElementById('notice-title').textContent === 'Renewed in band.'");
        assert_eq!(self.number("document.getElementById('n-connections').textContent"), connections, "no reconnect");
        assert!(self.is(LIVE));
        self.expect_changes();
    }

    fn expect_no_token_in_sight(&mut self) {
        let sight = self.text("document.body.innerText");
        for secret in ["token", "secret"] {
            assert!(!sight.contains(&self.demo.word(secret)), "the {secret} is not shown");
        }
        let signed = self.text("document.getElementById('token').value.split('.')[2]");
        assert!(signed.len() > 40 && !sight.contains(&signed), "nor is the renewed token");
    }

    fn expect_no_complaint(&mut self) {
        let complaints = self.browser.complaints();
        assert!(complaints.is_empty(), "{complaints:#?}");
    }
}

/// `restcast demo` on ports of its own.
struct Demo {
    child: Child,
    ready: Value,
}

impl Demo {
    fn start() -> Demo {
        let mut child = Command::new(env!("CARGO_BIN_EXE_restcast"))
            .args(["demo", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"])
            .current_dir(env!("CARGO_TARGET_TMPDIR"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let (said, hear) = mpsc::channel();
        let stdout = child.stdout.take().expect("piped");
        thread::spawn(move || {
            let mut line = String::new();
            let mut stdout = BufReader::new(stdout);
            let _ = stdout.read_line(&mut line);
            let _ = said.send(line);
            let _ = stdout.read_to_string(&mut String::new());
        });
        // The log has to be read, or it would fill its pipe; it is shown with a test that fails.
        let stderr = child.stderr.take().expect("piped");
        thread::spawn(move || {
            BufReader::new(stderr).lines().map_while(Result::ok).for_each(|line| eprintln!("{line}"))
        });
        let line = hear.recv_timeout(PATIENCE).unwrap_or_default();
        let ready = serde_json::from_str(&line).unwrap_or(Value::Null);
        let demo = Demo { child, ready };
        assert_eq!(demo.ready["ready"], true, "no ready line, but {line:?}");
        demo
    }

    /// A member of the ready line.
    fn word(&self, name: &str) -> String {
        self.ready[name].as_str().unwrap_or_else(|| panic!("the ready line has no {name}")).to_owned()
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn parse(text: &str) -> Value {
    serde_json::from_str(text).expect("JSON")
}

/// Where the build puts its results.
fn target() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("target/tmp has a parent").to_owned()
}
