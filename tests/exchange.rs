//! The hand-over of the service, through every interleaving of a few threads.
//!
//! The file is the crate's own; what it waits with is loom's, which runs each test once for every
//! order in which its threads can meet, with at most three unforced switches between them.

#![allow(dead_code)] // the service uses the rest

#[path = "../src/service/exchange.rs"]
mod exchange;

mod sync {
    pub use loom::sync::{Arc, Condvar, Mutex};
}

use exchange::{Exchange, Refusal};
use loom::sync::Arc;
use loom::thread;

fn model(test: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(test);
}

/// Answers what comes, until nothing comes any more; then nobody may still wait.
fn work(exchange: &Exchange<u32, u32>) -> usize {
    let mut answered = 0;
    loop {
        let intake = exchange.take(0, true);
        for (job, ticket) in intake.jobs {
            ticket.answer(2 * job);
            answered += 1;
        }
        if intake.is_closed {
            return answered;
        }
    }
}

#[test]
fn every_job_that_is_taken_in_is_answered() {
    model(|| {
        let exchange = Arc::new(Exchange::new(2));
        let worker = thread::spawn({
            let exchange = Arc::clone(&exchange);
            move || work(&exchange)
        });
        let other = thread::spawn({
            let exchange = Arc::clone(&exchange);
            move || match Exchange::submit(&exchange, 3) {
                Ok(handle) => assert_eq!(handle.wait(), 6),
                Err(refusal) => assert_eq!(refusal, Refusal::Closed),
            }
        });
        let Ok(handle) = Exchange::submit(&exchange, 1) else { panic!("two may wait") };
        exchange.close();
        assert_eq!(handle.wait(), 2);
        other.join().expect("no panic");
        assert!(worker.join().expect("no panic") >= 1);
        assert_eq!(Exchange::submit(&exchange, 5).err(), Some(Refusal::Closed));
    });
}

#[test]
fn a_future_is_woken_by_its_answer() {
    model(|| {
        let exchange = Arc::new(Exchange::new(1));
        let worker = thread::spawn({
            let exchange = Arc::clone(&exchange);
            move || work(&exchange)
        });
        let Ok(handle) = Exchange::submit(&exchange, 4) else { panic!("one may wait") };
        assert_eq!(loom::future::block_on(handle), 8);
        exchange.close();
        worker.join().expect("no panic");
    });
}

#[test]
fn a_handle_that_is_dropped_is_seen_as_cancelled_or_was_answered() {
    model(|| {
        let exchange: Arc<Exchange<u32, u32>> = Arc::new(Exchange::new(1));
        let Ok(handle) = Exchange::submit(&exchange, 1) else { panic!("one may wait") };
        let caller = thread::spawn(move || drop(handle));
        let intake = exchange.take(0, true);
        let (_, ticket) = &intake.jobs[0];
        let was_cancelled = ticket.is_cancelled();
        ticket.answer(2);
        caller.join().expect("no panic");
        assert!(ticket.is_cancelled(), "nobody waits in the end");
        let later = exchange.take(0, false);
        assert!(!was_cancelled || intake.has_cancelled || later.has_cancelled);
    });
}

#[test]
fn a_full_exchange_refuses_and_says_how_full() {
    model(|| {
        let exchange: Arc<Exchange<u32, u32>> = Arc::new(Exchange::new(1));
        let other = thread::spawn({
            let exchange = Arc::clone(&exchange);
            move || Exchange::submit(&exchange, 1).is_ok()
        });
        let mine = Exchange::submit(&exchange, 2);
        let others = other.join().expect("no panic");
        assert!(mine.is_ok() != others, "one of the two");
        assert_eq!(exchange.queued(), 1);
        // What was taken and waits still counts.
        assert_eq!(exchange.take(0, true).jobs.len(), 1);
        assert_eq!(Exchange::submit(&exchange, 3).err(), Some(Refusal::Full { queued: 1 }));
        exchange.take(0, false);
        assert!(Exchange::submit(&exchange, 3).is_ok());
    });
}
