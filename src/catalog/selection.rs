//! The items that pass a filter.

use super::bitmap::{RankBitmap, any_bit};
use super::trie::Trie;

/// The items of a base segment that pass a filter.
pub(super) struct Selection {
    pub items: RankBitmap,
    /// Bits by node of the trie: whether an item below the node passes.
    pub nodes: Vec<u64>,
}

impl Selection {
    pub fn new(items: RankBitmap, trie: &Trie) -> Selection {
        let num_levels = trie.num_levels();
        let leaves = trie.nodes_at(num_levels);
        let mut nodes = vec![0u64; (leaves.end as usize).div_ceil(64)];
        // Backwards, so that a node's children are known before it.
        for node in leaves.clone().rev() {
            let passes = any_bit(items.words(), trie.items(node, num_levels));
            nodes[node as usize / 64] |= u64::from(passes) << (node % 64);
        }
        for node in (0..leaves.start).rev() {
            let passes = any_bit(&nodes, trie.children(node).0);
            nodes[node as usize / 64] |= u64::from(passes) << (node % 64);
        }
        Selection { items, nodes }
    }

    /// The bits of eight successive nodes from `first` on; bits beyond the last node are zero.
    #[inline]
    pub fn nodes_from(&self, first: u32) -> u8 {
        let (word, bit) = (first as usize / 64, first % 64);
        let low = self.nodes[word] >> bit;
        let high = match (bit, self.nodes.get(word + 1)) {
            (57.., Some(next)) => next << (64 - bit),
            _ => 0,
        };
        (low | high) as u8
    }

    /// Bytes of the arrays.
    pub fn size_bytes(&self) -> usize {
        self.items.size_bytes() + size_of_val(&*self.nodes)
    }
}
