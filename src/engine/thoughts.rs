//! What a request thinks before it searches, checked, and what came of it.

use super::lookup::{check_vocabulary, named_token};
use crate::answer::{Recommendation, Thought};
use crate::backend::sampling::StopRule;
use crate::backend::{Beam, SampleStep, noise};
use crate::error::{Error, Result};
use crate::models::PromptKind;
use crate::prompt::Text;
use crate::request::{Request, Think};
use crate::search::{Merge, Sampling};

/// Tokens of a thought at most.
const MAX_THOUGHT: usize = 1 << 16;
/// Thoughts of a request at most.
const MAX_BRANCHES: usize = 64;
/// Stop texts at most, and bytes of each.
const MAX_STOP_TEXTS: usize = 16;
const MAX_STOP_BYTES: usize = 128;

/// The thoughts that one request samples.
pub(super) struct Thinking {
    /// By branch.
    samplings: Vec<Sampling>,
    stop: Vec<u32>,
    stop_texts: Option<StopTexts>,
    /// Where the decoder does not read the context: the token that it starts with.
    start: Option<u32>,
    /// Tokens at most, without the stop token.
    max_tokens: usize,
    pub merge: Merge,
}

/// Texts that end a thought.
struct StopTexts {
    texts: Vec<String>,
    /// Tokens that may stand for the longest.
    most_tokens: usize,
    tokenizer: Text,
}

impl StopRule for StopTexts {
    fn is_over(&self, tokens: &[u32]) -> bool {
        let newest = &tokens[tokens.len().saturating_sub(self.most_tokens)..];
        self.tokenizer.decode(newest).is_ok_and(|text| self.first_in(&text).is_some())
    }
}

impl StopTexts {
    /// Where the first of the texts begins.
    fn first_in(&self, text: &str) -> Option<usize> {
        self.texts.iter().filter_map(|stop| text.find(stop)).min()
    }
}

impl Thinking {
    /// What a request thinks, if it does. `device`: why the device samples no thoughts, if it does not;
    /// `tokenizer`: the model's, with the size of its vocabulary.
    ///
    /// # Errors
    /// [`Error::InvalidField`]; [`Error::Unsupported`] where the device samples no thoughts.
    pub fn of(
        request: &Request,
        device: &Result<()>,
        (tokenizer, vocab_size): (&Text, usize),
        prompt: PromptKind,
    ) -> Result<Option<Thinking>> {
        let Some(think) = &request.think else { return Ok(None) };
        let Think { max_tokens, stop, stop_texts, sampling, branches, merge } = think;
        device.clone()?;
        let invalid = |reason: String| Err(Error::InvalidField { field: "think", reason });
        if let Some(reason) = sampling.fault() {
            return invalid(reason);
        }
        for (name, value, max) in
            [("max_tokens", *max_tokens, MAX_THOUGHT), ("branches", *branches, MAX_BRANCHES)]
        {
            if !(1..=max).contains(&value) {
                return invalid(format!("\"{name}\" is {value}; 1 to {max} are possible"));
            }
        }
        let beside = [
            ("groups", !request.groups.is_empty()),
            ("seed", request.seed.is_some()),
            ("log_probs", request.log_probs),
            ("read", *branches > 1 && !request.read.is_empty()),
        ];
        if let Some((field, _)) = beside.into_iter().find(|(_, is_given)| *is_given) {
            let what = if field == "read" { "of several branches goes" } else { "goes" };
            return invalid(format!("{what} without {field:?}; leave one of them out"));
        }
        let vocabulary = tokenizer.vocabulary();
        let stop = stop.iter().map(|token| named_token(&vocabulary, "think", token));
        let stop = stop.collect::<Result<Vec<u32>>>()?;
        if stop.is_empty() && stop_texts.is_empty() {
            let reason = "has no \"stop\" and no \"stop_texts\"; name at least one token or text \
                          that ends a thought";
            return invalid(reason.into());
        }
        check_vocabulary("think", &stop, vocab_size)?;
        let start = match prompt {
            PromptKind::Chunked => None,
            PromptKind::Whole { start_token, .. } => Some(start_token),
        };
        Ok(Some(Thinking {
            samplings: (0..*branches).map(|branch| of_branch(*sampling, branch)).collect(),
            stop,
            stop_texts: checked_texts(stop_texts, tokenizer)?,
            start,
            max_tokens: *max_tokens,
            merge: *merge,
        }))
    }

    pub fn num_branches(&self) -> usize {
        self.samplings.len()
    }

    /// Steps of the longest thought, with that of its stop token.
    pub fn num_steps(&self) -> usize {
        self.max_tokens + usize::from(!self.stop.is_empty())
    }

    /// How the slot of a branch samples, whose context is `tokens`.
    pub fn step<'a>(&'a self, branch: usize, tokens: &'a [u32]) -> SampleStep<'a> {
        SampleStep {
            sampling: &self.samplings[branch],
            stop: &self.stop,
            stop_rule: self.stop_texts.as_ref().map(|texts| -> &dyn StopRule { texts }),
            seen: self.start.as_ref().map_or(tokens, std::slice::from_ref),
        }
    }

    /// The thought that a beam begins with.
    pub fn thought(&self, beam: &Beam, tokenizer: &Text) -> Thought {
        let mut tokens = beam.tokens[..self.num_steps() - beam.num_skipped].to_vec();
        tokens.pop_if(|newest| self.stop.first() == Some(newest));
        let mut text = tokenizer.decode(&tokens).ok();
        let stop_texts = self.stop_texts.as_ref();
        let stop_text = stop_texts.and_then(|stop| stop.first_in(text.as_deref()?));
        if let (Some(text), Some(end)) = (&mut text, stop_text) {
            text.truncate(end);
        }
        let is_complete = beam.num_skipped > 0 || stop_text.is_some();
        Thought { tokens, text, is_complete }
    }
}

/// The first branch draws as one thought alone does.
fn of_branch(sampling: Sampling, branch: usize) -> Sampling {
    let seed = match branch {
        0 => sampling.seed,
        _ => noise::extended(sampling.seed, u32::MAX - branch as u32),
    };
    Sampling { seed, ..sampling }
}

fn checked_texts(texts: &[String], tokenizer: &Text) -> Result<Option<StopTexts>> {
    let invalid = |reason: String| Err(Error::InvalidField { field: "think", reason });
    let Some(longest) = texts.iter().map(String::len).max() else { return Ok(None) };
    if texts.len() > MAX_STOP_TEXTS {
        let count = texts.len();
        return invalid(format!("has {count} \"stop_texts\"; {MAX_STOP_TEXTS} are possible"));
    }
    if longest > MAX_STOP_BYTES || texts.iter().any(String::is_empty) {
        return invalid(format!("has a stop text that is not of 1 to {MAX_STOP_BYTES} bytes"));
    }
    // An error of its own where there is no tokenizer.
    tokenizer.decode(&[])?;
    // A token has a byte at least, but for the few that stand for nothing.
    let (texts, most_tokens) = (texts.to_vec(), longest + 8);
    Ok(Some(StopTexts { texts, most_tokens, tokenizer: tokenizer.clone() }))
}

/// The lists of all branches as one, of `top_k` items at most.
pub(super) fn merged(
    rule: Merge,
    branches: Vec<Vec<Recommendation>>,
    top_k: usize,
) -> Vec<Recommendation> {
    let count = branches.len() as f64;
    // In the order in which they are first met.
    let mut found: Vec<(Recommendation, f64)> = Vec::new();
    let mut places = std::collections::HashMap::new();
    for (branch, items) in branches.into_iter().enumerate() {
        for item in items {
            let item = Recommendation { branch: Some(branch), ..item };
            let place = *places.entry(item.item.clone()).or_insert(found.len());
            let score = f64::from(item.score);
            match found.get_mut(place) {
                None => found.push((item, score)),
                Some((best, sum)) => {
                    let (less, more) = (sum.min(score), sum.max(score));
                    *sum = match less == f64::NEG_INFINITY {
                        true => more,
                        false => more + (less - more).exp().ln_1p(),
                    };
                    if item.score > best.score {
                        *best = item;
                    }
                }
            }
        }
    }
    if rule == Merge::Mean {
        found.iter_mut().for_each(|(item, sum)| item.score = (*sum - count.ln()) as f32);
    }
    let mut items: Vec<Recommendation> = found.into_iter().map(|(item, _)| item).collect();
    items.sort_by(|a, b| b.score.total_cmp(&a.score));
    items.truncate(top_k);
    items
}
