//! The queue before an engine and the oneshot behind it, through every interleaving of a few threads.
//!
//! The files are the crate's own; what they wait with is loom's, which runs each test once for every
//! order in which its threads can meet, with at most three unforced switches between them.

#![allow(dead_code)] // the library uses the rest

#[path = "../src/service/oneshot.rs"]
mod oneshot;
#[path = "../src/service/queue.rs"]
mod queue;

mod sync {
    pub use loom::sync::{Arc, Condvar, Mutex};
}

use loom::sync::Arc;
use loom::thread;
use oneshot::{Receiver, Sender};
use queue::{Backlog, Bounds, PushError, Queue};

fn model(test: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(test);
}

/// So many may wait.
fn bounded<T>(entries: usize) -> Queue<T> {
    Queue::new(Bounds { entries, wait_us: u64::MAX })
}

/// So many wait.
fn waiting(entries: usize) -> Backlog {
    Backlog { entries, ..Backlog::default() }
}

type Entry = (u32, Sender<u32>);

fn entry(number: u32) -> (Entry, Receiver<u32>) {
    let (sender, receiver) = oneshot::channel();
    ((number, sender), receiver)
}

/// Answers what comes, until nothing comes any more.
fn work(queue: &Queue<Entry>) -> usize {
    let mut answered = 0;
    loop {
        let taken = queue.take(waiting(0), true);
        for (number, sender) in taken.entries {
            sender.send(2 * number);
            answered += 1;
        }
        if taken.is_closed {
            return answered;
        }
    }
}

fn spawn_worker(queue: &Arc<Queue<Entry>>) -> thread::JoinHandle<usize> {
    let queue = Arc::clone(queue);
    thread::spawn(move || work(&queue))
}

#[test]
fn every_entry_that_is_taken_in_is_answered() {
    model(|| {
        let queue = Arc::new(bounded(2));
        let worker = spawn_worker(&queue);
        let other = thread::spawn({
            let queue = Arc::clone(&queue);
            move || {
                let (entry, receiver) = entry(3);
                match queue.push(entry) {
                    Ok(()) => assert_eq!(receiver.wait(), Some(6)),
                    Err(error) => assert!(matches!(error, PushError::Closed(_))),
                }
            }
        });
        let (first, receiver) = entry(1);
        assert!(queue.push(first).is_ok(), "two may wait");
        queue.close();
        assert_eq!(receiver.wait(), Some(2));
        other.join().expect("no panic");
        assert!(worker.join().expect("no panic") >= 1);
        assert!(matches!(queue.push(entry(5).0), Err(PushError::Closed(_))));
        assert!(queue.push_uncounted(entry(5).0).is_err());
        assert!(queue.push_wait(entry(5).0).is_err());
        assert!(queue.push_all(vec![entry(5).0]).is_err());
    });
}

#[test]
fn a_future_is_woken_by_its_answer() {
    model(|| {
        let queue = Arc::new(bounded(1));
        let worker = spawn_worker(&queue);
        let (entry, receiver) = entry(4);
        assert!(queue.push(entry).is_ok(), "one may wait");
        let answer = loom::future::block_on(std::future::poll_fn(|context| receiver.poll(context)));
        assert_eq!(answer, Some(8));
        queue.close();
        worker.join().expect("no panic");
    });
}

#[test]
fn a_receiver_is_told_when_its_sender_is_gone() {
    model(|| {
        let (entry, receiver) = entry(4);
        let worker = thread::spawn(move || drop(entry));
        assert_eq!(receiver.wait(), None);
        assert!(receiver.is_ready());
        worker.join().expect("no panic");
    });
}

#[test]
fn a_cancelled_entry_is_seen_with_or_after_the_entry() {
    model(|| {
        let queue: Arc<Queue<u64>> = Arc::new(bounded(1));
        let caller = thread::spawn({
            let queue = Arc::clone(&queue);
            move || {
                assert!(queue.push(7).is_ok(), "one may wait");
                queue.cancel(7);
            }
        });
        let taken = queue.take(waiting(0), true);
        assert_eq!(taken.entries, [7]);
        caller.join().expect("no panic");
        let later = queue.take(waiting(1), false);
        assert_eq!([taken.cancelled, later.cancelled].concat(), [7]);
    });
}

#[test]
fn a_full_queue_refuses_and_says_how_full() {
    model(|| {
        let queue: Arc<Queue<u32>> = Arc::new(bounded(1));
        let other = thread::spawn({
            let queue = Arc::clone(&queue);
            move || queue.push(1).is_ok()
        });
        let mine = queue.push(2);
        let others = other.join().expect("no panic");
        assert!(mine.is_ok() != others, "one of the two");
        assert_eq!(queue.queued(), 1);
        // An entry that was taken and waits still counts.
        assert_eq!(queue.take(waiting(0), true).entries.len(), 1);
        assert!(
            matches!(queue.push(3), Err(PushError::Full { entry: 3, backlog }) if backlog.entries == 1)
        );
        let (rest, backlog) = queue.push_all(vec![4, 5]).expect("it is open");
        assert_eq!((rest, backlog.entries), (vec![4, 5], 1));
        assert!(queue.push_uncounted(6).is_ok(), "this counts towards no limit");
        assert_eq!(queue.take(waiting(0), false).entries, [6]);
        let (rest, backlog) = queue.push_all(vec![4, 5]).expect("it is open");
        assert_eq!((rest, backlog.entries), (vec![5], 1));
    });
}

#[test]
fn a_caller_that_waits_for_room_gets_it_or_is_told_of_the_end() {
    model(|| {
        let queue: Arc<Queue<u32>> = Arc::new(bounded(1));
        assert!(queue.push(1).is_ok());
        let other = thread::spawn({
            let queue = Arc::clone(&queue);
            move || queue.push_wait(2).is_ok()
        });
        assert_eq!(queue.take(waiting(0), true).entries[0], 1);
        let later = queue.take(waiting(0), false).entries;
        queue.close();
        let was_taken_in = other.join().expect("no panic");
        let last = queue.take(waiting(0), false).entries;
        assert_eq!(later.len() + last.len(), usize::from(was_taken_in));
    });
}

#[test]
fn a_queue_is_full_when_its_entries_would_wait_too_long() {
    model(|| {
        let queue: Queue<u32> = Queue::new(Bounds { entries: 10, wait_us: 100 });
        let backlog = |entries, wait_us| Backlog { entries, wait_us, each_us: 40 };
        assert!(queue.push(0).is_ok());
        // The first is taken in whatever is said of the time, and then as many as there is time for.
        queue.take(backlog(0, 500), false);
        queue.take(backlog(0, 500), false);
        assert!(queue.push(1).is_ok());
        assert!(
            matches!(queue.push(2), Err(PushError::Full { backlog, .. }) if backlog.wait_us == 540)
        );
        queue.take(backlog(1, 50), false);
        let (rest, full) = queue.push_all(vec![3, 4, 5]).expect("it is open");
        assert_eq!((rest, full.wait_us), (vec![4, 5], 130));
    });
}
