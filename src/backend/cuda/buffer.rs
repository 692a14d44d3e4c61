//! Activations and weights in the memory of a device.

use std::sync::Arc;

use half::bf16;

use super::device::Device;
use super::device_memory::DeviceMemory;
use super::driver::Driver;
use crate::error::Result;
use crate::tensor::{Dtype, Tensor};

/// Activations `[rows, columns]`, dense.
pub struct Buffer<D: Driver> {
    pub(super) memory: DeviceMemory<D>,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) dtype: Dtype,
    /// Rows that it takes memory for at once.
    least_rows: usize,
}

impl<D: Driver> Buffer<D> {
    /// Where it is on the device.
    pub fn address(&self) -> u64 {
        self.memory.at(0)
    }

    pub(super) fn new(device: &Arc<Device<D>>, dtype: Dtype, least_rows: usize) -> Buffer<D> {
        let memory = DeviceMemory::none(device, "activations");
        Buffer { memory, rows: 0, columns: 0, dtype, least_rows }
    }

    /// Takes a shape; the values are then arbitrary.
    pub(super) fn reshape(&mut self, rows: usize, columns: usize, dtype: Dtype) {
        self.memory.reserve(rows.max(self.least_rows) * columns * dtype.size());
        (self.rows, self.columns, self.dtype) = (rows, columns, dtype);
    }

    pub(super) fn write(&mut self, values: &[f32], columns: usize, dtype: Dtype) {
        assert!(values.len().is_multiple_of(columns), "rows must be whole");
        match dtype {
            Dtype::Bf16 => self.memory.write(&narrowed(values)),
            _ => self.memory.write(values),
        }
        (self.rows, self.columns, self.dtype) = (values.len() / columns, columns, dtype);
    }

    pub(super) fn read(&self) -> Result<Vec<f32>> {
        let count = self.rows * self.columns;
        match self.dtype {
            Dtype::Bf16 => {
                let mut values = vec![bf16::ZERO; count];
                self.memory.read(&mut values)?;
                Ok(values.into_iter().map(bf16::to_f32).collect())
            }
            _ => {
                let mut values = vec![0.0; count];
                self.memory.read(&mut values)?;
                Ok(values)
            }
        }
    }
}

fn narrowed(values: &[f32]) -> Vec<bf16> {
    values.iter().map(|&value| bf16::from_f32(value)).collect()
}

/// A copy of weights on the device.
fn copy<D: Driver>(
    device: &Arc<Device<D>>,
    values: &[f32],
    dtype: Dtype,
    name: &'static str,
) -> Result<DeviceMemory<D>> {
    match dtype {
        Dtype::Bf16 => DeviceMemory::of(device, &narrowed(values), name),
        _ => DeviceMemory::of(device, values, name),
    }
}

/// Weights `[rows, columns]` on the device.
pub struct Weights<D: Driver> {
    pub(super) memory: DeviceMemory<D>,
    pub(super) rows: usize,
    pub(super) columns: usize,
}

impl<D: Driver> Weights<D> {
    /// Stacks matrices of as many columns.
    pub(super) fn stack(
        device: &Arc<Device<D>>,
        parts: &[Tensor],
        dtype: Dtype,
    ) -> Result<Weights<D>> {
        let columns = parts[0].shape()[1];
        let values: Vec<f32> = parts.iter().flat_map(Tensor::to_vec).collect();
        let memory = copy(device, &values, dtype, "weights")?;
        Ok(Weights { memory, rows: values.len().checked_div(columns).unwrap_or(0), columns })
    }
}

/// A vector of weights: in f32, which kernels read, and in the type of activations, which products
/// take as a bias.
pub struct Vector<D: Driver> {
    pub(super) values: DeviceMemory<D>,
    pub(super) bias: DeviceMemory<D>,
    pub(super) len: usize,
}

impl<D: Driver> Vector<D> {
    pub(super) fn join(
        device: &Arc<Device<D>>,
        parts: &[Tensor],
        dtype: Dtype,
    ) -> Result<Vector<D>> {
        let values: Vec<f32> = parts.iter().flat_map(Tensor::to_vec).collect();
        Ok(Vector {
            bias: copy(device, &values, dtype, "bias")?,
            values: copy(device, &values, Dtype::F32, "vector")?,
            len: values.len(),
        })
    }
}
