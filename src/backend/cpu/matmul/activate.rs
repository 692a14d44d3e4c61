//! Activation functions.

use rten_simd::ops::{BitOps, FloatOps, NumOps};
use rten_simd::{Isa, SimdUnaryOp};
use rten_vecmath::{Exp, Gelu, Silu};

use crate::backend::Activation;

/// Replaces every value by its activation.
pub fn activate(activation: Activation, values: &mut [f32]) {
    match activation {
        Activation::Relu => values.iter_mut().for_each(|value| *value = value.max(0.0)),
        Activation::Gelu => Gelu {}.map_mut(values),
        Activation::GeluTanh => GeluTanh.map_mut(values),
        Activation::Silu => Silu {}.map_mut(values),
    }
}

/// GELU by its tanh approximation, `x / 2 * (1 + tanh(y))` with `y = sqrt(2 / pi) (x + 0.044715 x^3)`,
/// written as `x * sigmoid(2 y)`: the sum would cancel for negative `x`.
struct GeluTanh;

impl SimdUnaryOp<f32> for GeluTanh {
    #[inline(always)]
    fn eval<I: Isa>(&self, isa: I, x: I::F32) -> I::F32 {
        let ops = isa.f32();
        let cube = ops.mul(ops.mul(x, x), x);
        let inner = ops.mul_add(cube, ops.splat(0.044_715), x);
        let minus_twice = ops.splat(-2.0 * (2.0 * std::f32::consts::FRAC_1_PI).sqrt());
        let exponential = Exp::apply(isa, ops.mul(inner, minus_twice));
        ops.div(x, ops.add(ops.one(), exponential))
    }
}
