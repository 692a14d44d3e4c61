//! The thread that owns an engine, or another network that answers, and the queue before it.
//!
//! Callers prepare their requests on their own threads and push them; the thread takes what came,
//! steps, publishes its status, and gives each answer to the place that its request named. Nobody
//! else can step the engine.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::engine::EngineStatus;
use crate::error::{Error, Result};
use queue::{Backlog, Bounds, Queue, Taken};

pub(crate) use direct::{AnswersWhole, Direct, Reception, no_new_weights};
pub use handle::Handle;
pub(crate) use serve::{Serve, Stepped};
pub(crate) use shared::{Message, Published, Shared};

mod direct;
mod handle;
pub mod oneshot;
pub mod queue;
mod serve;
mod shared;
mod sync;

/// Called on the engine's thread before each step with the number of steps before it.
pub(crate) type BeforeStep = Arc<dyn Fn(u64) + Send + Sync>;

/// A thread that owns an engine. Dropped, it is shut down at once.
pub(crate) struct Service {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Service {
    /// Starts a thread for an engine.
    ///
    /// # Errors
    /// The operating system's.
    pub fn start(
        engine: impl Serve,
        bounds: Bounds,
        before_step: Option<BeforeStep>,
    ) -> Result<Service> {
        let shared = Arc::new(Shared {
            queue: Queue::new(bounds),
            bounds,
            published: Mutex::new(engine.published(0)),
            until: Mutex::new(None),
            failure: OnceLock::new(),
            thread: OnceLock::new(),
            process: std::process::id(),
        });
        let mut worker = Worker { engine, shared: Arc::clone(&shared), before_step, num_steps: 0 };
        let thread = std::thread::Builder::new().name("sidereal-engine".into());
        let thread = thread.spawn(move || worker.run()).map_err(|error| Error::Device {
            device: "cpu".into(),
            reason: format!("a thread for the engine could not be started: {error}"),
        })?;
        let _ = shared.thread.set(thread.thread().id()); // the thread may have been faster
        Ok(Service { shared, thread: Mutex::new(Some(thread)) })
    }

    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Takes no more messages, and waits until accepted requests are answered; those that take
    /// longer than `within` are answered with [`Error::ShuttingDown`]. On the engine's own thread
    /// this does not wait.
    ///
    /// # Errors
    /// [`Error::Forked`].
    pub fn shutdown(&self, within: Duration) -> Result<()> {
        self.shared.check_process()?;
        let until = Instant::now().checked_add(within);
        *self.shared.until.lock().expect("no holder panics") = until;
        self.shared.queue.close();
        if self.shared.check_waiting().is_err() {
            return Ok(());
        }
        // Others who shut down wait here until the thread is at its end.
        let mut thread = self.thread.lock().expect("no holder panics");
        if let Some(thread) = thread.take() {
            let _ = thread.join(); // a panic was told to all callers
        }
        Ok(())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if self.shutdown(Duration::ZERO).is_err() {
            // In a forked child there is no such thread, which its handle would touch.
            std::mem::forget(self.thread.get_mut().map(Option::take));
        }
    }
}

struct Worker<S: Serve> {
    engine: S,
    shared: Arc<Shared>,
    before_step: Option<BeforeStep>,
    num_steps: u64,
}

impl<S: Serve> Worker<S> {
    fn run(&mut self) {
        let _ = self.shared.thread.set(std::thread::current().id());
        let outcome = catch_unwind(AssertUnwindSafe(|| self.serve()));
        let failure = match outcome {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(panic) => Some(format!("it panicked: {}", words_of(&*panic))),
        };
        if let Some(failure) = failure {
            let _ = self.shared.failure.set(failure); // there is one thread, and one end
        }
        // All who wait are told, those first whose requests have not even been looked at.
        self.shared.queue.close();
        for message in self.shared.queue.take(Backlog::default(), false).entries {
            if let Message::Enqueue(_, reply) | Message::Submit(_, _, reply) = message {
                let error = self.shared.end();
                self.engine.metrics().request_failed(&error);
                reply.send(Err(error));
            }
        }
        let shared = Arc::clone(&self.shared);
        self.engine.end_all(&|| shared.end());
        self.publish();
    }

    /// Until nothing comes any more and all is answered, or time is over.
    fn serve(&mut self) -> Result<()> {
        loop {
            let is_idle = self.engine.is_idle();
            let Taken { entries, cancelled, is_closed } =
                self.shared.queue.take(backlog(&self.engine.status()), is_idle);
            for message in entries {
                self.handle(message);
            }
            for id in cancelled {
                self.engine.cancel(id);
            }
            self.engine.refill();
            if is_closed && (self.engine.has_no_step() || self.shared.is_over_time()) {
                return Ok(());
            }
            if self.engine.has_no_step() {
                self.publish();
                continue;
            }
            // Before the step: whoever is refused need not wait for it.
            if self.engine.refuse() {
                self.publish();
                self.engine.deliver();
                continue;
            }
            if let Some(before_step) = &self.before_step {
                before_step(self.num_steps);
            }
            self.engine.compute()?;
            self.num_steps += 1;
            // Before callers are told: whoever has an answer finds it counted.
            self.publish();
            self.engine.deliver();
        }
    }

    fn handle(&mut self, message: Message) {
        match message {
            Message::Enqueue(prepared, reply) => self.engine.enqueue(prepared, reply),
            Message::Submit(request, arrival, reply) => {
                self.engine.submit(request, arrival, reply);
            }
            Message::Feed(requests, answers) => self.engine.feed(requests, answers),
            Message::InstallWeights(sender) => {
                let version = self.engine.install_weights();
                self.publish();
                self.engine.deliver();
                sender.send(version);
            }
            Message::CheckIntegrity(sender) => sender.send(self.engine.check_integrity()),
        }
    }

    fn publish(&self) {
        *self.shared.published.lock().expect("no holder panics") =
            self.engine.published(self.num_steps);
    }
}

/// What waits, for the queue before it.
fn backlog(status: &EngineStatus) -> Backlog {
    let EngineStatus { waiting, running, backlog_us, .. } = *status;
    let each_us = backlog_us / (waiting + running).max(1) as u64;
    Backlog { entries: waiting, wait_us: backlog_us, each_us }
}

fn words_of(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no words")
}
