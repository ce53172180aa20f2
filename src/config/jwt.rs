//! `[[auth.jwt.key]]` and `[[auth.jwt.jwks]]`: the keys that verify tokens.
//!
//! Source: protocol version 1, section 2; RFC 7518 section 3 for keys' lengths, RFC 8725 sections 2.1, 3.8 and 3.9.
//! Memory: what is returned. Errors: the operator's, each with its line; none holds a part of a key.
//! Not here: what keys are (`auth::keys`, `auth::public_key`), fetching (`runtime::jwks`).

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use url::{Host, Url};

use super::form::{self, FormError};
use super::meaning::{Check, Keys};
use super::walk::Section;
use super::{Oddity, Problem};
use crate::auth::jwks::{self, IssuerOptions, KeySource};
use crate::auth::keys::{Algorithm, Key, KeyConfig, KeyError, KeySet};
use crate::auth::public_key::PublicKey;
use crate::limits::{ISSUERS_MAX, JWKS_BYTES_MAX};
use crate::secret::Secret;
use crate::stream::CaFile;

/// One `[[auth.jwt.key]]`.
#[derive(Clone, Debug)]
pub struct JwtKey {
    /// Its id, if it has one.
    pub kid: Option<String>,
    /// What it is for.
    pub alg: Algorithm,
    /// The key itself.
    pub material: KeyMaterial,
}

/// What a configured key verifies with.
#[derive(Clone, Debug)]
pub enum KeyMaterial {
    /// `secret`, at least as long as the hash's output.
    Secret(Secret),
    /// `public_key`.
    PublicKey(PublicKey),
}

/// One `[[auth.jwt.jwks]]`: where an issuer's key set comes from.
#[derive(Clone, Debug)]
pub struct KeySetSource {
    /// The issuer.
    pub issuer: String,
    /// The place.
    pub place: KeySetPlace,
}

/// Where a key set is.
#[derive(Clone)]
pub enum KeySetPlace {
    /// It is fetched.
    Url {
        /// From here: `https`, or `http` on this machine.
        url: Url,
        /// Roots to trust instead of the system's.
        ca: Option<CaFile>,
    },
    /// It was read with the configuration.
    File {
        /// The file's path.
        path: String,
    },
}

impl fmt::Debug for KeySetPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // Not its query, which may hold what only this server is to know.
            KeySetPlace::Url { url, .. } => f.debug_tuple("Url").field(&url.origin().ascii_serialization()).finish(),
            KeySetPlace::File { path } => f.debug_tuple("File").field(path).finish(),
        }
    }
}

impl Check<'_> {
    pub(super) fn jwt_keys(&mut self, root: &Section) -> Keys {
        let mut keys = Keys::default();
        let mut prepared = Vec::new();
        let mut seen: BTreeMap<(String, Algorithm), u32> = BTreeMap::new();
        for section in root.array("auth.jwt.key") {
            let Some((written, key)) = self.jwt_key(section) else { continue };
            // Several keys without `kid` are a rotation: each is tried.
            if let Some(kid) = &written.kid
                && let Some(first_line) = seen.insert((kid.clone(), written.alg), section.line)
            {
                self.error(section.line, Problem::DuplicateKey { first_line });
                continue;
            }
            keys.written.push(written);
            prepared.push(key);
        }
        match KeySet::of(prepared) {
            Ok(set) => keys.prepared = set,
            Err(error) => {
                let line = root.array("auth.jwt.key").first().map_or(1, |section| section.line);
                self.error(line, Problem::Key(error));
            }
        }
        self.key_sets(root, &mut keys);
        keys
    }

    fn jwt_key(&mut self, section: &Section) -> Option<(JwtKey, Key)> {
        let kid = section.text("auth.jwt.key.kid");
        let alg: Algorithm = section.text("auth.jwt.key.alg")?.parse().ok()?;
        let (secret_line, public_line) =
            (section.line_of("auth.jwt.key.secret"), section.line_of("auth.jwt.key.public_key"));
        let secret = section.secret("auth.jwt.key.secret");
        let document = section.secret("auth.jwt.key.public_key");
        let (key, wanted) = match (alg.is_symmetric(), &secret, &document) {
            (true, _, Some(_)) => {
                self.error(public_line, Problem::PublicKeyWithSecretAlg { alg: alg.to_string() });
                return None;
            }
            (false, Some(_), _) => {
                self.error(secret_line, Problem::SecretWithPublicAlg { alg: alg.to_string() });
                return None;
            }
            (true, Some(secret), None) => {
                let config = KeyConfig { kid: kid.clone(), algorithm: alg, secret: secret.clone() };
                let key = Key::new(&config).map_err(|error| self.error(secret_line, secret_problem(error)));
                (key, KeyMaterial::Secret(secret.clone()))
            }
            (false, None, Some(document)) => {
                let public_key = PublicKey::read(document.expose_secret());
                let public_key = public_key.map_err(|error| self.error(public_line, Problem::PublicKey(error))).ok()?;
                let key = Key::public("", kid.as_deref(), alg, &public_key);
                let key = key.map_err(|error| self.error(public_line, Problem::Key(error)));
                (key, KeyMaterial::PublicKey(public_key))
            }
            (symmetric, None, None) => {
                let key = if symmetric { "auth.jwt.key.secret" } else { "auth.jwt.key.public_key" };
                // Where it stands there and is wrong, that has been told.
                if !section.is_written(key) {
                    self.error(section.line, Problem::Missing { key });
                }
                return None;
            }
        };
        Some((JwtKey { kid, alg, material: wanted }, key.ok()?))
    }

    fn key_sets(&mut self, root: &Section, keys: &mut Keys) {
        let sections = root.array("auth.jwt.jwks");
        if let Some(section) = sections.get(ISSUERS_MAX) {
            self.error(section.line, Problem::TooManyIssuers { limit: ISSUERS_MAX });
        }
        let mut seen: BTreeMap<String, u32> = BTreeMap::new();
        for section in sections.iter().take(ISSUERS_MAX) {
            let Some((issuer, source)) = self.key_set(section) else { continue };
            if let Some(&first_line) = seen.get(&issuer.issuer) {
                self.error(section.line_of("auth.jwt.jwks.issuer"), Problem::DuplicateIssuer { first_line });
                continue;
            }
            seen.insert(issuer.issuer.clone(), section.line);
            if issuer.audiences.is_empty() {
                self.warn(section.line, Oddity::KeySetWithoutAudience { issuer: issuer.issuer.clone() });
            }
            keys.issuers.push(issuer);
            keys.key_sets.push(source);
        }
        for issuer in root.texts("auth.jwt.issuer") {
            if seen.contains_key(&issuer.value) {
                self.warn(issuer.line, Oddity::IssuerHasKeySet { issuer: issuer.value });
            }
        }
    }

    fn key_set(&mut self, section: &Section) -> Option<(IssuerOptions, KeySetSource)> {
        let issuer = section.text("auth.jwt.jwks.issuer");
        let algorithms = self.key_set_algorithms(section);
        let audiences = section.texts("auth.jwt.jwks.audience").into_iter().map(|text| text.value).collect();
        let (url, file) = (section.text("auth.jwt.jwks.url"), section.text("auth.jwt.jwks.file"));
        let ca = self.ca(section, "auth.jwt.jwks.ca");
        let issuer = issuer?;
        let (place, keys) = match (url, file) {
            (Some(url), None) => {
                let line = section.line_of("auth.jwt.jwks.url");
                let url = key_set_url(&url).map_err(|why| self.error(line, Problem::KeySetUrl { why })).ok()?;
                if ca.is_some() && url.scheme() == "http" {
                    self.warn(section.line, Oddity::KeySetCaWithoutTls { issuer: issuer.clone() });
                }
                (KeySetPlace::Url { url, ca }, None)
            }
            (None, Some(path)) => {
                if ca.is_some() {
                    self.warn(section.line, Oddity::KeySetCaWithoutTls { issuer: issuer.clone() });
                }
                let keys = self.key_set_file(section, &issuer, &path, &algorithms)?;
                (KeySetPlace::File { path }, Some(keys))
            }
            (url, _) => {
                // One that stands there and is wrong has been told of.
                if !["auth.jwt.jwks.url", "auth.jwt.jwks.file"].iter().any(|key| section.is_written(key))
                    || url.is_some()
                {
                    let found = if url.is_some() { "both" } else { "none" };
                    self.error(section.line, Problem::KeySetPlace { found });
                }
                return None;
            }
        };
        let fetched_from = match &place {
            KeySetPlace::Url { url, ca } => {
                KeySource { url: url.as_str().into(), ca: ca.as_ref().map(|ca| Arc::clone(&ca.pem)) }
            }
            KeySetPlace::File { .. } => KeySource::default(),
        };
        let source = KeySetSource { issuer: issuer.clone(), place };
        Some((IssuerOptions { issuer, algorithms, audiences, keys, source: fetched_from }, source))
    }

    fn key_set_algorithms(&mut self, section: &Section) -> Vec<Algorithm> {
        let mut algorithms = Vec::new();
        let texts = section.texts("auth.jwt.jwks.algs");
        if texts.is_empty() {
            let found = "none".to_owned();
            self.error(section.line_of("auth.jwt.jwks.algs"), Problem::KeySetAlg { found });
        }
        for text in texts {
            // RFC 8725 2.1: a set is public, so that nothing in it is a secret to share.
            match text.value.parse::<Algorithm>().ok().filter(|algorithm| !algorithm.is_symmetric()) {
                Some(algorithm) if algorithms.contains(&algorithm) => {}
                Some(algorithm) => algorithms.push(algorithm),
                None => self.error(text.line, Problem::KeySetAlg { found: form::quoted(&text.value) }),
            }
        }
        algorithms
    }

    fn key_set_file(
        &mut self,
        section: &Section,
        issuer: &str,
        path: &str,
        algorithms: &[Algorithm],
    ) -> Option<KeySet> {
        let line = section.line_of("auth.jwt.jwks.file");
        let shown = form::quoted(path);
        let body = match self.sources.file(path, JWKS_BYTES_MAX) {
            Ok(body) => body,
            Err(error) => {
                let error = FormError::File { path: shown, error };
                self.error(line, Problem::Form { key: "auth.jwt.jwks.file".to_owned(), error });
                return None;
            }
        };
        match jwks::read(issuer, &body) {
            Ok(set) if set.keys.iter().any(|key| algorithms.contains(&key.algorithm())) => Some(set.keys),
            Ok(_) => {
                self.error(line, Problem::KeySetUseless { path: shown });
                None
            }
            Err(error) => {
                self.error(line, Problem::KeySetFile { path: shown, error });
                None
            }
        }
    }
}

fn secret_problem(error: KeyError) -> Problem {
    match error {
        KeyError::TooShort { algorithm, bytes } => {
            Problem::WeakKey { alg: algorithm.to_string(), bytes, bytes_min: algorithm.key_bytes_min() }
        }
        error => Problem::Key(error),
    }
}

/// The URL of a key set, or what is wrong with it.
fn key_set_url(text: &str) -> Result<Url, &'static str> {
    let url =
        Url::parse(text).map_err(|_| "is no URL: write it as in \"https://idp.example/.well-known/jwks.json\"")?;
    if !url.username().is_empty() || url.password().is_some() || url.fragment().is_some() {
        return Err("has a user, a password or a fragment: a key set is public, write it without");
    }
    let is_local = match url.host() {
        Some(Host::Ipv4(ip)) => ip.is_loopback(),
        Some(Host::Ipv6(ip)) => IpAddr::V6(ip).to_canonical().is_loopback(),
        Some(Host::Domain(name)) => name == "localhost",
        None => false,
    };
    match url.scheme() {
        "https" => Ok(url),
        // Who can change what comes over the wire can put in keys of their own.
        "http" if is_local => Ok(url),
        "http" => Err("is http:// beyond this machine, where anybody on the way could put in keys: write https://"),
        _ => Err("is neither https:// nor http:// on this machine"),
    }
}
