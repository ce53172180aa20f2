//! Orders about users, tokens and connections: `/admin/v1/users`, `/admin/v1/tokens`, `/admin/v1/connections`.
//!
//! Source: protocol version 1, section 6. Memory: one request's.
//! Errors: problem documents. Each order that is carried out leaves a line in the log: who, whom, why.
//! Not here: the list of connections (`connections`).

use serde::Deserialize;

use crate::auth::control::ControlEntry;
use crate::auth::jwt::DATE_SECS_MAX;
use crate::codec::http::Response;
use crate::codec::message::ErrorCode;
use crate::secret::Secret;

use super::admin_call::{Call, not_allowed, problem};
use super::control::Control;
use super::core::Process;
use super::{clock, connections};

/// The body of a logout. It may be left out.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Logout {
    iss: Option<String>,
    reason: Option<String>,
}

/// The body of changed permissions.
#[derive(Deserialize)]
struct Permissions {
    permissions: Option<Vec<String>>,
    roles: Option<Vec<String>>,
    iss: Option<String>,
    reason: Option<String>,
}

/// The body of a revocation: of one token, or of a user's from before a time.
#[derive(Deserialize)]
struct Revocation {
    jti: Option<String>,
    exp: Option<f64>,
    sub: Option<String>,
    iat_before: Option<f64>,
    iss: Option<String>,
    reason: Option<String>,
}

/// Whom such orders are given to.
#[derive(Clone, Copy)]
pub struct Users<'u> {
    /// Who carries out logouts, revocations and changed permissions.
    pub control: &'u Control,
    /// Whose cores know the connections.
    pub process: &'u Process,
    /// The admin key, which has been presented.
    pub key: Option<&'u Secret>,
}

/// Answers a call whose path is `path`, if it is one of these.
pub fn answer(users: Users<'_>, call: &Call<'_>, path: &[&str]) -> Option<Response> {
    let answer = match (path, call.method) {
        (["connections"], "GET" | "HEAD") => connections::answer(users.process, users.key, call),
        (["connections"], _) => return Some(not_allowed("GET, HEAD")),
        (["users", sub, "logout"], "POST") => log_out(users, call, sub),
        (["users", _, "logout"], _) => return Some(not_allowed("POST")),
        (["users", sub, "permissions"], "PUT") => change_permissions(users, call, sub),
        (["users", _, "permissions"], _) => return Some(not_allowed("PUT")),
        (["tokens", "revoke"], "POST") => revoke(users, call),
        (["tokens", "revoke"], _) => return Some(not_allowed("POST")),
        _ => return None,
    };
    Some(answer.unwrap_or_else(|refusal| refusal))
}

fn log_out(users: Users<'_>, call: &Call<'_>, sub: &str) -> Result<Response, Response> {
    let order: Logout = if call.body.is_empty() { Logout::default() } else { call.body()? };
    carry_out(users, ControlEntry::user_logged_out(sub, order.iss.as_deref(), clock::now().wall))?;
    call.audit(&[("sub", Some(sub)), ("iss", order.iss.as_deref()), ("why", order.reason.as_deref())], {
        "An administrator has logged a user out."
    });
    Ok(done())
}

fn change_permissions(users: Users<'_>, call: &Call<'_>, sub: &str) -> Result<Response, Response> {
    let order: Permissions = call.body()?;
    let list = |texts: &Option<Vec<String>>| texts.as_ref().map(|texts| texts.join(","));
    let (permissions, roles) = (list(&order.permissions), list(&order.roles));
    let now = clock::now().wall;
    carry_out(
        users,
        ControlEntry::permissions_changed(sub, order.iss.as_deref(), order.permissions, order.roles, now),
    )?;
    let fields = [
        ("sub", Some(sub)),
        ("iss", order.iss.as_deref()),
        ("permissions", permissions.as_deref()),
        ("roles", roles.as_deref()),
        ("why", order.reason.as_deref()),
    ];
    call.audit(&fields, "An administrator has changed a user's permissions.");
    Ok(done())
}

fn revoke(users: Users<'_>, call: &Call<'_>) -> Result<Response, Response> {
    let order: Revocation = call.body()?;
    let now = clock::now().wall;
    let iss = order.iss.as_deref();
    let entry = match (&order.jti, &order.sub, order.iat_before) {
        (Some(jti), None, None) => {
            ControlEntry::token_revoked(jti, order.exp.map(|exp| seconds("exp", exp)).transpose()?, iss, now)
        }
        (None, Some(sub), Some(before)) => {
            ControlEntry::issued_before_revoked(sub, seconds("iat_before", before)?, iss, now)
        }
        _ => return Err(problem(ErrorCode::BadRequest, "the body has either jti, or sub and iat_before")),
    };
    carry_out(users, entry)?;
    let before = order.iat_before.map(|before| before.to_string());
    let fields = [
        ("sub", order.sub.as_deref()),
        ("iat_before", before.as_deref()),
        ("jti", order.jti.as_deref()),
        ("iss", iss),
        ("why", order.reason.as_deref()),
    ];
    call.audit(&fields, "An administrator has revoked tokens.");
    Ok(done())
}

/// Whole seconds, rounded up: so that nothing less is revoked than was asked for.
fn seconds(member: &str, seconds: f64) -> Result<u64, Response> {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "the range is looked at, and in it every whole second is a number of both types"
    )]
    if (0.0..=DATE_SECS_MAX as f64).contains(&seconds) {
        Ok(seconds.ceil() as u64)
    } else {
        Err(problem(ErrorCode::BadRequest, &format!("{member} is a date from 1970 to 9999 in seconds")))
    }
}

/// The order is in force when this returns, for all who come; those who are there are being told.
fn carry_out(users: Users<'_>, entry: ControlEntry) -> Result<(), Response> {
    users.control.ask(entry).map_err(|error| problem(ErrorCode::BadRequest, &format!("the order: {error}")))
}

fn done() -> Response {
    Response::new(200).body("application/json", &b"{\"status\":\"ok\"}\n"[..])
}
