//! Network families, each written once for all devices.
//!
//! A model folder is what Hugging Face writes, with a `sidereal.json` beside it ([`config`]). The
//! architecture that its `config.json` names chooses the family:
//!
//! | architectures | family |
//! | --- | --- |
//! | `T5ForConditionalGeneration` | [`t5`] |
//! | `Qwen3ForCausalLM`, `Qwen2ForCausalLM`, `LlamaForCausalLM` | [`decoder_only`] |

use std::sync::Arc;

use crate::backend::{Backend, Batch, KvLayout};
use crate::error::{Error, Result};
use config::{Config, SidLayout};
use weights::Weights;

pub mod config;
pub mod decoder_only;
pub mod t5;
pub mod vocabulary;
pub mod weights;

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
    },
}

impl PromptKind {
    /// Whether a prompt is read as a whole.
    pub fn is_whole(self) -> bool {
        matches!(self, PromptKind::Whole { .. })
    }

    /// The token of the one beam that a search starts with. Nothing reads it where prompts are read
    /// in chunks.
    pub fn start_token(self) -> u32 {
        match self {
            PromptKind::Chunked => 0,
            PromptKind::Whole { start_token } => start_token,
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
    /// The rows that the last pass left.
    fn output<'s>(&self, scratch: &'s Self::Scratch) -> &'s B::Buffer;
}

/// A network of any family, with its weights on a device.
pub trait Model<B: Backend>: Send + Sync {
    /// What the engine must know of it.
    fn spec(&self) -> &ModelSpec;
    /// The output head.
    fn head(&self) -> &B::Head;
    /// A forward pass with activations of its own. It holds the weights: drop it with the model.
    fn new_pass(self: Arc<Self>, backend: &B) -> Box<dyn ForwardPass<B>>;
}

/// A forward pass through a network, run again and again on one thread at a time.
pub trait ForwardPass<B: Backend>: Send {
    /// Reads the rows of a batch: `tokens` for its prompts, which are whole where the network reads
    /// them so, and the newest tokens of its beams. Leaves the keys and values in the memory, and a
    /// row a beam in [`output`](ForwardPass::output) for each search whose prompt has been read.
    fn run(&mut self, backend: &B, tokens: &[u32], batch: &mut Batch<'_, B>);
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

    fn output(&self) -> &B::Buffer {
        self.network.output(&self.scratch)
    }
}

/// The activations of a transformer.
pub struct Activations<B: Backend> {
    /// The final norm's output.
    hidden: B::Buffer,
    residual: B::Buffer,
    normed: B::Buffer,
    projected: B::Buffer,
    attended: B::Buffer,
    rope: B::Buffer,
    spare: B::Buffer,
    /// The residual stream of the rows that the last layer goes on with.
    last: B::Buffer,
}

impl<B: Backend> Activations<B> {
    fn new(backend: &B) -> Activations<B> {
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

/// Puts a checkpoint on a device; `layout` says which tokens its searches choose from.
///
/// # Errors
/// Those of the files: an architecture that is not served, a key that is missing or wrong, a tensor
/// that is missing, left over, of another shape or not finite.
pub fn load<B: Backend>(
    backend: &B,
    config: &Config,
    mut weights: Weights,
    layout: &SidLayout,
) -> Result<Arc<dyn Model<B>>> {
    match config.architecture()? {
        "T5ForConditionalGeneration" => {
            let model = t5::T5::load(backend, config, &mut weights, layout)?;
            weights.finish(t5::is_known_spare)?;
            Ok(Arc::new(model))
        }
        name @ ("Qwen3ForCausalLM" | "Qwen2ForCausalLM" | "LlamaForCausalLM") => {
            let flavour = decoder_only::Flavour::of(name);
            let model =
                decoder_only::DecoderOnly::load(backend, config, flavour, &mut weights, layout)?;
            weights.finish(decoder_only::is_known_spare)?;
            Ok(Arc::new(model))
        }
        other => Err(Error::Unsupported {
            what: format!("architecture {other:?}"),
            way_out: "T5ForConditionalGeneration, Qwen3ForCausalLM, Qwen2ForCausalLM and \
                      LlamaForCausalLM are"
                .into(),
        }),
    }
}

/// The size of the vocabulary that a configuration names.
///
/// # Errors
/// [`Error::ModelConfig`] where it names none.
pub fn vocab_size(config: &Config) -> Result<usize> {
    config.size("vocab_size")
}
