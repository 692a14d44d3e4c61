//! What the engine asks of a network, whatever its family.

use std::ops::Range;
use std::sync::Arc;

use super::whole_words::WordRule;
use crate::backend::{Backend, Batch, KvLayout};

/// How a network reads its prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PromptKind {
    /// In chunks of any length, each after those before it. The prompt's last row scores the first
    /// step.
    Chunked,
    /// As a whole, by an encoder.
    Whole {
        /// The token that the decoder starts with, which scores the first step.
        start_token: u32,
        /// Layers of the encoder.
        num_layers: usize,
    },
}

/// Rows of a prompt that a piece of it has at most.
const ROWS_PER_PIECE: usize = 128;

/// What an encoder does with all rows of a prompt before it goes on: rows attend to the keys and
/// values of all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EncoderSweep {
    /// Leaves queries, and stores the keys and values of a layer.
    Project(usize),
    /// Attends to them, and does the rest of the layer.
    Attend(usize),
    /// Stores what the decoder attends to.
    Finish,
}

/// A part of what an encoder does with a prompt. Pieces are read in the order of their numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncoderPiece {
    /// What is done.
    pub sweep: EncoderSweep,
    /// With these rows of the prompt.
    pub rows: Range<usize>,
    /// The number of these rows among the parts of the prompt.
    pub part: usize,
}

impl PromptKind {
    /// Pieces that a prompt of so many tokens can be read in, where it is read as a whole. A prompt
    /// that is not worth it has one piece.
    pub fn num_pieces(self, len: usize) -> usize {
        match self {
            PromptKind::Whole { num_layers, .. } if len > ROWS_PER_PIECE => {
                (2 * num_layers + 1) * len.div_ceil(ROWS_PER_PIECE)
            }
            _ => 1,
        }
    }

    /// A piece of a prompt of so many tokens, by an encoder of so many layers.
    pub(super) fn piece(num_layers: usize, len: usize, number: usize) -> EncoderPiece {
        let num_parts = len.div_ceil(ROWS_PER_PIECE);
        let (sweep, part) = (number / num_parts, number % num_parts);
        let sweep = match (sweep / 2, sweep % 2) {
            (layer, _) if layer == num_layers => EncoderSweep::Finish,
            (layer, 0) => EncoderSweep::Project(layer),
            (layer, _) => EncoderSweep::Attend(layer),
        };
        let first = part * ROWS_PER_PIECE;
        EncoderPiece { sweep, rows: first..len.min(first + ROWS_PER_PIECE), part }
    }

    /// Whether a prompt is read as a whole.
    pub fn is_whole(self) -> bool {
        matches!(self, PromptKind::Whole { .. })
    }

    /// The token of the one beam that a search starts with. Nothing reads it where prompts are read
    /// in chunks.
    pub fn start_token(self) -> u32 {
        match self {
            PromptKind::Chunked => 0,
            PromptKind::Whole { start_token, .. } => start_token,
        }
    }
}

/// What the rows that a pass leaves are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ModelOutput {
    /// The output head makes logits over the vocabulary of them.
    Logits,
}

/// What the engine must know of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelSpec {
    /// Tokens that the network knows.
    pub vocab_size: usize,
    /// The most positions of input and output together, where the network has a limit.
    pub max_positions: Option<usize>,
    /// The keys and values that it keeps.
    pub kv: KvLayout,
    /// How it reads its prompt.
    pub prompt: PromptKind,
    /// What a pass leaves.
    pub output: ModelOutput,
    /// Numbers in the weights.
    pub num_weights: usize,
}

/// A network family, with its weights on a device: what a file of this module implements.
pub trait Network<B: Backend>: Send + Sync + 'static {
    /// The activations of a forward pass, kept from pass to pass so that nothing is allocated anew.
    type Scratch: Send + 'static;

    /// What the engine must know of it.
    fn spec(&self) -> &ModelSpec;
    /// The output head.
    fn head(&self) -> &B::Head;
    /// How it counts the words of its prompts, where it does.
    fn word_rule(&self) -> Option<Arc<WordRule>>;
    /// Empty activations.
    fn new_scratch(&self, backend: &B) -> Self::Scratch;
    /// Reads the rows of a batch, as [`ForwardPass::run`] says.
    fn forward(
        &self,
        backend: &B,
        tokens: &[u32],
        batch: &mut Batch<'_, B>,
        scratch: &mut Self::Scratch,
    );
    /// Reads pieces of a prompt, as [`ForwardPass::encode`] says.
    fn encode(
        &self,
        backend: &B,
        tokens: &[u32],
        memory: &B::Memory,
        slots: &mut [B::Slot],
        pieces: Range<usize>,
        scratch: &mut Self::Scratch,
    );
    /// The rows that the last pass left.
    fn output<'s>(&self, scratch: &'s Self::Scratch) -> &'s B::Buffer;
}

/// A network of any family, with its weights on a device.
pub trait Model<B: Backend>: Send + Sync {
    /// What the engine must know of it.
    fn spec(&self) -> &ModelSpec;
    /// The output head.
    fn head(&self) -> &B::Head;
    /// How it counts the words of its prompts, where it does.
    fn word_rule(&self) -> Option<Arc<WordRule>>;
    /// A forward pass with activations of its own. It holds the weights: drop it with the model.
    fn new_pass(self: Arc<Self>, backend: &B) -> Box<dyn ForwardPass<B>>;
}

/// A forward pass through a network, run again and again on one thread at a time.
pub trait ForwardPass<B: Backend>: Send {
    /// Reads the rows of a batch: `tokens` for its prompts, which are whole where the network reads
    /// them so, and the newest tokens of its beams. Leaves the keys and values in the memory, and a
    /// row a beam in [`output`](ForwardPass::output) for each search whose prompt has been read.
    fn run(&mut self, backend: &B, tokens: &[u32], batch: &mut Batch<'_, B>);
    /// Reads some of the [pieces](PromptKind::num_pieces) of the prompt of one slot, `tokens` being all
    /// of it. The pieces of a prompt are read in order, by one pass, which reads nothing else
    /// meanwhile; after the last the context is there.
    ///
    /// # Panics
    /// Where the network reads its prompts in chunks.
    fn encode(
        &mut self,
        backend: &B,
        tokens: &[u32],
        memory: &B::Memory,
        slots: &mut [B::Slot],
        pieces: Range<usize>,
    );
    /// The rows that the last run left: a row a beam, which the output head scores the next step by.
    fn output(&self) -> &B::Buffer;
}

impl<B: Backend, N: Network<B>> Model<B> for N {
    fn spec(&self) -> &ModelSpec {
        Network::spec(self)
    }

    fn head(&self) -> &B::Head {
        Network::head(self)
    }

    fn word_rule(&self) -> Option<Arc<WordRule>> {
        Network::word_rule(self)
    }

    fn new_pass(self: Arc<Self>, backend: &B) -> Box<dyn ForwardPass<B>> {
        let scratch = self.new_scratch(backend);
        Box::new(PassOf { network: self, scratch })
    }
}

/// A pass of one family.
struct PassOf<N, S> {
    network: Arc<N>,
    scratch: S,
}

impl<B: Backend, N: Network<B>> ForwardPass<B> for PassOf<N, N::Scratch> {
    fn run(&mut self, backend: &B, tokens: &[u32], batch: &mut Batch<'_, B>) {
        self.network.forward(backend, tokens, batch, &mut self.scratch);
    }

    fn encode(
        &mut self,
        backend: &B,
        tokens: &[u32],
        memory: &B::Memory,
        slots: &mut [B::Slot],
        pieces: Range<usize>,
    ) {
        self.network.encode(backend, tokens, memory, slots, pieces, &mut self.scratch);
    }

    fn output(&self) -> &B::Buffer {
        self.network.output(&self.scratch)
    }
}

/// The activations of a transformer.
pub struct Activations<B: Backend> {
    /// The final norm's output.
    pub(super) hidden: B::Buffer,
    pub(super) residual: B::Buffer,
    pub(super) normed: B::Buffer,
    pub(super) projected: B::Buffer,
    pub(super) attended: B::Buffer,
    pub(super) rope: B::Buffer,
    pub(super) spare: B::Buffer,
    /// The residual stream of the rows that the last layer goes on with.
    pub(super) last: B::Buffer,
}

impl<B: Backend> Activations<B> {
    /// The rows that the last pass left: its final norm's output.
    pub(crate) fn output(&self) -> &B::Buffer {
        &self.hidden
    }

    /// Empty activations.
    pub(crate) fn new(backend: &B) -> Activations<B> {
        Activations {
            hidden: backend.buffer(),
            residual: backend.buffer(),
            normed: backend.buffer(),
            projected: backend.buffer(),
            attended: backend.buffer(),
            rope: backend.buffer(),
            spare: backend.buffer(),
            last: backend.buffer(),
        }
    }
}
