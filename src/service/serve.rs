//! What the service's thread drives: an engine, or a network that answers whole requests.

use std::sync::mpsc::Sender;

use super::Published;
use crate::answer::Answer;
use crate::backend::Backend;
use crate::engine::{Arrival, Engine, EngineStatus, Feed, Prepared, Reply};
use crate::error::{Error, Result};
use crate::metrics::Metrics;
use crate::request::Request;
use crate::schedule::RequestId;

/// What answers requests, step by step, on the service's thread.
pub(crate) trait Serve: Send + 'static {
    /// Takes a request that was prepared.
    fn enqueue(&mut self, prepared: Prepared, reply: Reply);
    /// Takes a request that was not looked at yet.
    fn submit(&mut self, request: Request, arrival: Arrival, reply: Reply);
    /// Takes many requests, to be answered a few at a time.
    fn feed(&mut self, requests: Vec<Request>, answers: Sender<(usize, Result<Answer>)>);
    /// Ends a request with [`Error::Cancelled`].
    fn cancel(&mut self, id: RequestId);
    /// Takes further requests of those that come a few at a time.
    fn refill(&mut self);
    /// Whether nothing waits, runs or is to come.
    fn is_idle(&self) -> bool;
    /// Whether a step would do nothing.
    fn has_no_step(&self) -> bool;
    /// Ends requests that would be answered too late; whether there were some.
    fn refuse(&mut self) -> bool;
    /// Takes a step.
    ///
    /// # Errors
    /// The device's: nothing can be answered any more.
    fn compute(&mut self) -> Result<()>;
    /// Gives answers to their callers.
    fn deliver(&mut self);
    /// Ends all requests.
    fn end_all(&mut self, error: &dyn Fn() -> Error);
    /// Takes the weights that were loaded.
    ///
    /// # Errors
    /// Those of [`Engine::install_weights`].
    fn install_weights(&mut self) -> Result<u64>;
    /// Checks that no page is lost.
    ///
    /// # Errors
    /// [`Error::EngineFailed`] with what is wrong.
    fn check_integrity(&self) -> Result<()>;
    /// What it counts.
    fn metrics(&self) -> &Metrics;
    /// What is told of it, after so many steps.
    fn published(&self, num_steps: u64) -> Published;
    /// What waits and runs.
    fn status(&self) -> EngineStatus;
}

/// An engine, and requests that it takes a few at a time.
pub(crate) struct Stepped<B: Backend> {
    engine: Engine<B>,
    feeds: Vec<Feed<std::vec::IntoIter<Request>>>,
}

impl<B: Backend> Stepped<B> {
    pub fn new(engine: Engine<B>) -> Stepped<B> {
        Stepped { engine, feeds: Vec::new() }
    }
}

impl<B: Backend> Serve for Stepped<B> {
    fn enqueue(&mut self, prepared: Prepared, reply: Reply) {
        self.engine.enqueue(prepared, reply);
    }

    fn submit(&mut self, request: Request, arrival: Arrival, reply: Reply) {
        match self.engine.preparer().prepare_at(arrival, request) {
            Ok(prepared) => self.engine.enqueue(prepared, reply),
            Err(error) => reply.send(Err(error)),
        }
    }

    fn feed(&mut self, requests: Vec<Request>, answers: Sender<(usize, Result<Answer>)>) {
        self.feeds.push(Feed::new(requests.into_iter(), answers));
    }

    fn cancel(&mut self, id: RequestId) {
        self.engine.cancel(id);
    }

    fn refill(&mut self) {
        let engine = &mut self.engine;
        self.feeds.retain_mut(|feed| feed.refill(engine));
    }

    fn is_idle(&self) -> bool {
        self.engine.is_idle() && self.feeds.is_empty()
    }

    fn has_no_step(&self) -> bool {
        self.engine.is_idle()
    }

    fn refuse(&mut self) -> bool {
        self.engine.refuse()
    }

    fn compute(&mut self) -> Result<()> {
        self.engine.compute()
    }

    fn deliver(&mut self) {
        self.engine.deliver();
    }

    fn end_all(&mut self, error: &dyn Fn() -> Error) {
        self.feeds.clear();
        self.engine.end_all(error);
    }

    fn install_weights(&mut self) -> Result<u64> {
        self.engine.install_weights()
    }

    fn check_integrity(&self) -> Result<()> {
        self.engine.check_integrity()
    }

    fn metrics(&self) -> &Metrics {
        self.engine.preparer().metrics()
    }

    fn published(&self, num_steps: u64) -> Published {
        Published {
            engine: self.engine.status(),
            phases: self.engine.phases(),
            matrix_flops: self.engine.backend().matrix_flops(),
            weights_version: self.engine.weights_version(),
            num_steps,
        }
    }

    fn status(&self) -> EngineStatus {
        self.engine.status()
    }
}
