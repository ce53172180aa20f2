//! The load tester of restcast: many thousands of WebSocket or SSE connections, what reached them and what they cost.
//!
//! Not here: anything of the `restcast` crate. What judges the server shares no code with it.

mod account;
mod cli;
mod clock;
mod histogram;
mod link;
mod payload;
mod plot;
mod report;
mod run;
mod server;
mod sse;
mod tally;
mod target;
mod template;
mod tls;
mod token;
mod upstream;
mod worker;
mod ws;

use std::io::{self, Write as _};
use std::process::ExitCode;

use cli::Command;

fn main() -> ExitCode {
    let outcome = match cli::parse(std::env::args_os().skip(1)) {
        Ok(Command::Help(page)) => {
            // With nobody left to read, there is nothing to do about it.
            drop(io::stdout().write_all(page.as_bytes()));
            Ok(ExitCode::SUCCESS)
        }
        Ok(Command::Run(options)) => run::run(*options),
        Ok(Command::Upstream(options)) => upstream::run(&options).map(|()| ExitCode::SUCCESS),
        Ok(Command::Worker) => worker::run().map(|()| ExitCode::SUCCESS),
        Err(error) => {
            drop(writeln!(io::stderr(), "loadtest: {error}\nTry `loadtest --help`."));
            return ExitCode::from(2);
        }
    };
    outcome.unwrap_or_else(|problem| {
        drop(writeln!(io::stderr(), "loadtest: {problem}"));
        ExitCode::FAILURE
    })
}
