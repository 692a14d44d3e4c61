//! The instructions that products in bf16 and in 8 bits are made with.

use std::fmt;

use crate::error::{Error, Result};
use crate::tensor::Dtype;

/// Names the instructions to use instead of the best that the machine has: for tests.
const VARIABLE: &str = "SIDEREAL_CPU_PRODUCTS";

/// Instructions for products of rows and weights in bf16, summed in f32, or in 8 bits, summed in whole
/// numbers.
///
/// Answers are the same to the last bit on all machines with the same instructions, in any company
/// and on any number of threads; other instructions sum products in bf16 in another order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Instructions {
    /// Tiles of 16 x 16 sums (Intel AMX-BF16 and AMX-INT8: Xeons from 2023 on).
    Amx,
    /// Dot products of pairs (AVX512-BF16: Xeons from 2023 on, Zen 4).
    Avx512Bf16,
    /// Dot products of four whole numbers (AVX512-VNNI: Xeons from 2019 on, Zen 4).
    Avx512Vnni,
    /// The multiply-adds that there are, of weights widened in registers.
    Widened,
}

impl Instructions {
    /// Those for products of a type, the fastest first.
    fn of(dtype: Dtype) -> [Instructions; 3] {
        let dots = match dtype {
            Dtype::Int8 => Instructions::Avx512Vnni,
            _ => Instructions::Avx512Bf16,
        };
        [Instructions::Amx, dots, Instructions::Widened]
    }

    /// The best that this machine has for products of a type, or those that the environment variable
    /// `SIDEREAL_CPU_PRODUCTS` names.
    ///
    /// # Errors
    /// [`Error::Device`] where it names none, or some that the machine does not have.
    pub fn choose(dtype: Dtype) -> Result<Instructions> {
        match std::env::var(VARIABLE) {
            Ok(name) => Instructions::named(dtype, &name),
            Err(_) => Ok(Instructions::best(dtype)),
        }
    }

    /// The best that this machine has for products of a type.
    pub fn best(dtype: Dtype) -> Instructions {
        let mut sets = Instructions::of(dtype).into_iter();
        let best = sets.find(|set| set.is_available() && set.are_fast());
        best.unwrap_or(Instructions::Widened)
    }

    fn named(dtype: Dtype, name: &str) -> Result<Instructions> {
        let refused = |reason: String| Error::Device { device: "cpu".into(), reason };
        let all = Instructions::of(dtype);
        let names = all.map(|set| set.to_string()).join(", ");
        let Some(set) = all.into_iter().find(|set| set.to_string() == name) else {
            let dtype = dtype.name();
            return Err(refused(format!(
                "{VARIABLE} is {name:?}; its values for {dtype} are {names}"
            )));
        };
        match set.is_available() {
            true => Ok(set),
            false => Err(refused(format!(
                "{VARIABLE} asks for {set}, which this machine does not have; without the variable it \
                 uses {}",
                Instructions::best(dtype)
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
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512Vnni => super::avx512_vnni::is_available(),
            Instructions::Widened => true,
            #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
            _ => false,
        }
    }

    /// Whether products by them are faster than those in f32, on a machine that has them.
    pub fn are_fast(self) -> bool {
        match self {
            Instructions::Amx | Instructions::Avx512Vnni => true,
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
            Instructions::Avx512Vnni => "avx512-vnni",
            Instructions::Widened => "widened",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_are_known_by_their_names() {
        for dtype in [Dtype::Bf16, Dtype::Int8] {
            for set in Instructions::of(dtype) {
                match Instructions::named(dtype, &set.to_string()) {
                    Ok(found) => assert_eq!(found, set),
                    Err(error) => assert!(!set.is_available(), "{error}"),
                }
            }
            assert!(Instructions::best(dtype).is_available());
        }
        let error = Instructions::named(Dtype::Bf16, "abacus").expect_err("no such instructions");
        assert!(error.to_string().contains("avx512-bf16"), "{error}");
        assert!(Instructions::named(Dtype::Bf16, "avx512-vnni").is_err());
    }
}
