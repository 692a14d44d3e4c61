//! Attention whose weights are no distribution: the pointwise aggregated attention of HSTU (Zhai et
//! al. 2024, equation 2), with its mask, its bias, and the gate behind it.

use std::ops::Range;

use super::{Affine, DeviceOps, Heads};

/// Which positions of a prompt a position attends to, where the last ones may be **targets**: candidates
/// that see what stands before all targets, and none of each other but in groups.
///
/// The first `num_contextual` positions, which describe the user, see all that is no target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TargetMask {
    /// Positions at the beginning that see everything before the targets.
    pub num_contextual: usize,
    /// The farthest position back that is seen, where there is a limit. The contextual positions count
    /// as one, and the targets as one, right behind the others.
    pub max_distance: Option<usize>,
    /// The newest so many positions before the targets, and the targets, are free of that limit; with
    /// 0 none are.
    pub num_unlimited: usize,
    /// Targets that make a group, in which each sees the earlier ones; 1: none sees another.
    pub group_size: usize,
}

/// The positions that one position attends to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Before the targets; the position itself is among them unless it is a target.
    pub before: Range<usize>,
    /// Of the targets, the position itself the last; empty for a position that is none.
    pub targets: Range<usize>,
}

impl TargetMask {
    /// Each position sees itself and the earlier ones; targets see themselves and no other target.
    pub const CAUSAL: TargetMask =
        TargetMask { num_contextual: 0, max_distance: None, num_unlimited: 0, group_size: 1 };

    /// The positions that `position` attends to, in a prompt whose targets begin at `first_target`.
    ///
    /// # Panics
    /// Where groups are empty.
    pub fn seen(&self, position: usize, first_target: usize) -> Seen {
        let contextual = self.num_contextual.min(first_target);
        if position < contextual {
            return Seen { before: 0..first_target, targets: 0..0 };
        }
        // Places are counted as the limit counts them: the contextual positions share place 0.
        let shared = contextual.saturating_sub(1);
        let end = first_target - shared;
        let place = (position - shared).min(end);
        let is_unlimited = self.num_unlimited > 0 && place + self.num_unlimited >= end;
        let start = match self.max_distance {
            Some(most) if !is_unlimited && place > most => place - most + shared,
            _ => 0,
        };
        match position < first_target {
            true => Seen { before: start..position + 1, targets: 0..0 },
            false => {
                let among = position - first_target;
                let group = first_target + among / self.group_size * self.group_size;
                Seen { before: start.min(first_target)..first_target, targets: group..position + 1 }
            }
        }
    }
}

/// A bias by how far apart two positions are, and by the time between them.
///
/// It is `positions[longest - 1 + key - query] + times[bucket]`, one for all heads. The bucket is that
/// of the seconds between the key's time and the time of what *follows* the query.
pub struct PositionTimeBias<'a, B: DeviceOps> {
    /// `[2 * longest - 1]` over key minus query position; `longest` is at least the longest prompt.
    pub positions: &'a B::Vector,
    /// `[thresholds + 1]`, by bucket.
    pub times: &'a B::Vector,
    /// Rising; a time that has reached so many of them is in the bucket of that number.
    pub thresholds: &'a [u64],
    /// By prompt: the times of its positions in seconds, and of what follows the last.
    pub seconds: &'a [Vec<i64>],
}

impl<B: DeviceOps> Clone for PositionTimeBias<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: DeviceOps> Copy for PositionTimeBias<'_, B> {}

/// A pointwise attention of prompts.
pub struct PointwiseAttention<'a, B: DeviceOps> {
    /// How the columns of queries, keys and values are shared out.
    pub heads: Heads,
    /// Multiplies the product of a query and a key.
    pub scale: f32,
    /// What a position attends to.
    pub mask: TargetMask,
    /// By prompt: the position of its first target; that of its end, where it has none.
    pub first_targets: &'a [usize],
    /// By prompt: what the weights are divided by.
    pub divisors: &'a [f32],
    /// Added to the scaled product.
    pub bias: Option<PositionTimeBias<'a, B>>,
}

/// What happens to normed columns before they are multiplied by the gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GateActivation {
    /// Nothing.
    Identity,
    /// `1 / (1 + exp(-x))`
    Sigmoid,
}

/// What a gated norm leaves beside the gated columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GatedOutput {
    /// The gated columns alone.
    Gated,
    /// The gate, the normed columns, the gated ones.
    WithNormed,
    /// The gate, the columns as they came, the gated ones.
    WithInput,
}

impl GatedOutput {
    /// How many times as wide as the gate the output is.
    pub fn num_parts(self) -> usize {
        match self {
            GatedOutput::Gated => 1,
            GatedOutput::WithNormed | GatedOutput::WithInput => 3,
        }
    }
}

/// A layer norm whose result is multiplied by a gate.
pub struct GatedNormSpec<'a, B: DeviceOps> {
    /// The columns of `x` are so many blocks of equal width, as heads are.
    pub num_blocks: usize,
    /// The columns of a block that count: those of a head may be padded.
    pub block_columns: usize,
    /// Whether each block has a norm of its own, else all columns have one.
    pub is_by_block: bool,
    /// By column that counts, or by block where norms are by block.
    pub affine: Option<Affine<'a, B>>,
    /// Added to the variance.
    pub epsilon: f32,
    /// Applied to the normed columns.
    pub activation: GateActivation,
    /// What is left.
    pub output: GatedOutput,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The mask as a table, from the formula of Meta's `_get_valid_attn_mask` and, for groups, of
    /// NVIDIA's recsys-examples.
    fn table(mask: &TargetMask, len: usize, first_target: usize) -> Vec<Vec<bool>> {
        let contextual = mask.num_contextual as i64;
        let (mut ids, mut end): (Vec<i64>, i64) = ((0..len as i64).collect(), first_target as i64);
        if contextual > 0 {
            ids = ids.iter().map(|id| (id - contextual + 1).max(0)).collect();
            end -= contextual - 1;
        }
        let ids: Vec<i64> = ids.into_iter().map(|id| id.min(end)).collect();
        let row = |row: usize| {
            let seen = |column: usize| {
                let distance = ids[row] - ids[column];
                let mut is_seen = row == column || distance > 0;
                if let Some(most) = mask.max_distance {
                    let is_unlimited =
                        mask.num_unlimited > 0 && ids[row] >= end - mask.num_unlimited as i64;
                    is_seen &= distance <= most as i64 || is_unlimited;
                }
                if contextual > 0 {
                    is_seen |= ids[row] == 0 && ids[column] < end;
                }
                if row >= first_target && column >= first_target {
                    let group = |at: usize| (at - first_target) / mask.group_size;
                    is_seen = column <= row && group(row) == group(column);
                }
                is_seen
            };
            (0..len).map(seen).collect()
        };
        (0..len).map(row).collect()
    }

    #[test]
    fn a_target_mask_is_the_published_table() {
        let mut rng = fastrand::Rng::with_seed(5);
        for case in 0..2000 {
            let len = rng.usize(1..24);
            let first_target = rng.usize(0..=len);
            let mask = TargetMask {
                num_contextual: rng.usize(0..=first_target.min(4)),
                max_distance: rng.bool().then(|| rng.usize(1..12)),
                num_unlimited: rng.usize(0..5),
                group_size: rng.usize(1..4),
            };
            let expected = table(&mask, len, first_target);
            for (position, expected) in expected.iter().enumerate() {
                let Seen { before, targets } = mask.seen(position, first_target);
                let found: Vec<bool> =
                    (0..len).map(|key| before.contains(&key) || targets.contains(&key)).collect();
                assert_eq!(&found, expected, "case {case}: {mask:?}, {position} of {len}");
            }
        }
    }
}
