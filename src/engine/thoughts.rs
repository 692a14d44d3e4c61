//! What a request thinks before it searches, checked.

use super::lookup::{check_vocabulary, named_token};
use crate::backend::SampleStep;
use crate::error::{Error, Result};
use crate::models::PromptKind;
use crate::models::vocabulary::Vocabulary;
use crate::request::{Request, Think};
use crate::search::Sampling;

/// Tokens of a thought at most.
const MAX_THOUGHT: usize = 1 << 16;

/// A thought that one request samples.
pub(super) struct Thinking {
    sampling: Sampling,
    /// At least one.
    stop: Vec<u32>,
    /// Where the decoder does not read the context: the token that it starts with.
    start: Option<u32>,
    /// Tokens at most, without the stop token.
    pub max_tokens: usize,
}

impl Thinking {
    /// What a request thinks, if it does. `device`: why the device samples no thoughts, if it does not;
    /// `vocabulary`: the model's, with its size.
    ///
    /// # Errors
    /// [`Error::InvalidField`]; [`Error::Unsupported`] where the device samples no thoughts.
    pub fn of(
        request: &Request,
        device: &Result<()>,
        (vocabulary, vocab_size): (&Vocabulary, usize),
        prompt: PromptKind,
    ) -> Result<Option<Thinking>> {
        let Some(Think { max_tokens, stop, sampling }) = &request.think else { return Ok(None) };
        device.clone()?;
        let invalid = |reason: String| Err(Error::InvalidField { field: "think", reason });
        if let Some(reason) = sampling.fault() {
            return invalid(reason);
        }
        if !(1..=MAX_THOUGHT).contains(max_tokens) {
            return invalid(format!(
                "\"max_tokens\" is {max_tokens}; 1 to {MAX_THOUGHT} are possible"
            ));
        }
        let beside = [
            ("groups", !request.groups.is_empty()),
            ("seed", request.seed.is_some()),
            ("log_probs", request.log_probs),
        ];
        if let Some((field, _)) = beside.into_iter().find(|(_, is_given)| *is_given) {
            return invalid(format!("goes without {field:?}; leave one of them out"));
        }
        let stop = stop.iter().map(|token| named_token(vocabulary, "think", token));
        let stop = stop.collect::<Result<Vec<u32>>>()?;
        if stop.is_empty() {
            return invalid("has no \"stop\"; name at least one token that ends a thought".into());
        }
        check_vocabulary("think", &stop, vocab_size)?;
        let start = match prompt {
            PromptKind::Chunked => None,
            PromptKind::Whole { start_token, .. } => Some(start_token),
        };
        Ok(Some(Thinking { sampling: *sampling, stop, start, max_tokens: *max_tokens }))
    }

    /// How a slot samples, whose context is `tokens`.
    pub fn step<'a>(&'a self, tokens: &'a [u32]) -> SampleStep<'a> {
        let seen = self.start.as_ref().map_or(tokens, std::slice::from_ref);
        SampleStep { sampling: &self.sampling, stop: &self.stop, seen }
    }
}
