//! One step of a search among phrases.
//!
//! As in a search of semantic IDs, a continuation's score and identity are one key, and exactly the
//! best of all beams' legal continuations go on. The end of a phrase is a token like others, but a
//! beam that writes it is set apart ([`EndedPhrases`]) and takes no beam from those that go on.

use super::Slot;
use super::keys::{key, ranks, score_of};
use super::lm_head::{LogSumExp, Logits};
use super::slot::Beams;
use crate::backend::ended_phrases::EndedPhrases;
use crate::backend::{Normalizer, PhraseStep, SearchRule};
use crate::catalog::phrases::PhraseNode;

/// Extends the beams of a slot by a token of a phrase.
pub(super) fn advance(
    logits: &Logits,
    vocab_size: u32,
    rule: &SearchRule<'_>,
    index: usize,
    slot: &mut Slot,
) {
    let beams = &mut slot.beams;
    let phrases = rule.phrases.expect("a step of a phrase has phrases");
    if rule.depth == 0 {
        beams.phrases = vec![phrases.set.root(); beams.len()];
        beams.ended = Some(EndedPhrases::new(&phrases, rule.beams));
    }
    let rows = logits.searches[index].rows.clone();
    let step = Step {
        rule,
        phrases,
        vocab_size,
        logits,
        slot: index,
        normalizers: &logits.normalizers[rows],
        inverse_temperature: 1.0 / rule.temperature,
    };
    if step.take(beams, slot.positions.len()).is_none() {
        let num_steps = beams.num_steps;
        beams.fail(num_steps);
    }
}

/// One step of one slot.
struct Step<'a> {
    rule: &'a SearchRule<'a>,
    phrases: PhraseStep<'a>,
    vocab_size: u32,
    logits: &'a Logits,
    slot: usize,
    /// By beam.
    normalizers: &'a [LogSumExp],
    inverse_temperature: f32,
}

/// The best continuations seen so far, each with the prefix that it leads to.
struct Best {
    found: Vec<(u64, PhraseNode)>,
    width: usize,
    /// What scores below cannot be among the best any more.
    threshold: f32,
}

impl Best {
    fn offer(&mut self, score: f32, identity: u32, node: PhraseNode) {
        self.found.push((key(score, identity), node));
        if self.found.len() >= 2 * self.width + 128 {
            self.prune();
        }
    }

    fn prune(&mut self) {
        if self.found.len() > self.width {
            let last = self.width - 1;
            let (_, last, _) = self.found.select_nth_unstable_by_key(last, |(key, _)| *key);
            self.threshold = score_of(last.0);
            self.found.truncate(self.width);
        }
    }
}

impl Step<'_> {
    /// Takes the step; `None` where a score is NaN or infinite.
    fn take(&self, beams: &mut Beams, tail_len: usize) -> Option<()> {
        let mut ended = beams.ended.take().expect("set at the first step");
        let width = self.rule.beams.max(1);
        let num_with_ends = ended.num_continuations(width);
        let mut best = Best {
            found: Vec::new(),
            width: num_with_ends.unwrap_or(width),
            threshold: f32::NEG_INFINITY,
        };
        let mut ends = Vec::new();
        for beam in 0..beams.len() {
            let Some(normalizer) = self.normalizer(beams, beam)? else { continue };
            self.offer_children(beams, beam, normalizer, &mut best);
            if let Some((score, identity)) = self.end(beams, beam, normalizer) {
                match num_with_ends {
                    Some(_) => best.offer(score, identity, beams.phrases[beam]),
                    None => ends.push((key(score, identity), beams.phrases[beam])),
                }
            }
        }
        best.prune();
        let mut found = best.found;
        found.sort_unstable_by_key(|(key, _)| *key);
        ends.sort_unstable_by_key(|(key, _)| *key);
        if !found.iter().chain(&ends).all(|(key, _)| score_of(*key).is_finite()) {
            return None;
        }
        let is_end = |(key, _): &(u64, PhraseNode)| {
            num_with_ends.is_some() && self.token(*key) == self.phrases.end
        };
        let of_first_half = found.iter().take(width).filter(|found| is_end(found));
        let parents = self.parents(beams);
        let len = self.rule.depth + 1;
        for &(key, node) in of_first_half.chain(&ends) {
            let tokens = beams.tokens_of(parents[self.rank(key)]);
            let tokens = [tokens, &[self.phrases.end]].concat();
            ended.offer(score_of(key), tokens, node, len);
        }
        found.retain(|found| !is_end(found));
        found.truncate(width);
        let is_over = found.first().is_none_or(|(best, _)| ended.is_over(score_of(*best), len));
        if is_over {
            found.clear();
        }
        self.replace(beams, &found, &parents, tail_len);
        beams.ended = Some(ended);
        Some(())
    }

    fn rank(&self, key: u64) -> usize {
        (key as u32 / self.vocab_size) as usize
    }

    fn token(&self, key: u64) -> u32 {
        key as u32 % self.vocab_size
    }

    /// The beams by their ranks.
    fn parents(&self, beams: &Beams) -> Vec<usize> {
        let mut parents = vec![0; beams.len()];
        beams.ranks.iter().enumerate().for_each(|(beam, &rank)| parents[rank as usize] = beam);
        parents
    }

    fn gain(&self, logit: f32, normalizer: f32) -> f32 {
        logit * self.inverse_temperature - normalizer
    }

    /// What a beam's scores are normalised by: the outer `None` where it is not finite, the inner one
    /// where the beam has no legal continuation.
    #[allow(clippy::option_option)]
    fn normalizer(&self, beams: &Beams, beam: usize) -> Option<Option<f32>> {
        let sum = match self.rule.normalizer() {
            Normalizer::Children => match self.over_children(beams, beam) {
                Some(sum) => sum,
                None => return Some(None),
            },
            _ => self.normalizers[beam].value(),
        };
        sum.is_finite().then_some(Some(sum))
    }

    /// The log of the summed exponentials of a beam's legal continuations; `None` without any.
    fn over_children(&self, beams: &Beams, beam: usize) -> Option<f32> {
        let PhraseStep { set, allowed, end, .. } = self.phrases;
        let (node, logits) = (beams.phrases[beam], self.logits.row(self.slot, beam));
        let children = set.children(node).filter(|(_, child)| allowed.is_match(*child));
        let mut legal: Vec<f32> = children.map(|(token, _)| logits[token as usize]).collect();
        legal.extend(allowed.is_end(set, node).then(|| logits[end as usize]));
        let mut sum = LogSumExp::default();
        sum.add(&legal, self.inverse_temperature);
        (!legal.is_empty()).then(|| sum.value())
    }

    fn offer_children(&self, beams: &Beams, beam: usize, normalizer: f32, best: &mut Best) {
        let PhraseStep { set, allowed, candidates, .. } = self.phrases;
        let (score, logits) = (beams.scores[beam], self.logits.row(self.slot, beam));
        let followed = candidates.unwrap_or(allowed);
        let first = beams.ranks[beam] * self.vocab_size;
        for (token, child) in set.children(beams.phrases[beam]) {
            let score = score + self.gain(logits[token as usize], normalizer);
            // NaN is offered as well, and found out later.
            let may_pass = score >= best.threshold || score.is_nan();
            if may_pass && followed.is_match(child) {
                best.offer(score, first + token, child);
            }
        }
    }

    /// The score and identity of a beam's end, where it may end.
    fn end(&self, beams: &Beams, beam: usize, normalizer: f32) -> Option<(f32, u32)> {
        let PhraseStep { set, allowed, candidates, end, .. } = self.phrases;
        if !candidates.unwrap_or(allowed).is_end(set, beams.phrases[beam]) {
            return None;
        }
        let logit = self.logits.row(self.slot, beam)[end as usize];
        let score = beams.scores[beam] + self.gain(logit, normalizer);
        Some((score, beams.ranks[beam] * self.vocab_size + end))
    }

    /// Makes the chosen continuations the slot's beams.
    fn replace(
        &self,
        beams: &mut Beams,
        chosen: &[(u64, PhraseNode)],
        parents: &[usize],
        tail_len: usize,
    ) {
        // The parents' newest row of the tail, if they wrote one, is an ancestor's now.
        let wrote = tail_len > beams.num_ancestors;
        let (mut tokens, mut ancestors) = (Vec::new(), Vec::new());
        for &(key, _) in chosen {
            let parent = parents[self.rank(key)];
            tokens.extend_from_slice(beams.tokens_of(parent));
            tokens.push(self.token(key));
            ancestors.extend_from_slice(beams.ancestors_of(parent));
            ancestors.extend(wrote.then_some(parent as u32));
        }
        let keys: Vec<u64> = chosen.iter().map(|(key, _)| *key).collect();
        beams.scores = keys.iter().map(|&key| score_of(key)).collect();
        beams.ranks = ranks(&keys);
        beams.phrases = chosen.iter().map(|(_, node)| *node).collect();
        beams.cursors.truncate(0);
        beams.samples.truncate(0);
        (beams.tokens, beams.ancestors) = (tokens, ancestors);
        beams.num_steps += 1;
        beams.num_ancestors = tail_len;
    }
}
