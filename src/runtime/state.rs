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
    /// It cannot be written: nothing has changed.
    #[error("the state file {path} cannot be written: {error}")]
    Unwritable {
        /// The file.
        path: String,
        /// Why not.
        error: io::Error,
    },
    /// What was written could neither be made sure of nor be taken back.
    #[error(
        "the state file {path} has been changed, but it is not certain that this is on the disk ({error}), and it could not be \
         put back ({undoing}): until the next change that succeeds this process goes by what was before, and one that is \
         started now by what the file says"
    )]
    Undecided {
        /// The file.
        path: String,
        /// Why it is not certain.
        error: io::Error,
        /// Why it could not be put back.
        undoing: io::Error,
    },
}

/// The state file of this process.
#[derive(Debug)]
pub struct StateFile {
    /// Where it is, symbolic links followed.
    path: PathBuf,
    disk: Disk,
    inner: Mutex<Inner>,
}

/// How files are made to stay, and put in place: the system's calls. A test puts one that fails in their place, as a disk
/// does that is about to die.
#[derive(Clone, Copy, Debug)]
struct Disk {
    /// Has a file's bytes reach the disk.
    sync_file: fn(&File) -> io::Result<()>,
    /// Has a directory's names reach the disk.
    sync_directory: fn(&File) -> io::Result<()>,
}

const DISK: Disk = Disk { sync_file: File::sync_all, sync_directory };

/// Some file systems have no such call for a directory: there a rename stays as soon as it is done, or nothing can be done
/// for it.
fn sync_directory(directory: &File) -> io::Result<()> {
    match directory.sync_all() {
        Err(error) if matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => Ok(()),
        synced => synced,
    }
}

#[derive(Debug)]
struct Inner {
    /// Held until the process ends.
    lock: Option<File>,
    sections: Map<String, Value>,
    /// How often they have been read.
    readings: u64,
}

impl Inner {
    /// Takes the lock of the file at `path`, if it is not held, and reads what is there by then.
    fn claim(&mut self, path: &Path) -> Result<(), StateError> {
        if self.lock.is_none() {
            let lock = lock(path)?;
            self.sections = read(path)?;
            self.readings += 1;
            self.lock = Some(lock);
        }
        Ok(())
    }
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
        Ok(StateFile { path, disk: DISK, inner: Mutex::new(Inner { lock, sections, readings: 1 }) })
    }

    /// The file at `path` as if there were none yet: it is read when there is first something to write.
    pub fn unread(path: &Path) -> StateFile {
        let inner = Inner { lock: None, sections: Map::new(), readings: 0 };
        StateFile { path: path.to_owned(), disk: DISK, inner: Mutex::new(inner) }
    }

    /// How often the file has been read: what another process has written meanwhile may be there after another reading.
    pub fn readings(&self) -> u64 {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).readings
    }

    /// Makes the file this process's, if it is not; how often it has been read.
    ///
    /// # Errors
    /// [`StateError`]: nothing can be written.
    pub fn claim(&self) -> Result<u64, StateError> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.claim(&self.path)?;
        Ok(inner.readings)
    }

    /// Where it is, for messages.
    pub fn shown_path(&self) -> String {
        format!("the state file {}", shown(&self.path))
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
    /// that is on the disk; otherwise nothing has changed, neither here nor in the file, unless the error is
    /// [`StateError::Undecided`], which says what holds.
    ///
    /// # Errors
    /// Of `change`, or [`StateError`].
    pub fn update<T, E: From<StateError>>(
        &self,
        name: &str,
        change: impl FnOnce(Value) -> Result<(Value, T), E>,
    ) -> Result<T, E> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.claim(&self.path)?;
        let (value, outcome) = change(inner.sections.get(name).cloned().unwrap_or(Value::Null))?;
        let mut sections = inner.sections.clone();
        sections.insert(name.to_owned(), value);
        write(&self.path, &inner.sections, &sections, self.disk)?;
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

fn text_of(path: &Path, sections: &Map<String, Value>) -> Result<String, StateError> {
    let mut text = json!({ "version": VERSION, "sections": sections }).to_string();
    text.push('\n');
    if text.len() > limits::STATE_BYTES_MAX {
        return Err(StateError::TooLarge { path: shown(path) });
    }
    Ok(text)
}

/// Writes `new` where `old` stands. Where that fails, `old` stands there.
fn write(path: &Path, old: &Map<String, Value>, new: &Map<String, Value>, disk: Disk) -> Result<(), StateError> {
    let text = text_of(path, new)?;
    // What the file was made of; none was written before there was something to write.
    let before = if path.exists() { Some(text_of(path, old)?) } else { None };
    replace(path, text.as_bytes(), disk).map_err(|unwritten| match unwritten {
        Unwritten::Untouched(error) => StateError::Unwritable { path: shown(path), error },
        Unwritten::Unsure(error) => {
            let undone = match &before {
                // The file is what counts: that its name is not certain to outlast a failure of the machine is so already.
                Some(before) => match replace(path, before.as_bytes(), disk) {
                    Ok(()) | Err(Unwritten::Unsure(_)) => Ok(()),
                    Err(Unwritten::Untouched(error)) => Err(error),
                },
                None => std::fs::remove_file(path),
            };
            match undone {
                Ok(()) => StateError::Unwritable { path: shown(path), error },
                Err(undoing) => StateError::Undecided { path: shown(path), error, undoing },
            }
        }
    })
}

/// Why a file was not replaced.
#[derive(Debug)]
enum Unwritten {
    /// What stood there stands there.
    Untouched(io::Error),
    /// It was replaced, and may be the old one again after a failure of the machine.
    Unsure(io::Error),
}

/// Puts a file with these bytes in the place of the one at `path`, all at once.
fn replace(path: &Path, bytes: &[u8], disk: Disk) -> Result<(), Unwritten> {
    let directory = prepared(path, bytes, disk).map_err(Unwritten::Untouched)?;
    let new = beside(path, ".new");
    if let Err(error) = std::fs::rename(&new, path) {
        let _ = std::fs::remove_file(&new);
        return Err(Unwritten::Untouched(error));
    }
    // The rename is on the disk when the directory is.
    (disk.sync_directory)(&directory).map_err(Unwritten::Unsure)
}

/// Writes the file that is to stand at `path` beside it, whole and on the disk. The directory both stand in, which is opened
/// before anything is replaced in it: where it cannot be, nothing is.
fn prepared(path: &Path, bytes: &[u8], disk: Disk) -> io::Result<File> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let directory = File::open(directory)?;
    // One writer at a time holds the lock: what stands there is left over from one that died.
    let new = beside(path, ".new");
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let mut file = OpenOptions::new().create_new(true).write(true).mode(0o600).open(&new)?;
    if let Err(error) = file.write_all(bytes).and_then(|()| (disk.sync_file)(&file)) {
        let _ = std::fs::remove_file(&new);
        return Err(error);
    }
    Ok(directory)
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

    fn failing(_: &File) -> io::Result<()> {
        Err(io::Error::other("a dying disk"))
    }

    /// What a process that starts now reads.
    fn read_anew(scratch: &Scratch) -> Option<Value> {
        read(&scratch.state()).expect("it is whole").get("api_keys").cloned()
    }

    #[test]
    fn a_rename_that_the_disk_does_not_confirm_is_taken_back_so_that_file_and_memory_agree() {
        let scratch = Scratch::new("unsure");
        let mut state = StateFile::open(&scratch.state(), true).expect("a new one");
        let unsure = Disk { sync_directory: failing, ..DISK };
        // The first that is written at all leaves no file.
        state.disk = unsure;
        let error = put(&state, "api_keys", json!([1])).expect_err("the disk does not confirm it");
        assert!(
            matches!(error, StateError::Unwritable { .. }) && error.to_string().contains("a dying disk"),
            "{error}"
        );
        assert_eq!((state.section("api_keys"), scratch.names()), (None, vec!["restcast.state.lock".to_owned()]));
        state.disk = DISK;
        put(&state, "api_keys", json!([1])).expect("written");
        state.disk = unsure;
        assert!(matches!(put(&state, "api_keys", json!([1, 2])), Err(StateError::Unwritable { .. })));
        assert_eq!((state.section("api_keys"), read_anew(&scratch)), (Some(json!([1])), Some(json!([1]))));
        assert_eq!(scratch.names(), ["restcast.state", "restcast.state.lock"], "nothing is left over");
        state.disk = Disk { sync_file: failing, ..DISK };
        assert!(matches!(put(&state, "api_keys", json!([1, 2])), Err(StateError::Unwritable { .. })));
        assert_eq!((state.section("api_keys"), read_anew(&scratch)), (Some(json!([1])), Some(json!([1]))));
        state.disk = DISK;
        put(&state, "api_keys", json!([1, 2])).expect("written");
        assert_eq!((state.section("api_keys"), read_anew(&scratch)), (Some(json!([1, 2])), Some(json!([1, 2]))));
    }

    #[test]
    fn a_rename_that_can_neither_be_confirmed_nor_taken_back_is_told_as_what_it_is() {
        /// Confirms nothing, and has the directory refuse the file that would be put back.
        fn in_the_way(directory: &File) -> io::Result<()> {
            use std::os::fd::AsRawFd as _;
            let directory = std::fs::read_link(format!("/proc/self/fd/{}", directory.as_raw_fd()))?;
            std::fs::create_dir(directory.join("restcast.state.new"))?;
            Err(io::Error::other("a dying disk"))
        }
        let scratch = Scratch::new("undecided");
        let mut state = StateFile::open(&scratch.state(), true).expect("a new one");
        put(&state, "api_keys", json!([1])).expect("written");
        state.disk = Disk { sync_directory: in_the_way, ..DISK };
        let error = put(&state, "api_keys", json!([1, 2])).expect_err("the disk does not confirm it");
        assert!(matches!(error, StateError::Undecided { .. }), "{error}");
        let said = error.to_string();
        assert!(
            said.contains("this process goes by what was before, and one that is started now by what the file says")
        );
        assert_eq!((state.section("api_keys"), read_anew(&scratch)), (Some(json!([1])), Some(json!([1, 2]))));
        // The next change that succeeds makes both the same.
        std::fs::remove_dir(beside(&scratch.state(), ".new")).expect("an empty directory");
        state.disk = DISK;
        put(&state, "api_keys", json!([1, 3])).expect("written");
        assert_eq!((state.section("api_keys"), read_anew(&scratch)), (Some(json!([1, 3])), Some(json!([1, 3]))));
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
