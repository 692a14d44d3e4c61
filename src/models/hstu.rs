//! HSTU: hierarchical sequential transduction units over a history and its times (Zhai et al. 2024), in
//! the layout of the research code of meta-recsys/generative-recommenders
//! (`research/modeling/sequential/hstu.py`).
//!
//! A block is, with `[u, v, q, k] = silu(norm(x) W)` and the norm without weights,
//!
//! ```text
//! a = sum over j <= i of silu(q_i . k_j + position[j - i] + time[bucket(t_{i+1} - t_j)]) / N * v_j
//! x += (u * norm(a)) W_o + b_o
//! ```
//!
//! `N` is the number of positions of the model, whatever the length of the history, so padding changes
//! nothing and none is read. The last row's `t_{i+1}` is the time of the request.

use std::sync::Arc;

use super::config::Config;
use super::network::Activations;
use super::sasrec_meta::{MetaBlocks, is_meta};
use super::stu::{Projection, Stu, StuBias, StuInput, StuSpec, Uvqk};
use super::vector_network::{
    Events, VectorModel, VectorNetwork, VectorPrompt, VectorSpec, item_shape, matrix_shape,
    num_layers, tokens_of,
};
use super::weights::Weights;
use crate::backend::{Activation, Backend, Batch, Epilogue, GatedOutput, KvLayout, TargetMask};
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Of the published norms.
const EPSILON: f32 = 1e-6;

/// The network.
pub struct Hstu<B: Backend> {
    spec: VectorSpec,
    /// Times the root of the columns, and padded to them where ratings have columns of their own.
    items: B::Table,
    positions: B::Table,
    /// The same of ratings, and how many there are.
    ratings: Option<(B::Table, usize)>,
    blocks: Blocks<B>,
    /// Takes the columns of items out of those of items and ratings.
    item_columns: Option<B::Matrix>,
    norm: OutputNorm<B>,
}

/// What is between the input and the output, which the networks of the research code share.
enum Blocks<B: Backend> {
    Hstu {
        spec: StuSpec,
        blocks: Vec<Stu<B>>,
        /// What weights are divided by.
        divisor: f32,
    },
    Sasrec(MetaBlocks<B>),
}

/// What a query vector is normed by.
enum OutputNorm<B: Backend> {
    /// An RMS norm by these weights is a division by the vector's length.
    Length(B::Vector),
    Layer,
}

impl<B: Backend> Hstu<B> {
    /// Puts a checkpoint on a device.
    ///
    /// # Errors
    /// See [`load_vectors`](super::load_vectors).
    pub fn load(backend: &B, config: &Config, weights: &mut Weights) -> Result<VectorModel<B>> {
        const ITEMS: &str = "_embedding_module._item_emb.weight";
        const POSITIONS: &str = "_input_features_preproc._pos_emb.weight";
        let [num_rows, item_columns] = item_shape(config, weights, ITEMS)?;
        let [num_positions, columns] = matrix_shape(weights, POSITIONS)?;
        let max_items = needed(
            config,
            "max_items",
            "how many of a history's newest items are read (train_fn.max_sequence_length)",
        )?;
        if max_items == 0 || max_items >= num_positions {
            return Err(config.error(format!(
                "\"max_items\" is {max_items}; the checkpoint has {num_positions} positions, of \
                 which one at least belongs to what follows"
            )));
        }
        let scale = (columns as f64).sqrt() as f32;
        let items = weights.take(ITEMS, &[num_rows, item_columns])?;
        let ratings = load_ratings(backend, config, weights, [columns, item_columns])?;
        let (blocks, kv) = match is_meta(weights) {
            true => {
                let blocks = MetaBlocks::load(backend, config, weights, columns)?;
                let kv = KvLayout::new(blocks.len(), blocks.heads);
                (Blocks::Sasrec(blocks), kv)
            }
            false => load_blocks(backend, config, weights, [columns, num_positions])?,
        };
        let is_normed = config.flag("item_l2_norm")?.unwrap_or(true);
        let network = Hstu {
            spec: VectorSpec {
                columns: item_columns,
                num_rows,
                max_items,
                max_tokens: max_items,
                kv,
            },
            items: backend.table(spread(&items, columns, 0, scale), None)?,
            positions: backend.table(weights.take(POSITIONS, &[num_positions, columns])?, None)?,
            ratings,
            blocks,
            item_columns: match item_columns == columns {
                true => None,
                false => Some(backend.matrix(&[first_columns(item_columns, columns)])?),
            },
            norm: OutputNorm::read(backend, config, item_columns)?,
        };
        let items = if is_normed { of_length_one(&items) } else { items };
        Ok(VectorModel { network: Arc::new(network), items, bias: None })
    }
}

/// Whether a tensor of the published checkpoints says nothing: the mask, which is causal.
pub(super) fn is_spare(name: &str) -> bool {
    name == "_attn_mask"
}

/// A size that no tensor tells.
fn needed(config: &Config, key: &str, what: &str) -> Result<usize> {
    let missing = || {
        config.error(format!("{key:?} is missing: {what}, which no tensor of this family tells"))
    };
    config.size_if_given(key)?.ok_or_else(missing)
}

/// The embeddings of ratings behind those of items, where the checkpoint has them, and how many there
/// are.
fn load_ratings<B: Backend>(
    backend: &B,
    config: &Config,
    weights: &mut Weights,
    [columns, item_columns]: [usize; 2],
) -> Result<Option<(B::Table, usize)>> {
    const NAME: &str = "_input_features_preproc._rating_emb.weight";
    let (count, width) = match weights.contains(NAME) {
        true => matrix_shape(weights, NAME)?.into(),
        false => (0, 0),
    };
    if width + item_columns != columns {
        return Err(config.error(format!(
            "positions have {columns} columns, items {item_columns} and ratings {width}: ratings beside \
             items are served, and no ratings as positions of their own"
        )));
    }
    if width == 0 {
        return Ok(None);
    }
    let ratings = weights.take(NAME, &[count, width])?;
    let scale = (columns as f64).sqrt() as f32;
    Ok(Some((backend.table(spread(&ratings, columns, item_columns, scale), None)?, count)))
}

impl<B: Backend> OutputNorm<B> {
    fn read(backend: &B, config: &Config, columns: usize) -> Result<OutputNorm<B>> {
        match config.text_or("user_embedding_norm", "l2_norm")? {
            "l2_norm" => {
                let weight = vec![(columns as f64).powf(-0.5) as f32; columns];
                Ok(OutputNorm::Length(backend.vector(&[Tensor::new(&[columns], weight)])?))
            }
            "layer_norm" => Ok(OutputNorm::Layer),
            other => Err(config.error(format!(
                "\"user_embedding_norm\" is {other:?}; \"l2_norm\" and \"layer_norm\" are"
            ))),
        }
    }
}

fn block_name(layer: usize) -> String {
    format!("_hstu._attention_layers.{layer}")
}

/// HSTU's blocks, and the keys and values that they keep.
fn load_blocks<B: Backend>(
    backend: &B,
    config: &Config,
    weights: &mut Weights,
    [columns, num_positions]: [usize; 2],
) -> Result<(Blocks<B>, KvLayout)> {
    let num_heads = needed(config, "num_heads", "the attention heads (hstu_encoder.num_heads)")?;
    let (uvqk, spec) = read_block(config, weights, columns, num_heads)?;
    let count = num_layers(weights, |layer| format!("{}._uvqk", block_name(layer)));
    let shape = [columns, num_positions];
    let blocks = (0..count).map(|layer| load_block(backend, weights, layer, shape, uvqk, &spec));
    let blocks = blocks.collect::<Result<_>>()?;
    let kv = KvLayout::new(count, spec.heads);
    Ok((Blocks::Hstu { spec, blocks, divisor: num_positions as f32 }, kv))
}

/// What the blocks of a checkpoint have in common.
fn read_block(
    config: &Config,
    weights: &Weights,
    columns: usize,
    num_heads: usize,
) -> Result<(Uvqk, StuSpec)> {
    let first = block_name(0);
    let (name, out) = (format!("{first}._uvqk"), format!("{first}._o.weight"));
    let [_, all] = matrix_shape(weights, &name)?;
    let [_, gated] = matrix_shape(weights, &out)?;
    let output = match config.flag("concat_ua")?.unwrap_or(false) {
        true => GatedOutput::WithNormed,
        false => GatedOutput::Gated,
    };
    let values = gated / output.num_parts();
    let is_whole = gated.is_multiple_of(output.num_parts())
        && values.is_multiple_of(num_heads)
        && all > 2 * values
        && (all - 2 * values).is_multiple_of(2 * num_heads);
    if !is_whole {
        return Err(config.error(format!(
            "{num_heads} heads do not fit {name:?} of {columns} x {all} and {out:?} of {columns} x \
             {gated}; check \"num_heads\", and \"concat_ua\" where the training set it"
        )));
    }
    let (key_dim, value_dim) = ((all - 2 * values) / 2 / num_heads, values / num_heads);
    let uvqk = Uvqk { num_heads, key_dim, value_dim };
    let num_times = weights.num_rows(&format!("{first}._rel_attn_bias._ts_w")).unwrap_or(0);
    let activation = match config.text_or("linear_activation", "silu")? {
        "silu" => Epilogue::Activate(Activation::Silu),
        "none" => Epilogue::Store,
        other => {
            return Err(config
                .error(format!("\"linear_activation\" is {other:?}; \"silu\" and \"none\" are")));
        }
    };
    let block = StuSpec {
        heads: uvqk.heads(),
        value_dim,
        scale: 1.0,
        mask: TargetMask::CAUSAL,
        epsilon: EPSILON,
        qkv_epilogue: activation,
        gate_epilogue: activation,
        is_by_head: false,
        output,
        thresholds: thresholds(num_times.saturating_sub(1)),
    };
    Ok((uvqk, block))
}

/// The first number of seconds of each time bucket but the first: a bucket is
/// `trunc(ln(max(1, seconds)) / 0.301)` in f32, and the last takes all that is longer.
fn thresholds(count: usize) -> Vec<u64> {
    let bucket = |seconds: u64| ((seconds.max(1) as f32).ln() / 0.301) as usize;
    let first_of = |number: usize| {
        let (mut low, mut high) = (0, 1u64 << 63);
        while low < high {
            let middle = low + (high - low) / 2;
            match bucket(middle) >= number {
                true => high = middle,
                false => low = middle + 1,
            }
        }
        low
    };
    (1..=count).map(first_of).collect()
}

/// `[rows, columns]` with the tensor's own columns, times a factor, from `first` on, and zeros beside.
fn spread(tensor: &Tensor, columns: usize, first: usize, factor: f32) -> Tensor {
    let [rows, width] = [tensor.shape()[0], tensor.shape()[1]];
    let mut values = vec![0.0; rows * columns];
    for (to, from) in values.chunks_exact_mut(columns).zip(tensor.to_vec().chunks_exact(width)) {
        to[first..first + width].iter_mut().zip(from).for_each(|(to, from)| *to = from * factor);
    }
    Tensor::new(&[rows, columns], values)
}

/// Takes the first of some columns: `[wanted, columns]`.
fn first_columns(wanted: usize, columns: usize) -> Tensor {
    let mut values = vec![0.0; wanted * columns];
    values.iter_mut().step_by(columns + 1).for_each(|value| *value = 1.0);
    Tensor::new(&[wanted, columns], values)
}

/// Rows divided by their lengths, or by 1e-6 where they are shorter.
fn of_length_one(tensor: &Tensor) -> Tensor {
    let mut values = tensor.to_vec();
    for row in values.chunks_exact_mut(tensor.shape()[1]) {
        let length = row.iter().map(|x| f64::from(x * x)).sum::<f64>().sqrt().max(1e-6);
        row.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
    }
    Tensor::new(tensor.shape(), values)
}

fn load_block<B: Backend>(
    backend: &B,
    weights: &mut Weights,
    layer: usize,
    [columns, num_positions]: [usize; 2],
    uvqk: Uvqk,
    block: &StuSpec,
) -> Result<Stu<B>> {
    let name = block_name(layer);
    let matrix = weights.take(&format!("{name}._uvqk"), &[columns, uvqk.columns()])?;
    let gated = block.output.num_parts() * uvqk.num_heads * uvqk.value_dim;
    let out = weights.take(&format!("{name}._o.weight"), &[columns, gated])?;
    let out_bias = weights.take(&format!("{name}._o.bias"), &[columns])?;
    let bias = format!("{name}._rel_attn_bias");
    let places = [2 * num_positions - 1];
    // By position and time, by position alone, or none.
    let bias = if !block.thresholds.is_empty() {
        let times = weights.take(&format!("{bias}._ts_w"), &[block.thresholds.len() + 1])?;
        Some((weights.take(&format!("{bias}._pos_w"), &places)?, times))
    } else if weights.contains(&format!("{bias}._w")) {
        Some((weights.take(&format!("{bias}._w"), &places)?, Tensor::new(&[1], vec![0.0])))
    } else {
        None
    };
    let bias = match bias {
        None => None,
        Some((positions, times)) => Some(StuBias {
            positions: backend.vector(&[positions])?,
            times: backend.vector(&[times])?,
        }),
    };
    Ok(Stu {
        input_norm: None,
        qkv: Projection { weight: backend.matrix(&uvqk.qkv(&matrix))?, bias: None },
        gate: Projection { weight: backend.matrix(&[uvqk.gate(&matrix)])?, bias: None },
        output_norm: None,
        out: Projection {
            weight: backend.matrix(&[out])?,
            bias: Some(backend.vector(&[out_bias])?),
        },
        bias,
    })
}

/// Takes the rows of `s.residual` through HSTU's blocks.
fn forward_hstu<B: Backend>(
    backend: &B,
    spec: &StuSpec,
    blocks: &[Stu<B>],
    divisor: f32,
    prompts: &[VectorPrompt],
    batch: &mut Batch<'_, B>,
    s: &mut Activations<B>,
) {
    let ends: Vec<usize> = prompts.iter().map(|prompt| prompt.tokens.len()).collect();
    let divisors = vec![divisor; prompts.len()];
    // Where no bias goes by time, all times are alike.
    let seconds = prompts.iter().map(|prompt| match spec.thresholds.is_empty() {
        true => vec![0; prompt.tokens.len() + 1],
        false => prompt.seconds.clone(),
    });
    let seconds: Vec<Vec<i64>> = seconds.collect();
    let input = StuInput {
        first_targets: &ends,
        divisors: &divisors,
        seconds: &seconds,
        is_kept_alone: false,
    };
    for (index, block) in blocks.iter().enumerate() {
        block.forward(backend, spec, index, &input, batch, s);
    }
}

impl<B: Backend> VectorNetwork<B> for Hstu<B> {
    fn spec(&self) -> &VectorSpec {
        &self.spec
    }

    fn prompt(&self, events: &Events<'_>) -> Result<VectorPrompt> {
        if events.rows.is_empty() {
            return Err(Error::EmptyInput);
        }
        let seconds = match &self.blocks {
            Blocks::Hstu { spec, .. } if !spec.thresholds.is_empty() => events.seconds()?,
            _ => Vec::new(),
        };
        let second_tokens = match &self.ratings {
            Some((_, count)) => events.numbers("rating", *count)?,
            None => Vec::new(),
        };
        Ok(VectorPrompt { tokens: events.rows.to_vec(), second_tokens, seconds })
    }

    fn forward(
        &self,
        backend: &B,
        prompts: &[VectorPrompt],
        batch: &mut Batch<'_, B>,
        s: &mut Activations<B>,
    ) {
        backend.embed(&self.items, &tokens_of(prompts), batch, &mut s.residual);
        if let Some((ratings, _)) = &self.ratings {
            let of_prompts = prompts.iter().flat_map(|prompt| &prompt.second_tokens);
            let of_prompts: Vec<u32> = of_prompts.copied().collect();
            backend.add_embedding(ratings, &of_prompts, batch, &mut s.residual);
        }
        let positions = batch.chunks.iter().flat_map(|chunk| chunk.clone());
        let positions: Vec<u32> = positions.map(|position| position as u32).collect();
        backend.add_embedding(&self.positions, &positions, batch, &mut s.residual);

        match &self.blocks {
            Blocks::Hstu { spec, blocks, divisor } => {
                forward_hstu(backend, spec, blocks, *divisor, prompts, batch, s);
            }
            Blocks::Sasrec(blocks) => blocks.forward(backend, batch, s),
        }
        backend.gather_last(&s.residual, 0, batch, &mut s.last);
        if let Some(columns) = &self.item_columns {
            backend.matmul(&s.last, columns, None, Epilogue::Store, &mut s.normed);
            std::mem::swap(&mut s.last, &mut s.normed);
        }
        match &self.norm {
            OutputNorm::Length(weight) => backend.rms_norm(&s.last, weight, 1e-30, &mut s.hidden),
            OutputNorm::Layer => backend.layer_norm(&s.last, None, EPSILON, &mut s.hidden),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_in_the_published_buckets() {
        let thresholds = thresholds(128);
        let bucket = |seconds| thresholds.partition_point(|&first| first <= seconds);
        assert_eq!([0, 1, 2, 3].map(bucket), [0, 0, 2, 3]);
        let mut rng = fastrand::Rng::with_seed(1);
        for _ in 0..100_000 {
            let seconds = rng.u64(..) >> rng.u32(1..64);
            let published = ((seconds.max(1) as f32).ln() / 0.301).trunc() as usize;
            assert_eq!(bucket(seconds), published.min(128), "{seconds}");
        }
    }
}
