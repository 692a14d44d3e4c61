//! Words of a beam search that requests, engine and backends have in common.

use serde::{Deserialize, Serialize};

/// What the scores of a step are normalised over (natural log of a probability).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Normalization {
    /// Log-softmax over the model's whole output vocabulary, before it is restricted to the legal
    /// continuations. Hugging Face's `generate` and most published evaluations do this.
    #[default]
    Vocabulary,
    /// Log-softmax over the codes of the level.
    Level,
    /// Log-softmax over the legal continuations of the beam's prefix.
    Children,
}

/// Which continuations of a beam are legal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Constraint {
    /// Codes that lead to an item that the catalog has and the request allows.
    #[default]
    Trie,
    /// Codes that some item of the catalog has at the level, available or not (LC-Rec's rule); beams
    /// that end on no allowed item are dropped from the answer.
    Occurring,
    /// Any code of the level; beams that end on no allowed item are dropped from the answer.
    Level,
    /// Any token of the vocabulary; beams that end on no allowed item are dropped from the answer.
    None,
}
