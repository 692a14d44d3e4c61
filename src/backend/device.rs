//! A device: its numbers and failures, weights, buffers, memory and slots.

use super::{MemorySpec, PassPlan, SlotSpec};
use crate::error::Result;
use crate::tensor::{Dtype, Tensor};

/// What holds weights, activations, keys and values, and searches. All types of a backend are named
/// here.
pub trait DeviceOps: Send + Sync + Sized + 'static {
    /// Whether the calling threads compute: then several may work on parts of a step.
    const COMPUTES_ON_CALLERS: bool;

    /// Activations, `[rows, columns]`.
    type Buffer: Send;
    /// A weight matrix `[out, in]`, laid out for products once.
    type Matrix: Send + Sync;
    /// A vector of weights.
    type Vector: Send + Sync;
    /// A table of embeddings, `[tokens, columns]`.
    type Table: Send + Sync;
    /// The output head, split so that a step evaluates only what it can choose from.
    type Head: Send + Sync;
    /// The logits of one step, one row a beam.
    type Logits: Send;
    /// Pages of contexts and tails. Passes over different slots may use it at the same time.
    type Memory: Send + Sync;
    /// The group of beams of one search.
    type Slot: Send + Sync;
    /// What is planned for the rows of a batch.
    type Pass: PassPlan;

    /// What computes, as `x86_64 f32x16`.
    fn description(&self) -> String;
    /// The number type of what products with weights are given.
    fn dtype(&self) -> Dtype;
    /// The number type of keys and values.
    fn kv_dtype(&self) -> Dtype;
    /// Floating-point operations of all matrix products so far: what a benchmark divides by time.
    fn matrix_flops(&self) -> u64;
    /// Returns the first error since the last call. After an error, all keys and values written by
    /// those steps are invalid. An error of the device itself is returned every time, lack of
    /// memory for a step once.
    ///
    /// # Errors
    /// [`Device`](crate::Error::Device).
    fn take_failure(&self) -> Result<()>;

    /// Stacks weight matrices `[out_i, in]` into one `[sum of out_i, in]`.
    ///
    /// # Errors
    /// [`Device`](crate::Error::Device) where there is not so much memory.
    fn matrix(&self, parts: &[Tensor]) -> Result<Self::Matrix>;
    /// Joins weight vectors.
    ///
    /// # Errors
    /// [`Device`](crate::Error::Device) where there is not so much memory.
    fn vector(&self, parts: &[Tensor]) -> Result<Self::Vector>;
    /// A table of embeddings, one row a token. Where `head` is made of the same weights, a device may
    /// hold them once.
    ///
    /// # Errors
    /// [`Device`](crate::Error::Device) where there is not so much memory.
    fn table(&self, weight: Tensor, head: Option<&Self::Head>) -> Result<Self::Table>;
    /// The output head `[vocabulary, in]`.
    ///
    /// `levels`: by level, the token of each code, [`NO_TOKEN`](super::NO_TOKEN) where a code has
    /// none. `known_tokens`: single tokens that steps often ask for. Any other token may be asked
    /// for too; but levels and known tokens decide how the head is cut, and so the order of sums.
    ///
    /// # Errors
    /// [`Device`](crate::Error::Device) where there is not so much memory.
    fn head(&self, weight: Tensor, levels: &[Vec<u32>], known_tokens: &[u32])
    -> Result<Self::Head>;

    /// An empty buffer.
    fn buffer(&self) -> Self::Buffer;
    /// A buffer of these values, whole rows.
    fn upload(&self, values: &[f32], columns: usize) -> Self::Buffer;
    /// The values of a buffer, row after row.
    ///
    /// # Errors
    /// [`Device`](crate::Error::Device) where the device failed.
    fn download(&self, buffer: &Self::Buffer) -> Result<Vec<f32>>;
    /// No logits.
    fn logits(&self) -> Self::Logits;

    /// Default bytes for contexts, now that the weights are there.
    ///
    /// # Errors
    /// [`Device`](crate::Error::Device).
    fn context_bytes(&self) -> Result<usize>;
    /// The pages for contexts and tails.
    ///
    /// # Errors
    /// [`Device`](crate::Error::Device) where there is not so much memory;
    /// [`Unsupported`](crate::Error::Unsupported) where the device has no attention for such keys
    /// and values.
    fn memory(&self, spec: &MemorySpec) -> Result<Self::Memory>;

    /// Checks that the device searches phrases.
    ///
    /// # Errors
    /// [`Unsupported`](crate::Error::Unsupported).
    fn check_phrases(&self) -> Result<()>;
    /// Checks that the device samples thoughts.
    ///
    /// # Errors
    /// [`Unsupported`](crate::Error::Unsupported).
    fn check_thoughts(&self) -> Result<()>;
    /// Checks that the device draws samples, and keeps log-probabilities, without the trie.
    ///
    /// # Errors
    /// [`Unsupported`](crate::Error::Unsupported).
    fn check_free_samples(&self) -> Result<()>;
    /// The most steps that a search may take.
    fn max_steps(&self) -> usize;
    /// A search, with the one beam that it starts with.
    ///
    /// # Errors
    /// [`Unsupported`](crate::Error::Unsupported) where the search takes more than
    /// [`max_steps`](DeviceOps::max_steps).
    fn open_slot(&self, spec: SlotSpec) -> Result<Self::Slot>;
    /// Rows that a slot takes in decode: as many as there can be beams, which come first.
    fn num_beams(&self, slot: &Self::Slot) -> usize;
    /// Steps that a slot's beams have taken, or that a thought had no need of.
    fn num_steps(&self, slot: &Self::Slot) -> usize;
    /// Tokens of a slot's context.
    fn context_len(&self, slot: &Self::Slot) -> usize;
}
