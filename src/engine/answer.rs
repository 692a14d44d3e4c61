//! The answer to a request, from the beams of its searches, and where it goes.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use super::prepare::Prepared;
use super::program::Output;
use super::thoughts::{Thinking, merged};
use crate::answer::{Answer, Group, ReadToken, Recommendation, Sequence};
use crate::backend::{Beam, LogProb, NO_TOKEN};
use crate::catalog::Snapshot;
use crate::catalog::cursor::Cursor;
use crate::error::{Error, Result};
use crate::models::config::SidLayout;
use crate::prompt::Text;
use crate::request::NamedToken;

type Callback = Box<dyn FnOnce(Result<Answer>) + Send>;

/// The place that one request named for its answer. It is told exactly once: the answer, why there
/// is none, or, where the engine is gone first, that.
///
/// A callback that panics harms its own request alone.
pub struct Reply(
    /// Never locked: the mutex makes what is only `Send` shareable with the threads that compute.
    Mutex<Option<Callback>>,
);

impl Reply {
    /// Calls `callback` with the answer, on the thread that steps the engine. The steps of all
    /// requests wait meanwhile.
    pub fn new(callback: impl FnOnce(Result<Answer>) + Send + 'static) -> Reply {
        Reply(Mutex::new(Some(Box::new(callback))))
    }

    /// Gives the answer to its caller.
    pub fn send(mut self, answer: Result<Answer>) {
        self.call(answer);
    }

    /// Drops the callback without calling it: for a request that was never taken in.
    pub(crate) fn disarm(mut self) {
        self.0.get_mut().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn call(&mut self, answer: Result<Answer>) {
        let callback = self.0.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(callback) = callback
            && let Err(panic) = catch_unwind(AssertUnwindSafe(|| callback(answer)))
        {
            std::mem::forget(panic); // what was thrown may panic again when it is dropped
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        let reason = "it ended before the request was answered".into();
        self.call(Err(Error::EngineFailed { reason }));
    }
}

/// What tokens stand for in an answer.
pub(super) struct Codes {
    /// By level: the code of each token.
    levels: Vec<HashMap<u32, u16>>,
    text: Text,
}

impl Codes {
    pub fn new(layout: &SidLayout) -> Codes {
        let codes = layout.levels.iter().map(|tokens| {
            let tokens = tokens.iter().enumerate().filter(|&(_, &token)| token != NO_TOKEN);
            tokens.map(|(code, &token)| (token, code as u16)).collect()
        });
        Codes { levels: codes.collect(), text: layout.prompt.text().clone() }
    }

    /// The cursor that tokens of an unconstrained search name, if they name one.
    fn cursor(&self, snapshot: &Snapshot, tokens: &[u32]) -> Option<Cursor> {
        let code = |(codes, token): (&HashMap<u32, u16>, &u32)| codes.get(token).copied();
        let codes = self.levels.iter().zip(tokens).map(code).collect::<Option<Vec<u16>>>()?;
        snapshot.cursor(&codes)
    }

    /// The answer to a request from the beams of its searches.
    ///
    /// # Errors
    /// Those of the beams.
    pub fn answer(
        &self,
        prepared: &Prepared,
        cached_tokens: usize,
        weights_version: u64,
        beams: impl Iterator<Item = Result<Vec<Beam>>>,
    ) -> Result<Answer> {
        let (mut groups, mut read, mut thoughts) = (Vec::new(), Vec::new(), Vec::new());
        let mut sequences = Vec::new();
        let num_branches = prepared.thinking.as_ref().map_or(0, Thinking::num_branches);
        for (slot, beams) in beams.enumerate() {
            let beams = beams?;
            if let (Some(thinking), Some(beam)) = (&prepared.thinking, beams.first())
                && thoughts.len() < num_branches
            {
                thoughts.push(thinking.thought(beam, &self.text));
            }
            match prepared.program.slots()[slot].output {
                Output::Items => {
                    groups.push(self.items(prepared, slot, &beams));
                    if prepared.request.sequences {
                        sequences = self.sequences(prepared, slot, &beams);
                    }
                }
                Output::LogProbs => read = read_tokens(prepared, &beams),
            }
        }
        let filters = &prepared.request.groups;
        let items = match (&prepared.thinking, filters.is_empty()) {
            (Some(thinking), true) if num_branches > 1 => {
                merged(thinking.merge, std::mem::take(&mut groups), prepared.max_items())
            }
            (_, true) => groups.pop().unwrap_or_default(), // none where named tokens alone are read
            (_, false) => Vec::new(),
        };
        let group = |(filter, items): (&String, _)| Group { filter: filter.clone(), items };
        Ok(Answer {
            items,
            groups: filters.iter().zip(groups).map(group).collect(),
            read,
            sequences,
            thoughts,
            snapshot: Arc::clone(&prepared.snapshot),
            tokens: prepared.tokens().len(),
            cached_tokens,
            skipped_items: prepared.skipped_items,
            unknown_items: prepared.unknown_items.clone(),
            weights_version,
            timings: None,
        })
    }

    /// The items that the beams name.
    fn items(&self, prepared: &Prepared, slot: usize, beams: &[Beam]) -> Vec<Recommendation> {
        let snapshot = &*prepared.snapshot;
        let most = prepared.max_items_per_sid();
        let of_beam = |beam: &Beam| {
            let (log_probs, score) = (counted(prepared, slot, beam), beam.score);
            let items = self.items_of(prepared, slot, beam).into_iter();
            items.take(most).map(move |item| Recommendation {
                log_probs: log_probs.clone(),
                ..Recommendation::new(snapshot, item, score, prepared.request.titles)
            })
        };
        let has_branches =
            prepared.thinking.as_ref().is_some_and(|thinking| thinking.num_branches() > 1);
        let most = if has_branches { usize::MAX } else { prepared.max_items() };
        beams.iter().flat_map(of_beam).take(most).collect()
    }

    /// What the beams wrote.
    fn sequences(&self, prepared: &Prepared, slot: usize, beams: &[Beam]) -> Vec<Sequence> {
        let num_drawn = prepared.thinking.as_ref().map_or(0, Thinking::num_steps);
        let of_beam = |beam: &Beam| {
            let tokens = beam.tokens[num_drawn - beam.num_skipped..].to_vec();
            let text = self.text.decode(&tokens).ok();
            let items = self.items_of(prepared, slot, beam).into_iter();
            let name = |item: u32| prepared.snapshot.name(item).to_string();
            Sequence {
                log_probs: counted(prepared, slot, beam),
                items: items.map(name).collect(),
                score: beam.score,
                tokens,
                text,
            }
        };
        beams.iter().map(of_beam).collect()
    }

    /// The items that a beam names and that may come back.
    fn items_of(&self, prepared: &Prepared, slot: usize, beam: &Beam) -> Vec<u32> {
        let snapshot = &*prepared.snapshot;
        let allowed_set = &prepared.allowed_sets[prepared.list_of(slot)];
        let mut items: Vec<u32> = match (beam.phrase, &prepared.phrases) {
            (Some(phrase), Some(phrases)) => {
                let mut items: Vec<u32> = phrases.set.items(phrase).collect();
                snapshot.sort_shared(&mut items);
                items
            }
            _ => {
                let before_codes = prepared.program.slots()[slot].num_before_codes();
                let before_codes = before_codes.saturating_sub(beam.num_skipped);
                let cursor = beam.cursor;
                let cursor =
                    cursor.or_else(|| self.cursor(snapshot, beam.tokens.get(before_codes..)?));
                let num_levels = snapshot.num_levels();
                cursor.iter().flat_map(|&cursor| snapshot.items(cursor, num_levels)).collect()
            }
        };
        items.retain(|&item| match &prepared.candidates {
            Some(candidates) => candidates.contains(item),
            None => allowed_set.allows(snapshot, item),
        });
        items
    }
}

/// The log-probabilities of a beam's tokens, from the first that counts.
fn counted(prepared: &Prepared, slot: usize, beam: &Beam) -> Vec<LogProb> {
    let num_uncounted = prepared.program.slots()[slot].num_uncounted();
    beam.log_probs.get(num_uncounted..).unwrap_or_default().to_vec()
}

/// The log-probabilities of the tokens that a request names, in its order. A beam of the slot that
/// read them ends with each.
fn read_tokens(prepared: &Prepared, beams: &[Beam]) -> Vec<ReadToken> {
    let newest = beams.iter().filter_map(|beam| Some((*beam.tokens.last()?, beam.score)));
    let log_probs: HashMap<u32, f32> = newest.collect();
    let named = prepared.request.read.iter().zip(&prepared.read);
    let read = named.map(|(name, &token)| ReadToken {
        token,
        text: match name {
            NamedToken::Text(text) => Some(text.clone()),
            NamedToken::Id(_) => None,
        },
        log_prob: log_probs.get(&token).copied().unwrap_or(f32::NEG_INFINITY),
    });
    read.collect()
}
