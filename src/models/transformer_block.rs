//! A block of attention and feed-forward layers with layer norms and biases, as sequential
//! recommenders have it (Vaswani et al. 2017, section 3.1; Kang & McAuley 2018, section III).

use super::config::Config;
use super::network::Activations;
use super::weights::Weights;
use crate::backend::{Activation, Affine, AttentionSpec, Backend, Batch, Epilogue, Heads, Mask};
use crate::error::Result;
use crate::tensor::Tensor;

/// A layer norm with weights.
pub(super) struct Norm<B: Backend> {
    scale: B::Vector,
    shift: B::Vector,
    epsilon: f32,
}

impl<B: Backend> Norm<B> {
    /// `name.weight` and `name.bias`, `[columns]` each.
    pub fn load(
        backend: &B,
        weights: &mut Weights,
        name: &str,
        columns: usize,
        epsilon: f32,
    ) -> Result<Norm<B>> {
        Ok(Norm {
            scale: backend.vector(&[weights.take(&format!("{name}.weight"), &[columns])?])?,
            shift: backend.vector(&[weights.take(&format!("{name}.bias"), &[columns])?])?,
            epsilon,
        })
    }

    /// `out`: the norm of each row of `x`.
    pub fn apply(&self, backend: &B, x: &B::Buffer, out: &mut B::Buffer) {
        let affine = Affine { scale: &self.scale, shift: &self.shift };
        backend.layer_norm(x, Some(affine), self.epsilon, out);
    }
}

/// A linear layer with a bias.
pub(super) struct Linear<B: Backend> {
    weight: B::Matrix,
    bias: B::Vector,
}

impl<B: Backend> Linear<B> {
    /// Stacks linear layers of `num_in` columns: `name.weight`, `[num_out, num_in]`, and `name.bias`.
    pub fn load(
        backend: &B,
        weights: &mut Weights,
        names: &[String],
        [num_out, num_in]: [usize; 2],
    ) -> Result<Linear<B>> {
        let (mut parts, mut biases) = (Vec::new(), Vec::new());
        for name in names {
            parts.push(weights.take(&format!("{name}.weight"), &[num_out, num_in])?);
            biases.push(weights.take(&format!("{name}.bias"), &[num_out])?);
        }
        Linear::of(backend, &parts, &biases)
    }

    /// Linear layers of these weights, stacked.
    pub fn of(backend: &B, parts: &[Tensor], biases: &[Tensor]) -> Result<Linear<B>> {
        Ok(Linear { weight: backend.matrix(parts)?, bias: backend.vector(biases)? })
    }

    /// `out = epilogue(x Wᵀ + bias)`
    pub fn apply(&self, backend: &B, x: &B::Buffer, epilogue: Epilogue, out: &mut B::Buffer) {
        backend.matmul(x, &self.weight, Some(&self.bias), epilogue, out);
    }
}

/// Where a block has its layer norms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NormPlace {
    /// Before each sublayer, whose output is added to what the norm read.
    Before,
    /// After each sublayer and its addition.
    After,
}

/// What the blocks of a network have in common.
pub(super) struct BlockSpec {
    pub heads: Heads,
    pub mask: Mask,
    pub activation: Activation,
    pub norms: NormPlace,
}

/// The weights of a block.
pub(super) struct Block<B: Backend> {
    /// Queries, keys and values, `[3 * columns, columns]`.
    pub qkv: Linear<B>,
    pub out: Linear<B>,
    pub attention_norm: Norm<B>,
    pub up: Linear<B>,
    pub down: Linear<B>,
    pub feed_forward_norm: Norm<B>,
}

impl<B: Backend> Block<B> {
    /// Takes the rows of `s.residual` through the block of this number.
    pub fn forward(
        &self,
        backend: &B,
        spec: &BlockSpec,
        index: usize,
        batch: &mut Batch<'_, B>,
        s: &mut Activations<B>,
    ) {
        let heads = spec.heads;
        let scale = (heads.key_dim as f64).powf(-0.5) as f32;
        let attention = AttentionSpec::softmax(heads, spec.mask, scale);
        if spec.norms == NormPlace::Before {
            self.attention_norm.apply(backend, &s.residual, &mut s.normed);
            self.qkv.apply(backend, &s.normed, Epilogue::Store, &mut s.projected);
        } else {
            self.qkv.apply(backend, &s.residual, Epilogue::Store, &mut s.projected);
        }
        backend.store_context(index, &s.projected, heads.query_dim(), heads, batch);
        backend.attend_prefill(index, &s.projected, &attention, batch, &mut s.attended);
        self.out.apply(backend, &s.attended, Epilogue::Add, &mut s.residual);
        match spec.norms {
            NormPlace::Before => {
                self.feed_forward_norm.apply(backend, &s.residual, &mut s.normed);
                let activate = Epilogue::Activate(spec.activation);
                self.up.apply(backend, &s.normed, activate, &mut s.projected);
                self.down.apply(backend, &s.projected, Epilogue::Add, &mut s.residual);
            }
            NormPlace::After => {
                self.attention_norm.apply(backend, &s.residual, &mut s.normed);
                let activate = Epilogue::Activate(spec.activation);
                self.up.apply(backend, &s.normed, activate, &mut s.projected);
                self.down.apply(backend, &s.projected, Epilogue::Add, &mut s.normed);
                self.feed_forward_norm.apply(backend, &s.normed, &mut s.residual);
            }
        }
    }

    /// The block of RecBole's transformer encoder of this number (RecBole 1.2.1,
    /// `recbole/model/layers.py`): norms stand after the sublayers.
    pub fn load_recbole(
        backend: &B,
        weights: &mut Weights,
        index: usize,
        columns: usize,
        epsilon: f32,
    ) -> Result<Block<B>> {
        let layer = format!("trm_encoder.layer.{index}");
        let attention = |part: &str| format!("{layer}.multi_head_attention.{part}");
        let feed_forward = |part: &str| format!("{layer}.feed_forward.{part}");
        let square = [columns, columns];
        let up = feed_forward("dense_1");
        let [inner, _] = super::vector_network::matrix_shape(weights, &format!("{up}.weight"))?;
        let parts = ["query", "key", "value"].map(attention);
        Ok(Block {
            qkv: Linear::load(backend, weights, &parts, square)?,
            out: Linear::load(backend, weights, &[attention("dense")], square)?,
            attention_norm: Norm::load(
                backend,
                weights,
                &attention("LayerNorm"),
                columns,
                epsilon,
            )?,
            up: Linear::load(backend, weights, &[up], [inner, columns])?,
            down: Linear::load(backend, weights, &[feed_forward("dense_2")], [columns, inner])?,
            feed_forward_norm: Norm::load(
                backend,
                weights,
                &feed_forward("LayerNorm"),
                columns,
                epsilon,
            )?,
        })
    }
}

/// The heads that share `columns`. No tensor tells how many there are, so `num_heads` must.
///
/// # Errors
/// [`Error::ModelConfig`](crate::Error::ModelConfig) where the key is missing or does not divide the
/// columns.
pub(super) fn heads(config: &Config, columns: usize) -> Result<Heads> {
    let Some(num_heads) = config.size_if_given("num_heads")? else {
        return Err(config.error(format!(
            "\"num_heads\" is missing: the attention heads that share {columns} columns, which no \
             tensor tells (n_heads in RecBole's settings, --num_heads in pmixer's)"
        )));
    };
    match columns.is_multiple_of(num_heads) {
        true => Ok(Heads::new(num_heads, num_heads, columns / num_heads)),
        false => {
            Err(config
                .error(format!("\"num_heads\" {num_heads} does not divide {columns} columns")))
        }
    }
}
