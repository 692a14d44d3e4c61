use std::ops::Range;

use rten_simd::SimdOp;

use super::head::Head;
use super::scratch::Scratch;
use super::softmax::LogSumExpParts;
use super::{Buffer, CpuBackend, Epilogue, SearchRule, Slot};
use crate::backend::step_columns::StepColumns;
use crate::backend::{NO_TOKEN, Normalizer};
use crate::search::Constraint;

/// The logits of a step, one row a beam.
#[derive(Default)]
pub struct Logits {
    /// By slot.
    pub(super) searches: Vec<SlotLogits>,
    values: Scratch,
    /// `[rows]`; what a row's rule normalises by, where that does not depend on the beam.
    pub(super) normalizers: Vec<LogSumExp>,
    /// `[rows]`; over all tokens, for rows whose rule keeps log-probabilities.
    pub(super) vocabulary: Vec<LogSumExp>,
}

/// Where the logits of one slot are.
pub(super) struct SlotLogits {
    /// The tokens of the columns.
    pub span: Range<u32>,
    /// The slot's rows among all.
    pub rows: Range<usize>,
    /// The first of the slot's `[rows, span]` values.
    first: usize,
}

impl SlotLogits {
    /// The logits of a row of the slot, from the column `from` on, in all values.
    fn columns(&self, row: usize, from: u32) -> Range<usize> {
        let width = self.span.len();
        let start = self.first + (row - self.rows.start) * width;
        start + (from - self.span.start) as usize..start + width
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
        let normalizers: Vec<_> = values.chunks(columns).map(normalizer).collect();
        let search = SlotLogits { span: 0..columns as u32, rows: 0..normalizers.len(), first: 0 };
        Logits {
            searches: vec![search],
            values: values.into(),
            normalizers,
            vocabulary: Vec::new(),
        }
    }

    /// The logits of a beam of a slot.
    pub(super) fn row(&self, slot: usize, beam: usize) -> &[f32] {
        let search = &self.searches[slot];
        &self.values[search.columns(search.rows.start + beam, search.span.start)]
    }
}

impl CpuBackend {
    pub(super) fn lm_head(
        &self,
        hidden: &Buffer,
        head: &Head,
        rules: &[SearchRule<'_>],
        slots: &[Slot],
        out: &mut Logits,
    ) {
        assert_eq!(rules.len(), slots.len(), "a rule for each slot");
        let columns = |slot: usize| &head.steps[slots[slot].beams.num_steps];
        let over: Vec<Normalizer> = rules
            .iter()
            .enumerate()
            .map(|(slot, rule)| rule.normalizer(columns(slot).is_forced))
            .collect();
        let (mut num_rows, mut num_values) = (0, 0);
        out.searches.clear();
        for (slot, rule) in rules.iter().enumerate() {
            let is_free = rule.constraint == Constraint::None && !columns(slot).is_forced;
            let span = if is_free { 0..head.vocab_size } else { columns(slot).span.clone() };
            let (first, rows) = (num_values, num_rows..num_rows + slots[slot].beams.len());
            num_rows = rows.end;
            num_values += rows.len() * span.len();
            out.searches.push(SlotLogits { span, rows, first });
        }
        assert_eq!(hidden.num_rows(), num_rows, "a row for each beam");
        out.values.resize(num_values);
        out.normalizers.clear();
        out.normalizers.resize(num_rows, LogSumExp::default());
        out.vocabulary.clear();
        out.vocabulary.resize(num_rows, LogSumExp::default());
        let needs_vocabulary =
            |slot: usize| over[slot] == Normalizer::Vocabulary || rules[slot].log_probs;

        let (mut few, mut logits) = (Buffer::default(), Buffer::default());
        for chunk in &head.chunks {
            let is_inside = |slot: &usize| {
                let span = &out.searches[*slot].span;
                chunk.tokens.start >= span.start && chunk.tokens.end <= span.end
            };
            let needs = |slot: &usize| needs_vocabulary(*slot) || is_inside(slot);
            let wanted: Vec<usize> = (0..rules.len()).filter(needs).collect();
            let hidden = match wanted.len() {
                0 => continue,
                all if all == rules.len() => hidden,
                _ => {
                    let rows = wanted.iter().map(|&slot| out.searches[slot].rows.clone());
                    hidden.copy_rows(rows, &mut few);
                    &few
                }
            };
            self.matmul(hidden, &chunk.weight, None, Epilogue::Store, &mut logits);
            let mut row_logits = logits.values.chunks_exact(chunk.tokens.len());
            for &slot in &wanted {
                let search = &out.searches[slot];
                for row in search.rows.clone() {
                    let logits = row_logits.next().expect("a row for each row wanted");
                    if needs_vocabulary(slot) {
                        out.vocabulary[row].add(logits, 1.0 / rules[slot].temperature);
                    }
                    if is_inside(&slot) {
                        let to = search.columns(row, chunk.tokens.start);
                        out.values[to][..logits.len()].copy_from_slice(logits);
                    }
                }
            }
        }
        for (slot, rule) in rules.iter().enumerate() {
            if over[slot] == Normalizer::Vocabulary {
                let rows = out.searches[slot].rows.clone();
                out.normalizers[rows.clone()].clone_from_slice(&out.vocabulary[rows]);
            }
            if over[slot] == Normalizer::Level {
                let (search, columns) = (&out.searches[slot], columns(slot));
                for row in search.rows.clone() {
                    let logits = &out.values[search.columns(row, columns.span.start)];
                    let mut sum = LogSumExp::default();
                    add_level(&mut sum, columns, logits, 1.0 / rule.temperature);
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
