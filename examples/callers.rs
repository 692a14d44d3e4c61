//! Many callers of one engine: threads that wait, futures, callbacks, deadlines, a full queue.
//!
//! `cargo run --release --example callers`

use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use sidereal::catalog::Catalog;
use sidereal::{Error, Priority, Recommender, RecommenderOptions, Request, Result};

/// Asks in every way that does not hold up others.
///
/// # Errors
/// Those of the files and of the requests.
pub fn main() -> Result<()> {
    let folder = Path::new("models/industrial");
    let catalog = Arc::new(Catalog::open(&folder.join("items.jsonl"))?);
    let options = RecommenderOptions::new("cpu").with_threads(1).with_max_queued(64);
    let recommender = Recommender::open(folder, catalog, &options)?;
    let request = |item: usize| Request::from_history([item.to_string()]).with_beams(10);

    // Threads: clones share the engine, whose steps the requests share.
    std::thread::scope(|scope| {
        let ask = |caller: usize| {
            let recommender = recommender.clone();
            scope.spawn(move || recommender.recommend(&request(caller)))
        };
        let threads: Vec<_> = (1..5).map(ask).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| thread.join().expect("no panic");
        threads.into_iter().map(join).collect::<Result<Vec<_>>>()
    })?;

    // Futures: a handle is one, for any runtime.
    let handles = recommender.submit_all((5..9).map(request).collect());
    pollster::block_on(async {
        for handle in handles {
            println!("a future has {} items", handle?.await?.items.len());
        }
        Ok::<(), Error>(())
    })?;

    // Callbacks run on the engine's thread: they hand the answer on and do no more.
    let (sender, answers) = mpsc::channel();
    for item in 9..13 {
        let sender = sender.clone();
        recommender.submit_with(request(item), move |answer| drop(sender.send((item, answer))))?;
    }
    drop(sender);
    for (item, answer) in answers {
        println!("item {item} leads to {}", answer?.items[0].item);
    }

    // An urgent request goes first; one that is late is told so; a full queue is told at once.
    let urgent = request(13).with_priority(Priority::High).with_deadline(Duration::from_secs(60));
    let late = recommender.submit(request(14).with_deadline(Duration::ZERO))?;
    assert!(!recommender.submit(urgent)?.wait()?.items.is_empty());
    assert_eq!(late.wait().expect_err("it is late").code(), "deadline_exceeded");
    let many = recommender.submit_all((0..200).map(|item| request(item % 50)).collect());
    let num_refused = many.iter().filter(|handle| handle.is_err()).count();
    println!("{num_refused} of {} requests found the queue full", many.len());
    drop(many); // a handle that is dropped cancels its request

    recommender.shutdown(Duration::from_secs(60))
}
