//! Jobs in, answers out, between any number of threads and one that works.
//!
//! Nothing is known here of what a job or an answer is. What must hold, and is checked by a test
//! that goes through the interleavings: a job that was taken in is answered, or nobody waits for it
//! any more; whoever waits is woken; after the end nothing is taken in.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use super::sync::{Arc, Condvar, Mutex};

/// Where jobs are handed over.
pub struct Exchange<J, A> {
    state: Mutex<State<J, A>>,
    /// Something came for the thread that works.
    came: Condvar,
    limit: usize,
}

struct State<J, A> {
    jobs: Vec<(J, Arc<Ticket<A>>)>,
    /// Jobs that were taken but wait still, as the thread that works last said.
    waiting: usize,
    is_closed: bool,
    has_cancelled: bool,
}

/// Why a job is not taken in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// So many wait already.
    Full {
        /// Jobs that wait.
        queued: usize,
    },
    /// No job is taken in any more.
    Closed,
}

/// What came since the last time.
pub struct Intake<J, A> {
    /// With the tickets that their answers go to.
    pub jobs: Vec<(J, Arc<Ticket<A>>)>,
    /// Some tickets are [cancelled](Ticket::is_cancelled).
    pub has_cancelled: bool,
    /// Nothing will come any more.
    pub is_closed: bool,
}

impl<J, A> Exchange<J, A> {
    /// An exchange that refuses jobs while `limit` of them wait.
    pub fn new(limit: usize) -> Exchange<J, A> {
        let state = State { jobs: Vec::new(), waiting: 0, is_closed: false, has_cancelled: false };
        Exchange { state: Mutex::new(state), came: Condvar::new(), limit }
    }

    /// Hands over a job.
    pub fn submit(exchange: &Arc<Self>, job: J) -> Result<Handle<J, A>, Refusal> {
        let mut state = exchange.state.lock().expect("no holder panics");
        if state.is_closed {
            return Err(Refusal::Closed);
        }
        let queued = state.jobs.len() + state.waiting;
        if queued >= exchange.limit {
            return Err(Refusal::Full { queued });
        }
        let ticket =
            Arc::new(Ticket { stage: Mutex::new(Stage::Open(None)), done: Condvar::new() });
        state.jobs.push((job, Arc::clone(&ticket)));
        drop(state);
        exchange.came.notify_one();
        Ok(Handle { ticket, exchange: Arc::clone(exchange), is_taken: false })
    }

    /// What came, for the thread that works, which says how many jobs wait; while it is idle it
    /// waits here until something comes.
    pub fn take(&self, waiting: usize, is_idle: bool) -> Intake<J, A> {
        let mut state = self.state.lock().expect("no holder panics");
        state.waiting = waiting;
        while is_idle && state.jobs.is_empty() && !state.is_closed {
            state = self.came.wait(state).expect("no holder panics");
        }
        state.waiting += state.jobs.len();
        Intake {
            jobs: std::mem::take(&mut state.jobs),
            has_cancelled: std::mem::take(&mut state.has_cancelled),
            is_closed: state.is_closed,
        }
    }

    /// Takes no job in any more.
    pub fn close(&self) {
        self.state.lock().expect("no holder panics").is_closed = true;
        self.came.notify_one();
    }

    /// Jobs that wait.
    pub fn queued(&self) -> usize {
        let state = self.state.lock().expect("no holder panics");
        state.jobs.len() + state.waiting
    }
}

/// Where one answer goes.
pub struct Ticket<A> {
    stage: Mutex<Stage<A>>,
    done: Condvar,
}

enum Stage<A> {
    /// Who waits in a future is woken so.
    Open(Option<Waker>),
    Answered(A),
    /// The answer was taken, or nobody wants it.
    Over,
}

impl<A> Ticket<A> {
    /// Gives the answer to whoever waits for it; nobody may any more.
    pub fn answer(&self, answer: A) {
        let mut stage = self.stage.lock().expect("no holder panics");
        let Stage::Open(waker) = &mut *stage else { return };
        let waker = waker.take();
        *stage = Stage::Answered(answer);
        drop(stage);
        self.done.notify_all();
        waker.into_iter().for_each(Waker::wake);
    }

    /// Whether nobody waits for the answer any more.
    pub fn is_cancelled(&self) -> bool {
        matches!(*self.stage.lock().expect("no holder panics"), Stage::Over)
    }
}

/// An answer to come. Dropped, it cancels its job.
pub struct Handle<J, A> {
    ticket: Arc<Ticket<A>>,
    exchange: Arc<Exchange<J, A>>,
    is_taken: bool,
}

impl<J, A> Handle<J, A> {
    /// Waits for the answer.
    pub fn wait(mut self) -> A {
        let mut stage = self.ticket.stage.lock().expect("no holder panics");
        loop {
            match std::mem::replace(&mut *stage, Stage::Over) {
                Stage::Answered(answer) => {
                    drop(stage);
                    self.is_taken = true;
                    return answer;
                }
                before => *stage = before,
            }
            stage = self.ticket.done.wait(stage).expect("no holder panics");
        }
    }

    /// Whether the answer is there.
    pub fn is_answered(&self) -> bool {
        matches!(*self.ticket.stage.lock().expect("no holder panics"), Stage::Answered(_))
    }
}

impl<J, A> Future for Handle<J, A> {
    type Output = A;

    /// # Panics
    /// After it was ready.
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<A> {
        assert!(!self.is_taken, "a future is not polled after it was ready");
        let mut stage = self.ticket.stage.lock().expect("no holder panics");
        match std::mem::replace(&mut *stage, Stage::Over) {
            Stage::Answered(answer) => {
                drop(stage);
                self.is_taken = true;
                Poll::Ready(answer)
            }
            _ => {
                *stage = Stage::Open(Some(context.waker().clone()));
                Poll::Pending
            }
        }
    }
}

impl<J, A> Drop for Handle<J, A> {
    fn drop(&mut self) {
        if self.is_taken {
            return;
        }
        let stage = std::mem::replace(
            &mut *self.ticket.stage.lock().expect("no holder panics"),
            Stage::Over,
        );
        if matches!(stage, Stage::Open(_)) {
            self.exchange.state.lock().expect("no holder panics").has_cancelled = true;
        }
    }
}
