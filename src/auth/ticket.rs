//! One-time tickets: their text, what is kept of it, and what one stands for.
//!
//! Source: protocol version 1, sections 1 (`POST /v1/tickets`) and 2. A ticket has 256 random bits, so a plain SHA-256 of it
//! is kept: nobody can guess what it is of. One that a single process of several keeps says so in its text.
//! Memory: what is returned. Errors: `None`, of whoever wrote what is not ours. Not here: where tickets are kept (`shard`,
//! `runtime`), who may have one.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::digest;
use serde_json::{Value, json};

use super::api_key::{ApiKeyId, ApiKeyMark};
use super::grant::{ClaimValue, Globs, GrantRecord, Rights, TokenMark};
use super::keys::KeyId;
use crate::ids::ProcessId;
use crate::limits::TICKET_RECORD_BYTES_MAX;
use crate::secret::Secret;
use crate::time::WallTime;

/// What every ticket begins with. A JWT has dots, and this has none.
const PREFIX: &str = "rct_";
/// Characters behind it: 256 bits.
const RANDOM_CHARS: usize = 43;
/// and, where one process alone keeps it, behind those: the process,
const PROCESS_CHARS: usize = 16;
/// and the second in which it ends.
const ENDS_CHARS: usize = 8;

/// The ticket of these random bits.
pub fn of_random(random: [u8; 32]) -> Secret {
    Secret::new(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(random)))
}

/// The same, of a ticket that one process alone keeps.
pub fn kept_alone(random: [u8; 32], keeper: Keeper) -> Secret {
    let Keeper { process, ends } = keeper;
    let random = URL_SAFE_NO_PAD.encode(random);
    Secret::new(format!("{PREFIX}{random}{process}{:08x}", u32::try_from(ends.as_secs()).unwrap_or(u32::MAX)))
}

/// Who alone keeps a ticket, as its text says; anybody can write such a text.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Keeper {
    /// The process.
    pub process: ProcessId,
    /// Until when, in whole seconds.
    pub ends: WallTime,
}

impl Keeper {
    /// The keeper of the ticket spelled `text`. `None`: that is none, or one that all processes find.
    pub fn of(text: &[u8]) -> Option<Keeper> {
        let keeper = text.strip_prefix(PREFIX.as_bytes())?.get(RANDOM_CHARS..)?;
        let (process, ends) = keeper.split_at_checked(PROCESS_CHARS)?;
        let is_hex = |byte: &u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        let spelled = ends.len() == ENDS_CHARS && ends.iter().all(is_hex);
        let ends = spelled.then(|| u32::from_str_radix(std::str::from_utf8(ends).ok()?, 16).ok()).flatten()?;
        let process = ProcessId::parse(std::str::from_utf8(process).ok()?)?;
        Some(Keeper { process, ends: WallTime::from_secs(ends.into()) })
    }
}

/// Whether a text that may be a JWT or a ticket is meant as a ticket.
pub fn is_ticket(text: &[u8]) -> bool {
    text.starts_with(PREFIX.as_bytes()) && !text.contains(&b'.')
}

/// A ticket, hashed: what it is kept and found by.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct TicketHash([u8; 32]);

impl TicketHash {
    /// The hash of the ticket spelled `text`; `None` where that is none.
    pub fn of(text: &[u8]) -> Option<TicketHash> {
        let (random, keeper) = text.strip_prefix(PREFIX.as_bytes())?.split_at_checked(RANDOM_CHARS)?;
        let is_ours = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_".contains(byte);
        if !random.iter().all(is_ours) || !keeper.is_empty() && Keeper::of(text).is_none() {
            return None;
        }
        digest::digest(&digest::SHA256, text).as_ref().first_chunk().copied().map(TicketHash)
    }
}

impl fmt::Display for TicketHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&URL_SAFE_NO_PAD.encode(self.0))
    }
}

/// What a ticket stands for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TicketRecord {
    /// Until when it may be used.
    pub ends: WallTime,
    /// What whoever asked for it had.
    pub grant: GrantRecord,
}

impl TicketRecord {
    /// Its text; `None` where that would be over [`TICKET_RECORD_BYTES_MAX`].
    pub fn to_text(&self) -> Option<Secret> {
        let GrantRecord { sub, expires, issued_at, key, token, rights, session, api_key } = &self.grant;
        let claim = |(name, value): &(Box<str>, ClaimValue)| match value {
            ClaimValue::Text(text) => json!([name, "text", text]),
            ClaimValue::Integer(text) => json!([name, "integer", text]),
            ClaimValue::Other => json!([name, "other"]),
        };
        let session = session.as_ref().map(|sid| URL_SAFE_NO_PAD.encode(sid.expose_secret()));
        let text = json!({
            "v": 1,
            "ends": self.ends.as_micros(),
            "sub": sub,
            "iss": rights.issuer,
            "exp": expires.map(WallTime::as_micros),
            "iat": issued_at.map(WallTime::as_micros),
            "key": key.map(KeyId::bits),
            "jti": token.map(TokenMark::bits),
            "roles": rights.roles,
            "permissions": rights.permissions,
            "streams": rights.streams.as_ref().map(|globs| globs.iter().collect::<Vec<_>>()),
            "claims": rights.claims.iter().map(claim).collect::<Vec<_>>(),
            "session": session,
            "api_key": api_key.as_ref().map(|mark| json!([mark.id.as_str(), mark.bits])),
        });
        let text = text.to_string();
        (text.len() <= TICKET_RECORD_BYTES_MAX).then(|| Secret::new(text))
    }

    /// The record that [`TicketRecord::to_text`] has written.
    pub fn parse(text: &[u8]) -> Option<TicketRecord> {
        if text.len() > TICKET_RECORD_BYTES_MAX {
            return None;
        }
        let record: Value = serde_json::from_slice(text).ok()?;
        let member = |name: &str| record.get(name).filter(|value| !value.is_null());
        if member("v")? != 1 {
            return None;
        }
        let time = |name: &str| match member(name) {
            None => Some(None),
            Some(value) => value.as_u64().map(|us| Some(WallTime::from_micros(us))),
        };
        let short = |name: &str| match member(name) {
            None => Some(None),
            Some(value) => value.as_str().map(|text| Some(Box::from(text))),
        };
        let texts = |value: &Value| -> Option<Vec<Box<str>>> {
            value.as_array()?.iter().map(|text| text.as_str().map(Box::from)).collect()
        };
        let bits = |name: &str| match member(name) {
            None => Some(None),
            Some(value) => value.as_u64().map(Some),
        };
        let session = match member("session") {
            None => None,
            Some(value) => Some(Secret::new(URL_SAFE_NO_PAD.decode(value.as_str()?).ok()?)),
        };
        let mut claims = member("claims")?.as_array()?.iter().map(claim).collect::<Option<Vec<_>>>()?;
        // As [`Rights`] wants them.
        claims.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        let rights = Rights {
            issuer: short("iss")?,
            roles: texts(member("roles")?)?.into_boxed_slice(),
            permissions: texts(member("permissions")?)?.into_boxed_slice(),
            streams: member("streams").map(texts).map_or(Some(None), |globs| globs.map(Globs::new).map(Some))?,
            claims: claims.into_boxed_slice(),
            api_key: None,
            only: None,
        };
        let api_key = match member("api_key") {
            None => None,
            Some(mark) => Some(ApiKeyMark { id: ApiKeyId::new(mark.get(0)?.as_str()?)?, bits: mark.get(1)?.as_u64()? }),
        };
        let grant = GrantRecord {
            sub: short("sub")?,
            expires: time("exp")?,
            issued_at: time("iat")?,
            key: bits("key")?.and_then(KeyId::of_bits),
            token: bits("jti")?.and_then(TokenMark::of_bits),
            rights,
            session,
            api_key,
        };
        Some(TicketRecord { ends: time("ends")??, grant })
    }
}

fn claim(value: &Value) -> Option<(Box<str>, ClaimValue)> {
    let parts = value.as_array()?;
    let text = |place: usize| parts.get(place).and_then(Value::as_str);
    let value = match (text(1)?, text(2)) {
        ("text", Some(text)) => ClaimValue::Text(text.into()),
        ("integer", Some(text)) => ClaimValue::Integer(text.into()),
        ("other", None) => ClaimValue::Other,
        _ => return None,
    };
    Some((text(0)?.into(), value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> TicketRecord {
        let texts = |list: &[&str]| list.iter().map(|&text| Box::from(text)).collect();
        let claims = [
            ("a".into(), ClaimValue::Other),
            ("companyId".into(), ClaimValue::Integer("12345678901234567890".into())),
            ("region".into(), ClaimValue::Text("eu \u{1}\"".into())),
        ];
        let rights = Rights {
            issuer: Some("https://idp".into()),
            roles: texts(&["agent"]),
            permissions: texts(&["read", "write"]),
            streams: Some(Globs::new(vec!["leads".into(), "orders:*".into()])),
            claims: Box::new(claims),
            api_key: None,
            only: None,
        };
        TicketRecord {
            ends: WallTime::from_secs(2_000),
            grant: GrantRecord {
                sub: Some("u1".into()),
                expires: Some(WallTime::from_micros(1_795_375_287_042_001)),
                issued_at: Some(WallTime::from_secs(1_000)),
                key: KeyId::of_bits(u64::MAX - 1),
                token: Some(TokenMark::of("t1")),
                rights,
                session: Some(Secret::new(*b"a sid \xff")),
                api_key: ApiKeyId::new("dashboard").map(|id| ApiKeyMark { id, bits: u64::MAX - 2 }),
            },
        }
    }

    #[test]
    fn a_ticket_is_told_from_a_token_by_its_form() {
        let ticket = of_random([7; 32]);
        assert!(is_ticket(ticket.expose_secret()));
        assert_eq!(ticket.len(), 47);
        assert!(!is_ticket(b"eyJhbGciOiJIUzI1NiJ9.e30.c2ln") && !is_ticket(b"rct_a.b.c") && !is_ticket(b""));
    }

    #[test]
    fn a_ticket_is_found_by_its_hash_alone() {
        let (one, other) = (of_random([7; 32]), of_random([8; 32]));
        let hash = |ticket: &Secret| TicketHash::of(ticket.expose_secret()).expect("a ticket");
        assert_eq!(hash(&one), hash(&one.clone()));
        assert_ne!(hash(&one), hash(&other));
        assert_eq!(hash(&one).to_string().len(), 43);
        let text = String::from_utf8(one.expose_secret().to_vec()).expect("it is text");
        assert!(!text.contains(&hash(&one).to_string()));
        for bad in ["", "rct_", &text[1..], &text[..46], &(text.clone() + "A"), &text.replace("rct_", "rcT_")] {
            assert_eq!(TicketHash::of(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn a_ticket_that_one_process_keeps_says_which_and_until_when() {
        let keeper = Keeper { process: ProcessId(u64::MAX - 7), ends: WallTime::from_secs(1_800_000_030) };
        let ticket = kept_alone([7; 32], keeper);
        let text = String::from_utf8(ticket.expose_secret().to_vec()).expect("it is text");
        assert!(is_ticket(text.as_bytes()));
        assert_eq!((text.len(), Keeper::of(text.as_bytes())), (71, Some(keeper)));
        let hash = TicketHash::of(text.as_bytes()).expect("a ticket");
        assert_ne!(Some(hash), TicketHash::of(&text.as_bytes()[..47]), "it is no other's");
        let of_all = of_random([7; 32]);
        assert_eq!(Keeper::of(of_all.expose_secret()), None);
        assert_eq!(Keeper::of(b"rct_"), None);
        for bad in
            [&text[..70], &text[..63], &(text.clone() + "0"), &text.replace("fff8", "FFF8"), &text.replace("ff", "+f")]
        {
            assert_eq!((Keeper::of(bad.as_bytes()), TicketHash::of(bad.as_bytes())), (None, None), "{bad}");
        }
    }

    #[test]
    fn a_record_reads_back_what_it_was() {
        let text = record().to_text().expect("it is small");
        assert_eq!(TicketRecord::parse(text.expose_secret()), Some(record()));
        let grant = GrantRecord {
            sub: None,
            expires: None,
            issued_at: None,
            key: None,
            token: None,
            rights: Rights::default(),
            session: None,
            api_key: None,
        };
        let bare = TicketRecord { grant, ..record() };
        let text = bare.to_text().expect("it is small");
        assert_eq!(TicketRecord::parse(text.expose_secret()), Some(bare));
    }

    #[test]
    fn what_is_no_record_is_none() {
        let text = String::from_utf8(record().to_text().expect("it is small").expose_secret().to_vec()).expect("text");
        for (from, to) in [
            ("\"v\":1", "\"v\":2"),
            ("\"iat\":1000000000", "\"iat\":-1"),
            ("\"roles\":[\"agent\"]", "\"roles\":[1]"),
            ("\"sub\":\"u1\"", "\"sub\":7"),
            ("[\"a\",\"other\"]", "[\"a\",\"odd\"]"),
            ("\"streams\":[", "\"streams\":[1,"),
            ("[\"dashboard\",", "[\"a/b\","),
            ("[\"dashboard\",", "[\"dashboard\",-"),
        ] {
            assert!(text.contains(from), "{from} in {text}");
            assert_eq!(TicketRecord::parse(text.replace(from, to).as_bytes()), None, "{to}");
        }
        for end in 0..text.len() {
            assert_eq!(TicketRecord::parse(&text.as_bytes()[..end]), None);
        }
    }

    #[test]
    fn a_record_is_bounded() {
        let sized = |bytes: usize| {
            let rights = Rights { permissions: Box::from(["x".repeat(bytes).into()]), ..record().grant.rights };
            TicketRecord { grant: GrantRecord { rights, ..record().grant }, ..record() }
        };
        let frame = sized(0).to_text().expect("it is small").len();
        assert!(sized(TICKET_RECORD_BYTES_MAX - frame).to_text().is_some());
        assert_eq!(sized(TICKET_RECORD_BYTES_MAX - frame + 1).to_text(), None);
    }
}
