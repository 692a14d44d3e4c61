//! The operations as plain loops in f64: what every backend is held against.

use sidereal::backend::testing::{GatedNormCase, PointwiseCase};
use sidereal::backend::{Activation, GateActivation, GatedOutput, Heads, Mask};

/// A dense matrix, row by row.
#[derive(Clone)]
pub struct Matrix {
    pub values: Vec<f64>,
    pub columns: usize,
}

impl Matrix {
    pub fn new(values: &[f32], columns: usize) -> Matrix {
        Matrix { values: values.iter().map(|&x| f64::from(x)).collect(), columns }
    }

    pub fn rows(&self) -> impl Iterator<Item = &[f64]> {
        self.values.chunks_exact(self.columns)
    }

    pub fn row(&self, row: usize) -> &[f64] {
        &self.values[row * self.columns..(row + 1) * self.columns]
    }
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub fn matmul(x: &Matrix, weight: &Matrix, bias: Option<&[f64]>) -> Matrix {
    let mut values = Vec::new();
    for row in x.rows() {
        for (out, weight) in weight.rows().enumerate() {
            values.push(dot(row, weight) + bias.map_or(0.0, |bias| bias[out]));
        }
    }
    let columns = weight.values.len() / weight.columns;
    Matrix { values, columns }
}

pub fn activate(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Relu => x.max(0.0),
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Gelu => x * normal_cdf(x),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + inner.tanh())
        }
    }
}

/// The normal distribution function, by the series of the error function (Abramowitz & Stegun
/// 1964, 7.1.6); beyond eight it is 0 or 1 to the precision of f32.
fn normal_cdf(x: f64) -> f64 {
    if x.abs() > 8.0 {
        return if x > 0.0 { 1.0 } else { 0.0 };
    }
    let z = x / 2f64.sqrt();
    let (mut term, mut sum) = (z, z);
    for n in 1..200 {
        term *= 2.0 * z * z / (2 * n + 1) as f64;
        sum += term;
    }
    0.5 * (1.0 + 2.0 / std::f64::consts::PI.sqrt() * (-z * z).exp() * sum)
}

pub fn layer_norm(x: &Matrix, affine: Option<[&[f64]; 2]>, epsilon: f64) -> Matrix {
    let mut values = Vec::new();
    for row in x.rows() {
        let count = row.len() as f64;
        let mean = row.iter().sum::<f64>() / count;
        let variance = row.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / count;
        for (column, x) in row.iter().enumerate() {
            let normed = (x - mean) / (variance + epsilon).sqrt();
            let weighted = affine.map(|[scale, shift]| normed * scale[column] + shift[column]);
            values.push(weighted.unwrap_or(normed));
        }
    }
    Matrix { values, columns: x.columns }
}

/// HSTU's attention, a position and a head at a time.
pub fn attend_pointwise(case: &PointwiseCase) -> Vec<f64> {
    let heads = case.heads;
    let (dim, columns) = (heads.key_dim, heads.qkv_dim());
    let qkv = Matrix::new(&case.qkv, columns);
    let silu = |x: f64| x / (1.0 + (-x).exp());
    let mut out = Vec::new();
    let mut first_row = 0;
    for (prompt, &len) in case.lens.iter().enumerate() {
        let first_target = case.first_targets[prompt];
        let seconds = &case.seconds[prompt];
        for position in 0..len {
            let seen = case.mask.seen(position, first_target);
            for head in 0..heads.num_heads {
                let part = |row: usize, part: usize| {
                    &qkv.row(first_row + row)[(part * heads.num_heads + head) * dim..][..dim]
                };
                let mut sum = vec![0.0; dim];
                for key in seen.before.clone().chain(seen.targets.clone()) {
                    let bias = case.bias.as_ref().map_or(0.0, |[positions, times]| {
                        let longest = positions.len().div_ceil(2);
                        let apart = seconds[position + 1].abs_diff(seconds[key]);
                        let reached = case.thresholds.iter().filter(|&&at| at <= apart).count();
                        let by_position = positions[longest - 1 + key - position];
                        f64::from(by_position) + f64::from(times[reached])
                    });
                    let score = f64::from(0.3f32) * dot(part(position, 0), part(key, 1)) + bias;
                    let weight = silu(score) / f64::from(case.divisors[prompt]);
                    sum.iter_mut().zip(part(key, 2)).for_each(|(sum, v)| *sum += weight * v);
                }
                out.extend(sum);
            }
        }
        first_row += len;
    }
    out
}

/// A gated layer norm, a row at a time.
pub fn gated_norm(case: &GatedNormCase) -> Vec<f64> {
    let [num_blocks, counting, width] = case.shape;
    let columns = num_blocks * counting;
    let mut out = Vec::new();
    let gates = Matrix::new(&case.gate, columns);
    let x = Matrix::new(&case.x, num_blocks * width);
    for (gate, x) in gates.rows().zip(x.rows()) {
        let x: Vec<f64> = x.chunks(width).flat_map(|block| &block[..counting]).copied().collect();
        let per_norm = if case.is_by_block { counting } else { columns };
        let blocks = Matrix { values: x.clone(), columns: per_norm };
        let mut normed = layer_norm(&blocks, None, f64::from(1e-5f32)).values;
        if let Some([scale, shift]) = &case.affine {
            for (column, value) in normed.iter_mut().enumerate() {
                let at = if case.is_by_block { column / counting } else { column };
                *value = *value * f64::from(scale[at]) + f64::from(shift[at]);
            }
        }
        let gated = gate.iter().zip(&normed).map(|(gate, &normed)| match case.activation {
            GateActivation::Identity => gate * normed,
            GateActivation::Sigmoid => gate / (1.0 + (-normed).exp()),
        });
        let gated: Vec<f64> = gated.collect();
        match case.output {
            GatedOutput::Gated => out.extend(gated),
            GatedOutput::WithNormed => out.extend([gate.to_vec(), normed, gated].concat()),
            GatedOutput::WithInput => out.extend([gate.to_vec(), x, gated].concat()),
        }
    }
    out
}

/// The states of a gated recurrent unit over one sequence of inputs, as torch documents it.
pub fn gru(inputs: &Matrix, weight: &Matrix, bias: &[f64]) -> Vec<f64> {
    let width = weight.columns;
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let mut state = vec![0.0; width];
    let mut states = Vec::new();
    for input in inputs.rows() {
        let product = |gate: usize, column: usize| {
            dot(weight.row(gate * width + column), &state) + bias[gate * width + column]
        };
        let next = (0..width).map(|column| {
            let reset = sigmoid(input[column] + product(0, column));
            let update = sigmoid(input[width + column] + product(1, column));
            let new = (input[2 * width + column] + reset * product(2, column)).tanh();
            (1.0 - update) * new + update * state[column]
        });
        state = next.collect();
        states.extend_from_slice(&state);
    }
    states
}

pub fn rms_norm(x: &Matrix, weight: &[f64], epsilon: f64) -> Matrix {
    let mut values = Vec::new();
    for row in x.rows() {
        let scale = (dot(row, row) / row.len() as f64 + epsilon).sqrt();
        values.extend(row.iter().zip(weight).map(|(x, weight)| x / scale * weight));
    }
    Matrix { values, columns: x.columns }
}

/// Two rows of 4,096 numbers: all ones; and ones behind numbers whose squares are so large that bf16
/// holds no sum of both.
pub fn rows_of_many_small_squares() -> Matrix {
    let columns = 4096;
    let large = |at: usize| if at < columns / 2 && at.is_multiple_of(8) { 16.0 } else { 1.0 };
    let values = std::iter::repeat_n(1.0, columns).chain((0..columns).map(large)).collect();
    Matrix { values, columns }
}

/// First and second half of a head turned as pairs. Angles are products in f32, as the operation and
/// Hugging Face say.
pub fn rotate(head: &[f64], position: usize, frequencies: &[f32]) -> Vec<f64> {
    let half = frequencies.len();
    let turned = |i: usize| {
        let (pair, is_second) = (i % half, i >= half);
        let angle = f64::from(position as f32 * frequencies[pair]);
        let (x, y) = (head[pair], head[pair + half]);
        match is_second {
            false => x * angle.cos() - y * angle.sin(),
            true => y * angle.cos() + x * angle.sin(),
        }
    };
    (0..2 * half).map(turned).collect()
}

/// One query over keys and values, each key's score with its bias.
pub fn attend(query: &[f64], keys_values: &[(&[f64], &[f64], f64)], scale: f64) -> Vec<f64> {
    let scores: Vec<f64> =
        keys_values.iter().map(|(key, _, bias)| dot(query, key) * scale + bias).collect();
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let mut out = vec![0.0; query.len()];
    for (weight, (_, value, _)) in weights.iter().zip(keys_values) {
        for (out, value) in out.iter_mut().zip(*value) {
            *out += weight / sum * value;
        }
    }
    out
}

/// Attention within prompts of these lengths, one after the other in `qkv`.
pub fn attend_prefill(
    qkv: &Matrix,
    heads: Heads,
    mask: Mask,
    scale: f64,
    bias: impl Fn(usize, i64) -> f64,
    lens: &[usize],
) -> Matrix {
    let head_dim = heads.head_dim();
    let mut values = Vec::new();
    let mut first = 0;
    for &len in lens {
        for query in 0..len {
            for head in 0..heads.num_heads {
                let kv_head = head / (heads.num_heads / heads.num_kv_heads);
                let reach = if mask == Mask::Causal { query + 1 } else { len };
                let kv: Vec<(&[f64], &[f64], f64)> = (0..reach)
                    .map(|key| {
                        let row = &qkv.row(first + key)[heads.query_dim()..];
                        let at = kv_head * head_dim;
                        let (keys, values) = row.split_at(heads.kv_dim());
                        let bias = bias(head, key as i64 - query as i64);
                        (&keys[at..at + head_dim], &values[at..at + head_dim], bias)
                    })
                    .collect();
                let query = &qkv.row(first + query)[head * head_dim..(head + 1) * head_dim];
                values.extend(attend(query, &kv, scale));
            }
        }
        first += len;
    }
    Matrix { values, columns: heads.query_dim() }
}

pub fn log_sum_exp(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let largest = values.clone().fold(f64::NEG_INFINITY, f64::max);
    largest + values.map(|value| (value - largest).exp()).sum::<f64>().ln()
}

/// How far `found` is from the truth, relative to the truth's norm; positions of values that are
/// not finite must agree.
pub fn relative_error(found: &[f32], truth: &[f64], what: &str) -> f64 {
    assert_eq!(found.len(), truth.len(), "{what}: length");
    let mut difference = 0.0;
    for (at, (&found, &truth)) in found.iter().zip(truth).enumerate() {
        assert!(found.is_finite() && truth.is_finite(), "{what}: {found} for {truth} at {at}");
        difference += (f64::from(found) - truth).powi(2);
    }
    let norm: f64 = truth.iter().map(|x| x * x).sum();
    (difference / norm.max(1e-30)).sqrt()
}

/// The row of `columns` numbers that is furthest from the truth, and its relative error. A norm over
/// all rows would hide one that is wrong.
pub fn worst_row(found: &[f32], truth: &[f64], columns: usize, what: &str) -> (usize, f64) {
    assert_eq!(found.len(), truth.len(), "{what}: length");
    let rows = found.chunks_exact(columns).zip(truth.chunks_exact(columns));
    let errors = rows.map(|(found, truth)| relative_error(found, truth, what)).enumerate();
    errors.max_by(|(_, a), (_, b)| a.total_cmp(b)).expect("there are rows")
}
