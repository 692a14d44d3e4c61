use super::Buffer;
use crate::tensor::Tensor;

pub(super) fn embed(
    table: &Tensor,
    tokens: impl Iterator<Item = u32>,
    num_tokens: usize,
    out: &mut Buffer,
) {
    let columns = table.shape()[1];
    out.reshape(num_tokens, columns);
    for (token, row) in tokens.zip(out.values.chunks_exact_mut(columns)) {
        let start = token as usize * columns;
        table.read(start..start + columns, row);
    }
}
