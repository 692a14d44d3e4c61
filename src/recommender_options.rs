//! How a recommender is opened.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::engine::EngineOptions;
use crate::error::{Error, Result};
use crate::service::BeforeStep;
use crate::tensor::Dtype;

/// How a [`Recommender`](crate::Recommender) is opened.
///
/// ```
/// use sidereal::{EngineOptions, RecommenderOptions};
///
/// let options = RecommenderOptions::new("cpu").with_threads(2).with_max_queued(256);
/// ```
#[derive(Clone)]
#[non_exhaustive]
pub struct RecommenderOptions {
    /// The device by its name: `cpu`, `cuda` (the first GPU) or `cuda:1`.
    pub device: String,
    /// Number type of products with weights; `None` for the one that suits the device and the checkpoint.
    pub dtype: Option<Dtype>,
    /// How the engine is opened.
    pub engine: EngineOptions,
    /// Requests that may wait; more are refused with [`Error::Overloaded`](crate::Error::Overloaded).
    pub max_queued: usize,
    /// How long a new request may be expected to wait for its answer; where it would be longer, it
    /// is refused with [`Error::Overloaded`](crate::Error::Overloaded). A request that nothing waits
    /// before is taken in any case. `None` for any time.
    pub max_wait: Option<Duration>,
    /// The folder of the base, where the model's folder is that of a LoRA adapter;
    /// [`Checkpoint::open`](crate::models::Checkpoint::open) says where it is looked for otherwise.
    pub base: Option<PathBuf>,
    /// Called on the engine's thread before each step with the number of steps before it: for
    /// metrics, and for tests of what happens when that thread fails.
    pub before_step: Option<Arc<dyn Fn(u64) + Send + Sync>>,
}

impl Default for RecommenderOptions {
    fn default() -> RecommenderOptions {
        RecommenderOptions::new("cpu")
    }
}

/// The most requests that a queue may be asked to hold.
const MAX_QUEUED: usize = 1 << 24;

impl RecommenderOptions {
    /// Checks the bounds of the queue.
    ///
    /// # Errors
    /// [`Error::InvalidOption`].
    pub(crate) fn check(&self) -> Result<()> {
        match self.max_queued {
            1..=MAX_QUEUED => Ok(()),
            other => {
                let reason = format!("{other} is not between 1 and {MAX_QUEUED}");
                Err(Error::InvalidOption { option: "max_queued", reason })
            }
        }
    }

    /// The defaults for a device, by its name. A name that no device has is refused when the
    /// recommender is opened.
    pub fn new(device: impl Into<String>) -> RecommenderOptions {
        let device = device.into();
        RecommenderOptions {
            engine: EngineOptions::for_device(device.parse().unwrap_or_default()),
            device,
            dtype: None,
            max_queued: 1024,
            max_wait: None,
            base: None,
            before_step: None,
        }
    }

    /// Sets [`dtype`](RecommenderOptions::dtype).
    pub fn with_dtype(mut self, dtype: Dtype) -> RecommenderOptions {
        self.dtype = Some(dtype);
        self
    }

    /// Sets the engine's [`threads`](EngineOptions::threads).
    pub fn with_threads(mut self, threads: usize) -> RecommenderOptions {
        self.engine.threads = threads;
        self
    }

    /// Sets [`engine`](RecommenderOptions::engine).
    pub fn with_engine(mut self, engine: EngineOptions) -> RecommenderOptions {
        self.engine = engine;
        self
    }

    /// Sets [`max_queued`](RecommenderOptions::max_queued).
    pub fn with_max_queued(mut self, requests: usize) -> RecommenderOptions {
        self.max_queued = requests;
        self
    }

    /// Sets [`max_wait`](RecommenderOptions::max_wait).
    pub fn with_max_wait(mut self, wait: Duration) -> RecommenderOptions {
        self.max_wait = Some(wait);
        self
    }

    /// Sets [`base`](RecommenderOptions::base).
    pub fn with_base(mut self, folder: impl Into<PathBuf>) -> RecommenderOptions {
        self.base = Some(folder.into());
        self
    }

    /// Sets [`before_step`](RecommenderOptions::before_step).
    pub fn with_before_step(
        mut self,
        before_step: impl Fn(u64) + Send + Sync + 'static,
    ) -> RecommenderOptions {
        self.before_step = Some(Arc::new(before_step) as BeforeStep);
        self
    }
}

impl fmt::Debug for RecommenderOptions {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("RecommenderOptions")
            .field("device", &self.device)
            .field("dtype", &self.dtype)
            .field("engine", &self.engine)
            .field("max_queued", &self.max_queued)
            .field("max_wait", &self.max_wait)
            .field("base", &self.base)
            .finish_non_exhaustive()
    }
}
