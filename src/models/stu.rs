//! Sequential transduction units: the blocks of HSTU (Zhai et al. 2024, section 3), whose forms differ
//! in norms, activations and what the output layer reads.

use super::network::Activations;
use crate::backend::{
    Affine, Backend, Batch, Epilogue, GateActivation, GatedNormSpec, GatedOutput, Heads,
    PointwiseAttention, PositionTimeBias, TargetMask,
};
use crate::tensor::Tensor;

/// What the blocks of a network have in common.
pub(super) struct StuSpec {
    /// Padded, so that keys and values are of one width.
    pub heads: Heads,
    /// Columns of a head's values that count.
    pub value_dim: usize,
    /// Multiplies the product of a query and a key.
    pub scale: f32,
    pub mask: TargetMask,
    /// Of both norms.
    pub epsilon: f32,
    /// Of the projections to queries, keys and values, and to the gate.
    pub qkv_epilogue: Epilogue,
    pub gate_epilogue: Epilogue,
    /// Whether each head's output has a norm of its own.
    pub is_by_head: bool,
    pub output: GatedOutput,
    /// Of the time buckets; empty without a bias.
    pub thresholds: Vec<u64>,
}

/// A norm's weights, a scale and a shift.
pub(super) struct Weighted<B: Backend> {
    pub scale: B::Vector,
    pub shift: B::Vector,
}

impl<B: Backend> Weighted<B> {
    pub fn affine(&self) -> Affine<'_, B> {
        Affine { scale: &self.scale, shift: &self.shift }
    }
}

/// A product with a matrix, and what is added.
pub(super) struct Projection<B: Backend> {
    pub weight: B::Matrix,
    pub bias: Option<B::Vector>,
}

impl<B: Backend> Projection<B> {
    /// `out = epilogue(x Wᵀ + bias)`
    pub fn apply(&self, backend: &B, x: &B::Buffer, epilogue: Epilogue, out: &mut B::Buffer) {
        backend.matmul(x, &self.weight, self.bias.as_ref(), epilogue, out);
    }
}

/// The biases of a block's scores.
pub(super) struct StuBias<B: Backend> {
    /// `[2 * positions - 1]`
    pub positions: B::Vector,
    /// By bucket.
    pub times: B::Vector,
}

/// The weights of a block.
pub(super) struct Stu<B: Backend> {
    pub input_norm: Option<Weighted<B>>,
    /// Queries, keys and values, each head padded.
    pub qkv: Projection<B>,
    pub gate: Projection<B>,
    pub output_norm: Option<Weighted<B>>,
    pub out: Projection<B>,
    pub bias: Option<StuBias<B>>,
}

/// What a block is told of the prompts of a pass.
pub(super) struct StuInput<'a> {
    /// By prompt: the position of its first target.
    pub first_targets: &'a [usize],
    /// By prompt: what weights are divided by.
    pub divisors: &'a [f32],
    /// By prompt: the times of its positions and of what follows; empty where no block reads them.
    pub seconds: &'a [Vec<i64>],
    /// Whether keys and values are all that is wanted: rows then stay as they were.
    pub is_kept_alone: bool,
}

impl<B: Backend> Stu<B> {
    /// Takes the rows of `s.residual` through the block of this number.
    pub fn forward(
        &self,
        backend: &B,
        spec: &StuSpec,
        index: usize,
        input: &StuInput<'_>,
        batch: &mut Batch<'_, B>,
        s: &mut Activations<B>,
    ) {
        let heads = spec.heads;
        let norm = self.input_norm.as_ref().map(Weighted::affine);
        backend.layer_norm(&s.residual, norm, spec.epsilon, &mut s.normed);
        self.qkv.apply(backend, &s.normed, spec.qkv_epilogue, &mut s.projected);
        backend.store_context(index, &s.projected, heads.query_dim(), heads, batch);
        if input.is_kept_alone {
            return;
        }
        let attention = PointwiseAttention {
            heads,
            scale: spec.scale,
            mask: spec.mask,
            first_targets: input.first_targets,
            divisors: input.divisors,
            bias: self.bias.as_ref().map(|bias| PositionTimeBias {
                positions: &bias.positions,
                times: &bias.times,
                thresholds: &spec.thresholds,
                seconds: input.seconds,
            }),
        };
        backend.attend_pointwise(index, &s.projected, &attention, batch, &mut s.attended);
        self.gate.apply(backend, &s.normed, spec.gate_epilogue, &mut s.spare);
        let gate = GatedNormSpec {
            num_blocks: heads.num_heads,
            block_columns: spec.value_dim,
            is_by_block: spec.is_by_head,
            affine: self.output_norm.as_ref().map(Weighted::affine),
            epsilon: spec.epsilon,
            activation: GateActivation::Identity,
            output: spec.output,
        };
        backend.gated_norm(&s.spare, &s.attended, &gate, &mut s.projected);
        self.out.apply(backend, &s.projected, Epilogue::Add, &mut s.residual);
    }
}

/// The shares of a matrix whose columns are gates, values, queries and keys of all heads, in this
/// order.
#[derive(Clone, Copy)]
pub(super) struct Uvqk {
    pub num_heads: usize,
    pub key_dim: usize,
    pub value_dim: usize,
}

impl Uvqk {
    /// Heads padded to a width that every kernel takes.
    pub fn heads(self) -> Heads {
        let head_dim = self.key_dim.max(self.value_dim).next_multiple_of(8);
        Heads::new(self.num_heads, self.num_heads, head_dim)
    }

    /// Columns of all.
    pub fn columns(self) -> usize {
        2 * self.num_heads * (self.key_dim + self.value_dim)
    }

    /// Queries, keys and values, `[out, in]` each, of a matrix `[in, columns]`; a bias is a matrix of
    /// one row.
    pub fn qkv(self, matrix: &Tensor) -> [Tensor; 3] {
        let (keys, values) = (self.num_heads * self.key_dim, self.num_heads * self.value_dim);
        let width = self.heads().head_dim();
        let part = |first, dim| self.blocks(matrix, first, dim, width);
        [
            part(2 * values, self.key_dim),
            part(2 * values + keys, self.key_dim),
            part(values, self.value_dim),
        ]
    }

    /// The gate, `[out, in]`.
    pub fn gate(self, matrix: &Tensor) -> Tensor {
        self.blocks(matrix, 0, self.value_dim, self.value_dim)
    }

    /// The columns of a block of each head from `first` on as rows, padded with zeros to `width`.
    fn blocks(self, matrix: &Tensor, first: usize, block: usize, width: usize) -> Tensor {
        let [num_in, all] = [matrix.shape()[0], matrix.shape()[1]];
        let values = matrix.to_vec();
        let mut out = vec![0.0; self.num_heads * width * num_in];
        for head in 0..self.num_heads {
            for column in 0..block {
                let from = first + head * block + column;
                let to = &mut out[(head * width + column) * num_in..][..num_in];
                to.iter_mut().enumerate().for_each(|(row, to)| *to = values[row * all + from]);
            }
        }
        Tensor::new(&[self.num_heads * width, num_in], out)
    }
}

/// A tensor's numbers as a vector.
pub(super) fn flat(tensor: &Tensor) -> Tensor {
    Tensor::new(&[tensor.len()], tensor.to_vec())
}
