//! The noise of samples: the same for the same seed and tokens on every device.
//!
//! Gumbel top-k draws without replacement (Kool et al. 2019). `kernels/common/search.cuh` has the
//! same functions.

/// 2^64 over the golden ratio: spreads small numbers over all bits.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Every bit of the result depends on every bit of `x` (the finaliser of SplitMix64, Steele et al.
/// 2014).
fn mixed(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A prefix with one more token; the empty prefix is the seed.
pub fn extended(prefix: u64, token: u32) -> u64 {
    mixed(prefix.wrapping_add((u64::from(token) + 1).wrapping_mul(GOLDEN)))
}

/// Gumbel noise of a choice behind a prefix.
pub fn gumbel(prefix: u64, choice: u32) -> f64 {
    let bits = mixed(extended(prefix, choice) ^ 0xd1b5_4a32_d192_ed03);
    // In the middle of one of 2^52 steps between zero and one, and never at either.
    let uniform = ((bits >> 12) as f64 + 0.5) / (1u64 << 52) as f64;
    -(-uniform.ln()).ln()
}

/// Noise that is at most `ceiling`, from noise whose greatest is `greatest`:
/// `-ln(exp(-ceiling) - exp(-greatest) + exp(-noise))`, written so that nothing overflows
/// (Kool et al. 2019, appendix B.3).
pub fn under_ceiling(noise: f64, greatest: f64, ceiling: f64) -> f64 {
    let v = ceiling - noise + (-(noise - greatest).exp()).ln_1p();
    ceiling - v.max(0.0) - (-v.abs()).exp().ln_1p()
}
