//! The rows of a step: which threads work on which of them, and the pass over them.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::scheduler::{Running, Scheduled, Scheduler};
use super::status::PhaseClocks;
use crate::backend::{Backend, Batch, SearchRule, StepChoice};
use crate::models::{ForwardPass, Model};

/// Rows below which a step is not worth being split.
const ROWS_PER_SUB_BATCH: usize = 16;

/// Activations of one sub-batch, kept from step to step.
pub(super) struct Workspace<B: Backend> {
    pub forward: Box<dyn ForwardPass<B>>,
    pub logits: B::Logits,
}

/// The rows of a step that one thread works on, or all threads together.
pub(super) struct SubBatch<B: Backend> {
    tokens: Vec<u32>,
    chunks: Vec<Range<usize>>,
    /// Slots whose prompt goes on, slots whose prompt ends, slots with beams.
    slots: Vec<B::Slot>,
    /// Of each slot: the request among those that run, and which of its slots it is.
    owners: Vec<(usize, usize)>,
    num_unfinished: usize,
}

/// Whether a slot has taken all steps of its program, or broke off. Its request may have others.
pub(super) fn has_ended<B: Backend>(backend: &B, running: &Running<B::Slot>, slot: usize) -> bool {
    let num_steps = running.prepared.program.slots()[slot].num_steps();
    running.slots[slot]
        .as_ref()
        .is_none_or(|slot| backend.num_steps(slot) == num_steps || backend.num_beams(slot) == 0)
}

/// Rows that the slots of a request have in the next step, its context being read.
pub(super) fn num_decode_rows<B: Backend>(backend: &B, running: &Running<B::Slot>) -> usize {
    let slots = (0..running.slots.len()).filter(|&slot| !has_ended(backend, running, slot));
    slots.flat_map(|slot| &running.slots[slot]).map(|slot| backend.num_beams(slot)).sum()
}

/// Splits a step into groups with about as many rows each, one a worker, where that pays.
pub(super) fn split<'a>(
    scheduled: &[&'a Scheduled],
    num_workers: usize,
) -> Vec<Vec<&'a Scheduled>> {
    let rows: usize = scheduled.iter().map(|scheduled| scheduled.num_rows).sum();
    let count = num_workers.min(rows / ROWS_PER_SUB_BATCH).min(scheduled.len()).max(1);
    let mut groups: Vec<(usize, Vec<&Scheduled>)> = vec![(0, Vec::new()); count];
    let mut largest_first = scheduled.to_vec();
    largest_first.sort_by_key(|scheduled| std::cmp::Reverse(scheduled.num_rows));
    for scheduled in largest_first {
        let least = groups.iter_mut().min_by_key(|(rows, _)| *rows);
        let (rows, group) = least.expect("one group at least");
        *rows += scheduled.num_rows;
        group.push(scheduled);
    }
    groups.into_iter().map(|(_, group)| group).collect()
}

impl<B: Backend> SubBatch<B> {
    /// The rows of some requests. Their slots are taken from the scheduler's requests until
    /// [`return_slots`](SubBatch::return_slots).
    pub fn new(
        backend: &B,
        scheduler: &mut Scheduler<B::Slot>,
        group: &[&Scheduled],
        has_encoder: bool,
    ) -> SubBatch<B> {
        let running = scheduler.running();
        let (mut tokens, mut chunks, mut owners) = (Vec::new(), Vec::new(), Vec::new());
        let mut beams = Vec::new();
        let prompt_len = |scheduled: &Scheduled| running[scheduled.request].prepared.tokens().len();
        let goes_on = |scheduled: &&&Scheduled| scheduled.chunk.end < prompt_len(scheduled);
        let (unfinished, rest): (Vec<&Scheduled>, Vec<&Scheduled>) =
            group.iter().partition(|scheduled| goes_on(scheduled));
        for scheduled in unfinished.iter().chain(&rest) {
            let running = &running[scheduled.request];
            let (prepared, len) = (&running.prepared, running.prepared.tokens().len());
            for slot in 0..running.slots.len() {
                if has_ended(backend, running, slot) {
                    continue;
                }
                let owner = (scheduled.request, slot);
                let chunk = match slot {
                    _ if scheduled.chunk.is_empty() => None,
                    0 => Some(scheduled.chunk.clone()),
                    // The slots of one request have its context in common; the first reads it. Its
                    // last row scores the first step of all, unless a decoder does.
                    _ if scheduled.chunk.end < len => continue,
                    _ if has_encoder => None,
                    _ => Some(len - 1..len),
                };
                match chunk {
                    None => beams.push(owner),
                    Some(chunk) => {
                        tokens.extend_from_slice(&prepared.tokens()[chunk.clone()]);
                        chunks.push(chunk);
                        owners.push(owner);
                    }
                }
            }
        }
        // Slots that choose from the same tokens stand together: one product gives the logits of all.
        beams.sort_by_key(|&(request, slot)| {
            let running = &running[request];
            let step = running.slots[slot].as_ref().map_or(0, |slot| backend.num_steps(slot));
            match running.prepared.program.slots()[slot].step(step).0 {
                StepChoice::Level(level) => (0, level as u32),
                StepChoice::Forced { token, .. } => (1, token),
                StepChoice::Tokens(tokens) => (2, tokens.len() as u32),
                StepChoice::Phrase => (3, 0),
                StepChoice::Sample { .. } => (4, 0),
            }
        });
        owners.extend(beams);
        let slots = owners.iter().map(|&(request, slot)| {
            scheduler.slots_mut(request)[slot].take().expect("a slot is in one sub-batch")
        });
        let (slots, num_unfinished) = (slots.collect(), unfinished.len());
        SubBatch { tokens, chunks, slots, owners, num_unfinished }
    }

    /// Gives the slots back to their requests.
    pub fn return_slots(self, scheduler: &mut Scheduler<B::Slot>) {
        for (lent, (request, slot)) in self.slots.into_iter().zip(self.owners) {
            scheduler.slots_mut(request)[slot] = Some(lent);
        }
    }

    /// How the slots whose prompt has been read take their next step.
    fn rules<'a>(&self, backend: &B, running: &'a [Running<B::Slot>]) -> Vec<SearchRule<'a>> {
        let rule = |(&(request, slot), lent): (&(usize, usize), &B::Slot)| {
            running[request].prepared.rule(slot, backend.num_steps(lent))
        };
        self.owners.iter().zip(&self.slots).skip(self.num_unfinished).map(rule).collect()
    }

    /// The pass over the rows.
    pub fn run(
        &mut self,
        pass: Pass<'_, B>,
        running: &[Running<B::Slot>],
        workspace: &mut Workspace<B>,
    ) {
        let Pass { backend, model, memory, phases } = pass;
        let rules = self.rules(backend, running);
        let SubBatch { tokens, chunks, slots, num_unfinished, .. } = self;
        let Workspace { forward, logits } = workspace;
        let clock = match chunks.is_empty() {
            true => &phases.decode,
            false => &phases.prefill,
        };
        let head = model.head();
        let mut batch = Batch::new(memory, chunks, slots);
        backend.step(&mut batch, head, &rules, logits, |batch, logits| {
            timed(clock, || forward.run(backend, tokens, batch));
            if rules.is_empty() {
                return;
            }
            let beams = &mut batch.beams_from(*num_unfinished);
            timed(&phases.search, || {
                backend.lm_head(forward.output(), head, &rules, beams, logits);
                backend.advance_beams(logits, head, &rules, beams);
            });
        });
    }
}

/// What the passes of a step have in common.
pub(super) struct Pass<'a, B: Backend> {
    pub backend: &'a B,
    pub model: &'a dyn Model<B>,
    pub memory: &'a B::Memory,
    pub phases: &'a PhaseClocks,
}

impl<B: Backend> Clone for Pass<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Pass<'_, B> {}

pub(super) fn timed(clock: &AtomicU64, work: impl FnOnce()) {
    let start = Instant::now();
    work();
    clock.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
}
