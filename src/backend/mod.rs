//! The operations that a network is made of, once for every device.
//!
//! A backend does not know what a request is. It knows **slots**: one search with its beams, and
//! the pages of memory where its context is (KV that all its beams share) and its tails (the few
//! positions of KV that a beam owns, reached through ancestor indices and never copied). A pass
//! works on a [`Batch`]: rows of prompts, slot after slot, then rows of beams, slot after slot.
//! Matrices are dense and row-major. Each row's result depends on that row and its slot alone, to
//! the last bit, so an answer is the same in any company, however its prompt is cut into chunks.
//!
//! An operation has one name everywhere: `Backend::attend_beams` is `backend/cpu/attend_beams.rs`.

use std::ops::Range;

use crate::catalog::Snapshot;
use crate::catalog::allowed::AllowedSet;
use crate::catalog::candidates::Candidates;
use crate::catalog::cursor::Cursor;
use crate::error::Result;
use crate::search::{Constraint, Normalization};
use crate::tensor::{Dtype, Tensor};

pub mod cases;
pub mod cpu;
pub mod cuda;
mod noise;
mod step_columns;

/// How the columns of a projection are shared out: `num_heads` query heads, then `num_kv_heads`
/// key heads, then as many value heads, each `head_dim` wide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads` (grouped-query attention, Ainslie et al. 2023).
    pub num_kv_heads: usize,
    /// Columns of one head.
    pub head_dim: usize,
}

impl Heads {
    /// Columns of the queries, and of an attention's output.
    pub fn query_dim(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Columns of the keys, and of the values.
    pub fn kv_dim(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// Columns of queries, keys and values together.
    pub fn qkv_dim(&self) -> usize {
        self.query_dim() + 2 * self.kv_dim()
    }
}

/// The nonlinearities of feed-forward layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// max(x, 0)
    Relu,
    /// x Φ(x), by the error function (Hendrycks & Gimpel 2016).
    Gelu,
    /// The same by its tanh approximation.
    GeluTanh,
    /// x sigmoid(x), also called swish.
    Silu,
}

/// What happens to a matrix product on its way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Epilogue {
    /// `out = x Wᵀ (+ bias)`
    Store,
    /// `out += x Wᵀ (+ bias)`: the residual stream.
    Add,
    /// `out = activation(x Wᵀ (+ bias))`
    Activate(Activation),
}

/// Which positions a position of a prompt attends to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mask {
    /// Itself and the earlier ones.
    Causal,
    /// All of its own prompt.
    Bidirectional,
}

/// What a beam attends to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvScope {
    /// The request's context alone: cross-attention.
    Context,
    /// The beam's own tail alone: self-attention of a decoder behind an encoder.
    Tail,
    /// Both under one softmax: self-attention of a decoder-only network.
    Both,
}

/// The memory for all contexts and tails and for steps, taken once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemorySpec {
    /// Layers that keep KV.
    pub num_layers: usize,
    /// The heads of that KV.
    pub heads: Heads,
    /// Pages of contexts, [`PAGE_LEN`](crate::pages::PAGE_LEN) tokens each.
    pub context_pages: usize,
    /// Pages of tails, [`TAIL_PAGE_LEN`](crate::pages::TAIL_PAGE_LEN) rows each.
    pub tail_pages: usize,
    /// Beams in a step, for which a device takes memory at once; a single search may have more.
    pub rows_per_step: usize,
    /// Tokens of prompts in a step, likewise.
    pub tokens_per_step: usize,
}

/// One search: what it needs is fixed when it is admitted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotSpec {
    /// The pages of the context, in order; searches may have them in common.
    pub context_pages: Vec<u32>,
    /// Tokens of the context.
    pub context_len: usize,
    /// The pages for tails: at each position as many as its beams fill, one position after the
    /// other.
    pub tail_pages: Vec<u32>,
    /// The token of the one beam that a search starts with, where the decoder reads one.
    pub start_token: u32,
}

/// What one pass works on: rows of prompts, slot after slot, then rows of beams, slot after slot.
pub struct Batch<'a, B: Backend> {
    /// Where the KV is.
    pub memory: &'a B::Memory,
    /// Of each of the first slots, the positions of its prompt that are read; those whose prompt
    /// goes on come first.
    pub chunks: &'a [Range<usize>],
    /// The slots with chunks, then those whose beams are rows.
    pub slots: &'a mut [B::Slot],
}

impl<'a, B: Backend> Batch<'a, B> {
    /// Rows of prompts; rows of beams begin there.
    pub fn num_prompt_rows(&self) -> usize {
        self.chunks.iter().map(Range::len).sum()
    }

    /// The slots with rows of prompts, each with its chunk.
    pub fn prompts(&self) -> impl Iterator<Item = (&Range<usize>, &B::Slot)> {
        self.chunks.iter().zip(&*self.slots)
    }

    /// The slots with rows of beams.
    pub fn beams(&self) -> &[B::Slot] {
        &self.slots[self.chunks.len()..]
    }

    /// Slots whose prompt goes on after this pass.
    pub fn num_unfinished(&self, backend: &B) -> usize {
        let goes_on =
            |(chunk, slot): &(&Range<usize>, &B::Slot)| chunk.end < backend.context_len(slot);
        self.prompts().take_while(goes_on).count()
    }

    /// The slots from `first` on, with rows of beams alone: a search has one beam when its prompt
    /// has been read.
    pub fn beams_from(&mut self, first: usize) -> Batch<'_, B> {
        Batch { memory: self.memory, chunks: &[], slots: &mut self.slots[first..] }
    }
}

/// What one decoding step may choose from, the same for every request of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StepTokens {
    /// A level of the semantic ID: code `c` is token `tokens[c]`; `NO_TOKEN` where it has none.
    Level {
        /// Token by code.
        tokens: Vec<u32>,
    },
    /// A token that is forced after the codes.
    Forced {
        /// The token.
        token: u32,
    },
}

/// Stands for "this code has no token" in [`StepTokens::Level`].
pub const NO_TOKEN: u32 = u32::MAX;

/// How one request wants its search.
pub struct SearchRule<'a> {
    /// The state of the catalog that is searched.
    pub snapshot: &'a Snapshot,
    /// What of it the request may be answered with.
    pub allowed_set: &'a AllowedSet,
    /// Beams kept at this step.
    pub beams: usize,
    /// What scores are normalised over.
    pub normalization: Normalization,
    /// What may follow a prefix.
    pub constraint: Constraint,
    /// Divides the logits.
    pub temperature: f32,
    /// Follow these paths and no others; what is legal still says what scores are normalised over.
    pub candidates: Option<&'a Candidates>,
    /// Keep a sample instead of the best: this seeds its noise.
    pub seed: Option<u64>,
    /// Keep the log-probabilities of each step, of both kinds.
    pub log_probs: bool,
}

/// The log-probability of one chosen code.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogProb {
    /// Over all tokens of the model.
    pub vocabulary: f32,
    /// Over the legal continuations of the prefix.
    pub children: f32,
}

/// What the scores of a row are normalised over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Normalizer {
    /// All tokens of the model.
    Vocabulary,
    /// The level's codes that have a token.
    Level,
    /// The beam's legal continuations.
    Children,
    /// Nothing: the one continuation has probability one.
    Certain,
}

impl<'a> SearchRule<'a> {
    /// The best of all that is allowed, normalised over the vocabulary.
    pub fn new(
        snapshot: &'a Snapshot,
        allowed_set: &'a AllowedSet,
        beams: usize,
    ) -> SearchRule<'a> {
        SearchRule {
            snapshot,
            allowed_set,
            beams,
            normalization: Normalization::Vocabulary,
            constraint: Constraint::Trie,
            temperature: 1.0,
            candidates: None,
            seed: None,
            log_probs: false,
        }
    }

    /// What the scores of a step are normalised over: where any token is legal, the children are
    /// the vocabulary; where any code is, they are the level; a forced token is alone.
    pub fn normalizer(&self, is_forced: bool) -> Normalizer {
        match (self.normalization, self.constraint) {
            (Normalization::Vocabulary, _) => Normalizer::Vocabulary,
            _ if is_forced => Normalizer::Certain,
            (Normalization::Children, Constraint::Trie) => Normalizer::Children,
            (Normalization::Children, Constraint::None) => Normalizer::Vocabulary,
            _ => Normalizer::Level,
        }
    }
}

/// A finished beam, read back from the device.
#[derive(Debug, Clone, PartialEq)]
pub struct Beam {
    /// The tokens chosen, one a step.
    pub tokens: Vec<u32>,
    /// The cursor of the semantic ID, where the search was constrained to the catalog's.
    pub cursor: Option<Cursor>,
    /// Natural log of the probability.
    pub score: f32,
    /// By step, where the rule asked for them.
    pub log_probs: Vec<LogProb>,
}

/// The operations of a device. Rows of several slots stand one after the other, in slot order.
///
/// In every shape, `rows` is the number of prompt tokens of the slots in prefill and the number of
/// their beams in decode. `out` buffers take the shape of what is written to them.
pub trait Backend: Send + Sync + Sized + 'static {
    /// Whether the threads that call it compute: then several may work on parts of a step.
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
    /// One search.
    type Slot: Send + Sync;

    /// What computes, as `x86_64 f32x16`.
    fn description(&self) -> String;
    /// The number type of activations, keys and values.
    fn dtype(&self) -> Dtype;
    /// Floating-point operations of all matrix products so far: what a benchmark divides by time.
    fn matrix_flops(&self) -> u64;
    /// Whether a step went wrong since this was asked last: then nothing is worth anything that
    /// steps have kept since. Where the device has failed for good, it says so every time; where
    /// there was no memory for what a step needed, once.
    ///
    /// # Errors
    /// [`Device`](crate::Error::Device).
    fn take_failure(&self) -> Result<()>;

    // Opening. What takes memory fails with [`Device`](crate::Error::Device) where there is not so
    // much.

    /// Stacks weight matrices `[out_i, in]` into one `[sum of out_i, in]`.
    ///
    /// # Errors
    /// [`Device`](crate::Error::Device).
    fn matrix(&self, parts: &[Tensor]) -> Result<Self::Matrix>;
    /// Joins weight vectors.
    ///
    /// # Errors
    /// [`Device`](crate::Error::Device).
    fn vector(&self, parts: &[Tensor]) -> Result<Self::Vector>;
    /// A table of embeddings, one row a token.
    ///
    /// # Errors
    /// [`Device`](crate::Error::Device).
    fn table(&self, weight: Tensor) -> Result<Self::Table>;
    /// The output head `[vocabulary, in]` of a model whose steps choose from `steps`.
    ///
    /// # Errors
    /// [`Device`](crate::Error::Device); [`Unsupported`](crate::Error::Unsupported) where there are
    /// more steps than the device can take.
    fn head(&self, weight: Tensor, steps: &[StepTokens]) -> Result<Self::Head>;
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
    /// Bytes that contexts take where nobody says otherwise, now that the weights are there.
    ///
    /// # Errors
    /// [`Device`](crate::Error::Device).
    fn context_bytes(&self) -> Result<usize>;
    /// The pages for contexts and tails.
    ///
    /// # Errors
    /// [`Device`](crate::Error::Device); [`Unsupported`](crate::Error::Unsupported) where the device
    /// has no attention for such heads.
    fn memory(&self, spec: &MemorySpec) -> Result<Self::Memory>;
    /// A search, with the one beam that it starts with.
    fn open_slot(&self, spec: SlotSpec) -> Self::Slot;
    /// Rows that a slot takes in decode: as many as there can be beams, which come first.
    fn num_beams(&self, slot: &Self::Slot) -> usize;
    /// Steps that a slot's beams have taken.
    fn num_steps(&self, slot: &Self::Slot) -> usize;
    /// Tokens of a slot's context.
    fn context_len(&self, slot: &Self::Slot) -> usize;
    /// Does `work`, which calls the operations of one step of a search: the passes of a network
    /// over `batch`, then the head and the choice of beams by `rules`, one for each slot. A device
    /// may record what `work` asks for, and replay it in steps of the same shape instead; where it then
    /// has no memory to keep that, it calls `work` again.
    fn step(
        &self,
        batch: &mut Batch<'_, Self>,
        head: &Self::Head,
        rules: &[SearchRule<'_>],
        logits: &mut Self::Logits,
        work: impl FnMut(&mut Batch<'_, Self>, &mut Self::Logits),
    );

    // Networks.

    /// The rows of `table` for prompt tokens, then for the newest token of each beam.
    fn embed(
        &self,
        table: &Self::Table,
        tokens: &[u32],
        beams: &[Self::Slot],
        out: &mut Self::Buffer,
    );
    /// `out[r] = x[r] / sqrt(mean(x[r]^2) + epsilon) * weight` (Zhang & Sennrich 2019).
    fn rms_norm(
        &self,
        x: &Self::Buffer,
        weight: &Self::Vector,
        epsilon: f32,
        out: &mut Self::Buffer,
    );
    /// `out = epilogue(x Wᵀ + bias)`; `x`: `[rows, in]`, `weight`: `[out, in]`.
    fn matmul(
        &self,
        x: &Self::Buffer,
        weight: &Self::Matrix,
        bias: Option<&Self::Vector>,
        epilogue: Epilogue,
        out: &mut Self::Buffer,
    );
    /// `out[:, j] = activation(x[:, j]) * x[:, columns + j]`; `x`: `[rows, 2 * columns]`
    /// (GLU variants, Shazeer 2020).
    fn glu(&self, x: &Self::Buffer, activation: Activation, out: &mut Self::Buffer);
    /// The cosines, then the sines, of each row's position times `frequencies[i]`: what [`apply_rope`]
    /// turns by; the product in f32. A beam's newest token stands behind its context and the tokens before it. `out`:
    /// `[rows, 2 * frequencies]`.
    ///
    /// [`apply_rope`]: Backend::apply_rope
    fn rope_tables(
        &self,
        frequencies: &Self::Vector,
        batch: &Batch<'_, Self>,
        out: &mut Self::Buffer,
    );
    /// Turns each query and key head of `qkv` by its row of `rope_tables`, first and second half of a
    /// head paired (RoPE, Su et al. 2021), after an RMS norm of each head where weights are given;
    /// then keeps the keys and values, as [`store_context`](Backend::store_context) and
    /// [`append_tail`](Backend::append_tail) do.
    fn apply_rope(
        &self,
        layer: usize,
        qkv: &mut Self::Buffer,
        heads: Heads,
        norms: Option<(&Self::Vector, &Self::Vector, f32)>,
        rope: &Self::Buffer,
        batch: &mut Batch<'_, Self>,
    );
    /// Keeps the keys and values of a layer for the rows of prompts, in the slots' contexts. `kv`'s
    /// columns from `offset` on are the key heads, then the value heads.
    fn store_context(
        &self,
        layer: usize,
        kv: &Self::Buffer,
        offset: usize,
        heads: Heads,
        batch: &Batch<'_, Self>,
    );
    /// Attention of the rows of prompts over their contexts, as far as stored and masked; the first
    /// `heads.query_dim()` columns of `queries` are the queries, `out`: `[rows,
    /// heads.query_dim()]`, where rows of beams are left as they are. `relative_bias`, if given, is
    /// `[num_heads, 2 * longest - 1]` over key minus query position, where `longest` is the longest
    /// context and the middle column stands for distance zero. Softmax in f32.
    fn attend_prefill(
        &self,
        layer: usize,
        queries: &Self::Buffer,
        heads: Heads,
        mask: Mask,
        scale: f32,
        relative_bias: Option<&[f32]>,
        batch: &Batch<'_, Self>,
        out: &mut Self::Buffer,
    );
    /// From the slot `first` on: the last row of each prompt, then the rows of beams.
    fn gather_last(
        &self,
        x: &Self::Buffer,
        first: usize,
        batch: &Batch<'_, Self>,
        out: &mut Self::Buffer,
    );
    /// Appends the keys and values of the beams' newest tokens to their tails; `qkv`: `[rows,
    /// heads.qkv_dim()]`.
    fn append_tail(
        &self,
        layer: usize,
        qkv: &Self::Buffer,
        heads: Heads,
        batch: &mut Batch<'_, Self>,
    );
    /// Attention of each beam over what it reaches; `queries` and `out` as in
    /// [`attend_prefill`](Backend::attend_prefill), where rows of prompts are left as they are. The
    /// context is read once for all beams of a slot (Hydragen, Juravsky et al. 2024). `tail_bias`,
    /// if given, is `[num_heads, num_steps]` over the distance back. Softmax in f32.
    fn attend_beams(
        &self,
        layer: usize,
        queries: &Self::Buffer,
        heads: Heads,
        scope: KvScope,
        scale: f32,
        tail_bias: Option<&Self::Vector>,
        batch: &Batch<'_, Self>,
        out: &mut Self::Buffer,
    );

    // Search.

    /// The output head for what each slot's next step can choose from: `hidden`'s product (one row
    /// a beam) with the step's tokens, and what each row is normalised by, as its slot's rule wants
    /// it. Slots may be at different steps.
    fn lm_head(
        &self,
        hidden: &Self::Buffer,
        head: &Self::Head,
        rules: &[SearchRule<'_>],
        slots: &[Self::Slot],
        out: &mut Self::Logits,
    );
    /// Extends the beams of each slot by one step: the legal continuations, and the best `beams` of
    /// them by score, equal scores by smaller semantic ID. A forced step extends every beam by its
    /// token and puts them in order again. Nothing is reported until the beams are read.
    ///
    /// With a seed, `beams` continuations are drawn without replacement from the distribution over
    /// legal ones (Gumbel top-k in a beam search, Kool et al. 2019), in the order drawn; the noise
    /// of a continuation depends on the seed and its tokens alone.
    fn advance_beams(
        &self,
        logits: &Self::Logits,
        head: &Self::Head,
        rules: &[SearchRule<'_>],
        slots: &mut [Self::Slot],
    );
    /// The beams of each slot, best first. This alone waits for the device.
    ///
    /// # Errors
    /// [`NonFiniteScores`](crate::Error::NonFiniteScores) where a step's scores were NaN or
    /// infinite; [`Device`](crate::Error::Device) where the device failed.
    fn read_beams(&self, slots: &[&Self::Slot]) -> Vec<Result<Vec<Beam>>>;
}
