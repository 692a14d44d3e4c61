//! Which codes occur at each level of a snapshot, whatever stands before them.

use std::sync::Arc;

use super::snapshot::Snapshot;

impl Snapshot {
    /// The codes that some item has at each level, available or not, ascending.
    ///
    /// The first call for a snapshot goes through all edges of its trie.
    pub fn occurring(&self) -> &[Vec<u16>] {
        self.occurring.get_or_init(|| {
            Arc::new((0..self.num_levels()).map(|level| self.codes_occurring_at(level)).collect())
        })
    }

    fn codes_occurring_at(&self, level: usize) -> Vec<u16> {
        let trie = &self.base.trie;
        let mut occurs = vec![false; 1 << u16::BITS];
        // A base segment keeps the paths of deleted items until it is compacted.
        let has_items = |node: u32| match &self.deleted {
            None => true,
            Some(deleted) => {
                let items = trie.items(node, level + 1);
                (deleted.count(items.clone()) as usize) < items.len()
            }
        };
        for (node, &code) in trie.nodes_at(level + 1).zip(trie.codes_at(level)) {
            let occurs = &mut occurs[usize::from(code)];
            *occurs = *occurs || has_items(node);
        }
        for &code in self.delta.iter().flat_map(|delta| delta.trie().codes_at(level)) {
            occurs[usize::from(code)] = true;
        }
        (0..=u16::MAX).filter(|&code| occurs[usize::from(code)]).collect()
    }
}
