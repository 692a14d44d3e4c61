//! One step of a thought: a token is drawn behind the slot's one beam.

use super::Slot;
use super::lm_head::Logits;
use crate::backend::{SampleStep, SearchRule, StepChoice, sampling};

/// Extends the beam by a token; by the first stop token where a stop token was drawn, or where the
/// thought has no step left. The steps that are left are skipped where the thought is over.
pub(super) fn advance(logits: &Logits, rule: &SearchRule<'_>, index: usize, slot: &mut Slot) {
    let StepChoice::Sample { num_left } = rule.choice else {
        unreachable!("a thought is sampled");
    };
    let SampleStep { sampling, stop, stop_rule, seen } =
        rule.thought.expect("a step of a thought has a rule");
    let (beams, tail_len) = (&mut slot.beams, slot.positions.len());
    assert_eq!(beams.len(), 1, "a thought is one beam");
    let token = match (num_left, stop.first()) {
        (0, Some(&end)) => Some(end),
        _ => {
            let all_seen = seen.iter().chain(&beams.tokens).copied();
            sampling::draw(logits.row(index, 0), sampling, all_seen, beams.num_steps)
        }
    };
    let Some(token) = token else {
        let step = beams.num_steps;
        return beams.fail(step);
    };
    let is_stop = stop.contains(&token);
    beams.tokens.push(if is_stop { stop[0] } else { token });
    if is_stop || stop_rule.is_some_and(|rule| rule.is_over(&beams.tokens)) {
        beams.num_skipped += num_left;
    }
    // The newest row of the tail, if one was written, is an ancestor's now.
    if tail_len > beams.num_ancestors {
        beams.ancestors.push(0);
    }
    beams.num_ancestors = tail_len;
    beams.num_steps += 1;
}
