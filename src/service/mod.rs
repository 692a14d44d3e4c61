//! An engine on a thread of its own: requests from any thread, answers to wherever they are wanted.

use std::collections::HashMap;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::answer::Answer;
use crate::backend::Backend;
use crate::backend::cpu::CpuBackend;
use crate::engine::{Engine, Job};
use crate::error::{Error, Result};
use crate::request::Request;
use crate::schedule::RequestId;
use exchange::{Exchange, Intake, Refusal, Ticket};

mod exchange;
mod sync;

/// How a service is started.
#[derive(Clone)]
pub struct ServiceOptions {
    /// Requests that may wait; more are refused with [`Error::Overloaded`].
    pub max_queued: usize,
    /// Called on the service's thread before each step with the number of steps before it: for
    /// metrics, and for tests of what happens when the thread fails.
    pub before_step: Option<Arc<dyn Fn(u64) + Send + Sync>>,
}

impl Default for ServiceOptions {
    fn default() -> ServiceOptions {
        ServiceOptions { max_queued: 1024, before_step: None }
    }
}

/// One thread around an [`Engine`]: requests of any number of callers share its steps.
///
/// ```no_run
/// use std::{path::Path, sync::Arc, time::Duration};
/// use sidereal::{Engine, EngineOptions, Request, Service, ServiceOptions, catalog::Catalog};
///
/// # fn main() -> sidereal::Result<()> {
/// let catalog = Arc::new(Catalog::open(Path::new("models/industrial/items.jsonl"))?);
/// let engine = Engine::open(Path::new("models/industrial"), catalog, &EngineOptions::default())?;
/// let service = Service::start(engine, ServiceOptions::default())?;
/// let mut request = Request::from_history(["168", "278"]);
/// request.deadline = Some(Duration::from_millis(100));
/// let handle = service.submit(request)?; // from any thread; `handle.await` works as well
/// println!("{:?}", handle.wait()?);
/// service.shutdown(Duration::from_secs(1));
/// # Ok(())
/// # }
/// ```
pub struct Service<B: Backend = CpuBackend> {
    engine: Arc<Engine<B>>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    exchange: Arc<Exchange<Job, Result<Answer>>>,
    max_queued: usize,
    /// Until when accepted requests are finished once no more are taken in.
    until: Mutex<Option<Instant>>,
    /// Why the thread ended before its time.
    failure: OnceLock<String>,
}

/// An answer to come: [`wait`](Handle::wait) for it, or await it in any runtime. Dropped, it
/// cancels its request, and what the request held is free at the next step.
pub struct Handle(exchange::Handle<Job, Result<Answer>>);

impl Handle {
    /// Waits for the answer.
    ///
    /// # Errors
    /// The request's; [`Error::DeadlineExceeded`]; [`Error::ShuttingDown`] and
    /// [`Error::EngineFailed`] where the service ended first.
    pub fn wait(self) -> Result<Answer> {
        self.0.wait()
    }

    /// Whether the answer is there, so that waiting takes no time.
    pub fn is_answered(&self) -> bool {
        self.0.is_answered()
    }
}

impl Future for Handle {
    type Output = Result<Answer>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<Answer>> {
        Pin::new(&mut self.0).poll(context)
    }
}

impl<B: Backend> Service<B> {
    /// Starts a thread for an engine.
    ///
    /// # Errors
    /// The operating system's.
    pub fn start(engine: Engine<B>, options: ServiceOptions) -> Result<Service<B>> {
        let engine = Arc::new(engine);
        let shared = Arc::new(Shared {
            exchange: Arc::new(Exchange::new(options.max_queued)),
            max_queued: options.max_queued,
            until: Mutex::new(None),
            failure: OnceLock::new(),
        });
        let worker = Worker {
            engine: Arc::clone(&engine),
            shared: Arc::clone(&shared),
            before_step: options.before_step,
        };
        let thread = std::thread::Builder::new().name("sidereal-service".into());
        let thread = thread.spawn(move || worker.run()).map_err(|error| Error::Device {
            device: "cpu".into(),
            reason: format!("a thread for the service could not be started: {error}"),
        })?;
        Ok(Service { engine, shared, thread: Some(thread) })
    }

    /// The engine.
    pub fn engine(&self) -> &Engine<B> {
        &self.engine
    }

    /// Hands over a request. It is checked here, on the caller's thread, and sees the catalog as it
    /// is now.
    ///
    /// # Errors
    /// The request's; [`Error::Overloaded`], [`Error::ShuttingDown`], [`Error::EngineFailed`].
    pub fn submit(&self, request: Request) -> Result<Handle> {
        let job = self.engine.prepare(request)?;
        let shared = &*self.shared;
        Exchange::submit(&shared.exchange, job).map(Handle).map_err(|refusal| match refusal {
            Refusal::Full { queued } => Error::Overloaded { queued, limit: shared.max_queued },
            Refusal::Closed => shared.end(),
        })
    }

    /// Requests that wait for room.
    pub fn num_queued(&self) -> usize {
        self.shared.exchange.queued()
    }

    /// Takes no more requests, and waits until those that were accepted are answered. What takes
    /// longer than `within` is answered with [`Error::ShuttingDown`].
    pub fn shutdown(mut self, within: Duration) {
        self.end(within);
    }

    fn end(&mut self, within: Duration) {
        let Some(thread) = self.thread.take() else { return };
        let until = Instant::now().checked_add(within);
        *self.shared.until.lock().expect("no holder panics") = until;
        self.shared.exchange.close();
        let _ = thread.join(); // a panic was told to all callers
    }
}

impl<B: Backend> Drop for Service<B> {
    /// Shuts down at once.
    fn drop(&mut self) {
        self.end(Duration::ZERO);
    }
}

impl Shared {
    /// What callers are told once the thread is at its end.
    fn end(&self) -> Error {
        match self.failure.get() {
            Some(reason) => Error::EngineFailed { reason: reason.clone() },
            None => Error::ShuttingDown,
        }
    }

    fn is_over_time(&self) -> bool {
        let until = self.until.lock().expect("no holder panics");
        until.is_some_and(|until| Instant::now() >= until)
    }
}

struct Worker<B: Backend> {
    engine: Arc<Engine<B>>,
    shared: Arc<Shared>,
    before_step: Option<Arc<dyn Fn(u64) + Send + Sync>>,
}

type Tickets = HashMap<RequestId, Arc<Ticket<Result<Answer>>>>;

impl<B: Backend> Worker<B> {
    fn run(&self) {
        let mut tickets = Tickets::new();
        let outcome = catch_unwind(AssertUnwindSafe(|| self.serve(&mut tickets)));
        let failure = match outcome {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(panic) => Some(format!("it panicked: {}", words_of(&*panic))),
        };
        if let Some(failure) = failure {
            let _ = self.shared.failure.set(failure); // there is one thread, and one end
        }
        // Whoever waits is told, those first whose requests have not even been looked at.
        self.shared.exchange.close();
        let jobs = self.shared.exchange.take(0, false).jobs;
        jobs.iter().for_each(|(_, ticket)| ticket.answer(Err(self.shared.end())));
        tickets.values().for_each(|ticket| ticket.answer(Err(self.shared.end())));
    }

    /// Until nothing comes any more and all is answered, or time is over.
    fn serve(&self, tickets: &mut Tickets) -> Result<()> {
        let engine = &*self.engine;
        let mut waiting = 0;
        for step in 0.. {
            let intake = self.shared.exchange.take(waiting, tickets.is_empty());
            let Intake { jobs, has_cancelled, is_closed } = intake;
            for (job, ticket) in jobs {
                tickets.insert(engine.enqueue(job)?, ticket);
            }
            if has_cancelled {
                let cancelled = tickets.extract_if(|_, ticket| ticket.is_cancelled());
                cancelled.map(|(id, _)| id).try_for_each(|id| engine.cancel(id))?;
            }
            if is_closed && (tickets.is_empty() || self.shared.is_over_time()) {
                tickets.keys().try_for_each(|&id| engine.cancel(id))?;
                return Ok(());
            }
            if let Some(before_step) = &self.before_step {
                before_step(step);
            }
            for (id, answer) in engine.step()? {
                if let Some(ticket) = tickets.remove(&id) {
                    ticket.answer(answer);
                }
            }
            waiting = engine.status()?.waiting;
        }
        Ok(())
    }
}

fn words_of(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no words")
}
