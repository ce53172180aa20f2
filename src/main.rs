//! The door: flags in, one command run, exit code out.
//!
//! Source: protocol version 1, section 7. Exit codes: 0 done, 1 failed, 2 the command line is wrong.
//! Not here: what the commands do (`restcast::commands`, `restcast::runtime`).
#![deny(clippy::disallowed_methods, reason = "time and chance are arguments: clippy.toml says where they come from")]
#![deny(clippy::allow_attributes_without_reason, reason = "an exception says why")]

use std::ffi::OsString;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use lexopt::{Arg, Parser, ValueExt};
use restcast::auth::jwt::Verifier;
use restcast::auth::keys::Algorithm;
use restcast::commands::explain_url::{self, Policies};
use restcast::commands::token::TokenOptions;
use restcast::config::{nearest_name, parse_duration};
use restcast::{commands, runtime};

/// The commands, in the order of the help.
const COMMANDS: [&str; 6] = ["demo", "serve", "check", "token", "watch", "explain"];

/// Where `watch` finds its token when `--token` is not given: flags show in a process list, the environment does not.
const TOKEN_VARIABLE: &str = "RESTCAST_TOKEN";

const HELP: &str = "\
restcast: any JSON REST endpoint as a live WebSocket or SSE stream

Usage: restcast COMMAND [OPTIONS]

Commands:
  demo      a sample upstream, a demo key, two streams and the playground: nothing to configure
  serve     serves the streams of a configuration file
  check     validates a configuration file and prints what is in force, secrets masked
  token     mints a JWT for development
  watch     follows a stream in the terminal
  explain   says why a token is accepted or refused, a target of direct mode allowed or blocked

Options:
  -h, --help       this page; after a command, that command's
  -V, --version    the version
";

const HELP_DEMO: &str = "\
Serves a sample upstream, two streams of it and the playground, with a key made for the occasion.

Usage: restcast demo [--listen ADDR] [--admin ADDR]

Options:
  --listen ADDR    address and port of the public listener; port 0: any free one [default: 127.0.0.1:8080]
  --admin ADDR     the same of the admin listener [default: 127.0.0.1:9080]
";

const HELP_SERVE: &str = "\
Serves the streams of a configuration file. Prints one line of JSON when ready; logs go to standard error.
SIGHUP reloads the file, SIGTERM drains and ends.

Usage: restcast serve --config FILE

Options:
  --config FILE    the configuration, TOML
";

const HELP_CHECK: &str = "\
Says everything that is wrong or odd with a configuration file, each with its line, and prints the configuration in
force with every default filled in and secrets masked. Exit code 1 where something is wrong.

Usage: restcast check --config FILE

Options:
  --config FILE    the configuration, TOML
";

const HELP_TOKEN: &str = "\
Mints a JWT for development and prints it.

Usage: restcast token --sub SUB --expires-in TIME --secret-file FILE [OPTIONS]

Options:
  --sub SUB             the `sub` claim: the user id
  --expires-in TIME     life from now on: 30s, 15m, 1h, 2d
  --secret-file FILE    file with the key: the shared secret of HS256, HS384 and HS512, less one newline at its end;
                        for RS, PS and ES algorithms and EdDSA the private key, PEM
  --alg ALG             HS256, HS384, HS512, RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384 or EdDSA
                        [default: HS256]
  --kid KID             the key's id
  --claim NAME=VALUE    a further claim, JSON or else a string; may be given several times
";

const HELP_WATCH: &str = "\
Follows a stream in the terminal, one frame a line.

Usage: restcast watch URL [--token TOKEN] [--sse]

Options:
  --token TOKEN    the credential; better in the environment, as RESTCAST_TOKEN
  --sse            over SSE instead of WebSocket
";

const HELP_EXPLAIN: &str = "\
Reads a token from standard input and says why it is accepted or refused: its claims are shown, its signature is not.
Or reads a URL, and says why direct mode would allow or block it, and whether the admin API would take it as a stream's,
without touching the network.

Usage: restcast explain token [--config FILE] [--lines]
       restcast explain url [--config FILE] [--lines]

Options:
  --config FILE    the configuration whose keys verify the token (key sets of issuers are fetched), or whose [direct]
                   and admin.stream_urls judge the URL; without it, whatever is public is allowed
  --lines          one JSON object a line in, one verdict a line out
";

/// A command line, understood.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Command {
    /// `--help`, and which page.
    Help(&'static str),
    /// `--version`.
    Version,
    /// `demo`.
    Demo { listen: Option<SocketAddr>, admin: Option<SocketAddr> },
    /// `serve`.
    Serve { config: PathBuf },
    /// `check`.
    Check { config: PathBuf },
    /// `token`.
    Token(TokenFlags),
    /// `watch`.
    Watch { url: String, token: Option<String>, sse: bool },
    /// `filter`: what the server starts, and nobody else.
    Filter,
    /// `explain token`.
    ExplainToken { config: Option<PathBuf>, lines: bool },
    /// `explain url`.
    ExplainUrl { config: Option<PathBuf>, lines: bool },
}

/// The flags of `token`.
#[derive(Clone, Debug, Eq, PartialEq)]
struct TokenFlags {
    sub: String,
    expires_in: Duration,
    secret_file: PathBuf,
    alg: String,
    kid: Option<String>,
    /// Name and value as given, in order.
    claims: Vec<(String, String)>,
}

/// Why a command line is not understood.
#[derive(Debug, thiserror::Error)]
enum UsageError {
    #[error("a command is missing")]
    NoCommand,
    #[error("unknown command `{name}`; did you mean `{nearest}`?")]
    UnknownCommand { name: String, nearest: &'static str },
    #[error("unknown option `{flag}`; did you mean `{nearest}`?")]
    UnknownFlag { flag: String, nearest: &'static str },
    #[error("unexpected argument `{0}`")]
    Unexpected(String),
    #[error("`{0}` is missing")]
    Missing(&'static str),
    #[error("`{0}` is given twice")]
    Twice(&'static str),
    #[error("`{flag}`: {problem}")]
    Value { flag: &'static str, problem: String },
    #[error("{0}")]
    Syntax(#[from] lexopt::Error),
}

fn main() -> ExitCode {
    match parse(std::env::args_os().skip(1)).and_then(run) {
        Ok(code) => code,
        Err(error) => {
            // With standard error gone there is nobody left to tell.
            drop(writeln!(io::stderr(), "restcast: {error}\nTry `restcast --help`."));
            ExitCode::from(2)
        }
    }
}

/// Runs a command to its end.
fn run(command: Command) -> Result<ExitCode, UsageError> {
    match command {
        Command::Help(page) => Ok(print(page)),
        Command::Version => Ok(print(concat!("restcast ", env!("CARGO_PKG_VERSION"), "\n"))),
        Command::Check { config } => Ok(commands::check::run(&config)),
        Command::Demo { listen, admin } => {
            let listen = listen.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 8080)));
            let admin = admin.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 9080)));
            Ok(done(runtime::demo(listen, admin)))
        }
        Command::Serve { config } => Ok(done(runtime::serve(&config))),
        Command::Token(flags) => Ok(mint(flags)),
        Command::Filter => Ok(done(runtime::filters::serve())),
        Command::Watch { url, token, sse } => {
            let token = token.or_else(|| std::env::var(TOKEN_VARIABLE).ok());
            Ok(done(commands::watch::run(&url, token.as_deref(), sse)))
        }
        Command::ExplainToken { lines: true, .. } => {
            Ok(done(commands::explain::run_lines(io::stdin().lock(), io::stdout().lock())))
        }
        Command::ExplainToken { config, lines: false } => Ok(explain_token(config.as_deref())),
        Command::ExplainUrl { config, lines } => Ok(explain_url(config.as_deref(), lines)),
    }
}

/// The exit code of what may have failed, which is told on standard error.
fn done<E: std::fmt::Display>(outcome: Result<(), E>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&error),
    }
}

fn failed(error: &dyn std::fmt::Display) -> ExitCode {
    drop(writeln!(io::stderr(), "restcast: {error}"));
    ExitCode::FAILURE
}

fn mint(flags: TokenFlags) -> ExitCode {
    let Ok(algorithm) = flags.alg.parse::<Algorithm>() else {
        let known: Vec<&str> = Algorithm::ALL.iter().map(|algorithm| algorithm.name()).collect();
        return failed(&format!("unknown algorithm {}: write one of {}", flags.alg, known.join(", ")));
    };
    let options = TokenOptions {
        sub: Some(flags.sub),
        expires_in: flags.expires_in,
        claims: flags.claims.into_iter().map(|(name, value)| format!("{name}={value}")).collect(),
        algorithm,
        secret_file: flags.secret_file,
        kid: flags.kid,
    };
    match commands::token::run(&options, runtime::clock::now().wall, &runtime::chance()) {
        Ok(token) => print(&format!("{token}\n")),
        Err(error) => failed(&error),
    }
}

fn explain_token(config: Option<&Path>) -> ExitCode {
    let config = match config.map(|path| (path, commands::check::load(path))) {
        None => None,
        Some((_, Ok((config, _)))) => Some(config),
        Some((path, Err(error))) => return failed(&error.lines(path).join("\n")),
    };
    let verifier = match config.map(|config| (runtime::jwks::fetch_once(&config), config)) {
        None => None,
        Some((Ok((sets, warnings)), config)) => {
            for warning in warnings {
                drop(writeln!(io::stderr(), "restcast: {warning}"));
            }
            Some(Verifier::with_key_sets(config.auth.jwt, sets))
        }
        Some((Err(error), _)) => return failed(&error),
    };
    match commands::explain::run(io::stdin().lock(), verifier.as_ref(), runtime::clock::now().wall) {
        Ok(explanation) => match (print(&explanation.text), explanation.accepted || verifier.is_none()) {
            (ExitCode::SUCCESS, true) => ExitCode::SUCCESS,
            _ => ExitCode::FAILURE,
        },
        Err(error) => failed(&error),
    }
}

fn explain_url(config: Option<&Path>, lines: bool) -> ExitCode {
    let policies = match config.map(|path| (path, commands::check::load(path))) {
        None => Policies::of(None),
        Some((_, Ok((config, _)))) => Policies::of(Some(&config)),
        Some((path, Err(error))) => return failed(&error.lines(path).join("\n")),
    };
    if lines {
        return done(explain_url::run_lines(io::stdin().lock(), io::stdout().lock(), policies.direct.as_deref()));
    }
    match explain_url::run(io::stdin().lock(), &policies) {
        Ok(explanation) => match (print(&explanation.text), explanation.accepted) {
            (ExitCode::SUCCESS, true) => ExitCode::SUCCESS,
            _ => ExitCode::FAILURE,
        },
        Err(error) => failed(&error),
    }
}

/// Prints `page`; a reader that has gone away is no failure.
fn print(page: &str) -> ExitCode {
    match io::stdout().write_all(page.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => ExitCode::FAILURE,
        _ => ExitCode::SUCCESS,
    }
}

/// Understands the arguments that follow the program's name.
fn parse(args: impl Iterator<Item = OsString>) -> Result<Command, UsageError> {
    let mut parser = Parser::from_args(args);
    let first = match parser.next()? {
        None => return Err(UsageError::NoCommand),
        Some(Arg::Value(name)) => name,
        Some(Arg::Short('h') | Arg::Long("help")) => return Ok(Command::Help(HELP)),
        Some(Arg::Short('V') | Arg::Long("version")) => return Ok(Command::Version),
        Some(arg) => return Err(unknown(&arg, &["--help", "--version"])),
    };
    match first.to_string_lossy().as_ref() {
        "demo" => parse_demo(&mut parser),
        "serve" => {
            Ok(parse_config_only(&mut parser)?.map_or(Command::Help(HELP_SERVE), |config| Command::Serve { config }))
        }
        "check" => {
            Ok(parse_config_only(&mut parser)?.map_or(Command::Help(HELP_CHECK), |config| Command::Check { config }))
        }
        "token" => parse_token(&mut parser),
        "watch" => parse_watch(&mut parser),
        "explain" => parse_explain(&mut parser),
        runtime::filters::COMMAND => parser.next()?.map_or(Ok(Command::Filter), |arg| Err(unknown(&arg, &[]))),
        "help" => parse_help(&mut parser),
        name => Err(unknown_command(name)),
    }
}

fn parse_help(parser: &mut Parser) -> Result<Command, UsageError> {
    let Some(arg) = parser.next()? else { return Ok(Command::Help(HELP)) };
    let Arg::Value(name) = arg else { return Err(unknown(&arg, &[])) };
    match name.to_string_lossy().as_ref() {
        "demo" => Ok(Command::Help(HELP_DEMO)),
        "serve" => Ok(Command::Help(HELP_SERVE)),
        "check" => Ok(Command::Help(HELP_CHECK)),
        "token" => Ok(Command::Help(HELP_TOKEN)),
        "watch" => Ok(Command::Help(HELP_WATCH)),
        "explain" => Ok(Command::Help(HELP_EXPLAIN)),
        name => Err(unknown_command(name)),
    }
}

fn address(parser: &mut Parser, flag: &'static str) -> Result<SocketAddr, UsageError> {
    let text = parser.value()?.string()?;
    let problem = || "write IP:PORT, as in 127.0.0.1:8080".to_owned();
    text.parse().map_err(|_| UsageError::Value { flag, problem: problem() })
}

fn parse_demo(parser: &mut Parser) -> Result<Command, UsageError> {
    let (mut listen, mut admin) = (None, None);
    while let Some(arg) = parser.next()? {
        match arg {
            Arg::Short('h') | Arg::Long("help") => return Ok(Command::Help(HELP_DEMO)),
            Arg::Long("listen") => {
                let address = address(parser, "--listen")?;
                once(&mut listen, "--listen", address)?;
            }
            Arg::Long("admin") => {
                let address = address(parser, "--admin")?;
                once(&mut admin, "--admin", address)?;
            }
            arg => return Err(unknown(&arg, &["--listen", "--admin", "--help"])),
        }
    }
    Ok(Command::Demo { listen, admin })
}

/// For commands that take `--config` alone; `None`: their help is asked for.
fn parse_config_only(parser: &mut Parser) -> Result<Option<PathBuf>, UsageError> {
    let mut config = None;
    while let Some(arg) = parser.next()? {
        match arg {
            Arg::Short('h') | Arg::Long("help") => return Ok(None),
            Arg::Long("config") => once(&mut config, "--config", PathBuf::from(parser.value()?))?,
            arg => return Err(unknown(&arg, &["--config", "--help"])),
        }
    }
    config.map(Some).ok_or(UsageError::Missing("--config"))
}

fn parse_token(parser: &mut Parser) -> Result<Command, UsageError> {
    let (mut sub, mut expires_in, mut secret_file, mut alg, mut kid) = (None, None, None, None, None);
    let mut claims = Vec::new();
    while let Some(arg) = parser.next()? {
        match arg {
            Arg::Short('h') | Arg::Long("help") => return Ok(Command::Help(HELP_TOKEN)),
            Arg::Long("sub") => once(&mut sub, "--sub", parser.value()?.string()?)?,
            Arg::Long("expires-in") => {
                let life = parse_duration(&parser.value()?.string()?)
                    .map_err(|error| UsageError::Value { flag: "--expires-in", problem: error.to_string() })?;
                once(&mut expires_in, "--expires-in", life)?;
            }
            Arg::Long("secret-file") => once(&mut secret_file, "--secret-file", PathBuf::from(parser.value()?))?,
            Arg::Long("alg") => once(&mut alg, "--alg", parser.value()?.string()?)?,
            Arg::Long("kid") => once(&mut kid, "--kid", parser.value()?.string()?)?,
            Arg::Long("claim") => {
                let text = parser.value()?.string()?;
                let (name, value) = text
                    .split_once('=')
                    .filter(|(name, _)| !name.is_empty())
                    .ok_or_else(|| UsageError::Value { flag: "--claim", problem: "write NAME=VALUE".to_owned() })?;
                claims.push((name.to_owned(), value.to_owned()));
            }
            arg => {
                let known = ["--sub", "--expires-in", "--secret-file", "--alg", "--kid", "--claim", "--help"];
                return Err(unknown(&arg, &known));
            }
        }
    }
    Ok(Command::Token(TokenFlags {
        sub: sub.ok_or(UsageError::Missing("--sub"))?,
        expires_in: expires_in.ok_or(UsageError::Missing("--expires-in"))?,
        secret_file: secret_file.ok_or(UsageError::Missing("--secret-file"))?,
        alg: alg.unwrap_or_else(|| "HS256".to_owned()),
        kid,
        claims,
    }))
}

fn parse_watch(parser: &mut Parser) -> Result<Command, UsageError> {
    let (mut url, mut token, mut sse) = (None, None, None);
    while let Some(arg) = parser.next()? {
        match arg {
            Arg::Short('h') | Arg::Long("help") => return Ok(Command::Help(HELP_WATCH)),
            Arg::Long("token") => once(&mut token, "--token", parser.value()?.string()?)?,
            Arg::Long("sse") => once(&mut sse, "--sse", ())?,
            Arg::Value(value) if url.is_none() => url = Some(value.string()?),
            arg => return Err(unknown(&arg, &["--token", "--sse", "--help"])),
        }
    }
    Ok(Command::Watch { url: url.ok_or(UsageError::Missing("URL"))?, token, sse: sse.is_some() })
}

fn parse_explain(parser: &mut Parser) -> Result<Command, UsageError> {
    let (mut topic, mut config, mut lines) = (None, None, None);
    while let Some(arg) = parser.next()? {
        match arg {
            Arg::Short('h') | Arg::Long("help") => return Ok(Command::Help(HELP_EXPLAIN)),
            Arg::Long("config") => once(&mut config, "--config", PathBuf::from(parser.value()?))?,
            Arg::Long("lines") => once(&mut lines, "--lines", ())?,
            Arg::Value(value) if topic.is_none() => topic = Some(value.string()?),
            arg => return Err(unknown(&arg, &["--config", "--lines", "--help"])),
        }
    }
    match topic.as_deref() {
        None => Err(UsageError::Missing("token` or `url")),
        Some("token") => Ok(Command::ExplainToken { config, lines: lines.is_some() }),
        Some("url") => Ok(Command::ExplainUrl { config, lines: lines.is_some() }),
        Some(topic) => {
            Err(UsageError::UnknownCommand { name: format!("explain {topic}"), nearest: nearest_explain(topic) })
        }
    }
}

/// Sets `slot`, unless it is set.
fn once<T>(slot: &mut Option<T>, flag: &'static str, value: T) -> Result<(), UsageError> {
    if slot.replace(value).is_some() { Err(UsageError::Twice(flag)) } else { Ok(()) }
}

fn nearest_explain(topic: &str) -> &'static str {
    if nearest_name(topic, ["token", "url"]) == Some("url") { "explain url" } else { "explain token" }
}

fn unknown_command(name: &str) -> UsageError {
    let nearest = nearest_name(name, COMMANDS).unwrap_or_default();
    UsageError::UnknownCommand { name: name.to_owned(), nearest }
}

/// The error for an argument that is none of `known`. A value is not repeated at length: it may be a token.
fn unknown(arg: &Arg<'_>, known: &[&'static str]) -> UsageError {
    let flag = match arg {
        Arg::Long(name) => format!("--{name}"),
        Arg::Short(name) => format!("-{name}"),
        Arg::Value(value) => {
            let value = value.to_string_lossy();
            let shown: String = value.chars().take(16).collect();
            return UsageError::Unexpected(if shown.len() < value.len() { format!("{shown}…") } else { shown });
        }
    };
    match nearest_name(&flag, known.iter().copied()) {
        Some(nearest) => UsageError::UnknownFlag { flag, nearest },
        None => UsageError::Unexpected(flag),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Result<Command, String> {
        parse(text.split_whitespace().map(OsString::from)).map_err(|error| error.to_string())
    }

    #[test]
    fn every_command_is_understood() {
        assert_eq!(line("demo"), Ok(Command::Demo { listen: None, admin: None }));
        let listen = Some(SocketAddr::from(([127, 0, 0, 1], 0)));
        assert_eq!(line("demo --listen 127.0.0.1:0"), Ok(Command::Demo { listen, admin: None }));
        assert_eq!(line("serve --config=a.toml"), Ok(Command::Serve { config: "a.toml".into() }));
        assert_eq!(line("check --config a.toml"), Ok(Command::Check { config: "a.toml".into() }));
        let watch =
            |token: Option<&str>, sse| Command::Watch { url: "ws://h".into(), token: token.map(Into::into), sse };
        assert_eq!(line("watch ws://h"), Ok(watch(None, false)));
        assert_eq!(line("watch --sse ws://h --token a.b.c"), Ok(watch(Some("a.b.c"), true)));
        assert_eq!(line("explain token"), Ok(Command::ExplainToken { config: None, lines: false }));
        let config = Some("a.toml".into());
        assert_eq!(line("explain token --lines --config a.toml"), Ok(Command::ExplainToken { config, lines: true }));
        assert_eq!(line("explain url --lines"), Ok(Command::ExplainUrl { config: None, lines: true }));
        let token =
            line("token --sub u1 --expires-in 15m --claim a=1 --claim b=c=d --kid k --alg HS512 --secret-file f");
        let flags = TokenFlags {
            sub: "u1".into(),
            expires_in: Duration::from_secs(900),
            secret_file: "f".into(),
            alg: "HS512".into(),
            kid: Some("k".into()),
            claims: vec![("a".into(), "1".into()), ("b".into(), "c=d".into())],
        };
        assert_eq!(token, Ok(Command::Token(flags)));
    }

    #[test]
    fn help_is_there_for_all_and_for_each_command() {
        for text in ["--help", "-h", "help"] {
            assert_eq!(line(text), Ok(Command::Help(HELP)), "{text}");
        }
        assert_eq!(line("--version"), Ok(Command::Version));
        for command in COMMANDS {
            let page = line(&format!("help {command}")).expect(command);
            assert_ne!(page, Command::Help(HELP));
            assert_eq!(line(&format!("{command} --help")).as_ref(), Ok(&page));
            assert_eq!(line(&format!("{command} -h")).as_ref(), Ok(&page));
            assert!(HELP.contains(&format!("\n  {command} ")));
        }
    }

    #[test]
    fn what_is_wrong_is_named_with_what_was_meant() {
        for (text, said) in [
            ("", "a command is missing"),
            ("serv", "unknown command `serv`; did you mean `serve`?"),
            ("help chek", "unknown command `chek`; did you mean `check`?"),
            ("--versoin", "unknown option `--versoin`; did you mean `--version`?"),
            ("serve", "`--config` is missing"),
            ("serve --confg a", "unknown option `--confg`; did you mean `--config`?"),
            ("serve --config", "missing argument for option '--config'"),
            ("serve --config a --config b", "`--config` is given twice"),
            ("serve a.toml", "unexpected argument `a.toml`"),
            ("demo --listen 80", "`--listen`: write IP:PORT, as in 127.0.0.1:8080"),
            ("watch", "`URL` is missing"),
            ("watch a eyJhbGciOiJIUzI1NiJ9.e30.x", "unexpected argument `eyJhbGciOiJIUzI1…`"),
            ("watch a --sse --sse", "`--sse` is given twice"),
            ("explain", "`token` or `url` is missing"),
            ("explain ulr", "unknown command `explain ulr`; did you mean `explain url`?"),
            ("explain tokn", "unknown command `explain tokn`; did you mean `explain token`?"),
            ("token --sub u1", "`--expires-in` is missing"),
            ("token --claim a", "`--claim`: write NAME=VALUE"),
        ] {
            assert_eq!(line(text), Err(said.to_owned()), "{text}");
        }
        assert!(
            line("token --expires-in 15")
                .is_err_and(|said| said.starts_with("`--expires-in`: \"15\" is not a duration"))
        );
    }
}
