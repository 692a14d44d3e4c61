//! A model and a catalog on a device, for any number of callers: the one door for applications.
//!
//! A [`Recommender`] is opened by names (a folder, a catalog, a device) and owns its engine on a
//! thread of its own. It is cheap to clone and works from any thread.
//!
//! # Which calls wait
//!
//! | call | waits for |
//! | --- | --- |
//! | [`submit`](Recommender::submit), [`submit_with`](Recommender::submit_with), [`submit_all`](Recommender::submit_all) | nothing; checks the request, which takes time in proportion to the catalog where a filter is new |
//! | [`submit_deferred`](Recommender::submit_deferred) | nothing; the request is checked on the engine's thread |
//! | [`cancel`](Recommender::cancel), [`status`](Recommender::status), [`metrics`](Recommender::metrics), [`close`](Recommender::close) | nothing |
//! | [`Handle::wait`], [`recommend`](Recommender::recommend), [`recommend_all`](Recommender::recommend_all), [`rank`](Recommender::rank) | the answer, and before it room in the queue |
//! | [`replace_weights`](Recommender::replace_weights) | the new network, and the requests that run |
//! | [`check_integrity`](Recommender::check_integrity) | the step under way |
//! | [`shutdown`](Recommender::shutdown) | accepted requests, as long as it is told |
//!
//! On async workers, use the calls that do not wait and await the [`Handle`]. Changes of the
//! catalog go through a [`CatalogWriter`](crate::CatalogWriter), whose `apply` may wait for a
//! compaction; its `try_apply` does not. Its `replace_base` puts a new full catalog in place while
//! requests run.
//!
//! Callbacks run on the engine's own thread, and all requests wait for them. They may call
//! everything that does not wait; a call that waits returns [`Error::CalledFromCallback`] there.

use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use serde_json::{Value, json};

use crate::answer::Answer;
use crate::answering::{Answering, Checked, ModelKind};
use crate::backend::Backend;
use crate::catalog::Catalog;
use crate::catalog::sid::Sid;
use crate::device::{Device, WithBackend};
use crate::engine::{Engine, EngineStatus, Phases, Reply};
use crate::error::{Error, Result};
use crate::metrics::{Gauges, MetricsSnapshot};
use crate::models::Checkpoint;
use crate::models::config::{Config, SidLayout};
use crate::models::weights::Weights;
use crate::recommender_options::RecommenderOptions;
use crate::request::{Input, Request};
use crate::schedule::RequestId;
use crate::service::queue::{Bounds, PushError};
use crate::service::{Direct, Handle, Message, Reception, Service, Shared, Stepped, oneshot};
use crate::tensor::Tensor;

/// What a recommender holds, as of the end of its last step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Status {
    /// Requests that wait, in the queue or for room in the engine.
    pub queued: usize,
    /// The engine.
    pub engine: EngineStatus,
    /// Where the time went; `None` on a device, whose phases follow one another unseen.
    pub phases: Option<Phases>,
    /// Floating-point operations of all matrix products so far.
    pub matrix_flops: u64,
    /// The version of the weights.
    pub weights_version: u64,
    /// Steps so far.
    pub num_steps: u64,
}

/// A model and a catalog on a device. Clones share one engine.
///
/// ```no_run
/// use std::{path::Path, sync::Arc, time::Duration};
/// use sidereal::{Recommender, RecommenderOptions, Request, catalog::Catalog};
///
/// # fn main() -> sidereal::Result<()> {
/// let catalog = Arc::new(Catalog::open(Path::new("models/industrial/items.jsonl"))?);
/// let options = RecommenderOptions::new("cpu");
/// let recommender = Recommender::open(Path::new("models/industrial"), catalog, &options)?;
/// let mut request = Request::from_history(["168", "278"]);
/// request.deadline = Some(Duration::from_millis(100));
/// let handle = recommender.submit(request)?; // from any thread; `handle.await` works as well
/// println!("{:?}", handle.wait()?);
/// recommender.shutdown(Duration::from_secs(1))?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Recommender {
    inner: Arc<Inner>,
}

struct Inner {
    service: Service,
    answering: Answering,
    description: String,
    num_threads: usize,
    has_phases: bool,
}

/// Opens an engine on whatever backend a device has.
struct Open<'a> {
    config: &'a Config,
    weights: Weights,
    layout: SidLayout,
    catalog: Arc<Catalog>,
    options: &'a RecommenderOptions,
}

impl WithBackend for Open<'_> {
    type Output = Recommender;

    fn run<B: Backend>(self, backend: B) -> Result<Recommender> {
        let Open { config, weights, layout, catalog, options } = self;
        let engine =
            Engine::from_parts(backend, config, weights, layout, catalog, &options.engine)?;
        Recommender::from_engine(engine, options)
    }
}

impl Recommender {
    /// Opens a model folder (`config.json`, `sidereal.json`, safetensors) on the device that the
    /// options name. Where the `family` in `sidereal.json` is one that gives vectors or scores
    /// candidates, the requests of a [`Retriever`](crate::Retriever) or a
    /// [`Ranker`](crate::Ranker) are answered.
    ///
    /// # Errors
    /// The files': see [`models::load`](crate::models::load), [`SidLayout`],
    /// [`Retriever::open`](crate::Retriever::open), [`Ranker::open`](crate::Ranker::open);
    /// [`Error::LevelsMismatch`] where the catalog has codes that the model cannot write;
    /// [`Error::Device`] where this build or machine does not have the device;
    /// [`Error::InvalidOption`].
    pub fn open(
        folder: &Path,
        catalog: Arc<Catalog>,
        options: &RecommenderOptions,
    ) -> Result<Recommender> {
        options.check()?;
        if let Some((kind, reception)) = Answering::open_whole(folder, &catalog, options)? {
            return Recommender::from_whole(kind, reception, options);
        }
        let Checkpoint { config, weights, .. } = Checkpoint::open(folder, options.base.as_deref())?;
        let vocab_size = crate::models::vocab_size(&config)?;
        let layout = SidLayout::read_for(folder, vocab_size, Some(&catalog))?;
        Recommender::from_parts(&config, weights, layout, catalog, options)
    }

    /// Opens a network from its parts, wherever they come from.
    ///
    /// # Errors
    /// Those of [`Recommender::open`].
    pub fn from_parts(
        config: &Config,
        weights: Weights,
        layout: SidLayout,
        catalog: Arc<Catalog>,
        options: &RecommenderOptions,
    ) -> Result<Recommender> {
        let device: Device = options.device.parse()?;
        options.check()?;
        let dtype = options.dtype.unwrap_or_else(|| device.default_dtype(weights.dtype()));
        let work = Open { config, weights, layout, catalog, options };
        device.with_backend(Some(dtype), work)
    }

    /// Takes over an engine, on whatever backend; of the options, `max_queued`, `max_wait` and
    /// `before_step` count.
    ///
    /// # Errors
    /// [`Error::InvalidOption`]; [`Error::Device`] where no thread can be started.
    pub fn from_engine<B: Backend>(
        engine: Engine<B>,
        options: &RecommenderOptions,
    ) -> Result<Recommender> {
        options.check()?;
        let preparer = Arc::clone(engine.preparer());
        let inner = Inner {
            answering: Answering::Writer { preparer, loader: engine.loader() },
            description: engine.backend().description(),
            num_threads: engine.num_threads(),
            has_phases: B::COMPUTES_ON_CALLERS,
            service: {
                let bounds = Bounds::new(options.max_queued, options.max_wait);
                Service::start(Stepped::new(engine), bounds, options.before_step.clone())?
            },
        };
        Ok(Recommender { inner: Arc::new(inner) })
    }

    /// Takes over a network that answers whole requests.
    fn from_whole(
        kind: ModelKind,
        reception: Arc<Reception>,
        options: &RecommenderOptions,
    ) -> Result<Recommender> {
        let bounds = Bounds::new(options.max_queued, options.max_wait);
        let direct = Direct::new(Arc::clone(&reception));
        let inner = Inner {
            description: reception.network.description(),
            num_threads: reception.network.num_threads(),
            has_phases: false,
            service: Service::start(direct, bounds, options.before_step.clone())?,
            answering: Answering::Whole(kind, reception),
        };
        Ok(Recommender { inner: Arc::new(inner) })
    }

    /// What the model does.
    pub fn kind(&self) -> ModelKind {
        self.inner.answering.kind()
    }

    /// The catalog that is searched.
    pub fn catalog(&self) -> &Arc<Catalog> {
        self.inner.answering.catalog()
    }

    /// What computes, as `x86_64 f32x16`.
    pub fn description(&self) -> &str {
        &self.inner.description
    }

    /// Threads that compute.
    pub fn num_threads(&self) -> usize {
        self.inner.num_threads
    }

    /// Whether requests are taken in: the engine has not failed, and nobody has closed it.
    pub fn is_serving(&self) -> bool {
        self.shared().check_process().is_ok() && self.shared().queue.is_open()
    }

    /// The model's tokens for the codes of a semantic ID, as far as it has some.
    pub fn tokens_of(&self, sid: &Sid) -> Vec<u32> {
        self.inner.answering.tokens_of(sid)
    }

    /// The most tokens that an input may have; the items of a history that are read, where the model
    /// reads no tokens.
    pub fn max_context(&self) -> usize {
        self.inner.answering.max_context()
    }

    /// The tokens that the model reads for an input, with the catalog as it is now.
    ///
    /// # Errors
    /// The request's: an unknown item, a token outside the vocabulary, too few or too many;
    /// [`Error::Unsupported`] where the model reads no tokens.
    pub fn input_tokens(&self, input: &Input) -> Result<Vec<u32>> {
        self.inner.answering.input_tokens(input)
    }

    /// Hands over a request. It is checked here, on the caller's thread, and sees the catalog as it
    /// is now.
    ///
    /// # Errors
    /// The request's; [`Error::Overloaded`], [`Error::ShuttingDown`], [`Error::EngineFailed`],
    /// [`Error::Forked`].
    pub fn submit(&self, request: Request) -> Result<Handle> {
        let checked = self.prepare(request)?;
        let (handle, reply) = self.handle(checked.id());
        self.push(checked.with_reply(reply))?;
        Ok(handle)
    }

    /// Hands over a request whose answer goes to `callback`, on the engine's thread. The ID
    /// [cancels](Recommender::cancel) it. `callback` is called exactly once, unless this returns an
    /// error; if it panics, its own request alone is harmed.
    ///
    /// # Errors
    /// Those of [`submit`](Recommender::submit).
    pub fn submit_with(
        &self,
        request: Request,
        callback: impl FnOnce(Result<Answer>) + Send + 'static,
    ) -> Result<RequestId> {
        let checked = self.prepare(request)?;
        let id = checked.id();
        self.push(checked.with_reply(Reply::new(callback)))?;
        Ok(id)
    }

    /// Hands over several requests at once: those for which there is room, in their order.
    pub fn submit_all(&self, requests: Vec<Request>) -> Vec<Result<Handle>> {
        let mut messages = Vec::with_capacity(requests.len());
        let submit = |request| {
            let checked = self.prepare(request)?;
            let (handle, reply) = self.handle(checked.id());
            messages.push(checked.with_reply(reply));
            Ok(handle)
        };
        let mut handles: Vec<Result<Handle>> = requests.into_iter().map(submit).collect();
        if messages.is_empty() {
            return handles;
        }
        let shared = self.shared();
        let (num_refused, error): (usize, &dyn Fn() -> Error) =
            match shared.queue.push_all(messages) {
                Ok((rest, backlog)) => (rest.len(), &move || shared.overloaded(&backlog)),
                Err(all) => (all.len(), &|| shared.end()),
            };
        let refused = handles.iter_mut().rev().filter(|handle| handle.is_ok());
        refused.take(num_refused).for_each(|handle| *handle = Err(self.refused(error())));
        handles
    }

    /// Hands over a request that is checked on the engine's thread, between two steps: this call
    /// never takes long. A request whose text has to become tokens is checked here instead, as by
    /// [`submit`](Recommender::submit). The request sees the catalog as it is when it is checked.
    ///
    /// # Errors
    /// [`Error::Overloaded`], [`Error::ShuttingDown`], [`Error::EngineFailed`], [`Error::Forked`];
    /// the request's own come as the answer.
    pub fn submit_deferred(&self, request: Request) -> Result<Handle> {
        if self.inner.answering.reads_text(&request) {
            return self.submit(request); // text is never read on the engine's thread
        }
        self.shared().check_process().map_err(|error| self.refused(error))?;
        let arrival = self.inner.answering.arrival();
        let (handle, reply) = self.handle(arrival.id);
        self.push(Message::Submit(request, arrival, reply))?;
        Ok(handle)
    }

    /// Ends a request with [`Error::Cancelled`]; what it held is free at the next step. The ID of a
    /// request that was answered does nothing.
    ///
    /// # Errors
    /// [`Error::Forked`].
    pub fn cancel(&self, id: RequestId) -> Result<()> {
        self.shared().check_process()?;
        self.shared().queue.cancel(id);
        Ok(())
    }

    /// Answers one request; waits for room in the queue and for the answer.
    ///
    /// # Errors
    /// The request's; [`Error::ShuttingDown`], [`Error::EngineFailed`], [`Error::Forked`],
    /// [`Error::CalledFromCallback`].
    pub fn recommend(&self, request: &Request) -> Result<Answer> {
        self.shared().check_waiting().map_err(|error| self.refused(error))?;
        let checked = self.prepare(request.clone())?;
        let (handle, reply) = self.handle(checked.id());
        let pushed = self.shared().queue.push_wait(checked.with_reply(reply));
        pushed.map_err(|_| self.refused(self.shared().end()))?;
        handle.wait()
    }

    /// Answers many requests and hands each answer to `deliver` with the request's index, on this
    /// thread, in the order in which they finish. The engine takes them a few at a time, beside the
    /// requests of others; each sees the catalog as it is when the engine takes it.
    ///
    /// Every request is answered: where the engine ends first, with that.
    pub fn recommend_all(
        &self,
        requests: &[Request],
        mut deliver: impl FnMut(usize, Result<Answer>),
    ) {
        let answering = &self.inner.answering;
        let is_whole = answering.kind() != ModelKind::Writer;
        if is_whole || requests.iter().any(|request| answering.reads_text(request)) {
            return self.recommend_checked(requests, deliver);
        }
        let (sender, answers) = mpsc::channel();
        let mut is_answered = vec![false; requests.len()];
        let shared = self.shared();
        let pushed = shared.check_waiting().and_then(|()| {
            let message = Message::Feed(requests.to_vec(), sender);
            shared.queue.push_uncounted(message).map_err(|_| shared.end())
        });
        if pushed.is_ok() {
            for (index, answer) in answers {
                is_answered[index] = true;
                deliver(index, answer);
            }
        }
        for index in (0..requests.len()).filter(|&index| !is_answered[index]) {
            let error = match shared.check_waiting() {
                Err(error) => error,
                Ok(()) => shared.end(),
            };
            deliver(index, Err(self.refused(error)));
        }
    }

    /// Answers requests that are checked on this thread, each while the engine answers those before
    /// it: texts are, which take long.
    fn recommend_checked(
        &self,
        requests: &[Request],
        mut deliver: impl FnMut(usize, Result<Answer>),
    ) {
        let (sender, answers) = mpsc::channel();
        for (index, request) in requests.iter().enumerate() {
            let checked =
                self.shared().check_waiting().and_then(|()| self.prepare(request.clone()));
            match checked {
                Ok(checked) => {
                    let sender = sender.clone();
                    let reply = Reply::new(move |answer| drop(sender.send((index, answer))));
                    let message = checked.with_reply(reply);
                    if let Err(Message::Enqueue(_, reply) | Message::Submit(_, _, reply)) =
                        self.shared().queue.push_wait(message)
                    {
                        reply.disarm();
                        deliver(index, Err(self.refused(self.shared().end())));
                    }
                }
                Err(error) => deliver(index, Err(error)),
            }
            answers.try_iter().for_each(|(index, answer)| deliver(index, answer));
        }
        drop(sender);
        answers.into_iter().for_each(|(index, answer)| deliver(index, answer));
    }

    /// Scores given items for an input: the answer lists those that are available, best first, each
    /// with the score that a search would give it.
    ///
    /// # Errors
    /// Those of [`recommend`](Recommender::recommend); [`Error::InvalidField`] where `candidates`
    /// is empty.
    pub fn rank<S: Into<String>>(
        &self,
        input: Input,
        candidates: impl IntoIterator<Item = S>,
    ) -> Result<Answer> {
        let mut request = Request::new(input);
        request.candidates = candidates.into_iter().map(Into::into).collect();
        if request.candidates.is_empty() {
            let reason = "name the items to score".into();
            return Err(self.refused(Error::InvalidField { field: "candidates", reason }));
        }
        self.recommend(&request)
    }

    /// Puts other tensors in the place of those of the same names, and returns the version of the
    /// weights, which the answers from now on carry. The network is laid out on this thread, beside
    /// the old one, while requests are answered: it takes as much memory again meanwhile. Requests
    /// that run are then finished with the weights that they began with; contexts that were kept
    /// are dropped. The network is tried on a small request before any other request sees it.
    ///
    /// Tensors that are not replaced are read again from their files, which must be as they were.
    ///
    /// # Errors
    /// [`Error::UnexpectedTensor`], [`Error::TensorShape`], [`Error::NonFiniteWeight`];
    /// [`Error::NonFiniteModel`] where finite weights give no finite score; [`Error::FileChanged`];
    /// [`Error::Unsupported`] where the weights are random, or the model writes nothing; [`Error::ShuttingDown`],
    /// [`Error::EngineFailed`], [`Error::Forked`], [`Error::CalledFromCallback`]. The old weights
    /// stay then.
    pub fn replace_weights(
        &self,
        tensors: impl IntoIterator<Item = (String, Tensor)>,
    ) -> Result<u64> {
        self.shared().check_waiting()?;
        let loader = self.inner.answering.loader()?;
        let tensors = tensors.into_iter().collect();
        loader.replace(tensors, &mut || self.ask(Message::InstallWeights)?)
    }

    /// What waits, what runs and what is free, as the engine's thread last said: this does not wait
    /// for the step under way.
    ///
    /// # Errors
    /// [`Error::Forked`].
    pub fn status(&self) -> Result<Status> {
        self.shared().check_process()?;
        let published = self.shared().published();
        Ok(Status {
            queued: self.shared().queue.queued(),
            engine: published.engine,
            phases: self.inner.has_phases.then_some(published.phases),
            matrix_flops: published.matrix_flops,
            weights_version: published.weights_version,
            num_steps: published.num_steps,
        })
    }

    /// [`status`](Recommender::status) with the state of the catalog, as one JSON object: for doors to show.
    ///
    /// # Errors
    /// [`Error::Forked`].
    pub fn status_as_json(&self) -> Result<Value> {
        let status = self.status()?;
        let snapshot = self.catalog().snapshot();
        let watermarks: Vec<_> = snapshot.watermarks().iter().collect();
        Ok(json!({
            "is_serving": self.is_serving(),
            "computes_on": self.description(),
            "threads": self.num_threads(),
            "max_context": self.max_context(),
            "queued": status.queued,
            "running": status.engine.running,
            "context_pages": status.engine.context_pages,
            "free_context_pages": status.engine.free_context_pages,
            "cached_context_pages": status.engine.cached_context_pages,
            "weights_version": status.weights_version,
            "steps": status.num_steps,
            "items": snapshot.num_items(),
            "snapshot": snapshot.number(),
            "watermarks": watermarks,
        }))
    }

    /// What the engine counted since it was opened, and what it held at the end of its last step:
    /// for doors to export, as [Prometheus text](MetricsSnapshot::to_prometheus) for example. This
    /// does not wait for the step under way.
    ///
    /// # Errors
    /// [`Error::Forked`].
    pub fn metrics(&self) -> Result<MetricsSnapshot> {
        let Status { queued, engine, weights_version, .. } = self.status()?;
        let gauges = engine.gauges(self.catalog(), weights_version);
        let gauges = Gauges { waiting: queued as u64, ..gauges };
        Ok(self.inner.answering.metrics().snapshot(gauges))
    }

    /// Checks that every page of memory is in exactly one place: free, or held by those who share
    /// it. For tests and for operators who suspect a leak; it takes time in proportion to the pages.
    ///
    /// # Errors
    /// [`Error::EngineFailed`] with what is wrong; [`Error::ShuttingDown`], [`Error::Forked`],
    /// [`Error::CalledFromCallback`].
    pub fn check_integrity(&self) -> Result<()> {
        self.shared().check_waiting()?;
        self.ask(Message::CheckIntegrity)?
    }

    /// Takes no more requests; those that were accepted are answered.
    ///
    /// # Errors
    /// [`Error::Forked`].
    pub fn close(&self) -> Result<()> {
        self.shared().check_process()?;
        self.shared().queue.close();
        Ok(())
    }

    /// Takes no more requests, and waits until those that were accepted are answered; those that
    /// take longer than `within` are answered with [`Error::ShuttingDown`]. Called by a callback it
    /// does not wait. Dropping the last clone shuts down at once.
    ///
    /// # Errors
    /// [`Error::Forked`].
    pub fn shutdown(&self, within: Duration) -> Result<()> {
        self.inner.service.shutdown(within)
    }

    fn shared(&self) -> &Arc<Shared> {
        self.inner.service.shared()
    }

    fn prepare(&self, request: Request) -> Result<Checked> {
        self.shared().check_process().map_err(|error| self.refused(error))?;
        self.inner.answering.prepare(request)
    }

    /// Counts a request that was refused before the engine had it.
    fn refused(&self, error: Error) -> Error {
        self.inner.answering.metrics().request_refused(&error);
        error
    }

    /// A handle, and the reply that answers it.
    fn handle(&self, id: RequestId) -> (Handle, Reply) {
        let (sender, receiver) = oneshot::channel();
        let shared = Arc::clone(self.shared());
        (Handle::new(id, receiver, shared), Reply::new(|answer| sender.send(answer)))
    }

    fn push(&self, message: Message) -> Result<()> {
        let shared = self.shared();
        let (message, error) = match shared.queue.push(message) {
            Ok(()) => return Ok(()),
            Err(PushError::Full { entry, backlog }) => (entry, shared.overloaded(&backlog)),
            Err(PushError::Closed(entry)) => (entry, shared.end()),
        };
        if let Message::Enqueue(_, reply) | Message::Submit(_, _, reply) = message {
            reply.disarm();
        }
        Err(self.refused(error))
    }

    /// Asks the engine's thread for something and waits for it.
    fn ask<T>(&self, message: impl FnOnce(oneshot::Sender<T>) -> Message) -> Result<T> {
        let (sender, receiver) = oneshot::channel();
        let shared = self.shared();
        shared.queue.push_uncounted(message(sender)).map_err(|_| shared.end())?;
        receiver.wait().ok_or_else(|| shared.end())
    }
}
