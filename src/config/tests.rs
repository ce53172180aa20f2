//! Scripts of configuration files: what is accepted, what is refused, and what is said about it.

use std::fmt::Write as _;

use expect_test::{Expect, expect};
use proptest::prelude::{ProptestConfig, any, prop_assert, proptest};

use super::{Config, ConfigError, FILE_BYTES_MAX, FileError, IdentityError, KEYS, Preset, Problem, Sources, Warning};
use crate::limits::Limits;
use crate::{auth, connection, stream};

/// A world with one of each thing a file may name.
pub(super) struct World;

const ENV_SECRET: &str = "ENV-SECRET-0123456789abcdef-0123456789abcdef-0123456789abcdef-0123";
const FILE_SECRET: &str = "FILE-SECRET-0123456789abcdef-0123456789abcdef";

const ED25519_SET: &str =
    r#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo","kid":"e"}]}"#;

impl Sources for World {
    fn env(&self, name: &str) -> Option<Vec<u8>> {
        (name == "SECRET").then(|| ENV_SECRET.into())
    }

    fn file(&self, path: &str, _: usize) -> Result<Vec<u8>, FileError> {
        match path {
            "secret" => Ok(format!("{FILE_SECRET}\n").into_bytes()),
            "cert.pem" | "other.pem" => Ok(b"a certificate".to_vec()),
            "key.pem" => Ok(b"KEY-SECRET".to_vec()),
            "empty" => Ok(Vec::new()),
            "schema.json" => Ok(br#"{"required":["property"]}"#.to_vec()),
            "latin1.json" => Ok(b"{\"title\":\"\xe9\"}".to_vec()),
            "ca.pem" => Ok(b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n".to_vec()),
            "p256.pem" => Ok(include_bytes!("../../tests/vectors/keys/p256.pub.pem").to_vec()),
            "rsa1024.pem" => Ok(include_bytes!("../../tests/vectors/keys/rsa1024.pub.pem").to_vec()),
            "private.pem" => Ok(include_bytes!("../../tests/vectors/keys/p256.pem").to_vec()),
            "jwks.json" => Ok(ED25519_SET.into()),
            "forbidden" => Err(FileError::Denied),
            _ => Err(FileError::Missing),
        }
    }

    fn identity(&self, cert: &[u8], key: &[u8]) -> Result<(), IdentityError> {
        match (cert, key) {
            (b"a certificate", b"KEY-SECRET") => Ok(()),
            (b"a certificate", _) => Err(IdentityError::NoKey),
            _ => Err(IdentityError::NoCertificate),
        }
    }
}

pub(super) fn parse(text: &str) -> Result<(Config, Vec<Warning>), Vec<ConfigError>> {
    Config::parse(text, &World)
}

pub(super) fn accepted(text: &str) -> Config {
    parse(text).unwrap_or_else(|errors| panic!("{text}\n{errors:?}")).0
}

/// Everything that is said about `text`.
pub(super) fn check(text: &str, said: Expect) {
    let mut page = String::new();
    match parse(text) {
        Ok((_, warnings)) => warnings.iter().for_each(|w| writeln!(page, "warning {w}").expect("infallible")),
        Err(errors) => errors.iter().for_each(|e| writeln!(page, "{e}").expect("infallible")),
    }
    said.assert_eq(&page);
}

/// What is said about one more line in an otherwise valid stream, its line left out.
fn check_stream(lines: &str, said: Expect) {
    let text = format!("{KEY}[[stream]]\nid = \"s\"\nurl = \"https://h/a\"\n{lines}");
    let mut page = String::new();
    match parse(&text) {
        Ok((_, warnings)) => warnings.iter().for_each(|w| writeln!(page, "warning: {}", w.oddity).expect("infallible")),
        Err(errors) => errors.iter().for_each(|e| writeln!(page, "{}", e.problem).expect("infallible")),
    }
    said.assert_eq(&page);
}

const KEY: &str = "[[auth.jwt.key]]\nalg = \"HS256\"\nsecret = \"env:SECRET\"\n";

const FULL: &str = r#"
[server]
listen = "0.0.0.0:80"
plaintext = true
trusted_proxies = ["10.0.0.0/8", "::1"]
cores = 4
driver = "epoll"
public_origin = "https://live.example.com"
heartbeat = "5s"
drain = "0s"
allowed_origins = ["https://app.example"]
playground = false
state = "/var/lib/restcast/\"state\""
[[server.tls]]
cert = "cert.pem"
key = "key.pem"
[admin]
listen = "127.0.0.1:9081"
key = "file:secret"
names = ["restcast.internal"]
[log]
level = "trace"
format = "json"
[limits]
connections = 1_000
history_bytes_total = 0
pinned_bytes = "1GiB"
request_head_bytes_max = 0x1000
[auth]
query_token = false
first_message = "5s"
[auth.jwt]
issuer = "https://idp.example"
audience = ["a", "b"]
claims.sub = "userId"
[[auth.jwt.key]]
kid = "2026-11"
alg = "HS512"
secret = "env:SECRET"
[[auth.jwt.key]]
kid = "public"
alg = "ES256"
public_key = "file:p256.pem"
[[auth.jwt.jwks]]
issuer = "https://fetched.example"
url = "https://fetched.example/jwks?tenant=hunter2"
algs = ["EdDSA"]
audience = "restcast"
ca = "ca.pem"
[[auth.jwt.jwks]]
issuer = "https://read.example"
file = "jwks.json"
[[auth.jwt.key]]
alg = "HS256"
secret = "hex:000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
[[auth.api_key]]
id = "dashboard"
hash = "sha256:hunter2-hunter2:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
streams = ["leads", "orders:*"]
expires = 2027-01-01T00:00:00+01:00
rate = 600
roles = ["agent"]
[auth.session]
secrets = ["env:SECRET", "hunter2"]
[proxy]
url = "http://ada:hunter2@proxy.example.com:3128"
except = ["*.corp.example", "10.0.0.0/8"]

[redis]
url = "rediss://ada:hunter2@redis.example/1"
ca = "ca.pem"
[direct]
allow = ["https://api.example.com/*"]
roles = ["developer"]
[[stream]]
id = "leads"
url = "https://ada:hunter2@api.example.com/companies/{claims.companyId}/leads?region={query.region}&key=hunter2"
interval = "250ms"
method = "POST"
headers = { "X-Api-Key" = "env:SECRET", Accept = "application/json" }
body = "{\"id\":{claims.companyId},\"key\":\"hunter2\"}"
params = ["region"]
params_pattern = { region = "^[a-z]{2}$" }
ca = "ca.pem"
history_bytes = 1000
filter = ".rows | map({id})"
ignore = ["/generated_at", "/a~1b"]
array_key = "id"
respect_max_age = true
redirects_max = 2
interval_min = "250ms"
interval_max = "30s"
utc_offset = "-03:30"
windows = [{ from = "09:00", to = "17:00", days = ["mon", "tue"], interval = "500ms" }, { from = "22:00", to = "06:00" }]
hash = true
roles = ["agent", "admin"]
permissions = ["leads.read"]
hook_secret = ["env:SECRET", "hunter2 of the hooks"]
[stream.sign]
key_id = "2026-11"
secret = "hex:000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
[[stream.view]]
roles = ["agent"]
pointers = ["/name", "/rows/*/a~1b"]
[[stream.view]]
roles = ["admin"]
path = "$.rows[?@.open == true]"
[[stream]]
id = "public"
url = "http://127.0.0.1:3000"
allow_anonymous = true
pages_max = 3
[[stream]]
id = "ticker"
url = "https://ticks.example.com/"
kind = "sse"
events = ["tick"]
events_per_second = 5
idle_timeout = "30s"
[[upstream]]
origin = "https://api.example.com"
rate = "10/s"
burst = 2
[[action]]
type = "property_update"
roles = ["agent"]
permissions = ["leads.write"]
method = "PUT"
url = "https://ada:hunter2@api.example.com/c/{claims.companyId}/p/{message.property.id}?key=hunter2"
headers = { "X-Api-Key" = "env:SECRET" }
body = "{\"new\":{message.property},\"key\":\"hunter2\"}"
schema = "file:schema.json"
rate = "100/m"
refresh = ["leads", "public"]
reply_body = false
error_body = true
timeout = "5s"
ca = "ca.pem"
"#;

/// What lets requests in at upstreams, of which a stream has one kind.
const UPSTREAM_AUTH: &str = r#"
[[stream]]
id = "bearer"
url = "https://h/"
client_cert = "cert.pem"
client_key = "key.pem"
auth = { kind = "bearer", token = "t" }
[[stream]]
id = "basic"
url = "https://h/"
auth = { kind = "basic", username = "u", password = "p" }
[[stream]]
id = "header"
url = "https://h/"
auth = { kind = "header", name = "X-Key", value = "v" }
[[stream]]
id = "oauth2"
url = "https://h/"
[stream.auth]
kind = "oauth2"
grant = "refresh_token"
refresh_token = "r"
token_url = "https://h/token"
client_id = "c"
client_secret = "s"
scope = "leads"
audience = "api"
ca = "ca.pem"
"#;

#[test]
fn the_effective_configuration_is_whole_and_hides_secrets() {
    let config = accepted(FULL);
    let shown = config.masked_toml();
    expect![[r#"
        [server]
        listen = "0.0.0.0:80"
        plaintext = true
        trusted_proxies = ["10.0.0.0/8", "::1/128"]
        share_port = false
        cores = 4
        driver = "epoll"
        public_origin = "https://live.example.com"
        heartbeat = "5s"
        drain = "0s"
        allowed_origins = ["https://app.example"]
        permessage_deflate = true
        playground = false
        echo = false
        state = "/var/lib/restcast/\"state\""

        [[server.tls]]
        cert = "cert.pem"
        key = "key.pem"

        [admin]
        listen = "127.0.0.1:9081"
        key = "***"
        names = ["restcast.internal"]
        stream_urls = []

        [log]
        level = "trace"
        format = "json"

        [limits]
        connections = 1000
        connections_per_address = 0
        connections_per_subject = 0
        subscriptions_per_connection = 64
        streams = 10000
        streams_per_subject = 64
        streams_per_address = 1024
        selects_per_stream = 128
        history_bytes_total = 0
        pinned_bytes = "1GiB"
        handshakes_per_second_per_address = 0
        keep_alive = "15s"
        handshake_timeout = "10s"
        request_head_bytes_max = "4KiB"
        message_bytes_max = "64KiB"
        messages_per_second = 50
        auth_failures_per_minute = 60
        write_stall = "30s"

        [auth]
        query_token = false
        reauth_before = "60s"
        token_cache = 4096
        first_message = "5s"
        revocation_keep = "30d"

        [auth.jwt]
        leeway = "5s"
        issuer = ["https://idp.example"]
        audience = ["a", "b"]
        cookie = "restcast_token"
        close_on_key_removal = false

        [auth.jwt.claims]
        sub = "userId"
        role = "role"
        roles = "roles"
        permissions = "permissions"
        streams = "streams"

        [auth.session]
        secrets = ["***", "***"]
        cookie = "connect.sid"
        prefix = "sess:"
        user = "/userId"
        role = "/userRole"
        company = "/companyId"
        permissions = "/permissions"
        reread = "30s"
        grace = "5m"
        touch = false

        [[auth.jwt.key]]
        kid = "2026-11"
        alg = "HS512"
        secret = "***"

        [[auth.jwt.key]]
        kid = "public"
        alg = "ES256"
        public_key = "***"

        [[auth.jwt.key]]
        alg = "HS256"
        secret = "***"

        [[auth.jwt.jwks]]
        issuer = "https://fetched.example"
        url = "https://fetched.example/jwks?***"
        ca = "ca.pem"
        algs = ["EdDSA"]
        audience = ["restcast"]

        [[auth.jwt.jwks]]
        issuer = "https://read.example"
        file = "jwks.json"
        algs = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA"]

        [[auth.api_key]]
        id = "dashboard"
        hash = "***"
        streams = ["leads", "orders:*"]
        expires = 2026-12-31T23:00:00Z
        rate = 600
        roles = ["agent"]
        permissions = []

        [redis]
        url = "rediss://ada:***@redis.example:6379/1"
        ca = "ca.pem"
        timeout = "2s"
        channel_logout = "user-logged-out"
        channel_permissions = "permission-update"
        channel_revoked = "token-revoked"

        [direct]
        allow = ["https://api.example.com/*"]
        allow_public = false
        cookies = false
        roles = ["developer"]
        interval_min = "500ms"
        sessions_per_subject = 16
        session_ttl_max = "1h"
        linger = "10s"
        response_bytes_max = "1MiB"
        timeout = "15s"

        [[stream]]
        id = "leads"
        url = "https://***@api.example.com/companies/{claims.companyId}/leads?region={query.region}&key=***"
        interval = "250ms"
        method = "POST"
        headers = { "Accept" = "***", "X-Api-Key" = "***" }
        body = "***"
        params = ["region"]
        params_pattern = { "region" = "^[a-z]{2}$" }
        ca = "ca.pem"
        connect_timeout = "3s"
        first_byte_timeout = "10s"
        timeout = "15s"
        response_bytes_max = "16MiB"
        backoff_max = "60s"
        linger = "10s"
        keep_warm = false
        history = 1024
        history_bytes = 1000
        filter = ".rows | map({id})"
        ignore = ["/generated_at", "/a~1b"]
        array_key = "id"
        hash = true
        allow_anonymous = false
        roles = ["agent", "admin"]
        permissions = ["leads.read"]
        hook_secret = ["***", "***"]
        kind = "poll"
        respect_max_age = true
        pages_max = 1
        redirects_max = 2
        interval_min = "250ms"
        interval_max = "30s"
        utc_offset = "-03:30"

        [[stream.windows]]
        from = "09:00"
        to = "17:00"
        days = ["mon", "tue"]
        interval = "500ms"

        [[stream.windows]]
        from = "22:00"
        to = "06:00"
        days = []

        [stream.sign]
        key_id = "2026-11"
        secret = "***"

        [[stream.view]]
        roles = ["agent"]
        pointers = ["/name", "/rows/*/a~1b"]

        [[stream.view]]
        roles = ["admin"]
        path = "$.rows[?@.open == true]"

        [[stream]]
        id = "public"
        url = "http://127.0.0.1:3000/"
        interval = "1s"
        method = "GET"
        headers = {}
        params = []
        params_pattern = {}
        connect_timeout = "3s"
        first_byte_timeout = "10s"
        timeout = "15s"
        response_bytes_max = "16MiB"
        backoff_max = "60s"
        linger = "10s"
        keep_warm = false
        history = 1024
        history_bytes = "4MiB"
        ignore = []
        hash = false
        allow_anonymous = true
        roles = []
        permissions = []
        kind = "poll"
        respect_max_age = false
        pages_max = 3
        redirects_max = 0
        utc_offset = "+00:00"

        [[stream]]
        id = "ticker"
        url = "https://ticks.example.com/"
        interval = "1s"
        method = "GET"
        headers = {}
        params = []
        params_pattern = {}
        connect_timeout = "3s"
        first_byte_timeout = "10s"
        timeout = "15s"
        response_bytes_max = "16MiB"
        backoff_max = "60s"
        linger = "10s"
        keep_warm = false
        history = 1024
        history_bytes = "4MiB"
        ignore = []
        hash = false
        allow_anonymous = false
        roles = []
        permissions = []
        kind = "sse"
        events = ["tick"]
        events_per_second = 5
        idle_timeout = "30s"

        [[upstream]]
        origin = "https://api.example.com"
        rate = "10/s"
        burst = 2
        breaker = 10

        [proxy]
        url = "http://ada:***@proxy.example.com:3128"
        except = ["*.corp.example", "10.0.0.0/8"]

        [[action]]
        type = "property_update"
        roles = ["agent"]
        permissions = ["leads.write"]
        method = "PUT"
        url = "https://***@api.example.com/c/{claims.companyId}/p/{message.property.id}?key=***"
        headers = { "X-Api-Key" = "***" }
        body = "***"
        schema = "{\"required\":[\"property\"]}"
        rate = "100/m"
        refresh = ["leads", "public"]
        reply_body = false
        error_body = true
        ca = "ca.pem"
        connect_timeout = "3s"
        first_byte_timeout = "10s"
        timeout = "5s"
        response_bytes_max = "1MiB"
    "#]]
    .assert_eq(&shown);
    let with_auth = accepted(UPSTREAM_AUTH).masked_toml();
    for key in KEYS.iter().map(|key| key.path.rsplit('.').next().expect("a path has a last part")) {
        let shown = if shown.contains(&format!("\n{key} = ")) { &shown } else { &with_auth };
        assert!(shown.contains(&format!("\n{key} = ")), "{key} is shown");
    }
    let debug = format!("{config:?}");
    for secret in ["hunter2", "0123456789abcdef", ENV_SECRET, FILE_SECRET, "1a1b1c1d1e1f", "KEY-SECRET"] {
        assert!(!shown.contains(secret) && !debug.contains(secret), "{secret}");
    }
    toml::de::DeTable::parse(&shown).expect("what is shown is TOML");
}

#[test]
fn certificates_and_keys_are_judged_where_they_stand() {
    check(
        "[[server.tls]]\ncert = \"cert.pem\"\nkey = \"key.pem\"\n[[server.tls]]\ncert = \"other.pem\"\nkey = \"key.pem\"",
        expect![[""]],
    );
    check(
        "[server]\nlisten = \"0.0.0.0:443\"\n[[server.tls]]\ncert = \"key.pem\"\nkey = \"key.pem\"\n\
         [[server.tls]]\ncert = \"cert.pem\"\nkey = \"cert.pem\"\n[[server.tls]]\ncert = \"empty\"\nkey = \"nope.pem\"\n\
         [[server.tls]]\ncert = \"cert.pem\"",
        expect![[r#"
            line 4: `server.tls.cert`: the file "key.pem" holds no PEM certificate: name the file that begins with -----BEGIN CERTIFICATE-----
            line 8: `server.tls.key`: the file "cert.pem" holds no private key in the clear: name the file that begins with -----BEGIN PRIVATE KEY-----
            line 10: `server.tls.cert`: is empty
            line 11: `server.tls.key`: the file "nope.pem" does not exist
            line 12: `server.tls.key` is missing here
        "#]],
    );
    check(
        "[server.tls]\ncert = \"cert.pem\"\nkey = \"key.pem\"",
        expect![[r#"
        line 1: `server.tls` may stand several times: write [[server.tls]]
    "#]],
    );
    let config = accepted("[[server.tls]]\ncert = \"cert.pem\"\nkey = \"key.pem\"");
    assert!(config.connection.tls && config.tls.len() == 1);
    assert_eq!(config.tls[0].cert_pem.expose_secret(), b"a certificate");
    // A file may hold both, so neither is shown.
    let debug = format!("{:?}", config.tls);
    let bytes = |text: &str| format!("{:?}", text.as_bytes());
    let shown = |text: &str| debug.contains(text) || debug.contains(bytes(text).trim_matches(['[', ']']));
    assert!(debug.contains("cert.pem") && !shown("a certificate") && !shown("a key"), "{debug}");
    assert!(!accepted("").connection.tls);
    let one = "[[server.tls]]\ncert = \"cert.pem\"\nkey = \"key.pem\"\n";
    assert_eq!(accepted(&one.repeat(64)).tls.len(), 64);
    check(
        &one.repeat(65),
        expect![[r#"
        line 193: [[server.tls]] stands there more than 64 times: put more names into each certificate
    "#]],
    );
}

#[test]
fn an_empty_file_has_the_defaults_of_every_part() {
    let config = accepted("");
    assert_eq!(config.limits, Limits::default());
    assert_eq!(format!("{:?}", config.connection), format!("{:?}", connection::Options::default()));
    assert_eq!(format!("{:?}", config.auth), format!("{:?}", auth::Options::default()));
    expect![[r#"
        [server]
        listen = "127.0.0.1:8080"
        plaintext = false
        trusted_proxies = []
        share_port = false
        cores = 0
        driver = "auto"
        heartbeat = "25s"
        drain = "10s"
        allowed_origins = []
        permessage_deflate = true
        playground = true
        echo = false
        state = "restcast.state"

        [admin]
        listen = "127.0.0.1:9080"
        names = []
        stream_urls = []

        [log]
        level = "info"
        format = "text"

        [limits]
        connections = 0
        connections_per_address = 0
        connections_per_subject = 0
        subscriptions_per_connection = 64
        streams = 10000
        streams_per_subject = 64
        streams_per_address = 1024
        selects_per_stream = 128
        history_bytes_total = "256MiB"
        pinned_bytes = "256MiB"
        handshakes_per_second_per_address = 0
        keep_alive = "15s"
        handshake_timeout = "10s"
        request_head_bytes_max = "16KiB"
        message_bytes_max = "64KiB"
        messages_per_second = 50
        auth_failures_per_minute = 60
        write_stall = "30s"

        [auth]
        query_token = true
        reauth_before = "60s"
        token_cache = 4096
        revocation_keep = "30d"

        [auth.jwt]
        leeway = "5s"
        cookie = "restcast_token"
        close_on_key_removal = false

        [auth.jwt.claims]
        sub = "sub"
        role = "role"
        roles = "roles"
        permissions = "permissions"
        streams = "streams"
    "#]]
    .assert_eq(&config.masked_toml());
}

#[test]
fn a_stream_has_the_defaults_of_the_example_file() {
    let config = accepted("[[stream]]\nid = \"leads\"\nurl = \"https://h/a\"\n");
    let shown = config.masked_toml();
    let stream = shown.split_once("[[stream]]").expect("the stream is shown").1;
    expect![[r#"

        id = "leads"
        url = "https://h/a"
        interval = "1s"
        method = "GET"
        headers = {}
        params = []
        params_pattern = {}
        connect_timeout = "3s"
        first_byte_timeout = "10s"
        timeout = "15s"
        response_bytes_max = "16MiB"
        backoff_max = "60s"
        linger = "10s"
        keep_warm = false
        history = 1024
        history_bytes = "4MiB"
        ignore = []
        hash = false
        allow_anonymous = false
        roles = []
        permissions = []
        kind = "poll"
        respect_max_age = false
        pages_max = 1
        redirects_max = 0
        utc_offset = "+00:00"
    "#]]
    .assert_eq(stream);
}

#[test]
fn every_default_is_of_its_keys_form_and_shown_as_written() {
    let api_key = format!("[[auth.api_key]]\nid = \"k\"\nhash = {HASH:?}\nstreams = [\"s\"]\n");
    let tables = "[redis]\nurl = \"redis://h\"\n[auth.session]\nsecrets = [\"a\"]\n[direct]\nallow_public = false\n[proxy]\nurl = \"http://h\"\n";
    let set = "[[auth.jwt.jwks]]\nissuer = \"i\"\nfile = \"jwks.json\"\n";
    let windows = "windows = [{ from = \"01:00\", to = \"02:00\" }]";
    let sse = "[[stream]]\nid = \"t\"\nurl = \"https://h\"\nkind = \"sse\"\n[[upstream]]\norigin = \"https://h\"\n";
    let auth = "kind = \"oauth2\"\ntoken_url = \"https://h\"\nclient_id = \"c\"\nclient_secret = \"s\"\n";
    let stream = format!("{sse}[[stream]]\nid = \"s\"\nurl = \"https://h\"\n{windows}\n[stream.auth]\n{auth}");
    let action = format!("[[action]]\ntype = \"t\"\nurl = \"https://h\"\n[action.auth]\n{auth}");
    let shown = accepted(&format!("{KEY}{set}{api_key}{tables}{stream}{action}")).masked_toml();
    for key in KEYS {
        let name = key.path.rsplit('.').next().expect("a path has a last part");
        if let Preset::Is(default) = key.default {
            assert!(shown.contains(&format!("\n{name} = {default}\n")), "{} = {default}", key.path);
        }
    }
}

#[test]
fn sessions_need_redis_secrets_and_pointers() {
    let with = |lines: &str| format!("[redis]\nurl = \"redis://127.0.0.1\"\n[auth.session]\n{lines}");
    check(&with("secrets = [\"0123456789abcdef\", \"env:SECRET\"]"), expect![[""]]);
    check(
        "[auth.session]\nsecrets = [\"0123456789abcdef\"]",
        expect![[r#"
        line 2: [auth.session] needs [redis], where the sessions are
    "#]],
    );
    check(
        &with("touch = true"),
        expect![[r#"
        line 4: `auth.session.secrets` is missing: the cookies of a session are signed, and nothing verifies them without it
    "#]],
    );
    check(
        &with("secrets = []"),
        expect![[r#"
        line 4: `auth.session.secrets` is missing: the cookies of a session are signed, and nothing verifies them without it
    "#]],
    );
    check(
        &with("secrets = [\"0123456789abcdef\", 7, \"env:NONE\"]"),
        expect![[r#"
        line 4: `auth.session.secrets` has the type integer: write an array of strings: each the secret itself, env:NAME, file:PATH, b64:… or hex:…
        line 4: `auth.session.secrets`: the environment variable "NONE" is not set
    "#]],
    );
    check(
        &with("secrets = [\"keyboard cat\"]"),
        expect![[r#"
        warning line 4: `auth.session.secrets` has one of 12 bytes: use at least 16 random ones
    "#]],
    );
    let odd = "user = \"\"\nrole = \"userRole\"\ncompany = \"/a~2\"\npermissions = \"/p\"";
    check(
        &with(&format!("secrets = [\"0123456789abcdef\"]\n{odd}")),
        expect![[r#"
        line 5: `auth.session.user`: is empty
        line 6: `auth.session.role` is no JSON pointer into the record (RFC 6901): write it as in "/userId"
        line 7: `auth.session.company` is no JSON pointer into the record (RFC 6901): write it as in "/userId"
    "#]],
    );
    check(
        &with("secrets = [\"0123456789abcdef\"]\ncookie = \"a b\""),
        expect![[r#"
        line 5: `auth.session.cookie` must be a cookie name, and another than `auth.jwt.cookie`
    "#]],
    );
    check(
        &with("secrets = [\"0123456789abcdef\"]\ncookie = \"restcast_token\""),
        expect![[r#"
        line 5: `auth.session.cookie` must be a cookie name, and another than `auth.jwt.cookie`
    "#]],
    );
    check(
        &with("secrets = [\"0123456789abcdef\"]\nreread = \"99ms\""),
        expect![[r#"
        line 5: `auth.session.reread`: must be from 100ms to 1d
    "#]],
    );
    // Whoever has a session may watch: nobody is warned of a stream that nobody could.
    let stream = "[[stream]]\nid = \"s\"\nurl = \"https://h\"";
    check(&with(&format!("secrets = [\"0123456789abcdef\"]\n{stream}")), expect![[""]]);
}

#[test]
fn direct_mode_is_off_unless_something_is_said_of_it() {
    assert_eq!(accepted("").direct, None);
    assert_eq!(accepted("[direct]\n").direct, None, "an empty table says nothing");
    let direct = accepted("[direct]\nallow_public = true\n").direct.expect("it is on");
    assert_eq!(*direct.policy, crate::guard::Policy::public());
    let text = r#"
[direct]
allow = ["https://API.example.com", "http://10.0.0.5:8080/v*/x", "https://*.a.bc:*/"]
cookies = true
roles = ["developer"]
interval_min = "1s"
sessions_per_subject = 2
session_ttl_max = "10m"
linger = "5s"
"#;
    let shown = accepted(text).masked_toml();
    expect![[r#"
        [direct]
        allow = ["https://api.example.com/*", "http://10.0.0.5:8080/v*/x", "https://*.a.bc:*/"]
        allow_public = false
        cookies = true
        roles = ["developer"]
        interval_min = "1s"
        sessions_per_subject = 2
        session_ttl_max = "10m"
        linger = "5s"
        response_bytes_max = "1MiB"
        timeout = "15s"
    "#]]
    .assert_eq(shown.get(shown.find("[direct]").expect("it is shown")..).unwrap_or_default());
    assert_eq!(accepted(&shown).direct, accepted(text).direct);
    check(
        "[direct]\nroles = [\"a\"]",
        expect![[r#"
        warning line 2: [direct] reaches nothing: list targets in `allow`, or set `allow_public`
    "#]],
    );
    check(
        "[direct]\nallow = [\"api.example.com\", \"https://*/\",\n\"https://a.bc:0/\", \"https://u@a.bc/\"]\nsession_ttl_max = \"1ms\"",
        expect![[r#"
        line 2: `direct.allow`: "api.example.com" must begin with http:// or https:// and a host, as in "https://api.example.com/*"
        line 2: `direct.allow`: "https://*/" has no host that could be: write a name, an address, or `*.` and the domain that all names are below
        line 3: `direct.allow`: "https://a.bc:0/" has no port that could be: write a number from 1 to 65535, or `*` for any
        line 3: `direct.allow`: "https://u@a.bc/" has a user, a query or a fragment, which are not matched: leave them out
        line 4: `direct.session_ttl_max`: must be from 1s to 366d
    "#]],
    );
    let many = |count: usize| format!("[direct]\nallow = [{}]", "\"http://a.bc\",".repeat(count));
    check(&many(crate::limits::ALLOW_PATTERNS_MAX), expect![[""]]);
    assert!(parse(&many(crate::limits::ALLOW_PATTERNS_MAX + 1)).is_err());
}

#[test]
fn session_secrets_are_not_shown() {
    let text = "[redis]\nurl = \"redis://h\"\n[auth.session]\nsecrets = [\"KEYBOARD-CAT-0123\", \"file:secret\"]\n";
    let config = accepted(text);
    assert!(config.masked_toml().contains("[auth.session]\nsecrets = [\"***\", \"***\"]\n"));
    let debug = format!("{config:?}");
    assert!(!debug.contains("KEYBOARD") && !debug.contains(FILE_SECRET), "{debug}");
    let session = config.auth.session.expect("it is configured");
    let cookie = crate::auth::session::CookieSecrets::new(&[crate::secret::Secret::new(FILE_SECRET)]).cookie("a");
    let cookie = cookie.expect("there is a secret");
    assert!(session.secrets.session_id(cookie.as_bytes()).is_ok(), "the second secret verifies as well");
}

#[test]
fn redis_needs_a_url_and_three_channels() {
    check("[redis]\nurl = \"redis://127.0.0.1:6379/0\"", expect![[""]]);
    check(
        "[redis]\ntimeout = \"2s\"",
        expect![[r#"
        line 2: `redis.url` is missing here
    "#]],
    );
    check(
        "[redis]\nurl = \"http://ada:hunter2@h\"\ntimeout = \"21s\"\nca = \"secret\"\nchannel_logout = \"token-revoked\"",
        expect![[r#"
            line 2: `redis.url` has a scheme other than redis:// and rediss:// (TLS)
            line 3: `redis.timeout`: must be from 10ms to 20s
            line 4: `redis.ca` names a file without a PEM certificate
            line 5: `redis.channel_logout`, `channel_permissions` and `channel_revoked` must be three names: each means its own
        "#]],
    );
    check(
        "[redis]\nurl = \"redis://ada:hunter2@h\"\nca = \"ca.pem\"",
        expect![[r#"
        warning line 2: `redis.url` sends its password in the clear to another machine: use rediss://
        warning line 3: `redis.ca` has no effect with a redis:// URL: use rediss://
    "#]],
    );
    check("[redis]\nurl = \"redis://ada:hunter2@localhost\"", expect![[""]]);
    check(
        "[redis]\nurl = \"env:NOPE\"\nca = \"nope.pem\"",
        expect![[r#"
            line 2: `redis.url`: the environment variable "NOPE" is not set
            line 3: `redis.ca`: the file "nope.pem" does not exist
        "#]],
    );
    assert!(accepted("").redis.is_none());
}

#[test]
fn a_key_that_signs_has_a_name_and_a_secret_as_long_as_the_hash() {
    let with = |keys: &str| format!("[[stream]]\nid = \"a\"\nurl = \"https://h\"\nallow_anonymous = true\n{keys}");
    let secret = "s".repeat(32);
    check(&with(&format!("hash = true\n[stream.sign]\nkey_id = \"k\"\nsecret = \"{secret}\"")), expect![[""]]);
    check(
        &with("[stream.sign]\nkey_id = \"a b\"\nsecret = \"short\""),
        expect![[r#"
        line 6: `stream.sign.key_id` has 1 to 64 of the characters A-Z a-z 0-9 . _ : ~ -
    "#]],
    );
    check(
        &with("[stream.sign]\nkey_id = \"k\"\nsecret = \"short\""),
        expect![[r#"
        line 7: `stream.sign.secret` has 5 bytes, and HMAC-SHA-256 needs at least 32
    "#]],
    );
    check(
        &with("[stream.sign]\nkey_id = \"k\""),
        expect![[r#"
        line 6: `stream.sign.secret` is missing here
    "#]],
    );
    check(
        &with(&format!("[stream.sign]\nsecret = \"{secret}\"")),
        expect![[r#"
        line 6: `stream.sign.key_id` is missing here
    "#]],
    );
    check(
        &with(&format!("filter = \"{}\"", " ".repeat(crate::limits::FILTER_BYTES_MAX + 1))),
        expect![[r#"
        line 5: `stream.filter`: a filter has at most 4096 bytes
    "#]],
    );
}

#[test]
fn all_errors_come_at_once_each_with_its_line() {
    check(
        r#"
[server]
listen = "0.0.0.0:80"
heartbeet = "25s"
heartbeat = 25
cores = 1025
driver = "kqueue"
trusted_proxies = [
  "10.0.0.0/8",
  "proxy",
]
[limits]
message_bytes_max = "64kB"
keep_alive = "15"
[rediss]
url = "redis://user:pass@127.0.0.1/"
[[stream]]
url = "https://h/{query.region}"
interval = "0ms"
[[stream]]
id = "a/b"
url = "https://{claims.host}/"
respect_max_age = true
auth = { kind = "bearer" }
"#,
        expect![[r#"
            line 3: `server.listen` 0.0.0.0:80 is reachable from other machines without TLS: add [[server.tls]] with `cert` and `key`, listen on 127.0.0.1, or set `server.plaintext = true` if a proxy in front ends TLS
            line 4: unknown key `server.heartbeet`; the nearest known one is `server.heartbeat`
            line 5: `server.heartbeat` has the type integer: write a string such as "250ms" or "5s"
            line 6: `server.cores`: must be from 0 to 1024
            line 7: `server.driver`: "kqueue" is not known here: write "auto" or "io_uring" or "epoll"
            line 10: `server.trusted_proxies`: "proxy" is not a network: write ADDRESS/BITS, as in "10.0.0.0/8"
            line 13: `limits.message_bytes_max`: "64kB" is not a size: write a whole number and KiB, MiB or GiB, as in "64KiB", or an integer of bytes
            line 14: `limits.keep_alive`: "15" is not a duration: write a whole number and ms, s, m, h or d, as in "250ms" or "5s"
            line 15: unknown key `rediss`; the nearest known one is `redis`
            line 17: `stream.id` is missing here
            line 18: `stream.url`: {query.region} needs "region" in `params`
            line 19: `stream.interval`: must be from 1ms to 366d
            line 21: `stream.id` must have 1 to 128 of the characters A-Z a-z 0-9 . _ : ~ -
            line 22: `stream.url`: {claims.host} may only stand in a path segment or a query value, not in the scheme, host, port, user, query name or fragment
            line 24: `stream.auth.token` is missing, and kind = "bearer" needs it
        "#]],
    );
}

#[test]
fn text_that_is_no_toml_is_told_by_line() {
    check(
        "[server]\nlisten = \nheartbeat = \"25s\nx\n",
        expect![[r#"
        line 2: not TOML: string values must be quoted, expected literal string
        line 3: not TOML: invalid basic string, expected `"`
        line 4: not TOML: key with no value, expected `=`
    "#]],
    );
    check(
        "[server]\n[server]\n",
        expect![[r#"
        line 2: not TOML: duplicate key
    "#]],
    );
    check(
        "[a]\nb = 1\nb = 2\n[[a]]\n",
        expect![[r#"
        line 3: not TOML: duplicate key
        line 4: not TOML: duplicate key
    "#]],
    );
}

#[test]
fn tables_stand_as_often_as_they_may() {
    check(
        "[stream]\nid = \"a\"\n",
        expect![[r#"
        line 1: `stream` may stand several times: write [[stream]]
    "#]],
    );
    check(
        "[[server]]\n",
        expect![[r#"
            line 1: `server` has the type array: write a table
        "#]],
    );
    check(
        "server = 1\nstream = [1]\nlimits.connections = []\n",
        expect![[r#"
            line 1: `server` has the type integer: write a table
            line 2: `stream` has the type integer: write a table
            line 3: `limits.connections` has the type array: write an integer
        "#]],
    );
    check(
        "\"server.listen\" = \"127.0.0.1:0\"\n",
        expect![[r#"
        line 1: unknown key `server.listen`; the nearest known one is `server`
    "#]],
    );
    check("stream = [{ id = \"a\", url = \"https://h\", allow_anonymous = true }]", expect![[r#""#]]);
}

#[test]
fn listeners_are_not_exposed_by_mistake() {
    let at = |listen: &str, more: &str| format!("[server]\nlisten = \"{listen}\"\n{more}");
    check(
        &at("0.0.0.0:80", ""),
        expect![[r#"
            line 2: `server.listen` 0.0.0.0:80 is reachable from other machines without TLS: add [[server.tls]] with `cert` and `key`, listen on 127.0.0.1, or set `server.plaintext = true` if a proxy in front ends TLS
        "#]],
    );
    check(
        &at("[::]:80", "plaintext = true\necho = true\n"),
        expect![[r#"
        line 4: `server.echo` needs no credential and is refused beyond loopback: set it to false or listen on 127.0.0.1
    "#]],
    );
    check(
        &at("127.0.0.1:9080", ""),
        expect![[r#"
        line 1: `admin.listen` is the same address as `server.listen`: give it another port
    "#]],
    );
    check(&at("127.0.0.1:0", "echo = true\n[admin]\nlisten = \"127.0.0.1:0\""), expect![[r#""#]]);
    check(&at("[::ffff:127.0.0.1]:80", ""), expect![[r#""#]]);
    check(
        &at("[::]:80", "plaintext = true\n[admin]\nlisten = \"0.0.0.0:81\"\nkey = \"short\""),
        expect![[r#"
        warning line 5: `admin.listen` is reachable from other machines: /metrics is open to them, and the key travels in the clear
        warning line 6: `admin.key` has 5 bytes: use at least 16 random ones
    "#]],
    );
    let shared = |bytes: usize| format!("[redis]\nurl = \"redis://127.0.0.1\"\n[admin]\nkey = {:?}", "k".repeat(bytes));
    check(
        &shared(31),
        expect![[r#"
        warning line 4: `admin.key` has 31 bytes: with `[redis]`, connections of other processes are listed under 32 or more
    "#]],
    );
    check(&shared(32), expect![[r#""#]]);
    for key in ["a key with spaces in it", "sixteen=in=the=middle", "schlüssel-mit-umlauten"] {
        check(
            &format!("[admin]\nkey = {key:?}"),
            expect![[r#"
        line 2: `admin.key` cannot be sent as a bearer token: use letters, digits and `-._~+/`, `=` at the end only
    "#]],
        );
    }
    check("[admin]\nkey = \"sixteen.or-more_of~these+/==\"", expect![[r#""#]]);
    check(
        "[admin]\nnames = [\"a b\", \"c:1\"]\nkey = \"env:NOPE\"",
        expect![[r#"
            line 2: `admin.names` has an entry that is no host name: write it as in "restcast.internal", without a port
            line 2: `admin.names` has an entry that is no host name: write it as in "restcast.internal", without a port
            line 3: `admin.key`: the environment variable "NOPE" is not set
        "#]],
    );
}

#[test]
fn origins_are_checked_one_by_one() {
    check(
        "[server]\npublic_origin = \"https://h/\"\nallowed_origins = [\"*\", \"null\",\n\"https://ok.example\", 1]\n",
        expect![[r#"
            line 2: `server.public_origin`: browsers write this origin as "https://h"
            line 4: `server.allowed_origins` has the type integer: write an array of strings
        "#]],
    );
    check(
        "[server]\nallowed_origins = [\"*\",\n\"https://ok.example\", \"HTTPS://h\"]\n",
        expect![[r#"
            line 2: `server.allowed_origins`: "*" would let every site in with its visitors' cookies: list the origins
            line 3: `server.allowed_origins`: browsers write this origin as "https://h"
        "#]],
    );
}

#[test]
fn keys_must_be_as_long_as_the_hash() {
    let key =
        |alg: &str, bytes: usize| format!("[[auth.jwt.key]]\nalg = \"{alg}\"\nsecret = \"{}\"\n", "k".repeat(bytes));
    for (alg, least) in [("HS256", 32), ("HS384", 48), ("HS512", 64)] {
        assert_eq!(accepted(&key(alg, least)).jwt_keys.len(), 1);
        let problem = Problem::WeakKey { alg: alg.into(), bytes: least - 1, bytes_min: least };
        assert_eq!(parse(&key(alg, least - 1)).err(), Some(vec![ConfigError { line: 3, problem }]));
    }
    check(
        "[[auth.jwt.key]]\nkid = \"a\"\n",
        expect![[r#"
            line 1: `auth.jwt.key.alg` is missing here
        "#]],
    );
    check(
        "[[auth.jwt.key]]\nalg = \"RS256\"\npublic_key = \"file:k.pem\"\nsecret = \"file:forbidden\"",
        expect![[r#"
            line 3: `auth.jwt.key.public_key`: the file "k.pem" does not exist
            line 4: `auth.jwt.key.secret`: the file "forbidden" may not be read by this user
        "#]],
    );
    check(
        "[[auth.jwt.key]]\nalg = \"HS512\"\n[[auth.jwt.key]]\nalg = \"EdDSA\"\n[[auth.jwt.key]]\nalg = \"ES512\"\n\
         [[auth.jwt.key]]\nalg = \"HS256\"\npublic_key = \"file:p256.pem\"\n\
         [[auth.jwt.key]]\nalg = \"HS256\"\nsecret = \"file:p256.pem\"\n\
         [[auth.jwt.key]]\nalg = \"ES384\"\npublic_key = \"file:p256.pem\"\n\
         [[auth.jwt.key]]\nalg = \"RS256\"\npublic_key = \"file:rsa1024.pem\"\n\
         [[auth.jwt.key]]\nalg = \"ES256\"\npublic_key = \"file:private.pem\"\n\
         [[auth.jwt.key]]\nalg = \"ES256\"\npublic_key = \"file:forbidden\"\n\
         [[auth.jwt.key]]\nalg = \"ES256\"\npublic_key = \"env:SECRET\"\n",
        expect![[r#"
            line 1: `auth.jwt.key.secret` is missing here
            line 3: `auth.jwt.key.public_key` is missing here
            line 6: `auth.jwt.key.alg`: "ES512" is not known here: write "HS256" or "HS384" or "HS512" or "RS256" or "RS384" or "RS512" or "PS256" or "PS384" or "PS512" or "ES256" or "ES384" or "EdDSA"
            line 9: HS256 verifies with a shared secret: a public key there would let everyone sign (RFC 8725 section 2.1); write another `alg`
            line 12: `auth.jwt.key`: the secret looks like a PEM document, which must not be used as a secret of HS256 (RFC 8725 section 2.1)
            line 15: `auth.jwt.key`: the public key is P-256, ES384 needs P-384
            line 18: `auth.jwt.key.public_key` is an RSA key of 1024 bits, from 2048 to 8192 are accepted (RFC 7518 section 3.3)
            line 21: `auth.jwt.key.public_key` is a private key: name the public one, and let nobody see this
            line 24: `auth.jwt.key.public_key`: the file "forbidden" may not be read by this user
            line 27: `auth.jwt.key.public_key` is no public key: write PEM (-----BEGIN PUBLIC KEY-----), DER or a JSON Web Key
        "#]],
    );
    let twice = format!("{KEY}kid = \"a\"\n{KEY}kid = \"a\"\n");
    check(
        &twice,
        expect![[r#"
        line 5: the key of line 1 has the same `kid` and `alg`: give each key its own `kid`
    "#]],
    );
    assert_eq!(
        accepted(&format!("{KEY}{}", KEY.replace("HS256", "HS384"))).jwt_keys.len(),
        2,
        "keys without kid may rotate"
    );
    check(
        "[auth.jwt]\ncookie = \"a b\"\nleeway = \"2h\"\nissuer = []\naudience = \"\"\n",
        expect![[r#"
            line 2: `auth.jwt.cookie` is not a cookie name: use letters, digits, `-` and `_`
            line 3: `auth.jwt.leeway`: must be from 0s to 1h
            line 5: `auth.jwt.audience`: is empty
        "#]],
    );
}

/// The hash of some API key.
const HASH: &str = "sha256:hunter2-hunter2:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

#[test]
fn api_keys_are_checked() {
    let key = |lines: &str| format!("[[auth.api_key]]\n{lines}\n");
    let good = key(&format!("id = \"a\"\nhash = {HASH:?}\nstreams = [\"leads\"]"));
    let keys = accepted(&format!("{good}{}", good.replace("\"a\"", "\"b\""))).api_keys;
    assert_eq!(keys.iter().map(|key| key.id.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!((keys[0].expires, keys[0].rate, keys[0].created), (None, 0, None));
    check(&format!("{good}[[stream]]\nid = \"leads\"\nurl = \"https://h\"\n"), expect![[r#""#]]);
    check(
        &format!("{good}{good}"),
        expect![[r#"
            line 6: `auth.api_key.id` "a" is taken by the key of line 2: give each key its own
        "#]],
    );
    check(
        &key(""),
        expect![[r#"
            line 1: `auth.api_key.id` is missing here
            line 1: `auth.api_key.hash` is missing here
            line 1: `auth.api_key.streams` is missing here
        "#]],
    );
    check(
        &key("id = \"a/b\"\nhash = \"hunter2\"\nstreams = [\n\"leads\",\n\"a b\",\n]\nexpires = 2027-01-01\nrate = -1"),
        expect![[r#"
            line 2: `auth.api_key.id` must have 1 to 64 of the characters A-Z a-z 0-9 . _ : ~ -
            line 3: `auth.api_key.hash` is not of the form sha256:<salt>:<hash>, a salt of 8 to 64 letters, digits, - or _ and 64 hexadecimal digits
            line 6: `auth.api_key.streams` has an entry that is no stream: write an id, or a glob such as "orders:*"
            line 8: `auth.api_key.expires`: 2027-01-01 is not a moment: write date, time and offset, as in 2027-01-01T00:00:00Z
            line 9: `auth.api_key.rate`: must be from 0 to 4294967295
        "#]],
    );
    check(
        &key(&format!("id = \"a\"\nhash = {HASH:?}\nstreams = []\nexpires = \"2027-01-01T00:00:00Z\"")),
        expect![[r#"
            line 4: `auth.api_key.streams`: is empty
            line 5: `auth.api_key.expires` has the type string: write a date-time such as 2027-01-01T00:00:00Z, without quotes
        "#]],
    );
    let many = |n: usize| key(&format!("id = \"a\"\nhash = {HASH:?}\nstreams = {:?}", vec!["s"; n]));
    assert!(parse(&many(64)).is_ok() && parse(&many(65)).is_err());
    let roles = |n: usize| format!("{good}roles = [{:?}]", "r".repeat(n));
    assert!(parse(&roles(128)).is_ok() && parse(&roles(129)).is_err());
}

#[test]
fn key_sets_are_checked() {
    let set = |lines: &str| format!("[[auth.jwt.jwks]]\nissuer = \"i\"\naudience = \"a\"\n{lines}\n");
    let said_of = |lines: &str| match parse(&set(lines)) {
        Ok((_, warnings)) => warnings.iter().map(|w| format!("warning {w}\n")).collect::<String>(),
        Err(errors) => errors.iter().map(|e| format!("{e}\n")).collect(),
    };
    for good in [
        "url = \"https://idp.example/jwks\"",
        "url = \"http://127.0.0.1:8080/jwks\"",
        "url = \"http://[::1]/jwks\"",
        "url = \"http://localhost/jwks\"",
        "file = \"jwks.json\"",
        "file = \"jwks.json\"\nalgs = [\"ES256\", \"EdDSA\", \"EdDSA\"]",
    ] {
        assert_eq!(said_of(good), "", "{good}");
    }
    let said: String = [
        "",
        "url = \"https://h/\"\nfile = \"jwks.json\"",
        "url = \"idp.example\"",
        "url = \"ftp://h/\"",
        "url = \"http://idp.example/jwks\"",
        "url = \"http://10.0.0.1/jwks\"",
        "url = \"https://u:p@h/\"",
        "url = \"https://h/#f\"",
        "url = \"https://h/\"\nalgs = [\"HS256\", \"none\", \"RS256\"]",
        "url = \"https://h/\"\nalgs = []",
        "url = \"https://h/\"\nca = \"secret\"",
        "url = \"http://localhost/\"\nca = \"ca.pem\"",
        "file = \"nope\"",
        "file = \"secret\"",
        "file = \"jwks.json\"\nalgs = [\"ES256\"]",
        "url = 7",
    ]
    .map(said_of)
    .concat();
    expect![[r#"
        line 1: [[auth.jwt.jwks]] needs one of `url` and `file`, not none
        line 1: [[auth.jwt.jwks]] needs one of `url` and `file`, not both
        line 4: `auth.jwt.jwks.url` is no URL: write it as in "https://idp.example/.well-known/jwks.json"
        line 4: `auth.jwt.jwks.url` is neither https:// nor http:// on this machine
        line 4: `auth.jwt.jwks.url` is http:// beyond this machine, where anybody on the way could put in keys: write https://
        line 4: `auth.jwt.jwks.url` is http:// beyond this machine, where anybody on the way could put in keys: write https://
        line 4: `auth.jwt.jwks.url` has a user, a password or a fragment: a key set is public, write it without
        line 4: `auth.jwt.jwks.url` has a user, a password or a fragment: a key set is public, write it without
        line 5: `auth.jwt.jwks.algs` has "HS256": write some of RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384 and EdDSA
        line 5: `auth.jwt.jwks.algs` has "none": write some of RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384 and EdDSA
        line 5: `auth.jwt.jwks.algs` has none: write some of RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384 and EdDSA
        line 5: `auth.jwt.jwks.ca` names a file without a PEM certificate
        warning line 1: the key set of "i": `ca` has no effect without an https:// URL
        line 4: `auth.jwt.jwks.file`: the file "nope" does not exist
        line 4: `auth.jwt.jwks.file`: the file "secret" is no key set: it is not JSON
        line 4: `auth.jwt.jwks.file`: the file "jwks.json" holds no key that can be used with `algs`
        line 4: `auth.jwt.jwks.url` has the type integer: write a string
    "#]].assert_eq(&said);
    check(
        &format!("[auth.jwt]\nissuer = [\"i\", \"j\"]\n{}{}", set("file = \"jwks.json\""), set("file = \"jwks.json\"")),
        expect![[r#"
            line 8: the key set of line 3 is of the same `issuer`: keep one
        "#]],
    );
    check(
        "[auth.jwt]\nissuer = [\"i\", \"j\"]\n[[auth.jwt.jwks]]\nissuer = \"i\"\nfile = \"jwks.json\"\n[[auth.jwt.jwks]]\nfile = \"jwks.json\"",
        expect![[r#"
            line 6: `auth.jwt.jwks.issuer` is missing here
        "#]],
    );
    check(
        "[auth.jwt]\nissuer = [\"i\", \"j\"]\n[[auth.jwt.jwks]]\nissuer = \"i\"\nfile = \"jwks.json\"\n",
        expect![[r#"
            warning line 2: `auth.jwt.issuer` names "i", whose tokens [[auth.jwt.jwks]] alone verifies: it has no effect
            warning line 3: the key set of "i" has no `audience`: tokens that this issuer made for other services are accepted (RFC 8725 section 3.9)
        "#]],
    );
    let many: String = (0..=crate::limits::ISSUERS_MAX)
        .map(|n| format!("[[auth.jwt.jwks]]\nissuer = \"{n}\"\naudience = \"a\"\nfile = \"jwks.json\"\n"))
        .collect();
    check(
        &many,
        expect![[r#"
        line 257: [[auth.jwt.jwks]] stands there more than 64 times
    "#]],
    );
    let sets = accepted(&set("file = \"jwks.json\"")).auth.jwt.key_sets;
    assert_eq!(sets[0].keys.as_ref().map(|keys| keys.iter().count()), Some(1));
}

#[test]
fn streams_are_checked() {
    check_stream("keep_warm = true", expect![[r#""#]]);
    check_stream(
        "interval = \"99ms\"",
        expect![[r#"
        warning: stream "s": `interval` is under 100ms: the upstream gets over ten requests a second
    "#]],
    );
    check_stream("interval = \"100ms\"", expect![[r#""#]]);
    check_stream(
        "method = \"get\"",
        expect![[r#"
        `stream.method` must be GET or POST
    "#]],
    );
    // What would change something, over and over.
    check_stream(
        "method = \"DELETE\"",
        expect![[r#"
        `stream.method` must be GET or POST
    "#]],
    );
    check_stream("method = \"POST\"", expect![[r#""#]]);
    check_stream(
        "method = \"HEAD\"",
        expect![[r#"
        `stream.method` must be GET or POST
    "#]],
    );
    check_stream(
        "body = \"x\"",
        expect![[r#"
        warning: stream "s": a `body` with GET is ignored or refused by many servers
    "#]],
    );
    check_stream(
        "method = \"POST\"\nbody = \"x{claims.a}\"",
        expect![[r#"
            `stream.body`: has placeholders and must be JSON with each of them where a value may stand
        "#]],
    );
    check_stream(
        "connect_timeout = \"16s\"\nfirst_byte_timeout = \"16s\"",
        expect![[r#"
        warning: stream "s": `connect_timeout` is over `timeout`, which ends the exchange before
        warning: stream "s": `first_byte_timeout` is over `timeout`, which ends the exchange before
    "#]],
    );
    check_stream(
        "ca = \"nope.pem\"",
        expect![[r#"
            `stream.ca`: the file "nope.pem" does not exist
        "#]],
    );
    check_stream(
        "ca = \"secret\"",
        expect![[r#"
        `stream.ca` names a file without a PEM certificate
    "#]],
    );
    check_stream(
        "ignore = [\"generated_at\", \"/a~2\"]",
        expect![[r#"
        `stream.ignore` has an entry that is no JSON pointer (RFC 6901): write it as in "/generated_at"
        `stream.ignore` has an entry that is no JSON pointer (RFC 6901): write it as in "/generated_at"
    "#]],
    );
    check_stream(
        "history = 1_000_001\nresponse_bytes_max = 0",
        expect![[r#"
            `stream.history`: must be from 0 to 1000000
            `stream.response_bytes_max`: must be from 1 to 1073741824 bytes
        "#]],
    );
    check_stream(
        "allow_anonymous = true\nroles = [\"a\"]",
        expect![[r#"
        warning: stream "s": `allow_anonymous` has no effect, for an anonymous caller has no role
    "#]],
    );
    check_stream(
        "allow_anonymous = true\nmethod = \"POST\"\nbody = \"{claims.a}\"",
        expect![[r#"
        warning: stream "s": `allow_anonymous` has no effect, for an anonymous caller has no claim "a"
    "#]],
    );
    check_stream(
        "roles = \"a\"",
        expect![[r#"
            `stream.roles` has the type string: write an array of strings
        "#]],
    );
}

#[test]
fn headers_cannot_bend_the_request() {
    check_stream(
        "headers = { Host = \"h\", \"content-length\" = \"1\", \"a b\" = \"c\" }",
        expect![[r#"
        `stream.headers.Host` is set by restcast itself and cannot be configured
        `stream.headers.content-length` is set by restcast itself and cannot be configured
        `stream.headers` has a name that is no header name: use letters, digits and `-`
    "#]],
    );
    check_stream(
        "headers = { A = \"x\\r\\nB: y\", B = \" y\", C = \"{claims.a}\", D = 1, E = \"\" }",
        expect![[r#"
            `stream.headers.D` has the type integer: write a string
            `stream.headers.E`: is empty
        "#]],
    );
    check_stream(
        "headers = { A = \"x\\r\\nB: y\", B = \" y\", C = \"{claims.a}\", c = \"1\", C2 = \"1\" }",
        expect![[r#"
        `stream.headers.A` has a control character in its value, or a blank at its beginning or end
        `stream.headers.B` has a control character in its value, or a blank at its beginning or end
        `stream.headers.C` has a placeholder: they may stand in `url` and `body` only
    "#]],
    );
    check_stream(
        "headers = { A = \"1\", a = \"2\", \"\" = \"3\" }",
        expect![[r#"
        `stream.headers.a` stands there twice: header names do not differ by case
        `stream.headers` has a name that is no header name: use letters, digits and `-`
    "#]],
    );
    let many = |n: usize| {
        let members: Vec<String> = (0..n).map(|i| format!("h{i} = \"v\"")).collect();
        format!("headers = {{ {} }}", members.join(", "))
    };
    check_stream(&many(32), expect![[r#""#]]);
    check_stream(
        &many(33),
        expect![[r#"
            `stream.headers`: has over 32 members
        "#]],
    );
    let long = |n: usize| format!("headers = {{ A = \"{}\" }}", "v".repeat(n));
    check_stream(&long(8192), expect![[r#""#]]);
    check_stream(
        &long(8193),
        expect![[r#"
            `stream.headers.A`: is over 8192 bytes
        "#]],
    );
}

#[test]
fn parameters_are_checked() {
    check_stream(
        "params = [\"a\", \"a\", \"token\", \"b c\", \"z\"]",
        expect![[r#"
        `stream.params` has "a" twice
        `stream.params` has the name "token", which means something else in a stream's query: use another
        `stream.params` has the name "b c": use 1 to 128 of the characters A-Z a-z 0-9 . _ ~ -
    "#]],
    );
    check_stream(
        "params = [\"a\"]\nparams_pattern = { b = \"x\", a = \"(\" }",
        expect![[r#"
        `stream.params_pattern` has "b", which is not in `params`
        `stream.params_pattern.a` is not a regular expression: found open group without closing ')'
    "#]],
    );
    check_stream(
        "params = [\"a\"]",
        expect![[r#"
        warning: stream "s": the parameter "a" stands in no {query.a}: it changes nothing
    "#]],
    );
    let many = |n: usize| format!("params = {:?}", (0..n).map(|i| format!("p{i}")).collect::<Vec<_>>());
    assert!(parse(&format!("{KEY}[[stream]]\nid=\"s\"\nurl=\"https://h\"\n{}", many(16))).is_ok());
    check_stream(
        &many(17),
        expect![[r#"
            `stream.params`: has over 16 members
        "#]],
    );
    let pattern = |n: usize| format!("params = [\"a\"]\nparams_pattern.a = \"{}\"", "x".repeat(n));
    check_stream(
        &pattern(1024),
        expect![[r#"
        warning: stream "s": the parameter "a" stands in no {query.a}: it changes nothing
    "#]],
    );
    check_stream(
        &pattern(1025),
        expect![[r#"
            `stream.params_pattern.a`: is over 1024 bytes
        "#]],
    );
}

#[test]
fn what_only_shows_between_streams_is_checked() {
    let stream = |id: &str, more: &str| format!("[[stream]]\nid = \"{id}\"\nurl = \"http://h/{{claims.a}}\"\n{more}");
    check(
        &format!("{KEY}{}{}", stream("a", ""), stream("a", "")),
        expect![[r#"
        line 8: `stream.id` "a" is taken by the stream of line 5
    "#]],
    );
    check(
        &stream("a", ""),
        expect![[r#"
        warning line 1: stream "a": nobody can watch it: no credential is configured, such as [[auth.jwt.key]], and `allow_anonymous` is false
    "#]],
    );
    check(
        &format!("{KEY}{}", stream("a", "keep_warm = true\n")),
        expect![[r#"
        line 7: `stream.keep_warm` polls without watchers, but {claims.a} can only be filled for one: set it to false
    "#]],
    );
    check(
        &format!("{KEY}{}", stream("a", "ca = \"ca.pem\"\n")),
        expect![[r#"
        warning line 7: stream "a": `ca` has no effect with an http:// URL
    "#]],
    );
}

#[test]
fn limits_hold_at_their_value_and_not_past_it() {
    let fits = |line: &str| parse(&format!("[limits]\n{line}\n")).is_ok();
    assert!(fits("connections = 4294967295") && !fits("connections = 4294967296") && !fits("connections = -1"));
    assert!(fits("keep_alive = \"10ms\"") && !fits("keep_alive = \"9ms\""));
    assert!(fits("keep_alive = \"366d\"") && !fits("keep_alive = \"367d\""));
    assert!(fits("request_head_bytes_max = 512") && !fits("request_head_bytes_max = 511"));
    assert!(fits("message_bytes_max = \"64MiB\"") && !fits("message_bytes_max = 67108865"));
    let budgets = accepted("[limits]\nhistory_bytes_total = 0\npinned_bytes = 0\n").limits;
    assert_eq!((budgets.history_bytes_total, budgets.pinned_bytes), (u64::MAX, u64::MAX), "0 is unlimited");

    let comment = |bytes: usize| format!("#{}", "a".repeat(bytes - 1));
    assert!(parse(&comment(FILE_BYTES_MAX)).is_ok());
    let problem = Problem::FileTooLarge { limit: FILE_BYTES_MAX };
    assert_eq!(parse(&comment(FILE_BYTES_MAX + 1)).err(), Some(vec![ConfigError { line: 1, problem }]));

    let wrong = |n: usize| (0..n).map(|i| format!("k{i} = 1\n")).collect::<String>();
    assert_eq!(parse(&wrong(100)).err().map(|errors| errors.len()), Some(100));
    let errors = parse(&wrong(101)).expect_err("unknown keys");
    assert_eq!(errors.last().map(|last| last.problem.clone()), Some(Problem::Further { count: 1 }));

    let roles = |n: usize| format!("{KEY}[[stream]]\nid=\"s\"\nurl=\"https://h\"\nroles = {:?}", vec!["r"; n]);
    assert!(parse(&roles(256)).is_ok() && parse(&roles(257)).is_err());
}

#[test]
fn no_error_shows_a_secret() {
    let text = r#"
[admin]
key = "hex:hunter2"
[[auth.jwt.key]]
alg = "HS256"
secret = "hunter2"
[[auth.jwt.key]]
alg = "HS256"
secret = "b64:hunter2!"
[[auth.api_key]]
id = "a"
hash = "hunter2"
streams = ["s"]
[[stream]]
id = "s"
url = "https://ada:hunter2@h/{claims.x}{claims.y}?key=hunter2"
headers = { A = "hunter2\n" }
body = "hunter2{claims.x}"
"#;
    let errors = parse(text).expect_err("wrong all over");
    assert_eq!(errors.len(), 7, "{errors:?}");
    assert!(!format!("{errors:?} {}", errors.iter().map(ToString::to_string).collect::<String>()).contains("hunter2"));
}

/// Lines that make a file likely to be nearly right.
fn line() -> impl proptest::strategy::Strategy<Value = String> {
    use proptest::strategy::Strategy as _;
    let known = KEYS.iter().map(|key| key.path.rsplit('.').next().unwrap_or_default().to_owned());
    let name = proptest::sample::select(known.collect::<Vec<_>>());
    let value = proptest::sample::select(vec![
        "true",
        "0",
        "1024",
        "\"5s\"",
        "\"64KiB\"",
        "[]",
        "[\"a\"]",
        "{}",
        "{ a = \"env:SECRET\" }",
        "\"env:SECRET\"",
        "\"file:secret\"",
        "\"HS256\"",
        "\"https://u:p@h/{claims.a}?k=v\"",
        "\"GET\"",
        "\"redis://u:env:SECRET@h\"",
        "\"{query.a}\"",
        "nan",
        "2027-01-01",
        "2027-01-01T00:00:00Z",
        "\"sha256:env-secret:0123\"",
    ]);
    let header = proptest::sample::select(vec![
        "[server]",
        "[[stream]]",
        "[[auth.jwt.key]]",
        "[[auth.api_key]]",
        "[limits]",
        "[auth.jwt]",
        "[admin]",
        "[redis]",
    ]);
    proptest::strategy::Union::new([
        (name, value).prop_map(|(name, value)| format!("{name} = {value}\n")).boxed(),
        header.prop_map(|header| format!("{header}\n")).boxed(),
        any::<String>().boxed(),
    ])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn no_text_makes_the_parser_panic_or_tell_a_secret(lines in proptest::collection::vec(line(), 0..20)) {
        let said = match parse(&lines.concat()) {
            Ok((config, warnings)) => format!("{config:?} {} {warnings:?}", config.masked_toml()),
            Err(errors) => format!("{errors:?}"),
        };
        prop_assert!(!said.contains(ENV_SECRET) && !said.contains(FILE_SECRET));
    }
}

#[test]
fn views_say_for_whom_and_what() {
    check_stream(
        "[[stream.view]]\nroles = [\"a\"]\npointers = [\"\"]\n[[stream.view]]\nroles = [\"b\", \"a\"]\npath = \"$\"",
        expect![[""]],
    );
    check_stream(
        "[[stream.view]]\npath = \"$\"\n[[stream.view]]\nroles = []\npath = \"$\"\n[[stream.view]]\nroles = [\"a\"]\n\
         [[stream.view]]\nroles = [\"a\"]\npath = \"$\"\npointers = [\"/a\"]\n\
         [[stream.view]]\nroles = [\"a\"]\npointers = [\"a\"]\n[[stream.view]]\nroles = [\"a\"]\npointers = []\n\
         [[stream.view]]\nroles = [\"a\"]\npath = \"$.rows[\"\n[stream.views]\n",
        expect![[r#"
            `stream.view.roles` is missing here
            `stream.view.roles` is empty: name the roles that get this view
            [[stream.view]] needs either `pointers` or `path`
            [[stream.view]] needs either `pointers` or `path`
            `stream.view.pointers` has an entry that is no JSON pointer (RFC 6901): write it as in "/rows/*/name"
            `stream.view.pointers`: is empty
            `stream.view.path`: byte 7: a selector was expected: 'name', *, an index, a slice or ?filter
            unknown key `stream.views`; the nearest known one is `stream.view`
        "#]],
    );
    check_stream(
        "[[stream.view]]\nroles = [\"a\"]\npath = \"$\"\nrole = \"b\"",
        expect![[r#"
        unknown key `stream.view.role`; the nearest known one is `stream.view.roles`
    "#]],
    );
    let view = "[[stream.view]]\nroles = [\"a\"]\npath = \"$\"\n";
    check_stream(
        &format!("allow_anonymous = true\n{view}{view}"),
        expect![[r#"
        warning: stream "s": `allow_anonymous` has no effect, for an anonymous caller has no role
        warning: stream "s": nobody gets this view, as views before it are for all of its roles
    "#]],
    );
    let many: String =
        (0..crate::limits::VIEWS_MAX).map(|n| format!("[[stream.view]]\nroles = [\"r{n}\"]\npath = \"$\"\n")).collect();
    check_stream(&many, expect![[""]]);
    check_stream(
        &format!("{many}[[stream.view]]\nroles = [\"z\"]\npath = \"$\""),
        expect![[r#"
        a stream has at most 32 [[stream.view]]
    "#]],
    );
    let pointers = |count: usize| format!("[[stream.view]]\nroles = [\"a\"]\npointers = [{}]", "\"/a\",".repeat(count));
    check_stream(&pointers(crate::limits::VIEW_POINTERS_MAX), expect![[""]]);
    check_stream(
        &pointers(crate::limits::VIEW_POINTERS_MAX + 1),
        expect![[r#"
            `stream.view.pointers`: has over 64 members
        "#]],
    );
}

#[test]
fn a_stream_made_without_the_file_is_as_one_that_the_file_leaves_bare() {
    let config = accepted("[[stream]]\nid = \"s\"\nurl = \"https://h/a\"\n");
    let bare = stream::Options::new(crate::ids::StreamId::new("s").expect("an id"), config.streams[0].url.clone());
    assert_eq!(*config.streams[0], bare);
}

#[test]
fn what_is_wrong_with_a_view_is_told_beside_what_is_wrong_with_its_stream() {
    check(
        "[[stream]]\nid = \"a b\"\nurl = \"http://h/\"\n[[stream.view]]\nroles = []\npath = \"$\"\n",
        expect![[r#"
            line 2: `stream.id` must have 1 to 128 of the characters A-Z a-z 0-9 . _ : ~ -
            line 5: `stream.view.roles` is empty: name the roles that get this view
        "#]],
    );
}

#[test]
fn more_streams_of_upstreams_that_speak_one_than_the_cores_follow_are_warned_of() {
    let warned = |cores: &str, followed: usize| {
        let mut text = format!(
            "[server]\ncores = {cores}\n[[auth.jwt.key]]\nalg = \"HS256\"\nsecret = \"env:SECRET\"\n\
             [[stream]]\nid = \"polled\"\nurl = \"http://h/\"\n"
        );
        for n in 0..followed {
            let kind = if n % 2 == 0 { "sse" } else { "ndjson" };
            text.push_str(&format!(
                "[[stream]]\nid = \"f{n}\"\nurl = \"http://h/\"\nroles = [\"r\"]\nkind = {kind:?}\n"
            ));
        }
        let (_, warnings) = parse(&text).expect("a configuration");
        let said = warnings.iter().filter(|warning| matches!(warning.oddity, super::Oddity::TooManyFollowed { .. }));
        said.map(|warning| (warning.line, warning.oddity.to_string())).collect::<Vec<_>>()
    };
    let most = crate::limits::UPSTREAM_FOLLOWED_MAX;
    assert_eq!(warned("1", most), []);
    assert_eq!(warned("2", most + 2), []);
    // Eight lines before them, five of each, and its last one.
    let line = u32::try_from(8 + most * 5 + 5).expect("small");
    let said = format!(
        "{} streams have `kind = \"sse\"` or \"ndjson\", and a core follows at most {most}: with 1 `server.cores` some that \
         are watched will be UPSTREAM_UNREACHABLE",
        most + 2
    );
    assert_eq!(warned("1", most + 2), [(line, said)]);
    assert_eq!(warned("0", most + 2), [], "nobody here knows how many there are");
}
