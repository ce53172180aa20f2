//! Minting a JWT for each connection.
//!
//! Source: RFC 7515, RFC 7519; HMAC by ring. Memory: one token at a time. Errors: [`Minter::new`], the fault of who typed the
//! command. Tokens and secrets are never printed.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::hmac;
use serde_json::{Value, json};

use crate::template::{Template, Values};

/// What mints the tokens of one process.
pub struct Minter {
    key: hmac::Key,
    head: String,
    sub: Template,
    claims: Vec<(String, Template)>,
    /// Starts every `jti`: two processes or runs never mint the same.
    series: String,
    minted: u64,
}

/// A token and the second of its `exp`.
#[derive(Clone, Debug)]
pub struct Minted {
    /// The token.
    pub token: String,
    /// Its `exp`.
    pub exp: u64,
}

impl Minter {
    /// `claims` are `name`, `value`: a value that is JSON stands as it is, any other is a string; both may hold `{n}`.
    ///
    /// # Errors
    /// An algorithm that is not HMAC.
    pub fn new(
        secret: &[u8],
        alg: &str,
        sub: &str,
        claims: &[(String, String)],
        series: String,
    ) -> Result<Minter, String> {
        let algorithm = match alg {
            "HS256" => hmac::HMAC_SHA256,
            "HS384" => hmac::HMAC_SHA384,
            "HS512" => hmac::HMAC_SHA512,
            _ => return Err(format!("--alg {alg}: tokens are minted with HS256, HS384 or HS512")),
        };
        let head = json!({"alg": alg, "typ": "JWT"}).to_string();
        let claims = claims.iter().map(|(name, value)| (name.clone(), Template::new(value))).collect();
        Ok(Minter {
            key: hmac::Key::new(algorithm, secret),
            head: URL_SAFE_NO_PAD.encode(head),
            sub: Template::new(sub),
            claims,
            series,
            minted: 0,
        })
    }

    /// A token for connection `number`, with a `jti` of its own.
    pub fn mint(&mut self, number: u64, iat: u64, exp: u64) -> Minted {
        let values = Values { number, ..Values::default() };
        self.minted += 1;
        let mut payload = json!({
            "sub": self.sub.fill(values),
            "iat": iat,
            "exp": exp,
            "jti": format!("{}-{}", self.series, self.minted),
        });
        for (name, value) in &self.claims {
            let value = value.fill(values);
            payload[name] = serde_json::from_str(&value).unwrap_or(Value::String(value));
        }
        let mut token = format!("{}.{}", self.head, URL_SAFE_NO_PAD.encode(payload.to_string()));
        let tag = hmac::sign(&self.key, token.as_bytes());
        token.push('.');
        token.push_str(&URL_SAFE_NO_PAD.encode(tag));
        Minted { token, exp }
    }
}

/// The `exp` of a token made elsewhere, where it can be read.
pub fn exp_of(token: &str) -> Option<u64> {
    let payload = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
    let exp = serde_json::from_slice::<Value>(&payload).ok()?.get("exp")?.as_f64()?;
    (exp.is_finite() && exp > 0.0).then_some(exp as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_verify_and_differ() {
        let claims = [("companyId".to_owned(), "{n}".to_owned()), ("role".to_owned(), "agent".to_owned())];
        let mut minter = Minter::new(b"a secret", "HS256", "u{n}", &claims, "r1".into()).expect("HMAC");
        let (first, second) = (minter.mint(7, 100, 200), minter.mint(7, 100, 200));
        assert_ne!(first.token, second.token, "each has a jti of its own");
        assert_eq!(exp_of(&first.token), Some(200));
        let (signed, tag) = first.token.rsplit_once('.').expect("three parts");
        let tag = URL_SAFE_NO_PAD.decode(tag).expect("base64url");
        hmac::verify(&hmac::Key::new(hmac::HMAC_SHA256, b"a secret"), signed.as_bytes(), &tag).expect("it is signed");
        let payload = URL_SAFE_NO_PAD.decode(signed.split('.').nth(1).expect("a payload")).expect("base64url");
        let payload: Value = serde_json::from_slice(&payload).expect("JSON");
        assert_eq!(payload, json!({"sub":"u7","iat":100,"exp":200,"jti":"r1-1","companyId":7,"role":"agent"}));
    }

    #[test]
    fn an_algorithm_that_is_not_hmac_is_refused() {
        assert!(Minter::new(b"", "RS256", "u", &[], String::new()).is_err());
    }
}
