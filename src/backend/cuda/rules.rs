//! The rules of a step as kernels read them.

use bytemuck::Zeroable;

use super::catalog::{AllowedEntry, EMPTY_TRIE, TrieEntry};
use super::device_memory::DeviceMemory;
use super::driver::Driver;
use super::head::{Head, REFUSED};
use super::plan::{Plan, num_next_rows};
use super::shared::shared_struct;
use super::slot::Slot;
use crate::backend::{Continuations, Normalizer, SearchRule, StepChoice};

shared_struct! {
    /// How one slot takes its step.
    struct RuleEntry = "Rule" {
        base: TrieEntry,
        added: TrieEntry,
        base_allowed: AllowedEntry,
        added_allowed: AllowedEntry,
        seed: u64,
        /// Of the slot's first beam.
        logits: u64 = "const float*",
        /// By code: its column, or kNone; null where code c is column c. Of named tokens, which are
        /// columns in their order: the tokens.
        columns: u64 = "const uint32_t*",
        /// Sorted codes that occur at the level, where these are the choices.
        occurring: u64 = "const uint16_t*",
        logits_stride: u32,
        /// Of the first column of the step.
        first_token: u32,
        /// That a level has, or tokens that are named or that a vocabulary has.
        num_codes: u32,
        normalizer: u32,
        choices: u32,
        flags: u32,
        inverse_temperature: f32,
        /// Beams to keep.
        width: u32,
        /// Rows that the next position has.
        room: u32,
        /// Of the slot's keys among those of a part.
        first_key: u32,
        /// A candidate's place is its beam's rank times this, plus its choice.
        num_choices: u32,
        /// Codes that lead to the beams' places.
        depth: u32,
        num_occurring: u32,
        padding: u32,
    }
}

/// `RuleEntry::flags`
pub(super) const HAS_ADDED: u32 = 1;
pub(super) const HAS_SEED: u32 = 2;
pub(super) const KEEPS_LOG_PROBS: u32 = 4;
pub(super) const HAS_CANDIDATES: u32 = 8;
pub(super) const HAS_LIST: u32 = 16;

/// `RuleEntry::normalizer`
pub(super) const BY_VOCABULARY: u32 = 0;
pub(super) const BY_LEVEL: u32 = 1;
pub(super) const BY_CHILDREN: u32 = 2;
pub(super) const CERTAIN: u32 = 3;

/// `RuleEntry::choices`
pub(super) const OF_TRIE: u32 = 0;
pub(super) const OF_LEVEL: u32 = 1;
pub(super) const OF_VOCABULARY: u32 = 2;
pub(super) const FORCED: u32 = 3;
pub(super) const NAMED: u32 = 4;
pub(super) const OCCURRING: u32 = 5;

/// Where the arrays of one slot's rule begin: bytes behind those of all entries.
struct Offsets {
    excluded: usize,
    added_words: usize,
    added_counts: usize,
    listed: usize,
    added_listed: usize,
    named: usize,
    occurring: usize,
    /// Of [`EMPTY_TRIE`], where the slot has no other.
    empty_trie: usize,
}

/// Arrays one after the other, each aligned to 16 bytes.
#[derive(Default)]
struct ArrayBytes(Vec<u8>);

impl ArrayBytes {
    fn push<T: bytemuck::Pod>(&mut self, values: &[T]) -> usize {
        self.0.resize(self.0.len().next_multiple_of(16), 0);
        let offset = self.0.len();
        self.0.extend_from_slice(bytemuck::cast_slice(values));
        offset
    }

    fn push_slot<D: Driver>(&mut self, slot: &Slot<D>, rule: &SearchRule<'_>) -> Offsets {
        let search = slot.search.get().expect("planned before");
        let (base, added) = match &search.listed {
            Some((base, added)) => (&base[..], &added[..]),
            None => (&[][..], &[][..]),
        };
        let named = match rule.choice {
            StepChoice::Tokens(tokens) => tokens,
            _ => &[],
        };
        Offsets {
            excluded: self.push(&search.excluded),
            added_words: self.push(&search.added_words),
            added_counts: self.push(&search.added_counts),
            listed: self.push(base),
            added_listed: self.push(added),
            named: self.push(named),
            occurring: self.push(occurring(rule)),
            empty_trie: match search.base {
                Some(_) => 0,
                None => self.push(&EMPTY_TRIE),
            },
        }
    }
}

/// Where the slots of a step have their rows.
pub(super) struct SlotRows<'a> {
    /// By slot.
    pub first_rows: &'a [usize],
    /// With those that pad the step.
    pub num_slots: usize,
    /// The address of the step's logits.
    pub logits: u64,
}

/// Writes the rules of a step, padded.
pub(super) fn write<D: Driver>(
    memory: &mut DeviceMemory<D>,
    head: &Head<D>,
    rules: &[SearchRule<'_>],
    slots: &[Slot<D>],
    plan: &Plan,
    rows: &SlotRows<'_>,
) {
    let &SlotRows { first_rows, num_slots, logits } = rows;
    let num_entries = num_slots.max(slots.len());
    let entries_bytes = (num_entries * size_of::<RuleEntry>()).next_multiple_of(16);
    let mut arrays = ArrayBytes::default();
    let offsets: Vec<Offsets> =
        slots.iter().zip(rules).map(|(slot, rule)| arrays.push_slot(slot, rule)).collect();
    memory.reserve_often(entries_bytes + arrays.0.len());
    let at = |offset: usize| memory.at(entries_bytes + offset);
    let mut first_key = 0;
    let mut entries = Vec::new();
    for (((slot, rule), offsets), &row) in slots.iter().zip(rules).zip(offsets).zip(first_rows) {
        let mut entry = allowed_entry(slot, rule, &offsets, at);
        if slot.search.get().is_some_and(|search| search.listed.is_some()) {
            let is_scored = rule.candidates.is_some();
            entry.flags |= if is_scored { HAS_CANDIDATES } else { HAS_LIST };
        }
        entry.occurring = at(offsets.occurring);
        entry.num_occurring = occurring(rule).len() as u32;
        if let Some(seed) = rule.sampling_seed() {
            entry.seed = seed;
            entry.flags |= HAS_SEED;
        }
        if rule.log_probs {
            entry.flags |= KEEPS_LOG_PROBS;
        }
        entry.logits = logits + (row * plan.stride * size_of::<f32>()) as u64;
        entry.logits_stride = plan.stride as u32;
        entry.columns = columns(head, rule, at(offsets.named));
        entry.first_token = head.span(rule).start as u32;
        entry.num_codes = head.num_codes(rule) as u32;
        entry.normalizer = match rule.normalizer() {
            Normalizer::Vocabulary => BY_VOCABULARY,
            Normalizer::Level => BY_LEVEL,
            Normalizer::Children => BY_CHILDREN,
            Normalizer::Certain => CERTAIN,
        };
        (entry.choices, entry.num_choices) = match rule.continuations() {
            Continuations::Children => (OF_TRIE, 1 << u16::BITS),
            Continuations::Occurring => (OCCURRING, 1 << u16::BITS),
            Continuations::Level => (OF_LEVEL, 1 << u16::BITS),
            Continuations::Vocabulary => (OF_VOCABULARY, entry.num_codes),
            Continuations::Forced => (FORCED, 1),
            Continuations::Tokens => (NAMED, entry.num_codes),
            Continuations::Phrases | Continuations::Sampled => unreachable!("{REFUSED}"),
        };
        entry.depth = rule.depth as u32;
        entry.inverse_temperature = 1.0 / rule.temperature;
        entry.width = rule.beams.max(1) as u32;
        entry.room = num_next_rows(slot, rule, head) as u32;
        entry.first_key = first_key;
        first_key += entry.width;
        entries.push(entry);
    }
    entries.resize(num_entries, RuleEntry::zeroed());
    let mut bytes = bytemuck::cast_slice(&entries).to_vec();
    bytes.resize(entries_bytes, 0);
    bytes.extend_from_slice(&arrays.0);
    memory.write(&bytes);
}

/// The part of a rule that says which items its slot may be answered with; `at`: the address of an
/// array by its offset.
fn allowed_entry<D: Driver>(
    slot: &Slot<D>,
    rule: &SearchRule<'_>,
    offsets: &Offsets,
    at: impl Fn(usize) -> u64,
) -> RuleEntry {
    let search = slot.search.get().expect("planned before");
    let mut entry = RuleEntry::zeroed();
    entry.base = match &search.base {
        Some(base) => base.entry,
        None => TrieEntry::empty(rule.snapshot.num_levels(), at(offsets.empty_trie)),
    };
    if let Some(allowed) = &search.base_allowed {
        entry.base_allowed = allowed.entry;
    }
    entry.base_allowed.excluded = at(offsets.excluded);
    entry.base_allowed.num_excluded = search.excluded.len() as u32;
    if let Some(trie) = &search.added {
        entry.added = trie.entry;
        entry.added_allowed.words = at(offsets.added_words);
        entry.added_allowed.counts = at(offsets.added_counts);
        entry.flags |= HAS_ADDED;
    }
    if let Some((in_base, in_added)) = &search.listed {
        entry.base_allowed.listed = at(offsets.listed);
        entry.base_allowed.num_listed = in_base.len() as u32;
        entry.added_allowed.listed = at(offsets.added_listed);
        entry.added_allowed.num_listed = in_added.len() as u32;
    }
    entry
}

/// The codes that occur at the level of a step, where these are its choices.
fn occurring<'a>(rule: &SearchRule<'a>) -> &'a [u16] {
    match rule.continuations() {
        Continuations::Occurring => &rule.snapshot.occurring()[rule.depth],
        _ => &[],
    }
}

/// By code of the step, where that says something: the column, or the named token itself.
fn columns<D: Driver>(head: &Head<D>, rule: &SearchRule<'_>, named: u64) -> u64 {
    match (rule.choice, rule.continuations()) {
        (StepChoice::Tokens(_), _) => named,
        (
            StepChoice::Level(level),
            Continuations::Children | Continuations::Occurring | Continuations::Level,
        ) => head.levels[level].columns.as_ref().map_or(0, |columns| columns.at(0)),
        _ => 0,
    }
}
