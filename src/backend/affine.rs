//! What normed columns are multiplied by, and what is added to them.

use super::DeviceOps;

/// The weights of a layer norm.
pub struct Affine<'a, B: DeviceOps> {
    /// `[columns]`, what a normed column is multiplied by.
    pub scale: &'a B::Vector,
    /// `[columns]`, what is added after it.
    pub shift: &'a B::Vector,
}

impl<B: DeviceOps> Clone for Affine<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: DeviceOps> Copy for Affine<'_, B> {}
