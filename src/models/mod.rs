//! Network families, each written once for all devices.
//!
//! A model folder is what Hugging Face writes, with a `sidereal.json` beside it ([`config`]). The
//! architecture that its `config.json` names chooses the family:
//!
//! | architectures | family |
//! | --- | --- |
//! | `T5ForConditionalGeneration` | [`t5`] |
//! | `Qwen3ForCausalLM`, `Qwen2ForCausalLM`, `LlamaForCausalLM` | [`decoder_only`] |

use crate::backend::{Backend, Batch, Heads, StepTokens};
use crate::error::{Error, Result};
use config::Config;
use weights::Weights;

pub mod config;
pub mod decoder_only;
pub mod t5;
pub mod weights;

/// What the engine must know of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelSpec {
    /// Tokens that the network knows.
    pub vocab_size: usize,
    /// The most positions of input and output together, where the network has a limit.
    pub max_positions: Option<usize>,
    /// Layers that keep KV for decoding.
    pub num_layers: usize,
    /// The heads of that KV.
    pub heads: Heads,
    /// Whether a prompt is read as a whole, by an encoder; the decoder then starts with
    /// `start_token`. Otherwise it may be read in chunks, and its last row scores the first step.
    pub has_encoder: bool,
    /// The token that decoding starts with, where there is an encoder.
    pub start_token: u32,
    /// Numbers in the weights.
    pub num_weights: usize,
}

/// A network with its weights on a device.
pub trait Model<B: Backend>: Send + Sync {
    /// What the engine must know of it.
    fn spec(&self) -> &ModelSpec;
    /// The output head.
    fn head(&self) -> &B::Head;
    /// Reads the rows of a batch: `tokens` for its prompts, which for an encoder are whole, and the
    /// newest tokens of its beams. Leaves the KV in the memory, and in `scratch.hidden`, for each
    /// search whose prompt has been read, a row a beam: what its next step is scored by.
    fn forward(
        &self,
        backend: &B,
        tokens: &[u32],
        batch: &mut Batch<'_, B>,
        scratch: &mut Scratch<B>,
    );
}

/// The activations of a forward pass, kept from pass to pass so that nothing is allocated anew.
pub struct Scratch<B: Backend> {
    /// What the step is scored by: the final norm's output.
    pub hidden: B::Buffer,
    residual: B::Buffer,
    normed: B::Buffer,
    projected: B::Buffer,
    attended: B::Buffer,
    rope: B::Buffer,
    spare: B::Buffer,
    /// The residual stream of the rows that the last layer goes on with.
    last: B::Buffer,
}

impl<B: Backend> Scratch<B> {
    /// Empty buffers.
    pub fn new(backend: &B) -> Scratch<B> {
        Scratch {
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

/// Puts a checkpoint on a device.
///
/// # Errors
/// Those of the files: an architecture that is not served, a key that is missing or wrong, a tensor
/// that is missing, left over, of another shape or not finite.
pub fn load<B: Backend>(
    backend: &B,
    config: &Config,
    mut weights: Weights,
    steps: &[StepTokens],
) -> Result<Box<dyn Model<B>>> {
    match config.architecture()? {
        "T5ForConditionalGeneration" => {
            let model = t5::T5::load(backend, config, &mut weights, steps)?;
            weights.finish(t5::is_known_spare)?;
            Ok(Box::new(model))
        }
        name @ ("Qwen3ForCausalLM" | "Qwen2ForCausalLM" | "LlamaForCausalLM") => {
            let flavour = decoder_only::Flavour::of(name);
            let model =
                decoder_only::DecoderOnly::load(backend, config, flavour, &mut weights, steps)?;
            weights.finish(decoder_only::is_known_spare)?;
            Ok(Box::new(model))
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
