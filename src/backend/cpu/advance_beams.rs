//! One step of a search: every legal continuation of every beam, and exactly the best of them all.
//!
//! The overview, slot by slot (slots are independent and run in parallel):
//!
//! 1. [`Search::best`] goes through the beams. Where the continuations of a beam come from is the
//!    rule's [`Continuations`]: the children of its node in the catalog, the codes that occur at the
//!    level or all of its codes, the vocabulary, named tokens, or one forced token.
//! 2. A continuation's score is the beam's plus `logit / temperature - normalizer`. Normalisers over
//!    the vocabulary and over levels come from the head; one over children is summed here.
//! 3. Score and identity (the rank of the beam by its tokens, then the choice) become one `u64` that
//!    sorts by falling score, then by semantic ID. [`Best`] keeps the smallest keys: whenever it has
//!    gathered twice the beam width, it drops the worse half and raises its threshold. The threshold
//!    skips whole beams (no log-probability is above zero) and eight children at a time.
//! 4. [`Search::replace`] makes the chosen continuations the slot's beams. Keys and values do not
//!    move: a beam knows the tail rows of its ancestors.
//!
//! Nothing is truncated per beam, so the selection is exact. A score that is NaN or infinite ends the
//! search, and reading its beams says so.

use rayon::prelude::*;

use super::head::Head;
use super::keys::{key, ranks, score_of};
use super::lm_head::{LogSumExp, Logits, SlotLogits, over_level};
use super::slot::{Beams, Sample};
use super::{CpuBackend, Slot, phrases, thoughts};
use crate::backend::level_columns::LevelColumns;
use crate::backend::{
    AdvanceBeams, Batch, Continuations, LogProb, Normalizer, SearchRule, StepChoice, noise,
};
use crate::catalog::cursor::Cursor;

impl AdvanceBeams for CpuBackend {
    fn advance_beams(
        &self,
        logits: &Logits,
        head: &Head,
        rules: &[SearchRule<'_>],
        batch: &mut Batch<'_, CpuBackend>,
    ) {
        assert_eq!(rules.len(), batch.slots.len(), "a rule for each slot");
        batch.slots.par_iter_mut().zip(rules).enumerate().for_each(|(index, (slot, rule))| {
            advance(logits, head, rule, index, slot);
        });
    }
}

fn advance(logits: &Logits, head: &Head, rule: &SearchRule<'_>, index: usize, slot: &mut Slot) {
    let beams = &mut slot.beams;
    let step = beams.num_steps;
    if step == 0 {
        beams.cursors = vec![rule.snapshot.root(); beams.len()];
    }
    let named;
    let (columns, tokens) = match &rule.choice {
        StepChoice::Level(level) => (&head.levels[*level], &[][..]),
        StepChoice::Forced { token, .. } => {
            named = LevelColumns::of_named(&[*token]);
            (&named, std::slice::from_ref(token))
        }
        StepChoice::Tokens(tokens) => {
            named = LevelColumns::of_named(tokens);
            (&named, *tokens)
        }
        StepChoice::Phrase => {
            return phrases::advance(logits, head.vocab_size, rule, index, slot);
        }
        StepChoice::Sample { .. } => return thoughts::advance(logits, rule, index, slot),
    };
    let slot_logits = &logits.searches[index];
    let SlotLogits { rows, .. } = slot_logits;
    let search = Search {
        continuations: rule.continuations(),
        columns,
        tokens,
        first: slot_logits.first_column(columns),
        vocab_size: head.vocab_size,
        rule,
        seed: rule.sampling_seed(),
        logits,
        slot: index,
        normalizers: &logits.normalizers[rows.clone()],
        first_row: rows.start,
        inverse_temperature: 1.0 / rule.temperature,
    };
    match search.best(beams) {
        Some(best) => search.replace(beams, &best, slot.positions.len()),
        None => beams.fail(step),
    }
    if !beams.are_finite() {
        beams.fail(step);
    }
}

/// Why no step that is gone through here is forced, of a phrase or of a thought.
const ELSEWHERE: &str = "forced tokens, phrases and thoughts are gone through elsewhere";

/// One step of one slot.
struct Search<'a> {
    continuations: Continuations,
    /// By code of the level or of the named tokens.
    columns: &'a LevelColumns,
    /// The tokens that are named or forced.
    tokens: &'a [u32],
    /// The first of the columns in a row of logits.
    first: usize,
    vocab_size: u32,
    rule: &'a SearchRule<'a>,
    /// Where the step is sampled.
    seed: Option<u64>,
    logits: &'a Logits,
    slot: usize,
    /// By beam.
    normalizers: &'a [LogSumExp],
    first_row: usize,
    inverse_temperature: f32,
}

/// The best continuations seen so far, each one number that orders them: score, falling, then the
/// rank of the beam, then the choice.
struct Best {
    keys: Vec<u64>,
    width: usize,
    /// What scores below cannot be among the best any more.
    threshold: f32,
}

impl Best {
    fn new(width: usize) -> Best {
        Best { keys: Vec::new(), width, threshold: f32::NEG_INFINITY }
    }

    #[inline]
    fn offer(&mut self, score: f32, cursor: u32) {
        self.keys.push(key(score, cursor));
        if self.keys.len() >= 2 * self.width + 128 {
            self.prune();
        }
    }

    fn prune(&mut self) {
        if self.keys.len() > self.width {
            let (_, &mut last, _) = self.keys.select_nth_unstable(self.width - 1);
            self.threshold = score_of(last);
            self.keys.truncate(self.width);
        }
    }

    fn into_sorted(mut self) -> Vec<u64> {
        self.prune();
        self.keys.sort_unstable();
        self.keys
    }
}

/// Children that are looked at together.
const LANES: usize = 8;

impl Search<'_> {
    /// The best continuations, best first, or `None` where a score is NaN or infinite.
    fn best(&self, beams: &Beams) -> Option<Vec<u64>> {
        let mut best = Best::new(self.rule.beams.max(1));
        for beam in 0..beams.len() {
            if let Some(seed) = self.seed {
                self.offer_sample(beams, beam, seed, &mut best)?;
                continue;
            }
            match self.continuations {
                Continuations::Forced => self.offer_forced(beams, beam, &mut best)?,
                Continuations::Children => self.offer_children(beams, beam, &mut best)?,
                Continuations::Occurring
                | Continuations::Level
                | Continuations::Tokens
                | Continuations::Vocabulary => self.offer_choices(beams, beam, &mut best)?,
                Continuations::Phrases | Continuations::Sampled => unreachable!("{ELSEWHERE}"),
            }
        }
        let best = best.into_sorted();
        best.iter().all(|&key| score_of(key).is_finite()).then_some(best)
    }

    /// How many choices a beam has at most: a candidate's cursor is its beam's rank times this,
    /// plus its choice (a code, a token, or zero where it is forced).
    fn num_choices(&self) -> u32 {
        match self.continuations {
            Continuations::Forced => 1,
            Continuations::Children | Continuations::Occurring | Continuations::Level => {
                1 << u16::BITS
            }
            Continuations::Vocabulary => self.vocab_size,
            Continuations::Tokens => self.tokens.len() as u32,
            Continuations::Phrases | Continuations::Sampled => unreachable!("{ELSEWHERE}"),
        }
    }

    fn first_place(&self, beams: &Beams, beam: usize) -> u32 {
        beams.ranks[beam] * self.num_choices()
    }

    /// The codes that some item has at the level of the step.
    fn occurring(&self) -> &[u16] {
        &self.rule.snapshot.occurring()[self.rule.depth]
    }

    /// The normaliser of a beam over the vocabulary, the level or the codes that occur there, and the
    /// score that none of its continuations can pass; `None` where it is not finite.
    fn normalizer(&self, beams: &Beams, beam: usize) -> Option<(f32, f32)> {
        let over_occurring;
        let sum = match self.rule.normalizer() {
            Normalizer::Children => {
                over_occurring = self.over_occurring(beam);
                &over_occurring
            }
            _ => &self.normalizers[beam],
        };
        let value = sum.value();
        value.is_finite().then(|| (value, beams.scores[beam] + sum.ceiling()))
    }

    #[inline]
    fn gain(&self, logit: f32, normalizer: f32) -> f32 {
        logit * self.inverse_temperature - normalizer
    }

    fn offer_forced(&self, beams: &Beams, beam: usize, best: &mut Best) -> Option<()> {
        let gain = match self.rule.normalizer() {
            Normalizer::Certain => 0.0,
            _ => {
                let logit = self.logits.row(self.slot, beam)[self.first];
                self.gain(logit, self.normalizer(beams, beam)?.0)
            }
        };
        best.offer(beams.scores[beam] + gain, self.first_place(beams, beam));
        Some(())
    }

    fn offer_children(&self, beams: &Beams, beam: usize, best: &mut Best) -> Option<()> {
        let SearchRule { snapshot, allowed_set, .. } = self.rule;
        let cursor = beams.cursors[beam];
        let logits = self.level_logits(beam);
        let logit = |code: u16| self.logit(logits, code);
        let normalizer = match self.rule.normalizer() {
            Normalizer::Children => match self.over_children(beams, beam) {
                Some(sum) => sum.is_finite().then_some(sum)?,
                None => return Some(()), // the request allows nothing at all
            },
            _ => {
                let (normalizer, ceiling) = self.normalizer(beams, beam)?;
                if ceiling < best.threshold {
                    return Some(());
                }
                normalizer
            }
        };
        let (score, first_place) = (beams.scores[beam], self.first_place(beams, beam));
        if let Some(candidates) = self.rule.candidates {
            for &code in candidates.codes_after(cursor) {
                best.offer(
                    score + self.gain(logit(code), normalizer),
                    first_place + u32::from(code),
                );
            }
            return Some(());
        }
        let mut allowed = allowed_set.below(snapshot, cursor, self.rule.depth);
        for run in snapshot.children(cursor) {
            let mut bar = self.bar(best.threshold, score, normalizer);
            for (chunk, codes) in run.labels.chunks(LANES).enumerate() {
                if !self.may_pass(logits, codes, bar) {
                    continue;
                }
                let possible = allowed.can_match(&run, chunk * LANES);
                for (at, &code) in codes.iter().enumerate() {
                    let score = score + self.gain(logit(code), normalizer);
                    if score >= best.threshold
                        && possible >> at & 1 == 1
                        && allowed.is_match(run.child(chunk * LANES + at))
                    {
                        best.offer(score, first_place + u32::from(code));
                    }
                }
                bar = self.bar(best.threshold, score, normalizer);
            }
        }
        Some(())
    }

    /// The logits of a beam from the level's first token on.
    fn level_logits(&self, beam: usize) -> &[f32] {
        &self.logits.row(self.slot, beam)[self.first..][..self.columns.span.len()]
    }

    /// A code without a token is none that the model can write: NaN is never high enough.
    #[inline]
    fn logit(&self, logits: &[f32], code: u16) -> f32 {
        let column = self.columns.column(usize::from(code));
        column.and_then(|column| logits.get(column)).copied().unwrap_or(f32::NAN)
    }

    /// Goes through the legal continuations of a beam.
    fn for_each_child(&self, beams: &Beams, beam: usize, mut each: impl FnMut(u16, f32)) {
        let SearchRule { snapshot, allowed_set, .. } = self.rule;
        let (cursor, logits) = (beams.cursors[beam], self.level_logits(beam));
        let mut allowed = allowed_set.below(snapshot, cursor, self.rule.depth);
        for run in snapshot.children(cursor) {
            for (at, &code) in run.labels.iter().enumerate() {
                if allowed.is_match(run.child(at)) {
                    each(code, self.logit(logits, code));
                }
            }
        }
    }

    /// The log of the summed exponentials of a beam's legal continuations; `None` without any.
    fn over_children(&self, beams: &Beams, beam: usize) -> Option<f32> {
        let mut legal = Vec::new();
        self.for_each_child(beams, beam, |_, logit| legal.push(logit));
        let mut sum = LogSumExp::default();
        sum.add(&legal, self.inverse_temperature);
        (!legal.is_empty()).then(|| sum.value())
    }

    /// Draws the continuations of a beam that are greatest with their noise, given that the
    /// greatest of all has the beam's own (Kool et al. 2019, section 4).
    fn offer_sample(&self, beams: &Beams, beam: usize, seed: u64, best: &mut Best) -> Option<()> {
        let Sample { log_prob, noisy } = beams.samples[beam];
        let first_place = self.first_place(beams, beam);
        if self.continuations == Continuations::Forced {
            best.offer(noisy, first_place);
            return Some(());
        }
        let Some(normalizer) = self.over_legal(beams, beam) else { return Some(()) };
        let normalizer = normalizer.is_finite().then_some(normalizer)?;
        let tokens = &beams.tokens[beam * beams.num_steps..(beam + 1) * beams.num_steps];
        let prefix = tokens.iter().fold(seed, |prefix, &token| noise::extended(prefix, token));
        let mut noisy_children = Vec::new();
        self.for_each_choice(beams, beam, |choice, logit| {
            let child =
                f64::from(log_prob + self.gain(logit, normalizer)) + noise::gumbel(prefix, choice);
            noisy_children.push((choice, child));
        });
        let greatest =
            noisy_children.iter().fold(f64::NEG_INFINITY, |most, child| most.max(child.1));
        for (choice, child) in noisy_children {
            let score = noise::under_ceiling(child, greatest, f64::from(noisy)) as f32;
            if score >= best.threshold {
                best.offer(score, first_place + choice);
            }
        }
        Some(())
    }

    /// Goes through the choices of a beam, codes or tokens, with their logits.
    fn for_each_choice(&self, beams: &Beams, beam: usize, mut each: impl FnMut(u32, f32)) {
        match self.continuations {
            Continuations::Children => {
                self.for_each_child(beams, beam, |code, logit| each(code.into(), logit));
            }
            Continuations::Occurring => {
                self.for_each_code(beam, self.occurring().iter().map(|&code| code.into()), each);
            }
            Continuations::Level | Continuations::Tokens => {
                let num_codes = self.num_choices().min(self.columns.columns.len() as u32);
                self.for_each_code(beam, 0..num_codes, each);
            }
            Continuations::Vocabulary => {
                let logits = self.logits.row(self.slot, beam);
                (0..).zip(logits).for_each(|(token, &logit)| each(token, logit));
            }
            Continuations::Forced | Continuations::Phrases | Continuations::Sampled => {
                unreachable!("{ELSEWHERE}")
            }
        }
    }

    /// Goes through those of some codes that have a token.
    fn for_each_code(
        &self,
        beam: usize,
        codes: impl Iterator<Item = u32>,
        mut each: impl FnMut(u32, f32),
    ) {
        let logits = self.level_logits(beam);
        for code in codes {
            let Some(column) = self.columns.column(code as usize) else { continue };
            each(code, logits[column]);
        }
    }

    /// A logit below which no continuation of a beam reaches the threshold, rounding included.
    fn bar(&self, threshold: f32, score: f32, normalizer: f32) -> f32 {
        let bar = ((threshold - score) + normalizer) / self.inverse_temperature;
        let size = threshold.abs() + score.abs() + normalizer.abs();
        let bar = bar - 16.0 * f32::EPSILON * size / self.inverse_temperature;
        if bar.is_finite() { bar } else { f32::NEG_INFINITY }
    }

    /// Whether one of some codes may have a logit that reaches the bar.
    #[inline]
    fn may_pass(&self, logits: &[f32], codes: &[u16], bar: f32) -> bool {
        let (Ok(codes), true) = (<&[u16; LANES]>::try_from(codes), self.columns.is_straight) else {
            return true;
        };
        let mut passes = false;
        for &code in codes {
            passes |= logits.get(usize::from(code)).is_some_and(|&logit| logit >= bar);
        }
        passes
    }

    /// The sum over the codes that occur at the level.
    fn over_occurring(&self, beam: usize) -> LogSumExp {
        let logits = self.level_logits(beam);
        let column = |&code: &u16| self.columns.column(code.into());
        let columns = self.occurring().iter().filter_map(column);
        let occurring: Vec<f32> = columns.filter_map(|at| logits.get(at).copied()).collect();
        let mut sum = LogSumExp::default();
        sum.add(&occurring, self.inverse_temperature);
        sum
    }

    fn offer_choices(&self, beams: &Beams, beam: usize, best: &mut Best) -> Option<()> {
        let (normalizer, _) = self.normalizer(beams, beam)?;
        let first_place = self.first_place(beams, beam);
        self.for_each_choice(beams, beam, |choice, logit| {
            let score = beams.scores[beam] + self.gain(logit, normalizer);
            if score >= best.threshold {
                best.offer(score, first_place + choice);
            }
        });
        Some(())
    }

    /// Makes the chosen candidates the slot's beams.
    fn replace(&self, beams: &mut Beams, best: &[u64], tail_len: usize) {
        let mut by_rank = vec![0; beams.len()];
        for (beam, &rank) in beams.ranks.iter().enumerate() {
            by_rank[rank as usize] = beam;
        }
        let num_choices = self.num_choices();
        let chosen: Vec<(usize, u32)> = best
            .iter()
            .map(|&key| {
                let cursor = key as u32;
                (by_rank[(cursor / num_choices) as usize], cursor % num_choices)
            })
            .collect();
        let mut tokens = Vec::with_capacity(best.len() * (beams.num_steps + 1));
        for &(parent, choice) in &chosen {
            let written = parent * beams.num_steps..(parent + 1) * beams.num_steps;
            tokens.extend_from_slice(&beams.tokens[written]);
            tokens.push(self.token(choice));
        }
        // The parents' newest row of the tail, if they wrote one, is an ancestor's now.
        let wrote = tail_len > beams.num_ancestors;
        let mut ancestors = Vec::with_capacity(best.len() * tail_len);
        for &(parent, _) in &chosen {
            ancestors.extend_from_slice(beams.ancestors_of(parent));
            if wrote {
                ancestors.push(parent as u32);
            }
        }
        let steps = self.steps_taken(beams, best, &chosen);
        let cursors = chosen.iter().map(|&(parent, choice)| {
            let cursor = beams.cursors[parent];
            self.moved(cursor, choice)
        });
        beams.cursors = cursors.collect();
        beams.are_leaves = self.rule.reaches_leaves();
        beams.ranks = ranks(best);
        (beams.scores, beams.samples, beams.log_probs) = steps;
        beams.tokens = tokens;
        beams.num_steps += 1;
        beams.ancestors = ancestors;
        beams.num_ancestors = tail_len;
    }

    /// Scores, samples and log-probabilities of the chosen continuations.
    fn steps_taken(
        &self,
        beams: &Beams,
        best: &[u64],
        chosen: &[(usize, u32)],
    ) -> (Vec<f32>, Vec<Sample>, Vec<LogProb>) {
        let keys = || best.iter().map(|&key| score_of(key));
        let (seed, log_probs) = (self.seed, self.rule.log_probs);
        if seed.is_none() && !log_probs {
            return (keys().collect(), Vec::new(), Vec::new());
        }
        let mut over_legal: Vec<Option<f32>> = vec![None; beams.len()];
        let mut steps = (Vec::new(), Vec::new(), Vec::new());
        for (noisy, &(parent, choice)) in keys().zip(chosen) {
            let logit = self.logit_of(parent, choice);
            let over_children = match self.continuations {
                Continuations::Forced => 0.0,
                _ => {
                    let sum = || self.over_legal(beams, parent).expect("it chose one of them");
                    self.gain(logit, *over_legal[parent].get_or_insert_with(sum))
                }
            };
            if log_probs {
                let taken = parent * beams.num_steps..(parent + 1) * beams.num_steps;
                steps.2.extend_from_slice(&beams.log_probs[taken]);
                let sum = self.logits.vocabulary[self.first_row + parent].value();
                let vocabulary = self.gain(logit, sum);
                steps.2.push(LogProb { vocabulary, children: over_children });
            }
            if seed.is_none() {
                steps.0.push(noisy);
                continue;
            }
            let gain = match self.rule.normalizer() {
                Normalizer::Children | Normalizer::Certain => over_children,
                _ => self.gain(logit, self.normalizers[parent].value()),
            };
            steps.0.push(beams.scores[parent] + gain);
            let log_prob = beams.samples[parent].log_prob + over_children;
            steps.1.push(Sample { log_prob, noisy });
        }
        steps
    }

    /// The log of the summed exponentials of a beam's legal continuations; `None` without any.
    fn over_legal(&self, beams: &Beams, beam: usize) -> Option<f32> {
        Some(match self.continuations {
            Continuations::Children | Continuations::Forced => {
                return self.over_children(beams, beam);
            }
            Continuations::Vocabulary | Continuations::Phrases | Continuations::Sampled => {
                self.logits.vocabulary[self.first_row + beam].value()
            }
            Continuations::Occurring => self.over_occurring(beam).value(),
            Continuations::Level | Continuations::Tokens => {
                let logits = self.level_logits(beam);
                over_level(self.columns, logits, self.inverse_temperature).value()
            }
        })
    }

    /// The logit of a choice that was offered.
    fn logit_of(&self, beam: usize, choice: u32) -> f32 {
        match self.continuations {
            Continuations::Vocabulary => self.logits.row(self.slot, beam)[choice as usize],
            _ => {
                let column = self.columns.column(choice as usize);
                let logits = self.level_logits(beam);
                column.and_then(|column| logits.get(column)).copied().unwrap_or(f32::NAN)
            }
        }
    }

    fn token(&self, choice: u32) -> u32 {
        match self.continuations {
            Continuations::Forced | Continuations::Tokens => self.tokens[choice as usize],
            Continuations::Vocabulary | Continuations::Phrases | Continuations::Sampled => choice,
            Continuations::Children | Continuations::Occurring | Continuations::Level => {
                let column = self.columns.column(choice as usize);
                self.columns.span.start
                    + column.expect("only codes with a token are offered") as u32
            }
        }
    }

    fn moved(&self, cursor: Cursor, choice: u32) -> Cursor {
        if self.continuations != Continuations::Children {
            return cursor;
        }
        let child = self.rule.snapshot.child(cursor, choice as u16);
        child.expect("only children are offered")
    }
}

impl Beams {
    /// Whether all numbers are finite that a sample or its caller is told: a sample is not drawn by
    /// its scores, so these may be broken where the noise is sound.
    fn are_finite(&self) -> bool {
        let is_finite =
            |token: &LogProb| token.vocabulary.is_finite() && token.children.is_finite();
        self.scores.iter().all(|score| score.is_finite()) && self.log_probs.iter().all(is_finite)
    }
}
