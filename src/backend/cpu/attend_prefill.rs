use rayon::prelude::*;
use rten_simd::SimdOp;

use super::context::{HeadContext, QUERIES_PER_TILE, Queries};
use super::matmul::split_columns;
use super::scratch::Scratch;
use super::softmax::{ExpSum, Largest};
use super::{Buffer, CpuBackend, Heads, Mask};
use crate::backend::Batch;

impl CpuBackend {
    pub(super) fn attend_prefill(
        &self,
        layer: usize,
        queries: &Buffer,
        heads: Heads,
        mask: Mask,
        scale: f32,
        relative_bias: Option<&[f32]>,
        batch: &Batch<'_, CpuBackend>,
        out: &mut Buffer,
    ) {
        let query_dim = heads.query_dim();
        out.reshape(queries.num_rows(), query_dim);
        let longest = batch.prompts().map(|(_, slot)| slot.spec.context_len).max().unwrap_or(0);
        let pages: Vec<_> = batch
            .prompts()
            .map(|(_, slot)| batch.memory.context_pages(&slot.spec.context_pages))
            .collect();
        let mut heads_of_prompts = Vec::new();
        let (mut rest, mut first_row) = (&mut out.values[..], 0);
        for ((chunk, _), pages) in batch.prompts().zip(&pages) {
            let (rows, after) = rest.split_at_mut(chunk.len() * query_dim);
            rest = after;
            for (head, out) in
                split_columns(rows, query_dim, heads.head_dim).into_iter().enumerate()
            {
                let bias = relative_bias.map(|bias| {
                    let row = 2 * longest - 1;
                    &bias[head * row..(head + 1) * row]
                });
                let prompt = HeadOfPrompt { first_row, start: chunk.start, end: chunk.end, bias };
                heads_of_prompts.push((prompt, pages, head, out));
            }
            first_row += chunk.len();
        }
        heads_of_prompts.into_par_iter().for_each_init(
            || Scratch::new(0),
            |scores, (prompt, pages, head, mut out)| {
                let kv_head = head / (heads.num_heads / heads.num_kv_heads);
                let layout = &batch.memory.layout;
                let context = HeadContext::new(pages, prompt.end, layout, layer, kv_head);
                for (tile, out) in out.chunks_mut(QUERIES_PER_TILE).enumerate() {
                    let first = tile * QUERIES_PER_TILE;
                    let row = prompt.first_row + first;
                    let queries = Queries {
                        values: &queries.values[row * queries.columns + head * heads.head_dim..],
                        stride: queries.columns,
                        rows: out.len(),
                    };
                    let start = prompt.start + first;
                    let reach = match mask {
                        Mask::Causal => start + out.len(),
                        Mask::Bidirectional => prompt.end,
                    };
                    self.count_flops(2 * out.len(), heads.head_dim, reach);
                    scores.resize(out.len() * reach);
                    context.scores(queries, reach, scores);
                    let mut sums = [0.0; QUERIES_PER_TILE];
                    let rows = scores.chunks_exact_mut(reach).zip(&mut sums);
                    for (position, (row, sum)) in (start..).zip(rows) {
                        let (seen, unseen) = row.split_at_mut(match mask {
                            Mask::Causal => position + 1,
                            Mask::Bidirectional => reach,
                        });
                        unseen.fill(0.0);
                        seen.iter_mut().for_each(|score| *score *= scale);
                        if let Some(bias) = prompt.bias {
                            let bias = &bias[longest - 1 - position..];
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
            },
        );
    }
}

/// One query head of one chunk.
struct HeadOfPrompt<'a> {
    first_row: usize,
    start: usize,
    end: usize,
    /// `[2 * longest - 1]` over key minus query position.
    bias: Option<&'a [f32]>,
}
