//! The engine: opening, asking, stepping.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use rayon::{ThreadPool, ThreadPoolBuilder};

use super::answer::{Codes, Reply};
use super::batch::Workspace;
use super::options::EngineOptions;
use super::phrases::PhraseIndex;
use super::prepare::{self, Prepared, Preparer};
use super::program::Program;
use super::scheduler::{Scheduler, SchedulerSpec};
use super::status::{EngineStatus, PhaseClocks, Phases, Unobserved};
use super::weights::{Loader, ReplaceWeights};
use crate::answer::Answer;
use crate::backend::cpu::CpuBackend;
use crate::backend::{Backend, MemorySpec};
use crate::catalog::Catalog;
use crate::error::{Error, Result};
use crate::metrics::{Metrics, MetricsSnapshot};
use crate::models::config::{Config, SidLayout};
use crate::models::weights::Weights;
use crate::models::{self, Checkpoint, ForwardPass, Model, ModelSpec, PromptKind};
use crate::pages;
use crate::request::{Input, MAX_BEAMS, Request};
use crate::schedule::{Limits, RequestId};
use crate::tensor::Tensor;

/// Numbers in a network's weights up to which they stay in the caches, so that two threads do
/// better with half the requests each than with half of every product.
const MOST_SMALL_WEIGHTS: usize = 16 << 20;

/// A model and a catalog, ready to answer, with one owner.
///
/// A shared engine cannot be stepped, so that two drivers over one engine cannot be written:
///
/// ```compile_fail,E0596
/// fn step(engine: &sidereal::Engine) {
///     engine.step();
/// }
/// ```
pub struct Engine<B: Backend = CpuBackend> {
    pub(super) backend: Arc<B>,
    pub(super) spec: ModelSpec,
    pub(super) preparer: Arc<Preparer>,
    pub(super) codes: Codes,
    pub(super) loader: Arc<Loader<B>>,
    pub(super) model: Arc<dyn Model<B>>,
    pub(super) weights_version: u64,
    pub(super) memory: B::Memory,
    pub(super) scheduler: Scheduler<B::Slot>,
    pub(super) scheduler_spec: SchedulerSpec,
    /// One for each sub-batch of a step.
    pub(super) workspaces: Vec<Workspace<B>>,
    /// By request: the passes that read prompts in pieces, with what they hold meanwhile.
    pub(super) encodings: HashMap<RequestId, Box<dyn ForwardPass<B>>>,
    pub(super) unobserved: Unobserved,
    /// All threads together.
    pub(super) pool: Arc<ThreadPool>,
    /// One thread each, for a sub-batch of a step; empty where there is but one thread or the
    /// weights are many.
    pub(super) workers: Vec<ThreadPool>,
    pub(super) phases: PhaseClocks,
    /// The process that opened the engine; its threads do not exist in another.
    pub(super) process: u32,
    /// A step began and did not end: it panicked.
    pub(super) is_stepping: bool,
}

impl Engine<CpuBackend> {
    /// Opens a model folder (`config.json`, `sidereal.json`, safetensors) on the CPU.
    ///
    /// # Errors
    /// The files': see [`models::load`], [`SidLayout`]; [`Error::LevelsMismatch`] where the catalog
    /// has codes that the model cannot write; [`Error::InvalidOption`].
    pub fn open(folder: &Path, catalog: Arc<Catalog>, options: &EngineOptions) -> Result<Self> {
        Engine::open_on(CpuBackend::default(), folder, None, catalog, options)
    }
}

impl<B: Backend> Engine<B> {
    /// Opens a model folder on a device; `base` is the folder of the base where it is an adapter's.
    ///
    /// # Errors
    /// Those of [`Engine::open`]; [`Error::Device`].
    pub fn open_on(
        backend: B,
        folder: &Path,
        base: Option<&Path>,
        catalog: Arc<Catalog>,
        options: &EngineOptions,
    ) -> Result<Engine<B>> {
        options.check()?;
        let Checkpoint { config, weights, .. } = Checkpoint::open(folder, base)?;
        let vocab_size = models::vocab_size(&config)?;
        let layout = SidLayout::read_for(folder, vocab_size, Some(&catalog))?;
        Engine::from_parts(backend, &config, weights, layout, catalog, options)
    }

    /// Opens a network from its parts, wherever they come from, and tries it on a small request.
    ///
    /// # Errors
    /// Those of [`Engine::open`]; [`Error::NonFiniteModel`]; [`Error::Device`].
    pub fn from_parts(
        backend: B,
        config: &Config,
        weights: Weights,
        layout: SidLayout,
        catalog: Arc<Catalog>,
        options: &EngineOptions,
    ) -> Result<Engine<B>> {
        options.check()?;
        layout.check(&catalog)?;
        let (backend, pool) = (Arc::new(backend), Arc::new(thread_pool(options.threads)?));
        let loader =
            Loader::new(Arc::clone(&backend), Arc::clone(&pool), config, weights, layout.clone());
        let model = loader.load()?;
        // What the decoder writes takes positions as well: all steps but the last are read again.
        let spec = *model.spec();
        let phrases = PhraseIndex::open(&*backend, &layout, spec.vocab_size, &pool, &catalog)?;
        let num_phrase_steps = phrases.as_ref().map(PhraseIndex::max_steps);
        let program = Program::of_layout(&layout, num_phrase_steps, spec.prompt);
        let (num_steps, max_steps) = (program.max_steps(), backend.max_steps());
        if num_steps > max_steps {
            return Err(prepare::too_many_steps(num_steps, max_steps));
        }
        let max_positions = spec.max_positions.map(|max| max.saturating_sub(num_steps - 1));
        let max_context = options.max_context.min(max_positions.unwrap_or(usize::MAX));
        let memory = options.memory(&*backend, &spec, max_context, num_steps)?;
        let workers = workers::<B>(pool.current_num_threads(), spec.num_weights)?;
        let metrics = Arc::new(Metrics::default());
        let scheduler_spec = scheduler_spec(options, &memory, spec.prompt);
        let mut engine = Engine {
            codes: Codes::new(&layout),
            preparer: Arc::new(Preparer {
                catalog,
                layout,
                phrases,
                thoughts: backend.check_thoughts(),
                free_samples: backend.check_free_samples(),
                vocab_size: spec.vocab_size,
                words: model.word_rule(),
                prompt: spec.prompt,
                max_positions: spec.max_positions,
                max_steps,
                max_context,
                forced_len: program.tokens().len(),
                context_pages: memory.context_pages,
                tail_pages: memory.tail_pages,
                opened: Instant::now(),
                last_id: AtomicU64::new(0),
                metrics: Arc::clone(&metrics),
            }),
            memory: backend.memory(&memory)?,
            loader: Arc::new(loader),
            model,
            weights_version: 1,
            scheduler: Scheduler::new(&scheduler_spec, metrics),
            scheduler_spec,
            workspaces: Vec::new(),
            pool,
            workers,
            encodings: HashMap::new(),
            unobserved: Unobserved::default(),
            phases: PhaseClocks::default(),
            process: std::process::id(),
            is_stepping: false,
            backend,
            spec,
        };
        if !B::COMPUTES_ON_CALLERS {
            engine.warm_up(options)?;
        }
        engine.probe()?;
        engine.preparer.last_id.store(0, Ordering::Relaxed); // the first caller's request is 1
        Ok(engine)
    }

    /// Runs a request, so that a device has taken all memory that steps need, and fails here where
    /// it has too little.
    fn warm_up(&mut self, options: &EngineOptions) -> Result<()> {
        let Preparer { max_context, context_pages, forced_len, .. } = *self.preparer;
        let most = max_context.min(context_pages * pages::PAGE_LEN).saturating_sub(forced_len);
        let mut request = Request::from_tokens(vec![0; most]);
        request.beams = options.rows_per_step.min(options.max_beam_rows).min(MAX_BEAMS);
        request.top_k = 1;
        match self.recommend_apart(&request) {
            Err(error @ Error::Device { .. }) => Err(error),
            // Options that allow no request are no failure of the device; nor are weights that
            // make no sense.
            _ => Ok(()),
        }
    }

    /// Checks requests for this engine, on any thread, while it steps.
    pub fn preparer(&self) -> &Arc<Preparer> {
        &self.preparer
    }

    /// The catalog that is searched.
    pub fn catalog(&self) -> &Arc<Catalog> {
        self.preparer.catalog()
    }

    /// Runs something on the engine's threads, with its backend.
    pub fn run<R: Send>(&self, work: impl FnOnce(&B) -> R + Send) -> R {
        let backend = &*self.backend;
        self.pool.install(|| work(backend))
    }

    /// The backend.
    pub(crate) fn backend(&self) -> &B {
        &self.backend
    }

    /// Threads that compute.
    pub fn num_threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    /// The most tokens that an input may have.
    pub fn max_context(&self) -> usize {
        self.preparer.max_context()
    }

    /// The tokens that the model reads for an input, with the catalog as it is now.
    ///
    /// # Errors
    /// The request's: an unknown item, a token outside the vocabulary, too few or too many.
    pub fn input_tokens(&self, input: &Input) -> Result<Vec<u32>> {
        self.preparer.input_tokens(input)
    }

    /// The version of the weights: 1 as the engine was opened, one more each time that they were
    /// replaced.
    pub fn weights_version(&self) -> u64 {
        self.weights_version
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

    /// Answers one request, on all threads. Requests that were submitted before share its steps.
    ///
    /// # Errors
    /// The request's; [`Error::EngineFailed`], [`Error::Forked`].
    pub fn recommend(&mut self, request: &Request) -> Result<Answer> {
        let (sender, answer) = mpsc::channel();
        self.submit(request.clone(), move |answer| drop(sender.send(answer)))?;
        loop {
            self.step()?;
            if let Ok(answer) = answer.try_recv() {
                return answer;
            }
        }
    }

    /// Hands over a request, which [`step`](Engine::step) will answer: for owners with a loop of
    /// their own. `callback` gets the answer, on this thread. Its ID cancels the request.
    ///
    /// # Errors
    /// The request's; [`Error::EngineFailed`], [`Error::Forked`]; `callback` is not called then.
    pub fn submit(
        &mut self,
        request: Request,
        callback: impl FnOnce(Result<Answer>) + Send + 'static,
    ) -> Result<RequestId> {
        let prepared = self.preparer.prepare(request)?;
        self.ready().inspect_err(|error| self.preparer.metrics().request_refused(error))?;
        let id = prepared.id();
        self.enqueue(prepared, Reply::new(callback));
        Ok(id)
    }

    /// Hands over a request that this engine's [`preparer`](Engine::preparer) checked.
    pub fn enqueue(&mut self, prepared: Prepared, reply: Reply) {
        self.scheduler.enqueue(prepared, reply);
    }

    /// Ends a request that waits or runs with [`Error::Cancelled`]; what it held is free at once.
    /// The ID of a request that was answered does nothing.
    pub fn cancel(&mut self, id: RequestId) {
        self.scheduler.cancel(id);
        self.deliver();
    }

    /// Ends all requests that wait or run.
    pub(crate) fn end_all(&mut self, error: impl Fn() -> Error) {
        self.scheduler.end_all(error);
        self.deliver();
    }

    /// Whether no request waits or runs.
    pub fn is_idle(&self) -> bool {
        self.scheduler.is_idle()
    }

    /// One step of all requests; callers are then told what ended.
    ///
    /// # Errors
    /// [`Error::EngineFailed`], [`Error::Forked`].
    pub fn step(&mut self) -> Result<()> {
        self.refuse();
        self.compute()?;
        self.deliver();
        Ok(())
    }

    /// Ends the requests that cannot be answered in time, of which callers are not told yet. Whether
    /// there are any.
    pub(crate) fn refuse(&mut self) -> bool {
        self.scheduler.expire(self.preparer.now_us());
        self.scheduler.has_ended()
    }

    /// One step, of which callers are not told yet.
    ///
    /// # Errors
    /// [`Error::EngineFailed`], [`Error::Forked`].
    pub(crate) fn compute(&mut self) -> Result<()> {
        self.ready()?;
        self.is_stepping = true;
        self.advance();
        self.is_stepping = false;
        Ok(())
    }

    /// Gives the answers that are there to the places that their requests named.
    pub(crate) fn deliver(&mut self) {
        for (reply, answer) in self.scheduler.take_ended() {
            reply.send(answer);
        }
    }

    /// Puts other tensors in the place of those of the same names, and returns the version of the
    /// weights, which the answers from now on carry. Requests that run are finished with the
    /// weights that they began with; contexts that were kept are dropped.
    ///
    /// The network is laid out anew beside the old one: it takes as much memory again meanwhile. It
    /// is then tried on a small request, and taken if that gives finite scores.
    ///
    /// # Errors
    /// [`Error::UnexpectedTensor`], [`Error::TensorShape`], [`Error::NonFiniteWeight`],
    /// [`Error::NonFiniteModel`], [`Error::FileChanged`]; [`Error::Unsupported`] where the weights are random. The old weights stay then.
    pub fn replace_weights(
        &mut self,
        tensors: impl IntoIterator<Item = (String, Tensor)>,
    ) -> Result<u64> {
        self.ready()?;
        let loader = Arc::clone(&self.loader);
        let version =
            loader.replace(tensors.into_iter().collect(), &mut || self.install_weights())?;
        self.deliver();
        Ok(version)
    }

    /// Loads other weights beside the engine, while it steps; it then takes them by
    /// [`install_weights`](Engine::install_weights).
    pub(crate) fn loader(&self) -> Arc<dyn ReplaceWeights> {
        Arc::clone(&self.loader) as Arc<dyn ReplaceWeights>
    }

    /// Finishes the requests that run, and takes the network that was loaded if it gives scores.
    ///
    /// # Errors
    /// [`Error::NonFiniteModel`], [`Error::Device`]: the old network stays;
    /// [`Error::EngineFailed`], [`Error::Forked`].
    pub(crate) fn install_weights(&mut self) -> Result<u64> {
        self.ready()?;
        self.is_stepping = true;
        self.finish_running();
        self.is_stepping = false;
        if let Some(model) = self.loader.take() {
            let before = std::mem::replace(&mut self.model, model);
            self.workspaces.clear(); // their passes hold the old weights
            self.encodings.clear();
            if let Err(error) = self.probe() {
                self.model = before;
                self.workspaces.clear();
                return Err(error);
            }
            self.weights_version += 1;
        }
        Ok(self.weights_version)
    }

    /// What waits, what runs and what is free.
    pub fn status(&self) -> EngineStatus {
        self.scheduler.status()
    }

    /// What the engine counted since it was opened, and what it holds now.
    pub fn metrics(&self) -> MetricsSnapshot {
        let status = self.status();
        self.preparer.metrics().snapshot(status.gauges(self.catalog(), self.weights_version))
    }

    /// Checks that every page of memory is in exactly one place: free, or held by those who share
    /// it. For tests and for operators who suspect a leak; it takes time in proportion to the pages.
    ///
    /// # Errors
    /// [`Error::EngineFailed`] with what is wrong.
    pub fn check_integrity(&self) -> Result<()> {
        self.scheduler.check_integrity().map_err(|reason| Error::EngineFailed { reason })
    }

    /// Whether the engine can still step.
    fn ready(&self) -> Result<()> {
        if self.process != std::process::id() {
            return Err(Error::Forked);
        }
        match self.is_stepping {
            true => {
                let reason = "it panicked in the middle of a step".into();
                Err(Error::EngineFailed { reason })
            }
            false => Ok(()),
        }
    }
}

fn scheduler_spec(
    options: &EngineOptions,
    memory: &MemorySpec,
    prompt: PromptKind,
) -> SchedulerSpec {
    SchedulerSpec {
        limits: Limits {
            beam_rows: options.rows_per_step,
            prompt_tokens: options.tokens_per_step,
            ageing_us: prepare::micros(options.ageing),
        },
        context_pages: memory.context_pages,
        tail_pages: memory.tail_pages,
        has_cache: options.prefix_cache,
        prompt,
    }
}

fn thread_pool(threads: usize) -> Result<ThreadPool> {
    let name = |index: usize| format!("sidereal-{index}");
    let pool = ThreadPoolBuilder::new().num_threads(threads).thread_name(name).build();
    pool.map_err(|error| Error::Device { device: "cpu".into(), reason: error.to_string() })
}

/// The threads that step sub-batches, each alone: for backends that compute on them, and weights
/// that stay in their caches.
fn workers<B: Backend>(num_threads: usize, num_weights: usize) -> Result<Vec<ThreadPool>> {
    match B::COMPUTES_ON_CALLERS && num_threads > 1 && num_weights <= MOST_SMALL_WEIGHTS {
        true => (0..num_threads).map(|_| thread_pool(1)).collect(),
        false => Ok(Vec::new()),
    }
}
