//! The blocks of SASRec as meta-recsys/generative-recommenders writes them
//! (`research/modeling/sequential/sasrec.py`): queries are normed, keys and values are not, and each sum
//! is with what was normed, with norms that have no weights:
//!
//! ```text
//! q = norm(x)    y = norm(q + attention(q, x, x))    x = y + W_2 activation(W_1 y + b_1) + b_2
//! ```

use super::config::Config;
use super::family::activation_of;
use super::network::Activations;
use super::stu::Projection;
use super::transformer_block::heads;
use super::vector_network::num_layers;
use super::weights::Weights;
use crate::backend::{Activation, AttentionSpec, Backend, Batch, Epilogue, Heads, Mask};
use crate::error::Result;
use crate::tensor::Tensor;

/// Of the norms.
const EPSILON: f32 = 1e-8;

/// The blocks of a network.
pub(super) struct MetaBlocks<B: Backend> {
    pub heads: Heads,
    activation: Activation,
    blocks: Vec<MetaBlock<B>>,
}

struct MetaBlock<B: Backend> {
    query: Projection<B>,
    /// Keys, then values.
    key_value: Projection<B>,
    out: Projection<B>,
    up: Projection<B>,
    down: Projection<B>,
}

/// Whether a checkpoint has these blocks.
pub(super) fn is_meta(weights: &Weights) -> bool {
    weights.contains("forward_layers.0._conv1d.0.weight")
}

impl<B: Backend> MetaBlocks<B> {
    /// Puts the blocks on a device.
    ///
    /// # Errors
    /// Those of the configuration and of the weights.
    pub fn load(
        backend: &B,
        config: &Config,
        weights: &mut Weights,
        columns: usize,
    ) -> Result<MetaBlocks<B>> {
        let heads = heads(config, columns)?;
        let name = config.text_or("ffn_activation_fn", "relu")?;
        let activation = activation_of("ffn_activation_fn", name)?;
        let count = num_layers(weights, |layer| format!("attention_layers.{layer}.in_proj_weight"));
        let blocks = (0..count).map(|layer| MetaBlock::load(backend, weights, layer, columns));
        Ok(MetaBlocks { heads, activation, blocks: blocks.collect::<Result<_>>()? })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Takes the rows of `s.residual` through all blocks.
    pub fn forward(&self, backend: &B, batch: &mut Batch<'_, B>, s: &mut Activations<B>) {
        let scale = (self.heads.key_dim as f64).powf(-0.5) as f32;
        let attention = AttentionSpec::softmax(self.heads, Mask::Causal, scale);
        for (index, block) in self.blocks.iter().enumerate() {
            backend.layer_norm(&s.residual, None, EPSILON, &mut s.normed);
            block.query.apply(backend, &s.normed, Epilogue::Store, &mut s.spare);
            block.key_value.apply(backend, &s.residual, Epilogue::Store, &mut s.projected);
            backend.store_context(index, &s.projected, 0, self.heads, batch);
            backend.attend_prefill(index, &s.spare, &attention, batch, &mut s.attended);
            block.out.apply(backend, &s.attended, Epilogue::Add, &mut s.normed);
            backend.layer_norm(&s.normed, None, EPSILON, &mut s.residual);
            let activate = Epilogue::Activate(self.activation);
            block.up.apply(backend, &s.residual, activate, &mut s.projected);
            block.down.apply(backend, &s.projected, Epilogue::Add, &mut s.residual);
        }
    }
}

impl<B: Backend> MetaBlock<B> {
    fn load(
        backend: &B,
        weights: &mut Weights,
        layer: usize,
        columns: usize,
    ) -> Result<MetaBlock<B>> {
        let name = format!("attention_layers.{layer}");
        let matrix = weights.take(&format!("{name}.in_proj_weight"), &[3 * columns, columns])?;
        let bias = weights.take(&format!("{name}.in_proj_bias"), &[3 * columns])?;
        let (matrix, bias) = (matrix.to_vec(), bias.to_vec());
        let part = |from: usize, to: usize| {
            let weight = matrix[from * columns * columns..to * columns * columns].to_vec();
            let bias = bias[from * columns..to * columns].to_vec();
            let rows = (to - from) * columns;
            Ok::<_, crate::error::Error>(Projection {
                weight: backend.matrix(&[Tensor::new(&[rows, columns], weight)])?,
                bias: Some(backend.vector(&[Tensor::new(&[rows], bias)])?),
            })
        };
        let (query, key_value) = (part(0, 1)?, part(1, 3)?);
        let out = super::mlp::linear(backend, weights, &format!("{name}.out_proj"), [columns; 2])?;
        let forward = format!("forward_layers.{layer}._conv1d");
        let first = format!("{forward}.0.bias");
        let inner = weights.num_rows(&first).unwrap_or(0);
        let mut convolution = |part: usize, [num_out, num_in]: [usize; 2]| {
            let weight = format!("{forward}.{part}.weight");
            let weight = weights.take(&weight, &[num_out, num_in, 1])?;
            let bias = weights.take(&format!("{forward}.{part}.bias"), &[num_out])?;
            Ok::<_, crate::error::Error>(Projection {
                weight: backend.matrix(&[Tensor::new(&[num_out, num_in], weight.to_vec())])?,
                bias: Some(backend.vector(&[bias])?),
            })
        };
        let (up, down) = (convolution(0, [inner, columns])?, convolution(3, [columns, inner])?);
        Ok(MetaBlock { query, key_value, out, up, down })
    }
}
