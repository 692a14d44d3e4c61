//! The scheduler step by step.

use std::sync::atomic::AtomicU64;
use std::sync::mpsc::{Receiver, channel};
use std::time::Instant;

use super::super::prepare::{Arrival, Preparer};
use super::*;
use crate::catalog::sid::Sid;
use crate::catalog::{CatalogBuilder, Item};
use crate::models::config::{Prompt, SidLayout};
use crate::models::vocabulary::Vocabulary;
use crate::request::Request;
use crate::search::Normalization;

pub(super) const SPEC: SchedulerSpec = SchedulerSpec {
    limits: Limits { beam_rows: 8, prompt_tokens: 100, ageing_us: 1000 },
    context_pages: 4,
    tail_pages: 6,
    has_cache: true,
    prompt: PromptKind::Chunked,
};

pub(super) fn preparer() -> Preparer {
    let mut builder = CatalogBuilder::default();
    builder.add(Item::new("a", Sid::new(&[0, 1]).expect("two levels"))).expect("an item");
    Preparer {
        catalog: Arc::new(builder.build().expect("a catalog")),
        phrases: None,
        thoughts: Ok(()),
        free_samples: Ok(()),
        words: None,
        layout: SidLayout {
            phrases: None,
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
