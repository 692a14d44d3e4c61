//! The instructions that products in bf16 are made with.

use std::fmt;

use crate::error::{Error, Result};

/// Names the instructions to use instead of the best that the machine has: for tests.
const VARIABLE: &str = "SIDEREAL_CPU_PRODUCTS";

/// Instructions for products of rows and weights in bf16, summed in f32.
///
/// Answers are the same to the last bit on all machines with the same instructions, in any company
/// and on any number of threads; other instructions sum in another order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Instructions {
    /// Tiles of 16 x 16 sums (Intel AMX-BF16: Xeons from 2023 on).
    Amx,
    /// Dot products of pairs (AVX512-BF16: Xeons from 2023 on, Zen 4).
    Avx512Bf16,
    /// The multiply-adds that there are, of weights widened in registers.
    Widened,
}

impl Instructions {
    /// All, the fastest first.
    const ALL: [Instructions; 3] =
        [Instructions::Amx, Instructions::Avx512Bf16, Instructions::Widened];

    /// The best that this machine has, or those that the environment variable
    /// `SIDEREAL_CPU_PRODUCTS` names.
    ///
    /// # Errors
    /// [`Error::Device`] where it names none, or some that the machine does not have.
    pub fn choose() -> Result<Instructions> {
        match std::env::var(VARIABLE) {
            Ok(name) => Instructions::named(&name),
            Err(_) => Ok(Instructions::best()),
        }
    }

    /// The best that this machine has.
    pub fn best() -> Instructions {
        let mut sets = Instructions::ALL.into_iter();
        let best = sets.find(|set| set.is_available() && set.are_fast());
        best.unwrap_or(Instructions::Widened)
    }

    fn named(name: &str) -> Result<Instructions> {
        let refused = |reason: String| Error::Device { device: "cpu".into(), reason };
        let names = Instructions::ALL.map(|set| set.to_string()).join(", ");
        let Some(set) = Instructions::ALL.into_iter().find(|set| set.to_string() == name) else {
            return Err(refused(format!("{VARIABLE} is {name:?}; its values are {names}")));
        };
        match set.is_available() {
            true => Ok(set),
            false => Err(refused(format!(
                "{VARIABLE} asks for {set}, which this machine does not have; without the variable it \
                 uses {}",
                Instructions::best()
            ))),
        }
    }

    /// Whether this machine, and its system, have them.
    pub fn is_available(self) -> bool {
        match self {
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            Instructions::Amx => super::amx::is_available(),
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512Bf16 => super::avx512_bf16::is_available(),
            Instructions::Widened => true,
            #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
            _ => false,
        }
    }

    /// Whether products by them are faster than those in f32, on a machine that has them.
    pub fn are_fast(self) -> bool {
        match self {
            Instructions::Amx => true,
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512Bf16 => super::avx512_bf16::are_fast(),
            _ => false,
        }
    }
}

impl fmt::Display for Instructions {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Instructions::Amx => "amx",
            Instructions::Avx512Bf16 => "avx512-bf16",
            Instructions::Widened => "widened",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_known_by_their_names() {
        for set in Instructions::ALL {
            match Instructions::named(&set.to_string()) {
                Ok(found) => assert_eq!(found, set),
                Err(error) => assert!(!set.is_available(), "{error}"),
            }
        }
        let error = Instructions::named("abacus").expect_err("no such instructions");
        assert!(error.to_string().contains("avx512-bf16"), "{error}");
        assert!(Instructions::best().is_available());
    }
}
