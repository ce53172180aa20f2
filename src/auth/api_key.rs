//! API keys: credentials for programs, long-lived, limited to some streams, known here by their hashes alone.
//!
//! A key is `rck_<id>_<43 characters of base64url>`: 256 random bits. So much chance cannot be guessed however fast the hash
//! is, which is why one round of salted SHA-256 is enough where a password would want a slow one; a handshake costs a hash.
//! What is kept is `sha256:<salt>:<hex SHA-256 of salt and key>`, the salt taken as the text it is: `sha256sum` makes one.
//!
//! Source: protocol version 1, sections 2, 5 and 6; FIPS 180-4. Memory: one [`ApiKey`] a key, shared by all cores.
//! Errors: [`HashError`], the operator's fault; [`ApiKeyError`], the caller's. Not here: where keys are kept (`runtime`),
//! what becomes of connections whose key has changed (`shard`).

use std::collections::HashMap;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::digest;

use crate::limits::{API_KEY_ID_BYTES_MAX, STREAM_GLOB_BYTES_MAX};
use crate::secret::Secret;
use crate::time::WallTime;

/// What every key begins with, so that one left in a repository is found.
const PREFIX: &str = "rck_";
/// 32 bytes as base64url.
const SECRET_CHARS: usize = 43;
/// Bytes of the longest key.
const KEY_BYTES_MAX: usize = PREFIX.len() + API_KEY_ID_BYTES_MAX + 1 + SECRET_CHARS;
/// What every hash begins with.
const HASH_PREFIX: &str = "sha256:";
/// Characters of a salt.
const SALT_CHARS: std::ops::RangeInclusive<usize> = 8..=64;

/// Names a key, in the key itself and wherever one is spoken of: 1 to 64 of `A-Z a-z 0-9 . _ : ~ -`.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ApiKeyId(Box<str>);

impl ApiKeyId {
    /// The id with this text; `None` where it is none.
    pub fn new(text: &str) -> Option<ApiKeyId> {
        let fits = |b: u8| b.is_ascii_alphanumeric() || b"._:~-".contains(&b);
        let is_one = !text.is_empty() && text.len() <= API_KEY_ID_BYTES_MAX && text.bytes().all(fits);
        is_one.then(|| ApiKeyId(text.into()))
    }

    /// An id of 64 random bits, for a key that was given none.
    pub fn of_random(random: [u8; 8]) -> ApiKeyId {
        ApiKeyId(hex(&random).into())
    }

    /// Its text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ApiKeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a text is no hash of a key. Holds nothing of it.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("is not of the form sha256:<salt>:<hash>, a salt of 8 to 64 letters, digits, - or _ and 64 hexadecimal digits")]
pub struct HashError;

/// What is kept of a key: a salt, and the SHA-256 of salt and key.
#[derive(Clone, Eq, PartialEq)]
pub struct KeyHash {
    salt: Box<str>,
    digest: [u8; digest::SHA256_OUTPUT_LEN],
}

impl KeyHash {
    /// The hash of a key with this salt, which is random.
    pub fn new(key: &Secret, salt: [u8; 16]) -> KeyHash {
        let salt = hex(&salt);
        KeyHash { digest: sha256(&salt, key.expose_secret()), salt: salt.into() }
    }

    /// Reads `sha256:<salt>:<hex>`.
    ///
    /// # Errors
    /// [`HashError`].
    pub fn parse(text: &str) -> Result<KeyHash, HashError> {
        let (salt, digits) = text.strip_prefix(HASH_PREFIX).and_then(|rest| rest.split_once(':')).ok_or(HashError)?;
        let of_salt = |b: u8| b.is_ascii_alphanumeric() || b"-_".contains(&b);
        let mut digest = [0; digest::SHA256_OUTPUT_LEN];
        if !SALT_CHARS.contains(&salt.len()) || !salt.bytes().all(of_salt) || digits.len() != 2 * digest.len() {
            return Err(HashError);
        }
        let nibble = |digit: &u8| char::from(*digit).to_digit(16).and_then(|value| u8::try_from(value).ok());
        for (byte, pair) in digest.iter_mut().zip(digits.as_bytes().chunks_exact(2)) {
            let [high, low] = pair else { return Err(HashError) };
            *byte = nibble(high).ok_or(HashError)? << 4 | nibble(low).ok_or(HashError)?;
        }
        Ok(KeyHash { salt: salt.into(), digest })
    }

    /// As it is written where it is kept. For the state file: no answer, log line or error shows it.
    pub fn to_text(&self) -> String {
        format!("{HASH_PREFIX}{}:{}", self.salt, hex(&self.digest))
    }

    /// Whether it is that of `key`; the time taken tells nothing of where they differ.
    fn is_of(&self, key: &[u8]) -> bool {
        let made = sha256(&self.salt, key);
        made.iter().zip(&self.digest).fold(0, |all, (a, b)| all | (a ^ b)) == 0
    }
}

impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyHash(***)")
    }
}

fn sha256(salt: &str, key: &[u8]) -> [u8; digest::SHA256_OUTPUT_LEN] {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(salt.as_bytes());
    context.update(key);
    let mut output = [0; digest::SHA256_OUTPUT_LEN];
    output.copy_from_slice(context.finish().as_ref());
    output
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A new key's text: shown once, to whoever had it made.
pub fn key_text(id: &ApiKeyId, random: &[u8; 32]) -> Secret {
    Secret::new(format!("{PREFIX}{id}_{}", URL_SAFE_NO_PAD.encode(random)))
}

/// The id that a key names; `None` where the text is no key. An id may have `_` in it and so may the rest: the rest is
/// what has its length.
fn id_of(text: &[u8]) -> Option<&str> {
    let rest = std::str::from_utf8(text).ok()?.strip_prefix(PREFIX)?;
    let (id, secret) = rest.split_at_checked(rest.len().checked_sub(SECRET_CHARS + 1)?)?;
    let of_secret = |b: u8| b.is_ascii_alphanumeric() || b"-_".contains(&b);
    let is_key = secret.starts_with('_') && secret.bytes().all(of_secret);
    (is_key && id.len() <= API_KEY_ID_BYTES_MAX).then_some(id)
}

/// Whether `text` is a stream's id, or one with `*` in it.
pub fn is_stream_glob(text: &str) -> bool {
    let fits = |b: u8| b.is_ascii_alphanumeric() || b"._:~-*".contains(&b);
    !text.is_empty() && text.len() <= STREAM_GLOB_BYTES_MAX && text.bytes().all(fits)
}

/// Where a key was made.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub enum Source {
    /// In the configuration: it goes when it is taken out there.
    File,
    /// By the admin API.
    Admin,
}

impl Source {
    /// Its name, as the admin API spells it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Source::File => "file",
            Source::Admin => "admin",
        }
    }
}

/// What is known of one key.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ApiKey {
    /// Its name.
    pub id: ApiKeyId,
    /// What it is known by.
    pub hash: KeyHash,
    /// Ids and globs of the streams it is for.
    pub streams: Vec<String>,
    /// Roles of who uses it.
    pub roles: Vec<String>,
    /// Permissions of who uses it.
    pub permissions: Vec<String>,
    /// Requests and handshakes a minute; 0: unlimited.
    pub rate: u32,
    /// When it was made, where that is known.
    pub created: Option<WallTime>,
    /// When it ends, if it does.
    pub expires: Option<WallTime>,
    /// Where it was made.
    pub source: Source,
}

impl Hash for ApiKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.id.hash(state);
    }
}

/// Tells a key from all others, also from those that have had or will have its id. No secret.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct ApiKeyMark {
    /// Its id.
    pub id: ApiKeyId,
    /// Bits of a hash of its hash.
    pub bits: u64,
}

impl ApiKeyMark {
    /// Its bits as 16 hexadecimal digits.
    pub fn bits_text(&self) -> String {
        hex(&self.bits.to_be_bytes())
    }

    /// The mark with this id and these 16 digits; `None` where they are none.
    pub fn read(id: &str, bits: &str) -> Option<ApiKeyMark> {
        let are_digits = bits.len() == 16 && bits.bytes().all(|b| b.is_ascii_hexdigit());
        let bits = are_digits.then(|| u64::from_str_radix(bits, 16).ok()).flatten()?;
        Some(ApiKeyMark { id: ApiKeyId::new(id)?, bits })
    }
}

impl ApiKey {
    /// Its mark.
    pub fn mark(&self) -> ApiKeyMark {
        let hash = digest::digest(&digest::SHA256, &self.hash.digest);
        let bits = hash.as_ref().first_chunk().map_or(0, |first| u64::from_be_bytes(*first));
        ApiKeyMark { id: self.id.clone(), bits }
    }
}

/// Why an API key is refused.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ApiKeyError {
    /// There is no such key: another id, another secret, or no key at all, which are not told apart.
    #[error("there is no such API key")]
    Unknown,
    /// It was one.
    #[error("the API key has expired")]
    Expired,
}

/// Every key in force: the configuration's and those of the admin API. Replaced whole.
#[derive(Debug, Default)]
pub struct ApiKeys(HashMap<ApiKeyId, Arc<ApiKey>>);

impl ApiKeys {
    /// The table of these keys; of two with one id the first counts.
    pub fn new(keys: impl IntoIterator<Item = Arc<ApiKey>>) -> ApiKeys {
        let mut table = HashMap::new();
        for key in keys {
            table.entry(key.id.clone()).or_insert(key);
        }
        ApiKeys(table)
    }

    /// The key of that id.
    pub fn find(&self, id: &ApiKeyId) -> Option<&Arc<ApiKey>> {
        self.0.get(id)
    }

    /// The key of that mark.
    pub fn find_marked(&self, mark: &ApiKeyMark) -> Option<&Arc<ApiKey>> {
        self.0.get(&mark.id).filter(|key| key.mark() == *mark)
    }

    /// The key that `presented` is. A stranger's takes the same path whatever is wrong with it: a hash is made and compared.
    ///
    /// # Errors
    /// [`ApiKeyError`].
    pub fn verify(&self, presented: &Secret, now: WallTime) -> Result<&Arc<ApiKey>, ApiKeyError> {
        let text = presented.expose_secret();
        // What is longer than the longest key is none, and need not be hashed whole to be refused.
        let text = text.get(..=KEY_BYTES_MAX).unwrap_or(text);
        let found = id_of(text).and_then(ApiKeyId::new).and_then(|id| self.0.get(&id));
        let matches = match found {
            Some(key) => key.hash.is_of(text),
            None => {
                let decoy = KeyHash { salt: "0".repeat(32).into(), digest: [0; digest::SHA256_OUTPUT_LEN] };
                decoy.is_of(text)
            }
        };
        match found {
            Some(key) if matches && key.expires.is_some_and(|expires| expires <= now) => Err(ApiKeyError::Expired),
            Some(key) if matches => Ok(key),
            _ => Err(ApiKeyError::Unknown),
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: WallTime = WallTime::from_secs(1_795_350_000);

    fn id(text: &str) -> ApiKeyId {
        ApiKeyId::new(text).expect("an id")
    }

    fn key(name: &str, text: &Secret) -> ApiKey {
        ApiKey {
            id: id(name),
            hash: KeyHash::new(text, [7; 16]),
            streams: vec!["leads".into(), "orders:*".into()],
            roles: Vec::new(),
            permissions: Vec::new(),
            rate: 0,
            created: None,
            expires: None,
            source: Source::File,
        }
    }

    fn verdict(keys: &ApiKeys, text: &[u8], now: WallTime) -> Result<String, ApiKeyError> {
        keys.verify(&Secret::new(text), now).map(|key| key.id.to_string())
    }

    #[test]
    fn a_hash_is_what_sha256sum_makes_of_salt_and_key() {
        // printf %s "$SALT$KEY" | sha256sum
        let text = "rck_dashboard_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8";
        let random: [u8; 32] = std::array::from_fn(|i| u8::try_from(i).expect("small"));
        assert_eq!(key_text(&id("dashboard"), &random).expose_secret(), text.as_bytes());
        let hash =
            KeyHash::parse("sha256:pepper-and-salt:bdef92e71ec8c4678ed38ced5f3b88b53c991727e6c3b78652e4128cd6a760cf")
                .expect("a hash");
        assert!(hash.is_of(text.as_bytes()));
        assert_eq!(KeyHash::parse(&hash.to_text()), Ok(hash.clone()));
        assert!(!hash.is_of(&text.as_bytes()[..text.len() - 1]));
        assert_eq!(format!("{hash:?}"), "KeyHash(***)");
    }

    #[test]
    fn a_hash_of_another_form_is_refused() {
        let good = format!("sha256:{}:{}", "s".repeat(8), "0".repeat(64));
        assert!(KeyHash::parse(&good).is_ok());
        assert!(KeyHash::parse(&good.replace('0', "F")).is_ok(), "digits of either case");
        for bad in [
            String::new(),
            "sha256".into(),
            good.replace("sha256", "sha512"),
            good.replace("ssssssss", "sssssss"),
            good.replace("ssssssss", &"s".repeat(65)),
            good.replace("ssssssss", "ssss ssss"),
            format!("{good}0"),
            good.replacen('0', "g", 1),
            good.replacen('0', "+", 1),
            good.replacen("00", "é", 1),
            format!("{good}:"),
        ] {
            assert_eq!(KeyHash::parse(&bad), Err(HashError), "{bad}");
        }
    }

    #[test]
    fn the_right_key_opens_and_every_other_is_unknown() {
        let text = key_text(&id("a_b"), &[0xff; 32]);
        let keys = ApiKeys::new([Arc::new(key("a_b", &text))]);
        assert_eq!(verdict(&keys, text.expose_secret(), NOW).as_deref(), Ok("a_b"));
        let shown = String::from_utf8(text.expose_secret().to_vec()).expect("text");
        let other = key_text(&id("a_b"), &[0xfe; 32]);
        for wrong in [
            String::new(),
            "rck_".into(),
            shown.replace("rck_", "RCK_"),
            shown.replace("a_b", "a_c"),
            shown.replace("a_b", "b"),
            format!("{shown}_"),
            format!("{shown} "),
            format!(" {shown}"),
            format!("{shown}{}", "A".repeat(100_000)),
            shown[..shown.len() - 1].to_owned(),
            String::from_utf8(other.expose_secret().to_vec()).expect("text"),
        ] {
            assert_eq!(verdict(&keys, wrong.as_bytes(), NOW), Err(ApiKeyError::Unknown), "{wrong}");
        }
        assert_eq!(verdict(&ApiKeys::default(), text.expose_secret(), NOW), Err(ApiKeyError::Unknown));
    }

    #[test]
    fn a_key_ends_when_it_says() {
        let text = key_text(&id("k"), &[1; 32]);
        let ends = |expires| ApiKeys::new([Arc::new(ApiKey { expires: Some(expires), ..key("k", &text) })]);
        assert!(verdict(&ends(WallTime::from_micros(NOW.as_micros() + 1)), text.expose_secret(), NOW).is_ok());
        assert_eq!(verdict(&ends(NOW), text.expose_secret(), NOW), Err(ApiKeyError::Expired));
        // Whoever does not have the key is not told that it was one.
        let other = key_text(&id("k"), &[2; 32]);
        assert_eq!(verdict(&ends(NOW), other.expose_secret(), NOW), Err(ApiKeyError::Unknown));
    }

    #[test]
    fn of_two_keys_with_one_id_the_first_counts() {
        let (first, second) = (key_text(&id("k"), &[1; 32]), key_text(&id("k"), &[2; 32]));
        let keys = ApiKeys::new([Arc::new(key("k", &first)), Arc::new(key("k", &second))]);
        assert_eq!(keys.len(), 1);
        assert!(verdict(&keys, first.expose_secret(), NOW).is_ok());
        assert_eq!(verdict(&keys, second.expose_secret(), NOW), Err(ApiKeyError::Unknown));
    }

    #[test]
    fn ids_and_globs_have_their_characters_and_lengths() {
        for good in ["a", "dash_board", "A-z.0:~", &"k".repeat(64)] {
            assert!(ApiKeyId::new(good).is_some(), "{good}");
        }
        for bad in ["", " ", "a b", "é", "a/b", "a*", &"k".repeat(65)] {
            assert_eq!(ApiKeyId::new(bad), None, "{bad}");
        }
        for good in ["*", "leads", "orders:*", &"s".repeat(128)] {
            assert!(is_stream_glob(good), "{good}");
        }
        for bad in ["", "a b", "a?", "{x}", &"s".repeat(129)] {
            assert!(!is_stream_glob(bad), "{bad}");
        }
        assert_eq!(ApiKeyId::of_random([0, 1, 2, 3, 4, 5, 6, 255]).as_str(), "00010203040506ff");
    }

    proptest! {
        #[test]
        fn any_id_and_any_chance_make_a_key_that_opens(
            name in "[A-Za-z0-9._:~-]{1,64}",
            random in any::<[u8; 32]>(),
            salt in any::<[u8; 16]>(),
        ) {
            let text = key_text(&id(&name), &random);
            prop_assert_eq!(id_of(text.expose_secret()), Some(name.as_str()));
            let made = ApiKey { hash: KeyHash::new(&text, salt), ..key(&name, &text) };
            let keys = ApiKeys::new([Arc::new(made)]);
            prop_assert_eq!(verdict(&keys, text.expose_secret(), NOW), Ok(name));
        }

        #[test]
        fn no_bytes_open_anything(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let keys = ApiKeys::new([Arc::new(key("k", &key_text(&id("k"), &[1; 32])))]);
            prop_assert_eq!(verdict(&keys, &bytes, NOW), Err(ApiKeyError::Unknown));
            let mut begun = b"rck_k_".to_vec();
            begun.extend(&bytes);
            prop_assert_eq!(verdict(&keys, &begun, NOW), Err(ApiKeyError::Unknown));
        }

        #[test]
        fn a_hash_is_read_as_it_is_written_or_not_at_all(text in "sha256:[a-z_-]{6,10}:[0-9a-fg]{63,65}") {
            if let Ok(hash) = KeyHash::parse(&text) {
                prop_assert_eq!(hash.to_text(), text);
            }
        }
    }
}
