//! SASRec: a causal transformer over items, whose embeddings are its output head (Kang & McAuley
//! 2018), in RecBole's form.
//!
//! Every item is a token, so that a search has one level and one step. With `E` the items' rows, `P`
//! the positions' and `LN` a layer norm with weights, RecBole 1.2 computes
//!
//! ```text
//! x = LN(E[item] + P[position])                           positions from the oldest item read
//! x = LN(x + Attention(x) W_o)                            causal, scaled by head_dim^-0.5
//! x = LN(x + activation(x W_1 + b_1) W_2 + b_2)
//! score of an item = x of the newest item read · E[item]
//! ```

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::config::{Config, SidLayout};
use super::family::activation_of;
use super::network::{Activations, ModelOutput, ModelSpec, Network, PromptKind};
use super::weights::Weights;
use super::whole_words::WordRule;
use crate::backend::{
    Activation, Affine, AttentionSpec, Backend, Batch, Epilogue, Heads, KvLayout, KvScope, Mask,
};
use crate::checkpoint::Tensors;
use crate::error::Result;

const ITEMS: &str = "item_embedding.weight";
const POSITIONS: &str = "position_embedding.weight";

/// The network.
pub struct SasRec<B: Backend> {
    spec: ModelSpec,
    epsilon: f32,
    activation: Activation,
    items: B::Table,
    positions: B::Table,
    norm: Norm<B>,
    layers: Vec<Layer<B>>,
    head: B::Head,
}

struct Norm<B: Backend> {
    scale: B::Vector,
    shift: B::Vector,
}

struct Layer<B: Backend> {
    qkv: B::Matrix,
    qkv_bias: B::Vector,
    out: B::Matrix,
    out_bias: B::Vector,
    attention_norm: Norm<B>,
    inner: B::Matrix,
    inner_bias: B::Vector,
    outer: B::Matrix,
    outer_bias: B::Vector,
    feed_forward_norm: Norm<B>,
}

impl<B: Backend> Norm<B> {
    fn load(backend: &B, weights: &mut Weights, name: &str, width: usize) -> Result<Norm<B>> {
        let mut take =
            |part: &str| backend.vector(&[weights.take(&format!("{name}.{part}"), &[width])?]);
        Ok(Norm { scale: take("weight")?, shift: take("bias")? })
    }

    fn affine(&self) -> Affine<'_, B> {
        Affine { scale: &self.scale, shift: &self.shift }
    }
}

/// Writes into a configuration what the shapes of a checkpoint say; what it says itself must agree.
///
/// # Errors
/// [`Error::ModelConfig`](crate::Error::ModelConfig) where it does not.
pub(super) fn read_sizes(config: &mut Config, tensors: &Tensors) -> Result<()> {
    let shape = |name: &str| match tensors.floats.get(name).map(|tensor| tensor.shape()) {
        Some(&[rows, columns]) => Some([rows, columns]),
        _ => None,
    };
    let layer = |number: usize| format!("trm_encoder.layer.{number}.feed_forward.dense_1.weight");
    let mut sizes = BTreeMap::new();
    if let Some([rows, columns]) = shape(ITEMS) {
        sizes.extend([("vocab_size", rows), ("hidden_size", columns)]);
    }
    if let Some([rows, _]) = shape(POSITIONS) {
        sizes.insert("max_seq_length", rows);
    }
    if let Some([rows, _]) = shape(&layer(0)) {
        sizes.insert("inner_size", rows);
    }
    let num_layers = (0..).take_while(|&number| tensors.floats.contains_key(&layer(number)));
    sizes.insert("n_layers", num_layers.count());
    for (key, size) in sizes {
        match config.size_if_given(key)? {
            Some(given) if given != size => {
                return Err(
                    config.error(format!("{key:?} is {given}, and the weights have {size}"))
                );
            }
            _ => config.set(key, size.into()),
        }
    }
    Ok(())
}

impl<B: Backend> SasRec<B> {
    /// Puts a checkpoint on a device.
    ///
    /// # Errors
    /// See [`super::load`].
    pub fn load(
        backend: &B,
        config: &Config,
        weights: &mut Weights,
        layout: &SidLayout,
    ) -> Result<SasRec<B>> {
        config.without_effect(&["attn_dropout_prob", "loss_type", "MAX_ITEM_LIST_LENGTH"]);
        let (vocab_size, hidden) = (config.size("vocab_size")?, config.size("hidden_size")?);
        let (num_layers, num_heads) = (config.size("n_layers")?, config.size("n_heads")?);
        let max_positions = config.size("max_seq_length")?;
        if !hidden.is_multiple_of(num_heads) {
            return Err(config.error(format!(
                "{hidden} columns cannot be shared by {num_heads} heads (\"n_heads\")"
            )));
        }
        let heads = Heads::new(num_heads, num_heads, hidden / num_heads);
        let inner = config.size("inner_size")?;
        let items = weights.take(ITEMS, &[vocab_size, hidden])?;
        let positions = weights.take(POSITIONS, &[max_positions, hidden])?;
        let layers = (0..num_layers).map(|layer| {
            Layer::load(backend, weights, &format!("trm_encoder.layer.{layer}"), [hidden, inner])
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let norm = Norm::load(backend, weights, "LayerNorm", hidden)?;
        let head = backend.head(items.clone(), &layout.levels, &layout.known_tokens())?;
        Ok(SasRec {
            spec: ModelSpec {
                vocab_size,
                max_positions: Some(max_positions),
                max_items: Some(max_positions),
                max_steps: 1,
                kv: KvLayout::new(num_layers, heads),
                prompt: PromptKind::Chunked,
                output: ModelOutput::Logits,
                num_weights: weights.num_taken(),
            },
            epsilon: config.number_or("layer_norm_eps", 1e-12)? as f32,
            activation: activation_of("hidden_act", config.text_or("hidden_act", "gelu")?)?,
            items: backend.table(items, Some(&head))?,
            positions: backend.table(positions, None)?,
            norm,
            layers,
            head,
        })
    }

    /// The rest of a layer after its attention, up to its last norm; the rows are left in `normed`.
    fn finish_layer(&self, backend: &B, layer: &Layer<B>, s: &mut Activations<B>) {
        let bias = Some(&layer.out_bias);
        backend.matmul(&s.attended, &layer.out, bias, Epilogue::Add, &mut s.residual);
        let norm = Some(layer.attention_norm.affine());
        backend.layer_norm(&s.residual, norm, self.epsilon, &mut s.normed);
        let (bias, activate) = (Some(&layer.inner_bias), Epilogue::Activate(self.activation));
        backend.matmul(&s.normed, &layer.inner, bias, activate, &mut s.spare);
        let bias = Some(&layer.outer_bias);
        backend.matmul(&s.spare, &layer.outer, bias, Epilogue::Add, &mut s.normed);
    }
}

impl<B: Backend> Layer<B> {
    fn load(
        backend: &B,
        weights: &mut Weights,
        layer: &str,
        [hidden, inner]: [usize; 2],
    ) -> Result<Layer<B>> {
        let attention = format!("{layer}.multi_head_attention");
        let feed_forward = format!("{layer}.feed_forward");
        let mut take = |name: String, shape: &[usize]| weights.take(&name, shape);
        let (mut qkv, mut qkv_bias) = (Vec::new(), Vec::new());
        for part in ["query", "key", "value"] {
            qkv.push(take(format!("{attention}.{part}.weight"), &[hidden, hidden])?);
            qkv_bias.push(take(format!("{attention}.{part}.bias"), &[hidden])?);
        }
        let mut dense = |name: String, shape: [usize; 2]| {
            let weight = take(format!("{name}.weight"), &shape)?;
            let bias = take(format!("{name}.bias"), &shape[..1])?;
            Result::Ok((backend.matrix(&[weight])?, backend.vector(&[bias])?))
        };
        let (out, out_bias) = dense(format!("{attention}.dense"), [hidden, hidden])?;
        let (outer, outer_bias) = dense(format!("{feed_forward}.dense_2"), [hidden, inner])?;
        let (inner, inner_bias) = dense(format!("{feed_forward}.dense_1"), [inner, hidden])?;
        Ok(Layer {
            qkv: backend.matrix(&qkv)?,
            qkv_bias: backend.vector(&qkv_bias)?,
            out,
            out_bias,
            attention_norm: Norm::load(
                backend,
                weights,
                &format!("{attention}.LayerNorm"),
                hidden,
            )?,
            inner,
            inner_bias,
            outer,
            outer_bias,
            feed_forward_norm: Norm::load(
                backend,
                weights,
                &format!("{feed_forward}.LayerNorm"),
                hidden,
            )?,
        })
    }
}

impl<B: Backend> Network<B> for SasRec<B> {
    type Scratch = Activations<B>;

    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn head(&self) -> &B::Head {
        &self.head
    }

    fn word_rule(&self) -> Option<Arc<WordRule>> {
        None
    }

    fn new_scratch(&self, backend: &B) -> Activations<B> {
        Activations::new(backend)
    }

    fn forward(
        &self,
        backend: &B,
        tokens: &[u32],
        batch: &mut Batch<'_, B>,
        s: &mut Activations<B>,
    ) {
        let heads = self.spec.kv.heads;
        let positions: Vec<u32> =
            batch.chunks.iter().cloned().flatten().map(|at| at as u32).collect();
        backend.embed(&self.items, tokens, batch, &mut s.normed);
        backend.add_embedding(&self.positions, &positions, batch, &mut s.normed);
        backend.layer_norm(&s.normed, Some(self.norm.affine()), self.epsilon, &mut s.residual);
        let scale = (heads.key_dim as f32).powf(-0.5);
        let over_prompt = AttentionSpec::softmax(heads, Mask::Causal, scale);
        let over_context = AttentionSpec::softmax(heads, KvScope::Context, scale);
        for (index, layer) in self.layers.iter().enumerate() {
            let bias = Some(&layer.qkv_bias);
            backend.matmul(&s.residual, &layer.qkv, bias, Epilogue::Store, &mut s.projected);
            backend.store_context(index, &s.projected, heads.query_dim(), heads, batch);
            let (queries, out) = (&s.projected, &mut s.attended);
            let is_last = index + 1 == self.layers.len();
            if !is_last {
                backend.attend_prefill(index, queries, &over_prompt, batch, out);
            } else {
                // Nothing after the last layer reads any row of a prompt but its last.
                let first = batch.num_unfinished(backend);
                backend.gather_last(&s.residual, first, batch, &mut s.last);
                std::mem::swap(&mut s.residual, &mut s.last);
                backend.gather_last(queries, first, batch, &mut s.spare);
                let batch = &batch.beams_from(first);
                backend.attend_beams(index, &s.spare, &over_context, batch, out);
            }
            self.finish_layer(backend, layer, s);
            let out = if is_last { &mut s.hidden } else { &mut s.residual };
            let norm = Some(layer.feed_forward_norm.affine());
            backend.layer_norm(&s.normed, norm, self.epsilon, out);
        }
        std::mem::swap(&mut s.residual, &mut s.last); // each buffer keeps its size from pass to pass
    }

    fn encode(
        &self,
        _: &B,
        _: &[u32],
        _: &B::Memory,
        _: &mut [B::Slot],
        _: Range<usize>,
        _: &mut Activations<B>,
    ) {
        unreachable!("prompts are read in chunks")
    }

    fn output<'s>(&self, scratch: &'s Activations<B>) -> &'s B::Buffer {
        &scratch.hidden
    }
}
