//! Files of upstreams' secrets, those of their hooks and of the proxy too, read again when they change: the value in force is another one, nothing else happens.
//!
//! One thread looks at the files every few seconds, by their status: a replaced file, a link that leads elsewhere, and one
//! that was written over are all noticed. A value that does not fit, or a certificate whose key is another's (the second file
//! is not there yet), is not taken; the old one stays and that is said. Streams that lack a secret altogether are looked after
//! by whoever keeps them, as often.
//!
//! Source: stat(2). Memory: an entry a file. Errors: told in the log, without a value. Not here: SIGHUP, which has the whole
//! configuration read again.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt as _;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};

use super::fetch::Egress;
use super::log;
use super::oauth::Tokens;
use crate::commands::check::ProcessSources;
use crate::config::{self, LogLevel, Sources as _};
use crate::limits::SECRETS_INTERVAL;
use crate::secret::Secret;
use crate::shard::Catalog;
use crate::stream::credential::Credential;
use crate::stream::live::{ClientIdentity, IdentityPem, Live, Replaced, Source};
use crate::stream::proxy::Proxy;

/// The files that are looked at.
pub struct Secrets {
    watched: Mutex<Watched>,
    changed: Condvar,
    tokens: Arc<Tokens>,
    egress: Arc<Egress>,
    /// Looks for what streams lack. It may have other files looked at.
    seek: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

#[derive(Default)]
struct Watched {
    values: Vec<Live>,
    identities: Vec<ClientIdentity>,
    /// Whose URL stands in a file.
    proxy: Option<Arc<Proxy>>,
    /// What each file was when it was last read.
    stamps: HashMap<String, Option<Stamp>>,
    /// Whether some stream lacks what it names.
    lacking: bool,
}

/// What tells that a file is not the one it was: device, inode, size, time of change.
type Stamp = (u64, u64, u64, i64, i64);

fn stamp(path: &str) -> Option<Stamp> {
    let status = std::fs::metadata(path).ok()?;
    Some((status.dev(), status.ino(), status.size(), status.mtime(), status.mtime_nsec()))
}

impl Watched {
    fn paths(&self) -> impl Iterator<Item = &str> {
        let of_identities = self.identities.iter().flat_map(|identity| [identity.cert.as_str(), &identity.key]);
        let of_proxy = self.proxy.as_deref().and_then(file_of);
        self.values.iter().filter_map(Live::file).chain(of_identities).chain(of_proxy)
    }
}

fn file_of(proxy: &Proxy) -> Option<&str> {
    match &proxy.source {
        Source::File(path) => Some(path),
        Source::Written | Source::Variable(_) => None,
    }
}

impl Secrets {
    /// Looks after nothing yet; whenever a secret changes, `tokens` are told, and `egress` whenever the proxy's URL does.
    ///
    /// # Errors
    /// The system's.
    pub fn start(tokens: Arc<Tokens>, egress: Arc<Egress>) -> std::io::Result<Arc<Secrets>> {
        let (watched, changed, seek) = (Mutex::default(), Condvar::new(), OnceLock::new());
        let this = Arc::new(Secrets { watched, changed, tokens, egress, seek });
        let thread = Arc::clone(&this);
        std::thread::Builder::new().name("secrets".into()).spawn(move || thread.run())?;
        Ok(this)
    }

    /// From now on `seek` is called now and then, while some stream lacks what it names.
    pub fn seek_by(&self, seek: impl Fn() + Send + Sync + 'static) {
        // There is one keeper of streams.
        drop(self.seek.set(Box::new(seek)));
    }

    /// From now on the files of the credentials and hooks in `catalog` are looked at, and the proxy's, and no others.
    pub fn watch(&self, catalog: &Catalog) {
        let mut next = Watched::default();
        let of_credentials = catalog.credentials().flat_map(Credential::values);
        let values = of_credentials.chain(catalog.hook_values()).filter(|value| value.file().is_some());
        next.values.extend(values.cloned());
        next.identities.extend(catalog.credentials().flat_map(Credential::identities).cloned());
        next.proxy = self.egress.proxy().filter(|proxy| file_of(proxy).is_some());
        next.lacking = catalog.credentials().any(|credential| credential.lacks.is_some());
        // They are read once more first thing: one may have changed since the configuration was.
        next.stamps = next.paths().map(|path| (path.to_owned(), None)).collect();
        *self.watched.lock().unwrap_or_else(PoisonError::into_inner) = next;
        self.changed.notify_one();
    }

    fn run(&self) {
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            // Without a file it sleeps until there is one.
            watched = if watched.stamps.is_empty() && !watched.lacking {
                self.changed.wait(watched).unwrap_or_else(PoisonError::into_inner)
            } else {
                self.changed.wait_timeout(watched, SECRETS_INTERVAL).unwrap_or_else(PoisonError::into_inner).0
            };
            if look(&mut watched, &self.egress) {
                self.tokens.hurry();
            }
            if watched.lacking
                && let Some(seek) = self.seek.get()
            {
                drop(watched);
                seek();
                watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

/// Reads what has changed; whether a value is another one now.
fn look(watched: &mut Watched, egress: &Egress) -> bool {
    let now: HashMap<String, Option<Stamp>> = watched.stamps.keys().map(|path| (path.clone(), stamp(path))).collect();
    let is_new = |path: &str| now.get(path) != watched.stamps.get(path);
    let mut any = false;
    for value in &watched.values {
        let Some(path) = value.file().filter(|path| is_new(path)) else { continue };
        any |= match read(value.source()).map(|secret| value.replace(&secret)) {
            Some(Replaced::Same) => false,
            Some(Replaced::Changed) => {
                told(LogLevel::Info, path, "The secret of an upstream was read again.");
                true
            }
            Some(Replaced::Unfit) | None => {
                told(LogLevel::Error, path, "The secret of an upstream cannot be used; the old one stays in force.");
                false
            }
        };
    }
    for identity in &watched.identities {
        if !is_new(&identity.cert) && !is_new(&identity.key) {
            continue;
        }
        let Some(pem) = pem(identity) else {
            let sentence = "The client certificate for an upstream and its key cannot be used together; the old ones stay in force.";
            told(LogLevel::Error, &identity.cert, sentence);
            continue;
        };
        if identity.replace(Arc::new(pem)) {
            told(LogLevel::Info, &identity.cert, "The client certificate for an upstream was read again.");
            any = true;
        }
    }
    if let Some(old) = watched.proxy.clone()
        && let Some(path) = file_of(&old).filter(|path| is_new(path))
    {
        let url = read(&old.source);
        let new = url.and_then(|url| Proxy::read(&url, old.source.clone()).ok());
        match new.map(|new| Arc::new(Proxy { except: old.except.clone(), ..new })) {
            Some(new) if new == old => {}
            Some(new) => {
                egress.replace(&old, Arc::clone(&new));
                watched.proxy = Some(new);
                told(LogLevel::Info, path, "The proxy's URL was read again.");
                any = true;
            }
            None => told(LogLevel::Error, path, "The proxy's URL cannot be used; the old one stays in force."),
        }
    }
    watched.stamps = now;
    any
}

fn read(source: &Source) -> Option<Secret> {
    config::read_secret(source, &ProcessSources).ok()
}

fn pem(identity: &ClientIdentity) -> Option<IdentityPem> {
    let file = |path: &str| ProcessSources.file(path, config::TLS_FILE_BYTES_MAX).ok();
    let (cert, key) = (file(&identity.cert)?, Secret::new(file(&identity.key)?));
    ProcessSources.identity(&cert, key.expose_secret()).ok()?;
    Some(IdentityPem { cert, key })
}

fn told(level: LogLevel, path: &str, sentence: &str) {
    log::write(level, &[("file", &format!("{path:?}"))], sentence);
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::stream::credential::Scheme;
    use crate::stream::live::Rule;
    use crate::stream::proxy::Exception;

    #[test]
    fn a_changed_file_is_noticed_however_it_was_changed() {
        let folder = std::env::temp_dir().join(format!("restcast-secrets-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let path = folder.join("key");
        let put = |text: &str| std::fs::write(&path, text).expect("written");
        put("one\n");
        let source = Source::File(path.display().to_string());
        let value = Live::new(source, Rule::Visible, Secret::new(*b"one"));
        let credential = Credential { scheme: Some(Scheme::Bearer(value.clone())), ..Credential::default() };
        let egress = Egress::default();
        let mut watched = Watched { values: credential.values().cloned().collect(), ..Watched::default() };
        watched.stamps = watched.paths().map(|path| (path.to_owned(), stamp(path))).collect();
        assert!(!look(&mut watched, &egress), "nothing has changed");
        put("three\n");
        assert!(look(&mut watched, &egress) && !look(&mut watched, &egress));
        assert_eq!(value.value(), Secret::new(*b"three"));
        let beside = folder.join("key.new");
        std::fs::write(&beside, "other\n").expect("written");
        std::fs::rename(&beside, &path).expect("renamed");
        assert!(look(&mut watched, &egress), "replaced by one of the same size");
        assert_eq!(value.value(), Secret::new(*b"other"));
        put("two words\n");
        assert!(!look(&mut watched, &egress), "no token");
        std::fs::remove_file(&path).expect("removed");
        assert!(!look(&mut watched, &egress));
        assert_eq!(value.value(), Secret::new(*b"other"), "the old one stays");
        put("back\n");
        assert!(look(&mut watched, &egress));
        assert_eq!(value.value(), Secret::new(*b"back"));
        std::fs::remove_dir_all(&folder).expect("it was made here");
    }
    #[test]
    fn a_proxys_url_is_read_again_unless_a_reload_has_changed_the_proxy_meanwhile() {
        let folder = std::env::temp_dir().join(format!("restcast-proxy-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let path = folder.join("url");
        let put = |text: &str| std::fs::write(&path, text).expect("written");
        put("http://proxy:3128\n");
        let source = Source::File(path.display().to_string());
        let except = vec![Exception::Name("inside.example".into())];
        let url = read(&source).expect("it is there");
        let first = Arc::new(Proxy { except, ..Proxy::read(&url, source.clone()).expect("a proxy") });
        let egress = Egress::through(Some(Arc::clone(&first)));
        let told = Arc::new(AtomicUsize::new(0));
        let tells = Arc::clone(&told);
        egress.tell(move || _ = tells.fetch_add(1, Ordering::Relaxed));
        let mut watched = Watched { proxy: Some(Arc::clone(&first)), ..Watched::default() };
        watched.stamps = watched.paths().map(|path| (path.to_owned(), stamp(path))).collect();
        assert!(!look(&mut watched, &egress), "nothing has changed");
        put("http://ada:another@proxy:3128\n");
        assert!(look(&mut watched, &egress) && !look(&mut watched, &egress));
        let second = egress.proxy().expect("it is there");
        assert!(second.login.is_some() && second.except == first.except && told.load(Ordering::Relaxed) == 1);
        for unfit in ["https://proxy", "\u{fe}"] {
            put(unfit);
            assert!(!look(&mut watched, &egress));
        }
        assert_eq!(egress.proxy(), Some(second), "the old one stays");
        egress.configure(None);
        put("http://late:proxy@proxy:3128\n");
        look(&mut watched, &egress);
        assert_eq!((egress.proxy(), told.load(Ordering::Relaxed)), (None, 2), "the file has none any more");
        std::fs::remove_dir_all(&folder).expect("it was made here");
    }
}
