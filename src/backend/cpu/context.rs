//! The context of one KV head as matrices: what attention multiplies queries and weights with.

use std::ops::Deref;

use rten_simd::SimdOp;

use super::matmul::{PANEL, Product};
use super::memory::PageLayout;
use crate::pages::PAGE_LEN;

/// Queries that are worked on together, so that their scores stay in the cache.
pub(super) const QUERIES_PER_TILE: usize = 128;

/// One set of a context's keys and values, of one KV head, page by page.
pub(super) struct HeadContext<'a> {
    head_dim: usize,
    /// Panels of 32 tokens.
    keys: Vec<&'a [f32]>,
    /// By page: panels of 32 columns.
    values: Vec<Vec<&'a [f32]>>,
}

/// Queries of one head: `rows` of them, each so many floats after the one before.
#[derive(Clone, Copy)]
pub(super) struct Queries<'a> {
    pub values: &'a [f32],
    pub stride: usize,
    pub rows: usize,
}

impl<'a> HeadContext<'a> {
    /// Of the first `len` tokens in `pages`.
    pub fn new<P: Deref<Target = Vec<f32>>>(
        pages: &'a [P],
        len: usize,
        layout: &PageLayout,
        set: usize,
        kv_head: usize,
    ) -> HeadContext<'a> {
        let head_dim = layout.head_dim();
        let parts = pages[..len.div_ceil(PAGE_LEN)].iter();
        let (keys, values): (Vec<_>, Vec<_>) =
            parts.map(|page| layout.keys_values(page, set, kv_head)).unzip();
        let panels = |values: &'a [f32]| values.chunks_exact(PAGE_LEN * PANEL).collect();
        HeadContext {
            head_dim,
            keys: keys.into_iter().flat_map(|keys| keys.chunks_exact(PANEL * head_dim)).collect(),
            values: values.into_iter().map(panels).collect(),
        }
    }

    /// `scores[r][t] = queries[r] . keys[t]` for the first `len` tokens; `scores`: `[rows, len]`.
    pub fn scores(&self, queries: Queries<'_>, len: usize, scores: &mut [f32]) {
        if len == 0 {
            return;
        }
        let mut out: Vec<&mut [f32]> = scores.chunks_exact_mut(len).collect();
        assert_eq!(out.len(), queries.rows, "a row of scores for each query");
        Product {
            x: queries.values,
            stride: queries.stride,
            num_in: self.head_dim,
            panels: &self.keys,
            bias: None,
            adds: false,
            out: &mut out,
        }
        .dispatch();
    }

    /// `out[r] = sum over t of weights[r][t] * values[t]`; `weights`: `[rows, len]`.
    ///
    /// Each element is summed page by page, so a row's result does not depend on how far the others
    /// of its tile reach.
    pub fn weigh(&self, weights: &[f32], len: usize, out: &mut [&mut [f32]]) {
        for (page, panels) in (0..len).step_by(PAGE_LEN).zip(&self.values) {
            Product {
                x: &weights[page..],
                stride: len,
                num_in: (len - page).min(PAGE_LEN),
                panels,
                bias: None,
                adds: page > 0,
                out,
            }
            .dispatch();
        }
    }
}
