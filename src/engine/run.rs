//! The passes of one step, on the engine's threads.

use std::sync::Arc;

use super::batch::{Pass, SubBatch, Workspace, timed};
use super::engine::Engine;
use super::scheduler::Scheduled;
use crate::backend::Backend;
use crate::schedule::RequestId;

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
            [] => {}
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

    /// Reads pieces of prompts that an encoder reads in several steps, on all threads. What a prompt
    /// needs from piece to piece is in a pass of its own.
    pub(super) fn encode_pieces(&mut self, scheduled: &[Scheduled]) {
        let backend = &*self.backend;
        for Scheduled { request, chunk, pieces, .. } in scheduled {
            let Some(pieces) = pieces.clone() else { continue };
            let id = self.scheduler.running()[*request].prepared.id();
            let slot = self.scheduler.slots_mut(*request)[0].take();
            let mut slots = [slot.expect("no sub-batch has it")];
            let tokens = self.scheduler.running()[*request].prepared.tokens();
            let encoding = self.encodings.entry(id);
            let encoding = encoding.or_insert_with(|| Arc::clone(&self.model).new_pass(backend));
            let memory = &self.memory;
            timed(&self.phases.prefill, || {
                self.pool.install(|| {
                    encoding.encode(backend, &tokens[chunk.clone()], memory, &mut slots, pieces);
                });
            });
            self.scheduler.slots_mut(*request)[0] = slots.into_iter().next();
        }
        // Whoever is at its end, or has ended, needs nothing more.
        let is_reading = |id: &RequestId| {
            self.scheduler
                .running()
                .iter()
                .any(|running| running.prepared.id() == *id && running.num_unread() > 0)
        };
        self.encodings.retain(|id, _| is_reading(id));
    }
}
