//! Requests that are let in: what a stream's or action's credential puts on them, and once more where a token was refused.
//!
//! Source: RFC 6750 section 3.1 for what a 401 means, and what a 403 does not. Memory: one [`Presented`] a request.
//! Errors: `Auth` where there is no token. Not here: when a token is got (`stream::oauth`), and how (`token`).

use super::{Asked, Fetcher};
use crate::stream::credential::{Credential, Presented};
use crate::stream::oauth::Why;
use crate::stream::poll::{FetchError, FetchResult, UpstreamCode};
use crate::time::WallTime;

/// A 401: the credential is missing or no longer good. A 403 is an answer to a credential that is.
const UNAUTHORIZED: u16 = 401;

impl Fetcher {
    /// Carries out what is asked with what `credential` puts on it now. Where that is a token and the upstream answers 401,
    /// asks once more, with another one: the one there is by now, or a new one.
    pub(super) async fn let_in(
        &self,
        asked: Asked<'_>,
        credential: &Credential,
        wall: &dyn Fn() -> WallTime,
        reuse: bool,
    ) -> FetchResult {
        let Some(options) = credential.oauth() else {
            return self.with(asked, credential.presented(None), wall, reuse).await;
        };
        let tokens = self.tokens.as_ref().ok_or_else(|| without_token(&Why::Fault))?;
        let token = self.token(tokens, options, asked.timeout).await.map_err(|why| without_token(&why))?;
        let response = self.with(asked, credential.presented(Some(&token.text)), wall, reuse).await?;
        if response.status != UNAUTHORIZED {
            return Ok(response);
        }
        match self.another_token(tokens, options, asked.timeout, &token).await {
            Some(token) => self.with(asked, credential.presented(Some(&token.text)), wall, reuse).await,
            None => Ok(response),
        }
    }

    async fn with(
        &self,
        asked: Asked<'_>,
        presented: Presented,
        wall: &dyn Fn() -> WallTime,
        reuse: bool,
    ) -> FetchResult {
        self.within_time(&Asked { presented: Some(&presented), ..asked }, wall, reuse).await
    }
}

fn without_token(why: &Why) -> FetchError {
    FetchError { code: UpstreamCode::Auth, detail: format!("there is no token: {why}") }
}
