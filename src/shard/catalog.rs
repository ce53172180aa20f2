//! The configured streams, and what one of them becomes for one caller: a filled-in URL that may be shared.
//!
//! Source: protocol version 1, sections 1 («Templates») and 2 («Order of refusal»).
//! Memory: one entry a configured stream; a key for each view of a filled-in URL in use, shared by all who watch it.
//! Errors: [`Refusal`], in the protocol's order. Not here: polling, subscribing.

use std::collections::{BTreeSet, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Arc, OnceLock};

use url::Url;

use crate::auth::grant::{self, ClaimValue, CredentialKind, Grant};
use crate::auth::jwt::REGISTERED_CLAIMS;
use crate::codec::json::write_string;
use crate::codec::message::ErrorCode;
use crate::codec::proof::Scope;
use crate::connection::handshake::Refusal;
use crate::frame::Signed;
use crate::guard::DirectOptions;
use crate::ids::{CoreId, Keeper, StreamId};
use crate::limits::PLACE_SPACING_MAX;
use crate::secret::Secret;
use crate::stream::credential::Credential;
use crate::stream::live::Live;
use crate::stream::poll::Target;
use crate::stream::select::{Facet, Select};
use crate::stream::template::{self, FillError};
use crate::stream::{self, action};

use super::places::Wanted;
use super::refresh_mark::RefreshMark;

/// What one caller watches: a stream, filled in, and what of it they are shown. Equal for two callers exactly if they get the
/// same sequence; [`StreamKey::is_polled_with`] if they may share each other's responses.
#[derive(Debug)]
pub struct StreamKey {
    /// What it is called in frames.
    pub name: Arc<str>,
    /// The values of its parameters: with the id of `target`, what a caller asked for.
    pub params: Vec<(String, String)>,
    /// What is asked of the upstream.
    pub target: Arc<Target>,
    /// Grows when the stream's configuration changes, so that what was polled before is not taken for it.
    pub revision: u64,
    /// What of the value is shown.
    pub facet: Facet,
    /// Whether a caller has described it.
    direct: bool,
    /// Of what is polled: all facets have the same.
    hash: u64,
    /// What other processes tell it by, once that was asked for.
    mark: OnceLock<RefreshMark>,
    /// Of a stream that is signed: the claims that fill its templates, sorted by name, and their values as JSON.
    claims: Arc<[(Box<str>, Box<str>)]>,
    /// What it is called in what is signed, once that was asked for.
    scope: OnceLock<Box<str>>,
}

impl StreamKey {
    /// Whether both are made of the same polls.
    pub fn is_polled_with(&self, other: &StreamKey) -> bool {
        self.hash == other.hash
            && self.name == other.name
            && self.revision == other.revision
            && self.target.url == other.target.url
            && self.target.body == other.target.body
    }

    /// Whether a caller has described it.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// The same stream, another part of its value.
    fn with_facet(&self, facet: Facet) -> StreamKey {
        let StreamKey { name, params, target, revision, direct, hash, mark, claims, .. } = self;
        let (name, params, target, mark) = (Arc::clone(name), params.clone(), Arc::clone(target), mark.clone());
        let (claims, scope) = (Arc::clone(claims), OnceLock::new());
        let (revision, direct, hash) = (*revision, *direct, *hash);
        StreamKey { name, params, target, revision, facet, direct, hash, mark, claims, scope }
    }

    /// What signs its events, where they are signed.
    pub fn signed(&self) -> Option<Signed<'_>> {
        let signer = self.target.options.proof.signer.as_ref()?;
        let scope = self.scope.get_or_init(|| {
            let select = self.facet.select.as_ref().map(Select::as_str);
            signer.scope(&Scope { stream: &self.name, claims: &self.claims, view: self.facet.view, select }).into()
        });
        Some(Signed { signer, scope })
    }

    /// What `select` leaves of what is shown.
    pub fn selecting(&self, select: Select) -> Arc<StreamKey> {
        Arc::new(self.with_facet(Facet { view: self.facet.view, select: Some(select) }))
    }

    /// The core that polls it.
    pub fn owner(&self, cores: u16) -> CoreId {
        owner_of(self.hash, cores)
    }

    /// The hash of what is polled, the same on every core of the process.
    pub fn hash_value(&self) -> u64 {
        self.hash
    }

    /// What tells its upstream request from all others, whatever else of the stream may be changed. Of those that callers describe
    /// the headers count too: it is by them that these callers are told apart.
    pub(super) fn course(&self) -> impl Hash {
        let headers = if self.direct { &*self.target.options.headers } else { &[] };
        let headers: Vec<_> = headers.iter().map(|(name, value)| (name, value.expose_secret())).collect();
        (&self.name, &self.target.options.method, self.target.url.as_str(), &self.target.body, headers)
    }

    /// What other processes tell it by: the same in each that would send the same request.
    pub fn mark(&self) -> RefreshMark {
        let Target { options, url, body, .. } = &*self.target;
        *self.mark.get_or_init(|| RefreshMark::of(&self.name, &options.method, url.as_str(), body.as_deref()))
    }

    /// The hash of what is shown, by which a subject's different streams are counted.
    pub fn shown_hash(&self) -> u64 {
        let Some(select) = &self.facet.select else { return self.hash };
        let mut hasher = DefaultHasher::new();
        (self.hash, select).hash(&mut hasher);
        hasher.finish()
    }

    /// Whether the caller's claims, parameters or `select` shape it.
    pub fn is_filled(&self) -> bool {
        self.is_polled_for_callers() || self.facet.select.is_some()
    }

    /// Whether what is polled is shaped by the caller: there are as many of it as callers make.
    pub fn is_polled_for_callers(&self) -> bool {
        let options = &self.target.options;
        let in_body = options.body.as_ref().is_some_and(|body| !body.claims_used().is_empty());
        self.is_direct() || !self.params.is_empty() || !options.url.claims_used().is_empty() || in_body
    }

    /// What of it takes a place. Many share an address: what each of them selects is not its.
    pub(super) fn place_hash(&self, keeper: Keeper) -> u64 {
        match keeper {
            Keeper::Subject(_) => self.shown_hash(),
            Keeper::Address(_) => self.hash,
        }
    }

    /// The place that it needs.
    pub(super) fn wanted_place(&self, keeper: Keeper) -> Wanted {
        let stream::Options { interval, restart_min, .. } = *self.target.options;
        let spacing = if self.is_direct() { restart_min } else { PLACE_SPACING_MAX };
        let polled = self.is_polled_for_callers().then_some(self.hash);
        Wanted { shown: self.place_hash(keeper), polled, spacing: interval.min(spacing) }
    }
}

/// The core that polls what has that hash.
pub(super) fn owner_of(polled: u64, cores: u16) -> CoreId {
    CoreId(u16::try_from(polled % u64::from(cores.max(1))).expect("a remainder is below its divisor"))
}

impl PartialEq for StreamKey {
    fn eq(&self, other: &StreamKey) -> bool {
        self.facet == other.facet && self.is_polled_with(other)
    }
}

impl Eq for StreamKey {}

impl Hash for StreamKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.hash);
        self.facet.hash(state);
    }
}

/// A key as the owner of its stream looks for it: all facets of one filled-in URL are one stream.
#[derive(Clone, Debug)]
pub(super) struct PolledKey(pub(super) Arc<StreamKey>);

impl PartialEq for PolledKey {
    fn eq(&self, other: &PolledKey) -> bool {
        self.0.is_polled_with(&other.0)
    }
}

impl Eq for PolledKey {}

impl Hash for PolledKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.0.hash);
    }
}

#[derive(Debug)]
struct Entry {
    options: Arc<stream::Options>,
    revision: u64,
    /// The keys of all its facets, where no caller shapes it otherwise; else none.
    fixed: Vec<Arc<StreamKey>>,
    /// Whether an administrator has stopped it: it is not polled.
    stopped: bool,
}

impl Entry {
    /// The facet of those who get everything, or, where there are views, of each of these.
    fn facets(options: &stream::Options) -> Vec<Facet> {
        match u16::try_from(options.views.len()) {
            Ok(0) | Err(_) => vec![Facet::WHOLE],
            Ok(views) => (0..views).map(Facet::of_view).collect(),
        }
    }

    /// What `grant` is shown: of a stream with views the first that names a role of theirs.
    fn facet(&self, grant: &Grant) -> Option<Facet> {
        if self.options.views.is_empty() {
            return Some(Facet::WHOLE);
        }
        let view = self.options.views.iter().position(|view| grant.has_rights(&view.roles, &[]).is_ok())?;
        Some(Facet::of_view(u16::try_from(view).ok()?))
    }
}

/// `[direct]`, with the number of the configuration that it was last changed by.
#[derive(Clone, Debug)]
struct Direct {
    options: DirectOptions,
    revision: u64,
}

/// All streams and actions, those of the configuration and those that were made since. A copy shares all that stays the same.
#[derive(Clone, Debug, Default)]
pub struct Catalog {
    direct: Option<Direct>,
    entries: HashMap<StreamId, Arc<Entry>>,
    /// By the `type` of the messages that ask for them.
    actions: HashMap<String, Arc<action::Options>>,
    template_claims: Vec<String>,
    seed: u64,
    revision: u64,
}

impl Catalog {
    /// The catalog of `streams`. Where `previous` has one that is the same, it keeps its revision, so that its
    /// subscribers notice nothing. `seed` makes hashes unpredictable to those who choose parameters.
    pub fn new(streams: &[Arc<stream::Options>], previous: Option<&Catalog>, seed: u64) -> Catalog {
        let mut catalog = Catalog {
            direct: None,
            entries: HashMap::with_capacity(streams.len()),
            actions: HashMap::new(),
            template_claims: Vec::new(),
            seed: previous.map_or(seed, |previous| previous.seed),
            revision: previous.map_or(0, |previous| previous.revision + 1),
        };
        for options in streams {
            let kept = previous.and_then(|previous| previous.entries.get(&options.id));
            let (options, revision) = match kept.filter(|kept| *kept.options == **options) {
                Some(kept) => {
                    // Secrets that stand elsewhere may be others: the next poll carries them, and nothing else changes.
                    kept.options.take_over(options);
                    (Arc::clone(&kept.options), kept.revision)
                }
                None => (Arc::clone(options), catalog.revision),
            };
            catalog.enter(options, revision, false);
        }
        catalog.template_claims.sort_unstable();
        catalog.template_claims.dedup();
        catalog
    }

    /// Puts a stream in. The claims that its templates name are put behind the others.
    fn enter(&mut self, options: Arc<stream::Options>, revision: u64, stopped: bool) {
        let body_claims = options.body.iter().flat_map(|body| body.claims_used());
        let claims = options.url.claims_used().into_iter().chain(body_claims);
        self.template_claims.extend(claims.map(str::to_owned));
        let mut fixed = Vec::new();
        if !self.is_shaped(&options)
            && let Ok(whole) = self.key(&options, revision, Vec::new(), &|_| None)
        {
            fixed.extend(Entry::facets(&options).into_iter().map(|facet| Arc::new(whole.with_facet(facet))));
        }
        self.entries.insert(options.id.clone(), Arc::new(Entry { options, revision, fixed, stopped }));
    }

    /// The same with this stream, in the place of the one of its id if there is one. All others stay as they are.
    pub fn with_stream(mut self, options: &Arc<stream::Options>) -> Catalog {
        let before = self.entries.get(&options.id);
        if let Some(same) = before.filter(|before| *before.options == **options) {
            // Secrets that stand elsewhere may be others.
            same.options.take_over(options);
            return self;
        }
        let stopped = before.is_some_and(|before| before.stopped);
        self.revision += 1;
        self.enter(Arc::clone(options), self.revision, stopped);
        self.template_claims.sort_unstable();
        self.template_claims.dedup();
        self
    }

    /// The same without that stream. The claims that it alone named stay: a grant may hold more than it must.
    pub fn without_stream(mut self, id: &StreamId) -> Catalog {
        self.entries.remove(id);
        self
    }

    /// The same where that stream is stopped, or not.
    pub fn with_stopped(mut self, id: &StreamId, stopped: bool) -> Catalog {
        if let Some(entry) = self.entries.get_mut(id)
            && entry.stopped != stopped
        {
            let Entry { options, revision, fixed, .. } = &**entry;
            let (options, fixed) = (Arc::clone(options), fixed.clone());
            *entry = Arc::new(Entry { options, revision: *revision, fixed, stopped });
        }
        self
    }

    /// The same where these streams are stopped, and no others.
    pub fn with_all_stopped(mut self, stopped: &BTreeSet<StreamId>) -> Catalog {
        for id in stopped {
            self = self.with_stopped(id, true);
        }
        self
    }

    /// Whether an administrator has stopped that stream.
    pub fn is_stopped(&self, id: &StreamId) -> bool {
        self.entries.get(id).is_some_and(|entry| entry.stopped)
    }

    /// The secrets that the hooks of that stream are signed with; none: it has no hook.
    pub fn hook_secrets(&self, id: &StreamId) -> Vec<Secret> {
        self.entries.get(id).map_or(Vec::new(), |entry| entry.options.hook_secrets.iter().map(Live::value).collect())
    }

    /// What the hooks of all its streams are signed with.
    pub fn hook_values(&self) -> impl Iterator<Item = &Live> {
        self.entries.values().flat_map(|entry| &entry.options.hook_secrets)
    }

    /// The same with these actions.
    pub fn with_actions(mut self, actions: &[Arc<action::Options>]) -> Catalog {
        for options in actions {
            self.template_claims.extend(options.claims_used().map(str::to_owned));
            self.actions.insert(options.kind.clone(), Arc::clone(options));
        }
        self.template_claims.sort_unstable();
        self.template_claims.dedup();
        self
    }

    /// The same, where callers may describe streams of their own. What is as it was in `previous` keeps its revision.
    pub fn with_direct(mut self, options: Option<&DirectOptions>, previous: Option<&Catalog>) -> Catalog {
        let kept = previous.and_then(|previous| previous.direct.as_ref());
        self.direct = options.map(|options| match kept.filter(|kept| kept.options == *options) {
            Some(kept) => Direct { options: kept.options.clone(), revision: kept.revision },
            None => Direct { options: options.clone(), revision: self.revision },
        });
        self
    }

    /// Whether callers may describe streams of their own, and which.
    pub fn direct(&self) -> Option<&DirectOptions> {
        self.direct.as_ref().map(|direct| &direct.options)
    }

    /// The key of a stream that a caller has described: `name` is another for each request. `None`: there are none such.
    pub(super) fn direct_key(
        &self,
        name: String,
        options: stream::Options,
        url: Url,
        body: Option<Arc<[u8]>>,
    ) -> Option<StreamKey> {
        let Direct { options: direct, revision } = self.direct.as_ref()?;
        let mut hasher = DefaultHasher::new();
        (self.seed, revision, &name).hash(&mut hasher);
        // A name that another process has made, or somebody in its place, is not trusted to tell one request from another.
        options.method.hash(&mut hasher);
        for (name, value) in &options.headers {
            (name, value.expose_secret()).hash(&mut hasher);
        }
        let guard = Some(Arc::clone(&direct.policy));
        Some(StreamKey {
            name: Arc::from(name),
            params: Vec::new(),
            target: Arc::new(Target { options: Arc::new(options), url, body, guard }),
            revision: *revision,
            facet: Facet::WHOLE,
            direct: true,
            hash: hasher.finish(),
            mark: OnceLock::new(),
            claims: Arc::default(),
            scope: OnceLock::new(),
        })
    }

    /// What lets the requests of its streams and actions in.
    pub fn credentials(&self) -> impl Iterator<Item = &Credential> {
        let of_actions = self.actions.values().map(|options| &options.credential);
        self.entries.values().map(|entry| &entry.options.credential).chain(of_actions)
    }

    /// The action that messages of this `type` ask for.
    pub fn action(&self, kind: &str) -> Option<&Arc<action::Options>> {
        self.actions.get(kind)
    }

    /// What `grant` would get as stream `id` without parameters, whether or not it may watch it: what an action of its
    /// holder may have changed.
    pub fn selected(&self, grant: &Grant, id: &StreamId) -> Option<Arc<StreamKey>> {
        let entry = self.entries.get(id)?;
        match entry.fixed.first() {
            // What is polled is the same, whatever of it is shown.
            Some(fixed) => Some(Arc::clone(fixed)),
            None => self.key(&entry.options, entry.revision, Vec::new(), &|name| grant.claim(name)).ok().map(Arc::new),
        }
    }

    fn is_shaped(&self, options: &stream::Options) -> bool {
        let names = |claims: Vec<&str>, query: Vec<&str>| !claims.is_empty() || !query.is_empty();
        names(options.url.claims_used(), options.url.query_used())
            || options.body.as_ref().is_some_and(|body| names(body.claims_used(), body.query_used()))
    }

    /// The claims that templates name, sorted: a grant keeps these and no others.
    pub fn template_claims(&self) -> &[String] {
        &self.template_claims
    }

    /// Whether some stream lets in callers without a credential.
    pub fn allows_anonymous(&self) -> bool {
        self.entries.values().any(|entry| entry.options.allow_anonymous)
    }

    /// Whether that stream lets in callers without a credential.
    pub fn allows_anonymous_on(&self, id: &str) -> bool {
        StreamId::new(id).and_then(|id| self.entries.get(&id)).is_some_and(|entry| entry.options.allow_anonymous)
    }

    /// The keys of the streams that are polled without watchers.
    pub fn kept_warm(&self) -> impl Iterator<Item = &Arc<StreamKey>> {
        self.entries.values().filter(|entry| entry.options.keep_warm).flat_map(|entry| &entry.fixed)
    }

    /// The keys of that stream, if it is polled without watchers.
    pub fn kept_warm_of(&self, id: &StreamId) -> &[Arc<StreamKey>] {
        self.entries.get(id).filter(|entry| entry.options.keep_warm).map_or(&[], |entry| &entry.fixed)
    }

    /// Whether a key is of this catalog: not of a stream that was removed or changed.
    pub fn is_current(&self, key: &StreamKey) -> bool {
        if key.is_direct() {
            return self.direct.as_ref().is_some_and(|direct| direct.revision == key.revision);
        }
        self.entries.get(&key.target.options.id).is_some_and(|entry| entry.revision == key.revision)
    }

    /// Whether the stream of a key was changed since or removed, rather than by a change that is still to be heard of.
    pub fn is_past(&self, key: &StreamKey) -> bool {
        self.entries.get(&key.target.options.id).is_none_or(|entry| entry.revision > key.revision)
    }

    /// Whether that stream names claims that a grant keeps only if some stream did when it was made.
    pub fn names_registered_claims(&self, id: &StreamId) -> bool {
        let Some(Entry { options, .. }) = self.entries.get(id).map(|entry| &**entry) else { return false };
        let in_body = options.body.iter().flat_map(|body| body.claims_used());
        options.url.claims_used().into_iter().chain(in_body).any(|claim| REGISTERED_CLAIMS.contains(&claim))
    }

    /// Whether that stream is configured.
    pub fn contains(&self, id: &StreamId) -> bool {
        self.entries.contains_key(id)
    }

    /// What `grant` gets now of what it had as `key`: the same parameters and `select`, as far as it may have them.
    ///
    /// # Errors
    /// As [`Catalog::resolve`].
    pub fn resolve_anew(&self, grant: &Grant, key: &StreamKey) -> Result<Arc<StreamKey>, Refusal> {
        let resolved = self.resolve(grant, key.target.options.id.as_str(), &key.params)?;
        Ok(match &key.facet.select {
            None => resolved,
            Some(select) => resolved.selecting(select.clone()),
        })
    }

    /// What `grant` gets as stream `id` with these parameters.
    ///
    /// # Errors
    /// In this order: the `streams` claim 403, no such stream 404, roles and permissions 403 (401 without a credential),
    /// parameters 400, claims 403.
    pub fn resolve(&self, grant: &Grant, id: &str, params: &[(String, String)]) -> Result<Arc<StreamKey>, Refusal> {
        if grant.streams_allow(id).is_err() {
            return Err(Refusal::new(ErrorCode::Forbidden, "the credential is not for this stream"));
        }
        // Who presents nothing is not told which streams there are.
        let not_found = || match grant.kind() {
            CredentialKind::Anonymous => Refusal::new(ErrorCode::MissingCredential, "this stream needs a credential"),
            _ => Refusal::new(ErrorCode::StreamNotFound, "there is no such stream"),
        };
        let entry = StreamId::new(id).and_then(|id| self.entries.get(&id)).ok_or_else(not_found)?;
        let options = &entry.options;
        match grant.may_watch(id, options.allow_anonymous, &options.roles, &options.permissions) {
            Ok(()) => {}
            Err(grant::Refusal::MissingCredential) => {
                return Err(Refusal::new(ErrorCode::MissingCredential, "this stream needs a credential"));
            }
            Err(grant::Refusal::Forbidden) => {
                return Err(Refusal::new(ErrorCode::Forbidden, "the credential is not for this stream"));
            }
            Err(grant::Refusal::InsufficientPermissions) => {
                let detail = "the credential has not the roles and permissions of this stream";
                return Err(Refusal::new(ErrorCode::InsufficientPermissions, detail));
            }
        }
        let facet = entry.facet(grant).ok_or_else(|| match grant.kind() {
            // A view is for roles, and nobody in particular has none.
            CredentialKind::Anonymous => Refusal::new(ErrorCode::MissingCredential, "this stream needs a credential"),
            _ => {
                let detail = "the credential has no role that a view of this stream is for";
                Refusal::new(ErrorCode::InsufficientPermissions, detail)
            }
        })?;
        if let Some(fixed) = entry.fixed.iter().find(|fixed| fixed.facet == facet) {
            return Ok(Arc::clone(fixed));
        }
        let mut used: Vec<(String, String)> = Vec::new();
        for param in &options.params {
            let Some((name, value)) = params.iter().find(|(name, _)| *name == param.name) else { continue };
            if param.pattern.as_ref().is_some_and(|pattern| !pattern.is_match(value)) {
                let detail = format!("the value of the parameter {name} is not one this stream knows");
                return Err(Refusal::new(ErrorCode::BadRequest, detail));
            }
            used.push((name.clone(), value.clone()));
        }
        self.key(options, entry.revision, used, &|name| grant.claim(name))
            .map(|key| Arc::new(StreamKey { facet, ..key }))
            .map_err(|error| Refusal::new(code_of(&error), error.to_string()))
    }

    fn key<'g>(
        &self,
        options: &Arc<stream::Options>,
        revision: u64,
        params: Vec<(String, String)>,
        claim: &dyn Fn(&str) -> Option<&'g ClaimValue>,
    ) -> Result<StreamKey, FillError> {
        let query: HashMap<&str, &str> = params.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let query = |name: &str| query.get(name).copied();
        let in_url = |name: &str| {
            claim(name).map(|value| match value {
                ClaimValue::Text(text) | ClaimValue::Integer(text) => &**text,
                // The empty text may not stand in a URL: it is refused as invalid, not as missing.
                ClaimValue::Other => "",
            })
        };
        let in_body = |name: &str| {
            claim(name).map(|value| match value {
                ClaimValue::Text(text) => template::ClaimValue::Text(text),
                ClaimValue::Integer(text) => template::ClaimValue::Integer(text),
                ClaimValue::Other => template::ClaimValue::Integer(""),
            })
        };
        let url = options.url.fill(&in_url, &query)?;
        let body = options.body.as_ref().map(|body| body.fill(&in_body, &query)).transpose()?.map(Arc::from);
        let name = template::stream_name(&options.id, &params);
        let mut hasher = DefaultHasher::new();
        (self.seed, revision, &name, url.as_str(), &body).hash(&mut hasher);
        Ok(StreamKey {
            name: Arc::from(name),
            params,
            target: Arc::new(Target { options: Arc::clone(options), url, body, guard: options.guard.clone() }),
            revision,
            facet: Facet::WHOLE,
            direct: false,
            hash: hasher.finish(),
            mark: OnceLock::new(),
            claims: if options.proof.signer.is_some() { claims_of(options, claim) } else { Arc::default() },
            scope: OnceLock::new(),
        })
    }
}

/// The claims that fill a stream's templates, by name, and their values as JSON. A URL has texts only; a body tells a number
/// from a text, and so do the values that it polls.
fn claims_of<'g>(
    options: &stream::Options,
    claim: &dyn Fn(&str) -> Option<&'g ClaimValue>,
) -> Arc<[(Box<str>, Box<str>)]> {
    let in_body = options.body.as_ref().map(|body| body.claims_used()).unwrap_or_default();
    let mut names: Vec<&str> = options.url.claims_used().into_iter().chain(in_body.iter().copied()).collect();
    names.sort_unstable();
    names.dedup();
    let value = |name: &str| match claim(name)? {
        ClaimValue::Integer(number) if in_body.contains(&name) => Some(Box::from(&**number)),
        ClaimValue::Integer(text) | ClaimValue::Text(text) => {
            let mut out = Vec::new();
            write_string(&mut out, text);
            String::from_utf8(out).ok().map(String::into_boxed_str)
        }
        ClaimValue::Other => None,
    };
    names.into_iter().filter_map(|name| Some((Box::from(name), value(name)?))).collect()
}

/// The code of a template that could not be filled.
pub(super) fn code_of(error: &FillError) -> ErrorCode {
    match error {
        FillError::ClaimMissing(_) => ErrorCode::ClaimMissing,
        FillError::ClaimInvalid(_) => ErrorCode::ClaimInvalid,
        FillError::QueryMissing(_) | FillError::QueryInvalid(_) => ErrorCode::BadRequest,
        FillError::MessageMissing(_) | FillError::MessageInvalid(_) | FillError::BodyTooLarge => ErrorCode::BadMessage,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::Secret;
    use crate::stream::credential::Scheme;
    use crate::stream::live::{Rule, Source};
    use crate::stream::template::UrlTemplate;

    fn stream(source: Source, token: &str) -> Arc<stream::Options> {
        let url = UrlTemplate::parse::<&str>("http://upstream.example/", &[]).expect("a URL");
        let token = Live::new(source, Rule::Visible, Secret::new(token));
        let credential = Credential { scheme: Some(Scheme::Bearer(token)), ..Credential::default() };
        let options = stream::Options::new(StreamId::new("s").expect("an id"), url);
        Arc::new(stream::Options { credential, allow_anonymous: true, ..options })
    }

    /// The key of the stream before and after a reload, and what the one from before carries then.
    fn reloaded(before: Arc<stream::Options>, after: Arc<stream::Options>) -> (bool, Vec<u8>) {
        let first = Catalog::new(&[before], None, 7);
        let anonymous = Grant::anonymous(&mut Default::default());
        let key = |catalog: &Catalog| catalog.resolve(&anonymous, "s", &[]).expect("anyone may watch it");
        let held = key(&first);
        let second = Catalog::new(&[after], Some(&first), 7);
        let presented = held.target.options.credential.presented(None);
        let value = presented.headers.first().expect("one header").1.expose_secret().to_vec();
        (held == key(&second) && second.is_current(&held), value)
    }

    #[test]
    fn a_secret_that_stands_elsewhere_may_change_without_a_new_sequence() {
        let file = || Source::File("token".into());
        assert_eq!(reloaded(stream(file(), "a"), stream(file(), "b")), (true, b"Bearer b".to_vec()));
        let elsewhere = Source::File("other".into());
        assert_eq!(reloaded(stream(file(), "a"), stream(elsewhere, "a")), (false, b"Bearer a".to_vec()));
        let written = |token| stream(Source::Written, token);
        assert!(reloaded(written("a"), written("a")).0);
        assert_eq!(reloaded(written("a"), written("b")), (false, b"Bearer a".to_vec()), "it is another stream");
    }
}
