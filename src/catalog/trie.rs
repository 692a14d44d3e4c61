//! Which codes may follow a prefix: the rank trie.
//!
//! The distinct semantic IDs, sorted, make a tree of one level per code. Its nodes are numbered
//! breadth-first and its edges are written in the same order, so **edge `e` always leads to node
//! `e + 1`**: two arrays hold the whole tree, and a beam's place in it is one `u32`. Because the
//! leaves are in sorted order, the semantic IDs below a node are one run of leaves; whether
//! anything below a node is allowed is then a question of two ranks in a bitmap
//! (see [`Legality`](super::legality::Legality)), not of a walk.

use std::ops::Range;

use super::column::Column;
use super::sid::Sid;

/// Every semantic ID of a catalog, laid out level by level.
pub struct Trie {
    /// `[num_levels + 2]`; the nodes after `d` codes are `depth_start[d]..depth_start[d + 1]`.
    pub(super) depth_start: Vec<u32>,
    /// `[num_inner_nodes + 1]`; the edges of node `n` are `first_edge[n]..first_edge[n + 1]`.
    pub(super) first_edge: Column<u32>,
    /// `[num_edges]`; ascending among the edges of a node.
    pub(super) code: Column<u16>,
    /// The first leaf of each node that is neither a leaf nor the parent of leaves, depth by
    /// depth, each depth closed by the number of leaves: node `n` at depth `d` is at `n + d`.
    /// Parents of leaves need none: their edges are their leaves.
    pub(super) first_leaf: Column<u32>,
}

impl Trie {
    /// The root: the empty prefix.
    pub const ROOT: u32 = 0;

    /// Lays out semantic IDs that are sorted, distinct and of equal length.
    ///
    /// # Panics
    /// Where they are not, or where there are 2^31 or more.
    pub fn build(sids: &[Sid]) -> Trie {
        assert!(sids.is_sorted_by(|a, b| a < b), "semantic IDs must be sorted and distinct");
        assert!(sids.len() < 1 << 31, "node numbers are 32 bits");
        let num_levels = sids.first().map_or(1, Sid::num_levels);
        assert!(sids.iter().all(|sid| sid.num_levels() == num_levels), "levels must agree");

        // How many leading codes each semantic ID has in common with the one before it.
        let shared: Vec<u8> = (0..sids.len())
            .map(|i| if i == 0 { 0 } else { shared_codes(&sids[i - 1], &sids[i]) })
            .collect();
        let mut depth_start = vec![0, 1];
        let (mut first_edge, mut code, mut first_leaf) = (Vec::new(), Vec::new(), Vec::new());
        for depth in 0..num_levels {
            // Nodes at this depth start where fewer than `depth` codes are shared (the root: at 0).
            for (i, sid) in sids.iter().enumerate() {
                let shared = usize::from(shared[i]);
                if i == 0 || shared < depth {
                    first_edge.push(code.len() as u32);
                    if depth + 1 < num_levels {
                        first_leaf.push(i as u32);
                    }
                }
                if i == 0 || shared <= depth {
                    code.push(sid.codes()[depth]);
                }
            }
            if depth + 1 < num_levels {
                first_leaf.push(sids.len() as u32);
            }
            depth_start.push(code.len() as u32 + 1);
        }
        if sids.is_empty() {
            first_edge.push(0);
        }
        first_edge.push(code.len() as u32);
        Trie {
            depth_start,
            first_edge: first_edge.into(),
            code: code.into(),
            first_leaf: first_leaf.into(),
        }
    }

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

    /// The leaves below a node that is reached by `depth` codes.
    #[inline]
    pub fn leaves(&self, node: u32, depth: usize) -> Range<u32> {
        let num_levels = self.num_levels();
        let first_leaf_node = self.depth_start[num_levels];
        if depth == num_levels {
            let leaf = node - first_leaf_node;
            leaf..leaf + 1
        } else if depth + 1 == num_levels {
            let (children, _) = self.children(node);
            children.start - first_leaf_node..children.end - first_leaf_node
        } else {
            let at = node as usize + depth;
            self.first_leaf[at]..self.first_leaf[at + 1]
        }
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

    /// The leaf of a semantic ID.
    pub fn leaf(&self, codes: &[u16]) -> Option<u32> {
        if codes.len() != self.num_levels() {
            return None;
        }
        let node = codes.iter().try_fold(Trie::ROOT, |node, &code| self.child(node, code))?;
        Some(node - self.depth_start[self.num_levels()])
    }

    /// The codes that lead to a leaf, first level first.
    pub fn codes(&self, leaf: u32) -> Sid {
        let mut codes = [0; super::sid::MAX_LEVELS];
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

    /// Bytes of the arrays.
    pub fn size_bytes(&self) -> usize {
        size_of_val(&*self.first_edge) + size_of_val(&*self.code) + size_of_val(&*self.first_leaf)
    }

    /// What is wrong with arrays that come from a file, if anything: after this check no lookup
    /// can leave them.
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
        for depth in 0..num_levels {
            let nodes = self.nodes_at(depth);
            if self.first_edge[nodes.start as usize] + 1 != self.depth_start[depth + 1] {
                return Some("a level of the trie does not start at its first node");
            }
        }
        // Every inner node has a child, or the trie is empty and has only its root.
        let whole = |edges: &[u32]| edges[0] < edges[1] || self.code.is_empty();
        if !self.first_edge.windows(2).all(whole) {
            return Some("the trie's edges are out of order");
        }
        let ascending = |node: u32| self.children(node).1.is_sorted_by(|a, b| a < b);
        if !(0..num_inner as u32).all(ascending) {
            return Some("codes below a node of the trie are out of order");
        }
        let upper_depths = num_levels - 1;
        if self.first_leaf.len() != self.depth_start[upper_depths] as usize + upper_depths {
            return Some("the trie's leaf runs do not fit its node counts");
        }
        for depth in 0..upper_depths {
            let nodes = self.nodes_at(depth);
            let runs = &self.first_leaf[nodes.start as usize + depth..=nodes.end as usize + depth];
            let agrees = |(node, &run): (u32, &u32)| {
                let (children, _) = self.children(node);
                children.is_empty() || self.leaves(children.start, depth + 1).start == run
            };
            if runs.last() != Some(&(num_leaves as u32))
                || !runs.is_sorted()
                || !nodes.zip(runs).all(agrees)
            {
                return Some("the trie's leaf runs are out of order");
            }
        }
        None
    }
}

fn shared_codes(a: &Sid, b: &Sid) -> u8 {
    a.codes().iter().zip(b.codes()).take_while(|(a, b)| a == b).count() as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trie(sids: &[[u16; 3]]) -> Trie {
        let sids: Vec<Sid> = sids.iter().map(|codes| Sid::new(codes).expect("three")).collect();
        Trie::build(&sids)
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
    fn the_leaves_below_a_node_are_one_run() {
        let trie = trie(&[[0, 1, 2], [0, 1, 5], [0, 3, 0], [4, 0, 0]]);
        assert_eq!(trie.leaves(Trie::ROOT, 0), 0..4);
        assert_eq!((trie.leaves(1, 1), trie.leaves(2, 1)), (0..3, 3..4));
        assert_eq!((trie.leaves(3, 2), trie.leaves(4, 2), trie.leaves(5, 2)), (0..2, 2..3, 3..4));
        assert_eq!(trie.leaves(8, 3), 2..3);
        assert_eq!(trie.leaf(&[0, 3, 0]), Some(2));
        assert_eq!(trie.codes(2).codes(), [0, 3, 0]);
        assert_eq!((trie.leaf(&[0, 3, 1]), trie.leaf(&[0, 3])), (None, None));
    }

    #[test]
    fn an_empty_trie_has_a_root_without_children() {
        let trie = Trie::build(&[]);
        assert_eq!((trie.num_leaves(), trie.children(Trie::ROOT).0.len()), (0, 0));
    }
}
