//! One step of all requests: admit, plan, batch, run, complete.

use super::batch::{self, SubBatch};
use super::engine::Engine;
use super::scheduler::{Running, Scheduled};
use super::status::Unobserved;
use crate::answer::Answer;
use crate::backend::{Backend, SlotSpec};
use crate::cost::Work;
use crate::error::Error;
use crate::pages::Page;

impl<B: Backend> Engine<B> {
    /// One step. Callers are told afterwards, by [`deliver`](Engine::deliver).
    pub(super) fn advance(&mut self) {
        self.admit(self.preparer.now_us());
        self.step_running();
    }

    /// Steps until nothing runs any more; nothing is admitted meanwhile.
    pub(super) fn finish_running(&mut self) {
        while !self.scheduler.running().is_empty() {
            self.step_running();
        }
    }

    fn admit(&mut self, now_us: u64) {
        let (backend, start_token) = (&self.backend, self.spec.prompt.start_token());
        let indices = |pages: &[Page]| pages.iter().map(Page::index).collect();
        self.scheduler.admit(now_us, |prepared, slot, context, tails| {
            let slot = backend.open_slot(SlotSpec {
                context_pages: indices(context),
                context_len: prepared.tokens().len(),
                tail_pages: indices(tails),
                num_steps: prepared.program.slots()[slot].num_steps(),
                start_token,
            });
            slot.expect("a request is checked for as many steps as the device takes")
        });
    }

    fn step_running(&mut self) {
        self.scheduler.end_changed();
        let backend = &self.backend;
        let scheduled =
            self.scheduler.schedule(|running| batch::num_decode_rows(&**backend, running));
        if scheduled.is_empty() {
            return;
        }
        let rows: usize = scheduled.iter().map(|scheduled| scheduled.num_rows).sum();
        let is_prompt = |scheduled: &&Scheduled| !scheduled.chunk.is_empty();
        let prompts = scheduled.iter().filter(is_prompt);
        let prompt_tokens: usize = prompts.map(|scheduled| scheduled.num_rows).sum();
        let _span = tracing::debug_span!(target: "sidereal", "step", rows, prompt_tokens).entered();
        let began_us = self.preparer.now_us();
        let mut sub_batches = self.sub_batches(&scheduled);
        self.run_sub_batches(&mut sub_batches);
        self.encode_pieces(&scheduled);
        let has_answered = self.complete(&scheduled, sub_batches);
        let took_us = self.preparer.now_us().saturating_sub(began_us);
        self.scheduler.metrics().step(rows, prompt_tokens, took_us);
        let beam_rows = rows - prompt_tokens;
        self.observe(Work { steps: 1, prompt_tokens, beam_rows }, began_us, has_answered);
    }

    /// Lets the scheduler learn how long work takes. On a device that is known when it was waited
    /// for, to read an answer.
    fn observe(&mut self, work: Work, began_us: u64, has_answered: bool) {
        let unobserved = &mut self.unobserved;
        if unobserved.work == Work::default() {
            unobserved.since_us = began_us;
        }
        unobserved.work += work;
        if B::COMPUTES_ON_CALLERS || has_answered {
            let Unobserved { work, since_us } = std::mem::take(unobserved);
            self.scheduler.observe(work, self.preparer.now_us().saturating_sub(since_us));
        }
    }

    fn sub_batches(&mut self, scheduled: &[Scheduled]) -> Vec<SubBatch<B>> {
        let has_encoder = self.spec.prompt.is_whole();
        let whole: Vec<&Scheduled> =
            scheduled.iter().filter(|scheduled| scheduled.pieces.is_none()).collect();
        if whole.is_empty() {
            return Vec::new();
        }
        let groups = batch::split(&whole, self.workers.len());
        let sub_batch = |group: Vec<&Scheduled>| {
            SubBatch::new(&*self.backend, &mut self.scheduler, &group, has_encoder)
        };
        groups.into_iter().map(sub_batch).collect()
    }

    /// Takes note of what was done, and answers the requests that have taken all their steps.
    /// Whether there were any.
    fn complete(&mut self, scheduled: &[Scheduled], sub_batches: Vec<SubBatch<B>>) -> bool {
        for sub_batch in sub_batches {
            sub_batch.return_slots(&mut self.scheduler);
        }
        let backend = &*self.backend;
        let is_finished = |running: &Running<B::Slot>| {
            (0..running.slots.len()).all(|slot| batch::has_ended(backend, running, slot))
        };
        self.scheduler.complete(scheduled, self.preparer.now_us());
        let finished = self.scheduler.take_finished(is_finished);
        let has_answered = !finished.is_empty();
        if has_answered {
            self.answer(finished);
        }
        if let Err(Error::Device { device, reason }) = self.backend.take_failure() {
            self.scheduler.fail_running(&device, &reason);
        }
        has_answered
    }

    /// Reads the beams of all that are finished at once: where a device computes, this waits for it.
    fn answer(&mut self, finished: Vec<Running<B::Slot>>) {
        let slots = finished.iter().flat_map(|running| running.slots.iter().flatten());
        let mut beams = self.backend.read_beams(&slots.collect::<Vec<_>>()).into_iter();
        let now_us = self.preparer.now_us();
        for mut running in finished {
            let timings = running.timings(now_us);
            let Running { prepared, slots, cached_tokens, .. } = &running;
            let beams: Vec<_> = beams.by_ref().take(slots.len()).collect();
            let version = self.weights_version;
            // Names are read from the catalog's file, so it is checked before and after.
            let snapshot = &prepared.snapshot;
            let answer = snapshot.check_file().and_then(|()| {
                self.codes.answer(prepared, *cached_tokens, version, beams.into_iter())
            });
            let answer = answer.and_then(|answer| snapshot.check_file().map(|()| answer));
            let answer = match running.is_late(now_us) {
                true => Err(prepared.deadline_exceeded(None)),
                false => answer,
            };
            let metrics = self.scheduler.metrics();
            prepared.span.in_scope(|| match &answer {
                Ok(_) => metrics.request_answered(&timings),
                Err(error) => metrics.request_failed(error),
            });
            let timings = prepared.request.timings.then_some(timings);
            let answer = answer.map(|answer| Answer { timings, ..answer });
            self.scheduler.end(running, answer, now_us);
        }
    }
}
