//! Both constraints agree with brute force: the rank trie with its allowed set, and a trie of
//! phrases of any length.

mod common;

use std::collections::BTreeSet;
use std::sync::Arc;

use common::tiny::{random_catalog, random_change};
use sidereal::catalog::Change;
use sidereal::catalog::constraint::{Children, PrefixConstraint, RankConstraint};
use sidereal::catalog::token_trie::{Phrases, TokenTrie};
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

fn trie_of(phrases: &[Vec<u32>]) -> TokenTrie {
    let mut all = Phrases::default();
    (0..).zip(phrases).for_each(|(item, phrase)| all.push(item, phrase));
    TokenTrie::new(&all, phrases.len() as u32).expect("no phrase is empty")
}

/// The items that a range of places names.
fn items(trie: &TokenTrie, places: std::ops::Range<u32>) -> Vec<u32> {
    let mut items: Vec<u32> = places.map(|place| trie.item(place)).collect();
    items.sort_unstable();
    items
}

#[test]
fn a_token_trie_agrees_with_brute_force() {
    let (mut prefixes, mut repetitions) = (0, 0);
    for seed in 0..300 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let phrases = random_phrases(&mut rng);
        let trie = trie_of(&phrases);
        let distinct: BTreeSet<&Vec<u32>> = phrases.iter().collect();
        assert_eq!(trie.num_phrases(), phrases.len(), "seed {seed}");
        assert_eq!(trie.max_len(), phrases.iter().map(Vec::len).max().unwrap_or(0));
        repetitions += phrases.len() - distinct.len();
        for item in 0..phrases.len() as u32 {
            let place = trie.place(item).expect("each item has a phrase");
            assert_eq!(trie.item(place), item, "seed {seed}");
        }

        let mut all_prefixes: BTreeSet<Vec<u32>> = BTreeSet::new();
        for phrase in &distinct {
            all_prefixes.extend((0..=phrase.len()).map(|len| phrase[..len].to_vec()));
        }
        for prefix in &all_prefixes {
            let node = prefix.iter().try_fold(trie.root(), |node, &t| trie.child(node, t));
            let node = node.unwrap_or_else(|| panic!("seed {seed}: {prefix:?} is missing"));
            let with = |wanted: &dyn Fn(&Vec<u32>) -> bool| -> Vec<u32> {
                (0..).zip(&phrases).filter(|(_, phrase)| wanted(phrase)).map(|(at, _)| at).collect()
            };
            let below = with(&|phrase| phrase.starts_with(prefix));
            assert_eq!(items(&trie, node.places()), below, "seed {seed}: below {prefix:?}");
            let ended = with(&|phrase| phrase == prefix);
            assert_eq!(items(&trie, trie.ended(node)), ended, "seed {seed}: {prefix:?}");
            let tokens: Vec<u32> = trie.children(node).map(|(token, _)| token).collect();
            let is_child = |token: &u32| all_prefixes.contains(&[&prefix[..], &[*token]].concat());
            let mut expected: Vec<u32> =
                (0..6).map(|n| n * 1_000_003).chain([u32::MAX]).filter(is_child).collect();
            expected.sort_unstable();
            assert_eq!(tokens, expected, "seed {seed}: children of {prefix:?}");
            prefixes += usize::from(!ended.is_empty() && !tokens.is_empty());
            assert_eq!(trie.child(node, 70_000), None, "seed {seed}");
        }
    }
    assert!(prefixes > 100, "only {prefixes} phrases were the prefix of another one");
    assert!(repetitions > 100, "only {repetitions} phrases were given twice");
}

#[test]
fn a_phrase_may_be_far_longer_than_a_semantic_id() {
    let long: Vec<u32> = (0..100_000).rev().collect();
    let trie = trie_of(&[long.clone(), long[..50_000].to_vec()]);
    let walk = |phrase: &[u32]| {
        phrase.iter().try_fold(trie.root(), |node, &token| trie.child(node, token))
    };
    let (end, middle) = (walk(&long).expect("a phrase"), walk(&long[..50_000]).expect("another"));
    assert_eq!(
        (items(&trie, trie.ended(end)), items(&trie, trie.ended(middle))),
        (vec![0], vec![1])
    );
    assert!(trie.children(middle).next().is_some() && trie.children(end).next().is_none());
}

#[test]
fn phrases_that_cannot_be_are_errors_and_no_phrases_are_no_root() {
    let of = |phrases: &[(u32, &[u32])]| {
        let mut all = Phrases::default();
        phrases.iter().for_each(|(item, phrase)| all.push(*item, phrase));
        TokenTrie::new(&all, 2).map_err(|error| error.to_string())
    };
    let error = of(&[(0, &[1]), (1, &[])]).expect_err("an empty phrase");
    assert!(error.contains("has no tokens"), "{error}");
    let error = of(&[(0, &[1]), (0, &[2])]).expect_err("two phrases of an item");
    assert!(error.contains("item number 0 has two phrases"), "{error}");
    let empty = of(&[]).expect("no phrases");
    assert!(empty.root().is_none() && empty.children(empty.root()).next().is_none());
    assert_eq!((empty.num_phrases(), empty.ended(empty.root()), empty.place(1)), (0, 0..0, None));
}

/// One million titles, measured: `cargo test --release --test constraint -- --ignored --nocapture`.
#[test]
#[ignore = "takes a minute"]
fn a_million_titles_take_at_most_40_bytes_each() {
    // Titles of a shop: words of a Zipfian vocabulary behind brands, as many tokens as real ones.
    let mut rng = fastrand::Rng::with_seed(7);
    let zipf = |rng: &mut fastrand::Rng, most: f64| (most.powf(rng.f64()) - 1.0) as u32;
    let mut phrases = Phrases::default();
    let mut num_tokens = 0;
    for item in 0..1_000_000 {
        let len = 8 + rng.usize(0..20);
        let mut phrase = vec![zipf(&mut rng, 20_000.0), zipf(&mut rng, 300.0)];
        phrase.extend((2..len).map(|_| zipf(&mut rng, 50_000.0)));
        num_tokens += phrase.len();
        phrases.push(item, &phrase);
    }
    let trie = TokenTrie::new(&phrases, 1_000_000).expect("sound phrases");
    let bytes = trie.size_bytes() as f64 / 1e6;
    println!("{} tokens a title, {bytes} bytes a title", num_tokens as f64 / 1e6);
    assert!(bytes <= 40.0, "{bytes} bytes a title");
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
