//! The state file: what the admin API has created, kept across restarts.
//!
//! One JSON object, `{"version":1,"sections":{"api_keys":[…]}}`; each part of the server has a section of its own and
//! does not see the others. A change writes a file beside it, has it reach the disk, and renames it into place: whenever
//! the process or the machine dies, there is the old state or the new, never half of one. What a later version has put
//! beside the known sections is kept.
//!
//! The lock is one on `<path>.lock`, a file of its own that is never replaced or removed: a lock on the state file would
//! go with the inode that a rename puts aside. It ends with the process, however that ends. Where the configuration names
//! the file it is taken at start. Where it does not, several processes may stand in one directory without meaning to share
//! anything: the file is read, and locked when there is first something to write; what another process has written
//! meanwhile, and ended, is read again then.
//!
//! Source: protocol version 1, section 6; rename(2), fsync(2), flock(2). Memory: the parsed file, which has at most
//! [`limits::STATE_BYTES_MAX`] bytes. Errors: [`StateError`], for the operator. Blocking: not for a core's thread.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde_json::{Map, Value, json};

use crate::limits;

/// The version of the file's form that is written, and the newest that is read.
const VERSION: u64 = 1;

/// What is wrong with the state file: one sentence that says what to do.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another process has it.
    #[error("the state file {path} is another process's: give each process its own `server.state`")]
    Held {
        /// The file.
        path: String,
    },
    /// It cannot be locked.
    #[error("the state file {path} cannot be locked ({error}): its directory must exist and be writable by this user")]
    Unlockable {
        /// The file.
        path: String,
        /// Why not.
        error: io::Error,
    },
    /// It cannot be read.
    #[error("the state file {path} cannot be read: {error}")]
    Unreadable {
        /// The file.
        path: String,
        /// Why not.
        error: io::Error,
    },
    /// It is none, or broken.
    #[error(
        "the state file {path} {what}: restore it from a copy, or move it away to begin without what the admin API has created"
    )]
    Corrupt {
        /// The file.
        path: String,
        /// What is wrong.
        what: String,
    },
    /// A later version has written it.
    #[error("the state file {path} is of version {version}, and this program knows {VERSION}: start the newer program")]
    TooNew {
        /// The file.
        path: String,
        /// Its version.
        version: u64,
    },
    /// It would have more bytes than it may.
    #[error("the state file {path} would be over {} bytes: delete something first", limits::STATE_BYTES_MAX)]
    TooLarge {
        /// The file.
        path: String,
    },
    /// There is no chance to make something of.
    #[error("the system gives no random numbers")]
    NoRandom,
    /// It cannot be written.
    #[error("the state file {path} cannot be written: {error}")]
    Unwritable {
        /// The file.
        path: String,
        /// Why not.
        error: io::Error,
    },
}

/// The state file of this process.
#[derive(Debug)]
pub struct StateFile {
    /// Where it is, symbolic links followed.
    path: PathBuf,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// Held until the process ends.
    lock: Option<File>,
    sections: Map<String, Value>,
}

impl StateFile {
    /// Reads the file at `path`; where there is none, nothing has been created yet. `named`: the configuration names it, so
    /// it is locked at once.
    ///
    /// # Errors
    /// [`StateError`]: the process should not start.
    pub fn open(path: &Path, named: bool) -> Result<StateFile, StateError> {
        // A link stays a link: what it leads to is locked and replaced.
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let lock = if named { Some(lock(&path)?) } else { None };
        let sections = read(&path)?;
        Ok(StateFile { path, inner: Mutex::new(Inner { lock, sections }) })
    }

    /// The file at `path` as if there were none yet: it is read when there is first something to write.
    pub fn unread(path: &Path) -> StateFile {
        StateFile { path: path.to_owned(), inner: Mutex::new(Inner { lock: None, sections: Map::new() }) }
    }

    /// What is said of a section that its part can make nothing of.
    pub fn corrupt(&self, section: &str, what: String) -> StateError {
        StateError::Corrupt { path: shown(&self.path), what: format!("has a section {section} that {what}") }
    }

    /// What a section holds; `None`: nothing has been put there.
    pub fn section(&self, name: &str) -> Option<Value> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).sections.get(name).cloned()
    }

    /// Changes a section: `change` gets what it holds (null: nothing) and says what it is to hold. When this returns `Ok`,
    /// that is on the disk; otherwise nothing has changed.
    ///
    /// # Errors
    /// Of `change`, or [`StateError`].
    pub fn update<T, E: From<StateError>>(
        &self,
        name: &str,
        change: impl FnOnce(Value) -> Result<(Value, T), E>,
    ) -> Result<T, E> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.lock.is_none() {
            let lock = lock(&self.path)?;
            inner.sections = read(&self.path)?;
            inner.lock = Some(lock);
        }
        let (value, outcome) = change(inner.sections.get(name).cloned().unwrap_or(Value::Null))?;
        let mut sections = inner.sections.clone();
        sections.insert(name.to_owned(), value);
        write(&self.path, &sections)?;
        inner.sections = sections;
        Ok(outcome)
    }
}

/// The path with something behind it, in the same directory.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// Takes the lock of the state file at `path`.
fn lock(path: &Path) -> Result<File, StateError> {
    let unlockable = |error| StateError::Unlockable { path: shown(path), error };
    let mut options = OpenOptions::new();
    let file = options.create(true).append(true).mode(0o600).open(beside(path, ".lock")).map_err(unlockable)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(StateError::Held { path: shown(path) }),
        Err(TryLockError::Error(error)) => Err(unlockable(error)),
    }
}

fn read(path: &Path) -> Result<Map<String, Value>, StateError> {
    let unreadable = |error| StateError::Unreadable { path: shown(path), error };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Map::new()),
        Err(error) => return Err(unreadable(error)),
    };
    let mut bytes = Vec::new();
    let one_past = u64::try_from(limits::STATE_BYTES_MAX).unwrap_or(u64::MAX).saturating_add(1);
    file.take(one_past).read_to_end(&mut bytes).map_err(unreadable)?;
    let corrupt = |what: String| StateError::Corrupt { path: shown(path), what };
    if bytes.len() > limits::STATE_BYTES_MAX {
        return Err(corrupt(format!("is over {} bytes", limits::STATE_BYTES_MAX)));
    }
    // What the parser says of a broken file may repeat some of it: its place is enough.
    let whole: Value = serde_json::from_slice(&bytes)
        .map_err(|error| corrupt(format!("is broken at line {}, column {}", error.line(), error.column())))?;
    match (whole.get("version").and_then(Value::as_u64), whole.get("sections").and_then(Value::as_object)) {
        (Some(version), _) if version > VERSION => Err(StateError::TooNew { path: shown(path), version }),
        (Some(VERSION), Some(sections)) => Ok(sections.clone()),
        _ => Err(corrupt("is JSON, but not restcast's".to_owned())),
    }
}

fn write(path: &Path, sections: &Map<String, Value>) -> Result<(), StateError> {
    let mut text = json!({ "version": VERSION, "sections": sections }).to_string();
    text.push('\n');
    if text.len() > limits::STATE_BYTES_MAX {
        return Err(StateError::TooLarge { path: shown(path) });
    }
    replace(path, text.as_bytes()).map_err(|error| StateError::Unwritable { path: shown(path), error })
}

/// Puts a file with these bytes in the place of the one at `path`, all at once.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    // One writer at a time holds the lock: what stands there is left over from one that died.
    let new = beside(path, ".new");
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let mut file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(&new)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all()).and_then(|()| std::fs::rename(&new, path));
    if let Err(error) = written {
        let _ = std::fs::remove_file(&new);
        return Err(error);
    }
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // The rename is on the disk when the directory is.
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    /// A directory of this test's own, gone when it ends.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Scratch {
            let path = std::env::temp_dir().join(format!("restcast-state-{name}-{}", std::process::id()));
            let _ = std::fs::remove_dir_all(&path);
            std::fs::create_dir_all(&path).expect("a scratch directory");
            Scratch(path)
        }

        fn state(&self) -> PathBuf {
            self.0.join("restcast.state")
        }

        fn names(&self) -> Vec<String> {
            let entries = std::fs::read_dir(&self.0).expect("a directory");
            let mut names: Vec<String> =
                entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect();
            names.sort();
            names
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn put(state: &StateFile, name: &str, value: Value) -> Result<(), StateError> {
        state.update(name, |_| Ok((value, ())))
    }

    #[test]
    fn what_is_put_there_is_there_after_a_restart() {
        let scratch = Scratch::new("restart");
        let state = StateFile::open(&scratch.state(), true).expect("a new one");
        assert_eq!(state.section("api_keys"), None);
        put(&state, "api_keys", json!([1])).expect("written");
        put(&state, "streams", json!({ "a": 1 })).expect("written");
        let seen = state.update("api_keys", |old| Ok::<_, StateError>((json!([1, 2]), old))).expect("written");
        assert_eq!(seen, json!([1]));
        drop(state);
        let state = StateFile::open(&scratch.state(), true).expect("it is free again");
        assert_eq!(
            (state.section("api_keys"), state.section("streams")),
            (Some(json!([1, 2])), Some(json!({ "a": 1 })))
        );
        assert_eq!(scratch.names(), ["restcast.state", "restcast.state.lock"], "nothing is left over");
        let mode = std::fs::metadata(scratch.state()).expect("a file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn one_process_has_it_through_every_replacement() {
        let scratch = Scratch::new("lock");
        let state = StateFile::open(&scratch.state(), true).expect("a new one");
        let second = || StateFile::open(&scratch.state(), true).expect_err("it is held").to_string();
        let said = format!(
            "the state file {} is another process's: give each process its own `server.state`",
            scratch.state().display()
        );
        assert_eq!(second(), said);
        for n in 0..3 {
            put(&state, "api_keys", json!(n)).expect("written");
            assert_eq!(second(), said);
        }
    }

    #[test]
    fn one_that_is_not_named_is_locked_when_it_is_written() {
        let scratch = Scratch::new("late");
        let one = StateFile::open(&scratch.state(), false).expect("a new one");
        let other = StateFile::open(&scratch.state(), false).expect("nobody has it yet");
        assert_eq!(scratch.names(), [""; 0], "who writes nothing leaves nothing");
        put(&one, "api_keys", json!([1])).expect("written");
        assert!(matches!(put(&other, "api_keys", json!([2])), Err(StateError::Held { .. })));
        assert_eq!(other.section("api_keys"), None);
        drop(one);
        let seen = other.update("api_keys", |old| Ok::<_, StateError>((json!([1, 2]), old)));
        assert_eq!(seen.expect("it is free now"), json!([1]), "what was written meanwhile is not lost");
    }

    #[test]
    fn a_change_that_is_refused_changes_nothing() {
        let scratch = Scratch::new("refused");
        let state = StateFile::open(&scratch.state(), true).expect("a new one");
        put(&state, "api_keys", json!([1])).expect("written");
        let too_large = "x".repeat(limits::STATE_BYTES_MAX);
        assert!(matches!(put(&state, "api_keys", json!(too_large)), Err(StateError::TooLarge { .. })));
        // What another writer that died has left is no obstacle; what cannot be removed is.
        std::fs::write(beside(&scratch.state(), ".new"), b"half").expect("written");
        put(&state, "api_keys", json!([2])).expect("written");
        std::fs::create_dir(beside(&scratch.state(), ".new")).expect("a directory");
        assert!(matches!(put(&state, "api_keys", json!([3])), Err(StateError::Unwritable { .. })));
        assert_eq!(state.section("api_keys"), Some(json!([2])));
        drop(state);
        let state = StateFile::open(&scratch.state(), true).expect("it is whole");
        assert_eq!(state.section("api_keys"), Some(json!([2])));
    }

    #[test]
    fn a_link_stays_a_link() {
        let scratch = Scratch::new("link");
        let (target, link) = (scratch.0.join("target"), scratch.state());
        put(&StateFile::open(&target, true).expect("a new one"), "api_keys", json!(1)).expect("written");
        std::os::unix::fs::symlink(&target, &link).expect("a link");
        let state = StateFile::open(&link, true).expect("it is read");
        put(&state, "api_keys", json!(2)).expect("written");
        assert!(std::fs::symlink_metadata(&link).expect("a link").is_symlink());
        assert!(matches!(StateFile::open(&target, true), Err(StateError::Held { .. })), "by either name");
    }

    #[test]
    fn a_file_that_is_none_is_refused_and_left_alone() {
        let scratch = Scratch::new("corrupt");
        let said = |bytes: &[u8]| {
            std::fs::write(scratch.state(), bytes).expect("written");
            let error = StateFile::open(&scratch.state(), false).expect_err("it is none").to_string();
            assert_eq!(std::fs::read(scratch.state()).expect("still there"), bytes);
            error.replace(&scratch.state().display().to_string(), "F")
        };
        let advice = "restore it from a copy, or move it away to begin without what the admin API has created";
        for (bytes, what) in [
            (&b""[..], "is broken at line 1, column 0"),
            (b"{\"version\":1,\n\"sections\":{", "is broken at line 2, column 12"),
            (b"{\"version\":1}", "is JSON, but not restcast's"),
            (b"{\"version\":0,\"sections\":{}}", "is JSON, but not restcast's"),
            (b"[]", "is JSON, but not restcast's"),
            (b"\xff", "is broken at line 1, column 1"),
        ] {
            assert_eq!(said(bytes), format!("the state file F {what}: {advice}"));
        }
        assert_eq!(
            said(b"{\"version\":2,\"sections\":{}}"),
            "the state file F is of version 2, and this program knows 1: start the newer program"
        );
        let large = vec![b' '; limits::STATE_BYTES_MAX + 1];
        assert_eq!(said(&large), format!("the state file F is over {} bytes: {advice}", limits::STATE_BYTES_MAX));
        let nowhere = scratch.0.join("nowhere").join("state");
        assert!(matches!(StateFile::open(&nowhere, true), Err(StateError::Unlockable { .. })));
        assert!(StateFile::open(&nowhere, false).is_ok(), "nothing is to be written yet");
    }
}
