//! `[[action]]`: messages of clients that become calls of an upstream.
//!
//! Source: protocol version 1, section 6 «Actions». Memory: what is returned, schemas compiled.
//! Errors: every one that is found. Not here: what streams have in common with actions (`meaning`).

use std::collections::BTreeMap;
use std::sync::Arc;

use super::form::{self, FormError};
use super::meaning::Check;
use super::walk::Section;
use super::{Oddity, Problem};
use crate::codec::message::ClientMessage;
use crate::ids::StreamId;
use crate::limits::{ACTION_REFRESH_MAX, ACTION_SCHEMA_BYTES_MAX, ACTION_TYPE_BYTES_MAX, ACTIONS_MAX};
use crate::stream;
use crate::stream::action::{Options, Rate};
use crate::stream::schema::Schema;
use crate::stream::template::{BodyTemplate, UrlTemplate};

impl Check<'_> {
    /// `[[action]]`, whose `refresh` may name `streams`; those with an error are left out.
    pub(super) fn actions(&mut self, root: &Section, streams: &[Arc<stream::Options>]) -> Vec<Arc<Options>> {
        let sections = root.array("action");
        if let Some(section) = sections.get(ACTIONS_MAX) {
            self.error(section.line, Problem::TooManyActions { limit: ACTIONS_MAX });
        }
        let mut actions = Vec::new();
        let mut seen: BTreeMap<String, u32> = BTreeMap::new();
        for section in sections.iter().take(ACTIONS_MAX) {
            let Some(action) = self.action(section, root, streams) else { continue };
            let line = section.line_of("action.type");
            if let Some(first_line) = seen.get(&action.kind) {
                let problem = Problem::DuplicateAction { kind: action.kind.clone(), first_line: *first_line };
                self.error(line, problem);
            } else {
                seen.insert(action.kind.clone(), line);
            }
            self.warn_of_action(section, &action);
            actions.push(Arc::new(action));
        }
        actions
    }

    fn action(&mut self, section: &Section, root: &Section, streams: &[Arc<stream::Options>]) -> Option<Options> {
        let kind = self.action_kind(section);
        let template = |error| Problem::Template { key: "action.url", error };
        let url = section.text("action.url").and_then(|text| {
            let url = UrlTemplate::parse_for_action(&text);
            url.map_err(|error| self.error(section.line_of("action.url"), template(error))).ok()
        });
        let template = |error| Problem::Template { key: "action.body", error };
        let body = section.text("action.body").and_then(|text| {
            let body = BodyTemplate::parse_for_action(&text);
            body.map_err(|error| self.error(section.line_of("action.body"), template(error))).ok()
        });
        let method = self.action_method(section);
        let (headers, elsewhere) = self.headers(section, "action.headers");
        let credential = self.action_credential(section, elsewhere, &headers);
        let ca = self.ca(section, "action.ca");
        let schema = self.schema(section);
        let rate = self.rate(section);
        let refresh = self.refresh(section, root, streams);
        let values = |path| section.texts(path).into_iter().map(|text| text.value).collect();
        Some(Options {
            kind: kind?,
            roles: values("action.roles"),
            permissions: values("action.permissions"),
            method,
            url: url?,
            headers,
            credential,
            body,
            schema,
            rate,
            refresh,
            reply_body: section.boolean("action.reply_body"),
            error_body: section.boolean("action.error_body"),
            ca,
            connect_timeout: section.duration("action.connect_timeout"),
            first_byte_timeout: section.duration("action.first_byte_timeout"),
            timeout: section.duration("action.timeout"),
            response_bytes_max: section.number("action.response_bytes_max"),
        })
    }

    fn action_kind(&mut self, section: &Section) -> Option<String> {
        let kind = section.text("action.type")?;
        let line = section.line_of("action.type");
        let may_be = |b: u8| b.is_ascii_alphanumeric() || b"._:~/-".contains(&b);
        if kind.len() > ACTION_TYPE_BYTES_MAX || !kind.bytes().all(may_be) {
            self.error(line, Problem::ActionType);
            return None;
        }
        if ClientMessage::TYPES.contains(&kind.as_str()) {
            self.error(line, Problem::ActionTypeTaken { kind });
            return None;
        }
        Some(kind)
    }

    fn action_method(&mut self, section: &Section) -> String {
        let method = section.text("action.method").expect("KEYS gives action.method a default");
        let calls = !matches!(method.as_str(), "HEAD" | "CONNECT" | "TRACE");
        if !form::is_token(&method) || method.bytes().any(|b| b.is_ascii_lowercase()) || !calls || method.len() > 32 {
            self.error(section.line_of("action.method"), Problem::ActionMethod);
        }
        method
    }

    /// `schema`: the text itself, or `file:PATH`.
    fn schema(&mut self, section: &Section) -> Option<Schema> {
        let written = section.text("action.schema")?;
        let line = section.line_of("action.schema");
        let at = |error| Problem::Form { key: "action.schema".to_owned(), error };
        let text = match written.strip_prefix("file:") {
            None => written,
            Some(path) => match self.sources.file(path, ACTION_SCHEMA_BYTES_MAX).map(String::from_utf8) {
                Ok(Ok(text)) => text,
                Ok(Err(_)) => {
                    self.error(line, Problem::SchemaNotText);
                    return None;
                }
                Err(error) => {
                    self.error(line, at(FormError::File { path: form::quoted(path), error }));
                    return None;
                }
            },
        };
        Schema::parse(&text).map_err(|error| self.error(line, Problem::Schema(error))).ok()
    }

    fn rate(&mut self, section: &Section) -> Option<Rate> {
        let text = section.text("action.rate")?;
        let rate = Rate::parse(&text);
        if rate.is_none() {
            self.error(section.line_of("action.rate"), Problem::ActionRate);
        }
        rate
    }

    fn refresh(&mut self, section: &Section, root: &Section, streams: &[Arc<stream::Options>]) -> Vec<StreamId> {
        let texts = section.texts("action.refresh");
        if texts.len() > ACTION_REFRESH_MAX {
            let error = FormError::TooMany { limit: ACTION_REFRESH_MAX };
            self.error(section.line_of("action.refresh"), Problem::Form { key: "action.refresh".to_owned(), error });
        }
        let mut ids: Vec<StreamId> = Vec::new();
        let may_be_made = root.is_written("admin.key") || root.is_written("redis.url");
        for text in texts.into_iter().take(ACTION_REFRESH_MAX) {
            let known = streams.iter().find(|stream| stream.id.as_str() == text.value);
            // One that is left out for errors of its own is named all the same.
            let is_written =
                || root.array("stream").iter().any(|it| it.text("stream.id").as_ref() == Some(&text.value));
            match known {
                Some(stream) if !ids.contains(&stream.id) => ids.push(stream.id.clone()),
                Some(_) => {}
                None if is_written() => {}
                // Streams may come and go by the admin API, at this process or at another.
                None if may_be_made && let Some(id) = StreamId::new(&text.value) => {
                    self.warn(text.line, Oddity::ActionRefreshUnknown { id: form::quoted(&text.value) });
                    if !ids.contains(&id) {
                        ids.push(id);
                    }
                }
                None => self.error(text.line, Problem::ActionRefresh { id: form::quoted(&text.value) }),
            }
        }
        ids
    }

    fn warn_of_action(&mut self, section: &Section, action: &Options) {
        let kind = &action.kind;
        // RFC 9110 section 9.3.1: content in a GET has no defined meaning.
        if action.body.is_some() && action.method == "GET" {
            let oddity = Oddity::ActionBodyWithGet { kind: kind.clone() };
            self.warn(section.line_of("action.body"), oddity);
        }
        self.warn_of_action_credential(section, &action.credential);
        let parts = [
            ("connect_timeout", "action.connect_timeout", action.connect_timeout),
            ("first_byte_timeout", "action.first_byte_timeout", action.first_byte_timeout),
        ];
        for (key, path, part) in parts {
            if part > action.timeout {
                self.warn(section.line_of(path), Oddity::ActionTimeoutUnreachable { kind: kind.clone(), key });
            }
        }
        if action.ca.is_some() && action.url.to_string().starts_with("http://") {
            self.warn(section.line_of("action.ca"), Oddity::ActionCaWithoutTls { kind: kind.clone() });
        }
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use crate::config::tests::{accepted, check, parse};

    #[test]
    fn what_is_wrong_with_actions_is_told_at_once() {
        check(
            r#"
[[stream]]
id = "leads"
url = "https://h/{bad"
[[stream]]
id = "public"
url = "https://h/"
allow_anonymous = true
[[action]]
type = "subscribe"
url = "https://h/{query.x}"
[[action]]
type = "a b"
url = "https://{message.host}/"
body = "\"{message.x}\""
[[action]]
type = "a"
method = "put"
url = "https://h/{message.a..b}"
schema = "{"
rate = "fast"
refresh = ["leads", "public", "nope"]
headers = { Host = "x", A = "{message.a}", "b c" = "d" }
ca = "cert.pem"
[[action]]
type = "a"
method = "HEAD"
url = "https://h/{claims.a}/{message.b}"
[[action]]
type = "a"
url = "https://h/"
schema = "file:latin1.json"
[[action]]
url = "https://h/"
schema = "file:nope.json"
response_bytes_max = "5MiB"
[[action]]
type = "b"
url = "https://h/"
schema = '{"type":"nothing"}'
shema = "{}"
"#,
            expect![[r#"
            line 4: `stream.url`: `{` and `}` may only stand in {claims.NAME}, {query.NAME} (of a stream) and {message.NAME} (of an action): write %7B and %7D for the characters themselves
            line 10: `action.type` "subscribe" is a message of the protocol itself: use another
            line 11: `action.url`: `{` and `}` may only stand in {claims.NAME}, {query.NAME} (of a stream) and {message.NAME} (of an action): write %7B and %7D for the characters themselves
            line 13: `action.type` must have 1 to 64 of the characters A-Z a-z 0-9 . _ : ~ / -
            line 14: `action.url`: {message.host} may only stand in a path segment or a query value, not in the scheme, host, port, user, query name or fragment
            line 15: `action.body`: {message.x} stands inside a JSON string: it must stand alone where a JSON value may, without quotes around it
            line 18: `action.method` must be a method whose answer has a body, in upper case, such as PUT or POST
            line 19: `action.url`: a placeholder's NAME must have 1 to 128 bytes and no brace, white space or control character; that of a message, names between dots
            line 20: `action.schema` is not JSON: EOF while parsing an object at line 1 column 1
            line 21: `action.rate` must be a count for each second, minute or hour, such as "5/s", "100/m" or "1000/h"
            line 22: `action.refresh` names "nope", which is no [[stream]], nor one that the admin API could make: that takes an id, and `admin.key`
            line 23: `action.headers.Host` is set by restcast itself and cannot be configured
            line 23: `action.headers.A` has a placeholder: they may stand in `url` and `body` only
            line 23: `action.headers` has a name that is no header name: use letters, digits and `-`
            line 24: `action.ca` names a file without a PEM certificate
            line 27: `action.method` must be a method whose answer has a body, in upper case, such as PUT or POST
            line 30: `action.type` "a" is taken by the action of line 26
            line 32: `action.schema` names a file that is not UTF-8
            line 33: `action.type` is missing here
            line 35: `action.schema`: the file "nope.json" does not exist
            line 36: `action.response_bytes_max`: must be from 1 to 4194304 bytes
            line 40: `action.schema` is not a JSON Schema: schema:action# is not valid against metaschema: jsonschema validation failed with https://json-schema.org/draft/2020-12/schema# - at '/type': anyOf failed   - at '/type': value must be one of 'array',…
            line 41: unknown key `action.shema`; the nearest known one is `action.schema`
        "#]],
        );
    }

    #[test]
    fn what_works_in_actions_and_is_likely_not_meant_is_a_warning() {
        check(
            r#"
[[action]]
type = "look"
method = "GET"
url = "http://h/"
body = "{}"
timeout = "1s"
ca = "ca.pem"
"#,
            expect![[r#"
            warning line 2: action "look": `connect_timeout` is over `timeout`, which ends the exchange before
            warning line 2: action "look": `first_byte_timeout` is over `timeout`, which ends the exchange before
            warning line 6: action "look": a `body` with GET is ignored or refused by many servers
            warning line 8: action "look": `ca` has no effect with an http:// URL
        "#]],
        );
    }

    #[test]
    fn an_action_may_refresh_a_stream_that_the_admin_api_makes() {
        let action = |refresh: &str| format!("[[action]]\ntype = \"a\"\nurl = \"https://h/\"\nrefresh = {refresh}\n");
        let admin = "[admin]\nkey = \"a-key-of-some-thirty-two-random-bytes\"\n";
        check(
            &format!("{admin}{}", action(r#"["made", "made", "no id"]"#)),
            expect![[r#"
                line 6: `action.refresh` names "no id", which is no [[stream]], nor one that the admin API could make: that takes an id, and `admin.key`
            "#]],
        );
        let config = accepted(&format!("{admin}{}", action(r#"["made", "made"]"#)));
        let ids: Vec<&str> = config.actions[0].refresh.iter().map(|id| id.as_str()).collect();
        assert_eq!(ids, ["made"]);
        check(
            &format!("{admin}{}", action(r#"["made"]"#)),
            expect![[r#"
                warning line 6: `action.refresh` names "made", which is no [[stream]] of the file: it is polled while the admin API has made one
            "#]],
        );
    }

    #[test]
    fn actions_and_what_they_refresh_have_their_bounds() {
        let action = |n: usize| format!("[[action]]\ntype = \"a{n}\"\nurl = \"https://h/\"\n");
        let many = |count: usize| (0..count).map(action).collect::<String>();
        assert_eq!(accepted(&many(256)).actions.len(), 256);
        check(
            &many(257),
            expect![[r#"
        line 769: [[action]] stands there more than 256 times
    "#]],
        );
        let named = |bytes: usize| format!("[[action]]\ntype = \"{}\"\nurl = \"https://h/\"\n", "a".repeat(bytes));
        assert_eq!(accepted(&named(64)).actions.len(), 1);
        assert!(parse(&named(65)).is_err());
        let streams: String = (0..17)
            .map(|n| format!("[[stream]]\nid = \"s{n}\"\nurl = \"https://h/\"\nallow_anonymous = true\n"))
            .collect();
        let refresh = |count: usize| {
            let ids: Vec<String> = (0..count).map(|n| format!("\"s{n}\"")).collect();
            format!("{streams}{}refresh = [{}]\n", action(0), ids.join(","))
        };
        assert_eq!(accepted(&refresh(16)).actions[0].refresh.len(), 16);
        assert!(parse(&refresh(17)).is_err());
    }
}
