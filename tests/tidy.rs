//! Reads the source as text and holds it to what ARCHITECTURE.md says: who imports whom, where `unsafe` stands, which
//! crate is used where, and that each file says what it is for.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// One file of the program, its tests cut off and its comments blanked.
struct Source {
    path: String,
    /// Its place in the crate: `codec::http::body`; empty for `lib.rs`.
    module: Vec<String>,
    text: String,
    code: String,
}

/// One line of the floor table.
struct Room {
    floor: u32,
    name: String,
    imports: BTreeSet<String>,
    crates: BTreeSet<String>,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// Every `.rs` file under `folder`, in order; what a build left behind is not ours.
fn rust_files(folder: &str) -> Vec<PathBuf> {
    let (mut found, mut folders) = (Vec::new(), vec![root().join(folder)]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                if !path.ends_with("target") {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn relative(path: &Path) -> String {
    path.strip_prefix(root()).expect("it is below the root").to_string_lossy().into_owned()
}

/// The program's files, without those that are tests alone.
fn sources() -> Vec<Source> {
    let mut sources = Vec::new();
    for file in rust_files("src") {
        let path = relative(&file);
        let text = fs::read_to_string(&file).expect("it can be read");
        let place = path.trim_start_matches("src/").trim_end_matches(".rs").trim_end_matches("/mod");
        let module: Vec<String> = if place == "lib" { Vec::new() } else { place.split('/').map(Into::into).collect() };
        if module.last().is_some_and(|name| name == "tests") {
            continue;
        }
        let code = without_comments(without_tests(&text));
        sources.push(Source { path, module, text, code });
    }
    assert!(sources.len() > 50, "the source was found");
    sources
}

/// What stands before the test module, which is a file's end.
fn without_tests(text: &str) -> &str {
    let mut from = 0;
    while let Some(found) = text[from..].find("#[cfg(test)]") {
        let at = from + found;
        let mut after = text[at..].lines().skip(1).skip_while(|line| line.starts_with("#["));
        if after.next().is_some_and(|line| line.contains("mod tests") && line.ends_with('{')) {
            return &text[..at];
        }
        from = at + 1;
    }
    text
}

/// The same lines, comments blanked. A `//` within a string ends the line here too: what is lost is text, not code.
fn without_comments(text: &str) -> String {
    text.lines().map(|line| line.split("//").next().unwrap_or("")).collect::<Vec<_>>().join("\n")
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

/// Places of `word` in `code` where it is a word of its own and not the tail of a path.
fn heads(code: &str, word: &str) -> Vec<usize> {
    let bytes = code.as_bytes();
    code.match_indices(word)
        .map(|(at, _)| at)
        .filter(|&at| at == 0 || !(is_word(bytes[at - 1]) || b":$.".contains(&bytes[at - 1])))
        .collect()
}

/// What the path that starts `text` names, its groups spelled out: `a::{b, c::d}` is `a::b` and `a::c::d`.
fn paths(text: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    walk(text, &mut Vec::new(), &mut found);
    found
}

/// Reads one path and returns what stands behind it.
fn walk<'t>(mut text: &'t str, prefix: &mut Vec<String>, found: &mut Vec<Vec<String>>) -> &'t str {
    let depth = prefix.len();
    loop {
        text = text.trim_start();
        if let Some(mut inner) = text.strip_prefix('{') {
            loop {
                inner = inner.trim_start();
                if inner.is_empty() {
                    break;
                }
                if let Some(rest) = inner.strip_prefix('}') {
                    inner = rest;
                    break;
                }
                let behind = walk(inner, prefix, found);
                // A name after `as`, a comma: read over, always at least one character.
                inner = behind.trim_start();
                while let Some(next) = inner.chars().next()
                    && next != '}'
                    && next != ','
                {
                    inner = &inner[next.len_utf8()..];
                }
                inner = inner.strip_prefix(',').unwrap_or(inner);
            }
            prefix.truncate(depth);
            return inner;
        }
        let end = text.bytes().position(|byte| !is_word(byte)).unwrap_or(text.len());
        let (name, rest) = text.split_at(end);
        if !name.is_empty() {
            prefix.push(name.into());
        }
        match rest.strip_prefix("::") {
            Some(next) if !name.is_empty() => text = next,
            _ => {
                found.push(prefix.iter().filter(|part| *part != "self").cloned().collect());
                prefix.truncate(depth);
                return rest;
            }
        }
    }
}

/// Everything of this crate that a file names, from the crate's root on.
fn named(module: &[String], code: &str) -> BTreeSet<Vec<String>> {
    let mut named = BTreeSet::new();
    for at in heads(code, "crate::") {
        named.extend(paths(&code[at + "crate::".len()..]));
    }
    if module == ["main"] {
        for at in heads(code, "restcast::") {
            named.extend(paths(&code[at + "restcast::".len()..]));
        }
        for at in heads(code, "use restcast::") {
            named.extend(paths(&code[at + "use restcast::".len()..]));
        }
    }
    for at in heads(code, "super::") {
        for mut path in paths(&code[at..]) {
            let up = path.iter().take_while(|part| *part == "super").count();
            assert!(up <= module.len(), "{module:?} goes up past the crate");
            path.splice(..up, module[..module.len() - up].iter().cloned());
            named.insert(path);
        }
    }
    named
}

/// The cells of the table between the markers of this name, without its head.
fn table(document: &str, name: &str) -> Vec<Vec<String>> {
    let open = format!("<!-- table:{name} -->");
    let (_, rest) = document.split_once(&open).unwrap_or_else(|| panic!("no {open}"));
    let (body, _) = rest.split_once("<!-- /table -->").expect("the table ends");
    let rows = body.lines().filter(|line| line.starts_with('|')).skip(2);
    rows.map(|row| row.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect()).collect()
}

fn words(cell: &str) -> BTreeSet<String> {
    let words = cell.split([' ', ',']).map(|word| word.trim_matches('`')).filter(|word| !word.is_empty());
    words.filter(|word| *word != "—").map(Into::into).collect()
}

fn rooms() -> BTreeMap<String, Room> {
    let mut rooms = BTreeMap::new();
    for row in table(&read("ARCHITECTURE.md"), "floors") {
        let [floor, name, _, imports, crates] = row.as_slice() else { panic!("five cells: {row:?}") };
        let floor = floor.split(' ').next().and_then(|number| number.parse().ok()).expect("a floor's number");
        let name = name.trim_matches('`').to_owned();
        let room = Room { floor, name: name.clone(), imports: words(imports), crates: words(crates) };
        assert!(rooms.insert(name, room).is_none(), "one line a room: {row:?}");
    }
    rooms
}

/// The dependencies of the program by Cargo.toml, as code spells them.
fn dependencies() -> BTreeSet<String> {
    let manifest: toml::Table = read("Cargo.toml").parse().expect("it is TOML");
    let table = manifest["dependencies"].as_table().expect("a table");
    table.keys().map(|name| name.replace('-', "_")).collect()
}

/// A way along `edges` that comes back to where it began.
fn circle(edges: &BTreeMap<String, BTreeSet<String>>) -> Option<Vec<String>> {
    fn visit(
        at: &str,
        edges: &BTreeMap<String, BTreeSet<String>>,
        way: &mut Vec<String>,
        done: &mut BTreeSet<String>,
    ) -> Option<Vec<String>> {
        if let Some(place) = way.iter().position(|seen| seen == at) {
            return Some(way[place..].iter().cloned().chain([at.to_owned()]).collect());
        }
        if !done.insert(at.to_owned()) {
            return None;
        }
        way.push(at.to_owned());
        let found = edges.get(at).into_iter().flatten().find_map(|next| visit(next, edges, way, done));
        way.pop();
        found
    }
    let mut done = BTreeSet::new();
    edges.keys().find_map(|at| visit(at, edges, &mut Vec::new(), &mut done))
}

#[test]
fn every_room_of_the_source_has_its_line_in_the_floor_table_and_no_other() {
    let in_source: BTreeSet<String> = sources().iter().filter_map(|file| file.module.first().cloned()).collect();
    let in_table: BTreeSet<String> = rooms().into_keys().collect();
    assert_eq!(in_source, in_table);
}

#[test]
fn a_room_imports_what_its_line_says_and_nothing_above_it() {
    let rooms = rooms();
    for room in rooms.values() {
        for import in &room.imports {
            let floor = rooms.get(import).unwrap_or_else(|| panic!("{} imports {import}, no room", room.name)).floor;
            assert!(floor <= room.floor, "{} may not look up to {import}", room.name);
        }
    }
    let mut wrong = Vec::new();
    for file in sources() {
        let Some(room) = file.module.first() else { continue };
        for path in named(&file.module, &file.code) {
            let Some(other) = path.first().filter(|other| *other != room) else { continue };
            if !rooms[room].imports.contains(other) {
                wrong.push(format!("{}: {} is not for `{room}`", file.path, path.join("::")));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn rooms_do_not_import_each_other_in_a_circle() {
    let edges = rooms().into_values().map(|room| (room.name, room.imports)).collect();
    assert_eq!(circle(&edges), None);
}

#[test]
fn files_do_not_import_each_other_in_a_circle() {
    let files = sources();
    let modules: BTreeSet<String> = files.iter().map(|file| file.module.join("::")).collect();
    let mut edges: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for file in &files {
        let own = file.module.join("::");
        for path in named(&file.module, &file.code) {
            let target = (1..=path.len()).rev().map(|length| path[..length].join("::"));
            let Some(target) = target.into_iter().find(|module| modules.contains(module)) else { continue };
            // A part and its parts are one thing: what a module's own types are is said in the module itself.
            let related =
                own == target || own.starts_with(&format!("{target}::")) || target.starts_with(&format!("{own}::"));
            if !related {
                edges.entry(own.clone()).or_default().insert(target);
            }
        }
    }
    assert!(edges.len() > 30, "imports were found");
    assert_eq!(circle(&edges), None);
}

#[test]
fn crates_are_used_where_the_floor_table_lists_them_and_nowhere_else() {
    let dependencies = dependencies();
    let mut used: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for file in sources() {
        let Some(room) = file.module.first() else { continue };
        let crates = dependencies.iter().filter(|name| !heads(&file.code, &format!("{name}::")).is_empty());
        used.entry(room.clone()).or_default().extend(crates.filter(|name| *name != "thiserror").cloned());
    }
    let listed: BTreeMap<String, BTreeSet<String>> =
        rooms().into_values().map(|room| (room.name, room.crates)).collect();
    let used: BTreeMap<_, _> =
        listed.keys().map(|room| (room.clone(), used.get(room).cloned().unwrap_or_default())).collect();
    assert_eq!(used, listed, "left: what the source uses; right: what ARCHITECTURE.md lists");
}

#[test]
fn each_dependency_has_its_reason() {
    let rows = table(&read("ARCHITECTURE.md"), "dependencies");
    let with_reason: BTreeSet<String> = rows
        .iter()
        .map(|row| {
            assert!(row.len() == 2 && row[1].len() > 10, "a reason: {row:?}");
            row[0].trim_matches('`').replace('-', "_")
        })
        .collect();
    assert_eq!(with_reason, dependencies());
}

#[test]
fn unsafe_stands_in_one_file() {
    for folder in ["src", "tests", "benches", "fuzz/fuzz_targets"] {
        for file in rust_files(folder) {
            let path = relative(&file);
            if path == "src/runtime/sys.rs" || path == "tests/tidy.rs" {
                continue;
            }
            let code = without_comments(&fs::read_to_string(&file).expect("it can be read"));
            let word = heads(&code, "unsafe").into_iter().find(|at| {
                let behind = code[at + "unsafe".len()..].trim_start();
                ["{", "(", "fn", "impl", "trait", "extern"].iter().any(|start| behind.starts_with(start))
            });
            assert_eq!(word, None, "{path} has `unsafe`, which is for src/runtime/sys.rs");
        }
    }
}

#[test]
fn each_file_says_what_it_is_for() {
    for folder in ["src", "tests", "benches"] {
        for file in rust_files(folder) {
            let text = fs::read_to_string(&file).expect("it can be read");
            let first = text.lines().next().unwrap_or("");
            assert!(first.starts_with("//! ") && first.len() > 12, "{} opens with {first:?}", relative(&file));
        }
    }
}

#[test]
fn nothing_is_put_off() {
    let words = ["TODO", "FIXME", "XXX", "todo!", "unimplemented!", "#[ignore"];
    for folder in ["src", "tests", "benches", "fuzz/fuzz_targets"] {
        for file in rust_files(folder).into_iter().filter(|file| !file.ends_with("tests/tidy.rs")) {
            let text = fs::read_to_string(&file).expect("it can be read");
            for word in words {
                let line = text.lines().position(|line| line.contains(word)).map(|line| line + 1);
                assert_eq!(line, None, "{word} in {}", relative(&file));
            }
        }
    }
}

#[test]
fn what_has_no_line_of_its_own_is_no_part_of_the_core() {
    // `cargo test --no-default-features` builds what is not gated; this says which rooms may be.
    let lib = sources().into_iter().find(|file| file.module.is_empty()).expect("lib.rs").text;
    let gated: Vec<&str> = lib
        .lines()
        .zip(lib.lines().skip(1))
        .filter(|(gate, _)| gate.contains("feature = \"runtime\""))
        .filter_map(|(_, module)| module.strip_prefix("pub mod ")?.strip_suffix(';'))
        .collect();
    assert_eq!(gated, ["commands", "runtime"]);
}

#[test]
fn each_fuzz_target_has_a_corpus() {
    let manifest: toml::Table = read("fuzz/Cargo.toml").parse().expect("it is TOML");
    let targets = manifest["bin"].as_array().expect("targets");
    assert!(targets.len() >= 10);
    for target in targets {
        let name = target["name"].as_str().expect("a name");
        let corpus = root().join("fuzz/corpus").join(name);
        let files = fs::read_dir(&corpus).map_or(0, Iterator::count);
        assert!(files > 0, "{} has no seeds", corpus.display());
        assert!(read("fuzz/README.md").contains(&format!("`{name}`")), "fuzz/README.md says nothing of {name}");
    }
}

#[test]
fn the_reading_itself_sees_what_it_looks_for() {
    let spelled = |text| paths(text).into_iter().map(|path| path.join("::")).collect::<Vec<_>>();
    assert_eq!(spelled("codec::http::Head;"), ["codec::http::Head"]);
    assert_eq!(
        spelled("{auth, codec::{self, ws::{A, B as C}}, time};"),
        ["auth", "codec", "codec::ws::A", "codec::ws::B", "time"]
    );
    let module = ["shard".to_owned(), "open".to_owned()];
    let code = without_comments(without_tests(
        "use super::{Mail, topics::Topic}; // crate::no\nlet x = super::super::frame::f(crate::limits::N);\n\
         #[cfg(test)]\nmod tests {\n    use crate::runtime;\n}\n",
    ));
    let named: Vec<_> = named(&module, &code).into_iter().map(|path| path.join("::")).collect();
    assert_eq!(named, ["frame::f", "limits::N", "shard::Mail", "shard::topics::Topic"]);
    assert_eq!(heads("ring::x my::ring::y string::z", "ring::"), [0]);
    let edge = |from: &str, to: &[&str]| (from.to_owned(), to.iter().map(|to| (*to).to_owned()).collect());
    assert_eq!(circle(&[edge("a", &["b"]), edge("b", &["c"])].into()), None);
    let found = circle(&[edge("a", &["b"]), edge("b", &["c"]), edge("c", &["b"])].into());
    assert_eq!(found, Some(["b", "c", "b"].map(Into::into).to_vec()));
    let rows = table("<!-- table:x -->\n| a | b |\n|---|---|\n| `1` | — |\n<!-- /table -->", "x");
    assert_eq!(rows, [["`1`", "—"]]);
    assert_eq!((words("`a` b, c"), words("—").len()), (["a", "b", "c"].map(Into::into).into(), 0));
}
