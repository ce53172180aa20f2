//! A folder of a test's own: there and empty when it begins, gone when it ends, however it ends.

use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::{fs, process};

/// One of them; it stands for its path.
pub struct Folder(PathBuf);

impl Folder {
    /// An empty one, whose name begins with `prefix`.
    pub fn new(prefix: &str) -> Folder {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let name = format!("{prefix}-{}-{}", process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        // A process that had this id before may have been killed.
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).expect("a folder");
        Folder(path)
    }

    /// Puts a file of that name in its place, and returns its path.
    pub fn put(&self, name: &str, text: &str) -> String {
        let path = self.join(name);
        // As a careful operator does it: nobody ever reads half of it.
        let beside = self.join(format!("{name}.new"));
        fs::write(&beside, text).expect("written");
        fs::rename(&beside, &path).expect("renamed");
        path.into_os_string().into_string().expect("UTF-8")
    }

    /// Where a server of the test keeps its state.
    pub fn state(&self) -> PathBuf {
        self.join("restcast.state")
    }

    /// The line of `[server]` that says so.
    pub fn state_line(&self) -> String {
        format!("state = {:?}", self.state())
    }
}

impl Deref for Folder {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
