//! Rows of an embedding table.

use super::{Buffer, CpuBackend, Slot};
use crate::backend::Embed;
use crate::tensor::Tensor;

impl Embed for CpuBackend {
    fn embed(&self, table: &Tensor, tokens: &[u32], beams: &[Slot], out: &mut Buffer) {
        let columns = table.shape()[1];
        let num_beams: usize = beams.iter().map(|slot| slot.beams.len()).sum();
        out.reshape(tokens.len() + num_beams, columns);
        let newest = beams.iter().flat_map(|slot| slot.beams.newest_tokens());
        let tokens = tokens.iter().copied().chain(newest);
        for (token, out) in tokens.zip(out.values.chunks_exact_mut(columns)) {
            let first = token as usize * columns;
            table.read(first..first + columns, out);
        }
    }
}
