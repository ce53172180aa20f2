//! Counts the instructions of the hot paths and holds them to `figures.toml`: a guard that a busy machine does not disturb.
//!
//! ```text
//! instructions              counts each work under callgrind; fails where one takes more than its figure and margin
//! instructions WORK TIMES   does a work, for a look at it: valgrind --tool=callgrind target/release/instructions delivery 50
//! ```
//!
//! `UPDATE_INSTRUCTIONS=1` writes what was counted into `figures.toml`. A work is run twice, once for twice as many times;
//! the difference is what it takes, without start, preparation and end. valgrind shows the program a processor of its own
//! making, so that `ring` and `memchr` choose the same code on every machine; another compiler or another version of
//! them does change the figures.

#[path = "../../hall/mod.rs"]
mod hall;
mod works;

use std::collections::BTreeMap;
use std::env;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::process::{Command, ExitCode};

use works::{WORKS, Work};

const FIGURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/figures.toml");
/// More than this over its figure is a failure, in thousandths: several times what runs differ by.
const MARGIN_PERMILLE: u64 = 50;
const HEAD: &str = "\
# Instructions of one work each, counted by callgrind: `make instructions` fails when a work takes 5 % more than this.
# `UPDATE_INSTRUCTIONS=1 make instructions` writes the file anew, with Rust 1.95 on x86-64. Lower figures as they are
# earned; whoever raises one says why in the commit.
";

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let outcome = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => guard(),
        [name, times] => run(name, times),
        _ => Err("usage: instructions [WORK TIMES]".to_owned()),
    };
    match outcome {
        Ok(code) => code,
        Err(message) => {
            eprintln!("instructions: {message}");
            ExitCode::FAILURE
        }
    }
}

fn run(name: &str, times: &str) -> Result<ExitCode, String> {
    let work = WORKS.into_iter().find(|work| work.name == name).ok_or_else(|| format!("there is no work {name:?}"))?;
    let times = times.parse().map_err(|error| format!("{times:?}: {error}"))?;
    (work.run)(times);
    Ok(ExitCode::SUCCESS)
}

fn guard() -> Result<ExitCode, String> {
    let mut counts = BTreeMap::new();
    for work in WORKS {
        counts.insert(work.name.to_owned(), count(&work)?);
    }
    let mut out = io::stdout().lock();
    if env::var_os("UPDATE_INSTRUCTIONS").is_some() {
        let mut text = HEAD.to_owned();
        for (name, count) in &counts {
            let _ = writeln!(text, "{name} = {count}");
        }
        fs::write(FIGURES, text).map_err(|error| format!("{FIGURES}: {error}"))?;
    }
    let text = fs::read_to_string(FIGURES).map_err(|error| format!("{FIGURES}: {error}"))?;
    let figures: BTreeMap<String, u64> = toml::from_str(&text).map_err(|error| format!("{FIGURES}: {error}"))?;
    if !figures.keys().eq(counts.keys()) {
        return Err(format!("{FIGURES} has no figure for a work, or one for none"));
    }
    let (mut passed, mut failed) = (0, 0);
    for (name, &count) in &counts {
        let figure = figures[name];
        let margin = figure * MARGIN_PERMILLE / 1_000;
        let verdict = if count > figure + margin {
            failed += 1;
            "TOO MANY"
        } else {
            passed += 1;
            if count + margin < figure { "ok; the figure can be lowered" } else { "ok" }
        };
        let _ = writeln!(
            out,
            "instructions of one {name}: {count} (figure {figure}, at most {}): {verdict}",
            figure + margin
        );
    }
    let _ = writeln!(out, "{passed} passed, {failed} failed");
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Instructions of one of what `work` does.
fn count(work: &Work) -> Result<u64, String> {
    let once = collected(work, work.times)?;
    let twice = collected(work, 2 * work.times)?;
    let difference = twice.checked_sub(once).ok_or_else(|| format!("{} took less for doing more", work.name))?;
    Ok(difference / (work.times * work.each))
}

/// Instructions of a whole run, as callgrind tells them.
fn collected(work: &Work, times: u64) -> Result<u64, String> {
    let program = env::current_exe().map_err(|error| format!("the program's own path: {error}"))?;
    let ran = Command::new("valgrind")
        .env("RUST_BACKTRACE", "0")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(program)
        .args([work.name, &times.to_string()])
        .output()
        .map_err(|error| format!("valgrind: {error}; .ci/setup installs it"))?;
    let told = String::from_utf8_lossy(&ran.stderr);
    if !ran.status.success() {
        return Err(format!("{} under callgrind: {}\n{told}", work.name, ran.status));
    }
    told.lines()
        .find_map(|line| line.split_once("Collected : ")?.1.trim().parse().ok())
        .ok_or_else(|| format!("callgrind told no count:\n{told}"))
}
