use rayon::prelude::*;
use rten_simd::functional::simd_map;
use rten_simd::ops::{BitOps, NumOps};
use rten_simd::{Isa, SimdIterable, SimdOp};
use rten_tensor::NdTensorView;

use super::attend_prefill::scatter_heads;
use super::scratch::Scratch;
use super::slot::{Beams, Tail};
use super::softmax::{ExpSum, Largest};
use super::{Buffer, CpuBackend, Heads, Reach, Slot};

impl CpuBackend {
    pub(super) fn attend_beams(
        &self,
        layer: usize,
        queries: &Buffer,
        heads: Heads,
        reach: Reach,
        scale: f32,
        tail_bias: Option<&[f32]>,
        slots: &[Slot],
        out: &mut Buffer,
    ) {
        let (query_dim, head_dim) = (heads.query_dim(), heads.head_dim);
        out.reshape(queries.num_rows(), query_dim);
        let mut by_head = Scratch::new(out.values.len());
        let mut first_row = 0;
        for slot in slots {
            let num_rows = slot.beams.len();
            if num_rows == 0 {
                continue;
            }
            let block = &mut by_head[first_row * query_dim..][..num_rows * query_dim];
            block.par_chunks_mut(num_rows * head_dim).enumerate().for_each_init(
                HeadScratch::new,
                |scratch, (head, out)| {
                    let bias = tail_bias.map(|bias| {
                        let row = bias.len() / heads.num_heads;
                        &bias[head * row..(head + 1) * row]
                    });
                    let attention =
                        HeadAttention { layer, queries, heads, head, first_row, scale, bias, slot };
                    self.attend_beams_head(&attention, reach, scratch, out);
                },
            );
            let out = &mut out.values[first_row * query_dim..][..num_rows * query_dim];
            scatter_heads(block, heads, out);
            first_row += num_rows;
        }
    }

    fn attend_beams_head(
        &self,
        attention: &HeadAttention<'_>,
        reach: Reach,
        scratch: &mut HeadScratch,
        out: &mut [f32],
    ) {
        let HeadAttention { layer, queries, heads, head, first_row, scale, slot, .. } = *attention;
        let head_dim = heads.head_dim;
        let num_rows = out.len() / head_dim;
        let HeadScratch { scores, tail_scores, sums } = scratch;
        let queries =
            queries.view(first_row..first_row + num_rows, head * head_dim..(head + 1) * head_dim);
        let context = match reach {
            Reach::Tail => None,
            _ => Some(&slot.contexts[layer][head / (heads.num_heads / heads.num_kv_heads)]),
        };
        let context_len = context.map_or(0, |_| slot.spec.context_len);
        scores.resize(num_rows * context_len);
        if let Some(context) = context {
            self.product(queries, context.keys(), scale, scores);
        }
        let tail_len = match reach {
            Reach::Context => 0,
            _ => slot.tails[layer].positions.len(),
        };
        tail_scores.resize(num_rows * tail_len);
        TailScores { attention, tail: &slot.tails[layer], scores: tail_scores }.dispatch();

        // One softmax over context and tail together; the division by its sum comes last.
        sums.resize(num_rows);
        for (row, out_sum) in sums.iter_mut().enumerate() {
            let context = &mut scores[row * context_len..(row + 1) * context_len];
            let tail = &mut tail_scores[row * tail_len..(row + 1) * tail_len];
            let largest = tail.iter().fold(Largest(context).dispatch(), |a, &b| a.max(b));
            let mut sum = ExpSum { values: context, offset: largest }.dispatch();
            for score in tail {
                *score = (*score - largest).exp();
                sum += *score;
            }
            *out_sum = sum;
        }
        if let Some(context) = context {
            let weights = NdTensorView::from_data([num_rows, context_len], &scores[..]);
            self.product(weights, context.values(), 1.0, out);
        } else {
            out.fill(0.0);
        }
        let tail = &slot.tails[layer];
        AddTail { attention, tail, weights: tail_scores, sums, out }.dispatch();
    }
}

struct HeadScratch {
    scores: Scratch,
    tail_scores: Scratch,
    sums: Scratch,
}

impl HeadScratch {
    fn new() -> HeadScratch {
        HeadScratch { scores: Scratch::new(0), tail_scores: Scratch::new(0), sums: Scratch::new(0) }
    }
}

/// The attention of one query head of one slot.
#[derive(Clone, Copy)]
struct HeadAttention<'a> {
    layer: usize,
    queries: &'a Buffer,
    heads: Heads,
    head: usize,
    first_row: usize,
    scale: f32,
    /// By distance back.
    bias: Option<&'a [f32]>,
    slot: &'a Slot,
}

impl<'a> HeadAttention<'a> {
    fn query(&self, row: usize) -> &'a [f32] {
        let head_dim = self.heads.head_dim;
        &self.queries.row(self.first_row + row)[self.head * head_dim..][..head_dim]
    }

    /// Where a KV row of the tail that belongs to this head lies: row `row` of position `position`.
    fn kv<'t>(&self, matrix: &'t [f32], row: u32) -> &'t [f32] {
        let Heads { num_heads, num_kv_heads, head_dim } = self.heads;
        let kv_head = self.head / (num_heads / num_kv_heads);
        &matrix[row as usize * self.heads.kv_dim() + kv_head * head_dim..][..head_dim]
    }
}

/// The row of each position of a beam's tail: its ancestors', then its own.
fn tail_rows(beams: &Beams, beam: usize) -> impl Iterator<Item = u32> {
    beams.ancestors_of(beam).iter().copied().chain(std::iter::once(beam as u32))
}

/// `scores`: `[rows, tail_len]`, the scaled and biased products of queries and tail keys.
struct TailScores<'a> {
    attention: &'a HeadAttention<'a>,
    tail: &'a Tail,
    scores: &'a mut [f32],
}

impl SimdOp for TailScores<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let ops = isa.f32();
        let Self { attention, tail, scores } = self;
        if scores.is_empty() {
            return;
        }
        let tail_len = tail.positions.len();
        for (row, scores) in scores.chunks_exact_mut(tail_len).enumerate() {
            let query = attention.query(row);
            let rows = tail_rows(&attention.slot.beams, row);
            for (position, (score, tail_row)) in scores.iter_mut().zip(rows).enumerate() {
                let key = attention.kv(&tail.positions[position].0, tail_row);
                let mut keys = key.simd_iter_pad(ops);
                let products = query.simd_iter(ops).fold(
                    ops.zero(),
                    #[inline(always)]
                    |sum, q| ops.mul_add(q, keys.next().expect("as long as the query"), sum),
                );
                let bias = attention.bias.map_or(0.0, |bias| bias[tail_len - 1 - position]);
                *score = ops.sum(products) * attention.scale + bias;
            }
        }
    }
}

/// `out[r] = (out[r] + sum over the tail of weight * value) / sums[r]`
struct AddTail<'a> {
    attention: &'a HeadAttention<'a>,
    tail: &'a Tail,
    weights: &'a [f32],
    sums: &'a [f32],
    out: &'a mut [f32],
}

impl SimdOp for AddTail<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let ops = isa.f32();
        let Self { attention, tail, weights, sums, out } = self;
        let tail_len = weights.len() / sums.len();
        for (row, out) in out.chunks_exact_mut(attention.heads.head_dim).enumerate() {
            let weights = &weights[row * tail_len..(row + 1) * tail_len];
            let rows = tail_rows(&attention.slot.beams, row);
            for (position, (&weight, tail_row)) in weights.iter().zip(rows).enumerate() {
                let value = attention.kv(&tail.positions[position].1, tail_row);
                let mut values = value.simd_iter_pad(ops);
                let weight = ops.splat(weight);
                simd_map(
                    ops,
                    &mut *out,
                    #[inline(always)]
                    |x| ops.mul_add(weight, values.next().expect("as long as the output"), x),
                );
            }
            let share = ops.splat(1.0 / sums[row]);
            simd_map(
                ops,
                out,
                #[inline(always)]
                |x| ops.mul(x, share),
            );
        }
    }
}
