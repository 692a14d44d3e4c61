//! What a request may be answered with: the available items less those that it excludes.

use std::ops::Range;
use std::sync::Arc;

/// A set of small integers with constant-time rank (how many members are below a position).
///
/// Counts before every 512 positions, and a popcount of at most eight words for the rest: the
/// plain form of Jacobson's rank directory (1989).
#[derive(Clone)]
pub struct RankBitmap {
    words: Vec<u64>,
    /// `[words / 8 + 1]`; members before each group of eight words.
    counts: Vec<u32>,
    len: usize,
}

const WORDS_PER_COUNT: usize = 8;

impl RankBitmap {
    /// The positions below `len` for which `contains` says so.
    pub fn from_fn(len: usize, contains: impl Fn(usize) -> bool) -> RankBitmap {
        let word = |start: usize| {
            (start..len.min(start + 64))
                .fold(0, |word, at| word | u64::from(contains(at)) << (at - start))
        };
        let words: Vec<u64> = (0..len).step_by(64).map(word).collect();
        let mut counts = vec![0];
        for group in words.chunks(WORDS_PER_COUNT) {
            let members: u32 = group.iter().map(|word| word.count_ones()).sum();
            counts.push(counts[counts.len() - 1] + members);
        }
        RankBitmap { words, counts, len }
    }

    /// Whether `position` is a member.
    pub fn contains(&self, position: u32) -> bool {
        self.words[position as usize / 64] >> (position % 64) & 1 == 1
    }

    /// How many members are below `position`, which is at most the bitmap's length.
    #[inline]
    pub fn rank(&self, position: u32) -> u32 {
        let (word, bit) = (position as usize / 64, position % 64);
        let group = word / WORDS_PER_COUNT;
        let whole = &self.words[group * WORDS_PER_COUNT..word];
        let within: u32 = whole.iter().map(|word| word.count_ones()).sum();
        let partial = match bit {
            0 => 0,
            _ => (self.words[word] << (64 - bit)).count_ones(),
        };
        self.counts[group] + within + partial
    }

    /// Whether every position is a member.
    pub fn is_full(&self) -> bool {
        self.rank(self.len as u32) as usize == self.len
    }
}

/// The leaves (semantic IDs) that a request may end on.
///
/// A node is legal if and only if a legal leaf is below it, which costs two ranks and, where the
/// request excludes items, two binary searches. So no beam ever walks into a dead end.
#[derive(Clone)]
pub struct Legality {
    /// Leaves that hold an available item; `None` where all do.
    available: Option<Arc<RankBitmap>>,
    /// Sorted available leaves whose every available item the request excludes.
    blocked: Vec<u32>,
}

impl Legality {
    pub(super) fn new(available: Arc<RankBitmap>, blocked: Vec<u32>) -> Legality {
        debug_assert!(blocked.is_sorted_by(|a, b| a < b), "blocked leaves must be sorted");
        let available = (!available.is_full()).then_some(available);
        Legality { available, blocked }
    }

    /// Whether no check is needed: every leaf is legal.
    pub fn is_everything(&self) -> bool {
        self.available.is_none() && self.blocked.is_empty()
    }

    /// How many of the leaves in a run are legal.
    #[inline]
    pub fn count(&self, leaves: Range<u32>) -> u32 {
        let available = match &self.available {
            Some(bitmap) => bitmap.rank(leaves.end) - bitmap.rank(leaves.start),
            None => leaves.end - leaves.start,
        };
        if available == 0 || self.blocked.is_empty() {
            return available;
        }
        let below = |leaf: u32| self.blocked.partition_point(|&blocked| blocked < leaf) as u32;
        available - (below(leaves.end) - below(leaves.start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rank_counts_the_members_below() {
        let bitmap = RankBitmap::from_fn(1500, |at| at % 3 == 0 || at > 1400);
        let mut count = 0;
        for at in 0..1500 {
            assert_eq!(bitmap.rank(at), count, "rank of {at}");
            count += u32::from(bitmap.contains(at));
        }
        assert_eq!(bitmap.rank(1500), count);
        assert!(!bitmap.is_full());
        assert!(RankBitmap::from_fn(512, |_| true).is_full());
    }

    #[test]
    fn blocked_leaves_are_not_counted() {
        let available = Arc::new(RankBitmap::from_fn(100, |at| at != 7));
        let legality = Legality::new(available, vec![3, 4, 90]);
        assert_eq!(legality.count(0..10), 7);
        assert_eq!((legality.count(3..5), legality.count(7..8)), (0, 0));
    }
}
