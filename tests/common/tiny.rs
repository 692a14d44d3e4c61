//! Engines of a few hundred weights, drawn at random: small enough for thousands of searches.
#![allow(dead_code)] // each test file uses a part

use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};
use sidereal::backend::Backend;
use sidereal::backend::cpu::CpuBackend;
use sidereal::catalog::sid::Sid;
use sidereal::catalog::{Catalog, CatalogBuilder, Change, Item, ItemWeight, Snapshot};
use sidereal::models::config::{Config, Prompt, SidLayout};
use sidereal::models::vocabulary::Vocabulary;
use sidereal::models::weights::Weights;
use sidereal::pages::PAGE_LEN;
use sidereal::{
    CatalogWriter, Constraint, Engine, EngineOptions, Forced, NamedToken, Normalization, Priority,
    Request, WriterOptions,
};

/// A model and catalog; equal seeds give equal ones, whatever the number of threads.
pub struct Tiny {
    seed: u64,
    config: Value,
    layout: SidLayout,
    pub num_codes: u16,
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
            phrases: None,
            levels: (0..num_levels).map(tokens).collect(),
            prompt: Prompt::new(some(2), some(1), some(2)),
            forced: None,
            suffix: some(2),
            vocabulary: Vocabulary::default(),
            normalization: Normalization::Vocabulary,
        };
        let vocab_size = first(num_levels) + 3;
        let config = match rng.bool() {
            true => t5(&mut rng, vocab_size),
            false => decoder_only(&mut rng, vocab_size),
        };
        Tiny { seed, config, layout, num_codes, catalog }
    }

    /// Whether an encoder reads prompts as a whole.
    pub fn has_encoder(&self) -> bool {
        self.config["architectures"][0] == "T5ForConditionalGeneration"
    }

    pub fn num_levels(&self) -> usize {
        self.layout.levels.len()
    }

    /// Steps of a search: the levels and what is forced after them.
    pub fn num_steps(&self) -> usize {
        self.layout.levels.len() + self.layout.suffix.len()
    }

    pub fn num_tokens(&self) -> u32 {
        5 + self.num_levels() as u32 * u32::from(self.num_codes)
    }

    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.catalog.snapshot()
    }

    pub fn open(&self, threads: usize) -> Engine {
        self.open_with(Arc::clone(&self.catalog), threads)
    }

    /// The same model over another catalog of the same levels.
    pub fn open_with(&self, catalog: Arc<Catalog>, threads: usize) -> Engine {
        self.open_as(catalog, &EngineOptions::default().with_threads(threads))
    }

    pub fn open_as(&self, catalog: Arc<Catalog>, options: &EngineOptions) -> Engine {
        self.open_on(CpuBackend::default(), catalog, options)
    }

    /// The model on a device.
    pub fn open_on<B: Backend>(
        &self,
        backend: B,
        catalog: Arc<Catalog>,
        options: &EngineOptions,
    ) -> Engine<B> {
        let keys = self.config.as_object().cloned().expect("an object");
        let config = Config::new(Path::new("config.json"), keys);
        let weights = Weights::random(self.seed);
        Engine::from_parts(backend, &config, weights, self.layout.clone(), catalog, options)
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

/// Tags that items of random catalogs carry.
pub const TAGS: [&str; 3] = ["a", "b", "c"];

/// An item of random codes, tags and availability.
pub fn random_item(rng: &mut fastrand::Rng, name: &str, num_levels: usize, codes: u16) -> Item {
    let sid: Vec<u16> = (0..num_levels).map(|_| rng.u16(0..codes)).collect();
    let mut item = Item::new(name, Sid::new(&sid).expect("few levels"));
    item.tags = TAGS.iter().filter(|_| rng.bool()).map(|tag| tag.to_string()).collect();
    item.available = rng.u8(0..8) > 0;
    if rng.bool() {
        item.title = format!("the {name}");
    }
    item.weight = random_weight(rng);
    item
}

/// The default in half of all cases, else one of a few.
fn random_weight(rng: &mut fastrand::Rng) -> ItemWeight {
    let weights = [0.0, 0.0, 0.0, -1.5, 0.25, 7.0];
    ItemWeight::new(weights[rng.usize(0..weights.len())]).expect("finite")
}

/// Any change to the items named by the numbers below `names`, known or not.
pub fn random_change(rng: &mut fastrand::Rng, names: usize, levels: usize, codes: u16) -> Change {
    let item = rng.usize(0..names).to_string();
    let mut some = || TAGS.iter().filter(|_| rng.bool()).map(|tag| tag.to_string()).collect();
    let (add, remove) = (some(), some());
    match rng.u8(0..9) {
        8 => Change::Weight { item, weight: random_weight(rng) },
        0..4 => Change::Put(random_item(rng, &item, levels, codes)),
        4..6 => Change::Delete { item },
        6 => Change::Availability { item, available: rng.bool() },
        _ => Change::Tag { item, add, remove },
    }
}

/// A small catalog of one to 24 items; half of them were changed since they were compiled.
pub fn random_catalog(rng: &mut fastrand::Rng, num_levels: usize, num_codes: u16) -> Catalog {
    let mut builder = CatalogBuilder::default();
    let num_items = rng.usize(1..25);
    for item in 0..num_items {
        let item = random_item(rng, &item.to_string(), num_levels, num_codes);
        builder.add(item).expect("levels agree");
    }
    let catalog = Arc::new(builder.build().expect("names are unique"));
    if rng.bool() {
        let writer = CatalogWriter::in_memory(Arc::clone(&catalog), &WriterOptions::default());
        let writer = writer.expect("a thread");
        for _ in 0..rng.usize(1..4) {
            let change = |_| random_change(rng, num_items + 5, num_levels, num_codes);
            let changes: Vec<Change> = (0..8).map(change).collect();
            writer.apply(&changes).expect("sound changes");
        }
        // A search needs something to name in its history.
        writer.apply(&[Change::Put(random_item(rng, "0", num_levels, num_codes))]).expect("sound");
    }
    Arc::into_inner(catalog).expect("the writer is gone")
}

/// Any request that a tiny model can be asked, whose context often begins like an earlier one.
pub fn random_request(
    rng: &mut fastrand::Rng,
    tiny: &Tiny,
    contexts: &mut Vec<Vec<u32>>,
) -> Request {
    let mut tokens = match rng.u8(0..4) {
        0 => Vec::new(),
        _ => contexts.get(rng.usize(0..=contexts.len())).cloned().unwrap_or_default(),
    };
    tokens.truncate(rng.usize(0..=tokens.len()).max(tokens.len() * rng.usize(0..2)));
    let more = rng.usize(1..2 * PAGE_LEN);
    tokens.extend((0..more).map(|_| rng.u32(0..tiny.num_tokens())));
    tokens.truncate(4 * PAGE_LEN);
    contexts.push(tokens.clone());
    let mut request = Request::from_tokens(tokens);
    request.beams = rng.usize(1..40);
    if rng.bool() {
        request.widths = (0..tiny.num_levels()).map(|_| rng.usize(1..40)).collect();
    }
    request.top_k = rng.usize(1..30);
    request.normalization = match rng.u8(0..4) {
        0 => None,
        1 => Some(Normalization::Vocabulary),
        2 => Some(Normalization::Level),
        _ => Some(Normalization::Children),
    };
    if request.normalization == Some(Normalization::Vocabulary) && rng.u8(0..4) == 0 {
        request.constraint = Constraint::None;
    } else if rng.u8(0..6) == 0 {
        request.constraint = [Constraint::Occurring, Constraint::Level][rng.usize(0..2)];
    }
    if rng.u8(0..5) == 0 {
        let snapshot = tiny.snapshot();
        let items = snapshot.all_items().filter(|_| rng.bool());
        request.only = Some(items.map(|item| snapshot.name(item).to_string()).collect());
    }
    request.filter = rng.bool().then(|| format!("tag:{}", TAGS[rng.usize(0..3)]));
    if rng.u8(0..5) == 0 {
        request.groups = (0..rng.usize(1..4)).map(|tag| format!("tag:{}", TAGS[tag])).collect();
    }
    request.user = rng.bool().then(|| rng.u8(0..4).to_string());
    request.priority = [Priority::High, Priority::Normal, Priority::Low][rng.usize(0..3)];
    request
}

/// A prompt of up to 150 tokens.
pub fn prompt(rng: &mut fastrand::Rng, tiny: &Tiny) -> Vec<u32> {
    (0..rng.usize(1..150)).map(|_| rng.u32(0..tiny.num_tokens())).collect()
}

/// One to `most` tokens.
pub fn some_tokens(rng: &mut fastrand::Rng, tiny: &Tiny, most: usize) -> Vec<u32> {
    (0..rng.usize(1..=most)).map(|_| rng.u32(0..tiny.num_tokens())).collect()
}

/// Tokens by number.
pub fn named(tokens: &[u32]) -> Vec<NamedToken> {
    tokens.iter().map(|&token| NamedToken::Id(token)).collect()
}

/// What a crowd may ask: every stage, beside others or alone.
pub fn random_program(rng: &mut fastrand::Rng, tiny: &Tiny, prompts: &[Vec<u32>]) -> Request {
    let mut request = Request::from_tokens(prompts[rng.usize(0..prompts.len())].clone());
    request.beams = rng.usize(1..20);
    if rng.bool() {
        let tokens = some_tokens(rng, tiny, 3);
        let forced = if rng.bool() { Forced::counted(tokens) } else { Forced::new(tokens) };
        request = request.with_forced(forced);
    }
    if rng.bool() {
        request = request.with_read(named(&some_tokens(rng, tiny, 6)));
    }
    match rng.u8(0..4) {
        0 => request = request.with_groups(TAGS.map(|tag| format!("tag:{tag}"))),
        1 => request = request.with_candidates(["0"]),
        2 if request.read.is_empty() => request.seed = Some(rng.u64(..)),
        _ => {}
    }
    request.log_probs = rng.bool() && (request.read.is_empty() || !request.groups.is_empty());
    request.user = rng.bool().then(|| rng.u8(0..3).to_string());
    request
}
