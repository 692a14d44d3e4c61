//! BERT4Rec: attention in both directions over a history that ends in a mask token (Sun et al. 2019),
//! in the layout of RecBole 1.2.1.
//!
//! RecBole makes its test inputs by appending the mask token to the newest items and then cutting off
//! the **oldest** one, of short histories too. The network was judged so, and reads histories so here.

use std::sync::Arc;

use super::config::Config;
use super::family::activation_of;
use super::network::Activations;
use super::transformer_block::{Block, BlockSpec, Linear, Norm, NormPlace, heads};
use super::vector_network::{
    Events, VectorModel, VectorNetwork, VectorPrompt, VectorSpec, item_shape, matrix_shape,
    num_layers, tokens_of,
};
use super::weights::Weights;
use crate::backend::{Activation, Backend, Batch, Epilogue, KvLayout, Mask};
use crate::error::{Error, Result};

/// The network.
pub struct Bert4Rec<B: Backend> {
    spec: VectorSpec,
    block: BlockSpec,
    mask_token: u32,
    items: B::Table,
    positions: B::Table,
    input_norm: Norm<B>,
    blocks: Vec<Block<B>>,
    output: Linear<B>,
    output_norm: Norm<B>,
}

impl<B: Backend> Bert4Rec<B> {
    /// Puts a checkpoint on a device.
    ///
    /// # Errors
    /// See [`load_vectors`](super::load_vectors).
    pub fn load(backend: &B, config: &Config, weights: &mut Weights) -> Result<VectorModel<B>> {
        let [num_tokens, columns] = item_shape(config, weights, "item_embedding.weight")?;
        let [max_items, _] = matrix_shape(weights, "position_embedding.weight")?;
        let num_rows = num_tokens - 1; // the last row is the mask token's
        let epsilon = config.number_or("layer_norm_eps", 1e-12)? as f32;
        let heads = heads(config, columns)?;
        let activation = activation_of("hidden_act", config.text_or("hidden_act", "gelu")?)?;
        let count = num_layers(weights, |layer| {
            format!("trm_encoder.layer.{layer}.multi_head_attention.query.weight")
        });
        let items = weights.take("item_embedding.weight", &[num_tokens, columns])?;
        let positions = weights.take("position_embedding.weight", &[max_items, columns])?;
        let network = Bert4Rec {
            spec: VectorSpec {
                columns,
                num_rows,
                max_items,
                max_tokens: max_items,
                kv: KvLayout::new(count, heads),
            },
            block: BlockSpec {
                heads,
                mask: Mask::Bidirectional,
                activation,
                norms: NormPlace::After,
            },
            mask_token: num_rows as u32,
            items: backend.table(items.clone(), None)?,
            positions: backend.table(positions, None)?,
            input_norm: Norm::load(backend, weights, "LayerNorm", columns, epsilon)?,
            blocks: (0..count)
                .map(|layer| Block::load_recbole(backend, weights, layer, columns, epsilon))
                .collect::<Result<_>>()?,
            output: Linear::load(backend, weights, &["output_ffn".into()], [columns; 2])?,
            output_norm: Norm::load(backend, weights, "output_ln", columns, epsilon)?,
        };
        let bias = weights.take("output_bias", &[num_rows])?;
        let items = items.rows(0..num_rows);
        Ok(VectorModel { network: Arc::new(network), items, bias: Some(bias) })
    }
}

impl<B: Backend> VectorNetwork<B> for Bert4Rec<B> {
    fn spec(&self) -> &VectorSpec {
        &self.spec
    }

    fn prompt(&self, events: &Events<'_>) -> Result<VectorPrompt> {
        match &events.rows[..] {
            [] => Err(Error::EmptyInput),
            [_oldest, rest @ ..] => Ok([rest, &[self.mask_token]].concat().into()),
        }
    }

    fn forward(
        &self,
        backend: &B,
        prompts: &[VectorPrompt],
        batch: &mut Batch<'_, B>,
        s: &mut Activations<B>,
    ) {
        backend.embed(&self.items, &tokens_of(prompts), batch, &mut s.residual);
        let places = batch.chunks.iter().flat_map(|chunk| chunk.clone());
        let positions: Vec<u32> = places.map(|place| place as u32).collect();
        backend.add_embedding(&self.positions, &positions, batch, &mut s.residual);
        self.input_norm.apply(backend, &s.residual, &mut s.normed);
        std::mem::swap(&mut s.residual, &mut s.normed);
        for (index, block) in self.blocks.iter().enumerate() {
            block.forward(backend, &self.block, index, batch, s);
        }
        backend.gather_last(&s.residual, 0, batch, &mut s.last);
        self.output.apply(backend, &s.last, Epilogue::Activate(Activation::Gelu), &mut s.normed);
        self.output_norm.apply(backend, &s.normed, &mut s.hidden);
    }
}
