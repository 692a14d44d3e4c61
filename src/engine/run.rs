//! The passes of one step, on the engine's threads.

use std::sync::Arc;

use super::batch::{Pass, SubBatch, Workspace};
use super::engine::Engine;
use crate::backend::Backend;

impl<B: Backend> Engine<B> {
    /// Runs one sub-batch on all threads, or several on a thread each.
    pub(super) fn run_sub_batches(&mut self, sub_batches: &mut [SubBatch<B>]) {
        let backend = &*self.backend;
        while self.workspaces.len() < sub_batches.len() {
            let forward = Arc::clone(&self.model).new_pass(backend);
            let workspace = Workspace { forward, logits: backend.logits() };
            self.workspaces.push(workspace);
        }
        let (model, memory, phases) = (&*self.model, &self.memory, &self.phases);
        let pass = Pass { backend, model, memory, phases };
        let (running, workspaces) = (self.scheduler.running(), &mut self.workspaces);
        match sub_batches {
            [sub_batch] => self.pool.install(|| sub_batch.run(pass, running, &mut workspaces[0])),
            sub_batches => self.pool.in_place_scope(|scope| {
                for ((sub_batch, workspace), worker) in
                    sub_batches.iter_mut().zip(workspaces).zip(&self.workers)
                {
                    scope.spawn(move |_| {
                        worker.install(|| sub_batch.run(pass, running, workspace));
                    });
                }
            }),
        }
    }
}
