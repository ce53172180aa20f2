//! Actions: messages that become calls of an upstream, judged by the grant of the moment, and answered by their `id`.
//!
//! Source: protocol version 1, sections 4 and 6 «Actions».
//! Memory: an [`Acting`] for each call under way, at most [`ACTIONS_PER_CONNECTION_MAX`] of a connection and
//! [`ACTIONS_PER_CORE_MAX`] of a core; a rate's count of a caller stands in the ledger.
//! Errors: an `error` frame with the `id`: what the caller may not, what is wrong with its message, or `ACTION_FAILED` with
//! what became of the call. Whoever is gone when the answer comes is told nothing.
//! Not here: what a message makes of an action (`stream::action`), the call itself (`runtime::fetch`), polls after it (`refresh`).

use std::sync::Arc;
use std::time::Duration;

use crate::auth::grant::{ClaimValue, CredentialKind, Grant};
use crate::codec::message::{self, ClientId, ErrorCode, ErrorFrame, MessageError};
use crate::ids::{ConnectionKey, Holder, StreamId};
use crate::limits::{ACTION_NOTICE_INTERVAL, ACTIONS_PER_CONNECTION_MAX, ACTIONS_PER_CORE_MAX};
use crate::metrics::ActionResult;
use crate::stream::action::{ActResult, Answer, Claim, Options, Unfit};
use crate::stream::poll::{FetchError, UpstreamCode};
use crate::time::Instant;

use super::{Notice, Output, Shard, StreamKey, catalog};

/// An action that is under way.
#[derive(Debug)]
pub(super) struct Acting {
    connection: ConnectionKey,
    id: Option<ClientId>,
    options: Arc<Options>,
    /// What its caller could see of the streams to be polled after it, when it asked.
    refresh: Vec<Arc<StreamKey>>,
    begun: Instant,
}

/// Why an action is not begun.
struct Refused {
    code: ErrorCode,
    detail: String,
    retry_in: Option<Duration>,
}

impl Refused {
    fn new(code: ErrorCode, detail: impl Into<String>) -> Refused {
        Refused { code, detail: detail.into(), retry_in: None }
    }
}

impl Shard {
    /// A message whose `type` is none of the protocol's own.
    pub(super) fn asked_to_act(&mut self, index: u32, kind: &str, id: Option<ClientId>, text: &str) {
        let Some(options) = self.options.catalog.action(kind).cloned() else {
            let error = MessageError::UnknownType { id };
            return self.tell(index, "error", |out| message::write_error(out, &ErrorFrame::from(&error)));
        };
        let leeway = self.options.auth.jwt.leeway;
        let Some(open) = self.connections.at(index).and_then(|connection| connection.open()) else { return };
        if open.grant.end(leeway).is_some_and(|end| end <= self.now.wall) {
            // Its end has come, and its turn has not: nothing is done for a credential that is none any more.
            return self.open_due(index);
        }
        if open.grant.only().is_some() {
            // The token of an ephemeral session is good for its stream alone.
            return self.tell_error(index, ErrorCode::Forbidden, ErrorCode::Forbidden.meaning(), id.as_ref(), None);
        }
        if let Err(Refused { code, detail, retry_in }) = self.act(index, &options, id.clone(), text) {
            self.metrics.actions.of(ActionResult::of_code(code.as_str())).count();
            let retry_in_ms = retry_in.map(|wait| u64::try_from(wait.as_micros().div_ceil(1_000)).unwrap_or(u64::MAX));
            let frame = ErrorFrame { error: &detail, id: id.as_ref(), retry_in_ms, ..ErrorFrame::of(code) };
            self.tell(index, "error", |out| message::write_error(out, &frame));
        }
    }

    /// Begins an action: rights first, then the message, then how much is under way, then how often.
    fn act(&mut self, index: u32, options: &Arc<Options>, id: Option<ClientId>, text: &str) -> Result<(), Refused> {
        let (Some(connection), Some(open)) =
            (self.key_of(index), self.connections.at(index).and_then(|connection| connection.open()))
        else {
            return Ok(());
        };
        may_act(&open.grant, options)?;
        let claim = |name: &str| {
            open.grant.claim(name).map(|value| match value {
                ClaimValue::Text(text) => Claim::Text(text),
                ClaimValue::Integer(text) => Claim::Integer(text),
                ClaimValue::Other => Claim::Other,
            })
        };
        let call = options.call(text, &claim).map_err(|unfit| {
            let code = match &unfit {
                Unfit::Message(_) => ErrorCode::BadMessage,
                Unfit::Fill(error) => catalog::code_of(error),
            };
            Refused::new(code, unfit.to_string())
        })?;
        if open.acting >= ACTIONS_PER_CONNECTION_MAX {
            return Err(Refused::new(ErrorCode::RateLimited, "the connection has as many actions under way as it may"));
        }
        if self.connections.at(index).is_some_and(|connection| connection.is_full()) {
            // Answers wait for its socket in memory, and an action's may be large.
            return Err(Refused::new(ErrorCode::RateLimited, "the connection has not taken the answers it was given"));
        }
        if self.acting.len() >= ACTIONS_PER_CORE_MAX {
            return Err(Refused::new(ErrorCode::Overloaded, "the server has as many actions under way as it may"));
        }
        if let Some(rate) = options.rate {
            let caller = self.actor(&open.grant, u128::from_ne_bytes(open.random), &options.kind);
            self.ledger.action(caller, rate.count, rate.period, self.now.at).map_err(|wait| {
                let detail = format!("at most {rate} of this action");
                Refused { retry_in: Some(wait), ..Refused::new(ErrorCode::RateLimited, detail) }
            })?;
        }
        let refresh = self.with_seen(Vec::new(), index, options);
        if let Some(open) = self.connections.at_mut(index).and_then(|connection| connection.open_mut()) {
            open.acting += 1;
        }
        self.ask_no += 1;
        let acting = Acting { connection, id, options: Arc::clone(options), refresh, begun: self.now.at };
        self.acting.insert(self.ask_no, acting);
        self.metrics.actions_in_flight.set(self.acting.len() as u64);
        self.outputs.push_back(Output::Act { ask: self.ask_no, call });
        Ok(())
    }

    /// Whom an action's rate is counted for: the subject on all of its connections, or the connection where there is none.
    fn actor(&self, grant: &Grant, connection: u128, kind: &str) -> Holder {
        match grant.sub() {
            Some(sub) => self.ledger.holder("action", (grant.issuer(), sub, kind)),
            None => self.ledger.holder("action-connection", (connection, kind)),
        }
    }

    /// `keys`, and those of the action's streams that the connection is subscribed to, each once; also what its caller's claims
    /// select of those that are not among them as they are configured now.
    fn with_seen(&self, mut keys: Vec<Arc<StreamKey>>, index: u32, options: &Options) -> Vec<Arc<StreamKey>> {
        let Some(open) = self.connections.at(index).and_then(|connection| connection.open()) else { return keys };
        let catalog = &self.options.catalog;
        let is_there = |id: &StreamId| keys.iter().any(|key| key.target.options.id == *id && catalog.is_current(key));
        let lacking: Vec<_> = options.refresh.iter().filter(|id| !is_there(id)).collect();
        keys.extend(lacking.into_iter().filter_map(|id| catalog.selected(&open.grant, id)));
        for (_, slot) in open.subscriptions.iter() {
            let Some(topic) = self.topics.at(slot.topic) else { continue };
            let named = options.refresh.contains(&topic.key.target.options.id);
            // One poll shows every view its own.
            if named && !keys.iter().any(|key| key.is_polled_with(&topic.key)) {
                keys.push(Arc::clone(&topic.key));
            }
        }
        keys
    }

    /// An action has ended.
    pub(super) fn acted(&mut self, ask: u64, result: ActResult) {
        let Some(Acting { connection, id, options, refresh, begun }) = self.acting.remove(&ask) else { return };
        self.metrics.actions_in_flight.set(self.acting.len() as u64);
        self.metrics.action_duration.observe(self.now.at.since(begun));
        let code = match &result {
            Ok(answer) => answer.failure(),
            Err(FetchError { code, .. }) => Some(*code),
        };
        let counted = code.map_or(ActionResult::Ok, |code| ActionResult::of_code(code.as_str()));
        self.metrics.actions.of(counted).count();

        let live = self.still(connection);
        if let Some(index) = live {
            self.tell_acted(index, id.as_ref(), &result, code);
        }
        // Where only the answer's body could not be had, the upstream may well have done it.
        if matches!(code, None | Some(UpstreamCode::TooLarge | UpstreamCode::Body)) {
            let keys = match live {
                Some(index) => self.with_seen(refresh, index, &options),
                None => refresh,
            };
            for key in keys {
                self.refresh_everywhere(key);
            }
        }
        if let Err(FetchError { code, detail }) = result {
            self.note_failure(&options.kind, code, detail);
        }
        if self.draining.is_some() {
            self.tell_drained();
        }
    }

    /// Tells who has asked, if its grant still stands.
    fn tell_acted(&mut self, index: u32, id: Option<&ClientId>, result: &ActResult, code: Option<UpstreamCode>) {
        let (leeway, now) = (self.options.auth.jwt.leeway, self.now.wall);
        let Some(open) = self.connections.at_mut(index).and_then(|connection| connection.open_mut()) else { return };
        open.acting = open.acting.saturating_sub(1);
        if !self.judge_now(index) {
            return;
        }
        let Some(open) = self.connections.at(index).and_then(|connection| connection.open()) else { return };
        if open.grant.end(leeway).is_some_and(|end| end <= now) {
            return self.open_due(index);
        }
        let answer: Option<&Answer> = result.as_ref().ok();
        let body = answer.and_then(|answer| std::str::from_utf8(answer.body.as_deref()?).ok());
        match (code, answer) {
            (None, Some(answer)) => self.tell(index, "action_result", |out| {
                message::write_action_result(out, id, answer.status, body);
            }),
            _ => {
                let wait = answer.and_then(|answer| answer.retry_after);
                let frame = ErrorFrame {
                    reason: code.map(UpstreamCode::as_str),
                    status: answer.map(|answer| answer.status),
                    body,
                    retry_in_ms: wait.map(|wait| u64::try_from(wait.as_millis()).unwrap_or(u64::MAX)),
                    id,
                    ..ErrorFrame::of(ErrorCode::ActionFailed)
                };
                self.tell(index, "error", |out| message::write_error(out, &frame));
            }
        }
    }

    /// Tells the log of a call that got no answer, unless it has just been told of one like it.
    fn note_failure(&mut self, kind: &str, code: UpstreamCode, detail: String) {
        let now = self.now.at;
        let told = self.action_told.get(kind).copied();
        if told.is_some_and(|told| now.since(told) < ACTION_NOTICE_INTERVAL) {
            return;
        }
        self.action_told.insert(kind.to_owned(), now);
        // Actions that a reload has removed are forgotten.
        let catalog = &self.options.catalog;
        self.action_told.retain(|kind, _| catalog.action(kind).is_some());
        self.outputs.push_back(Output::Notice(Notice::Action { kind: kind.to_owned(), code, detail }));
    }
}

/// Whether the grant of the moment lets its holder act. An API key is for its streams and for nothing else, and so is a
/// ticket of one.
fn may_act(grant: &Grant, options: &Options) -> Result<(), Refused> {
    let told = |code: ErrorCode| Refused::new(code, code.meaning());
    if grant.api_key().is_some() {
        return Err(told(ErrorCode::InsufficientPermissions));
    }
    match grant.kind() {
        CredentialKind::Anonymous => Err(told(ErrorCode::MissingCredential)),
        CredentialKind::ApiKey => Err(told(ErrorCode::InsufficientPermissions)),
        CredentialKind::Jwt | CredentialKind::Session | CredentialKind::Ticket => {
            grant.has_rights(&options.roles, &options.permissions).map_err(|_| told(ErrorCode::InsufficientPermissions))
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::{HashMap, VecDeque};

    use serde_json::{Value, json};

    use super::*;
    use crate::auth::api_key::{ApiKey, ApiKeyId, KeyHash, Source, key_text};
    use crate::auth::control::{ControlEntry, Event};
    use crate::auth::grant::RightsTable;
    use crate::auth::jwt;
    use crate::auth::keys::{Algorithm, Key, KeyConfig};
    use crate::codec::ws::{Opcode, write_masked};
    use crate::config::{Config, FileError, Sources};
    use crate::ids::CoreId;
    use crate::limits::CONTROL_BYTES_MAX;
    use crate::metrics::CoreMetrics;
    use crate::secret::Secret;
    use crate::shard::{Catalog, Input, Options as ShardOptions, Sent, Wire};
    use crate::stream::action::Call;
    use crate::stream::budget::PollLeave;
    use crate::stream::poll::{FetchResponse, PollNo, Validators};
    use crate::time::{Now, WallTime};

    const SECRET: &str = "a secret of these tests, of 32 bytes or more";
    const WALL_S: u64 = 1_800_000_000;
    const PEER: &str = "192.0.2.1:4711";

    struct Nowhere;

    impl Sources for Nowhere {
        fn env(&self, _: &str) -> Option<Vec<u8>> {
            None
        }

        fn file(&self, _: &str, _: usize) -> Result<Vec<u8>, FileError> {
            Err(FileError::Missing)
        }
    }

    /// What each connection was sent, and whether sockets take nothing.
    #[derive(Default)]
    struct Sockets(HashMap<u32, VecDeque<u8>>, bool);

    impl Wire for Sockets {
        fn send(&mut self, connection: u32, bytes: &[u8]) -> Sent {
            if self.1 {
                return Sent::Blocked;
            }
            self.0.entry(connection).or_default().extend(bytes);
            Sent::Bytes(bytes.len())
        }
    }

    /// A shard of one core, what it wants done, and its clients.
    pub(in crate::shard) struct Hall {
        shard: Shard,
        now: Now,
        sockets: Sockets,
        calls: VecDeque<(u64, Call)>,
        fetches: VecDeque<(u32, PollNo, String, PollLeave)>,
        notices: Vec<Notice>,
        drained: bool,
    }

    fn options_of(config: &str, previous: Option<&Catalog>) -> ShardOptions {
        let text = format!(
            "[server]\nheartbeat = \"1h\"\n[auth.jwt]\nleeway = \"0s\"\n[[auth.jwt.key]]\nalg = \"HS256\"\nsecret = {SECRET:?}\n{config}"
        );
        let (config, _) = Config::parse(&text, &Nowhere).unwrap_or_else(|errors| panic!("{errors:?}"));
        ShardOptions {
            connection: config.connection.clone(),
            auth: config.auth.clone(),
            limits: config.limits.clone(),
            catalog: Catalog::new(&config.streams, previous, 7).with_actions(&config.actions),
        }
    }

    impl Hall {
        pub(in crate::shard) fn new(config: &str) -> Hall {
            let options = options_of(config, None);
            let now = Now { at: Instant::from_micros(1_000_000), wall: WallTime::from_secs(WALL_S) };
            let metrics = Arc::new(CoreMetrics::default());
            let shard = Shard::new(CoreId(0), 1, Arc::new(options), Arc::default(), metrics, [7; 32], now);
            let (calls, fetches) = (VecDeque::new(), VecDeque::new());
            Hall { shard, now, sockets: Sockets::default(), calls, fetches, notices: Vec::new(), drained: false }
        }

        /// Sockets take nothing from now on.
        pub(in crate::shard) fn stall(&mut self) {
            self.sockets.1 = true;
        }

        /// They take everything again, and this one says so.
        pub(in crate::shard) fn take_again(&mut self, connection: u32) {
            self.sockets.1 = false;
            self.handle(Input::Writable { connection });
        }

        pub(in crate::shard) fn handle(&mut self, input: Input<'_>) {
            self.shard.handle(self.now, input);
            self.settle();
        }

        fn reload(&mut self, config: &str) {
            let options = options_of(config, Some(&self.shard.options.catalog));
            self.handle(Input::Reload(Arc::new(options)));
        }

        /// Polls until nothing is due.
        pub(in crate::shard) fn poll_all(&mut self, body: &str) {
            for _ in 0..200 {
                self.after(Duration::from_millis(20));
                while !self.fetches.is_empty() {
                    self.polled(body);
                }
            }
        }

        fn settle(&mut self) {
            loop {
                while let Some(output) = self.shard.poll_output() {
                    match output {
                        Output::Act { ask, call } => self.calls.push_back((ask, call)),
                        Output::Fetch { stream, poll, request, leave, .. } => {
                            self.fetches.push_back((stream, poll, request.target.url.to_string(), leave));
                        }
                        Output::Notice(notice) => self.notices.push(notice),
                        Output::Drained => self.drained = true,
                        _ => {}
                    }
                }
                if !self.shard.transmit(self.now, &mut self.sockets) {
                    break;
                }
            }
        }

        fn after(&mut self, time: Duration) {
            self.now = Now { at: self.now.at + time, wall: self.now.wall + time };
            self.handle(Input::Timeout);
        }

        /// A token of `u1`, good for ten minutes, with these claims; null takes one away.
        pub(in crate::shard) fn token(&self, claims: Value) -> String {
            let config = KeyConfig { kid: None, algorithm: Algorithm::Hs256, secret: Secret::new(SECRET) };
            let mut all = json!({"sub": "u1", "exp": WALL_S + 600});
            for (name, value) in claims.as_object().expect("claims") {
                all[name] = value.clone();
            }
            all.as_object_mut().expect("claims").retain(|_, value| !value.is_null());
            jwt::mint(&Key::new(&config).expect("a long secret"), &all.to_string())
        }

        pub(in crate::shard) fn open(&mut self, path: &str, claims: Value) -> u32 {
            let credential = match claims {
                Value::Null => String::new(),
                claims => format!("Authorization: Bearer {}\r\n", self.token(claims)),
            };
            let mut request = format!(
                "GET {path} HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                 Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{credential}\r\n"
            )
            .into_bytes();
            let place = self.shard.accept(self.now, PEER.parse().expect("an address")).expect("room").index;
            self.handle(Input::Received { connection: place, bytes: &mut request });
            let answer: Vec<u8> = self.sockets.0.entry(place).or_default().iter().copied().collect();
            let head = answer.windows(4).position(|window| window == b"\r\n\r\n").expect("an answer") + 4;
            assert!(answer.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&answer));
            self.sockets.0.entry(place).or_default().drain(..head);
            assert_eq!(self.frames(place)[0]["type"], "welcome");
            place
        }

        pub(in crate::shard) fn say(&mut self, connection: u32, message: Value) {
            let mut frame = Vec::new();
            write_masked(&mut frame, true, Opcode::Text, message.to_string().as_bytes(), [1, 2, 3, 4]);
            self.handle(Input::Received { connection, bytes: &mut frame });
        }

        /// What the connection has been sent since: texts as JSON, a close as its code.
        pub(in crate::shard) fn frames(&mut self, connection: u32) -> Vec<Value> {
            let mut bytes: Vec<u8> = self.sockets.0.entry(connection).or_default().drain(..).collect();
            let mut frames = Vec::new();
            while !bytes.is_empty() {
                let (head, length) = match bytes[1] {
                    126 => (4, usize::from(u16::from_be_bytes([bytes[2], bytes[3]]))),
                    127 => (10, usize::from_be_bytes(*bytes[2..].first_chunk().expect("eight bytes"))),
                    short => (2, usize::from(short)),
                };
                let payload = &bytes[head..head + length];
                match bytes[0] & 15 {
                    1 => frames.push(serde_json::from_slice(payload).expect("JSON")),
                    8 => frames.push(json!(u16::from_be_bytes([payload[0], payload[1]]))),
                    _ => {}
                }
                bytes.drain(..head + length);
            }
            frames
        }

        /// Asks for a value over HTTP; what is answered comes to [`Hall::answered`].
        fn get(&mut self, path: &str, claims: Value) -> u32 {
            let token = self.token(claims);
            let mut request =
                format!("GET {path} HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {token}\r\n\r\n").into_bytes();
            let place = self.shard.accept(self.now, PEER.parse().expect("an address")).expect("room").index;
            self.handle(Input::Received { connection: place, bytes: &mut request });
            place
        }

        /// What a connection has been answered over HTTP since.
        fn answered(&mut self, connection: u32) -> String {
            String::from_utf8(self.sockets.0.entry(connection).or_default().drain(..).collect()).expect("UTF-8")
        }

        /// Sets the marks of an event that this core has not been told of yet.
        fn mark(&mut self, entry: &ControlEntry) {
            let now = self.now.wall;
            for event in Event::read(entry, now).expect("an event") {
                self.shard.ledger.marks().take(&event, now);
            }
        }

        fn told(&mut self, connection: u32) -> Value {
            let frames = self.frames(connection);
            assert_eq!(frames.len(), 1, "{frames:?}");
            frames[0].clone()
        }

        /// The oldest call is answered.
        fn answer(&mut self, status: u16, body: &str) {
            let received = self.now.wall;
            let body = body.into();
            let response = FetchResponse {
                status,
                validators: Validators::default(),
                retry_after: None,
                fresh_for: None,
                body,
                received,
            };
            let answer = self.calls.front().expect("a call").1.options.answer(response);
            self.end(Ok(answer));
        }

        fn end(&mut self, result: ActResult) {
            let (ask, _) = self.calls.pop_front().expect("a call");
            self.handle(Input::Acted { ask, result });
        }

        /// The oldest poll brings `body`; the URL that was asked for.
        fn polled(&mut self, body: &str) -> String {
            let (stream, poll, url, leave) = self.fetches.pop_front().expect("a poll");
            let (validators, received) = (Validators::default(), self.now.wall);
            let response = FetchResponse {
                status: 200,
                validators,
                retry_after: None,
                fresh_for: None,
                body: body.into(),
                received,
            };
            leave.answered(self.now.at, &response);
            self.handle(Input::Fetched { stream, poll, result: Ok(response) });
            url
        }

        fn metric(&self, result: ActionResult) -> u64 {
            self.shard.metrics.actions.of(result).value()
        }
    }

    const UPDATE: &str = r#"
        [[action]]
        type = "update"
        roles = ["agent"]
        permissions = ["write"]
        method = "PUT"
        url = "http://api/{message.n}"
        body = "{message.value}"
    "#;

    fn agent() -> Value {
        json!({"role": "agent", "permissions": ["write"]})
    }

    fn update(n: u32) -> Value {
        json!({"type": "update", "n": n, "value": {"of": n}, "id": n})
    }

    fn code(frame: &Value) -> (&str, &Value) {
        (frame["code"].as_str().unwrap_or_default(), &frame["id"])
    }

    #[test]
    fn a_message_becomes_one_call_and_its_answer_one_frame() {
        let mut hall = Hall::new(UPDATE);
        let ada = hall.open("/v1/ws", agent());
        hall.say(ada, update(7));
        let (_, call) = &hall.calls[0];
        assert_eq!((call.options.method.as_str(), call.url.as_str()), ("PUT", "http://api/7"));
        assert_eq!(call.body.as_deref(), Some(&br#"{"of":7}"#[..]));
        assert_eq!(hall.frames(ada), Vec::<Value>::new());
        assert_eq!(hall.shard.metrics.actions_in_flight.value(), 1);
        hall.answer(200, " {\"ok\": 1.0} ");
        assert_eq!(hall.told(ada), json!({"type":"action_result","id":7,"status":200,"body":{"ok":1.0}}));
        assert_eq!((hall.metric(ActionResult::Ok), hall.shard.metrics.actions_in_flight.value()), (1, 0));
    }

    #[test]
    fn answers_find_their_askers_by_id_in_whatever_order_they_come() {
        let mut hall = Hall::new(UPDATE);
        let (ada, bob) = (hall.open("/v1/ws", agent()), hall.open("/v1/ws", agent()));
        for n in 0..5 {
            hall.say(if n % 2 == 0 { ada } else { bob }, update(n));
        }
        hall.calls.make_contiguous().reverse();
        for n in (0..5u16).rev() {
            hall.answer(200 + n, "");
            let told = hall.told(if n % 2 == 0 { ada } else { bob });
            assert_eq!(told, json!({"type":"action_result","id":n,"status":200 + n}));
        }
    }

    #[test]
    fn the_grant_of_the_moment_decides() {
        let mut hall = Hall::new(UPDATE);
        let ada = hall.open("/v1/ws", json!({"role": "agent"}));
        hall.say(ada, update(1));
        assert_eq!(code(&hall.told(ada)), ("INSUFFICIENT_PERMISSIONS", &json!(1)));
        let token = hall.token(agent());
        hall.say(ada, json!({"type": "auth_update", "token": token}));
        assert_eq!(hall.told(ada)["type"], "auth_ok");
        hall.say(ada, update(2));
        assert_eq!(hall.calls.len(), 1);
        let token = hall.token(json!({"role": "viewer", "permissions": ["write"]}));
        hall.say(ada, json!({"type": "auth_update", "token": token}));
        assert_eq!(hall.told(ada)["type"], "auth_ok");
        hall.say(ada, update(3));
        assert_eq!(code(&hall.told(ada)), ("INSUFFICIENT_PERMISSIONS", &json!(3)));
        assert_eq!(hall.calls.len(), 1);
        hall.answer(200, "1");
        assert_eq!(hall.told(ada)["id"], 2, "what was begun with the right is answered");
        assert_eq!(hall.metric(ActionResult::InsufficientPermissions), 2);
    }

    #[test]
    fn an_action_before_the_pass_has_come_to_its_connection_is_judged_by_what_was_said() {
        let mut hall = Hall::new(UPDATE);
        let ada = hall.open("/v1/ws", agent());
        let wall = hall.now.wall;
        hall.mark(&ControlEntry::permissions_changed("u1", None, Some(vec!["read".into()]), None, wall));
        hall.say(ada, update(1));
        assert!(hall.calls.is_empty(), "by the permissions of a moment ago");
        let frames = hall.frames(ada);
        let update_first = json!({"type":"permission_update","permissions":["read"],"roles":["agent"]});
        assert_eq!((frames.len(), &frames[0]), (2, &update_first));
        assert_eq!(code(&frames[1]), ("INSUFFICIENT_PERMISSIONS", &json!(1)));
        hall.mark(&ControlEntry::permissions_changed("u1", None, Some(vec!["write".into()]), None, wall));
        hall.say(ada, update(2));
        assert_eq!((hall.calls.len(), hall.told(ada)["type"].clone()), (1, json!("permission_update")));
        // The answer to what was begun with the right, and whatever is asked next, find a connection that has ended.
        hall.mark(&ControlEntry::user_logged_out("u1", None, wall));
        hall.answer(200, "{}");
        assert_eq!(hall.frames(ada), [json!(4010)]);
        let bob = hall.open("/v1/ws", json!({"sub": "u2", "role": "agent", "permissions": ["write"], "jti": "t2"}));
        hall.mark(&ControlEntry::token_revoked("t2", None, None, wall));
        hall.say(bob, update(3));
        assert_eq!((hall.calls.len(), hall.frames(bob)), (0, vec![json!(4010)]));
    }

    #[test]
    fn a_subscribe_before_the_pass_has_come_to_its_connection_is_judged_by_what_was_said() {
        let mut hall = Hall::new(WATCHED);
        let ada = hall.open("/v1/ws", json!({"role": "viewer", "company": "acme"}));
        let wall = hall.now.wall;
        hall.mark(&ControlEntry::permissions_changed("u1", None, None, Some(vec![]), wall));
        hall.say(ada, json!({"type": "subscribe", "stream": "leads", "id": 1}));
        let frames = hall.frames(ada);
        assert_eq!((frames.len(), &frames[0]["type"]), (2, &json!("permission_update")));
        assert_eq!(code(&frames[1]), ("INSUFFICIENT_PERMISSIONS", &json!(1)));
        hall.mark(&ControlEntry::permissions_changed("u1", None, None, Some(vec!["viewer".into()]), wall));
        hall.say(ada, json!({"type": "subscribe", "stream": "leads", "id": 2}));
        let kinds: Vec<Value> = hall.frames(ada).iter().map(|frame| frame["type"].clone()).collect();
        assert_eq!(kinds, ["permission_update", "subscribed"]);
    }

    #[test]
    fn a_new_credential_before_the_pass_has_come_to_its_connection_does_not_outlive_the_logout() {
        let mut hall = Hall::new(WATCHED);
        let ada = hall.open("/v1/ws", json!({"iat": WALL_S - 10}));
        let wall = hall.now.wall;
        hall.mark(&ControlEntry::user_logged_out("u1", None, wall));
        let token = hall.token(json!({"iat": WALL_S + 1}));
        hall.say(ada, json!({"type": "auth_update", "token": token}));
        assert_eq!(hall.frames(ada), [json!(4010)]);
        hall.open("/v1/ws", json!({"iat": WALL_S + 1}));
    }

    #[test]
    fn who_waits_for_a_value_gets_none_by_rights_that_were_taken_away() {
        let viewer = || json!({"role": "viewer", "company": "acme"});
        for (entry, status, said) in [
            (ControlEntry::user_logged_out("u1", None, WallTime::from_secs(WALL_S)), 401, "LOGGED_OUT"),
            (
                ControlEntry::permissions_changed("u1", None, None, Some(vec![]), WallTime::from_secs(WALL_S)),
                403,
                "INSUFFICIENT_PERMISSIONS",
            ),
        ] {
            let mut hall = Hall::new(WATCHED);
            let ada = hall.get("/v1/streams/leads", viewer());
            let bob = hall.get("/v1/streams/leads", json!({"sub": "u2", "role": "viewer", "company": "acme"}));
            hall.after(Duration::from_millis(1));
            hall.mark(&entry);
            assert_eq!(hall.answered(ada), "");
            hall.polled("[\"hidden now\"]");
            let answer = hall.answered(ada);
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")) && answer.contains(said), "{answer}");
            assert!(!answer.contains("hidden now") && hall.answered(bob).ends_with("[\"hidden now\"]"));
        }
    }

    #[test]
    fn nobody_in_particular_never_acts() {
        let free = "[[action]]\ntype = \"poke\"\nurl = \"http://api/\"\n";
        let stream = "[[stream]]\nid = \"s\"\nurl = \"http://api/s\"\nallow_anonymous = true\n";
        let mut hall = Hall::new(&format!("{stream}{free}"));
        let guest = hall.open("/v1/ws", Value::Null);
        hall.say(guest, json!({"type": "poke", "id": "x"}));
        assert_eq!(code(&hall.told(guest)), ("MISSING_CREDENTIAL", &json!("x")));
        let ada = hall.open("/v1/ws", json!({}));
        hall.say(ada, json!({"type": "poke"}));
        assert_eq!(hall.calls.len(), 1, "an action without roles is for everyone with a credential");
    }

    #[test]
    fn an_api_key_acts_neither_itself_nor_by_a_ticket() {
        let (config, _) = Config::parse(UPDATE, &Nowhere).unwrap_or_else(|errors| panic!("{errors:?}"));
        let id = ApiKeyId::new("dash").expect("an id");
        let key = Arc::new(ApiKey {
            hash: KeyHash::new(&key_text(&id, &[7; 32]), [7; 16]),
            id,
            streams: vec!["*".to_owned()],
            roles: vec!["agent".to_owned()],
            permissions: vec!["write".to_owned()],
            rate: 0,
            created: None,
            expires: None,
            source: Source::Admin,
        });
        let grant = Grant::of_api_key(&key, &mut RightsTable::default());
        for grant in [grant.clone(), grant.by_ticket()] {
            let refused = may_act(&grant, &config.actions[0]).expect_err("it is for its streams");
            assert_eq!(refused.code, ErrorCode::InsufficientPermissions, "{:?}", grant.kind());
        }
    }

    #[test]
    fn what_no_action_is_called_is_an_unknown_type() {
        let mut hall = Hall::new(UPDATE);
        let ada = hall.open("/v1/ws", agent());
        for kind in ["Update", "upd", "x".repeat(65).as_str()] {
            hall.say(ada, json!({"type": kind, "id": 5}));
            assert_eq!(code(&hall.told(ada)), ("UNKNOWN_TYPE", &json!(5)));
        }
        hall.say(ada, json!({"type": "update", "value": 1, "id": 6}));
        assert_eq!(code(&hall.told(ada)), ("BAD_MESSAGE", &json!(6)));
        assert_eq!((hall.calls.len(), hall.metric(ActionResult::BadMessage)), (0, 1));
    }

    #[test]
    fn an_answer_for_one_who_is_gone_or_whose_grant_has_ended_is_dropped() {
        let mut hall = Hall::new(UPDATE);
        let gone = hall.open("/v1/ws", agent());
        hall.say(gone, update(1));
        hall.handle(Input::Lost { connection: gone });
        let bob = hall.open("/v1/ws", json!({"sub": "u2"}));
        assert_eq!(bob, gone, "he has her place");
        hall.answer(200, "{}");
        assert_eq!(hall.frames(bob), Vec::<Value>::new());

        let ada = hall.open("/v1/ws", json!({"role": "agent", "permissions": ["write"], "exp": WALL_S + 30}));
        hall.say(ada, update(2));
        hall.after(Duration::from_secs(31));
        hall.answer(200, "{}");
        let frames = hall.frames(ada);
        assert!(frames.contains(&json!(4001)), "{frames:?}");
        assert!(frames.iter().all(|frame| frame["type"] != "action_result"), "{frames:?}");
        assert_eq!(hall.shard.acting.len(), 0);
    }

    #[test]
    fn an_action_in_the_moment_between_the_end_of_a_grant_and_its_turn_is_not_begun() {
        let mut hall = Hall::new(UPDATE);
        let ada = hall.open("/v1/ws", json!({"role": "agent", "permissions": ["write"], "exp": WALL_S + 30}));
        hall.say(ada, update(1));
        let late = Duration::from_secs(30);
        hall.now = Now { at: hall.now.at + late, wall: hall.now.wall + late };
        hall.say(ada, update(2));
        assert_eq!(hall.calls.len(), 1);
        hall.answer(200, "1");
        assert_eq!(hall.frames(ada), vec![json!(4001)]);
    }

    #[test]
    fn a_connection_has_so_many_actions_under_way_and_no_more() {
        let mut hall = Hall::new(UPDATE);
        let (ada, bob) = (hall.open("/v1/ws", agent()), hall.open("/v1/ws", agent()));
        for n in 0..u32::from(ACTIONS_PER_CONNECTION_MAX) {
            hall.say(ada, update(n));
        }
        assert_eq!(hall.frames(ada), Vec::<Value>::new());
        hall.say(ada, update(99));
        assert_eq!(code(&hall.told(ada)), ("RATE_LIMITED", &json!(99)));
        hall.say(bob, update(1));
        assert_eq!((hall.calls.len(), hall.frames(bob).len()), (usize::from(ACTIONS_PER_CONNECTION_MAX) + 1, 0));
        hall.answer(200, "1");
        assert_eq!(hall.told(ada)["id"], 0);
        hall.say(ada, update(100));
        assert_eq!(hall.frames(ada), Vec::<Value>::new(), "one has ended, one may begin");
    }

    #[test]
    fn a_connection_that_takes_no_answers_begins_nothing_more() {
        let mut hall = Hall::new(UPDATE);
        let ada = hall.open("/v1/ws", agent());
        hall.say(ada, update(1));
        hall.say(ada, update(2));
        hall.stall();
        hall.answer(200, &format!("\"{}\"", "x".repeat(CONTROL_BYTES_MAX)));
        hall.say(ada, update(3));
        assert_eq!(hall.calls.len(), 1, "the one that was begun before");
        hall.take_again(ada);
        let frames = hall.frames(ada);
        assert_eq!(frames.iter().map(code).collect::<Vec<_>>(), [("", &json!(1)), ("RATE_LIMITED", &json!(3))]);
        hall.say(ada, update(4));
        assert_eq!(hall.calls.len(), 2);
    }

    #[test]
    fn a_core_has_so_many_actions_under_way_and_no_more() {
        let mut hall = Hall::new(UPDATE);
        let per_connection = usize::from(ACTIONS_PER_CONNECTION_MAX);
        for _ in 0..ACTIONS_PER_CORE_MAX / per_connection {
            let one = hall.open("/v1/ws", agent());
            (0..per_connection).for_each(|_| hall.say(one, update(1)));
        }
        assert_eq!(hall.calls.len(), ACTIONS_PER_CORE_MAX);
        let ada = hall.open("/v1/ws", agent());
        hall.say(ada, update(2));
        assert_eq!(code(&hall.told(ada)), ("OVERLOADED", &json!(2)));
        hall.answer(200, "1");
        hall.say(ada, update(3));
        assert_eq!(hall.calls.len(), ACTIONS_PER_CORE_MAX);
    }

    #[test]
    fn a_rate_is_the_subjects_on_all_its_connections_and_bad_messages_do_not_use_it_up() {
        let mut hall = Hall::new(&format!("{UPDATE}rate = \"2/m\"\n"));
        let (ada, again, bob) = (
            hall.open("/v1/ws", agent()),
            hall.open("/v1/ws", agent()),
            hall.open("/v1/ws", json!({"sub": "u2", "role": "agent", "permissions": ["write"]})),
        );
        hall.say(ada, json!({"type": "update", "n": 1}));
        assert_eq!(hall.told(ada)["code"], "BAD_MESSAGE");
        hall.say(ada, update(1));
        hall.say(again, update(2));
        hall.say(again, update(3));
        let told = hall.told(again);
        assert_eq!((code(&told), &told["retry_in_ms"]), (("RATE_LIMITED", &json!(3)), &json!(30_000)));
        hall.say(bob, update(4));
        assert_eq!(hall.calls.len(), 3);
        hall.after(Duration::from_millis(29_999));
        hall.frames(ada);
        hall.say(ada, update(5));
        assert_eq!(hall.told(ada)["code"], "RATE_LIMITED");
        hall.after(Duration::from_millis(1));
        hall.say(ada, update(6));
        assert_eq!(hall.calls.len(), 4);
    }

    #[test]
    fn callers_without_a_subject_have_a_rate_for_each_connection() {
        let mut hall = Hall::new(&format!("{UPDATE}rate = \"1/m\"\n"));
        let nobody = || json!({"sub": null, "role": "agent", "permissions": ["write"]});
        let (ada, bob) = (hall.open("/v1/ws", nobody()), hall.open("/v1/ws", nobody()));
        hall.say(ada, update(1));
        hall.say(bob, update(2));
        assert_eq!(hall.calls.len(), 2);
        hall.say(ada, update(3));
        assert_eq!(hall.told(ada)["code"], "RATE_LIMITED");
    }

    #[test]
    fn failures_have_their_code_and_hold_no_body_unless_they_may() {
        let fail = |config: &str, status, body: &str| {
            let mut hall = Hall::new(&format!("{UPDATE}{config}"));
            let ada = hall.open("/v1/ws", agent());
            hall.say(ada, update(1));
            hall.answer(status, body);
            hall.told(ada)
        };
        let meaning = ErrorCode::ActionFailed.meaning();
        for (status, reason) in
            [(422, "UPSTREAM_STATUS"), (500, "UPSTREAM_STATUS"), (302, "UPSTREAM_REDIRECT"), (401, "UPSTREAM_AUTH")]
        {
            assert_eq!(
                fail("", status, "{\"secret\":1}"),
                json!({"type":"error","code":"ACTION_FAILED","error":meaning,"reason":reason,"status":status,"id":1})
            );
        }
        assert_eq!(fail("error_body = true", 422, "{\"field\":1}")["body"], json!({"field": 1}));
        assert_eq!(fail("error_body = true", 422, "<html>").get("body"), None);
        assert_eq!(fail("reply_body = false", 200, "{\"a\":1}"), json!({"type":"action_result","id":1,"status":200}));

        let mut hall = Hall::new(UPDATE);
        let ada = hall.open("/v1/ws", agent());
        for (n, code) in UpstreamCode::ALL.into_iter().enumerate() {
            hall.say(ada, update(1));
            hall.end(Err(FetchError { code, detail: format!("what happened {n}") }));
            let told = hall.told(ada);
            assert_eq!(
                told,
                json!({"type":"error","code":"ACTION_FAILED","error":meaning,"reason":code.as_str(),"id":1})
            );
        }
        let [Notice::Action { kind, code, detail }] = &hall.notices[..] else { panic!("{:?}", hall.notices) };
        assert_eq!((kind.as_str(), *code, detail.as_str()), ("update", UpstreamCode::ALL[0], "what happened 0"));
        hall.after(ACTION_NOTICE_INTERVAL);
        hall.say(ada, update(1));
        hall.end(Err(FetchError { code: UpstreamCode::Dns, detail: "again".into() }));
        assert_eq!(hall.notices.len(), 2, "now and then, not each time");
    }

    const WATCHED: &str = r#"
        [[stream]]
        id = "leads"
        url = "http://api/{claims.company}/leads"
        interval = "1h"
        roles = ["viewer"]
        [[stream]]
        id = "search"
        url = "http://api/search?q={query.q}"
        params = ["q"]
        interval = "1h"
        [[stream]]
        id = "other"
        url = "http://api/other"
        interval = "1h"
        [[action]]
        type = "update"
        url = "http://api/update"
        refresh = ["leads", "search"]
    "#;

    #[test]
    fn a_success_polls_what_the_caller_selects_and_watches_at_once_and_nothing_else() {
        let mut hall = Hall::new(WATCHED);
        let viewer = |company: &str| json!({"sub": company, "role": "viewer", "company": company});
        let watchers = [hall.open("/v1/ws", viewer("acme")), hall.open("/v1/ws", viewer("umbrella"))];
        for watcher in watchers {
            hall.say(watcher, json!({"type": "subscribe", "stream": "leads"}));
        }
        hall.say(watchers[0], json!({"type": "subscribe", "stream": "other"}));
        // A writer who may not watch `leads`, and watches a search.
        let writer = hall.open("/v1/ws", json!({"sub": "w", "company": "acme"}));
        for q in ["a", "b"] {
            hall.say(writer, json!({"type": "subscribe", "stream": format!("search?q={q}")}));
        }
        // Before an origin's first answer one asks for all.
        hall.poll_all("[1]");
        hall.after(Duration::from_secs(60));
        assert!(hall.fetches.is_empty(), "the next poll is an hour off");

        hall.say(writer, json!({"type": "update", "id": 1}));
        hall.say(writer, json!({"type": "unsubscribe", "stream": "search?q=b"}));
        hall.answer(500, "");
        hall.after(Duration::from_millis(20));
        assert!(hall.fetches.is_empty(), "nothing was done, nothing is polled");

        hall.say(writer, json!({"type": "subscribe", "stream": "search?q=b"}));
        hall.say(writer, json!({"type": "update", "id": 2}));
        hall.answer(204, "");
        hall.after(Duration::ZERO);
        let mut urls: Vec<String> = hall.fetches.iter().map(|(_, _, url, _)| url.clone()).collect();
        urls.sort();
        assert_eq!(urls, ["http://api/acme/leads", "http://api/search?q=a", "http://api/search?q=b"]);
        for watcher in watchers {
            hall.frames(watcher);
        }
        while !hall.fetches.is_empty() {
            hall.polled("[1,2]");
        }
        hall.after(Duration::from_millis(20));
        let seen = hall.told(watchers[0]);
        assert_eq!((&seen["stream"], &seen["data"]), (&json!("leads"), &json!([1, 2])), "{seen}");
        assert_eq!(hall.frames(watchers[1]), Vec::<Value>::new());
    }

    #[test]
    fn a_poll_that_was_under_way_is_followed_by_one_that_has_seen_the_change() {
        let mut hall = Hall::new(WATCHED);
        let ada = hall.open("/v1/ws", json!({"role": "viewer", "company": "acme"}));
        hall.say(ada, json!({"type": "subscribe", "stream": "leads"}));
        hall.after(Duration::from_millis(20));
        assert_eq!(hall.fetches.len(), 1);
        for id in 0..3 {
            hall.say(ada, json!({"type": "update", "id": id}));
            hall.answer(200, "");
        }
        hall.after(Duration::from_millis(1));
        assert_eq!(hall.fetches.len(), 1, "one at a time");
        hall.polled("[\"before\"]");
        hall.after(Duration::from_millis(1));
        assert_eq!(hall.fetches.len(), 1, "one more, for all three");
        hall.polled("[\"after\"]");
        hall.after(Duration::from_secs(10));
        assert!(hall.fetches.is_empty());
        let frames = hall.frames(ada);
        assert_eq!(frames.last().expect("frames")["data"], json!(["after"]), "{frames:?}");
    }

    #[test]
    fn what_was_changed_is_polled_though_the_writer_is_gone() {
        let mut hall = Hall::new(WATCHED);
        let watcher = hall.open("/v1/ws", json!({"role": "viewer", "company": "acme"}));
        hall.say(watcher, json!({"type": "subscribe", "stream": "leads"}));
        hall.after(Duration::from_millis(20));
        hall.polled("[1]");
        let writer = hall.open("/v1/ws", json!({"sub": "w", "company": "acme"}));
        hall.say(writer, json!({"type": "update"}));
        hall.handle(Input::Lost { connection: writer });
        hall.answer(200, "");
        hall.after(Duration::ZERO);
        assert_eq!(hall.fetches.len(), 1);
    }

    #[test]
    fn what_was_changed_is_polled_though_its_stream_was_configured_anew_meanwhile() {
        let anew = WATCHED.replace("1h", "2h");
        let elsewhere = anew.replace("{claims.company}/leads", "v2/{claims.company}/leads");
        for (config, gone, expected) in [
            (&anew, false, &["http://api/acme/leads"][..]),
            (&anew, true, &["http://api/acme/leads"]),
            (&elsewhere, false, &["http://api/v2/acme/leads"]),
        ] {
            let mut hall = Hall::new(WATCHED);
            for company in ["acme", "umbrella"] {
                let watcher = hall.open("/v1/ws", json!({"sub": company, "role": "viewer", "company": company}));
                hall.say(watcher, json!({"type": "subscribe", "stream": "leads"}));
            }
            let writer = hall.open("/v1/ws", json!({"sub": "w", "company": "acme"}));
            hall.poll_all("[1]");
            hall.say(writer, json!({"type": "update"}));
            hall.reload(config);
            // Whoever watches has been moved, and what they watch now is polled, before the change.
            hall.poll_all("[1]");
            if gone {
                hall.handle(Input::Lost { connection: writer });
            }
            hall.answer(200, "");
            hall.after(Duration::from_millis(100));
            let urls: Vec<&str> = hall.fetches.iter().map(|(_, _, url, _)| &**url).collect();
            assert_eq!(urls, expected, "gone: {gone}");
        }
    }

    #[test]
    fn a_drain_waits_for_actions_that_were_begun() {
        let mut hall = Hall::new(UPDATE);
        let ada = hall.open("/v1/ws", agent());
        hall.say(ada, update(1));
        hall.handle(Input::Drain);
        hall.settle();
        hall.handle(Input::Lost { connection: ada });
        hall.after(Duration::from_millis(500));
        assert_eq!((hall.shard.connections(), hall.drained), (0, false));
        hall.answer(200, "{}");
        assert!(hall.drained);

        let mut hall = Hall::new(UPDATE);
        let ada = hall.open("/v1/ws", agent());
        hall.say(ada, update(1));
        hall.handle(Input::Drain);
        hall.handle(Input::Lost { connection: ada });
        hall.after(Duration::from_secs(11));
        assert!(hall.drained, "but not longer than it lasts");
    }
}
