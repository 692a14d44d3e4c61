use std::ops::Range;
use std::sync::Arc;

use super::buffer::Weights;
use super::driver::Driver;
use super::handle::{Device, DeviceMemory};
use super::tables::MAX_POSITIONS;
use crate::backend::{StepTokens, step_columns};
use crate::error::{Error, Result};
use crate::search::Constraint;
use crate::tensor::{Dtype, Tensor};

/// The output head, and what each step can choose from.
pub struct Head<D: Driver> {
    pub(super) weight: Weights<D>,
    pub(super) steps: Vec<StepColumns<D>>,
}

/// What a step can choose from, as columns of its logits.
pub(super) struct StepColumns<D: Driver> {
    /// The tokens whose logits a step evaluates.
    pub span: Range<usize>,
    pub num_codes: usize,
    /// By code: its column in the span, or `NO_TOKEN`; `None` where code `c` is column `c`.
    pub columns: Option<DeviceMemory<D>>,
    pub is_forced: bool,
}

impl<D: Driver> StepColumns<D> {
    fn new(device: &Arc<Device<D>>, step: &StepTokens) -> Result<StepColumns<D>> {
        let step_columns::StepColumns { span, columns, is_straight, is_forced } =
            step_columns::StepColumns::new(step);
        Ok(StepColumns {
            span: span.start as usize..span.end as usize,
            num_codes: columns.len(),
            columns: match is_straight {
                true => None,
                false => Some(DeviceMemory::of(device, &columns, "columns of a level's codes")?),
            },
            is_forced,
        })
    }
}

impl<D: Driver> Head<D> {
    pub(super) fn new(
        device: &Arc<Device<D>>,
        weight: Tensor,
        steps: &[StepTokens],
        dtype: Dtype,
    ) -> Result<Head<D>> {
        if steps.len() >= MAX_POSITIONS {
            return Err(Error::Unsupported {
                what: format!("a search of {} steps on a GPU", steps.len()),
                way_out: format!("at most {} go there; use the CPU", MAX_POSITIONS - 1),
            });
        }
        let columns = steps.iter().map(|step| StepColumns::new(device, step));
        Ok(Head {
            weight: Weights::stack(device, &[weight], dtype)?,
            steps: columns.collect::<Result<_>>()?,
        })
    }

    pub(super) fn vocab_size(&self) -> usize {
        self.weight.rows
    }

    /// Whether a step may choose any token, and the tokens whose logits it evaluates.
    pub(super) fn choices(&self, step: usize, constraint: Constraint) -> (bool, Range<usize>) {
        let step = &self.steps[step];
        match constraint == Constraint::None && !step.is_forced {
            true => (true, 0..self.vocab_size()),
            false => (false, step.span.clone()),
        }
    }

    /// The longest stretch of tokens that a step evaluates.
    pub(super) fn longest_span(&self) -> usize {
        self.steps.iter().map(|step| step.span.len()).max().unwrap_or(0)
    }
}
