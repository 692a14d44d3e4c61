//! The small network of DLRM-v3: linear, `x * sigmoid(norm(x))`, linear, and perhaps a norm.

use super::network::Activations;
use super::stu::{Projection, Weighted};
use super::vector_network::matrix_shape;
use super::weights::Weights;
use crate::backend::{Backend, Epilogue, GateActivation, GatedNormSpec, GatedOutput};
use crate::error::Result;

/// Of all norms here.
const EPSILON: f32 = 1e-5;

/// The network.
pub(super) struct Mlp<B: Backend> {
    up: Projection<B>,
    swish: Weighted<B>,
    inner: usize,
    down: Projection<B>,
    norm: Option<Weighted<B>>,
}

impl<B: Backend> Mlp<B> {
    /// `name.0` to `name.2`, and the norm `name.3` where `has_norm`, from `num_in` columns to `num_out`.
    ///
    /// # Errors
    /// Those of the weights.
    pub fn load(
        backend: &B,
        weights: &mut Weights,
        name: &str,
        [num_in, num_out]: [usize; 2],
        has_norm: bool,
    ) -> Result<Mlp<B>> {
        let [inner, _] = matrix_shape(weights, &format!("{name}.0.weight"))?;
        let norm = match has_norm {
            true => Some(weighted(backend, weights, &format!("{name}.3"), num_out)?),
            false => None,
        };
        Ok(Mlp {
            up: linear(backend, weights, &format!("{name}.0"), [inner, num_in])?,
            swish: weighted(backend, weights, &format!("{name}.1"), inner)?,
            inner,
            down: linear(backend, weights, &format!("{name}.2"), [num_out, inner])?,
            norm,
        })
    }

    /// Leaves the network's rows for those of `x` in `s.hidden`.
    pub fn apply(&self, backend: &B, x: &B::Buffer, s: &mut Activations<B>) {
        self.up.apply(backend, x, Epilogue::Store, &mut s.projected);
        let swish = GatedNormSpec {
            num_blocks: 1,
            block_columns: self.inner,
            is_by_block: false,
            affine: Some(self.swish.affine()),
            epsilon: EPSILON,
            activation: GateActivation::Sigmoid,
            output: GatedOutput::Gated,
        };
        backend.gated_norm(&s.projected, &s.projected, &swish, &mut s.spare);
        match &self.norm {
            None => self.down.apply(backend, &s.spare, Epilogue::Store, &mut s.hidden),
            Some(norm) => {
                self.down.apply(backend, &s.spare, Epilogue::Store, &mut s.projected);
                backend.layer_norm(&s.projected, Some(norm.affine()), EPSILON, &mut s.hidden);
            }
        }
    }
}

/// `name.weight` and `name.bias` of a norm, `[columns]` each.
///
/// # Errors
/// Those of the weights.
pub(super) fn weighted<B: Backend>(
    backend: &B,
    weights: &mut Weights,
    name: &str,
    columns: usize,
) -> Result<Weighted<B>> {
    Ok(Weighted {
        scale: backend.vector(&[weights.take(&format!("{name}.weight"), &[columns])?])?,
        shift: backend.vector(&[weights.take(&format!("{name}.bias"), &[columns])?])?,
    })
}

/// `name.weight`, `[num_out, num_in]`, and `name.bias`.
///
/// # Errors
/// Those of the weights.
pub(super) fn linear<B: Backend>(
    backend: &B,
    weights: &mut Weights,
    name: &str,
    [num_out, num_in]: [usize; 2],
) -> Result<Projection<B>> {
    Ok(Projection {
        weight: backend.matrix(&[weights.take(&format!("{name}.weight"), &[num_out, num_in])?])?,
        bias: Some(backend.vector(&[weights.take(&format!("{name}.bias"), &[num_out])?])?),
    })
}
