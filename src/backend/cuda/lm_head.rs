//! The output head: products, and `lm_head.cu` for the normalisers of its rows.

use super::backend::CudaBackend;
use super::buffer::Buffer;
use super::driver::{Driver, Product};
use super::head::Head;
use super::logits::{Logits, VOCABULARY_STRETCH, vocabulary_columns};
use super::metadata::BatchParams;
use super::shared::shared_struct;
use crate::backend::{Batch, LmHead, SearchRule};
use crate::tensor::Dtype;

shared_struct! {
    /// Sums of exponentials of logits.
    struct Params = "lm_head::Params" {
        /// `[rows, stride]`, of stretches of the vocabulary; those of levels are the rules' own.
        logits: u64 = "const float*",
        /// By row: what `log_sum` makes the log of.
        sums: u64 = "float2*",
        /// `[rows, num_stretches]`: those of the vocabulary, to be joined.
        parts: u64 = "float2*",
        /// By slot.
        rules: u64 = "const Rule*",
        batch: BatchParams,
        stride: u32,
        is_level: u32,
        /// The token of the first column of `logits`: where a stretch begins.
        first_token: u32,
        num_stretches: u32,
    }
}

const THREADS: u32 = 256;
const WARP_SIZE: usize = 32;

impl<D: Driver> LmHead for CudaBackend<D> {
    fn lm_head(
        &self,
        hidden: &Buffer<D>,
        head: &Head<D>,
        rules: &[SearchRule<'_>],
        batch: &mut Batch<'_, CudaBackend<D>>,
        out: &mut Logits<D>,
    ) {
        assert_eq!(rules.len(), batch.slots.len(), "a rule for each slot");
        if !self.is_step_planned(batch) {
            self.plan_step(batch, head, rules, out, false);
        }
        let step = batch.pass.step().expect("just planned");
        let plan = &step.plan;
        let (metadata, scratch) = self.enter(batch);
        assert_eq!(hidden.rows, metadata.batch.num_rows as usize, "a row for each beam");
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
            parts: out.vocabulary_parts.at(0),
            rules: scratch.rules.at(0),
            batch: metadata.batch,
            stride: 0,
            is_level: 0,
            first_token: 0,
            num_stretches: head.vocab_size().div_ceil(VOCABULARY_STRETCH) as u32,
        };
        let launch = |num_stretches: usize, params: &Params| {
            let grid = [hidden.rows, num_stretches, 1];
            self.device.launch("lm_head_sums", grid, THREADS, 0, params);
        };
        if plan.needs_vocabulary {
            let most_columns = vocabulary_columns(hidden.rows, head.vocab_size());
            for first in (0..head.vocab_size()).step_by(most_columns) {
                let columns = most_columns.min(head.vocab_size() - first);
                self.multiply(&Product {
                    out: out.chunk.address(),
                    ..product(0, hidden.rows, first, columns)
                });
                let (stride, first_token) = (columns as u32, first as u32);
                let num_stretches = columns.div_ceil(VOCABULARY_STRETCH);
                launch(num_stretches, &Params { stride, first_token, ..params });
            }
            let grid = [hidden.rows.div_ceil(THREADS as usize / WARP_SIZE), 1, 1];
            self.device.launch("lm_head_join", grid, THREADS, 0, &params);
        }
        // Logits of named tokens are there only now.
        if plan.needs_level {
            launch(1, &Params { sums: out.level_sums.at(0), is_level: 1, ..params });
        }
    }
}
