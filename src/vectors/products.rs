//! Scores of a few rows by a few query vectors.

use rten_simd::ops::{BitOps, NumOps};
use rten_simd::{Isa, SimdOp};

use super::Metric;

/// Vectors of a register's width that are summed apart, so that additions need not wait for each
/// other.
const SUMS: usize = 4;

/// Scores rows of a matrix in f32.
///
/// The order of a score's sum depends on the number of columns and the width of registers alone: a
/// score is the same to the last bit in any company.
pub(super) struct Products<'a> {
    /// Rows of `columns` numbers.
    pub matrix: &'a [f32],
    /// Which of these rows.
    pub rows: &'a [u32],
    /// `[queries, columns]`
    pub queries: &'a [f32],
    pub columns: usize,
    pub metric: Metric,
    /// `[queries, rows]`
    pub out: &'a mut [f32],
}

impl SimdOp for Products<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let Products { matrix, rows, queries, columns, metric, out } = self;
        for (at, &row) in rows.iter().enumerate() {
            let row = &matrix[row as usize * columns..][..columns];
            for (query, out) in queries.chunks_exact(columns).zip(out.chunks_exact_mut(rows.len()))
            {
                out[at] = match metric {
                    Metric::Dot => sum(
                        isa,
                        query,
                        row,
                        #[inline(always)]
                        |isa: I, a, b, sum| isa.f32().mul_add(a, b, sum),
                        |a, b| a * b,
                    ),
                    Metric::L2 => -sum(
                        isa,
                        query,
                        row,
                        #[inline(always)]
                        |isa: I, a, b, sum| {
                            let ops = isa.f32();
                            let difference = ops.sub(a, b);
                            ops.mul_add(difference, difference, sum)
                        },
                        |a, b| (a - b) * (a - b),
                    ),
                };
            }
        }
    }
}

/// A sum over the columns of two vectors.
#[inline(always)]
fn sum<I: Isa>(
    isa: I,
    a: &[f32],
    b: &[f32],
    add: impl Fn(I, I::F32, I::F32, I::F32) -> I::F32,
    add_one: impl Fn(f32, f32) -> f32,
) -> f32 {
    let ops = isa.f32();
    let len = ops.len();
    let mut sums = [ops.zero(); SUMS];
    let (wide_a, wide_b) = (a.chunks_exact(SUMS * len), b.chunks_exact(SUMS * len));
    let (rest_a, rest_b) = (wide_a.remainder(), wide_b.remainder());
    for (a, b) in wide_a.zip(wide_b) {
        for ((sum, a), b) in sums.iter_mut().zip(a.chunks_exact(len)).zip(b.chunks_exact(len)) {
            *sum = add(isa, ops.load(a), ops.load(b), *sum);
        }
    }
    let (narrow_a, narrow_b) = (rest_a.chunks_exact(len), rest_b.chunks_exact(len));
    let last = narrow_a.remainder().iter().zip(narrow_b.remainder());
    let last: f32 = last.map(|(a, b)| add_one(*a, *b)).sum();
    for ((sum, a), b) in sums.iter_mut().zip(narrow_a).zip(narrow_b) {
        *sum = add(isa, ops.load(a), ops.load(b), *sum);
    }
    let [first, second, third, fourth] = sums;
    ops.sum(ops.add(ops.add(first, second), ops.add(third, fourth))) + last
}
