//! The best rows of a matrix for each of several query vectors, exactly.
//!
//! Rows are scored in blocks that stay in a core's cache while all queries read them. A score goes on
//! only where it is above the worst of those that are held: a query holds up to twice as many rows as
//! are asked for, and throws the worse half away when these are full, so that selection costs next to
//! nothing beside the products.
//!
//! Where the matrix has a copy in 8 bits, the scan reads that instead, and scores only the rows that the
//! bounds of their scores do not rule out ([`codes`](super::codes)).

use std::cmp::Ordering;
use std::ops::Range;

use rayon::prelude::*;
use rten_simd::SimdOp;

use super::ItemMatrix;
use super::codes::{Bounds, CodedQuery};
use super::products::Products;
use crate::error::{Error, Result};

/// Numbers of a block.
const BLOCK_NUMBERS: usize = 1 << 14;
/// Queries up to which a filtered search reads the copy in 8 bits, once for each of them. A scan of the
/// vectors reads the allowed rows alone, once for all queries.
const MOST_FILTERED_QUERIES: usize = 2;
/// Rows of the copy in 8 bits whose products are made together.
const ROWS_PER_BLOCK: usize = 256;
/// Rows that a task of a thread scores.
const ROWS_PER_TASK: usize = 1 << 14;

/// A row and its score.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Found {
    /// The row's number in the matrix.
    pub row: u32,
    /// The product or minus the squared distance, with the row's bias.
    pub score: f32,
}

impl Found {
    /// The higher score first, then the smaller row.
    fn order(&self, other: &Found) -> Ordering {
        other.score.total_cmp(&self.score).then(self.row.cmp(&other.row))
    }
}

/// Which rows may be found.
#[derive(Clone, Copy)]
pub enum Rows<'a> {
    /// All.
    All,
    /// Those for which the function says yes. Threads ask it at the same time.
    Where(&'a (dyn Fn(u32) -> bool + Sync)),
    /// These, ascending, each once.
    Listed(&'a [u32]),
}

/// The `count` best of the allowed rows for each query, best first, equal scores by the smaller row;
/// fewer where fewer are allowed. Computed on the threads of the current pool.
///
/// `queries`: `[queries, columns]`. All sums are in f32, from vectors that are widened to it; a score
/// does not depend on the other queries, on the allowed rows or on the number of threads.
///
/// # Errors
/// [`Error::NonFiniteScores`] where a score of an allowed row is NaN, or one that would be found is
/// infinite.
///
/// # Panics
/// Where `queries` is not whole rows of the matrix's columns, or a listed row is beyond it.
pub fn top_products(
    queries: &[f32],
    matrix: &ItemMatrix,
    rows: Rows<'_>,
    count: usize,
) -> Result<Vec<Vec<Found>>> {
    let columns = matrix.num_columns();
    assert!(queries.len().is_multiple_of(columns), "whole rows of queries");
    let num_rows = match rows {
        Rows::Listed(rows) => rows.len(),
        _ => matrix.num_rows(),
    };
    let count = count.min(num_rows);
    if let Some(coded) = coded_queries(queries, matrix, rows) {
        let found = coded.iter().map(|query| {
            let survivors = survivors(query, matrix, rows, count);
            let found = scan_all(query.query(), matrix, Rows::Listed(&survivors), count);
            found.into_iter().next().unwrap_or_default()
        });
        let found: Vec<Vec<Found>> = found.collect();
        check(&found)?;
        return Ok(found);
    }
    let found = scan_all(queries, matrix, rows, count);
    check(&found)?;
    Ok(found)
}

/// The best rows for each query, each allowed row scored.
fn scan_all(queries: &[f32], matrix: &ItemMatrix, rows: Rows<'_>, count: usize) -> Vec<Vec<Found>> {
    let num_queries = queries.len() / matrix.num_columns();
    let num_rows = match rows {
        Rows::Listed(rows) => rows.len(),
        _ => matrix.num_rows(),
    };
    let scan = Scan { queries, matrix, rows };
    let empty = || vec![Selection::new(count); num_queries];
    let selections = (0..num_rows.div_ceil(ROWS_PER_TASK))
        .into_par_iter()
        .fold(empty, |mut selections, task| {
            let first = task * ROWS_PER_TASK;
            scan.run(first..num_rows.min(first + ROWS_PER_TASK), &mut selections);
            selections
        })
        .reduce(empty, |mut selections, others| {
            for (selection, other) in selections.iter_mut().zip(others) {
                selection.extend(other);
            }
            selections
        });
    selections.into_iter().map(Selection::finish).collect()
}

/// The queries as the matrix's copy in 8 bits takes them; `None` where it has none, where the bounds
/// would not hold for one of them, and where a scan of the vectors reads less.
fn coded_queries<'a>(
    queries: &'a [f32],
    matrix: &'a ItemMatrix,
    rows: Rows<'_>,
) -> Option<Vec<CodedQuery<'a>>> {
    let codes = matrix.codes()?;
    let most = match rows {
        Rows::All => usize::MAX,
        Rows::Where(_) => MOST_FILTERED_QUERIES,
        Rows::Listed(_) => 0,
    };
    let queries = queries.chunks_exact(matrix.num_columns());
    if queries.len() > most {
        return None;
    }
    queries.map(|query| CodedQuery::new(codes, query)).collect()
}

/// The rows, ascending, that may be among the `count` best of the allowed ones.
fn survivors(
    query: &CodedQuery<'_>,
    matrix: &ItemMatrix,
    rows: Rows<'_>,
    count: usize,
) -> Vec<u32> {
    let num_rows = matrix.num_rows();
    let run = |mut sieve: Sieve, task: usize| {
        let mut products = Vec::new();
        let end = num_rows.min((task + 1) * ROWS_PER_TASK);
        for first in (task * ROWS_PER_TASK..end).step_by(ROWS_PER_BLOCK) {
            let block = first..end.min(first + ROWS_PER_BLOCK);
            query.products(block.clone(), &mut products);
            for (row, product) in block.zip(&products) {
                let bounds = query.bounds(row, *product, matrix.bias(row as u32));
                // Most rows are ruled out by one comparison, so whether a row is allowed is asked
                // of the others alone.
                let is_allowed = |row| match rows {
                    Rows::Where(is_allowed) => is_allowed(row),
                    Rows::All | Rows::Listed(_) => true,
                };
                if bounds.upper >= sieve.threshold && is_allowed(row as u32) {
                    sieve.offer(row as u32, bounds);
                }
            }
        }
        sieve
    };
    let sieve = (0..num_rows.div_ceil(ROWS_PER_TASK))
        .into_par_iter()
        .fold(|| Sieve::new(count), run)
        .reduce(|| Sieve::new(count), Sieve::join);
    sieve.finish()
}

/// Rows that may be among the best, by the bounds of their scores.
struct Sieve {
    count: usize,
    held: Vec<(u32, Bounds)>,
    /// At least `count` rows have scores of at least this.
    threshold: f64,
    /// Rows at which `held` is sifted next.
    sift_at: usize,
}

impl Sieve {
    fn new(count: usize) -> Sieve {
        let threshold = if count == 0 { f64::INFINITY } else { f64::NEG_INFINITY };
        Sieve { count, held: Vec::new(), threshold, sift_at: 4 * count + 64 }
    }

    fn offer(&mut self, row: u32, bounds: Bounds) {
        if self.count == 0 {
            return;
        }
        self.held.push((row, bounds));
        if self.held.len() >= self.sift_at {
            self.sift();
            self.sift_at = 2 * self.held.len() + 4 * self.count + 64;
        }
    }

    /// Raises the threshold to the `count`-th best lower bound, and drops what is below it.
    fn sift(&mut self) {
        if self.held.len() < self.count || self.count == 0 {
            return;
        }
        let mut lower: Vec<f64> = self.held.iter().map(|(_, bounds)| bounds.lower).collect();
        let (_, worst, _) = lower.select_nth_unstable_by(self.count - 1, |a, b| b.total_cmp(a));
        self.threshold = self.threshold.max(*worst);
        let threshold = self.threshold;
        self.held.retain(|(_, bounds)| bounds.upper >= threshold);
    }

    fn join(mut self, other: Sieve) -> Sieve {
        self.threshold = self.threshold.max(other.threshold);
        self.held.extend(other.held);
        self.sift();
        self
    }

    fn finish(mut self) -> Vec<u32> {
        self.sift();
        let mut rows: Vec<u32> = self.held.into_iter().map(|(row, _)| row).collect();
        rows.sort_unstable();
        rows
    }
}

/// The scores of listed rows for one query, in the order of the list, which may be any; the numbers are
/// those that [`top_products`] gives.
///
/// # Errors
/// [`Error::NonFiniteScores`].
///
/// # Panics
/// Where `query` is not a row of the matrix's columns, or a listed row is beyond it.
pub fn score_rows(query: &[f32], matrix: &ItemMatrix, rows: &[u32]) -> Result<Vec<f32>> {
    assert_eq!(query.len(), matrix.num_columns(), "a query of the matrix's columns");
    let scan = Scan { queries: query, matrix, rows: Rows::Listed(rows) };
    let mut found = Vec::with_capacity(rows.len());
    scan.score(0..rows.len(), |_, block| found.extend_from_slice(block));
    match found.iter().all(|found| found.score.is_finite()) {
        true => Ok(found.into_iter().map(|found| found.score).collect()),
        false => Err(Error::NonFiniteScores { step: 0 }),
    }
}

fn check(found: &[Vec<Found>]) -> Result<()> {
    match found.iter().flatten().all(|found| found.score.is_finite()) {
        true => Ok(()),
        false => Err(Error::NonFiniteScores { step: 0 }),
    }
}

/// What all tasks of a call have in common.
struct Scan<'a> {
    queries: &'a [f32],
    matrix: &'a ItemMatrix,
    rows: Rows<'a>,
}

impl Scan<'_> {
    /// Offers the allowed ones of some places, which are rows, or places in the list of rows.
    fn run(&self, places: Range<usize>, selections: &mut [Selection]) {
        self.score(places, |query, found| selections[query].offer(found));
    }

    /// Scores the allowed ones of some places, block by block: `take` is given the number of a query
    /// and its scores.
    fn score(&self, places: Range<usize>, mut take: impl FnMut(usize, &[Found])) {
        let columns = self.matrix.num_columns();
        let per_block = (BLOCK_NUMBERS / columns).max(1);
        let (mut chosen, mut copied, mut places_of_copy) = (Vec::new(), Vec::new(), Vec::new());
        let (mut scores, mut found) = (Vec::new(), Vec::new());
        for first in places.clone().step_by(per_block) {
            let block = first..places.end.min(first + per_block);
            chosen.clear();
            match self.rows {
                Rows::All => chosen.extend(block.map(|row| row as u32)),
                Rows::Where(is_allowed) => {
                    chosen.extend(block.map(|row| row as u32).filter(|&row| is_allowed(row)));
                }
                Rows::Listed(rows) => chosen.extend_from_slice(&rows[block]),
            }
            if chosen.is_empty() {
                continue;
            }
            scores.resize(self.queries.len() / columns * chosen.len(), 0.0);
            let (matrix, rows) = match self.matrix.as_f32() {
                Some(all) => (all, &chosen),
                None => {
                    copied.resize(chosen.len() * columns, 0.0);
                    for (&row, out) in chosen.iter().zip(copied.chunks_exact_mut(columns)) {
                        self.matrix.read_row(row, out);
                    }
                    places_of_copy.clear();
                    places_of_copy.extend(0..chosen.len() as u32);
                    (&copied[..], &places_of_copy)
                }
            };
            let (queries, metric) = (self.queries, self.matrix.metric());
            Products { matrix, rows, queries, columns, metric, out: &mut scores }.dispatch();
            for (query, scores) in scores.chunks_exact(chosen.len()).enumerate() {
                found.clear();
                found.extend(chosen.iter().zip(scores).map(|(&row, score)| {
                    let score = score + self.matrix.bias(row);
                    // Every NaN is above all numbers, so that none is lost.
                    Found { row, score: if score.is_nan() { f32::NAN } else { score } }
                }));
                take(query, &found);
            }
        }
    }
}

/// The best rows of one query so far.
#[derive(Clone)]
struct Selection {
    count: usize,
    /// At most twice `count`, in no order.
    held: Vec<Found>,
    /// The worst of the `count` best so far, once there are so many.
    threshold: Option<Found>,
}

impl Selection {
    fn new(count: usize) -> Selection {
        Selection { count, held: Vec::new(), threshold: None }
    }

    fn offer(&mut self, found: &[Found]) {
        for found in found {
            let is_better = self.threshold.is_none_or(|worst| found.order(&worst).is_lt());
            if is_better && self.count > 0 {
                self.held.push(*found);
                if self.held.len() >= 2 * self.count {
                    self.cut();
                }
            }
        }
    }

    fn extend(&mut self, other: Selection) {
        self.offer(&other.held);
    }

    /// Throws all but the best away.
    fn cut(&mut self) {
        if self.held.len() >= self.count && self.count > 0 {
            let (_, worst, _) = self.held.select_nth_unstable_by(self.count - 1, Found::order);
            self.threshold = Some(*worst);
            self.held.truncate(self.count);
        }
    }

    fn finish(mut self) -> Vec<Found> {
        self.cut();
        self.held.sort_unstable_by(Found::order);
        self.held
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::{Dtype, Tensor, round_to_bf16};
    use crate::vectors::Metric;

    fn random(rng: &mut fastrand::Rng, count: usize) -> Vec<f32> {
        (0..count).map(|_| 2.0 * rng.f32() - 1.0).collect()
    }

    /// The plain truth: every allowed row scored in f64.
    fn truth(query: &[f32], rows: &[f32], columns: usize, metric: Metric) -> Vec<f64> {
        let score = |row: &[f32]| -> f64 {
            let pairs = query.iter().zip(row).map(|(a, b)| (f64::from(*a), f64::from(*b)));
            match metric {
                Metric::Dot => pairs.map(|(a, b)| a * b).sum(),
                Metric::L2 => -pairs.map(|(a, b)| (a - b) * (a - b)).sum::<f64>(),
            }
        };
        rows.chunks_exact(columns).map(score).collect()
    }

    /// Compares with scores in f64: each is near its row's own, none that is clearly better is
    /// missing, and order and number are right.
    fn check_found(
        found: &[Found],
        exact: &[f64],
        allowed: &[u32],
        count: usize,
        bound: f64,
        what: &str,
    ) {
        assert_eq!(found.len(), count.min(allowed.len()), "{what}");
        assert!(found.is_sorted_by(|a, b| a.order(b).is_lt()), "{what}");
        for found in found {
            assert!(allowed.binary_search(&found.row).is_ok(), "{what}: row {}", found.row);
            let error = (f64::from(found.score) - exact[found.row as usize]).abs();
            assert!(error < bound, "{what}: row {} is off by {error}", found.row);
        }
        let Some(worst) = found.last() else { return };
        let rows: std::collections::HashSet<u32> = found.iter().map(|found| found.row).collect();
        for &row in allowed.iter().filter(|row| !rows.contains(row)) {
            assert!(exact[row as usize] <= f64::from(worst.score) + bound, "{what}: row {row}");
        }
    }

    #[test]
    fn the_best_rows_are_those_of_brute_force_under_any_filter() {
        let mut rng = fastrand::Rng::with_seed(14);
        let sizes = [(1, 1), (2, 3), (1000, 7), (999, 50), (40_000, 64), (3000, 128), (70, 33)];
        for (num_rows, columns) in sizes {
            let values = random(&mut rng, num_rows * columns);
            let queries = random(&mut rng, 3 * columns);
            for metric in [Metric::Dot, Metric::L2] {
                let vectors = Tensor::new(&[num_rows, columns], values.clone());
                let matrix = ItemMatrix::new(vectors, None, metric).expect("a matrix");
                let coded = matrix.clone().with_codes();
                assert_eq!(coded.codes_bytes() > 0, metric == Metric::Dot);
                for share in [0.0, 0.01, 0.15, 0.5, 0.99, 1.0] {
                    let allowed: Vec<u32> =
                        (0..num_rows as u32).filter(|_| rng.f64() < share).collect();
                    let bits: Vec<bool> = (0..num_rows as u32)
                        .map(|row| allowed.binary_search(&row).is_ok())
                        .collect();
                    let is_allowed = |row: u32| bits[row as usize];
                    let mut ways = vec![Rows::Where(&is_allowed), Rows::Listed(&allowed)];
                    ways.extend((share == 1.0).then_some(Rows::All));
                    for count in [0, 1, 10, 500] {
                        let what = format!("{num_rows} x {columns} {metric:?} {share} {count}");
                        let all: Vec<_> = [&matrix, &coded]
                            .into_iter()
                            .flat_map(|matrix| ways.iter().map(move |rows| (matrix, rows)))
                            .map(|(matrix, rows)| top_products(&queries, matrix, *rows, count))
                            .collect::<Result<_>>()
                            .expect("finite numbers");
                        assert!(all.iter().all(|found| found == &all[0]), "{what}");
                        for (query, found) in queries.chunks_exact(columns).zip(&all[0]) {
                            for rows in &ways {
                                let alone = top_products(query, &coded, *rows, count);
                                assert_eq!(&alone.expect("finite numbers")[0], found, "{what}");
                            }
                            let exact = truth(query, &values, columns, metric);
                            let bound = 1e-6 * (1 + columns) as f64;
                            check_found(found, &exact, &allowed, count, bound, &what);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_score_is_the_same_in_any_company() {
        let mut rng = fastrand::Rng::with_seed(3);
        let (num_rows, columns) = (20_000, 45);
        let values = random(&mut rng, num_rows * columns);
        let queries = random(&mut rng, 5 * columns);
        let bias = Tensor::new(&[num_rows], random(&mut rng, num_rows));
        let vectors = Tensor::new(&[num_rows, columns], values);
        let matrix = ItemMatrix::new(vectors, Some(&bias), Metric::Dot).expect("a matrix");
        let together = top_products(&queries, &matrix, Rows::All, 100).expect("finite");
        let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a pool");
        for (query, together) in queries.chunks_exact(columns).zip(&together) {
            let alone = one_thread.install(|| top_products(query, &matrix, Rows::All, 100));
            assert_eq!(&alone.expect("finite")[0], together);
            let rows: Vec<u32> = together.iter().map(|found| found.row).collect();
            let scores = score_rows(query, &matrix, &rows).expect("finite");
            assert!(scores.iter().zip(together).all(|(score, found)| *score == found.score));
        }
    }

    #[test]
    fn equal_scores_go_by_the_row_and_rounded_vectors_are_read_as_they_are() {
        let vectors = Tensor::new(&[5000, 4], [1.0, 2.0, 3.0, 4.0].repeat(5000));
        let matrix = ItemMatrix::new(vectors, None, Metric::Dot).expect("a matrix");
        let found = top_products(&[1.0; 4], &matrix, Rows::All, 7).expect("finite");
        assert!(found[0].iter().map(|found| found.row).eq(0..7));

        let mut rng = fastrand::Rng::with_seed(9);
        let values = random(&mut rng, 600 * 20);
        let bits: Vec<u16> = values.iter().map(|value| round_to_bf16(*value)).collect();
        let bytes: Vec<u8> = bits.iter().flat_map(|bits| bits.to_le_bytes()).collect();
        let path = std::env::temp_dir().join(format!("sidereal-{}-bf16", std::process::id()));
        std::fs::write(&path, &bytes).expect("a writable folder");
        let mapping = crate::mapping::Mapping::open(&path, 0).expect("a file");
        let rounded = Tensor::mapped(&[600, 20], mapping.into(), 0..bytes.len(), Dtype::Bf16);
        let widened = Tensor::new(&[600, 20], rounded.to_vec());
        let query = random(&mut rng, 20);
        let [rounded, widened] = [rounded, widened].map(|vectors| {
            let matrix = ItemMatrix::new(vectors, None, Metric::Dot).expect("a matrix");
            top_products(&query, &matrix, Rows::All, 50).expect("finite")
        });
        assert_eq!(rounded, widened);
        std::fs::remove_file(&path).expect("the file of this test");
    }

    #[test]
    fn scores_that_are_no_numbers_are_an_error() {
        let vectors = Tensor::new(&[2, 2], vec![f32::MAX, f32::MAX, 1.0, 1.0]);
        let matrix = ItemMatrix::new(vectors, None, Metric::Dot).expect("a matrix");
        for query in [[f32::MAX, f32::MAX], [f32::NAN, 1.0], [f32::INFINITY, f32::NEG_INFINITY]] {
            let found = top_products(&query, &matrix, Rows::All, 1);
            assert!(matches!(found, Err(Error::NonFiniteScores { .. })), "{query:?}");
        }
        let bad = Tensor::new(&[1, 2], vec![1.0, f32::NAN]);
        assert!(matches!(
            ItemMatrix::new(bad, None, Metric::Dot),
            Err(Error::NonFiniteWeight { index: 1, .. })
        ));
    }
}
