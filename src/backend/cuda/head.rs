//! The output head on the device, and where the codes of its levels are.

use std::ops::Range;
use std::sync::Arc;

use super::buffer::Weights;
use super::device::Device;
use super::device_memory::DeviceMemory;
use super::driver::Driver;
use crate::backend::{Continuations, SearchRule, StepChoice, level_columns};
use crate::error::Result;
use crate::tensor::{Dtype, Tensor};

/// Why no step on a GPU is of a phrase or a thought.
pub(super) const REFUSED: &str = "an engine on a GPU refuses phrases and thoughts";

/// The output head, and what each level can choose from.
pub struct Head<D: Driver> {
    pub(super) weight: Weights<D>,
    pub(super) levels: Vec<LevelColumns<D>>,
}

/// A level's codes as columns of its logits.
pub(super) struct LevelColumns<D: Driver> {
    /// The tokens whose logits a step at the level evaluates.
    pub span: Range<usize>,
    pub num_codes: usize,
    /// By code: its column in the span, or `NO_TOKEN`; `None` where code `c` is column `c`.
    pub columns: Option<DeviceMemory<D>>,
}

impl<D: Driver> LevelColumns<D> {
    fn new(device: &Arc<Device<D>>, tokens: &[u32]) -> Result<LevelColumns<D>> {
        let level_columns::LevelColumns { span, columns, is_straight } =
            level_columns::LevelColumns::new(tokens);
        Ok(LevelColumns {
            span: span.start as usize..span.end as usize,
            num_codes: columns.len(),
            columns: match is_straight {
                true => None,
                false => Some(DeviceMemory::of(device, &columns, "columns of a level's codes")?),
            },
        })
    }
}

impl<D: Driver> Head<D> {
    pub(super) fn new(
        device: &Arc<Device<D>>,
        weight: Tensor,
        levels: &[Vec<u32>],
        dtype: Dtype,
    ) -> Result<Head<D>> {
        let columns = levels.iter().map(|tokens| LevelColumns::new(device, tokens));
        Ok(Head {
            weight: Weights::stack(device, &[weight], dtype)?,
            levels: columns.collect::<Result<_>>()?,
        })
    }

    pub(super) fn vocab_size(&self) -> usize {
        self.weight.rows
    }

    /// The tokens whose logits a step evaluates by a product of its own. Those of named tokens are
    /// copied from products with the whole vocabulary.
    pub(super) fn span(&self, rule: &SearchRule<'_>) -> Range<usize> {
        match rule.choice {
            StepChoice::Forced { token, .. } => token as usize..token as usize + 1,
            StepChoice::Tokens(_) => 0..0,
            StepChoice::Phrase | StepChoice::Sample { .. } => unreachable!("{REFUSED}"),
            StepChoice::Level(_) if rule.continuations() == Continuations::Vocabulary => {
                0..self.vocab_size()
            }
            StepChoice::Level(level) => self.levels[level].span.clone(),
        }
    }

    /// Choices that a beam has at a step, but for children of the catalog: codes or tokens.
    pub(super) fn num_codes(&self, rule: &SearchRule<'_>) -> usize {
        match rule.choice {
            StepChoice::Forced { .. } => 1,
            StepChoice::Tokens(tokens) => tokens.len(),
            StepChoice::Phrase | StepChoice::Sample { .. } => unreachable!("{REFUSED}"),
            StepChoice::Level(_) if rule.continuations() == Continuations::Vocabulary => {
                self.vocab_size()
            }
            StepChoice::Level(level) => self.levels[level].num_codes,
        }
    }

    /// The longest stretch of tokens that a level evaluates.
    pub(super) fn longest_span(&self) -> usize {
        self.levels.iter().map(|level| level.span.len()).max().unwrap_or(0)
    }
}
