//! What an engine says of itself: what it holds, and where its time went.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use crate::catalog::Catalog;
use crate::cost::{Micros, Work};
use crate::metrics::{Gauges, PageCounts};
use crate::prefix_cache::CacheStats;

/// Where the time went, summed over the threads that work on different requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Phases {
    /// Passes that read prompts, with the beams that shared them.
    pub prefill: Duration,
    /// Passes that read beams alone.
    pub decode: Duration,
    /// The output head, the normaliser and the choice of beams.
    pub search: Duration,
}

#[derive(Default)]
pub(super) struct PhaseClocks {
    pub prefill: AtomicU64,
    pub decode: AtomicU64,
    pub search: AtomicU64,
}

/// Work whose time is not known yet: on a device the host runs ahead of it.
#[derive(Default)]
pub(super) struct Unobserved {
    pub work: Work,
    /// When it began.
    pub since_us: Micros,
}

/// What an engine holds at a moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct EngineStatus {
    /// Requests that wait for room.
    pub waiting: usize,
    /// Requests that run.
    pub running: usize,
    /// Pages of contexts, [`PAGE_LEN`](crate::pages::PAGE_LEN) tokens each.
    pub context_pages: usize,
    /// Pages of contexts that are free.
    pub free_context_pages: usize,
    /// Pages of contexts that are kept for requests to come; running requests may hold them as
    /// well.
    pub cached_context_pages: usize,
    /// Pages of tails, [`TAIL_PAGE_LEN`](crate::pages::TAIL_PAGE_LEN) rows each.
    pub tail_pages: usize,
    /// Pages of tails that are free.
    pub free_tail_pages: usize,
    /// Hits and misses of the prefix cache.
    pub cache: CacheStats,
    /// How long all that waits and runs will take, as predicted, in microseconds.
    pub backlog_us: u64,
}

impl EngineStatus {
    /// What metrics show of it.
    pub(crate) fn gauges(&self, catalog: &Catalog, weights_version: u64) -> Gauges {
        let EngineStatus { context_pages, free_context_pages, cached_context_pages, .. } = *self;
        Gauges {
            waiting: self.waiting as u64,
            running: self.running as u64,
            pages: PageCounts {
                context_free: free_context_pages as u64,
                context_cached: cached_context_pages as u64,
                context_running: (context_pages - free_context_pages - cached_context_pages) as u64,
                tail_free: self.free_tail_pages as u64,
                tail_running: (self.tail_pages - self.free_tail_pages) as u64,
            },
            backlog_us: self.backlog_us,
            evicted_pages: self.cache.evicted_pages,
            catalog_snapshot: catalog.snapshot().number(),
            weights_version,
        }
    }
}
