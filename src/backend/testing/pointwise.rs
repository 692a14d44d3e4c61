//! Cases of pointwise attention and of the gated norm.

use std::ops::Range;

use super::fixture::{Cases, Fixture, vector};
use crate::backend::{
    Affine, Backend, Batch, GateActivation, GatedNormSpec, GatedOutput, Heads, PointwiseAttention,
    PositionTimeBias, TargetMask,
};
use crate::error::Result;

/// A pointwise attention of some prompts, as numbers on the host.
pub struct PointwiseCase {
    /// A key head for each query head.
    pub heads: Heads,
    /// What a position attends to.
    pub mask: TargetMask,
    /// By prompt.
    pub lens: Vec<usize>,
    /// By prompt: where its targets begin.
    pub first_targets: Vec<usize>,
    /// By prompt.
    pub divisors: Vec<f32>,
    /// By position and by bucket, where there is a bias.
    pub bias: Option<[Vec<f32>; 2]>,
    /// Of buckets.
    pub thresholds: Vec<u64>,
    /// By prompt.
    pub seconds: Vec<Vec<i64>>,
    /// `[positions of all prompts, queries and keys and values]`
    pub qkv: Vec<f32>,
}

impl PointwiseCase {
    /// A case of up to three prompts of up to 200 positions.
    pub fn new(cases: &mut Cases) -> PointwiseCase {
        let num_heads = cases.rng.usize(1..4);
        let dims = [2, 6, 16, 40, 64, 128];
        let heads = Heads::new(num_heads, num_heads, dims[cases.rng.usize(0..dims.len())]);
        let lens: Vec<usize> = (0..cases.size(4).min(3)).map(|_| cases.size(200)).collect();
        let first_targets: Vec<usize> = lens.iter().map(|&len| cases.rng.usize(0..=len)).collect();
        let least = first_targets.iter().copied().min().unwrap_or(0);
        let mask = TargetMask {
            num_contextual: cases.rng.usize(0..=least.min(3)),
            max_distance: cases.rng.bool().then(|| cases.rng.usize(1..80)),
            num_unlimited: cases.rng.usize(0..4),
            group_size: cases.rng.usize(1..4),
        };
        let longest = lens.iter().copied().max().unwrap_or(1);
        let thresholds = vec![1, 3, 60, 3600, 1 << 40];
        let bias = cases.rng.bool();
        let bias = bias.then(|| [cases.numbers(2 * longest - 1), cases.numbers(6)]);
        let mut seconds = Vec::new();
        for &len in &lens {
            let time = |_| {
                let bits = cases.rng.u32(1..44);
                cases.rng.i64(0..1 << bits)
            };
            seconds.push((0..=len).map(time).collect());
        }
        let rows: usize = lens.iter().sum();
        PointwiseCase {
            heads,
            mask,
            first_targets,
            divisors: lens.iter().map(|&len| len as f32).collect(),
            bias,
            thresholds,
            seconds,
            qkv: cases.numbers(rows * heads.qkv_dim()),
            lens,
        }
    }

    /// What the operation makes of it, `[positions, heads]`; what stands before the targets is read in a
    /// pass of its own where `is_cut`.
    ///
    /// # Errors
    /// [`Device`](crate::Error::Device).
    pub fn run<B: Backend>(&self, backend: &B, is_cut: bool) -> Result<Vec<f32>> {
        let heads = self.heads;
        let mut fixture = Fixture::new(backend, heads)?;
        let mut slots: Vec<B::Slot> = self.lens.iter().map(|&len| fixture.slot(len)).collect();
        let whole: Vec<Range<usize>> = self.lens.iter().map(|&len| 0..len).collect();
        let early: Vec<Range<usize>> = self.first_targets.iter().map(|&end| 0..end).collect();
        let ranges = self.first_targets.iter().zip(&self.lens);
        let late: Vec<Range<usize>> = ranges.map(|(&start, &len)| start..len).collect();
        let passes = if is_cut { vec![early, late] } else { vec![whole] };
        let vectors = match &self.bias {
            Some([positions, times]) => {
                Some([vector(backend, positions.clone())?, vector(backend, times.clone())?])
            }
            None => None,
        };
        let attention = PointwiseAttention {
            heads,
            scale: 0.3,
            mask: self.mask,
            first_targets: &self.first_targets,
            divisors: &self.divisors,
            bias: vectors.as_ref().map(|[positions, times]| PositionTimeBias {
                positions,
                times,
                thresholds: &self.thresholds,
                seconds: &self.seconds,
            }),
        };
        let (columns, out_dim) = (heads.qkv_dim(), heads.out_dim());
        let mut found = vec![0.0; self.lens.iter().sum::<usize>() * out_dim];
        for chunks in passes {
            let mut rows = Vec::new();
            let mut first = 0;
            for (chunk, len) in chunks.iter().zip(&self.lens) {
                rows.extend(chunk.clone().map(|position| first + position));
                first += len;
            }
            if rows.is_empty() {
                continue;
            }
            let of_row = |&row: &usize| &self.qkv[row * columns..(row + 1) * columns];
            let qkv: Vec<f32> = rows.iter().flat_map(of_row).copied().collect();
            let qkv = backend.upload(&qkv, columns);
            let batch = Batch::new(&fixture.memory, &chunks, &mut slots);
            let mut out = backend.buffer();
            backend.store_context(0, &qkv, heads.query_dim(), heads, &batch);
            backend.attend_pointwise(0, &qkv, &attention, &batch, &mut out);
            let out = backend.download(&out)?;
            for (values, row) in out.chunks_exact(out_dim).zip(rows) {
                found[row * out_dim..(row + 1) * out_dim].copy_from_slice(values);
            }
        }
        Ok(found)
    }
}

/// A gated norm, as numbers on the host.
pub struct GatedNormCase {
    /// Blocks of columns, and how many columns of each count, and all columns of each.
    pub shape: [usize; 3],
    /// Whether each block has a norm of its own.
    pub is_by_block: bool,
    /// Of columns or blocks.
    pub affine: Option<[Vec<f32>; 2]>,
    /// Of the normed columns.
    pub activation: GateActivation,
    /// What is left.
    pub output: GatedOutput,
    /// `[rows, columns that count]`
    pub gate: Vec<f32>,
    /// `[rows, columns]`
    pub x: Vec<f32>,
}

impl GatedNormCase {
    /// A case of up to 30 rows.
    pub fn new(cases: &mut Cases) -> GatedNormCase {
        let (rows, num_blocks, counting) =
            (cases.size(30), cases.rng.usize(1..5), 1 + cases.size(70));
        let width = counting + cases.rng.usize(0..3);
        let is_by_block = cases.rng.bool();
        let num_weights = if is_by_block { num_blocks } else { num_blocks * counting };
        let is_affine = cases.rng.bool();
        GatedNormCase {
            shape: [num_blocks, counting, width],
            is_by_block,
            affine: is_affine.then(|| [cases.numbers(num_weights), cases.numbers(num_weights)]),
            activation: [GateActivation::Identity, GateActivation::Sigmoid][cases.rng.usize(0..2)],
            output: [GatedOutput::Gated, GatedOutput::WithNormed, GatedOutput::WithInput]
                [cases.rng.usize(0..3)],
            gate: cases.numbers(rows * num_blocks * counting),
            x: cases.numbers(rows * num_blocks * width),
        }
    }

    /// What the operation makes of it.
    ///
    /// # Errors
    /// [`Device`](crate::Error::Device).
    pub fn run<B: Backend>(&self, backend: &B) -> Result<Vec<f32>> {
        let [num_blocks, counting, width] = self.shape;
        let weights = match &self.affine {
            Some([scale, shift]) => {
                Some([vector(backend, scale.clone())?, vector(backend, shift.clone())?])
            }
            None => None,
        };
        let spec = GatedNormSpec {
            num_blocks,
            block_columns: counting,
            is_by_block: self.is_by_block,
            affine: weights.as_ref().map(|[scale, shift]| Affine { scale, shift }),
            epsilon: 1e-5,
            activation: self.activation,
            output: self.output,
        };
        let gate = backend.upload(&self.gate, num_blocks * counting);
        let x = backend.upload(&self.x, num_blocks * width);
        let mut out = backend.buffer();
        backend.gated_norm(&gate, &x, &spec, &mut out);
        backend.download(&out)
    }
}
