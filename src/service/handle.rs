//! An answer to come.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use super::oneshot;
use super::shared::Shared;
use crate::answer::Answer;
use crate::error::Result;
use crate::schedule::RequestId;

/// An answer to come: [`wait`](Handle::wait) for it, or await it in any runtime. Dropped, it
/// cancels its request, and what the request held is free at the next step.
#[must_use = "a handle that is dropped cancels its request"]
pub struct Handle {
    id: RequestId,
    receiver: oneshot::Receiver<Result<Answer>>,
    shared: Arc<Shared>,
    /// The answer was taken.
    is_over: bool,
}

impl Handle {
    pub(crate) fn new(
        id: RequestId,
        receiver: oneshot::Receiver<Result<Answer>>,
        shared: Arc<Shared>,
    ) -> Handle {
        Handle { id, receiver, shared, is_over: false }
    }

    /// Names the request, for [`Recommender::cancel`](crate::Recommender::cancel).
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// Waits for the answer.
    ///
    /// # Errors
    /// The request's; [`DeadlineExceeded`](crate::Error::DeadlineExceeded);
    /// [`ShuttingDown`](crate::Error::ShuttingDown) and
    /// [`EngineFailed`](crate::Error::EngineFailed) where the engine ended first;
    /// [`CalledFromCallback`](crate::Error::CalledFromCallback) on the engine's own thread where the
    /// answer is not there yet; [`Forked`](crate::Error::Forked).
    pub fn wait(mut self) -> Result<Answer> {
        self.shared.check_process()?;
        if !self.receiver.is_ready() {
            self.shared.check_waiting()?;
        }
        self.is_over = true;
        self.receiver.wait().unwrap_or_else(|| Err(self.shared.end()))
    }

    /// Waits for the answer no longer than `within`; `None` where it is not there then. The answer is
    /// handed out once: do not wait again after it.
    ///
    /// # Errors
    /// Those of [`wait`](Handle::wait).
    ///
    /// # Panics
    /// After it gave the answer.
    pub fn wait_for(&mut self, within: Duration) -> Option<Result<Answer>> {
        assert!(!self.is_over, "an answer is handed out once");
        let check = || {
            self.shared.check_process()?;
            if !self.receiver.is_ready() {
                self.shared.check_waiting()?;
            }
            Ok(())
        };
        if let Err(error) = check() {
            return Some(Err(error));
        }
        let Poll::Ready(answer) = self.receiver.wait_for(within) else { return None };
        self.is_over = true;
        Some(answer.unwrap_or_else(|| Err(self.shared.end())))
    }

    /// Whether the answer is there, so that waiting takes no time.
    pub fn is_answered(&self) -> bool {
        self.shared.check_process().is_ok() && self.receiver.is_ready()
    }
}

impl Future for Handle {
    type Output = Result<Answer>;

    /// # Panics
    /// After it was ready.
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<Answer>> {
        assert!(!self.is_over, "a future is not polled after it was ready");
        if let Err(error) = self.shared.check_process() {
            self.is_over = true;
            return Poll::Ready(Err(error));
        }
        let answer = std::task::ready!(self.receiver.poll(context));
        self.is_over = true;
        Poll::Ready(answer.unwrap_or_else(|| Err(self.shared.end())))
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if !self.is_over && self.shared.check_process().is_ok() && !self.receiver.is_ready() {
            self.shared.queue.cancel(self.id);
        }
    }
}
