//! GRU4Rec: a recurrent network over a history (Hidasi et al. 2016, Tan et al. 2016), in the layout of
//! RecBole 1.2.1: gated recurrent units without biases, then a linear layer.

use std::sync::Arc;

use super::config::Config;
use super::network::Activations;
use super::transformer_block::Linear;
use super::vector_network::{
    Events, VectorModel, VectorNetwork, VectorPrompt, VectorSpec, item_shape, matrix_shape,
    num_layers, tokens_of,
};
use super::weights::Weights;
use crate::backend::{Backend, Batch, Epilogue, Heads, KvLayout};
use crate::error::{Error, Result};

/// The network.
pub struct Gru4Rec<B: Backend> {
    spec: VectorSpec,
    items: B::Table,
    layers: Vec<Layer<B>>,
    output: Linear<B>,
}

struct Layer<B: Backend> {
    /// `[3 * width, in]`: reset, update and new gate of the inputs.
    input: B::Matrix,
    /// `[3 * width, width]`: the same of the state.
    state: B::Matrix,
}

impl<B: Backend> Gru4Rec<B> {
    /// Puts a checkpoint on a device.
    ///
    /// # Errors
    /// See [`load_vectors`](super::load_vectors).
    pub fn load(backend: &B, config: &Config, weights: &mut Weights) -> Result<VectorModel<B>> {
        let [num_rows, columns] = item_shape(config, weights, "item_embedding.weight")?;
        let Some(max_items) = config.size_if_given("max_items")? else {
            return Err(config.error(
                "\"max_items\" is missing: how many of a history's newest items are read, which no \
                 tensor of this family tells (MAX_ITEM_LIST_LENGTH in RecBole's settings)"
                    .into(),
            ));
        };
        let [_, width] = matrix_shape(weights, "gru_layers.weight_hh_l0")?;
        let count = num_layers(weights, |layer| format!("gru_layers.weight_hh_l{layer}"));
        let mut layers = Vec::new();
        for layer in 0..count {
            let num_in = if layer == 0 { columns } else { width };
            let input = format!("gru_layers.weight_ih_l{layer}");
            let state = format!("gru_layers.weight_hh_l{layer}");
            layers.push(Layer {
                input: backend.matrix(&[weights.take(&input, &[3 * width, num_in])?])?,
                state: backend.matrix(&[weights.take(&state, &[3 * width, width])?])?,
            });
        }
        let items = weights.take("item_embedding.weight", &[num_rows, columns])?;
        let network = Gru4Rec {
            spec: VectorSpec {
                columns,
                num_rows,
                max_items,
                max_tokens: max_items,
                // A state is kept within a pass alone.
                kv: KvLayout::new(0, Heads::new(1, 1, 1)),
            },
            items: backend.table(items.clone(), None)?,
            layers,
            output: Linear::load(backend, weights, &["dense".into()], [columns, width])?,
        };
        Ok(VectorModel { network: Arc::new(network), items, bias: None })
    }
}

impl<B: Backend> VectorNetwork<B> for Gru4Rec<B> {
    fn spec(&self) -> &VectorSpec {
        &self.spec
    }

    fn prompt(&self, events: &Events<'_>) -> Result<VectorPrompt> {
        let history = &events.rows;
        match history.is_empty() {
            true => Err(Error::EmptyInput),
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
        backend.embed(&self.items, &tokens_of(prompts), batch, &mut s.residual);
        for layer in &self.layers {
            backend.matmul(&s.residual, &layer.input, None, Epilogue::Store, &mut s.projected);
            backend.gru(&s.projected, &layer.state, None, batch, &mut s.residual);
        }
        backend.gather_last(&s.residual, 0, batch, &mut s.last);
        self.output.apply(backend, &s.last, Epilogue::Store, &mut s.hidden);
    }
}
