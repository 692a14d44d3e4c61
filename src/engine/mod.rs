//! From a request to its answer.
//!
//! Requests are batched **continuously**: in every step some read their prompts, in chunks, and
//! others extend their beams by a level; all rows of a step share its matrix products. What a
//! request needs is known when it arrives (pages for its context and tails, beam rows), so it is
//! admitted when that is free ([`schedule`](crate::schedule)) and then always finishes. The answer to a request is
//! the same, to the last bit, in any company and on any number of threads.
//!
//! Contexts that were computed stay as long as there is room ([`prefix_cache`](crate::prefix_cache)): a request that
//! begins like an earlier one reads only what is new.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::answer::Answer;
use crate::backend::cpu::CpuBackend;
use crate::backend::{Backend, MemorySpec, NO_TOKEN};
use crate::catalog::Catalog;
use crate::error::{Error, Result};
use crate::models::config::{Config, SidLayout};
use crate::models::weights::Weights;
use crate::models::{self, ModelSpec};
use crate::pages::{self, TAIL_PAGE_LEN};
use crate::prefix_cache::CacheStats;
use crate::request::{MAX_BEAMS, Request};
use crate::schedule::{Limits, Micros, RequestId};
use crate::tensor::Tensor;

mod job;
mod load;

pub(crate) use job::Job;
use load::Load;

/// Numbers in a network's weights up to which they stay in the caches, so that two threads do
/// better with half the requests each than with half of every product.
const MOST_SMALL_WEIGHTS: usize = 16 << 20;
/// Requests that wait at most while [`Engine::recommend_all`] hands over more.
const MOST_WAITING: usize = 64;

/// How an engine is opened.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Threads to compute on; 0 for all cores.
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
    fn memory<B: Backend>(
        &self,
        backend: &B,
        spec: &ModelSpec,
        max_context: usize,
        num_steps: usize,
    ) -> Result<MemorySpec> {
        let token_bytes = spec.kv.numbers_per_token() * backend.dtype().size();
        let most_of_one = max_context.min(self.max_context);
        let tokens = match self.context_tokens {
            0 => (backend.context_bytes()? / token_bytes.max(1))
                .min(pages::MAX_PAGES * pages::PAGE_LEN)
                .max(most_of_one),
            tokens => tokens,
        };
        let context_pages = pages::context_pages(tokens);
        let tail_pages = (1 + num_steps).saturating_mul(self.max_beam_rows.div_ceil(TAIL_PAGE_LEN));
        for (field, have, pages) in [
            ("context_tokens", tokens, context_pages),
            ("max_beam_rows", self.max_beam_rows, tail_pages),
        ] {
            if pages > pages::MAX_PAGES {
                let most = pages::MAX_PAGES;
                let reason = format!("{have} take {pages} pages of memory, at most {most} go");
                return Err(Error::InvalidField { field, reason });
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

/// A model and a catalog, ready to answer. Shared by reference between threads; calls wait for each
/// other. Many callers at a time are better served by a [`Service`](crate::Service).
pub struct Engine<B: Backend = CpuBackend> {
    backend: B,
    config: Config,
    spec: ModelSpec,
    /// The network's weights as they came, of which some may be replaced.
    weights: Mutex<Weights>,
    layout: SidLayout,
    /// By level: the code of each token.
    codes: Vec<HashMap<u32, u16>>,
    catalog: Arc<Catalog>,
    max_context: usize,
    context_pages: usize,
    tail_pages: usize,
    limits: Limits,
    /// All threads together.
    pool: ThreadPool,
    /// One thread each, for a part of a step's requests; empty where there is but one thread or
    /// the weights are many.
    workers: Vec<ThreadPool>,
    load: Mutex<Load<B>>,
    opened: Instant,
    phases: PhaseClocks,
}

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
struct PhaseClocks {
    prefill: AtomicU64,
    decode: AtomicU64,
    search: AtomicU64,
}

impl PhaseClocks {
    fn clear(&self) {
        for clock in [&self.prefill, &self.decode, &self.search] {
            clock.store(0, Ordering::Relaxed);
        }
    }
}

/// What an engine holds at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineStatus {
    /// Requests that wait for room.
    pub waiting: usize,
    /// Requests that run.
    pub running: usize,
    /// Pages of contexts, [`PAGE_LEN`](pages::PAGE_LEN) tokens each.
    pub context_pages: usize,
    /// Those that are free.
    pub free_context_pages: usize,
    /// Those that are kept for requests to come, and may be held by running ones as well.
    pub cached_context_pages: usize,
    /// Pages of tails, [`TAIL_PAGE_LEN`] rows each.
    pub tail_pages: usize,
    /// Those that are free.
    pub free_tail_pages: usize,
    /// What the history cache found.
    pub cache: CacheStats,
}

impl Engine<CpuBackend> {
    /// Opens a model folder (`config.json`, `sidereal.json`, safetensors) on the CPU.
    ///
    /// # Errors
    /// The files': see [`models::load`], [`SidLayout`]; [`Error::LevelsMismatch`] where the catalog
    /// has codes that the model cannot write.
    pub fn open(folder: &Path, catalog: Arc<Catalog>, options: &EngineOptions) -> Result<Self> {
        Engine::open_on(CpuBackend::default(), folder, catalog, options)
    }
}

impl<B: Backend> Engine<B> {
    /// Opens a model folder on a device.
    ///
    /// # Errors
    /// As [`Engine::open`]; [`Error::Device`].
    pub fn open_on(
        backend: B,
        folder: &Path,
        catalog: Arc<Catalog>,
        options: &EngineOptions,
    ) -> Result<Engine<B>> {
        let config = Config::read(&folder.join("config.json"))?;
        let layout = SidLayout::read(folder, models::vocab_size(&config)?)?;
        Engine::from_parts(backend, &config, Weights::open(folder)?, layout, catalog, options)
    }

    /// Opens a network from its parts, wherever they come from.
    ///
    /// # Errors
    /// As [`Engine::open`].
    pub fn from_parts(
        backend: B,
        config: &Config,
        weights: Weights,
        layout: SidLayout,
        catalog: Arc<Catalog>,
        options: &EngineOptions,
    ) -> Result<Engine<B>> {
        layout.check(&catalog)?;
        let pool = thread_pool(options.threads)?;
        let num_steps = layout.num_steps();
        if num_steps > backend.max_steps() {
            return Err(Error::Unsupported {
                what: format!("a search of {num_steps} steps on this device"),
                way_out: format!("at most {} are; use the CPU", backend.max_steps()),
            });
        }
        let model = pool.install(|| models::load(&backend, config, weights.clone(), &layout))?;
        // What the decoder writes takes positions as well: all steps but the last are read again.
        let (spec, written) = (*model.spec(), num_steps - 1);
        let max_positions = spec.max_positions.map(|max| max.saturating_sub(written));
        let max_context = options.max_context.min(max_positions.unwrap_or(usize::MAX));
        let memory = options.memory(&backend, &spec, max_context, num_steps)?;
        let workers = match pool.current_num_threads() {
            threads
                if B::COMPUTES_ON_CALLERS
                    && threads > 1
                    && spec.num_weights <= MOST_SMALL_WEIGHTS =>
            {
                (0..threads).map(|_| thread_pool(1)).collect::<Result<_>>()?
            }
            _ => Vec::new(),
        };
        let codes = layout.levels.iter().map(|tokens| {
            let tokens = tokens.iter().enumerate().filter(|&(_, &token)| token != NO_TOKEN);
            tokens.map(|(code, &token)| (token, code as u16)).collect()
        });
        let engine = Engine {
            codes: codes.collect(),
            layout,
            catalog,
            max_context,
            context_pages: memory.context_pages,
            tail_pages: memory.tail_pages,
            limits: Limits {
                beam_rows: options.rows_per_step,
                prompt_tokens: options.tokens_per_step,
                ageing_us: load::micros(options.ageing),
            },
            pool,
            workers,
            load: Mutex::new(Load::new(&backend, model, &memory, options.prefix_cache)?),
            opened: Instant::now(),
            phases: PhaseClocks::default(),
            backend,
            config: config.clone(),
            spec,
            weights: Mutex::new(weights),
        };
        if !B::COMPUTES_ON_CALLERS {
            engine.warm_up(options)?;
        }
        Ok(engine)
    }

    /// Runs a request, so that a device has taken all memory that steps need, and fails here where
    /// it has too little.
    fn warm_up(&self, options: &EngineOptions) -> Result<()> {
        let most = self.max_context.min(self.context_pages * pages::PAGE_LEN);
        let mut request = Request::from_tokens(vec![0; most]);
        request.beams = options.rows_per_step.min(options.max_beam_rows).min(MAX_BEAMS);
        request.top_k = 1;
        // Options that allow no request are no failure of the device.
        if self.submit(request).is_err() {
            return Ok(());
        }
        let mut load = self.lock()?;
        while !load.is_idle() {
            self.step_load(&mut load);
        }
        // Random weights, or weights that make no sense, are not the device's failure.
        let failure = load.take_answers().into_iter().find_map(|(_, answer)| match answer {
            Err(error @ Error::Device { .. }) => Some(error),
            _ => None,
        });
        load.forget();
        self.phases.clear();
        failure.map_or(Ok(()), Err)
    }

    /// The catalog that is searched.
    pub fn catalog(&self) -> &Arc<Catalog> {
        &self.catalog
    }

    /// Runs something on the engine's threads, with its backend, while nothing else runs there.
    /// `work` must not call the engine.
    pub fn run<R: Send>(&self, work: impl FnOnce(&B) -> R + Send) -> R {
        let _load = self.load.lock().unwrap_or_else(PoisonError::into_inner);
        self.pool.install(|| work(&self.backend))
    }

    /// Threads that compute.
    pub fn num_threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// The most tokens that an input may have.
    pub fn max_context(&self) -> usize {
        self.max_context
    }

    /// Where the time went since the engine was opened.
    pub fn phases(&self) -> Phases {
        let read = |clock: &AtomicU64| Duration::from_nanos(clock.load(Ordering::Relaxed));
        Phases {
            prefill: read(&self.phases.prefill),
            decode: read(&self.phases.decode),
            search: read(&self.phases.search),
        }
    }

    /// Answers one request, on all threads.
    ///
    /// # Errors
    /// The request's; [`Error::EngineFailed`].
    pub fn recommend(&self, request: &Request) -> Result<Answer> {
        let job = self.prepare(request.clone())?;
        let mut load = self.lock()?;
        let id = load.enqueue(job);
        loop {
            self.step_load(&mut load);
            if let Some(answer) = load.take_answer(id) {
                return answer;
            }
        }
    }

    /// Answers many requests and hands each answer to `deliver` with the request's index, in the
    /// order in which they finish.
    pub fn recommend_all(
        &self,
        requests: &[Request],
        mut deliver: impl FnMut(usize, Result<Answer>),
    ) {
        let mut next = requests.iter().enumerate();
        let mut indices = HashMap::new();
        loop {
            while indices.len() < MOST_WAITING {
                let Some((index, request)) = next.next() else { break };
                match self.submit(request.clone()) {
                    Ok(id) => {
                        indices.insert(id, index);
                    }
                    Err(error) => deliver(index, Err(error)),
                }
            }
            if indices.is_empty() {
                return;
            }
            let mut finished = Vec::new();
            match self.lock() {
                Ok(mut load) => {
                    self.step_load(&mut load);
                    let answers = indices.keys().map(|&id| (id, load.take_answer(id)));
                    finished.extend(answers.filter_map(|(id, answer)| Some((id, answer?))));
                }
                Err(_) => finished.extend(indices.keys().map(|&id| (id, Err(failed())))),
            }
            for (id, answer) in finished {
                deliver(indices.remove(&id).expect("one of ours"), answer);
            }
        }
    }

    /// Hands over a request, which [`step`](Engine::step) will answer: for callers with a loop of
    /// their own.
    ///
    /// # Errors
    /// The request's; [`Error::EngineFailed`].
    pub fn submit(&self, request: Request) -> Result<RequestId> {
        self.enqueue(self.prepare(request)?)
    }

    /// The same for a request that was checked.
    ///
    /// # Errors
    /// [`Error::EngineFailed`].
    pub(crate) fn enqueue(&self, job: Job) -> Result<RequestId> {
        Ok(self.lock()?.enqueue(job))
    }

    /// Forgets a request that waits or runs; what it held is free at once.
    ///
    /// # Errors
    /// [`Error::EngineFailed`].
    pub fn cancel(&self, id: RequestId) -> Result<()> {
        self.lock()?.cancel(id);
        Ok(())
    }

    /// One step of all requests, and the answers that are there after it.
    ///
    /// # Errors
    /// [`Error::EngineFailed`].
    pub fn step(&self) -> Result<Vec<(RequestId, Result<Answer>)>> {
        let mut load = self.lock()?;
        self.step_load(&mut load);
        Ok(load.take_answers())
    }

    /// Puts other tensors in the place of those of the same names, and returns the version of the
    /// weights, which the answers from now on carry. Requests that run are finished with the
    /// weights that they began with; contexts that were kept are dropped.
    ///
    /// The network is laid out anew beside the old one: it takes as much memory again meanwhile.
    ///
    /// # Errors
    /// [`Error::UnexpectedTensor`], [`Error::TensorShape`], [`Error::NonFiniteWeight`];
    /// [`Error::Unsupported`] where the weights are random. The old weights stay then.
    pub fn replace_weights(
        &self,
        tensors: impl IntoIterator<Item = (String, Tensor)>,
    ) -> Result<u64> {
        let mut own = self.weights.lock().map_err(|_| failed())?;
        let mut weights = own.clone();
        weights.replace(tensors.into_iter().collect())?;
        let load = || models::load(&self.backend, &self.config, weights.clone(), &self.layout);
        let model = self.pool.install(load)?;
        let mut load = self.lock()?;
        self.finish_running(&mut load);
        *own = weights;
        Ok(load.replace_model(model))
    }

    /// What waits, what runs and what is free.
    ///
    /// # Errors
    /// [`Error::EngineFailed`].
    pub fn status(&self) -> Result<EngineStatus> {
        Ok(self.lock()?.status())
    }

    /// Checks that every page of memory is in exactly one place: free, or held by those who share
    /// it. For tests and for operators who suspect a leak; it takes time in proportion to the pages.
    ///
    /// # Errors
    /// [`Error::EngineFailed`] with what is wrong.
    pub fn check_integrity(&self) -> Result<()> {
        self.lock()?.check_integrity().map_err(|reason| Error::EngineFailed { reason })
    }

    fn lock(&self) -> Result<MutexGuard<'_, Load<B>>> {
        self.load.lock().map_err(|_| failed())
    }

    fn now_us(&self) -> Micros {
        self.opened.elapsed().as_micros() as Micros
    }

    fn num_steps(&self) -> usize {
        self.layout.num_steps()
    }
}

fn failed() -> Error {
    Error::EngineFailed { reason: "it panicked in the middle of a step".into() }
}

fn timed(clock: &AtomicU64, work: impl FnOnce()) {
    let start = Instant::now();
    work();
    clock.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
}

fn thread_pool(threads: usize) -> Result<ThreadPool> {
    let name = |index: usize| format!("sidereal-{index}");
    let pool = ThreadPoolBuilder::new().num_threads(threads).thread_name(name).build();
    pool.map_err(|error| Error::Device { device: "cpu".into(), reason: error.to_string() })
}
