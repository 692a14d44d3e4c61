//! The field `think` of a request: what the model writes before it recommends.

use serde::ser::SerializeStruct;
use serde::{Deserialize, Serialize, Serializer};

use super::loose::{Real, Whole};
use super::tokens::{TokenName, named_tokens};
use crate::error::{Error, Result};
use crate::request::Think;
use crate::search::{Merge, Sampling};

/// A thought as a line writes it; what it leaves out is the model's own distribution.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Thinking {
    max_tokens: Whole,
    #[serde(default)]
    stop: Vec<TokenName>,
    #[serde(default)]
    stop_texts: Vec<String>,
    branches: Option<Whole>,
    #[serde(default)]
    merge: Merge,
    temperature: Option<Real>,
    top_k: Option<Whole>,
    top_p: Option<Real>,
    min_p: Option<Real>,
    repetition_penalty: Option<Real>,
    seed: Option<Whole>,
}

impl Thinking {
    /// # Errors
    /// [`Error::InvalidField`] for a number out of range.
    pub fn to_think(&self) -> Result<Think> {
        let size = |name: &str, Whole(number): Whole| {
            usize::try_from(number).map_err(|_| Error::InvalidField {
                field: "think",
                reason: format!("\"{name}\" is {number}, not a number of tokens"),
            })
        };
        let plain = Sampling::default();
        let real = |given: Option<Real>, default: f32| given.map_or(default, |Real(it)| it as f32);
        let seed = self.seed.map_or(Ok(plain.seed), |Whole(seed)| {
            u64::try_from(seed).map_err(|_| Error::InvalidField {
                field: "think",
                reason: format!("\"seed\" is {seed}, not between 0 and 2^64 - 1"),
            })
        });
        let sampling = Sampling {
            temperature: real(self.temperature, plain.temperature),
            top_k: self.top_k.map_or(Ok(plain.top_k), |top_k| size("top_k", top_k))?,
            top_p: real(self.top_p, plain.top_p),
            min_p: real(self.min_p, plain.min_p),
            repetition_penalty: real(self.repetition_penalty, plain.repetition_penalty),
            seed: seed?,
        };
        let max_tokens = size("max_tokens", self.max_tokens)?;
        let branches = self.branches.map_or(Ok(1), |branches| size("branches", branches))?;
        Ok(Think::new(max_tokens, named_tokens("think", &self.stop)?)
            .with_stop_texts(&self.stop_texts)
            .with_sampling(sampling)
            .with_branches(branches, self.merge))
    }
}

impl Serialize for Think {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let Think { max_tokens, stop, stop_texts, sampling, branches, merge } = self;
        let mut think = serializer.serialize_struct("Think", 11)?;
        think.serialize_field("max_tokens", max_tokens)?;
        think.serialize_field("stop", stop)?;
        think.serialize_field("stop_texts", stop_texts)?;
        think.serialize_field("branches", branches)?;
        think.serialize_field("merge", merge)?;
        think.serialize_field("temperature", &sampling.temperature)?;
        think.serialize_field("top_k", &sampling.top_k)?;
        think.serialize_field("top_p", &sampling.top_p)?;
        think.serialize_field("min_p", &sampling.min_p)?;
        think.serialize_field("repetition_penalty", &sampling.repetition_penalty)?;
        think.serialize_field("seed", &sampling.seed)?;
        think.end()
    }
}
