//! Rows of an embedding table.

use super::{Buffer, CpuBackend, Table};
use crate::backend::{Batch, Embed};

impl Embed for CpuBackend {
    fn embed(
        &self,
        table: &Table,
        tokens: &[u32],
        batch: &Batch<'_, CpuBackend>,
        out: &mut Buffer,
    ) {
        assert_eq!(tokens.len(), batch.num_prompt_rows(), "a token for each row of a prompt");
        let beams = batch.beams();
        let columns = table.columns;
        let num_beams: usize = beams.iter().map(|slot| slot.beams.len()).sum();
        out.reshape(tokens.len() + num_beams, columns);
        let newest = beams.iter().flat_map(|slot| slot.beams.newest_tokens());
        let tokens = tokens.iter().copied().chain(newest);
        for (token, out) in tokens.zip(out.values.chunks_exact_mut(columns)) {
            table.read(token, out);
        }
    }
}
