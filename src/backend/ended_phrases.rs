//! Which phrases a search has found, and whether it goes on.

use super::PhraseStep;
use crate::catalog::phrases::PhraseNode;
use crate::search::{EarlyStopping, PhraseRule, PhraseSearch};

/// A phrase that a beam has written to its end.
#[derive(Debug, Clone)]
pub(super) struct EndedPhrase {
    /// As the rule says.
    pub score: f32,
    pub tokens: Vec<u32>,
    pub node: PhraseNode,
}

/// The phrases that count, best first.
#[derive(Debug, Clone)]
pub(super) struct EndedPhrases {
    rule: PhraseRule,
    /// As many are kept; all where candidates are scored.
    width: usize,
    max_len: usize,
    phrases: Vec<EndedPhrase>,
}

impl EndedPhrases {
    /// None, of a search with so many beams.
    pub fn new(step: &PhraseStep<'_>, beams: usize) -> EndedPhrases {
        let width = if step.candidates.is_some() { usize::MAX } else { beams };
        EndedPhrases { rule: step.rule, width, max_len: step.max_len, phrases: Vec::new() }
    }

    /// The phrases, best first.
    pub fn phrases(&self) -> &[EndedPhrase] {
        &self.phrases
    }

    /// How many of the best continuations are looked at, ends among them; `None` where ends are no
    /// continuations.
    pub fn num_continuations(&self, beams: usize) -> Option<usize> {
        let is_generate = self.rule.search == PhraseSearch::Generate && self.width < usize::MAX;
        is_generate.then_some(2 * beams)
    }

    /// Takes in a phrase with the sum of its log-probabilities. Among equal ones the first stays first.
    pub fn offer(&mut self, sum: f32, tokens: Vec<u32>, node: PhraseNode, len: usize) {
        let score = self.penalised(sum, len);
        let place = self.phrases.partition_point(|other| other.score >= score);
        self.phrases.insert(place, EndedPhrase { score, tokens, node });
        self.phrases.truncate(self.width);
    }

    /// Whether the search is over, with the best running beam's sum and how many tokens beams have.
    pub fn is_over(&self, best_running: f32, len: usize) -> bool {
        let Some(worst) = self.phrases.last().filter(|_| self.phrases.len() >= self.width) else {
            return false;
        };
        let penalty = self.rule.penalty();
        match (self.rule.search, self.rule.early_stopping) {
            // A sum only falls. Divided by what grows with the length it is best at the longest.
            (PhraseSearch::Exact, _) => {
                let best_len = if penalty > 0.0 { self.max_len } else { len + 1 };
                self.penalised(best_running, best_len) < worst.score
            }
            (PhraseSearch::Generate, EarlyStopping::Yes) => true,
            // One beam is greedy: it ends with its first phrase.
            (PhraseSearch::Generate, _) if self.width == 1 => true,
            (PhraseSearch::Generate, stopping) => {
                let is_longest = stopping == EarlyStopping::Never && penalty > 0.0;
                let len = if is_longest { self.max_len } else { len };
                self.penalised(best_running, len) <= worst.score
            }
        }
    }

    fn penalised(&self, sum: f32, len: usize) -> f32 {
        // The power in f64, as Python has it.
        sum / (len as f64).powf(self.rule.penalty().into()) as f32
    }
}
