//! Who asks an upstream for something, and what is said to whoever has to wait.
//!
//! Whoever chooses what is asked for can have it fail, or have it hang: whose words they are decides whom that concerns. The
//! breaker hears them by it (`breaker`), and rates and budgets are shared by it (`bucket`, `spending`).
//! Source: none but the configuration's own words. Memory: none. Errors: [`Wait`] is what whoever asks is told instead of leave.
//! Not here: what is waited for.

use std::time::Duration;

use crate::ids::Holder;
use crate::time::Instant;

use super::bucket::{VOICES, VoiceNo};
use super::poll::{Target, UpstreamCode};

/// Why no request may be sent now.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Wait {
    /// When there is leave, as far as is known,
    pub until: Instant,
    /// or, so that not all come at once, up to so much later.
    pub spread: Duration,
    /// It may be sooner: ask again after this time.
    pub look: Duration,
    /// Why.
    pub why: Why,
}

/// What a request waits for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Why {
    /// Its turn.
    Turn,
    /// The upstream's budget is used up.
    Spent,
    /// The origin is left alone, for it has failed: this is how it last did.
    Down(UpstreamCode, Option<u16>),
}

/// What the outcome of a poll says of its origin to others who ask there: whoever chooses what is asked for can have it fail.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) enum Voice {
    /// All that stands in the file, or was made by an administrator, down to the path and query.
    #[default]
    Operator,
    /// A caller has filled something in (`params`): no more than whether the origin can be reached.
    Chosen,
    /// That caller has described it: nothing, but to whatever else the same caller has described there.
    Caller(Option<Holder>),
}

impl Voice {
    pub(super) fn of(target: &Target) -> Voice {
        match &target.guard {
            Some(policy) if !policy.own => Voice::Caller(target.options.described_by),
            _ if !target.options.params.is_empty() => Voice::Chosen,
            _ => Voice::Operator,
        }
    }

    pub(super) fn is_caller(self) -> bool {
        matches!(self, Voice::Caller(_))
    }

    /// Which of those it is that take turns in the operator's rate.
    pub(super) fn no(self) -> VoiceNo {
        const { assert!(VOICES == 3) };
        match self {
            Voice::Operator => 0,
            Voice::Chosen => 1,
            Voice::Caller(_) => 2,
        }
    }
}
