//! Cosines and sines of positions.

use super::{Buffer, CpuBackend};
use crate::backend::{Batch, RopeTables};

impl RopeTables for CpuBackend {
    fn rope_tables(&self, frequencies: &Vec<f32>, batch: &Batch<'_, CpuBackend>, out: &mut Buffer) {
        let of_beams = batch.beams().iter().flat_map(|slot| {
            let position = slot.spec.context_len + slot.beams.num_steps - 1;
            std::iter::repeat_n(position, slot.beams.len())
        });
        let positions: Vec<usize> =
            batch.chunks.iter().cloned().flatten().chain(of_beams).collect();
        let half = frequencies.len();
        out.reshape(positions.len(), 2 * half);
        for (row, position) in out.values.chunks_exact_mut(2 * half).zip(positions) {
            let (cosines, sines) = row.split_at_mut(half);
            for i in 0..half {
                // The angle is rounded to f32, as in the published implementations; its sine and
                // cosine are then as exact as can be.
                let angle = f64::from(position as f32 * frequencies[i]);
                cosines[i] = angle.cos() as f32;
                sines[i] = angle.sin() as f32;
            }
        }
    }
}
