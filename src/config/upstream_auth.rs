//! `[stream.auth]`, `[action.auth]`, `client_cert` and `client_key`: what lets requests in at an upstream.
//!
//! Source: RFC 6749, RFC 6750, RFC 7617. Memory: what is returned. Errors: every one; none holds a secret.
//! Not here: how it stands in a request (`stream::credential`), getting tokens (`stream::oauth`).

use std::net::IpAddr;
use std::sync::Arc;

use url::{Host, Url, form_urlencoded};

use super::form::{self, FormError, Sourced};
use super::meaning::{Check, RESERVED_HEADERS};
use super::walk::{Lined, Section};
use super::{Oddity, Problem, TLS_FILE_BYTES_MAX};
use crate::limits::{UPSTREAM_AUTH_PARAMS_MAX, UPSTREAM_SECRET_BYTES_MAX};
use crate::secret::Secret;
use crate::stream::credential::{Credential, Scheme};
use crate::stream::live::{ClientIdentity, IdentityPem, Live, Rule, Source};
use crate::stream::oauth::{ClientAuth, Grant, OWN_PARAMS, Options};

/// What is wrong with the credential for an upstream.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum UpstreamAuthError {
    /// A key that the kind needs is not there.
    #[error("is missing, and {kind} needs it")]
    Missing {
        /// The kind, as it is written.
        kind: String,
    },
    /// A key that the kind has no use for.
    #[error("has no place in {kind}: leave it out, or write another `kind`")]
    Unused {
        /// The kind, as it is written.
        kind: String,
    },
    /// Another `Authorization`.
    #[error("makes a second {name} header, besides that of {other}: keep one")]
    Twice {
        /// The header.
        name: String,
        /// Where the other one stands.
        other: &'static str,
    },
    /// A value with characters that cannot stand where it is to.
    #[error(
        "has a control character, white space at an end, or another character that cannot stand in it; or is over {UPSTREAM_SECRET_BYTES_MAX} bytes"
    )]
    Value,
    /// A parameter that the URL has already.
    #[error("stands in `url` already: keep one")]
    QueryTaken,
    /// A token endpoint's URL that is none.
    #[error("{0}")]
    TokenUrl(&'static str),
    /// A parameter that restcast sets itself.
    #[error("has \"{name}\", which has a key of its own or is set by restcast itself")]
    ParamTaken {
        /// Its name.
        name: String,
    },
    /// One of `client_cert` and `client_key` without the other.
    #[error("needs {other} beside it: a certificate is shown with its key")]
    Half {
        /// The other.
        other: &'static str,
    },
}

/// The paths of the keys of one table.
struct Paths {
    auth: &'static str,
    url: &'static str,
    kind: &'static str,
    token: &'static str,
    username: &'static str,
    password: &'static str,
    name: &'static str,
    value: &'static str,
    grant: &'static str,
    token_url: &'static str,
    client_id: &'static str,
    client_secret: &'static str,
    client_auth: &'static str,
    refresh_token: &'static str,
    scope: &'static str,
    audience: &'static str,
    params: &'static str,
    ca: &'static str,
    client_cert: &'static str,
    client_key: &'static str,
}

macro_rules! paths {
    ($of:literal) => {
        Paths {
            auth: concat!($of, ".auth"),
            url: concat!($of, ".url"),
            kind: concat!($of, ".auth.kind"),
            token: concat!($of, ".auth.token"),
            username: concat!($of, ".auth.username"),
            password: concat!($of, ".auth.password"),
            name: concat!($of, ".auth.name"),
            value: concat!($of, ".auth.value"),
            grant: concat!($of, ".auth.grant"),
            token_url: concat!($of, ".auth.token_url"),
            client_id: concat!($of, ".auth.client_id"),
            client_secret: concat!($of, ".auth.client_secret"),
            client_auth: concat!($of, ".auth.client_auth"),
            refresh_token: concat!($of, ".auth.refresh_token"),
            scope: concat!($of, ".auth.scope"),
            audience: concat!($of, ".auth.audience"),
            params: concat!($of, ".auth.params"),
            ca: concat!($of, ".auth.ca"),
            client_cert: concat!($of, ".client_cert"),
            client_key: concat!($of, ".client_key"),
        }
    };
}

/// The paths of `[[stream]]`.
const STREAM: Paths = paths!("stream");
/// The paths of `[[action]]`.
const ACTION: Paths = paths!("action");

impl Paths {
    /// The keys beside `kind`, with those that are for OAuth behind the rest.
    fn of_kinds(&self) -> [&'static str; 15] {
        [
            self.token,
            self.username,
            self.password,
            self.name,
            self.value,
            self.grant,
            self.token_url,
            self.client_id,
            self.client_secret,
            self.client_auth,
            self.refresh_token,
            self.scope,
            self.audience,
            self.params,
            self.ca,
        ]
    }
}

/// Headers whose values are written in the file, and those whose values stand elsewhere.
type SplitHeaders = (Vec<(String, Secret)>, Vec<(String, Live)>);

impl Check<'_> {
    /// What lets the requests of a stream in, as [`Check::credential`] says.
    pub(super) fn stream_credential(
        &mut self,
        section: &Section,
        elsewhere: Vec<(String, Live)>,
        written: &[(String, Secret)],
    ) -> Credential {
        self.credential(section, &STREAM, elsewhere, written)
    }

    /// The same of an action.
    pub(super) fn action_credential(
        &mut self,
        section: &Section,
        elsewhere: Vec<(String, Live)>,
        written: &[(String, Secret)],
    ) -> Credential {
        self.credential(section, &ACTION, elsewhere, written)
    }

    /// Warns of what is odd about a stream's.
    pub(super) fn warn_of_stream_credential(&mut self, section: &Section, credential: &Credential) {
        self.warn_of_credential(section, &STREAM, credential);
    }

    /// The same of an action's.
    pub(super) fn warn_of_action_credential(&mut self, section: &Section, credential: &Credential) {
        self.warn_of_credential(section, &ACTION, credential);
    }

    /// Everything that lets the requests of a stream or action in besides its `headers`; `elsewhere` are those of them
    /// whose values stand elsewhere, `written` the others.
    fn credential(
        &mut self,
        section: &Section,
        paths: &'static Paths,
        elsewhere: Vec<(String, Live)>,
        written: &[(String, Secret)],
    ) -> Credential {
        let identity = self.client_identity(section, paths);
        let scheme = self.scheme(section, paths, identity.as_ref());
        let name = match &scheme {
            None | Some(Scheme::Query { .. }) => None,
            Some(Scheme::Header { name, .. }) => Some((paths.name, name.as_str())),
            Some(_) => Some((paths.kind, "Authorization")),
        };
        let mut names = written.iter().map(|(name, _)| name).chain(elsewhere.iter().map(|(name, _)| name));
        if let Some((path, name)) = name {
            let twice = |other| UpstreamAuthError::Twice { name: name.to_owned(), other };
            if names.any(|other| other.eq_ignore_ascii_case(name)) {
                self.auth_error(section, path, twice("`headers`"));
            } else if name.eq_ignore_ascii_case("authorization") && has_user(section, paths) {
                self.auth_error(section, path, twice("the user in `url`"));
            }
        }
        Credential { scheme, headers: elsewhere, identity, lacks: None }
    }

    /// Splits the headers at `key`: those that are written there, and those whose values stand elsewhere.
    pub(super) fn split_headers(headers: Vec<(String, Sourced)>) -> SplitHeaders {
        let (mut written, mut elsewhere) = (Vec::new(), Vec::new());
        for (name, Sourced { secret, source }) in headers {
            match source {
                Source::Written => written.push((name, secret)),
                Source::Variable(_) | Source::File(_) => {
                    elsewhere.push((name, Live::new(source, Rule::Field, secret)));
                }
            }
        }
        (written, elsewhere)
    }

    fn auth_error(&mut self, section: &Section, path: &'static str, error: UpstreamAuthError) {
        self.error(section.line_of(path), Problem::UpstreamAuth { key: path, error });
    }

    fn scheme(
        &mut self,
        section: &Section,
        paths: &'static Paths,
        identity: Option<&ClientIdentity>,
    ) -> Option<Scheme> {
        let written = paths.of_kinds().into_iter().find(|path| section.is_written(path));
        let Some(kind) = section.text(paths.kind) else {
            // One that is wrong has been told of.
            if let Some(written) = written.filter(|_| !section.is_written(paths.kind)) {
                self.error(section.line_of(written), Problem::Missing { key: paths.kind });
            }
            return None;
        };
        let is_refresh = section.text(paths.grant).as_deref() == Some("refresh_token");
        let (needs, may): (Vec<&str>, Vec<&str>) = match kind.as_str() {
            "bearer" => (vec![paths.token], vec![]),
            "basic" => (vec![paths.username, paths.password], vec![]),
            "header" | "query" => (vec![paths.name, paths.value], vec![]),
            _ => {
                let mut needs = vec![paths.token_url, paths.client_id];
                needs.push(if is_refresh { paths.refresh_token } else { paths.client_secret });
                let mut may = vec![paths.grant, paths.client_auth, paths.scope, paths.audience, paths.params, paths.ca];
                may.extend(is_refresh.then_some(paths.client_secret));
                (needs, may)
            }
        };
        let words = match kind.as_str() {
            "oauth2" if is_refresh => "kind = \"oauth2\" with grant = \"refresh_token\"".to_owned(),
            "oauth2" => "kind = \"oauth2\" with grant = \"client_credentials\"".to_owned(),
            kind => format!("kind = \"{kind}\""),
        };
        let mut whole = true;
        for path in paths.of_kinds() {
            let (needed, allowed) = (needs.contains(&path), needs.contains(&path) || may.contains(&path));
            if needed && !section.is_written(path) {
                self.error(
                    section.line_of(paths.kind),
                    Problem::UpstreamAuth { key: path, error: UpstreamAuthError::Missing { kind: words.clone() } },
                );
            } else if !allowed && section.is_written(path) {
                self.auth_error(section, path, UpstreamAuthError::Unused { kind: words.clone() });
            }
            whole &= !needed || section.is_right(path);
        }
        if !whole {
            return None;
        }
        match kind.as_str() {
            "bearer" => Some(Scheme::Bearer(self.live(section, paths.token, Rule::Visible)?)),
            "basic" => self.basic(section, paths),
            "header" => self.own_header(section, paths),
            "query" => self.query_key(section, paths),
            _ => self.oauth(section, paths, is_refresh, identity).map(|options| Scheme::OAuth(Arc::new(options))),
        }
    }

    /// The secret at `path`, which is there, as what `rule` says.
    fn live(&mut self, section: &Section, path: &'static str, rule: Rule) -> Option<Live> {
        let Sourced { secret, source } = section.sourced(path)?;
        if !rule.allows(secret.expose_secret()) {
            self.auth_error(section, path, UpstreamAuthError::Value);
            return None;
        }
        Some(Live::new(source, rule, secret))
    }

    fn basic(&mut self, section: &Section, paths: &'static Paths) -> Option<Scheme> {
        let (username, password) =
            (self.live(section, paths.username, Rule::User), self.live(section, paths.password, Rule::Text));
        Some(Scheme::Basic { username: username?, password: password? })
    }

    fn own_header(&mut self, section: &Section, paths: &'static Paths) -> Option<Scheme> {
        let name = section.text(paths.name)?;
        let value = self.live(section, paths.value, Rule::Field);
        let problem = if !form::is_token(&name) || name.len() > 128 {
            Problem::HeaderName { key: paths.name }
        } else if RESERVED_HEADERS.contains(&name.to_ascii_lowercase().as_str()) {
            Problem::HeaderReserved { key: paths.auth, name }
        } else {
            return Some(Scheme::Header { name, value: value? });
        };
        self.error(section.line_of(paths.name), problem);
        None
    }

    fn query_key(&mut self, section: &Section, paths: &'static Paths) -> Option<Scheme> {
        let name = section.text(paths.name)?;
        let value = self.live(section, paths.value, Rule::Text);
        if !Rule::Text.allows(name.as_bytes()) {
            self.auth_error(section, paths.name, UpstreamAuthError::Value);
            return None;
        }
        let url = section.text(paths.url).unwrap_or_default();
        let query = url.split_once('?').map_or("", |(_, query)| query);
        if form_urlencoded::parse(query.as_bytes()).any(|(other, _)| other == name) {
            self.auth_error(section, paths.name, UpstreamAuthError::QueryTaken);
        }
        Some(Scheme::Query { name, value: value? })
    }

    fn oauth(
        &mut self,
        section: &Section,
        paths: &'static Paths,
        is_refresh: bool,
        identity: Option<&ClientIdentity>,
    ) -> Option<Options> {
        let ca = self.ca(section, paths.ca);
        let url = section.text(paths.token_url).and_then(|text| match token_url(&text) {
            Ok(url) => Some(url),
            Err(why) => {
                self.auth_error(section, paths.token_url, UpstreamAuthError::TokenUrl(why));
                None
            }
        });
        if ca.is_some() && url.as_ref().is_some_and(|url| url.scheme() == "http") {
            self.warn(section.line_of(paths.ca), Oddity::TokenCaWithoutTls { key: paths.ca });
        }
        let client_id = self.live(section, paths.client_id, Rule::Text);
        let has_secret = section.is_right(paths.client_secret);
        let client_secret = has_secret.then(|| self.live(section, paths.client_secret, Rule::Text));
        let refresh_token = is_refresh.then(|| self.live(section, paths.refresh_token, Rule::Text));
        let params = self.token_params(section, paths);
        Some(Options {
            grant: match refresh_token {
                Some(token) => Grant::RefreshToken(token?),
                None => Grant::ClientCredentials,
            },
            token_url: url?,
            client_id: client_id?,
            client_secret: match client_secret {
                Some(secret) => Some(secret?),
                None => None,
            },
            client_auth: match section.text(paths.client_auth).as_deref() {
                Some("post") => ClientAuth::Post,
                _ => ClientAuth::Basic,
            },
            scope: section.text(paths.scope),
            audience: section.text(paths.audience),
            params,
            ca,
            identity: identity.cloned(),
        })
    }

    fn token_params(&mut self, section: &Section, paths: &'static Paths) -> Vec<(String, Live)> {
        let mut params: Vec<(String, Live)> = Vec::new();
        let members = section.secret_table(paths.params);
        if members.len() > UPSTREAM_AUTH_PARAMS_MAX {
            let error = FormError::TooMany { limit: UPSTREAM_AUTH_PARAMS_MAX };
            self.error(section.line_of(paths.params), Problem::Form { key: paths.params.to_owned(), error });
        }
        for Lined { line, value: (name, Sourced { secret, source }) } in
            members.into_iter().take(UPSTREAM_AUTH_PARAMS_MAX)
        {
            if OWN_PARAMS.contains(&name.as_str()) {
                let error = UpstreamAuthError::ParamTaken { name };
                self.error(line, Problem::UpstreamAuth { key: paths.params, error });
            } else if !Rule::Text.allows(secret.expose_secret()) {
                self.error(line, Problem::UpstreamAuth { key: paths.params, error: UpstreamAuthError::Value });
            } else {
                params.push((name, Live::new(source, Rule::Text, secret)));
            }
        }
        params
    }

    /// `client_cert` and `client_key`, which go together.
    fn client_identity(&mut self, section: &Section, paths: &'static Paths) -> Option<ClientIdentity> {
        let (cert, key) = (section.text(paths.client_cert), section.text(paths.client_key));
        for (path, other, name) in [
            (paths.client_cert, paths.client_key, "`client_key`"),
            (paths.client_key, paths.client_cert, "`client_cert`"),
        ] {
            if section.is_written(path) && !section.is_written(other) {
                self.auth_error(section, path, UpstreamAuthError::Half { other: name });
            }
        }
        let (cert, key) = (cert?, key?);
        let cert_pem = self.pem(section, paths.client_cert, &cert);
        let key_pem = self.pem(section, paths.client_key, &key);
        let (cert_pem, key_pem) = (cert_pem?, Secret::new(key_pem?));
        if let Err(error) = self.sources().identity(&cert_pem, key_pem.expose_secret()) {
            let (at, path) =
                if error.is_of_certificate() { (paths.client_cert, &cert) } else { (paths.client_key, &key) };
            let path = form::quoted(path);
            self.error(section.line_of(at), Problem::Identity { key: at, path, error });
            return None;
        }
        Some(ClientIdentity::new(cert, key, IdentityPem { cert: cert_pem, key: key_pem }))
    }

    fn pem(&mut self, section: &Section, at: &'static str, path: &str) -> Option<Vec<u8>> {
        let error = match self.sources().file(path, TLS_FILE_BYTES_MAX) {
            Ok(bytes) if bytes.is_empty() => FormError::Empty,
            Ok(bytes) => return Some(bytes),
            Err(error) => FormError::File { path: form::quoted(path), error },
        };
        self.error(section.line_of(at), Problem::Form { key: at.to_owned(), error });
        None
    }

    /// Warns of a credential that everybody on the way can read, and of a certificate that nobody asks for.
    fn warn_of_credential(&mut self, section: &Section, paths: &'static Paths, credential: &Credential) {
        let url = section.text(paths.url).unwrap_or_default();
        if !url.starts_with("http://") {
            return;
        }
        if credential.identity.is_some() {
            self.warn(section.line_of(paths.client_cert), Oddity::IdentityWithoutTls { key: paths.client_cert });
        }
        // The host holds no placeholder: up to the first one stands a URL.
        let host = url.split('{').next().and_then(|text| Url::parse(text).ok());
        if credential.scheme.is_some() && !host.is_some_and(|url| is_this_machine(&url)) {
            self.warn(section.line_of(paths.kind), Oddity::CredentialInTheClear { key: paths.kind });
        }
    }
}

fn has_user(section: &Section, paths: &'static Paths) -> bool {
    let url = section.text(paths.url).unwrap_or_default();
    let authority = url.split_once("://").map_or("", |(_, rest)| rest);
    authority.split(['/', '?', '#']).next().is_some_and(|authority| authority.contains('@'))
}

fn is_this_machine(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(ip)) => ip.is_loopback(),
        Some(Host::Ipv6(ip)) => IpAddr::V6(ip).to_canonical().is_loopback(),
        Some(Host::Domain(name)) => name == "localhost",
        None => false,
    }
}

/// The URL of a token endpoint, or what is wrong with it.
fn token_url(text: &str) -> Result<Url, &'static str> {
    let url = Url::parse(text).map_err(|_| "is no URL: write it as in \"https://idp.example/token\"")?;
    if !url.username().is_empty() || url.password().is_some() || url.fragment().is_some() {
        return Err("has a user, a password or a fragment: write `client_id` and `client_secret`");
    }
    match url.scheme() {
        "https" => Ok(url),
        "http" if is_this_machine(&url) => Ok(url),
        // RFC 6749 section 3.2: the requests hold credentials, and the answers hold more.
        "http" => Err("is http:// beyond this machine, where anybody on the way could read the secret: write https://"),
        _ => Err("is neither https:// nor http:// on this machine"),
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;
    use crate::config::tests::{accepted, check, parse};

    fn stream(url: &str, lines: &str, auth: &str) -> String {
        let head = format!("[[stream]]\nid = \"s\"\nurl = {url:?}\nallow_anonymous = true\n{lines}\n");
        if auth.is_empty() { head } else { format!("{head}[stream.auth]\n{auth}") }
    }

    const OAUTH: &str =
        "kind = \"oauth2\"\ntoken_url = \"https://idp/token\"\nclient_id = \"c\"\nclient_secret = \"env:SECRET\"\n";

    fn scheme(auth: &str) -> Scheme {
        let config = accepted(&stream("https://h/", "", auth));
        config.streams[0].credential.scheme.clone().expect("there is one")
    }

    #[test]
    fn each_kind_is_read_with_what_it_needs() {
        assert!(matches!(scheme("kind = \"bearer\"\ntoken = \"t\""), Scheme::Bearer(_)));
        assert!(matches!(scheme("kind = \"basic\"\nusername = \"u\"\npassword = \"p:w\""), Scheme::Basic { .. }));
        let header = scheme("kind = \"header\"\nname = \"X-Key\"\nvalue = \"file:secret\"");
        assert!(matches!(header, Scheme::Header { name, value } if name == "X-Key" && value.file() == Some("secret")));
        assert!(matches!(scheme("kind = \"query\"\nname = \"key\"\nvalue = \"v\""), Scheme::Query { .. }));
        let Scheme::OAuth(options) = scheme(OAUTH) else { panic!("it is OAuth") };
        assert_eq!((options.client_auth, &options.grant), (ClientAuth::Basic, &Grant::ClientCredentials));
        let more = "grant = \"refresh_token\"\nrefresh_token = \"r\"\nclient_auth = \"post\"\nscope = \"a b\"\naudience = \"api\"\nparams = { resource = \"x\" }\nca = \"ca.pem\"\n";
        let Scheme::OAuth(options) = scheme(&format!("{OAUTH}{more}")) else { panic!("it is OAuth") };
        assert_eq!(options.client_auth, ClientAuth::Post);
        assert!(matches!(options.grant, Grant::RefreshToken(_)) && options.ca.is_some());
        let params: Vec<_> = options.params.iter().map(|(name, value)| (name.as_str(), value.value())).collect();
        assert_eq!(params, [("resource", Secret::new(*b"x"))]);
        assert_eq!((options.scope.as_deref(), options.audience.as_deref()), (Some("a b"), Some("api")));
        let public = "kind = \"oauth2\"\ngrant = \"refresh_token\"\ntoken_url = \"http://127.0.0.1:9/t\"\nclient_id = \"c\"\nrefresh_token = \"r\"\n";
        let Scheme::OAuth(options) = scheme(public) else { panic!("it is OAuth") };
        assert!(options.client_secret.is_none(), "a public client");
    }

    #[test]
    fn what_is_wrong_is_told_at_once() {
        let of = |url: &str, lines: &str, auth: &str| stream(url, lines, auth);
        check(
            &of("https://h/", "", "token = \"t\""),
            expect![[r#"
            line 7: `stream.auth.kind` is missing here
        "#]],
        );
        check(
            &of("https://h/", "", "kind = \"digest\""),
            expect![[r#"
            line 7: `stream.auth.kind`: "digest" is not known here: write "bearer" or "basic" or "header" or "query" or "oauth2"
        "#]],
        );
        check(
            &of("https://h/", "", "kind = \"basic\"\nusername = \"a:b\"\ntoken = \"t\""),
            expect![[r#"
            line 7: `stream.auth.password` is missing, and kind = "basic" needs it
            line 9: `stream.auth.token` has no place in kind = "basic": leave it out, or write another `kind`
        "#]],
        );
        check(
            &of("https://h/", "", "kind = \"basic\"\nusername = \"a:b\"\npassword = \"p\\n\""),
            expect![[r#"
            line 8: `stream.auth.username` has a control character, white space at an end, or another character that cannot stand in it; or is over 8192 bytes
            line 9: `stream.auth.password` has a control character, white space at an end, or another character that cannot stand in it; or is over 8192 bytes
        "#]],
        );
        check(
            &of("https://h/", "", "kind = \"bearer\"\ntoken = \"two words\""),
            expect![[r#"
            line 8: `stream.auth.token` has a control character, white space at an end, or another character that cannot stand in it; or is over 8192 bytes
        "#]],
        );
        check(
            &of("https://h/", "", "kind = \"header\"\nname = \"Host\"\nvalue = \"v\""),
            expect![[r#"
            line 8: `stream.auth.Host` is set by restcast itself and cannot be configured
        "#]],
        );
        check(
            &of("https://h/", "", "kind = \"header\"\nname = \"a b\"\nvalue = \"v\""),
            expect![[r#"
            line 8: `stream.auth.name` has a name that is no header name: use letters, digits and `-`
        "#]],
        );
        check(
            &of("https://h/?a=1&k%65y=2", "", "kind = \"query\"\nname = \"key\"\nvalue = \"v\""),
            expect![[r#"
            line 8: `stream.auth.name` stands in `url` already: keep one
        "#]],
        );
        let headers = "headers = { authorization = \"x\" }";
        check(
            &of("https://h/", headers, "kind = \"bearer\"\ntoken = \"t\""),
            expect![[r#"
            line 7: `stream.auth.kind` makes a second Authorization header, besides that of `headers`: keep one
        "#]],
        );
        let headers = "headers = { X-Key = \"env:SECRET\" }";
        check(
            &of("https://h/", headers, "kind = \"header\"\nname = \"x-key\"\nvalue = \"v\""),
            expect![[r#"
            line 8: `stream.auth.name` makes a second x-key header, besides that of `headers`: keep one
        "#]],
        );
        check(
            &of("https://ada:pw@h/", "", OAUTH),
            expect![[r#"
            line 7: `stream.auth.kind` makes a second Authorization header, besides that of the user in `url`: keep one
        "#]],
        );
        let oauth = |from: &str, to: &str| of("https://h/", "", &OAUTH.replace(from, to));
        check(
            &oauth("https://idp/token", "http://idp/token"),
            expect![[r#"
            line 8: `stream.auth.token_url` is http:// beyond this machine, where anybody on the way could read the secret: write https://
        "#]],
        );
        check(
            &oauth("https://idp/token", "https://c:s@idp/token"),
            expect![[r#"
            line 8: `stream.auth.token_url` has a user, a password or a fragment: write `client_id` and `client_secret`
        "#]],
        );
        check(
            &oauth("https://idp/token", "idp/token"),
            expect![[r#"
            line 8: `stream.auth.token_url` is no URL: write it as in "https://idp.example/token"
        "#]],
        );
        check(
            &oauth("client_secret = \"env:SECRET\"", "grant = \"refresh_token\""),
            expect![[r#"
            line 7: `stream.auth.refresh_token` is missing, and kind = "oauth2" with grant = "refresh_token" needs it
        "#]],
        );
        check(
            &of(
                "https://h/",
                "",
                &format!(
                    "{OAUTH}params = {{ scope = \"a\", audience = \"b\" }}\naudience = \"c\"\nrefresh_token = \"r\""
                ),
            ),
            expect![[r#"
            line 11: `stream.auth.params` has "scope", which has a key of its own or is set by restcast itself
            line 11: `stream.auth.params` has "audience", which has a key of its own or is set by restcast itself
            line 13: `stream.auth.refresh_token` has no place in kind = "oauth2" with grant = "client_credentials": leave it out, or write another `kind`
        "#]],
        );
        check(
            &of("https://h/", "client_cert = \"cert.pem\"", ""),
            expect![[r#"
            line 5: `stream.client_cert` needs `client_key` beside it: a certificate is shown with its key
        "#]],
        );
        check(
            &of("https://h/", "client_cert = \"cert.pem\"\nclient_key = \"cert.pem\"", ""),
            expect![[r#"
            line 6: `stream.client_key`: the file "cert.pem" holds no private key in the clear: name the file that begins with -----BEGIN PRIVATE KEY-----
        "#]],
        );
        check(
            &of("https://h/", "client_cert = \"nope\"\nclient_key = \"empty\"", ""),
            expect![[r#"
            line 5: `stream.client_cert`: the file "nope" does not exist
            line 6: `stream.client_key`: is empty
        "#]],
        );
    }

    #[test]
    fn parameters_may_be_secrets_that_stand_elsewhere() {
        let oauth = |params: &str| {
            let config = accepted(&stream("https://h/", "", &format!("{OAUTH}params = {{ {params} }}")));
            config.streams[0].credential.oauth().expect("it is OAuth").clone()
        };
        let options = oauth("assertion = \"env:SECRET\", resource = \"r\"");
        let [(name, assertion), (_, resource)] = &options.params[..] else { panic!("{options:?}") };
        assert_eq!((name.as_str(), assertion.source()), ("assertion", &Source::Variable("SECRET".into())));
        let body =
            |options: &Options| String::from_utf8(options.request(None).body.expose_secret().to_vec()).expect("text");
        let secret = String::from_utf8(assertion.value().expose_secret().to_vec()).expect("text");
        assert!(body(&options).ends_with(&format!("&assertion={secret}&resource=r")), "{}", body(&options));
        assert!(options.values().contains(&resource), "it is read again as others are");
        assertion.replace(&Secret::new(*b"another"));
        assert!(body(&options).contains("assertion=another&"), "and what it is then is sent");
        assert_eq!(oauth("assertion = \"env:SECRET\", resource = \"r\""), options, "it is the same credential");
        assert_ne!(oauth("assertion = \"env:SECRET\", resource = \"s\""), options);
        check(
            &stream("https://h/", "", &format!("{OAUTH}params = {{ a = \"b\\n\" }}")),
            expect![[r#"
            line 11: `stream.auth.params` has a control character, white space at an end, or another character that cannot stand in it; or is over 8192 bytes
        "#]],
        );
    }

    #[test]
    fn what_works_and_is_likely_not_meant_is_a_warning() {
        let identity = "client_cert = \"cert.pem\"\nclient_key = \"key.pem\"";
        check(
            &stream("http://h/{claims.a}", identity, "kind = \"bearer\"\ntoken = \"t\""),
            expect![[r#"
            warning line 4: stream "s": `allow_anonymous` has no effect, for an anonymous caller has no claim "a"
            warning line 5: `stream.client_cert` has no effect with an http:// URL
            warning line 8: `stream.auth.kind`: the credential travels in the clear to another machine: use https://
        "#]],
        );
        check(&stream("http://127.0.0.1:80/", "", "kind = \"bearer\"\ntoken = \"t\""), expect![[""]]);
        let local = OAUTH.replace("https://idp", "http://localhost");
        check(
            &stream("https://h/", "", &format!("{local}ca = \"ca.pem\"")),
            expect![[r#"
            warning line 11: `stream.auth.ca` has no effect without an https:// `token_url`
        "#]],
        );
    }

    #[test]
    fn parameters_have_their_bound() {
        let with = |count: usize| {
            let params: Vec<String> = (0..count).map(|n| format!("p{n} = \"v\"")).collect();
            parse(&stream("https://h/", "", &format!("{OAUTH}params = {{ {} }}", params.join(", "))))
        };
        assert!(with(UPSTREAM_AUTH_PARAMS_MAX).is_ok());
        assert!(with(UPSTREAM_AUTH_PARAMS_MAX + 1).is_err());
    }

    #[test]
    fn nothing_secret_is_shown_and_what_is_shown_can_be_read() {
        let identity = "client_cert = \"cert.pem\"\nclient_key = \"key.pem\"\nheaders = { X-A = \"hunter-a\", X-B = \"env:SECRET\" }";
        let url = "https://h/?a=1";
        let more = "grant = \"refresh_token\"\nrefresh_token = \"hunter-r\"\nscope = \"leads\"\nparams = { key = \"hunter-p\" }\n";
        let auths = [
            "kind = \"bearer\"\ntoken = \"hunter-t\"".to_owned(),
            "kind = \"basic\"\nusername = \"hunter-u\"\npassword = \"hunter-p\"".to_owned(),
            "kind = \"header\"\nname = \"X-Own\"\nvalue = \"hunter-h\"".to_owned(),
            "kind = \"query\"\nname = \"key\"\nvalue = \"hunter-q\"".to_owned(),
            format!("{OAUTH}{more}").replace("\"c\"", "\"hunter-c\""),
        ];
        for auth in auths {
            let text = stream(url, identity, &auth);
            let action = text.replace("[[stream]]\nid = \"s\"", "[[action]]\ntype = \"a\"");
            let action = action.replace("[stream.auth]", "[action.auth]").replace("allow_anonymous = true\n", "");
            let config = accepted(&format!("{text}\n{action}"));
            let shown = config.masked_toml();
            assert!(!format!("{shown}{config:?}").contains("hunter"), "{shown}");
            assert!(shown.contains("headers = { \"X-A\" = \"***\", \"X-B\" = \"***\" }"), "{shown}");
            let again = accepted(&shown.replace("\"https://h/?a=***\"", "\"https://h/?a=1\""));
            assert_eq!(again.masked_toml(), shown);
            assert_eq!(config.actions[0].credential, config.streams[0].credential);
        }
    }
}
