//! Which requests wait and run, and the pages that they hold.
//!
//! Host state alone: no weights, no device, no clock. Time comes in as an argument, and a slot of a
//! device is an opaque `S` that goes with the request whose search it is. The decisions themselves
//! are pure functions ([`schedule`](crate::schedule)).

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use super::answer::Reply;
use super::prepare::Prepared;
use super::status::EngineStatus;
use crate::answer::{Answer, Timings};
use crate::cost::{Estimate, Pace, Work};
use crate::error::{Error, Result};
use crate::metrics::Metrics;
use crate::models::PromptKind;
use crate::pages::{self, Page, Pool};
use crate::prefix_cache::{CacheStats, Found, Pin, PrefixCache};
use crate::schedule::{
    self, Active, Demand, Limits, Micros, Reading, Refusal, RequestId, Room, Waiting,
};

/// How a scheduler is made.
pub(super) struct SchedulerSpec {
    pub limits: Limits,
    pub context_pages: usize,
    pub tail_pages: usize,
    pub has_cache: bool,
    /// How prompts are read. A prompt that an encoder reads is cached as a whole.
    pub prompt: PromptKind,
}

/// The requests of an engine, and the memory that they share.
pub(super) struct Scheduler<S> {
    limits: Limits,
    prompt: PromptKind,
    context_pages: Pool,
    tail_pages: Pool,
    cache: Option<PrefixCache>,
    waiting: Vec<Entry>,
    /// In the order of their admission.
    running: Vec<Running<S>>,
    /// Requests that ended, whose callers are not told yet.
    ended: Vec<(Reply, Result<Answer>)>,
    estimate: Estimate,
    metrics: Arc<Metrics>,
}

/// A request that waits.
struct Entry {
    waiting: Waiting,
    prepared: Prepared,
    reply: Reply,
    /// What the cache has of its prompt.
    pin: Pin,
    promise: Option<Promise>,
}

/// When a request with a deadline was found in time, and when it was expected to end.
#[derive(Clone, Copy)]
struct Promise {
    made_us: Micros,
    end_us: Micros,
}

/// A request that was admitted. Its pages are free when it is dropped.
pub(super) struct Running<S> {
    pub prepared: Prepared,
    pub reply: Reply,
    deadline_us: Option<Micros>,
    pub context: Vec<Page>,
    pub tails: Vec<Page>,
    /// Those of its program; each is lent to the sub-batch that works on it.
    pub slots: Vec<Option<S>>,
    /// Tokens of the context that are there.
    num_read: usize,
    /// Pieces that an encoder has read of a prompt that it reads in several steps.
    pieces_read: usize,
    /// Steps that were taken after the one that read the last of the prompt, with that one.
    steps_taken: usize,
    pub cached_tokens: usize,
    promise: Option<Promise>,
    /// When the last step ended that the request had a part in.
    stepped_us: Micros,
    timings: Timings,
}

impl<S> Running<S> {
    /// Prompt tokens that are not read yet.
    pub fn num_unread(&self) -> usize {
        self.prepared.tokens().len() - self.num_read
    }

    /// What is left to do.
    fn active(&self) -> Active {
        let unread = self.num_unread();
        Active {
            demand: demand(&self.prepared, unread, self.steps_taken),
            deadline_us: self.deadline_us,
        }
    }

    pub fn is_late(&self, now_us: Micros) -> bool {
        self.deadline_us.is_some_and(|deadline| deadline <= now_us)
    }

    /// Where the request's time went, now that it is answered.
    pub fn timings(&mut self, now_us: Micros) -> Timings {
        let total_us = now_us.saturating_sub(self.prepared.arrived_us);
        Timings { total_us, ..std::mem::take(&mut self.timings) }
    }
}

/// What a request does in a step: read a chunk of its prompt, or extend its beams.
pub(super) struct Scheduled {
    /// Its index among those that run.
    pub request: usize,
    /// Prompt tokens that are read.
    pub chunk: Range<usize>,
    /// Pieces of the chunk that an encoder reads, where the step does not read all of it.
    pub pieces: Option<Range<usize>>,
    /// Rows that go through the network, as many as would take so long.
    pub num_rows: usize,
}

/// What a request has to do, with so many tokens of its prompt to read and so many steps taken.
fn demand(prepared: &Prepared, unread: usize, steps_taken: usize) -> Demand {
    // The step that reads the last of a prompt is the first of its search.
    let steps = prepared.program.max_steps() - usize::from(unread > 0);
    Demand { unread, steps: steps.saturating_sub(steps_taken), beam_rows: prepared.needs.beam_rows }
}

impl<S> Scheduler<S> {
    pub fn new(spec: &SchedulerSpec, metrics: Arc<Metrics>) -> Scheduler<S> {
        Scheduler {
            limits: spec.limits,
            prompt: spec.prompt,
            context_pages: Pool::new(spec.context_pages),
            tail_pages: Pool::new(spec.tail_pages),
            cache: spec.has_cache.then(PrefixCache::default),
            waiting: Vec::new(),
            running: Vec::new(),
            ended: Vec::new(),
            estimate: Estimate::default(),
            metrics,
        }
    }

    /// Takes in a request, which waits until there is room for it.
    pub fn enqueue(&mut self, prepared: Prepared, reply: Reply) {
        let (tokens, user) = (prepared.tokens(), prepared.request.user.as_deref());
        let pin = match &mut self.cache {
            None => Pin::default(),
            Some(cache) if self.prompt.is_whole() => cache.pin_whole(tokens),
            Some(cache) => cache.pin_prefix(tokens, user),
        };
        let waiting = prepared.waiting(demand(&prepared, tokens.len() - pin.tokens, 0));
        self.waiting.push(Entry { waiting, prepared, reply, pin, promise: None });
    }

    /// Whether nothing waits and nothing runs.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Those that run, in the order of their admission.
    pub fn running(&self) -> &[Running<S>] {
        &self.running
    }

    /// The slots of one that runs.
    pub fn slots_mut(&mut self, request: usize) -> &mut [Option<S>] {
        &mut self.running[request].slots
    }

    /// Ends a request that waits or runs; what it held is free at once.
    pub fn cancel(&mut self, id: RequestId) {
        self.end_if(|own, _| (own.id == id).then_some(Error::Cancelled));
    }

    /// Ends all requests.
    pub fn end_all(&mut self, error: impl Fn() -> Error) {
        self.end_if(|_, _| Some(error()));
    }

    /// Ends those whose deadlines went by, and those that wait and would miss them.
    pub fn expire(&mut self, now_us: Micros) {
        let mut at = 0;
        while let Some(running) = self.running.get(at) {
            match running.is_late(now_us) {
                true => {
                    let late = self.running.remove(at);
                    self.note_end(late.promise, now_us);
                    let error = late.prepared.deadline_exceeded(None);
                    self.fail(late.prepared, late.reply, error);
                }
                false => at += 1,
            }
        }
        if self.waiting.iter().all(|entry| entry.waiting.deadline_us.is_none()) {
            return;
        }
        let waiting: Vec<Waiting> = self.waiting.iter().map(|entry| entry.waiting).collect();
        let forecasts =
            schedule::judge(&waiting, &self.active(), &self.estimate, &self.limits, now_us);
        let mut at = 0;
        for forecast in forecasts {
            let entry = &mut self.waiting[at];
            if entry.waiting.deadline_us.is_some() && !entry.waiting.is_accepted {
                let is_refused = matches!(forecast.refusal, Some(Refusal::Overloaded { .. }));
                self.estimate.note_judged(is_refused);
            }
            let Some(refusal) = forecast.refusal else {
                entry.waiting.is_accepted = true;
                let promise = Promise { made_us: now_us, end_us: forecast.end_us };
                if entry.waiting.deadline_us.is_some() {
                    entry.promise.get_or_insert(promise);
                }
                at += 1;
                continue;
            };
            let Entry { prepared, reply, promise, .. } = self.take_waiting(at);
            self.note_end(promise, now_us);
            let retry_after_us = match refusal {
                Refusal::TooLate => None,
                Refusal::Overloaded { late_us } => Some(late_us),
            };
            self.metrics.request_forecast_late(retry_after_us.is_some());
            let error = prepared.deadline_exceeded(retry_after_us);
            self.fail(prepared, reply, error);
        }
    }

    /// What runs, as the scheduler's pure functions see it.
    fn active(&self) -> Vec<Active> {
        self.running.iter().map(Running::active).collect()
    }

    /// Learns from a request that ended what promises are worth.
    fn note_end(&mut self, promise: Option<Promise>, now_us: Micros) {
        if let Some(Promise { made_us, end_us }) = promise {
            self.estimate.note_request(end_us.saturating_sub(made_us), now_us - made_us);
        }
    }

    /// Takes out a request that waits; the cache need not keep its context any more.
    fn take_waiting(&mut self, at: usize) -> Entry {
        let mut entry = self.waiting.remove(at);
        self.unpin(std::mem::take(&mut entry.pin));
        entry
    }

    fn unpin(&mut self, pin: Pin) {
        if let Some(cache) = &mut self.cache {
            cache.unpin(pin);
        }
    }

    /// Ends a request that was taken out with an error.
    fn fail(&mut self, prepared: Prepared, reply: Reply, error: Error) {
        prepared.span.in_scope(|| self.metrics.request_failed(&error));
        self.ended.push((reply, Err(error)));
    }

    /// Tells all that runs of a step that went wrong, and forgets the KV that steps have kept.
    pub fn fail_running(&mut self, device: &str, reason: &str) {
        let error = || Error::Device { device: device.into(), reason: reason.into() };
        self.end_if(|_, is_running| is_running.then(error));
        self.clear_cache();
    }

    /// Ends the requests that run on a catalog whose file was written to.
    pub fn end_changed(&mut self) {
        self.end_if(|own, is_running| is_running.then(|| own.snapshot.check_file().err())?);
    }

    /// Ends the requests for which there is an error; `error` gets the request and whether it runs.
    fn end_if(&mut self, error: impl Fn(&Prepared, bool) -> Option<Error>) {
        let mut at = 0;
        while let Some(entry) = self.waiting.get(at) {
            match error(&entry.prepared, false) {
                Some(error) => {
                    let Entry { prepared, reply, .. } = self.take_waiting(at);
                    self.fail(prepared, reply, error);
                }
                None => at += 1,
            }
        }
        at = 0;
        while let Some(running) = self.running.get(at) {
            match error(&running.prepared, true) {
                Some(error) => {
                    let Running { prepared, reply, .. } = self.running.remove(at);
                    self.fail(prepared, reply, error);
                }
                None => at += 1,
            }
        }
    }

    /// Whether requests ended whose callers are not told yet.
    pub fn has_ended(&self) -> bool {
        !self.ended.is_empty()
    }

    /// Requests that ended since the last call, for their callers to be told.
    pub fn take_ended(&mut self) -> Vec<(Reply, Result<Answer>)> {
        std::mem::take(&mut self.ended)
    }

    /// Drops all contexts that are kept for requests to come.
    pub fn clear_cache(&mut self) {
        self.cache.iter_mut().for_each(PrefixCache::clear);
    }

    /// Where it counts.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Admits the requests for which there is room. `open` opens a slot of a request's program (by
    /// its number) on the pages of its context and of its tails.
    pub fn admit(
        &mut self,
        now_us: Micros,
        mut open: impl FnMut(&Prepared, usize, &[Page], &[Page]) -> S,
    ) {
        if self.waiting.is_empty() {
            return;
        }
        let waiting: Vec<Waiting> = self.waiting.iter().map(|entry| entry.waiting).collect();
        let room = Room {
            context_pages: self.free_context_pages(),
            tail_pages: self.tail_pages.num_free(),
        };
        let (running, limits) = (self.active(), self.limits);
        let admitted = schedule::admit(&waiting, &running, room, &self.estimate, &limits, now_us);
        for id in admitted {
            let at = self.waiting.iter().position(|entry| entry.waiting.id == id);
            let entry = self.take_waiting(at.expect("one that waits"));
            let Entry { waiting, prepared, reply, promise, .. } = entry;
            let found = self.lease_context(&prepared);
            let num_tokens = prepared.tokens().len();
            prepared.span.in_scope(|| self.metrics.request_admitted(num_tokens, found.tokens));
            self.estimate.note_admitted(demand(&prepared, num_tokens - found.tokens, 0).alone());
            let tails = self.tail_pages.take(prepared.needs.tail_pages);
            let tails = tails.expect("admitted with room");
            let mut rest = &tails[..];
            let mut lease = |count: usize| rest.split_off(..count).expect("pages for all slots");
            let slots = prepared.program.slots().iter().enumerate().map(|(slot, program)| {
                Some(open(&prepared, slot, &found.pages, lease(program.tail_pages())))
            });
            self.running.push(Running {
                reply,
                deadline_us: waiting.deadline_us,
                slots: slots.collect(),
                context: found.pages,
                tails,
                num_read: found.tokens,
                pieces_read: 0,
                steps_taken: 0,
                cached_tokens: found.tokens,
                promise,
                stepped_us: now_us,
                timings: Timings {
                    queued_us: now_us.saturating_sub(prepared.arrived_us),
                    levels_us: Vec::with_capacity(prepared.program.max_steps()),
                    ..Timings::default()
                },
                prepared,
            });
        }
    }

    /// What each request does in the next step. `num_rows` says how many rows one has in decode. Where
    /// several that drew tokens come to their searches at once, the newest may wait for a step.
    pub fn schedule(&self, num_rows: impl Fn(&Running<S>) -> usize) -> Vec<Scheduled> {
        let pace = self.estimate.pace();
        let unread = self.running.iter().filter(|running| running.num_unread() > 0);
        let reading: Vec<Reading> = unread.map(|running| self.reading(running, pace)).collect();
        let is_shared = reading.len() < self.running.len();
        let tokens = schedule::share_tokens(&reading, is_shared, pace, &self.limits);
        let mut tokens = tokens.into_iter();
        let mut beam_rows = 0;
        let scheduled = |(request, running): (usize, &Running<S>)| match running.num_unread() {
            0 => {
                let chunk = running.num_read..running.num_read;
                let num_rows = num_rows(running);
                if beam_rows > 0 && beam_rows + num_rows > self.limits.beam_rows {
                    return None;
                }
                beam_rows += num_rows;
                Some(Scheduled { request, chunk, pieces: None, num_rows })
            }
            _ => {
                let num_rows = tokens.next().expect("tokens for each prompt");
                (num_rows > 0).then(|| self.chunk(request, running, num_rows))
            }
        };
        self.running.iter().enumerate().filter_map(scheduled).collect()
    }

    /// What is left of a prompt, in tokens. Those of a prompt that is read in pieces are counted as
    /// if each piece read some to their end. An encoder reads a prompt in pieces if it is long.
    fn reading(&self, running: &Running<S>, pace: Pace) -> Reading {
        let (left, pieces_read) = (running.num_unread(), running.pieces_read);
        if !self.prompt.is_whole() {
            return Reading { left, grain: 1 };
        }
        if pieces_read == 0 && left <= pace.short {
            return Reading { left, grain: left };
        }
        let grain = left.div_ceil(self.prompt.num_pieces(left));
        Reading { left: left.saturating_sub(grain * pieces_read).max(1), grain }
    }

    /// The next `num_rows` tokens of a prompt, or as many pieces as they are worth.
    fn chunk(&self, request: usize, running: &Running<S>, num_rows: usize) -> Scheduled {
        let (len, first) = (running.prepared.tokens().len(), running.num_read);
        let is_all = running.pieces_read == 0 && num_rows == running.num_unread();
        if !self.prompt.is_whole() || is_all {
            return Scheduled { request, chunk: first..first + num_rows, pieces: None, num_rows };
        }
        let num_pieces = self.prompt.num_pieces(len);
        let from = running.pieces_read;
        let to = (from + num_rows.div_ceil(len.div_ceil(num_pieces))).min(num_pieces);
        Scheduled { request, chunk: 0..len, pieces: Some(from..to), num_rows }
    }

    /// Takes note of a step that was done: prompts are read so far, whole contexts are kept for
    /// requests to come.
    pub fn complete(&mut self, scheduled: &[Scheduled], now_us: Micros) {
        for Scheduled { request, chunk, pieces, .. } in scheduled {
            let running = &mut self.running[*request];
            let step_us = now_us.saturating_sub(running.stepped_us);
            running.stepped_us = now_us;
            if chunk.is_empty() {
                running.timings.levels_us.push(step_us);
                running.steps_taken += 1;
                continue;
            }
            running.timings.prefill_us += step_us;
            if let Some(pieces) = pieces {
                running.pieces_read = pieces.end;
                if pieces.end < self.prompt.num_pieces(chunk.end) {
                    continue;
                }
            }
            running.num_read = chunk.end;
            if running.num_unread() == 0 {
                // The search takes its first step with the end of its prompt, but not with a piece.
                running.steps_taken = usize::from(pieces.is_none());
                self.keep_context(*request);
            }
        }
    }

    /// Learns how long steps take.
    pub fn observe(&mut self, work: Work, took_us: Micros) {
        self.metrics.work(self.estimate.cost.predict_us(work), took_us);
        self.estimate.cost.observe(work, took_us);
    }

    /// Takes out the requests that have taken all their steps.
    pub fn take_finished(&mut self, is_finished: impl Fn(&Running<S>) -> bool) -> Vec<Running<S>> {
        self.running.extract_if(.., |running| is_finished(running)).collect()
    }

    /// Ends a request that was taken out with its answer.
    pub fn end(&mut self, finished: Running<S>, answer: Result<Answer>, now_us: Micros) {
        self.note_end(finished.promise, now_us);
        self.ended.push((finished.reply, answer));
    }

    /// What waits, what runs and what is free.
    pub fn status(&self) -> EngineStatus {
        EngineStatus {
            waiting: self.waiting.len(),
            running: self.running.len(),
            context_pages: self.context_pages.num_pages(),
            free_context_pages: self.context_pages.num_free(),
            cached_context_pages: self.cache.as_ref().map_or(0, PrefixCache::num_pages),
            tail_pages: self.tail_pages.num_pages(),
            free_tail_pages: self.tail_pages.num_free(),
            cache: self.cache.as_ref().map_or(CacheStats::default(), PrefixCache::stats),
            backlog_us: schedule::drain_us(
                self.waiting.iter().map(|entry| entry.waiting.demand),
                &self.active(),
                &self.estimate.cost,
                &self.limits,
            ),
        }
    }

    /// Whether every page is in exactly one place; if not, what is wrong.
    pub fn check_integrity(&self) -> std::result::Result<(), String> {
        let of_requests = self.running.iter().flat_map(|running| &running.context);
        let cached = self.cache.iter().flat_map(PrefixCache::pages);
        let held: HashSet<u32> = of_requests.chain(cached).map(Page::index).collect();
        check_pages("context", &self.context_pages, held)?;
        let tails = self.running.iter().flat_map(|running| &running.tails).map(Page::index);
        let held: HashSet<u32> = tails.clone().collect();
        if held.len() < tails.count() {
            return Err("two requests hold the same page of tails".into());
        }
        check_pages("tail", &self.tail_pages, held)
    }

    /// Pages for contexts that are free, or that the cache would give back if they are wanted.
    fn free_context_pages(&self) -> usize {
        let wanted: usize =
            self.waiting.iter().map(|entry| entry.waiting.needs.context_pages).sum();
        let free = self.context_pages.num_free();
        match &self.cache {
            Some(cache) if free < wanted => free + cache.num_unshared(),
            _ => free,
        }
    }

    /// The pages of a request's context, with the tokens that the cache has already.
    fn lease_context(&mut self, prepared: &Prepared) -> Found {
        let mut found = match &mut self.cache {
            None => Found::default(),
            Some(cache) if self.prompt.is_whole() => cache.match_whole(prepared.tokens()),
            Some(cache) => cache.match_prefix(prepared.tokens(), prepared.request.user.as_deref()),
        };
        let rest = prepared.needs.context_pages - found.pages.len();
        while self.context_pages.num_free() < rest {
            if self.cache.as_mut().is_some_and(PrefixCache::evict) {
                continue;
            }
            // The last that came give their contexts up, where nothing else is left.
            let pinned = self.waiting.iter_mut().rev().find(|entry| entry.pin.tokens > 0);
            let pin = pinned.map(|entry| std::mem::take(&mut entry.pin));
            self.unpin(pin.expect("what is admitted has room"));
        }
        found.pages.extend(self.context_pages.take(rest).expect("as many are free"));
        found
    }

    fn keep_context(&mut self, request: usize) {
        let Running { prepared, context, .. } = &self.running[request];
        // Pages that a later stage may fill hold none of the prompt.
        let context = &context[..pages::context_pages(prepared.tokens().len())];
        match &mut self.cache {
            None => {}
            Some(cache) if self.prompt.is_whole() => cache.insert_whole(prepared.tokens(), context),
            Some(cache) => {
                let user = prepared.request.user.as_deref();
                cache.insert_prefix(prepared.tokens(), context, user);
            }
        }
    }
}

fn check_pages(what: &str, pool: &Pool, held: HashSet<u32>) -> std::result::Result<(), String> {
    let free = pool.free_pages();
    let distinct: HashSet<u32> = free.iter().copied().collect();
    if distinct.len() < free.len() || !distinct.is_disjoint(&held) {
        return Err(format!("a {what} page is in two places"));
    }
    match free.len() + held.len() {
        all if all == pool.num_pages() => Ok(()),
        found => Err(format!("{found} of {} {what} pages are left", pool.num_pages())),
    }
}

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;
