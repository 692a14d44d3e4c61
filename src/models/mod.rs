//! Network families, each written once for all devices.
//!
//! A model folder is what Hugging Face writes, with a `sidereal.json` beside it ([`config`]). The
//! class that its `config.json` names in `architectures`, or its `model_type`, chooses the family:
//!
//! | `architectures` | `model_type` | family |
//! | --- | --- | --- |
//! | `T5ForConditionalGeneration`, `MT5ForConditionalGeneration` | `t5`, `mt5` | [`t5`] |
//! | `LlamaForCausalLM`, `MistralForCausalLM`, `Qwen2ForCausalLM`, `Qwen3ForCausalLM`, `GemmaForCausalLM` | `llama`, `mistral`, `qwen2`, `qwen3`, `gemma` | [`decoder_only`] |

use std::sync::Arc;

use crate::backend::Backend;
use crate::error::Result;
use config::{Config, SidLayout};
use weights::Weights;

pub mod config;
pub mod decoder_only;
mod family;
mod folder;
mod grid;
pub mod layout;
pub mod levels;
mod network;
mod relative_bias;
mod rope;
pub mod t5;
pub mod vocabulary;
pub mod weights;
mod whole_words;

pub use family::Family;
pub use folder::Checkpoint;
pub use network::{
    Activations, EncoderPiece, EncoderSweep, ForwardPass, Model, ModelOutput, ModelSpec, Network,
    PromptKind,
};
pub use whole_words::WordRule;

/// Puts a checkpoint on a device; `layout` says which tokens its searches choose from.
///
/// # Errors
/// Those of the files: an architecture that is not served, a key that is missing, wrong, or of unknown
/// effect, a tensor that is missing, left over, of another shape or not finite.
pub fn load<B: Backend>(
    backend: &B,
    config: &Config,
    mut weights: Weights,
    layout: &SidLayout,
) -> Result<Arc<dyn Model<B>>> {
    let family = Family::of(config)?;
    weights.rename(config.path(), |name| family.canonical_name(name))?;
    let model: Arc<dyn Model<B>> = match family.is_t5() {
        true => {
            let model = t5::T5::load(backend, config, family, &mut weights, layout)?;
            weights.finish(|name, _| t5::is_spare(name) || config.is_ignored(name))?;
            Arc::new(model)
        }
        false => {
            use decoder_only::DecoderOnly;
            let (model, spares) = DecoderOnly::load(backend, config, family, &mut weights, layout)?;
            weights
                .finish(|name, tensor| spares.is_spare(name, tensor) || config.is_ignored(name))?;
            Arc::new(model)
        }
    };
    config.finish()?;
    Ok(model)
}

/// The size of the vocabulary that a configuration names.
///
/// # Errors
/// [`Error::ModelConfig`](crate::Error::ModelConfig) where it names none.
pub fn vocab_size(config: &Config) -> Result<usize> {
    config.size("vocab_size")
}
