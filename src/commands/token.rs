//! `restcast token`: mints a token for development.
//!
//! Source: protocol version 1, section 7. Memory: one token, at most `limits::TOKEN_BYTES_MAX`, so that what is minted
//! can be presented. Errors: [`TokenError`], the fault of who typed the command. Not here: the clock, printing (`main`).

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ring::rand::SecureRandom;
use serde_json::Value;

use crate::auth::jwt::{self, DATE_SECS_MAX, JwtError};
use crate::auth::keys::Algorithm;
use crate::auth::members;
use crate::auth::signing::{SigningError, SigningKey};
use crate::secret::Secret;
use crate::time::WallTime;

/// Most bytes of a secret file that are read.
const SECRET_FILE_BYTES_MAX: u64 = 64 << 10;

/// What the command line says.
#[derive(Clone, Debug)]
pub struct TokenOptions {
    /// `--sub`.
    pub sub: Option<String>,
    /// `--expires-in`: from the whole second of `iat` to `exp`.
    pub expires_in: Duration,
    /// Each `--claim`, as typed: `name=value`. A value that is JSON stands as it is, any other is a string. A claim of the
    /// command's own (`sub`, `iat`, `exp`) is replaced.
    pub claims: Vec<String>,
    /// `--alg`.
    pub algorithm: Algorithm,
    /// `--secret-file`: the shared secret, as `file:` in a configuration reads it (a text without a newline at its end); or for
    /// an asymmetric algorithm a private key, PEM.
    pub secret_file: PathBuf,
    /// `--kid`.
    pub kid: Option<String>,
}

/// Why no token is minted.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The secret's file.
    #[error("the secret file {path} cannot be read: {error}")]
    File {
        /// As typed.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// The secret or private key itself.
    #[error("{0}")]
    Key(#[from] SigningError),
    /// A claim without `=`.
    #[error("--claim {0:?} is not name=value")]
    NotAClaim(String),
    /// A claim given twice.
    #[error("--claim {0} is given twice")]
    RepeatedClaim(String),
    /// Past what a NumericDate may be here.
    #[error("--expires-in reaches past the year 9999")]
    TooFar,
    /// What was asked for, no server would read.
    #[error("such a token would be refused: {0}")]
    Unusable(#[from] JwtError),
}

impl From<TokenError> for String {
    fn from(err: TokenError) -> String {
        err.to_string()
    }
}

/// The token that `options` ask for, issued at `now`. Some algorithms need `chance`.
///
/// Errors: the secret's file or the secret, a claim that is none, a token no server would read.
pub fn run(options: &TokenOptions, now: WallTime, chance: &dyn SecureRandom) -> Result<String, TokenError> {
    let path = &options.secret_file;
    let secret = read_secret(path).map_err(|error| TokenError::File { path: path.clone(), error })?;
    mint(options, &secret, now, chance)
}

fn read_secret(path: &Path) -> io::Result<Secret> {
    let mut bytes = Vec::new();
    File::open(path)?.take(SECRET_FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > SECRET_FILE_BYTES_MAX {
        return Err(io::Error::other(format!("it has more than {SECRET_FILE_BYTES_MAX} bytes")));
    }
    Ok(Secret::of_file(bytes))
}

fn mint(
    options: &TokenOptions,
    secret: &Secret,
    now: WallTime,
    chance: &dyn SecureRandom,
) -> Result<String, TokenError> {
    let key = SigningKey::new(options.kid.as_deref(), options.algorithm, secret, chance)?;
    let token = jwt::mint_by(&key, &claims_json(options, now)?, chance)?;
    // Its length, and what stands inside a claim that was given as JSON.
    jwt::claimed_payload(token.as_bytes())?;
    Ok(token)
}

/// The claims as the text of a JSON object: the command's own first, then the others as they were typed.
fn claims_json(options: &TokenOptions, now: WallTime) -> Result<String, TokenError> {
    let iat = now.as_secs();
    let exp = Duration::from_secs(iat).saturating_add(options.expires_in);
    if exp > Duration::from_secs(DATE_SECS_MAX) {
        return Err(TokenError::TooFar);
    }
    let exp = match exp.subsec_micros() {
        0 => exp.as_secs().to_string(),
        us => format!("{}.{us:06}", exp.as_secs()),
    };
    let mut claims: Vec<(&str, String)> = Vec::new();
    for typed in &options.claims {
        let (name, value) = typed.split_once('=').ok_or_else(|| TokenError::NotAClaim(typed.clone()))?;
        if claims.iter().any(|claim| claim.0 == name) {
            return Err(TokenError::RepeatedClaim(name.to_owned()));
        }
        let is_json = members::is_value(value);
        claims.push((name, if is_json { value.trim().to_owned() } else { Value::from(value).to_string() }));
    }
    let sub = options.sub.as_deref().map(|sub| ("sub", Value::from(sub).to_string()));
    let own = sub.into_iter().chain([("iat", iat.to_string()), ("exp", exp)]);
    let own: Vec<_> = own.filter(|own| claims.iter().all(|claim| claim.0 != own.0)).collect();
    let members = own.iter().chain(&claims).map(|(name, value)| format!("{}:{value}", Value::from(*name)));
    Ok(format!("{{{}}}", members.collect::<Vec<_>>().join(",")))
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "signatures differ with chance, and what they say does not")]
mod tests {
    use ring::rand::SystemRandom;

    use super::*;
    use crate::auth::jwt::{Options, Verifier, claimed_header, claimed_payload};
    use crate::auth::keys::{KeyConfig, KeySet};

    const NOW: WallTime = WallTime::from_micros(1_700_000_000_900_000);
    const SECRET: &[u8; 32] = b"a secret of just thirty-two byte";

    fn options(claims: &[&str]) -> TokenOptions {
        TokenOptions {
            sub: Some("u1".into()),
            expires_in: Duration::from_secs(900),
            claims: claims.iter().map(|&claim| claim.to_owned()).collect(),
            algorithm: Algorithm::Hs256,
            secret_file: PathBuf::new(),
            kid: None,
        }
    }

    fn minted(options: &TokenOptions) -> Result<String, TokenError> {
        mint(options, &Secret::new(*SECRET), NOW, &SystemRandom::new())
    }

    /// The claims of the token minted with these further ones, or what is said instead.
    fn claims(claims: &[&str]) -> String {
        match minted(&options(claims)) {
            Ok(token) => claimed_payload(token.as_bytes()).unwrap(),
            Err(err) => err.to_string(),
        }
    }

    #[test]
    fn a_minted_token_is_accepted_for_its_time() {
        let token = minted(&TokenOptions { kid: Some("dev".into()), ..options(&["permissions=[\"read\"]"]) }).unwrap();
        assert_eq!(claimed_header(token.as_bytes()).unwrap(), r#"{"alg":"HS256","typ":"JWT","kid":"dev"}"#);
        let secret = Secret::new(*SECRET);
        let key = KeyConfig { kid: Some("dev".into()), algorithm: Algorithm::Hs256, secret };
        let verifier = Verifier::new(Options { keys: KeySet::new(&[key]).unwrap(), ..Options::default() });
        let verified = verifier.verify(token.as_bytes(), NOW).unwrap();
        assert_eq!(verified.expires(), WallTime::from_secs(1_700_000_900));
        assert_eq!(verified.issued_at(), Some(WallTime::from_secs(1_700_000_000)));
        assert_eq!(verified.permissions().len(), 1);
        assert!(verifier.verify(token.as_bytes(), WallTime::from_secs(1_700_000_905)).unwrap_err().is_expired());
    }

    #[test]
    fn a_claim_is_json_where_it_is_json_and_else_a_string() {
        assert_eq!(claims(&[]), r#"{"sub":"u1","iat":1700000000,"exp":1700000900}"#);
        assert_eq!(
            claims(&[
                "companyId=12345678901234567890",
                "role=agent",
                "quoted=\"7\"",
                "list= [1, \"x\"] ",
                "x=a=b",
                "e="
            ]),
            r#"{"sub":"u1","iat":1700000000,"exp":1700000900,"companyId":12345678901234567890,"role":"agent","quoted":"7","list":[1, "x"],"x":"a=b","e":""}"#
        );
        assert_eq!(claims(&["exp=1", "sub=u2"]), r#"{"iat":1700000000,"exp":1,"sub":"u2"}"#);
        // What a server would refuse as JSON is no JSON here either.
        assert_eq!(
            claims(&["x={\"a\":1,\"a\":1}"]),
            r#"{"sub":"u1","iat":1700000000,"exp":1700000900,"x":"{\"a\":1,\"a\":1}"}"#
        );
        let half = TokenOptions { sub: None, expires_in: Duration::from_millis(1500), ..options(&[]) };
        assert_eq!(
            claimed_payload(minted(&half).unwrap().as_bytes()).unwrap(),
            r#"{"iat":1700000000,"exp":1700000001.500000}"#
        );
    }

    #[test]
    fn what_cannot_be_minted_is_said() {
        assert_eq!(claims(&["admin"]), r#"--claim "admin" is not name=value"#);
        assert_eq!(claims(&["a=1", "a=2"]), "--claim a is given twice");
        let large = format!("x={}", "x".repeat(8 << 10));
        assert!(claims(&[&large]).starts_with("such a token would be refused: the token has "));
        let far = TokenOptions { expires_in: Duration::from_secs(DATE_SECS_MAX), ..options(&[]) };
        assert_eq!(minted(&far).unwrap_err().to_string(), "--expires-in reaches past the year 9999");
        let weak = mint(&options(&[]), &Secret::new(*b"hunter2"), NOW, &SystemRandom::new()).unwrap_err();
        let said = "the secret has 7 bytes, HS256 needs at least 32 (RFC 7518 section 3.2)";
        assert_eq!(String::from(weak), said);
    }

    #[test]
    fn a_secret_file_loses_one_newline() {
        let dir = std::env::temp_dir().join(format!("restcast-token-test-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("secret");
        let read = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            read_secret(&path)
        };
        for end in ["", "\n", "\r\n"] {
            assert_eq!(read(format!("s3cret{end}").as_bytes()).unwrap(), Secret::new(*b"s3cret"), "{end:?}");
        }
        assert_eq!(read(b"s\n\n").unwrap(), Secret::new(*b"s\n"));
        assert!(read(&[b'x'; 64 << 10]).is_ok());
        assert!(read(&[b'x'; (64 << 10) + 1]).is_err());
        std::fs::remove_dir_all(&dir).unwrap();
        let gone = TokenOptions { secret_file: path, ..options(&[]) };
        assert!(run(&gone, NOW, &SystemRandom::new()).unwrap_err().to_string().contains("cannot be read"));
    }
}
