//! What callers and the engine's thread share: the queue between them, and what the thread last said.

use std::sync::mpsc::Sender;
use std::sync::{Mutex, OnceLock};
use std::thread::ThreadId;
use std::time::Instant;

use super::oneshot;
use super::queue::{Backlog, Bounds, Queue};
use crate::answer::Answer;
use crate::engine::{Arrival, EngineStatus, Phases, Prepared, Reply};
use crate::error::{Error, Result};
use crate::request::Request;

/// What the engine's thread is asked for.
#[allow(clippy::large_enum_variant)] // nearly all messages are of the largest variant
pub(crate) enum Message {
    /// Answer a request that was prepared.
    Enqueue(Prepared, Reply),
    /// Check a request and answer it, on the engine's thread.
    Submit(Request, Arrival, Reply),
    /// Answer many requests, a few at a time.
    Feed(Vec<Request>, Sender<(usize, Result<Answer>)>),
    /// Take the weights that were loaded.
    InstallWeights(oneshot::Sender<Result<u64>>),
    /// Check that no page is lost.
    CheckIntegrity(oneshot::Sender<Result<()>>),
}

/// What the engine's thread last said of itself.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Published {
    pub engine: EngineStatus,
    pub phases: Phases,
    pub matrix_flops: u64,
    pub weights_version: u64,
    pub num_steps: u64,
}

/// What callers and the engine's thread share.
pub(crate) struct Shared {
    pub queue: Queue<Message>,
    pub bounds: Bounds,
    pub(super) published: Mutex<Published>,
    /// Until when accepted requests are finished once no more are taken in.
    pub(super) until: Mutex<Option<Instant>>,
    /// Why the thread ended before its time.
    pub(super) failure: OnceLock<String>,
    /// The engine's own thread.
    pub(super) thread: OnceLock<ThreadId>,
    /// The process of that thread.
    pub(super) process: u32,
}

impl Shared {
    /// The error of a child that was forked: the engine's thread does not exist there, and locks
    /// may be held for ever.
    pub fn check_process(&self) -> Result<()> {
        match self.process == std::process::id() {
            true => Ok(()),
            false => Err(Error::Forked),
        }
    }

    /// The error of a call that waits for the engine where that would never end.
    pub fn check_waiting(&self) -> Result<()> {
        self.check_process()?;
        match self.thread.get() == Some(&std::thread::current().id()) {
            true => Err(Error::CalledFromCallback),
            false => Ok(()),
        }
    }

    /// The error of a request for which the queue has no room.
    pub fn overloaded(&self, backlog: &Backlog) -> Error {
        let Backlog { entries, wait_us, each_us } = *backlog;
        // There is room when one has left, or so many that the others do not take too long.
        let retry_after_us = wait_us.saturating_sub(self.bounds.wait_us).max(each_us).max(1);
        Error::Overloaded {
            queued: entries,
            limit: self.bounds.entries,
            wait_ms: wait_us.div_ceil(1000),
            retry_after_ms: retry_after_us.div_ceil(1000),
        }
    }

    /// The error for requests once the thread is at its end.
    pub fn end(&self) -> Error {
        match self.failure.get() {
            Some(reason) => Error::EngineFailed { reason: reason.clone() },
            None => Error::ShuttingDown,
        }
    }

    pub fn published(&self) -> Published {
        *self.published.lock().expect("no holder panics")
    }

    pub fn is_over_time(&self) -> bool {
        let until = self.until.lock().expect("no holder panics");
        until.is_some_and(|until| Instant::now() >= until)
    }
}
