//! Which codes may follow a prefix: the rank trie.
//!
//! The distinct semantic IDs, sorted, make a tree of one level per code. Its nodes are numbered
//! breadth-first and its edges are written in that order, so **edge `e` always leads to node
//! `e + 1`**: two arrays hold the whole tree, and a beam's place in it is one `u32`. Items are
//! numbered in the order of their semantic IDs, so the items below a node are one run of numbers.
//! A bitmap over items then tells whether an item below a node is allowed, without a walk
//! ([`AllowedSet`](super::allowed::AllowedSet)).

use std::ops::Range;

use super::column::Column;
use super::sid::{MAX_LEVELS, Sid};

/// Every semantic ID of a catalog, laid out level by level, with the run of items below each node.
///
/// Codes are `u16` and a semantic ID has at most [`MAX_LEVELS`] of them; phrases of any depth are in
/// a [`TokenTrie`](super::token_trie::TokenTrie).
pub struct Trie {
    /// `[num_levels + 2]`; the nodes after `d` codes are `depth_start[d]..depth_start[d + 1]`.
    pub(super) depth_start: Vec<u32>,
    /// `[num_inner_nodes + 1]`; the edges of node `n` are `first_edge[n]..first_edge[n + 1]`.
    pub(super) first_edge: Column<u32>,
    /// `[num_edges]`; ascending among the edges of a node.
    pub(super) code: Column<u16>,
    /// The first item of each node that is neither a leaf nor the parent of leaves, depth by
    /// depth, each depth closed by the number of items: node `n` at depth `d` is at `n + d`.
    /// Parents of leaves need none: their edges are their leaves.
    pub(super) first_item: Column<u32>,
    /// `[num_leaves + 1]`; the items of leaf `l` are `leaf_item[l]..leaf_item[l + 1]`. `None` where
    /// no two items share a semantic ID: leaf `l` is then item `l`.
    pub(super) leaf_item: Option<Column<u32>>,
}

impl Trie {
    /// The root: the empty prefix.
    pub const ROOT: u32 = 0;

    /// The number of codes of a semantic ID.
    pub fn num_levels(&self) -> usize {
        self.depth_start.len() - 2
    }

    /// The number of distinct semantic IDs.
    pub fn num_leaves(&self) -> usize {
        self.nodes_at(self.num_levels()).len()
    }

    /// The nodes reached by `depth` codes.
    pub fn nodes_at(&self, depth: usize) -> Range<u32> {
        self.depth_start[depth]..self.depth_start[depth + 1]
    }

    /// The children of an inner node, with the codes that lead to them in the same order.
    #[inline]
    pub fn children(&self, node: u32) -> (Range<u32>, &[u16]) {
        let edges = self.first_edge[node as usize]..self.first_edge[node as usize + 1];
        let codes = &self.code[edges.start as usize..edges.end as usize];
        (edges.start + 1..edges.end + 1, codes)
    }

    /// The number of items.
    pub fn num_items(&self) -> usize {
        self.leaf_start(self.num_leaves() as u32) as usize
    }

    /// The items below a node that is reached by `depth` codes.
    #[inline]
    pub fn items(&self, node: u32, depth: usize) -> Range<u32> {
        let num_levels = self.num_levels();
        let first_leaf_node = self.depth_start[num_levels];
        if depth == num_levels {
            let leaf = node - first_leaf_node;
            self.leaf_start(leaf)..self.leaf_start(leaf + 1)
        } else if depth + 1 == num_levels {
            let (children, _) = self.children(node);
            let leaves = children.start - first_leaf_node..children.end - first_leaf_node;
            self.leaf_start(leaves.start)..self.leaf_start(leaves.end)
        } else {
            let at = node as usize + depth;
            self.first_item[at]..self.first_item[at + 1]
        }
    }

    #[inline]
    fn leaf_start(&self, leaf: u32) -> u32 {
        self.leaf_item.as_ref().map_or(leaf, |first| first[leaf as usize])
    }

    /// The semantic ID of an item.
    ///
    /// # Panics
    /// Where there is no such item.
    pub fn sid(&self, item: u32) -> Sid {
        assert!((item as usize) < self.num_items(), "item {item} is not in the catalog");
        let leaf = match &self.leaf_item {
            Some(first) => first.partition_point(|&first| first <= item) as u32 - 1,
            None => item,
        };
        self.codes(leaf)
    }

    /// The semantic IDs with their items, in order.
    pub fn leaves(&self) -> Leaves<'_> {
        Leaves { trie: self, next: 0, parents: [0; MAX_LEVELS] }
    }

    /// The codes of all edges that leave nodes at a depth: with repetitions, node by node.
    pub fn codes_at(&self, depth: usize) -> &[u16] {
        let nodes = self.nodes_at(depth + 1);
        &self.code[nodes.start as usize - 1..nodes.end as usize - 1]
    }

    /// The node reached from `node` by `code`.
    pub fn child(&self, node: u32, code: u16) -> Option<u32> {
        let (children, codes) = self.children(node);
        codes.binary_search(&code).ok().map(|at| children.start + at as u32)
    }

    /// The codes that lead to a leaf, first level first.
    pub fn codes(&self, leaf: u32) -> Sid {
        let mut codes = [0; MAX_LEVELS];
        let mut node = self.depth_start[self.num_levels()] + leaf;
        for depth in (0..self.num_levels()).rev() {
            let edge = node - 1;
            codes[depth] = self.code[edge as usize];
            let parents = self.nodes_at(depth);
            let first_edges = &self.first_edge[parents.start as usize..parents.end as usize];
            node = parents.start + first_edges.partition_point(|&first| first <= edge) as u32 - 1;
        }
        Sid::new(&codes[..self.num_levels()]).expect("a trie has 1 to 8 levels")
    }

    /// Bytes of the trie's arrays without the table from leaves to items.
    pub fn size_bytes(&self) -> usize {
        size_of_val(&*self.first_edge) + size_of_val(&*self.code) + size_of_val(&*self.first_item)
    }

    /// The first defect of arrays that come from a file. Without one, no lookup can leave them.
    pub(super) fn defect(&self) -> Option<&'static str> {
        let num_levels = self.num_levels();
        let num_inner = self.depth_start[num_levels] as usize;
        let num_leaves = self.num_leaves();
        if self.first_edge.len() != num_inner + 1
            || self.code.len() + 1 != self.depth_start[num_levels + 1] as usize
        {
            return Some("the trie's arrays do not fit its node counts");
        }
        if self.first_edge[0] != 0 || self.first_edge[num_inner] as usize != self.code.len() {
            return Some("the trie's edges do not cover its nodes");
        }
        // Every inner node has a child, or the trie is empty and has only its root.
        let whole =
            |edges: &[u32]| edges[0] < edges[1] || (self.code.is_empty() && edges[0] == edges[1]);
        if !self.first_edge.windows(2).all(whole) {
            return Some("the trie's edges are out of order");
        }
        for depth in 0..num_levels {
            let nodes = self.nodes_at(depth);
            if self.first_edge[nodes.start as usize] + 1 != self.depth_start[depth + 1] {
                return Some("a level of the trie does not start at its first node");
            }
        }
        let ascending = |node: u32| self.children(node).1.is_sorted_by(|a, b| a < b);
        if !(0..num_inner as u32).all(ascending) {
            return Some("codes below a node of the trie are out of order");
        }
        if let Some(first) = &self.leaf_item {
            let covers = first.len() == num_leaves + 1
                && first[0] == 0
                && first.is_sorted_by(|a, b| a < b)
                && first[num_leaves] < 1 << 31;
            if !covers {
                return Some("the table from leaves to items is out of order");
            }
        }
        let upper_depths = num_levels - 1;
        if self.first_item.len() != self.depth_start[upper_depths] as usize + upper_depths {
            return Some("the trie's runs of items do not fit its node counts");
        }
        for depth in (0..upper_depths).rev() {
            let nodes = self.nodes_at(depth);
            let runs = &self.first_item[nodes.start as usize + depth..=nodes.end as usize + depth];
            let agrees = |(node, &run): (u32, &u32)| {
                let (children, _) = self.children(node);
                children.is_empty() || self.items(children.start, depth + 1).start == run
            };
            if runs.last() != Some(&(self.num_items() as u32))
                || !runs.is_sorted()
                || !nodes.zip(runs).all(agrees)
            {
                return Some("the trie's runs of items are out of order");
            }
        }
        None
    }
}

/// Iterates over the semantic IDs of a trie with their items, in order.
pub struct Leaves<'a> {
    trie: &'a Trie,
    next: u32,
    /// By depth: the node on the path to the next leaf.
    parents: [u32; MAX_LEVELS],
}

impl Iterator for Leaves<'_> {
    type Item = (Sid, Range<u32>);

    fn next(&mut self) -> Option<(Sid, Range<u32>)> {
        let trie = self.trie;
        let num_levels = trie.num_levels();
        let leaf_node = trie.depth_start[num_levels] + self.next;
        if leaf_node == trie.depth_start[num_levels + 1] {
            return None;
        }
        let mut codes = [0; MAX_LEVELS];
        let mut node = leaf_node;
        for depth in (0..num_levels).rev() {
            let edge = node - 1;
            codes[depth] = trie.code[edge as usize];
            // The path to the next leaf goes through the same node or the one after it.
            let parent = &mut self.parents[depth];
            *parent = (*parent).max(trie.depth_start[depth]);
            if trie.first_edge[*parent as usize + 1] <= edge {
                *parent += 1;
            }
            node = *parent;
        }
        self.next += 1;
        let sid = Sid::new(&codes[..num_levels]).expect("a trie has 1 to 8 levels");
        Some((sid, trie.items(leaf_node, num_levels)))
    }
}

/// Lays a trie out, item by item.
pub(super) struct TrieBuilder {
    /// By depth: the codes of the edges that leave it, node by node.
    codes: Vec<Vec<u16>>,
    /// By depth: the first edge of each node, counted from the depth's own first.
    first_edge: Vec<Vec<u32>>,
    /// By depth: the first item of each node.
    first_item: Vec<Vec<u32>>,
    num_items: u32,
    newest: [u16; MAX_LEVELS],
}

impl TrieBuilder {
    pub fn new(num_levels: usize) -> TrieBuilder {
        assert!((1..=MAX_LEVELS).contains(&num_levels), "a trie has 1 to 8 levels");
        let mut first_edge = vec![Vec::new(); num_levels];
        let mut first_item = vec![Vec::new(); num_levels + 1];
        first_edge[0].push(0);
        first_item[0].push(0);
        let codes = vec![Vec::new(); num_levels];
        TrieBuilder { codes, first_edge, first_item, num_items: 0, newest: [0; MAX_LEVELS] }
    }

    /// Adds the next item; items come in the order of their semantic IDs.
    #[inline]
    pub fn push(&mut self, codes: &[u16]) {
        let num_levels = self.codes.len();
        assert_eq!(codes.len(), num_levels, "levels must agree");
        let shared = match self.num_items {
            0 => 0,
            _ => codes.iter().zip(&self.newest).take_while(|(a, b)| a == b).count(),
        };
        for (depth, &code) in codes.iter().enumerate().skip(shared) {
            let is_rising = code > self.newest[depth];
            debug_assert!(
                depth > shared || self.num_items == 0 || is_rising,
                "semantic IDs must be sorted"
            );
            self.codes[depth].push(code);
            self.first_item[depth + 1].push(self.num_items);
            if depth + 1 < num_levels {
                let first_edge = self.codes[depth + 1].len() as u32;
                self.first_edge[depth + 1].push(first_edge);
            }
            self.newest[depth] = code;
        }
        self.num_items += 1;
        assert!(self.num_items < 1 << 31, "items are numbered with 31 bits");
    }

    pub fn finish(self) -> Trie {
        let num_levels = self.codes.len();
        let mut depth_start = vec![0, 1];
        let mut first_edge =
            Vec::with_capacity(self.first_edge.iter().map(Vec::len).sum::<usize>() + 1);
        let mut code: Vec<u16> = Vec::with_capacity(self.codes.iter().map(Vec::len).sum());
        for (edges, codes) in self.first_edge.into_iter().zip(self.codes) {
            let before = code.len() as u32;
            first_edge.extend(edges.into_iter().map(|edge| before + edge));
            code.extend(codes);
            depth_start.push(code.len() as u32 + 1);
        }
        first_edge.push(code.len() as u32);
        let mut runs = self.first_item;
        for run in &mut runs {
            run.push(self.num_items);
        }
        let leaf_item = runs.pop().expect("one run a depth");
        let is_shared = leaf_item.len() - 1 < self.num_items as usize;
        runs.truncate(num_levels - 1); // parents of leaves need none
        Trie {
            depth_start,
            first_edge: first_edge.into(),
            code: code.into(),
            first_item: runs.concat().into(),
            leaf_item: is_shared.then(|| leaf_item.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trie(sids: &[[u16; 3]]) -> Trie {
        let mut builder = TrieBuilder::new(3);
        sids.iter().for_each(|codes| builder.push(codes));
        builder.finish()
    }

    #[test]
    fn edge_e_leads_to_node_e_plus_one() {
        let trie = trie(&[[0, 1, 2], [0, 1, 5], [0, 3, 0], [4, 0, 0]]);
        assert_eq!(trie.defect(), None);
        assert_eq!(trie.children(Trie::ROOT), (1..3, &[0, 4][..]));
        assert_eq!(trie.children(1), (3..5, &[1, 3][..]));
        assert_eq!(trie.children(2), (5..6, &[0][..]));
        assert_eq!(trie.children(3), (6..8, &[2, 5][..]));
        assert_eq!(trie.nodes_at(3), 6..10);
    }

    #[test]
    fn the_items_below_a_node_are_one_run() {
        let trie = trie(&[[0, 1, 2], [0, 1, 5], [0, 1, 5], [0, 3, 0], [4, 0, 0]]);
        assert_eq!(trie.defect(), None);
        assert_eq!((trie.num_leaves(), trie.num_items()), (4, 5));
        assert_eq!(trie.items(Trie::ROOT, 0), 0..5);
        assert_eq!((trie.items(1, 1), trie.items(2, 1)), (0..4, 4..5));
        assert_eq!((trie.items(3, 2), trie.items(4, 2), trie.items(5, 2)), (0..3, 3..4, 4..5));
        assert_eq!((trie.items(7, 3), trie.items(8, 3)), (1..3, 3..4));
        assert_eq!((trie.codes(2).codes(), trie.sid(2).codes()), (&[0, 3, 0][..], &[0, 1, 5][..]));
        let leaves: Vec<(Sid, Range<u32>)> = trie.leaves().collect();
        let expected: Vec<_> =
            (0..4).map(|leaf| (trie.codes(leaf), trie.items(6 + leaf, 3))).collect();
        assert_eq!(leaves, expected);
    }

    #[test]
    fn an_empty_trie_has_its_levels_and_a_root_without_children() {
        for num_levels in 1..=MAX_LEVELS {
            let trie = TrieBuilder::new(num_levels).finish();
            assert_eq!(trie.defect(), None);
            assert_eq!(
                (trie.num_levels(), trie.num_leaves(), trie.num_items()),
                (num_levels, 0, 0)
            );
            assert_eq!((trie.children(Trie::ROOT).0.len(), trie.items(Trie::ROOT, 0)), (0, 0..0));
            assert_eq!(trie.leaves().next(), None);
        }
    }
}
