//! A gated recurrent unit, all prompts a position at a time.

use std::ops::Range;

use super::{Buffer, CpuBackend, Matrix};
use crate::backend::{Batch, DeviceOps, Epilogue, Gru, Matmul};

impl Gru for CpuBackend {
    fn gru(
        &self,
        inputs: &Buffer,
        weight: &Matrix,
        bias: Option<&Vec<f32>>,
        batch: &Batch<'_, CpuBackend>,
        out: &mut Buffer,
    ) {
        let width = inputs.columns / 3;
        assert_eq!(inputs.columns, 3 * width, "inputs of three gates");
        out.reshape(inputs.num_rows(), width);
        let mut first_row = 0;
        let mut prompts: Vec<Range<usize>> = Vec::new();
        for (chunk, slot) in batch.prompts() {
            let is_whole = *chunk == (0..self.context_len(slot));
            assert!(is_whole, "a recurrent network reads a prompt as a whole");
            prompts.push(first_row..first_row + chunk.len());
            first_row += chunk.len();
        }
        // The longest prompts come first, so that those which go on are the first of the states.
        prompts.sort_by_key(|rows| std::cmp::Reverse(rows.len()));
        let mut states = vec![0.0; prompts.len() * width];
        let (mut factors, mut products) = (Buffer::default(), Buffer::default());
        for position in 0..prompts.first().map_or(0, Range::len) {
            let num_left = prompts.partition_point(|rows| rows.len() > position);
            let states = &mut states[..num_left * width];
            factors.reshape(num_left, width);
            factors.values.copy_from_slice(states);
            self.matmul(&factors, weight, bias, Epilogue::Store, &mut products);
            let states = states.chunks_exact_mut(width);
            let products = products.values.chunks_exact(3 * width);
            for ((rows, state), products) in prompts.iter().zip(states).zip(products) {
                let row = rows.start + position;
                advance(state, inputs.row(row), products);
                out.values[row * width..(row + 1) * width].copy_from_slice(state);
            }
        }
    }
}

/// The next state, from a row of inputs and the products with the state.
fn advance(state: &mut [f32], inputs: &[f32], products: &[f32]) {
    let sigmoid = |x: f32| 1.0 / (1.0 + (-x).exp());
    let width = state.len();
    for (i, state) in state.iter_mut().enumerate() {
        let reset = sigmoid(inputs[i] + products[i]);
        let update = sigmoid(inputs[width + i] + products[width + i]);
        let new = (inputs[2 * width + i] + reset * products[2 * width + i]).tanh();
        *state = (1.0 - update) * new + update * *state;
    }
}
