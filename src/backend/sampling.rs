//! Tokens of a thought: one drawn from a row of logits, and what ends them.

use std::collections::HashSet;

use super::noise;
use crate::search::Sampling;

/// A rule that ends a thought, beside its stop tokens.
pub trait StopRule: Sync {
    /// Returns whether the thought is over with the newest of these tokens, which it keeps.
    fn is_over(&self, tokens: &[u32]) -> bool;
}

/// Draws a token from the distribution that is left when repetition penalty, temperature, top-k,
/// top-p and min-p have been applied, in this order and as Hugging Face's processors do (transformers
/// 5). `seen`: the tokens that the penalty is for. The noise depends on seed and position alone.
/// `None` where a logit is NaN or all are -infinity.
pub(super) fn draw(
    logits: &[f32],
    sampling: &Sampling,
    seen: impl IntoIterator<Item = u32>,
    position: usize,
) -> Option<u32> {
    let mut scores: Vec<f64> = logits.iter().map(|&logit| logit.into()).collect();
    let penalty = f64::from(sampling.repetition_penalty);
    if penalty != 1.0 {
        for token in seen.into_iter().collect::<HashSet<u32>>() {
            let Some(score) = scores.get_mut(token as usize) else { continue };
            *score = if *score < 0.0 { *score * penalty } else { *score / penalty };
        }
    }
    if scores.iter().any(|score| score.is_nan()) {
        return None;
    }
    let greatest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if !greatest.is_finite() {
        return None;
    }
    if sampling.temperature == 0.0 {
        return scores.iter().position(|&score| score == greatest).map(|token| token as u32);
    }
    let mut left: Vec<(f64, u32)> = (0..)
        .zip(&scores)
        .filter(|(_, score)| score.is_finite())
        .map(|(token, score)| ((score - greatest) / f64::from(sampling.temperature), token))
        .collect();
    keep_top_k(&mut left, sampling.top_k);
    keep_top_p(&mut left, sampling.top_p.into());
    let least = f64::from(sampling.min_p).ln();
    left.retain(|(score, _)| *score >= least); // the best has score 0
    let prefix = noise::extended(sampling.seed, position as u32);
    let noisy = left.iter().map(|&(score, token)| (score + noise::gumbel(prefix, token), token));
    noisy.max_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1))).map(|(_, token)| token)
}

/// The `k` greatest scores, and those that equal the last of them; zero keeps all.
fn keep_top_k(left: &mut Vec<(f64, u32)>, k: usize) {
    if k == 0 || k >= left.len() {
        return;
    }
    let (_, last, _) = left.select_nth_unstable_by(k - 1, |a, b| b.0.total_cmp(&a.0));
    let last = last.0;
    left.retain(|(score, _)| *score >= last);
}

/// The fewest of the greatest scores whose probabilities sum to `p`: those at the lower end go as long
/// as they sum to `1 - p` at most.
fn keep_top_p(left: &mut Vec<(f64, u32)>, p: f64) {
    if p >= 1.0 {
        return;
    }
    left.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)));
    let sum: f64 = left.iter().map(|(score, _)| score.exp()).sum();
    let mut below = 0.0;
    let goes = |(score, _): &&(f64, u32)| {
        below += score.exp() / sum;
        below <= 1.0 - p
    };
    let num_gone = left.iter().take_while(goes).count().min(left.len() - 1);
    left.drain(..num_gone);
}

#[cfg(test)]
mod tests {
    use super::*;

    const VOCABULARY: usize = 50;
    const DRAWS: usize = 100_000;

    /// The distribution by the definitions of the filters, one after the other.
    fn distribution(logits: &[f32], sampling: &Sampling, seen: &[u32]) -> Vec<f64> {
        let softmax = |scores: &[f64]| -> Vec<f64> {
            let greatest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let exponentials: Vec<f64> = scores.iter().map(|x| (x - greatest).exp()).collect();
            let sum: f64 = exponentials.iter().sum();
            exponentials.iter().map(|x| x / sum).collect()
        };
        let mut scores: Vec<f64> = logits.iter().map(|&x| x.into()).collect();
        for (token, score) in scores.iter_mut().enumerate() {
            let penalty = f64::from(sampling.repetition_penalty);
            if seen.contains(&(token as u32)) {
                *score = if *score < 0.0 { *score * penalty } else { *score / penalty };
            }
            *score /= f64::from(sampling.temperature);
        }
        if sampling.top_k > 0 {
            let mut sorted = scores.clone();
            sorted.sort_by(|a, b| b.total_cmp(a));
            let last = sorted[sampling.top_k.min(VOCABULARY) - 1];
            scores.iter_mut().filter(|x| **x < last).for_each(|x| *x = f64::NEG_INFINITY);
        }
        let probabilities = softmax(&scores);
        for (token, score) in scores.iter_mut().enumerate() {
            // All that are no likelier, the token itself among them.
            let below = probabilities.iter().filter(|other| **other <= probabilities[token]);
            if below.sum::<f64>() <= 1.0 - f64::from(sampling.top_p) {
                *score = f64::NEG_INFINITY;
            }
        }
        let probabilities = softmax(&scores);
        let most = probabilities.iter().copied().fold(0.0, f64::max);
        for (score, probability) in scores.iter_mut().zip(&probabilities) {
            if *probability < f64::from(sampling.min_p) * most {
                *score = f64::NEG_INFINITY;
            }
        }
        softmax(&scores)
    }

    #[test]
    fn draws_follow_the_distribution_that_each_filter_leaves() {
        let mut rng = fastrand::Rng::with_seed(3);
        let logits: Vec<f32> = (0..VOCABULARY).map(|_| 6.0 * rng.f32() - 2.0).collect();
        let seen: Vec<u32> = (0..10).map(|_| rng.u32(0..VOCABULARY as u32)).collect();
        let plain = Sampling::default();
        let cases = [
            plain,
            Sampling { temperature: 0.6, ..plain },
            Sampling { temperature: 1.7, ..plain },
            Sampling { top_k: 5, ..plain },
            Sampling { top_p: 0.8, ..plain },
            Sampling { min_p: 0.3, ..plain },
            Sampling { repetition_penalty: 1.5, ..plain },
            Sampling { temperature: 0.6, top_k: 20, top_p: 0.95, min_p: 0.02, ..plain },
        ];
        for (number, case) in cases.into_iter().enumerate() {
            let case = Sampling { seed: number as u64, ..case };
            let expected = distribution(&logits, &case, &seen);
            let mut counts = [0.0; VOCABULARY];
            for position in 0..DRAWS {
                let token = draw(&logits, &case, seen.iter().copied(), position);
                counts[token.expect("finite logits") as usize] += 1.0;
            }
            let (mut chi_square, mut num_tokens) = (0.0, 0);
            for (count, probability) in counts.iter().zip(&expected) {
                let mean = probability * DRAWS as f64;
                match *probability > 0.0 {
                    true => {
                        chi_square += (count - mean) * (count - mean) / mean;
                        num_tokens += 1;
                    }
                    false => assert_eq!(*count, 0.0, "{case:?}"),
                }
            }
            // Mean and deviation of chi-square are n and sqrt(2n): five deviations are chance for
            // none of eight cases.
            let freedom = f64::from(num_tokens) - 1.0;
            let most = freedom + 5.0 * (2.0 * freedom.max(1.0)).sqrt();
            assert!(chi_square < most, "{case:?}: {chi_square} of {num_tokens} tokens");
        }
    }

    #[test]
    fn temperature_zero_is_greedy_and_broken_logits_draw_nothing() {
        let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
        assert_eq!(draw(&[0.5, 2.0, 2.0], &greedy, [], 7), Some(1));
        assert_eq!(draw(&[0.5, f32::NAN], &greedy, [], 7), None);
        assert_eq!(draw(&[f32::NEG_INFINITY; 2], &Sampling::default(), [], 7), None);
    }
}
