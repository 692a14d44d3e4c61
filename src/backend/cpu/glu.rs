//! Gated columns.

use rayon::prelude::*;

use super::buffer::VALUES_PER_TASK;
use super::matmul::activate;
use super::{Buffer, CpuBackend};
use crate::backend::{Activation, Glu};

impl Glu for CpuBackend {
    fn glu(&self, x: &Buffer, activation: Activation, out: &mut Buffer) {
        let columns = x.columns / 2;
        out.reshape(x.num_rows(), columns);
        let rows_per_task = (VALUES_PER_TASK / columns).max(1);
        let inputs = x.values.par_chunks(rows_per_task * x.columns);
        out.values.par_chunks_mut(rows_per_task * columns).zip(inputs).for_each(|(out, x)| {
            for (out, x) in out.chunks_exact_mut(columns).zip(x.chunks_exact(2 * columns)) {
                let (gates, values) = x.split_at(columns);
                out.copy_from_slice(gates);
                activate(activation, out);
                out.iter_mut().zip(values).for_each(|(out, value)| *out *= value);
            }
        });
    }
}
