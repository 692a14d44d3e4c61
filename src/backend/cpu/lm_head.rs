//! The output head over the tokens of a step, and the normalisers of its rows.
//!
//! Chunk after chunk of the head is multiplied by the rows that want it: rows whose tokens lie in
//! it, which keep those logits, and rows that are normalised over the vocabulary, which only add
//! them to a running log-sum-exp.

use std::ops::Range;

use rten_simd::SimdOp;

use super::head::Head;
use super::scratch::Scratch;
use super::softmax::LogSumExpParts;
use super::{Buffer, CpuBackend, Slot};
use crate::backend::level_columns::LevelColumns;
use crate::backend::{
    Batch, Continuations, Epilogue, LmHead, Matmul, NO_TOKEN, Normalizer, SearchRule, StepChoice,
};

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
    pub columns: Columns,
    /// The slot's rows among all.
    pub rows: Range<usize>,
    /// The first of the slot's `[rows, columns]` values.
    first: usize,
}

/// The tokens of a slot's columns.
pub(super) enum Columns {
    /// A span of the vocabulary.
    Span(Range<u32>),
    /// Single tokens; the column of a `NO_TOKEN` is never written.
    Named(Vec<u32>),
}

impl Columns {
    fn new(rule: &SearchRule<'_>, head: &Head) -> Columns {
        let named = |tokens: &[u32]| {
            let is_known = |&token: &u32| token == NO_TOKEN || token < head.vocab_size;
            assert!(tokens.iter().all(is_known), "tokens are checked when a request arrives");
            Columns::Named(tokens.to_vec())
        };
        match rule.choice {
            StepChoice::Forced { token, .. } => named(&[token]),
            StepChoice::Tokens(tokens) => named(tokens),
            StepChoice::Phrase | StepChoice::Sample { .. } => Columns::Span(0..head.vocab_size),
            StepChoice::Level(_) if rule.continuations() == Continuations::Vocabulary => {
                Columns::Span(0..head.vocab_size)
            }
            StepChoice::Level(level) => Columns::Span(head.levels[level].span.clone()),
        }
    }

    fn len(&self) -> usize {
        match self {
            Columns::Span(span) => span.len(),
            Columns::Named(tokens) => tokens.len(),
        }
    }

    /// Whether columns lie in a chunk of the head.
    fn lie_in(&self, chunk: &Range<u32>) -> bool {
        match self {
            // Chunks are cut where spans begin and end.
            Columns::Span(span) => chunk.start >= span.start && chunk.end <= span.end,
            Columns::Named(tokens) => tokens.iter().any(|token| chunk.contains(token)),
        }
    }

    /// Keeps the logits of a chunk that are columns.
    fn keep(&self, chunk: &Range<u32>, logits: &[f32], row: &mut [f32]) {
        match self {
            Columns::Span(span) => {
                let first = (chunk.start - span.start) as usize;
                row[first..first + logits.len()].copy_from_slice(logits);
            }
            Columns::Named(tokens) => {
                for (value, token) in row.iter_mut().zip(tokens) {
                    if chunk.contains(token) {
                        *value = logits[(token - chunk.start) as usize];
                    }
                }
            }
        }
    }
}

impl SlotLogits {
    /// The values of a row, which is numbered among those of all slots.
    fn values(&self, row: usize) -> Range<usize> {
        let start = self.first + (row - self.rows.start) * self.columns.len();
        start..start + self.columns.len()
    }

    /// The first column of a level.
    pub fn first_column(&self, level: &LevelColumns) -> usize {
        match &self.columns {
            Columns::Span(span) => (level.span.start - span.start) as usize,
            Columns::Named(_) => 0,
        }
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
        let columns = Columns::Span(0..columns as u32);
        let search = SlotLogits { columns, rows: 0..normalizers.len(), first: 0 };
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
        &self.values[search.values(search.rows.start + beam)]
    }
}

impl LmHead for CpuBackend {
    fn lm_head(
        &self,
        hidden: &Buffer,
        head: &Head,
        rules: &[SearchRule<'_>],
        batch: &mut Batch<'_, CpuBackend>,
        out: &mut Logits,
    ) {
        let slots = &*batch.slots;
        let num_rows = out.lay_out(head, rules, slots);
        assert_eq!(hidden.num_rows(), num_rows, "a row for each beam");
        let needs_vocabulary = |slot: usize| {
            rules[slot].normalizer() == Normalizer::Vocabulary || rules[slot].log_probs
        };
        let (mut few, mut logits) = (Buffer::default(), Buffer::default());
        for chunk in &*head.chunks {
            let is_inside = |slot: usize| out.searches[slot].columns.lie_in(&chunk.tokens);
            let needs = |slot: &usize| needs_vocabulary(*slot) || is_inside(*slot);
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
                let is_inside = search.columns.lie_in(&chunk.tokens);
                for row in search.rows.clone() {
                    let logits = row_logits.next().expect("a row for each row wanted");
                    if needs_vocabulary(slot) {
                        out.vocabulary[row].add(logits, 1.0 / rules[slot].temperature);
                    }
                    if is_inside {
                        let values = &mut out.values[search.values(row)];
                        search.columns.keep(&chunk.tokens, logits, values);
                    }
                }
            }
        }
        for (slot, rule) in rules.iter().enumerate() {
            out.normalize(head, slot, rule);
        }
    }
}

impl Logits {
    /// Makes room for the logits of a step, and returns the number of rows.
    fn lay_out(&mut self, head: &Head, rules: &[SearchRule<'_>], slots: &[Slot]) -> usize {
        assert_eq!(rules.len(), slots.len(), "a rule for each slot");
        let (mut num_rows, mut num_values) = (0, 0);
        self.searches.clear();
        for (rule, slot) in rules.iter().zip(slots) {
            let columns = Columns::new(rule, head);
            let (first, rows) = (num_values, num_rows..num_rows + slot.beams.len());
            num_rows = rows.end;
            num_values += rows.len() * columns.len();
            self.searches.push(SlotLogits { columns, rows, first });
        }
        self.values.resize(num_values);
        for sums in [&mut self.normalizers, &mut self.vocabulary] {
            sums.clear();
            sums.resize(num_rows, LogSumExp::default());
        }
        num_rows
    }

    /// Sets what the rows of a slot are normalised by, where that does not depend on the beam.
    fn normalize(&mut self, head: &Head, slot: usize, rule: &SearchRule<'_>) {
        let search = &self.searches[slot];
        match rule.normalizer() {
            Normalizer::Vocabulary => {
                let rows = search.rows.clone();
                self.normalizers[rows.clone()].clone_from_slice(&self.vocabulary[rows]);
            }
            Normalizer::Level => {
                let named;
                let level = match rule.choice {
                    StepChoice::Level(level) => &head.levels[level],
                    StepChoice::Forced { .. } | StepChoice::Sample { .. } => {
                        unreachable!("forced and drawn tokens are certain")
                    }
                    StepChoice::Phrase => unreachable!("phrases have no levels"),
                    StepChoice::Tokens(tokens) => {
                        named = LevelColumns::of_named(tokens);
                        &named
                    }
                };
                let first = search.first_column(level);
                for row in search.rows.clone() {
                    let logits = &self.values[search.values(row)][first..];
                    self.normalizers[row] = over_level(level, logits, 1.0 / rule.temperature);
                }
            }
            Normalizer::Children | Normalizer::Certain => {}
        }
    }
}

/// The sum over a level's codes; `logits` begin at the level's first column.
pub(super) fn over_level(level: &LevelColumns, logits: &[f32], scale: f32) -> LogSumExp {
    let mut sum = LogSumExp::default();
    if level.is_straight {
        sum.add(&logits[..level.columns.len()], scale);
    } else {
        let known = level.columns.iter().filter(|&&column| column != NO_TOKEN);
        let logits: Vec<f32> = known.map(|&column| logits[column as usize]).collect();
        sum.add(&logits, scale);
    }
    sum
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
