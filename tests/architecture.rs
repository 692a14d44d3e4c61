//! The floors of the house and its naming laws, held by reading the source.

use std::collections::BTreeSet;
use std::path::Path;

use sidereal::backend::testing::OPERATIONS;

#[path = "common/source.rs"]
mod source;

use source::{Library, SourceFile, files, module_of, root, sources};

const MAX_FILE_LINES: usize = 600;
const MAX_FUNCTION_LINES: usize = 80;

/// The code of a file without its unit tests and comments.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]").next().unwrap_or_default();
    let lines = text.lines().map(|line| line.split("//").next().unwrap_or_default());
    lines.collect::<Vec<_>>().join("\n")
}

/// The floor of a module such as `catalog::sid`: a module may use lower floors and its own.
fn floor(module: &[String]) -> u8 {
    let name = |at: usize| module.get(at).map_or("", String::as_str);
    match (name(0), name(1)) {
        (
            "error" | "features" | "request" | "search" | "tensor" | "mapping" | "lines" | "json",
            _,
        )
        | ("catalog", "sid") => 0,
        ("catalog" | "cost" | "pages" | "schedule" | "prefix_cache", _) => 1,
        ("answer" | "backend" | "device" | "metrics" | "wire", _) => 2,
        ("checkpoint", _) => 2,
        ("models" | "prompt" | "vectors", _) => 3,
        ("engine" | "quantizer" | "writer", _) => 4,
        ("" | "answering" | "recommender" | "recommender_options" | "retriever" | "service", _) => {
            5
        } // the root is lib.rs
        ("server", _) => 6,
        (other, _) => panic!("module {other:?} has no floor yet: give it one here"),
    }
}

#[test]
fn a_module_uses_lower_floors_only() {
    let library = Library::read();
    let mut checked = 0;
    for (file, imports) in library.files.iter().zip(library.imports()) {
        for (other, path) in imports {
            checked += 1;
            let (own, used) = (floor(&file.module), floor(&library.files[other].module));
            let file = &file.path;
            assert!(used <= own, "{file} is on floor {own} and uses {path} of floor {used}");
        }
    }
    assert!(checked > 200, "only {checked} imports were found");
}

#[test]
fn the_backend_imports_nothing_of_requests() {
    let library = Library::read();
    let mut checked = 0;
    for (file, imports) in library.files.iter().zip(library.imports()) {
        if !file.path.starts_with("src/backend/") {
            continue;
        }
        for (other, path) in imports {
            checked += 1;
            let module = library.files[other].module.first().map_or("", String::as_str);
            assert!(!["request", "answer"].contains(&module), "{} imports {path}", file.path);
        }
    }
    assert!(checked > 50, "only {checked} imports were found");
}

#[test]
fn files_do_not_import_each_other_in_circles() {
    let mut all = BTreeSet::new();
    let mut why = String::new();
    for library in [Library::read(), Library::read_cli()] {
        let circles = library.circles();
        for (file, imports) in library.files.iter().zip(library.imports()) {
            for (other, name) in imports {
                let (file, other) = (&file.path, &library.files[other].path);
                if circles.iter().any(|circle| circle.contains(file) && circle.contains(other)) {
                    why += &format!("  {file} uses {name} of {other}\n");
                }
            }
        }
        all.extend(circles);
    }
    assert!(all.is_empty(), "files import each other in circles, {all:#?}:\n{why}");
}

#[test]
fn imports_are_seen_however_they_are_written() {
    let imports = |module: &str, code: &str| -> BTreeSet<String> {
        let parent = "pub mod a; pub mod b; pub use b::Passed; pub struct Own;";
        let library = Library::of(vec![
            SourceFile::read("src/lib.rs", "mod p; mod other;"),
            SourceFile::read("src/other.rs", "pub struct Other;"),
            SourceFile::read("src/p/mod.rs", parent),
            SourceFile::read("src/p/a.rs", "pub mod inner { pub struct Inner; }"),
            SourceFile::read("src/p/b.rs", "pub struct Passed; pub fn f() {}"),
            SourceFile::read(module, code),
        ]);
        let imports = library.imports().pop().expect("the last file");
        imports.into_keys().map(|file| library.files[file].path.clone()).collect()
    };
    let (lib, other, p, a, b) =
        ("src/lib.rs", "src/other.rs", "src/p/mod.rs", "src/p/a.rs", "src/p/b.rs");
    let cases: [(&str, &[&str]); 18] = [
        ("use crate::other::Other;", &[other]),
        ("use super::super::other::Other;", &[other]),
        ("use super::{a::inner::Inner, b};", &[a, b]),
        ("use super::{a::{self, inner}, Own};", &[a, p]),
        ("use super::Passed;", &[b]),
        ("use super::b as renamed; fn g() { renamed::f() }", &[b]),
        ("use super::*;", &[p]),
        ("fn g() { super::b::f() }", &[b]),
        ("fn g() { println!(\"{:?}\", (1, super::b::f())) }", &[b]),
        ("fn g() -> Option<crate::p::Own> { None }", &[p]),
        ("mod inner { use super::super::b; }", &[b]),
        ("mod inner { use super::Local; } struct Local;", &[]),
        ("use self::inner::Local; mod inner { pub struct Local; }", &[]),
        ("use std::b::Passed; use serde::other;", &[]),
        ("// use super::b;\n/* use super::a; */ const TEXT: &str = \"use super::b;\";", &[]),
        ("/// [`b`](super::b)\nstruct Documented;", &[]),
        ("#[cfg(test)] mod tests { use crate::other::Other; }", &[]),
        ("use crate::missing::Thing; pub use crate::p;", &[lib, p]),
    ];
    for (code, expected) in cases {
        let expected = expected.iter().map(|file| file.to_string()).collect();
        assert_eq!(imports("src/p/c.rs", code), expected, "{code}");
    }
    // A parent that only declares and passes on is in no circle with its children.
    assert_eq!(imports("src/q/mod.rs", "pub mod r; pub use crate::p::a;"), [a.into()].into());
}

#[test]
fn circles_of_files_are_found() {
    let library = Library::of(vec![
        SourceFile::read("src/lib.rs", "mod a; mod b; mod c; mod d;"),
        SourceFile::read("src/a.rs", "use crate::b::B; use crate::d;"),
        SourceFile::read("src/b.rs", "use crate::c; pub struct B;"),
        SourceFile::read("src/c.rs", "fn f() { crate::a::f() }"),
        SourceFile::read("src/d.rs", "use std::fs;"),
    ]);
    let circle = ["src/a.rs", "src/b.rs", "src/c.rs"].map(str::to_string).into();
    assert_eq!(library.circles(), [circle].into());
}

#[test]
fn a_file_and_a_function_fit_their_screens() {
    let mut long = BTreeSet::new();
    let mut checked = 0;
    for (path, text) in sources("src") {
        let lines: Vec<&str> = text.lines().collect();
        let num_lines = lines.len();
        assert!(num_lines <= MAX_FILE_LINES, "{path} has {num_lines} lines: split it");
        for function in SourceFile::read(&path, &text).functions {
            checked += 1;
            // A comment `// long: reason` above the function or in its first lines excuses it.
            let end = lines.len().min(function.first_line + 2);
            let beside = function.first_line.saturating_sub(4).min(end)..end;
            let reason = lines[beside].iter().find_map(|line| line.split_once("// long: "));
            let is_excused = reason.is_some_and(|(_, reason)| !reason.trim().is_empty());
            if function.num_lines > MAX_FUNCTION_LINES && !is_excused {
                long.insert(format!("{path}: {}", function.name));
            }
        }
    }
    assert!(checked > 500, "only {checked} functions were found");
    assert!(long.is_empty(), "over {MAX_FUNCTION_LINES} lines, name parts of them: {long:#?}");
}

/// Words that have a better one, which is the only one in use.
const BANNED: &[(&str, &str)] = &[
    ("HistoryCache", "PrefixCache"),
    ("history cache", "prefix cache"),
    ("find_prefix", "match_prefix"),
    ("keep_prefix", "insert"),
    ("drop_oldest", "evict"),
    ("Legality", "AllowedSet"),
    ("restricted_head", "lm_head"),
    ("rotary", "rope"),
    ("last_rows", "gather_last"),
    ("compiled anew", "compacted"),
    ("compile anew", "compact"),
    ("compiles anew", "compacts"),
    ("open_compiled", "open_without_log"),
    ("withdrawn", "unavailable"),
];

/// Where `words` stands in a text as whole words, by line.
fn lines_with<'a>(text: &'a str, words: &'a str) -> impl Iterator<Item = usize> + 'a {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let starts = text.match_indices(words).filter(move |&(at, _)| {
        let (before, after) = (&text[..at], &text[at + words.len()..]);
        !before.ends_with(is_word) && !after.starts_with(is_word)
    });
    starts.map(|(at, _)| 1 + text[..at].matches('\n').count())
}

#[test]
fn a_thing_has_one_word_everywhere() {
    let mut texts = sources("src");
    texts.extend(files("kernels", &["cu", "cuh", "md", "py"]));
    if root().join("docs").exists() {
        texts.extend(files("docs", &["md"]));
    }
    for page in ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"] {
        texts.extend(std::fs::read_to_string(root().join(page)).map(|text| (page.into(), text)));
    }
    let mut found = Vec::new();
    for (path, text) in texts {
        for (banned, word) in BANNED {
            let lines = lines_with(&text, banned);
            found.extend(lines.map(|line| format!("{path}:{line}: {banned}, say {word}")));
        }
    }
    assert!(found.is_empty(), "{found:#?}");
    let lines: Vec<usize> = lines_with("a\nrotary rotary_factor\n(rotary)", "rotary").collect();
    assert_eq!(lines, [2, 3]);
}

#[test]
fn the_command_line_uses_the_public_interface_alone() {
    for (file, text) in sources("src/cli") {
        for way in ["#[path", "include!("] {
            assert!(!code(&text).contains(way), "{file} reaches into the library by {way}");
        }
    }
}

/// The traits of one operation each, in the order of their groups: trait and method.
fn backend_operations() -> Vec<(String, String)> {
    let mut found = Vec::new();
    for group in ["network", "search"] {
        let file = root().join(format!("src/backend/{group}.rs"));
        let text = std::fs::read_to_string(file).expect("the group's traits");
        for part in code(&text).split("pub trait ").skip(1) {
            let name = part.split(':').next().unwrap_or_default();
            let body = part.split_once("\n}").map_or(part, |(body, _)| body);
            let methods: Vec<&str> =
                body.lines().filter_map(|line| line.trim().strip_prefix("fn ")).collect();
            if let [method] = methods[..] {
                let method = method.split(['(', '<']).next().unwrap_or_default();
                found.push((name.to_string(), method.to_string()));
            }
        }
    }
    found
}

/// Operations that compute nothing: no kernel or no case could tell.
const WITHOUT_CASES: [&str; 2] = ["step", "read_beams"];

#[test]
fn an_operation_has_one_name_everywhere() {
    let operations = backend_operations();
    let names = operations.iter().map(|(_, operation)| operation.as_str());
    let with_cases: Vec<&str> = names.filter(|name| !WITHOUT_CASES.contains(name)).collect();
    assert_eq!(with_cases, OPERATIONS, "src/backend/testing.rs names the operations");
    let tests =
        std::fs::read_to_string(root().join("tests/common/operations.rs")).expect("the tests");
    for (name, operation) in operations {
        for backend in ["cpu", "cuda"] {
            let file = format!("src/backend/{backend}/{operation}.rs");
            let text = std::fs::read_to_string(root().join(&file));
            let text = text.unwrap_or_else(|_| panic!("{operation} has no {file}"));
            let is_implemented = text.contains(&format!("{name} for C"))
                && text.contains(&format!("fn {operation}("));
            assert!(is_implemented, "{file} does not implement {operation}");
        }
        if WITHOUT_CASES.contains(&operation.as_str()) {
            continue;
        }
        let file = format!("kernels/{operation}.cu");
        let text = std::fs::read_to_string(root().join(&file));
        let text = text.unwrap_or_else(|_| panic!("{operation} has no {file}"));
        assert!(text.contains(&format!("KERNEL({operation}_")), "{file} has no such kernel");
        let calls = [format!("backend.{operation}("), format!("pub fn {operation}_is_")];
        let is_tested = calls.iter().any(|call| tests.contains(call));
        assert!(is_tested, "tests/common/operations.rs does not test {operation}");
    }
}

#[test]
fn a_family_has_one_name_everywhere() {
    let shared = [
        "models",
        "config",
        "dlrm_rows",
        "family",
        "feature_table",
        "folder",
        "grid",
        "layout",
        "levels",
        "mlp",
        "network",
        "relative_bias",
        "rope",
        "sasrec_meta",
        "score_network",
        "stu",
        "transformer_block",
        "vector_network",
        "vocabulary",
        "weights",
        "whole_words",
    ];
    let golden = std::fs::read_to_string(root().join("tests/golden.rs")).expect("the tests");
    for (file, _) in sources("src/models") {
        let family = module_of(&file).get(1).cloned().unwrap_or("models".into());
        if shared.contains(&family.as_str()) {
            continue;
        }
        let folder = root().join("models").join(&family);
        let cases = std::fs::read_dir(&folder).expect("a folder of checkpoints").flatten();
        let cases = cases.filter(|case| case.path().join("golden.json").exists()).count();
        assert!(cases > 0, "models/{family} holds no golden answers");
        assert!(golden.contains(&format!("fn {family}_")), "tests/golden.rs has no {family}_ test");
    }
}

#[test]
fn unsafe_code_lives_where_memory_is_mapped_and_where_hardware_is_called() {
    let mut homes = BTreeSet::new();
    for (file, text) in sources("src") {
        if code(&text).contains("unsafe") {
            homes.insert(file);
        }
    }
    let homes: Vec<String> = homes.into_iter().collect();
    let expected = [
        "src/backend/cpu/matmul/amx.rs",
        "src/backend/cpu/matmul/avx2_int8.rs",
        "src/backend/cpu/matmul/avx512_bf16.rs",
        "src/backend/cpu/matmul/avx512_vnni.rs",
        "src/backend/cuda/blas.rs",
        "src/backend/cuda/nvidia.rs",
        "src/backend/cuda/pinned.rs",
        "src/mapping.rs",
    ];
    assert_eq!(homes, expected);
}

#[test]
fn each_floor_does_without_what_is_not_its_own() {
    const BOOKKEEPING: &[&str] = &["rayon", "std::thread", "Instant", "SystemTime", "backend"];
    let absent: [(&str, &[&str]); 9] = [
        // No device, no thread, no clock.
        ("src/catalog", BOOKKEEPING),
        ("src/pages.rs", BOOKKEEPING),
        ("src/schedule.rs", BOOKKEEPING),
        ("src/cost.rs", BOOKKEEPING),
        ("src/prefix_cache.rs", BOOKKEEPING),
        ("src/engine/scheduler.rs", BOOKKEEPING),
        // The backend does not know what a request is.
        ("src/backend", &["Request", "Answer", "Engine"]),
        // A network is written once for all devices.
        ("src/models", &["cfg(", "cpu::", "rayon", "Catalog::open"]),
        ("src/engine", &["std::fs", "println", "clap"]),
    ];
    for (place, words) in absent {
        let files = match Path::new(place).extension() {
            Some(_) => vec![(
                place.to_string(),
                std::fs::read_to_string(root().join(place)).expect("a file of the repository"),
            )],
            None => sources(place),
        };
        for (file, text) in files {
            let code = code(&text);
            for word in words {
                assert!(!code.contains(word), "{file} knows {word:?}");
            }
        }
    }
}
