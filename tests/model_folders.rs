//! What a model folder says is read, compared with what was read in its place, or refused.
//!
//! Each test changes a sound folder the way that trainers, exporters and people change them, and
//! asks for the right answer or for an error that names the way out. Golden answers of whole
//! networks are in `tests/golden.rs`.

use std::sync::Arc;

use safetensors::Dtype;
use serde_json::{Value, json};
use sidereal::catalog::Catalog;
use sidereal::models::weights::Weights;
use sidereal::{
    Engine, EngineOptions, Error, NamedToken, Recommender, RecommenderOptions, Request,
};

#[path = "common/folders.rs"]
mod folders;

use folders::{Folder, INDUSTRIAL, INSTRUMENTS, QWEN3, RawTensor, T5, find, models};

type Answer = Vec<(String, f32)>;

fn answer_of(engine: &mut Engine, is_t5: bool) -> Answer {
    let history =
        if is_t5 { vec![30, 300, 600, 31, 301, 601] } else { vec![25, 290, 540, 26, 291, 541] };
    let request = Request::from_tokens(history).with_beams(10).with_top_k(10);
    let answer = engine.recommend(&request).expect("a sound request");
    answer.items.into_iter().map(|found| (found.item, found.score)).collect()
}

fn answer(folder: &Folder) -> Answer {
    let mut engine = folder.open().unwrap_or_else(|error| panic!("{error}"));
    answer_of(&mut engine, folder.path().join("is_t5").exists())
}

fn t5() -> Folder {
    let folder = Folder::of(T5);
    folder.write("is_t5", "");
    folder
}

/// Asserts that the folder is refused, and that the error holds every word.
fn assert_refused(folder: &Folder, words: &[&str]) {
    let error = match folder.open() {
        Ok(_) => panic!("accepted, without {words:?}"),
        Err(error) => error,
    };
    let text = error.to_string();
    words.iter().for_each(|word| assert!(text.contains(word), "{text:?} does not say {word:?}"));
}

fn ignore(folder: &Folder, names: &[&str]) {
    folder.edit("sidereal.json", |layout| layout["ignore"] = json!(names));
}

fn add(folder: &Folder, name: &str, shape: &[usize], dtype: Dtype) {
    folder.edit_weights(|tensors| {
        let len = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        let (name, shape, data) = (name.into(), shape.to_vec(), vec![0; len]);
        tensors.push(RawTensor { name, dtype, shape, data });
    });
}

/// Copies a tensor under another name, with other numbers where asked.
fn copy(folder: &Folder, from: &str, to: &str, is_changed: bool) {
    folder.edit_weights(|tensors| {
        let RawTensor { dtype, shape, data, .. } = find(tensors, from);
        let (dtype, shape, mut data) = (*dtype, shape.clone(), data.clone());
        if is_changed {
            data.reverse(); // its own kind of nonsense, but finite
            data.iter_mut().skip(3).step_by(4).for_each(|byte| *byte = 0x3f);
        }
        tensors.push(RawTensor { name: to.into(), dtype, shape, data });
    });
}

fn rename(folder: &Folder, rename: impl Fn(&str) -> String) {
    folder.edit_weights(|tensors| {
        tensors.iter_mut().for_each(|tensor| tensor.name = rename(&tensor.name));
    });
}

const EMBEDDING: &str = "model.embed_tokens.weight";

#[test]
fn a_tied_head_that_is_written_out_is_used_where_it_differs() {
    let plain = answer(&Folder::of(QWEN3));
    let folder = Folder::of(QWEN3);
    copy(&folder, EMBEDDING, "lm_head.weight", false);
    assert_eq!(answer(&folder), plain);
    let folder = Folder::of(QWEN3);
    copy(&folder, EMBEDDING, "lm_head.weight", true);
    let own = answer(&folder);
    assert_ne!(own, plain);
    folder.edit("config.json", |config| config["tie_word_embeddings"] = json!(false));
    assert_eq!(answer(&folder), own);
}

#[test]
fn a_tensor_of_several_names_may_stand_under_any_of_them() {
    let plain = answer(&Folder::of(QWEN3));
    let folder = Folder::of(QWEN3);
    rename(&folder, |name| name.replace(EMBEDDING, "lm_head.weight"));
    assert_eq!(answer(&folder), plain);
    let plain = answer(&t5());
    for other in ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"] {
        let folder = t5();
        rename(&folder, |name| name.replace("shared.weight", other));
        assert_eq!(answer(&folder), plain, "{other}");
    }
}

#[test]
fn an_embedding_of_its_own_is_used_by_its_own_stack() {
    let mut answers = vec![answer(&t5())];
    for own in ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"] {
        let folder = t5();
        copy(&folder, "shared.weight", own, false);
        assert_eq!(answer(&folder), answers[0], "{own}");
        let folder = t5();
        copy(&folder, "shared.weight", own, true);
        answers.push(answer(&folder));
    }
    for (at, one) in answers.iter().enumerate() {
        assert!(!answers[..at].contains(one), "two stacks take each other's embedding");
    }
}

#[test]
fn a_head_that_is_missing_is_named_with_the_way_out() {
    let folder = Folder::of(QWEN3);
    folder.edit("config.json", |config| config["tie_word_embeddings"] = json!(false));
    assert_refused(&folder, &["lm_head.weight", "\"tie_word_embeddings\": true"]);
}

#[test]
fn a_missing_tensor_is_named_with_the_nearest_that_is_there() {
    let folder = Folder::of(QWEN3);
    rename(&folder, |name| {
        name.replace("layers.1.mlp.up_proj.weight", "layers.1.mlp.up_prj.weight")
    });
    assert_refused(&folder, &["layers.1.mlp.up_proj.weight", "layers.1.mlp.up_prj.weight"]);
}

#[test]
fn what_trainers_put_before_names_changes_nothing() {
    let plain = answer(&Folder::of(QWEN3));
    for prefix in ["module.", "_orig_mod.", "base_model.model.", "model.", "module._orig_mod."] {
        let folder = Folder::of(QWEN3);
        rename(&folder, |name| format!("{prefix}{name}"));
        assert_eq!(answer(&folder), plain, "{prefix}");
    }
    let folder = Folder::of(QWEN3);
    rename(&folder, |name| name.trim_start_matches("model.").into());
    assert_eq!(answer(&folder), plain, "the network without its head");
    let plain = answer(&t5());
    for prefix in ["model.", "module.", "trm.t5."] {
        let folder = t5();
        rename(&folder, |name| format!("{prefix}{name}"));
        assert_eq!(answer(&folder), plain, "{prefix}");
    }
    let folder = Folder::of(QWEN3);
    copy(&folder, EMBEDDING, "module.model.embed_tokens.weight", true);
    assert_refused(&folder, &["module.model.embed_tokens.weight", "both stand for", EMBEDDING]);
}

#[test]
fn a_tensor_that_nobody_reads_is_named_and_where_asked_ignored() {
    let plain = answer(&Folder::of(QWEN3));
    for (name, dtype) in [
        ("v_head.summary.weight", Dtype::F32),
        ("model.embed_tokens.position_ids", Dtype::I64),
        ("model.layers.0.self_attn.causal_mask", Dtype::BOOL),
        ("score.weight", Dtype::F16),
    ] {
        let folder = Folder::of(QWEN3);
        add(&folder, name, &[2, 4], dtype);
        assert_refused(&folder, &[name, "sidereal.json", "ignore"]);
        ignore(&folder, &[name]);
        assert_eq!(answer(&folder), plain, "{name}");
        let start = name.rsplit_once('.').expect("a dotted name").0;
        ignore(&folder, &["other.*", &format!("{start}.*")]);
        assert_eq!(answer(&folder), plain, "{start}.*");
    }
}

#[test]
fn stored_frequencies_of_rope_must_be_those_of_the_configuration() {
    let (folder, plain) = (Folder::of(QWEN3), answer(&Folder::of(QWEN3)));
    let config: Value = serde_json::from_slice(&folder.read("config.json")).expect("JSON");
    let head_dim = config["head_dim"].as_u64().expect("a size") as usize;
    let theta = config["rope_parameters"]["rope_theta"].as_f64().expect("a number");
    for (theta, is_right) in [(theta, true), (theta * 3.0, false)] {
        let folder = Folder::of(QWEN3);
        folder.edit_weights(|tensors| {
            let frequency = |pair| theta.powf(-2.0 * pair as f64 / head_dim as f64) as f32;
            let data: Vec<u8> =
                (0..head_dim / 2).flat_map(|pair| frequency(pair).to_le_bytes()).collect();
            let name = "model.layers.0.self_attn.rotary_emb.inv_freq".into();
            tensors.push(RawTensor { name, dtype: Dtype::F32, shape: vec![head_dim / 2], data });
        });
        match is_right {
            true => assert_eq!(answer(&folder), plain),
            false => assert_refused(&folder, &["rotary_emb.inv_freq"]),
        }
    }
}

#[test]
fn keys_of_unknown_effect_are_refused_and_where_asked_ignored() {
    let plain = answer(&Folder::of(QWEN3));
    for (key, value) in [
        ("embedding_multiplier", json!(12.0)),
        ("scale_emb", json!(12)),
        ("logits_scaling", json!(8.0)),
        ("attn_logit_softcapping", json!(50.0)),
        ("final_logit_softcapping", json!(30.0)),
        ("query_pre_attn_scalar", json!(64)),
        ("attention_multiplier", json!(0.1)),
        ("use_bidirectional_attention", json!(true)),
        ("is_causal", json!(false)),
        ("use_rope", json!(false)),
        ("no_rope_layers", json!([1, 0])),
        ("qkv_bias", json!(true)),
        ("pruned_heads", json!({"1": [0]})),
        ("auto_map", json!({"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})),
        ("vision_config", json!({"depth": 2})),
        ("num_experts", json!(8)),
    ] {
        let folder = Folder::of(QWEN3);
        folder.edit("config.json", |config| config[key] = value.clone());
        assert_refused(&folder, &[key, "sidereal.json", "ignore"]);
        ignore(&folder, &[key]);
        assert_eq!(answer(&folder), plain, "{key}");
    }
    for (key, value) in [
        ("embedding_multiplier", Value::Null),
        ("qkv_bias", json!(false)),
        ("pruned_heads", json!({})),
        ("attn_logit_softcapping", json!(0)),
        ("is_causal", json!(true)),
        ("torch_dtype", json!("bfloat16")),
        ("repetition_penalty", json!(1.2)),
        ("unsloth_version", json!("2025.1")),
    ] {
        let folder = Folder::of(QWEN3);
        folder.edit("config.json", |config| config[key] = value.clone());
        assert_eq!(answer(&folder), plain, "{key}");
    }
}

#[test]
fn quantised_weights_are_refused_by_name() {
    for (config, word) in [
        (
            json!({"quant_method": "compressed-tensors", "format": "float-quantized"}),
            "float-quantized",
        ),
        (json!({"quant_method": "gptq", "bits": 4}), "gptq"),
        (json!({"quant_method": "awq"}), "awq"),
        (json!({"quant_method": "bitsandbytes", "load_in_4bit": true}), "bitsandbytes"),
        (json!({"quant_method": "fp8"}), "fp8"),
    ] {
        let folder = Folder::of(QWEN3);
        folder.edit("config.json", |keys| keys["quantization_config"] = config);
        assert_refused(&folder, &["quantised with", word, "f32, f16 or bf16"]);
    }
    let folder = Folder::of(QWEN3);
    folder.write("quantize_config.json", "{}");
    assert_refused(&folder, &["quantised with", "GPTQ"]);
    // Where no file says it, the tensors do.
    let weight = "model.layers.1.mlp.up_proj.weight";
    let folder = Folder::of(QWEN3);
    rename(&folder, |name| name.replace(weight, "model.layers.1.mlp.up_proj.qweight"));
    assert_refused(&folder, &["quantised", "qweight"]);
    let folder = Folder::of(QWEN3);
    folder.edit_weights(|tensors| {
        let tensor = find(tensors, weight);
        tensor.data.truncate(tensor.data.len() / 4);
        tensor.dtype = Dtype::F8_E4M3;
    });
    assert_refused(&folder, &["quantised", weight, "F8_E4M3"]);
    let folder = Folder::of(QWEN3);
    add(&folder, "model.layers.1.mlp.up_proj.weight_scale", &[1], Dtype::F32);
    assert_refused(&folder, &["quantised", "weight_scale"]);
}

#[test]
fn a_class_of_a_training_script_is_known_by_its_model_type() {
    let plain = answer(&Folder::of(QWEN3));
    for classes in [json!(["MiniOneRec"]), json!([]), Value::Null] {
        let folder = Folder::of(QWEN3);
        folder.edit("config.json", |config| config["architectures"] = classes);
        assert_eq!(answer(&folder), plain);
    }
    let folder = Folder::of(QWEN3);
    folder.edit("config.json", |config| config["model_type"] = Value::Null);
    assert_eq!(answer(&folder), plain);
    let refused: [(Value, Value, &[&str]); 6] = [
        (json!(["Qwen3ForCausalLM"]), json!("llama"), &["Qwen3ForCausalLM", "llama", "correct"]),
        (json!(["Qwen3ForCausalLM"]), json!("granite"), &["granite", "correct"]),
        (json!(["Qwen3ForSequenceClassification"]), json!("qwen3"), &["SequenceClassification"]),
        (json!(["Own"]), json!("mamba"), &["Own", "T5ForConditionalGeneration"]),
        (Value::Null, json!("mamba"), &["mamba", "Qwen3ForCausalLM"]),
        (Value::Null, Value::Null, &["architectures", "model_type", "T5ForConditionalGeneration"]),
    ];
    for (classes, model_type, words) in refused {
        let folder = Folder::of(QWEN3);
        folder.edit("config.json", |config| {
            config["architectures"] = classes;
            config["model_type"] = model_type;
        });
        assert_refused(&folder, words);
    }
}

#[test]
fn of_two_spellings_of_rope_the_one_that_transformers_takes_counts() {
    let rope = |rope: Value| {
        let folder = Folder::of(QWEN3);
        folder.edit("config.json", |config| {
            config.as_object_mut().expect("an object").remove("rope_parameters");
            config
                .as_object_mut()
                .expect("an object")
                .extend(rope.as_object().expect("keys").clone());
        });
        folder
    };
    let linear = answer(&rope(json!({"rope_scaling": {"type": "linear", "factor": 2.0}})));
    let both = json!({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
                      "rope_scaling": {"rope_type": "linear", "factor": 2.0}});
    assert_eq!(answer(&rope(both)), linear);
    let newer = json!({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
                       "rope_scaling": null, "rope_theta": 77.0});
    assert_eq!(answer(&rope(newer)), linear);
    let nested = json!({"rope_parameters": {"full_attention":
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}});
    assert_eq!(answer(&rope(nested)), linear);
    // No context is longer than the trained length, up to which dynamic scaling changes nothing.
    let plain = answer(&rope(json!({})));
    assert_eq!(answer(&rope(json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}}))), plain);
    let refused: [(Value, &[&str]); 6] = [
        (
            json!({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}),
            &["longrope", "yarn"],
        ),
        (json!({"rope_type": "linear"}), &["factor"]),
        (json!({"rope_type": "linear", "type": "dynamic", "factor": 2.0}), &["linear", "dynamic"]),
        (json!({"rope_type": "default", "partial_rotary_factor": 0.5}), &["partial_rotary_factor"]),
        (json!({"rope_type": "default", "mrope_section": [1, 2, 3]}), &["mrope_section"]),
        (
            json!({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 99}),
            &["99", "equal"],
        ),
    ];
    for (scaling, words) in refused {
        assert_refused(&rope(json!({"rope_scaling": scaling})), words);
    }
}

#[test]
fn a_window_that_never_bites_changes_nothing_and_no_longer_context_is_taken() {
    let plain = answer(&Folder::of(QWEN3));
    let folder = Folder::of(QWEN3);
    folder.edit("config.json", |config| {
        config["layer_types"][1] = json!("sliding_attention");
        config["use_sliding_window"] = json!(true);
        config["sliding_window"] = json!(9);
    });
    assert_eq!(answer(&folder), plain);
    let request = Request::from_tokens(vec![25; 8]).with_beams(5);
    let outcome = folder.open().expect("a sound folder").recommend(&request);
    assert!(matches!(outcome, Err(Error::HistoryTooLong { .. })), "{outcome:?}");
    // A window that no layer uses is none.
    let folder = Folder::of(QWEN3);
    folder.edit("config.json", |config| config["sliding_window"] = json!(4));
    assert_eq!(answer(&folder), plain);
    let folder = Folder::of(QWEN3);
    folder.edit("config.json", |config| config["layer_types"][1] = json!("chunked_attention"));
    assert_refused(&folder, &["chunked_attention"]);
}

#[test]
fn the_decoder_starts_as_generate_does() {
    let start = |config: Value, generation: Option<Value>| {
        let folder = t5();
        folder.edit("config.json", |keys| keys["decoder_start_token_id"] = config);
        if let Some(generation) = generation {
            folder.write("generation_config.json", generation.to_string());
        }
        folder
    };
    let (zero, three) = (answer(&start(json!(0), None)), answer(&start(json!(3), None)));
    assert_ne!(zero, three);
    let generation = json!({"decoder_start_token_id": 3, "repetition_penalty": 1.2});
    assert_eq!(answer(&start(Value::Null, Some(generation.clone()))), three);
    assert_eq!(answer(&start(json!(0), Some(generation))), three);
    assert_eq!(answer(&start(json!(3), Some(json!({"eos_token_id": 1})))), three);
    let folder = start(json!(0), Some(json!({"decoder_start_token_id": 99_999})));
    assert_refused(&folder, &["generation_config.json", "99999"]);
}

#[test]
fn keys_of_t5_that_contradict_each_other_follow_transformers() {
    let plain = answer(&t5());
    let gelu = t5();
    gelu.edit("config.json", |config| {
        config["feed_forward_proj"] = json!("gelu_new");
        config.as_object_mut().expect("an object").remove("dense_act_fn");
    });
    let gelu = answer(&gelu);
    assert_ne!(gelu, plain);
    let folder = t5();
    folder.edit("config.json", |config| config["dense_act_fn"] = json!("gelu_new"));
    assert_eq!(answer(&folder), gelu);
}

#[test]
fn an_mt5_is_scaled_only_where_its_writer_did() {
    // An untied T5 that is not scaled is what an mT5 is.
    let folder = t5();
    copy(&folder, "shared.weight", "lm_head.weight", true);
    let set = |tie: Value, scale: Value, model_type: &str, class: &str, version: &str| {
        folder.edit("config.json", |config| {
            config["tie_word_embeddings"] = tie;
            config["scale_decoder_outputs"] = scale;
            config["model_type"] = json!(model_type);
            config["architectures"] = json!([class]);
            config["transformers_version"] = json!(version);
        });
    };
    let (t5, mt5) = ("T5ForConditionalGeneration", "MT5ForConditionalGeneration");
    set(json!(false), Value::Null, "t5", t5, "4.57.1");
    let unscaled = answer(&folder);
    set(json!(true), Value::Null, "t5", t5, "5.23.0");
    assert_ne!(answer(&folder), unscaled);
    for (tie, scale, version) in [
        (json!(true), Value::Null, "5.23.0"),
        (json!(true), json!(false), "5.23.0"),
        (json!(false), Value::Null, "4.57.1"),
        (Value::Null, Value::Null, "4.57.1"),
    ] {
        set(tie, scale, "mt5", mt5, version);
        assert_eq!(answer(&folder), unscaled);
    }
    set(json!(true), Value::Null, "mt5", mt5, "4.57.1");
    assert_refused(&folder, &["scale_decoder_outputs", "4.57.1"]);
}

#[test]
fn of_two_sources_of_weights_transformers_takes_the_single_file() {
    let (folder, plain) = (Folder::of(QWEN3), answer(&Folder::of(QWEN3)));
    folder.write(
        "model.safetensors.index.json",
        json!({"weight_map": {"a": "stale.safetensors"}}).to_string(),
    );
    folder.write("pytorch_model.bin", "stale");
    assert_eq!(answer(&folder), plain);
    folder.remove("model.safetensors");
    assert_refused(&folder, &["model.safetensors.index.json", "stale.safetensors", "not there"]);
    folder.remove("model.safetensors.index.json");
    assert_refused(&folder, &["pytorch_model.bin", "torch.save"]);
}

#[test]
fn a_folder_without_weights_says_what_it_has_instead() {
    let cases: [(&[&str], &[&str]); 6] = [
        (&[], &["no weights", "model.safetensors", "pytorch_model.bin"]),
        (
            &["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            &["index", "2 files"],
        ),
        (&["last.ckpt", "best.ckpt"], &["last.ckpt", "best.ckpt", "rename"]),
        (&["model-q4.gguf"], &["llama.cpp", "model-q4.gguf"]),
        (&["tf_model.h5"], &["TensorFlow", "save_pretrained"]),
        (&["adapter_model.safetensors"], &["adapter_model.safetensors", "adapter_config.json"]),
    ];
    for (names, words) in cases {
        let folder = Folder::of(QWEN3);
        folder.remove("model.safetensors");
        for name in names {
            folder.write(name, "bytes");
        }
        folder.write("optimizer.pt", "bytes");
        folder.write("training_args.bin", "bytes");
        assert_refused(&folder, words);
    }
}

// Files of torch.

fn seed(name: &str) -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/seeds/torch").join(name)
}

#[test]
fn a_file_of_torch_is_read_without_executing_it() {
    let mut weights = Weights::open_file(&seed("plain.bin")).expect("a sound file");
    let numbers: Vec<f32> = (0..12).map(|number| number as f32).collect();
    for name in ["a", "tied", "half", "bfloat"] {
        assert_eq!(weights.take(name, &[3, 4]).expect(name).to_vec(), numbers, "{name}");
    }
    let one_more: Vec<f32> = numbers.iter().map(|number| number + 1.0).collect();
    assert_eq!(weights.take("parameter", &[3, 4]).expect("one").to_vec(), one_more);
    assert_eq!(weights.take("row", &[4]).expect("a view").to_vec(), numbers[4..8]);
    assert_eq!(weights.take("empty", &[0, 4]).expect("nothing").to_vec(), [0.0; 0]);
    assert_eq!(weights.take("scalar", &[]).expect("a number").to_vec(), [7.0]);
    let transposed: Vec<f32> = (0..12).map(|at| numbers[at % 3 * 4 + at / 3]).collect();
    for name in ["transposed", "double"] {
        assert_eq!(weights.take(name, &[4, 3]).expect(name).to_vec(), transposed, "{name}");
    }
    let error = weights.take("ids", &[3]).err().expect("whole numbers").to_string();
    assert!(error.contains("ids") && error.contains("Long"), "{error}");
}

#[test]
fn a_checkpoint_of_a_trainer_holds_its_state_dict_under_a_known_key() {
    for name in ["protocol_2.ckpt", "protocol_4.pth"] {
        let weights = Weights::open_file(&seed(name)).expect("a sound file");
        assert_eq!(weights.shapes(), [("a".into(), vec![3, 4]), ("b".into(), vec![4])], "{name}");
        let notes = weights.notes().join("; ");
        assert!(notes.contains("optimizer") && notes.contains("config"), "{notes}");
    }
}

#[test]
fn files_of_torch_that_hold_something_else_say_what_to_do() {
    for (name, words) in [
        ("two_dicts.pt", ["ema_state_dict", "torch.save"]),
        ("no_dict.pt", ["no state dict", "torch.save"]),
        ("object.pt", ["torch.nn.modules.linear.Linear", "state_dict()"]),
        ("legacy.pt", ["before version 1.6", "torch.save"]),
        ("expanded.pt", ["[40, 4]", "numbers"]),
    ] {
        let error = match Weights::open_file(&seed(name)) {
            Ok(_) => panic!("{name} was read"),
            Err(error) => error.to_string(),
        };
        words
            .iter()
            .for_each(|word| assert!(error.contains(word), "{error:?} does not say {word:?}"));
    }
}

// Adapters.

/// A copy of a folder with an adapter over another golden folder, whose base is named by its path.
fn adapter() -> Folder {
    let folder = Folder::of(QWEN3);
    for name in ["adapter_config.json", "adapter_model.bin"] {
        let from = models().join("decoder_only/qwen2-lora").join(name);
        std::fs::copy(from, folder.path().join(name)).expect("a checkpoint of the repository");
    }
    folder.remove("config.json");
    folder.remove("model.safetensors");
    let base = models().join("decoder_only/qwen2-untied");
    folder.edit("adapter_config.json", |keys| keys["base_model_name_or_path"] = json!(base));
    folder
}

#[test]
fn an_adapter_finds_its_base_or_says_how_to_name_it() {
    let right = answer(&adapter());
    let folder = adapter();
    folder.edit("adapter_config.json", |keys| {
        keys["base_model_name_or_path"] = json!("Qwen/Qwen2-0.5B")
    });
    assert_refused(&folder, &["Qwen/Qwen2-0.5B", "--base", "merge_and_unload"]);
    let base = models().join("decoder_only/qwen2-untied");
    let options = RecommenderOptions::new("cpu").with_base(&base);
    let catalog = INDUSTRIAL.clone();
    let recommender = Recommender::open(folder.path(), catalog, &options).expect("a named base");
    let request =
        Request::from_tokens(vec![25, 290, 540, 26, 291, 541]).with_beams(10).with_top_k(10);
    let found = recommender.recommend(&request).expect("a sound request");
    let found: Answer = found.items.into_iter().map(|found| (found.item, found.score)).collect();
    assert_eq!(found, right);
    // A base beside an adapter that names another one.
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(base.join(name), folder.path().join(name)).expect("a checkpoint");
    }
    assert_refused(&folder, &["Qwen/Qwen2-0.5B", "\"base_model_name_or_path\": \".\"", "remove"]);
    folder.edit("adapter_config.json", |keys| keys["base_model_name_or_path"] = json!("."));
    assert_eq!(answer(&folder), right);
    ignore(&folder, &["adapter_config.json"]);
    assert_ne!(answer(&folder), right);
    // A base without an adapter.
    let folder = Folder::of(QWEN3);
    let outcome = Recommender::open(folder.path(), INDUSTRIAL.clone(), &options);
    let error = outcome.err().expect("nothing to merge").to_string();
    assert!(error.contains("adapter_config.json"), "{error}");
}

#[test]
fn what_an_adapter_asks_for_beyond_lora_is_refused_by_name() {
    for (key, value, word) in [
        ("peft_type", json!("IA3"), "IA3"),
        ("peft_type", Value::Null, "nothing"),
        ("use_dora", json!(true), "DoRA"),
        ("init_lora_weights", json!("pissa_niter_16"), "pissa"),
        ("layer_replication", json!([[0, 2]]), "layer_replication"),
        ("trainable_token_indices", json!([1, 2]), "trainable_token_indices"),
        ("target_parameters", json!(["experts"]), "target_parameters"),
        ("lora_bias", json!(true), "lora_bias"),
        ("lora_alpha", Value::Null, "lora_alpha"),
        ("lora_alpha", json!("8"), "lora_alpha"),
        ("r", json!(7), "rank 2"),
        ("rank_pattern", json!({"up_proj": 3}), "rank 2"),
        ("alpha_pattern", json!({"layers\\.[01]\\..*": 3}), "layers"),
        ("alpha_pattern", json!([3]), "not an object"),
    ] {
        let folder = adapter();
        folder.edit("adapter_config.json", |keys| keys[key] = value.clone());
        assert_refused(&folder, &["adapter_config.json", word]);
    }
    let folder = adapter();
    folder.remove("adapter_model.bin");
    assert_refused(&folder, &["adapter_model.safetensors", "adapter_model.bin"]);
    // Another base has other layers, or other shapes.
    let folder = adapter();
    let base = models().join("decoder_only/llama3-scaled");
    folder.edit("adapter_config.json", |keys| keys["base_model_name_or_path"] = json!(base));
    assert_refused(&folder, &["base"]);
}

#[test]
fn tied_tensors_that_are_replaced_stay_tied() {
    let folder = t5();
    copy(&folder, "shared.weight", "encoder.embed_tokens.weight", false);
    let mut weights = Weights::open(folder.path()).expect("weights");
    let (_, shape) =
        weights.shapes().into_iter().find(|(name, _)| name == "shared.weight").expect("one");
    let len = shape.iter().product::<usize>();
    let other = sidereal::Tensor::new(&shape, vec![0.5; len]);
    weights.replace(vec![("shared.weight".into(), other.clone())]).expect("its shape");
    let both = weights.take_tied(&["shared.weight", "encoder.embed_tokens.weight"], &shape);
    assert!(both.expect("both").iter().all(|tensor| tensor.is_equal(&other)));
}

// Items.

#[test]
fn a_code_that_is_not_the_last_number_of_its_text_is_read() {
    let folder = folders::temp();
    let names = |sid: [u32; 3]| {
        let texts =
            sid.iter().enumerate().map(|(level, code)| format!("<sid_{code}_level{level}>"));
        json!(texts.collect::<Vec<_>>())
    };
    let sids = [[3, 1, 4], [1, 5, 9], [2, 6, 5], [3, 5, 8]];
    let index: serde_json::Map<String, Value> =
        sids.iter().enumerate().map(|(item, sid)| (format!("i{item}"), names(*sid))).collect();
    let index = folders::write(&folder, "items.index.json", Value::Object(index).to_string());
    let lines = sids.iter().enumerate().map(|(item, sid)| {
        json!({"item": format!("i{item}"), "sid": names(*sid), "title": "one"}).to_string()
    });
    let lines = folders::write(&folder, "items.jsonl", lines.collect::<Vec<_>>().join("\n"));
    for path in [index, lines] {
        let catalog = sidereal::catalog::Catalog::open(&path).expect("sound items");
        let snapshot = catalog.snapshot();
        for (item, sid) in sids.iter().enumerate() {
            let item = snapshot.find(&format!("i{item}")).expect("an item");
            let codes: Vec<u32> =
                snapshot.sid(item).codes().iter().map(|&code| code.into()).collect();
            assert_eq!(codes, sid);
        }
        assert_eq!(catalog.warning(), None);
    }
}

#[test]
fn a_catalog_of_one_semantic_id_warns() {
    let folder = folders::temp();
    let lines = (0..40)
        .map(|item| json!({"item": format!("{item}"), "sid": [0, 1, 2 + item / 39]}).to_string());
    let path = folders::write(&folder, "items.jsonl", lines.collect::<Vec<_>>().join("\n"));
    let catalog = sidereal::catalog::Catalog::open(&path).expect("sound items");
    let warning = catalog.warning().expect("39 of 40 on one");
    assert!(warning.contains("39 of 40") && warning.contains("[0, 1, 2]"), "{warning}");
    assert_eq!(INSTRUMENTS.warning(), None);
}

#[test]
fn a_file_of_codebooks_may_hold_nothing_that_nobody_reads() {
    let folder = Folder::of(QWEN3);
    folder.edit_weights(|tensors| {
        let data = (0..8u32).flat_map(|number| (number as f32).to_le_bytes()).collect();
        let name = "codebooks.0".into();
        *tensors = vec![RawTensor { name, dtype: Dtype::F32, shape: vec![4, 2], data }];
    });
    let path = folder.path().join("model.safetensors");
    assert!(sidereal::quantizer::Quantizer::open(&path).is_ok());
    add(&folder, "decoder.mlp_layers.0.weight", &[2, 2], Dtype::F32);
    assert!(sidereal::quantizer::Quantizer::open(&path).is_ok());
    add(&folder, "encoder.0.weight", &[2, 2], Dtype::F32);
    let error = sidereal::quantizer::Quantizer::open(&path).err().expect("an encoder").to_string();
    assert!(error.contains("encoder.0.weight") && error.contains("remove"), "{error}");
    let _ = EngineOptions::default();
}

/// Tokens that depend on the code before them, as EAGER's: the second level's codes are pairs.
#[test]
fn a_level_of_pairs_has_a_token_for_each_code_after_each_first_code() {
    let folder = Folder::of(QWEN3);
    folder.write(
        "sidereal.json",
        r#"{"levels": [{"size": 8, "first_token": 4}, {"size": 64, "first_token": 12}]}"#,
    );
    let items: String = (0..64)
        .map(|pair| format!("{{\"item\": \"{pair}\", \"sid\": [{}, {pair}]}}\n", pair / 8))
        .collect();
    let path = folder.write("items.jsonl", items);
    let catalog = Arc::new(Catalog::open(&path).expect("sound items"));
    let mut engine = folder.open_with(&catalog).expect("a sound checkpoint");
    let request = Request::from_history(["13", "60"]).with_beams(64);
    let answer = engine.recommend(&request.with_top_k(64)).expect("a sound request");
    assert_eq!(answer.items.len(), 64);
    let read = |engine: &mut Engine, tokens: Vec<u32>, token: u32| {
        let request = Request::from_tokens(tokens).with_read(vec![NamedToken::Id(token)]);
        engine.recommend(&request).expect("a sound request").read[0].log_prob
    };
    let prompt = [4 + 1, 12 + 13, 4 + 7, 12 + 60];
    for item in &answer.items {
        let pair: u32 = item.item.parse().expect("a number");
        let (first, second) = (4 + pair / 8, 12 + pair);
        let after: Vec<u32> = prompt.iter().copied().chain([first]).collect();
        let expected = read(&mut engine, prompt.to_vec(), first) + read(&mut engine, after, second);
        assert!((item.score - expected).abs() < 1e-4, "{item:?}, not {expected}");
    }
}
