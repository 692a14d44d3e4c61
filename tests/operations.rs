//! The operations of the CPU backend.

mod common;

use std::ops::Range;

use common::operations::Subject;
use sidereal::backend::cpu::CpuBackend;

struct Cpu;

impl Subject for Cpu {
    type B = CpuBackend;
    const TOLERANCE: f64 = 1e-5;
    const SCORE_TOLERANCE: f64 = 1e-4;

    fn open() -> CpuBackend {
        CpuBackend::default()
    }

    fn seeds(most: u64) -> Range<u64> {
        0..most
    }
}

operation_tests!(Cpu);
