//! Bad input gets a typed error that names the way out: never a panic, never a wrong answer.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use sidereal::catalog::Catalog;
use sidereal::{Engine, EngineOptions, Error, MAX_BEAMS, Request, RequestDefaults, RequestLine};
use tempfile::TempDir;

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models")
}

fn write(folder: &TempDir, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).expect("a writable folder");
    path
}

fn temp() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

fn error<T>(outcome: Result<T, Error>, what: &str) -> Error {
    match outcome {
        Ok(_) => panic!("{what} was accepted"),
        Err(error) => error,
    }
}

/// Asserts the variant, and that the text holds every word.
macro_rules! assert_error {
    ($outcome:expr, $variant:pat, $($word:expr),+) => {{
        let error = error($outcome, stringify!($outcome));
        assert!(matches!(error, $variant), "{error:?}");
        let text = error.to_string();
        $(assert!(text.contains($word), "{text:?} does not say {:?}", $word);)+
        assert!(!error.code().is_empty());
    }};
}

// Catalog files.

fn small_catalog() -> Vec<u8> {
    let folder = temp();
    let items = (0..40).map(|item| {
        json!({"item": format!("i{item}"), "sid": [item % 3, item % 7, item / 5],
               "title": format!("Tïtle {item}")})
        .to_string()
    });
    let items = items.collect::<Vec<_>>().join("\n");
    let items = write(&folder, "items.jsonl", items);
    let path = folder.path().join("c.sidereal");
    Catalog::open(&items).expect("sound items").save(&path).expect("a writable folder");
    std::fs::read(path).expect("the file just written")
}

#[test]
fn a_catalog_cut_at_any_length_is_an_error() {
    let (folder, bytes) = (temp(), small_catalog());
    for len in 0..bytes.len() {
        let path = write(&folder, "c.sidereal", &bytes[..len]);
        assert_error!(Catalog::open(&path), Error::CatalogFile { .. }, "catalog build");
    }
}

#[test]
fn a_flipped_bit_anywhere_in_a_catalog_is_an_error() {
    let (folder, bytes) = (temp(), small_catalog());
    let mut rng = fastrand::Rng::with_seed(1);
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1 << rng.u8(0..8);
        let path = write(&folder, "c.sidereal", &damaged);
        let outcome = Catalog::open(&path);
        assert!(matches!(outcome, Err(Error::CatalogFile { .. })), "byte {at}");
    }
}

#[test]
fn a_catalog_with_forged_checksums_never_panics() {
    // Whoever can compute the checksums can write anything behind them: every array is damaged at
    // random and signed again, and whatever opens must answer its questions.
    let (folder, bytes) = (temp(), small_catalog());
    let mut rng = fastrand::Rng::with_seed(2);
    let (mut refused, mut opened) = (0, 0);
    for _ in 0..4000 {
        let mut forged = bytes.clone();
        for _ in 0..rng.usize(1..4) {
            let at = rng.usize(8..forged.len());
            forged[at] = if rng.bool() { rng.u8(..) } else { forged[at] ^ 1 };
        }
        sign(&mut forged);
        let path = write(&folder, "c.sidereal", &forged);
        match Catalog::open(&path) {
            Err(_) => refused += 1,
            Ok(catalog) => {
                opened += 1;
                let trie = catalog.trie();
                for item in 0..catalog.num_items() as u32 {
                    let leaf = trie.leaf(catalog.sid(item).codes()).expect("its own leaf");
                    assert!(catalog.items(leaf).contains(&item));
                    assert_eq!(catalog.find(catalog.name(item)), Some(item));
                    let _ = catalog.title(item);
                }
                assert!(catalog.legality(&[0]).count(trie.leaves(0, 0)) > 0);
            }
        }
    }
    assert!(refused > 1000 && opened > 100, "{refused} refused, {opened} opened");
}

/// Puts right the checksums of sections and head, as far as the head still makes sense.
fn sign(bytes: &mut [u8]) {
    let number = |bytes: &[u8], at: usize| -> usize {
        let field = bytes.get(at..at + 8).expect("inside the head");
        u64::from_le_bytes(field.try_into().expect("eight bytes")) as usize
    };
    const HEADER: usize = 80;
    let sections = u32::from_le_bytes(bytes[72..76].try_into().expect("four bytes")) as usize;
    let head = (HEADER + sections.min(64) * 32 + 8).next_multiple_of(64);
    if head > bytes.len() {
        return;
    }
    for section in 0..sections.min(64) {
        let at = HEADER + section * 32;
        let (offset, len) = (number(bytes, at + 8), number(bytes, at + 16));
        let end = len.checked_next_multiple_of(64).and_then(|len| offset.checked_add(len));
        if let Some(content) = end.and_then(|end| bytes.get(offset..end)) {
            let checksum = xxhash_rust::xxh3::xxh3_64(content);
            bytes[at + 24..at + 32].copy_from_slice(&checksum.to_le_bytes());
        }
    }
    let checksum = xxhash_rust::xxh3::xxh3_64(&bytes[..head - 8]);
    bytes[head - 8..head].copy_from_slice(&checksum.to_le_bytes());
}

#[test]
fn what_is_no_catalog_is_an_error() {
    let folder = temp();
    let foreign = write(&folder, "f.sidereal", b"PK\x03\x04 something else entirely");
    assert_error!(Catalog::open(&foreign), Error::CatalogFile { .. }, "not a compiled");
    let empty = write(&folder, "e.sidereal", b"");
    assert_error!(Catalog::open(&empty), Error::CatalogFile { .. }, "not a compiled");
    assert_error!(Catalog::open(folder.path()), Error::Io { .. }, "director");
    let missing = folder.path().join("missing.sidereal");
    assert_error!(Catalog::open(&missing), Error::Io { .. }, "missing.sidereal");
    let mut future = small_catalog();
    future[8] = 77;
    sign(&mut future);
    let future = write(&folder, "v.sidereal", future);
    assert_error!(Catalog::open(&future), Error::CatalogFile { .. }, "format 77", "build it again");
}

// Files of items.

#[test]
fn bad_lines_of_items_are_named() {
    let good = r#"{"item": "1", "sid": [1, 2, 3]}"#;
    for (line, reason) in [
        (r#"{"item": "2", "sid": [1, 2]}"#, "has 2 levels"),
        (r#"{"item": "2", "sid": [1, 2, "#, "EOF"),
        (r#"{"item": "2", "sid": []}"#, "0 levels"),
        (r#"{"item": "2", "sid": [1, 2, 3, 4, 5, 6, 7, 8, 9]}"#, "9 levels"),
        (r#"{"item": "2", "sid": [1, 2, 65536]}"#, "over 65535"),
        (r#"{"item": "2", "sid": [1, 2, -3]}"#, "Code"),
        (r#"{"item": "2", "sid": [1, 2, "<c_>"]}"#, "no number"),
        (r#"{"item": "", "sid": [1, 2, 3]}"#, "empty"),
        (r#"{"sid": [1, 2, 3]}"#, "item"),
        (r#"{"item": "2"}"#, "sid"),
        (r#"["2", [1, 2, 3]]"#, "line 2"),
        ("nonsense", "expected"),
    ] {
        let folder = temp();
        let path = write(&folder, "items.jsonl", format!("{good}\n{line}\n"));
        assert_error!(Catalog::open(&path), Error::ItemsFile { .. }, "line 2", reason);
    }
    let folder = temp();
    let path = write(&folder, "items.jsonl", b"{\"item\": \"\xff\", \"sid\": [1]}\n");
    assert_error!(Catalog::open(&path), Error::ItemsFile { .. }, "line 1");
}

#[test]
fn bad_entries_of_an_index_are_named() {
    for (index, reason) in [
        (r#"{"1": ["<a_1>", "<b_2>"], "2": ["<a_1>"]}"#, "item \"2\""),
        (r#"{"1": ["<a_1>", "<b_2>"], "2": ["<a_1>", "<b_"]}"#, "no number"),
        (r#"{"1": ["<a_1>", "<b_2>"], "2": ["<a"#, "EOF"),
        (r#"{"1": ["<a_99999>"]}"#, "65535"),
        (r#"[["<a_1>"]]"#, "an object of items"),
        ("", "EOF"),
    ] {
        let folder = temp();
        let path = write(&folder, "items.index.json", index);
        assert_error!(Catalog::open(&path), Error::ItemsFile { .. }, reason);
    }
}

#[test]
fn items_must_be_some_and_have_names_of_their_own() {
    let folder = temp();
    let none = write(&folder, "none.jsonl", "\n\n");
    assert_error!(Catalog::open(&none), Error::InvalidField { .. }, "no items");
    let none = write(&folder, "none.json", "{}");
    assert_error!(Catalog::open(&none), Error::InvalidField { .. }, "no items");
    let twice = write(&folder, "twice.json", r#"{"a": [1], "b": [2], "a": [3]}"#);
    assert_error!(Catalog::open(&twice), Error::InvalidField { .. }, "\"a\" appears twice");
}

// Checkpoints.

/// A copy of a sound checkpoint, to be damaged.
struct Folder(TempDir);

impl Folder {
    fn of(case: &str) -> Folder {
        let folder = temp();
        for name in ["config.json", "sidereal.json", "model.safetensors"] {
            let from = models().join(case).join(name);
            std::fs::copy(from, folder.path().join(name)).expect("a checkpoint of the repository");
        }
        Folder(folder)
    }

    fn edit(&self, name: &str, edit: impl FnOnce(&mut Value)) {
        let path = self.0.path().join(name);
        let text = std::fs::read(&path).expect("a file of the checkpoint");
        let mut value: Value = serde_json::from_slice(&text).expect("JSON");
        edit(&mut value);
        std::fs::write(path, value.to_string()).expect("a writable folder");
    }

    /// Rewrites the weights; `edit` sees each tensor's name, type, shape and bytes.
    fn edit_weights(&self, edit: impl FnOnce(&mut Vec<(String, Dtype, Vec<usize>, Vec<u8>)>)) {
        let path = self.0.path().join("model.safetensors");
        let bytes = std::fs::read(&path).expect("the weights");
        let parsed = safetensors::SafeTensors::deserialize(&bytes).expect("sound weights");
        let mut tensors = parsed
            .tensors()
            .into_iter()
            .map(|(name, view)| (name, view.dtype(), view.shape().to_vec(), view.data().to_vec()))
            .collect();
        edit(&mut tensors);
        let views = tensors.iter().map(|(name, dtype, shape, data)| {
            (name, TensorView::new(*dtype, shape.clone(), data).expect("a consistent tensor"))
        });
        let bytes = safetensors::serialize(views, None).expect("a checkpoint");
        std::fs::write(path, bytes).expect("a writable folder");
    }

    fn open(&self) -> Result<Engine, Error> {
        self.open_with("industrial")
    }

    fn open_with(&self, catalog: &str) -> Result<Engine, Error> {
        let catalog = models().join(format!("catalogs/{catalog}.index.json"));
        let catalog = Arc::new(Catalog::open(&catalog).expect("a real catalogue"));
        Engine::open(self.0.path(), catalog, &EngineOptions { threads: 1, ..Default::default() })
    }
}

const QWEN3: &str = "decoder_only/qwen3-tied";

#[test]
fn tensors_must_be_there_fit_and_be_accounted_for() {
    let folder = Folder::of(QWEN3);
    folder.edit_weights(|tensors| {
        tensors.retain(|(name, ..)| !name.ends_with("1.mlp.up_proj.weight"))
    });
    assert_error!(folder.open(), Error::MissingTensor { .. }, "model.layers.1.mlp.up_proj.weight");

    let folder = Folder::of(QWEN3);
    folder.edit_weights(|tensors| {
        let data = vec![0; 8];
        tensors.push(("model.layers.0.extra".into(), Dtype::F32, vec![2], data));
    });
    assert_error!(folder.open(), Error::UnexpectedTensor { .. }, "model.layers.0.extra");

    let folder = Folder::of(QWEN3);
    folder.edit_weights(|tensors| {
        let found = tensors.iter_mut().find(|(name, ..)| name.ends_with("0.mlp.down_proj.weight"));
        found.expect("a feed-forward layer").2.reverse();
    });
    assert_error!(folder.open(), Error::TensorShape { .. }, "down_proj", "[192, 96]", "[96, 192]");

    let folder = Folder::of(QWEN3);
    folder.edit_weights(|tensors| {
        let (_, dtype, shape, data) = &mut tensors[0];
        (*dtype, *data) = (Dtype::I64, vec![0; shape.iter().product::<usize>() * 8]);
    });
    assert_error!(folder.open(), Error::ModelConfig { .. }, "I64", "bf16");
}

#[test]
fn weights_must_be_finite() {
    for (dtype, number) in [
        (Dtype::F32, f32::NAN.to_le_bytes().to_vec()),
        (Dtype::F32, f32::NEG_INFINITY.to_le_bytes().to_vec()),
        (Dtype::F16, half::f16::INFINITY.to_le_bytes().to_vec()),
        (Dtype::BF16, half::bf16::NAN.to_le_bytes().to_vec()),
    ] {
        let folder = Folder::of(QWEN3);
        folder.edit_weights(|tensors| {
            let found = tensors.iter_mut().find(|(name, ..)| name == "model.embed_tokens.weight");
            let (_, old, shape, data) = found.expect("the embedding");
            let size = number.len();
            (*old, *data) = (dtype, vec![0; shape.iter().product::<usize>() * size]);
            data[777 * size..778 * size].copy_from_slice(&number);
        });
        assert_error!(folder.open(), Error::NonFiniteWeight { .. }, "embed_tokens", "index 777");
    }
}

#[test]
fn a_damaged_weights_file_is_an_error() {
    let folder = Folder::of(QWEN3);
    let path = folder.0.path().join("model.safetensors");
    let bytes = std::fs::read(&path).expect("the weights");
    for len in [0, 1, 7, 8, 9, 100, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..len]).expect("a writable folder");
        assert_error!(folder.open(), Error::WeightsFile { .. }, "safetensors", "again");
    }
    for header in [u64::MAX, 1 << 40, bytes.len() as u64] {
        let mut hostile = bytes.clone();
        hostile[..8].copy_from_slice(&header.to_le_bytes());
        std::fs::write(&path, &hostile).expect("a writable folder");
        assert_error!(folder.open(), Error::WeightsFile { .. }, "again");
    }
    std::fs::remove_file(&path).expect("the weights");
    assert_error!(folder.open(), Error::Io { .. }, "model.safetensors");
}

#[test]
fn shards_must_lie_in_the_folder() {
    let folder = Folder::of(QWEN3);
    write(
        &folder.0,
        "model.safetensors.index.json",
        r#"{"weight_map": {"a": "../b.safetensors"}}"#,
    );
    assert_error!(folder.open(), Error::WeightsFile { .. }, "not a file of this folder");
    write(&folder.0, "model.safetensors.index.json", r#"{"weight_map": {"a": "b.safetensors"}}"#);
    assert_error!(folder.open(), Error::Io { .. }, "b.safetensors");
    write(&folder.0, "model.safetensors.index.json", "{");
    assert_error!(folder.open(), Error::WeightsFile { .. }, "EOF");
}

#[test]
fn configurations_must_make_sense() {
    for (key, value, word) in [
        ("hidden_size", json!(null), "missing"),
        ("hidden_size", json!(0), "between 1"),
        ("hidden_size", json!(-1), "between 1"),
        ("num_hidden_layers", json!(1e18), "between 1"),
        ("vocab_size", json!("abc"), "abc"),
        ("rms_norm_eps", json!(-1.0), "above zero"),
        ("num_key_value_heads", json!(4), "cannot share"),
        ("head_dim", json!(31), "31"),
        ("tie_word_embeddings", json!("yes"), "not true or false"),
        ("rope_parameters", json!([1]), "not an object"),
        ("architectures", json!([]), "architectures"),
    ] {
        let folder = Folder::of(QWEN3);
        folder.edit("config.json", |config| config[key] = value);
        assert_error!(folder.open(), Error::ModelConfig { .. }, "config.json", word);
    }
    for (key, value, word) in [
        ("architectures", json!(["MambaForCausalLM"]), "MambaForCausalLM"),
        ("hidden_act", json!("gelu"), "silu is"),
        ("use_sliding_window", json!(true), "full attention is"),
        ("rope_parameters", json!({"rope_type": "yarn", "rope_theta": 1e4}), "llama3 are"),
        ("mlp_bias", json!(true), "without biases"),
    ] {
        let folder = Folder::of(QWEN3);
        folder.edit("config.json", |config| config[key] = value);
        assert_error!(folder.open(), Error::Unsupported { .. }, word);
    }
    let folder = Folder::of("t5/relu-tied");
    folder.edit("config.json", |config| config["feed_forward_proj"] = json!("gated-swish"));
    assert_error!(folder.open_with("instruments"), Error::Unsupported { .. }, "gated-swish");
    let folder = Folder::of("t5/relu-tied");
    folder.edit("config.json", |config| config["decoder_start_token_id"] = json!(99_999));
    assert_error!(folder.open_with("instruments"), Error::ModelConfig { .. }, "99999");
    std::fs::remove_file(folder.0.path().join("config.json")).expect("the configuration");
    assert_error!(folder.open(), Error::Io { .. }, "config.json");
}

#[test]
fn layouts_must_make_sense() {
    let level = |first: u64| json!({"size": 256, "first_token": first});
    for (layout, word) in [
        (json!({"levels": []}), "1 to 8"),
        (json!({"levels": [level(5), level(5_000_000)]}), "outside the vocabulary"),
        (json!({"levels": [{"size": 0, "first_token": 5}]}), "size 0"),
        (json!({"levels": [{"size": 70_000, "first_token": 5}]}), "65536"),
        (json!({"levels": [level(u64::from(u32::MAX))]}), "outside the vocabulary"),
        (json!({"levels": [{"size": 4, "template": "<a>"}]}), "{}"),
        (json!({"levels": [level(1)], "sufix": [1]}), "sufix"),
        (json!({"levels": [level(1)], "suffix": [12_345]}), "12345"),
        (json!({"levels": [level(1)], "prompt": {"max_items": 0}}), "max_items"),
        (json!({"levels": [level(1)], "normalize": "softmax"}), "softmax"),
        (json!([1]), "sidereal.json"),
    ] {
        let folder = Folder::of(QWEN3);
        if layout.to_string().contains("template") {
            write(&folder.0, "tokenizer.json", r#"{"added_tokens": []}"#);
        }
        folder.edit("sidereal.json", |old| *old = layout);
        assert_error!(folder.open(), Error::ModelConfig { .. }, "sidereal.json", word);
    }
    let folder = Folder::of(QWEN3);
    folder.edit("sidereal.json", |old| {
        *old = json!({"levels": [{"size": 4, "template": "<a_{}>"}]});
    });
    assert_error!(folder.open(), Error::Io { .. }, "tokenizer.json");
    std::fs::remove_file(folder.0.path().join("sidereal.json")).expect("the layout");
    assert_error!(folder.open(), Error::Io { .. }, "sidereal.json");
}

#[test]
fn levels_of_model_and_catalog_must_match() {
    let folder = Folder::of(QWEN3);
    let outcome = folder.open_with("instruments");
    assert_error!(outcome, Error::LevelsMismatch { .. }, "3 levels", "has 4");
    folder.edit("sidereal.json", |layout| layout["levels"][1]["size"] = json!(200));
    assert_error!(folder.open(), Error::LevelsMismatch { .. }, "level 1", "200 codes");
}

// Requests.

fn engine() -> Engine {
    Folder::of(QWEN3).open().expect("a sound checkpoint")
}

#[test]
fn requests_out_of_range_are_refused() {
    let engine = engine();
    let good = Request::from_history(["17", "4"]);
    let with = |edit: &dyn Fn(&mut Request)| {
        let mut request = good.clone();
        edit(&mut request);
        engine.recommend(&request)
    };
    assert!(with(&|_| {}).is_ok());
    let unknown = engine.recommend(&Request::from_history(["17", "x"]));
    assert_error!(unknown, Error::UnknownItem { .. }, "\"x\"", "history");
    let empty = engine.recommend(&Request::from_history(Vec::<String>::new()));
    assert_error!(empty, Error::EmptyInput, "history");
    assert_error!(engine.recommend(&Request::from_tokens([])), Error::EmptyInput, "tokens");
    let outside = engine.recommend(&Request::from_tokens([5, 876]));
    assert_error!(outside, Error::TokenOutOfRange { .. }, "token 876", "position 1", "876 tokens");
    let long = engine.recommend(&Request::from_tokens(vec![5; 2047]));
    assert_error!(long, Error::HistoryTooLong { .. }, "2047", "2046", "newest");
    assert!(engine.recommend(&Request::from_tokens(vec![5; 2046])).is_ok());
    assert_error!(with(&|r| r.beams = 0), Error::BeamWidth { .. }, "0", "4096");
    assert_error!(with(&|r| r.beams = MAX_BEAMS + 1), Error::BeamWidth { .. }, "4097");
    assert!(with(&|r| r.beams = MAX_BEAMS).is_ok());
    assert_error!(with(&|r| r.top_k = 0), Error::TopK { .. }, "at least 1");
    for temperature in [0.0, -1.0, f32::NAN, f32::INFINITY, 1e-45] {
        let outcome = with(&|r| r.temperature = temperature);
        assert_error!(outcome, Error::InvalidField { .. }, "temperature");
    }
    let free = with(&|r| {
        r.constraint = sidereal::Constraint::None;
        r.normalization = Some(sidereal::Normalization::Level);
    });
    assert_error!(free, Error::InvalidField { .. }, "normalize");
    // What the catalog does not have cannot come back: excluding it asks nothing.
    assert!(with(&|r| r.exclude = vec!["never heard of".into()]).is_ok());
}

#[test]
fn a_failing_request_does_not_disturb_the_others() {
    let engine = engine();
    let good = Request::from_history(["17", "4"]);
    let alone = engine.recommend(&good).expect("a sound request");
    let bad = Request::from_history(["no such item"]);
    let requests = [good.clone(), bad.clone(), good.clone(), bad, good];
    let answers = std::sync::Mutex::new(vec![None; requests.len()]);
    engine.recommend_all(&requests, |index, answer| {
        answers.lock().expect("no holder panics")[index] = Some(answer.ok());
    });
    let answers = answers.into_inner().expect("no holder panics");
    let expected = [Some(&alone), None, Some(&alone), None, Some(&alone)];
    for (answer, expected) in answers.iter().zip(expected) {
        assert_eq!(answer.as_ref().expect("answered").as_ref(), expected);
    }
}

#[test]
fn activations_that_overflow_are_an_error() {
    let folder = Folder::of(QWEN3);
    folder.edit_weights(|tensors| {
        for (name, _, _, data) in tensors.iter_mut() {
            if name.contains("down_proj") || name.contains("o_proj") {
                for number in data.as_chunks_mut::<4>().0 {
                    *number = 3e38f32.to_le_bytes();
                }
            }
        }
    });
    let engine = folder.open().expect("finite weights");
    let mut request = Request::from_history(["17"]);
    for normalization in [sidereal::Normalization::Vocabulary, sidereal::Normalization::Children] {
        request.normalization = Some(normalization);
        let outcome = engine.recommend(&request);
        assert_error!(outcome, Error::NonFiniteScores { .. }, "overflow");
    }
}

#[test]
fn malformed_request_lines_are_refused() {
    let parse = |line: &str| {
        RequestLine::parse(line).and_then(|line| line.to_request(&RequestDefaults::default()))
    };
    assert!(parse(r#"{"history": ["1", 2]}"#).is_ok());
    for line in [
        "",
        "nonsense",
        "[1]",
        "7",
        r#"{"history": "1"}"#,
        r#"{"history": [1.5]}"#,
        r#"{"history": ["1"], "topk": 3}"#,
        r#"{"history": ["1"]"#,
        r#"{"tokens": ["a"]}"#,
        r#"{"tokens": [1], "normalize": "softmax"}"#,
        r#"{"tokens": [1], "beams": "ten"}"#,
        r#"{"tokens": [1], "beams": 1e99}"#,
        r#"{"tokens": [99999999999999999999]}"#,
    ] {
        assert_error!(parse(line), Error::MalformedRequest { .. }, "malformed");
    }
    assert_error!(parse("{}"), Error::EmptyInput, "history");
    let both = parse(r#"{"history": ["1"], "tokens": [1]}"#);
    assert_error!(both, Error::InvalidField { .. }, "not both");
    let negative = parse(r#"{"tokens": [1, -7]}"#);
    assert_error!(negative, Error::InvalidField { .. }, "-7", "position 1");
    let negative = parse(r#"{"tokens": [1], "beams": -5}"#);
    assert_error!(negative, Error::BeamWidth { width: -5, .. }, "-5", "4096");
    let negative = parse(r#"{"tokens": [1], "top_k": -1}"#);
    assert_error!(negative, Error::TopK { top_k: -1 }, "-1");
    let filter = parse(r#"{"tokens": [1], "filter": "tag:garden"}"#);
    assert_error!(filter, Error::Unsupported { .. }, "filter", "exclude");
}
