//! What a model writes before it recommends: what a request asks for, and what came of it.

use serde::{Deserialize, Serialize};

use crate::request::NamedToken;
use crate::search::Sampling;

/// What a model is to write before it recommends, token by token, as it likes.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Think {
    /// Tokens of the thought at most, without the stop token.
    pub max_tokens: usize,
    /// The tokens that end it. The model then goes on behind the first of them, whichever it was, and
    /// also where the thought has as many tokens as it may have. At least one, unless there are
    /// `stop_texts`.
    pub stop: Vec<NamedToken>,
    /// Texts that end it, in a folder that has a tokenizer. The tokens that complete such a text are
    /// part of the thought, and the model goes on behind them, without a stop token; the thought's text
    /// ends before it.
    pub stop_texts: Vec<String>,
    /// How each token is drawn.
    pub sampling: Sampling,
    /// Thoughts that are drawn from one input, each followed by a search of its own: 1 to 64. The
    /// first is that of a request of one branch.
    pub branches: usize,
    /// How the branches' results become one.
    pub merge: Merge,
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

/// What a model wrote before it recommended.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Thought {
    /// Without the stop token.
    pub tokens: Vec<u32>,
    /// What they say, up to a stop text, where the model folder has a tokenizer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Whether the model ended it; otherwise it had as many tokens as it may have.
    pub is_complete: bool,
}

impl Thought {
    pub(crate) fn new(tokens: Vec<u32>, text: Option<String>, is_complete: bool) -> Thought {
        Thought { tokens, text, is_complete }
    }
}

impl Think {
    /// One thought that is drawn from the model's own distribution.
    pub fn new(max_tokens: usize, stop: impl IntoIterator<Item = NamedToken>) -> Think {
        let stop = stop.into_iter().collect();
        Think {
            max_tokens,
            stop,
            stop_texts: Vec::new(),
            sampling: Sampling::default(),
            branches: 1,
            merge: Merge::default(),
        }
    }

    /// Sets [`sampling`](Think::sampling).
    #[must_use]
    pub fn with_sampling(mut self, sampling: Sampling) -> Think {
        self.sampling = sampling;
        self
    }

    /// Sets [`stop_texts`](Think::stop_texts).
    #[must_use]
    pub fn with_stop_texts(mut self, texts: impl IntoIterator<Item = impl Into<String>>) -> Think {
        self.stop_texts = texts.into_iter().map(Into::into).collect();
        self
    }

    /// Sets [`branches`](Think::branches) and [`merge`](Think::merge).
    #[must_use]
    pub fn with_branches(mut self, branches: usize, merge: Merge) -> Think {
        (self.branches, self.merge) = (branches, merge);
        self
    }
}
