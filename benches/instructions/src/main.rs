//! Counts the instructions of the hot paths and holds them to `figures.toml`: a guard that a busy machine does not disturb.
//!
//! ```text
//! instructions                          counts each work under callgrind; fails where one takes more than its figure and margin
//! instructions WORK ROUNDS [READERS]    does a work, for a look at it: valgrind --tool=callgrind target/release/instructions delivery 50
//! ```
//!
//! `UPDATE_INSTRUCTIONS=1` writes what was counted into `figures.toml`. A work is run twice, once for twice as many rounds;
//! the difference is what its rounds take, without start, preparation and end. What is counted for each reader is run with
//! twice as many readers as well, and the difference of the differences taken: what a round takes however many read, as the
//! comparison of values, is no part of a delivery and has a figure of its own. valgrind shows the program a processor of
//! its own making, so that `ring` and `memchr` choose the same code on every machine; another compiler or another version
//! of them does change the figures, which therefore say by which Rust they were counted.

#[path = "../../hall/mod.rs"]
mod hall;
mod works;

use std::collections::BTreeMap;
use std::env;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::process::{Command, ExitCode};

use works::{Does, WORKS, Work};

const FIGURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/figures.toml");
/// The release of Rust that compiled this, and the core with it.
const RUSTC: &str = env!("RUSTC_RELEASE");
/// More than this over its figure is a failure, in thousandths: several times what runs differ by.
const MARGIN_PERMILLE: u64 = 50;
const HEAD: &str = "\
# Instructions of one work each, counted by callgrind on x86-64: `make instructions` fails when a work takes 5 % more than
# this. `UPDATE_INSTRUCTIONS=1 make instructions` writes the file anew. Lower figures as they are earned; whoever raises
# one says why in the commit.
";

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let outcome = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => guard(),
        [name, rounds] => run(name, rounds, None),
        [name, rounds, readers] => run(name, rounds, Some(readers)),
        _ => Err("usage: instructions [WORK ROUNDS [READERS]]".to_owned()),
    };
    match outcome {
        Ok(code) => code,
        Err(message) => {
            eprintln!("instructions: {message}");
            ExitCode::FAILURE
        }
    }
}

fn run(name: &str, rounds: &str, readers: Option<&str>) -> Result<ExitCode, String> {
    let work = WORKS.into_iter().find(|work| work.name == name).ok_or_else(|| format!("there is no work {name:?}"))?;
    let number = |text: &str| text.parse::<u64>().map_err(|error| format!("{text:?}: {error}"));
    let rounds = number(rounds)?;
    match (work.does, readers) {
        (Does::Rounds(run), None) => run(rounds),
        (Does::Rounds(_), Some(_)) => return Err(format!("{name} is not counted for each reader")),
        (Does::Parts(usual, run), readers) => run(rounds, readers.map_or(Ok(usual), number)?),
    }
    Ok(ExitCode::SUCCESS)
}

fn guard() -> Result<ExitCode, String> {
    let mut counts = BTreeMap::new();
    for work in WORKS {
        let count = counted(&work, |rounds, readers| collected(work.name, rounds, readers))?;
        counts.insert(work.name.to_owned(), count);
    }
    if env::var_os("UPDATE_INSTRUCTIONS").is_some() {
        let figures = Figures { rustc: RUSTC.to_owned(), counts: counts.clone() };
        fs::write(FIGURES, figures.to_text()).map_err(|error| format!("{FIGURES}: {error}"))?;
    }
    let text = fs::read_to_string(FIGURES).map_err(|error| format!("{FIGURES}: {error}"))?;
    let figures = Figures::from_text(&text).map_err(|error| format!("{FIGURES}: {error}"))?;
    if !figures.counts.keys().eq(counts.keys()) {
        return Err(format!("{FIGURES} has no figure for a work, or one for none"));
    }
    let mut out = io::stdout().lock();
    let (mut passed, mut failed) = (0, 0);
    for (name, &count) in &counts {
        let figure = figures.counts[name];
        let verdict = Verdict::of(count, figure);
        *(if verdict == Verdict::TooMany { &mut failed } else { &mut passed }) += 1;
        let most = figure + margin(figure);
        let _ =
            writeln!(out, "instructions of one {name}: {count} (figure {figure}, at most {most}): {}", verdict.text());
    }
    if figures.rustc != RUSTC {
        let _ = writeln!(
            out,
            "The figures are those of Rust {}, and this is {RUSTC}: a difference may be the compiler's.",
            figures.rustc
        );
    }
    let _ = writeln!(out, "{passed} passed, {failed} failed");
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What `figures.toml` holds.
#[derive(Debug, PartialEq)]
struct Figures {
    rustc: String,
    counts: BTreeMap<String, u64>,
}

impl Figures {
    fn from_text(text: &str) -> Result<Figures, String> {
        let mut rows: toml::Table = toml::from_str(text).map_err(|error| error.to_string())?;
        let rustc = match rows.remove("rustc") {
            Some(toml::Value::String(rustc)) => rustc,
            _ => return Err("rustc, a text, says by which Rust the figures were counted".to_owned()),
        };
        let count = |(name, value): (String, toml::Value)| match value {
            toml::Value::Integer(count) if count > 0 => Ok((name, count.unsigned_abs())),
            _ => Err(format!("{name} is not a number of instructions")),
        };
        Ok(Figures { rustc, counts: rows.into_iter().map(count).collect::<Result<_, _>>()? })
    }

    fn to_text(&self) -> String {
        let mut text = format!("{HEAD}rustc = \"{}\"\n", self.rustc);
        for (name, count) in &self.counts {
            let _ = writeln!(text, "{name} = {count}");
        }
        text
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Verdict {
    Ok,
    TooMany,
    Fewer,
}

impl Verdict {
    fn of(count: u64, figure: u64) -> Verdict {
        let margin = margin(figure);
        if count > figure + margin {
            Verdict::TooMany
        } else if count + margin < figure {
            Verdict::Fewer
        } else {
            Verdict::Ok
        }
    }

    fn text(self) -> &'static str {
        match self {
            Verdict::Ok => "ok",
            Verdict::TooMany => "TOO MANY",
            Verdict::Fewer => "ok; the figure can be lowered",
        }
    }
}

fn margin(figure: u64) -> u64 {
    figure * MARGIN_PERMILLE / 1_000
}

/// Instructions of one of what `work` does, where `collected` tells those of a run with so many rounds and readers.
fn counted(work: &Work, collected: impl Fn(u64, Option<u64>) -> Result<u64, String>) -> Result<u64, String> {
    let less =
        |from: u64, what: u64| from.checked_sub(what).ok_or_else(|| format!("{} took less for doing more", work.name));
    let rounds = work.rounds;
    let of_rounds = |readers| less(collected(2 * rounds, readers)?, collected(rounds, readers)?);
    match work.does {
        Does::Rounds(_) => Ok(of_rounds(None)? / rounds),
        Does::Parts(readers, _) => {
            Ok(less(of_rounds(Some(2 * readers))?, of_rounds(Some(readers))?)? / (rounds * readers))
        }
    }
}

/// Instructions of a whole run, as callgrind tells them.
fn collected(name: &str, rounds: u64, readers: Option<u64>) -> Result<u64, String> {
    let program = env::current_exe().map_err(|error| format!("the program's own path: {error}"))?;
    let ran = Command::new("valgrind")
        .env("RUST_BACKTRACE", "0")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(program)
        .args([name, &rounds.to_string()])
        .args(readers.map(|readers| readers.to_string()))
        .output()
        .map_err(|error| format!("valgrind: {error}; .ci/setup installs it"))?;
    let told = String::from_utf8_lossy(&ran.stderr);
    if !ran.status.success() {
        return Err(format!("{name} under callgrind: {}\n{told}", ran.status));
    }
    told.lines()
        .find_map(|line| line.split_once("Collected : ")?.1.trim().parse().ok())
        .ok_or_else(|| format!("callgrind told no count:\n{told}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A server that takes so much for a delivery, beside what it takes to start, to open readers and to compare values.
    fn server(delivery: u64) -> impl Fn(u64, Option<u64>) -> Result<u64, String> {
        move |rounds, readers| {
            let readers = readers.unwrap_or(1);
            Ok(40_000_000 + readers * 105_000 + rounds * 350_000 + rounds * readers * delivery)
        }
    }

    #[test]
    fn a_delivery_that_takes_a_tenth_more_is_told() {
        let work = Work { name: "delivery", rounds: 50, does: Does::Parts(1_000, |_, _| {}) };
        let count = |delivery| counted(&work, server(delivery)).expect("a count");
        assert_eq!(count(200), 200);
        assert_eq!(Verdict::of(count(220), 200), Verdict::TooMany);
        assert_eq!(Verdict::of(count(210), 200), Verdict::Ok);
        assert_eq!(Verdict::of(count(190), 200), Verdict::Ok);
        assert_eq!(Verdict::of(count(189), 200), Verdict::Fewer);
    }

    #[test]
    fn a_round_is_counted_without_what_precedes_it() {
        let work = Work { name: "change", rounds: 50, does: Does::Rounds(|_| {}) };
        assert_eq!(counted(&work, server(200)), Ok(350_200));
        let shrinks = counted(&work, |rounds, _| Ok(1_000 - rounds));
        assert_eq!(shrinks, Err("change took less for doing more".to_owned()));
    }

    #[test]
    fn figures_are_read_as_they_are_written() {
        let counts = BTreeMap::from([("change".to_owned(), 350_000), ("delivery".to_owned(), 200)]);
        let figures = Figures { rustc: "1.95.0".to_owned(), counts };
        assert_eq!(Figures::from_text(&figures.to_text()), Ok(figures));
        assert!(Figures::from_text("delivery = 200\n").is_err(), "by which Rust?");
        assert!(Figures::from_text("rustc = \"1.95.0\"\ndelivery = 0\n").is_err());
    }
}
