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
use crate::error::{Error, Result};
use crate::metrics::Metrics;
use crate::pages::{self, Page, Pool};
use crate::prefix_cache::{CacheStats, Found, PrefixCache};
use crate::schedule::{self, Limits, Micros, Reading, RequestId, Room, RunTime, Waiting};

/// How a scheduler is made.
pub(super) struct SchedulerSpec {
    pub limits: Limits,
    pub context_pages: usize,
    pub tail_pages: usize,
    pub has_cache: bool,
    /// Whether a prompt is read as a whole, by an encoder, and cached as a whole.
    pub is_prompt_whole: bool,
}

/// The requests of an engine, and the memory that they share.
pub(super) struct Scheduler<S> {
    limits: Limits,
    is_prompt_whole: bool,
    context_pages: Pool,
    tail_pages: Pool,
    cache: Option<PrefixCache>,
    waiting: Vec<(Waiting, Prepared, Reply)>,
    /// In the order of their admission.
    running: Vec<Running<S>>,
    /// Requests that ended, whose callers are not told yet.
    ended: Vec<(Reply, Result<Answer>)>,
    run_time: RunTime,
    metrics: Arc<Metrics>,
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
    pub cached_tokens: usize,
    admitted_us: Micros,
    /// When the last step ended that the request had a part in.
    stepped_us: Micros,
    timings: Timings,
}

impl<S> Running<S> {
    /// Prompt tokens that are not read yet.
    pub fn num_unread(&self) -> usize {
        self.prepared.tokens().len() - self.num_read
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
    pub num_rows: usize,
}

impl<S> Scheduler<S> {
    pub fn new(spec: &SchedulerSpec, metrics: Arc<Metrics>) -> Scheduler<S> {
        Scheduler {
            limits: spec.limits,
            is_prompt_whole: spec.is_prompt_whole,
            context_pages: Pool::new(spec.context_pages),
            tail_pages: Pool::new(spec.tail_pages),
            cache: spec.has_cache.then(PrefixCache::default),
            waiting: Vec::new(),
            running: Vec::new(),
            ended: Vec::new(),
            run_time: RunTime::default(),
            metrics,
        }
    }

    /// Takes in a request, which waits until there is room for it.
    pub fn enqueue(&mut self, prepared: Prepared, reply: Reply) {
        self.waiting.push((prepared.waiting(), prepared, reply));
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

    /// Ends those whose deadline went by, or would.
    pub fn expire(&mut self, now_us: Micros) {
        let (run_time, is_busy) = (self.run_time, !self.running.is_empty());
        let waiting = self.waiting.extract_if(.., |(waiting, _, _)| {
            schedule::is_hopeless(waiting, &run_time, is_busy, now_us)
        });
        let waiting = waiting.map(|(_, prepared, reply)| (prepared, reply));
        let running = self.running.extract_if(.., |running| running.is_late(now_us));
        let late = waiting.chain(running.map(|Running { prepared, reply, .. }| (prepared, reply)));
        self.ended.extend(late.map(|(prepared, reply)| {
            let error = prepared.deadline_exceeded();
            prepared.span.in_scope(|| self.metrics.request_failed(&error));
            (reply, Err(error))
        }));
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
        let metrics = &self.metrics;
        let mut end = |prepared: Prepared, reply, error| {
            prepared.span.in_scope(|| metrics.request_failed(&error));
            self.ended.push((reply, Err(error)));
        };
        let mut at = 0;
        while let Some((_, prepared, _)) = self.waiting.get(at) {
            match error(prepared, false) {
                Some(error) => {
                    let (_, prepared, reply) = self.waiting.remove(at);
                    end(prepared, reply, error);
                }
                None => at += 1,
            }
        }
        at = 0;
        while let Some(running) = self.running.get(at) {
            match error(&running.prepared, true) {
                Some(error) => {
                    let Running { prepared, reply, .. } = self.running.remove(at);
                    end(prepared, reply, error);
                }
                None => at += 1,
            }
        }
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
        let waiting: Vec<Waiting> = self.waiting.iter().map(|(waiting, ..)| *waiting).collect();
        let rows = self.running.iter().map(|running| running.prepared.needs.beam_rows).sum();
        let room = Room {
            context_pages: self.free_context_pages(),
            tail_pages: self.tail_pages.num_free(),
        };
        for id in schedule::admit(&waiting, rows, room, &self.limits, now_us) {
            let at = self.waiting.iter().position(|(waiting, ..)| waiting.id == id);
            let (waiting, prepared, reply) = self.waiting.remove(at.expect("one that waits"));
            let found = self.lease_context(&prepared);
            let num_tokens = prepared.tokens().len();
            prepared.span.in_scope(|| self.metrics.request_admitted(num_tokens, found.tokens));
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
                cached_tokens: found.tokens,
                admitted_us: now_us,
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

    /// What each request does in the next step. `num_rows` says how many rows one has in decode.
    pub fn schedule(&self, num_rows: impl Fn(&Running<S>) -> usize) -> Vec<Scheduled> {
        let reading = self.running.iter().filter(|running| running.num_unread() > 0);
        let reading: Vec<Reading> = reading
            .map(|running| Reading {
                left: running.num_unread(),
                is_divisible: !self.is_prompt_whole,
            })
            .collect();
        let mut tokens = schedule::share_tokens(&reading, &self.limits).into_iter();
        let scheduled = |(request, running): (usize, &Running<S>)| match running.num_unread() {
            0 => {
                let chunk = running.num_read..running.num_read;
                Some(Scheduled { request, chunk, num_rows: num_rows(running) })
            }
            _ => {
                let num_rows = tokens.next().expect("tokens for each prompt");
                let chunk = running.num_read..running.num_read + num_rows;
                (num_rows > 0).then_some(Scheduled { request, chunk, num_rows })
            }
        };
        self.running.iter().enumerate().filter_map(scheduled).collect()
    }

    /// Takes note of a step that was done: prompts are read so far, whole contexts are kept for
    /// requests to come.
    pub fn complete(&mut self, scheduled: &[Scheduled], now_us: Micros) {
        for Scheduled { request, chunk, .. } in scheduled {
            let running = &mut self.running[*request];
            let step_us = now_us.saturating_sub(running.stepped_us);
            running.stepped_us = now_us;
            if chunk.is_empty() {
                running.timings.levels_us.push(step_us);
                continue;
            }
            running.timings.prefill_us += step_us;
            running.num_read = chunk.end;
            if running.num_unread() == 0 {
                self.keep_context(*request);
            }
        }
    }

    /// Takes out the requests that have taken all their steps.
    pub fn take_finished(&mut self, is_finished: impl Fn(&Running<S>) -> bool) -> Vec<Running<S>> {
        self.running.extract_if(.., |running| is_finished(running)).collect()
    }

    /// Ends a request that was taken out with its answer.
    pub fn end(&mut self, finished: Running<S>, answer: Result<Answer>, now_us: Micros) {
        self.run_time.note(now_us.saturating_sub(finished.admitted_us));
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
            self.waiting.iter().map(|(waiting, ..)| waiting.needs.context_pages).sum();
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
            Some(cache) if self.is_prompt_whole => cache.match_whole(prepared.tokens()),
            Some(cache) => cache.match_prefix(prepared.tokens(), prepared.request.user.as_deref()),
        };
        let rest = prepared.needs.context_pages - found.pages.len();
        while self.context_pages.num_free() < rest {
            let evicted = self.cache.as_mut().is_some_and(PrefixCache::evict);
            assert!(evicted, "what is admitted has room");
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
            Some(cache) if self.is_prompt_whole => cache.insert_whole(prepared.tokens(), context),
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
mod tests {
    use std::sync::atomic::AtomicU64;
    use std::sync::mpsc::{Receiver, channel};
    use std::time::Instant;

    use super::super::prepare::{Arrival, Preparer};
    use super::*;
    use crate::catalog::sid::Sid;
    use crate::catalog::{CatalogBuilder, Item};
    use crate::models::PromptKind;
    use crate::models::config::{Prompt, SidLayout};
    use crate::models::vocabulary::Vocabulary;
    use crate::request::Request;
    use crate::search::Normalization;

    const SPEC: SchedulerSpec = SchedulerSpec {
        limits: Limits { beam_rows: 8, prompt_tokens: 100, ageing_us: 1000 },
        context_pages: 4,
        tail_pages: 6,
        has_cache: true,
        is_prompt_whole: false,
    };

    fn preparer() -> Preparer {
        let mut builder = CatalogBuilder::default();
        builder.add(Item::new("a", Sid::new(&[0, 1]).expect("two levels"))).expect("an item");
        Preparer {
            catalog: Arc::new(builder.build().expect("a catalog")),
            layout: SidLayout {
                levels: vec![vec![1, 2], vec![3, 4]],
                prompt: Prompt::default(),
                forced: None,
                suffix: Vec::new(),
                vocabulary: Vocabulary::default(),
                normalization: Normalization::Vocabulary,
            },
            vocab_size: 5,
            prompt: PromptKind::Chunked,
            max_positions: None,
            max_steps: 10,
            max_context: 1000,
            forced_len: 0,
            context_pages: SPEC.context_pages,
            tail_pages: SPEC.tail_pages,
            opened: Instant::now(),
            last_id: AtomicU64::new(0),
            metrics: Arc::default(),
        }
    }

    type Told = Receiver<Result<Answer>>;

    /// A request of two steps, and where it is told.
    fn enqueue(scheduler: &mut Scheduler<usize>, id: u64, tokens: u32, deadline_us: u64) -> Told {
        let tokens: Vec<u32> = (0..tokens).map(|n| (n + id as u32) % 5).collect();
        let mut request = Request::from_tokens(tokens);
        request.beams = 4;
        request.deadline = Some(std::time::Duration::from_micros(deadline_us));
        let arrival = Arrival { id, arrived_us: 0 };
        let prepared = preparer().prepare_at(arrival, request).expect("a sound request");
        let (sender, told) = channel();
        scheduler.enqueue(prepared, Reply::new(move |answer| drop(sender.send(answer))));
        told
    }

    fn ids(scheduler: &Scheduler<usize>) -> Vec<u64> {
        scheduler.running().iter().map(|running| running.prepared.id).collect()
    }

    #[test]
    fn requests_run_when_there_is_room_and_give_their_pages_back() {
        let mut scheduler: Scheduler<usize> = Scheduler::new(&SPEC, Arc::default());
        let told: Vec<Told> = (1..5).map(|id| enqueue(&mut scheduler, id, 128, u64::MAX)).collect();
        scheduler.admit(5, |_, _, context, tails| context.len() + tails.len());
        // Two pages of context and three of tails each: two requests have room.
        assert_eq!(ids(&scheduler), [1, 2]);
        assert_eq!(scheduler.running()[0].slots, [Some(5)]);
        scheduler.check_integrity().expect("all pages");

        // Prompts share the tokens of a step in order of admission.
        let scheduled = scheduler.schedule(|_| 1);
        let chunks: Vec<_> = scheduled.iter().map(|scheduled| scheduled.chunk.clone()).collect();
        assert_eq!((chunks.len(), chunks[0].clone()), (1, 0..100));
        scheduler.complete(&scheduled, 10);
        let scheduled = scheduler.schedule(|_| 1);
        let chunks: Vec<_> = scheduled.iter().map(|scheduled| scheduled.chunk.clone()).collect();
        assert_eq!(chunks, [100..128, 0..72]);
        scheduler.complete(&scheduled, 17);
        let scheduled = scheduler.schedule(|_| 3);
        assert_eq!((scheduled[0].chunk.len(), scheduled[0].num_rows), (0, 3));
        scheduler.complete(&scheduled, 20);

        let mut finished = scheduler.take_finished(|running| running.prepared.id == 1);
        let mut first = finished.remove(0);
        let timings = first.timings(21);
        assert_eq!((timings.queued_us, timings.prefill_us), (5, 12));
        assert_eq!((timings.levels_us, timings.total_us), (vec![3], 21));
        scheduler.end(first, Err(Error::EmptyInput), 21);
        scheduler.cancel(2);
        for (reply, answer) in scheduler.take_ended() {
            reply.send(answer);
        }
        assert!(matches!(told[0].try_recv(), Ok(Err(Error::EmptyInput))));
        assert!(matches!(told[1].try_recv(), Ok(Err(Error::Cancelled))));
        scheduler.check_integrity().expect("all pages");

        // The first context is cached, and evicted for those that wait.
        assert!(scheduler.status().cached_context_pages > 0);
        scheduler.admit(22, |_, _, _, _| 0);
        assert_eq!(ids(&scheduler), [3, 4]);
        scheduler.check_integrity().expect("all pages");
        scheduler.end_all(|| Error::ShuttingDown);
        assert!(scheduler.is_idle());
        drop(scheduler);
        assert!(told[2].try_recv().expect("it is told").is_err());
    }

    #[test]
    fn a_deadline_that_goes_by_ends_a_request_that_waits_or_runs() {
        let mut scheduler: Scheduler<usize> = Scheduler::new(&SPEC, Arc::default());
        let runs = enqueue(&mut scheduler, 1, 10, 50);
        scheduler.admit(0, |_, _, _, _| 0);
        let waits = enqueue(&mut scheduler, 2, 10, 40);
        scheduler.expire(39);
        assert!(scheduler.take_ended().is_empty());
        scheduler.expire(40);
        assert_eq!((ids(&scheduler), scheduler.status().waiting), (vec![1], 0));
        scheduler.expire(50);
        assert!(scheduler.is_idle());
        for (reply, answer) in scheduler.take_ended() {
            reply.send(answer);
        }
        for told in [runs, waits] {
            assert!(matches!(told.try_recv(), Ok(Err(Error::DeadlineExceeded { .. }))));
        }
        scheduler.check_integrity().expect("all pages");
    }
}
