//! What the doors count: calls by outcome, connections, refusals.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use super::error::Failure;
use crate::metrics::{Histogram, HistogramSnapshot, TIME_BOUNDS_US, Times};

/// A protocol by which requests come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Door {
    Json,
    Oip,
    Grpc,
    Generate,
    Completions,
}

impl Door {
    pub const ALL: [Door; 5] =
        [Door::Json, Door::Oip, Door::Grpc, Door::Generate, Door::Completions];

    /// The door's name in metrics and logs.
    pub fn name(self) -> &'static str {
        match self {
            Door::Json => "json",
            Door::Oip => "oip",
            Door::Grpc => "grpc",
            Door::Generate => "generate",
            Door::Completions => "completions",
        }
    }
}

/// How calls end, by who made them end so.
const OUTCOMES: [&str; 6] =
    ["answered", "caller_error", "overloaded", "deadline_exceeded", "cancelled", "failed"];

/// What the doors of a server count.
pub(super) struct DoorMetrics {
    requests: [[AtomicU64; OUTCOMES.len()]; Door::ALL.len()],
    seconds: [Times; Door::ALL.len()],
    pub refused_tokens: AtomicU64,
    pub connections_opened: AtomicU64,
    pub connections_closed: AtomicU64,
    pub tls_failures: AtomicU64,
    pub received_bytes: AtomicU64,
    pub sent_bytes: AtomicU64,
    pub changes: AtomicU64,
    pub feed_lines: AtomicU64,
    pub feed_errors: AtomicU64,
}

impl Default for DoorMetrics {
    fn default() -> DoorMetrics {
        DoorMetrics {
            requests: Default::default(),
            seconds: std::array::from_fn(|_| Histogram::new(&TIME_BOUNDS_US)),
            refused_tokens: AtomicU64::new(0),
            connections_opened: AtomicU64::new(0),
            connections_closed: AtomicU64::new(0),
            tls_failures: AtomicU64::new(0),
            received_bytes: AtomicU64::new(0),
            sent_bytes: AtomicU64::new(0),
            changes: AtomicU64::new(0),
            feed_lines: AtomicU64::new(0),
            feed_errors: AtomicU64::new(0),
        }
    }
}

impl DoorMetrics {
    /// Counts a request from now on. Dropped before it [ends](Call::end), it was cancelled.
    pub fn begin(&self, door: Door) -> Call<'_> {
        Call { metrics: self, door, began: Instant::now(), is_over: false }
    }

    /// Requests by door and outcome.
    pub fn requests(&self) -> impl Iterator<Item = (Door, &'static str, u64)> + '_ {
        Door::ALL.into_iter().flat_map(|door| {
            let counts = OUTCOMES.into_iter().zip(&self.requests[door as usize]);
            counts.map(move |(outcome, count)| (door, outcome, count.load(Relaxed)))
        })
    }

    /// How long calls took, by door.
    pub fn seconds(&self) -> impl Iterator<Item = (Door, HistogramSnapshot)> + '_ {
        Door::ALL.into_iter().map(|door| (door, self.seconds[door as usize].snapshot()))
    }
}

/// A request that is being answered.
pub(super) struct Call<'a> {
    metrics: &'a DoorMetrics,
    door: Door,
    began: Instant,
    is_over: bool,
}

impl Call<'_> {
    /// Microseconds since it began.
    pub fn elapsed_us(&self) -> u64 {
        self.began.elapsed().as_micros() as u64
    }

    /// Counts the end of the request.
    pub fn end(mut self, failure: Option<&Failure>) {
        let outcome = match failure.map(|failure| (failure.status.as_u16(), failure.body.code)) {
            None => 0,
            Some((_, "deadline_exceeded")) => 3,
            Some((429 | 503, _)) => 2,
            Some((499, _)) => 4,
            Some((400..=499, _)) => 1,
            Some(_) => 5,
        };
        self.count(outcome);
    }

    fn count(&mut self, outcome: usize) {
        self.is_over = true;
        self.metrics.requests[self.door as usize][outcome].fetch_add(1, Relaxed);
        self.metrics.seconds[self.door as usize].record(self.elapsed_us());
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        if !self.is_over {
            self.count(4);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_is_dropped_was_cancelled() {
        let metrics = DoorMetrics::default();
        drop(metrics.begin(Door::Grpc));
        metrics.begin(Door::Grpc).end(None);
        let counted: Vec<_> = metrics.requests().filter(|(_, _, count)| *count > 0).collect();
        assert_eq!(counted, [(Door::Grpc, "answered", 1), (Door::Grpc, "cancelled", 1)]);
    }
}
