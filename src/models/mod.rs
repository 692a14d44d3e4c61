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

use crate::backend::Backend;
use crate::error::{Error, Result};
use config::{Config, SidLayout};
use weights::Weights;

pub mod config;
pub mod decoder_only;
pub mod folder;
pub mod levels;
mod network;
pub mod t5;
pub mod vocabulary;
pub mod weights;

pub use network::{
    Activations, EncoderPiece, EncoderSweep, ForwardPass, Model, ModelOutput, ModelSpec, Network,
    PromptKind,
};

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
