//! The scheduler and the engine under thousands of random steps with hardly any room.

mod common;

use std::collections::HashMap;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use common::tiny::{Tiny, prompt, random_program, random_request};
use sidereal::cost::{Estimate, Pace};
use sidereal::pages::{self, PAGE_LEN, TAIL_PAGE_LEN};
use sidereal::schedule::{self, Active, Demand, Limits, Needs, Reading, RequestId, Room, Waiting};
use sidereal::{Answer, EngineOptions, Error, Request};

/// A request that the scheduler admitted.
struct Run {
    needs: Needs,
    left: usize,
    steps: usize,
}

#[test]
fn nobody_waits_beyond_the_bound_and_room_is_never_overdrawn() {
    let mut admitted_overdue = 0;
    for seed in 0..60 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let room = Room { context_pages: rng.usize(4..20), tail_pages: rng.usize(4..20) };
        let limits = Limits {
            beam_rows: rng.usize(1..40),
            prompt_tokens: rng.usize(1..100),
            ageing_us: rng.u64(1..60),
        };
        let is_divisible = rng.bool();
        let pace = match rng.bool() {
            true => Pace::UNBOUNDED,
            false => Pace {
                short: rng.usize(0..100),
                beside_others: rng.usize(1..50),
                alone: rng.usize(1..50),
            },
        };
        let estimate = Estimate::default();
        let mut waiting: Vec<Waiting> = Vec::new();
        let mut running: Vec<(RequestId, Run)> = Vec::new();
        let (mut free, mut next_id) = (room, 0);
        let mut now = 0;
        while now < 400 || !waiting.is_empty() || !running.is_empty() {
            assert!(now < 100_000, "seed {seed}: some never run");
            for _ in 0..if now < 400 { rng.usize(0..3) } else { 0 } {
                next_id += 1;
                let beam_rows = rng.usize(1..60);
                waiting.push(Waiting {
                    id: next_id,
                    class: rng.u8(0..3),
                    arrived_us: now,
                    deadline_us: rng.bool().then(|| now + rng.u64(1..50)),
                    needs: Needs {
                        context_pages: rng.usize(1..=room.context_pages),
                        tail_pages: rng.usize(0..=room.tail_pages),
                        beam_rows,
                    },
                    demand: Demand { unread: rng.usize(1..200), steps: 3, beam_rows },
                    is_accepted: false,
                });
            }
            let active: Vec<Active> = running
                .iter()
                .map(|(_, run)| Active {
                    demand: Demand {
                        unread: run.left,
                        steps: run.steps,
                        beam_rows: run.needs.beam_rows,
                    },
                    deadline_us: None,
                })
                .collect();
            for id in schedule::admit(&waiting, &active, free, &estimate, &limits, now) {
                let at = waiting.iter().position(|request| request.id == id).expect("waits");
                let request = waiting.remove(at);
                free.context_pages -= request.needs.context_pages;
                free.tail_pages -= request.needs.tail_pages;
                // Who is overdue goes before all that came after it.
                let is_overdue = |request: &Waiting| {
                    now - request.arrived_us >= limits.ageing_us * (u64::from(request.class) + 1)
                };
                let passed = waiting.iter().find(|other| is_overdue(other) && other.id < id);
                assert_eq!(passed, None, "seed {seed}: {id} went before");
                admitted_overdue += usize::from(is_overdue(&request));
                let (left, steps) = (rng.usize(1..200), rng.usize(1..5));
                running.push((id, Run { needs: request.needs, left, steps }));
            }
            let rows: usize = running.iter().map(|(_, run)| run.needs.beam_rows).sum();
            assert!(rows <= limits.beam_rows || running.len() == 1, "seed {seed}: {rows} rows");
            let reading: Vec<Reading> = running
                .iter()
                .filter(|(_, run)| run.left > 0)
                .map(|(_, run)| Reading {
                    left: run.left,
                    grain: if is_divisible { 1 } else { run.left },
                })
                .collect();
            let is_shared = reading.len() < running.len();
            let mut shares = schedule::share_tokens(&reading, is_shared, pace, &limits).into_iter();
            let first = running.iter().position(|(_, run)| run.left > 0);
            let mut tokens = 0;
            for (at, (_, run)) in running.iter_mut().enumerate() {
                if run.left == 0 {
                    run.steps -= 1;
                    continue;
                }
                let share = shares.next().expect("a share for each");
                assert!(share > 0 || first != Some(at), "seed {seed}: the first waits");
                assert!(is_divisible || share == 0 || share == run.left);
                tokens += share;
                run.left -= share;
            }
            let alone = reading.first().map_or(0, |first| first.left);
            assert!(tokens <= limits.prompt_tokens || (!is_divisible && tokens == alone));
            running.retain(|(_, run)| {
                let is_over = run.left == 0 && run.steps == 0;
                if is_over {
                    free.context_pages += run.needs.context_pages;
                    free.tail_pages += run.needs.tail_pages;
                }
                !is_over
            });
            now += 1;
        }
        assert_eq!(free, room, "seed {seed}: all is given back");
    }
    assert!(admitted_overdue > 100, "only {admitted_overdue} were overdue");
}

fn no_cache(tiny: &Tiny) -> sidereal::Engine {
    let options = EngineOptions::default().with_threads(1).with_prefix_cache(false);
    tiny.open_as(Arc::clone(&tiny.catalog), &options)
}

#[test]
fn every_page_is_in_one_place_after_every_step_and_answers_are_those_of_the_request_alone() {
    let (mut steps, mut refused, mut hits, mut late, mut cancelled, mut answered) =
        (0, 0, 0, 0, 0, 0);
    for seed in 0..150 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let tiny = Tiny::new(seed);
        let options = EngineOptions::default()
            .with_threads(rng.usize(1..3))
            .with_context_tokens(rng.usize(2..30) * PAGE_LEN)
            .with_max_beam_rows(rng.usize(2..12) * TAIL_PAGE_LEN)
            .with_rows_per_step(rng.usize(1..100))
            .with_tokens_per_step(rng.usize(1..200))
            .with_ageing(Duration::from_micros(rng.u64(0..2000)));
        let mut engine = tiny.open_as(Arc::clone(&tiny.catalog), &options);
        let mut alone = no_cache(&tiny);
        let prompts: Vec<Vec<u32>> = (0..4).map(|_| prompt(&mut rng, &tiny)).collect();
        let (mut contexts, mut submitted) = (Vec::new(), 0);
        let mut asked: HashMap<usize, (RequestId, Request)> = HashMap::new();
        let (sender, answers) = mpsc::channel();
        let mut check = |index: usize, answer: Result<Answer, Error>, request: Request| match answer
        {
            Err(Error::DeadlineExceeded { .. }) => {
                assert!(request.deadline.is_some(), "seed {seed}: {index} has no deadline");
                late += 1;
            }
            answer => {
                let answer = answer.expect("a sound request");
                assert!(answer.cached_tokens <= answer.tokens);
                hits += usize::from(answer.cached_tokens > 0);
                let mut in_time = request.clone();
                in_time.deadline = None;
                let expected = alone.recommend(&in_time).expect("a sound request");
                assert_eq!(answer, expected, "seed {seed}: {request:?}");
                answered += 1;
            }
        };
        for _ in 0..30 {
            for _ in 0..rng.usize(0..3) {
                let mut request = match rng.u8(0..3) {
                    0 => random_program(&mut rng, &tiny, &prompts),
                    _ => random_request(&mut rng, &tiny, &mut contexts),
                };
                request.deadline = match rng.u8(0..8) {
                    0 => Some(Duration::ZERO),
                    1 => Some(Duration::from_micros(300)),
                    2 => Some(Duration::MAX),
                    _ => None,
                };
                let (sender, index) = (sender.clone(), submitted);
                submitted += 1;
                let reply = move |answer| sender.send((index, answer)).expect("a receiver");
                match engine.submit(request.clone(), reply) {
                    Ok(id) => {
                        asked.insert(index, (id, request));
                    }
                    Err(Error::TooLarge { needs, limit, .. }) => {
                        assert!(needs > limit);
                        refused += 1;
                    }
                    Err(error) => panic!("seed {seed}: {error} {request:?}"),
                }
            }
            if rng.u8(0..6) == 0 {
                let indices: Vec<usize> = asked.keys().copied().collect();
                if let Some(index) = rng.choice(indices) {
                    let (id, _) = asked.remove(&index).expect("one of those");
                    engine.cancel(id);
                    let (told, answer) = answers.try_recv().expect("it is told at once");
                    assert_eq!(told, index);
                    assert!(matches!(answer, Err(Error::Cancelled)));
                    cancelled += 1;
                    engine.check_integrity().expect("all pages");
                }
            }
            engine.step().expect("the engine goes on");
            for (index, answer) in answers.try_iter() {
                let (_, request) = asked.remove(&index).expect("asked once, answered once");
                check(index, answer, request);
            }
            engine.check_integrity().expect("all pages");
            steps += 1;
        }
        for _ in 0..2000 {
            if asked.is_empty() {
                break;
            }
            engine.step().expect("the engine goes on");
            for (index, answer) in answers.try_iter() {
                let (_, request) = asked.remove(&index).expect("asked once, answered once");
                check(index, answer, request);
            }
            engine.check_integrity().expect("all pages");
            steps += 1;
        }
        assert!(asked.is_empty(), "seed {seed}: {} are never answered", asked.len());
        let status = engine.status();
        assert_eq!((status.waiting, status.running), (0, 0));
        assert_eq!(status.free_tail_pages, status.tail_pages);
        assert_eq!(status.free_context_pages + status.cached_context_pages, status.context_pages);
    }
    assert!(steps > 4000 && answered > 2000, "{steps} steps, {answered} answers");
    assert!(refused > 50 && hits > 250, "{refused} refused, {hits} with cached tokens");
    assert!(late > 100 && cancelled > 100, "{late} late, {cancelled} cancelled");
}

#[test]
fn what_cannot_fit_is_refused_at_once_and_what_just_fits_is_answered() {
    let tiny = Tiny::new(3);
    let options = EngineOptions::default()
        .with_context_tokens(2 * PAGE_LEN)
        .with_max_beam_rows(2 * TAIL_PAGE_LEN);
    let mut engine = tiny.open_as(Arc::clone(&tiny.catalog), &options);
    assert_eq!(engine.status().context_pages, pages::context_pages(128));
    let mut ask = |tokens: usize, beams: usize| {
        let mut request = Request::from_tokens(vec![1; tokens]);
        request.beams = beams;
        engine.recommend(&request).map(|_| ())
    };
    ask(2 * PAGE_LEN, 2 * TAIL_PAGE_LEN).expect("this fits");
    let error = ask(2 * PAGE_LEN + 1, 1).expect_err("one token more");
    assert!(matches!(error, Error::TooLarge { needs: 129, limit: 128, .. }), "{error}");
    assert_eq!(error.code(), "too_large");
    ask(1, 4096).expect_err("more tails than there are");
    ask(2 * PAGE_LEN, 1).expect("the memory is as it was");
}

#[test]
fn a_long_prompt_is_answered_as_if_read_at_once_and_short_ones_do_not_wait_for_it() {
    let (mut num_by_encoders, mut num_passed) = (0, 0);
    for seed in 0..24 {
        let tiny = Tiny::new(seed);
        let mut rng = fastrand::Rng::with_seed(seed);
        let options = EngineOptions::default()
            .with_threads(rng.usize(1..3))
            .with_tokens_per_step(rng.usize(16..40))
            .with_prefix_cache(false);
        let mut engine = tiny.open_as(Arc::clone(&tiny.catalog), &options);
        let mut alone = no_cache(&tiny);
        let mut some = |count: usize| -> Request {
            let tokens = (0..count).map(|_| rng.u32(0..tiny.num_tokens()));
            Request::from_tokens(tokens.collect::<Vec<_>>()).with_beams(4)
        };
        // What is typical is known when the long one comes.
        (0..20).for_each(|_| drop(engine.recommend(&some(5)).expect("a sound request")));
        let (sender, answers) = mpsc::channel();
        let mut requests = Vec::new();
        let mut submit = |engine: &mut sidereal::Engine, request: Request| {
            let (sender, index) = (sender.clone(), requests.len());
            let reply = move |answer| sender.send((index, answer)).expect("a receiver");
            engine.submit(request.clone(), reply).expect("a sound request");
            requests.push(request);
        };
        submit(&mut engine, some(300));
        let mut num_steps = 0;
        while !engine.is_idle() {
            if num_steps % 3 == 0 && num_steps < 9 {
                submit(&mut engine, some(5));
            }
            engine.step().expect("the engine goes on");
            engine.check_integrity().expect("all pages");
            num_steps += 1;
            assert!(num_steps < 1000, "seed {seed}: the long one never ends");
        }
        let answers: Vec<(usize, Result<Answer, Error>)> = answers.try_iter().collect();
        assert_eq!(answers.len(), requests.len());
        for (index, answer) in &answers {
            let expected = alone.recommend(&requests[*index]).expect("a sound request");
            assert_eq!(answer.as_ref().expect("a sound request"), &expected, "seed {seed}");
        }
        assert!(num_steps > 5, "seed {seed}: it was read in {num_steps} steps");
        num_passed += usize::from(answers[0].0 != 0);
        num_by_encoders += usize::from(tiny.has_encoder());
    }
    // Where a piece of the long prompt is more than all tokens of a step, the step has nothing else.
    assert!(num_passed > 14, "the first short one was answered first {num_passed} times of 24");
    assert!((5..20).contains(&num_by_encoders), "{num_by_encoders} of 24 have encoders");
}

#[test]
fn a_long_prompt_that_is_given_up_half_read_leaves_nothing_behind() {
    for seed in (0..40).filter(|&seed| Tiny::new(seed).has_encoder()) {
        let tiny = Tiny::new(seed);
        let options = EngineOptions::default().with_threads(1).with_tokens_per_step(16);
        let mut engine = tiny.open_as(Arc::clone(&tiny.catalog), &options);
        let long = |token: u32| Request::from_tokens(vec![token % tiny.num_tokens(); 300]);
        let short = Request::from_tokens([1]);
        (0..20).for_each(|_| drop(engine.recommend(&short).expect("a sound request")));
        let first = engine.submit(long(3), |answer| assert!(answer.is_err()));
        let first = first.expect("a sound request");
        (0..4).for_each(|_| engine.step().expect("the engine goes on"));
        engine.cancel(first);
        let second = engine.recommend(&long(4)).expect("a sound request");
        assert_eq!(second, no_cache(&tiny).recommend(&long(4)).expect("a sound request"));
        engine.check_integrity().expect("all pages");
        let again = engine.recommend(&long(4)).expect("a sound request");
        assert_eq!((again.cached_tokens, again.tokens), (300, 300), "what was read is kept");
    }
}
