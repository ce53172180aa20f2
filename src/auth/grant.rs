//! What a connection may do, who it is, and until when: the result of a credential, kept as long as the connection.
//!
//! Source: protocol version 1, sections 2 (claims, order of refusal), 4 (`auth_update` keeps the identity) and 6.
//! Memory: one [`Grant`] per connection, 64 bytes and the text of its subject. What many connections have in common
//! stands once per core in a [`RightsTable`], which holds at most twice the rights in use.
//! Errors: [`Refusal`], the caller's fault. Not here: how a credential is checked (`jwt`), when a connection ends
//! (`connection`).

use std::collections::HashSet;
use std::num::{NonZeroU32, NonZeroU64};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use ring::digest;

use super::api_key::{ApiKey, ApiKeyMark};
use super::keys::KeyId;
use crate::ids::EphemeralId;
use crate::secret::Secret;
use crate::time::WallTime;

/// Where a grant came from.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum CredentialKind {
    /// A JSON Web Token.
    Jwt,
    /// A session of the application's, kept in Redis.
    Session,
    /// A key made for programs.
    ApiKey,
    /// A one-time ticket, made for another credential and good for as long as that.
    Ticket,
    /// No credential was presented.
    Anonymous,
}

impl CredentialKind {
    /// Its name, as `auth.type` of `welcome` spells it.
    pub const fn as_str(self) -> &'static str {
        match self {
            CredentialKind::Jwt => "jwt",
            CredentialKind::Session => "session",
            CredentialKind::ApiKey => "api_key",
            CredentialKind::Ticket => "ticket",
            CredentialKind::Anonymous => "anonymous",
        }
    }
}

/// A top-level claim, as far as a template can use it.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum ClaimValue {
    /// A string, unescaped.
    Text(Box<str>),
    /// An integer, spelled as in the token, which is also its JSON.
    Integer(Box<str>),
    /// Present, and neither: a template that names it is refused with `CLAIM_INVALID`, not `CLAIM_MISSING`.
    Other,
}

/// What the `streams` claim lists: ids, in which `*` stands for any run of characters, also none.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Globs(Box<[Box<str>]>);

impl Globs {
    /// The globs of a claim. An empty list matches nothing.
    pub fn new(globs: Vec<Box<str>>) -> Globs {
        Globs(globs.into_boxed_slice())
    }

    /// Each of them, as written.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|glob| &**glob)
    }

    /// Whether any of them matches the whole of `id`.
    pub fn matches(&self, id: &str) -> bool {
        self.0.iter().any(|glob| glob_matches(glob.as_bytes(), id.as_bytes()))
    }
}

/// The part of a grant that many connections have in common. Made once per core by a [`RightsTable`].
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
pub struct Rights {
    /// Who issued the credential, where it says. It stands here because few issuers serve many subjects.
    pub issuer: Option<Box<str>>,
    /// In the order of the credential.
    pub roles: Box<[Box<str>]>,
    /// In the order of the credential.
    pub permissions: Box<[Box<str>]>,
    /// The streams it is limited to; `None`: every stream whose roles and permissions let it in.
    pub streams: Option<Globs>,
    /// The claims that templates name, sorted by name.
    pub claims: Box<[(Box<str>, ClaimValue)]>,
    /// The API key that it all hangs on: of one presented, and of a ticket made for one.
    pub api_key: Option<Arc<ApiKey>>,
    /// The ephemeral session that it is good for, and no other stream than that session's.
    pub only: Option<Only>,
}

/// What the token of an ephemeral session opens.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub struct Only {
    /// The session.
    pub session: EphemeralId,
    /// The name of its stream.
    pub stream: Box<str>,
    /// When the session ends at the latest.
    pub ends: WallTime,
}

impl Only {
    /// When what hangs on that ends, where its session's end may come first.
    fn sooner(only: Option<&Only>, expires: MaybeTime) -> MaybeTime {
        MaybeTime(only.map_or(expires.0, |only| only.ends.min(expires.0)))
    }
}

/// Every distinct [`Rights`] of one core's connections, once.
#[derive(Debug)]
pub struct RightsTable {
    rights: HashSet<Rc<Rights>>,
    /// Length at which those that no grant holds are dropped.
    sweep_at: usize,
}

/// Length of a [`RightsTable`] under which sweeping is not worth the look.
const SWEEP_RIGHTS_MIN: usize = 64;

impl Default for RightsTable {
    fn default() -> RightsTable {
        RightsTable { rights: HashSet::new(), sweep_at: SWEEP_RIGHTS_MIN }
    }
}

impl RightsTable {
    /// The shared copy of `rights`.
    pub fn intern(&mut self, rights: Rights) -> Rc<Rights> {
        if let Some(shared) = self.rights.get(&rights) {
            return Rc::clone(shared);
        }
        if self.rights.len() >= self.sweep_at {
            self.rights.retain(|shared| Rc::strong_count(shared) > 1);
            // Doubling makes a sweep cost each insertion a constant; shrinking gives back what a peak has taken.
            self.sweep_at = SWEEP_RIGHTS_MIN.max(self.rights.len() * 2);
            self.rights.shrink_to(self.sweep_at);
        }
        let shared = Rc::new(rights);
        self.rights.insert(Rc::clone(&shared));
        shared
    }

    /// Ends `grant`, and forgets its rights at once where no other grant has them. Grants that are merely dropped leave
    /// theirs to the next sweep, which comes with new ones only: after a peak that may be long.
    pub fn release(&mut self, grant: Grant) {
        self.release_rights(grant.rights);
    }

    fn release_rights(&mut self, rights: Rc<Rights>) {
        // The table's own and the grant's: nobody else's.
        if Rc::strong_count(&rights) == 2 {
            self.rights.remove(&rights);
        }
    }

    /// How many distinct rights it holds: at most the larger of 64 and twice those in use at the last sweep.
    pub fn len(&self) -> usize {
        self.rights.len()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.rights.is_empty()
    }
}

/// A token's `jti`, hashed: enough to find the connections of a revoked token, and 8 bytes instead of its text. Of a token
/// that names neither itself nor its subject it is a hash of all that it says: something is to tell its bearers apart.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct TokenMark(NonZeroU64);

impl TokenMark {
    /// The mark of these bits; `None`: none has them.
    pub fn of_bits(bits: u64) -> Option<TokenMark> {
        NonZeroU64::new(bits).map(TokenMark)
    }

    /// Its bits, the same in every process.
    pub fn bits(self) -> u64 {
        self.0.get()
    }

    /// The mark of the token with this `jti`.
    pub fn of(jti: &str) -> TokenMark {
        TokenMark::of_hash(&digest::digest(&digest::SHA256, jti.as_bytes()))
    }

    /// The mark of a token that has none, of its payload.
    pub(super) fn of_payload(payload: &[u8]) -> TokenMark {
        let mut context = digest::Context::new(&digest::SHA256);
        context.update(b"restcast: token without jti, 1\0");
        context.update(payload);
        TokenMark::of_hash(&context.finish())
    }

    fn of_hash(hash: &digest::Digest) -> TokenMark {
        let bits = hash.as_ref().first_chunk().map_or(0, |first| u64::from_be_bytes(*first));
        TokenMark(NonZeroU64::new(bits).unwrap_or(NonZeroU64::MIN))
    }
}

/// Which of its core's sessions a grant hangs on. Lent by the core's table for as long as one of its connections does.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct SessionNo(NonZeroU32);

impl SessionNo {
    /// The session at that place of the table.
    pub fn at(place: u32) -> SessionNo {
        SessionNo(NonZeroU32::MIN.saturating_add(place))
    }

    /// Its place.
    pub fn place(self) -> u32 {
        self.0.get() - 1
    }
}

/// A wall time that may be absent, in the space of one that may not. The last microsecond of the clock stands for none.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MaybeTime(WallTime);

impl MaybeTime {
    const NONE: WallTime = WallTime::from_micros(u64::MAX);

    /// That time, or none.
    pub fn new(time: Option<WallTime>) -> MaybeTime {
        MaybeTime(time.unwrap_or(MaybeTime::NONE))
    }

    /// The time, where there is one.
    pub fn known(self) -> Option<WallTime> {
        (self.0 != MaybeTime::NONE).then_some(self.0)
    }
}

/// Why a grant does not reach a stream.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Refusal {
    /// Nobody in particular asks, and the stream wants to know who: 401.
    MissingCredential,
    /// The credential's `streams` claim does not list it: 403, whether or not there is such a stream.
    Forbidden,
    /// None of the stream's roles, or not all of its permissions: 403.
    InsufficientPermissions,
}

impl Refusal {
    /// Its code in `error` frames and problem documents.
    pub const fn code(self) -> &'static str {
        match self {
            Refusal::MissingCredential => "MISSING_CREDENTIAL",
            Refusal::Forbidden => "FORBIDDEN",
            Refusal::InsufficientPermissions => "INSUFFICIENT_PERMISSIONS",
        }
    }
}

/// What one connection may do. Cheap to clone, apart from the subject's text.
#[derive(Clone, Debug)]
pub struct Grant {
    sub: Option<Box<str>>,
    expires: MaybeTime,
    issued_at: MaybeTime,
    key: Option<KeyId>,
    token: Option<TokenMark>,
    rights: Rc<Rights>,
    session: Option<SessionNo>,
    kind: CredentialKind,
}

// One stands in each connection: what is added here is paid a million times.
const _: () = assert!(size_of::<Grant>() <= 64, "a Grant takes at most 64 bytes");

/// What a token grants, besides its [`Rights`].
#[derive(Clone, Debug)]
pub(super) struct TokenFacts {
    pub(super) sub: Option<Box<str>>,
    pub(super) expires: WallTime,
    pub(super) issued_at: Option<WallTime>,
    pub(super) token: Option<TokenMark>,
    pub(super) key: KeyId,
}

/// A grant in words that mean the same on every core and in every process.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct GrantRecord {
    /// The user id.
    pub sub: Option<Box<str>>,
    /// `exp`.
    pub expires: Option<WallTime>,
    /// `iat`.
    pub issued_at: Option<WallTime>,
    /// The key that verified it.
    pub key: Option<KeyId>,
    /// The mark of its `jti`.
    pub token: Option<TokenMark>,
    /// What it may do.
    pub rights: Rights,
    /// The id of the session it hangs on.
    pub session: Option<Secret>,
    /// The API key that it hangs on: what that gives now is what it gives.
    pub api_key: Option<ApiKeyMark>,
}

impl GrantRecord {
    /// Whether `other` is the same caller's: of the same subject, or, where there is none, by the same token.
    pub fn is_same_caller(&self, other: &GrantRecord) -> bool {
        let key = |record: &GrantRecord| record.api_key.as_ref().map(|mark| mark.id.clone());
        self.sub == other.sub
            && (self.sub.is_some() || self.token.is_some() && self.token == other.token)
            && self.rights.issuer == other.rights.issuer
            && key(self) == key(other)
    }
}

impl Grant {
    /// The grant of a verified token.
    pub(super) fn of_token(facts: TokenFacts, rights: Rc<Rights>) -> Grant {
        Grant {
            sub: facts.sub,
            expires: MaybeTime(facts.expires),
            issued_at: MaybeTime::new(facts.issued_at),
            key: Some(facts.key),
            token: facts.token,
            rights,
            session: None,
            kind: CredentialKind::Jwt,
        }
    }

    /// The grant of a session.
    pub fn of_session(user: &str, expires: Option<WallTime>, rights: Rc<Rights>, session: SessionNo) -> Grant {
        Grant {
            sub: Some(user.into()),
            expires: MaybeTime::new(expires),
            issued_at: MaybeTime::new(None),
            key: None,
            token: None,
            rights,
            session: Some(session),
            kind: CredentialKind::Session,
        }
    }

    /// The same, got by a ticket.
    pub fn by_ticket(self) -> Grant {
        Grant { kind: CredentialKind::Ticket, ..self }
    }

    /// The same, good for one ephemeral session alone. It ends with that, and before it with the session or API key that it
    /// hangs on, but not with the token of its maker.
    pub fn limited(self, only: Only, table: &mut RightsTable) -> Grant {
        let own = if self.hangs_on_record() { self.expires } else { MaybeTime::new(None) };
        let expires = Only::sooner(Some(&only), own);
        let rights = table.intern(Rights { only: Some(only), ..Rights::clone(&self.rights) });
        let Grant { sub, issued_at, key, token, session, .. } = self;
        table.release_rights(self.rights);
        Grant { sub, expires, issued_at, key, token, rights, session, kind: CredentialKind::Ticket }
    }

    fn hangs_on_record(&self) -> bool {
        self.session.is_some() || self.api_key().is_some()
    }

    /// The ephemeral session that it is good for, where that is all.
    pub fn only(&self) -> Option<&Only> {
        self.rights.only.as_ref()
    }

    /// The same, under what the session's record says now.
    pub fn renewed(&self, expires: Option<WallTime>, rights: Rc<Rights>, table: &mut RightsTable) -> Grant {
        let rights = match self.only() {
            None => rights,
            Some(only) => table.intern(Rights { only: Some(only.clone()), ..Rights::clone(&rights) }),
        };
        let expires = Only::sooner(self.only(), MaybeTime::new(expires));
        Grant { expires, rights, ..self.clone() }
    }

    /// What a ticket for this grant must hold, so that another core or process can make the same of it.
    pub fn to_record(&self, session: Option<Secret>) -> GrantRecord {
        GrantRecord {
            sub: self.sub.clone(),
            expires: self.expires(),
            issued_at: self.issued_at(),
            key: self.key,
            token: self.token,
            rights: Rights { api_key: None, ..Rights::clone(&self.rights) },
            session,
            api_key: self.api_key().map(|key| key.mark()),
        }
    }

    /// The grant of a ticket that was made for `record`, where that is no session's and no API key's.
    pub fn of_record(record: GrantRecord, table: &mut RightsTable) -> Grant {
        Grant {
            sub: record.sub,
            expires: MaybeTime::new(record.expires),
            issued_at: MaybeTime::new(record.issued_at),
            key: record.key,
            token: record.token,
            rights: table.intern(record.rights),
            session: None,
            kind: CredentialKind::Ticket,
        }
    }

    /// The grant of a caller without a credential. It has no end.
    pub fn anonymous(table: &mut RightsTable) -> Grant {
        Grant {
            sub: None,
            expires: MaybeTime::new(None),
            issued_at: MaybeTime::new(None),
            key: None,
            token: None,
            rights: table.intern(Rights::default()),
            session: None,
            kind: CredentialKind::Anonymous,
        }
    }

    /// The grant of an API key. Its subject is the key's id; it has no claims, so it fills no template.
    pub fn of_api_key(key: &Arc<ApiKey>, table: &mut RightsTable) -> Grant {
        let texts = |list: &[String]| list.iter().map(|text| text.as_str().into()).collect();
        let rights = Rights {
            issuer: None,
            roles: texts(&key.roles),
            permissions: texts(&key.permissions),
            streams: Some(Globs::new(key.streams.iter().map(|glob| glob.as_str().into()).collect())),
            claims: Box::default(),
            api_key: Some(Arc::clone(key)),
            only: None,
        };
        Grant {
            sub: Some(key.id.as_str().into()),
            expires: MaybeTime::new(key.expires),
            issued_at: MaybeTime::new(None),
            key: None,
            token: None,
            rights: table.intern(rights),
            session: None,
            kind: CredentialKind::ApiKey,
        }
    }

    /// What this grant becomes when its API key is now that: the same but for what the key gives.
    pub fn with_api_key(&self, key: &Arc<ApiKey>, table: &mut RightsTable) -> Grant {
        let grant = Grant { kind: self.kind, ..Grant::of_api_key(key, table) };
        match self.only() {
            None => grant,
            Some(only) => {
                let rights = table.intern(Rights { only: Some(only.clone()), ..Rights::clone(&grant.rights) });
                Grant { rights, expires: Only::sooner(self.only(), grant.expires), ..grant }
            }
        }
    }

    /// Where it came from.
    pub fn kind(&self) -> CredentialKind {
        self.kind
    }

    /// The user id, where the credential has one.
    pub fn sub(&self) -> Option<&str> {
        self.sub.as_deref()
    }

    /// The issuer, where the credential names one.
    pub fn issuer(&self) -> Option<&str> {
        self.rights.issuer.as_deref()
    }

    /// `exp` itself: what `expires_at` shows. `None`: it does not expire.
    pub fn expires(&self) -> Option<WallTime> {
        self.expires.known()
    }

    /// When it ends: `exp` and the allowance for clocks that differ. From then on no stream frame is started. Of a session
    /// the store has told how long it lives from now on, and an API key ends by this server's own clock: there no clock can
    /// differ.
    pub fn end(&self, leeway: Duration) -> Option<WallTime> {
        let is_ours = self.hangs_on_record() || self.only().is_some();
        let leeway = if is_ours { Duration::ZERO } else { leeway };
        self.expires().map(|expires| expires + leeway)
    }

    /// `iat`, where the credential has it.
    pub fn issued_at(&self) -> Option<WallTime> {
        self.issued_at.known()
    }

    /// The key that verified it; `None` where none was needed.
    pub fn key(&self) -> Option<KeyId> {
        self.key
    }

    /// The mark of its `jti`, where it has one.
    pub fn token(&self) -> Option<TokenMark> {
        self.token
    }

    /// Whether it stands for a token, its own or the one its ticket was made for: what is said of tokens holds for it.
    pub fn is_of_token(&self) -> bool {
        self.key.is_some()
    }

    /// Puts other permissions and roles in the place of its own, where they are given; whether anything has changed.
    pub fn replace_rights(
        &mut self,
        table: &mut RightsTable,
        permissions: Option<&[Box<str>]>,
        roles: Option<&[Box<str>]>,
    ) -> bool {
        let same = |own: &[Box<str>], new: Option<&[Box<str>]>| new.is_none_or(|new| new == own);
        if same(&self.rights.permissions, permissions) && same(&self.rights.roles, roles) {
            return false;
        }
        let own = &*self.rights;
        let rights = table.intern(Rights {
            issuer: own.issuer.clone(),
            roles: roles.map_or_else(|| own.roles.clone(), Box::from),
            permissions: permissions.map_or_else(|| own.permissions.clone(), Box::from),
            streams: own.streams.clone(),
            claims: own.claims.clone(),
            api_key: own.api_key.clone(),
            only: own.only.clone(),
        });
        table.release_rights(std::mem::replace(&mut self.rights, rights));
        true
    }

    /// The session it hangs on, where it does.
    pub fn session(&self) -> Option<SessionNo> {
        self.session
    }

    /// The API key that it hangs on, where it does.
    pub fn api_key(&self) -> Option<&Arc<ApiKey>> {
        self.rights.api_key.as_ref()
    }

    /// What it may do.
    pub fn rights(&self) -> &Rc<Rights> {
        &self.rights
    }

    /// The claim called `name`, among those that templates name; `None`: the credential does not have it.
    pub fn claim(&self, name: &str) -> Option<&ClaimValue> {
        let claims = &self.rights.claims;
        let place = claims.binary_search_by(|claim| claim.0.as_ref().cmp(name)).ok()?;
        claims.get(place).map(|claim| &claim.1)
    }

    /// Whether both are the same user: the same subject of the same issuer, each possibly absent in both. Two tokens
    /// of one issuer that name no subject are the same one, a caller without a credential is nobody's equal but its own
    /// kind's, and a user whose id is spelled like an API key's is not that key.
    pub fn same_identity(&self, other: &Grant) -> bool {
        let anonymous = |grant: &Grant| grant.kind == CredentialKind::Anonymous;
        anonymous(self) == anonymous(other)
            && self.api_key().is_some() == other.api_key().is_some()
            && self.sub == other.sub
            && self.issuer() == other.issuer()
            // What is good for one stream neither takes the place of what is good for more, nor the other way round.
            && self.only() == other.only()
    }

    /// Whether the `streams` claim, if there is one, lists this id. Asked before it is known whether such a stream exists,
    /// so that the answer tells nothing of that.
    ///
    /// Errors: [`Refusal::Forbidden`].
    pub fn streams_allow(&self, stream_id: &str) -> Result<(), Refusal> {
        match (&self.rights.streams, &self.rights.only) {
            (Some(globs), _) if !globs.matches(stream_id) => Err(Refusal::Forbidden),
            (_, Some(only)) if *only.stream != *stream_id => Err(Refusal::Forbidden),
            _ => Ok(()),
        }
    }

    /// Whether this grant reaches a stream that exists: the `streams` claim, then any one of the stream's `roles` (where
    /// it has some) and all of its `permissions`. A caller without a credential reaches streams that allow it and demand
    /// nothing.
    ///
    /// Errors: the first of these that fails.
    pub fn may_watch(
        &self,
        stream_id: &str,
        allow_anonymous: bool,
        roles: &[String],
        permissions: &[String],
    ) -> Result<(), Refusal> {
        self.streams_allow(stream_id)?;
        let demands_nothing = roles.is_empty() && permissions.is_empty();
        if self.kind == CredentialKind::Anonymous && !(allow_anonymous && demands_nothing) {
            return Err(Refusal::MissingCredential);
        }
        self.has_rights(roles, permissions)
    }

    /// Whether it has any one of `roles` (where there are some) and all of `permissions`.
    ///
    /// Errors: [`Refusal::InsufficientPermissions`].
    pub fn has_rights(&self, roles: &[String], permissions: &[String]) -> Result<(), Refusal> {
        let holds = |held: &[Box<str>], wanted: &String| held.iter().any(|own| **own == **wanted);
        let any_role = roles.is_empty() || roles.iter().any(|role| holds(&self.rights.roles, role));
        let all_permissions = permissions.iter().all(|permission| holds(&self.rights.permissions, permission));
        if any_role && all_permissions { Ok(()) } else { Err(Refusal::InsufficientPermissions) }
    }
}

/// Whether `glob` matches the whole of `text`. Only the last `*` is ever retried, so the work is at most the product of
/// the lengths, of which that of a stream id is bounded.
fn glob_matches(glob: &[u8], text: &[u8]) -> bool {
    let (mut at_glob, mut at_text) = (0, 0);
    // Behind the last `*` seen, and what it has been taken to cover up to.
    let mut retry: Option<(usize, usize)> = None;
    while let Some(byte) = text.get(at_text) {
        match glob.get(at_glob) {
            Some(b'*') => {
                at_glob += 1;
                retry = Some((at_glob, at_text));
            }
            Some(wanted) if wanted == byte => {
                at_glob += 1;
                at_text += 1;
            }
            _ => {
                let Some((behind_star, covered)) = retry else { return false };
                retry = Some((behind_star, covered + 1));
                at_glob = behind_star;
                at_text = covered + 1;
            }
        }
    }
    glob.get(at_glob..).unwrap_or_default().iter().all(|&rest| rest == b'*')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::auth::api_key::{ApiKeyId, KeyHash, Source};
    use crate::auth::keys::{Algorithm, KeyConfig, KeySet};

    fn texts(list: &[&str]) -> Box<[Box<str>]> {
        list.iter().map(|&text| Box::from(text)).collect()
    }

    fn owned(list: &[&str]) -> Vec<String> {
        list.iter().map(|&text| text.to_owned()).collect()
    }

    fn some_key() -> KeyId {
        let config = KeyConfig { kid: None, algorithm: Algorithm::Hs256, secret: Secret::new([1; 32]) };
        KeySet::new(&[config]).unwrap().iter().next().unwrap().id()
    }

    fn grant(sub: Option<&str>, rights: Rights) -> Grant {
        let facts = TokenFacts {
            sub: sub.map(Box::from),
            expires: WallTime::from_secs(100),
            issued_at: Some(WallTime::from_secs(40)),
            token: Some(TokenMark::of("t1")),
            key: some_key(),
        };
        Grant::of_token(facts, Rc::new(rights))
    }

    #[test]
    fn a_grant_tells_its_times() {
        let ada = grant(Some("ada"), Rights::default());
        assert_eq!(ada.expires(), Some(WallTime::from_secs(100)));
        assert_eq!(ada.end(Duration::from_secs(5)), Some(WallTime::from_secs(105)));
        assert_eq!(ada.issued_at(), Some(WallTime::from_secs(40)));
        assert_eq!((ada.token(), ada.key()), (Some(TokenMark::of("t1")), Some(some_key())));
        assert_ne!(ada.token(), Some(TokenMark::of("t2")));
        let nobody = Grant::anonymous(&mut RightsTable::default());
        assert_eq!((nobody.expires(), nobody.end(Duration::MAX), nobody.issued_at()), (None, None, None));
        assert_eq!((nobody.sub(), nobody.key(), nobody.token()), (None, None, None));
        assert_eq!([ada.kind().as_str(), nobody.kind().as_str()], ["jwt", "anonymous"]);
    }

    #[test]
    fn what_is_good_for_one_session_ends_with_it_at_the_latest() {
        let mut table = RightsTable::default();
        let at = WallTime::from_secs;
        let only = || Only { session: EphemeralId(1), stream: "direct:a".into(), ends: at(100) };
        // A token's own end is not its: it may be renewed, and this may not.
        for exp in [50, 200] {
            let token = grant(Some("ada"), Rights::default());
            let token = Grant { expires: MaybeTime::new(Some(at(exp))), ..token };
            assert_eq!(token.limited(only(), &mut table).expires(), Some(at(100)));
        }
        for (record, end) in [(None, 100), (Some(200), 100), (Some(50), 50)] {
            let rights = table.intern(Rights::default());
            let session = Grant::of_session("ada", record.map(at), Rc::clone(&rights), SessionNo::at(0));
            let limited = session.limited(only(), &mut table);
            assert_eq!(limited.expires(), Some(at(end)), "{record:?}");
            for (renewed, end) in [(None, 100), (Some(70), 70), (Some(300), 100)] {
                let renewed = limited.renewed(renewed.map(at), Rc::clone(&rights), &mut table);
                assert_eq!(renewed.expires(), Some(at(end)));
            }
        }
        let key = |expires: Option<u64>| {
            Arc::new(ApiKey {
                id: ApiKeyId::new("dashboard").expect("an id"),
                hash: KeyHash::new(&Secret::new([7; 32]), [7; 16]),
                streams: Vec::new(),
                roles: Vec::new(),
                permissions: Vec::new(),
                rate: 0,
                created: None,
                expires: expires.map(at),
                source: Source::File,
            })
        };
        let limited = Grant::of_api_key(&key(None), &mut table).limited(only(), &mut table);
        assert_eq!(limited.expires(), Some(at(100)));
        for (expires, end) in [(None, 100), (Some(200), 100), (Some(50), 50)] {
            assert_eq!(limited.with_api_key(&key(expires), &mut table).expires(), Some(at(end)));
        }
    }

    #[test]
    fn roles_are_any_one_and_permissions_all() {
        let ada = Rights { roles: texts(&["agent"]), permissions: texts(&["read", "list"]), ..Rights::default() };
        let ada = grant(Some("ada"), ada);
        let ask =
            |roles: &[&str], permissions: &[&str]| ada.may_watch("leads", false, &owned(roles), &owned(permissions));
        assert_eq!(ask(&[], &[]), Ok(()));
        assert_eq!(ask(&["admin", "agent"], &["list", "read"]), Ok(()));
        assert_eq!(ask(&["admin"], &[]), Err(Refusal::InsufficientPermissions));
        assert_eq!(ask(&["agent"], &["read", "write"]), Err(Refusal::InsufficientPermissions));
        assert_eq!(ask(&["Agent"], &[]), Err(Refusal::InsufficientPermissions), "names are compared exactly");
    }

    #[test]
    fn a_streams_claim_comes_first_and_rights_still_count() {
        let globs = Globs::new(vec!["leads".into(), "orders:*".into()]);
        let ada = grant(Some("ada"), Rights { streams: Some(globs), roles: texts(&["agent"]), ..Rights::default() });
        let agent = owned(&["agent"]);
        let admin = owned(&["admin"]);
        assert_eq!(ada.may_watch("leads", false, &agent, &[]), Ok(()));
        assert_eq!(ada.may_watch("orders:7", true, &[], &[]), Ok(()));
        assert_eq!(ada.may_watch("leads", false, &admin, &[]), Err(Refusal::InsufficientPermissions));
        assert_eq!(ada.may_watch("users", true, &admin, &[]), Err(Refusal::Forbidden));
        assert_eq!(ada.streams_allow("users"), Err(Refusal::Forbidden));
        let none = grant(Some("ada"), Rights { streams: Some(Globs::new(Vec::new())), ..Rights::default() });
        assert_eq!(none.streams_allow("leads"), Err(Refusal::Forbidden), "an empty list allows nothing");
    }

    #[test]
    fn anonymous_reaches_only_streams_that_allow_it_and_demand_nothing() {
        let nobody = Grant::anonymous(&mut RightsTable::default());
        assert_eq!(nobody.may_watch("leads", true, &[], &[]), Ok(()));
        assert_eq!(nobody.may_watch("leads", false, &[], &[]), Err(Refusal::MissingCredential));
        assert_eq!(nobody.may_watch("leads", true, &owned(&["agent"]), &[]), Err(Refusal::MissingCredential));
        assert_eq!(nobody.may_watch("leads", true, &[], &owned(&["read"])), Err(Refusal::MissingCredential));
    }

    #[test]
    fn refusals_have_their_codes() {
        let codes =
            [Refusal::MissingCredential, Refusal::Forbidden, Refusal::InsufficientPermissions].map(Refusal::code);
        assert_eq!(codes, ["MISSING_CREDENTIAL", "FORBIDDEN", "INSUFFICIENT_PERMISSIONS"]);
    }

    #[test]
    fn identity_is_issuer_and_subject() {
        let of = |issuer: Option<&str>, sub| {
            grant(sub, Rights { issuer: issuer.map(Box::from), roles: texts(&["any"]), ..Rights::default() })
        };
        let ada = of(Some("a"), Some("ada"));
        let other_rights = grant(Some("ada"), Rights { issuer: Some("a".into()), ..Rights::default() });
        assert!(ada.same_identity(&other_rights));
        assert!(!ada.same_identity(&of(Some("b"), Some("ada"))));
        assert!(!ada.same_identity(&of(None, Some("ada"))));
        assert!(!ada.same_identity(&of(Some("a"), Some("bob"))));
        assert!(!ada.same_identity(&of(Some("a"), None)));
        assert!(of(Some("a"), None).same_identity(&of(Some("a"), None)));
        assert!(!of(Some("a"), None).same_identity(&of(Some("a"), Some(""))), "an empty subject is a subject");
        let nobody = Grant::anonymous(&mut RightsTable::default());
        assert!(!nobody.same_identity(&grant(None, Rights::default())));
        assert!(nobody.same_identity(&nobody.clone()));
    }

    #[test]
    fn claims_are_found_by_name() {
        let claims = [("a".into(), ClaimValue::Other), ("companyId".into(), ClaimValue::Integer("42".into()))];
        let ada = grant(None, Rights { claims: Box::new(claims), ..Rights::default() });
        assert_eq!(ada.claim("companyId"), Some(&ClaimValue::Integer("42".into())));
        assert_eq!(ada.claim("a"), Some(&ClaimValue::Other));
        assert_eq!(ada.claim("b"), None);
    }

    #[test]
    fn equal_rights_stand_once_and_unused_ones_go() {
        let mut table = RightsTable::default();
        let role = |n: usize| Rights { roles: texts(&[&format!("r{n}")]), ..Rights::default() };
        let kept = [0, 1, 2].map(|n| table.intern(role(n)));
        let [first, _, last] = &kept;
        assert!(Rc::ptr_eq(first, &table.intern(role(0))));
        assert_eq!((table.len(), table.is_empty()), (3, false));
        for n in 0..10_000 {
            table.intern(role(n));
            assert!(table.len() <= SWEEP_RIGHTS_MIN);
        }
        assert!(Rc::ptr_eq(last, &table.intern(role(2))), "what a grant holds survives every sweep");
        let many: Vec<Rc<Rights>> = (0..1_000).map(|n| table.intern(role(n))).collect();
        assert!(table.len() <= 2 * many.len());
        drop(many);
        (1_000..4_000).for_each(|n| drop(table.intern(role(n))));
        assert!(table.len() <= SWEEP_RIGHTS_MIN, "and a peak is given back");
    }

    #[test]
    fn a_released_grant_takes_its_rights_along_when_it_was_the_last() {
        let mut table = RightsTable::default();
        let ada = Grant::anonymous(&mut table);
        let bob = Grant::anonymous(&mut table);
        assert_eq!(table.len(), 1);
        table.release(ada);
        assert_eq!(table.len(), 1);
        assert!(Rc::ptr_eq(bob.rights(), &table.intern(Rights::default())));
        table.release(bob);
        assert!(table.is_empty());
        // One that another table made, or none, is no news to this one.
        table.intern(Rights::default());
        table.release(grant(Some("ada"), Rights::default()));
        assert_eq!(table.len(), 1);
    }

    #[test]
    fn a_star_is_any_run_of_characters() {
        let matches = |glob: &str, id: &str| Globs::new(vec![glob.into()]).matches(id);
        for (glob, id) in [
            ("leads", "leads"),
            ("*", "x"),
            ("*", ""),
            ("orders:*", "orders:"),
            ("*:eu", "a:eu:eu"),
            ("a*b*c", "aXbYbZc"),
            ("**", "ab"),
        ] {
            assert!(matches(glob, id), "{glob} {id}");
        }
        for (glob, id) in [
            ("leads", "lead"),
            ("lead", "leads"),
            ("", "x"),
            ("a*b", "aXc"),
            ("*a", "ab"),
            ("Leads", "leads"),
            ("l?ads", "leads"),
        ] {
            assert!(!matches(glob, id), "{glob} {id}");
        }
        let slow = "*a".repeat(2_000) + "b";
        assert!(!matches(&slow, &"a".repeat(128)));
    }

    proptest! {
        #[test]
        fn globs_match_as_the_plain_recursion_does(glob in "[ab*]{0,8}", id in "[ab]{0,10}") {
            fn plain(glob: &[u8], text: &[u8]) -> bool {
                match (glob.split_first(), text.split_first()) {
                    (None, _) => text.is_empty(),
                    (Some((b'*', rest)), None) => plain(rest, text),
                    (Some((b'*', rest)), Some((_, shorter))) => plain(rest, text) || plain(glob, shorter),
                    (Some((want, rest)), Some((have, shorter))) => want == have && plain(rest, shorter),
                    (Some(_), None) => false,
                }
            }
            prop_assert_eq!(glob_matches(glob.as_bytes(), id.as_bytes()), plain(glob.as_bytes(), id.as_bytes()));
        }
    }
}
