//! Both constraints agree with brute force: the rank trie with its allowed set, and a trie of
//! phrases of any length.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use common::tiny::{random_catalog, random_change};
use sidereal::catalog::Change;
use sidereal::catalog::constraint::{Children, PrefixConstraint, RankConstraint};
use sidereal::catalog::token_trie::TokenTrie;
use sidereal::{CatalogWriter, WriterOptions};

/// All paths from the root to a final state that are at most `max_depth` long.
fn paths<C: PrefixConstraint>(constraint: &C, max_depth: usize) -> BTreeSet<Vec<u32>> {
    let mut found = BTreeSet::new();
    let mut states = vec![(Vec::new(), constraint.root())];
    for depth in 0..=max_depth {
        let mut next = Vec::new();
        for (path, state) in states {
            if constraint.is_final(state, depth) {
                assert!(found.insert(path.clone()), "{path:?} comes twice");
            }
            let mut last = None;
            constraint.for_each_child(state, depth, |label, child| {
                assert!(last < Some(label), "labels ascend");
                last = Some(label);
                assert_eq!(constraint.child(state, label), Some(child));
                let path = [&path[..], &[label.into()]].concat();
                next.push((path, child));
            });
        }
        states = next;
    }
    assert!(states.is_empty(), "a path is longer than {max_depth}");
    found
}

fn random_phrases(rng: &mut fastrand::Rng) -> Vec<Vec<u32>> {
    // Few tokens and short phrases, so that prefixes and repetitions are frequent; large numbers,
    // so that nothing is cut to 16 bits.
    let tokens: Vec<u32> = (0..rng.u32(1..6)).map(|n| n * 1_000_003).chain([u32::MAX]).collect();
    let max_len = [1, 3, 12][rng.usize(0..3)];
    let phrase = |rng: &mut fastrand::Rng| -> Vec<u32> {
        (0..rng.usize(1..=max_len)).map(|_| tokens[rng.usize(0..tokens.len())]).collect()
    };
    (0..rng.usize(0..200)).map(|_| phrase(rng)).collect()
}

#[test]
fn a_token_trie_agrees_with_brute_force() {
    let (mut prefixes, mut repetitions) = (0, 0);
    for seed in 0..300 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let phrases = random_phrases(&mut rng);
        let trie = TokenTrie::new(&phrases).expect("no phrase is empty");
        let mut numbers: BTreeMap<Vec<u32>, Vec<u32>> = BTreeMap::new();
        for (number, phrase) in (0..).zip(&phrases) {
            numbers.entry(phrase.clone()).or_default().push(number);
        }
        let distinct: BTreeSet<Vec<u32>> = numbers.keys().cloned().collect();
        assert_eq!(paths(&trie, 12), distinct, "seed {seed}");
        assert_eq!(trie.num_phrases(), phrases.len(), "seed {seed}");
        repetitions += phrases.len() - distinct.len();

        let mut all_prefixes: BTreeSet<Vec<u32>> = BTreeSet::from([Vec::new()]);
        for phrase in &distinct {
            all_prefixes.extend((1..=phrase.len()).map(|len| phrase[..len].to_vec()));
        }
        assert_eq!(trie.num_nodes(), all_prefixes.len(), "seed {seed}");
        let mut nodes = BTreeSet::new();
        for prefix in &all_prefixes {
            let node = prefix.iter().try_fold(TokenTrie::ROOT, |node, &t| trie.child(node, t));
            let node = node.unwrap_or_else(|| panic!("seed {seed}: {prefix:?} is missing"));
            assert!(nodes.insert(node), "seed {seed}: two prefixes share a node");
            assert_eq!(trie.tokens(node), *prefix, "seed {seed}");
            let expected = numbers.get(prefix).map_or(&[][..], Vec::as_slice);
            assert_eq!(trie.phrases(node), expected, "seed {seed}: {prefix:?}");
            assert_eq!(trie.is_end(node), distinct.contains(prefix), "seed {seed}: {prefix:?}");
            prefixes += usize::from(trie.is_end(node) && !trie.children(node).1.is_empty());
            for token in [0, 1, 1_000_003, 70_000, u32::MAX] {
                let longer = [&prefix[..], &[token]].concat();
                let has_child = trie.child(node, token).is_some();
                assert_eq!(has_child, all_prefixes.contains(&longer), "seed {seed}: {longer:?}");
            }
        }
    }
    assert!(prefixes > 100, "only {prefixes} phrases were the prefix of another one");
    assert!(repetitions > 100, "only {repetitions} phrases were given twice");
}

#[test]
fn a_phrase_may_be_far_longer_than_a_semantic_id() {
    let long: Vec<u32> = (0..100_000).rev().collect();
    let trie = TokenTrie::new(&[&long[..], &long[..50_000]]).expect("two phrases");
    let walk = |phrase: &[u32]| phrase.iter().try_fold(0, |node, &token| trie.child(node, token));
    let (end, middle) = (walk(&long).expect("a phrase"), walk(&long[..50_000]).expect("another"));
    assert_eq!((trie.phrases(end), trie.phrases(middle)), (&[0][..], &[1][..]));
    assert!(!trie.children(middle).1.is_empty() && trie.children(end).1.is_empty());
    assert_eq!(trie.num_nodes(), 100_001);
}

#[test]
fn a_phrase_without_tokens_is_an_error_and_no_phrases_are_a_root_alone() {
    let error = TokenTrie::new(&[vec![1], vec![]]).expect_err("an empty phrase").to_string();
    assert!(error.contains("phrase 1 has no tokens"), "{error}");
    let empty = TokenTrie::new::<Vec<u32>>(&[]).expect("no phrases");
    assert_eq!((empty.num_nodes(), empty.num_phrases(), empty.phrases(0)), (1, 0, &[][..]));
    assert_eq!(paths(&empty, 1), BTreeSet::new());
}

#[test]
fn the_paths_of_a_rank_constraint_are_the_semantic_ids_of_allowed_items() {
    let mut some_forbidden = 0;
    for seed in 0..200 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let num_levels = 1 + seed as usize % 4;
        let catalog = Arc::new(random_catalog(&mut rng, num_levels, 5));
        let options = WriterOptions::default().with_compact_at(usize::MAX);
        let writer = CatalogWriter::in_memory(Arc::clone(&catalog), &options).expect("a thread");
        let changes: Vec<Change> =
            (0..10).map(|_| random_change(&mut rng, 25, num_levels, 5)).collect();
        writer.apply(&changes).expect("sound changes");
        let snapshot = catalog.snapshot();
        let mut excluded: Vec<u32> = snapshot.all_items().filter(|_| rng.u8(0..3) == 0).collect();
        excluded.sort_unstable();
        for filter in [None, Some("tag:a"), Some("tag:b | !tag:c"), Some("tag:nobody")] {
            let mut allowed_set = snapshot.allowed_set(&excluded, filter).expect("a sound filter");
            if rng.bool() {
                let mut only: Vec<u32> = snapshot.all_items().filter(|_| rng.bool()).collect();
                only.sort_unstable();
                let all = allowed_set;
                allowed_set = all.restricted_to(&snapshot, &only);
                for item in snapshot.all_items() {
                    let is_allowed = all.allows(&snapshot, item) && only.contains(&item);
                    assert_eq!(allowed_set.allows(&snapshot, item), is_allowed, "seed {seed}");
                }
            }
            let sids = |is_wanted: &dyn Fn(u32) -> bool| -> BTreeSet<Vec<u32>> {
                let items = snapshot.all_items().filter(|&item| is_wanted(item));
                let codes = |item| snapshot.sid(item).codes().iter().map(|&c| c.into()).collect();
                items.map(codes).collect()
            };
            let expected = sids(&|item| allowed_set.allows(&snapshot, item));
            let constraint = RankConstraint { snapshot: &snapshot, allowed_set: &allowed_set };
            assert_eq!(paths(&constraint, num_levels), expected, "seed {seed}: {filter:?}");
            some_forbidden += usize::from(expected.len() < sids(&|_| true).len());

            // The allowed semantic IDs as phrases make a token trie with the same paths.
            let phrases: Vec<Vec<u32>> = expected.iter().cloned().collect();
            let trie = TokenTrie::new(&phrases).expect("no phrase is empty");
            assert_eq!(paths(&trie, num_levels), expected, "seed {seed}: {filter:?}");
        }
    }
    assert!(some_forbidden > 300, "only {some_forbidden} allowed sets forbade a semantic ID");
}

#[test]
fn a_child_that_cannot_match_does_not_match() {
    for seed in 0..100 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let snapshot = random_catalog(&mut rng, 2, 12).snapshot();
        let allowed_set = snapshot.allowed_set(&[], Some("tag:a")).expect("a sound filter");
        let constraint = RankConstraint { snapshot: &snapshot, allowed_set: &allowed_set };
        let mut states = vec![constraint.root()];
        for depth in 0..=2 {
            let mut next = Vec::new();
            for state in states {
                let mut children = constraint.children(state, depth);
                while let Some(run) = children.next_run() {
                    for index in 0..run.labels.len() {
                        let from = index - index % 8;
                        let can_match = children.can_match(&run, from) >> (index - from) & 1 == 1;
                        let is_match = children.is_match(run.child(index));
                        assert!(can_match || !is_match, "seed {seed}, depth {depth}");
                        next.push(run.child(index));
                    }
                }
            }
            states = next;
        }
        assert!(states.is_empty(), "a leaf has no children");
    }
}
