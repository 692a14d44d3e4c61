//! The kept seeds of the fuzzers, and each of them damaged in many ways, go through what is fuzzed:
//! see `tests/fuzz`.

use std::path::Path;

use sidereal::quantizer::Quantizer;

#[path = "common/folders.rs"]
mod folders;
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

/// A small model whose layout names tokens by their texts, and whose weights have an index.
fn model() -> folders::Folder {
    let small = folders::Folder::small();
    small.edit("sidereal.json", |layout| {
        for (level, letter) in ["a", "b", "c"].iter().enumerate() {
            let template = format!("<{letter}_{{}}>");
            layout["levels"][level] = serde_json::json!({"size": 6, "template": template});
        }
        layout["prompt"] = serde_json::json!({"prefix": [1], "suffix": [0], "max_items": 20});
    });
    let token = |token: u32| {
        let (level, code) = (token / 6, token % 6);
        (format!("<{}_{code}>", ["a", "b", "c"][level as usize]), serde_json::json!(token + 2))
    };
    let tokens: serde_json::Map<String, serde_json::Value> = (0..17).map(token).collect();
    let added = serde_json::json!([{"id": 19, "content": "<c_5>"}]);
    let tokenizer = serde_json::json!({"added_tokens": added, "model": {"vocab": tokens}});
    small.write("tokenizer.json", tokenizer.to_string());
    let map = serde_json::json!({"weight_map": {"any": "model.safetensors"}});
    small.write("model.safetensors.index.json", map.to_string());
    small
}

#[test]
fn damaged_files_of_a_model_folder() {
    let model = model();
    let mut engine = model.open().expect("a sound folder");
    let request = sidereal::Request::from_history(["i0"]);
    engine.recommend(&request).expect("a sound request");
    let mut rng = fastrand::Rng::with_seed(1);
    let (mut opened, mut refused) = (0, 0);
    for name in [
        "config.json",
        "sidereal.json",
        "tokenizer.json",
        "model.safetensors.index.json",
        "model.safetensors",
    ] {
        let sound = model.read(name);
        for _ in 0..200 {
            // Of the weights, the header alone has a form.
            let head = sound.len().min(3000);
            let damaged = [&damaged(&sound[..head], &mut rng)[..], &sound[head..]].concat();
            model.write(name, damaged);
            match model.open() {
                Ok(mut engine) => {
                    opened += 1;
                    let _ = engine.recommend(&request);
                }
                Err(_) => refused += 1,
            }
        }
        model.write(name, sound);
    }
    assert!(opened > 10 && refused > 10, "{opened} opened, {refused} refused");
}

#[test]
fn damaged_codebooks() {
    let embeddings: Vec<f32> = (0..60).map(|number| (number as f32).sin()).collect();
    let mut options = sidereal::quantizer::FitOptions::default();
    (options.levels, options.codes) = (2, 3);
    let fitted = Quantizer::fit(&embeddings, 4, &options, |_| ()).expect("a fit");
    let sound = fitted.to_bytes().expect("codebooks alone");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("codebooks.safetensors");
    let mut rng = fastrand::Rng::with_seed(1);
    for _ in 0..2000 {
        std::fs::write(&path, damaged(&sound, &mut rng)).expect("a writable folder");
        if let Ok(quantizer) = Quantizer::open(&path) {
            let embedding = vec![0.5; quantizer.dim()];
            let _ = quantizer.codes(&embedding);
        }
    }
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
