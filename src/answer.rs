//! What comes back.

use std::sync::Arc;

use crate::backend::LogProb;
use crate::catalog::Snapshot;
use crate::catalog::sid::Sid;

/// One item of an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Recommendation {
    /// The item's number in the answer's snapshot, which knows its name and title.
    pub item: u32,
    /// Its semantic ID.
    pub sid: Sid,
    /// Natural log of the probability of the semantic ID (and of the forced suffix, if any).
    pub score: f32,
    /// Of each code (and each forced token), where the request asks for them.
    pub log_probs: Vec<LogProb>,
}

/// The answer to one [`Request`](crate::Request).
#[derive(Clone)]
pub struct Answer {
    /// Best first; equal scores by smaller semantic ID, then by the catalog's order. Empty where
    /// the request asks for groups.
    pub items: Vec<Recommendation>,
    /// The same for each filter of the request's `each`, in its order.
    pub groups: Vec<Vec<Recommendation>>,
    /// The state of the catalog that was searched, and that knows the items by these numbers.
    pub snapshot: Arc<Snapshot>,
    /// Tokens of the request's context.
    pub tokens: usize,
    /// Those of them that were there from earlier requests.
    pub cached_tokens: usize,
    /// The weights that answered: 1 as the engine was opened, one more each time that they were
    /// [replaced](crate::Engine::replace_weights).
    pub weights_version: u64,
}

impl Answer {
    /// The name of an item of the answer.
    pub fn name(&self, found: &Recommendation) -> &str {
        self.snapshot.name(found.item)
    }
}

/// Equal items of snapshots with the same number.
impl PartialEq for Answer {
    fn eq(&self, other: &Answer) -> bool {
        self.items == other.items
            && self.groups == other.groups
            && self.snapshot.number() == other.snapshot.number()
    }
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Answer")
            .field("items", &self.items)
            .field("groups", &self.groups)
            .field("snapshot", &self.snapshot.number())
            .finish()
    }
}
