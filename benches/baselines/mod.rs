//! The plain ways to keep a beam search inside a catalogue, to be timed beside ours.
//!
//! Both take the log-probabilities of a step, `[beams, codes]`, and the beams' scores and places,
//! and return the best continuations as (score, place of the child). Neither knows filters.

use std::collections::HashMap;

/// Prefixes in a hash map; a step writes a mask over the vocabulary for each beam, adds the scores
/// up and takes the best of all (what `prefix_allowed_tokens_fn` amounts to).
pub struct HashTrie {
    /// From a prefix's number and a code to the number of the longer prefix.
    next: HashMap<(u32, u16), u32>,
    codes: HashMap<u32, Vec<u16>>,
}

/// A trie as a sparse matrix by level; a step reads as many places for every beam as the longest row
/// of the level has, without branches, and masks what is beyond a row's end: as STATIC (Google,
/// 2026) does on accelerators.
pub struct PaddedTrie {
    levels: Vec<Level>,
}

struct Level {
    longest: usize,
    /// `[nodes + 1]`; the children of node `n` are `first[n]..first[n + 1]`, which are their numbers.
    first: Vec<u32>,
    codes: Vec<u16>,
}

impl HashTrie {
    pub fn build(sids: &[[u16; 3]]) -> HashTrie {
        let mut trie = HashTrie { next: HashMap::new(), codes: HashMap::new() };
        for sid in sids {
            let mut node = 0;
            for &code in sid {
                let new = trie.next.len() as u32 + 1;
                node = *trie.next.entry((node, code)).or_insert_with(|| {
                    trie.codes.entry(node).or_default().push(code);
                    new
                });
            }
        }
        trie
    }

    pub fn node(&self, codes: &[u32]) -> u32 {
        codes.iter().fold(0, |node, &code| self.next[&(node, code as u16)])
    }

    pub fn step(
        &self,
        log_probs: &[f32],
        columns: usize,
        beams: &[(f32, u32)],
        width: usize,
    ) -> Vec<(f32, u32)> {
        let mut scores = vec![f32::NEG_INFINITY; beams.len() * columns];
        for (beam, &(score, node)) in beams.iter().enumerate() {
            let mut mask = vec![false; columns];
            for &code in self.codes.get(&node).into_iter().flatten() {
                mask[usize::from(code)] = true;
            }
            let row = beam * columns..(beam + 1) * columns;
            for ((out, &log_prob), &allowed) in
                scores[row.clone()].iter_mut().zip(&log_probs[row]).zip(&mask)
            {
                *out = if allowed { score + log_prob } else { f32::NEG_INFINITY };
            }
        }
        best(&scores, width)
            .map(|at| {
                let (beam, code) = (at / columns, at % columns);
                (scores[at], self.next[&(beams[beam].1, code as u16)])
            })
            .collect()
    }
}

impl PaddedTrie {
    pub fn build(sorted: &[[u16; 3]]) -> PaddedTrie {
        let level = |level: usize| {
            let (mut first, mut codes) = (Vec::new(), Vec::new());
            let mut before: Option<&[u16; 3]> = None;
            for sid in sorted {
                if before.is_none_or(|before| before[..level] != sid[..level]) {
                    first.push(codes.len() as u32);
                }
                if before.is_none_or(|before| before[..=level] != sid[..=level]) {
                    codes.push(sid[level]);
                }
                before = Some(sid);
            }
            first.push(codes.len() as u32);
            let longest = first.windows(2).map(|row| (row[1] - row[0]) as usize).max();
            Level { longest: longest.unwrap_or(0), first, codes }
        };
        PaddedTrie { levels: (0..3).map(level).collect() }
    }

    pub fn size_bytes(&self) -> usize {
        let bytes = |level: &Level| size_of_val(&*level.first) + size_of_val(&*level.codes);
        self.levels.iter().map(bytes).sum()
    }

    pub fn node(&self, prefix: &[u32]) -> u32 {
        prefix.iter().zip(&self.levels).fold(0, |node, (&code, level)| {
            let row = level.first[node as usize]..level.first[node as usize + 1];
            let mut children = row.clone();
            let child = children.find(|&at| u32::from(level.codes[at as usize]) == code);
            child.expect("a prefix of the catalogue")
        })
    }

    pub fn step(
        &self,
        level: usize,
        log_probs: &[f32],
        columns: usize,
        beams: &[(f32, u32)],
        width: usize,
    ) -> Vec<(f32, u32)> {
        let Level { longest, first, codes } = &self.levels[level];
        let mut scores = vec![f32::NEG_INFINITY; beams.len() * longest];
        for (beam, &(score, node)) in beams.iter().enumerate() {
            let (start, end) = (first[node as usize] as usize, first[node as usize + 1] as usize);
            let log_probs = &log_probs[beam * columns..(beam + 1) * columns];
            let out = &mut scores[beam * longest..(beam + 1) * longest];
            for (slot, out) in out.iter_mut().enumerate() {
                let code = codes[(start + slot).min(codes.len() - 1)];
                let sum = score + log_probs[usize::from(code)];
                *out = if start + slot < end { sum } else { f32::NEG_INFINITY };
            }
        }
        best(&scores, width)
            .map(|at| (scores[at], first[beams[at / longest].1 as usize] + (at % longest) as u32))
            .collect()
    }
}

/// The places of the highest finite scores, highest first.
fn best(scores: &[f32], width: usize) -> impl Iterator<Item = usize> {
    let legal = scores.iter().enumerate().filter(|(_, score)| score.is_finite());
    let mut places: Vec<u32> = legal.map(|(at, _)| at as u32).collect();
    let order = |a: &u32, b: &u32| scores[*b as usize].total_cmp(&scores[*a as usize]);
    if places.len() > width {
        places.select_nth_unstable_by(width - 1, order);
        places.truncate(width);
    }
    places.sort_unstable_by(order);
    places.into_iter().map(|at| at as usize)
}
