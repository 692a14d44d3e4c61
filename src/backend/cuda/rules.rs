//! What each search of a step may choose from, as kernels read it.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::driver::Driver;
use super::handle::{Device, DeviceMemory};
use super::head::Head;
use super::slot::Slot;
use super::tables::padded;
use crate::backend::{Normalizer, SearchRule};
use crate::catalog::arrays::{AllowedArrays, Identity, TrieArrays};
use crate::catalog::sid::MAX_LEVELS;
use crate::error::Result;
use crate::search::Constraint;

/// Continuations that a block of kernels/advance_beams.cu takes at a time.
pub(super) const CHUNK: usize = 1024;
/// Parts that the continuations of a search are dealt out to, at most: `kMaxParts` there.
pub(super) const MAX_PARTS: usize = 64;

/// `Trie` in kernels/common/search.cuh.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct TrieEntry {
    first_edge: u64,
    codes: u64,
    first_item: u64,
    leaf_item: u64,
    num_levels: u32,
    depth_start: [u32; MAX_LEVELS + 2],
    padding: u32,
}

/// `Allowed` in kernels/common/search.cuh.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct AllowedEntry {
    words: u64,
    counts: u64,
    nodes: u64,
    excluded: u64,
    candidates: u64,
    num_excluded: u32,
    num_candidates: u32,
}

/// `Rule` in kernels/common/search.cuh.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct RuleEntry {
    base: TrieEntry,
    added: TrieEntry,
    base_allowed: AllowedEntry,
    added_allowed: AllowedEntry,
    seed: u64,
    logits: u64,
    columns: u64,
    logits_stride: u32,
    first_token: u32,
    num_codes: u32,
    normalizer: u32,
    choices: u32,
    flags: u32,
    inverse_temperature: f32,
    width: u32,
    room: u32,
    first_key: u32,
    num_choices: u32,
    padding: u32,
}

const HAS_ADDED: u32 = 1;
const HAS_SEED: u32 = 2;
const KEEPS_LOG_PROBS: u32 = 4;
const HAS_CANDIDATES: u32 = 8;

/// The arrays of catalogs and filters that are on the device, each there once.
pub(super) struct Uploads<D: Driver> {
    tries: Kept<Trie<D>>,
    allowed: Kept<Allowed<D>>,
}

impl<D: Driver> Default for Uploads<D> {
    fn default() -> Uploads<D> {
        Uploads { tries: Kept(HashMap::new()), allowed: Kept(HashMap::new()) }
    }
}

/// Copies of what others own, by the owners' addresses. A copy whose owners nobody else holds any
/// more is dropped when another comes.
struct Kept<T>(HashMap<Vec<usize>, Copied<T>>);

struct Copied<T> {
    owners: Vec<Identity>,
    value: Arc<T>,
}

impl<T> Kept<T> {
    /// A copy that could not be made is not kept.
    fn get_or_copy(
        &mut self,
        owners: Vec<Identity>,
        copy: impl FnOnce() -> Result<T>,
    ) -> Result<Arc<T>> {
        let address = |owner: &Identity| Arc::as_ptr(owner).cast::<()>() as usize;
        let key: Vec<usize> = owners.iter().map(address).collect();
        if let Some(copied) = self.0.get(&key) {
            return Ok(Arc::clone(&copied.value));
        }
        let is_held = |owner: &Identity| Arc::strong_count(owner) > 1;
        self.0.retain(|_, copied| copied.owners.iter().all(is_held));
        let value = Arc::new(copy()?);
        self.0.insert(key, Copied { owners, value: Arc::clone(&value) });
        Ok(value)
    }
}

impl<D: Driver> Uploads<D> {
    fn trie(
        &mut self,
        device: &Arc<Device<D>>,
        (owner, arrays): (Identity, TrieArrays<'_>),
    ) -> Result<Arc<Trie<D>>> {
        self.tries.get_or_copy(vec![owner], || Trie::new(device, &arrays))
    }
}

/// A trie on the device.
struct Trie<D: Driver> {
    entry: TrieEntry,
    /// `[num_levels + 2]`
    depth_start: Vec<u32>,
    _memory: Vec<DeviceMemory<D>>,
}

/// A set of items on the device.
struct Allowed<D: Driver> {
    entry: AllowedEntry,
    _memory: Vec<DeviceMemory<D>>,
}

impl<D: Driver> Trie<D> {
    fn new(device: &Arc<Device<D>>, arrays: &TrieArrays<'_>) -> Result<Trie<D>> {
        let memory = vec![
            DeviceMemory::of_tables(device, arrays.first_edge, "trie's first edges")?,
            DeviceMemory::of_tables(device, arrays.codes, "trie's codes")?,
            DeviceMemory::of_tables(device, arrays.first_item, "trie's first items")?,
            DeviceMemory::of_tables(device, arrays.leaf_item.unwrap_or(&[]), "trie's leaf items")?,
        ];
        let mut depth_start = [0; MAX_LEVELS + 2];
        depth_start[..arrays.depth_start.len()].copy_from_slice(arrays.depth_start);
        Ok(Trie {
            entry: TrieEntry {
                first_edge: memory[0].at(0),
                codes: memory[1].at(0),
                first_item: memory[2].at(0),
                leaf_item: arrays.leaf_item.map_or(0, |_| memory[3].at(0)),
                num_levels: arrays.depth_start.len() as u32 - 2,
                depth_start,
                padding: 0,
            },
            depth_start: arrays.depth_start.to_vec(),
            _memory: memory,
        })
    }

    fn num_nodes(&self, depth: usize) -> usize {
        match self.depth_start.get(depth..depth + 2) {
            Some(ends) => (ends[1] - ends[0]) as usize,
            None => 0,
        }
    }
}

impl<D: Driver> Allowed<D> {
    fn new(device: &Arc<Device<D>>, arrays: &AllowedArrays<'_>) -> Result<Allowed<D>> {
        let memory = vec![
            DeviceMemory::of_tables(device, arrays.items.words(), "allowed items")?,
            DeviceMemory::of_tables(device, arrays.items.counts(), "counts of allowed items")?,
            DeviceMemory::of_tables(
                device,
                arrays.nodes.unwrap_or(&[]),
                "nodes that a filter passes",
            )?,
        ];
        Ok(Allowed {
            entry: AllowedEntry {
                words: memory[0].at(0),
                counts: memory[1].at(0),
                nodes: arrays.nodes.map_or(0, |_| memory[2].at(0)),
                ..AllowedEntry::zeroed()
            },
            _memory: memory,
        })
    }
}

/// What one search may be answered with. Worked out once, at its first step.
pub(super) struct SearchArrays<D: Driver> {
    base: Arc<Trie<D>>,
    base_allowed: Option<Arc<Allowed<D>>>,
    added: Option<Arc<Trie<D>>>,
    /// Bits of the added items and their counts.
    added_words: Vec<u64>,
    added_counts: Vec<u32>,
    excluded: Vec<u32>,
    candidates: Option<(Vec<u32>, Vec<u32>)>,
}

impl<D: Driver> SearchArrays<D> {
    pub fn new(
        device: &Arc<Device<D>>,
        uploads: &mut Uploads<D>,
        rule: &SearchRule<'_>,
    ) -> Result<SearchArrays<D>> {
        let SearchRule { snapshot, allowed_set, candidates, .. } = rule;
        let added_allowed = allowed_set.delta_allowed();
        let owners = allowed_set.base_identity();
        let base_allowed = (!owners.is_empty()).then(|| {
            let arrays = || allowed_set.base_allowed().expect("what has an owner is there");
            uploads.allowed.get_or_copy(owners, || Allowed::new(device, &arrays()))
        });
        Ok(SearchArrays {
            base: uploads.trie(device, snapshot.base_trie())?,
            base_allowed: base_allowed.transpose()?,
            added: snapshot.delta_trie().map(|trie| uploads.trie(device, trie)).transpose()?,
            added_words: added_allowed.as_ref().map_or(Vec::new(), |set| set.words().to_vec()),
            added_counts: added_allowed.as_ref().map_or(Vec::new(), |set| set.counts().to_vec()),
            excluded: allowed_set.base_excluded(),
            candidates: candidates.map(|candidates| candidates.split(snapshot)),
        })
    }

    /// Stands for what there was no memory for, in a step that has failed.
    fn nothing() -> SearchArrays<D> {
        let base =
            Trie { entry: TrieEntry::zeroed(), depth_start: Vec::new(), _memory: Vec::new() };
        SearchArrays {
            base: Arc::new(base),
            base_allowed: None,
            added: None,
            added_words: Vec::new(),
            added_counts: Vec::new(),
            excluded: Vec::new(),
            candidates: None,
        }
    }

    /// Prefixes of so many codes that the catalog has, at most.
    fn num_prefixes(&self, depth: usize) -> usize {
        self.base.num_nodes(depth) + self.added.as_ref().map_or(0, |added| added.num_nodes(depth))
    }
}

/// Rows of like steps, one after the other: one product gives their logits.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Run {
    pub rows: Range<usize>,
    pub span: Range<usize>,
}

/// Where the rows of each search's beams are.
pub(super) struct Layout {
    /// By search.
    pub first_rows: Vec<usize>,
    pub runs: Vec<Run>,
}

impl Layout {
    /// Searches one after the other; with `is_padded`, each run begins where one of a like length
    /// before it would end, so that steps of like shape look the same to kernels.
    pub fn new<D: Driver>(
        head: &Head<D>,
        rules: &[SearchRule<'_>],
        slots: &[Slot<D>],
        is_padded: bool,
    ) -> Layout {
        let pad = |rows: &mut Range<usize>| {
            if is_padded {
                rows.end = rows.start + padded(rows.len());
            }
        };
        let (mut first_rows, mut runs): (Vec<usize>, Vec<Run>) = (Vec::new(), Vec::new());
        for (slot, rule) in slots.iter().zip(rules) {
            let (_, span) = head.choices(slot.num_steps, rule.constraint);
            if runs.last().is_none_or(|run| run.span != span) {
                let start = runs.last_mut().map_or(0, |run| {
                    pad(&mut run.rows);
                    run.rows.end
                });
                runs.push(Run { rows: start..start, span });
            }
            let rows = &mut runs.last_mut().expect("at least this one").rows;
            first_rows.push(rows.end);
            rows.end += slot.num_rows();
        }
        if let Some(run) = runs.last_mut() {
            pad(&mut run.rows);
        }
        Layout { first_rows, runs }
    }

    pub fn num_rows(&self) -> usize {
        self.runs.last().map_or(0, |run| run.rows.end)
    }
}

/// How a step's head and choice are done: what does not depend on numbers on the device.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    pub runs: Vec<Run>,
    /// Numbers from a row of logits to the next.
    pub stride: usize,
    pub needs_vocabulary: bool,
    pub needs_level: bool,
    pub needs_children: bool,
    pub num_parts: usize,
    /// Keys that all searches keep.
    pub num_keys: usize,
    /// The most beams that one search keeps, as a power of two.
    pub width: usize,
}

/// Rows that a search's next position needs at most.
fn room<D: Driver>(slot: &Slot<D>, rule: &SearchRule<'_>, head: &Head<D>) -> usize {
    let search = slot.search.get().expect("planned before");
    let most = num_continuations(slot, search, rule, head);
    rule.beams.max(1).min(most).max(1)
}

/// Continuations that a step of a search has at most.
fn num_continuations<D: Driver>(
    slot: &Slot<D>,
    search: &SearchArrays<D>,
    rule: &SearchRule<'_>,
    head: &Head<D>,
) -> usize {
    let step = &head.steps[slot.num_steps];
    match rule.constraint {
        _ if step.is_forced => slot.num_rows(),
        Constraint::Trie => search.num_prefixes(slot.num_steps + 1),
        Constraint::Level => slot.num_rows().saturating_mul(step.num_codes),
        Constraint::None => slot.num_rows().saturating_mul(head.vocab_size()),
    }
}

/// Makes room for what the slots' steps choose.
pub(super) fn begin_step<D: Driver>(
    head: &Head<D>,
    rules: &[SearchRule<'_>],
    slots: &mut [Slot<D>],
) {
    for (slot, rule) in slots.iter_mut().zip(rules) {
        let room = room(slot, rule, head);
        slot.keeps_log_probs = rule.log_probs;
        slot.follows_trie = rule.constraint == Constraint::Trie;
        slot.num_levels = rule.snapshot.num_levels();
        slot.begin_position(room);
    }
}

/// Plans the step of some slots whose rows are laid out. `is_padded`: the plan is for a shape.
pub(super) fn plan<D: Driver>(
    device: &Arc<Device<D>>,
    uploads: &mut Uploads<D>,
    head: &Head<D>,
    rules: &[SearchRule<'_>],
    slots: &[Slot<D>],
    layout: &Layout,
    is_padded: bool,
) -> Plan {
    let pad = |size: usize| if is_padded { padded(size) } else { size };
    let (mut num_keys, mut width, mut most) = (0, 1, 1);
    let (mut needs_vocabulary, mut needs_level, mut needs_children) = (false, false, false);
    for (slot, rule) in slots.iter().zip(rules) {
        let search = slot.search.get_or_init(|| {
            SearchArrays::new(device, uploads, rule).unwrap_or_else(|error| {
                device.fail_step(error);
                SearchArrays::nothing()
            })
        });
        let step = &head.steps[slot.num_steps];
        let normalizer = rule.normalizer(step.is_forced);
        needs_vocabulary |= normalizer == Normalizer::Vocabulary || rule.log_probs;
        needs_level |= normalizer == Normalizer::Level;
        let is_search = rule.constraint == Constraint::Trie && !step.is_forced;
        needs_children |= is_search
            && (normalizer == Normalizer::Children || rule.seed.is_some() || rule.log_probs);
        most = most.max(num_continuations(slot, search, rule, head));
        width = width.max(rule.beams);
        num_keys += rule.beams.max(1);
    }
    let for_each = (2 * device.driver.num_processors()).div_ceil(slots.len().max(1));
    let longest = layout.runs.iter().map(|run| run.span.len()).max().unwrap_or(0);
    Plan {
        stride: longest.max(head.longest_span()).next_multiple_of(8),
        runs: layout.runs.clone(),
        needs_vocabulary,
        needs_level,
        needs_children,
        num_parts: pad(most.div_ceil(CHUNK).min(for_each)).clamp(1, MAX_PARTS),
        num_keys: pad(num_keys),
        width: width.next_power_of_two(),
    }
}

/// Writes the rules of a step, padded to `num_searches`.
pub(super) fn write<D: Driver>(
    memory: &mut DeviceMemory<D>,
    head: &Head<D>,
    rules: &[SearchRule<'_>],
    slots: &[Slot<D>],
    first_rows: &[usize],
    plan: &Plan,
    logits: u64,
    num_searches: usize,
) {
    let entries_bytes =
        (num_searches.max(slots.len()) * size_of::<RuleEntry>()).next_multiple_of(16);
    let mut extra: Vec<u8> = Vec::new();
    let mut places = Vec::new();
    for slot in slots {
        let search = slot.search.get().expect("planned before");
        let mut put = |part: &[u8]| {
            extra.resize(extra.len().next_multiple_of(16), 0);
            let offset = entries_bytes + extra.len();
            extra.extend_from_slice(part);
            offset
        };
        let (base, added) = match &search.candidates {
            Some((base, added)) => (&base[..], &added[..]),
            None => (&[][..], &[][..]),
        };
        places.push([
            put(bytemuck::cast_slice(&search.excluded)),
            put(bytemuck::cast_slice(&search.added_words)),
            put(bytemuck::cast_slice(&search.added_counts)),
            put(bytemuck::cast_slice(base)),
            put(bytemuck::cast_slice(added)),
        ]);
    }
    memory.make_room(entries_bytes + extra.len());
    let mut first_key = 0;
    let mut entries = Vec::new();
    for (((slot, rule), places), &row) in slots.iter().zip(rules).zip(places).zip(first_rows) {
        let [excluded, added_words, added_counts, base, added] = places.map(|at| memory.at(at));
        let search = slot.search.get().expect("planned before");
        let step = &head.steps[slot.num_steps];
        let (is_free, span) = head.choices(slot.num_steps, rule.constraint);
        let mut entry = RuleEntry::zeroed();
        entry.base = search.base.entry;
        if let Some(allowed) = &search.base_allowed {
            entry.base_allowed = allowed.entry;
        }
        entry.base_allowed.excluded = excluded;
        entry.base_allowed.num_excluded = search.excluded.len() as u32;
        if let Some(trie) = &search.added {
            entry.added = trie.entry;
            entry.added_allowed.words = added_words;
            entry.added_allowed.counts = added_counts;
            entry.flags |= HAS_ADDED;
        }
        if let Some((in_base, in_added)) = &search.candidates {
            entry.base_allowed.candidates = base;
            entry.base_allowed.num_candidates = in_base.len() as u32;
            entry.added_allowed.candidates = added;
            entry.added_allowed.num_candidates = in_added.len() as u32;
            entry.flags |= HAS_CANDIDATES;
        }
        if let Some(seed) = rule.seed {
            entry.seed = seed;
            entry.flags |= HAS_SEED;
        }
        if rule.log_probs {
            entry.flags |= KEEPS_LOG_PROBS;
        }
        entry.logits = logits + (row * plan.stride * size_of::<f32>()) as u64;
        entry.logits_stride = plan.stride as u32;
        entry.columns = match &step.columns {
            Some(columns) if !is_free && !step.is_forced => columns.at(0),
            _ => 0,
        };
        entry.first_token = span.start as u32;
        entry.num_codes = match (is_free, step.is_forced) {
            (_, true) => 1,
            (true, _) => head.vocab_size() as u32,
            _ => step.num_codes as u32,
        };
        entry.normalizer = match rule.normalizer(step.is_forced) {
            Normalizer::Vocabulary => 0,
            Normalizer::Level => 1,
            Normalizer::Children => 2,
            Normalizer::Certain => 3,
        };
        (entry.choices, entry.num_choices) = match rule.constraint {
            _ if step.is_forced => (3, 1),
            Constraint::Trie => (0, 1 << u16::BITS),
            Constraint::Level => (1, 1 << u16::BITS),
            Constraint::None => (2, head.vocab_size() as u32),
        };
        entry.inverse_temperature = 1.0 / rule.temperature;
        entry.width = rule.beams.max(1) as u32;
        entry.room = room(slot, rule, head) as u32;
        entry.first_key = first_key;
        first_key += entry.width;
        entries.push(entry);
    }
    entries.resize(num_searches.max(slots.len()), RuleEntry::zeroed());
    let mut bytes = bytemuck::cast_slice(&entries).to_vec();
    bytes.resize(entries_bytes, 0);
    bytes.extend_from_slice(&extra);
    memory.write(&bytes);
}
