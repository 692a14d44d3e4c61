//! Tables of embeddings.

use std::sync::Arc;

use super::Head;
use super::head::Chunk;
use crate::tensor::Tensor;

/// Bytes of a table from which it is worth reading rows of a head's panels, which lie apart, to hold
/// the weights once.
const LARGE: usize = 64 << 20;

/// A table of embeddings, `[tokens, columns]`: its own, or the head's where they are one tensor.
pub struct Table {
    rows: Rows,
    pub(super) columns: usize,
}

enum Rows {
    Own(Tensor),
    OfHead(Arc<[Chunk]>),
}

impl Table {
    pub(super) fn new(weight: Tensor, head: Option<&Head>) -> Table {
        Table::share_above(LARGE, weight, head)
    }

    fn share_above(bytes: usize, weight: Tensor, head: Option<&Head>) -> Table {
        let columns = weight.shape()[1];
        let is_large = weight.len() * weight.dtype().size() >= bytes;
        let rows = match head.and_then(|head| head.chunks_of(&weight)).filter(|_| is_large) {
            Some(chunks) => Rows::OfHead(Arc::clone(chunks)),
            None => Rows::Own(weight.into_memory()),
        };
        Table { rows, columns }
    }

    /// The row of a token, in f32.
    pub(super) fn read(&self, token: u32, out: &mut [f32]) {
        match &self.rows {
            Rows::Own(weight) => {
                let first = token as usize * self.columns;
                weight.read(first..first + self.columns, out);
            }
            Rows::OfHead(chunks) => {
                let after = chunks.partition_point(|chunk| chunk.tokens.start <= token);
                let chunk = &chunks[after - 1];
                chunk.weight.read_row((token - chunk.tokens.start) as usize, out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Dtype;

    #[test]
    fn a_row_is_the_same_in_a_table_and_in_a_head_of_the_same_weights() {
        let mut rng = fastrand::Rng::with_seed(1);
        for columns in [1, 7, 64] {
            let values = (0..100 * columns).map(|_| rng.f32()).collect();
            let weight = Tensor::new(&[100, columns], values);
            let levels = [(3..40).collect(), (50..99).collect()];
            let head = Head::new(&weight, Dtype::F32, &levels, &[1, 41]);
            let shared = Table::share_above(0, weight.clone(), Some(&head));
            assert!(matches!(shared.rows, Rows::OfHead(_)));
            let own = Table::new(weight.clone(), Some(&head));
            assert!(matches!(own.rows, Rows::Own(_)), "small");
            let (mut found, mut expected) = (vec![0.0; columns], vec![0.0; columns]);
            for token in 0..100 {
                shared.read(token, &mut found);
                own.read(token, &mut expected);
                assert_eq!(found, expected, "token {token}");
            }
            // Rounded, the head is no place to read embeddings from; another tensor's is none either.
            let rounded = Head::new(&weight, Dtype::Bf16, &levels, &[]);
            let other = Tensor::new(&[100, columns], weight.to_vec());
            for (weight, head) in [(weight, &rounded), (other, &head)] {
                let table = Table::share_above(0, weight, Some(head));
                assert!(matches!(table.rows, Rows::Own(_)));
            }
        }
    }
}
