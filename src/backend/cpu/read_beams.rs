//! Beams as they are told to the host: on the CPU, a copy.

use super::{CpuBackend, Slot};
use crate::backend::{Beam, ReadBeams};
use crate::error::Result;

impl ReadBeams for CpuBackend {
    fn read_beams(&self, slots: &[&Slot]) -> Vec<Result<Vec<Beam>>> {
        slots.iter().map(|slot| slot.beams.read()).collect()
    }
}
