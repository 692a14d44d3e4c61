//! A request on its way: what it was found to need, and the answer from its beams.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::Engine;
use crate::answer::{Answer, Recommendation};
use crate::backend::{Backend, Beam, NO_TOKEN, SearchRule};
use crate::catalog::Snapshot;
use crate::catalog::allowed::AllowedSet;
use crate::catalog::candidates::Candidates;
use crate::catalog::filter::Filter;
use crate::catalog::snapshot::Cursor;
use crate::error::{Error, Result};
use crate::models::config::SidLayout;
use crate::pages;
use crate::request::{Constraint, Input, MAX_BEAMS, Normalization, Request, SharedSid};
use crate::schedule::{Micros, Needs};

/// Groups that one request may ask for.
const MAX_GROUPS: usize = 256;
/// Logits that a search without a constraint may hold: beams times vocabulary.
const MAX_UNCONSTRAINED_LOGITS: usize = 1 << 28;

/// A request that was found possible.
pub(crate) struct Job {
    pub request: Request,
    /// The state of the catalog that the request sees from start to end.
    pub snapshot: Arc<Snapshot>,
    pub tokens: Vec<u32>,
    /// What may come back, search by search: one, or one for each of the request's groups.
    pub searches: Vec<AllowedSet>,
    /// What is scored instead.
    candidates: Option<Candidates>,
    normalization: Normalization,
    /// The beam width by step.
    widths: Vec<usize>,
    pub needs: Needs,
    /// When it was handed over.
    pub arrived_us: Micros,
}

impl Job {
    /// Pages that the tails of each search take.
    pub fn tail_pages_per_search(&self) -> usize {
        self.needs.tail_pages / self.searches.len()
    }

    pub fn deadline(&self) -> Option<Duration> {
        self.request.deadline
    }

    pub fn deadline_exceeded(&self) -> Error {
        let deadline = self.deadline().unwrap_or_default();
        Error::DeadlineExceeded { deadline_ms: deadline.as_millis() as u64 }
    }

    /// How a search's step is done.
    pub fn rule<'a>(&'a self, search: usize, step: usize, layout: &'a SidLayout) -> SearchRule<'a> {
        let (choice, depth) = layout.choice(step);
        SearchRule {
            choice,
            depth,
            snapshot: &self.snapshot,
            allowed_set: &self.searches[search],
            beams: self.widths[step],
            normalization: self.normalization,
            constraint: self.request.constraint,
            temperature: self.request.temperature,
            candidates: self.candidates.as_ref(),
            seed: self.request.sample,
            log_probs: self.request.log_probs,
        }
    }
}

impl<B: Backend> Engine<B> {
    /// Checks a request and works out what it needs.
    ///
    /// # Errors
    /// The request's.
    pub(crate) fn prepare(&self, request: Request) -> Result<Job> {
        let arrived_us = self.now_us();
        let Request { top_k, temperature, constraint, .. } = request;
        let snapshot = self.catalog.snapshot();
        let candidates = self.candidates(&request, &snapshot)?;
        let widths = self.widths(&request, candidates.as_ref())?;
        let most = widths.iter().copied().max().unwrap_or(0);
        if top_k == 0 {
            return Err(Error::TopK { top_k: 0 });
        }
        if !(temperature.is_finite() && temperature > 0.0 && (1.0 / temperature).is_finite()) {
            let reason = format!("{temperature} is not a number above zero");
            return Err(Error::InvalidField { field: "temperature", reason });
        }
        let normalization = request.normalization.unwrap_or(self.layout.normalization);
        if constraint == Constraint::None {
            if normalization == Normalization::Level {
                let reason = "\"level\" needs a constraint to the level or the trie".into();
                return Err(Error::InvalidField { field: "normalize", reason });
            }
            let vocab_size = self.spec.vocab_size;
            if most * request.each.len().max(1) * vocab_size > MAX_UNCONSTRAINED_LOGITS {
                let max = MAX_UNCONSTRAINED_LOGITS / vocab_size;
                return Err(Error::BeamWidth { width: most as i64, max });
            }
        }
        if request.each.len() > MAX_GROUPS {
            let reason = format!("has {} filters, at most {MAX_GROUPS} go", request.each.len());
            return Err(Error::InvalidField { field: "each", reason });
        }
        if constraint != Constraint::Trie && (request.sample.is_some() || request.log_probs) {
            let reason = "samples and log-probabilities need the trie".into();
            return Err(Error::InvalidField { field: "constraint", reason });
        }
        let tokens = self.tokens(&request.input, &snapshot)?;
        let searches = searches(&request, &snapshot)?;
        let needs = self.needs(tokens.len(), &widths, searches.len())?;
        Ok(Job {
            request,
            snapshot,
            tokens,
            searches,
            candidates,
            normalization,
            widths,
            needs,
            arrived_us,
        })
    }

    /// The items to score, if the request names some.
    fn candidates(&self, request: &Request, snapshot: &Snapshot) -> Result<Option<Candidates>> {
        if request.candidates.is_empty() {
            return Ok(None);
        }
        let conflicts = [
            ("filter", request.filter.is_some()),
            ("exclude", !request.exclude.is_empty()),
            ("each", !request.each.is_empty()),
            ("sample", request.sample.is_some()),
            ("constraint", request.constraint != Constraint::Trie),
        ];
        if let Some((field, _)) = conflicts.into_iter().find(|(_, is_given)| *is_given) {
            let reason = "goes with a search, not with candidates".into();
            return Err(Error::InvalidField { field, reason });
        }
        let find = |item: &String| {
            let unknown = || Error::UnknownItem { item: item.clone() };
            snapshot.find(item).ok_or_else(unknown)
        };
        if request.candidates.len() > MAX_BEAMS {
            let reason = format!("{} items, at most {MAX_BEAMS} go", request.candidates.len());
            return Err(Error::InvalidField { field: "candidates", reason });
        }
        let items = request.candidates.iter().map(find).collect::<Result<Vec<u32>>>()?;
        Ok(Some(Candidates::new(snapshot, &items)))
    }

    /// The beam width by step: forced steps keep what the last level has.
    fn widths(&self, request: &Request, candidates: Option<&Candidates>) -> Result<Vec<usize>> {
        let num_levels = self.layout.levels.len();
        let mut widths = match candidates {
            Some(candidates) => candidates.widths().iter().map(|&width| width.max(1)).collect(),
            None => request.widths.clone(),
        };
        if widths.is_empty() {
            widths = vec![request.beams; num_levels];
        }
        if widths.len() != num_levels {
            let reason =
                format!("{} widths are given, the model has {num_levels} levels", widths.len());
            return Err(Error::InvalidField { field: "beams", reason });
        }
        if let Some(&width) = widths.iter().find(|&&width| width == 0 || width > MAX_BEAMS) {
            return Err(Error::BeamWidth { width: width as i64, max: MAX_BEAMS });
        }
        widths.resize(self.num_steps(), widths[num_levels - 1]);
        Ok(widths)
    }

    /// What a request takes, if the engine has it.
    fn needs(&self, context_len: usize, widths: &[usize], searches: usize) -> Result<Needs> {
        // A position for the start and for each step, whether anything reads it again or not: a
        // device may keep the beams themselves there.
        let tail_pages = pages::tail_pages(std::iter::once(1).chain(widths.iter().copied()));
        let needs = Needs {
            context_pages: pages::context_pages(context_len),
            tail_pages: searches * tail_pages,
            beam_rows: searches * widths.iter().copied().max().unwrap_or(0),
        };
        let limits = [
            ("tokens of context", context_len, self.context_pages * pages::PAGE_LEN),
            (
                "rows of beams' memory",
                needs.tail_pages * pages::TAIL_PAGE_LEN,
                self.tail_pages * pages::TAIL_PAGE_LEN,
            ),
        ];
        match limits.into_iter().find(|(_, needs, limit)| needs > limit) {
            Some((what, needs, limit)) => Err(Error::TooLarge { what, needs, limit }),
            None => Ok(needs),
        }
    }

    /// The tokens that the model reads for an input, with the catalog as it is now.
    ///
    /// # Errors
    /// The request's: an unknown item, a token outside the vocabulary, too few or too many.
    pub fn input_tokens(&self, input: &Input) -> Result<Vec<u32>> {
        self.tokens(input, &self.catalog.snapshot())
    }

    fn tokens(&self, input: &Input, snapshot: &Snapshot) -> Result<Vec<u32>> {
        let tokens = match input {
            Input::History(items) => self.history_tokens(items, snapshot)?,
            Input::Tokens(tokens) => tokens.clone(),
        };
        self.check_tokens(&tokens)?;
        Ok(tokens)
    }

    fn history_tokens(&self, items: &[String], snapshot: &Snapshot) -> Result<Vec<u32>> {
        let find = |item: &String| {
            let unknown = || Error::UnknownItem { item: item.clone() };
            snapshot.find(item).ok_or_else(unknown)
        };
        let items = items.iter().map(find).collect::<Result<Vec<u32>>>()?;
        if items.is_empty() {
            return Err(Error::EmptyInput);
        }
        let prompt = &self.layout.prompt;
        let newest = prompt.max_items.map_or(0, |max| items.len().saturating_sub(max));
        let mut tokens = prompt.prefix.clone();
        for (position, &item) in items[newest..].iter().enumerate() {
            if position > 0 {
                tokens.extend_from_slice(&prompt.separator);
            }
            let sid = snapshot.sid(item);
            let levels = self.layout.levels.iter().zip(sid.codes());
            // A code without a token, which the catalog refuses, would be out of the vocabulary.
            let token = |(tokens, &code): (&Vec<u32>, &u16)| {
                tokens.get(usize::from(code)).copied().unwrap_or(NO_TOKEN)
            };
            tokens.extend(levels.map(token));
        }
        tokens.extend_from_slice(&prompt.suffix);
        Ok(tokens)
    }

    fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        if tokens.is_empty() {
            return Err(Error::EmptyInput);
        }
        if tokens.len() > self.max_context {
            return Err(Error::HistoryTooLong { len: tokens.len(), max: self.max_context });
        }
        let vocab_size = self.spec.vocab_size;
        match tokens.iter().position(|&token| token as usize >= vocab_size) {
            Some(position) => {
                let token = u64::from(tokens[position]);
                Err(Error::TokenOutOfRange { token, position, vocab_size })
            }
            None => Ok(()),
        }
    }

    /// The answer to a request from the beams of its searches.
    pub(super) fn answer(
        &self,
        job: &Job,
        cached_tokens: usize,
        weights_version: u64,
        beams: impl Iterator<Item = Result<Vec<Beam>>>,
    ) -> Result<Answer> {
        let of_search = |(allowed_set, beams): (&AllowedSet, Result<Vec<Beam>>)| {
            Ok(self.items(job, allowed_set, &beams?))
        };
        let mut groups =
            job.searches.iter().zip(beams).map(of_search).collect::<Result<Vec<_>>>()?;
        let items = match job.request.each.is_empty() {
            true => groups.pop().expect("a request without groups is one search"),
            false => Vec::new(),
        };
        let snapshot = Arc::clone(&job.snapshot);
        Ok(Answer {
            items,
            groups,
            snapshot,
            tokens: job.tokens.len(),
            cached_tokens,
            weights_version,
        })
    }

    /// The items that the beams name.
    fn items<'a>(
        &self,
        job: &'a Job,
        allowed_set: &'a AllowedSet,
        beams: &'a [Beam],
    ) -> Vec<Recommendation> {
        let snapshot = &*job.snapshot;
        let most = match job.request.shared_sid {
            SharedSid::First if job.candidates.is_none() => 1,
            _ => usize::MAX,
        };
        let of_beam = |beam: &'a Beam| {
            let cursor = beam.cursor.or_else(|| self.cursor_of_tokens(snapshot, &beam.tokens));
            let items =
                cursor.into_iter().flat_map(|cursor| snapshot.items(cursor, snapshot.num_levels()));
            let is_wanted = move |&item: &u32| match &job.candidates {
                Some(candidates) => candidates.contains(item),
                None => allowed_set.allows(snapshot, item),
            };
            items.filter(is_wanted).take(most).map(move |item| Recommendation {
                item,
                sid: snapshot.sid(item),
                score: beam.score,
                log_probs: beam.log_probs.clone(),
            })
        };
        let most = match &job.candidates {
            Some(_) => usize::MAX,
            None => job.request.top_k,
        };
        beams.iter().flat_map(of_beam).take(most).collect()
    }

    /// The cursor that tokens of an unconstrained search name, if they name one.
    fn cursor_of_tokens(&self, snapshot: &Snapshot, tokens: &[u32]) -> Option<Cursor> {
        let code = |(codes, token): (&HashMap<u32, u16>, &u32)| codes.get(token).copied();
        let codes = self.codes.iter().zip(tokens).map(code).collect::<Option<Vec<u16>>>()?;
        snapshot.cursor(&codes)
    }
}

/// What may come back, search by search.
fn searches(request: &Request, snapshot: &Snapshot) -> Result<Vec<AllowedSet>> {
    let find = |name: &String| snapshot.find(name);
    let mut excluded: Vec<u32> = request.exclude.iter().filter_map(find).collect();
    excluded.sort_unstable();
    excluded.dedup();
    let filter = request.filter.as_deref();
    if request.each.is_empty() {
        return Ok(vec![snapshot.allowed_set(&excluded, filter)?]);
    }
    let allowed_set = |each: &String| {
        let both = match filter {
            Some(filter) => &Filter::both(filter, each)?,
            None => each,
        };
        snapshot.allowed_set(&excluded, Some(both))
    };
    request.each.iter().map(allowed_set).collect()
}
