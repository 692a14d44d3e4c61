//! Where a prefix of codes is in a snapshot, and which children it has there.

use std::fmt::Debug;
use std::hash::Hash;

/// The position of a beam in a trie or a pair of tries.
///
/// Tries are numbered breadth-first, so children with successive labels have successive positions:
/// a run of children is its first position and its labels.
pub trait State: Copy + Debug + Eq + Hash {
    /// The position of the child that comes `count` children later in a run.
    fn plus(self, count: u32) -> Self;
}

/// A node of a trie, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Node(u32);

impl Node {
    /// No node.
    pub const NONE: Node = Node(u32::MAX);

    /// The node of a number; [`u32::MAX`] is none.
    pub fn new(node: u32) -> Node {
        Node(node)
    }

    /// The node's number.
    #[inline]
    pub fn get(self) -> Option<u32> {
        (self != Node::NONE).then_some(self.0)
    }

    /// Whether there is no node.
    #[inline]
    pub fn is_none(self) -> bool {
        self == Node::NONE
    }
}

impl State for Node {
    #[inline]
    fn plus(self, count: u32) -> Node {
        if self.is_none() { self } else { Node(self.0 + count) }
    }
}

/// A prefix of codes in a snapshot: its node in the base segment's trie, in the delta's, or in
/// both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cursor {
    /// In the base segment's trie.
    pub base: Node,
    /// In the delta's trie.
    pub delta: Node,
}

impl State for Cursor {
    #[inline]
    fn plus(self, count: u32) -> Cursor {
        Cursor { base: self.base.plus(count), delta: self.delta.plus(count) }
    }
}

/// Children whose positions follow one another: child `i` has label `labels[i]`, which is a code
/// in a catalog and a token in a trie of phrases.
pub struct Run<'a, S = Cursor, L = u16> {
    first: S,
    /// Ascending.
    pub labels: &'a [L],
}

impl<'a, S: State, L> Run<'a, S, L> {
    /// The run whose first child is at `first`.
    #[inline]
    pub(super) fn new(first: S, labels: &'a [L]) -> Run<'a, S, L> {
        Run { first, labels }
    }

    /// The position of a child.
    #[inline]
    pub fn child(&self, index: usize) -> S {
        self.first.plus(index as u32)
    }
}

/// The children of a cursor in the order of their codes, in as few runs as possible.
pub struct Runs<'a> {
    pub(super) base: (Node, &'a [u16]),
    pub(super) delta: (Node, &'a [u16]),
}

/// Takes `count` children off the front.
fn cut<'a>((node, codes): &mut (Node, &'a [u16]), count: usize) -> (Node, &'a [u16]) {
    let (now, later) = codes.split_at(count);
    let first = *node;
    (*node, *codes) = (first.plus(count as u32), later);
    (first, now)
}

impl<'a> Iterator for Runs<'a> {
    type Item = Run<'a>;

    #[inline]
    fn next(&mut self) -> Option<Run<'a>> {
        let (base, delta) = (self.base.1, self.delta.1);
        let (base_len, delta_len) = match (base.first(), delta.first()) {
            (None, None) => return None,
            (_, None) => (base.len(), 0),
            (None, _) => (0, delta.len()),
            (Some(a), Some(b)) if a == b => (1, 1),
            (Some(a), Some(b)) if a < b => (base.partition_point(|code| code < b), 0),
            (Some(a), _) => (0, delta.partition_point(|code| code < a)),
        };
        let (base, base_codes) = cut(&mut self.base, base_len);
        let (delta, delta_codes) = cut(&mut self.delta, delta_len);
        let first = Cursor {
            base: if base_len > 0 { base } else { Node::NONE },
            delta: if delta_len > 0 { delta } else { Node::NONE },
        };
        Some(Run::new(first, if base_len > 0 { base_codes } else { delta_codes }))
    }
}
