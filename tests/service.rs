//! The thread behind a recommender: many callers, cancellation, deadlines, overload, shutdown, failure.

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::tiny::Tiny;
use sidereal::{EngineOptions, Error, Recommender, RecommenderOptions, Request};

fn request(rng: &mut fastrand::Rng, tiny: &Tiny) -> Request {
    let tokens: Vec<u32> = (0..rng.usize(1..40)).map(|_| rng.u32(0..tiny.num_tokens())).collect();
    let mut request = Request::from_tokens(tokens);
    request.beams = rng.usize(1..30);
    request.user = rng.bool().then(|| rng.u8(0..9).to_string());
    request
}

fn start(tiny: &Tiny, options: RecommenderOptions) -> Recommender {
    let engine = EngineOptions::default().with_threads(2);
    let engine = tiny.open_as(Arc::clone(&tiny.catalog), &engine);
    Recommender::from_engine(engine, &options).expect("a thread")
}

/// A recommender whose thread waits before each step.
fn slow(tiny: &Tiny, step: Duration, max_queued: usize) -> Recommender {
    let options = RecommenderOptions::default().with_max_queued(max_queued);
    start(tiny, options.with_before_step(move |_| std::thread::sleep(step)))
}

#[test]
fn ten_thousand_requests_of_64_threads_are_all_answered_cancelled_or_refused() {
    let tiny = Tiny::new(5);
    let service = start(&tiny, RecommenderOptions::default().with_max_queued(48));
    let alone = Mutex::new(tiny.open(1));
    let counts: [AtomicUsize; 4] = Default::default();
    let [answered, cancelled, refused, checked] = &counts;
    std::thread::scope(|scope| {
        for thread in 0..64 {
            let (service, tiny, alone) = (&service, &tiny, &alone);
            scope.spawn(move || {
                let mut rng = fastrand::Rng::with_seed(thread);
                let mine = if thread < 16 { 157 } else { 156 };
                for turn in 0..mine {
                    let request = request(&mut rng, tiny);
                    let handle = match service.submit(request.clone()) {
                        Ok(handle) => handle,
                        Err(Error::Overloaded { queued, limit, retry_after_ms, .. }) => {
                            assert!(queued >= limit && retry_after_ms > 0);
                            refused.fetch_add(1, Ordering::Relaxed);
                            std::thread::sleep(Duration::from_millis(1));
                            continue;
                        }
                        Err(error) => panic!("{error}"),
                    };
                    if rng.u8(0..4) == 0 {
                        if rng.bool() {
                            std::thread::sleep(Duration::from_micros(rng.u64(0..500)));
                        }
                        drop(handle);
                        cancelled.fetch_add(1, Ordering::Relaxed);
                        continue;
                    }
                    let answer = match rng.bool() {
                        true => handle.wait(),
                        false => pollster::block_on(handle),
                    };
                    let answer = answer.expect("a sound request");
                    answered.fetch_add(1, Ordering::Relaxed);
                    if turn % 16 == 0 {
                        let alone = &mut *alone.lock().expect("no holder panics");
                        let expected = alone.recommend(&request).expect("a sound request");
                        assert_eq!(answer, expected, "thread {thread}");
                        checked.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let [answered, cancelled, refused, checked] =
        [answered, cancelled, refused, checked].map(|count| count.load(Ordering::Relaxed));
    println!("{answered} answered, {cancelled} cancelled, {refused} refused");
    assert_eq!(answered + cancelled + refused, 10_000);
    assert!(answered > 500 && cancelled > 100 && checked > 20, "{answered} {cancelled} {checked}");
    // One more answer, and the cancelled ones are gone as well.
    service.submit(Request::from_tokens([1])).expect("room").wait().expect("an answer");
    let status = service.status().expect("it goes on").engine;
    assert_eq!((status.waiting, status.running), (0, 0));
    assert_eq!(status.free_tail_pages, status.tail_pages);
    service.check_integrity().expect("all pages");
}

#[test]
fn a_panic_on_the_services_thread_is_an_error_for_every_caller() {
    let tiny = Tiny::new(6);
    let options = RecommenderOptions::default().with_max_queued(1000).with_before_step(|step| {
        std::thread::sleep(Duration::from_millis(20));
        assert!(step < 1, "a fault on purpose");
    });
    let service = start(&tiny, options);
    let handles: Vec<_> = (0..200)
        .map(|_| {
            let mut long = Request::from_tokens(vec![1; 200]);
            long.beams = 100;
            service.submit(long).expect("it runs still")
        })
        .collect();
    let mut failed = 0;
    for handle in handles {
        match handle.wait() {
            Ok(_) => {}
            Err(Error::EngineFailed { reason }) => {
                assert!(reason.contains("a fault on purpose"), "{reason}");
                failed += 1;
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert!(failed > 0);
    let error = service.submit(Request::from_tokens([1])).err().expect("it has failed");
    assert_eq!(error.code(), "engine_failed");
    service.shutdown(Duration::from_secs(5)).expect("one process");
}

#[test]
fn a_full_queue_refuses_and_says_so() {
    let tiny = Tiny::new(7);
    let service = slow(&tiny, Duration::from_millis(50), 3);
    let mut handles = Vec::new();
    let error = loop {
        match service.submit(Request::from_tokens([1])) {
            Ok(handle) => handles.push(handle),
            Err(error) => break error,
        }
        assert!(handles.len() < 1000, "nothing is ever refused");
    };
    assert!(matches!(error, Error::Overloaded { queued: 3.., limit: 3, .. }), "{error}");
    assert!(error.to_string().contains("try again in"), "{error}");
    assert!(error.retry_after().is_some_and(|after| after >= Duration::from_millis(1)));
    for handle in handles {
        handle.wait().expect("what was accepted is answered");
    }
    let handle = service.submit(Request::from_tokens([1])).expect("there is room again");
    handle.wait().expect("it is answered as well");
}

#[test]
fn a_deadline_that_goes_by_is_told_in_time() {
    let tiny = Tiny::new(8);
    let service = slow(&tiny, Duration::from_millis(30), 1000);
    let mut request = Request::from_tokens([1]);
    request.deadline = Some(Duration::from_millis(10));
    let error = service.submit(request.clone()).expect("room").wait().expect_err("too late");
    assert!(
        matches!(error, Error::DeadlineExceeded { deadline_ms, .. } if deadline_ms == 10.0),
        "{error}"
    );
    request.deadline = Some(Duration::from_secs(60));
    service.submit(request).expect("room").wait().expect("in time");
}

#[test]
fn a_bad_request_is_refused_where_it_is_handed_over() {
    let service = start(&Tiny::new(9), RecommenderOptions::default());
    let error = service.submit(Request::from_history(["no such item"])).err().expect("unknown");
    assert_eq!(error.code(), "unknown_item");
}

#[test]
fn a_shutdown_finishes_what_was_accepted_or_tells() {
    let tiny = Tiny::new(10);
    let submit = |service: &Recommender| -> Vec<_> {
        (0..50).map(|_| service.submit(Request::from_tokens([1, 2])).expect("room")).collect()
    };
    let service = slow(&tiny, Duration::from_millis(1), 1000);
    let handles = submit(&service);
    service.shutdown(Duration::from_secs(60)).expect("one process");
    assert!(handles.iter().all(|handle| handle.is_answered()));
    handles.into_iter().for_each(|handle| drop(handle.wait().expect("finished")));

    let service = slow(&tiny, Duration::from_millis(100), 1000);
    let handles = submit(&service);
    let start = Instant::now();
    drop(service);
    let told = handles.into_iter().map(|handle| handle.wait());
    let told = told.filter(|answer| matches!(answer, Err(Error::ShuttingDown))).count();
    assert!(told > 0, "nothing was left to tell");
    assert!(start.elapsed() < Duration::from_secs(30));
}
