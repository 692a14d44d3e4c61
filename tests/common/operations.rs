//! Every operation of a backend against plain f64 loops, on random shapes.

use std::collections::HashMap;
use std::ops::Range;
use std::slice;

use super::tiny::random_catalog;
use super::truth::{self, Matrix, relative_error, worst_row};
use super::walk::{Steps, Walk};
use sidereal::Normalization;
use sidereal::Tensor;
use sidereal::backend::prelude::*;
use sidereal::backend::testing::{Cases, Fixture, GatedNormCase, PointwiseCase};
use sidereal::backend::{
    Activation, Affine, AttentionSpec, Batch, Beam, Epilogue, HeadNorms, Heads, KvScope, Mask,
    NO_TOKEN, SearchRule, StepChoice,
};
use sidereal::catalog::allowed::AllowedSet;

/// What the operations are tried on.
pub trait Subject {
    type B: Backend;
    /// What an operation may differ from the truth by, norm-wise.
    const TOLERANCE: f64;
    /// What a score may.
    const SCORE_TOLERANCE: f64;

    /// A backend of its own.
    fn open() -> Self::B;

    /// The seeds of a test that has so many where they cost nothing.
    fn seeds(most: u64) -> Range<u64>;
}

type SlotOf<S> = <<S as Subject>::B as DeviceOps>::Slot;
type MemoryOf<S> = <<S as Subject>::B as DeviceOps>::Memory;

/// Makes tests of all operations on a backend.
#[macro_export]
macro_rules! operation_tests {
    ($subject:ty $(, $attribute:meta)?) => {
        $crate::operation_tests!(@ $subject, $($attribute)?;
            embed_and_last_rows_copy_rows,
            add_embedding_adds_the_rows_of_prompts_and_no_others,
            layer_norm_is_the_formula_with_weights_and_without,
            layer_norm_keeps_a_small_variance_around_a_large_mean,
            attend_pointwise_is_the_formula_however_targets_are_read,
            gated_norm_is_the_formula_in_every_form,
            gru_is_the_formula_for_prompts_of_any_length,
            rms_norm_is_the_formula,
            rms_norm_loses_no_small_square_behind_large_ones,
            matmul_is_the_formula_with_every_epilogue,
            a_row_of_a_product_does_not_depend_on_the_other_rows,
            gate_is_the_formula,
            rotation_and_rotary_turn_query_and_key_heads_and_keep_keys_and_values,
            attend_prefill_is_the_formula_however_prompts_are_cut,
            attention_is_the_formula_for_every_row_at_the_edges_of_pages,
            advance_beams_finds_the_best_and_attend_beams_follows_the_ancestors,
            embed_reads_each_beams_newest_token,
            rows_of_prompts_and_of_beams_leave_each_other_alone,
            searches_at_different_steps_share_a_step,
            named_tokens_have_the_log_probabilities_of_a_plain_log_softmax,
            a_search_of_more_steps_than_the_device_has_room_for_is_refused,
        );
    };
    (@ $subject:ty, $attribute:meta; $($test:ident,)*) => {
        $(
            #[test]
            #[$attribute]
            fn $test() {
                $crate::common::operations::$test::<$subject>();
            }
        )*
    };
    (@ $subject:ty, ; $($test:ident,)*) => {
        $(
            #[test]
            fn $test() {
                $crate::common::operations::$test::<$subject>();
            }
        )*
    };
}

fn values<B: Backend>(backend: &B, buffer: &B::Buffer) -> Vec<f32> {
    backend.download(buffer).expect("the device works")
}

fn beams_of<B: Backend>(backend: &B, slot: &B::Slot) -> Vec<Beam> {
    backend.read_beams(&[slot]).pop().expect("one slot").expect("finite scores")
}

/// The first row of each slot's beams, and their sum. A device may have more rows than beams.
fn first_rows<B: Backend>(backend: &B, slots: &[B::Slot]) -> Vec<usize> {
    let ends = slots.iter().scan(0, |end, slot| {
        *end += backend.num_beams(slot);
        Some(*end)
    });
    std::iter::once(0).chain(ends).collect()
}

fn check<S: Subject>(
    backend: &S::B,
    found: &<S::B as DeviceOps>::Buffer,
    truth: &Matrix,
    what: &str,
) {
    let error = relative_error(&values(backend, found), &truth.values, what);
    assert!(error < S::TOLERANCE, "{what}: relative error {error:.2e}");
}

/// Cuts prompts into chunks, each a batch of its own; those that end come last, as in the engine.
fn chunks(cases: &mut Cases, lens: &[usize]) -> Vec<Vec<Range<usize>>> {
    let mut read: Vec<usize> = vec![0; lens.len()];
    let mut batches = Vec::new();
    while read != lens {
        let chunk = |(start, &len): (&mut usize, &usize)| {
            let end = *start + cases.rng.usize(0..=len - *start);
            let end = if cases.rng.u8(0..4) == 0 { len } else { end };
            std::mem::replace(start, end)..end
        };
        batches.push(read.iter_mut().zip(lens).map(chunk).collect());
    }
    batches
}

/// The rows that chunks take of matrices that stand one after the other.
fn rows_of(values: &[f32], columns: usize, lens: &[usize], chunks: &[Range<usize>]) -> Vec<f32> {
    let mut first = 0;
    let mut rows = Vec::new();
    for (len, chunk) in lens.iter().zip(chunks) {
        rows.extend_from_slice(
            &values[(first + chunk.start) * columns..(first + chunk.end) * columns],
        );
        first += len;
    }
    rows
}

pub fn embed_and_last_rows_copy_rows<S: Subject>() {
    let backend = S::open();
    for seed in S::seeds(50) {
        let mut cases = Cases::new(seed);
        let (vocab, columns) = (cases.size(50).max(4), cases.size(40));
        let weight = cases.numbers(vocab * columns);
        let table =
            backend.table(Tensor::new(&[vocab, columns], weight.clone()), None).expect("memory");
        let lens: Vec<usize> = (0..cases.size(5)).map(|_| cases.size(9)).collect();
        let count: usize = lens.iter().sum();
        let tokens: Vec<u32> = (0..count).map(|_| cases.rng.u32(0..vocab as u32)).collect();
        let row = |token: u32| &weight[token as usize * columns..][..columns];
        let heads = Heads::new(1, 1, 2);
        let mut fixture = Fixture::new(&backend, heads).expect("memory");
        let num_beams = cases.rng.usize(0..3);
        let mut slots: Vec<SlotOf<S>> =
            lens.iter().chain(&vec![1; num_beams]).map(|&len| fixture.slot(len)).collect();
        let (mut rows, mut last) = (backend.buffer(), backend.buffer());
        let chunks: Vec<Range<usize>> = lens.iter().map(|&len| 0..len).collect();
        let batch = Batch::new(&fixture.memory, &chunks, &mut slots);
        backend.embed(&table, &tokens, &batch, &mut rows);
        // The beams of a search that has taken no step have the start token.
        let all: Vec<u32> = tokens.iter().copied().chain(vec![3; num_beams]).collect();
        let expected: Vec<f32> = all.iter().flat_map(|&token| row(token)).copied().collect();
        assert_eq!(values(&backend, &rows), expected, "seed {seed}");

        let first = cases.rng.usize(0..=lens.len());
        backend.gather_last(&rows, first, &batch, &mut last);
        let ends = lens.iter().scan(0, |end, len| {
            *end += len;
            Some(*end)
        });
        let kept = ends.skip(first).map(|end| tokens[end - 1]).chain(vec![3; num_beams]);
        let expected: Vec<f32> = kept.flat_map(|token| row(token).to_vec()).collect();
        assert_eq!(values(&backend, &last), expected, "seed {seed}");
    }
}

pub fn add_embedding_adds_the_rows_of_prompts_and_no_others<S: Subject>() {
    let backend = S::open();
    for seed in S::seeds(50) {
        let mut cases = Cases::new(seed);
        let (num_indices, columns) = (cases.size(50), cases.size(300));
        let weight = cases.numbers(num_indices * columns);
        let lens: Vec<usize> = (0..cases.size(5)).map(|_| cases.size(9)).collect();
        let rows: usize = lens.iter().sum();
        let indices: Vec<u32> = (0..rows).map(|_| cases.rng.u32(0..num_indices as u32)).collect();
        let before = cases.numbers((rows + 1) * columns);
        let table = Tensor::new(&[num_indices, columns], weight.clone());
        let table = backend.table(table, None).expect("memory");
        let mut fixture = Fixture::new(&backend, Heads::new(1, 1, 2)).expect("memory");
        let mut slots: Vec<SlotOf<S>> =
            lens.iter().chain(&[1]).map(|&len| fixture.slot(len)).collect();
        let chunks: Vec<Range<usize>> = lens.iter().map(|&len| 0..len).collect();
        let batch = Batch::new(&fixture.memory, &chunks, &mut slots);
        let mut x = backend.upload(&before, columns);
        backend.add_embedding(&table, &indices, &batch, &mut x);
        let (weight, mut expected) = (Matrix::new(&weight, columns), Matrix::new(&before, columns));
        for (row, &index) in expected.values.chunks_exact_mut(columns).zip(&indices) {
            row.iter_mut().zip(weight.row(index as usize)).for_each(|(x, added)| *x += added);
        }
        check::<S>(&backend, &x, &expected, &format!("add_embedding seed {seed}"));
        let of_beam = &values(&backend, &x)[rows * columns..];
        assert_eq!(of_beam, &before[rows * columns..], "seed {seed}: the row of a beam");
    }
}

pub fn layer_norm_is_the_formula_with_weights_and_without<S: Subject>() {
    let backend = S::open();
    for seed in S::seeds(100) {
        let mut cases = Cases::new(seed);
        let (rows, columns) = (cases.size(70), cases.size(300));
        let x = cases.numbers(rows * columns);
        let weights = [cases.numbers(columns), cases.numbers(columns)];
        let vectors = weights.each_ref().map(|weight| {
            backend.vector(&[Tensor::new(&[columns], weight.clone())]).expect("memory")
        });
        let is_affine = cases.rng.bool();
        let [scale, shift] = &vectors;
        let mut out = backend.buffer();
        let affine = is_affine.then_some(Affine { scale, shift });
        backend.layer_norm(&backend.upload(&x, columns), affine, 1e-5, &mut out);
        let weights = weights.map(|weight| Matrix::new(&weight, columns).values);
        let affine = is_affine.then(|| weights.each_ref().map(|weight| &weight[..]));
        let expected = truth::layer_norm(&Matrix::new(&x, columns), affine, 1e-5);
        check::<S>(&backend, &out, &expected, &format!("layer_norm seed {seed}"));
    }
}

/// The mean of squares less the square of the mean would have no digit left in these rows.
pub fn layer_norm_keeps_a_small_variance_around_a_large_mean<S: Subject>() {
    let backend = S::open();
    let columns = 1000;
    // 16 bits hold both numbers.
    let x: Vec<f32> = (0..columns).map(|at| if at == 7 { 129.0 } else { 128.0 }).collect();
    let mut out = backend.buffer();
    backend.layer_norm(&backend.upload(&x, columns), None, 1e-5, &mut out);
    let expected = truth::layer_norm(&Matrix::new(&x, columns), None, 1e-5);
    let error = relative_error(&values(&backend, &out), &expected.values, "layer_norm");
    // The mean, 128.001, is rounded to f32: that is an error of 8e-6 beside a deviation of 3e-2.
    assert!(error < S::TOLERANCE.max(1e-3), "relative error {error:.2e}");

    // A row of equal numbers becomes zeros, and nothing that is not finite.
    let x = vec![3.0; columns];
    backend.layer_norm(&backend.upload(&x, columns), None, 1e-12, &mut out);
    assert_eq!(values(&backend, &out), vec![0.0; columns]);
}

pub fn attend_pointwise_is_the_formula_however_targets_are_read<S: Subject>() {
    let backend = S::open();
    for seed in S::seeds(60) {
        let case = PointwiseCase::new(&mut Cases::new(seed));
        let heads = case.heads;
        let expected = truth::attend_pointwise(&case);
        let mut runs = Vec::new();
        for is_cut in [false, true] {
            let found = case.run(&backend, is_cut).expect("the device works");
            let what = format!("attend_pointwise seed {seed}, cut: {is_cut}");
            let (row, error) = worst_row(&found, &expected, heads.out_dim(), &what);
            assert!(error < S::TOLERANCE, "{what}: row {row}: relative error {error:.2e}");
            runs.push(found);
        }
        assert!(runs[0] == runs[1], "seed {seed}: bits depend on how a prompt is cut");
    }
}

pub fn gated_norm_is_the_formula_in_every_form<S: Subject>() {
    let backend = S::open();
    for seed in S::seeds(100) {
        let case = GatedNormCase::new(&mut Cases::new(seed));
        let found = case.run(&backend).expect("the device works");
        let expected = truth::gated_norm(&case);
        let error = relative_error(&found, &expected, "gated_norm");
        assert!(error < S::TOLERANCE, "seed {seed}: relative error {error:.2e}");
    }
}

pub fn gru_is_the_formula_for_prompts_of_any_length<S: Subject>() {
    let backend = S::open();
    for seed in S::seeds(60) {
        let mut cases = Cases::new(seed);
        let width = cases.size(70);
        let lens: Vec<usize> = (0..cases.size(5)).map(|_| cases.size(12)).collect();
        let rows: usize = lens.iter().sum();
        let inputs = cases.numbers(rows * 3 * width);
        let weight = cases.recurrent_weight(width);
        let bias = cases.rng.bool().then(|| cases.numbers(3 * width));
        let matrix = Tensor::new(&[3 * width, width], weight.clone());
        let matrix = backend.matrix(&[matrix]).expect("memory");
        let vector = bias
            .clone()
            .map(|bias| backend.vector(&[Tensor::new(&[3 * width], bias)]).expect("memory"));
        let mut fixture = Fixture::new(&backend, Heads::new(1, 1, 2)).expect("memory");
        let mut slots: Vec<SlotOf<S>> = lens.iter().map(|&len| fixture.slot(len)).collect();
        let chunks: Vec<Range<usize>> = lens.iter().map(|&len| 0..len).collect();
        let batch = Batch::new(&fixture.memory, &chunks, &mut slots);
        let uploaded = backend.upload(&inputs, 3 * width);
        let mut out = backend.buffer();
        backend.gru(&uploaded, &matrix, vector.as_ref(), &batch, &mut out);
        let weight = Matrix::new(&weight, width);
        let bias = Matrix::new(&bias.unwrap_or(vec![0.0; 3 * width]), 3 * width).values;
        let mut expected = Matrix { values: Vec::new(), columns: width };
        let mut rest = &inputs[..];
        for len in lens {
            let (of_prompt, after) = rest.split_at(len * 3 * width);
            let inputs = Matrix::new(of_prompt, 3 * width);
            expected.values.extend(truth::gru(&inputs, &weight, &bias));
            rest = after;
        }
        check::<S>(&backend, &out, &expected, &format!("gru seed {seed}"));
    }
}

pub fn rms_norm_is_the_formula<S: Subject>() {
    let backend = S::open();
    for seed in S::seeds(100) {
        let mut cases = Cases::new(seed);
        let (rows, columns) = (cases.size(70), cases.size(300));
        let (x, weight) = (cases.numbers(rows * columns), cases.numbers(columns));
        let mut out = backend.buffer();
        let vector = backend.vector(&[Tensor::new(&[columns], weight.clone())]).expect("memory");
        backend.rms_norm(&backend.upload(&x, columns), &vector, 1e-6, &mut out);
        let weight = Matrix::new(&weight, columns);
        let expected = truth::rms_norm(&Matrix::new(&x, columns), &weight.values, 1e-6);
        check::<S>(&backend, &out, &expected, &format!("rms_norm seed {seed}"));
    }
}

/// Sums of squares in fewer bits than f32 has would stop growing in these rows.
pub fn rms_norm_loses_no_small_square_behind_large_ones<S: Subject>() {
    let backend = S::open();
    let rows = truth::rows_of_many_small_squares();
    let columns = rows.columns;
    let x: Vec<f32> = rows.values.iter().map(|&x| x as f32).collect();
    let mut out = backend.buffer();
    let weight = Tensor::new(&[columns], vec![1.0; columns]);
    let weight = backend.vector(&[weight]).expect("memory");
    backend.rms_norm(&backend.upload(&x, columns), &weight, 1e-6, &mut out);
    let expected = truth::rms_norm(&rows, &vec![1.0; columns], 1e-6);
    let found = values(&backend, &out);
    let (row, error) = worst_row(&found, &expected.values, columns, "rms_norm");
    assert!(error < S::TOLERANCE, "row {row}: relative error {error:.2e}");
}

pub fn matmul_is_the_formula_with_every_epilogue<S: Subject>() {
    let backend = S::open();
    let activations = [Activation::Relu, Activation::Gelu, Activation::GeluTanh, Activation::Silu];
    for seed in S::seeds(120) {
        let mut cases = Cases::new(seed);
        let (rows, columns, out_columns) = (cases.size(130), cases.size(600), cases.size(300));
        let x = cases.numbers(rows * columns);
        let weight = cases.numbers(out_columns * columns);
        let cut = cases.rng.usize(0..=out_columns) * columns;
        let parts = [&weight[..cut], &weight[cut..]]
            .map(|part| Tensor::new(&[part.len() / columns, columns], part.to_vec()));
        let bias = cases.rng.bool().then(|| cases.numbers(out_columns));
        let epilogue = match cases.rng.usize(0..6) {
            0 => Epilogue::Store,
            1 => Epilogue::Add,
            at => Epilogue::Activate(activations[at - 2]),
        };
        let before = cases.numbers(rows * out_columns);
        let mut out = backend.upload(&before, out_columns);
        backend.matmul(
            &backend.upload(&x, columns),
            &backend.matrix(&parts).expect("memory"),
            bias.clone()
                .map(|bias| backend.vector(&[Tensor::new(&[out_columns], bias)]).expect("memory"))
                .as_ref(),
            epilogue,
            &mut out,
        );
        let bias = bias.map(|bias| Matrix::new(&bias, out_columns).values);
        let (x, weight) = (Matrix::new(&x, columns), Matrix::new(&weight, columns));
        let mut expected = truth::matmul(&x, &weight, bias.as_deref());
        for (value, before) in expected.values.iter_mut().zip(before) {
            match epilogue {
                Epilogue::Store => {}
                Epilogue::Add => *value += f64::from(before),
                Epilogue::Activate(activation) => *value = truth::activate(activation, *value),
            }
        }
        check::<S>(&backend, &out, &expected, &format!("matmul {epilogue:?} seed {seed}"));
    }
}

pub fn a_row_of_a_product_does_not_depend_on_the_other_rows<S: Subject>() {
    let backend = S::open();
    for seed in S::seeds(60) {
        let mut cases = Cases::new(seed);
        let (rows, columns, out_columns) = (cases.size(200), cases.size(1300), cases.size(150));
        let x = cases.numbers(rows * columns);
        let weight = Tensor::new(&[out_columns, columns], cases.numbers(out_columns * columns));
        let weight = backend.matrix(&[weight]).expect("memory");
        let product = |rows: &[f32]| {
            let mut out = backend.buffer();
            let x = backend.upload(rows, columns);
            backend.matmul(&x, &weight, None, Epilogue::Store, &mut out);
            values(&backend, &out)
        };
        let together = product(&x);
        for (row, together) in x.chunks(columns).zip(together.chunks(out_columns)) {
            assert_eq!(product(row), together, "seed {seed}");
        }
    }
}

pub fn gate_is_the_formula<S: Subject>() {
    let backend = S::open();
    let activations = [Activation::Silu, Activation::GeluTanh, Activation::Relu];
    for (seed, activation) in S::seeds(60).zip(activations.into_iter().cycle()) {
        let mut cases = Cases::new(seed);
        let (rows, columns) = (cases.size(60), cases.size(400));
        let x = cases.numbers(rows * 2 * columns);
        let mut out = backend.buffer();
        backend.glu(&backend.upload(&x, 2 * columns), activation, &mut out);
        let mut values = Vec::new();
        for row in Matrix::new(&x, 2 * columns).rows() {
            let (gates, linear) = row.split_at(columns);
            let gated = gates.iter().zip(linear);
            values.extend(gated.map(|(gate, linear)| truth::activate(activation, *gate) * linear));
        }
        check::<S>(&backend, &out, &Matrix { values, columns }, &format!("glu seed {seed}"));
    }
}

pub fn rotation_and_rotary_turn_query_and_key_heads_and_keep_keys_and_values<S: Subject>() {
    let backend = S::open();
    for seed in S::seeds(80) {
        let mut cases = Cases::new(seed);
        let heads = cases.heads();
        let lens: Vec<usize> = (0..cases.size(4).min(3)).map(|_| cases.size(150)).collect();
        let rows: usize = lens.iter().sum();
        let frequencies: Vec<f32> = (0..heads.head_dim() / 2)
            .map(|pair| 10_000f32.powf(-2.0 * pair as f32 / heads.head_dim() as f32))
            .collect();
        let qkv = cases.numbers(rows * heads.qkv_dim());
        let norms = cases
            .rng
            .bool()
            .then(|| [cases.numbers(heads.head_dim()), cases.numbers(heads.head_dim())]);
        let vector = |values: &[f32]| {
            backend.vector(&[Tensor::new(&[values.len()], values.to_vec())]).expect("memory")
        };
        let vectors = norms.as_ref().map(|norms| norms.each_ref().map(|norm| vector(norm)));
        let given = vectors.as_ref().map(|[query, key]| HeadNorms { query, key, epsilon: 1e-6 });

        // The rows after a cut are read in a pass of their own.
        let mut fixture = Fixture::new(&backend, heads).expect("memory");
        let mut slots: Vec<SlotOf<S>> = lens.iter().map(|&len| fixture.slot(len)).collect();
        let cut: Vec<usize> = lens.iter().map(|&len| cases.rng.usize(0..=len)).collect();
        let early: Vec<Range<usize>> = cut.iter().map(|&cut| 0..cut).collect();
        let late: Vec<Range<usize>> = cut.iter().zip(&lens).map(|(&cut, &len)| cut..len).collect();
        let mut attended = backend.buffer();
        let mut found: Vec<Vec<f32>> = vec![Vec::new(); lens.len()];
        for chunks in [early, late] {
            let x = rows_of(&qkv, heads.qkv_dim(), &lens, &chunks);
            if x.is_empty() {
                continue;
            }
            let mut out = backend.upload(&x, heads.qkv_dim());
            let mut rope_tables = backend.buffer();
            let mut batch = Batch::new(&fixture.memory, &chunks, &mut slots);
            backend.rope_tables(&vector(&frequencies), &batch, &mut rope_tables);
            backend.apply_rope(0, &mut out, heads, given, &rope_tables, &mut batch);
            let attention = AttentionSpec::softmax(heads, Mask::Causal, 0.3);
            backend.attend_prefill(0, &out, &attention, &batch, &mut attended);
            let values = values(&backend, &out);
            let mut values = &values[..];
            for (found, chunk) in found.iter_mut().zip(&chunks) {
                let (of_chunk, rest) = values.split_at(chunk.len() * heads.qkv_dim());
                found.extend_from_slice(of_chunk);
                values = rest;
            }
        }

        let mut values = Vec::new();
        let positions = lens.iter().flat_map(|&len| 0..len);
        for (row, position) in Matrix::new(&qkv, heads.qkv_dim()).rows().zip(positions) {
            for (head, columns) in row.chunks_exact(heads.head_dim()).enumerate() {
                let is_query = head < heads.num_heads;
                if head >= heads.num_heads + heads.num_kv_heads {
                    values.extend_from_slice(columns);
                    continue;
                }
                let mut columns = columns.to_vec();
                if let Some(norms) = &norms {
                    let norm = Matrix::new(&norms[usize::from(!is_query)], heads.head_dim());
                    let one = Matrix { values: columns, columns: heads.head_dim() };
                    columns = truth::rms_norm(&one, &norm.values, 1e-6).values;
                }
                values.extend(truth::rotate(&columns, position, &frequencies));
            }
        }
        let error = relative_error(&found.concat(), &values, "apply_rope");
        assert!(error < S::TOLERANCE, "apply_rope seed {seed}: relative error {error:.2e}");

        // What the last pass attended to are the keys and values that were kept.
        let turned = Matrix { values, columns: heads.qkv_dim() };
        let all = truth::attend_prefill(
            &turned,
            heads,
            Mask::Causal,
            f64::from(0.3f32),
            |_, _| 0.0,
            &lens,
        );
        let late: Vec<Range<usize>> = cut.iter().zip(&lens).map(|(&cut, &len)| cut..len).collect();
        let all: Vec<f32> = all.values.iter().map(|&x| x as f32).collect();
        let expected = rows_of(&all, heads.query_dim(), &lens, &late);
        if !expected.is_empty() {
            let expected: Vec<f64> = expected.iter().map(|&x| f64::from(x)).collect();
            let attended = backend.download(&attended).expect("the device works");
            let error = relative_error(&attended, &expected, "kept");
            assert!(error < S::TOLERANCE, "kept, seed {seed}: relative error {error:.2e}");
        }
    }
}

pub fn attend_prefill_is_the_formula_however_prompts_are_cut<S: Subject>() {
    let backend = S::open();
    for seed in S::seeds(80) {
        let mut cases = Cases::new(seed);
        let heads = cases.heads();
        let lens: Vec<usize> = (0..cases.size(4).min(3)).map(|_| cases.size(300)).collect();
        let columns = heads.qkv_dim();
        let qkv = cases.numbers(lens.iter().sum::<usize>() * columns);
        let mask = if cases.rng.bool() { Mask::Causal } else { Mask::Bidirectional };
        let longest = lens.iter().copied().max().unwrap_or(1);
        let width = 2 * longest - 1;
        let bias = cases.rng.bool().then(|| cases.numbers(heads.num_heads * width));
        let whole: Vec<Range<usize>> = lens.iter().map(|&len| 0..len).collect();
        let batches = chunks(&mut cases, &lens);
        let attend = |batches: &[Vec<Range<usize>>]| {
            let mut fixture = Fixture::new(&backend, heads).expect("memory");
            let mut slots: Vec<SlotOf<S>> = lens.iter().map(|&len| fixture.slot(len)).collect();
            let mut rows: Vec<Vec<f32>> = vec![Vec::new(); lens.len()];
            if mask == Mask::Bidirectional {
                let x = backend.upload(&qkv, columns);
                let batch = Batch::new(&fixture.memory, &whole, &mut slots);
                backend.store_context(0, &x, heads.query_dim(), heads, &batch);
            }
            for chunks in batches {
                let x = backend.upload(&rows_of(&qkv, columns, &lens, chunks), columns);
                let batch = Batch::new(&fixture.memory, chunks, &mut slots);
                let mut out = backend.buffer();
                backend.store_context(0, &x, heads.query_dim(), heads, &batch);
                let bias = bias.as_deref();
                let attention = AttentionSpec { bias, ..AttentionSpec::softmax(heads, mask, 0.3) };
                backend.attend_prefill(0, &x, &attention, &batch, &mut out);
                let values = values(&backend, &out);
                let mut values = &values[..];
                for (rows, chunk) in rows.iter_mut().zip(chunks) {
                    let (of_chunk, rest) = values.split_at(chunk.len() * heads.query_dim());
                    rows.extend_from_slice(of_chunk);
                    values = rest;
                }
            }
            backend.upload(&rows.concat(), heads.query_dim())
        };
        let out = attend(&batches);
        let of_distance = |head: usize, distance: i64| {
            let at = head * width + (distance + longest as i64 - 1) as usize;
            bias.as_ref().map_or(0.0, |bias| f64::from(bias[at]))
        };
        let matrix = Matrix::new(&qkv, columns);
        let scale = f64::from(0.3f32);
        let expected = truth::attend_prefill(&matrix, heads, mask, scale, of_distance, &lens);
        check::<S>(
            &backend,
            &out,
            &expected,
            &format!("attend_prefill {mask:?} {lens:?} seed {seed}"),
        );
        let together = attend(slice::from_ref(&whole));
        assert_eq!(values(&backend, &out), values(&backend, &together), "in parts, seed {seed}");
    }
}

/// Each prompt is followed by a beam, which is what one more token of the prompt would be.
pub fn attention_is_the_formula_for_every_row_at_the_edges_of_pages<S: Subject>() {
    let backend = S::open();
    let lens = [63, 64, 65, 128, 129];
    for (num_heads, num_kv_heads, head_dim) in [(3, 1, 64), (2, 2, 128)] {
        let heads = Heads::new(num_heads, num_kv_heads, head_dim);
        let columns = heads.qkv_dim();
        let mut cases = Cases::new(head_dim as u64);
        let with_beam: Vec<usize> = lens.iter().map(|len| len + 1).collect();
        let qkv = cases.numbers(with_beam.iter().sum::<usize>() * columns);
        let prompts: Vec<Range<usize>> = lens.iter().map(|&len| 0..len).collect();
        let ends: Vec<Range<usize>> = lens.iter().map(|&len| len..len + 1).collect();
        let mut fixture = Fixture::new(&backend, heads).expect("memory");
        let mut slots: Vec<SlotOf<S>> = lens.iter().map(|&len| fixture.slot(len)).collect();
        let prefill = |x: &[f32], chunks: &[Range<usize>], slots: &mut [SlotOf<S>]| {
            let x = backend.upload(x, columns);
            let batch = Batch::new(&fixture.memory, chunks, slots);
            let mut out = backend.buffer();
            let causal = AttentionSpec::softmax(heads, Mask::Causal, 0.3);
            backend.store_context(0, &x, heads.query_dim(), heads, &batch);
            backend.attend_prefill(0, &x, &causal, &batch, &mut out);
            values(&backend, &out)
        };
        let x = rows_of(&qkv, columns, &with_beam, &prompts);
        let together = prefill(&x, &prompts, &mut slots);
        let (mut first, mut alone) = (0, Vec::new());
        for (prompt, slot) in prompts.iter().zip(&mut slots) {
            let x = &x[first * columns..(first + prompt.len()) * columns];
            alone.extend(prefill(x, slice::from_ref(prompt), slice::from_mut(slot)));
            first += prompt.len();
        }
        assert_eq!(together, alone, "a prompt's result depends on no other prompt");

        let x = backend.upload(&rows_of(&qkv, columns, &with_beam, &ends), columns);
        let mut batch = Batch::new(&fixture.memory, &[], &mut slots);
        backend.append_tail(0, &x, heads, &mut batch);
        let mut out = backend.buffer();
        let over_both = AttentionSpec::softmax(heads, KvScope::Both, 0.3);
        backend.attend_beams(0, &x, &over_both, &batch, &mut out);
        let of_beams = values(&backend, &out);

        let mut found = Vec::new();
        let mut rest = &together[..];
        for (len, of_beam) in lens.iter().zip(of_beams.chunks_exact(heads.query_dim())) {
            let (of_prompt, others) = rest.split_at(len * heads.query_dim());
            found.extend_from_slice(of_prompt);
            found.extend_from_slice(of_beam);
            rest = others;
        }
        let (qkv, scale) = (Matrix::new(&qkv, columns), f64::from(0.3f32));
        let expected =
            truth::attend_prefill(&qkv, heads, Mask::Causal, scale, |_, _| 0.0, &with_beam);
        let (at, error) = worst_row(&found, &expected.values, head_dim, "attention");
        let (row, head) = (at / num_heads, at % num_heads);
        assert!(
            error < S::TOLERANCE,
            "row {row} of prompts of {with_beam:?}, head {head}: relative error {error:.2e}"
        );
    }
}

pub fn advance_beams_finds_the_best_and_attend_beams_follows_the_ancestors<S: Subject>() {
    let backend = S::open();
    for seed in S::seeds(250) {
        let mut cases = Cases::new(seed);
        let heads = cases.heads();
        let (num_levels, num_codes) = (cases.rng.usize(1..5), cases.rng.u16(1..12));
        let hidden_dim = cases.size(40);
        // Levels lie anywhere in the vocabulary, one of them scattered, some codes without a token
        // where no item uses them.
        let vocab = 20 + 12 * (num_levels + 2) as u32;
        let levels: Vec<Vec<u32>> = (0..num_levels as u32)
            .map(|level| {
                let first = 5 + level * 12;
                let mut tokens: Vec<u32> = (first..first + u32::from(num_codes)).collect();
                if cases.rng.bool() {
                    cases.rng.shuffle(&mut tokens);
                }
                if cases.rng.bool() {
                    tokens.push(NO_TOKEN);
                }
                tokens
            })
            .collect();
        // Tokens are forced before the levels, between them and after them, counted or not.
        let mut forced = |most: usize| -> Vec<StepChoice<'static>> {
            let count = cases.rng.usize(0..most);
            let token = |_| StepChoice::Forced {
                token: cases.rng.u32(0..vocab),
                is_counted: cases.rng.bool(),
            };
            (0..count).map(token).collect()
        };
        let mut choices = forced(3);
        for level in 0..num_levels {
            choices.push(StepChoice::Level(level));
            choices.extend(forced(if level + 1 == num_levels { 3 } else { 2 }));
        }
        let steps = Steps { levels, choices };
        let known: Vec<u32> = steps
            .choices
            .iter()
            .filter_map(|choice| match choice {
                StepChoice::Forced { token, .. } => cases.rng.bool().then_some(*token),
                _ => None,
            })
            .collect();
        let head_weight = cases.numbers(vocab as usize * hidden_dim);
        let head = Tensor::new(&[vocab as usize, hidden_dim], head_weight.clone());
        let head = backend.head(head, &steps.levels, &known).expect("memory");
        let head_weight = Matrix::new(&head_weight, hidden_dim);
        let num_slots = cases.rng.usize(1..4);
        let mut walks: Vec<Walk> =
            (0..num_slots).map(|_| Walk::new(&mut cases, num_levels, num_codes, heads)).collect();
        let mut fixture = Fixture::new(&backend, heads).expect("memory");
        let mut slots: Vec<SlotOf<S>> =
            walks.iter().map(|walk| fixture.slot(walk.context_len)).collect();
        let lens: Vec<usize> = walks.iter().map(|walk| walk.context_len).collect();
        let context: Vec<f32> = walks.iter().flat_map(|walk| &walk.context).copied().collect();
        for chunks in chunks(&mut cases, &lens) {
            let context = rows_of(&context, 2 * heads.kv_dim(), &lens, &chunks);
            let context = backend.upload(&context, 2 * heads.kv_dim());
            let batch = Batch::new(&fixture.memory, &chunks, &mut slots);
            backend.store_context(0, &context, 0, heads, &batch);
        }
        // Decoders behind an encoder write a position before the first step, others do not.
        let starts_with_tail = cases.rng.bool();
        let bias = cases.numbers(heads.num_heads * (steps.len() + 1));

        let mut scores = backend.logits();
        for step in 0..steps.len() {
            let what = format!("seed {seed} step {step}");
            let first_rows = first_rows(&backend, &slots);
            let rows = first_rows[num_slots];
            if step > 0 || starts_with_tail {
                check_tails::<S>(&fixture, &mut cases, heads, &bias, &mut walks, &mut slots, &what);
            }
            let hidden = cases.numbers(rows * hidden_dim);
            let logits = truth::matmul(&Matrix::new(&hidden, hidden_dim), &head_weight, None);
            let before: Vec<Vec<Vec<u32>>> = slots
                .iter()
                .map(|slot| {
                    let beams = beams_of(&backend, slot);
                    beams.into_iter().map(|beam| beam.tokens).collect()
                })
                .collect();
            let legalities: Vec<AllowedSet> = walks.iter().map(Walk::allowed_set).collect();
            let rules: Vec<SearchRule<'_>> = walks
                .iter()
                .zip(&legalities)
                .map(|(walk, allowed_set)| walk.rule(allowed_set, &steps, step))
                .collect();
            let hidden = backend.upload(&hidden, hidden_dim);
            let mut pass = Batch::new(&fixture.memory, &[], &mut slots);
            backend.lm_head(&hidden, &head, &rules, &mut pass, &mut scores);
            backend.advance_beams(&scores, &head, &rules, &mut pass);
            drop(rules);

            for ((walk, first), (slot, before)) in
                walks.iter_mut().zip(first_rows).zip(slots.iter().zip(before))
            {
                let mut all = Vec::new();
                for (row, prefix) in (first..).zip(&before) {
                    all.extend(walk.continuations(prefix, logits.row(row), &steps));
                }
                all.sort_by(|a, b| b.1.total_cmp(&a.1));
                let found = beams_of(&backend, slot);
                let expected = match steps.choices[step] {
                    StepChoice::Forced { .. } => all.len(),
                    _ => all.len().min(walk.beams),
                };
                assert_eq!(found.len(), expected, "{what}: number of beams");
                let scores: HashMap<_, _> = all.iter().cloned().collect();
                for (rank, beam) in found.iter().enumerate() {
                    let score = scores.get(&beam.tokens);
                    let score = score.unwrap_or_else(|| panic!("{what}: {beam:?} is not legal"));
                    let at_rank = all[rank].1;
                    let found = f64::from(beam.score);
                    assert!(
                        (found - score).abs() < S::SCORE_TOLERANCE,
                        "{what}: {found}, not {score}"
                    );
                    assert!((found - at_rank).abs() < S::SCORE_TOLERANCE, "{what}: rank {rank}");
                }
                walk.prefixes =
                    found.iter().map(|beam| (beam.tokens.clone(), scores[&beam.tokens])).collect();
            }
        }
    }
}

/// Writes a position of random KV for every beam, then attends in every way.
fn check_tails<S: Subject>(
    fixture: &Fixture<'_, S::B>,
    cases: &mut Cases,
    heads: Heads,
    bias: &[f32],
    walks: &mut [Walk],
    slots: &mut [SlotOf<S>],
    what: &str,
) {
    let backend = fixture.backend;
    let first_rows = first_rows(backend, slots);
    let rows = first_rows[slots.len()];
    let qkv_values = cases.numbers(rows * heads.qkv_dim());
    let qkv = backend.upload(&qkv_values, heads.qkv_dim());
    let mut batch = Batch::new(&fixture.memory, &[], slots);
    backend.append_tail(0, &qkv, heads, &mut batch);
    for ((walk, slot), &first) in walks.iter_mut().zip(&*slots).zip(&first_rows) {
        for (row, beam) in (first..).zip(beams_of(backend, slot)) {
            let kv = &qkv_values[row * heads.qkv_dim()..][heads.query_dim()..heads.qkv_dim()];
            walk.tails.insert(beam.tokens, kv.to_vec());
        }
    }
    for scope in [KvScope::Context, KvScope::Tail, KvScope::Both] {
        let tail_bias = (scope == KvScope::Tail).then_some(bias);
        let vector = backend.vector(&[Tensor::new(&[bias.len()], bias.to_vec())]).expect("memory");
        let given = tail_bias.is_some().then_some(&vector);
        let attention = AttentionSpec { bias: given, ..AttentionSpec::softmax(heads, scope, 0.4) };
        let mut out = backend.buffer();
        let batch = Batch::new(&fixture.memory, &[], slots);
        backend.attend_beams(0, &qkv, &attention, &batch, &mut out);
        let all_found = backend.download(&out).expect("the device works");
        let (mut values, mut found) = (Vec::new(), Vec::new());
        for ((walk, slot), &first) in walks.iter().zip(&*slots).zip(&first_rows) {
            let context = Matrix::new(&walk.context, 2 * heads.kv_dim());
            for (row, beam) in (first..).zip(beams_of(backend, slot)) {
                found.extend_from_slice(&all_found[row * heads.query_dim()..][..heads.query_dim()]);
                let tail: Vec<Matrix> = (0..=beam.tokens.len())
                    .filter_map(|len| walk.tails.get(&beam.tokens[..len]))
                    .map(|kv| Matrix::new(kv, 2 * heads.kv_dim()))
                    .collect();
                let query = Matrix::new(&qkv_values[row * heads.qkv_dim()..], 1).values;
                for head in 0..heads.num_heads {
                    let at = head / (heads.num_heads / heads.num_kv_heads) * heads.head_dim();
                    fn parts(kv: &[f64], at: usize, heads: Heads) -> (&[f64], &[f64]) {
                        let (keys, values) = kv.split_at(heads.kv_dim());
                        (&keys[at..at + heads.head_dim()], &values[at..at + heads.head_dim()])
                    }
                    let mut keys_values = Vec::new();
                    if scope != KvScope::Tail {
                        keys_values.extend(context.rows().map(|kv| {
                            let (keys, values) = parts(kv, at, heads);
                            (keys, values, 0.0)
                        }));
                    }
                    if scope != KvScope::Context {
                        keys_values.extend(tail.iter().enumerate().map(|(position, kv)| {
                            let (keys, values) = parts(&kv.values, at, heads);
                            let back = tail.len() - 1 - position;
                            let row = bias.len() / heads.num_heads;
                            let bias =
                                tail_bias.map_or(0.0, |bias| f64::from(bias[head * row + back]));
                            (keys, values, bias)
                        }));
                    }
                    let query = &query[head * heads.head_dim()..(head + 1) * heads.head_dim()];
                    values.extend(truth::attend(query, &keys_values, f64::from(0.4f32)));
                }
            }
        }
        let what = format!("attend_beams {scope:?} {what}");
        let error = relative_error(&found, &values, &what);
        assert!(error < S::TOLERANCE, "{what}: relative error {error:.2e}");
    }
}

pub fn embed_reads_each_beams_newest_token<S: Subject>() {
    let mut cases = Cases::new(1);
    let heads = cases.heads();
    let backend = S::open();
    let mut fixture = Fixture::new(&backend, heads).expect("memory");
    let catalog = random_catalog(&mut cases.rng, 2, 6).snapshot();
    let levels = [0, 6].map(|first| (first..first + 6).collect());
    let weight = cases.numbers(12 * 5);
    let tensor = Tensor::new(&[12, 5], weight.clone());
    let (head, table) = (
        backend.head(tensor.clone(), &levels, &[]).expect("memory"),
        backend.table(tensor, None).expect("memory"),
    );
    let mut slots = vec![fixture.slot(1), fixture.slot(1)];
    let (mut rows, mut logits) = (backend.buffer(), backend.logits());
    let allowed_set = catalog.allowed_set(&[], None).expect("no filter");
    for step in 0..2 {
        let rules = [SearchRule::new(&catalog, &allowed_set, step, 9)];
        let beams = backend.num_beams(&slots[1]);
        let hidden = backend.upload(&cases.numbers(beams * 5), 5);
        let mut pass = Batch::new(&fixture.memory, &[], &mut slots[1..]);
        backend.lm_head(&hidden, &head, &rules, &mut pass, &mut logits);
        backend.advance_beams(&logits, &head, &rules, &mut pass);
        let chunk = 0..1;
        let pass = Batch::new(&fixture.memory, std::slice::from_ref(&chunk), &mut slots);
        backend.embed(&table, &[7], &pass, &mut rows);
        let beams = beams_of(&backend, &slots[1]);
        let newest = beams.iter().map(|beam| beam.tokens[step] as usize);
        let expected: Vec<f32> = std::iter::once(7)
            .chain(newest)
            .flat_map(|token| &weight[token * 5..(token + 1) * 5])
            .copied()
            .collect();
        assert_eq!(values(&backend, &rows)[..expected.len()], expected);
    }
}

pub fn rows_of_prompts_and_of_beams_leave_each_other_alone<S: Subject>() {
    for seed in S::seeds(40) {
        let mut cases = Cases::new(seed);
        let heads = cases.heads();
        let backend = S::open();
        let mut fixture = Fixture::new(&backend, heads).expect("memory");
        let (prompt_len, context_len) = (cases.size(150), cases.size(150));
        let mut slots = vec![fixture.slot(prompt_len), fixture.slot(context_len)];
        let context =
            backend.upload(&cases.numbers(context_len * 2 * heads.kv_dim()), 2 * heads.kv_dim());
        let whole = 0..context_len;
        let batch = Batch::new(&fixture.memory, slice::from_ref(&whole), &mut slots[1..]);
        backend.store_context(0, &context, 0, heads, &batch);
        let qkv = cases.numbers((prompt_len + 1) * heads.qkv_dim());
        let attend = |qkv: &[f32], chunks: &[Range<usize>], slots: &mut [SlotOf<S>]| {
            let qkv = backend.upload(qkv, heads.qkv_dim());
            let mut batch = Batch::new(&fixture.memory, chunks, slots);
            let mut out = backend.buffer();
            let over_prompt = AttentionSpec::softmax(heads, Mask::Causal, 0.3);
            let over_both = AttentionSpec::softmax(heads, KvScope::Both, 0.3);
            backend.store_context(0, &qkv, heads.query_dim(), heads, &batch);
            backend.append_tail(0, &qkv, heads, &mut batch);
            backend.attend_prefill(0, &qkv, &over_prompt, &batch, &mut out);
            backend.attend_beams(0, &qkv, &over_both, &batch, &mut out);
            values(&backend, &out)
        };
        let chunk = 0..prompt_len;
        let chunks = slice::from_ref(&chunk);
        let together = attend(&qkv, chunks, &mut slots);
        let (prompt, beam) = qkv.split_at(prompt_len * heads.qkv_dim());
        let apart =
            [attend(prompt, chunks, &mut slots[..1]), attend(beam, &[], &mut slots[1..])].concat();
        assert_eq!(together, apart, "seed {seed}");
    }
}

pub fn searches_at_different_steps_share_a_step<S: Subject>() {
    let backend = S::open();
    for seed in S::seeds(60) {
        let mut cases = Cases::new(seed);
        let heads = Heads::new(1, 1, 2);
        let hidden_dim = cases.size(40);
        let (num_levels, vocab) = (3, 60);
        let levels = (0..num_levels).map(|level| (5 + level * 12..15 + level * 12).collect());
        let choices = [StepChoice::Forced { token: 54, is_counted: false }]
            .into_iter()
            .chain((0..num_levels as usize).map(StepChoice::Level))
            .chain([StepChoice::Forced { token: 55, is_counted: true }]);
        let steps = Steps { levels: levels.collect(), choices: choices.collect() };
        let weight = Tensor::new(&[vocab, hidden_dim], cases.numbers(vocab * hidden_dim));
        let head = backend.head(weight, &steps.levels, &[55]).expect("memory");
        let walks: Vec<Walk> =
            (0..3).map(|_| Walk::new(&mut cases, num_levels as usize, 10, heads)).collect();
        let legalities: Vec<AllowedSet> = walks.iter().map(Walk::allowed_set).collect();
        // Each takes its steps alone, then all do, each begun one step after the one before.
        let most = walks.iter().map(|walk| walk.beams).max().expect("three walks");
        let hidden: Vec<Vec<Vec<f32>>> = walks
            .iter()
            .map(|_| steps.choices.iter().map(|_| cases.numbers(most * hidden_dim)).collect())
            .collect();
        let advance = |memory: &MemoryOf<S>, slots: &mut [SlotOf<S>], who: &[usize]| {
            let rows = who.iter().zip(&*slots).flat_map(|(&walk, slot)| {
                let hidden = &hidden[walk][backend.num_steps(slot)];
                hidden[..backend.num_beams(slot) * hidden_dim].to_vec()
            });
            let rows = backend.upload(&rows.collect::<Vec<f32>>(), hidden_dim);
            let rules: Vec<SearchRule<'_>> = who
                .iter()
                .zip(&*slots)
                .map(|(&walk, slot)| {
                    walks[walk].rule(&legalities[walk], &steps, backend.num_steps(slot))
                })
                .collect();
            let mut logits = backend.logits();
            let mut pass = Batch::new(memory, &[], slots);
            backend.lm_head(&rows, &head, &rules, &mut pass, &mut logits);
            backend.advance_beams(&logits, &head, &rules, &mut pass);
        };
        let mut fixture = Fixture::new(&backend, heads).expect("memory");
        let mut alone: Vec<SlotOf<S>> = walks.iter().map(|_| fixture.slot(1)).collect();
        for (walk, slot) in alone.iter_mut().enumerate() {
            for _ in 0..steps.len() {
                advance(&fixture.memory, slice::from_mut(slot), &[walk]);
            }
        }
        let mut together: Vec<SlotOf<S>> = walks.iter().map(|_| fixture.slot(1)).collect();
        for round in 0..steps.len() + 2 {
            let first = round.saturating_sub(steps.len() - 1);
            let who: Vec<usize> = (first..3.min(round + 1)).collect();
            advance(&fixture.memory, &mut together[first..first + who.len()], &who);
        }
        for (alone, together) in alone.iter().zip(&together) {
            assert_eq!(beams_of(&backend, alone), beams_of(&backend, together), "{seed}");
        }
    }
}

pub fn named_tokens_have_the_log_probabilities_of_a_plain_log_softmax<S: Subject>() {
    let backend = S::open();
    for seed in S::seeds(40) {
        let mut cases = Cases::new(seed);
        let heads = Heads::new(1, 1, 2);
        let hidden_dim = cases.size(30);
        // Sometimes more than what backends evaluate at a time, and tokens on both sides of it.
        let vocab = if seed % 8 == 0 { 9000 } else { 60 + cases.size(300) };
        let levels: Vec<Vec<u32>> =
            (0..2).map(|level| (5 + level * 12..15 + level * 12).collect()).collect();
        let weight = cases.numbers(vocab * hidden_dim);
        let tensor = Tensor::new(&[vocab, hidden_dim], weight.clone());
        let head = backend.head(tensor, &levels, &[7, 50]).expect("memory");
        let weight = Matrix::new(&weight, hidden_dim);
        let mut named: Vec<u32> = (0..vocab as u32).collect();
        cases.rng.shuffle(&mut named);
        named.truncate(cases.size(vocab.min(100)));
        let walk = Walk::new(&mut cases, 2, 10, heads);
        let allowed_set = walk.allowed_set();
        let of_level = SearchRule::new(&walk.snapshot, &allowed_set, 0, 5);
        let over_vocabulary = SearchRule {
            choice: StepChoice::Tokens(&named),
            beams: named.len(),
            log_probs: true,
            temperature: walk.temperature,
            ..of_level
        };
        let over_named = SearchRule { normalization: Normalization::Level, ..over_vocabulary };
        // They share a step with a search that takes a level.
        let rules = [over_vocabulary, of_level, over_named];
        let mut fixture = Fixture::new(&backend, heads).expect("memory");
        let mut slots: Vec<SlotOf<S>> = rules.iter().map(|_| fixture.slot(1)).collect();
        let hidden = cases.numbers(rules.len() * hidden_dim);
        let rows = truth::matmul(&Matrix::new(&hidden, hidden_dim), &weight, None);
        let hidden = backend.upload(&hidden, hidden_dim);
        let mut logits = backend.logits();
        let mut pass = Batch::new(&fixture.memory, &[], &mut slots);
        backend.lm_head(&hidden, &head, &rules, &mut pass, &mut logits);
        backend.advance_beams(&logits, &head, &rules, &mut pass);

        for (index, is_over_named) in [(0, false), (2, true)] {
            let what = format!("seed {seed}, over the named alone: {is_over_named}");
            let scaled =
                |token: u32| rows.row(index)[token as usize] / f64::from(rules[index].temperature);
            let all = truth::log_sum_exp((0..vocab as u32).map(scaled));
            let of_named = truth::log_sum_exp(named.iter().map(|&token| scaled(token)));
            let beams = beams_of(&backend, &slots[index]);
            assert_eq!(beams.len(), named.len(), "{what}");
            assert!(beams.is_sorted_by(|a, b| a.score >= b.score), "{what}");
            let mut found: Vec<u32> = beams.iter().map(|beam| beam.tokens[0]).collect();
            for beam in &beams {
                assert!(beam.cursor.is_none(), "{what}: a named token is no semantic ID");
                let logit = scaled(beam.tokens[0]);
                let expected = logit - if is_over_named { of_named } else { all };
                let pairs = [
                    (beam.score, expected),
                    (beam.log_probs[0].vocabulary, logit - all),
                    (beam.log_probs[0].children, logit - of_named),
                ];
                for (found, expected) in pairs {
                    let error = (f64::from(found) - expected).abs();
                    assert!(error < S::SCORE_TOLERANCE / 10.0, "{what}: {found}, not {expected}");
                }
            }
            found.sort_unstable();
            let mut expected = named.clone();
            expected.sort_unstable();
            assert_eq!(found, expected, "{what}");
        }
        let alone = {
            let mut slots = vec![fixture.slot(1)];
            let values = values(&backend, &hidden);
            let row = backend.upload(&values[hidden_dim..2 * hidden_dim], hidden_dim);
            let mut pass = Batch::new(&fixture.memory, &[], &mut slots);
            backend.lm_head(&row, &head, &rules[1..2], &mut pass, &mut logits);
            backend.advance_beams(&logits, &head, &rules[1..2], &mut pass);
            beams_of(&backend, &slots[0])
        };
        assert_eq!(beams_of(&backend, &slots[1]), alone, "seed {seed}: the level's search");
    }
}

pub fn a_search_of_more_steps_than_the_device_has_room_for_is_refused<S: Subject>() {
    let backend = S::open();
    let mut fixture = Fixture::new(&backend, Heads::new(1, 1, 2)).expect("memory");
    let mut spec = fixture.spec(1);
    spec.num_steps = backend.max_steps();
    assert!(backend.open_slot(spec.clone()).is_ok());
    if let Some(too_many) = backend.max_steps().checked_add(1) {
        spec.num_steps = too_many;
        let error = backend.open_slot(spec).err().expect("too many steps");
        assert!(matches!(error, sidereal::Error::Unsupported { .. }), "{error}");
    }
}
