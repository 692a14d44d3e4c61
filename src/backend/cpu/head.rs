use std::collections::BTreeSet;
use std::ops::Range;

use rten_simd::SimdOp;

use super::scratch::Scratch;
use super::softmax::LogSumExpParts;
use super::{Buffer, CpuBackend, Epilogue, Matrix, StepTokens};
use crate::backend::NO_TOKEN;
use crate::tensor::Tensor;

/// Columns of the head that are evaluated together, so that a large vocabulary needs little room.
const COLUMNS_PER_CHUNK: usize = 2048;

/// The output head, cut where the codes of a level begin and end.
///
/// A step evaluates the chunks that its codes lie in, and the others only where scores are
/// normalised over the whole vocabulary.
pub struct Head {
    chunks: Vec<Chunk>,
    pub(super) steps: Vec<StepColumns>,
    pub(super) vocab_size: u32,
}

struct Chunk {
    tokens: Range<u32>,
    weight: Matrix,
}

/// What a step can choose from, as columns of its logits.
pub(super) struct StepColumns {
    /// The tokens whose logits a step evaluates.
    pub span: Range<u32>,
    /// By code: its column in the span, or `NO_TOKEN`.
    pub columns: Vec<u32>,
    pub is_forced: bool,
}

impl StepColumns {
    fn new(step: &StepTokens) -> StepColumns {
        let (tokens, is_forced) = match step {
            StepTokens::Level { tokens } => (tokens.as_slice(), false),
            StepTokens::Forced { token } => (std::slice::from_ref(token), true),
        };
        let known = || tokens.iter().copied().filter(|&token| token != NO_TOKEN);
        let start = known().min().unwrap_or(0);
        let end = known().max().map_or(0, |last| last + 1);
        let column = |&token: &u32| {
            if token == NO_TOKEN { token } else { token - start }
        };
        StepColumns { span: start..end, columns: tokens.iter().map(column).collect(), is_forced }
    }
}

/// The logits of a step.
pub(super) struct Logits {
    /// The tokens of the columns.
    pub span: Range<u32>,
    /// `[rows, span]`
    pub values: Scratch,
    /// `[rows]`: the log of the summed exponentials over the whole vocabulary; empty where nobody
    /// asked.
    pub normalizers: Vec<f32>,
}

impl Logits {
    pub fn row(&self, row: usize) -> &[f32] {
        let columns = self.span.len();
        &self.values[row * columns..(row + 1) * columns]
    }
}

impl Head {
    pub(super) fn new(weight: &Tensor, steps: &[StepTokens]) -> Head {
        let (vocab_size, num_in) = (weight.shape()[0], weight.shape()[1]);
        let steps: Vec<StepColumns> = steps.iter().map(StepColumns::new).collect();
        let mut cuts = BTreeSet::from([0, vocab_size as u32]);
        cuts.extend(steps.iter().flat_map(|step| [step.span.start, step.span.end]));
        let cuts: Vec<u32> = cuts.into_iter().collect();
        let mut chunks = Vec::new();
        let mut values = Vec::new();
        for stretch in cuts.windows(2) {
            for start in (stretch[0]..stretch[1]).step_by(COLUMNS_PER_CHUNK) {
                let tokens = start..stretch[1].min(start + COLUMNS_PER_CHUNK as u32);
                values.resize(tokens.len() * num_in, 0.0);
                weight.read(start as usize * num_in..tokens.end as usize * num_in, &mut values);
                chunks.push(Chunk { tokens, weight: Matrix::new(&values, num_in) });
            }
        }
        Head { chunks, steps, vocab_size: vocab_size as u32 }
    }

    /// The logits of a step, over its span or, if `whole`, all tokens. `inverse_temperatures`,
    /// one a row, are asked for where normalisers over the vocabulary are wanted.
    pub(super) fn logits(
        &self,
        backend: &CpuBackend,
        hidden: &Buffer,
        step: usize,
        whole: bool,
        inverse_temperatures: Option<&[f32]>,
    ) -> Logits {
        let span = if whole { 0..self.vocab_size } else { self.steps[step].span.clone() };
        let num_rows = hidden.num_rows();
        let columns = span.len();
        let mut values = Scratch::new(num_rows * columns);
        let mut sums = vec![RunningLogSumExp::default(); num_rows];
        let mut chunk_logits = Buffer::default();
        for chunk in &self.chunks {
            let inside = chunk.tokens.start >= span.start && chunk.tokens.end <= span.end;
            if !inside && inverse_temperatures.is_none() {
                continue;
            }
            backend.matmul(hidden, &chunk.weight, None, Epilogue::Store, &mut chunk_logits);
            if let Some(inverse_temperatures) = inverse_temperatures {
                for (row, sum) in sums.iter_mut().enumerate() {
                    sum.add(chunk_logits.row(row), inverse_temperatures[row]);
                }
            }
            if inside {
                let first = (chunk.tokens.start - span.start) as usize;
                for row in 0..num_rows {
                    let out = &mut values[row * columns + first..][..chunk.tokens.len()];
                    out.copy_from_slice(chunk_logits.row(row));
                }
            }
        }
        let normalizers = match inverse_temperatures {
            Some(_) => sums.iter().map(RunningLogSumExp::value).collect(),
            None => Vec::new(),
        };
        Logits { span, values, normalizers }
    }
}

/// The log of summed exponentials, chunk by chunk (online softmax, Milakov & Gimelshein 2018).
#[derive(Clone)]
pub(super) struct RunningLogSumExp {
    largest: f32,
    sum: f32,
}

impl Default for RunningLogSumExp {
    fn default() -> RunningLogSumExp {
        RunningLogSumExp { largest: f32::NEG_INFINITY, sum: 0.0 }
    }
}

impl RunningLogSumExp {
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
}
