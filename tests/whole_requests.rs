//! Networks that answer whole requests, behind the recommender's queue: crowds, deadlines, priorities,
//! cancellation, ends. What they answer is told by `golden.rs`, `retrieval.rs` and `ranking.rs`.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use sidereal::catalog::Catalog;
use sidereal::{
    Error, Input, ModelKind, Priority, Recommender, RecommenderOptions, Request, Retriever,
};

const SASREC: &str = "models/sasrec/recbole-small";

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn catalog() -> Arc<Catalog> {
    Arc::new(Catalog::open(&root(SASREC).join("items.jsonl")).expect("items"))
}

fn options() -> RecommenderOptions {
    RecommenderOptions::new("cpu").with_threads(2)
}

fn open(options: &RecommenderOptions) -> Recommender {
    Recommender::open(&root(SASREC), catalog(), options).expect("a checkpoint")
}

/// Holds the service's thread before a step until it is let go.
#[derive(Clone, Default)]
struct Brake(Arc<AtomicBool>);

impl Brake {
    fn options(&self) -> RecommenderOptions {
        let is_let_go = Arc::clone(&self.0);
        let wait = move |_| {
            while !is_let_go.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        let mut options = options();
        options.before_step = Some(Arc::new(wait));
        options
    }

    fn release(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

fn random_request(rng: &mut fastrand::Rng) -> Request {
    let len = rng.usize(0..12);
    let history: Vec<String> = (0..len).map(|_| format!("i{}", rng.usize(1..43))).collect();
    let request = Request::from_history(history).with_top_k(rng.usize(1..8));
    match rng.u8(0..4) {
        0 => request.with_filter("tag:even"),
        1 => request.with_candidates(["i3", "i7", "i40"]),
        2 => request.with_exclude_history(true),
        _ => request,
    }
}

#[test]
fn answers_in_a_crowd_are_those_of_the_retriever_alone() {
    let recommender = open(&options());
    assert_eq!(recommender.kind(), ModelKind::Vectors);
    let retriever = Retriever::open(&root(SASREC), catalog(), &options()).expect("a checkpoint");
    let alike = |request: &Request, found: sidereal::Result<sidereal::Answer>| match (
        retriever.recommend(request),
        found,
    ) {
        (Ok(expected), Ok(found)) => assert_eq!(expected, found, "{request:?}"),
        (Err(expected), Err(found)) => assert_eq!(expected.to_string(), found.to_string()),
        (expected, found) => panic!("{request:?}: {found:?}, not {expected:?}"),
    };
    std::thread::scope(|scope| {
        for seed in 0..6 {
            let (recommender, alike) = (&recommender, &alike);
            scope.spawn(move || {
                let mut rng = fastrand::Rng::with_seed(seed);
                for _ in 0..40 {
                    let request = random_request(&mut rng);
                    alike(&request, recommender.recommend(&request));
                }
            });
        }
    });
    let mut rng = fastrand::Rng::with_seed(99);
    let requests: Vec<Request> = (0..100).map(|_| random_request(&mut rng)).collect();
    let mut answers: Vec<_> = requests.iter().map(|_| None).collect();
    recommender.recommend_all(&requests, |index, answer| answers[index] = Some(answer));
    for (request, answer) in requests.iter().zip(answers) {
        alike(request, answer.expect("all are answered"));
    }
    for (request, handle) in requests.iter().zip(recommender.submit_all(requests.clone())) {
        alike(request, handle.and_then(sidereal::Handle::wait));
    }
    let deferred = recommender.submit_deferred(requests[0].clone()).expect("room");
    alike(&requests[0], deferred.wait());
    let metrics = recommender.metrics().expect("no fork");
    assert!(metrics.answered > 200, "{}", metrics.answered);
    recommender.check_integrity().expect("nothing to lose");
}

#[test]
fn timings_are_given_where_they_are_asked_for() {
    let recommender = open(&options());
    let mut request = Request::from_history(["i3"]);
    assert!(recommender.recommend(&request).expect("an answer").timings.is_none());
    request.timings = true;
    let timings = recommender.recommend(&request).expect("an answer").timings.expect("asked for");
    assert!(timings.total_us >= timings.queued_us);
}

#[test]
fn what_waits_is_ordered_cancelled_and_ended_by_its_deadline() {
    let brake = Brake::default();
    let recommender = open(&brake.options());
    let order = Arc::new(Mutex::new(Vec::new()));
    let submit = |name: &'static str, priority: Priority| {
        let mut request = Request::from_history(["i3", "i7"]);
        request.priority = priority;
        let order = Arc::clone(&order);
        let note = move |answer: sidereal::Result<_>| {
            order.lock().expect("no panic").push((name, answer.is_ok()));
        };
        recommender.submit_with(request, note).expect("room")
    };
    // One is taken and held before its step; the others wait with it.
    submit("first", Priority::Low);
    submit("low", Priority::Low);
    submit("normal", Priority::Normal);
    submit("high", Priority::High);
    let unwanted = submit("unwanted", Priority::High);
    recommender.cancel(unwanted).expect("no fork");
    let dropped = recommender.submit(Request::from_history(["i3"])).expect("room");
    drop(dropped);
    let mut late = Request::from_history(["i3"]);
    late.deadline = Some(Duration::from_millis(1));
    let late = recommender.submit(late).expect("room");
    let kept = recommender.submit(Request::from_history(["i3"])).expect("room");
    std::thread::sleep(Duration::from_millis(20));
    brake.release();
    assert!(matches!(late.wait(), Err(Error::DeadlineExceeded { .. })));
    kept.wait().expect("an answer");
    recommender.shutdown(Duration::from_secs(10)).expect("no fork");
    let order = order.lock().expect("no panic").clone();
    let place = |name: &str| order.iter().position(|(other, _)| *other == name).expect("told");
    assert!(place("high") < place("normal") && place("normal") < place("low"), "{order:?}");
    assert!(!order[place("unwanted")].1);
    assert_eq!(order.iter().filter(|(_, is_answered)| *is_answered).count(), 4, "{order:?}");
    let metrics = recommender.metrics().expect("no fork");
    assert_eq!((metrics.cancelled, metrics.deadline_exceeded), (2, 1));
}

#[test]
fn a_full_queue_refuses_and_an_ended_one_tells() {
    let brake = Brake::default();
    let recommender = open(&brake.options().with_max_queued(4));
    let (sender, answers) = mpsc::channel();
    let mut refused = 0;
    for _ in 0..40 {
        let sender = sender.clone();
        let note = move |answer: sidereal::Result<_>| {
            let _ = sender.send(answer.is_ok());
        };
        match recommender.submit_with(Request::from_history(["i3"]), note) {
            Ok(_) => {}
            Err(Error::Overloaded { limit, .. }) => {
                assert_eq!(limit, 4);
                refused += 1;
            }
            Err(error) => panic!("{error}"),
        }
    }
    drop(sender);
    assert!(refused >= 30, "only {refused} were refused");
    // Nothing is taken in any more, and what was accepted is ended when its time is over.
    let other = recommender.clone();
    let end = std::thread::spawn(move || other.shutdown(Duration::ZERO));
    while recommender.is_serving() {
        std::thread::sleep(Duration::from_millis(1));
    }
    let late = recommender.recommend(&Request::from_history(["i3"]));
    assert!(matches!(late, Err(Error::ShuttingDown)));
    brake.release();
    end.join().expect("no panic").expect("no fork");
    assert_eq!(answers.into_iter().count(), 40 - refused, "each is told once");
}

#[test]
fn what_goes_with_written_codes_alone_is_refused() {
    let recommender = open(&options());
    let error = recommender.replace_weights([]).expect_err("it is opened again instead");
    assert!(matches!(error, Error::Unsupported { .. }));
    let tokens = recommender.input_tokens(&Input::History(vec!["i3".into()]));
    assert!(matches!(tokens, Err(Error::Unsupported { .. })));
    let seeded = Request::from_history(["i3"]).with_seed(4);
    let refused = recommender.submit(seeded).err().expect("no beams");
    assert!(matches!(refused, Error::InvalidField { field: "seed", .. }));
    let metrics = recommender.metrics().expect("no fork");
    assert_eq!(metrics.refused.iter().map(|(_, count)| count).sum::<u64>(), 1);
    let mut with_base = options();
    with_base.base = Some("elsewhere".into());
    let error = Recommender::open(&root(SASREC), catalog(), &with_base).err().expect("no adapter");
    assert!(error.to_string().contains("base"), "{error}");
}
