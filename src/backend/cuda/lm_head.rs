//! The output head: products, and `lm_head.cu` for the normalisers of its rows.

use super::backend::CudaBackend;
use super::buffer::Buffer;
use super::driver::{Driver, Product};
use super::head::Head;
use super::logits::{Logits, VOCABULARY_CHUNK};
use super::metadata::BatchParams;
use super::shared::shared_struct;
use crate::backend::{Batch, LmHead, SearchRule};
use crate::tensor::Dtype;

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
            rules: scratch.rules.at(0),
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
    }
}
