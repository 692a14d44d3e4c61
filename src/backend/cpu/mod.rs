//! The CPU backend: f32 or bf16, any number of threads, no GPU needed.
//!
//! Products, with weights as with keys and values, are `matmul`'s; everything else is a fused loop.
//! All are written on `rten-simd`, so one binary uses AVX-512, AVX2 or NEON as the machine has it.
//! There is no unsafe code but for products in bf16, whose instructions `rten-simd` does not have.

mod add_embedding;
mod advance_beams;
mod append_tail;
mod apply_rope;
mod attend_beams;
mod attend_pointwise;
mod attend_prefill;
mod backend;
mod buffer;
mod context;
mod device;
mod embed;
mod gated_norm;
mod gather_last;
mod glu;
mod gru;
mod head;
mod keys;
mod layer_norm;
mod lm_head;
mod matmul;
mod memory;
mod phrases;
mod read_beams;
mod rms_norm;
mod rope_tables;
mod scratch;
mod slot;
mod softmax;
mod step;
mod store_context;
mod table;
mod thoughts;

pub use backend::CpuBackend;
pub use buffer::Buffer;
pub use head::Head;
pub use lm_head::Logits;
pub use matmul::{Instructions, Matrix};
pub use memory::Memory;
pub use slot::Slot;
pub use table::Table;
