//! Networks that answer whole requests, some at a time: those that give vectors or score candidates.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use super::Published;
use super::serve::Serve;
use crate::answer::{Answer, Timings};
use crate::catalog::Catalog;
use crate::cost::Micros;
use crate::engine::{Arrival, EngineStatus, Prepared, Reply};
use crate::error::{Error, Result};
use crate::metrics::Metrics;
use crate::request::{Priority, Request};
use crate::schedule::RequestId;

/// Requests that are answered together at most.
const REQUESTS_PER_STEP: usize = 32;
/// A request that has waited so long goes before all others.
const PATIENCE_US: Micros = 1_000_000;

/// What answers whole requests, on the thread that asks and its own pool.
pub(crate) trait AnswersWhole: Send + Sync {
    /// The catalog that is searched.
    fn catalog(&self) -> &Arc<Catalog>;
    /// What computes.
    fn description(&self) -> String;
    /// Threads that compute.
    fn num_threads(&self) -> usize;
    /// Items of a history that are read at most.
    fn max_items(&self) -> usize;
    /// Checks what can be checked of a request without its catalog.
    ///
    /// # Errors
    /// The request's.
    fn check(&self, request: &Request) -> Result<()>;
    /// Answers requests, each as it is answered alone.
    fn answer_all(&self, requests: &[Request]) -> Vec<Result<Answer>>;
    /// Floating-point operations of all matrix products so far.
    fn matrix_flops(&self) -> u64;
}

/// What callers' threads share with the one that answers.
pub(crate) struct Reception {
    pub network: Arc<dyn AnswersWhole>,
    pub metrics: Arc<Metrics>,
    opened: Instant,
    last_id: AtomicU64,
}

impl Reception {
    pub fn new(network: Arc<dyn AnswersWhole>) -> Reception {
        let (metrics, opened) = (Arc::default(), Instant::now());
        Reception { network, metrics, opened, last_id: AtomicU64::new(0) }
    }

    /// Names a request that is handed over now.
    pub fn arrival(&self) -> Arrival {
        let id = 1 + self.last_id.fetch_add(1, Ordering::Relaxed);
        Arrival { id, arrived_us: self.now_us() }
    }

    fn now_us(&self) -> Micros {
        micros(self.opened.elapsed())
    }
}

fn micros(duration: Duration) -> Micros {
    Micros::try_from(duration.as_micros()).unwrap_or(Micros::MAX)
}

/// A request that waits.
struct Waiting {
    request: Request,
    arrival: Arrival,
    reply: Reply,
}

impl Waiting {
    /// The error of a request whose time is over.
    fn is_late(&self, now_us: Micros) -> Option<Error> {
        let deadline = self.request.deadline?;
        let is_over = now_us.saturating_sub(self.arrival.arrived_us) > micros(deadline);
        let deadline_ms = deadline.as_secs_f64() * 1e3;
        is_over.then_some(Error::DeadlineExceeded { deadline_ms, retry_after_ms: None })
    }

    /// Smaller goes first.
    fn order(&self, now_us: Micros) -> (Priority, RequestId) {
        let has_waited = now_us.saturating_sub(self.arrival.arrived_us) > PATIENCE_US;
        let priority = if has_waited { Priority::High } else { self.request.priority };
        (priority, self.arrival.id)
    }
}

/// A network with the requests that wait for it.
pub(crate) struct Direct {
    reception: Arc<Reception>,
    waiting: Vec<Waiting>,
    /// To be delivered.
    answered: Vec<(Reply, Result<Answer>)>,
    /// Of one request, of late.
    each_us: Micros,
}

impl Direct {
    pub fn new(reception: Arc<Reception>) -> Direct {
        Direct { reception, waiting: Vec::new(), answered: Vec::new(), each_us: 0 }
    }

    fn fail(&mut self, reply: Reply, error: Error) {
        self.reception.metrics.request_failed(&error);
        self.answered.push((reply, Err(error)));
    }

    /// Takes those out that go first.
    fn next(&mut self, now_us: Micros) -> Vec<Waiting> {
        self.waiting.sort_by_key(|waiting| waiting.order(now_us));
        let count = self.waiting.len().min(REQUESTS_PER_STEP);
        self.waiting.drain(..count).collect()
    }
}

impl Serve for Direct {
    fn enqueue(&mut self, _: Prepared, reply: Reply) {
        let reason = "it was prepared for a model that writes semantic IDs".into();
        reply.send(Err(Error::EngineFailed { reason }));
    }

    fn submit(&mut self, request: Request, arrival: Arrival, reply: Reply) {
        self.waiting.push(Waiting { request, arrival, reply });
    }

    fn feed(&mut self, requests: Vec<Request>, answers: Sender<(usize, Result<Answer>)>) {
        for (index, request) in requests.into_iter().enumerate() {
            let answers = answers.clone();
            let reply = Reply::new(move |answer| drop(answers.send((index, answer))));
            self.submit(request, self.reception.arrival(), reply);
        }
    }

    fn cancel(&mut self, id: RequestId) {
        if let Some(at) = self.waiting.iter().position(|waiting| waiting.arrival.id == id) {
            let waiting = self.waiting.remove(at);
            self.fail(waiting.reply, Error::Cancelled);
        }
    }

    fn refill(&mut self) {}

    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.answered.is_empty()
    }

    fn has_no_step(&self) -> bool {
        self.is_idle()
    }

    fn refuse(&mut self) -> bool {
        let now_us = self.reception.now_us();
        let late = |waiting: &mut Waiting| waiting.is_late(now_us).is_some();
        let late: Vec<Waiting> = self.waiting.extract_if(.., late).collect();
        for waiting in late {
            if let Some(error) = waiting.is_late(now_us) {
                self.fail(waiting.reply, error);
            }
        }
        !self.answered.is_empty()
    }

    fn compute(&mut self) -> Result<()> {
        let started_us = self.reception.now_us();
        let (mut requests, mut callers) = (Vec::new(), Vec::new());
        for Waiting { request, arrival, reply } in self.next(started_us) {
            callers.push((arrival, reply, request.deadline, request.timings));
            requests.push(request);
        }
        let answers = self.reception.network.answer_all(&requests);
        let ended_us = self.reception.now_us();
        let took_us = ended_us.saturating_sub(started_us);
        let each_us = took_us / callers.len().max(1) as Micros;
        self.each_us = if self.each_us == 0 { each_us } else { (3 * self.each_us + each_us) / 4 };
        let metrics = Arc::clone(&self.reception.metrics);
        let mut num_tokens = 0;
        for ((arrival, reply, deadline, wants_timings), answer) in callers.into_iter().zip(answers)
        {
            let total_us = ended_us.saturating_sub(arrival.arrived_us);
            let late = deadline.filter(|&deadline| total_us > micros(deadline));
            let answer = match (answer, late) {
                (Ok(_), Some(deadline)) => Err(Error::DeadlineExceeded {
                    deadline_ms: deadline.as_secs_f64() * 1e3,
                    retry_after_ms: None,
                }),
                (answer, _) => answer,
            };
            match answer {
                Err(error) => self.fail(reply, error),
                Ok(mut answer) => {
                    let timings = Timings {
                        queued_us: started_us.saturating_sub(arrival.arrived_us),
                        prefill_us: took_us,
                        levels_us: Vec::new(),
                        total_us,
                    };
                    num_tokens += answer.tokens;
                    metrics.request_admitted(answer.tokens, 0);
                    metrics.items_unknown(&answer.unknown_items);
                    metrics.request_answered(&timings);
                    answer.timings = wants_timings.then_some(timings);
                    self.answered.push((reply, Ok(answer)));
                }
            }
        }
        metrics.step(requests.len(), num_tokens, took_us);
        Ok(())
    }

    fn deliver(&mut self) {
        for (reply, answer) in self.answered.drain(..) {
            reply.send(answer);
        }
    }

    fn end_all(&mut self, error: &dyn Fn() -> Error) {
        for waiting in std::mem::take(&mut self.waiting) {
            self.fail(waiting.reply, error());
        }
        self.deliver();
    }

    fn install_weights(&mut self) -> Result<u64> {
        Err(no_new_weights())
    }

    fn check_integrity(&self) -> Result<()> {
        Ok(())
    }

    fn metrics(&self) -> &Metrics {
        &self.reception.metrics
    }

    fn published(&self, num_steps: u64) -> Published {
        Published {
            engine: self.status(),
            matrix_flops: self.reception.network.matrix_flops(),
            weights_version: 1,
            num_steps,
            ..Published::default()
        }
    }

    fn status(&self) -> EngineStatus {
        let waiting = self.waiting.len();
        let backlog_us = self.each_us * waiting as Micros;
        EngineStatus { waiting, backlog_us, ..EngineStatus::default() }
    }
}

/// The error of new weights for a network that takes none.
pub(crate) fn no_new_weights() -> Error {
    Error::Unsupported {
        what: "new weights for a network that gives vectors or scores candidates".into(),
        way_out: "write them into the folder and open it again".into(),
    }
}
