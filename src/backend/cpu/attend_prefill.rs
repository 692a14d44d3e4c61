use rayon::prelude::*;
use rten_gemm::GemmInputB;
use rten_simd::SimdOp;
use rten_tensor::NdTensorView;

use super::scratch::Scratch;
use super::softmax::{ExpSum, Largest};
use super::{Buffer, CpuBackend, Heads, Mask, Slot};

/// Queries that are worked on together, so that their scores stay in the cache.
const QUERIES_PER_TILE: usize = 128;

impl CpuBackend {
    pub(super) fn attend_prefill(
        &self,
        qkv: &Buffer,
        heads: Heads,
        mask: Mask,
        scale: f32,
        relative_bias: Option<&[f32]>,
        slots: &[Slot],
        out: &mut Buffer,
    ) {
        let (query_dim, head_dim) = (heads.query_dim(), heads.head_dim);
        out.reshape(qkv.num_rows(), query_dim);
        let mut by_head = Scratch::new(out.values.len());
        let longest = slots.iter().map(|slot| slot.spec.context_len).max().unwrap_or(0);
        let mut first_row = 0;
        for slot in slots {
            let len = slot.spec.context_len;
            let block = &mut by_head[first_row * query_dim..][..len * query_dim];
            block.par_chunks_mut(len * head_dim).enumerate().for_each_init(
                || Scratch::new(0),
                |scores, (head, out)| {
                    let bias = relative_bias.map(|bias| {
                        let row = 2 * longest - 1;
                        &bias[head * row..(head + 1) * row][longest - len..][..2 * len - 1]
                    });
                    let prompt = Prompt { qkv, heads, head, first_row, len, bias };
                    self.attend_head(&prompt, mask, scale, scores, out);
                },
            );
            scatter_heads(
                block,
                heads,
                &mut out.values[first_row * query_dim..][..len * query_dim],
            );
            first_row += len;
        }
    }

    fn attend_head(
        &self,
        prompt: &Prompt<'_>,
        mask: Mask,
        scale: f32,
        scores: &mut Scratch,
        out: &mut [f32],
    ) {
        let Prompt { qkv, heads, head, first_row, len, bias } = *prompt;
        let head_dim = heads.head_dim;
        let kv_head = head / (heads.num_heads / heads.num_kv_heads);
        let keys = heads.query_dim() + kv_head * head_dim;
        let values = keys + heads.kv_dim();
        // Tiles of equal length: none is a single query, whose product would be summed otherwise.
        let tile = len.div_ceil(len.div_ceil(QUERIES_PER_TILE));
        for (tile_index, out) in out.chunks_mut(tile * head_dim).enumerate() {
            let start = tile_index * tile;
            let end = start + out.len() / head_dim;
            let reach = match mask {
                Mask::Causal => end,
                Mask::Bidirectional => len,
            };
            let rows = first_row + start..first_row + end;
            let context = first_row..first_row + reach;
            scores.resize((end - start) * reach);
            let queries = qkv.view(rows, head * head_dim..(head + 1) * head_dim);
            let keys = qkv.view(context.clone(), keys..keys + head_dim);
            self.product(queries, GemmInputB::Unpacked(keys.transposed()), scale, scores);
            for (query, row) in (start..end).zip(scores.chunks_exact_mut(reach)) {
                let (seen, unseen) = row.split_at_mut(match mask {
                    Mask::Causal => query + 1,
                    Mask::Bidirectional => len,
                });
                unseen.fill(0.0);
                if let Some(bias) = bias {
                    let bias = &bias[len - 1 - query..];
                    seen.iter_mut().zip(bias).for_each(|(score, bias)| *score += bias);
                }
                let largest = Largest(seen).dispatch();
                let sum = ExpSum { values: seen, offset: largest }.dispatch();
                let share = 1.0 / sum;
                seen.iter_mut().for_each(|score| *score *= share);
            }
            let weights = NdTensorView::from_data([end - start, reach], &scores[..]);
            let values = qkv.view(context, values..values + head_dim);
            self.product(weights, GemmInputB::Unpacked(values), 1.0, out);
        }
    }
}

#[derive(Clone, Copy)]
struct Prompt<'a> {
    qkv: &'a Buffer,
    heads: Heads,
    head: usize,
    first_row: usize,
    len: usize,
    /// `[2 * len - 1]` over key minus query position.
    bias: Option<&'a [f32]>,
}

/// Turns `[heads][rows, head_dim]` into `[rows][heads, head_dim]`.
pub(super) fn scatter_heads(by_head: &[f32], heads: Heads, out: &mut [f32]) {
    let (query_dim, head_dim) = (heads.query_dim(), heads.head_dim);
    let num_rows = out.len() / query_dim;
    for (row, out) in out.chunks_exact_mut(query_dim).enumerate() {
        for (head, out) in out.chunks_exact_mut(head_dim).enumerate() {
            let start = (head * num_rows + row) * head_dim;
            out.copy_from_slice(&by_head[start..start + head_dim]);
        }
    }
}
