//! A level's codes as columns of its logits.

use std::ops::Range;

use super::NO_TOKEN;

/// The columns of a level's codes among the logits of the tokens that they span.
pub(super) struct LevelColumns {
    /// The tokens whose logits a step at the level evaluates.
    pub span: Range<u32>,
    /// By code: its column in the span, or `NO_TOKEN`.
    pub columns: Vec<u32>,
    /// Whether code `c` is column `c`, for every code.
    pub is_straight: bool,
}

impl LevelColumns {
    /// `tokens`: by code, or `NO_TOKEN`.
    pub fn new(tokens: &[u32]) -> LevelColumns {
        let known = || tokens.iter().copied().filter(|&token| token != NO_TOKEN);
        let start = known().min().unwrap_or(0);
        let end = known().max().map_or(0, |last| last + 1);
        let column = |&token: &u32| {
            if token == NO_TOKEN { token } else { token - start }
        };
        let columns: Vec<u32> = tokens.iter().map(column).collect();
        let is_straight = (0..).zip(&columns).all(|(code, &column)| code == column);
        LevelColumns { span: start..end, columns, is_straight }
    }

    /// Tokens that are columns of their own, wherever they are in the vocabulary; `NO_TOKEN` is none.
    pub fn of_named(tokens: &[u32]) -> LevelColumns {
        let column = |(column, &token): (u32, &u32)| {
            if token == NO_TOKEN { token } else { column }
        };
        LevelColumns {
            span: 0..tokens.len() as u32,
            columns: (0..).zip(tokens).map(column).collect(),
            is_straight: !tokens.contains(&NO_TOKEN),
        }
    }

    /// The column of a code that has a token.
    #[inline]
    pub fn column(&self, code: usize) -> Option<usize> {
        match self.is_straight {
            true => Some(code), // beyond the last there is no logit
            false => {
                let column = *self.columns.get(code)?;
                (column != NO_TOKEN).then_some(column as usize)
            }
        }
    }
}
