//! Products with weights, and with keys and values: the greater part of all arithmetic.
//!
//! A matrix `[out, in]` is kept as panels of 32 output columns, so that a tile of rows and columns
//! is summed in registers while the panel streams by. Decoding reads every weight for few rows (10
//! to 128), and a model's weights do not stay in the fast caches from step to step: what bounds
//! such a product is the wait for the next panel. So each tile asks for its share of the next panel
//! ahead of time. Measured against `rten-gemm` with packed weights on 50 x 128 x 1024: as fast from
//! the cache, 1.3 times as fast from memory.
//!
//! Weights that a checkpoint stores in 16 bits stay so in memory. Products in f32 widen them in
//! registers, which is exact. Products in bf16 round the rows that they are given and sum in f32,
//! by the best instructions that the machine has: one file for each set of them. Products in 8 bits
//! round each row to multiples of its largest number over 127, as the weights of each output are, and
//! sum whole numbers, which is exact: they are the same on every machine.
//!
//! Every element is summed over `in` in an order that depends on the instructions alone, whatever
//! the other rows, the tile or the number of threads: that is why answers do not depend on their
//! company.

mod activate;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2_int8;
#[cfg(target_arch = "x86_64")]
mod avx512_bf16;
#[cfg(target_arch = "x86_64")]
mod avx512_vnni;
mod f32;
mod instructions;
mod int8;
mod matrix;
mod packed_rows;
mod panel;
#[cfg(test)]
mod tests;

use rayon::prelude::*;
use rten_simd::SimdOp;

use super::{Buffer, CpuBackend};
use crate::backend::{Epilogue, Matmul};
pub(super) use activate::activate;
pub(super) use f32::Product;
pub use instructions::Instructions;
pub(super) use int8::MAX_INPUTS;
pub use matrix::Matrix;
use matrix::Panels;
use packed_rows::{PackedProduct, PackedRows};
pub(super) use panel::PANEL;
use panel::{Element, ROWS_PER_BLOCK, Weight};

impl Matmul for CpuBackend {
    fn matmul(
        &self,
        x: &Buffer,
        weight: &Matrix,
        bias: Option<&Vec<f32>>,
        epilogue: Epilogue,
        out: &mut Buffer,
    ) {
        let (num_rows, num_in, num_out) = (x.num_rows(), weight.num_in, weight.num_out);
        assert_eq!(x.columns, num_in, "rows must be as wide as the weight's input");
        if epilogue == Epilogue::Add {
            assert_eq!((out.num_rows(), out.columns), (num_rows, num_out));
        } else {
            out.reshape(num_rows, num_out);
        }
        self.count_flops(num_rows, num_in, num_out);
        let product = Stretches { bias, epilogue, num_in, out };
        match (&weight.panels, self.numbers.of_bf16()) {
            (Panels::F32(panels), _) => product.in_f32(&x.values, panels),
            (Panels::F16(panels), _) => product.in_f32(&x.values, panels),
            (Panels::Bf16(panels), None) => product.in_f32(&x.values, panels),
            (Panels::Bf16(panels), Some(instructions)) => match instructions {
                #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
                Instructions::Amx => {
                    let x = PackedRows::rounded(x, amx::ROWS);
                    product.of_packed(&x, panels, amx::product);
                }
                #[cfg(target_arch = "x86_64")]
                Instructions::Avx512Bf16 => {
                    product.of_packed(&PackedRows::rounded(x, 1), panels, avx512_bf16::product);
                }
                _ => product.in_f32(&f32::rounded(x), panels),
            },
            (Panels::Int8(panels), _) => match self.numbers.of_int8() {
                #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
                Instructions::Amx => {
                    let x = PackedRows::quantized(x, amx::ROWS);
                    product.of_packed(&x, panels, amx::product);
                }
                #[cfg(target_arch = "x86_64")]
                Instructions::Avx512Vnni => {
                    product.of_packed(&PackedRows::quantized(x, 1), panels, avx512_vnni::product);
                }
                _ => product.of_packed(&PackedRows::quantized(x, 1), panels, int8::product),
            },
        }
    }
}

/// A product whose output columns are shared out among the threads.
struct Stretches<'a> {
    bias: Option<&'a Vec<f32>>,
    epilogue: Epilogue,
    num_in: usize,
    out: &'a mut Buffer,
}

impl Stretches<'_> {
    fn in_f32<W: Weight>(self, x: &[f32], panels: &[W]) {
        let num_in = self.num_in;
        self.run(panels, |panels, bias, adds, out| {
            for (x, out) in x.chunks(ROWS_PER_BLOCK * num_in).zip(out.chunks_mut(ROWS_PER_BLOCK)) {
                Product { x, stride: num_in, num_in, panels, bias, adds, out }.dispatch();
            }
        });
    }

    fn of_packed<E: Element>(
        self,
        x: &PackedRows,
        panels: &[E],
        product: impl Fn(PackedProduct<'_, '_, E>) + Sync,
    ) {
        self.run(panels, |panels, bias, adds, out| {
            product(PackedProduct { x, panels, bias, adds, out });
        });
    }

    /// Calls `product` with the panels of each stretch, its bias, whether it adds, and its part of
    /// every row of the output.
    fn run<W: Element>(
        self,
        panels: &[W],
        product: impl Fn(&[&[W]], Option<&[f32]>, bool, &mut [&mut [f32]]) + Sync,
    ) {
        let num_out = self.out.columns;
        let threads = rayon::current_num_threads();
        let panels_per_task = num_out.div_ceil(PANEL).div_ceil(threads);
        let panels: Vec<&[W]> = panels.chunks_exact(W::panel_len(self.num_in)).collect();
        let mut tasks = split_columns(&mut self.out.values, num_out, panels_per_task * PANEL);
        tasks.par_iter_mut().enumerate().for_each(|(task, out)| {
            let first = task * panels_per_task;
            let bias = self.bias.map(|bias| &bias[first * PANEL..]);
            product(&panels[first..], bias, self.epilogue == Epilogue::Add, out);
            if let Epilogue::Activate(activation) = self.epilogue {
                out.iter_mut().for_each(|row| activate(activation, row));
            }
        });
    }
}

/// The rows of `out` cut into stretches of columns: by stretch, then by row.
pub(super) fn split_columns(
    out: &mut [f32],
    columns: usize,
    stretch: usize,
) -> Vec<Vec<&mut [f32]>> {
    let mut tasks: Vec<Vec<&mut [f32]>> = Vec::new();
    tasks.resize_with(columns.div_ceil(stretch), || Vec::with_capacity(out.len() / columns));
    for row in out.chunks_exact_mut(columns) {
        for (task, part) in tasks.iter_mut().zip(row.chunks_mut(stretch)) {
            task.push(part);
        }
    }
    tasks
}
