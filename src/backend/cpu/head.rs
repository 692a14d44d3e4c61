use std::collections::BTreeSet;
use std::ops::Range;

use super::{Matrix, StepTokens};
use crate::backend::step_columns::StepColumns;
use crate::tensor::Tensor;

/// Columns of the head that are evaluated together, so that a large vocabulary needs little room.
const COLUMNS_PER_CHUNK: usize = 2048;

/// The output head, cut where the codes of a level begin and end.
///
/// A step evaluates the chunks that its codes lie in, and the others only where scores are
/// normalised over the whole vocabulary.
pub struct Head {
    pub(super) chunks: Vec<Chunk>,
    pub(super) steps: Vec<StepColumns>,
    pub(super) vocab_size: u32,
}

pub(super) struct Chunk {
    pub tokens: Range<u32>,
    pub weight: Matrix,
}

impl Head {
    pub(super) fn new(weight: &Tensor, steps: &[StepTokens]) -> Head {
        let (vocab_size, num_in) = (weight.shape()[0], weight.shape()[1]);
        let steps: Vec<StepColumns> = steps.iter().map(StepColumns::new).collect();
        let mut cuts = BTreeSet::from([0, vocab_size as u32]);
        cuts.extend(steps.iter().flat_map(|step| [step.span.start, step.span.end]));
        let cuts: Vec<u32> = cuts.into_iter().collect();
        let mut chunks = Vec::new();
        let mut values = Vec::new();
        for stretch in cuts.windows(2) {
            for start in (stretch[0]..stretch[1]).step_by(COLUMNS_PER_CHUNK) {
                let tokens = start..stretch[1].min(start + COLUMNS_PER_CHUNK as u32);
                values.resize(tokens.len() * num_in, 0.0);
                weight.read(start as usize * num_in..tokens.end as usize * num_in, &mut values);
                chunks.push(Chunk { tokens, weight: Matrix::new(&values, num_in) });
            }
        }
        Head { chunks, steps, vocab_size: vocab_size as u32 }
    }
}
