use std::ops::Range;

use rayon::prelude::*;

use super::head::{Head, Logits, RunningLogSumExp};
use super::slot::Beams;
use super::{Buffer, CpuBackend, SearchRule, Slot};
use crate::backend::NO_TOKEN;
use crate::catalog::trie::Trie;
use crate::request::{Constraint, Normalization};

impl CpuBackend {
    pub(super) fn advance_beams(
        &self,
        hidden: &Buffer,
        head: &Head,
        step: usize,
        rules: &[SearchRule<'_>],
        slots: &mut [Slot],
    ) {
        assert_eq!(rules.len(), slots.len(), "a rule for each slot");
        let is_forced = head.steps[step].is_forced;
        let whole = !is_forced && rules.iter().any(|rule| rule.constraint == Constraint::None);
        let inverse_temperatures =
            rules.iter().any(SearchRule::needs_vocabulary).then(|| -> Vec<f32> {
                let of_slot = |(rule, slot): (&SearchRule<'_>, &Slot)| {
                    std::iter::repeat_n(1.0 / rule.temperature, slot.beams.len())
                };
                rules.iter().zip(&*slots).flat_map(of_slot).collect()
            });
        let logits = head.logits(self, hidden, step, whole, inverse_temperatures.as_deref());
        let mut first_row = 0;
        let searches: Vec<(Range<usize>, &SearchRule<'_>, &mut Slot)> = rules
            .iter()
            .zip(slots)
            .map(|(rule, slot)| {
                let rows = first_row..first_row + slot.beams.len();
                first_row = rows.end;
                (rows, rule, slot)
            })
            .collect();
        searches.into_par_iter().for_each(|(rows, rule, slot)| {
            let search = Search { head, step, rule, logits: &logits, rows };
            let tail_len = slot.tails.first().map_or(0, |tail| tail.positions.len());
            match search.best(&slot.beams) {
                Some(best) => search.replace(&mut slot.beams, &best, tail_len),
                None => slot.beams.fail(step),
            }
        });
    }
}

/// One step of one slot.
struct Search<'a> {
    head: &'a Head,
    step: usize,
    rule: &'a SearchRule<'a>,
    logits: &'a Logits,
    /// The slot's rows in `logits`.
    rows: Range<usize>,
}

/// A beam and a token that may follow it.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    /// Orders candidates, best first: by falling score, then by rising place.
    key: u64,
    score: f32,
    parent: u32,
    token: u32,
}

impl Candidate {
    fn new(score: f32, place: u32, parent: usize, token: u32) -> Candidate {
        // The bits of a float, less the sign's trouble, order as the float does.
        let bits = (score + 0.0).to_bits();
        let rising = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
        let key = u64::from(!rising) << 32 | u64::from(place);
        Candidate { key, score, parent: parent as u32, token }
    }

    fn place(&self) -> u32 {
        self.key as u32
    }
}

/// The best candidates seen so far.
struct Best {
    candidates: Vec<Candidate>,
    width: usize,
    /// Nothing that scores below can be among the best any more.
    threshold: f32,
}

impl Best {
    fn new(width: usize) -> Best {
        Best { candidates: Vec::new(), width, threshold: f32::NEG_INFINITY }
    }

    #[inline]
    fn offer(&mut self, candidate: Candidate) {
        self.candidates.push(candidate);
        if self.candidates.len() >= 4 * self.width + 256 {
            self.prune();
        }
    }

    fn prune(&mut self) {
        if self.candidates.len() > self.width {
            let (_, last, _) =
                self.candidates.select_nth_unstable_by_key(self.width - 1, |best| best.key);
            self.threshold = last.score;
            self.candidates.truncate(self.width);
        }
    }

    fn into_sorted(mut self) -> Vec<Candidate> {
        self.prune();
        self.candidates.sort_unstable_by_key(|candidate| candidate.key);
        self.candidates
    }
}

impl Search<'_> {
    /// The best continuations, best first, or `None` where a score is NaN or infinite.
    fn best(&self, beams: &Beams) -> Option<Vec<Candidate>> {
        let mut best = Best::new(self.rule.beams.max(1));
        let columns = &self.head.steps[self.step];
        for beam in 0..beams.len() {
            if columns.is_forced {
                self.offer_forced(beams, beam, &mut best)?;
                continue;
            }
            match self.rule.constraint {
                Constraint::Trie => self.offer_children(beams, beam, &mut best)?,
                Constraint::Level => self.offer_level(beams, beam, &mut best)?,
                Constraint::None => self.offer_tokens(beams, beam, &mut best)?,
            }
        }
        let best = best.into_sorted();
        best.iter().all(|candidate| candidate.score.is_finite()).then_some(best)
    }

    fn scaled(&self, logit: f32) -> f32 {
        logit * (1.0 / self.rule.temperature)
    }

    /// The normaliser of a beam over the vocabulary or the level; `None` where it is not finite.
    fn normalizer(&self, beam: usize) -> Option<f32> {
        let row = self.rows.start + beam;
        let value = match self.rule.normalization {
            Normalization::Vocabulary => self.logits.normalizers[row],
            // Without a constraint every token is a legal child.
            Normalization::Children if self.rule.constraint == Constraint::None => {
                self.logits.normalizers[row]
            }
            Normalization::Level | Normalization::Children => {
                let logits = self.logits.row(row);
                let columns = self.level_columns();
                self.log_sum_exp(columns.map(|(_, column)| logits[column]))
            }
        };
        value.is_finite().then_some(value)
    }

    fn log_sum_exp(&self, logits: impl Iterator<Item = f32>) -> f32 {
        let logits: Vec<f32> = logits.collect();
        let mut sum = RunningLogSumExp::default();
        sum.add(&logits, 1.0 / self.rule.temperature);
        sum.value()
    }

    /// The codes of the level that have a token, with their columns in the logits.
    fn level_columns(&self) -> impl Iterator<Item = (usize, usize)> {
        let step = &self.head.steps[self.step];
        let first = (step.span.start - self.logits.span.start) as usize;
        let columns = step.columns.iter().enumerate();
        columns
            .filter(|&(_, &column)| column != NO_TOKEN)
            .map(move |(code, &column)| (code, first + column as usize))
    }

    fn offer_forced(&self, beams: &Beams, beam: usize, best: &mut Best) -> Option<()> {
        let row = self.rows.start + beam;
        let token = self.head.steps[self.step].span.start;
        // Over a level or children the forced token is alone, and its probability one.
        let gain = match self.rule.normalization {
            Normalization::Vocabulary => {
                let column = (token - self.logits.span.start) as usize;
                self.scaled(self.logits.row(row)[column]) - self.normalizer(beam)?
            }
            Normalization::Level | Normalization::Children => 0.0,
        };
        best.offer(Candidate::new(beams.scores[beam] + gain, beams.places[beam], beam, token));
        Some(())
    }

    fn offer_children(&self, beams: &Beams, beam: usize, best: &mut Best) -> Option<()> {
        let rule = self.rule;
        let trie = rule.catalog.trie();
        let step = &self.head.steps[self.step];
        let first = (step.span.start - self.logits.span.start) as usize;
        let logits = &self.logits.row(self.rows.start + beam)[first..];
        let (children, codes) = trie.children(beams.places[beam]);
        let is_legal = |child: u32| {
            rule.legality.is_everything()
                || rule.legality.count(trie.leaves(child, self.step + 1)) > 0
        };
        let logit = |code: u16| logits[step.columns[usize::from(code)] as usize];
        let normalizer = match rule.normalization {
            Normalization::Children => {
                let mut legal =
                    children.clone().zip(codes).filter(|(child, _)| is_legal(*child)).peekable();
                if legal.peek().is_none() {
                    return Some(()); // the request allows nothing at all
                }
                let value = self.log_sum_exp(legal.map(|(_, &code)| logit(code)));
                value.is_finite().then_some(value)?
            }
            _ => self.normalizer(beam)?,
        };
        let score = beams.scores[beam];
        for (child, &code) in children.zip(codes) {
            let score = score + (self.scaled(logit(code)) - normalizer);
            if score >= best.threshold && is_legal(child) {
                let token = step.span.start + step.columns[usize::from(code)];
                best.offer(Candidate::new(score, child, beam, token));
            }
        }
        Some(())
    }

    fn offer_level(&self, beams: &Beams, beam: usize, best: &mut Best) -> Option<()> {
        let normalizer = self.normalizer(beam)?;
        let logits = self.logits.row(self.rows.start + beam);
        let step = &self.head.steps[self.step];
        let first_place = beams.places[beam] * step.columns.len() as u32;
        for (code, column) in self.level_columns() {
            let score = beams.scores[beam] + (self.scaled(logits[column]) - normalizer);
            if score >= best.threshold {
                let token = self.logits.span.start + column as u32;
                best.offer(Candidate::new(score, first_place + code as u32, beam, token));
            }
        }
        Some(())
    }

    fn offer_tokens(&self, beams: &Beams, beam: usize, best: &mut Best) -> Option<()> {
        let normalizer = self.normalizer(beam)?;
        let first_place = beams.places[beam] * self.head.vocab_size;
        for (token, &logit) in self.logits.row(self.rows.start + beam).iter().enumerate() {
            let score = beams.scores[beam] + (self.scaled(logit) - normalizer);
            if score >= best.threshold {
                let place = first_place + token as u32;
                best.offer(Candidate::new(score, place, beam, token as u32));
            }
        }
        Some(())
    }

    /// Makes the chosen candidates the slot's beams.
    fn replace(&self, beams: &mut Beams, best: &[Candidate], tail_len: usize) {
        let parents = || best.iter().map(|candidate| candidate.parent as usize);
        let mut tokens = Vec::with_capacity(best.len() * (beams.num_steps + 1));
        for candidate in best {
            let parent = candidate.parent as usize;
            tokens.extend_from_slice(
                &beams.tokens[parent * beams.num_steps..(parent + 1) * beams.num_steps],
            );
            tokens.push(candidate.token);
        }
        // The parents' newest row of the tail, if they wrote one, is an ancestor's now.
        let wrote = tail_len > beams.num_ancestors;
        let mut ancestors = Vec::with_capacity(best.len() * tail_len);
        for parent in parents() {
            ancestors.extend_from_slice(beams.ancestors_of(parent));
            if wrote {
                ancestors.push(parent as u32);
            }
        }
        let mut places: Vec<u32> = best.iter().map(Candidate::place).collect();
        if self.rule.constraint == Constraint::Trie {
            let trie = self.rule.catalog.trie();
            if self.step + 1 == trie.num_levels() {
                beams.first_leaf_node = Some(trie.nodes_at(trie.num_levels()).start);
            }
        } else {
            places = ranks(&places);
        }
        beams.scores = best.iter().map(|candidate| candidate.score).collect();
        beams.places = places;
        beams.tokens = tokens;
        beams.num_steps += 1;
        beams.ancestors = ancestors;
        beams.num_ancestors = tail_len;
    }
}

impl Beams {
    /// Ends the search: the beams are gone, and reading them tells why.
    fn fail(&mut self, step: usize) {
        self.failed_step = Some(step);
        self.scores.clear();
        self.places.clear();
        self.tokens.clear();
        self.ancestors.clear();
    }
}

/// The rank of each value among them all; the values are distinct.
fn ranks(values: &[u32]) -> Vec<u32> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_unstable_by_key(|&at| values[at]);
    let mut ranks = vec![0; values.len()];
    for (rank, at) in order.into_iter().enumerate() {
        ranks[at] = rank as u32;
    }
    ranks
}

const _: () = assert!(Trie::ROOT == 0, "places start at zero in every search");
