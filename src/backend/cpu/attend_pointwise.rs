//! Attention of prompts whose weights are no distribution: a tile of rows at a time, all heads of it.

use std::ops::Range;

use rayon::prelude::*;
use rten_simd::functional::simd_map;
use rten_simd::ops::{BitOps, FloatOps, NumOps};
use rten_simd::{Isa, SimdOp, SimdUnaryOp};
use rten_vecmath::Exp;

use super::context::{HeadContext, QUERIES_PER_TILE, Queries};
use super::scratch::Scratch;
use super::{Buffer, CpuBackend};
use crate::backend::{AttendPointwise, Batch, PointwiseAttention, PositionTimeBias, Seen};

impl AttendPointwise for CpuBackend {
    fn attend_pointwise(
        &self,
        set: usize,
        queries: &Buffer,
        attention: &PointwiseAttention<'_, CpuBackend>,
        batch: &Batch<'_, CpuBackend>,
        out: &mut Buffer,
    ) {
        let heads = attention.heads;
        assert_eq!(heads.num_heads, heads.num_kv_heads, "a key head for each query head");
        let out_dim = heads.out_dim();
        out.reshape(queries.num_rows(), out_dim);
        let layout = &batch.memory.layout;
        let pages: Vec<_> = batch
            .prompts()
            .map(|(_, slot)| batch.memory.context_pages(&slot.spec.context_pages))
            .collect();
        let mut contexts: Vec<Vec<HeadContext<'_>>> = Vec::new();
        for (prompt, (chunk, pages)) in batch.chunks.iter().zip(&pages).enumerate() {
            let end = reach(attention, prompt, chunk);
            let of_head = |head| HeadContext::new(pages, end, layout, set, head);
            contexts.push((0..heads.num_heads).map(of_head).collect());
        }
        let mut tiles = Vec::new();
        let (mut rest, mut first_row) = (&mut out.values[..], 0);
        for (prompt, (chunk, _)) in batch.prompts().enumerate() {
            let (rows, after) = rest.split_at_mut(chunk.len() * out_dim);
            rest = after;
            for (tile, out) in rows.chunks_mut(QUERIES_PER_TILE * out_dim).enumerate() {
                let first = tile * QUERIES_PER_TILE;
                let count = out.len() / out_dim;
                let positions = chunk.start + first..chunk.start + first + count;
                let at = Tile { prompt, chunk: chunk.clone(), first_row, positions };
                tiles.push((at, out));
            }
            first_row += chunk.len();
        }
        tiles.into_par_iter().for_each_init(
            || (Scratch::default(), Scratch::default()),
            |(scores, biases), (tile, out)| {
                let reach = reach(attention, tile.prompt, &tile.positions);
                self.count_flops(
                    2 * tile.positions.len() * heads.num_heads,
                    heads.head_dim(),
                    reach,
                );
                attend(
                    queries,
                    attention,
                    &contexts[tile.prompt],
                    &tile,
                    reach,
                    scores,
                    biases,
                    out,
                );
            },
        );
    }
}

/// Some rows of a prompt.
struct Tile {
    /// The prompt's number.
    prompt: usize,
    /// The positions of the prompt that the batch reads.
    chunk: Range<usize>,
    /// The row of the first of them.
    first_row: usize,
    /// The positions of the tile.
    positions: Range<usize>,
}

/// The end of the stored positions that some positions see together.
fn reach(
    attention: &PointwiseAttention<'_, CpuBackend>,
    prompt: usize,
    positions: &Range<usize>,
) -> usize {
    let first_target = attention.first_targets[prompt];
    match positions.start < attention.mask.num_contextual {
        true => first_target,
        false => positions.end.min(first_target),
    }
}

/// The attention of a tile, of all heads; `out`: `[rows, out_dim]`.
#[allow(clippy::too_many_arguments)] // two of them are scratch memory
fn attend(
    queries: &Buffer,
    attention: &PointwiseAttention<'_, CpuBackend>,
    contexts: &[HeadContext<'_>],
    tile: &Tile,
    reach: usize,
    scores: &mut Scratch,
    biases: &mut Scratch,
    out: &mut [f32],
) {
    let heads = attention.heads;
    let (head_dim, columns) = (heads.head_dim(), queries.num_columns());
    let num_rows = tile.positions.len();
    let first_target = attention.first_targets[tile.prompt];
    let seen: Vec<Seen> =
        tile.positions.clone().map(|at| attention.mask.seen(at, first_target)).collect();
    let row_of = |position: usize| tile.first_row + position - tile.chunk.start;
    biases.resize(num_rows * reach);
    if let Some(bias) = &attention.bias {
        for ((position, seen), biases) in
            tile.positions.clone().zip(&seen).zip(biases.chunks_exact_mut(reach.max(1)))
        {
            write_biases(bias, tile.prompt, position, seen.before.clone(), biases);
        }
    }
    let scale = attention.scale;
    let share = 1.0 / attention.divisors[tile.prompt];
    for (head, context) in contexts.iter().enumerate() {
        let first_value = row_of(tile.positions.start) * columns + head * head_dim;
        let of_head =
            Queries { values: &queries.values[first_value..], stride: columns, rows: num_rows };
        scores.resize(num_rows * reach);
        context.scores(of_head, reach, scores);
        for (row, (scores, seen)) in scores.chunks_exact_mut(reach.max(1)).zip(&seen).enumerate() {
            let Range { start, end } = seen.before;
            scores[..start].fill(0.0);
            scores[end..].fill(0.0);
            let values = &mut scores[start..end];
            let biases = attention.bias.as_ref().map(|_| &biases[row * reach..][start..end]);
            SiluScores { values, biases, scale, share }.dispatch();
        }
        let mut of_head: Vec<&mut [f32]> = out
            .chunks_exact_mut(heads.out_dim())
            .map(|row| &mut row[head * head_dim..(head + 1) * head_dim])
            .collect();
        match reach {
            0 => of_head.iter_mut().for_each(|out| out.fill(0.0)),
            _ => context.weigh(scores, reach, &mut of_head),
        }
        for ((position, seen), out) in tile.positions.clone().zip(&seen).zip(of_head) {
            let targets = seen.targets.clone();
            assert!(
                targets.is_empty() || targets.start >= tile.chunk.start,
                "a group of targets is read as a whole"
            );
            let query = &queries.row(row_of(position))[head * head_dim..(head + 1) * head_dim];
            for target in targets {
                let row = queries.row(row_of(target));
                let key = &row[heads.query_dim() + head * head_dim..][..head_dim];
                let value = &row[heads.query_dim() + heads.keys_dim() + head * head_dim..];
                let product = query.iter().zip(key).map(|(query, key)| query * key).sum::<f32>();
                let bias = attention.bias.as_ref();
                let bias = bias.map_or(0.0, |bias| bias_of(bias, tile.prompt, position, target));
                let score = product * scale + bias;
                let weight = score / (1.0 + (-score).exp()) * share;
                out.iter_mut().zip(value).for_each(|(out, value)| *out += weight * value);
            }
        }
    }
}

/// The biases of the positions that a position sees, at their places in `biases`.
fn write_biases(
    bias: &PositionTimeBias<'_, CpuBackend>,
    prompt: usize,
    position: usize,
    seen: Range<usize>,
    biases: &mut [f32],
) {
    let longest = bias.positions.len().div_ceil(2);
    let by_position = &bias.positions[longest - 1 + seen.start - position..];
    let seconds = &bias.seconds[prompt];
    let following = seconds[position + 1];
    let biases = biases[seen.clone()].iter_mut();
    for ((to, by_position), &time) in biases.zip(by_position).zip(&seconds[seen]) {
        let bucket = bucket(bias.thresholds, following.abs_diff(time));
        *to = by_position + bias.times[bucket];
    }
}

/// The bias of one position that a position sees.
fn bias_of(
    bias: &PositionTimeBias<'_, CpuBackend>,
    prompt: usize,
    position: usize,
    key: usize,
) -> f32 {
    let longest = bias.positions.len().div_ceil(2);
    let seconds = &bias.seconds[prompt];
    let bucket = bucket(bias.thresholds, seconds[position + 1].abs_diff(seconds[key]));
    bias.positions[longest - 1 + key - position] + bias.times[bucket]
}

/// How many thresholds a time between two positions has reached.
fn bucket(thresholds: &[u64], seconds: u64) -> usize {
    thresholds.partition_point(|&threshold| threshold <= seconds)
}

/// Scores become weights: `silu(scale * score + bias) * share`.
struct SiluScores<'a> {
    values: &'a mut [f32],
    biases: Option<&'a [f32]>,
    scale: f32,
    share: f32,
}

impl SimdOp for SiluScores<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let SiluScores { values, biases, scale, share } = self;
        match biases {
            None => values.iter_mut().for_each(|value| *value *= scale),
            Some(biases) => {
                values
                    .iter_mut()
                    .zip(biases)
                    .for_each(|(value, bias)| *value = *value * scale + bias);
            }
        }
        let ops = isa.f32();
        let share = ops.splat(share);
        simd_map(
            ops,
            values,
            #[inline(always)]
            |x| {
                let exponential = Exp::apply(isa, ops.neg(x));
                ops.mul(ops.div(x, ops.add(ops.one(), exponential)), share)
            },
        );
    }
}
