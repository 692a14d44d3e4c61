//! The requests that wait and run, and one step of them.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use super::job::Job;
use super::{Engine, EngineStatus, timed};
use crate::answer::Answer;
use crate::backend::{Backend, Batch, MemorySpec, SearchRule, SlotSpec};
use crate::error::{Error, Result};
use crate::models::{ForwardPass, Model};
use crate::pages::{Page, Pool};
use crate::prefix_cache::{CacheStats, Found, PrefixCache};
use crate::schedule::{self, Micros, Reading, RequestId, Room, RunTime, Waiting};

/// Rows below which a step is not worth being cut into parts.
const ROWS_PER_PART: usize = 16;

/// All requests of an engine, and the memory that they share.
pub(super) struct Load<B: Backend> {
    model: Arc<dyn Model<B>>,
    weights_version: u64,
    memory: B::Memory,
    context_pages: Pool,
    tail_pages: Pool,
    cache: Option<PrefixCache>,
    waiting: Vec<(Waiting, Job)>,
    /// In the order of their admission.
    running: Vec<Running<B>>,
    /// One for each part of a step.
    lanes: Vec<Lane<B>>,
    answers: Vec<(RequestId, Result<Answer>)>,
    run_time: RunTime,
    next_id: RequestId,
}

/// A request that was admitted. Its pages are free when it is dropped.
struct Running<B: Backend> {
    id: RequestId,
    job: Job,
    admitted_us: Micros,
    deadline_us: Option<Micros>,
    context: Vec<Page>,
    tails: Vec<Page>,
    /// One for each search; lent to the part that works on them.
    slots: Vec<Option<B::Slot>>,
    /// Tokens of the context that are there.
    read: usize,
    cached_tokens: usize,
}

impl<B: Backend> Running<B> {
    fn left(&self) -> usize {
        self.job.tokens.len() - self.read
    }

    fn is_late(&self, now_us: Micros) -> bool {
        self.deadline_us.is_some_and(|deadline| deadline <= now_us)
    }
}

/// Activations of one part of a step, kept from step to step.
struct Lane<B: Backend> {
    pass: Box<dyn ForwardPass<B>>,
    logits: B::Logits,
}

/// What one thread, or all together, work on in a step.
struct Part<B: Backend> {
    tokens: Vec<u32>,
    chunks: Vec<Range<usize>>,
    /// Those whose prompt goes on, those whose prompt ends, those with beams.
    slots: Vec<B::Slot>,
    /// Of each slot: the request among those that run, and the search.
    owners: Vec<(usize, usize)>,
    num_unfinished: usize,
}

/// A request's share in a step.
struct Share {
    request: usize,
    /// Tokens of the prompt that are read.
    chunk: Range<usize>,
    rows: usize,
}

impl<B: Backend> Load<B> {
    pub fn new(
        backend: &B,
        model: Arc<dyn Model<B>>,
        spec: &MemorySpec,
        has_cache: bool,
    ) -> Result<Load<B>> {
        Ok(Load {
            model,
            weights_version: 1,
            memory: backend.memory(spec)?,
            context_pages: Pool::new(spec.context_pages),
            tail_pages: Pool::new(spec.tail_pages),
            cache: has_cache.then(PrefixCache::default),
            waiting: Vec::new(),
            running: Vec::new(),
            lanes: Vec::new(),
            answers: Vec::new(),
            run_time: RunTime::default(),
            next_id: 0,
        })
    }

    pub fn enqueue(&mut self, job: Job) -> RequestId {
        self.next_id += 1;
        let deadline = |within| job.arrived_us.saturating_add(micros(within));
        let waiting = Waiting {
            id: self.next_id,
            class: job.request.priority as u8,
            arrived_us: job.arrived_us,
            deadline_us: job.deadline().map(deadline),
            needs: job.needs,
        };
        self.waiting.push((waiting, job));
        self.next_id
    }

    /// Takes a network with other weights, and returns their version. Nothing may be running.
    pub fn replace_model(&mut self, model: Arc<dyn Model<B>>) -> u64 {
        assert!(self.running.is_empty(), "no request sees two weights");
        self.model = model;
        self.lanes.clear();
        self.cache.iter_mut().for_each(PrefixCache::clear);
        self.weights_version += 1;
        self.weights_version
    }

    pub fn cancel(&mut self, id: RequestId) {
        self.waiting.retain(|(waiting, _)| waiting.id != id);
        self.running.retain(|running| running.id != id);
        self.answers.retain(|(answered, _)| *answered != id);
    }

    pub fn take_answer(&mut self, id: RequestId) -> Option<Result<Answer>> {
        let at = self.answers.iter().position(|(answered, _)| *answered == id)?;
        Some(self.answers.swap_remove(at).1)
    }

    /// Whether nothing waits and nothing runs.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Forgets what was computed and measured.
    pub fn forget(&mut self) {
        self.cache = self.cache.as_ref().map(|_| PrefixCache::default());
        self.run_time = RunTime::default();
    }

    /// Tells all that runs of a step that went wrong, and forgets what steps have kept.
    fn fail_running(&mut self, device: &str, reason: &str) {
        for running in self.running.drain(..) {
            let error = Error::Device { device: device.into(), reason: reason.into() };
            self.answers.push((running.id, Err(error)));
        }
        self.cache.iter_mut().for_each(PrefixCache::clear);
    }

    pub fn take_answers(&mut self) -> Vec<(RequestId, Result<Answer>)> {
        std::mem::take(&mut self.answers)
    }

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

    /// Answers those whose deadline went by, or would.
    fn give_up_late(&mut self, now_us: Micros) {
        let (run_time, is_busy) = (&self.run_time, !self.running.is_empty());
        let answers = &mut self.answers;
        self.waiting.retain(|(waiting, job)| {
            let is_late = schedule::is_hopeless(waiting, run_time, is_busy, now_us);
            if is_late {
                answers.push((waiting.id, Err(job.deadline_exceeded())));
            }
            !is_late
        });
        self.running.retain(|running| {
            let is_late = running.is_late(now_us);
            if is_late {
                answers.push((running.id, Err(running.job.deadline_exceeded())));
            }
            !is_late
        });
    }

    /// Pages for contexts that are free, or that the cache would give back if they are wanted.
    fn free_context_pages(&self) -> usize {
        let wanted: usize =
            self.waiting.iter().map(|(waiting, _)| waiting.needs.context_pages).sum();
        let free = self.context_pages.num_free();
        match &self.cache {
            Some(cache) if free < wanted => free + cache.num_unshared(),
            _ => free,
        }
    }

    /// The pages of a request's context, with what is there already.
    fn lease_context(&mut self, job: &Job, has_encoder: bool) -> Found {
        let mut found = match &mut self.cache {
            None => Found::default(),
            Some(cache) if has_encoder => cache.match_whole(&job.tokens),
            Some(cache) => cache.match_prefix(&job.tokens, job.request.user.as_deref()),
        };
        let rest = job.needs.context_pages - found.pages.len();
        while self.context_pages.num_free() < rest {
            let dropped = self.cache.as_mut().is_some_and(PrefixCache::evict);
            assert!(dropped, "what is admitted has room");
        }
        found.pages.extend(self.context_pages.take(rest).expect("as many are free"));
        found
    }

    fn keep_context(&mut self, request: usize, has_encoder: bool) {
        let Running { job, context, .. } = &self.running[request];
        match &mut self.cache {
            None => {}
            Some(cache) if has_encoder => cache.insert_whole(&job.tokens, context),
            Some(cache) => cache.insert_prefix(&job.tokens, context, job.request.user.as_deref()),
        }
    }
}

impl<B: Backend> Engine<B> {
    /// One step of all requests.
    pub(super) fn step_load(&self, load: &mut Load<B>) {
        let now_us = self.now_us();
        load.give_up_late(now_us);
        self.admit(load, now_us);
        self.step_running(load);
    }

    /// Steps until nothing runs any more; nothing is admitted meanwhile.
    pub(super) fn finish_running(&self, load: &mut Load<B>) {
        while !load.running.is_empty() {
            self.step_running(load);
        }
    }

    fn step_running(&self, load: &mut Load<B>) {
        let shares = self.shares(load);
        if shares.is_empty() {
            return;
        }
        let mut parts = self.parts(load, &shares);
        while load.lanes.len() < parts.len() {
            let pass = Arc::clone(&load.model).new_pass(&self.backend);
            load.lanes.push(Lane { pass, logits: self.backend.logits() });
        }
        let (model, memory, running) = (&*load.model, &load.memory, &load.running);
        match &mut parts[..] {
            [part] => {
                let lane = &mut load.lanes[0];
                self.pool.install(|| self.run_part(model, part, running, memory, lane));
            }
            parts => self.pool.in_place_scope(|scope| {
                for ((part, lane), worker) in
                    parts.iter_mut().zip(&mut load.lanes).zip(&self.workers)
                {
                    scope.spawn(move |_| {
                        worker.install(|| self.run_part(model, part, running, memory, lane));
                    });
                }
            }),
        }
        for part in parts {
            for (slot, (request, search)) in part.slots.into_iter().zip(part.owners) {
                load.running[request].slots[search] = Some(slot);
            }
        }
        for share in shares.iter().filter(|share| !share.chunk.is_empty()) {
            load.running[share.request].read = share.chunk.end;
            if load.running[share.request].left() == 0 {
                load.keep_context(share.request, self.spec.prompt.is_whole());
            }
        }
        self.finish(load);
        if let Err(Error::Device { device, reason }) = self.backend.take_failure() {
            load.fail_running(&device, &reason);
        }
    }

    fn admit(&self, load: &mut Load<B>, now_us: Micros) {
        if load.waiting.is_empty() {
            return;
        }
        let spec = &self.spec;
        let waiting: Vec<Waiting> = load.waiting.iter().map(|(waiting, _)| *waiting).collect();
        let rows = load.running.iter().map(|running| running.job.needs.beam_rows).sum();
        let room = Room {
            context_pages: load.free_context_pages(),
            tail_pages: load.tail_pages.num_free(),
        };
        for id in schedule::admit(&waiting, rows, room, &self.limits, now_us) {
            let at = load.waiting.iter().position(|(waiting, _)| waiting.id == id);
            let (waiting, job) = load.waiting.remove(at.expect("one that waits"));
            let found = load.lease_context(&job, spec.prompt.is_whole());
            let tails = load.tail_pages.take(job.needs.tail_pages).expect("admitted with room");
            let pages = |pages: &[Page]| -> Vec<u32> { pages.iter().map(Page::index).collect() };
            let slot = |search: usize| {
                let tail_pages = job.tail_pages_per_search();
                let slot = self.backend.open_slot(SlotSpec {
                    context_pages: pages(&found.pages),
                    context_len: job.tokens.len(),
                    tail_pages: pages(&tails[search * tail_pages..(search + 1) * tail_pages]),
                    num_steps: self.num_steps(),
                    start_token: spec.prompt.start_token(),
                });
                slot.expect("an engine is opened for as many steps as the device takes")
            };
            load.running.push(Running {
                id,
                admitted_us: now_us,
                deadline_us: waiting.deadline_us,
                slots: (0..job.searches.len()).map(|search| Some(slot(search))).collect(),
                context: found.pages,
                tails,
                read: found.tokens,
                cached_tokens: found.tokens,
                job,
            });
        }
    }

    /// What each request does in this step: read a chunk of its prompt, or extend its beams.
    fn shares(&self, load: &Load<B>) -> Vec<Share> {
        let has_encoder = self.spec.prompt.is_whole();
        let is_reading = |running: &&Running<B>| running.left() > 0;
        let reading = load.running.iter().filter(is_reading);
        let reading: Vec<Reading> = reading
            .map(|running| Reading { left: running.left(), is_divisible: !has_encoder })
            .collect();
        let mut tokens = schedule::share_tokens(&reading, &self.limits).into_iter();
        let share = |(request, running): (usize, &Running<B>)| {
            let chunk = match running.left() {
                0 => running.read..running.read,
                _ => running.read..running.read + tokens.next().expect("a share for each"),
            };
            let beams = running.slots.iter().flatten().map(|slot| self.backend.num_beams(slot));
            let rows = match running.left() {
                0 => beams.sum(),
                _ => chunk.len(),
            };
            Share { request, chunk, rows }
        };
        let shares = load.running.iter().enumerate().map(share);
        shares
            .filter(|share| !share.chunk.is_empty() || load.running[share.request].left() == 0)
            .collect()
    }

    /// Cuts a step into parts of like size, one a worker, where that pays.
    fn parts(&self, load: &mut Load<B>, shares: &[Share]) -> Vec<Part<B>> {
        let rows: usize = shares.iter().map(|share| share.rows).sum();
        let most = self.workers.len().min(rows / ROWS_PER_PART).min(shares.len()).max(1);
        let mut members: Vec<(usize, Vec<&Share>)> = vec![(0, Vec::new()); most];
        let mut largest_first: Vec<&Share> = shares.iter().collect();
        largest_first.sort_by_key(|share| std::cmp::Reverse(share.rows));
        for share in largest_first {
            let least = members.iter_mut().min_by_key(|(rows, _)| *rows);
            let (rows, members) = least.expect("one part at least");
            *rows += share.rows;
            members.push(share);
        }
        let members = members.into_iter().map(|(_, members)| members);
        members.map(|members| self.part(load, &members)).collect()
    }

    fn part(&self, load: &mut Load<B>, members: &[&Share]) -> Part<B> {
        let has_encoder = self.spec.prompt.is_whole();
        let mut part = Part {
            tokens: Vec::new(),
            chunks: Vec::new(),
            slots: Vec::new(),
            owners: Vec::new(),
            num_unfinished: 0,
        };
        let mut beams = Vec::new();
        let goes_on =
            |share: &&&Share| share.chunk.end < load.running[share.request].job.tokens.len();
        let (unfinished, rest): (Vec<&Share>, Vec<&Share>) =
            members.iter().partition(|share| goes_on(share));
        part.num_unfinished = unfinished.len();
        for share in unfinished.iter().chain(&rest) {
            let running = &load.running[share.request];
            let len = running.job.tokens.len();
            for search in 0..running.slots.len() {
                let owner = (share.request, search);
                let chunk = match search {
                    _ if share.chunk.is_empty() => None,
                    0 => Some(share.chunk.clone()),
                    // The searches of one request have its context in common; the first reads it.
                    // Its last row scores the first step of all, unless a decoder does.
                    _ if share.chunk.end < len => continue,
                    _ if has_encoder => None,
                    _ => Some(len - 1..len),
                };
                match chunk {
                    None => beams.push(owner),
                    Some(chunk) => {
                        part.tokens.extend_from_slice(&running.job.tokens[chunk.clone()]);
                        part.chunks.push(chunk);
                        part.owners.push(owner);
                    }
                }
            }
        }
        // Searches at the same step stand together: one product gives the logits of all.
        beams.sort_by_key(|&(request, search)| {
            load.running[request].slots[search].as_ref().map(|slot| self.backend.num_steps(slot))
        });
        part.owners.extend(beams);
        let slots = part.owners.iter().map(|&(request, search)| {
            load.running[request].slots[search].take().expect("a slot is in one part")
        });
        part.slots = slots.collect();
        part
    }

    fn run_part(
        &self,
        model: &dyn Model<B>,
        part: &mut Part<B>,
        running: &[Running<B>],
        memory: &B::Memory,
        lane: &mut Lane<B>,
    ) {
        let backend = &self.backend;
        let Part { tokens, chunks, slots, owners, num_unfinished } = part;
        let Lane { pass, logits } = lane;
        let clock = match chunks.is_empty() {
            true => &self.phases.decode,
            false => &self.phases.prefill,
        };
        let rule = |(&(request, search), slot): (&(usize, usize), &B::Slot)| -> SearchRule<'_> {
            running[request].job.rule(search, backend.num_steps(slot), &self.layout)
        };
        let rules: Vec<SearchRule<'_>> =
            owners.iter().zip(&*slots).skip(*num_unfinished).map(rule).collect();
        let head = model.head();
        let mut batch = Batch::new(memory, chunks, slots);
        backend.step(&mut batch, head, &rules, logits, |batch, logits| {
            timed(clock, || pass.run(backend, tokens, batch));
            if rules.is_empty() {
                return;
            }
            let beams = &mut batch.beams_from(*num_unfinished);
            timed(&self.phases.search, || {
                backend.lm_head(pass.output(), head, &rules, beams, logits);
                backend.advance_beams(logits, head, &rules, beams);
            });
        });
    }

    /// Answers the requests that have taken all steps.
    fn finish(&self, load: &mut Load<B>) {
        let num_steps = self.num_steps();
        let is_finished = |running: &Running<B>| {
            running.slots.iter().flatten().all(|slot| {
                self.backend.num_steps(slot) == num_steps || self.backend.num_beams(slot) == 0
            })
        };
        let (version, answers) = (load.weights_version, &mut load.answers);
        // All that are finished are read at once: where a device computes, this waits for it.
        let finished = load.running.iter().filter(|running| is_finished(running));
        let slots: Vec<&B::Slot> =
            finished.flat_map(|running| running.slots.iter().flatten()).collect();
        if slots.is_empty() {
            return;
        }
        let mut beams = self.backend.read_beams(&slots).into_iter();
        let now_us = self.now_us();
        let run_time = &mut load.run_time;
        load.running.retain(|running| {
            if !is_finished(running) {
                return true;
            }
            run_time.note(now_us.saturating_sub(running.admitted_us));
            let beams: Vec<_> = beams.by_ref().take(running.slots.len()).collect();
            let answer =
                self.answer(&running.job, running.cached_tokens, version, beams.into_iter());
            let answer = match running.is_late(now_us) {
                true => Err(running.job.deadline_exceeded()),
                false => answer,
            };
            answers.push((running.id, answer));
            false
        });
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

pub(super) fn micros(duration: Duration) -> Micros {
    duration.as_micros().try_into().unwrap_or(Micros::MAX)
}
