//! Sets of item numbers as bitmaps.

use std::ops::Range;

/// A set of small integers with constant-time rank (how many members are below a position).
///
/// The rank directory holds a count before every 512 positions; a popcount of at most eight words
/// does the rest. It is the plain form of Jacobson's directory (1989).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankBitmap {
    words: Vec<u64>,
    /// `[words / 8 + 2]`; members before each group of eight words; the last entry counts all.
    counts: Vec<u32>,
    len: u32,
}

const WORDS_PER_COUNT: usize = 8;

impl RankBitmap {
    /// The set whose members are the bits of `words`, lowest first; bits from `len` on are zero.
    ///
    /// # Panics
    /// Where `words` has more or fewer words than `len` bits need.
    pub fn new(words: Vec<u64>, len: u32) -> RankBitmap {
        assert_eq!(words.len(), len.div_ceil(64) as usize, "words must hold all positions");
        let beyond = words.last().is_some_and(|last| last & !mask_below(len) != 0);
        assert!(!beyond || len.is_multiple_of(64), "bits beyond the end must be zero");
        let counts = counts(&words);
        RankBitmap { words, counts, len }
    }

    /// Every position below `len`.
    pub fn full(len: u32) -> RankBitmap {
        let mut words = vec![u64::MAX; len.div_ceil(64) as usize];
        if let (Some(last), false) = (words.last_mut(), len.is_multiple_of(64)) {
            *last = mask_below(len);
        }
        RankBitmap::new(words, len)
    }

    /// The set with `set` put in and then `clear` taken out.
    #[must_use]
    pub fn with(&self, set: &[u32], clear: &[u32]) -> RankBitmap {
        let mut words = self.words.clone();
        for &position in set {
            words[position as usize / 64] |= 1 << (position % 64);
        }
        for &position in clear {
            words[position as usize / 64] &= !(1 << (position % 64));
        }
        RankBitmap::new(words, self.len)
    }

    /// Members before each group of eight words; the last entry counts all.
    pub fn counts(&self) -> &[u32] {
        &self.counts
    }

    /// The words, 64 positions each.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// The number of positions, members or not.
    pub fn num_positions(&self) -> u32 {
        self.len
    }

    /// Whether `position` is a member.
    #[inline]
    pub fn contains(&self, position: u32) -> bool {
        self.words[position as usize / 64] >> (position % 64) & 1 == 1
    }

    /// How many members are below `position`, which is at most the number of positions.
    #[inline]
    pub fn rank(&self, position: u32) -> u32 {
        let (word, bit) = (position as usize / 64, position % 64);
        let group = word / WORDS_PER_COUNT;
        let whole = &self.words[group * WORDS_PER_COUNT..word];
        let within: u32 = whole.iter().map(|word| word.count_ones()).sum();
        let partial = match bit {
            0 => 0,
            _ => (self.words[word] & mask_below(bit)).count_ones(),
        };
        self.counts[group] + within + partial
    }

    /// How many members a range of positions has.
    #[inline]
    pub fn count(&self, positions: Range<u32>) -> u32 {
        self.rank(positions.end) - self.rank(positions.start)
    }

    /// The number of members.
    pub fn num_members(&self) -> u32 {
        self.rank(self.len)
    }

    /// Bytes of the arrays.
    pub fn size_bytes(&self) -> usize {
        size_of_val(&*self.words) + size_of_val(&*self.counts)
    }
}

fn counts(words: &[u64]) -> Vec<u32> {
    let mut counts = Vec::with_capacity(words.len() / WORDS_PER_COUNT + 2);
    counts.push(0);
    for group in words.chunks(WORDS_PER_COUNT) {
        let members: u32 = group.iter().map(|word| word.count_ones()).sum();
        counts.push(counts[counts.len() - 1] + members);
    }
    counts
}

/// The bits below `bit % 64`.
#[inline]
fn mask_below(bit: u32) -> u64 {
    (1 << (bit % 64)) - 1
}

/// Whether a range of positions has a set bit.
#[inline]
pub(super) fn any_bit(words: &[u64], positions: Range<u32>) -> bool {
    let (first, last) =
        (positions.start as usize / 64, (positions.end as usize).wrapping_sub(1) / 64);
    if first == last {
        let below_end = u64::MAX >> (63 - (positions.end - 1) % 64);
        return words[first] & below_end & !mask_below(positions.start) != 0;
    }
    words_of(positions).any(|(word, mask)| words[word] & mask != 0)
}

/// The words that a range of positions touches, each with a mask of the bits in the range.
#[inline]
pub(super) fn words_of(positions: Range<u32>) -> impl Iterator<Item = (usize, u64)> {
    let Range { start, end } = positions;
    let words = start as usize / 64..(end as usize).div_ceil(64).max(start as usize / 64);
    let last = words.end.wrapping_sub(1);
    let first = words.start;
    words.map(move |word| {
        let mut mask = u64::MAX;
        if word == first {
            mask &= !mask_below(start);
        }
        if word == last && end % 64 != 0 {
            mask &= mask_below(end);
        }
        (word, mask)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bitmap(len: u32, contains: impl Fn(u32) -> bool) -> RankBitmap {
        let members: Vec<u32> = (0..len).filter(|&at| contains(at)).collect();
        RankBitmap::new(vec![0; len.div_ceil(64) as usize], len).with(&members, &[])
    }

    #[test]
    fn rank_counts_the_members_below() {
        for len in [0, 1, 63, 64, 65, 511, 512, 513, 1500] {
            let bitmap = bitmap(len, |at| at % 3 == 0 || at > 1400);
            let mut count = 0;
            for at in 0..len {
                assert_eq!(bitmap.rank(at), count, "rank of {at} in {len}");
                count += u32::from(bitmap.contains(at));
            }
            assert_eq!((bitmap.rank(len), bitmap.num_members()), (count, count));
            assert_eq!(RankBitmap::full(len).num_members(), len);
        }
    }

    #[test]
    fn the_words_of_a_range_cover_it_and_no_more() {
        for (start, end) in
            [(0, 0), (5, 5), (64, 64), (0, 64), (3, 9), (60, 70), (64, 200), (1, 128)]
        {
            let found: Vec<u32> = words_of(start..end)
                .flat_map(|(word, mask)| (0..64).map(move |bit| (word as u32 * 64 + bit, mask)))
                .filter(|(at, mask)| mask >> (at % 64) & 1 == 1)
                .map(|(at, _)| at)
                .collect();
            assert_eq!(found, (start..end).collect::<Vec<u32>>(), "{start}..{end}");
        }
    }
}
