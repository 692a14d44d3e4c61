//! The rows that a step is scored by.

use super::{Buffer, CpuBackend};
use crate::backend::{Batch, GatherLast};

impl GatherLast for CpuBackend {
    fn gather_last(
        &self,
        x: &Buffer,
        first: usize,
        batch: &Batch<'_, CpuBackend>,
        out: &mut Buffer,
    ) {
        let num_prompt_rows = batch.num_prompt_rows();
        let num_prompts = batch.chunks.len() - first;
        let num_beam_rows = x.num_rows() - num_prompt_rows;
        out.reshape(num_prompts + num_beam_rows, x.columns);
        let (of_prompts, of_beams) = out.values.split_at_mut(num_prompts * x.columns);
        let ends = batch.chunks.iter().scan(0, |end, chunk| {
            *end += chunk.len();
            Some(*end)
        });
        for (end, out) in ends.skip(first).zip(of_prompts.chunks_exact_mut(x.columns)) {
            out.copy_from_slice(x.row(end - 1));
        }
        of_beams.copy_from_slice(&x.values[num_prompt_rows * x.columns..]);
    }
}
