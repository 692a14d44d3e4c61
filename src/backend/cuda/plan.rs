//! The plan of a step: where its rows are, and what of its products and kernels depends on its rules.

use std::ops::Range;
use std::sync::Arc;

use super::catalog::{Catalogs, SearchArrays};
use super::device::Device;
use super::driver::Driver;
use super::head::Head;
use super::slot::Slot;
use super::tiling::padded;
use crate::backend::{Continuations, Normalizer, SearchRule, StepChoice};

/// Continuations that a block of `advance_beams_expand` takes at a time.
pub(super) const CHUNK: usize = 1024;
/// Parts that the continuations of a slot are dealt out to, at most.
pub(super) const MAX_PARTS: usize = 64;

/// Rows of like steps, one after the other: one product gives their logits.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Run {
    pub rows: Range<usize>,
    pub span: Range<usize>,
}

/// Where the rows of each slot's beams are.
pub(super) struct Layout {
    /// By slot.
    pub first_rows: Vec<usize>,
    pub runs: Vec<Run>,
}

impl Layout {
    /// Slots one after the other; with `is_padded`, each run begins where one of a like length
    /// before it would end, so that steps of like shape look the same to kernels.
    pub fn new<D: Driver>(
        head: &Head<D>,
        rules: &[SearchRule<'_>],
        slots: &[Slot<D>],
        is_padded: bool,
    ) -> Layout {
        let pad = |rows: &mut Range<usize>| {
            if is_padded {
                rows.end = rows.start + padded(rows.len());
            }
        };
        let (mut first_rows, mut runs): (Vec<usize>, Vec<Run>) = (Vec::new(), Vec::new());
        for (slot, rule) in slots.iter().zip(rules) {
            let span = head.span(rule);
            if runs.last().is_none_or(|run| run.span != span) {
                let start = runs.last_mut().map_or(0, |run| {
                    pad(&mut run.rows);
                    run.rows.end
                });
                runs.push(Run { rows: start..start, span });
            }
            let rows = &mut runs.last_mut().expect("at least this one").rows;
            first_rows.push(rows.end);
            rows.end += slot.num_rows();
        }
        if let Some(run) = runs.last_mut() {
            pad(&mut run.rows);
        }
        Layout { first_rows, runs }
    }

    pub fn num_rows(&self) -> usize {
        self.runs.last().map_or(0, |run| run.rows.end)
    }
}

/// How a step's head and choice are run, as far as it does not depend on numbers on the device.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    pub runs: Vec<Run>,
    /// Numbers from a row of logits to the next.
    pub stride: usize,
    pub needs_vocabulary: bool,
    pub needs_level: bool,
    pub needs_children: bool,
    pub num_parts: usize,
    /// Keys that all slots keep.
    pub num_keys: usize,
    /// The most beams that one slot keeps, as a power of two.
    pub width: usize,
}

/// The most rows that the next position of a slot needs.
pub(super) fn num_next_rows<D: Driver>(
    slot: &Slot<D>,
    rule: &SearchRule<'_>,
    head: &Head<D>,
) -> usize {
    let search = slot.search.get().expect("planned before");
    let most = num_continuations(slot, search, rule, head);
    rule.beams.max(1).min(most).max(1)
}

/// The most continuations that a step of a slot has.
fn num_continuations<D: Driver>(
    slot: &Slot<D>,
    search: &SearchArrays<D>,
    rule: &SearchRule<'_>,
    head: &Head<D>,
) -> usize {
    match rule.continuations() {
        Continuations::Children => search.num_prefixes(rule.depth + 1),
        _ => slot.num_rows().saturating_mul(head.num_codes(rule)),
    }
}

/// Makes room for what the slots' steps choose.
pub(super) fn begin_step<D: Driver>(
    head: &Head<D>,
    rules: &[SearchRule<'_>],
    slots: &mut [Slot<D>],
) {
    for (slot, rule) in slots.iter_mut().zip(rules) {
        let room = num_next_rows(slot, rule, head);
        slot.keeps_log_probs = rule.log_probs;
        slot.reached_leaves = rule.reaches_leaves();
        slot.begin_position(room);
    }
}

/// Plans the step of some slots whose rows are laid out. `is_padded`: the plan is for a shape.
pub(super) fn plan<D: Driver>(
    device: &Arc<Device<D>>,
    catalogs: &mut Catalogs<D>,
    head: &Head<D>,
    rules: &[SearchRule<'_>],
    slots: &[Slot<D>],
    layout: &Layout,
    is_padded: bool,
) -> Plan {
    let pad = |size: usize| if is_padded { padded(size) } else { size };
    let (mut num_keys, mut width, mut most) = (0, 1, 1);
    let mut longest = layout.runs.iter().map(|run| run.span.len()).max().unwrap_or(0);
    let (mut needs_vocabulary, mut needs_level, mut needs_children) = (false, false, false);
    for (slot, rule) in slots.iter().zip(rules) {
        let search = slot.search.get_or_init(|| {
            SearchArrays::new(device, catalogs, rule).unwrap_or_else(SearchArrays::failed)
        });
        let (normalizer, continuations) = (rule.normalizer(), rule.continuations());
        needs_vocabulary |= normalizer == Normalizer::Vocabulary
            || continuations == Continuations::Tokens
            || rule.log_probs;
        needs_level |= normalizer == Normalizer::Level
            || (rule.log_probs
                && matches!(continuations, Continuations::Level | Continuations::Tokens));
        needs_children |=
            matches!(continuations, Continuations::Children | Continuations::Occurring)
                && (normalizer == Normalizer::Children || rule.seed.is_some() || rule.log_probs);
        if let StepChoice::Tokens(tokens) = rule.choice {
            longest = longest.max(tokens.len());
        }
        most = most.max(num_continuations(slot, search, rule, head));
        width = width.max(rule.beams);
        num_keys += rule.beams.max(1);
    }
    let for_each = (2 * device.driver.num_processors()).div_ceil(slots.len().max(1));
    Plan {
        stride: longest.max(head.longest_span()).next_multiple_of(8),
        runs: layout.runs.clone(),
        needs_vocabulary,
        needs_level,
        needs_children,
        num_parts: pad(most.div_ceil(CHUNK).min(for_each)).clamp(1, MAX_PARTS),
        num_keys: pad(num_keys),
        width: width.next_power_of_two(),
    }
}
