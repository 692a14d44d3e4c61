//! Products with weights, by the device's library or by `matmul.cu`.

use super::backend::CudaBackend;
use super::buffer::{Buffer, Vector, Weights};
use super::driver::{Driver, FusedActivation, Product};
use super::shared::shared_struct;
use crate::backend::{Activation, Epilogue, Matmul};
use crate::tensor::Dtype;

shared_struct! {
    /// A nonlinearity, in place.
    struct ActivateParams = "matmul_activate::Params" {
        x: u64 = "void*",
        count: u32,
        activation: u32,
    }
}

/// The number that kernels know a nonlinearity by.
pub(super) const fn activation_number(activation: Activation) -> u32 {
    match activation {
        Activation::Relu => 0,
        Activation::Gelu => 1,
        Activation::GeluTanh => 2,
        Activation::Silu => 3,
    }
}

shared_struct! {
    /// A product without cuBLASLt.
    struct ProductParams = "matmul::Params" {
        /// `[rows, stride]`
        out: u64 = "void*",
        /// `[rows, inner]`
        x: u64 = "const void*",
        /// `[columns, inner]`
        weight: u64 = "const void*",
        /// `[columns]`, or null.
        bias: u64 = "const void*",
        rows: u32,
        columns: u32,
        inner: u32,
        stride: u32,
        adds: u32,
        /// One more than its number; zero for none.
        activation: u32,
    }
}

/// Rows and columns of the result that a block of the kernel computes.
pub(super) const TILE: usize = 16;

impl<D: Driver> CudaBackend<D> {
    /// A product by the device's library, or by a kernel where that has nothing for its shape.
    pub(super) fn multiply(&self, product: &Product) {
        if product.rows == 0 || product.columns == 0 || self.device.multiply(product) {
            return;
        }
        let activation = product.activation.map_or(0, |activation| {
            1 + activation_number(match activation {
                FusedActivation::Relu => Activation::Relu,
                FusedActivation::GeluTanh => Activation::GeluTanh,
            })
        });
        let params = ProductParams {
            out: product.out.get(),
            x: product.x.get(),
            weight: product.weight.get(),
            bias: product.bias.map_or(0, |bias| bias.get()),
            rows: product.rows as u32,
            columns: product.columns as u32,
            inner: product.inner as u32,
            stride: product.stride as u32,
            adds: product.adds.into(),
            activation,
        };
        let kernel = match (product.dtype, product.out_dtype) {
            (Dtype::Bf16, Dtype::Bf16) => "matmul_bf16",
            (Dtype::Bf16, _) => "matmul_bf16_f32",
            _ => "matmul_f32",
        };
        let grid = [product.columns.div_ceil(TILE), product.rows.div_ceil(TILE), 1];
        self.device.launch(kernel, grid, (TILE * TILE) as u32, 0, &params);
    }
}

impl<D: Driver> Matmul for CudaBackend<D> {
    fn matmul(
        &self,
        x: &Buffer<D>,
        weight: &Weights<D>,
        bias: Option<&Vector<D>>,
        epilogue: Epilogue,
        out: &mut Buffer<D>,
    ) {
        assert_eq!(x.columns, weight.columns, "inner dimensions must agree");
        let adds = epilogue == Epilogue::Add;
        match adds {
            true => assert_eq!((out.rows, out.columns), (x.rows, weight.rows), "what is added to"),
            false => out.reshape(x.rows, weight.rows, self.dtype),
        }
        // cuBLASLt fuses where rows are whole packs, and does not say how exact its GELU is: for
        // bf16 it is exact enough.
        let pack = 16 / self.dtype.size();
        let is_packed = weight.rows.is_multiple_of(pack) && x.columns.is_multiple_of(pack);
        let (fused, own) = match epilogue {
            Epilogue::Activate(Activation::Relu) if is_packed => {
                (Some(FusedActivation::Relu), None)
            }
            Epilogue::Activate(Activation::GeluTanh) if is_packed && self.dtype == Dtype::Bf16 => {
                (Some(FusedActivation::GeluTanh), None)
            }
            Epilogue::Activate(other) => (None, Some(other)),
            Epilogue::Store | Epilogue::Add => (None, None),
        };
        self.multiply(&Product {
            x: x.memory.address(),
            weight: weight.memory.address(),
            bias: bias.map(|bias| bias.bias.address()),
            out: out.memory.address(),
            rows: x.rows,
            columns: weight.rows,
            inner: x.columns,
            stride: weight.rows,
            dtype: self.dtype,
            out_dtype: self.dtype,
            adds,
            activation: fused,
        });
        if let Some(activation) = own {
            let count = out.rows * out.columns;
            let params = ActivateParams {
                x: out.memory.at(0),
                count: u32::try_from(count).expect("a pass has fewer than 2^32 numbers"),
                activation: activation_number(activation),
            };
            let kernel = self.kernel("matmul_activate_f32", "matmul_activate_bf16");
            self.device.launch(kernel, [count.div_ceil(256 * pack), 1, 1], 256, 0, &params);
        }
    }
}
