//! Rows of a table added to rows of prompts.

use super::{Buffer, CpuBackend, Table};
use crate::backend::{AddEmbedding, Batch};

impl AddEmbedding for CpuBackend {
    fn add_embedding(
        &self,
        table: &Table,
        indices: &[u32],
        batch: &Batch<'_, CpuBackend>,
        x: &mut Buffer,
    ) {
        assert_eq!(indices.len(), batch.num_prompt_rows(), "an index for each row of a prompt");
        assert_eq!(table.columns, x.columns, "rows must be as wide as the table's");
        let mut row = vec![0.0; x.columns];
        for (index, x) in indices.iter().zip(x.values.chunks_exact_mut(table.columns)) {
            table.read(*index, &mut row);
            x.iter_mut().zip(&row).for_each(|(x, row)| *x += row);
        }
    }
}
