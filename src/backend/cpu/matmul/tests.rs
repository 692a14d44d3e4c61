//! Products by every set of instructions, beside plain loops that sum in the same order.

use half::{bf16, f16};

use super::*;
use crate::backend::prelude::*;
use crate::backend::testing::Cases;
use crate::tensor::{Dtype, Tensor};

const SHAPES: [[usize; 3]; 9] = [
    [1, 1, 1],
    [1, 32, 32],
    [3, 31, 33],
    [16, 64, 7],
    [17, 65, 64],
    [33, 100, 96],
    [50, 128, 70],
    [250, 48, 40],
    [500, 33, 5],
];

fn bf16_of(value: f32) -> f32 {
    bf16::from_f32(value).to_f32()
}

/// Operands of a shape `[rows, in, out]`: rows and weights.
fn operands(shape: [usize; 3], seed: u64) -> (Vec<f32>, Vec<f32>) {
    let mut cases = Cases::new(seed);
    (cases.numbers(shape[0] * shape[1]), cases.numbers(shape[1] * shape[2]))
}

fn product(
    backend: &CpuBackend,
    [_, num_in, num_out]: [usize; 3],
    x: &[f32],
    weight: &Matrix,
    epilogue: Epilogue,
) -> Vec<f32> {
    let rows = x.len() / num_in;
    let bias: Vec<f32> = (0..num_out).map(|column| column as f32 / 8.0).collect();
    let mut out = Buffer::new(vec![0.5; rows * num_out], num_out);
    backend.matmul(&Buffer::new(x.to_vec(), num_in), weight, Some(&bias), epilogue, &mut out);
    out.values().to_vec()
}

/// The same, each element summed by `sum` of a row's and a column's numbers.
fn expected(
    [_, num_in, _]: [usize; 3],
    x: &[f32],
    weight: &[f32],
    adds: bool,
    sum: impl Fn(&[f32], &[f32]) -> f32,
) -> Vec<f32> {
    let element = |x: &[f32], (column, weight): (usize, &[f32])| {
        let sum = sum(x, weight) + column as f32 / 8.0;
        if adds { 0.5 + sum } else { sum }
    };
    let row = |x| weight.chunks(num_in).enumerate().map(move |column| element(x, column));
    x.chunks(num_in).flat_map(row).collect()
}

/// One chain of fused multiply-adds, first to last.
fn in_one_chain(x: &[f32], weight: &[f32]) -> f32 {
    x.iter().zip(weight).fold(0.0, |sum, (x, weight)| x.mul_add(*weight, sum))
}

/// As TDPBF16PS sums: 32 inputs in two chains, which are added and then added to the sum.
fn by_tiles(x: &[f32], weight: &[f32]) -> f32 {
    x.chunks(32).zip(weight.chunks(32)).fold(0.0, |sum, (x, weight)| {
        let chain = |odd: usize| {
            let inputs = x.iter().zip(weight).skip(odd).step_by(2);
            inputs.fold(0.0, |sum, (x, weight)| bf16_of(*x).mul_add(bf16_of(*weight), sum))
        };
        sum + (chain(0) + chain(1))
    })
}

/// As VDPBF16PS sums: pair after pair, the second first.
fn by_pairs(x: &[f32], weight: &[f32]) -> f32 {
    x.chunks(2).zip(weight.chunks(2)).fold(0.0, |sum, (x, weight)| {
        let pair = x.iter().zip(weight).rev();
        pair.fold(sum, |sum, (x, weight)| bf16_of(*x).mul_add(bf16_of(*weight), sum))
    })
}

/// The plain sum that instructions stand for.
fn reference(instructions: Instructions) -> fn(&[f32], &[f32]) -> f32 {
    match instructions {
        Instructions::Amx => by_tiles,
        Instructions::Avx512Bf16 => by_pairs,
        Instructions::Avx512Vnni => unreachable!("bf16 has other ones"),
        Instructions::Widened => |x, weight| {
            let round = |values: &[f32]| values.iter().copied().map(bf16_of).collect::<Vec<_>>();
            in_one_chain(&round(x), &round(weight))
        },
    }
}

fn check_bf16(instructions: Instructions) {
    assert!(instructions.is_available(), "this machine has no {instructions}");
    let backend = CpuBackend::with_instructions(Dtype::Bf16, instructions);
    for (seed, shape) in SHAPES.into_iter().enumerate() {
        let (x, weight) = operands(shape, seed as u64);
        let matrix = Tensor::new(&[shape[2], shape[1]], weight.clone());
        let matrix = backend.matrix(&[matrix]).expect("memory");
        for (epilogue, adds) in [(Epilogue::Store, false), (Epilogue::Add, true)] {
            let found = product(&backend, shape, &x, &matrix, epilogue);
            let expected = expected(shape, &x, &weight, adds, reference(instructions));
            assert_eq!(found, expected, "{instructions}, {shape:?}, {epilogue:?}");
        }
    }
}

#[test]
fn widened_products_in_bf16_sum_in_order() {
    check_bf16(Instructions::Widened);
}

#[test]
#[cfg_attr(not(has_amx), ignore = "needs a processor with AMX-BF16")]
fn tiles_sum_as_their_manual_says() {
    check_bf16(Instructions::Amx);
}

#[test]
#[cfg_attr(not(has_avx512_bf16), ignore = "needs a processor with AVX512-BF16")]
fn pairs_sum_as_their_manual_says() {
    check_bf16(Instructions::Avx512Bf16);
}

/// A row's numbers as multiples of its largest over 127, and that.
fn quantized(row: &[f32]) -> (Vec<i32>, f32) {
    let scale = row.iter().fold(0f32, |most, value| most.max(value.abs())) / 127.0;
    let inverse = if scale < f32::MIN_POSITIVE { 0.0 } else { 1.0 / scale };
    (row.iter().map(|value| (value * inverse).round_ties_even() as i32).collect(), scale)
}

/// Whole numbers, exact; then the scales.
fn in_8_bits(x: &[f32], weight: &[f32]) -> f32 {
    let ((x, x_scale), (weight, weight_scale)) = (quantized(x), quantized(weight));
    let sum: i64 = x.iter().zip(weight).map(|(x, weight)| i64::from(x * weight)).sum();
    sum as f32 * (x_scale * weight_scale)
}

fn check_int8(instructions: Instructions) {
    assert!(instructions.is_available(), "this machine has no {instructions}");
    let backend = CpuBackend::with_instructions(Dtype::Int8, instructions);
    for (seed, shape) in SHAPES.into_iter().enumerate() {
        let (mut x, mut weight) = operands(shape, seed as u64);
        // Rows of zeros, and of large and of tiny numbers.
        x[..shape[1]].fill(0.0);
        weight[..shape[1]].iter_mut().for_each(|value| *value *= 1e-30);
        x.iter_mut().rev().take(shape[1]).for_each(|value| *value *= 1e20);
        if shape[0] > 3 {
            x[shape[1]..2 * shape[1]].iter_mut().for_each(|value| *value *= 1e-37); // no inverse
        }
        let matrix = Tensor::new(&[shape[2], shape[1]], weight.clone());
        let matrix = backend.matrix(&[matrix]).expect("memory");
        for (epilogue, adds) in [(Epilogue::Store, false), (Epilogue::Add, true)] {
            let found = product(&backend, shape, &x, &matrix, epilogue);
            let expected = expected(shape, &x, &weight, adds, in_8_bits);
            assert_eq!(found, expected, "{instructions}, {shape:?}, {epilogue:?}");
        }
        let mut row = vec![0.0; shape[1]];
        matrix.read_row(shape[2] - 1, &mut row);
        let (numbers, scale) = quantized(&weight[(shape[2] - 1) * shape[1]..]);
        let numbers: Vec<f32> = numbers.into_iter().map(|number| number as f32 * scale).collect();
        assert_eq!(row, numbers);
    }
    // What is not finite is not made finite.
    for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let shape = [2, 70, 40];
        let (mut x, weight) = operands(shape, 1);
        x[65] = wrong;
        let matrix = Tensor::new(&[shape[2], shape[1]], weight);
        let matrix = backend.matrix(&[matrix]).expect("memory");
        let found = product(&backend, shape, &x, &matrix, Epilogue::Store);
        let (first, second) = found.split_at(shape[2]);
        assert!(first.iter().all(|value| !value.is_finite()), "{wrong}: {first:?}");
        assert!(second.iter().all(|value| value.is_finite()), "the other row is not touched");
    }
}

#[test]
fn products_in_8_bits_are_exact_on_any_machine() {
    check_int8(Instructions::Widened);
}

#[test]
#[cfg_attr(not(has_amx), ignore = "needs a processor with AMX-INT8")]
fn tiles_in_8_bits_are_exact() {
    check_int8(Instructions::Amx);
}

#[test]
#[cfg_attr(not(has_avx512_vnni), ignore = "needs a processor with AVX512-VNNI")]
fn quads_are_exact() {
    check_int8(Instructions::Avx512Vnni);
}

#[test]
fn weights_in_16_bits_are_widened_exactly() {
    let backend = CpuBackend::default();
    for (seed, shape) in SHAPES.into_iter().enumerate() {
        let (x, weight) = operands(shape, seed as u64);
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let round = |value: &f32| match dtype {
                Dtype::F32 => *value,
                Dtype::F16 => f16::from_f32(*value).to_f32(),
                Dtype::Bf16 => bf16_of(*value),
                Dtype::Int8 => unreachable!("8 bits have a scale"),
            };
            let rounded: Vec<f32> = weight.iter().map(round).collect();
            let matrix = Tensor::new(&[shape[2], shape[1]], weight.clone());
            let matrix = Matrix::stack(&[matrix], dtype);
            let found = product(&backend, shape, &x, &matrix, Epilogue::Store);
            for row in 0..shape[2] {
                let mut numbers = vec![0.0; shape[1]];
                matrix.read_row(row, &mut numbers);
                assert_eq!(numbers, rounded[row * shape[1]..(row + 1) * shape[1]]);
            }
            assert_eq!(
                found,
                expected(shape, &x, &rounded, false, in_one_chain),
                "{dtype:?} {shape:?}"
            );
        }
    }
}

#[test]
fn stacked_parts_are_one_matrix() {
    let mut cases = Cases::new(1);
    let num_in = 37;
    let parts: Vec<Tensor> = [5, 64, 1, 40]
        .map(|rows| Tensor::new(&[rows, num_in], cases.numbers(rows * num_in)))
        .to_vec();
    let all: Vec<f32> = parts.iter().flat_map(Tensor::to_vec).collect();
    let shape = [3, num_in, all.len() / num_in];
    let x = cases.numbers(3 * num_in);
    let matrix = Matrix::stack(&parts, Dtype::F32);
    let found = product(&CpuBackend::default(), shape, &x, &matrix, Epilogue::Store);
    assert_eq!(found, expected(shape, &x, &all, false, in_one_chain));
}
