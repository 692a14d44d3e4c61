//! The operations that networks are made of.
//!
//! Rows of several slots stand one after the other, in slot order. In every shape, `rows` is the
//! number of prompt tokens in the batch, then of its beams. `out` buffers take the shape of what is
//! written to them. Each operation is a trait of one method, so that its implementation is one file.

use super::{
    Affine, AttentionSpec, Batch, DeviceOps, GatedNormSpec, Heads, KvScope, PointwiseAttention,
    PrefillAttention,
};

/// The nonlinearities of feed-forward layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// max(x, 0)
    Relu,
    /// x Φ(x), by the error function (Hendrycks & Gimpel 2016).
    Gelu,
    /// x Φ(x), by its tanh approximation.
    GeluTanh,
    /// x sigmoid(x), also called swish.
    Silu,
}

/// What happens to a matrix product on its way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Epilogue {
    /// `out = x Wᵀ (+ bias)`
    Store,
    /// `out += x Wᵀ (+ bias)`: the residual stream.
    Add,
    /// `out = activation(x Wᵀ (+ bias))`
    Activate(Activation),
}

/// An RMS norm of each query head and each key head, before they are rotated.
pub struct HeadNorms<'a, B: DeviceOps> {
    /// `[key_dim]`, of query heads.
    pub query: &'a B::Vector,
    /// `[key_dim]`, of key heads.
    pub key: &'a B::Vector,
    /// Added to the mean square.
    pub epsilon: f32,
}

impl<B: DeviceOps> Clone for HeadNorms<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: DeviceOps> Copy for HeadNorms<'_, B> {}

/// An attention of beams. The bias is `[num_heads, distances]` over the distance back from the
/// newest position; `distances` is at least the positions of the longest tail.
pub type BeamAttention<'a, B> = AttentionSpec<KvScope, &'a <B as DeviceOps>::Vector>;

/// Looks up embeddings.
pub trait Embed: DeviceOps {
    /// The rows of `table` for `tokens`, those of the batch's prompts, then for the newest token of
    /// each beam.
    fn embed(
        &self,
        table: &Self::Table,
        tokens: &[u32],
        batch: &Batch<'_, Self>,
        out: &mut Self::Buffer,
    );
}

/// Adds embeddings of what is known of a token beside itself: its position, type or time bucket.
pub trait AddEmbedding: DeviceOps {
    /// `x[r] += table[indices[r]]` for the rows of prompts; rows of beams are left as they are.
    /// `indices`: one for each row of a prompt, in their order. The sum in f32.
    ///
    /// # Panics
    /// Where an index is beyond the table.
    fn add_embedding(
        &self,
        table: &Self::Table,
        indices: &[u32],
        batch: &Batch<'_, Self>,
        x: &mut Self::Buffer,
    );
}

/// Norms rows by their mean and variance.
pub trait LayerNorm: DeviceOps {
    /// `out[r] = (x[r] - mean) / sqrt(variance + epsilon) * scale + shift` (Ba et al. 2016), the
    /// mean and the variance over the columns of the row, in f32; the variance is that of the
    /// differences from the mean, divided by the number of columns. Without `affine` nothing is
    /// multiplied or added. A row of equal numbers becomes the shift.
    fn layer_norm(
        &self,
        x: &Self::Buffer,
        affine: Option<Affine<'_, Self>>,
        epsilon: f32,
        out: &mut Self::Buffer,
    );
}

/// Norms rows.
pub trait RmsNorm: DeviceOps {
    /// `out[r] = x[r] / sqrt(mean(x[r]^2) + epsilon) * weight` (Zhang & Sennrich 2019).
    fn rms_norm(
        &self,
        x: &Self::Buffer,
        weight: &Self::Vector,
        epsilon: f32,
        out: &mut Self::Buffer,
    );
}

/// Multiplies by a weight matrix.
pub trait Matmul: DeviceOps {
    /// `out = epilogue(x Wᵀ + bias)`; `x`: `[rows, in]`, `weight`: `[out, in]`.
    fn matmul(
        &self,
        x: &Self::Buffer,
        weight: &Self::Matrix,
        bias: Option<&Self::Vector>,
        epilogue: Epilogue,
        out: &mut Self::Buffer,
    );
}

/// Gates one half of the columns by the other.
pub trait Glu: DeviceOps {
    /// `out[:, j] = activation(x[:, j]) * x[:, columns + j]`; `x`: `[rows, 2 * columns]`
    /// (GLU variants, Shazeer 2020).
    fn glu(&self, x: &Self::Buffer, activation: Activation, out: &mut Self::Buffer);
}

/// Computes the angles of RoPE.
pub trait RopeTables: DeviceOps {
    /// The cosines, then the sines, of each row's position times `frequencies[i]`, for
    /// [`apply_rope`](ApplyRope::apply_rope); the product in f32. A beam's newest token stands
    /// behind its context and the tokens before it. `out`: `[rows, 2 * frequencies]`.
    fn rope_tables(
        &self,
        frequencies: &Self::Vector,
        batch: &Batch<'_, Self>,
        out: &mut Self::Buffer,
    );
}

/// Rotates queries and keys to their positions, and stores keys and values.
pub trait ApplyRope: DeviceOps {
    /// Turns each query and key head of `qkv` by its row of `rope_tables`, first and second half of
    /// a head paired (RoPE, Su et al. 2021), after an RMS norm of each head where norms are given;
    /// then stores the keys and values as [`store_context`](StoreContext::store_context) and
    /// [`append_tail`](AppendTail::append_tail) do.
    fn apply_rope(
        &self,
        layer: usize,
        qkv: &mut Self::Buffer,
        heads: Heads,
        norms: Option<HeadNorms<'_, Self>>,
        rope_tables: &Self::Buffer,
        batch: &mut Batch<'_, Self>,
    );
}

/// Stores keys and values of prompts.
pub trait StoreContext: DeviceOps {
    /// Stores one set of keys and values for the rows of prompts, in the slots' contexts. `kv`'s
    /// columns from `offset` on are the key heads, then the value heads.
    fn store_context(
        &self,
        set: usize,
        kv: &Self::Buffer,
        offset: usize,
        heads: Heads,
        batch: &Batch<'_, Self>,
    );
}

/// Attention of prompts.
pub trait AttendPrefill: DeviceOps {
    /// Attention of the rows of prompts over a set of their contexts: as far as stored where the mask
    /// is causal, else over all of it, which has been stored.
    /// The first `heads.query_dim()` columns of `queries` are the queries; `out`: `[rows,
    /// heads.out_dim()]`, where rows of beams are left as they are.
    fn attend_prefill(
        &self,
        set: usize,
        queries: &Self::Buffer,
        attention: &PrefillAttention<'_>,
        batch: &Batch<'_, Self>,
        out: &mut Self::Buffer,
    );
}

/// Attention of prompts whose weights are no distribution.
pub trait AttendPointwise: DeviceOps {
    /// The sum over the positions that a row of a prompt [sees](super::TargetMask::seen) of
    ///
    /// ```text
    /// silu(scale * query . key + bias) / divisor * value
    /// ```
    ///
    /// (pointwise aggregated attention, Zhai et al. 2024, equation 2), in f32. A row of `queries` has
    /// the queries of all heads, then the keys, then the values, of which the attention takes those of
    /// targets; those of other positions are read where [`store_context`](StoreContext::store_context)
    /// has stored them, in the slot's context. Every query head has a key head. `out`: `[rows,
    /// heads.out_dim()]`, where rows of beams are left as they are.
    ///
    /// # Panics
    /// Where a chunk begins within a group of targets.
    fn attend_pointwise(
        &self,
        set: usize,
        queries: &Self::Buffer,
        attention: &PointwiseAttention<'_, Self>,
        batch: &Batch<'_, Self>,
        out: &mut Self::Buffer,
    );
}

/// Norms rows and multiplies them by a gate.
pub trait GatedNorm: DeviceOps {
    /// `out = gate * activation(norm(x))`, the norm as [`layer_norm`](LayerNorm::layer_norm) has it
    /// over the columns that count; and beside it what the output asks for.
    /// `x`: `[rows, num_blocks * width]`; `gate`: `[rows, num_blocks * block_columns]`; `out`: as wide
    /// as the gate, or three times as wide.
    fn gated_norm(
        &self,
        gate: &Self::Buffer,
        x: &Self::Buffer,
        spec: &GatedNormSpec<'_, Self>,
        out: &mut Self::Buffer,
    );
}

/// Runs a recurrent cell over prompts.
pub trait Gru: DeviceOps {
    /// The states of a gated recurrent unit (Cho et al. 2014), which starts at zero, after each row
    /// of a prompt. With `[a_r, a_z, a_n]` a row of `inputs` and `[b_r, b_z, b_n] = W state + bias`:
    ///
    /// ```text
    /// r = sigmoid(a_r + b_r)    z = sigmoid(a_z + b_z)    n = tanh(a_n + r * b_n)
    /// state = (1 - z) * n + z * state
    /// ```
    ///
    /// That is torch's form, in which the reset gate takes the product with its bias.
    /// `inputs`: `[rows, 3 * width]`, the products of the cell's inputs with their bias; `weight`:
    /// `[3 * width, width]`; `bias`: `[3 * width]`; `out`: `[rows, width]`, where rows of beams are
    /// arbitrary. States are kept in f32; a CPU in bf16 rounds them for the product alone.
    ///
    /// # Panics
    /// Where a prompt is not read as a whole: no state is kept from pass to pass.
    fn gru(
        &self,
        inputs: &Self::Buffer,
        weight: &Self::Matrix,
        bias: Option<&Self::Vector>,
        batch: &Batch<'_, Self>,
        out: &mut Self::Buffer,
    );
}

/// Gathers the rows that a step is scored by.
pub trait GatherLast: DeviceOps {
    /// From the slot `first` on: the last row of each prompt, then the rows of beams.
    fn gather_last(
        &self,
        x: &Self::Buffer,
        first: usize,
        batch: &Batch<'_, Self>,
        out: &mut Self::Buffer,
    );
}

/// Stores keys and values of beams.
pub trait AppendTail: DeviceOps {
    /// Appends the keys and values of the beams' newest tokens to their tails; `qkv`: `[rows,
    /// heads.qkv_dim()]`.
    fn append_tail(
        &self,
        layer: usize,
        qkv: &Self::Buffer,
        heads: Heads,
        batch: &mut Batch<'_, Self>,
    );
}

/// Attention of beams.
pub trait AttendBeams: DeviceOps {
    /// Attention of each beam over its context, its tail or both: a layer's tails, and the context
    /// set of the layer's number. The first `heads.query_dim()` columns of `queries` are the
    /// queries; `out`: `[rows, heads.out_dim()]`, where rows of prompts are left as they are. The
    /// context is read once for all beams of a slot (Hydragen, Juravsky et al. 2024).
    fn attend_beams(
        &self,
        layer: usize,
        queries: &Self::Buffer,
        attention: &BeamAttention<'_, Self>,
        batch: &Batch<'_, Self>,
        out: &mut Self::Buffer,
    );
}

/// All operations that networks are made of.
pub trait NetworkOps:
    Embed
    + AddEmbedding
    + LayerNorm
    + RmsNorm
    + Matmul
    + Glu
    + RopeTables
    + ApplyRope
    + StoreContext
    + AttendPrefill
    + AttendPointwise
    + GatedNorm
    + Gru
    + GatherLast
    + AppendTail
    + AttendBeams
{
}

impl<B> NetworkOps for B where
    B: Embed
        + AddEmbedding
        + LayerNorm
        + RmsNorm
        + Matmul
        + Glu
        + RopeTables
        + ApplyRope
        + StoreContext
        + AttendPrefill
        + AttendPointwise
        + GatedNorm
        + Gru
        + GatherLast
        + AppendTail
        + AttendBeams
{
}
