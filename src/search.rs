//! Words of a beam search that requests, engine and backends have in common.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

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

/// How a token is drawn from what the model says may come next.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Sampling {
    /// Divides the logits; zero takes the likeliest token.
    pub temperature: f32,
    /// Only the likeliest are drawn from; zero for all.
    pub top_k: usize,
    /// Only the likeliest whose probabilities sum to this are drawn from; 1 for all.
    pub top_p: f32,
    /// Only tokens are drawn whose probability is at least this much of the likeliest's.
    pub min_p: f32,
    /// Divides the logits above zero of tokens that were read or written before, and multiplies those
    /// below; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Equal seeds draw equal tokens after equal inputs.
    pub seed: u64,
}

impl Default for Sampling {
    /// The model's own distribution.
    fn default() -> Sampling {
        Sampling {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

impl Sampling {
    /// Why nothing can be drawn so.
    pub(crate) fn fault(&self) -> Option<String> {
        let Sampling { temperature, top_p, min_p, repetition_penalty, .. } = *self;
        let is_cold = temperature == 0.0;
        let ranges = [
            (
                "temperature",
                temperature,
                is_cold || (0.01..=100.0).contains(&temperature),
                "0, or between 0.01 and 100",
            ),
            ("top_p", top_p, top_p > 0.0 && top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", min_p, (0.0..=1.0).contains(&min_p), "between 0 and 1"),
            (
                "repetition_penalty",
                repetition_penalty,
                (0.01..=100.0).contains(&repetition_penalty),
                "between 0.01 and 100",
            ),
        ];
        let wrong = ranges.into_iter().find(|(_, _, is_sound, _)| !is_sound);
        wrong.map(|(name, value, _, range)| format!("\"{name}\" is {value}; it must be {range}"))
    }
}

/// How the results of several thoughts become one list. An item is listed once, best first; equal
/// scores by the earlier branch, then as the branch has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Merge {
    /// The score of an item is the best that a branch gives it.
    #[default]
    Max,
    /// The score of an item is the log of the mean of its probabilities: that under a branch which is
    /// drawn at random. A branch that does not find the item counts as probability zero.
    Mean,
}

/// How a search of phrases keeps and ranks those that have ended. A phrase's score is the sum of its
/// log-probabilities, that of the end with them, divided by its length to the power of a penalty;
/// the length is its tokens and the end.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct PhraseRule {
    /// Which phrases count as found, and when the search is over.
    #[serde(default)]
    pub search: PhraseSearch,
    /// Above zero long phrases gain, below zero short ones; at most 16 either way. 0 by default, and
    /// 1 with [`PhraseSearch::Generate`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub length_penalty: Option<f32>,
    /// When [`PhraseSearch::Generate`] is over.
    #[serde(default)]
    pub early_stopping: EarlyStopping,
}

/// Which phrases count as found, and when a search of phrases is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PhraseSearch {
    /// Every phrase whose end is reached counts; ended ones take no beam from the others. The search
    /// is over when no longer phrase can be better than the worst of as many as there are beams. With
    /// enough beams the answer equals that of scoring each phrase alone.
    #[default]
    Exact,
    /// The rule of Hugging Face's `generate` (transformers 5): of the best continuations, twice as
    /// many as beams, those that end count if they are among the first half. One beam is greedy.
    Generate,
}

/// The argument `early_stopping` of Hugging Face's `generate`: `false`, `true` or `"never"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum EarlyStopping {
    /// Over when the best running beam, as if it ended now, is no better than the worst phrase.
    #[default]
    No,
    /// Over when there are as many phrases as beams.
    Yes,
    /// Over when no running beam can be better than the worst phrase, however long it becomes.
    Never,
}

impl PhraseRule {
    /// A rule with the penalty that belongs to it.
    pub fn new(search: PhraseSearch) -> PhraseRule {
        PhraseRule { search, length_penalty: None, early_stopping: EarlyStopping::No }
    }

    /// Sets [`length_penalty`](PhraseRule::length_penalty).
    #[must_use]
    pub fn with_length_penalty(mut self, penalty: f32) -> PhraseRule {
        self.length_penalty = Some(penalty);
        self
    }

    /// Sets [`early_stopping`](PhraseRule::early_stopping).
    #[must_use]
    pub fn with_early_stopping(mut self, early_stopping: EarlyStopping) -> PhraseRule {
        self.early_stopping = early_stopping;
        self
    }

    /// What a length is raised to.
    pub fn penalty(&self) -> f32 {
        self.length_penalty.unwrap_or(match self.search {
            PhraseSearch::Exact => 0.0,
            PhraseSearch::Generate => 1.0,
        })
    }

    /// Why no search can follow the rule.
    pub(crate) fn fault(&self) -> Option<String> {
        let penalty = self.penalty();
        let is_sound = penalty.is_finite() && penalty.abs() <= MAX_LENGTH_PENALTY;
        (!is_sound).then(|| {
            format!(
                "\"length_penalty\" is {penalty}; a number between -{MAX_LENGTH_PENALTY} and \
                 {MAX_LENGTH_PENALTY} is possible"
            )
        })
    }
}

/// Scores of longer phrases would overflow.
const MAX_LENGTH_PENALTY: f32 = 16.0;

impl Default for PhraseRule {
    fn default() -> PhraseRule {
        PhraseRule::new(PhraseSearch::Exact)
    }
}

impl Serialize for EarlyStopping {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            EarlyStopping::No => serializer.serialize_bool(false),
            EarlyStopping::Yes => serializer.serialize_bool(true),
            EarlyStopping::Never => serializer.serialize_str("never"),
        }
    }
}

impl<'de> Deserialize<'de> for EarlyStopping {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<EarlyStopping, D::Error> {
        match Value::deserialize(deserializer)? {
            Value::Bool(false) => Ok(EarlyStopping::No),
            Value::Bool(true) => Ok(EarlyStopping::Yes),
            Value::String(text) if text == "never" => Ok(EarlyStopping::Never),
            other => Err(D::Error::custom(format!(
                "early_stopping: {other} is neither false nor true nor \"never\""
            ))),
        }
    }
}
