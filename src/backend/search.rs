//! The operations of a search: what a step may choose from, the head, the choice of beams.
//!
//! A [`SearchRule`] says how one slot takes one step. Slots in a batch may be at different steps and
//! under different rules. Each operation is a trait of one method, so that its implementation is one
//! file.

use super::sampling::StopRule;
use super::{Batch, DeviceOps};
use crate::catalog::Snapshot;
use crate::catalog::allowed::AllowedSet;
use crate::catalog::candidates::Candidates;
use crate::catalog::cursor::Cursor;
use crate::catalog::phrases::{AllowedPhrases, PhraseNode, PhraseSet};
use crate::error::Result;
use crate::search::{Constraint, Normalization, PhraseRule, Sampling};

/// Stands for "this code has no token" in a level.
pub const NO_TOKEN: u32 = u32::MAX;

/// The tokens that one step of a search may choose from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepChoice<'a> {
    /// A level of the semantic ID, by its index among those that the head was made with. The rule's
    /// constraint says which of its codes may follow.
    Level(usize),
    /// One token, with which every beam goes on.
    Forced {
        /// The token.
        token: u32,
        /// Whether its log-probability counts in the score: that over the vocabulary, or nothing
        /// where scores are normalised over less, as the token is then certain.
        is_counted: bool,
    },
    /// Named tokens, an ad hoc level: code `c` is token `tokens[c]`. Any of them may follow, whatever
    /// the constraint; children and level are these tokens. A seed has no effect.
    Tokens(&'a [u32]),
    /// A token of a phrase, or its end: the rule's `phrases` says which may follow.
    Phrase,
    /// A token that is drawn, of the rule's `thought`, which has one beam.
    Sample {
        /// Steps of the thought after this one. Without any the thought ends, by its first stop token
        /// where it has one.
        num_left: usize,
    },
}

/// How a thought takes its steps.
#[derive(Clone, Copy)]
pub struct SampleStep<'a> {
    /// How a token is drawn.
    pub sampling: &'a Sampling,
    /// The tokens that end it; the first is what it ends with, whichever was drawn.
    pub stop: &'a [u32],
    /// A further rule that ends it, such as texts.
    pub stop_rule: Option<&'a dyn StopRule>,
    /// The tokens before the slot's own that a repetition penalty is for.
    pub seen: &'a [u32],
}

/// How a search takes its steps among phrases.
#[derive(Clone, Copy)]
pub struct PhraseStep<'a> {
    /// All phrases of the snapshot.
    pub set: &'a PhraseSet,
    /// Those that may answer the request.
    pub allowed: &'a AllowedPhrases,
    /// Follow these phrases and no others, to their ends; what is allowed still says what scores are
    /// normalised over.
    pub candidates: Option<&'a AllowedPhrases>,
    /// The token that ends a phrase.
    pub end: u32,
    /// Which phrases count, and when the search is over.
    pub rule: PhraseRule,
    /// The longest that a phrase can be, with its end.
    pub max_len: usize,
}

/// How one search takes one step.
#[derive(Clone, Copy)]
pub struct SearchRule<'a> {
    /// The state of the catalog that is searched.
    pub snapshot: &'a Snapshot,
    /// The items that the request may be answered with.
    pub allowed_set: &'a AllowedSet,
    /// The tokens that the step may choose from.
    pub choice: StepChoice<'a>,
    /// Levels of the semantic ID that were chosen before this step, or tokens of the phrase: the
    /// trie's depth.
    pub depth: usize,
    /// Beams kept at this step.
    pub beams: usize,
    /// What scores are normalised over.
    pub normalization: Normalization,
    /// What may follow a prefix.
    pub constraint: Constraint,
    /// Divides the logits.
    pub temperature: f32,
    /// Follow these paths and no others; what is legal still says what scores are normalised over.
    pub candidates: Option<&'a Candidates>,
    /// Keep a sample instead of the best: this seeds its noise.
    pub seed: Option<u64>,
    /// Keep the log-probabilities of each step, of both kinds.
    pub log_probs: bool,
    /// For steps of phrases.
    pub phrases: Option<PhraseStep<'a>>,
    /// For steps of a thought.
    pub thought: Option<SampleStep<'a>>,
}

/// The log-probability of one chosen token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogProb {
    /// Over all tokens of the model.
    pub vocabulary: f32,
    /// Over the legal continuations of the prefix.
    pub children: f32,
}

/// What the scores of a row are normalised over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Normalizer {
    /// All tokens of the model.
    Vocabulary,
    /// The level's codes that have a token.
    Level,
    /// The beam's legal continuations.
    Children,
    /// Nothing: the one continuation has probability one.
    Certain,
}

/// The continuations that a step offers, by where they come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Continuations {
    /// The children of the beam's node in the catalog.
    Children,
    /// The codes that some item of the catalog has at a level.
    Occurring,
    /// All codes of a level that have a token.
    Level,
    /// All tokens of the model.
    Vocabulary,
    /// One token.
    Forced,
    /// Named tokens.
    Tokens,
    /// The children of the beam's prefix among phrases, and the end.
    Phrases,
    /// One token that is drawn from all.
    Sampled,
}

impl<'a> SearchRule<'a> {
    /// The best of all that is allowed at a level, normalised over the vocabulary, in a search that
    /// takes a step for each level.
    pub fn new(
        snapshot: &'a Snapshot,
        allowed_set: &'a AllowedSet,
        level: usize,
        beams: usize,
    ) -> SearchRule<'a> {
        SearchRule {
            snapshot,
            allowed_set,
            choice: StepChoice::Level(level),
            depth: level,
            beams,
            normalization: Normalization::Vocabulary,
            constraint: Constraint::Trie,
            temperature: 1.0,
            candidates: None,
            seed: None,
            log_probs: false,
            phrases: None,
            thought: None,
        }
    }

    /// The set that scores of the step are normalised over. Where any token is legal, the children
    /// are the vocabulary; where any code is, they are the level; a forced token is alone.
    pub fn normalizer(&self) -> Normalizer {
        match (self.choice, self.normalization, self.constraint) {
            (StepChoice::Forced { is_counted: false, .. } | StepChoice::Sample { .. }, ..) => {
                Normalizer::Certain
            }
            (_, Normalization::Vocabulary, _) => Normalizer::Vocabulary,
            (StepChoice::Forced { .. }, ..) => Normalizer::Certain,
            (StepChoice::Tokens(_), ..) => Normalizer::Level,
            (StepChoice::Phrase, ..) => Normalizer::Children,
            (_, Normalization::Children, Constraint::Trie | Constraint::Occurring) => {
                Normalizer::Children
            }
            (_, Normalization::Children, Constraint::None) => Normalizer::Vocabulary,
            _ => Normalizer::Level,
        }
    }

    pub(super) fn continuations(&self) -> Continuations {
        match (self.choice, self.constraint) {
            (StepChoice::Forced { .. }, _) => Continuations::Forced,
            (StepChoice::Tokens(_), _) => Continuations::Tokens,
            (StepChoice::Phrase, _) => Continuations::Phrases,
            (StepChoice::Sample { .. }, _) => Continuations::Sampled,
            (_, Constraint::Trie) => Continuations::Children,
            (_, Constraint::Occurring) => Continuations::Occurring,
            (_, Constraint::Level) => Continuations::Level,
            (_, Constraint::None) => Continuations::Vocabulary,
        }
    }

    /// The seed, where the step is sampled.
    pub(super) fn sampling_seed(&self) -> Option<u64> {
        match self.choice {
            StepChoice::Tokens(_) => None,
            _ => self.seed,
        }
    }

    /// Levels of the semantic ID that have been chosen after this step.
    pub(super) fn next_depth(&self) -> usize {
        self.depth + usize::from(matches!(self.choice, StepChoice::Level(_)))
    }

    /// Whether cursors are whole semantic IDs after this step.
    pub(super) fn reaches_leaves(&self) -> bool {
        self.constraint == Constraint::Trie && self.next_depth() >= self.snapshot.num_levels()
    }
}

/// A finished beam, read back from the device.
#[derive(Debug, Clone, PartialEq)]
pub struct Beam {
    /// The tokens chosen, one a step.
    pub tokens: Vec<u32>,
    /// The cursor of the semantic ID, where the search was constrained to the catalog's.
    pub cursor: Option<Cursor>,
    /// The phrase, where the search was for phrases; the end is the last of its tokens.
    pub phrase: Option<PhraseNode>,
    /// Steps of a thought that it did not need.
    pub num_skipped: usize,
    /// Natural log of the probability; of a phrase, as its rule says.
    pub score: f32,
    /// By step, where the rule asked for them.
    pub log_probs: Vec<LogProb>,
}

/// Runs a whole step of a search.
pub trait Step: DeviceOps {
    /// Does `work`, which calls the operations of one step of a search: the passes of a network
    /// over `batch`, then the head and the choice of beams by `rules`, one for each slot. A device
    /// may capture what `work` asks for as a graph, and replay it in steps of one shape; where it
    /// has no memory to keep the graph, it calls `work` again.
    fn step(
        &self,
        batch: &mut Batch<'_, Self>,
        head: &Self::Head,
        rules: &[SearchRule<'_>],
        logits: &mut Self::Logits,
        work: impl FnMut(&mut Batch<'_, Self>, &mut Self::Logits),
    );
}

/// The output head.
pub trait LmHead: DeviceOps {
    /// The output head over the slice of the vocabulary that each slot's rule can choose from:
    /// `hidden`'s product (one row a beam) with those tokens, and the normaliser of each row that
    /// its rule wants. The batch has rows of beams alone; its pass keeps the plan of the step for
    /// [`advance_beams`](AdvanceBeams::advance_beams).
    fn lm_head(
        &self,
        hidden: &Self::Buffer,
        head: &Self::Head,
        rules: &[SearchRule<'_>],
        batch: &mut Batch<'_, Self>,
        out: &mut Self::Logits,
    );
}

/// The choice of beams.
pub trait AdvanceBeams: DeviceOps {
    /// Extends the beams of each slot by one step: the legal continuations, and the best `beams` of
    /// them by score, equal scores by smaller semantic ID. A forced step extends every beam by its
    /// token and sorts them again. Failures are reported when the beams are read.
    ///
    /// With a seed, `beams` continuations are drawn without replacement from the distribution over
    /// legal ones (Gumbel top-k in a beam search, Kool et al. 2019), in the order drawn; the noise
    /// of a continuation depends on the seed and its tokens alone.
    ///
    /// A step of a phrase sets phrases that end apart; once the rule says that the search is over,
    /// the slot has no beams.
    fn advance_beams(
        &self,
        logits: &Self::Logits,
        head: &Self::Head,
        rules: &[SearchRule<'_>],
        batch: &mut Batch<'_, Self>,
    );
}

/// The way back to the host.
pub trait ReadBeams: DeviceOps {
    /// The beams of each slot, best first; of a search for phrases, those that ended. No other operation
    /// waits for the device.
    ///
    /// # Errors
    /// [`NonFiniteScores`](crate::Error::NonFiniteScores) where a step's scores were NaN or
    /// infinite; [`Device`](crate::Error::Device) where the device failed.
    fn read_beams(&self, slots: &[&Self::Slot]) -> Vec<Result<Vec<Beam>>>;
}

/// All operations of a search.
pub trait SearchOps: Step + LmHead + AdvanceBeams + ReadBeams {}

impl<B> SearchOps for B where B: Step + LmHead + AdvanceBeams + ReadBeams {}
