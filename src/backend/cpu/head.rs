//! The output head, cut so that a step multiplies by few of its columns.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use super::Matrix;
use crate::backend::level_columns::LevelColumns;
use crate::tensor::{Dtype, Tensor};

/// Columns of the head that are evaluated together, so that a large vocabulary needs little room.
const COLUMNS_PER_CHUNK: usize = 2048;

/// The output head, cut where the codes of a level begin and end, and around each known token.
///
/// A step evaluates the chunks that its tokens lie in, and the others only where scores are
/// normalised over the whole vocabulary.
pub struct Head {
    pub(super) chunks: Arc<[Chunk]>,
    pub(super) levels: Vec<LevelColumns>,
    pub(super) vocab_size: u32,
    /// What the chunks were packed of, where they hold its very numbers.
    source: Option<Tensor>,
}

pub(super) struct Chunk {
    pub tokens: Range<u32>,
    pub weight: Matrix,
}

impl Head {
    pub(super) fn new(
        weight: &Tensor,
        dtype: Dtype,
        levels: &[Vec<u32>],
        known_tokens: &[u32],
    ) -> Head {
        let vocab_size = weight.shape()[0];
        let levels: Vec<LevelColumns> =
            levels.iter().map(|tokens| LevelColumns::new(tokens)).collect();
        let mut cuts = BTreeSet::from([0, vocab_size as u32]);
        cuts.extend(levels.iter().flat_map(|level| [level.span.start, level.span.end]));
        cuts.extend(known_tokens.iter().flat_map(|&token| [token, token + 1]));
        let cuts: Vec<u32> = cuts.into_iter().collect();
        let mut chunks = Vec::new();
        for stretch in cuts.windows(2) {
            for start in (stretch[0]..stretch[1]).step_by(COLUMNS_PER_CHUNK) {
                let tokens = start..stretch[1].min(start + COLUMNS_PER_CHUNK as u32);
                let rows = weight.rows(tokens.start as usize..tokens.end as usize);
                chunks.push(Chunk { tokens, weight: Matrix::stack(&[rows], dtype) });
            }
        }
        let source = (dtype == weight.dtype()).then(|| weight.clone());
        Head { chunks: chunks.into(), levels, vocab_size: vocab_size as u32, source }
    }

    /// The chunks, where they hold the numbers of a tensor that lies in the same memory.
    pub(super) fn chunks_of(&self, weight: &Tensor) -> Option<&Arc<[Chunk]>> {
        let is_same = self.source.as_ref().is_some_and(|source| source.is_same(weight));
        is_same.then_some(&self.chunks)
    }
}
