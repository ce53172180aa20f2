//! Tokens for upstreams, got: who has begun it asks the endpoint, everybody else waits for that.
//!
//! Source: RFC 6749 sections 4.4 and 6. Memory: one task a credential whose token is being got.
//! Errors: [`Why`]. Not here: when a token is got (`stream::oauth`), what is kept (`runtime::oauth`).

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

use monoio::time::{sleep, timeout};

use super::{Fetcher, TokenAsked};
use crate::config::LogLevel;
use crate::guard::Policy;
use crate::limits;
use crate::metrics::TokenFetch;
use crate::runtime::guarded::Guarded;
use crate::runtime::oauth::{Asked, Outcome, Taken, Tokens, Turn, Underway, Write};
use crate::runtime::{clock, log};
use crate::stream::oauth::{self, Ask, Granted, Options, Renewal, Token, Why};
use crate::time::Instant;

/// Where a token comes from.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    /// Who keeps them all.
    pub(super) tokens: &'a Arc<Tokens>,
    /// Its endpoint, and what that is asked.
    pub(super) options: &'a Arc<Options>,
    /// Who says whether the endpoint may be connected to, where it does not stand in the operator's file.
    pub(super) guard: Option<&'a Arc<Policy>>,
    /// The longest that a token is waited for.
    pub(super) limit: Duration,
}

/// Refresh tokens that a core exchanges just now, and who waits until there are none.
#[derive(Default)]
pub(super) struct Exchanges {
    count: Cell<usize>,
    waiting: RefCell<Option<Waker>>,
}

/// One of them, while it goes on.
struct Exchange(Rc<Exchanges>);

impl Exchange {
    fn begun(exchanges: &Rc<Exchanges>) -> Exchange {
        exchanges.count.update(|count| count + 1);
        Exchange(Rc::clone(exchanges))
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.0.count.update(|count| count - 1);
        if self.0.count.get() == 0
            && let Some(waker) = self.0.waiting.take()
        {
            waker.wake();
        }
    }
}

impl Fetcher {
    /// Waits until no refresh token is being exchanged, at most `limit`.
    pub async fn exchanges_end(&self, limit: Duration) {
        let ended = poll_fn(|cx| {
            if self.exchanges.count.get() == 0 {
                return Poll::Ready(());
            }
            self.exchanges.waiting.replace(Some(cx.waker().clone()));
            Poll::Pending
        });
        let _ = timeout(limit, ended).await;
    }

    /// The token to ask an upstream with: the one there is, or one that is got now, which is waited for.
    ///
    /// # Errors
    /// [`Why`] there is none.
    pub(super) async fn token(&self, source: Source<'_>) -> Outcome {
        self.asked(source, |renewal, now| renewal.ask(now)).await
    }

    /// Another token than `used`, which an upstream has refused; `None`: there is none, and the refusal stands.
    pub(super) async fn another_token(&self, source: Source<'_>, used: &Token) -> Option<Token> {
        let refused = |renewal: &mut Renewal, now| renewal.refused(now, used.generation);
        self.asked(source, refused).await.ok().filter(|token| token != used)
    }

    async fn asked(&self, source: Source<'_>, ask: impl FnOnce(&mut Renewal, Instant) -> Ask) -> Outcome {
        let Source { tokens, options, guard, limit } = source;
        let (flight, begun) = match Tokens::ask(tokens, options, ask) {
            Asked::Answered(outcome) => return outcome,
            Asked::AnsweredAndBegun(token, begun) => {
                self.take_off(begun, guard);
                return Ok(token);
            }
            Asked::Waits(flight, begun) => (flight, begun),
        };
        begun.into_iter().for_each(|begun| self.take_off(begun, guard));
        match timeout(limit.min(limits::OAUTH_WAIT), self.resolver.landing(flight)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Why::Slow),
        }
    }

    /// Carries a renewal out in a task of its own: who has begun it need not be there to its end.
    fn take_off(&self, begun: Underway, guard: Option<&Arc<Policy>>) {
        let (fetcher, metrics, guard) = (self.clone(), self.metrics.clone(), guard.cloned());
        monoio::spawn(async move {
            if Guarded(Box::pin(fetcher.fly(begun, guard))).await.is_none()
                && let Some(metrics) = metrics
            {
                metrics.panics.count();
            }
        });
    }

    async fn fly(self, begun: Underway, guard: Option<Arc<Policy>>) {
        let result = self.renewed(begun.tokens(), begun.options(), guard.as_deref()).await;
        if let Some(metrics) = &self.metrics {
            let ended = match &result {
                Ok(_) => TokenFetch::Ok,
                Err((Why::Refused { .. }, _)) => TokenFetch::Refused,
                Err(_) => TokenFetch::Failed,
            };
            metrics.token_fetches.of(ended).count();
        }
        begun.land(result.as_ref().map_err(Clone::clone));
    }

    /// Asks the endpoint, with one refresh token after the other where there are several, and keeps what it gives.
    async fn renewed(
        &self,
        tokens: &Arc<Tokens>,
        options: &Options,
        guard: Option<&Policy>,
    ) -> Result<Granted, (Why, Option<Duration>)> {
        // To the end: what is given has to be kept before the next one looks.
        let taken = self.turn(tokens, options).await;
        let _exchange = taken.is_some().then(|| Exchange::begun(&self.exchanges));
        let result = self.exchanged(tokens, options, guard).await;
        taken.into_iter().for_each(Taken::over);
        result
    }

    /// The same, in the turn that was taken where there is one to take.
    async fn exchanged(
        &self,
        tokens: &Arc<Tokens>,
        options: &Options,
        guard: Option<&Policy>,
    ) -> Result<Granted, (Why, Option<Duration>)> {
        let mut tries = tokens.refresh_tokens(options);
        if tries.iter().any(Option::is_some) {
            // What could not be written when it was given is to be on the disk before it is used up.
            self.write(tokens).await;
        }
        tries.reverse();
        loop {
            let Some(refresh_token) = tries.pop() else { return Err((Why::Fault, None)) };
            let request = options.request(refresh_token.as_ref());
            let asked = TokenAsked { options, guard, request: &request };
            let response = self.ask_token(asked, || clock::now().wall).await;
            let response =
                response.map_err(|error| (Why::Unanswered { code: error.code, detail: error.detail }, None))?;
            match oauth::read(response.status, &response.body) {
                Ok(granted) => {
                    if let Some(used) = refresh_token {
                        tokens.keep(options, granted.refresh_token.as_ref().unwrap_or(&used));
                        self.write(tokens).await;
                    }
                    return Ok(granted);
                }
                Err(why) if why.is_of_refresh_token() && !tries.is_empty() => {
                    let endpoint = options.token_url.origin().ascii_serialization();
                    let sentence = "The token endpoint refuses a refresh token; the other one is tried.";
                    log::write(LogLevel::Warn, &[("endpoint", &endpoint)], sentence);
                    // It is another request for a token: as far apart from the one before as any two.
                    sleep(limits::OAUTH_SPACING).await;
                    tokens.asked_again(options);
                }
                Err(why) => return Err((why, response.retry_after)),
            }
        }
    }

    /// Waits for the turn to use the credential's refresh token, where it has one.
    async fn turn(&self, tokens: &Arc<Tokens>, options: &Options) -> Option<Taken> {
        loop {
            match Tokens::turn(tokens, options) {
                Turn::Unneeded => return None,
                Turn::Taken(taken) => return Some(taken),
                Turn::After(flight) => self.resolver.landing(flight).await,
            }
        }
    }

    /// Has the refresh tokens put into the state file, on a thread for files, and waits for it. Where they cannot be written,
    /// that is tried again from now on, and not waited for.
    async fn write(&self, tokens: &Arc<Tokens>) {
        self.written(tokens).await;
        if tokens.is_to_retry() {
            let (fetcher, tokens) = (self.clone(), Arc::clone(tokens));
            monoio::spawn(async move {
                while let Some(wait) = tokens.retries_in() {
                    sleep(wait).await;
                    fetcher.written(&tokens).await;
                }
            });
        }
    }

    /// Waits until all that the state file lacks now is written, or could not be.
    async fn written(&self, tokens: &Arc<Tokens>) {
        let Some(lacks) = tokens.unwritten() else { return };
        loop {
            match Tokens::write(tokens, lacks) {
                Write::Done => return,
                Write::After(flight) => self.resolver.landing(flight).await,
                // Where there is no thread it is dropped, which says so.
                Write::Begun(writing) => drop(self.resolver.run(move || writing.run())),
            }
        }
    }
}
