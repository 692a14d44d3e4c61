//! Network families, each written once for all devices.
//!
//! A model folder is what Hugging Face writes, with a `sidereal.json` beside it ([`config`]). The
//! class that its `config.json` names in `architectures`, or its `model_type`, chooses the family:
//!
//! | `architectures` | `model_type` | family |
//! | --- | --- | --- |
//! | `T5ForConditionalGeneration`, `MT5ForConditionalGeneration` | `t5`, `mt5` | [`t5`] |
//! | `LlamaForCausalLM`, `MistralForCausalLM`, `Qwen2ForCausalLM`, `Qwen3ForCausalLM`, `GemmaForCausalLM` | `llama`, `mistral`, `qwen2`, `qwen3`, `gemma` | [`decoder_only`] |
//!
//! Networks whose output is a vector have no class there: the `family` of the folder's `sidereal.json`
//! chooses [`sasrec`], [`bert4rec`], [`gru4rec`] or [`hstu`] ([`load_vectors`]). So it does with networks
//! that score candidates: [`dlrm_hstu`] ([`load_scores`]).

use std::sync::Arc;

use crate::backend::Backend;
use crate::error::{Error, Result};
use config::{Config, SidLayout};
use weights::Weights;

pub mod bert4rec;
pub mod config;
pub mod decoder_only;
pub mod dlrm_hstu;
mod dlrm_rows;
mod family;
mod feature_table;
mod folder;
mod grid;
pub mod gru4rec;
pub mod hstu;
pub mod layout;
pub mod levels;
mod mlp;
mod network;
mod relative_bias;
mod rope;
pub mod sasrec;
mod sasrec_meta;
mod score_network;
mod stu;
pub mod t5;
mod transformer_block;
mod vector_network;
pub mod vocabulary;
pub mod weights;
mod whole_words;

pub use family::Family;
pub use folder::Checkpoint;
pub use network::{
    Activations, EncoderPiece, EncoderSweep, ForwardPass, Model, ModelOutput, ModelSpec, Network,
    PromptKind,
};
pub(crate) use score_network::scores_candidates;
pub use score_network::{
    ROWS_PER_PASS, SCORE_FAMILIES, ScoreModel, ScoreNetwork, ScoreRequest, ScoreSpec, ScoredItem,
    Task,
};
pub(crate) use vector_network::gives_vectors;
pub use vector_network::{
    Events, VECTOR_FAMILIES, VectorModel, VectorNetwork, VectorPrompt, VectorSpec,
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

/// Puts a checkpoint of one of the [`VECTOR_FAMILIES`] on a device. `config` is the folder's
/// `sidereal.json`: these projects write no configuration. Sizes are those of the tensors.
///
/// # Errors
/// [`Error::Unsupported`] for another family or layout; [`Error::ModelConfig`] where a key is missing
/// or of unknown effect; those of the weights.
pub fn load_vectors<B: Backend>(
    backend: &B,
    config: &Config,
    mut weights: Weights,
) -> Result<VectorModel<B>> {
    weights.rename(config.path(), family::unwrapped)?;
    let family = config.text_or("family", "")?.to_string();
    let model = match family.as_str() {
        "sasrec" => sasrec::Sasrec::load(backend, config, &mut weights)?,
        "bert4rec" => bert4rec::Bert4Rec::load(backend, config, &mut weights)?,
        "gru4rec" => gru4rec::Gru4Rec::load(backend, config, &mut weights)?,
        "hstu" => hstu::Hstu::load(backend, config, &mut weights)?,
        other => {
            return Err(Error::Unsupported {
                what: format!("the family {other:?} as one that gives vectors"),
                way_out: format!("{} are", VECTOR_FAMILIES.join(", ")),
            });
        }
    };
    let is_spare = |name: &str| ["hstu", "sasrec"].contains(&&*family) && hstu::is_spare(name);
    weights.finish(|name, _| is_spare(name) || config.is_ignored(name))?;
    config.without_effect(&["ignore", "items", "item_vectors", "metric"]);
    config.finish()?;
    Ok(model)
}

/// Puts a checkpoint of one of the [`SCORE_FAMILIES`] on a device. `config` is the folder's
/// `sidereal.json`.
///
/// # Errors
/// Those of [`load_vectors`].
pub fn load_scores<B: Backend>(
    backend: &B,
    config: &Config,
    mut weights: Weights,
) -> Result<ScoreModel<B>> {
    weights.rename(config.path(), family::unwrapped)?;
    let model = match config.text_or("family", "")? {
        "dlrm_hstu" => dlrm_hstu::DlrmHstu::load(backend, config, &mut weights)?,
        other => {
            return Err(Error::Unsupported {
                what: format!("the family {other:?} as one that scores candidates"),
                way_out: format!("{} are", SCORE_FAMILIES.join(", ")),
            });
        }
    };
    weights.finish(|name, _| dlrm_hstu::is_spare(name) || config.is_ignored(name))?;
    config.without_effect(&["ignore", "items"]);
    config.finish()?;
    Ok(model)
}

/// The size of the vocabulary that a configuration names.
///
/// # Errors
/// [`Error::ModelConfig`] where it names none.
pub fn vocab_size(config: &Config) -> Result<usize> {
    config.size("vocab_size")
}
