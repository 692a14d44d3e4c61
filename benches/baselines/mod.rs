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

/// A trie as sparse matrices by level, every row padded to the longest: gathers without branches,
/// as STATIC (Google, 2026) does on accelerators.
pub struct PaddedTrie {
    /// By level: `[nodes, longest]` codes, and the nodes they lead to; `PAD` in the gaps.
    levels: Vec<(usize, Vec<u16>, Vec<u32>)>,
}

const PAD: u32 = u32::MAX;

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
        let mut levels = Vec::new();
        for level in 0..3 {
            // The children of each node, in order: prefixes of one code more.
            let mut rows: Vec<Vec<(u16, u32)>> = Vec::new();
            let (mut node, mut before): (u32, Option<&[u16; 3]>) = (0, None);
            for sid in sorted {
                if before.is_none_or(|before| before[..level] != sid[..level]) {
                    rows.push(Vec::new());
                }
                if before.is_none_or(|before| before[..=level] != sid[..=level]) {
                    rows.last_mut().expect("pushed above").push((sid[level], node));
                    node += 1;
                }
                before = Some(sid);
            }
            let longest = rows.iter().map(Vec::len).max().unwrap_or(0);
            let mut codes = vec![0; rows.len() * longest];
            let mut nodes = vec![PAD; rows.len() * longest];
            for (row, children) in rows.iter().enumerate() {
                for (at, &(code, node)) in children.iter().enumerate() {
                    codes[row * longest + at] = code;
                    nodes[row * longest + at] = node;
                }
            }
            levels.push((longest, codes, nodes));
        }
        PaddedTrie { levels }
    }

    pub fn size_bytes(&self) -> usize {
        let bytes = |(_, codes, nodes): &(usize, Vec<u16>, Vec<u32>)| {
            size_of_val(&codes[..]) + size_of_val(&nodes[..])
        };
        self.levels.iter().map(bytes).sum()
    }

    pub fn node(&self, prefix: &[u32]) -> u32 {
        prefix.iter().zip(&self.levels).fold(0, |node, (&code, (longest, codes, nodes))| {
            let row = node as usize * longest..(node as usize + 1) * longest;
            let mut at = codes[row.clone()].iter().zip(&nodes[row.clone()]);
            let at = at.position(|(&other, &child)| u32::from(other) == code && child != PAD);
            nodes[row.start + at.expect("a prefix of the catalogue")]
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
        let (longest, codes, nodes) = &self.levels[level];
        let mut scores = vec![f32::NEG_INFINITY; beams.len() * longest];
        for (beam, &(score, node)) in beams.iter().enumerate() {
            let row = node as usize * longest..(node as usize + 1) * longest;
            let log_probs = &log_probs[beam * columns..(beam + 1) * columns];
            let out = &mut scores[beam * longest..(beam + 1) * longest];
            for ((out, &code), &child) in out.iter_mut().zip(&codes[row.clone()]).zip(&nodes[row]) {
                let sum = score + log_probs[usize::from(code)];
                *out = if child == PAD { f32::NEG_INFINITY } else { sum };
            }
        }
        best(&scores, width)
            .map(|at| {
                let (beam, child) = (at / longest, at % longest);
                (scores[at], nodes[beams[beam].1 as usize * longest + child])
            })
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
