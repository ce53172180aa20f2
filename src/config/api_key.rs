//! `[[auth.api_key]]`: keys that the file knows by their hashes.
//!
//! Source: protocol version 1, section 2. Memory: what is returned. Errors: every one that is found.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Problem;
use super::form::FormError;
use super::meaning::Check;
use super::walk::{Lined, Section};
use crate::auth::api_key::{ApiKey, ApiKeyId, HashError, KeyHash, Source, is_stream_glob};
use crate::limits::{API_KEY_LIST_MAX, STREAM_GLOB_BYTES_MAX};

impl Check<'_> {
    /// The file's keys; those with an error are left out.
    pub(super) fn api_keys(&mut self, root: &Section) -> Vec<Arc<ApiKey>> {
        let mut keys = Vec::new();
        let mut seen: BTreeMap<ApiKeyId, u32> = BTreeMap::new();
        for section in root.array("auth.api_key") {
            let Some(key) = self.api_key(section) else { continue };
            let line = section.line_of("auth.api_key.id");
            match seen.get(&key.id) {
                Some(&first_line) => {
                    self.error(line, Problem::DuplicateApiKey { id: key.id.to_string(), first_line });
                }
                None => drop(seen.insert(key.id.clone(), line)),
            }
            keys.push(Arc::new(key));
        }
        keys
    }

    fn api_key(&mut self, section: &Section) -> Option<ApiKey> {
        let id = section.text("auth.api_key.id").and_then(|text| {
            let id = ApiKeyId::new(&text);
            if id.is_none() {
                self.error(section.line_of("auth.api_key.id"), Problem::ApiKeyId);
            }
            id
        });
        let hash = section.secret("auth.api_key.hash").and_then(|text| {
            let text = std::str::from_utf8(text.expose_secret()).map_err(|_| HashError);
            text.and_then(KeyHash::parse)
                .map_err(|error| self.error(section.line_of("auth.api_key.hash"), Problem::ApiKeyHash(error)))
                .ok()
        });
        let mut streams = Vec::new();
        for Lined { line, value } in self.few(section, "auth.api_key.streams") {
            if is_stream_glob(&value) {
                streams.push(value);
            } else {
                self.error(line, Problem::ApiKeyStream);
            }
        }
        if section.is_written("auth.api_key.streams") && section.texts("auth.api_key.streams").is_empty() {
            let problem = Problem::Form { key: "auth.api_key.streams".to_owned(), error: FormError::Empty };
            self.error(section.line_of("auth.api_key.streams"), problem);
        }
        let roles = self.words(section, "auth.api_key.roles");
        let permissions = self.words(section, "auth.api_key.permissions");
        Some(ApiKey {
            id: id?,
            hash: hash?,
            streams,
            roles,
            permissions,
            rate: section.number_u32("auth.api_key.rate"),
            created: None,
            expires: section.moment("auth.api_key.expires"),
            source: Source::File,
        })
    }

    /// Roles or permissions.
    fn words(&mut self, section: &Section, path: &'static str) -> Vec<String> {
        let mut words = Vec::new();
        for Lined { line, value } in self.few(section, path) {
            if value.len() <= STREAM_GLOB_BYTES_MAX {
                words.push(value);
            } else {
                let error = FormError::TooLong { limit: STREAM_GLOB_BYTES_MAX };
                self.error(line, Problem::Form { key: path.to_owned(), error });
            }
        }
        words
    }

    /// The texts of a key that may have some few.
    fn few(&mut self, section: &Section, path: &'static str) -> Vec<Lined<String>> {
        let texts = section.texts(path);
        if texts.len() > API_KEY_LIST_MAX {
            let error = FormError::TooMany { limit: API_KEY_LIST_MAX };
            self.error(section.line_of(path), Problem::Form { key: path.to_owned(), error });
        }
        texts
    }
}
