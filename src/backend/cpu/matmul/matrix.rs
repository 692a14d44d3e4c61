//! Weight matrices in panels.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};

use bytemuck::Pod;
use half::f16;
use rayon::prelude::*;

use super::packed_rows::{MOST, inverse, largest, quantize};
use super::panel::{Element, PANEL, Pair, Quad, words_of_row};
use crate::mapping::MappedMemory;
use crate::tensor::{Dtype, Tensor};

/// Panels that are packed before the pages of their file are given back.
const PANELS_PER_STRETCH: usize = 64;
/// Inputs that are transposed at a time, so that what is read and written stays in the cache.
const INPUTS_PER_BLOCK: usize = 64;

/// A weight matrix `[out, in]`, in panels.
pub struct Matrix {
    pub(super) panels: Panels,
    pub(in crate::backend::cpu) num_in: usize,
    pub(in crate::backend::cpu) num_out: usize,
}

/// `[out / 32][in][32]`, `[out / 32][in / 2][32]` of pairs, or `[out / 32][in / 4 + 2][32]` of quads. The
/// last panel is filled up with zeros.
pub(super) enum Panels {
    F32(Aligned<f32>),
    F16(Aligned<f16>),
    Bf16(Aligned<Pair>),
    Int8(Aligned<Quad>),
}

/// Numbers that begin with a cache line, so that no load of a whole register takes two.
pub(super) struct Aligned<W> {
    memory: MappedMemory,
    number: PhantomData<W>,
}

impl<W: Pod> Aligned<W> {
    fn zeros(len: usize) -> Aligned<W> {
        Aligned { memory: MappedMemory::zeros(len * size_of::<W>()), number: PhantomData }
    }
}

impl<W: Pod> Deref for Aligned<W> {
    type Target = [W];

    fn deref(&self) -> &[W] {
        bytemuck::cast_slice(&self.memory)
    }
}

impl<W: Pod> DerefMut for Aligned<W> {
    fn deref_mut(&mut self) -> &mut [W] {
        bytemuck::cast_slice_mut(&mut self.memory)
    }
}

/// Rows of several tensors, one after the other.
struct Rows<'a> {
    parts: &'a [Tensor],
    num_in: usize,
}

impl Matrix {
    /// Stacks `[out_i, in]` matrices, as numbers of `dtype`.
    pub fn stack(parts: &[Tensor], dtype: Dtype) -> Matrix {
        let num_in = parts[0].shape()[1];
        assert!(parts.iter().all(|part| part.shape()[1] == num_in), "parts must agree");
        let num_out = parts.iter().map(|part| part.shape()[0]).sum();
        let rows = Rows { parts, num_in };
        let panels = match dtype {
            Dtype::F32 => {
                Panels::F32(rows.pack(num_out, Tensor::read, pack_singly(|value: f32| value)))
            }
            Dtype::F16 => Panels::F16(rows.pack(num_out, Tensor::read, pack_singly(f16::from_f32))),
            Dtype::Bf16 => Panels::Bf16(rows.pack(num_out, Tensor::read_bf16, pack_pairs)),
            Dtype::Int8 => Panels::Int8(rows.pack(num_out, Tensor::read, pack_quads)),
        };
        Matrix { panels, num_in, num_out }
    }
}

impl Matrix {
    /// The weights of one output, in f32.
    pub fn read_row(&self, row: usize, out: &mut [f32]) {
        let column = row % PANEL;
        match &self.panels {
            Panels::F32(panels) => {
                let panel = panels[row / PANEL * f32::panel_len(self.num_in)..].chunks_exact(PANEL);
                out.iter_mut().zip(panel).for_each(|(out, row)| *out = row[column]);
            }
            Panels::F16(panels) => {
                let panel = panels[row / PANEL * f16::panel_len(self.num_in)..].chunks_exact(PANEL);
                out.iter_mut().zip(panel).for_each(|(out, row)| *out = row[column].to_f32());
            }
            Panels::Int8(panels) => {
                let words = words_of_row::<Quad>(self.num_in);
                let panel = &panels[row / PANEL * Quad::panel_len(self.num_in)..];
                let Quad(scale) = panel[words * PANEL + column];
                for (out, row) in out.chunks_mut(4).zip(panel.chunks_exact(PANEL)) {
                    for (out, byte) in out.iter_mut().zip(row[column].0.to_le_bytes()) {
                        *out = f32::from(byte.cast_signed()) * f32::from_bits(scale);
                    }
                }
            }
            Panels::Bf16(panels) => {
                let panel =
                    panels[row / PANEL * Pair::panel_len(self.num_in)..].chunks_exact(PANEL);
                for (out, row) in out.chunks_mut(2).zip(panel) {
                    let Pair(pair) = row[column];
                    let numbers = [f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000)];
                    out.copy_from_slice(&numbers[..out.len()]);
                }
            }
        }
    }
}

impl Rows<'_> {
    /// Packs all rows, panel by panel; `read` reads numbers of a tensor, and `pack` fills a panel from
    /// rows of `num_in` of them.
    fn pack<T: Copy + Default, W: Element + Pod>(
        &self,
        num_out: usize,
        read: impl Fn(&Tensor, Range<usize>, &mut [T]) + Sync,
        pack: impl Fn(&[T], usize, &mut [W]) + Sync,
    ) -> Aligned<W> {
        let len = W::panel_len(self.num_in);
        let mut packed = Aligned::zeros(num_out.div_ceil(PANEL) * len);
        let stretches = packed.chunks_mut(PANELS_PER_STRETCH * len);
        let rows_per_stretch = PANELS_PER_STRETCH * PANEL;
        for (first, stretch) in (0..).step_by(rows_per_stretch).zip(stretches) {
            stretch.par_chunks_exact_mut(len).enumerate().for_each_init(
                || vec![T::default(); PANEL * self.num_in],
                |values, (panel, packed)| {
                    let first = first + panel * PANEL;
                    let rows = PANEL.min(num_out - first);
                    let values = &mut values[..rows * self.num_in];
                    self.read(&read, first, values);
                    pack(values, self.num_in, packed);
                },
            );
            self.forget(first, num_out.min(first + rows_per_stretch));
        }
        packed
    }

    /// Reads whole rows from `first` on.
    fn read<T>(
        &self,
        read: impl Fn(&Tensor, Range<usize>, &mut [T]),
        mut first: usize,
        mut out: &mut [T],
    ) {
        for part in self.parts {
            let rows = part.shape()[0];
            let taken = rows.saturating_sub(first).min(out.len() / self.num_in);
            if taken > 0 {
                let (now, rest) = out.split_at_mut(taken * self.num_in);
                read(part, first * self.num_in..(first + taken) * self.num_in, now);
                out = rest;
            }
            first = first.saturating_sub(rows);
        }
    }

    /// Gives back the memory of rows that were read from files.
    fn forget(&self, mut first: usize, mut end: usize) {
        for part in self.parts {
            let rows = part.shape()[0];
            let range = first.min(rows)..end.min(rows);
            part.forget(range.start * self.num_in..range.end * self.num_in);
            (first, end) = (first.saturating_sub(rows), end.saturating_sub(rows));
        }
    }
}

/// Packs rows so that each input's weights stand side by side.
fn pack_singly<W>(number: impl Fn(f32) -> W) -> impl Fn(&[f32], usize, &mut [W]) {
    move |rows, num_in, panel| {
        for first in (0..num_in).step_by(INPUTS_PER_BLOCK) {
            let inputs = first..num_in.min(first + INPUTS_PER_BLOCK);
            for (column, row) in rows.chunks_exact(num_in).enumerate() {
                let panel_rows = panel[first * PANEL..].chunks_exact_mut(PANEL);
                for (panel_row, value) in panel_rows.zip(&row[inputs.clone()]) {
                    panel_row[column] = number(*value);
                }
            }
        }
    }
}

/// Packs rows of bf16 so that two inputs' weights stand together.
fn pack_pairs(rows: &[u16], num_in: usize, panel: &mut [Pair]) {
    for first in (0..num_in).step_by(INPUTS_PER_BLOCK) {
        let inputs = first..num_in.min(first + INPUTS_PER_BLOCK);
        for (column, row) in rows.chunks_exact(num_in).enumerate() {
            let panel_rows = panel[first / 2 * PANEL..].chunks_exact_mut(PANEL);
            let (pairs, last) = row[inputs.clone()].as_chunks::<2>();
            let last = last.first().map(|&last| [last, 0]);
            for (panel_row, [low, high]) in panel_rows.zip(pairs.iter().copied().chain(last)) {
                panel_row[column] = Pair(u32::from(low) | u32::from(high) << 16);
            }
        }
    }
}

/// Packs rows as whole numbers, four inputs' weights in a word, and their scales and sums behind them.
fn pack_quads(rows: &[f32], num_in: usize, panel: &mut [Quad]) {
    let (panel, ends) = panel.split_at_mut(words_of_row::<Quad>(num_in) * PANEL);
    for (column, row) in rows.chunks_exact(num_in).enumerate() {
        let scale = largest(row) / MOST;
        let inverse = inverse(scale);
        let mut sum = 0;
        for (word, values) in row.chunks(4).enumerate() {
            let mut bytes = [0; 4];
            for (byte, value) in bytes.iter_mut().zip(values) {
                *byte = quantize(*value, inverse);
                sum += i32::from(byte.cast_signed());
            }
            panel[word * PANEL + column] = Quad(u32::from_le_bytes(bytes));
        }
        ends[column] = Quad(scale.to_bits());
        ends[PANEL + column] = Quad(sum.cast_unsigned());
    }
}
