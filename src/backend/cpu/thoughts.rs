//! One step of a thought: a token is drawn behind the slot's one beam.

use super::Slot;
use super::lm_head::Logits;
use crate::backend::{SampleStep, SearchRule, StepChoice, sampling};

/// Extends the beam by a token; by the first stop token where a stop token was drawn, or where the
/// thought has no step left. The steps that are left are then skipped.
pub(super) fn advance(logits: &Logits, rule: &SearchRule<'_>, index: usize, slot: &mut Slot) {
    let StepChoice::Sample { num_left } = rule.choice else {
        unreachable!("a thought is sampled");
    };
    let SampleStep { sampling, stop, seen } = rule.thought.expect("a step of a thought has a rule");
    let (beams, tail_len) = (&mut slot.beams, slot.positions.len());
    assert_eq!(beams.len(), 1, "a thought is one beam");
    let end = stop[0];
    let token = match num_left {
        0 => Some(end),
        _ => {
            let all_seen = seen.iter().chain(&beams.tokens).copied();
            sampling::draw(logits.row(index, 0), sampling, all_seen, beams.num_steps)
        }
    };
    let Some(token) = token else {
        let step = beams.num_steps;
        return beams.fail(step);
    };
    if stop.contains(&token) {
        beams.tokens.push(end);
        beams.num_skipped += num_left;
    } else {
        beams.tokens.push(token);
    }
    // The newest row of the tail, if one was written, is an ancestor's now.
    if tail_len > beams.num_ancestors {
        beams.ancestors.push(0);
    }
    beams.num_ancestors = tail_len;
    beams.num_steps += 1;
}
