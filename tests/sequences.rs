//! What beams write, be it an item or not: sequences, samples and log-probabilities under every
//! constraint.

use std::collections::HashSet;

#[path = "common/folders.rs"]
mod folders;

use folders::Folder;
use sidereal::{Answer, Constraint, Engine, NamedToken, Request, Sequence};

/// Tokens of the small checkpoint; codes of level `l` are tokens `2 + 6 l` to `7 + 6 l`.
const VOCABULARY: u32 = 20;
const CONSTRAINTS: [Constraint; 4] =
    [Constraint::Trie, Constraint::Occurring, Constraint::Level, Constraint::None];

fn request() -> Request {
    Request::from_tokens([3, 9, 16, 4]).with_sequences(true)
}

fn ask(engine: &mut Engine, request: &Request) -> Answer {
    engine.recommend(request).expect("a sound request")
}

/// log p of every token after the prompt and others.
fn log_probs_after(engine: &mut Engine, tokens: &[u32]) -> Vec<f32> {
    let prompt = [&[3, 9, 16, 4], tokens].concat();
    let read = (0..VOCABULARY).map(NamedToken::Id).collect::<Vec<_>>();
    let read = ask(engine, &Request::from_tokens(prompt).with_read(read)).read;
    read.iter().map(|token| token.log_prob).collect()
}

/// The tokens that may stand at a level.
fn legal(constraint: Constraint, level: u32) -> Vec<u32> {
    match constraint {
        Constraint::None => (0..VOCABULARY).collect(),
        _ => (2 + 6 * level..8 + 6 * level).collect(),
    }
}

#[test]
fn a_sequence_has_the_log_probabilities_of_its_tokens_and_the_items_that_it_names() {
    let folder = Folder::small();
    let mut engine = folder.open().expect("a checkpoint");
    let snapshot = folder.catalog();
    for constraint in CONSTRAINTS {
        for seed in [None, Some(11)] {
            let mut request = request().with_constraint(constraint).with_beams(40).with_top_k(1000);
            (request.seed, request.log_probs) = (seed, true);
            let answer = ask(&mut engine, &request);
            let what = format!("{constraint:?} {seed:?}");
            assert_eq!(answer.sequences.len(), 40, "{what}");
            let distinct: HashSet<&[u32]> =
                answer.sequences.iter().map(|found| &*found.tokens).collect();
            assert_eq!(distinct.len(), 40, "{what}: drawn without replacement");
            let mut by_sequence = Vec::new();
            for Sequence { tokens, score, log_probs, items, .. } in &answer.sequences {
                assert_eq!((tokens.len(), log_probs.len()), (3, 3), "{what}");
                let mut sum = 0.0;
                for (level, (&token, found)) in tokens.iter().zip(log_probs).enumerate() {
                    let all = log_probs_after(&mut engine, &tokens[..level]);
                    assert!((found.vocabulary - all[token as usize]).abs() < 1e-4, "{what}");
                    sum += found.vocabulary;
                    if constraint == Constraint::Level || constraint == Constraint::None {
                        let legal = legal(constraint, level as u32);
                        assert!(legal.contains(&token), "{what}: {tokens:?}");
                        let mass: f32 = legal.iter().map(|&token| all[token as usize].exp()).sum();
                        let expected = all[token as usize] - mass.ln();
                        assert!((found.children - expected).abs() < 1e-4, "{what} {found:?}");
                    }
                }
                assert!((score - sum).abs() < 1e-4, "{what}: {score}, not {sum}");
                let codes =
                    (0..).zip(tokens).map(|(level, token)| token.checked_sub(2 + 6 * level));
                let codes: Option<Vec<u32>> = codes.collect();
                let named: Vec<String> = snapshot
                    .all_items()
                    .filter(|&item| {
                        let sid = snapshot.sid(item);
                        let sid = sid.codes().iter().map(|&code| u32::from(code));
                        codes.as_ref().is_some_and(|codes| sid.eq(codes.iter().copied()))
                    })
                    .map(|item| snapshot.name(item).to_string())
                    .collect();
                let sorted = |names: &[String]| {
                    let mut names = names.to_vec();
                    names.sort();
                    names
                };
                assert_eq!(sorted(items), sorted(&named), "{what}: {tokens:?}");
                by_sequence.extend_from_slice(items);
            }
            // The items of an answer are those of its sequences.
            let items: Vec<&String> = answer.items.iter().map(|item| &item.item).collect();
            assert_eq!(items, by_sequence.iter().collect::<Vec<_>>(), "{what}");
        }
    }
}

/// Pearson's statistic of the first token that one beam draws, over many seeds.
#[test]
fn draws_without_the_trie_follow_the_model() {
    const DRAWS: u64 = 6000;
    let folder = Folder::small();
    let mut engine = folder.open().expect("a checkpoint");
    let all = log_probs_after(&mut engine, &[]);
    for constraint in [Constraint::Level, Constraint::None] {
        let legal = legal(constraint, 0);
        let mass: f64 = legal.iter().map(|&token| f64::from(all[token as usize]).exp()).sum();
        let mut counts = vec![0u64; VOCABULARY as usize];
        for seed in 0..DRAWS {
            let mut request = request().with_constraint(constraint).with_beams(1);
            request.seed = Some(seed);
            counts[ask(&mut engine, &request).sequences[0].tokens[0] as usize] += 1;
        }
        assert_eq!(legal.iter().map(|&token| counts[token as usize]).sum::<u64>(), DRAWS);
        // Tokens that are rarely drawn count together.
        let (mut statistic, mut bins, mut rare) = (0.0, 0, (0.0, 0));
        let mut add = |expected: f64, count: u64| {
            statistic += (count as f64 - expected).powi(2) / expected;
            bins += 1;
        };
        for &token in &legal {
            let expected = f64::from(all[token as usize]).exp() / mass * DRAWS as f64;
            match expected < 10.0 {
                true => rare = (rare.0 + expected, rare.1 + counts[token as usize]),
                false => add(expected, counts[token as usize]),
            }
        }
        if rare.0 > 1.0 {
            add(rare.0, rare.1);
        }
        assert!(bins > 2, "{constraint:?}: too few tokens are likely");
        // Far above the 99.9th percentile of chi-square for up to 20 degrees of freedom.
        assert!(statistic < 50.0, "{constraint:?}: {statistic} over {bins} bins");
    }
}

#[test]
fn sequences_of_no_one_list_are_refused() {
    let mut engine = Folder::small().open().expect("a checkpoint");
    let refused = [
        (request().with_groups(["all"]), "goes without \"groups\""),
        (request().with_read([NamedToken::Id(3)]), "\"read\" replaces"),
    ];
    for (request, words) in refused {
        let error = engine.recommend(&request).expect_err(words).to_string();
        assert!(error.contains(words), "{error}, not {words}");
    }
}
