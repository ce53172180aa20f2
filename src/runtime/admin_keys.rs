//! `/admin/v1/keys`: API keys made, listed and deleted.
//!
//! ```text
//! POST   {"streams":["leads"],"expires_at"?,"id"?,"rate"?,"roles"?,"permissions"?} -> 201 {"id","key",…}
//! GET    -> 200 {"keys":[{"id","streams","roles","permissions","rate","created_at","expires_at","source"}]}
//! DELETE /admin/v1/keys/{id} -> 204, 404, or 409 where the key stands in the configuration
//! ```
//!
//! Where the keys are in Redis and that is away nothing is made: 503 `SESSION_STORE_UNAVAILABLE`.
//!
//! Source: protocol version 1, section 6. Memory: one answer. Errors: problem documents. What is done leaves a line in the
//! log: which key, never its text or hash. Not here: who may ask (`admin`), where keys are kept (`api_keys`).

use ring::rand::{SecureRandom as _, SystemRandom};
use serde_json::{Map, Value, json};

use crate::auth::api_key::{ApiKey, ApiKeyId, is_stream_glob};
use crate::codec::http::Response;
use crate::codec::message::ErrorCode;
use crate::config::LogLevel;
use crate::time::WallTime;

use super::admin_call::{Call, not_allowed, problem};
use super::api_keys::{KeyStore, KeysError, Wanted};
use super::kept_keys::{is_word, texts};
use super::state::StateError;
use super::{clock, log};

/// Answers a call whose path is this resource's; `rest`: its segments behind `keys`.
pub fn answer(keys: &KeyStore, call: &Call<'_>, rest: &[&str]) -> Response {
    let answer = match (rest, call.method) {
        ([], "GET" | "HEAD") => Ok(list(keys)),
        ([], "POST") => make(keys, call),
        ([], _) => Err(not_allowed("GET, HEAD, POST")),
        ([id], "DELETE") => delete(keys, call, id),
        ([_], _) => Err(not_allowed("DELETE")),
        _ => Err(problem(ErrorCode::NotFound, "there is no such resource")),
    };
    answer.unwrap_or_else(|refusal| refusal)
}

fn list(keys: &KeyStore) -> Response {
    let keys: Vec<Value> = keys.list().iter().map(|key| Value::Object(shown(key))).collect();
    json_answer(200, &json!({ "keys": keys }))
}

fn make(keys: &KeyStore, call: &Call<'_>) -> Result<Response, Response> {
    let now = clock::now().wall;
    let wanted = wanted(&call.body()?, now).map_err(|detail| problem(ErrorCode::BadRequest, detail))?;
    let (key, text) = keys.make(wanted, now, random).map_err(|error| refused(&error, "An API key was not made."))?;
    call.audit(&[("api_key", Some(key.id.as_str()))], "An administrator has made an API key.");
    let mut answer = shown(&key);
    let text = String::from_utf8_lossy(text.expose_secret()).into_owned();
    answer.insert("key".to_owned(), text.into());
    Ok(json_answer(201, &Value::Object(answer)))
}

fn delete(keys: &KeyStore, call: &Call<'_>, id: &str) -> Result<Response, Response> {
    let id = ApiKeyId::new(id).ok_or_else(|| refused(&KeysError::Missing, ""))?;
    keys.delete(&id).map_err(|error| refused(&error, "An API key was not deleted."))?;
    call.audit(&[("api_key", Some(id.as_str()))], "An administrator has deleted an API key.");
    Ok(Response::new(204))
}

/// What a request's body asks for. Errors: what is wrong with it.
fn wanted(body: &Value, now: WallTime) -> Result<Wanted, &'static str> {
    let body = body.as_object().ok_or("the body is no JSON object")?;
    // A member that is null is not there.
    let member = |name: &str| body.get(name).filter(|value| !value.is_null());
    let words = |name: &str| match member(name) {
        None => Some(Vec::new()),
        Some(value) => texts(value, is_word),
    };
    let streams = member("streams").ok_or("streams is missing: an array of stream ids or globs")?;
    let id = match member("id") {
        None => None,
        Some(id) => Some(
            id.as_str()
                .and_then(ApiKeyId::new)
                .ok_or("id must have 1 to 64 of the characters A-Z a-z 0-9 . _ : ~ -")?,
        ),
    };
    let expires = match member("expires_at") {
        None => None,
        Some(at) => {
            let at = at.as_u64().ok_or("expires_at is no integer of microseconds since the Unix epoch")?;
            Some(WallTime::from_micros(at))
        }
    };
    if expires.is_some_and(|expires| expires <= now) {
        return Err("expires_at has passed: it is in microseconds since the Unix epoch");
    }
    let rate = match member("rate") {
        None => 0,
        Some(rate) => rate.as_u64().and_then(|rate| u32::try_from(rate).ok()).ok_or("rate is no number of requests")?,
    };
    Ok(Wanted {
        id,
        streams: texts(streams, is_stream_glob)
            .filter(|streams| !streams.is_empty())
            .ok_or("streams is no array of 1 to 64 stream ids or globs")?,
        roles: words("roles").ok_or("roles is no array of at most 64 strings")?,
        permissions: words("permissions").ok_or("permissions is no array of at most 64 strings")?,
        rate,
        expires,
    })
}

/// What is shown of a key: neither itself nor its hash.
fn shown(key: &ApiKey) -> Map<String, Value> {
    let mut object = Map::new();
    let mut put = |name: &str, value: Value| drop(object.insert(name.to_owned(), value));
    put("id", key.id.as_str().into());
    put("streams", json!(key.streams));
    put("roles", json!(key.roles));
    put("permissions", json!(key.permissions));
    put("rate", key.rate.into());
    put("created_at", key.created.map(WallTime::as_micros).into());
    put("expires_at", key.expires.map(WallTime::as_micros).into());
    put("source", key.source.as_str().into());
    object
}

fn refused(error: &KeysError, sentence: &str) -> Response {
    let detail = error.to_string();
    match error {
        KeysError::Missing => problem(ErrorCode::NotFound, &detail),
        KeysError::Taken | KeysError::Configured | KeysError::TooMany => {
            Response::problem(409, ErrorCode::BadRequest.as_str(), &detail)
        }
        KeysError::State(error) => {
            log::write(LogLevel::Error, &[("error", error)], sentence);
            Response::problem(503, ErrorCode::Overloaded.as_str(), &detail).header("Retry-After", "10")
        }
        KeysError::Redis(_) | KeysError::Undeleted(_) | KeysError::Unkept { .. } => {
            log::write(LogLevel::Error, &[("error", error)], sentence);
            problem(ErrorCode::SessionStoreUnavailable, &detail).header("Retry-After", "2")
        }
    }
}

fn json_answer(status: u16, value: &Value) -> Response {
    let mut text = value.to_string();
    text.push('\n');
    Response::new(status).body("application/json", text.into_bytes())
}

#[allow(clippy::disallowed_methods, reason = "a key's chance is the operating system's")]
pub(super) fn random(bytes: &mut [u8]) -> Result<(), StateError> {
    SystemRandom::new().fill(bytes).map_err(|_| StateError::NoRandom)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: WallTime = WallTime::from_secs(1_795_350_000);

    fn read(body: &str) -> Result<Wanted, &'static str> {
        wanted(&serde_json::from_str(body).map_err(|_| "the body is no JSON")?, NOW)
    }

    #[test]
    fn a_body_says_what_the_key_is_to_be() {
        let body =
            r#"{"streams":["leads","orders:*"],"id":"dash","rate":60,"roles":["agent"],"expires_at":1795350000000001}"#;
        let key = read(body).expect("it is whole");
        assert_eq!(
            (key.streams, key.roles),
            (vec!["leads".to_owned(), "orders:*".to_owned()], vec!["agent".to_owned()])
        );
        assert_eq!((key.id.map(|id| id.to_string()).as_deref(), key.rate), (Some("dash"), 60));
        assert_eq!(key.expires, Some(WallTime::from_micros(1_795_350_000_000_001)));
        let key = read(r#"{"streams":["a"],"expires_at":null,"id":null,"unknown":1}"#).expect("the rest has defaults");
        assert!(key.id.is_none() && key.expires.is_none() && key.rate == 0 && key.permissions.is_empty());
    }

    #[test]
    fn what_is_wrong_with_a_body_is_said() {
        let many = format!(r#"{{"streams":[{}"s"]}}"#, "\"s\",".repeat(64));
        for (body, said) in [
            ("", "the body is no JSON"),
            ("[]", "the body is no JSON object"),
            ("{}", "streams is missing: an array of stream ids or globs"),
            (r#"{"streams":[]}"#, "streams is no array of 1 to 64 stream ids or globs"),
            (r#"{"streams":"leads"}"#, "streams is no array of 1 to 64 stream ids or globs"),
            (r#"{"streams":["a b"]}"#, "streams is no array of 1 to 64 stream ids or globs"),
            (&many, "streams is no array of 1 to 64 stream ids or globs"),
            (r#"{"streams":["a"],"id":"a b"}"#, "id must have 1 to 64 of the characters A-Z a-z 0-9 . _ : ~ -"),
            (r#"{"streams":["a"],"id":7}"#, "id must have 1 to 64 of the characters A-Z a-z 0-9 . _ : ~ -"),
            (r#"{"streams":["a"],"rate":-1}"#, "rate is no number of requests"),
            (r#"{"streams":["a"],"rate":4294967296}"#, "rate is no number of requests"),
            (r#"{"streams":["a"],"roles":[1]}"#, "roles is no array of at most 64 strings"),
            (r#"{"streams":["a"],"permissions":[""]}"#, "permissions is no array of at most 64 strings"),
            (r#"{"streams":["a"],"expires_at":"x"}"#, "expires_at is no integer of microseconds since the Unix epoch"),
            (r#"{"streams":["a"],"expires_at":1.5}"#, "expires_at is no integer of microseconds since the Unix epoch"),
            (
                r#"{"streams":["a"],"expires_at":1795350000}"#,
                "expires_at has passed: it is in microseconds since the Unix epoch",
            ),
            (
                r#"{"streams":["a"],"expires_at":1795350000000000}"#,
                "expires_at has passed: it is in microseconds since the Unix epoch",
            ),
        ] {
            assert_eq!(read(body).err(), Some(said), "{body}");
        }
    }
}
