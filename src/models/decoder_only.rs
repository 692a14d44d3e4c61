//! Decoder-only networks of the Llama line: the history is a prompt, the semantic ID its
//! continuation (LC-Rec, MiniOneRec, OneRec-1.7B; Touvron et al. 2023, Qwen Team 2024, 2025).
//!
//! One network serves three checkpoints' layouts, which differ in a few [`Flavour`]s: Qwen2 has
//! biases on queries, keys and values; Qwen3 norms each query and key head before its rotation.

use std::ops::Range;

use super::config::{Config, SidLayout};
use super::network::{Activations, ModelOutput, ModelSpec, Network, PromptKind};
use super::weights::Weights;
use crate::backend::{
    Activation, AttentionSpec, Backend, Batch, Epilogue, HeadNorms, Heads, KvLayout, KvScope, Mask,
};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Where the checkpoints' layouts differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavour {
    /// `LlamaForCausalLM`
    Llama,
    /// `Qwen2ForCausalLM`
    Qwen2,
    /// `Qwen3ForCausalLM`
    Qwen3,
}

impl Flavour {
    /// The flavour of an architecture's name.
    pub(super) fn of(architecture: &str) -> Flavour {
        match architecture {
            "Qwen3ForCausalLM" => Flavour::Qwen3,
            "Qwen2ForCausalLM" => Flavour::Qwen2,
            _ => Flavour::Llama,
        }
    }
}

/// The network.
pub struct DecoderOnly<B: Backend> {
    spec: ModelSpec,
    epsilon: f32,
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
    down: B::Matrix,
}

impl<B: Backend> DecoderOnly<B> {
    /// Puts a checkpoint on a device.
    ///
    /// # Errors
    /// See [`super::load`].
    pub fn load(
        backend: &B,
        config: &Config,
        flavour: Flavour,
        weights: &mut Weights,
        layout: &SidLayout,
    ) -> Result<DecoderOnly<B>> {
        let hidden_size = config.size("hidden_size")?;
        let num_heads = config.size("num_attention_heads")?;
        let num_kv_heads = config.size_or("num_key_value_heads", num_heads)?;
        let head_dim = config.size_or("head_dim", (hidden_size / num_heads).max(1))?;
        if !num_heads.is_multiple_of(num_kv_heads) || !head_dim.is_multiple_of(2) {
            return Err(config.error(format!(
                "{num_heads} attention heads of {head_dim} columns cannot share {num_kv_heads} \
                 key-value heads"
            )));
        }
        let heads = Heads::new(num_heads, num_kv_heads, head_dim);
        refuse_what_is_not_served(config)?;
        let vocab_size = config.size("vocab_size")?;
        let num_layers = config.size("num_hidden_layers")?;
        let loader = LayerLoader {
            hidden_size,
            intermediate_size: config.size("intermediate_size")?,
            heads,
            has_qkv_bias: match flavour {
                Flavour::Qwen2 => true,
                _ => config.flag("attention_bias")?.unwrap_or(false),
            },
            has_out_bias: match flavour {
                Flavour::Qwen2 => false,
                _ => config.flag("attention_bias")?.unwrap_or(false),
            },
            has_query_key_norms: flavour == Flavour::Qwen3,
        };
        let embedding = weights.take("model.embed_tokens.weight", &[vocab_size, hidden_size])?;
        let layers = (0..num_layers)
            .map(|layer| loader.load(backend, weights, &format!("model.layers.{layer}")))
            .collect::<Result<Vec<_>>>()?;
        let norm = weights.take("model.norm.weight", &[hidden_size])?;
        let head = match config.flag("tie_word_embeddings")?.unwrap_or(false) {
            true => embedding.clone(),
            false => weights.take("lm_head.weight", &[vocab_size, hidden_size])?,
        };
        let frequencies = rotary_frequencies(config, head_dim)?;
        let frequencies = Tensor::new(&[frequencies.len()], frequencies);
        Ok(DecoderOnly {
            spec: ModelSpec {
                vocab_size,
                max_positions: Some(config.size_or("max_position_embeddings", 2048)?),
                kv: KvLayout::new(num_layers, heads),
                prompt: PromptKind::Chunked,
                output: ModelOutput::Logits,
                num_weights: weights.num_taken(),
            },
            epsilon: config.number_or("rms_norm_eps", 1e-6)? as f32,
            frequencies: backend.vector(&[frequencies])?,
            embedding: backend.table(embedding)?,
            layers,
            norm: backend.vector(&[norm])?,
            head: backend.head(head, &layout.levels, &layout.known_tokens())?,
        })
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
        backend.matmul(&s.normed, &layer.gate_up, None, Epilogue::Store, &mut s.projected);
        backend.glu(&s.projected, Activation::Silu, &mut s.spare);
        backend.matmul(&s.spare, &layer.down, None, Epilogue::Add, &mut s.residual);
    }

    fn scale(&self) -> f32 {
        (self.spec.kv.heads.key_dim as f64).powf(-0.5) as f32
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
        let over_prompt = AttentionSpec::softmax(heads, Mask::Causal, self.scale());
        let over_both = AttentionSpec::softmax(heads, KvScope::Both, self.scale());
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
    has_query_key_norms: bool,
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
        let gate_up = [
            take("mlp.gate_proj.weight", &[inner, hidden])?,
            take("mlp.up_proj.weight", &[inner, hidden])?,
        ];
        Ok(Layer {
            attention_norm: backend.vector(&[take("input_layernorm.weight", &[hidden])?])?,
            qkv: backend.matrix(&qkv)?,
            qkv_bias,
            query_key_norms,
            out: backend.matrix(&[take("self_attn.o_proj.weight", &[hidden, query_dim])?])?,
            out_bias,
            feed_forward_norm: backend
                .vector(&[take("post_attention_layernorm.weight", &[hidden])?])?,
            gate_up: backend.matrix(&gate_up)?,
            down: backend.matrix(&[take("mlp.down_proj.weight", &[hidden, inner])?])?,
        })
    }
}

/// What would give wrong answers if it were passed over.
fn refuse_what_is_not_served(config: &Config) -> Result<()> {
    let unsupported =
        |what: String, way_out: &str| Err(Error::Unsupported { what, way_out: way_out.into() });
    let activation = config.text_or("hidden_act", "silu")?;
    if activation != "silu" {
        return unsupported(format!("hidden_act {activation:?}"), "silu is");
    }
    if config.flag("use_sliding_window")?.unwrap_or(false) {
        return unsupported("use_sliding_window".into(), "full attention is");
    }
    if let Some(kind) = config.texts("layer_types")?.iter().find(|&kind| kind != "full_attention") {
        return unsupported(format!("a layer of type {kind:?}"), "full_attention is");
    }
    if config.flag("mlp_bias")?.unwrap_or(false) {
        return unsupported("mlp_bias".into(), "feed-forward layers without biases are");
    }
    let rotated = config.number_or("partial_rotary_factor", 1.0)?;
    if rotated != 1.0 {
        return unsupported(format!("partial_rotary_factor {rotated}"), "1.0 is");
    }
    Ok(())
}

/// The frequencies of RoPE, from either spelling of the configuration: `rope_parameters`
/// (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4).
fn rotary_frequencies(config: &Config, head_dim: usize) -> Result<Vec<f32>> {
    let parameters = config.object("rope_parameters")?;
    let scaling = match parameters {
        Some(parameters) => Some(parameters),
        None => config.object("rope_scaling")?,
    };
    let theta = match &scaling {
        Some(scaling) => {
            scaling.number_or("rope_theta", config.number_or("rope_theta", 10_000.0)?)?
        }
        None => config.number_or("rope_theta", 10_000.0)?,
    };
    let plain = (0..head_dim / 2).map(|pair| {
        let exponent = (2 * pair) as f64 / head_dim as f64;
        (1.0 / theta.powf(exponent)) as f32
    });
    let plain: Vec<f32> = plain.collect();
    let Some(scaling) = scaling else {
        return Ok(plain);
    };
    let kind = scaling.text_or("rope_type", scaling.text_or("type", "default")?)?;
    match kind {
        "default" => Ok(plain),
        "linear" => {
            let factor = scaling.number_or("factor", 1.0)? as f32;
            Ok(plain.iter().map(|frequency| frequency / factor).collect())
        }
        "llama3" => llama3_frequencies(&scaling, &plain),
        other => Err(Error::Unsupported {
            what: format!("rope_type {other:?}"),
            way_out: "default, linear and llama3 are".into(),
        }),
    }
}

/// Llama 3.1's scaling: long wavelengths are stretched by `factor`, short ones kept, those between
/// blended (Grattafiori et al. 2024; in f32 as published).
fn llama3_frequencies(scaling: &Config, plain: &[f32]) -> Result<Vec<f32>> {
    let factor = scaling.number_or("factor", 8.0)? as f32;
    let low = scaling.number_or("low_freq_factor", 1.0)? as f32;
    let high = scaling.number_or("high_freq_factor", 4.0)? as f32;
    let trained_len = scaling.size_or("original_max_position_embeddings", 8192)? as f32;
    if high <= low {
        return Err(
            scaling.error(format!("high_freq_factor {high} must be above low_freq_factor {low}"))
        );
    }
    let scale = |&frequency: &f32| {
        let wavelength = 2.0 * std::f32::consts::PI / frequency;
        if wavelength < trained_len / high {
            frequency
        } else if wavelength > trained_len / low {
            frequency / factor
        } else {
            let smooth = (trained_len / wavelength - low) / (high - low);
            (1.0 - smooth) * frequency / factor + smooth * frequency
        }
    };
    Ok(plain.iter().map(scale).collect())
}

/// Names that checkpoints carry beside the network: frequencies that older exports stored, and a
/// tied head written out.
pub(super) fn is_known_spare(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || name == "lm_head.weight"
}
