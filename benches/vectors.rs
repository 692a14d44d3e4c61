//! The best of an item matrix for a query vector: the plain scan, and the scan of the copy in 8 bits.
//!
//! `SIDEREAL_BENCH_ROWS` sets the number of rows; one thread, 128 columns, the best 100, a filter that
//! passes 15 %.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use sidereal::Tensor;
use sidereal::vectors::{ItemMatrix, Metric, Rows, top_products};

const COLUMNS: usize = 128;
const COUNT: usize = 100;

fn vectors(criterion: &mut Criterion) {
    let rows = std::env::var("SIDEREAL_BENCH_ROWS").ok().and_then(|rows| rows.parse().ok());
    let num_rows: usize = rows.unwrap_or(1_000_000);
    let mut rng = fastrand::Rng::with_seed(1);
    let mut number = || (0..4).map(|_| rng.f32() - 0.5).sum::<f32>();
    let values = (0..num_rows * COLUMNS).map(|_| number()).collect();
    let query: Vec<f32> = (0..COLUMNS).map(|_| number()).collect();
    let queries: Vec<f32> = (0..32 * COLUMNS).map(|_| number()).collect();
    let vectors = Tensor::new(&[num_rows, COLUMNS], values);
    let plain = ItemMatrix::new(vectors, None, Metric::Dot).expect("a matrix");
    let coded = plain.clone().with_codes();
    let bits: Vec<bool> = (0..num_rows).map(|_| rng.f32() < 0.15).collect();
    let is_allowed = |row: u32| bits[row as usize];
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
    let mut group = criterion.benchmark_group("top_products");
    group.sample_size(10);
    for (name, matrix) in [("f32", &plain), ("codes", &coded)] {
        for (filter, rows) in [("all", Rows::All), ("15%", Rows::Where(&is_allowed))] {
            for (count, queries) in [(1, &query), (32, &queries)] {
                group.throughput(Throughput::Elements((count * num_rows) as u64));
                group.bench_function(format!("{name}/{filter}/{count}"), |bencher| {
                    let run = || top_products(queries, matrix, rows, COUNT).expect("finite");
                    bencher.iter(|| pool.install(run));
                });
            }
        }
    }
}

criterion_group!(benches, vectors);
criterion_main!(benches);
