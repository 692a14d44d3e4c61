//! The kept seeds of the fuzzers go through what is fuzzed: see `tests/fuzz`.

use std::path::Path;

#[path = "common/fuzzed.rs"]
mod fuzzed;

fn each_seed(target: &str, fuzz: impl Fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/seeds").join(target);
    let mut count = 0;
    for seed in std::fs::read_dir(folder).expect("seeds of the repository") {
        let seed = std::fs::read(seed.expect("a readable folder").path()).expect("a seed");
        fuzz(&seed);
        count += 1;
    }
    assert!(count >= 3, "only {count} seeds of {target}");
}

#[test]
fn seeds_of_filters() {
    each_seed("filter", fuzzed::filter);
}

#[test]
fn seeds_of_logs_of_changes() {
    each_seed("changes", fuzzed::changes);
}

#[test]
fn seeds_of_items_and_changes_as_lines() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    each_seed("items", |data| fuzzed::items(data, folder.path()));
}

#[test]
fn seeds_of_compiled_catalogs() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    each_seed("catalog", |data| fuzzed::catalog(data, folder.path()));
}
