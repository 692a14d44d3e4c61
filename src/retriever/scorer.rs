//! Candidates become scores.

use std::sync::{Mutex, PoisonError};

use crate::backend::{Backend, MemorySpec};
use crate::error::Result;
use crate::models::{Activations, ROWS_PER_PASS, ScoreModel, ScoreRequest, ScoreSpec};
use crate::pages::PAGE_LEN;

/// A network that scores candidates, on whatever device.
pub(super) trait Score: Send + Sync {
    /// What the network is.
    fn spec(&self) -> &ScoreSpec;

    /// The scores of a request, `[candidates, tasks]`.
    ///
    /// # Errors
    /// Those of [`ScoreNetwork::score`](crate::models::ScoreNetwork::score).
    fn score(&self, request: &ScoreRequest<'_>) -> Result<Vec<f32>>;

    /// What computes.
    fn description(&self) -> String;

    /// Floating-point operations of all matrix products so far.
    fn matrix_flops(&self) -> u64;
}

/// A network with memory for its passes.
pub(super) struct Scorer<B: Backend> {
    backend: B,
    model: ScoreModel<B>,
    /// Those that no request uses now.
    workspaces: Mutex<Vec<Workspace<B>>>,
}

/// What a request needs beside the weights.
struct Workspace<B: Backend> {
    memory: B::Memory,
    activations: Activations<B>,
}

impl<B: Backend> Scorer<B> {
    /// Takes a network over.
    ///
    /// # Errors
    /// The device's.
    pub fn new(backend: B, model: ScoreModel<B>) -> Result<Scorer<B>> {
        let scorer = Scorer { backend, model, workspaces: Mutex::default() };
        let first = scorer.new_workspace()?;
        scorer.workspaces().push(first);
        Ok(scorer)
    }

    fn workspaces(&self) -> std::sync::MutexGuard<'_, Vec<Workspace<B>>> {
        self.workspaces.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn new_workspace(&self) -> Result<Workspace<B>> {
        let spec = self.model.spec();
        let memory = self.backend.memory(&MemorySpec {
            kv: spec.kv,
            context_pages: (spec.max_context + ROWS_PER_PASS).div_ceil(PAGE_LEN),
            tail_pages: 0,
            rows_per_step: 1,
            tokens_per_step: spec.max_context.max(ROWS_PER_PASS),
        })?;
        Ok(Workspace { memory, activations: Activations::new(&self.backend) })
    }
}

impl<B: Backend> Score for Scorer<B> {
    fn spec(&self) -> &ScoreSpec {
        self.model.spec()
    }

    fn score(&self, request: &ScoreRequest<'_>) -> Result<Vec<f32>> {
        let waiting = self.workspaces().pop();
        let mut workspace = match waiting {
            Some(workspace) => workspace,
            None => self.new_workspace()?,
        };
        let Workspace { memory, activations } = &mut workspace;
        let scores = self.model.score(&self.backend, memory, request, activations);
        self.workspaces().push(workspace);
        scores
    }

    fn description(&self) -> String {
        self.backend.description()
    }

    fn matrix_flops(&self) -> u64 {
        self.backend.matrix_flops()
    }
}
