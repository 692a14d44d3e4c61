//! The CUDA backend: kernels of our own, f32 or bf16, sums in f32.
//!
//! Nothing that a step needs is read back: beams are kept, chosen and put in order on the device,
//! and the host only enqueues. So the steps of a search follow one another without a gap, and a
//! step whose shape came up before is one replay of the graph that was captured then. The host knows
//! how many rows there are for beams, not how many beams there are.
//!
//! A [`Driver`] stands between the backend and the device. `nvidia.rs` has that of an NVIDIA GPU;
//! the tests have one that runs the same kernels on the CPU.

mod add_embedding;
mod advance_beams;
mod append_tail;
mod apply_rope;
mod attend_beams;
mod attend_pointwise;
mod attend_prefill;
mod backend;
#[cfg(feature = "cuda")]
mod blas;
mod buffer;
mod catalog;
mod device;
mod device_memory;
mod device_ops;
mod driver;
mod embed;
mod gated_norm;
mod gather_last;
#[cfg(test)]
mod generated;
mod glu;
mod graphs;
mod gru;
mod head;
mod layer_norm;
mod lm_head;
mod logits;
mod matmul;
mod memory;
mod metadata;
#[cfg(feature = "cuda")]
mod nvidia;
mod pass;
#[cfg(feature = "cuda")]
mod pinned;
mod plan;
#[cfg(any(feature = "cuda", test))]
mod plans;
mod read_beams;
mod rms_norm;
mod rope_tables;
mod rules;
mod shared;
mod slot;
#[cfg(any(feature = "cuda", test))]
mod staging;
mod step;
mod store_context;
mod tiling;

pub use backend::CudaBackend;
pub use buffer::{Buffer, Vector, Weights};
pub use driver::{Address, Driver, FusedActivation, Launch, Outcome, Product, Traffic};
pub use head::Head;
pub use logits::Logits;
pub use memory::Memory;
#[cfg(feature = "cuda")]
pub use nvidia::{CudaDevice, num_devices};
pub use pass::Pass;
pub use slot::Slot;
