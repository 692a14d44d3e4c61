//! A trie of phrases: sequences of any length over a whole vocabulary.
//!
//! The phrases are sorted and laid out breadth-first like the rank trie: edge `e` leads to node
//! `e + 1`, so two arrays hold the tree. Unlike a semantic ID, a phrase may be the prefix of another
//! one, so the end of a phrase is a flag on a node and not a level of the tree.

use std::collections::VecDeque;
use std::ops::Range;

use super::bitmap::RankBitmap;
use super::constraint::{Children, PrefixConstraint};
use super::cursor::{Node, Run};
use crate::error::{Error, Result};

/// Phrases over `u32` tokens, of any length, as a trie.
///
/// Phrases are numbered in the order in which they were given; equal phrases end at one node.
#[derive(Debug)]
pub struct TokenTrie {
    /// `[num_nodes + 1]`; the edges of node `n` are `first_edge[n]..first_edge[n + 1]`.
    first_edge: Vec<u32>,
    /// `[num_nodes - 1]`; the token of edge `e`, which leads to node `e + 1`. Ascending among the
    /// edges of a node.
    tokens: Vec<u32>,
    /// One bit a node: whether a phrase ends there.
    ends: RankBitmap,
    /// `[num_ends + 1]`; the phrases that end at the node of rank `r` among all ends are
    /// `phrases[first_phrase[r]..first_phrase[r + 1]]`.
    first_phrase: Vec<u32>,
    /// `[num_phrases]`; ascending among the phrases of a node.
    phrases: Vec<u32>,
}

impl TokenTrie {
    /// The root: the empty prefix.
    pub const ROOT: u32 = 0;

    /// Lays phrases out, in any order, repetitions included.
    ///
    /// # Errors
    /// [`Error::InvalidField`] for a phrase without tokens, or where there are 2^31 or more phrases
    /// or tokens.
    pub fn new<P: AsRef<[u32]>>(phrases: &[P]) -> Result<TokenTrie> {
        let bad = |reason: String| Err(Error::InvalidField { field: "phrases", reason });
        if let Some(empty) = phrases.iter().position(|phrase| phrase.as_ref().is_empty()) {
            return bad(format!("phrase {empty} has no tokens; leave it out"));
        }
        let num_tokens: usize = phrases.iter().map(|phrase| phrase.as_ref().len()).sum();
        if num_tokens >= 1 << 31 {
            return bad(format!("{num_tokens} tokens; fewer than 2^31 are possible"));
        }
        let phrase = |number: u32| phrases[number as usize].as_ref();
        let mut order: Vec<u32> = (0..phrases.len() as u32).collect();
        order.sort_by(|&a, &b| phrase(a).cmp(phrase(b)));

        // Each queued node is a run of `order` with a common prefix, and that prefix's length.
        let mut queue: VecDeque<(Range<usize>, usize)> = VecDeque::from([(0..order.len(), 0)]);
        let (mut first_edge, mut tokens) = (vec![0], Vec::new());
        let (mut ends, mut first_phrase, mut ended) = (Vec::new(), vec![0], Vec::new());
        let mut num_nodes = 0u32;
        while let Some((mut run, depth)) = queue.pop_front() {
            let before = ended.len();
            while run.start < run.end && phrase(order[run.start]).len() == depth {
                ended.push(order[run.start]); // the shortest come first
                run.start += 1;
            }
            if num_nodes.is_multiple_of(64) {
                ends.push(0);
            }
            if ended.len() > before {
                ends[num_nodes as usize / 64] |= 1u64 << (num_nodes % 64);
                first_phrase.push(ended.len() as u32);
            }
            num_nodes += 1;
            while run.start < run.end {
                let token = phrase(order[run.start])[depth];
                let same = order[run.clone()].partition_point(|&at| phrase(at)[depth] <= token);
                tokens.push(token);
                queue.push_back((run.start..run.start + same, depth + 1));
                run.start += same;
            }
            first_edge.push(tokens.len() as u32);
        }
        let ends = RankBitmap::new(ends, num_nodes);
        Ok(TokenTrie { first_edge, tokens, ends, first_phrase, phrases: ended })
    }

    /// The number of nodes, the root included.
    pub fn num_nodes(&self) -> usize {
        self.first_edge.len() - 1
    }

    /// The number of phrases, repetitions included.
    pub fn num_phrases(&self) -> usize {
        self.phrases.len()
    }

    /// The children of a node, with the tokens that lead to them in the same order.
    #[inline]
    pub fn children(&self, node: u32) -> (Range<u32>, &[u32]) {
        let edges = self.first_edge[node as usize]..self.first_edge[node as usize + 1];
        let tokens = &self.tokens[edges.start as usize..edges.end as usize];
        (edges.start + 1..edges.end + 1, tokens)
    }

    /// The node reached from `node` by `token`.
    pub fn child(&self, node: u32, token: u32) -> Option<u32> {
        let (children, tokens) = self.children(node);
        tokens.binary_search(&token).ok().map(|at| children.start + at as u32)
    }

    /// Whether a phrase ends at a node.
    #[inline]
    pub fn is_end(&self, node: u32) -> bool {
        self.ends.contains(node)
    }

    /// The numbers of the phrases that end at a node, ascending.
    pub fn phrases(&self, node: u32) -> &[u32] {
        if !self.is_end(node) {
            return &[];
        }
        let rank = self.ends.rank(node) as usize;
        &self.phrases[self.first_phrase[rank] as usize..self.first_phrase[rank + 1] as usize]
    }

    /// The tokens from the root to a node.
    pub fn tokens(&self, mut node: u32) -> Vec<u32> {
        let mut tokens = Vec::new();
        while node != TokenTrie::ROOT {
            let edge = node - 1;
            tokens.push(self.tokens[edge as usize]);
            // Nodes without edges start where the next one does: the last start counts.
            node = self.first_edge.partition_point(|&first| first <= edge) as u32 - 1;
        }
        tokens.reverse();
        tokens
    }

    /// Bytes of the trie's arrays.
    pub fn size_bytes(&self) -> usize {
        let arrays = [&self.first_edge, &self.tokens, &self.first_phrase, &self.phrases];
        arrays.iter().map(|array| size_of_val(&***array)).sum::<usize>() + self.ends.size_bytes()
    }
}

impl PrefixConstraint for TokenTrie {
    type State = Node;
    type Label = u32;
    type Children<'a> = TokenChildren<'a>;

    fn root(&self) -> Node {
        Node::new(TokenTrie::ROOT)
    }

    #[inline]
    fn is_final(&self, state: Node, _depth: usize) -> bool {
        state.get().is_some_and(|node| self.is_end(node))
    }

    #[inline]
    fn children(&self, state: Node, _depth: usize) -> TokenChildren<'_> {
        let run = state.get().map(|node| TokenTrie::children(self, node));
        let run = run.filter(|(_, tokens)| !tokens.is_empty());
        TokenChildren { run: run.map(|(nodes, tokens)| Run::new(Node::new(nodes.start), tokens)) }
    }

    fn child(&self, state: Node, token: u32) -> Option<Node> {
        TokenTrie::child(self, state.get()?, token).map(Node::new)
    }
}

/// The children of a node of a [`TokenTrie`]: one run, all of them legal.
pub struct TokenChildren<'a> {
    run: Option<Run<'a, Node, u32>>,
}

impl<'a> Children<'a> for TokenChildren<'a> {
    type State = Node;
    type Label = u32;

    #[inline]
    fn next_run(&mut self) -> Option<Run<'a, Node, u32>> {
        self.run.take()
    }

    #[inline]
    fn can_match(&self, _run: &Run<'a, Node, u32>, _from: usize) -> u8 {
        u8::MAX
    }

    #[inline]
    fn is_match(&mut self, _child: Node) -> bool {
        true
    }
}
