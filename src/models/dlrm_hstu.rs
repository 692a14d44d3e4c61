//! HSTU for ranking, the network of DLRM-v3 (meta-recsys/generative-recommenders,
//! `modules/dlrm_hstu.py`): the history is read once, and candidates, as many as there are, see it and
//! themselves.
//!
//! A row is the item's embedding through a small network, plus that of its other features, plus that
//! of its actions; it is multiplied by the root of the columns, and embeddings of its distance to the
//! candidates and of its age are added. Rows that describe the user stand first. Each block is
//!
//! ```text
//! [u, v, q, k] = norm(x) W + beta      a = sum over seen j of silu(q_i . k_j / sqrt(dim)) / N * v_j
//! x += [silu(u), a, silu(u) * norm(a)] W_o
//! ```
//!
//! In the published code `N` is the longest row of the batch, so an answer depends on its company; here
//! it is the configuration's `attention_divisor`. What the code compares with a batch's candidates is
//! compared with `counted_candidates`.

use std::sync::Arc;

use super::config::Config;
use super::dlrm_rows::{RowBuilder, Rows};
use super::mlp::{Mlp, linear, weighted};
use super::network::Activations;
use super::score_network::{
    ROWS_PER_PASS, ScoreModel, ScoreNetwork, ScoreRequest, ScoreSpec, Task,
};
use super::stu::{Projection, Stu, StuInput, StuSpec, Uvqk, Weighted, flat};
use super::vector_network::{matrix_shape, num_layers};
use super::weights::Weights;
use crate::backend::{
    Activation, Backend, Batch, Epilogue, GatedOutput, KvLayout, SlotSpec, TargetMask,
};
use crate::error::{Error, Result};
use crate::pages::PAGE_LEN;
use crate::tensor::Tensor;

const TRANSDUCER: &str = "_hstu_transducer.";
const BLOCKS: &str = "_hstu_transducer._stu_module._stu_layers.";
/// Of the norms in blocks.
const EPSILON: f32 = 1e-6;
/// Of all others.
const OUTER_EPSILON: f32 = 1e-5;

/// The network.
pub struct DlrmHstu<B: Backend> {
    spec: ScoreSpec,
    columns: usize,
    divisor: Divisor,
    rows: RowBuilder<B>,
    block: StuSpec,
    blocks: Vec<Stu<B>>,
    post: Post<B>,
    /// Of the item's features, which the user's rows are multiplied by.
    items: Mlp<B>,
    /// To the tasks.
    head: Mlp<B>,
}

/// What attention weights are divided by.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Divisor {
    Number(f32),
    /// Rows of the context, and `counted_candidates`.
    OwnLength,
}

/// What becomes of the rows of candidates behind the blocks.
struct Post<B: Backend> {
    /// Joins the hour and the day of the request with each row.
    clock: Option<Clock<B>>,
    norm: PostNorm<B>,
}

enum PostNorm<B: Backend> {
    Layer(Weighted<B>),
    /// A division by the row's length, as an RMS norm.
    Length(B::Vector),
}

struct Clock<B: Backend> {
    combine: Projection<B>,
    /// Seconds of a unit, and units of a period.
    periods: Vec<[f32; 2]>,
}

impl<B: Backend> DlrmHstu<B> {
    /// Puts a checkpoint on a device.
    ///
    /// # Errors
    /// See [`load_scores`](super::load_scores).
    pub fn load(backend: &B, config: &Config, weights: &mut Weights) -> Result<ScoreModel<B>> {
        let num_heads = config.size("num_heads")?;
        let max_items = config.size("max_items")?;
        let counted = config.size_or_zero("counted_candidates", 1)?;
        let divisor = read_divisor(config)?;
        let position_name = format!("{TRANSDUCER}_positional_encoder._position_embeddings_weight");
        let [_, columns] = matrix_shape(weights, &position_name)?;
        let rows = RowBuilder::load(backend, config, weights, columns, counted)?;
        let (uvqk, block) = read_block(config, weights, columns, num_heads)?;
        let count = num_layers(weights, |layer| format!("{BLOCKS}{layer}._uvqk_weight"));
        let blocks =
            (0..count).map(|layer| load_block(backend, weights, layer, columns, uvqk, &block));
        let blocks = blocks.collect::<Result<Vec<_>>>()?;
        let tasks = read_tasks(config)?;
        let item_columns = rows.item_columns();
        let num_context = rows.num_context();
        let network = DlrmHstu {
            spec: ScoreSpec {
                max_items,
                max_context: max_items + num_context,
                num_items: rows.num_items(),
                kv: KvLayout::new(count, block.heads),
                tasks: tasks.clone(),
            },
            columns,
            divisor,
            block,
            blocks,
            post: Post::load(backend, weights, columns)?,
            items: Mlp::load(
                backend,
                weights,
                "_item_embedding_mlp",
                [item_columns, columns],
                true,
            )?,
            head: Mlp::load(
                backend,
                weights,
                "_multitask_module._prediction_module",
                [columns, tasks.len()],
                false,
            )?,
            rows,
        };
        Ok(Arc::new(network))
    }

    /// The rows of candidates behind the blocks, `[candidates, columns]`.
    fn attended(
        &self,
        backend: &B,
        memory: &B::Memory,
        rows: &Rows,
        s: &mut Activations<B>,
    ) -> Result<Vec<f32>> {
        let (context_len, len) = (rows.context_len, rows.ages.len());
        let per_pass = ROWS_PER_PASS / self.block.mask.group_size * self.block.mask.group_size;
        let divisor = match self.divisor {
            Divisor::Number(divisor) => divisor,
            Divisor::OwnLength => rows.counted_len as f32,
        };
        // Where rows see later ones, these are read with them.
        let whole = self.block.mask.num_contextual > 0;
        let mut passes = Vec::new();
        let mut start = 0;
        while start < len {
            let end = match (start < context_len, whole) {
                (true, true) => context_len,
                (true, false) => context_len.min(start + per_pass),
                (false, _) => len.min(start + per_pass),
            };
            passes.push(start..end);
            start = end;
        }
        let mut slots = [backend.open_slot(SlotSpec {
            context_pages: (0..(context_len + per_pass).div_ceil(PAGE_LEN) as u32).collect(),
            context_len: context_len + per_pass,
            tail_pages: Vec::new(),
            num_steps: 0,
            start_token: 0,
        })?];
        let mut found = Vec::new();
        for pass in passes {
            let is_context = pass.start < context_len;
            // Candidates take the places behind the context, those of every pass the same.
            let first = if is_context { pass.start } else { context_len };
            let chunk = first..first + pass.len();
            let chunks = std::slice::from_ref(&chunk);
            let mut batch = Batch::new(memory, chunks, &mut slots);
            self.rows.write(backend, rows, pass, &mut batch, s);
            for (index, block) in self.blocks.iter().enumerate() {
                let input = StuInput {
                    first_targets: &[context_len],
                    divisors: &[divisor],
                    seconds: &[],
                    // Nothing reads the context's rows behind the last block.
                    is_kept_alone: is_context && index + 1 == self.blocks.len(),
                };
                block.forward(backend, &self.block, index, &input, &mut batch, s);
            }
            if !is_context {
                found.extend(backend.download(&s.residual)?);
            }
        }
        Ok(found)
    }
}

impl<B: Backend> ScoreNetwork<B> for DlrmHstu<B> {
    fn spec(&self) -> &ScoreSpec {
        &self.spec
    }

    fn score(
        &self,
        backend: &B,
        memory: &B::Memory,
        request: &ScoreRequest<'_>,
        s: &mut Activations<B>,
    ) -> Result<Vec<f32>> {
        let rows = self.rows.build(backend, request, s)?;
        let attended = self.attended(backend, memory, &rows, s)?;
        let users = self.post.apply(backend, attended, self.columns, rows.time, s)?;
        let item_columns = self.rows.item_columns();
        self.items.apply(backend, &backend.upload(&rows.items, item_columns), s);
        let items = backend.download(&s.hidden)?;
        let products: Vec<f32> = users.iter().zip(items).map(|(user, item)| user * item).collect();
        self.head.apply(backend, &backend.upload(&products, self.columns), s);
        backend.take_failure()?;
        let mut scores = backend.download(&s.hidden)?;
        for scores in scores.chunks_exact_mut(self.spec.tasks.len()) {
            for (score, task) in scores.iter_mut().zip(&self.spec.tasks) {
                if task.is_probability {
                    *score = 1.0 / (1.0 + (-*score).exp());
                }
            }
        }
        match scores.iter().all(|score| score.is_finite()) {
            true => Ok(scores),
            false => Err(Error::NonFiniteScores { step: 0 }),
        }
    }
}

impl<B: Backend> Post<B> {
    fn load(backend: &B, weights: &mut Weights, columns: usize) -> Result<Post<B>> {
        let name = format!("{TRANSDUCER}_output_postprocessor.");
        let combine = format!("{name}_time_feature_combiner");
        let clock = match weights.contains(&format!("{combine}.weight")) {
            false => None,
            true => {
                let [_, wide] = matrix_shape(weights, &format!("{combine}.weight"))?;
                let periods = wide.saturating_sub(columns) / 2;
                let mut take = |buffer: &str, published: [f32; 2]| {
                    let buffer = format!("{name}{buffer}");
                    match weights.contains(&buffer) {
                        true => Ok(weights.take(&buffer, &[1, periods])?.to_vec()),
                        false => Ok(published[..periods.min(2)].to_vec()),
                    }
                };
                // The hour of the day and the day of the week, where nothing says otherwise.
                let units = take("_period_units", [3600.0, 86400.0])?;
                let counts = take("_units_per_period", [24.0, 7.0])?;
                let periods: Vec<[f32; 2]> =
                    units.into_iter().zip(counts).map(|(unit, count)| [unit, count]).collect();
                let shape = [columns, columns + 2 * periods.len()];
                Some(Clock { combine: linear(backend, weights, &combine, shape)?, periods })
            }
        };
        let norm = format!("{name}_layer_norm");
        let norm = match weights.contains(&format!("{norm}.weight")) {
            true => PostNorm::Layer(weighted(backend, weights, &norm, columns)?),
            false => {
                let weight = vec![(columns as f64).powf(-0.5) as f32; columns];
                PostNorm::Length(backend.vector(&[Tensor::new(&[columns], weight)])?)
            }
        };
        Ok(Post { clock, norm })
    }

    fn apply(
        &self,
        backend: &B,
        rows: Vec<f32>,
        columns: usize,
        time: i64,
        s: &mut Activations<B>,
    ) -> Result<Vec<f32>> {
        match &self.clock {
            None => s.last = backend.upload(&rows, columns),
            Some(clock) => {
                let features = clock.features(time);
                let wide: Vec<f32> =
                    rows.chunks_exact(columns).flat_map(|row| [row, &features].concat()).collect();
                let wide = backend.upload(&wide, columns + features.len());
                clock.combine.apply(backend, &wide, Epilogue::Store, &mut s.last);
            }
        }
        match &self.norm {
            PostNorm::Layer(norm) => {
                backend.layer_norm(&s.last, Some(norm.affine()), OUTER_EPSILON, &mut s.hidden);
            }
            PostNorm::Length(weight) => backend.rms_norm(&s.last, weight, 1e-30, &mut s.hidden),
        }
        backend.download(&s.hidden)
    }
}

impl<B: Backend> Clock<B> {
    /// Cosine and sine of how far each period has come, in f32 and with the published 3.14.
    #[allow(clippy::approx_constant)] // it is what the training took
    fn features(&self, time: i64) -> Vec<f32> {
        let angle = |[unit, count]: [f32; 2]| {
            ((time as f32 / unit).floor().rem_euclid(count) / count) * 2.0 * 3.14
        };
        self.periods.iter().flat_map(|&period| [angle(period).cos(), angle(period).sin()]).collect()
    }
}

fn read_divisor(config: &Config) -> Result<Divisor> {
    let wrong = "\"attention_divisor\" must be what the attention's weights are divided by: the length \
                 that sequences were padded to in the training, or \"own_length\"";
    match config.given("attention_divisor") {
        Some(value) if value.as_str() == Some("own_length") => Ok(Divisor::OwnLength),
        Some(_) => Ok(Divisor::Number(config.number_or("attention_divisor", 1.0)? as f32)),
        None => Err(config.error(wrong.into())),
    }
}

fn read_tasks(config: &Config) -> Result<Vec<Task>> {
    let form = || {
        config.error(
            "\"tasks\" must list what the network says of a candidate, probabilities first, as in the \
             training: [{\"name\": \"click\", \"kind\": \"probability\"}, {\"name\": \"seconds\", \
             \"kind\": \"value\"}]"
                .into(),
        )
    };
    let tasks = config.given("tasks").and_then(|tasks| tasks.as_array()).ok_or_else(form)?;
    let task = |task: &serde_json::Value| {
        let is_probability = match task.get("kind").and_then(|kind| kind.as_str()) {
            None | Some("probability") => true,
            Some("value") => false,
            _ => return None,
        };
        Some(Task { name: task.get("name")?.as_str()?.to_string(), is_probability })
    };
    let tasks = tasks.iter().map(task).collect::<Option<Vec<Task>>>().ok_or_else(form)?;
    match tasks.is_empty() || !tasks.is_sorted_by_key(|task| !task.is_probability) {
        true => Err(form()),
        false => Ok(tasks),
    }
}

fn read_block(
    config: &Config,
    weights: &Weights,
    columns: usize,
    num_heads: usize,
) -> Result<(Uvqk, StuSpec)> {
    let (name, out) = (format!("{BLOCKS}0._uvqk_weight"), format!("{BLOCKS}0._output_weight"));
    let [_, all] = matrix_shape(weights, &name)?;
    let [wide, _] = matrix_shape(weights, &out)?;
    let values = wide / 3;
    let is_whole = wide.is_multiple_of(3 * num_heads)
        && all > 2 * values
        && (all - 2 * values).is_multiple_of(2 * num_heads);
    if !is_whole {
        return Err(config.error(format!(
            "{num_heads} heads do not fit {name:?} of {columns} x {all} and {out:?} of {wide} x {columns}"
        )));
    }
    let (key_dim, value_dim) = ((all - 2 * values) / 2 / num_heads, values / num_heads);
    let uvqk = Uvqk { num_heads, key_dim, value_dim };
    let mask = TargetMask {
        num_contextual: config.size_or_zero("contextual_seq_len", 0)?,
        max_distance: config.size_if_given("max_attn_len")?,
        num_unlimited: config.size_or_zero("min_full_attn_seq_len", 0)?,
        group_size: config.size_or("target_group_size", 1)?,
    };
    if mask.group_size > ROWS_PER_PASS {
        return Err(config.error(format!("\"target_group_size\" is above {ROWS_PER_PASS}")));
    }
    let norms = weights.num_rows(&format!("{BLOCKS}0._output_norm_weight")).unwrap_or(0);
    let scale = (key_dim as f64).powf(-0.5);
    let block = StuSpec {
        heads: uvqk.heads(),
        value_dim,
        scale: config.number_or("attn_alpha", scale)? as f32,
        mask,
        epsilon: EPSILON,
        qkv_epilogue: Epilogue::Store,
        gate_epilogue: Epilogue::Activate(Activation::Silu),
        is_by_head: norms == num_heads && values != num_heads,
        output: GatedOutput::WithInput,
        thresholds: Vec::new(),
    };
    Ok((uvqk, block))
}

fn load_block<B: Backend>(
    backend: &B,
    weights: &mut Weights,
    layer: usize,
    columns: usize,
    uvqk: Uvqk,
    block: &StuSpec,
) -> Result<Stu<B>> {
    let name = format!("{BLOCKS}{layer}.");
    let values = uvqk.num_heads * uvqk.value_dim;
    let matrix = weights.take(&format!("{name}_uvqk_weight"), &[columns, uvqk.columns()])?;
    let beta = weights.take(&format!("{name}_uvqk_beta"), &[uvqk.columns()])?;
    let beta = Tensor::new(&[1, uvqk.columns()], beta.to_vec());
    let out = weights.take(&format!("{name}_output_weight"), &[3 * values, columns])?;
    let norms = if block.is_by_head { uvqk.num_heads } else { values };
    let mut norm = |part: &str, len: usize| {
        Ok::<_, Error>(Weighted {
            scale: backend.vector(&[weights.take(&format!("{name}{part}_weight"), &[len])?])?,
            shift: backend.vector(&[weights.take(&format!("{name}{part}_bias"), &[len])?])?,
        })
    };
    let gate = flat(&uvqk.gate(&beta));
    Ok(Stu {
        input_norm: Some(norm("_input_norm", columns)?),
        output_norm: Some(norm("_output_norm", norms)?),
        qkv: Projection {
            weight: backend.matrix(&uvqk.qkv(&matrix))?,
            bias: Some(backend.vector(&uvqk.qkv(&beta).each_ref().map(flat))?),
        },
        gate: Projection {
            weight: backend.matrix(&[uvqk.gate(&matrix)])?,
            bias: Some(backend.vector(&[gate])?),
        },
        out: Projection { weight: backend.matrix(&[transposed(&out)])?, bias: None },
        bias: None,
    })
}

/// Whether a tensor of the published checkpoints says nothing that is not said otherwise: a network of
/// no features, and what actions are, which the configuration says.
pub(super) fn is_spare(name: &str) -> bool {
    name.contains("_additional_embedding_mlp") || name.ends_with("_combined_action_weights")
}

/// A matrix with rows and columns exchanged.
fn transposed(matrix: &Tensor) -> Tensor {
    let [rows, columns] = [matrix.shape()[0], matrix.shape()[1]];
    let values = matrix.to_vec();
    let at = |index: usize| values[index % rows * columns + index / rows];
    Tensor::new(&[columns, rows], (0..values.len()).map(at).collect())
}
