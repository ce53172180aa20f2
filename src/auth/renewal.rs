//! The renewal of a connection that another process holds: what that process is asked, and what it answers.
//!
//! Both are sealed under the 128 random bits of the connection's name, which are known to the process that gave the name, to
//! the client it was given to, and by the client's request to the process that asks. So Redis, and whoever reads it, never
//! sees the token, and nobody else can ask or answer.
//!
//! Source: protocol version 1, sections 1 and 6. Memory: one question or answer. Errors: what is none of these is `None`.
//! Not here: how it travels (`runtime::redis`), whether the token is good (`shard`).

use std::net::IpAddr;

use serde_json::{Value, json};

use super::sealed::{self, Purpose, SALT_BYTES};
use crate::secret::Secret;
use crate::time::WallTime;

/// What the process that holds a connection is asked.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RenewalAsk {
    /// The token, or ticket, that was presented.
    pub token: Secret,
    /// Whom a failure is counted for.
    pub addr: IpAddr,
    /// When it was asked: an old question is somebody's who has kept it.
    pub at: WallTime,
}

/// What became of it: an HTTP answer in the making.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct RenewalAnswer {
    /// Its status.
    pub status: u16,
    /// The code of a refusal; none with 200.
    pub code: Option<String>,
    /// The body with 200, else what to tell the caller.
    pub text: String,
    /// `Retry-After` in seconds.
    pub retry_after_s: Option<u64>,
    /// Whether the answer is held back: the address has failed too often.
    pub late: bool,
}

impl RenewalAsk {
    /// Sealed for the process that gave a connection's name its `random` bits.
    pub fn seal(&self, random: u128, salt: [u8; SALT_BYTES]) -> Vec<u8> {
        let token = String::from_utf8_lossy(self.token.expose_secret());
        let text = json!({ "token": token, "addr": self.addr.to_string(), "at": self.at.as_micros() }).to_string();
        sealed::seal(&random.to_be_bytes(), Purpose::Renewal, salt, text.as_bytes())
    }

    /// What was asked of the connection with these bits. `None`: nothing was.
    pub fn open(random: u128, sealed: &[u8]) -> Option<RenewalAsk> {
        let text = sealed::open(&random.to_be_bytes(), Purpose::Renewal, sealed)?;
        let value: Value = serde_json::from_slice(&text).ok()?;
        Some(RenewalAsk {
            token: Secret::new(value.get("token")?.as_str()?),
            addr: value.get("addr")?.as_str()?.parse().ok()?,
            at: WallTime::from_micros(value.get("at")?.as_u64()?),
        })
    }

    /// Whether it was asked at about `now`: either clock may be ahead.
    pub fn is_of(&self, now: WallTime) -> bool {
        sealed::is_of(self.at, now)
    }
}

impl RenewalAnswer {
    /// Sealed for whoever has asked with `asked`, the question's salt.
    pub fn seal(&self, random: u128, asked: [u8; SALT_BYTES], salt: [u8; SALT_BYTES]) -> Vec<u8> {
        let text = json!({
            "status": self.status,
            "code": self.code,
            "text": self.text,
            "retry_after_s": self.retry_after_s,
            "late": self.late,
        });
        sealed::seal(&random.to_be_bytes(), Purpose::RenewalAnswer(asked), salt, text.to_string().as_bytes())
    }

    /// The answer to the question with the salt `asked`. `None`: it is none.
    pub fn open(random: u128, asked: [u8; SALT_BYTES], sealed: &[u8]) -> Option<RenewalAnswer> {
        let text = sealed::open(&random.to_be_bytes(), Purpose::RenewalAnswer(asked), sealed)?;
        let value: Value = serde_json::from_slice(&text).ok()?;
        let optional = |name: &str| value.get(name).filter(|member| !member.is_null());
        Some(RenewalAnswer {
            status: u16::try_from(value.get("status")?.as_u64()?).ok().filter(|status| (200..600).contains(status))?,
            code: optional("code").map(|code| code.as_str().map(str::to_owned)).unwrap_or_default(),
            text: value.get("text")?.as_str()?.to_owned(),
            retry_after_s: optional("retry_after_s").and_then(Value::as_u64),
            late: value.get("late")?.as_bool()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits;

    const SALT: [u8; SALT_BYTES] = [3; SALT_BYTES];

    fn ask(at: u64) -> RenewalAsk {
        let addr = "2001:db8::1".parse().expect("an address");
        RenewalAsk { token: Secret::new("a.b.c"), addr, at: WallTime::from_secs(at) }
    }

    #[test]
    fn what_is_asked_and_answered_reads_back_for_that_connection_alone() {
        let sealed = ask(1_000).seal(7, SALT);
        assert_eq!(RenewalAsk::open(7, &sealed), Some(ask(1_000)));
        assert_eq!(RenewalAsk::open(8, &sealed), None);
        let answers = [
            RenewalAnswer { status: 200, code: None, text: "{\"a\":1}".into(), retry_after_s: None, late: false },
            RenewalAnswer {
                status: 429,
                code: Some("RATE_LIMITED".into()),
                text: "too many".into(),
                retry_after_s: Some(60),
                late: true,
            },
        ];
        for answer in answers {
            let sealed = answer.seal(7, SALT, [4; SALT_BYTES]);
            assert_eq!(RenewalAnswer::open(7, SALT, &sealed), Some(answer));
            assert_eq!(RenewalAnswer::open(7, [5; SALT_BYTES], &sealed), None, "to another question");
        }
    }

    #[test]
    fn a_question_that_somebody_has_kept_is_not_of_now() {
        let age = limits::PEER_ASK_AGE_MAX.as_secs();
        for (now, good) in [(1_000 + age, true), (1_001 + age, false), (1_000 - age, true), (999 - age, false)] {
            assert_eq!(ask(1_000).is_of(WallTime::from_secs(now)), good, "{now}");
        }
    }

    #[test]
    fn what_is_no_question_and_no_answer_is_none() {
        for text in
            ["", "{}", "[]", "null", r#"{"token":1}"#, r#"{"token":"a","addr":"x","at":0}"#, r#"{"status":200}"#]
        {
            let asked = sealed::seal(&7u128.to_be_bytes(), Purpose::Renewal, SALT, text.as_bytes());
            assert_eq!(RenewalAsk::open(7, &asked), None, "{text}");
            let answered = sealed::seal(&7u128.to_be_bytes(), Purpose::RenewalAnswer(SALT), SALT, text.as_bytes());
            assert_eq!(RenewalAnswer::open(7, SALT, &answered), None, "{text}");
        }
        let odd = r#"{"status":99,"text":"","late":false}"#;
        let odd = sealed::seal(&7u128.to_be_bytes(), Purpose::RenewalAnswer(SALT), SALT, odd.as_bytes());
        assert_eq!(RenewalAnswer::open(7, SALT, &odd), None, "no status");
    }
}
