//! Requests that are let in: what a stream's or action's credential puts on them, and once more where a token was refused.
//!
//! Source: RFC 6750 section 3.1 for what a 401 means, and what a 403 does not. Memory: one [`Presented`] a request.
//! Errors: `Auth` where there is no token, or a secret is not there. Not here: when a token is got (`stream::oauth`), and how (`token`).

use std::sync::Arc;
use std::time::Duration;

use super::token::Source;
use super::{Answer, Asked, Fetcher, blocked_by_guard};
use crate::guard::Policy;
use crate::stream::credential::{Credential, Presented};
use crate::stream::oauth::Why;
use crate::stream::poll::{FetchError, FetchResult, UpstreamCode};
use crate::time::WallTime;

/// A 401: the credential is missing or no longer good. A 403 is an answer to a credential that is.
const UNAUTHORIZED: u16 = 401;

impl Fetcher {
    /// Carries out what is asked with what `credential` puts on it now; beside it who says where a token may be asked for.
    pub(super) async fn let_in(
        &self,
        asked: Asked<'_>,
        credential: (&Credential, Option<&Arc<Policy>>),
        wall: &dyn Fn() -> WallTime,
        reuse: bool,
    ) -> FetchResult {
        let send = async |presented: Presented| {
            self.within_time(&Asked { presented: Some(&presented), ..asked }, wall, reuse).await
        };
        self.present(credential, asked.timeout, send).await.map(|answer| answer.response)
    }

    /// Sends a request with what `credential` puts on it now. Where that is a token and the upstream answers 401, sends it
    /// once more, with another one: the one there is by now, or a new one, which is waited for no longer than `limit`.
    pub(super) async fn present(
        &self,
        (credential, guard): (&Credential, Option<&Arc<Policy>>),
        limit: Duration,
        mut send: impl AsyncFnMut(Presented) -> Result<Answer, FetchError>,
    ) -> Result<Answer, FetchError> {
        if let Some(lacks) = &credential.lacks {
            return Err(FetchError { code: UpstreamCode::Auth, detail: lacks.to_string() });
        }
        let Some(options) = credential.oauth() else { return send(credential.presented(None)).await };
        if let Some(policy) = guard {
            // Before others that share the token could be held up.
            policy.judge(options.token_url.as_str()).map_err(|reason| blocked_by_guard(&reason))?;
        }
        let tokens = self.tokens.as_ref().ok_or_else(|| without_token(&Why::Fault))?;
        let source = Source { tokens, options, guard, limit };
        let token = self.token(source).await.map_err(|why| without_token(&why))?;
        let answer = send(credential.presented(Some(&token.text))).await?;
        if answer.response.status != UNAUTHORIZED {
            return Ok(answer);
        }
        match self.another_token(source, &token).await {
            Some(token) => send(credential.presented(Some(&token.text))).await,
            None => Ok(answer),
        }
    }
}

fn without_token(why: &Why) -> FetchError {
    FetchError { code: UpstreamCode::Auth, detail: format!("there is no token: {why}") }
}
