//! The emulator itself: what it computes, and what it finds.
//!
//! Without g++ on x86-64 Linux these tests are ignored.

mod common;

use std::collections::HashMap;
use std::sync::Arc;

use common::emulator::Emulator;
use common::kernels::{Build, Kernels, Schedule};
use sidereal::backend::cuda::{CudaBackend, Driver};
use sidereal::backend::prelude::*;
use sidereal::{Dtype, Tensor};

/// Kernels that do one thing each. Their parameter is two pointers and a number.
const SOURCE: &str = r#"
#include "common/device.cuh"

struct Params {
  float* out;
  const float* in;
  uint32_t count, padding;
};

KERNEL(shuffles, Params, 32) {
  const int lane = int(threadIdx.x);
  params.out[lane] = __shfl_xor_sync(kAllLanes, params.in[lane], 5);
  params.out[32 + lane] = __shfl_up_sync(kAllLanes, params.in[lane], 3);
  params.out[64 + lane] = __shfl_sync(kAllLanes, params.in[lane], 7, 8);
  const unsigned odd = __ballot_sync(kAllLanes, lane % 2);
  params.out[96 + lane] = odd == 0xaaaaaaaau ? 1.0f : 0.0f;
}

KERNEL(counts, Params, 256) {
  const int count = __syncthreads_count(params.in[threadIdx.x] > 0);
  params.out[threadIdx.x] = float(count);
}

KERNEL(product, Params, 32) {
  SHARED(bf16, a, 16 * 16);
  SHARED(bf16, b, 16 * 16);
  const uint32_t lane = threadIdx.x;
  for (uint32_t i = lane; i < 256; i += 32) {
    a[i] = __float2bfloat16(params.in[i]);
    b[i] = __float2bfloat16(params.in[256 + i]);
  }
  __syncwarp();
  uint32_t left[4], right[4];
  ldmatrix(left, a + lane % 16 * 16 + lane / 16 * 8);
  ldmatrix_transposed(right, b + lane % 16 * 16 + lane / 16 * 8);
  float d[2][4] = {};
  mma(d[0], left, right[0], right[1]);
  mma(d[1], left, right[2], right[3]);
  for (uint32_t half = 0; half < 2; half++)
    for (uint32_t i = 0; i < 4; i++)
      params.out[(lane / 4 + i / 2 * 8) * 16 + half * 8 + lane % 4 * 2 + i % 2] = d[half][i];
}

KERNEL(copies, Params, 32) {
  SHARED(float, tile, 32 * 4);
  copy_async(tile + threadIdx.x * 4, params.in + threadIdx.x * 4, threadIdx.x < params.count);
  commit_copies();
  wait_for_copies<0>();
  __syncwarp();
  for (uint32_t i = threadIdx.x; i < 32 * 4; i += 32) params.out[i] = tile[i];
}

KERNEL(sums_by_blocks, Params, 64) {
  atomicAdd(params.out, params.in[blockIdx.x * 64 + threadIdx.x]);
}

KERNEL(writes_of_two_blocks, Params, 32) { params.out[threadIdx.x] = float(blockIdx.x); }

KERNEL(half_a_warp_waits, Params, 32) {
  if (threadIdx.x < 16) __syncwarp();
  params.out[threadIdx.x] = 1;
  __syncthreads();
}

KERNEL(two_barriers, Params, 64) {
  if (threadIdx.x < 32) __syncthreads();
  else
    __syncthreads();
}

KERNEL(misaligned, Params, 32) {
  if (threadIdx.x > 0) return;
  *reinterpret_cast<float4*>(params.out) = *reinterpret_cast<const float4*>(params.in + 1);
}

KERNEL(past_the_end, Params, 32) { params.out[threadIdx.x] = params.in[params.count]; }

KERNEL(lost_write, Params, 64) {
  SHARED(float, cell, 1);
  if (threadIdx.x == 32) cell[0] = params.in[0];
  __syncwarp();
  if (threadIdx.x == 0) params.out[0] = cell[0];
}

KERNEL(unwritten_shared, Params, 32) {
  SHARED(float, cells, 33);
  cells[threadIdx.x] = 1;
  params.out[threadIdx.x] = cells[threadIdx.x + 1];
}

KERNEL(past_a_shared_array, Params, 32) {
  SHARED(float, cells, 32);
  cells[threadIdx.x] = 1;
  __syncwarp();
  params.out[threadIdx.x] = cells[threadIdx.x + params.count];
}

KERNEL(copy_without_wait, Params, 32) {
  SHARED(float, tile, 32 * 4);
  copy_async(tile + threadIdx.x * 4, params.in + threadIdx.x * 4, true);
  commit_copies();
}
"#;

struct Bench {
    kernels: Arc<Kernels>,
    backend: CudaBackend<Emulator>,
}

impl Bench {
    fn new() -> Bench {
        let source = HashMap::from([("emulator_tests.cu", SOURCE.to_string())]);
        let kernels = Arc::new(Kernels::compile(Build::Checked, &source));
        let backend = CudaBackend::new(Emulator::new(Arc::clone(&kernels)), Dtype::F32);
        Bench { kernels, backend }
    }

    /// What a kernel makes of some numbers.
    fn run(
        &self,
        kernel: &str,
        blocks: u32,
        threads: u32,
        input: &[f32],
        outputs: usize,
        count: u32,
    ) -> Result<Vec<f32>, String> {
        let input = self.backend.upload(input, 1);
        let output = self.backend.upload(&vec![0.0; outputs], 1);
        let mut params = Vec::new();
        params.extend_from_slice(&output.address().to_le_bytes());
        params.extend_from_slice(&input.address().to_le_bytes());
        params.extend_from_slice(&u64::from(count).to_le_bytes());
        let launched = self.kernels.launch(kernel, [blocks, 1, 1], threads, 0, &params);
        launched.map_err(|error| error.to_string())?;
        Ok(self.backend.download(&output).expect("it did not fail"))
    }
}

fn rising(count: usize) -> Vec<f32> {
    (0..count).map(|i| i as f32).collect()
}

#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn threads_do_together_what_the_language_says() {
    let bench = Bench::new();
    for schedule in [Schedule::Ascending, Schedule::Descending, Schedule::Random(3)] {
        bench.kernels.set_schedule(schedule);
        let run = |kernel, blocks, threads, input: &[f32], outputs, count| {
            bench.run(kernel, blocks, threads, input, outputs, count).expect("a sound kernel")
        };
        let out = run("shuffles", 1, 32, &rising(32), 128, 0);
        for lane in 0..32 {
            assert_eq!(out[lane] as usize, lane ^ 5);
            assert_eq!(out[32 + lane] as usize, if lane < 3 { lane } else { lane - 3 });
            assert_eq!(out[64 + lane] as usize, lane / 8 * 8 + 7);
            assert_eq!(out[96 + lane], 1.0);
        }
        let signs: Vec<f32> = (0..256).map(|i| if i % 3 == 0 { 1.0 } else { -1.0 }).collect();
        assert_eq!(run("counts", 1, 256, &signs, 256, 0), vec![86.0; 256]);

        let mut cases = sidereal::backend::testing::Cases::new(4);
        let input = cases.numbers(512);
        let out = run("product", 1, 32, &input, 256, 0);
        for row in 0..16 {
            for column in 0..16 {
                let expected: f32 =
                    (0..16).map(|k| input[row * 16 + k] * input[256 + k * 16 + column]).sum();
                assert!((out[row * 16 + column] - expected).abs() < 1e-5);
            }
        }
        let out = run("copies", 1, 32, &rising(128), 128, 20);
        let expected = rising(128).into_iter().enumerate();
        let expected = expected.map(|(i, x)| if i < 80 { x } else { 0.0 });
        assert_eq!(out, expected.collect::<Vec<f32>>(), "what is not wanted is zero");
        assert_eq!(run("sums_by_blocks", 4, 64, &vec![1.0; 256], 1, 0), [256.0]);
    }
    bench.kernels.set_schedule(Schedule::Ascending);
}

#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn what_a_device_would_not_tell_is_reported_with_kernel_block_and_thread() {
    let bench = Bench::new();
    let error = |kernel, blocks, threads| {
        let found = bench.run(kernel, blocks, threads, &rising(64), 64, 64);
        let error = found.expect_err(&format!("{kernel} is not sound"));
        assert!(error.contains(&format!("kernel {kernel}, block (")), "{error}");
        assert!(error.contains("thread ("), "{error}");
        error
    };
    let two = error("writes_of_two_blocks", 2, 32);
    assert!(two.contains("race on global"), "{two}");
    assert!(two.contains("emulator_tests.cu:"), "the lines are named: {two}");
    let waits = error("half_a_warp_waits", 1, 32);
    assert!(waits.contains("deadlock") && waits.contains("__syncwarp"), "{waits}");
    assert!(waits.contains("threads 0-15"), "{waits}");
    let divergent = error("two_barriers", 1, 64);
    assert!(divergent.contains("divergent __syncthreads"), "{divergent}");
    assert!(error("misaligned", 1, 32).contains("misaligned 16-byte read"));
    let past = error("past_the_end", 1, 32);
    assert!(past.contains("0 bytes past the end of 'activations' (256 bytes)"), "{past}");
    // The one thread reads before the other writes, or without waiting for it.
    let early = error("lost_write", 1, 64);
    assert!(early.contains("read of uninitialised shared memory: 'cell'+0"), "{early}");
    bench.kernels.set_schedule(Schedule::Descending);
    let lost = error("lost_write", 1, 64);
    assert!(lost.contains("race on shared 'cell'+0: read at"), "{lost}");
    assert!(lost.contains("earlier write by block (0,0,0) thread 32"), "{lost}");
    bench.kernels.set_schedule(Schedule::Ascending);
    let unwritten = error("unwritten_shared", 1, 32);
    assert!(unwritten.contains("read of uninitialised shared memory: 'cells'+4"), "{unwritten}");
    let past = error("past_a_shared_array", 1, 32);
    // The last lane to arrive goes on first.
    assert!(past.contains("out-of-bounds shared read of 4 bytes: offset 380"), "{past}");
    assert!(error("copy_without_wait", 1, 32).contains("never waited for"));
}

#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn memory_of_the_device_that_nobody_wrote_is_not_read() {
    let bench = Bench::new();
    let device = Emulator::new(Arc::clone(&bench.kernels));
    let memory = device.allocate(32 * 4, "unwritten").expect("no failure").expect("memory");
    let output = bench.backend.upload(&[0.0; 128], 1);
    let mut params = Vec::new();
    params.extend_from_slice(&output.address().to_le_bytes());
    params.extend_from_slice(&memory.to_le_bytes());
    params.extend_from_slice(&0u64.to_le_bytes());
    let launched = bench.kernels.launch("shuffles", [1, 1, 1], 32, 0, &params);
    let error = launched.expect_err("nobody wrote it").to_string();
    assert!(error.contains("kernel shuffles, block (0,0,0), thread (0,0,0)"), "{error}");
    assert!(error.contains("read of uninitialised global memory: 'unwritten'+0"), "{error}");
    assert!(error.contains("emulator_tests.cu:"), "{error}");
}

#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn a_launch_that_cannot_be_is_refused() {
    let bench = Bench::new();
    let refused = |kernel, blocks, threads| {
        bench.run(kernel, blocks, threads, &rising(64), 64, 0).expect_err("it cannot be")
    };
    assert!(refused("no_such_kernel", 1, 32).contains("there is no kernel no_such_kernel"));
    assert!(refused("shuffles", 1, 64).contains("at most 32 threads"));
    assert!(refused("shuffles", 0, 32).contains("cannot be launched"));
    let launched = bench.kernels.launch("shuffles", [1, 1, 1], 32, 0, &[0; 8]);
    let error = launched.expect_err("it has other parameters").to_string();
    assert!(error.contains("takes 24 bytes of parameters and was given 8"), "{error}");
}

#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn a_device_that_failed_stays_failed_and_says_why() {
    let mutant =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/kernels/rms_norm.cu"))
            .expect("a kernel's source")
            .replace("  __syncthreads();\n", "");
    let kernels = Kernels::compile(Build::Checked, &HashMap::from([("rms_norm.cu", mutant)]));
    let backend = CudaBackend::new(Emulator::new(Arc::new(kernels)), Dtype::F32);
    let x = backend.upload(&rising(64), 64);
    let weight = backend.vector(&[Tensor::new(&[64], rising(64))]).expect("memory");
    let mut out = backend.buffer();
    backend.rms_norm(&x, &weight, 1e-6, &mut out);
    let first = backend.check().expect_err("a barrier is missing").to_string();
    assert!(first.contains("kernel rms_norm_f32"), "{first}");
    let launches = backend.traffic().launches;
    backend.rms_norm(&x, &weight, 1e-6, &mut out);
    assert_eq!(backend.traffic().launches, launches, "nothing is launched after a failure");
    assert_eq!(backend.download(&x).expect_err("it failed").to_string(), first);
}
