//! One owner of a step: however many callers there are, from wherever they call, none hangs, none
//! takes another's answer, and what one does harms its own request alone.
#![allow(unsafe_code)] // forks

mod common;
#[path = "common/folders.rs"]
mod folders;

use std::collections::HashMap;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::task::{Context, Wake, Waker};
use std::time::Duration;

use common::tiny::Tiny;
use folders::{Folder, QWEN3, models};
use sidereal::catalog::Catalog;
use sidereal::{
    Answer, EngineOptions, Error, Handle, Input, MAX_THREADS, Recommender, RecommenderOptions,
    Request,
};

/// Longer than any of these tests takes that does not hang.
const PATIENCE: Duration = Duration::from_secs(300);

/// Fails where `test` hangs.
fn in_time(test: impl FnOnce() + Send + 'static) {
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        test();
        let _ = sender.send(()); // nobody listens who has lost patience
    });
    match receiver.recv_timeout(PATIENCE) {
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("this hangs"),
        _ => thread.join().expect("the test passes"),
    }
}

fn open(tiny: &Tiny, options: &RecommenderOptions) -> Recommender {
    let engine = EngineOptions::default().with_threads(2);
    let engine = tiny.open_as(Arc::clone(&tiny.catalog), &engine);
    Recommender::from_engine(engine, options).expect("a thread")
}

fn requests(tiny: &Tiny, seed: u64, count: usize) -> Vec<Request> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let request = |_| {
        let tokens = (0..rng.usize(1..40)).map(|_| rng.u32(0..tiny.num_tokens()));
        let mut request = Request::from_tokens(tokens.collect::<Vec<u32>>());
        request.beams = rng.usize(1..20);
        request
    };
    (0..count).map(request).collect()
}

fn alone(tiny: &Tiny, requests: &[Request]) -> Vec<Answer> {
    let mut engine = tiny.open(1);
    requests.iter().map(|request| engine.recommend(request).expect("a sound request")).collect()
}

/// A gate that the first step waits before, until its sender sends or is dropped.
fn gate() -> (mpsc::Sender<()>, impl Fn(u64) + Send + Sync + 'static) {
    let (sender, receiver) = mpsc::channel();
    let gate = Mutex::new(Some(receiver));
    let wait = move |_| {
        let receiver = gate.lock().expect("no holder panics").take();
        if let Some(receiver) = receiver {
            let _ = receiver.recv(); // either way the gate is open
        }
    };
    (sender, wait)
}

#[test]
fn a_recommender_is_shared_by_threads() {
    fn is_shared<T: Clone + Send + Sync + 'static>() {}
    fn is_sent<T: Send + 'static>() {}
    is_shared::<Recommender>();
    is_sent::<Handle>();
}

#[test]
fn recommend_all_beside_submit_answers_both() {
    in_time(|| {
        let tiny = Tiny::new(21);
        let recommender = open(&tiny, &RecommenderOptions::default());
        let (batch, single) = (requests(&tiny, 1, 200), requests(&tiny, 2, 200));
        let (of_batch, of_single) = (alone(&tiny, &batch), alone(&tiny, &single));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut answers: HashMap<usize, Answer> = HashMap::new();
                recommender.recommend_all(&batch, |index, answer| {
                    let before = answers.insert(index, answer.expect("a sound request"));
                    assert!(before.is_none(), "{index} is answered once");
                });
                assert_eq!(answers.len(), batch.len());
                answers.iter().for_each(|(index, answer)| assert_eq!(*answer, of_batch[*index]));
            });
            let handles: Vec<Handle> = single
                .iter()
                .map(|request| recommender.submit(request.clone()).expect("room"))
                .collect();
            for (handle, expected) in handles.into_iter().zip(&of_single) {
                assert_eq!(handle.wait().expect("a sound request"), *expected);
            }
        });
    });
}

#[test]
fn callers_of_every_kind_share_one_engine() {
    in_time(|| {
        let tiny = Tiny::new(22);
        let recommender = open(&tiny, &RecommenderOptions::default().with_max_queued(20));
        let requests = requests(&tiny, 3, 40);
        let expected = alone(&tiny, &requests);
        std::thread::scope(|scope| {
            for kind in 0..8 {
                let (recommender, requests, expected) = (&recommender, &requests, &expected);
                let check = move |index: usize, answer: Result<Answer, Error>| {
                    assert_eq!(answer.expect("a sound request"), expected[index], "kind {kind}");
                };
                scope.spawn(move || match kind % 4 {
                    0 => recommender.recommend_all(requests, check),
                    1 => requests.iter().enumerate().for_each(|(index, request)| {
                        check(index, recommender.recommend(request));
                    }),
                    2 => requests.iter().enumerate().for_each(|(index, request)| {
                        let answer = loop {
                            match recommender.submit_deferred(request.clone()) {
                                Ok(handle) => break pollster::block_on(handle),
                                Err(Error::Overloaded { .. }) => std::thread::yield_now(),
                                Err(error) => break Err(error),
                            }
                        };
                        check(index, answer);
                    }),
                    _ => requests.iter().enumerate().for_each(|(index, request)| {
                        let (sender, answer) = mpsc::channel();
                        let callback = |sender: mpsc::Sender<_>| {
                            move |answer| sender.send(answer).expect("a receiver")
                        };
                        while let Err(error) =
                            recommender.submit_with(request.clone(), callback(sender.clone()))
                        {
                            assert_eq!(error.code(), "overloaded");
                            std::thread::yield_now();
                        }
                        check(index, answer.recv().expect("it is called"));
                    }),
                });
            }
        });
        recommender.check_integrity().expect("all pages are in one place");
    });
}

#[test]
fn a_callback_may_submit_and_is_told_where_it_would_wait_for_itself() {
    in_time(|| {
        let tiny = Tiny::new(23);
        let recommender = open(&tiny, &RecommenderOptions::default());
        let request = requests(&tiny, 4, 1).remove(0);
        let (sender, told) = mpsc::channel();
        let (own, again) = (recommender.clone(), request.clone());
        let callback = move |answer: Result<Answer, Error>| {
            let mut codes = vec![answer.map_or_else(|error| error.code(), |_| "answered")];
            let mut note = |error: Option<Error>| {
                codes.push(error.map_or("no error", |error| error.code()));
            };
            note(own.recommend(&again).err());
            note(own.rank(again.input.clone(), ["0"]).err());
            note(own.submit(again.clone()).and_then(Handle::wait).err());
            note(own.check_integrity().err());
            note(own.replace_weights([]).err());
            note(own.status().err());
            own.recommend_all(std::slice::from_ref(&again), |_, answer| note(answer.err()));
            let sender_of_next = sender.clone();
            let next = own.submit_with(again.clone(), move |answer| {
                let code = answer.map_or_else(|error| error.code(), |_| "answered");
                sender_of_next.send(vec![code]).expect("a receiver");
            });
            note(next.err());
            sender.send(codes).expect("a receiver");
        };
        recommender.submit_with(request, callback).expect("room");
        const WAITS: &str = "called_from_callback";
        let codes = told.recv().expect("it is called");
        assert_eq!(
            codes,
            ["answered", WAITS, WAITS, WAITS, WAITS, WAITS, "no error", WAITS, "no error"]
        );
        assert_eq!(told.recv().expect("the next one as well"), ["answered"]);
    });
}

#[test]
fn a_callback_that_panics_harms_its_own_request_alone() {
    in_time(|| {
        let tiny = Tiny::new(24);
        let recommender = open(&tiny, &RecommenderOptions::default());
        let requests = requests(&tiny, 5, 60);
        let expected = alone(&tiny, &requests);
        let called = Arc::new(AtomicUsize::new(0));
        let mut handles = Vec::new();
        for request in &requests {
            let called = Arc::clone(&called);
            let callback = move |_| {
                called.fetch_add(1, Ordering::Relaxed);
                panic!("on purpose");
            };
            recommender.submit_with(request.clone(), callback).expect("room");
            handles.push(recommender.submit(request.clone()).expect("room"));
        }
        for (handle, expected) in handles.into_iter().zip(&expected) {
            assert_eq!(handle.wait().expect("a sound request"), *expected);
        }
        recommender.shutdown(PATIENCE).expect("one process");
        assert_eq!(called.load(Ordering::Relaxed), requests.len());
    });
}

struct Panics;

impl Wake for Panics {
    fn wake(self: Arc<Self>) {
        panic!("on purpose");
    }
}

#[test]
fn a_waker_that_panics_harms_its_own_request_alone() {
    in_time(|| {
        let tiny = Tiny::new(25);
        let (open_gate, before_step) = gate();
        let recommender = open(&tiny, &RecommenderOptions::default().with_before_step(before_step));
        let requests = requests(&tiny, 6, 20);
        let expected = alone(&tiny, &requests);
        let waker = Waker::from(Arc::new(Panics));
        let (mut harmed, mut sound) = (Vec::new(), Vec::new());
        for request in &requests {
            let mut handle = recommender.submit(request.clone()).expect("room");
            let polled = Pin::new(&mut handle).poll(&mut Context::from_waker(&waker));
            assert!(polled.is_pending(), "no step was done");
            harmed.push(handle);
            sound.push(recommender.submit(request.clone()).expect("room"));
        }
        open_gate.send(()).expect("a step waits");
        for (handle, expected) in sound.into_iter().zip(&expected) {
            assert_eq!(handle.wait().expect("a sound request"), *expected);
        }
        // Their answers are there all the same.
        for (handle, expected) in harmed.into_iter().zip(&expected) {
            assert_eq!(handle.wait().expect("a sound request"), *expected);
        }
    });
}

#[test]
fn the_last_recommender_may_be_dropped_by_a_callback() {
    in_time(|| {
        let tiny = Tiny::new(26);
        for with_handle in [false, true] {
            let (open_gate, before_step) = gate();
            let recommender =
                open(&tiny, &RecommenderOptions::default().with_before_step(before_step));
            let request = requests(&tiny, 7, 1).remove(0);
            let (sender, told) = mpsc::channel();
            let mut other = Request::from_tokens(vec![1; 300]);
            other.beams = 100;
            let other = recommender.submit(other).expect("room");
            let (other, dropped) = match with_handle {
                true => (None, Some(other)),
                false => (Some(other), None),
            };
            let own = recommender.clone();
            let callback = move |_| {
                drop((own, dropped));
                sender.send(()).expect("a receiver");
            };
            recommender.submit_with(request, callback).expect("room");
            drop(recommender);
            open_gate.send(()).expect("a step waits");
            told.recv().expect("it is called, and neither panics nor hangs");
            if let Some(handle) = other {
                match handle.wait() {
                    Ok(_) | Err(Error::ShuttingDown) => {}
                    Err(error) => panic!("{error}"),
                }
            }
        }
    });
}

#[test]
fn a_recommender_is_shut_down_through_any_clone_and_as_often_as_one_likes() {
    in_time(|| {
        let tiny = Tiny::new(27);
        let recommender = open(&tiny, &RecommenderOptions::default());
        let all = recommender.submit_all(requests(&tiny, 8, 50));
        let handles: Vec<Handle> = all.into_iter().map(|handle| handle.expect("room")).collect();
        std::thread::scope(|scope| {
            for _ in 0..3 {
                let own = recommender.clone();
                scope.spawn(move || own.shutdown(PATIENCE).expect("one process"));
            }
        });
        for handle in handles {
            assert!(handle.is_answered(), "accepted requests are answered before");
            handle.wait().expect("a sound request");
        }
        let request = Request::from_tokens([1]);
        let refused = [
            recommender.submit(request.clone()).err(),
            recommender.submit_deferred(request.clone()).err(),
            recommender.submit_with(request.clone(), |_| panic!("it is refused")).err(),
            recommender.submit_all(vec![request.clone()]).remove(0).err(),
            recommender.recommend(&request).err(),
            recommender.check_integrity().err(),
        ];
        for error in refused {
            assert!(matches!(error, Some(Error::ShuttingDown)), "{error:?}");
        }
        let mut told = 0;
        recommender.recommend_all(&[request.clone(), request], |_, answer| {
            assert!(matches!(answer, Err(Error::ShuttingDown)));
            told += 1;
        });
        assert_eq!(told, 2);
        recommender.shutdown(Duration::ZERO).expect("once more");
        recommender.status().expect("it can be asked still");
    });
}

#[test]
fn a_request_that_is_cancelled_is_told_once_and_frees_what_it_held() {
    in_time(|| {
        let tiny = Tiny::new(28);
        let (open_gate, before_step) = gate();
        let (step_begins, begun) = mpsc::channel();
        let before_step = move |step| {
            let _ = step_begins.send(()); // nobody listens after the first
            before_step(step);
        };
        let recommender = open(&tiny, &RecommenderOptions::default().with_before_step(before_step));
        // The engine takes what follows after the step that waits at the gate.
        let first = recommender.submit(Request::from_tokens([1])).expect("room");
        begun.recv().expect("a step");
        let (sender, told) = mpsc::channel();
        let ids: Vec<u64> = requests(&tiny, 9, 30)
            .into_iter()
            .enumerate()
            .map(|(index, request)| {
                let sender = sender.clone();
                let callback = move |answer: Result<Answer, Error>| {
                    sender.send((index, answer.err())).expect("a receiver");
                };
                recommender.submit_with(request, callback).expect("room")
            })
            .collect();
        ids.iter().step_by(2).for_each(|&id| recommender.cancel(id).expect("one process"));
        open_gate.send(()).expect("a step waits");
        first.wait().expect("a sound request");
        recommender.shutdown(PATIENCE).expect("one process");
        drop(sender);
        let mut outcomes: Vec<_> = told.iter().collect();
        outcomes.sort_by_key(|(index, _)| *index);
        assert_eq!(outcomes.len(), ids.len(), "each is told once");
        for (index, error) in outcomes {
            match index % 2 {
                0 => assert!(matches!(error, Some(Error::Cancelled)), "{index} {error:?}"),
                _ => assert!(error.is_none(), "{index} {error:?}"),
            }
        }
        let status = recommender.status().expect("one process").engine;
        assert_eq!((status.waiting, status.running), (0, 0));
        assert_eq!(status.free_tail_pages, status.tail_pages);
    });
}

#[test]
fn the_status_and_a_deferred_request_do_not_wait_for_the_step_under_way() {
    in_time(|| {
        let tiny = Tiny::new(29);
        let (open_gate, before_step) = gate();
        let options = RecommenderOptions::default().with_max_queued(3);
        let recommender = open(&tiny, &options.with_before_step(before_step));
        let first = recommender.submit(Request::from_tokens([1])).expect("room");
        // The step does not begin before the gate is opened: whoever waited for it would hang.
        let unknown = recommender.submit_deferred(Request::from_history(["no such item"]));
        let unknown = unknown.expect("room");
        let mut handles = recommender.submit_all(vec![Request::from_tokens([1]); 3]);
        let refused = handles.split_off(1);
        for handle in refused {
            let error = handle.err().expect("three may wait");
            assert!(matches!(error, Error::Overloaded { queued: 3, limit: 3, .. }), "{error}");
        }
        let status = recommender.status().expect("one process");
        assert_eq!((status.queued, status.num_steps, status.weights_version), (3, 0, 1));
        assert!(!first.is_answered());
        drop(open_gate);
        first.wait().expect("a sound request");
        assert_eq!(unknown.wait().expect_err("unknown").code(), "unknown_item");
        handles.remove(0).expect("room").wait().expect("a sound request");
        let status = recommender.status().expect("one process");
        assert!(status.num_steps > 0 && status.matrix_flops > 0 && status.phases.is_some());
    });
}

#[test]
fn a_callers_own_panic_while_answers_are_delivered_leaves_the_engine_to_others() {
    in_time(|| {
        let tiny = Tiny::new(30);
        let recommender = open(&tiny, &RecommenderOptions::default());
        let requests = requests(&tiny, 10, 300);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            recommender.recommend_all(&requests, |_, _| panic!("on purpose"));
        }));
        assert!(outcome.is_err());
        let expected = alone(&tiny, &requests[..1]);
        assert_eq!(recommender.recommend(&requests[0]).expect("sound"), expected[0]);
    });
}

unsafe extern "C" {
    fn fork() -> i32;
    fn waitpid(pid: i32, status: *mut i32, options: i32) -> i32;
    fn _exit(code: i32) -> !;
    fn alarm(seconds: u32) -> u32;
}

#[test]
#[cfg_attr(not(target_os = "linux"), ignore = "forks as Linux does")]
fn a_forked_child_is_told_instead_of_hanging() {
    let tiny = Tiny::new(31);
    let mut engine = tiny.open(2);
    let recommender = open(&tiny, &RecommenderOptions::default());
    let request = requests(&tiny, 11, 1).remove(0);
    let mut long = Request::from_tokens(vec![1; 300]);
    long.beams = 100;
    let handle = recommender.submit(long).expect("room");
    // SAFETY: the child calls what is tested and ends without unwinding.
    let child = unsafe { fork() };
    assert!(child >= 0, "a process can be forked");
    if child == 0 {
        // SAFETY: a call of the operating system; it ends a child that hangs.
        unsafe { alarm(60) };
        let mut told = 0;
        let mut note = |error: Option<Error>| {
            if matches!(error, Some(Error::Forked)) {
                told += 1;
            }
        };
        note(engine.recommend(&request).err());
        note(engine.step().err());
        note(recommender.recommend(&request).err());
        note(recommender.submit(request.clone()).err());
        note(recommender.submit_deferred(request.clone()).err());
        note(recommender.submit_with(request.clone(), |_| {}).err());
        note(recommender.status().err());
        note(recommender.cancel(1).err());
        note(recommender.check_integrity().err());
        note(recommender.replace_weights([]).err());
        note(recommender.shutdown(PATIENCE).err());
        recommender.recommend_all(&[request], |_, answer| note(answer.err()));
        note(handle.wait().err());
        drop(recommender);
        // SAFETY: ends the child at once, without what the parent registered for its own end.
        unsafe { _exit(told) };
    }
    let mut status = 0;
    // SAFETY: `status` outlives the call.
    let ended = unsafe { waitpid(child, &raw mut status, 0) };
    assert_eq!(ended, child);
    assert_eq!(status & 0x7f, 0, "the child was killed: it hung or crashed");
    assert_eq!(status >> 8 & 0xff, 13, "each call is told so");
    handle.wait().expect("the parent goes on");
    recommender.recommend(&request).expect("the parent goes on");
}

#[test]
fn options_that_cannot_be_are_refused_before_anything_is_opened() {
    let tiny = Tiny::new(32);
    let folder = models().join("industrial");
    let refused = |options: &RecommenderOptions| {
        let catalog = Arc::clone(&tiny.catalog);
        let start = std::time::Instant::now();
        let error = Recommender::open(&folder, catalog, options).err().expect("no such options");
        assert!(start.elapsed() < Duration::from_secs(5), "{error}");
        error
    };
    let engine = EngineOptions::default;
    for (option, engine) in [
        ("threads", engine().with_threads(5000)),
        ("threads", engine().with_threads(MAX_THREADS + 1)),
        ("max_context", engine().with_max_context(0)),
        ("max_beam_rows", engine().with_max_beam_rows(0)),
        ("rows_per_step", engine().with_rows_per_step(0)),
        ("rows_per_step", engine().with_rows_per_step(usize::MAX)),
        ("tokens_per_step", engine().with_tokens_per_step(0)),
        ("tokens_per_step", engine().with_tokens_per_step(usize::MAX)),
    ] {
        let error = refused(&RecommenderOptions::default().with_engine(engine));
        assert_eq!(error.code(), "invalid_option");
        assert!(error.to_string().starts_with(option), "{error}");
    }
    for max_queued in [0, usize::MAX] {
        let error = refused(&RecommenderOptions::default().with_max_queued(max_queued));
        assert!(matches!(error, Error::InvalidOption { option: "max_queued", .. }), "{error}");
    }
    let error = refused(&RecommenderOptions::new("abacus"));
    assert!(matches!(error, Error::Device { .. }), "{error}");
    assert!(error.to_string().contains("\"cpu\""), "{error}");
    let error = refused(&RecommenderOptions::new("cpu").with_dtype(sidereal::Dtype::F16));
    assert_eq!(error.code(), "unsupported");
    if !cfg!(feature = "cuda") {
        for name in ["cuda", "cuda:0", "cuda:7"] {
            let error = refused(&RecommenderOptions::new(name));
            assert!(error.to_string().contains("--features cuda"), "{error}");
        }
    }
}

/// The demo model, opened once by its names alone.
fn demo() -> &'static Recommender {
    static DEMO: OnceLock<Recommender> = OnceLock::new();
    DEMO.get_or_init(|| {
        let folder = models().join("industrial");
        let catalog = Catalog::open(&folder.join("items.jsonl")).expect("the demo's items");
        let options = RecommenderOptions::new("cpu").with_threads(1);
        Recommender::open(&folder, Arc::new(catalog), &options).expect("the demo model")
    })
}

#[test]
fn given_items_are_ranked_with_the_scores_that_a_search_gives_them() {
    let request = Request::from_history(["168", "278"]);
    let found = demo().recommend(&request).expect("a sound request");
    let names: Vec<String> = found.items.iter().map(|found| found.item.clone()).collect();
    let ranked = demo().rank(request.input.clone(), names.iter().rev().cloned());
    let ranked = ranked.expect("known items");
    assert_eq!(ranked.items, found.items);
    let error = demo().rank(request.input, Vec::<String>::new()).expect_err("no items");
    assert_eq!(error.code(), "invalid_field");
}

#[test]
fn a_user_without_a_history_is_answered_where_the_prompt_has_tokens_of_its_own() {
    let (mut answered, mut empty) = (0, 0);
    for seed in 0..60 {
        let tiny = Tiny::new(seed);
        let mut engine = tiny.open(1);
        let nobody = Request::from_history(Vec::<String>::new());
        match engine.input_tokens(&Input::History(Vec::new())) {
            Ok(tokens) => {
                assert!(!tokens.is_empty(), "seed {seed}");
                let expected = engine.recommend(&Request::from_tokens(tokens)).expect("sound");
                assert_eq!(engine.recommend(&nobody).expect("a cold start"), expected);
                answered += 1;
            }
            Err(error) => {
                assert!(matches!(error, Error::EmptyInput), "seed {seed}: {error}");
                assert_eq!(engine.recommend(&nobody).expect_err("nothing").code(), "empty_input");
                empty += 1;
            }
        }
    }
    assert!(answered > 5 && empty > 2, "{answered} answered, {empty} empty");
    let mut bare = Folder::of(QWEN3).open().expect("a sound checkpoint");
    let nobody = Request::from_history(Vec::<String>::new());
    assert!(matches!(bare.recommend(&nobody), Err(Error::EmptyInput)));
}
