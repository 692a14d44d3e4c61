//! T5: an encoder reads the history, a decoder writes the semantic ID (Raffel et al. 2020;
//! TIGER, Rajput et al. 2023).
//!
//! What differs from a usual transformer: norms have neither mean nor bias; attention is not
//! scaled by 1/sqrt(d); positions are a learned bias per bucket of relative distance, held by the
//! first layer and shared by all; cross-attention has no position. T5 scales a tied head by
//! 1/sqrt(d_model); mT5 never scales. Encoder, decoder and head usually have one embedding, and a
//! checkpoint may give each its own.

use std::ops::Range;
use std::slice;
use std::sync::Arc;

use super::config::{Config, SidLayout};
use super::family::{Family, activation_of};
use super::network::{
    Activations, EncoderPiece, EncoderSweep, ModelOutput, ModelSpec, Network, PromptKind,
};
use super::relative_bias::RelativeBias;
use super::weights::Weights;
use super::whole_words::{WholeWords, WordRule};
use crate::backend::{
    Activation, AttentionSpec, Backend, Batch, Epilogue, Heads, KvLayout, KvScope, Mask,
    PrefillAttention,
};
use crate::error::Result;
use crate::tensor::Tensor;

/// The network.
pub struct T5<B: Backend> {
    spec: ModelSpec,
    epsilon: f32,
    embedding: B::Table,
    /// Where it differs from the encoder's.
    decoder_embedding: Option<B::Table>,
    /// Added to the encoder's embeddings, where the checkpoint has them.
    words: Option<WholeWords<B>>,
    encoder: Vec<EncoderLayer<B>>,
    encoder_bias: RelativeBias,
    encoder_norm: B::Vector,
    decoder: Vec<DecoderLayer<B>>,
    /// `[num_heads, max_distance + 1]` over the distance back; all beyond share the last.
    decoder_bias: B::Vector,
    decoder_norm: B::Vector,
    head: B::Head,
}

struct EncoderLayer<B: Backend> {
    attention: SelfAttention<B>,
    feed_forward: FeedForward<B>,
}

struct DecoderLayer<B: Backend> {
    attention: SelfAttention<B>,
    cross_norm: B::Vector,
    cross_query: B::Matrix,
    cross_kv: B::Matrix,
    cross_out: B::Matrix,
    feed_forward: FeedForward<B>,
}

struct SelfAttention<B: Backend> {
    norm: B::Vector,
    qkv: B::Matrix,
    out: B::Matrix,
}

struct FeedForward<B: Backend> {
    norm: B::Vector,
    kind: FeedForwardKind<B>,
}

enum FeedForwardKind<B: Backend> {
    Plain {
        inner: B::Matrix,
        outer: B::Matrix,
        activation: Activation,
    },
    /// With the gate and the linear part stacked.
    Gated {
        inner: B::Matrix,
        outer: B::Matrix,
        activation: Activation,
    },
    /// Linear layers with biases, ReLU between them, as GRID has them.
    Deep(Vec<(B::Matrix, B::Vector)>),
}

impl<B: Backend> T5<B> {
    /// Puts a checkpoint on a device.
    ///
    /// # Errors
    /// See [`super::load`].
    // long: the parts of a checkpoint, one after the other, each in a line or two.
    pub fn load(
        backend: &B,
        config: &Config,
        family: Family,
        weights: &mut Weights,
        layout: &SidLayout,
    ) -> Result<T5<B>> {
        let d_model = config.size("d_model")?;
        let num_heads = config.size("num_heads")?;
        let heads = Heads::new(num_heads, num_heads, config.size("d_kv")?);
        let num_layers = config.size("num_layers")?;
        let num_decoder_layers = config.size_or("num_decoder_layers", num_layers)?;
        let vocab_size = config.size("vocab_size")?;
        config.expect_flag("is_encoder_decoder", true)?;
        // The tasks that P5 was trained for; its tensors say whether words have embeddings.
        config.without_effect(&["n_positions", "losses", "whole_word_embed"]);
        let num_buckets = config.size_or("relative_attention_num_buckets", 32)?;
        let max_distance = config.size_or("relative_attention_max_distance", 128)?;
        if num_buckets < 4 || max_distance <= num_buckets / 2 {
            return Err(config.error(format!(
                "{num_buckets} relative_attention_num_buckets up to distance {max_distance} make no scale"
            )));
        }
        let layers = Layers { config, family, d_model, heads, d_ff: config.size("d_ff")? };
        let mut relative_bias = |stack: &str, is_bidirectional: bool| -> Result<RelativeBias> {
            let name =
                format!("{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight");
            let weight = weights.take(&name, &[num_buckets, num_heads])?.to_vec();
            Ok(RelativeBias { weight, num_heads, num_buckets, max_distance, is_bidirectional })
        };
        let encoder_bias = relative_bias("encoder", true)?;
        let decoder_bias = relative_bias("decoder", false)?;
        let Embeddings { encoder: embedding, decoder: decoder_embedding, head, scale } =
            Embeddings::take(config, family, weights, &[vocab_size, d_model])?;
        let final_norm = weights.take("decoder.final_layer_norm.weight", &[d_model])?;
        // The scale of the head's input is the scale of its norm's weights.
        let final_norm: Vec<f32> = final_norm.to_vec().iter().map(|x| x * scale).collect();

        let end = config.end_tokens().first().copied();
        let words = WholeWords::take(backend, weights, layout, end, [vocab_size, d_model])?;
        let encoder = (0..num_layers).map(|layer| {
            Ok(EncoderLayer {
                attention: layers.attention(
                    backend,
                    weights,
                    &format!("encoder.block.{layer}.layer.0"),
                )?,
                feed_forward: layers.feed_forward(
                    backend,
                    weights,
                    &format!("encoder.block.{layer}.layer.1"),
                )?,
            })
        });
        let encoder = encoder.collect::<Result<Vec<_>>>()?;
        let decoder = (0..num_decoder_layers)
            .map(|layer| layers.decoder(backend, weights, &format!("decoder.block.{layer}")))
            .collect::<Result<Vec<_>>>()?;
        let encoder_norm = weights.take("encoder.final_layer_norm.weight", &[d_model])?;
        let decoder_bias = decoder_bias.table((0..=max_distance as i64).map(|back| -back));
        let decoder_bias = Tensor::new(&[decoder_bias.len()], decoder_bias);
        let head = backend.head(head, &layout.levels, &layout.known_tokens())?;
        Ok(T5 {
            spec: ModelSpec {
                vocab_size,
                max_positions: None,
                // The encoder's layers borrow the first set while a prompt is read.
                kv: KvLayout {
                    context_sets: num_decoder_layers,
                    tail_layers: num_decoder_layers,
                    heads,
                    values_are_keys: false,
                },
                prompt: PromptKind::Whole {
                    start_token: config.start_token(vocab_size)?,
                    num_layers,
                },
                output: ModelOutput::Logits,
                num_weights: weights.num_taken(),
            },
            epsilon: config.number_or("layer_norm_epsilon", 1e-6)? as f32,
            decoder_embedding: match decoder_embedding.is_equal(&embedding) {
                true => None,
                false => Some(backend.table(decoder_embedding, Some(&head))?),
            },
            embedding: backend.table(embedding, Some(&head))?,
            words,
            encoder,
            encoder_bias,
            encoder_norm: backend.vector(&[encoder_norm])?,
            decoder,
            decoder_bias: backend.vector(&[decoder_bias])?,
            decoder_norm: backend.vector(&[Tensor::new(&[d_model], final_norm)])?,
            head,
        })
    }

    /// Reads the prompts, and stores in the contexts what the decoder attends to. While a prompt is
    /// read, its context's first set holds the keys and values of the encoder's layers.
    fn read_prompts(
        &self,
        backend: &B,
        tokens: &[u32],
        batch: &Batch<'_, B>,
        s: &mut Activations<B>,
    ) {
        let longest = batch.chunks.iter().map(ExactSizeIterator::len).max().unwrap_or(0) as i64;
        let bias = self.encoder_bias.table(1 - longest..longest);
        let over_prompt = self.over_prompt(&bias);
        backend.embed(&self.embedding, tokens, batch, &mut s.residual);
        if let Some(words) = &self.words {
            words.add(backend, tokens, batch, &mut s.spare, &mut s.residual);
        }
        for layer in &self.encoder {
            layer.project(self, backend, batch, s);
            layer.attend(self, backend, &over_prompt, batch, s);
        }
        self.store_cross(backend, batch, s);
    }

    /// The encoder's attention.
    fn over_prompt<'a>(&self, bias: &'a [f32]) -> PrefillAttention<'a> {
        AttentionSpec::softmax(self.spec.kv.heads, Mask::Bidirectional, 1.0).with_bias(bias)
    }

    /// Stores what the decoder attends to, from the encoder's last rows.
    fn store_cross(&self, backend: &B, batch: &Batch<'_, B>, s: &mut Activations<B>) {
        let heads = self.spec.kv.heads;
        backend.rms_norm(&s.residual, &self.encoder_norm, self.epsilon, &mut s.normed);
        for (layer, decoder) in self.decoder.iter().enumerate() {
            backend.matmul(&s.normed, &decoder.cross_kv, None, Epilogue::Store, &mut s.projected);
            backend.store_context(layer, &s.projected, 0, heads, batch);
        }
    }

    /// Reads the beams' newest tokens.
    fn decode(&self, backend: &B, batch: &mut Batch<'_, B>, s: &mut Activations<B>) {
        let heads = self.spec.kv.heads;
        let over_tail =
            AttentionSpec::softmax(heads, KvScope::Tail, 1.0).with_bias(&self.decoder_bias);
        let over_context = AttentionSpec::softmax(heads, KvScope::Context, 1.0);
        let embedding = self.decoder_embedding.as_ref().unwrap_or(&self.embedding);
        backend.embed(embedding, &[], batch, &mut s.residual);
        for (index, layer) in self.decoder.iter().enumerate() {
            let attention = &layer.attention;
            backend.rms_norm(&s.residual, &attention.norm, self.epsilon, &mut s.normed);
            backend.matmul(&s.normed, &attention.qkv, None, Epilogue::Store, &mut s.projected);
            backend.append_tail(index, &s.projected, heads, batch);
            backend.attend_beams(index, &s.projected, &over_tail, batch, &mut s.attended);
            backend.matmul(&s.attended, &attention.out, None, Epilogue::Add, &mut s.residual);

            backend.rms_norm(&s.residual, &layer.cross_norm, self.epsilon, &mut s.normed);
            backend.matmul(&s.normed, &layer.cross_query, None, Epilogue::Store, &mut s.projected);
            backend.attend_beams(index, &s.projected, &over_context, batch, &mut s.attended);
            backend.matmul(&s.attended, &layer.cross_out, None, Epilogue::Add, &mut s.residual);
            layer.feed_forward.forward(backend, self.epsilon, s);
        }
        backend.rms_norm(&s.residual, &self.decoder_norm, self.epsilon, &mut s.hidden);
    }
}

/// The activations of T5.
pub struct Scratch<B: Backend> {
    /// Of the rows of a pass.
    rows: Activations<B>,
    /// Of the parts of a prompt that is read in pieces.
    parts: Vec<Activations<B>>,
}

impl<B: Backend> EncoderLayer<B> {
    /// Stores the keys and values of rows, and leaves their queries.
    fn project(&self, t5: &T5<B>, backend: &B, batch: &Batch<'_, B>, s: &mut Activations<B>) {
        let (EncoderLayer { attention, .. }, heads) = (self, t5.spec.kv.heads);
        backend.rms_norm(&s.residual, &attention.norm, t5.epsilon, &mut s.normed);
        backend.matmul(&s.normed, &attention.qkv, None, Epilogue::Store, &mut s.projected);
        backend.store_context(0, &s.projected, heads.query_dim(), heads, batch);
    }

    /// The rest of the layer, once the keys and values of the whole prompt are there.
    fn attend(
        &self,
        t5: &T5<B>,
        backend: &B,
        over_prompt: &PrefillAttention<'_>,
        batch: &Batch<'_, B>,
        s: &mut Activations<B>,
    ) {
        let EncoderLayer { attention, feed_forward } = self;
        backend.attend_prefill(0, &s.projected, over_prompt, batch, &mut s.attended);
        backend.matmul(&s.attended, &attention.out, None, Epilogue::Add, &mut s.residual);
        feed_forward.forward(backend, t5.epsilon, s);
    }
}

impl<B: Backend> Network<B> for T5<B> {
    type Scratch = Scratch<B>;

    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn head(&self) -> &B::Head {
        &self.head
    }

    fn word_rule(&self) -> Option<Arc<WordRule>> {
        self.words.as_ref().map(|words| Arc::clone(&words.rule))
    }

    fn new_scratch(&self, backend: &B) -> Scratch<B> {
        Scratch { rows: Activations::new(backend), parts: Vec::new() }
    }

    fn forward(
        &self,
        backend: &B,
        tokens: &[u32],
        batch: &mut Batch<'_, B>,
        Scratch { rows, .. }: &mut Scratch<B>,
    ) {
        if !batch.chunks.is_empty() {
            self.read_prompts(backend, tokens, &batch.prompts_alone(), rows);
        }
        self.decode(backend, &mut batch.beams_from(0), rows);
    }

    /// The rows of a piece have activations of their own, which hold the residual stream from layer
    /// to layer, and the queries from the first half of a layer to the second.
    fn encode(
        &self,
        backend: &B,
        tokens: &[u32],
        memory: &B::Memory,
        slots: &mut [B::Slot],
        pieces: Range<usize>,
        Scratch { parts, .. }: &mut Scratch<B>,
    ) {
        let len = tokens.len();
        let bias = self.encoder_bias.table(1 - len as i64..len as i64);
        let over_prompt = self.over_prompt(&bias);
        for number in pieces {
            let EncoderPiece { sweep, rows, part } =
                PromptKind::piece(self.encoder.len(), len, number);
            if part == parts.len() {
                parts.push(Activations::new(backend));
            }
            let s = &mut parts[part];
            let batch = &Batch::new(memory, slice::from_ref(&rows), slots);
            match sweep {
                EncoderSweep::Project(layer) => {
                    if layer == 0 {
                        let of_rows = &tokens[rows.clone()];
                        backend.embed(&self.embedding, of_rows, batch, &mut s.residual);
                        if let Some(words) = &self.words {
                            words.add(backend, tokens, batch, &mut s.spare, &mut s.residual);
                        }
                    }
                    self.encoder[layer].project(self, backend, batch, s);
                }
                EncoderSweep::Attend(layer) => {
                    self.encoder[layer].attend(self, backend, &over_prompt, batch, s);
                }
                EncoderSweep::Finish => self.store_cross(backend, batch, s),
            }
        }
    }

    fn output<'s>(&self, scratch: &'s Scratch<B>) -> &'s B::Buffer {
        &scratch.rows.hidden
    }
}

impl<B: Backend> FeedForward<B> {
    /// Adds the layer's output to the residual stream.
    fn forward(&self, backend: &B, epsilon: f32, s: &mut Activations<B>) {
        backend.rms_norm(&s.residual, &self.norm, epsilon, &mut s.normed);
        match &self.kind {
            FeedForwardKind::Plain { inner, outer, activation } => {
                let activate = Epilogue::Activate(*activation);
                backend.matmul(&s.normed, inner, None, activate, &mut s.projected);
                backend.matmul(&s.projected, outer, None, Epilogue::Add, &mut s.residual);
            }
            FeedForwardKind::Gated { inner, outer, activation } => {
                backend.matmul(&s.normed, inner, None, Epilogue::Store, &mut s.projected);
                backend.glu(&s.projected, *activation, &mut s.spare);
                backend.matmul(&s.spare, outer, None, Epilogue::Add, &mut s.residual);
            }
            FeedForwardKind::Deep(layers) => {
                let Some(((last, last_bias), hidden)) = layers.split_last() else { return };
                for (weight, bias) in hidden {
                    let activate = Epilogue::Activate(Activation::Relu);
                    backend.matmul(&s.normed, weight, Some(bias), activate, &mut s.projected);
                    std::mem::swap(&mut s.normed, &mut s.projected);
                }
                backend.matmul(&s.normed, last, Some(last_bias), Epilogue::Add, &mut s.residual);
            }
        }
    }
}

/// Loads the layers of both stacks.
struct Layers<'a> {
    config: &'a Config,
    family: Family,
    d_model: usize,
    d_ff: usize,
    heads: Heads,
}

impl Layers<'_> {
    fn norm<B: Backend>(
        &self,
        backend: &B,
        weights: &mut Weights,
        layer: &str,
    ) -> Result<B::Vector> {
        let weight = weights.take(&format!("{layer}.layer_norm.weight"), &[self.d_model])?;
        backend.vector(&[weight])
    }

    fn attention<B: Backend>(
        &self,
        backend: &B,
        weights: &mut Weights,
        layer: &str,
    ) -> Result<SelfAttention<B>> {
        let inner = self.heads.query_dim();
        let mut take = |name: &str, shape: [usize; 2]| {
            weights.take(&format!("{layer}.SelfAttention.{name}.weight"), &shape)
        };
        let qkv = [
            take("q", [inner, self.d_model])?,
            take("k", [inner, self.d_model])?,
            take("v", [inner, self.d_model])?,
        ];
        let out = take("o", [self.d_model, inner])?;
        Ok(SelfAttention {
            norm: self.norm(backend, weights, layer)?,
            qkv: backend.matrix(&qkv)?,
            out: backend.matrix(&[out])?,
        })
    }

    fn decoder<B: Backend>(
        &self,
        backend: &B,
        weights: &mut Weights,
        block: &str,
    ) -> Result<DecoderLayer<B>> {
        let inner = self.heads.query_dim();
        let cross = format!("{block}.layer.1");
        let mut take = |name: &str, shape: [usize; 2]| {
            weights.take(&format!("{cross}.EncDecAttention.{name}.weight"), &shape)
        };
        let query = take("q", [inner, self.d_model])?;
        let kv = [take("k", [inner, self.d_model])?, take("v", [inner, self.d_model])?];
        let out = take("o", [self.d_model, inner])?;
        Ok(DecoderLayer {
            attention: self.attention(backend, weights, &format!("{block}.layer.0"))?,
            cross_norm: self.norm(backend, weights, &cross)?,
            cross_query: backend.matrix(&[query])?,
            cross_kv: backend.matrix(&kv)?,
            cross_out: backend.matrix(&[out])?,
            feed_forward: self.feed_forward(backend, weights, &format!("{block}.layer.2"))?,
        })
    }

    fn feed_forward<B: Backend>(
        &self,
        backend: &B,
        weights: &mut Weights,
        layer: &str,
    ) -> Result<FeedForward<B>> {
        let norm = self.norm(backend, weights, layer)?;
        if weights.contains(&deep_name(layer, 0, "weight")) {
            let kind = FeedForwardKind::Deep(self.deep(backend, weights, layer)?);
            return Ok(FeedForward { norm, kind });
        }
        let (activation, is_gated) = self.activation()?;
        let mut take = |name: &str, shape: [usize; 2]| {
            weights.take(&format!("{layer}.DenseReluDense.{name}.weight"), &shape)
        };
        let inner_shape = [self.d_ff, self.d_model];
        let inner = match is_gated {
            true => vec![take("wi_0", inner_shape)?, take("wi_1", inner_shape)?],
            false => vec![take("wi", inner_shape)?],
        };
        let outer = backend.matrix(&[take("wo", [self.d_model, self.d_ff])?])?;
        let inner = backend.matrix(&inner)?;
        let kind = match is_gated {
            true => FeedForwardKind::Gated { inner, outer, activation },
            false => FeedForwardKind::Plain { inner, outer, activation },
        };
        Ok(FeedForward { norm, kind })
    }

    /// Linear layers with biases: all but the last have `d_ff` outputs.
    fn deep<B: Backend>(
        &self,
        backend: &B,
        weights: &mut Weights,
        layer: &str,
    ) -> Result<Vec<(B::Matrix, B::Vector)>> {
        let mut layers = Vec::new();
        let mut num_in = self.d_model;
        while weights.contains(&deep_name(layer, layers.len(), "weight")) {
            let number = layers.len();
            let is_last = !weights.contains(&deep_name(layer, number + 1, "weight"));
            let num_out = if is_last { self.d_model } else { self.d_ff };
            let weight = weights.take(&deep_name(layer, number, "weight"), &[num_out, num_in])?;
            let bias = weights.take(&deep_name(layer, number, "bias"), &[num_out])?;
            layers.push((backend.matrix(&[weight])?, backend.vector(&[bias])?));
            num_in = num_out;
        }
        Ok(layers)
    }

    /// The activation, and whether it is a gate: `feed_forward_proj`, unless `dense_act_fn` and
    /// `is_gated_act`, which exports write beside it, say otherwise.
    fn activation(&self) -> Result<(Activation, bool)> {
        let default = if self.family == Family::Mt5 { "gated-gelu" } else { "relu" };
        let name = self.config.text_or("feed_forward_proj", default)?;
        let (is_gated, plain) = match name.strip_prefix("gated-") {
            Some(plain) => (true, plain),
            None => (false, name),
        };
        // By Hugging Face's definition.
        let plain = if name == "gated-gelu" { "gelu_new" } else { plain };
        let is_gated = self.config.flag("is_gated_act")?.unwrap_or(is_gated);
        let plain = self.config.text_or("dense_act_fn", plain)?;
        let key = format!("feed_forward_proj {name:?}");
        let activation = activation_of(&key, plain)?;
        Ok((activation, is_gated))
    }
}

/// The name of a linear layer's tensor in GRID's feed-forward layers, which number an activation and a
/// dropout between two linear layers as well.
fn deep_name(layer: &str, number: usize, tensor: &str) -> String {
    let position = if number == 0 { 0 } else { 3 * number - 1 };
    format!("{layer}.mlp.model.{position}.{tensor}")
}

/// The embeddings and the head, `[vocab_size, d_model]`.
struct Embeddings {
    encoder: Tensor,
    decoder: Tensor,
    head: Tensor,
    /// Of the head's input.
    scale: f32,
}

impl Embeddings {
    fn take(
        config: &Config,
        family: Family,
        weights: &mut Weights,
        shape: &[usize; 2],
    ) -> Result<Embeddings> {
        let tie = config.flag("tie_word_embeddings")?;
        let names = family.tied_names();
        let (embeddings, head_name) = (&names[..3], names[3]);
        // Newer exports say "tied" of every checkpoint and write a head of its own where there is one.
        // Of mT5 all official ones say "untied" and have one, and transformers 5 says "tied" of them.
        let mut tensors = match tie.unwrap_or(family == Family::T5) {
            true => weights.take_tied(names, shape)?,
            false => {
                let mut tensors = weights.take_tied(embeddings, shape)?;
                tensors.push(weights.take(head_name, shape)?);
                tensors
            }
        };
        let flag = config.flag("scale_decoder_outputs")?;
        let is_said = flag.unwrap_or(tie.unwrap_or(family == Family::T5));
        let is_scaled = is_said && (family == Family::T5 || scales_mt5(config, flag)?);
        let scale = if is_scaled { (shape[1] as f64).powf(-0.5) as f32 } else { 1.0 };
        let mut next = || tensors.pop().expect("a tensor for each of four names");
        Ok(Embeddings { head: next(), decoder: next(), encoder: next(), scale })
    }
}

/// Whether an mT5 that says "tied" or "scaled" scales its head's input: transformers 4 did where it was
/// tied, transformers 5 never does.
fn scales_mt5(config: &Config, is_scaled: Option<bool>) -> Result<bool> {
    let version = config.text_or("transformers_version", "")?;
    match (version.starts_with(['2', '3', '4']), is_scaled) {
        (false, None) => Ok(false),
        (true, Some(true)) => Ok(true),
        _ => Err(config.error(format!(
            "an mT5's scores are scaled by d_model^-0.5 where transformers 4 wrote it and tied its \
             head, and never by transformers 5; this one, of {version:?}, may be either: write \
             \"scale_decoder_outputs\": false, or true with a \"transformers_version\" of 4"
        ))),
    }
}

/// A bias of cross-attention that older exports hold and that transformers, too, passes over.
pub(super) fn is_spare(name: &str) -> bool {
    name == "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
}
