//! A request is checked and becomes work.
//!
//! Checking needs the catalog, the layout of semantic IDs and the engine's limits, none of which
//! changes: a [`Preparer`] is shared, and callers prepare on their own threads while the engine
//! steps.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tracing::Span;

use super::fields::{check_fields, check_snapshot};
use super::lookup::{Known, Wishes, allowed_sets, check_vocabulary, named_token};
use super::phrases::{self, PhraseIndex, PhraseSearch};
use super::program::{Output, Program, Search, Stage};
use super::thoughts::Thinking;
use crate::answer::{UnknownByField, UnknownNames};
use crate::backend::SearchRule;
use crate::catalog::allowed::AllowedSet;
use crate::catalog::candidates::Candidates;
use crate::catalog::sid::Sid;
use crate::catalog::{Catalog, Snapshot};
use crate::error::{Error, Result};
use crate::metrics::Metrics;
use crate::models::config::SidLayout;
use crate::models::{PromptKind, WordRule};
use crate::pages;
use crate::prompt::{Rendered, Source};
use crate::request::{Forced, Input, LongHistory, MAX_BEAMS, Request, SharedSid};
use crate::schedule::{Demand, Micros, Needs, RequestId, Waiting};
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
    /// What it does: its context and its slots.
    pub(super) program: Program,
    /// The items that a slot may be answered with, by [`list_of`](Prepared::list_of) the slot.
    pub(super) allowed_sets: Vec<AllowedSet>,
    /// Items to score instead of searching.
    pub(super) candidates: Option<Candidates>,
    /// The phrases that it searches, where the model writes some.
    pub(super) phrases: Option<PhraseSearch>,
    /// What it thinks before, where it does.
    pub(super) thinking: Option<Thinking>,
    /// Tokens whose log-probabilities are asked for, in the request's order.
    pub(super) read: Vec<u32>,
    pub(super) needs: Needs,
    /// Items of the history that were left out, the oldest ones.
    pub(super) skipped_items: usize,
    /// Names that the catalog does not have.
    pub(super) unknown_items: UnknownByField,
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

    /// The tokens of its context.
    pub(super) fn tokens(&self) -> &[u32] {
        self.program.tokens()
    }

    /// The request as the scheduler's pure functions see it.
    pub(super) fn waiting(&self, demand: Demand) -> Waiting {
        let deadline = |within| self.arrived_us.saturating_add(micros(within));
        Waiting {
            id: self.id,
            class: self.request.priority as u8,
            arrived_us: self.arrived_us,
            deadline_us: self.request.deadline.map(deadline),
            needs: self.needs,
            demand,
            is_accepted: false,
        }
    }

    /// The error of a request that is late; `retry_after_us` where it would not be if it came so
    /// much later.
    pub(super) fn deadline_exceeded(&self, retry_after_us: Option<Micros>) -> Error {
        let deadline = self.request.deadline.unwrap_or_default();
        Error::DeadlineExceeded {
            deadline_ms: deadline.as_secs_f64() * 1e3,
            retry_after_ms: retry_after_us.map(|us| us.div_ceil(1000)),
        }
    }

    /// Items of one semantic ID that an answer lists at most.
    pub(super) fn max_items_per_sid(&self) -> usize {
        let per_sid = self.request.per_sid.unwrap_or(usize::MAX);
        match (&self.candidates, self.request.shared_sid) {
            (Some(_), _) => usize::MAX,
            (None, SharedSid::First) => per_sid.min(1),
            (None, SharedSid::All) => per_sid,
        }
    }

    /// Items that an answer lists at most.
    pub(super) fn max_items(&self) -> usize {
        match &self.candidates {
            Some(_) => usize::MAX,
            None => self.request.top_k,
        }
    }

    /// Which list of an answer a slot is searched for. The branches of a thought search for one.
    pub(super) fn list_of(&self, slot: usize) -> usize {
        match &self.thinking {
            Some(thinking) if thinking.num_branches() > 1 => 0,
            _ => slot,
        }
    }

    /// How a step of a slot is done.
    pub(super) fn rule(&self, slot: usize, step: usize) -> SearchRule<'_> {
        let program = &self.program.slots()[slot];
        let is_search = program.output == Output::Items;
        let (choice, depth, beams) = program.step(step);
        SearchRule {
            choice,
            depth,
            snapshot: &self.snapshot,
            allowed_set: &self.allowed_sets[self.list_of(slot)],
            beams,
            normalization: program.normalization,
            constraint: program.constraint,
            temperature: self.request.temperature,
            candidates: self.candidates.as_ref().filter(|_| is_search),
            seed: self.request.seed.filter(|_| is_search),
            log_probs: self.request.log_probs && is_search,
            phrases: self.phrases.as_ref().and_then(|phrases| phrases.step(self.list_of(slot))),
            thought: self.thinking.as_ref().map(|thinking| {
                let branch = if thinking.num_branches() > 1 { slot } else { 0 };
                thinking.step(branch, self.tokens())
            }),
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
    /// Where the layout has some.
    pub(super) phrases: Option<PhraseIndex>,
    /// Why there are no thoughts, where the device samples none.
    pub(super) thoughts: Result<()>,
    /// Why nothing is drawn without the trie, where the device does not.
    pub(super) free_samples: Result<()>,
    pub(super) vocab_size: usize,
    /// Where the network counts the words of its prompts.
    pub(super) words: Option<Arc<WordRule>>,
    pub(super) prompt: PromptKind,
    /// Of input and output together, where the network has a limit.
    pub(super) max_positions: Option<usize>,
    /// Of a slot, on this device.
    pub(super) max_steps: usize,
    /// Tokens of a context.
    pub(super) max_context: usize,
    /// Tokens of a context that are forced into it where a request does not say.
    pub(super) forced_len: usize,
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
        self.max_context.saturating_sub(self.forced_len)
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
        let snapshot = self.catalog.checked_snapshot()?;
        check_snapshot(&request, &snapshot)?;
        let mut unknown_items = UnknownByField::default();
        let candidates = self.candidates(&request, &snapshot, &mut unknown_items)?;
        let read = self.read_tokens(&request)?;
        phrases::check_fields(&request, self.phrases.is_some())?;
        let set = self.phrases.as_ref().map(|index| index.of(&snapshot)).transpose()?;
        let num_phrase_steps = set.as_ref().map(|set| set.max_len() + 1);
        let tokenizer = (self.layout.prompt.text(), self.vocab_size);
        let thinking = Thinking::of(&request, &self.thoughts, tokenizer, self.prompt)?;
        let num_branches = thinking.as_ref().map_or(1, Thinking::num_branches);
        let count = request.groups.len().max(num_branches);
        let search = self.search(&request, candidates.as_ref(), num_phrase_steps, count)?;
        let has_search = search.is_some();
        check_fields(&request, has_search, &self.free_samples)?;
        let mut stages = self.stages(&request, &read, search)?;
        let think = thinking.as_ref().map(Thinking::num_steps);
        stages.splice(0..0, think.map(|num_steps| Stage::Think { num_steps }));
        let room = match request.long_history {
            LongHistory::Error => usize::MAX,
            LongHistory::Cut => self.room_for_input(&stages),
        };
        let input = self.read_input(&request, &snapshot, room)?;
        unknown_items.history = input.unknown;
        let wishes = has_search.then(|| Wishes::of(&request, &snapshot, &mut unknown_items));
        let wishes = wishes.transpose()?;
        let allowed_sets = allowed_sets(&request, &snapshot, wishes.as_ref())?;
        let phrases = match (&self.phrases, set, &wishes) {
            (Some(index), Some(set), Some(wishes)) => {
                let candidates = candidates.as_ref().map(Candidates::items);
                Some(index.search(&request, &snapshot, set, wishes, candidates)?)
            }
            _ => None,
        };
        stages.insert(0, Stage::Read(input.tokens));
        let program = Program::new(stages, self.prompt);
        let needs = self.needs(&program)?;
        if request.constraint == Constraint::Occurring {
            snapshot.occurring(); // worked out here and not on the thread that steps
        }
        self.metrics.items_unknown(&unknown_items);
        Ok(Prepared {
            id: arrival.id,
            skipped_items: input.num_cut,
            unknown_items,
            request,
            snapshot,
            program,
            allowed_sets,
            candidates,
            phrases,
            thinking,
            read,
            needs,
            arrived_us: arrival.arrived_us,
            span,
        })
    }

    /// The request's stages after the one that reads its input.
    fn stages(
        &self,
        request: &Request,
        read: &[u32],
        search: Option<Search>,
    ) -> Result<Vec<Stage>> {
        let mut stages = Vec::new();
        let is_own = request.forced.is_some();
        if let Some(Forced { tokens, is_counted }) = &request.forced {
            self.check_forced(tokens)?;
            // Nothing is counted where nothing is searched for.
            let is_counted = *is_counted && search.is_some();
            stages.push(Stage::Forced { tokens: tokens.clone(), is_counted });
        }
        if !read.is_empty() {
            let mut distinct = Vec::new();
            let mut seen = HashSet::new();
            distinct.extend(read.iter().copied().filter(|&token| seen.insert(token)));
            stages.push(Stage::ReadNamed(distinct));
        }
        let Some(search) = search else { return Ok(stages) };
        // The model's own forced tokens stand before codes alone.
        if let Some(Forced { tokens, is_counted }) = self.layout.forced.as_ref().filter(|_| !is_own)
        {
            stages.push(Stage::Forced { tokens: tokens.clone(), is_counted: *is_counted });
        }
        stages.push(Stage::Search(search));
        let suffix = self.layout.suffix.clone();
        stages.push(Stage::Forced { tokens: suffix, is_counted: true });
        Ok(stages)
    }

    /// The searches of a request, so many of one kind. A request that reads named tokens has some only where it names
    /// groups or candidates.
    fn search(
        &self,
        request: &Request,
        candidates: Option<&Candidates>,
        num_phrase_steps: Option<usize>,
        count: usize,
    ) -> Result<Option<Search>> {
        let Request { constraint, .. } = *request;
        if !request.read.is_empty() && request.groups.is_empty() && candidates.is_none() {
            return Ok(None);
        }
        let widths = match num_phrase_steps {
            Some(num_steps) => phrases::widths(request, candidates, num_steps)?,
            None => self.widths(request, candidates)?,
        };
        let most = widths.iter().copied().max().unwrap_or(0);
        let normalization = request.normalization.unwrap_or(self.layout.normalization);
        let is_of_phrases = num_phrase_steps.is_some();
        if constraint == Constraint::None || is_of_phrases {
            if normalization == Normalization::Level {
                let reason = match is_of_phrases {
                    true => "phrases have no levels; \"vocabulary\" and \"children\" are possible",
                    false => "\"level\" needs a constraint to the level or the trie",
                };
                return Err(Error::InvalidField { field: "normalize", reason: reason.into() });
            }
            let vocab_size = self.vocab_size;
            if most * count * vocab_size > MAX_UNCONSTRAINED_LOGITS {
                let max = MAX_UNCONSTRAINED_LOGITS / vocab_size;
                return Err(Error::BeamWidth { width: most as i64, max });
            }
        }
        let len = request.groups.len();
        if len > MAX_GROUPS {
            return Err(Error::LimitExceeded { what: "groups", len, max: MAX_GROUPS });
        }
        Ok(Some(Search { widths, is_of_phrases, count, normalization, constraint }))
    }

    /// The tokens that the request reads, by number.
    fn read_tokens(&self, request: &Request) -> Result<Vec<u32>> {
        let len = request.read.len();
        if len > MAX_BEAMS {
            return Err(Error::LimitExceeded { what: "tokens to read", len, max: MAX_BEAMS });
        }
        let tokens =
            request.read.iter().map(|token| named_token(&self.layout.vocabulary, "read", token));
        let tokens = tokens.collect::<Result<Vec<u32>>>()?;
        check_vocabulary("read", &tokens, self.vocab_size)?;
        Ok(tokens)
    }

    fn check_forced(&self, tokens: &[u32]) -> Result<()> {
        if tokens.is_empty() {
            let reason = "has no tokens; give at least one, or leave the field out".into();
            return Err(Error::InvalidField { field: "forced", reason });
        }
        check_vocabulary("forced", tokens, self.vocab_size)
    }

    /// The items to score, if the request names some.
    fn candidates(
        &self,
        request: &Request,
        snapshot: &Snapshot,
        unknown_items: &mut UnknownByField,
    ) -> Result<Option<Candidates>> {
        if request.candidates.is_empty() {
            return Ok(None);
        }
        let conflicts = [
            ("filter", request.filter.is_some()),
            ("exclude", !request.exclude.is_empty()),
            ("exclude_history", request.exclude_history),
            ("only", request.only.is_some()),
            ("groups", !request.groups.is_empty()),
            ("seed", request.seed.is_some()),
            ("constraint", request.constraint != Constraint::Trie),
        ];
        if let Some((field, _)) = conflicts.into_iter().find(|(_, is_given)| *is_given) {
            let reason = "goes with a search, not with candidates".into();
            return Err(Error::InvalidField { field, reason });
        }
        let len = request.candidates.len();
        if len > MAX_BEAMS {
            return Err(Error::LimitExceeded { what: "candidates", len, max: MAX_BEAMS });
        }
        let names = &request.candidates;
        let known = Known::required("candidates", names, snapshot, request.unknown_items)?;
        unknown_items.candidates = known.unknown;
        Ok(Some(Candidates::new(snapshot, &known.items)))
    }

    /// The beam width by level.
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
        Ok(widths)
    }

    /// The most tokens of a context on which a slot takes so many steps.
    fn max_context_of(&self, num_steps: usize) -> usize {
        // All steps but the last are read again.
        let positions = self.max_positions.map(|max| max.saturating_sub(num_steps - 1));
        positions.unwrap_or(usize::MAX).min(self.max_context)
    }

    /// The most tokens of an input that these stages can follow.
    fn room_for_input(&self, stages: &[Stage]) -> usize {
        let rest = Program::new(stages.to_vec(), self.prompt);
        let most = self.max_context_of(rest.max_steps()).min(self.context_pages * pages::PAGE_LEN);
        most.saturating_sub(rest.tokens().len()).min(self.max_context())
    }

    /// What a request takes, if the engine has it.
    fn needs(&self, program: &Program) -> Result<Needs> {
        let (needs, num_steps) = (program.needs(), program.max_steps());
        if num_steps > self.max_steps {
            return Err(too_many_steps(num_steps, self.max_steps));
        }
        let (context_len, max) = (program.tokens().len(), self.max_context_of(num_steps));
        if context_len > max {
            return Err(Error::HistoryTooLong { len: context_len, max });
        }
        let limits = [
            ("tokens of context", program.context_capacity(), self.context_pages * pages::PAGE_LEN),
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
        let request = Request::new(input.clone());
        let snapshot = self.catalog.checked_snapshot()?;
        Ok(self.read_input(&request, &snapshot, usize::MAX)?.tokens)
    }

    /// Whether a request's text takes time on the thread that prepares it.
    pub fn reads_text(&self, request: &Request) -> bool {
        match &request.input {
            _ if self.phrases.is_some() => true, // titles that are new
            Input::Text(_) | Input::Messages(_) => true,
            Input::History(_) => self.layout.prompt.reads_text(),
            Input::Tokens(_) => false,
        }
    }

    /// The tokens of a semantic ID's codes, as far as the model has some.
    pub(crate) fn tokens_of(&self, sid: &Sid) -> Vec<u32> {
        let codes = self.layout.levels.iter().zip(sid.codes());
        codes.filter_map(|(tokens, &code)| tokens.get(usize::from(code)).copied()).collect()
    }

    /// The tokens of an input; of a history that takes more than `room`, those of its newest items.
    fn read_input(&self, request: &Request, snapshot: &Snapshot, room: usize) -> Result<ReadInput> {
        let as_given = |tokens| ReadInput { tokens, num_cut: 0, unknown: UnknownNames::default() };
        let read = match &request.input {
            Input::History(items) => self.read_history(items, request, snapshot, room)?,
            Input::Tokens(tokens) => as_given(tokens.clone()),
            Input::Text(_) | Input::Messages(_) => {
                as_given(self.layout.prompt.text_tokens(request)?.unwrap_or_default())
            }
        };
        self.check_tokens(&read.tokens)?;
        Ok(read)
    }

    fn read_history(
        &self,
        names: &[String],
        request: &Request,
        snapshot: &Snapshot,
        room: usize,
    ) -> Result<ReadInput> {
        // Cut first, so that an item that is not read anyway can fail nothing.
        let prompt = &self.layout.prompt;
        let num_cut = names.len().saturating_sub(prompt.max_items.unwrap_or(usize::MAX));
        let Known { items, unknown } =
            Known::required("history", &names[num_cut..], snapshot, request.unknown_items)?;
        // A user without a history is asked for with what stands around every history.
        let source = Source { items: &items, snapshot, levels: &self.layout.levels, request };
        let Rendered { tokens, num_items } = prompt.render(&source, room)?;
        Ok(ReadInput { tokens, num_cut: num_cut + items.len() - num_items, unknown })
    }

    fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        if tokens.is_empty() {
            return Err(Error::EmptyInput);
        }
        let (len, max) = (tokens.len(), self.max_context());
        if len > max {
            return Err(Error::HistoryTooLong { len, max });
        }
        let vocab_size = self.vocab_size;
        if let Some(position) = tokens.iter().position(|&token| token as usize >= vocab_size) {
            let token = u64::from(tokens[position]);
            return Err(Error::TokenOutOfRange { token, position, vocab_size });
        }
        self.words.as_ref().map_or(Ok(()), |words| words.check(tokens))
    }
}

/// A request's input as the model reads it.
struct ReadInput {
    tokens: Vec<u32>,
    /// Items of the history that were left out, the oldest ones.
    num_cut: usize,
    /// Names of the history that the catalog does not have.
    unknown: UnknownNames,
}

/// A search takes more steps than a device can.
pub(super) fn too_many_steps(num_steps: usize, max: usize) -> Error {
    Error::Unsupported {
        what: format!("a search of {num_steps} steps on this device"),
        way_out: format!("at most {max} are; force fewer tokens, or use the CPU"),
    }
}

pub(super) fn micros(duration: Duration) -> Micros {
    duration.as_micros().try_into().unwrap_or(Micros::MAX)
}
