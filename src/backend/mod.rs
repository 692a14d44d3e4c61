//! The operations that a network and a search are made of, once for every device.
//!
//! A backend does not know what a request is. It knows **slots**: one search with its beams, and
//! the pages of memory where its context is (KV that all its beams share) and its tails (the few
//! positions of KV that a beam owns, reached through ancestor indices and never copied). A pass
//! works on a [`Batch`]: rows of prompts, slot after slot, then rows of beams, slot after slot.
//! Matrices are dense and row-major. Each row's result depends on that row and its slot alone, to
//! the last bit, so an answer is the same in any company, however its prompt is cut into chunks.
//!
//! [`Backend`] is three groups of operations: [`DeviceOps`] (weights, buffers, memory, slots, and all
//! types), [`NetworkOps`] and [`SearchOps`]. Each operation of the latter two is a trait of one
//! method, implemented in a file of its own, and has one name everywhere:
//! [`AttendBeams::attend_beams`] is `backend/cpu/attend_beams.rs`, `backend/cuda/attend_beams.rs` and
//! `kernels/attend_beams.cu`.

mod affine;
mod attention;
mod batch;
pub mod cpu;
pub mod cuda;
mod device;
mod ended_phrases;
mod kv_layout;
mod level_columns;
mod network;
pub(crate) mod noise;
mod pass_plan;
mod pointwise;
pub(crate) mod sampling;
mod search;
#[doc(hidden)]
pub mod testing;

pub use affine::Affine;
pub use attention::{AttentionSpec, Heads, KvScope, Mask, PrefillAttention, ScoreRule};
pub use batch::Batch;
pub use device::DeviceOps;
pub use kv_layout::{KvLayout, MemorySpec, SlotSpec};
pub use network::{
    Activation, AddEmbedding, AppendTail, ApplyRope, AttendBeams, AttendPointwise, AttendPrefill,
    BeamAttention, Embed, Epilogue, GatedNorm, GatherLast, Glu, Gru, HeadNorms, LayerNorm, Matmul,
    NetworkOps, RmsNorm, RopeTables, StoreContext,
};
pub use pass_plan::PassPlan;
pub use pointwise::{
    GateActivation, GatedNormSpec, GatedOutput, PointwiseAttention, PositionTimeBias, Seen,
    TargetMask,
};
use search::Continuations;
pub use search::{
    AdvanceBeams, Beam, LmHead, LogProb, NO_TOKEN, Normalizer, PhraseStep, ReadBeams, SampleStep,
    SearchOps, SearchRule, Step, StepChoice,
};

/// All operations of a device.
pub trait Backend: NetworkOps + SearchOps {}

impl<B: NetworkOps + SearchOps> Backend for B {}

/// The traits of all operations, to be in scope where a backend's type is known.
pub mod prelude {
    pub use super::{
        AddEmbedding, AdvanceBeams, AppendTail, ApplyRope, AttendBeams, AttendPointwise,
        AttendPrefill, Backend, DeviceOps, Embed, GatedNorm, GatherLast, Glu, Gru, LayerNorm,
        LmHead, Matmul, NetworkOps, ReadBeams, RmsNorm, RopeTables, SearchOps, Step, StoreContext,
    };
}
