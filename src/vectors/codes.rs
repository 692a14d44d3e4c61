//! A copy of the items' vectors in 8 bits, by which most rows are ruled out without being read.
//!
//! A row `x` becomes whole numbers `c` and a scale `s`, with `x = s c + e`. For a query `q`,
//!
//! ```text
//! |q·x - s (q·c)| = |q·e| <= |q| |e|        (Cauchy and Schwarz)
//! ```
//!
//! and `|e|` is known. With what f32 may lose in both sums (Higham 2002, section 3.1), that bounds how
//! far the product with the copy is from the score that [`top_products`](super::top_products()) would
//! give. A row whose upper bound is below the lower bounds of as many rows as are asked for cannot be
//! found; all others are scored from their vectors. So what is found is the same to the last bit.

use rayon::prelude::*;
use rten_simd::{Isa, SimdOp};

use crate::tensor::Tensor;

/// The largest whole number.
const LARGEST: f32 = 127.0;
/// Numbers that are summed apart.
const LANES: usize = 32;
/// Lengths of vectors and queries between which the bounds hold: no square or product of theirs
/// overflows, and what is lost where one underflows is below [`LOST_PER_COLUMN`].
const LENGTHS: std::ops::RangeInclusive<f64> = 1e-15..=1e15;
/// What a column may lose by underflow.
const LOST_PER_COLUMN: f64 = 1e-27;

/// Vectors in 8 bits.
pub(super) struct Codes {
    /// `[rows, columns]`
    codes: Vec<i8>,
    rows: Vec<Row>,
    columns: usize,
}

/// What is known of a row.
#[derive(Clone, Copy, Default)]
struct Row {
    /// What its whole numbers are multiples of.
    scale: f32,
    /// At least the length of what was rounded off.
    error: f32,
    /// At least the length of the vector.
    length: f32,
}

/// The bounds of a row's score.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    pub lower: f64,
    pub upper: f64,
}

impl Codes {
    /// Makes the copy of a matrix `[rows, columns]`; `None` where a vector is so long that the bounds would not hold.
    pub fn of(vectors: &Tensor) -> Option<Codes> {
        let columns = vectors.shape()[1];
        let mut codes = vec![0; vectors.len()];
        let mut rows = vec![Row::default(); vectors.shape()[0]];
        let work = codes.par_chunks_exact_mut(columns).zip(&mut rows).enumerate();
        work.with_min_len(256).for_each_init(
            || vec![0.0; columns],
            |values, (row, (codes, about))| {
                vectors.read(row * columns..(row + 1) * columns, values);
                *about = round(values, codes);
            },
        );
        let are_sound = rows.iter().all(|row| f64::from(row.length) <= *LENGTHS.end());
        are_sound.then_some(Codes { codes, rows, columns })
    }

    /// Bytes of the copy.
    pub fn num_bytes(&self) -> usize {
        self.codes.len() + std::mem::size_of_val(&self.rows[..])
    }
}

/// Rounds a vector to whole numbers.
fn round(values: &[f32], codes: &mut [i8]) -> Row {
    let largest = values.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
    let scale = largest / LARGEST;
    let (mut error, mut length) = (0.0f64, 0.0f64);
    for (value, code) in values.iter().zip(codes) {
        // A scale of zero has codes of zero: the error is then the vector.
        let rounded =
            if scale > 0.0 { (value / scale).round().clamp(-LARGEST, LARGEST) } else { 0.0 };
        *code = rounded as i8;
        error += (f64::from(*value) - f64::from(scale) * f64::from(rounded)).powi(2);
        length += f64::from(*value).powi(2);
    }
    // Rounded up, also by what these sums may have lost.
    let up = |square: f64| (square.sqrt() * (1.0 + 1e-6)) as f32 * (1.0 + 1e-6) + f32::MIN_POSITIVE;
    Row { scale, error: up(error), length: up(length) }
}

/// A query, and what is needed to bound scores by it.
pub(super) struct CodedQuery<'a> {
    codes: &'a Codes,
    query: &'a [f32],
    length: f64,
    /// What f32 may lose in both sums, relative to the product of the lengths.
    loss: f64,
}

impl<'a> CodedQuery<'a> {
    /// `None` where the bounds would not hold for the query.
    pub fn new(codes: &'a Codes, query: &'a [f32]) -> Option<CodedQuery<'a>> {
        let square: f64 = query.iter().map(|value| f64::from(*value).powi(2)).sum();
        let length = square.sqrt() * (1.0 + 1e-6);
        // A sum of n products errs by n u / (1 - n u) of the sum of their magnitudes, in any order;
        // there are two sums and a scale, and the factor leaves room for the bias.
        let terms = (codes.columns + LANES + 8) as f64;
        let loss = 4.0 * terms * f64::from(f32::EPSILON);
        let is_sound = LENGTHS.contains(&length) && loss < 0.1;
        is_sound.then_some(CodedQuery { codes, query, length, loss })
    }

    /// The query, `[columns]`.
    pub fn query(&self) -> &'a [f32] {
        self.query
    }

    /// The products of the query with some rows of the copy, for [`bounds`](CodedQuery::bounds).
    pub fn products(&self, rows: std::ops::Range<usize>, out: &mut Vec<f32>) {
        let columns = self.codes.columns;
        let codes = &self.codes.codes[rows.start * columns..rows.end * columns];
        out.resize(rows.len(), 0.0);
        CodeProducts { codes, query: self.query, out }.dispatch();
    }

    /// The bounds of a row's score, from its product and its bias.
    pub fn bounds(&self, row: usize, product: f32, bias: f32) -> Bounds {
        let Row { scale, error, length } = self.codes.rows[row];
        let (error, length, bias) = (f64::from(error), f64::from(length), f64::from(bias));
        let middle = f64::from(scale) * f64::from(product) + bias;
        let lost = self.length * (error + self.loss * (length + error))
            + 4.0 * f64::from(f32::EPSILON) * bias.abs()
            + self.codes.columns as f64 * LOST_PER_COLUMN;
        // The arithmetic here is in f64, whose own losses are far below the last term.
        let lost = lost * (1.0 + 1e-9) + 1e-12 * (middle.abs() + bias.abs());
        Bounds { lower: middle - lost, upper: middle + lost }
    }
}

/// Products of a query with rows of whole numbers.
struct CodeProducts<'a> {
    codes: &'a [i8],
    query: &'a [f32],
    out: &'a mut [f32],
}

impl SimdOp for CodeProducts<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, _: I) {
        // Plain loops: the compiler has the instructions of `I` here, and widens by them.
        let (query, rest_of_query) = self.query.as_chunks::<LANES>();
        for (codes, out) in self.codes.chunks_exact(self.query.len()).zip(self.out) {
            let (codes, rest_of_codes) = codes.as_chunks::<LANES>();
            let mut sums = [0.0f32; LANES];
            for (query, codes) in query.iter().zip(codes) {
                for lane in 0..LANES {
                    sums[lane] += query[lane] * f32::from(codes[lane]);
                }
            }
            let rest = rest_of_query.iter().zip(rest_of_codes);
            let rest: f32 = rest.map(|(query, code)| query * f32::from(*code)).sum();
            *out = sums.iter().sum::<f32>() + rest;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vectors::{ItemMatrix, Metric, score_rows};

    #[test]
    fn scores_are_within_their_bounds() {
        let mut rng = fastrand::Rng::with_seed(31);
        for (columns, magnitude) in
            [(1, 1.0f32), (31, 1e-3), (32, 1.0), (50, 1e6), (128, 1.0), (700, 1e-9), (64, 1e-30)]
        {
            let num_rows = 300;
            let number = |rng: &mut fastrand::Rng| (2.0 * rng.f32() - 1.0).powi(3) * magnitude;
            let mut values: Vec<f32> = (0..num_rows * columns).map(|_| number(&mut rng)).collect();
            values[..columns].fill(0.0);
            values[columns] = 1e4 * magnitude; // one column that takes all of a row's scale
            let bias = Tensor::new(&[num_rows], (0..num_rows).map(|_| number(&mut rng)).collect());
            let vectors = Tensor::new(&[num_rows, columns], values);
            let codes = Codes::of(&vectors).expect("lengths within the limits");
            let matrix = ItemMatrix::new(vectors, Some(&bias), Metric::Dot).expect("a matrix");
            for _ in 0..20 {
                let query: Vec<f32> = (0..columns).map(|_| 3.0 * rng.f32() - 1.0).collect();
                let coded = CodedQuery::new(&codes, &query).expect("a query of a sound length");
                let rows: Vec<u32> = (0..num_rows as u32).collect();
                let scores = score_rows(&query, &matrix, &rows).expect("finite");
                let mut products = Vec::new();
                coded.products(0..num_rows, &mut products);
                for (row, score) in scores.iter().enumerate() {
                    let Bounds { lower, upper } =
                        coded.bounds(row, products[row], matrix.bias(row as u32));
                    let score = f64::from(*score);
                    let what = format!("{columns} x {magnitude}: row {row}");
                    assert!(lower <= score && score <= upper, "{what}: {lower} {score} {upper}");
                }
            }
        }
    }

    #[test]
    fn vectors_and_queries_without_bounds_are_left_to_the_scan() {
        let vectors = |value: f32| Tensor::new(&[2, 2], vec![1.0, 2.0, value, 1.0]);
        assert!(Codes::of(&vectors(1e20)).is_none());
        let codes = Codes::of(&vectors(1.0)).expect("short vectors");
        for query in [[0.0, 0.0], [1e-30, 0.0], [1e30, 0.0], [f32::NAN, 1.0], [f32::INFINITY, 1.0]]
        {
            assert!(CodedQuery::new(&codes, &query).is_none(), "{query:?}");
        }
        assert!(CodedQuery::new(&codes, &[1.0, -1.0]).is_some());
    }
}
