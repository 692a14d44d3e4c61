//! Which network a configuration is for, and the names of its tensors.

use super::config::Config;
use crate::backend::Activation;
use crate::error::{Error, Result};

/// The networks that are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `t5`
    T5,
    /// `mt5`: T5 under another name, whose head is never scaled.
    Mt5,
    /// `llama`
    Llama,
    /// `mistral`: Llama with a window, which must be longer than any context.
    Mistral,
    /// `qwen2`: biases on queries, keys and values.
    Qwen2,
    /// `qwen3`: norms of each query and key head.
    Qwen3,
    /// `gemma`: norms by `1 + w`, a scaled embedding, a feed-forward layer of GELU.
    Gemma,
}

/// Class, `model_type` and family.
const FAMILIES: [(&str, &str, Family); 7] = [
    ("T5ForConditionalGeneration", "t5", Family::T5),
    ("MT5ForConditionalGeneration", "mt5", Family::Mt5),
    ("LlamaForCausalLM", "llama", Family::Llama),
    ("MistralForCausalLM", "mistral", Family::Mistral),
    ("Qwen2ForCausalLM", "qwen2", Family::Qwen2),
    ("Qwen3ForCausalLM", "qwen3", Family::Qwen3),
    ("GemmaForCausalLM", "gemma", Family::Gemma),
];
/// Ends of the names of classes that put another head on a network, or read it in both directions.
const OTHER_TASKS: [&str; 8] = [
    "Classification",
    "QuestionAnswering",
    "EncoderModel",
    "Embedding",
    "Retrieval",
    "RewardModel",
    "BiModel",
    "EncoderForMaskedLM",
];

/// The activation of a name, by the names that transformers has for them (`ACT2FN`).
///
/// # Errors
/// [`Error::Unsupported`] for others; `key` is the configuration's.
pub(super) fn activation_of(key: &str, name: &str) -> Result<Activation> {
    Ok(match name {
        "relu" => Activation::Relu,
        "gelu" | "gelu_python" => Activation::Gelu,
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_python_tanh" | "gelu_fast" | "gelu_accurate" => {
            Activation::GeluTanh
        }
        "silu" | "swish" => Activation::Silu,
        other => {
            return Err(Error::Unsupported {
                what: format!("{key} with the activation {other:?}"),
                way_out: "silu, gelu, gelu_pytorch_tanh and relu are, by all their names".into(),
            });
        }
    })
}

impl Family {
    /// The family of a configuration: by the class that `architectures` names, and by `model_type`
    /// where the class is one of a training script's own.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where neither is known; [`Error::ModelConfig`] where they contradict
    /// each other or are missing.
    pub fn of(config: &Config) -> Result<Family> {
        let (class, model_type) = (config.architecture(), config.text("model_type"));
        let by_class = FAMILIES.iter().find(|(name, _, _)| Some(*name) == class);
        let by_type = FAMILIES.iter().find(|(_, name, _)| Some(*name) == model_type);
        let known = || {
            let names: Vec<&str> = FAMILIES.iter().map(|(name, _, _)| *name).collect();
            format!("{} are", names.join(", "))
        };
        match (by_class, by_type, class, model_type) {
            (Some(one), Some(other), ..) if one.2 != other.2 => Err(config.error(format!(
                "\"architectures\" names {:?} and \"model_type\" {:?}, which are two networks; \
                 correct the one that is wrong",
                one.0, other.1
            ))),
            (Some(_), None, Some(class), Some(model_type)) => Err(config.error(format!(
                "\"architectures\" names {class:?} and \"model_type\" {model_type:?}, which is \
                 another network; correct the one that is wrong"
            ))),
            (Some((_, _, family)), ..) => Ok(*family),
            (None, Some(_), Some(class), _)
                if OTHER_TASKS.iter().any(|end| class.contains(end)) =>
            {
                Err(Error::Unsupported {
                    what: format!("architecture {class:?}"),
                    way_out: known(),
                })
            }
            (None, Some((_, _, family)), ..) => Ok(*family),
            (None, None, Some(name), _) => {
                Err(Error::Unsupported { what: format!("architecture {name:?}"), way_out: known() })
            }
            (None, None, None, Some(name)) => {
                Err(Error::Unsupported { what: format!("model_type {name:?}"), way_out: known() })
            }
            (None, None, None, None) => Err(config.error(format!(
                "neither \"architectures\" nor \"model_type\" names the network: write, for \
                 instance, \"architectures\": [\"T5ForConditionalGeneration\"]; {}",
                known()
            ))),
        }
    }

    /// Whether the network has an encoder.
    pub fn is_t5(self) -> bool {
        matches!(self, Family::T5 | Family::Mt5)
    }

    /// Whether the network's embeddings and head are one tensor where a configuration does not say.
    pub fn is_tied_by_default(self) -> bool {
        matches!(self, Family::T5 | Family::Mt5 | Family::Gemma)
    }

    /// The names under which the one tensor of embeddings and head may stand.
    pub fn tied_names(self) -> &'static [&'static str] {
        match self.is_t5() {
            true => &[
                "shared.weight",
                "encoder.embed_tokens.weight",
                "decoder.embed_tokens.weight",
                "lm_head.weight",
            ],
            false => &["model.embed_tokens.weight", "lm_head.weight"],
        }
    }

    /// The network's own name of a tensor: that of Hugging Face's class, whatever a trainer put
    /// before it.
    pub fn canonical_name(self, name: &str) -> String {
        const T5_STARTS: [&str; 4] = ["shared.", "encoder.", "decoder.", "lm_head."];
        const DECODER_STARTS: [&str; 3] = ["embed_tokens.", "layers.", "norm."];
        let mut rest = name;
        loop {
            let starts = |starts: &[&str]| starts.iter().any(|start| rest.starts_with(start));
            match self.is_t5() {
                true if starts(&T5_STARTS) => return rest.into(),
                false if starts(&["lm_head."]) => return rest.into(),
                false if starts(&DECODER_STARTS) => return format!("model.{rest}"),
                _ => {}
            }
            match rest.split_once('.') {
                Some((wrapper, inner)) if WRAPPERS.contains(&wrapper) => rest = inner,
                _ => return name.into(),
            }
        }
    }
}

/// A tensor's name without what trainers put before it.
pub(super) fn unwrapped(name: &str) -> String {
    let mut rest = name;
    while let Some((_, inner)) = rest.split_once('.').filter(|(first, _)| WRAPPERS.contains(first))
    {
        rest = inner;
    }
    rest.into()
}

/// Names that trainers put before a network's own: of data parallelism, compilers, adapters, value
/// heads, and classes that hold the network in a field.
const WRAPPERS: [&str; 14] = [
    "_forward_module",
    "_fsdp_wrapped_module",
    "_orig_mod",
    "backbone",
    "base_model",
    "llm",
    "model",
    "module",
    "net",
    "network",
    "pretrained_model",
    "t5",
    "t5_model",
    "trm",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tensor_has_one_name_whatever_a_trainer_puts_before_it() {
        let names = [
            "model.layers.0.mlp.up_proj.weight",
            "layers.0.mlp.up_proj.weight",
            "module.model.layers.0.mlp.up_proj.weight",
            "base_model.model.model.layers.0.mlp.up_proj.weight",
            "_orig_mod.module.model.layers.0.mlp.up_proj.weight",
            "pretrained_model.model.layers.0.mlp.up_proj.weight",
        ];
        for name in names {
            let name = Family::Qwen3.canonical_name(name);
            assert_eq!(name, "model.layers.0.mlp.up_proj.weight");
        }
        assert_eq!(Family::Llama.canonical_name("model.lm_head.weight"), "lm_head.weight");
        for name in ["shared.weight", "model.shared.weight", "trm.module.t5.shared.weight"] {
            assert_eq!(Family::T5.canonical_name(name), "shared.weight");
        }
        for name in ["v_head.summary.weight", "model.vision.layers.0.weight", "score.weight"] {
            assert_eq!(Family::Llama.canonical_name(name), name);
        }
    }
}
