//! The scheduler under load, in virtual time: a simulated device takes a known time for each step,
//! with noise. Every test repeats from its seeds.

use std::collections::HashMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use super::super::prepare::{Arrival, Preparer};
use super::tests::{SPEC, preparer};
use super::*;
use crate::request::{Priority, Request};

/// What a step takes, in microseconds: 300, 20 a prompt token, 7 a beam row, up to a fifth more or
/// less, and one step in a hundred five times as long.
fn step_us(work: Work, rng: &mut fastrand::Rng) -> f64 {
    let exact = 300.0 + 20.0 * work.prompt_tokens as f64 + 7.0 * work.beam_rows as f64;
    let noise = 0.8 + 0.4 * rng.f64();
    exact * if rng.u8(0..100) == 0 { 5.0 * noise } else { noise }
}

const BEAMS: usize = 20;

/// Requests that arrive at random, as many a second on average.
#[derive(Clone)]
struct Load {
    rate: f64,
    seconds: f64,
    /// Lengths of histories that are drawn from, in tokens.
    lens: Vec<usize>,
    /// The share that comes from users who were there before, and have a little more.
    returning: f64,
    deadline: Option<Duration>,
    /// The share of high priority; the others are normal.
    high: f64,
    /// The share that is cancelled while it waits or runs.
    cancelled: f64,
    /// How much slower the device is, by time in seconds.
    slowness: fn(f64) -> f64,
    context_pages: usize,
}

impl Default for Load {
    fn default() -> Load {
        Load {
            rate: 100.0,
            seconds: 3.0,
            lens: vec![40],
            returning: 0.0,
            deadline: Some(Duration::from_millis(100)),
            high: 0.0,
            cancelled: 0.0,
            slowness: |_| 1.0,
            context_pages: 3000,
        }
    }
}

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Answered,
    /// Refused by a forecast.
    Refused,
    /// Its deadline went by.
    Late,
    Cancelled,
}

#[derive(Debug, Clone, Copy)]
struct Outcome {
    arrived_us: Micros,
    ended_us: Micros,
    len: usize,
    is_high: bool,
    end: End,
}

impl Outcome {
    fn latency_ms(&self) -> f64 {
        (self.ended_us - self.arrived_us) as f64 / 1e3
    }
}

/// What a caller was told.
type Told = (RequestId, Result<Answer>);

/// A scheduler, a device and a clock.
struct Simulation {
    scheduler: Scheduler<()>,
    preparer: Preparer,
    rng: fastrand::Rng,
    now_us: Micros,
    slowness: fn(f64) -> f64,
    /// Requests that have not ended: when they came, their length, whether their priority is high.
    asked: HashMap<RequestId, (Micros, usize, bool)>,
    sender: Sender<Told>,
    answers: Receiver<Told>,
    outcomes: Vec<Outcome>,
}

/// Stands for an answer, of which nothing is looked at.
const ANSWER: Error = Error::EmptyInput;

impl Simulation {
    fn new(load: &Load, seed: u64) -> Simulation {
        let limits = Limits { beam_rows: 256, prompt_tokens: 1024, ageing_us: 500_000 };
        let (context_pages, tail_pages) = (load.context_pages, 4096);
        let spec = SchedulerSpec { limits, context_pages, tail_pages, ..SPEC };
        let (sender, answers) = channel();
        Simulation {
            scheduler: Scheduler::new(&spec, Arc::default()),
            preparer: Preparer { context_pages, tail_pages, max_context: 8192, ..preparer() },
            rng: fastrand::Rng::with_seed(seed),
            now_us: 0,
            slowness: load.slowness,
            asked: HashMap::new(),
            sender,
            answers,
            outcomes: Vec::new(),
        }
    }

    fn enqueue(&mut self, id: RequestId, arrived_us: Micros, request: Request) {
        let is_high = request.priority == Priority::High;
        let prepared = self.preparer.prepare_at(Arrival { id, arrived_us }, request);
        let prepared = prepared.expect("a sound request");
        self.asked.insert(id, (arrived_us, prepared.tokens().len(), is_high));
        let sender = self.sender.clone();
        let reply = Reply::new(move |answer| sender.send((id, answer)).expect("a receiver"));
        self.scheduler.enqueue(prepared, reply);
    }

    /// One step, and its time. Whether there was anything to do.
    fn step(&mut self) -> bool {
        let scheduler = &mut self.scheduler;
        scheduler.expire(self.now_us);
        scheduler.admit(self.now_us, |_, _, _, _| ());
        let scheduled = scheduler.schedule(|running| running.prepared.needs.beam_rows);
        if !scheduled.is_empty() {
            let rows: usize = scheduled.iter().map(|scheduled| scheduled.num_rows).sum();
            let prompts = scheduled.iter().filter(|scheduled| !scheduled.chunk.is_empty());
            let prompt_tokens: usize = prompts.map(|scheduled| scheduled.num_rows).sum();
            let work = Work { steps: 1, prompt_tokens, beam_rows: rows - prompt_tokens };
            let slowness = (self.slowness)(self.now_us as f64 / 1e6);
            let took_us = (step_us(work, &mut self.rng) * slowness) as Micros;
            self.now_us += took_us;
            scheduler.complete(&scheduled, self.now_us);
            let finished = scheduler.take_finished(|running| {
                running.steps_taken == running.prepared.program.max_steps()
            });
            for finished in finished {
                let answer = match finished.is_late(self.now_us) {
                    true => finished.prepared.deadline_exceeded(None),
                    false => ANSWER,
                };
                scheduler.end(finished, Err(answer), self.now_us);
            }
            scheduler.observe(work, took_us);
        }
        self.deliver();
        !scheduled.is_empty()
    }

    fn deliver(&mut self) {
        for (reply, answer) in self.scheduler.take_ended() {
            reply.send(answer);
        }
        for (id, answer) in self.answers.try_iter() {
            let (arrived_us, len, is_high) = self.asked.remove(&id).expect("answered once");
            let end = match answer {
                Err(Error::EmptyInput) => End::Answered,
                Err(Error::DeadlineExceeded { retry_after_ms: Some(_), .. }) => End::Refused,
                Err(Error::DeadlineExceeded { .. }) => End::Late,
                Err(Error::Cancelled) => End::Cancelled,
                other => panic!("{other:?}"),
            };
            let ended_us = self.now_us;
            self.outcomes.push(Outcome { arrived_us, ended_us, len, is_high, end });
        }
    }

    /// A load from its first request to the last answer.
    fn run(load: &Load, seed: u64) -> Vec<Outcome> {
        let mut simulation = Simulation::new(load, seed);
        let mut rng = fastrand::Rng::with_seed(seed + 1000);
        let mut users: Vec<Vec<u32>> = Vec::new();
        let (mut due_us, mut next_id) = (0.0, 0);
        loop {
            while due_us <= simulation.now_us as f64 && due_us < load.seconds * 1e6 {
                next_id += 1;
                let request = draw(load, &mut users, &mut rng);
                simulation.enqueue(next_id, due_us as Micros, request);
                if rng.f64() < load.cancelled {
                    let id = rng.u64(next_id.saturating_sub(20)..=next_id);
                    simulation.scheduler.cancel(id);
                    simulation.deliver();
                }
                due_us -= (1.0 - rng.f64()).ln() / load.rate * 1e6;
            }
            if !simulation.step() {
                if due_us >= load.seconds * 1e6 {
                    break;
                }
                simulation.now_us = simulation.now_us.max(due_us.ceil() as Micros);
            }
            simulation.scheduler.check_integrity().expect("all pages");
        }
        assert!(simulation.asked.is_empty(), "seed {seed}: all are told");
        assert!(simulation.scheduler.is_idle());
        simulation.outcomes
    }
}

fn draw(load: &Load, users: &mut Vec<Vec<u32>>, rng: &mut fastrand::Rng) -> Request {
    let is_back = !users.is_empty() && rng.f64() < load.returning;
    let user = match is_back {
        // Some come far more often than others (Zipf).
        true => ((users.len() as f64).powf(rng.f64()) as usize).min(users.len()) - 1,
        false => users.len(),
    };
    match users.get_mut(user) {
        Some(history) => {
            if history.len() > 1000 {
                history.clear(); // another takes the place
            }
            let more = if history.is_empty() { load.lens[0] } else { 1 };
            history.extend((0..more).map(|_| rng.u32(0..5)));
        }
        None => {
            let len = load.lens[rng.usize(0..load.lens.len())];
            users.push((0..len).map(|_| rng.u32(0..5)).collect());
        }
    }
    let mut request = Request::from_tokens(users[user].clone());
    if load.returning > 0.0 {
        request.user = Some(user.to_string());
    } else {
        users.clear();
    }
    request.beams = BEAMS;
    request.deadline = load.deadline;
    request.priority = if rng.f64() < load.high { Priority::High } else { Priority::Normal };
    request
}

fn count(outcomes: &[Outcome], end: End) -> usize {
    outcomes.iter().filter(|outcome| outcome.end == end).count()
}

/// Answers a second while the load lasted.
fn goodput(load: &Load, seed: u64) -> f64 {
    let outcomes = Simulation::run(load, seed);
    let (late, answered) = (count(&outcomes, End::Late), count(&outcomes, End::Answered));
    assert!(20 * late <= outcomes.len(), "seed {seed}: {late} late, {answered} answered");
    answered as f64 / load.seconds
}

/// Answers a second where requests have no deadlines and more come than can be answered.
fn capacity(load: &Load, seed: u64) -> f64 {
    let burst = Load { rate: 20_000.0, seconds: 0.05, deadline: None, ..load.clone() };
    // Users come back to contexts that are there.
    let warm = Load { rate: 20_000.0, seconds: 0.15, ..burst.clone() };
    let time = |load: &Load| {
        let outcomes = Simulation::run(load, seed);
        let last = outcomes.iter().map(|outcome| outcome.ended_us).max().expect("some");
        (outcomes.len() as f64, last as f64 / 1e6)
    };
    let ((few, early), (many, late)) = (time(&burst), time(&warm));
    (many - few) / (late - early)
}

fn quantile(mut values: Vec<f64>, quantile: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * quantile) as usize]
}

#[test]
fn goodput_at_four_times_the_load_is_nine_tenths_of_that_at_once_the_load() {
    check_goodput(0.0);
}

#[test]
fn goodput_holds_where_users_come_back() {
    check_goodput(0.9);
}

fn check_goodput(returning: f64) {
    let mut fallen = Vec::new();
    for (lens, deadline_ms) in
        [(vec![40], 100), (vec![400], 200), (vec![40, 40, 40, 600], 100), (vec![20, 150], 60)]
    {
        let deadline = Some(Duration::from_millis(deadline_ms));
        let load = Load { lens, returning, deadline, context_pages: 20_000, ..Load::default() };
        let capacity = capacity(&load, 1);
        let at = |times: f64| {
            let load = Load { rate: times * capacity, ..load.clone() };
            (1..3).map(|seed| goodput(&load, seed)).sum::<f64>() / 2.0
        };
        let (once, four_times) = (at(1.0), at(4.0));
        if once < 0.7 * capacity || four_times < 0.9 * once {
            fallen.push(format!(
                "{:?} returning {returning}: capacity {capacity:.0}, {once:.0} and {four_times:.0} a second",
                load.lens
            ));
        }
    }
    assert!(fallen.is_empty(), "{fallen:#?}");
}

#[test]
fn users_who_wait_find_their_contexts_where_memory_is_scarce() {
    let load = Load {
        lens: vec![400],
        returning: 0.95,
        rate: 1000.0,
        context_pages: 300,
        ..Load::default()
    };
    let once = Load { rate: 250.0, ..load.clone() };
    let (once, four_times) = (goodput(&once, 1), goodput(&load, 1));
    assert!(four_times > 0.9 * once, "{once:.0} and {four_times:.0} a second");
}

#[test]
fn estimates_follow_a_machine_that_is_five_times_slower_for_a_while() {
    let slowness = |time: f64| if (1.0..2.0).contains(&time) { 5.0 } else { 1.0 };
    let load = Load { slowness, seconds: 3.0, lens: vec![40], ..Load::default() };
    let capacity = capacity(&Load { slowness: |_| 1.0, ..load.clone() }, 1);
    for times in [1.0, 4.0] {
        let outcomes = Simulation::run(&Load { rate: times * capacity, ..load.clone() }, 3);
        let answered = |from: f64, to: f64| {
            let within = |outcome: &&Outcome| {
                let ended = outcome.ended_us as f64 / 1e6;
                (from..to).contains(&ended) && outcome.end == End::Answered
            };
            outcomes.iter().filter(within).count() as f64 / (to - from)
        };
        let (fast, slow, again) = (answered(0.2, 1.0), answered(1.2, 2.0), answered(2.2, 3.0));
        let what = format!("{times}: {capacity:.0} {fast:.0}, {slow:.0}, {again:.0} a second");
        assert!(fast > 0.7 * capacity, "{what}");
        // Requests then take most of their deadline alone, and fewer go together.
        assert!(slow > 0.6 * capacity / 5.0, "{what}");
        assert!(again > 0.9 * fast, "{what}");
    }
}

#[test]
fn a_herd_that_finds_a_cold_engine_is_answered_as_far_as_it_can_be() {
    for seed in 1..4 {
        let load = Load { rate: 1e9, seconds: 1e-6, ..Load::default() };
        let outcomes = Simulation::run(&load, seed);
        let answered = count(&outcomes, End::Answered);
        assert!(outcomes.len() > 700, "{}", outcomes.len());
        let possible = capacity(&load, 1) * 0.1;
        assert!(answered as f64 > 0.7 * possible, "seed {seed}: {answered} of {possible:.0}");
    }
}

#[test]
fn nobody_is_kept_out_for_ever_by_an_estimate_that_is_wrong() {
    // The first steps take a thousand times as long: nothing could ever be in time.
    let slowness = |time: f64| if time < 1.0 { 1000.0 } else { 1.0 };
    let load = Load { slowness, rate: 50.0, seconds: 6.0, ..Load::default() };
    let outcomes = Simulation::run(&load, 1);
    let late = outcomes.iter().filter(|outcome| outcome.arrived_us > 4_000_000);
    let ends: Vec<Outcome> = late.copied().collect();
    assert!(count(&ends, End::Answered) * 20 > ends.len() * 19, "{ends:?}");
}

#[test]
fn requests_without_deadlines_are_never_refused_and_never_starve() {
    let flood = Load { rate: 3000.0, high: 1.0, seconds: 3.0, ..Load::default() };
    let mut simulation = Simulation::new(&flood, 1);
    let mut rng = fastrand::Rng::with_seed(5);
    let patient = Load { deadline: None, ..flood.clone() };
    let (mut due_us, mut id) = (0.0, 0);
    let mut num_patient = 0;
    while due_us < flood.seconds * 1e6 {
        while due_us <= simulation.now_us as f64 {
            id += 1;
            let load = if id % 50 == 0 { &patient } else { &flood };
            let mut request = draw(load, &mut Vec::new(), &mut rng);
            if id % 50 == 0 {
                request.priority = Priority::Low;
                num_patient += 1;
            }
            simulation.enqueue(id, due_us as Micros, request);
            due_us += 1e6 / flood.rate;
        }
        simulation.step();
    }
    while simulation.step() {}
    let patient = simulation.outcomes.iter().filter(|outcome| !outcome.is_high);
    let patient: Vec<Outcome> = patient.copied().collect();
    assert_eq!((patient.len(), count(&patient, End::Answered)), (num_patient, num_patient));
    let longest = patient.iter().map(Outcome::latency_ms).fold(0.0, f64::max);
    assert!(longest < 2000.0, "low priority waits three times 500 ms, and then runs: {longest}");
}

#[test]
fn high_priority_is_answered_before_normal_when_there_is_too_much() {
    let load = Load { rate: 3000.0, high: 0.1, seconds: 2.0, ..Load::default() };
    let outcomes = Simulation::run(&load, 1);
    let share = |is_high: bool| {
        let class = outcomes.iter().filter(|outcome| outcome.is_high == is_high);
        let class: Vec<Outcome> = class.copied().collect();
        count(&class, End::Answered) as f64 / class.len() as f64
    };
    assert!(share(true) > 0.95, "{}", share(true));
    assert!(share(false) < 0.5, "{}", share(false));
}

#[test]
fn cancelled_requests_leave_everything_as_it_was() {
    let load = Load { rate: 2000.0, cancelled: 0.3, returning: 0.5, ..Load::default() };
    let outcomes = Simulation::run(&load, 1);
    let (cancelled, answered) = (count(&outcomes, End::Cancelled), count(&outcomes, End::Answered));
    assert!(cancelled > 100 && answered > 1000, "{cancelled} cancelled, {answered} answered");
}

#[test]
fn short_requests_hardly_notice_a_few_long_ones() {
    let short_alone = Load { rate: 30.0, seconds: 60.0, deadline: None, ..Load::default() };
    let lens = [vec![40; 19], vec![1000]].concat();
    let mixed = Load { lens, rate: 32.0, ..short_alone.clone() };
    let p99 = |load: &Load| {
        let outcomes = Simulation::run(load, 1);
        let short = outcomes.iter().filter(|outcome| outcome.len < 100);
        quantile(short.map(Outcome::latency_ms).collect(), 0.99)
    };
    let (alone, beside) = (p99(&short_alone), p99(&mixed));
    assert!(beside < 2.0 * alone, "{alone:.1} ms alone, {beside:.1} beside long ones");
}
