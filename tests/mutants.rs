//! Bugs that are planted in the kernels are found: by the emulator's checks or by a wrong result.
//!
//! Without g++ on x86-64 Linux these tests are ignored.

mod common;

use std::collections::HashMap;
use std::path::Path;
use std::slice;
use std::sync::Arc;

use common::emulator::Emulator;
use common::kernels::{Build, Kernels};
use common::truth::{self, Matrix, worst_row};
use sidereal::backend::cuda::CudaBackend;
use sidereal::backend::prelude::*;
use sidereal::backend::testing::{Cases, Fixture};
use sidereal::backend::{AttentionSpec, Batch, Heads, KvScope, Mask};
use sidereal::{Dtype, Tensor};

/// What a bug is looked for with: an operation, and what may be wrong with it.
type Check = fn(&CudaBackend<Emulator>) -> Result<(), String>;

/// Fails where the device failed or any row of `columns` numbers is wrong.
fn compare(
    backend: &CudaBackend<Emulator>,
    found: &<CudaBackend<Emulator> as DeviceOps>::Buffer,
    expected: &Matrix,
    columns: usize,
) -> Result<(), String> {
    compare_within(backend, found, expected, columns, 2e-2)
}

fn compare_within(
    backend: &CudaBackend<Emulator>,
    found: &<CudaBackend<Emulator> as DeviceOps>::Buffer,
    expected: &Matrix,
    columns: usize,
    bound: f64,
) -> Result<(), String> {
    let found = backend.download(found).map_err(|error| error.to_string())?;
    if let Some(at) = found.iter().position(|value| !value.is_finite()) {
        return Err(format!("wrong: {} at {at}", found[at]));
    }
    match worst_row(&found, &expected.values, columns, "mutant") {
        (_, error) if error < bound => Ok(()),
        (row, error) => Err(format!("wrong: relative error {error:.1e} of row {row}")),
    }
}

fn check_rms_norm(backend: &CudaBackend<Emulator>) -> Result<(), String> {
    let mut cases = Cases::new(1);
    let (x, weight) = (cases.numbers(3 * 500), cases.numbers(500));
    let mut out = backend.buffer();
    let vector = backend.vector(&[Tensor::new(&[500], weight.clone())]).expect("memory");
    backend.rms_norm(&backend.upload(&x, 500), &vector, 1e-6, &mut out);
    let weight = Matrix::new(&weight, 500);
    let expected = truth::rms_norm(&Matrix::new(&x, 500), &weight.values, 1e-6);
    compare(backend, &out, &expected, 500)?;

    let rows = truth::rows_of_many_small_squares();
    let (x, columns): (Vec<f32>, usize) =
        (rows.values.iter().map(|&x| x as f32).collect(), rows.columns);
    let ones = Tensor::new(&[columns], vec![1.0; columns]);
    let vector = backend.vector(&[ones]).expect("memory");
    backend.rms_norm(&backend.upload(&x, columns), &vector, 1e-6, &mut out);
    let expected = truth::rms_norm(&rows, &vec![1.0; columns], 1e-6);
    // Only the result is rounded to bf16.
    compare_within(backend, &out, &expected, columns, 5e-3)
}

const HEADS: Heads = Heads::new(4, 2, 64);

/// Causal attention of a prompt of 200 tokens: four pages, the last one ragged.
fn check_prefill(backend: &CudaBackend<Emulator>) -> Result<(), String> {
    check_prefill_of(backend, HEADS)
}

fn check_prefill_of_128(backend: &CudaBackend<Emulator>) -> Result<(), String> {
    check_prefill_of(backend, Heads::new(2, 1, 128))
}

fn check_prefill_of(backend: &CudaBackend<Emulator>, heads: Heads) -> Result<(), String> {
    let mut cases = Cases::new(2);
    let mut fixture = Fixture::new(backend, heads).expect("memory");
    let qkv = cases.numbers(200 * heads.qkv_dim());
    let (whole, mut slots) = (0..200, [fixture.slot(200)]);
    let x = backend.upload(&qkv, heads.qkv_dim());
    let batch = Batch::new(&fixture.memory, slice::from_ref(&whole), &mut slots);
    let mut out = backend.buffer();
    backend.store_context(0, &x, heads.query_dim(), heads, &batch);
    let attention = AttentionSpec::softmax(heads, Mask::Causal, 0.3);
    backend.attend_prefill(0, &x, &attention, &batch, &mut out);
    let qkv = Matrix::new(&qkv, heads.qkv_dim());
    let scale = f64::from(0.3f32);
    let expected = truth::attend_prefill(&qkv, heads, Mask::Causal, scale, |_, _| 0.0, &[200]);
    compare(backend, &out, &expected, heads.head_dim())
}

/// The one beam of a search over a context of 100 tokens and itself.
fn check_beams(backend: &CudaBackend<Emulator>) -> Result<(), String> {
    let mut cases = Cases::new(3);
    let mut fixture = Fixture::new(backend, HEADS).expect("memory");
    let qkv = cases.numbers(101 * HEADS.qkv_dim());
    let (prompt, beam) = qkv.split_at(100 * HEADS.qkv_dim());
    let (whole, mut slots) = (0..100, [fixture.slot(100)]);
    let x = backend.upload(prompt, HEADS.qkv_dim());
    let batch = Batch::new(&fixture.memory, slice::from_ref(&whole), &mut slots);
    backend.store_context(0, &x, HEADS.query_dim(), HEADS, &batch);
    let x = backend.upload(beam, HEADS.qkv_dim());
    let mut batch = Batch::new(&fixture.memory, &[], &mut slots);
    backend.append_tail(0, &x, HEADS, &mut batch);
    let mut out = backend.buffer();
    let attention = AttentionSpec::softmax(HEADS, KvScope::Both, 0.3);
    backend.attend_beams(0, &x, &attention, &batch, &mut out);
    // The beam is what the last of 101 tokens is.
    let all = Matrix::new(&qkv, HEADS.qkv_dim());
    let scale = f64::from(0.3f32);
    let all = truth::attend_prefill(&all, HEADS, Mask::Causal, scale, |_, _| 0.0, &[101]);
    let values = all.row(100).to_vec();
    let expected = Matrix { values, columns: HEADS.query_dim() };
    compare(backend, &out, &expected, HEADS.head_dim())
}

/// Number types, and the device whose attention multiplies by warpgroups.
#[derive(Clone, Copy)]
enum On {
    F32,
    Bf16,
    Warpgroups,
}

impl On {
    fn backend(self, kernels: Arc<Kernels>) -> CudaBackend<Emulator> {
        let device = Emulator::new(kernels);
        match self {
            On::F32 => CudaBackend::new(device, Dtype::F32),
            On::Bf16 => CudaBackend::new(device, Dtype::Bf16),
            On::Warpgroups => CudaBackend::new(device.with_warpgroups(), Dtype::Bf16),
        }
    }
}

struct Mutant {
    name: &'static str,
    file: &'static str,
    /// What is replaced, and by what.
    change: (&'static str, &'static str),
    check: Check,
    on: On,
    /// What is said of it.
    found_as: &'static str,
}

const BARRIER_AND_LOAD: &str = "\
      __syncthreads();  // the page is there, and nobody reads the one before any more
      if (page + 1 < tile.page_to) {
        load_page(context_keys<bf16>(pages, next, tile.layer, tile.kv_head), page + 1,
                  tile.context_len, buffer ^ 1, buffer ^ 1);
";
const LOAD_AND_BARRIER: &str = "\
      if (page + 1 < tile.page_to)
        load_page(context_keys<bf16>(pages, next, tile.layer, tile.kv_head), page + 1,
                  tile.context_len, buffer ^ 1, buffer ^ 1);
      __syncthreads();
      if (page + 1 < tile.page_to) {
";

const MUTANTS: [Mutant; 16] = [
    Mutant {
        name: "a missing barrier",
        file: "rms_norm.cu",
        change: ("  __syncthreads();\n", ""),
        check: check_rms_norm,
        on: On::F32,
        found_as: "read of uninitialised shared memory: 'sums'",
    },
    Mutant {
        name: "a barrier that some threads skip",
        file: "rms_norm.cu",
        change: ("  __syncthreads();\n", "  if (threadIdx.x < 64) __syncthreads();\n"),
        check: check_rms_norm,
        on: On::F32,
        found_as: "race on shared 'sums'+0: read at",
    },
    Mutant {
        name: "a write past the end of shared memory",
        file: "rms_norm.cu",
        change: ("sums[threadIdx.x / kWarpSize] = sum", "sums[threadIdx.x / kWarpSize + 1] = sum"),
        check: check_rms_norm,
        on: On::F32,
        found_as: "out-of-bounds shared write of 4 bytes: offset 32 in 'sums'",
    },
    Mutant {
        name: "a shuffle among half of the lanes",
        file: "common/device.cuh",
        change: ("value += __shfl_xor_sync(kAllLanes,", "value += __shfl_xor_sync(0x0000ffffu,"),
        check: check_rms_norm,
        on: On::F32,
        found_as: "lane 0 reads lane 16, which does not take part (mask 0x0000ffff)",
    },
    Mutant {
        name: "a page too far",
        file: "common/attention.cuh",
        change: (
            "next = batch.pages[tile.first_page + page + 2];",
            "next = batch.pages[tile.first_page + page + 3];",
        ),
        check: check_prefill,
        on: On::Bf16,
        found_as: "read of uninitialised global memory: 'contexts'",
    },
    Mutant {
        name: "a mask that lets the next token be seen",
        file: "common/attention.cuh",
        change: ("min(position + 1, context_len)", "min(position + 2, context_len)"),
        check: check_prefill,
        on: On::Bf16,
        found_as: "wrong",
    },
    Mutant {
        name: "a mask that lets one token be seen across the edge of a page",
        file: "common/attention.cuh",
        change: (
            "min(position + 1, context_len)",
            "min(position + 1 + (position % kPageLen == kPageLen - 1), context_len)",
        ),
        check: check_prefill,
        on: On::Bf16,
        found_as: "wrong",
    },
    Mutant {
        name: "a sum of squares in bf16",
        file: "rms_norm.cu",
        change: (
            "sum += widened(unit.values[k]) * widened(unit.values[k]);\n    return sum;",
            "sum = widened(narrowed<bf16>(sum + widened(unit.values[k]) * widened(unit.values[k])));\n    return sum;",
        ),
        check: check_rms_norm,
        on: On::Bf16,
        found_as: "wrong",
    },
    Mutant {
        name: "a copy that is not waited for",
        file: "common/attention.cuh",
        change: (
            "      wait_for_copies<0>();\n      __syncthreads();  // the page is there",
            "      __syncthreads();  // the page is there",
        ),
        check: check_prefill,
        on: On::Bf16,
        found_as: "in flight",
    },
    Mutant {
        name: "a buffer that is refilled while it is read",
        file: "common/attention.cuh",
        // The next page is asked for before all threads have read the one before.
        change: (BARRIER_AND_LOAD, LOAD_AND_BARRIER),
        check: check_prefill,
        on: On::Bf16,
        found_as: "race on shared",
    },
    Mutant {
        name: "a write past the end of a buffer",
        file: "rms_norm.cu",
        change: ("out[threadIdx.x] = weighted(", "out[threadIdx.x + 1] = weighted("),
        check: check_rms_norm,
        on: On::F32,
        found_as: "write outside every device buffer: 0 bytes past the end of 'activations'",
    },
    Mutant {
        name: "a product of warpgroups that is not waited for",
        file: "common/warpgroup_attention.cuh",
        change: ("      wait_for_products<1>(scores[0]);\n", "      settle(scores[0]);\n"),
        check: check_prefill,
        on: On::Warpgroups,
        found_as: "wrong",
    },
    Mutant {
        name: "a page that is refilled while warpgroups multiply by it",
        file: "common/warpgroup_attention.cuh",
        change: (
            "(page - 1 - tile.page_from) % kValueBuffers);\n      load",
            "(page - 2 - tile.page_from) % kValueBuffers);\n      load",
        ),
        check: check_prefill,
        on: On::Warpgroups,
        found_as: "uninitialised",
    },
    Mutant {
        name: "panels that lie too near",
        file: "common/warpgroup_attention.cuh",
        change: ("kPanelBytes = kPageLen * kSwizzledRowBytes", "kPanelBytes = kPageLen * 64"),
        check: check_prefill_of_128,
        on: On::Warpgroups,
        found_as: "wrong",
    },
    Mutant {
        name: "rows that are swizzled by another row",
        file: "common/attention.cuh",
        change: ("(column % kPanel ^ row % 8 * 8)", "(column % kPanel ^ (row + 1) % 8 * 8)"),
        check: check_prefill,
        on: On::Warpgroups,
        found_as: "wrong",
    },
    Mutant {
        name: "a tail whose newest row is left out",
        file: "attend_beams.cu",
        change: ("search.num_steps + 1 - from : 0", "search.num_steps - from : 0"),
        check: check_beams,
        on: On::Bf16,
        found_as: "wrong",
    },
];

fn source(file: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels").join(file);
    std::fs::read_to_string(path).expect("a kernel's source")
}

#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn the_kernels_are_sound_and_some_planted_bugs_are_found() {
    for check in [check_rms_norm, check_prefill, check_beams] {
        for on in [On::F32, On::Bf16, On::Warpgroups] {
            check(&on.backend(Kernels::load(Build::Checked))).expect("the kernels are sound");
        }
    }
    find(&MUTANTS[..FEW]);
}

#[test]
#[ignore = "a sweep; run it by name"]
fn the_other_planted_bugs_are_found() {
    find(&MUTANTS[FEW..]);
}

/// Those that every run of the tests plants.
const FEW: usize = 5;

fn find(mutants: &[Mutant]) {
    for Mutant { name, file, change, check, on, found_as } in mutants {
        let text = source(file);
        assert_eq!(text.matches(change.0).count(), 1, "{name}: {:?} in {file}", change.0);
        let replaced = HashMap::from([(*file, text.replace(change.0, change.1))]);
        let kernels = Arc::new(Kernels::compile(Build::Checked, &replaced));
        let backend = on.backend(kernels);
        let error = match check(&backend) {
            Ok(()) => panic!("{name} is not found"),
            Err(error) => error,
        };
        println!("{name}: {error}");
        assert!(error.contains(found_as), "{name} is found as {error}");
    }
}
