//! A trie of phrases: sequences of any length over a whole vocabulary.
//!
//! Phrases are sorted, and what a sorted phrase has in common with the one before it is kept once.
//! Most of a title stands in no other, so two arrays a token, as the rank trie has them, would take
//! several times as much memory as the titles themselves. The trie is **bytes** instead, in the
//! order of a walk that goes down first. Tokens are numbered by how often they are kept, so that
//! frequent ones take one byte. A **record** says what follows a prefix:
//!
//! | record | bytes |
//! | --- | --- |
//! | tail | `n << 2 \| 2`, `n` tokens; all phrases below are equal and end there |
//! | stretch | `n << 2`, `n` tokens, a fork |
//! | fork | `n << 2 \| ends << 1 \| 1`, how many phrases end here if any do, `n` heads, `n` records |
//!
//! A head is a token, the length of its record, and how many phrases are below where it is not one.
//! Heads stand together, so that all children of a node are read in one sweep. Numbers are LEB128.
//!
//! The phrases below a node are one run of **places** in the sorted order, as the items below a
//! node of the rank trie are one run of numbers: filters are answered by bitmaps over places.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::ops::Range;

use super::packed::Packed;
use crate::error::{Error, Result};

/// Phrases with the items that they name, to be laid out as a [`TokenTrie`].
#[derive(Debug, Clone, Default)]
pub struct Phrases {
    tokens: Vec<u32>,
    /// The end of each phrase in `tokens`.
    ends: Vec<usize>,
    items: Vec<u32>,
}

impl Phrases {
    /// Adds the phrase of an item. Several items may have one phrase, an item has one at most.
    pub fn push(&mut self, item: u32, tokens: &[u32]) {
        self.tokens.extend_from_slice(tokens);
        self.ends.push(self.tokens.len());
        self.items.push(item);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// The items with their phrases, in the order of adding.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &[u32])> {
        (0..self.len()).map(|index| (self.items[index], self.get(index)))
    }

    fn get(&self, index: usize) -> &[u32] {
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.tokens[start..self.ends[index]]
    }
}

/// Phrases over `u32` tokens, of any length, as a trie.
#[derive(Debug)]
pub struct TokenTrie {
    bytes: Vec<u8>,
    /// By number: the token.
    tokens: Vec<u32>,
    /// By place: the item.
    items: Packed,
    /// By item: its place, or the number of places where it has no phrase.
    places: Packed,
    max_len: usize,
}

/// A prefix of phrases: where it stands in a [`TokenTrie`], and which phrases begin with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TokenNode {
    /// Within a tail or stretch, its next token; else a fork.
    at: u32,
    /// Twice the tokens that are left of a tail or stretch, and one for a tail.
    left: u32,
    first: u32,
    count: u32,
}

impl TokenNode {
    /// No node.
    pub const NONE: TokenNode = TokenNode { at: 0, left: 0, first: 0, count: 0 };

    /// Whether there is no node.
    #[inline]
    pub fn is_none(&self) -> bool {
        self.count == 0
    }

    /// The places of the phrases that begin with the prefix.
    #[inline]
    pub fn places(&self) -> Range<u32> {
        self.first..self.first + self.count
    }

    fn is_tail(&self) -> bool {
        self.left & 1 == 1
    }
}

impl TokenTrie {
    /// Lays phrases out, in any order, repetitions included; `num_items` is above every item.
    ///
    /// # Errors
    /// [`Error::InvalidField`] for a phrase without tokens, for an item with two phrases, or where the
    /// trie takes 4 GiB.
    pub fn new(phrases: &Phrases, num_items: u32) -> Result<TokenTrie> {
        let bad = |reason: String| Err(Error::InvalidField { field: "phrases", reason });
        let mut order: Vec<u32> = (0..phrases.len() as u32).collect();
        order.sort_by(|&a, &b| phrases.get(a as usize).cmp(phrases.get(b as usize)));
        if order.first().is_some_and(|&first| phrases.get(first as usize).is_empty()) {
            return bad("a phrase has no tokens; leave it out".into());
        }
        let (tokens, mut writer) = Writer::new(phrases, &order);
        let mut bytes = Vec::new();
        writer.write(0..order.len(), 0, &mut bytes);
        if u32::try_from(bytes.len()).is_err() {
            return bad(format!("{} of them take 4 GiB or more", order.len()));
        }
        let none = order.len() as u64;
        let mut places = Packed::new(num_items as usize, none);
        (0..num_items as usize).for_each(|item| places.set(item, none));
        let mut items = Packed::new(order.len(), num_items.into());
        for (place, &index) in order.iter().enumerate() {
            let item = phrases.items[index as usize];
            if places.get(item as usize) != none {
                return bad(format!("item number {item} has two phrases"));
            }
            places.set(item as usize, place as u64);
            items.set(place, item.into());
        }
        let max_len = (0..phrases.len()).map(|index| phrases.get(index).len()).max().unwrap_or(0);
        bytes.shrink_to_fit();
        Ok(TokenTrie { bytes, tokens, items, places, max_len })
    }

    /// The empty prefix; none where there are no phrases.
    pub fn root(&self) -> TokenNode {
        match self.num_phrases() {
            0 => TokenNode::NONE,
            count => self.settled(TokenNode { at: 0, left: 0, first: 0, count: count as u32 }),
        }
    }

    /// The number of phrases, repetitions included.
    pub fn num_phrases(&self) -> usize {
        self.items.len()
    }

    /// Tokens of the longest phrase.
    pub fn max_len(&self) -> usize {
        self.max_len
    }

    /// The item of a place.
    pub fn item(&self, place: u32) -> u32 {
        self.items.get(place as usize) as u32
    }

    /// The place of an item's phrase, if it has one.
    pub fn place(&self, item: u32) -> Option<u32> {
        let place = self.places.get(item as usize) as usize;
        (place < self.num_phrases()).then_some(place as u32)
    }

    /// The places of the phrases that are exactly the prefix of a node.
    pub fn ended(&self, node: TokenNode) -> Range<u32> {
        let all = node.places();
        match (node.left >> 1, node.is_tail()) {
            _ if node.is_none() => all,
            (0, true) => all,
            (0, false) => all.start..all.start + self.fork(node.at).num_ended,
            _ => all.start..all.start,
        }
    }

    /// The children of a node with their tokens, ascending.
    #[inline]
    pub fn children(&self, node: TokenNode) -> TokenChildren<'_> {
        let (at, num_left, first, record) = match (node.left >> 1, node.is_tail()) {
            _ if node.is_none() => (0, 0, 0, 0),
            (0, true) => (0, 0, 0, 0),
            (0, false) => {
                let Fork { num_ended, num_children, heads, records } = self.fork(node.at);
                (heads, num_children, node.first + num_ended, records)
            }
            _ => (node.at, 1, node.first, 0),
        };
        TokenChildren { trie: self, node, at, num_left, first, record }
    }

    /// The child of a node by a token.
    pub fn child(&self, node: TokenNode, token: u32) -> Option<TokenNode> {
        self.children(node).find(|(other, _)| *other == token).map(|(_, child)| child)
    }

    /// Bytes of the trie's arrays.
    pub fn size_bytes(&self) -> usize {
        self.bytes.len()
            + size_of_val(&*self.tokens)
            + self.items.size_bytes()
            + self.places.size_bytes()
    }

    /// A node at a record becomes one within its tail or stretch, or one at its fork.
    fn settled(&self, node: TokenNode) -> TokenNode {
        let (header, at) = self.number(node.at);
        match header & 3 {
            0 => TokenNode { at, left: header >> 2 << 1, ..node },
            2 => TokenNode { at, left: header >> 2 << 1 | 1, ..node },
            _ => node,
        }
    }

    fn fork(&self, at: u32) -> Fork {
        let (header, at) = self.number(at);
        let (num_ended, heads) = if header & 2 == 2 { self.number(at) } else { (0, at) };
        let num_children = header >> 2;
        let mut records = heads;
        for _ in 0..num_children {
            records = self.head(records).1;
        }
        Fork { num_ended, num_children, heads, records }
    }

    /// A head, and what follows it.
    #[inline]
    fn head(&self, at: u32) -> (Head, u32) {
        let (number, at) = self.number(at);
        let (len, at) = self.number(at);
        let (count, at) = if len & 1 == 1 { (1, at) } else { self.number(at) };
        (Head { number, len: len >> 1, count }, at)
    }

    /// A number, and what follows it.
    #[inline]
    fn number(&self, mut at: u32) -> (u32, u32) {
        let (mut number, mut shift) = (0, 0);
        loop {
            let byte = self.bytes[at as usize];
            at += 1;
            number |= u32::from(byte & 127) << shift;
            if byte < 128 {
                return (number, at);
            }
            shift += 7;
        }
    }
}

struct Fork {
    num_ended: u32,
    num_children: u32,
    heads: u32,
    records: u32,
}

struct Head {
    /// Of the token.
    number: u32,
    len: u32,
    count: u32,
}

/// The children of a node of a [`TokenTrie`], each with its token, ascending.
pub struct TokenChildren<'a> {
    trie: &'a TokenTrie,
    node: TokenNode,
    /// The next token of a tail or stretch, or the next head.
    at: u32,
    num_left: u32,
    /// Of the next child: the first of its places, and its record.
    first: u32,
    record: u32,
}

impl Iterator for TokenChildren<'_> {
    type Item = (u32, TokenNode);

    #[inline]
    fn next(&mut self) -> Option<(u32, TokenNode)> {
        self.num_left = self.num_left.checked_sub(1)?;
        let (trie, node) = (self.trie, self.node);
        if node.left > 1 {
            let (number, at) = trie.number(self.at);
            let child = TokenNode { at, left: node.left - 2, ..node };
            return Some((trie.tokens[number as usize], child));
        }
        let (Head { number, len, count }, at) = trie.head(self.at);
        let child = TokenNode { at: self.record, left: 0, first: self.first, count };
        self.at = at;
        self.record += len;
        self.first += count;
        Some((trie.tokens[number as usize], trie.settled(child)))
    }
}

/// Writes the records of sorted phrases.
struct Writer<'a> {
    phrases: &'a Phrases,
    order: &'a [u32],
    /// Of tokens, by how often they are kept.
    numbers: HashMap<u32, u32>,
}

impl<'a> Writer<'a> {
    /// The tokens by number, and a writer that uses them.
    fn new(phrases: &'a Phrases, order: &'a [u32]) -> (Vec<u32>, Writer<'a>) {
        let mut counts: HashMap<u32, u32> = HashMap::new();
        let mut before: &[u32] = &[];
        for &index in order {
            let phrase = phrases.get(index as usize);
            for &token in &phrase[common_len(before, phrase)..] {
                *counts.entry(token).or_default() += 1;
            }
            before = phrase;
        }
        let mut tokens: Vec<u32> = counts.keys().copied().collect();
        tokens.sort_unstable_by_key(|token| (Reverse(counts[token]), *token));
        let numbers = (0..).zip(&tokens).map(|(number, &token)| (token, number)).collect();
        (tokens, Writer { phrases, order, numbers })
    }

    fn phrase(&self, place: usize) -> &'a [u32] {
        self.phrases.get(self.order[place] as usize)
    }

    /// Writes the record of phrases that have their first `depth` tokens in common.
    fn write(&mut self, places: Range<usize>, depth: usize, out: &mut Vec<u8>) {
        if places.is_empty() {
            return;
        }
        let (first, last) = (self.phrase(places.start), self.phrase(places.end - 1));
        // What the first and the last of a sorted run have in common, all have.
        let depth_after = depth + common_len(&first[depth..], &last[depth..]);
        let len = (depth_after - depth) as u32;
        let is_tail = last.len() == depth_after;
        if is_tail || len > 0 {
            push_number(out, len << 2 | u32::from(is_tail) << 1);
            first[depth..depth_after]
                .iter()
                .for_each(|token| push_number(out, self.numbers[token]));
        }
        if !is_tail {
            self.write_fork(places, depth_after, out);
        }
    }

    fn write_fork(&mut self, places: Range<usize>, depth: usize, out: &mut Vec<u8>) {
        let has_ended = |place: &usize| self.phrase(*place).len() == depth;
        let num_ended = places.clone().take_while(has_ended).count(); // the shortest come first
        let mut start = places.start + num_ended;
        let (mut heads, mut records) = (Vec::new(), Vec::new());
        let mut num_children = 0;
        while start < places.end {
            let token = self.phrase(start)[depth];
            let is_below = |place: &usize| self.phrase(*place)[depth] == token;
            let count = (start..places.end).take_while(is_below).count();
            let before = records.len();
            self.write(start..start + count, depth + 1, &mut records);
            push_number(&mut heads, self.numbers[&token]);
            push_number(&mut heads, ((records.len() - before) as u32) << 1 | u32::from(count == 1));
            if count > 1 {
                push_number(&mut heads, count as u32);
            }
            start += count;
            num_children += 1;
        }
        push_number(out, num_children << 2 | u32::from(num_ended > 0) << 1 | 1);
        if num_ended > 0 {
            push_number(out, num_ended as u32);
        }
        out.append(&mut heads);
        out.append(&mut records);
    }
}

fn common_len(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

fn push_number(out: &mut Vec<u8>, mut number: u32) {
    while number >= 128 {
        out.push(number as u8 | 128);
        number >>= 7;
    }
    out.push(number as u8);
}
