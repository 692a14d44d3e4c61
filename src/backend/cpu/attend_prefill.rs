//! Attention of prompts: a query head of a chunk at a time, its rows in tiles.

use rayon::prelude::*;
use rten_simd::SimdOp;

use super::context::{HeadContext, QUERIES_PER_TILE, Queries};
use super::matmul::split_columns;
use super::scratch::Scratch;
use super::softmax::{ExpSum, Largest};
use super::{Buffer, CpuBackend};
use crate::backend::{
    AttendPrefill, AttentionSpec, Batch, Heads, Mask, PrefillAttention, ScoreRule,
};

impl AttendPrefill for CpuBackend {
    fn attend_prefill(
        &self,
        set: usize,
        queries: &Buffer,
        attention: &PrefillAttention<'_>,
        batch: &Batch<'_, CpuBackend>,
        out: &mut Buffer,
    ) {
        let AttentionSpec { heads, score_rule: ScoreRule::Softmax, scope: mask, scale, bias } =
            *attention;
        let query_dim = heads.query_dim();
        out.reshape(queries.num_rows(), query_dim);
        let longest = batch.prompts().map(|(_, slot)| slot.spec.context_len).max().unwrap_or(0);
        let pages: Vec<_> = batch
            .prompts()
            .map(|(_, slot)| batch.memory.context_pages(&slot.spec.context_pages))
            .collect();
        let mut all_heads = Vec::new();
        let (mut rest, mut first_row) = (&mut out.values[..], 0);
        for ((chunk, slot), pages) in batch.prompts().zip(&pages) {
            let (rows, after) = rest.split_at_mut(chunk.len() * query_dim);
            rest = after;
            let by_head = split_columns(rows, query_dim, heads.head_dim());
            for (head, out) in by_head.into_iter().enumerate() {
                let bias = bias.map(|bias| {
                    let row = 2 * longest - 1;
                    &bias[head * row..(head + 1) * row]
                });
                let attention = HeadAttention {
                    queries,
                    heads,
                    head,
                    first_row,
                    start: chunk.start,
                    end: match mask {
                        Mask::Causal => chunk.end,
                        Mask::Bidirectional => slot.spec.context_len,
                    },
                    mask,
                    scale,
                    bias,
                    longest,
                };
                all_heads.push((attention, pages, out));
            }
            first_row += chunk.len();
        }
        let layout = &batch.memory.layout;
        all_heads.into_par_iter().for_each_init(Scratch::default, |scores, task| {
            let (attention, pages, mut out) = task;
            let kv_head = attention.head / (heads.num_heads / heads.num_kv_heads);
            let context = HeadContext::new(pages, attention.end, layout, set, kv_head);
            for (tile, out) in out.chunks_mut(QUERIES_PER_TILE).enumerate() {
                let first = tile * QUERIES_PER_TILE;
                let reach = attention.reach(first + out.len());
                self.count_flops(2 * out.len(), heads.head_dim(), reach);
                attention.attend(first, reach, &context, scores, out);
            }
        });
    }
}

/// The attention of one query head over one chunk of a prompt.
struct HeadAttention<'a> {
    queries: &'a Buffer,
    heads: Heads,
    head: usize,
    /// The chunk's first row among all.
    first_row: usize,
    /// Its first position.
    start: usize,
    /// The end of what its rows see together.
    end: usize,
    mask: Mask,
    scale: f32,
    /// `[2 * longest - 1]` over key minus query position.
    bias: Option<&'a [f32]>,
    longest: usize,
}

impl HeadAttention<'_> {
    /// How many positions the first `rows` rows of the chunk see together.
    fn reach(&self, rows: usize) -> usize {
        match self.mask {
            Mask::Causal => self.start + rows,
            Mask::Bidirectional => self.end,
        }
    }

    /// The rows from `first` on, one a row of `out`.
    fn attend(
        &self,
        first: usize,
        reach: usize,
        context: &HeadContext<'_>,
        scores: &mut Scratch,
        out: &mut [&mut [f32]],
    ) {
        let columns = self.queries.num_columns();
        let first_value = (self.first_row + first) * columns + self.head * self.heads.head_dim();
        let queries = Queries {
            values: &self.queries.values[first_value..],
            stride: columns,
            rows: out.len(),
        };
        scores.resize(out.len() * reach);
        context.scores(queries, reach, scores);
        let mut sums = [0.0; QUERIES_PER_TILE];
        let rows = scores.chunks_exact_mut(reach).zip(&mut sums).enumerate();
        for (row, (scores, sum)) in rows {
            let (seen, unseen) = scores.split_at_mut(self.reach(first + row + 1));
            unseen.fill(0.0);
            seen.iter_mut().for_each(|score| *score *= self.scale);
            if let Some(bias) = self.bias {
                let bias = &bias[self.longest - 1 - (self.start + first + row)..];
                seen.iter_mut().zip(bias).for_each(|(score, bias)| *score += bias);
            }
            let largest = Largest(seen).dispatch();
            *sum = ExpSum { values: seen, offset: largest }.dispatch();
        }
        context.weigh(scores, reach, out);
        for (out, sum) in out.iter_mut().zip(sums) {
            let share = 1.0 / sum;
            out.iter_mut().for_each(|value| *value *= share);
        }
    }
}
