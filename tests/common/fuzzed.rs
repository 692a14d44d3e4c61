//! What is fuzzed: bytes from anywhere go in, and nothing may panic. `tests/fuzz` has the targets of
//! cargo-fuzz, `tests/fuzzed.rs` goes through the kept seeds in every test run.

use std::path::Path;
use std::sync::Arc;

use safetensors::tensor::TensorView;
use sidereal::catalog::filter::Filter;
use sidereal::catalog::{Catalog, CatalogBuilder, Change, change_log, items};
use sidereal::models::weights::Weights;
use sidereal::{CatalogWriter, Engine, EngineOptions, Request, WriterOptions};

/// A filter shows itself as a text that reads as the same filter.
pub fn filter(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(filter) = Filter::parse(text) {
        let shown = filter.to_string();
        if shown.len() < 1 << 16 {
            // Written out, and-chains in or-chains take parentheses that the text may lack.
            if let Ok(again) = Filter::parse(&shown) {
                assert_eq!(again, filter);
            }
        }
        let _ = filter.passes(&|tag| tag.len().is_multiple_of(2));
    }
}

pub fn changes(data: &[u8]) {
    if let Ok(contents) = change_log::parse(data) {
        assert!(contents.whole_bytes <= data.len() as u64);
        let again = change_log::parse(&data[..contents.whole_bytes as usize]);
        let again = again.expect("whole records");
        assert_eq!((again.batches, again.defect), (contents.batches, None));
    }
}

/// Items as JSON lines and as an index, changes as JSON lines.
pub fn items(data: &[u8], folder: &Path) {
    for name in ["items.jsonl", "items.json"] {
        let path = folder.join(name);
        std::fs::write(&path, data).expect("a writable folder");
        if let Ok(catalog) = Catalog::open(&path) {
            let snapshot = catalog.snapshot();
            for item in snapshot.all_items() {
                assert_eq!(snapshot.find(snapshot.name(item)), Some(item));
            }
            let _ = snapshot.base().tags().expect("just built");
        }
    }
    let path = folder.join("changes.jsonl");
    std::fs::write(&path, data).expect("a writable folder");
    let _ = items::read_changes(&path, &[], |_| Ok(()), |_| {});
}

/// A file of torch: what opens can be read to its last number.
pub fn torch(data: &[u8], folder: &Path) {
    let path = folder.join("pytorch_model.bin");
    std::fs::write(&path, data).expect("a writable folder");
    let Ok(mut weights) = Weights::open_file(&path) else { return };
    for (name, shape) in weights.shapes() {
        if let Ok(tensor) = weights.take(&name, &shape) {
            assert_eq!(tensor.to_vec().len(), shape.iter().product::<usize>());
        }
    }
}

/// A configuration over the weights of a small network, and what changes of it an adapter asks for.
pub fn config(data: &[u8], folder: &Path) {
    open_small(folder, "config.json", data);
}

/// An adapter's configuration.
pub fn adapter(data: &[u8], folder: &Path) {
    open_small(folder, "adapter_config.json", data);
}

/// The configuration of the small network.
pub const SMALL_CONFIG: &str = r#"{"architectures": ["Qwen3ForCausalLM"], "vocab_size": 16, "hidden_size": 4,
    "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 2, "max_position_embeddings": 64, "tie_word_embeddings": true, "layer_types": ["full_attention"],
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0}, "sliding_window": null}"#;

/// Opens a network of a few hundred weights, one of whose files is `data`.
fn open_small(folder: &Path, name: &str, data: &[u8]) {
    let layer = "model.layers.0";
    let shapes: [(String, Vec<usize>); 14] = [
        ("model.embed_tokens.weight".into(), vec![16, 4]),
        ("model.norm.weight".into(), vec![4]),
        (format!("{layer}.input_layernorm.weight"), vec![4]),
        (format!("{layer}.post_attention_layernorm.weight"), vec![4]),
        (format!("{layer}.self_attn.q_proj.weight"), vec![4, 4]),
        (format!("{layer}.self_attn.k_proj.weight"), vec![2, 4]),
        (format!("{layer}.self_attn.v_proj.weight"), vec![2, 4]),
        (format!("{layer}.self_attn.o_proj.weight"), vec![4, 4]),
        (format!("{layer}.self_attn.q_norm.weight"), vec![2]),
        (format!("{layer}.self_attn.k_norm.weight"), vec![2]),
        (format!("{layer}.mlp.gate_proj.weight"), vec![6, 4]),
        (format!("{layer}.mlp.up_proj.weight"), vec![6, 4]),
        (format!("{layer}.mlp.down_proj.weight"), vec![4, 6]),
        ("lm_head.weight".into(), vec![16, 4]),
    ];
    write_tensors(&folder.join("model.safetensors"), &shapes);
    let factor =
        |name: &str, shape| (format!("base_model.model.{layer}.self_attn.q_proj.{name}"), shape);
    let factors = [factor("lora_A.weight", vec![2, 4]), factor("lora_B.weight", vec![4, 2])];
    write_tensors(&folder.join("adapter_model.safetensors"), &factors);
    let levels = r#"{"levels": [{"size": 8, "first_token": 8}], "ignore": ["known.*"]}"#;
    let adapter =
        r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "."}"#;
    for (file, text) in
        [("config.json", SMALL_CONFIG), ("sidereal.json", levels), ("adapter_config.json", adapter)]
    {
        let bytes = if file == name { data } else { text.as_bytes() };
        std::fs::write(folder.join(file), bytes).expect("a writable folder");
    }
    let mut builder = CatalogBuilder::default();
    let sid = sidereal::catalog::sid::Sid::new(&[3]).expect("one level");
    builder.add(sidereal::catalog::Item::new("only", sid)).expect("the first item");
    let catalog = Arc::new(builder.build().expect("one item"));
    let options = EngineOptions::default().with_threads(1).with_context_tokens(256);
    if let Ok(mut engine) = Engine::open(folder, catalog, &options) {
        let request = Request::from_tokens(vec![1, 2, 3]).with_beams(2);
        let _ = engine.recommend(&request);
    }
}

fn write_tensors(path: &Path, shapes: &[(String, Vec<usize>)]) {
    let data: Vec<Vec<u8>> = shapes
        .iter()
        .map(|(_, shape)| {
            let len = shape.iter().product::<usize>() as u32;
            (0..len).flat_map(|at| (at as f32 * 0.37).sin().to_le_bytes()).collect()
        })
        .collect();
    let views = shapes.iter().zip(&data).map(|((name, shape), data)| {
        let view = TensorView::new(safetensors::Dtype::F32, shape.clone(), data);
        (name, view.expect("whole rows"))
    });
    let bytes = safetensors::serialize(views, None).expect("plain tensors");
    std::fs::write(path, bytes).expect("a writable folder");
}

/// A compiled catalog whose checksums are put right, so that what is behind them is reached.
pub fn catalog(data: &[u8], folder: &Path) {
    let mut forged = data.to_vec();
    if forged.len() < 96 {
        return;
    }
    sign(&mut forged);
    let path = folder.join("c.sidereal");
    std::fs::write(&path, &forged).expect("a writable folder");
    let Ok(catalog) = Catalog::open(&path) else { return };
    look_around(&catalog);
    // What opens can be changed and compiled anew, or says why not.
    let levels = catalog.snapshot().num_levels();
    let options = WriterOptions::default().with_compact_at(usize::MAX);
    let writer = CatalogWriter::in_memory(catalog.into(), &options).expect("a thread");
    let sid = sidereal::catalog::sid::Sid::new(&vec![1; levels]).expect("one to eight levels");
    let put = Change::Put(sidereal::catalog::Item::new("\u{1}new", sid));
    if writer.apply(&[put]).is_ok() {
        look_around(writer.catalog());
    }
}

/// Asks a catalog, however it came about, all its questions.
pub fn look_around(catalog: &Catalog) {
    let snapshot = catalog.snapshot();
    let num_levels = snapshot.num_levels();
    for item in snapshot.all_items() {
        let place = snapshot.cursor(snapshot.sid(item).codes()).expect("its own place");
        assert!(snapshot.items(place, num_levels).any(|other| other == item));
        // A forged index may miss a name, and finds no other.
        let found = snapshot.find(snapshot.name(item));
        assert!(found.is_none_or(|it| snapshot.name(it) == snapshot.name(item)));
        let _ = (snapshot.title(item), snapshot.tags(item));
    }
    let _ = snapshot.base().tags();
    for filter in [None, Some("tag:t1 & !tag:t2"), Some("!(tag:all | tag:t3)")] {
        let Ok(allowed_set) = snapshot.allowed_set(&[], filter) else { continue };
        let mut places = vec![snapshot.root()];
        for depth in 0..num_levels {
            let mut next = Vec::new();
            for place in places {
                let mut below = allowed_set.below(&snapshot, place, depth);
                for run in snapshot.children(place) {
                    let children = (0..run.labels.len()).map(|at| run.child(at));
                    next.extend(children.filter(|&child| below.is_match(child)));
                }
            }
            places = next;
        }
    }
}

/// Puts right the checksums of sections and head, as far as the head still makes sense.
pub fn sign(bytes: &mut [u8]) {
    let number = |bytes: &[u8], at: usize| -> usize {
        let field = bytes.get(at..at + 8).expect("inside the head");
        u64::from_le_bytes(field.try_into().expect("eight bytes")) as usize
    };
    const HEADER: usize = 96;
    let sections = u32::from_le_bytes(bytes[88..92].try_into().expect("four bytes")) as usize;
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
