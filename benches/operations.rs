//! The operations at the shapes of real models: `cargo bench --bench operations`.
#![allow(missing_docs)] // criterion's macro writes a public function

use std::hint::black_box;
use std::slice;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use sidereal::Normalization;
use sidereal::backend::cpu::{Buffer, CpuBackend};
use sidereal::backend::prelude::*;
use sidereal::backend::testing::{Cases, Fixture};
use sidereal::backend::{AttentionSpec, Batch, Epilogue, Heads, KvScope, Mask, SearchRule};
use sidereal::catalog::allowed::AllowedSet;
use sidereal::catalog::sid::Sid;
use sidereal::catalog::{Catalog, CatalogBuilder, Item, Snapshot};
use sidereal::{Dtype, Tensor};

const TIGER: Heads = Heads::new(6, 6, 64);

fn matmul(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("matmul");
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let backend = CpuBackend::new(dtype).expect("no instructions are asked for");
        let mut cases = Cases::new(1);
        for (rows, num_in, num_out) in [
            (50, 128, 1152),
            (50, 1024, 128),
            (128, 128, 1024),
            (10, 1024, 6144),
            (50, 1024, 6144),
            (512, 1024, 3072),
        ] {
            let weight = Tensor::new(&[num_out, num_in], cases.numbers(num_out * num_in));
            let weight = backend.matrix(&[weight]).expect("memory");
            let x = Buffer::new(cases.numbers(rows * num_in), num_in);
            let mut out = backend.buffer();
            group.throughput(Throughput::Elements(2 * (rows * num_in * num_out) as u64));
            let name = format!("{} {rows}x{num_in}x{num_out}", dtype.name());
            group.bench_function(BenchmarkId::from_parameter(name), |bencher| {
                bencher.iter(|| {
                    backend.matmul(black_box(&x), &weight, None, Epilogue::Store, &mut out);
                });
            });
        }
    }
    group.finish();
}

fn attention(criterion: &mut Criterion) {
    let backend = CpuBackend::default();
    let mut cases = Cases::new(2);
    let mut group = criterion.benchmark_group("attend_prefill");
    for tokens in [81, 301] {
        let qkv = Buffer::new(cases.numbers(tokens * TIGER.qkv_dim()), TIGER.qkv_dim());
        let mut fixture = Fixture::new(&backend, TIGER).expect("memory");
        let (chunk, mut slots) = (0..tokens, [fixture.slot(tokens)]);
        let batch = Batch::new(&fixture.memory, slice::from_ref(&chunk), &mut slots);
        let mut out = backend.buffer();
        group.bench_function(BenchmarkId::from_parameter(tokens), |bencher| {
            bencher.iter(|| {
                let attention = AttentionSpec::softmax(TIGER, Mask::Bidirectional, 1.0);
                backend.store_context(0, &qkv, TIGER.query_dim(), TIGER, &batch);
                backend.attend_prefill(0, &qkv, &attention, &batch, &mut out);
            });
        });
    }
    group.finish();
}

fn random_catalog(cases: &mut Cases, items: usize) -> Catalog {
    let mut builder = CatalogBuilder::default();
    for item in 0..items {
        let codes: Vec<u16> =
            (0..3).map(|_| (cases.rng.f32() * cases.rng.f32() * 256.0) as u16).collect();
        let sid = Sid::new(&codes).expect("three levels");
        let item = Item::new(item.to_string(), sid);
        builder.add(item).expect("levels agree");
    }
    builder.build().expect("names are unique")
}

fn rule<'a>(
    snapshot: &'a Snapshot,
    allowed_set: &'a AllowedSet,
    level: usize,
    beams: usize,
) -> SearchRule<'a> {
    SearchRule {
        normalization: Normalization::Level,
        ..SearchRule::new(snapshot, allowed_set, level, beams)
    }
}

/// A search of two levels, then attention over context and tails, and the third level.
fn search(criterion: &mut Criterion) {
    let backend = CpuBackend::default();
    let mut cases = Cases::new(3);
    let catalog = random_catalog(&mut cases, 100_000).snapshot();
    let levels = [0, 256, 512].map(|first| (first..first + 256).collect());
    let head = Tensor::new(&[3026, 128], cases.numbers(3026 * 128));
    let head = backend.head(head, &levels, &[]).expect("memory");
    let mut logits = backend.logits();
    for beams in [50, 128, 512] {
        let mut fixture = Fixture::new(&backend, TIGER).expect("memory");
        let excluded: Vec<u32> = (0..catalog.num_items() as u32).step_by(50).collect();
        let mut group = criterion.benchmark_group("advance_beams, three levels");
        for (name, excluded) in [("all items", &[][..]), ("2000 excluded", &excluded[..])] {
            let name = BenchmarkId::new(name, beams);
            let spec = fixture.spec(81);
            let allowed_set = catalog.allowed_set(excluded, None).expect("no filter");
            group.bench_function(name, |bencher| {
                bencher.iter(|| {
                    let mut slots = vec![backend.open_slot(spec.clone()).expect("few steps")];
                    for level in 0..3 {
                        let rows = backend.num_beams(&slots[0]);
                        let hidden = Buffer::new(vec![0.5; rows * 128], 128);
                        let rules = [rule(&catalog, &allowed_set, level, beams)];
                        let mut pass = Batch::new(&fixture.memory, &[], &mut slots);
                        backend.lm_head(&hidden, &head, &rules, &mut pass, &mut logits);
                        backend.advance_beams(&logits, &head, &rules, &mut pass);
                    }
                    backend.read_beams(&[&slots[0]])
                });
            });
        }
        group.finish();
    }
    let mut group = criterion.benchmark_group("attend_beams");
    for (beams, context) in [(50, 81), (128, 301)] {
        let mut fixture = Fixture::new(&backend, TIGER).expect("memory");
        let mut slots = vec![fixture.slot(context)];
        let kv = Buffer::new(cases.numbers(context * 2 * TIGER.kv_dim()), 2 * TIGER.kv_dim());
        let whole = 0..context;
        let batch = Batch::new(&fixture.memory, slice::from_ref(&whole), &mut slots);
        backend.store_context(0, &kv, 0, TIGER, &batch);
        let allowed_set = catalog.allowed_set(&[], None).expect("no filter");
        let hidden = Buffer::new(cases.numbers(128), 128);
        let rules = [rule(&catalog, &allowed_set, 0, beams)];
        let mut pass = Batch::new(&fixture.memory, &[], &mut slots);
        backend.lm_head(&hidden, &head, &rules, &mut pass, &mut logits);
        backend.advance_beams(&logits, &head, &rules, &mut pass);
        let rows = backend.num_beams(&slots[0]);
        let qkv = Buffer::new(cases.numbers(rows * TIGER.qkv_dim()), TIGER.qkv_dim());
        let mut batch = Batch::new(&fixture.memory, &[], &mut slots);
        backend.append_tail(0, &qkv, TIGER, &mut batch);
        let mut out = backend.buffer();
        group.bench_function(
            BenchmarkId::from_parameter(format!("{rows} beams, {context}")),
            |b| {
                b.iter(|| {
                    let attention = AttentionSpec::softmax(TIGER, KvScope::Both, 0.1);
                    backend.attend_beams(0, &qkv, &attention, &batch, &mut out);
                });
            },
        );
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(30);
    targets = matmul, attention, search
}
criterion_main!(benches);
