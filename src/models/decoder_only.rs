//! Decoder-only networks of the Llama line: the history is a prompt, the semantic ID its
//! continuation (LC-Rec, MiniOneRec, OneRec-1.7B; Touvron et al. 2023, Qwen Team 2024, 2025).
//!
//! One network serves five families: Qwen2 has biases on queries, keys and values; Qwen3 norms each
//! query and key head before its rotation; Mistral has a window, and no context longer than it is
//! taken; Gemma norms by `1 + w` and scales its embeddings by `sqrt(hidden_size)`, both of which are
//! folded into the weights, and has GELU in its feed-forward layers (Jiang et al. 2023, Gemma Team
//! 2024).

use std::ops::Range;
use std::sync::Arc;

use super::config::{Config, SidLayout};
use super::family::{Family, activation_of};
use super::network::{Activations, ModelOutput, ModelSpec, Network, PromptKind};
use super::rope::Rope;
use super::weights::Weights;
use super::whole_words::WordRule;
use crate::backend::{
    Activation, AttentionSpec, Backend, Batch, Epilogue, HeadNorms, Heads, KvLayout, KvScope, Mask,
};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// The network.
pub struct DecoderOnly<B: Backend> {
    spec: ModelSpec,
    epsilon: f32,
    activation: Activation,
    /// What attention's scores are multiplied by.
    score_scale: f32,
    /// `[head_dim / 2]`, radians per position.
    frequencies: B::Vector,
    embedding: B::Table,
    layers: Vec<Layer<B>>,
    norm: B::Vector,
    head: B::Head,
}

struct Layer<B: Backend> {
    attention_norm: B::Vector,
    qkv: B::Matrix,
    qkv_bias: Option<B::Vector>,
    query_key_norms: Option<(B::Vector, B::Vector)>,
    out: B::Matrix,
    out_bias: Option<B::Vector>,
    feed_forward_norm: B::Vector,
    gate_up: B::Matrix,
    gate_up_bias: Option<B::Vector>,
    down: B::Matrix,
    down_bias: Option<B::Vector>,
}

impl<B: Backend> DecoderOnly<B> {
    /// Puts a checkpoint on a device. Also returns what of the checkpoint may be left over.
    ///
    /// # Errors
    /// See [`super::load`].
    pub fn load(
        backend: &B,
        config: &Config,
        family: Family,
        weights: &mut Weights,
        layout: &SidLayout,
    ) -> Result<(DecoderOnly<B>, Spares)> {
        config.expect_flag("is_encoder_decoder", false)?;
        let hidden_size = config.size("hidden_size")?;
        let heads = heads(config, family, hidden_size)?;
        let trained_positions = config.size_or("max_position_embeddings", 2048)?;
        let rope = Rope::read(config, heads.key_dim, trained_positions)?;
        let max_positions = trained_positions.min(window(config, family)?.unwrap_or(usize::MAX));
        let vocab_size = config.size("vocab_size")?;
        let num_layers = config.size("num_hidden_layers")?;
        let has_attention_bias = match family {
            Family::Qwen2 | Family::Mistral => false,
            _ => config.flag("attention_bias")?.unwrap_or(false),
        };
        let loader = LayerLoader {
            hidden_size,
            intermediate_size: config.size("intermediate_size")?,
            heads,
            has_qkv_bias: has_attention_bias || family == Family::Qwen2,
            has_out_bias: has_attention_bias,
            has_mlp_bias: family == Family::Llama && config.flag("mlp_bias")?.unwrap_or(false),
            has_query_key_norms: family == Family::Qwen3,
            norms_add_one: family == Family::Gemma,
        };
        let activation = activation(config, family)?;
        let shape = [vocab_size, hidden_size];
        let is_tied = config.flag("tie_word_embeddings")?.unwrap_or(family.is_tied_by_default());
        let names = family.tied_names();
        let (embedding, head) = match is_tied {
            true => {
                let mut tied = weights.take_tied(names, &shape)?.into_iter();
                let mut next = || tied.next().expect("a tensor for each of two names");
                (next(), next())
            }
            false => (weights.take(names[0], &shape)?, weights.take(names[1], &shape)?),
        };
        let embedding = match family {
            Family::Gemma => map(&embedding, |x| x * (hidden_size as f32).sqrt()),
            _ => embedding,
        };
        let layers = (0..num_layers)
            .map(|layer| loader.load(backend, weights, &format!("model.layers.{layer}")))
            .collect::<Result<Vec<_>>>()?;
        let norm = loader.norm(weights.take("model.norm.weight", &[hidden_size])?);
        let frequencies = Tensor::new(&[rope.frequencies.len()], rope.frequencies.clone());
        let head = backend.head(head, &layout.levels, &layout.known_tokens())?;
        let model = DecoderOnly {
            spec: ModelSpec {
                vocab_size,
                max_positions: Some(max_positions),
                kv: KvLayout::new(num_layers, heads),
                prompt: PromptKind::Chunked,
                output: ModelOutput::Logits,
                num_weights: weights.num_taken(),
            },
            epsilon: config.number_or("rms_norm_eps", 1e-6)? as f32,
            activation,
            score_scale: (heads.key_dim as f64).powf(-0.5) as f32 * rope.score_scale,
            frequencies: backend.vector(&[frequencies])?,
            embedding: backend.table(embedding, Some(&head))?,
            layers,
            norm: backend.vector(&[norm])?,
            head,
        };
        Ok((model, Spares { rope }))
    }

    /// Queries, keys and values of a layer, turned to their positions; the latter two are kept.
    fn project(
        &self,
        backend: &B,
        index: usize,
        layer: &Layer<B>,
        batch: &mut Batch<'_, B>,
        s: &mut Activations<B>,
    ) {
        backend.rms_norm(&s.residual, &layer.attention_norm, self.epsilon, &mut s.normed);
        let bias = layer.qkv_bias.as_ref();
        backend.matmul(&s.normed, &layer.qkv, bias, Epilogue::Store, &mut s.projected);
        let norms = layer.query_key_norms.as_ref();
        let norms = norms.map(|(query, key)| HeadNorms { query, key, epsilon: self.epsilon });
        let heads = self.spec.kv.heads;
        backend.apply_rope(index, &mut s.projected, heads, norms, &s.rope, batch);
    }

    /// The rest of a layer after its attention.
    fn finish_layer(&self, backend: &B, layer: &Layer<B>, s: &mut Activations<B>) {
        let bias = layer.out_bias.as_ref();
        backend.matmul(&s.attended, &layer.out, bias, Epilogue::Add, &mut s.residual);
        backend.rms_norm(&s.residual, &layer.feed_forward_norm, self.epsilon, &mut s.normed);
        let bias = layer.gate_up_bias.as_ref();
        backend.matmul(&s.normed, &layer.gate_up, bias, Epilogue::Store, &mut s.projected);
        backend.glu(&s.projected, self.activation, &mut s.spare);
        let bias = layer.down_bias.as_ref();
        backend.matmul(&s.spare, &layer.down, bias, Epilogue::Add, &mut s.residual);
    }
}

impl<B: Backend> Network<B> for DecoderOnly<B> {
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
        backend.rope_tables(&self.frequencies, batch, &mut s.rope);
        backend.embed(&self.embedding, tokens, batch, &mut s.residual);
        let over_prompt = AttentionSpec::softmax(heads, Mask::Causal, self.score_scale);
        let over_both = AttentionSpec::softmax(heads, KvScope::Both, self.score_scale);
        for (index, layer) in self.layers.iter().enumerate() {
            self.project(backend, index, layer, batch, s);
            let (queries, out) = (&s.projected, &mut s.attended);
            if index + 1 < self.layers.len() {
                backend.attend_prefill(index, queries, &over_prompt, batch, out);
                backend.attend_beams(index, queries, &over_both, batch, out);
            } else {
                // Nothing after the last layer reads any row of a prompt but its last.
                let first = batch.num_unfinished(backend);
                backend.gather_last(&s.residual, first, batch, &mut s.last);
                std::mem::swap(&mut s.residual, &mut s.last);
                backend.gather_last(queries, first, batch, &mut s.spare);
                let batch = &batch.beams_from(first);
                backend.attend_beams(index, &s.spare, &over_both, batch, out);
            }
            self.finish_layer(backend, layer, s);
        }
        backend.rms_norm(&s.residual, &self.norm, self.epsilon, &mut s.hidden);
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

struct LayerLoader {
    hidden_size: usize,
    intermediate_size: usize,
    heads: Heads,
    has_qkv_bias: bool,
    has_out_bias: bool,
    has_mlp_bias: bool,
    has_query_key_norms: bool,
    norms_add_one: bool,
}

impl LayerLoader {
    fn load<B: Backend>(
        &self,
        backend: &B,
        weights: &mut Weights,
        layer: &str,
    ) -> Result<Layer<B>> {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let (query_dim, kv_dim) = (self.heads.query_dim(), self.heads.kv_dim());
        let head_dim = self.heads.key_dim;
        let mut take =
            |name: &str, shape: &[usize]| weights.take(&format!("{layer}.{name}"), shape);
        let qkv = [
            take("self_attn.q_proj.weight", &[query_dim, hidden])?,
            take("self_attn.k_proj.weight", &[kv_dim, hidden])?,
            take("self_attn.v_proj.weight", &[kv_dim, hidden])?,
        ];
        let qkv_bias = match self.has_qkv_bias {
            true => Some(backend.vector(&[
                take("self_attn.q_proj.bias", &[query_dim])?,
                take("self_attn.k_proj.bias", &[kv_dim])?,
                take("self_attn.v_proj.bias", &[kv_dim])?,
            ])?),
            false => None,
        };
        let query_key_norms = match self.has_query_key_norms {
            true => Some((
                backend.vector(&[take("self_attn.q_norm.weight", &[head_dim])?])?,
                backend.vector(&[take("self_attn.k_norm.weight", &[head_dim])?])?,
            )),
            false => None,
        };
        let out_bias = match self.has_out_bias {
            true => Some(backend.vector(&[take("self_attn.o_proj.bias", &[hidden])?])?),
            false => None,
        };
        let (gate_up_bias, down_bias) = match self.has_mlp_bias {
            true => (
                Some(backend.vector(&[
                    take("mlp.gate_proj.bias", &[inner])?,
                    take("mlp.up_proj.bias", &[inner])?,
                ])?),
                Some(backend.vector(&[take("mlp.down_proj.bias", &[hidden])?])?),
            ),
            false => (None, None),
        };
        let gate_up = [
            take("mlp.gate_proj.weight", &[inner, hidden])?,
            take("mlp.up_proj.weight", &[inner, hidden])?,
        ];
        Ok(Layer {
            attention_norm: backend
                .vector(&[self.norm(take("input_layernorm.weight", &[hidden])?)])?,
            qkv: backend.matrix(&qkv)?,
            qkv_bias,
            query_key_norms,
            out: backend.matrix(&[take("self_attn.o_proj.weight", &[hidden, query_dim])?])?,
            out_bias,
            feed_forward_norm: backend
                .vector(&[self.norm(take("post_attention_layernorm.weight", &[hidden])?)])?,
            gate_up: backend.matrix(&gate_up)?,
            gate_up_bias,
            down: backend.matrix(&[take("mlp.down_proj.weight", &[hidden, inner])?])?,
            down_bias,
        })
    }

    /// The weights of a norm as the backend multiplies by them.
    fn norm(&self, weight: Tensor) -> Tensor {
        if self.norms_add_one { map(&weight, |x| 1.0 + x) } else { weight }
    }
}

fn map(tensor: &Tensor, number: impl Fn(f32) -> f32) -> Tensor {
    Tensor::new(tensor.shape(), tensor.to_vec().into_iter().map(number).collect())
}

fn heads(config: &Config, family: Family, hidden_size: usize) -> Result<Heads> {
    let num_heads = config.size("num_attention_heads")?;
    let num_kv_heads = config.size_or("num_key_value_heads", num_heads)?;
    let default = match family {
        Family::Gemma => 256,
        _ => (hidden_size / num_heads).max(1),
    };
    let head_dim = config.size_or("head_dim", default)?;
    if !num_heads.is_multiple_of(num_kv_heads) || !head_dim.is_multiple_of(2) {
        return Err(config.error(format!(
            "{num_heads} attention heads of {head_dim} columns cannot share {num_kv_heads} \
             key-value heads"
        )));
    }
    Ok(Heads::new(num_heads, num_kv_heads, head_dim))
}

/// The positions that a layer attends back to, where some layer's are limited. A context of no more
/// tokens is computed as if there were no window.
fn window(config: &Config, family: Family) -> Result<Option<usize>> {
    let types = config.texts("layer_types")?;
    if let Some(kind) =
        types.iter().find(|kind| !kind.ends_with("full_attention") && *kind != "sliding_attention")
    {
        return Err(Error::Unsupported {
            what: format!("a layer of type {kind:?}"),
            way_out: "full_attention and sliding_attention are".into(),
        });
    }
    let first_layer = config.size_or_zero("max_window_layers", 28)?;
    let uses_window = config.flag("use_sliding_window")?.unwrap_or(false);
    let default = match family {
        Family::Mistral if !config.has("sliding_window") => Some(4096),
        _ => None,
    };
    let given = config.size_if_given("sliding_window")?.or(default);
    let num_layers = config.size("num_hidden_layers")?;
    let is_used = match family {
        Family::Qwen2 | Family::Qwen3 if types.is_empty() => {
            uses_window && num_layers > first_layer
        }
        Family::Qwen2 | Family::Qwen3 => types.iter().any(|kind| kind == "sliding_attention"),
        _ => given.is_some() || types.iter().any(|kind| kind == "sliding_attention"),
    };
    match (is_used, given) {
        (false, _) => Ok(None),
        (true, Some(window)) => Ok(Some(window)),
        (true, None) => Err(config.error("\"sliding_window\" is missing".into())),
    }
}

/// The activation of the feed-forward layers' gate.
fn activation(config: &Config, family: Family) -> Result<Activation> {
    let default = if family == Family::Gemma { "gelu_pytorch_tanh" } else { "silu" };
    let name = config.text_or("hidden_act", default)?;
    let name = match family {
        Family::Gemma => config.text_or("hidden_activation", name)?,
        _ => name,
    };
    // Gemma's first exports said "gelu" and meant the other.
    let name = if family == Family::Gemma && name == "gelu" { "gelu_pytorch_tanh" } else { name };
    activation_of("hidden_act", name)
}

/// What of a checkpoint may be left over: frequencies that older exports stored, where they are those
/// that the configuration gives.
pub struct Spares {
    rope: Rope,
}

impl Spares {
    /// Whether a tensor that nobody took changes nothing.
    pub(super) fn is_spare(&self, name: &str, tensor: &Tensor) -> bool {
        let stored = tensor.to_vec();
        // Stored in 16 bits, they were rounded.
        let is_near = |(stored, own): (&f32, &f32)| (stored - own).abs() <= 1e-2 * own + 1e-6;
        let is_like =
            |own: &Vec<f32>| stored.len() == own.len() && stored.iter().zip(own).all(is_near);
        name.ends_with("rotary_emb.inv_freq")
            && (is_like(&self.rope.frequencies) || is_like(&self.rope.plain))
    }
}
