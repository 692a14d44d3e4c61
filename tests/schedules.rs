//! The kernels compute the same in whatever order their threads run.
//!
//! In a file of its own: the order is that of all launches of a process. Without g++ on x86-64 Linux this
//! test is ignored.

mod common;

use common::emulator::Emulator;
use common::kernels::{Build, Kernels, Schedule};
use common::truth::relative_error;
use rayon::prelude::*;
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
    let cases: Vec<(Dtype, f64, &str, u64)> = [(Dtype::F32, 1e-5), (Dtype::Bf16, 2e-2)]
        .into_iter()
        .flat_map(|(dtype, tolerance)| OPERATIONS.map(|operation| (dtype, tolerance, operation)))
        .flat_map(|(dtype, tolerance, operation)| {
            [10, 11].map(|seed| (dtype, tolerance, operation, seed))
        })
        .collect();
    let mut first: Option<Vec<Vec<f32>>> = None;
    for schedule in schedules {
        kernels.set_schedule(schedule);
        let run = |&(dtype, tolerance, operation, seed): &(Dtype, f64, &str, u64)| {
            let what = format!("{operation} {dtype:?} case {seed} {schedule:?}");
            let expected = testing::run(&cpu, operation, seed).expect("the CPU works");
            let expected: Vec<f64> = expected.iter().map(|&x| f64::from(x)).collect();
            let backend = Emulator::backend(Build::Checked, dtype);
            let found = testing::run(&backend, operation, seed);
            let found = found.unwrap_or_else(|error| panic!("{what}: {error}"));
            let error = relative_error(&found, &expected, &what);
            assert!(error < tolerance, "{what}: {error:.1e}");
            found
        };
        let found: Vec<Vec<f32>> = cases.par_iter().map(run).collect();
        let first = first.get_or_insert_with(|| found.clone());
        for (case, (first, found)) in cases.iter().zip(first.iter().zip(&found)) {
            assert!(first == found, "{case:?} {schedule:?}: not the same bits");
        }
    }
}
