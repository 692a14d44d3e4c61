//! Histories become query vectors.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use crate::backend::{Backend, Batch, MemorySpec, SlotSpec};
use crate::error::Result;
use crate::models::{Activations, Events, VectorModel, VectorPrompt, VectorSpec};
use crate::pages::PAGE_LEN;

/// Histories that a pass reads at most.
const HISTORIES_PER_PASS: usize = 32;

/// A network that gives vectors, on whatever device.
pub(super) trait Encode: Send + Sync {
    /// What the network is.
    fn spec(&self) -> &VectorSpec;

    /// What the network reads of a history.
    ///
    /// # Errors
    /// Those of [`VectorNetwork::prompt`](crate::models::VectorNetwork::prompt).
    fn prompt(&self, events: &Events<'_>) -> Result<VectorPrompt>;

    /// The query vectors of some prompts, `[prompts, columns]`; their numbers may be infinite or NaN.
    ///
    /// # Errors
    /// The device's own.
    fn encode(&self, prompts: &[VectorPrompt]) -> Result<Vec<f32>>;

    /// What computes.
    fn description(&self) -> String;

    /// Floating-point operations of all matrix products so far.
    fn matrix_flops(&self) -> u64;
}

/// A network with memory for its passes.
pub(super) struct Encoder<B: Backend> {
    backend: B,
    model: VectorModel<B>,
    /// Those that no pass uses now.
    workspaces: Mutex<Vec<Workspace<B>>>,
}

/// What a pass needs beside the weights.
struct Workspace<B: Backend> {
    memory: B::Memory,
    activations: Activations<B>,
}

impl<B: Backend> Encoder<B> {
    /// Takes a network over.
    ///
    /// # Errors
    /// The device's.
    pub fn new(backend: B, model: VectorModel<B>) -> Result<Encoder<B>> {
        let encoder = Encoder { backend, model, workspaces: Mutex::default() };
        let first = encoder.new_workspace()?;
        encoder.workspaces().push(first);
        Ok(encoder)
    }

    fn workspaces(&self) -> std::sync::MutexGuard<'_, Vec<Workspace<B>>> {
        self.workspaces.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pages of a prompt. A network without keys and values needs none.
    fn pages(&self, len: usize) -> usize {
        match self.spec().kv.context_sets {
            0 => 0,
            _ => len.div_ceil(PAGE_LEN),
        }
    }

    fn new_workspace(&self) -> Result<Workspace<B>> {
        let most = self.spec().max_tokens;
        let memory = self.backend.memory(&MemorySpec {
            kv: self.spec().kv,
            context_pages: HISTORIES_PER_PASS * self.pages(most),
            tail_pages: 0,
            rows_per_step: HISTORIES_PER_PASS,
            tokens_per_step: HISTORIES_PER_PASS * most,
        })?;
        Ok(Workspace { memory, activations: Activations::new(&self.backend) })
    }

    /// One pass over at most [`HISTORIES_PER_PASS`] prompts.
    fn pass(&self, prompts: &[VectorPrompt], workspace: &mut Workspace<B>) -> Result<Vec<f32>> {
        let mut next_page = 0;
        let slots = prompts.iter().map(|prompt| {
            let first = next_page;
            next_page += self.pages(prompt.tokens.len()) as u32;
            self.backend.open_slot(SlotSpec {
                context_pages: (first..next_page).collect(),
                context_len: prompt.tokens.len(),
                tail_pages: Vec::new(),
                num_steps: 0,
                start_token: 0,
            })
        });
        let mut slots = slots.collect::<Result<Vec<_>>>()?;
        let chunks: Vec<Range<usize>> =
            prompts.iter().map(|prompt| 0..prompt.tokens.len()).collect();
        let mut batch = Batch::new(&workspace.memory, &chunks, &mut slots);
        let activations = &mut workspace.activations;
        self.model.network.forward(&self.backend, prompts, &mut batch, activations);
        self.backend.take_failure()?;
        self.backend.download(activations.output())
    }
}

impl<B: Backend> Encode for Encoder<B> {
    fn spec(&self) -> &VectorSpec {
        self.model.network.spec()
    }

    fn prompt(&self, events: &Events<'_>) -> Result<VectorPrompt> {
        self.model.network.prompt(events)
    }

    fn encode(&self, prompts: &[VectorPrompt]) -> Result<Vec<f32>> {
        let waiting = self.workspaces().pop();
        let mut workspace = match waiting {
            Some(workspace) => workspace,
            None => self.new_workspace()?,
        };
        let mut vectors = Vec::with_capacity(prompts.len() * self.spec().columns);
        for prompts in prompts.chunks(HISTORIES_PER_PASS) {
            vectors.extend(self.pass(prompts, &mut workspace)?);
        }
        self.workspaces().push(workspace);
        Ok(vectors)
    }

    fn description(&self) -> String {
        self.backend.description()
    }

    fn matrix_flops(&self) -> u64 {
        self.backend.matrix_flops()
    }
}
