use rayon::prelude::*;
use rten_gemm::{BiasVector, GemmInputB, GemmOptions};
use rten_simd::ops::{BitOps, FloatOps, NumOps};
use rten_simd::{Isa, SimdUnaryOp};
use rten_tensor::NdTensorView;
use rten_vecmath::{Exp, Gelu, Silu};

use super::{Activation, Buffer, CpuBackend, Epilogue, Matrix};
use crate::tensor::Tensor;

/// Values that one task of an elementwise operation works on.
pub(super) const VALUES_PER_TASK: usize = 1 << 14;

/// Stacks `[out_i, in]` matrices and packs them.
pub(super) fn stack(backend: &CpuBackend, parts: &[Tensor]) -> Matrix {
    let num_in = parts[0].shape()[1];
    assert!(parts.iter().all(|part| part.shape()[1] == num_in), "parts must agree");
    let values: Vec<f32> = match parts {
        [whole] => whole.to_vec(),
        _ => parts.iter().flat_map(Tensor::to_vec).collect(),
    };
    Matrix::new(backend, &values, num_in)
}

impl Matrix {
    /// A dense `[out, in]` matrix.
    pub(super) fn new(backend: &CpuBackend, values: &[f32], num_in: usize) -> Matrix {
        let num_out = values.len() / num_in;
        let weight = NdTensorView::from_data([num_out, num_in], values);
        Matrix { packed: backend.pack(weight.transposed()), num_in, num_out }
    }
}

impl CpuBackend {
    pub(super) fn matmul(
        &self,
        x: &Buffer,
        weight: &Matrix,
        bias: Option<&[f32]>,
        epilogue: Epilogue,
        out: &mut Buffer,
    ) {
        assert_eq!(x.columns, weight.num_in, "rows must be as wide as the weight's input");
        let adds = epilogue == Epilogue::Add;
        if adds {
            assert_eq!((out.num_rows(), out.columns), (x.num_rows(), weight.num_out));
        } else {
            out.reshape(x.num_rows(), weight.num_out);
        }
        let options = GemmOptions {
            beta: if adds { 1.0 } else { 0.0 },
            bias: bias.map(BiasVector::Row),
            ..GemmOptions::default()
        };
        let rows = x.view(0..x.num_rows(), 0..x.columns);
        self.product(rows, GemmInputB::Packed(&weight.packed), options, &mut out.values);
        if let Epilogue::Activate(activation) = epilogue {
            let chunks = out.values.par_chunks_mut(VALUES_PER_TASK);
            chunks.for_each(|values| activate(activation, values));
        }
    }
}

pub(super) fn activate(activation: Activation, values: &mut [f32]) {
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
