//! `filter`: what an operator's jq program makes of the upstream's value, before anything is compared.
//!
//! Source: the jq manual, as `jaq` reads it, with what reaches out of the program taken away: no environment, files,
//! modules, input, clock, messages, formats of other languages or regular expressions.
//! Memory: as much as the program takes. Time: as long as it takes, which may be for ever. So nothing here is run in the
//! server's own process: `runtime::filters` runs it in another, with a time and a memory that it is given.
//! Errors: [`FilterError`], the operator's; [`FilterFault`], of a program with a value.
//! Not here: that process.
//!
//! A value that passes through keeps the spelling of its numbers, and objects the order of their members. What the program
//! computes is spelled anew: integers exactly, other results as the shortest double (`1.50 + 0` is 1.5).

use std::fmt;
use std::sync::Arc;

use jaq_core::load::{self, Arena, Error, File, Loader, lex};
use jaq_core::{Compiler, Ctx, Vars, data};
use jaq_json::{Map, Num, Val};

use crate::codec::json::{Document, Kind, Node, write_string};
use crate::limits::{FILTER_BYTES_MAX, JSON_DEPTH_MAX};
use crate::stream::poll::UpstreamCode;

/// A jq program, as written. Whether it is one, [`Program::compile`] tells.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Filter(Arc<str>);

impl Filter {
    /// The program spelled `text`.
    pub fn new(text: &str) -> Filter {
        Filter(Arc::from(text))
    }

    /// As written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Why a text is no program.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum FilterError {
    /// Over `limits::FILTER_BYTES_MAX`.
    #[error("a filter has at most {FILTER_BYTES_MAX} bytes")]
    TooLong,
    /// It does not read as jq.
    #[error("byte {at}: {expected} was expected")]
    Syntax {
        /// Bytes of the text before the fault.
        at: usize,
        /// What should stand there.
        expected: String,
    },
    /// A name that nothing has.
    #[error("byte {at}: there is no {kind} `{name}` here")]
    Unknown {
        /// Bytes of the text before the name.
        at: usize,
        /// A filter, variable, label or module.
        kind: &'static str,
        /// As written; of a filter with the number of its arguments.
        name: String,
    },
    /// It reads another file.
    #[error("a filter cannot `import` or `include`: there are no modules here")]
    Module,
    /// There was nowhere to read it.
    #[error("cannot be read now: the system has no thread or memory left")]
    Unread,
}

/// Why a program has made nothing of a value. None holds anything of the value.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum FilterFault {
    /// What it is given is no value, by `codec::json`.
    #[error("the body is no JSON value that may be filtered")]
    Body,
    /// It has raised an error.
    #[error(
        "the filter has failed with this body: it asks for what is not there, or of a value what that does not have"
    )]
    Failed,
    /// It gives nothing.
    #[error("the filter gives nothing for this body, and must give one value")]
    Nothing,
    /// It gives several values.
    #[error("the filter gives several values for this body: put them in an array, as in [.items[]]")]
    Several,
    /// What it gives is not JSON: no number, bytes, a name that is no string.
    #[error("the filter gives what JSON has not: NaN, infinity, bytes, or a name that is no string")]
    NotJson,
    /// What it gives is nested too deeply.
    #[error("the filter gives arrays and objects nested over {JSON_DEPTH_MAX} deep")]
    TooDeep,
    /// What it gives is longer than a response may be.
    #[error("the filter gives more bytes than `response_bytes_max`")]
    TooLarge,
    /// It has not come to an end.
    #[error("the filter has not come to an end in time")]
    Time,
    /// It has taken more memory or stack than it may, which ended its process.
    #[error("the filter has taken more memory than it may, or was ended by the system")]
    Memory,
    /// There is no process to run it.
    #[error("there is no process to run the filter in")]
    Unavailable,
}

impl FilterFault {
    /// All of them.
    pub const ALL: [FilterFault; 10] = [
        FilterFault::Body,
        FilterFault::Failed,
        FilterFault::Nothing,
        FilterFault::Several,
        FilterFault::NotJson,
        FilterFault::TooDeep,
        FilterFault::TooLarge,
        FilterFault::Time,
        FilterFault::Memory,
        FilterFault::Unavailable,
    ];

    /// What watchers are told.
    pub const fn code(self) -> UpstreamCode {
        match self {
            FilterFault::TooLarge => UpstreamCode::TooLarge,
            _ => UpstreamCode::Body,
        }
    }
}

/// Definitions of jaq's library that stand on what is not here.
const LEFT_OUT: [(&str, Option<usize>); 30] = [
    ("stderr", None),
    ("debug", None),
    ("halt", None),
    ("halt_error", None),
    ("logb", None),
    ("significand", None),
    ("pow10", None),
    ("drem", None),
    ("nexttoward", None),
    ("scalb", None),
    ("gamma", None),
    ("test", None),
    ("scan_", None),
    ("match", None),
    ("capture", None),
    ("capture_of_match", None),
    ("split", Some(2)),
    ("splits", None),
    ("sub", None),
    ("gsub", None),
    ("scan", None),
    ("todate", None),
    ("fromdate", None),
    ("@html", None),
    ("@htmld", None),
    ("@uri", None),
    ("@urid", None),
    ("@base64", None),
    ("@base64d", None),
    ("@sh", None),
];
/// The same of its native filters.
const NATIVE_LEFT_OUT: [&str; 3] = ["halt", "escape_sh", "tobytes"];

/// A filter, ready to be run. It takes as much stack as its text is nested deeply, to be read as to be run.
pub struct Program(jaq_core::Filter<data::JustLut<Val>>);

impl fmt::Debug for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Program")
    }
}

impl Program {
    /// Reads `text`.
    ///
    /// # Errors
    /// [`FilterError`].
    pub fn compile(text: &str) -> Result<Program, FilterError> {
        if text.len() > FILTER_BYTES_MAX {
            return Err(FilterError::TooLong);
        }
        let is_here = |name: &str, arguments: usize| {
            !LEFT_OUT.iter().any(|(out, of)| *out == name && of.is_none_or(|of| of == arguments))
        };
        let standard = jaq_std::defs().filter(|def| is_here(def.name, def.args.len()));
        let defs = jaq_core::defs().chain(standard).chain(jaq_json::defs());
        let funs = jaq_core::funs().chain(jaq_std::base_funs()).chain(jaq_json::funs());
        let funs = funs.filter(|(name, _, _)| !NATIVE_LEFT_OUT.contains(name));
        let arena = Arena::default();
        let loaded = Loader::new(defs).load(&arena, File { code: text, path: () });
        // What is found wrong are pieces of the text; at its end, one that may stand elsewhere.
        let at = |piece: &str| (piece.as_ptr() as usize).wrapping_sub(text.as_ptr() as usize).min(text.len());
        let modules = loaded.map_err(|errors| match errors.into_iter().next().map(|(_, error)| error) {
            Some(Error::Lex(errors)) => errors.first().map_or(FilterError::Module, |(expected, found)| {
                let expected = match expected {
                    lex::Expect::Delim(open) => format!("the end of what {open:?} opens"),
                    expected => expected.as_str().to_owned(),
                };
                FilterError::Syntax { at: at(found), expected }
            }),
            Some(Error::Parse(errors)) => errors.first().map_or(FilterError::Module, |(expected, found)| {
                FilterError::Syntax { at: at(found), expected: expected.as_str().to_owned() }
            }),
            Some(Error::Io(_)) | None => FilterError::Module,
        })?;
        // Files of values are loaded by whoever runs a program, and nobody does.
        load::import(&modules, |_| Err(String::new())).map_err(|_| FilterError::Module)?;
        let compiled = Compiler::default().with_funs(funs).compile(modules);
        let filter = compiled.map_err(|errors| {
            let unknown = errors.into_iter().flat_map(|(_, unknown)| unknown).next();
            unknown.map_or(FilterError::Module, |(name, undefined)| {
                let (at, kind) = (at(name), undefined.as_str());
                let name = match undefined {
                    jaq_core::compile::Undefined::Filter(arguments) => format!("{name}/{arguments}"),
                    _ => name.to_owned(),
                };
                FilterError::Unknown { at, kind, name }
            })
        })?;
        Ok(Program(filter))
    }

    /// The one value that it makes of `body`, as JSON text of at most `bytes_max` bytes. May take for ever and all memory
    /// that there is.
    ///
    /// # Errors
    /// [`FilterFault`].
    pub fn run(&self, body: &[u8], bytes_max: u64) -> Result<Vec<u8>, FilterFault> {
        let document = Document::parse(body).map_err(|_| FilterFault::Body)?;
        let value = read(document.root());
        drop(document);
        let context = Ctx::<data::JustLut<Val>>::new(&self.0.lut, Vars::new([]));
        let mut values = self.0.id.run((context, value));
        let value = values.next().ok_or(FilterFault::Nothing)?.map_err(|_| FilterFault::Failed)?;
        match values.next() {
            None => {}
            Some(Ok(_)) => return Err(FilterFault::Several),
            Some(Err(_)) => return Err(FilterFault::Failed),
        }
        let mut text = Text { out: Vec::new(), bytes_max: usize::try_from(bytes_max).unwrap_or(usize::MAX) };
        text.write(&value, 0)?;
        Ok(text.out)
    }
}

/// Digits of an integer that is computed with exactly; a longer one is a decimal, as reading it takes long.
const INTEGER_DIGITS_MAX: usize = 64;

/// The value at `node`. Recursion is as deep as the value, at most 128.
fn read(node: Node<'_>) -> Val {
    match node.kind() {
        Kind::Null => Val::Null,
        Kind::Boolean => Val::Bool(node.raw() == b"true"),
        Kind::Number => Val::Num(number(&String::from_utf8_lossy(node.raw()))),
        Kind::String => Val::utf8_str(node.unescaped().into_owned()),
        Kind::Array => Val::Arr(node.elements().map(read).collect::<Vec<_>>().into()),
        Kind::Object => {
            let name = |node: Node<'_>| Val::utf8_str(node.unescaped().into_owned());
            let members: Map = node.members().map(|member| (name(member.name), read(member.value))).collect();
            Val::obj(members)
        }
    }
}

/// A number that is spelled as it was, unless something is computed of it: integers are themselves, all others are decimals.
fn number(spelling: &str) -> Num {
    // «-0» is an integer to nobody but the one who spelled it.
    let is_integer = spelling != "-0" && spelling.bytes().all(|b| b.is_ascii_digit() || b == b'-');
    let integer = (is_integer && spelling.len() <= INTEGER_DIGITS_MAX).then(|| Num::from_str_radix(spelling, 10));
    integer.flatten().unwrap_or_else(|| Num::Dec(spelling.to_owned().into()))
}

/// Writes what a program gives.
struct Text {
    out: Vec<u8>,
    bytes_max: usize,
}

impl Text {
    fn write(&mut self, value: &Val, depth: usize) -> Result<(), FilterFault> {
        match value {
            Val::Null => self.out.extend_from_slice(b"null"),
            Val::Bool(value) => self.out.extend_from_slice(if *value { b"true" } else { b"false" }),
            Val::Num(Num::Float(value)) if !value.is_finite() => return Err(FilterFault::NotJson),
            Val::Num(number) => self.out.extend_from_slice(number.to_string().as_bytes()),
            Val::TStr(text) => self.string(text)?,
            Val::BStr(_) => return Err(FilterFault::NotJson),
            Val::Arr(_) | Val::Obj(_) if depth == JSON_DEPTH_MAX => return Err(FilterFault::TooDeep),
            Val::Arr(elements) => {
                self.out.push(b'[');
                for (index, element) in elements.iter().enumerate() {
                    self.comma(index);
                    self.write(element, depth + 1)?;
                }
                self.out.push(b']');
            }
            Val::Obj(members) => {
                self.out.push(b'{');
                for (index, (name, value)) in members.iter().enumerate() {
                    self.comma(index);
                    let Val::TStr(name) = name else { return Err(FilterFault::NotJson) };
                    self.string(name)?;
                    self.out.push(b':');
                    self.write(value, depth + 1)?;
                }
                self.out.push(b'}');
            }
        }
        if self.out.len() > self.bytes_max { Err(FilterFault::TooLarge) } else { Ok(()) }
    }

    fn comma(&mut self, index: usize) {
        if index > 0 {
            self.out.push(b',');
        }
    }

    fn string(&mut self, text: &[u8]) -> Result<(), FilterFault> {
        write_string(&mut self.out, std::str::from_utf8(text).map_err(|_| FilterFault::NotJson)?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(filter: &str, body: &str) -> Result<String, FilterFault> {
        let program = Program::compile(filter).unwrap_or_else(|error| panic!("{filter}: {error}"));
        program.run(body.as_bytes(), 1 << 20).map(|text| String::from_utf8(text).expect("UTF-8"))
    }

    fn check(filter: &str, body: &str, value: &str) {
        assert_eq!(run(filter, body).as_deref(), Ok(value), "{filter} of {body}");
    }

    #[test]
    fn a_program_makes_one_value_of_the_upstreams() {
        let items = r#"{"items":[{"id":1,"name":"x","pay":9},{"id":2,"name":"y"}],"at":7}"#;
        check(".items | map({id, name})", items, r#"[{"id":1,"name":"x"},{"id":2,"name":"y"}]"#);
        check("[.items[] | select(.id > 1) | .name]", items, r#"["y"]"#);
        check("del(.at) | .items |= length", items, r#"{"items":2}"#);
        check(".items | map({(.name): .id}) | add", items, r#"{"x":1,"y":2}"#);
        check("[paths] | length", items, "9");
        check(r#".items | group_by(.id) | map(.[0].name) | join(",")"#, items, r#""x,y""#);
        check("[limit(3; repeat(1))]", "null", "[1,1,1]");
        check("first(range(10)) , empty", "null", "0");
    }

    #[test]
    fn what_passes_through_is_spelled_as_it_came_and_what_is_computed_anew() {
        let numbers = r#"[1.0,1E5,-0,-0.0,12345678901234567890123,0.10,1e400,9007199254740993]"#;
        check(".", numbers, numbers);
        check("map(.)", numbers, numbers);
        check("{b:.[0],a:.[1]}", numbers, r#"{"b":1.0,"a":1E5}"#);
        let long = format!("[{}]", "7".repeat(5_000));
        check("map(.)", &long, &long);
        check(
            "map(. + 0)",
            "[1.50,3,9007199254740993,12345678901234567890123]",
            "[1.5,3,9007199254740993,12345678901234567890123]",
        );
        check(".", r#"{"b":1,"a":"\u00e9\/\ud83d\ude00\u0001"}"#, "{\"b\":1,\"a\":\"é/😀\\u0001\"}");
    }

    #[test]
    fn what_is_no_one_value_is_a_fault_of_its_own() {
        assert_eq!(run("empty", "1"), Err(FilterFault::Nothing));
        assert_eq!(run(".[]", "[1,2]"), Err(FilterFault::Several));
        assert_eq!(run(".a.b", "[]"), Err(FilterFault::Failed));
        assert_eq!(run("1, error(2)", "[]"), Err(FilterFault::Failed));
        assert_eq!(run("nan", "1"), Err(FilterFault::NotJson));
        assert_eq!(run("infinite", "1"), Err(FilterFault::NotJson));
        assert_eq!(run("{(1): 2}", "1"), Err(FilterFault::NotJson));
        assert_eq!(run(".", r#"{"a":1,"a":2}"#), Err(FilterFault::Body));
        let deep = |times: usize| format!("reduce range({times}) as $i (0; [.])");
        assert!(run(&deep(JSON_DEPTH_MAX), "1").is_ok());
        assert_eq!(run(&deep(JSON_DEPTH_MAX + 1), "1"), Err(FilterFault::TooDeep));
        let program = Program::compile(".").expect("a program");
        assert_eq!(program.run(b"[1,2]", 5), Ok(b"[1,2]".to_vec()));
        assert_eq!(program.run(b"[1,2]", 4), Err(FilterFault::TooLarge));
        for fault in FilterFault::ALL {
            assert_eq!(fault.code() == UpstreamCode::TooLarge, fault == FilterFault::TooLarge);
        }
    }

    #[test]
    fn what_is_no_program_is_refused_where_the_fault_is() {
        let error = |text: &str| Program::compile(text).map(|_| ()).expect_err(text).to_string();
        assert_eq!(error(".a[2"), "byte 4: the end of what \"[\" opens was expected");
        assert_eq!(error(".a | if . then 1"), "byte 16: else or end was expected");
        assert_eq!(error(".a |"), "byte 4: term was expected");
        assert_eq!(error("map(.id) | nope(1)"), "byte 11: there is no filter `nope/1` here");
        assert_eq!(error(".a + $x"), "byte 5: there is no variable `$x` here");
        assert_eq!(error(&" ".repeat(FILTER_BYTES_MAX + 1)), FilterError::TooLong.to_string());
    }

    #[test]
    fn a_program_reaches_nothing_but_its_value() {
        let refused = [
            "env",
            "$ENV",
            "$ENV.PATH",
            "input",
            "inputs",
            "[inputs]",
            "debug",
            "debug(1)",
            "stderr",
            "halt",
            "halt(1)",
            "halt_error",
            "now",
            "localtime",
            "strflocaltime(\"%Y\")",
            "mktime",
            "input_filename",
            "input_line_number",
            "$__prog_args",
            "get_search_list",
            "@sh",
            "@base64",
            "test(\"a\")",
            "gsub(\"a\"; \"b\")",
            "splits(\"a\")",
            "import \"a\" as a; .",
            "include \"/etc/passwd\"; .",
            "import \"/etc/passwd\" as $x; $x",
            "tobytes",
            "getpath([\"a\"]) | ltrimstr(\"a\") | env",
            "read_file(\"/etc/passwd\")",
            "exec(\"id\")",
            "system",
        ];
        for filter in refused {
            assert!(Program::compile(filter).is_err(), "{filter}");
        }
    }
}
