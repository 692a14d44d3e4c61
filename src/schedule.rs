//! Who runs, and what each does in the next step.
//!
//! Two pure functions of what waits, what runs, what is free and what time it is; no clock is read
//! here and nothing is held, so every decision can be repeated.
//!
//! A request's needs are known when it arrives: pages for its context and its tails, and beam rows.
//! It is admitted when all of them are free, and then always finishes. Who is next goes in this
//! order, and who is next is waited for, so that a large request is not passed by for ever:
//!
//! 1. those that are **overdue**, by arrival: a request of priority class `c` is, once it has
//!    waited `(c + 1) * ageing`;
//! 2. the others by class, then deadline (earliest first), then arrival.
//!
//! So nobody waits longer than `(c + 1) * ageing` and the time for what runs and what arrived
//! before.

use std::cmp::Reverse;

/// Names a request from its arrival to its answer; later ones have larger numbers.
pub type RequestId = u64;

/// A moment, in microseconds since the engine was opened.
pub type Micros = u64;

/// What bounds a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Beam rows of all requests that run. One request alone may have more.
    pub beam_rows: usize,
    /// Prompt tokens that one step reads. A prompt that cannot be cut may alone have more.
    pub prompt_tokens: usize,
    /// How long a request of the first class waits before it is overdue, in microseconds.
    pub ageing_us: Micros,
}

/// What is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Pages for contexts, with those that a cache would give back.
    pub context_pages: usize,
    /// Pages for tails.
    pub tail_pages: usize,
}

/// What a request takes from its admission to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Needs {
    /// Pages for its context.
    pub context_pages: usize,
    /// Pages for the tails of its beams.
    pub tail_pages: usize,
    /// The most beam rows that it has in a step.
    pub beam_rows: usize,
}

/// A request that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiting {
    /// Which.
    pub id: RequestId,
    /// Its priority class; 0 goes first.
    pub class: u8,
    /// When it came.
    pub arrived_us: Micros,
    /// When its answer is of no use any more.
    pub deadline_us: Option<Micros>,
    /// What it takes.
    pub needs: Needs,
}

impl Waiting {
    fn is_overdue(&self, ageing_us: Micros, now_us: Micros) -> bool {
        let patience = ageing_us.saturating_mul(Micros::from(self.class) + 1);
        now_us.saturating_sub(self.arrived_us) >= patience
    }
}

/// The requests to admit now, in order. `rows` are the beam rows of those that run.
pub fn admit(
    waiting: &[Waiting],
    rows: usize,
    room: Room,
    limits: &Limits,
    now_us: Micros,
) -> Vec<RequestId> {
    let mut order: Vec<&Waiting> = waiting.iter().collect();
    order.sort_by_key(|request| {
        let is_overdue = request.is_overdue(limits.ageing_us, now_us);
        let urgency = match is_overdue {
            true => (0, 0),
            false => (request.class, request.deadline_us.unwrap_or(Micros::MAX)),
        };
        (Reverse(is_overdue), urgency, request.arrived_us, request.id)
    });
    let (mut room, mut rows) = (room, rows);
    let mut admitted = Vec::new();
    for Waiting { id, needs, .. } in order {
        let fits_rows = rows == 0 || rows + needs.beam_rows <= limits.beam_rows;
        let fits_room =
            needs.context_pages <= room.context_pages && needs.tail_pages <= room.tail_pages;
        if !fits_rows || !fits_room {
            break;
        }
        rows += needs.beam_rows;
        room.context_pages -= needs.context_pages;
        room.tail_pages -= needs.tail_pages;
        admitted.push(*id);
    }
    admitted
}

/// How long requests run, from admission to answer: what has been seen lately, with a margin for
/// what varies (the estimate of TCP's retransmission timer, Jacobson 1988).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RunTime {
    mean_us: Micros,
    deviation_us: Micros,
}

impl RunTime {
    /// Takes note of a request that ran so long.
    pub fn note(&mut self, run_us: Micros) {
        if self.mean_us == 0 {
            (self.mean_us, self.deviation_us) = (run_us, run_us / 2);
            return;
        }
        self.deviation_us = (3 * self.deviation_us + self.mean_us.abs_diff(run_us)) / 4;
        self.mean_us = (7 * self.mean_us + run_us) / 8;
    }

    /// What all but a few requests stay below.
    pub fn expected_us(&self) -> Micros {
        self.mean_us + 4 * self.deviation_us
    }
}

/// Whether a request that waits cannot be answered in time any more. While nothing runs it is tried
/// in any case, so that one slow request does not keep others out for ever.
pub fn is_hopeless(
    request: &Waiting,
    run_time: &RunTime,
    is_anything_running: bool,
    now_us: Micros,
) -> bool {
    let run_us = if is_anything_running { run_time.expected_us() } else { 0 };
    request.deadline_us.is_some_and(|deadline| now_us.saturating_add(run_us) >= deadline)
}

/// A request whose prompt is not read to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading {
    /// Tokens that are not read yet, at least one.
    pub left: usize,
    /// Whether they may be read in several steps.
    pub is_divisible: bool,
}

/// How many tokens of each prompt the next step reads, in the order of admission. The first always
/// gets some.
pub fn share_tokens(reading: &[Reading], limits: &Limits) -> Vec<usize> {
    let mut left = limits.prompt_tokens.max(1);
    let mut is_first = true;
    let share = |prompt: &Reading| {
        let tokens = match prompt.is_divisible {
            true => prompt.left.min(left),
            false if is_first || prompt.left <= left => prompt.left,
            false => 0,
        };
        // Who comes later does not pass one that had to wait.
        left = if tokens < prompt.left { 0 } else { left.saturating_sub(tokens) };
        is_first = false;
        tokens
    };
    reading.iter().map(share).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { beam_rows: 100, prompt_tokens: 50, ageing_us: 1000 };
    const ROOM: Room = Room { context_pages: 10, tail_pages: 10 };

    fn waiting(id: RequestId, class: u8, deadline_us: Option<Micros>, beam_rows: usize) -> Waiting {
        let needs = Needs { context_pages: 2, tail_pages: 1, beam_rows };
        Waiting { id, class, arrived_us: id, deadline_us, needs }
    }

    #[test]
    fn the_order_is_class_then_deadline_then_arrival() {
        let all = [
            waiting(1, 1, Some(5), 1),
            waiting(2, 0, None, 1),
            waiting(3, 0, Some(90), 1),
            waiting(4, 0, Some(80), 1),
        ];
        assert_eq!(admit(&all, 0, ROOM, &LIMITS, 10), [4, 3, 2, 1]);
        // At 1004 the first class is overdue, at 2001 all are.
        assert_eq!(admit(&all, 0, ROOM, &LIMITS, 1004), [2, 3, 4, 1]);
        assert_eq!(admit(&all, 0, ROOM, &LIMITS, 2001), [1, 2, 3, 4]);
    }

    #[test]
    fn a_request_is_given_up_when_it_could_not_run_in_time() {
        let mut run_time = RunTime::default();
        let request = waiting(0, 0, Some(1000), 1);
        assert!(!is_hopeless(&request, &run_time, true, 999));
        assert!(is_hopeless(&request, &run_time, false, 1000));
        (0..100).for_each(|_| run_time.note(300));
        assert!((300..310).contains(&run_time.expected_us()), "{run_time:?}");
        assert!(!is_hopeless(&request, &run_time, true, 600));
        assert!(is_hopeless(&request, &run_time, true, 701));
        assert!(!is_hopeless(&request, &run_time, false, 701), "nothing else runs");
        run_time.note(700);
        assert!(run_time.expected_us() > 700, "what varies gets a margin");
        assert!(!is_hopeless(&waiting(0, 0, None, 1), &run_time, true, Micros::MAX));
    }

    #[test]
    fn who_is_next_is_waited_for() {
        let all = [waiting(1, 0, None, 60), waiting(2, 0, None, 60), waiting(3, 0, None, 1)];
        assert_eq!(admit(&all, 0, ROOM, &LIMITS, 0), [1]);
        assert_eq!(admit(&all, 40, ROOM, &LIMITS, 0), [1]);
        assert!(admit(&all, 41, ROOM, &LIMITS, 0).is_empty());
        let narrow = Room { context_pages: 3, ..ROOM };
        assert_eq!(admit(&all[1..], 0, narrow, &LIMITS, 0), [2]);
        // One that is larger than the limit runs alone.
        assert_eq!(admit(&[waiting(1, 0, None, 300)], 0, ROOM, &LIMITS, 0), [1]);
        assert!(admit(&[waiting(1, 0, None, 300)], 1, ROOM, &LIMITS, 0).is_empty());
    }

    #[test]
    fn prompts_share_the_tokens_of_a_step_in_order() {
        let share = |prompts: &[(usize, bool)]| {
            let reading =
                prompts.iter().map(|&(left, is_divisible)| Reading { left, is_divisible });
            share_tokens(&reading.collect::<Vec<_>>(), &LIMITS)
        };
        assert_eq!(share(&[(30, true), (40, true), (5, true)]), [30, 20, 0]);
        assert_eq!(share(&[(30, false), (30, false), (5, false)]), [30, 0, 0]);
        assert_eq!(share(&[(300, false), (1, false)]), [300, 0]);
        assert_eq!(share(&[(50, true), (1, true)]), [50, 0]);
    }
}
