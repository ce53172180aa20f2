//! `[direct]`: what callers may name themselves, and who may.
//!
//! Source: protocol version 1, section 1; `restcast.example.toml`. Memory: what is returned. Errors: each at its own line.
//! Not here: what is allowed by it (`guard`).

use std::sync::Arc;

use super::form;
use super::meaning::Check;
use super::walk::Section;
use super::{Oddity, Problem};
use crate::guard::{DirectOptions, Pattern, Policy};
use crate::limits::{ALLOW_PATTERNS_MAX, DIRECT_SECRET_BYTES_MIN};
use crate::secret::Secret;

impl Check<'_> {
    /// `[direct]`; `None`: the file has none, and direct mode is off.
    pub(super) fn direct(&mut self, root: &Section) -> Option<DirectOptions> {
        let line = root.line_of_table("direct")?;
        let allow = self.patterns(root, "direct.allow");
        let allow_public = root.boolean("direct.allow_public");
        if !allow_public && root.texts("direct.allow").is_empty() {
            self.warn(line, Oddity::DirectReachesNothing);
        }
        Some(DirectOptions {
            policy: Arc::new(Policy { allow, allow_public, cookies: root.boolean("direct.cookies"), own: false }),
            roles: root.texts("direct.roles").into_iter().map(|role| role.value).collect(),
            interval_min: root.duration("direct.interval_min"),
            sessions_per_subject: root.number_u32("direct.sessions_per_subject"),
            session_ttl_max: root.duration("direct.session_ttl_max"),
            linger: root.duration("direct.linger"),
            response_bytes_max: root.number("direct.response_bytes_max"),
            timeout: root.duration("direct.timeout"),
            secret: self.direct_secret(root),
        })
    }

    fn direct_secret(&mut self, root: &Section) -> Option<Secret> {
        let secret = root.secret("direct.secret")?;
        if secret.len() < DIRECT_SECRET_BYTES_MIN {
            self.error(root.line_of("direct.secret"), Problem::DirectSecret { bytes: secret.len() });
        }
        Some(secret)
    }

    /// Patterns of URLs.
    pub(super) fn patterns(&mut self, root: &Section, key: &'static str) -> Vec<Pattern> {
        let texts = root.texts(key);
        if texts.len() > ALLOW_PATTERNS_MAX {
            let error = form::FormError::TooMany { limit: ALLOW_PATTERNS_MAX };
            self.error(root.line_of(key), Problem::Form { key: key.to_owned(), error });
        }
        let mut patterns = Vec::new();
        for text in texts.into_iter().take(ALLOW_PATTERNS_MAX) {
            match Pattern::parse(&text.value) {
                Ok(pattern) => patterns.push(pattern),
                Err(error) => {
                    self.error(text.line, Problem::UrlPattern { key, found: form::quoted(&text.value), error });
                }
            }
        }
        patterns
    }
}
