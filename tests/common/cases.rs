//! The cases of every operation, drawn at random: the tests hold backends against the truth on
//! them, the benchmarks time some of their shapes.

use sidereal::backend::Heads;

/// The operations that have cases; the architecture test holds this list to the trait.
pub const OPERATIONS: [&str; 13] = [
    "embed",
    "rms_norm",
    "matmul",
    "gate",
    "rotation",
    "rotary",
    "store_context",
    "attend_prefill",
    "last_rows",
    "append_tail",
    "attend_beams",
    "restricted_head",
    "advance_beams",
];

/// A source of cases; the seed repeats them.
pub struct Cases {
    pub rng: fastrand::Rng,
}

impl Cases {
    pub fn new(seed: u64) -> Cases {
        Cases { rng: fastrand::Rng::with_seed(seed) }
    }

    /// Numbers between -1 and 1.
    pub fn numbers(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| 2.0 * self.rng.f32() - 1.0).collect()
    }

    /// A size: often one, often small, sometimes `most`.
    pub fn size(&mut self, most: usize) -> usize {
        match self.rng.u8(0..8) {
            0 => 1,
            1 => most,
            2..6 => self.rng.usize(1..=most.min(20)),
            _ => self.rng.usize(1..=most),
        }
    }

    pub fn heads(&mut self) -> Heads {
        let num_kv_heads = self.rng.usize(1..4);
        let num_heads = num_kv_heads * self.rng.usize(1..4);
        let dims = [2, 6, 16, 24, 64, 128];
        Heads { num_heads, num_kv_heads, head_dim: dims[self.rng.usize(0..dims.len())] }
    }
}
