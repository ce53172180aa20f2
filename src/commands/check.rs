//! `restcast check --config F`: says everything that is wrong or odd with a configuration and shows what is in force.
//!
//! Source: protocol version 1, section 7. `serve` loads its configuration through the same [`load`].
//! Memory: the file, at most `config::FILE_BYTES_MAX` bytes. Errors: [`LoadError`], the operator's fault.
//! Not here: what is right and wrong (`config`).

use std::fs::File;
use std::io::{self, Read, Write};
use std::num::NonZeroU16;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::process::ExitCode;

use super::certificates;
use crate::config::{Config, ConfigError, FILE_BYTES_MAX, FileError, IdentityError, Sources, Warning};
use crate::limits::FILTER_STACK_BYTES;
use crate::stream::filter::{FilterError, Program};

/// The environment and the file system of this process; relative paths are relative to its working directory.
#[derive(Clone, Copy, Debug)]
pub struct ProcessSources;

impl Sources for ProcessSources {
    fn env(&self, name: &str) -> Option<Vec<u8>> {
        std::env::var_os(name).map(OsStringExt::into_vec)
    }

    fn file(&self, path: &str, bytes_max: usize) -> Result<Vec<u8>, FileError> {
        read_file(Path::new(path), bytes_max)
    }

    fn cores(&self) -> Option<NonZeroU16> {
        let cores = std::thread::available_parallelism().ok()?;
        Some(NonZeroU16::try_from(cores).unwrap_or(NonZeroU16::MAX))
    }

    fn identity(&self, cert: &[u8], key: &[u8]) -> Result<(), IdentityError> {
        certificates::certified_key(cert, key).map(drop)
    }

    fn filter(&self, text: &str) -> Result<(), FilterError> {
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("filter".to_owned()).stack_size(FILTER_STACK_BYTES);
            let reading = thread.spawn_scoped(scope, || Program::compile(text).map(drop));
            reading.map_or(Err(FilterError::Unread), |reading| reading.join().unwrap_or(Err(FilterError::Unread)))
        })
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file cannot be had.
    #[error("{0}")]
    File(FileError),
    /// The file is no text.
    #[error("is not UTF-8 text")]
    NotText {
        /// Line of the first byte that is none; 1 is the first.
        line: u32,
    },
    /// The file is wrong in these places.
    #[error("has {} errors", .0.len())]
    Wrong(Vec<ConfigError>),
}

impl LoadError {
    /// A line for each thing that is wrong with the file at `path`, `restcast.toml:12: …`, none with a secret.
    pub fn lines(&self, path: &Path) -> Vec<String> {
        let path = path.display();
        match self {
            LoadError::File(error) => vec![format!("{path}: the file {error}")],
            LoadError::NotText { line } => vec![format!("{path}:{line}: {self}")],
            LoadError::Wrong(errors) => errors.iter().map(|e| format!("{path}:{}: {}", e.line, e.problem)).collect(),
        }
    }
}

/// A line for each warning about the file at `path`, `restcast.toml:12: warning: …`.
pub fn warning_lines(path: &Path, warnings: &[Warning]) -> Vec<String> {
    warnings.iter().map(|w| format!("{}:{}: warning: {}", path.display(), w.line, w.oddity)).collect()
}

/// Reads and checks the configuration file at `path`, with what its `env:` and `file:` values name.
pub fn load(path: &Path) -> Result<(Config, Vec<Warning>), LoadError> {
    let bytes = read_file(path, FILE_BYTES_MAX).map_err(LoadError::File)?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let before = error.as_bytes().get(..error.utf8_error().valid_up_to()).unwrap_or_default();
        let line_ends = before.iter().filter(|b| **b == b'\n').count();
        LoadError::NotText { line: u32::try_from(line_ends + 1).unwrap_or(u32::MAX) }
    })?;
    Config::parse(&text, &ProcessSources).map_err(LoadError::Wrong)
}

/// Checks the file at `path`: warnings and errors to standard error, the configuration in force, secrets masked, to
/// standard output. Exit code 0, or 1 where there is an error.
pub fn run(path: &Path) -> ExitCode {
    // Lines nobody reads (`check … | head`) do not change the verdict.
    match check(path, &mut io::stdout().lock(), &mut io::stderr().lock()) {
        Ok(true) => ExitCode::SUCCESS,
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Ok(false) | Err(_) => ExitCode::FAILURE,
    }
}

/// Writes the verdict on the file at `path`; says whether it can be served.
fn check(path: &Path, out: &mut dyn Write, err: &mut dyn Write) -> io::Result<bool> {
    let loaded = load(path);
    let said = match &loaded {
        Ok((_, warnings)) => warning_lines(path, warnings),
        Err(error) => error.lines(path),
    };
    for line in said {
        writeln!(err, "{line}")?;
    }
    if let Ok((config, _)) = &loaded {
        out.write_all(config.masked_toml().as_bytes())?;
        out.flush()?;
    }
    Ok(loaded.is_ok())
}

/// The contents of the file at `path`, of at most `bytes_max` bytes. A pipe or device is read like a file.
fn read_file(path: &Path, bytes_max: usize) -> Result<Vec<u8>, FileError> {
    let fault = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => FileError::Missing,
        io::ErrorKind::PermissionDenied => FileError::Denied,
        _ => FileError::Unreadable,
    };
    let mut bytes = Vec::new();
    let one_past = u64::try_from(bytes_max).unwrap_or(u64::MAX).saturating_add(1);
    File::open(path).map_err(fault)?.take(one_past).read_to_end(&mut bytes).map_err(fault)?;
    if bytes.len() > bytes_max { Err(FileError::TooLarge { limit: bytes_max }) } else { Ok(bytes) }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    /// A directory of this test's own, gone when it ends.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Scratch {
            let path = std::env::temp_dir().join(format!("restcast-check-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&path).expect("a scratch directory");
            Scratch(path)
        }

        fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
            let path = self.0.join(name);
            std::fs::write(&path, bytes).expect("a scratch file");
            path
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            drop(std::fs::remove_dir_all(&self.0));
        }
    }

    /// Whether the file can be served, what goes to standard output and what to standard error.
    fn checked(path: &Path) -> (bool, String, String) {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let good = check(path, &mut out, &mut err).expect("a Vec takes everything");
        let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
        (good, text(out), text(err).replace(&format!("{}", path.display()), "F"))
    }

    #[test]
    fn a_good_file_is_shown_with_its_secrets_masked() {
        let scratch = Scratch::new("good");
        let key = scratch.write("key", "0123456789abcdef0123456789abcdef\n");
        let path = scratch.write(
            "restcast.toml",
            format!(
                "[[auth.jwt.key]]\nalg = \"HS256\"\nsecret = \"file:{}\"\n[admin]\nkey = \"short\"\n",
                key.display()
            ),
        );
        let (good, out, err) = checked(&path);
        assert!(good && out.contains("alg = \"HS256\"\nsecret = \"***\"\n") && !out.contains("0123456789"), "{out}");
        assert_eq!(err, "F:5: warning: `admin.key` has 5 bytes: use at least 16 random ones\n");
    }

    #[test]
    fn a_bad_file_gets_a_line_for_each_error_and_shows_nothing() {
        let scratch = Scratch::new("bad");
        let path = scratch.write("restcast.toml", "[sever]\n[server]\ncores = \"two\"\n");
        let said = "F:1: unknown key `sever`; the nearest known one is `server`\n\
                    F:3: `server.cores` has the type string: write an integer\n";
        assert_eq!(checked(&path), (false, String::new(), said.to_owned()));
    }

    #[test]
    fn a_file_that_cannot_be_read_is_told_apart() {
        let scratch = Scratch::new("unreadable");
        let says = |path: &Path| checked(path).2;
        assert_eq!(says(&scratch.0.join("nope")), "F: the file does not exist\n");
        assert_eq!(says(&scratch.0), "F: the file cannot be read\n");
        assert_eq!(says(&scratch.write("latin1", b"a = 1\n\xe9 = 2\n")), "F:2: is not UTF-8 text\n");
        assert_eq!(says(&scratch.write("big", vec![b'#'; FILE_BYTES_MAX + 1])), "F: the file is over 4194304 bytes\n");
        assert!(checked(&scratch.write("full", vec![b'#'; FILE_BYTES_MAX])).0);
    }
}
