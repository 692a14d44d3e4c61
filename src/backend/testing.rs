//! Cases of every operation, drawn at random from a seed: what tests hold backends to each other
//! and to the truth with, and what `sidereal selftest` runs on a device.

use std::ops::Range;
use std::slice;

use crate::backend::{
    Activation, Affine, AttentionSpec, Backend, Batch, Beam, Epilogue, HeadNorms, Heads, KvScope,
    Mask, SearchRule, StepChoice,
};
use crate::error::Result;
use crate::tensor::Tensor;

mod fixture;
mod pointwise;

use fixture::vector;
pub use fixture::{Cases, Fixture};
pub use pointwise::{GatedNormCase, PointwiseCase};

/// The operations that have cases.
pub const OPERATIONS: [&str; 18] = [
    "embed",
    "add_embedding",
    "layer_norm",
    "rms_norm",
    "matmul",
    "glu",
    "rope_tables",
    "apply_rope",
    "store_context",
    "attend_prefill",
    "attend_pointwise",
    "gated_norm",
    "gru",
    "gather_last",
    "append_tail",
    "attend_beams",
    "lm_head",
    "advance_beams",
];

/// What an operation makes of its case number `seed`, as numbers that are the same on every backend
/// but for rounding.
///
/// # Errors
/// [`Device`](crate::Error::Device) where the device failed.
///
/// # Panics
/// Where `operation` is none of [`OPERATIONS`].
pub fn run<B: Backend>(backend: &B, operation: &str, seed: u64) -> Result<Vec<f32>> {
    let mut cases = Cases::new(seed);
    match operation {
        "embed" | "gather_last" => embed_and_gather_last(backend, &mut cases, operation),
        "add_embedding" => add_embedding(backend, &mut cases),
        "layer_norm" => layer_norm(backend, &mut cases),
        "attend_pointwise" => {
            let case = PointwiseCase::new(&mut cases);
            case.run(backend, cases.rng.bool())
        }
        "gated_norm" => GatedNormCase::new(&mut cases).run(backend),
        "gru" => gru(backend, &mut cases),
        "rms_norm" => rms_norm(backend, &mut cases),
        "matmul" => matmul(backend, &mut cases),
        "glu" => gate(backend, &mut cases),
        "rope_tables" | "apply_rope" | "store_context" | "attend_prefill" => {
            prompt(backend, &mut cases, operation)
        }
        "append_tail" | "attend_beams" | "lm_head" | "advance_beams" => {
            search(backend, &mut cases, operation)
        }
        other => panic!("{other} is no operation"),
    }
}

fn embed_and_gather_last<B: Backend>(
    backend: &B,
    cases: &mut Cases,
    operation: &str,
) -> Result<Vec<f32>> {
    let (vocab, columns) = (cases.size(50).max(4), cases.size(40));
    let table =
        backend.table(Tensor::new(&[vocab, columns], cases.numbers(vocab * columns)), None)?;
    let lens: Vec<usize> = (0..cases.size(5)).map(|_| cases.size(9)).collect();
    let count: usize = lens.iter().sum();
    let tokens: Vec<u32> = (0..count).map(|_| cases.rng.u32(0..vocab as u32)).collect();
    let mut fixture = Fixture::new(backend, Heads::new(1, 1, 2))?;
    let mut slots: Vec<B::Slot> = lens.iter().chain(&[1]).map(|&len| fixture.slot(len)).collect();
    let (mut rows, mut last) = (backend.buffer(), backend.buffer());
    let chunks: Vec<Range<usize>> = lens.iter().map(|&len| 0..len).collect();
    let batch = Batch::new(&fixture.memory, &chunks, &mut slots);
    backend.embed(&table, &tokens, &batch, &mut rows);
    backend.gather_last(&rows, cases.rng.usize(0..=lens.len()), &batch, &mut last);
    backend.download(if operation == "embed" { &rows } else { &last })
}

fn add_embedding<B: Backend>(backend: &B, cases: &mut Cases) -> Result<Vec<f32>> {
    let (num_indices, columns) = (cases.size(50), cases.size(300));
    let weight = Tensor::new(&[num_indices, columns], cases.numbers(num_indices * columns));
    let table = backend.table(weight, None)?;
    let lens: Vec<usize> = (0..cases.size(5)).map(|_| cases.size(9)).collect();
    let rows: usize = lens.iter().sum();
    let indices: Vec<u32> = (0..rows).map(|_| cases.rng.u32(0..num_indices as u32)).collect();
    let mut x = backend.upload(&cases.numbers((rows + 1) * columns), columns);
    let mut fixture = Fixture::new(backend, Heads::new(1, 1, 2))?;
    let mut slots: Vec<B::Slot> = lens.iter().chain(&[1]).map(|&len| fixture.slot(len)).collect();
    let chunks: Vec<Range<usize>> = lens.iter().map(|&len| 0..len).collect();
    let batch = Batch::new(&fixture.memory, &chunks, &mut slots);
    backend.add_embedding(&table, &indices, &batch, &mut x);
    backend.download(&x)
}

fn layer_norm<B: Backend>(backend: &B, cases: &mut Cases) -> Result<Vec<f32>> {
    let (rows, columns) = (cases.size(70), cases.size(3000));
    let x = backend.upload(&cases.numbers(rows * columns), columns);
    let scale = vector(backend, cases.numbers(columns))?;
    let shift = vector(backend, cases.numbers(columns))?;
    let affine = cases.rng.bool().then_some(Affine { scale: &scale, shift: &shift });
    let mut out = backend.buffer();
    backend.layer_norm(&x, affine, 1e-5, &mut out);
    backend.download(&out)
}

fn gru<B: Backend>(backend: &B, cases: &mut Cases) -> Result<Vec<f32>> {
    let width = cases.size(70);
    let lens: Vec<usize> = (0..cases.size(4)).map(|_| cases.size(12)).collect();
    let rows: usize = lens.iter().sum();
    let inputs = backend.upload(&cases.numbers(rows * 3 * width), 3 * width);
    let weight =
        backend.matrix(&[Tensor::new(&[3 * width, width], cases.recurrent_weight(width))])?;
    let bias = cases.rng.bool().then(|| vector(backend, cases.numbers(3 * width))).transpose()?;
    let mut fixture = Fixture::new(backend, Heads::new(1, 1, 2))?;
    let mut slots: Vec<B::Slot> = lens.iter().map(|&len| fixture.slot(len)).collect();
    let chunks: Vec<Range<usize>> = lens.iter().map(|&len| 0..len).collect();
    let batch = Batch::new(&fixture.memory, &chunks, &mut slots);
    let mut out = backend.buffer();
    backend.gru(&inputs, &weight, bias.as_ref(), &batch, &mut out);
    backend.download(&out)
}

fn rms_norm<B: Backend>(backend: &B, cases: &mut Cases) -> Result<Vec<f32>> {
    let (rows, columns) = (cases.size(70), cases.size(3000));
    let x = backend.upload(&cases.numbers(rows * columns), columns);
    let mut out = backend.buffer();
    backend.rms_norm(&x, &vector(backend, cases.numbers(columns))?, 1e-6, &mut out);
    backend.download(&out)
}

fn matmul<B: Backend>(backend: &B, cases: &mut Cases) -> Result<Vec<f32>> {
    let (rows, inner, columns) = (cases.size(130), cases.size(600), cases.size(300));
    let x = backend.upload(&cases.numbers(rows * inner), inner);
    let weight =
        backend.matrix(&[Tensor::new(&[columns, inner], cases.numbers(columns * inner))])?;
    let bias = cases.rng.bool().then(|| vector(backend, cases.numbers(columns))).transpose()?;
    let activations = [Activation::Relu, Activation::Gelu, Activation::GeluTanh, Activation::Silu];
    let epilogue = match cases.rng.usize(0..6) {
        0 => Epilogue::Store,
        1 => Epilogue::Add,
        at => Epilogue::Activate(activations[at - 2]),
    };
    let mut out = backend.upload(&cases.numbers(rows * columns), columns);
    backend.matmul(&x, &weight, bias.as_ref(), epilogue, &mut out);
    backend.download(&out)
}

fn gate<B: Backend>(backend: &B, cases: &mut Cases) -> Result<Vec<f32>> {
    let (rows, columns) = (cases.size(60), cases.size(400));
    let x = backend.upload(&cases.numbers(rows * 2 * columns), 2 * columns);
    let mut out = backend.buffer();
    let activations = [Activation::Silu, Activation::GeluTanh, Activation::Relu, Activation::Gelu];
    backend.glu(&x, activations[cases.rng.usize(0..4)], &mut out);
    backend.download(&out)
}

/// Prompts, turned, kept and attended to in two passes; then what one of the operations made of them.
fn prompt<B: Backend>(backend: &B, cases: &mut Cases, operation: &str) -> Result<Vec<f32>> {
    let heads = cases.heads();
    let lens: Vec<usize> = (0..cases.size(4).min(3)).map(|_| cases.size(300)).collect();
    let mut fixture = Fixture::new(backend, heads)?;
    let mut slots: Vec<B::Slot> = lens.iter().map(|&len| fixture.slot(len)).collect();
    let frequencies = (0..heads.head_dim() / 2)
        .map(|pair| 10_000f32.powf(-2.0 * pair as f32 / heads.head_dim() as f32));
    let frequencies = vector(backend, frequencies.collect())?;
    let norms = match cases.rng.bool() {
        true => Some([cases.numbers(heads.head_dim()), cases.numbers(heads.head_dim())]),
        false => None,
    };
    let norms = match norms {
        Some([query, key]) => Some((vector(backend, query)?, vector(backend, key)?)),
        None => None,
    };
    let norms = norms.as_ref().map(|(query, key)| HeadNorms { query, key, epsilon: 1e-6 });
    let cut: Vec<usize> = lens.iter().map(|&len| cases.rng.usize(0..=len)).collect();
    let early: Vec<Range<usize>> = cut.iter().map(|&cut| 0..cut).collect();
    let late: Vec<Range<usize>> = cut.iter().zip(&lens).map(|(&cut, &len)| cut..len).collect();
    let causal = AttentionSpec::softmax(heads, Mask::Causal, 0.3);
    let mut found = Vec::new();
    for chunks in [early, late] {
        let rows: usize = chunks.iter().map(Range::len).sum();
        if rows == 0 {
            continue;
        }
        let mut qkv = backend.upload(&cases.numbers(rows * heads.qkv_dim()), heads.qkv_dim());
        let (mut rope_tables, mut out) = (backend.buffer(), backend.buffer());
        let mut batch = Batch::new(&fixture.memory, &chunks, &mut slots);
        backend.rope_tables(&frequencies, &batch, &mut rope_tables);
        backend.apply_rope(0, &mut qkv, heads, norms, &rope_tables, &mut batch);
        backend.attend_prefill(0, &qkv, &causal, &batch, &mut out);
        match operation {
            "rope_tables" => found.extend(backend.download(&rope_tables)?),
            "apply_rope" => found.extend(backend.download(&qkv)?),
            "attend_prefill" => found.extend(backend.download(&out)?),
            _ => {}
        }
    }
    if matches!(operation, "rope_tables" | "apply_rope") {
        return Ok(found);
    }
    // All of a prompt at once, in both directions, with a bias.
    let longest = lens.iter().copied().max().unwrap_or(1);
    let bias = cases.numbers(heads.num_heads * (2 * longest - 1));
    let chunks: Vec<Range<usize>> = lens.iter().map(|&len| 0..len).collect();
    let rows: usize = lens.iter().sum();
    let qkv = backend.upload(&cases.numbers(rows * heads.qkv_dim()), heads.qkv_dim());
    let batch = Batch::new(&fixture.memory, &chunks, &mut slots);
    let mut out = backend.buffer();
    let whole = AttentionSpec::softmax(heads, Mask::Bidirectional, 0.3).with_bias(&bias[..]);
    backend.store_context(0, &qkv, heads.query_dim(), heads, &batch);
    backend.attend_prefill(0, &qkv, &whole, &batch, &mut out);
    found.extend(backend.download(&out)?);
    Ok(found)
}

/// Columns of the hidden state that searches are given.
const HIDDEN: usize = 64;

/// Hidden states that are unit vectors, so that their logits are weights.
fn unit_rows<B: Backend>(backend: &B, rows: usize) -> B::Buffer {
    let mut hidden = vec![0.0; rows * HIDDEN];
    (0..rows).for_each(|row| hidden[row * HIDDEN + row % HIDDEN] = 1.0);
    backend.upload(&hidden, HIDDEN)
}

/// The scores of a search of one step that reads named tokens.
fn named_tokens<B: Backend>(
    backend: &B,
    cases: &mut Cases,
    fixture: &mut Fixture<'_, B>,
    head: &B::Head,
    vocab: usize,
    rule: SearchRule<'_>,
) -> Result<Vec<f32>> {
    let mut named: Vec<u32> = (0..vocab as u32).collect();
    cases.rng.shuffle(&mut named);
    named.truncate(cases.size(10));
    let rules = [SearchRule { choice: StepChoice::Tokens(&named), beams: named.len(), ..rule }];
    let mut slots = [fixture.slot(1)];
    let mut logits = backend.logits();
    let mut pass = Batch::new(&fixture.memory, &[], &mut slots);
    backend.lm_head(&unit_rows(backend, 1), head, &rules, &mut pass, &mut logits);
    backend.advance_beams(&logits, head, &rules, &mut pass);
    let beams = backend.read_beams(&[&slots[0]]).remove(0)?;
    Ok(beams.iter().map(|beam| beam.score).collect())
}

/// A search of three levels, perhaps behind forced tokens, whose logits are weights themselves, so
/// that every number type ranks them alike; its beams attend to their context and tails. Then a
/// search that reads named tokens. Returns what one of the operations made of them.
fn search<B: Backend>(backend: &B, cases: &mut Cases, operation: &str) -> Result<Vec<f32>> {
    let (heads, num_codes) = (cases.heads(), cases.rng.u16(2..40));
    let snapshot = cases.snapshot(num_codes)?;
    let share = cases.rng.f32() * 0.5;
    let excluded: Vec<u32> = snapshot.all_items().filter(|_| cases.rng.f32() < share).collect();
    let allowed_set = snapshot.allowed_set(&excluded, None)?;
    let first = |level: u32| 1 + level * u32::from(num_codes);
    let levels: Vec<Vec<u32>> =
        (0..3).map(|level| (first(level)..first(level + 1)).collect()).collect();
    let vocab = first(3) as usize;
    let head = Tensor::new(&[vocab, HIDDEN], cases.numbers(vocab * HIDDEN));
    let (head, mut logits) = (backend.head(head, &levels, &[])?, backend.logits());
    let mut fixture = Fixture::new(backend, heads)?;
    let context_len = cases.size(700);
    let mut slots = vec![fixture.slot(context_len)];
    let kv = backend.upload(&cases.numbers(context_len * 2 * heads.kv_dim()), 2 * heads.kv_dim());
    let whole = 0..context_len;
    let batch = Batch::new(&fixture.memory, slice::from_ref(&whole), &mut slots);
    backend.store_context(0, &kv, 0, heads, &batch);
    let width = cases.size(200);
    let bias = vector(backend, cases.numbers(heads.num_heads * 4))?;
    // Tokens are forced before the codes, counted or not.
    let forced = (0..cases.rng.usize(0..3)).map(|_| {
        let (token, is_counted) = (cases.rng.u32(0..vocab as u32), cases.rng.bool());
        (StepChoice::Forced { token, is_counted }, 0)
    });
    let forced: Vec<(StepChoice<'_>, usize)> = forced.collect();
    let steps = forced.into_iter().chain((0..3).map(|level| (StepChoice::Level(level), level)));
    let mut found = Vec::new();
    for (choice, depth) in steps {
        let hidden = unit_rows(backend, backend.num_beams(&slots[0]));
        let rule = SearchRule::new(&snapshot, &allowed_set, 0, width);
        let rules = [SearchRule { choice, depth, ..rule }];
        let mut pass = Batch::new(&fixture.memory, &[], &mut slots);
        backend.lm_head(&hidden, &head, &rules, &mut pass, &mut logits);
        backend.advance_beams(&logits, &head, &rules, &mut pass);
        let beams: Vec<Beam> = backend.read_beams(&[&slots[0]]).remove(0)?;
        match operation {
            "lm_head" => found.extend(beams.iter().map(|beam| beam.score)),
            "advance_beams" => found.extend(beams.iter().flat_map(|beam| {
                let tokens = beam.tokens.iter().map(|&token| token as f32);
                tokens.chain([beam.score])
            })),
            _ => {}
        }
        // Rows are drawn for as many beams as there could be, so that all backends see the same.
        let numbers = cases.numbers(width * heads.qkv_dim());
        let rows = backend.num_beams(&slots[0]);
        let qkv = backend.upload(&numbers[..rows * heads.qkv_dim()], heads.qkv_dim());
        let mut batch = Batch::new(&fixture.memory, &[], &mut slots);
        backend.append_tail(0, &qkv, heads, &mut batch);
        let reaches: &[KvScope] = match operation {
            "append_tail" => &[KvScope::Tail],
            "attend_beams" => &[KvScope::Context, KvScope::Tail, KvScope::Both],
            _ => &[],
        };
        for &scope in reaches {
            let mut out = backend.buffer();
            let bias = (scope == KvScope::Tail).then_some(&bias);
            let attention = AttentionSpec { bias, ..AttentionSpec::softmax(heads, scope, 0.4) };
            backend.attend_beams(0, &qkv, &attention, &batch, &mut out);
            let out = backend.download(&out)?;
            found.extend_from_slice(&out[..beams.len() * heads.query_dim()]);
        }
    }
    if matches!(operation, "lm_head" | "advance_beams") {
        let rule = SearchRule::new(&snapshot, &allowed_set, 0, 1);
        found.extend(named_tokens(backend, cases, &mut fixture, &head, vocab, rule)?);
    }
    Ok(found)
}
