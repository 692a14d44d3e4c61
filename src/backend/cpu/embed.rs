use super::Buffer;
use crate::tensor::Tensor;

pub(super) fn embed(table: &Tensor, tokens: &[u32], out: &mut Buffer) {
    out.reshape(tokens.len(), table.shape()[1]);
    copy_rows(table, tokens.iter().copied(), out);
}

/// Row by row, the embedding of each token.
pub(super) fn copy_rows(table: &Tensor, tokens: impl Iterator<Item = u32>, out: &mut Buffer) {
    let columns = out.columns;
    for (token, row) in tokens.zip(out.values.chunks_exact_mut(columns)) {
        let start = token as usize * columns;
        table.read(start..start + columns, row);
    }
}
