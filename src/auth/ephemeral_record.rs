//! An ephemeral session as it stands where processes share it: what its request is, sealed under its token, and what its
//! maker is told of it, sealed under its id. Where it stands neither is known.
//!
//! Source: protocol version 1, sections 1 and 6; RFC 8439 by way of `sealed`. So whoever is shown the token can go on with the
//! session, whoever is told its id by its maker can say what it is called and when it ends, and who reads the store alone
//! learns no more than that there is a session, and until when.
//! Memory: what is returned. Errors: `None`, of whoever wrote what is not ours. Not here: where records stand (`runtime`),
//! what is made of one (`shard`).

use serde_json::{Value, json};

use super::api_key::ApiKeyId;
use super::grant::{GrantRecord, TokenMark};
use super::sealed::{self, Purpose, SALT_BYTES};
use super::ticket::TicketRecord;
use crate::ids::EphemeralId;
use crate::limits::{DIRECT_HEADERS_MAX, EPHEMERAL_RECORD_BYTES_MAX};
use crate::secret::Secret;
use crate::time::WallTime;

/// What a record begins with: another for each form that there has been.
const VERSION: u8 = 1;
/// Bytes of a length.
const LENGTH_BYTES: usize = 4;

/// What the maker of a session is told of it, and what it is told by that they are its maker.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SessionFace {
    /// Its maker's user id,
    pub sub: Option<String>,
    /// issuer,
    pub issuer: Option<String>,
    /// API key,
    pub api_key: Option<ApiKeyId>,
    /// and, where there is no user id, token.
    pub token: Option<TokenMark>,
    /// What its stream is called.
    pub stream: String,
    /// Where it is counted among its maker's.
    pub counted: String,
    /// When it was made,
    pub made: WallTime,
    /// and when it ends at the latest.
    pub ends: WallTime,
}

/// A session's request and its maker's grant.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SessionRequest {
    /// The target.
    pub url: String,
    /// Whether by POST.
    pub post: bool,
    /// From the start of one poll to the start of the next, in milliseconds.
    pub interval_ms: u64,
    /// What is left of the value, as a path.
    pub select: Option<String>,
    /// Headers, in the order of their names.
    pub headers: Vec<(String, Secret)>,
    /// The body.
    pub body: Option<Secret>,
    /// What whoever made it had.
    pub maker: GrantRecord,
}

/// A session as it stands where processes share it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SharedSession {
    /// What its maker is told of it.
    pub face: SessionFace,
    /// What is asked.
    pub request: SessionRequest,
}

impl SessionFace {
    fn text(&self) -> Vec<u8> {
        let SessionFace { sub, issuer, api_key, token, stream, counted, made, ends } = self;
        let text = json!({
            "sub": sub,
            "iss": issuer,
            "api_key": api_key.as_ref().map(ApiKeyId::as_str),
            "token": token.map(TokenMark::bits),
            "stream": stream,
            "counted": counted,
            "made": made.as_micros(),
            "ends": ends.as_micros(),
        });
        text.to_string().into_bytes()
    }

    fn parse(text: &[u8]) -> Option<SessionFace> {
        let said: Value = serde_json::from_slice(text).ok()?;
        let optional = |name: &str| match said.get(name)? {
            Value::Null => Some(None),
            value => value.as_str().map(|text| Some(text.to_owned())),
        };
        let required = |name: &str| said.get(name)?.as_str().map(str::to_owned);
        let time = |name: &str| said.get(name)?.as_u64().map(WallTime::from_micros);
        let api_key = match optional("api_key")? {
            None => None,
            Some(text) => Some(ApiKeyId::new(&text)?),
        };
        Some(SessionFace {
            sub: optional("sub")?,
            issuer: optional("iss")?,
            api_key,
            token: said.get("token")?.as_u64().and_then(TokenMark::of_bits),
            stream: required("stream")?,
            counted: required("counted")?,
            made: time("made")?,
            ends: time("ends")?,
        })
    }

    /// Whether it is the session of whoever has `asker`, as [`GrantRecord::is_same_caller`] says.
    pub fn is_of(&self, asker: &GrantRecord) -> bool {
        self.sub.as_deref() == asker.sub.as_deref()
            && (self.sub.is_some() || self.token.is_some() && self.token == asker.token)
            && self.issuer.as_deref() == asker.rights.issuer.as_deref()
            && self.api_key.as_ref() == asker.api_key.as_ref().map(|mark| &mark.id)
    }

    /// What the maker of session `id` is told by its record.
    pub fn open(record: &[u8], id: EphemeralId) -> Option<SessionFace> {
        let (face, _) = split(record)?;
        SessionFace::parse(&sealed::open(&id.0.to_le_bytes(), Purpose::SessionFace, face)?)
    }
}

impl SessionRequest {
    fn text(&self, ends: WallTime) -> Option<Vec<u8>> {
        let SessionRequest { url, post, interval_ms, select, headers, body, maker } = self;
        let maker = TicketRecord { ends, grant: maker.clone() }.to_text()?;
        let mut out = vec![u8::from(*post), u8::from(select.is_some()), u8::from(body.is_some())];
        out.extend(interval_ms.to_le_bytes());
        put(&mut out, url.as_bytes());
        put(&mut out, select.as_deref().unwrap_or_default().as_bytes());
        put(&mut out, body.as_ref().map_or(&[], |body| body.expose_secret()));
        put(&mut out, maker.expose_secret());
        for (name, value) in headers {
            put(&mut out, name.as_bytes());
            put(&mut out, value.expose_secret());
        }
        Some(out)
    }

    fn parse(text: &[u8]) -> Option<SessionRequest> {
        let (&[post, has_select, has_body], rest) = text.split_first_chunk::<3>()?;
        let (interval_ms, mut rest) = rest.split_first_chunk::<8>()?;
        if [post, has_select, has_body].iter().any(|flag| *flag > 1) {
            return None;
        }
        let url = text_of(take(&mut rest)?)?;
        let select = text_of(take(&mut rest)?)?;
        let body = take(&mut rest)?;
        let maker = TicketRecord::parse(take(&mut rest)?)?.grant;
        let mut headers = Vec::new();
        while !rest.is_empty() {
            if headers.len() == DIRECT_HEADERS_MAX {
                return None;
            }
            headers.push((text_of(take(&mut rest)?)?, Secret::new(take(&mut rest)?)));
        }
        Some(SessionRequest {
            url,
            post: post == 1,
            interval_ms: u64::from_le_bytes(*interval_ms),
            select: (has_select == 1).then_some(select),
            headers,
            body: (has_body == 1).then(|| Secret::new(body)),
            maker,
        })
    }
}

impl SharedSession {
    /// The record of the session `id`, whose token this is. `None`: it would be over [`EPHEMERAL_RECORD_BYTES_MAX`], which
    /// what its maker may do can make it. The salts are random, others for each record.
    pub fn seal(&self, token: &Secret, id: EphemeralId, salts: [[u8; SALT_BYTES]; 2]) -> Option<Secret> {
        let [for_face, for_request] = salts;
        let face = sealed::seal(&id.0.to_le_bytes(), Purpose::SessionFace, for_face, &self.face.text());
        let request = self.request.text(self.face.ends)?;
        let mut record = vec![VERSION];
        put(&mut record, &face);
        record.extend(sealed::seal(token.expose_secret(), Purpose::Session, for_request, &request));
        (record.len() <= EPHEMERAL_RECORD_BYTES_MAX).then(|| Secret::new(record))
    }

    /// The session of that token by its record.
    pub fn open(record: &[u8], token: &Secret, id: EphemeralId) -> Option<SharedSession> {
        let (_, request) = split(record)?;
        let request = sealed::open(token.expose_secret(), Purpose::Session, request)?;
        Some(SharedSession { face: SessionFace::open(record, id)?, request: SessionRequest::parse(&request)? })
    }
}

/// The two sealed parts of a record.
fn split(record: &[u8]) -> Option<(&[u8], &[u8])> {
    let (&version, mut rest) = record.split_first()?;
    if version != VERSION || record.len() > EPHEMERAL_RECORD_BYTES_MAX {
        return None;
    }
    Some((take(&mut rest)?, rest))
}

fn put(out: &mut Vec<u8>, part: &[u8]) {
    let length = u32::try_from(part.len()).expect("every part has a bound far below");
    out.extend(length.to_le_bytes());
    out.extend_from_slice(part);
}

fn take<'r>(rest: &mut &'r [u8]) -> Option<&'r [u8]> {
    let (length, behind) = rest.split_first_chunk::<LENGTH_BYTES>()?;
    let (part, behind) = behind.split_at_checked(usize::try_from(u32::from_le_bytes(*length)).ok()?)?;
    *rest = behind;
    Some(part)
}

fn text_of(part: &[u8]) -> Option<String> {
    String::from_utf8(part.to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::ephemeral::{id_of, token_of_random};
    use crate::auth::grant::Rights;

    const SALTS: [[u8; SALT_BYTES]; 2] = [[1; SALT_BYTES], [2; SALT_BYTES]];

    fn session() -> (SharedSession, Secret, EphemeralId) {
        let face = SessionFace {
            sub: Some("u1".into()),
            issuer: Some("https://idp".into()),
            api_key: ApiKeyId::new("dashboard"),
            token: None,
            stream: "direct:abc".into(),
            counted: "of".into(),
            made: WallTime::from_micros(7),
            ends: WallTime::from_secs(2_000),
        };
        let maker = GrantRecord {
            sub: Some("u1".into()),
            expires: None,
            issued_at: Some(WallTime::from_secs(1)),
            key: None,
            token: None,
            rights: Rights::default(),
            session: None,
            api_key: None,
        };
        let headers = [("a", "hunter2"), ("b", "\u{1}\"")].map(|(name, value)| (name.to_owned(), Secret::new(value)));
        let request = SessionRequest {
            url: "https://api.example.com/a?key=hunter2".into(),
            post: true,
            interval_ms: 1_500,
            select: Some("$.a".into()),
            headers: headers.into(),
            body: Some(Secret::new(*b"hunter2\xff")),
            maker,
        };
        let token = token_of_random([7; 32]);
        let id = id_of(token.expose_secret()).expect("a token");
        (SharedSession { face, request }, token, id)
    }

    #[test]
    fn a_record_reads_back_what_it_was_for_whoever_may_read_it() {
        let (session, token, id) = session();
        let record = session.seal(&token, id, SALTS).expect("it is small");
        let record = record.expose_secret();
        assert_eq!(SharedSession::open(record, &token, id), Some(session.clone()));
        assert_eq!(SessionFace::open(record, id), Some(session.face.clone()));
        let other = token_of_random([8; 32]);
        assert_eq!((SharedSession::open(record, &other, id), SessionFace::open(record, EphemeralId(1))), (None, None));
        for secret in ["hunter2", "u1", "direct:abc", "api.example.com", "$.a"] {
            assert!(!record.windows(secret.len()).any(|part| part == secret.as_bytes()), "{secret}");
        }
        let bare = SharedSession {
            face: SessionFace {
                sub: None,
                issuer: None,
                api_key: None,
                token: Some(TokenMark::of("t1")),
                ..session.face
            },
            request: SessionRequest { select: None, body: None, headers: Vec::new(), post: false, ..session.request },
        };
        let record = bare.seal(&token, id, SALTS).expect("it is small");
        assert_eq!(SharedSession::open(record.expose_secret(), &token, id), Some(bare));
    }

    #[test]
    fn what_was_changed_or_cut_is_no_record() {
        let (session, token, id) = session();
        let record = session.seal(&token, id, SALTS).expect("it is small").expose_secret().to_vec();
        for at in 0..record.len() {
            let mut changed = record.clone();
            changed[at] ^= 1;
            assert_eq!(SharedSession::open(&changed, &token, id), None, "byte {at}");
            assert_eq!(SharedSession::open(&record[..at], &token, id), None, "{at} bytes");
        }
        let text = session.request.text(session.face.ends).expect("it is small");
        for at in 0..text.len() {
            assert!(SessionRequest::parse(&text[..at]).is_none_or(|cut| cut.headers.len() < 2), "{at} bytes");
        }
        let mut odd = text.clone();
        odd[0] = 2;
        assert_eq!(SessionRequest::parse(&odd), None);
    }

    #[test]
    fn a_record_is_bounded() {
        let (session, token, id) = session();
        let sized = |bytes: usize| {
            let request = SessionRequest { body: Some(Secret::new(vec![b'x'; bytes])), ..session.request.clone() };
            SharedSession { request, ..session.clone() }.seal(&token, id, SALTS).map(|record| record.len())
        };
        let around = sized(0).expect("it is small");
        assert_eq!(sized(EPHEMERAL_RECORD_BYTES_MAX - around), Some(EPHEMERAL_RECORD_BYTES_MAX));
        assert_eq!(sized(EPHEMERAL_RECORD_BYTES_MAX - around + 1), None);
        let rights = Rights { permissions: Box::from(["x".repeat(200_000).into()]), ..Rights::default() };
        let maker = GrantRecord { rights, ..session.request.maker.clone() };
        let large = SharedSession { request: SessionRequest { maker, ..session.request.clone() }, ..session };
        assert_eq!(large.seal(&token, id, SALTS), None, "what its maker may do is bounded by itself");
    }
}
