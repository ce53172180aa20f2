//! `/admin/v1/streams`: streams listed, made, changed, deleted, stopped, started and polled at once.
//!
//! ```text
//! GET    -> 200 {"streams":[{"id","source","state","url",…}]}
//! POST   {the keys of [[stream]]} -> 201, `ETag`, `Location`
//! GET    /admin/v1/streams/{id} -> 200, `ETag`: its keys, secrets as `***`
//! PUT    /admin/v1/streams/{id} {its keys}, `If-Match`? -> 200, `ETag`; 412 where it was changed since
//! DELETE /admin/v1/streams/{id}, `If-Match`? -> 204
//! POST   /admin/v1/streams/{id}/start, stop -> 200; refresh -> 202
//! ```
//!
//! What GET gives may be PUT: `***` keeps the secret that is kept, and the members that are no keys (`source`, `state`,
//! `code`, `created_at`, `changed_at`, `warnings`) are passed over.
//!
//! Source: protocol version 1, section 6; RFC 9110 section 13. Memory: one answer. Errors: problem documents, with all that
//! is wrong with a stream in `errors`. What is done leaves a line in the log. Not here: who may ask (`admin`), what is kept
//! (`streams`).

use serde_json::{Value, json};

use crate::auth::control::ControlEntry;
use crate::codec::http::Response;
use crate::codec::message::ErrorCode;
use crate::config::{LogLevel, Members};
use crate::ids::StreamId;
use crate::limits;
use crate::shard::Order;
use crate::time::WallTime;

use super::admin_call::{Call, not_allowed, problem};
use super::core::Process;
use super::mailbox::Message;
use super::streams::{Known, Listed, StreamStore, StreamsError};
use super::{admin_keys, clock, log};

/// Members of an answer that are no keys of `[[stream]]`.
const READ_ONLY: [&str; 6] = ["source", "state", "code", "created_at", "changed_at", "warnings"];

/// Whom such orders are given to.
#[derive(Clone, Copy)]
pub struct Streams<'s> {
    /// Who keeps them.
    pub store: &'s StreamStore,
    /// Whose cores poll them.
    pub process: &'s Process,
}

/// Answers a call whose path is this resource's; `rest`: its segments behind `streams`.
pub fn answer(streams: Streams<'_>, call: &Call<'_>, rest: &[&str]) -> Response {
    let store = streams.store;
    let answer = match (rest, call.method) {
        ([], "GET" | "HEAD") => Ok(list(store)),
        ([], "POST") => make(store, call),
        ([], _) => Err(not_allowed("GET, HEAD, POST")),
        ([id], "GET" | "HEAD") => read(store, id),
        ([id], "PUT") => change(store, call, id),
        ([id], "DELETE") => delete(store, call, id),
        ([_], _) => Err(not_allowed("GET, HEAD, PUT, DELETE")),
        ([id, "start"], "POST") => stop(store, call, id, false),
        ([id, "stop"], "POST") => stop(store, call, id, true),
        ([id, "refresh"], "POST") => refresh(streams, call, id),
        ([_, "start" | "stop" | "refresh"], _) => Err(not_allowed("POST")),
        _ => Err(problem(ErrorCode::NotFound, "there is no such resource")),
    };
    answer.unwrap_or_else(|refusal| refusal)
}

fn list(store: &StreamStore) -> Response {
    let streams: Vec<Value> = store.list().iter().map(|listed| Value::Object(shown(listed))).collect();
    json_answer(200, &json!({ "streams": streams }))
}

fn read(store: &StreamStore, id: &str) -> Result<Response, Response> {
    let listed = StreamId::new(id).and_then(|id| store.find(&id)).ok_or_else(|| refused(&StreamsError::Missing))?;
    Ok(with_tag(json_answer(200, &Value::Object(shown(&listed))), &listed))
}

fn make(store: &StreamStore, call: &Call<'_>) -> Result<Response, Response> {
    let members = members(call)?;
    let listed = store.make(&members, tag()?, clock::now().wall).map_err(|error| refused(&error))?;
    call.audit(&[("stream", Some(listed.id.as_str()))], "An administrator has made a stream.");
    let place = format!("/admin/v1/streams/{}", listed.id);
    Ok(with_tag(json_answer(201, &Value::Object(shown(&listed))), &listed).header("Location", &place))
}

fn change(store: &StreamStore, call: &Call<'_>, id: &str) -> Result<Response, Response> {
    let (id, known, members) = (id_of(id)?, known(call)?, members(call)?);
    let listed = store.change(&id, &members, &known, tag()?, clock::now().wall).map_err(|error| refused(&error))?;
    call.audit(&[("stream", Some(id.as_str()))], "An administrator has changed a stream.");
    Ok(with_tag(json_answer(200, &Value::Object(shown(&listed))), &listed))
}

fn delete(store: &StreamStore, call: &Call<'_>, id: &str) -> Result<Response, Response> {
    let (id, known) = (id_of(id)?, known(call)?);
    store.delete(&id, &known).map_err(|error| refused(&error))?;
    call.audit(&[("stream", Some(id.as_str()))], "An administrator has deleted a stream.");
    Ok(Response::new(204))
}

fn stop(store: &StreamStore, call: &Call<'_>, id: &str, stop: bool) -> Result<Response, Response> {
    let id = id_of(id)?;
    let news = store.stop(&id, stop).map_err(|error| refused(&error))?;
    if news {
        let sentence =
            if stop { "An administrator has stopped a stream." } else { "An administrator has started a stream." };
        call.audit(&[("stream", Some(id.as_str()))], sentence);
    }
    let listed = store.find(&id).ok_or_else(|| refused(&StreamsError::Missing))?;
    Ok(with_tag(json_answer(200, &Value::Object(shown(&listed))), &listed))
}

fn refresh(streams: Streams<'_>, call: &Call<'_>, id: &str) -> Result<Response, Response> {
    let id = id_of(id)?;
    streams.store.may_refresh(&id).map_err(|error| refused(&error))?;
    poll(streams.process, &id);
    if let Some(store) = &streams.process.store {
        let entry = ControlEntry::stream_refresh(&id, streams.process.id, clock::now().wall);
        store.order(Order::Publish(entry));
    }
    call.audit(&[("stream", Some(id.as_str()))], "An administrator has had a stream polled.");
    Ok(json_answer(202, &json!({ "id": id.as_str() })))
}

/// Has every core poll a stream at once.
fn poll(process: &Process, id: &StreamId) {
    for mailbox in &process.mailboxes {
        super::tell(mailbox, || Message::Refresh(id.clone()));
    }
}

/// Control events were heard: streams that other processes have had polled are polled here too. Never waits.
pub fn heard(process: &Process, entries: &[ControlEntry]) {
    let after = clock::now().wall - limits::REFRESH_HEARD_MAX;
    for entry in entries.iter().filter(|entry| entry.is_refresh()) {
        let Some(id) = entry.refreshed_elsewhere(process.id, after) else { continue };
        for mailbox in &process.mailboxes {
            // Where a core has no room it has other things to do than to poll early.
            let _ = mailbox.post(Message::Refresh(id.clone()));
        }
    }
}

fn id_of(id: &str) -> Result<StreamId, Response> {
    StreamId::new(id).ok_or_else(|| refused(&StreamsError::Missing))
}

/// The keys of a stream that a body holds.
fn members(call: &Call<'_>) -> Result<Members, Response> {
    let mut members: Members = call.body()?;
    members.retain(|name, _| !READ_ONLY.contains(&name.as_str()));
    Ok(members)
}

/// `If-Match` (RFC 9110 section 13.1.1). A weak tag matches nothing there.
fn known(call: &Call<'_>) -> Result<Known, Response> {
    let Some(field) = &call.if_match else { return Ok(Known::Nothing) };
    if field.trim() == "*" {
        return Ok(Known::Nothing);
    }
    let mut tags = Vec::new();
    for tag in field.split(',') {
        let tag = tag.trim();
        let strong = tag.strip_prefix('"').and_then(|tag| tag.strip_suffix('"'));
        match strong {
            Some(strong) => tags.push(strong.to_owned()),
            None if tag.starts_with("W/\"") => {}
            None => return Err(problem(ErrorCode::BadRequest, "If-Match is no list of entity tags")),
        }
    }
    Ok(Known::Tags(tags))
}

/// What tells a stream from what it was before: chance.
fn tag() -> Result<String, Response> {
    let mut bytes = [0; 8];
    admin_keys::random(&mut bytes).map_err(|error| refused(&StreamsError::State(error)))?;
    Ok(format!("{:016x}", u64::from_be_bytes(bytes)))
}

/// What is shown of a stream: its keys, and what is known of it besides.
fn shown(listed: &Listed) -> Members {
    let mut shown = listed.members.clone();
    let mut put = |name: &str, value: Value| drop(shown.insert(name.to_owned(), value));
    put("source", if listed.tag.is_some() { "admin" } else { "file" }.into());
    match listed.failing {
        _ if listed.stopped => put("state", "stopped".into()),
        Some(code) => {
            put("state", "failing".into());
            put("code", code.as_str().into());
        }
        None => put("state", "running".into()),
    }
    if let Some((created, changed)) = listed.times {
        put("created_at", WallTime::as_micros(created).into());
        put("changed_at", WallTime::as_micros(changed).into());
    }
    if !listed.warnings.is_empty() {
        put("warnings", json!(listed.warnings));
    }
    shown
}

fn with_tag(response: Response, listed: &Listed) -> Response {
    match &listed.tag {
        Some(tag) => response.header("ETag", &format!("\"{tag}\"")),
        None => response,
    }
}

fn refused(error: &StreamsError) -> Response {
    let detail = error.to_string();
    match error {
        StreamsError::Missing => problem(ErrorCode::StreamNotFound, &detail),
        StreamsError::Changed => problem(ErrorCode::PreconditionFailed, &detail),
        StreamsError::Taken | StreamsError::Configured | StreamsError::TooMany | StreamsError::Stopped => {
            Response::problem(409, ErrorCode::BadRequest.as_str(), &detail)
        }
        StreamsError::Contended => {
            Response::problem(503, ErrorCode::Overloaded.as_str(), &detail).header("Retry-After", "1")
        }
        StreamsError::OtherId => problem(ErrorCode::BadRequest, &detail),
        StreamsError::Invalid(invalid) => with_errors(400, "Bad Request", ErrorCode::BadRequest, &detail, &invalid.0),
        StreamsError::Blocked(errors) => with_errors(403, "Forbidden", ErrorCode::TargetBlocked, &detail, errors),
        StreamsError::Redis(_) => {
            log::write(LogLevel::Error, &[("error", error)], "A stream was not changed.");
            problem(ErrorCode::SessionStoreUnavailable, &detail).header("Retry-After", "2")
        }
        StreamsError::State(_) | StreamsError::Kept { .. } | StreamsError::Section { .. } => {
            log::write(LogLevel::Error, &[("error", error)], "A stream was not changed.");
            Response::problem(503, ErrorCode::Overloaded.as_str(), &detail).header("Retry-After", "10")
        }
    }
}

fn with_errors(status: u16, title: &str, code: ErrorCode, detail: &str, errors: &[String]) -> Response {
    let document = json!({
        "type": "about:blank",
        "title": title,
        "status": status,
        "code": code.as_str(),
        "detail": detail,
        "errors": errors,
    });
    Response::new(status).body("application/problem+json", document.to_string().into_bytes())
}

fn json_answer(status: u16, value: &Value) -> Response {
    let mut text = value.to_string();
    text.push('\n');
    Response::new(status).body("application/json", text.into_bytes())
}
