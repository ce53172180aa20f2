//! Tokens that were verified a while ago, so that who comes back with the same one costs a hash and no signature.
//!
//! Source: protocol version 1, section 2 («JWT»): what is found here is what verifying would give. Memory: room for
//! `auth.token_cache` tokens a core, 80 bytes each, taken when the first is kept, and the text of each one's `sub`. Errors:
//! none. Not here: marks that revoke a token, which are asked after this; a change of keys or of the configuration, after
//! which a cache is thrown away.

use std::time::Duration;

use ring::digest;

use super::grant::{Grant, RightsTable};
use crate::time::WallTime;

/// Places a token may stand at: those of one set. A full set loses the one that was used longest ago.
const WAYS: usize = 8;

/// A token that was verified. Who it is cannot be told from it.
#[derive(Debug)]
struct Entry {
    /// A hash of the token, keyed: nobody outside can choose two tokens of one tag.
    tag: [u8; 16],
    grant: Grant,
}

const _: () = assert!(size_of::<Option<Entry>>() <= 80, "an entry takes at most 80 bytes");

type Set = [Option<Entry>; WAYS];

/// The verified tokens of one core.
pub struct TokenCache {
    secret: [u8; 32],
    sets: Vec<Set>,
    /// How many sets there will be.
    sets_max: usize,
    /// When the newest was verified. Before then, by a clock that was stepped back, nothing is found: a token may not have
    /// begun yet.
    newest: WallTime,
}

/// Where a token stands in a [`TokenCache`]: its set, and its tag there.
#[derive(Clone, Copy)]
pub struct Place {
    set: usize,
    tag: [u8; 16],
}

impl std::fmt::Debug for TokenCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenCache").field("sets", &self.sets_max).finish_non_exhaustive()
    }
}

impl TokenCache {
    /// A cache for as many tokens (rounded up to a full set; 0: none is ever kept). `secret` is from the operating system's
    /// random numbers.
    pub fn new(tokens_max: u32, secret: [u8; 32]) -> TokenCache {
        let sets_max = (tokens_max as usize).div_ceil(WAYS);
        TokenCache { secret, sets: Vec::new(), sets_max, newest: WallTime::default() }
    }

    /// The grant of `token`, if it was verified before and still holds at `now`.
    pub fn find(&mut self, token: &[u8], now: WallTime, leeway: Duration) -> Option<Grant> {
        self.find_at(self.place(token)?, now, leeway)
    }

    /// The same for the token whose place that is.
    pub fn find_at(&mut self, Place { set: place, tag }: Place, now: WallTime, leeway: Duration) -> Option<Grant> {
        if now < self.newest {
            return None;
        }
        let set = self.sets.get_mut(place)?;
        let at = set.iter().position(|entry| entry.as_ref().is_some_and(|entry| entry.tag == tag))?;
        if set.get(at)?.as_ref()?.grant.end(leeway).is_none_or(|end| end <= now) {
            return None;
        }
        // The one used last stands first.
        set.get_mut(..=at)?.rotate_right(1);
        set.first()?.as_ref().map(|entry| entry.grant.clone())
    }

    /// Keeps what `token` grants: it was verified at `now`.
    pub fn keep(&mut self, token: &[u8], grant: &Grant, now: WallTime, rights: &mut RightsTable) {
        if let Some(place) = self.place(token) {
            self.keep_at(place, grant, now, rights);
        }
    }

    /// The same for the token whose place that is.
    pub fn keep_at(
        &mut self,
        Place { set: place, tag }: Place,
        grant: &Grant,
        now: WallTime,
        rights: &mut RightsTable,
    ) {
        if self.sets.is_empty() {
            self.sets.reserve_exact(self.sets_max);
            self.sets.resize_with(self.sets_max, Set::default);
        }
        let Some(set) = self.sets.get_mut(place) else { return };
        self.newest = self.newest.max(now);
        // It may be there, expired by a clock that was stepped since.
        let at = set.iter().position(|entry| entry.as_ref().is_none_or(|entry| entry.tag == tag)).unwrap_or(WAYS - 1);
        if let Some(old) = set.get_mut(at).and_then(Option::take) {
            rights.release(old.grant);
        }
        let Some(used) = set.get_mut(..=at) else { return };
        used.rotate_right(1);
        if let Some(first) = used.first_mut() {
            *first = Some(Entry { tag, grant: grant.clone() });
        }
    }

    /// Forgets all, and keeps as many from now on.
    pub fn clear(&mut self, tokens_max: u32, rights: &mut RightsTable) {
        for entry in std::mem::take(&mut self.sets).into_iter().flatten().flatten() {
            rights.release(entry.grant);
        }
        self.sets_max = (tokens_max as usize).div_ceil(WAYS);
        self.newest = WallTime::default();
    }

    /// Where a token stands, or would; `None`: none is ever kept. It costs the hash.
    pub fn place(&self, token: &[u8]) -> Option<Place> {
        if self.sets_max == 0 {
            return None;
        }
        let mut context = digest::Context::new(&digest::SHA256);
        context.update(&self.secret);
        context.update(token);
        let hash = context.finish();
        let (tag, rest) = hash.as_ref().split_first_chunk().map_or(([0; 16], &[][..]), |(tag, rest)| (*tag, rest));
        let bits = rest.first_chunk().map_or(0, |first| u64::from_le_bytes(*first));
        // Of a number below the number of sets, which is one of memory.
        let set = usize::try_from(bits % self.sets_max as u64).unwrap_or(0);
        Some(Place { set, tag })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::auth::jwt::{self, Verifier, mint};
    use crate::auth::keys::{Algorithm, KeyConfig, KeySet};
    use crate::secret::Secret;

    const NOW: WallTime = WallTime::from_secs(1_000);
    const LEEWAY: Duration = Duration::from_secs(5);

    fn verifier() -> Verifier {
        let config = KeyConfig { kid: None, algorithm: Algorithm::Hs256, secret: Secret::new([1; 32]) };
        let keys = KeySet::new(&[config]).unwrap();
        Verifier::new(jwt::Options { keys, leeway: LEEWAY, ..jwt::Options::default() })
    }

    fn token(verifier: &Verifier, claims: &str) -> Vec<u8> {
        mint(verifier.options().keys.iter().next().unwrap(), claims).into_bytes()
    }

    fn grant_of(verifier: &Verifier, token: &[u8], now: WallTime, rights: &mut RightsTable) -> Option<Grant> {
        Some(verifier.verify(token, now).ok()?.into_grant(rights, &[]))
    }

    fn shown(grant: Option<&Grant>) -> String {
        format!("{grant:?}")
    }

    #[test]
    fn what_was_kept_is_found_until_it_ends() {
        let (verifier, mut rights) = (verifier(), RightsTable::default());
        let mut cache = TokenCache::new(64, [7; 32]);
        let ada = token(&verifier, r#"{"sub":"ada","exp":1060,"nbf":1000,"iat":990,"jti":"t","roles":["r"]}"#);
        let bob = token(&verifier, r#"{"sub":"bob","exp":1060}"#);
        assert!(cache.find(&ada, NOW, LEEWAY).is_none());
        let grant = grant_of(&verifier, &ada, NOW, &mut rights).unwrap();
        cache.keep(&ada, &grant, NOW, &mut rights);
        let found = cache.find(&ada, NOW, LEEWAY);
        assert_eq!(shown(found.as_ref()), shown(Some(&grant)));
        assert!(cache.find(&bob, NOW, LEEWAY).is_none());
        let last = WallTime::from_secs(1_065);
        assert!(cache.find(&ada, last - Duration::from_micros(1), LEEWAY).is_some());
        assert!(cache.find(&ada, last, LEEWAY).is_none(), "it never outlives the token");
        assert!(cache.find(&ada, NOW - Duration::from_micros(1), LEEWAY).is_none(), "nor is it found before it began");
        cache.clear(64, &mut rights);
        assert!(cache.find(&ada, NOW, LEEWAY).is_none());
    }

    #[test]
    fn a_cache_that_was_emptied_does_not_mind_that_the_clock_was_ahead_before() {
        let (verifier, mut rights) = (verifier(), RightsTable::default());
        let mut cache = TokenCache::new(64, [7; 32]);
        let later = NOW + Duration::from_secs(86_400);
        let keep = |cache: &mut TokenCache, exp: u64, now: WallTime, rights: &mut RightsTable| {
            let token = token(&verifier, &format!(r#"{{"sub":"ada","exp":{exp}}}"#));
            let grant = grant_of(&verifier, &token, now, rights).unwrap();
            cache.keep(&token, &grant, now, rights);
            token
        };
        let of_later = keep(&mut cache, 90_000, later, &mut rights);
        assert!(cache.find(&of_later, later, LEEWAY).is_some());
        cache.clear(64, &mut rights);
        let token = keep(&mut cache, 1_060, NOW, &mut rights);
        assert!(cache.find(&token, NOW, LEEWAY).is_some());
    }

    #[test]
    fn a_full_set_loses_the_one_used_longest_ago() {
        let (verifier, mut rights) = (verifier(), RightsTable::default());
        // One set.
        let mut cache = TokenCache::new(1, [7; 32]);
        let tokens: Vec<Vec<u8>> =
            (0..=WAYS).map(|n| token(&verifier, &format!(r#"{{"sub":"u{n}","exp":1060,"role":"r{n}"}}"#))).collect();
        let keep = |cache: &mut TokenCache, n: usize, rights: &mut RightsTable| {
            let grant = grant_of(&verifier, &tokens[n], NOW, rights).unwrap();
            cache.keep(&tokens[n], &grant, NOW, rights);
            rights.release(grant);
        };
        (0..WAYS).for_each(|n| keep(&mut cache, n, &mut rights));
        assert!(cache.find(&tokens[0], NOW, LEEWAY).is_some(), "all have room, and this one was used now");
        keep(&mut cache, WAYS, &mut rights);
        let held: Vec<bool> = tokens.iter().map(|token| cache.find(token, NOW, LEEWAY).is_some()).collect();
        assert_eq!(held, [true, false, true, true, true, true, true, true, true]);
        assert_eq!(rights.len(), WAYS, "the rights of the one that went are gone with it");
        keep(&mut cache, 0, &mut rights);
        assert!(tokens[2..].iter().all(|token| cache.find(token, NOW, LEEWAY).is_some()), "none stands there twice");
        cache.clear(0, &mut rights);
        assert!(rights.is_empty());
        keep(&mut cache, 0, &mut rights);
        assert!(cache.find(&tokens[0], NOW, LEEWAY).is_none(), "0 is off");
    }

    #[test]
    fn nothing_secret_is_printed() {
        let cache = TokenCache::new(4096, [7; 32]);
        assert_eq!(format!("{cache:?}"), "TokenCache { sets: 512, .. }");
    }

    proptest! {
        /// Whatever was asked before, at whatever times, also by a clock that is stepped: a hit is what verifying gives.
        #[test]
        fn a_hit_is_what_verifying_would_give(
            claims in prop::collection::vec((990..1_020u64, prop::option::of(980..1_010u64), prop::option::of(0..9u64)), 1..6),
            asked in prop::collection::vec((any::<prop::sample::Index>(), 985_000..1_030_000u64), 1..40),
        ) {
            let (verifier, mut rights) = (verifier(), RightsTable::default());
            let mut cache = TokenCache::new(8, [9; 32]);
            let tokens: Vec<Vec<u8>> = claims
                .iter()
                .enumerate()
                .map(|(n, (exp, nbf, iat))| {
                    let nbf = nbf.map_or(String::new(), |nbf| format!(r#","nbf":{nbf}"#));
                    let iat = iat.map_or(String::new(), |iat| format!(r#","iat":{iat},"jti":"t{iat}""#));
                    token(&verifier, &format!(r#"{{"sub":"u{n}","exp":{exp}{nbf}{iat}}}"#))
                })
                .collect();
            for (which, ms) in &asked {
                let (token, now) = (which.get(&tokens), WallTime::from_micros(ms * 1_000));
                let verified = grant_of(&verifier, token, now, &mut rights);
                match cache.find(token, now, LEEWAY) {
                    Some(found) => prop_assert_eq!(shown(Some(&found)), shown(verified.as_ref())),
                    None => {
                        if let Some(grant) = verified {
                            cache.keep(token, &grant, now, &mut rights);
                        }
                    }
                }
            }
        }
    }
}
