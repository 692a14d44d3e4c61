//! SASRec: self-attention over a history (Kang & McAuley 2018), as three projects write it.
//!
//! | layout | input | blocks | padding |
//! | --- | --- | --- | --- |
//! | RecBole 1.2.1 | LN(item + position), positions from the oldest item | norms after, GELU | on the right and masked: left out here |
//! | meta-recsys/generative-recommenders | item * sqrt(columns) + position | queries normed, keys and values not; see `sasrec_meta.rs` | on the right: left out here |
//! | pmixer/SASRec.pytorch | item * sqrt(columns) + position | norms before or after, ReLU, one more norm at the end | on the left **and attended**: read here as well |
//!
//! The names of the tensors tell the layout. In pmixer's, the positions count from the left edge of the
//! padded window, and padding rows are keys like any others, so the network always reads a whole
//! window; its answer to an empty history is the one to a window of padding.

use std::sync::Arc;

use super::config::Config;
use super::family::activation_of;
use super::hstu::Hstu;
use super::network::Activations;
use super::sasrec_meta::is_meta;
use super::transformer_block::{Block, BlockSpec, Linear, Norm, NormPlace, heads};
use super::vector_network::{
    Events, VectorModel, VectorNetwork, VectorPrompt, VectorSpec, item_shape, matrix_shape,
    num_layers, tokens_of,
};
use super::weights::Weights;
use crate::backend::{Activation, Backend, Batch, KvLayout, Mask};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// The row of the padding.
const PADDING: u32 = 0;

/// The network.
pub struct Sasrec<B: Backend> {
    spec: VectorSpec,
    block: BlockSpec,
    items: B::Table,
    positions: B::Table,
    /// RecBole's norm of the input.
    input_norm: Option<Norm<B>>,
    blocks: Vec<Block<B>>,
    /// pmixer's norm of the output.
    last_norm: Option<Norm<B>>,
    /// Whether prompts are padded on the left to the whole window.
    is_padded: bool,
}

impl<B: Backend> Sasrec<B> {
    /// Puts a checkpoint on a device.
    ///
    /// # Errors
    /// See [`load_vectors`](super::load_vectors).
    pub fn load(backend: &B, config: &Config, weights: &mut Weights) -> Result<VectorModel<B>> {
        if weights.contains("item_embedding.weight") {
            return Sasrec::load_recbole(backend, config, weights);
        }
        if is_meta(weights) {
            return Hstu::load(backend, config, weights);
        }
        Sasrec::load_pmixer(backend, config, weights)
    }

    fn load_recbole(backend: &B, config: &Config, weights: &mut Weights) -> Result<VectorModel<B>> {
        let [num_rows, columns] = item_shape(config, weights, "item_embedding.weight")?;
        let [max_items, _] = matrix_shape(weights, "position_embedding.weight")?;
        let epsilon = config.number_or("layer_norm_eps", 1e-12)? as f32;
        let heads = heads(config, columns)?;
        let activation = activation_of("hidden_act", config.text_or("hidden_act", "gelu")?)?;
        let count = num_layers(weights, |layer| {
            format!("trm_encoder.layer.{layer}.multi_head_attention.query.weight")
        });
        let items = weights.take("item_embedding.weight", &[num_rows, columns])?;
        let positions = weights.take("position_embedding.weight", &[max_items, columns])?;
        let network = Sasrec {
            spec: VectorSpec {
                columns,
                num_rows,
                max_items,
                max_tokens: max_items,
                kv: KvLayout::new(count, heads),
            },
            block: BlockSpec { heads, mask: Mask::Causal, activation, norms: NormPlace::After },
            items: backend.table(items.clone(), None)?,
            positions: backend.table(positions, None)?,
            input_norm: Some(Norm::load(backend, weights, "LayerNorm", columns, epsilon)?),
            blocks: (0..count)
                .map(|layer| Block::load_recbole(backend, weights, layer, columns, epsilon))
                .collect::<Result<_>>()?,
            last_norm: None,
            is_padded: false,
        };
        Ok(VectorModel { network: Arc::new(network), items, bias: None })
    }

    fn load_pmixer(backend: &B, config: &Config, weights: &mut Weights) -> Result<VectorModel<B>> {
        const EPSILON: f32 = 1e-8;
        let [num_rows, columns] = item_shape(config, weights, "item_emb.weight")?;
        let [num_positions, _] = matrix_shape(weights, "pos_emb.weight")?;
        let max_items = num_positions - 1; // row 0 is that of the padding
        if max_items == 0 {
            return Err(config.error("\"pos_emb.weight\" has no position but the padding's".into()));
        }
        let heads = heads(config, columns)?;
        let Some(is_norm_first) = config.flag("norm_first")? else {
            return Err(config.error(
                "\"norm_first\" is missing: whether the norms stand before attention and feed-forward \
                 layers, as --norm_first of the training says; no tensor tells"
                    .into(),
            ));
        };
        let norms = if is_norm_first { NormPlace::Before } else { NormPlace::After };
        let count = num_layers(weights, |layer| format!("attention_layers.{layer}.in_proj_weight"));
        let items = weights.take("item_emb.weight", &[num_rows, columns])?;
        let positions = weights.take("pos_emb.weight", &[num_positions, columns])?;
        let network = Sasrec {
            spec: VectorSpec {
                columns,
                num_rows,
                max_items,
                max_tokens: max_items,
                kv: KvLayout::new(count, heads),
            },
            block: BlockSpec { heads, mask: Mask::Causal, activation: Activation::Relu, norms },
            items: backend.table(scaled(&items, (columns as f64).sqrt() as f32), None)?,
            positions: backend.table(positions, None)?,
            input_norm: None,
            blocks: (0..count)
                .map(|layer| load_pmixer_block(backend, weights, layer, columns, EPSILON))
                .collect::<Result<_>>()?,
            last_norm: Some(Norm::load(backend, weights, "last_layernorm", columns, EPSILON)?),
            is_padded: true,
        };
        Ok(VectorModel { network: Arc::new(network), items, bias: None })
    }

    /// The row of the position table for each row of the prompts, whose tokens are `tokens`.
    fn positions_of(&self, tokens: &[u32], batch: &Batch<'_, B>) -> Vec<u32> {
        let places = batch.chunks.iter().flat_map(|chunk| chunk.clone());
        let position = |(place, &token): (usize, &u32)| match self.is_padded {
            true if token == PADDING => 0,
            true => place as u32 + 1,
            false => place as u32,
        };
        places.zip(tokens).map(position).collect()
    }
}

/// A block of pmixer's: `nn.MultiheadAttention`, and a feed-forward layer of convolutions over one
/// position, which are linear layers.
fn load_pmixer_block<B: Backend>(
    backend: &B,
    weights: &mut Weights,
    index: usize,
    columns: usize,
    epsilon: f32,
) -> Result<Block<B>> {
    let attention = format!("attention_layers.{index}");
    let qkv = weights.take(&format!("{attention}.in_proj_weight"), &[3 * columns, columns])?;
    let qkv_bias = weights.take(&format!("{attention}.in_proj_bias"), &[3 * columns])?;
    let mut convolution = |name: &str| {
        let name = format!("forward_layers.{index}.{name}");
        let weight = weights.take(&format!("{name}.weight"), &[columns, columns, 1])?;
        let weight = Tensor::new(&[columns, columns], weight.to_vec());
        Linear::of(backend, &[weight], &[weights.take(&format!("{name}.bias"), &[columns])?])
    };
    let (up, down) = (convolution("conv1")?, convolution("conv2")?);
    let mut norm =
        |name: &str| Norm::load(backend, weights, &format!("{name}.{index}"), columns, epsilon);
    Ok(Block {
        attention_norm: norm("attention_layernorms")?,
        feed_forward_norm: norm("forward_layernorms")?,
        qkv: Linear::of(backend, &[qkv], &[qkv_bias])?,
        out: Linear::load(backend, weights, &[format!("{attention}.out_proj")], [columns; 2])?,
        up,
        down,
    })
}

fn scaled(tensor: &Tensor, factor: f32) -> Tensor {
    Tensor::new(tensor.shape(), tensor.to_vec().into_iter().map(|x| x * factor).collect())
}

impl<B: Backend> VectorNetwork<B> for Sasrec<B> {
    fn spec(&self) -> &VectorSpec {
        &self.spec
    }

    fn prompt(&self, events: &Events<'_>) -> Result<VectorPrompt> {
        let history = &events.rows;
        match self.is_padded {
            true => {
                let padding = self.spec.max_items - history.len();
                Ok([&vec![PADDING; padding], &history[..]].concat().into())
            }
            false if history.is_empty() => Err(Error::EmptyInput),
            false => Ok(history.clone().into()),
        }
    }

    fn forward(
        &self,
        backend: &B,
        prompts: &[VectorPrompt],
        batch: &mut Batch<'_, B>,
        s: &mut Activations<B>,
    ) {
        let tokens = tokens_of(prompts);
        backend.embed(&self.items, &tokens, batch, &mut s.residual);
        let positions = self.positions_of(&tokens, batch);
        backend.add_embedding(&self.positions, &positions, batch, &mut s.residual);
        if let Some(norm) = &self.input_norm {
            norm.apply(backend, &s.residual, &mut s.normed);
            std::mem::swap(&mut s.residual, &mut s.normed);
        }
        for (index, block) in self.blocks.iter().enumerate() {
            block.forward(backend, &self.block, index, batch, s);
        }
        backend.gather_last(&s.residual, 0, batch, &mut s.last);
        match &self.last_norm {
            Some(norm) => norm.apply(backend, &s.last, &mut s.hidden),
            None => std::mem::swap(&mut s.last, &mut s.hidden),
        }
    }
}
