//! Engines of a few hundred weights, drawn at random: small enough for thousands of searches.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};
use sidereal::backend::cpu::CpuBackend;
use sidereal::catalog::sid::Sid;
use sidereal::catalog::{Catalog, CatalogBuilder, Item};
use sidereal::models::config::{Config, Prompt, SidLayout};
use sidereal::models::weights::Weights;
use sidereal::{Engine, EngineOptions, Normalization};

/// A model and catalog; equal seeds give equal ones, whatever the number of threads.
pub struct Tiny {
    seed: u64,
    config: Value,
    layout: SidLayout,
    pub catalog: Arc<Catalog>,
}

impl Tiny {
    pub fn new(seed: u64) -> Tiny {
        let mut rng = fastrand::Rng::with_seed(seed);
        let num_levels = rng.usize(1..5);
        let num_codes = rng.u16(1..7);
        let catalog = Arc::new(random_catalog(&mut rng, num_levels, num_codes));
        let first = |level: usize| 5 + level as u32 * u32::from(num_codes);
        let tokens = |level| (first(level)..first(level) + u32::from(num_codes)).collect();
        let mut some = |most: usize| (0..rng.usize(0..=most)).map(|_| rng.u32(0..5)).collect();
        let layout = SidLayout {
            levels: (0..num_levels).map(tokens).collect(),
            prompt: Prompt {
                prefix: some(2),
                suffix: some(2),
                separator: some(1),
                max_items: None,
            },
            suffix: some(2),
            normalization: Normalization::Vocabulary,
        };
        let vocab_size = first(num_levels) + 3;
        let config = match rng.bool() {
            true => t5(&mut rng, vocab_size),
            false => decoder_only(&mut rng, vocab_size),
        };
        Tiny { seed, config, layout, catalog }
    }

    pub fn open(&self, threads: usize) -> Engine {
        let keys = self.config.as_object().cloned().expect("an object");
        let config = Config::new(Path::new("config.json"), keys);
        let options = EngineOptions { threads, ..EngineOptions::default() };
        let weights = Weights::random(self.seed);
        let catalog = Arc::clone(&self.catalog);
        let backend = CpuBackend::default();
        Engine::from_parts(backend, &config, weights, self.layout.clone(), catalog, &options)
            .expect("a sound model")
    }
}

fn t5(rng: &mut fastrand::Rng, vocab_size: u32) -> Value {
    let projections = ["relu", "gated-gelu", "gated-silu", "gelu"];
    json!({
        "architectures": ["T5ForConditionalGeneration"], "vocab_size": vocab_size,
        "d_model": rng.usize(1..12), "d_kv": rng.usize(1..9), "d_ff": rng.usize(1..20),
        "num_layers": rng.usize(1..3), "num_decoder_layers": rng.usize(1..3),
        "num_heads": rng.usize(1..4), "feed_forward_proj": projections[rng.usize(0..4)],
        "tie_word_embeddings": rng.bool(),
    })
}

fn decoder_only(rng: &mut fastrand::Rng, vocab_size: u32) -> Value {
    let names = ["Qwen3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM"];
    let kv_heads = rng.usize(1..3);
    json!({
        "architectures": [names[rng.usize(0..3)]], "vocab_size": vocab_size,
        "hidden_size": rng.usize(1..12), "intermediate_size": rng.usize(1..20),
        "num_hidden_layers": rng.usize(1..3), "num_attention_heads": kv_heads * rng.usize(1..3),
        "num_key_value_heads": kv_heads, "head_dim": 2 * rng.usize(1..5),
        "tie_word_embeddings": rng.bool(), "max_position_embeddings": 500,
    })
}

pub fn random_catalog(rng: &mut fastrand::Rng, num_levels: usize, num_codes: u16) -> Catalog {
    let mut builder = CatalogBuilder::default();
    for item in 0..rng.usize(1..25) {
        let codes: Vec<u16> = (0..num_levels).map(|_| rng.u16(0..num_codes)).collect();
        let sid = Sid::new(&codes).expect("few levels");
        let item = Item { name: item.to_string(), sid, title: String::new() };
        builder.add(item).expect("levels agree");
    }
    builder.build().expect("names are unique")
}
