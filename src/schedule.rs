//! Who runs, who is refused, and what each does in the next step.
//!
//! Pure functions of what waits, what runs, what is free, what time it is and what time is expected to
//! be taken ([`cost`](crate::cost)); no clock is read here and nothing is held, so every decision can
//! be repeated.
//!
//! A request's needs are known when it arrives: pages for its context and its tails, and beam rows.
//! It is admitted when all of them are free, and then always finishes. Requests wait in this order,
//! and the first is waited for, so that a large request is not passed by for ever:
//!
//! 1. those that are **overdue**, by arrival: a request of priority class `c` is, once it has
//!    waited `(c + 1) * ageing`;
//! 2. the others by class, then deadline (earliest first), then arrival.
//!
//! So nobody waits longer than `(c + 1) * ageing` and the time for what runs and what arrived
//! before.
//!
//! Requests with deadlines are admitted only as far as they can be met. [`judge`] forecasts when each
//! one that waits would be answered, behind what runs and what goes before it, and refuses those that
//! would be late; they count for nothing in the forecasts of others. [`admit`] does not let a request in
//! that would make one late that runs. So under overload the engine works on requests that it will
//! finish, and the others know at once.

use std::cmp::Reverse;

use crate::cost::{CostModel, Estimate, Pace, Work};

pub use crate::cost::Micros;

/// Names a request from its arrival to its answer; later ones have larger numbers.
pub type RequestId = u64;

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
    /// The most beam rows that it has in a step; where it draws tokens before it searches, those of an
    /// average step.
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
    /// What it has to do.
    pub demand: Demand,
    /// Whether it was found in time before: forecasts that say otherwise then get no margin.
    pub is_accepted: bool,
}

/// What a request has to do until it is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Demand {
    /// Prompt tokens that are not read yet.
    pub unread: usize,
    /// Steps after the one that reads the last of them, and after those that were taken.
    pub steps: usize,
    /// Beam rows of each, at most.
    pub beam_rows: usize,
}

impl Demand {
    fn rows_of_all(&self) -> usize {
        self.steps * self.beam_rows
    }

    /// Steps with one that reads the prompt, where there is some of it.
    fn steps_of_all(&self) -> usize {
        self.steps + usize::from(self.unread > 0)
    }

    /// The work of the request alone.
    pub fn alone(&self) -> Work {
        Work {
            steps: self.steps_of_all(),
            prompt_tokens: self.unread,
            beam_rows: self.rows_of_all(),
        }
    }
}

/// A request that runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Active {
    /// What is left of it.
    pub demand: Demand,
    /// When its answer is of no use any more.
    pub deadline_us: Option<Micros>,
}

impl Waiting {
    fn is_overdue(&self, ageing_us: Micros, now_us: Micros) -> bool {
        let patience = ageing_us.saturating_mul(Micros::from(self.class) + 1);
        now_us.saturating_sub(self.arrived_us) >= patience
    }
}

/// Those that wait, in their order, by index.
fn order(waiting: &[Waiting], ageing_us: Micros, now_us: Micros) -> Vec<usize> {
    let mut order: Vec<usize> = (0..waiting.len()).collect();
    order.sort_by_cached_key(|&index| {
        let request = &waiting[index];
        let is_overdue = request.is_overdue(ageing_us, now_us);
        let urgency = match is_overdue {
            true => (0, 0),
            false => (request.class, request.deadline_us.unwrap_or(Micros::MAX)),
        };
        (Reverse(is_overdue), urgency, request.arrived_us, request.id)
    });
    order
}

/// The requests to admit now, in order. `running` are those that run.
pub fn admit(
    waiting: &[Waiting],
    running: &[Active],
    room: Room,
    estimate: &Estimate,
    limits: &Limits,
    now_us: Micros,
) -> Vec<RequestId> {
    let mut running = running.to_vec();
    let mut rows: usize = running.iter().map(|active| active.demand.beam_rows).sum();
    let mut room = room;
    let mut admitted = Vec::new();
    for index in order(waiting, limits.ageing_us, now_us) {
        let request = &waiting[index];
        let Waiting { id, deadline_us, needs, demand, .. } = *request;
        let fits_rows = rows == 0 || rows + needs.beam_rows <= limits.beam_rows;
        let fits_room =
            needs.context_pages <= room.context_pages && needs.tail_pages <= room.tail_pages;
        if !fits_rows || !fits_room {
            break;
        }
        let next = Active { demand, deadline_us };
        // One that is overdue is not kept out by those that came later.
        if !request.is_overdue(limits.ageing_us, now_us)
            && makes_late(&running, &next, estimate, now_us)
        {
            break;
        }
        running.push(next);
        rows += needs.beam_rows;
        room.context_pages -= needs.context_pages;
        room.tail_pages -= needs.tail_pages;
        admitted.push(id);
    }
    admitted
}

/// Work that is done before a request is answered: its own, and what others do in its steps.
#[derive(Clone, Copy, Default)]
struct Backlog {
    /// Tokens of prompts that are not long.
    short_tokens: usize,
    long_tokens: usize,
    num_long: usize,
    /// Beam rows of all together, and of all their steps.
    beam_rows: usize,
    rows_of_all: usize,
}

impl Backlog {
    fn of(running: &[Active], pace: Pace) -> Backlog {
        let mut backlog = Backlog::default();
        running.iter().for_each(|active| backlog.add(&active.demand, pace));
        backlog
    }

    fn add(&mut self, demand: &Demand, pace: Pace) {
        match demand.unread > pace.short {
            true => {
                self.long_tokens += demand.unread;
                self.num_long += 1;
            }
            false => self.short_tokens += demand.unread,
        }
        self.beam_rows += demand.beam_rows;
        self.rows_of_all += demand.rows_of_all();
    }

    /// Tokens of prompts that are read until one of `demand`, which is among them, is at its end, in
    /// so many steps.
    fn tokens_before(&self, demand: &Demand, steps: usize, pace: Pace) -> usize {
        let long = match demand.unread > pace.short {
            true => self.long_tokens,
            // Long prompts read their share in each of its steps.
            false => {
                let share = pace.beside_others.saturating_mul(steps).saturating_mul(self.num_long);
                self.long_tokens.min(share)
            }
        };
        self.short_tokens + long
    }
}

/// Whether a request that runs with a deadline would miss it, were another admitted.
fn makes_late(running: &[Active], next: &Active, estimate: &Estimate, now_us: Micros) -> bool {
    let pace = estimate.pace();
    let before = Backlog::of(running, pace);
    let mut after = before;
    after.add(&next.demand, pace);
    let end_us = |active: &Active, beside: &Backlog| {
        let steps = active.demand.steps_of_all();
        let work = Work {
            steps,
            prompt_tokens: beside.tokens_before(&active.demand, steps, pace),
            beam_rows: beside.rows_of_all.min(beside.beam_rows * steps),
        };
        now_us.saturating_add(estimate.cost.predict_us(work))
    };
    running.iter().any(|active| {
        // One that is late in any case is no reason.
        active.deadline_us.is_some_and(|deadline| {
            end_us(active, &after) >= deadline && end_us(active, &before) < deadline
        })
    })
}

/// What is expected of a request that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forecast {
    /// When it would be answered.
    pub end_us: Micros,
    /// Why it is refused, if it is.
    pub refusal: Option<Refusal>,
}

/// Why a request is refused that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Its deadline went by, or would even if it ran alone from now on.
    TooLate,
    /// It would be answered too late behind others, or it is too costly while others are refused.
    Overloaded {
        /// By how much it would be late, or what is before it takes, in microseconds.
        late_us: Micros,
    },
}

/// What is expected of each request that waits, in the order of `waiting`, and which of them are
/// refused: those that would miss their deadlines. A request without one is never refused.
///
/// While nothing runs, the first is tried in any case: a wrong estimate cannot keep all out for ever.
pub fn judge(
    waiting: &[Waiting],
    running: &[Active],
    estimate: &Estimate,
    limits: &Limits,
    now_us: Micros,
) -> Vec<Forecast> {
    let mut forecasts = vec![Forecast { end_us: now_us, refusal: None }; waiting.len()];
    let pace = estimate.pace();
    let mut backlog = Backlog::of(running, pace);
    let mut is_anything_before = !running.is_empty();
    for index in order(waiting, limits.ageing_us, now_us) {
        let Waiting { id, demand, deadline_us, is_accepted, .. } = waiting[index];
        let mut with_it = backlog;
        with_it.add(&demand, pace);
        // Steps are shared by as many as the rows of a step allow.
        let steps = with_it.rows_of_all.div_ceil(limits.beam_rows.max(1));
        let steps = steps.max(demand.steps_of_all());
        let prompt_tokens = with_it.tokens_before(&demand, steps, pace);
        let work = Work { steps, prompt_tokens, beam_rows: with_it.rows_of_all };
        let wait_us = estimate.cost.predict_us(work);
        let margin_us = if is_accepted { wait_us } else { estimate.stretched_us(wait_us) };
        let refusal = deadline_us.and_then(|deadline_us| {
            let left_us = deadline_us.saturating_sub(now_us);
            let alone_us = estimate.cost.predict_us(demand.alone());
            match () {
                () if left_us == 0 => Some(Refusal::TooLate),
                () if !is_anything_before => None,
                () if alone_us >= left_us => Some(Refusal::TooLate),
                () if margin_us >= left_us => {
                    Some(Refusal::Overloaded { late_us: margin_us - left_us })
                }
                () if !is_accepted && estimate.is_too_costly(alone_us, id) => {
                    Some(Refusal::Overloaded { late_us: wait_us })
                }
                () => None,
            }
        });
        forecasts[index] = Forecast { end_us: now_us.saturating_add(wait_us), refusal };
        if refusal.is_none() {
            backlog = with_it;
            is_anything_before = true;
        }
    }
    forecasts
}

/// How long all that runs and waits will take.
pub fn drain_us(
    waiting: impl IntoIterator<Item = Demand>,
    running: &[Active],
    cost: &CostModel,
    limits: &Limits,
) -> Micros {
    let mut backlog = Backlog::of(running, Pace::UNBOUNDED);
    let mut steps = 0;
    let demands = waiting.into_iter().inspect(|demand| backlog.add(demand, Pace::UNBOUNDED));
    let running = running.iter().map(|active| active.demand);
    for demand in demands.chain(running) {
        steps = steps.max(demand.steps_of_all());
    }
    let work = Work {
        steps: steps.max(backlog.rows_of_all.div_ceil(limits.beam_rows.max(1))),
        prompt_tokens: backlog.short_tokens,
        beam_rows: backlog.rows_of_all,
    };
    cost.predict_us(work)
}

/// A request whose prompt is not read to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading {
    /// Tokens that are not read yet, at least one.
    pub left: usize,
    /// A step reads a multiple of so many tokens, at least one, or all that are left.
    pub grain: usize,
}

/// How many tokens of each prompt the next step reads; `reading` is in the order of admission, and
/// `is_shared` says whether others extend their beams in the step.
///
/// Prompts that are not long go first, the shortest before the others, and leave a quarter of the
/// step where there are long ones. A long prompt has its share of each step, the oldest the first
/// half of what all long ones have. So a short prompt does not wait for a long one, and the oldest
/// always reads on.
pub fn share_tokens(
    reading: &[Reading],
    is_shared: bool,
    pace: Pace,
    limits: &Limits,
) -> Vec<usize> {
    let mut shares = vec![0; reading.len()];
    let mut left = limits.prompt_tokens.max(1);
    // The oldest of all reads on in every step, in whatever pieces it must.
    if let (Some(share), Some(oldest)) = (shares.first_mut(), reading.first()) {
        *share = oldest.left.min(oldest.grain);
        left = left.saturating_sub(*share);
    }
    // The shortest first; of equals the oldest.
    let mut order: Vec<usize> = (0..reading.len()).collect();
    order.sort_by_key(|&index| reading[index].left);
    let (short, long): (Vec<usize>, Vec<usize>) =
        order.into_iter().partition(|&index| reading[index].left <= pace.short);
    let mut give = |index: usize, most: usize, left: &mut usize| {
        let Reading { left: unread, grain } = reading[index];
        let most = most.min(*left) + shares[index];
        let tokens = if unread <= most { unread } else { most / grain * grain };
        *left -= tokens - shares[index];
        shares[index] = tokens;
        tokens
    };
    let reserved = if long.is_empty() { 0 } else { left / 4 };
    let mut for_short = left - reserved;
    for &index in &short {
        give(index, usize::MAX, &mut for_short);
    }
    left = for_short + reserved;
    if let Some(&oldest) = long.iter().min() {
        let is_alone = !is_shared && short.is_empty();
        let shares_of_all = pace.beside_others.saturating_mul(long.len());
        let of_all = if is_alone { shares_of_all.max(pace.alone) } else { shares_of_all };
        let has = give(oldest, 0, &mut left);
        let mut for_long = of_all.saturating_sub(has).min(left);
        give(oldest, for_long.div_ceil(2), &mut for_long);
        for &index in &long {
            give(index, usize::MAX, &mut for_long);
        }
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { beam_rows: 100, prompt_tokens: 50, ageing_us: 1000 };
    const ROOM: Room = Room { context_pages: 10, tail_pages: 10 };

    fn waiting(id: RequestId, class: u8, deadline_us: Option<Micros>, beam_rows: usize) -> Waiting {
        let needs = Needs { context_pages: 2, tail_pages: 1, beam_rows };
        let demand = Demand { unread: 10, steps: 2, beam_rows };
        Waiting { id, class, arrived_us: id, deadline_us, needs, demand, is_accepted: false }
    }

    fn active(beam_rows: usize, deadline_us: Option<Micros>) -> Active {
        Active { demand: Demand { unread: 0, steps: 2, beam_rows }, deadline_us }
    }

    /// An engine whose steps take 100 us, and a row one more.
    fn estimate() -> Estimate {
        let mut estimate = Estimate::default();
        for rows in 0..100 {
            let work = Work { steps: 1, prompt_tokens: 0, beam_rows: rows };
            estimate.cost.observe(work, 100 + rows as Micros);
        }
        estimate
    }

    fn admit_all(waiting: &[Waiting], rows: usize, now_us: Micros) -> Vec<RequestId> {
        let running: Vec<Active> = (rows > 0).then(|| active(rows, None)).into_iter().collect();
        admit(waiting, &running, ROOM, &Estimate::default(), &LIMITS, now_us)
    }

    #[test]
    fn the_order_is_class_then_deadline_then_arrival() {
        let all = [
            waiting(1, 1, Some(5), 1),
            waiting(2, 0, None, 1),
            waiting(3, 0, Some(90), 1),
            waiting(4, 0, Some(80), 1),
        ];
        assert_eq!(admit_all(&all, 0, 10), [4, 3, 2, 1]);
        // At 1004 the first class is overdue, at 2001 all are.
        assert_eq!(admit_all(&all, 0, 1004), [2, 3, 4, 1]);
        assert_eq!(admit_all(&all, 0, 2001), [1, 2, 3, 4]);
    }

    #[test]
    fn who_is_next_is_waited_for() {
        let all = [waiting(1, 0, None, 60), waiting(2, 0, None, 60), waiting(3, 0, None, 1)];
        assert_eq!(admit_all(&all, 0, 0), [1]);
        assert_eq!(admit_all(&all, 40, 0), [1]);
        assert!(admit_all(&all, 41, 0).is_empty());
        let narrow = Room { context_pages: 3, ..ROOM };
        assert_eq!(admit(&all[1..], &[], narrow, &Estimate::default(), &LIMITS, 0), [2]);
        // One that is larger than the limit runs alone.
        assert_eq!(admit_all(&[waiting(1, 0, None, 300)], 0, 0), [1]);
        assert!(admit_all(&[waiting(1, 0, None, 300)], 1, 0).is_empty());
    }

    #[test]
    fn requests_that_would_be_late_are_refused_and_count_for_nothing() {
        let estimate = estimate();
        // Alone each takes three steps and 80 rows: 380 us. Behind another it has more rows.
        let deadlines = [Some(500), Some(480), Some(520), Some(1000), None, Some(100)];
        let all: Vec<Waiting> = deadlines
            .into_iter()
            .enumerate()
            .map(|(id, deadline_us)| waiting(id as u64, 0, deadline_us, 40))
            .collect();
        let forecasts = judge(&all, &[active(40, None)], &estimate, &LIMITS, 0);
        let refusals: Vec<Option<Refusal>> = forecasts.iter().map(|it| it.refusal).collect();
        assert_eq!(refusals[5], Some(Refusal::TooLate), "even alone");
        // 80 rows more than alone, with the margin above 480.
        assert!(matches!(refusals[1], Some(Refusal::Overloaded { late_us: 1..100 })));
        assert!(matches!(refusals[0], Some(Refusal::Overloaded { .. })));
        assert_eq!(refusals[2..5], [None; 3]);
        assert!(forecasts[3].end_us > forecasts[2].end_us, "it goes behind");
        // What was accepted is not refused for the margin.
        let accepted = [Waiting { is_accepted: true, ..all[0] }];
        let forecasts = judge(&accepted, &[active(40, None)], &estimate, &LIMITS, 0);
        assert_eq!(forecasts[0].refusal, None);
        // While nothing runs the first is tried, however slow the engine seems.
        let forecasts = judge(&all, &[], &estimate, &LIMITS, 50);
        assert_eq!(forecasts[5].refusal, None);
        let forecasts = judge(&all[5..], &[], &estimate, &LIMITS, 100);
        assert_eq!(forecasts[0].refusal, Some(Refusal::TooLate), "its time is over");
    }

    #[test]
    fn a_request_that_would_make_a_running_one_late_waits_until_it_is_overdue() {
        let estimate = estimate();
        // Two steps of 40 rows take 280 us, of 80 rows 360.
        let next = [waiting(1, 0, None, 40)];
        let admitted = |deadline_us, now_us| {
            admit(&next, &[active(40, deadline_us)], ROOM, &estimate, &LIMITS, now_us)
        };
        assert_eq!(admitted(None, 0), [1]);
        assert_eq!(admitted(Some(500), 0), [1]);
        assert!(admitted(Some(320), 0).is_empty());
        assert_eq!(admitted(Some(250), 0), [1], "it is late in any case");
        assert_eq!(admitted(Some(1321), 1001), [1], "it is overdue");
    }

    #[test]
    fn prompts_share_the_tokens_of_a_step_the_shortest_first() {
        let share = |prompts: &[(usize, usize)]| {
            let reading = prompts.iter().map(|&(left, grain)| Reading { left, grain });
            share_tokens(&reading.collect::<Vec<_>>(), true, Pace::UNBOUNDED, &LIMITS)
        };
        assert_eq!(share(&[(30, 1), (40, 1), (5, 1)]), [30, 15, 5]);
        assert_eq!(share(&[(40, 1), (30, 1), (30, 1)]), [1, 30, 19], "the oldest reads on");
        assert_eq!(share(&[(30, 30), (30, 30), (5, 5)]), [30, 0, 5]);
        assert_eq!(share(&[(300, 300), (1, 1)]), [300, 0]);
        assert_eq!(share(&[(300, 20), (1, 1)]), [40, 1]);
        assert_eq!(share(&[(50, 1), (1, 1)]), [49, 1]);
        assert!(share(&[]).is_empty());
    }

    #[test]
    fn a_long_prompt_has_a_bounded_share_and_always_some() {
        let pace = Pace { short: 20, beside_others: 4, alone: 16 };
        let share = |lefts: &[usize], is_shared| {
            let reading: Vec<Reading> =
                lefts.iter().map(|&left| Reading { left, grain: 1 }).collect();
            share_tokens(&reading, is_shared, pace, &LIMITS)
        };
        assert_eq!(share(&[1000], false), [16]);
        assert_eq!(share(&[1000], true), [4]);
        assert_eq!(share(&[1000, 10], false), [4, 10]);
        // Short ones leave a quarter of the step.
        assert_eq!(share(&[1000, 20, 20, 20], true), [4, 20, 17, 0]);
        // Several long ones have more together; the oldest has half of it.
        assert_eq!(share(&[1000, 900, 800], true), [7, 0, 5]);
        assert_eq!(share(&[20], true), [20]);
    }
}
