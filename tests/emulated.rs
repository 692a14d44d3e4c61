//! The operations of the CUDA backend, its kernels executed by the emulator, in f32 and bf16.
//!
//! Without g++ on x86-64 Linux these tests are ignored. So are the sweeps, which try more cases of the
//! same: `cargo test --test emulated -- --ignored` runs them.

mod common;

use std::ops::Range;
use std::slice;

use common::emulator::{Emulator, Faults};
use common::kernels::{Build, Kernels};
use common::operations::Subject;
use common::truth::{self, Matrix, relative_error};
use sidereal::backend::cpu::CpuBackend;
use sidereal::backend::cuda::CudaBackend;
use sidereal::backend::prelude::*;
use sidereal::backend::testing::{self, Cases, Fixture, OPERATIONS};
use sidereal::backend::{AttentionSpec, Batch, Beam, Heads, KvScope, Mask, SearchRule};
use sidereal::catalog::allowed::AllowedSet;
use sidereal::catalog::sid::Sid;
use sidereal::catalog::{Catalog, CatalogBuilder, Item, Snapshot};
use sidereal::{Dtype, Tensor};

struct EmulatedF32<const SHARE: u64>;

impl<const SHARE: u64> Subject for EmulatedF32<SHARE> {
    type B = CudaBackend<Emulator>;
    const TOLERANCE: f64 = 1e-5;
    const SCORE_TOLERANCE: f64 = 1e-4;

    fn open() -> CudaBackend<Emulator> {
        Emulator::backend(Build::Checked, Dtype::F32)
    }

    fn seeds(most: u64) -> Range<u64> {
        0..(most / SHARE).max(2)
    }
}

struct EmulatedBf16<const SHARE: u64>;

impl<const SHARE: u64> Subject for EmulatedBf16<SHARE> {
    type B = CudaBackend<Emulator>;
    const TOLERANCE: f64 = 2e-2;
    const SCORE_TOLERANCE: f64 = 0.1;

    fn open() -> CudaBackend<Emulator> {
        Emulator::backend(Build::Checked, Dtype::Bf16)
    }

    fn seeds(most: u64) -> Range<u64> {
        0..(most / SHARE).max(2)
    }
}

/// Bf16 on a device that multiplies by warpgroups: attention has kernels of its own there.
struct EmulatedWarpgroups<const SHARE: u64>;

impl<const SHARE: u64> Subject for EmulatedWarpgroups<SHARE> {
    type B = CudaBackend<Emulator>;
    const TOLERANCE: f64 = 2e-2;
    const SCORE_TOLERANCE: f64 = 0.1;

    fn open() -> CudaBackend<Emulator> {
        let device = Emulator::new(Kernels::load(Build::Checked)).with_warpgroups();
        CudaBackend::new(device, Dtype::Bf16)
    }

    fn seeds(most: u64) -> Range<u64> {
        0..(most / SHARE).max(2)
    }
}

/// Of the cases that the CPU is tried on, one in so many.
const FEW: u64 = 24;
const MANY: u64 = 5;

mod f32 {
    crate::operation_tests!(
        super::EmulatedF32<{ super::FEW }>,
        cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")
    );
}

mod bf16 {
    crate::operation_tests!(
        super::EmulatedBf16<{ super::FEW }>,
        cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")
    );
}

mod f32_sweep {
    crate::operation_tests!(
        super::EmulatedF32<{ super::MANY }>,
        ignore = "a sweep; run it by name"
    );
}

mod bf16_sweep {
    crate::operation_tests!(
        super::EmulatedBf16<{ super::MANY }>,
        ignore = "a sweep; run it by name"
    );
}

/// The cases of `sidereal selftest`.
#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn every_operation_agrees_with_the_cpu_on_the_cases_of_the_selftest() {
    check_selftest(0..1);
}

#[test]
#[ignore = "a sweep; run it by name"]
fn sweep_of_the_cases_of_the_selftest() {
    check_selftest(1..6);
}

fn check_selftest(seeds: Range<u64>) {
    let cpu = CpuBackend::default();
    for (dtype, tolerance) in [(Dtype::F32, 1e-5), (Dtype::Bf16, 2e-2)] {
        let backend = Emulator::backend(Build::Checked, dtype);
        for operation in OPERATIONS {
            for seed in seeds.clone() {
                let expected = testing::run(&cpu, operation, seed).expect("the CPU works");
                let found = testing::run(&backend, operation, seed).expect("the device works");
                let expected: Vec<f64> = expected.iter().map(|&x| f64::from(x)).collect();
                let what = format!("{operation} {dtype:?} case {seed}");
                let error = relative_error(&found, &expected, &what);
                assert!(error < tolerance, "{what}: {error:.1e}");
            }
        }
    }
}

/// Items whose codes are small more often than not, as in real catalogs.
fn catalog(cases: &mut Cases, num_items: usize, num_levels: usize, num_codes: u32) -> Catalog {
    let mut builder = CatalogBuilder::default();
    for item in 0..num_items {
        let code = |_| (cases.rng.f32() * cases.rng.f32() * num_codes as f32) as u16;
        let codes: Vec<u16> = (0..num_levels).map(code).collect();
        let mut item = Item::new(item.to_string(), Sid::new(&codes).expect("few levels"));
        item.tags = if cases.rng.u8(0..7) == 0 { vec!["rare".into()] } else { Vec::new() };
        item.available = cases.rng.u8(0..20) > 0;
        builder.add(item).expect("levels agree");
    }
    builder.build().expect("names are unique")
}

/// Searches of so many beams each, through all levels; the hidden rows are the same on all devices.
fn search<B: Backend>(
    backend: &B,
    snapshot: &Snapshot,
    legalities: &[AllowedSet],
    widths: &[usize],
    num_codes: u32,
) -> Vec<Vec<Beam>> {
    const HIDDEN: usize = 16;
    let mut cases = Cases::new(5);
    let num_levels = snapshot.num_levels();
    let levels: Vec<Vec<u32>> = (0..num_levels as u32)
        .map(|level| (3 + level * num_codes..3 + (level + 1) * num_codes).collect())
        .collect();
    let vocab = 3 + num_levels * num_codes as usize;
    let head = Tensor::new(&[vocab, HIDDEN], cases.numbers(vocab * HIDDEN));
    let head = backend.head(head, &levels, &[]).expect("memory");
    let hidden: Vec<Vec<f32>> =
        legalities.iter().map(|_| cases.numbers(num_levels * 512 * HIDDEN)).collect();
    let mut fixture = Fixture::new(backend, Heads::new(1, 1, 2)).expect("memory");
    let mut slots: Vec<B::Slot> = legalities.iter().map(|_| fixture.slot(1)).collect();
    let mut logits = backend.logits();
    for level in 0..num_levels {
        let rows = slots.iter().zip(&hidden).flat_map(|(slot, hidden)| {
            let first = level * 512 * HIDDEN;
            &hidden[first..first + backend.num_beams(slot) * HIDDEN]
        });
        let rows = backend.upload(&rows.copied().collect::<Vec<f32>>(), HIDDEN);
        let rules: Vec<SearchRule<'_>> = legalities
            .iter()
            .zip(widths)
            .map(|(allowed_set, &width)| SearchRule::new(snapshot, allowed_set, level, width))
            .collect();
        let mut pass = Batch::new(&fixture.memory, &[], &mut slots);
        backend.lm_head(&rows, &head, &rules, &mut pass, &mut logits);
        backend.advance_beams(&logits, &head, &rules, &mut pass);
    }
    let slots: Vec<&B::Slot> = slots.iter().collect();
    let beams = backend.read_beams(&slots).into_iter();
    beams.map(|beams| beams.expect("finite scores")).collect()
}

/// Widths of one and of 512, thousands of continuations in many parts, filters, exclusions, one
/// legal item and none.
#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn searches_of_any_width_choose_as_on_the_cpu() {
    let mut cases = Cases::new(6);
    let catalog = catalog(&mut cases, 8000, 3, 1500);
    let snapshot = catalog.snapshot();
    let all: Vec<u32> = snapshot.all_items().collect();
    let some: Vec<u32> = all.iter().copied().filter(|_| cases.rng.bool()).collect();
    let last = all.iter().rposition(|&item| snapshot.is_available(item)).expect("some are");
    let all_but_one: Vec<u32> = all.iter().copied().filter(|&item| item != all[last]).collect();
    let allowed_set =
        |excluded: &[u32], filter| snapshot.allowed_set(excluded, filter).expect("a sound filter");
    let legalities = [
        allowed_set(&[], None),
        allowed_set(&[], None),
        allowed_set(&some, None),
        allowed_set(&some[..5], Some("tag:rare")),
        allowed_set(&all_but_one, None),
        allowed_set(&all, None),
        allowed_set(&[], Some("tag:none")),
    ];
    let widths = [512, 1, 512, 100, 20, 20, 20];
    let expected = search(&CpuBackend::default(), &snapshot, &legalities, &widths, 1500);
    let backend = Emulator::backend(Build::Checked, Dtype::F32);
    let found = search(&backend, &snapshot, &legalities, &widths, 1500);
    let counts: Vec<usize> = found.iter().map(Vec::len).collect();
    assert_eq!(counts, expected.iter().map(Vec::len).collect::<Vec<_>>());
    assert_eq!(counts, [512, 1, 512, 100, 1, 0, 0]);
    for (search, (expected, found)) in expected.iter().zip(&found).enumerate() {
        for (rank, (expected, found)) in expected.iter().zip(found).enumerate() {
            let difference = (expected.score - found.score).abs();
            assert!(difference < 1e-4, "search {search} rank {rank}: {found:?}, not {expected:?}");
        }
        let same = expected.iter().zip(found).filter(|(a, b)| a.tokens == b.tokens).count();
        assert!(same * 20 >= expected.len() * 19, "search {search}: {same} are the same");
    }
}

/// Attention of so many beams over a context, against the truth.
fn attend(dtype: Dtype, heads: Heads, context_len: usize, width: usize) -> f64 {
    attend_on(&Emulator::backend(Build::Checked, dtype), heads, context_len, width)
}

fn attend_on(
    backend: &CudaBackend<Emulator>,
    heads: Heads,
    context_len: usize,
    width: usize,
) -> f64 {
    let mut cases = Cases::new(7);
    let catalog = catalog(&mut cases, 4 * width, 1, 16 * width as u32);
    let snapshot = catalog.snapshot();
    let allowed_set = snapshot.allowed_set(&[], None).expect("no filter");
    let mut fixture = Fixture::new(backend, heads).expect("memory");
    let mut slots = vec![fixture.slot(context_len)];
    let kv = cases.numbers(context_len * 2 * heads.kv_dim());
    let whole = 0..context_len;
    let batch = Batch::new(&fixture.memory, slice::from_ref(&whole), &mut slots);
    let rows = backend.upload(&kv, 2 * heads.kv_dim());
    backend.store_context(0, &rows, 0, heads, &batch);

    let levels = [(0..16 * width as u32).collect()];
    let head = Tensor::new(&[16 * width, 8], cases.numbers(16 * width * 8));
    let (head, mut logits) = (backend.head(head, &levels, &[]).expect("memory"), backend.logits());
    let rules = [SearchRule::new(&snapshot, &allowed_set, 0, width)];
    let hidden = backend.upload(&cases.numbers(8), 8);
    let mut pass = Batch::new(&fixture.memory, &[], &mut slots);
    backend.lm_head(&hidden, &head, &rules, &mut pass, &mut logits);
    backend.advance_beams(&logits, &head, &rules, &mut pass);
    let beams = backend.read_beams(&[&slots[0]]).remove(0).expect("finite scores");
    assert_eq!(beams.len(), width);

    let qkv = cases.numbers(width * heads.qkv_dim());
    let rows = backend.upload(&qkv, heads.qkv_dim());
    let mut batch = Batch::new(&fixture.memory, &[], &mut slots);
    backend.append_tail(0, &rows, heads, &mut batch);
    let mut out = backend.buffer();
    let attention = AttentionSpec::softmax(heads, KvScope::Both, 0.3);
    backend.attend_beams(0, &rows, &attention, &batch, &mut out);
    let found = backend.download(&out).expect("the device works");

    let (kv, qkv) = (Matrix::new(&kv, 2 * heads.kv_dim()), Matrix::new(&qkv, heads.qkv_dim()));
    let mut expected = Vec::new();
    for row in qkv.rows() {
        let (queries, own) = row.split_at(heads.query_dim());
        for (head, query) in queries.chunks(heads.head_dim()).enumerate() {
            let at = head / (heads.num_heads / heads.num_kv_heads) * heads.head_dim();
            let parts = |kv| {
                let (keys, values): (&[f64], &[f64]) = <[f64]>::split_at(kv, heads.kv_dim());
                (&keys[at..at + heads.head_dim()], &values[at..at + heads.head_dim()], 0.0)
            };
            let seen: Vec<_> = kv.rows().chain([own]).map(parts).collect();
            expected.extend(truth::attend(query, &seen, f64::from(0.3f32)));
        }
    }
    relative_error(&found, &expected, "attend_beams")
}

#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn attention_holds_for_contexts_of_one_and_of_5000_and_widths_of_one_and_of_512() {
    let heads = |num_heads, num_kv_heads, head_dim| Heads::new(num_heads, num_kv_heads, head_dim);
    for (context_len, width) in [(1, 1), (5000, 1), (65, 512), (64, 40)] {
        for head_dim in [64, 128] {
            let error = attend(Dtype::Bf16, heads(2, 1, head_dim), context_len, width);
            assert!(error < 2e-2, "bf16 {head_dim} {context_len} {width}: {error:.1e}");
        }
        let error = attend(Dtype::F32, heads(2, 1, 8), context_len, width);
        assert!(error < 1e-5, "f32 {context_len} {width}: {error:.1e}");
    }
    // Heads of other sizes do without tensor cores.
    assert!(attend(Dtype::Bf16, heads(3, 3, 24), 200, 20) < 2e-2);
}

#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn attention_by_warpgroups_holds_for_prompts_and_beams() {
    check_warpgroups::<FEW>();
}

#[test]
#[ignore = "a sweep; run it by name"]
fn sweep_of_attention_by_warpgroups() {
    check_warpgroups::<10>();
}

fn check_warpgroups<const SHARE: u64>() {
    use common::operations;

    operations::attend_prefill_is_the_formula_however_prompts_are_cut::<EmulatedWarpgroups<SHARE>>(
    );
    operations::attention_is_the_formula_for_every_row_at_the_edges_of_pages::<
        EmulatedWarpgroups<SHARE>,
    >();
    for (context_len, width) in [(1, 1), (600, 3), (64, 40), (130, 200)] {
        for head_dim in [64, 128] {
            let backend = EmulatedWarpgroups::<FEW>::open();
            let error = attend_on(&backend, Heads::new(2, 1, head_dim), context_len, width);
            assert!(error < 2e-2, "{head_dim} {context_len} {width}: {error:.1e}");
        }
    }
}

/// What attention makes of a prompt of 300 tokens, read in two passes and with and without a bias,
/// and of 256 beams behind it, over three positions of their tails. A device of fewer processors is
/// full with fewer tiles of more rows (`tile_rows` in src/backend/cuda/tiling.rs is tested there).
fn attend_in_tiles(heads: Heads, device: Emulator) -> Vec<f32> {
    let backend = CudaBackend::new(device, Dtype::Bf16);
    let mut cases = Cases::new(9);
    let mut fixture = Fixture::new(&backend, heads).expect("memory");
    let mut found = Vec::new();
    let qkv = cases.numbers(300 * heads.qkv_dim());
    let bias = cases.numbers(heads.num_heads * 599);
    let mut slots = [fixture.slot(300)];
    for chunk in [0..130, 130..300] {
        let rows = &qkv[chunk.start * heads.qkv_dim()..chunk.end * heads.qkv_dim()];
        let x = backend.upload(rows, heads.qkv_dim());
        let chunks = slice::from_ref(&chunk);
        let batch = Batch::new(&fixture.memory, chunks, &mut slots);
        backend.store_context(0, &x, heads.query_dim(), heads, &batch);
        let mut out = backend.buffer();
        for bias in [None, Some(&bias[..])] {
            let mut causal = AttentionSpec::softmax(heads, Mask::Causal, 0.3);
            causal.bias = bias;
            backend.attend_prefill(0, &x, &causal, &batch, &mut out);
            found.extend(backend.download(&out).expect("the device works"));
        }
    }

    const WIDTH: usize = 256;
    let catalog = catalog(&mut cases, 4 * WIDTH, 3, 512);
    let snapshot = catalog.snapshot();
    let allowed_set = snapshot.allowed_set(&[], None).expect("no filter");
    let levels = [0, 512, 1024].map(|first| (first..first + 512).collect());
    let head = Tensor::new(&[1536, 8], cases.numbers(1536 * 8));
    let (head, mut logits) = (backend.head(head, &levels, &[]).expect("memory"), backend.logits());
    // A context of three pages is not split.
    let mut slots = [fixture.slot(190)];
    let kv = backend.upload(&cases.numbers(190 * 2 * heads.kv_dim()), 2 * heads.kv_dim());
    let whole = 0..190;
    let batch = Batch::new(&fixture.memory, slice::from_ref(&whole), &mut slots);
    backend.store_context(0, &kv, 0, heads, &batch);
    for level in 0..3 {
        let rules = [SearchRule::new(&snapshot, &allowed_set, level, WIDTH)];
        let hidden =
            backend.upload(&cases.numbers(WIDTH * 8)[..backend.num_beams(&slots[0]) * 8], 8);
        let mut pass = Batch::new(&fixture.memory, &[], &mut slots);
        backend.lm_head(&hidden, &head, &rules, &mut pass, &mut logits);
        backend.advance_beams(&logits, &head, &rules, &mut pass);
        let rows = backend.num_beams(&slots[0]);
        let x = backend.upload(&cases.numbers(rows * heads.qkv_dim()), heads.qkv_dim());
        let mut batch = Batch::new(&fixture.memory, &[], &mut slots);
        backend.append_tail(0, &x, heads, &mut batch);
        let mut out = backend.buffer();
        let over_both = AttentionSpec::softmax(heads, KvScope::Both, 0.3);
        backend.attend_beams(0, &x, &over_both, &batch, &mut out);
        let beams = backend.read_beams(&[&slots[0]]).remove(0).expect("finite scores");
        let out = backend.download(&out).expect("the device works");
        found.extend_from_slice(&out[..beams.len() * heads.query_dim()]);
    }
    found
}

/// The company of a request chooses the size of tiles, and must not change its answer.
#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn tiles_of_64_and_of_128_rows_give_the_same_bits() {
    check_tiles(&[(BY_WARPS, 6, 2, 64)]);
}

#[test]
#[ignore = "a sweep; run it by name"]
fn sweep_of_tiles_of_64_and_of_128_rows() {
    let by_warpgroups = Emulator::with_warpgroups;
    check_tiles(&[(BY_WARPS, 4, 2, 64), (BY_WARPS, 4, 2, 128)]);
    check_tiles(&[(by_warpgroups, 6, 2, 64), (by_warpgroups, 4, 2, 128)]);
}

const BY_WARPS: fn(Emulator) -> Emulator = |device| device;

/// Heads by what multiplies them.
type Tiled = (fn(Emulator) -> Emulator, usize, usize, usize);

fn check_tiles(cases: &[Tiled]) {
    for &(by, num_heads, num_kv_heads, head_dim) in cases {
        let heads = Heads::new(num_heads, num_kv_heads, head_dim);
        let attend = |num_processors| {
            let device = Emulator::new(Kernels::load(Build::Checked));
            attend_in_tiles(heads, by(device.with_processors(num_processors)))
        };
        let (wide, narrow) = (attend(1), attend(1000));
        let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert!(bits(&wide) == bits(&narrow), "{heads:?}");
    }
}

/// GPUs of compute capability 8.6 and 8.9 have 99 KiB.
#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn attention_takes_tiles_that_the_device_has_shared_memory_for() {
    let backend = |dtype| {
        let device = Emulator::new(Kernels::load(Build::Checked)).with_shared_bytes(99 << 10);
        CudaBackend::new(device, dtype)
    };
    let heads = |head_dim| Heads::new(2, 1, head_dim);
    for head_dim in [64, 128] {
        assert!(attend_on(&backend(Dtype::Bf16), heads(head_dim), 130, 100) < 2e-2);
    }
    let backend = backend(Dtype::F32);
    assert!(attend_on(&backend, heads(128), 130, 20) < 1e-5);
    let error = Fixture::new(&backend, heads(1024)).err().expect("it does not fit");
    assert!(error.to_string().contains("heads of 1024"), "{error}");
}

/// Attention of the beams of some of ten slots, all in one pass: by slot, its rows.
fn attend_in_company(
    backend: &CudaBackend<Emulator>,
    heads: Heads,
    slots_of_pass: &[usize],
) -> Vec<Vec<f32>> {
    const CODES: usize = 200;
    let sizes = [
        (700, 20),
        (1, 1),
        (64, 100),
        (2000, 7),
        (300, 100),
        (65, 3),
        (900, 1),
        (520, 64),
        (1500, 2),
        (1100, 30),
    ];
    let catalog = catalog(&mut Cases::new(9), 4 * CODES, 1, CODES as u32);
    let snapshot = catalog.snapshot();
    let allowed_set = snapshot.allowed_set(&[], None).expect("no filter");
    let levels = [(0..CODES as u32).collect::<Vec<u32>>()];
    let head = Tensor::new(&[CODES, 8], Cases::new(10).numbers(CODES * 8));
    let (head, mut logits) = (backend.head(head, &levels, &[]).expect("memory"), backend.logits());
    let mut fixture = Fixture::new(backend, heads).expect("memory");
    let mut cases: Vec<Cases> =
        slots_of_pass.iter().map(|&slot| Cases::new(20 + slot as u64)).collect();
    let mut slots: Vec<_> = slots_of_pass.iter().map(|&slot| fixture.slot(sizes[slot].0)).collect();
    for (index, &slot) in slots_of_pass.iter().enumerate() {
        let (context_len, slots) = (sizes[slot].0, &mut slots[index..=index]);
        let kv = cases[index].numbers(context_len * 2 * heads.kv_dim());
        let (kv, whole) = (backend.upload(&kv, 2 * heads.kv_dim()), 0..context_len);
        let batch = Batch::new(&fixture.memory, slice::from_ref(&whole), slots);
        backend.store_context(0, &kv, 0, heads, &batch);
    }
    let hidden: Vec<f32> = cases.iter_mut().flat_map(|cases| cases.numbers(8)).collect();
    let rules: Vec<SearchRule<'_>> = slots_of_pass
        .iter()
        .map(|&slot| SearchRule::new(&snapshot, &allowed_set, 0, sizes[slot].1))
        .collect();
    let mut pass = Batch::new(&fixture.memory, &[], &mut slots);
    backend.lm_head(&backend.upload(&hidden, 8), &head, &rules, &mut pass, &mut logits);
    backend.advance_beams(&logits, &head, &rules, &mut pass);
    let rows: Vec<usize> = slots.iter().map(|slot| backend.num_beams(slot)).collect();
    let qkv =
        cases.iter_mut().zip(&rows).flat_map(|(cases, rows)| cases.numbers(rows * heads.qkv_dim()));
    let qkv = backend.upload(&qkv.collect::<Vec<f32>>(), heads.qkv_dim());
    let mut batch = Batch::new(&fixture.memory, &[], &mut slots);
    backend.append_tail(0, &qkv, heads, &mut batch);
    let mut out = backend.buffer();
    let attention = AttentionSpec::softmax(heads, KvScope::Both, 0.3);
    backend.attend_beams(0, &qkv, &attention, &batch, &mut out);
    let out = backend.download(&out).expect("the device works");
    let mut rest = &out[..];
    let of_slot = rows.iter().map(|rows| {
        let (of_slot, others) = rest.split_at(rows * heads.query_dim());
        rest = others;
        of_slot.to_vec()
    });
    of_slot.collect()
}

/// The contexts of all are split differently, and tiles take the widest slot's size.
#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn attention_of_a_slot_has_the_same_bits_alone_and_beside_nine_others() {
    let heads = |num_heads, head_dim| Heads::new(num_heads, 1, head_dim);
    let by_warps: fn(Emulator) -> Emulator = |device| device;
    for (dtype, heads, by) in [
        (Dtype::F32, heads(1, 8), by_warps),
        (Dtype::F32, heads(2, 24), by_warps),
        (Dtype::Bf16, heads(2, 64), by_warps),
        (Dtype::Bf16, heads(1, 128), by_warps),
        (Dtype::Bf16, heads(2, 64), Emulator::with_warpgroups),
        (Dtype::Bf16, heads(2, 16), by_warps),
    ] {
        let attend = |slots: &[usize]| {
            let device = by(Emulator::new(Kernels::load(Build::Plain)));
            attend_in_company(&CudaBackend::new(device, dtype), heads, slots)
        };
        let together = attend(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        assert!(together.iter().flatten().any(|&x| x != 0.0));
        for (slot, expected) in together.iter().enumerate() {
            let alone = attend(&[slot]).remove(0);
            assert!(alone == *expected, "{dtype:?} {heads:?}: slot {slot} depends on the others");
        }
        let reversed = attend(&[9, 8, 7, 0]);
        assert!(reversed[3] == together[0] && reversed[0] == together[9], "{dtype:?} {heads:?}");
    }
}

#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn a_step_that_panics_while_it_is_captured_ends_its_capture() {
    let device = Emulator::new(Kernels::load(Build::Plain));
    with_steps(device, |backend, step| {
        step(&mut || {});
        step(&mut || {});
        let replays = backend.traffic().replays;
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            step(&mut || panic!("as it should"))
        }));
        assert!(panicked.is_err());
        assert_eq!(backend.traffic().replays, replays, "nothing of it was done");
        // Memory can be taken, written, read and given back.
        let buffer = backend.upload(&[1.0, 2.0], 1);
        assert_eq!(backend.download(&buffer).expect("the device works"), [1.0, 2.0]);
    });
}

/// Runs one step of one shape, which does something more at its end, and returns the beams.
type StepFn<'a> = &'a mut dyn FnMut(&mut dyn FnMut()) -> Vec<Beam>;

/// Calls `test` with a backend on a device, and with steps on it.
fn with_steps(device: Emulator, test: impl FnOnce(&CudaBackend<Emulator>, StepFn<'_>)) {
    let backend = CudaBackend::new(device, Dtype::F32);
    let mut cases = Cases::new(8);
    let catalog = catalog(&mut cases, 50, 2, 10);
    let snapshot = catalog.snapshot();
    let allowed_set = snapshot.allowed_set(&[], None).expect("no filter");
    let levels = [0, 10].map(|first| (first..first + 10).collect());
    let head = Tensor::new(&[20, 8], cases.numbers(20 * 8));
    let (head, mut logits) = (backend.head(head, &levels, &[]).expect("memory"), backend.logits());
    let hidden = backend.upload(&cases.numbers(8), 8);
    let heads = Heads::new(1, 1, 2);
    let mut fixture = Fixture::new(&backend, heads).expect("memory");
    test(&backend, &mut |more: &mut dyn FnMut()| {
        let mut slots = [fixture.slot(1)];
        let mut batch = Batch::new(&fixture.memory, &[], &mut slots);
        let rules = [SearchRule::new(&snapshot, &allowed_set, 0, 5)];
        backend.step(&mut batch, &head, &rules, &mut logits, |batch, logits| {
            backend.lm_head(&hidden, &head, &rules, batch, logits);
            backend.advance_beams(logits, &head, &rules, batch);
            more();
        });
        assert_eq!(backend.num_steps(&slots[0]), 1, "a step counts once");
        backend.read_beams(&[&slots[0]]).remove(0).expect("finite scores")
    });
}

#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn a_step_that_cannot_be_captured_is_run_eagerly_from_then_on() {
    use std::sync::atomic::{AtomicBool, Ordering};
    type Fault = fn(&Faults) -> &AtomicBool;
    let faults: [Fault; 3] = [
        |faults| &faults.refuses_begin,
        |faults| &faults.refuses_end,
        |faults| &faults.refuses_captured_launches,
    ];
    for fault in faults {
        let device = Emulator::new(Kernels::load(Build::Plain));
        let faults = device.faults();
        fault(&faults).store(true, Ordering::Relaxed);
        with_steps(device, |backend, step| {
            let expected = step(&mut || {});
            assert_eq!(expected.len(), 5);
            for _ in 0..6 {
                assert_eq!(step(&mut || {}), expected);
            }
            let traffic = backend.traffic();
            assert_eq!((traffic.captures, traffic.abandoned_captures, traffic.replays), (0, 1, 0));
            // It stays so where the fault is gone.
            fault(&faults).store(false, Ordering::Relaxed);
            assert_eq!(step(&mut || {}), expected);
            assert_eq!(backend.traffic().captures, 0);
        });
    }
}

#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn a_capture_without_the_plan_of_a_product_ends_and_is_made_up_for_later() {
    use std::sync::atomic::Ordering;
    let device = Emulator::new(Kernels::load(Build::Plain));
    let faults = device.faults();
    with_steps(device, |backend, step| {
        let expected = step(&mut || {});
        step(&mut || {});
        faults.forgets_plans.store(true, Ordering::Relaxed);
        assert_eq!(step(&mut || {}), expected, "it is run eagerly");
        let traffic = backend.traffic();
        assert_eq!((traffic.captures, traffic.abandoned_captures), (0, 1));
        for _ in 0..4 {
            assert_eq!(step(&mut || {}), expected);
        }
        let traffic = backend.traffic();
        assert_eq!((traffic.captures, traffic.abandoned_captures), (1, 1));
        assert!(traffic.replays > 0);
    });
}

#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn products_that_the_library_refuses_are_done_by_a_kernel_and_counted() {
    use std::sync::atomic::Ordering;
    let expected = {
        let mut beams = Vec::new();
        let device = Emulator::new(Kernels::load(Build::Plain));
        with_steps(device, |backend, step| {
            beams = step(&mut || {});
            assert_eq!(backend.traffic().refused_products, 0);
        });
        beams
    };
    let device = Emulator::new(Kernels::load(Build::Plain));
    device.faults().refuses_products.store(true, Ordering::Relaxed);
    with_steps(device, |backend, step| {
        for _ in 0..4 {
            let found = step(&mut || {});
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(&expected) {
                assert_eq!(found.tokens, expected.tokens);
                assert!((found.score - expected.score).abs() < 1e-5);
            }
        }
        let traffic = backend.traffic();
        assert!(traffic.refused_products > 0 && traffic.replays > 0, "{traffic:?}");
    });
}

#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn memory_that_grows_or_goes_in_a_capture_ends_it_and_is_freed_afterwards() {
    for drops in [false, true] {
        let device = Emulator::new(Kernels::load(Build::Plain));
        let memory = device.memory();
        let free = || memory.load(std::sync::atomic::Ordering::Relaxed);
        with_steps(device, |backend, step| {
            let (small, large) =
                (backend.upload(&[1.0; 8], 4), backend.upload(&vec![1.0; 4_000], 4));
            let weight = backend.vector(&[Tensor::new(&[4], vec![1.0; 4])]).expect("memory");
            let mut out = Some(backend.buffer());
            let mut calls = 0;
            let mut expected = None;
            let mut free_before = 0;
            for round in 0..7 {
                let beams = step(&mut || {
                    calls += 1;
                    match (calls, drops) {
                        (3, true) => out = None,
                        _ => {
                            let x = if calls < 3 { &small } else { &large };
                            let out = out.get_or_insert_with(|| backend.buffer());
                            backend.rms_norm(x, &weight, 1e-6, out);
                        }
                    }
                });
                assert_eq!(beams, *expected.get_or_insert_with(|| beams.clone()), "{round}");
                if round == 1 {
                    free_before = free();
                }
            }
            let traffic = backend.traffic();
            assert_eq!((traffic.captures, traffic.abandoned_captures), (1, 1), "{traffic:?}");
            let out = out.expect("the last calls need it");
            let norms = backend.download(&out).expect("the device works");
            assert!(norms.iter().all(|norm| (norm - 1.0).abs() < 1e-3));
            assert_eq!(free_before - free(), 4_000 * 4 - 8 * 4, "the smaller one was freed");
        });
    }
}
