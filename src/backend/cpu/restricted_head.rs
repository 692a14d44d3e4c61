use std::ops::Range;

use rten_simd::SimdOp;

use super::head::{Head, StepColumns};
use super::scratch::Scratch;
use super::softmax::LogSumExpParts;
use super::{Buffer, CpuBackend, Epilogue, SearchRule, Slot};
use crate::backend::{NO_TOKEN, Normalizer};

/// The logits of a step, one row a beam.
pub struct Logits {
    /// The tokens of the columns.
    pub(super) span: Range<u32>,
    /// `[rows, span]`
    values: Scratch,
    /// `[rows]`; what a row's rule normalises by, where that does not depend on the beam.
    pub(super) normalizers: Vec<LogSumExp>,
}

impl Default for Logits {
    fn default() -> Logits {
        Logits { span: 0..0, values: Scratch::new(0), normalizers: Vec::new() }
    }
}

impl Logits {
    /// Logits of a level whose tokens are all there is, `[rows, columns]`, to be normalised over
    /// it: for benchmarks of the search alone.
    ///
    /// # Panics
    /// Where `values` are not whole rows.
    pub fn of_level(values: Vec<f32>, columns: usize) -> Logits {
        assert!(values.len().is_multiple_of(columns), "rows must be whole");
        let normalizer = |row: &[f32]| {
            let mut sum = LogSumExp::default();
            sum.add(row, 1.0);
            sum
        };
        let normalizers = values.chunks(columns).map(normalizer).collect();
        let span = 0..columns as u32;
        Logits { span, values: values.into(), normalizers }
    }

    pub(super) fn row(&self, row: usize) -> &[f32] {
        let columns = self.span.len();
        &self.values[row * columns..(row + 1) * columns]
    }
}

impl CpuBackend {
    pub(super) fn restricted_head(
        &self,
        hidden: &Buffer,
        head: &Head,
        step: usize,
        rules: &[SearchRule<'_>],
        slots: &[Slot],
        out: &mut Logits,
    ) {
        assert_eq!(rules.len(), slots.len(), "a rule for each slot");
        let columns = &head.steps[step];
        let over: Vec<Normalizer> =
            rules.iter().map(|rule| rule.normalizer(columns.is_forced)).collect();
        let needs_vocabulary = over.contains(&Normalizer::Vocabulary);
        let whole = !columns.is_forced
            && rules.iter().any(|rule| rule.constraint == crate::request::Constraint::None);
        let span = if whole { 0..head.vocab_size } else { columns.span.clone() };
        let (num_rows, num_columns) = (hidden.num_rows(), span.len());
        out.values.resize(num_rows * num_columns);
        out.normalizers.clear();
        out.normalizers.resize(num_rows, LogSumExp::default());
        let rows_of = |slot: usize| {
            let first: usize = slots[..slot].iter().map(|slot| slot.beams.len()).sum();
            first..first + slots[slot].beams.len()
        };
        let mut chunk_logits = Buffer::default();
        for chunk in &head.chunks {
            let is_inside = chunk.tokens.start >= span.start && chunk.tokens.end <= span.end;
            if !is_inside && !needs_vocabulary {
                continue;
            }
            self.matmul(hidden, &chunk.weight, None, Epilogue::Store, &mut chunk_logits);
            for (slot, rule) in rules.iter().enumerate() {
                if over[slot] == Normalizer::Vocabulary {
                    for row in rows_of(slot) {
                        out.normalizers[row].add(chunk_logits.row(row), 1.0 / rule.temperature);
                    }
                }
            }
            if is_inside {
                let first = (chunk.tokens.start - span.start) as usize;
                for row in 0..num_rows {
                    let out = &mut out.values[row * num_columns + first..][..chunk.tokens.len()];
                    out.copy_from_slice(chunk_logits.row(row));
                }
            }
        }
        out.span = span;
        let first = (columns.span.start - out.span.start) as usize;
        for (slot, rule) in rules.iter().enumerate() {
            if over[slot] == Normalizer::Level {
                for row in rows_of(slot) {
                    let mut sum = LogSumExp::default();
                    add_level(&mut sum, columns, &out.row(row)[first..], 1.0 / rule.temperature);
                    out.normalizers[row] = sum;
                }
            }
        }
    }
}

/// Adds the logits of a level's codes; `logits` begin at the level's first token.
fn add_level(sum: &mut LogSumExp, columns: &StepColumns, logits: &[f32], scale: f32) {
    if columns.is_straight {
        sum.add(&logits[..columns.columns.len()], scale);
    } else {
        let known = columns.columns.iter().filter(|&&column| column != NO_TOKEN);
        let logits: Vec<f32> = known.map(|&column| logits[column as usize]).collect();
        sum.add(&logits, scale);
    }
}

/// The log of summed exponentials, chunk by chunk (online softmax, Milakov & Gimelshein 2018).
#[derive(Clone)]
pub(super) struct LogSumExp {
    largest: f32,
    sum: f32,
}

impl Default for LogSumExp {
    fn default() -> LogSumExp {
        LogSumExp { largest: f32::NEG_INFINITY, sum: 0.0 }
    }
}

impl LogSumExp {
    pub fn add(&mut self, values: &[f32], scale: f32) {
        let (largest, sum) = LogSumExpParts { values, scale }.dispatch();
        let largest = largest * scale;
        if largest.is_nan() || sum.is_nan() {
            self.sum = f32::NAN;
        } else if largest > self.largest {
            self.sum = self.sum * (self.largest - largest).exp() + sum;
            self.largest = largest;
        } else {
            self.sum += sum * (largest - self.largest).exp();
        }
    }

    pub fn value(&self) -> f32 {
        self.largest + self.sum.ln()
    }

    /// The largest of the log-probabilities.
    pub fn ceiling(&self) -> f32 {
        self.largest - self.value()
    }
}
