//! Bad input gets a typed error that names the way out: never a panic, never a wrong answer.

use std::path::Path;

use safetensors::Dtype;
use serde_json::{Value, json};
use sidereal::catalog::Catalog;
use sidereal::wire::{RequestDefaults, RequestLine};
use sidereal::{
    Answer, Constraint, Engine, Error, MAX_BEAMS, Normalization, Recommendation, Request,
};

#[path = "common/folders.rs"]
mod folders;
#[path = "common/fuzzed.rs"]
#[allow(dead_code)] // the fuzzers use the rest
mod fuzzed;

use folders::{Folder, INDUSTRIAL, INSTRUMENTS, QWEN3, RawTensor, T5, find, temp, write};

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
               "title": format!("Tïtle {item}"), "tags": [format!("t{}", item % 4), "all"],
               "available": item % 9 > 0})
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
    // Nor may anything follow its end.
    let path = write(&folder, "c.sidereal", [&bytes[..], &[0; 64]].concat());
    assert_error!(Catalog::open(&path), Error::CatalogFile { .. }, "catalog build");
}

#[test]
fn a_flipped_bit_anywhere_in_a_catalog_is_an_error() {
    let (folder, bytes) = (temp(), small_catalog());
    for at in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[at] ^= 1 << (at % 8);
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
        fuzzed::sign(&mut forged);
        let path = write(&folder, "c.sidereal", &forged);
        match Catalog::open(&path) {
            Err(_) => refused += 1,
            Ok(catalog) => {
                opened += 1;
                fuzzed::look_around(&catalog);
            }
        }
    }
    assert!(refused > 1000 && opened > 100, "{refused} refused, {opened} opened");
}

#[test]
fn what_is_no_catalog_is_an_error() {
    let folder = temp();
    let foreign = write(&folder, "f.sidereal", b"PK\x03\x04 something else entirely");
    assert_error!(Catalog::open(&foreign), Error::CatalogFile { .. }, "not a compiled");
    let items = write(&folder, "i.sidereal", r#"{"item": "1", "sid": [1, 2, 3]}"#);
    assert_error!(Catalog::open(&items), Error::CatalogFile { .. }, "catalog build");
    let empty = write(&folder, "e.sidereal", b"");
    assert_error!(Catalog::open(&empty), Error::CatalogFile { .. }, "not a compiled");
    assert_error!(Catalog::open(folder.path()), Error::Io { .. }, "director");
    let missing = folder.path().join("missing.sidereal");
    assert_error!(Catalog::open(&missing), Error::Io { .. }, "missing.sidereal");
}

#[test]
fn a_catalog_of_another_version_is_an_error() {
    let folder = temp();
    for (version, is_signed) in [(77, true), (77, false), (0, true), (1, true)] {
        let mut other = small_catalog();
        other[8] = version;
        if is_signed {
            fuzzed::sign(&mut other);
        }
        let path = write(&folder, "v.sidereal", other);
        let format = format!("format {version}");
        let outcome = Catalog::open(&path);
        assert_error!(outcome, Error::CatalogFile { .. }, &format, "build it again");
    }
}

// Files of items.

#[test]
fn bad_lines_of_items_are_named() {
    let good = r#"{"item": "1", "sid": [1, 2, 3]}"#;
    for (line, reason) in [
        (r#"{"item": "2", "sid": [1, 2]}"#, "has 2 levels"),
        (r#"{"item": "2", "sid": [1, 2, 3, 4]}"#, "has 4 levels"),
        (r#"{"item": "2", "sid": [1, 2, "#, "EOF"),
        (r#"{"item": "2", "sid": []}"#, "0 levels"),
        (r#"{"item": "2", "sid": [1, 2, 3, 4, 5, 6, 7, 8, 9]}"#, "9 levels"),
        (r#"{"item": "2", "sid": [1, 2, 65536]}"#, "over 65535"),
        (r#"{"item": "2", "sid": [1, 2, "<c_65536>"]}"#, "65535"),
        (r#"{"item": "2", "sid": [1, 2, -3]}"#, "column"),
        (r#"{"item": "2", "sid": [1, 2, 3.5]}"#, "column"),
        (r#"{"item": "2", "sid": [1, 2, null]}"#, "column"),
        (r#"{"item": "2", "sid": [1, 2, "<c_>"]}"#, "no number"),
        (r#"{"item": "2", "sid": [1, 2, ""]}"#, "no number"),
        (r#"{"item": "2", "sid": 7}"#, "column"),
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
        (r#"{"1": ["<a_99999999999999999999>"]}"#, "65535"),
        (r#"{"1": []}"#, "0 levels"),
        (r#"{"": ["<a_1>"]}"#, "empty"),
        (r#"{"1": "<a_1>"}"#, "expected a list"),
        (r#"{"1": ["<a_1>"]} more"#, "trailing"),
        (r#"[["<a_1>"]]"#, "an object of items"),
        ("", "EOF"),
    ] {
        let folder = temp();
        let path = write(&folder, "items.index.json", index);
        let outcome = Catalog::open(&path);
        assert_error!(outcome, Error::ItemsFile { .. }, "items.index.json", reason);
    }
}

#[test]
fn an_index_cut_at_any_length_is_an_error() {
    let (folder, index) = (temp(), r#"{"1": ["<a_1>", "<b_2>"], "é": ["<a_1>", "<b_3>"]}"#);
    for len in 0..index.len() {
        let path = write(&folder, "items.index.json", &index.as_bytes()[..len]);
        assert_error!(Catalog::open(&path), Error::ItemsFile { .. }, "items.index.json");
    }
    let path = write(&folder, "items.index.json", index);
    assert_eq!(Catalog::open(&path).expect("a whole file").snapshot().num_items(), 2);
}

#[test]
fn lines_of_items_cut_at_any_length_are_an_error_or_the_whole_lines_before() {
    let folder = temp();
    let lines = "{\"item\": \"1\", \"sid\": [1, 2]}\r\n\n{\"item\": 2, \"sid\": [\"<a_1>\", 3]}\n";
    for len in 0..=lines.len() {
        let path = write(&folder, "items.jsonl", &lines.as_bytes()[..len]);
        let rest = lines[..len].rsplit('\n').next().expect("a split has a last part").trim();
        let whole_lines = lines[..len].matches('}').count();
        match Catalog::open(&path) {
            Ok(catalog) => {
                assert!(rest.is_empty() || rest.ends_with('}'), "cut at {len}");
                assert_eq!(catalog.snapshot().num_items(), whole_lines, "cut at {len}");
            }
            Err(Error::ItemsFile { .. }) => assert!(!rest.ends_with('}'), "cut at {len}"),
            Err(other) => {
                assert!(matches!(other, Error::InvalidField { .. }), "cut at {len}: {other:?}");
                assert!(lines[..len].trim().is_empty(), "cut at {len}");
            }
        }
    }
}

#[test]
fn items_must_be_some_and_have_names_of_their_own() {
    let folder = temp();
    for (name, text) in [("none.jsonl", "\n\n"), ("none.jsonl", ""), ("none.json", "{}")] {
        let none = write(&folder, name, text);
        assert_error!(Catalog::open(&none), Error::ItemsFile { .. }, name, "no items");
    }
    let twice = write(&folder, "twice.json", r#"{"a": [1], "b": [2], "a": [3]}"#);
    assert_error!(Catalog::open(&twice), Error::ItemsFile { .. }, "\"a\" appears twice");
    // A number and its text are one name.
    let lines = "{\"item\": 7, \"sid\": [1]}\n{\"item\": \"7\", \"sid\": [1]}";
    let twice = write(&folder, "twice.jsonl", lines);
    assert_error!(Catalog::open(&twice), Error::ItemsFile { .. }, "\"7\" appears twice");
    let missing = folder.path().join("missing.jsonl");
    assert_error!(Catalog::open(&missing), Error::Io { .. }, "missing.jsonl");
}

// Weights.

#[test]
fn tensors_must_be_there_fit_and_be_accounted_for() {
    let folder = Folder::of(QWEN3);
    let lost = "model.layers.1.mlp.up_proj.weight";
    folder.edit_weights(|tensors| tensors.retain(|tensor| tensor.name != lost));
    assert_error!(folder.open(), Error::MissingTensor { .. }, lost, "config.json");

    let folder = Folder::of(T5);
    let lost = "decoder.block.1.layer.1.EncDecAttention.v.weight";
    folder.edit_weights(|tensors| tensors.retain(|tensor| tensor.name != lost));
    assert_error!(folder.open(), Error::MissingTensor { .. }, lost, "config.json");

    for (case, name) in [(QWEN3, "model.layers.0.extra"), (T5, "encoder.block.2.layer.0.extra")] {
        let folder = Folder::of(case);
        folder.edit_weights(|tensors| {
            let (name, data) = (name.into(), vec![0; 8]);
            tensors.push(RawTensor { name, dtype: Dtype::F32, shape: vec![2], data });
        });
        assert_error!(folder.open(), Error::UnexpectedTensor { .. }, name, "architecture");
    }

    let folder = Folder::of(QWEN3);
    folder.edit_weights(|tensors| {
        find(tensors, "model.layers.0.mlp.down_proj.weight").shape.reverse();
    });
    assert_error!(folder.open(), Error::TensorShape { .. }, "down_proj", "[192, 96]", "[96, 192]");
    let folder = Folder::of(T5);
    folder.edit_weights(|tensors| {
        find(tensors, "encoder.final_layer_norm.weight").shape = vec![1, 64];
    });
    assert_error!(folder.open(), Error::TensorShape { .. }, "final_layer_norm", "[1, 64]", "[64]");

    let folder = Folder::of(QWEN3);
    folder.edit_weights(|tensors| {
        let norm = find(tensors, "model.norm.weight");
        (norm.dtype, norm.data) = (Dtype::I64, vec![1; 96 * 8]);
    });
    assert_error!(folder.open(), Error::Unsupported { .. }, "I64", "f32");
}

#[test]
fn an_untied_checkpoint_must_have_its_head() {
    for case in [QWEN3, T5] {
        let folder = Folder::of(case);
        folder.edit("config.json", |config| config["tie_word_embeddings"] = json!(false));
        let outcome = folder.open();
        assert_error!(outcome, Error::MissingTensor { .. }, "lm_head.weight", "config.json");
    }
}

/// A number as a file holds it.
fn bits(dtype: Dtype, number: f32) -> Vec<u8> {
    match dtype {
        Dtype::F16 => half::f16::from_f32(number).to_le_bytes().to_vec(),
        Dtype::BF16 => half::bf16::from_f32(number).to_le_bytes().to_vec(),
        _ => number.to_le_bytes().to_vec(),
    }
}

#[test]
fn weights_must_be_finite() {
    let folder = Folder::of(QWEN3);
    let sound = folder.read("model.safetensors");
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        for number in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            folder.write("model.safetensors", &sound);
            folder.edit_weights(|tensors| {
                let embedding = find(tensors, "model.embed_tokens.weight");
                let old = embedding.data.as_chunks::<4>().0.iter();
                embedding.data =
                    old.flat_map(|&old| bits(dtype, f32::from_le_bytes(old))).collect();
                embedding.dtype = dtype;
                let number = bits(dtype, number);
                let at = 777 * number.len();
                embedding.data[at..at + number.len()].copy_from_slice(&number);
            });
            let outcome = folder.open();
            assert_error!(outcome, Error::NonFiniteWeight { .. }, "embed_tokens", "index 777");
        }
    }
}

#[test]
fn a_damaged_weights_file_is_an_error() {
    let folder = Folder::of(QWEN3);
    let bytes = folder.read("model.safetensors");
    let header_len = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    for len in
        [0, 1, 7, 8, 9, 100, 7 + header_len, 8 + header_len, bytes.len() / 2, bytes.len() - 1]
    {
        folder.write("model.safetensors", &bytes[..len]);
        assert_error!(folder.open(), Error::WeightsFile { .. }, "safetensors", "again");
    }
    for header in [0, 1, header_len as u64 - 1, bytes.len() as u64, 1 << 40, u64::MAX - 7, u64::MAX]
    {
        let mut hostile = bytes.clone();
        hostile[..8].copy_from_slice(&header.to_le_bytes());
        folder.write("model.safetensors", &hostile);
        assert_error!(folder.open(), Error::WeightsFile { .. }, "again");
    }
    folder.remove("model.safetensors");
    assert_error!(folder.open(), Error::ModelFolder { .. }, "no weights", "model.safetensors");
}

#[test]
fn a_hostile_header_of_a_weights_file_is_an_error() {
    let folder = Folder::of(QWEN3);
    for header in [
        r#"{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 800]}}"#,
        r#"{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}"#,
        r#"{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}"#,
        r#"{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}"#,
        r#"{"a": {"dtype": "F32", "shape": [18446744073709551615, 2], "data_offsets": [0, 8]}}"#,
        r#"{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 18446744073709551615]}}"#,
        r#"{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}"#,
        r#"{"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}"#,
        r#"{"a": 7}"#,
        r#"[]"#,
        "{",
    ] {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(&[0; 8]);
        folder.write("model.safetensors", bytes);
        assert_error!(folder.open(), Error::WeightsFile { .. }, "model.safetensors", "again");
    }
    folder.write("model.safetensors", b"\x02\0\0\0\0\0\0\0{}");
    assert_error!(folder.open(), Error::MissingTensor { .. }, "model.embed_tokens.weight");
}

#[test]
fn shards_must_lie_in_the_folder() {
    let folder = Folder::of(QWEN3);
    let weights = folder.read("model.safetensors");
    folder.remove("model.safetensors"); // it would count before an index
    let index = "model.safetensors.index.json";
    for name in ["../b.safetensors", "/b.safetensors", "sub/b.safetensors", "..", ".", ""] {
        folder.write(index, json!({"weight_map": {"a": name}}).to_string());
        assert_error!(folder.open(), Error::WeightsFile { .. }, "not a file of this folder");
    }
    folder.write(index, r#"{"weight_map": {"a": "b.safetensors"}}"#);
    assert_error!(folder.open(), Error::WeightsFile { .. }, "b.safetensors", "not there");
    for text in ["", "{", "{}", "[]", r#"{"weight_map": {"a": 7}}"#] {
        folder.write(index, text);
        assert_error!(folder.open(), Error::WeightsFile { .. }, index, "again");
    }
    folder.write("b.safetensors", &weights);
    folder.write("c.safetensors", &weights);
    folder.write(index, r#"{"weight_map": {"a": "b.safetensors", "b": "c.safetensors"}}"#);
    assert_error!(folder.open(), Error::WeightsFile { .. }, "two files");
}

// Configurations.

#[test]
fn sizes_of_a_configuration_must_be_there_and_possible() {
    let qwen3: [(&str, bool); 8] = [
        ("hidden_size", true),
        ("intermediate_size", true),
        ("num_hidden_layers", true),
        ("num_attention_heads", true),
        ("vocab_size", true),
        ("num_key_value_heads", false),
        ("head_dim", false),
        ("max_position_embeddings", false),
    ];
    let t5: [(&str, bool); 8] = [
        ("d_model", true),
        ("d_kv", true),
        ("d_ff", true),
        ("num_layers", true),
        ("num_heads", true),
        ("vocab_size", true),
        ("relative_attention_num_buckets", false),
        ("relative_attention_max_distance", false),
    ];
    let absurd = [
        json!(0),
        json!(-1),
        json!(1e18),
        json!(u64::MAX),
        json!(2.5),
        json!("abc"),
        json!(true),
        json!([96]),
    ];
    for (case, keys) in [(QWEN3, qwen3), (T5, t5)] {
        let folder = Folder::of(case);
        let sound = folder.read("config.json");
        for (key, is_required) in keys {
            for value in &absurd {
                folder.write("config.json", &sound);
                folder.edit("config.json", |config| config[key] = value.clone());
                let (quoted, value) = (format!("{key:?}"), value.to_string());
                let outcome = folder.open();
                assert_error!(outcome, Error::ModelConfig { .. }, &quoted, &value, "between 1");
            }
            for missing in [true, false] {
                folder.write("config.json", &sound);
                folder.edit("config.json", |config| match missing {
                    true => drop(config.as_object_mut().expect("an object").remove(key)),
                    false => config[key] = Value::Null,
                });
                match (folder.open(), is_required) {
                    (outcome, true) => {
                        let quoted = format!("{key:?}");
                        assert_error!(outcome, Error::ModelConfig { .. }, &quoted, "missing");
                    }
                    // The default may be another network's: then the shapes tell.
                    (Err(error), false) => {
                        assert!(matches!(error, Error::TensorShape { .. }), "{key}: {error:?}");
                    }
                    (Ok(_), false) => {}
                }
            }
            // The largest size that counts as one still fails before anything is allocated by it.
            folder.write("config.json", &sound);
            folder.edit("config.json", |config| config[key] = json!(1 << 24));
            if let Err(error) = folder.open() {
                let is_typed = matches!(
                    error,
                    Error::TensorShape { .. }
                        | Error::MissingTensor { .. }
                        | Error::ModelConfig { .. }
                );
                assert!(is_typed, "{key}: {error:?}");
            }
        }
    }
}

#[test]
fn configurations_must_make_sense() {
    for (key, value, word) in [
        ("rms_norm_eps", json!(-1.0), "above zero"),
        ("rms_norm_eps", json!(0), "above zero"),
        ("rms_norm_eps", json!("1e-6"), "above zero"),
        ("num_key_value_heads", json!(4), "cannot share"),
        ("num_attention_heads", json!(5), "cannot share"),
        ("head_dim", json!(31), "31"),
        ("tie_word_embeddings", json!("yes"), "not true or false"),
        ("use_sliding_window", json!(1), "not true or false"),
        ("hidden_act", json!(7), "not a text"),
        ("rope_parameters", json!([1]), "not an object"),
        ("rope_parameters", json!({"rope_type": "default", "rope_theta": -1}), "rope_theta"),
        ("rope_parameters", json!({"rope_type": "linear", "factor": 0}), "factor"),
        ("rope_parameters", json!({"rope_type": "yarn", "rope_theta": 1e4}), "factor"),
        ("mlp_bias", json!(true), "mlp_bias"),
    ] {
        let folder = Folder::of(QWEN3);
        folder.edit("config.json", |config| config[key] = value);
        assert_error!(folder.open(), Error::ModelConfig { .. }, "config.json", word);
    }
    for (key, value, word) in [
        ("relative_attention_num_buckets", json!(3), "no scale"),
        ("relative_attention_max_distance", json!(16), "no scale"),
        ("decoder_start_token_id", json!(99_999), "99999"),
        ("decoder_start_token_id", json!(-1), "-1"),
        ("layer_norm_epsilon", json!(0.0), "above zero"),
    ] {
        let folder = Folder::of(T5);
        folder.edit("config.json", |config| config[key] = value);
        assert_error!(folder.open(), Error::ModelConfig { .. }, "config.json", word);
    }
    let folder = Folder::of(QWEN3);
    for text in ["", "{", "[]", "7", "{\"hidden_size\": \"\u{0}\"}"] {
        folder.write("config.json", text);
        assert_error!(folder.open(), Error::ModelConfig { .. }, "config.json");
    }
    folder.remove("config.json");
    assert_error!(folder.open(), Error::Io { .. }, "config.json");
}

#[test]
fn networks_that_are_not_served_are_refused() {
    for (key, value, word) in [
        ("hidden_act", json!("relu2"), "silu, gelu"),
        ("rope_parameters", json!({"rope_type": "su", "rope_theta": 1e4}), "yarn are"),
        ("partial_rotary_factor", json!(0.5), "1.0 is"),
    ] {
        let folder = Folder::of(QWEN3);
        folder.edit("config.json", |config| config[key] = value);
        assert_error!(folder.open(), Error::Unsupported { .. }, "not supported", word);
    }
    // The older spelling of the same keys.
    let folder = Folder::of(QWEN3);
    folder.edit("config.json", |config| {
        config["rope_parameters"] = Value::Null;
        config["rope_scaling"] = json!({"type": "longrope", "factor": 2.0});
    });
    assert_error!(folder.open(), Error::Unsupported { .. }, "longrope", "yarn are");
    let folder = Folder::of(T5);
    folder.edit("config.json", |config| config["feed_forward_proj"] = json!("gated-mish"));
    folder.edit("config.json", |config| config["dense_act_fn"] = Value::Null);
    assert_error!(folder.open(), Error::Unsupported { .. }, "gated-mish", "relu");
}

#[test]
fn numbers_that_f32_cannot_hold_are_refused() {
    // Infinite in f32, the first makes all scores equal, the second all of them NaN.
    let too_far = json!({"rope_type": "linear", "factor": 1e-60});
    for (key, value, word) in
        [("rms_norm_eps", json!(1e300), "rms_norm_eps"), ("rope_parameters", too_far, "factor")]
    {
        let folder = Folder::of(QWEN3);
        folder.edit("config.json", |config| config[key] = value);
        assert_error!(folder.open(), Error::ModelConfig { .. }, "config.json", word);
    }
}

// Layouts.

fn level(first_token: u64) -> Value {
    json!({"size": 256, "first_token": first_token})
}

#[test]
fn layouts_must_make_sense() {
    for (layout, word) in [
        (json!({"levels": []}), "1 to 8"),
        (json!({"levels": (vec![level(1); 9])}), "1 to 8"),
        (json!({"levels": {"0": level(1)}}), "expected a list"),
        (json!({"levels": [level(5), level(5_000_000)]}), "outside the vocabulary"),
        (json!({"levels": [level(621)]}), "877, outside the vocabulary of 876"),
        (json!({"levels": [level(u64::from(u32::MAX))]}), "outside the vocabulary"),
        (json!({"levels": [level(1 << 32)]}), "sidereal.json"),
        (json!({"levels": [{"size": 0, "first_token": 5}]}), "size 0"),
        (json!({"levels": [{"size": 70_000, "first_token": 5}]}), "65536"),
        (json!({"levels": [{"size": u64::MAX, "first_token": 5}]}), "65536"),
        (json!({"levels": [{"size": 4, "template": "<a>"}]}), "{}"),
        (json!({"levels": [level(1), level(1)]}), "shared_codes"),
        (json!({"levels": [level(1), level(300), level(256)]}), "first_token"),
        (json!({"levels": [level(1), level(2)], "shared_codes": true}), "one code with one token"),
        (json!({"levels": [level(1)], "shared_codes": 1}), "true or false"),
        (json!({"levels": [{"size": 4, "template": "<a_{}>"}]}), "no code has a token"),
        (json!({"levels": [level(1)], "sufix": [1]}), "sufix"),
        (json!({"levels": [level(1)], "suffix": [12_345]}), "12345"),
        (json!({"levels": [level(1)], "suffix": [-1]}), "-1"),
        (json!({"levels": [level(1)], "prompt": {"max_items": 0}}), "max_items"),
        (json!({"levels": [level(1)], "prompt": {"max_items": -1}}), "-1"),
        (json!({"levels": [level(1)], "prompt": {"prefx": [1]}}), "prefx"),
        (json!({"levels": [level(1)], "prompt": {"prefix": [876]}}), "token 876"),
        (json!({"levels": [level(1)], "prompt": {"separator": [u32::MAX]}}), "4294967295"),
        (json!({"levels": [level(1)], "normalize": "softmax"}), "softmax"),
        (json!([1]), "sidereal.json"),
        (json!("levels"), "sidereal.json"),
    ] {
        let folder = Folder::of(QWEN3);
        if layout.to_string().contains("template") {
            folder.write("tokenizer.json", r#"{"added_tokens": []}"#);
        }
        folder.edit("sidereal.json", |old| *old = layout);
        assert_error!(folder.open(), Error::ModelConfig { .. }, "sidereal.json", word);
    }
    let folder = Folder::of(QWEN3);
    folder.write("sidereal.json", "{}");
    assert_error!(folder.open(), Error::ModelFolder { .. }, "sidereal.json", "no \"levels\"");
    folder.write("sidereal.json", "{\"levels\": [");
    assert_error!(folder.open(), Error::ModelConfig { .. }, "sidereal.json", "EOF");
    folder.remove("sidereal.json");
    assert_error!(
        folder.open(),
        Error::ModelFolder { .. },
        "there is no sidereal.json",
        "smallest"
    );
}

#[test]
fn unknown_fields_of_a_level_are_refused() {
    for (entry, word) in [
        (json!({"size": 256, "first_token": 100, "offset": 1}), "offset"),
        (json!({"size": 256, "first_tokn": 100}), "first_token"),
        // Which of the two would count?
        (json!({"size": 256, "first_token": 100, "template": "<a_{}>"}), "template"),
    ] {
        let folder = Folder::of(QWEN3);
        folder.edit("sidereal.json", |layout| layout["levels"][0] = entry);
        assert_error!(folder.open(), Error::ModelConfig { .. }, "sidereal.json", word);
    }
}

/// A checkpoint whose first level goes by template, with the tokenizer's numbers of its codes.
fn templated(id: impl Fn(u64) -> u64) -> Folder {
    let folder = Folder::of(QWEN3);
    folder.edit("sidereal.json", |layout| {
        layout["levels"][0] = json!({"size": 256, "template": "<a_{}>"});
    });
    let entries = (0..256).map(|code| (format!("<a_{code}>"), json!(id(code))));
    let vocab: serde_json::Map<String, Value> = entries.collect();
    folder.write("tokenizer.json", json!({"model": {"vocab": vocab}}).to_string());
    folder
}

#[test]
fn templates_need_a_tokenizer_that_knows_their_tokens() {
    let plain = Folder::of(QWEN3).open().expect("a sound checkpoint");
    let by_template = templated(|code| 100 + code).open().expect("a sound tokenizer");
    let request = Request::from_history(["17", "4"]);
    let answers =
        [plain, by_template].map(|mut engine| engine.recommend(&request).expect("a request"));
    assert_eq!(answers[0], answers[1]);

    let folder = templated(|code| 100 + code);
    folder.edit("tokenizer.json", |tokenizer| {
        let vocab = tokenizer["model"]["vocab"].as_object_mut().expect("an object");
        vocab.retain(|text, _| text.len() < "<a_100>".len());
    });
    assert_error!(folder.open(), Error::LevelsMismatch { .. }, "level 0", "no token");

    let outside = templated(|code| 700 + code).open();
    assert_error!(outside, Error::ModelConfig { .. }, "token 955", "vocabulary of 876");
    for text in ["", "{", "[]", r#"{"added_tokens": [{"content": "<a_1>"}]}"#] {
        folder.write("tokenizer.json", text);
        assert_error!(folder.open(), Error::ModelConfig { .. }, "tokenizer.json");
    }
    folder.remove("tokenizer.json");
    assert_error!(folder.open(), Error::Io { .. }, "tokenizer.json");
}

#[test]
fn codes_of_a_level_that_share_a_token_are_refused() {
    let outcome = templated(|_| 100).open();
    assert_error!(outcome, Error::ModelConfig { .. }, "codes 0 and 1", "level 0", "token 100");
}

#[test]
fn levels_share_a_range_of_tokens_where_the_layout_says_so() {
    let folder = Folder::of(QWEN3);
    let level = |size: usize| json!({"size": size, "first_token": 100});
    folder.edit("sidereal.json", |layout| {
        *layout = json!({"levels": [level(256), level(300), level(256)], "shared_codes": true});
    });
    let mut engine = folder.open().expect("one code, one token");
    let answer = engine.recommend(&Request::from_history(["17", "4"])).expect("a sound request");
    assert!(!answer.items.is_empty());
}

#[test]
fn a_token_of_more_than_32_bits_is_refused() {
    // Cut to 32 bits it would be another token.
    let outcome = templated(|code| (1 << 32) + 100 + code).open();
    assert_error!(outcome, Error::ModelConfig { .. }, "vocabulary of 876");
}

#[test]
fn levels_of_model_and_catalog_must_match() {
    let folder = Folder::of(QWEN3);
    let outcome = folder.open_with(&INSTRUMENTS);
    assert_error!(outcome, Error::LevelsMismatch { .. }, "3 levels", "has 4");
    let outcome = Folder::of(T5).open_with(&INDUSTRIAL);
    assert_error!(outcome, Error::LevelsMismatch { .. }, "4 levels", "has 3");
    folder.edit("sidereal.json", |layout| layout["levels"][1]["size"] = json!(200));
    assert_error!(folder.open(), Error::LevelsMismatch { .. }, "level 1", "200 codes");
}

// Requests.

fn engine() -> Engine {
    Folder::of(QWEN3).open().expect("a sound checkpoint")
}

fn parse(line: &str) -> Result<Request, Error> {
    RequestLine::parse(line)?.to_request(&RequestDefaults::default())
}

#[test]
fn requests_out_of_range_are_refused() {
    let mut engine = engine();
    let good = Request::from_history(["17", "4"]);
    let unknown = engine.recommend(&Request::from_history(["x", "y"]));
    assert_error!(unknown, Error::UnknownItem { .. }, "\"x\"", "history");
    let empty = engine.recommend(&Request::from_history(Vec::<String>::new()));
    assert_error!(empty, Error::EmptyInput, "history");
    assert_error!(engine.recommend(&Request::from_tokens([])), Error::EmptyInput, "tokens");
    let outside = engine.recommend(&Request::from_tokens([5, 876]));
    assert_error!(outside, Error::TokenOutOfRange { .. }, "token 876", "position 1", "876 tokens");
    let outside = engine.recommend(&Request::from_tokens([u32::MAX]));
    assert_error!(outside, Error::TokenOutOfRange { .. }, "token 4294967295", "position 0");
    let mut with = |edit: &dyn Fn(&mut Request)| {
        let mut request = good.clone();
        edit(&mut request);
        engine.recommend(&request)
    };
    assert!(with(&|_| {}).is_ok());
    assert_error!(with(&|r| r.beams = 0), Error::BeamWidth { .. }, "0", "4096");
    assert_error!(with(&|r| r.beams = MAX_BEAMS + 1), Error::BeamWidth { .. }, "4097");
    assert_error!(with(&|r| r.beams = usize::MAX), Error::BeamWidth { .. }, "4096");
    assert!(with(&|r| r.beams = MAX_BEAMS).is_ok());
    assert_error!(with(&|r| r.top_k = 0), Error::TopK { .. }, "at least 1");
    assert!(with(&|r| r.top_k = usize::MAX).is_ok());
    let free = with(&|r| {
        r.constraint = Constraint::None;
        r.normalization = Some(Normalization::Level);
    });
    assert_error!(free, Error::InvalidField { .. }, "normalize");
}

#[test]
fn a_history_that_is_too_long_is_refused_and_the_way_out_leads_out() {
    let mut engine = engine();
    let long = engine.recommend(&Request::from_tokens(vec![5; 2047]));
    assert_error!(long, Error::HistoryTooLong { .. }, "2047", "2046", "newest", "max_items");
    assert!(engine.recommend(&Request::from_tokens(vec![5; 2046])).is_ok());
    let history = Request::from_history(vec!["17"; 683]);
    assert_error!(engine.recommend(&history), Error::HistoryTooLong { .. }, "2049", "2046");
    let folder = Folder::of(QWEN3);
    folder.edit("sidereal.json", |layout| layout["prompt"] = json!({"max_items": 682}));
    let mut engine = folder.open().expect("a sound checkpoint");
    let newest = Request::from_history(vec!["17"; 682]);
    assert_eq!(
        engine.recommend(&history).expect("cut to 682 items"),
        engine.recommend(&newest).expect("short enough"),
    );
    // T5 has no limit of its own: the engine's holds.
    let mut engine = Folder::of(T5).open().expect("a sound checkpoint");
    let long = engine.recommend(&Request::from_tokens(vec![5; 8193]));
    assert_error!(long, Error::HistoryTooLong { .. }, "8193", "8192");
}

#[test]
fn excluding_what_the_catalog_does_not_have_asks_nothing() {
    let mut engine = engine();
    let mut request = Request::from_history(["17", "4"]);
    let plain = engine.recommend(&request).expect("a sound request");
    request.exclude = vec!["never heard of".into(), String::new(), "3686".into()];
    assert_eq!(engine.recommend(&request).expect("ignored"), plain);
}

#[test]
fn excluding_everything_leaves_an_empty_answer() {
    let folder = Folder::small();
    let mut engine = folder.open().expect("a sound checkpoint");
    let mut request = Request::from_history(["i0"]);
    let catalog = folder.catalog();
    request.exclude = catalog.all_items().map(|item| catalog.name(item).to_string()).collect();
    for constraint in [Constraint::Trie, Constraint::Occurring, Constraint::Level, Constraint::None]
    {
        for normalization in [Normalization::Vocabulary, Normalization::Children] {
            request.constraint = constraint;
            request.normalization = Some(normalization);
            let answer = engine.recommend(&request).expect("no failure");
            assert!(answer.items.is_empty(), "{constraint:?}, {normalization:?}");
        }
    }
}

#[test]
fn temperatures_that_are_no_positive_number_are_refused() {
    let mut engine = engine();
    let mut request = Request::from_history(["17", "4"]);
    for temperature in [0.0, -0.0, -1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e-45] {
        request.temperature = temperature;
        let outcome = engine.recommend(&request);
        assert_error!(outcome, Error::InvalidField { .. }, "temperature", "above zero");
    }
    for temperature in ["0", "-1", "1e-45", "1e39", "1e-400"] {
        let line = format!(r#"{{"history": ["17"], "temperature": {temperature}}}"#);
        let outcome = parse(&line).and_then(|request| engine.recommend(&request));
        assert_error!(outcome, Error::InvalidField { .. }, "temperature", "above zero");
    }
    // A huge one is a number like any other: all items become as likely.
    request.temperature = f32::MAX;
    let answer = engine.recommend(&request).expect("a positive number");
    let expected = -3.0 * 876f32.ln();
    assert!(answer.items.iter().all(|item| (item.score - expected).abs() < 1e-3), "{answer:?}");
}

#[test]
fn a_score_is_finite_at_any_temperature_or_the_request_fails() {
    let folder = Folder::small();
    folder.edit("sidereal.json", |layout| layout["suffix"] = json!([5, 2]));
    let mut engine = folder.open().expect("a sound checkpoint");
    let mut request = Request::from_history(["i0", "i7"]);
    (request.beams, request.top_k) = (216, 1000);
    // Where the inverse of the temperature nears the end of f32, one step is not as the next.
    let small = (10..90).step_by(4).map(|tenths| tenths as f32 * 1e-38);
    let all = (-39..=38).step_by(3).map(|exponent| 10f32.powi(exponent)).chain(small);
    let is_finite = |item: &Recommendation| {
        let log_probs = item.log_probs.iter().flat_map(|token| [token.vocabulary, token.children]);
        log_probs.chain([item.score]).all(f32::is_finite)
    };
    let (mut answered, mut infinite, mut silent) = (0, Vec::new(), Vec::new());
    for temperature in all {
        request.temperature = temperature;
        for normalization in
            [Normalization::Vocabulary, Normalization::Level, Normalization::Children]
        {
            request.normalization = Some(normalization);
            for (sample, log_probs) in [(None, false), (Some(1), false), (None, true)] {
                (request.seed, request.log_probs) = (sample, log_probs);
                let case = format!("{temperature:e} {normalization:?} {sample:?} {log_probs}");
                match engine.recommend(&request) {
                    Ok(Answer { items, .. }) if items.iter().all(is_finite) => answered += 1,
                    Ok(_) => infinite.push(case),
                    // The way out is another temperature: nothing is wrong with the model.
                    Err(error) if error.to_string().contains("temperature") => {}
                    Err(error) => silent.push(format!("{case}: {error}")),
                }
            }
        }
    }
    assert!(answered > 180, "{answered}");
    assert!(infinite.is_empty(), "scores that are not finite at {infinite:?}");
    assert!(silent.is_empty(), "errors that do not name the temperature: {silent:#?}");
}

#[test]
fn a_failing_request_does_not_disturb_the_others() {
    let mut engine = engine();
    let good = Request::from_history(["17", "4"]);
    let alone = engine.recommend(&good).expect("a sound request");
    let unknown = Request::from_history(["no such item"]);
    // This one is admitted, and fails in the middle of a wave that it shares.
    let overflowing = good.clone().with_temperature(1e-38);
    assert!(engine.recommend(&overflowing).is_err());
    let requests = [&good, &unknown, &good, &overflowing, &good].map(Request::clone);
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
fn weights_whose_activations_overflow_are_refused_when_a_model_is_opened() {
    let folder = Folder::of(QWEN3);
    folder.edit_weights(|tensors| {
        for tensor in tensors.iter_mut() {
            if tensor.name.contains("down_proj") || tensor.name.contains("o_proj") {
                for number in tensor.data.as_chunks_mut::<4>().0 {
                    *number = 3e38f32.to_le_bytes();
                }
            }
        }
    });
    assert_error!(folder.open(), Error::NonFiniteModel { .. }, "overflow");
}

#[test]
fn malformed_request_lines_are_refused() {
    assert!(parse(r#"{"history": ["1", 2]}"#).is_ok());
    for line in [
        "",
        "nonsense",
        "[1]",
        "7",
        "null",
        "\"history\"",
        "{",
        r#"{"history": "1"}"#,
        r#"{"history": [1.5]}"#,
        r#"{"history": [["1"]]}"#,
        r#"{"history": ["1"], "topk": 3}"#,
        r#"{"history": ["1"]"#,
        r#"{"history": ["1"]} {"history": ["1"]}"#,
        r#"{"history": ["1"], "history": ["2"]}"#,
        r#"{"tokens": ["a"]}"#,
        r#"{"tokens": [1.5]}"#,
        r#"{"tokens": [1], "normalize": "softmax"}"#,
        r#"{"tokens": [1], "constraint": "tri"}"#,
        r#"{"tokens": [1], "shared_sid": "some"}"#,
        r#"{"tokens": [1], "per_sid": "two"}"#,
        r#"{"tokens": [1], "min_snapshot": 1.5}"#,
        r#"{"tokens": [1], "beams": "ten"}"#,
        r#"{"tokens": [1], "beams": 1e99}"#,
        r#"{"tokens": [1], "top_k": 2.5}"#,
        r#"{"tokens": [1], "temperature": "hot"}"#,
        r#"{"tokens": [1], "temperature": NaN}"#,
        r#"{"tokens": [99999999999999999999]}"#,
        &"[".repeat(100_000),
        &format!(r#"{{"id": {}"#, "[".repeat(100_000)),
    ] {
        assert_error!(parse(line), Error::MalformedRequest { .. }, "malformed");
    }
    for line in ["{}", r#"{"history": null}"#, r#"{"id": "u1", "beams": 3}"#] {
        assert_error!(parse(line), Error::EmptyInput, "history", "tokens");
    }
}

#[test]
fn fields_of_a_request_line_must_be_possible() {
    let mut engine = engine();
    let mut answer = |line: &str| parse(line).and_then(|request| engine.recommend(&request));
    assert!(answer(r#"{"history": ["17", 4], "exclude": [17], "beams": 2, "top_k": 2}"#).is_ok());
    for line in [r#"{"history": []}"#, r#"{"tokens": []}"#] {
        assert_error!(answer(line), Error::EmptyInput, "at least one item");
    }
    let both = answer(r#"{"history": ["1"], "tokens": [1]}"#);
    assert_error!(both, Error::InvalidField { .. }, "not several");
    for (tokens, words) in [
        ("[1, -7]", ["-7", "position 1"]),
        ("[4294967296]", ["4294967296", "position 0"]),
        ("[-9223372036854775808]", ["-9223372036854775808", "position 0"]),
    ] {
        let outcome = answer(&format!(r#"{{"tokens": {tokens}}}"#));
        assert_error!(outcome, Error::InvalidField { .. }, words[0], words[1]);
    }
    let outside = answer(r#"{"tokens": [1, 876]}"#);
    assert_error!(outside, Error::TokenOutOfRange { .. }, "876", "position 1");
    for beams in [-5, 0, 4097, i64::MIN, i64::MAX] {
        let outcome = answer(&format!(r#"{{"tokens": [1], "beams": {beams}}}"#));
        assert_error!(outcome, Error::BeamWidth { .. }, &beams.to_string(), "4096");
    }
    for top_k in [-1, 0, i64::MIN] {
        let outcome = answer(&format!(r#"{{"tokens": [1], "top_k": {top_k}}}"#));
        assert_error!(outcome, Error::TopK { .. }, &top_k.to_string(), "at least 1");
    }
    for filter in ["tag:", "garden", "tag:a &", "(tag:a", "tag:a) | (tag:b"] {
        let outcome = answer(&format!(r#"{{"tokens": [1], "filter": "{filter}"}}"#));
        assert_error!(outcome, Error::InvalidField { .. }, "filter", "expected");
        let line =
            format!(r#"{{"tokens": [1], "filter": "all", "groups": ["tag:a", "{filter}"]}}"#);
        assert_error!(answer(&line), Error::InvalidField { .. }, "filter", "expected");
    }
    let many = vec!["\"all\""; 1000].join(",");
    let outcome = answer(&format!(r#"{{"tokens": [1], "groups": [{many}]}}"#));
    assert_error!(outcome, Error::LimitExceeded { .. }, "groups", "1000", "256");
    for empty in [r#""filter": "tag:nobody""#, r#""groups": ["tag:nobody", "!all"]"#] {
        let answer = answer(&format!(r#"{{"tokens": [1], {empty}}}"#)).expect("a sound request");
        assert!(
            answer.items.is_empty() && answer.groups.iter().all(|group| group.items.is_empty())
        );
    }
}

#[test]
fn what_a_line_says_of_load_and_scoring_must_be_possible() {
    let mut engine = engine();
    let mut answer = |fields: &str| {
        let line = format!(r#"{{"history": ["17"], {fields}}}"#);
        parse(&line).and_then(|request| engine.recommend(&request))
    };
    for good in [
        r#""beams": [1, 4096, 3]"#,
        r#""deadline_ms": 1e12"#,
        r#""priority": "low", "user": 7"#,
        r#""seed": 18446744073709551615"#,
        r#""candidates": [17, "4"], "beams": 1"#,
        r#""candidates": [], "log_probs": true"#,
    ] {
        assert!(answer(good).is_ok(), "{good}");
    }
    for (beams, words) in [
        ("[]", ["0", "4096"]),
        ("[1, 0, 1]", ["0", "4096"]),
        ("[1, 2, 4097]", ["4097", "4096"]),
        ("[1, -2, 3]", ["-2", "4096"]),
    ] {
        let outcome = answer(&format!(r#""beams": {beams}"#));
        assert_error!(outcome, Error::BeamWidth { .. }, words[0], words[1]);
    }
    for beams in ["[1, 2]", "[1, 2, 3, 4]"] {
        let outcome = answer(&format!(r#""beams": {beams}"#));
        assert_error!(outcome, Error::InvalidField { .. }, "beams", "3 levels");
    }
    for malformed in [
        r#""beams": [1, "two", 3]"#,
        r#""beams": 1.5"#,
        r#""priority": "urgent""#,
        r#""seed": -1"#,
        r#""log_probs": 1"#,
        r#""candidates": 5"#,
    ] {
        assert_error!(answer(malformed), Error::MalformedRequest { .. }, "malformed");
    }
    for deadline in ["-1", "1e300"] {
        let outcome = answer(&format!(r#""deadline_ms": {deadline}"#));
        assert_error!(outcome, Error::InvalidField { .. }, "deadline_ms");
    }
    assert_error!(
        answer(r#""deadline_ms": 0"#),
        Error::DeadlineExceeded { .. },
        "deadline of 0 ms"
    );
    let unknown = answer(r#""candidates": ["x"]"#);
    assert_error!(unknown, Error::UnknownItem { .. }, "\"x\" of \"candidates\"");
    let free = answer(r#""constraint": "level", "log_probs": true"#);
    assert!(free.is_ok(), "the constraint says what is legal");
    let many = answer(&format!(r#""candidates": [{}]"#, vec!["17"; 4097].join(",")));
    assert_error!(many, Error::LimitExceeded { .. }, "candidates", "4097", "4096");
}

#[test]
fn texts_speak_of_the_file_and_not_of_the_parser() {
    let folder = temp();
    let items = |line: &str| Catalog::open(&write(&folder, "items.jsonl", line)).map(|_| ());
    let layout = |level: Value| {
        let folder = Folder::of(QWEN3);
        folder.edit("sidereal.json", |layout| layout["levels"][0] = level);
        folder.open().map(|_| ())
    };
    let mut texts = Vec::new();
    for outcome in [
        parse(r#"{"history": [1.5]}"#).map(|_| ()),
        parse(r#"{"history": ["17"], "exclude": [true]}"#).map(|_| ()),
        items(r#"{"item": "1", "sid": [-3]}"#),
        items(r#"{"item": "1", "sid": [2.0]}"#),
        items(r#"{"item": -1, "sid": [3]}"#),
        layout(json!({"size": -1, "first_token": 100})),
        layout(json!({"size": 256})),
    ] {
        texts.push(error(outcome, "a value of a wrong type").to_string());
    }
    texts.retain(|text| text.contains("untagged enum"));
    assert!(texts.is_empty(), "these do not say what would be right: {texts:#?}");
}

#[test]
fn a_model_folder_that_is_none_is_an_error() {
    let folder = temp();
    let open = |path: &Path| Engine::open(path, INDUSTRIAL.clone(), &Default::default());
    assert_error!(open(folder.path()), Error::Io { .. }, "config.json");
    let missing = folder.path().join("missing");
    assert_error!(open(&missing), Error::ModelFolder { .. }, "missing", "no such model folder");
    let file = write(&folder, "file", "not a folder");
    assert_error!(open(&file), Error::ModelFolder { .. }, "this is a file");
}
