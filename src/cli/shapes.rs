//! Models known by their shape alone: random weights and a random catalog, for benchmarks.

use std::path::Path;
use std::sync::Arc;

use clap::ValueEnum;
use serde_json::{Value, json};
use sidereal::catalog::sid::Sid;
use sidereal::catalog::{Catalog, CatalogBuilder, Item};
use sidereal::models::config::{Config, Prompt, SidLayout};
use sidereal::models::vocabulary::Vocabulary;
use sidereal::models::weights::Weights;
use sidereal::{Normalization, Recommender, RecommenderOptions, Result};

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Shape {
    /// T5, 4.8 million weights (TIGER, Rajput et al. 2023); 4 levels of 256 codes
    Tiger,
    /// Qwen3 of 4 layers and 256 columns; 3 levels of 256 codes
    Qwen3Small,
    /// Qwen3-0.6B with 3 levels of 8192 codes added to its vocabulary
    #[value(name = "qwen3-0.6b")]
    Qwen3_0_6b,
    /// Qwen3-1.7B with 3 levels of 8192 codes added to its vocabulary
    #[value(name = "qwen3-1.7b")]
    Qwen3_1_7b,
}

impl Shape {
    /// Number of levels, codes of a level, the first code's token, items.
    fn catalog(self) -> (usize, u32, u32, usize) {
        match self {
            Shape::Tiger => (4, 256, 2, 10_000),
            Shape::Qwen3Small => (3, 256, 1_000, 10_000),
            Shape::Qwen3_0_6b | Shape::Qwen3_1_7b => (3, 8_192, 151_936, 100_000),
        }
    }

    fn config(self) -> Value {
        let qwen3 = |vocab: u32,
                     hidden: u32,
                     inner: u32,
                     layers: u32,
                     heads: [u32; 3],
                     tied: bool| {
            json!({
                "architectures": ["Qwen3ForCausalLM"], "vocab_size": vocab, "hidden_size": hidden,
                "intermediate_size": inner, "num_hidden_layers": layers,
                "num_attention_heads": heads[0], "num_key_value_heads": heads[1],
                "head_dim": heads[2], "tie_word_embeddings": tied, "rope_theta": 1e6,
                "max_position_embeddings": 40_960,
            })
        };
        match self {
            Shape::Tiger => json!({
                "architectures": ["T5ForConditionalGeneration"], "vocab_size": 3_026,
                "d_model": 128, "d_kv": 64, "d_ff": 1_024, "num_layers": 4,
                "num_decoder_layers": 4, "num_heads": 6, "feed_forward_proj": "relu",
            }),
            Shape::Qwen3Small => qwen3(1_768, 256, 768, 4, [8, 2, 64], false),
            Shape::Qwen3_0_6b => qwen3(176_512, 1_024, 3_072, 28, [16, 8, 128], true),
            Shape::Qwen3_1_7b => qwen3(176_512, 2_048, 6_144, 28, [16, 8, 128], true),
        }
    }

    /// A model of this shape. The same weights and items every time.
    /// `items`: how many the catalog has, if not the shape's own number.
    pub fn open(self, options: &RecommenderOptions, items: Option<u32>) -> Result<Recommender> {
        let (num_levels, num_codes, first_token, own_items) = self.catalog();
        let num_items = items.map_or(own_items, |items| items as usize);
        let mut rng = fastrand::Rng::with_seed(20);
        let mut builder = CatalogBuilder::default();
        for item in 0..num_items {
            // Codes near zero are frequent, as in real catalogs.
            let code = |_| (rng.f32() * rng.f32() * num_codes as f32) as u16;
            let codes: Vec<u16> = (0..num_levels).map(code).collect();
            let sid = Sid::new(&codes)?;
            builder.add(Item::new(item.to_string(), sid))?;
        }
        let catalog: Arc<Catalog> = Arc::new(builder.build()?);
        let level = |level: u32| {
            let first = first_token + level * num_codes;
            (first..first + num_codes).collect()
        };
        let layout = SidLayout {
            phrases: None,
            levels: (0..num_levels as u32).map(level).collect(),
            prompt: Prompt::new(vec![1], Vec::new(), Vec::new()),
            forced: None,
            suffix: Vec::new(),
            vocabulary: Vocabulary::default(),
            normalization: Normalization::Vocabulary,
        };
        let keys = self.config().as_object().cloned().unwrap_or_default();
        let config = Config::new(Path::new("config.json"), keys);
        let weights = Weights::random(7);
        Recommender::from_parts(&config, weights, layout, catalog, options)
    }
}
