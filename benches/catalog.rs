//! The catalog at industrial size: `cargo bench --bench catalog`.
//!
//! `SIDEREAL_BENCH_ITEMS=1000000,5000000,20000000` chooses the sizes; one million by default.
#![allow(missing_docs)] // criterion's macro writes a public function

use std::collections::BTreeSet;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{
    BatchSize, BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main,
};
use sidereal::backend::cpu::{CpuBackend, Head, Logits, Memory, Slot};
use sidereal::backend::prelude::*;
use sidereal::backend::{Batch, Heads, KvLayout, MemorySpec, SearchRule, SlotSpec, StepChoice};
use sidereal::catalog::allowed::AllowedSet;
use sidereal::catalog::sid::Sid;
use sidereal::catalog::{Catalog, CatalogBuilder, Change, Item, SidTable, Snapshot};
use sidereal::{CatalogWriter, Normalization, Tensor, WriterOptions};

mod baselines;

use baselines::{HashTrie, PaddedTrie};

const CODES: usize = 8192;
const LEVELS: usize = 3;
const BEAMS: usize = 512;
/// Above this, the baselines are left out: the hash maps do not fit.
const MOST_FOR_BASELINES: usize = 5_000_000;

fn sizes() -> Vec<usize> {
    let sizes = std::env::var("SIDEREAL_BENCH_ITEMS").unwrap_or_else(|_| "1000000".into());
    let size = |text: &str| text.trim().parse().expect("numbers of items, with commas between");
    sizes.split(',').map(size).collect()
}

/// Codes as a trained quantiser gives them: a few frequent ones and a long tail, at each level in
/// an order that depends on the prefix. Mean fan-out of the last level: 1.9 at one million items,
/// 2.4 at twenty.
fn sids(num_items: usize) -> Vec<[u16; LEVELS]> {
    let mut rng = fastrand::Rng::with_seed(7);
    // The more items, the more of the second level is in use.
    let skew = 4.2 + 3.0 * (2e7 / num_items as f64).log10();
    let code = |rng: &mut fastrand::Rng, prefix: u64, skew: f64| {
        let rank = (CODES as f64 * rng.f64().powf(skew)) as u64;
        // An odd factor makes another order of the codes for each prefix.
        let factor = prefix.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40 | 1;
        (rank.wrapping_mul(factor).wrapping_add(prefix >> 3) % CODES as u64) as u16
    };
    let mut sid = || {
        let first = code(&mut rng, 0, 1.3);
        let second = code(&mut rng, u64::from(first) + 1, skew);
        let third = code(&mut rng, (u64::from(first) + 1) << 13 | u64::from(second), 1.1);
        [first, second, third]
    };
    (0..num_items).map(|_| sid()).collect()
}

/// Half of the items stand in region 1, three in ten are fresh, one in twenty is adult, and each is in one of fifty
/// categories, of which a few are large.
fn tags(rng: &mut fastrand::Rng) -> Vec<String> {
    let mut tags = vec![format!("category:{}", (50.0 * rng.f32().powi(2)) as u32)];
    if rng.bool() {
        tags.push("region:1".into());
    }
    if rng.f32() < 0.3 {
        tags.push("fresh".into());
    }
    if rng.u8(0..20) == 0 {
        tags.push("adult".into());
    }
    tags
}

fn item(number: usize, sid: &[u16], rng: &mut fastrand::Rng) -> Item {
    let mut item = Item::new(number.to_string(), Sid::new(sid).expect("three levels"));
    item.tags = tags(rng);
    item
}

fn catalog(sids: &[[u16; LEVELS]]) -> Catalog {
    let mut rng = fastrand::Rng::with_seed(8);
    let mut builder = CatalogBuilder::default();
    for (number, sid) in sids.iter().enumerate() {
        builder.add(item(number, sid, &mut rng)).expect("a sound item");
    }
    builder.build().expect("names are unique")
}

/// One search that is timed step by step.
struct Search {
    backend: CpuBackend,
    memory: Memory,
    head: Head,
    /// By step.
    logits: Vec<Logits>,
    raw: Vec<Vec<f32>>,
}

impl Search {
    fn new() -> Search {
        let backend = CpuBackend::default();
        let memory = backend.memory(&MemorySpec {
            kv: KvLayout::new(1, Heads::new(1, 1, 1)),
            context_pages: 0,
            tail_pages: 0,
            rows_per_step: BEAMS,
            tokens_per_step: 0,
        });
        let memory = memory.expect("it needs none");
        let level: Vec<u32> = (0..CODES as u32).collect();
        let head = backend
            .head(Tensor::new(&[CODES, 1], vec![0.0; CODES]), &vec![level; LEVELS], &[])
            .expect("memory");
        let mut rng = fastrand::Rng::with_seed(9);
        // Normal numbers of spread two: the best codes have some percent each.
        let mut normal = || 2.0 * ((0..12).map(|_| rng.f32()).sum::<f32>() - 6.0);
        let rows = |step: usize| if step == 0 { 1 } else { BEAMS };
        let mut raw = |step: usize| (0..rows(step) * CODES).map(|_| normal()).collect();
        let raw: Vec<Vec<f32>> = (0..LEVELS).map(&mut raw).collect();
        let logits = raw.iter().map(|values| Logits::of_level(values.clone(), CODES)).collect();
        Search { backend, memory, head, logits, raw }
    }

    fn rule<'a>(&self, snapshot: &'a Snapshot, allowed_set: &'a AllowedSet) -> [SearchRule<'a>; 1] {
        [SearchRule {
            normalization: Normalization::Level,
            ..SearchRule::new(snapshot, allowed_set, 0, BEAMS)
        }]
    }

    /// The slot before a step.
    fn before(&self, step: usize, rule: &[SearchRule<'_>]) -> Vec<Slot> {
        let spec = SlotSpec {
            context_pages: Vec::new(),
            context_len: 0,
            tail_pages: Vec::new(),
            num_steps: LEVELS,
            start_token: 0,
        };
        let mut slots = vec![self.backend.open_slot(spec).expect("few steps")];
        (0..step).for_each(|step| self.advance(step, rule, &mut slots));
        slots
    }

    fn advance(&self, step: usize, rule: &[SearchRule<'_>], slots: &mut [Slot]) {
        let mut rules = [rule[0]];
        (rules[0].choice, rules[0].depth) = (StepChoice::Level(step), step);
        let batch = &mut Batch::new(&self.memory, &[], slots);
        self.backend.advance_beams(&self.logits[step], &self.head, &rules, batch);
    }

    fn log_probs(&self, step: usize) -> Vec<f32> {
        let rows = self.raw[step].chunks(CODES).flat_map(|row| {
            let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f32 = row.iter().map(|logit| (logit - largest).exp()).sum();
            row.iter().map(move |logit| logit - (largest + sum.ln()))
        });
        rows.collect()
    }
}

fn group<'a>(
    criterion: &'a mut Criterion,
    what: &str,
    num_items: usize,
) -> BenchmarkGroup<'a, criterion::measurement::WallTime> {
    let mut group = criterion.benchmark_group(format!("{what}, {num_items} items"));
    group.sample_size(10).warm_up_time(Duration::from_millis(500));
    group
}

fn build(criterion: &mut Criterion, sids: &[[u16; LEVELS]]) {
    let mut table = || {
        let mut table = SidTable::default();
        sids.iter().for_each(|sid| table.push(sid).expect("three levels"));
        table
    };
    let (trie, _) = table().build();
    let last = trie.num_leaves() as f64 / trie.nodes_at(LEVELS - 1).len() as f64;
    println!(
        "{} items: {} semantic IDs, mean fan-out of the last level {last:.2}, trie {:.2} bytes an item",
        sids.len(),
        trie.num_leaves(),
        trie.size_bytes() as f64 / sids.len() as f64,
    );
    drop(trie);
    let mut group = group(criterion, "build", sids.len());
    group.throughput(Throughput::Elements(sids.len() as u64));
    group.bench_function("trie from unsorted semantic IDs", |bencher| {
        bencher.iter_batched(&mut table, SidTable::build, BatchSize::PerIteration);
    });
    group.finish();
}

fn steps(criterion: &mut Criterion, what: &str, snapshot: &Snapshot, num_items: usize) {
    let search = Search::new();
    let mut rng = fastrand::Rng::with_seed(10);
    let excluded: BTreeSet<u32> =
        (0..4096).map(|_| rng.u32(0..snapshot.num_items() as u32)).collect();
    let excluded: Vec<u32> = excluded.into_iter().collect();
    let mut group = group(criterion, what, num_items);
    let listed: BTreeSet<u32> =
        (0..4096).map(|_| rng.u32(0..snapshot.num_items() as u32)).collect();
    let listed: Vec<u32> = listed.into_iter().collect();
    let cases = [
        ("none", &[][..], None, None),
        ("4096 excluded", &excluded[..], None, None),
        ("19 in 20 pass, 4096 excluded", &excluded, Some("!tag:adult"), None),
        ("1 in 2 pass", &[], Some("tag:region:1"), None),
        ("3 in 20 pass, 4096 excluded", &excluded, Some("tag:region:1 & tag:fresh"), None),
        ("4096 listed", &[], None, Some(&listed[..])),
        ("4096 listed, 1 in 2 pass", &[], Some("tag:region:1"), Some(&listed)),
    ];
    for (name, excluded, filter, listed) in cases {
        let mut allowed_set = snapshot.allowed_set(excluded, filter).expect("a sound filter");
        if let Some(listed) = listed {
            allowed_set = allowed_set.restricted_to(snapshot, listed);
        }
        let rule = search.rule(snapshot, &allowed_set);
        for step in 0..LEVELS {
            group.bench_function(format!("level {step}, {name}"), |bencher| {
                bencher.iter_batched(
                    || search.before(step, &rule),
                    |mut slots| {
                        search.advance(step, &rule, &mut slots);
                        slots
                    },
                    BatchSize::PerIteration,
                );
            });
        }
    }
    group.finish();
}

/// The same steps in the plain ways, which must find the same scores.
fn baseline_steps(criterion: &mut Criterion, sids: &[[u16; LEVELS]], snapshot: &Snapshot) {
    let search = Search::new();
    let mut sorted = sids.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    let (padded, hashed) = (PaddedTrie::build(&sorted), HashTrie::build(&sorted));
    let bytes = padded.size_bytes() as f64 / sids.len() as f64;
    println!("{} items: the padded trie takes {bytes:.2} bytes an item", sids.len());
    let allowed_set = snapshot.allowed_set(&[], None).expect("no filter");
    let rule = search.rule(snapshot, &allowed_set);
    let (mut of_padded, mut of_hashed) = (vec![(0.0, 0)], vec![(0.0, 0)]);
    let mut group = group(criterion, "step in the plain ways", sids.len());
    for step in 0..LEVELS {
        let log_probs = search.log_probs(step);
        group.bench_function(format!("level {step}, hash map and mask"), |bencher| {
            bencher.iter(|| hashed.step(black_box(&log_probs), CODES, &of_hashed, BEAMS));
        });
        group.bench_function(format!("level {step}, padded sparse matrix"), |bencher| {
            bencher.iter(|| padded.step(step, black_box(&log_probs), CODES, &of_padded, BEAMS));
        });
        let found = [
            hashed.step(&log_probs, CODES, &of_hashed, BEAMS),
            padded.step(step, &log_probs, CODES, &of_padded, BEAMS),
        ];
        let slots = search.before(step + 1, &rule);
        let ours = search
            .backend
            .read_beams(&[&slots[0]])
            .pop()
            .expect("one slot")
            .expect("finite scores");
        for theirs in &found {
            assert_eq!(theirs.len(), ours.len());
            for (ours, (theirs, _)) in ours.iter().zip(theirs) {
                let ours = ours.score;
                assert!((ours - theirs).abs() < 1e-3, "{ours} and {theirs} should be equal");
            }
        }
        // The same beams for all: the order of two as good as equal ones may differ.
        of_hashed = ours.iter().map(|beam| (beam.score, hashed.node(&beam.tokens))).collect();
        of_padded = ours.iter().map(|beam| (beam.score, padded.node(&beam.tokens))).collect();
    }
    group.finish();
}

fn filters(criterion: &mut Criterion, snapshot: &Snapshot, num_items: usize) {
    let mut group = group(criterion, "filter", num_items);
    let mut rng = fastrand::Rng::with_seed(11);
    let text = |number: u32| format!("tag:region:1 & !tag:category:3 & !tag:none:{number}");
    group.bench_function("three tags, never asked before", |bencher| {
        bencher
            .iter(|| snapshot.allowed_set(&[], Some(&text(rng.u32(..)))).expect("a sound filter"));
    });
    let known = text(0);
    group.bench_function("three tags, asked before", |bencher| {
        bencher.iter(|| snapshot.allowed_set(&[], Some(&known)).expect("a sound filter"));
    });
    let names: Vec<String> = (0..4096).map(|_| rng.usize(0..num_items).to_string()).collect();
    let numbers: BTreeSet<u32> = names.iter().filter_map(|name| snapshot.find(name)).collect();
    let numbers: Vec<u32> = numbers.into_iter().collect();
    group.bench_function("allowed set of 4096 excluded", |bencher| {
        bencher.iter(|| snapshot.allowed_set(&numbers, None).expect("no filter"));
    });
    group.bench_function("allowed set of 4096 listed", |bencher| {
        let all = snapshot.allowed_set(&[], None).expect("no filter");
        bencher.iter(|| all.restricted_to(snapshot, &numbers));
    });
    group.bench_function("finding 4096 names", |bencher| {
        bencher.iter(|| names.iter().filter_map(|name| snapshot.find(name)).count());
    });
    group.finish();
}

/// Changes a second, in batches, with the compilations in the background that they bring about.
fn changes(criterion: &mut Criterion, catalog: &Arc<Catalog>, sids: &[[u16; LEVELS]]) {
    let options = WriterOptions::default();
    let writer = CatalogWriter::in_memory(Arc::clone(catalog), &options).expect("a thread");
    let mut group = group(criterion, "change", sids.len());
    let mut rng = fastrand::Rng::with_seed(12);
    let (mut next_new, mut next_old) = (sids.len(), 0);
    for batch in [1usize, 500] {
        group.throughput(Throughput::Elements(batch as u64));
        group.bench_function(format!("insert, {batch} at once"), |bencher| {
            bencher.iter_custom(|iterations| {
                let mut taken = Duration::ZERO;
                for _ in 0..iterations {
                    let mut change = |_| {
                        next_new += 1;
                        let sid = sids[rng.usize(0..sids.len())];
                        let sid = [sid[0], sid[1], rng.u16(0..CODES as u16)];
                        Change::Put(item(next_new, &sid, &mut rng))
                    };
                    let batch: Vec<Change> = (0..batch).map(&mut change).collect();
                    let start = Instant::now();
                    writer.apply(&batch).expect("sound changes");
                    taken += start.elapsed();
                }
                taken
            });
        });
    }
    let known = catalog.snapshot();
    let all: Vec<u32> = known.all_items().collect();
    group.throughput(Throughput::Elements(500));
    group.bench_function("put again as it is, 500 at once", |bencher| {
        let items = (0..500).map(|_| known.item(all[rng.usize(0..all.len())]));
        let batch: Vec<Change> = items.map(Change::Put).collect();
        bencher.iter(|| writer.apply(&batch).expect("sound changes"));
    });
    for batch in [1usize, 2000] {
        group.throughput(Throughput::Elements(batch as u64));
        group.bench_function(format!("delete, {batch} at once"), |bencher| {
            bencher.iter_custom(|iterations| {
                let mut taken = Duration::ZERO;
                for _ in 0..iterations {
                    let mut change = |_| {
                        next_old = (next_old + 7919) % sids.len();
                        Change::Delete { item: next_old.to_string() }
                    };
                    let batch: Vec<Change> = (0..batch).map(&mut change).collect();
                    let start = Instant::now();
                    writer.apply(&batch).expect("sound changes");
                    taken += start.elapsed();
                }
                taken
            });
        });
    }
    group.finish();
}

fn all(criterion: &mut Criterion) {
    for num_items in sizes() {
        let mut sids = sids(num_items);
        build(criterion, &sids);
        let start = Instant::now();
        let built = catalog(&sids);
        println!("{num_items} items: built with names and tags in {:.1?}", start.elapsed());
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("catalog.sidereal");
        built.save(&path).expect("room on the disk");
        let opened = Arc::new(Catalog::open(&path).expect("the file just written"));
        let bytes = opened.snapshot().base().file_bytes().expect("a file");
        println!("{num_items} items: file of {:.2} bytes an item", bytes as f64 / num_items as f64);
        drop(built);
        let mut load = group(criterion, "load", num_items);
        load.bench_function("open by memory map, all checks", |bencher| {
            bencher.iter(|| Catalog::open(&path).expect("the file just written"));
        });
        load.finish();
        let snapshot = opened.snapshot();
        filters(criterion, &snapshot, num_items);
        steps(criterion, "step", &snapshot, num_items);
        if num_items <= MOST_FOR_BASELINES {
            baseline_steps(criterion, &sids, &snapshot);
        }
        changes(criterion, &opened, &sids);
        drop((snapshot, opened));

        // One node with every code as its child: the rest must not pay for it.
        let fullest = sids[0];
        sids.extend((0..CODES as u16).map(|code| [fullest[0], fullest[1], code]));
        let mut table = CatalogBuilder::default();
        for (number, sid) in sids.iter().enumerate() {
            let sid = Sid::new(sid).expect("three levels");
            table.add(Item::new(number.to_string(), sid)).expect("a sound item");
        }
        let full = table.build().expect("names are unique").snapshot();
        let search = Search::new();
        let allowed_set = full.allowed_set(&[], None).expect("no filter");
        let rule = search.rule(&full, &allowed_set);
        let mut group = group(criterion, "step with one node of 8192 children", num_items);
        for step in 0..LEVELS {
            group.bench_function(format!("level {step}, none"), |bencher| {
                bencher.iter_batched(
                    || search.before(step, &rule),
                    |mut slots| {
                        search.advance(step, &rule, &mut slots);
                        slots
                    },
                    BatchSize::PerIteration,
                );
            });
        }
        group.finish();
    }
}

criterion_group!(benches, all);
criterion_main!(benches);
