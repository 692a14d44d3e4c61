//! From a request to its answer.
//!
//! Requests go through in **waves**: a few at a time share the matrix products of every step, each
//! with a slot of its own. A wave's cost is known when it starts (context tokens, beams times
//! steps), and an admitted request always finishes. The answer to a request is the same, to the
//! last bit, in any wave and on any number of threads.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::answer::{Answer, Recommendation};
use crate::backend::cpu::CpuBackend;
use crate::backend::{Backend, Beam, NO_TOKEN, SearchRule};
use crate::catalog::filter::Filter;
use crate::catalog::legality::Legality;
use crate::catalog::snapshot::Place;
use crate::catalog::{Catalog, Snapshot};
use crate::error::{Error, Result};
use crate::models::config::{Config, SidLayout};
use crate::models::weights::Weights;
use crate::models::{self, Model, Scratch};
use crate::request::{Constraint, Input, MAX_BEAMS, Normalization, Request, SharedSid};

/// Beam rows that a wave takes at most, unless one request has more.
const ROWS_PER_WAVE: usize = 128;
/// Context tokens that a wave takes at most, unless one request has more.
const TOKENS_PER_WAVE: usize = 2048;
/// Groups that one request may ask for.
const MAX_GROUPS: usize = 256;
/// Logits that a search without a constraint may hold: beams times vocabulary.
const MAX_UNCONSTRAINED_LOGITS: usize = 1 << 28;

/// How an engine is opened.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Threads to compute on; 0 for all cores.
    pub threads: usize,
    /// The most tokens of an input. A model's own limit of positions holds as well.
    pub max_context: usize,
}

impl Default for EngineOptions {
    fn default() -> EngineOptions {
        EngineOptions { threads: 0, max_context: 8192 }
    }
}

/// A model and a catalog, ready to answer. Shared by reference between threads.
pub struct Engine<B: Backend = CpuBackend> {
    backend: B,
    model: Box<dyn Model<B>>,
    layout: SidLayout,
    /// By level: the code of each token.
    codes: Vec<HashMap<u32, u16>>,
    catalog: Arc<Catalog>,
    max_context: usize,
    /// All threads together, for one request at a time.
    pool: ThreadPool,
    /// One thread each, for many requests at a time; empty where there is but one thread.
    workers: Vec<ThreadPool>,
    scratches: Mutex<Vec<(Scratch<B>, B::Logits)>>,
    phases: PhaseClocks,
}

/// Where the time went, summed over waves (and so over threads).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Phases {
    /// Reading the inputs: encoder or prompt, and the first decoder position.
    pub prefill: Duration,
    /// The decoder's later positions.
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

/// A request that was found possible, ready for a wave.
struct Plan<'a> {
    request: &'a Request,
    /// The state of the catalog that the request sees from start to end.
    snapshot: Arc<Snapshot>,
    tokens: Vec<u32>,
    /// What may come back, search by search: one, or one for each of the request's groups.
    searches: Vec<Legality>,
    normalization: Normalization,
}

impl Engine<CpuBackend> {
    /// Opens a model folder (`config.json`, `sidereal.json`, safetensors) on the CPU.
    ///
    /// # Errors
    /// The files': see [`models::load`], [`SidLayout`]; [`Error::LevelsMismatch`] where the catalog
    /// has codes that the model cannot write.
    pub fn open(folder: &Path, catalog: Arc<Catalog>, options: &EngineOptions) -> Result<Self> {
        let config = Config::read(&folder.join("config.json"))?;
        let layout = SidLayout::read(folder, models::vocab_size(&config)?)?;
        Engine::from_parts(
            CpuBackend::default(),
            &config,
            Weights::open(folder)?,
            layout,
            catalog,
            options,
        )
    }
}

impl<B: Backend> Engine<B> {
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
        let steps = layout.steps();
        let model = pool.install(|| models::load(&backend, config, weights, &steps))?;
        // What the decoder writes takes positions as well: all steps but the last are read again.
        let written = steps.len() - 1;
        let max_positions = model.spec().max_positions.map(|max| max.saturating_sub(written));
        let workers = match pool.current_num_threads() {
            1 => Vec::new(),
            threads => (0..threads).map(|_| thread_pool(1)).collect::<Result<_>>()?,
        };
        let codes = layout.levels.iter().map(|tokens| {
            let tokens = tokens.iter().enumerate().filter(|&(_, &token)| token != NO_TOKEN);
            tokens.map(|(code, &token)| (token, code as u16)).collect()
        });
        Ok(Engine {
            backend,
            model,
            codes: codes.collect(),
            layout,
            catalog,
            max_context: options.max_context.min(max_positions.unwrap_or(usize::MAX)),
            pool,
            workers,
            scratches: Mutex::default(),
            phases: PhaseClocks::default(),
        })
    }

    /// The catalog that is searched.
    pub fn catalog(&self) -> &Arc<Catalog> {
        &self.catalog
    }

    /// Runs something on the engine's threads, with its backend.
    pub fn run<R: Send>(&self, work: impl FnOnce(&B) -> R + Send) -> R {
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
    /// The request's.
    pub fn recommend(&self, request: &Request) -> Result<Answer> {
        let plan = self.plan(request)?;
        let mut answers = self.pool.install(|| self.run_wave(&[plan]));
        answers.pop().expect("a wave answers each of its requests")
    }

    /// Answers many requests at a time and hands each answer to `deliver` with the request's
    /// index, in no particular order and from several threads.
    pub fn recommend_all(
        &self,
        requests: &[Request],
        deliver: impl Fn(usize, Result<Answer>) + Sync,
    ) {
        let mut plans = Vec::with_capacity(requests.len());
        for (index, request) in requests.iter().enumerate() {
            match self.plan(request) {
                Ok(plan) => plans.push((index, plan)),
                Err(error) => deliver(index, Err(error)),
            }
        }
        let waves = self.waves(plans);
        let next = AtomicUsize::new(0);
        let run_waves = |pool: &ThreadPool| {
            while let Some((indices, plans)) = waves.get(next.fetch_add(1, Ordering::Relaxed)) {
                let answers = pool.install(|| self.run_wave(plans));
                indices.iter().zip(answers).for_each(|(&index, answer)| deliver(index, answer));
            }
        };
        if self.workers.is_empty() || waves.len() == 1 {
            run_waves(&self.pool);
            return;
        }
        std::thread::scope(|scope| {
            for worker in &self.workers {
                let run_waves = &run_waves;
                scope.spawn(move || run_waves(worker));
            }
        });
    }

    /// Cuts plans into waves, in order: few enough requests each that every thread has some.
    fn waves<'a>(&self, plans: Vec<(usize, Plan<'a>)>) -> Vec<(Vec<usize>, Vec<Plan<'a>>)> {
        let most = plans.len().div_ceil(2 * self.num_threads());
        let mut waves: Vec<(Vec<usize>, Vec<Plan<'a>>)> = Vec::new();
        let (mut rows, mut tokens) = (0, 0);
        for (index, plan) in plans {
            rows += plan.num_rows();
            tokens += plan.tokens.len();
            match waves.last_mut() {
                Some((indices, wave))
                    if wave.len() < most && rows <= ROWS_PER_WAVE && tokens <= TOKENS_PER_WAVE =>
                {
                    indices.push(index);
                    wave.push(plan);
                }
                _ => {
                    (rows, tokens) = (plan.num_rows(), plan.tokens.len());
                    waves.push((vec![index], vec![plan]));
                }
            }
        }
        waves
    }

    /// Checks a request and works out what it needs.
    fn plan<'a>(&self, request: &'a Request) -> Result<Plan<'a>> {
        let Request { beams, top_k, temperature, constraint, .. } = *request;
        if beams == 0 || beams > MAX_BEAMS {
            return Err(Error::BeamWidth { width: beams as i64, max: MAX_BEAMS });
        }
        if top_k == 0 {
            return Err(Error::TopK { top_k: 0 });
        }
        if !(temperature.is_finite() && temperature > 0.0 && (1.0 / temperature).is_finite()) {
            let reason = format!("{temperature} is not a number above zero");
            return Err(Error::InvalidField { field: "temperature", reason });
        }
        let normalization = request.normalization.unwrap_or(self.layout.normalization);
        if constraint == Constraint::None {
            if normalization == Normalization::Level {
                let reason = "\"level\" needs a constraint to the level or the trie".into();
                return Err(Error::InvalidField { field: "normalize", reason });
            }
            let vocab_size = self.model.spec().vocab_size;
            if beams * request.each.len().max(1) * vocab_size > MAX_UNCONSTRAINED_LOGITS {
                let max = MAX_UNCONSTRAINED_LOGITS / vocab_size;
                return Err(Error::BeamWidth { width: beams as i64, max });
            }
        }
        if request.each.len() > MAX_GROUPS {
            let reason = format!("has {} filters, at most {MAX_GROUPS} go", request.each.len());
            return Err(Error::InvalidField { field: "each", reason });
        }
        let snapshot = self.catalog.snapshot();
        let tokens = self.tokens(&request.input, &snapshot)?;
        let find = |name: &String| snapshot.find(name);
        let mut excluded: Vec<u32> = request.exclude.iter().filter_map(find).collect();
        excluded.sort_unstable();
        excluded.dedup();
        let filter = request.filter.as_deref();
        let searches = match request.each.is_empty() {
            true => vec![snapshot.legality(&excluded, filter)?],
            false => {
                let legality = |each: &String| {
                    let both = match filter {
                        Some(filter) => &Filter::both(filter, each)?,
                        None => each,
                    };
                    snapshot.legality(&excluded, Some(both))
                };
                request.each.iter().map(legality).collect::<Result<_>>()?
            }
        };
        Ok(Plan { request, snapshot, tokens, searches, normalization })
    }

    /// The tokens that the model reads for an input, with the catalog as it is now.
    ///
    /// # Errors
    /// The request's: an unknown item, a token outside the vocabulary, too few or too many.
    pub fn input_tokens(&self, input: &Input) -> Result<Vec<u32>> {
        self.tokens(input, &self.catalog.snapshot())
    }

    fn tokens(&self, input: &Input, snapshot: &Snapshot) -> Result<Vec<u32>> {
        let tokens = match input {
            Input::History(items) => self.history_tokens(items, snapshot)?,
            Input::Tokens(tokens) => tokens.clone(),
        };
        self.check_tokens(&tokens)?;
        Ok(tokens)
    }

    fn history_tokens(&self, items: &[String], snapshot: &Snapshot) -> Result<Vec<u32>> {
        let find = |item: &String| {
            let unknown = || Error::UnknownItem { item: item.clone() };
            snapshot.find(item).ok_or_else(unknown)
        };
        let items = items.iter().map(find).collect::<Result<Vec<u32>>>()?;
        if items.is_empty() {
            return Err(Error::EmptyInput);
        }
        let prompt = &self.layout.prompt;
        let newest = prompt.max_items.map_or(0, |max| items.len().saturating_sub(max));
        let mut tokens = prompt.prefix.clone();
        for (position, &item) in items[newest..].iter().enumerate() {
            if position > 0 {
                tokens.extend_from_slice(&prompt.separator);
            }
            let sid = snapshot.sid(item);
            let levels = self.layout.levels.iter().zip(sid.codes());
            // A code without a token, which the catalog refuses, would be out of the vocabulary.
            let token = |(tokens, &code): (&Vec<u32>, &u16)| {
                tokens.get(usize::from(code)).copied().unwrap_or(NO_TOKEN)
            };
            tokens.extend(levels.map(token));
        }
        tokens.extend_from_slice(&prompt.suffix);
        Ok(tokens)
    }

    fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        if tokens.is_empty() {
            return Err(Error::EmptyInput);
        }
        if tokens.len() > self.max_context {
            return Err(Error::HistoryTooLong { len: tokens.len(), max: self.max_context });
        }
        let vocab_size = self.model.spec().vocab_size;
        match tokens.iter().position(|&token| token as usize >= vocab_size) {
            Some(position) => {
                let token = u64::from(tokens[position]);
                Err(Error::TokenOutOfRange { token, position, vocab_size })
            }
            None => Ok(()),
        }
    }

    /// Runs requests through all steps together.
    fn run_wave(&self, plans: &[Plan<'_>]) -> Vec<Result<Answer>> {
        let num_steps = self.layout.levels.len() + self.layout.suffix.len();
        let spec = self.model.spec();
        let open = |plan: &Plan<'_>| {
            let spec = spec.slot(plan.tokens.len(), plan.request.beams, num_steps);
            self.backend.open_slot(&spec)
        };
        let mut slots: Vec<B::Slot> = plans.iter().map(open).collect();
        let rules: Vec<SearchRule<'_>> = plans.iter().flat_map(Plan::rules).collect();
        let tokens: Vec<u32> = plans.iter().flat_map(|plan| plan.tokens.iter().copied()).collect();
        let spare = self.scratches.lock().expect("no holder panics").pop();
        let new = || (Scratch::new(&self.backend), self.backend.logits());
        let (mut scratch, mut logits) = spare.unwrap_or_else(new);

        let (backend, model) = (&self.backend, &self.model);
        let prefill = || model.begin(backend, &tokens, &mut slots, &mut scratch);
        timed(&self.phases.prefill, prefill);
        if rules.len() > slots.len() {
            let searches: Vec<usize> = plans.iter().map(|plan| plan.searches.len()).collect();
            slots = backend.fork(slots, &searches, &mut scratch.hidden);
        }
        for step in 0..num_steps {
            if step > 0 {
                let decode = || model.decode(backend, step, &mut slots, &mut scratch);
                timed(&self.phases.decode, decode);
            }
            timed(&self.phases.search, || {
                let (hidden, head) = (&scratch.hidden, model.head());
                backend.restricted_head(hidden, head, step, &rules, &slots, &mut logits);
                backend.advance_beams(&logits, head, step, &rules, &mut slots);
            });
        }
        self.scratches.lock().expect("no holder panics").push((scratch, logits));
        let mut slots = slots.iter();
        plans.iter().map(|plan| self.answer(plan, &mut slots)).collect()
    }

    /// The answer to a request from the beams of its slots.
    fn answer<'a>(
        &self,
        plan: &Plan<'_>,
        slots: &mut impl Iterator<Item = &'a B::Slot>,
    ) -> Result<Answer> {
        let mut groups = Vec::with_capacity(plan.searches.len());
        for (legality, slot) in plan.searches.iter().zip(slots) {
            let beams = self.backend.read_beams(slot);
            groups.push(beams.map(|beams| self.items(plan, legality, &beams)));
        }
        let mut groups = groups.into_iter().collect::<Result<Vec<_>>>()?;
        let items = match plan.request.each.is_empty() {
            true => groups.pop().expect("a request without groups is one search"),
            false => Vec::new(),
        };
        Ok(Answer { items, groups, snapshot: Arc::clone(&plan.snapshot) })
    }

    /// The items that the beams name.
    fn items(&self, plan: &Plan<'_>, legality: &Legality, beams: &[Beam]) -> Vec<Recommendation> {
        let snapshot = &*plan.snapshot;
        let most = match plan.request.shared_sid {
            SharedSid::All => usize::MAX,
            SharedSid::First => 1,
        };
        let of_beam = |beam: &Beam| {
            let place = beam.place.or_else(|| self.place_of_tokens(snapshot, &beam.tokens));
            let items =
                place.into_iter().flat_map(|place| snapshot.items(place, snapshot.num_levels()));
            let allowed = items.filter(|&item| legality.allows(snapshot, item)).take(most);
            let score = beam.score;
            allowed.map(move |item| Recommendation { item, sid: snapshot.sid(item), score })
        };
        beams.iter().flat_map(of_beam).take(plan.request.top_k).collect()
    }

    /// The place that tokens of an unconstrained search name, if they name one.
    fn place_of_tokens(&self, snapshot: &Snapshot, tokens: &[u32]) -> Option<Place> {
        let code = |(codes, token): (&HashMap<u32, u16>, &u32)| codes.get(token).copied();
        let codes = self.codes.iter().zip(tokens).map(code).collect::<Option<Vec<u16>>>()?;
        snapshot.place(&codes)
    }
}

impl Plan<'_> {
    fn num_rows(&self) -> usize {
        self.request.beams * self.searches.len()
    }

    fn rules(&self) -> impl Iterator<Item = SearchRule<'_>> {
        self.searches.iter().map(|legality| SearchRule {
            snapshot: &self.snapshot,
            legality: legality.clone(),
            beams: self.request.beams,
            normalization: self.normalization,
            constraint: self.request.constraint,
            temperature: self.request.temperature,
        })
    }
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
