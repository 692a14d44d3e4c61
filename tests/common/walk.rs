//! Searches that are followed in f64, to hold backends to.

use std::collections::HashMap;
use std::sync::Arc;

use super::tiny::{TAGS, random_catalog};
use super::truth;
use sidereal::backend::testing::Cases;
use sidereal::backend::{Heads, NO_TOKEN, SearchRule, StepChoice};
use sidereal::catalog::Snapshot;
use sidereal::catalog::allowed::AllowedSet;
use sidereal::{Constraint, Normalization};

/// A search of one slot, followed in f64.
pub struct Walk {
    pub snapshot: Arc<Snapshot>,
    /// Only items with this tag, if any.
    pub tag: Option<&'static str>,
    pub excluded: Vec<u32>,
    /// These items alone, if any are listed.
    pub only: Option<Vec<u32>>,
    pub normalization: Normalization,
    pub constraint: Constraint,
    pub beams: usize,
    pub temperature: f32,
    pub context: Vec<f32>,
    pub context_len: usize,
    /// By the tokens chosen so far: score, and the KV rows written at each of its positions.
    pub prefixes: HashMap<Vec<u32>, f64>,
    pub tails: HashMap<Vec<u32>, Vec<f32>>,
}

/// The steps of a search: tokens forced before, between and after levels.
pub struct Steps {
    /// By level: the token of each code.
    pub levels: Vec<Vec<u32>>,
    pub choices: Vec<StepChoice<'static>>,
}

impl Steps {
    pub fn len(&self) -> usize {
        self.choices.len()
    }

    /// Levels before a step.
    pub fn depth(&self, step: usize) -> usize {
        let is_level = |choice: &&StepChoice<'_>| matches!(choice, StepChoice::Level(_));
        self.choices[..step].iter().filter(is_level).count()
    }

    /// The codes among the tokens of a legal prefix.
    fn codes(&self, prefix: &[u32]) -> Vec<u16> {
        let code = |(choice, token): (&StepChoice<'_>, &u32)| match choice {
            StepChoice::Level(level) => {
                let code = self.levels[*level].iter().position(|t| t == token);
                Some(code.expect("a legal prefix") as u16)
            }
            _ => None,
        };
        self.choices.iter().zip(prefix).filter_map(code).collect()
    }
}

impl Walk {
    pub fn new(cases: &mut Cases, num_levels: usize, num_codes: u16, heads: Heads) -> Walk {
        let catalog = random_catalog(&mut cases.rng, num_levels, num_codes).snapshot();
        let share = cases.rng.f32();
        let mut excluded: Vec<u32> = match cases.rng.bool() {
            true => catalog.all_items().filter(|_| cases.rng.f32() < share).collect(),
            false => Vec::new(),
        };
        excluded.sort_unstable();
        let only = (cases.rng.u8(0..3) == 0).then(|| {
            let mut only: Vec<u32> = catalog.all_items().filter(|_| cases.rng.bool()).collect();
            only.sort_unstable();
            only
        });
        let normalizations =
            [Normalization::Vocabulary, Normalization::Level, Normalization::Children];
        let normalization = normalizations[cases.rng.usize(0..3)];
        let constraint = match (cases.rng.u8(0..4), normalization) {
            (0, Normalization::Vocabulary | Normalization::Children) => Constraint::None,
            (1, _) if cases.rng.bool() => Constraint::Level,
            (1, _) => Constraint::Occurring,
            _ => Constraint::Trie,
        };
        let context_len = cases.size(200);
        Walk {
            snapshot: catalog,
            excluded,
            only,
            tag: TAGS.get(cases.rng.usize(0..2 * TAGS.len())).copied(),
            normalization,
            constraint,
            beams: cases.size(50),
            temperature: if cases.rng.bool() { 1.0 } else { 0.5 + cases.rng.f32() },
            context: cases.numbers(context_len * 2 * heads.kv_dim()),
            context_len,
            prefixes: HashMap::from([(Vec::new(), 0.0)]),
            tails: HashMap::new(),
        }
    }

    /// The rule of a step of `steps`.
    pub fn rule<'a>(
        &'a self,
        allowed_set: &'a AllowedSet,
        steps: &Steps,
        step: usize,
    ) -> SearchRule<'a> {
        SearchRule {
            choice: steps.choices[step],
            depth: steps.depth(step),
            normalization: self.normalization,
            constraint: self.constraint,
            temperature: self.temperature,
            ..SearchRule::new(&self.snapshot, allowed_set, 0, self.beams)
        }
    }

    pub fn allowed_set(&self) -> AllowedSet {
        let filter = self.tag.map(|tag| format!("tag:{tag}"));
        let allowed_set = self.snapshot.allowed_set(&self.excluded, filter.as_deref());
        let allowed_set = allowed_set.expect("a sound filter");
        match &self.only {
            Some(only) => allowed_set.restricted_to(&self.snapshot, only),
            None => allowed_set,
        }
    }

    /// Whether an allowed item's semantic ID starts with these codes.
    pub fn is_legal(&self, codes: &[u16]) -> bool {
        self.snapshot.all_items().any(|item| {
            self.snapshot.is_available(item)
                && self.tag.is_none_or(|tag| self.snapshot.tags(item).contains(&tag.to_string()))
                && !self.excluded.contains(&item)
                && self.only.as_ref().is_none_or(|only| only.contains(&item))
                && self.snapshot.sid(item).codes().starts_with(codes)
        })
    }

    /// Every continuation of a prefix with its score, by the definition.
    pub fn continuations(
        &self,
        prefix: &[u32],
        logits: &[f64],
        steps: &Steps,
    ) -> Vec<(Vec<u32>, f64)> {
        let scaled = |token: u32| logits[token as usize] / f64::from(self.temperature);
        let step = prefix.len();
        let (allowed, level): (Vec<u32>, Vec<u32>) = match steps.choices[step] {
            StepChoice::Forced { token, .. } => (vec![token], vec![token]),
            StepChoice::Tokens(tokens) => (tokens.to_vec(), tokens.to_vec()),
            StepChoice::Phrase | StepChoice::Sample { .. } => {
                unreachable!("walks are over semantic IDs")
            }
            StepChoice::Level(level) => {
                let tokens = &steps.levels[level];
                let known: Vec<u32> = tokens.iter().copied().filter(|&t| t != NO_TOKEN).collect();
                let allowed = match self.constraint {
                    Constraint::None => (0..logits.len() as u32).collect(),
                    Constraint::Level => known.clone(),
                    Constraint::Occurring => {
                        let token = |item| {
                            let codes = self.snapshot.sid(item);
                            tokens[usize::from(codes.codes()[level])]
                        };
                        let items = self.snapshot.all_items();
                        let mut occurring: Vec<u32> = items.map(token).collect();
                        occurring.sort_unstable();
                        occurring.dedup();
                        occurring
                    }
                    Constraint::Trie => {
                        let codes = steps.codes(prefix);
                        let legal = |&token: &u32| {
                            let code = tokens.iter().position(|&t| t == token);
                            let next = code.expect("a token of the level") as u16;
                            self.is_legal(&[&codes[..], &[next]].concat())
                        };
                        known.iter().copied().filter(legal).collect()
                    }
                };
                (allowed, known)
            }
        };
        let score = self.prefixes[prefix];
        if let StepChoice::Forced { token, is_counted: false } = steps.choices[step] {
            return vec![([prefix, &[token]].concat(), score)];
        }
        let over = match self.normalization {
            Normalization::Vocabulary => (0..logits.len() as u32).collect(),
            Normalization::Level => level,
            Normalization::Children => allowed.clone(),
        };
        let normalizer = truth::log_sum_exp(over.iter().map(|&token| scaled(token)));
        let extend =
            |&token: &u32| ([prefix, &[token]].concat(), score + scaled(token) - normalizer);
        allowed.iter().map(extend).collect()
    }
}
