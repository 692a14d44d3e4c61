use std::ops::Range;

use super::{NO_TOKEN, StepTokens};

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
    pub fn new(step: &StepTokens) -> StepColumns {
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
