//! One value from one thread to another, which waits for it on a thread or in a future.

use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use super::sync::{Arc, Condvar, Mutex};

/// Gives the value. Dropped without, it tells the receiver that none will come.
pub struct Sender<T>(Option<Arc<Channel<T>>>);

/// Waits for the value.
pub struct Receiver<T>(Arc<Channel<T>>);

struct Channel<T> {
    state: Mutex<State<T>>,
    sent: Condvar,
}

enum State<T> {
    /// A future that waits is woken so.
    Waiting(Option<Waker>),
    Sent(T),
    /// The value was taken, or none will come.
    Closed,
}

/// A sender and its receiver.
pub fn channel<T>() -> (Sender<T>, Receiver<T>) {
    let state = Mutex::new(State::Waiting(None));
    let channel = Arc::new(Channel { state, sent: Condvar::new() });
    (Sender(Some(Arc::clone(&channel))), Receiver(channel))
}

impl<T> Sender<T> {
    /// Gives the value to the receiver.
    pub fn send(mut self, value: T) {
        let channel = self.0.take().expect("it sends once");
        channel.change(State::Sent(value));
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        if let Some(channel) = self.0.take() {
            channel.change(State::Closed);
        }
    }
}

impl<T> Channel<T> {
    fn change(&self, to: State<T>) {
        let before = std::mem::replace(&mut *self.state.lock().expect("no holder panics"), to);
        self.sent.notify_all();
        // The lock is free: a waker may do as it likes.
        if let State::Waiting(Some(waker)) = before {
            waker.wake();
        }
    }
}

impl<T> Receiver<T> {
    /// Waits for the value; `None` where the sender is gone or the value was taken.
    pub fn wait(&self) -> Option<T> {
        let mut state = self.0.state.lock().expect("no holder panics");
        loop {
            match std::mem::replace(&mut *state, State::Closed) {
                State::Sent(value) => return Some(value),
                State::Closed => return None,
                waiting => *state = waiting,
            }
            state = self.0.sent.wait(state).expect("no holder panics");
        }
    }

    /// Waits for the value no longer than `within`; pending where it is not there then.
    pub fn wait_for(&self, within: Duration) -> Poll<Option<T>> {
        let until = Instant::now().checked_add(within);
        let mut state = self.0.state.lock().expect("no holder panics");
        loop {
            match std::mem::replace(&mut *state, State::Closed) {
                State::Sent(value) => return Poll::Ready(Some(value)),
                State::Closed => return Poll::Ready(None),
                waiting => *state = waiting,
            }
            let left = until
                .map_or(Duration::MAX, |until| until.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return Poll::Pending;
            }
            state = self.0.sent.wait_timeout(state, left).expect("no holder panics").0;
        }
    }

    /// Whether waiting takes no time.
    pub fn is_ready(&self) -> bool {
        !matches!(*self.0.state.lock().expect("no holder panics"), State::Waiting(_))
    }

    /// The value if it is there, `None` in it where the sender is gone or the value was taken;
    /// otherwise the context's waker is woken when that is so.
    pub fn poll(&self, context: &mut Context<'_>) -> Poll<Option<T>> {
        // A waker's own code, which may panic, runs outside of the lock.
        let waker = context.waker().clone();
        let before = {
            let mut state = self.0.state.lock().expect("no holder panics");
            let next = match *state {
                State::Waiting(_) => State::Waiting(Some(waker)),
                _ => State::Closed,
            };
            std::mem::replace(&mut *state, next)
        };
        match before {
            State::Sent(value) => Poll::Ready(Some(value)),
            State::Closed => Poll::Ready(None),
            State::Waiting(_) => Poll::Pending,
        }
    }
}
