//! The network's weights: loaded when the engine is opened, replaced while it goes on.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rayon::ThreadPool;

use crate::backend::Backend;
use crate::error::Result;
use crate::models::config::{Config, SidLayout};
use crate::models::weights::Weights;
use crate::models::{self, Model};
use crate::tensor::Tensor;

/// Lays out a network on a device, beside the one that an engine steps.
pub(super) struct Loader<B: Backend> {
    backend: Arc<B>,
    pool: Arc<ThreadPool>,
    config: Config,
    layout: SidLayout,
    /// As they came, of which some may be replaced. Held as long as a replacement takes.
    weights: Mutex<Weights>,
    /// Laid out, and not yet taken by the engine.
    loaded: Mutex<Option<Arc<dyn Model<B>>>>,
}

impl<B: Backend> Loader<B> {
    pub fn new(
        backend: Arc<B>,
        pool: Arc<ThreadPool>,
        config: &Config,
        weights: Weights,
        layout: SidLayout,
    ) -> Loader<B> {
        let (weights, loaded) = (Mutex::new(weights), Mutex::new(None));
        Loader { backend, pool, config: config.clone(), layout, weights, loaded }
    }

    /// The network with the weights as they came.
    ///
    /// # Errors
    /// Those of [`models::load`].
    pub fn load(&self) -> Result<Arc<dyn Model<B>>> {
        let weights = self.lock_weights().clone();
        self.lay_out(weights)
    }

    /// The network that was laid out last, once.
    pub fn take(&self) -> Option<Arc<dyn Model<B>>> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The weights as they came. They change at the very end of a replacement, so a panic before it
    /// leaves them whole.
    fn lock_weights(&self) -> MutexGuard<'_, Weights> {
        self.weights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lay_out(&self, weights: Weights) -> Result<Arc<dyn Model<B>>> {
        let load = || models::load(&*self.backend, &self.config, weights, &self.layout);
        self.pool.install(load)
    }
}

/// Replaces weights, whatever the device.
pub(crate) trait ReplaceWeights: Send + Sync {
    /// Lays out the network with other tensors in the place of those of the same names; `install`
    /// then has the engine take it, and returns the version.
    ///
    /// # Errors
    /// Those of the tensors and of `install`; the old weights stay then.
    fn replace(
        &self,
        tensors: Vec<(String, Tensor)>,
        install: &mut dyn FnMut() -> Result<u64>,
    ) -> Result<u64>;
}

impl<B: Backend> ReplaceWeights for Loader<B> {
    fn replace(
        &self,
        tensors: Vec<(String, Tensor)>,
        install: &mut dyn FnMut() -> Result<u64>,
    ) -> Result<u64> {
        let mut own = self.lock_weights();
        let mut weights = own.clone();
        weights.replace(tensors)?;
        let model = self.lay_out(weights.clone())?;
        *self.loaded.lock().unwrap_or_else(PoisonError::into_inner) = Some(model);
        let version = install();
        if version.is_err() {
            self.take();
            return version;
        }
        *own = weights;
        version
    }
}
