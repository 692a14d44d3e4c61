//! A second truth, written by others: our logits are those of candle-transformers.
//!
//! Both compute in f32 on the same weights. Ours takes prompts of several lengths through one
//! constrained search. Before each of its steps, the logits of every beam over the whole
//! vocabulary stand against one pass of candle's network, without a cache, over the prompt and the
//! beam's tokens: positions, slots and the ancestors of beams are compared as well as the layers.
//! After each step the beams' scores stand against the same passes.
//!
//! `cargo test --release --features candle-truth --test candle -- --nocapture` prints how far the
//! two are apart.

mod common;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, qwen2, qwen3, t5};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use sidereal::backend::cpu::CpuBackend;
use sidereal::backend::prelude::*;
use sidereal::backend::testing::Fixture;
use sidereal::backend::{Batch, Beam, SearchRule, StepChoice};
use sidereal::catalog::Catalog;
use sidereal::models;
use sidereal::models::config::{Config, SidLayout};
use sidereal::models::weights::Weights;

/// Beams that each search keeps.
const BEAMS: usize = 12;
/// Tokens of one more prompt: more than any distance that T5's buckets tell apart.
const LONG_PROMPT: usize = 300;
/// How far two logits may be apart.
const TOLERANCE: f64 = 1e-4;
/// The same, as a share of the largest logit, for the T5 checkpoints as they are: their random
/// weights lack the scale of attention, so their softmax is steep and rounding alone moves logits
/// far. Each side is up to 2e-4 (`relu-tied`) and 2e-3 (`gated-untied`) away from the same network
/// in f64, and with other orders of summation the two were up to 4e-4 and 5e-3 apart. With soft
/// attention the same checkpoints are held to [`TOLERANCE`].
const STEEP_TOLERANCE: f64 = 2e-4;

#[derive(Deserialize)]
struct Golden {
    items_index: String,
    #[serde(default)]
    cases: Vec<Case>,
    #[serde(default)]
    children: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    input_ids: Vec<u32>,
}

/// What a model folder holds; a test may change it before both sides read it.
struct Checkpoint {
    folder: PathBuf,
    config: Map<String, Value>,
    tensors: HashMap<String, Tensor>,
}

fn read<T: DeserializeOwned>(path: &Path) -> T {
    let text = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

impl Checkpoint {
    fn read(folder: &str) -> Checkpoint {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models").join(folder);
        let mut tensors = HashMap::new();
        for entry in std::fs::read_dir(&folder).expect("a model folder") {
            let path = entry.expect("a model folder").path();
            if path.extension().is_some_and(|extension| extension == "safetensors") {
                let part = candle_core::safetensors::load(&path, &Device::Cpu);
                tensors.extend(part.unwrap_or_else(|error| panic!("{}: {error}", path.display())));
            }
        }
        Checkpoint { config: read(&folder.join("config.json")), tensors, folder }
    }

    fn tensor(&self, name: &str) -> Tensor {
        let tensor = self.tensors.get(name);
        tensor.unwrap_or_else(|| panic!("{name} is missing")).clone()
    }

    fn number(&self, key: &str) -> f64 {
        let number = self.config[key].as_f64();
        number.unwrap_or_else(|| panic!("{key} is no number"))
    }

    /// The weights as candle reads them.
    fn variables(&self) -> VarBuilder<'static> {
        VarBuilder::from_tensors(self.tensors.clone(), DType::F32, &Device::Cpu)
    }

    /// The output head, `[vocabulary][columns]`: the embedding where the two are tied.
    fn head(&self) -> Vec<Vec<f32>> {
        let names = ["lm_head.weight", "model.embed_tokens.weight", "shared.weight"];
        let head = names.iter().find_map(|&name| self.tensors.get(name));
        let head = head.expect("every network has a head or an embedding");
        let head = head.to_dtype(DType::F32).and_then(|head| head.to_vec2());
        head.expect("the head is a matrix")
    }

    /// The prompts of the golden cases, each once, and a long one.
    fn prompts(&self, golden: &Golden) -> Vec<Vec<u32>> {
        let mut prompts: Vec<Vec<u32>> = Vec::new();
        for case in golden.cases.iter().chain(&golden.children) {
            if !prompts.contains(&case.input_ids) {
                prompts.push(case.input_ids.clone());
            }
        }
        let tokens = prompts.iter().flatten().copied().cycle();
        let long: Vec<u32> = tokens.take(LONG_PROMPT).collect();
        assert_eq!(long.len(), LONG_PROMPT, "the golden cases have tokens");
        prompts.push(long);
        prompts
    }

    /// Gives the queries of a T5 the scale of attention, `1 / sqrt(d_kv)`, that a trained one holds
    /// in their weights.
    fn soften_attention(&mut self) {
        let scale = self.number("d_kv").powf(-0.5);
        for (name, weight) in &mut self.tensors {
            if name.ends_with(".q.weight") {
                *weight = (&*weight * scale).expect("weights are numbers");
            }
        }
    }

    /// Compares ours with candle's network, which is given a prompt and what a beam wrote.
    fn compare<F: FnMut(&[u32], &[u32]) -> candle_core::Result<Tensor>>(
        &self,
        tolerance: f64,
        network: F,
    ) {
        let golden: Golden = read(&self.folder.join("golden.json"));
        let prompts = self.prompts(&golden);
        let catalog = Catalog::open(&self.folder.join(&golden.items_index)).expect("a catalogue");
        let catalog = catalog.snapshot();
        let head = self.head();
        let layout = SidLayout::read(&self.folder, head.len()).expect("a layout");

        // Ours reads weights from files only.
        let files = tempfile::tempdir().expect("a folder can be made");
        candle_core::safetensors::save(&self.tensors, files.path().join("model.safetensors"))
            .expect("weights can be written");
        let weights = Weights::open(files.path()).expect("a checkpoint");
        let config = Config::new(&self.folder.join("config.json"), self.config.clone());
        let backend = CpuBackend::default();
        let model = models::load(&backend, &config, weights, &layout).expect("a network");

        let spec = *model.spec();
        let mut fixture =
            Fixture::with_layout(&backend, spec.kv, spec.prompt.start_token()).expect("memory");
        let allowed_set = catalog.allowed_set(&[], None).expect("no filter");
        let mut slots: Vec<_> = prompts.iter().map(|prompt| fixture.slot(prompt.len())).collect();
        let (mut pass, mut scores) = (Arc::clone(&model).new_pass(&backend), backend.logits());
        let mut truth = Truth::new(network, tolerance);
        let whole: Vec<_> = prompts.iter().map(|prompt| 0..prompt.len()).collect();
        let num_levels = layout.levels.len();
        for step in 0..num_levels + layout.suffix.len() {
            let (tokens, chunks) = match step {
                0 => (prompts.concat(), &whole[..]),
                _ => (Vec::new(), &[][..]),
            };
            let mut batch = Batch::new(&fixture.memory, chunks, &mut slots);
            pass.run(&backend, &tokens, &mut batch);
            let hidden = pass.output();
            let mut rows = hidden.values().chunks_exact(hidden.num_columns());
            for (prompt, slot) in prompts.iter().zip(&slots) {
                for beam in backend.read_beams(&[slot]).remove(0).expect("scores are finite") {
                    let ours = logits(rows.next().expect("every beam has a row"), &head);
                    truth.check_logits(prompt, &beam.tokens, &ours);
                }
            }
            assert!(rows.next().is_none(), "every row is a beam's");
            let depth = step.min(num_levels);
            let choice = match step {
                level if level < num_levels => StepChoice::Level(level),
                _ => {
                    let token = layout.suffix[step - num_levels];
                    StepChoice::Forced { token, is_counted: true }
                }
            };
            let rule =
                SearchRule { choice, depth, ..SearchRule::new(&catalog, &allowed_set, 0, BEAMS) };
            let rules = vec![rule; prompts.len()];
            let mut pass = Batch::new(&fixture.memory, &[], &mut slots);
            backend.lm_head(hidden, model.head(), &rules, &mut pass, &mut scores);
            backend.advance_beams(&scores, model.head(), &rules, &mut pass);
            for (prompt, slot) in prompts.iter().zip(&slots) {
                let beams = backend.read_beams(&[slot]).remove(0).expect("scores are finite");
                assert_eq!(beams.len(), BEAMS);
                beams.iter().for_each(|beam| truth.check_score(prompt, beam));
            }
        }
        let (folder, num_passes) = (self.folder.display(), truth.passes.len());
        let Truth { largest_logit, worst_logit, worst_score, .. } = truth;
        println!(
            "{folder}: logits of {num_passes} beams, up to {largest_logit:.1}, within \
             {worst_logit:.1e}; their scores within {worst_score:.1e}"
        );
    }
}

/// candle's network, and what came of it so far.
struct Truth<F> {
    network: F,
    tolerance: f64,
    /// By prompt and tokens written.
    passes: HashMap<(Vec<u32>, Vec<u32>), Pass>,
    largest_logit: f64,
    worst_logit: f64,
    worst_score: f64,
}

struct Pass {
    /// The score of the tokens written.
    score: f64,
    /// What may follow them.
    logits: Vec<f32>,
}

impl<F: FnMut(&[u32], &[u32]) -> candle_core::Result<Tensor>> Truth<F> {
    fn new(network: F, tolerance: f64) -> Truth<F> {
        Truth {
            network,
            tolerance,
            passes: HashMap::new(),
            largest_logit: 0.0,
            worst_logit: 0.0,
            worst_score: 0.0,
        }
    }

    fn check_logits(&mut self, prompt: &[u32], written: &[u32], ours: &[f64]) {
        let what = format!("{} tokens, then {written:?}", prompt.len());
        let theirs = (self.network)(prompt, written);
        let theirs = theirs.and_then(|logits| logits.flatten_all()?.to_vec1::<f32>());
        let theirs = theirs.expect("candle runs the network");
        assert_eq!(ours.len(), theirs.len(), "{what}: size of the vocabulary");
        for (token, (ours, &theirs)) in ours.iter().zip(&theirs).enumerate() {
            let are_finite = ours.is_finite() && theirs.is_finite();
            assert!(are_finite, "{what}: token {token} has logits {ours} and {theirs}");
            self.largest_logit = self.largest_logit.max(ours.abs());
        }
        let difference = |token: &usize| (ours[*token] - f64::from(theirs[*token])).abs();
        let by_difference = |a: &usize, b: &usize| difference(a).total_cmp(&difference(b));
        let worst = (0..ours.len()).max_by(by_difference).expect("a vocabulary has tokens");
        assert!(
            difference(&worst) < self.tolerance,
            "{what}: token {worst} has logit {}, candle's is {}",
            ours[worst],
            theirs[worst]
        );
        self.worst_logit = self.worst_logit.max(difference(&worst));
        let pass = Pass { score: self.score(prompt, written), logits: theirs };
        self.passes.insert((prompt.to_vec(), written.to_vec()), pass);
    }

    /// The score of written tokens, by the passes over those before each.
    fn score(&self, prompt: &[u32], written: &[u32]) -> f64 {
        let Some((&token, before)) = written.split_last() else { return 0.0 };
        let Pass { score, logits } = &self.passes[&(prompt.to_vec(), before.to_vec())];
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let from_largest = |logit: f32| f64::from(logit) - f64::from(largest);
        let sum: f64 = logits.iter().map(|&logit| from_largest(logit).exp()).sum();
        score + from_largest(logits[token as usize]) - sum.ln()
    }

    /// The score shows that our search read these logits, through the head that the model loaded.
    fn check_score(&mut self, prompt: &[u32], beam: &Beam) {
        let (ours, theirs) = (f64::from(beam.score), self.score(prompt, &beam.tokens));
        let difference = (ours - theirs).abs();
        // Each step adds a logit and takes away a normaliser, both within the tolerance.
        let tolerance = 2.0 * beam.tokens.len() as f64 * self.tolerance;
        assert!(
            difference < tolerance,
            "{} tokens, then {:?}: scores {ours}, by candle {theirs}",
            prompt.len(),
            beam.tokens
        );
        self.worst_score = self.worst_score.max(difference);
    }
}

/// `head hidden`, in f64.
fn logits(hidden: &[f32], head: &[Vec<f32>]) -> Vec<f64> {
    let product = |weights: &Vec<f32>| {
        let pairs = weights.iter().zip(hidden);
        pairs.map(|(&x, &y)| f64::from(x) * f64::from(y)).sum()
    };
    assert_eq!(head[0].len(), hidden.len(), "columns of the head");
    head.iter().map(product).collect()
}

/// Tokens as candle's networks take them, `[1, tokens]`.
fn batch(tokens: &[u32]) -> candle_core::Result<Tensor> {
    Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)
}

/// candle-transformers departs from Hugging Face's T5 in two places that this works around.
///
/// It multiplies what a tied head reads by `sqrt(d_model)` where Hugging Face divides. So candle is
/// always given a head of its own, which it does not scale, with the embedding's weights where
/// ours has a tied one; and its logits are scaled here, as Hugging Face would.
///
/// It gives distances in the decoder the buckets of the encoder. They are the same for the near
/// distances that have a bucket each, and a semantic ID has no far ones.
fn compare_t5(checkpoint: &Checkpoint, tolerance: f64) {
    let keys = &checkpoint.config;
    let flag = |key: &str| keys.get(key).and_then(Value::as_bool);
    let is_tied = flag("tie_word_embeddings").unwrap_or(true);
    let scale = match flag("scale_decoder_outputs").unwrap_or(is_tied) {
        true => checkpoint.number("d_model").powf(-0.5),
        false => 1.0,
    };
    let start_token = checkpoint.number("decoder_start_token_id") as u32;
    let num_near = checkpoint.number("relative_attention_num_buckets") as usize / 4;

    let mut tensors = checkpoint.tensors.clone();
    let head = tensors.entry("lm_head.weight".into());
    head.or_insert_with(|| checkpoint.tensor("shared.weight"));
    let mut keys = keys.clone();
    keys.insert("tie_word_embeddings".into(), false.into());
    keys.insert("use_cache".into(), false.into());
    let config: t5::Config = serde_json::from_value(keys.into()).expect("candle knows T5's keys");
    let variables = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let model = t5::T5ForConditionalGeneration::load(variables, &config);
    let mut model = model.expect("a checkpoint");
    checkpoint.compare(tolerance, |prompt, written| {
        let read = [&[start_token], written].concat();
        assert!(read.len() <= num_near, "the decoder has near distances only");
        model.forward(&batch(prompt)?, &batch(&read)?)? * scale
    });
}

fn compare_qwen3(checkpoint: &Checkpoint) {
    let config: qwen3::Config = in_the_spelling_of_transformers_4(&checkpoint.config);
    let model = qwen3::ModelForCausalLM::new(&config, checkpoint.variables());
    let mut model = model.expect("a checkpoint");
    checkpoint.compare(TOLERANCE, |prompt, written| {
        model.clear_kv_cache();
        model.forward(&batch(&[prompt, written].concat())?, 0)
    });
}

fn compare_llama(checkpoint: &Checkpoint) {
    let config: llama::LlamaConfig = in_the_spelling_of_transformers_4(&checkpoint.config);
    let config = config.into_config(false);
    let model = llama::Llama::load(checkpoint.variables(), &config).expect("a checkpoint");
    let mut no_cache = llama::Cache::new(false, DType::F32, &config, &Device::Cpu).expect("RoPE");
    checkpoint.compare(TOLERANCE, |prompt, written| {
        model.forward(&batch(&[prompt, written].concat())?, 0, &mut no_cache)
    });
}

/// The configuration of a decoder-only network as candle reads it: the base of RoPE stands beside
/// its scaling, and a window has a size even where it is not used.
fn in_the_spelling_of_transformers_4<T: DeserializeOwned>(config: &Map<String, Value>) -> T {
    let mut config = config.clone();
    if let Some(rope) = config.remove("rope_parameters") {
        config.insert("rope_theta".into(), rope["rope_theta"].clone());
        if rope["rope_type"] != "default" {
            config.insert("rope_scaling".into(), rope);
        }
    }
    if config.get("sliding_window").is_some_and(Value::is_null) {
        let window = config["max_position_embeddings"].clone();
        config.insert("sliding_window".into(), window);
    }
    serde_json::from_value(config.into()).expect("candle knows the keys")
}

#[test]
fn t5_with_relu_and_a_tied_head_agrees_with_candle() {
    compare_t5(&Checkpoint::read("t5/relu-tied"), 5.0 * STEEP_TOLERANCE);
}

#[test]
fn t5_with_gated_gelu_and_an_unscaled_head_agrees_with_candle() {
    compare_t5(&Checkpoint::read("t5/gated-untied"), 36.0 * STEEP_TOLERANCE);
}

#[test]
fn t5_with_soft_attention_and_a_tied_head_agrees_with_candle() {
    let mut checkpoint = Checkpoint::read("t5/relu-tied");
    checkpoint.soften_attention();
    compare_t5(&checkpoint, TOLERANCE);
}

#[test]
fn t5_with_soft_attention_and_a_head_of_its_own_agrees_with_candle() {
    let mut checkpoint = Checkpoint::read("t5/gated-untied");
    checkpoint.soften_attention();
    // Each token has the embedding of another, at the size of a head that nothing scales.
    let scale = checkpoint.number("d_model").powf(-0.5);
    let shared = checkpoint.tensor("shared.weight");
    let head = shared.roll(1, 0).and_then(|rows| rows * scale);
    let head = head.expect("the embedding is a matrix");
    checkpoint.tensors.insert("lm_head.weight".into(), head);
    // The checkpoints of T5 1.1 spell it so.
    checkpoint.config.remove("scale_decoder_outputs");
    let keys = &mut checkpoint.config;
    keys.insert("tie_word_embeddings".into(), false.into());
    compare_t5(&checkpoint, TOLERANCE);
}

#[test]
fn t5_with_soft_attention_and_a_shallow_decoder_agrees_with_candle() {
    let mut checkpoint = Checkpoint::read("t5/uneven-depth");
    checkpoint.soften_attention();
    compare_t5(&checkpoint, TOLERANCE);
}

#[test]
fn qwen3_agrees_with_candle() {
    compare_qwen3(&Checkpoint::read("decoder_only/qwen3-tied"));
}

#[test]
fn qwen3_in_bf16_with_a_forced_suffix_agrees_with_candle() {
    compare_qwen3(&Checkpoint::read("decoder_only/qwen3-suffix"));
}

#[test]
fn qwen3_with_a_head_of_its_own_agrees_with_candle() {
    compare_qwen3(&Checkpoint::read("decoder_only/qwen3-prompt"));
}

#[test]
fn qwen3_with_biases_agrees_with_candle() {
    let mut checkpoint = Checkpoint::read("decoder_only/qwen3-tied");
    let keys = &mut checkpoint.config;
    keys.insert("attention_bias".into(), true.into());
    for layer in 0..checkpoint.number("num_hidden_layers") as usize {
        for projection in ["q_proj", "k_proj", "v_proj", "o_proj"] {
            let name = format!("model.layers.{layer}.self_attn.{projection}");
            let weight = checkpoint.tensor(&format!("{name}.weight"));
            // Any numbers of a weight's size will do: here, the first column.
            let bias = weight.narrow(1, 0, 1).and_then(|column| column.flatten_all());
            let bias = bias.expect("a matrix");
            checkpoint.tensors.insert(format!("{name}.bias"), bias);
        }
    }
    compare_qwen3(&checkpoint);
}

#[test]
fn qwen2_agrees_with_candle() {
    let checkpoint = Checkpoint::read("decoder_only/qwen2-untied");
    let config: qwen2::Config = in_the_spelling_of_transformers_4(&checkpoint.config);
    let model = qwen2::ModelForCausalLM::new(&config, checkpoint.variables());
    let mut model = model.expect("a checkpoint");
    checkpoint.compare(TOLERANCE, |prompt, written| {
        model.clear_kv_cache();
        model.forward(&batch(&[prompt, written].concat())?, 0)
    });
}

#[test]
fn llama_with_scaled_rope_agrees_with_candle() {
    compare_llama(&Checkpoint::read("decoder_only/llama3-scaled"));
}

#[test]
fn llama_in_f16_with_a_tied_head_agrees_with_candle() {
    compare_llama(&Checkpoint::read("decoder_only/llama-tied"));
}
