//! The floors of the house and its naming laws, held by reading the source.

mod common;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use sidereal::backend::cases::OPERATIONS;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Every Rust file below a folder, by its path from the root of the repository.
fn sources(folder: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder of the repository") {
            let path = entry.expect("a readable folder").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(&path).expect("a readable file");
                let name = path.strip_prefix(root()).expect("below the root");
                found.push((name.to_string_lossy().replace('\\', "/"), text));
            }
        }
    }
    assert!(!found.is_empty(), "{folder} holds no Rust files");
    found
}

/// The code of a file without its unit tests and comments.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]").next().unwrap_or_default();
    let lines = text.lines().map(|line| line.split("//").next().unwrap_or_default());
    lines.collect::<Vec<_>>().join("\n")
}

/// The floor of a module path such as `catalog::sid`: a higher one may use lower ones only.
fn floor(module: &str) -> u8 {
    let mut parts = module.split("::");
    match (parts.next().unwrap_or_default(), parts.next().unwrap_or_default()) {
        ("error" | "request" | "search" | "tensor" | "mapping", _) | ("catalog", "sid") => 0,
        ("catalog" | "pages" | "schedule" | "prefix_cache", _) => 1,
        ("answer" | "backend" | "device" | "wire", _) => 2,
        ("models", _) => 3,
        ("engine" | "quantizer" | "writer", _) => 4,
        ("lib" | "main" | "cli" | "recommender" | "service", _) => 5,
        (other, _) => panic!("module {other:?} has no floor yet: give it one here"),
    }
}

fn module_of(file: &str) -> String {
    let path = file.trim_start_matches("src/").trim_end_matches(".rs").trim_end_matches("/mod");
    path.replace('/', "::")
}

/// The module paths that a file names behind `crate::`, braces opened.
fn uses(code: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let path = &code[at + "crate::".len()..];
        let end = path.find(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':'));
        let path = path[..end.unwrap_or(path.len())].trim_end_matches("::");
        found.push(path.to_string());
    }
    found
}

#[test]
fn a_module_uses_lower_floors_only() {
    let mut checked = 0;
    for (file, text) in sources("src") {
        let module = module_of(&file);
        if floor(&module) == 5 {
            continue; // doors may use everything
        }
        for used in uses(&code(&text)) {
            checked += 1;
            assert!(
                floor(&used) <= floor(&module),
                "{file} is on floor {} and uses {used}, which is on floor {}",
                floor(&module),
                floor(&used)
            );
        }
    }
    assert!(checked > 50, "only {checked} uses were found");
}

#[test]
fn the_command_line_uses_the_public_interface_alone() {
    for (file, text) in sources("src/cli") {
        assert!(!text.contains("#[path"), "{file} reaches into the library");
        for used in uses(&code(&text)) {
            assert!(used.starts_with("cli"), "{file} uses {used}");
        }
    }
}

/// The methods of the trait `Backend` after its part on opening.
fn backend_operations() -> Vec<String> {
    let text = std::fs::read_to_string(root().join("src/backend/mod.rs")).expect("the trait");
    let (_, operations) = text.split_once("// Networks.").expect("the part on networks");
    let names = operations.lines().filter_map(|line| line.trim().strip_prefix("fn "));
    let name = |line: &str| line.split('(').next().unwrap_or_default().to_string();
    names.map(name).filter(|name| name != "read_beams").collect()
}

#[test]
fn an_operation_has_one_name_everywhere() {
    let operations = backend_operations();
    assert_eq!(operations, OPERATIONS, "src/backend/cases.rs names the trait's operations");
    let tests =
        std::fs::read_to_string(root().join("tests/common/operations.rs")).expect("the tests");
    for operation in operations {
        for backend in ["cpu", "cuda"] {
            let file = format!("src/backend/{backend}/{operation}.rs");
            let text = std::fs::read_to_string(root().join(&file));
            let text = text.unwrap_or_else(|_| panic!("{operation} has no {file}"));
            let defines = text.contains(&format!("fn {operation}"));
            assert!(defines, "{file} does not define {operation}");
        }
        let file = format!("kernels/{operation}.cu");
        let text = std::fs::read_to_string(root().join(&file));
        let text = text.unwrap_or_else(|_| panic!("{operation} has no {file}"));
        assert!(text.contains(&format!("KERNEL({operation}_")), "{file} has no such kernel");
        let calls = format!("backend.{operation}(");
        assert!(tests.contains(&calls), "tests/common/operations.rs does not test {operation}");
    }
}

#[test]
fn a_family_has_one_name_everywhere() {
    let shared = ["mod", "config", "weights"];
    let golden = std::fs::read_to_string(root().join("tests/golden.rs")).expect("the tests");
    for (file, _) in sources("src/models") {
        let family = module_of(&file).replace("models::", "").replace("models", "mod");
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
fn unsafe_code_lives_where_memory_is_mapped_and_where_the_driver_is_called() {
    let mut homes = BTreeSet::new();
    for (file, text) in sources("src") {
        if code(&text).contains("unsafe") {
            homes.insert(file);
        }
    }
    let homes: Vec<String> = homes.into_iter().collect();
    let driver = ["src/backend/cuda/blas.rs", "src/backend/cuda/device.rs"];
    assert_eq!(homes, [&driver[..], &["src/mapping.rs"]].concat());
}

#[test]
fn each_floor_does_without_what_is_not_its_own() {
    const BOOKKEEPING: &[&str] = &["rayon", "std::thread", "Instant", "SystemTime", "backend"];
    let absent: [(&str, &[&str]); 8] = [
        // No device, no thread, no clock.
        ("src/catalog", BOOKKEEPING),
        ("src/pages.rs", BOOKKEEPING),
        ("src/schedule.rs", BOOKKEEPING),
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
