//! Attention of beams: a query head of a slot at a time, its beams in tiles.
//!
//! The context is the beams' in common, so their products with it are matrix products; each beam's
//! tail is its own and found row by row through its ancestors. One softmax covers both.

use std::ops::Deref;

use rayon::prelude::*;
use rten_simd::functional::simd_map;
use rten_simd::ops::{BitOps, NumOps};
use rten_simd::{Isa, SimdIterable, SimdOp};

use super::context::{HeadContext, QUERIES_PER_TILE, Queries};
use super::matmul::split_columns;
use super::memory::PageLayout;
use super::scratch::Scratch;
use super::softmax::{ExpSum, Largest};
use super::{Buffer, CpuBackend, Slot};
use crate::backend::{AttendBeams, AttentionSpec, Batch, BeamAttention, Heads, KvScope, ScoreRule};
use crate::pages::TAIL_PAGE_LEN;

impl AttendBeams for CpuBackend {
    fn attend_beams(
        &self,
        layer: usize,
        queries: &Buffer,
        attention: &BeamAttention<'_, CpuBackend>,
        batch: &Batch<'_, CpuBackend>,
        out: &mut Buffer,
    ) {
        let AttentionSpec { heads, score_rule: ScoreRule::Softmax, scope, scale, bias } =
            *attention;
        let query_dim = heads.query_dim();
        out.reshape(queries.num_rows(), query_dim);
        let pages = |slot: &Slot| {
            let (context, tail) = match scope {
                KvScope::Tail => (&[][..], slot.tail_pages()),
                KvScope::Context => (&slot.spec.context_pages[..], &[][..]),
                KvScope::Both => (&slot.spec.context_pages[..], slot.tail_pages()),
            };
            (batch.memory.context_pages(context), batch.memory.tail_pages(tail))
        };
        let pages: Vec<_> = batch.beams().iter().map(pages).collect();
        let mut heads_of_slots = Vec::new();
        let mut first_row = batch.num_prompt_rows();
        let mut rest = &mut out.values[first_row * query_dim..];
        for (slot, (context_pages, tail_pages)) in batch.beams().iter().zip(&pages) {
            let num_rows = slot.beams.len();
            let (rows, after) = rest.split_at_mut(num_rows * query_dim);
            rest = after;
            for (head, out) in
                split_columns(rows, query_dim, heads.head_dim()).into_iter().enumerate()
            {
                let bias = bias.map(|bias| {
                    let row = bias.len() / heads.num_heads;
                    &bias[head * row..(head + 1) * row]
                });
                let tail = Tail { slot, pages: tail_pages, layout: &batch.memory.layout, layer };
                let attention =
                    HeadAttention { queries, heads, head, first_row, scale, bias, tail };
                heads_of_slots.push((attention, context_pages, out));
            }
            first_row += num_rows;
        }
        heads_of_slots.into_par_iter().for_each_init(
            HeadScratch::new,
            |scratch, (attention, pages, mut out)| {
                let context_len = match scope {
                    KvScope::Tail => 0,
                    _ => attention.tail.slot.spec.context_len,
                };
                let (layout, kv_head) = (&batch.memory.layout, attention.kv_head());
                let context = HeadContext::new(pages, context_len, layout, layer, kv_head);
                for (tile, out) in out.chunks_mut(QUERIES_PER_TILE).enumerate() {
                    self.count_flops(2 * out.len(), heads.head_dim(), context_len);
                    let first = tile * QUERIES_PER_TILE;
                    attention.attend(first, &context, context_len, scope, scratch, out);
                }
            },
        );
    }
}

struct HeadScratch {
    scores: Scratch,
    tail_scores: Scratch,
}

impl HeadScratch {
    fn new() -> HeadScratch {
        HeadScratch { scores: Scratch::new(0), tail_scores: Scratch::new(0) }
    }
}

/// The attention of one query head of one slot.
struct HeadAttention<'a, P> {
    queries: &'a Buffer,
    heads: Heads,
    head: usize,
    first_row: usize,
    scale: f32,
    /// By distance back.
    bias: Option<&'a [f32]>,
    tail: Tail<'a, P>,
}

/// The tails of one slot in a layer.
struct Tail<'a, P> {
    slot: &'a Slot,
    pages: &'a [P],
    layout: &'a PageLayout,
    layer: usize,
}

impl<'a, P: Deref<Target = Vec<f32>>> Tail<'a, P> {
    /// The keys and values of a beam and its ancestors, position by position.
    fn of_beam(&self, beam: usize) -> impl Iterator<Item = (&'a [f32], &'a [f32])> {
        let Tail { slot, pages, layout, layer } = *self;
        let rows = slot.beams.ancestors_of(beam).iter().copied().chain(Some(beam as u32));
        slot.positions.iter().zip(rows).map(move |(position, row)| {
            let row = position.row + row as usize;
            let page = &pages[position.page + row / TAIL_PAGE_LEN];
            layout.tail_row(page, layer, row % TAIL_PAGE_LEN)
        })
    }
}

impl<'a, P: Deref<Target = Vec<f32>>> HeadAttention<'a, P> {
    fn kv_head(&self) -> usize {
        self.head / (self.heads.num_heads / self.heads.num_kv_heads)
    }

    fn query(&self, beam: usize) -> &'a [f32] {
        let head_dim = self.heads.head_dim();
        &self.queries.row(self.first_row + beam)[self.head * head_dim..][..head_dim]
    }

    /// The beams from `first` on, one a row of `out`.
    fn attend(
        &self,
        first: usize,
        context: &HeadContext<'_>,
        context_len: usize,
        scope: KvScope,
        scratch: &mut HeadScratch,
        out: &mut [&mut [f32]],
    ) {
        let HeadScratch { scores, tail_scores } = scratch;
        let num_rows = out.len();
        let columns = self.queries.num_columns();
        let first_value = (self.first_row + first) * columns + self.head * self.heads.head_dim();
        let queries = Queries {
            values: &self.queries.values[first_value..],
            stride: columns,
            rows: num_rows,
        };
        scores.resize(num_rows * context_len);
        context.scores(queries, context_len, scores);
        scores.iter_mut().for_each(|score| *score *= self.scale);
        let tail_len = match scope {
            KvScope::Context => 0,
            _ => self.tail.slot.positions.len(),
        };
        tail_scores.resize(num_rows * tail_len);
        TailScores { attention: self, first, scores: tail_scores }.dispatch();

        // One softmax over context and tail together; the division by its sum comes last.
        let mut sums = [0.0; QUERIES_PER_TILE];
        for (row, out_sum) in sums[..num_rows].iter_mut().enumerate() {
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
        match context_len {
            0 => out.iter_mut().for_each(|row| row.fill(0.0)),
            _ => context.weigh(scores, context_len, out),
        }
        AddTail { attention: self, first, weights: tail_scores, sums: &sums, out }.dispatch();
    }

    /// The columns of this head in a row of keys or values.
    fn columns(&self) -> std::ops::Range<usize> {
        let first = self.kv_head() * self.heads.head_dim();
        first..first + self.heads.head_dim()
    }
}

/// `scores`: `[rows, tail_len]`, the scaled and biased products of queries and tail keys.
struct TailScores<'a, P> {
    attention: &'a HeadAttention<'a, P>,
    first: usize,
    scores: &'a mut [f32],
}

impl<P: Deref<Target = Vec<f32>>> SimdOp for TailScores<'_, P> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let ops = isa.f32();
        let Self { attention, first, scores } = self;
        if scores.is_empty() {
            return;
        }
        let tail_len = attention.tail.slot.positions.len();
        let columns = attention.columns();
        for (beam, scores) in (first..).zip(scores.chunks_exact_mut(tail_len)) {
            let query = attention.query(beam);
            let tail = attention.tail.of_beam(beam);
            for (position, (score, (keys, _))) in scores.iter_mut().zip(tail).enumerate() {
                let mut keys = keys[columns.clone()].simd_iter_pad(ops);
                let products = query.simd_iter(ops).fold(
                    ops.zero(),
                    #[inline(always)]
                    |sum, q| ops.mul_add(q, keys.next().expect("as long as the query"), sum),
                );
                let back = tail_len - 1 - position;
                let bias = attention.bias.map_or(0.0, |bias| bias[back.min(bias.len() - 1)]);
                *score = ops.sum(products) * attention.scale + bias;
            }
        }
    }
}

/// `out[r] = (out[r] + sum over the tail of weight * value) / sums[r]`
struct AddTail<'a, 'out, P> {
    attention: &'a HeadAttention<'a, P>,
    first: usize,
    weights: &'a [f32],
    sums: &'a [f32],
    out: &'a mut [&'out mut [f32]],
}

impl<P: Deref<Target = Vec<f32>>> SimdOp for AddTail<'_, '_, P> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let ops = isa.f32();
        let Self { attention, first, weights, sums, out } = self;
        let tail_len = weights.len() / out.len();
        let columns = attention.columns();
        for (row, out) in out.iter_mut().enumerate() {
            let weights = &weights[row * tail_len..(row + 1) * tail_len];
            let tail = attention.tail.of_beam(first + row);
            for (&weight, (_, values)) in weights.iter().zip(tail) {
                let mut values = values[columns.clone()].simd_iter_pad(ops);
                let weight = ops.splat(weight);
                simd_map(
                    ops,
                    &mut **out,
                    #[inline(always)]
                    |x| ops.mul_add(weight, values.next().expect("as long as the output"), x),
                );
            }
            let share = ops.splat(1.0 / sums[row]);
            simd_map(
                ops,
                &mut **out,
                #[inline(always)]
                |x| ops.mul(x, share),
            );
        }
    }
}
