//! How an engine is opened.

use std::time::Duration;

use crate::backend::{Backend, MemorySpec};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::models::ModelSpec;
use crate::pages::{self, TAIL_PAGE_LEN};

/// The most threads that an engine may be asked to compute on.
pub const MAX_THREADS: usize = 1024;
/// The most prompt tokens, or beam rows, that a step may be asked to have.
const MAX_ROWS: usize = 1 << 24;

/// How an engine is opened.
///
/// ```
/// let options = sidereal::EngineOptions::default().with_threads(2).with_max_context(2048);
/// ```
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct EngineOptions {
    /// Threads to compute on, at most [`MAX_THREADS`]; 0 for all cores.
    pub threads: usize,
    /// The most tokens of an input. A model's own limit of positions holds as well.
    pub max_context: usize,
    /// Tokens of all contexts together, of those that run and those that are kept for requests to
    /// come; 0 for what 256 MiB hold (half of the free memory of a GPU), and for one longest input
    /// at least.
    pub context_tokens: usize,
    /// Beam rows that the memory for tails is enough for: the most that all requests together, and
    /// one alone, can have.
    pub max_beam_rows: usize,
    /// Beam rows that share a step, unless one request has more.
    pub rows_per_step: usize,
    /// Prompt tokens that share a step. A prompt that an encoder reads may have more.
    pub tokens_per_step: usize,
    /// How long a request of high priority waits before it goes before all that came later; normal
    /// priority waits twice as long, low three times.
    pub ageing: Duration,
    /// Whether contexts are kept for requests to come.
    pub prefix_cache: bool,
}

impl Default for EngineOptions {
    fn default() -> EngineOptions {
        EngineOptions {
            threads: 0,
            max_context: 8192,
            context_tokens: 0,
            max_beam_rows: 16_384,
            rows_per_step: 256,
            tokens_per_step: 1024,
            ageing: Duration::from_millis(500),
            prefix_cache: true,
        }
    }
}

impl EngineOptions {
    /// The defaults for a device: a GPU is full only with more rows in a step than a CPU needs.
    pub fn for_device(device: Device) -> EngineOptions {
        match device {
            Device::Cpu => EngineOptions::default(),
            Device::Cuda(_) => {
                EngineOptions::default().with_rows_per_step(4096).with_tokens_per_step(8192)
            }
        }
    }

    /// Sets [`threads`](EngineOptions::threads).
    pub fn with_threads(mut self, threads: usize) -> EngineOptions {
        self.threads = threads;
        self
    }

    /// Sets [`max_context`](EngineOptions::max_context).
    pub fn with_max_context(mut self, tokens: usize) -> EngineOptions {
        self.max_context = tokens;
        self
    }

    /// Sets [`context_tokens`](EngineOptions::context_tokens).
    pub fn with_context_tokens(mut self, tokens: usize) -> EngineOptions {
        self.context_tokens = tokens;
        self
    }

    /// Sets [`max_beam_rows`](EngineOptions::max_beam_rows).
    pub fn with_max_beam_rows(mut self, rows: usize) -> EngineOptions {
        self.max_beam_rows = rows;
        self
    }

    /// Sets [`rows_per_step`](EngineOptions::rows_per_step).
    pub fn with_rows_per_step(mut self, rows: usize) -> EngineOptions {
        self.rows_per_step = rows;
        self
    }

    /// Sets [`tokens_per_step`](EngineOptions::tokens_per_step).
    pub fn with_tokens_per_step(mut self, tokens: usize) -> EngineOptions {
        self.tokens_per_step = tokens;
        self
    }

    /// Sets [`ageing`](EngineOptions::ageing).
    pub fn with_ageing(mut self, ageing: Duration) -> EngineOptions {
        self.ageing = ageing;
        self
    }

    /// Sets [`prefix_cache`](EngineOptions::prefix_cache).
    pub fn with_prefix_cache(mut self, is_on: bool) -> EngineOptions {
        self.prefix_cache = is_on;
        self
    }

    /// Whether an engine can be opened so at all.
    pub(crate) fn check(&self) -> Result<()> {
        let ranges = [
            ("threads", self.threads, 0, MAX_THREADS),
            ("max_context", self.max_context, 1, usize::MAX),
            ("max_beam_rows", self.max_beam_rows, 1, usize::MAX),
            ("rows_per_step", self.rows_per_step, 1, MAX_ROWS),
            ("tokens_per_step", self.tokens_per_step, 1, MAX_ROWS),
        ];
        let invalid = |option, reason| Error::InvalidOption { option, reason };
        for (option, value, least, most) in ranges {
            if value < least {
                return Err(invalid(option, format!("{value} is less than {least}")));
            }
            if value > most {
                return Err(invalid(
                    option,
                    format!("{value} is more than {most}, the most that an engine takes"),
                ));
            }
        }
        Ok(())
    }

    pub(super) fn memory<B: Backend>(
        &self,
        backend: &B,
        spec: &ModelSpec,
        max_context: usize,
        num_steps: usize,
    ) -> Result<MemorySpec> {
        let token_bytes = spec.kv.numbers_per_token() * backend.kv_dtype().size();
        let most_of_one = max_context.min(self.max_context);
        let tokens = match self.context_tokens {
            0 => (backend.context_bytes()? / token_bytes.max(1))
                .min(pages::MAX_PAGES * pages::PAGE_LEN)
                .max(most_of_one),
            tokens => tokens,
        };
        let context_pages = pages::context_pages(tokens);
        let tail_pages = (1 + num_steps).saturating_mul(self.max_beam_rows.div_ceil(TAIL_PAGE_LEN));
        for (option, have, pages) in [
            ("context_tokens", tokens, context_pages),
            ("max_beam_rows", self.max_beam_rows, tail_pages),
        ] {
            if pages > pages::MAX_PAGES {
                let most = pages::MAX_PAGES;
                let reason = format!("{have} take {pages} pages of memory, at most {most} go");
                return Err(Error::InvalidOption { option, reason });
            }
        }
        Ok(MemorySpec {
            kv: spec.kv,
            context_pages,
            tail_pages,
            rows_per_step: self.rows_per_step.min(self.max_beam_rows),
            tokens_per_step: match spec.prompt.is_whole() {
                true => self.tokens_per_step.max(most_of_one),
                false => self.tokens_per_step,
            },
        })
    }
}
