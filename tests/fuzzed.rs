//! The kept seeds of the fuzzers, and each of them damaged in many ways, go through what is fuzzed:
//! see `tests/fuzz`.

use std::path::Path;

#[path = "common/fuzzed.rs"]
mod fuzzed;

const DAMAGED_PER_SEED: usize = 500;

/// A few bytes changed, lost, put in, or a number made large.
fn damaged(seed: &[u8], rng: &mut fastrand::Rng) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..rng.usize(1..6) {
        if bytes.is_empty() {
            break;
        }
        let at = rng.usize(0..bytes.len());
        match rng.u8(0..6) {
            0 => bytes[at] = rng.u8(..),
            1 => bytes[at] ^= 1 << rng.u8(0..8),
            2 => drop(bytes.remove(at)),
            3 => bytes.insert(at, rng.u8(..)),
            4 => bytes.truncate(at),
            _ => {
                let number = [0, 1, 1 << 31, u32::MAX, rng.u32(..)][rng.usize(0..5)];
                if let Some(field) = bytes.get_mut(at..at + 4) {
                    field.copy_from_slice(&number.to_le_bytes());
                }
            }
        }
    }
    bytes
}

fn each_seed(target: &str, fuzz: impl Fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/seeds").join(target);
    let mut count = 0;
    for seed in std::fs::read_dir(folder).expect("seeds of the repository") {
        let seed = std::fs::read(seed.expect("a readable folder").path()).expect("a seed");
        fuzz(&seed);
        let mut rng = fastrand::Rng::with_seed(count);
        for _ in 0..DAMAGED_PER_SEED {
            fuzz(&damaged(&seed, &mut rng));
        }
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

#[test]
fn seeds_of_files_of_torch() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    each_seed("torch", |data| fuzzed::torch(data, folder.path()));
}

#[test]
fn seeds_of_configurations() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    each_seed("config", |data| fuzzed::config(data, folder.path()));
}

#[test]
fn seeds_of_adapters() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    each_seed("adapter", |data| fuzzed::adapter(data, folder.path()));
}

#[test]
fn the_small_network_of_the_fuzzers_opens() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    fuzzed::config(fuzzed::SMALL_CONFIG.as_bytes(), folder.path());
    let items = "{\"item\": \"only\", \"sid\": [3]}";
    let path = folder.path().join("items.jsonl");
    std::fs::write(&path, items).expect("a writable folder");
    let catalog = sidereal::catalog::Catalog::open(&path).expect("one item");
    let engine = sidereal::Engine::open(folder.path(), catalog.into(), &Default::default());
    assert!(engine.is_ok(), "{:?}", engine.err());
}
