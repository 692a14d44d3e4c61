//! The phrases of the catalog as requests search them.
//!
//! Titles become tokens when an engine is opened, and when the catalog has a new base segment:
//! the first request then waits for them. Items that are put in between cost their own tokens.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use lru::LruCache;
use rayon::ThreadPool;
use rayon::prelude::*;

use super::lookup::Wishes;
use crate::backend::{Backend, PhraseStep};
use crate::catalog::candidates::Candidates;
use crate::catalog::phrases::{AllowedPhrases, PassingPhrases, PhraseSet};
use crate::catalog::token_trie::Phrases;
use crate::catalog::{Catalog, Snapshot};
use crate::error::{Error, Result};
use crate::models::config::SidLayout;
use crate::prompt::PhraseLayout;
use crate::request::{MAX_BEAMS, Request};
use crate::search::{Constraint, PhraseRule};

/// Filters whose phrases are kept.
const MAX_FILTERS: NonZeroUsize = NonZeroUsize::new(64).expect("not zero");

/// The phrases of the catalog's newest state that a request asked for.
pub(super) struct PhraseIndex {
    layout: PhraseLayout,
    vocab_size: usize,
    pool: Arc<ThreadPool>,
    newest: Mutex<Arc<PhraseSet>>,
    /// By snapshot and filter.
    passing: Mutex<LruCache<(u64, Option<String>), PassingPhrases>>,
}

/// The phrases that one request searches.
pub(super) struct PhraseSearch {
    pub set: Arc<PhraseSet>,
    rule: PhraseRule,
    end: u32,
    /// By search.
    allowed: Vec<AllowedPhrases>,
    candidates: Option<AllowedPhrases>,
    /// Slots before the first search.
    first_slot: usize,
}

impl PhraseIndex {
    /// The phrases of a catalog's items, where the layout has some.
    ///
    /// # Errors
    /// Those of the tokenizer; [`Error::InvalidOption`] where no item has a phrase;
    /// [`Error::Unsupported`] where the device searches none.
    pub fn open<B: Backend>(
        backend: &B,
        layout: &SidLayout,
        vocab_size: usize,
        pool: &Arc<ThreadPool>,
        catalog: &Catalog,
    ) -> Result<Option<PhraseIndex>> {
        let Some(layout) = layout.phrases.clone() else { return Ok(None) };
        backend.check_phrases()?;
        let (snapshot, pool) = (&*catalog.checked_snapshot()?, Arc::clone(pool));
        let set = PhraseSet::new(snapshot, None, |items| {
            phrases_of(&layout, vocab_size, &pool, snapshot, items)
        })?;
        if set.num_phrases() == 0 {
            let reason = "no item of the catalog has one; give the items titles, or name another \
                          text";
            return Err(Error::InvalidOption { option: "phrases", reason: reason.into() });
        }
        let passing = Mutex::new(LruCache::new(MAX_FILTERS));
        let newest = Mutex::new(Arc::new(set));
        Ok(Some(PhraseIndex { layout, vocab_size, pool, newest, passing }))
    }

    /// The end of a phrase.
    pub fn end(&self) -> u32 {
        self.layout.end
    }

    /// Steps of a search for the longest phrase.
    pub fn max_steps(&self) -> usize {
        self.newest.lock().unwrap_or_else(PoisonError::into_inner).max_len() + 1
    }

    /// The phrases of a snapshot.
    ///
    /// # Errors
    /// Those of the tokenizer.
    pub fn of(&self, snapshot: &Snapshot) -> Result<Arc<PhraseSet>> {
        // Whoever comes meanwhile needs what is made here.
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        if !newest.is_of(snapshot) {
            let PhraseIndex { layout, vocab_size, pool, .. } = self;
            *newest = Arc::new(PhraseSet::new(snapshot, Some(&newest), |items| {
                phrases_of(layout, *vocab_size, pool, snapshot, items)
            })?);
        }
        Ok(Arc::clone(&newest))
    }

    /// What a request searches. `candidates`: the items to score.
    ///
    /// # Errors
    /// [`Error::InvalidField`] for a filter, or a rule that no search can follow.
    pub fn search(
        &self,
        request: &Request,
        snapshot: &Snapshot,
        set: Arc<PhraseSet>,
        wishes: &Wishes,
        candidates: Option<&[u32]>,
    ) -> Result<PhraseSearch> {
        let rule = request.phrase_rule.unwrap_or(self.layout.rule);
        let allowed = wishes.filters.iter().map(|filter| {
            let passing = self.passing(snapshot, &set, filter.as_deref())?;
            Ok(set.allowed(&passing, &wishes.excluded, wishes.only.as_deref()))
        });
        let allowed = allowed.collect::<Result<Vec<_>>>()?;
        let candidates = match candidates {
            None => None,
            Some(items) => {
                let available = self.passing(snapshot, &set, None)?;
                Some(set.allowed(&available, &[], Some(items)))
            }
        };
        let first_slot = usize::from(!request.read.is_empty());
        Ok(PhraseSearch { set, rule, end: self.layout.end, allowed, candidates, first_slot })
    }

    fn passing(
        &self,
        snapshot: &Snapshot,
        set: &PhraseSet,
        filter: Option<&str>,
    ) -> Result<PassingPhrases> {
        let kept = || self.passing.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (snapshot.number(), filter.map(str::to_string));
        if let Some(passing) = kept().get(&key) {
            return Ok(passing.clone());
        }
        let passing = set.passing(snapshot, &snapshot.allowed_set(&[], filter)?);
        kept().put(key, passing.clone());
        Ok(passing)
    }
}

impl PhraseSearch {
    /// How a slot takes its steps; `None` for one that reads named tokens.
    pub fn step(&self, slot: usize) -> Option<PhraseStep<'_>> {
        let allowed = self.allowed.get(slot.checked_sub(self.first_slot)?)?;
        Some(PhraseStep {
            set: &self.set,
            allowed,
            candidates: self.candidates.as_ref(),
            end: self.end,
            rule: self.rule,
            max_len: self.set.max_len() + 1,
        })
    }
}

fn phrases_of(
    layout: &PhraseLayout,
    vocab_size: usize,
    pool: &ThreadPool,
    snapshot: &Snapshot,
    items: Range<u32>,
) -> Result<Phrases> {
    let tokens = |item: u32| {
        let tokens = layout.tokens(snapshot.name(item), snapshot.title(item), vocab_size)?;
        Ok(tokens.map(|tokens| (item, tokens)))
    };
    let found = pool.install(|| items.into_par_iter().map(tokens).collect::<Result<Vec<_>>>())?;
    let mut phrases = Phrases::default();
    found.iter().flatten().for_each(|(item, tokens)| phrases.push(*item, tokens));
    Ok(phrases)
}

/// Refuses what a search among phrases does not have; `has_phrases`: the model writes some.
pub(super) fn check_fields(request: &Request, has_phrases: bool) -> Result<()> {
    let invalid = |field, reason: &str| Err(Error::InvalidField { field, reason: reason.into() });
    if !has_phrases {
        return match request.phrase_rule {
            Some(_) => invalid(
                "phrase_rule",
                "goes with a model that writes phrases; name them in sidereal.json: \
                 \"phrases\": \"titles\"",
            ),
            None => Ok(()),
        };
    }
    if let Some(reason) = request.phrase_rule.and_then(|rule| rule.fault()) {
        return Err(Error::InvalidField { field: "phrase_rule", reason });
    }
    let of_levels = [
        ("beams", !request.widths.is_empty(), "a list of widths; phrases have one width"),
        ("constraint", request.constraint != Constraint::Trie, "phrases need the trie"),
        ("seed", request.seed.is_some(), "samples are of semantic IDs; phrases have none yet"),
        (
            "log_probs",
            request.log_probs,
            "log-probabilities are of semantic IDs; phrases have a score alone",
        ),
    ];
    match of_levels.into_iter().find(|(_, is_given, _)| *is_given) {
        Some((field, _, reason)) => invalid(field, reason),
        None => Ok(()),
    }
}

/// The beam width of a search for phrases, step by step.
pub(super) fn widths(
    request: &Request,
    candidates: Option<&Candidates>,
    num_steps: usize,
) -> Result<Vec<usize>> {
    let width = match candidates {
        Some(candidates) => candidates.items().len().max(1),
        None => request.beams,
    };
    if width == 0 || width > MAX_BEAMS {
        return Err(Error::BeamWidth { width: width as i64, max: MAX_BEAMS });
    }
    Ok(vec![width; num_steps])
}
