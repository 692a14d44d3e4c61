//! Continuations as numbers that sort: by falling score, then by where they come from.

/// A score and an identity as one number; the best is the smallest.
pub(super) fn key(score: f32, identity: u32) -> u64 {
    // IEEE 754 bits sort like the floats once negative ones are inverted.
    let bits = (score + 0.0).to_bits();
    let rising = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(!rising) << 32 | u64::from(identity)
}

/// The score of a key.
pub(super) fn score_of(key: u64) -> f32 {
    let rising = !((key >> 32) as u32);
    f32::from_bits(if rising >> 31 == 1 { rising & !(1 << 31) } else { !rising })
}

/// By beam: how many of the others come before it in the order of their tokens.
pub(super) fn ranks(best: &[u64]) -> Vec<u32> {
    let mut order: Vec<u64> =
        best.iter().zip(0u64..).map(|(&key, beam)| key << 32 | beam).collect();
    order.sort_unstable();
    let mut ranks = vec![0; best.len()];
    for (rank, beam) in (0..).zip(order) {
        ranks[beam as u32 as usize] = rank;
    }
    ranks
}
