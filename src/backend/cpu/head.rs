use std::collections::BTreeSet;
use std::ops::Range;

use super::{Matrix, StepTokens};
use crate::backend::NO_TOKEN;
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

/// What a step can choose from, as columns of its logits.
pub(super) struct StepColumns {
    /// The tokens whose logits a step evaluates.
    pub span: Range<u32>,
    /// By code: its column in the span, or `NO_TOKEN`.
    pub columns: Vec<u32>,
    /// Whether code `c` is column `c`, for every code.
    pub is_straight: bool,
    pub is_forced: bool,
}

impl StepColumns {
    fn new(step: &StepTokens) -> StepColumns {
        let (tokens, is_forced) = match step {
            StepTokens::Level { tokens } => (tokens.as_slice(), false),
            StepTokens::Forced { token } => (std::slice::from_ref(token), true),
        };
        let known = || tokens.iter().copied().filter(|&token| token != NO_TOKEN);
        let start = known().min().unwrap_or(0);
        let end = known().max().map_or(0, |last| last + 1);
        let column = |&token: &u32| {
            if token == NO_TOKEN { token } else { token - start }
        };
        let columns: Vec<u32> = tokens.iter().map(column).collect();
        let is_straight = (0..).zip(&columns).all(|(code, &column)| code == column);
        StepColumns { span: start..end, columns, is_straight, is_forced }
    }

    /// The column of a code that has a token.
    #[inline]
    pub fn column(&self, code: u16) -> Option<usize> {
        match self.is_straight {
            true => Some(usize::from(code)), // beyond the last there is no logit
            false => {
                let column = *self.columns.get(usize::from(code))?;
                (column != NO_TOKEN).then_some(column as usize)
            }
        }
    }
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
