//! The phrases of a snapshot's items, and which of them may answer a request.
//!
//! A phrase is what a model writes instead of a semantic ID: a title, a name, digits. Those of the
//! base segment's items are one trie, which lives as long as the segment; those of items that were
//! put since are a small one beside it, made anew with each snapshot. A prefix is a node in both.

use std::iter::Peekable;
use std::ops::Range;
use std::sync::Arc;

use super::allowed::AllowedSet;
use super::base_segment::BaseSegment;
use super::bitmap::RankBitmap;
use super::snapshot::Snapshot;
use super::token_trie::{Phrases, TokenChildren, TokenNode, TokenTrie};
use crate::error::Result;

/// The phrases of one snapshot.
pub struct PhraseSet {
    segment: Arc<BaseSegment>,
    snapshot: u64,
    base: Arc<TokenTrie>,
    /// Of items that were put since, by their numbers behind those of the base segment.
    delta: TokenTrie,
    /// What `delta` is made of.
    put: Phrases,
    num_put: u32,
}

/// A prefix of phrases: its node in the base segment's trie, in the delta's, or in both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PhraseNode {
    base: TokenNode,
    delta: TokenNode,
}

impl PhraseSet {
    /// The phrases of a snapshot. `phrases_of` says those of some items, and leaves items without one
    /// out; it is asked for items that `before`, an earlier state of the catalog, does not have.
    ///
    /// # Errors
    /// Those of `phrases_of`.
    pub fn new(
        snapshot: &Snapshot,
        before: Option<&PhraseSet>,
        phrases_of: impl Fn(Range<u32>) -> Result<Phrases>,
    ) -> Result<PhraseSet> {
        let num_base = snapshot.num_base_items();
        let segment = Arc::clone(&snapshot.base);
        let num_put = snapshot.num_put() as u32;
        // Items that were put keep their numbers as long as the base segment stays.
        let before = before
            .filter(|before| Arc::ptr_eq(&before.segment, &segment) && before.num_put <= num_put);
        let (base, mut put, num_known) = match before {
            Some(before) => (Arc::clone(&before.base), before.put.clone(), before.num_put),
            None => {
                let base = TokenTrie::new(&phrases_of(0..num_base)?, num_base)?;
                (Arc::new(base), Phrases::default(), 0)
            }
        };
        let new = phrases_of(num_base + num_known..num_base + num_put)?;
        new.iter().for_each(|(item, tokens)| put.push(item - num_base, tokens));
        let delta = TokenTrie::new(&put, num_put)?;
        Ok(PhraseSet { segment, snapshot: snapshot.number(), base, delta, put, num_put })
    }

    /// Whether these are the phrases of a snapshot.
    pub fn is_of(&self, snapshot: &Snapshot) -> bool {
        self.snapshot == snapshot.number() && Arc::ptr_eq(&self.segment, &snapshot.base)
    }

    /// How many phrases there are, deleted items' included.
    pub fn num_phrases(&self) -> usize {
        self.base.num_phrases() + self.delta.num_phrases()
    }

    /// Tokens of the longest phrase.
    pub fn max_len(&self) -> usize {
        self.base.max_len().max(self.delta.max_len())
    }

    /// Bytes of the tries.
    pub fn size_bytes(&self) -> usize {
        self.base.size_bytes() + self.delta.size_bytes()
    }

    /// The empty prefix.
    pub fn root(&self) -> PhraseNode {
        PhraseNode { base: self.base.root(), delta: self.delta.root() }
    }

    /// The children of a prefix with their tokens, ascending, legal or not.
    pub fn children(&self, node: PhraseNode) -> PhraseChildren<'_> {
        PhraseChildren {
            base: self.base.children(node.base).peekable(),
            delta: self.delta.children(node.delta).peekable(),
        }
    }

    /// The items whose phrase a prefix is, in no promised order.
    pub fn items(&self, node: PhraseNode) -> impl Iterator<Item = u32> + '_ {
        let base = self.base.ended(node.base).map(|place| self.base.item(place));
        let first = self.segment.names.len() as u32;
        let delta = self.delta.ended(node.delta).map(move |place| first + self.delta.item(place));
        base.chain(delta)
    }

    /// The items whose phrases begin with a prefix, in no promised order.
    pub fn items_below(&self, node: PhraseNode) -> impl Iterator<Item = u32> + '_ {
        let base = node.base.places().map(|place| self.base.item(place));
        let first = self.segment.names.len() as u32;
        let delta = node.delta.places().map(move |place| first + self.delta.item(place));
        base.chain(delta)
    }

    /// Whether an item has a phrase.
    pub fn has_phrase(&self, item: u32) -> bool {
        let (base, delta) = self.places([item].into_iter());
        !(base.is_empty() && delta.is_empty())
    }

    /// The places of items in both tries, ascending.
    fn places(&self, items: impl Iterator<Item = u32>) -> (Vec<u32>, Vec<u32>) {
        let num_base = self.segment.names.len() as u32;
        let (mut base, mut delta) = (Vec::new(), Vec::new());
        for item in items {
            match item.checked_sub(num_base) {
                None => base.extend(self.base.place(item)),
                Some(number) => delta.extend(self.delta.place(number)),
            }
        }
        base.sort_unstable();
        delta.sort_unstable();
        (base, delta)
    }

    /// The phrases of the items that an allowed set without a list has.
    pub fn passing(&self, snapshot: &Snapshot, allowed_set: &AllowedSet) -> PassingPhrases {
        let num_base = snapshot.num_base_items();
        let passing = |trie: &TokenTrie, first: u32| {
            let num_places = trie.num_phrases() as u32;
            let passes = |place: &u32| allowed_set.allows(snapshot, first + trie.item(*place));
            let places: Vec<u32> = (0..num_places).filter(passes).collect();
            let none = vec![0; num_places.div_ceil(64) as usize];
            Arc::new(RankBitmap::new(none, num_places).with(&places, &[]))
        };
        let base = (!allowed_set.is_whole_base()).then(|| passing(&self.base, 0));
        PassingPhrases { base, delta: passing(&self.delta, num_base) }
    }

    /// The phrases that may answer a request: those that pass, without some items, and of these the
    /// listed ones where there is a list.
    pub fn allowed(
        &self,
        passing: &PassingPhrases,
        excluded: &[u32],
        listed: Option<&[u32]>,
    ) -> AllowedPhrases {
        let excluded = self.places(excluded.iter().copied());
        let listed = listed.map(|items| self.places(items.iter().copied())).unzip();
        let delta = Some(Arc::clone(&passing.delta));
        AllowedPhrases {
            base: AllowedPlaces::new(passing.base.clone(), excluded.0, listed.0),
            delta: AllowedPlaces::new(delta, excluded.1, listed.1),
        }
    }
}

/// The phrases of items that pass a filter and are available.
#[derive(Clone)]
pub struct PassingPhrases {
    /// `None` for all.
    base: Option<Arc<RankBitmap>>,
    delta: Arc<RankBitmap>,
}

/// The phrases that may answer a request.
pub struct AllowedPhrases {
    base: AllowedPlaces,
    delta: AllowedPlaces,
}

impl AllowedPhrases {
    /// Whether an allowed phrase begins with a prefix.
    #[inline]
    pub fn is_match(&self, node: PhraseNode) -> bool {
        self.base.any(node.base.places()) || self.delta.any(node.delta.places())
    }

    /// Whether a prefix is an allowed phrase.
    pub fn is_end(&self, set: &PhraseSet, node: PhraseNode) -> bool {
        self.base.any(set.base.ended(node.base)) || self.delta.any(set.delta.ended(node.delta))
    }
}

/// Allowed places of a trie.
struct AllowedPlaces {
    /// `None` for all.
    passing: Option<Arc<RankBitmap>>,
    /// Ascending; each passes.
    excluded: Vec<u32>,
    /// Ascending; all that is allowed where it is there.
    listed: Option<Vec<u32>>,
}

impl AllowedPlaces {
    fn new(
        passing: Option<Arc<RankBitmap>>,
        mut excluded: Vec<u32>,
        mut listed: Option<Vec<u32>>,
    ) -> AllowedPlaces {
        let passes = |place: u32| passing.as_ref().is_none_or(|passing| passing.contains(place));
        excluded.retain(|&place| passes(place));
        if let Some(listed) = &mut listed {
            listed.retain(|&place| passes(place) && excluded.binary_search(&place).is_err());
        }
        AllowedPlaces { passing, excluded, listed }
    }

    #[inline]
    fn any(&self, places: Range<u32>) -> bool {
        if places.is_empty() {
            return false;
        }
        let within = |list: &[u32]| {
            let start = list.partition_point(|&place| place < places.start);
            list[start..].partition_point(|&place| place < places.end)
        };
        if let Some(listed) = &self.listed {
            return within(listed) > 0;
        }
        let num_passing = match &self.passing {
            Some(passing) => passing.count(places.clone()) as usize,
            None => places.len(),
        };
        num_passing > 0 && (self.excluded.is_empty() || num_passing > within(&self.excluded))
    }
}

/// The children of a prefix with their tokens, ascending.
pub struct PhraseChildren<'a> {
    base: Peekable<TokenChildren<'a>>,
    delta: Peekable<TokenChildren<'a>>,
}

impl Iterator for PhraseChildren<'_> {
    type Item = (u32, PhraseNode);

    #[inline]
    fn next(&mut self) -> Option<(u32, PhraseNode)> {
        let none = TokenNode::NONE;
        let (base, delta) = (self.base.peek().copied(), self.delta.peek().copied());
        let (token, node) = match (base, delta) {
            (None, None) => return None,
            (Some((token, base)), None) => (token, PhraseNode { base, delta: none }),
            (None, Some((token, delta))) => (token, PhraseNode { base: none, delta }),
            (Some((a, base)), Some((b, delta))) => match a.cmp(&b) {
                std::cmp::Ordering::Less => (a, PhraseNode { base, delta: none }),
                std::cmp::Ordering::Equal => (a, PhraseNode { base, delta }),
                std::cmp::Ordering::Greater => (b, PhraseNode { base: none, delta }),
            },
        };
        self.base.next_if(|(other, _)| *other == token);
        self.delta.next_if(|(other, _)| *other == token);
        Some((token, node))
    }
}
