//! Recommenders: opened, asked, closed.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use engine::catalog::Catalog;
use engine::{
    CatalogWriter, Dtype, Durability, Error, Handle, Recommender as Engine, RecommenderOptions,
    Request, Result, WriterOptions,
};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use pythonize::pythonize;

use crate::answer::Answer;
use crate::catalog;
use crate::delivery::deliver;
use crate::error::{Raise, exception, invalid, raised};
use crate::request;
use crate::weights::tensor;

/// Between two looks for signals.
const PATIENCE: Duration = Duration::from_millis(50);

/// A model and a catalog on a device, until it is closed.
#[pyclass(frozen, module = "sidereal._sidereal")]
pub struct Recommender {
    opened: Mutex<Option<Arc<Opened>>>,
}

struct Opened {
    engine: Engine,
    /// `None` where the catalog was opened for reading alone.
    writer: Option<CatalogWriter>,
}

/// How a recommender is opened.
struct OpenOptions {
    model: PathBuf,
    catalog: Option<PathBuf>,
    read_only: bool,
    machine_durability: bool,
    engine: RecommenderOptions,
}

impl OpenOptions {
    fn open(self) -> Result<Opened> {
        let path = match self.catalog {
            Some(path) => path,
            None => Catalog::beside(&self.model)?,
        };
        let (catalog, writer) = if self.read_only {
            (Arc::new(Catalog::open(&path)?), None)
        } else {
            let durability = match self.machine_durability {
                true => Durability::Machine,
                false => Durability::Process,
            };
            let options = WriterOptions::default().with_durability(durability);
            let writer = CatalogWriter::open_any(&path, &options)?;
            (Arc::clone(writer.catalog()), Some(writer))
        };
        Ok(Opened { engine: Engine::open(&self.model, catalog, &self.engine)?, writer })
    }
}

impl Opened {
    fn writer(&self) -> Result<&CatalogWriter> {
        self.writer.as_ref().ok_or_else(catalog::read_only)
    }

    /// Hands a request over. Where there is no room, waits for some.
    fn submit(&self, py: Python<'_>, request: Request) -> PyResult<Handle> {
        loop {
            match py.detach(|| self.engine.submit(request.clone())) {
                Err(error) if is_full(&error) => {
                    py.detach(|| std::thread::sleep(Duration::from_millis(1)));
                    py.check_signals()?;
                }
                submitted => return submitted.raise(py),
            }
        }
    }
}

/// Whether an error says that a queue is full, rather than that the wait would be too long.
fn is_full(error: &Error) -> bool {
    matches!(error, Error::Overloaded { queued, limit, .. } if queued >= limit)
}

/// Waits for an answer, while other threads of Python run; a signal ends the wait and the request.
fn wait(py: Python<'_>, handle: &mut Handle) -> PyResult<Result<engine::Answer>> {
    loop {
        if let Some(answer) = py.detach(|| handle.wait_for(PATIENCE)) {
            return Ok(answer);
        }
        py.check_signals()?;
    }
}

impl Recommender {
    fn opened(&self, py: Python<'_>) -> PyResult<Arc<Opened>> {
        let opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        opened.clone().ok_or(Error::ShuttingDown).raise(py)
    }
}

fn dtype(name: &str) -> Result<Dtype> {
    match name {
        "f32" => Ok(Dtype::F32),
        "bf16" => Ok(Dtype::Bf16),
        "int8" => Ok(Dtype::Int8),
        other => Err(invalid("dtype", format!("{other:?} is none of \"f32\", \"bf16\", \"int8\""))),
    }
}

#[pymethods]
impl Recommender {
    #[staticmethod]
    #[pyo3(signature = (model, catalog, *, device, dtype, threads, max_context, context_tokens,
        max_queued, max_wait, base, read_only, machine_durability))]
    #[expect(clippy::too_many_arguments, reason = "by name, from the Python half")]
    fn open(
        py: Python<'_>,
        model: PathBuf,
        catalog: Option<PathBuf>,
        device: &str,
        dtype: Option<&str>,
        threads: usize,
        max_context: Option<usize>,
        context_tokens: Option<usize>,
        max_queued: Option<usize>,
        max_wait: Option<f64>,
        base: Option<PathBuf>,
        read_only: bool,
        machine_durability: bool,
    ) -> PyResult<Recommender> {
        let mut options = RecommenderOptions::new(device).with_threads(threads);
        options.dtype = dtype.map(self::dtype).transpose().raise(py)?;
        options.base = base;
        if let Some(tokens) = max_context {
            options.engine.max_context = tokens;
        }
        if let Some(tokens) = context_tokens {
            options.engine.context_tokens = tokens;
        }
        if let Some(requests) = max_queued {
            options.max_queued = requests;
        }
        if let Some(seconds) = max_wait {
            let wait = Duration::try_from_secs_f64(seconds);
            let wait =
                wait.map_err(|_| invalid("max_wait", format!("{seconds} is no number of seconds")));
            options.max_wait = Some(wait.raise(py)?);
        }
        let engine = options;
        let options = OpenOptions { model, catalog, read_only, machine_durability, engine };
        let opened = py.detach(|| options.open()).raise(py)?;
        Ok(Recommender { opened: Mutex::new(Some(Arc::new(opened))) })
    }

    /// Answers a request, given by its fields, and waits for the answer.
    fn recommend(&self, fields: &Bound<'_, PyDict>) -> PyResult<Answer> {
        let py = fields.py();
        let opened = self.opened(py)?;
        let mut handle = opened.submit(py, request::read(fields)?)?;
        wait(py, &mut handle)?.raise(py).map(Answer::new)
    }

    /// Answers many requests, each in its place: an answer or an exception.
    fn recommend_batch<'py>(
        &self,
        py: Python<'py>,
        requests: Vec<Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyList>> {
        let opened = self.opened(py)?;
        let results = PyList::empty(py);
        let mut running: VecDeque<Result<Handle>> = VecDeque::new();
        let collect = |handle: Option<Result<Handle>>| -> PyResult<()> {
            let answer = match handle {
                None => return Ok(()),
                Some(Err(error)) => Err(error),
                Some(Ok(mut handle)) => wait(py, &mut handle)?,
            };
            match answer {
                Ok(answer) => results.append(Py::new(py, Answer::new(answer))?),
                Err(error) => results.append(exception(py, &error)?),
            }
        };
        let mut failed: Vec<(usize, PyErr)> = Vec::new();
        for (index, fields) in requests.iter().enumerate() {
            let request = match request::read(fields) {
                Ok(request) => request,
                Err(error) => {
                    failed.push((index, error));
                    continue;
                }
            };
            loop {
                match py.detach(|| opened.engine.submit(request.clone())) {
                    Err(error) if is_full(&error) && !running.is_empty() => {
                        collect(running.pop_front())?;
                    }
                    submitted => break running.push_back(submitted),
                }
            }
        }
        while !running.is_empty() {
            collect(running.pop_front())?;
        }
        for (index, error) in failed {
            results.insert(index, error.into_value(py))?;
        }
        Ok(results)
    }

    /// Hands a request over whose answer, or exception, goes to `callback` on another thread. Returns
    /// the request's name, for `cancel`.
    fn submit_with(&self, fields: &Bound<'_, PyDict>, callback: Py<PyAny>) -> PyResult<u64> {
        let py = fields.py();
        let (opened, request) = (self.opened(py)?, request::read(fields)?);
        let deliver = move |answer| deliver(callback, answer);
        py.detach(|| opened.engine.submit_with(request, deliver)).raise(py)
    }

    /// Ends a request by its name.
    fn cancel(&self, py: Python<'_>, request: u64) -> PyResult<()> {
        self.opened(py)?.engine.cancel(request).raise(py)
    }

    /// Puts other tensors, `(name, type, shape, bytes)`, in the place of those of the same names.
    fn update_weights(
        &self,
        py: Python<'_>,
        tensors: Vec<(String, String, Vec<usize>, Vec<u8>)>,
    ) -> PyResult<u64> {
        let opened = self.opened(py)?;
        let replace = || {
            let read = |(name, dtype, shape, bytes): &(String, String, Vec<usize>, Vec<u8>)| {
                Ok((name.clone(), tensor(name, dtype, shape, bytes)?))
            };
            let tensors: Vec<_> = tensors.iter().map(read).collect::<Result<_>>()?;
            opened.engine.replace_weights(tensors)
        };
        py.detach(replace).raise(py)
    }

    /// Applies a batch of changes. Returns the snapshot, and whether the catalog had them before.
    fn change(&self, batch: &Bound<'_, PyDict>) -> PyResult<(u64, bool)> {
        let py = batch.py();
        let (opened, json) = (self.opened(py)?, request::to_json(batch)?.to_string());
        py.detach(|| catalog::apply(opened.writer()?, &json)).raise(py)
    }

    /// Puts a full catalog in the place of the one that is searched.
    fn replace_catalog(&self, py: Python<'_>, path: PathBuf) -> PyResult<u64> {
        let opened = self.opened(py)?;
        py.detach(|| catalog::replace(opened.writer()?, &path)).raise(py)
    }

    /// Waits until the disk has every change so far.
    fn sync(&self, py: Python<'_>) -> PyResult<()> {
        let opened = self.opened(py)?;
        py.detach(|| opened.writer()?.sync()).raise(py)
    }

    /// Whether the catalog has an item of this name.
    fn has_item(&self, py: Python<'_>, name: &str) -> PyResult<bool> {
        Ok(self.opened(py)?.engine.catalog().snapshot().find(name).is_some())
    }

    /// What waits, what runs and what is free.
    fn status<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let status = self.opened(py)?.engine.status_as_json().raise(py)?;
        Ok(pythonize(py, &status)?)
    }

    /// Counters and histograms as Prometheus' text.
    fn metrics(&self, py: Python<'_>) -> PyResult<String> {
        Ok(self.opened(py)?.engine.metrics().raise(py)?.to_prometheus())
    }

    /// Takes no more requests, and waits until those that run are answered, at most so many seconds.
    fn close(&self, py: Python<'_>, within: f64) -> PyResult<()> {
        let within = Duration::try_from_secs_f64(within)
            .map_err(|_| raised(py, &invalid("within", "name a number of seconds")))?;
        let opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(opened) = opened else { return Ok(()) };
        py.detach(move || {
            let ended = opened.engine.shutdown(within);
            drop(opened);
            ended
        })
        .raise(py)
    }

    /// Whether it was closed.
    #[getter]
    fn is_closed(&self) -> bool {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }
}
