//! Many requests, handed over a few at a time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Sender};

use super::engine::Engine;
use crate::answer::Answer;
use crate::backend::Backend;
use crate::error::Result;
use crate::request::Request;

/// Requests of one feed that wait or run at most.
const MAX_IN_FLIGHT: usize = 64;

/// Requests that an engine takes as it gets on with them. Which requests share a step depends on
/// the requests alone, not on the speed of the thread that asks.
pub(crate) struct Feed<I> {
    requests: std::iter::Enumerate<std::iter::Fuse<I>>,
    answers: Sender<(usize, Result<Answer>)>,
    in_flight: Arc<AtomicUsize>,
    /// Nobody receives the answers any more.
    is_abandoned: Arc<AtomicBool>,
}

impl<I: Iterator<Item = Request>> Feed<I> {
    /// A feed whose answers go to `answers`, each with its request's index.
    pub fn new(requests: I, answers: Sender<(usize, Result<Answer>)>) -> Feed<I> {
        Feed {
            requests: requests.fuse().enumerate(),
            answers,
            in_flight: Arc::default(),
            is_abandoned: Arc::default(),
        }
    }

    /// Hands over requests until enough are on their way. Whether any are.
    pub fn refill<B: Backend>(&mut self, engine: &mut Engine<B>) -> bool {
        while self.in_flight.load(Ordering::Relaxed) < MAX_IN_FLIGHT
            && !self.is_abandoned.load(Ordering::Relaxed)
        {
            let Some((index, request)) = self.requests.next() else { break };
            let answers = self.answers.clone();
            let (in_flight, is_abandoned) =
                (Arc::clone(&self.in_flight), Arc::clone(&self.is_abandoned));
            let callback = move |answer| {
                in_flight.fetch_sub(1, Ordering::Relaxed);
                if answers.send((index, answer)).is_err() {
                    is_abandoned.store(true, Ordering::Relaxed);
                }
            };
            match engine.submit(request, callback) {
                Ok(_) => {
                    self.in_flight.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => {
                    let is_abandoned = self.answers.send((index, Err(error))).is_err();
                    self.is_abandoned.fetch_or(is_abandoned, Ordering::Relaxed);
                }
            }
        }
        self.in_flight.load(Ordering::Relaxed) > 0
    }
}

impl<B: Backend> Engine<B> {
    /// Answers many requests and hands each answer to `deliver` with the request's index, in the
    /// order in which they finish.
    pub fn recommend_all(
        &mut self,
        requests: &[Request],
        mut deliver: impl FnMut(usize, Result<Answer>),
    ) {
        let (sender, answers) = mpsc::channel();
        let mut feed = Feed::new(requests.iter().cloned(), sender);
        while feed.refill(self) {
            let stepped = self.step();
            answers.try_iter().for_each(|(index, answer)| deliver(index, answer));
            if stepped.is_err() {
                return; // every request was told
            }
        }
        answers.try_iter().for_each(|(index, answer)| deliver(index, answer));
    }
}
