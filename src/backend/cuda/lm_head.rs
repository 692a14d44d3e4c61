//! The output head: products, and `lm_head.cu` for the normalisers of its rows.

use std::sync::Arc;

use super::device::Device;
use super::device_memory::DeviceMemory;
use super::driver::{Driver, Product};
use super::metadata::BatchParams;
use super::rules::{self, Layout, MAX_PARTS, Plan};
use super::shared::shared_struct;
use super::{Buffer, CudaBackend, Head, Slot};
use crate::backend::{LmHead, SearchRule};
use crate::tensor::Dtype;

/// Tokens of the vocabulary that are evaluated together where scores are normalised over all.
const VOCABULARY_CHUNK: usize = 8192;

/// The logits of a step, what rows are normalised by, and what the choice of beams keeps meanwhile.
pub struct Logits<D: Driver> {
    pub(super) plan: Option<Plan>,
    values: DeviceMemory<D>,
    chunk: DeviceMemory<D>,
    pub(super) vocabulary_sums: DeviceMemory<D>,
    pub(super) level_sums: DeviceMemory<D>,
    pub(super) child_sums: DeviceMemory<D>,
    pub(super) greatest: DeviceMemory<D>,
    pub(super) offsets: DeviceMemory<D>,
    pub(super) failures: DeviceMemory<D>,
    pub(super) keys: DeviceMemory<D>,
    pub(super) num_keys: DeviceMemory<D>,
}

impl<D: Driver> Logits<D> {
    pub(super) fn new(device: &Arc<Device<D>>) -> Logits<D> {
        let none = |name| DeviceMemory::none(device, name);
        Logits {
            plan: None,
            values: none("logits"),
            chunk: none("logits of the vocabulary"),
            vocabulary_sums: none("sums over the vocabulary"),
            level_sums: none("sums over levels"),
            child_sums: none("sums over children"),
            greatest: none("greatest noise"),
            offsets: none("offsets of continuations"),
            failures: none("failures of a step"),
            keys: none("keys"),
            num_keys: none("numbers of keys"),
        }
    }

    /// Takes the memory that a step of so many rows and searches needs, whatever its scores.
    pub(super) fn reserve(&mut self, plan: &Plan, num_rows: usize, num_searches: usize) {
        self.values.reserve(num_rows * plan.stride * size_of::<f32>());
        self.chunk.reserve(num_rows * VOCABULARY_CHUNK * size_of::<f32>());
        let sums = num_rows * size_of::<[f32; 2]>();
        self.vocabulary_sums.reserve(sums);
        self.level_sums.reserve(sums);
        self.child_sums.reserve(sums);
        self.greatest.reserve(num_rows * size_of::<f64>());
        self.offsets.reserve((num_rows + num_searches + 1) * size_of::<u32>());
        self.failures.reserve(num_searches * size_of::<u32>());
        self.keys.reserve(MAX_PARTS * plan.num_keys.max(num_rows) * size_of::<u64>());
        self.num_keys.reserve(MAX_PARTS * num_searches * size_of::<u32>());
    }

    pub(super) fn address(&self) -> u64 {
        self.values.at(0)
    }
}

shared_struct! {
    /// Sums of exponentials of logits.
    struct Params = "lm_head::Params" {
        /// `[rows, stride]`, of a stretch of the vocabulary; those of levels are the rules' own.
        logits: u64 = "const float*",
        /// By row: what `log_sum` makes the log of.
        sums: u64 = "float2*",
        /// By slot.
        rules: u64 = "const Rule*",
        batch: BatchParams,
        /// Columns.
        width: u32,
        stride: u32,
        is_level: u32,
        /// Zero where earlier columns were summed already.
        is_first: u32,
        /// Of a stretch of the vocabulary.
        first_token: u32,
        padding: u32,
    }
}

impl<D: Driver> LmHead for CudaBackend<D> {
    fn lm_head(
        &self,
        hidden: &Buffer<D>,
        head: &Head<D>,
        rules: &[SearchRule<'_>],
        slots: &[Slot<D>],
        out: &mut Logits<D>,
    ) {
        assert_eq!(rules.len(), slots.len(), "a rule for each slot");
        let state = &mut *self.state();
        let metadata = self.metadata(state, &[], slots);
        assert_eq!(hidden.rows, metadata.batch.num_rows as usize, "a row for each beam");
        let plan = match &state.prepared {
            Some((_, plan)) => plan.clone(),
            None => {
                let layout = Layout::new(head, rules, slots, false);
                let uploads = &mut state.uploads;
                let plan = rules::plan(&self.device, uploads, head, rules, slots, &layout, false);
                let least = state.rows_of_a_step;
                out.reserve(&plan, hidden.rows.max(least), slots.len().max(least));
                let memory = &mut state.rule_memory;
                let (rows, logits) = (&layout.first_rows, out.address());
                rules::write(memory, head, rules, slots, rows, &plan, logits, slots.len());
                plan
            }
        };
        let size = self.dtype.size();
        let product = |x_row: usize, rows: usize, first_token: usize, columns: usize| Product {
            x: hidden.memory.address_at(x_row * hidden.columns * size),
            weight: head.weight.memory.address_at(first_token * hidden.columns * size),
            bias: None,
            out: out.values.address(),
            rows,
            columns,
            inner: hidden.columns,
            stride: columns,
            dtype: self.dtype,
            out_dtype: Dtype::F32,
            adds: false,
            activation: None,
        };
        for run in &plan.runs {
            let at = run.rows.start * plan.stride * size_of::<f32>();
            self.multiply(&Product {
                out: out.values.address_at(at),
                stride: plan.stride,
                ..product(run.rows.start, run.rows.len(), run.span.start, run.span.len())
            });
        }
        let params = Params {
            logits: out.chunk.at(0),
            sums: out.vocabulary_sums.at(0),
            rules: state.rule_memory.at(0),
            batch: metadata.batch,
            width: 0,
            stride: 0,
            is_level: 0,
            is_first: 1,
            first_token: 0,
            padding: 0,
        };
        let launch = |params: &Params| {
            self.device.launch("lm_head_sums", [hidden.rows, 1, 1], 256, 0, params);
        };
        if plan.needs_vocabulary {
            for first in (0..head.vocab_size()).step_by(VOCABULARY_CHUNK) {
                let columns = VOCABULARY_CHUNK.min(head.vocab_size() - first);
                self.multiply(&Product {
                    out: out.chunk.address(),
                    ..product(0, hidden.rows, first, columns)
                });
                let (width, is_first) = (columns as u32, u32::from(first == 0));
                let first_token = first as u32;
                launch(&Params { width, stride: width, is_first, first_token, ..params });
            }
        }
        // Logits of named tokens are there only now.
        if plan.needs_level {
            launch(&Params { sums: out.level_sums.at(0), is_level: 1, ..params });
        }
        out.plan = Some(plan);
    }
}
