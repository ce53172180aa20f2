//! `[auth.session]`: what it means, and what it needs besides.
//!
//! Source: protocol version 1, section 2 («Session»); RFC 6265, 6901. Memory: what is returned. Errors: each at its own line.

use super::form;
use super::meaning::Check;
use super::walk::Section;
use super::{Oddity, Problem};
use crate::auth::session::{CookieSecrets, Options, Place};
use crate::codec::pointer::Pointer;
use crate::secret::Secret;

/// A secret shorter than this is warned of.
const SECRET_BYTES: usize = 16;

impl Check<'_> {
    pub(super) fn session(&mut self, root: &Section) -> Option<Options> {
        let line = root.line_of_table("auth.session")?;
        let secrets = root.secrets("auth.session.secrets");
        // What is there and wrong has been told of.
        let wrong = secrets.is_none() && root.is_written("auth.session.secrets");
        let secrets = secrets.unwrap_or_default();
        if secrets.is_empty() && !wrong {
            self.error(line, Problem::SessionSecrets);
        }
        for secret in &secrets {
            let bytes = secret.value.secret.len();
            if bytes < SECRET_BYTES {
                self.warn(secret.line, Oddity::ShortSessionSecret { bytes });
            }
        }
        if root.line_of_table("redis").is_none() {
            self.error(line, Problem::SessionWithoutRedis);
        }
        let text = |path| root.text(path).unwrap_or_else(|| panic!("KEYS gives {path} a default"));
        let cookie = text("auth.session.cookie");
        if !form::is_token(&cookie) || cookie == text("auth.jwt.cookie") {
            self.error(root.line_of("auth.session.cookie"), Problem::SessionCookie);
        }
        let secrets: Vec<Secret> = secrets.into_iter().map(|secret| secret.value.secret).collect();
        Some(Options {
            secrets: CookieSecrets::new(&secrets),
            cookie,
            prefix: text("auth.session.prefix"),
            user: self.place(root, "auth.session.user"),
            role: self.place(root, "auth.session.role"),
            company: self.place(root, "auth.session.company"),
            permissions: self.place(root, "auth.session.permissions"),
            reread: root.duration("auth.session.reread"),
            grace: root.duration("auth.session.grace"),
            touch: root.boolean("auth.session.touch"),
        })
    }

    fn place(&mut self, root: &Section, key: &'static str) -> Place {
        let text = root.text(key).unwrap_or_else(|| panic!("KEYS gives {key} a default"));
        match Pointer::parse(&text) {
            // The whole record is nobody's id.
            Ok(pointer) if !pointer.tokens().is_empty() => Place::new(&text, pointer.tokens()),
            _ => {
                self.error(root.line_of(key), Problem::SessionPointer { key });
                Place::new("", &[])
            }
        }
    }
}
