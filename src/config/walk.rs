//! The file as written: TOML text in, typed values by key with their lines out.
//!
//! Source: TOML 1.0 through `toml`; `keys::KEYS` for what may stand where.
//! Memory: the parsed text, a few times the file, until the configuration is built.
//! Errors: every one that is found, each with its line, into one list; a value that is wrong counts as absent afterwards.
//! Not here: what the values mean together (`meaning`).

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::Range;
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::form::{self, FormError, Sourced};
use super::keys::{self, Form, KeyDoc, Preset};
use super::{ConfigError, Problem, Sources, moment};
use crate::secret::Secret;
use crate::time::WallTime;

/// Members of one array or free table.
const MEMBERS_MAX: usize = 256;

/// Something and the line it stands in.
#[derive(Clone, Debug)]
pub(super) struct Lined<T> {
    pub(super) line: u32,
    pub(super) value: T,
}

/// A value of one of the forms.
#[derive(Clone, Debug)]
enum Value {
    Boolean(bool),
    Number(u64),
    Duration(Duration),
    Text(String),
    Texts(Vec<Lined<String>>),
    TextTable(Vec<Lined<(String, String)>>),
    Secret(Sourced),
    Secrets(Vec<Lined<Sourced>>),
    SecretTable(Vec<Lined<(String, Sourced)>>),
    Address(SocketAddr),
    Moment(WallTime),
}

/// The root table, or one element of an array of tables: its values by path.
#[derive(Debug)]
pub(super) struct Section {
    /// Where it begins.
    pub(super) line: u32,
    /// What the file has; `None` where it was wrong.
    written: BTreeMap<&'static str, (u32, Option<Value>)>,
    arrays: BTreeMap<&'static str, Vec<Section>>,
}

impl Section {
    fn new(line: u32) -> Section {
        Section { line, written: BTreeMap::new(), arrays: BTreeMap::new() }
    }

    /// The line of `path`, or the section's own where the file leaves it out.
    pub(super) fn line_of(&self, path: &str) -> u32 {
        self.written.get(path).map_or(self.line, |(line, _)| *line)
    }

    /// Whether the file has it as it should be.
    pub(super) fn is_right(&self, path: &str) -> bool {
        self.written.get(path).is_some_and(|(_, value)| value.is_some())
    }

    /// Whether the file has `path`, be its value right or wrong.
    pub(super) fn is_written(&self, path: &str) -> bool {
        self.written.contains_key(path)
    }

    /// The first line of the table at `path`, which is none of an array; `None` where the file has none of its keys.
    pub(super) fn line_of_table(&self, path: &str) -> Option<u32> {
        let of_it = |key: &&str| key.strip_prefix(path).is_some_and(|rest| rest.starts_with('.'));
        self.written.iter().filter(|(key, _)| of_it(key)).map(|(_, (line, _))| *line).min()
    }

    /// The elements of the array of tables at `path`.
    pub(super) fn array(&self, path: &str) -> &[Section] {
        self.arrays.get(path).map_or(&[], Vec::as_slice)
    }

    /// The value as written, else the key's default; `None` where there is neither.
    fn value(&self, path: &'static str) -> Option<Value> {
        if let Some((_, Some(value))) = self.written.get(path) {
            return Some(value.clone());
        }
        let key = keys::find(path).unwrap_or_else(|| panic!("KEYS lists {path}"));
        let Preset::Is(text) = key.default else { return None };
        let value = DeValue::parse(text).expect("a default of KEYS is TOML");
        let mut walk = Walk { lines: Lines::of(""), sources: &Nowhere, errors: Vec::new() };
        Some(walk.read(key, &value).expect("a default of KEYS is of its key's form"))
    }

    pub(super) fn boolean(&self, path: &'static str) -> bool {
        match self.value(path) {
            Some(Value::Boolean(value)) => value,
            _ => panic!("KEYS gives {path} a boolean and a default"),
        }
    }

    pub(super) fn number(&self, path: &'static str) -> u64 {
        match self.value(path) {
            Some(Value::Number(value)) => value,
            _ => panic!("KEYS gives {path} a number and a default"),
        }
    }

    /// A number whose bounds in `KEYS` are those of `u32`, or narrower.
    pub(super) fn number_u32(&self, path: &'static str) -> u32 {
        u32::try_from(self.number(path)).unwrap_or_else(|_| panic!("KEYS bounds {path} by 32 bits"))
    }

    pub(super) fn duration_unless_unset(&self, path: &'static str) -> Option<Duration> {
        match self.value(path)? {
            Value::Duration(value) => Some(value),
            _ => panic!("KEYS gives {path} a duration"),
        }
    }

    pub(super) fn duration(&self, path: &'static str) -> Duration {
        self.duration_unless_unset(path).unwrap_or_else(|| panic!("KEYS gives {path} a default"))
    }

    pub(super) fn text(&self, path: &'static str) -> Option<String> {
        match self.value(path)? {
            Value::Text(value) => Some(value),
            _ => panic!("KEYS gives {path} a string"),
        }
    }

    pub(super) fn texts(&self, path: &'static str) -> Vec<Lined<String>> {
        match self.value(path) {
            Some(Value::Texts(values)) => values,
            None => Vec::new(),
            _ => panic!("KEYS gives {path} an array of strings"),
        }
    }

    pub(super) fn text_table(&self, path: &'static str) -> Vec<Lined<(String, String)>> {
        match self.value(path) {
            Some(Value::TextTable(members)) => members,
            _ => panic!("KEYS gives {path} a table of strings and a default"),
        }
    }

    pub(super) fn secret(&self, path: &'static str) -> Option<Secret> {
        match self.value(path)? {
            Value::Secret(value) => Some(value.secret),
            _ => panic!("KEYS gives {path} a secret"),
        }
    }

    /// A secret, and where it stands.
    pub(super) fn sourced(&self, path: &'static str) -> Option<Sourced> {
        match self.value(path)? {
            Value::Secret(value) => Some(value),
            _ => panic!("KEYS gives {path} a secret"),
        }
    }

    /// The secrets of an array; `None`: the file has none.
    pub(super) fn secrets(&self, path: &'static str) -> Option<Vec<Lined<Sourced>>> {
        match self.value(path)? {
            Value::Secrets(values) => Some(values),
            _ => panic!("KEYS gives {path} an array of secrets"),
        }
    }

    pub(super) fn secret_table(&self, path: &'static str) -> Vec<Lined<(String, Sourced)>> {
        match self.value(path) {
            Some(Value::SecretTable(members)) => members,
            _ => panic!("KEYS gives {path} a table of secrets and a default"),
        }
    }

    pub(super) fn moment(&self, path: &'static str) -> Option<WallTime> {
        match self.value(path)? {
            Value::Moment(value) => Some(value),
            _ => panic!("KEYS gives {path} a moment"),
        }
    }

    pub(super) fn address(&self, path: &'static str) -> SocketAddr {
        match self.value(path) {
            Some(Value::Address(value)) => value,
            _ => panic!("KEYS gives {path} an address and a default"),
        }
    }
}

/// Reads `text` against `KEYS`. What is wrong with it is appended to `errors`; text that is no TOML gives `None`.
pub(super) fn walk(text: &str, sources: &dyn Sources, errors: &mut Vec<ConfigError>) -> Option<Section> {
    let lines = Lines::of(text);
    let (root, syntax_errors) = DeTable::parse_recoverable(text);
    if !syntax_errors.is_empty() {
        // What a parser makes of the rest of a broken file would only add errors that are none.
        errors.extend(syntax_errors.iter().map(|error| ConfigError {
            line: lines.line_at(error.span().map_or(0, |span| span.start)),
            problem: Problem::Syntax(error.message().to_owned()),
        }));
        return None;
    }
    let mut walk = Walk { lines, sources, errors: Vec::new() };
    let mut section = Section::new(1);
    walk.table("", root.get_ref(), &mut section);
    errors.append(&mut walk.errors);
    Some(section)
}

/// Offsets of a text's line ends.
struct Lines(Vec<usize>);

impl Lines {
    fn of(text: &str) -> Lines {
        Lines(text.match_indices('\n').map(|(at, _)| at).collect())
    }

    /// Number of the line that holds the byte at `offset`; 1 is the first.
    fn line_at(&self, offset: usize) -> u32 {
        u32::try_from(self.0.partition_point(|end| *end < offset) + 1).unwrap_or(u32::MAX)
    }
}

/// Where defaults may be looked up: they name neither variables nor files.
struct Nowhere;

impl Sources for Nowhere {
    fn env(&self, _: &str) -> Option<Vec<u8>> {
        None
    }

    fn file(&self, _: &str, _: usize) -> Result<Vec<u8>, super::FileError> {
        Err(super::FileError::Missing)
    }
}

struct Walk<'s> {
    lines: Lines,
    sources: &'s dyn Sources,
    errors: Vec<ConfigError>,
}

impl Walk<'_> {
    fn table(&mut self, within: &str, table: &DeTable<'_>, section: &mut Section) {
        for (name, value) in table {
            let path = match within {
                "" => name.get_ref().to_string(),
                _ => format!("{within}.{}", name.get_ref()),
            };
            // `"server.listen" = …`, in quotes, is one name with a dot in it: no key has one.
            let plain = !name.get_ref().contains('.');
            if let Some(key) = keys::find(&path).filter(|_| plain) {
                let read = self.read(key, value);
                section.written.insert(key.path, (self.lines.line_at(name.span().start), read));
            } else if let Some(known) = keys::find_table(&path).filter(|_| plain) {
                self.subtable(known, value, section);
            } else {
                let nearest = keys::nearest(within, name.get_ref());
                let key = form::quoted(&path).trim_matches('"').to_owned();
                self.error(name.span(), Problem::UnknownKey { key, nearest });
            }
        }
    }

    /// The table or array of tables at `path`, which `KEYS` has.
    fn subtable(&mut self, path: &'static str, value: &Spanned<DeValue<'_>>, section: &mut Section) {
        let is_array = keys::ARRAYS.contains(&path);
        match value.get_ref() {
            DeValue::Table(table) if !is_array => self.table(path, table, section),
            DeValue::Array(array) if is_array => {
                for element in array {
                    let DeValue::Table(table) = element.get_ref() else {
                        self.wrong_type(path, "a table", element);
                        continue;
                    };
                    let mut inner = Section::new(self.lines.line_at(element.span().start));
                    self.table(path, table, &mut inner);
                    self.require_all(path, &inner);
                    section.arrays.entry(path).or_default().push(inner);
                }
            }
            _ if is_array => self.error(value.span(), Problem::SingleTable { path }),
            _ => self.wrong_type(path, "a table", value),
        }
    }

    fn require_all(&mut self, array: &str, section: &Section) {
        for key in keys::KEYS.iter().filter(|key| key.default == Preset::Required) {
            let is_within = |array: &str| key.path.strip_prefix(array).is_some_and(|rest| rest.starts_with('.'));
            // What an array within this one requires, its own elements are asked for.
            let stands_in_it = is_within(array) && !keys::ARRAYS.iter().any(|a| a.len() > array.len() && is_within(a));
            if stands_in_it && !section.written.contains_key(key.path) {
                self.errors.push(ConfigError { line: section.line, problem: Problem::Missing { key: key.path } });
            }
        }
    }

    /// The value of `key`, or `None` and at least one error.
    fn read(&mut self, key: &KeyDoc, value: &Spanned<DeValue<'_>>) -> Option<Value> {
        match (key.form, value.get_ref()) {
            (Form::Boolean, DeValue::Boolean(value)) => Some(Value::Boolean(*value)),
            (Form::Integer { min, max }, DeValue::Integer(_)) => {
                self.bounded(key, integer(value).filter(|n| (min..=max).contains(n)), value).map(Value::Number)
            }
            (Form::Size { min, max }, DeValue::Integer(_)) => {
                self.bounded(key, integer(value).filter(|n| (min..=max).contains(n)), value).map(Value::Number)
            }
            (Form::Size { min, max }, DeValue::String(text)) => {
                let bytes = self.formed(key.path, form::size(text), value.span())?;
                self.bounded(key, Some(bytes).filter(|n| (min..=max).contains(n)), value).map(Value::Number)
            }
            (Form::Duration { min_ms, max_ms }, DeValue::String(text)) => {
                let span = self.formed(key.path, form::duration(text), value.span())?;
                let fits = (Duration::from_millis(min_ms)..=Duration::from_millis(max_ms)).contains(&span);
                self.bounded(key, fits.then_some(span), value).map(Value::Duration)
            }
            (Form::Text, DeValue::String(text)) => self.text(key.path, text, value.span()).map(Value::Text),
            (Form::Choice(choices), DeValue::String(text)) => {
                let choice = choices.iter().find(|choice| **choice == text.as_ref()).map(|choice| choice.to_string());
                let unknown = || FormError::Choice { found: form::quoted(text), choices: key.form.to_string() };
                self.formed(key.path, choice.ok_or_else(unknown), value.span()).map(Value::Text)
            }
            (Form::Address, DeValue::String(text)) => {
                self.formed(key.path, form::address(text), value.span()).map(Value::Address)
            }
            (Form::Moment, DeValue::Datetime(written)) => {
                self.formed(key.path, moment::read(written), value.span()).map(Value::Moment)
            }
            (Form::Secret, DeValue::String(text)) => {
                self.formed(key.path, form::sourced(text, self.sources), value.span()).map(Value::Secret)
            }
            (Form::TextOrList, DeValue::String(text)) => {
                let text = self.text(key.path, text, value.span())?;
                Some(Value::Texts(vec![Lined { line: self.lines.line_at(value.span().start), value: text }]))
            }
            (Form::TextList | Form::TextOrList | Form::PointerList, DeValue::Array(elements)) => {
                self.few(key.path, elements.len(), value)?;
                let texts: Vec<Option<Lined<String>>> = elements.iter().map(|e| self.element(key, e)).collect();
                texts.into_iter().collect::<Option<Vec<_>>>().map(Value::Texts)
            }
            (Form::TextTable, DeValue::Table(table)) => {
                self.few(key.path, table.len(), value)?;
                self.members(key.path, table, |walk, path, text, span| walk.text(path, text, span))
                    .map(Value::TextTable)
            }
            (Form::SecretOrList, DeValue::String(_)) => {
                self.hidden(key.path, value).map(|one| Value::Secrets(vec![one]))
            }
            (Form::SecretList | Form::SecretOrList, DeValue::Array(elements)) => {
                self.few(key.path, elements.len(), value)?;
                let secrets: Vec<Option<Lined<Sourced>>> = elements.iter().map(|e| self.hidden(key.path, e)).collect();
                secrets.into_iter().collect::<Option<Vec<_>>>().map(Value::Secrets)
            }
            (Form::SecretTable, DeValue::Table(table)) => {
                self.few(key.path, table.len(), value)?;
                self.members(key.path, table, |walk, path, text, span| {
                    walk.formed(path, form::sourced(text, walk.sources), span)
                })
                .map(Value::SecretTable)
            }
            (form, _) => {
                self.wrong_type(key.path, &wanted(form), value);
                None
            }
        }
    }

    fn element(&mut self, key: &KeyDoc, element: &Spanned<DeValue<'_>>) -> Option<Lined<String>> {
        let DeValue::String(text) = element.get_ref() else {
            self.wrong_type(key.path, "an array of strings", element);
            return None;
        };
        // RFC 6901: the empty pointer is the whole value.
        let may_be_empty = key.form == Form::PointerList && text.is_empty();
        let value = if may_be_empty { String::new() } else { self.text(key.path, text, element.span())? };
        Some(Lined { line: self.lines.line_at(element.span().start), value })
    }

    fn hidden(&mut self, path: &str, element: &Spanned<DeValue<'_>>) -> Option<Lined<Sourced>> {
        let DeValue::String(text) = element.get_ref() else {
            self.wrong_type(path, &wanted(Form::SecretList), element);
            return None;
        };
        let value = self.formed(path, form::sourced(text, self.sources), element.span())?;
        Some(Lined { line: self.lines.line_at(element.span().start), value })
    }

    /// The members of a free table, in the order of the file.
    fn members<T>(
        &mut self,
        path: &str,
        table: &DeTable<'_>,
        read: impl Fn(&mut Self, &str, &str, Range<usize>) -> Option<T>,
    ) -> Option<Vec<Lined<(String, T)>>> {
        let mut in_order: Vec<_> = table.iter().collect();
        in_order.sort_by_key(|(name, _)| name.span().start);
        let mut members = Vec::with_capacity(in_order.len());
        let mut all = true;
        for (name, value) in in_order {
            let member = format!("{path}.{}", form::quoted(name.get_ref()).trim_matches('"'));
            let DeValue::String(text) = value.get_ref() else {
                self.wrong_type(&member, "a string", value);
                all = false;
                continue;
            };
            match read(self, &member, text, value.span()) {
                Some(read) => members.push(Lined {
                    line: self.lines.line_at(name.span().start),
                    value: (name.get_ref().to_string(), read),
                }),
                None => all = false,
            }
        }
        all.then_some(members)
    }

    fn text(&mut self, path: &str, text: &str, span: Range<usize>) -> Option<String> {
        let read = if text.is_empty() { Err(FormError::Empty) } else { Ok(text.to_owned()) };
        self.formed(path, read, span)
    }

    fn few(&mut self, path: &str, members: usize, value: &Spanned<DeValue<'_>>) -> Option<()> {
        let few = if members > MEMBERS_MAX { Err(FormError::TooMany { limit: MEMBERS_MAX }) } else { Ok(()) };
        self.formed(path, few, value.span())
    }

    fn bounded<T>(&mut self, key: &KeyDoc, within: Option<T>, value: &Spanned<DeValue<'_>>) -> Option<T> {
        let out = || FormError::OutOfBounds { bounds: keys::bounds(key.form) };
        self.formed(key.path, within.ok_or_else(out), value.span())
    }

    fn formed<T>(&mut self, path: &str, read: Result<T, FormError>, span: Range<usize>) -> Option<T> {
        read.map_err(|error| self.error(span, Problem::Form { key: path.to_owned(), error })).ok()
    }

    fn wrong_type(&mut self, path: &str, wanted: &str, value: &Spanned<DeValue<'_>>) {
        let found = value.get_ref().type_str();
        self.error(value.span(), Problem::WrongType { key: path.to_owned(), wanted: wanted.to_owned(), found });
    }

    fn error(&mut self, span: Range<usize>, problem: Problem) {
        self.errors.push(ConfigError { line: self.lines.line_at(span.start), problem });
    }
}

/// An integer of at least 0, whatever its radix.
fn integer(value: &Spanned<DeValue<'_>>) -> Option<u64> {
    let integer = value.get_ref().as_integer()?;
    u64::from_str_radix(integer.as_str(), integer.radix()).ok()
}

/// What to write, for the error about a value of another TOML type.
fn wanted(form: Form) -> String {
    match form {
        Form::Boolean => "true or false".to_owned(),
        Form::Integer { .. } => "an integer".to_owned(),
        Form::Duration { .. } => "a string such as \"250ms\" or \"5s\"".to_owned(),
        Form::Size { .. } => "a string such as \"64KiB\", or an integer of bytes".to_owned(),
        Form::Address => "a string such as \"127.0.0.1:8080\"".to_owned(),
        Form::Secret => "a string: the secret itself, env:NAME, file:PATH, b64:… or hex:…".to_owned(),
        Form::Choice(_) => form.to_string(),
        Form::TextList | Form::PointerList => "an array of strings".to_owned(),
        Form::Moment => "a date-time such as 2027-01-01T00:00:00Z, without quotes".to_owned(),
        Form::SecretList => {
            "an array of strings: each the secret itself, env:NAME, file:PATH, b64:… or hex:…".to_owned()
        }
        Form::SecretTable => "a table of strings".to_owned(),
        Form::SecretOrList => "a string or an array of strings".to_owned(),
        Form::Text | Form::TextOrList | Form::TextTable => format!("a {form}"),
    }
}
