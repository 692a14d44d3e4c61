//! The kernels compute the same in whatever order their threads run.
//!
//! In a file of its own: the order is that of all launches of a process. Without g++ on x86-64 Linux this
//! test is ignored.

mod common;

use common::emulator::Emulator;
use common::kernels::{Build, Kernels, Schedule};
use common::truth::relative_error;
use sidereal::Dtype;
use sidereal::backend::cpu::CpuBackend;
use sidereal::backend::testing;

/// One of each group of operations that are run together.
const OPERATIONS: [&str; 7] =
    ["embed", "layer_norm", "rms_norm", "glu", "apply_rope", "gru", "attend_beams"];

#[test]
#[cfg_attr(not(cpp_compiler), ignore = "needs g++ on x86-64 Linux")]
fn results_do_not_depend_on_the_order_of_threads() {
    let (cpu, kernels) = (CpuBackend::default(), Kernels::load(Build::Checked));
    let schedules =
        [Schedule::Ascending, Schedule::Descending, Schedule::Random(1), Schedule::Random(2)];
    for (dtype, tolerance) in [(Dtype::F32, 1e-5), (Dtype::Bf16, 2e-2)] {
        for operation in OPERATIONS {
            for seed in 10..12 {
                let expected = testing::run(&cpu, operation, seed).expect("the CPU works");
                let expected: Vec<f64> = expected.iter().map(|&x| f64::from(x)).collect();
                let mut first: Option<Vec<f32>> = None;
                for schedule in schedules {
                    let what = format!("{operation} {dtype:?} case {seed} {schedule:?}");
                    kernels.set_schedule(schedule);
                    let backend = Emulator::backend(Build::Checked, dtype);
                    let found = testing::run(&backend, operation, seed);
                    let found = found.unwrap_or_else(|error| panic!("{what}: {error}"));
                    let error = relative_error(&found, &expected, &what);
                    assert!(error < tolerance, "{what}: {error:.1e}");
                    match &first {
                        None => first = Some(found),
                        Some(first) => assert!(*first == found, "{what}: not the same bits"),
                    }
                }
            }
        }
    }
}
