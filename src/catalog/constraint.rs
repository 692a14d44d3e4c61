//! Which labels may follow a prefix: the interface between a search and what it searches in.
//!
//! A constraint is a set of states. A search starts at the root, goes from a state to one of its
//! children by a label, and may stop at a final state. A state is a few bytes that a beam copies; it
//! holds no borrow. The rank trie with an allowed set is the implementation. The phrases of a
//! [`PhraseSet`] have states and children of their own: they are read one after the other, where
//! those of the rank trie are runs.
//!
//! [`PhraseSet`]: super::phrases::PhraseSet

use super::allowed::{AllowedChildren, AllowedSet};
use super::cursor::{Cursor, Run, Runs, State};
use super::snapshot::Snapshot;

/// The legal continuations of each prefix of a search.
///
/// `depth` is the number of labels from the root to `state`. A search knows it, so a state need
/// not hold it.
pub trait PrefixConstraint {
    /// A prefix's position.
    type State: State;
    /// One step of a path: a code of a level, or a token.
    type Label: Copy + Ord + Into<u32>;
    /// The children of one state.
    type Children<'a>: Children<'a, State = Self::State, Label = Self::Label>
    where
        Self: 'a;

    /// The state of the empty prefix.
    fn root(&self) -> Self::State;

    /// Whether a path may end at a state. A final state may have children.
    fn is_final(&self, state: Self::State, depth: usize) -> bool;

    /// The children of a state; none where every path ends.
    fn children(&self, state: Self::State, depth: usize) -> Self::Children<'_>;

    /// The child of a state by a label, legal or not; `None` where there is none.
    fn child(&self, state: Self::State, label: Self::Label) -> Option<Self::State>;

    /// Calls `each` with the legal children of a state, in the order of their labels.
    fn for_each_child(
        &self,
        state: Self::State,
        depth: usize,
        mut each: impl FnMut(Self::Label, Self::State),
    ) {
        let mut children = self.children(state, depth);
        while let Some(run) = children.next_run() {
            for (index, &label) in run.labels.iter().enumerate() {
                let child = run.child(index);
                if children.is_match(child) {
                    each(label, child);
                }
            }
        }
    }
}

/// The children of one state in the order of their labels, run by run.
///
/// A search that has a score for every label checks the score first, because it is cheaper than
/// [`is_match`](Children::is_match).
pub trait Children<'a> {
    /// A prefix's position.
    type State: State;
    /// One step of a path: a code of a level, or a token.
    type Label: 'a;

    /// The next run of children, legal or not.
    fn next_run(&mut self) -> Option<Run<'a, Self::State, Self::Label>>;

    /// A bit for each of 8 children of a run, from child `from` on: zero where the child is
    /// certainly illegal, one where only [`is_match`](Children::is_match) can tell.
    fn can_match(&self, run: &Run<'a, Self::State, Self::Label>, from: usize) -> u8;

    /// Whether a child is legal. Children must be asked in the order of their labels; a search may
    /// leave some out.
    fn is_match(&mut self, child: Self::State) -> bool;
}

/// The semantic IDs of a snapshot that lead to an allowed item, as a constraint.
///
/// A path has as many codes as the snapshot has levels, so exactly the states of that depth are
/// final.
#[derive(Clone, Copy)]
pub struct RankConstraint<'a> {
    /// The searched state of the catalog.
    pub snapshot: &'a Snapshot,
    /// The allowed items of the snapshot.
    pub allowed_set: &'a AllowedSet,
}

impl PrefixConstraint for RankConstraint<'_> {
    type State = Cursor;
    type Label = u16;
    type Children<'a>
        = RankChildren<'a>
    where
        Self: 'a;

    fn root(&self) -> Cursor {
        self.snapshot.root()
    }

    #[inline]
    fn is_final(&self, _state: Cursor, depth: usize) -> bool {
        depth == self.snapshot.num_levels()
    }

    #[inline]
    fn children(&self, state: Cursor, depth: usize) -> RankChildren<'_> {
        let is_leaf = depth == self.snapshot.num_levels();
        RankChildren((!is_leaf).then(|| {
            let allowed = self.allowed_set.below(self.snapshot, state, depth);
            (self.snapshot.children(state), allowed)
        }))
    }

    fn child(&self, state: Cursor, code: u16) -> Option<Cursor> {
        self.snapshot.child(state, code)
    }
}

/// The children of a cursor; none below a leaf.
pub struct RankChildren<'a>(Option<(Runs<'a>, AllowedChildren<'a>)>);

impl<'a> Children<'a> for RankChildren<'a> {
    type State = Cursor;
    type Label = u16;

    #[inline]
    fn next_run(&mut self) -> Option<Run<'a>> {
        self.0.as_mut()?.0.next()
    }

    #[inline]
    fn can_match(&self, run: &Run<'a>, from: usize) -> u8 {
        self.0.as_ref().map_or(0, |(_, allowed)| allowed.can_match(run, from))
    }

    #[inline]
    fn is_match(&mut self, child: Cursor) -> bool {
        self.0.as_mut().is_some_and(|(_, allowed)| allowed.is_match(child))
    }
}
