//! A request is checked and becomes work.
//!
//! Checking needs the catalog, the layout of semantic IDs and the engine's limits, none of which
//! changes: a [`Preparer`] is shared, and callers prepare on their own threads while the engine
//! steps.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tracing::Span;

use crate::backend::{NO_TOKEN, SearchRule};
use crate::catalog::allowed::AllowedSet;
use crate::catalog::candidates::Candidates;
use crate::catalog::filter::Filter;
use crate::catalog::{Catalog, Snapshot};
use crate::error::{Error, Result};
use crate::metrics::Metrics;
use crate::models::config::SidLayout;
use crate::pages;
use crate::request::{Input, MAX_BEAMS, Request, SharedSid};
use crate::schedule::{Micros, Needs, RequestId, Waiting};
use crate::search::{Constraint, Normalization};

/// Groups that one request may ask for.
const MAX_GROUPS: usize = 256;
/// Logits that a search without a constraint may hold: beams times vocabulary.
const MAX_UNCONSTRAINED_LOGITS: usize = 1 << 28;

/// A request that was checked: its input as tokens, its filters compiled, its needs known.
///
/// It sees the catalog as it was when it was prepared, from start to end.
pub struct Prepared {
    pub(super) id: RequestId,
    pub(super) request: Request,
    pub(super) snapshot: Arc<Snapshot>,
    pub(super) tokens: Vec<u32>,
    /// What may come back, search by search: one, or one for each of the request's groups.
    pub(super) searches: Vec<AllowedSet>,
    /// Items to score instead of searching.
    pub(super) candidates: Option<Candidates>,
    normalization: Normalization,
    /// The beam width by step; as many steps as the request takes.
    widths: Vec<usize>,
    pub(super) needs: Needs,
    /// Items of the history that were left out, the oldest ones.
    pub(super) skipped_items: usize,
    /// When it was handed over.
    pub(super) arrived_us: Micros,
    /// From submission to the end, inside the span that its caller was in.
    pub(super) span: Span,
}

impl Prepared {
    /// Names the request.
    pub fn id(&self) -> RequestId {
        self.id
    }

    /// Steps that each search of the request takes.
    pub(super) fn num_steps(&self) -> usize {
        self.widths.len()
    }

    /// Pages that the tails of each search take.
    pub(super) fn tail_pages_per_search(&self) -> usize {
        self.needs.tail_pages / self.searches.len()
    }

    /// The request as the scheduler's pure functions see it.
    pub(super) fn waiting(&self) -> Waiting {
        let deadline = |within| self.arrived_us.saturating_add(micros(within));
        Waiting {
            id: self.id,
            class: self.request.priority as u8,
            arrived_us: self.arrived_us,
            deadline_us: self.request.deadline.map(deadline),
            needs: self.needs,
        }
    }

    pub(super) fn deadline_exceeded(&self) -> Error {
        let deadline = self.request.deadline.unwrap_or_default();
        Error::DeadlineExceeded { deadline_ms: deadline.as_millis() as u64 }
    }

    /// Items of one semantic ID that an answer lists at most.
    pub(super) fn max_items_per_sid(&self) -> usize {
        match self.request.shared_sid {
            SharedSid::First if self.candidates.is_none() => 1,
            _ => usize::MAX,
        }
    }

    /// How a step of a search is done.
    pub(super) fn rule<'a>(
        &'a self,
        search: usize,
        step: usize,
        layout: &'a SidLayout,
    ) -> SearchRule<'a> {
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
            seed: self.request.seed,
            log_probs: self.request.log_probs,
        }
    }
}

/// A request's name and when it was handed over.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrival {
    pub id: RequestId,
    pub arrived_us: Micros,
}

/// What requests are checked against. Cheap to share: nothing in it changes but the catalog's
/// current snapshot, which is read without waiting.
pub struct Preparer {
    pub(super) catalog: Arc<Catalog>,
    pub(super) layout: SidLayout,
    pub(super) vocab_size: usize,
    pub(super) max_context: usize,
    pub(super) context_pages: usize,
    pub(super) tail_pages: usize,
    pub(super) opened: Instant,
    pub(super) last_id: AtomicU64,
    pub(super) metrics: Arc<Metrics>,
}

impl Preparer {
    /// The catalog that is searched.
    pub fn catalog(&self) -> &Arc<Catalog> {
        &self.catalog
    }

    /// The most tokens that an input may have.
    pub fn max_context(&self) -> usize {
        self.max_context
    }

    /// What the engine counts.
    pub(crate) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Time since the engine was opened.
    pub(super) fn now_us(&self) -> Micros {
        micros(self.opened.elapsed())
    }

    /// Checks a request and works out what it needs. Takes time where filters are compiled: in
    /// proportion to the catalog for a filter that was not asked for lately.
    ///
    /// # Errors
    /// The request's.
    pub fn prepare(&self, request: Request) -> Result<Prepared> {
        self.prepare_at(self.arrival(), request)
    }

    /// Names a request that is handed over now.
    pub(crate) fn arrival(&self) -> Arrival {
        let id = 1 + self.last_id.fetch_add(1, Ordering::Relaxed);
        Arrival { id, arrived_us: self.now_us() }
    }

    /// Checks a request that was handed over before.
    ///
    /// # Errors
    /// The request's.
    pub(crate) fn prepare_at(&self, arrival: Arrival, request: Request) -> Result<Prepared> {
        let span = tracing::debug_span!(target: "sidereal", "request", id = arrival.id);
        let _entered = span.clone().entered();
        let prepared = self.check(arrival, request, span);
        prepared.inspect_err(|error| self.metrics.request_refused(error))
    }

    fn check(&self, arrival: Arrival, request: Request, span: Span) -> Result<Prepared> {
        let Request { top_k, temperature, constraint, .. } = request;
        // Stages that no program runs yet.
        let stages = [("forced", request.forced.is_some()), ("read", !request.read.is_empty())];
        if let Some((stage, _)) = stages.into_iter().find(|(_, is_asked)| *is_asked) {
            let way_out = "leave the field out".into();
            return Err(Error::Unsupported { what: format!("{stage:?} in a request"), way_out });
        }
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
            let vocab_size = self.vocab_size;
            if most * request.groups.len().max(1) * vocab_size > MAX_UNCONSTRAINED_LOGITS {
                let max = MAX_UNCONSTRAINED_LOGITS / vocab_size;
                return Err(Error::BeamWidth { width: most as i64, max });
            }
        }
        let len = request.groups.len();
        if len > MAX_GROUPS {
            return Err(Error::LimitExceeded { what: "groups", len, max: MAX_GROUPS });
        }
        if constraint != Constraint::Trie && (request.seed.is_some() || request.log_probs) {
            let reason = "samples and log-probabilities need the trie".into();
            return Err(Error::InvalidField { field: "constraint", reason });
        }
        let tokens = self.tokens(&request.input, &snapshot)?;
        let searches = searches(&request, &snapshot)?;
        let needs = self.needs(tokens.len(), &widths, searches.len())?;
        Ok(Prepared {
            id: arrival.id,
            skipped_items: self.skipped_items(&request.input),
            request,
            snapshot,
            tokens,
            searches,
            candidates,
            normalization,
            widths,
            needs,
            arrived_us: arrival.arrived_us,
            span,
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
            ("groups", !request.groups.is_empty()),
            ("seed", request.seed.is_some()),
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
        let len = request.candidates.len();
        if len > MAX_BEAMS {
            return Err(Error::LimitExceeded { what: "candidates", len, max: MAX_BEAMS });
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
        widths.resize(num_levels + self.layout.suffix.len(), widths[num_levels - 1]);
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
        // A user without a history is asked for with what stands around every history.
        let prompt = &self.layout.prompt;
        let newest = self.num_skipped(items.len());
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

    /// Items of a history that are left out, the oldest ones.
    fn num_skipped(&self, items: usize) -> usize {
        self.layout.prompt.max_items.map_or(0, |max| items.saturating_sub(max))
    }

    fn skipped_items(&self, input: &Input) -> usize {
        match input {
            Input::History(items) => self.num_skipped(items.len()),
            _ => 0,
        }
    }

    fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        if tokens.is_empty() {
            return Err(Error::EmptyInput);
        }
        if tokens.len() > self.max_context {
            return Err(Error::HistoryTooLong { len: tokens.len(), max: self.max_context });
        }
        let vocab_size = self.vocab_size;
        match tokens.iter().position(|&token| token as usize >= vocab_size) {
            Some(position) => {
                let token = u64::from(tokens[position]);
                Err(Error::TokenOutOfRange { token, position, vocab_size })
            }
            None => Ok(()),
        }
    }
}

/// What may come back, search by search.
fn searches(request: &Request, snapshot: &Snapshot) -> Result<Vec<AllowedSet>> {
    let find = |name: &String| snapshot.find(name);
    let mut excluded: Vec<u32> = request.exclude.iter().filter_map(find).collect();
    excluded.sort_unstable();
    excluded.dedup();
    let filter = request.filter.as_deref();
    if request.groups.is_empty() {
        return Ok(vec![snapshot.allowed_set(&excluded, filter)?]);
    }
    let allowed_set = |group: &String| {
        let both = match filter {
            Some(filter) => &Filter::both(filter, group)?,
            None => group,
        };
        snapshot.allowed_set(&excluded, Some(both))
    };
    request.groups.iter().map(allowed_set).collect()
}

pub(super) fn micros(duration: Duration) -> Micros {
    duration.as_micros().try_into().unwrap_or(Micros::MAX)
}
